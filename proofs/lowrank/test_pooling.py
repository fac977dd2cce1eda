r"""Attention over the means of segments is within `bound` of exact softmax attention, if it counts their keys.

Notation     One row and one column. Segment g has c_g keys with means k̄_g, v̄_g; x_j = σ q·(k_j − k̄_g) has variance
             ς² over g and is within [−R₋, R₊] (S2); m_g is ln of the mean of e^{x_j}. õ = Σ p̃_g v̄_g with
             p̃_g ∝ w_g e^{σ q·k̄_g}, w_g = c_g (counts kept) or 1 (ignored). P_g is g's exact mass, μ_g its exact mean
             value: o = Σ P_g μ_g.
Hypotheses   Hfin: finite inputs. Segments of any sizes that sum to n. No mask.
Uses         P1, P2, P4 (test_perturbation.py), S2 (test_blocks.py).

L6  Statement    With lo_g ≤ m_g ≤ hi_g from S2, Δ_g = min(R₋ + R₊, ς√(2c_g)),
                 β_g = range_g(v)·max_f(f/(f + (1 − f)e^{−Δ_g}) − f) over f = 1/c_g … 1 − 1/c_g,
                 l_g = max(v̄_g − β_g, min_g v), u_g = min(v̄_g + β_g, max_g v):
                     min Σ P_g l_g ≤ o ≤ max Σ P_g u_g    over P_g ∝ c_g e^{σ q·k̄_g + m}, m in [lo_g, hi_g],
                 so |õ − o| is at most the distance from õ to the farther end, and from õ to the end of the values.
    Derivation   1  P_g ∝ Σ_{j∈g} e^{σ q·k_j} = c_g e^{σ q·k̄_g} e^{m_g}; x_j has mean 0 over g, so S2 encloses m_g.
                 2  osc x ≤ Δ_g, as (x_i − x_j)² ≤ 2(x_i² + x_j²) ≤ 2c_gς². Inside g the exact weights are 1/c_g tilted
                    by x. On a set of a part f of the keys they have at most f/(f + (1 − f)e^{−Δ_g}) (P1), so their TV
                    from 1/c_g is at most the largest gain over f; it is concave in f, so over 1/c … 1 − 1/c it is
                    greatest beside its maximum, 1/(1 + e^{Δ/2}), where it would be tanh(Δ/4). P2: |μ_g − v̄_g| ≤ β_g;
                    and μ_g is a mean.
                 3  l_g ≤ μ_g ≤ u_g, and P is in the set over which the ends are taken. A weighted mean of fixed numbers
                    is greatest where the weights of those above it are largest, the others least (P4); Newton's
                    iteration for that threshold rises from any start below it to it.
                 4  The last resort is P2.
    Equality     Two keys a segment, their values rising with x, the values' means rising with |x|; one segment of any
                 size with two places; with counts ignored, equal keys.

L6a Statement    |x_j| ≤ R and r = max c/min c with counts ignored, 1 with them kept:
                     |õ − o| ≤ tanh((ln cosh R + ln r)/4)·range(v̄) + tanh(R/2)·max_g range_g(v)
    Derivation   1  õ − o = Σ(p̃ − P)_g v̄_g + ΣP_g(v̄_g − μ_g). P is p̃ tilted by m_g + ln(c_g/w_g), whose span is at most
                    ln cosh R + ln r, since 0 ≤ m_g ≤ ln cosh R (Jensen; S2's cosh). P1 and P2 for the first sum; for
                    the second β_g ≤ tanh(Δ_g/4)·range_g(v), Δ_g ≤ 2R.
                 2  The enclosure of L6 has each of these steps within it, if R is at least the balls' ‖σq‖·radius: then
                    `bound` is never above. For a smaller R it may be.
    Equality     R = 0, two segments, counts ignored. Two keys in one segment, in the limit R → 0.
Loose        nowhere, in that each is reached; L6a by the largest R for all segments, and all rows.

Numbers are judged and charged for rounding as `proofs/exact.py` says.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from flint import arb
from hypothesis import given, target
from hypothesis import strategies as st

from proofs.exact import LIBM, SHARP, SPANS, Array, Tight, exact, highest, number, slack
from refattn import rounding, softmax
from refattn.lowrank import pooling
from refattn.rounding import U, gamma
from refattn.testing import Ball, assert_within


class Case(NamedTuple):
    """One problem."""

    q: Array
    k: Array
    v: Array
    options: dict[str, Any]


def options(size: Any, counts: str = "kept", scale: float | None = 1.0) -> dict[str, Any]:
    return {"size": size, "counts": counts, "scale": scale}


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Keys in clusters; segments are the clusters, or cut across them; values go with the keys, or do not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    D, n = draw(st.sampled_from([1, 4])), sum(sizes)
    spread, reach = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 2.0])), draw(st.sampled_from([0.3, 1.0, 3.0]))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    q = reach * rng.standard_normal((2, D))
    k = rng.standard_normal((len(sizes), D))[groups] + spread * rng.standard_normal((n, D))
    v = rng.standard_normal((len(sizes), 2))[groups] + spread * rng.standard_normal((n, 2))
    if draw(st.booleans()):
        v[:, 0] = k @ q[0] > draw(st.sampled_from([0.0, 1.0]))
    size = draw(st.sampled_from([sizes, sizes[::-1], 1, 2, 3, n]))
    case = Case(q, k, v, options(size, draw(st.sampled_from(["kept", "ignored"])), draw(st.sampled_from([None, 1.0]))))
    if draw(st.booleans()):  # then only the masses of the segments move
        for s in parts(case):
            v[s] = v[s.start]
    return case


def parts(case: Case) -> list[slice]:
    """Return the segments."""
    size, n = case.options["size"], len(case.k)
    sizes = size if isinstance(size, list) else [size] * (n // size) + [n % size] * (n % size > 0)
    stops = np.cumsum(sizes)
    return [slice(int(b - c), int(b)) for b, c in zip(stops, sizes, strict=True)]


def error(case: Case) -> Array:
    """Return |õ − o|."""
    q, k, v = map(Ball.lift, case[:3])
    off = pooling.attend(q, k, v, **case.options) - softmax.attend(q, k, v, scale=case.options["scale"])
    return np.vectorize(lambda x: number(abs(x)), otypes=[float])(off.cells)


def charged(case: Case) -> Array:
    """Bound what evaluating L6 in float64 costs: õ, and what the claim's own numbers do."""
    arrays = dict(zip("qkv", case[:3], strict=True))
    return rounding.allowance(pooling.attend, *case[:3], **case.options) + rounding.claim_rounding(
        pooling, arrays, case.options
    )


