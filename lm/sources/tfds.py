"""Documents from a data set that tensorflow-datasets has prepared (imported only for `tfds:`)."""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lm.sources import Document, Skipped, Unit
from lm.sources.records import column_names, from_record, stored_columns
from lm.storage import files as storage
from lm.storage.paths import expand_path, is_url

Builder: TypeAlias = Any  # tfds.core.DatasetBuilder, whose own annotations are wrong

_ARRAY_RECORD_UNIT_BYTES = 1 << 22  # shards of other formats have no random access: each is a unit
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class TfdsSource:
    """The records of splits of a data set, in the order of its files; class labels by their names.

    name: "name", "name/config" or "name/config:version" below `data_dir` (TFDS's own folder if
    None), or the path of a prepared data set, also in a bucket. split: names joined by "+".
    download: download and prepare what is not on disk yet.
    """

    name: str
    columns: Mapping[str, str]
    split: str = "train"
    data_dir: str | None = None
    download: bool = False

    def units(self) -> list[Unit]:
        builder = self._builder(download=self.download)
        info = builder.info
        if stored_columns(self.columns, list(info.features)) is None:
            names = column_names(self.columns)
            [missing, *_] = [
                n for n in names if stored_columns({"": n}, list(info.features)) is None
            ]
            raise ValueError(
                f"tfds:{self.name}: no feature {missing!r}; it has {', '.join(info.features)}: "
                "name the text with --field text=FEATURE"
            )
        units = []
        for split in self.split.split("+"):
            if split not in info.splits:
                raise ValueError(
                    f"tfds:{self.name}: no split {split!r}; it has {', '.join(info.splits)}: "
                    "name one, or several joined by +"
                )
            count, size = info.splits[split].num_examples, info.splits[split].num_bytes
            stamp, name = f"{count}:{size}", f"{info.full_name}/{split}"
            units += [
                Unit(name, start, stop, size * (stop - start) // count, stamp)
                for start, stop in _ranges(builder, split, shards=is_url(self.name))
            ]
        return units

    def document_ids(self, unit: Unit) -> Iterator[str]:
        return (f"{unit.name}@{i}" for i in range(unit.start, unit.stop))

    def read(self, unit: Unit) -> Iterator[Document | Skipped]:
        import tensorflow as tf
        import tensorflow_datasets as tfds

        builder = self._builder(download=False)
        labels = {
            name: feature.names
            for name in stored_columns(self.columns, list(builder.info.features)) or ()
            if isinstance(feature := builder.info.features[name], tfds.features.ClassLabel)
        }
        with _shards_on_disk(self.name, builder, unit):
            records = iter(_records(builder, unit))
            for i in range(unit.start, unit.stop):
                document_id = f"{unit.name}@{i}"
                try:
                    record = next(records)
                except (
                    RuntimeError,
                    tf.errors.DataLossError,
                    tf.errors.InvalidArgumentError,
                ) as error:
                    yield Skipped(document_id, "damaged_file", detail=_first_line(error))
                    if isinstance(error, RuntimeError):  # of ArrayRecord: others can be read
                        continue
                    for j in range(i + 1, unit.stop):  # nothing after it can be found in the shard
                        yield Skipped(f"{unit.name}@{j}", "damaged_file")
                    return
                if any(record[name] < 0 for name in labels):
                    yield Skipped(document_id, "no_label")  # of test sets that keep them secret
                    continue
                texts = {name: names[record[name]] for name, names in labels.items()}
                yield from_record(document_id, {**_plain(record), **texts}, self.columns)

    def _builder(self, *, download: bool) -> Builder:
        """Return the builder of the data set on disk; ValueError where there is none.

        `tfds.builder` and `tfds.load` look for the data set in the cloud first, and without a
        network retry for minutes.
        """
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import dataset_info, read_only_builder, registered

        name = expand_path(self.name, "--data=tfds:")
        data_dir = self.data_dir and expand_path(self.data_dir, "--tfds-data-dir")
        if is_url(name):
            name = _description_on_disk(name).name
        if os.path.isdir(name):
            try:
                return tfds.builder_from_directory(name)
            except dataset_info.DatasetInfoFileError as error:
                raise ValueError(
                    f"tfds:{self.name}: a folder, but no data set that TFDS prepared (name the "
                    f"folder with dataset_info.json): {error}"
                ) from error
        if name.startswith(("/", ".")) or name != self.name or os.path.exists(name):
            is_file = "a file" if os.path.exists(name) else "no such folder"
            raise ValueError(
                f"tfds:{self.name}: {is_file}; name the folder of a version, with dataset_info.json"
            )
        if download:
            try:
                tfds.builder(self.name, data_dir=data_dir).download_and_prepare()
            except Exception as error:  # whatever a data set's own code and the network raise
                raise ValueError(
                    f"tfds:{self.name} could not be downloaded and prepared: {_first_line(error)}; "
                    "prepare it on a machine with a network and copy it, or name its folder"
                ) from error
        try:
            return read_only_builder.builder_from_files(self.name, data_dir=data_dir)
        except (registered.DatasetNotFoundError, ValueError) as error:
            raise ValueError(
                f"tfds:{self.name} is not prepared in {self.data_dir or 'the folder of TFDS'}: "
                "name its folder with --tfds-data-dir or as tfds:/path, or let it be downloaded "
                f"with --tfds-download ({_first_line(error)})"
            ) from error


def _ranges(builder: Builder, split: str, *, shards: bool) -> list[tuple[int, int]]:
    """Return (start, stop) of every unit of a split, in records; shards: never parts of one."""
    info = builder.info.splits[split]
    count, lengths = info.num_examples, info.shard_lengths
    if _is_array_record(builder) and not shards:
        step = max(count * _ARRAY_RECORD_UNIT_BYTES // max(info.num_bytes, 1), 1)
        return [(start, min(start + step, count)) for start in range(0, count, step)]
    if sum(lengths or ()) != count:  # old data sets have none
        lengths = [count]
    ends = list(itertools.accumulate(lengths))
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True) if length]


