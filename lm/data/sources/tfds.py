"""Documents from a data set that tensorflow-datasets has prepared.

TensorFlow is imported inside the functions: only a preparation from `tfds:` pays for it.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lm.data.sources import Document, Skipped, Unit
from lm.data.sources.records import column_names, from_record

_UNIT_BYTES = 1 << 22


@dataclass(frozen=True)
class TfdsSource:
    """The records of splits of a data set, in the order of its files; class labels by their names.

    name: "name", "name/config" or "name/config:version" below `data_dir` (TFDS's own folder if
      None), or the path of a prepared data set.
    split: names joined by "+".
    columns: store field -> feature or template (see `records`).
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
        missing = [name for name in column_names(self.columns) if name not in info.features]
        if missing:
            raise ValueError(
                f"tfds:{self.name}: no feature {missing[0]!r}; it has {', '.join(info.features)}: "
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
            step = max(count * _UNIT_BYTES // max(size, 1), 1)
            units += [
                Unit(
                    f"{info.full_name}/{split}",
                    start,
                    min(start + step, count),
                    size * min(step, count - start) // count,
                    f"{count}:{size}",
                )
                for start in range(0, count, step)
            ]
        return units

    def read(self, unit: Unit) -> Iterator[Document | Skipped]:
        import tensorflow_datasets as tfds

        split = unit.name.rpartition("/")[2]
        builder = self._builder(download=False)
        names = {
            name: feature.names
            for name in column_names(self.columns)
            if isinstance(feature := builder.info.features[name], tfds.features.ClassLabel)
        }
        dataset = builder.as_dataset(
            split=f"{split}[{unit.start}:{unit.stop}]",
            shuffle_files=False,
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        for i, record in enumerate(tfds.as_numpy(dataset), unit.start):
            document_id = f"{unit.name}@{i}"
            try:
                texts = {
                    name: record[name].decode() if isinstance(record[name], bytes) else record[name]
                    for name in column_names(self.columns)
                }
            except UnicodeDecodeError:
                yield Skipped(document_id, "invalid_utf8")
                continue
            if any(record[name] < 0 for name in names):
                yield Skipped(document_id, "no_label")  # of test sets that keep them secret
                continue
            texts |= {name: labels[record[name]] for name, labels in names.items()}
            yield from_record(document_id, texts, self.columns)

    def _builder(self, *, download: bool) -> Any:
        """Returns the builder of the data set on disk. Raises ValueError where there is none.

        `tfds.builder` and `tfds.load` would first look for the data set in the cloud, and without a
        network retry for minutes; files are found without.
        """
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import dataset_info, read_only_builder, registered

        if os.path.isdir(self.name):
            try:
                return tfds.builder_from_directory(self.name)
            except dataset_info.DatasetInfoFileError as error:
                raise ValueError(
                    f"tfds:{self.name}: a folder, but no data set that TFDS prepared (name the "
                    "folder with "
                    f"dataset_info.json): {error}"
                ) from error
        if download:
            try:
                tfds.builder(self.name, data_dir=self.data_dir).download_and_prepare()
            except Exception as error:  # whatever a data set's own code and the network raise
                raise ValueError(
                    f"tfds:{self.name} could not be downloaded and prepared: {_first_line(error)}; "
                    "prepare it on a machine with a network and copy it, or name its folder"
                ) from error
        try:
            return read_only_builder.builder_from_files(self.name, data_dir=self.data_dir)
        except registered.DatasetNotFoundError as error:
            raise ValueError(
                f"tfds:{self.name} is not prepared in {self.data_dir or 'the folder of TFDS'}: "
                "name its "
                "folder with --tfds-data-dir or as tfds:/path, or let it be downloaded with "
                f"--tfds-download ({_first_line(error)})"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
