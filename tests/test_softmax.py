"""Exact attention by worked values, dense definitions and what must not matter."""

import math
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from refattn import bias, masks, partial, rounding, softmax
from refattn.rounding import EVALUATION, allowance
from refattn.testing import Ball, assert_within
from refattn.testing.ball import precision

LN2 = math.log(2.0)
RNG = np.random.default_rng
room = allowance


def drawn(seed, *shapes):
    rng = RNG(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def against_balls(arrays, **options):
    """Judge o, lse and weights of one problem against 200 bits."""
    named = {s: x for s, x in arrays.items() if s not in "qkv"} | options
    given = [arrays[s] for s in "qkv"]
    balls = {s: Ball.lift(x) for s, x in arrays.items()}
    ball_named = {s: x for s, x in balls.items() if s not in "qkv"} | options
    with precision():
        truth = softmax.partial(*(balls[s] for s in "qkv"), **ball_named)
        bound = allowance(softmax.partial, *given, **named)
        got = softmax.partial(*given, **named)
        assert_within(got.o, truth.o, bound.o)
        assert_within(got.lse, truth.lse, bound.lse)
    return got


# --- worked values ----------------------------------------------------------------------------------------------------


def test_equal_logits_give_the_mean():
    q, k, v = [[1.0, -1.0]], [[3.0, 3.0], [0.5, 0.5], [-2.0, -2.0]], [[3.0, 0.0], [6.0, 9.0], [9.0, 0.0]]
    assert_within(softmax.attend(q, k, v), [[6.0, 3.0]], room(softmax.attend, q, k, v))


def test_weights_are_powers_of_two_over_their_sum():
    """Logits 0, ln 2, 2 ln 2 give 1 : 2 : 4, and o = (1·7 + 2·14 + 4·0)/7 = 5."""
    q, k, v = [[1.0]], [[0.0], [LN2], [2 * LN2]], [[7.0], [14.0], [0.0]]
    # ln 2 as a float is off by at most half a spacing: a tilt of span 2·2⁻⁵⁴, worth at most span/2 of the values
    tilt = 2 * 2.0**-54
    o = room(softmax.attend, q, k, v, scale=1.0) + tilt * 14 * EVALUATION
    assert_within(softmax.attend(q, k, v, scale=1.0), [[5.0]], o)
    exact = np.array([[float(Fraction(n, 7)) for n in (1, 2, 4)]])
    p = room(softmax.weights, q, k, scale=1.0) + tilt + rounding.U * exact
    assert_within(softmax.weights(q, k, scale=1.0), exact, p)
    part = softmax.partial(q, k, v, scale=1.0)
    lse = room(softmax.partial, q, k, v, scale=1.0).lse + tilt + 2 * rounding.U * math.log(7)
    assert_within(part.lse, [math.log(7)], lse)


def test_the_scale_is_one_over_the_root_of_the_depth():
    """D = 4: q·k = 2 ln 3 and σ = ½ give weights 3 : 1."""
    q, k, v = np.full((1, 4), 0.5), np.array([[math.log(3)] * 4, [0.0] * 4]), [[4.0], [0.0]]
    tilt = 2 * math.log(3) * rounding.U
    assert_within(softmax.attend(q, k, v), [[3.0]], room(softmax.attend, q, k, v) + 4 * tilt)
    assert softmax.attend(q, k, v, scale=0.5) == softmax.attend(q, k, v)


def test_gradients_of_two_keys_by_hand():
    """p = ½, ½ and v = 1, 3: o = 2, dS = ½(1−2), ½(3−2); dq = Σ dS k = ½(4−2), dk = dS q, dv = p."""
    q, k, v = [[0.0]], [[2.0], [4.0]], [[1.0], [3.0]]
    got, bound = softmax.vjp([[1.0]], q, k, v), room(softmax.vjp, [[1.0]], q, k, v)
    assert_within(got.q, [[1.0]], bound.q)
    assert_within(got.k, [[0.0], [0.0]], bound.k)
    assert_within(got.v, [[0.5], [0.5]], bound.v)
    assert got.bias is None and got.sink is None


def test_gradients_of_lse_are_the_weights():
    """With do = 0 and dℓ = 8: dS = 8p, so dq = 8·½(2+4), db = 8p, and a sink of the keys' logit takes a third."""
    q, k, v, zero = [[0.0]], [[2.0], [4.0]], [[1.0], [3.0]], [[0.0]]
    named = {"dlse": [8.0], "bias": [[0.0, 0.0]]}
    got, bound = softmax.vjp(zero, q, k, v, **named), room(softmax.vjp, zero, q, k, v, **named)
    assert_within(got.q, [[24.0]], bound.q)
    assert_within(got.bias, [[4.0, 4.0]], bound.bias)
    got, bound = softmax.vjp(zero, q, k, v, sink=0.0, **named), room(softmax.vjp, zero, q, k, v, sink=0.0, **named)
    assert_within(got.sink, 8 / 3, bound.sink + rounding.U * 3)
    assert_within(got.bias, [[8 / 3, 8 / 3]], bound.bias + rounding.U * 3)


def test_logits_beyond_the_range_of_exp_are_answered():
    q, k, v = [[1.0]], [[1e4], [1e4], [-1e4]], [[1.0], [3.0], [1e300]]
    part = softmax.partial(q, k, v)
    bound = room(softmax.partial, q, k, v)
    assert_within(part.o, [[2.0]], bound.o)
    assert_within(part.lse, [1e4 + LN2], bound.lse + 2 * rounding.U * 1e4)
    assert (softmax.weights(q, k)[0, 2], softmax.weights(q, k).sum()) == (0.0, 1.0)


# --- sink, softcap, bias ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [-30.0, 0.0, 1.5, 40.0])
def test_a_sink_is_one_more_key_of_value_zero(beta):
    q, k, v = drawn(0, (3, 2), (4, 2), (4, 3))
    longer = np.c_[np.zeros((3, 4)), np.full(3, beta)]
    more_k, more_v = np.r_[k, np.zeros((1, 2))], np.r_[v, np.zeros((1, 3))]
    with_sink, with_key = softmax.partial(q, k, v, sink=beta), softmax.partial(q, more_k, more_v, bias=longer)
    one, other = room(softmax.partial, q, k, v, sink=beta), room(softmax.partial, q, more_k, more_v, bias=longer)
    assert_within(with_sink.o, with_key.o, one.o + other.o)
    assert_within(with_sink.lse, with_key.lse, one.lse + other.lse)
    merged = partial.merge(softmax.partial(q, k, v), partial.Partial(np.zeros((3, 3)), np.full(3, beta)))
    assert_within(with_sink.lse, merged.lse, 2 * one.lse + 2 * other.lse)
    do = np.ones((3, 3))
    got, want = softmax.vjp(do, q, k, v, sink=beta), softmax.vjp(do, q, more_k, more_v, bias=longer)
    bound, wide = room(softmax.vjp, do, q, k, v, sink=beta), room(softmax.vjp, do, q, more_k, more_v, bias=longer)
    total = wide.bias[:, 4].sum() + rounding.gamma(3) * abs(want.bias[:, 4]).sum()
    assert_within(got.sink, want.bias[:, 4].sum(), bound.sink + total)
    assert_within(got.q, want.q, bound.q + wide.q)


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = drawn(0, (3, 2), (4, 2), (4, 3))
    hidden = np.array([[True] * 4, [False] * 4, [True, False, True, False]])
    for mask in (None, hidden):
        plain, none = softmax.partial(q, k, v, mask=mask), softmax.partial(q, k, v, mask=mask, sink=-np.inf)
        assert (plain.o == none.o).all() and (plain.lse == none.lse).all()


def test_the_order_of_softcap_and_bias_matters_and_is_as_asked():
    """s = 2, b = 3, c = 4: 4 tanh(2/4) + 3 and 4 tanh(5/4), as the log-odds against a key of logit 0."""
    q, k, v, b = [[1.0]], [[2.0], [0.0]], [[1.0], [0.0]], [[3.0, 0.0]]
    for order, odds in (("softcap, bias", 4 * math.tanh(0.5) + 3), ("bias, softcap", 4 * math.tanh(1.25))):
        options = {"bias": b, "softcap": 4.0, "scale": 1.0, "order": order}
        want = 1 / (1 + math.exp(-odds))
        # tanh, exp, their products and sums in the expected value: 16 roundings of numbers up to the odds
        own = rounding.gamma(16) * (1 + odds) * want
        assert_within(softmax.attend(q, k, v, **options), [[want]], room(softmax.attend, q, k, v, **options) + own)


@pytest.mark.parametrize("order", ["softcap, bias", "bias, softcap"])
def test_a_bias_of_minus_infinity_is_a_mask(order):
    q, k, v = drawn(1, (4, 2), (5, 2), (5, 3))
    seen = RNG(2).random((4, 5)) < 0.6
    seen[1] = False
    table = np.where(seen, drawn(3, (4, 5))[0], -np.inf)
    finite, options = np.where(seen, table, 0.0), {"softcap": 2.0, "order": order}
    one, other = (
        softmax.partial(q, k, v, bias=table, **options),
        softmax.partial(q, k, v, bias=finite, mask=seen, **options),
    )
    assert (one.o == other.o).all() and (one.lse == other.lse).all()
    assert (one.o[1] == 0).all() and one.lse[1] == -np.inf
    assert (softmax.weights(q, k, bias=table, **options)[~seen] == 0).all()
    do, dlse = np.ones((4, 3)), np.ones(4)
    got = softmax.vjp(do, q, k, v, bias=table, dlse=dlse, **options)
    want = softmax.vjp(do, q, k, v, bias=finite, mask=seen, dlse=dlse, **options)
    for a, b in zip(got[:4], want[:4], strict=True):
        assert (a == b).all()
    assert (got.bias[~seen] == 0).all() and (got.q[1] == 0).all()


def test_alibi_is_its_dense_table():
    q, k, v = drawn(4, (2, 3, 2), (2, 5, 2), (2, 5, 3))
    slopes = np.array([0.5, 0.25])
    for at, first in ((None, 5 - 3), (0, 0), (7, 7), (np.array([4, 0, 9]), None)):
        lazy = bias.alibi(slopes) if at is None else bias.alibi(slopes).at(at)
        position = np.asarray(at) if first is None else first + np.arange(3)
        table = slopes[:, None, None] * (np.arange(5) - position[:, None])
        for options in ({}, {"mask": masks.causal()}, {"softcap": 3.0, "order": "bias, softcap"}):
            got, want = (softmax.partial(q, k, v, bias=b, **options) for b in (lazy, table))
            assert (got.o == want.o).all() and (got.lse == want.lse).all()
    do = np.ones((2, 3, 3))
    got, want = (
        softmax.vjp(do, q, k, v, bias=b)
        for b in (bias.alibi(slopes), slopes[:, None, None] * (np.arange(5) - (2 + np.arange(3))[:, None]))
    )
    assert got.bias is None and all((a == b).all() for a, b in zip(got[:3], want[:3], strict=True))


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (3, 1), (1, 1), (5,), (), (2, 3, 5), (2, 1, 5), (4, 1, 1, 1)])
def test_a_bias_that_broadcasts_is_its_table_and_its_gradient_sums(shape):
    q, k, v, do = drawn(5, (4, 2, 3, 2), (4, 2, 5, 2), (4, 2, 5, 3), (4, 2, 3, 3))
    b = np.round(drawn(6, shape)[0] * 8) / 8
    table = np.broadcast_to(b, (4, 2, 3, 5))
    assert (softmax.attend(q, k, v, bias=b) == softmax.attend(q, k, v, bias=table)).all()
    got, whole = softmax.vjp(do, q, k, v, bias=b).bias, softmax.vjp(do, q, k, v, bias=table).bias
    assert got.shape == b.shape
    wide = whole.reshape(4, 2, 3, 5)
    lead = wide.ndim - b.ndim
    axes = tuple(range(lead)) + tuple(lead + a for a, n in enumerate(shape) if n == 1)
    size = np.abs(wide).sum(axis=axes, keepdims=True).reshape(shape)
    assert_within(got, wide.sum(axis=axes, keepdims=True).reshape(shape), 2 * rounding.gamma(120) * size)


