"""Training session: the parts of a run under way, and the handling of its steps' results."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm.checkpoint.code_version import code_version
from lm.checkpoint.manager import Checkpoints
from lm.checkpoint.memory import MemorySnapshots
from lm.exit_codes import Exit, RunError
from lm.optim.schedules import make_schedule
from lm.parallel import process_group
from lm.parallel.consensus import Consensus, Vote
from lm.parallel.process_group import print_on_lead
from lm.reliability.attempts import Attempts
from lm.reliability.data_ledger import Ledger
from lm.reliability.stop_signals import StopSignals
from lm.reliability.watchdog import Watchdog
from lm.storage.epaths import StoragePath
from lm.storage.filesystems import StorageError
from lm.storage.lease import Lock
from lm.telemetry import jsonl, memory, metrics
from lm.telemetry.deferred import DeferredMetrics, StepResult
from lm.telemetry.energy import EnergyMeter
from lm.telemetry.goodput import Goodput
from lm.telemetry.phase_timer import PhaseTimer
from lm.telemetry.profiler import Profiler
from lm.telemetry.scalars import Scalars
from lm.telemetry.trackers.opening import open_trackers
from lm.telemetry.trackers.tracker import RunInfo
from lm.telemetry.writers import MetricsWriter
from lm.training import bad_step_report, run_costs, run_evaluations
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment
from lm.training.layer_statistics import LayerStatistics
from lm.training.restore import eval_params, stored_state
from lm.training.run_evaluations import RunEvaluations
from lm.types import TrainState


class Diverged(RunError):
    """A step was bad and the policy does not go on, or the last evaluation is not finite."""

    code = Exit.DIVERGED


class ReplicasDisagree(RunError):
    """Devices that should hold the same bits don't."""

    code = Exit.CORRUPT


class CannotWrite(RunError):
    """The disk of the run's folder is full or read-only."""

    code = Exit.SAVE_FAILED


class NoStorage(RunError):
    """The bucket of the run's folder does not answer."""

    code = Exit.NO_STORAGE


@contextlib.contextmanager
def disk_errors_as_run_errors(workdir: str) -> Iterator[None]:
    """A context that raises CannotWrite where a disk is full or read-only, and NoStorage where a
    bucket fails.
    """
    try:
        yield
    except StorageError as error:
        raise NoStorage(f"{error}; the same command resumes from the last checkpoint") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise CannotWrite(
            f"{workdir} can't be written: {error.strerror}; "
            f"{'make it writable' if error.errno == errno.EROFS else 'make space'}, and run the "
            "same command: it resumes from the last checkpoint"
        ) from error


class RollbackRequired(Exception):
    """Go back to the last checkpoint, and diagnose `bad_step` if there is one."""

    def __init__(self, reason: str, bad_step: StepResult | None = None) -> None:
        super().__init__(reason)
        self.bad_step = bad_step


def run_info(experiment: Experiment, workdir: str) -> RunInfo:
    """The description of the run in a folder, for trackers."""
    log, config = experiment.config.log, experiment.config_dict.to_dict()
    return RunInfo(
        workdir=workdir,
        project=log.tracker_project,
        tags=log.tracker_tags,
        notes=log.tracker_notes,
        config=config,
        code=code_version(),
    )


