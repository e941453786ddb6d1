"""Every way to compute attention is the equation of `dot_product`: values and gradients.

On CPUs splash and flash are interpreted. Measured, relative to the
largest entry: 1.1e-6; the bound is 5e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from lm.kernels import attention_kernels, dot_product, ring
from lm.kernels.attention_kernels import attend
from lm.kernels.dot_product import Mask, self_mask
from lm.models import decoder
from lm.parallel import zigzag
from lm.types import Tokens

TOLERANCE = 5e-6
ROWS, HEADS, KV_HEADS, SIZE = 2, 4, 2, 8


def packed(length):
    """Tokens [2, T]: three documents and padding, and two documents with padding before."""
    sizes = [length // 4, length // 2 - 3, length // 8, length // 8 + 3]
    segments = np.stack([np.repeat([1, 2, 3, 0], sizes), np.repeat([0, 1, 2, 2], sizes)])
    segments = segments.astype(np.int32)
    starts = np.stack([np.diff(row, prepend=-1) != 0 for row in segments])
    place = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
    positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    return Tokens(positions, segments, positions)


def results(f, tokens, arrays):
    """The output where there are tokens, and the gradients of q, k and v."""
    real = (tokens.segments != 0)[:, None, :, None]

    @jax.jit
    def run(q, k, v, given):
        out, pull = jax.vjp(f, q, k, v)
        return jnp.where(real, out, 0), *pull(given * real)

    found = jax.device_get(run(*arrays))
    return dict(zip(("output", "q", "k", "v"), found, strict=True))


def assert_is_the_equation(
    rules,
    tokens,
    *,
    order=1,
    kernel,
    sequence_parallel="gather",
    bias=None,
    causal=True,
    window=None,
    **options,
):
    length = tokens.ids.shape[1]
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((ROWS, n, length, SIZE), np.float32)
        for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]
    options = {"scale": 0.5, **options}
    places = zigzag.positions(length, order)
    back = np.argsort(places)

    def expected(q, k, v):
        mask = self_mask(tokens, causal, window=window)
        return dot_product.attend(q, k, v, mask, bias=bias, **options)

    def ours(q, k, v):
        q, k, v = (x[:, :, places] for x in (q, k, v))
        mask = self_mask(jax.tree.map(lambda x: x[:, places], tokens), causal, order, window)
        given = None if bias is None else bias[:, :, places][..., places]
        how = {"kernel": kernel, "sequence_parallel": sequence_parallel}
        y = attend(q, k, v, mask, rules=rules, bias=given, **how, **options)
        return y[:, :, back]

    want, got = results(expected, tokens, arrays), results(ours, tokens, arrays)
    for name, x in want.items():
        assert np.abs(x).max() > 0.1, name
        np.testing.assert_allclose(
            got[name], x, rtol=0, atol=TOLERANCE * np.abs(x).max(), err_msg=name
        )
        if name in "kv":  # padding gets no gradient at all
            hidden = np.broadcast_to((tokens.segments == 0)[:, None, :, None], x.shape)
            assert not np.any(got[name][hidden]), name


ALL = {"window": 9, "softcap": 3.0}


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "window and softcap"])
@pytest.mark.parametrize("way", ["gather", "ring"])
def test_a_sharded_length_is_the_equation(rules_on, way, options, order):
    rules = rules_on(sequence=4, tensor=2)
    how = {"kernel": "xla", "sequence_parallel": way, "order": order}
    assert_is_the_equation(rules, packed(64), **how, **options)


def test_gathered_keys_take_a_bias(rules_on):
    bias = np.random.default_rng(1).standard_normal((1, HEADS, 64, 64), np.float32)
    rules = rules_on(sequence=4, tensor=2)
    assert_is_the_equation(rules, packed(64), kernel="xla", order=4, bias=bias)


@pytest.mark.parametrize("way", ["gather", "ring"])
def test_a_sharded_length_knows_a_bidirectional_prefix(rules_on, way):
    tokens = packed(64)
    tokens = tokens.replace(bidirectional=tokens.positions < 5)
    rules = rules_on(sequence=4, fsdp=2)
    assert_is_the_equation(rules, tokens, kernel="xla", sequence_parallel=way)


@pytest.mark.parametrize("way", ["gather", "ring"])
def test_more_shards_than_key_heads(rules_on, way):
    rules = rules_on(sequence=2, tensor=4, rules=(("kv_heads", None),))
    assert_is_the_equation(rules, packed(64), kernel="xla", sequence_parallel=way)


@pytest.mark.parametrize(
    ("options", "causal"),
    [
        ({}, False),
        ({"window": 70, "softcap": 3.0}, True),
        pytest.param({}, True, marks=pytest.mark.slow),
        pytest.param({"window": 70, "softcap": 3.0}, False, marks=pytest.mark.slow),
    ],
)
def test_splash_is_the_equation(rules_on, options, causal):
    assert_is_the_equation(rules_on(), packed(384), kernel="splash", causal=causal, **options)


@pytest.mark.parametrize("order", [1, 2])
def test_splash_is_the_equation_on_a_sharded_length(rules_on, order):
    rules = rules_on(sequence=2, fsdp=2, tensor=2)
    options = {"window": 70, "softcap": 3.0}
    assert_is_the_equation(rules, packed(512), kernel="splash", order=order, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 70, "softcap": 3.0},
        {"window": 9, "causal": False, "softcap": 3.0},
    ],
)
@pytest.mark.parametrize("length", [40, 328])
def test_flash_is_the_equation(rules_on, length, options):
    assert_is_the_equation(rules_on(), packed(length), kernel="flash", **options)


def test_flash_knows_a_bidirectional_prefix(rules_on):
    tokens = packed(200)
    tokens = tokens.replace(bidirectional=tokens.positions < 5)
    assert_is_the_equation(rules_on(), tokens, kernel="flash")


@pytest.mark.parametrize("order", [1, 2])
def test_flash_is_the_equation_on_a_sharded_length(rules_on, order):
    rules = rules_on(sequence=2, fsdp=2, tensor=2)
    options = {"window": 70, "softcap": 3.0}
    assert_is_the_equation(rules, packed(256), kernel="flash", order=order, **options)


@pytest.mark.parametrize("size", [8, 24])
def test_flash_reads_an_encoder_as_the_equation_does(rules_on, size):
    """Queries of another length, some of whose segments have no source: they read nothing."""
    rng = np.random.default_rng(2)
    queries = packed(128).segments
    sources = np.stack([np.repeat([1, 3, 0], [20, 30, 22]), np.repeat([1, 2, 4], [24, 24, 24])])
    mask = dot_product.cross_mask(queries, sources.astype(np.int32))
    some = np.asarray(mask.allowed()).any(-1)[:, None, :, None]
    q, k, v, given = (
        rng.standard_normal((ROWS, n, t, size), np.float32)
        for n, t in ((HEADS, 128), (KV_HEADS, 72), (KV_HEADS, 72), (HEADS, 128))
    )

    def by(kernel):
        def run(q, k, v):
            y = attend(q, k, v, mask, rules=rules_on(), kernel=kernel, scale=0.5)
            return y if kernel == "flash" else jnp.where(some, y, 0)

        y, pull = jax.vjp(jax.jit(run), q, k, v)
        return y, *pull(given)

    assert not some.all()
    for want, got in zip(by("xla"), by("flash"), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


def test_flash_reads_a_cache_that_is_longer_than_the_prompt(rules_on):
    """Prompts of two lengths, padded before; the rest of the cache is empty. A few queries are not
    worth a kernel.
    """
    rng, length, room = np.random.default_rng(5), 96, 160
    segments = np.ones((ROWS, length), np.int32)
    segments[1, :20] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    keys = [np.pad(x, ((0, 0), (0, room - length))) for x in (segments, positions)]
    mask = Mask(segments, positions, *keys)
    q, k, v = (
        rng.standard_normal((ROWS, n, t, SIZE), np.float32)
        for n, t in ((HEADS, length), (KV_HEADS, room), (KV_HEADS, room))
    )
    real = (segments != 0)[:, None, :, None]
    flash, xla = (
        attend(q, k, v, mask, rules=rules_on(), kernel=kernel, scale=0.5) * real
        for kernel in ("flash", "xla")
    )
    assert attention_kernels.choose("flash", rules_on(), mask, q) == "flash"
    assert attention_kernels.choose("flash", rules_on(), mask, q[:, :, :1]) == "xla"
    np.testing.assert_allclose(flash, xla, rtol=0, atol=TOLERANCE * np.abs(xla).max())


def test_flash_in_bfloat16_is_as_near_to_float64_as_the_equation(rules_on):
    """In the type that GPUs run: half a unit of the largest entry's last place, twice."""
    length, tokens = 256, packed(256)
    mask, rng = self_mask(tokens), np.random.default_rng(3)
    real = (tokens.segments != 0)[:, None, :, None]
    arrays = [
        jnp.asarray(rng.standard_normal((ROWS, n, length, 64)), jnp.bfloat16)
        for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]

    def by(kernel, arrays):
        def run(q, k, v):
            y = attend(q, k, v, mask, rules=rules_on(), kernel=kernel, scale=0.125)
            return jnp.where(real, y, 0)

        y, pull = jax.vjp(jax.jit(run), *arrays[:3])
        return [np.asarray(x, np.float64) for x in (y, *pull(arrays[3] * real))]

    with jax.enable_x64(True):
        exact = by("xla", [jnp.asarray(x, jnp.float64) for x in arrays])
    for name, want, plain, found in zip(
        "yqkv", exact, by("xla", arrays), by("flash", arrays), strict=True
    ):
        limit = np.linalg.norm(want) * 2.0**-8
        errors = [np.linalg.norm(x - want) for x in (found, plain)]
        assert errors[0] < limit and errors[0] < 1.5 * errors[1], (name, errors, limit)


