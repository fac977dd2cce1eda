r"""Linear attention is as far from softmax as the ratio of its kernel to e^s is from constant, and rounds in any order.

Notation     One row: w_j = e^{s_j}, s_j = σ q·k_j, p = w/Σw, o = Σp_jv_j; κ_j = φ(q)·φ(k_j), p̃ = κ/Σκ, õ = Σp̃_jv_j.
             Δ = osc_j(ln κ_j − s_j). With ε in the normaliser the answer is ŏ = Σκ_jv_j/(Σκ + ε).
Hypotheses   Hfin: finite inputs, at least one key · Hden: Σκ ≠ 0 · Hpos: every κ_j > 0, where it is named.
Uses         P1, P2, P5 (test_perturbation.py), F0 (rounding).
Loose        nowhere.

K1  Statement    (a) õ − o = Σ(κ_j − cw_j)(v_j − o)/Σκ = Σ(κ_j − cw_j)(v_j − õ)/(cΣw) for every c ≠ 0.
                 (b) Hpos: TV(p, p̃) ≤ tanh(Δ/4), so |ŏ − o| ≤ tanh(Δ/4)·range(v) + |ŏ|ε/Σκ, ε ≥ 0.
                 (c) |κ_j/(cw_j) − 1| ≤ e < 1 for one c and all j: TV ≤ e/(1 + √(1−e²)).
                 (d) |õ − o| ≤ Σ|κ_j − cw_j||v_j − o|/|Σκ|, whatever the signs.
    Derivation   1  (a) Σw_j(v_j − o) = 0 and Σκ_j(v_j − o) = (õ − o)Σκ; the second likewise, as Σκ_j(v_j − õ) = 0.
                 2  (b) p̃ ∝ p·e^δ with δ = ln κ − s; P1 and P2. õ = ŏ(Σκ + ε)/Σκ, so õ − ŏ = ŏε/Σκ.
                 3  (c) is P5, (d) is the triangle inequality in (a). The best c in (c) has e = tanh(Δ/2), which is (b).
    Equality     (b) K5's keys; equal values and ε > 0. (d) two keys, c = Σκ/Σw.

K5  Statement    φ = elu + 1, ε = 0, |q_c| ≤ B, |k_jc| ≤ B: TV(p, p̃) ≤ tanh((B + ln(1+B) + 2|σ|DB²)/4), and no smaller
                 constant serves all numbers of keys.
    Derivation   1  φ increases from e^{−B} to 1 + B on [−B, B], so Σ_cφ(q_c)φ(k_jc) moves by a factor of at most
                    (1+B)e^B over j; s_j moves by at most 2|σ|DB². Add the spans; P1.
                 2  q = −B·1 and keys ±B·1 have that span exactly for σ ≥ 0 (q = B·1 for σ < 0). Their shares of p are
                    m₁e^{−σDB²} : m₂e^{σDB²} for m₁ and m₂ copies; rationals m₁/m₂ come as near as wanted to P1's t.

X1  Statement    A row of n keys, r features that are floats: N = Σκ_jv_j is computed with an error of at most
                 e_N = γ_{r+n}Σ_jΣ_f|φ_f(q)φ_f(k_j)v_j|, D = Σκ_j with at most e_D = γ_{r+n−1}Σ_jΣ_f|φ_f(q)φ_f(k_j)|, in
                 each of three orders: parallel ((φφᵀ)v), recurrent (φ(Σφvᵀ), key by key), chunked (sums of C keys,
                 added up). Then |fl(N)/fl(D) − N/D| ≤ (e_N + |N/D|e_D)/(|D| − e_D), and one rounding. Each product that
                 underflows adds at most the least subnormal number, times the factor that is still to come.
    Derivation   1  Parallel: a term passes r roundings in κ (one product, r − 1 sums), one product with v, n − 1 sums.
                 2  Recurrent, chunked: one product φv; the sums over keys, in whatever groups, are a tree with n
                    leaves, at most n − 1 deep; and r for φ(q). Zeros that stand for unseen keys, and an empty state,
                    add exactly. So r + n again: r + C + ⌈n/C⌉ + 1 is never needed.
                 3  In D the product with 1 is exact: one fewer. F0.
                 4  N'/D' − N/D = [(N' − N) − (N/D)(D' − D)]/D' for computed N', D'.
    Equality     Recurrent: a state near 1 to which each later key adds half an ulp, which is lost; as n → ∞.

Numbers are drawn, judged and charged for rounding as `proofs/exact.py` says; X1's inputs are any floats.
"""

