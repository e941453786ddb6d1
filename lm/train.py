"""The loop: from a config and a folder to a trained model, from wherever the folder's last
checkpoint is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from lm import config as configs
from lm import config_tree, metrics, selfcheck
from lm.checkpoint import manifest
from lm.checkpoint.base import Base
from lm.checkpoint.manager import Checkpoints
from lm.data import loaders, run_tokenizer
from lm.exits import Exit
from lm.experiment import CONFIG_FILE, Experiment
from lm.goodput import read as read_goodput
from lm.guard import STOPS, StopSignals, Watchdog, alone
from lm.ledger import Ledger
from lm.phases import Phases
from lm.processes import distributed
from lm.rewind import first_state, replay
from lm.run import Rewind, Run, writing
from lm.types import TrainState

# A resumed run with other values here would be another run; everything else may change, and is
# reported.
FIXED = ("model", "objective", "data", "seed")


def train(
    config: ml_collections.ConfigDict,
    workdir: str,
    devices: Sequence[Any],
    *,
    began: float | None = None,
) -> int:
    """Trains to the end of the run, or to a SIGINT or SIGTERM, which saves first; returns the exit
    code.

    `workdir` gets lock, config.json, metrics.jsonl, ledger.jsonl, goodput.jsonl, tensorboard/ and
    checkpoints/; stacks/, evidence/ and bad_checkpoints/ where something went wrong.

    began: time.monotonic() from which goodput counts, such as when the process started; now if
        None.

    Raises:
        ValueError: the config is inconsistent, or differs from that of the run in `workdir`.
        InUse: another process trains in `workdir`.
        RunError: the run can't go on; its `code` is for the process to exit with.
    """
    phases = Phases(began)
    experiment = Experiment(config, devices)
    c = experiment.config
    lead = jax.process_index() == 0
    say = print if lead else lambda *_: None
    distributed.agree("config", config.to_dict())
    distributed.agree("code", manifest.code_version())
    num_steps = experiment.num_steps
    with (
        Watchdog(c.guard, phases, workdir) as watchdog,
        StopSignals() as signals,
        distributed.peers(),
        writing(workdir),
        alone(workdir, active=lead),
    ):
        same_data = _record_config(workdir, experiment, say, lead)
        if lead:
            replace = "data.tokenizer" in c.checkpoint.allow_changed
            run_tokenizer.keep(experiment.tokenizer, workdir, replace=replace)
        with Checkpoints(workdir, c.checkpoint) as checkpoints:
            if max(checkpoints.steps(), default=-1) >= num_steps:
                say(f"{workdir}: finished, all {num_steps} steps are done; raise config.train")
                return Exit.SUCCESS
            if not checkpoints.steps() and experiment.start.base is not None:
                _describe_base(experiment, experiment.start.base, say)
            if not checkpoints.steps() and experiment.branch is not None:
                say(f"goes on from {experiment.branch}")
            if not checkpoints.steps() and experiment.start.word_vectors is not None:
                say(experiment.start.word_vectors.describe())
            _describe(experiment, say)
            if c.guard.self_check:
                say(selfcheck.check(c, experiment.rules))
            with phases("compile"), loaders.importing(c.loader):
                _ = experiment.train_step
                if experiment.rules.mesh.size > 1:
                    _ = experiment.compare_replicas
            state, totals = first_state(experiment, checkpoints, phases)
            say(
                f"ready in {time.monotonic() - phases.began:.1f} s; from step {int(state.step)} "
                f"to {num_steps}"
            )
            run = Run(
                experiment,
                workdir,
                checkpoints,
                watchdog,
                signals,
                phases,
                Ledger(workdir, totals, compare=same_data, active=lead),
            )
            while True:
                try:
                    stopped = _steps(run, state)
                    break
                except Rewind as rewind:
                    with phases("investigate"):
                        state = replay(run, rewind)
            run.close()
    if (report := read_goodput(workdir)) is not None:
        say(report)
    return Exit.SUCCESS if stopped is None else STOPS[stopped]


def _steps(run: Run, state: TrainState) -> Any:
    """Trains from `state` to the end, or to a signal, which it returns."""
    c, experiment, phases = run.experiment.config, run.experiment, run.phases
    start, num_steps = int(state.step), experiment.num_steps
    batches = _profiled(experiment.batches(start, num_steps), c.log, run.workdir)
    began = time.monotonic()
    for step, batch in _timed(batches, phases):
        late_by = time.monotonic() - began
        with phases("step"):
            state, sums, facts = experiment.train_step(state, batch)
            run.finish(run.late.push(step, sums, facts, run.cast(late_by)))
            began = time.monotonic()
            run.checkpoints.poll()
            if _due(step + 1, c.guard.agreement_every, num_steps):
                run.check_replicas(state)
        done, vote = step + 1, run.agreed()
        hurry = vote.signal and done < num_steps  # an evaluation may take longer than there is
        if experiment.validation and not hurry and _due(done, c.train.eval_every, num_steps):
            run.flush()
            with phases("evaluate"):
                run.evaluate(state, done)
        save_due = done in c.checkpoint.at or _due(done, c.checkpoint.every, num_steps)
        if vote.signal or vote.save or save_due:
            run.flush()
            with phases("save"):
                run.save(state)
        if vote.signal:
            run.say(f"\n{vote.signal.name}: saved at step {done}; run the same command to go on")
            return vote.signal
        run.late.resume()
    return None


def _due(done: int, every: int, num_steps: int) -> bool:
    return done == num_steps or (every > 0 and done % every == 0)


def _timed(batches: Iterator[Any], phases: Phases) -> Iterator[Any]:
    """`batches`, with the waiting for each counted."""
    while True:
        with phases("data"):
            item = next(batches, None)
        if item is None:
            return
        yield item


def _record_config(workdir: str, experiment: Experiment, say: Any, lead: bool) -> bool:
    """Writes config.json, with every field of every component, or checks that a resumed run is the
    same run; False if it reads other data than it did, as was allowed.

    Raises:
        ValueError: a fixed value differs and `checkpoint.allow_changed` doesn't name it.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    config, same_data = experiment.config_dict, True
    if path.exists():
        allowed = experiment.config.checkpoint.allow_changed
        refused = []
        for key, (old, new) in config_tree.changed(
            config_tree.from_json(path.read_text()), config
        ).items():
            line = f"config.{key}: {old!r} -> {new!r}"
            named = any(key == a or key.startswith(a + ".") for a in allowed)
            if key.split(".")[0] in FIXED and not named:
                refused.append(f"{line} (--config.checkpoint.allow_changed=\"('{key}',)\")")
            else:
                say(f"changed since this run began: {line}")
                same_data &= key.split(".")[0] not in ("objective", "data", "seed")
        if refused:
            raise ValueError(
                f"{workdir} holds a run with another config; use another --workdir, or allow:\n  "
                + "\n  ".join(refused)
            )
    distributed.agree("resumed run", {"same_data": same_data})  # all have read the file by now
    if lead:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.parent / (CONFIG_FILE + ".new")
        written.write_text(config_tree.to_json(config))
        written.replace(path)
    return same_data


