"""Positions: properties, and the published formulas written out once more with scalars."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.positions import (
    RotaryConfig,
    alibi_slopes,
    relative_buckets,
    rotary_frequencies,
    rotary_tables,
    rotate,
    sinusoids,
)

LLAMA3 = RotaryConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192)
YARN = RotaryConfig(theta=10_000.0, scaling="yarn", factor=16.0, original_length=4096)
CONFIGS = {
    "plain": RotaryConfig(),
    "linear": RotaryConfig(scaling="linear", factor=4.0),
    "llama3": LLAMA3,
    "yarn": YARN,
}


def turned(x, positions, config=CONFIGS["plain"], local=False):
    tables = rotary_tables(
        jnp.asarray([positions]), *rotary_frequencies(config, x.shape[-1], local)
    )
    return np.asarray(rotate(x, *tables))


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_scores_depend_on_the_distance_alone(name):
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 32)).astype(np.float32)

    def score(query_position, key_position):
        a = turned(q, [query_position], CONFIGS[name])
        return float(np.sum(a * turned(k, [key_position], CONFIGS[name])))

    assert abs(score(7, 3) - score(7, 4)) > 1e-2
    for distance in (0, 1, 5, 40):
        scores = [score(shift + distance, shift) for shift in (0, 1, 13, 300)]
        np.testing.assert_allclose(scores, scores[0], atol=2e-4)  # angles of ~300 rad in float32


@pytest.mark.parametrize("name", ["plain", "linear", "llama3"])
def test_rotary_keeps_lengths_and_position_zero(name):
    x = np.random.default_rng(1).normal(size=(1, 4, 2, 16)).astype(np.float32)
    y = turned(x, [0, 1, 2, 100], CONFIGS[name])
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    assert np.abs(y[:, 1:] - x[:, 1:]).max() > 0.1


def test_rotary_turns_feature_i_together_with_feature_i_plus_half():
    x = np.zeros((1, 1, 1, 8), np.float32)
    x[..., 1] = 1.0
    angle = 3 * 10_000.0 ** (-2 / 8)
    expected = np.zeros(8)
    expected[1], expected[5] = math.cos(angle), math.sin(angle)
    np.testing.assert_allclose(turned(x, [3])[0, 0, 0], expected, atol=1e-6)


def test_rotary_keeps_the_type_and_turns_in_float32():
    x = np.random.default_rng(2).normal(size=(1, 3, 1, 8)).astype(np.float32)
    low = jnp.asarray(x, jnp.bfloat16)
    tables = rotary_tables(jnp.asarray([[5, 600, 7000]]), *rotary_frequencies(LLAMA3, 8, False))
    y = rotate(low, *tables)
    assert y.dtype == jnp.bfloat16
    exact = rotate(low.astype(jnp.float32), *tables).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(exact, np.float32))


def test_the_gradient_of_a_rotation_is_the_rotation_back():
    """And autodiff's of the same turn written with halves."""
    rng = np.random.default_rng(3)
    x, dy = (rng.normal(size=(1, 3, 2, 8)).astype(np.float32) for _ in range(2))
    tables = rotary_tables(jnp.asarray([[5, 600, 7000]]), *rotary_frequencies(LLAMA3, 8, False))

    def halves(x):
        first, second = jnp.split(x, 2, axis=-1)
        cos, sin = (t[:, :, None] for t in tables)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    y, pullback = jax.vjp(lambda x: rotate(x, *tables), x)
    expected, by_autodiff = jax.vjp(halves, x)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(pullback(dy)[0], by_autodiff(dy)[0], atol=1e-6)
    np.testing.assert_allclose(rotate(y, tables[0], -tables[1]), x, atol=1e-6)


def test_linear_scaling_divides_every_frequency():
    plain, _ = rotary_frequencies(RotaryConfig(), 64, False)
    scaled, magnitude = rotary_frequencies(CONFIGS["linear"], 64, False)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)
    assert magnitude == 1.0


