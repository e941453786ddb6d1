"""A run predicts what its objective scores: texts after their source, labels by likelihood."""

import importlib.util
import json
import sys
import uuid
from pathlib import Path

import jax
import numpy as np
import object_stores
import pytest

from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.config.conversion import task
from lm.config.schema import LossConfig
from lm.data.pairs import Pairs
from lm.data.tokens import TokenStore
from lm.evaluation.predict import GREEDY, predict, task_config
from lm.generation.beam import BeamSearch
from lm.generation.generator import Generator
from lm.layers.cross_entropy import lm_loss
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.storage import files
from lm.training.experiment import CONFIG_FILE, Experiment

SOURCES = ["abc", "a longer text", "b"]
LABELS = {"objective.labels": ("good", "bad", "so-so"), "objective.verbalizers": ("G", "B", "S")}
TINY = {
    "model.vocab_size": 264,
    "model.max_length": 48,
    "model.num_layers": 2,
    "model.embed_dim": 16,
    "model.num_heads": 4,
    "model.mlp_dim": 32,
    "model.init_std": 0.2,
    "data.train": ("synthetic:reverse",),
    "data.length": 48,
    "data.batch_size": 16,
    "loader.kind": "thread",
    "loss.chunk_size": 0,
    "train.num_steps": 4,
}
ENCODER = {"data.encoder_length": 48, "data.length": 24}


def experiment_of(model, objective, devices, **changes):
    config = conversion.default(model=model, objective=objective)
    values = TINY | (ENCODER if model == "encoder_decoder" else {}) | changes
    config.update_from_flattened_dict(values)
    return Experiment(config, devices[:1])


@pytest.fixture(scope="module")
def seq2seq(devices):
    """model -> (experiment, random parameters)"""
    found = {}

    def make(model):
        if model not in found:
            experiment = experiment_of(model, "seq2seq", devices)
            found[model] = experiment, experiment.init_state().params
        return found[model]

    return make


def batch_of(experiment, source, target, folder):
    """The batch that the objective makes of one document."""
    document = Document("a", {"source": source, "target": target})
    path = folder / str(len(list(folder.iterdir())))
    write_store(path, [document], experiment.tokenizer, fields=("source", "target"))
    stores = [TokenStore.open(path, field=name) for name in ("source", "target")]
    rows = Pairs(stores, experiment.objective.layout).read(np.array([0]))
    return experiment.objective(rows, None)


@pytest.mark.parametrize(
    ("model", "search"),
    [("decoder", GREEDY), ("encoder_decoder", BeamSearch(num_beams=2, num_samples=2))],
    ids=["decoder, greedy", "encoder and decoder, beams"],
)
def test_texts_go_on_where_the_objective_begins_to_score(model, search, seq2seq, tmp_path):
    experiment, params = seq2seq(model)
    found = predict(experiment, params, SOURCES, max_new_tokens=8, search=search)
    generator = Generator(experiment.model, params, experiment.tokenizer)

    def texts_after(prompts):
        made = generator.generate(prompts, max_new_tokens=8, sampling=search)
        return [generation.text.strip() for generation in made if generation.sample == 0]

    prompts = []
    for source in SOURCES:
        batch = batch_of(experiment, source, "xyz", tmp_path)
        begin = int(np.argmax(batch.weights[0] > 0))
        prompt = batch.inputs.ids[0, 1 : begin + 1]  # without the bos that the generator puts
        if batch.encoder is not None:
            assert not len(prompt)
            prompt = batch.encoder.ids[0][batch.encoder.segments[0] > 0][:-1]
        prompts.append(prompt)
    texts = [prediction.text for prediction in found]
    assert texts == texts_after(prompts) and len(set(texts)) > 1
    assert not any(p.is_cut or p.probability is not None for p in found)
    if model == "decoder":  # the eos between source and target matters
        assert texts_after(SOURCES) != texts


@pytest.mark.parametrize("model", ["decoder", "encoder_decoder"])
def test_sources_that_are_too_long_are_cut_and_said_to_be(model, seq2seq):
    experiment, params = seq2seq(model)
    room = 47 if model == "encoder_decoder" else 48 - 8 - 1
    sources = ["a" * room, "a" * (room + 1), "a" * 200]
    found = predict(experiment, params, sources, max_new_tokens=8)
    assert [p.is_cut for p in found] == [False, True, True]
    assert len({p.text for p in found}) == 1


