"""What was wrong with a bad step: a verdict, and the evidence in one file to read.

A run is a function of (config, step): a step that is done again from a checkpoint gives the same
bits. If it doesn't, it was the hardware. If it does, but is a good step in float32, it was the
numerics. Else it was the data, or a learning rate too high for them. GPUs repeat bits only with
--xla_gpu_deterministic_ops: without it the hardware is never blamed, and a step that isn't bad
again stays unclear.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm.layers import chunking
from lm.layers.cross_entropy import token_nll
from lm.optim import chain
from lm.telemetry.metrics import StepResult
from lm.training.experiment import Experiment
from lm.types import Array, Batch, Params, TrainState

FOLDER = "evidence"
NUM_ROWS = 4  # the worst ones, that are explained
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

Evidence = dict[str, Any]  # what JSON can hold


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step made of its batch."""

    sums: dict[str, float]  # those of the loss
    grad_norm: float
    bad: bool

    def changed(self, other: Outcome) -> list[str]:
        """Names of the values that differ in any bit; nan equals nan."""
        a, b = ({**x.sums, "grad_norm": x.grad_norm} for x in (self, other))
        return [name for name in a if a[name].hex() != b[name].hex()]


def repeats(experiment: Experiment) -> bool:
    """True if a step that is done again gives the same bits, unless the hardware errs."""
    on_gpu = experiment.rules.platform == "gpu"
    return not on_gpu or bool(DETERMINISTIC.search(os.environ.get("XLA_FLAGS", "")))


def verdict(
    first: Outcome, replay: Outcome, float32: Outcome | None, *, repeats: bool = True
) -> str:
    """hardware, numerics, data or unclear: what made `first` bad.

    replay: the same step, done again; float32: the same computed in float32, None where it was
    float32 to begin with; repeats: equal steps give equal bits, so that others convict hardware.
    """
    if not replay.bad or (repeats and first.changed(replay)):
        return "hardware" if repeats else "unclear"
    return "data" if float32 is None or float32.bad else "numerics"


def describe(step: StepResult) -> str:
    """What is bad about a step, in a line."""
    norm = float(step.facts["grad_norm"])
    what = "its gradient is a spike"
    if not (math.isfinite(norm) and math.isfinite(step.sums["objective"])):
        what = "not finite"
    elif not step.facts["finite_params"]:
        what = "its update is not finite (see config.optimizer)"
    return f"step {step.step}: {what}: loss {_mean(step.sums):.4g}, gradient norm {norm:.4g}"


def diagnose(
    experiment: Experiment, state: TrainState, batch: Batch, first: StepResult, again: StepResult
) -> Evidence:
    """The evidence about a bad step, from all processes of the run.

    state: what `again`, the same step on the same batch, left. Parameters and optimizer state are
    those from before the step if it was bad again, since it was not applied.
    """
    step, everywhere = first.step, experiment.rules.sharding()
    outcomes = [Outcome(x.sums, float(x.facts["grad_norm"]), x.bad) for x in (first, again)]
    in_float32 = None
    if again.bad and experiment.config.model.dtype != "float32":
        in_float32 = _in_float32(experiment, state, batch, step)
    found = verdict(outcomes[0], outcomes[1], in_float32, repeats=repeats(experiment))

    look = jax.jit(_look, static_argnums=(0, 1), out_shardings=everywhere)
    looked = jax.device_get(look(experiment, step, state, batch))
    gradients, parameters, optimizer, tokens = looked
    losses, scored, _ = tokens
    rows = losses.sum(1) / np.maximum(scored.sum(1), 1)
    # those that are not finite first, then the highest losses
    worst = np.argsort(-np.nan_to_num(rows, nan=np.inf), kind="stable")[:NUM_ROWS]
    return {
        "step": step,
        "verdict": found,
        "reason": REASONS[found],
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "first": _describe_outcome(outcomes[0]),
        "again": _describe_outcome(outcomes[1]),
        "changed_bits": outcomes[0].changed(outcomes[1]),
        "float32": None if in_float32 is None else _describe_outcome(in_float32),
        "usual_grad_norm": math.exp(float(chain.norm_state(state.opt_state).log_mean)),
        "not_finite": {
            "gradients": _not_finite(gradients),
            "parameters": _not_finite(parameters),
            "optimizer": {name: int(count) for name, count in _named(optimizer) if count},
        },
        "worst_rows": _explain(experiment, step, worst, rows, tokens),
        "row_losses": rows.tolist(),
        "gradients": _per_layer(gradients),
        "parameters": _per_layer(parameters),
    }


def _in_float32(experiment: Experiment, state: TrainState, batch: Batch, step: int) -> Outcome:
    """What the step comes to in float32."""
    k = experiment.config.train.num_microbatches
    parts = experiment.rules.size("batch") * experiment.model.num_microbatches
    if experiment.batch_size % (2 * k * parts) == 0:
        k *= 2  # as activations take twice the memory
    other = experiment.variant({"model.dtype": "float32", "train.num_microbatches": k})

    def run(state: TrainState, batch: Batch) -> Any:
        # the update is a part of it, too: what isn't returned is not kept
        _, sums, facts = other._train_step(dataclasses.replace(state, step=jnp.int32(step)), batch)
        return sums, facts["grad_norm"], facts["bad"]

    everywhere = experiment.rules.sharding()
    sums, norm, bad = jax.device_get(jax.jit(run, out_shardings=everywhere)(state, batch))
    return Outcome({name: float(x) for name, x in sums.items()}, float(norm), bool(bad))


# ---- on the devices ----


