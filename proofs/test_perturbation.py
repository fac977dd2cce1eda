r"""The lemmas of `refattn.perturbation` bound what they say they bound, and no constant in them can be smaller.

Notation     One row: weights p_j > 0 with Σp_j = 1, values v_j of one column, o = Σp_jv_j, x_j = v_j − o. A tilt is
             p' ∝ p·e^δ, o' = Σp'_jv_j; Δ = osc δ = max δ − min δ, E = e^Δ, r_j = p'_j/p_j.
             TV(p, p') = ½Σ|p'_j − p_j| = max over sets A of p'(A) − p(A). logit y = ln(y/(1−y)), expit its inverse.
Hypotheses   Hfin: p, v, δ finite, at least one key. Nothing else unless a statement says so.
Uses         nothing: every other proof file uses these.
Loose        nowhere: each statement has a case of equality, and the tests reach it.

P1  Statement    |logit p'(A) − logit p(A)| ≤ Δ for every set A of keys. Hence (a) TV ≤ tanh(Δ/4); (b) p'(A) is between
                 expit(logit p(A) ∓ Δ); (c) e^−Δ ≤ r_j ≤ e^Δ; (d) |δ_j| ≤ ε gives TV ≤ tanh(ε/2); and, for any
                 two weights, (e) a ≤ r ≤ b gives TV ≤ (1−a)(b−1)/(b−a).
    Derivation   1  p'(A)/p'(Aᶜ) = p(A)/p(Aᶜ) · E_p[e^δ|A]/E_p[e^δ|Aᶜ]; both means lie in [e^min δ, e^max δ], so the
                    last ratio lies in [e^−Δ, e^Δ]. This is (b); A = {j} and r_j = e^δ_j/E_p[e^δ] give (c).
                 2  For A = {p' > p}: TV = p'(A) − p(A) ≤ sup_y expit(y + Δ) − expit(y). The derivative vanishes where
                    y + Δ = −y: the value is 2·expit(Δ/2) − 1 = tanh(Δ/4). This is (a); (d) is Δ ≤ 2ε.
                 3  (e) The chord of (r − 1)₊ over [a, b] lies above it: (r − 1)₊ ≤ (r − a)(b − 1)/(b − a). Its mean
                    under p is TV on the left, and on the right, as E_p r = 1, the bound.
    Equality     (a) p = (t, 1−t), t = 1/(1+e^{Δ/2}), δ = (Δ, 0). (b), (c) δ = Δ on A, 0 elsewhere ((c): p(A) → 0).
                 (e) r two-valued.

P2  Statement    |o' − o| ≤ TV(p, p')·(max v − min v) for any p, p' on the same keys; and if õ is any number,
                 |õ − o| ≤ max(max v − õ, õ − min v).
    Derivation   p' − p = TV·(μ₊ − μ₋) with probability vectors μ±; means of v under them differ by at most the range.
                 The second: o lies in [min v, max v].
    Equality     v = 1 on {p' > p}, 0 elsewhere; all weight on one extreme key.

P3  Statement    (a) |o'−o| ≤ sinh(Δ/2)·sd_p(v). (b) |o'−o| ≤ ½(E−1)·Σp_j|x_j|. (c) sup(o'−o) over tilts of span Δ is
                 t₊ of P4 for error bars Δ/2. (d) |o' − o − Cov_p(δ, v)| ≤ Δ²·range(v)/(12√3).
    Derivation   1  o' − o = Σp_jr_jx_j = Cov_p(r, v), E_p r = 1, r ∈ [a, b] with b ≤ aE and a ≤ 1 ≤ b.
                 2  (a) Var_p r ≤ (b−1)(1−a) (Bhatia & Davis 2000) ≤ (aE−1)(1−a), greatest at a = (E+1)/(2E), where it
                    is (E−1)²/(4E) = sinh²(Δ/2). Cauchy–Schwarz.
                 3  (b) As Σp_jx_j = 0, Cov = Σp_j(r_j − (a+b)/2)x_j ≤ ½(b−a)Σp_j|x_j|, and b − a ≤ a(E−1) ≤ E − 1.
                 4  (c) Constants do not matter to softmax: span ≤ Δ is |δ_j| ≤ Δ/2 after a shift.
                 5  (d) Along p_τ ∝ pe^{τδ} the second derivative of o is κ = E_τ[(δ−E_τδ)²(v−E_τv)], so the remainder
                    is ∫₀¹(1−τ)κ dτ and it is enough that |κ| ≤ Δ²·range(v)/(6√3). Scale to δ ∈ [0, 1]. κ is linear in
                    v: take v = 1_A, P(A) = t, conditional means a, b of δ on A, Aᶜ, and μ = ta + (1−t)b its mean.
                    −κ is the case of Aᶜ, so only an upper bound is needed. E[(δ−μ)²|A] ≤ (a−μ)² + a(1−a) and
                    E[(δ−μ)²|Aᶜ] ≥ (b−μ)² give κ ≤ t(1−t)[a(1−a) + (1−2t)(a−b)²].
                    t ≥ ½: at most t(1−t)/4 ≤ 1/16. t < ½: δ → 1−δ changes nothing, so a ≥ ½, (a−b)² ≤ a², and
                    κ ≤ t(1−t)(a − 2ta²). If t ≥ ¼ this is at most (1−t)/8 ≤ 3/32 (at a = 1/(4t)); if t < ¼, at most
                    t(1−t)(1−2t) (at a = 1) ≤ 1/(6√3), reached at t = (3−√3)/6.
    Equality     (a) two keys, r = (1+E)/2 and (1+E)/(2E). (b) v = 1_A, δ = Δ·1_A, p(A) → 0.
                 (d) v = 1_A, δ = Δ·1_A, p(A) = (3−√3)/6, Δ → 0.

P4  Statement    If |δ_j| ≤ ε_j, the exact range of o' − o is [t₋, t₊]: t₊ is the largest, over the ways to cut the keys
                 in order of value, of Σp_je^{δ_j}x_j/Σp_je^{δ_j} with δ = −ε below the cut and ε above. Closed form:
                 |o' − o| ≤ Σp_j(e^{ε_j}−1)|x_j| / Σp_je^{−ε_j}.
    Derivation   1  o' − o ≤ t iff Σp_je^{δ_j}(x_j − t) ≤ 0; the left is greatest for δ_j = ε_j·sgn(x_j − t), a cut. So
                    the supremum is reached at a cut, and every cut is a δ in the box: the largest cut is the supremum.
                 2  o' − o = Σp_j(e^{δ_j}−1)x_j/Σp_je^{δ_j}, and |e^δ−1| ≤ e^ε−1.
    Equality     always at a corner of the box; closed form: ε → 0.

P5  Statement    Unnormalised weights ŵ_j = w_j(1+θ_j), |θ_j| ≤ ε < 1: TV ≤ ε/(1+√(1−ε²)).
    Derivation   δ = ln(1+θ) has span ≤ ln((1+ε)/(1−ε)) = 2·artanh ε; P1: tanh(½ artanh ε) = ε/(1+√(1−ε²)).
    Equality     P1's two keys with θ = (ε, −ε).

P6  Statement    E_pδ ≤ lse' − lse ≤ E_{p'}δ; and if |δ_j| ≤ ε_j, lse' − lse fills [ln Σp_je^{−ε_j}, ln Σp_je^{ε_j}].
    Derivation   lse' − lse = ln Σp_je^{δ_j}: convex in δ with gradient p at 0 and p' at δ, and increasing in each δ_j.
    Equality     constant δ; the corners.

P10 Statement    Keep a set of mass 1−ρ, then move the kept weights by TV τ: TV(p, p') ≤ 1 − (1−ρ)(1−τ). If that move is
                 a tilt of span Δ: TV ≤ (1−rg)²/(1−g²) with r = √(1−ρ), g = e^{−Δ/2}, if g < r, and TV ≤ ρ if g ≥ r.
                 Spans of successive tilts add.
    Derivation   1  1 − TV = Σmin(p, p') = Σmin((1−ρ)p_S, p') ≥ (1−ρ)Σmin(p_S, p') = (1−ρ)(1−τ).
                 2  TV = p'(A) − (1−ρ)p_S(A) for A = {p' > p}, within the kept keys. With odds y = p_S(A)/p_S(Aᶜ) and
                    P1(b), TV ≤ f(y) = Ey/(1+Ey) − r²y/(1+y). f' = 0 where √E(1+y) = r(1+Ey), that is
                    y = (1−rg)/(r/g−1), where f = (1−rg)²/(1−g²). If r ≤ g there is no such y, f increases, and
                    f(∞) = 1 − r² = ρ. At ρ = 0 this is P1(a): (1−g)/(1+g) = tanh(Δ/4).
                 3  The second is not above the first: it is the supremum of a smaller set.
    Equality     p' empties every key that loses (first); two kept keys of odds y, the first raised by Δ (second).

Numbers are drawn, judged and charged for rounding as `proofs/exact.py` says.
"""