import functools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from flint import arb
from hypothesis import assume, given, target
from hypothesis import strategies as st
from numpy.typing import NDArray

from proofs.exact import LIBM, SHARP, Array, Tight, distance, dot, exact, grid, number, row, slack, weights
from refattn import linear, masks, rounding, softmax
from refattn import perturbation as pt
from refattn.kernel import FeatureMap, elu_plus_one, linear_transformer
from refattn.rounding import Bounded, U, gamma
from refattn.testing import Ball

exponential = FeatureMap("exp", np.exp, lambda dphi, x: dphi * np.exp(x))
plain = FeatureMap("identity", lambda x: x, lambda dphi, x: dphi)
power = FeatureMap(
    "x^64", lambda x: functools.reduce(lambda y, _: y * y, range(6), x), lambda dphi, x: dphi * 64 * x**63
)


class Case(NamedTuple):
    """One problem."""

    q: Array
    k: Array
    v: Array
    options: dict[str, Any]

    def truth(self) -> tuple[Ball, Ball]:
        """Return linear attention and softmax attention of the arrays."""
        balls = [Ball.lift(x) for x in self[:3]]
        rest = {s: x for s, x in self.options.items() if s in ("mask", "scale")}
        return linear_transformer.attend(*balls, **self.linear()), softmax.attend(*balls, **rest)

    def linear(self) -> dict[str, Any]:
        """Return the options of linear attention, which has no scale."""
        return {s: x for s, x in self.options.items() if s != "scale"}

    def seen(self) -> NDArray[np.bool_]:
        """Return which keys each row sees."""
        shape = len(self.q), len(self.k)
        mask = self.options["mask"]
        return np.ones(shape, bool) if mask is None else mask.on(*shape).seen(*map(np.arange, shape))


def matrix(rows: int, columns: int, low: float, high: float) -> st.SearchStrategy[Array]:
    """Draw a matrix of multiples of 2⁻¹⁰."""
    return row(rows * columns, low, high).map(lambda x: x.reshape(rows, columns))


@st.composite
def problems(draw: st.DrawFn, maps: tuple[FeatureMap, ...]) -> Case:
    """Queries and keys of size ¼, 1 or 2, values anywhere or zeros and ones; causal or not; ε = 0 or ⅛."""
    n, D, size = draw(st.integers(1, 6)), draw(st.sampled_from([1, 4])), draw(st.sampled_from([0.25, 1.0, 2.0]))
    T, causal = draw(st.integers(1, n + 1)), draw(st.booleans())
    v = draw(matrix(n, 1, -3, 3)) + draw(st.sampled_from([0.0, 10.0]))
    if draw(st.booleans()):
        v = (v > np.median(v)).astype(float)
    options = {
        "feature_map": draw(st.sampled_from(maps)),
        "eps": draw(st.sampled_from([0.0, 0.125])),
        "mask": masks.causal() if causal else None,
        "scale": draw(st.sampled_from([None, 1.0])),
    }
    return Case(size * draw(matrix(T, D, -1, 1)), size * draw(matrix(n, D, -1, 1)), v, options)


def differences(a: Ball, b: Ball) -> Array:
    """Return |a − b|, elementwise."""
    return np.vectorize(lambda x, y: number(abs(x - y)), otypes=[float])(a.cells, b.cells)


# --- K1 ---------------------------------------------------------------------------------------------------------------


def evaluation(case: Case, bound: Array) -> Array:
    """Bound what evaluating K1's bound in float64 costs: its ingredients in running error analysis."""
    q, k, seen, phi = Bounded.lift(case.q), Bounded.lift(case.k), case.seen(), case.options["feature_map"].of
    scale, eps = case.options["scale"], case.options["eps"]
    sigma = 1 / math.sqrt(case.q.shape[1]) if scale is None else scale  # exact for D = 1 and 4
    kappa = phi(q) @ phi(k).mT
    ratio = np.log(kappa) - (q @ k.mT) * sigma
    sure = ((kappa.value > 0) | ~seen).all(axis=1)
    span = np.where(seen & sure[:, None], 2 * (ratio.error + U * np.abs(ratio.value)), 0.0).max(axis=1)
    den = Bounded(np.where(seen, kappa.value, 0.0), np.where(seen, kappa.error, 0.0)).sum(1, keepdims=True)
    own = rounding.allowance(linear_transformer.attend, *case[:3], **case.linear())
    o = np.abs(linear_transformer.attend(*case[:3], **case.linear()))
    live = (sure & seen.any(axis=1))[:, None]
    shrink = np.divide(eps, np.abs(den.value) - den.error, out=np.zeros(den.shape), where=live)
    lost = np.divide(den.error, np.abs(den.value) - den.error, out=np.zeros(den.shape), where=live)
    tilt = (span[:, None] / 4 + LIBM * U) * np.ptp(case.v, axis=0)
    return (tilt + own * (1 + shrink) + o * shrink * lost + slack(bound, 6)) * rounding.EVALUATION


