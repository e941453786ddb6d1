"""Memory and time of a step by formula, in a millisecond: to prune candidates before compiling.

The arithmetic of a decoder: state in shards, saved activations of each token and layer, two layers'
gathered parameters, a chunk of logits; products at the peak and the bubble of a pipeline,
parameters over `fsdp`, activations over `tensor` and `stage`, tokens over `expert`, keys and values
over `sequence`, gradients over `data`. Fusion, fragmentation and kernels are not modelled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from lm.compiled import interconnect
from lm.compiled.topology import Topology
from lm.config.schema import Config
from lm.layers.block import BlockConfig
from lm.layers.mlp import ACTIVATIONS
from lm.models import flops
from lm.parallel import pipeline_stages, sharding

HALF, FULL = 2, 4  # bytes of bfloat16 and float32
# Chips of a 3D torus among which libtpu 0.0.42 gathers; among more it adds up zeros, in twice the
# bytes (seen on v5p with 64 and more, never on the 2D tori of v5e and v6e).
WIDEST_GATHER = 32
# FLOPs of a step with each policy over the model's: the backward pass recomputes activations.
AGAIN = {"none": 1.0, "dots": 1.03, "projections": 1.05, "attended": 1.3, "full": 1.33}

NARROW_TYPES = {"int8": "s8", "fp8": "f8"}  # of products of a quantization


@dataclasses.dataclass(frozen=True)
class Estimate:
    memory: float  # bytes of a device
    parts: dict[str, float]  # seconds: compute, and links or network by axis

    @property
    def seconds(self) -> float:
        """Half of what could overlap does."""
        return (max(self.parts.values()) + sum(self.parts.values())) / 2


def saved(config: BlockConfig, remat: str) -> float:
    """Values that the forward pass saves of each token of a layer, by remat policy."""
    c = config
    heads, kv, width = c.num_heads * c.head_size, c.kv_heads * c.head_size, c.embed_dim
    inner = (2 if ACTIVATIONS[c.activation][1] else 1) * c.mlp_size
    projections = heads + 2 * kv + heads + inner
    return {
        "full": width,
        "attended": width + heads,
        "projections": width + projections,
        "dots": 3 * width + projections,
        "none": 6 * width + 2 * projections + c.mlp_size,
    }.get(remat, width)


def estimate(
    config: Config,
    batch_size: int,
    topology: Topology,
    rules: sharding.Rules,
    *,
    coords: Sequence[interconnect.ChipCoord],
    frozen: Collection[str] = (),
) -> Estimate:
    """The estimate of a train step on the mesh of `rules`, with its devices at `coords`.

    frozen: names of the parameters without a gradient and an optimizer state.
    """
    mesh, c = rules.mesh.shape, config.model
    tensor, stage, fsdp = mesh["tensor"], mesh["stage"], mesh["fsdp"]
    count = flops.parameters(c)
    tokens = batch_size * config.data.length / rules.size("batch") / mesh["sequence"]
    micro = tokens / config.train.num_microbatches
    kept = sum(p.size for p in flops.abstract_parameters(c) if p.name in frozen)
    trained = 1 - kept / count.total  # as a part of every shard
    experts = count.groups.get("experts", 0)
    # of a device with all shards of fsdp; embedding and head are on every stage
    layers = (count.non_embedding - experts + experts / mesh["expert"]) / stage
    whole = (count.embedding + layers) / tensor
    moments = trained * flops.optimizer_bytes(c, config.optimizer) / count.total
    held = whole / fsdp * FULL
    layer = layers * stage / c.num_layers / tensor
    table = c.vocab_size * c.embed_dim / tensor
    chunk = min(config.loss.chunk_size or micro, micro) * c.vocab_size / tensor
    memory = (
        (held if config.mesh.zero == 3 else held * fsdp)
        + (moments * whole / fsdp if config.optimizer.memory == "device" else 0.0)
        + trained * held * (2 if config.train.num_microbatches > 1 else 1)
        + micro * saved(c, c.remat) / tensor * c.num_layers / stage * HALF
        + 4 * layer * HALF
        + table * (HALF + FULL)
        + 2 * chunk * FULL
    )
    peak = topology.chip.peak_flops(c.dtype)
    if peak is None:
        raise ValueError(
            f"config.model.dtype ({c.dtype}): no published peak for {topology.chip.name} in it"
            f"{topology.chip.dtype_with_peak()}"
        )
    lengths = config.data.length, config.data.encoder_length
    one = flops.flops_per_token(c, *lengths, frozen=frozen)
    done = one * batch_size * config.data.length
    pipeline = pipeline_stages.make_schedule(c.pipeline, c.num_layers, rules)
    compute = done * AGAIN.get(c.remat, 1.0) / rules.mesh.size / peak
    narrow = NARROW_TYPES.get(c.quantization.format, "")
    products = 6 if c.quantization.weight_gradients else 4
    in_8_bits = products * (count.groups.get("attention", 0) + count.groups.get("mlp", 0))
    if experts:  # see lm.kernels.quantized_grouped_matmul and lm.kernels.grouped_matmul_gpu
        share = c.moe.num_experts_per_token / c.moe.num_experts
        on_tpu = topology.chip.platform == "tpu"
        of_experts = min(products, 4) if on_tpu else (0 if narrow == "f8" else products)
        in_8_bits += of_experts * experts * share
    compute *= 1 - (1 - 1 / topology.chip.speedup(narrow)) * min(1.0, in_8_bits / one)
    update = flops.update_cost(c, config.optimizer)
    own = trained * update.flops / rules.mesh.size / peak
    parts = {"compute": compute / (1 - pipeline.bubble) + own}
    turns = pipeline.num_iterations if stage > 1 else 1
    runs = 3 + (c.remat == "full")  # of a layer's exchanges: forward, backward, recomputation
    depth = c.num_layers / stage
    key_values = 2 * tokens * mesh["sequence"] * c.kv_heads * c.head_size / tensor
    routed = tokens * c.moe.num_experts_per_token * c.embed_dim if c.moe.num_experts else 0
    sent = {
        # gathered for the forward and the backward pass, and gradients scattered, per micro-batch
        "fsdp": (2 + trained) * config.train.num_microbatches * turns * whole * HALF,
        "data": 2 * trained * held,
        # gather and scatter around attention and MLP
        "tensor": 4 * runs * depth * tokens * c.embed_dim * HALF,
        "sequence": runs * depth * key_values * HALF + 2 * trained * held,
        "expert": 2 * runs * depth * routed * HALF,
        "stage": 2 * turns / pipeline.num_microbatches * tokens * c.embed_dim * HALF,
    }
    part = trained * held / FULL / count.total  # of the parameters, on a device
    replicas = mesh["data"] * mesh["sequence"] if update.gathered else 1
    sent["fsdp" if fsdp > 1 else "tensor"] += update.exchanged * part / replicas
    sent["data"] += update.gathered * part
    if fsdp > WIDEST_GATHER and topology.chip.dims == 3:
        sent["fsdp"] *= 2
    sizes = list(mesh.values())
    for axis, size in sent.items():
        if mesh[axis] > 1:
            stride = math.prod(sizes[list(mesh).index(axis) + 1 :])
            path = interconnect.path(topology, coords[: stride * mesh[axis] : stride])
            moved = size * (1 if axis == "stage" else (mesh[axis] - 1) / mesh[axis])
            rate = path.exchange if axis == "expert" else path.bandwidth
            parts[axis] = moved / rate if rate else math.inf
    return Estimate(memory, parts)
