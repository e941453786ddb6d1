"""Pictures with captions: the rows of a store, and their augmentation from a row's generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lm.data.packing import check_rows
from lm.data.rows import RowLayout, Rows, Span
from lm.data.tokens import TokenStore

_ASPECT = 4 / 3  # of a crop's height and width, at most, as in random resized crops elsewhere


def augment(
    images: np.ndarray,
    rng: Callable[[int], np.random.Generator],
    *,
    flip: bool,
    crop_scale: tuple[float, float] | None,
    size: int,
) -> np.ndarray:
    """Return the pictures [B, size, size, 3] of `images`, both uint8; picture i depends on its
    pixels and `rng(i)` alone, which is not called where nothing is random.

    flip: mirror every other picture, left to right. crop_scale: the smallest and the largest share
    of the area that is kept, a rectangle at random whose sides are in a ratio of 3/4 to 4/3; None:
    all of it. What is kept is resized to `size`, not at all where it has that size.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8 [B, H, W, 3], not {images.dtype} {images.shape}")
    if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"crop_scale {crop_scale}: give two shares, 0 < smallest <= largest <= 1")
    height, width = images.shape[1:3]
    if not flip and crop_scale is None and (height, width) == (size, size):
        return images
    result = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        if flip or crop_scale is not None:
            mirrored, *where = rng(i).random(5)  # as many for all settings
            if crop_scale is not None:
                image = _random_crop(image, crop_scale, where)
            if flip and mirrored < 0.5:
                image = image[:, ::-1]
        result[i] = resize(image, size)
    return result


def _random_crop(image: np.ndarray, scale: tuple[float, float], random: list[float]) -> np.ndarray:
    height, width = image.shape[:2]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * random[0])
    aspect = _ASPECT ** (2 * random[1] - 1)
    new_height = min(max(round(np.sqrt(area * aspect)), 1), height)
    new_width = min(max(round(np.sqrt(area / aspect)), 1), width)
    top = int(random[2] * (height - new_height + 1))
    left = int(random[3] * (width - new_width + 1))
    return image[top : top + new_height, left : left + new_width]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Return a picture, uint8 [H, W, 3], as [size, size, 3] by a triangle filter as wide as a pixel
    of the coarser grid: bilinear where it grows, without aliasing where it shrinks.
    """
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    rows = _weights(height, size) @ image.reshape(height, width * channels).astype(np.float32)
    columns = _weights(width, size) @ rows.reshape(size, width, channels)
    return np.rint(columns).astype(np.uint8)


def _weights(length: int, size: int) -> np.ndarray:
    """Return the weight of every old pixel in each new one, float32 [size, length]."""
    scale = length / size
    centers = (np.arange(size) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(length) - centers[:, None]) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


class CaptionedImages:
    """The pictures of a token store with their captions, a document a row; a `RowSource`."""

    def __init__(self, store: TokenStore, layout: RowLayout, *, too_long: str = "error"):
        """too_long: "error"; "cut", a caption is cut at its end, keeping its eos; "drop", pictures
        with longer captions are in no row. Raises ValueError where captions are too long, none is
        left, or the store has no pictures of the layout's size.
        """
        _check_size(store, layout)
        self.path, self.layout = store.path, layout
        self._store = store
        lengths = [_long_documents(store, i, layout.length) for i in range(len(store.shards))]
        num_long = sum(map(len, lengths))
        if num_long and too_long == "error":
            raise ValueError(
                f"{store.path}: {num_long:,} of {store.num_documents:,} captions are longer than "
                f"data.length ({layout.length}), eos included; make it longer, or set "
                "data.too_long to cut or drop"
            )
        self._dropped = np.zeros(0, np.int64)
        if too_long == "drop":
            self._dropped = np.concatenate([self._dropped, *lengths])
        if len(self._dropped) == store.num_documents:
            raise ValueError(
                f"{store.path}: none of its {store.num_documents:,} captions fits into data.length "
                f"({layout.length})"
            )
        self.truncation_summary = ""
        if num_long:
            verb = "dropped" if too_long == "drop" else "cut"
            self.truncation_summary = (
                f"{store.path}: of {store.num_documents:,} captions {num_long:,} were {verb}, too "
                f"long for rows of {layout.length}"
            )
        self.bytes_per_token = None if num_long else store.num_bytes / store.num_tokens

    def __len__(self) -> int:
        return self._store.num_documents - len(self._dropped)

    def read(self, rows: np.ndarray) -> Rows:
        """Return the rows with the indices `rows`: int64 [B]; IndexError outside of `[0, len)`."""
        documents = self._documents(rows)
        starts, stops = self._store.offsets[np.stack([documents, documents + 1])]
        lengths = np.minimum(stops - starts, self.layout.length)
        segments = (np.arange(self.layout.length) < lengths[:, None]).astype(np.int32)
        ids = np.zeros_like(segments)
        found = self._store.read_ranges(starts.tolist(), (starts + lengths).tolist())
        ids[segments > 0] = np.concatenate([np.zeros(0, np.int32), *found])
        ids[np.arange(len(ids)), lengths - 1] = self._store.eos_id  # also of a caption that is cut
        return Rows(
            ids,
            segments,
            np.arange(self.layout.length, dtype=np.int32) * segments,
            np.full_like(ids, -1),
            images=self._store.images(documents),
        )

    def documents(self, rows: np.ndarray) -> list[list[Span]]:
        documents = self._documents(rows)
        starts, stops = self._store.offsets[np.stack([documents, documents + 1])]
        lengths = np.minimum(stops - starts, self.layout.length).tolist()
        return [
            [Span(document, self._store.document_ids(document), 0, length)]
            for document, length in zip(documents.tolist(), lengths, strict=True)
        ]

    def _documents(self, rows: np.ndarray) -> np.ndarray:
        rows = check_rows(rows, len(self), self.path)
        # the k-th dropped document is before a row if k fewer than its number are
        before = self._dropped - np.arange(len(self._dropped))
        return rows + np.searchsorted(before, rows, "right")


def _check_size(store: TokenStore, layout: RowLayout) -> None:
    wanted, stored = layout.image_size, store.image_size
    assert wanted is not None, "called for layouts with pictures"
    if stored is None:
        raise ValueError(
            f"{store.path}: a store of text without pictures, which config.objective needs: "
            "prepare it with --image=COLUMN (docs/images.md)"
        )
    if stored != wanted:
        raise ValueError(
            f"{store.path}: its pictures are {stored} x {stored}, and the objective takes {wanted} "
            f"x {wanted}: prepare it with --image-size={wanted}"
        )


def _long_documents(store: TokenStore, shard: int, length: int) -> np.ndarray:
    """Return the documents of a shard that are longer, int64 [n]; their lengths are read only where
    there are some.
    """
    if store.shards[shard].longest_document <= length:
        return np.zeros(0, np.int64)
    [found] = np.nonzero(np.diff(store.offsets.of_shard(shard)) > length)
    return found + store.first_documents[shard]
