"""Layers stacked along a leading axis and scanned, so that compile time doesn't grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_policies = jax.checkpoint_policies
PROJECTIONS = ("query", "key", "value", "attended", "up", "gate")


def _on_host(*names: str) -> Any:
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=names,
        offload_src="device",
        offload_dst="pinned_host",
    )


# What the backward pass finds saved of each layer; everything else is computed again. `attended` is
# what an attention kernel leaves for its gradient: without it the kernel runs twice.
REMAT: dict[str, Any] = {
    "none": None,  # everything is saved
    "dots": _policies.dots_with_no_batch_dims_saveable,  # products with weights
    "projections": _policies.save_only_these_names(*PROJECTIONS),
    "attended": _policies.save_only_these_names("attended"),
    "full": _policies.nothing_saveable,  # only the layer's input
    "offload": _on_host("input"),  # as full, the input on the host
    "offload_attended": _on_host("input", "attended"),
    "offload_projections": _on_host("input", *PROJECTIONS),
}


def stack(
    block: Callable[..., nn.Module], num_layers: int, *, remat: str = "none", unroll: int = 1
) -> Callable[..., nn.Module]:
    """The module of `num_layers` blocks with parameters stacked as [L, ...] under the logical axis
    `layers`.

    A block is called as `block(carry, per_layer, shared) -> (carry, outputs)`; `per_layer` and
    `outputs` have a leading [L]. `unroll` layers make up one iteration; with all of them there is
    no loop left.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT[remat], prevent_cse=unroll > 1)  # pyright: ignore
    return nn.scan(
        block,  # pyright: ignore
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore
        length=num_layers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def run(
    layers: nn.Module, block: nn.Module, carry: Any, per_layer: Any, shared: Any
) -> tuple[Any, Any]:
    """(carry, outputs [L, ...]) of a stack of layers, each a `block` (one that is not bound).

    With parameters of L layers, as `lm.optim.param_tree.unstack_layers` makes them of [L, ...]
    ones, there is no loop, and nothing random.
    """
    own = {} if layers.is_initializing() else layers.variables["params"]
    if "0" not in own:
        return layers(carry, per_layer, shared)  # pyright: ignore
    outputs = []
    for i in range(len(own)):
        of_layer = jax.tree.map(lambda x, i=i: x[i], per_layer)
        found: Any = block.apply({"params": own[str(i)]}, carry, of_layer, shared)
        carry = found[0]
        outputs.append(found[1])
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)
