"""Flash attention compiled for a GPU that is not here, by the real compiler."""

import re

import jax
import jax.numpy as jnp
import pytest

from lm.compiled import topology
from lm.config.schema import MeshConfig
from lm.kernels import attention_kernels
from lm.kernels.dot_product import self_mask
from lm.parallel.sharding import make_rules
from lm.types import Tokens

pytestmark = pytest.mark.slow  # and skipped without jax[cuda13]


@pytest.fixture(scope="module")
def gpus():
    pytest.importorskip("jax_cuda13_plugin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
        return topology.devices(topology.parse("h100:2"))


def compiled_text(gpus, policy, *, length=1024, head_dim=128, heads=(8, 2), **options):
    rules = make_rules(MeshConfig(data=2), gpus)

    def abstract(shape, dtype, *logical):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(*logical))

    def array(num):
        shape = (4, num, length, head_dim)
        return abstract(shape, jnp.bfloat16, "batch", "heads", "length", None)

    tokens = Tokens(*[abstract((4, length), jnp.int32, "batch", "length")] * 3)
    window = options.pop("window", None)

    def loss(q, k, v, tokens):
        def run(q, k, v):
            mask = self_mask(tokens, window=window)
            return attention_kernels.attend(q, k, v, mask, rules=rules, scale=0.1, **options)

        y = jax.checkpoint(run, policy=policy)(q, k, v)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    shapes = array(heads[0]), array(heads[1]), array(heads[1]), tokens
    kept = jax.config.jax_compilation_cache_dir  # it can't be read without the GPU
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().as_text()
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


SAVED = jax.checkpoint_policies.save_only_these_names("attended")


def kernel_calls(text):
    return text.count('custom_call_target="__gpu$xla.gpu.triton"')


def test_flash_is_what_auto_is_and_runs_forward_once_where_attended_is_saved(gpus):
    text = compiled_text(gpus, SAVED)
    assert kernel_calls(text) == 3
    # of nine products of half the pairs, here of 2 rows of a device and 8 heads
    flops = sum(map(int, re.findall(r"flops\\22: \\22(\d+)", text)))
    assert flops == pytest.approx(9 * 2 * 2 * 8 * 1024 * 1024 / 2 * 128, rel=2e-3)
    assert kernel_calls(compiled_text(gpus, jax.checkpoint_policies.nothing_saveable)) == 4
    assert "1024,1024]" not in text  # no array of all pairs, not even a mask


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("length", [1000, 4096])
def test_flash_compiles_at_every_size_of_head(gpus, head_dim, length):
    options = {"window": 300, "softcap": 20.0} if length == 1000 else {}
    text = compiled_text(gpus, SAVED, length=length, head_dim=head_dim, **options)
    assert kernel_calls(text) == 3 and f"{length},{length}]" not in text
