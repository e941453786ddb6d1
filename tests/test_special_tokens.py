"""Special tokens that published files declare: in preparation, training, generation and export.

Values are those of the files of Qwen2.5-0.5B-Instruct, Llama-3.2-1B-Instruct and gemma-3-1b-it,
with ids of a small vocabulary.
"""

import json

import numpy as np
import pytest

from lm.data.tokens import TokenStore
from lm.generation.chat import Chat, read
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.hf.exporting import export_folder
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers import tokenizer as tokenizers
from lm.tokenizers.huggingface_tokenizer import byte_level_alphabet
from tests.test_chat import CHATML
from tests.test_generate import model_and_params

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<end_of_turn>")


def write_files(folder, names, *, unused=(), **files):
    """A byte-level tokenizer.json with special tokens `names` at 256 and up, `unused` ones after
    them, and the other files.
    """
    import tokenizers as library
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    made = library.Tokenizer(models.BPE(vocab=byte_level_alphabet(), merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in (*names, *unused)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(made.to_str())
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return str(folder / "tokenizer.json")


def qwen(folder):
    return write_files(
        folder,
        QWEN,
        tokenizer_config={
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
        },
        generation_config={"bos_token_id": 256, "pad_token_id": 256, "eos_token_id": [258, 256]},
        config={"model_type": "qwen2", "bos_token_id": 256, "eos_token_id": 258},
    )


def llama3(folder):
    return write_files(
        folder,
        LLAMA3,
        tokenizer_config={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        config={"model_type": "llama", "bos_token_id": 256, "eos_token_id": [257, 258, 259]},
    )


def gemma(folder):
    return write_files(
        folder,
        GEMMA,
        unused=["<image_soft_token>"],
        tokenizer_config={
            "add_bos_token": True,
            "bos_token": {"content": "<bos>"},
            "eos_token": "<eos>",
            "pad_token": "<pad>",
        },
        generation_config={"eos_token_id": [257, 259], "pad_token_id": -1},
        config={"model_type": "gemma3", "text_config": {"bos_token_id": 258}, "eos_token_id": 257},
    )


def uncommon(folder):
    names = ("<|start|>", "<|stop|>", "<|nothing|>")
    tree = {"model_type": "llama", "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return write_files(folder, names, config=tree)


@pytest.mark.parametrize(
    ("make", "bos", "eos", "pad", "start", "stop"),
    [
        (qwen, 256, 258, 256, (), {258, 256}),
        (llama3, 256, 259, 259, (256,), {257, 258, 259}),
        (gemma, 258, 257, 256, (258,), {257, 259}),
        (uncommon, 256, 257, 258, (256,), {257}),
    ],
)
def test_special_tokens_are_those_that_the_files_declare(
    make, bos, eos, pad, start, stop, tmp_path
):
    found = tokenizers.load(make(tmp_path))
    assert (found.bos_id, found.eos_id, found.pad_id) == (bos, eos, pad)
    assert found.start_ids == start and set(found.stop_ids) == stop


def test_a_tokenizer_of_which_nothing_says_the_end_names_the_file_that_may(tmp_path):
    name = write_files(tmp_path, ["<|stop|>"])
    with pytest.raises(ValueError, match=r"no end-of-document token.*tokenizer_config\.json"):
        tokenizers.load(name)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON"):
        tokenizers.load(name)


def test_the_config_of_a_run_declares_no_token(tmp_path):
    """A tokenizer may lie beside a run's config.json."""
    name = write_files(tmp_path, GEMMA, config={"model": {"name": "decoder"}, "eos_token_id": 3})
    assert tokenizers.load(name).eos_id == 257


def test_a_store_keeps_the_ends_of_its_documents_and_is_checked_for_them(tmp_path):
    tokenizer = tokenizers.load(qwen(tmp_path / "qwen"))
    store = str(tmp_path / "store")
    write_store(store, [Document("0", {"text": "ab"})], tokenizer)
    opened = TokenStore.open(store)
    assert opened.tokens(0, 3).tolist() == [*b"ab", 258]
    again = opened.tokenizer()
    assert (again.bos_id, again.eos_id, again.pad_id) == (256, 258, 256)
    opened.check_tokenizer(tokenizer)
    (tmp_path / "other").mkdir()
    alone = tmp_path / "other" / "tokenizer.json"
    alone.write_bytes(tokenizer.model)  # the same file, without those that declare its tokens
    with pytest.raises(ValueError, match=r"end with token 258.*256"):
        opened.check_tokenizer(tokenizers.load(str(alone)))


def test_a_store_with_other_ends_is_refused_before_training(tmp_path, make_experiment):
    name = qwen(tmp_path / "qwen")
    (tmp_path / "other").mkdir()
    alone = tmp_path / "other" / "tokenizer.json"
    alone.write_bytes((tmp_path / "qwen" / "tokenizer.json").read_bytes())
    store = str(tmp_path / "store")
    write_store(store, [Document("0", {"text": "ab" * 99})], tokenizers.load(str(alone)))
    experiment = make_experiment({"data.tokenizer": name, "data.train": (store,)})
    with pytest.raises(ValueError, match=r"end with token 256.*258"):
        _ = experiment.train_data


def test_unused_ids_may_lie_beyond_the_models_table_and_others_not(tmp_path, make_experiment):
    """As in Gemma 3, whose last id stands for parts of images."""
    name = gemma(tmp_path)
    found = make_experiment({"data.tokenizer": name, "model.vocab_size": 260}).tokenizer
    assert (found.vocab_size, found.used_vocab_size) == (261, 260)
    with pytest.raises(ValueError, match=r"config\.model\.vocab_size \(259\).*260"):
        _ = make_experiment({"data.tokenizer": name, "model.vocab_size": 259}).tokenizer
    model, params = model_and_params(vocab_size=260)
    generator = Generator(model, params, found)
    made = generator.generate(["ab"], max_new_tokens=4, sampling=Sampling(top_k=999))
    assert made[0].ids.max() < 260
    with pytest.raises(ValueError, match="id 260 is not in the vocabulary"):
        generator.generate([[260]], max_new_tokens=4)


def test_a_reply_stops_at_each_of_the_declared_ends(tmp_path):
    tokenizer = tokenizers.load(gemma(tmp_path))
    model, params = model_and_params(vocab_size=264, positions="learned", max_length=16)
    import jax

    params = jax.tree.map(np.zeros_like, params)
    params["norm"] = jax.tree.map(np.ones_like, params["norm"])
    width = model.config.embed_dim
    params["position"]["weight"] = np.eye(16, width, dtype=np.float32)
    for end in (257, 259):
        params["embedding"]["weight"] = np.zeros((264, width), np.float32)
        params["embedding"]["weight"][[65, end], [1, 2]] = 1e-3
        [made] = Generator(model, params, tokenizer).generate(
            ["a"], max_new_tokens=8, sampling=Sampling(temperature=0)
        )
        assert made.ids.tolist() == [65, end] and made.finished == "eos"
    [made] = Generator(model, params, tokenizer, stop_ids=[65]).generate(
        ["a"], max_new_tokens=8, sampling=Sampling(temperature=0)
    )
    assert made.ids.tolist() == [65]


def test_a_chat_begins_with_what_its_template_writes(tmp_path):
    name = qwen(tmp_path)
    tokenizer = tokenizers.load(name)
    chat = Chat(tokenizer, read(str(tmp_path)))
    ids = chat.encode([{"role": "user", "content": "a"}])
    assert (
        ids[0] == 257 and tokenizer.start_ids == ()
    )  # <|im_start|>, and no <|endoftext|> before it
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "a"}]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert ids.tolist() == list(wanted["input_ids"] if hasattr(wanted, "keys") else wanted)


def test_an_export_keeps_the_ids_of_an_import(tmp_path, make_experiment):
    for make in (qwen, llama3):
        folder = tmp_path / make.__name__
        changes = {"data.tokenizer": make(folder), "model.norm": "rms", "model.positions": "rotary"}
        changes |= {"model.activation": "swiglu", "model.norm_eps": 1e-6}
        experiment = make_experiment(changes)
        params = experiment.init_state().params
        export_folder(experiment, params, str(folder / "out"), family="llama", say=lambda _: None)
        before, after = (
            json.loads((folder / part / "config.json").read_text()) for part in (".", "out")
        )
        ids = {key for key in after if key.endswith("_token_id")}
        assert ids == {key for key in before if key.endswith("_token_id")}
        assert all(after[key] == before[key] for key in ids)
