r"""Keys that are gone had no more and no less mass than what is remembered of their blocks allows: statement S2.

Notation     One row: K the keys that it keeps, D those that it drops, in blocks; L_K, L_D log-sum-exps of its logits;
             ρ = expit(L_D − L_K) the mass of D (S1), expit(x) = 1/(1 + e^−x).
Statement    Block b of n_b keys with mean c and x_j = σq·(k_j − c), of variance ς² = σ²qᵀΣq: for −R₋ ≤ x_j ≤ R₊,
                 T(−R₋, ς²) ≤ ln(Σe^{x_j}/n_b) ≤ T(R₊, ς²), T(r, ς²) = ln[(r²e^{−ς²/r} + ς²e^r)/(r² + ς²)],
             and ρ = expit(L_D − L_K) is enclosed by L_D's bounds ln Σ_b e^{ln n_b + σq·c + T}. R± the smallest of
             ‖σq‖·radius =: R, the box's side and ς√(n_b−1): no end is looser than 0 or ln cosh R, the box, or the
             ball ±R.
Hypotheses   Hfin: inputs finite.
Uses         S1 (test_dropped.py).
Derivation   1  X uniform over the block's x_j has mean 0. Let Q be the parabola that touches e^x at a = −ς²/r and
                meets it at r: e^x − Q(x) = e^ξ(x − a)²(x − r)/6 for some ξ, so Q ≥ e^x for x ≤ r if r = R₊, and
                Q ≤ e^x for x ≥ r if r = −R₋. E Q(X) depends on mean and variance only; the law Y on {a, r} with
                mean 0 has variance −ar = ς², and Q = e^x on {a, r}: E Q(X) = E e^Y = e^T. (Bennett 1962)
             2  x_j = −Σ_{i≠j}x_i, so x_j² ≤ (n_b−1)(n_bς² − x_j²), and |x_j| ≤ ς√(n_b−1). (Samuelson 1968)
             3  max x · max(−x) ≥ ς² (Bhatia & Davis 2000) and r no nearer to 0 than x is on its side, so |a| ≤ R,
                and Y lives on [−R, R] and on the side of r: with Y for X, the chord of e^x over [−R, R] gives
                T ≤ ln cosh R, Jensen T ≥ 0, and Y ≤ R₊, Y ≥ −R₋ give T(R₊, ·) ≤ R₊, T(−R₋, ·) ≥ −R₋.
             4  expit increases.
Equality     blocks of two places, along one axis; of all keys but one in one place, at the end on that key's side.
Loose        nowhere.

How blocks join without their keys is M1 (memory/test_segments.py). Numbers are drawn, judged and charged for rounding
as `proofs/exact.py` says. Logarithms carry absolute errors: a ρ whose logit is off by ε is off by a factor within e^±ε.
"""

import math
from typing import NamedTuple

import numpy as np
from flint import arb
from hypothesis import given, target
from hypothesis import strategies as st

from proofs.dropping import Seen
from proofs.exact import SHARP, Array, Tight, dot, exact, grid, number, slack
from refattn.blocks import FORMS, Blocks, Interval, mass_from_blocks
from refattn.rounding import gamma


class Summarised(NamedTuple):
    """One query, keys in blocks, which blocks it drops and the scale."""

    q: Array
    k: Array
    size: int
    dropped: Seen
    scale: float


@st.composite
def summarised(draw: st.DrawFn, places: int | None = None) -> Summarised:
    """Six blocks near or far apart; with `places` 2, each takes two values in one dimension.

    Keys are multiples of 2⁻⁶ below 2⁴, queries of 2⁻⁶ below 2³ and blocks powers of two, so means, variances and
    products with q are exact in float64.
    """
    size, D = draw(st.sampled_from([1, 2, 4, 8])), 1 if places else draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread, offset = draw(st.sampled_from([4, 32, 64])), draw(st.sampled_from([0, 320]))
    near = rng.integers(-spread, spread + 1, (6, size, D))
    if places:
        near = np.where(rng.random((6, size, 1)) < draw(st.sampled_from([0.125, 0.5])), near[:, :1], near[:, -1:])
    k = (rng.integers(-64, 65, (6, 1, D)) + near + offset).reshape(-1, D) / 64
    q = rng.integers(-16, 17, (1, D)) / 16 * draw(st.sampled_from([0.25, 1.0, 4.0]))
    return Summarised(q, k, size, np.arange(6)[None] < draw(st.integers(1, 5)), draw(st.sampled_from([0.5, 1.0])))


def enclosures(case: Summarised) -> tuple[float, dict[str, Interval], float]:
    """Return ρ, its enclosures by form, and the relative error that evaluating one may have.

    A level passes 40 roundings, each relative to at most its ln n_b, σq·c, two radii, 1 and two logarithms, which stay
    below 32 on this grid; the sum over six blocks passes 24, the logistic 12, and the given lse 1.
    """
    blocks = Blocks.of(case.k, case.size)
    query = case.scale * case.q
    logits = [dot(exact(query[0]), exact(key)) for key in case.k]
    gone = np.repeat(case.dropped[0], case.size)
    kept, rest = (
        sum((s.exp() for s, d in zip(logits, gone, strict=True) if d == want), arb(0)) for want in (False, True)
    )
    lse = number(kept.log())
    found = {
        form: mass_from_blocks(case.q, blocks, [lse], dropped=case.dropped, scale=case.scale, form=form)
        for form in FORMS
    }
    sizes = np.abs(query @ blocks.centre.T)[0] + 2 * math.sqrt((query * query).sum()) * blocks.radius
    return number(rest / (rest + kept)), found, math.expm1(gamma(80) * (35.0 + sizes.max() + abs(lse)))


def judge_blocks(tight: Tight, case: Summarised) -> tuple[float, float]:
    """Judge every form, and return ρ ÷ upper and lower ÷ ρ of the two-point one."""
    rho, found, relative = enclosures(case)
    ratios = {}
    for form, (low, high) in found.items():
        above = tight("S2", rho, high, relative * high + slack(high, 1))
        ratios[form] = above, tight("S2", low, rho, relative * low + slack(low, 1))
    best = found["two_point"]
    for low, high in found.values():
        assert best.high <= high * (1 + 2 * relative) and best.low * (1 + 2 * relative) >= low
    return ratios["two_point"]


@given(case=summarised())
def test_block_summaries_enclose_the_dropped_mass_and_two_points_do_it_best(tight: Tight, case: Summarised) -> None:
    target(min(judge_blocks(tight, case)))


@given(case=summarised(places=2))
def test_blocks_with_two_places_reach_both_ends(tight: Tight, case: Summarised) -> None:
    assert min(judge_blocks(tight, case)) > SHARP


@given(case=summarised(), other=st.lists(grid(-2, 2), min_size=3, max_size=3))
def test_a_key_apart_from_the_others_reaches_the_end_on_its_side(
    tight: Tight, case: Summarised, other: list[float]
) -> None:
    first, D = np.arange(6) == 0, case.k.shape[1]
    k = case.k.reshape(6, case.size, D).copy()
    k[0], k[0, 0] = k[0, :1], np.round(64 * np.array(other[:D])) / 64
    assert max(judge_blocks(tight, case._replace(k=k.reshape(-1, D), dropped=first[None]))) > SHARP
