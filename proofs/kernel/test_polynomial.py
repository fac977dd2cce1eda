r"""Polynomials in place of e^s: how far that is from softmax follows from the extremes of the logits, exactly.

Notation     One row: s_j the logits, s_min ≤ s_j ≤ s_max; p = e^s/Σe^s; κ_j = κ(s_j), p̃ = κ/Σκ. d is the degree (p in
             the code). ρ(x) = ln κ(x) − x.
Hypotheses   Hfin: finite inputs, at least one key seen · Hpos: κ(s_min) > 0 where d is odd, s_min > −d in K3.
Uses         P1, P2 (test_perturbation.py), K1 (test_linear_transformer.py).
Loose        nowhere.

K2  Statement    κ = T_d. Then κ(x)e^{−x} = Q(d+1, x), the regularised incomplete gamma function, whose derivative is
                 −x^d e^{−x}/d!. (a) d even: κ > 0 and ρ falls everywhere: TV ≤ tanh(¼(ρ(s_min) − ρ(s_max))).
                 (b) d odd: κ > 0 right of its one real zero, where ρ rises to ρ(0) = 0 and falls after it:
                 TV ≤ tanh(¼(M − min(ρ(s_min), ρ(s_max)))), M the largest of ρ: 0 if 0 is between, else that at the
                 nearer end. No smaller constants serve all numbers of keys.
                 (c) Q = 1 − e^{−x}x^{d+1}/(d+1)!·M(1, d+2, x) for x ≥ 0, and 1 ± y^{d+1}/(d+1)!·M(d+1, d+2, y) for
                 y = −x ≥ 0, + for d even: series of positive terms.
    Derivation   1  T_d′ = T_{d−1}, so (T_de^{−x})′ = −x^de^{−x}/d!: never positive for d even, of −x's sign for d odd;
                    it is 1 at 0. For d even T_d has its least value where T_{d−1} = 0: there T_d = x^d/d! > 0.
                    For d odd T_d increases, by T_{d−1} > 0, from −∞ to ∞.
                 2  The weights p̃ are the tilt of p by δ = ρ(s), of span at most the oscillation of ρ: P1.
                 3  (c) integrate (1) from 0: ∫_0^x t^de^{−t}dt/d!, and ∫_0^y u^de^u du/d! with sign (−1)^d for x = −y;
                    expand e^{x−t}, or e^u, and integrate term by term.
    Equality     Two logits, the ends (or 0 and the lower end in (b)), as many copies of each as P1's two weights ask.

K3  Statement    κ = (1 + x/d)^d, x > −d: ρ rises to ρ(0) = 0 and falls after it: the bound of K2(b). If |s| ≤ R < d the
                 span is at most −d ln(1 − R/d) − R.
    Derivation   1  ρ′ = 1/(1 + x/d) − 1. P1 as in K2.
                 2  ρ(R) − ρ(−R) = d·(ln(1+y) − ln(1−y) − 2y) ≥ 0 for y = R/d, so the least of ρ is ρ(−R).
    Equality     As K2.

Features     φ(x)·φ(y) = κ(σ x·y) for φ_α(x) = √c_α(√σx)^α: the multinomial theorem; both forms of the answer are then
             one number, and their gradients too. Where a statement above has no name for it, it is tested as such.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flint import arb, fmpq
from hypothesis import assume, given, settings, target
from hypothesis import strategies as st

from proofs.exact import LIBM, SHARP, Array, Tight, distance, grid, number, row, slack
from refattn import masks, rounding, softmax
from refattn.kernel import _monomials, _polynomials, linear_transformer, polynomial
from refattn.rounding import U, gamma
from refattn.testing import Ball, assert_within
from refattn.testing.strategies import Case, cases

FORMS = st.sampled_from(polynomial.FORMS)
DEGREES = st.integers(1, 8)
ZEROS = {1: -1 + 2**-10, 3: -1.595, 5: -2.18, 7: -2.75}  # right of the real zero of T_d
TERMS = 64  # of the series in (c), for |x| ≤ 4: 4^64/64! < 2^-160


def kappa(x: Fraction, degree: int, form: str) -> Fraction:
    """Return κ(x), exactly."""
    if form == "power":
        return (1 + x / degree) ** degree
    return sum((x**t / math.factorial(t) for t in range(degree + 1)), Fraction(0))


def real(x: Fraction) -> arb:
    return arb(fmpq(x.numerator, x.denominator))


def ratio(x: float, degree: int, form: str) -> arb:
    """Return κ(x)e^{−x}."""
    return real(kappa(Fraction(x), degree, form)) * (-arb(x)).exp()


def matrix(rows: int, columns: int, size: float = 1.5) -> st.SearchStrategy[Array]:
    """Draw a matrix of multiples of 2⁻¹⁰."""
    return row(rows * columns, -size, size).map(lambda x: x.reshape(rows, columns))


# --- K2, K3 -----------------------------------------------------------------------------------------------------------


def moved(logits: Sequence[float], degree: int, form: str) -> arb:
    """Return the total variation between the method's weights and softmax's, q = 1, keys the logits."""
    q, k = Ball.lift([[1.0]]), Ball.lift(np.array(logits)[:, None])
    p = polynomial.weights(q, k, degree=degree, form=form, scale=1.0)
    return distance(p.cells[0], softmax.weights(q, k, scale=1.0).cells[0])


def evaluation(low: float, high: float, degree: int, form: str, bound: float) -> float:
    """Bound what evaluating the bound costs, for |x| ≤ 4.

    A term of the series and the factor before it meet at most H roundings, and log1p of ∓ the integral I turns a
    relative error of I into one of I/Q in ρ; ln T_d − x, right of d + 1 where I > Q, costs no more than H there. For
    the power form x/d is rounded, then log1p, two products and a difference.
    """
    total, H = 0.0, 4 * TERMS + 4 * (degree + 1) + LIBM + 16
    for x in (low, high, min(max(0.0, low), high)):
        q = float(ratio(x, degree, form))
        if form == "power":
            log = abs(degree * math.log1p(x / degree))
            total += gamma(LIBM + 4) * (abs(x) / (1 + x / degree) + abs(x) + log)
        else:
            total += gamma(H) * abs(1 - q) / q + gamma(LIBM) * abs(math.log(q))
    return total / 4 + float(slack(bound, LIBM + 8))


def judge(tight: Tight, logits: Sequence[float], degree: int, form: str) -> float:
    low, high = min(logits), max(logits)
    bound = polynomial.bound_from_logits(low, high, degree=degree, form=form)
    room = evaluation(low, high, degree, form, float(bound))
    return tight("K2" if form == "taylor" else "K3", number(moved(logits, degree, form)), bound, room)


@pytest.mark.parametrize("form", polynomial.FORMS)
@given(data=st.data(), degree=DEGREES)
def test_the_extremes_of_the_logits_bound_the_distance_to_softmax(
    tight: Tight, form: str, data: st.DataObject, degree: int
) -> None:
    least = max(-4.0, 1 / 64 - degree) if form == "power" else ZEROS.get(degree, -4.0)
    logits = data.draw(st.lists(grid(least, 4), min_size=1, max_size=8))
    if data.draw(st.booleans()):  # what is between the extremes makes the worst case milder
        logits = [min(logits) if x < np.mean(logits) else max(logits) for x in logits]
    target(judge(tight, logits, degree, form))


@given(low=grid(-8, 0), degree=DEGREES, form=FORMS)
def test_left_of_the_zero_nothing_is_known(low: float, degree: int, form: str) -> None:
    positive = low > -degree if form == "power" else kappa(Fraction(low), degree, form) > 0
    assert np.isfinite(polynomial.bound_from_logits(low, 1.0, degree=degree, form=form)) == positive


def copies(high: float, low: float, degree: int, form: str) -> list[float]:
    """Two logits, of which the tilt ρ raises the first: as many of each as P1 wants, e^{−Δ/2} : 1 in weights."""
    span = float((ratio(high, degree, form) / ratio(low, degree, form)).log())
    share = Fraction(math.exp(-span / 2 + low - high)).limit_denominator(24)
    one, other = (share or Fraction(1, 24)).as_integer_ratio()
    return [high] * one + [low] * other


@pytest.mark.parametrize(
    ("first", "second", "degree", "form"),
    [
        (-1.0, 1.0, 2, "taylor"),
        (-2.0, 2.0, 2, "taylor"),
        (-0.5, 0.5, 4, "taylor"),
        (-2.0, 1.0, 4, "taylor"),
        (1.0, 3.0, 2, "taylor"),
        (-3.0, -1.0, 4, "taylor"),
        (0.0, -0.75, 1, "taylor"),
        (0.0, -1.0, 3, "taylor"),
        (0.0, 3.0, 3, "taylor"),
        (-0.5, -1.5, 3, "taylor"),
        (0.0, -1.0, 2, "power"),
        (0.0, -3.0, 8, "power"),
        (0.0, 4.0, 3, "power"),
        (1.0, 2.5, 2, "power"),
    ],
)
def test_two_logits_reach_the_bound(tight: Tight, first: float, second: float, degree: int, form: str) -> None:
    assert judge(tight, copies(first, second, degree, form), degree, form) > SHARP


@given(bound=st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0]), degree=DEGREES)
def test_a_bound_on_the_size_of_the_logits_gives_the_power_form_its_span(bound: float, degree: int) -> None:
    assume(bound < degree)
    span = -degree * (1 - arb(bound) / degree).log() - arb(bound)
    found = polynomial.bound_from_logits(-bound, bound, degree=degree, form="power")
    assert_within(found, Ball((span / 4).tanh()), evaluation(-bound, bound, degree, "power", float(found)))


TABLE = {  # tanh(Δ/4) for |s| ≤ ½, 1, 2, 4, to the digits shown
    2: ("0.0111", "0.0973", "0.535", "0.943"),
    4: ("0.00014", "0.0057", "0.234", "0.908"),
    6: ("0.00000085", "0.00014", "0.0359", "0.840"),
    8: ("0.0000000030", "0.0000020", "0.0022", "0.689"),
}


@pytest.mark.parametrize("degree", TABLE)
def test_the_table_of_distances_for_bounded_logits(degree: int) -> None:
    for R, digits in zip((0.5, 1.0, 2.0, 4.0), TABLE[degree], strict=True):
        truth = ((ratio(-R, degree, "taylor") / ratio(R, degree, "taylor")).log() / 4).tanh()
        unit = 10.0 ** -len(digits.partition(".")[2])
        assert_within(float(digits), Ball(truth), unit / 2)
        bound = polynomial.bound_from_logits(-R, R, degree=degree)
        assert_within(bound, Ball(truth), evaluation(-R, R, degree, "taylor", float(bound)))


@given(low=st.floats(-690, 60), high=st.floats(-690, 600), degree=st.integers(1, 24), form=FORMS)
def test_far_logits_have_the_bound_that_they_should(low: float, high: float, degree: int, form: str) -> None:
    """Against balls, on all of the domain, charged as `evaluation` says but more coarsely.

    The series has at most 2|x| + 60 terms, so H ≤ 12|low| + 4d + 540 even with the 3(d + 1) roundings before it. An
    error of ρ is H·I/Q ≤ H/Q, or H where I only adds to 1; that of the power form less than H/(1 + x/d) ≤ 3H/Q; and
    that of a difference of logarithms, a few ulp of their sizes. Both numbers are between 0 and 1.
    """
    assume(low <= high)
    bound = float(polynomial.bound_from_logits(low, high, degree=degree, form=form))
    falls = form == "taylor" and degree % 2 == 0
    assume(not (form == "power" and low <= -degree) and kappa(Fraction(low), degree, form) > 0)
    ends = [ratio(x, degree, form) for x in (low if falls else min(max(0.0, low), high), low, high)]
    span = (ends[0] / ends[2]).log() if falls else (ends[0] / ends[1]).log().max((ends[0] / ends[2]).log())
    steep = 3.0 if falls else 3 / min(map(float, ends))
    size = abs(low) + abs(high) + degree * (1 + math.log(1 + abs(low) + abs(high)))
    room = 3 * (gamma(12 * abs(low) + 4 * degree + 540) * steep + gamma(LIBM + 8) * size) / 4
    assert_within(bound, Ball((span / 4).tanh()), min(room + float(slack(bound, LIBM + 8)), 1.0))


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)])
def test_logits_out_of_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low"):
        polynomial.bound_from_logits(low, high)


def test_the_lagrange_remainder_is_the_bound_is_false() -> None:
    """It bounds |T_d/e^s − 1| by e^{2R}R^{d+1}/(d+1)!: 73 for d = 2, R = 2, of a distance that is below .54."""
    R, degree = 2.0, 2
    lagrange = math.exp(2 * R) * R ** (degree + 1) / math.factorial(degree + 1)
    assert lagrange > 72 and polynomial.bound_from_logits(-R, R, degree=degree) < 0.54


def test_odd_order_is_better_than_the_even_one_below_is_false() -> None:
    """Logits 0 and −2: T_3(−2) = −1/3, so the weights are 3/2 and −1/2; T_2(−2) = 1 gives halves, which are nearer."""
    assert kappa(Fraction(-2), 3, "taylor") == Fraction(-1, 3) and kappa(Fraction(-8, 5), 3, "taylor") < 0
    q, k = Ball.lift([[1.0]]), Ball.lift([[0.0], [-2.0]])
    assert polynomial.weights(q, k, degree=3, scale=1.0).cells[0, 1].overlaps(real(Fraction(-1, 2)))
    assert number(moved([0.0, -2.0], 3, "taylor")) > 0.6 > 0.4 > number(moved([0.0, -2.0], 2, "taylor"))


def test_more_terms_are_always_nearer_is_false() -> None:
    """Far logits count by |s| in an even degree: the key at −8 outweighs the one at 4, by 25 : 13, then by 110 : 34."""
    near, far = (number(moved([4.0, -8.0], degree, "taylor")) for degree in (2, 4))
    assert far > 0.76 > 0.66 > near


# --- K1, as the code has it -------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(case=cases(polynomial, least=1, most=5))
def test_the_spread_of_the_log_ratio_bounds_the_error(tight: Tight, case: Case) -> None:
    target(judge_spread(tight, case))


def judge_spread(tight: Tight, case: Case) -> float:
    """Judge `bound`: what evaluating it costs is `claim_logits`, and õ where the values' end is nearer."""
    positional, named = case.arguments()
    balls = case.given(**{name: Ball.lift(x) for name, x in case.arrays.items()})
    error = np.vectorize(lambda x, y: number(abs(x - y)), otypes=[float])(balls.attend().cells, balls.exact().cells)
    logits = polynomial.claim_logits(*positional[:2], **named)[:, None]
    bound, reach = case.bound(), np.ptp(case.arrays["v"], axis=0)
    room = rounding.allowance(polynomial.attend, *positional, **named) + (logits / 2 + LIBM * U) * reach
    return tight("K1", error, bound, room + slack(bound, 8))