@functools.cache
def _description_on_disk(folder: str) -> tempfile.TemporaryDirectory[str]:
    """Return a folder with what is in one of a bucket but the shards, which TFDS itself reads from
    buckets only by TensorFlow's own client, or not at all.
    """
    copy = tempfile.TemporaryDirectory(prefix="tfds-")
    for name in storage.find(folder, depth=1):
        if not _SHARD.search(name):
            storage.write_atomically(f"{copy.name}/{name}", storage.read_bytes(f"{folder}/{name}"))
    return copy


@contextlib.contextmanager
def _shards_on_disk(name: str, builder: Builder, unit: Unit) -> Iterator[None]:
    """Copy the shards of a unit from a bucket, as long as they are read."""
    if not is_url(name):
        yield
        return
    of_unit = builder.info.splits[f"{_split(unit)}[{unit.start}:{unit.stop}]"]
    paths = [Path(found.filename) for found in of_unit.file_instructions]
    try:
        for path in paths:
            with storage.open_file(f"{name}/{path.name}") as shard, open(path, "wb") as copy:
                shutil.copyfileobj(shard, copy, storage.BLOCK)
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _split(unit: Unit) -> str:
    return unit.name.rpartition("/")[2]


def _plain(value: Any) -> Any:
    """Return a value of TFDS with lists in place of arrays, also in records in records."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value


def _is_array_record(builder: Builder) -> bool:
    file_format = builder.info.file_format
    name = file_format.value if file_format is not None else "tfrecord"
    if name == "array_record":
        if importlib.util.find_spec("array_record") is None:
            raise ValueError(
                f"tfds:{builder.info.full_name} is stored as ArrayRecord: pip install "
                "array_record, or convert it (tfds convert_format --out_file_format=tfrecord)"
            )
        return True
    if name not in ("tfrecord", "parquet"):
        raise ValueError(
            f"tfds:{builder.info.full_name} is stored as {name}; tfrecord, array_record and "
            "parquet are read: convert it (tfds convert_format --out_file_format=tfrecord)"
        )
    return False


def _records(builder: Builder, unit: Unit) -> Iterable[Mapping[str, Any]]:
    """Return the records of a unit, in the order of the files."""
    import tensorflow_datasets as tfds

    decoders = _undecoded_pictures(builder.info.features)
    split = f"{_split(unit)}[{unit.start}:{unit.stop}]"
    if _is_array_record(builder):
        source = builder.as_data_source(split=split, decoders=decoders)
        return map(source.__getitem__, range(len(source)))
    dataset = builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders=decoders,
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    return tfds.as_numpy(dataset)


def _undecoded_pictures(features: Any) -> dict[str, Any]:
    """Return decoders that keep pictures as their files, in features and those inside them:
    TensorFlow would decode any size, and end the unit at a damaged one.
    """
    import tensorflow_datasets as tfds

    found = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            found[name] = tfds.decode.SkipDecoding()
        elif isinstance(feature, tfds.features.FeaturesDict):
            found[name] = _undecoded_pictures(feature)
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
