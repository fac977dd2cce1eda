"""The judges' own trial: `assert_within`, `Ball`, `Bounded` and `allowance` convict the guilty and no one else."""

import itertools
import math
import operator
from fractions import Fraction

import flint
import ml_dtypes
import numpy as np
import pytest
from flint import arb, fmpq
from hypothesis import given
from hypothesis import strategies as st

from refattn import rounding, softmax
from refattn.lifted import concatenate
from refattn.rounding import Bounded, allowance, gamma
from refattn.testing import Ball, assert_within
from refattn.testing.ball import precision

TRUTH = np.arange(6.0).reshape(2, 3)


# --- assert_within ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lift", [np.asarray, Ball.lift])
def test_an_error_of_exactly_the_bound_is_innocent(lift):
    for sign in (1, -1):
        actual = TRUTH + 0.5 * sign * np.eye(2, 3)
        assert assert_within(actual, lift(TRUTH), 0.5 * np.eye(2, 3)) == 1.0


@pytest.mark.parametrize("lift", [np.asarray, Ball.lift])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_element_over_the_bound_by_one_spacing_is_guilty(lift, sign):
    actual = TRUTH.copy()
    actual[1, 2] += 0.5 * sign
    below = np.nextafter(0.5, 0)
    with pytest.raises(AssertionError, match=r"1 of 6 .* at \[1, 2\]") as caught:
        assert_within(actual, lift(TRUTH), np.full(TRUTH.shape, below))
    for part in (f"{actual[1, 2]!r}", "5.0", "error 0.5", "allowed 0.5"):
        assert part in str(caught.value)


@pytest.mark.parametrize("lift", [np.asarray, Ball.lift])
def test_an_error_that_rounds_to_its_bound_from_above_is_guilty(lift):
    assert 1.0 - -(2.0**-60) == 1.0
    with pytest.raises(AssertionError):
        assert_within([1.0], lift([-(2.0**-60)]), [1.0])
    with pytest.raises(AssertionError):
        assert_within([-1.0], lift([2.0**-60]), [1.0])
    assert_within([1.0], lift([2.0**-60]), [1.0])
    assert_within([2.0**60], lift([-1.0]), [np.nextafter(2.0**60, np.inf)])


@given(st.floats(allow_nan=False, width=64), st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e300))
def test_the_verdict_is_that_of_exact_arithmetic(a, x, bound):
    judge_exactly(a, x, bound)


def judge_exactly(a, x, bound):
    innocent = not math.isinf(a) and abs(Fraction(a) - Fraction(x)) <= Fraction(bound)
    for expected in ([x], Ball.lift([x])):
        if innocent:
            assert_within([a], expected, [bound])
        else:
            with pytest.raises(AssertionError):
                assert_within([a], expected, [bound])


@given(st.floats(-1e100, 1e100), st.integers(-2, 2), st.floats(0, 1e100))
def test_the_verdict_is_exact_at_the_edge(x, steps, bound):
    a = x + bound
    for _ in range(abs(steps)):
        a = np.nextafter(a, math.copysign(math.inf, steps))
    judge_exactly(float(a), x, bound)


@pytest.mark.parametrize("lift", [np.asarray, Ball.lift])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_guilty_whatever_the_bound(lift, bad):
    actual = TRUTH.copy()
    actual[0, 1] = bad
    with pytest.raises(AssertionError, match=r"at \[0, 1\]"):
        assert_within(actual, lift(TRUTH), np.finfo(float).max)


def test_an_expected_nan_excuses_nothing():
    for actual in (0.0, np.nan, np.inf):
        with pytest.raises(AssertionError):
            assert_within([actual], [np.nan], [np.finfo(float).max])


@pytest.mark.parametrize("lift", [np.asarray, Ball.lift])
def test_infinities_of_one_sign_agree_and_others_do_not(lift):
    assert assert_within([np.inf, -np.inf], lift([np.inf, -np.inf]), 0.0) == 0.0
    for actual in (-np.inf, np.nan, 1e308):
        with pytest.raises(AssertionError):
            assert_within([actual], lift([np.inf]), np.finfo(float).max)


@pytest.mark.parametrize("lift", [np.asarray, Ball.lift])
def test_another_shape_is_guilty_even_where_it_would_broadcast(lift):
    for actual in (TRUTH.T, TRUTH[:1], TRUTH[None], TRUTH.ravel(), 0.0):
        with pytest.raises(AssertionError, match="shape"):
            assert_within(actual, lift(TRUTH), 100.0)
    square = np.array([[0.0, 1.0], [2.0, 3.0]])
    with pytest.raises(AssertionError, match="2 of 4"):
        assert_within(square.T, lift(square), 0.5)


