"""Training loop: a config and a folder to a trained model, from the folder's last checkpoint."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Generator, Sequence

import jax

from lm.checkpoint.code_version import code_version
from lm.checkpoint.manager import Checkpoints
from lm.config.tree import ConfigTree
from lm.data import loaders
from lm.exit_codes import Exit
from lm.parallel import process_group
from lm.parallel.process_group import print_on_lead
from lm.reliability import kernel_check
from lm.reliability.attempts import Attempts
from lm.reliability.data_ledger import Ledger
from lm.reliability.stop_signals import STOPS, StopSignals
from lm.reliability.watchdog import Watchdog
from lm.reliability.workdir_lock import lock_workdir
from lm.storage.paths import expand_path
from lm.telemetry import goodput, metrics
from lm.telemetry.energy import EnergyMeter
from lm.telemetry.phase_timer import PhaseTimer
from lm.telemetry.trackers import opening as trackers
from lm.tokenizers import run_tokenizer
from lm.training import bad_step_report, compatibility
from lm.training.describe import describe, write_overview
from lm.training.experiment import Experiment
from lm.training.restore import find_snapshot, memory_snapshots, restore_or_init
from lm.training.rollback import roll_back
from lm.training.run_evaluations import RunEvaluations
from lm.training.run_length import given_length
from lm.training.session import (
    Diverged,
    RollbackRequired,
    TrainingSession,
    disk_errors_as_run_errors,
    run_info,
)
from lm.types import Batch, Device, TrainState


def train(
    config: ConfigTree, workdir: str, devices: Sequence[Device], *, began: float | None = None
) -> int:
    """Train to the end of the run, or to a SIGINT or SIGTERM, which saves first; return the exit
    code.

    README.md lists the files that `workdir` gets.

    began: time.monotonic() from which goodput counts, such as the start of the process; None: now.

    Raises:
        ValueError: the config is inconsistent, or differs from that of the run in `workdir`.
        WorkdirLocked: another process trains in `workdir`.
        RunError: the run can't go on; its `code` is for the process to exit with. `Diverged`, too,
            where all is done and saved but the last evaluation is not finite.
    """
    phases = PhaseTimer(began)
    workdir = expand_path(workdir, "workdir")
    experiment = Experiment(config, devices)
    trackers.check(experiment.config.log.trackers)
    log = experiment.config.log
    meter = EnergyMeter(
        devices,
        [device for device in devices if device.process_index == jax.process_index()],
        watts_per_device=log.watts_per_device,
        gco2e_per_kwh=log.grid_gco2e_per_kwh,
    )
    is_lead = jax.process_index() == 0
    process_group.agree("config", config.to_dict())
    process_group.agree("code", code_version())
    with (
        Watchdog(experiment.config.guard, phases, workdir) as watchdog,
        StopSignals() as signals,
        process_group.peer_errors(),
        disk_errors_as_run_errors(workdir),
        lock_workdir(workdir, active=is_lead) as lock,
    ):
        record = compatibility.read(workdir)
        same_data = compatibility.check_config(record, workdir, experiment)
        if record.step >= experiment.num_steps:
            print_on_lead(
                f"{workdir}: finished, all {record.step} steps are done. For a longer run raise "
                f"config.train.{given_length(experiment.config)}; where the schedule depends on "
                "the length, begin another one with --config.init.from"
            )
            if is_lead:
                info = run_info(experiment, workdir)
                trackers.send_rest(experiment.config.log.trackers, info, print_on_lead)
            _check_last_evaluation(workdir, experiment.num_steps)
            return Exit.SUCCESS
        compatibility.check_checkpoint(record, workdir, experiment)
        with Checkpoints(workdir, experiment.config.checkpoint) as checkpoints:
            evaluations = RunEvaluations(experiment)
            _open_and_compile(experiment, workdir, record, phases, is_new=not checkpoints.steps())
            snapshots = memory_snapshots(experiment, workdir)
            from_step = max(checkpoints.steps(), default=0)
            if found := find_snapshot(snapshots, workdir, from_step):
                from_step = found.manifest.step
            attempts = Attempts(workdir, experiment.config.guard, from_step, active=is_lead)
            attempts.check(
                functools.partial(bad_step_report.batch_records, experiment, count=2),
                interrupted=lambda: signals.received is not None,
            )
            watchdog.on_end = functools.partial(attempts.end, Exit.HUNG)
            with (
                attempts,
                snapshots or contextlib.nullcontext(),
                process_group.peer_errors(),
                disk_errors_as_run_errors(workdir),  # as attempts note them
            ):
                state, totals = restore_or_init(
                    experiment, checkpoints, phases, snapshots=snapshots, found=found
                )
                if is_lead:  # no sooner: where a run failed to start, another config may
                    compatibility.write_config(experiment.config_dict, workdir)
                    write_overview(experiment, workdir)
                took, step = time.monotonic() - phases.began, int(state.step)
                print_on_lead(f"ready in {took:.1f} s; from step {step} to {experiment.num_steps}")
                ledger = Ledger(workdir, totals, compare=same_data, active=is_lead)
                session = TrainingSession(
                    experiment,
                    workdir,
                    checkpoints,
                    watchdog,
                    signals,
                    phases,
                    ledger,
                    lock,
                    attempts,
                    snapshots,
                    meter,
                    evaluations,
                )
                if record.step:  # a signal may have stopped the run before evaluations
                    if not _evaluation_is_missing(experiment, workdir, step):
                        session.validated = step
                    if session.validated is None or session.due_evaluations(step):
                        session.completed -= 1
                with session.aborting():
                    while True:
                        try:
                            stopped_by = _train_steps(session, state)
                            break
                        except RollbackRequired as error:
                            rollback = error.with_traceback(None)  # its frames hold the state
                        del state  # before another one is made
                        with phases("investigate"):
                            state = roll_back(session, rollback)
                session.close(stopped=stopped_by is not None)
                if stopped_by is not None:
                    attempts.stop_code = STOPS[stopped_by]
        if (report := goodput.read(workdir)) is not None:
            print_on_lead(f"{report}\nenergy {report.energy}")
        if stopped_by is not None:
            return STOPS[stopped_by]
        _check_last_evaluation(workdir, experiment.num_steps)
        return Exit.SUCCESS


def _train_steps(session: TrainingSession, state: TrainState) -> signal.Signals | None:
    """Train from `state` to the last step, or to a stop signal, which is returned."""
    experiment, phases = session.experiment, session.phases
    every, num_steps = experiment.config.guard.agreement_every, experiment.num_steps
    start = int(state.step)
    session.attempts.begin_steps()
    if start > session.completed and (stopped_by := _do_due_work(session, state, start)):
        return stopped_by
    with contextlib.closing(_batches(session, start)) as batches, session.profiler:
        ready_since = time.monotonic()
        for step, batch in batches:
            session.profile(step)
            held_up = time.monotonic() - ready_since
            with phases("step"):
                session.layers.measure(state, batch, step)
                state, sums, info = experiment.train_step(state, batch)
                session.push_results(
                    step, sums, info, held_up
                )  # reads the previous step's: no stall
                ready_since = time.monotonic()
                session.checkpoints.poll()
                if _is_due(step + 1, every, num_steps):
                    session.check_replicas(state)
            if stopped_by := _do_due_work(session, state, step + 1):
                return stopped_by
    return None


def _do_due_work(session: TrainingSession, state: TrainState, step: int) -> signal.Signals | None:
    """Evaluate and save `state`, after `step` steps, if due; return the signal to stop for, if any.

    What is due is a function of the step and of the processes' votes.
    """
    c, num_steps = session.experiment.config, session.experiment.num_steps
    vote = session.agreed_vote()
    if vote.signal or step == num_steps:
        session.end_profile()
    stops_early = vote.signal is not None and step < num_steps  # no time for an evaluation
    eval_due = session.experiment.validation and _is_due(step, c.train.eval_every, num_steps)
    if not stops_early:
        if eval_due and step != session.validated:
            session.evaluate(state)
        session.run_evaluations(state, step)
    save_due = step in c.checkpoint.at or _is_due(step, c.checkpoint.every, num_steps)
    if save_due or vote.save or vote.signal:
        session.save(state)
    session.completed = step
    in_memory = c.checkpoint.memory_every
    if in_memory and step % in_memory == 0 and step < num_steps and not vote.signal:
        session.keep_in_memory(state)
    if vote.signal:
        print_on_lead(f"\n{vote.signal.name}: saved at step {step}; run the same command to go on")
        return vote.signal
    session.deferred.resume()
    return None


def _is_due(step: int, every: int, num_steps: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _batches(session: TrainingSession, start: int) -> Generator[tuple[int, Batch], None, None]:
    """(step, batch) of the steps from `start`; the wait for each counts as phase `data`."""
    experiment = session.experiment
    with contextlib.closing(experiment.batches(start, experiment.num_steps)) as batches:
        while True:
            with session.phases("data"), session.deferred.waiting():
                item = next(batches, None)
            if item is None:
                return
            yield item


def _open_and_compile(
    experiment: Experiment,
    workdir: str,
    record: compatibility.RunRecord,
    phases: PhaseTimer,
    *,
    is_new: bool,
) -> None:
    """Open all data and parent checkpoints, check the kernels, and compile the train step.

    Whatever is missing ends the run here.
    """
    c, initializer = experiment.config, experiment.initializer
    _ = experiment.train_data, experiment.validation
    if experiment.teacher is not None:
        experiment.teacher.check(experiment.tokenizer)
    if is_new:
        _ = experiment.fork, initializer.parent, initializer.word_vectors
    if jax.process_index() == 0:
        # before a run has started, another tokenizer may replace the one that the folder keeps
        replace = record.config is None or "data.tokenizer" in c.checkpoint.allow_changed
        run_tokenizer.save(experiment.tokenizer, workdir, replace=replace)
    describe(experiment, is_new=is_new)
    if c.guard.self_check:
        print_on_lead(str(kernel_check.check(c, experiment.rules)))
    with phases("compile"), loaders.importing(c.loader):
        _ = experiment.train_step
        if c.log.layers_every:
            _ = experiment.measure_layers
        if experiment.rules.mesh.size > 1:
            _ = experiment.compare_replicas


def _evaluated_losses(workdir: str, step: int) -> dict[str, float]:
    """{source: loss} of the evaluation after `step`, as the lead process reads them."""

    def read() -> dict[str, float]:
        records = [r for r in metrics.read(workdir) if r["kind"] == "eval" and r["step"] == step]
        return {r["source"]: r["loss"] for r in records}

    return process_group.from_lead("evaluated", read)


def _evaluation_is_missing(experiment: Experiment, workdir: str, step: int) -> bool:
    """True if an evaluation was due at the step of the checkpoint and was not made."""
    every, sources = experiment.config.train.eval_every, experiment.validation.keys()
    if not sources or not _is_due(step, every, experiment.num_steps):
        return False
    return not sources <= _evaluated_losses(workdir, step).keys()


def _check_last_evaluation(workdir: str, step: int) -> None:
    losses = _evaluated_losses(workdir, step).items()
    if not_finite := [f"{s}: loss {x:g}" for s, x in losses if not math.isfinite(x)]:
        raise Diverged(
            f"the last evaluation is not finite: {'; '.join(not_finite)}. The last checkpoint has "
            "such parameters; take an earlier one, or train again with a lower "
            "config.optimizer.learning_rate"
        )