@given(logits=st.lists(grid(-16, 4), min_size=1, max_size=6), degree=st.sampled_from([2, 4, 8, 12]), form=FORMS)
def test_the_logarithm_of_the_kernel_is_as_far_off_as_the_claim_is_charged(
    logits: list[float], degree: int, form: Any
) -> None:
    """T_12 cancels to about e^−4 of its terms near s = −4; so does 1 + s/d, near its zero."""
    assume(form == "taylor" or -degree not in logits)
    s = np.array(logits)
    values = _polynomials.kernel(degree, form, s)
    truth = [real(kappa(Fraction(x), degree, form)).log() - arb(x) for x in logits]
    charged = polynomial.claim_logits([[1.0]], s[:, None], degree=degree, form=form, scale=1.0)
    assert_within(np.log(values) - s, Ball(np.array(truth, object)), charged)


def test_what_overflows_is_charged_everything() -> None:
    with np.errstate(over="ignore"):
        assert polynomial.claim_logits([[1e200]], [[1e200]]) == np.inf


def test_two_keys_reach_it(tight: Tight) -> None:
    k = np.array(copies(-2.0, 2.0, 2, "taylor"))[:, None]
    arrays = {"q": np.ones((1, 1)), "k": k, "v": (k < 0).astype(float)}
    case = Case(polynomial, {}, arrays, {"degree": 2, "mask": None, "scale": 1.0})
    assert judge_spread(tight, case) > SHARP


