import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.preparation.tokenizer_training import train_sentencepiece, train_words
from lm.tokenizers import tokenizer as tokenizer_module
from lm.tokenizers.tokenizer import LONG_TEXT, ByteTokenizer, from_bytes, load

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tokenizers"
WIKITEXT = SHARED.parent / "text" / "wikitext-2"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}")
SOURCE = Path(tokenizer_module.__file__).read_text()
AWKWARD = "\0a\u2581\u2581b\t\r\n\n  </s><s><pad><unk><0x0A>\ufeff\u00a0é😀\u2028日本 "


def _byte_level_json() -> bytes:
    """A byte-level BPE as of GPT-2, with truncation and padding that encode must not obey."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SOURCE], trainer)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    return tokenizer.to_str().encode()


def _metaspace_json() -> bytes:
    """A BPE with U+2581 for spaces, a prepended space and byte fallback, as of Llama 2."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "a", "b", "\u2581a", "ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab, [("\u2581", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend("\u2581"),
            tokenizers.normalizers.Replace(" ", "\u2581"),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str().encode()


def _prefixed_model() -> bytes:
    """A SentencePiece model with a dummy prefix and byte fallback, as of Llama 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


BUILDERS = {
    "bytes": lambda: ByteTokenizer(),
    "bpe": lambda: from_bytes("bpe.model", train_sentencepiece([SOURCE], vocab_size=600)),
    "word": lambda: from_bytes(
        "word.model", train_sentencepiece([SOURCE], vocab_size=600, piece_span="word")
    ),
    "unigram": lambda: from_bytes(
        "unigram.model",
        train_sentencepiece([SOURCE], vocab_size=450, model_type="unigram", piece_span="word"),
    ),
    "byte_level": lambda: from_bytes("tokenizer.json", _byte_level_json()),
    "metaspace": lambda: from_bytes("tokenizer.json", _metaspace_json()),
    "prefixed": lambda: from_bytes("prefixed.model", _prefixed_model()),
}
_built = {}


def _tokenizer(name: str):
    if name not in _built:
        _built[name] = BUILDERS[name]()
    return _built[name]


LOSSLESS = ["bytes", "bpe", "word", "unigram", "byte_level"]


@pytest.mark.parametrize("name", LOSSLESS)
@settings(deadline=None, max_examples=150)
@given(text=st.text())
@example(text=AWKWARD)
@example(text=SOURCE)
@example(text="\u2581")
def test_round_trip_is_exact_for_any_text(name, text):
    tokenizer = _tokenizer(name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", BUILDERS)
def test_encode_makes_no_special_tokens(name):
    tokenizer = _tokenizer(name)
    ids = set(tokenizer.encode(AWKWARD + "<|endoftext|></s>").tolist())
    assert not ids & {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id}
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode_bytes(special) == b""
    assert max(ids | set(special)) < tokenizer.vocab_size


@pytest.mark.parametrize("name", BUILDERS)
def test_decode_bytes_is_additive_over_tokens(name):
    tokenizer = _tokenizer(name)
    ids = tokenizer.encode(AWKWARD)
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == tokenizer.decode_bytes(ids)


@pytest.mark.parametrize("name", BUILDERS)
def test_encode_batch_is_encode_of_each(name):
    tokenizer = _tokenizer(name)
    texts = ["a b", "", AWKWARD, "x" * (LONG_TEXT + 1), "b\n"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("filler", ["ab", "a b ", "\nab a"])
def test_long_text_is_encoded_in_pieces_without_loss(name, filler):
    tokenizer = _tokenizer(name)
    text = filler * (2 * LONG_TEXT // len(filler)) + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_are_cut_after_newlines_then_spaces():
    assert list(tokenizer_module.split_long_text("ab\nc d efg", limit=6)) == ["ab\n", "c d ", "efg"]
    assert list(tokenizer_module.split_long_text("abcdefgh", limit=3)) == ["abc", "def", "gh"]
    assert list(tokenizer_module.split_long_text("", limit=3)) == [""]


@pytest.mark.parametrize("name", ["metaspace", "prefixed"])
def test_dummy_prefix_is_kept_by_decode_bytes_and_removed_by_decode(name):
    tokenizer = _tokenizer(name)
    assert tokenizer.decode_bytes(tokenizer.encode("ab")) == b" ab"
    for text in ["ab", " ab", "a  b\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_underline_character_of_sentencepiece_survives_where_there_are_byte_pieces():
    tokenizer = _tokenizer("prefixed")
    assert tokenizer.decode(tokenizer.encode("a\u2581b \u2581")) == "a\u2581b \u2581"


def test_word_pieces_are_joined_by_spaces():
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "un": 4, "##able": 5, "dog": 6}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.decoder = tokenizers.decoders.WordPiece()
    inner.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer = from_bytes("tokenizer.json", inner.to_str().encode())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 0)
    assert tokenizer.encode("unable dog").tolist() == [4, 5, 6]
    assert tokenizer.decode([4, 5, 6]) == " unable dog"


def test_words_are_listed_by_frequency_and_lines_end_in_eos():
    text = " = Title = \n\n the cat <unk> the\n"
    tokenizer = from_bytes("words.json", train_words([text, "the = \n"], vocab_size=5))
    names = [
        "<unk>",
        "<eos>",
        "=",
        "the",
        "Title",
    ]  # equally frequent ones by name: no room for cat
    assert tokenizer.vocab_size == 5 and tokenizer.eos_id == tokenizer.bos_id == 1
    ids = tokenizer.encode(text)
    said = ["=", "Title", "=", "<eos>", "<eos>", "the", "<unk>", "<unk>", "the", "<eos>"]
    assert [names[i] for i in ids] == said
    assert tokenizer.decode(ids) == " = Title = the <unk> <unk> the"
    assert tokenizer.encode("dog\u00a0\tthe").tolist() == [0, 3]
    whole = from_bytes("words.json", train_words([text], vocab_size=100))
    assert whole.vocab_size == 6 and 0 not in whole.encode("cat Title").tolist()


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.is_dir(), reason=f"needs {WIKITEXT}")
def test_wikitext2_has_its_published_numbers_of_words():
    train = gzip.decompress((WIKITEXT / "train.txt.gz").read_bytes()).decode()
    tokenizer = from_bytes("words.json", train_words([train], vocab_size=10**6))
    assert tokenizer.vocab_size == 33_278
    test = (WIKITEXT / "test.txt").read_text(encoding="utf-8")
    assert len(tokenizer.encode(test)) == 245_569
    assert len(tokenizer.encode(train)) == 2_088_628


def test_dropout_of_merges_is_off(tmp_path):
    spec = json.loads(_byte_level_json())
    plain = from_bytes("tokenizer.json", json.dumps(spec).encode())
    spec["model"]["dropout"] = 0.5
    tokenizer = from_bytes("tokenizer.json", json.dumps(spec).encode())
    text = "def encode(self, text: str) -> np.ndarray:\n" * 20
    for encode in ("encode", "encode_special"):
        expected = getattr(plain, encode)(text)
        for _ in range(3):
            np.testing.assert_array_equal(getattr(tokenizer, encode)(text), expected)


@pytest.mark.parametrize(
    "name", ["a b.model", "a%20b.model", "[x]*.model", "a?b#c.model", "a\n.model"]
)
def test_a_tokenizer_of_any_name_is_read(tmp_path, monkeypatch, name):
    for file in (name, os.fsdecode(b"\xff") + name):
        (tmp_path / file).write_bytes(_tokenizer("bpe").model)
        assert load(str(tmp_path / file)).vocab_size == _tokenizer("bpe").vocab_size
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(f"~/{name}").name == str(tmp_path / name)


def test_fingerprint_follows_the_content_and_not_the_path(tmp_path):
    model = _tokenizer("bpe").model
    (tmp_path / "a.model").write_bytes(model)
    (tmp_path / "b.model").write_bytes(model)
    a, b = load(str(tmp_path / "a.model")), load(str(tmp_path / "b.model"))
    assert a.fingerprint == b.fingerprint
    names = ["bytes", "bpe", "word", "unigram", "byte_level"]
    assert len({_tokenizer(name).fingerprint for name in names}) == len(names)


def test_training_is_deterministic_and_quiet(capfd):
    first, second = (train_sentencepiece([SOURCE], vocab_size=500) for _ in range(2))
    assert first == second
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_smaller_than_the_alphabet_has_pieces_of_several_characters():
    """Chinese: more characters than pieces. The rare ones are bytes, and nothing is lost."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(0x4E00, 0x5200, 2))) for _ in range(900)]
    common = rng.choice(words[:40], 4000).tolist()
    text = "".join(rng.permutation([*words, *common]).tolist())
    assert len(set(text)) > 600
    model = train_sentencepiece([text], vocab_size=600)
    assert model == train_sentencepiece([text], vocab_size=600)
    tokenizer = from_bytes("small.model", model)
    assert tokenizer.vocab_size == 600
    pieces = [tokenizer.decode_bytes([i]) for i in range(4 + 256, 600)]
    assert sum(len(piece.decode()) > 1 for piece in pieces) >= 40
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < 0.8 * len(text)


def test_pieces_may_hold_newlines_and_indentation():
    tokenizer = _tokenizer("bpe")
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    assert any(piece.startswith(b"\n    ") for piece in pieces)
    assert any(b" " in piece.strip() for piece in pieces)
    word = _tokenizer("word")
    pieces = [word.decode_bytes([i]) for i in range(word.vocab_size)]
    assert not any(b" " in piece.strip() for piece in pieces)


def test_training_takes_a_line_of_any_length():
    tokenizer = from_bytes("x.model", train_sentencepiece(["abcd" * 500_000], vocab_size=270))
    assert len(tokenizer.encode("abcd" * 16)) < 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nonsense", None, "neither"),
        ("absent.model", None, "no such file"),
        ("broken.model", b"not a model", "not a SentencePiece model"),
        ("broken.json", b"{}", r"not a tokenizer\.json"),
        ("broken.json", b"\xff", r"not a tokenizer\.json"),
    ],
)
def test_load_refuses_what_is_no_tokenizer(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(name if name == "nonsense" else str(path))


def test_a_folder_in_place_of_a_tokenizer_is_said_to_be_one(tmp_path):
    (tmp_path / "x.model").mkdir()
    with pytest.raises(ValueError, match=r"x\.model is a folder: name the file in it"):
        load(str(tmp_path / "x.model"))


def test_tokenizer_without_end_of_document_is_refused():
    spec = json.loads(_byte_level_json())
    spec["added_tokens"] = []
    with pytest.raises(ValueError, match="no end-of-document token"):
        from_bytes("tokenizer.json", json.dumps(spec).encode())


def test_ids_outside_the_vocabulary_are_refused():
    for wrong in (-1, 259):
        with pytest.raises(ValueError, match=f"{wrong} is outside"):
            ByteTokenizer().decode_bytes([65, wrong])


def test_too_large_a_vocabulary_is_one_clear_error():
    message = "5 characters of text give at most 269 bpe pieces, not 4,096: give more text, or "
    with pytest.raises(ValueError, match=f"{message}--config.model.vocab_size=269$"):
        train_sentencepiece(["a b c"], vocab_size=4096, vocab_flag="--config.model.vocab_size")
    assert train_sentencepiece(["a b c"], vocab_size=269)


def _awkward_cases(name: str) -> list[tuple[str, list[int]]]:
    texts = (SHARED / f"{name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (SHARED / f"{name}.out").read_text().splitlines()
    return [
        (text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=False)
    ]


@needs_shared
def test_gpt2_gives_the_published_ids():
    inner = tokenizers.ByteLevelBPETokenizer(
        str(SHARED / "gpt2_vocab.json"), str(SHARED / "gpt2_merges.txt")
    )
    inner.add_special_tokens(["<|endoftext|>"])
    tokenizer = from_bytes("tokenizer.json", inner.to_str().encode())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    cases = _awkward_cases("gpt-2")
    assert len(cases) >= 40
    for text, ids in cases:
        assert tokenizer.encode(text).tolist() == ids
        assert tokenizer.decode(ids) == text


@needs_shared
def test_llama2_gives_the_published_ids():
    tokenizer = load(str(SHARED / "llama2.model"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    cases = _awkward_cases("llama-spm")
    assert len(cases) >= 40
    for text, ids in cases:
        assert tokenizer.encode(text).tolist() == ids
        assert tokenizer.decode(ids) == text
