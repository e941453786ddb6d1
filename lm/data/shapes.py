"""Pictures of coloured shapes with captions, drawn from (seed, index), and read back from pixels.

    a red circle above a blue square
    a white cross left of a green triangle

A picture has two objects on black, of 7 colours and 4 shapes, in one of 2 relations: 1,568
arrangements, each with one caption. Sizes and places vary; the objects never touch. Every block of
as many indices as there are arrangements has each arrangement once, in a random order. A fifth of
them is held out: all attributes occur in the others, in both relations and as either object.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

from lm.data.packing import check_rows
from lm.data.rows import RowLayout, Rows, Span
from lm.data.sampler import hash_words, permute, scale_hash
from lm.tokenizers.tokenizer import Tokenizer

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "pink": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("above", "left of")
SPLITS = ("all", "seen", "held_out")
MIN_SIZE, MAX_SIZE = 16, 64
_HELD_OUT = 5  # one of so many arrangements
_SUPERSAMPLING = 8
_MAX_ERROR = 0.35  # squared error of a shape that is recognised, relative to its drawing
_MIN_LIGHT = 0.25  # of a pixel that belongs to an object


class Scene(NamedTuple):
    """An arrangement of two objects."""

    color: str
    shape: str
    relation: str
    other_color: str
    other_shape: str

    @property
    def caption(self) -> str:
        return (
            f"a {self.color} {self.shape} {self.relation} a {self.other_color} {self.other_shape}"
        )


@functools.cache
def arrangements(split: str = "all") -> tuple[Scene, ...]:
    """Return the arrangements of a split, in a fixed order; ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of the shapes does not exist: {', '.join(SPLITS)}")
    every = [Scene(*x) for x in itertools.product(COLORS, SHAPES, RELATIONS, COLORS, SHAPES)]
    is_held_out = permute(np.arange(len(every)), len(every), seed=0) % _HELD_OUT == 0
    wanted = {"all": (True, False), "seen": (False,), "held_out": (True,)}[split]
    return tuple(scene for scene, held in zip(every, is_held_out, strict=True) if held in wanted)


