"""Search for the fastest mesh, remat policy and micro-batch of a config on a topology.

Formulas (lm/planning/estimate.py) prune what cannot fit or is far slower; the best few are
compiled, and the compiler's plans decide.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from lm.compiled import interconnect
from lm.compiled import topology as topologies
from lm.config import conversion
from lm.config.schema import Config, MeshConfig
from lm.config.tree import ConfigTree
from lm.layers.block_config import BlockConfig
from lm.layers.stack import REMAT
from lm.models import flops
from lm.optim import param_tree
from lm.parallel import sharding
from lm.parallel.sharding import AXES
from lm.planning import report
from lm.planning.estimate import Estimate, estimate
from lm.planning.plan import Make, Plan, Trial, Trials, with_changes
from lm.telemetry.progress import Progress
from lm.tokenizers import tokenizer
from lm.training.initialization import Initializer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Section = TypeVar("Section", bound=DataclassInstance)  # a frozen config or a section of one

Changes: TypeAlias = dict[str, object]  # of a config, by path
SHORTEST = 2048  # tokens of a row's shard: with less, exchanging keys costs more than it spares


def candidates(config: ConfigTree, num_devices: int) -> Iterator[Changes]:
    """Every mesh, remat policy and number of micro-batches that divides the sizes of a config.

    Axes count where the model has use for them: `expert` with experts, `sequence` for rows of
    which a shard keeps `SHORTEST` tokens, `stage` with a pipeline of 2 or 4 micro-batches a stage.
    """
    c = conversion.resolve(config)
    # host offload and the like are asked for, not found
    policies = [name for name in REMAT if "offload" not in name and "host" not in name]
    for mesh in meshes(c, num_devices):
        rows, rest = divmod(
            _batch_size(c, num_devices), mesh["data"] * mesh["fsdp"] * mesh["expert"]
        )
        if rest:
            continue
        named: Changes = {
            f"mesh.{axis}": size
            for axis, size in mesh.items()
            if axis in ("data", "fsdp", "tensor") or size != getattr(c.mesh, axis)
        }
        ways: list[Changes]
        if mesh["stage"] > 1:
            parts = [m for m in (2 * mesh["stage"], 4 * mesh["stage"]) if rows % m == 0]
            ways = [
                {"model.pipeline.num_microbatches": m, "train.num_microbatches": 1} for m in parts
            ]
        else:
            ways = [{"train.num_microbatches": k} for k in _powers(rows) if rows % k == 0]
        for remat, way in itertools.product(policies, ways):
            yield {**named, "model.remat": remat, **way}


def _batch_size(c: Config, num_devices: int) -> int:
    return c.data.batch_size or (c.data.batch_size_per_device or 1) * num_devices


def meshes(c: Config, num_devices: int) -> Iterator[dict[str, int]]:
    """Sizes of the mesh axes that multiply to `num_devices` and divide a model's dimensions."""
    model, length = c.model, c.data.length
    experts, repeats = model.moe.num_experts, model.pipeline.num_repeats
    tensors = [n for n in _powers(16) if model.kv_heads % n == 0 and model.mlp_size % n == 0]
    sequences = [1] + [n for n in (2, 4, 8, 16) if length % n == 0 and length // n >= SHORTEST]
    stages = [1] + [n for n in (2, 4, 8, 16) if model.num_layers % (n * repeats) == 0]
    expert_axes = [n for n in _powers(experts) if experts % n == 0] if experts else [1]
    for tensor, sequence, stage, expert, data in itertools.product(
        tensors, sequences, stages, expert_axes, _powers(num_devices)
    ):
        fsdp, rest = divmod(num_devices, tensor * sequence * stage * expert * data)
        if (
            not rest
            and data % c.mesh.slices == 0
            and fsdp
            and model.embed_dim % fsdp == 0
            and model.vocab_size % tensor == 0
            and length % (tensor * sequence) == 0
        ):
            sizes = (data, fsdp, expert, tensor, sequence, stage)
            yield dict(zip(AXES, sizes, strict=True))


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(max(1, limit).bit_length())]


