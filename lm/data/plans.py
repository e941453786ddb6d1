"""Packing plans of the shards of a store: stored in it by the preparation, or made at first use.

A plan is a file of int64: the number of its arrays, their lengths, and the arrays of
`bins.make_plan`, of which the items of a row are read where they are asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lm.data import bins
from lm.data.bins import Packing
from lm.data.store_files import Array, StoreFiles, open_files
from lm.data.tokens import TokenStore
from lm.storage import files as storage
from lm.storage.paths import expand_local_path


def to_bytes(arrays: Sequence[np.ndarray]) -> bytes:
    """Return the content of a plan's file."""
    header = [len(arrays), *map(len, arrays)]
    return np.concatenate([header, *arrays]).astype("<i8").tobytes()


def plan_entry(arrays: Sequence[np.ndarray]) -> dict[str, list[int]]:
    """Return a plan's entry in a manifest."""
    return {"lengths": [len(array) for array in arrays], "summary": arrays[0].tolist()}


class Items(NamedTuple):
    """The items of B rows, row after row: their numbers [B], shards [n] and columns [C, n]."""

    counts: np.ndarray
    shards: np.ndarray
    columns: np.ndarray


class _Plan(Protocol):
    def open(self) -> Array: ...


class _InFile(NamedTuple):
    files: StoreFiles
    name: str
    size: int

    def open(self) -> Array:
        return self.files.array(self.name, "<i8", self.size)


class _InMemory(NamedTuple):
    content: np.ndarray

    def open(self) -> Array:
        return self.content


class ShardPlans:
    """The plans of all shards: rows are numbered through them.

    first_rows: int64 [S + 1], the first row of each shard. summaries: int64 [S, k].
    """

    def __init__(
        self, stores: Sequence[TokenStore], packing: Packing, cache: str | os.PathLike | None
    ):
        """stores: of the fields of `packing`. cache: the folder of plans that the store has not;
        None: they are kept in memory. Any number of processes may share it.
        """
        folder = str(cache) if cache else None
        if folder:
            folder = expand_local_path(folder, "config.loader.cache_dir")
        number = range(len(stores[0].shards))
        self._plans = [_plan(stores, shard, packing, folder) for shard in number]
        name, headers = packing.name, []
        for shard, plan in zip(stores[0].shards, self._plans, strict=True):
            entry = shard.plans.get(name)
            headers.append(entry or _header(plan.open()))
        self.summaries = np.array([header["summary"] for header in headers], np.int64)
        self._lengths = [header["lengths"] for header in headers]
        num_rows = [lengths[1] - 1 for lengths in self._lengths]
        self.first_rows = np.cumsum([0, *num_rows], dtype=np.int64)
        self._files = stores[0].files

    def items(self, rows: np.ndarray) -> Items:
        """Return the items of `rows`, int64 [B]."""
        shards = np.searchsorted(self.first_rows, rows, "right") - 1
        groups = [(s, np.flatnonzero(shards == s)) for s in np.unique(shards).tolist()]
        found = self._files.map(
            lambda group: self._items(group[0], rows[group[1]] - self.first_rows[group[0]]), groups
        )
        counts = np.zeros(len(rows), np.int64)
        for (_, where), (of_rows, _) in zip(groups, found, strict=True):
            counts[where] = of_rows
        owners = [np.repeat(where, counts[where]) for _, where in groups]
        order = np.argsort(np.concatenate([np.empty(0, np.int64), *owners]), kind="stable")
        columns = [np.empty((len(self._lengths[0]) - 2, 0), np.int64)]
        columns += [of_rows for _, of_rows in found]
        return Items(counts, np.repeat(shards, counts), np.concatenate(columns, 1)[:, order])

    def _items(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of items of rows of a shard, and the columns of the items."""
        content, lengths = self._plans[shard].open(), self._lengths[shard]
        begins = np.cumsum([1 + len(lengths), *lengths])
        limits = content[np.stack([rows, rows + 1]) + begins[1]]
        chosen = bins.ranges(limits[0], limits[1] - limits[0])
        columns = chosen + begins[2 : len(lengths), None]
        return limits[1] - limits[0], content[columns]


def _header(content: Array) -> dict[str, list[int]]:
    lengths = content[1 : 1 + int(content[0:1][0])].tolist()
    begin = 1 + len(lengths)
    return {"lengths": lengths, "summary": content[begin : begin + lengths[0]].tolist()}


def _plan(stores: Sequence[TokenStore], shard: int, packing: Packing, folder: str | None) -> _Plan:
    """Return the plan of a shard, which is made unless the store or the cache has it."""
    of_shard = stores[0].shards[shard]
    if packing.name in of_shard.plans:
        name = f"{of_shard.folder}{packing.name}.bin"
        return _InFile(stores[0].files, name, of_shard.sizes[name])
    offsets = [store.offsets.of_shard(shard) for store in stores]
    if folder is None:
        return _InMemory(np.frombuffer(to_bytes(bins.make_plan(packing, offsets)), "<i8"))
    of_fields = [f"{of_shard.folder}{store.field}/offsets.bin" for store in stores]
    hashes = [
        store.shards[shard].hashes[name] for store, name in zip(stores, of_fields, strict=True)
    ]
    key = hashlib.sha256("".join(hashes).encode()).hexdigest()
    path = os.path.join(folder, f"{packing.name}-{key[:16]}.bin")
    if not storage.exists(path):
        try:
            storage.write_atomically(path, to_bytes(bins.make_plan(packing, offsets)))
        except OSError as error:
            raise ValueError(
                f"the packing plan cannot be kept in {folder} ({error}); "
                "set loader.cache_dir to a folder that can be written"
            ) from error
    return _InFile(open_files(folder), os.path.basename(path), storage.stat(path).size)