@pytest.mark.parametrize("bound", [np.nan, np.inf, -1.0, [[0, 0, 0], [0, np.nan, 0]], [[-0.5] * 3] * 2])
def test_a_bound_that_allows_anything_or_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        assert_within(TRUTH, TRUTH, bound)


def test_a_bound_of_another_shape_is_refused():
    for shape in ((3, 2), (4,), (1, 2, 3)):
        with pytest.raises(ValueError, match="bound has shape"):
            assert_within(TRUTH, TRUTH, np.ones(shape))
    assert_within(TRUTH, TRUTH, np.ones(3))


def test_nothing_to_judge_is_an_error_unless_it_was_expected():
    with pytest.raises(ValueError, match="nothing to judge"):
        assert_within(np.zeros((0, 3)), np.zeros((0, 3)), 0.0)
    assert assert_within(np.zeros((0, 3)), np.zeros((0, 3)), 0.0, empty=True) == 0.0
    with pytest.raises(AssertionError, match="shape"):
        assert_within(np.zeros((0, 3)), np.zeros((3, 0)), 0.0, empty=True)


@pytest.mark.parametrize("dtype", [bool, complex, object, str])
def test_answers_that_are_not_real_numbers_are_guilty(dtype):
    with pytest.raises(AssertionError, match="dtype"):
        assert_within(TRUTH.astype(dtype), TRUTH, 10.0)


WIDE = np.longdouble(1) + np.longdouble(2) ** -60
NOT_HELD = {
    "complex": [1 + 5j],
    "a large integer": [2**53 + 1],
    "a long double": pytest.param(
        [WIDE], marks=pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is float64 here")
    ),
    "strings": ["1"],
    "booleans": [True],
    "objects": [Fraction(1)],
    "a masked array": np.ma.masked_array([1.0], [True]),
    "another arithmetic": Bounded([1.0], [0.0]),
}


@pytest.mark.parametrize("numbers", NOT_HELD.values(), ids=NOT_HELD)
def test_nothing_hides_in_numbers_that_float64_does_not_hold(numbers):
    for hidden in (numbers, np.asarray(numbers) if isinstance(numbers, list) else numbers):
        with pytest.raises(AssertionError, match="actual "):
            assert_within(hidden, [1.0], [1e300])
        with pytest.raises((ValueError, TypeError), match="expected "):
            assert_within([1.0], hidden, [1e300])
        with pytest.raises((ValueError, TypeError), match="bound "):
            assert_within([1.0], [1.0], hidden)


def test_an_answer_in_balls_is_guilty():
    with pytest.raises(AssertionError, match="actual is a Ball"):
        assert_within(Ball.lift([1.0]), [1.0], [1.0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16, np.int8])
def test_narrow_answers_are_judged_as_they_are(dtype):
    assert assert_within(TRUTH.astype(dtype), TRUTH, 0.0) == 0.0
    with pytest.raises(AssertionError):
        assert_within((TRUTH + 1).astype(dtype), TRUTH, 0.5)


def test_the_largest_ratio_is_returned():
    assert assert_within([1.0, 2.0, 3.0], [1.0, 2.5, 2.0], [0.0, 4.0, 2.0]) == 0.5


def test_the_radius_of_a_ball_is_charged_to_the_judge():
    wide = Ball(np.array([arb(1, 0.25)], object))
    assert_within([1.0], wide, [0.25 + 2.0**-20])
    with pytest.raises(AssertionError):
        assert_within([1.0], wide, [0.125])
    assert_within([2.0], wide, [1.25 + 2.0**-20])
    with pytest.raises(AssertionError):
        assert_within([2.0], wide, [1.125])


# --- Ball -------------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-(2.0**40), 2.0**40).map(lambda x: float(np.float64(x)))
ARITHMETIC = [operator.add, operator.sub, operator.mul, operator.truediv]


def rational(x):
    return arb(fmpq(x.numerator, x.denominator))


@pytest.fixture(autouse=True)
def bits():
    with precision():
        yield


@pytest.mark.parametrize("op", ARITHMETIC)
@given(x=NUMBERS, y=NUMBERS)
def test_balls_enclose_rational_arithmetic(op, x, y):
    if op is operator.truediv and y == 0:
        return
    got = op(Ball.lift(x), y).cells.item()
    truth = op(Fraction(x), Fraction(y))
    assert got.overlaps(rational(truth))
    assert got.rad() <= arb(2) ** -190 * abs(rational(truth))


