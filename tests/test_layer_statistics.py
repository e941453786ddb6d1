"""Statistics of layers: their values by a second computation, on one device and on eight, and what
a run writes.

The second computation: gradients of the plain loss and `train_step` on the measured rows alone, and
numpy over the arrays that the model sows for other purposes (hidden states, queries, keys). The MLP
reads the layer's input (`parallel_block`), so that numpy has it.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from environment import some
from flax.traverse_util import flatten_dict

from lm.config import conversion
from lm.interpret import layer_plots
from lm.kernels.dot_product import Mask
from lm.layers import activation_statistics
from lm.parallel import sharding
from lm.telemetry import jsonl
from lm.training import layer_statistics, loop
from lm.training.experiment import Experiment
from lm.training.layer_statistics import LayerStatistics

BATCH, ROWS = 64, 16  # of the batch, and measured of them
MEASURED = np.arange(ROWS) * (BATCH // ROWS)
HALVES = MEASURED[::2], MEASURED[1::2]
DENSE = {
    "model.parallel_block": True,
    "model.layer_pattern": ("local", "global"),
    "model.window": 5,
    "model.num_kv_heads": 2,
    "model.attention_softcap": 9.0,
    "model.activation": "relu",
}
EXPERTS = {
    "model.parallel_block": True,
    "model.moe.num_experts": 4,
    "model.moe.num_experts_per_token": 2,
    "model.remat": "full",
}
AXES = ("data", "fsdp", "sequence", "tensor")
CASES = {
    "dense": (DENSE, "float32"),
    "experts in bfloat16": (EXPERTS, "bfloat16"),
    "dense in bfloat16": (DENSE, "bfloat16"),
    "experts": (EXPERTS, "float32"),
}


@pytest.fixture(scope="module")
def measured(make_experiment, packed_batch):
    """(case, **axes) -> (experiment, state, batch on the host, its figures)."""

    @functools.cache
    def make(case, **axes):
        changes, dtype = CASES[case]
        sizes = {"data.train": ("synthetic:markov", "synthetic:copy"), "data.batch_size": BATCH}
        logs = {"log.layers_every": 2}
        experiment = make_experiment({**sizes, **logs, "model.dtype": dtype, **changes}, **axes)
        state, batch = start(experiment), packed_batch(BATCH, 32, 264)
        return experiment, state, batch, figures(experiment, state, batch)

    return make


def start(experiment):
    """The state before step 7 with dead units: 3 of layer 0 that are 0, and 2 of layer 1 that are
    small.
    """
    state = experiment.init_state()
    params = jax.tree.map(np.array, state.params)
    if "mlp" in params["layers"]:
        params["layers"]["mlp"]["up"]["weight"][0, :, :3] = 0
        params["layers"]["mlp"]["up"]["weight"][1, :, 7:9] *= 1e-5
    placed = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), params, state.params)
    step = jax.device_put(np.int32(7), state.step.sharding)
    return dataclasses.replace(state, step=step, params=placed)


def sources_of_rows():
    return np.random.default_rng(2).integers(0, 2, BATCH, np.int32)


def figures(experiment, state, batch):
    """{statistic/group: float64 [] or [L]}."""
    rules = experiment.rules
    sources = sharding.make_global_batch(rules, sources_of_rows(), BATCH)
    found = experiment.measure_layers(state, experiment.make_global_batch(batch), sources)
    found = jax.device_get(found)
    return {name: np.asarray(found[name], np.float64) for name in found}


def assert_close(found, wanted, rtol):
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol, atol=1e-9, err_msg=name)


# ---- the second computation ----


def layer_norms(tree):
    """{group: norms} by numpy: [L] below `layers`."""
    squares = {}
    for path, x in flatten_dict(tree).items():
        group = ".".join(path[:-1] if path[-1] in ("weight", "bias", "scale") else path)
        x = np.asarray(x, np.float64)
        total = (x**2).reshape(len(x), -1).sum(1) if path[0] == "layers" else (x**2).sum()
        squares[group] = squares.get(group, 0) + total
    return {group: np.sqrt(square) for group, square in squares.items()}


def of_gradients(experiment, state, batch):
    """{statistic/group: value} of parameters, gradients and losses of the measured rows."""
    variables = {"params": state.params}

    def nll(variables, rows):
        hidden = experiment.model.apply(variables, rows.inputs).hidden
        logits = experiment.model.apply(variables, hidden, method="logits")
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)

    @jax.jit
    def gradients(rows):
        (_, losses), grads = jax.value_and_grad(
            lambda v: (jnp.sum((x := nll(v, rows)) * rows.weights), x), has_aux=True
        )(variables)
        return losses, grads["params"]

    halves = [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in HALVES]
    losses, grads = zip(*map(gradients, halves), strict=True)
    tokens = np.array([half.weights.sum() for half in halves], np.float64)
    mean = jax.tree.map(lambda a, b: (np.asarray(a, np.float64) + b) / tokens.sum(), *grads)
    found = {f"gradient_norm/{group}": x for group, x in layer_norms(mean).items()}
    found |= {f"weight_norm/{group}": x for group, x in layer_norms(state.params).items()}

    squares = [float(optax.tree.norm(g)) ** 2 / n**2 for g, n in zip(grads, tokens, strict=True)]
    whole = sum((x**2).sum() for x in jax.tree.leaves(mean))
    # E|g_half|^2 = signal + noise / n_half, E|g|^2 = signal + noise / n (arXiv:1812.06162, A.1)
    noise = (np.mean(squares) - whole) / (np.mean(1 / tokens) - 1 / tokens.sum())
    found |= {"noise": noise, "signal": whole - noise / tokens.sum()}

    losses, weights = np.concatenate(losses), np.concatenate([x.weights for x in halves])
    positions = np.concatenate([x.inputs.positions for x in halves])
    sources = np.concatenate([sources_of_rows()[rows] for rows in HALVES])[:, None]
    for first, last in ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15)):
        name = str(first) if first == last else f"{first}-{last}"
        own = weights * (positions >= first) * (positions <= last)
        found[f"loss_by_position/{name}"] = (losses * own).sum() / own.sum()
    for number, name in enumerate(["synthetic:markov", "synthetic:copy"]):
        own = weights * (sources == number)
        found[f"loss_by_source/{name}"] = (losses * own).sum() / own.sum()
    return found


def of_update(experiment, state, batch):
    """The norm of the update divided by that of the weights, by the train step on a batch whose
    other rows have no weight. The step takes the state's memory.
    """
    before = jax.device_get(state.params)
    others = np.setdiff1d(np.arange(BATCH), MEASURED)
    weights = np.array(batch.weights)
    weights[others] = 0
    batch = experiment.make_global_batch(dataclasses.replace(batch, weights=weights))
    after = jax.device_get(experiment.train_step(state, batch)[0].params)
    moved, weights = layer_norms(jax.tree.map(np.subtract, after, before)), layer_norms(before)
    return {f"update_to_weight/{group}": moved[group] / weights[group] for group in moved}


def entropies(queries, keys, query_tokens, key_tokens, *, config, causal, window=None):
    """(mean entropy, largest logit) of q: [B, N, T, H] over k: [B, K, S, H], by loops; tokens are
    (segments, positions) [B, T].
    """
    found, top = [], -np.inf
    of_query = config.num_heads // config.kv_heads
    for b, n, t in np.ndindex(queries.shape[:3]):
        segment, position = query_tokens[0][b, t], query_tokens[1][b, t]
        seen = (key_tokens[0][b] == segment) & (segment != 0)
        if causal:
            seen &= key_tokens[1][b] <= position
        if window:
            seen &= position - key_tokens[1][b] < window
        if not seen.any():
            continue
        scores = keys[b, n // of_query][seen] @ queries[b, n, t] * config.score_scale
        if config.attention_softcap:
            scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        found.append(-(weights * np.log(np.maximum(weights, 1e-30))).sum())
        top = max(top, scores.max())
    return np.mean(found), top


def of_activations(experiment, state, batch):
    """{statistic/group: [L]} by numpy, of what the model sows as intermediates."""
    c, rows = experiment.config.model, jax.tree.map(lambda x: x[MEASURED], batch)
    apply = jax.jit(
        lambda p: experiment.model.apply({"params": p}, rows.inputs, mutable=["intermediates"])
    )
    kept = apply(state.params)[1]["intermediates"]["layers"]
    hidden, queries, keys = (
        np.asarray(x[0].astype(jnp.float32), np.float64)
        for x in (kept["hidden"], kept["attention"]["queries"], kept["attention"]["keys"])
    )
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    tokens = rows.inputs.segments != 0
    found = {
        "activation_rms/layers": [np.sqrt((x[tokens] ** 2).mean()) for x in hidden],
        "activation_max/layers": [np.abs(x[tokens]).max() for x in hidden],
    }
    own = rows.inputs.segments, rows.inputs.positions
    windows = [c.window if kind == "local" else None for kind in c.layer_kinds]
    seen = [
        entropies(q, k, own, own, config=c, causal=True, window=window)
        for q, k, window in zip(queries, keys, windows, strict=True)
    ]
    found["attention_entropy/layers.attention"] = [entropy for entropy, _ in seen]
    found["attention_logit_max/layers.attention"] = [top for _, top in seen]

    inputs = [p["embedding"]["weight"][rows.inputs.ids], *hidden[:-1]]
    for layer, x in enumerate(inputs):
        own = jax.tree.map(lambda w, layer=layer: w[layer], p["layers"])
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
        x = x * own["attention_norm"]["scale"]
        x = np.asarray(jnp.asarray(x).astype(c.dtype).astype(jnp.float32), np.float64)
        if "mlp" in own:
            h = np.maximum(x @ own["mlp"]["up"]["weight"], 0)
            dead = np.abs(h).max((0, 1)) <= 0.01 * np.sqrt((h**2).mean())
            values = {"dead_units/layers.mlp": dead.mean()}
        else:
            logits = (x @ own["moe"]["router"])[tokens]
            shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            load = np.bincount(np.argsort(-logits, -1)[:, :2].ravel(), minlength=4)
            values = {
                "router_load_max/layers.moe": load.max() / load.mean(),
                "router_load_min/layers.moe": load.min() / load.mean(),
                "router_entropy/layers.moe": -(shares * np.log(shares)).sum(-1).mean(),
            }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("case", some(CASES, "dense"))
def test_figures_are_those_of_a_second_computation(measured, case):
    experiment, state, batch, found = measured(case)
    exact = case in ("dense", "experts")
    assert_close(found, of_gradients(experiment, state, batch), 2e-4 if exact else 0.05)
    assert_close(found, of_activations(experiment, state, batch), 1e-5 if exact else 0.01)
    if "dense" in case:
        assert found["dead_units/layers.mlp"].tolist() == [3 / 32, 2 / 32]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_train_step(measured, case):
    """Differences of float32 numbers near 1, the scales of norms, have three digits."""
    experiment, state, batch, found = measured(case)
    wanted = of_update(experiment, jax.tree.map(jnp.copy, state), batch)
    assert_close(found, wanted, 1e-3 if case in ("dense", "experts") else 0.05)


@pytest.mark.parametrize("axes", some([(2, 2, 1, 2), (2, 1, 2, 2)], (2, 2, 1, 2)), ids=str)
@pytest.mark.parametrize("case", some(CASES, "dense"))
def test_eight_devices_have_the_figures_of_one(measured, case, axes):
    one, eight = measured(case)[-1], measured(case, **dict(zip(AXES, axes, strict=True)))[-1]
    assert one.keys() == eight.keys()
    assert_close(eight, one, 2e-5 if case in ("dense", "experts") else 0.1)


@pytest.mark.slow
def test_an_encoder_and_its_decoder_are_measured(make_experiment):
    """Cross-attention reads all tokens of the source, and none of the padding."""
    changes = {
        "model.name": "encoder_decoder",
        "objective.name": "seq2seq",
        "data.train": ("synthetic:reverse",),
        "data.encoder_length": 32,
        "data.batch_size": BATCH,
        "model.num_encoder_layers": 2,
    }
    experiment = make_experiment(changes)
    state, batch = experiment.init_state(), experiment.train_data.batch_at(0)
    for tokens in (batch.inputs, batch.encoder):
        tokens.segments[:, -6:] = 0
    batch.weights[:, -6:] = 0
    found = figures(experiment, state, batch)
    modules = {name.partition("/")[2] for name in found if name.startswith("attention_entropy")}
    assert modules == {
        "encoder.layers.attention",
        "decoder.layers.attention",
        "decoder.layers.cross_attention",
    }
    c, rows = experiment.config.model, jax.tree.map(lambda x: x[MEASURED], batch)
    _, kept = experiment.model.apply(
        {"params": state.params}, rows.inputs, encoder=rows.encoder, mutable=["intermediates"]
    )
    sown = flatten_dict(kept["intermediates"], sep=".")
    encoder, decoder = ((x.segments, x.positions) for x in (rows.encoder, rows.inputs))
    for module, own, source, causal in (
        ("encoder.layers.attention", encoder, encoder, False),
        ("decoder.layers.attention", decoder, decoder, True),
        ("decoder.layers.cross_attention", decoder, encoder, False),
    ):
        queries, keys = (np.asarray(sown[f"{module}.{n}"][0]) for n in ("queries", "keys"))
        wanted = [
            entropies(q, k, own, source, config=c, causal=causal)
            for q, k in zip(queries, keys, strict=True)
        ]
        for number, statistic in enumerate(("attention_entropy", "attention_logit_max")):
            values = [layer[number] for layer in wanted]
            np.testing.assert_allclose(found[f"{statistic}/{module}"], values, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "objective", "changes"),
    [
        ("lstm", "causal", {}),
        ("conv", "causal", {}),
        ("vae", "vae", {"data.encoder_length": 32}),
        ("decoder", "causal", {"model.lora.rank": 2}),
        ("decoder", "causal", {"optimizer.pruning.sparsity": 0.5}),
        ("decoder", "causal", {"optimizer.memory": "host"}),
    ],
)
def test_every_kind_of_model_is_measured(make_config, devices, model, objective, changes):
    config = make_config({"log.layers_every": 2})
    if model != "decoder":
        config.model = conversion.default(model=model).model
        config.model.update({"vocab_size": 264, "embed_dim": 16, "num_layers": 2})
    config.objective = conversion.default(objective=objective).objective
    config.update_from_flattened_dict(changes)
    experiment = Experiment(config, devices[:1])
    [(_, batch)] = experiment.batches(0, 1)
    sources = layer_statistics.source_numbers(experiment, 0)
    found = experiment.measure_layers(experiment.init_state(), batch, sources)
    found = jax.device_get(found)
    statistics = {name.partition("/")[0] for name in found}
    assert {"gradient_norm", "weight_norm", "update_to_weight", "activation_rms"} <= statistics
    for name in found:  # a parameter that is 0 has no ratio
        assert np.isfinite(found[name]).all() or name.startswith("update_to_weight"), name


def test_of_a_long_row_queries_at_equal_distances_are_measured():
    """Every third of 300, from the third on."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, n, 300, 8)).astype(np.float32) for n in (4, 2))
    tokens = np.repeat([[1, 2, 0]], 100, axis=1), np.arange(300)[None] % 100
    mask = Mask(*tokens, *tokens)
    found = activation_statistics.attention(q, k, mask=mask, bias=None, scale=0.5, softcap=None)
    assert found["queries_sum"] == 4 * 66
    config = SimpleNamespace(num_heads=4, kv_heads=2, score_scale=0.5, attention_softcap=None)
    own = tuple(x[:, 2::3] for x in tokens)
    entropy, top = entropies(q[:, :, 2::3], k, own, tokens, config=config, causal=True)
    np.testing.assert_allclose(found["entropy_sum"] / found["queries_sum"], entropy, 1e-5)
    np.testing.assert_allclose(found["logit_max"], top, 1e-5)


