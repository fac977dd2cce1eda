"""`refattn.dropped`: leading axes and grouped heads, what nobody sees, bad input, memory."""

import tracemalloc

import numpy as np
import pytest

from refattn import dropped, masks, softmax


def draw(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape)


def test_every_head_of_every_batch_reads_its_own_keys_values_and_masks():
    q, k, v = draw(2, 4, 5, 3), draw(2, 2, 6, 3), draw(1, 2, 6, 2)
    kept, mask = draw(4, 5, 6) < 0, masks.lengths([[6], [4]])
    bound, mass = (f(q, k, *x, kept=kept, mask=mask) for f, x in ((dropped.bound, (v,)), (dropped.mass, ())))
    assert bound.shape == (2, 4, 5, 2) and mass.shape == (2, 4, 5)
    for b, h in np.ndindex(2, 4):
        one = (q[b, h], k[b, h // 2]), {"kept": kept[h], "mask": masks.lengths([6, 4][b])}
        assert (bound[b, h] == dropped.bound(*one[0], v[0, h // 2], **one[1])).all()
        assert (mass[b, h] == dropped.mass(*one[0], **one[1])).all()


def test_extremes_are_those_of_the_dropped_keys_for_every_length_of_run():
    S = 130
    v, kept = draw(S, 3), draw(2 * S, S) < np.linspace(-2, 2, 2 * S)[:, None]
    q, k = np.zeros((2 * S, 1)), np.zeros((S, 1))
    o, mass = softmax.attend(q, k, v, mask=kept), dropped.mass(q, k, kept=kept)
    bound = dropped.bound(q, k, v, kept=kept)
    for i in range(2 * S):
        out = v[~kept[i]]
        reach = np.maximum(out.max(0) - o[i], o[i] - out.min(0)) if len(out) else np.zeros(3)
        assert (bound[i] == mass[i] * reach).all()


def test_nan_that_nobody_sees_reaches_nothing():
    q, k, v = draw(3, 2), draw(5, 2), draw(5, 2)
    clean = dropped.bound(q, k, v, kept=masks.window(0, 0), mask=masks.lengths(4))
    k[4], v[4] = np.nan, np.inf
    assert (dropped.bound(q, k, v, kept=masks.window(0, 0), mask=masks.lengths(4)) == clean).all()


def test_nan_that_a_row_drops_reaches_that_row_only():
    q, k, v = draw(3, 2), draw(3, 2), draw(3, 1)
    v[0] = np.nan
    bound = dropped.bound(q, k, v, kept=masks.window(0, 0), mask=masks.causal().at(0) & masks.window(1, 0))
    assert np.isnan(bound[:2]).any() and np.isfinite(bound[2]).all()


def test_no_answer_is_farther_from_the_values_that_its_row_sees_than_the_reach():
    q, k, v, seen = draw(4, 9, 3), draw(2, 70, 3), draw(2, 70, 2), draw(4, 9, 70) < -0.5
    seen[1, 3], o = False, draw(4, 9, 2)
    far, free = dropped.reach(q, k, v, o, mask=seen), dropped.reach(q, k, v, o)
    for h, i in np.ndindex(4, 9):
        values, mine = v[h // 2], o[h, i]
        assert (free[h, i] == np.abs(values - mine).max(axis=0)).all()
        assert (far[h, i] == np.abs(values[seen[h, i]] - mine).max(axis=0, initial=0.0)).all()


@pytest.mark.parametrize(("T", "S", "E"), [(0, 3, 2), (3, 0, 2), (3, 3, 0), (0, 0, 1)])
def test_nothing_to_attend_costs_nothing(T, S, E):
    q, k, v = np.zeros((T, 1)), np.zeros((S, 1)), np.zeros((S, E))
    assert dropped.bound(q, k, v, kept=masks.causal()).tolist() == np.zeros((T, E)).tolist()


def test_rows_that_keep_nothing_lose_everything_and_rows_that_see_nothing_lose_nothing():
    q, k, v = np.zeros((3, 1)), np.zeros((2, 1)), np.array([[1.0], [-3.0]])
    kept = np.array([[False, False], [False, False], [True, True]])
    mask = np.array([[True, True], [False, False], [True, True]])
    assert dropped.mass(q, k, kept=kept, mask=mask).tolist() == [1.0, 0.0, 0.0]
    assert dropped.bound(q, k, v, kept=kept, mask=mask).tolist() == [[3.0], [0.0], [0.0]]


def test_keeping_none_of_the_largest_drops_everything():
    assert dropped.mass_from_topk([], 5) == 1.0
    assert dropped.mass_from_topk(np.zeros((2, 0)), [1, 0]).tolist() == [1.0, 0.0]
    assert dropped.mass_from_topk([-np.inf], 5) == 0.0


def test_the_bound_of_long_sequences_never_holds_every_pair():
    n = 2048
    x = draw(n, 8)
    tracemalloc.start()
    dropped.bound(x, x, x, kept=masks.window(16, 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * n * 8


X = np.zeros((2, 1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dropped.bound(X, X, X, kept=None), TypeError, "kept is None"),
        (lambda: dropped.bound(X, X, X, kept=[[1, 0]]), TypeError, "bool"),
        (lambda: dropped.bound(X, X, X[:1], kept=masks.causal()), ValueError, "v has S = 1"),
        (lambda: dropped.bound(X, X, ["a"], kept=masks.causal()), TypeError, "v has dtype"),
        (lambda: dropped.mass(X, X, kept=masks.causal().on(3, 2)), ValueError, "T = 3"),
        (lambda: dropped.mass(X, X, kept=masks.causal(), scale=np.nan), ValueError, "scale"),
        (lambda: dropped.reach(X, X, X, X[:1]), ValueError, r"o has shape \(1, 1\); expected \(2, 1\)"),
        (lambda: dropped.mass_from_gap(0.0, 3, 2), ValueError, "kept is 3"),
        (lambda: dropped.mass_from_gap(0.0, -1, 2), ValueError, "kept is -1"),
        (lambda: dropped.mass_from_topk([0.0, 0.0], 1), ValueError, "keys is 1"),
        (lambda: dropped.mass_from_decay(0.0, 1, 0.0), ValueError, "slope is 0"),
        (lambda: dropped.mass_from_decay(1.0, -1, 0.0), ValueError, "window is -1"),
        (lambda: dropped.window_for_decay(1.0, -1.0, 0.5), ValueError, "span is -1"),
        (lambda: dropped.window_for_decay(1.0, 1.0, 1.0), ValueError, "mass is 1.0"),
        (lambda: dropped.double_count(1, 2), ValueError, "most is 1"),
        (lambda: dropped.double_count(2, 0), ValueError, "least is 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()
