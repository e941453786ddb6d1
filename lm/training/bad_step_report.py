"""Bad step report: a verdict on a bad step, and the evidence for it in one readable file.

A run is a function of (config, step): a step that is replayed from a checkpoint gives the same
bits. If it doesn't, the hardware erred. If it does, but is not bad in float32, the numerics did.
Else it was the data, or a learning rate too high for them. GPUs repeat bits only with
--xla_gpu_deterministic_ops: without it the hardware is never blamed, and a step that is not bad
again stays unclear.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm import storage
from lm.layers import chunking
from lm.layers.cross_entropy import token_nll
from lm.optim import optimizer_state
from lm.optim.param_tree import named_leaves
from lm.telemetry.deferred import StepResult
from lm.training.experiment import Experiment
from lm.types import Array, Batch, Params, StepInfo, Sums, TrainState

FOLDER = "evidence"
NUM_ROWS = 4  # with the highest loss, whose documents are listed
REASONS = {
    "hardware": "done again, the same step gives something else: a device has computed or kept "
    "something wrong",
    "numerics": "it repeats, but not in float32: the compute dtype is too coarse for it",
    "data": "it repeats with the same batch: look at its worst rows, and at the learning rate",
    "unclear": "done again it is not bad, but this GPU doesn't repeat bits: with XLA_FLAGS="
    "--xla_gpu_deterministic_ops=true the verdict would be certain",
}
# after either flag XLA takes no kernel whose sums depend on the order of threads
DETERMINISTIC = re.compile(
    r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?(\s|$)"
)

Evidence = dict[str, Any]  # JSON


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The values that a step computed."""

    sums: dict[str, float]  # of the loss
    grad_norm: float
    bad: bool

    def changed(self, other: Outcome) -> list[str]:
        """Names of the values that differ in any bit; nan equals nan."""
        a, b = ({**x.sums, "grad_norm": x.grad_norm} for x in (self, other))
        return [name for name in a if a[name].hex() != b[name].hex()]

    def to_json(self) -> Evidence:
        mean = {"bad": self.bad, "loss": _mean_loss(self.sums), "grad_norm": self.grad_norm}
        return {**mean, "sums": self.sums}


class Size(NamedTuple):
    """Norm and largest magnitude of the finite numbers of an array, and the count of others.

    Each has shape [], or [L] for layers stacked in one array.
    """

    norm: jax.Array
    max: jax.Array
    not_finite: jax.Array


class TokenLosses(NamedTuple):
    """Arrays [B, T] of a batch."""

    losses: jax.Array  # weighted, without dropout
    scored: jax.Array  # bool
    segments: jax.Array


class Measurements(NamedTuple):
    gradients: Params  # of Size
    parameters: Params  # of Size
    optimizer: Any  # the optimizer state's tree, with the number of values that are not finite
    tokens: TokenLosses


def is_repeatable(experiment: Experiment) -> bool:
    """True if a replayed step gives the same bits, unless the hardware errs."""
    on_gpu = experiment.rules.platform == "gpu"
    return not on_gpu or bool(DETERMINISTIC.search(os.environ.get("XLA_FLAGS", "")))


def verdict(
    first: Outcome, replay: Outcome, float32: Outcome | None, *, repeats: bool = True
) -> str:
    """The cause that made `first` bad: hardware, numerics, data or unclear.

    replay: the same step, replayed. float32: the same in float32, None where it was computed in
    float32 already. repeats: equal steps give equal bits, so that a difference proves an error of
    the hardware.
    """
    if not replay.bad or (repeats and first.changed(replay)):
        return "hardware" if repeats else "unclear"
    return "data" if float32 is None or float32.bad else "numerics"


def describe(step: StepResult) -> str:
    """One line about a bad step."""
    norm = float(step.info["grad_norm"])
    reason = "its gradient is a spike"
    if not (math.isfinite(norm) and math.isfinite(step.sums["objective"])):
        reason = "not finite"
    elif not step.info["finite_params"]:
        reason = "its update is not finite (see config.optimizer)"
    loss = _mean_loss(step.sums)
    return f"step {step.step}: {reason}: loss {loss:.4g}, gradient norm {norm:.4g}"


