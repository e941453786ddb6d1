"""Comparison of a resumed run with the run in its folder, before anything is compiled.

A run is a function of (config, step). Resumed with another config it must still be one: the steps
done so far must be those that the new config would have done. Texts of configs don't tell, since a
batch depends on the number of devices and a learning rate on the length of the run; so what they
resolve to is compared, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from lm.checkpoint import manifest, step_files
from lm.checkpoint.manifest import Damaged
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.data import run_tokenizer
from lm.optim.schedules import fractions
from lm.parallel import process_group
from lm.training.experiment import CONFIG_FILE, LENGTHS, Experiment

# A resumed run with other values here would be another run; everything else may change, and is
# reported.
FIXED = ("model", "objective", "data", "seed")
BATCH = ("data.batch_size", "data.batch_size_per_device")
SCHEDULE = "optimizer.schedule"


@dataclasses.dataclass(frozen=True)
class Saved:
    """The record of a run in its folder; all processes have what the lead process read."""

    config: dict[str, Any] | None  # the text of config.json, as a tree
    step: int = 0  # of the newest checkpoint with a readable manifest
    trained: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # that manifest's config
    resolved: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # and what it came to
    leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)  # its arrays' dtype, shape


def resolved(experiment: Experiment) -> dict[str, int]:
    """Values that a config resolves to on its devices and data, for a checkpoint's manifest."""
    return {"batch_size": experiment.batch_size, "num_steps": experiment.num_steps}


def read(workdir: str) -> Saved:
    """Read the record of a folder; all processes call it together."""
    return Saved(**process_group.from_lead("saved run", lambda: _read(epath.Path(workdir))))


def _read(workdir: epath.Path) -> dict[str, Any]:
    path, checkpoints = workdir / CONFIG_FILE, workdir.resolve() / "checkpoints"
    found: dict[str, Any] = {"config": json.loads(path.read_text()) if path.exists() else None}
    for step in reversed(step_files.steps(checkpoints)):
        try:
            there = step_files.read_manifest(checkpoints / str(step))
        except Damaged:
            continue  # restoring passes over it, too, and says so
        leaves = {name: str(leaf) for name, leaf in there.leaves.items()}
        trained = {"trained": there.config, "resolved": there.resolved, "leaves": leaves}
        return found | {"step": step, **trained}
    return found


def check_config(
    saved: Saved, workdir: str, experiment: Experiment, say: Callable[[str], Any]
) -> bool:
    """Checks the values of the config; False if the run reads other data than it did, as was
    allowed.

    Raises:
        ValueError: a fixed value differs and `checkpoint.allow_changed` doesn't name it, or that
        names a path that does not exist.
    """
    now = experiment.config_dict
    before = now if saved.config is None else conversion.from_json(json.dumps(saved.config))
    allowed = experiment.config.checkpoint.allow_changed
    conversion.check_paths(allowed, [now, before], "config.checkpoint.allow_changed")
    if saved.config is None:
        return True
    same_data = True
    refused: list[tuple[str, str]] = []
    for key, (old, new) in conversion.changed(before, now).items():
        if (
            key == "data.tokenizer"
            and len({run_tokenizer.find(workdir, n) for n in (old, new)}) == 1
        ):
            continue  # the run's own copy, whose content `run_tokenizer.keep` compares
        line = f"config.{key}: {old!r} -> {new!r}"
        by_value = key in BATCH and "batch_size" in saved.resolved  # see `check_resolved`
        if key.split(".")[0] in FIXED and not by_value and not _is_allowed(experiment, key):
            refused.append((line, key))
        else:
            say(f"changed since this run began: {line}")
            same_data &= key.split(".")[0] not in ("objective", "data", "seed") or by_value
    if "batch_size" in saved.resolved:
        same_data &= saved.resolved["batch_size"] == experiment.batch_size
    _refuse(refused, workdir, experiment)
    return same_data


