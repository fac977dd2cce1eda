r"""Softmax over some of the keys is off by what `refattn.dropped` says, and ρ is enclosed, not estimated.

Notation     One row: keys A that it may see, K ⊆ A kept, D = A ∖ K dropped; n = |A|, k = |K|. p, o over A; p_K, õ over
             K; w = e^s; L_K, L_D log-sum-exps; ρ = p(D); μ_D the mean of v over D under p; expit(x) = 1/(1 + e^−x).
Hypotheses   Hfin: inputs finite.
Uses         P1 (test_perturbation.py).
Loose        nowhere.

S1  Statement    õ − o = ρ(õ − μ_D), so |õ − o| ≤ ρ·max(max_D v − õ, õ − min_D v) in each column; ρ = expit(L_D − L_K).
                 TV(p, p_K) = ρ, and TV(p, p̃) ≥ ρ for any weights p̃ on K; the k largest logits drop least.
                 Two sets of keys: TV(p_A, p_B) = 1 − W_{A∩B}/max(W_A, W_B), W the sum of w over a set.
    Derivation   1  o = (1−ρ)õ + ρμ_D, and μ_D lies between the extremes of v over D. K = ∅: õ = 0, ρ = 1, o = μ_D.
                 2  1 − TV = Σmin(p, p̃) ≤ p(K) = 1 − ρ, with equality where p̃ ≥ p on K, as p_K = p/(1−ρ) is.
                 3  Two sets: min(w/W_A, w/W_B) = w/max(W_A, W_B) on A∩B, 0 elsewhere.
    Equality     v = 1_D: õ = 0 and o = ρ.

S3  Statement    (a) Γ = min_K s − max_D s: ρ ≤ expit(ln((n−k)/k) − Γ). (b) K the k largest, w_(k) the least of them:
                 ρ ≤ (n−k)w_(k)/(W_K + (n−k)w_(k)) ≤ 1 − k/n. (c) s_j = c_j − α·d_j with distances 0, …, n−1, and K
                 those up to W: ρ ≤ expit(osc c + ln(e^{−α(W+1)} − e^{−αn}) − ln(1 − e^{−α(W+1)})), which increases to
                 expit(osc c − ln(e^{α(W+1)} − 1)) as n → ∞.
    Derivation   ρ/(1−ρ) = W_D/W_K. (a) W_D ≤ (n−k)e^{max_D s}, W_K ≥ ke^{min_K s}. (b) W_D ≤ (n−k)w_(k), W_K ≥ kw_(k).
                 (c) W_D ≤ e^{max c}Σ_{W<d<n}e^{−αd}, W_K ≥ e^{min c}Σ_{d≤W}e^{−αd}: geometric sums.
    Equality     (a) K at one logit, D at another; (b) D tied with w_(k); (c) c at its least on K, at its greatest on D.

S4  Statement    Disjoint parts L, R: o = αo_L + (1−α)o_R, α = expit(L_L − L_R); ½(o_L + o_R) − o = (½ − α)(o_L − o_R).
                 Key j counted c_j times: TV ≤ (√c − 1)/(√c + 1), c = max c_j / min c_j.
    Derivation   S1's first line with L for K. Counting is the tilt ln c_j: P1 with Δ = ln c, tanh(ln(c)/4).
    Equality     always; p = 1/(1 + √c) on the keys counted most.

Numbers are drawn, judged and charged for rounding as `proofs/exact.py` says. Logarithms carry absolute errors: a ρ
whose logit is off by ε is off by a factor within e^±ε.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
from flint import arb
from hypothesis import given, target
from hypothesis import strategies as st

from proofs.dropping import Seen, bound_rounding, mass_relative
from proofs.exact import LIBM, SHARP, Array, Tight, distance, dot, exact, grid, number, on_grid, row, slack, weights
from refattn import dropped, partial, softmax
from refattn.partial import Partial
from refattn.rounding import gamma

# --- S1 ---------------------------------------------------------------------------------------------------------------


class Sparse(NamedTuple):
    """T rows, S keys, what they may see and what they keep."""

    q: Array
    k: Array
    v: Array
    mask: Seen
    kept: Seen

    @property
    def near(self) -> Seen:
        return self.mask & self.kept

    @property
    def far(self) -> Seen:
        return self.mask & ~self.kept


@st.composite
def sparse(draw: st.DrawFn) -> Sparse:
    """Random masks that keep little or much, clustered keys, values around 0 or 3."""
    T, S, D, E = (draw(st.integers(1, most)) for most in (3, 8, 3, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    places = rng.integers(-2048, 2049, (3, D))
    k = (places[rng.integers(0, 3, S)] + rng.integers(-256, 257, (S, D))) / 1024
    q = rng.integers(-1024, 1025, (T, D)) / 1024 * draw(st.sampled_from([0.25, 1.0, 4.0]))
    v = rng.integers(-2048, 2049, (S, E)) / 1024 + draw(st.sampled_from([0.0, 3.0]))
    mask, kept = (rng.random((T, S)) < draw(st.sampled_from([0.25, 0.5, 0.875])) for _ in range(2))
    return Sparse(q, k, v, mask | draw(st.booleans()), kept)


def unnormalised(case: Sparse) -> list[list[arb]]:
    """Return e^s."""
    scale = 1 / arb(case.q.shape[1]).sqrt()
    return [[(dot(exact(a), exact(b)) * scale).exp() for b in case.k] for a in case.q]


def over(w: list[arb], seen: Seen) -> list[arb]:
    """Return the weights of one row over the keys that it sees, or zeros."""
    z = sum((x for x, s in zip(w, seen, strict=True) if s), arb(0))
    return [x / z if s else arb(0) for x, s in zip(w, seen, strict=True)]


def judge_sparse(tight: Tight, case: Sparse) -> Array:
    """Judge S1's bound, and return error ÷ bound for each output."""
    bound = dropped.bound(*case[:3], mask=case.mask, kept=case.kept)
    room = bound_rounding(bound, *case[:3], case.near, case.far)
    ratios = np.zeros(bound.shape)
    for i, w in enumerate(unnormalised(case)):
        before, after = over(w, case.mask[i]), over(w, case.near[i])
        for c, column in enumerate(case.v.T):
            error = number(abs(dot(after, exact(column)) - dot(before, exact(column))))
            ratios[i, c] = tight("S1", error, bound[i, c], room[i, c])
    return ratios


