r"""Moments of random features, and how far attention made of them may be from softmax.

Notation     x = √σ q and y_j = √σ k_j, so that s_j = x·y_j; w_j = e^{s_j}, p = w/Σw, o = Σp_jv_j; z_j = x + y_j,
             t = ‖z‖². One row ω ~ N(0, I_D) gives κ_j, by kind: e^{ω·z − (‖x‖²+‖y‖²)/2} (positive), cosh in place of
             exp (hyperbolic), cos(ω·(x−y))e^{(‖x‖²+‖y‖²)/2} (trigonometric). Features average κ over m rows; õ is their
             Σκ_jv_j/Σκ_j. K ~ Poisson(λ) where it is named; (a)_k = a(a+1)…(a+k−1); F_b(s) = ₀F₁(;b;s).
Hypotheses   Hfin: finite inputs, at least one key · Hiid: rows ω independent and alike (R1–R3) · Hmean: E κ_j = w_j and
             finite second moments (R3: nothing else is asked of κ) · Horth: m ≤ D rows of independent χ_D norms along
             orthonormal directions, uniform (R4) · Hnorm: norm √D, uniform direction (R5).
Uses         P1 (test_perturbation.py).
Loose        nowhere.

R1  Statement    E κ = w. Var κ/w² is e^t − 1 (positive), cosh t − 1 (hyperbolic), cosh‖x−y‖² − 1 (trigonometric). The
                 second is ½(1−e^{−t}) of the first: two exponentials a row do more than two rows.
    Derivation   R2 with j = i. cosh t − 1 = ½e^{−t}(e^t − 1)².
    Equality     always; t → ∞ (the half).

R2  Statement    Cov(κ_i/w_i, κ_j/w_j) = C_ij: e^{z_i·z_j} − 1, cosh(z_i·z_j) − 1, cosh((x−y_i)·(x−y_j)) − 1.
    Derivation   E e^{ω·a} = e^{‖a‖²/2}, for complex a too, with a·a for ‖a‖². 2cosh a cosh b = cosh(a+b) + cosh(a−b),
                 and so for cos; ‖z‖² = ‖x‖² + ‖y‖² + 2x·y.
    Equality     always.

R3  Statement    c_j = p_j(v_j − o), g = cᵀCc, h = pᵀCp. If mδ > (1−δ)h and a = √g/(√(mδ) − √((1−δ)h)) > 0,
                 P(|õ − o| ≥ a or Σκ ≤ 0) ≤ δ. For several columns P(‖õ − o‖₂ ≥ ‖a‖₂ or Σκ ≤ 0) ≤ δ.
    Derivation   1  With averages κ̄_j of κ_j/w_j: N = Σc_jκ̄_j, U = Σp_jκ̄_j. õ − o = N/U, E N = Σc_j = 0, E U = 1,
                    Var N = g/m, Var U = h/m.
                 2  Let B = {|N| ≥ aU}, π = P(B). It holds all that fails: U ≤ 0, and U > 0 with |N/U| ≥ a.
                 3  a·E[U 1_B] ≤ E[|N| 1_B] ≤ √(πg/m), by Cauchy–Schwarz.
                 4  E[U 1_B] = π + E[(U − 1)(1_B − π)] ≥ π − √(π(1−π)h/m), again.
                 5  So a(√π − √((1−π)h/m)) ≤ √(g/m): the left side grows with π, and is equal at π = δ. So π ≤ δ.
                 6  Several columns: ‖N‖ for |N|, E‖N‖² = Σg/m. The signs of κ play no part.
    Equality     N/U = ±a with probability δ/2 each, at one U; N = 0 otherwise, at another.
                 By Cantelli's inequality, δ/2 on each side, a would be √(2−δ) times as large at h = 0, and m more than
                 twice as large where a is just finite.

R4  Statement    (a) The mean of κ/w over m rows, positive features, has variance (e^t − 1)/m − (m−1)/m·G,
                     G = 1 − e^{−t}₁F₁(D; D/2; t/2).
                 (b) 2/(D+2)·(1 − e^{−t/2})² ≤ G ≤ t²/(2(D+2)) for D ≥ 2. The former is Performer's, Theorem 2.
                 (c) (m−1)G ≤ r(1 − r/2)(e^t − 1) with r = 2(1 − e^{−r}) = 1.59…: less than .324 is gained, ever.
                 (d) f(ω) = Σ_jc_jκ_j(ω): with Y_l the part of degree l of f̄(u) = E f(Ru), R ~ χ_D, the variance of the
                     mean of f is 1 + (m−1)Σ_{l≥1}P_l(0)‖Y_l‖²/Var f of that of independent rows. P_l: Gegenbauer's
                     polynomial, P_l(1) = 1. Values of degree 4 lose: P_4(0) = 3/(D²−1) > 0.
    Derivation   1  (a) ω₁ + ω₂ has a uniform direction and a norm² that is χ²_{2D}; E e^{ρu·z} = F_{D/2}(ρ²t/4) and
                    E ρ^{2k} = 2^k(D)_k: E e^{(ω₁+ω₂)·z} = Σ(D)_k/(D/2)_k·(t/2)^k/k!. κκ'/w² has e^{−t} before it.
                 2  (D)_k/(2^k(D/2)_k) = Π_{i<k}(D+i)/(D+2i) =: P_k, so G = E(1 − P_K), λ = t.
                 3  (b) 1 − P_k ≤ Σ_{i<k}i/(D+2i) ≤ k(k−1)/(2(D+2)), and E K(K−1) = t². Below: (1−e^{−t/2})² is
                    E(1 − 2^{1−K} + 1_{K=0}); 2/(D+2)·(1 − 2^{1−k}) ≤ 1 − P_k is equal for k = 2; 1 − P_k ≥ 1 − P_3 =
                    3/(D+4) ≥ 2/(D+2) for k ≥ 3.
                 4  (c) (D−1)/(D+2) < 1 in (b), and t²/(2(e^t − 1)) is largest at t = r, where e^r − 1 = re^r/2.
                 5  (d) the mean of Y_l over the circle orthogonal to u is P_l(0)Y_l(u). For e^{ω·z} the part of degree
                    l is d_lα_lP_l(u·z/‖z‖), α_l = (t/2)^{l/2}(D/2)_{l/2}/(D/2)_l·₁F₁(D/2 + l/2; D/2 + l; t/2), l even,
                    d_l the dimension; ‖Y_l‖² is bilinear in it, by ⟨P_l(u·a), P_l(u·b)⟩ = P_l(a·b)/d_l.
                 6  Computed: of n = ⌈2λ⌉ + 64 terms of E(1 − P_K). 1 − P_k grows, from its value at k = 2 by at most
                    k(k−1)/2, so what is left out is to the sum as ½λ²P(K ≥ n−2) to P(K ≥ 2), at most: (eλ/j)^j for
                    λ < 2 and λ²e^{−λ}(eλ/j)^j else, j = 2λ + 62, as P(K ≥ j) ≤ e^{−λ}(eλ/j)^j. Below e^{−60} for every
                    λ, and nearer still for E P_K, as P_k falls.
    Equality     (a) always. (b) t → 0. (c) t = r, m = D → ∞.

R5  Statement    ln E κ/w = ln F_{D/2}(Dt/4) − t/2 is in [−β(t), 0], β(t) = (D+2)/2·(u − ln(1+u)), u = t/(D+2); β ≤
                 t²/(4(D+2)). Attention with infinitely many such rows has TV ≤ tanh(β(max t_j)/4).
    Derivation   1  ω·z = √D‖z‖u₁, and E u₁^{2k} = (½)_k/(D/2)_k. F_b(s) ≤ e^{s/b} as (b)_k ≥ b^k.
                 2  F_b' = F_{b+1}/b, and F_b = F_{b+1} + s/(b(b+1))·F_{b+2} ≤ (1 + s/(b(b+1)))F_{b+1}: compare powers.
                 3  So (ln F_b)' ≥ (b+1)/(b(b+1) + s): ln F_b ≥ (b+1)ln(1 + s/(b(b+1))). b = D/2, s = Dt/4.
                 4  β increases; the logarithms lie in an interval of that length; P1.
    Equality     t → 0, for every D (−t²/(4D), by Jensen's inequality, is not reached); then P1's.

Numbers are drawn, judged and charged for rounding as `proofs/exact.py` says. Expectations over ω are trapezoidal sums
of step h, whose error is known: for e^{sω} it is 2Σ_{n≥1}e^{−2π²n²/h²}cos(2πns/h) of the whole (Poisson's summation
formula; cosh for e^{isω}), and the terms beyond |ω| = L, at most 2hφ(L)e^{|s|L}/(1 − e^{−(L−|s|)h}).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from flint import arb
from hypothesis import assume, given, settings, target
from hypothesis import strategies as st

from proofs.chance import draws_needed, judge_count
from proofs.exact import (
    LIBM,
    SHARP,
    Array,
    Tight,
    distance,
    exact,
    highest,
    number,
    on_grid,
    row,
    slack,
    values,
    weights,
)
from proofs.exact import dot as product
from refattn.kernel import moments
from refattn.rounding import EVALUATION, Bounded, U, gamma

KINDS = st.sampled_from(moments.KINDS)
STEP, REACH = 3, 54  # nodes k/3 for |k| ≤ 54


def matrix(rows: int, columns: int) -> st.SearchStrategy[Array]:
    """Draw a matrix of multiples of 2⁻¹² that are at most ¼, or of 2⁻¹⁰ that are at most 1."""
    entries = row(rows * columns, -1, 1).map(lambda x: x.reshape(rows, columns))
    return st.sampled_from([0.25, 1.0]).flatmap(lambda size: entries.map(lambda x: size * x))


# --- R1, R2 -----------------------------------------------------------------------------------------------------------


def kernel(omega: Sequence[arb], x: list[arb], y: list[arb], kind: str) -> arb:
    """Return κ, as its definition has it."""
    half = (product(x, x) + product(y, y)) / 2
    if kind == "trigonometric":
        return product(omega, [a - b for a, b in zip(x, y, strict=True)]).cos() * half.exp()
    a = product(omega, [a + b for a, b in zip(x, y, strict=True)])
    return (a.exp() if kind == "positive" else a.cosh()) * (-half).exp()


def integral(x: Array, y: Array, kind: str, f: Callable[[list[arb]], list[arb]], size: float) -> list[arb]:
    """Return the means of f(κ/w) over ω, for entries of f that are Σ of e^{s·ω} or e^{is·ω} with s_c at most 4.

    `size` bounds what those terms come to, the mean of each times its factor, added.
    """
    h, end, s = arb(1) / STEP, arb(REACH) / STEP, arb(4)
    density = (2 * arb.pi()).sqrt()
    nodes = [(k * h, h * (-((k * h) ** 2) / 2).exp() / density) for k in range(-REACH, REACH + 1)]
    x_, ys = exact(x), [exact(a) for a in y]
    shrink = [(-product(x_, a)).exp() for a in ys]
    total = [arb(0)] * len(f([arb(1)] * len(ys)))
    for node in itertools.product(nodes, repeat=len(x)):
        kappa = [kernel([a for a, _ in node], x_, a, kind) * b for a, b in zip(ys, shrink, strict=True)]
        weight = math.prod((b for _, b in node), start=arb(1))
        total = [a + weight * b for a, b in zip(total, f(kappa), strict=True)]
    wave = 4 * (2 * arb.pi() * s / h - 2 * (arb.pi() / h) ** 2).exp()  # the terms n ≥ 2 are far smaller than n = 1
    rest = 2 * h * (s * end + s * s / 2 - end * end / 2).exp() / density / (1 - (-(end - s) * h).exp())
    error = ((1 + wave + rest) ** len(x) - 1) * size
    return [a + arb(0, error.upper()) for a in total]


def square_error(x: Array, y: Array) -> Array:
    """Bound the error of the computed z_i·z_j, or of differences: sums, products, and their sum over D."""
    z = np.abs(x) + np.abs(y)
    return gamma(len(x) + 4) * (z @ z.T)


def excess_error(value: Array, error: Array) -> Array:
    """Bound the error of e^s − 1 or cosh s − 1, computed as `value` from an s that is off by at most `error`."""
    return (1 + np.abs(value)) * 2 * np.expm1(error) + slack(value, 2 * LIBM + 4)


@settings(max_examples=12)
@given(data=st.data(), depth=st.sampled_from([1, 1, 2]), kind=KINDS)
def test_kernel_values_have_the_stated_moments(tight: Tight, data: st.DataObject, depth: int, kind: Any) -> None:
    x, y = data.draw(row(depth, -1, 1)), data.draw(matrix(2, depth))
    largest = math.exp(4 * depth)  # e^|C's argument|
    m1, m2, M11, M12, M22 = integral(x, y, kind, lambda k: [k[0], k[1], k[0] * k[0], k[0] * k[1], k[1] * k[1]], largest)
    assert m1.overlaps(arb(1)) and m2.overlaps(arb(1))
    truth = [[M11 - 1, M12 - 1], [M12 - 1, M22 - 1]]
    error = square_error(x, y)

    C = moments.cross_covariances(x, y, kind=kind)
    off = [[number(abs(arb(C[i, j]) - truth[i][j])) for j in range(2)] for i in range(2)]
    tight("R2", off, 0.0, excess_error(C, error))

    relative = moments.relative_variance(x[None], y, kind=kind)[0]
    off = [number(abs(arb(relative[i]) - truth[i][i])) for i in range(2)]
    tight("R1", off, 0.0, excess_error(relative, np.diag(error)))

    absolute = moments.kernel_variance(x[None], y, kind=kind)[0]
    off = [number(abs(arb(absolute[i]) - truth[i][i] * (2 * product(exact(x), exact(y[i]))).exp())) for i in range(2)]
    # the exponent 2x·y + s, then 1 − e^−s, which is no worse conditioned than s, and is squared
    exponent = gamma(depth + 4) * 2 * (np.abs(y) @ np.abs(x)) + np.diag(error)
    total = np.expm1(exponent) + 2 * gamma(depth + 4) + gamma(3 * LIBM + 6)
    tight("R1", off, 0.0, absolute * total * EVALUATION)


@given(data=st.data(), depth=st.integers(1, 4), size=st.sampled_from([0.5, 4.0]))
def test_hyperbolic_features_have_at_most_half_the_variance(
    tight: Tight, data: st.DataObject, depth: int, size: float
) -> None:
    x, y = size * data.draw(matrix(1, depth)), size * data.draw(matrix(1, depth))
    positive, hyperbolic = (moments.relative_variance(x, y, kind=kind) for kind in ("positive", "hyperbolic"))
    error = excess_error(positive, square_error(x[0], y)) / 2 + excess_error(hyperbolic, square_error(x[0], y))
    target(tight("R1", hyperbolic, positive / 2, error))


def test_positive_features_have_low_variance_is_false() -> None:
    """‖x‖ = 2.2, ‖y‖ = 1.5 along it: e^{13.69} − 1, where trigonometric features have .12; against it, the reverse."""
    x, y = np.array([[2.2, 0.0]]), np.array([[1.5, 0.0]])
    along = {kind: moments.relative_variance(x, y, kind=kind).item() for kind in moments.KINDS}
    against = {kind: moments.relative_variance(x, -y, kind=kind).item() for kind in moments.KINDS}
    assert along["positive"] > 8e5 > 6e6 * along["trigonometric"]
    assert against["trigonometric"] > 4e5 * against["positive"]


def test_what_overflows_is_infinite_and_what_does_not_is_not() -> None:
    far = np.array([[30.0]])
    assert moments.relative_variance(far, far, kind="positive").item() == math.inf
    assert moments.relative_variance(far, -far, kind="positive").item() == 0.0
    near = moments.kernel_variance([[20.0]], [[-30.0]], kind="positive").item()  # e^{2·20·(−30) + 100}
    assert near == 0.0
    assert 0 < moments.kernel_variance([[20.0]], [[-10.0]], kind="positive").item() < math.inf


# --- R3 ---------------------------------------------------------------------------------------------------------------


def radius(p: Bounded, v: Array, C: Bounded, m: int, delta: float) -> Bounded:
    """Return R3's radius in running error analysis; δ may be the float nearest to what is meant."""
    p, values_ = Bounded(p.value[:, None], p.error[..., None]), Bounded.lift(v)
    c = p * (values_ - p.mT @ values_)
    g, h = (c * (C @ c)).sum(0, keepdims=True), (p * (C @ p)).sum(0, keepdims=True)
    d = Bounded(np.array([[delta]]), np.array([[U * delta]]))
    root: Any = np.sqrt
    return root(g) / (root(d * float(m)) - root(h * (1.0 - d)))


