"""Parquet: units are consecutive row groups, about 64 MB of the file; ids are `name@row`.

Pages are read as they are needed, so that memory does not grow with a row group, which may be the
whole file.
"""

import itertools
from collections.abc import Iterator, Mapping

from lm.sources import Document, Skipped, files
from lm.sources.arrow import (
    BATCH_BYTES,
    arrow_errors,
    batch_documents,
    class_labels,
    missing_columns,
)
from lm.sources.records import stored_columns
from lm.storage import files as storage

_UNIT_BYTES = 1 << 26


def ranges(file: files.DataFile, size: int | None = None) -> list[files.Range]:
    """Return the numbers of row groups of each unit of about `size` bytes; a smaller file is one,
    without reading it.
    """
    import pyarrow.parquet as pq

    size = size or _UNIT_BYTES
    if file.size <= size:
        return [files.whole(file)]
    with files.open_file(file) as opened, arrow_errors():
        metadata = pq.read_metadata(opened.raw)
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    ends = [file.size * end // max(sum(sizes), 1) for end in itertools.accumulate(sizes)]
    found, start, done = [], 0, 0
    for i, end in enumerate(ends, 1):
        if end - done >= size or i == len(ends):
            found.append(files.Range(start, i, end - done))
            start, done = i, end
    return found or [files.whole(file)]


def read(
    file: files.DataFile, start: int, stop: int, columns: Mapping[str, str]
) -> Iterator[Document | Skipped]:
    import pyarrow.parquet as pq

    with files.open_file(file) as opened, arrow_errors():
        table = pq.ParquetFile(opened.raw, buffer_size=storage.BLOCK, pre_buffer=False)
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        row = sum(group.num_rows for group in groups[:start])
        schema = table.schema_arrow
        wanted, labels = stored_columns(columns, schema.names), class_labels(schema)
        for i in range(start, len(groups) if stop == files.WHOLE else stop):
            num_rows, size = groups[i].num_rows, groups[i].total_byte_size
            if wanted is None:
                first = next(table.iter_batches(1, row_groups=[i]))
                yield from missing_columns(first, num_rows, f"{file.name}@", row)
            else:
                batches = table.iter_batches(
                    max(num_rows * BATCH_BYTES // max(size, 1), 1),
                    row_groups=[i],
                    columns=wanted,
                    use_threads=False,
                )
                done = row
                for batch in batches:
                    yield from batch_documents(batch, f"{file.name}@", done, columns, labels)
                    done += batch.num_rows
            row += num_rows
        if not row and start == 0:
            yield Skipped(file.name, "empty")
