"""Comparison of a resumed run with the run in its folder, before anything is compiled.

The steps done so far must be those that the new config would have done. The text of a config is not
enough, since the batch depends on the number of devices and the learning rate on the length of the
run; so the batch size and the learning rates are compared too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence

from lm.checkpoint import manifest as manifests
from lm.checkpoint import step_files
from lm.checkpoint.manifest import Damaged, Manifest
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.optim.schedules import fractions
from lm.parallel import process_group
from lm.parallel.process_group import print_on_lead
from lm.storage.epaths import StoragePath
from lm.storage.files import write_atomically
from lm.tokenizers import run_tokenizer
from lm.training.experiment import CONFIG_FILE, Experiment
from lm.training.fork import BATCH, SCHEDULE, changed_lines, is_in
from lm.training.restore import stored_state

# A resumed run may not change these; every other change is reported.
FIXED = ("model", "objective", "data", "seed")
Change = tuple[str, str, bool]  # config path, line, is allowed


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The run in a folder, the same in all processes."""

    config: str | None = None  # the text of config.json; None before the run has started
    manifest: Manifest | None = None  # of the newest checkpoint whose manifest can be read

    @property
    def step(self) -> int:
        return 0 if self.manifest is None else self.manifest.step


def read(workdir: str) -> RunRecord:
    """Read the record of a folder in the lead process; all processes call it together."""
    config, manifest = process_group.from_lead("run record", lambda: _read(StoragePath(workdir)))
    return RunRecord(config, None if manifest is None else Manifest.from_json(manifest))


def _read(workdir: StoragePath) -> tuple[str | None, str | None]:
    path, checkpoints = workdir / CONFIG_FILE, workdir.resolve() / "checkpoints"
    config = path.read_text() if path.exists() else None
    for step in reversed(step_files.steps(checkpoints)):
        with contextlib.suppress(Damaged):  # restoring passes over it, too, and says so
            manifest = step_files.read_manifest(checkpoints / str(step))
            return config, json.dumps(manifest.to_dict())
    return config, None


def check_config(record: RunRecord, workdir: str, experiment: Experiment) -> bool:
    """Compare the config with the run's; False if the run reads other data than before, as allowed.

    Raises:
        ValueError: a fixed value differs and `checkpoint.allow_changed` does not name it, or that
        names a path that does not exist.
    """
    now = experiment.config_dict
    before = now if record.config is None else conversion.from_json(record.config)
    allowed = experiment.config.checkpoint.allow_changed
    conversion.check_paths(allowed, [now, before], "config.checkpoint.allow_changed")
    if record.config is None:
        return True
    batch_size = None if record.manifest is None else record.manifest.resolved.get("batch_size")
    same_data = batch_size in (None, experiment.batch_size)
    changes: list[Change] = []
    for key, (old, new) in conversion.changed(before, now).items():
        if key == "data.tokenizer" and (
            run_tokenizer.find(workdir, old) == run_tokenizer.find(workdir, new)
        ):
            continue  # the run's own copy, whose content `run_tokenizer.save` compares
        by_value = key in BATCH and batch_size is not None  # see `check_checkpoint`
        same_data &= by_value or not is_in(key, ("objective", "data", "seed"))
        is_allowed = by_value or not is_in(key, FIXED) or is_in(key, allowed)
        changes.append((key, f"config.{key}: {old!r} -> {new!r}", is_allowed))
    _report(changes, workdir, allowed)
    return same_data


def check_checkpoint(record: RunRecord, workdir: str, experiment: Experiment) -> None:
    """Compare the run with its checkpoint: the batch size, the learning rates of all steps that are
    done, and the arrays.

    Raises:
        ValueError: sizes or rates differ and `checkpoint.allow_changed` does not name it, or a
        change of the model or the optimizer gives it other arrays, or the teacher has others,
        whatever is allowed.
    """
    manifest, c = record.manifest, experiment.config
    if manifest is None or not manifest.config:
        return
    if manifest.step:
        allowed, changes = c.checkpoint.allow_changed, []
        before, now = manifest.resolved.get("batch_size"), experiment.batch_size
        if before not in (None, now):
            name = BATCH[0] if c.data.batch_size is not None else BATCH[1]
            given = f"config.{name} ({getattr(c.data, name.split('.')[1])})"
            line = (
                f"{given} on {experiment.rules.mesh.size} devices: {before} -> {now} rows a batch"
            )
            changes.append((name, line, any(is_in(key, allowed) for key in BATCH)))
        if line := _changed_rates(manifest, experiment):
            changes.append((SCHEDULE, line, is_in(SCHEDULE, allowed)))
        _report(changes, workdir, allowed)
    _check_leaves(manifest, workdir, experiment)
    if experiment.teacher is not None:
        experiment.teacher.resume(manifest.resolved.get("teacher"))


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


def _check_leaves(manifest: Manifest, workdir: str, experiment: Experiment) -> None:
    state = stored_state(experiment, experiment.checkpointed_state)
    tree = {"params": state.params, "opt_state": state.opt_state}
    if manifest.has_only_params:  # an import
        del tree["opt_state"]
    differences = manifests.differences(manifest.leaves, manifests.leaves(tree))
    arrays = ("init", "model", "objective", "optimizer")
    lines = changed_lines(manifest.config_tree(), experiment.config_dict, arrays)
    if differences and lines:
        raise ValueError(
            f"{workdir} can't go on with other arrays than its checkpoint has ({len(differences)} "
            "differ), and config.checkpoint.allow_changed doesn't help; change the config back, or "
            f"begin another run, in another --workdir, with --config.init.from={workdir}:\n  "
            + "\n  ".join(lines)
        )


def _report(changes: Sequence[Change], workdir: str, allowed: Sequence[str]) -> None:
    """Print the changes that are allowed; raise ValueError with all others, and the one flag that
    allows them all.
    """
    refused = {key: line for key, line, is_allowed in changes if not is_allowed}
    for key, line, _ in changes:
        if key not in refused:
            print_on_lead(f"changed since this run began: {line}")
    if refused:
        keys = tuple(dict.fromkeys([*allowed, *refused]))
        raise ValueError(
            f"{workdir} holds a run with another config; use another --workdir, or allow it with "
            f'--config.checkpoint.allow_changed="{keys}":\n  ' + "\n  ".join(refused.values())
        )


def write_config(config: ConfigTree, workdir: str) -> None:
    """Write config.json, whole or not at all."""
    write_atomically(f"{workdir}/{CONFIG_FILE}", conversion.to_json(config))
