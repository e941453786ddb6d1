"""Decoder-only transformers: GPT-2, GPT-3, Llama 3, Mistral, Qwen 3 and Gemma 3 are values of this
`Config`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.config import field
from lm.layers import cache as kv_cache
from lm.layers import kernels, pipelining, zigzag
from lm.layers import positions as pe
from lm.layers.attention import Attention, Context
from lm.layers.dot_product import Mask, self_mask
from lm.layers.embedding import Embedding
from lm.layers.linear import Linear
from lm.layers.mlp import ACTIVATIONS, Mlp
from lm.layers.moe import Moe, MoeConfig, Report
from lm.layers.norm import KINDS as NORMS
from lm.layers.norm import Norm
from lm.layers.stack import REMAT, stack
from lm.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = field(50_304, "Rows of the embedding; at least the tokenizer's vocabulary.")
    max_length: int = field(1024, "Longest row; the table size of learned positions.")
    num_layers: int = field(12, "Blocks.")
    embed_dim: int = field(768, "Width of the residual stream.")
    num_heads: int = field(12, "Query heads.")
    num_kv_heads: int | None = field(None, "Key and value heads; unset: num_heads.")
    head_dim: int | None = field(None, "Width of a head; unset: embed_dim / num_heads.")
    mlp_dim: int | None = field(None, "Width of the MLP; unset: 4 * embed_dim.")
    moe: MoeConfig = field(MoeConfig(), "Mixture of experts in place of the MLP.")
    activation: str = field("gelu", f"One of {', '.join(ACTIVATIONS)}.")
    norm: str = field("rms", "rms or layer.")
    norm_placement: str = field("pre", "pre, post (of 2017), or both (around each sublayer).")
    norm_eps: float = field(1e-6, "Added to the variance.")
    norm_bias: bool = field(False, "Norms have a bias.")
    positions: str = field("rotary", f"One of {', '.join(pe.KINDS)}.")
    rotary: pe.RotaryConfig = field(pe.RotaryConfig(), "Rotary positions.")
    relative_buckets: int = field(32, "relative: buckets of distance.")
    relative_max_distance: int = field(128, "relative: distance from which all share a bucket.")
    layer_pattern: tuple[str, ...] = field(
        ("global",), "Kinds of layer, global or local, repeated over the depth."
    )
    window: int | None = field(None, "Keys that a local layer sees, itself included.")
    qk_norm: bool = field(False, "RMS norm on queries and keys of each head.")
    qkv_bias: bool = field(False, "Biases on query, key and value.")
    out_bias: bool = field(False, "Bias on the attention output.")
    mlp_bias: bool = field(False, "Biases in the MLP.")
    query_scale: float | None = field(None, "Factor on the scores; unset: head_dim ** -0.5.")
    attention_softcap: float | None = field(None, "Soft cap of the scores.")
    logit_softcap: float | None = field(None, "Soft cap of the logits.")
    parallel_block: bool = field(False, "Attention and MLP read the same input (GPT-J, PaLM).")
    tie_embeddings: bool = field(True, "The vocabulary projection is the embedding.")
    embed_scale: float = field(1.0, "Factor on the embeddings.")
    dropout: float = field(0.0, "Dropout of embeddings and residual branches.")
    attention_dropout: float = field(0.0, "Dropout of attention weights.")
    attention_kernel: str = field(
        "auto",
        "xla, splash (TPU; interpreted on CPU) or cudnn (GPU, bfloat16); auto: splash on TPU where "
        "it can do what is asked, else xla.",
    )
    sequence_parallel: str = field(
        "gather", "mesh.sequence > 1: gather all keys and values, or pass them on in a ring."
    )
    sequence_balance: bool = field(
        True, "mesh.sequence > 1: give every shard the same share of a causal mask."
    )
    init_std: float | None = field(0.02, "Deviation of initial weights; unset: fan_in ** -0.5.")
    dtype: str = field("float32", "Compute type: float32 or bfloat16; parameters stay float32.")
    remat: str = field("none", f"What the backward pass finds saved: {', '.join(REMAT)}.")
    scan_unroll: int = field(1, "Layers per iteration of the scan; -1: all of them, no loop.")
    pipeline: pipelining.PipelineConfig = field(
        pipelining.PipelineConfig(), "How micro-batches pass the stages of the mesh."
    )

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
        """What attention is called with in each of `kinds`: fields of `lm.selfcheck.Heads`."""
        shared = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_size,
            "scale": self.head_size**-0.5 if self.query_scale is None else self.query_scale,
            "softcap": self.attention_softcap,
            "bias": self.positions in ("relative", "alibi"),
            "kernel": self.attention_kernel,
        }
        return tuple({**shared, "window": window} for window in self.windows)

    def check(self, length: int) -> None:
        """Raises ValueError, naming config paths and numbers, unless the sizes fit together for
        rows of `length`.
        """

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
            ("attention_kernel", kernels.KERNELS),
            ("sequence_parallel", kernels.SEQUENCE_PARALLEL),
        ):
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            need(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in (
            *("vocab_size", "max_length", "num_layers", "embed_dim", "num_heads"),
            *("head_dim", "mlp_dim", "window", "norm_eps", "init_std", "query_scale"),
            *("attention_softcap", "logit_softcap", "relative_max_distance"),
        ):
            value = getattr(self, name)
            need(value is None or value > 0, f"{name} must be positive, got {value}")
        need(
            self.positions != "relative"
            or 2 <= self.relative_buckets < 2 * self.relative_max_distance,
            f"relative_buckets ({self.relative_buckets}) must be at least 2 and less than twice "
            f"relative_max_distance ({self.relative_max_distance})",
        )
        need(
            self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"embed_dim ({self.embed_dim}) must be divisible by num_heads ({self.num_heads}), "
            "or set head_dim",
        )
        need(
            self.kv_heads > 0 and self.num_heads % self.kv_heads == 0,
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
        self.moe.check(need)
        need(
            not (self.moe.num_experts and self.mlp_bias),
            f"mlp_bias must be False with moe.num_experts ({self.moe.num_experts}): experts have "
            "no biases",
        )
        for name in ("dropout", "attention_dropout"):
            need(
                0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}"
            )
        need(
            self.scan_unroll == -1 or 1 <= self.scan_unroll <= self.num_layers,
            f"scan_unroll ({self.scan_unroll}) must be -1 or in 1..num_layers ({self.num_layers})",
        )
        need(
            length <= self.max_length,
            f"max_length ({self.max_length}) must be at least config.data.length ({length})",
        )


class Block(nn.Module):
    """Attention and MLP around a residual stream. Parameters: `attention`, `mlp` or `moe`, and
    their norms.
    """

    config: Config
    rules: Rules

    def _norm(self, name: str) -> Norm:
        c = self.config
        return Norm(c.norm, c.norm_eps, c.norm_bias, jnp.dtype(c.dtype), name=name)

    @nn.compact
    def __call__(self, carry: Any, per_layer: Any, context: Context) -> tuple[Any, Report | None]:
        c = self.config
        x, cache = carry
        x = checkpoint_name(x, "input")
        dtype = jnp.dtype(c.dtype)
        out_scale = (
            2 * c.num_layers
        ) ** -0.5  # GPT-2: the residual stream keeps its size with depth
        attention = Attention(
            embed_dim=c.embed_dim,
            num_heads=c.num_heads,
            num_kv_heads=c.kv_heads,
            head_dim=c.head_size,
            rules=self.rules,
            windows=c.windows,
            qkv_bias=c.qkv_bias,
            out_bias=c.out_bias,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            scale=c.query_scale,
            softcap=c.attention_softcap,
            dropout=c.attention_dropout,
            kernel=c.attention_kernel,
            sequence_parallel=c.sequence_parallel,
            dtype=dtype,
            init_std=c.init_std,
            out_scale=out_scale,
            name="attention",
        )
        shared = {"embed_dim": c.embed_dim, "rules": self.rules, "activation": c.activation}
        shared |= {"dtype": dtype, "init_std": c.init_std, "out_scale": out_scale}
        mlp: Moe | Mlp
        if c.moe.num_experts:
            mlp = Moe(mlp_dim=c.expert_size, config=c.moe, name="moe", **shared)
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

        def feed_forward(x: Array) -> tuple[jax.Array, Report | None]:
            y, report = mlp(x, filled) if isinstance(mlp, Moe) else (mlp(gather(x)), None)
            return scatter(y), report

        h = gather(self._norm("attention_norm")(x) if before else x)
        a, cache = attention(h, context, **per_layer, cache=cache)
        a = scatter(a)
        a = dropout(self._norm("attention_post_norm")(a) if after else a)
        if c.parallel_block:
            m, report = feed_forward(h)
            m = dropout(self._norm("mlp_post_norm")(m) if after else m)
            x = x + a + m
            if not before:
                x = self._norm("attention_norm")(x)
        else:
            x = x + a
            if not before:
                x = self._norm("attention_norm")(x)
            m, report = feed_forward(self._norm("mlp_norm")(x) if before else x)
            x = x + dropout(self._norm("mlp_post_norm")(m) if after else m)
            if not before:
                x = self._norm("mlp_norm")(x)
        x = scatter(x)
        self.sow("intermediates", "hidden", x)
        return (x, cache), report


class Decoder(nn.Module):
    """The model. Parameters: `embedding`, `layers` (stacked), `norm`, and `positions` `relative`
    `head` where used.
    """

    config: Config
    rules: Rules

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        std = 0.02 if c.init_std is None else c.init_std
        self.embedding = Embedding(c.vocab_size, c.embed_dim, self.rules, "vocab", dtype, std)
        if c.positions == "learned":
            self.position = Embedding(c.max_length, c.embed_dim, self.rules, None, dtype, std)
        if c.positions == "relative":
            self.relative = pe.RelativeBias(
                c.num_heads, c.relative_buckets, c.relative_max_distance
            )
        unroll = c.num_layers if c.scan_unroll == -1 else c.scan_unroll
        self.layers = stack(Block, c.num_layers, remat=c.remat, unroll=unroll)(c, self.rules)
        if c.norm_placement != "post":
            self.norm = Norm(c.norm, c.norm_eps, c.norm_bias, dtype)
        if not c.tie_embeddings:
            self.head = Linear(
                (c.embed_dim,),
                (c.vocab_size,),
                ("embed",),
                ("vocab",),
                self.rules,
                dtype=dtype,
                init_std=c.init_std,
            )
        self.dropout = nn.Dropout(c.dropout)

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Output:
        """Hidden states [B, T, D] of inputs [B, T]; with a cache, of tokens that continue what it
        holds.
        """
        if encoder is not None:
            raise ValueError("config.model.name=decoder takes no encoder tokens")
        if cache is not None and inputs.bidirectional is not None:
            raise ValueError(
                "a cache keeps no bidirectional marks: encode such a prefix without one"
            )
        c, rules = self.config, self.rules
        order = rules.size("length") if self._balances(inputs, cache, train) else 1
        if order > 1:
            inputs = jax.tree.map(lambda x: zigzag.shuffle(x, rules), inputs)
        x = self.embedding(inputs.ids) * jnp.asarray(c.embed_scale, jnp.dtype(c.dtype))
        if c.positions == "learned":
            x = x + self.position(inputs.positions)
        elif c.positions == "sinusoidal":
            x = x + pe.sinusoids(inputs.positions, c.embed_dim).astype(x.dtype)
        length = "act_length" if cache is None else "length"
        x = rules.constrain(x, "act_batch", length, "act_embed")
        if self._is_pipelined(cache, train):
            x, reports = self._pipelined(x, inputs, train, order)
            x = x if c.norm_placement == "post" else self.norm(x)
            x = rules.constrain(x, "act_batch", "length", "act_embed")
            return _output(x if order == 1 else zigzag.unshuffle(x, rules), None, reports)
        x = self.dropout(x, deterministic=not train)

        if cache is None:
            marks, masks = None, (self_mask(inputs, order=order),) * len(c.kinds)
        else:
            marks, seen = kv_cache.mark(cache, inputs)
            masks = tuple(
                Mask(inputs.segments, inputs.positions, s["segments"], s["positions"]) for s in seen
            )
        biases = tuple(self._bias(mask) for mask in masks)
        context = self._context(inputs, masks, biases, train)
        if cache is not None:
            context = context.replace(index=cache["index"])  # pyright: ignore
        layer_cache = None if cache is None else cache["layers"]
        (x, layer_cache), reports = self.layers((x, layer_cache), self._per_layer(), context)
        if c.norm_placement != "post":
            x = self.norm(x)
        x = rules.constrain(x, "act_batch", "length", "act_embed")
        if order > 1:
            x = zigzag.unshuffle(x, rules)
        if cache is not None:
            index = cache["index"] + inputs.ids.shape[1]
            cache = {"index": index, "layers": layer_cache, "marks": marks}
        return _output(x, cache, reports)

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V]."""
        c = self.config
        x = self.embedding.attend(hidden) if c.tie_embeddings else self.head(hidden)
        x = self.rules.constrain(x.astype(jnp.float32), "act_batch", "length", "vocab")
        return x if c.logit_softcap is None else c.logit_softcap * jnp.tanh(x / c.logit_softcap)

    @property
    def num_microbatches(self) -> int:
        """Parts that the rows of a forward pass are cut into."""
        return self.config.pipeline.num_microbatches

    def _is_pipelined(self, cache: Cache | None, train: bool) -> bool:
        """Whether micro-batches make a difference: on several stages, and to what is drawn or
        averaged for each in training. What layers `sow` is kept by the plain loop over layers.
        """
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            return False
        stages = self.rules.size("layers")
        if cache is not None and stages > 1:
            raise ValueError(
                f"generation keeps no cache on several stages: config.mesh.stage ({stages}) must "
                "be 1, which any checkpoint can be restored to"
            )
        return stages > 1 or (train and self.num_microbatches > 1)

    def _pipelined(
        self, x: Array, inputs: Tokens, train: bool, order: int
    ) -> tuple[jax.Array, Any]:
        """(what the layers make of x: [B, T, D], micro-batch by micro-batch, the means over
        micro-batches of the layers' outputs, [L, ...]).
        """
        c, rules, m = self.config, self.rules, self.num_microbatches
        schedule = pipelining.make_schedule(c.pipeline, c.num_layers, rules)
        x, rows = jax.tree.map(lambda a: pipelining.split(rules, m, a), (x, inputs))
        x = self.dropout(x, deterministic=not train)
        first = jax.tree.map(lambda a: a[0], rows)
        biases = (self._bias(self_mask(first, order=order)),) * len(c.kinds)
        block = Block(c, rules, parent=None)
        # groups have the same kinds in the same places, and nothing else tells layers apart
        per_layer = jax.tree.map(lambda a: a[: schedule.group_size], self._per_layer())

        def prepare(tokens: Tokens, biases: Any) -> Context:
            return self._context(
                tokens, (self_mask(tokens, order=order),) * len(c.kinds), biases, train
            )

        def layer(params: Any, own: Any, x: Array, shared: Context, rng: Any) -> Any:
            rngs = {} if rng is None else {"dropout": rng}
            (x, _), outputs = block.apply({"params": params}, (x, None), own, shared, rngs=rngs)
            return x, outputs

        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[c.remat], prevent_cse=False)
        draws = train and (c.dropout > 0 or c.attention_dropout > 0)
        x, outputs = pipelining.pipeline(
            layer,
            prepare,
            self.layers.variables["params"],
            per_layer,
            x,
            rows,
            biases,
            schedule=schedule,
            rules=rules,
            rng=self.make_rng("dropout") if draws else None,
            unroll=c.num_layers if c.scan_unroll == -1 else c.scan_unroll,
        )
        outputs = jax.tree.map(lambda a: jnp.mean(a, axis=0), outputs)
        return pipelining.merge(rules, x), outputs

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` tokens of `batch_size` streams."""
        c = self.config
        return kv_cache.init(
            c.windows,
            tuple(c.layer_kinds.count(kind) for kind in c.kinds),
            batch_size=batch_size,
            length=length,
            num_kv_heads=c.kv_heads,
            head_dim=c.head_size,
            dtype=jnp.dtype(c.dtype),
            rules=self.rules,
        )

    def _per_layer(self) -> dict[str, Any]:
        c = self.config
        kinds = [c.kinds.index(kind) for kind in c.layer_kinds]
        places = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        several = len(c.kinds) > 1
        return {
            "kind": jnp.asarray(kinds, jnp.int32) if several else None,
            "layer": jnp.asarray(places, jnp.int32),
        }

    def _context(self, tokens: Tokens, masks: Any, biases: Any, train: bool) -> Context:
        """What the layers share on tokens that continue nothing."""
        return Context(masks, biases, **self._rotary(tokens.positions), index=None, train=train)

    def _rotary(self, where: Array) -> dict[str, Array | None]:
        c = self.config
        if c.positions != "rotary":
            return {"cos": None, "sin": None}
        tables = [
            pe.rotary_tables(
                where,
                *pe.rotary_frequencies(c.rotary, c.head_size, local=kind == "local"),
            )
            for kind in c.kinds
        ]
        cos, sin = zip(*tables, strict=True)
        return {"cos": jnp.stack(cos), "sin": jnp.stack(sin)}

    def _balances(self, inputs: Tokens, cache: Cache | None, train: bool) -> bool:
        """Whether the length stands in zig-zag order inside of the model.

        Not where bits of a dropout are drawn by place, nor where states are sown for others.
        """
        c = self.config
        random = train and (c.dropout > 0 or c.attention_dropout > 0)
        sown = self.is_mutable_collection("intermediates")
        fits = zigzag.fits(inputs.ids.shape[1], self.rules.size("length"))
        return c.sequence_balance and fits and cache is None and not (random or sown)

    def _bias(self, mask: Mask) -> jax.Array | None:
        kind = self.config.positions
        if kind not in ("relative", "alibi"):
            return None
        if mask.order:  # inside a segment, distance in positions is distance in places
            places = zigzag.places(mask.key_positions.shape[1], mask.order)
            distance = jnp.asarray(places[None, :] - places[:, None])[None]
        else:
            distance = mask.key_positions[:, None, :] - mask.query_positions[:, :, None]
        if kind == "relative":
            return self.relative(distance)
        slopes = pe.alibi_slopes(self.config.num_heads)
        return jnp.abs(distance)[:, None].astype(jnp.float32) * -slopes[:, None, None]


def _output(hidden: jax.Array, cache: Cache | None, reports: Any) -> Output:
    """reports: of experts, stacked over layers; None without any."""
    if reports is None:
        return Output(hidden=hidden, cache=cache)
    report = reports.mean()
    return Output(hidden=hidden, cache=cache, aux=report.aux, stats=report.stats)


def build(config: Config, rules: Rules) -> Decoder:
    """Raises ValueError where the mesh can't do what the config says."""
    schedule = pipelining.make_schedule(config.pipeline, config.num_layers, rules)
    period = len(config.layer_pattern) if len(config.kinds) > 1 else 1
    if schedule.num_stages > 1 and schedule.group_size % period:
        raise ValueError(
            f"config.model.layer_pattern ({period} layers) must divide the layers that a stage has "
            f"in each repeat ({schedule.group_size}): config.model.num_layers "
            f"({config.num_layers}) / (mesh stage ({schedule.num_stages}) * "
            f"config.model.pipeline.num_repeats ({schedule.num_repeats})), so that all stages "
            "run the same kind of layer at the same time"
        )
    kernels.check(
        config.attention_kernel,
        config.sequence_parallel,
        rules,
        head_dim=config.head_size,
        dtype=jnp.dtype(config.dtype),
        softcap=config.attention_softcap is not None,
        bias=config.positions in ("relative", "alibi"),
        dropout=config.attention_dropout > 0,
    )
    return Decoder(config, rules)
