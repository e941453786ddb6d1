"""Attention by the equation: masks as small matrices written by hand, and a loop over
scalars.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.dot_product import attend, self_mask
from lm.types import Tokens


def tokens(segments, positions=None, bidirectional=None):
    segments = np.asarray([segments], np.int32)
    if positions is None:
        positions = [np.sum(segments[0, :i] == s) for i, s in enumerate(segments[0])]
    prefix = None if bidirectional is None else np.asarray([bidirectional], bool)
    return Tokens(np.zeros_like(segments), segments, np.asarray([positions], np.int32), prefix)


def picture(mask):
    allowed = np.asarray(mask.allowed())[0]
    return ["".join("x" if seen else "." for seen in row) for row in allowed]


def test_causal_mask():
    assert picture(self_mask(tokens([1, 1, 1, 1]))) == [
        "x...",
        "xx..",
        "xxx.",
        "xxxx",
    ]


def test_packed_segments_do_not_attend_across():
    assert picture(self_mask(tokens([1, 1, 2, 2, 2, 3]))) == [
        "x.....",
        "xx....",
        "..x...",
        "..xx..",
        "..xxx.",
        ".....x",
    ]


def test_padding_is_never_seen():
    assert picture(self_mask(tokens([0, 1, 1, 0, 0]))) == [
        ".....",
        ".x...",
        ".xx..",
        ".....",
        ".....",
    ]


def test_window_counts_the_token_itself():
    assert picture(self_mask(tokens([1, 1, 1, 1, 1]), window=2)) == [
        "x....",
        "xx...",
        ".xx..",
        "..xx.",
        "...xx",
    ]


def test_window_of_one_sees_only_itself():
    assert picture(self_mask(tokens([1, 1, 1]), window=1)) == ["x..", ".x.", "..x"]


def test_bidirectional_prefix_is_seen_by_its_whole_segment():
    mask = self_mask(tokens([1, 1, 1, 2, 2, 2], bidirectional=[1, 1, 0, 1, 1, 0]))
    assert picture(mask) == [
        "xx....",
        "xx....",
        "xxx...",
        "...xx.",
        "...xx.",
        "...xxx",
    ]


def test_without_causality_a_segment_sees_all_of_itself():
    assert picture(self_mask(tokens([1, 1, 2, 2, 0]), causal=False)) == [
        "xx...",
        "xx...",
        "..xx.",
        "..xx.",
        ".....",
    ]


def test_window_without_causality_reaches_both_ways():
    assert picture(self_mask(tokens([1, 1, 1, 1]), causal=False, window=2)) == [
        "xx..",
        "xxx.",
        ".xxx",
        "..xx",
    ]


def loop(q, k, v, allowed, scale, softcap=None, bias=None):
    """The same in float64, one query of one head at a time."""
    out = np.zeros(q.shape)
    for b, n, t in np.ndindex(q.shape[:3]):
        kv = n // (q.shape[1] // k.shape[1])
        seen = [s for s in range(k.shape[2]) if allowed[b, t, s]]
        scores = []
        for s in seen:
            score = float(np.dot(q[b, n, t].astype(np.float64), k[b, kv, s])) * scale
            score = score if softcap is None else softcap * np.tanh(score / softcap)
            scores.append(score + (0 if bias is None else bias[b, n, t, s]))
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        out[b, n, t] = sum(w * v[b, kv, s] for w, s in zip(weights, seen, strict=True))
    return out


def heads(num_heads, num_kv_heads, *, batch=2, length=7, size=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, length, size) for n in (num_heads, num_kv_heads, num_kv_heads)]
    return [rng.normal(size=shape).astype(np.float32) * 2 for shape in shapes]


MASKED = tokens([1, 1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_is_the_loop(num_kv_heads, softcap, window, with_bias):
    q, k, v = heads(4, num_kv_heads)
    bias = np.random.default_rng(1).normal(size=(2, 4, 7, 7)).astype(np.float32)
    bias = bias if with_bias else None
    mask = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), self_mask(MASKED, window=window))
    out = attend(q, k, v, mask, scale=0.7, softcap=softcap, bias=bias)
    allowed = np.asarray(mask.allowed())
    expected = loop(q, k, v, allowed, 0.7, softcap, bias)
    np.testing.assert_allclose(out, expected, atol=3e-6)


def test_bidirectional_attention_is_the_loop():
    q, k, v = heads(4, 2, batch=1)
    mask = self_mask(tokens([1, 1, 1, 1, 2, 2, 2], bidirectional=[1, 1, 0, 0, 1, 0, 0]))
    expected = loop(q, k, v, np.asarray(mask.allowed()), 0.5)
    np.testing.assert_allclose(attend(q, k, v, mask, scale=0.5), expected, atol=3e-6)


def test_masked_keys_and_values_change_nothing_at_all():
    q, k, v = heads(4, 2, batch=1)
    mask = self_mask(MASKED)
    other = [a.copy() for a in (k, v)]
    for a in other:
        a[:, :, 4:] = 1e3
    before = attend(q, k, v, mask, scale=1.0)[:, :, :4]
    after = attend(q, *other, mask, scale=1.0)[:, :, :4]
    np.testing.assert_array_equal(before, after)


def test_softmax_of_bfloat16_values_is_summed_in_float32():
    length = 1024  # a sum of ones in bfloat16 stops at 256
    q, k, v = (jnp.full((1, 1, length, 4), value, jnp.bfloat16) for value in (0.1, 0.2, 1.0))
    places = np.arange(length, dtype=np.int32)[None]
    out = attend(q, k, v, self_mask(Tokens(places, np.ones_like(places), places)), scale=1.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.0)


def test_large_scores_do_not_overflow():
    q, k, v = heads(2, 2, batch=1)
    mask = self_mask(MASKED)
    expected = loop(q, k, v, np.asarray(mask.allowed()), 100.0)
    np.testing.assert_allclose(attend(q, k, v, mask, scale=100.0), expected, atol=1e-3)


def test_padding_gives_finite_values_and_gradients():
    q, k, v = heads(4, 2, batch=1)
    mask = self_mask(tokens([0, 0, 1, 1, 0, 0, 0]))

    def scored(q, k, v):
        return jnp.sum(attend(q, k, v, mask, scale=1.0)[:, :, 2:4] ** 2)

    assert np.isfinite(attend(q, k, v, mask, scale=1.0)).all()
    for array, gradient in zip((q, k, v), jax.grad(scored, (0, 1, 2))(q, k, v), strict=True):
        assert np.isfinite(gradient).all()
        assert np.any(gradient[:, :, 2:4] != 0) and not np.any(gradient[:, :, 4:] != 0), array.shape


def test_dropout_zeroes_weights_and_keeps_their_mean():
    q, k, _ = heads(4, 4, length=64)
    mask = self_mask(Tokens(*(np.ones((2, 64), np.int32),) * 2, np.arange(64)[None].repeat(2, 0)))
    one_hot = np.broadcast_to(np.eye(64, dtype=np.float32), (2, 4, 64, 64))

    def weights(**dropout):  # values that are one-hot read the weights out; H = S here
        padded = [np.pad(a, ((0, 0), (0, 0), (0, 0), (0, 60))) for a in (q, k)]
        return np.asarray(attend(*padded, one_hot, mask, scale=0.3, **dropout))

    plain = weights()
    dropped = weights(dropout=0.25, dropout_rng=jax.random.key(0))
    again = weights(dropout=0.25, dropout_rng=jax.random.key(0))
    np.testing.assert_array_equal(dropped, again)
    seen = plain > 0
    kept = dropped[seen] > 0
    assert abs(kept.mean() - 0.75) < 0.02  # 16,640 weights: 6 standard deviations
    np.testing.assert_allclose(dropped[seen][kept], plain[seen][kept] / 0.75, rtol=1e-5)
    assert not np.any(dropped[~seen])
