"""Mixtures of experts: a router picks the few MLPs that each token passes (arXiv:1701.06538).

Every layer of a model is one: the stack scans a single body (models that interleave dense layers,
or start with some, are not expressible). Two ways to dispatch tokens to their experts:

    dropless   sorted by expert and multiplied by grouped products (arXiv:2211.15841). No token is
               dropped, whatever the load, and none sees another.
    capacity   each expert takes up to C = capacity_factor * k * T / E tokens of a row of T, the
               earliest ones, and the rest pass it by (arXiv:2006.16668, with its groups being
               rows). Static shapes and an all-to-all of C tokens per expert and row; packed
               neighbours do compete for slots, but no token with later ones.

Padding (segment 0) is routed to no expert: it takes no slot and counts in no statistic.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers.activation_statistics import sow_routing
from lm.layers.base_config import require
from lm.layers.linear import Matrix, initializer, matrix, parameter
from lm.layers.mlp import ACTIVATIONS, Mlp
from lm.layers.moe.dispatch import AXES, dropless, with_capacity
from lm.parallel.sharding import Rules
from lm.types import Array

if TYPE_CHECKING:
    from lm.layers.block_config import BlockConfig

ROUTERS = ("softmax_topk", "topk_softmax", "sigmoid")
DISPATCHES = ("dropless", "capacity")

# The gradient of a selection bias is how far its expert's load is above the mean, times this. The
# optimizer takes only its sign; so small, it shows in no norm of the gradient, and float32 still
# holds it exactly.
BIAS_GRADIENT = 2.0**-64


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    num_experts: int = field(0, "Experts in every layer; 0: one dense MLP instead.", ge=0)
    num_experts_per_token: int = field(2, "Experts that each token passes: the k of top-k.", ge=1)
    num_groups: int = field(1, "Groups of successive experts (arXiv:2412.19437); 1: none.", ge=1)
    num_groups_chosen: int = field(
        1,
        "Groups that a token's experts are from: those with the largest sums of best scores.",
        ge=1,
    )
    mlp_dim: int | None = field(None, "Width of an expert; unset: that of the dense MLP.", ge=1)
    shared_mlp_dim: int = field(0, "Width of a shared MLP that every token passes; 0: none.", ge=0)
    router: str = field(
        "softmax_topk",
        "softmax_topk: weights are probabilities of all experts; topk_softmax: of the chosen "
        "ones; sigmoid: each expert's own.",
        choices=ROUTERS,
    )
    normalize: bool = field(True, "Divide the weights of a token's experts by their sum.")
    scale: float = field(1.0, "Factor on the weights.", gt=0)
    dispatch: str = field("dropless", "How tokens reach experts.", choices=DISPATCHES)
    capacity_factor: float = field(
        1.25, "capacity: slots of an expert in a row, relative to a balanced load.", gt=0
    )
    balance_loss: float = field(
        0.0, "Coefficient of the load-balance loss, 1 at a balanced load (arXiv:2101.03961).", ge=0
    )
    sequence_balance_loss: float = field(
        0.0,
        "Coefficient of the load-balance loss within each row, 1 at a balanced load "
        "(arXiv:2412.19437).",
        ge=0,
    )
    z_loss: float = field(
        0.0, "Coefficient of the router's log(Z)^2, against large logits (arXiv:2202.08906).", ge=0
    )
    selection_bias: bool = field(
        False,
        "A bias for each expert, on the selection only, that optimizer.bias_rate moves against "
        "its load (arXiv:2408.15664).",
    )

    def check(self) -> None:
        """Raises ValueError where a token's experts cannot be chosen as the fields say."""
        e, k = self.num_experts, self.num_experts_per_token
        groups, chosen = self.num_groups, self.num_groups_chosen
        require(k <= e, f"moe.num_experts_per_token ({k}) must be at most moe.num_experts ({e})")
        require(
            e % groups == 0, f"moe.num_experts ({e}) must be divisible by moe.num_groups ({groups})"
        )
        require(
            chosen <= groups,
            f"moe.num_groups_chosen ({chosen}) must be at most moe.num_groups ({groups})",
        )
        require(
            k % chosen == 0,
            f"moe.num_experts_per_token ({k}) must be divisible by moe.num_groups_chosen "
            f"({chosen}): a group is chosen for so many of its best experts",
        )
        require(
            k <= chosen * (e // groups),
            f"moe.num_experts_per_token ({k}) must be at most the {chosen * (e // groups)} experts "
            f"of moe.num_groups_chosen ({chosen}) of moe.num_groups ({groups}) groups",
        )

    def capacity(self, length: int) -> int:
        """Slots of each expert in a row of `length` tokens: C."""
        balanced = length * self.num_experts_per_token / self.num_experts
        return max(1, min(length, math.ceil(self.capacity_factor * balanced)))


@flax.struct.dataclass
class RouterReport:
    """Terms of the loss and statistics of a layer, float32 scalars."""

    aux: dict[str, Array]
    stats: dict[str, Array]


@flax.struct.dataclass
class Routing:
    """The experts of every token [B, T]."""

    logits: Array  # float32 [B, T, E]
    scores: Array  # float32 [B, T, E]
    chosen: Array  # int32 [B, T, k]; E for padding
    weights: Array  # float32 [B, T, k]


def route(
    logits: Array, non_padding: Array, config: MoeConfig, bias: Array | None = None
) -> Routing:
    """The experts of each token and their weights, by logits: float32 [B, T, E].

    non_padding: bool [B, T], False at padding. bias: [E], added to the scores for the choice only.
    """
    scores = jax.nn.sigmoid(logits) if config.router == "sigmoid" else jax.nn.softmax(logits)
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if config.num_groups_chosen < config.num_groups:
        ranked = _within_best_groups(ranked, config)
    chosen = _top(ranked, config.num_experts_per_token)
    if config.router == "topk_softmax":
        weights = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1))
    else:
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.normalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    chosen = jnp.where(non_padding[..., None], chosen, config.num_experts)
    return Routing(logits, scores, chosen, config.scale * weights)


