"""The balanced order of a sharded length: a permutation that moves once, and its balance."""

import jax
import numpy as np
import pytest

from lm.parallel import zigzag


def test_shards_hold_one_early_and_one_late_chunk():
    expected = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert zigzag.positions(16, 4).tolist() == expected
    assert zigzag.positions(5, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_every_shard_has_the_same_share_of_a_causal_mask(shards):
    work = (zigzag.positions(12 * shards, shards) + 1).reshape(shards, -1).sum(axis=1)
    assert len(set(work.tolist())) == 1
    natural = np.arange(1, 12 * shards + 1).reshape(shards, -1).sum(axis=1)
    assert len(set(natural.tolist())) == shards


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_shuffle_moves_tokens_to_their_places_and_unshuffle_back(rules_on, shards):
    rules = rules_on(sequence=shards)
    x = np.arange(2 * 4 * shards * 3).reshape(2, 4 * shards, 3)
    mixed = jax.jit(lambda x: zigzag.shuffle(x, rules))(x)
    np.testing.assert_array_equal(mixed, x[:, zigzag.positions(4 * shards, shards)])
    assert mixed.sharding.is_equivalent_to(rules.sharding("batch", "length", None), 3)
    np.testing.assert_array_equal(jax.jit(lambda x: zigzag.unshuffle(x, rules))(mixed), x)
    np.testing.assert_array_equal(zigzag.restore(np.asarray(mixed), shards, 1), x)


def test_shuffle_moves_chunks_and_gathers_nothing(rules_on):
    rules = rules_on(sequence=4)
    x = jax.ShapeDtypeStruct(
        (2, 32, 3), np.float32, sharding=rules.sharding("batch", "length", None)
    )
    text = jax.jit(lambda x: zigzag.shuffle(x, rules)).lower(x).compile().as_text()
    assert text.count(" collective-permute(") == 2 and "all-gather" not in text


def test_a_length_that_cannot_be_cut_is_left_alone():
    assert zigzag.fits(16, 4) and not zigzag.fits(12, 4) and not zigzag.fits(16, 1)
