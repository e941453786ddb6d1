"""Token cross-entropy as sums, in chunks, so that [B, T, V] logits never exist.

The gradient with respect to a chunk's logits needs nothing but that chunk, so it is formed in the
forward pass while they are
there: three products with the vocabulary matrix instead of four with rematerialization, and one
chunk of logits in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.config.schema import LossConfig
from lm.layers.chunking import join, num_chunks, split
from lm.parallel.sharding import Rules
from lm.types import Array, Batch, Model, Params, Sums


def token_nll(logits: Array, targets: Array) -> tuple[Array, Array]:
    """(negative log-likelihood, log Z), float32 [...], of targets: int32 [...] by logits: float32
    [..., V].
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def _statistics(
    logits: Array, targets: Array, weights: Array, tasks: Array | None, config: LossConfig
) -> tuple[Sums, Array]:
    """Sums over the tokens of logits: float32 [..., V], and log Z: float32 [...].

    With tasks, bool [..., K], `task_loss` [K] is the loss of the tokens of each.
    """
    nll, log_z = token_nll(logits, targets)
    loss = nll
    if config.label_smoothing:
        uniform = log_z - jnp.mean(logits, axis=-1)
        loss = (1 - config.label_smoothing) * nll + config.label_smoothing * uniform
    if config.z_loss:
        loss = loss + config.z_loss * jnp.square(log_z)
    # only the target at the top: one that ties with another token has not been told from it
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    correct = jnp.sum(logits >= target, axis=-1) == 1
    sums = {"objective": loss, "loss": nll, "accuracy": correct.astype(jnp.float32)}
    sums = {name: jnp.sum(value * weights) for name, value in sums.items()}
    if tasks is not None:
        of_tasks = jnp.where(tasks, (nll * weights)[..., None], 0.0)
        sums["task_loss"] = jnp.sum(of_tasks, axis=tuple(range(nll.ndim)))
    return sums, log_z


def _logit_gradient(
    logits: Array, targets: Array, weights: Array, log_z: Array, config: LossConfig
) -> Array:
    """d objective / d logits, [..., V]."""
    probabilities = jnp.exp(logits - log_z[..., None])
    if config.z_loss:
        probabilities = probabilities * (1 + 2 * config.z_loss * log_z)[..., None]
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    smooth = config.label_smoothing
    wanted = jnp.where(hit, 1 - smooth, 0.0) + smooth / logits.shape[-1]
    return (probabilities - wanted) * weights[..., None]


Xs = tuple[Array, Array, Array, Array | None]  # hidden, targets, weights, tasks
Project = Callable[..., Array]  # (hidden [B, t, D], *parameters) -> logits float32 [B, t, V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunked_loss(
    project: Project,
    config: LossConfig,
    rules: Rules | None,
    parameters: list[Array],
    hidden: Array,
    targets: Array,
    weights: Array,
    tasks: Array | None = None,
) -> tuple[Array, Sums]:
    """(objective, sums) of hidden: [B, T, D], in pieces of the length of `config.chunk_size` tokens
    on each device. tasks: bool [B, T, K], which of K tasks a token is of; `task_loss` is theirs.
    """

    def local(parameters: list[Array], xs: Xs) -> tuple[Any, ...]:
        def chunk(sums: Sums | None, x: Xs) -> tuple[Sums, None]:
            h, t, w, of_tasks = x
            new, _ = _statistics(project(h, *parameters), t, w, of_tasks, config)
            return _add(sums, new), None

        sums, _ = _over_chunks(chunk, num_chunks(config.chunk_size, *xs[1].shape), xs)
        return sums, [], ()

    sums, _, _ = _on_each_device(rules, local, parameters, (hidden, targets, weights, tasks))
    return sums["objective"], sums