def _top(ranked: Array, k: int) -> Array:
    """The positions of the k largest along the last axis, the largest first."""
    # not jax.lax.top_k, whose operand the compiler gathers: it cannot divide it over devices
    return jnp.argsort(ranked, axis=-1, descending=True, stable=True)[..., :k]


def _within_best_groups(ranked: Array, config: MoeConfig) -> Array:
    """ranked: [B, T, E], -inf outside of each token's groups (arXiv:2412.19437, section 2.1.2).

    Of num_groups groups of successive experts, those num_groups_chosen whose best
    num_experts_per_token / num_groups_chosen experts have the largest sum.
    """
    groups, chosen = config.num_groups, config.num_groups_chosen
    by_group = ranked.reshape(*ranked.shape[:-1], groups, -1)  # [B, T, groups, E / groups]
    best = jnp.sort(by_group, axis=-1, descending=True)
    best = jnp.sum(best[..., : config.num_experts_per_token // chosen], axis=-1)
    of_token = jnp.any(_top(best, chosen)[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(of_token[..., None], by_group, -jnp.inf).reshape(ranked.shape)


@jax.custom_vjp
def against_load(bias: Array, excess: Array) -> jax.Array:
    """0, with the gradient `excess` with respect to `bias`, both float32 [E].

    A term of the loss, and so summed over micro-batches and divided by tokens like all of it.
    """
    del bias, excess
    return jnp.zeros((), jnp.float32)


against_load.defvjp(
    lambda bias, excess: (against_load(bias, excess), excess),
    lambda excess, ct: (ct * excess, jnp.zeros_like(excess)),
)


def balance(
    routing: Routing, non_padding: Array, config: MoeConfig, bias: Array | None = None
) -> RouterReport:
    """Terms of the loss and statistics of a layer, over the tokens of the whole (micro-)batch.

    The load-balance loss is E times the sum over experts of the fraction of assignments and the
    mean probability (arXiv:2101.03961, equations 4 to 6, with k choices): products of means, so
    that accumulating over micro-batches averages their losses and is not the loss of the batch.

    The sequence-wise loss is the same within each row (arXiv:2412.19437, equations 17 to 20: the
    choice is that of the scores alone, without bias or groups), averaged over rows by their tokens,
    so that accumulating over micro-batches is the loss of the batch.
    """
    e, k = config.num_experts, config.num_experts_per_token
    tokens = jnp.maximum(jnp.sum(non_padding, dtype=jnp.float32), 1.0)
    of_rows = _loads(routing.chosen, e)
    count = jnp.sum(of_rows, axis=0).astype(jnp.float32)  # [E]
    share = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
    share = jnp.sum(share * non_padding[..., None], axis=1)  # [B, E]
    aux = {}
    if config.balance_loss:
        total = jnp.sum(count * jnp.sum(share, axis=0)) / tokens
        aux["balance_loss"] = config.balance_loss * e * total / (tokens * k)
    if config.sequence_balance_loss:
        best = of_rows
        if bias is not None or config.num_groups_chosen < config.num_groups:
            best = _top(jax.lax.stop_gradient(routing.scores), k)
            best = _loads(jnp.where(non_padding[..., None], best, e), e)
        of_row = jnp.maximum(jnp.sum(non_padding, axis=1, dtype=jnp.float32), 1.0)  # [B]
        total = jnp.sum(best * share / of_row[:, None]) / tokens
        aux["sequence_balance_loss"] = config.sequence_balance_loss * e * total / k
    if config.z_loss:
        log_z = jax.nn.logsumexp(routing.logits, axis=-1)
        aux["router_z_loss"] = config.z_loss * jnp.sum(jnp.square(log_z) * non_padding) / tokens
    if bias is not None:
        excess = BIAS_GRADIENT * (count - jnp.sum(count) / e) / (tokens * k)
        aux["balance_loss"] = aux.get("balance_loss", 0.0) + against_load(bias, excess)
    stats = {"expert_imbalance": e * jnp.max(count) / (tokens * k)}  # largest load over the mean
    if config.dispatch == "capacity":
        over = jnp.maximum(of_rows - config.capacity(non_padding.shape[1]), 0)
        stats["expert_dropped"] = jnp.sum(over).astype(jnp.float32) / (tokens * k)
    return RouterReport(aux, stats)


def _loads(chosen: Array, num_experts: int) -> Array:
    """int32 [B, E]: how many of the choices [B, T, k] of a row are of each expert."""
    chose = chosen[..., None] == jnp.arange(num_experts)  # [B, T, k, E]
    return jnp.sum(chose, axis=(1, 2), dtype=jnp.int32)


class Moe(nn.Module):
    """A mixture of gated or plain MLPs. Parameters: `router` [D, E], `up` and `gate` [E, D, F],
    `down` [E, F, D], `selection_bias` [E] and `shared` (an Mlp) where asked for.
    """

    config: BlockConfig
    rules: Rules
    out_scale: float = 1.0  # factor on the initial weights of `down`

    def _experts(self) -> dict[str, Matrix]:
        """The stacked matrices, in the type of the computation."""
        c = self.config
        d, f, e = c.embed_dim, c.expert_size, c.moe.num_experts
        scale = c.scaling.init("hidden", c.init_std)
        wide = initializer(c.init_std, d, scale)
        narrow = initializer(c.init_std, f, scale * self.out_scale)
        names = ("up", "gate") if ACTIVATIONS[c.activation][1] else ("up",)
        weights = {n: parameter(self, n, wide, (e, d, f), AXES[n]) for n in names}
        weights["down"] = parameter(self, "down", narrow, (e, f, d), AXES["down"])
        return {n: matrix(w, jnp.dtype(c.dtype), self.rules) for n, w in weights.items()}

    @nn.compact
    def __call__(self, x: jax.Array, non_padding: Array) -> tuple[jax.Array, RouterReport]:
        """x: [B, T, D], non_padding: bool [B, T] -> ([B, T, D], report)."""
        c, moe, d = self.config, self.config.moe, self.config.embed_dim
        e = moe.num_experts
        self.rules.check("config.model.moe", (e, d, c.expert_size), AXES["up"])
        init = initializer(c.init_std, d, c.scaling.init("router", c.init_std))
        router = parameter(self, "router", init, (d, e), ("embed", "expert"))
        router = self.rules.constrain(router, None, None)
        experts, bias = self._experts(), None
        if moe.selection_bias:
            bias = parameter(self, "selection_bias", nn.initializers.zeros, (e,), (None,))
        # in float32, also where products of float32 default to less
        logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), router, precision="highest")
        routing = route(logits, non_padding, moe, bias)
        report = balance(routing, non_padding, moe, bias)
        sow_routing(self, routing.scores, routing.chosen, non_padding)
        how = c.activation, self.rules, c.quantization
        inputs = x, routing.chosen, routing.weights, experts, *how
        if moe.dispatch == "dropless":
            y = dropless(*inputs)
        else:
            y = with_capacity(*inputs, capacity=moe.capacity(x.shape[1]))
        if moe.shared_mlp_dim:
            whole = self.rules.constrain(x, "batch", "length", "act_embed")
            shared = Mlp(c, self.rules, moe.shared_mlp_dim, out_scale=self.out_scale, name="shared")
            y = y + shared(whole)
        return y, report
