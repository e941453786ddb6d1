"""Back to the last checkpoint, and forward again to the step that was bad: whose fault was it?"""

from __future__ import annotations

from typing import Any

import jax

from lm.checkpoint.manager import Checkpoints
from lm.reliability.data_ledger import start_totals
from lm.telemetry.metrics import DeferredMetrics, StepResult
from lm.telemetry.phase_timer import PhaseTimer
from lm.training import bad_step_report
from lm.training.experiment import Experiment
from lm.training.session import RollbackRequired, TrainingSession
from lm.types import TrainState


def first_state(
    experiment: Experiment, checkpoints: Checkpoints, phases: PhaseTimer, step: int | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest good checkpoint (or of that at `step`), or that which the run begins
    with, with the ledger's totals.
    """
    with phases("restore"):
        restored = experiment.restore(checkpoints, step)
    if restored is not None:
        state, saved = restored
        if state.opt_state is None:
            with phases("init"):
                state = jax.block_until_ready(experiment.start_optimizer(state))
        return state, dict(saved.ledger)
    if (fork := experiment.fork) is not None:
        checkpoints.parent = fork.describe()
        with phases("restore"):
            return fork.restore(experiment.abstract_state), dict(fork.manifest.ledger)
    with phases("init"):
        if experiment.initializer.base is not None:
            checkpoints.parent = experiment.initializer.base.describe()
        return jax.block_until_ready(experiment.init_state()), start_totals()


def replay(run: TrainingSession, rewind: RollbackRequired) -> TrainState:
    """The state to go on from, with the verdict about the bad step written down.

    A run is a function of (config, step): what differs from the first time is the hardware's doing.
    It may have been so some steps ago, and be in the last checkpoint: where the step repeats from
    there, that checkpoint must be what the one before it leads to.

    Where the hardware did it, evaluations and checkpoints since may hold its error: the state is
    that of the last good checkpoint, and all that was due after it is due again. Else it is the
    state after the bad step.
    """
    bad, checkpoints = rewind.bad, run.checkpoints
    run.late.drop()
    checkpoints.wait()
    state = _back(run)
    start = int(state.step)
    run.writer.note(f"{rewind}; back to step {start}")
    if bad is None:
        run.restart(start)
        return state
    state, evidence = _redo(run, state, bad.step + 1, bad)
    older, repeats = (
        [s for s in checkpoints.steps() if s < start],
        bad_step_report.repeats(run.experiment),
    )
    moved = False
    if older and repeats and evidence["verdict"] != "hardware":
        run.writer.note(f"it repeats from step {start}; is that what step {older[-1]} leads to?")
        del state  # before the next one is read
        state, _ = _redo(run, _back(run, older[-1]), start)
        if moved := not checkpoints.holds(run.experiment.stored(state)):
            place = checkpoints.set_aside(start)
            run.writer.note(f"no: a device had spoilt the checkpoint of step {start}, now {place}")
            state, evidence = _redo(run, state, bad.step + 1, bad)
        else:
            state, _ = _redo(run, state, bad.step + 1)
    if moved or evidence["verdict"] == "hardware":
        del state
        state = _back(run)
        run.restart(int(state.step))
    run.judged.add(bad.step)
    path = bad_step_report.write(run.workdir, evidence, active=run.lead)
    run.writer.note(f"{bad_step_report.summary(evidence)}\nevidence: {path}")
    return state


def _back(run: TrainingSession, step: int | None = None) -> TrainState:
    """The state of the newest good checkpoint, or of that at `step`, with the ledger gone back."""
    state, totals = first_state(run.experiment, run.checkpoints, run.phases, step)
    run.ledger.rewind(totals)
    return state


def _redo(
    run: TrainingSession, state: TrainState, stop: int, bad: StepResult | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """The state before step `stop`, done again from `state`, and the evidence about step `bad`."""
    experiment, evidence = run.experiment, {}
    for step, batch in experiment.batches(int(state.step), stop):
        run.phases.heartbeat()
        state, sums, facts = experiment.train_step(state, batch)
        late = DeferredMetrics()
        late.push(step, sums, facts)
        [again] = late.flush()
        run.ledger.record(step, again.facts, experiment.batch_size * experiment.config.data.length)
        if bad is not None and step == bad.step:  # not applied: the state is that from before it
            evidence = bad_step_report.diagnose(experiment, state, batch, bad, again)
    return state, evidence
