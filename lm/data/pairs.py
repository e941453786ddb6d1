"""Documents of several fields to rows of a fixed length: prompts and responses, texts and labels.

The fields of a document are in one row and one segment. Where they follow each other, rows are
filled by best fit as in `packing.best_fit`; where each has its own part of the row (encoder and
decoder), a row must have room in all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from lm.data.bins import Packing, shorten
from lm.data.packing import Chunks, PackedRows
from lm.data.plans import ShardPlans
from lm.data.rows import RowLayout
from lm.data.tokens import TokenStore


class Pairs(PackedRows):
    """The rows of the fields of a token store; a `RowSource`.

    num_cut: documents whose first field was cut to fit. num_dropped: documents that are in no row.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        layout: RowLayout,
        *,
        too_long: str = "error",
        cache: str | os.PathLike | None = None,
    ):
        """stores: of each field, of the same documents. cache: the folder of the plan, or None.

        too_long: "error"; "cut", the first field is cut at its end, keeping its eos, and documents
        whose other fields leave it less than two tokens are dropped; "drop", documents that don't
        fit are dropped. Raises ValueError where documents are too long, or none is left.
        """
        packing = Packing(layout.fields, layout.lengths, too_long)
        plans, path = ShardPlans(stores, packing, cache), stores[0].path
        self.num_cut, self.num_dropped = plans.summaries[:, :2].sum(0).tolist()
        num_documents, num_rows = stores[0].num_documents, int(plans.first_rows[-1])
        if (too_long == "error" and self.num_dropped) or not num_rows:
            none = "" if num_rows else f"none of its {num_documents} documents fits; "
            longest = plans.summaries[:, 2:].max(0).tolist()
            many = f"{self.num_dropped} of {num_documents} documents are too long"
            raise ValueError(f"{path}: {none}{many} {_longest(longest, layout)}")
        if self.num_cut or self.num_dropped:
            self.truncation_summary = (
                f"{path}: of {num_documents:,} documents {self.num_cut:,} were cut and "
                f"{self.num_dropped:,} dropped, too long for rows of {layout.lengths}"
            )

        def chunks_of(rows: np.ndarray) -> Chunks:
            counts, shards, [documents] = plans.items(rows)
            documents = documents + stores[0].first_documents[shards]
            both = np.stack([documents, documents + 1])
            starts, stops = np.stack([store.offsets[both] for store in stores], 2)
            lengths = stops - starts
            if too_long == "cut":
                lengths = shorten(lengths, layout.lengths)
            return Chunks(counts, documents, starts, starts + lengths)

        super().__init__(stores, layout, num_rows, chunks_of)


def _longest(longest: Sequence[int], layout: RowLayout) -> str:
    *of_fields, together = longest
    sizes = (f"{name} {size}" for name, size in zip(layout.fields, of_fields, strict=True))
    text = ", ".join(sizes)
    if len(layout.lengths) == 1:
        text += f", together {together}; data.length is {layout.length}"
    else:
        encoder, decoder = layout.lengths
        text += f"; data.encoder_length is {encoder}, data.length {decoder}"
    return f"(the longest: {text}); make the rows longer, or set data.too_long to cut or drop"