@given(case=sparse())
def test_dropped_keys_change_the_output_by_at_most_their_mass_times_their_distance(tight: Tight, case: Sparse) -> None:
    target(float(judge_sparse(tight, case).max()))


@given(case=sparse())
def test_values_that_mark_the_dropped_keys_of_a_row_reach_the_bound(tight: Tight, case: Sparse) -> None:
    marked = judge_sparse(tight, case._replace(v=case.far.T.astype(float))).diagonal()
    assert (marked[case.far.any(axis=1)] > SHARP).all()


@given(case=sparse(), other=st.data())
def test_the_dropped_mass_is_the_distance_of_the_weights_and_no_weights_on_the_kept_keys_are_nearer(
    tight: Tight, case: Sparse, other: st.DataObject
) -> None:
    mass = dropped.mass(*case[:2], mask=case.mask, kept=case.kept)
    room, best = mass_relative(*case[:2], case.near, case.far) * mass + slack(mass, 1), 0.0
    for i, w in enumerate(unnormalised(case)):
        keys = np.flatnonzero(case.near[i])
        if len(keys):
            before = over(w, case.mask[i])
            away = number(distance(before, over(w, case.near[i])))
            tight("S1", [away, mass[i]], [mass[i], away], room[i])
            anything = [arb(0)] * len(w)
            for j, x in zip(keys, exact(other.draw(weights(len(keys)))), strict=True):
                anything[j] = x
            best = max(best, tight("S1", mass[i], number(distance(before, anything)), room[i]))
    target(best)