import itertools
import math

import numpy as np
import pytest
from flint import arb
from hypothesis import given, target
from hypothesis import strategies as st

from proofs.exact import (
    LIBM,
    SHARP,
    SPANS,
    Array,
    Tight,
    Tilt,
    centring,
    change,
    distance,
    dot,
    exact,
    grid,
    highest,
    number,
    on_grid,
    row,
    slack,
    span_of,
    tilted,
    tilts,
    two_keys,
    weights,
)
from refattn import perturbation as pt
from refattn.rounding import gamma

# --- P1 ---------------------------------------------------------------------------------------------------------------


def judge_tilt(tight: Tight, case: Tilt) -> float:
    """Judge P1(a)."""
    bound = pt.tilt_total_variation(case.span)
    return tight("P1", number(distance(exact(case.p), tilted(case.p, case.delta))), bound, slack(bound, LIBM))


@given(case=tilts())
def test_a_tilt_moves_weights_by_at_most_tanh_of_a_quarter_of_its_span(tight: Tight, case: Tilt) -> None:
    target(judge_tilt(tight, case))


@pytest.mark.parametrize("span", SPANS)
def test_two_keys_move_by_tanh_of_a_quarter_of_the_span(tight: Tight, span: float) -> None:
    assert judge_tilt(tight, two_keys(1 / (1 + np.exp(span / 2)), span)) > SHARP


