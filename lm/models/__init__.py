"""Models: one file per architecture, each with a frozen `Config` and `build(config, rules) ->
Model`.

The contract (`lm.types.Model`) is one linen module with the fields `config` and `rules` and:

    model(inputs, *, encoder=None, cache=None, train=False) -> Output    hidden states, before the
                                                                         vocabulary projection
    model.logits(hidden) -> [B, T, V]                float32 logits of (a chunk of) them
    model.head_params                                the parameters that `logits` reads, by their
                                                     names at the top: ("embedding",) or ("head",)
    model.init_cache(batch_size, length) -> Cache    the state of generation
    model.num_pipeline_microbatches                  parts that it cuts the rows of a pass into

`Config` (`ModelConfig`) has `check(length)`, which raises ValueError on sizes that don't fit
together, naming the config path, and properties or fields `vocab_size`, `max_length`, `dtype` (of
the computation, "float32" or "bfloat16"), `is_causal` (a token of `inputs` sees only itself and
those before it, but for marked prefixes) and `takes_encoder` (`encoder` must be given; with a
cache, only in the first call, which keeps what later ones need). Every parameter is a box that
names its logical axes, as `lm.layers.linear.parameter` and flax's `nn.with_partitioning` make them;
its sharding, its learning rate and its FLOPs follow from them.

A model whose Config says `takes_images` is called with `images`, uint8 [B, image_size, image_size,
3], and the Config's `image_positions(name)` is at how many positions of a picture the parameter of
that name is applied, None for those of the tokens, and its `image_length` the tokens of a picture,
where it has attention over them, for FLOPs.

A model with attention lists it as `attention_scores`, which count as FLOPs and which the start-up
check covers, as it does a `logit_softcap` (`lm.layers.attention_scores.AttentionScores`). One with
experts has `moe`, with `num_experts` and `num_experts_per_token`.

A leaf of a cache has its rows along one axis, as long as `batch_size`, or belongs to all of them;
beam search replaces rows by others. A cached call may begin with padding (segment 0), which leaves
no trace. Parameters of a stack of layers, [L, ...], lie under `layers`, which `lm.layers.stack.run`
also runs where generation has unstacked them (`lm.optim.param_tree.unstack_layers`). Everything
else (loss, optimizer, generation, export) knows models through this contract only.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lm.optim.param_tree import is_box
from lm.types import Array, Model, Params, Tokens


class ModelConfig(Protocol):
    """The `Config` of every model."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def is_causal(self) -> bool: ...
    @property
    def takes_encoder(self) -> bool: ...
    def check(self, length: int) -> None: ...
    def __hash__(self) -> int: ...


def check_config(config: object, name: str) -> None:
    """Raise ValueError, naming what is missing, unless the config of the model `name` has the
    members that the rest of the code reads.
    """
    members = [name for name in vars(ModelConfig) if not name.startswith("_")]
    missing = [member for member in members if not hasattr(config, member)]
    if missing:
        raise ValueError(
            f"config.model.name ({name!r}): its Config has no {', '.join(missing)}, which the "
            "contract in lm/models/__init__.py asks for"
        )


def init_params(model: Model, rng: Array, shape: tuple[int, int] = (1, 1)) -> Params:
    """The boxed parameters of a model, head included, from tokens of a shape [B, T]."""
    zeros = jnp.zeros(shape, jnp.int32)
    tokens = Tokens(zeros, zeros, zeros)
    encoder = tokens if model.config.takes_encoder else None
    has_head = getattr(model.config, "has_head", True)
    images: dict[str, Any] = {}
    if getattr(model.config, "takes_images", False):
        size = model.config.image_size
        images = {"images": jnp.zeros((shape[0], size, size, 3), jnp.uint8)}

    def everything(model: Model, tokens: Tokens) -> Array:
        hidden = model(tokens, encoder=encoder, **images).hidden
        return model.logits(hidden) if has_head else hidden

    return model.init({"params": rng}, tokens, method=everything)["params"]


def check_axes(boxed: Params, name: str) -> None:
    """Raise ValueError, naming the parameter, unless every parameter of the model `name` names its
    logical axes, without which it could be neither sharded nor given to an optimizer.
    """
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
    bare = [path for path, leaf in leaves if not is_box(leaf)]
    if bare:
        first = jax.tree_util.keystr(bare[0], simple=True, separator=".")
        raise ValueError(
            f"config.model.name ({name!r}): {len(bare)} of {len(leaves)} parameters name no "
            f"logical axes, {first} the first: make them with lm.layers.linear.parameter, or give "
            "nn.Dense and its like kernel_init=nn.with_partitioning(init, (axis, axis))"
        )