def test_flash_reads_no_block_that_no_query_sees(rules_on):
    """NaN in an earlier document and in the future of all queries of a program changes nothing."""
    length, own = 512, slice(128, 384)
    segments = np.repeat([1, 2, 3], [128, 128, 256]).astype(np.int32)[None]
    positions = np.arange(length, dtype=np.int32)[None]
    mask = self_mask(Tokens(positions, segments, positions))
    x = np.random.default_rng(4).standard_normal((1, 2, length, 16), np.float32)
    spoiled = x.copy()
    spoiled[:, :, : own.start] = spoiled[:, :, own.stop :] = np.nan

    def run(k):
        y = attend(x, k, k, mask, rules=rules_on(), kernel="flash", scale=0.25)
        return y[:, :, own]

    np.testing.assert_array_equal(jax.jit(run)(spoiled), jax.jit(run)(x))


def used_calls(jaxpr, name):
    """Calls of a kernel in a jaxpr and inside it, without those whose results nothing reads."""
    count, read = 0, {v for e in jaxpr.eqns for v in e.invars if isinstance(v, core.Var)}
    read |= {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    for equation in jaxpr.eqns:
        if equation.params.get("name") == name:
            count += bool(read & {*equation.outvars})
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(leaf, "jaxpr", leaf)
            count += used_calls(inner, name) if hasattr(inner, "eqns") else 0
    return count


def test_where_attended_is_saved_flash_does_not_run_again_for_it(rules_on):
    rules, tokens = rules_on(), packed(64)

    def calls(policy):
        def run(q, k, v):
            return attend(q, k, v, self_mask(tokens), rules=rules, kernel="flash", scale=1)

        def loss(q, k, v):
            return jnp.sum(jax.checkpoint(run, policy=policy)(q, k, v) ** 2)

        x = jax.ShapeDtypeStruct((ROWS, HEADS, 64, SIZE), jnp.float32)
        return used_calls(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x).jaxpr, "flash_forward")

    policies = jax.checkpoint_policies
    assert calls(policies.save_only_these_names("attended")) == 1
    assert calls(policies.nothing_saveable) == 2


