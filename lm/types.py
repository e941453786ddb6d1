"""The types that travel through the project, and the legend of its shapes.

Letters, those of `jax.nn.dot_product_attention` where it has one:

    B      T             S           D      N      K
    batch  query length  key length  embed  heads  kv heads

    G      H         F    V      E        L
    N / K  head dim  mlp  vocab  experts  layers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias

import flax.struct
import jax
import numpy as np
from typing_extensions import TypeVar

Array: TypeAlias = jax.Array  # a tracer too
PyTree: TypeAlias = Any
Tree = TypeVar("Tree")
Params: TypeAlias = dict[str, Any]  # nested, with arrays for leaves
Cache: TypeAlias = PyTree  # a pytree of the model that made it
Sums: TypeAlias = dict[str, Array]  # additive scalars: sums over tokens, and their counts
StepInfo: TypeAlias = dict[str, Array]  # of one step, not additive: see lm/training/train_step.py


class Device(Protocol):
    """A device of JAX, or one of a topology that is only compiled for."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...
    @property
    def process_index(self) -> int: ...


# numpy arrays where data code makes `Tokens` and `Batch`, jax arrays everywhere else
ArrayT = TypeVar("ArrayT", bound=jax.Array | np.ndarray, default=jax.Array)


@flax.struct.dataclass
class Tokens(Generic[ArrayT]):
    """One packed stream of tokens.

    Tokens see each other only inside one segment. Segment 0 is padding; positions restart at 0 in
    every segment.
    """

    ids: ArrayT  # int32 [B, T]
    segments: ArrayT  # int32 [B, T]
    positions: ArrayT  # int32 [B, T]
    bidirectional: ArrayT | None = None  # bool [B, T]; a prefix that its segment may see
    types: ArrayT | None = None  # int32 [B, T]; the part of a pair, for models that ask


@flax.struct.dataclass
class Batch(Generic[ArrayT]):
    """Inputs, targets and weights that an objective makes of rows."""

    inputs: Tokens[ArrayT]
    targets: ArrayT  # int32 [B, T]
    weights: ArrayT  # float32 [B, T]; 0 where nothing is scored
    encoder: Tokens[ArrayT] | None = None  # encoder-decoder models only
    records: ArrayT | None = None  # uint32 [B]; a hash of where each row comes from
    # the task of each row, for losses by task, int32 [B]; or those of each token, bool [B, T, K]
    tasks: ArrayT | None = None
    images: ArrayT | None = None  # uint8 [B, height, width, 3]; the picture of each row


class VocabularyPart(NamedTuple):
    """Columns of the targets, first to last, whose softmax is over a range of the ids alone."""

    name: str  # of its losses
    columns: tuple[int, int]
    ids: tuple[int, int]


HostTokens: TypeAlias = Tokens[np.ndarray]
HostBatch: TypeAlias = Batch[np.ndarray]


@flax.struct.dataclass
class Output:
    """Output of a model: hidden states, cache, auxiliary losses and statistics."""

    hidden: Array  # [B, T, D], before the vocabulary projection, so that the loss can chunk
    cache: Cache | None = None
    # scalars: terms of the loss per token, and statistics to report
    aux: dict[str, Array] = flax.struct.field(default_factory=dict)
    stats: dict[str, Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class TrainState:
    """State of training before batch `step`.

    teacher: frozen parameters of another model (lm.training.teacher), which no checkpoint holds.
    """

    step: Array  # int32 []
    params: Params
    opt_state: PyTree
    teacher: Params | None = None


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

    @property
    def head_params(self) -> tuple[str, ...]: ...

    def init_cache(self, batch_size: int, length: int) -> Cache: ...

    @property
    def num_pipeline_microbatches(self) -> int: ...

    def init(self, *args: Any, **kwargs: Any) -> Any: ...

    def apply(self, *args: Any, **kwargs: Any) -> Any: ...


def check_head(config: Any) -> None:
    """Raise ValueError where a model's config says that it has no projection to the vocabulary."""
    if not getattr(config, "has_head", True):
        raise ValueError(
            "config.model.has_head is False: the model has no projection to the vocabulary, and "
            "gives only hidden states. To train one, start a run with --config.init.from=RUN "
            "--config.model.has_head=True and its parameters in --config.init.new"
        )


LossFn: TypeAlias = Callable[[Params, Batch, Array], tuple[Array, Sums]]


class CoupledLoss(NamedTuple):
    """A `LossFn` that compares the rows of a batch, so that sums over micro-batches are not it."""

    # (params, batch, key) -> embeddings [B, ...], of each row by itself
    embed: Callable[[Params, Batch, Array], Array]
    # (params, embeddings, batch) -> (SUM, sums)
    loss: Callable[[Params, Array, Batch], tuple[Array, Sums]]

    def __call__(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Sums]:
        return self.loss(params, self.embed(params, batch, rng), batch)