def _forward(
    project: Project,
    config: LossConfig,
    rules: Rules | None,
    parameters: list[Any],
    hidden: Any,
    targets: Any,
    weights: Any,
    tasks: Any = None,
) -> tuple[tuple[Array, Sums], tuple[list[Any], Array]]:
    # the gradient of a frozen vocabulary matrix would be carried from chunk to chunk for nothing
    trained = [p.perturbed for p in parameters]
    values = [p.value for p in parameters]

    def local(parameters: list[Array], xs: Xs) -> tuple[Any, ...]:
        def chunk(carry: Any, x: Xs) -> tuple[Any, Array]:
            h, t, w, of_tasks = x

            def logits_of(h: Array, *parameters_: Array) -> Array:
                return project(h, *_merge(trained, parameters_, parameters))

            vjp: Any = jax.vjp(logits_of, h, *_chosen(trained, parameters))
            logits, pullback = vjp
            new, log_z = _statistics(logits, t, w, of_tasks, config)
            d_hidden, *d_parameters = pullback(_logit_gradient(logits, t, w, log_z, config))
            d_parameters = [g.astype(jnp.float32) for g in d_parameters]
            return _add(carry, (new, d_parameters)), d_hidden

        total, d_hidden = _over_chunks(chunk, num_chunks(config.chunk_size, *xs[1].shape), xs)
        return (*total, (d_hidden,))

    xs = (hidden.value, targets.value, weights.value, None if tasks is None else tasks.value)
    sums, found, (d_hidden,) = _on_each_device(rules, local, values, xs, trained)
    kept = zip(found, _chosen(trained, values), strict=True)
    d_parameters = _merge(trained, [g.astype(p.dtype) for g, p in kept], [None] * len(values))
    # the TPU compiler would put their reduction off, and hold whole ones until the layers are done
    d_parameters, d_hidden = jax.lax.optimization_barrier((d_parameters, d_hidden))
    return (sums["objective"], sums), (d_parameters, d_hidden)


def _backward(
    project: Project,
    config: LossConfig,
    rules: Rules | None,
    residuals: tuple[list[Array], Array],
    cotangents: tuple[Array, Sums],
) -> tuple[Any, ...]:
    d_parameters, d_hidden = residuals
    scale = cotangents[0]  # sums are for reading: their cotangents are zero
    d_parameters = [None if g is None else (g * scale).astype(g.dtype) for g in d_parameters]
    return d_parameters, (d_hidden * scale).astype(d_hidden.dtype), None, None, None


chunked_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _chosen(flags: list[bool], values: Sequence[Any]) -> list[Any]:
    return [value for flag, value in zip(flags, values, strict=True) if flag]


