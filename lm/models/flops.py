"""Parameters, FLOPs and bytes of a model by formula, from its Config alone.

FLOPs are model FLOPs: the products that the mathematics needs, at 2 for a multiplication and its
addition, without element-wise work and without what rematerialization computes again. The
compiler's count is no substitute: `cost_analysis()` counts the body of a scan once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lm.config.schema import OptimizerConfig
from lm.models.layouts import ModelLayout, Scores, layout

TABLES = ("embedding", "positions", "types", "head")  # groups with a row for each token or position
FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters by group: embedding, positions, types, attention, mlp, router,
    balance (selection biases), experts, norm, head, lstm, maps (between two widths), convolution;
    absent where none.

    active: those that one token meets, of the experts the fraction that it is sent to; tables count
    whole, as in the names of models (Mixtral's 12.9B, Qwen's A3B).
    """

    groups: dict[str, int]
    active: int

    @property
    def total(self) -> int:
        return sum(self.groups.values())

    @property
    def embedding(self) -> int:
        """Those of tables by token or position, an untied vocabulary projection included."""
        return sum(self.groups.get(name, 0) for name in TABLES)

    @property
    def non_embedding(self) -> int:
        """The rest: the N of scaling laws (arXiv:2001.08361) and of Qwen's model cards."""
        return self.total - self.embedding


def parameters(config: Any) -> ParameterCount:
    """The numbers of parameters of a model Config, equal to those of `model.init`."""
    groups: dict[str, int] = {}
    active = 0
    for weight in layout(config).weights:
        if weight.count:
            groups[weight.group] = groups.get(weight.group, 0) + weight.count
            experts = weight.group == "experts"
            active += round(weight.count * weight.uses) if experts else weight.count
    return ParameterCount(groups, active)


def mean_keys(length: int, *, window: int | None = None, causal: bool = True) -> float:
    """Keys that a query sees, averaged over the `length` positions of a row that is one document.

    Causal: the mean of min(t + 1, window) over t = 0 .. length - 1, which is (length + 1) / 2
    without a window. Otherwise a window sees window - 1 keys on either side.
    """
    reach = length if window is None else min(window, length)
    cut = reach * (reach - 1) / 2  # keys that the first queries lack to a full window
    if causal:
        return reach - cut / length
    return (2 * reach - 1) - 2 * cut / length


def flops_per_token(
    config: Any,
    length: int,
    encoder_length: int | None = None,
    *,
    training: bool = True,
    full_square: bool = False,
) -> float:
    """FLOPs for each token of rows of `length`; the backward pass, twice the forward, if training.

    An encoder's rows of `encoder_length` count for the tokens of the decoder's rows, which are
    those that are scored.

    Forward: 2 for every weight that the token is multiplied by, the vocabulary projection
    included, and 4 S N H for each layer's scores and weighted values, where S is the mean number
    of keys that causality and window leave (`mean_keys`). Documents packed into a row see fewer
    still; that is not counted off, so MFU means the same for all data.

    Experts count for the k that a token is sent to: places left empty by a capacity are not model
    FLOPs, nor is what an uneven load makes others wait for.

    full_square counts S = length instead, as appendix B of PaLM does (arXiv:2204.02311, 12 L H Q
    T for training), and with it most published MFU. Compare like with like: on scores without
    windows the default is (length + 1) / (2 length) of it, on the whole of GPT-2 124M at 1024 it
    is 0.93 of it and on Llama 3 8B at 8192 0.89.
    """
    parts = layout(config)
    lengths = {"inputs": length, "encoder": encoder_length or 0}
    share = lengths["encoder"] / length  # tokens of the encoder for each of the inputs
    flops = sum(2 * w.uses * w.count * (share if w.encoder else 1) for w in parts.weights)
    flops += sum(_score_flops(s, lengths, length, full_square) for s in parts.scores)
    return flops * (3 if training else 1)


def _score_flops(
    scores: Scores, lengths: Mapping[str, int], length: int, full_square: bool = False
) -> float:
    """Forward FLOPs of scores and weighted values for each of the `length` tokens of a row."""
    s = scores
    keys: float = lengths[s.keys]
    if not full_square and s.keys == s.queries and keys:
        keys = mean_keys(lengths[s.keys], window=s.window, causal=s.causal)
    return 4 * s.num_layers * s.num_heads * s.head_dim * keys * lengths[s.queries] / length


def training_flops_per_token(
    config: Any,
    sizes: Mapping[str, int],
    frozen: Collection[str],
    length: int,
    encoder_length: int | None = None,
    *,
    full_square: bool = False,
) -> float:
    """`flops_per_token` of training where some parameters are frozen, adapters among the others.

    sizes: the number of elements of every parameter by name; frozen: those without a gradient. A
    frozen weight is spared its own third of the FLOPs. The third of its input's gradient is needed
    as long as something is trained in its own layers or before: with a trained head on a frozen
    body there is no backward pass but the head's.
    """
    parts = layout(config)
    trained = {_stage(name) for name in sizes if name not in frozen}
    flows = {
        stage: any(s in trained for s in STAGES[: i + (stage != "head")])
        for i, stage in enumerate(STAGES)
    }
    total = 0.0
    for name, size in sizes.items():
        uses, stage = _uses(name, parts, length, encoder_length or 0), _product_stage(name)
        total += 2 * size * uses * (1 + (name not in frozen) + flows[stage])
    lengths = {"inputs": length, "encoder": encoder_length or 0}
    for s in parts.scores:
        flow = flows["encoder" if s.queries == "encoder" else "layers"]
        total += _score_flops(s, lengths, length, full_square) * (1 + 2 * flow)
    return total


