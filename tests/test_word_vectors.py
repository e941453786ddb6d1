"""Word vectors from text files, and the rows of an embedding that begin with them."""

import gzip

import jax
import numpy as np
import pytest

from lm.preparation.tokenizer_training import train_words
from lm.tokenizers import word_vectors
from lm.tokenizers.tokenizer import ByteTokenizer, from_bytes

TEXT = "the cat sat on the mat\nthe dog sat\n"
GLOVE = "the 1 2 3\ncat -1.5 0 2e-1\n. . . 7 7 7\nzebra 4 5 6\nthe 9 9 9\n"


@pytest.fixture
def words():
    return from_bytes("words.json", train_words([TEXT], vocab_size=100))


def write(path, text):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["glove.txt", "glove.txt.gz"])
@pytest.mark.parametrize("header", ["", "5 3\n"])
def test_both_formats_give_the_rows_of_known_words(tmp_path, words, name, header):
    found = word_vectors.load(write(tmp_path / name, header + GLOVE), words, 3)
    wanted = {words.encode("the")[0]: [1, 2, 3], words.encode("cat")[0]: [-1.5, 0, 0.2]}
    assert dict(zip(found.ids.tolist(), found.vectors.tolist(), strict=True)) == {
        i: pytest.approx(v) for i, v in wanted.items()
    }
    assert found.describe() == (
        "2 of 8 vocabulary entries (25.0%) begin with one of 5 word vectors"
    )


def test_pieces_that_begin_with_a_space_are_words_too(tmp_path):
    class Pieces(ByteTokenizer):
        vocab_size = 4

        def decode_bytes(self, ids):
            return b"".join([b" the", b"the", b"th", b"e "][i] for i in ids)

    found = word_vectors.load(write(tmp_path / "glove.txt", GLOVE), Pieces(), 3)
    assert found.ids.tolist() == [0, 1] and found.vectors.tolist() == [[1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 1 2\n", r"has vectors of 2 values; config\.model\.embed_dim is 3"),
        ("9 300\nthe 1 2 3\n", r"has vectors of 300 values; config\.model\.embed_dim is 3"),
        ("the 1 2 3\ncat 1 2\n", r"line 2: 2 values after the word; config\.model\.embed_dim is 3"),
        ("the 1 2 x\n", r"line 1: could not convert string to float"),
        ("the 1 2 nan\n", r"line 1: not all values are finite"),
        ("zebra 1 2 3\n", r"none of its 1 words is in the vocabulary of tokenizer words\.json"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, words, text, message):
    path = write(tmp_path / "vectors.txt", text)
    with pytest.raises(ValueError, match=message) as error:
        word_vectors.load(path, words, 3)
    assert f"config.init.word_vectors ({path})" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.txt", "no such file"), ("folder", "no such file"), ("cut.txt.gz", "damaged")],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, words, name, message):
    (tmp_path / "folder").mkdir()
    whole = gzip.compress(GLOVE.encode() * 100)
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"config\.init\.word_vectors \(.*{name}\): {message}"):
        word_vectors.load(str(tmp_path / name), words, 3)


def test_rows_of_known_words_begin_with_their_vectors_and_others_at_random(
    tmp_path, make_experiment
):
    values = " ".join(map(str, range(16)))
    path = write(tmp_path / "glove.txt", f"a {values}\nb {values}\n")
    plain = make_experiment().init_state()
    state = make_experiment({"init.word_vectors": path}, fsdp=2, tensor=2).init_state()
    table = state.params["embedding"]["weight"]
    assert table.sharding.shard_shape(table.shape) == (132, 8)
    wanted = np.array(plain.params["embedding"]["weight"])
    wanted[[ord("a"), ord("b")]] = np.arange(16)
    np.testing.assert_allclose(table, wanted, rtol=1e-6)
    for name in ("layers", "norm"):
        jax.tree.map(np.testing.assert_array_equal, state.params[name], plain.params[name])


def test_a_base_and_word_vectors_for_the_same_table_are_refused(tmp_path, make_experiment):
    path = write(tmp_path / "glove.txt", "a 1\n")
    experiment = make_experiment({"init.word_vectors": path, "init.from_": str(tmp_path)})
    with pytest.raises(ValueError, match=r"both initialize embedding\.weight"):
        _ = experiment.initializer.word_vectors