def test_matrix_products_and_sums_are_those_of_rationals():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((3, 4))
    got = Ball.lift(a) @ b
    for i, j in np.ndindex(2, 4):
        truth = sum((Fraction(x) * Fraction(y) for x, y in zip(a[i], b[:, j], strict=True)), Fraction(0))
        assert got[i, j].cells.item().overlaps(rational(truth))
    column = Ball.lift(a).sum(0, keepdims=True)
    assert column.shape == (1, 3)
    assert column[0, 2].cells.item().overlaps(rational(Fraction(a[0, 2]) + Fraction(a[1, 2])))


def test_known_values_are_enclosed():
    for got, truth in (
        (np.exp(Ball.lift(1.0)), arb.const_e()),
        (np.log(Ball.lift(2.0)), arb.const_log2()),
        (Ball.lift(0.5)._tanh(), (arb(1).exp() - 1) / (arb(1).exp() + 1)),
        (np.maximum(Ball.lift(1.0), 2.0), arb(2)),
        (np.minimum(Ball.lift(1.0), 2.0), arb(1)),
        (np.sqrt(Ball.lift(2.0)) * np.sqrt(Ball.lift(2.0)), arb(2)),
        (np.cos(Ball(arb.pi())), arb(-1)),
        (np.sin(Ball(arb.pi() / 6)), arb(0.5)),
    ):
        assert got.cells.item().overlaps(truth)
        assert got.cells.item().rad() < 2.0**-180


def slope(f, x, step=1.0):
    return f(Ball.along(x, step)).derivative().cells.item()


def test_derivatives_are_the_known_ones():
    assert slope(np.exp, 1.0).overlaps(arb.const_e())
    assert slope(np.log, 4.0) == arb(0.25)
    assert slope(np.sqrt, 4.0) == arb(0.25)
    assert slope(np.sin, 0.0) == 1
    assert slope(np.cos, 1.0).overlaps(-arb(1).sin())
    assert slope(lambda x: x * x * x, 2.0) == 12
    assert slope(lambda x: 1.0 - 2.0 * x, 5.0) == -2
    assert slope(lambda x: 3.0 / x, 2.0) == arb(-0.75)
    assert slope(lambda x: -x, 2.0, 3.0) == -3
    quotient = Ball.along(3.0, 1.0) / Ball.along(4.0, 2.0)  # (1·4 − 3·2)/16
    assert quotient.derivative().cells.item() == arb(-0.125)
    product = Ball.along([[1.0, 2.0]], [[1.0, 0.0]]) @ Ball.along([[3.0], [5.0]], [[0.0], [1.0]])
    assert product.derivative().cells.item() == 5
    assert (Ball.lift(2.0) * 2.0).derivative().cells.item() == 0


OVERLAPPING = [((1, 0.2), (1.05, 0.01)), ((1, 0.5), (2, 0.5)), ((0, 1), (0, 1)), ((3, 0), (3, 1))]


@pytest.mark.parametrize(("x", "y"), OVERLAPPING)
def test_extremes_of_balls_that_overlap_are_enclosed(x, y):
    one, other = arb(*x), arb(*y)
    for first, second in ((one, other), (other, one)):
        for got, pick in ((np.maximum, max), (np.minimum, min)):
            ball = got(Ball(first), Ball(second)).cells.item()
            for a, b in itertools.product(*((c.lower(), c.mid(), c.upper()) for c in (first, second))):
                assert ball.overlaps(pick(a, b))
            assert ball.rad() <= one.rad() + other.rad() + abs(one.mid() - other.mid())


def test_infinities_have_extremes():
    assert np.minimum(Ball.lift(-np.inf), 1.0).cells.item() == arb("-inf")
    assert np.maximum(Ball.lift(-np.inf), 1.0).cells.item() == 1
    assert np.maximum(Ball.lift(np.inf), Ball(arb(1, 0.5))).cells.item() == arb("inf")


def test_of_equal_numbers_the_larger_is_the_second_and_the_smaller_the_first():
    first, second = Ball.along(0.0, 1.0), Ball.along(0.0, 2.0)
    assert np.maximum(first, second).derivative().cells.item() == 2
    assert np.minimum(first, second).derivative().cells.item() == 1
    assert slope(lambda x: np.maximum(x, 0.0) + np.exp(np.minimum(x, 0.0)), 0.0) == 1