# --- the answer, both forms -------------------------------------------------------------------------------------------


rational = st.integers(-24, 24).map(lambda n: n / 8)


@given(data=st.data(), n=st.integers(1, 4), depth=st.integers(1, 3), degree=st.integers(1, 7), form=FORMS)
def test_the_answer_is_the_quotient_of_rationals(
    data: st.DataObject, n: int, depth: int, degree: int, form: Any
) -> None:
    def draw(*shape: int) -> Array:
        return np.reshape(data.draw(st.lists(rational, min_size=math.prod(shape), max_size=math.prod(shape))), shape)

    q, k, v = draw(1, depth), draw(n, depth), draw(n, 1)
    weights = [kappa(Fraction(float(q[0] @ key)) / 2, degree, form) for key in k]  # dot products of eighths are exact
    assume(sum(weights) != 0)
    exact = sum(w * Fraction(float(x)) for w, x in zip(weights, v[:, 0], strict=True)) / sum(weights)
    o = polynomial.attend(*map(Ball.lift, (q, k, v)), degree=degree, form=form, scale=0.5)
    p = polynomial.weights(*map(Ball.lift, (q, k)), degree=degree, form=form, scale=0.5)
    assert o.cells[0, 0].overlaps(real(exact))
    assert all(x.overlaps(real(w / sum(weights))) for x, w in zip(p.cells[0], weights, strict=True))
    allowed = rounding.allowance(polynomial.attend, q, k, v, degree=degree, form=form, scale=0.5)
    assume(np.isfinite(allowed).all())
    assert_within(polynomial.attend(q, k, v, degree=degree, form=form, scale=0.5), o, allowed)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), degree=st.integers(1, 5), form=FORMS, scale=st.sampled_from([None, 1.0, -0.5]))
