"""The schedule of splash attention's blocks, against masks written out; and the TPU compiler."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config.schema import MeshConfig
from lm.kernels import attention_kernels, splash
from lm.kernels.dot_product import self_mask
from lm.parallel import zigzag
from lm.parallel.sharding import make_rules
from lm.types import Tokens


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 5, 11, 1000])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_block_is_visible_if_any_of_its_keys_is(shards, window, causal):
    length, block_q, block_kv = 48, 4, 6
    places = zigzag.positions(length, shards)
    distance = places[:, None] - np.arange(length)
    seen = distance >= 0 if causal else np.ones_like(distance, bool)
    if window is not None:
        seen &= np.abs(distance) < window
    blocks = seen.reshape(shards, -1, block_q, length // block_kv, block_kv).any(axis=(2, 4))
    places = places.reshape(shards, -1)
    found = splash.visible_blocks(places, length, block_q, block_kv, causal, window)
    np.testing.assert_array_equal(found, blocks)


def test_a_schedule_visits_every_visible_block_once_and_waits_at_the_last():
    seen = np.asarray([[[1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]], bool)
    load, work = splash.schedule(seen)
    assert load[0, :3].tolist() == [[0, 0, 0], [0, 2, 2], [1, 2, 3]]
    assert work[0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_a_window_takes_no_more_steps_than_it_has_blocks():
    infos = splash.mask_infos(
        zigzag.positions(8192, 1)[None], 8192, splash.block_sizes(8192, 8192), True, 1000
    )
    forward, dq, dkv = infos
    assert forward.data_next.shape == (1, 8, 2)
    assert dq.data_next.shape == (1, 16, 3) and dkv.data_next.shape == (1, 3, 16)


@pytest.mark.parametrize("length, limit, block", [(4096, 1024, 1024), (384, 1024, 384)])
def test_blocks_divide_the_length(length, limit, block):
    assert splash.block_size(length, limit) == block
    assert splash.block_size(5 * 128 * 7, 1024) == 896


# ---- the TPU compiler ----


@pytest.fixture(scope="module")
def chips():
    """Four chips that are not here, for their compiler."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            patch.setenv(name, value)
        return topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices


def compile_gradient(chips, policy, *, length=1024, head_dim=128, dtype="bfloat16", **axes):
    rules = make_rules(MeshConfig(**{"data": 1, **axes}), chips[: int(np.prod([*axes.values()]))])
    order = rules.size("length")

    def abstract(shape, dtype, *logical):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(*logical))

    def heads(num):
        return abstract((2, num, length, head_dim), dtype, "batch", "heads", "length", None)

    tokens = Tokens(*[abstract((2, length), jnp.int32, "batch", "length")] * 3)

    def loss(q, k, v, tokens):
        def run(q, k, v):
            mask = self_mask(tokens, order=order, window=300)
            return attention_kernels.attend(q, k, v, mask, rules=rules, scale=0.1, softcap=20.0)

        out = jax.checkpoint(run, policy=policy)(q, k, v)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    lowered = gradient.lower(heads(4), heads(2), heads(2), tokens)
    # what the cache keeps can't be read without the chips
    kept: Any = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


POLICIES = {
    "attended": jax.checkpoint_policies.save_only_these_names("attended"),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


@pytest.mark.parametrize(
    "saved, kernels_run", [("attended", 3), pytest.param("nothing", 4, marks=pytest.mark.slow)]
)
def test_splash_compiles_for_tpus_and_runs_forward_once_where_attended_is_saved(
    chips, saved, kernels_run
):
    """On a sharded, balanced length; with keys shared by query heads, a window and a soft cap."""
    text = compile_gradient(chips, POLICIES[saved], sequence=2, tensor=2).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels_run


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_splash_compiles_for_tpus_at_every_size_of_head(chips, head_dim, dtype):
    compiled = compile_gradient(
        chips, POLICIES["attended"], length=4096, head_dim=head_dim, dtype=dtype, fsdp=2
    )
    assert "tpu_custom_call" in compiled.as_text()
