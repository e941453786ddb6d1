"""Token cross-entropy as sums, in chunks, so that [B, T, V] logits never exist.

The gradient with respect to a chunk's logits needs that chunk only, so it is computed in the
forward pass: three products with the vocabulary matrix instead of four with rematerialization, and
one chunk of logits in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, custom_vjp_primal_tree_values
from jax.sharding import PartitionSpec

from lm.config.schema import LossConfig
from lm.kernels.chunking import join, num_chunks, split
from lm.parallel.sharding import Rules
from lm.types import Array, Batch, Model, Params, Sums, VocabularyPart

# (hidden [B, t, D], *parameters) -> logits float32 [B, t, V]
Project: TypeAlias = Callable[..., Array]
Gradients: TypeAlias = dict[int, Array]  # by the index of the parameter
Evaluated: TypeAlias = tuple[Sums, Gradients, Array | None]  # and the gradient of hidden
T = TypeVar("T")


class Predictions(NamedTuple):
    """Hidden states and the tokens that they are to predict."""

    hidden: Array  # [B, T, D]
    targets: Array  # int32 [B, T]
    weights: Array  # float32 [B, T]
    tasks: Array | None = None  # bool [B, T, K]: the tasks of each token
    teacher: Array | None = None  # [B, T, D] of a teacher (lm.compression.distillation)


def token_nll(logits: Array, targets: Array) -> tuple[Array, Array]:
    """(negative log-likelihood, log Z), float32 [...], of targets: int32 [...] by logits: float32
    [..., V].
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def over_vocabulary(logits: Array, target: Array, *, in_one_pass: bool) -> tuple[Array, Array]:
    """(log Z, the number of logits that are at least the target's), float32 [...], of logits:
    float32 [..., V] and that of the target [..., 1].

    in_one_pass: for GPUs, where XLA reads the logits once for each reduction; on TPU the largest
    is found by the product itself. Two sums are joined as in arXiv:1805.02867, equation 4.
    """
    above = (logits >= target).astype(jnp.float32)
    if not in_one_pass:
        return jax.nn.logsumexp(logits, axis=-1), jnp.sum(above, axis=-1)

    def join(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        top = jnp.maximum(a[0], b[0])
        total = a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)
        return top, total, a[2] + b[2]

    start = np.finfo(np.float32).min, np.float32(0), np.float32(0)
    operands = logits, jnp.ones_like(logits), above
    top, total, count = jax.lax.reduce(operands, start, join, (logits.ndim - 1,))
    return top + jnp.log(total), count


def _statistics(
    logits: Array, x: Predictions, config: LossConfig, rules: Rules | None
) -> tuple[Sums, Array]:
    """Sums over the tokens of logits: float32 [..., V], and log Z: float32 [...].

    With tasks, `task_loss` [K] is the loss of the tokens of each.
    """
    target = jnp.take_along_axis(logits, x.targets[..., None], axis=-1)
    # a sum of such pairs is none that the partitioner could spread over shards of the vocabulary
    in_one_pass = rules is not None and rules.platform == "gpu" and rules.size("vocab") == 1
    log_z, above = over_vocabulary(logits, target, in_one_pass=in_one_pass)
    loss = nll = log_z - target[..., 0]
    if config.label_smoothing:
        uniform = log_z - jnp.mean(logits, axis=-1)
        loss = (1 - config.label_smoothing) * nll + config.label_smoothing * uniform
    if config.z_loss:
        loss = loss + config.z_loss * jnp.square(log_z)
    # only the target at the top: one that ties with another token has not been told from it
    correct = (above == 1).astype(jnp.float32)
    sums = {"objective": loss, "loss": nll, "accuracy": correct}
    sums = {name: jnp.sum(value * x.weights) for name, value in sums.items()}
    if x.tasks is not None:
        of_tasks = jnp.where(x.tasks, (nll * x.weights)[..., None], 0.0)
        sums["task_loss"] = jnp.sum(of_tasks, axis=tuple(range(nll.ndim)))
    return sums, log_z