@pytest.mark.parametrize("model", ["decoder", "encoder_decoder", "encoder"])
def test_probabilities_of_labels_are_those_that_the_loss_has(model, devices, tmp_path):
    experiment = experiment_of(model, "classification", devices, **LABELS)
    params = experiment.init_state().params
    found = predict(experiment, params, SOURCES)

    @jax.jit
    def loss(batch):
        return lm_loss(
            experiment.model, params, batch, jax.random.key(0), train=False, config=LossConfig()
        )[1]["loss"]

    labels = experiment.config.objective.labels
    for source, prediction in zip(SOURCES, found, strict=True):
        losses = [loss(batch_of(experiment, source, label, tmp_path)) for label in labels]
        likelihoods = np.exp(-np.array(losses))
        best = int(likelihoods.argmax())
        assert prediction.text == labels[best]
        assert prediction.probability == pytest.approx(likelihoods[best] / likelihoods.sum(), 1e-4)
    long = predict(experiment, params, ["a" * 100, "a" * 10])
    assert [p.is_cut for p in long] == [True, False]


def test_a_task_of_several_is_named(devices):
    stores = ("synthetic:reverse", "synthetic:markov:64")
    config = conversion.default(objective="multitask")
    config.update_from_flattened_dict(TINY | {"data.train": stores})
    config.objective.tasks = {
        "back": task("seq2seq", stores[:1]),
        "text": task("causal", stores[1:]),
    }
    experiment = Experiment(config, devices[:1])
    tasks = experiment.config.objective.tasks
    assert task_config(experiment, "back") == tasks["back"].config
    for name, message in (
        (None, "task None must be one of config.objective.tasks: back, text"),
        ("bcak", "task 'bcak' must be one of"),
        ("text", "must be seq2seq or classification"),
    ):
        with pytest.raises(ValueError, match=message):
            task_config(experiment, name)


def test_what_cannot_be_predicted_is_refused(seq2seq, devices):
    experiment, params = seq2seq("decoder")
    with pytest.raises(ValueError, match=r"task .x. must be one of .*\.tasks: none"):
        predict(experiment, params, ["a"], task="x")
    with pytest.raises(ValueError, match=r"max_new_tokens \(47\) leaves no room .* \(48\)"):
        predict(experiment, params, ["a"], max_new_tokens=47)
    changes = {"objective.bidirectional": True}
    experiment = experiment_of("decoder", "seq2seq", devices, **changes)
    with pytest.raises(ValueError, match="cannot generate token by token"):
        predict(experiment, params, ["a"])


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "scripts" / "predict.py"
    spec = importlib.util.spec_from_file_location("predict_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_every_record_and_measures_baselines_beside_the_run(
    script, devices, buckets, tmp_path, monkeypatch, capsys
):
    workdir = f"gs://{object_stores.BUCKET}/{uuid.uuid4().hex}"
    experiment = experiment_of("encoder", "classification", devices, **LABELS)
    state = experiment.init_state()
    files.write_atomically(f"{workdir}/{CONFIG_FILE}", conversion.to_json(experiment.config_dict))
    with Checkpoints(workdir, experiment.config.checkpoint) as checkpoints:
        checkpoints.save(state)
    texts = [("abc", "good"), ("abd", "bad"), ("x", "bad")]
    for name, rows in (("test", texts), ("train", texts * 2)):
        lines = [json.dumps({"text": t, "label": c}) for t, c in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "no json"]))
    arguments = f"""--workdir={workdir} --data={tmp_path}/test.jsonl --train={tmp_path}/train.jsonl
        --field=source=text --field=target=label --metrics=classes --max-loss=0.3"""
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments.split()])
    monkeypatch.setattr(jax, "devices", lambda: devices[:1])
    assert script.main() == 0
    stored = files.read_bytes(f"{workdir}/predictions.jsonl").decode()
    written = [json.loads(line) for line in stored.splitlines()]
    found = predict(experiment, state.params, [t for t, _ in texts])
    assert [(w["source"], w["target"]) for w in written] == texts
    assert [w["prediction"] for w in written] == [p.text for p in found]
    assert [w["probability"] for w in written] == pytest.approx([p.probability for p in found])
    shown = capsys.readouterr()
    head, run, *baselines = shown.out.splitlines()
    assert head.split() == ["accuracy", "balanced", "macro-F1"]
    right = sum(p.text == label for p, (_, label) in zip(found, texts, strict=True))
    assert run.split()[-3] == f"{100 * right / 3:.2f}"
    assert baselines[0].split() == ["majority", "66.67", "50.00", "40.00"]
    assert baselines[1].split() == ["nearest", "100.00", "100.00", "100.00"]
    assert "no records: 1 malformed_json (test.jsonl@" in shown.err


def test_the_script_says_which_field_it_does_not_know(script, tmp_path):
    flags = script.argparse.Namespace(field=["source"], separator="", tfds_split="train")
    flags.tfds_data_dir, flags.tfds_download, flags.max_loss = None, False, 0.05
    with pytest.raises(ValueError, match="--field must say where these fields come from: target"):
        script.read(flags, [str(tmp_path / "x.jsonl")], ["source", "target"])
