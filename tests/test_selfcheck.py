"""The start-up check passes what is right, and names what is wrong: leaks put back in by hand."""

import dataclasses
import importlib.util
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config.conversion import resolve
from lm.config.schema import LossConfig
from lm.exit_codes import Exit
from lm.kernels.dot_product import Mask
from lm.kernels.grouped_matmul import grouped_matmul
from lm.layers import attention, cross_entropy
from lm.layers.attention_scores import Heads
from lm.reliability import attention_check, experts_check, kernel_check, reference
from lm.reliability.kernel_check import check
from lm.reliability.reference import SelfCheckFailed

ROOT = Path(__file__).parents[1]
SOFT = {"model.attention_softcap": 50.0, "model.logit_softcap": 30.0}
LOCAL = {"model.layer_pattern": ("local", "global"), "model.window": 5}


@pytest.fixture
def run(make_config, rules_on, tmp_path):
    """(changes of the config) -> Report; nothing is cached from test to test."""

    def run(changes=None, **axes):
        config = resolve(make_config(changes))
        return check(config, rules_on(**axes), cache_dir=str(tmp_path / "cache"))

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        LOCAL,
        {**LOCAL, "model.dtype": "bfloat16", "model.num_kv_heads": 2},
        {**SOFT, "loss.z_loss": 1e-2, "loss.label_smoothing": 0.1},
        {"model.positions": "alibi", "model.num_kv_heads": 1},
        {"model.positions": "relative", "model.query_scale": 1.0},
        {"loss.chunk_size": 0},
        {"loss.chunk_size": 7, "model.dtype": "bfloat16"},
        {"model.window": 1_000_000, "model.layer_pattern": ("local",), "loss.chunk_size": 10**9},
    ],
)
def test_what_is_right_passes(run, changes):
    report = run(changes)
    assert not report.cached and 0 < report.worst < 0.7
    kinds = 2 if "global" in changes.get("model.layer_pattern", ()) else 1
    assert len(report.checked) == kinds + 1


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_every_config_passes_with_its_own_heads_and_dtype(file, rules_on, tmp_path):
    spec = importlib.util.spec_from_file_location(f"configs_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = resolve(module.get_config())
    report = check(config, rules_on(), cache_dir=str(tmp_path))
    for scores in getattr(config.model, "attention_scores", ()):
        assert str(scores.heads) in str(report)
    assert report.checked


def test_check_of_a_sharded_run_needs_one_device(run):
    assert run(None, data=2, tensor=2).worst == run(None).worst


# ---- leaks ----


def allowed(*, segments=True, causal=True, padding=True, wider=0, block=1):
    """`Mask.allowed` with something left out."""

    def broken(mask):
        distance = mask.query_positions[:, :, None] - mask.key_positions[:, None, :]
        seen = distance >= 0 if causal else jnp.ones_like(distance, bool)
        if mask.window is not None:
            seen &= jnp.abs(distance) < mask.window + wider
        own, other = mask.query_segments[:, ::block], mask.key_segments[:, ::block]
        own, other = (jnp.repeat(x, block, axis=1) for x in (own, other))
        same = own[:, :, None] == other[:, None, :]
        real = (mask.key_segments != 0)[:, None, :]
        if not segments:
            same = jnp.ones_like(same)
        return seen & (same & real if padding else same | ~real)

    return broken


LEAKS = {
    "segments ignored": (allowed(segments=False), {}, "reads other documents"),
    "segments by blocks of 8": (allowed(block=8), {}, "reads other documents"),
    "causality ignored": (allowed(causal=False), {}, "reads the future"),
    "padding seen": (allowed(padding=False), {}, "reads padding"),
    "window ignored": (allowed(wider=1000), LOCAL, "reads beyond its window of 5"),
    "window too wide": (allowed(wider=1), LOCAL, "reads beyond its window of 5"),
    "window too narrow": (allowed(wider=-1), LOCAL, "output of attention .* differs"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LEAKS)
def test_a_wrong_mask_is_refused_and_named(run, monkeypatch, name, dtype):
    broken, changes, message = LEAKS[name]
    monkeypatch.setattr(Mask, "allowed", broken)
    for _ in range(2):  # a failure is not cached
        with pytest.raises(SelfCheckFailed, match=message) as error:
            run({**changes, "model.dtype": dtype})
    assert error.value.code == Exit.SELF_CHECK == 47


def test_the_broken_masks_of_this_test_are_right_with_nothing_left_out(run, monkeypatch):
    monkeypatch.setattr(Mask, "allowed", allowed())
    run(LOCAL)


def test_a_leak_of_the_gradient_alone_is_refused(run, monkeypatch):
    @jax.custom_vjp
    def leak(y, v):
        return y

    def backward(v, d):
        return d, jnp.full_like(v, 1e-30)

    leak.defvjp(lambda y, v: (y, v), backward)

    def attend(q, k, v, mask, **options):
        return leak(attention.attend(q, k, v, mask, **options), v)

    monkeypatch.setattr(attention_check, "attend", attend)
    with pytest.raises(
        SelfCheckFailed, match=r"change 0 of .* gradients that must be zero are not"
    ):
        run()


WRONG = {
    "scale": lambda q, k, v, o: (q * 1.1, k, v, o),
    "softcap": lambda q, k, v, o: (q, k, v, {**o, "softcap": None}),
    "group": lambda q, k, v, o: (q, k[:, ::-1], v[:, ::-1], o),
    "bias": lambda q, k, v, o: (q, k, v, {**o, "bias": None}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRONG)
def test_attention_that_differs_is_refused(run, monkeypatch, name, dtype):
    def attend(q, k, v, mask, **options):
        q, k, v, options = WRONG[name](q, k, v, options)
        return attention.attend(q, k, v, mask, **options)

    monkeypatch.setattr(attention_check, "attend", attend)
    with pytest.raises(SelfCheckFailed, match=r"of attention .* differs from the reference by"):
        run({**SOFT, "model.positions": "alibi", "model.num_kv_heads": 2, "model.dtype": dtype})


# ---- loss ----


def last_chunk_dropped(chunk, num_chunks, xs, over=cross_entropy.over_chunks):
    last = xs.weights.shape[1] - xs.weights.shape[1] // num_chunks
    return over(chunk, num_chunks, xs._replace(weights=xs.weights.at[:, last:].set(0)))


def chunks_shifted(chunk, num_chunks, xs, over=cross_entropy.over_chunks):
    carry, out = over(chunk, num_chunks, xs)
    return carry, None if out is None else jnp.roll(out, out.shape[1] // num_chunks, axis=1)


def all_weights_one(logits, x, *more, statistics=cross_entropy._statistics):
    return statistics(logits, x._replace(weights=jnp.ones_like(x.weights)), *more)


def without_z_loss(logits, x, log_z, config, gradient=cross_entropy._logit_gradient):
    return gradient(logits, x, log_z, dataclasses.replace(config, z_loss=0.0))


LOSSES = {
    "last chunk dropped": ("over_chunks", last_chunk_dropped, "the objective of the loss"),
    "chunks shifted": ("over_chunks", chunks_shifted, "gradient"),
    "weights ignored": ("_statistics", all_weights_one, "reads tokens of weight 0"),
    "z-loss has no gradient": ("_logit_gradient", without_z_loss, "gradient of .* differs"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_loss_is_refused(run, monkeypatch, name):
    attribute, broken, message = LOSSES[name]
    monkeypatch.setattr(cross_entropy, attribute, broken)
    with pytest.raises(SelfCheckFailed, match=message):
        run({"loss.z_loss": 0.1, "loss.chunk_size": 64})


def test_a_model_without_attention_has_its_loss_checked(make_config, rules_on, tmp_path):
    config = resolve(make_config())
    model = types.SimpleNamespace(dtype="bfloat16")
    config = dataclasses.replace(config, model=model)
    [checked] = check(config, rules_on(), cache_dir=str(tmp_path)).checked
    assert checked == "loss in bfloat16, chunks of 128 tokens"


# ---- experts ----

EXPERTS = {"model.activation": "swiglu", "model.moe.num_experts": 4}
UNGROUPED = {
    "a group gets its neighbour's matrix": lambda x, w, sizes: (x, jnp.roll(w, 1, axis=0), sizes),
    "a group ends a row early": lambda x, w, sizes: (x, w, sizes.at[0].add(-1).at[1].add(1)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_products_are_checked_where_there_are_some(run, dtype):
    report = run({**EXPERTS, "model.dtype": dtype})
    assert f"grouped products of experts in {dtype}" in report.checked and report.worst < 0.7
    assert len(run({**EXPERTS, "model.moe.dispatch": "capacity"}).checked) == 2


@pytest.mark.parametrize("name", UNGROUPED)
def test_wrong_products_of_experts_are_refused(run, monkeypatch, name):
    def broken(platform, load, x, weights, sizes):
        return grouped_matmul(platform, load, *UNGROUPED[name](x, weights, sizes))

    monkeypatch.setattr(experts_check, "grouped_matmul", broken)
    with pytest.raises(SelfCheckFailed, match="of grouped products of experts differs"):
        run({**EXPERTS, "model.dtype": "bfloat16"})


# ---- the cache ----


def test_a_passed_check_is_not_done_again(run, monkeypatch):
    first = run()
    monkeypatch.setattr(Mask, "allowed", allowed(segments=False))
    again = run({"optimizer.learning_rate": 1.0, "train.num_steps": 7, "model.num_layers": 1})
    assert again == dataclasses.replace(first, cached=True)


@pytest.mark.parametrize(
    "changes",
    [{"model.num_kv_heads": 2}, {"loss.chunk_size": 64}, {"model.dtype": "bfloat16"}, LOCAL],
)
def test_a_change_of_what_is_checked_is_checked(run, changes):
    run()
    assert not run(changes).cached and run(changes).cached


FILES_OF_KERNELS = [
    "layers/attention.py",
    "kernels/flash.py",
    "layers/cross_entropy.py",
    "kernels/grouped_matmul_gpu.py",
    "reliability/attention_check.py",
    "reliability/experts_check.py",
    "reliability/kernel_check.py",
    "reliability/loss_check.py",
    "reliability/reference.py",
]


@pytest.mark.parametrize("name", FILES_OF_KERNELS)
def test_a_change_of_the_code_is_checked(run, monkeypatch, tmp_path, name):
    copy = tmp_path / "lm"
    shutil.copytree(ROOT / "lm", copy, ignore=shutil.ignore_patterns("__pycache__", "data"))
    monkeypatch.setattr(kernel_check, "__file__", str(copy / "reliability" / "kernel_check.py"))
    run()
    assert run().cached
    with (copy / name).open("a") as file:
        file.write("\n")
    assert not run().cached


def test_a_damaged_cache_is_checked_again(run, tmp_path):
    run()
    [kept] = (tmp_path / "cache").iterdir()
    kept.write_text(kept.read_text()[:-5])
    assert not run().cached and run().cached


def test_a_cache_that_cannot_be_written_is_no_error(make_config, rules_on, tmp_path):
    (tmp_path / "file").write_text("")
    config = resolve(make_config())
    report = check(config, rules_on(), cache_dir=str(tmp_path / "file" / "cache"))
    assert not report.cached


# ---- that the check is of what the run does ----


@pytest.mark.parametrize("changes", [{}, LOCAL, SOFT, {"positions": "relative", "query_scale": 2}])
def test_decoder_lists_what_its_layers_call_attention_with(
    tiny_decoder, packed_batch, monkeypatch, changes
):
    changes = {path.removeprefix("model."): value for path, value in changes.items()}
    model, called = tiny_decoder(num_kv_heads=2, **changes), []

    def attend(q, k, v, mask, *, rules, sequence_parallel, dropout, dropout_rng, bias, **options):
        heads, size = q.shape[1], q.shape[3]
        assert q.dtype == k.dtype == jnp.dtype(model.config.dtype)
        options |= {"window": mask.window, "bias": bias is not None, "causal": mask.causal}
        called.append(Heads(heads, k.shape[1], size, **options))
        return q

    inputs = packed_batch(2, 32, 264).inputs
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))
    monkeypatch.setattr(attention, "attend", attend)
    jax.eval_shape(lambda variables: model.apply(variables, inputs), variables)
    listed = {scores.heads for scores in model.config.attention_scores}
    assert set(called) == listed and len(listed) == len(model.config.kinds)


def test_reference_of_the_loss_has_the_gradient_of_its_objective(packed_batch):
    rng = np.random.default_rng(0)
    batch, config = packed_batch(2, 5, 7), LossConfig(z_loss=0.1, label_smoothing=0.2)
    hidden, table = rng.normal(size=(2, 5, 3)), rng.normal(size=(7, 3))

    def run(hidden, table):
        return reference.loss(hidden, table, batch, config, 2.0)

    sums = run(hidden, table)
    for name, x in (("hidden", hidden), ("table", table)):
        step = 1e-5 * rng.normal(size=x.shape)
        up, down = (run(**{"hidden": hidden, "table": table, name: x + s}) for s in (step, -step))
        along = np.sum(sums[f"gradient of {name}"] * 2 * step)
        np.testing.assert_allclose(up["objective"] - down["objective"], along, rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_reference_of_attention_has_the_gradient_of_its_output(pack, causal):
    rng, tokens = np.random.default_rng(0), pack([[3, 1, 4]], length=9, vocab_size=9)
    q, cotangent = rng.normal(size=(2, 4, 9, 3))
    k, v = rng.normal(size=(2, 2, 9, 3))
    bias = rng.normal(size=(4, 9, 9))

    heads = Heads(4, 2, 3, 0.7, window=3, softcap=2.0, bias=True, kernel="auto", causal=causal)

    def run(**x):
        inputs = attention_check.Inputs(**x, bias=bias, cotangent=cotangent)
        return reference.attention(heads, inputs, tokens)

    inputs = {"q": q, "k": k, "v": v}
    _, *gradients = run(**inputs)
    for (name, x), gradient in zip(inputs.items(), gradients, strict=True):
        step = 1e-5 * rng.normal(size=x.shape)
        up, down = (run(**{**inputs, name: x + s})[0] for s in (step, -step))
        along = np.sum(gradient * 2 * step)
        np.testing.assert_allclose(np.sum((up - down) * cotangent), along, rtol=1e-6)