def judge(tight: Tight, case: Case) -> float:
    bound = pooling.bound(*case[:3], **case.options)
    return tight("L6", error(case), bound, charged(case))


def judge_radius(tight: Tight, case: Case) -> float:
    """Judge L6a, and that L6 is not above it. Its arguments are rounded up, and it passes four elementary functions."""
    q, k, v, named = case
    sigma = 1.0 if named["scale"] else q.shape[1] ** -0.5
    segments = parts(case)
    away = np.concatenate([k[s] - k[s].mean(axis=0) for s in segments])
    off = gamma(len(k) + q.shape[1] + 8) * np.abs(k).sum(axis=1).max()
    radius = sigma * np.linalg.norm(q, axis=1).max() * (np.linalg.norm(away, axis=1).max() + off)
    counts = [s.stop - s.start for s in segments]
    ratio = max(counts) / min(counts) if named["counts"] == "ignored" else 1.0
    bound, room = np.empty(2), np.empty(2)
    for e, column in enumerate(v.T):
        within, means = max(np.ptp(column[s]) for s in segments), [column[s].mean() for s in segments]
        blur = gamma(len(k) + 1) * np.abs(column).max()
        bound[e] = pooling.bound_from_radius(radius, within, np.ptp(means), ratio=ratio)
        room[e] = 2 * blur + LIBM * U * (radius + np.log(ratio) + 3) * np.ptp(means) + slack(bound[e], 4 * LIBM)
    least = pooling.bound(q, k, v, **named)
    assert (least <= bound + room + charged(case)).all()
    return tight("L6a", error(case), bound, room)


# --- attacked ---------------------------------------------------------------------------------------------------------


@given(case=problems())
def test_pooling_is_within_its_bound(tight: Tight, case: Case) -> None:
    target(judge(tight, case))