@pytest.mark.parametrize(
    "sizes, rows",
    [((64, 1, 1), 16), ((64, 8, 1), 16), ((64, 8, 8), 8), ((64, 32, 1), 32), ((20, 4, 1), 4),
     ((3, 1, 1), 1), ((12, 2, 1), 2)],
)  # fmt: skip
def test_at_most_a_quarter_of_the_rows_is_measured_and_one_of_each_device(sizes, rows):
    """(rows of a batch, devices, micro-batches)."""
    assert layer_statistics.num_rows(*sizes) == rows


def test_every_position_is_in_one_class():
    for length in (1, 2, 3, 8, 9, 1024):
        buckets = layer_statistics.position_buckets(length)
        assert [x for a, b in buckets for x in range(a, b + 1)] == list(range(length))


def test_a_record_is_in_order_and_has_the_figures_of_layers_as_lists():
    found = {
        "loss_by_position/16-31": np.float32(1.5),
        "loss_by_position/4-7": np.float32(2.5),
        "loss_by_source/none": np.float32(np.nan),
        "update_to_weight/layers.mlp": np.float32([0.123456, np.nan]),
        "noise": np.float32(6),
        "signal": np.float32(2),
    }
    record = layer_statistics.as_record(50, found)
    assert list(record["loss_by_position"].items()) == [("4-7", 2.5), ("16-31", 1.5)]
    assert "loss_by_source" not in record and record["noise_scale"] == 3
    assert str(record["update_to_weight"]) == "{'layers.mlp': [0.12346, nan]}"


