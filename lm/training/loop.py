"""The loop: from a config and a folder to a trained model, from wherever the folder's last
checkpoint is.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from lm.checkpoint import manifest
from lm.checkpoint.manager import Checkpoints
from lm.checkpoint.parent import ParentCheckpoint
from lm.config import conversion
from lm.config import schema as configs
from lm.config.tree import ConfigTree
from lm.data import loaders, run_tokenizer
from lm.exit_codes import Exit
from lm.parallel import process_group
from lm.reliability import kernel_check
from lm.reliability.data_ledger import Ledger
from lm.reliability.watchdog import STOPS, StopSignals, Vote, Watchdog, lock_workdir
from lm.telemetry import metrics
from lm.telemetry.goodput import read as read_goodput
from lm.telemetry.phase_timer import PhaseTimer
from lm.training import bad_step_report, resume
from lm.training.experiment import LENGTHS, Experiment
from lm.training.rollback import first_state, replay
from lm.training.session import (
    Diverged,
    RollbackRequired,
    TrainingSession,
    disk_errors_as_run_errors,
)
from lm.types import TrainState


def train(
    config: ConfigTree,
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
        WorkdirLocked: another process trains in `workdir`.
        RunError: the run can't go on; its `code` is for the process to exit with. `Diverged`, too,
            where all is done and saved but the last evaluation is not finite.
    """
    phases = PhaseTimer(began)
    experiment = Experiment(config, devices)
    c = experiment.config
    lead = jax.process_index() == 0
    say = print if lead else lambda *_: None
    process_group.agree("config", config.to_dict())
    process_group.agree("code", manifest.code_version())
    num_steps = experiment.num_steps
    with (
        Watchdog(c.guard, phases, workdir) as watchdog,
        StopSignals() as signals,
        process_group.peers(),
        disk_errors_as_run_errors(workdir),
        lock_workdir(workdir, active=lead),
    ):
        saved = resume.read(workdir)
        same_data = resume.check_config(saved, workdir, experiment, say)
        if saved.step >= num_steps:
            length = next(name for name in LENGTHS if getattr(c.train, name) is not None)
            say(
                f"{workdir}: finished, all {saved.step} steps are done. For a longer run raise "
                f"config.train.{length}; where the schedule depends on the length, begin another "
                "one with --config.init.from"
            )
            _check_last(process_group.from_lead("end", lambda: _not_finite(workdir, num_steps)))
            return Exit.SUCCESS
        resume.check_resolved(saved, workdir, experiment, say)
        resume.check_leaves(saved, workdir, experiment)
        with Checkpoints(workdir, c.checkpoint) as checkpoints:
            begins = not checkpoints.steps()
            _open_sources(experiment, begins=begins)
            if lead:  # where no run has begun yet, another tokenizer may take the kept one's place
                allowed = "data.tokenizer" in c.checkpoint.allow_changed
                replace = saved.config is None or allowed
                run_tokenizer.save(experiment.tokenizer, workdir, replace=replace)
            _describe(experiment, say, begins=begins)
            if c.guard.self_check:
                say(kernel_check.check(c, experiment.rules))
            with phases("compile"), loaders.importing(c.loader):
                _ = experiment.train_step
                if experiment.rules.mesh.size > 1:
                    _ = experiment.compare_replicas
            state, totals = first_state(experiment, checkpoints, phases)
            if lead:  # no sooner: where a run failed to start, another config may
                resume.write_config(experiment.config_dict, workdir)
            say(
                f"ready in {time.monotonic() - phases.began:.1f} s; from step {int(state.step)} "
                f"to {num_steps}"
            )
            run = TrainingSession(
                experiment,
                workdir,
                checkpoints,
                watchdog,
                signals,
                phases,
                Ledger(workdir, totals, compare=same_data, active=lead),
            )
            if saved.step and _owes_evaluation(experiment, workdir, int(state.step)):
                run.completed -= 1  # the stop at this step was in a hurry
            while True:
                try:
                    stopped = _steps(run, state)
                    break
                except RollbackRequired as found:
                    rewind = found.with_traceback(None)  # its frames hold the state
                del state  # before another one is made
                with phases("investigate"):
                    state = replay(run, rewind)
            run.close()
    if (report := read_goodput(workdir)) is not None:
        say(report)
    if stopped is not None:
        return STOPS[stopped]
    _check_last(run.not_finite)
    return Exit.SUCCESS


