"""SeqGAN: its oracle, draws, policy gradient, phases, sharding, resuming.

Differences of four steps on other meshes and micro-batches, of the largest entry of each array, are
at most 1e-5. A draw that rounds otherwise would be another sequence, and far beyond it; of the few
here none does.
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resuming import assert_same_bits

from lm import models
from lm.config import conversion
from lm.data import oracle, synthetic
from lm.data.rows import RowLayout
from lm.models import seqgan
from lm.tokenizers import tokenizer as tokenizers
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment
from lm.types import Batch, Tokens

TOLERANCE = 1e-5
LENGTH, ROWS = 6, 8
TINY = {
    "vocab_size": 264,
    "max_length": LENGTH,
    "num_layers": 1,
    "embed_dim": 16,
    "init_std": 0.5,
    "widths": (1, 3),
    "filters": (8, 8),
    "discriminator_dim": 8,
    "discriminator_dropout": 0.0,
}
PHASES = {"pretrain_steps": 1, "discriminator_steps": 1, "g_steps": 1, "d_steps": 1}


@pytest.fixture(scope="module")
def make(make_config, devices):
    """(changes, **axes) -> an Experiment on sequences of the oracle."""

    def one(changes=(), **axes):
        own = {"data.length": LENGTH, "data.batch_size": ROWS}
        own |= {"data.train": ("synthetic:oracle:512",)}
        config = make_config({**own, "data.validation": ("synthetic:oracle:12:1",)})
        named = {"model": "seqgan", "objective": "seqgan", "optimizer": "adversarial"}
        made = conversion.default(**named)
        for section in named:
            config[section] = made[section]
        config.model.update(TINY)
        config.objective.update({**PHASES, "num_rollouts": 2, "temperatures": (0.5,)})
        config.optimizer.update({"learning_rate": 0.03, "eps": 1e-2, "weight_decay": 0.0})
        config.optimizer.schedule.kind = "constant"
        config.mesh.update({"data": 1, **axes})
        config.update_from_flattened_dict(dict(changes))
        size = int(np.prod(list(axes.values()), dtype=int))
        return Experiment(config, devices[:size])

    return one


@pytest.fixture(scope="module")
def trained(make):
    """(changes, num_microbatches, **axes) -> (states before and after each of four steps, sums of
    each, figures of an evaluation).
    """

    @functools.cache
    def run(changes=(), num_microbatches=1, **axes):
        experiment = make((*changes, ("train.num_microbatches", num_microbatches)), **axes)
        state, found = experiment.init_state(), []
        states = [jax.device_get((state.params, state.opt_state))]
        for _, batch in experiment.batches(0, 4):
            state, sums, _ = experiment.train_step(state, batch)
            states.append(jax.device_get((state.params, state.opt_state)))
            found.append(jax.device_get(dict(sums)))
        return states, found, evaluate(experiment, state.params)["synthetic:oracle:12:1"]

    return run


SPLITS = [
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    {"num_microbatches": 4},
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    pytest.param({"num_microbatches": 2, "data": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("split", SPLITS)
def test_shards_and_micro_batches_train_as_one(trained, split):
    (states, *one), (others, *other) = trained(), trained(**split)
    one, other = [states[-1][0], *one], [others[-1][0], *other]
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * np.abs(x).max(), err_msg=name)


def test_a_step_trains_one_network_and_the_other_keeps_every_bit(trained):
    states, sums, _ = trained()
    parts = ["generator", "discriminator", "generator", "discriminator"]
    scored = ["", "discriminator", "policy", "discriminator"]
    for step, (part, name) in enumerate(zip(parts, scored, strict=True)):
        before, after = (jax.tree_util.tree_leaves_with_path(s) for s in states[step : step + 2])
        changed, kept = set(), set()
        for (path, x), (_, y) in zip(before, after, strict=True):
            key = jax.tree_util.keystr(path)
            owner = next((p for p in ("generator", "discriminator") if p in key), None)
            same = np.array_equal(x, y)
            if owner == part and ".mu" in key:
                assert not same, key
            if owner is not None and "ScaleBySchedule" not in key and ".count" not in key:
                (kept if same else changed).add(owner)
                assert owner == part or same, (step, key)
        assert changed == {part}
        counted = {n.partition("/")[2] for n, x in sums[step].items() if "/" in n and x != 0}
        assert counted == ({name} if name else set())
    assert sums[0]["loss"] == sums[0]["objective"]


def test_a_resumed_run_has_the_same_bits(make, tmp_path):
    assert_same_bits(lambda: make((("model.discriminator_dropout", 0.3),)), tmp_path)


# ---- the oracle ----


def rows_of(path, length=LENGTH, num_ids=264):
    return synthetic.make(path, RowLayout((length,), num_ids=num_ids), tokenizers.load("bytes"))


def test_sequences_of_the_oracle_depend_on_seed_and_row_alone():
    source = rows_of("synthetic:oracle:300:3")
    whole = source.read(np.arange(300))
    some = np.array([299, 7, 7, 130])
    for name in ("ids", "segments", "positions", "previous"):
        assert (getattr(source.read(some), name) == getattr(whole, name)[some]).all(), name
    oracle.sample.cache_clear()
    assert (rows_of("synthetic:oracle:310:3").read(np.arange(300)).ids == whole.ids).all()
    assert (rows_of("synthetic:oracle:300:4").read(some).ids != whole.ids[some]).any()
    assert (whole.segments == 1).all() and (whole.positions[5] == np.arange(LENGTH)).all()
    assert whole.ids.min() >= 0 and len(np.unique(whole.ids)) > 100 and whole.ids.max() < 264
    with pytest.raises(IndexError, match="synthetic:oracle"):
        source.read(np.array([300]))


def logp_of(ids, start, vocab_size):
    """log p, float64 [B, T], of sequences under the oracle, by its numpy step."""
    p, hidden = oracle.parameters(vocab_size), np.zeros((len(ids), oracle.WIDTH))
    memory, token, found = hidden, np.full(len(ids), start), []
    for target in ids.T:
        hidden, memory, logits = oracle.step(p, token, hidden, memory)
        logits = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found.append(logits[np.arange(len(ids)), target])
        token = target
    return np.stack(found, axis=1)


def test_the_oracle_draws_by_the_chances_that_it_scores():
    count, start = 6400, tokenizers.load("bytes").bos_id
    ids = rows_of(f"synthetic:oracle:{count}", length=3).read(np.arange(count)).ids
    firsts = np.exp([logp_of(np.full((1, 1), i), start, 264)[0, 0] for i in range(264)])
    np.testing.assert_allclose(firsts.sum(), 1, rtol=1e-9)
    off = np.bincount(ids[:, 0], minlength=264) - count * firsts
    assert (off**2 / np.maximum(count * firsts, 0.5)).sum() < 264 + 6 * (2 * 264) ** 0.5
    # the nll of the last token has the mean of the entropies of its distributions
    p, hidden, token = (
        oracle.parameters(264),
        np.zeros((count, oracle.WIDTH)),
        np.full(count, start),
    )
    memory, logits = hidden, hidden
    for i in range(3):
        hidden, memory, logits = oracle.step(p, token, hidden, memory)
        token = ids[:, i]
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    entropy = -(chances * np.log(np.maximum(chances, 1e-300))).sum(axis=1).mean()
    nll = -logp_of(ids, start, 264)[:, 2]
    assert abs(nll.mean() - entropy) < 4 * nll.std() / count**0.5


def test_scores_of_the_oracle_on_devices_are_those_of_numpy():
    ids = rows_of("synthetic:oracle:64").read(np.arange(64)).ids
    start = np.full(64, 257, np.int32)
    nll = jax.jit(lambda x: seqgan.oracle_nll(264, seqgan.shifted(x, start), x))(ids)
    np.testing.assert_allclose(nll, -logp_of(ids, 257, 264), rtol=0, atol=2e-4)


# ---- draws, rewards, figures ----

VOCAB, SHORT = 5, 2


@pytest.fixture(scope="module")
def small(rules_on):
    """(model, parameters) of 5 ids and 2 tokens, whose sequences can be listed."""
    sizes = {"vocab_size": VOCAB, "max_length": SHORT, "embed_dim": 4, "widths": (1, 2)}
    config = seqgan.Config(**{**TINY, **sizes})
    config.check(SHORT)
    model = seqgan.build(config, rules_on())
    shapes = jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), nn.meta.unbox(shapes)
    )


def batch_of(count, targets=None):
    shape = count, SHORT
    positions = np.broadcast_to(np.arange(SHORT, dtype=np.int32), shape)
    ids = np.full(shape, 3, np.int32)  # the first of them is the start
    targets = np.zeros(shape, np.int32) if targets is None else targets
    records = np.random.default_rng(1).integers(2**32, size=count, dtype=np.uint32)
    tokens = Tokens(ids, np.ones_like(ids), positions)
    return Batch(tokens, targets, np.ones(shape, np.float32), records=records)


EVERY = np.stack(np.divmod(np.arange(VOCAB**2), VOCAB), axis=1).astype(np.int32)


def log_chances(model, params):
    """log p, [25], of all sequences."""
    batch, start = batch_of(len(EVERY)), np.full(len(EVERY), 3, np.int32)
    inputs = dataclasses.replace(batch.inputs, ids=seqgan.shifted(EVERY, start))
    hidden = model.apply({"params": params}, inputs).hidden
    logits = model.apply({"params": params}, hidden, method="logits")
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, EVERY[..., None], axis=2)[..., 0].sum(axis=1)


def test_draws_have_the_chances_of_the_generator(small):
    model, params = small
    count = 20_000
    keys, start = seqgan.row_keys(batch_of(count)), np.full(count, 3, np.int32)
    draw = jax.jit(functools.partial(model.complete, params))
    drawn = np.asarray(draw(keys, start))
    expected = count * np.exp(log_chances(model, params))
    off = np.bincount(drawn @ [VOCAB, 1], minlength=VOCAB**2) - expected
    assert (off**2 / expected).sum() < 24 + 5 * 48**0.5
    # a row is drawn by its own key, in any batch
    assert (np.asarray(draw(keys[50:60], start[:10])) == drawn[50:60]).all()
    given, prefix = np.tile(EVERY, (800, 1)), np.arange(count) % 3
    kept = np.asarray(draw(keys, start, given, prefix))
    assert all((kept[prefix == n, :n] == given[prefix == n, :n]).all() for n in (1, 2))
    assert (kept[prefix == 0] == drawn[prefix == 0]).all()
    assert (kept[prefix == 1] != given[prefix == 1]).any()


def test_a_low_temperature_draws_the_likeliest(small):
    model, params = small
    keys, start = seqgan.row_keys(batch_of(64)), np.full(64, 3, np.int32)
    draw = functools.partial(model.complete, params, temperature=1e-3)
    drawn = np.asarray(jax.jit(draw)(keys, start))
    assert (drawn == drawn[0]).all()
    first = np.exp(log_chances(model, params)).reshape(VOCAB, VOCAB).sum(axis=1).argmax()
    assert drawn[0, 0] == first


@pytest.mark.parametrize("subtract_prefix", [True, False])
def test_the_policy_gradient_is_that_of_the_expected_reward(small, subtract_prefix):
    """The gradient of sum_y p(y) D(y) over all sequences y, in the mean over many draws."""
    model, params = small
    count, key = 40_000, jax.random.key(0)

    def expected(generator):
        everything = {**params, "generator": generator}
        reward = jax.nn.sigmoid(model.apply({"params": params}, EVERY, method="discriminate"))
        return -jnp.sum(jnp.exp(log_chances(model, everything)) * reward)

    def sampled(params):
        options = {"phase": 2, "num_rollouts": 2, "subtract_prefix": subtract_prefix}
        return model.losses(params, batch_of(count), key, **options)

    exact = jax.grad(expected)(params["generator"])
    found, sums = jax.jit(jax.grad(sampled, has_aux=True))(params)
    for path, x in jax.tree_util.tree_leaves_with_path(found["discriminator"]):
        assert (x == 0).all(), path
    flat = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (exact, found["generator"])
    ]
    off = np.linalg.norm(flat[1] / count - flat[0]) / np.linalg.norm(flat[0])
    assert off < 0.05
    mean = -expected(params["generator"])
    np.testing.assert_allclose(sums["reward/policy"] / sums["tokens/policy"], mean, rtol=0.02)


def test_the_discriminator_learns_rows_of_the_data_as_real(small):
    """Its loss is the cross-entropy of both labels; the generator has no gradient of it."""
    model, params = small
    batch = batch_of(len(EVERY), EVERY)
    options = {"phase": 1, "num_rollouts": 1, "subtract_prefix": True}

    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        return model.losses(params, batch, jax.random.key(0), **options)

    @jax.jit
    def chances(params):
        fake = model.complete(params, seqgan.row_keys(batch), np.full(len(EVERY), 3, np.int32))
        found = (model.apply({"params": params}, x, method="discriminate") for x in (EVERY, fake))
        return [jax.nn.sigmoid(x) for x in found]

    found, sums = jax.jit(gradient)(params)
    assert all((x == 0).all() for x in jax.tree.leaves(found["generator"]))
    real, fakes = map(np.asarray, chances(params))
    expected = -(np.log(real) + np.log(1 - fakes)).mean() / 2
    np.testing.assert_allclose(
        sums["loss/discriminator"] / sums["tokens/discriminator"], expected, rtol=1e-5
    )
    right = ((real > 0.5).mean() + (fakes <= 0.5).mean()) / 2
    np.testing.assert_allclose(sums["accuracy/discriminator"] / sums["tokens"], right, rtol=1e-5)


def test_figures_of_an_evaluation(make, trained):
    """Twelve rows in batches of 8: padding counts nowhere."""
    found = trained()[2]
    assert found["tokens"] == 12 * LENGTH
    ids = rows_of("synthetic:oracle:12:1").read(np.arange(12)).ids
    np.testing.assert_allclose(found["entropy"], -logp_of(ids, 257, 264).mean(), rtol=1e-5)
    assert found["loss"] != found["loss/0.5"] and found["oracle_nll"] != found["oracle_nll/0.5"]
    assert 0 <= found["discriminator_accuracy"] <= 1 and found["oracle_nll"] > found["entropy"]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.max_length": 8}, "config.model.max_length (8) must be config.data.length (6)"),
        ({"model.widths": (1, 7)}, "config.model.widths (1, 7) must be some of 1 to config.data"),
        ({"model.filters": (8,)}, "config.model.filters (8,) must be as many numbers as widths"),
        ({"objective.temperatures": (0.0,)}, "config.objective.temperatures[0] (0.0)"),
        ({"objective.g_steps": 0}, "config.objective.g_steps (0)"),
    ],
)
def test_bad_values_are_named(make, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(changes.items()).train_data.batch_at(0)


def test_rows_of_several_documents_are_refused(make):
    rows = rows_of("synthetic:oracle:8").read(np.arange(8))
    packed = dataclasses.replace(rows, segments=1 + (rows.positions > 2))
    with pytest.raises(ValueError, match=r"set config\.data\.train to synthetic:oracle"):
        make().objective(packed, np.random.default_rng)


def test_other_models_are_refused(make_config, devices):
    config = make_config({"data.train": ("synthetic:oracle",), "data.batch_size": 8})
    config.objective = conversion.default(objective="seqgan").objective
    with pytest.raises(ValueError, match=r"config\.model\.name=seqgan"):
        Experiment(config, devices[:1]).lower_train_step()
    config = make_config({"optimizer.name": "adversarial"})
    config.optimizer = conversion.default(optimizer="adversarial").optimizer
    with pytest.raises(ValueError, match=r"adversarial is for models .* generator and discrim"):
        _ = Experiment(config, devices[:1]).tx
