"""The types that travel through the project, and the legend of its shapes.

Letters, those of `jax.nn.dot_product_attention` where it has one:

    B batch   T query length   S key length   D embed   N heads   K kv heads   G = N / K   H head
    dim F mlp     V vocab          E experts      L layers

Data code fills these types with numpy arrays, device code with jax arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import flax.struct

Array: TypeAlias = Any  # jax.Array, or np.ndarray where data code fills it
Params: TypeAlias = Any  # nested dict of arrays
Cache: TypeAlias = Any  # opaque pytree, owned by the model that made it
# additive scalars: sums over tokens and the counts to divide them by
Sums: TypeAlias = dict[str, Any]
StepInfo: TypeAlias = dict[str, Any]  # of one step, not additive: see lm/training/train_step.py


@flax.struct.dataclass
class Tokens:
    """One packed stream of tokens.

    Tokens see each other only inside one segment. Segment 0 is padding; positions restart at 0 in
    every segment.
    """

    ids: Array  # int32 [B, T]
    segments: Array  # int32 [B, T]
    positions: Array  # int32 [B, T]
    bidirectional: Array | None = None  # bool [B, T]; True: a prefix that its whole segment may see
    types: Array | None = None  # int32 [B, T]; which of the parts of a pair, for models that ask


@flax.struct.dataclass
class Batch:
    """What an objective makes of rows: inputs, what to predict at each of them, and how much each
    counts.
    """

    inputs: Tokens
    targets: Array  # int32 [B, T]
    weights: Array  # float32 [B, T]; 0 where nothing is scored
    encoder: Tokens | None = None  # encoder-decoder models only
    records: Array | None = None  # uint32 [B]; a hash of where each row comes from
    tasks: Array | None = None  # int32 [B]; which of several tasks, where losses are told apart


@flax.struct.dataclass
class Output:
    """What a model returns."""

    hidden: Array  # [B, T, D], before the vocabulary projection, so that the loss can chunk
    cache: Cache | None = None
    # scalars: terms of the loss per token, and what is reported beside it
    aux: dict[str, Array] = flax.struct.field(default_factory=dict)
    stats: dict[str, Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from one step to the next: the state before batch `step`."""

    step: Array  # int32 []
    params: Params
    opt_state: Any


class Model(Protocol):
    """The contract of `lm.models`: a linen module with fields `config` and `rules`."""

    config: Any
    rules: Any

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Output: ...

    def logits(self, hidden: Array) -> Array: ...

    def init_cache(self, batch_size: int, length: int) -> Cache: ...

    @property
    def num_microbatches(self) -> int: ...

    def init(self, *args: Any, **kwargs: Any) -> Any: ...

    def apply(self, *args: Any, **kwargs: Any) -> Any: ...


def check_head(config: Any) -> None:
    """Raises ValueError where a model's config says that it has no projection to the vocabulary."""
    if not getattr(config, "has_head", True):
        raise ValueError(
            "config.model.has_head is False: the model has no projection to the vocabulary, and "
            "gives hidden states alone. To train one, start a run with --config.init.from=RUN "
            "--config.model.has_head=True and its parameters in --config.init.new"
        )


LossFn: TypeAlias = Callable[[Params, Batch, Array], tuple[Array, Sums]]