def test_ring_works_on_blocks(rules_on, monkeypatch):
    monkeypatch.setattr(ring, "BLOCK", 4)
    rules = rules_on(sequence=4)
    how = {"kernel": "xla", "sequence_parallel": "ring"}
    assert_is_the_equation(rules, packed(64), order=4, **how, **ALL)


def test_a_ring_of_a_prime_length_has_few_blocks(rules_on, monkeypatch):
    monkeypatch.setattr(ring, "BLOCK", 6)
    assert [ring._block(np.zeros((1, 1, n, 1))) for n in (3, 16, 17, 22)] == [3, 4, 6, 6]
    tokens = packed(88)
    tokens = tokens.replace(bidirectional=tokens.positions < 5)
    how = {"kernel": "xla", "sequence_parallel": "ring"}
    assert_is_the_equation(rules_on(sequence=4), tokens, **how, **ALL)


def test_where_attended_is_saved_the_ring_does_not_turn_again_for_it(rules_on):
    rules, tokens = rules_on(sequence=2), packed(32)

    def turns(policy):
        def run(q, k, v):
            how = {"kernel": "xla", "sequence_parallel": "ring"}
            return attend(q, k, v, self_mask(tokens), rules=rules, scale=1.0, **how)

        def loss(q, k, v):
            return jnp.sum(jax.checkpoint(run, policy=policy)(q, k, v) ** 2)

        x = jax.ShapeDtypeStruct((ROWS, HEADS, 32, SIZE), jnp.float32)
        return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x)).count("ppermute[")

    policies = jax.checkpoint_policies
    saved = turns(policies.save_only_these_names("attended"))
    again = turns(policies.nothing_saveable)
    assert saved == turns(policies.everything_saveable) < again