def test_llama3_scaling_is_the_published_one():
    """The branches of `apply_scaling` in Meta's reference model."""
    expected = []
    for i in range(64):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    frequencies, magnitude = rotary_frequencies(LLAMA3, 128, False)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    assert magnitude == 1.0


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_yarn_scaling_is_the_published_one(head_dim):
    """`_yarn_find_correction_range` and `_yarn_linear_ramp_mask` of the authors' code."""

    def place(turns):
        return head_dim * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(10_000.0))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), head_dim - 1)
    expected = []
    for i in range(head_dim // 2):
        frequency = 10_000.0 ** (-2 * i / head_dim)
        mask = 1 - min(max((i - low) / (high - low), 0), 1)
        expected.append(frequency / 16 * (1 - mask) + frequency * mask)
    frequencies, magnitude = rotary_frequencies(YARN, head_dim, False)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    assert magnitude == pytest.approx(0.1 * math.log(16) + 1)


def test_yarn_keeps_fast_dimensions_and_interpolates_slow_ones():
    plain, _ = rotary_frequencies(RotaryConfig(), 128, False)
    scaled, _ = rotary_frequencies(YARN, 128, False)
    turns = 4096 * plain / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 0.8], plain[turns < 0.8] / 16, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0)


def test_local_layers_have_their_own_unscaled_base_only_where_one_is_given():
    shared = RotaryConfig(theta=1e6, scaling="linear", factor=8.0)
    own = RotaryConfig(theta=1e6, scaling="linear", factor=8.0, local_theta=1e4)
    for local in (False, True):
        frequencies, _ = rotary_frequencies(shared, 16, local)
        np.testing.assert_allclose(frequencies[1], 1e6 ** (-2 / 16) / 8, rtol=1e-6)
    np.testing.assert_allclose(
        rotary_frequencies(own, 16, False)[0], rotary_frequencies(shared, 16, False)[0]
    )
    np.testing.assert_allclose(
        rotary_frequencies(own, 16, True)[0], [1e4 ** (-2 * i / 16) for i in range(8)], rtol=1e-6
    )


def test_sinusoids_are_sines_then_cosines_of_geometric_rates():
    features = np.asarray(sinusoids(jnp.asarray([[0, 1, 50]]), 10))[0]
    for row, position in enumerate((0, 1, 50)):
        for i in range(5):
            angle = position * 10_000.0 ** (-i / 4)
            assert features[row, i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert features[row, 5 + i] == pytest.approx(math.cos(angle), abs=1e-5)


def test_alibi_slopes_of_eight_heads():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-6)


def test_alibi_slopes_of_twelve_heads_interleave_those_of_sixteen():
    expected = [2.0**-i for i in range(1, 9)] + [2.0**-e for e in (0.5, 1.5, 2.5, 3.5)]
    np.testing.assert_allclose(alibi_slopes(12), expected, rtol=1e-6)


def test_causal_relative_buckets_by_hand():
    """T5's 32 buckets up to 128: 16 exact ones, then 16 + floor(16 log(d / 16) / log 8)."""
    table = {0: 0, -1: 1, -2: 2, -15: 15, -16: 16, -18: 16, -19: 17, -20: 17, -21: 18, -30: 20}
    table |= {-64: 26, -100: 30, -127: 31, -128: 31, -5000: 31, 1: 0, 9: 0}
    distance = jnp.asarray(list(table))
    buckets = relative_buckets(distance, 32, 128, bidirectional=False)
    assert buckets.tolist() == list(table.values())


def test_bidirectional_relative_buckets_by_hand():
    """8 buckets up to 16: four for each direction, two of them exact."""
    table = {0: 0, -1: 1, -2: 2, -5: 2, -6: 3, -16: 3, -99: 3, 1: 5, 2: 6, 5: 6, 6: 7, 99: 7}
    buckets = relative_buckets(jnp.asarray(list(table)), 8, 16, bidirectional=True)
    assert buckets.tolist() == list(table.values())