@given(case=sparse())
def test_the_error_is_the_mass_times_the_distance_between_the_means_of_the_two_parts(case: Sparse) -> None:
    for i, w in enumerate(unnormalised(case)):
        before, near, far = (over(w, seen[i]) for seen in (case.mask, case.near, case.far))
        rho = sum((x for x, s in zip(before, case.far[i], strict=True) if s), arb(0))
        for column in map(exact, case.v.T):
            own = dot(near, column)
            assert (own - dot(before, column)).overlaps(rho * (own - dot(far, column)))


@given(case=sparse())
def test_softmax_over_two_sets_of_keys_differs_by_what_they_do_not_share(case: Sparse) -> None:
    for w, one, two in zip(unnormalised(case), case.mask, case.kept, strict=True):
        if one.any() and two.any():
            first, second, both = (
                sum((x for x, s in zip(w, seen, strict=True) if s), arb(0)) for seen in (one, two, one & two)
            )
            assert distance(over(w, one), over(w, two)).overlaps(1 - both / first.max(second))


@given(case=sparse())
def test_no_set_of_as_many_keys_drops_less_than_the_largest_logits(case: Sparse) -> None:
    w, n = unnormalised(case)[0], len(case.k)
    for count in range(1, n + 1):
        kept = [sum((w[j] for j in some), arb(0)) for some in itertools.combinations(range(n), count)]
        ranked = sorted(range(n), key=lambda j: number(w[j].log()), reverse=True)[:count]
        largest = sum((w[j] for j in ranked), arb(0))
        assert all(x <= largest or x.overlaps(largest) for x in kept)


# --- S3 ---------------------------------------------------------------------------------------------------------------


def lost(logits: Array, kept: int) -> float:
    """Return ρ when the first keys are kept."""
    w = [s.exp() for s in exact(logits)]
    return number(sum(w[kept:], arb(0)) / sum(w, arb(0)))


def room(bound: Array, size: float) -> Array:
    """Charge a ρ for 32 roundings of the logarithms in its logit, of sizes below 1 + size."""
    return bound * math.expm1(gamma(32) * (1 + size)) + slack(bound, 1)


def judge_gap(tight: Tight, logits: Array, kept: int) -> float:
    gap = logits[:kept].min() - logits[kept:].max(initial=-64.0)
    bound = dropped.mass_from_gap(gap, kept, len(logits))
    return tight("S3", lost(logits, kept), bound, room(bound, abs(gap) + 2 * math.log(len(logits))))


def judge_topk(tight: Tight, logits: Array, kept: int) -> float:
    logits = np.sort(logits)[::-1]
    bound = dropped.mass_from_topk(logits[:kept], len(logits))
    charged = room(bound, 3 * np.abs(logits).max() + 2 * math.log(len(logits)))
    assert bound <= 1 - kept / len(logits) + charged + gamma(2)
    return tight("S3", lost(logits, kept), bound, charged)


def judge_decay(tight: Tight, c: Array, slope: float, window: int, keys: float) -> float:
    """Judge a causal row whose key at distance d has the logit c_d − slope·d; the slope is at least 2⁻⁴."""
    logits = c - slope * np.arange(len(c))
    bound = dropped.mass_from_decay(slope, window, np.ptp(c), keys)
    return tight("S3", lost(logits, window + 1), bound, room(bound, np.ptp(c) + slope * (window + 1) + 8))


@given(n=st.integers(1, 12), kept=st.integers(1, 12), arrays=st.data())
def test_a_gap_between_logits_bounds_the_dropped_mass(tight: Tight, n: int, kept: int, arrays: st.DataObject) -> None:
    target(judge_gap(tight, arrays.draw(row(n, -8, 8)), min(kept, n)))


