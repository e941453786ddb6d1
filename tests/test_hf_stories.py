"""A real pretrained model, from import to export: stories260K, with what was published of it."""

import json
import shutil

import jax
import numpy as np
import pytest
from stories import FOLDER, import_stories

from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.hf.exporting import export_folder
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.training.loop import train
from lm.training.restore import restore_params
from lm.training.stored_run import load
from lm.types import Tokens

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="../shared/data/weights is not there")
GREEDY = Sampling(temperature=0.0)
STORY = "Once upon a time there was a cat named Tom. Tom saw a big red ball and was happy.\n"


def restored(workdir, devices):
    experiment = load(workdir, devices[:1])
    _, params = restore_params(experiment, workdir)
    return experiment, params


@pytest.fixture(scope="module")
def expected():
    return json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, devices):
    return import_stories(tmp_path_factory.mktemp("stories"), devices)


@pytest.fixture(scope="module")
def generated(workdir, devices):
    experiment, params = restored(workdir, devices)
    generator = Generator(experiment.model, params, experiment.tokenizer)
    return generator.generate([""], max_new_tokens=200, sampling=GREEDY)[0]


def test_two_hundred_greedy_ids_are_those_published(generated, expected):
    assert [1, *generated.ids.tolist()] == expected["greedy_ids"]
    assert generated.text.strip() == expected["text"]


def test_logits_are_those_published(workdir, devices):
    wanted = np.load(FOLDER / "expected_logits.npz")
    experiment, params = restored(workdir, devices)
    ids = wanted["ids"][None]
    tokens = Tokens(ids, np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None])

    def run(params, tokens):
        hidden = experiment.model.apply({"params": params}, tokens).hidden
        return experiment.model.apply({"params": params}, hidden, method="logits")

    found = np.asarray(jax.jit(run)(params, tokens))[0]
    assert np.abs(found - wanted["logits"]).max() < 2e-5 * np.abs(wanted["logits"]).max()


def test_it_trains_on_and_transformers_goes_on_with_the_same_text(workdir, devices, tmp_path):
    """Four steps on a story change it, and the export of the result says what it says."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shutil.copytree(workdir, tmp_path / "run")
    run = str(tmp_path / "run")
    experiment, before = restored(run, devices)
    store = str(tmp_path / "store")
    write_store(store, [Document("0", {"text": STORY * 200})], experiment.tokenizer)
    config = experiment.config_dict.copy_and_resolve_references()
    config.data.train = (store,)
    config.log.parameter_table = False
    config.checkpoint.allow_changed = ("data.train",)
    assert train(config, run, devices[:1]) == 0

    experiment, after = restored(run, devices)
    assert not np.array_equal(before["embedding"]["weight"], after["embedding"]["weight"])
    generator = Generator(experiment.model, after, experiment.tokenizer)
    ours = generator.generate(["Once upon a time"], max_new_tokens=40, sampling=GREEDY)[0]
    assert export_folder(experiment, after, str(tmp_path / "out"), say=lambda line: None) == "llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    length = inputs["input_ids"].shape[1]
    assert theirs[length:].tolist() == ours.ids.tolist()
    assert tokenizer.decode(theirs, skip_special_tokens=True) == "Once upon a time" + ours.text
