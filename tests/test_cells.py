"""Every objective with every kind of model that it is for: a restart changes no bit.

Cells of one model whose batches have the same structure share one compiled step: an objective is
the host's alone. What a mesh changes depends on the structure too; the one that the tests of
models don't have, a decoder with prefixes, is compared here.
"""

import jax
import numpy as np
import pytest

from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.planning import mesh_equivalence
from lm.preparation.token_writer import write_store
from lm.sources import Document
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.training.experiment import Experiment
from lm.training.restore import restore
from tests.test_encoders_training import make_config as encoder_config

PAIRS = ("seq2seq", "classification")
CELLS = [
    *(("decoder", name) for name in ("prefix", "span_corruption", "ul2", "denoising", *PAIRS)),
    *(("encoder", name) for name in ("mlm", "classification")),
    *(("encoder_decoder", name) for name in ("span_corruption", "ul2", "denoising", *PAIRS)),
]
KINDS = {"encoder": "bert", "encoder_decoder": "t5"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A store of texts and of one of two letters for each."""
    path = str(tmp_path_factory.mktemp("pairs") / "store")
    rng = np.random.default_rng(0)
    documents = [
        Document(str(i), {"source": "ab" * int(n), "target": "xy"[i % 2]})
        for i, n in enumerate(rng.integers(1, 12, 400))
    ]
    write_store(path, documents, ByteTokenizer(), fields=("source", "target"))
    return path


@pytest.fixture(scope="module")
def cell(make_config, pairs):
    """(model, objective) -> the config of a tiny run."""

    def make(model, objective):
        changes = {"model.vocab_size": 320, "objective.name": objective}
        if model == "decoder":
            config = make_config({"model.dropout": 0.1})
            config.objective = conversion.default(objective=objective).objective
            config.model.vocab_size = 320
        else:
            fits = model == "encoder_decoder" and objective != "span_corruption"
            changes |= {"data.length": 32} if fits else {}
            config = encoder_config(KINDS[model], **changes)
        if objective in PAIRS:
            config.data.train, config.data.validation = (pairs,), ()
        if objective == "classification":
            config.objective.labels = ("x", "y")
        config.guard.self_check = False
        return config

    return make


@pytest.fixture(scope="module")
def steps():
    """{(model, structure of its batches): compiled step}."""
    return {}


# These differ from others of their model only in what the host makes.
SLOW = [
    *(("encoder_decoder", name) for name in ("ul2", "denoising", *PAIRS)),
    *(("decoder", name) for name in ("ul2", "denoising", *PAIRS)),
]


@pytest.mark.parametrize(
    ("model", "objective"),
    [pytest.param(*c, marks=pytest.mark.slow) if c in SLOW else c for c in CELLS],
)
def test_a_restart_changes_no_bit(model, objective, cell, steps, devices, tmp_path):
    def start():
        experiment = Experiment(cell(model, objective), devices[:1])
        structure = jax.tree.map(lambda x: (x.shape, x.dtype), experiment.abstract_batch)
        key = model, str(structure)
        if key not in steps:
            steps[key] = experiment.train_step
        return experiment, steps[key]

    experiment, step = start()
    state = experiment.init_state()
    before = jax.device_get(state.params)
    for at, batch in experiment.batches(0, 4):
        if at == 2:
            with Checkpoints(str(tmp_path), experiment.config.checkpoint) as checkpoints:
                checkpoints.save(state)
        state, sums, _ = step(state, batch)
        assert np.isfinite(float(sums["loss"])) and float(sums["tokens"]) > 0
    whole = jax.device_get(state)
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, whole.params)), strict=True)
    )

    again, step = start()
    with Checkpoints(str(tmp_path), again.config.checkpoint) as checkpoints:
        state, _ = restore(again, checkpoints)
    assert int(state.step) == 2
    for _, batch in again.batches(2, 4):
        state, _, _ = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(state))


def test_a_decoder_with_prefixes_trains_on_a_mesh_as_on_one_device(cell, devices):
    report = mesh_equivalence.verify(
        cell("decoder", "span_corruption"), {"fsdp": 2, "tensor": 2}, devices[:4]
    )
    assert report.ok, mesh_equivalence.describe(report)
