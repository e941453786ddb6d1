"""Documents to rows: every token once, segments and positions, best-fit without truncation."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import packing
from lm.data.bins import assign_bins, plan_chunks
from lm.data.tokens import TokenStore
from lm.objectives import ModelInterface, causal
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers.tokenizer import ByteTokenizer

EOS = ByteTokenizer().eos_id
PACKINGS = [packing.split, packing.best_fit]


def make_store(folder, lengths):
    """A store of byte tokens: document i is `lengths[i] - 1` letters of its own, and eos."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [
        "".join(letters[(7 * i + j) % 26] for j in range(n - 1)) for i, n in enumerate(lengths)
    ]
    documents = [Document(f"document {i}", {"text": text}) for i, text in enumerate(texts)]
    write_store(Path(folder) / "store", documents, ByteTokenizer())
    return TokenStore.open(Path(folder) / "store")


def all_rows(packed):
    return packed.read(np.arange(len(packed)))


document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)
row_lengths = st.integers(1, 24)


def test_split_rows_by_hand(tmp_path):
    rows = all_rows(packing.split(make_store(tmp_path, [3, 1, 6]), 4))
    a, b, h, i, o, p, q, r, s = (ord(c) for c in "abhiopqrs")
    assert (h, i) != (a, b)
    np.testing.assert_array_equal(rows.ids, [[a, b, EOS, EOS], [o, p, q, r], [s, EOS, 0, 0]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 2], [1, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0]])
    np.testing.assert_array_equal(rows.previous[:, 0], [-1, -1, r])


def test_best_fit_rows_by_hand(tmp_path):
    # The pieces are 3, 4 + 2 (a document of 6 is cut) and 1: the 1 fits best beside the 3.
    rows = all_rows(packing.best_fit(make_store(tmp_path, [3, 6, 1]), 4))
    a, b, h, i, j, k, l = (ord(c) for c in "abhijkl")  # noqa: E741
    np.testing.assert_array_equal(rows.ids, [[a, b, EOS, EOS], [h, i, j, k], [l, EOS, 0, 0]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 2], [1, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0]])
    np.testing.assert_array_equal(rows.previous[:, 0], [-1, -1, k])