@pytest.mark.parametrize("extreme", [np.maximum, np.minimum])
def test_the_slope_of_an_extreme_that_is_not_known_is_refused(extreme):
    third = Ball.along(1.0, 1.0) / 3.0
    assert extreme(third, 0.25).derivative().cells.item().overlaps(arb(1) / 3) == (extreme is np.maximum)
    for other in (1.0 / Ball.lift(3.0), Ball(arb(0.25, 0.25))):
        for pair in ((third, other), (other, third)):
            with pytest.raises(ValueError, match="derivative"):
                extreme(*pair)


@pytest.mark.parametrize("x", [0.0, 0.5, -2.0, 40.0, -2000.0])
def test_the_slope_of_tanh_is_accurate_where_it_is_tiny(x):
    got = slope(Ball._tanh, x)
    with precision(12000):
        truth = 1 - arb(x).tanh() ** 2
    assert got.overlaps(truth)
    assert got.rad() <= arb(2) ** -180 * abs(truth)


def test_the_distance_of_a_float_is_never_understated():
    third = Ball.lift(1.0) / 3.0
    gap = abs(Fraction(1 / 3) - Fraction(1, 3))
    assert Fraction(float(third.distance(1 / 3))) >= gap
    wide = Ball(arb(1, 0.5))
    assert wide.distance(1.0) >= 0.5 and wide.distance(2.0) >= 1.5
    tiny = Ball.lift(2.0**-1074) / 3.0
    assert tiny.distance(0.0) > 0
    assert Ball.lift(0.1).distance(0.1) == 0.0
    assert math.isnan(Ball.lift(0.1).distance(np.nan))
    assert Ball.lift(0.1).distance(np.inf) == np.inf
    assert Ball(arb("nan")).distance(0.0) == np.inf


def test_precision_is_put_back():
    before = flint.ctx.prec
    with pytest.raises(ZeroDivisionError), precision(999):
        assert flint.ctx.prec == 999
        raise ZeroDivisionError
    assert flint.ctx.prec == before


def test_balls_refuse_a_second_formula_for_gradients():
    x = Ball.lift([[1.0]])
    with pytest.raises(NotImplementedError, match="along"):
        softmax.vjp([[1.0]], x, x, x)


# --- Bounded ----------------------------------------------------------------------------------------------------------

MODERATE = st.one_of(st.integers(-8, 8).map(float), st.floats(-(2.0**60), 2.0**60).filter(lambda x: abs(x) > 2.0**-60))


@st.composite
def known(draw, numbers=MODERATE):
    """A value with a bound, a real number at or within the bound, and another run of it."""
    value, error = draw(numbers), draw(st.sampled_from([0.0, 2.0**-52, 2.0**-20, 0.25])) * draw(st.floats(0.5, 4))
    error *= draw(st.sampled_from([1.0, abs(value)]))
    real = Fraction(value) + Fraction(error) * draw(st.sampled_from([-1, 1, 0, Fraction(1, 3)]))
    other = float(real + Fraction(error) * draw(st.sampled_from([-1, 1, 0])))
    if abs(Fraction(other) - real) > Fraction(error):
        other = value
    return Bounded(value, error), real, other


def holds(got, truth, run):
    """Judge that the value and another run are within the bound of the real number."""
    room = got.error.item() * rounding.EVALUATION
    if math.isfinite(room):
        worst = max(abs(Fraction(x) - truth) for x in (got.value.item(), float(run)))
        assert worst <= Fraction(room)


@pytest.mark.parametrize("op", ARITHMETIC)
@given(x=known(), y=known())
def test_the_bound_of_every_operation_holds_at_its_ends(op, x, y):
    if op is operator.truediv and 0 in (y[1], y[2]):
        return
    with np.errstate(all="ignore"):
        holds(op(x[0], y[0]), op(x[1], y[1]), op(np.float64(x[2]), np.float64(y[2])))


@given(x=known(), y=known())
def test_the_bound_of_extremes_holds(x, y):
    holds(np.maximum(x[0], y[0]), max(x[1], y[1]), max(x[2], y[2]))
    holds(np.minimum(x[0], y[0]), min(x[1], y[1]), min(x[2], y[2]))
    holds(-x[0], -x[1], -x[2])


@given(xs=st.lists(st.tuples(known(), known()), min_size=1, max_size=6), order=st.randoms())
def test_the_bound_of_sums_and_matrix_products_holds_in_any_order(xs, order):
    a = Bounded([[x[0].value.item() for x, _ in xs]], [[x[0].error.item() for x, _ in xs]])
    b = Bounded([[y[0].value.item()] for _, y in xs], [[y[0].error.item()] for _, y in xs])
    total, products = sum((x[1] for x, _ in xs), Fraction(0)), sum((x[1] * y[1] for x, y in xs), Fraction(0))
    order.shuffle(xs)
    run, summed = 0.0, 0.0
    for x, y in xs:
        run, summed = run + x[2] * y[2], summed + x[2]
    holds(a @ b, products, run)
    holds(a.sum(1), total, summed)
    holds((a @ b).mT, products, run)