def test_a_notebook_has_a_map_of_each_group_of_layers(tmp_path):
    rows = [(8, [1.0, 2.0]), (4, [3.0, "NaN"])]
    lines = [
        jsonl.line({"step": step, "activation_rms": {"layers": x}, "gradient_norm": {"norm": 1.0}})
        for step, x in rows
    ]
    (tmp_path / "layers.jsonl").write_text("".join(lines))
    drawn = [axis for axis in layer_plots.layers_figure(str(tmp_path)).axes if axis.get_title()]
    assert [axis.get_title() for axis in drawn] == ["activation_rms\nlayers"]
    [mesh] = drawn[0].collections
    np.testing.assert_array_equal(mesh.get_array(), [[3, 1], [np.nan, 2]])
    [text] = layer_plots.layers_figure(str(tmp_path / "none")).axes[0].texts
    assert "log.layers_every" in text.get_text()


# ---- in a run ----


def test_the_train_step_has_nothing_of_them(make_experiment, monkeypatch):
    """Its program is that of layers which never sow, and that of a run without statistics."""
    measured = make_experiment({**DENSE, "log.layers_every": 2}).lower_train_step().as_text()
    monkeypatch.setattr(activation_statistics, "is_measured", lambda module: False)
    assert make_experiment(DENSE).lower_train_step().as_text() == measured


