"""Flags of XLA for the train step, by platform, each with its reason and source.

`config.train.compiler_flags` lists them as NAME=VALUE; `auto` stands for those of `TABLE` that are
for the platform. They are options of the one compilation, so that a plan compiles what a run does.
XLA_FLAGS and LIBTPU_INIT_ARGS count as always, where no option says otherwise.

    --config.train.compiler_flags="('auto','xla_tpu_scoped_vmem_limit_kib=65536')"

docs/plan.md has what the sets do to compiled schedules.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

AUTO = "auto"
PATH = "config.train.compiler_flags"
_NAME = re.compile(r"xla_\w+")
_BOOLS = {"true": True, "false": False}  # XLA reads numbers and names, but not these
_REFUSAL = re.compile(r"No such compile option: '?(xla_\w+)|While setting option (xla_\w+)")


class FlagSet(NamedTuple):
    """Flags that serve one purpose together, for steps on several devices of a platform."""

    platform: str
    flags: dict[str, bool | int]
    reason: str
    source: str


TABLE = (
    FlagSet(
        "gpu",
        {"xla_gpu_enable_latency_hiding_scheduler": True},
        "collectives start as early, and are waited for as late, as their data allow",
        "docs.jax.dev/en/latest/gpu_performance_tips.html",
    ),
    FlagSet(
        "gpu",
        {
            "xla_gpu_enable_pipelined_all_gather": True,
            "xla_gpu_enable_pipelined_reduce_scatter": True,
            "xla_gpu_enable_pipelined_all_reduce": True,
            "xla_gpu_enable_while_loop_double_buffering": True,
        },
        "collectives of one layer of a loop overlap with the products of the next",
        "docs.jax.dev/en/latest/gpu_performance_tips.html",
    ),
    FlagSet(
        "tpu",
        {
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
            "xla_enable_async_all_gather": True,
        },
        "gathers of parameters run as steps of the fusions with products beside them",
        "github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py",
    ),
    FlagSet(
        "tpu",
        {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
        "gathers of parameters before a product, not a loop of partial products: their sum, in the "
        "compute type, is read and written for every shard",
        "the plans of docs/plan.md",
    ),
    FlagSet(
        "tpu",
        {
            "xla_tpu_enable_data_parallel_all_reduce_opt": True,
            "xla_tpu_data_parallel_opt_different_sized_ops": True,
        },
        "reductions of gradients overlap with the rest of the backward pass",
        "github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py",
    ),
)


def options(entries: Sequence[str], platform: str, num_devices: int) -> dict[str, bool | int | str]:
    """The options of a compilation for so many devices, {name: value}; later entries win.

    Raises:
        ValueError: an entry is neither `auto` nor NAME=VALUE.
    """
    found: dict[str, bool | int | str] = {}
    for entry in entries:
        name, is_pair, value = entry.removeprefix("--").partition("=")
        if entry == AUTO:
            for flag_set in TABLE if num_devices > 1 else ():
                found |= flag_set.flags if flag_set.platform == platform else {}
        elif is_pair and _NAME.fullmatch(name):
            found[name] = _BOOLS.get(value, value)
        else:
            raise ValueError(f"{PATH}: {entry!r} is neither {AUTO} nor a flag xla_NAME=VALUE")
    return found


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Raise ValueError, with the config path, where the compiler knows no such flag or value."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not (refusal := _REFUSAL.search(str(error))):
            raise
        raise ValueError(
            f"{PATH}: the compiler of this platform does not take {refusal[1] or refusal[2]}: "
            f"{str(error).splitlines()[0]}"
        ) from None
