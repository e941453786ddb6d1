"""Span corruption against T5's published definition, and the rows that it fills."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.rows import Rows
from lm.objectives import ModelInterface, span_corruption
from lm.objectives.spans import GroupedText, SpanNoise, random_spans
from lm.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
VOCAB = 400
T5 = ModelInterface(114, encoder_length=512, vocab_size=VOCAB)


def generator(i):
    return np.random.default_rng([0, 0, i])


def build(form=T5, **config):
    return span_corruption.build(span_corruption.Config(**config), TOKENIZER, form)


def make_rows(lengths, width, seed=0):
    """Rows of documents of these lengths, eos included, cut and padded to `width`; ids from 0."""
    ids, segments, positions = np.zeros((3, len(lengths), width), np.int32)
    rng = np.random.default_rng(seed)
    for r, row in enumerate(lengths):
        start = 0
        for number, length in enumerate(row, 1):
            stop = min(start + length, width)
            ids[r, start:stop] = rng.integers(0, 255, length)[: stop - start]
            if start + length <= width:
                ids[r, stop - 1] = EOS
            segments[r, start:stop] = number
            positions[r, start:stop] = np.arange(stop - start)
            start = stop
    return Rows(ids, segments, positions, np.full_like(ids, -1))


def pieces(ids):
    """[(sentinel or None, ids that follow it)] of a list without padding, eos taken off."""
    assert ids[-1] == EOS
    found = [(None, [])]
    for token in ids[:-1]:
        if token > EOS:
            found.append((token, []))
        else:
            found[-1][1].append(token)
    return found


def rebuilt(corrupted, target):
    """The text that a corrupted one and its target are of."""
    spans = dict(pieces(target)[1:])
    text = []
    for sentinel, ids in pieces(corrupted):
        text += ([] if sentinel is None else spans.pop(sentinel)) + ids
    assert not spans
    return text


def parts(batch, row):
    """{segment: (corrupted text, target)} of a row, from an encoder and a decoder or from one."""
    found = {}
    stream = batch.inputs if batch.encoder is None else batch.encoder
    for number in np.unique(stream.segments[row][stream.segments[row] > 0]):
        held = batch.inputs.segments[row] == number
        targets, scored = batch.targets[row][held], batch.weights[row][held] > 0
        source = (
            targets[~scored]
            if batch.encoder is None
            else batch.encoder.ids[row][batch.encoder.segments[row] == number]
        )
        found[int(number)] = (source.tolist(), targets[scored].tolist())
    return found


def test_lengths_are_those_of_the_paper():
    assert SpanNoise(0.15, 3).lengths(568) == (512, 114)
    assert build().layout.lengths == (568,)
    assert build(ModelInterface(626, vocab_size=VOCAB)).layout.lengths == (568,)
    assert SpanNoise(0.15, 3).counts(568) == (85, 28)
    assert SpanNoise(0.5, 3).lengths(512) == (512 - 256 + 85 + 1, 256 + 85 + 1)


def test_by_hand():
    # keys: the smallest ones but the first of each part begin a span, or text between spans
    groups = np.zeros(8, int)
    keys = np.array([0.9, 0.2, 0.3, 0.9, 0.5, 0.1, 0.6, 0.7])
    mask = random_spans(np.array([3]), np.array([2]), groups, keys)
    # hidden: 3 items, a cut before the second: 1 + 2; text: 5 items, before the third: 2 + 3
    np.testing.assert_array_equal(mask, [0, 0, 1, 0, 0, 0, 1, 1])


def test_a_row_by_hand():
    objective = build(ModelInterface(8, encoder_length=30, vocab_size=VOCAB))
    assert objective.layout.lengths == (32,)
    rows = make_rows([[32]], 32)
    batch = objective(rows, generator)
    [(source, target)] = parts(batch, 0).values()
    first = VOCAB - 1
    assert [s for s, _ in pieces(source)] == [None, first, first - 1]
    assert [s for s, _ in pieces(target)] == [None, first, first - 1]
    assert rebuilt(source, target) == rows.ids[0, :-1].tolist()
    np.testing.assert_array_equal(batch.inputs.ids[0], [BOS, *batch.targets[0, :-1]])
    assert batch.inputs.bidirectional is None


@pytest.mark.parametrize(
    "form", [T5, ModelInterface(626, vocab_size=VOCAB)], ids=["encoder", "decoder"]
)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_inputs_and_targets_give_the_text_back(form, data):
    lengths = st.lists(st.integers(1, 700), min_size=1, max_size=60)
    width = 568
    drawn = data.draw(st.lists(lengths, min_size=1, max_size=3))
    rows = make_rows(drawn, width)
    batch = build(form)(rows, generator)
    for r in range(len(rows.ids)):
        got = []
        for source, target in parts(batch, r).values():
            got += [*(rebuilt(source, target) if target else source[:-1]), EOS]
        text = rows.ids[r][rows.segments[r] > 0].tolist()
        assert got == text + ([] if text[-1] == EOS else [EOS])


@pytest.mark.parametrize("form", [T5, ModelInterface(16, encoder_length=64, vocab_size=VOCAB)])
@pytest.mark.parametrize("mean", [400, 60, 25, 4])
def test_rows_of_pieces_that_were_cut_out_of_documents_fit(form, mean):
    """Without an eos that the corrupted text could have in place of the piece's own."""
    objective = build(form)
    [width] = objective.layout.lengths
    rng = np.random.default_rng(mean)
    rows = make_rows([rng.geometric(1 / mean, width).tolist() for _ in range(50)], width)
    rows.ids[rows.ids == EOS] = 0
    batch = objective(rows, generator)
    for r in range(len(rows.ids)):
        found = [rebuilt(*of) if of[1] else of[0][:-1] for of in parts(batch, r).values()]
        assert [token for text in found for token in text] == rows.ids[r].tolist()


