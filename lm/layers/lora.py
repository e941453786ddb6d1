"""Low-rank adapters of linear maps (arXiv:2106.09685): W + alpha / rank * A B with W frozen.

The map is applied as x W + (x A) B, so that neither the sum of the weights nor a gradient of the
size of W ever exists in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp

from lm.config.fields import field
from lm.optim import param_tree
from lm.types import Params

NAMES = ("lora_a", "lora_b")  # parameters beside the `weight` of a linear map


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = field(0, "Columns of A and rows of B; 0: no adapters.", ge=0)
    alpha: float = field(16.0, "The adapter's product counts alpha / rank times.", gt=0)
    targets: tuple[str, ...] = field(
        ("query", "value"), "Linear maps that get one: query key value out up gate down head."
    )
    dropout: float = field(0.0, "Dropout of the adapters' inputs.", ge=0, lt=1)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapters(names: Iterable[str]) -> frozenset[str]:
    """The names of adapters' parameters among `names`."""
    return frozenset(name for name in names if name.rsplit(".", 1)[-1] in NAMES)


def check_targets(config: LoraConfig, names: Iterable[str]) -> None:
    """Raise ValueError unless each target has an adapter among the names of a model's
    parameters.
    """
    names = list(names)
    for target in config.targets:
        if not any(f".{name}".endswith(f".{target}.{NAMES[0]}") for name in names):
            there = {n.split(".")[-2] for n in names if n.endswith(".weight") and "." in n}
            raise ValueError(
                f"config.model.lora.targets: no linear map of this model is named {target!r}; "
                f"weights are those of {', '.join(sorted(there - {'embedding'}))}"
            )


def merge(config: LoraConfig, params: Params) -> Params:
    """Parameters without adapters that compute the same: each weight plus its adapter's product.

    Leaves are [*stack, *in, rank], [*stack, rank, *out] and [*stack, *in, *out].
    """
    leaves = param_tree.flatten(params)
    merged = {name: leaf for name, leaf in leaves.items() if name not in adapters(leaves)}
    for name in adapters(leaves):
        if not name.endswith(NAMES[0]):
            continue
        owner = name.removesuffix(NAMES[0])
        weight, a, b = (leaves[owner + leaf] for leaf in ("weight", *NAMES))
        num_in = weight.ndim - b.ndim + 1
        stack = weight.shape[: a.ndim - 1 - num_in]
        product = jnp.matmul(
            a.reshape(*stack, -1, config.rank),
            b.reshape(*stack, config.rank, -1),
            precision="highest",
        )
        merged[f"{owner}weight"] = weight + config.scale * product.reshape(weight.shape)
    return param_tree.unflatten(dict(sorted(merged.items())))