@given(case=tilts(), chosen=st.integers(1, 2**12))
def test_log_odds_of_every_set_of_keys_move_by_at_most_the_span(tight: Tight, case: Tilt, chosen: int) -> None:
    inside = (chosen >> np.arange(len(case.p))) & 1 == 1
    mass = float(case.p[inside].sum())
    moved = number(dot(tilted(case.p, case.delta), exact(inside)) - arb(mass))
    low, high = pt.weight_interval(mass, case.span)
    rounding = slack(high, LIBM + 5)
    up = tight("P1", max(moved, 0.0), high - mass, rounding)
    target(max(up, tight("P1", max(-moved, 0.0), mass - low, rounding)))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("mass", [2.0**-30, 0.25, 0.75])
def test_a_key_that_moves_alone_reaches_both_ends(tight: Tight, span: float, mass: float) -> None:
    for sign in (1.0, -1.0):
        case = two_keys(mass, sign * span)
        low, high = pt.weight_interval(mass, span)
        moved = abs(tilted(case.p, case.delta)[0] - arb(mass))
        bound = high - mass if sign > 0 else mass - low
        ratio = tight("P1", number(moved), bound, slack(high, LIBM + 5))
        assert ratio > SHARP or bound <= slack(high, LIBM + 5) / (1 - SHARP)


@given(case=tilts())
def test_no_weight_changes_by_more_than_a_factor_of_the_exponential_of_the_span(tight: Tight, case: Tilt) -> None:
    factors = [abs((b / a).log()) for a, b in zip(exact(case.p), tilted(case.p, case.delta), strict=True)]
    target(tight("P1", number(highest(factors)), case.span, slack(case.span, 1)))


