"""What `rounding.allowance` grants where products underflow, where NaN stands that is not seen, and what it refuses."""

import tracemalloc

import numpy as np
import pytest

from refattn import _mix, masks, rounding, softmax
from refattn.kernel import FeatureMap, linear_transformer
from refattn.rounding import Bounded, allowance
from refattn.testing import Ball, assert_within
from refattn.testing.ball import precision

BOTH = pytest.mark.parametrize("module", [softmax, linear_transformer])
plain = FeatureMap("identity", lambda x: x, lambda dphi, x: dphi)


# --- underflow --------------------------------------------------------------------------------------------------------


def dv_of_one_key(do, q, k, eps):
    """Return dv for one row, one key, one feature: φ(k)φ(q)·do/(φ(k)φ(q) + ε)."""
    kappa = linear_transformer.elu_plus_one.of(Ball.lift(k)) * linear_transformer.elu_plus_one.of(Ball.lift(q))
    return kappa * Ball.lift(do) / (kappa + eps)


def test_what_the_first_product_loses_is_multiplied_by_the_factor_that_follows():
    do, q, k, v = [[1e-290]], [[-10.0]], [[1e28]], [[1.0]]
    got, allowed = (f(do, q, k, v, eps=1.0).v for f in (linear_transformer.vjp, granted))
    with precision():
        truth = dv_of_one_key(do, q, k, 1.0)
    assert 0 < assert_within(got, truth, allowed)
    assert (allowed < 1e-5 * got).all()


def granted(*arrays, **options):
    return allowance(linear_transformer.vjp, *arrays, **options)


@pytest.mark.parametrize("exponents", [(-540, -540, 900, 0), (-540, 300, -540, 0), (-300, -300, -500, 900)])
def test_gradients_whose_products_underflow_in_either_order_are_within_the_allowance(exponents):
    rng = np.random.default_rng(0)
    (do, q, k, v), n = (rng.uniform(1, 2, (3, 1)) * 2.0**e for e in exponents), 3
    got, room = (
        f(do, q, k, v, feature_map=plain, eps=1.0, mask=masks.causal()) for f in (linear_transformer.vjp, granted)
    )
    with precision():
        do, q, k, v = (Ball.lift(x).cells[:, 0] for x in (do, q, k, v))
        dq, dk, dv = (np.zeros(n, object) for _ in range(3))
        for i in range(n):
            den = sum(q[i] * k[j] for j in range(i + 1)) + 1
            o = sum(q[i] * k[j] * v[j] for j in range(i + 1)) / den
            for j in range(i + 1):
                each = do[i] / den * (v[j] - o)
                dq[i] += each * k[j]
                dk[j] += each * q[i]
                dv[j] += q[i] * k[j] * do[i] / den
        for name, x in (("q", dq), ("k", dk), ("v", dv)):
            assert_within(getattr(got, name), Ball(x[:, None]), getattr(room, name))


# --- what is not seen -------------------------------------------------------------------------------------------------


def given(rng, T=3, S=3):
    return [rng.standard_normal(shape) for shape in ((T, 2), (S, 2), (S, 2))]


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_and_rows_that_nothing_sees_do_not_change_the_allowance(module, bad):
    q, k, v = given(np.random.default_rng(1), 4)
    do, options = np.ones((4, 2)), {"mask": masks.causal() & masks.lengths(2)}  # row 0 is before the first key
    clean = allowance(module.attend, q, k, v, **options), allowance(module.vjp, do, q, k, v, **options)
    q[0] = do[0] = k[2] = v[2] = bad
    assert np.array_equal(allowance(module.attend, q, k, v, **options), clean[0])
    for got, expected in zip(allowance(module.vjp, do, q, k, v, **options)[:3], clean[1][:3], strict=True):
        assert np.isfinite(got).all()
        assert np.array_equal(got, expected)


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_a_key_leaves_rows_that_do_not_see_it_alone(module, bad):
    q, k, v = given(np.random.default_rng(2))
    do, options = np.ones((3, 2)), {"mask": masks.causal()}
    clean = allowance(module.attend, q, k, v, **options), allowance(module.vjp, do, q, k, v, **options).q
    k[2] = v[2] = bad
    for got, expected in zip(
        (allowance(module.attend, q, k, v, **options), allowance(module.vjp, do, q, k, v, **options).q),
        clean,
        strict=True,
    ):
        assert np.isfinite(got[:2]).all()
        assert (got[:2] <= 2 * expected[:2]).all()
        assert np.isinf(got[2]).all()