def claimed(p: Array, v: Array, C: list[list[Fraction]], m: int, delta: float) -> tuple[Array, Array]:
    """Return the radius that the code claims for exact covariances, and a bound on its rounding."""
    floats = np.array([[float(a) for a in b] for b in C])
    a = moments.tail_radius(p, v, floats, m, delta)
    error = radius(Bounded.lift(p), v, Bounded(floats, U * np.abs(floats)), m, delta).error[0]
    return a, np.where(np.isnan(error), np.inf, 2 * error * EVALUATION)


class Law(NamedTuple):
    """A law of κ/w for one row ω: its values, and their probabilities."""

    atoms: list[list[Fraction]]
    chances: list[Fraction]

    def covariances(self) -> list[list[Fraction]]:
        """Return C."""
        S = range(len(self.atoms[0]))
        return [
            [sum((c * (a[i] - 1) * (a[j] - 1) for a, c in zip(*self, strict=True)), Fraction(0)) for j in S] for i in S
        ]

    def outcomes(self, p: Array, v: Array, m: int) -> list[tuple[list[Fraction], Fraction, Fraction]]:
        """Return N for each column, U, and their probability, for every draw of m rows."""
        weight, columns = [Fraction(a) for a in p], [[Fraction(a) for a in column] for column in v.T]
        means = [sum((a * b for a, b in zip(weight, column, strict=True)), Fraction(0)) for column in columns]
        found = []
        for draw in itertools.product(range(len(self.atoms)), repeat=m):
            mean = [sum((self.atoms[i][j] for i in draw), Fraction(0)) / m for j in range(len(p))]
            mass = [a * b for a, b in zip(weight, mean, strict=True)]
            N = [
                sum((a * (b - o) for a, b in zip(mass, column, strict=True)), Fraction(0))
                for column, o in zip(columns, means, strict=True)
            ]
            found.append((N, sum(mass, Fraction(0)), math.prod((self.chances[i] for i in draw), start=Fraction(1))))
        return found