@given(case=tilts(), other=st.data())
def test_ratios_of_any_two_weights_bound_their_distance(tight: Tight, case: Tilt, other: st.DataObject) -> None:
    moved = exact(other.draw(weights(len(case.p)))) if other.draw(st.booleans()) else tilted(case.p, case.delta)
    ratios = [b / a for a, b in zip(exact(case.p), moved, strict=True)]
    low, high = min(number(-highest([-a for a in ratios])), 1.0), max(number(highest(ratios)), 1.0)
    bound = pt.total_variation_from_ratios(low, high)
    # moving a or b by one rounding moves the bound by (part)² of it, part the share of the other in the harmonic mean
    share = (high - 1) / (high - low) if high > low else 0.0
    rounding = slack(bound, 5) + gamma(1) * (low * share**2 + high * (1 - share) ** 2)
    target(tight("P1", number(distance(exact(case.p), moved)), bound, rounding))


def test_ratios_of_two_values_reach_the_bound(tight: Tight) -> None:
    p, moved = exact([0.75, 0.25]), exact([0.5, 0.5])
    bound = pt.total_variation_from_ratios(2 / 3, 2.0)
    assert tight("P1", number(distance(p, moved)), bound, slack(bound, 7)) > SHARP


def test_half_of_the_exponential_minus_one_is_sharp_is_false() -> None:
    """The usual TV ≤ (e^Δ−1)/2 says .859 at Δ = 1; no weights reach .245, by P1 and by trying them."""
    t = np.arange(1, 4096) / 4096
    _, high = pt.weight_interval(t, 1.0)
    assert (np.e - 1) / 2 > 0.859
    assert 0.2449 < (high - t).max() < 0.245


def test_a_quarter_of_the_span_is_sharp_beyond_first_order_is_false() -> None:
    t = np.arange(1, 4096) / 4096
    _, high = pt.weight_interval(t, 4.0)
    assert (high - t).max() < 0.77 < 4.0 / 4


# --- P2 ---------------------------------------------------------------------------------------------------------------


@given(case=tilts(), other=st.data())
def test_outputs_differ_by_at_most_the_distance_of_the_weights_times_the_range(
    tight: Tight, case: Tilt, other: st.DataObject
) -> None:
    p2 = exact(other.draw(weights(len(case.p))))
    p, v = exact(case.p), exact(case.v)
    bound = number(distance(p, p2)) * pt.spread(case.v[:, None])[0, 0]
    target(tight("P2", number(abs(dot(p2, v) - dot(p, v))), bound, slack(bound, 3)))
    looked = np.array([float(a > b) for a, b in zip(p2, p, strict=True)])
    bound = number(distance(p, p2)) * pt.spread(looked[:, None])[0, 0]
    assert (
        tight("P2", number(dot(p2, exact(looked)) - dot(p, exact(looked))), bound, slack(bound, 3)) > SHARP or not bound
    )


@given(case=tilts(), o=grid(-5, 15))
def test_no_answer_is_further_off_than_the_farther_end_of_the_values(tight: Tight, case: Tilt, o: float) -> None:
    bound = pt.trivial(case.v[:, None], [[o]])[0, 0]
    target(tight("P2", number(abs(arb(o) - dot(exact(case.p), exact(case.v)))), bound, slack(bound, 1)))


@given(case=tilts(), seen=st.integers(0, 2**12 - 1))
def test_the_range_is_that_of_the_keys_seen(case: Tilt, seen: int) -> None:
    keep = (seen >> np.arange(len(case.v))) & 1 == 1
    hidden = np.where(keep, case.v, np.nan)[:, None]
    assert pt.spread(hidden, keep[None])[0, 0] == (np.ptp(case.v[keep]) if keep.any() else 0.0)


# --- P3 ---------------------------------------------------------------------------------------------------------------


def judge_deviation(tight: Tight, case: Tilt) -> float:
    """Judge P3(a)."""
    bound = pt.tilt_by_deviation(case.p, case.v, case.span)
    rounding = slack(bound, len(case.p) + LIBM + 6) + np.sinh(case.span / 2) * centring(case.p, case.v)
    return tight("P3a", number(abs(change(case))), bound, rounding)