def test_nan_in_a_row_leaves_keys_that_it_does_not_see_alone():
    q, k, v = given(np.random.default_rng(3))
    seen = np.array([[True, False, True], [True, True, True], [True, True, False]])
    for options in ({}, {"softcap": 2.0}, {"bias": np.where(seen, 0.5, -np.inf)}):
        do, dlse = np.ones((3, 2)), np.ones(3)
        q[0] = do[0] = dlse[0] = np.nan
        out = allowance(softmax.vjp, do, q, k, v, dlse=dlse, mask=seen, **options)
        for got in (out.k, out.v):
            assert np.isfinite(got[1]).all()
            assert np.isinf(got[[0, 2]]).all()
        assert np.isinf(out.q[0]).all() and np.isfinite(out.q[1:]).all()


def test_a_value_that_is_not_seen_does_not_matter_where_its_distance_overflows():
    x, v, first = np.ones((2, 1)), np.array([[-2e307], [1.7e308]]), [[True, False], [True, False]]
    allowed = rounding.allowance(softmax.attend, x, x, v, mask=first)
    assert np.isfinite(allowed).all() and (allowed == rounding.allowance(softmax.attend, x, x[:1], v[:1])).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_sees_only_what_is_not_finite_is_allowed_anything(bad):
    one = np.ones((1, 1))
    for arrays, options in (((one, bad * one, one), {}), ((one, one, one), {"bias": bad * one})):
        assert np.isinf(allowance(softmax.partial, *arrays, **options).o).all()
    assert np.isinf(allowance(softmax.attend, one, one, bad * one)).all()


# --- size, and what is refused ----------------------------------------------------------------------------------------


@BOTH
def test_rows_are_bounded_a_tile_at_a_time(module, monkeypatch):
    q, k, v = given(np.random.default_rng(4), 7, 5)
    bias = {"bias": q[:, :1] + np.arange(5)} if module is softmax else {}
    options = {"mask": masks.causal(), **bias}
    whole = allowance(module.attend, q, k, v, **options)
    monkeypatch.setattr(_mix, "TILE_PAIRS", 10)
    assert np.array_equal(allowance(module.attend, q, k, v, **options), whole)


def test_many_rows_of_linear_attention_take_the_memory_of_a_few():
    x = np.random.default_rng(5).standard_normal((3, 2048, 8))
    tracemalloc.start()
    try:
        allowance(linear_transformer.attend, *x, mask=masks.causal())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # T×S booleans, and some tiles in float64; each T×S array of floats would be 32 MiB
    assert peak < 2048 * 2048 + 16 * 8 * _mix.TILE_PAIRS


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ([[True]], TypeError, "has dtype bool"),
        ([[1j]], TypeError, "has dtype complex128"),
        ([["1"]], TypeError, "has dtype <U1"),
        ([[2**53 + 1]], ValueError, "holds integers beyond 2"),
    ],
)
def test_what_float64_cannot_hold_is_refused_by_name(bad, error, words):
    one = [[1.0]]
    with pytest.raises(error, match=f"^k {words}"):
        allowance(softmax.attend, one, bad, one)
    with pytest.raises(error, match=f"^bias {words}"):
        allowance(softmax.attend, one, one, one, bias=bad)
    with pytest.raises(error, match=f"^do {words}"):
        allowance(softmax.vjp, q=one, k=one, v=one, do=bad)
    with pytest.raises(error, match=f"^argument 2 {words}"):
        allowance(lambda *_: one, one, bad)
    with pytest.raises(error, match=words):
        Bounded.lift(bad)


def test_zero_for_sure_stays_zero_whatever_it_is_multiplied_by():
    product = Bounded.lift([0.0, 0.0, 2.0**-1074]) * Bounded([np.nan, 1.0, 1.0], [0.0, np.inf, 0.0])
    assert product.value.tolist() == [0.0, 0.0, 2.0**-1074]
    assert product.error.tolist() == [0.0, 0.0, rounding.TINY]
    assert np.isnan((Bounded(0.0, rounding.TINY) * np.nan).value)
