"""The order of data: permutations, epochs and mixtures as index algebra."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.sampler import Sampler, permute

LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 64, 97, 100, 128, 1009, 4096, 10007, 65536, 99991]
seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("length", LENGTHS)
def test_permutation_is_a_bijection(length):
    for epoch in range(3):
        image = permute(np.arange(length), length, seed=1, epoch=epoch)
        np.testing.assert_array_equal(np.sort(image), np.arange(length))


@given(length=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection_for_any_length_seed_and_epoch(length, seed, epoch):
    image = permute(np.arange(length), length, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(np.sort(image), np.arange(length))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_permutation_of_an_index_does_not_depend_on_its_neighbours(data):
    lengths = data.draw(st.lists(st.integers(1, 2**62), min_size=1, max_size=8))
    index = np.array([data.draw(st.integers(0, length - 1)) for length in lengths])
    epochs = np.array([data.draw(st.integers(0, 2**50)) for _ in lengths])
    together = permute(index, np.array(lengths), seed=3, epoch=epochs)
    for i, length in enumerate(lengths):
        assert permute(index[i : i + 1], length, seed=3, epoch=epochs[i])[0] == together[i]
        assert 0 <= together[i] < length


@pytest.mark.parametrize("length", [10**18, 2**62, 2**62 - 1, 2**61 + 1])
def test_permutation_of_a_huge_range_stays_inside_and_never_repeats(length):
    index = np.concatenate([np.arange(20000), length - 1 - np.arange(20000)])
    image = permute(index, length, seed=5)
    assert len(np.unique(image)) == len(index)
    assert image.min() >= 0 and image.max() < length
    assert image.max() > 0.999 * length and image.min() < 0.001 * length


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("length", [7, 10, 64, 1000])
def test_every_position_and_every_pair_of_positions_is_equally_likely(length):
    trials = 20000
    for index in (0, length // 2, length - 2):
        pair = np.tile([index, index + 1], trials)
        image = permute(pair, length, seed=9, epoch=np.repeat(np.arange(trials), 2))
        image = image.reshape(trials, 2)
        bins = min(length, 20)
        first, second = (image * bins // length).T
        size = np.bincount(np.arange(length) * bins // length, minlength=bins)
        for column in (first, second):
            counts = np.bincount(column, minlength=bins) / size
            # 6 standard deviations of a chi-square with bins - 1 degrees of freedom
            degrees = bins - 1
            assert chi_square(counts * size.mean()) < degrees + 6 * math.sqrt(2 * degrees)
        difference = (image[:, 1] - image[:, 0]) % length
        assert difference.min() > 0
        counts = np.bincount(difference * bins // length, minlength=bins)
        size[0] -= 1  # a difference of zero cannot be
        kept = size > 0
        counts = counts[kept] / size[kept] * size[kept].mean()
        degrees = len(counts) - 1
        assert chi_square(counts) < degrees + 6 * math.sqrt(2 * degrees)


def test_one_permutation_looks_random():
    length = 100_000
    image = permute(np.arange(length), length, seed=0, epoch=0)
    deviation = 5 / math.sqrt(length)
    for lag in (1, 2, 3, 64, 256, 1024):
        assert abs(np.corrcoef(image[:-lag], image[lag:])[0, 1]) < deviation
    assert abs(np.corrcoef(image, np.arange(length))[0, 1]) < deviation
    ascents = (np.diff(image) > 0).sum()  # mean (n - 1) / 2, variance (n + 1) / 12
    assert abs(ascents - length / 2) < 5 * math.sqrt(length / 12)
    assert (image == np.arange(length)).sum() < 10
    other = permute(np.arange(length), length, seed=0, epoch=1)
    assert abs(np.corrcoef(image, other)[0, 1]) < deviation
    assert (image == other).sum() < 10


def test_order_stays_the_same_across_versions():
    """Written down once: a change here means that no run can be resumed in its order."""
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [2, 8, 3, 5, 6, 7, 1, 4, 9, 0]
    large = permute(np.array([0, 1]), 10**15, seed=7, epoch=3)
    assert large.tolist() == [791585644851848, 52690656217084]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_every_epoch_of_every_source_has_each_row_once(lengths, seed):
    sampler = Sampler(lengths, [1] * len(lengths), seed=seed)
    total = 4 * max(lengths) * len(lengths)
    source, epoch, row = sampler.locate(np.arange(total))
    for number, length in enumerate(lengths):
        mine = source == number
        for e in range(int(epoch[mine].max())):  # the last one may be unfinished
            assert sorted(row[mine & (epoch == e)]) == list(range(length))


def test_epochs_and_sources_have_orders_of_their_own():
    source, epoch, row = Sampler([500, 500], [1, 1], seed=0).locate(np.arange(2000))
    orders = [row[(source == s) & (epoch == e)] for s in range(2) for e in range(2)]
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).mean() < 0.02


def test_without_shuffle_rows_come_as_stored():
    source, epoch, row = Sampler([7, 5], [2, 1], seed=0, shuffle=False).locate(np.arange(60))
    for number, length in ((0, 7), (1, 5)):
        rank = np.arange((source == number).sum())
        np.testing.assert_array_equal(row[source == number], rank % length)
        np.testing.assert_array_equal(epoch[source == number], rank // length)


mixtures = st.lists(
    st.one_of(st.integers(1, 1000), st.decimals("0.001", "50", places=3).map(float)),
    min_size=1,
    max_size=9,
)


def shares_of(weights):
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def bound(weights):
    return Fraction(math.ceil(math.log2(len(weights))) + 1, 2)


@given(weights=mixtures)
@settings(max_examples=60, deadline=None)
def test_mixture_counts_follow_the_weights_after_any_number_of_examples(weights):
    sampler = Sampler([10**9] * len(weights), weights, seed=0, shuffle=False)
    source, _, row = sampler.locate(np.arange(3000))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), 0)
    for number, share in enumerate(shares_of(weights)):
        exact = np.arange(1, 3001) * float(share)
        assert np.abs(counts[:, number] - exact).max() <= float(bound(weights)) + 1e-6
        np.testing.assert_array_equal(row[source == number], np.arange(counts[-1, number]))
    np.testing.assert_array_equal(sampler.rows_before(3000), counts[-1])


@given(weights=mixtures, index=st.integers(0, 10**18))
@settings(max_examples=100, deadline=None)
def test_mixture_counts_are_exact_at_any_scale(weights, index):
    sampler = Sampler([2**62] * len(weights), weights, seed=0, shuffle=False)
    before = sampler.rows_before(index)
    assert before.sum() == index
    for count, share in zip(before.tolist(), shares_of(weights), strict=True):
        assert abs(count - index * share) <= bound(weights)
    source, epoch, row = sampler.locate(np.array([index]))
    assert epoch[0] == 0 and row[0] == before[source[0]]
    step = sampler.rows_before(index + 1) - before
    assert step[source[0]] == 1 and step.sum() == 1


def test_weights_finer_than_any_common_denominator_are_nearly_exact():
    weights = [1 / 3, 0.123456789, 1e-9]
    index = 10**15
    counts = Sampler([10**17] * 3, weights, seed=0).rows_before(index)
    for count, share in zip(counts.tolist(), shares_of(weights), strict=True):
        assert abs(count / index - share) <= 2**-30


@pytest.mark.parametrize(
    ("lengths", "weights"),
    [([10], None), ([10, 3, 200], None), ([10, 3, 200], [5, 1, 1]), ([8, 8], [0.999, 0.001])],
)
@pytest.mark.parametrize("num_epochs", [1, 2, 3])
def test_number_of_examples_is_the_first_index_that_needs_a_later_epoch(
    lengths, weights, num_epochs
):
    sampler = Sampler(lengths, weights, seed=4)
    count = sampler.num_examples(num_epochs)
    epoch = sampler.locate(np.arange(2000)).epoch
    assert count == np.flatnonzero(epoch >= num_epochs)[0]
    if weights is None:
        assert count == num_epochs * sum(lengths)


def test_part_of_an_epoch_is_that_part_of_the_rows():
    assert Sampler([1000], seed=0).num_examples(0.3) == 300
    assert Sampler([1000, 500], seed=0).num_examples(1.5) == 2250


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([], None, "at least one row"),
        ([3, 0], None, "at least one row"),
        ([3, 3], [1], "1 weights for 2 sources"),
        ([3, 3], [1, 0], "must be positive"),
        ([3, 3], [1, -2.0], "must be positive"),
        ([3, 3], [1, math.inf], "must be positive"),
    ],
)
def test_impossible_mixtures_are_refused(lengths, weights, message):
    with pytest.raises(ValueError, match=message):
        Sampler(lengths, weights, seed=0)
