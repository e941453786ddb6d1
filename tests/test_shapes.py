"""Pictures of shapes: exact, pure, read back from pixels, and a source of rows."""

import numpy as np
import pytest

from lm.config.schema import DataConfig
from lm.data import shapes
from lm.data.pipeline import Pipeline, make_source
from lm.data.rows import RowLayout
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.types import Batch, Tokens

LAYOUT = RowLayout((48,), image_size=16)


@pytest.mark.parametrize("size", [16, 31, 64])
def test_a_picture_is_a_function_of_seed_and_index(size):
    every = shapes.draw(np.arange(40), size=size, seed=3)
    some = np.array([7, 31, 7])
    assert (shapes.draw(some, size=size, seed=3) == every[some]).all()
    assert every.shape == (40, size, size, 3) and every.dtype == np.uint8
    assert len({image.tobytes() for image in every}) == 40
    assert (shapes.draw(some, size=size, seed=4) != every[some]).any()


@pytest.mark.parametrize("size", [16, 23, 32, 64])
@pytest.mark.parametrize("noise", [0, 20])
def test_captions_are_read_back_from_pixels(size, noise):
    index = np.arange(150)
    images = shapes.draw(index, size=size, seed=1)
    added = np.random.default_rng(0).normal(0, noise, images.shape)
    found = shapes.decode(np.clip(images + added, 0, 255).astype(np.uint8))
    assert [scene and scene.caption for scene in found] == shapes.captions(index, seed=1)


def test_what_is_not_two_objects_is_no_scene():
    [image] = shapes.draw(np.array([5]), size=32, seed=0)
    half, noise = image.copy(), np.random.default_rng(0).integers(0, 256, image.shape)
    half[:16] = 0
    half[:, :16] = 0
    both = np.maximum(image, shapes.draw(np.array([6]), size=32, seed=0)[0])
    wrong = [np.zeros_like(image), np.full_like(image, 255), noise.astype(np.uint8), half, both]
    assert shapes.decode(np.stack(wrong)) == [None] * 5


def test_a_change_of_one_attribute_is_seen():
    """Drawn by hand, not by `draw`: a red square above a blue circle, and variants of it."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[2:13, 10:21, 0] = 255
    y, x = np.mgrid[:32, :32]
    image[(y - 23) ** 2 + (x - 15) ** 2 <= 36, 2] = 255
    green = image.copy()
    green[..., 1] = image[..., 0]
    green[..., 0] = 0
    scenes = [image, image.transpose(1, 0, 2), green, image[::-1]]
    assert [scene and scene.caption for scene in shapes.decode(np.stack(scenes))] == [
        "a red square above a blue circle",
        "a red square left of a blue circle",
        "a green square above a blue circle",
        "a blue circle above a red square",
    ]


def test_held_out_arrangements_have_attributes_that_are_seen():
    seen, held_out = (set(shapes.arrangements(split)) for split in ("seen", "held_out"))
    assert not seen & held_out and seen | held_out == set(shapes.arrangements())
    assert len(held_out) == 314
    objects = {(s.relation, s.color, s.shape) for s in seen}
    others = {(s.relation, s.other_color, s.other_shape) for s in seen}
    assert len(objects) == len(others) == 2 * 7 * 4


def test_every_block_of_indices_has_every_arrangement_once():
    for start in (0, 314):
        found = shapes.captions(np.arange(start, start + 314), seed=2, split="held_out")
        assert sorted(found) == sorted(s.caption for s in shapes.arrangements("held_out"))
    index = np.arange(314)
    twice = shapes.captions(index + 314, seed=2, split="held_out")
    assert twice != shapes.captions(index, seed=2, split="held_out")


def source(path, layout=LAYOUT):
    return make_source(path, DataConfig(), layout, ByteTokenizer())


def test_rows_are_a_caption_and_its_picture():
    rows = source("synthetic:shapes:100:4:seen").read(np.array([3, 99]))
    index = np.array([3, 99])
    assert (rows.images == shapes.draw(index, size=16, seed=4, split="seen")).all()
    for ids, segments, positions, caption in zip(
        rows.ids,
        rows.segments,
        rows.positions,
        shapes.captions(index, seed=4, split="seen"),
        strict=True,
    ):
        length = len(caption) + 1
        assert bytes(ids[: length - 1].tolist()).decode() == caption and ids[length - 1] == 258
        assert (segments == (np.arange(48) < length)).all() and not ids[length:].any()
        assert (positions[:length] == np.arange(length)).all()
    spans = source("synthetic:shapes:100:4:seen").documents(index)
    assert [[span.stop for span in row] for row in spans] == rows.segments.sum(1)[:, None].tolist()


def test_a_pipeline_reads_them_in_any_order():
    def objective(rows, rng):
        tokens = Tokens(rows.ids, rows.segments, rows.positions)
        return Batch(tokens, rows.ids, (rows.segments > 0).astype(np.float32), images=rows.images)

    sources = {path: source(path) for path in ("synthetic:shapes:50:0", "synthetic:shapes:70:1")}
    pipeline = Pipeline(sources, objective, batch_size=8, seed=0)
    batch, part = pipeline.batch_at(2), pipeline.batch_at(2, slice(3, 5))
    assert batch.images.shape == (8, 16, 16, 3) and (part.images == batch.images[3:5]).all()
    texts = [bytes(i[i < 256].tolist()).decode().rstrip("\0") for i in batch.targets]
    assert [scene and scene.caption for scene in shapes.decode(batch.images)] == texts


@pytest.mark.parametrize(
    "path, layout, message",
    [
        ("synthetic:shapes:9", RowLayout((30,), image_size=16), "44 tokens with eos, data.length"),
        ("synthetic:shapes", RowLayout((48,), image_size=8), "sizes 16 to 64, not in 8"),
        ("synthetic:shapes", RowLayout((48,)), "shapes has pictures"),
        ("synthetic:markov", LAYOUT, "shapes has pictures"),
        ("synthetic:shapes:9:0:test", LAYOUT, "split 'test' of the shapes does not exist"),
        ("synthetic:shapes:0", LAYOUT, "at least one row"),
        ("synthetic:markov:9:0:seen", RowLayout((48,)), "must be synthetic:KIND"),
    ],
)
def test_errors_name_the_source(path, layout, message):
    with pytest.raises(ValueError, match=message):
        source(path, layout)