@st.composite
def laws(draw: st.DrawFn, keys: int) -> Law:
    """Two to four values, of mean 1: positive ones divided by their mean, or signed ones moved there."""
    count = draw(st.integers(2, 4))
    signed = draw(st.booleans())
    chances = [Fraction(a) for a in on_grid(draw(row(count, 1 / 16, 1)), 6)]
    entries = st.integers(-8 if signed else 0, 8).map(Fraction)
    atoms = [draw(st.lists(entries, min_size=keys, max_size=keys)) for _ in range(count)]
    mean = [sum((c * a[j] for a, c in zip(atoms, chances, strict=True)), Fraction(0)) for j in range(keys)]
    if signed:
        shrink = draw(st.sampled_from([1, 4, 16]))
        return Law([[1 + (a[j] - mean[j]) / shrink for j in range(keys)] for a in atoms], chances)
    assume(all(mean))
    return Law([[a[j] / mean[j] for j in range(keys)] for a in atoms], chances)


@settings(max_examples=80)
@given(
    data=st.data(),
    keys=st.integers(1, 3),
    m=st.integers(1, 3),
    delta=st.sampled_from([1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4]),
)
def test_the_radius_is_left_no_more_often_than_stated(
    tight: Tight, data: st.DataObject, keys: int, m: int, delta: float
) -> None:
    law, p = data.draw(laws(keys)), data.draw(weights(keys))
    v = np.stack([data.draw(values(keys)), data.draw(values(keys))], axis=1)
    a, rounding = claimed(p, v, law.covariances(), m, delta)
    far = a + rounding
    assume(np.isfinite(far).any())
    outcomes, worst = law.outcomes(p, v, m), 0.0
    for c in np.flatnonzero(np.isfinite(far)):
        limit = Fraction(float(far[c]))
        rate = sum((q for N, total, q in outcomes if total <= 0 or abs(N[c]) > limit * total), Fraction(0))
        worst = max(worst, tight("R3", float(rate), delta, U))
    if np.isfinite(far).all():
        square = sum((Fraction(float(b)) ** 2 for b in far), Fraction(0))
        norms = ((sum((b * b for b in N), Fraction(0)), total, q) for N, total, q in outcomes)
        rate = sum((q for norm, total, q in norms if total <= 0 or norm > square * total**2), Fraction(0))
        worst = max(worst, tight("R3", float(rate), delta, U))
    target(worst)


