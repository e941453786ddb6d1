"""Plausibility of a plan: its figures are read from a compiler's output whose form no version
promises, and a figure that is misread looks like any other.

A step multiplies no less than its model, no device exceeds its peak, layers whose weights are
sharded have them gathered, and the buffers add up to what the compiler says of its memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from lm.compiled.traffic import Collective
from lm.exit_codes import Exit, RunError
from lm.models import flops
from lm.optim import param_tree
from lm.planning.shards import bytes_on_device, sharded_axes
from lm.training.experiment import Experiment

if TYPE_CHECKING:
    from lm.planning.plan import Plan

LIBRARIES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax")
COMPILERS = LIBRARIES[:4]
TESTED = "jax 0.10.2 with libtpu 0.0.42, jax 0.12.0.1 with libtpu 0.0.52"
# Of the model's FLOPs. A branch that data chooses counts in equal parts with the others, which of
# attention in a ring may be a little less than what runs.
LEAST_FLOPS = 0.9
LEAST_PARAMETERS = 0.9  # of the bytes of their shards, some of which a step may not use
# Largest differences of the buffers from the compiler's own total; seen: 0.02, and 99 MiB that
# libtpu 0.0.42 adds to small programs on several chips of v5e and v6e.
BUFFERS, RESERVED = 0.1, 128 * 2**20


class ImplausiblePlan(RunError):
    """Figures that cannot be right. No mistake of the user's, and so no ValueError, which a search
    takes for a candidate that does not fit.
    """

    code = Exit.ERROR


def check(plan: Plan, experiment: Experiment, collectives: Sequence[Collective]) -> None:
    """Raise ImplausiblePlan, with its faults and the versions, unless a plan can be true."""
    wrong = [*_work(plan, experiment), *_memory(plan, experiment)]
    wrong += _gathers(plan, experiment, collectives)
    if wrong:
        named = ", ".join(f"{name} {v}" for name, v in versions().items() if name in COMPILERS)
        raise ImplausiblePlan(
            f"the plan for {plan.topology} cannot be right: {'; '.join(wrong)}. The output of this "
            f"compiler is not understood ({named}); tested are {TESTED}"
        )


def versions() -> Mapping[str, str]:
    """Versions of the installed libraries that a plan depends on."""
    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def _work(plan: Plan, experiment: Experiment) -> Iterator[str]:
    if not plan.model_flops:
        return
    needed = plan.model_flops * LEAST_FLOPS * _kept(experiment) * _in_products(plan, experiment)
    if plan.work.flops < needed and not plan.work.unknown:
        share = plan.work.flops / plan.model_flops
        yield (
            f"its products are {plan.work.flops:.3g} FLOP a device, {share:.1%} of the model's "
            f"{plan.model_flops:.3g}"
        )
    mfu = plan.mfu(plan.times.lower_bound_s)
    # that of bfloat16, which products of 8 bits may have twice
    if mfu is not None and mfu > (2 if plan.work.narrow_flops else 1):
        kernels = f" ({len(plan.work.unknown)} kernels declare no FLOPs)"
        yield f"MFU would be up to {mfu:.1%}{kernels if plan.work.unknown else ''}"


def _in_products(plan: Plan, experiment: Experiment) -> float:
    """The part of the model's FLOPs that a compiler can only do as matrix products. Scores of the
    one query that a decode step has are vectors', and TPUs multiply and add them elementwise.
    """
    if plan.step == "train":
        return 1.0
    model = experiment.config.model
    count = functools.partial(flops.flops_per_token, model, training=False, full_square=True)
    return count(length=1) / count(length=plan.length)


def _kept(experiment: Experiment) -> float:
    """The part of the model's FLOPs that a capacity of experts may leave."""
    moe = getattr(experiment.config.model, "moe", None)
    if moe is None or not moe.num_experts or moe.dispatch != "capacity":
        return 1.0
    return min(1.0, moe.capacity_factor)


def _memory(plan: Plan, experiment: Experiment) -> Iterator[str]:
    total, stated = plan.memory.total, plan.memory.stated
    if stated is not None and abs(total - stated) > max(BUFFERS * stated, RESERVED):
        yield f"its buffers add up to {total} bytes, the compiler says {stated}"
    held = bytes_on_device(jax.tree.leaves(experiment.abstract_params))
    found = plan.memory.groups.get("parameters", 0)
    if plan.step == "train" and found < LEAST_PARAMETERS * held:
        yield f"parameters take {found} bytes, their shards {held}"


def _gathers(
    plan: Plan, experiment: Experiment, collectives: Sequence[Collective]
) -> Iterator[str]:
    """Layers of a scanned stack of which neither weights nor activations cross `fsdp`."""
    c, mesh = experiment.config, experiment.rules.mesh
    layers, n = getattr(c.model, "num_layers", 0), mesh.shape["fsdp"]
    if plan.step != "train" or n == 1 or mesh.shape["stage"] > 1:
        return
    shards = [
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for name, leaf in param_tree.flatten(experiment.abstract_params).items()
        if "fsdp" in sharded_axes(leaf) and "layers" in name.split(".")
    ]
    # bytes that a device takes in for one forward pass
    needed = sum(shards) * (n - 1) * jnp.dtype(c.model.dtype).itemsize
    over = [x for x in collectives if "fsdp" in x.axes]
    count, sent = sum(x.times for x in over), sum(x.bytes for x in over)
    if count < layers and sent < needed:
        yield (
            f"{count:.0f} collectives cross fsdp ({n}) in {layers} layers, with {sent:.3g} bytes "
            f"where one pass over their weights takes {needed:.3g}"
        )
