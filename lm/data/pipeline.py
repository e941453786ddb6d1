"""`batch_at(step)`: the global batch of any step, and iterators that prepare the next ones.

Example number `i` of a run is row `i % batch_size` of step `i // batch_size`; the sampler maps it
to a row of a source. So a batch needs no iterator and no state, and a host that reads its own rows
of the global batch gets exactly those, whatever the number of hosts. `iterate` only runs `batch_at`
ahead of time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from lm.config.fields import check_values
from lm.config.schema import DataConfig, LoaderConfig
from lm.data import images, loaders, packing, synthetic
from lm.data.pairs import Pairs
from lm.data.rows import RowLayout, Rows, RowSource, Span
from lm.data.sampler import Sampler, hash_words
from lm.data.tokens import NoStore, TokenStore
from lm.exit_codes import Exit, RunError
from lm.storage.paths import expand_path, is_url
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import HostBatch, HostTokens

Transform = Callable[[Rows, Callable[[int], np.random.Generator]], HostBatch]
RowIndex = slice | np.ndarray  # a host's rows of the global batch

ALL_ROWS = slice(None)
_EVALUATION_SEED = 2**32 - 1  # of random objectives: the same for every run
_PADDING = {"previous": -1}  # of the arrays of `Rows`; 0 in the others


class OutOfData(RunError):
    """A batch would need a row of a later epoch than the pipeline may read."""

    code = Exit.OUT_OF_DATA


class Objective(Protocol):
    """The part of `lm.objectives.Objective` that the pipeline calls."""

    @property
    def layout(self) -> RowLayout: ...

    def __call__(self, rows: Rows, rng: Callable[[int], np.random.Generator], /) -> HostBatch: ...

    def for_source(self, source: str) -> Objective: ...


class ExplainedRow(NamedTuple):
    """The origin of one row of a batch."""

    source: str
    epoch: int
    row: int
    documents: list[Span]
    text: list[str]  # the beginning of each document's part of the row; fields joined by " → "


class Pipeline:
    """Batches of a mixture of sources, as a function of the step; safe to use from many threads."""

    def __init__(
        self,
        sources: Mapping[str, RowSource],
        objective: Transform | Mapping[str, Transform],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        num_epochs: float | None = None,
    ):
        """objective: of all sources, or of each. weights: one for each source, None: by their rows.
        num_epochs: None reads for ever.
        """
        self.sources = dict(sources)
        self.batch_size = batch_size
        self.sampler = Sampler(
            [len(source) for source in sources.values()], weights, seed=seed, shuffle=shuffle
        )
        of = objective if isinstance(objective, Mapping) else dict.fromkeys(sources, objective)
        self._objectives = [of[name] for name in sources]
        self._seed = seed
        self._limit = None if num_epochs is None else self.num_batches(num_epochs)

    def num_batches(self, num_epochs: float) -> int:
        """Return the number of whole batches in `num_epochs` epochs of every source.

        Rows left over at the very end, fewer than a batch, are dropped; between epochs none is.
        """
        return self.sampler.num_examples(num_epochs) // self.batch_size

    def batch_at(self, step: int, rows: RowIndex = ALL_ROWS) -> HostBatch:
        """Return the rows `rows` of the global batch of `step`; OutOfData beyond `num_epochs`."""
        index = self._index(step, rows)
        location = self.sampler.locate(index)
        batches, groups = [], []
        for number, source in enumerate(self.sources.values()):
            group = np.flatnonzero(location.source == number)
            if len(group):
                rng = _generators(self._seed, location.epoch[group], index[group])
                batches.append(self._objectives[number](source.read(location.row[group]), rng))
                groups.append(group)
        batch = batches[0]
        if len(batches) > 1:
            batch = _merge(batches, np.argsort(np.concatenate(groups)))
        records = hash_words(location.source, location.epoch, location.row, index)
        return dataclasses.replace(batch, records=(records >> np.uint64(32)).astype(np.uint32))

    def source_numbers(self, step: int, rows: RowIndex = ALL_ROWS) -> np.ndarray:
        """int32 [rows], the number of the source of each row of `batch_at`."""
        return self.sampler.locate(self._index(step, rows)).source.astype(np.int32)

    def explain_batch(
        self, step: int, tokenizer: Tokenizer, *, rows: RowIndex = ALL_ROWS, num_tokens: int = 24
    ) -> list[ExplainedRow]:
        """Return the origin of each row, with the first `num_tokens` of every document."""
        explained = []
        for number, epoch, row in zip(*self.sampler.locate(self._index(step, rows)), strict=True):
            name, source = list(self.sources.items())[number]
            [documents], read = source.documents(row[None]), source.read(row[None])
            text = [_first_tokens(read, n, tokenizer, num_tokens) for n, _ in enumerate(documents)]
            explained.append(ExplainedRow(name, int(epoch), int(row), documents, text))
        return explained

    def iterate(
        self,
        start_step: int,
        stop_step: int | None = None,
        *,
        rows: RowIndex = ALL_ROWS,
        loader: LoaderConfig,
        convert: Callable[[HostBatch], Any] = lambda batch: batch,
    ) -> Generator[tuple[int, Any], None, None]:
        """Return an iterator over (step, convert(batch_at(step, rows))), prepared ahead of use.

        loader.kind: "tf.data", or "thread", which needs no TensorFlow; the batches are the same.
        Without a `stop_step` it ends with `num_epochs`, if at all. An error of `batch_at` is raised
        when its step is due. `close()` the iterator to end early.
        Raises OutOfData if `stop_step` is beyond `num_epochs`.
        """
        if self._limit is not None:
            if stop_step is not None and stop_step > self._limit:
                raise OutOfData(self._out_of_data(stop_step - 1))
            stop_step = self._limit
        stop_step = 2**62 if stop_step is None else stop_step

        def make(step: int) -> Any:
            return convert(self.batch_at(step, rows))

        return loaders.run(make, start_step, stop_step, loader)

    def _index(self, step: int, rows: RowIndex) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step ({step}) must not be negative")
        if self._limit is not None and step >= self._limit:
            raise OutOfData(self._out_of_data(step))
        return step * self.batch_size + np.arange(self.batch_size)[rows]

    def _out_of_data(self, step: int) -> str:
        return (
            f"step {step} needs rows beyond the last epoch: the data has {self._limit} batches of "
            f"{self.batch_size} rows; train for fewer steps, or raise config.train.max_epochs"
        )


T = TypeVar("T", bound=HostBatch | HostTokens)


def _merge(batches: Sequence[T], order: np.ndarray) -> T:
    """Return the rows `order`, int64 [B], of the batches joined."""
    first = batches[0]

    def join(name: str) -> HostTokens | np.ndarray | None:
        values = [getattr(batch, name) for batch in batches]
        assert len(set(map(type, values))) == 1, "objectives of one batch differ in structure"
        if isinstance(values[0], np.ndarray):
            return np.concatenate(values)[order]
        return None if values[0] is None else _merge(values, order)

    return dataclasses.replace(first, **{f.name: join(f.name) for f in dataclasses.fields(first)})


def _first_tokens(rows: Rows, document: int, tokenizer: Tokenizer, num_tokens: int) -> str:
    """Return the text of the first tokens of a document of one row, of each of its fields; without
    ids that are no text.
    """
    held = (rows.segments == document + 1) & (rows.ids < tokenizer.vocab_size)
    fields = np.zeros_like(held, int) if rows.fields is None else rows.fields
    ids = [rows.ids[held & (fields == f)] for f in np.unique(fields[held])]
    return " → ".join(tokenizer.decode(field[:num_tokens]) for field in ids)


def evaluation_batch_at(
    source: RowSource,
    objective: Transform,
    number: int,
    *,
    batch_size: int,
    rows: RowIndex = ALL_ROWS,
) -> HostBatch:
    """Return the rows `rows` of global batch `number` of those that have every row of the source
    once, in order.

    The last batch is padded with empty rows, of segments and weights 0: sums over the batches are
    exact for every batch size and number of hosts, and all hosts get equally many batches.
    """
    index = number * batch_size + np.arange(batch_size)[rows]
    read = vars(source.read(index[index < len(source)]))
    missing = len(index) - len(read["ids"])
    padded = {
        name: np.pad(
            x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=_PADDING.get(name, 0)
        )
        for name, x in read.items()
        if x is not None
    }
    return objective(Rows(**padded), _generators(_EVALUATION_SEED, np.zeros_like(index), index))


def num_evaluation_batches(source: RowSource, batch_size: int) -> int:
    return -(-len(source) // batch_size)


def evaluation_batches(
    source: RowSource, objective: Transform, *, batch_size: int, rows: RowIndex = ALL_ROWS
) -> Iterator[HostBatch]:
    """Yield `evaluation_batch_at` of every number."""
    for number in range(num_evaluation_batches(source, batch_size)):
        yield evaluation_batch_at(source, objective, number, batch_size=batch_size, rows=rows)


def _generators(
    seed: int, epochs: np.ndarray, index: np.ndarray
) -> Callable[[int], np.random.Generator]:
    """Return the function from a row to its random numbers."""
    return lambda i: np.random.default_rng([seed, int(epochs[i]), int(index[i])])


def make_source(
    path: str, config: DataConfig, layout: RowLayout, tokenizer: Tokenizer, *, cache_dir: str = ""
) -> RowSource:
    """Return the rows of the token store at `path`, or of `synthetic:KIND[:ROWS[:SEED]]`; with
    pictures where the layout has them.

    cache_dir: folder of packing plans; "": in the store, or none if that is remote.
    Raises ValueError if the store was made with another tokenizer than `tokenizer`.
    """
    check_values(config, "config.data")
    if path.startswith("synthetic:"):
        return synthetic.make(path, layout, tokenizer)
    path = expand_path(path, "a token store")
    inside = None if is_url(path) else Path(path) / "packing"
    cache_dir = cache_dir and expand_path(cache_dir, "config.loader.cache_dir")
    stores = [TokenStore.open(path, field=field) for field in layout.fields]
    stores[0].check_tokenizer(tokenizer)
    if layout.image_size is not None:
        return images.CaptionedImages(stores[0], layout, too_long=config.too_long)
    if len(stores) > 1:
        return Pairs(stores, layout, too_long=config.too_long, cache=cache_dir or inside)
    if config.packing == "split":
        return packing.split(stores[0], layout.length)
    return packing.best_fit(stores[0], layout.length, cache=cache_dir or inside)


def make_sources(
    paths: Sequence[str],
    config: DataConfig,
    objective: Objective,
    tokenizer: Tokenizer,
    *,
    key: str,
    cache_dir: str = "",
) -> dict[str, RowSource]:
    """Return `make_source` of every path, by path, in the row layout of its objective.

    key: the config path that names them, for the errors.
    """
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"{key}: a token store is named twice in {list(paths)}: give it a larger weight instead"
        )
    try:
        return {
            path: make_source(
                path, config, objective.for_source(path).layout, tokenizer, cache_dir=cache_dir
            )
            for path in paths
        }
    except NoStore as error:
        raise ValueError(f"{key}: {error}") from None


def make_pipeline(
    config: DataConfig,
    objective: Objective,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    num_epochs: float | None = None,
    cache_dir: str = "",
) -> Pipeline:
    """Return the training pipeline of a config."""
    key = "config.data.train"
    if not config.train:
        raise ValueError(f"{key} is empty: name at least one token store, or synthetic:markov")
    sources = make_sources(config.train, config, objective, tokenizer, key=key, cache_dir=cache_dir)
    return Pipeline(
        sources,
        {path: objective.for_source(path) for path in config.train},
        batch_size=batch_size,
        seed=seed,
        weights=config.weights or None,
        shuffle=config.shuffle,
        num_epochs=num_epochs,
    )