@pytest.mark.usefixtures("shared_steps")
def test_a_resumed_run_writes_the_same_lines_and_none_twice(
    make_config, devices, tmp_path, monkeypatch
):
    changes = {"train.num_steps": 9, "log.layers_every": 3, "checkpoint.at": (5,)}
    path = {name: tmp_path / name / "layers.jsonl" for name in ("whole", "killed")}
    assert loop.train(make_config(changes), str(tmp_path / "whole"), devices[:1]) == 0
    make, count = Experiment.make_global_batch, 0

    def fail_once(self, batch):
        nonlocal count
        count += 1
        if count == 9:
            raise RuntimeError("INTERNAL: the device is gone")
        return make(self, batch)

    monkeypatch.setattr(Experiment, "make_global_batch", fail_once)
    with pytest.raises(RuntimeError, match="gone"):
        loop.train(make_config(changes), str(tmp_path / "killed"), devices[:1])
    lines = path["whole"].read_text().splitlines()
    assert path["killed"].read_text().splitlines() == lines
    assert loop.train(make_config(changes), str(tmp_path / "killed"), devices[:1]) == 0
    assert path["killed"].read_text().splitlines() == lines
    records = jsonl.read(path["killed"])
    assert [record["step"] for record in records] == [0, 3, 6]
    assert all(np.isfinite(record["gradient_norm"]["layers.mlp.up"]).all() for record in records)
    assert len({str(record["activation_rms"]) for record in records}) == 3


def test_a_rollback_drops_later_records(measured, tmp_path):
    experiment, state, batch, _ = measured("dense")
    batch = experiment.make_global_batch(batch)
    layers = LayerStatistics(experiment, str(tmp_path), first_step=0, active=True)
    for step in range(6):
        layers.measure(state, batch, step)
        if step < 5:
            layers.record(step)
    layers.roll_back(2)  # with that of step 4 written, and that of none pending
    assert [record["step"] for record in jsonl.read(tmp_path / "layers.jsonl")] == [0]
    layers.measure(state, batch, 2)
    layers.roll_back(2)
    layers.record(2)  # of a step that is done again
    layers.close()
    assert [record["step"] for record in jsonl.read(tmp_path / "layers.jsonl")] == [0]


def test_several_stages_are_refused_before_anything_is_compiled(make_experiment):
    changes = {"log.layers_every": 5, "model.pipeline.num_microbatches": 2}
    experiment = make_experiment(changes, stage=2)
    with pytest.raises(ValueError, match=r"layers_every \(5\) must be 0 .*mesh.stage=2"):
        _ = experiment.objective