SMALL = st.one_of(st.integers(-8, 8).map(float), st.floats(-30, 30))


@pytest.mark.parametrize("f", [np.exp, np.log, np.sqrt, np.sin, np.cos])
@given(data=st.data())
def test_the_bound_of_elementary_functions_holds_at_its_ends(f, data):
    halfline = f in (np.log, np.sqrt)
    x, real, other = data.draw(known(st.floats(2.0**-20, 30) if halfline else SMALL))
    if halfline and (real <= 0 or other <= 0):
        return
    got, truth = f(x), getattr(rational(real), f.__name__)()
    room = got.error.item() * rounding.EVALUATION
    if math.isfinite(room):
        assert max(Ball(truth).distance(v) for v in (got.value, f(other))) <= room


def test_products_that_underflow_are_charged():
    x, y = 2.0**-600 * 1.1, 2.0**-470 * 1.3
    got, truth = Bounded.lift(x) * y, Fraction(x) * Fraction(y)
    assert 0 < got.value.item() < 2.0**-1022
    holds(got, truth, got.value)
    assert abs(Fraction(got.value.item()) - truth) > Fraction(rounding.U) * truth
    holds(Bounded.lift(2.0**-600) * 2.0**-600, Fraction(2) ** -1200, 0.0)


@pytest.mark.parametrize(("kind", "whole"), [(Ball, Ball.floats), (Bounded, lambda x: x.value)])
def test_arrays_are_joined_in_the_arithmetic_of_any_of_them(kind, whole):
    joined = concatenate(np.zeros((1, 2)), kind.lift([[1.0, 2.0]]))
    assert type(joined) is kind and whole(joined).tolist() == [[0.0, 0.0], [1.0, 2.0]]
    assert whole(concatenate(kind.lift([[1.0]]), [[2.0]], axis=1)).tolist() == [[1.0, 2.0]]


def test_what_may_be_anything_has_an_infinite_bound():
    assert (Bounded(1.0, 0.0) / Bounded(0.5, 1.0)).error == np.inf
    assert np.log(Bounded(0.5, 1.0)).error == np.inf
    assert np.sqrt(Bounded(0.5, 1.0)).error == np.inf
    assert np.sqrt(Bounded(0.5, 0.375)).error == np.inf  # the real number is positive, another run need not be
    for wave in (np.sin, np.cos):
        assert wave(Bounded(np.inf, np.inf)).error == wave(Bounded(1.0, np.inf)).error == np.inf
    assert gamma(2**53) == np.inf
    assert gamma(4, u=0.125) == 1.0


# --- allowance --------------------------------------------------------------------------------------------------------


def test_the_allowance_has_the_shape_of_the_answer():
    q, k, v = np.ones((2, 1)), np.ones((3, 1)), np.ones((3, 4))
    assert allowance(softmax.attend, q, k, v).shape == (2, 4)
    parts = allowance(softmax.partial, q, k, v)
    assert (parts.o.shape, parts.lse.shape) == ((2, 4), (2,))
    assert allowance(softmax.weights, q, k).shape == (2, 3)
    out = allowance(softmax.vjp, np.ones((2, 4)), q, k, v, bias=np.ones((1, 3)), sink=0.0, dlse=np.ones(2))
    assert [x.shape for x in out] == [(2, 1), (3, 1), (3, 4), (1, 3), ()]
    assert allowance(softmax.vjp, np.ones((2, 4)), q, k, v).sink is None


def test_an_answer_without_rounding_is_allowed_next_to_none():
    o = allowance(softmax.attend, [[0.0]], [[0.0], [0.0]], [[0.0], [0.0]])
    assert (o <= 2 * rounding.TINY).all()


def test_the_allowance_grows_with_the_logits_and_ends_at_the_values():
    v = [[0.0], [1.0]]
    rooms = [allowance(softmax.attend, [[x]], [[1.0], [1.0]], v).item() for x in (1.0, 1e4, 1e8, 1e12)]
    assert rooms == sorted(rooms)
    assert allowance(softmax.attend, [[1e20]], [[1.0], [1.0]], v).item() < 2.01
    lost = allowance(softmax.vjp, [[1.0]], [[1e20]], [[1.0], [1.0]], v)
    assert lost.v.max() == np.inf