def _open_sources(experiment: Experiment, *, begins: bool) -> None:
    """Opens all data and parameters that the run will read: what is missing ends it here."""
    _ = experiment.train_data, experiment.validation
    if begins:
        _ = experiment.fork, experiment.initializer.base, experiment.initializer.word_vectors


def _not_finite(workdir: str, step: int) -> list[str]:
    """The losses of the evaluation after `step` that are not finite."""
    return [
        f"{r['source']}: loss {r['loss']:g}"
        for r in metrics.read(workdir)
        if r["kind"] == "eval" and r["step"] == step and not math.isfinite(r["loss"])
    ]


def _check_last(not_finite: Sequence[str]) -> None:
    if not_finite:
        raise Diverged(
            f"the last evaluation is not finite: {'; '.join(not_finite)}. The last checkpoint has "
            "such parameters; take an earlier one, or train again with a lower "
            "config.optimizer.learning_rate"
        )


def _owes_evaluation(experiment: Experiment, workdir: str, step: int) -> bool:
    """True if an evaluation was due at the step of the checkpoint and was not made."""
    every, names = experiment.config.train.eval_every, set(experiment.validation)
    if not names or not _due(step, every, experiment.num_steps):
        return False

    def made() -> list[str]:
        records = metrics.read(workdir)
        return [r["source"] for r in records if r["kind"] == "eval" and r["step"] == step]

    return not names <= set(process_group.from_lead("evaluated", made))


def _steps(run: TrainingSession, state: TrainState) -> Any:
    """Trains from `state` to the end, or to a signal, which it returns."""
    c, experiment, phases = run.experiment.config, run.experiment, run.phases
    start, num_steps = int(state.step), experiment.num_steps
    if start > run.completed and (stopped := _do_due(run, state, start, run.agreed())):
        return stopped
    with (
        contextlib.closing(experiment.batches(start, num_steps)) as batches,
        contextlib.closing(_profiled(batches, c.log, run.workdir)) as profiled,
    ):
        began = time.monotonic()
        for step, batch in _timed(profiled, phases):
            late_by = time.monotonic() - began
            with phases("step"):
                state, sums, facts = experiment.train_step(state, batch)
                run.finish(run.late.push(step, sums, facts, run.cast(late_by)))
                began = time.monotonic()
                run.checkpoints.poll()
                if _due(step + 1, c.guard.agreement_every, num_steps):
                    run.check_replicas(state)
            if stopped := _do_due(run, state, step + 1, run.agreed()):
                return stopped
    return None


def _do_due(run: TrainingSession, state: TrainState, done: int, vote: Vote) -> Any:
    """Do the work that is due after `done` steps, a function of their number and of what processes
    voted for: evaluation and checkpoint. Returns the signal to end for, if there is one.
    """
    c, experiment, num_steps = run.experiment.config, run.experiment, run.experiment.num_steps
    hurry = vote.signal and done < num_steps  # an evaluation may take longer than there is
    if experiment.validation and not hurry and _due(done, c.train.eval_every, num_steps):
        run.flush()
        with run.phases("evaluate"):
            run.evaluate(state, done)
    save_due = done in c.checkpoint.at or _due(done, c.checkpoint.every, num_steps)
    if vote.signal or vote.save or save_due:
        run.flush()
        with run.phases("save"):
            run.save(state)
    run.completed = done
    if vote.signal:
        run.say(f"\n{vote.signal.name}: saved at step {done}; run the same command to go on")
        return vote.signal
    run.late.resume()
    return None