@given(n=st.integers(1, 12), kept=st.integers(1, 12), arrays=st.data())
def test_the_least_of_the_largest_logits_bounds_the_dropped_mass(
    tight: Tight, n: int, kept: int, arrays: st.DataObject
) -> None:
    target(judge_topk(tight, arrays.draw(row(n, -8, 8)), min(kept, n)))


@given(n=st.integers(1, 24), window=st.integers(0, 8), slope=st.integers(1, 64), arrays=st.data())
def test_a_decay_with_distance_bounds_the_mass_outside_a_causal_window(
    tight: Tight, n: int, window: int, slope: int, arrays: st.DataObject
) -> None:
    c = arrays.draw(row(n, -2, 2))
    judge_decay(tight, c, slope / 16, window, math.inf)
    target(judge_decay(tight, c, slope / 16, window, n))


@pytest.mark.parametrize("gap", [-8.0, -1.0, 0.0, 1.0, 8.0])
@pytest.mark.parametrize("kept", [1, 3, 7])
def test_two_levels_of_logits_reach_all_three(tight: Tight, gap: float, kept: int) -> None:
    levels = np.where(np.arange(8) < kept, gap, 0.0)
    assert judge_gap(tight, levels, kept) > SHARP
    assert judge_topk(tight, np.where(np.arange(8) < kept - 1, abs(gap), 0.0), kept) > SHARP
    raised = np.where(np.arange(8) < kept, -abs(gap), 0.0)
    assert judge_decay(tight, raised, 0.25, kept - 1, 8) > SHARP
    long = np.where(np.arange(256) < kept, -abs(gap), 0.0)
    assert judge_decay(tight, long, 0.25, kept - 1, math.inf) > SHARP


@given(slope=grid(1 / 64, 4), span=grid(0, 8), mass=grid(1 / 1024, 1023 / 1024))
def test_the_window_for_a_mass_is_enough_and_one_less_is_not(slope: float, span: float, mass: float) -> None:
    window = dropped.window_for_decay(slope, span, mass)
    enough = dropped.mass_from_decay(slope, window, span)
    charged = room(np.array(1.0), 2 * (span + slope * (window + 1) + 8))
    assert enough <= mass + charged
    if window:
        assert dropped.mass_from_decay(slope, window - 1, span) >= mass - charged


def test_a_window_captures_local_attention_without_a_hypothesis_is_false() -> None:
    """Logits in [−2.5, 2.5], the low ones in the window: it has 4 of 64 keys and one part in 2000 of the mass."""
    k = np.where(np.arange(64) >= 60, -2.5, 2.5)[:, None]
    rho = dropped.mass([[1.0]], k, kept=np.arange(64)[None] >= 60, scale=1.0)
    assert rho > 1 - 1 / 2000 > 1 - 4 / 64


def test_a_causal_windows_bound_covers_rows_that_see_both_sides_is_false() -> None:
    """Twice the keys are dropped, but the row itself is kept once."""
    away = -0.5 * np.abs(np.arange(-40, 41))[:, None]
    rho = dropped.mass([[1.0]], away, kept=np.abs(np.arange(-40, 41))[None] <= 3, scale=1.0)
    assert rho > 1.1 * dropped.mass_from_decay(0.5, 3, 0.0)


