"""A bad step leaves every bit of parameters and optimizer as it was; a batch has a fingerprint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.optim import optimizer_state
from lm.training.train_step import fingerprint, update
from lm.types import Batch, Tokens, TrainState

LENGTH = 4


def loss_fn(params, batch, rng):
    """A linear model whose gradient is the batch's weights, so that one row can spoil it."""
    del rng
    loss = jnp.sum(batch.weights * params["w"])
    return loss, {"objective": loss, "loss": loss, "tokens": jnp.float32(batch.weights.size)}


def make_batch(rows, *, seed=0):
    weights = np.broadcast_to(np.float32(rows)[:, None], (len(rows), LENGTH)).copy()
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 100, weights.shape).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
    tokens = Tokens(ids, np.ones_like(ids), positions)
    records = rng.integers(0, 2**32, len(rows), np.uint32)
    return Batch(tokens, ids[:, ::-1].copy(), weights, records=records)


@pytest.fixture(scope="module")
def step():
    """((rows, ...), num_microbatches) -> [(state, info), ...] after each batch."""
    tx = optax.chain(optimizer_state.track_norms(), optax.clip_by_global_norm(1.0), optax.adam(0.1))

    def run(batches, num_microbatches=1):
        params = {"w": jnp.arange(1.0, LENGTH + 1)}
        state, found = TrainState(jnp.int32(0), params, tx.init(params)), []
        compiled = jax.jit(
            lambda state, batch: update(
                state,
                batch,
                loss_fn=loss_fn,
                tx=tx,
                rng=jax.random.key(0),
                num_microbatches=num_microbatches,
                spike_factor=30.0,
                spike_warmup=3,
            )
        )
        for rows in batches:
            state, _, info = compiled(state, make_batch(rows))
            found.append(jax.device_get((state, info)))
        return found

    return run


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


GOOD = [1.0, 1.1, 0.9, 1.0]


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 400.0])
def test_a_bad_step_moves_nothing_but_the_step(step, value, num_microbatches):
    """nan, inf, a norm that overflows, and a spike of 100 times; in one row of one micro-batch."""
    bad = [1.0, 1.1, value, 1.0]
    found = step([GOOD, GOOD, GOOD, bad, GOOD], num_microbatches)
    (before, _), (after, info), (later, _) = found[2:]
    assert info["bad"] and not any(f["bad"] for _, f in [*found[:3], found[4]])
    assert bits((before.params, before.opt_state)) == bits((after.params, after.opt_state))
    assert (before.step, after.step, later.step) == (3, 4, 5)
    assert bits(later.params) != bits(after.params)
    clean = step([GOOD, GOOD, GOOD, GOOD], num_microbatches)[-1][0]
    assert bits(later.params) == bits(clean.params)  # as if it had never been


@pytest.mark.parametrize(
    "inner, size",
    [
        (optax.adam(0.1, eps=0.0), 0.0),  # 0 / 0
        (optax.sgd(1e30), 1e9),  # an update beyond float32
        (optax.chain(optax.scale_by_sign(), optax.scale(-2e38)), -1.0),  # a sum beyond it
        (optax.sgd(float("nan")), 1.0),
    ],
    ids=["zero_by_zero", "update", "parameter", "learning_rate"],
)
def test_an_update_that_is_not_finite_moves_nothing_but_the_step(inner, size):
    """Though loss and gradient are: one of four parameters would not be."""
    tx = optax.chain(optimizer_state.track_norms(), inner)
    params = {"v": jnp.ones(2), "w": jnp.asarray([1.0, 2.0, 3.0, 3e38])}
    state = TrainState(jnp.int32(0), params, tx.init(params))
    batch = make_batch([1.0, 2.0])
    batch = batch.replace(weights=np.float32([[1e-9, 1e-9, 1e-9, size]] * 2))

    def loss_fn(params, batch, rng):
        del rng
        w = params["w"]
        loss = jnp.sum(batch.weights * (w - jax.lax.stop_gradient(w)))
        return loss, {"objective": loss, "loss": loss, "tokens": jnp.float32(2)}

    step = jax.jit(lambda s, b: update(s, b, loss_fn=loss_fn, tx=tx, rng=jax.random.key(0)))
    after, _, info = step(state, batch)
    assert info["bad"] and np.isfinite(info["grad_norm"])
    assert bits((state.params, state.opt_state)) == bits((after.params, after.opt_state))
    assert (int(after.step), int(optimizer_state.norm_state(after.opt_state).steps)) == (1, 0)


def test_spikes_are_judged_by_the_steps_that_were_applied(step):
    """A spike during the warm-up counts into the mean; one after it doesn't."""
    spike = [80.0] * 4
    found = step([spike, GOOD, GOOD, GOOD, spike, [3500.0] * 4])
    assert [bool(info["bad"]) for _, info in found] == [False] * 5 + [True]
    state = optimizer_state.norm_state(found[-1][0].opt_state)
    assert int(state.steps) == 5


def test_a_fingerprint_sees_order_values_and_counts():
    batch = make_batch([1.0, 0.0, 2.0])
    base = jax.device_get(fingerprint(batch))
    assert (base["filled"], base["scored"]) == (12, 8)
    reordered = jax.tree.map(lambda x: x[[1, 0, 2]], batch)
    assert np.array_equal(fingerprint(reordered)["records"], base["records"])  # the same records
    assert np.all(fingerprint(reordered)["content"] != base["content"])  # in other rows
    for field in ("targets", "weights"):
        changed = getattr(batch, field).copy()
        changed[1, 2] += 1
        other = fingerprint(batch.replace(**{field: changed}))
        assert np.all(np.asarray(other["content"]) != base["content"]), field
    swapped = batch.replace(
        targets=batch.inputs.ids, inputs=batch.inputs.replace(ids=batch.targets)
    )
    assert np.all(np.asarray(fingerprint(swapped)["content"]) != base["content"])