def diagnose(
    experiment: Experiment, state: TrainState, batch: Batch, first: StepResult, again: StepResult
) -> Evidence:
    """The evidence about a bad step; all processes of the run call this together.

    state: after `again`, the replay of the step on the same batch. If that was bad again, its
    parameters and optimizer state are those from before the step, which was not applied.
    """
    step = first.step
    outcomes = [Outcome(x.sums, float(x.info["grad_norm"]), x.bad) for x in (first, again)]
    in_float32 = None
    if again.bad and experiment.config.model.dtype != "float32":
        in_float32 = _in_float32(experiment, state, batch, step)
    cause = verdict(outcomes[0], outcomes[1], in_float32, repeats=is_repeatable(experiment))

    measure = jax.jit(_measure, static_argnums=(0, 1), out_shardings=experiment.rules.sharding())
    measured: Measurements = jax.device_get(measure(experiment, step, state, batch))
    losses, scored = (np.asarray(x) for x in measured.tokens[:2])
    row_losses = losses.sum(1) / np.maximum(scored.sum(1), 1)
    # those that are not finite first, then the highest losses
    worst = np.argsort(-np.nan_to_num(row_losses, nan=np.inf), kind="stable")[:NUM_ROWS]
    optimizer = named_leaves(measured.optimizer)
    not_finite = {
        "gradients": _not_finite(measured.gradients),
        "parameters": _not_finite(measured.parameters),
        "optimizer": {name: int(count) for name, count in optimizer.items() if count},
    }
    return {
        "step": step,
        "verdict": cause,
        "reason": REASONS[cause],
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "first": outcomes[0].to_json(),
        "again": outcomes[1].to_json(),
        "changed_bits": outcomes[0].changed(outcomes[1]),
        "float32": None if in_float32 is None else in_float32.to_json(),
        "usual_grad_norm": math.exp(float(optimizer_state.norm_state(state.opt_state).log_mean)),
        "not_finite": not_finite,
        "worst_rows": _describe_rows(experiment, step, worst, row_losses, measured.tokens),
        "row_losses": row_losses.tolist(),
        "gradients": _per_layer(measured.gradients),
        "parameters": _per_layer(measured.parameters),
    }


def _in_float32(experiment: Experiment, state: TrainState, batch: Batch, step: int) -> Outcome:
    """The outcome of the step computed in float32."""
    k = experiment.config.train.num_microbatches
    parts = experiment.rules.size("batch") * experiment.model.num_microbatches
    if experiment.batch_size % (2 * k * parts) == 0:
        k *= 2  # as activations take twice the memory
    float32 = experiment.variant({"model.dtype": "float32", "train.num_microbatches": k})

    def run(state: TrainState, batch: Batch) -> tuple[Sums, StepInfo]:
        state = dataclasses.replace(state, step=jnp.int32(step))
        _, sums, info = float32._train_step(state, batch)  # the update itself is not kept
        return sums, {name: info[name] for name in ("grad_norm", "bad")}

    compiled = jax.jit(run, out_shardings=experiment.rules.sharding())
    sums, info = jax.device_get(compiled(state, batch))
    host_sums = {name: float(x) for name, x in sums.items()}
    return Outcome(host_sums, float(info["grad_norm"]), bool(info["bad"]))


# ---- on the devices ----


def _measure(experiment: Experiment, step: int, state: TrainState, batch: Batch) -> Measurements:
    gradients, sums = experiment.gradients(state.params, batch, step)
    scale = 1.0 / jnp.maximum(sums["tokens"], 1.0)
    is_stacked = jax.tree.map(
        lambda x: isinstance(x, nn.Partitioned) and x.names[:1] == ("layers",),
        experiment.boxed_params,
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )
    trained_is_stacked = experiment.initializer.trained(is_stacked)
    return Measurements(
        jax.tree.map(lambda g, stacked: _size(g * scale, stacked), gradients, trained_is_stacked),
        jax.tree.map(_size, state.params, is_stacked),
        jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), state.opt_state),
        _token_losses(experiment, state.params, batch),
    )


def _size(x: Array, stacked: bool) -> Size:
    axes = tuple(range(1 if stacked else 0, x.ndim))
    finite = jnp.isfinite(x)
    size = jnp.abs(jnp.where(finite, x, 0.0)).astype(jnp.float32)
    top = jnp.max(size, axis=axes, keepdims=True)
    squares = jnp.square(size / jnp.maximum(top, 1e-38))  # those of huge numbers would overflow
    norm = jnp.squeeze(top, axes) * jnp.sqrt(jnp.sum(squares, axis=axes))
    return Size(norm, jnp.squeeze(top, axes), jnp.sum(~finite, axis=axes))


