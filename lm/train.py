"""The loop: from a config and a folder to a trained model, from wherever the folder's last
checkpoint is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from lm import config as configs
from lm import metrics, optim
from lm.checkpoint import Checkpoints
from lm.evaluate import evaluate
from lm.experiment import CONFIG_FILE, Experiment
from lm.guard import StopSignals
from lm.metrics import Writer

# A resumed run with other values here would be another run; everything else may change, and is
# reported.
FIXED = ("model", "objective", "data", "seed")


def train(config: ml_collections.ConfigDict, workdir: str, devices: Sequence[Any]) -> int:
    """Trains to the end of the run, or to a SIGINT or SIGTERM, which saves first; returns the exit
    code.

    `workdir` gets config.json, metrics.jsonl, tensorboard/ and checkpoints/.

    Raises:
        ValueError: the config is inconsistent, or differs from that of the run in `workdir`.
    """
    began = time.monotonic()
    experiment = Experiment(config, devices)
    c, num_steps = experiment.config, experiment.num_steps
    lead = jax.process_index() == 0
    say = print if lead else lambda *_: None
    _record_config(config, workdir, experiment, say, lead)

    with Checkpoints(workdir, c.checkpoint) as checkpoints, StopSignals() as stop:
        steps = checkpoints.steps()
        if steps and steps[-1] >= num_steps:
            say(f"{workdir}: finished, all {num_steps} steps are done; raise config.train to go on")
            return 0
        _describe(experiment, say)
        train_step = experiment.train_step  # compiled here
        state = checkpoints.restore(experiment.abstract_state)
        if state is None:
            state = experiment.init_state()
        start = int(state.step)
        say(f"ready in {time.monotonic() - began:.1f} s; from step {start} to {num_steps}")

        writer = Writer(
            workdir,
            first_step=start,
            num_steps=num_steps,
            every=c.train.log_every,
            flops_per_token=experiment.flops_per_token,
            peak_flops=experiment.peak_flops(),
            tensorboard=c.log.tensorboard,
            active=lead,
        )
        schedule = optim.make_schedule(c.optimizer.schedule, num_steps)
        saved = time.monotonic()
        batches = experiment.batches(start, num_steps)
        for step, batch in _profiled(batches, c.log, workdir):
            state, sums = train_step(state, batch)
            done = step + 1
            rate = c.optimizer.learning_rate * float(jnp.asarray(schedule(step)))
            writer.train(done, sums, learning_rate=rate)
            if experiment.validation and _due(done, c.train.eval_every, num_steps):
                with writer.pause():
                    params = optim.averaged_params(state.opt_state) or state.params
                    limit = 0 if done == num_steps else c.train.eval_batches
                    report = writer.progress.show
                    writer.eval(
                        done, evaluate(experiment, params, max_batches=limit, report=report)
                    )
            late = 0 < c.checkpoint.every_seconds < time.monotonic() - saved
            if stop.received or late or _due(done, c.checkpoint.every, num_steps):
                with writer.pause():
                    checkpoints.save(state)
                saved = time.monotonic()
            if stop.received:
                say(f"\n{stop.received.name}: saved at step {done}; run the same command to go on")
                break
        checkpoints.wait()
        writer.close()
    return stop.exit_code


def _due(done: int, every: int, num_steps: int) -> bool:
    return done == num_steps or (every > 0 and done % every == 0)


def _record_config(
    config: ml_collections.ConfigDict, workdir: str, experiment: Experiment, say: Any, lead: bool
) -> None:
    """Writes config.json, or checks that a resumed run is the same run.

    Raises:
        ValueError: a fixed value differs and `checkpoint.allow_changed` doesn't name it.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if path.exists():
        allowed = experiment.config.checkpoint.allow_changed
        refused = []
        for key, (old, new) in configs.changed(configs.from_json(path.read_text()), config).items():
            line = f"config.{key}: {old!r} -> {new!r}"
            named = any(key == a or key.startswith(a + ".") for a in allowed)
            if key.split(".")[0] in FIXED and not named:
                refused.append(f"{line} (--config.checkpoint.allow_changed=\"('{key}',)\")")
            else:
                say(f"changed since this run began: {line}")
        if refused:
            raise ValueError(
                f"{workdir} holds a run with another config; use another --workdir, or allow:\n  "
                + "\n  ".join(refused)
            )
    if lead:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.parent / (CONFIG_FILE + ".new")
        written.write_text(configs.to_json(config))
        written.replace(path)


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
            say(f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {shown}".rstrip())
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    per_step = experiment.batch_size * c.data.length
    device = mesh.devices.flat[0].device_kind
    say(
        f"{metrics.quantity(count)} parameters · {mesh.size} × {device}"
        f"{' · ' + shape if shape else ''} · "
        f"{experiment.num_steps} steps of {metrics.quantity(per_step)} tokens "
        f"({metrics.quantity(experiment.num_steps * per_step)} in all)"
    )


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
