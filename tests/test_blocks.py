"""`refattn.blocks`: heads, short blocks, distances that overflow, what nobody sees, bad input."""

import numpy as np
import pytest

from refattn.blocks import Blocks, mass_from_blocks


def draw(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape)


def test_summaries_are_read_by_the_heads_that_read_the_keys():
    q, k, lse, gone = draw(4, 5, 3), draw(2, 6, 3), draw(4, 5), draw(5, 3) < 0
    blocks = Blocks.of(k, 2)
    whole = mass_from_blocks(q, blocks, lse, dropped=gone)
    for h in range(4):
        one = mass_from_blocks(q[h], Blocks.of(k[h // 2], 2), lse[h], dropped=gone)
        assert (whole.low[h] == one.low).all() and (whole.high[h] == one.high).all()


def test_a_short_last_block_is_summarised_as_it_is():
    blocks = Blocks.of([[0.0, 0.0], [4.0, 2.0], [1.0, 5.0]], 2)
    assert blocks.count.tolist() == [2, 1]
    assert blocks.centre.tolist() == [[2.0, 1.0], [1.0, 5.0]]
    assert blocks.covariance.tolist() == [[[4.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]
    assert blocks.radius.tolist() == [np.sqrt(5.0), 0.0]
    assert blocks.low.tolist() == [[0.0, 0.0], [1.0, 5.0]] and blocks.high.tolist() == [[4.0, 2.0], [1.0, 5.0]]


def test_a_size_may_be_an_array_without_axes():
    assert Blocks.of(np.zeros((3, 1)), np.array(2)).count.tolist() == [2, 1]


def test_no_key_is_lost_where_distances_overflow():
    keys = np.array([[1e200], [-1e200], [3e200], [-5e200]])
    blocks = Blocks.of(keys[:0], 1).absorb(keys, 2)
    assert blocks.count.sum() == 4 and (blocks.low.min(), blocks.high.max()) == (-5e200, 3e200)


def test_keys_whose_distances_overflow_are_neither_lost_nor_counted_twice():
    k = np.ldexp([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], 600)
    blocks = Blocks.of(k[:0], 1).absorb(k, 2)
    inside = ((blocks.low <= k[:, None]) & (k[:, None] <= blocks.high)).all(axis=-1)
    assert blocks.count.sum() == 4 and inside.any(axis=1).all()
    q, lse, every = np.full((1, 2), 2.0**-600), np.zeros(1), np.ones((1, 2), bool)
    assert np.isnan(mass_from_blocks(q, blocks, lse, dropped=every, scale=1.0).high).all()


def test_nan_in_a_block_that_no_row_drops_reaches_nothing():
    q, k = draw(3, 2), draw(5, 2)
    k[4] = np.nan
    low, high = mass_from_blocks(q, Blocks.of(k, 2), np.zeros(3), dropped=np.tile([False, True, False], (3, 1)))
    assert np.isfinite(low).all() and np.isfinite(high).all()


@pytest.mark.parametrize(("T", "S"), [(0, 3), (3, 0), (3, 3), (0, 0)])
def test_rows_that_drop_no_block_lose_nothing(T, S):
    blocks = Blocks.of(np.zeros((S, 1)), 2)
    none = np.zeros((T, len(blocks.count)), bool)
    low, high = mass_from_blocks(np.zeros((T, 1)), blocks, np.zeros(T), dropped=none)
    assert (low == 0).all() and (high == 0).all() and high.shape == (T,)


X = np.zeros((2, 1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Blocks.of(X, 0), ValueError, "size is 0"),
        (lambda: mass(np.zeros((2, 2))), ValueError, "blocks has D = 1; expected 2"),
        (lambda: mass(X, lse=[0.0]), ValueError, "lse has T = 1"),
        (lambda: mass(X, dropped=[[True]]), ValueError, "dropped is bool of shape"),
        (lambda: mass(X, dropped=[[1], [1]]), ValueError, "dropped is int64"),
        (lambda: mass(X, form="cube"), ValueError, "form is 'cube'"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


def mass(q, **changes):
    given = {"lse": [0.0, 0.0], "dropped": [[True], [True]], **changes}
    return mass_from_blocks(q, Blocks.of(X, 2), given.pop("lse"), **given)