def judge(tight: Tight, case: Case) -> float:
    """Judge K1(b) as the code has it."""
    bound = linear_transformer.bound(*case[:3], **case.options)
    return tight("K1", differences(*case.truth()), bound, evaluation(case, bound))


@given(case=problems((elu_plus_one, exponential)))
def test_the_spread_of_the_log_ratio_bounds_the_error(tight: Tight, case: Case) -> None:
    target(judge(tight, case))


@given(case=problems((plain,)))
def test_where_a_kernel_is_not_positive_only_the_values_bound_the_error(tight: Tight, case: Case) -> None:
    seen, kappa = case.seen(), case.q @ case.k.T
    some = seen.any(axis=1)
    assume((np.where(seen, kappa, 0.0).sum(axis=1) + case.options["eps"] != 0)[some].all())
    judge(tight, case)
    signed = ((kappa <= 0) & seen).any(axis=1)
    o = linear_transformer.attend(*case[:3], **case.linear())
    trivial = np.array([pt.trivial(case.v[s], x[None])[0] if s.any() else [0.0] for s, x in zip(seen, o, strict=True)])
    assert (linear_transformer.bound(*case[:3], **case.options)[signed] == trivial[signed]).all()


def copies(box: float, depth: int, scale: float) -> Case:
    """K5's extreme keys, as many copies of each as P1's two weights ask for."""
    share = math.exp((2 * scale * depth * box**2 - box - math.log1p(box)) / 2)
    high, low = Fraction(share).limit_denominator(8).as_integer_ratio()
    k = np.repeat([[box] * depth, [-box] * depth], [high, low], axis=0)
    v = np.repeat([[1.0], [0.0]], [high, low], axis=0)
    options = {"feature_map": elu_plus_one, "eps": 0.0, "mask": None, "scale": scale}
    return Case(np.full((1, depth), -box), k, v, options)


BOXES = [(0.01, 4, 0.5), (1.0, 1, 1.0), (1.0, 4, 0.5), (2.0, 1, 1.0)]


@pytest.mark.parametrize("sizes", BOXES)
def test_keys_at_opposite_corners_reach_the_bound(tight: Tight, sizes: tuple[float, int, float]) -> None:
    assert judge(tight, copies(*sizes)) > SHARP


def test_what_epsilon_takes_away_is_reached_where_all_values_are_equal(tight: Tight) -> None:
    case = copies(*BOXES[1])
    options = {**case.options, "eps": 0.125}
    assert judge(tight, case._replace(v=np.full_like(case.v, 3.0), options=options)) > SHARP


rational = st.builds(Fraction, st.integers(-64, 64), st.integers(1, 16))


@given(data=st.data(), n=st.integers(1, 6), c=rational.filter(bool))
def test_the_error_is_a_mean_of_values_weighted_by_what_the_kernel_misses(
    data: st.DataObject, n: int, c: Fraction
) -> None:
    kappa, v = (data.draw(st.lists(rational, min_size=n, max_size=n)) for _ in range(2))
    w = data.draw(st.lists(rational.filter(lambda x: x > 0), min_size=n, max_size=n))
    assume(sum(kappa))
    o, approximate = (sum(x * y for x, y in zip(a, v, strict=True)) / sum(a) for a in (w, kappa))
    missed = [x - c * y for x, y in zip(kappa, w, strict=True)]
    assert approximate - o == sum(x * (y - o) for x, y in zip(missed, v, strict=True)) / sum(kappa)
    assert approximate - o == sum(x * (y - approximate) for x, y in zip(missed, v, strict=True)) / (c * sum(w))


@given(data=st.data(), n=st.integers(1, 8), error=grid(0, 1023 / 1024))
def test_relative_errors_of_a_kernel_bound_the_weights(tight: Tight, data: st.DataObject, n: int, error: float) -> None:
    p, theta = data.draw(weights(n)), error * data.draw(row(n, -1, 1))
    kappa = [a * (1 + b) for a, b in zip(exact(p), exact(theta), strict=True)]
    total = sum(kappa, arb(0))
    bound = pt.relative_total_variation(np.abs(theta).max())
    # 1 − e² cancels, but e² ≤ (1 − 2⁻¹⁰)² leaves it above 2⁻¹⁰
    rounding_ = slack(bound, 6) + gamma(4) * 2**10 * bound
    target(tight("K1", number(distance(exact(p), [a / total for a in kappa])), bound, rounding_))


