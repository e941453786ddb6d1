"""Parameters, FLOPs and bytes of a model, counted from the abstract parameters of its Config.

FLOPs are model FLOPs: the products that the mathematics needs, at 2 for a multiplication and its
addition, without element-wise work and without what rematerialization computes again. The
compiler's count is no substitute: `cost_analysis()` counts the body of a scan once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType

from lm.config.components import COMPONENTS, component
from lm.config.schema import OptimizerConfig
from lm.layers.block_config import BlockConfig
from lm.models import ModelConfig, check_axes, init_params
from lm.optim import chain, param_tree, parametrization
from lm.optim.optimizers import UpdateCost
from lm.parallel.sharding import AXES, DEFAULT_TABLE, Rules
from lm.telemetry.energy import of_kind
from lm.types import Params

TABLES = ("embedding", "positions", "types", "head")  # groups with a row for each token or position
STAGES = ("embedding", "encoder", "layers", "norm", "head")  # in the order of the forward pass

# The group of a parameter and its stage, None being that of its layers, by its name: the first that
# fits, else by its role, else the module's name.
_PARTS = (
    (r"^(decoder\.)?norm\.", "norm", "norm"),
    (r"^transform_norm\.", "norm", "head"),
    (r"^embedding_norm\.", "norm", "embedding"),
    (r"norm\.(scale|bias)$", "norm", None),
    (r"\bselection_bias$", "router_bias", None),
    (r"\brelative\.", "positions", None),
    (r"^(\w+[_.])?position\.", "positions", "embedding"),
    (r"^type\.", "types", "embedding"),
    (r"^(head|head_bias|transform|logit_bias|logit_scale|pooler)(\.|$)", "head", "head"),
    (r"attention\.", "attention", None),
    (r"\bshared\.", "mlp", None),
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a model, by name, with its logical axes."""

    name: str
    size: int
    axes: tuple[str | None, ...]

    @functools.cached_property
    def role(self) -> str:
        """Its row in the tables of `lm.optim.parametrization`."""
        return parametrization.role(self.name.split("."), self.axes)

    @functools.cached_property
    def is_expert(self) -> bool:
        return "expert" in self.axes[:-1]

    @functools.cached_property
    def _part(self) -> tuple[str, str | None]:
        for pattern, group, stage in _PARTS:
            if re.search(pattern, self.name):
                return group, stage
        if self.is_expert or self.role == "router":
            return "experts" if self.is_expert else "router", None
        if self.role in ("embedding", "head"):
            return self.role, self.role
        around = ("encoder", "decoder", "vision", "text", "layers")
        modules = [n for n in self.name.split(".") if n not in around]
        return modules[0], None

    @property
    def group(self) -> str:
        """The part of the model that it belongs to."""
        return self._part[0]

    @functools.cached_property
    def reads_encoder(self) -> bool:
        """True if the tokens of the encoder are multiplied by it: cross-attention makes its keys
        and values of them.
        """
        cross = re.search(r"\.cross_attention\.(key|value)\.", self.name)
        return bool(cross) or self.name.startswith("encoder.")

    @property
    def stage(self) -> str:
        """The first stage of the forward pass that depends on it."""
        return self._part[1] or ("encoder" if self.name.startswith("encoder.") else "layers")


@functools.lru_cache(maxsize=1024)
def _boxed_parameters(config: ModelConfig) -> Params:
    # no devices: a config file may count before the processes of a run have met
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    rules = Rules(mesh, tuple(DEFAULT_TABLE.items()))  # pyright: ignore
    module = type(config).__module__
    model = sys.modules[module].build(config, rules)
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(functools.partial(init_params, model), key)
    check_axes(boxed, module)
    return boxed


def named_parameters(boxed: Params) -> tuple[Parameter, ...]:
    """The `Parameter` of every leaf of a tree of boxes, arrays or abstract ones."""
    leaves: dict[str, nn.Partitioned] = param_tree.flatten(boxed)
    return tuple(Parameter(n, math.prod(x.value.shape), x.names) for n, x in leaves.items())


