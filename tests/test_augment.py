"""Augmentation of pictures: pure, exact where nothing is resampled, and similar to Pillow's."""

import numpy as np
import pytest
from PIL import Image

from lm.data.images import augment, resize

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3)).astype(np.uint8)


def generators(seed, index=range(12)):
    return lambda i: np.random.default_rng([seed, 0, index[i]])


def test_a_picture_depends_on_its_pixels_and_its_generator_alone():
    options = {"flip": True, "crop_scale": (0.3, 1.0), "size": 16}
    whole = augment(IMAGES, generators(1), **options)
    some = [7, 2, 7]
    assert (augment(IMAGES[some], generators(1, some), **options) == whole[some]).all()
    assert whole.shape == (12, 16, 16, 3) and whole.dtype == np.uint8
    assert (augment(IMAGES, generators(2), **options) != whole).any()


def test_flips_mirror_about_half_of_the_pictures_exactly():
    images = np.repeat(IMAGES[:, :, :20], 20, 0)
    flipped = augment(images, generators(0, range(240)), flip=True, crop_scale=None, size=20)
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all() and 90 < mirrored.sum() < 150


def test_nothing_random_asks_for_no_generator():
    def forbidden(i):
        raise AssertionError(f"generator {i} was made")

    square = IMAGES[:, :, :20]
    options = {"flip": False, "crop_scale": None}
    assert (augment(square, forbidden, **options, size=20) == square).all()
    assert augment(IMAGES, forbidden, **options, size=8).shape == (12, 8, 8, 3)


def test_crops_are_parts_of_the_picture_of_the_asked_area():
    """Pixels are their own coordinates here, so a crop shows where it is."""
    y, x = np.mgrid[:64, :64]
    images = np.stack([4 * y, 4 * x, 0 * x], -1)[None].repeat(200, 0).astype(np.uint8)
    cropped = augment(images, generators(3, range(200)), flip=False, crop_scale=(0.2, 0.5), size=32)
    spans = np.ptp(cropped[..., :2].astype(float), axis=(1, 2)) / 4 + 1
    area = spans.prod(1) / 64**2
    assert area.min() > 0.17 and area.max() < 0.53 and np.ptp(area) > 0.2
    assert (spans[:, 0] > spans[:, 1]).mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("size", [7, 20, 45])
def test_resizing_is_that_of_pillow(size):
    expected = np.asarray(
        Image.fromarray(IMAGES[0]).resize((size, size), Image.Resampling.BILINEAR)
    )
    difference = np.abs(resize(IMAGES[0], size).astype(int) - expected)
    assert difference.max() <= 1


@pytest.mark.parametrize(
    "images, options, message",
    [
        (IMAGES.astype(np.float32), {}, "uint8"),
        (IMAGES[..., 0], {}, r"\[B, H, W, 3\]"),
        (IMAGES, {"crop_scale": (0.5, 1.5)}, "crop_scale"),
        (IMAGES, {"crop_scale": (0.0, 1.0)}, "crop_scale"),
    ],
)
def test_wrong_input_is_an_error(images, options, message):
    with pytest.raises(ValueError, match=message):
        augment(images, generators(0), **{"flip": True, "crop_scale": None, "size": 8, **options})
