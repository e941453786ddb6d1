"""Claims about rows and batches of every objective and every model that it is for."""

import dataclasses

import numpy as np
import pytest

from lm.config.components import component
from lm.data.pairs import Pairs
from lm.data.pipeline import Pipeline, evaluation_batches
from lm.data.rows import Rows
from lm.data.synthetic import Synthetic
from lm.data.tokens import TokenStore
from lm.kernels.dot_product import self_mask
from lm.objectives import ModelInterface
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
VOCAB = 360
DECODER = ModelInterface(128, vocab_size=VOCAB)
ENCODER = ModelInterface(128, is_causal=False, vocab_size=VOCAB)
BOTH = ModelInterface(40, encoder_length=128, vocab_size=VOCAB)
LABELS = {"labels": ("a", "b", "c")}
# name, form, config, least fraction of the places that hold a token: [decoder, encoder]
CASES = {
    "causal": ("causal", DECODER, {}, (1.0,)),
    "prefix": ("prefix", DECODER, {}, (1.0,)),
    "mlm": ("mlm", ENCODER, {}, (1.0,)),
    "whole words": ("mlm", ENCODER, {"whole_word": True}, (1.0,)),
    "spans": ("span_corruption", dataclasses.replace(BOTH, length=29), {}, (0.97, 0.98)),
    "spans, decoder": ("span_corruption", DECODER, {}, (0.97,)),
    "ul2": ("ul2", dataclasses.replace(BOTH, length=96), {}, (0.6, 0.87)),
    "ul2, decoder": ("ul2", DECODER, {}, (0.97,)),
    "ul2, modes": ("ul2", DECODER, {"mode_ids": (260, 261, 262)}, (0.97,)),
    "infill": ("denoising", dataclasses.replace(BOTH, length=128), {}, (1.0, 0.7)),
    "infill, decoder": ("denoising", DECODER, {}, (0.85,)),
    "mask": ("denoising", dataclasses.replace(BOTH, length=128), {"noises": ("mask",)}, (1.0, 1.0)),
    "all noise": (
        "denoising",
        DECODER,
        {"noises": ("mask", "delete", "infill", "shuffle", "rotate")},
        (0.7,),
    ),
    "pairs": ("seq2seq", dataclasses.replace(BOTH, length=128), {}, (0.85, 0.85)),
    "prompts": ("seq2seq", DECODER, {}, (0.95,)),
    "prompts, both ways": ("seq2seq", DECODER, {"bidirectional": True}, (0.95,)),
    "classes": ("classification", BOTH, LABELS, (0.1, 0.6)),
    "classes, decoder": ("classification", DECODER, LABELS, (0.85,)),
    "classes, encoder": ("classification", ENCODER, LABELS, (0.9,)),
}


def generator(i):
    return np.random.default_rng([0, 0, i])


class Text(Synthetic):
    """Synthetic bytes in documents that end in eos."""

    def read(self, rows):
        found = super().read(rows)
        ids = found.ids.copy()
        last = np.diff(found.segments, axis=1, append=0) != 0
        last[:, -1] = False
        ids[last] = EOS
        return Rows(ids, found.segments, found.positions, found.previous)


@pytest.fixture(scope="module")
def pair_stores(tmp_path_factory):
    rng = np.random.default_rng(0)

    def make(name, targets):
        path = tmp_path_factory.mktemp(name) / "store"
        documents = [
            Document(str(i), {"source": "x" * int(n), "target": target})
            for i, (n, target) in enumerate(zip(rng.integers(5, 30, 600), targets, strict=True))
        ]
        write_store(path, documents, TOKENIZER, fields=("source", "target"))
        return [TokenStore.open(path, field=field) for field in ("source", "target")]

    texts = ["y" * int(n) for n in rng.integers(5, 30, 600)]
    return {
        "seq2seq": make("texts", texts),
        "classification": make("labels", ["a", "b", "c"] * 200),
    }


@pytest.fixture(scope="module", params=CASES)
def case(request, pair_stores):
    """(objective, its source, its form, least fill)."""
    name, form, config, fill = CASES[request.param]
    module = component("lm.objectives", name)
    objective = module.build(module.Config(**config), TOKENIZER, form)
    if name in pair_stores:
        return objective, Pairs(pair_stores[name], objective.layout), form, fill
    length = objective.layout.length
    return objective, Text("random", vocab_size=250, length=length, document_length=60), form, fill


@pytest.fixture(scope="module")
def batch(case):
    objective, source, _, _ = case
    return objective(source.read(np.arange(min(len(source), 60))), generator)