def check_resolved(
    saved: Saved, workdir: str, experiment: Experiment, say: Callable[[str], Any]
) -> None:
    """Checks the batch, and the learning rates of all steps that are done.

    Raises:
        ValueError: they differ and `checkpoint.allow_changed` doesn't name it.
    """
    if not saved.step or not saved.trained:
        return
    lines, c = [], experiment.config
    before, now = saved.resolved.get("batch_size"), experiment.batch_size
    if before not in (None, now):
        name = BATCH[0] if c.data.batch_size is not None else BATCH[1]
        given = f"config.{name} ({getattr(c.data, name.split('.')[1])})"
        line = f"{given} on {experiment.rules.mesh.size} devices: {before} -> {now} rows a batch"
        lines.append((line, any(_is_allowed(experiment, key) for key in BATCH), name))
    if line := _changed_rates(saved, experiment):
        lines.append((line, _is_allowed(experiment, SCHEDULE), SCHEDULE))
    for line, allowed, _ in lines:
        if allowed:
            say(f"changed since this run began: {line}")
    refused = [(line, key) for line, allowed, key in lines if not allowed]
    _refuse(refused, workdir, experiment)


def check_leaves(saved: Saved, workdir: str, experiment: Experiment) -> None:
    """Checks that a resumed run has the arrays of its checkpoint, whatever is allowed to change.

    Raises:
        ValueError: a change of the model or the optimizer gives it others.
    """
    if not saved.leaves or not saved.trained:
        return
    state = experiment.stored(experiment.abstract_state)
    tree = {"params": state.params, "opt_state": state.opt_state}
    if all(name.startswith("params.") for name in saved.leaves):  # an import
        del tree["opt_state"]
    wanted = {name: str(leaf) for name, leaf in manifest.leaves(tree).items()}
    differ = {name for name, _ in wanted.items() ^ saved.leaves.items()}
    before = conversion.from_json(json.dumps(saved.trained))
    changes = conversion.changed(before, experiment.config_dict).items()
    lines = [
        f"config.{key}: {old!r} -> {new!r}"
        for key, (old, new) in changes
        if key.split(".")[0] in ("init", "model", "objective", "optimizer")
    ]
    if differ and lines:
        raise ValueError(
            f"{workdir} can't go on with other arrays than its checkpoint has ({len(differ)} "
            "differ), and config.checkpoint.allow_changed doesn't help; change the config back, or "
            f"begin another run, in another --workdir, with --config.init.from={workdir}:\n  "
            + "\n  ".join(lines)
        )


def _changed_rates(saved: Saved, experiment: Experiment) -> str:
    """The surprise that a resumed run's learning rate would have, or "" where the steps done so far
    had the rates that the new config gives them.
    """
    before = conversion.from_json(json.dumps(saved.trained))
    length = saved.resolved.get("num_steps")
    if length is None:  # a checkpoint of older code
        train = conversion.resolve(before).train
        lengths = {f"train.{name}": getattr(train, name) for name in LENGTHS}
        length = experiment.variant(lengths).num_steps
    then, now = conversion.resolve(before).optimizer, experiment.config.optimizer
    done, num_steps = saved.step, experiment.num_steps
    old = fractions(then.schedule, length, done)
    new = fractions(now.schedule, num_steps, done + 1)
    if (old == new[:done]).all():
        return ""
    rates = then.learning_rate * old[-1], now.learning_rate * new[-1]
    return (
        f"config.{SCHEDULE} ({now.schedule.kind}): {length} -> {num_steps} steps in all, which "
        f"moves the learning rate from {rates[0]:.4g} at step {done - 1} to {rates[1]:.4g} at step "
        f"{done}; only constant, and wsd before its decay, can be made longer without a jump"
    )


def _is_allowed(experiment: Experiment, key: str) -> bool:
    allowed = experiment.config.checkpoint.allow_changed
    return any(key == a or key.startswith(a + ".") for a in allowed)


def _refuse(refused: Sequence[tuple[str, str]], workdir: str, experiment: Experiment) -> None:
    """Raises ValueError with every (line, key), and the one flag that allows them all."""
    if refused:
        keys = dict.fromkeys(
            [*experiment.config.checkpoint.allow_changed, *(key for _, key in refused)]
        )
        lines = "\n  ".join(line for line, _ in refused)
        raise ValueError(
            f"{workdir} holds a run with another config; use another --workdir, or allow it with "
            f'--config.checkpoint.allow_changed="{tuple(keys)}":\n  {lines}'
        )


def write_config(config: ConfigTree, workdir: str) -> None:
    """Writes config.json, whole or not at all."""
    path = epath.Path(workdir) / CONFIG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.parent / (CONFIG_FILE + ".new")
    written.write_text(conversion.to_json(config))
    written.replace(path)