def _merge(flags: list[bool], chosen: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """`chosen` in the places of the flags, and `others` in the rest."""
    left = iter(chosen)
    return [next(left) if flag else other for flag, other in zip(flags, others, strict=True)]


def _on_each_device(
    rules: Rules | None,
    local: Any,
    parameters: list[Array],
    xs: Xs,
    trained: list[bool] | None = None,
) -> tuple[Any, ...]:
    """`local(parameters, xs) -> (sums, gradients of parameters, outputs like hidden)` of every
    device's own rows and part of the length.

    Sums and gradients are added up over devices once, at the end, and each device keeps its part of
    the gradients' embedding dimension. Left to the compiler, the gradient of the vocabulary matrix
    would be reduced in every chunk, and a chunk of a sharded length would lie on some of the
    devices. Axes that shard neither stay with the compiler.
    """
    # matrices are used in the compute type: collected in it, they are half as many bytes
    hidden = xs[0]
    parameters = [p.astype(hidden.dtype) if p.ndim > 1 else p for p in parameters]
    rows = PartitionSpec() if rules is None else rules.spec("act_batch", "length")
    axes = _axes(rows)
    if rules is None or not axes:
        return local(parameters, xs)
    shards = math.prod(rules.mesh.shape[axis] for axis in axes)
    # with axes left to the compiler, jaxlib 0.10.2 ends the process at psum_scatter
    width = hidden.shape[-1] if shards == rules.mesh.size and hidden.shape[-1] % shards == 0 else 0
    owners = [] if trained is None else _chosen(trained, parameters)  # of the gradients
    kept = [p.shape.index(width) if width in p.shape else None for p in owners]

    def add_up(parameters: list[Array], xs: Xs) -> tuple[Any, ...]:
        sums, gradients, outputs = local(parameters, xs)
        parts = [
            jax.lax.psum(g, axes)
            if dim is None
            else jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
            for g, dim in zip(gradients, kept, strict=True)
        ]
        return jax.lax.psum(sums, axes), parts, outputs

    parts = [PartitionSpec() if d is None else PartitionSpec(*[None] * d, axes) for d in kept]
    mapped = jax.shard_map(
        add_up,
        mesh=rules.mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=(PartitionSpec(), parts, rows),
        axis_names=set(axes),
        check_vma=False,
    )
    return mapped(parameters, xs)


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    found: list[str] = []
    for entry in spec:
        found += [entry] if isinstance(entry, str) else entry or ()
    return tuple(found)


def _add(a: Any, b: Any) -> Any:
    return b if a is None else jax.tree.map(jnp.add, a, b)


def _over_chunks(chunk: Any, num_chunks: int, xs: Xs) -> tuple[Any, Any]:
    """`chunk` folded over pieces of dimension 1 of xs; its outputs [B, t, ...] joined to [B, T,
    ...]. Padding of the last piece has no weight, and so neither loss nor gradient.
    """
    if num_chunks == 1:
        return chunk(None, xs)
    pieces = split(xs, num_chunks)
    shapes = jax.eval_shape(lambda p: chunk(None, p)[0], jax.tree.map(lambda p: p[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carry, outputs = jax.lax.scan(chunk, zeros, pieces)
    return carry, None if outputs is None else join(outputs, xs[0].shape[1])


def _projection(model: Model, params: Params) -> tuple[Project, list[Array]]:
    """(logits as a function of hidden states and parameters, the parameters of the head), which
    alone get a gradient that is carried from chunk to chunk.
    """
    leaves, structure = jax.tree.flatten({name: params[name] for name in model.head_params})
    others = dict.fromkeys(params)  # declared by the module, and not read

    def project(hidden: Array, *leaves: Array) -> Array:
        tree = {**others, **structure.unflatten(leaves)}
        return model.apply({"params": tree}, hidden, method="logits")

    return project, leaves


def lm_loss(
    model: Model,
    params: Params,
    batch: Batch,
    rng: Array,
    *,
    train: bool,
    config: LossConfig,
    tasks: tuple[str, ...] = (),
) -> tuple[Array, Sums]:
    """(SUM to differentiate, additive sums) of one batch.

    The sums hold `tokens`, the total weight, and under `loss`, `accuracy` and the names of
    auxiliary losses and of the model's statistics what to divide by it. With `tasks`, the names of
    the numbers in `batch.tasks`, `tokens/NAME` and `loss/NAME` are those of each of them.
    """
    variables = {"params": params}
    rngs = {"dropout": rng} if train else {}
    output = model.apply(variables, batch.inputs, encoder=batch.encoder, train=train, rngs=rngs)
    project, parameters = _projection(model, params)
    members: Any = None
    if tasks:
        assert batch.tasks is not None, "names of tasks for a batch without their numbers"
        members = batch.tasks[:, None, None] == jnp.arange(len(tasks))
        members = jnp.broadcast_to(members, (*batch.targets.shape, len(tasks)))  # [B, T, K]
    result = chunked_loss(
        project,
        config,
        model.rules,
        parameters,
        output.hidden,
        batch.targets,
        batch.weights,
        members,
    )
    objective, sums = cast(tuple[Array, Sums], result)
    sums = {**sums, "tokens": jnp.sum(batch.weights)}
    for i, name in enumerate(tasks):
        sums[f"loss/{name}"] = sums["task_loss"][i]
        sums[f"tokens/{name}"] = jnp.sum(batch.weights * members[..., i])
    sums.pop("task_loss", None)
    for name, value in output.aux.items():  # the one division by tokens averages them too
        objective = objective + value * sums["tokens"]
        sums[name] = value * sums["tokens"]
    for name, value in output.stats.items():
        sums[name] = value * sums["tokens"]
    return objective, {**sums, "objective": objective}


def of_objective(
    own: Callable[..., tuple[Array, Sums]],
    model: Model,
    params: Params,
    batch: Batch,
    rng: Array,
    *,
    train: bool,
    config: LossConfig,
) -> tuple[Array, Sums]:
    """As `lm_loss`, by the loss `own` that an objective brings (lm.objectives.Objective.loss).

    Raises:
        ValueError: its sums lack what a run divides by or reports.
    """
    objective, sums = own(model, params, batch, rng, train=train, config=config)
    if missing := {"tokens", "loss"} - sums.keys():
        raise ValueError(
            f"the loss of config.objective returns sums without {', '.join(sorted(missing))}: "
            "tokens is what sums are divided by, loss what is reported"
        )
    return objective, {**sums, "objective": objective}