def test_gradients_are_directional_derivatives_in_every_degree_and_form(
    seed: int, degree: int, form: Any, scale: float | None
) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (np.round(16 * rng.standard_normal(s)) / 16 for s in ((3, 2), (4, 2), (4, 1)))
    options = {"degree": degree, "form": form, "scale": scale, "mask": masks.causal()}
    judge_gradients(polynomial.vjp, polynomial.attend, q, k, v, options)


def judge_gradients(
    vjp: Callable[..., Any], attend: Callable[..., Any], q: Array, k: Array, v: Array, options: dict[str, Any]
) -> None:
    """Judge gradients along one direction each, where running error analysis knows the denominators' signs."""
    do = np.ones((len(q), v.shape[1]))
    room = rounding.allowance(vjp, do, q, k, v, **options)
    assume(all(np.isfinite(x).all() for x in room))
    rng = np.random.default_rng(0)
    for at, (g, allowed) in enumerate(zip(vjp(do, q, k, v, **options), room, strict=True)):
        direction = rng.integers(-2, 3, g.shape).astype(float)
        arrays = [Ball.along(x, direction) if n == at else Ball.lift(x) for n, x in enumerate((q, k, v))]
        truth = (attend(*arrays, **options).derivative() * do).sum()
        along = (Ball.lift(g) * direction).sum()
        assert_within(0.0, along - truth, (allowed * abs(direction)).sum() * rounding.EVALUATION)


