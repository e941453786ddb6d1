"""Bad step report: a verdict on a bad step, and the evidence for it in one readable file.

A run is a function of (config, step): a step that is replayed from a checkpoint gives the same
bits. If it doesn't, the hardware erred. If it does, but is not bad in float32, the numerics did.
Else it was the data, or a learning rate too high for them. GPUs repeat bits only with
xla_gpu_deterministic_ops, in XLA_FLAGS or in config.train.compiler_flags: without it the verdict is
only that the step is bad again, or that it is not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels import chunking
from lm.layers.cross_entropy import token_nll
from lm.optim import optimizer_state
from lm.optim.param_tree import flatten, named_leaves
from lm.storage.epaths import StoragePath
from lm.storage.files import write_atomically
from lm.telemetry.deferred import StepResult, fetch
from lm.telemetry.scalars import Scalars
from lm.training.experiment import Experiment
from lm.types import Array, Batch, Params, TrainState

FOLDER = "evidence"
NUM_ROWS = 4  # with the highest loss, whose documents are listed
REASONS = {
    "hardware": "done again, the same step gives something else: a device has computed or kept "
    "something wrong",
    "numerics": "it repeats, but not in float32: the compute dtype is too coarse for it",
    "data": "it repeats with the same batch: look at its worst rows, and at the learning rate",
    "repeats": "done again it is bad again, which on a GPU that doesn't repeat bits leaves the "
    "cause open: look at its worst rows, at the learning rate, and at the step in float32; with "
    "config.train.compiler_flags=('auto','xla_gpu_deterministic_ops=true') the verdict would say",
    "unclear": "done again it is not bad, but this GPU doesn't repeat bits: with "
    "config.train.compiler_flags=('auto','xla_gpu_deterministic_ops=true') the verdict would be "
    "certain",
}
# after either flag XLA takes no kernel whose sums depend on the order of threads
DETERMINISTIC = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")

Evidence = dict[str, Any]  # JSON
Size = dict[str, jax.Array]  # norm, max and not_finite, see `_size`


def is_repeatable(experiment: Experiment) -> bool:
    """True if a replayed step gives the same bits, unless the hardware errs."""
    if experiment.rules.platform != "gpu":
        return True
    given = re.findall(r"--(xla_\w+)(?:=(\S*))?(?!\S)", os.environ.get("XLA_FLAGS", ""))
    chosen = dict(given) | {name: str(v) for name, v in experiment.compiler_options.items()}
    return any(chosen.get(name, "false").lower() in ("", "true", "1") for name in DETERMINISTIC)


def verdict(
    first: StepResult, replay: StepResult, float32: StepResult | None, *, repeats: bool = True
) -> str:
    """The cause that made `first` bad: hardware, numerics or data.

    replay: the same step, replayed. float32: the same in float32, None where it was computed in
    float32 already. repeats: equal steps give equal bits, so that a difference proves an error of
    the hardware; without that the verdict is `repeats` or `unclear`.
    """
    if not repeats:
        return "repeats" if replay.bad else "unclear"
    if not replay.bad or _changed(first, replay):
        return "hardware"
    return "data" if float32 is None or float32.bad else "numerics"


def _changed(first: StepResult, replay: StepResult) -> list[str]:
    """Names of the values that differ in any bit; nan equals nan."""
    a, b = ({**x.sums, "grad_norm": x.grad_norm} for x in (first, replay))
    return [name for name in a if a[name].hex() != b[name].hex()]


def describe(result: StepResult) -> str:
    """One line about a bad step."""
    reason = "its gradient is a spike"
    if not (math.isfinite(result.grad_norm) and math.isfinite(result.sums["objective"])):
        reason = "not finite"
    elif not result.info["finite_params"]:
        reason = "its update is not finite (see config.optimizer)"
    values = f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
    return f"step {result.step}: {reason}: {values}"


def diagnose(
    experiment: Experiment, state: TrainState, batch: Batch, first: StepResult, again: StepResult
) -> Evidence:
    """The evidence about a bad step; all processes of the run call this together.

    state: after `again`, the replay of the step on the same batch. If that was bad again, its
    parameters and optimizer state are those from before the step, which was not applied.
    """
    step, in_float32 = first.step, None
    if again.bad and experiment.config.model.dtype != "float32":
        in_float32 = _in_float32(experiment, state, batch, step)
    cause = verdict(first, again, in_float32, repeats=is_repeatable(experiment))
    outcomes = {
        name: x and {"bad": x.bad, "loss": x.loss, "grad_norm": x.grad_norm, "sums": x.sums}
        for name, x in (("first", first), ("again", again), ("float32", in_float32))
    }
    measure = jax.jit(_measure, static_argnums=(0, 1), out_shardings=experiment.rules.sharding())
    sizes, tokens = jax.device_get(measure(experiment, step, state, batch))
    row_losses = tokens["losses"].sum(1) / np.maximum(tokens["scored"].sum(1), 1)
    # those that are not finite first, then the highest losses
    worst = np.argsort(-np.nan_to_num(row_losses, nan=np.inf), kind="stable")[:NUM_ROWS]
    counts = {
        where: {name: int(np.sum(size["not_finite"])) for name, size in named.items()}
        for where, named in sizes.items()
    }
    return {
        "step": step,
        "verdict": cause,
        "reason": REASONS[cause],
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        **outcomes,
        "changed_bits": _changed(first, again),
        "usual_grad_norm": math.exp(float(optimizer_state.norm_state(state.opt_state).log_mean)),
        "not_finite": {w: {n: k for n, k in of.items() if k} for w, of in counts.items()},
        "worst_rows": _describe_rows(experiment, step, worst, row_losses, tokens),
        "row_losses": row_losses.tolist(),
        "gradients": jax.tree.map(np.ndarray.tolist, sizes["gradients"]),
        "parameters": jax.tree.map(np.ndarray.tolist, sizes["parameters"]),
    }


def _in_float32(experiment: Experiment, state: TrainState, batch: Batch, step: int) -> StepResult:
    k = experiment.config.train.num_microbatches
    parts = experiment.rules.size("batch") * experiment.model.num_pipeline_microbatches
    if experiment.batch_size % (2 * k * parts) == 0:
        k *= 2  # as activations take twice the memory
    float32 = experiment.variant({"model.dtype": "float32", "train.num_microbatches": k})

    def run(state: TrainState, batch: Batch) -> tuple[Scalars, Scalars]:
        state = dataclasses.replace(state, step=jnp.int32(step))
        _, sums, info = float32._train_step(state, batch)  # the update itself is not kept
        return sums, info

    compiled = jax.jit(run, out_shardings=experiment.rules.sharding())
    return fetch(step, *compiled(state, batch))


# ---- on the devices ----


def _measure(
    experiment: Experiment, step: int, state: TrainState, batch: Batch
) -> tuple[dict[str, dict[str, Size]], dict[str, Array]]:
    """({gradients, parameters, optimizer: sizes by name}, those of `_token_losses`)."""
    gradients, sums = experiment.gradients(state.params, batch, step, state.teacher)
    scale = 1.0 / jnp.maximum(sums["tokens"], 1.0)
    boxes = flatten(experiment.boxed_params)

    def sizes(tree: Params) -> dict[str, Size]:
        return {n: _size(x, boxes[n].names[:1] == ("layers",)) for n, x in flatten(tree).items()}

    opt_state = named_leaves(state.opt_state).items()
    found = {
        "gradients": sizes(jax.tree.map(lambda g: g * scale, gradients)),
        "parameters": sizes(state.params),
        "optimizer": {name: {"not_finite": jnp.sum(~jnp.isfinite(x))} for name, x in opt_state},
    }
    return found, _token_losses(experiment, state.params, batch)


def _size(x: Array, stacked: bool) -> Size:
    """Norm and largest magnitude of the finite numbers of an array, and the count of others.

    Each has shape [], or [L] for layers stacked in one array.
    """
    axes = tuple(range(1 if stacked else 0, x.ndim))
    finite = jnp.isfinite(x)
    size = jnp.abs(jnp.where(finite, x, 0.0)).astype(jnp.float32)
    top = jnp.max(size, axis=axes, keepdims=True)
    squares = jnp.square(size / jnp.maximum(top, 1e-38))  # those of huge numbers would overflow
    largest = jnp.squeeze(top, axes)
    norm = largest * jnp.sqrt(jnp.sum(squares, axis=axes))
    return {"norm": norm, "max": largest, "not_finite": jnp.sum(~finite, axis=axes)}


def _token_losses(experiment: Experiment, params: Params, batch: Batch) -> dict[str, Array]:
    """Arrays [B, T]: weighted losses without dropout, `scored` (bool) and `segments`."""
    model, chunk_size = experiment.model, experiment.config.loss.chunk_size
    variables = {"params": params}
    hidden = model.apply(variables, batch.inputs, encoder=batch.encoder, train=False).hidden
    size, length = batch.targets.shape
    n = chunking.num_chunks(chunk_size, size // experiment.rules.size("act_batch"), length)

    def chunk_losses(x: tuple[Array, Array]) -> jax.Array:
        hidden, targets = x
        return token_nll(model.apply(variables, hidden, method="logits"), targets)[0]

    losses = jax.lax.map(chunk_losses, chunking.split((hidden, batch.targets), n))
    scored = batch.weights != 0
    losses = jnp.where(scored, chunking.join(losses, length) * batch.weights, 0.0)
    return {"losses": losses, "scored": scored, "segments": batch.inputs.segments}


# ---- on the host ----


def _describe_rows(
    experiment: Experiment,
    step: int,
    worst: np.ndarray,
    row_losses: np.ndarray,
    tokens: dict[str, np.ndarray],
) -> list[Evidence]:
    """Source and documents of the worst rows, with the loss of each document."""
    origins = experiment.train_data.explain_batch(step, experiment.tokenizer, rows=worst)
    rows = []
    for row, origin in zip(worst.tolist(), origins, strict=True):
        documents = []
        for n, (span, text) in enumerate(zip(origin.documents, origin.text, strict=True), start=1):
            own = tokens["segments"][row] == n
            losses, scored = tokens["losses"][row][own], tokens["scored"][row][own]
            loss = float(losses.sum() / max(scored.sum(), 1))
            documents.append({"loss": loss, **span._asdict(), "begins": text})
        source = {"source": origin.source, "epoch": origin.epoch, "source_row": origin.row}
        loss = float(row_losses[row])
        rows.append({"row": row, "loss": loss, **source, "documents": documents})
    return rows


def batch_records(experiment: Experiment, step: int, *, count: int) -> dict[int, list[Evidence]]:
    """Source and documents of every row of the batches of `count` steps, as far as the run goes."""
    steps = range(step, min(step + count, experiment.num_steps))
    return {step: _records(experiment, step) for step in steps}


def _records(experiment: Experiment, step: int) -> list[Evidence]:
    origins = experiment.train_data.explain_batch(step, experiment.tokenizer, num_tokens=0)
    return [
        {
            "source": origin.source,
            "epoch": origin.epoch,
            "source_row": origin.row,
            "documents": [span._asdict() for span in origin.documents],
        }
        for origin in origins
    ]


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
    path = StoragePath(workdir) / FOLDER / f"step-{evidence['step']}.json"
    if active:
        write_atomically(path, _to_text(evidence) + "\n")
    return str(path)


def diagnosed_steps(workdir: str) -> list[int]:
    """Numbers of the steps that a run has evidence about."""
    folder = StoragePath(workdir) / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    matches = (re.fullmatch(r"step-(\d+)\.json", name) for name in names)
    return [int(match[1]) for match in matches if match]


def _to_text(value: object, indent: str = "") -> str:
    """JSON with a line for each entry; short ones and lists of numbers stay on one.

    Floats have nine digits, those of float32; "nan" and "inf" are strings.
    """
    inner = indent + "  "
    if isinstance(value, float):
        return f"{value:.9g}" if math.isfinite(value) else f'"{value}"'
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {_to_text(x, inner)}" for key, x in value.items()]
        (start, end), is_long = "{}", sum(map(len, entries)) > 160
    elif isinstance(value, list):
        entries = [_to_text(x, inner) for x in value]
        (start, end), is_long = "[]", bool(value) and isinstance(value[0], dict)
    else:
        return json.dumps(value, ensure_ascii=False)
    if is_long:
        return f"{start}\n{inner}" + f",\n{inner}".join(entries) + f"\n{indent}{end}"
    return start + ", ".join(entries) + end