P, V = np.array([0.5, 0.5]), np.array([[1.0], [-1.0]])  # o = 0, c = (½, −½): κ = U ± N


def extreme(k: int, spread: Fraction, a: Fraction) -> tuple[Fraction, Law]:
    """Return δ = 1/(1 + k²) and the law that leaves a that often, at h = spread², for P and V and one row."""
    delta, low, high = Fraction(1, 1 + k * k), 1 - k * spread, 1 + spread / k
    atoms = [[low * (1 + a), low * (1 - a)], [low * (1 - a), low * (1 + a)], [high, high]]
    return delta, Law(atoms, [delta / 2, delta / 2, 1 - delta])


EXTREMES = [
    (1, Fraction(1, 2), Fraction(1, 2)),
    (2, Fraction(1, 64), Fraction(1, 2)),
    (3, Fraction(1, 4), Fraction(1)),
    (4, Fraction(1, 1024), Fraction(3)),
]


@pytest.mark.parametrize("case", EXTREMES)
def test_three_values_leave_the_radius_as_often_as_stated(tight: Tight, case: tuple[int, Fraction, Fraction]) -> None:
    """With a ≤ 1 they are positive: no sign helps."""
    delta, law = extreme(*case)
    a, rounding = claimed(P, V, law.covariances(), 1, float(delta))
    assert tight("R3", float(case[2]), a, rounding) > SHARP
    assert tight("R3", a, float(case[2]), rounding) > SHARP
    outcomes = law.outcomes(P, V, 1)
    assert sum(q for N, total, q in outcomes if abs(N[0]) >= case[2] * total) == delta
    both = np.c_[0.6 * V, 0.8 * V]  # two columns: the same along (3, 4)/5
    a, rounding = claimed(P, both, law.covariances(), 1, float(delta))
    assert tight("R3", float(case[2]), np.sqrt(np.sum(a * a)), rounding.sum() + slack(case[2], 4)) > SHARP


