"""What a model is made of, from its Config alone: its weights, each with how often a token is
multiplied by it, and its attention scores.

A new architecture is one more function from its Config to a Layout, and one row of `LAYOUTS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

GATED = ("reglu", "geglu", "geglu_tanh", "swiglu")  # activations with a third matrix in the MLP


@dataclasses.dataclass(frozen=True)
class Weight:
    """`count` parameters of one group, by which a token is multiplied `uses` times.

    Tables that are only looked up, biases and scales have no uses; experts have num_active /
    num_experts. encoder: the tokens are those of the encoder's stream.
    """

    group: str
    count: int
    uses: float = 0.0
    encoder: bool = False


@dataclasses.dataclass(frozen=True)
class Scores:
    """Attention scores of `num_layers` layers; causal: a token sees itself and those before it.

    queries and keys: the streams that they come from, `inputs` or `encoder`.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    causal: bool = True
    queries: str = "inputs"
    keys: str = "inputs"


@dataclasses.dataclass(frozen=True)
class ModelLayout:
    weights: tuple[Weight, ...]
    scores: tuple[Scores, ...]


def decoder(config: Any) -> ModelLayout:
    """The Layout of a `lm.models.decoder.Config`."""
    c = config
    return ModelLayout((*_tables(c), *_stack(c), *_head(c)), _scores(c))


def encoder(config: Any) -> ModelLayout:
    """The Layout of a `lm.models.encoder.Config`: the transform of its masked-LM head and the
    pooler count as head; the pooler meets one token of a segment, so it has no uses.
    """
    c = config
    embed, vocab = c.embed_dim, c.vocab_size
    weights = (
        Weight("embedding", vocab * embed, uses=1.0),
        Weight("positions", (c.positions == "learned") * c.max_length * embed),
        Weight("types", c.num_types * embed),
        *_stack(c),
        Weight("norm", 2 * embed * (1 + c.norm_bias)),
        Weight("head", c.has_head * embed * embed, uses=1.0),
        Weight("head", c.has_head * (c.mlp_bias * embed + vocab)),
        Weight("head", (embed + c.mlp_bias) * c.pooler_dim),
    )
    return ModelLayout(weights, _scores(c, causal=False))


def encoder_decoder(config: Any) -> ModelLayout:
    """The Layout of a `lm.models.encoder_decoder.Config`."""
    c = config
    heads, kv_heads, head, layers = c.num_heads, c.kv_heads, c.head_size, c.num_layers
    biases = c.qkv_bias * (heads + 2 * kv_heads) * head + c.out_bias * c.embed_dim
    norms = layers * (1 + (c.norm_placement == "both")) * c.embed_dim * (1 + c.norm_bias)
    cross = (
        Weight("attention", layers * 2 * c.embed_dim * heads * head, uses=1.0),
        Weight("attention", layers * 2 * c.embed_dim * kv_heads * head, uses=1.0, encoder=True),
        Weight("attention", layers * biases),
        Weight("norm", norms + layers * c.qk_norm * 2 * head),
    )
    own = tuple(dataclasses.replace(weight, encoder=True) for weight in _stack(c.encoder))
    positions = (c.positions == "learned") * c.max_length * c.embed_dim  # of the encoder
    weights = (*_tables(c), Weight("positions", positions), *own, *_stack(c), *cross, *_head(c))
    shape = (layers, heads, kv_heads, head)
    scores = (
        *_scores(c.encoder, causal=False, queries="encoder", keys="encoder"),
        *_scores(c),
        Scores(*shape, causal=False, keys="encoder"),
    )
    return ModelLayout(weights, scores)


def _tables(c: Any) -> tuple[Weight, ...]:
    table = Weight("embedding", c.vocab_size * c.embed_dim, uses=1.0 if c.tie_embeddings else 0.0)
    return table, Weight("positions", (c.positions == "learned") * c.max_length * c.embed_dim)


def _head(c: Any) -> tuple[Weight, ...]:
    own = getattr(c, "has_head", True) and not c.tie_embeddings
    return (Weight("head", own * c.vocab_size * c.embed_dim, uses=1.0),)