def judge_mean_deviation(tight: Tight, case: Tilt) -> float:
    """Judge P3(b)."""
    bound = pt.tilt_by_mean_deviation(case.p, case.v, case.span)
    rounding = slack(bound, len(case.p) + LIBM + 4) + np.expm1(case.span) * centring(case.p, case.v)
    return tight("P3b", number(abs(change(case))), bound, rounding)


def judge_first_order(tight: Tight, case: Tilt) -> float:
    """Judge P3(d)."""
    p, v, delta, span = case
    first, radius = pt.tilt_first_order(p, v, delta)
    x, slope = np.abs(v - p @ v), np.abs(delta - p @ delta)
    rounding = (
        slack(radius, 8)
        + slack(np.sum(p * slope * x), len(p) + 4)
        + centring(p, v) * span
        + centring(p, delta) * (x.max() + centring(p, v))
    )
    return tight("P3d", number(abs(change(case) - arb(float(first)))), radius, rounding)


@given(case=tilts())
def test_the_deviations_of_the_values_bound_the_change(tight: Tight, case: Tilt) -> None:
    target(judge_deviation(tight, case), label="standard deviation")
    target(judge_mean_deviation(tight, case), label="mean absolute deviation")


@given(case=tilts())
def test_the_covariance_is_the_change_up_to_the_squared_span(tight: Tight, case: Tilt) -> None:
    target(judge_first_order(tight, case))


@pytest.mark.parametrize("span", SPANS[:-1])
def test_two_keys_reach_the_standard_deviation_bound(tight: Tight, span: float) -> None:
    assert judge_deviation(tight, two_keys(1 / (1 + np.exp(span)), span)) > SHARP


@pytest.mark.parametrize("span", SPANS[1:-1])
def test_a_rare_key_reaches_the_mean_deviation_bound(tight: Tight, span: float) -> None:
    assert judge_mean_deviation(tight, two_keys(2.0**-30, span)) > SHARP


def test_a_small_tilt_of_a_fifth_of_the_weight_reaches_the_second_order_bound(tight: Tight) -> None:
    assert judge_first_order(tight, two_keys((3 - math.sqrt(3)) / 6, 2.0**-16)) > SHARP


# --- P3(c), P4 --------------------------------------------------------------------------------------------------------


def corners(p: Array, v: Array, error: Array) -> list[arb]:
    """Return o' − o at every corner of the box."""
    signs = itertools.product((-1.0, 1.0), repeat=len(p))
    return [change(Tilt(p, v, error * np.array(s), 0.0)) for s in signs]


def box_rounding(p: Array, v: Array, error: Array) -> float:
    """Charge two sums of at most 2n terms, their exponentials, and the mean, against the size of the values."""
    roundings = 4 * len(p) + 2 * (LIBM + 4 + 2 * math.ceil(error.max())) + 3
    return float(gamma(roundings) * np.abs(v - p @ v).max() + 2 * centring(p, v))


@given(case=tilts(most=6), wider=st.data())
def test_the_box_interval_is_reached_at_a_corner_and_never_left(tight: Tight, case: Tilt, wider: st.DataObject) -> None:
    error = wider.draw(row(len(case.p), 0, 2))
    low, high = map(float, pt.box_interval(case.p, case.v, error))
    rounding = box_rounding(case.p, case.v, error)
    ends = corners(case.p, case.v, error)
    top, bottom = number(highest(ends)), number(highest([-a for a in ends]))
    target(tight("P4", [top, bottom], [high, -low], rounding))
    tight("P4", [high, -low], [top, bottom], rounding)