@given(data=st.data(), n=st.integers(2, 8), c=grid(1 / 8, 4))
def test_signed_kernels_are_off_by_at_most_what_they_miss(tight: Tight, data: st.DataObject, n: int, c: float) -> None:
    p, v, kappa = exact(data.draw(weights(n))), exact(data.draw(row(n, -3, 3))), exact(data.draw(row(n, -1, 1)))
    total = sum(kappa, arb(0))
    assume(total != 0)
    target(judge_signed(tight, p, v, kappa, arb(c)))
    if n == 2 and kappa[0] != p[0] * total and v[0] != v[1]:
        assert judge_signed(tight, p, v, kappa, total) > SHARP


def judge_signed(tight: Tight, p: list[arb], v: list[arb], kappa: list[arb], c: arb) -> float:
    """Judge K1(d)."""
    o, total = dot(p, v), sum(kappa, arb(0))
    bound = sum((abs((a - c * b) * (x - o)) for a, b, x in zip(kappa, p, v, strict=True)), arb(0)) / abs(total)
    bound_ = float(bound.upper())
    return tight("K1", number(abs(dot(kappa, v) / total - o)), bound_, slack(bound_, 1))


# --- K5 ---------------------------------------------------------------------------------------------------------------


def moved(case: Case) -> arb:
    """Return the total variation between the weights of the first row."""
    q, k = Ball.lift(case.q[:1]), Ball.lift(case.k)
    return distance(
        linear_transformer.weights(q, k).cells[0], softmax.weights(q, k, scale=case.options["scale"]).cells[0]
    )


def judge_box(tight: Tight, case: Case, box: float) -> float:
    """Judge K5."""
    bound = linear_transformer.bound_from_box(box, case.q.shape[1], scale=case.options["scale"])
    return tight("K5", number(moved(case)), bound, slack(bound, 2 * LIBM + 8))


@given(
    data=st.data(),
    box=st.sampled_from([2.0**-7, 0.25, 1.0, 2.0]),
    depth=st.sampled_from([1, 4]),
    scale=st.sampled_from([None, 1.0, -0.5]),
    n=st.integers(1, 8),
)
def test_the_size_of_the_entries_bounds_the_distance_of_elu_plus_one_to_softmax(
    tight: Tight, data: st.DataObject, box: float, depth: int, scale: float | None, n: int
) -> None:
    q, k = data.draw(matrix(1, depth, -1, 1)), data.draw(matrix(n, depth, -1, 1))
    if data.draw(st.booleans()):
        q, k = np.where(q < 0, -1.0, 1.0), np.where(k < 0, -1.0, 1.0)
    target(judge_box(tight, Case(box * q, box * k, np.zeros((n, 1)), {"scale": scale}), box))


@pytest.mark.parametrize("sizes", BOXES)
def test_keys_at_opposite_corners_reach_the_distance(tight: Tight, sizes: tuple[float, int, float]) -> None:
    assert judge_box(tight, copies(*sizes), sizes[0]) > SHARP


@pytest.mark.parametrize("box", [-1.0, math.inf])
def test_a_box_of_no_size_is_refused(box: float) -> None:
    with pytest.raises(ValueError, match="box is"):
        linear_transformer.bound_from_box(box, 1)


def test_elu_plus_one_approximates_softmax_for_small_inputs_is_false() -> None:
    """Weights that ignore the keys are nearer: TV ≤ tanh(|σ|DB²/2) by P1 with δ = −s, and 50 times so at B = .01."""
    for box in (0.25, 0.1, 0.01, 0.001):
        case = copies(box, 4, 0.5)
        ignoring = pt.tilt_total_variation(2 * 0.5 * 4 * box**2)
        assert number(moved(case)) > ignoring + slack(ignoring, LIBM + 4)
    assert number(moved(copies(0.01, 4, 0.5))) > 0.005 > 50 * pt.tilt_total_variation(2 * 0.5 * 4 * 0.01**2)


