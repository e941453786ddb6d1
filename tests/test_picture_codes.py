"""Codes of pictures as a store: what it holds, resuming, and stores of another origin."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.checkpoint.manifest import Manifest, fingerprint
from lm.checkpoint.step_files import MANIFEST_FILE
from lm.config.conversion import default
from lm.data import shapes
from lm.data.images import CaptionedImages
from lm.data.rows import RowLayout
from lm.data.tokens import TokenStore
from lm.preparation.token_writer import write_store as write_pictures
from lm.sources import Document, Picture
from lm.storage import files as storage
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.training import picture_codes
from lm.training.loop import train
from lm.training.picture_codes import PictureCoder, write_store

SIZE, COUNT, SHARD = 16, 20, 8
PICTURES = f"synthetic:shapes:{COUNT}:1:held_out"


def vqvae_config(**model):
    config = default(model="vqvae", objective="vqvae")
    config.data.train, config.data.length = ("synthetic:shapes:64",), 48
    config.data.batch_size, config.loader.kind, config.train.num_steps = 8, "thread", 1
    small = {"image_size": SIZE, "embed_dim": 8, "mlp_dim": 4, "num_layers": 1, "num_codes": 12}
    config.model.update({**small, "code_dim": 4, **model})
    config.log.parameter_table, config.log.trackers = False, ("jsonl",)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a VQ-VAE's run of one step."""
    folder = str(tmp_path_factory.mktemp("vqvae"))
    assert train(vqvae_config(), folder, jax.devices()[:1]) == 0
    return folder


@pytest.fixture(scope="module")
def coder(run):
    return PictureCoder(run, jax.devices()[:1], batch_size=4)


@pytest.fixture(scope="module")
def store(coder, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("codes") / "train")
    write_store(coder, PICTURES, out, shard_pictures=SHARD)
    return out


def files(folder):
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_store_has_captions_and_the_codes_of_their_pictures(coder, store):
    text, codes = (TokenStore.open(store, field=field) for field in ("text", "codes"))
    numbers = np.arange(COUNT)
    found = [ByteTokenizer().decode(text.document(i)[:-1]) for i in numbers]
    assert found == shapes.captions(numbers, seed=1, split="held_out")
    assert all(text.document(i)[-1] == ByteTokenizer().eos_id for i in numbers)
    assert text.num_bytes == sum(map(len, found))
    images = shapes.draw(numbers, size=SIZE, seed=1, split="held_out")
    expected = coder.encode(images)
    assert expected.shape == (COUNT, 16) and expected.max() < 12
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(np.stack([codes.document(i) for i in numbers]), expected)
    assert len(text.shards) == 3 and text.document_ids(9) == "shapes/9"
    text.verify()


def test_the_manifest_names_the_vqvae_and_its_bits(run, coder, store):
    found = TokenStore.open(store).manifest["codes"]
    assert (found["grid_size"], found["num_codes"], found["image_size"]) == (4, 12, SIZE)
    assert found["vqvae"] == {"run": run, "step": 1, "fingerprint": coder.fingerprint}
    [file] = Path(run).glob(f"checkpoints/1/manifest/{MANIFEST_FILE}")
    leaves = Manifest.from_json(file.read_text()).leaves
    of_params = {name: leaf for name, leaf in leaves.items() if name.startswith("params.")}
    assert coder.fingerprint == fingerprint(of_params) and len(of_params) < len(leaves)


def test_eight_devices_give_the_same_codes(run, coder):
    images = shapes.draw(np.arange(COUNT), size=SIZE, seed=1)
    eight = PictureCoder(run, jax.devices(), batch_size=4)
    assert eight.batch_size == 8
    np.testing.assert_array_equal(eight.encode(images), coder.encode(images))
    decoded = coder.decode(coder.encode(images))
    assert decoded.shape == images.shape and decoded.dtype == np.uint8