def search(
    config: ConfigTree,
    name: str,
    make: Make,
    *,
    num_compiled: int = 4,
    show: Progress | None = None,
) -> Trials:
    """The fastest candidate that fits, after compiling `num_compiled` and more until one fits.

    Raises:
        ValueError: a model that is no transformer, or a topology without published peaks.
    """
    target = topologies.parse(name)
    devices = topologies.devices(target)
    asked = conversion.resolve(config)
    model = asked.model
    if not isinstance(model, BlockConfig):
        raise ValueError(
            f"--search has estimates of transformers only; config.model is one of "
            f"{type(model).__module__}: plan its meshes one by one"
        )
    names = param_tree.unflatten({p.name: p for p in flops.abstract_parameters(model)})
    load = functools.partial(tokenizer.load, asked.data.tokenizer)
    frozen = Initializer(asked, names, load).frozen

    @functools.cache
    def placed(mesh: MeshConfig) -> tuple[sharding.Rules, list[interconnect.ChipCoord]]:
        rules = sharding.make_rules(mesh, devices)
        return rules, interconnect.chip_coords(target, rules.mesh)

    pruned = Counter[str]()
    ranked: list[tuple[Changes, Estimate]] = []
    for changes in candidates(config, len(devices)):
        c = _replaced(asked, changes)
        rules, coords = placed(c.mesh)
        rows = _batch_size(c, len(devices))
        guess = estimate(c, rows, target, rules, coords=coords, frozen=frozen)
        if target.chip.hbm and guess.memory > target.chip.hbm:
            pruned["do not fit, by formula"] += 1
        else:
            ranked.append((changes, guess))
    ranked.sort(key=lambda candidate: candidate[1].seconds)
    tried: list[Trial] = []
    for changes, guess in _spread(ranked):
        enough = len(tried) >= num_compiled and any(trial.fits for trial in tried)
        if enough or len(tried) >= 3 * num_compiled:
            break
        flags = " ".join(f"--config.{path}={value}" for path, value in changes.items())
        if show is not None:
            show.note(f"{len(tried) + 1}: {flags}")
        memory, seconds = report.format_bytes(guess.memory), report.duration(guess.seconds)
        formula = f"by formula {memory}, {seconds}"
        try:
            tried.append(Trial(flags, make(with_changes(config, changes), name, None), (formula,)))
        except ValueError as error:
            tried.append(Trial(flags, None, (f"refused: {error}", formula)))
    if left := len(ranked) - len(tried):
        pruned["slower, by formula"] = left
    return judge(tried, pruned)


def _replaced(section: Section, changes: Mapping[str, object]) -> Section:
    """A resolved config with changes by path: a hundredth of the time of resolving it again."""
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        new = _replaced(getattr(section, name), {rest: value}) if rest else value
        section = dataclasses.replace(section, **{name: new})
    return section


def _spread(ranked: Sequence[tuple[Changes, Estimate]]) -> list[tuple[Changes, Estimate]]:
    """The best first, one of each mesh and remat policy before a second of any, as neighbours fail
    for the same reasons; those that are far slower last.
    """
    seen = Counter[tuple[object, ...]]()
    order = []
    for changes, guess in ranked:
        kind = tuple(v for k, v in changes.items() if k != "train.num_microbatches")
        order.append((guess.seconds >= 1.5 * ranked[0][1].seconds, seen[kind], len(order)))
        seen[kind] += 1
    return [ranked[i] for *_, i in sorted(order)]


def judge(tried: Sequence[Trial], pruned: Mapping[str, int]) -> Trials:
    """The winner first, and the reason why each of the others that fit lost."""

    def seconds(trial: Trial) -> float:
        return trial.plan.times.midpoint_s if trial.plan and trial.plan.fits else float("inf")

    ordered = sorted(tried, key=seconds)
    winner = ordered[0] if ordered and ordered[0].fits else None
    if winner is not None and winner.plan is not None:
        ordered[1:] = [_with_reason(trial, winner.plan) for trial in ordered[1:]]
    return Trials("the fastest that fits, by the middle of its interval", winner, ordered, pruned)


def _with_reason(trial: Trial, best: Plan) -> Trial:
    plan = trial.plan
    if plan is None or not plan.fits:
        return trial
    parts, fastest = plan.times.parts(), best.times.parts()
    worst = max(parts, key=lambda name: parts[name] - fastest.get(name, 0.0))
    slower, other = plan.times.midpoint_s / best.times.midpoint_s - 1, fastest.get(worst, 0.0)
    reason = f"{slower:+.0%} time: {worst} takes {parts[worst]:.3f} s, not {other:.3f} s"
    return dataclasses.replace(trial, remarks=(reason, *trial.remarks))
