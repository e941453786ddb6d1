"""Rollback: restore the last checkpoint, replay to the bad step, and diagnose it."""

from __future__ import annotations

from lm.telemetry.deferred import StepResult, fetch
from lm.training import bad_step_report
from lm.training.bad_step_report import Evidence
from lm.training.restore import restore_or_init, stored_state
from lm.training.session import RollbackRequired, TrainingSession
from lm.types import TrainState


def roll_back(session: TrainingSession, rollback: RollbackRequired) -> TrainState:
    """Return the state to continue from, after writing the verdict on the bad step.

    A replay that differs from the first time is an error of the hardware. That may have happened
    before the last checkpoint: where the step repeats from it, a replay from the one before must
    reproduce that checkpoint. After a hardware error, evaluations and checkpoints since may be
    wrong: the state is that of the last good checkpoint, and all work after it is due again. Else
    it is the state after the bad step.
    """
    bad_step, checkpoints, note = rollback.bad_step, session.checkpoints, session.writer.note
    session.deferred.discard()
    if session.snapshots is not None:
        session.snapshots.clear()  # of a state that may be wrong, or that is not gone back to
    checkpoints.wait()
    state = _restore(session)
    start = int(state.step)
    note(f"{rollback}; back to step {start}")
    if bad_step is None:
        session.redo_from(start)
        return state
    state, evidence = _replay(session, state, bad_step.step + 1, bad_step)
    is_hardware = evidence["verdict"] == "hardware"
    older = [step for step in checkpoints.steps() if step < start]
    if older and not is_hardware and bad_step_report.is_repeatable(session.experiment):
        note(f"it repeats from step {start}; is that what step {older[-1]} leads to?")
        del state  # before the next one is read
        state, _ = _replay(session, _restore(session, older[-1]), start)
        if checkpoints.holds(stored_state(session.experiment, state)):
            state, _ = _replay(session, state, bad_step.step + 1)
        else:
            moved_to = checkpoints.set_aside(start)
            note(f"no: a device had damaged the checkpoint of step {start}, now {moved_to}")
            state, evidence = _replay(session, state, bad_step.step + 1, bad_step)
            is_hardware = True
    if is_hardware:
        del state
        state = _restore(session)
        session.redo_from(int(state.step))
    session.diagnosed.add(bad_step.step)
    path = bad_step_report.write(session.workdir, evidence, active=session.is_lead)
    note(f"{bad_step_report.summary(evidence)}\nevidence: {path}")
    return state


def _restore(session: TrainingSession, step: int | None = None) -> TrainState:
    """The state of the newest good checkpoint, or of that at `step`; the ledger goes back too."""
    state, totals = restore_or_init(session.experiment, session.checkpoints, session.phases, step)
    session.ledger.roll_back(totals)
    return state


def _replay(
    session: TrainingSession, state: TrainState, stop: int, bad_step: StepResult | None = None
) -> tuple[TrainState, Evidence]:
    """(the state before step `stop`, the evidence about `bad_step`) of a replay from `state`."""
    experiment, evidence = session.experiment, {}
    for step, batch in experiment.batches(int(state.step), stop):
        session.phases.heartbeat()
        state, sums, info = experiment.train_step(state, batch)
        again = fetch(step, sums, info)
        session.add_to_ledger(again)
        if bad_step is not None and step == bad_step.step:
            # its update was not applied: the state is that from before it
            evidence = bad_step_report.diagnose(experiment, state, batch, bad_step, again)
    return state, evidence