@pytest.mark.parametrize("half", [False, True])
def test_half_the_radius_is_convicted_and_the_radius_is_not(half: bool) -> None:
    """A claim at δ = 1/17, of the law that leaves half its radius, and all of it up to there, with probability 1/5."""
    delta = Fraction(1, 17)
    rate, law = extreme(2, Fraction(1, 64), Fraction(1, 2))
    a, rounding = claimed(P, V, law.covariances(), 1, float(delta))
    a = (a + rounding)[0] * (0.5 if half else 1.0)
    failing = [abs(N[0]) > Fraction(a) * total for N, total, _ in law.outcomes(P, V, 1)]
    assert sum(q for q, fails in zip(law.chances, failing, strict=True) if fails) == (rate if half else 0)

    draws = draws_needed(float(delta), float(rate))
    drawn = np.random.default_rng(3).choice(3, size=draws, p=[float(q) for q in law.chances])
    failures = int(np.array(failing)[drawn].sum())
    if half:
        with pytest.raises(AssertionError, match="at most"):
            judge_count(failures, draws, float(delta))
    else:
        judge_count(failures, draws, float(delta))


@pytest.mark.parametrize("kind", moments.KINDS)
@pytest.mark.parametrize("amplitude", [0.35, 0.6, 0.8])
def test_drawn_features_leave_the_radius_no_more_often_than_stated(kind: Any, amplitude: float) -> None:
    """n = 32 keys, D = 8. A shift common to all keys leaves p and o, and makes z as small as it gets."""
    rng, delta, m = np.random.default_rng(7), 1 / 16, 1024
    x, y = amplitude * rng.standard_normal(8), amplitude * rng.standard_normal((32, 8))
    v = rng.standard_normal((32, 2))
    p = np.exp(y @ x)
    p /= p.sum()
    plain = moments.tail_radius(p, v, moments.cross_covariances(x, y, kind=kind), m, delta)
    sign = -1.0 if kind == "trigonometric" else 1.0
    y = y - p @ y - sign * x
    a = moments.tail_radius(p, v, moments.cross_covariances(x, y, kind=kind), m, delta)
    assert (a < plain).all() and np.isfinite(a).all()
    z, draws, failures = y + sign * x, draws_needed(delta, 3 / 16), np.zeros(2, int)
    size = np.exp(-np.sum(z * z, axis=1) / 2) if kind != "trigonometric" else np.exp(np.sum(z * z, axis=1) / 2)
    of = {"positive": np.exp, "hyperbolic": np.cosh, "trigonometric": np.cos}[kind]
    for _ in range(draws):  # κ/w is e^{ω·z − ‖z‖²/2}, and so on
        mass = p * (of(rng.standard_normal((m, 8)) @ z.T).mean(axis=0) * size)
        failures += (mass.sum() <= 0) | (np.abs(mass @ v / mass.sum() - p @ v) > a)
    for count in failures:
        judge_count(int(count), draws, delta)


@settings(max_examples=10)
@given(data=st.data(), keys=st.integers(2, 3), kind=KINDS, delta=st.sampled_from([1 / 16, 1 / 2]))
def test_the_radius_is_that_of_the_features_own_variances(
    tight: Tight, data: st.DataObject, keys: int, kind: Any, delta: float
) -> None:
    """From the inputs to the radius: g and h are integrals of N² and (U − 1)²."""
    x, y, v = data.draw(row(1, -1, 1)), data.draw(row(keys, -1, 1))[:, None], data.draw(values(keys))
    w = [product(exact(x), exact(a)).exp() for a in y]
    p_ = [a / sum(w, arb(0)) for a in w]
    o = product(p_, exact(v))
    c_ = [a * (b - o) for a, b in zip(p_, exact(v), strict=True)]
    # N and U − 1 are sums of Σ|c| and 2 at most, in units of κ/w
    size = math.exp(4) * (4 + float(sum((abs(a) for a in c_), arb(0)).upper()) ** 2)
    g, h = integral(x, y, kind, lambda k: [product(c_, k) ** 2, (product(p_, k) - 1) ** 2], size)
    m = 4096
    room = (arb(m) * delta).sqrt() - ((1 - arb(delta)) * h.nonnegative_part()).sqrt()
    truth = g.nonnegative_part().sqrt() / room

    lifted = np.exp(Bounded.lift(x[None]) @ Bounded.lift(y).mT)
    p = (lifted / lifted.sum(1, keepdims=True))[0]
    C = moments.cross_covariances(x, y, kind=kind)
    a = moments.tail_radius(p.value, v[:, None], C, m, delta)[0]
    error = radius(p, v[:, None], Bounded(C, excess_error(C, square_error(x, y))), m, delta).error[0, 0]
    assume(math.isfinite(error))
    tight("R3", number(abs(truth - arb(float(a)))), 0.0, 2 * error * EVALUATION)


