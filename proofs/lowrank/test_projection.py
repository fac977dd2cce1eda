r"""Weights seen through a random projection, and weights that are no longer weights.

Notation     Weights p_j, values v_j of one column, o = Σp_jv_j; range and mid: max − min and half of max + min.
Hypotheses   Hfin: finite numbers, at least one key. L1 is over the draw of R, everything else for every input.
Uses         nothing.
Loose        nowhere.

L1  Statement    R of r rows, independent entries of variance 1/r: p·RᵀR·v has mean p·v and variance
                 (‖p‖²‖v‖² + (p·v)²)/r for normal entries, 2Σp_j²v_j²/r less for random signs; it is further than
                 sd/√η from its mean with probability at most η.
    Derivation   One row g with unit variances: E[(g·p)²(g·v)²] = ‖p‖²‖v‖² + 2(p·v)² + (E g⁴ − 3)Σp_j²v_j²; subtract
                 (p·v)²; rows are independent and averaged. Chebyshev.
    Equality     always (variance); three values, two of them on the radius (Chebyshev).

L4  Statement    Any weights a, signed or not: |Σa_jv_j − o| ≤ ½range(v)·‖a−p‖₁ + |mid(v)|·|Σa_j − 1|.
    Derivation   Σ(a−p)_jv_j = Σ(a−p)_j(v_j − mid) + mid·(Σa_j − 1), |v_j − mid| ≤ ½range(v). No other centre c does
                 better: c + 1 for c changes the second term by at most |Σa_j − 1| ≤ ‖a−p‖₁, the first by ‖a−p‖₁.
    Equality     v at its maximum where a > p, at its minimum elsewhere, mid(v)·(Σa_j − 1) ≥ 0.

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
    SHARP,
    Array,
    Tight,
    Tilt,
    dot,
    exact,
    grid,
    number,
    row,
    slack,
    tilts,
    values,
    weights,
)
from refattn import perturbation as pt
from refattn.rounding import gamma

# --- L1, L4 -----------------------------------------------------------------------------------------------------------


def moments(p: Array, v: Array, rank: int, entries: str) -> tuple[list[tuple[arb, arb]], arb]:
    """Return every value of p·RᵀR·v with its probability, and the standard deviation.

    Random signs are enumerated. The square of the value has degree 4 in a normal entry, so the rule with nodes 0, ±√3
    and weights ⅔, ⅙, ⅙, exact up to degree 5, integrates it exactly (its values are not those of the variable).
    """
    node = arb(3).sqrt()
    rule = [(arb(1), arb(0.5)), (arb(-1), arb(0.5))]
    if entries == "normal":
        rule = [(arb(0), arb(2) / 3), (node, arb(1) / 6), (-node, arb(1) / 6)]
    p_, v_ = exact(p), exact(v)
    found: list[tuple[arb, arb]] = []
    for g in itertools.product(rule, repeat=rank * len(p)):
        rows = [[x for x, _ in g[i * len(p) : (i + 1) * len(p)]] for i in range(rank)]
        probability = arb(1)
        for _, c in g:
            probability *= c
        found.append((sum((dot(x, p_) * dot(x, v_) for x in rows), arb(0)) / rank, probability))
    mean = dot(p_, v_)
    variance = sum((c * (x - mean) ** 2 for x, c in found), arb(0))
    return found, variance.nonnegative_part().sqrt()


@given(
    sizes=st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 2)]),
    entries=st.sampled_from(["normal", "sign"]),
    arrays=st.data(),
)
def test_a_random_projection_has_the_stated_deviation(
    tight: Tight, sizes: tuple[int, int], entries: str, arrays: st.DataObject
) -> None:
    rank, n = sizes
    p, v = arrays.draw(weights(n)), arrays.draw(values(n))
    _, truth = moments(p, v, rank, entries)
    bound = pt.projection_deviation(p, v, rank, entries=entries)
    # signs subtract: the error of the variance is relative to ‖p‖²‖v‖², and a root moves by at most its root
    error = gamma(3 * n + 8) * 4 * np.sum(p * p) * np.sum(v * v) / rank
    rounding = slack(bound, 3) + min(math.sqrt(error), error / bound if bound else math.inf)
    target(tight("L1", number(truth), bound, rounding))
    tight("L1", bound, number(truth), rounding)


@given(n=st.integers(1, 6), delta=grid(1 / 64, 1023 / 1024), arrays=st.data())
def test_random_signs_leave_the_radius_no_more_often_than_stated(
    tight: Tight, n: int, delta: float, arrays: st.DataObject
) -> None:
    p, v = arrays.draw(weights(n)), arrays.draw(values(n))
    found, deviation = moments(p, v, 1, "sign")
    radius = pt.chebyshev_radius(number(deviation), delta)
    far = arb(float(radius + slack(radius, 3)))
    mean = dot(exact(p), exact(v))
    tight("L1", number(sum((c for x, c in found if abs(x - mean) > far), arb(0))), delta)


@pytest.mark.parametrize("delta", [2.0**-20, 0.125, 0.9375])
def test_three_values_sit_on_the_radius(tight: Tight, delta: float) -> None:
    """0 with probability 1 − δ, ±1 with δ/2 each: the deviation is √δ, the radius 1."""
    radius = pt.chebyshev_radius(number(arb(delta).sqrt()), delta)
    assert tight("L1", 1.0, radius, slack(radius, 3)) > SHARP
    assert radius <= 1.0 + slack(radius, 3)


def judge_signed(tight: Tight, p: Array, a: Array, v: Array) -> float:
    """Judge L4."""
    moved = number(abs(dot([x - y for x, y in zip(exact(a), exact(p), strict=True)], exact(v))))
    bound = pt.signed_output(p, a, v)
    # a − p cancels: each difference is rounded relative to itself, their sum relative to ‖a − p‖₁
    rounding = slack(bound, len(p) + 4) + np.abs(v).max() * gamma(len(p) + 1) * np.abs(a - p).sum()
    return tight("L4", moved, bound, rounding)


@given(case=tilts(), arrays=st.data())
def test_signed_weights_are_off_by_at_most_their_distance_and_their_surplus(
    tight: Tight, case: Tilt, arrays: st.DataObject
) -> None:
    target(judge_signed(tight, case.p, arrays.draw(row(len(case.p), -1, 1.5)), case.v))


@given(case=tilts(), arrays=st.data(), low=grid(0, 3))
def test_extreme_values_in_step_with_the_surplus_reach_it(
    tight: Tight, case: Tilt, arrays: st.DataObject, low: float
) -> None:
    a = arrays.draw(row(len(case.p), -1, 1.5))
    up = 1.0 if number(sum(exact(a), arb(0))) >= 1 else -1.0
    v = np.where(a > case.p, low + 1 if up > 0 else -low, low if up > 0 else -low - 1)
    if len(set(v)) == 2:
        assert judge_signed(tight, case.p, a, v) > SHARP
