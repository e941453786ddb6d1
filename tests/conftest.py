"""Eight fake CPU devices, and makers of tiny models, batches and experiments for all tests."""

import functools
import gc
import importlib.metadata
import os
import signal
import uuid
from pathlib import Path

# Before jax is imported. Without LLVM's optimisations and MLIR's emitters compiling takes a tenth
# of the time, and running tiny programs takes none; XLA's own passes, fusion and partitioning
# among them, stay as they are.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # jaxlib 0.12 has no such flags any more, and XLA ends a process that sets an unknown one;
        # a program in one part instead of 32, for threads that have no core of their own
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        * importlib.metadata.version("jaxlib").startswith("0.10."),
        # jaxlib 0.12 has products by YNNPACK: in 16 bits they round a row by its place in the batch
        "--xla_cpu_experimental_ynn_fusion_type="
        * importlib.metadata.version("jaxlib").startswith("0.12."),
        # a starved machine isn't a stuck one
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of XLA's CPU client, which are otherwise as many as devices or cores. A device runs what
# doesn't depend on each other at once, and a collective holds its thread until all devices have
# come: two that wait on one device then keep another one from ever starting, and XLA aborts.
os.environ.setdefault("NPROC", "64")
# One folder for this process and those that tests start, kept from run to run: a key is the hash of
# the program, the flags and the versions.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache/xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if importlib.metadata.version("jaxlib").startswith("0.12."):
    # Reading the cache is a segmentation fault there, once in thousands of programs.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# As scripts set it: they would start a second time.
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"

import jax
import numpy as np
import object_stores
import pytest
from flax import traverse_util

from lm.config import conversion
from lm.config import schema as configs
from lm.models import decoder
from lm.parallel.sharding import make_rules
from lm.training.experiment import Experiment
from lm.types import Batch, Tokens

TINY = {
    "vocab_size": 264,  # the byte tokenizer's 259, and divisible by 8
    "max_length": 32,
    "num_layers": 2,
    "embed_dim": 16,
    "num_heads": 4,
    "num_kv_heads": 4,
    "mlp_dim": 32,
    "init_std": 0.2,  # large enough that attention and the loss are far from uniform
}


# Keys of a config that no compiled step depends on.
AROUND = (
    *("checkpoint.", "loader.", "log.parameter_table", "log.profile", "log.tracker"),
    *("log.layers_every", "evaluations."),
    *("data.validation", "train.eval_every", "train.log_every"),
    *("guard.agreement_every", "guard.max_skips", "guard.policy", "guard.self_check"),
)


# What runs in the background of a shell ignores SIGINT, and so would every process started here.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of a few long tests. Started last, one of them would run by itself in the end.
FIRST = ("resume", "processes", "launch", "kill", "verify", "notebooks", "pipelining", "policies")


def pytest_collection_modifyitems(items):
    names = [f"test_{name}" for name in FIRST]
    items.sort(key=lambda item: names.index(n) if (n := item.path.stem) in names else len(names))


def pytest_collection_finish():
    """Collect garbage less often: tracing makes much and leaves little of it, and JAX calls into
    XLA at every pass.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope="module")
def buckets():
    """Emulated gs:// and s3://, in the environment."""
    with object_stores.in_this_process():
        yield


@pytest.fixture(params=["local", "gs", "s3"])
def folder(request, tmp_path):
    """An empty folder."""
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("buckets")
    return f"{request.param}://{object_stores.BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def devices():
    """The eight fake devices."""
    found = jax.devices()
    assert len(found) == 8 and found[0].platform == "cpu"
    return found


@pytest.fixture(scope="session")
def rules_on(devices):
    """(**axes) -> Rules on as many devices as they need; `rules` replaces rows of the table."""

    def make(rules=(), **axes):
        mesh = configs.MeshConfig(**{"data": 1, **axes}, rules=rules)
        return make_rules(mesh, devices[: int(np.prod(list(axes.values()), dtype=int))])

    return make


