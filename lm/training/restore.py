"""State of a run, from the first that exists: its own checkpoint, the fork's, or its initializer.

Checkpoints of a run with adapters hold only their parameters; the others stay in the checkpoint of
the parent, which is read again at every restore.
"""

from __future__ import annotations

import dataclasses

import jax

from lm.checkpoint.manager import Checkpoints
from lm.checkpoint.manifest import Damaged, Manifest
from lm.checkpoint.memory import Found, MemorySnapshots
from lm.optim import optimizer_state, param_tree
from lm.parallel import process_group, sharding
from lm.reliability.data_ledger import chain_at, start_totals
from lm.storage.epaths import StoragePath
from lm.telemetry.jsonl import Record
from lm.telemetry.phase_timer import PhaseTimer
from lm.training.experiment import Experiment
from lm.types import Params, TrainState


def restore_or_init(
    experiment: Experiment,
    checkpoints: Checkpoints,
    phases: PhaseTimer,
    step: int | None = None,
    *,
    snapshots: MemorySnapshots | None = None,
    found: Found | None = None,
) -> tuple[TrainState, Record]:
    """(state, ledger totals) of the snapshot `found` in memory, if there is one and it is good,
    else of the newest good checkpoint, or of the one at `step`.

    Without checkpoints: those of the fork's checkpoint, else those before step 0.
    """
    with phases("restore"):
        if snapshots and found and (kept := _restore_snapshot(experiment, snapshots, found)):
            checkpoints.parent = found.manifest.parent
            return _with_teacher(experiment, kept, found.manifest), dict(found.manifest.ledger)
        restored = restore(experiment, checkpoints, step)
        if restored is None and (fork := experiment.fork) is not None:
            checkpoints.parent = fork.describe()
            restored = fork.restore(experiment.checkpointed_state), fork.manifest
    with phases("init"):
        if restored is None:
            if (parent := experiment.initializer.parent) is not None:
                checkpoints.parent = parent.describe()
            return jax.block_until_ready(experiment.init_state()), start_totals()
        state, manifest = _with_teacher(experiment, *restored), restored[1]
        if state.opt_state is None:
            state = jax.block_until_ready(experiment.init_optimizer(state))
        return state, dict(manifest.ledger)


def restore(
    experiment: Experiment, checkpoints: Checkpoints, step: int | None = None
) -> tuple[TrainState, Manifest] | None:
    """As `Checkpoints.restore`, with the parameters that the parent's checkpoint holds; without the
    teacher's.
    """
    restored = checkpoints.restore(stored_state(experiment, experiment.checkpointed_state), step)
    if restored is None:
        return None
    state, manifest = restored
    params = experiment.initializer.with_base_params(state.params, manifest.parent)
    return dataclasses.replace(state, params=params), manifest


def _with_teacher(experiment: Experiment, state: TrainState, manifest: Manifest) -> TrainState:
    """The state with the parameters of the teacher that the run of `manifest` has had so far."""
    if (teacher := experiment.teacher) is None:
        return state
    teacher.resume(manifest.resolved.get("teacher"))
    return dataclasses.replace(state, teacher=teacher.read(experiment.tokenizer))


def memory_snapshots(experiment: Experiment, workdir: str) -> MemorySnapshots | None:
    """The snapshots in memory that `config.checkpoint.memory_every` asks for."""
    c = experiment.config.checkpoint
    if not c.memory_every:
        return None
    abstract = stored_state(experiment, experiment.checkpointed_state)
    folder = str(StoragePath(workdir).resolve())
    return MemorySnapshots(c.memory_dir, folder, experiment.config_dict.to_dict(), abstract)


def find_snapshot(snapshots: MemorySnapshots | None, workdir: str, at_least: int) -> Found | None:
    """The newest snapshot of this run in memory, of step `at_least` or later; None if there is
    none. That of another run, which once had the same folder, has steps that the ledger lacks.
    """
    found = None if snapshots is None else snapshots.find(at_least)
    if snapshots is None or found is None:
        return None
    step, chain = found.manifest.step, found.manifest.ledger["chain"]
    if process_group.from_lead("same run", lambda: chain_at(workdir, step) == chain):
        return found
    snapshots.clear()
    return None


def _restore_snapshot(
    experiment: Experiment, snapshots: MemorySnapshots, found: Found
) -> TrainState | None:
    """The state of a snapshot; None where its bits are not those that were kept."""
    try:
        state = snapshots.restore(found)
    except Damaged as error:
        process_group.print_on_lead(f"not from {found}: {error}")
        return None
    params = experiment.initializer.with_base_params(state.params, found.manifest.parent)
    process_group.print_on_lead(f"restored from {found}")
    return dataclasses.replace(state, params=params)


def restore_params(
    experiment: Experiment, workdir: str, step: int | None = None
) -> tuple[int, Params]:
    """(step, the parameters that training evaluates) of a run's newest checkpoint, or of the one at
    `step`: averaged parameters where training keeps them. Nothing is written.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    with Checkpoints(workdir, experiment.config.checkpoint, read_only=True) as checkpoints:
        if not experiment.config.optimizer.ema_decay:
            abstract = experiment.initializer.stored(experiment.abstract_params)
            found, params = checkpoints.restore_params(abstract, step)
            return found, experiment.initializer.with_base_params(params, checkpoints.parent)
        restored = restore(experiment, checkpoints, step)
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {checkpoints.directory}; train first")
    state, _ = restored
    params = state.params if state.opt_state is None else eval_params(experiment, state)
    return int(state.step), params


def stored_state(experiment: Experiment, state: TrainState) -> TrainState:
    """The part of a state that this run's checkpoints hold."""
    params = experiment.initializer.stored(state.params)
    return dataclasses.replace(state, params=params, teacher=None)


def eval_params(experiment: Experiment, state: TrainState) -> Params:
    """The parameters to evaluate, on the devices: averaged ones where training keeps them."""
    averaged = optimizer_state.averaged_params(state.opt_state)
    if averaged is None:
        return state.params
    initializer = experiment.initializer
    if experiment.config.optimizer.memory != "device":
        trained = initializer.trained(experiment.abstract_params)
        shardings = jax.tree.map(lambda x: x.sharding, trained)
        averaged = jax.jit(sharding.on_device, out_shardings=shardings)(averaged)
    return param_tree.join(averaged, param_tree.split(state.params, initializer.frozen)[0])
