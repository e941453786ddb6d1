"""Search for the fastest mesh, remat policy and micro-batch of a config on a topology.

Formulas (lm/planning/estimate.py) prune what cannot fit or is far slower; the best few are
compiled, and the compiler's plans decide.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from lm.config import conversion
from lm.config import schema as configs
from lm.config.tree import ConfigTree
from lm.layers.block_config import BlockConfig
from lm.layers.stack import REMAT
from lm.parallel import sharding
from lm.parallel.sharding import AXES
from lm.planning import interconnect
from lm.planning import topology as topologies
from lm.planning.estimate import Estimate, estimate
from lm.planning.plan import Make, Plan, with_changes
from lm.telemetry.progress import Progress

Section = TypeVar("Section", bound=Any)  # a frozen config or a section of one
SHORTEST = 2048  # tokens of a row's shard: with less, exchanging keys costs more than it spares


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Changes to a config, their estimate, and their plan or the reason that it lost."""

    changes: dict[str, object]
    estimate: Estimate
    plan: Plan | None = None
    lost: str = ""  # the reason; "" for the winner

    @property
    def flags(self) -> str:
        return " ".join(f"--config.{path}={value}" for path, value in self.changes.items())


@dataclasses.dataclass(frozen=True)
class Found:
    winner: Candidate | None
    compiled: tuple[Candidate, ...]  # the winner first
    pruned: dict[str, int]  # number of candidates, by reason


def estimated_step_seconds(plan: Plan) -> float:
    """The middle between all overlapped and nothing overlapped, by which plans are compared."""
    return (plan.times.lower_bound_s + plan.times.upper_bound_s) / 2


def candidates(config: ConfigTree, num_devices: int) -> Iterator[dict[str, object]]:
    """Every mesh, remat policy and number of micro-batches that divides the sizes of a config.

    Axes count where the model has use for them: `expert` with experts, `sequence` for rows of
    which a shard keeps `SHORTEST` tokens, `stage` with a pipeline of 2 or 4 micro-batches a stage.
    """
    c = conversion.resolve(config)
    batch = c.data.batch_size or (c.data.batch_size_per_device or 1) * num_devices
    # host offload and the like are asked for, not found
    policies = [name for name in REMAT if "offload" not in name and "host" not in name]
    for mesh in meshes(c, num_devices):
        shards = mesh["data"] * mesh["fsdp"] * mesh["expert"]
        rows, rest = divmod(batch, shards)
        if rest:
            continue
        named = {
            f"mesh.{axis}": size
            for axis, size in mesh.items()
            if axis in ("data", "fsdp", "tensor") or size != getattr(c.mesh, axis)
        }
        if mesh["stage"] > 1:
            parts = [m for m in (2 * mesh["stage"], 4 * mesh["stage"]) if rows % m == 0]
            ways = [
                {"model.pipeline.num_microbatches": m, "train.num_microbatches": 1} for m in parts
            ]
        else:
            ways = [{"train.num_microbatches": k} for k in _powers(rows) if rows % k == 0]
        for remat, way in itertools.product(policies, ways):
            yield {**named, "model.remat": remat, **way}