def test_an_interrupted_run_goes_on_with_the_shard_that_is_missing(
    coder, store, tmp_path, monkeypatch
):
    out, calls = str(tmp_path / "train"), []

    def encode(images, *, limit):
        calls.append(len(images))
        if len(calls) > limit:
            raise KeyboardInterrupt
        return PictureCoder.encode(coder, images)

    monkeypatch.setattr(coder, "encode", functools.partial(encode, limit=3))
    with pytest.raises(KeyboardInterrupt):
        write_store(coder, PICTURES, out, shard_pictures=SHARD)
    assert not (tmp_path / "train/manifest.json").exists()
    calls.clear()
    monkeypatch.setattr(coder, "encode", functools.partial(encode, limit=9))
    write_store(coder, PICTURES, out, shard_pictures=SHARD)
    assert calls == [4, 4, 4]  # of 20 pictures, 8 are in the first shard
    assert files(out) == files(store)
    calls.clear()
    write_store(coder, PICTURES, out, shard_pictures=SHARD)
    assert not calls and not (tmp_path / "train.lock").exists()


def test_a_store_may_be_in_a_bucket(coder, store, folder):
    out = f"{folder}/codes/train"
    manifest = write_store(coder, PICTURES, out, shard_pictures=SHARD)
    assert manifest == TokenStore.open(store).manifest
    found = TokenStore.open(out, field="codes")
    np.testing.assert_array_equal(
        found.document(11), TokenStore.open(store, field="codes").document(11)
    )
    assert write_store(coder, PICTURES, out, shard_pictures=SHARD) == manifest
    assert storage.list_names(f"{folder}/codes") == ["train"]


def test_a_store_of_pictures_keeps_its_captions_and_ids(coder, tmp_path):
    tokenizer = ByteTokenizer()
    images = shapes.draw(np.arange(5), size=SIZE, seed=2)
    texts = shapes.captions(np.arange(5), seed=2)
    documents = [
        Document(f"p{i}", {"text": text}, picture=Picture(image))
        for i, (text, image) in enumerate(zip(texts, images, strict=True))
    ]
    write_pictures(tmp_path / "pictures", documents, tokenizer, image_size=SIZE)
    manifest = write_store(coder, str(tmp_path / "pictures"), str(tmp_path / "codes"))
    stored = TokenStore.open(tmp_path / "codes", field="codes")
    np.testing.assert_array_equal(stored.document(3), coder.encode(images)[3])
    assert [stored.document_ids(i) for i in range(5)] == [f"p{i}" for i in range(5)]
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    source = CaptionedImages(
        TokenStore.open(tmp_path / "pictures"), RowLayout((64,), image_size=SIZE)
    )
    assert manifest["fields"]["text"]["num_tokens"] == int(
        (source.read(np.arange(5)).segments > 0).sum()
    )


def test_codes_of_another_origin_are_refused(coder, store, run, tmp_path):
    with pytest.raises(ValueError, match=r"codes of another origin: data \(there synthetic:shap"):
        write_store(coder, "synthetic:shapes:9", store, shard_pictures=SHARD)
    other = str(tmp_path / "other")
    assert train(vqvae_config(num_codes=9), other, jax.devices()[:1]) == 0
    with pytest.raises(ValueError, match=r"origin: num_codes \(there 12, now 9\), vqvae"):
        write_store(PictureCoder(other, jax.devices()[:1]), PICTURES, store, shard_pictures=SHARD)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is a folder of other files"):
        write_store(coder, PICTURES, str(tmp_path / "full"))


def test_runs_and_stores_without_pictures_are_named(coder, tmp_path, make_config):
    config = make_config({"train.num_steps": 1})
    assert train(config, str(tmp_path / "text"), jax.devices()[:1]) == 0
    with pytest.raises(
        ValueError, match=r"is a run of config\.model\.name=decoder, not of a vqvae"
    ):
        PictureCoder(str(tmp_path / "text"), jax.devices()[:1])
    documents = [Document("a", {"text": "a"})]
    write_pictures(tmp_path / "plain", documents, ByteTokenizer())
    with pytest.raises(ValueError, match="a store of text without pictures"):
        write_store(coder, str(tmp_path / "plain"), str(tmp_path / "codes"))


def test_numbers_of_many_codes_are_stored_whole():
    class Many:
        config = type("Config", (), {"num_codes": 1 << 17})

    assert picture_codes._dtype(Many(), ByteTokenizer()) == "<u4"
    Many.config.num_codes = 1 << 16
    assert picture_codes._dtype(Many(), ByteTokenizer()) == "<u2"
