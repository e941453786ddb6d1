"""What to try next, from what binds a plan or what it lacks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lm.planning import topology
from lm.training.experiment import Experiment

GIB = 2**30
# Of a GPU's memory: what NVIDIA's libraries and NCCL's buffers leave (jax took 90% until 2023).
LARGEST_SHARE = 0.9
REMAT = ("none", "dots", "projections", "attended", "full")  # from most to least that is saved


@dataclasses.dataclass(frozen=True)
class Advice:
    """Something to try: what it may do, and the flags that do it."""

    why: str
    flags: str


def advice(plan: Any, experiment: Experiment) -> tuple[Advice, ...]:
    """Changes worth a plan of their own, from what binds; the first is the likeliest."""
    found = _to_fit(plan, experiment) if not plan.fits else _to_gain(plan, experiment)
    return tuple(found[:4])


def _flag(path: str, value: Any) -> str:
    return f"--config.{path}={value}"


def _to_fit(plan: Any, experiment: Experiment) -> list[Advice]:
    c, groups = experiment.config, plan.memory.groups
    missing = -(plan.headroom or 0)
    found = []
    remat = getattr(c.model, "remat", "full")
    shards = experiment.rules.size("batch")
    k = c.train.num_microbatches
    chip = topology.parse(plan.topology).chip
    if chip.platform == "gpu" and plan.memory.total < LARGEST_SHARE * chip.memory:
        found.append(
            Advice(
                f"jax takes {(plan.capacity or 0) / chip.memory:.0%} of a GPU's memory: let it "
                "take more, in the run too",
                f"XLA_CLIENT_MEM_FRACTION={LARGEST_SHARE}",
            )
        )
    by_batch = sum(groups.get(n, 0) for n in ("saved activations", "temporaries", "kernels"))
    if remat != "full" and groups.get("saved activations", 0) > missing / 2:
        found.append(Advice("save only the inputs of layers", _flag("model.remat", "full")))
    if experiment.batch_size % (2 * k * shards) == 0 and by_batch > missing:
        found.append(
            Advice(
                f"halve what a micro-batch holds ({by_batch / GIB:.1f} GiB)",
                _flag("train.num_microbatches", 2 * k),
            )
        )
    data, fsdp = plan.mesh.get("data", 1), plan.mesh.get("fsdp", 1)
    state = groups.get("parameters", 0) + groups.get("optimizer", 0)
    if data > 1 and state > missing:
        found.append(
            Advice(
                f"shard parameters and optimizer state ({state / GIB:.1f} GiB) over data too",
                f"{_flag('mesh.data', 1)} {_flag('mesh.fsdp', data * fsdp)}",
            )
        )
    if c.optimizer.moment_dtype == "float32" and groups.get("optimizer", 0) / 2 > missing / 2:
        found.append(
            Advice("store moments in half the bytes", _flag("optimizer.moment_dtype", "bfloat16"))
        )
    if remat != "full" and not any("remat" in a.flags for a in found):
        found.append(Advice("save only the inputs of layers", _flag("model.remat", "full")))
    if fsdp % 2 == 0:
        found.append(
            Advice(
                "split activations and gathered parameters over two devices",
                f"{_flag('mesh.fsdp', fsdp // 2)} "
                f"{_flag('mesh.tensor', 2 * plan.mesh.get('tensor', 1))}",
            )
        )
    found.append(Advice("more chips: state is sharded further", "--topology=..."))
    return found


def _to_gain(plan: Any, experiment: Experiment) -> list[Advice]:
    c = experiment.config
    found = []
    binding, room = plan.times.bottleneck, plan.headroom or 0
    remat = getattr(c.model, "remat", "full")
    again = plan.work.flops / plan.model_flops - 1 if plan.model_flops else 0.0
    k = c.train.num_microbatches
    if binding == "compute" and remat in REMAT[2:] and room > 0.1 * (plan.capacity or 0):
        weaker = REMAT[REMAT.index(remat) - 1]
        found.append(
            Advice(
                f"{again:.0%} more FLOPs than the model has, and {room / GIB:.1f} GiB are free: "
                "save more, compute less again",
                _flag("model.remat", weaker),
            )
        )
    if "fsdp" in binding and k > 1:
        found.append(
            Advice(
                "every micro-batch gathers the parameters again: take fewer",
                _flag("train.num_microbatches", k // 2),
            )
        )
    tensor, fsdp = plan.mesh.get("tensor", 1), plan.mesh.get("fsdp", 1)
    state = plan.memory.groups.get("parameters", 0) + plan.memory.groups.get("optimizer", 0)
    if any("as all-reduces of zeros" in w for w in plan.warnings) and fsdp >= 64 and room > state:
        found.append(
            Advice(
                "gathers over 32 devices stay gathers: half the bytes",
                f"{_flag('mesh.data', plan.mesh.get('data', 1) * fsdp // 32)} "
                f"{_flag('mesh.fsdp', 32)}",
            )
        )
    if "tensor" in binding and tensor > 1:
        found.append(
            Advice(
                "activations cross tensor's links in every layer: shard parameters instead",
                f"{_flag('mesh.tensor', tensor // 2)} {_flag('mesh.fsdp', fsdp * 2)}",
            )
        )
    found += _products_of_attention(plan, experiment)
    # parameters and gradients, which cost as much for any number of tokens
    steady = binding == "network" or any(f"links, {axis}" == binding for axis in ("data", "fsdp"))
    if steady or (binding == "HBM" and 3 * state > plan.work.hbm_bytes / 2):
        found.append(
            Advice(
                f"{binding} binds, and takes about as long for more tokens",
                _flag("data.batch_size", plan.rows * 2),
            )
        )
    if room > 0.4 * (plan.capacity or math.inf):
        found.append(
            Advice(
                f"{room / GIB:.1f} GiB of {(plan.capacity or 0) / GIB:.1f} GiB are free: larger "
                "batches, or fewer chips",
                _flag("data.batch_size", plan.rows * 2),
            )
        )
    if binding == "network" and c.train.num_microbatches == 1:
        found.append(
            Advice("cross the network once for more tokens", _flag("train.num_microbatches", 2))
        )
    unique: dict[str, Advice] = {}
    for a in found:
        unique.setdefault(a.flags, a)
    return list(unique.values())


def _products_of_attention(plan: Any, experiment: Experiment) -> list[Advice]:
    """Where HBM binds because of scores that a kernel would not have written."""
    c = experiment.config.model
    kernel = getattr(c, "attention_kernel", "xla")
    scores = any("attend" in line.op for line in plan.memory.largest_temporary)
    if plan.times.bottleneck != "HBM" or experiment.rules.platform != "tpu" or not scores:
        return []
    if kernel == "xla":
        return [Advice("keep scores out of HBM", _flag("model.attention_kernel", "auto"))]
    if c.attention_dropout and c.positions != "relative":
        why = (
            "without dropout of its weights, attention takes a kernel that keeps scores out of HBM"
        )
        return [Advice(f"{why} (another model)", _flag("model.attention_dropout", 0.0))]
    return []