@given(case=problems())
def test_the_bound_from_a_radius_holds_and_is_never_below(tight: Tight, case: Case) -> None:
    target(judge_radius(tight, case))


def test_never_above_the_bound_from_any_radius_is_false(tight: Tight) -> None:
    """With R = max |x_j|, less than the balls tell, `bound` can only guess how far the farthest of twelve keys is."""
    x, y = np.repeat([1.0, -1.0], 6), np.arange(12.0) - 5.5
    case = Case(np.ones((1, 2)), np.stack([x / 2 + y, x / 2 - y], axis=1), np.eye(12)[:, :1], options(12))
    known = pooling.bound_from_radius(1.0, 1.0, 0.0)
    assert (tight("L6a", error(case), known, slack(known, 4 * LIBM)) <= 1) and (judge(tight, case) <= 1)
    assert (pooling.bound(*case[:3], **case.options) > known + charged(case)).all()


@pytest.mark.parametrize("q", [[-1.0, 0.0], [-1e-300, -1e100]])
def test_where_squares_of_keys_overflow_the_range_of_the_values_is_left(q: list[float]) -> None:
    k = np.array([[0.0, 3.0], [3.0, 0.0], [-1.0, 3.0], [3e150, 1e200], [3e160, 3e150]])
    case = Case(np.array([q]), k, np.arange(5.0)[:, None], options(3))
    o = pooling.attend(*case[:3], **case.options)
    assert (pooling.bound(*case[:3], **case.options) == np.maximum(4 - o, o)).all()


@given(count=st.integers(1, 12), span=st.integers(0, 2560))
def test_equal_weights_under_a_tilt_move_by_the_best_of_all_cuts(count: int, span: int) -> None:
    """Step 2, over every f."""
    e = (-arb(span / 64)).exp()
    gains = [arb(m) / count / (arb(m) / count + (1 - arb(m) / count) * e) - arb(m) / count for m in range(1, count)]
    truth = number(highest([arb(0), *gains]))
    got = pooling._moved(np.array([[span / 64]]), np.array([count]))
    assert_within(got, [[truth]], slack(np.array([[truth]]), 2 * LIBM + 8))
    assert got <= np.tanh(span / 256) * (1 + gamma(2 * LIBM))


@given(data=st.data(), n=st.integers(1, 6))
def test_the_threshold_finds_the_best_choice_of_the_weights(data: st.DataObject, n: int) -> None:
    """Step 3, over all 2ⁿ choices."""
    whole = st.lists(st.integers(1, 64), min_size=n, max_size=n).map(lambda x: np.array(x, float))
    down, more, x = data.draw(whole), data.draw(whole), data.draw(whole) - 32
    up = down + more * data.draw(st.sampled_from([0.0, 1.0, 1024.0]))
    means = [np.sum(w * x) / np.sum(w) for w in itertools.product(*zip(up, down, strict=True)) for w in [np.array(w)]]
    got = pooling._highest(up[None], down[None], x[None])
    assert_within(got, [max(means)], [slack(max(means), 2)])  # sums of small integers are exact


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", SPANS[1:])
def test_two_keys_in_one_segment_reach_the_bound(tight: Tight, span: float) -> None:
    case = Case(np.ones((1, 1)), np.array([[0.0], [span]]), np.array([[0.0], [1.0]]), options(2))
    assert judge(tight, case) > SHARP


@given(data=st.data(), count=st.integers(2, 12), above=st.integers(1, 11))
def test_a_segment_of_two_places_reaches_the_bound(tight: Tight, data: st.DataObject, count: int, above: int) -> None:
    """A part f of the keys is apart, and f is worst for that span: e^{Δ/2} = 1/f − 1."""
    above = min(above, count - 1)
    apart = np.array(data.draw(st.permutations([1.0] * above + [0.0] * (count - above))))
    span = 2 * np.log(count / above - 1)
    k = apart * span if span > 0 else (1 - apart) * -span
    if span != 0:
        case = Case(np.ones((1, 1)), k[:, None], (apart if span > 0 else 1 - apart)[:, None], options(count))
        assert judge(tight, case) > SHARP


