"""Comparison of a resumed run with the run in its folder, before anything is compiled.

A run is a function of (config, step). Resumed with another config it must still be one: the steps
done so far must be those that the new config would have done. The text of a config is not enough,
since the batch depends on the number of devices and the learning rate on the length of the run; so
the batch size and the learning rates are compared too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from lm import storage
from lm.checkpoint import manifest as manifests
from lm.checkpoint import step_files
from lm.checkpoint.manifest import Damaged, Manifest
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.data import run_tokenizer
from lm.optim.schedules import fractions
from lm.parallel import process_group
from lm.parallel.process_group import print_on_lead
from lm.training.experiment import CONFIG_FILE, Experiment
from lm.training.fork import BATCH, SCHEDULE, is_in
from lm.training.restore import stored_state

# A resumed run may not change these; every other change is reported.
FIXED = ("model", "objective", "data", "seed")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The run in a folder, the same in all processes."""

    config: dict[str, Any] | None = None  # of config.json; None before the run has started
    manifest: Manifest | None = None  # of the newest checkpoint whose manifest can be read

    @property
    def step(self) -> int:
        return 0 if self.manifest is None else self.manifest.step


def sizes(experiment: Experiment) -> dict[str, int]:
    """The entry `resolved` of manifests: values that a config has on its devices and data."""
    return {"batch_size": experiment.batch_size, "num_steps": experiment.num_steps}


def read(workdir: str) -> RunRecord:
    """Read the record of a folder in the lead process; all processes call it together."""
    config, manifest = process_group.from_lead("run record", lambda: _read(epath.Path(workdir)))
    return RunRecord(config, None if manifest is None else Manifest.from_json(manifest))


def _read(workdir: epath.Path) -> tuple[dict[str, Any] | None, str | None]:
    path, checkpoints = workdir / CONFIG_FILE, workdir.resolve() / "checkpoints"
    config = json.loads(path.read_text()) if path.exists() else None
    for step in reversed(step_files.steps(checkpoints)):
        try:
            manifest = step_files.read_manifest(checkpoints / str(step))
        except Damaged:
            continue  # restoring passes over it, too, and says so
        return config, json.dumps(manifest.to_dict())
    return config, None


def check_config(record: RunRecord, workdir: str, experiment: Experiment) -> bool:
    """Compare the config with the run's; False if the run reads other data than before, as allowed.

    Raises:
        ValueError: a fixed value differs and `checkpoint.allow_changed` does not name it, or that
        names a path that does not exist.
    """
    now = experiment.config_dict
    before = now if record.config is None else conversion.from_json(json.dumps(record.config))
    allowed = experiment.config.checkpoint.allow_changed
    conversion.check_paths(allowed, [now, before], "config.checkpoint.allow_changed")
    if record.config is None:
        return True
    batch_size = None if record.manifest is None else record.manifest.resolved.get("batch_size")
    same_data = batch_size in (None, experiment.batch_size)
    refused: list[tuple[str, str]] = []
    for key, (old, new) in conversion.changed(before, now).items():
        if key == "data.tokenizer" and (
            run_tokenizer.find(workdir, old) == run_tokenizer.find(workdir, new)
        ):
            continue  # the run's own copy, whose content `run_tokenizer.save` compares
        line = f"config.{key}: {old!r} -> {new!r}"
        by_value = key in BATCH and batch_size is not None  # see `check_sizes`
        if is_in(key, FIXED) and not by_value and not is_in(key, allowed):
            refused.append((line, key))
        else:
            print_on_lead(f"changed since this run began: {line}")
            same_data &= by_value or not is_in(key, ("objective", "data", "seed"))
    _refuse(refused, workdir, experiment)
    return same_data