def largest(jaxpr):
    """The most numbers that any value of a jaxpr holds, inner ones included."""
    inner = [
        largest(getattr(leaf, "jaxpr", leaf))
        for equation in jaxpr.eqns
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        if hasattr(leaf, "eqns")
    ]
    return max([v.aval.size for e in jaxpr.eqns for v in e.outvars] + inner, default=0)


def test_layers_in_a_ring_keep_no_masks_of_all_pairs(rules_on, monkeypatch):
    """They share the mask, which jax would take out of the loop over them, block by block."""
    monkeypatch.setattr(ring, "BLOCK", 64)
    length, layers = 512, 2
    rules, tokens = rules_on(sequence=2), packed(length)
    mask = self_mask(jax.tree.map(jnp.asarray, tokens))

    def loss(x, scales):
        def layer(x, scale):
            how = {"kernel": "xla", "sequence_parallel": "ring", "scale": 1.0}
            return attend(x * scale, x, x, mask, rules=rules, **how), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, scales)[0])

    shape = (ROWS, HEADS, length, SIZE)
    x, scales = jax.ShapeDtypeStruct(shape, jnp.float32), jnp.ones(layers)
    found = largest(jax.make_jaxpr(jax.grad(loss))(x, scales).jaxpr)
    assert found <= layers * np.prod(shape) < ROWS * length * length // 2


