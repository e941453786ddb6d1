"""Manual sharding, where the compiler's choice of collectives is not good enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lm.parallel.sharding import Rules


def shard_map(
    f: Callable[..., Any], rules: Rules, *, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`f` of the shards that each device holds.

    Inside another `shard_map` it covers the mesh axes that this one has left to the compiler.
    """
    context = jax.sharding.get_abstract_mesh()
    taken = set(context.manual_axes)
    mesh = context if taken else rules.mesh
    return jax.shard_map(
        f,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(rules.mesh.axis_names) - taken,
        check_vma=False,  # kernels don't declare over which axes their results vary
    )