def _due(done: int, every: int, num_steps: int) -> bool:
    return done == num_steps or (every > 0 and done % every == 0)


def _timed(batches: Iterator[Any], phases: PhaseTimer) -> Iterator[Any]:
    """`batches`, with the waiting for each counted."""
    while True:
        with phases("data"):
            item = next(batches, None)
        if item is None:
            return
        yield item


def _describe(experiment: Experiment, say: Any, *, begins: bool) -> None:
    """Prints what is about to run, and where its parameters are from if it `begins`."""
    c, mesh = experiment.config, experiment.rules.mesh
    if begins and experiment.initializer.base is not None:
        _describe_base(experiment, experiment.initializer.base, say)
    if begins and experiment.fork is not None:
        say(f"goes on from {experiment.fork}")
    if begins and experiment.initializer.word_vectors is not None:
        say(experiment.initializer.word_vectors.describe())
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
            mark = "  frozen" if name in experiment.initializer.frozen else ""
            say(f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {shown}{mark}".rstrip())
    for source in [*experiment.train_data.sources.values(), *experiment.validation.values()]:
        if source.truncation_summary:
            say(source.truncation_summary)
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    per_step = experiment.batch_size * c.data.length
    device = mesh.devices.flat[0].device_kind
    trained = sum(
        leaf.size
        for leaf in jax.tree.leaves(experiment.initializer.trained(experiment.abstract_params))
    )
    part = f" ({metrics.format_quantity(trained)} trained)" if experiment.initializer.frozen else ""
    say(
        f"{metrics.format_quantity(count)} parameters{part} · {mesh.size} × {device}"
        f"{' · ' + shape if shape else ''} · "
        f"{experiment.num_steps} steps of {metrics.format_quantity(per_step)} tokens "
        f"({metrics.format_quantity(experiment.num_steps * per_step)} in all)"
    )
    early = [step for step in c.checkpoint.at if step < experiment.num_steps]
    if not (c.checkpoint.every or c.checkpoint.every_seconds or early):
        say(
            "no checkpoint before the end (config.checkpoint.every=0, every_seconds=0): a run that "
            "is killed begins again"
        )
    if c.guard.policy == "rewind" and not bad_step_report.repeats(experiment):
        say(
            "config.guard.policy=rewind: this GPU doesn't repeat bits, so no verdict will blame "
            "the hardware; set XLA_FLAGS=--xla_gpu_deterministic_ops=true for that"
        )


def _describe_base(experiment: Experiment, base: ParentCheckpoint, say: Any) -> None:
    """Prints where parameters come from, and what else the model of that run had."""
    say(f"begins with the parameters of {base.workdir} at step {base.step}")
    old, new = base.manifest.config, experiment.config_dict.to_dict()
    for section in ("model", "data"):
        kept = ("tokenizer",) if section == "data" else tuple(new[section])
        a, b = ({k: tree.get(section, {}).get(k) for k in kept} for tree in (old, new))
        for path, (was, now) in conversion.changed(*map(ml_collections.ConfigDict, (a, b))).items():
            say(f"unlike there: config.{section}.{path}: {was!r} -> {now!r}")


def _profiled(
    batches: Iterator[Any], config: configs.LogConfig, workdir: str
) -> Generator[Any, None, None]:
    """`batches`, with the profiler on while the steps of the configured window run; closing it
    writes the trace of a window that is open.
    """
    first, last = config.profile_start, config.profile_start + config.profile_steps
    running = False
    try:
        for step, batch in batches:
            if running and step == last:
                jax.profiler.stop_trace()
                running = False
            if first <= step < last and not running:
                jax.profiler.start_trace(str(epath.Path(workdir) / "profile"))
                running = True
            yield step, batch
    finally:
        if running:
            jax.profiler.stop_trace()