def test_the_rest_of_a_cut_document_comes_first_so_that_it_continues(tmp_path):
    # The pieces are 1 and 4 + 2: the 2 and the 1 share a row, which belongs to the first document.
    rows = all_rows(packing.best_fit(make_store(tmp_path, [1, 6]), 4))
    h, i, j, k, l = (ord(c) for c in "hijkl")  # noqa: E741
    np.testing.assert_array_equal(rows.ids, [[l, EOS, EOS, 0], [h, i, j, k]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 2, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(rows.previous[:, 0], [k, -1])


def test_every_rest_of_a_cut_document_in_a_row_continues_it(tmp_path):
    # The pieces are 4 + 2 and 4 + 2: the two rests share a row.
    packed = packing.best_fit(make_store(tmp_path, [6, 6]), 4)
    rows = all_rows(packed)
    [shared] = [r for r, spans in enumerate(packed.documents(np.arange(3))) if len(spans) == 2]
    before = [rows.ids[r, 3] for r in range(3) if r != shared]  # the ends of the whole pieces
    np.testing.assert_array_equal(rows.segments[shared], [1, 1, 2, 2])
    np.testing.assert_array_equal(rows.previous[shared], [before[0], -1, before[1], -1])
    form = ModelInterface(length=4, is_causal=True, encoder_length=None, vocab_size=259)
    batch = causal.build(causal.Config(), ByteTokenizer(), form)(rows, np.random.default_rng)
    inputs, bos = batch.inputs.ids[shared], ByteTokenizer().bos_id
    np.testing.assert_array_equal(inputs[[0, 2]], before)
    assert (batch.inputs.ids == bos).sum() == 2  # once for each document


@pytest.mark.parametrize("pack", PACKINGS)
@given(lengths=document_lengths, length=row_lengths)
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_exactly_one_row(pack, lengths, length):
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(folder, lengths)
        packed = pack(store, length)
        rows = all_rows(packed)
        seen = np.zeros(store.num_tokens, int)
        spans = packed.documents(np.arange(len(packed)))
        for ids, segments, in_row in zip(rows.ids, rows.segments, spans, strict=True):
            held = []
            for span in in_row:
                start, stop = store.offsets[span.document] + [span.start, span.stop]
                assert stop <= store.offsets[span.document + 1]
                seen[start:stop] += 1
                held.append(store.tokens(start, stop))
                assert span.id == f"document {span.document}"
            held = np.concatenate(held)
            np.testing.assert_array_equal(ids[: len(held)], held)
            assert not ids[len(held) :].any() and not segments[len(held) :].any()
            expected = [
                n + 1 for n, span in enumerate(in_row) for _ in range(span.start, span.stop)
            ]
            np.testing.assert_array_equal(segments[: len(held)], expected)
        assert (seen == 1).all()


@pytest.mark.parametrize("pack", PACKINGS)
@given(lengths=document_lengths, length=row_lengths)
@settings(max_examples=40, deadline=None)
def test_positions_restart_in_segments_and_previous_continues_the_document(pack, lengths, length):
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(folder, lengths)
        packed = pack(store, length)
        rows = all_rows(packed)
        for r, spans in enumerate(packed.documents(np.arange(len(packed)))):
            expected = [p for span in spans for p in range(span.stop - span.start)]
            expected += [0] * (length - len(expected))
            np.testing.assert_array_equal(rows.positions[r], expected)
            expected, column = np.full(length, -1), 0
            for span in spans:
                if span.start:
                    at = int(store.offsets[span.document]) + span.start
                    [expected[column]] = store.tokens(at - 1, at)
                column += span.stop - span.start
            np.testing.assert_array_equal(rows.previous[r], expected)
        assert [rows.ids.dtype, rows.segments.dtype, rows.positions.dtype] == [np.int32] * 3


@pytest.mark.parametrize("pack", PACKINGS)
def test_a_row_does_not_depend_on_the_rows_read_with_it(pack, tmp_path):
    packed = pack(make_store(tmp_path, [5, 1, 17, 9, 2, 2, 30, 4]), 8)
    whole = all_rows(packed)
    order = np.array([len(packed) - 1, 0, 3, 3, 1])
    chosen = packed.read(order)
    none = packed.read(np.empty(0, np.int64))
    for name in ("ids", "segments", "positions", "previous"):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(whole, name)[order])
        assert getattr(none, name).shape == (0, *getattr(whole, name).shape[1:])


@pytest.mark.parametrize("pack", PACKINGS)
@pytest.mark.parametrize("row", [-1, 1000])
def test_a_row_that_does_not_exist_is_an_error(pack, row, tmp_path):
    packed = pack(make_store(tmp_path, [5, 9]), 8)
    with pytest.raises(IndexError, match=str(row)):
        packed.read(np.array([0, row]))


@given(lengths=document_lengths, length=row_lengths)
@settings(max_examples=60, deadline=None)
def test_best_fit_never_cuts_a_document_that_fits(lengths, length):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    row_offsets, starts, stops = plan_chunks(offsets, length)
    assert (np.add.reduceat(stops - starts, row_offsets[:-1]) <= length).all()
    pieces = sorted(zip(starts.tolist(), stops.tolist(), strict=True))
    expected = [
        (start, min(start + length, stop))
        for begin, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        for start in range(begin, stop, length)
    ]
    assert pieces == expected


def best_fit_decreasing(lengths, capacity):
    """The textbook algorithm, one item at a time: returns the rooms that are left, sorted."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=capacity)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@given(data=st.data(), capacity=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_bins_are_those_of_best_fit_decreasing(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    bins = assign_bins(np.array(lengths), capacity)
    filled = np.bincount(bins, weights=lengths).astype(int)
    assert sorted((capacity - filled).tolist()) == best_fit_decreasing(lengths, capacity)


def test_best_fit_wastes_less_than_one_percent_of_typical_documents():
    lengths = np.random.default_rng(0).lognormal(6, 1.3, 100_000).astype(np.int64) + 1
    row_offsets, _, _ = plan_chunks(np.concatenate([[0], np.cumsum(lengths)]), 2048)
    assert lengths.sum() / (2048 * (len(row_offsets) - 1)) > 0.99


def test_plan_is_read_from_the_cache_and_depends_on_lengths(tmp_path):
    store = make_store(tmp_path, [5, 9, 30, 2])
    cache = tmp_path / "cache"
    fresh = all_rows(packing.best_fit(store, 8))
    packing.best_fit(store, 8, cache=cache)
    [file] = cache.iterdir()
    before = file.stat().st_mtime_ns
    again = all_rows(packing.best_fit(store, 8, cache=cache))
    np.testing.assert_array_equal(again.ids, fresh.ids)
    np.testing.assert_array_equal(again.segments, fresh.segments)
    assert file.stat().st_mtime_ns == before
    packing.best_fit(store, 9, cache=cache)
    assert len(list(cache.iterdir())) == 2
    packing.best_fit(make_store(tmp_path / "other", [5, 9, 30, 3]), 8, cache=cache)
    assert len(list(cache.iterdir())) == 3


def test_several_processes_share_a_cache(tmp_path):
    make_store(tmp_path, [5, 9, 30, 2] * 2000)
    program = (
        "import sys, hashlib, numpy as np\n"
        "from lm.data import packing\n"
        "from lm.data.tokens import TokenStore\n"
        "packed = packing.best_fit(TokenStore.open(sys.argv[1]), 8, cache=sys.argv[2])\n"
        "rows = packed.read(np.arange(len(packed)))\n"
        "print(hashlib.sha256(rows.ids.tobytes() + rows.segments.tobytes()).hexdigest())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "store"), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".bin"]


def test_a_cache_that_cannot_be_written_says_which_key_to_set(tmp_path):
    store = make_store(tmp_path, [3])
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"loader\.cache_dir"):
        packing.best_fit(store, 8, cache=tmp_path / "file")


def test_an_empty_store_is_refused(tmp_path):
    write_store(tmp_path / "empty", [], ByteTokenizer())
    for pack in PACKINGS:
        with pytest.raises(ValueError, match="no tokens"):
            pack(TokenStore.open(tmp_path / "empty"), 8)