def _stack(c: Any) -> tuple[Weight, ...]:
    """Of the layers of a `BlockConfig` without cross-attention, and what they share."""
    layers, embed = c.num_layers, c.embed_dim
    heads, kv_heads, head = c.num_heads, c.kv_heads, c.head_size
    num_up = 2 if c.activation in GATED else 1
    attention_bias = c.qkv_bias * (heads + 2 * kv_heads) * head + c.out_bias * embed
    mlp_bias = c.mlp_bias * (num_up * c.mlp_size + embed)
    inputs = 1 if c.parallel_block else 2  # sublayers that normalise an input of their own
    num_norms = layers * (inputs + 2 * (c.norm_placement == "both")) + (c.norm_placement != "post")
    moe, experts = c.moe, c.moe.num_experts
    mlp_size = moe.shared_mlp_dim if experts else c.mlp_size
    share = moe.num_experts_per_token / experts if experts else 0.0
    expert = (num_up + 1) * embed * c.expert_size
    return (
        Weight("positions", (c.positions == "relative") * c.relative_buckets * heads),
        Weight("attention", layers * 2 * embed * (heads + kv_heads) * head, uses=1.0),
        Weight("attention", layers * attention_bias),
        Weight("mlp", layers * (num_up + 1) * embed * mlp_size, uses=1.0),
        Weight("mlp", layers * mlp_bias),
        Weight("router", layers * embed * experts, uses=1.0),
        Weight("balance", layers * experts * moe.selection_bias),
        Weight("experts", layers * experts * expert, uses=share),
        Weight("norm", num_norms * embed * (1 + c.norm_bias) + layers * c.qk_norm * 2 * head),
    )


def _scores(c: Any, **of: Any) -> tuple[Scores, ...]:
    return tuple(
        Scores(c.layer_kinds.count(kind), c.num_heads, c.kv_heads, c.head_size, window, **of)
        for kind, window in zip(c.kinds, c.windows, strict=True)
    )


def lstm(config: Any) -> ModelLayout:
    """The Layout of a `lm.models.lstm.Config`."""
    c = config
    table, size = c.vocab_size * c.embed_dim, c.hidden_size
    maps = 2 * c.embed_dim * size if size != c.embed_dim else 0
    weights = (
        Weight("embedding", table, uses=1.0 if c.tie_embeddings else 0.0),
        Weight("maps", maps, uses=1.0),
        Weight("lstm", c.num_layers * 8 * size * size, uses=1.0),
        Weight("lstm", c.num_layers * 4 * size),
        Weight("head", 0 if c.tie_embeddings else table, uses=1.0),
        Weight("head", c.head_bias * c.vocab_size),
    )
    return ModelLayout(weights, scores=())


def conv(config: Any) -> ModelLayout:
    """The Layout of a `lm.models.conv.Config`."""
    c = config
    layers, embed = c.num_layers, c.embed_dim
    table = c.vocab_size * embed
    weights = (
        Weight("embedding", table, uses=1.0 if c.tie_embeddings else 0.0),
        Weight("convolution", layers * c.kernel_size * embed * 2 * embed, uses=1.0),
        Weight("convolution", layers * 2 * embed),
        Weight("norm", (layers + 1) * embed),
        Weight("head", 0 if c.tie_embeddings else table, uses=1.0),
    )
    return ModelLayout(weights, scores=())


# The module of a model's Config: its Layout.
LAYOUTS: dict[str, Callable[[Any], ModelLayout]] = {
    "lm.models.decoder": decoder,
    "lm.models.encoder": encoder,
    "lm.models.encoder_decoder": encoder_decoder,
    "lm.models.lstm": lstm,
    "lm.models.conv": conv,
}


def is_known(config: Any) -> bool:
    """Whether there is a formula for a model Config."""
    return type(config).__module__ in LAYOUTS


def layout(config: Any) -> ModelLayout:
    """The Layout of a model Config.

    Raises:
        ValueError: a model that `LAYOUTS` has no function for.
    """
    model = type(config).__module__
    if not is_known(config):
        raise ValueError(
            f"lm/models/layouts.py has no formula for {model}: add a function from its Config to "
            f"a Layout to LAYOUTS; there are: {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[model](config)
