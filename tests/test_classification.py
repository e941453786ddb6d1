"""Classification: one token is predicted for every text, for each kind of model."""

import numpy as np
import pytest

from lm.data.pairs import Pairs
from lm.data.tokens import TokenStore
from lm.objectives import ModelInterface, classification
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
CONFIG = classification.Config(labels=("good", "bad"), verbalizers=("G", "B"))
G, B, MASK = ord("G"), ord("B"), 259
a, b, c = (ord(letter) for letter in "abc")


@pytest.fixture(scope="module")
def batch_of(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "store"
    texts = [("ab", "good"), ("c", "bad")]
    documents = [Document(s, {"source": s, "target": t}) for s, t in texts]
    write_store(path, documents, TOKENIZER, fields=("source", "target"))
    stores = [TokenStore.open(path, field=name) for name in ("source", "target")]

    def make(form, config=CONFIG):
        objective = classification.build(config, TOKENIZER, form)
        return objective(Pairs(stores, objective.layout).read(np.array([0])), None)

    return make


def test_a_decoder_predicts_the_label_after_the_text(batch_of):
    batch = batch_of(ModelInterface(15))
    np.testing.assert_array_equal(batch.inputs.ids, [[BOS, a, b, EOS, BOS, c, EOS] + [0] * 8])
    np.testing.assert_array_equal(batch.targets, [[a, b, EOS, G, c, EOS, B] + [0] * 8])
    np.testing.assert_array_equal(batch.weights, [[0, 0, 0, 1, 0, 0, 1] + [0] * 8])
    np.testing.assert_array_equal(batch.inputs.segments, [[1] * 4 + [2] * 3 + [0] * 8])


def test_a_decoder_with_an_encoder_predicts_it_first(batch_of):
    batch = batch_of(ModelInterface(9, encoder_length=6))
    np.testing.assert_array_equal(batch.encoder.ids, [[a, b, EOS, c, EOS, 0]])
    np.testing.assert_array_equal(batch.inputs.ids, [[BOS, BOS] + [0] * 7])
    np.testing.assert_array_equal(batch.inputs.segments, [[1, 2] + [0] * 7])
    np.testing.assert_array_equal(batch.targets, [[G, B] + [0] * 7])
    np.testing.assert_array_equal(batch.weights, [[1, 1] + [0] * 7])


def test_an_encoder_predicts_it_at_a_mask_after_bos(batch_of):
    batch = batch_of(ModelInterface(15, is_causal=False, vocab_size=260))
    ids = [BOS, MASK, a, b, EOS, BOS, MASK, c, EOS]
    np.testing.assert_array_equal(batch.inputs.ids, [ids + [0] * 6])
    np.testing.assert_array_equal(batch.inputs.segments, [[1] * 5 + [2] * 4 + [0] * 6])
    np.testing.assert_array_equal(batch.inputs.positions, [[0, 1, 2, 3, 4, 0, 1, 2, 3] + [0] * 6])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 0, 0, 0, 0, 1, 0, 0] + [0] * 6])
    assert batch.targets[batch.weights > 0].tolist() == [G, B]


def test_a_label_that_the_config_does_not_name_is_an_error(batch_of):
    config = classification.Config(labels=("good", "goo"), verbalizers=("G", "B"))
    with pytest.raises(ValueError, match=r"label 'bad', which is not in .*labels: good, goo"):
        batch_of(ModelInterface(15), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"labels": ("a", "bad", "ill")}, r"'bad' \(3\), 'ill' \(3\)"),
        ({"labels": ("good", "bad"), "verbalizers": ("G",)}, r"verbalizers \(1\).*labels \(2\)"),
        ({"labels": ("good", "bad"), "verbalizers": ("G", "G")}, "share a token"),
        ({"labels": ("good",)}, "two classes or more"),
        ({"labels": ("a", "a")}, "each once"),
    ],
)
def test_labels_are_checked_when_the_objective_is_built(config, message):
    with pytest.raises(ValueError, match=message):
        classification.build(classification.Config(**config), TOKENIZER, ModelInterface(8))