def _describe(experiment: Experiment, say: Any) -> None:
    """Prints what is about to run."""
    c, mesh = experiment.config, experiment.rules.mesh
    leaves = jax.tree_util.tree_leaves_with_path(experiment.abstract_params)
    count = sum(leaf.size for _, leaf in leaves)
    if c.log.parameter_table:
        rows = [
            (
                jax.tree_util.keystr(path, simple=True, separator="."),
                str(leaf.shape),
                str(leaf.sharding.spec),
            )
            for path, leaf in leaves
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        for name, shape, spec in rows:
            shown = "" if mesh.size == 1 else spec.removeprefix("PartitionSpec")
            mark = "  frozen" if name in experiment.start.frozen else ""
            say(f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {shown}{mark}".rstrip())
    for source in [*experiment.train_data.sources.values(), *experiment.validation.values()]:
        if source.left_out:
            say(source.left_out)
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    per_step = experiment.batch_size * c.data.length
    device = mesh.devices.flat[0].device_kind
    trained = sum(
        leaf.size for leaf in jax.tree.leaves(experiment.start.trained(experiment.abstract_params))
    )
    part = f" ({metrics.quantity(trained)} trained)" if experiment.start.frozen else ""
    say(
        f"{metrics.quantity(count)} parameters{part} · {mesh.size} × {device}"
        f"{' · ' + shape if shape else ''} · "
        f"{experiment.num_steps} steps of {metrics.quantity(per_step)} tokens "
        f"({metrics.quantity(experiment.num_steps * per_step)} in all)"
    )


def _describe_base(experiment: Experiment, base: Base, say: Any) -> None:
    """Prints where parameters come from, and what else the model of that run had."""
    say(f"begins with the parameters of {base.workdir} at step {base.step}")
    old, new = base.manifest.config, experiment.config_dict.to_dict()
    for section in ("model", "data"):
        kept = ("tokenizer",) if section == "data" else tuple(new[section])
        a, b = ({k: tree.get(section, {}).get(k) for k in kept} for tree in (old, new))
        for path, (was, now) in config_tree.changed(
            *map(ml_collections.ConfigDict, (a, b))
        ).items():
            say(f"unlike there: config.{section}.{path}: {was!r} -> {now!r}")


def _profiled(batches: Iterator[Any], config: configs.LogConfig, workdir: str) -> Iterator[Any]:
    """`batches`, with the profiler on while the steps of the configured window run."""
    first, last = config.profile_start, config.profile_start + config.profile_steps
    running = False
    for step, batch in batches:
        if running and step == last:
            jax.profiler.stop_trace()
            running = False
        if first <= step < last and not running:
            jax.profiler.start_trace(str(epath.Path(workdir) / "profile"))
            running = True
        yield step, batch
    if running:
        jax.profiler.stop_trace()
