"""Knowledge distillation (arXiv:1503.02531): the causal objective, and a teacher's distributions.

    loss = alpha t^2 KL(softmax(teacher / t) || softmax(student / t)) + (1 - alpha) nll
           + hidden_weight mean_D (student's last hidden - teacher's)^2

summed over scored tokens, in float32 (the last term as in arXiv:1909.10351, equation 8, for states
of one width and so without its projection). `loss` is the negative log-likelihood, which evaluation
reports; `kl`, at temperature t, and `hidden` are the other terms. Logits of both models exist for
`loss.chunk_size` tokens at a time.

A student whose `weights` have 8 or 4 bits computes with its matrices rounded as
`lm.compression.quantized_weights` does, and learns float32 ones that round well from the gradients
of the rounded (arXiv:2305.17888). Its evaluations round, too.

An objective outside of lm/objectives, which is of NumPy alone, is chosen by its full name:
config.objective.name=lm.compression.distillation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.compression.quantized_weights import GROUPS, WeightFormat, straight_through
from lm.config.fields import check_values, field
from lm.config.schema import LossConfig
from lm.kernels.chunking import num_chunks
from lm.layers.cross_entropy import (
    Evaluated,
    Predictions,
    Project,
    lm_loss,
    on_each_device,
    over_chunks,
    projection,
    token_nll,
)
from lm.models import init_params
from lm.objectives import Loss, ModelInterface, Objective, causal
from lm.parallel.sharding import Rules
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Array, Batch, Model, Params, Sums


@dataclasses.dataclass(frozen=True)
class Config(causal.Config):
    teacher: str = field("", "Folder of the teacher's run: trained, or made by lm hf-import.")
    teacher_step: int | None = field(None, "Its checkpoint; unset: the newest.", ge=0)
    temperature: float = field(2.0, "Divisor t of both models' logits in the KL.", gt=0)
    alpha: float = field(0.5, "Share of t^2 KL in the loss; 1: no labels.", ge=0, le=1)
    hidden_weight: float = field(
        0.0, "Weight of the squared distance of last hidden states, which must be as wide.", ge=0
    )
    weights: str = field(
        "float", "Type of the student's matrices.", choices=("float", "int8", "int4")
    )
    group: int = field(32, "Inputs that share a scale of int4: 32, 64 or 128.")


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """The causal objective with a loss that takes a teacher."""
    check_values(config, "config.objective")
    if not config.teacher:
        raise ValueError("config.objective.teacher must be given: the folder of the teacher's run")
    if config.group not in GROUPS:
        known = ", ".join(map(str, GROUPS))
        raise ValueError(f"config.objective.group ({config.group}) must be one of {known}")
    base = causal.build(causal.Config(config.begins_with_bos), tokenizer, interface)
    return dataclasses.replace(base, loss=_make_loss(config))


class _Functions(NamedTuple):
    """Functions of arrays that `_soft_loss` takes as constants."""

    student: Project
    teacher: Project
    token_sums: Callable[[Array, Array, Predictions], Sums]
    chunk_size: int
    rules: Rules


def _make_loss(objective: Config) -> Loss:
    def loss(
        model: Model,
        params: Params,
        batch: Batch,
        rng: Array,
        *,
        train: bool,
        config: LossConfig,
        step: Array | None,
        teacher: tuple[Model, Params] | None = None,
    ) -> tuple[Array, Sums]:
        del step
        params = _rounded(objective, model, params)
        if not train:
            return lm_loss(model, params, batch, rng, train=train, config=config)
        assert teacher is not None, "training gives an objective with a teacher its parameters"
        if config.label_smoothing or config.z_loss:
            raise ValueError(
                f"config.loss.label_smoothing ({config.label_smoothing}) and z_loss "
                f"({config.z_loss}) must be 0: the loss of a distillation has no such terms"
            )
        known_model, known = teacher[0], jax.lax.stop_gradient(teacher[1])
        output = model.apply({"params": params}, batch.inputs, train=True, rngs={"dropout": rng})
        hidden = known_model.apply({"params": known}, batch.inputs, train=False).hidden
        student, parameters = projection(model, params)
        project, known_parameters = projection(known_model, known)
        sums_of = functools.partial(
            token_sums, temperature=objective.temperature, alpha=objective.alpha
        )
        functions = _Functions(student, project, sums_of, config.chunk_size, model.rules)
        predictions = Predictions(output.hidden, batch.targets, batch.weights, teacher=hidden)
        found: Any = _soft_loss(functions, parameters, known_parameters, predictions)
        total, sums = found[0], {**found[1], "tokens": jnp.sum(batch.weights)}
        if objective.hidden_weight:
            sums["hidden"] = _hidden_distance(output.hidden, hidden, batch.weights)
            total = total + objective.hidden_weight * sums["hidden"]
        for value in output.aux.values():
            total = total + value * sums["tokens"]
        others = {**output.aux, **output.stats}
        return total, {**sums, **{n: value * sums["tokens"] for n, value in others.items()}}

    return loss


def _rounded(objective: Config, model: Model, params: Params) -> Params:
    if objective.weights == "float":
        return params
    shape = model.rules.size("act_batch"), model.rules.size("act_length")
    boxed = jax.eval_shape(functools.partial(init_params, model, shape=shape), jax.random.key(0))
    return straight_through(params, boxed, WeightFormat(objective.weights, objective.group))


def token_sums(
    logits: Array, teacher: Array, x: Predictions, *, temperature: float, alpha: float
) -> Sums:
    """Sums over tokens: `objective`, `loss`, `kl` and `accuracy`, of float32 logits [..., V] of the
    student and of the teacher.
    """
    nll, _ = token_nll(logits, x.targets)
    log_p = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(logits / temperature)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    values = {
        # gradients of the KL are 1 / t^2 of those at t = 1 (arXiv:1503.02531, section 2)
        "objective": alpha * temperature**2 * kl + (1 - alpha) * nll,
        "loss": nll,
        "kl": kl,
        "accuracy": (jnp.argmax(logits, axis=-1) == x.targets).astype(jnp.float32),
    }
    return {name: jnp.sum(value * x.weights) for name, value in values.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _soft_loss(
    functions: _Functions, parameters: list[Array], teacher: list[Array], predictions: Predictions
) -> tuple[Array, Sums]:
    """(objective, sums) of predictions [B, T] in chunks, as `lm.layers.cross_entropy.chunked_loss`:
    the gradients of a chunk are computed with its loss.
    """
    return _forward(functions, parameters, teacher, predictions)[0]


def _forward(
    functions: _Functions, parameters: list[Array], teacher: list[Array], predictions: Predictions
) -> tuple[tuple[Array, Sums], tuple[list[Array], Array]]:
    trained = range(len(parameters))

    def local(both: list[Array], xs: Predictions) -> Evaluated:
        own, known = both[: len(parameters)], both[len(parameters) :]

        def chunk(
            carry: tuple[Sums, dict[int, Array]] | None, x: Predictions
        ) -> tuple[tuple[Sums, dict[int, Array]], Array]:
            wanted = functions.teacher(x.teacher, *known)

            def loss_of(hidden: Array, own: list[Array]) -> tuple[Array, Sums]:
                sums = functions.token_sums(functions.student(hidden, *own), wanted, x)
                return sums["objective"], sums

            objective, pullback, sums = jax.vjp(loss_of, x.hidden, own, has_aux=True)
            d_hidden, found = pullback(jnp.ones_like(objective))
            new = sums, {i: g.astype(jnp.float32) for i, g in enumerate(found)}
            return new if carry is None else jax.tree.map(jnp.add, carry, new), d_hidden

        count = num_chunks(functions.chunk_size, *xs.targets.shape)
        (sums, found), d_hidden = over_chunks(chunk, count, xs)
        return sums, found, d_hidden

    both = [*parameters, *teacher]
    sums, found, d_hidden = on_each_device(functions.rules, local, both, predictions, trained)
    assert d_hidden is not None, "chunks return it"
    d_parameters = [found[i].astype(p.dtype) for i, p in enumerate(parameters)]
    # as of `chunked_loss`: the TPU compiler would put their reduction off
    return (sums["objective"], sums), jax.lax.optimization_barrier((d_parameters, d_hidden))


def _backward(
    functions: _Functions,
    residuals: tuple[list[Array], Array],
    cotangents: tuple[Array, Sums],
) -> tuple[list[Array], None, Predictions]:
    scale = cotangents[0]  # sums are for reading
    d_parameters, d_hidden = jax.tree.map(lambda g: (g * scale).astype(g.dtype), residuals)
    return d_parameters, None, Predictions(d_hidden, None, None)  # pyright: ignore


_soft_loss.defvjp(_forward, _backward)


def _hidden_distance(hidden: Array, teacher: Array, weights: Array) -> Array:
    """The sum over tokens of the mean squared difference of their states [B, T, D]."""
    if hidden.shape != teacher.shape:
        raise ValueError(
            f"config.objective.hidden_weight needs config.model.embed_dim ({hidden.shape[-1]}) to "
            f"be the teacher's ({teacher.shape[-1]})"
        )
    difference = hidden.astype(jnp.float32) - teacher.astype(jnp.float32)
    return jnp.sum(jnp.mean(jnp.square(difference), axis=-1) * weights)