@pytest.fixture(scope="module")
def t5_batch():
    """10,000 rows of one document that goes on."""
    rows = make_rows([[600]] * 10_000, 568)
    return build()(rows, generator)


def test_rows_are_full(t5_batch):
    assert (t5_batch.encoder.segments == 1).all() and (t5_batch.inputs.segments == 1).all()
    assert (t5_batch.weights == 1).all()


def test_noise_and_spans_are_distributed_as_published(t5_batch):
    """Counts are T5's constants; the length of a span of a random composition of 85 in 28 has
    P(l) = C(84 - l, 26) / C(84, 27). Within five standard errors over 280,000 spans.
    """
    is_sentinel = t5_batch.targets > EOS
    assert (is_sentinel.sum(1) == 28).all()
    assert ((t5_batch.encoder.ids > EOS).sum(1) == 28).all()
    hidden = (t5_batch.targets < EOS).sum(1)
    assert (hidden == 85).all() and abs(hidden.mean() / 568 - 0.15) < 1e-3
    ends = np.nonzero(is_sentinel | (t5_batch.targets == EOS))[1].reshape(10_000, 29)
    lengths = np.diff(ends, axis=1) - 1
    assert lengths.mean() == pytest.approx(85 / 28)
    place, total = np.arange(1, 12), lengths.size
    probability = np.array([choose(84 - k, 26) / choose(84, 27) for k in place.tolist()])
    found = np.array([(lengths == k).mean() for k in place])
    # spans of a row are not independent, but almost: their sum is fixed
    assert (np.abs(found - probability) < 5 * np.sqrt(probability / total)).all()
    by_place = lengths.mean(0)  # no place in the row has longer spans than another
    assert np.abs(by_place - 85 / 28).max() < 5 * lengths.std() / 100


def choose(n, k):
    result = 1.0
    for i in range(k):
        result *= (n - i) / (i + 1)
    return result


