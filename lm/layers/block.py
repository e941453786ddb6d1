"""One layer of a transformer, and what there is to choose about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.config.fields import check_values, field
from lm.layers import positions as pe
from lm.layers.attention import kernels
from lm.layers.attention.attention import Attention, CrossAttention, LayerInputs
from lm.layers.attention.scores import AttentionScores
from lm.layers.linear import times
from lm.layers.lora import LoraConfig
from lm.layers.mlp import ACTIVATIONS, Mlp
from lm.layers.moe.moe import Moe, MoeConfig, RouterReport
from lm.layers.norm import KINDS as NORMS
from lm.layers.norm import Norm
from lm.layers.stack import REMAT
from lm.optim.parametrization import STANDARD, TABLES, Scaling
from lm.parallel.sharding import Rules
from lm.types import Array


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What transformers of every kind choose among; each adds its own fields."""

    vocab_size: int = field(
        50_304, "Rows of the embedding; at least the tokenizer's vocabulary.", ge=1
    )
    max_length: int = field(1024, "Longest row; the table size of learned positions.", ge=1)
    num_layers: int = field(12, "Blocks.", ge=1)
    embed_dim: int = field(768, "Width of the residual stream.", ge=1)
    num_heads: int = field(12, "Query heads.", ge=1)
    num_kv_heads: int | None = field(None, "Key and value heads; unset: num_heads.", ge=1)
    head_dim: int | None = field(None, "Width of a head; unset: embed_dim / num_heads.", ge=1)
    mlp_dim: int | None = field(None, "Width of the MLP; unset: 4 * embed_dim.", ge=1)
    moe: MoeConfig = field(MoeConfig(), "Mixture of experts in place of the MLP.")
    activation: str = field("gelu", f"One of {', '.join(ACTIVATIONS)}.")
    norm: str = field("rms", f"One of {', '.join(NORMS)}.")
    norm_placement: str = field("pre", "pre, post (of 2017), or both (around each sublayer).")
    norm_eps: float = field(1e-6, "Added to the variance.", gt=0)
    norm_bias: bool = field(False, "Norms have a bias.")
    positions: str = field("rotary", f"One of {', '.join(pe.KINDS)}.")
    rotary: pe.RotaryConfig = field(pe.RotaryConfig(), "Rotary positions.")
    relative_buckets: int = field(32, "relative: buckets of distance.", ge=2)
    relative_max_distance: int = field(
        128, "relative: distance from which all share a bucket.", ge=1
    )
    layer_pattern: tuple[str, ...] = field(
        ("global",), "Kinds of layer, global or local, repeated over the depth."
    )
    window: int | None = field(None, "Keys that a local layer sees, itself included.", ge=1)
    qk_norm: bool = field(False, "RMS norm on queries and keys of each head.")
    qkv_bias: bool = field(False, "Biases on query, key and value.")
    out_bias: bool = field(False, "Bias on the attention output.")
    mlp_bias: bool = field(False, "Biases in the MLP.")
    query_scale: float | None = field(None, "Factor on the scores; unset: head_dim ** -0.5.", gt=0)
    attention_softcap: float | None = field(None, "Soft cap of the scores.", gt=0)
    parallel_block: bool = field(False, "Attention and MLP read the same input (GPT-J, PaLM).")
    dropout: float = field(0.0, "Dropout of embeddings and residual branches.", ge=0, lt=1)
    attention_dropout: float = field(0.0, "Dropout of attention weights.", ge=0, lt=1)
    attention_kernel: str = field(
        "auto",
        "xla, splash (TPU; interpreted on CPU) or cudnn (GPU, bfloat16); auto: splash on TPU where "
        "it can do what is asked, else xla.",
    )
    sequence_parallel: str = field(
        "gather", "mesh.sequence > 1: gather all keys and values, or pass them on in a ring."
    )
    init_std: float | None = field(
        0.02, "Deviation of initial weights; unset: fan_in ** -0.5.", gt=0
    )
    parametrization: str = field(
        "standard",
        f"How weights and steps change with the size, one of {', '.join(TABLES)}; "
        "lm/optim/parametrization.py has the tables.",
    )
    base_embed_dim: int | None = field(
        None, "mup: embed_dim that hyper-parameters are meant for.", ge=1
    )
    base_num_layers: int | None = field(
        None, "mup: num_layers that hyper-parameters are meant for.", ge=1
    )
    base_head_dim: int | None = field(
        None, "mup: head_dim that hyper-parameters are meant for.", ge=1
    )
    lora: LoraConfig = field(LoraConfig(), "Low-rank adapters; with a rank, the rest is frozen.")
    dtype: str = field("float32", "Compute type: float32 or bfloat16; parameters stay float32.")
    remat: str = field("none", f"What the backward pass finds saved: {', '.join(REMAT)}.")
    scan_unroll: int = field(
        1, "Layers per iteration of the scan; -1: all of them, no loop.", ge=1, also=(-1,)
    )

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def takes_encoder(self) -> bool:
        return False

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def expert_size(self) -> int:
        return self.mlp_size if self.moe.mlp_dim is None else self.moe.mlp_dim

    @property
    def scaling(self) -> Scaling:
        """The table of `parametrization` at the sizes of this model."""
        base = self.base_embed_dim, self.base_num_layers, self.base_head_dim
        if self.parametrization == "standard" or None in base:  # `check` wants them all
            return STANDARD
        sizes = self.embed_dim, self.num_layers, self.head_size
        ratios = (size / (of_base or 1) for size, of_base in zip(sizes, base, strict=True))
        return Scaling(self.parametrization, *ratios)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The distinct kinds of layer, in order of first use."""
        return tuple(dict.fromkeys(self.layer_kinds))

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer: [L]."""
        return tuple(
            self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers)
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each of `kinds`."""
        return tuple(self.window if kind == "local" else None for kind in self.kinds)

    @property
    def attention_kinds(self) -> tuple[dict[str, Any], ...]:
        """Arguments of attention in each of `kinds`: the fields of `attention_check.Heads`."""
        shared = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_size,
            "scale": self.scaling.scores
            * (self.head_size**-0.5 if self.query_scale is None else self.query_scale),
            "softcap": self.attention_softcap,
            "bias": self.positions in ("relative", "alibi"),
            "kernel": self.attention_kernel,
            "causal": self.is_causal,
        }
        return tuple({**shared, "window": window} for window in self.windows)

    @property
    def attention_scores(self) -> tuple[AttentionScores, ...]:
        """The scores of self-attention in the layers of each of `kinds`."""
        size = self.num_heads, self.kv_heads, self.head_size
        return tuple(
            AttentionScores(self.layer_kinds.count(kind), *size, window, self.is_causal)
            for kind, window in zip(self.kinds, self.windows, strict=True)
        )

    def check(self, length: int) -> None:
        """Raises ValueError, naming config paths and numbers, unless the sizes fit together for
        rows of `length`.
        """

        check_values(self, "config.model")

        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"config.model.{message}")

        for name, known in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("norm_placement", ("pre", "post", "both")),
            ("positions", pe.KINDS),
            ("rotary.scaling", pe.SCALINGS),
            ("dtype", ("float32", "bfloat16")),
            ("remat", REMAT),
            ("parametrization", TABLES),
            ("attention_kernel", kernels.KERNELS),
            ("sequence_parallel", kernels.SEQUENCE_PARALLEL),
        ):
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            need(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")
        need(
            self.positions != "relative" or self.relative_buckets < 2 * self.relative_max_distance,
            f"relative_buckets ({self.relative_buckets}) must be less than twice "
            f"relative_max_distance ({self.relative_max_distance})",
        )
        need(
            self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"embed_dim ({self.embed_dim}) must be divisible by num_heads ({self.num_heads}), "
            "or set head_dim",
        )
        need(
            self.num_heads % self.kv_heads == 0,
            f"num_heads ({self.num_heads}) must be divisible by num_kv_heads ({self.kv_heads})",
        )
        need(
            self.positions != "rotary" or self.head_size % 2 == 0,
            f"head_dim ({self.head_size}) must be even for rotary positions",
        )
        need(
            self.positions != "sinusoidal" or self.embed_dim % 2 == 0,
            f"embed_dim ({self.embed_dim}) must be even for sinusoidal positions",
        )
        need(
            bool(self.layer_pattern) and set(self.layer_pattern) <= {"global", "local"},
            f"layer_pattern must list global and local, got {self.layer_pattern}",
        )
        need(
            ("local" in self.layer_pattern) == (self.window is not None),
            f"window ({self.window}) and layer_pattern {self.layer_pattern} must agree: "
            "local layers, and only they, need one",
        )
        self._check_parametrization(need)
        self.moe.check(need)
        self.lora.check()
        need(
            not (self.moe.num_experts and self.mlp_bias),
            f"mlp_bias must be False with moe.num_experts ({self.moe.num_experts}): experts have "
            "no biases",
        )
        need(
            self.scan_unroll <= self.num_layers,
            f"scan_unroll ({self.scan_unroll}) must be at most num_layers ({self.num_layers})",
        )
        need(
            length <= self.max_length,
            f"max_length ({self.max_length}) must be at least config.data.length ({length})",
        )

    def _check_parametrization(self, need: Callable[[bool, str], None]) -> None:
        name = self.parametrization
        if name == "standard":
            return
        for base in ("base_embed_dim", "base_num_layers", "base_head_dim"):
            need(
                getattr(self, base) is not None, f"{base} must be given for parametrization={name}"
            )
        scaling = self.scaling
        need(
            self.query_scale is None or scaling.head == 1,
            f"query_scale ({self.query_scale}) must be unset for parametrization={name} where "
            f"head_dim ({self.head_size}) is not base_head_dim ({self.base_head_dim})",
        )
        need(
            self.norm_placement != "post" or scaling.depth == 1,
            f"num_layers ({self.num_layers}) must be base_num_layers ({self.base_num_layers}) for "
            f"parametrization={name} and norm_placement=post: norms undo what depth does to "
            "branches",
        )
        need(
            not self.lora.rank,
            f"lora.rank ({self.lora.rank}) must be 0 for parametrization={name}, whose table has "
            "no row for adapters",
        )


class Block(nn.Module):
    """Attention and MLP around a residual stream. Parameters: `attention`, `mlp` or `moe`, with a
    memory to read `cross_attention`, and their norms.
    """

    config: BlockConfig
    rules: Rules

    def _norm(self, name: str) -> Norm:
        c = self.config
        return Norm(c.norm, c.norm_eps, c.norm_bias, jnp.dtype(c.dtype), name=name)

    @nn.compact
    def __call__(
        self, carry: Any, per_layer: Any, context: LayerInputs
    ) -> tuple[Any, tuple[RouterReport | None, Any]]:
        """((x: [B, T, D], cache), what is of this layer alone, what layers share) -> ((x, cache),
        (report of its experts, the keys and values of cross-attention that a cache needs)).
        """
        c = self.config
        x, cache = carry
        own, kept = {n: per_layer[n] for n in ("kind", "layer")}, per_layer.get("kept")
        x = checkpoint_name(x, "input")
        dtype = jnp.dtype(c.dtype)
        # GPT-2: the residual stream keeps its size with depth
        branches = 2 if context.memory is None else 3
        scaling = c.scaling
        out_scale = (branches * scaling.init_layers(c.num_layers)) ** -0.5
        init_scale = scaling.init("hidden", c.init_std)
        heads = {
            "embed_dim": c.embed_dim,
            "num_heads": c.num_heads,
            "num_kv_heads": c.kv_heads,
            "head_dim": c.head_size,
            "rules": self.rules,
            "qkv_bias": c.qkv_bias,
            "out_bias": c.out_bias,
            "qk_norm": c.qk_norm,
            "norm": "rms" if c.norm == "layer" else c.norm,
            "norm_eps": c.norm_eps,
            "scale": c.query_scale,
            "score_factor": scaling.scores,
            "softcap": c.attention_softcap,
            "dropout": c.attention_dropout,
            "kernel": c.attention_kernel,
            "sequence_parallel": c.sequence_parallel,
            "dtype": dtype,
            "init_std": c.init_std,
            "init_scale": init_scale,
            "out_scale": out_scale,
            "lora": c.lora,
        }
        attention = Attention(**heads, windows=c.windows, name="attention")
        shared = {"embed_dim": c.embed_dim, "rules": self.rules, "activation": c.activation}
        shared |= {n: heads[n] for n in ("dtype", "init_std", "init_scale", "out_scale", "lora")}
        mlp: Moe | Mlp
        if c.moe.num_experts:
            router_scale = scaling.init("router", c.init_std)
            mlp = Moe(
                mlp_dim=c.expert_size,
                config=c.moe,
                router_scale=router_scale,
                name="moe",
                **shared,
            )
        else:
            mlp = Mlp(mlp_dim=c.mlp_size, bias=c.mlp_bias, name="mlp", **shared)
        filled = context.masks[0].query_segments != 0
        dropout = nn.Dropout(c.dropout, deterministic=not context.train)
        before, after = c.norm_placement != "post", c.norm_placement == "both"

        # with a cache there may be one token, which the residual stream can't be sharded over
        length = "act_length" if context.index is None else "length"

        def gather(x: Array) -> jax.Array:  # what a sublayer reads
            return self.rules.constrain(x, "batch", "length", "act_embed")

        def scatter(x: Array) -> jax.Array:  # what it adds
            return self.rules.constrain(x, "batch", length, "act_embed")

        def branch(y: jax.Array) -> jax.Array:
            return times(dropout(y), scaling.branch)

        def feed_forward(x: Array) -> tuple[jax.Array, RouterReport | None]:
            y, report = mlp(x, filled) if isinstance(mlp, Moe) else (mlp(gather(x)), None)
            return scatter(y), report

        h = gather(self._norm("attention_norm")(x) if before else x)
        a, cache = attention(h, context, **own, cache=cache)
        a = scatter(a)
        a = branch(self._norm("attention_post_norm")(a) if after else a)
        if c.parallel_block:
            m, report = feed_forward(h)
            m = branch(self._norm("mlp_post_norm")(m) if after else m)
            x = x + a + m
            if not before:
                x = self._norm("attention_norm")(x)
        else:
            x = x + a
            if not before:
                x = self._norm("attention_norm")(x)
            if context.memory is not None:
                h = gather(self._norm("cross_attention_norm")(x) if before else x)
                a, kept = CrossAttention(**heads, name="cross_attention")(h, context, kept)
                a = scatter(a)
                x = x + branch(self._norm("cross_attention_post_norm")(a) if after else a)
                if not before:
                    x = self._norm("cross_attention_norm")(x)
            m, report = feed_forward(self._norm("mlp_norm")(x) if before else x)
            x = x + branch(self._norm("mlp_post_norm")(m) if after else m)
            if not before:
                x = self._norm("mlp_norm")(x)
        x = scatter(x)
        self.sow("intermediates", "hidden", x)
        return (x, cache), (report, None if cache is None else kept)
