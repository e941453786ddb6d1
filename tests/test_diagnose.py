"""Verdicts on bad steps, and the evidence that comes with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.mlp import ACTIVATIONS
from lm.optim.optimizer_state import NormState
from lm.telemetry.deferred import StepResult, fetch
from lm.training import bad_step_report as d
from lm.training import describe
from lm.training.bad_step_report import verdict

NAN = float("nan")


def outcome(loss=1.0, *, bad=True, grad_norm=1.0):
    sums = {"loss": loss, "objective": loss, "tokens": 2.0}
    return StepResult(3, sums, {"grad_norm": grad_norm, "bad": bad})


@pytest.mark.parametrize(
    "first, replay, float32, expected",
    [
        (outcome(NAN), outcome(1.0, bad=False), None, "hardware"),
        (outcome(NAN), outcome(5.0), None, "hardware"),
        (outcome(7.0), outcome(np.nextafter(7.0, 8.0)), outcome(NAN), "hardware"),
        (outcome(7.0), outcome(7.0, grad_norm=1.5), None, "hardware"),
        (outcome(7.0), outcome(7.0, bad=False), None, "hardware"),
        (outcome(NAN), outcome(NAN), outcome(3.0, bad=False), "numerics"),
        (outcome(7.0), outcome(7.0), outcome(6.9, bad=False), "numerics"),
        (outcome(NAN), outcome(NAN), outcome(NAN), "data"),
        (outcome(7.0), outcome(7.0), outcome(7.1), "data"),
        (outcome(NAN), outcome(NAN), None, "data"),
    ],
)
def test_verdict(first, replay, float32, expected):
    assert verdict(first, replay, float32) == expected


@pytest.mark.parametrize(
    "replay, float32, expected",
    [
        (outcome(NAN), outcome(3.0, bad=False), "repeats"),  # numerics, if bits were repeated
        (outcome(5.0), outcome(NAN), "repeats"),  # hardware
        (outcome(NAN), None, "repeats"),  # data
        (outcome(1.0, bad=False), None, "unclear"),  # hardware
    ],
)
def test_where_bits_are_not_repeated_the_verdict_names_no_cause(replay, float32, expected):
    assert verdict(outcome(NAN), replay, float32, repeats=False) == expected
    assert expected in d.REASONS and expected != verdict(outcome(NAN), replay, float32)


@pytest.mark.parametrize(
    "flags, entries, expected",
    [
        ("", (), False),
        ("--xla_gpu_deterministic_ops", (), True),
        ("--xla_gpu_deterministic_ops=true --xla_x=2", (), True),
        ("--xla_gpu_exclude_nondeterministic_ops=1", (), True),
        ("--xla_gpu_deterministic_ops=false", (), False),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", (), False),
        ("--xla_gpu_deterministic_ops_of_another_kind", (), False),
        ("", ("auto", "xla_gpu_deterministic_ops=true"), True),
        ("--xla_gpu_deterministic_ops=true", ("xla_gpu_deterministic_ops=false",), False),
    ],
)
def test_a_gpu_repeats_bits_with_the_flag_alone(
    make_experiment, monkeypatch, flags, entries, expected
):
    experiment = make_experiment({"guard.policy": "rewind", "train.compiler_flags": entries})
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert d.is_repeatable(experiment)
    monkeypatch.setitem(vars(experiment.rules), "platform", "gpu")
    assert d.is_repeatable(experiment) == expected
    lines = list(describe._lines(experiment, is_new=True))
    assert any("bad again" in line for line in lines) != expected


def take(experiment, batch, step, state=None):
    """(the state after a step on `batch`, what it gave)."""
    state = experiment.init_state() if state is None else state
    state = state.replace(step=jnp.full_like(state.step, step))
    state, sums, info = experiment.train_step(state, batch)
    return state, fetch(step, sums, info)


def judge(experiment, batch, step=3, state=None):
    """The evidence about a step that is bad, done again as a run does it."""
    state, first = take(experiment, batch, step, state)
    assert first.bad
    state, again = take(experiment, batch, step, state)
    return d.diagnose(experiment, state, batch, first, again)


def local_batch(experiment, step=3):
    return experiment.train_data.batch_at(step)


def with_bad_row(experiment, row, step=3):
    batch = local_batch(experiment, step)
    weights = batch.weights.copy()
    weights[row, 7] = np.inf
    return experiment.make_global_batch(batch.replace(weights=weights))


def test_a_bad_record_is_named(make_experiment):
    changes = {"train.num_microbatches": 2, "model.dtype": "bfloat16"}
    experiment = make_experiment(changes, data=2, fsdp=2)
    found = judge(experiment, with_bad_row(experiment, 5))
    assert found["verdict"] == "data" and found["step"] == 3 and found["changed_bits"] == []
    assert found["float32"]["bad"] and not np.isfinite(found["float32"]["loss"])
    assert found["not_finite"]["parameters"] == found["not_finite"]["optimizer"] == {}
    assert set(found["not_finite"]["gradients"]) >= {"embedding.weight", "layers.mlp.up.weight"}

    worst = found["worst_rows"][0]
    origin = experiment.train_data.explain_batch(3, experiment.tokenizer)[5]
    assert (worst["row"], worst["loss"]) == (5, np.inf)
    assert (worst["source"], worst["epoch"], worst["source_row"]) == origin[:3]
    assert [x["id"] for x in worst["documents"]] == [span.id for span in origin.documents]
    assert [x["begins"] for x in worst["documents"]] == origin.text
    [bad] = [x["id"] for x in worst["documents"] if x["loss"] == np.inf]
    segment = local_batch(experiment).inputs.segments[5, 7]
    assert bad == origin.documents[segment - 1].id
    others = found["worst_rows"][1:]
    losses = [row["loss"] for row in others]
    assert np.isfinite(losses).all() and losses == sorted(losses, reverse=True)
    assert f"worst row: 5, loss inf (median {np.median(found['row_losses']):.4g}" in d.summary(
        found
    )


def test_what_is_gone_in_float32_is_numerics(make_experiment, monkeypatch):
    def fragile(x):
        return x / (np.asarray(1 + 1e-3, x.dtype) - np.asarray(1, x.dtype))  # bfloat16: 1.001 is 1

    monkeypatch.setitem(ACTIVATIONS, "relu2", (fragile, False))
    changes = {"model.activation": "relu2", "model.dtype": "bfloat16"}
    experiment = make_experiment(changes, data=2)
    found = judge(experiment, experiment.make_global_batch(local_batch(experiment)))
    assert found["verdict"] == "numerics" and not found["float32"]["bad"]
    assert np.isnan(found["first"]["loss"]) and np.isfinite(found["float32"]["loss"])
    float32 = make_experiment(changes | {"model.dtype": "float32"}, data=2)
    _, good = take(float32, float32.make_global_batch(local_batch(float32)), 3)
    np.testing.assert_allclose(found["float32"]["sums"]["loss"], good.sums["loss"], rtol=1e-5)


def test_what_does_not_repeat_is_hardware(make_experiment):
    experiment = make_experiment({"model.dtype": "bfloat16"})
    batch = experiment.make_global_batch(local_batch(experiment))
    state, again = take(experiment, batch, 3)
    assert not again.bad
    first = StepResult(3, {**again.sums, "loss": NAN}, {**again.info, "bad": True})
    found = d.diagnose(experiment, state, batch, first, again)
    assert found["verdict"] == "hardware" and found["changed_bits"] == ["loss"]
    assert found["float32"] is None


@pytest.mark.slow
def test_a_spike_is_one_by_the_running_mean_in_float32_too(make_experiment):
    changes = {"guard.spike_factor": 3.0, "guard.spike_warmup": 2, "model.dtype": "bfloat16"}
    experiment = make_experiment(changes)
    state = experiment.init_state()
    usual = NormState(jnp.int32(2), jnp.float32(np.log(1e-4)))
    opt_state = jax.tree.map(
        lambda x: usual if isinstance(x, NormState) else x,
        state.opt_state,
        is_leaf=lambda x: isinstance(x, NormState),
    )
    batch = experiment.make_global_batch(local_batch(experiment))
    found = judge(experiment, batch, state=state.replace(opt_state=opt_state))
    assert found["verdict"] == "data" and found["float32"]["bad"]
    assert found["usual_grad_norm"] == pytest.approx(1e-4)
    assert found["first"]["grad_norm"] > 3e-4 and np.isfinite(found["first"]["loss"])


def test_damaged_parameters_and_optimizer_state_are_named(make_experiment):
    experiment = make_experiment()
    state = experiment.init_state()
    weight = state.params["layers"]["mlp"]["up"]["weight"]
    state.params["layers"]["mlp"]["up"]["weight"] = (
        weight.at[1, 2, 3].set(NAN).at[0, 0, 0].set(1e30)
    )
    paths = jax.tree_util.tree_leaves_with_path(state.opt_state)
    name = next(p for p, x in paths if x.ndim == 1)
    hit = jax.tree_util.keystr(name, simple=True, separator=".")
    opt_state = jax.tree_util.tree_map_with_path(
        lambda p, x: x.at[0].set(jnp.inf) if p == name else x, state.opt_state
    )
    batch = experiment.make_global_batch(local_batch(experiment))
    found = judge(experiment, batch, state=state.replace(opt_state=opt_state))
    assert found["not_finite"]["parameters"] == {"layers.mlp.up.weight": 1}
    assert found["not_finite"]["optimizer"] == {hit: 1}
    sizes = found["parameters"]["layers.mlp.up.weight"]
    assert sizes["not_finite"] == [0, 1]
    assert sizes["max"][0] == sizes["norm"][0] == pytest.approx(1e30) and sizes["max"][1] < 10
    assert all(np.isnan(found["row_losses"]))


@pytest.mark.parametrize(
    "microbatches, axes",
    [(1, {}), pytest.param(4, {"data": 2, "tensor": 2}, marks=pytest.mark.slow)],
)
def test_sizes_and_row_losses_are_those_of_the_step(make_experiment, microbatches, axes):
    experiment = make_experiment({"train.num_microbatches": microbatches}, **axes)
    batch = experiment.make_global_batch(local_batch(experiment))
    state, good = take(experiment, batch, 3)
    params = experiment.init_state().params
    found = d.diagnose(experiment, state.replace(params=params), batch, good, good)

    grad = jax.jit(jax.grad(experiment.loss_at(0), has_aux=True))
    grads, sums = grad(params, batch, jax.random.key(0))
    up = np.asarray(grads["layers"]["mlp"]["up"]["weight"]) / float(sums["tokens"])
    sizes = found["gradients"]["layers.mlp.up.weight"]
    np.testing.assert_allclose(sizes["norm"], np.sqrt((up**2).sum((1, 2))), rtol=1e-5)
    np.testing.assert_allclose(sizes["max"], np.abs(up).max((1, 2)), rtol=1e-5)
    squares = [np.square(x["norm"]).sum() for x in found["gradients"].values()]
    np.testing.assert_allclose(np.sqrt(sum(squares)), good.info["grad_norm"], rtol=1e-5)

    weights = local_batch(experiment).weights.sum(1)
    np.testing.assert_allclose(found["row_losses"] @ weights, good.sums["loss"], rtol=1e-5)
    worst = found["worst_rows"][0]
    assert worst["row"] == np.argmax(found["row_losses"])
    spans = np.array([x["stop"] - x["start"] for x in worst["documents"]])
    losses = np.array([x["loss"] for x in worst["documents"]])
    np.testing.assert_allclose((spans * losses).sum() / spans.sum(), worst["loss"], rtol=1e-5)


def test_evidence_is_one_file_of_plain_json(make_experiment, tmp_path):
    experiment = make_experiment()
    found = judge(experiment, with_bad_row(experiment, 2))
    assert d.diagnosed_steps(str(tmp_path)) == []
    d.write(str(tmp_path), found, active=False)
    assert d.diagnosed_steps(str(tmp_path)) == []
    path = d.write(str(tmp_path), found, active=True)
    assert d.diagnosed_steps(str(tmp_path)) == [3]
    with open(path) as file:
        text = file.read()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(text, parse_constant=refuse)
    assert read.keys() == found.keys() and read["row_losses"][2] == "inf"
    assert read["again"]["sums"]["tokens"] == "inf" and read["verdict"] == "data"
    assert len(text.splitlines()) < 100


def test_a_bad_step_is_described_in_a_line(make_experiment):
    sums = {"loss": 6.0, "objective": 6.0, "tokens": 2.0}
    info = {"grad_norm": np.float32(123.4), "bad": True, "finite_params": True}
    spike = StepResult(7, sums, info)
    assert d.describe(spike) == "step 7: its gradient is a spike: loss 3, gradient norm 123.4"
    overflow = StepResult(7, sums, {**info, "finite_params": False})
    assert d.describe(overflow) == (
        "step 7: its update is not finite (see config.optimizer): loss 3, gradient norm 123.4"
    )
    sums = {**sums, "loss": NAN, "objective": NAN}
    info = {"grad_norm": np.float32(NAN), "bad": True, "finite_params": False}
    broken = StepResult(7, sums, info)
    assert d.describe(broken) == "step 7: not finite: loss nan, gradient norm nan"