@pytest.mark.parametrize("options", [{}, {"window": 9}], ids=["plain", "window"])
@pytest.mark.parametrize("prefix", [False, True])
def test_what_cudnn_is_asked_for_is_the_equation(rules_on, monkeypatch, options, prefix):
    """By jax's own XLA version of the function, for the kernel needs a GPU."""
    asked, plain = [], jax.nn.dot_product_attention

    def dot_product_attention(*args, implementation, **kwargs):
        asked.append(implementation)
        return plain(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    monkeypatch.setattr(attention_kernels, "choose", lambda *_, **__: "cudnn")
    tokens = packed(64)
    if prefix:
        tokens = tokens.replace(bidirectional=tokens.positions < 5)
    rules = rules_on(fsdp=2, tensor=2)
    assert_is_the_equation(rules, tokens, kernel="cudnn", **options)
    assert asked == ["cudnn"]


# ---- the choice ----


class On:
    """Rules, as the choice of a kernel sees them."""

    def __init__(self, platform, **sizes):
        self.platform, self._sizes = platform, sizes

    def size(self, axis):
        return self._sizes.get(axis, 1)


MASK = self_mask(packed(512))
PREFIX = self_mask(packed(512).replace(bidirectional=np.ones((2, 512), bool)))


Q = jax.ShapeDtypeStruct((2, 4, 512, 64), jnp.bfloat16)


def test_auto_is_splash_on_tpus_and_flash_on_gpus_in_16_bits(rules_on):
    assert attention_kernels.choose("auto", On("tpu"), MASK, Q) == "splash"
    assert attention_kernels.choose("auto", On("gpu"), MASK, Q) == "flash"
    assert attention_kernels.choose("auto", On("gpu"), PREFIX, Q) == "flash"
    float32 = jax.ShapeDtypeStruct(Q.shape, jnp.float32)
    assert attention_kernels.choose("auto", On("gpu"), MASK, float32) == "xla"
    assert attention_kernels.choose("auto", On("gpu"), MASK, Q, bias=True) == "xla"
    assert attention_kernels.choose("auto", rules_on(), MASK, Q) == "xla"


def test_a_named_kernel_is_that_kernel(rules_on):
    assert attention_kernels.choose("xla", On("tpu"), MASK, Q) == "xla"
    assert attention_kernels.choose("splash", rules_on(), MASK, Q) == "splash"
    assert attention_kernels.choose("cudnn", On("gpu"), MASK, Q) == "cudnn"
    assert attention_kernels.choose("cudnn", On("gpu"), PREFIX, Q) == "cudnn"


def test_a_cache_is_for_xla():
    mask = Mask(MASK.query_segments, MASK.query_positions, MASK.key_segments, MASK.key_positions)
    assert attention_kernels.choose("splash", On("tpu"), mask, Q) == "xla"


@pytest.mark.parametrize(
    "rules, mask, asked, reason",
    [
        (On("tpu"), PREFIX, {}, "bidirectional"),
        (On("tpu"), MASK, {"bias": True}, "bias"),
        (On("tpu"), MASK, {"dropout": True}, "drops no weights"),
        (On("tpu", length=8), MASK, {}, r"a shard \(64\) to be a multiple of 128"),
        (On("tpu", length=2), MASK, {"sequence_parallel": "ring"}, "ring"),
    ],
    ids=["prefix", "bias", "dropout", "length", "ring"],
)
def test_what_splash_cannot_do_is_xlas_or_an_error_where_splash_is_named(
    rules, mask, asked, reason
):
    assert attention_kernels.choose("auto", rules, mask, Q, **asked) == "xla"
    with pytest.raises(ValueError, match=f"attention_kernel=splash.*{reason}"):
        attention_kernels.choose("splash", rules, mask, Q, **asked)


@pytest.mark.parametrize(
    "rules, q, asked, reason",
    [
        (On("tpu"), Q, {}, "runs on GPUs"),
        (On("gpu"), Q, {"bias": True}, "bias"),
        (On("gpu"), Q, {"dropout": True}, "drops no weights"),
        (On("gpu"), Q, {"softcap": True}, "soft cap"),
        (On("gpu", length=2), Q, {}, r"mesh.sequence \(2\) must be 1"),
        (On("gpu"), jax.ShapeDtypeStruct(Q.shape, jnp.float32), {}, "bfloat16, not float32"),
        (On("gpu"), jax.ShapeDtypeStruct((2, 4, 512, 100), Q.dtype), {}, r"head_dim \(100\)"),
        (On("gpu"), jax.ShapeDtypeStruct((2, 4, 512, 256), Q.dtype), {}, r"head_dim \(256\)"),
    ],
    ids=["platform", "bias", "dropout", "softcap", "length", "dtype", "odd head", "large head"],
)
def test_what_cudnn_cannot_do_is_an_error(rules, q, asked, reason):
    with pytest.raises(ValueError, match=f"attention_kernel=cudnn.*{reason}"):
        attention_kernels.choose("cudnn", rules, MASK, q, **asked)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"attention_kernel": "cudnn"}, "attention_kernel=cudnn runs on GPUs"),
        ({"attention_kernel": "splash", "positions": "alibi"}, "splash adds no bias"),
        ({"attention_kernel": "splash", "sequence_parallel": "ring"}, "splash does not run in a"),
        ({"sequence_parallel": "ring", "positions": "relative"}, "ring adds no bias"),
        ({"sequence_parallel": "ring", "attention_dropout": 0.1}, "ring drops no weights"),
    ],
)
def test_a_model_is_not_built_where_its_attention_cannot_be(rules_on, changes, reason):
    config = decoder.Config(embed_dim=16, num_heads=4, **changes)
    with pytest.raises(ValueError, match=f"config.model.*{reason}"):
        decoder.build(config, rules_on(sequence=2))
