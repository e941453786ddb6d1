"""Batches as a function of the step: purity, hosts, loaders, the end of the data, evaluation."""

import hashlib
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lm.config.schema import DataConfig, LoaderConfig
from lm.data import packing, pipeline
from lm.data.pipeline import OutOfData, Pipeline, make_source
from lm.data.rows import RowLayout
from lm.data.synthetic import KINDS, Synthetic
from lm.data.tokens import TokenStore
from lm.objectives import ModelInterface, causal
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.types import Batch, Tokens

TOKENIZER = ByteTokenizer()
CAUSAL = causal.build(causal.Config(), TOKENIZER, ModelInterface(24))
LOADERS = [LoaderConfig(kind="tf.data"), LoaderConfig(kind="thread")]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "run", "over", "hills"]


def write_documents(path, *, num_documents=60, seed=0):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(num_documents)]
    documents = [Document(f"{seed}/{i}.txt", {"text": text}) for i, text in enumerate(texts)]
    write_store(path, documents, TOKENIZER)
    return str(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return [write_documents(folder / f"store{seed}", seed=seed) for seed in range(2)]


@pytest.fixture
def mixed(stores):
    sources = {path: packing.split(TokenStore.open(path), 32) for path in stores}
    return Pipeline(sources, CAUSAL, batch_size=16, seed=3, weights=[0.7, 0.3])


def synthetic(num_rows, **options):
    source = Synthetic("random", vocab_size=100, length=8, num_rows=num_rows)
    return Pipeline({"rows": source}, CAUSAL, seed=1, **options)


def arrays(batch):
    tokens = [
        value
        for part in (batch.inputs, batch.encoder)
        if part is not None
        for value in (part.ids, part.segments, part.positions, part.bidirectional)
    ]
    return [*tokens, batch.targets, batch.weights]


def assert_equal(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        if x is None:
            assert y is None
        else:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def joined(batches, axis=0):
    columns = zip(*(arrays(batch) for batch in batches), strict=True)
    return [None if c[0] is None else np.concatenate(c, axis) for c in columns]


def noisy(rows, rng):
    """An objective that draws from the generator of every row."""
    batch = CAUSAL(rows, rng)
    weights = np.stack([rng(i).random(rows.ids.shape[1], np.float32) for i in range(len(rows.ids))])
    return Batch(inputs=batch.inputs, targets=batch.targets, weights=weights)


@pytest.mark.parametrize("step", [0, 1, 17, 10**6, 10**15])
@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_hosts_together_have_the_global_batch(mixed, step, num_hosts):
    whole = mixed.batch_at(step)
    size = mixed.batch_size // num_hosts
    parts = [mixed.batch_at(step, slice(h * size, (h + 1) * size)) for h in range(num_hosts)]
    for x, y in zip(joined(parts), arrays(whole), strict=True):
        np.testing.assert_array_equal(x, y)
    strided = mixed.batch_at(step, np.arange(0, mixed.batch_size, num_hosts))
    np.testing.assert_array_equal(strided.targets, whole.targets[::num_hosts])


def test_randomness_belongs_to_the_row_and_not_to_the_host_or_the_call():
    source = Synthetic("random", vocab_size=100, length=8, num_rows=32)
    make = Pipeline({"rows": source}, noisy, batch_size=8, seed=1)
    whole = make.batch_at(5).weights
    parts = [make.batch_at(5, slice(h * 2, h * 2 + 2)).weights for h in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    # 32 rows are 4 batches: the next epoch draws anew for the same rows
    drawn = np.concatenate([make.batch_at(step).weights for step in range(12)])
    assert len(np.unique(drawn, axis=0)) == 96
    other = Pipeline({"rows": source}, noisy, batch_size=8, seed=2)
    assert (other.batch_at(5).weights != whole).any()


def test_a_batch_is_the_same_in_any_order_of_calls(mixed):
    first = [mixed.batch_at(step) for step in range(6)]
    for step in (5, 0, 3, 3, 1):
        assert_equal(mixed.batch_at(step), first[step])


def test_the_seed_decides_the_order():
    source = {"rows": Synthetic("random", vocab_size=100, length=8, num_rows=1000)}
    first, other = (
        Pipeline(source, CAUSAL, batch_size=16, seed=seed).batch_at(0).targets for seed in (0, 1)
    )
    assert (first != other).any(1).sum() > 12


def test_a_batch_far_away_is_as_near_as_any(mixed):
    mixed.batch_at(0)
    times = []
    for step in range(10**6, 10**6 + 5):
        start = time.perf_counter()
        mixed.batch_at(step)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_rows_of_a_batch_are_those_that_explain_batch_names(mixed, stores):
    for step in (0, 40):
        batch = mixed.batch_at(step)
        explained = mixed.explain_batch(step, TOKENIZER, num_tokens=1000)
        assert {row.source for row in explained} == set(stores)
        for i, row in enumerate(explained):
            store = TokenStore.open(row.source)
            tokens = []
            for span, text in zip(row.documents, row.text, strict=True):
                assert store.document_ids(span.document) == span.id
                offset = store.offsets[span.document]
                held = store.tokens(offset + span.start, offset + span.stop)
                assert TOKENIZER.decode(held) == text
                tokens.append(held)
            tokens = np.concatenate(tokens)
            np.testing.assert_array_equal(batch.targets[i, : len(tokens)], tokens)
            np.testing.assert_array_equal(batch.weights[i] > 0, np.arange(32) < len(tokens))


def test_explain_batch_shortens_the_text_and_takes_rows(mixed):
    [row] = mixed.explain_batch(2, TOKENIZER, rows=slice(3, 4), num_tokens=5)
    assert row == mixed.explain_batch(2, TOKENIZER, num_tokens=5)[3]
    assert all(len(text) <= 5 for text in row.text)


def test_mixture_has_its_weights(mixed, stores):
    names = [row.source for step in range(50) for row in mixed.explain_batch(step, TOKENIZER)]
    assert abs(names.count(stores[0]) - 0.7 * 50 * 16) <= 1


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.kind)
@pytest.mark.parametrize("rows", [slice(None), slice(4, 8), np.array([1, 5, 9])], ids=str)
def test_iterate_gives_the_batches_of_batch_at(mixed, loader, rows):
    seen = list(mixed.iterate(7, 20, rows=rows, loader=loader))
    assert [step for step, _ in seen] == list(range(7, 20))
    for step, batch in seen:
        assert_equal(batch, mixed.batch_at(step, rows))


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.kind)
def test_iterate_carries_batches_with_every_optional_field(loader):
    def prefixed(rows, rng):
        batch = CAUSAL(rows, rng)
        prefix = Tokens(rows.ids, rows.segments, rows.positions, rows.positions < 2)
        return Batch(prefix, batch.targets, batch.weights, encoder=prefix)

    source = Synthetic("random", vocab_size=100, length=8, num_rows=32)
    make = Pipeline({"rows": source}, prefixed, batch_size=4, seed=1)
    for step, batch in make.iterate(0, 5, loader=loader):
        assert_equal(batch, make.batch_at(step))


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.kind)
def test_iterate_without_an_end_goes_on_over_epochs(loader):
    make = synthetic(8, batch_size=4)
    seen = itertools.islice(make.iterate(10**12, loader=loader), 9)
    assert [step for step, _ in seen] == list(range(10**12, 10**12 + 9))