def test_reaching_every_key_in_two_hops_bounds_the_error_of_a_layer_is_false() -> None:
    """A factorised pattern of 9 tokens, own block of 3 and each block's last: two hops reach all, one row errs by 1."""
    i = np.arange(9)
    seen = (i[:, None] // 3 == i // 3) | (i % 3 == 2)
    seen &= i <= i[:, None]
    hops = (seen.astype(int) @ seen.astype(int)) > 0
    assert hops[8].all() and not seen[8, 0]
    k, v = np.where(i == 0, 40.0, 0.0)[:, None], (i == 0)[:, None].astype(float)
    causal = i <= i[:, None]
    apart = softmax.attend(np.ones((9, 1)), k, v, mask=causal) - softmax.attend(np.ones((9, 1)), k, v, mask=seen)
    assert apart[8, 0] > 1 - 2.0**-50


# --- S4 ---------------------------------------------------------------------------------------------------------------


class Halves(NamedTuple):
    """Two parts and, in balls, α and the merged output."""

    left: Partial
    right: Partial
    alpha: arb
    o: arb


@st.composite
def halves(draw: st.DrawFn) -> Halves:
    lefts, rights = draw(row(2, -8, 8)), draw(row(2, -8, 8))
    alpha = 1 / (1 + (arb(rights[1]) - arb(lefts[1])).exp())
    left, right = (Partial(np.array([[o]]), np.array([lse])) for o, lse in (lefts, rights))
    return Halves(left, right, alpha, alpha * arb(lefts[0]) + (1 - alpha) * arb(rights[0]))


@given(parts=halves())
def test_averaging_parts_errs_by_exactly_what_is_stated(tight: Tight, parts: Halves) -> None:
    error = number((arb(parts.left.o[0, 0]) + arb(parts.right.o[0, 0])) / 2 - parts.o)
    stated = dropped.averaging(parts.left, parts.right)[0, 0]
    assert error * stated >= 0
    charged = slack(stated, LIBM + 5)
    target(tight("S4", [abs(error), abs(stated)], [abs(stated), abs(error)], charged))


@given(parts=halves())
def test_parts_merge_into_the_whole(tight: Tight, parts: Halves) -> None:
    """Exponents are exact, so each weight passes one exp, a sum and a quotient, and its output two more roundings."""
    merged = partial.merge(parts.left, parts.right).o[0, 0]
    sizes = abs(parts.left.o[0, 0]) * parts.alpha + abs(parts.right.o[0, 0]) * (1 - parts.alpha)
    tight("S4", number(abs(arb(merged) - parts.o)), 0.0, slack(number(sizes), 2 * LIBM + 5))


def judge_counts(tight: Tight, p: Array, counts: Array) -> float:
    more = [a * c for a, c in zip(exact(p), exact(counts), strict=True)]
    bound = dropped.double_count(counts.max(), counts.min())
    # the root is off by two roundings of itself, the quotient's derivative in it is at most ½
    charged = slack(bound, 3) + gamma(2) * math.sqrt(counts.max() / counts.min())
    return tight("S4", number(distance(exact(p), [x / sum(more, arb(0)) for x in more])), bound, charged)


@given(n=st.integers(1, 8), arrays=st.data())
def test_keys_counted_more_than_once_move_the_weights_by_at_most_this(
    tight: Tight, n: int, arrays: st.DataObject
) -> None:
    counts = arrays.draw(st.lists(st.integers(1, 6), min_size=n, max_size=n))
    target(judge_counts(tight, arrays.draw(weights(n)), np.array(counts, float)))


@pytest.mark.parametrize("most", [2.0, 3.0, 16.0])
def test_two_keys_of_which_one_is_counted_more_reach_it(tight: Tight, most: float) -> None:
    first = 1 / (1 + math.sqrt(most))
    assert judge_counts(tight, on_grid(np.array([first, 1 - first]), 52), np.array([most, 1.0])) > SHARP


def test_adding_or_averaging_normalised_parts_is_attention_is_false() -> None:
    """Added, rows sum to 2; averaged, a part that weighs nothing counts half."""
    q, k, v = [[1.0]], [[0.0], [-800.0]], np.array([[1.0, 1.0], [0.0, 1.0]])
    first, second = (softmax.attend(q, k, v, mask=[m], scale=1.0)[0] for m in ([True, False], [False, True]))
    assert softmax.attend(q, k, v, scale=1.0).tolist() == [[1.0, 1.0]]
    assert (first + second).tolist() == [1.0, 2.0]
    assert ((first + second) / 2).tolist() == [0.5, 1.0]
