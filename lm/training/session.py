"""The parts of a run that is under way, and what becomes of the values that its steps give back."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm.checkpoint.manager import Checkpoints
from lm.exit_codes import Exit, RunError
from lm.optim.schedules import make_schedule
from lm.parallel import process_group
from lm.reliability.data_ledger import Ledger
from lm.reliability.watchdog import Consensus, StopSignals, Vote, Watchdog
from lm.telemetry.goodput import Goodput
from lm.telemetry.metrics import DeferredMetrics, StepResult, Writer
from lm.telemetry.phase_timer import PhaseTimer
from lm.training import bad_step_report, resume
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment
from lm.types import TrainState


class Diverged(RunError):
    """A step was bad, and the policy doesn't go on."""

    code = Exit.DIVERGED


class ReplicasDisagree(RunError):
    """Devices that should hold the same bits don't."""

    code = Exit.CORRUPT


class CannotWrite(RunError):
    """The disk of the run's folder is full or read-only."""

    code = Exit.SAVE_FAILED


@contextlib.contextmanager
def disk_errors_as_run_errors(workdir: str) -> Iterator[None]:
    """Turns the errors of a full or read-only disk into CannotWrite."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise CannotWrite(
            f"{workdir} can't be written: {error.strerror}; make space, and run the same command: "
            "it goes on from the last checkpoint"
        ) from error


class RollbackRequired(Exception):
    """Go back to the last checkpoint; `bad` is the step to look at, if one is to blame."""

    def __init__(self, reason: str, bad: StepResult | None = None) -> None:
        super().__init__(reason)
        self.bad = bad


class TrainingSession:
    """The parts of a running run, and what happens to the values that steps give back."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: str,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        signals: StopSignals,
        phases: PhaseTimer,
        ledger: Ledger,
    ) -> None:
        c = experiment.config
        self.experiment, self.workdir, self.checkpoints = experiment, workdir, checkpoints
        self.phases, self.ledger, self.late = phases, ledger, DeferredMetrics()
        self.lead = jax.process_index() == 0
        self._watchdog, self._signals, self._votes = watchdog, signals, Consensus(experiment.rules)
        self._vote = Vote()
        self._schedule = make_schedule(c.optimizer.schedule, experiment.num_steps)
        self._saved = time.monotonic()
        self._bad_in_a_row = self._disagreements = 0
        judged = process_group.from_lead(
            "judged", lambda: sorted(bad_step_report.judged_steps(workdir))
        )
        self.judged: set[int] = set(judged)
        self.not_finite: list[str] = []  # losses of the last evaluation, for a message
        first = ledger.totals()["steps"]
        self.completed = first  # the step up to which all that was due is done
        self._goodput = Goodput(workdir, phases, first_step=first)
        self.writer = Writer(
            workdir,
            first_step=first,
            num_steps=experiment.num_steps,
            every=c.train.log_every,
            flops_per_token=experiment.flops_per_token,
            peak_flops=experiment.peak_flops(),
            tensorboard=c.log.tensorboard,
            active=self.lead,
        )

    def say(self, text: str) -> None:
        if self.lead:
            print(text, flush=True)

    def cast(self, held_up: float) -> Any:
        every = self.experiment.config.checkpoint.every_seconds
        overdue = 0 < every < time.monotonic() - self._saved
        return self._votes.start(Vote(self._signals.received, overdue), held_up)

    def agreed(self) -> Vote:
        """What all processes know: of themselves with one, of the step before with several."""
        if jax.process_count() > 1:
            return self._vote
        return self._votes.collect(self.cast(0.0))[0]

    def finish(self, steps: list[StepResult]) -> None:
        """Takes account of steps whose values are there: ledger, metrics, and the policy.

        Raises:
            LedgerMismatch, Diverged, RollbackRequired
        """
        c = self.experiment.config
        for finished in steps:
            size = self.experiment.batch_size * c.data.length
            self.ledger.record(finished.step, finished.facts, size)
            if finished.seconds is not None:
                self._watchdog.stepped(finished.seconds)
            extra = {}
            if jax.process_count() > 1:
                self._vote, slowest, lag = self._votes.collect(finished.votes)
                extra = {"slowest_process": slowest, "lag_seconds": lag}
            if self.lead and self.writer.is_due(finished.step + 1):
                extra["learning_rate"] = self._learning_rate(finished.step)
                extra["tokens_seen"] = self.ledger.totals()["filled"]
                if self.experiment.flops_per_token is not None:
                    extra["flops_seen"] = extra["tokens_seen"] * self.experiment.flops_per_token
                extra["goodput"] = self._goodput.write(finished.step + 1)
            self.writer.train(finished, **extra)
            self._bad_in_a_row = self._bad_in_a_row + 1 if finished.bad else 0
            if finished.bad:
                self._judge(finished)

    def _judge(self, finished: StepResult) -> None:
        guard = self.experiment.config.guard
        text = bad_step_report.describe(finished)
        if guard.policy == "stop" or self._bad_in_a_row > guard.max_skips:
            raise Diverged(
                f"{text}\nIts update was not applied. Lower config.optimizer.learning_rate or warm "
                "up for longer; --config.guard.policy=rewind replays the step and says whether the "
                "data, the numerics or the hardware did it; policy=skip goes on without it"
                + (f" (at most {guard.max_skips} in a row)" if guard.policy != "stop" else "")
            )
        if guard.policy == "rewind" and finished.step not in self.judged:
            raise RollbackRequired(text, finished)
        self.writer.note(f"{text}; its update is skipped")

    def _learning_rate(self, step: int) -> float:
        peak = self.experiment.config.optimizer.learning_rate
        return peak * float(jnp.asarray(self._schedule(step)))

    def flush(self) -> None:
        self.finish(self.late.flush())

    def restart(self, step: int) -> None:
        """All that was due after `step` is due again, and metrics of later steps are dropped."""
        self.completed = min(self.completed, step)
        self.writer.rewind(step)

    def check_replicas(self, state: TrainState) -> None:
        """Raises unless all devices that should hold the same bits do.

        Raises:
            RollbackRequired: they don't, and the policy is to rewind: at most `guard.max_skips`
                times between two checkpoints.
            ReplicasDisagree: they don't.
        """
        wrong = self.experiment.replica_mismatches(state)
        if not wrong:
            return
        text = f"step {int(state.step)}: replicas hold different bits of {', '.join(wrong[:5])}"
        text += f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        guard = self.experiment.config.guard
        self._disagreements += 1
        if guard.policy == "rewind" and self._disagreements <= guard.max_skips:
            raise RollbackRequired(f"{text}: hardware")
        if guard.policy == "rewind":
            text += f", {self._disagreements} times since the last checkpoint (config.guard."
            text += f"max_skips={guard.max_skips})"
        raise ReplicasDisagree(
            f"{text}. A device has computed or kept something wrong; the checkpoints before it are "
            "good: run the same command, without that machine if it happens again"
        )

    def save(self, state: TrainState) -> None:
        self.check_replicas(state)  # what is saved is one replica's
        extras = {
            "ledger": self.ledger.totals(),
            "config": self.experiment.config_dict.to_dict(),
            "resolved": resume.resolved(self.experiment),
        }
        self.checkpoints.save(self.experiment.stored(state), manifest_extras=extras)
        self._saved, self._disagreements = time.monotonic(), 0
        # the votes of the last step were cast before this save: they must not ask for another one
        self._vote = dataclasses.replace(self._vote, save=False)

    def evaluate(self, state: TrainState, done: int) -> None:
        c, experiment = self.experiment.config, self.experiment
        params = experiment.evaluated(state)
        limit = 0 if done == experiment.num_steps else c.train.eval_batches

        def report(text: str) -> None:
            self.phases.heartbeat()
            if self.lead:
                self.writer.progress.show(text)

        results = evaluate(experiment, params, max_batches=limit, report=report)
        self.writer.eval(done, results)
        self.not_finite = [
            f"{source}: loss {values['loss']:g}"
            for source, values in results.items()
            if not math.isfinite(values["loss"])
        ]

    def close(self) -> None:
        self.flush()
        with self.phases("save"):
            self.checkpoints.wait()
        if self.lead:
            self._goodput.write(self.ledger.totals()["steps"])
        self._goodput.close()
        self.writer.close()
        self.ledger.close()