def check_sizes(record: RunRecord, workdir: str, experiment: Experiment) -> None:
    """Compare the batch size, and the learning rates of all steps that are done.

    Raises:
        ValueError: they differ and `checkpoint.allow_changed` does not name it.
    """
    if record.manifest is None or not record.step or not record.manifest.config:
        return
    lines, c = [], experiment.config
    allowed = c.checkpoint.allow_changed
    before, now = record.manifest.resolved.get("batch_size"), experiment.batch_size
    if before not in (None, now):
        name = BATCH[0] if c.data.batch_size is not None else BATCH[1]
        given = f"config.{name} ({getattr(c.data, name.split('.')[1])})"
        line = f"{given} on {experiment.rules.mesh.size} devices: {before} -> {now} rows a batch"
        lines.append((line, any(is_in(key, allowed) for key in BATCH), name))
    if line := _changed_rates(record.manifest, experiment):
        lines.append((line, is_in(SCHEDULE, allowed), SCHEDULE))
    for line, is_allowed, _ in lines:
        if is_allowed:
            print_on_lead(f"changed since this run began: {line}")
    refused = [(line, key) for line, is_allowed, key in lines if not is_allowed]
    _refuse(refused, workdir, experiment)


def _changed_rates(manifest: Manifest, experiment: Experiment) -> str:
    """The jump of the learning rate at the resumed step; "" where all steps done so far had the
    rates that the new config gives them.
    """
    length, num_steps = experiment.num_steps_of(manifest), experiment.num_steps
    then = conversion.resolve(manifest.config_tree()).optimizer
    now, step = experiment.config.optimizer, manifest.step
    old = fractions(then.schedule, length, step)
    new = fractions(now.schedule, num_steps, step + 1)
    if (old == new[:step]).all():
        return ""
    rates = then.learning_rate * old[-1], now.learning_rate * new[-1]
    return (
        f"config.{SCHEDULE} ({now.schedule.kind}): {length} -> {num_steps} steps in all, which "
        f"moves the learning rate from {rates[0]:.4g} at step {step - 1} to {rates[1]:.4g} at step "
        f"{step}; only constant, and wsd before its decay, can be made longer without a jump"
    )


def check_leaves(record: RunRecord, workdir: str, experiment: Experiment) -> None:
    """Check that a resumed run has the arrays of its checkpoint, whatever is allowed to change.

    Raises:
        ValueError: a change of the model or the optimizer gives it others.
    """
    if record.manifest is None or not record.manifest.config:
        return
    stored = {name: str(leaf) for name, leaf in record.manifest.leaves.items()}
    state = stored_state(experiment, experiment.abstract_state)
    tree = {"params": state.params, "opt_state": state.opt_state}
    if record.manifest.has_only_params:  # an import
        del tree["opt_state"]
    expected = {name: str(leaf) for name, leaf in manifests.leaves(tree).items()}
    differ = {name for name, _ in expected.items() ^ stored.items()}
    changes = conversion.changed(record.manifest.config_tree(), experiment.config_dict).items()
    lines = [
        f"config.{key}: {old!r} -> {new!r}"
        for key, (old, new) in changes
        if is_in(key, ("init", "model", "objective", "optimizer"))
    ]
    if differ and lines:
        raise ValueError(
            f"{workdir} can't go on with other arrays than its checkpoint has ({len(differ)} "
            "differ), and config.checkpoint.allow_changed doesn't help; change the config back, or "
            f"begin another run, in another --workdir, with --config.init.from={workdir}:\n  "
            + "\n  ".join(lines)
        )


def _refuse(refused: Sequence[tuple[str, str]], workdir: str, experiment: Experiment) -> None:
    """Raises ValueError with every (line, key), and the one flag that allows them all."""
    if refused:
        allowed = experiment.config.checkpoint.allow_changed
        keys = tuple(dict.fromkeys([*allowed, *(key for _, key in refused)]))
        lines = "\n  ".join(line for line, _ in refused)
        raise ValueError(
            f"{workdir} holds a run with another config; use another --workdir, or allow it with "
            f'--config.checkpoint.allow_changed="{keys}":\n  {lines}'
        )


def write_config(config: ConfigTree, workdir: str) -> None:
    """Write config.json, whole or not at all."""
    storage.write_atomically(epath.Path(workdir) / CONFIG_FILE, conversion.to_json(config))