@functools.lru_cache(maxsize=1024)
def abstract_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The parameters of the model that the module of a Config builds, adapters among them, traced
    on no device.
    """
    return named_parameters(_boxed_parameters(_without_execution(config)))


def _without_execution(config: ModelConfig) -> ModelConfig:
    """The config with the fields that change no parameter at one value, as a key of caches."""
    if not isinstance(config, BlockConfig):
        return config
    pipeline = getattr(config, "pipeline", None)
    own = {} if pipeline is None else {"pipeline": type(pipeline)()}
    execution = {"remat": "none", "scan_unroll": 1, "sequence_parallel": "gather"}
    return dataclasses.replace(config, attention_kernel="xla", **execution, **own)


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters by group: embedding, positions, types, attention, mlp, router, router_bias,
    experts, norm, head; others are named after their module. Absent where none.

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


@functools.lru_cache(maxsize=1024)
def parameters(config: ModelConfig) -> ParameterCount:
    """The numbers of parameters of the model of a Config, adapters among them."""
    groups, active = Counter[str](), 0
    for p in abstract_parameters(config):
        groups[p.group] += p.size
        active += round(p.size * _expert_share(config)) if p.is_expert else p.size
    return ParameterCount(dict(groups), active)


def _expert_share(config: ModelConfig) -> float:
    """The experts that a token is sent to, as a fraction of all."""
    moe = getattr(config, "moe", None)
    if moe is None:
        raise ValueError(
            f"{type(config).__module__}: a parameter has the logical axis `expert`, and the Config "
            "no `moe` with num_experts and num_experts_per_token"
        )
    return moe.num_experts_per_token / moe.num_experts


def flops_per_token(
    config: ModelConfig,
    length: int,
    encoder_length: int | None = None,
    *,
    training: bool = True,
    full_square: bool = False,
    parameters: Sequence[Parameter] | None = None,
    frozen: Collection[str] = (),
) -> float:
    """FLOPs for each token of rows of `length`; the backward pass, twice the forward, if training.

    An encoder's rows of `encoder_length` count for the tokens of the decoder's rows, which are
    those that are scored.

    Forward: 2 for every weight that the token is multiplied by, the vocabulary projection
    included, and 4 S N H for each layer's scores and weighted values, where S is the mean number
    of keys that causality and window leave (`mean_keys`). Documents packed into a row see fewer
    still; that is not counted off, so MFU means the same for all data. Experts count for the k that
    a token is sent to, whatever their capacity and load.

    full_square: S = length instead, as in appendix B of PaLM (arXiv:2204.02311) and most published
    MFU. On scores without windows the default is (length + 1) / (2 length) of it, on the whole of
    GPT-2 124M at 1024 it is 0.93 of it and on Llama 3 8B at 8192 0.89.
    parameters: unset: `abstract_parameters(config)`.
    frozen: names of parameters without a gradient, which are spared that third of their FLOPs. The
    third of their input's gradient is needed as long as something is trained in their own layers or
    before: with a trained head on a frozen body there is no backward pass but the head's.
    """
    parameters = abstract_parameters(config) if parameters is None else parameters
    lengths = {"inputs": length, "encoder": encoder_length or 0}
    lengths["image"] = getattr(config, "image_length", 0)
    share = lengths["encoder"] / length  # tokens of the encoder for each of the inputs
    trained = {p.stage for p in parameters if p.name not in frozen}
    flows = {
        stage: training and bool(trained & set(STAGES[: i + (stage != "head")]))
        for i, stage in enumerate(STAGES)
    }
    is_tied = all(getattr(config, name, True) for name in ("has_head", "tie_embeddings"))
    is_tied = is_tied and all(p.role != "head" for p in parameters)
    image_positions = getattr(config, "image_positions", lambda name: None)
    total = 0.0
    for p in parameters:
        if p.role == "vector" or p.name.startswith("pooler."):  # one token of a segment is pooled
            continue
        uses = _expert_share(config) if p.is_expert else 1.0
        stage = "encoder" if p.reads_encoder else p.stage
        if p.role == "embedding":  # a table is looked up, but for the projection to its rows
            if not is_tied or "vocab" not in p.axes:
                continue
            stage = "head"
        uses *= share if p.reads_encoder else 1.0
        if (positions := image_positions(p.name)) is not None:
            uses *= positions / length
        gradient = training and p.name not in frozen
        total += 2 * p.size * uses * (1 + gradient + flows[stage])
    for scores in getattr(config, "attention_scores", ()):
        flow = flows["encoder" if scores.queries == "encoder" else "layers"]
        total += scores.flops_per_token(lengths, full_square) * (1 + 2 * flow)
    return total


def optimizer_bytes(config: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Bytes of the optimizer's state when all parameters are trained."""
    schedule = dataclasses.replace(optimizer.schedule, kind="constant", warmup_steps=0)
    pruning = dataclasses.replace(optimizer.pruning, start_step=0, ramp_steps=0)
    return _optimizer_bytes(
        _without_execution(config),
        dataclasses.replace(optimizer, schedule=schedule, pruning=pruning),
    )


@functools.lru_cache(maxsize=1024)
def _optimizer_bytes(config: ModelConfig, optimizer: OptimizerConfig) -> int:
    boxed = _boxed_parameters(config)
    init = chain.make_optimizer(optimizer, boxed, num_steps=1).init
    state = jax.tree.leaves(jax.eval_shape(init, nn.meta.unbox(boxed)))
    return sum(x.size * x.dtype.itemsize for x in state)


def update_cost(config: ModelConfig, optimizer: OptimizerConfig) -> UpdateCost:
    """The cost of an update when all parameters are trained."""
    module = component(COMPONENTS["optimizer"], optimizer.name)
    if not hasattr(module, "update_cost"):
        return UpdateCost()
    boxed = _boxed_parameters(_without_execution(config))
    leaves, roles = jax.tree.leaves(boxed, is_leaf=param_tree.is_box), chain.parameter_roles(boxed)
    pairs = zip(leaves, jax.tree.leaves(roles), strict=True)
    return module.update_cost(optimizer, [leaf for leaf, role in pairs if role == "matrix"])


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
    thing, depending on chip and precision.
    """
    if dtype != "bfloat16":
        return None
    return of_kind(PEAK_FLOPS, device_kind)