def test_data_ends_at_the_first_batch_that_needs_a_later_epoch():
    make = synthetic(10, batch_size=4, num_epochs=1)
    assert make.num_batches(1) == 2  # rows 8 and 9 are dropped
    make.batch_at(1)
    with pytest.raises(OutOfData, match=r"step 2 .* 2 batches of 4 rows"):
        make.batch_at(2)
    twice = synthetic(10, batch_size=4, num_epochs=2)
    twice.batch_at(4)  # between the epochs nothing is dropped: 20 rows are 5 batches
    with pytest.raises(OutOfData, match="step 5"):
        twice.batch_at(5)


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.kind)
def test_iterate_ends_with_the_data_and_refuses_to_go_beyond(loader):
    make = synthetic(10, batch_size=4, num_epochs=2)
    assert [step for step, _ in make.iterate(1, loader=loader)] == [1, 2, 3, 4]
    assert list(make.iterate(5, loader=loader)) == []
    with pytest.raises(OutOfData, match="step 5"):
        make.iterate(0, 6, loader=loader)


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.kind)
def test_an_error_in_a_batch_reaches_the_consumer_at_its_step(loader):
    class Damaged(Synthetic):
        def read(self, rows):
            if (rows == 21).any():
                raise ValueError("row 21 of this source is damaged")
            return super().read(rows)

    source = Damaged("random", vocab_size=100, length=8, num_rows=64)
    make = Pipeline({"rows": source}, CAUSAL, batch_size=4, seed=1, shuffle=False)
    seen = []
    with pytest.raises(ValueError, match="row 21 of this source is damaged"):
        for step, _ in make.iterate(0, loader=loader):
            seen.append(step)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.kind)