class TrainingSession:
    """The parts of a run under way. All processes call its methods together."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: str,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        signals: StopSignals,
        phases: PhaseTimer,
        ledger: Ledger,
        lock: Lock,
        attempts: Attempts,
        snapshots: MemorySnapshots | None,
        meter: EnergyMeter,
        evaluations: RunEvaluations,
    ) -> None:
        c = experiment.config
        self.experiment, self.workdir, self.checkpoints = experiment, workdir, checkpoints
        self.phases, self.ledger, self.deferred = phases, ledger, DeferredMetrics()
        self.attempts, self.snapshots = attempts, snapshots
        self.is_lead = jax.process_index() == 0
        self._watchdog, self._signals, self._lock = watchdog, signals, lock
        self._consensus, self._vote = Consensus(experiment.rules), Vote()
        self._schedule = make_schedule(c.optimizer.schedule, experiment.num_steps)
        self._saved_at = time.monotonic()
        self._bad_in_a_row = self._disagreements = 0
        diagnosed = functools.partial(bad_step_report.diagnosed_steps, workdir)
        self.diagnosed = set(process_group.from_lead("diagnosed steps", diagnosed))
        first_step = ledger.totals()["steps"]
        self.completed = first_step  # all work due up to this step is done
        self._goodput = Goodput(
            workdir, phases, first_step=first_step, meter=meter, active=self.is_lead
        )
        self.layers = LayerStatistics(
            experiment, workdir, first_step=first_step, active=self.is_lead
        )
        self._evaluations = evaluations
        self._evaluated = self._evaluated_until(first_step)
        self.validated: int | None = None  # a step whose validation the folder has
        self._trackers = None
        if self.is_lead:  # last: they read what files have
            self._trackers = open_trackers(
                c.log.trackers,
                run_info(experiment, workdir),
                first_step,
                print_on_lead,
                evaluates=bool(evaluations.names),
            )
        self.writer = MetricsWriter(
            self._trackers,
            num_steps=experiment.num_steps,
            every=c.train.log_every,
            flops_per_token=experiment.flops_per_token,
            peak_flops=run_costs.peak_flops(experiment),
        )
        window = range(c.log.profile_start, c.log.profile_start + c.log.profile_steps)
        show = self.writer.note if self.is_lead else None
        self.profiler = Profiler(
            workdir, window, show, lambda: experiment.train_step.as_text() or ""
        )

    # ---- results of steps ----

    def push_results(self, step: int, sums: Scalars, info: Scalars, held_up: float) -> None:
        """Handle the results of the step before `step`, while the devices compute `step`.

        held_up: seconds for which this host, not its devices, delayed the step.
        """
        self._lock.check()
        vote = self._consensus.start(self._own_vote(), held_up)
        self.record_results(self.deferred.push(step, sums, info, vote))

    def flush(self) -> None:
        """Handle the results of the last step; stop the clock between steps."""
        self.record_results(self.deferred.flush())

    def record_results(self, results: list[StepResult]) -> None:
        """Add results to ledger and metrics, and apply the policy for bad steps: raises
        LedgerMismatch, Diverged or RollbackRequired.
        """
        for result in results:
            self.add_to_ledger(result)
            if (record := self.layers.record(result.step)) is not None:
                self.writer.layers(record)
            if result.seconds is not None:
                self._watchdog.add_step(result.seconds)
            extra = {}
            if result.votes is not None and jax.process_count() > 1:
                self._vote, slowest, lag = self._consensus.collect(result.votes)
                extra = {"slowest_process": slowest, "lag_seconds": lag}
            if self.is_lead and self.writer.is_due(result.step + 1):
                extra |= self._log_values(result.step)
            self.writer.train(result, **extra)
            self._bad_in_a_row = self._bad_in_a_row + 1 if result.bad else 0
            if result.bad:
                self._handle_bad_step(result)

    def add_to_ledger(self, result: StepResult) -> None:
        """Raises LedgerMismatch."""
        batch_tokens = self.experiment.batch_size * self.experiment.config.data.length
        self.ledger.record(result.step, result.info, batch_tokens)
        self.attempts.end_step(result.step)

    def _log_values(self, step: int) -> dict[str, float]:
        peak, seen = self.experiment.config.optimizer.learning_rate, self.ledger.totals()["filled"]
        report = self._goodput.write(step + 1)
        return {
            "learning_rate": peak * float(jnp.asarray(self._schedule(step))),
            "tokens_seen": seen,
            "flops_seen": seen * self.experiment.flops_per_token,
            "goodput": report.goodput,
            **(report.energy.figures() if report.energy else {}),
            **memory.usage(self.experiment.rules.mesh.local_devices[0]),
        }

    def _handle_bad_step(self, result: StepResult) -> None:
        guard = self.experiment.config.guard
        text = bad_step_report.describe(result)
        if guard.policy == "stop" or self._bad_in_a_row > guard.max_skips:
            raise Diverged(
                f"{text}\nIts update was not applied. Lower config.optimizer.learning_rate or warm "
                "up for longer; --config.guard.policy=rewind replays the step and says whether the "
                "data, the numerics or the hardware did it; policy=skip goes on without it"
                + (f" (at most {guard.max_skips} in a row)" if guard.policy != "stop" else "")
            )
        if guard.policy == "rewind" and result.step not in self.diagnosed:
            raise RollbackRequired(text, result)
        self.writer.note(f"{text}; its update is skipped")

    # ---- profile ----

    def profile(self, step: int) -> None:
        """Begin or end the profile that does so before step number `step`, if any."""
        if self.profiler.is_over(step):
            self.end_profile()
        self.profiler.step(step)

    def end_profile(self) -> None:
        """End the profile that is on, if any, once the devices have computed its last step."""
        if self.profiler.is_on:
            self.flush()
            with self.phases("save"):
                self.profiler.stop()
            self.deferred.resume()

    # ---- agreement between processes and devices ----

    def _own_vote(self) -> Vote:
        every = self.experiment.config.checkpoint.every_seconds
        overdue = 0 < every < time.monotonic() - self._saved_at
        return Vote(self._signals.received, overdue)

    def agreed_vote(self) -> Vote:
        """The requests of all processes: a single one's own, several ones' of the step before."""
        return self._vote if jax.process_count() > 1 else self._own_vote()

    def check_replicas(self, state: TrainState) -> None:
        """Raise ReplicasDisagree unless all replicas of a leaf hold the same bits; where the policy
        is to roll back, RollbackRequired the first `guard.max_skips` times after a checkpoint.
        """
        wrong = self.experiment.replica_mismatches(state)
        if not wrong:
            return
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        names = f"{', '.join(wrong[:5])}{more}"
        text = f"step {int(state.step)}: replicas hold different bits of {names}"
        guard = self.experiment.config.guard
        self._disagreements += 1
        if guard.policy == "rewind":
            if self._disagreements <= guard.max_skips:
                raise RollbackRequired(f"{text}: hardware")
            text += f", {self._disagreements} times since the last checkpoint"
            text += f" (config.guard.max_skips={guard.max_skips})"
        raise ReplicasDisagree(
            f"{text}. A device has computed or kept something wrong; the checkpoints before it are "
            "good: run the same command, without that machine if it happens again"
        )

    # ---- work that is due at a step ----

    def save(self, state: TrainState) -> None:
        """Start saving `state`, after handling the results of its last step."""
        self.flush()
        with self.phases("save"):
            self._lock.check(ask=True)
            self.check_replicas(state)  # one replica is saved
            extras = self._store_logs()
            self.checkpoints.save(stored_state(self.experiment, state), manifest_extras=extras)
        self._saved_at, self._disagreements = time.monotonic(), 0
        # votes of the last step were cast before this save and must not ask for another one
        self._vote = dataclasses.replace(self._vote, save=False)

    def keep_in_memory(self, state: TrainState) -> None:
        """Keep a snapshot of `state` in the memory of the hosts, as complete as a checkpoint."""
        assert self.snapshots is not None, "config.checkpoint.memory_every is set"
        self.flush()
        with self.phases("save"):
            self.check_replicas(state)
            extras = {"parent": self.checkpoints.parent, **self._store_logs()}
            self.snapshots.save(stored_state(self.experiment, state), extras)

    def _store_logs(self) -> dict[str, Any]:
        """Store all that a checkpoint refers to, before it, and return what its manifest says."""
        for log in (self.ledger, self.writer, self.layers, self._goodput):
            log.flush()
        return {
            "ledger": self.ledger.totals(),
            "config": self.experiment.config_dict.to_dict(),
            "resolved": {
                "batch_size": self.experiment.batch_size,
                "num_steps": self.experiment.num_steps,
                **({"teacher": known.describe()} if (known := self.experiment.teacher) else {}),
            },
        }

    def evaluate(self, state: TrainState) -> None:
        """Evaluate all validation data after the last step, else `train.eval_batches` of it."""
        self.flush()
        step, experiment = int(state.step), self.experiment
        with self.phases("evaluate"):
            limit = experiment.config.train.eval_batches if step < experiment.num_steps else 0
            params = eval_params(experiment, state)
            results = evaluate(experiment, params, max_batches=limit, report=self._report_progress)
            self.writer.eval(step, results)

    def due_evaluations(self, step: int) -> list[str]:
        """The names in `config.evaluations` that are due after `step` steps and not done yet."""
        return [n for n in self._evaluations.due(step) if (step, n) not in self._evaluated]

    def run_evaluations(self, state: TrainState, step: int) -> None:
        """Run those of `config.evaluations` that are due for `state`, after `step` steps."""
        if not (due := self.due_evaluations(step)):
            return
        self.flush()
        with self.phases("evaluate"):
            params = eval_params(self.experiment, state)
            for name in due:
                record = self._evaluations.run(name, params, step, report=self._report_progress)
                self.writer.evaluation(record, run_evaluations.describe(record))
                self._evaluated.add((step, name))

    def _evaluated_until(self, step: int) -> set[tuple[int, str]]:
        """(step, name) of the records of evaluations up to `step` that the folder has."""
        if not self._evaluations.names:
            return set()
        path = StoragePath(self.workdir) / metrics.EVALUATIONS_FILE
        done = process_group.from_lead(
            "evaluations", lambda: [[r["step"], r["source"]] for r in jsonl.read(path)]
        )
        return {(at, name) for at, name in done if at <= step}

    def _report_progress(self, text: str) -> None:
        self.phases.heartbeat()
        if self.is_lead:
            self.writer.progress.show(text)

    def redo_from(self, step: int) -> None:
        """Make all work after `step` due again, and drop the metrics of later steps."""
        self.completed = min(self.completed, step)
        self.validated = None
        self._evaluated = {(at, name) for at, name in self._evaluated if at <= step}
        self.writer.roll_back(step)
        self.layers.roll_back(step)

    @contextlib.contextmanager
    def aborting(self) -> Iterator[None]:
        """A context whose errors end the run for trackers behind a network."""
        try:
            yield
        except BaseException:
            if self._trackers is not None:
                self._trackers.abort()
            raise

    def close(self, *, stopped: bool) -> None:
        """stopped: the run goes on later."""
        self.flush()
        with self.phases("save"):
            self.checkpoints.wait()
        self._goodput.write(self.ledger.totals()["steps"])
        self._goodput.close()
        self.layers.close()
        self.ledger.close()
        self.writer.close("stopped" if stopped else "finished")