@given(case=tilts(), wider=st.data())
def test_error_bars_on_logits_bound_the_change(tight: Tight, case: Tilt, wider: st.DataObject) -> None:
    p, v, delta, _ = case
    error = delta * wider.draw(st.sampled_from([1.0, 1.125]))
    moved = number(change(case))
    low, high = pt.box_interval(p, v, error)
    rounding = box_rounding(p, v, error)
    tight("P4", [max(moved, 0.0), max(-moved, 0.0)], [high, -low], rounding)
    closed = pt.box_output(p, v, error)
    lipschitz = np.sum(p * np.expm1(error)) / np.sum(p * np.exp(-error))
    closed_rounding = slack(closed, 2 * (len(p) + LIBM) + 5) + lipschitz * centring(p, v)
    target(tight("P4", abs(moved), closed, closed_rounding))
    assert max(high, -low) <= closed + closed_rounding + rounding


@given(case=tilts())
def test_the_interval_of_a_span_is_inside_every_other_bound(tight: Tight, case: Tilt) -> None:
    p, v, _, span = case
    low, high = pt.box_interval(p, v, span / 2)
    rounding = box_rounding(p, v, np.array([span]))
    moved = number(change(case))
    target(tight("P3c", [max(moved, 0.0), max(-moved, 0.0)], [high, -low], rounding))
    x = centring(p, v)
    for bound, charged in (
        (pt.tilt_total_variation(span) * np.ptp(v), 0.0),
        (pt.tilt_by_deviation(p, v, span), np.sinh(span / 2) * x),
        (pt.tilt_by_mean_deviation(p, v, span), np.expm1(span) * x),
    ):
        assert max(high, -low) <= bound + rounding + charged + slack(bound, len(p) + LIBM + 6)


def test_small_error_bars_reach_the_closed_form(tight: Tight) -> None:
    p, v, error = np.array([0.5, 0.5]), np.array([1.0, 0.0]), 2.0**-10
    bound = pt.box_output(p, v, [error, error])
    moved = number(change(Tilt(p, v, np.array([error, -error]), 0.0)))
    assert tight("P4", moved, bound, slack(bound, 2 * LIBM + 9)) > SHARP


# --- P5, P6 -----------------------------------------------------------------------------------------------------------


@given(case=tilts(), error=grid(0, 1), theta=st.data())
def test_relative_errors_of_weights_bound_their_distance(
    tight: Tight, case: Tilt, error: float, theta: st.DataObject
) -> None:
    errors = error * theta.draw(row(len(case.p), -1, 1))
    w = [a * (1 + t) for a, t in zip(exact(case.p), exact(errors), strict=True)]
    z = sum(w, arb(0))
    if z > 0:
        bound = pt.relative_total_variation(error)
        target(tight("P5", number(distance(exact(case.p), [a / z for a in w])), bound, slack(bound, 7)))


@pytest.mark.parametrize("error", [2.0**-40, 2.0**-10, 0.5, 0.96875])
def test_two_keys_with_opposite_relative_errors_reach_it(tight: Tight, error: float) -> None:
    p = on_grid(np.array([math.sqrt(1 - error), math.sqrt(1 + error)]), 52)
    w = [a * t for a, t in zip(exact(p), exact([1 + error, 1 - error]), strict=True)]
    bound = pt.relative_total_variation(error)
    moved = distance(exact(p), [a / sum(w, arb(0)) for a in w])
    assert tight("P5", number(moved), bound, slack(bound, 7)) > SHARP


def test_the_error_over_its_complement_is_sharp_is_false() -> None:
    """The usual TV ≤ ε/(1−ε) says 1 at ε = ½, that is nothing; no two weights reach .27."""
    t = np.arange(1, 4096) / 4096
    moved = t * 1.5 / (t * 1.5 + (1 - t) * 0.5) - t
    assert 0.26 < moved.max() <= pt.relative_total_variation(0.5) < 0.27 < 0.5 / (1 - 0.5)


@given(case=tilts())
def test_the_log_sum_exp_moves_between_the_two_means_of_the_tilt(tight: Tight, case: Tilt) -> None:
    delta = exact(case.delta)
    moved = dot(exact(case.p), [d.exp() for d in delta]).log()
    before, after = number(dot(exact(case.p), delta)), number(dot(tilted(case.p, case.delta), delta))
    target(tight("P6", [before, number(moved)], [number(moved), after], slack(after, 2)))