def arrays(tree):
    """{name: array} of a batch."""
    found = {}
    for f in dataclasses.fields(tree):
        value = getattr(tree, f.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{f.name}.{name}": x for name, x in arrays(value).items()}
        elif value is not None:
            found[f.name] = value
    return found


def test_shapes_and_types_are_those_of_the_contract(case, batch):
    _, _, form, _ = case
    for name, x in arrays(batch).items():
        length = form.encoder_length if name.startswith("encoder") else form.length
        assert x.shape == (len(batch.targets), length), name
        kind = {"weights": np.float32, "inputs.bidirectional": bool}.get(name, np.int32)
        assert x.dtype == kind, name
    assert (batch.encoder is None) == (form.encoder_length is None)
    assert batch.inputs.ids.max() < VOCAB and batch.targets.max() < VOCAB
    assert batch.inputs.ids.min() >= 0


def test_padding_is_zero_and_never_scored(batch):
    for tokens in [batch.inputs, *([batch.encoder] if batch.encoder is not None else [])]:
        empty = tokens.segments == 0
        assert not tokens.ids[empty].any() and not tokens.positions[empty].any()
        at = np.diff(tokens.segments, axis=1) != 0
        assert (tokens.positions[:, 1:][at] == 0).all()
        assert (np.diff(tokens.positions, axis=1)[~at & ~empty[:, 1:]] == 1).all()
    assert not batch.weights[batch.inputs.segments == 0].any() and batch.weights.any()


def test_no_scored_token_is_visible_where_it_is_predicted(case, batch):
    """A decoder's next input holds the target: no place may see it. An encoder's own place must
    not show it, but for masked LM's tenth.
    """
    _, _, form, _ = case
    if not form.is_causal:
        shown = (batch.inputs.ids == batch.targets) & (batch.weights > 0)
        assert shown.sum() < 0.25 * batch.weights.sum()
        return
    seen = np.asarray(self_mask(batch.inputs).allowed())  # [B, T, S]
    following = np.diagonal(seen, offset=1, axis1=1, axis2=2)  # place t sees input t + 1
    assert not (following & (batch.weights[:, :-1] > 0)).any()
    # and nothing later, where the targets after it stand
    later = np.triu(np.ones(seen.shape[1:], bool), 1)
    assert not (seen & later & (batch.weights > 0)[:, :, None]).any()


def test_decoder_inputs_are_the_targets_before_them(case, batch):
    objective, source, form, _ = case
    if not form.is_causal:
        return
    previous = source.read(np.arange(len(batch.targets))).previous
    same = batch.inputs.segments[:, 1:] == batch.inputs.segments[:, :-1]
    same &= batch.inputs.segments[:, 1:] > 0
    np.testing.assert_array_equal(batch.inputs.ids[:, 1:][same], batch.targets[:, :-1][same])
    assert (batch.inputs.ids[:, 1:][~same & (batch.inputs.segments[:, 1:] > 0)] == BOS).all()
    continued = (previous[:, 0] >= 0) & objective.scores_every_token
    assert (batch.inputs.ids[~continued, 0] == BOS).all()


def test_rows_are_full(case, batch):
    _, _, _, least = case
    streams = [batch.inputs, *([batch.encoder] if batch.encoder is not None else [])]
    fills = [(tokens.segments > 0).mean() for tokens in streams]
    assert all(fill >= wanted for fill, wanted in zip(fills, least, strict=True)), fills


def test_a_row_is_the_same_whatever_rows_come_with_it(case, batch):
    objective, source, _, _ = case
    index = np.array([7, 3, 21, 4])
    part = objective(source.read(index), lambda i: generator(int(index[i])))
    for name, x in arrays(part).items():
        np.testing.assert_array_equal(x, arrays(batch)[name][index], err_msg=name)


def test_hosts_read_their_rows_of_the_global_batch(case):
    objective, source, _, _ = case
    data = Pipeline({"one": source}, objective, batch_size=8, seed=3)
    whole = data.batch_at(5)
    for rows in (slice(0, 4), slice(4, 8)):
        for name, x in arrays(data.batch_at(5, rows)).items():
            np.testing.assert_array_equal(x, arrays(whole)[name][rows], err_msg=name)


def test_empty_rows_of_an_evaluation_score_nothing(case):
    objective, source, _, _ = case
    short = Text("random", vocab_size=250, length=objective.layout.length, num_rows=3)
    [batch] = evaluation_batches(
        short if not isinstance(source, Pairs) else _First(source, 3), objective, batch_size=5
    )
    assert batch.weights[:3].any() and not batch.weights[3:].any()
    assert not batch.inputs.segments[3:].any()


class _First:
    def __init__(self, source, count):
        self._source, self._count = source, count

    def __len__(self):
        return self._count

    def read(self, rows):
        return self._source.read(rows)


def test_rows_are_left_as_they_were(case):
    objective, source, _, _ = case
    rows = source.read(np.arange(4))
    for x in arrays(rows).values():
        x.flags.writeable = False
    objective(rows, generator)