# --- what is not seen, and NaN ----------------------------------------------------------------------------------------


def test_a_row_that_sees_nothing_answers_zero():
    q, k, v = drawn(7, (3, 2), (4, 2), (4, 3))
    mask = np.array([[True] * 4, [False] * 4, [True] * 4])
    part = softmax.partial(q, k, v, mask=mask)
    assert (part.o[1] == 0).all() and part.lse[1] == -np.inf
    assert (softmax.weights(q, k, mask=mask)[1] == 0).all()
    part = softmax.partial(q, k, v, mask=mask, sink=-3.5)
    assert (part.o[1] == 0).all() and part.lse[1] == -3.5
    got = softmax.vjp(np.ones((3, 3)), q, k, v, mask=mask, sink=-3.5, dlse=[0.0, 2.0, 0.0])
    assert (got.q[1] == 0).all()
    without = softmax.vjp(np.ones((3, 3)), q, k, v, mask=mask, sink=-3.5)
    bound = room(softmax.vjp, np.ones((3, 3)), q, k, v, mask=mask, sink=-3.5)
    assert_within(got.sink - without.sink, 2.0, 2 * bound.sink + rounding.gamma(4) * (4 + abs(got.sink)))


def test_nan_in_what_is_not_seen_reaches_nothing():
    q, k, v, do = drawn(8, (4, 2), (6, 2), (6, 3), (4, 3))
    mask = np.ones((4, 6), bool)
    mask[2] = False
    mask[:, [1, 4]] = False
    clean = softmax.partial(q, k, v, mask=mask)
    for bad in (np.nan, np.inf):
        rq, rk, rv, rdo, table = q.copy(), k.copy(), v.copy(), do.copy(), np.where(mask, 0.0, bad)
        rq[2], rk[[1, 4]], rv[[1, 4]], rdo[2] = bad, bad, bad, bad
        with np.errstate(invalid="ignore"):
            got = softmax.partial(rq, rk, rv, mask=mask, bias=table)
            gradients = softmax.vjp(rdo, rq, rk, rv, mask=mask)
        bound, wanted = room(softmax.partial, q, k, v, mask=mask), softmax.vjp(do, q, k, v, mask=mask)
        assert_within(got.o, clean.o, 2 * bound.o)
        rooms = room(softmax.vjp, do, q, k, v, mask=mask)
        for name in "qkv":
            assert_within(getattr(gradients, name), getattr(wanted, name), 2 * getattr(rooms, name))