def test_text_between_spans_is_distributed_like_the_spans(t5_batch):
    is_sentinel = t5_batch.encoder.ids > EOS
    places = np.nonzero(is_sentinel)[1].reshape(10_000, 28)
    lengths = np.diff(np.concatenate([np.full((10_000, 1), -1), places], 1), axis=1) - 1
    assert (lengths >= 1).all() and lengths.sum(1).tolist() == [568 - 85] * 10_000
    assert np.abs(lengths.mean(0) - 483 / 28).max() < 5 * lengths.std() / 100
    assert (t5_batch.encoder.ids[:, -2] > EOS).all()  # a row ends in a hidden span, then eos


MORE = [pytest.param(*x, marks=pytest.mark.slow) for x in ((100, 0.998), (4, 0.997))]


@pytest.mark.parametrize(("mean", "least"), [(400, 0.998), (20, 0.997), *MORE])
@pytest.mark.parametrize(
    "form", [T5, ModelInterface(626, vocab_size=VOCAB)], ids=["encoder", "decoder"]
)
def test_rows_of_several_documents_are_as_full_and_keep_them_apart(form, mean, least):
    rng = np.random.default_rng(0)
    lengths = [rng.geometric(1 / mean, 568).tolist() for _ in range(200)]
    batch = build(form)(make_rows(lengths, 568), generator)
    filled = [(batch.inputs.segments > 0).mean()]
    if batch.encoder is not None:
        filled.append((batch.encoder.segments > 0).mean())
    assert min(filled) > least
    hidden = (batch.targets < EOS) & (batch.weights > 0)
    assert 0.115 < hidden.sum() / (200 * 568) < 0.15
    assert np.unique(batch.inputs.segments).size > 2 or mean == 400


def test_documents_that_are_long_enough_have_segments_of_their_own():
    text = GroupedText.of(make_rows([[30, 29, 2, 31, 40]], 568), EOS, 30)
    assert text.segments.tolist() == [1, 2, 4, 5]
    assert np.bincount(text.groups).tolist() == [29, 30, 30, 39]


def test_a_row_does_not_depend_on_its_neighbours():
    rows = make_rows([[100, 300, 200], [600], [20] * 30, [7]], 568)
    whole = build()(rows, generator)
    for i in range(4):
        one = slice(i, i + 1)
        part = Rows(rows.ids[one], rows.segments[one], rows.positions[one], rows.previous[one])
        alone = build()(part, lambda _, i=i: generator(i))
        np.testing.assert_array_equal(alone.encoder.ids, whole.encoder.ids[one])
        np.testing.assert_array_equal(alone.targets, whole.targets[one])


def test_the_prefix_of_a_decoder_is_what_is_not_predicted():
    batch = build(ModelInterface(626, vocab_size=VOCAB))(make_rows([[300, 400]], 568), generator)
    prefix, scored = batch.inputs.bidirectional, batch.weights > 0
    first = batch.inputs.positions == 0
    expected = (~scored[:, :-1] | first[:, 1:]) & (batch.inputs.segments[:, 1:] > 0)
    np.testing.assert_array_equal(prefix[:, 1:], expected)
    plain = build(ModelInterface(626, vocab_size=VOCAB), bidirectional=False)
    assert plain(make_rows([[300, 400]], 568), generator).inputs.bidirectional is None


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        (ModelInterface(128, is_causal=False), {}, "needs a decoder"),
        (
            ModelInterface(100, 512, vocab_size=VOCAB),
            {},
            r"512.*568 tokens.*114.*data\.length \(100\) to 114",
        ),
        (
            ModelInterface(130, 512, vocab_size=VOCAB),
            {},
            r"data\.length \(130\) to 114.*at most 129",
        ),
        (ModelInterface(114, 512, vocab_size=280), {}, r"28 sentinels from id 279.*at least 288"),
        (T5, {"noise_density": 0.9}, r"noise_density \(0.9\)"),
        (T5, {"mean_span": 0.5}, r"mean_span \(0.5\)"),
        (T5, {"first_sentinel": 270}, "28 sentinels from id 270"),
        (ModelInterface(4, vocab_size=VOCAB), {}, r"data\.length \(4\) is too short"),
    ],
)
def test_what_cannot_work_is_refused(form, config, message):
    with pytest.raises(ValueError, match=message):
        build(form, **config)
