"""Evaluation: the plain sums over every row of a source, whatever the batch size and the mesh."""

import json
import math
import sys
import threading
import time

import jax
import numpy as np
import pytest
from environment import run_script

from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.data.pipeline import evaluation_batches
from lm.exit_codes import Exit
from lm.optim.optimizer_state import averaged_params
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers.tokenizer import load
from lm.training.evaluation import _add, evaluate
from lm.training.experiment import CONFIG_FILE
from scripts import evaluate as evaluate_script

ROWS = 21  # the last batch is not full for any batch size below but 1


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """(path, bytes of text) of a token store with documents of many lengths."""
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, size)).decode() for size in rng.integers(1, 90, 14)]
    texts.append("naïve Zürich, 東京")  # more bytes than characters
    path = str(tmp_path_factory.mktemp("data") / "store")
    write_store(path, [Document(str(i), {"text": t}) for i, t in enumerate(texts)], load("bytes"))
    return path, sum(len(text.encode()) for text in texts)


@pytest.fixture(scope="module")
def evaluated(make_experiment, store):
    """(batch size, **axes) -> (results, experiment, params), of the same parameters everywhere."""

    def run(batch_size, **axes):
        changes = {
            "data.batch_size": batch_size,
            "data.validation": (store[0], f"synthetic:copy:{ROWS}"),
            "data.packing": "best_fit",  # rows with different numbers of tokens
            "loss.z_loss": 0.1,  # no part of what is reported
            "loss.label_smoothing": 0.3,
        }
        experiment = make_experiment(changes, **axes)
        params = experiment.init_state().params
        return evaluate(experiment, params), experiment, params

    return run


@pytest.fixture(scope="module")
def one_by_one(evaluated):
    return evaluated(1)


def test_evaluation_is_the_plain_loop_over_all_rows(one_by_one, store):
    results, experiment, params = one_by_one
    model = experiment.model

    @jax.jit
    def log_probabilities(tokens):
        hidden = model.apply({"params": params}, tokens).hidden
        return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))

    for name, source in experiment.validation.items():
        loss, hits, tokens = 0.0, 0, 0
        for row in range(len(source)):
            batch = experiment.objective(source.read(np.array([row])), None)
            log_p = np.asarray(log_probabilities(batch.inputs), np.float64)[0]
            for t in np.flatnonzero(batch.weights[0]):
                loss -= log_p[t, batch.targets[0, t]]
                hits += log_p[t].argmax() == batch.targets[0, t]
                tokens += 1
        assert results[name]["tokens"] == tokens
        np.testing.assert_allclose(results[name]["loss"], loss / tokens, rtol=1e-6)
        np.testing.assert_allclose(results[name]["accuracy"], hits / tokens, rtol=1e-6)
        np.testing.assert_allclose(results[name]["perplexity"], math.exp(loss / tokens), rtol=1e-5)
    path, num_bytes = store
    nats = results[path]["loss"] * results[path]["tokens"]
    np.testing.assert_allclose(results[path]["bits_per_byte"], nats / math.log(2) / num_bytes)
    assert "bits_per_byte" not in results[f"synthetic:copy:{ROWS}"]


@pytest.mark.parametrize(
    "batch_size, axes",
    [(4, {}), (16, {}), (8, {"data": 8}), (16, {"fsdp": 2, "tensor": 4})],
    ids=str,
)
def test_figures_do_not_depend_on_batch_size_or_mesh(one_by_one, evaluated, batch_size, axes):
    """Measured: equal to 2.5e-7, the rounding of float32 sums."""
    expected, results = one_by_one[0], evaluated(batch_size, **axes)[0]
    assert expected.keys() == results.keys() and len(results) == 2
    for name in expected:
        assert expected[name].keys() == results[name].keys()
        assert expected[name]["tokens"] == results[name]["tokens"]
        for metric in ("loss", "accuracy", "bits_per_byte"):
            if metric in expected[name]:
                a, b = results[name][metric], expected[name][metric]
                np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=metric)
        assert results[name]["perplexity"] == math.exp(results[name]["loss"])


def test_a_limit_reads_the_first_batches(evaluated, one_by_one):
    _, experiment, params = one_by_one
    limited = evaluate(experiment, params, max_batches=3)
    for name, source in experiment.validation.items():
        first = source.read(np.arange(3))
        assert limited[name]["tokens"] == np.sum(first.segments != 0)
        assert limited[name]["loss"] != one_by_one[0][name]["loss"]


def test_evaluation_leaves_parameters_and_training_alone(one_by_one):
    _, experiment, params = one_by_one
    before = jax.device_get(params)
    first, second = (evaluate(experiment, params) for _ in range(2))
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params))
    assert averaged_params(experiment.abstract_state.opt_state) is None


def test_batches_are_prepared_ahead_and_the_results_keep_every_bit(one_by_one, monkeypatch):
    results, experiment, params = one_by_one
    step, plain = experiment.eval_step, {}
    for name, source in experiment.validation.items():
        total, objective = {}, experiment.objective.for_source(name)
        for batch in evaluation_batches(source, objective, batch_size=1):
            _add(total, step(params, experiment.make_global_batch(batch)))
        plain[name] = total["loss"] / total["tokens"]
    assert {name: values["loss"] for name, values in results.items()} == plain

    made, seen = [], []
    make = experiment.make_global_batch

    def slow_step(params, batch):
        seen.append(len(made))
        time.sleep(0.02)
        if len(seen) == 5:
            raise RuntimeError("the device failed")
        return step(params, batch)

    monkeypatch.setattr(experiment, "make_global_batch", lambda b: made.append(0) or make(b))
    monkeypatch.setattr(experiment, "eval_step", slow_step)
    with pytest.raises(RuntimeError, match="the device failed"):
        evaluate(experiment, params)
    loader = experiment.config.loader
    assert len(seen) < seen[-1] <= len(seen) + loader.prefetch + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")]


def test_sums_over_many_batches_lose_nothing():
    total: dict[str, float] = {}
    for _ in range(6000):  # a float32 sum is 1,900 tokens off here
        _add(total, {"tokens": np.float32(4093)})
    assert total == {"tokens": 6000 * 4093.0}


def test_the_script_scores_without_bos(make_experiment, store, tmp_path, monkeypatch, capsys):
    """First tokens of documents are then inputs alone: fewer are scored, by other numbers."""
    path, _ = store
    experiment = make_experiment({"data.validation": (path,), "data.batch_size": 4})
    (tmp_path / "config.json").write_text(conversion.to_json(experiment.config_dict))
    with Checkpoints(str(tmp_path), experiment.config.checkpoint) as checkpoints:
        checkpoints.save(experiment.init_state())

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", f"--workdir={tmp_path}", *flags])
        assert evaluate_script.main() == 0
        return json.loads(capsys.readouterr().out)

    usual, bare = run(), run("--no-bos")
    rows = experiment.validation[path]
    read = rows.read(np.arange(len(rows)))
    begun = np.sum((read.segments != 0) & (read.positions == 0) & (read.previous < 0))
    assert bare["tokens"] == usual["tokens"] - begun and begun > 0
    assert "bits_per_byte" in usual and "bits_per_byte" not in bare
    assert bare["loss"] != usual["loss"]


def test_a_run_without_validation_stores_is_an_error_of_the_script(make_config, tmp_path):
    """Silence with code 0 read like success."""
    (tmp_path / CONFIG_FILE).write_text(conversion.to_json(make_config({"data.validation": ()})))
    result = run_script("evaluate", f"--workdir={tmp_path}")
    assert result.returncode == Exit.ERROR and not result.stdout
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: config.data.validation of ") and "--data" in line
