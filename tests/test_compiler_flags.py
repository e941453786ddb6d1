"""XLA's flags of the train step: by platform and mesh, refused by name, taken by the compilers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.compiled import topology
from lm.parallel import compiler_flags
from lm.training.loop import train


def test_auto_is_for_several_devices_of_its_platform_and_later_entries_win():
    gpu = compiler_flags.options(("auto", "xla_gpu_enable_pipelined_all_gather=false"), "gpu", 8)
    assert gpu["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert gpu["xla_gpu_enable_pipelined_all_gather"] is False
    assert all(name.startswith("xla_gpu_") for name in gpu)
    assert compiler_flags.options(("auto",), "tpu", 4).keys().isdisjoint(gpu)
    assert compiler_flags.options(("auto",), "gpu", 1) == {}
    assert compiler_flags.options(("auto",), "cpu", 8) == {}
    assert compiler_flags.options(("--xla_a=b=c",), "cpu", 1) == {"xla_a": "b=c"}


@pytest.mark.parametrize("entry", ["fast", "xla_gpu_x", "gpu_x=1", ""])
def test_what_is_no_flag_is_refused_before_anything_is_built(make_experiment, entry):
    with pytest.raises(ValueError, match=r"config.train.compiler_flags: .* is neither auto nor"):
        make_experiment({"train.compiler_flags": ("auto", entry)})


@pytest.mark.parametrize("flag", ["xla_no_such_flag=1", "xla_cpu_enable_fast_math=maybe"])
def test_a_flag_that_the_compiler_does_not_take_is_named(make_config, tmp_path, devices, flag):
    changes = {"train.compiler_flags": (flag,), "guard.self_check": False}
    name = flag.partition("=")[0]
    with pytest.raises(ValueError, match=f"config.train.compiler_flags: the compiler.*{name}"):
        train(make_config(changes), str(tmp_path), devices[:1])


def test_a_flag_reaches_the_compilation_of_the_step(make_experiment, tmp_path):
    flags = ("xla_cpu_enable_fast_math=true", f"xla_dump_to={tmp_path}")
    make_experiment({"train.compiler_flags": flags}).lower_train_step().compile()
    dumps = list(tmp_path.glob("*debug_options"))
    assert dumps and all("xla_cpu_enable_fast_math: true" in p.read_text() for p in dumps)


@pytest.mark.slow  # with libtpu and jax[cuda13], where they are
@pytest.mark.parametrize(
    "module, name", [("libtpu", "v5e:2x4"), ("libtpu", "v6e:2x4"), ("jax_cuda13_plugin", "h100:8")]
)
def test_compilers_take_the_table(module, name):
    pytest.importorskip(module)
    devices = topology.devices(topology.parse(name))
    mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))

    def abstract(shape, *spec):
        layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout)

    def loss(weights, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
        return jnp.sum(x.astype(jnp.float32))

    options = compiler_flags.options(("auto",), devices[0].platform, len(devices))
    assert options
    arrays = abstract((4, 1024, 1024), None, "fsdp"), abstract((64, 1024), "fsdp")
    jax.jit(jax.grad(loss), compiler_options=options).lower(*arrays).compile()