def scene_numbers(index: np.ndarray, *, seed: int, split: str = "all") -> np.ndarray:
    """Return the number in `arrangements(split)` of the scene of each index, int64 [n]."""
    count = len(arrangements(split))
    index = np.asarray(index, np.int64)
    return permute(index % count, count, seed=seed, epoch=index // count)


def draw(index: np.ndarray, *, size: int, seed: int, split: str = "all") -> np.ndarray:
    """Return the pictures with the indices `index`, uint8 [n, size, size, 3]."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"shapes are drawn in sizes {MIN_SIZE} to {MAX_SIZE}, not {size}")
    scenes = arrangements(split)
    images = np.zeros((len(index), size, size, 3), np.uint8)
    half, (smallest, largest) = size // 2, _diameters(size)
    # two diameters, two places across the halves and two along them
    words = hash_words(seed, np.asarray(index, np.int64)[:, None], np.arange(6))
    sizes = smallest + scale_hash(words[:, :2], np.uint64(largest + 1 - smallest)).astype(int)
    # one line stays free at the middle, and the objects overlap in the other direction
    room = np.concatenate([half - 1 - sizes, np.full_like(sizes, smallest - 2)], 1) + 1
    shifts = scale_hash(words[:, 2:], room.astype(np.uint64)).astype(int)
    for image, number, diameters, (first, second, *along) in zip(
        images,
        scene_numbers(index, seed=seed, split=split).tolist(),
        sizes.tolist(),
        shifts.tolist(),
        strict=True,
    ):
        scene = scenes[number]
        objects = (scene.color, scene.shape), (scene.other_color, scene.other_shape)
        places = first, half + 1 + second
        for (color, shape), diameter, place, shift in zip(
            objects, diameters, places, along, strict=True
        ):
            place = min(place, size - diameter)
            across = (size - diameter) // 2 - (smallest - 2) // 2 + shift
            across = min(max(across, 0), size - diameter)
            y, x = (place, across) if scene.relation == "above" else (across, place)
            light = coverage(shape, diameter)[..., None] * np.array(COLORS[color])
            image[y : y + diameter, x : x + diameter] = np.rint(light)
    return images


def captions(index: np.ndarray, *, seed: int, split: str = "all") -> list[str]:
    """Return the captions of the pictures with the indices `index`."""
    scenes = arrangements(split)
    return [scenes[n].caption for n in scene_numbers(index, seed=seed, split=split).tolist()]


def decode(images: np.ndarray) -> list[Scene | None]:
    """Return the scene of each picture, uint8 [n, size, size, 3]; None where there are not two
    objects of known shapes, each in its half, and nothing else.

    Colours are the nearest ones, and shapes those whose drawing, in any size and place of an
    object, has the smallest squared error: small noise and blur change neither.
    """
    return [_decode(image.astype(np.float32) / 255) for image in images]


def _decode(image: np.ndarray) -> Scene | None:
    """image: float32 [size, size, 3], 0 to 1."""
    half, best, scene = len(image) // 2, _MAX_ERROR, None
    for relation in RELATIONS:
        upright = image if relation == "above" else image.transpose(1, 0, 2)
        first, second = (
            _find_object(part, is_transposed=relation != "above")
            for part in (upright[:half], upright[half:])
        )
        if (error := max(first[0], second[0])) < best:
            best, scene = error, Scene(*first[1:], relation, *second[1:])
    return scene


def _find_object(image: np.ndarray, *, is_transposed: bool) -> tuple[float, str, str]:
    """Return the error, the colour and the shape whose drawing is most similar to a half picture.

    The error is the squared one, relative to that of a black picture.
    """
    smallest, largest = _diameters(image.shape[1])
    lit = image.max(-1) > 0.5
    if not lit.any():
        return np.inf, "", ""
    mean = image[lit].mean(0)
    color = min(COLORS, key=lambda name: np.abs(mean - np.array(COLORS[name]) / 255).sum())
    light = image.max(-1)  # of a pixel that an object covers partly: the part
    light = np.where(light > _MIN_LIGHT, light, 0)
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    top, left = (round((x[0] + x[-1] + 1) / 2) + largest for x in (rows, columns))
    padded, best, found = np.pad(light, largest), np.inf, ""
    for diameter in range(max(extent - 2, smallest), min(extent + 2, largest) + 1):
        drawings = np.stack([coverage(shape, diameter) for shape in SHAPES])
        drawings = (drawings.swapaxes(1, 2) if is_transposed else drawings).reshape(len(SHAPES), -1)
        y, x = top - (diameter + 1) // 2 - 2, left - (diameter + 1) // 2 - 2
        region = padded[max(y, 0) : y + diameter + 5, max(x, 0) : x + diameter + 5]
        windows = np.lib.stride_tricks.sliding_window_view(region, (diameter, diameter))
        products = windows.reshape(-1, diameter * diameter) @ drawings.T
        norms = (drawings**2).sum(1)
        errors = 1 + ((light**2).sum() - 2 * products) / norms
        place, shape = np.unravel_index(errors.argmin(), errors.shape)
        if errors[place, shape] < best:
            best, found = float(errors[place, shape]), SHAPES[shape]
    return best, color, found


def _diameters(size: int) -> tuple[int, int]:
    """Return the smallest and the largest diameter of an object."""
    return round(0.32 * size), size // 2 - 2


@functools.cache
def coverage(shape: str, diameter: int) -> np.ndarray:
    """Return the share of each pixel that a shape covers, float32 [diameter, diameter]."""
    steps = diameter * _SUPERSAMPLING
    y, x = np.mgrid[:steps, :steps]
    y, x = (2 * y + 1) / steps - 1, (2 * x + 1) / steps - 1  # -1 to 1
    inside = {
        "circle": y**2 + x**2 <= 1,
        "square": np.ones_like(y, bool),
        "triangle": np.abs(x) <= (y + 1) / 2,
        "cross": (np.abs(y) <= 1 / 3) | (np.abs(x) <= 1 / 3),
    }[shape]
    blocks = inside.reshape(diameter, _SUPERSAMPLING, diameter, _SUPERSAMPLING)
    result = blocks.mean((1, 3), dtype=np.float32)
    result.flags.writeable = False
    return result


class ShapeRows:
    """Pictures of shapes with their captions, a document a row; a `RowSource`."""

    bytes_per_token = None
    truncation_summary = ""

    def __init__(
        self,
        path: str,
        layout: RowLayout,
        tokenizer: Tokenizer,
        *,
        num_rows: int = 65536,
        seed: int = 0,
        split: str = "all",
    ):
        """path: for errors. Raises ValueError where a caption is longer than a row, and for sizes
        that are not drawn.
        """
        size = layout.image_size
        if size is None or not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"{path}: drawn in sizes {MIN_SIZE} to {MAX_SIZE}, not in {size}")
        if num_rows < 1:
            raise ValueError(f"{path}: give at least one row")
        self.path, self.layout = path, layout
        self._num_rows, self._size, self._seed, self._split = num_rows, size, seed, split
        encoded = tokenizer.encode_batch([scene.caption for scene in arrangements(split)])
        lengths = np.array([len(ids) + 1 for ids in encoded])
        if lengths.max() > layout.length:
            raise ValueError(
                f"{path}: captions have up to {lengths.max()} tokens with eos, data.length is "
                f"{layout.length}: make it longer"
            )
        self._ids = np.zeros((len(encoded), layout.length), np.int32)
        for row, ids in zip(self._ids, encoded, strict=True):
            row[: len(ids) + 1] = [*ids, tokenizer.eos_id]
        self._segments = (np.arange(layout.length) < lengths[:, None]).astype(np.int32)

    def __len__(self) -> int:
        return self._num_rows

    def read(self, rows: np.ndarray) -> Rows:
        """Return the rows with the indices `rows`: int64 [B]; IndexError outside of `[0, len)`."""
        rows = check_rows(rows, self._num_rows, self.path)
        numbers = scene_numbers(rows, seed=self._seed, split=self._split)
        segments = self._segments[numbers]
        return Rows(
            self._ids[numbers],
            segments,
            np.arange(segments.shape[1], dtype=np.int32) * segments,
            np.full_like(segments, -1),
            images=draw(rows, size=self._size, seed=self._seed, split=self._split),
        )

    def documents(self, rows: np.ndarray) -> list[list[Span]]:
        rows = check_rows(rows, self._num_rows, self.path)
        lengths = (
            self._segments[scene_numbers(rows, seed=self._seed, split=self._split)].sum(1).tolist()
        )
        pairs = zip(rows.tolist(), lengths, strict=True)
        return [[Span(row, f"shapes/{row}", 0, length)] for row, length in pairs]