def test_with_too_few_rows_nothing_is_claimed() -> None:
    C, delta = np.full((2, 2), 3.0), 1 / 4
    assert moments.tail_radius(P, V, C, 9, delta) == math.inf  # mδ = (1 − δ)h
    assert np.isfinite(moments.tail_radius(P, V, C, 10, delta)).all()
    assert moments.tail_radius(P, V, np.full((2, 2), np.inf), 10, delta) == math.inf
    unseen = np.array([[1.0, 1.0], [1.0, np.inf]])  # an overflow beside a weight of 0
    assert moments.tail_radius(np.array([1.0, 0.0]), V, unseen, 10, delta) == math.inf
    assert np.isnan(moments.tail_radius(P, V * np.nan, C, 10, delta)).all()


def test_leading_axes_are_problems_of_their_own() -> None:
    rng = np.random.default_rng(5)
    x, y, v = rng.uniform(-1, 1, (3, 4)), rng.uniform(-1, 1, (5, 4)), rng.uniform(-1, 1, (5, 2))
    p = np.exp(x @ y.T)
    p /= p.sum(axis=1, keepdims=True)
    C = moments.cross_covariances(x, y, kind="hyperbolic")
    a = moments.tail_radius(p, v, C, 100_000, 0.25)
    for i in range(3):
        alone = moments.cross_covariances(x[i], y, kind="hyperbolic")
        error = excess_error(alone, square_error(x[i], y))
        assert (np.abs(C[i] - alone) <= 2 * error).all()
        room = radius(Bounded.lift(p[i]), v, Bounded(alone, error), 100_000, 0.25)
        assert (np.abs(a[i] - room.value[0]) <= 4 * room.error[0]).all() and np.isfinite(room.error).all()


# --- R4 ---------------------------------------------------------------------------------------------------------------


def rising(a: Any, k: int) -> Any:
    """Return (a)_k."""
    return math.prod((a + i for i in range(k)), start=a * 0 + 1)


@pytest.mark.parametrize("depth", [2, 3, 4, 8])
def test_orthogonal_rows_have_the_stated_product(depth: int) -> None:
    """Term by term, another way: the parts of z along orthonormal directions are entries of a uniform vector."""
    half = Fraction(1, 2)
    b = depth * half
    for k in range(12):
        # E R^{2i} = 2^i (D/2)_i; E s^{2i}r^{2j} = (½)_i(½)_j/(D/2)_{i+j}
        own = sum(
            2**k * rising(b, i) * rising(b, k - i) * rising(half, i) * rising(half, k - i)
            / (rising(b, k) * math.factorial(2 * i) * math.factorial(2 * (k - i)))
            for i in range(k + 1)
        )  # fmt: skip
        assert own == rising(Fraction(depth), k) / (rising(b, k) * 2**k * math.factorial(k))


def gain(t: arb, depth: int) -> arb:
    """Return G."""
    return 1 - (-t).exp() * (t / 2).hypgeom_1f1(arb(depth), arb(depth) / 2)


def series_slack(value: Array | float, mean: float) -> Array:
    """Charge a sum of terms (λ^k/k!)e^−λ·(1 − P_k) of one sign: 8 roundings a term; and the exponent."""
    return slack(value, 8 * (math.ceil(2 * mean) + 64) + 16 * (1 + math.ceil(2 * mean)))


norms = st.sampled_from([2.0**-6, 2.0**-3, 0.5, 1.25, 2.0, 5.0, 25.0])
depths = st.sampled_from([2, 3, 4, 16, 64])


def along(norm: float, depth: int) -> tuple[Array, Array]:
    """Return x and y whose z has this norm."""
    x = np.zeros((1, depth))
    x[0, 0] = norm / 2
    return x, x


@given(norm=norms, depth=depths, data=st.data())
def test_orthogonal_rows_gain_what_is_stated(tight: Tight, norm: float, depth: int, data: st.DataObject) -> None:
    t, m = arb(norm) ** 2, data.draw(st.integers(1, depth))
    truth, computed = gain(t, depth), moments.orthogonal_gain(*along(norm, depth)).item()
    rounding = series_slack(computed, norm**2)
    tight("R4", number(abs(arb(computed) - truth)), 0.0, rounding)

    variance = (t.expm1() - (m - 1) * truth) / m
    computed = moments.orthogonal_variance(*along(norm, depth), m).item()
    terms = math.expm1(norm**2) / m * (1 + slack(1.0, 4))
    tight("R4", number(abs(arb(computed) - variance)), 0.0, slack(terms, LIBM + 4) + rounding * (1 + slack(1.0, 3)))

    most = t * t / (2 * (depth + 2))
    least = 2 * (1 - (-t / 2).exp()) ** 2 / (depth + 2)
    judge_order(tight, "R4", truth, most)
    judge_order(tight, "R4", least, truth)
    r = 2 + (-2 * arb(-2).exp()).lambertw()
    target(judge_order(tight, "R4", (m - 1) * truth, r * (1 - r / 2) * t.expm1()))


def judge_order(tight: Tight, statement: str, small: arb, large: arb) -> float:
    """Judge small ≤ large, two real numbers."""
    return tight(statement, number(small), float(large.upper()), slack(float(large.upper()), 1))


@pytest.mark.parametrize("depth", [2, 5, 64])
def test_short_vectors_gain_as_much_as_they_may(tight: Tight, depth: int) -> None:
    t = arb(2) ** -12
    assert judge_order(tight, "R4", gain(t, depth), t * t / (2 * (depth + 2))) > SHARP
    assert judge_order(tight, "R4", 2 * (1 - (-t / 2).exp()) ** 2 / (depth + 2), gain(t, depth)) > SHARP