@pytest.fixture(scope="session")
def tiny_decoder(rules_on):
    """(**changes) -> a decoder of two small layers on one device."""

    def make(**changes):
        config = decoder.Config(**{**TINY, **changes})
        config.check(config.max_length)
        return decoder.build(config, rules_on())

    return make


@pytest.fixture(scope="session")
def pack():
    """(rows of segment lengths, ...) -> Tokens with random ids; what they leave is padding."""

    def make(rows, *, length, vocab_size, seed=0):
        rng = np.random.default_rng(seed)
        segments = np.zeros((len(rows), length), np.int32)
        positions = np.zeros((len(rows), length), np.int32)
        for row, lengths in enumerate(rows):
            start = 0
            for number, size in enumerate(lengths):
                segments[row, start : start + size] = number + 1
                positions[row, start : start + size] = np.arange(size)
                start += size
        ids = rng.integers(0, vocab_size, segments.shape).astype(np.int32)
        return Tokens(ids=ids * (segments != 0), segments=segments, positions=positions)

    return make


@pytest.fixture(scope="session")
def packed_batch(pack):
    """(batch_size, length, vocab_size) -> a Batch of segments, padding and uneven weights."""

    def make(batch_size, length, vocab_size, *, seed=0):
        rng = np.random.default_rng([1, seed])
        rows = [
            np.diff([0, *sorted(rng.choice(np.arange(1, length), 3, replace=False))]).tolist()
            for _ in range(batch_size)
        ]
        inputs = pack(rows, length=length, vocab_size=vocab_size, seed=seed)
        weights = rng.choice([0, 0.25, 1, 3], inputs.ids.shape) * (inputs.segments != 0)
        targets = rng.integers(0, vocab_size, inputs.ids.shape)
        records = rng.integers(0, 2**32, batch_size, np.uint32)
        return Batch(inputs, targets.astype(np.int32), weights.astype(np.float32), records=records)

    return make


@pytest.fixture(scope="session")
def make_config():
    """(changes by dotted path) -> the ConfigDict of a tiny run on synthetic data."""

    def make(changes=None):
        config = conversion.default()
        config.model.update(TINY)
        values = {
            "data.train": ("synthetic:markov",),
            "data.length": 32,
            "data.batch_size": 16,
            "loader.kind": "thread",
            "loss.chunk_size": 128,
            "train.num_steps": 10,
            "log.parameter_table": False,
            "log.trackers": ("jsonl",),
        }
        config.update_from_flattened_dict({**values, **(changes or {})})
        return config

    return make


@pytest.fixture(scope="session")
def step_cache():
    """{what it depends on: compiled step}, of `shared_steps`."""
    return {}


@pytest.fixture(scope="module")
def shared_steps(step_cache):
    """Experiments share compiled steps unless they differ in something that a step depends on.

    Tracing a step takes longer than a tiny run's training; the cache on disk has the program of an
    equal trace anyway.
    """

    def shared(name):
        make = vars(Experiment)[name].func

        def get(experiment):
            config = traverse_util.flatten_dict(experiment.config_dict.to_dict(), sep=".")
            steps = [(k, repr(v)) for k, v in sorted(config.items()) if not k.startswith(AROUND)]
            key = name, experiment.rules.mesh, tuple(steps)
            if key not in step_cache:
                step_cache[key] = make(experiment)
            return step_cache[key]

        found = functools.cached_property(get)
        found.__set_name__(Experiment, name)
        return found

    with pytest.MonkeyPatch.context() as patch:
        names = ("boxed_params", "train_step", "eval_step", "compare_replicas", "measure_layers")
        for name in names:
            patch.setattr(Experiment, name, shared(name))
        yield


@pytest.fixture(scope="session")
def make_experiment(make_config, devices):
    """(changes by dotted path, **mesh axes) -> a tiny Experiment on the devices of the axes."""

    def make(changes=None, **axes):
        config = make_config(changes)
        config.mesh.update({"data": 1, **axes})
        size = int(np.prod(list(axes.values()), dtype=int))
        return Experiment(config, devices[:size])

    return make
