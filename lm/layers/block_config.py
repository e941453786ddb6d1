"""The config that all transformers share."""

from __future__ import annotations

import dataclasses
import itertools

from lm.config.fields import field
from lm.kernels import attention_kernels
from lm.kernels.quantization import NO_QUANTIZATION, QuantizationConfig
from lm.layers import positions as pe
from lm.layers.attention_scores import AttentionScores, Heads
from lm.layers.base_config import BaseConfig, require
from lm.layers.lora import LoraConfig
from lm.layers.mlp import ACTIVATIONS
from lm.layers.moe.moe import MoeConfig
from lm.layers.norm import KINDS as NORMS
from lm.layers.stack import REMAT
from lm.optim.parametrization import STANDARD, TABLES, Scaling

PLACEMENTS = ("pre", "post", "both")


@dataclasses.dataclass(frozen=True)
class BlockConfig(BaseConfig):
    """Config that all transformers share; each adds its own fields."""

    max_length: int = field(1024, "Longest row; the table size of learned positions.", ge=1)
    num_heads: int = field(12, "Query heads.", ge=1)
    num_kv_heads: int | None = field(None, "Key and value heads; unset: num_heads.", ge=1)
    head_dim: int | None = field(None, "Width of a head; unset: embed_dim / num_heads.", ge=1)
    mlp_dim: int | None = field(None, "Width of the MLP; unset: 4 * embed_dim.", ge=1)
    moe: MoeConfig = field(MoeConfig(), "Mixture of experts in place of the MLP.")
    activation: str = field("gelu", "Activation of the MLP.", choices=ACTIVATIONS)
    norm: str = field("rms", "Normalization.", choices=NORMS)
    norm_placement: str = field(
        "pre", "pre, post (of 2017), or both (around each sublayer).", choices=PLACEMENTS
    )
    norm_eps: float = field(1e-6, "Added to the variance.", gt=0)
    norm_bias: bool = field(False, "Norms have a bias.")
    positions: str = field("rotary", "Positional encoding.", choices=pe.KINDS)
    rotary: pe.RotaryConfig = field(pe.RotaryConfig(), "Rotary positions.")
    relative_buckets: int = field(32, "relative: buckets of distance.", ge=2)
    relative_max_distance: int = field(
        128, "relative: distance from which all share a bucket.", ge=1
    )
    layer_pattern: tuple[str, ...] = field(
        ("global",), "Kinds of layer, repeated over the depth.", choices=("global", "local")
    )
    window: int | None = field(None, "Keys that a local layer sees, itself included.", ge=1)
    qk_norm: bool = field(False, "RMS norm on queries and keys of each head.")
    qkv_bias: bool = field(False, "Biases on query, key and value.")
    out_bias: bool = field(False, "Bias on the attention output.")
    mlp_bias: bool = field(False, "Biases in the MLP.")
    query_scale: float | None = field(None, "Factor on the scores; unset: head_dim ** -0.5.", gt=0)
    attention_softcap: float | None = field(None, "Soft cap of the scores.", gt=0)
    parallel_block: bool = field(False, "Attention and MLP read the same input (GPT-J, PaLM).")
    attention_dropout: float = field(0.0, "Dropout of attention weights.", ge=0, lt=1)
    attention_kernel: str = field(
        "auto",
        "xla, splash (TPU), flash (GPU, 16 bits; both are interpreted on CPU) or cudnn (GPU, "
        "bfloat16, with a mask of all pairs); auto: splash on TPU and flash on GPU where they can "
        "do what is asked, else xla.",
        choices=attention_kernels.KERNELS,
    )
    sequence_parallel: str = field(
        "gather",
        "mesh.sequence > 1: gather all keys and values, or pass them on in a ring.",
        choices=attention_kernels.SEQUENCE_PARALLEL,
    )
    init_std: float | None = field(
        0.02, "Deviation of initial weights; unset: fan_in ** -0.5.", gt=0
    )
    parametrization: str = field(
        "standard",
        "How weights and steps change with the size; lm/optim/parametrization.py has the tables.",
        choices=TABLES,
    )
    base_embed_dim: int | None = field(None, "mup: embed_dim of the tuned model.", ge=1)
    base_num_layers: int | None = field(None, "mup: num_layers of the tuned model.", ge=1)
    base_head_dim: int | None = field(None, "mup: head_dim of the tuned model.", ge=1)
    lora: LoraConfig = field(LoraConfig(), "Low-rank adapters; with a rank, the rest is frozen.")
    quantization: QuantizationConfig = field(
        NO_QUANTIZATION, "Products with the matrices of the layers in 8 or 4 bits."
    )
    remat: str = field("none", "Activations saved for the backward pass.", choices=REMAT)

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
        return tuple(itertools.islice(itertools.cycle(self.layer_pattern), self.num_layers))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each of `kinds`."""
        return tuple(self.window if kind == "local" else None for kind in self.kinds)

    @property
    def score_scale(self) -> float:
        """Factor on the products of queries and keys."""
        usual = self.head_size**-0.5 if self.query_scale is None else self.query_scale
        return self.scaling.scores * usual

    @property
    def attention_scores(self) -> tuple[AttentionScores, ...]:
        """The scores of self-attention in the layers of each of `kinds`."""
        heads = Heads(
            self.num_heads,
            self.kv_heads,
            self.head_size,
            scale=self.score_scale,
            window=None,
            softcap=self.attention_softcap,
            bias=self.positions in ("relative", "alibi"),
            kernel=self.attention_kernel,
            causal=self.is_causal,
        )
        return tuple(
            AttentionScores(dataclasses.replace(heads, window=window), self.layer_kinds.count(kind))
            for kind, window in zip(self.kinds, self.windows, strict=True)
        )

    def check(self, length: int) -> None:
        """As `BaseConfig.check`."""
        super().check(length)
        require(
            self.positions != "relative" or self.relative_buckets < 2 * self.relative_max_distance,
            f"relative_buckets ({self.relative_buckets}) must be less than twice "
            f"relative_max_distance ({self.relative_max_distance})",
        )
        require(
            self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"embed_dim ({self.embed_dim}) must be divisible by num_heads ({self.num_heads}), "
            "or set head_dim",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"num_heads ({self.num_heads}) must be divisible by num_kv_heads ({self.kv_heads})",
        )
        require(
            self.positions != "rotary" or self.head_size % 2 == 0,
            f"head_dim ({self.head_size}) must be even for rotary positions",
        )
        require(
            self.positions != "sinusoidal" or self.embed_dim % 2 == 0,
            f"embed_dim ({self.embed_dim}) must be even for sinusoidal positions",
        )
        require(bool(self.layer_pattern), "layer_pattern must list global and local, got ()")
        require(
            ("local" in self.layer_pattern) == (self.window is not None),
            f"window ({self.window}) and layer_pattern {self.layer_pattern} must agree: "
            "local layers, and only they, need one",
        )
        if self.parametrization != "standard":
            self._check_parametrization()
        if self.moe.num_experts:
            self.moe.check()
        require(
            not self.lora.rank or bool(self.lora.targets),
            f"lora.targets ({self.lora.targets}) must be given with a rank ({self.lora.rank})",
        )
        require(
            not (self.moe.num_experts and self.mlp_bias),
            f"mlp_bias must be False with moe.num_experts ({self.moe.num_experts}): experts have "
            "no biases",
        )
        self._check_quantization(length)
        require(
            length <= self.max_length,
            f"max_length ({self.max_length}) must be at least config.data.length ({length})",
        )

    def _check_quantization(self, length: int) -> None:
        q = self.quantization
        if q.block == 1:
            return
        q.check_length(length, "config.data.length")
        require(
            q.scales == "row",
            f"quantization.scales ({q.scales}) must be row for quantization.format={q.format}, "
            f"which has a scale for each {q.block} numbers",
        )
        sizes = {
            "embed_dim": self.embed_dim,
            "num_heads * head_dim": self.num_heads * self.head_size,
            "num_kv_heads * head_dim": self.kv_heads * self.head_size,
        }
        if not self.moe.num_experts:
            sizes["mlp_dim"] = self.mlp_size
        else:
            require(
                not q.weight_gradients,
                "quantization.weight_gradients (True) must be False for "
                f"quantization.format={q.format} with moe.num_experts ({self.moe.num_experts}): "
                f"blocks of {q.block} rows would be of several experts",
            )
            sizes["mlp_dim" if self.moe.mlp_dim is None else "moe.mlp_dim"] = self.expert_size
            sizes["moe.shared_mlp_dim"] = self.moe.shared_mlp_dim
        for name, size in sizes.items():
            require(
                size % q.block == 0,
                f"{name} ({size}) must be divisible by the {q.block} numbers that share a scale "
                f"of quantization.format={q.format}",
            )

    def _check_parametrization(self) -> None:
        name = self.parametrization
        for base in ("base_embed_dim", "base_num_layers", "base_head_dim"):
            require(
                getattr(self, base) is not None, f"{base} must be given for parametrization={name}"
            )
        scaling = self.scaling
        require(
            self.query_scale is None or scaling.head == 1,
            f"query_scale ({self.query_scale}) must be unset for parametrization={name} where "
            f"head_dim ({self.head_size}) is not base_head_dim ({self.base_head_dim})",
        )
        require(
            self.norm_placement != "post" or scaling.depth == 1,
            f"num_layers ({self.num_layers}) must be base_num_layers ({self.base_num_layers}) for "
            f"parametrization={name} and norm_placement=post: norms undo what depth does to "
            "branches",
        )
        require(
            not self.lora.rank,
            f"lora.rank ({self.lora.rank}) must be 0 for parametrization={name}, whose table has "
            "no row for adapters",
        )