def test_nan_in_what_one_row_sees_stays_in_that_row():
    q, k, v = drawn(9, (3, 2), (4, 2), (4, 3))
    v[2] = np.nan
    seen = np.array([[True, True, False, False], [True, True, True, False], [False, True, False, True]])
    with np.errstate(invalid="ignore"):
        o = softmax.attend(q, k, v, mask=seen)
    assert np.isnan(o[1]).all() and np.isfinite(o[[0, 2]]).all()
    q[0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        o = softmax.attend(q, k, np.ones((4, 3)), mask=seen)
    assert np.isnan(o[0]).all() and np.isfinite(o[1:]).all()


def test_an_infinite_value_that_a_row_sees_reaches_it():
    q, k, v = drawn(9, (2, 2), (3, 2), (3, 1))
    v[1] = np.inf
    o = softmax.attend(q, k, v, mask=np.array([[True, True, True], [True, False, True]]))
    assert o[0, 0] == np.inf and np.isfinite(o[1, 0])


# --- heads, leading axes, merging -------------------------------------------------------------------------------------


def test_query_head_h_reads_key_head_h_over_the_group():
    q, k, v = drawn(10, (2, 6, 3, 2), (2, 2, 4, 2), (2, 3, 4, 5))
    o = softmax.attend(q, k, v)
    do = np.ones(o.shape)
    got = softmax.vjp(do, q, k, v)
    dk, dv, rooms = np.zeros(k.shape), np.zeros(v.shape), [np.zeros(k.shape), np.zeros(v.shape)]
    for b in range(2):
        for h in range(6):
            alone = q[b, h], k[b, h // 3], v[b, h // 2]
            bound = room(softmax.attend, *alone)
            assert_within(o[b, h], softmax.attend(*alone), 2 * bound)
            one, allowed = softmax.vjp(do[b, h], *alone), room(softmax.vjp, do[b, h], *alone)
            assert_within(got.q[b, h], one.q, 2 * allowed.q)
            for total, part, at in ((dk, one.k, h // 3), (rooms[0], allowed.k, h // 3), (dv, one.v, h // 2)):
                total[b, at] += part
            rooms[1][b, h // 2] += allowed.v + rounding.gamma(6) * abs(one.v)
            rooms[0][b, h // 3] += rounding.gamma(6) * abs(one.k)
    assert_within(got.k, dk, 2 * rooms[0])
    assert_within(got.v, dv, 2 * rooms[1])


def test_leading_axes_broadcast_and_gradients_sum_over_them():
    q, k, v = drawn(11, (5, 1, 3, 2), (4, 2), (2, 4, 3))
    o = softmax.attend(q, k, v)
    assert o.shape == (5, 2, 3, 3)
    for n in np.ndindex(5, 2):
        alone = q[n[0], 0], k, v[n[1]]
        assert_within(o[n], softmax.attend(*alone), 2 * room(softmax.attend, *alone))
    got = softmax.vjp(np.ones(o.shape), q, k, v)
    assert [x.shape for x in got[:3]] == [q.shape, k.shape, v.shape]
    total, bound = np.zeros(k.shape), np.zeros(k.shape)
    for n in np.ndindex(5, 2):
        alone = q[n[0], 0], k, v[n[1]]
        one = softmax.vjp(np.ones((3, 3)), *alone).k
        total += one
        bound += room(softmax.vjp, np.ones((3, 3)), *alone).k + rounding.gamma(10) * abs(one)
    assert_within(got.k, total, 2 * bound)


def test_masks_and_sinks_have_the_heads_of_q():
    q, k, v = drawn(12, (4, 3, 2), (2, 5, 2), (2, 5, 1))
    mask, sink = RNG(13).random((4, 3, 5)) < 0.7, np.array([0.0, -np.inf, 3.0, -2.0])
    o = softmax.attend(q, k, v, mask=mask, sink=sink)
    for h in range(4):
        alone = (q[h], k[h // 2], v[h // 2]), {"mask": mask[h], "sink": sink[h]}
        assert_within(o[h], softmax.attend(*alone[0], **alone[1]), 2 * room(softmax.attend, *alone[0], **alone[1]))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_any_number_of_parts_in_any_order_merge_into_the_whole(parts):
    q, k, v = drawn(14, (3, 2), (7, 2), (7, 3))
    k *= 30
    order, cuts = RNG(parts).permutation(7), np.array_split(np.arange(7), parts)
    pieces = [softmax.partial(q, k[order[c]], v[order[c]]) for c in cuts]
    unseen = softmax.partial(q, k, v, mask=np.zeros((3, 7), bool))
    whole, bound = softmax.partial(q, k, v), room(softmax.partial, q, k, v)
    merged = partial.merge(*pieces, unseen)
    # each part's own error (o; lse as a tilt of at most its error, times the values' range), then F1 over the parts
    errors = [room(softmax.partial, q, k[order[c]], v[order[c]]) for c in cuts]
    tilt = 2 * np.max([e.lse for e in errors], axis=0)[:, None]
    lse = np.stack([p.lse for p in pieces], axis=1)
    rooms = [
        room(softmax.partial, [[1.0]], lse[i][:, None], np.stack([p.o[i] for p in pieces]), scale=1.0) for i in range(3)
    ]
    own = np.max([e.o for e in errors], axis=0) + tilt * np.ptp(v, axis=0)
    assert_within(merged.o, whole.o, bound.o + own + np.concatenate([r.o for r in rooms]))
    assert_within(merged.lse, whole.lse, bound.lse + tilt[:, 0] + np.concatenate([r.lse for r in rooms]))
    nested = partial.merge(partial.merge(*pieces[:1], unseen), *pieces[1:])
    assert (nested.o == merged.o).all() and (nested.lse == merged.lse).all()


def test_parts_that_saw_nothing_merge_into_nothing():
    nothing = partial.Partial(np.zeros((2, 3)), np.full(2, -np.inf))
    merged = partial.merge(nothing, nothing)
    assert (merged.o == 0).all() and (merged.lse == -np.inf).all()


# --- dtypes and layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.int8, np.int64, np.uint16])
def test_narrow_inputs_are_widened_exactly(dtype):
    arrays = [np.round(x * 4).__abs__().astype(dtype) for x in drawn(15, (3, 2), (4, 2), (4, 3))]
    wide = [x.astype(np.float64) for x in arrays]
    got = softmax.attend(*arrays)
    assert got.dtype == np.float64 and (got == softmax.attend(*wide)).all()
    do = np.ones((3, 3), dtype)
    for a, b in zip(softmax.vjp(do, *arrays)[:3], softmax.vjp(do.astype(float), *wide)[:3], strict=True):
        assert a.dtype == np.float64 and (a == b).all()


def test_float16_is_not_computed_in_float16():
    """q·k = 90000 is beyond float16, and the difference of the two logits is below its spacing."""
    q, k = np.array([[300.0]], np.float16), np.array([[300.0], [299.75]], np.float16)
    p = softmax.weights(q, k, scale=0.01)
    wide = [x.astype(float) for x in (q, k)]
    with precision():
        assert_within(p, softmax.weights(*map(Ball.lift, wide), scale=0.01), room(softmax.weights, *wide, scale=0.01))


# --- tiles and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [63, 64, 65, 129])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(3, 1)], ids=str)
def test_answers_at_the_edges_of_tiles_are_those_of_each_row_alone(n, mask):
    q, k, v = drawn(n, (n, 2), (n + 1, 2), (n + 1, 1))
    whole = softmax.partial(q, k, v, mask=mask)
    bound = room(softmax.partial, q, k, v, mask=mask)
    rows = np.unique([0, 1, 62, 63, 64, 65, 127, 128, n - 1])
    for i in rows[rows < n]:
        own = None if mask is None else mask.at(np.array([i + 1]))
        alone = softmax.partial(q[i : i + 1], k, v, mask=own)
        assert_within(whole.o[i], alone.o[0], 2 * bound.o[i])
        assert_within(whole.lse[i], alone.lse[0], 2 * bound.lse[i])
    do = np.ones((n, 1))
    got, allowed = softmax.vjp(do, q, k, v, mask=mask), room(softmax.vjp, do, q, k, v, mask=mask)
    p = softmax.weights(q, k, mask=mask)
    assert_within(got.v, p.sum(axis=0)[:, None], 2 * allowed.v)


@pytest.mark.parametrize(("rows", "pairs"), [(1, 2**20), (2, 2**20), (64, 1), (3, 7), (64, 12)])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.dilated(2, 2, 2)], ids=str)
def test_how_tiles_are_cut_changes_rounding_only(monkeypatch, rows, pairs, mask):
    q, k, v, table, do = drawn(16, (5, 2), (6, 2), (6, 3), (1, 6), (5, 3))
    named = {"bias": table, "sink": 0.5, "softcap": 3.0, "mask": mask}
    whole, gradients = softmax.partial(q, k, v, **named), softmax.vjp(do, q, k, v, **named)
    p = softmax.weights(q, k, **named)
    monkeypatch.setattr(softmax, "TILE_ROWS", rows)
    monkeypatch.setattr(softmax, "TILE_PAIRS", pairs)
    got, bound = softmax.partial(q, k, v, **named), room(softmax.partial, q, k, v, **named)
    assert_within(got.o, whole.o, 2 * bound.o)
    assert_within(got.lse, whole.lse, 2 * bound.lse)
    assert_within(softmax.weights(q, k, **named), p, 2 * room(softmax.weights, q, k, **named))
    allowed = room(softmax.vjp, do, q, k, v, **named)
    for a, b, r in zip(softmax.vjp(do, q, k, v, **named), gradients, allowed, strict=True):
        assert_within(a, b, 2 * r)


def test_small_tiles_agree_with_balls(monkeypatch):
    monkeypatch.setattr(softmax, "TILE_ROWS", 2)
    q, k, v = drawn(17, (5, 2), (4, 2), (4, 2))
    against_balls({"q": q, "k": k, "v": v, "sink": np.array(0.25)}, mask=masks.causal(), softcap=2.0)


@pytest.mark.parametrize("verb", ["attend", "vjp"])
def test_memory_is_not_quadratic(verb):
    n, rng = 4096, RNG(0)
    q, k, v, do = (rng.standard_normal((n, 4)) for _ in range(4))
    tracemalloc.start()
    try:
        softmax.attend(q, k, v) if verb == "attend" else softmax.vjp(do, q, k, v)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n * n * 8 / 4


def test_a_tile_of_rows_reads_only_the_keys_that_it_sees(monkeypatch):
    touched = []
    seen = masks.Pairs.seen
    monkeypatch.setattr(
        masks.Pairs, "seen", lambda self, rows, keys: touched.append(len(rows) * len(keys)) or seen(self, rows, keys)
    )
    q, k, v = drawn(18, (512, 1), (512, 1), (512, 1))
    softmax.attend(q, k, v, mask=masks.window(4, 0))
    assert sum(touched) <= 512 * (softmax.TILE_ROWS + 4)


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(3, 0)], ids=str)
def test_no_tile_is_larger_than_agreed_unless_one_row_is(monkeypatch, mask):
    sizes, tile = [], softmax._tile
    monkeypatch.setattr(softmax, "TILE_PAIRS", 12)
    monkeypatch.setattr(
        softmax,
        "_tile",
        lambda one, rows, keys, seen: sizes.append((len(rows), len(keys))) or tile(one, rows, keys, seen),
    )
    softmax.attend(*drawn(19, (9, 1), (9, 1), (9, 1)), mask=mask)
    assert sum(rows for rows, _ in sizes) == 9
    assert all(rows == 1 or rows * keys <= 12 for rows, keys in sizes)


def test_costs_count_the_pairs_that_are_seen():
    assert softmax.cost(4, 4, 3, 5, mask=masks.causal()) == (10, 160, 512)
