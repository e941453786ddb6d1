"""Weights in 8 and 4 bits: their numbers, memory, loss, sharding and generation."""

import jax
import numpy as np
import pytest
from stories import FOLDER, import_stories

from lm.compression.quantized_weights import (
    QuantizedMatrix,
    WeightFormat,
    dequantize_params,
    group_size,
    quantize_params,
    stored_bytes,
)
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.optim import param_tree
from lm.training.restore import restore_params
from lm.training.stored_run import load
from lm.types import Batch, Tokens

GREEDY = Sampling(temperature=0.0)
FORMATS = (WeightFormat("int8"), WeightFormat("int4", 32), WeightFormat("int4", 64))
FORMATS += (WeightFormat("int4", 128),)


def quantize(experiment, params, weights):
    return quantize_params(params, experiment.boxed_params, experiment.param_rules, weights)


def mean_loss(experiment, params, batch):
    sums = experiment.eval_step(params, experiment.make_global_batch(batch))
    return float(sums["loss"]) / float(sums["tokens"])


def test_int8_is_within_half_a_step_and_int4_has_the_better_scale(make_experiment):
    experiment = make_experiment({"model.embed_dim": 48})
    params = experiment.init_state().params
    outlier = params["layers"]["mlp"]["up"]["weight"].at[0, 0, 0].set(5.0)
    params["layers"]["mlp"]["up"]["weight"] = outlier
    before = param_tree.flatten(params)
    for weights in FORMATS:
        small = param_tree.flatten(quantize(experiment, params, weights))
        after = param_tree.flatten(dequantize_params(param_tree.unflatten(small)))
        for name, x in before.items():
            if not isinstance(small[name], QuantizedMatrix):
                assert x.ndim - name.startswith("layers.") == 1  # norms
                np.testing.assert_array_equal(after[name], x)
                continue
            error = np.abs(np.asarray(after[name]) - np.asarray(x))
            if not small[name].packed:
                summed = (
                    -1
                    if name == "embedding.weight"
                    else tuple(range(1, 1 + len(small[name].inputs)))
                )
                step = np.abs(np.asarray(x)).max(axis=summed, keepdims=True) / 127
                assert (error <= 0.5001 * step).all(), name
            else:
                rows = np.asarray(x).reshape(2, np.prod(small[name].inputs), -1)
                group = group_size(rows.shape[1], weights.group)
                padded = np.pad(rows, [(0, 0), (0, -rows.shape[1] % group), (0, 0)])
                groups = padded.reshape(2, -1, group, rows.shape[-1])
                step = np.abs(groups).max(axis=2, keepdims=True) / 7
                plain = np.clip(np.round(groups / np.where(step, step, 1)), -7, 7) * step - groups
                assert 0.6 < np.sum(error**2) / np.sum(plain**2) < 0.99, name


@pytest.mark.parametrize(
    "model",
    [
        "decoder",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("lstm", "encoder_decoder", "moe")),
    ],
)
def test_modules_read_what_was_dequantized(make_experiment, model):
    """Logits and losses are those of the float model with dequantized weights, in bfloat16, too,
    whether the layers are scanned or, as in generation on a CPU, unstacked.
    """
    changes = {"model.dtype": "bfloat16"}
    if model == "moe":
        changes |= {"model.moe.num_experts": 4, "model.moe.num_experts_per_token": 2}
    if model in ("decoder", "moe"):
        experiment = make_experiment(changes)
    else:
        experiment = _other(make_experiment, model)
    params = experiment.init_state().params
    batch = experiment.train_data.batch_at(0, experiment.rows)
    whole = mean_loss(experiment, params, batch)
    for weights in FORMATS[:2]:
        small = quantize(experiment, params, weights)
        found = mean_loss(experiment, small, batch)
        assert found == pytest.approx(
            mean_loss(experiment, dequantize_params(small), batch), rel=1e-6
        )
        assert found != whole
        prompts = ["ab", "c"]
        texts = [
            Generator(experiment.model, p, experiment.tokenizer).generate(
                prompts, max_new_tokens=6, sampling=GREEDY
            )
            for p in (small, dequantize_params(small))
        ]
        for one, other in zip(*texts, strict=True):
            np.testing.assert_array_equal(one.ids, other.ids)