def gegenbauer(degree: int, depth: int, c: arb) -> arb:
    """Return P_l(c)."""
    before, now = arb(1), c
    for n in range(1, degree):
        before, now = now, ((2 * n + depth - 2) * c * now - n * before) / (n + depth - 2)
    return now if degree else before


def zonal(degree: int, depth: int, t: arb) -> arb:
    """Return d_lα_l² for even l ≥ 2: what degree l of two exponentials e^{ω·z} has in common, ÷ P_l of their angle."""
    half, n = arb(depth) / 2, degree // 2
    alpha = (t / 2) ** n * rising(half, n) / rising(half, degree) * (t / 2).hypgeom_1f1(half + n, half + degree)
    dimension = arb(2 * degree + depth - 2) / (degree + depth - 2) * math.comb(degree + depth - 2, degree)
    return dimension * alpha**2


DEGREES = range(2, 42, 2)


def rest(depth: int, t: arb) -> arb:
    """Bound Σd_lα_l² beyond `DEGREES`: successive ratios fall, and |P_l| ≤ 1."""
    last, before = zonal(DEGREES[-1], depth, t), zonal(DEGREES[-2], depth, t)
    ratio = (last / before) * t.exp()  # α_l is its factor times ₁F₁, which is between 1 and e^{t/2}
    assert ratio < 0.5
    return 2 * last


@pytest.mark.parametrize("depth", [2, 3, 8])
@pytest.mark.parametrize("norm", [0.5, 2.0])
def test_harmonics_give_the_same_gain(depth: int, norm: float) -> None:
    t = arb(norm) ** 2
    covariance = sum((gegenbauer(n, depth, arb(0)) * zonal(n, depth, t) for n in DEGREES), arb(0))
    covariance += arb(0, rest(depth, t).upper())
    assert covariance.overlaps(-gain(t, depth) * t.exp()) and covariance.rad() < abs(covariance) * 2.0**-100


def output_ratio(depth: int, norm: float) -> arb:
    """Return the variance of Σc_jκ_j over D orthogonal rows ÷ over D independent ones, x = 0.

    Keys along the axes and the diagonals of the cube, all of one norm; values of one sign on each, of sum zero. What
    the cube's symmetries leave unchanged has no part of degree 2.
    """
    unit = arb(depth).sqrt()
    axes = [[arb(s if i == j else 0) for j in range(depth)] for i in range(depth) for s in (1, -1)]
    corners = [[s / unit for s in signs] for signs in itertools.product((1, -1), repeat=depth)]
    terms: dict[tuple[str, int], tuple[arb, Fraction]] = {}  # (who, matching signs): the cosine, and Σ of c_ic_j
    for (i, a), (j, b) in itertools.product(enumerate(axes + corners), repeat=2):
        kinds = (i < len(axes)) + (j < len(axes))
        c = math.prod(Fraction(1, len(axes) if n < len(axes) else -len(corners)) for n in (i, j))
        cosine = product(a, b)
        key = f"{kinds}", round(float(cosine) * 60)
        terms[key] = cosine, terms.get(key, (cosine, Fraction(0)))[1] + c
    t = arb(norm) ** 2
    rows = [(cosine, arb(c.numerator) / c.denominator) for cosine, c in terms.values()]
    variance = sum((c * (t * (1 + cosine)).exp() for cosine, c in rows), arb(0))
    covariance = arb(0, (4 * rest(depth, t)).upper())  # Σ|c| = 2
    for n in DEGREES:
        covariance += gegenbauer(n, depth, arb(0)) * zonal(n, depth, t) * sum(
            (c * gegenbauer(n, depth, cosine) for cosine, c in rows), arb(0)
        )  # fmt: skip
    return 1 + (depth - 1) * covariance / variance


@pytest.mark.parametrize(
    ("depth", "norm", "thousandths"), [(2, 0.5, 1150), (2, 1.5, 1055), (3, 0.5, 1162), (4, 0.5, 1165), (5, 0.5, 1163)]
)
def test_orthogonal_features_always_help_the_output_is_false(depth: int, norm: float, thousandths: int) -> None:
    """The numerator of õ − o has up to 17 % more variance. The most that degree 4 may lose is 3(m−1)/(D²−1)."""
    ratio = output_ratio(depth, norm)
    assert thousandths < ratio * 1000 < thousandths + 1
    assert ratio < 1 + arb(3 * (depth - 1)) / (depth**2 - 1)


# --- R5 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_rows_of_one_norm_have_the_stated_mean(depth: int) -> None:
    """Term by term, from the moments of one entry of a uniform vector: E e^{√(Dt)u₁} = ₀F₁(;D/2;Dt/4)."""
    b, half = Fraction(depth, 2), Fraction(1, 2)
    for k in range(16):
        moment = rising(half, k) / rising(b, k)
        assert depth**k * moment / math.factorial(2 * k) == Fraction(depth, 4) ** k / (rising(b, k) * math.factorial(k))


def log_ratio(t: arb, depth: int) -> arb:
    """Return ln E κ/w."""
    return (depth * t / 4).hypgeom_0f1(arb(depth) / 2).log() - t / 2


def beta(t: arb, depth: int) -> arb:
    """Return the bound on minus that."""
    u = t / (depth + 2)
    return arb(depth + 2) / 2 * (u - u.log1p())