def test_elu_plus_one_is_near_softmax_everywhere_is_false() -> None:
    """Query −t, keys ±t, D = 1: κ leaves less than e^−t/(1+t) to the key that softmax gives all but e^(−2t²)."""
    found = []
    for t in (1.0, 2.0, 4.0, 8.0):
        tv = moved(Case(np.array([[-t]]), np.array([[t], [-t]]), np.zeros((2, 1)), {"scale": 1.0}))
        assert 1 - tv < (-arb(t)).exp() / (1 + arb(t)) + (-2 * arb(t) ** 2).exp()
        found.append(number(tv))
    assert (np.array(found) > [0.725, 0.956, 0.9963, 0.9999]).all()


# --- X1 ---------------------------------------------------------------------------------------------------------------


def in_three_orders(q: Array, k: Array, v: Array, feature_map: FeatureMap, chunk: int) -> Iterator[Array]:
    """Yield causal linear attention computed in parallel, in chunks, and key by key."""
    kappa = np.tril(feature_map.of(q) @ feature_map.of(k).T)
    yield kappa @ v / kappa.sum(axis=1, keepdims=True)
    with mock.patch.object(linear, "CHUNK", chunk):
        yield linear_transformer.attend(q, k, v, feature_map=feature_map, mask=masks.causal())
    yield recurrent(q, k, v, feature_map)


def recurrent(q: Array, k: Array, v: Array, feature_map: FeatureMap) -> Array:
    """Take one token at a time."""
    state, out = None, np.empty((len(q), v.shape[1]))
    for i in range(len(q)):
        one = slice(i, i + 1)
        out[one], state = linear_transformer.step(state, q[one], k[one], v[one], feature_map=feature_map)
    return out


def judge_orders(tight: Tight, q: Array, k: Array, v: Array, feature_map: FeatureMap, chunk: int) -> float:
    """Judge X1, where the denominator cannot vanish."""
    options: dict[str, Any] = {"feature_map": feature_map, "mask": masks.causal()}
    allowed = rounding.allowance(linear_transformer.attend, q, k, v, **options)
    if not np.isfinite(allowed).all():
        return 0.0
    truth = linear_transformer.attend(*map(Ball.lift, (q, k, v)), **options)
    return max(tight("X1", truth.distance(o), allowed) for o in in_three_orders(q, k, v, feature_map, chunk))


def floats(n: int, low: float, high: float) -> st.SearchStrategy[Array]:
    """Draw one column of floats with all their bits."""
    entry = st.floats(low, high, allow_subnormal=False)
    return st.lists(entry, min_size=n, max_size=n).map(lambda x: np.array(x)[:, None])


@given(
    data=st.data(),
    n=st.integers(1, 5),
    kind=st.sampled_from([(elu_plus_one, -2.0), (plain, 2.0**-10), (plain, -2.0)]),
    chunk=st.integers(1, 3),
)
def test_linear_attention_in_three_orders_is_within_one_allowance(
    tight: Tight, data: st.DataObject, n: int, kind: tuple[FeatureMap, float], chunk: int
) -> None:
    q, k, v = (data.draw(floats(n, low, 4.0)) for low in (kind[1], kind[1], -4.0))
    target(judge_orders(tight, q, k, v, kind[0], chunk))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 5), chunk=st.integers(1, 3))
def test_features_that_are_rounded_themselves_are_within_the_allowance(
    tight: Tight, seed: int, n: int, chunk: int
) -> None:
    """The power 64 rounds the square of the square …: dozens of roundings, where the sums have fewer than ten."""
    rng = np.random.default_rng(seed)
    q, k = rng.uniform(0.9, 1.1, (2, n, 1))
    target(judge_orders(tight, q, k, rng.choice([-1.0, 1.0], (n, 1)), power, chunk))


def test_many_keys_in_real_chunks_are_within_the_allowance(tight: Tight) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2 * linear.CHUNK + 3, 1))
    judge_orders(tight, q, k, v, elu_plus_one, linear.CHUNK)


def test_keys_that_are_lost_one_by_one_reach_the_allowance(tight: Tight) -> None:
    """φ = 1, then u, u, …, values 1⁺, then −1: each addition to Σκ loses u, and each to the numerator gains u."""
    n = 256
    q, k, v = np.ones((n, 1)), np.full((n, 1), U), np.full((n, 1), -1.0)
    k[0], v[0] = 1.0, 1 + 4 * U
    allowed = rounding.allowance(linear_transformer.attend, q[-1:], k, v, feature_map=plain)
    truth = linear_transformer.attend(*map(Ball.lift, (q[-1:], k, v)), feature_map=plain)
    assert tight("X1", truth.distance(recurrent(q, k, v, plain)[-1:]), allowed) > SHARP