def _other(make_experiment, model):
    from lm.config import conversion
    from lm.training.experiment import Experiment

    objective = "causal" if model == "lstm" else "span_corruption"
    config = conversion.default(model=model, objective=objective)
    config.model.update(vocab_size=392, num_layers=2, embed_dim=16)
    if model == "lstm":
        config.model.init_std = 0.5  # 0.05 makes logits that no loss tells from none
    else:
        config.model.update(max_length=32, num_heads=4, mlp_dim=32)
        config.data.encoder_length = 32
    length = 32 if model == "lstm" else 16
    changes = {"data.train": ("synthetic:markov",), "data.length": length, "data.batch_size": 16}
    config.update_from_flattened_dict({**changes, "train.num_steps": 10, "loader.kind": "thread"})
    return Experiment(config, jax.devices()[:1])


def test_eight_devices_hold_parts_of_the_integers_and_give_the_same_loss(make_experiment):
    one = make_experiment({"model.mlp_dim": 64})
    params = one.init_state().params
    batch = one.train_data.batch_at(0, one.rows)
    many = make_experiment({"model.mlp_dim": 64}, data=2, fsdp=2, tensor=2)
    shardings = jax.tree.map(lambda x: x.sharding, many.abstract_params)
    spread = jax.device_put(jax.device_get(params), shardings)
    for weights in FORMATS[:2]:
        small = quantize(many, spread, weights)
        up = small["layers"]["mlp"]["up"]["weight"].values
        assert up.addressable_shards[0].data.nbytes < up.nbytes
        expected = mean_loss(one, quantize(one, params, weights), batch)
        rows = many.train_data.batch_at(0, many.rows)
        assert mean_loss(many, small, rows) == pytest.approx(expected, rel=1e-5)


def test_weights_lie_in_memory_in_8_and_4_bits_and_layers_are_dequantized_one_by_one(
    make_experiment,
):
    changes = {"model.embed_dim": 128, "model.mlp_dim": 512, "model.num_layers": 8}
    experiment = make_experiment(changes)
    params = experiment.init_state().params
    small = quantize(experiment, params, FORMATS[1])
    layers = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim > 2)
    in_layers = stored_bytes({"layers": small["layers"]})
    assert in_layers < layers * (0.5 + 4 / 32) * 1.02  # half a byte, and the scale of 32
    batch = experiment.make_global_batch(experiment.train_data.batch_at(0, experiment.rows))

    def temporary(params):
        step = jax.jit(lambda p, b: experiment.eval_step(p, b))
        return step.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(small) - temporary(params) < layers * 4 / 2  # of eight layers, less than half


def test_what_no_format_is_for_is_refused(make_experiment):
    with pytest.raises(ValueError, match=r"weights \('int3'\) must be one of int8, int4"):
        WeightFormat("int3")
    with pytest.raises(ValueError, match=r"group \(48\) must be one of 32, 64, 128"):
        WeightFormat("int4", 48)


@pytest.fixture(scope="module")
def stories(tmp_path_factory, devices):
    """(experiment, params, a batch of 16 samples of the model itself, of 256 tokens)."""
    if not FOLDER.exists():
        pytest.skip("../shared/data/weights is not there")
    workdir = import_stories(tmp_path_factory.mktemp("stories"), devices)
    experiment = load(workdir, devices[:1], {"data.length": 256, "data.batch_size": 16})
    _, params = restore_params(experiment, workdir)
    generator = Generator(experiment.model, params, experiment.tokenizer, stop_ids=())
    sampling = Sampling(num_samples=16, seed=1)
    texts = generator.generate([""], max_new_tokens=256, sampling=sampling)
    targets = np.stack([text.ids for text in texts]).astype(np.int32)
    ids = np.concatenate([np.full((16, 1), 1, np.int32), targets[:, :-1]], axis=1)
    positions = np.broadcast_to(np.arange(256, dtype=np.int32), ids.shape)
    tokens = Tokens(ids, np.ones_like(ids), positions)
    records = np.arange(16, dtype=np.uint32)
    batch = Batch(tokens, targets, np.ones(ids.shape, np.float32), records=records)
    return experiment, params, batch


@pytest.mark.parametrize(
    ("weights", "limit"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[0].group > 32 else ())
        for case in zip(FORMATS, (0.001, 0.1, 0.2, 0.2), strict=True)
    ],
    ids=str,
)
def test_the_loss_that_they_cost_stories260k(stories, weights, limit, capsys):
    experiment, params, batch = stories
    whole = mean_loss(experiment, params, batch)
    small = quantize(experiment, params, weights)
    found = mean_loss(experiment, small, batch)
    with capsys.disabled():
        print(
            f"\n{weights}: {whole:.5f} -> {found:.5f}, {100 * (found / whole - 1):+.3f}%; "
            f"{stored_bytes(params):,} -> {stored_bytes(small):,} bytes"
        )
    assert abs(found / whole - 1) < limit