def test_a_closed_iterator_leaves_nothing_running(loader):
    calls = []

    def counted(rows, rng):
        calls.append(threading.current_thread().name)
        return CAUSAL(rows, rng)

    source = Synthetic("random", vocab_size=100, length=8, num_rows=64)
    make = Pipeline({"rows": source}, counted, batch_size=4, seed=1)
    batches = make.iterate(0, loader=loader)
    for _ in range(3):
        next(batches)
    time.sleep(0.2)  # time enough to run ahead as far as it may
    batches.close()
    count = len(calls)
    assert (
        3 <= count <= 3 + loader.prefetch + 2 * loader.num_workers + 2
    )  # ahead, not without limit
    time.sleep(0.2)
    assert len(calls) == count
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")]


def test_without_tensorflow_its_loader_says_what_to_do(mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ValueError, match=r"loader\.kind=thread"):
        next(mixed.iterate(0, loader=LOADERS[0]))


def test_batches_and_the_thread_loader_need_no_tensorflow(stores):
    program = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from lm.config.schema import DataConfig, LoaderConfig\n"
        "from lm.data.pipeline import make_pipeline\n"
        "from lm.tokenizers.tokenizer import load\n"
        "from lm.objectives import ModelInterface, causal\n"
        "tokenizer = load('bytes')\n"
        "config = DataConfig(train=(sys.argv[1],), length=16)\n"
        "objective = causal.build(causal.Config(), tokenizer, ModelInterface(16))\n"
        "data = make_pipeline(config, objective, tokenizer, batch_size=4, seed=0)\n"
        "steps = data.iterate(0, 3, loader=LoaderConfig(kind='thread'))\n"
        "print([batch.targets.shape for _, batch in steps])\n"
    )
    root = Path(__file__).parent.parent
    output = subprocess.check_output([sys.executable, "-c", program, stores[0]], cwd=root)
    assert output.decode().strip() == str([(4, 16)] * 3)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_evaluation_has_every_row_once_whatever_the_batches(stores, batch_size, num_hosts):
    source = packing.best_fit(TokenStore.open(stores[0]), 32)
    per_host = [
        list(
            pipeline.evaluation_batches(
                source, CAUSAL, batch_size=batch_size, rows=slice(h, None, num_hosts)
            )
        )
        for h in range(num_hosts)
    ]
    assert {len(batches) for batches in per_host} == {-(-len(source) // batch_size)}
    targets, weights = [], []
    for parts in zip(*per_host, strict=True):
        for i in range(batch_size):
            part = parts[i % num_hosts]
            targets.append(part.targets[i // num_hosts])
            weights.append(part.weights[i // num_hosts])
    targets, weights = np.stack(targets), np.stack(weights)
    rows = source.read(np.arange(len(source)))
    np.testing.assert_array_equal(targets[: len(source)], rows.ids)
    np.testing.assert_array_equal(weights[: len(source)], rows.segments > 0)
    assert not weights[len(source) :].any() and not targets[len(source) :].any()
    assert weights.sum() == source.stores[0].num_tokens


def test_evaluation_randomness_is_that_of_the_row():
    source = Synthetic("random", vocab_size=100, length=8, num_rows=10)
    whole = next(pipeline.evaluation_batches(source, noisy, batch_size=10)).weights
    parts = [batch.weights for batch in pipeline.evaluation_batches(source, noisy, batch_size=5)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kind", ["split", "best_fit"])
def test_a_config_makes_a_pipeline(stores, kind, tmp_path):
    config = DataConfig(train=tuple(stores), weights=(3, 1), length=24, packing=kind)
    make = pipeline.make_pipeline(
        config, CAUSAL, TOKENIZER, batch_size=8, seed=0, cache_dir=str(tmp_path)
    )
    assert make.batch_at(0).targets.shape == (8, 24)
    np.testing.assert_array_equal(make.sampler.rows_before(400), [300, 100])
    assert bool(list(tmp_path.iterdir())) == (kind == "best_fit")


def test_without_shuffle_batches_follow_the_store(stores):
    config = DataConfig(train=(stores[0],), length=24, shuffle=False)
    make = pipeline.make_pipeline(config, CAUSAL, TOKENIZER, batch_size=8, seed=0)
    rows = packing.split(TokenStore.open(stores[0]), 24).read(np.arange(8, 16))
    np.testing.assert_array_equal(make.batch_at(1).targets, rows.ids)


def test_the_plan_of_a_store_lies_in_the_store_unless_told_otherwise(tmp_path):
    path = write_documents(tmp_path / "store")
    pipeline.make_source(path, DataConfig(packing="best_fit"), RowLayout((24,)), TOKENIZER)
    assert list((tmp_path / "store" / "packing").iterdir())
    TokenStore.open(path).verify()


def test_synthetic_sources_are_named_in_the_config():
    config, layout = DataConfig(), RowLayout((8,))
    source = pipeline.make_source("synthetic:markov:40:7", config, layout, TOKENIZER)
    same = Synthetic("markov", vocab_size=TOKENIZER.vocab_size, length=8, num_rows=40, seed=7)
    rows = np.arange(40)
    assert len(source) == 40
    np.testing.assert_array_equal(source.read(rows).ids, same.read(rows).ids)
    assert len(pipeline.make_source("synthetic:copy", config, layout, TOKENIZER)) == 65536


def test_a_store_of_another_tokenizer_is_refused(stores):
    class Other(ByteTokenizer):
        fingerprint = "0" * 64

    with pytest.raises(ValueError, match=r"0000.*prepare the data again"):
        pipeline.make_source(stores[0], DataConfig(), CAUSAL.layout, Other())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "best"}, r"data\.packing \('best'\).*split, best_fit"),
        ({"length": 0}, r"data\.length \(0\)"),
        ({"train": ()}, r"data\.train is empty"),
        ({"train": ("synthetic:noise",)}, "noise.*random, markov, copy"),
        ({"train": ("synthetic:copy:many",)}, "synthetic:KIND:ROWS"),
        ({"train": ("synthetic:copy", "synthetic:copy")}, "named twice"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 sources"),
    ],
)
def test_a_config_that_cannot_work_is_refused(stores, options, message):
    config = DataConfig(**({"train": (stores[0],)} | options))
    objective = causal.build(causal.Config(), TOKENIZER, ModelInterface(config.length))
    with pytest.raises(ValueError, match=message):
        pipeline.make_pipeline(config, objective, TOKENIZER, batch_size=4, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_rows_are_pure_and_well_formed(kind):
    source = Synthetic(kind, vocab_size=50, length=64, num_rows=100, document_length=16, seed=2)
    rows = source.read(np.arange(100))
    part = source.read(np.array([70, 3]))
    np.testing.assert_array_equal(part.ids, rows.ids[[70, 3]])
    np.testing.assert_array_equal(part.segments, rows.segments[[70, 3]])
    assert rows.ids.min() >= 0 and rows.ids.max() < 50
    starts = np.diff(rows.segments, axis=1, prepend=0)
    assert (rows.segments[:, 0] == 1).all() and set(np.unique(starts)) == {0, 1}
    np.testing.assert_array_equal(rows.positions == 0, starts == 1)
    assert (np.diff(rows.positions, axis=1)[starts[:, 1:] == 0] == 1).all()
    assert 10 < 6400 / starts.sum() < 20  # tokens per document, cut at 64
    other = Synthetic(kind, vocab_size=50, length=64, num_rows=100, seed=3)
    assert (other.read(np.arange(100)).ids != rows.ids).mean() > 0.9
    [spans] = source.documents(np.array([5]))
    assert [span.stop for span in spans] == np.bincount(rows.segments[5])[1:].tolist()


def test_markov_tokens_have_two_successors_and_copies_repeat():
    ids = Synthetic("markov", vocab_size=50, length=64, num_rows=100).read(np.arange(100)).ids
    choice = (ids[:, 1:] - 2 * ids[:, :-1]) % 50
    assert set(np.unique(choice)) == {0, 1} and abs(choice.mean() - 0.5) < 0.03
    rows = Synthetic("copy", vocab_size=50, length=64, num_rows=20).read(np.arange(20))
    again = rows.positions[:, 8:] >= 8
    np.testing.assert_array_equal(rows.ids[:, 8:][again], rows.ids[:, :-8][again])


def test_synthetic_pairs_are_sources_and_their_reverse():
    layout = RowLayout((64, 64), ("source", "target"))
    source = pipeline.make_source("synthetic:reverse:500:3", DataConfig(), layout, TOKENIZER)
    rows = source.read(np.arange(len(source)))
    seen = 0
    for r in range(len(source)):
        for number in range(1, rows.segments[r].max() + 1):
            held = rows.segments[r] == number
            given, wanted = (rows.ids[r, held & (rows.fields[r] == f)] for f in (0, 1))
            assert given[-1] == wanted[-1] == TOKENIZER.eos_id
            assert given[-2::-1].tolist() == wanted[:-1].tolist() and len(given) > 1
            seen += 1
    assert seen == 500
    with pytest.raises(ValueError, match="only reverse and codes have two fields"):
        pipeline.make_source("synthetic:markov", DataConfig(), layout, TOKENIZER)
    with pytest.raises(ValueError, match="'reverse' does not exist"):
        pipeline.make_source("synthetic:reverse", DataConfig(), RowLayout((64,)), TOKENIZER)


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ("split", "b1eba1d7ac1a5d3aebedade4588a42d9cbb6e1b81635b9de51c062f0056e150a"),
        ("best_fit", "47828b6744e0ac137f4ce9cfadc2abc3882d2630937fb43626d73a5eb5787af0"),
    ],
)
def test_a_store_made_before_gives_the_same_batches(packing, expected, tmp_path):
    """tests/golden/store and these hashes are of December 2026: no row holds two rests of cut
    documents, so that packing has not changed since.
    """
    store = str(Path(__file__).parent / "golden" / "store")
    tokenizer = ByteTokenizer()
    objective = causal.build(causal.Config(), tokenizer, ModelInterface(length=14))
    source = make_source(
        store, DataConfig(packing=packing), objective.layout, tokenizer, cache_dir=str(tmp_path)
    )
    pipeline = Pipeline({"store": source}, objective, batch_size=3, seed=7)
    found = hashlib.sha256()
    for step in range(6):
        batch = pipeline.batch_at(step)
        tokens = batch.inputs
        for x in (tokens.ids, tokens.segments, tokens.positions, batch.targets, batch.weights):
            found.update(np.ascontiguousarray(x).tobytes())
    assert found.hexdigest() == expected


def test_a_missing_store_is_named_with_its_key(stores, tmp_path):
    for key, train, validation in (
        ("train", (str(tmp_path / "gone"),), ()),
        ("validation", (stores[0],), (str(tmp_path / "gone"),)),
    ):
        config = DataConfig(train=train, validation=validation)
        with pytest.raises(ValueError, match=f"^config.data.{key}: .*/gone: no such folder"):
            pipeline.make_pipeline(config, CAUSAL, TOKENIZER, batch_size=2, seed=0)
            pipeline.make_sources(
                config.validation, config, CAUSAL, TOKENIZER, key="config.data.validation"
            )


def test_tensorflow_is_imported_where_it_is_asked_for_beside_other_work():
    code = (
        "import sys\n"
        "from lm.config.schema import LoaderConfig\n"
        "from lm.data import loaders\n"
        "for kind in ('thread', 'tf.data'):\n"
        "    with loaders.importing(LoaderConfig(kind=kind)):\n"
        "        pass\n"
        "    print('tensorflow' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