def test_a_row_whose_weights_are_all_zero_is_not_a_number() -> None:
    """(1 + s/2)² is 0 at s = −2: 0/0, where T_2 = 1 − 2 + 2."""
    with np.errstate(invalid="ignore"):
        assert np.isnan(polynomial.attend([[1.0]], [[-2.0]], [[3.0]], form="power"))
    assert polynomial.attend([[1.0]], [[-2.0]], [[3.0]]) == 3


# --- features ---------------------------------------------------------------------------------------------------------


@given(data=st.data(), depth=st.integers(1, 4), degree=st.integers(1, 5), form=FORMS)
def test_products_of_monomials_are_the_kernel(data: st.DataObject, depth: int, degree: int, form: str) -> None:
    number_ = st.builds(Fraction, st.integers(-9, 9), st.integers(1, 9))
    x, y = (data.draw(st.lists(number_, min_size=depth, max_size=depth)) for _ in range(2))
    c = _monomials.coefficients(degree, depth, form)
    assert len(c) == math.comb(depth + degree, degree)

    def power(z: list[Fraction], alpha: tuple[int, ...]) -> Fraction:
        return math.prod((z[n] for n in alpha), start=Fraction(1))

    total = sum(weight * power(x, alpha) * power(y, alpha) for alpha, weight in c.items())
    assert total == kappa(sum(a * b for a, b in zip(x, y, strict=True)), degree, form)


