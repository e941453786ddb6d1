"""Models: one file per architecture, each with a frozen `Config` and `build(config, rules) ->
Model`.

The contract (`lm.types.Model`) is one linen module with the fields `config` and `rules` and:

    model(inputs, *, encoder=None, cache=None, train=False) -> Output    hidden states, before the
                                                                         vocabulary projection
    model.logits(hidden) -> [B, T, V]                float32 logits of (a chunk of) them
    model.init_cache(batch_size, length) -> Cache    what generation carries
    model.num_microbatches                           parts that it cuts the rows of a pass into

`Config` has `check(length)`, which raises ValueError on sizes that don't fit together, naming the
config path, and properties or fields `vocab_size`, `max_length`, `dtype` (of the computation,
"float32" or "bfloat16"), `is_causal` (a token of `inputs` sees only itself and those before it, but
for marked prefixes) and `takes_encoder` (`encoder` must be given; with a cache, in the first call
alone, which keeps what later ones need). Every parameter is a box that names its logical axes, as
`lm.layers.linear.parameter` and flax's `nn.with_partitioning` make them. It may offer
`attention_kinds` (dicts of the fields of `lm.reliability.kernel_check.Heads`) and `logit_softcap`,
which the start-up check then covers.

A leaf of a cache has its rows along one axis, as long as `batch_size`, or belongs to all of them;
beam search replaces rows by others. A cached call may begin with padding (segment 0), which leaves
no trace. Parameters of a stack of layers, [L, ...], lie under `layers`, which `lm.layers.stack.run`
also runs where generation has taken them apart (`lm.optim.param_tree.apart`). Everything else
(loss, optimizer, generation, export) knows models through this alone.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

MEMBERS = ("vocab_size", "max_length", "dtype", "is_causal", "takes_encoder", "check")  # of Config


def check_config(config: Any, name: str) -> None:
    """Raises ValueError, naming what is missing, unless the config of the model `name` has the
    members that the rest of the code reads.
    """
    if missing := [member for member in MEMBERS if not hasattr(config, member)]:
        raise ValueError(
            f"config.model.name ({name!r}): its Config has no {', '.join(missing)}, which the "
            "contract in lm/models/__init__.py asks for"
        )


def check_axes(boxed: Any, name: str) -> None:
    """Raises ValueError, naming the parameter, unless every parameter of the model `name` names its
    logical axes, without which it could be neither sharded nor given to an optimizer.
    """
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box)
    bare = [path for path, leaf in leaves if not _is_box(leaf)]
    if bare:
        first = jax.tree_util.keystr(bare[0], simple=True, separator=".")
        raise ValueError(
            f"config.model.name ({name!r}): {len(bare)} of {len(leaves)} parameters name no "
            f"logical axes, {first} the first: make them with lm.layers.linear.parameter, or give "
            "nn.Dense and its like kernel_init=nn.with_partitioning(init, (axis, axis))"
        )


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)