def meshes(c: configs.Config, num_devices: int) -> Iterator[dict[str, int]]:
    """Sizes of the mesh axes that multiply to `num_devices` and divide a model's dimensions."""
    model, length = c.model, c.data.length
    experts, layers = model.moe.num_experts, model.num_layers
    tensors = [n for n in _powers(16) if model.kv_heads % n == 0 and model.mlp_size % n == 0]
    sequences = [1] + [n for n in (2, 4, 8, 16) if length % n == 0 and length // n >= SHORTEST]
    repeats = model.pipeline.num_repeats
    stages = [1] + [n for n in (2, 4, 8, 16) if layers % (n * repeats) == 0]
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
    return [2**i for i in range(max(1, limit).bit_length()) if 2**i <= limit]


def search(
    config: ConfigTree,
    name: str,
    make: Make,
    *,
    num_compiled: int = 4,
    show: Progress | None = None,
) -> Found:
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
    pruned: dict[str, int] = {}
    ranked: list[Candidate] = []
    rules_of: dict[configs.MeshConfig, tuple[sharding.Rules, list[interconnect.ChipCoord]]] = {}
    for changes in candidates(config, len(devices)):
        c = _replaced(asked, changes)
        if c.mesh not in rules_of:
            rules = sharding.make_rules(c.mesh, devices)
            coords = interconnect.chip_coords(target, rules.mesh)
            rules_of[c.mesh] = (rules, coords)
        batch = c.data.batch_size or (c.data.batch_size_per_device or 1) * len(devices)
        rules, coords = rules_of[c.mesh]
        guess = estimate(c, batch, target, rules, coords=coords)
        if target.chip.hbm and guess.memory > target.chip.hbm:
            pruned["do not fit, by formula"] = pruned.get("do not fit, by formula", 0) + 1
        else:
            ranked.append(Candidate(changes, guess))
    ranked.sort(key=lambda r: r.estimate.seconds)
    tried: list[Candidate] = []
    for candidate in _spread(ranked):
        enough = len(tried) >= num_compiled and any(t.plan and t.plan.fits for t in tried)
        if enough or len(tried) >= 3 * num_compiled:
            break
        if show is not None:
            show.note(f"{len(tried) + 1}: {candidate.flags}")
        try:
            made = make(with_changes(config, candidate.changes), name, None)
        except ValueError as error:
            tried.append(dataclasses.replace(candidate, lost=f"refused: {error}"))
            continue
        tried.append(dataclasses.replace(candidate, plan=made))
    left = len(ranked) - len(tried)
    if left:
        pruned["slower, by formula"] = left
    return judge(tried, pruned)


def _replaced(section: Section, changes: Mapping[str, object]) -> Section:
    """A resolved config with changes by path: a hundredth of the time of resolving it again."""
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        new = _replaced(getattr(section, name), {rest: value}) if rest else value
        section = dataclasses.replace(section, **{name: new})
    return section


def _spread(ranked: list[Candidate]) -> Iterator[Candidate]:
    """The best first, one of each mesh and remat policy before a second of any: neighbours fail for
    the same reasons.
    """
    seen: dict[tuple[object, ...], int] = {}
    rounds: list[list[Candidate]] = []
    for candidate in ranked:
        kind = tuple(v for k, v in candidate.changes.items() if k != "train.num_microbatches")
        number = seen[kind] = seen.get(kind, -1) + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(candidate)
    best = ranked[0].estimate.seconds if ranked else 0.0
    later: list[Candidate] = []
    for members in rounds:
        for candidate in members:
            near = candidate.estimate.seconds < 1.5 * best
            if near:
                yield candidate
            else:
                later.append(candidate)
    yield from later


def judge(tried: list[Candidate], pruned: dict[str, int]) -> Found:
    """The winner, and the reason why each of the others lost."""
    fitting = [t for t in tried if t.plan is not None and t.plan.fits]
    if not fitting:
        return Found(None, tuple(_with_reason(t, None) for t in tried), pruned)
    winner = min(fitting, key=lambda t: estimated_step_seconds(t.plan))  # pyright: ignore
    others = [_with_reason(t, winner.plan) for t in tried if t is not winner]
    others.sort(
        key=lambda t: estimated_step_seconds(t.plan) if t.plan and t.plan.fits else float("inf")
    )
    return Found(winner, (winner, *others), pruned)


def _with_reason(candidate: Candidate, best: Plan | None) -> Candidate:
    plan = candidate.plan
    if plan is None:
        return candidate
    if not plan.fits:
        lost = f"does not fit: {-(plan.headroom or 0) / 2**30:.2f} GiB too much"
    elif best is None:
        lost = ""
    else:
        parts, fastest = plan.times.parts(), best.times.parts()
        extra = {n: t - fastest.get(n, 0.0) for n, t in parts.items()}
        worst = max(extra, key=lambda n: extra[n])
        slower = estimated_step_seconds(plan) / estimated_step_seconds(best) - 1
        lost = (
            f"{slower:+.0%} time: {worst} takes {parts[worst]:.3f} s, not "
            f"{fastest.get(worst, 0.0):.3f} s"
        )
    return dataclasses.replace(candidate, lost=lost)