@given(case=tilts())
def test_the_log_sum_exp_fills_the_interval_of_its_error_bars(tight: Tight, case: Tilt) -> None:
    p, delta = exact(case.p), exact(case.delta)
    low, high = pt.lse_interval(case.p, case.delta)
    top = number(dot(p, [d.exp() for d in delta]).log())
    bottom = number(-dot(p, [(-d).exp() for d in delta]).log())
    # an error of the argument y of log1p is divided by 1 + y, at least e^−max ε for the lower end
    rounding = slack(max(high, -low) + np.expm1(case.delta.max()), len(p) + 2 * LIBM + 1)
    target(tight("P6", [top, bottom], [high, -low], rounding))
    tight("P6", [high, -low], [top, bottom], rounding)
    assert max(high, -low) <= case.delta.max() + rounding


# --- P10 --------------------------------------------------------------------------------------------------------------


@given(case=tilts(), choices=st.data())
def test_dropping_then_moving_keeps_at_least_the_product_of_what_each_keeps(
    tight: Tight, case: Tilt, choices: st.DataObject
) -> None:
    n = len(case.p)
    kept = choices.draw(st.integers(1, n))
    dropped = float(case.p[kept:].sum())
    p = exact(case.p)
    restricted = [a / arb(1 - dropped) for a in p[:kept]]
    emptied = choices.draw(st.integers(0, kept - 1))
    w = [arb(0)] * emptied + exact(choices.draw(weights(kept)))[emptied:]
    moved = [a / sum(w, arb(0)) for a in w]
    bound = pt.compose(dropped, number(distance(restricted, moved)))
    target(tight("P10", number(distance(p, [*moved, *[arb(0)] * (n - kept)])), bound, slack(bound, 5)))


def test_emptying_a_key_after_dropping_another_reaches_the_product(tight: Tight) -> None:
    p, moved = exact([0.5, 0.25, 0.25]), exact([1.0, 0.0, 0.0])
    bound = pt.compose(0.25, 1 / 3)
    assert tight("P10", number(distance(p, moved)), bound, slack(bound, 4)) > SHARP


def judge_compose_tilt(tight: Tight, p: Array, delta: Array) -> float:
    """Keep the first len(delta) keys and tilt them."""
    kept, span = len(delta), float(np.ptp(delta))
    dropped = float(p[kept:].sum())
    moved = [*tilted(p[:kept], delta), *[arb(0)] * (len(p) - kept)]
    bound = pt.compose_tilt(dropped, span)
    rounding = slack(bound, 3 * LIBM + 16)
    coarse = pt.compose(dropped, pt.tilt_total_variation(span))
    assert bound <= coarse + rounding + slack(coarse, LIBM + 5)
    return tight("P10", number(distance(exact(p), moved)), bound, rounding)


@given(case=tilts(), kept=st.integers(1, 12))
def test_dropping_then_tilting_costs_less_than_each_alone(tight: Tight, case: Tilt, kept: int) -> None:
    target(judge_compose_tilt(tight, case.p, case.delta[:kept]))


@pytest.mark.parametrize("dropped", [2.0**-20, 0.125, 0.5, 0.875])
@pytest.mark.parametrize("span", [2.0**-10, 1.0, 3.0, 6.0])
def test_two_kept_keys_reach_the_bound_of_dropping_then_tilting(tight: Tight, dropped: float, span: float) -> None:
    r, g = math.sqrt(1 - dropped), math.exp(-span / 2)
    odds = (1 - r * g) / (r / g - 1) if g < r else 2.0**40
    p = np.array([odds / (1 + odds), 1 / (1 + odds)]) * (1 - dropped)
    assert judge_compose_tilt(tight, on_grid(np.array([*p, dropped]), 52), np.array([span, 0.0])) > SHARP


@given(case=tilts(), more=st.data())
def test_spans_of_successive_tilts_add(case: Tilt, more: st.DataObject) -> None:
    second = more.draw(row(len(case.p), 0, 4))
    joint = [a + b for a, b in zip(exact(case.delta), exact(second), strict=True)]
    assert span_of(joint) <= arb(case.span) + arb(float(np.ptp(second)))
