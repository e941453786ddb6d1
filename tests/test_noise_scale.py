"""The noise scale of gradients whose mean and covariance are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.telemetry import writers
from lm.telemetry.deferred import StepResult
from lm.training import gradient_noise_scale, train_step
from lm.types import Batch, Tokens

SIZE, PARTS, ROWS = 6, 4, 16
MEAN, DEVIATION = 0.5, 2.0
SIGNAL, NOISE = SIZE * MEAN**2, SIZE * DEVIATION**2  # |G|^2 and tr(S)


def loss_fn(params, batch, rng):
    """Each row is a token whose gradient is its `weights`; those of target 0 don't count."""
    del rng
    counts = (batch.targets[:, 0] != 0).astype(jnp.float32)
    loss = jnp.sum(counts[:, None] * batch.weights * params["w"])
    return loss, {"objective": loss, "loss": loss, "tokens": jnp.sum(counts)}


def estimates(draws, counts):
    """(noise, signal) of draws [n, rows, SIZE]: a step of each, with PARTS micro-batches."""
    zeros = np.zeros(counts.shape, np.int32)
    tokens = Tokens(zeros, zeros, zeros)

    def one(weights):
        batch = Batch(tokens, counts, weights)
        grads, sums = train_step.gradients(
            loss_fn, {"w": jnp.zeros(SIZE)}, batch, jax.random.key(0), PARTS, (), True
        )
        norm = jnp.linalg.norm(grads["w"] / sums["tokens"])
        return gradient_noise_scale.estimate(sums, norm)

    found = jax.jit(jax.vmap(one))(draws)
    return np.asarray(found["noise"]), np.asarray(found["signal"])


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_estimates_have_no_bias(uneven):
    """Means of 4,000 steps within four of their standard errors, also where micro-batches have
    1 to 4 tokens.
    """
    rng = np.random.default_rng(0)
    draws = rng.normal(MEAN, DEVIATION, (4000, ROWS, SIZE)).astype(np.float32)
    counts = np.ones((ROWS, SIZE), np.int32)
    if uneven:  # row r is in micro-batch r % PARTS
        part, place = np.arange(ROWS) % PARTS, np.arange(ROWS) // PARTS
        counts[place > part] = 0
    for found, truth in zip(estimates(draws, counts), (NOISE, SIGNAL), strict=True):
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - truth) < 4 * error, (found.mean(), truth, error)
        assert 4 * error < 0.2 * truth  # and the test would see a fifth


def test_parts_without_tokens_count_for_nothing():
    rng = np.random.default_rng(1)
    draws = rng.normal(MEAN, DEVIATION, (1, ROWS, SIZE)).astype(np.float32)
    counts = np.ones((ROWS, SIZE), np.int32)
    counts[np.arange(ROWS) % PARTS == 2] = 0
    [noise], [signal] = estimates(draws, counts)
    parts = [draws[0, p::PARTS].mean(0) for p in (0, 1, 3)]
    small, big = np.mean([x @ x for x in parts]), np.mean(parts, axis=0) @ np.mean(parts, axis=0)
    wanted = (small - big) / (1 / 4 - 1 / 12)
    assert noise == pytest.approx(wanted, rel=1e-4)
    assert signal == pytest.approx(big - wanted / 12, rel=1e-4)
    alone = np.where(np.arange(ROWS) % PARTS == 0, 1, 0)[:, None] * np.ones((1, SIZE), np.int32)
    assert [float(x[0]) for x in estimates(draws, alone.astype(np.int32))] == [0.0, 0.0]


def test_records_divide_means_over_steps():
    def finished(noise, signal):
        info = {"noise": np.float32(noise), "signal": np.float32(signal), "bad": False}
        return StepResult(0, {}, info)

    found = writers._noise_scale([finished(8.0, 1.0), finished(4.0, 2.0)])
    assert found == {"noise": 6.0, "signal": 1.5, "noise_scale": 4.0}
    assert writers._noise_scale([finished(8.0, -1.0)]) == {"noise": 8.0, "signal": -1.0}
    assert writers._noise_scale([StepResult(0, {}, {"bad": False})]) == {}


def test_a_run_without_micro_batches_is_refused(make_experiment):
    with pytest.raises(ValueError, match=r"config\.log\.noise_scale .*num_microbatches \(1\)"):
        make_experiment({"log.noise_scale": True})
    experiment = make_experiment({"log.noise_scale": True, "train.num_microbatches": 2})
    _, sums, info = jax.eval_shape(
        experiment._train_step, experiment.abstract_state, experiment.abstract_batch
    )
    assert {"noise", "signal"} <= info.keys() and not set(gradient_noise_scale.NAMES) & sums.keys()