@given(norm=st.one_of(norms, st.sampled_from([8.0, 50.0])), depth=st.sampled_from([1, 2, 3, 16, 64, 256]))
def test_rows_of_one_norm_miss_by_at_most_what_is_stated(tight: Tight, norm: float, depth: int) -> None:
    t = arb(norm) ** 2
    truth = log_ratio(t, depth)
    computed = moments.regularized_log_ratio(*along(norm, depth)).item()
    # where less than half is lost, ln(1 − lost) is conditioned by 2; else ln is at least ½, and is off by the error of
    # the sum and by what is taken out of it against overflow, λ = t/2 in all
    rounding = 2 * series_slack(computed, norm**2 / 2) + series_slack(1.0, norm**2 / 2) * (-computed > 0.5)
    rounding += (norm**2 / 2) * gamma(LIBM + 4 + math.ceil(norm**2 / 512))
    tight("R5", number(abs(arb(computed) - truth)), 0.0, rounding)
    target(judge_order(tight, "R5", -truth, beta(t, depth)))
    judge_order(tight, "R5", beta(t, depth), t * t / (4 * (depth + 2)))


@pytest.mark.parametrize("depth", [1, 2, 64])
def test_short_vectors_miss_as_much_as_they_may(tight: Tight, depth: int) -> None:
    t = arb(2) ** -8
    assert judge_order(tight, "R5", -log_ratio(t, depth), beta(t, depth)) > SHARP


def test_the_distance_of_far_keys_is_one() -> None:
    assert moments.regularized_total_variation([1e100, 1e200, math.inf], 4).tolist() == [1.0, 1.0, 1.0]


def judge_attention(tight: Tight, x: Array, y: Array) -> float:
    """Judge the distance of softmax's weights to those of infinitely many rows of norm √D."""
    D, x_ = len(x), exact(x)
    s = [product(x_, exact(a)) for a in y]
    squares = [product(a, a) for a in ([b + c for b, c in zip(x_, exact(key), strict=True)] for key in y)]
    w, moved = [a.exp() for a in s], [(a + log_ratio(t, D)).exp() for a, t in zip(s, squares, strict=True)]
    p, p2 = ([a / sum(z, arb(0)) for a in z] for z in (w, moved))
    bound = moments.regularized_total_variation(float(highest(squares).sqrt().upper()), D)
    # u − ln(1 + u) as w(u − 2Σ) or directly: below 96 roundings, r counted four times
    return tight("R5", number(distance(p, p2)), bound, slack(bound, 96))


@given(data=st.data(), depth=st.sampled_from([1, 2, 4]), n=st.integers(1, 6), size=st.sampled_from([1.0, 4.0]))
def test_their_attention_is_no_further_than_stated(
    tight: Tight, data: st.DataObject, depth: int, n: int, size: float
) -> None:
    x, y = size * data.draw(row(depth, -1, 1)), size * data.draw(matrix(n, depth))
    if data.draw(st.booleans()):
        y[0] = -x
    target(judge_attention(tight, x, y))


@pytest.mark.parametrize("radius_", [2.0**-20, 0.5, 1.75, 2.0, 4.0])
def test_the_distance_is_evaluated_without_cancellation(tight: Tight, radius_: float) -> None:
    """Below, near and above u = 1, where D = 1 and 2."""
    for depth in (1, 2):
        bound = moments.regularized_total_variation(radius_, depth)
        off = abs(arb(float(bound)) - (beta(arb(radius_) ** 2, depth) / 4).tanh())
        tight("R5", number(off), 0.0, slack(bound, 96))


@pytest.mark.parametrize("depth", [1, 4])
def test_two_short_keys_reach_the_distance(tight: Tight, depth: int) -> None:
    y = np.zeros((2, depth))
    y[1, 0] = 2.0**-4
    assert judge_attention(tight, np.zeros(depth), y) > SHARP


def test_rows_of_one_norm_are_uniformly_close_to_softmax_is_false() -> None:
    """x = te₁, y = te₂, D = 64: e^{x·y} = 1 for every t; the ratio is .081 at t = 4 and 2.7e−10 at t = 8."""
    assert 0.0805 < log_ratio(arb(2 * 4**2), 64).exp() < 0.0815
    assert 2.65e-10 < log_ratio(arb(2 * 8**2), 64).exp() < 2.75e-10
    x, y = np.eye(64)[:1], np.eye(64)[1:2]
    assert np.exp(moments.regularized_log_ratio(8 * x, 8 * y)).item() < 1e-9


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: moments.relative_variance([[1.0]], [[1.0, 2.0]], kind="positive"), "y has D = 2"),
        (lambda: moments.kernel_variance([[1.0]], [[1.0]], kind="relu"), "kind is 'relu'"),  # type: ignore[arg-type]
        (lambda: moments.cross_covariances([1.0], [1.0], kind="positive"), "y has shape"),
        (lambda: moments.orthogonal_gain(np.zeros((1, 0)), np.zeros((1, 0))), "x has depth"),
        (lambda: moments.orthogonal_variance([[1.0]], [[1.0]], 2), "count is 2"),
        (lambda: moments.orthogonal_gain([[1e5, 0.0]], [[1.0, 0.0]]), "x and y have"),
        (lambda: moments.orthogonal_variance([[1e200, 0.0]], [[1.0, 0.0]], 2), "x and y have"),
        (lambda: moments.regularized_log_ratio([[math.nan]], [[1.0]]), "x and y have"),
        (lambda: moments.tail_radius(P, V, np.eye(3), 4, 0.5), "covariances has S = 3"),
        (lambda: moments.tail_radius(P, V[:1], np.eye(2), 4, 0.5), "v has S = 1"),
        (lambda: moments.tail_radius(P, V, np.eye(2), 0, 0.5), "count is 0"),
        (lambda: moments.tail_radius(P, V, np.eye(2), 4, 1.0), "delta is 1"),
        (lambda: moments.regularized_total_variation(-1.0, 4), "radius is -1"),
    ],
)
def test_what_is_no_problem_is_refused(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