STAGES = ("embedding", "encoder", "layers", "norm", "head")  # in the order of the forward pass


def _stage(name: str) -> str:
    """The stage of a model that a parameter belongs to, by its name."""
    first = name.split(".")[0]
    if first in ("embedding", "embedding_norm", "position", "type"):
        return "embedding"
    if first in ("head", "head_bias", "transform", "transform_norm", "logit_bias", "pooler"):
        return "head"
    if first == "norm" or name.startswith("decoder.norm."):
        return "norm"
    return "encoder" if first == "encoder" else "layers"


def _product_stage(name: str) -> str:
    """The stage in which a token is multiplied by a parameter: a tied table serves as head, and
    cross-attention's keys and values are made of the encoder's tokens.
    """
    if name == "embedding.weight":
        return "head"
    return "encoder" if _of_encoder(name) else _stage(name)


def _of_encoder(name: str) -> bool:
    cross = any(f".cross_attention.{kind}." in name for kind in ("key", "value"))
    return cross or name.startswith("encoder.")


def _uses(name: str, parts: ModelLayout, length: int, encoder_length: int) -> float:
    """Times that a token is multiplied by a parameter, as the layout says of its group."""
    first, last = name.split(".")[0], name.rsplit(".", 1)[-1]
    scale = encoder_length / length if _of_encoder(name) else 1.0
    if last in ("bias", "scale", "selection_bias") or "bias" in first:
        return 0.0
    if first in ("position", "type", "pooler") or ".relative." in f".{name}":
        return 0.0
    group = "experts" if ".moe." in name and last in ("gate", "up", "down") else ""
    group = "embedding" if first == "embedding" else group
    if group:
        return scale * next(w.uses for w in parts.weights if w.group == group)
    return scale


def parameter_bytes(config: Any, bytes_per_parameter: int = FLOAT32_BYTES) -> int:
    """Bytes of the parameters (float32 in training) or, the same, of their gradients."""
    return parameters(config).total * bytes_per_parameter


# Moments that an optimizer keeps for each parameter: (of a matrix inside a layer, of any other).
OPTIMIZER_SLOTS = {"adamw": (2, 2), "lion": (1, 1), "sgd": (1, 1), "muon": (1, 2)}


def optimizer_bytes(config: Any, optimizer: OptimizerConfig) -> int:
    """Bytes of the optimizer's state, averaged weights (`ema_decay`) included, scalars not.
    Moments are of `moment_dtype`, averaged weights float32.

    Raises:
        ValueError: an optimizer whose state depends on shapes.
    """
    if optimizer.name not in OPTIMIZER_SLOTS:
        raise ValueError(
            f"config.optimizer.name ({optimizer.name}): no formula for its state; "
            "jax.eval_shape of the optimizer's init gives it"
        )
    matrices = sum(w.count for w in layout(config).weights if w.uses and w.group not in TABLES)
    total = parameters(config).total
    of_matrix, of_other = OPTIMIZER_SLOTS[optimizer.name]
    steered = sum(w.count for w in layout(config).weights if w.group == "balance")  # stateless
    slots = of_matrix * matrices + of_other * (total - matrices - steered)
    of_moment = 2 if optimizer.moment_dtype == "bfloat16" else FLOAT32_BYTES
    return of_moment * slots + FLOAT32_BYTES * (total if optimizer.ema_decay else 0)


def kv_cache_bytes(
    config: Any,
    length: int,
    encoder_length: int | None = None,
    *,
    batch_size: int = 1,
    bytes_per_value: int = FLOAT32_BYTES,
) -> int:
    """Bytes of the keys and values of `batch_size` streams of `length` tokens (windows: fewer), and
    of those that cross-attention makes of `encoder_length` tokens.
    """
    lengths = {"inputs": length, "encoder": encoder_length or 0}
    slots = sum(
        s.num_layers
        * s.num_kv_heads
        * s.head_dim
        * min(s.window or lengths[s.keys], lengths[s.keys])
        for s in layout(config).scores
        if s.queries == "inputs"
    )
    return 2 * batch_size * slots * bytes_per_value


# Dense bfloat16 FLOP/s of one jax device, by the start of its `device_kind`.
PEAK_FLOPS = {
    # https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the page of each version.
    # The figures there are per chip; on v2, v3 and TPU7x a chip is two jax devices, one for each
    # of its cores.
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v4 lite": 137e12,  # jax, pallas/mosaic/tpu_info.py
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # what v5p calls itself
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    # NVIDIA's data sheets, which print twice as much for A100 and later: with structured
    # sparsity.
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989.4e12,  # SXM: "NVIDIA H100 80GB HBM3"
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,  # SXM: the same chip with more memory
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GH200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    # Ada and Ampere GA102 white papers, accumulating in float32.
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA RTX A6000": 154.8e12,
}


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """FLOP/s that a jax device can reach at most, or None where it isn't known.

    Known for bfloat16 alone: a float32 product is TF32, several bfloat16 passes or the real
    thing, depending on chip and precision. Of several names that fit ("NVIDIA H100", "NVIDIA H100
    PCIe") the longest counts. A MIG slice is a part of a chip, and unknown.
    """
    if dtype != "bfloat16" or " MIG " in device_kind:
        return None
    fits = [k for k in PEAK_FLOPS if device_kind == k or device_kind.startswith((k + " ", k + "-"))]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None
