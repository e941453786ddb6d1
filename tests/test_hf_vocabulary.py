"""Tokenizers of published models as they are distributed, and of this project as transformers
loads them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from lm.hf import vocabulary
from lm.preparation.tokenizer_training import train_sentencepiece
from lm.tokenizers import tokenizer as tokenizers

DATA = Path(__file__).parents[1] / "../shared/data/tokenizers"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data/tokenizers is not there")
TEXT = "The quick brown fox jumps over the lazy dog's tail, 3.14 times; naïve café — 日本語 🦙.\n"


def awkward(name):
    """(text, its ids) of the published test strings."""
    texts = (DATA / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (DATA / f"{name}.out").read_text().split("\n")
    return list(zip(texts, [[int(i) for i in line.split()] for line in lines], strict=True))


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(DATA / "gpt2_vocab.json", folder / "vocab.json")
    shutil.copy(DATA / "gpt2_merges.txt", folder / "merges.txt")
    return folder


@needs_data
def test_gpt2_gives_the_published_ids_of_all_awkward_strings(gpt2_folder, tmp_path):
    tokenizer = tokenizers.load(
        str(vocabulary.copy_tokenizer(gpt2_folder, epath.Path(tmp_path / "run")))
    )
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (50257, 50256, 50256)
    pairs = awkward("gpt-2")
    assert len(pairs) >= 46
    for text, ids in pairs:
        assert tokenizer.encode(text).tolist() == ids, repr(text)
        assert tokenizer.decode_bytes(ids) == text.encode()


@needs_data
def test_llama2_gives_the_published_ids_of_all_awkward_strings():
    tokenizer = tokenizers.load(str(DATA / "llama2.model"))
    pairs = awkward("llama-spm")
    assert len(pairs) >= 46
    for text, ids in pairs:
        assert tokenizer.encode(text).tolist() == ids, repr(text)


def auto(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def exported(tokenizer, folder):
    """The AutoTokenizer of an export."""
    folder.mkdir()
    vocabulary.export(tokenizer, folder, max_length=77)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return auto(folder)


def same_ids(tokenizer, theirs, texts):
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == [tokenizer.bos_id, *tokenizer.encode(text).tolist()], repr(text)
        decoded = theirs.decode(ids[1:], clean_up_tokenization_spaces=False)
        assert decoded == tokenizer.decode(ids)


@needs_data
def test_llama2_is_exported_with_the_same_ids(tmp_path):
    tokenizer = tokenizers.load(str(DATA / "llama2.model"))
    theirs = exported(tokenizer, tmp_path / "out")
    pairs = awkward("llama-spm")
    same_ids(tokenizer, theirs, [text for text, _ in pairs if text] + [TEXT])
    assert (theirs.bos_token, theirs.eos_token, theirs.model_max_length) == ("<s>", "</s>", 77)


@needs_data
def test_t5_is_exported_with_the_same_ids(tmp_path):
    """A unigram model with normalisation."""
    tokenizer = tokenizers.load(str(DATA / "t5.model"))
    theirs = exported(tokenizer, tmp_path / "out")
    for text in (*vocabulary.PROBES, TEXT * 3):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text).tolist(), repr(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("piece_span", ["word", "line"])
def test_models_trained_here_are_exported_with_the_same_ids(model_type, piece_span, tmp_path):
    lines = [f"def f{i}(x):\n    return x + {i * 37 % 101}  # {TEXT}" for i in range(40)]
    model = train_sentencepiece(
        lines, vocab_size=315, model_type=model_type, piece_span=piece_span, split_digits=True
    )
    tokenizer = tokenizers.from_bytes(str(tmp_path / "mine.model"), model)
    same_ids(tokenizer, exported(tokenizer, tmp_path / "out"), [*vocabulary.PROBES[1:], *lines[:3]])


def test_bytes_are_exported_with_the_same_ids(tmp_path):
    tokenizer = tokenizers.load("bytes")
    theirs = exported(tokenizer, tmp_path / "out")
    same_ids(tokenizer, theirs, [*vocabulary.PROBES[1:], bytes(range(128)).decode()])
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (256, 257, 258)


@needs_data
def test_files_beside_a_tokenizer_are_handed_on(gpt2_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(gpt2_folder, source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("not this")
    brought = vocabulary.copy_tokenizer(source, epath.Path(tmp_path / "run"))
    assert brought.name == "tokenizer.json"
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    theirs = exported(tokenizers.load(str(brought)), tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    ids = theirs(TEXT)["input_ids"]
    assert ids == tokenizers.load(str(brought)).encode(TEXT).tolist()  # as it came: no bos


def test_a_vocabulary_of_words_becomes_word_pieces(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es", "run", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = tokenizers.load(
        str(vocabulary.copy_tokenizer(tmp_path, epath.Path(tmp_path / "run")))
    )
    assert tokenizer.encode("The foxes, RUN").tolist() == [5, 6, 7, 9, 8]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 0)
    assert np.all(tokenizer.encode("[MASK]") != 4)  # in a text it is text


def test_differences_from_config_json_are_told():
    said = []
    tree = {"bos_token_id": 5, "eos_token_id": [258, 7]}
    vocabulary.compare(tokenizers.load("bytes"), tree, said.append)
    assert said == ["note: bos is token 257 here, config.json says [5]"]