def _look(experiment: Experiment, step: int, state: TrainState, batch: Batch) -> Any:
    """(sizes of the gradients, sizes of the parameters, numbers that are not finite in each leaf of
    the optimizer's state, what `_tokens` says of every token).
    """
    gradients, sums = experiment.gradients(state.params, batch, step)
    scale = 1.0 / jnp.maximum(sums["tokens"], 1.0)
    stacked = jax.tree.map(
        lambda x: isinstance(x, nn.Partitioned) and x.names[:1] == ("layers",),
        experiment.boxed_params,
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )
    optimizer = jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), state.opt_state)
    return (
        jax.tree.map(
            lambda g, s: _size(g * scale, s), gradients, experiment.initializer.trained(stacked)
        ),
        jax.tree.map(_size, state.params, stacked),
        optimizer,
        _tokens(experiment, state.params, batch),
    )


def _size(x: Array, stacked: bool) -> dict[str, jax.Array]:
    """Norm and largest magnitude of the finite numbers of x, and how many are not finite: of each
    layer, [L], if they are stacked.
    """
    axes = tuple(range(1 if stacked else 0, x.ndim))
    finite = jnp.isfinite(x)
    size = jnp.abs(jnp.where(finite, x, 0.0)).astype(jnp.float32)
    top = jnp.max(size, axis=axes, keepdims=True)
    squares = jnp.square(size / jnp.maximum(top, 1e-38))  # those of huge numbers would overflow
    norm = jnp.squeeze(top, axes) * jnp.sqrt(jnp.sum(squares, axis=axes))
    return {"norm": norm, "max": jnp.squeeze(top, axes), "not_finite": jnp.sum(~finite, axis=axes)}


def _tokens(experiment: Experiment, params: Params, batch: Batch) -> tuple[Array, Array, Array]:
    """(weighted loss without dropout, is it scored, segment) of every token, [B, T]."""
    model, chunk_size = experiment.model, experiment.config.loss.chunk_size
    variables = {"params": params}
    hidden = model.apply(variables, batch.inputs, encoder=batch.encoder, train=False).hidden
    size, length = batch.targets.shape
    n = chunking.num_chunks(chunk_size, size // experiment.rules.size("act_batch"), length)

    def piece(x: tuple[Array, Array]) -> jax.Array:
        hidden, targets = x
        return token_nll(model.apply(variables, hidden, method="logits"), targets)[0]

    losses = jax.lax.map(piece, chunking.split((hidden, batch.targets), n))
    losses = chunking.join(losses, length)
    scored = batch.weights != 0
    return jnp.where(scored, losses * batch.weights, 0.0), scored, batch.inputs.segments


# ---- on the host ----


def _mean(sums: dict[str, float]) -> float:
    return sums["loss"] / max(sums["tokens"], 1.0)


def _describe_outcome(outcome: Outcome) -> Evidence:
    mean = {"bad": outcome.bad, "loss": _mean(outcome.sums), "grad_norm": outcome.grad_norm}
    return {**mean, "sums": outcome.sums}


def _named(tree: Any) -> list[tuple[str, Any]]:
    def is_size(x: Any) -> bool:
        return isinstance(x, dict) and "not_finite" in x

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_size)
    return [(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in leaves]


def _not_finite(sizes: Any) -> Evidence:
    counts = {name: int(np.sum(size["not_finite"])) for name, size in _named(sizes)}
    return {name: count for name, count in counts.items() if count}


def _per_layer(sizes: Any) -> Evidence:
    return {
        name: {key: np.asarray(value).tolist() for key, value in size.items()}
        for name, size in _named(sizes)
    }


def _explain(
    experiment: Experiment, step: int, worst: np.ndarray, rows: np.ndarray, tokens: Any
) -> list[Evidence]:
    """Where the worst rows come from, with the loss of each of their documents."""
    explained = experiment.train_data.explain_batch(step, experiment.tokenizer, rows=worst)
    found = []
    for row, origin in zip(worst, explained, strict=True):
        (losses, scored, segments), documents = (x[row] for x in tokens), []
        for n, (span, text) in enumerate(zip(origin.documents, origin.text, strict=True)):
            own = segments == n + 1
            mean = float(losses[own].sum() / max(scored[own].sum(), 1))
            documents.append({"loss": mean, **span._asdict(), "begins": text})
        place = {"source": origin.source, "epoch": origin.epoch, "source_row": origin.row}
        found.append({"row": int(row), "loss": float(rows[row]), **place, "documents": documents})
    return found


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
    """The path of the file with the evidence, WORKDIR/evidence/step-N.json; `active` writes it."""
    path = epath.Path(workdir) / FOLDER / f"step-{evidence['step']}.json"
    if active:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.parent / f"{path.name}.new"
        new.write_text(_to_text(_plain(evidence)) + "\n")
        new.replace(path)
    return str(path)


def judged_steps(workdir: str) -> set[int]:
    """Numbers of the steps that a run has evidence about."""
    folder = epath.Path(workdir) / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    found = (re.fullmatch(r"step-(\d+)\.json", name) for name in names)
    return {int(match[1]) for match in found if match}


def _plain(value: Any) -> Any:
    """`value` as JSON has it: nine digits, those of float32, and "nan" and "inf" as strings."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value


def _to_text(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry, and what is short or a list of numbers in one."""
    inner = indent + "  "
    if isinstance(value, dict) and len(json.dumps(value, ensure_ascii=False)) > 160:
        lines = [f"{inner}{json.dumps(k)}: {_to_text(x, inner)}" for k, x in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(inner + _to_text(x, inner) for x in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