def _token_losses(experiment: Experiment, params: Params, batch: Batch) -> TokenLosses:
    model, chunk_size = experiment.model, experiment.config.loss.chunk_size
    variables = {"params": params}
    hidden = model.apply(variables, batch.inputs, encoder=batch.encoder, train=False).hidden
    size, length = batch.targets.shape
    n = chunking.num_chunks(chunk_size, size // experiment.rules.size("act_batch"), length)

    def chunk_losses(x: tuple[Array, Array]) -> jax.Array:
        hidden, targets = x
        return token_nll(model.apply(variables, hidden, method="logits"), targets)[0]

    losses = jax.lax.map(chunk_losses, chunking.split((hidden, batch.targets), n))
    losses = chunking.join(losses, length)
    scored = batch.weights != 0
    return TokenLosses(
        jnp.where(scored, losses * batch.weights, 0.0), scored, batch.inputs.segments
    )


# ---- on the host ----


def _mean_loss(sums: dict[str, float]) -> float:
    return sums["loss"] / max(sums["tokens"], 1.0)


def _named(sizes: Params) -> dict[str, Size]:
    return named_leaves(sizes, is_leaf=lambda x: isinstance(x, Size))


def _not_finite(sizes: Params) -> Evidence:
    counts = {name: int(np.sum(size.not_finite)) for name, size in _named(sizes).items()}
    return {name: count for name, count in counts.items() if count}


def _per_layer(sizes: Params) -> Evidence:
    return {
        name: {key: np.asarray(value).tolist() for key, value in size._asdict().items()}
        for name, size in _named(sizes).items()
    }


def _describe_rows(
    experiment: Experiment,
    step: int,
    worst: np.ndarray,
    row_losses: np.ndarray,
    tokens: TokenLosses,
) -> list[Evidence]:
    """Source and documents of the worst rows, with the loss of each document."""
    origins = experiment.train_data.explain_batch(step, experiment.tokenizer, rows=worst)
    rows = []
    for row, origin in zip(worst, origins, strict=True):
        (losses, scored, segments), documents = (x[row] for x in tokens), []
        for n, (span, text) in enumerate(zip(origin.documents, origin.text, strict=True)):
            own = segments == n + 1
            mean = float(losses[own].sum() / max(scored[own].sum(), 1))
            documents.append({"loss": mean, **span._asdict(), "begins": text})
        source = {"source": origin.source, "epoch": origin.epoch, "source_row": origin.row}
        loss = float(row_losses[row])
        rows.append({"row": int(row), "loss": loss, **source, "documents": documents})
    return rows


def summary(evidence: Evidence) -> str:
    """The evidence in a paragraph."""
    lines = [f"step {evidence['step']}: {evidence['verdict']}: {evidence['reason']}"]
    for name in ("first", "again", "float32"):
        if (outcome := evidence[name]) is not None:
            values = f"loss {outcome['loss']:.6g}, gradient norm {outcome['grad_norm']:.6g}"
            lines.append(f"  {name}: {values}{' (bad)' if outcome['bad'] else ''}")
    for where, counts in evidence["not_finite"].items():
        if counts:
            shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:3])
            more = f" and {len(counts) - 3} more" if len(counts) > 3 else ""
            lines.append(f"  not finite in {where}: {shown}{more}")
    row = evidence["worst_rows"][0]
    document = max(
        row["documents"], key=lambda d: d["loss"] if math.isfinite(d["loss"]) else math.inf
    )
    usual = float(np.median(evidence["row_losses"]))
    lines.append(
        f"  worst row: {row['row']}, loss {row['loss']:.4g} (median {usual:.4g}): "
        f"{row['source']}, document {document['id']}: {document['begins'][:60]!r}"
    )
    return "\n".join(lines)


def write(workdir: str, evidence: Evidence, *, active: bool) -> str:
    """The path of the evidence, WORKDIR/evidence/step-N.json, which an `active` process writes."""
    path = epath.Path(workdir) / FOLDER / f"step-{evidence['step']}.json"
    if active:
        storage.write_atomically(path, _to_text(_plain(evidence)) + "\n")
    return str(path)


def diagnosed_steps(workdir: str) -> set[int]:
    """Numbers of the steps that a run has evidence about."""
    folder = epath.Path(workdir) / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    matches = (re.fullmatch(r"step-(\d+)\.json", name) for name in names)
    return {int(match[1]) for match in matches if match}


def _plain(value: Any) -> Any:
    """`value` with floats of nine digits, those of float32, and "nan" and "inf" as strings."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value


def _to_text(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry; short ones and lists of numbers stay on one."""
    inner = indent + "  "
    if isinstance(value, dict) and len(json.dumps(value, ensure_ascii=False)) > 160:
        lines = [f"{inner}{json.dumps(k)}: {_to_text(x, inner)}" for k, x in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(inner + _to_text(x, inner) for x in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
