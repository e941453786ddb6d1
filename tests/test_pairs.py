"""Documents of two fields to rows: whole, in one row each, together or apart, and rows are full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config.schema import DataConfig
from lm.data import pairs, pipeline
from lm.data.bins import assign_bins_with_capacities
from lm.data.rows import RowLayout
from lm.data.tokens import TokenStore
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers.tokenizer import ByteTokenizer

FIELDS = ("source", "target")
EOS = ByteTokenizer().eos_id


@pytest.fixture(scope="module")
def make_stores(tmp_path_factory):
    """[(source, target)] -> the stores of both fields."""

    def make(texts):
        path = tmp_path_factory.mktemp("pairs") / "store"
        documents = [
            Document(f"pair {i}", {"source": source, "target": target})
            for i, (source, target) in enumerate(texts)
        ]
        write_store(path, documents, ByteTokenizer(), fields=FIELDS)
        return [TokenStore.open(path, field=name) for name in FIELDS]

    return make


@pytest.fixture(scope="module")
def many(make_stores):
    """200 pairs of random lengths, each of letters of its own."""
    rng = np.random.default_rng(0)
    texts = []
    for i in range(200):
        sizes = rng.geometric(0.08, 2)
        texts.append(tuple(chr(97 + (i + 3 * f) % 26) * min(n, 59) for f, n in enumerate(sizes)))
    return texts, make_stores(texts)


def tokens(text):
    return [*text.encode(), EOS]


def test_rows_by_hand(make_stores):
    stores = make_stores([("ab", "x"), ("c", "yz"), ("def", "")])
    a, b, c, d, e, f, x, y, z = (ord(letter) for letter in "abcdefxyz")
    together = pairs.Pairs(stores, RowLayout((10,), FIELDS)).read(np.arange(1))
    np.testing.assert_array_equal(together.ids, [[a, b, EOS, x, EOS, c, EOS, y, z, EOS]])
    np.testing.assert_array_equal(together.segments, [[1] * 5 + [2] * 5])
    np.testing.assert_array_equal(together.positions, [[0, 1, 2, 3, 4] * 2])
    np.testing.assert_array_equal(together.fields, [[0, 0, 0, 1, 1, 0, 0, 1, 1, 1]])
    apart = pairs.Pairs(stores, RowLayout((5, 6), FIELDS)).read(np.arange(2))
    np.testing.assert_array_equal(
        apart.ids,
        [[a, b, EOS, c, EOS, x, EOS, y, z, EOS, 0], [d, e, f, EOS, 0, EOS, 0, 0, 0, 0, 0]],
    )
    np.testing.assert_array_equal(
        apart.segments, [[1, 1, 1, 2, 2, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        apart.positions, [[0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0]]
    )
    assert (apart.previous == -1).all()


@pytest.mark.parametrize("lengths", [(120,), (60, 60), (200, 80)])
def test_every_document_is_whole_in_exactly_one_row(many, lengths):
    texts, stores = many
    packed = pairs.Pairs(stores, RowLayout(lengths, FIELDS))
    rows = packed.read(np.arange(len(packed)))
    seen = []
    for r, spans in enumerate(packed.documents(np.arange(len(packed)))):
        for number, span in enumerate(spans, 1):
            held = rows.segments[r] == number
            source, target = (rows.ids[r, held & (rows.fields[r] == f)] for f in (0, 1))
            assert source.tolist() == tokens(texts[span.document][0])
            assert target.tolist() == tokens(texts[span.document][1])
            assert span.stop == len(source) + len(target)
            seen.append(span.document)
    assert sorted(seen) == list(range(len(texts)))


def test_a_row_does_not_depend_on_the_rows_read_with_it(many):
    packed = pairs.Pairs(many[1], RowLayout((60, 60), FIELDS))
    whole = packed.read(np.arange(len(packed)))
    order = np.array([3, 0, 0, len(packed) - 1])
    chosen, none = packed.read(order), packed.read(np.empty(0, int))
    for name in ("ids", "segments", "positions", "fields", "previous"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(whole, name)[order])
        assert len(getattr(none, name)) == 0
    with pytest.raises(IndexError):
        packed.read(np.array([len(packed)]))


@given(data=st.data(), lanes=st.tuples(st.integers(1, 12), st.integers(1, 12)))
@settings(max_examples=100, deadline=None)
def test_no_bin_holds_more_than_its_lanes_and_none_is_opened_in_vain(data, lanes):
    item = st.tuples(st.integers(1, lanes[0]), st.integers(1, lanes[1]))
    lengths = np.array(data.draw(st.lists(item, min_size=1, max_size=50)))
    bins = assign_bins_with_capacities(lengths, lanes)
    used = np.stack([np.bincount(bins, weights=lengths[:, f]) for f in (0, 1)], 1)
    assert (used[np.unique(bins)] > 0).all() and (used <= lanes).all()
    assert sorted(np.unique(bins)) == list(range(bins.max() + 1))
    for later in range(1, bins.max() + 1):  # what opened it fitted in no bin that was there
        fits = (used[:later] + lengths[bins == later][:, None] <= lanes).all(2)
        assert not fits.any(1).all()


def test_typical_pairs_waste_less_than_five_percent_of_the_tighter_part():
    rng = np.random.default_rng(0)
    source = np.clip(rng.lognormal(3, 0.6, 50_000), 2, 256).astype(int)
    target = np.clip(source * rng.lognormal(0, 0.2, 50_000), 2, 256).astype(int)
    bins = assign_bins_with_capacities(np.stack([source, target], 1), (256, 256))
    fill = max(source.sum(), target.sum()) / (256 * (bins.max() + 1))
    assert fill > 0.95


def test_too_long_documents_are_an_error_or_cut_or_dropped(make_stores):
    stores = make_stores([("abcdef", "x"), ("ab", "yz"), ("c", "0123456789")])
    layout = RowLayout((8,), FIELDS)
    with pytest.raises(ValueError, match=r"2 of 3.*source 7, target 11.*data\.length is 8"):
        pairs.Pairs(stores, layout)
    with pytest.raises(ValueError, match=r"data\.encoder_length is 6, data\.length 4"):
        pairs.Pairs(stores, RowLayout((6, 4), FIELDS))
    dropped = pairs.Pairs(stores, layout, too_long="drop")
    assert (dropped.num_cut, dropped.num_dropped, len(dropped)) == (0, 2, 1)
    cut = pairs.Pairs(stores, layout, too_long="cut")
    assert (cut.num_cut, cut.num_dropped) == (1, 1)
    assert "of 3 documents 1 were cut and 1 dropped" in cut.truncation_summary
    assert pairs.Pairs(stores, RowLayout((40,), FIELDS)).truncation_summary == ""
    ids = cut.read(np.arange(len(cut))).ids.tolist()
    assert [*b"abcde", EOS, ord("x"), EOS] in ids
    with pytest.raises(ValueError, match="none of its 3 documents fits"):
        pairs.Pairs(stores, RowLayout((2,), FIELDS), too_long="drop")


def test_the_plan_is_read_from_the_cache(many, tmp_path):
    layout = RowLayout((60, 60), FIELDS)
    fresh = pairs.Pairs(many[1], layout)
    pairs.Pairs(many[1], layout, cache=tmp_path)
    [file] = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = pairs.Pairs(many[1], layout, cache=tmp_path)
    rows = np.arange(len(fresh))
    np.testing.assert_array_equal(again.read(rows).ids, fresh.read(rows).ids)
    assert file.stat().st_mtime_ns == before
    pairs.Pairs(many[1], RowLayout((60, 61), FIELDS), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_config_names_both_fields_and_what_is_too_long(many):
    path, config = many[1][0].path, DataConfig(too_long="cut")
    with pytest.raises(ValueError, match=r"data\.too_long \('skip'\) must be one of error, cut"):
        wrong = DataConfig(too_long="skip")
        pipeline.make_source(path, wrong, RowLayout((40, 40), FIELDS), ByteTokenizer())
    source = pipeline.make_source(path, config, RowLayout((40, 40), FIELDS), ByteTokenizer())
    assert isinstance(source, pairs.Pairs) and source.num_cut > 0 and source.num_dropped > 0
    assert source.bytes_per_token is None
    with pytest.raises(ValueError, match="no field 'answer'; it has source, target"):
        pipeline.make_source(path, config, RowLayout((40,), ("source", "answer")), ByteTokenizer())
