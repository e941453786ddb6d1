"""Augmentation of pictures, from each row's random numbers: mirrored, cropped and resized."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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