def _logit_gradient(logits: Array, x: Predictions, log_z: Array, config: LossConfig) -> Array:
    """d objective / d logits, [..., V]."""
    probabilities = jnp.exp(logits - log_z[..., None])
    if config.z_loss:
        probabilities = probabilities * (1 + 2 * config.z_loss * log_z)[..., None]
    hit = jnp.arange(logits.shape[-1]) == x.targets[..., None]
    smooth = config.label_smoothing
    wanted = jnp.where(hit, 1 - smooth, 0.0) + smooth / logits.shape[-1]
    return (probabilities - wanted) * x.weights[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunked_loss(
    project: Project,
    config: LossConfig,
    rules: Rules | None,
    parameters: list[Array],
    predictions: Predictions,
) -> tuple[Array, Sums]:
    """(objective, sums) of predictions [B, T], in chunks of `config.chunk_size` tokens on each
    device; `task_loss` [K] with tasks.
    """

    def local(parameters: list[Array], xs: Predictions) -> Evaluated:
        def chunk(sums: Sums | None, x: Predictions) -> tuple[Sums, None]:
            return _add(
                sums, _statistics(project(x.hidden, *parameters), x, config, rules)[0]
            ), None

        count = num_chunks(config.chunk_size, *xs.targets.shape)
        return over_chunks(chunk, count, xs)[0], {}, None

    sums, _, _ = on_each_device(rules, local, parameters, predictions)
    return sums["objective"], sums


def _forward(
    project: Project,
    config: LossConfig,
    rules: Rules | None,
    parameters: list[CustomVJPPrimal],
    predictions: Predictions,
) -> tuple[tuple[Array, Sums], tuple[list[Array | None], Array]]:
    # the gradient of a frozen vocabulary matrix would be carried from chunk to chunk for nothing
    trained = [i for i, p in enumerate(parameters) if p.perturbed]
    values, predictions = custom_vjp_primal_tree_values((parameters, predictions))

    def local(parameters: list[Array], xs: Predictions) -> Evaluated:
        def chunk(
            carry: tuple[Sums, Gradients] | None, x: Predictions
        ) -> tuple[tuple[Sums, Gradients], Array]:
            def logits_of(h: Array, chosen: Gradients) -> Array:
                return project(h, *{**dict(enumerate(parameters)), **chosen}.values())

            logits, pullback = jax.vjp(logits_of, x.hidden, {i: parameters[i] for i in trained})
            new, log_z = _statistics(logits, x, config, rules)
            d_hidden, found = pullback(_logit_gradient(logits, x, log_z, config))
            found = {i: g.astype(jnp.float32) for i, g in found.items()}
            return _add(carry, (new, found)), d_hidden

        count = num_chunks(config.chunk_size, *xs.targets.shape)
        (sums, found), d_hidden = over_chunks(chunk, count, xs)
        return sums, found, d_hidden

    sums, found, d_hidden = on_each_device(rules, local, values, predictions, trained)
    d_parameters = [found[i].astype(p.dtype) if i in found else None for i, p in enumerate(values)]
    # the TPU compiler would put their reduction off, and hold whole ones until the layers are done
    return (sums["objective"], sums), jax.lax.optimization_barrier((d_parameters, d_hidden))


def _backward(
    project: Project,
    config: LossConfig,
    rules: Rules | None,
    residuals: tuple[list[Array | None], Array],
    cotangents: tuple[Array, Sums],
) -> tuple[list[Array | None], tuple[Array, None, None, None]]:
    scale = cotangents[0]  # sums are for reading: their cotangents are zero
    d_parameters, d_hidden = jax.tree.map(lambda g: (g * scale).astype(g.dtype), residuals)
    return d_parameters, Predictions(d_hidden, None, None)  # pyright: ignore


chunked_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def on_each_device(
    rules: Rules | None,
    local: Callable[[list[Array], Predictions], Evaluated],
    parameters: list[Array],
    xs: Predictions,
    trained: Sequence[int] = (),
) -> Evaluated:
    """`local(parameters, xs)` of every device's own rows and part of the length; trained: indices
    of the parameters that it returns gradients of.

    Sums and gradients are added up over devices once, at the end, and each device keeps its part of
    the gradients' embedding dimension. Left to the compiler, the gradient of the vocabulary matrix
    would be reduced in every chunk, and a chunk of a sharded length would lie on some of the
    devices. Axes that shard neither stay with the compiler.
    """
    # matrices are used in the compute type: collected in it, they are half as many bytes
    parameters = [p.astype(xs.hidden.dtype) if p.ndim > 1 else p for p in parameters]
    axes = () if rules is None else rules.sharded_axes("act_batch", "length")
    if rules is None or not axes:
        return local(parameters, xs)
    rows = rules.spec("act_batch", "length")
    shards, width = math.prod(rules.mesh.shape[axis] for axis in axes), xs.hidden.shape[-1]
    # with axes left to the compiler, jaxlib 0.10.2 ends the process at psum_scatter
    scatters = shards == rules.mesh.size and width % shards == 0
    dims = [p.shape.index(width) if scatters and width in p.shape else None for p in parameters]

    def add_up(parameters: list[Array], xs: Predictions) -> Evaluated:
        sums, found, d_hidden = local(parameters, xs)
        parts = {
            i: jax.lax.psum(g, axes)
            if (dim := dims[i]) is None
            else jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
            for i, g in found.items()
        }
        return jax.lax.psum(sums, axes), parts, d_hidden

    parts = {
        i: PartitionSpec() if (dim := dims[i]) is None else PartitionSpec(*[None] * dim, axes)
        for i in trained
    }
    mapped = jax.shard_map(
        add_up,
        mesh=rules.mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=(PartitionSpec(), parts, rows),
        axis_names=set(axes),
        check_vma=False,
    )
    return mapped(parameters, xs)


def _add(a: T | None, b: T) -> T:
    return b if a is None else jax.tree.map(jnp.add, a, b)


def over_chunks(
    chunk: Callable[[Any, Predictions], tuple[T, Array | None]], count: int, xs: Predictions
) -> tuple[T, Array | None]:
    """`chunk` folded over `count` chunks of the length of xs; its outputs [B, t, ...] joined to
    [B, T, ...]. Padding of the last chunk has no weight, and so neither loss nor gradient.

    The tokens of a chunk are one row: logits [B, t, V] are another layout than the product's on
    TPU, and would be copied.
    """

    def of_row(carry: Any, x: Predictions) -> tuple[T, Array | None]:
        row = jax.tree.map(lambda a: a.reshape(1, -1, *a.shape[2:]), x)
        new, output = chunk(carry, row)
        return new, None if output is None else output.reshape(x.hidden.shape)

    if count == 1:
        return of_row(None, xs)
    chunks = split(xs, count)
    first = jax.tree.map(lambda x: x[0], chunks)
    shapes = jax.eval_shape(lambda x: of_row(None, x)[0], first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carry, outputs = jax.lax.scan(of_row, zeros, chunks)
    return carry, None if outputs is None else join(outputs, xs.targets.shape[1])


def projection(model: Model, params: Params) -> tuple[Project, list[Array]]:
    """(logits as a function of hidden states and parameters, the parameters of the head). Only
    these have a gradient that is carried from chunk to chunk.
    """
    leaves, structure = jax.tree.flatten({name: params[name] for name in model.head_params})
    others = dict.fromkeys(params)  # declared by the module, and not read

    def project(hidden: Array, *leaves: Array) -> Array:
        tree = {**others, **structure.unflatten(leaves)}
        return model.apply({"params": tree}, hidden, method="logits")

    return project, leaves


def part_of_head(model: Model, params: Params, ids: tuple[int, int]) -> tuple[Model, Params]:
    """(a model, parameters) whose logits are those of the ids `ids`, first to last, alone; its
    parameters are those of the head.
    """
    first, stop = ids
    config = dataclasses.replace(model.config, vocab_size=stop - first)
    axis = 0 if model.head_params == ("embedding",) else -1  # [V, D], and [D, V]

    def cut(x: Array) -> jax.Array:
        if x.shape[axis] != model.config.vocab_size:  # of an adapter
            return x
        return jax.lax.slice_in_dim(x, first, stop, axis=axis % x.ndim)

    head = jax.tree.map(cut, {name: params[name] for name in model.head_params})
    return cast(Any, model).clone(config=config), head


def _loss_of_parts(
    model: Model,
    params: Params,
    predictions: Predictions,
    config: LossConfig,
    parts: Sequence[VocabularyPart],
) -> tuple[Array, Sums]:
    """As `chunked_loss`, each part of the columns by its ids; `tokens/NAME` and `loss/NAME` of each
    part, too.
    """
    total: tuple[Array, Sums] | None = None
    losses: Sums = {}
    for name, columns, ids in parts:
        head, own = part_of_head(model, params, ids)
        project, parameters = projection(head, own)
        hidden, targets, weights = (x[:, slice(*columns)] for x in predictions[:3])
        targets = jnp.maximum(targets - ids[0], 0)  # padding
        part = Predictions(hidden, targets, weights)
        found: Any = chunked_loss(project, config, model.rules, parameters, part)
        losses |= {f"loss/{name}": found[1]["loss"], f"tokens/{name}": jnp.sum(weights)}
        total = _add(total, found)
    assert total is not None, "called with parts"
    return total[0], {**total[1], **losses}


def lm_loss(
    model: Model,
    params: Params,
    batch: Batch,
    rng: Array,
    *,
    train: bool,
    config: LossConfig,
    tasks: tuple[str, ...] = (),
    parts: Sequence[VocabularyPart] = (),
) -> tuple[Array, Sums]:
    """(SUM to differentiate, additive sums) of one batch.

    The sums hold `tokens`, the total weight, and under `loss`, `accuracy` and the names of
    auxiliary losses and of the model's statistics what to divide by it. With `tasks`, the names of
    the numbers in `batch.tasks`, `tokens/NAME` and `loss/NAME` are those of each of them; with
    `parts`, those of each part, whose logits are computed for its own ids alone.
    """
    variables = {"params": params}
    rngs = {"dropout": rng} if train else {}
    others: dict[str, Any] = {"encoder": batch.encoder, "train": train, "rngs": rngs}
    if batch.images is not None:
        others["images"] = batch.images
    output = model.apply(variables, batch.inputs, **others)
    members = None
    if tasks:
        assert batch.tasks is not None, "names of tasks for a batch without their numbers"
        members = batch.tasks
        if members.ndim == 1:
            members = members[:, None, None] == jnp.arange(len(tasks))
            members = jnp.broadcast_to(members, (*batch.targets.shape, len(tasks)))  # [B, T, K]
    predictions = Predictions(output.hidden, batch.targets, batch.weights, members)
    total: tuple[Array, Sums]
    if parts:
        total = _loss_of_parts(model, params, predictions, config, parts)
    else:
        project, parameters = projection(model, params)
        total = chunked_loss(project, config, model.rules, parameters, predictions)  # pyright: ignore
    objective, sums = total[0], {**total[1], "tokens": jnp.sum(batch.weights)}
    if members is not None:
        losses, weighted = sums.pop("task_loss"), batch.weights[..., None] * members
        for i, name in enumerate(tasks):
            sums |= {f"loss/{name}": losses[i], f"tokens/{name}": jnp.sum(weighted[..., i])}
    for value in output.aux.values():  # the one division by tokens averages them too
        objective = objective + value * sums["tokens"]
    for name, value in {**output.aux, **output.stats}.items():
        sums[name] = value * sums["tokens"]
    return objective, {**sums, "objective": objective}


def objective_loss(
    own: Callable[..., tuple[Array, Sums]],
    model: Model,
    params: Params,
    batch: Batch,
    rng: Array,
    *,
    train: bool,
    config: LossConfig,
    step: Array | None,
    **others: object,
) -> tuple[Array, Sums]:
    """As `lm_loss`, by the loss `own` that an objective brings (lm.objectives.Objective.loss).

    Raises:
        ValueError: its sums lack what a run divides by or reports.
    """
    objective, sums = own(
        model, params, batch, rng, train=train, config=config, step=step, **others
    )
    if missing := {"tokens", "loss"} - sums.keys():
        raise ValueError(
            f"the loss of config.objective returns sums without {', '.join(sorted(missing))}: "
            "tokens is what sums are divided by, loss what is reported"
        )
    return objective, {**sums, "objective": objective}
