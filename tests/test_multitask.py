"""Several tasks in one batch: each source's rows by its own objective, each task's own loss."""

import jax
import numpy as np
import pytest

from lm.config import conversion
from lm.config.conversion import task
from lm.config.schema import LossConfig
from lm.layers.cross_entropy import lm_loss
from lm.objectives import ModelInterface, multitask
from lm.telemetry import metrics
from lm.tokenizers.tokenizer import ByteTokenizer

SOURCES = ("synthetic:markov:64", "synthetic:random:64:2", "synthetic:copy:64:1")  # by task
TASKS = {
    "a text": task("causal", SOURCES[:1]),
    "spans": task("span_corruption", SOURCES[2:], noise_density=0.3),
    "prefix": task("prefix", SOURCES[1:2]),
}
CHANGES = {
    "data.train": SOURCES,
    "data.weights": (2.0, 1.0, 1.0),
    "data.validation": SOURCES,
    "model.vocab_size": 272,
}


@pytest.fixture(scope="module")
def make(make_experiment):
    """(changes) -> an experiment of three tasks."""

    def make(changes=None, **axes):
        base = conversion.default(objective="multitask").objective
        base.tasks = TASKS
        return make_experiment({**CHANGES, "objective": base, **(changes or {})}, **axes)

    return make


@pytest.fixture(scope="module")
def experiment(make):
    return make()


def test_rows_of_a_batch_are_those_of_their_tasks(experiment):
    batch = experiment.train_data.batch_at(0)
    explained = experiment.train_data.explain_batch(0, experiment.tokenizer)
    assert [SOURCES.index(row.source) for row in explained] == batch.tasks.tolist()
    assert np.bincount(batch.tasks).tolist() == [8, 4, 4]
    prefix = batch.inputs.bidirectional.any(1)
    assert not prefix[batch.tasks == 0].any() and prefix[batch.tasks > 0].any()
    scored = batch.weights.sum(1)
    assert (scored[batch.tasks == 0] == 32).all() and (scored[batch.tasks == 2] < 32).all()


def test_hosts_read_their_rows_of_the_global_batch(experiment):
    whole = experiment.train_data.batch_at(3)
    for rows in (slice(0, 8), slice(8, 16)):
        part = experiment.train_data.batch_at(3, rows)
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b[rows])


@pytest.mark.parametrize("chunk_size", [0, pytest.param(64, marks=pytest.mark.slow)])
def test_losses_of_tasks_are_those_of_their_rows_and_add_up(experiment, chunk_size):
    params = experiment.init_state().params
    batch = experiment.train_data.batch_at(0)
    rng, config = jax.random.key(0), LossConfig(chunk_size=chunk_size)
    names = experiment.objective.tasks
    assert names == ("a text", "prefix", "spans")

    def sums_of(batch, names=()):
        options = {"train": False, "config": config, "tasks": names}
        run = jax.jit(lambda p, x: lm_loss(experiment.model, p, x, rng, **options)[1])
        return run(params, batch)

    sums = sums_of(batch, names)
    for quantity in ("loss", "tokens"):
        parts = [sums[f"{quantity}/{name}"] for name in names]
        np.testing.assert_allclose(sum(parts), sums[quantity], rtol=1e-6)
    means = metrics.means({name: float(value) for name, value in sums.items()})
    assert not any(name.startswith("tokens/") for name in means)
    for i, name in enumerate(names):
        alone = sums_of(jax.tree.map(lambda x, i=i: x[batch.tasks == i], batch))
        np.testing.assert_allclose(sums[f"loss/{name}"], alone["loss"], rtol=1e-5)
        assert sums[f"tokens/{name}"] == alone["tokens"]
        assert means[f"loss/{name}"] == pytest.approx(float(alone["loss"] / alone["tokens"]), 1e-5)


def test_losses_of_tasks_do_not_change_the_gradient_or_the_mesh(experiment, make):
    batch = experiment.train_data.batch_at(0)
    state = experiment.init_state()
    wanted, sums = jax.jit(experiment.gradients)(
        state.params, experiment.make_global_batch(batch), 0
    )
    options = {"train": False, "config": LossConfig()}
    plain = jax.jit(
        jax.grad(lambda p: lm_loss(experiment.model, p, batch, jax.random.key(0), **options)[0])
    )(state.params)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    sharded = make({"train.num_microbatches": 2}, data=2, sequence=2)
    _, others = jax.jit(sharded.gradients)(
        sharded.init_state().params, sharded.make_global_batch(batch), 0
    )
    for name in sums:
        np.testing.assert_allclose(others[name], sums[name], rtol=2e-5, err_msg=name)


def test_a_task_without_tokens_has_no_mean():
    sums = {"tokens": 4.0, "loss": 8.0, "tokens/a": 4.0, "loss/a": 8.0, "tokens/b": 0, "loss/b": 0}
    assert metrics.means(sums) == {"tokens": 4.0, "loss": 2.0, "loss/a": 2.0}


def test_a_config_of_tasks_is_checked_saved_and_overridden(make_config):
    config = make_config({"objective": conversion.default(objective="multitask").objective})
    config.objective.tasks = TASKS
    again = conversion.from_json(conversion.to_json(config))
    assert conversion.resolve(again) == conversion.resolve(config) and not conversion.changed(
        config, again
    )
    again.update_from_flattened_dict({"objective.tasks.spans.mean_span": 2.0})
    assert conversion.resolve(again).objective.tasks["spans"].config.mean_span == 2.0
    again.objective.tasks.spans.mean_spam = 2.0
    with pytest.raises(ValueError, match=r"config\.objective\.tasks\.spans\.mean_spam.*mean_span"):
        conversion.resolve(again)
    with pytest.raises(ValueError, match=r"task causal\.rate"):
        task("causal", ("a",), rate=1)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "tasks is empty"),
        ({"a": {"name": "causal", "sources": ()}}, r"tasks\.a\.sources names no store"),
        (
            {name: {"name": "causal", "sources": ("x",)} for name in "ab"},
            "two tasks have the source x",
        ),
    ],
)
def test_tasks_that_cannot_work_are_refused(tasks, message):
    resolved = conversion._from_dict(multitask.Config(), {"tasks": tasks}, "config.objective")
    with pytest.raises(ValueError, match=message):
        multitask.build(resolved, ByteTokenizer(), ModelInterface(16))


def test_a_source_of_no_task_is_refused(experiment):
    with pytest.raises(ValueError, match=r"no task .* has the source other; they have: synthetic"):
        experiment.objective.for_source("other")