@settings(max_examples=40)
@given(
    data=st.data(),
    depth=st.integers(1, 3),
    degree=st.integers(1, 5),
    form=FORMS,
    scale=st.sampled_from([None, 0.75]),
    mask=st.sampled_from([None, masks.causal()]),
)
def test_the_kernel_form_and_the_feature_form_are_one_answer(
    data: st.DataObject, depth: int, degree: int, form: Any, scale: float | None, mask: Any
) -> None:
    q, k, v = data.draw(matrix(3, depth)), data.draw(matrix(4, depth)), data.draw(matrix(4, 2))
    kernel = {"degree": degree, "form": form, "scale": scale, "mask": mask}
    feature = {"feature_map": polynomial.feature_map(degree, depth, form=form, scale=scale), "mask": mask}
    do = np.ones((3, 2))
    ways = ((polynomial, kernel), (linear_transformer, feature))
    rooms = [rounding.allowance(method.vjp, do, q, k, v, **options) for method, options in ways]
    allowed = sum(rounding.allowance(method.attend, q, k, v, **options) for method, options in ways)
    assume(np.isfinite(allowed).all() and all(np.isfinite(x).all() for room in rooms for x in room))
    one, other = (method.attend(*map(Ball.lift, (q, k, v)), **options) for method, options in ways)
    assert all(x.contains(0) and float(x.rad()) < 2.0**-60 for x in (one - other).cells.flat)
    assert_within(*(method.attend(q, k, v, **options) for method, options in ways), allowed)
    gradients = [method.vjp(do, q, k, v, **options) for method, options in ways]
    for a, b, x, y in zip(*gradients, *rooms, strict=True):
        assert_within(a, b, x + y)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), degree=st.integers(1, 4), form=FORMS)
def test_features_pull_back_as_their_directional_derivative(seed: int, degree: int, form: Any) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (np.round(16 * rng.standard_normal(s)) / 16 for s in ((2, 2), (3, 2), (3, 1)))
    options = {"feature_map": polynomial.feature_map(degree, 2, form=form)}
    judge_gradients(linear_transformer.vjp, linear_transformer.attend, q, k, v, options)


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("degree", (0, 1), {}),
        ("degree", (19, 1), {}),
        ("depth", (2, 0), {}),
        ("scale", (2, 1), {"scale": -1.0}),
        ("form", (2, 1), {"form": "hermite"}),
    ],
)
def test_features_that_do_not_exist_are_refused(name: str, arguments: tuple[int, int], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        polynomial.feature_map(*arguments, **options)


def test_features_of_another_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="feature_map"):
        linear_transformer.attend(*np.ones((3, 2, 2)), feature_map=polynomial.feature_map(2, 3))