@given(data=st.data(), pairs=st.integers(1, 5))
def test_pairs_whose_values_rise_with_their_keys_reach_the_bound(tight: Tight, data: st.DataObject, pairs: int) -> None:
    """Both terms: pairs farther apart have larger means, so their masses move the same way as what is in them."""

    def eighths(low: int, high: int) -> Array:
        return np.array(data.draw(st.lists(st.integers(low, high), min_size=pairs, max_size=pairs))) / 8

    half, centre, rise = np.sort(eighths(1, 24)), eighths(-16, 16), eighths(0, 16)
    mean = np.sort(eighths(-16, 16))
    mean[0] -= 1  # something moves
    rise[0] += 1
    k = np.stack([centre - half, centre + half], axis=1).reshape(-1, 1)
    v = np.stack([mean - rise, mean + rise], axis=1).reshape(-1, 1)
    assert judge(tight, Case(np.ones((1, 1)), k, v, options(2))) > SHARP


@pytest.mark.parametrize("radius", [2.0**-4, 2.0**-10])
def test_two_keys_near_each_other_reach_the_bound_from_a_radius(tight: Tight, radius: float) -> None:
    case = Case(np.ones((1, 1)), np.array([[0.0], [2 * radius]]), np.zeros((2, 2)) + [[0.0], [1.0]], options(2))
    assert judge_radius(tight, case) > SHARP


# --- counts -----------------------------------------------------------------------------------------------------------


def equal_keys(counts: list[int]) -> tuple[Ball, Ball, Ball]:
    """Two segments, all keys of each equal, the smaller one √r times as heavy a key: where ignoring counts is worst."""
    few, many = counts
    logit = (arb(many) / few).sqrt().log()
    cells = np.array([[logit]] * few + [[arb(0)]] * many, dtype=object)
    return Ball.lift([[1.0]]), Ball(cells), Ball.lift([[1.0]] * few + [[0.0]] * many)


@pytest.mark.parametrize(("counts", "numerator", "denominator"), [([1, 4], 1, 3), ([1, 16], 3, 5), ([3, 12], 1, 3)])
def test_counts_do_not_matter_is_false(counts: list[int], numerator: int, denominator: int) -> None:
    """However equal the keys of a segment: TV = tanh(ln(r)/4), a third for 1:4. With counts nothing is lost."""
    q, k, v = equal_keys(counts)
    o = softmax.attend(q, k, v, scale=1.0)
    ignored = (pooling.attend(q, k, v, **options(counts, "ignored")) - o).cells[0, 0]
    assert (ignored * denominator).contains(numerator) and (ignored * denominator).rad() < U
    assert (pooling.attend(q, k, v, **options(counts)) - o).cells[0, 0].contains(0)


@pytest.mark.parametrize("counts", [[1, 4], [1, 16], [3, 12]])
def test_ignored_counts_reach_the_bound_and_the_bound_from_a_radius(tight: Tight, counts: list[int]) -> None:
    q, k, v = (x.floats() for x in equal_keys(counts))
    case = Case(q, k, np.hstack([v, v]), options(counts, "ignored"))
    assert judge(tight, case) > SHARP
    assert judge_radius(tight, case) > SHARP


@given(case=problems())
def test_equal_keys_with_equal_values_lose_nothing_if_they_are_counted(case: Case) -> None:
    segments = parts(case)
    k, v = (np.concatenate([np.repeat(x[s][:1], s.stop - s.start, axis=0) for s in segments]) for x in case[1:3])
    case = Case(case.q, k, v, case.options | {"counts": "kept"})
    assert (pooling.bound(*case[:3], **case.options) <= charged(case)).all()
    q, k, v = map(Ball.lift, case[:3])
    off = pooling.attend(q, k, v, **case.options) - softmax.attend(q, k, v, scale=case.options["scale"])
    assert all(x.contains(0) for x in off.cells.ravel())


def test_a_mean_of_exponentials_is_not_the_exponential_of_the_mean() -> None:
    """Counts do not make pooling exact: of two segments of two keys, the one that is spread weighs too little."""
    k, v = np.array([[-1.0], [1.0], [0.0], [0.0]]), np.array([[1.0], [1.0], [0.0], [0.0]])
    case = Case(np.ones((1, 1)), k, v, options(2))
    cosh = (exact([1.0])[0].exp() + (-exact([1.0])[0]).exp()) / 2
    missing = cosh / (cosh + 1) - arb(1) / 2
    assert_within(error(case), [[number(missing)]], 2 * U)
