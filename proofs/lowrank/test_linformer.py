r"""Linformer is as far from attention as its projected keys are from the keys they stand for, and no rank is enough.

Notation     One row and one column: weights p over n keys, o = Σp_jv_j; projected k̃ = EK, ṽ = FV, r rows each;
             p̂ = softmax_l(σ q·k̃_l), õ = Σp̂_lṽ_l. P̃ = softmax(σ QK̃ᵀ)F, the effective weights.
             A lift is a map g of the keys onto the projected keys; c_l keys chose l, v̄_l is their mean value.
Hypotheses   Hfin: finite inputs, at least one key. L3 needs r ≤ n for a lift; otherwise P2's last resort remains.
Uses         P1, P2 (test_perturbation.py), L4 (test_projection.py). The code's bound is the least of L3 and L4.
Loose        nowhere, in that each is reached; but for random E the tilt is large, and what is answered is P2's end.

L3  Statement    For every lift, with δ_j = σ q·(k̃_{g(j)} − k_j) − ln c_{g(j)},
                     |õ − o| ≤ |Σ_l p̂_l(ṽ_l − v̄_l)| + tanh(osc δ/4)·range(v),
                 and |õ − o| ≤ max(max v − õ, õ − min v).
    Derivation   1  p'_j = p̂_{g(j)}/c_{g(j)} sums to 1 and is ∝ e^{σ q·k̃_{g(j)} − ln c_{g(j)}} = e^{s_j+δ_j}.
                 2  Σ_jp'_jv_j = Σ_lp̂_lv̄_l, so õ − o = Σ_lp̂_l(ṽ_l − v̄_l) + Σ_j(p'_j − p_j)v_j; P1 and P2 for the last.
                 3  The first term is at most max_l|ṽ_l − v̄_l| ≤ max_j|ṽ_{g(j)} − v_j|, a mean being between extremes:
                    never above the bound with that maximum, which needs no p̂.
                 4  Any lift will do; nearest projected keys make δ small. The second bound is P2.
    Equality     Each term alone, and ln c alone: two groups, their p at P1's t, v = 1 on one of them.

L5  Statement    (a) F fixed, r < n: some v ≠ 0 in its kernel has õ = 0 for all q and k, while distinct unit vectors as
                     keys and q = t·k_j drive o to v_j: the error comes as near as wanted to max|v| ≥ ½range(v).
                 (b) P̃ = AB, A (n×r) and B (r×n) row-stochastic: against P = I the mean TV is at least 1 − r/n. Signed
                     factors: ‖I − P̃‖² ≥ n − r (Frobenius).
    Derivation   1  (a) σ q·k_i − σ q·k_j = −σt(1 − k_i·k_j) → −∞.
                 2  (b) TV(e_i, P̃_i) = 1 − P̃_ii; tr P̃ = Σ_lΣ_iA_ilB_li ≤ Σ_l max_iA_il ≤ r. Signed: Eckart & Young.
    Equality     (a) max v = −min v. (b) both: r keys that represent themselves.

Numbers are judged and charged for rounding as `proofs/exact.py` says.
"""

from typing import NamedTuple

import flint
import numpy as np
import pytest
from flint import arb
from hypothesis import given, target
from hypothesis import strategies as st

from proofs.exact import LIBM, SHARP, SPANS, Array, Tight, dot, number, on_grid, slack
from refattn import perturbation, rounding, softmax
from refattn.lowrank import linformer
from refattn.rounding import Bounded, U, gamma
from refattn.testing import Ball


class Case(NamedTuple):
    """One problem."""

    q: Array
    k: Array
    v: Array
    E: Array
    F: Array


# --- L3 ---------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Keys in clusters with averages of them, or random or fitted projections, at most one more than the keys."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    D, kind = draw(st.sampled_from([1, 4])), draw(st.sampled_from(["averages", "random", "fitted"]))
    spread, reach = draw(st.sampled_from([0.0, 0.05, 0.5])), draw(st.sampled_from([0.5, 1.0, 3.0]))
    n, groups = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    q = reach * rng.standard_normal((2, D))
    k = rng.standard_normal((len(sizes), D))[groups] + spread * rng.standard_normal((n, D))
    v = rng.standard_normal((len(sizes), 2))[groups] + spread * rng.standard_normal((n, 2))
    v[:, 0] = v[:, 0] > 0
    if kind == "averages":
        E = (groups == np.arange(len(sizes))[:, None]) / np.array(sizes)[:, None]
        noise = draw(st.sampled_from([0.0, 0.01, 0.1])) * rng.standard_normal((2, *E.shape))
        return Case(q, k, v, E + noise[0], E + noise[1])
    rank = draw(st.integers(1, min(n + 1, 8)))
    if kind == "fitted":
        return Case(q, k, v, *linformer.fit(rng.standard_normal((8, D)), k, v, rank=rank))
    return Case(q, k, v, *linformer.draw(rng, q, k, v, rank=rank))


def evaluation(case: Case, bound: Array, scale: float | None) -> Array:
    """Bound what evaluating L3's bound in float64 costs, for any lift that it may have chosen."""
    q, k, v, E, F = map(Bounded.lift, case)
    (r, n), D, top = E.shape, q.shape[1], np.abs(case.v).max(axis=0)
    kt, vt, sigma = E @ k, F @ v, abs(D**-0.5 if scale is None else scale)  # D is 1 or 4
    p = softmax.weights(q, kt, scale=scale)
    size = np.abs(vt.value) + vt.error + top
    # v̄ is a sum of v/c, 1/c rounded: n + 1 roundings; ṽ − v̄ is one, its mean under p̂ r more
    first = p.error @ size + (p.value + p.error) @ (vt.error + gamma(n + 1) * top + gamma(r + 1) * size)
    far = (np.abs(kt.value) + kt.error).max(axis=0) + np.abs(case.k).max(axis=0)
    reach = sigma * (np.abs(case.q) @ far) + np.log(n)
    tilt = sigma * (np.abs(case.q) @ kt.error.max(axis=0)) + gamma(D + 4) * reach + LIBM * U * np.log(n)
    second = (2 * tilt[:, None] / 4 + LIBM * U) * np.ptp(case.v, axis=0)
    own = rounding.allowance(linformer.attend, *case, scale=scale)
    return (first + second + own + slack(bound, 4)) * rounding.EVALUATION


def weighing(case: Case, bound: Array, scale: float | None) -> Array:
    """Bound what evaluating L4's bound in float64 costs, from the errors of both weights."""
    q, k, v, E, F = case
    a, p = linformer.weights(q, k, E, F, scale=scale), softmax.weights(q, k, scale=scale)
    off = rounding.allowance(linformer.weights, q, k, E, F, scale=scale)
    both = off + rounding.allowance(softmax.weights, q, k, scale=scale)
    size = (np.abs(a) + p + both).sum(axis=1, keepdims=True)
    own = rounding.allowance(linformer.attend, *case, scale=scale)
    top = np.abs(v).max(axis=0)
    return (2 * (both.sum(axis=1, keepdims=True) + gamma(len(k) + 3) * (size + 1)) * top + own + slack(bound, 6)) * (
        rounding.EVALUATION
    )


def judge(tight: Tight, case: Case, scale: float | None) -> float:
    """Judge L3 and L4, whose least is the code's bound, and return how tight L3 was."""
    lifted = tuple(map(Ball.lift, case))
    off = linformer.attend(*lifted, scale=scale) - softmax.attend(*lifted[:3], scale=scale)
    error = np.vectorize(lambda x: number(abs(x)), otypes=[float])(off.cells)
    q, k, v, E, F = case
    sigma, p = q.shape[1] ** -0.5 if scale is None else scale, softmax.weights(q, E @ k, scale=scale)
    trivial = perturbation.trivial(v, linformer.attend(*case, scale=scale))
    third = np.minimum(linformer._by_lift(q, p, k, v, E @ k, F @ v, sigma), trivial)
    fourth = linformer._by_weights(q, p, k, v, F, sigma)
    assert (linformer.bound(*case, scale=scale) == np.minimum(third, fourth)).all()
    tight("L4", error, fourth, weighing(case, fourth, scale))
    return tight("L3", error, third, evaluation(case, third, scale))


@given(case=problems(), scale=st.sampled_from([None, 1.0]))
def test_the_least_of_both_bounds_holds_and_each_does(tight: Tight, case: Case, scale: float | None) -> None:
    target(judge(tight, case, scale))


@given(case=problems())
def test_the_bound_is_never_above_the_largest_distance_of_a_value_to_its_projection(case: Case) -> None:
    """Step 3 of L3, on the lift that the code chose."""
    q, k, v, E, F = case
    if len(E) > len(k):
        return
    kt, vt = E @ k, F @ v
    g = linformer._groups(k, kt)
    counts = np.bincount(g, minlength=len(kt))
    assert counts.min() > 0
    span = np.ptp(q @ (kt[g] - k).T * q.shape[1] ** -0.5 - np.log(counts)[g], axis=1)
    looser = np.abs(vt[g] - v).max(axis=0) + np.tanh(span / 4)[:, None] * np.ptp(v, axis=0)
    bound = linformer.bound(*case)  # the least of L3 and others
    assert (bound <= looser + 2 * evaluation(case, bound, None)).all()


@pytest.mark.parametrize("span", SPANS[1:-1])
def test_projected_keys_that_changed_places_reach_the_first_term(tight: Tight, span: float) -> None:
    """Each key's nearest projection is the other's: no tilt, but the values changed places."""
    k, eye = np.array([[0.0], [span / 2]]), np.eye(2)
    case = Case(np.ones((1, 1)), k, np.array([[1.0], [0.0]]), eye[::-1], eye)
    assert judge(tight, case, 1.0) > SHARP


@pytest.mark.parametrize("span", SPANS[1:-1])
def test_projected_keys_that_moved_along_the_query_reach_the_second_term(tight: Tight, span: float) -> None:
    """A second coordinate, which the query does not see, keeps each key with its own projection."""
    q, k = np.array([[1.0, 0.0]]), np.array([[0.0, -span], [span / 2, span]])
    case = Case(q, k, np.array([[1.0], [0.0]]), np.array([[2.0, 1.0], [-1.0, 0.0]]), np.eye(2))
    assert ((case.E @ k)[:, 0] == k[::-1, 0]).all()
    assert judge(tight, case, 1.0) > SHARP


@pytest.mark.parametrize("count", [4, 16])
def test_averages_that_forget_how_many_they_are_reach_the_logarithm_of_the_counts(tight: Tight, count: int) -> None:
    """All keys of a group are equal, and still TV = (√c − 1)/(√c + 1): a third for groups of 1 and 4."""
    k = np.array([-0.5 * np.log(count)] * count + [0.0])[:, None]
    v = np.array([1.0] * count + [0.0])[:, None]
    averages = np.vstack([v[:, 0] / count, 1 - v[:, 0]])
    case = Case(np.ones((1, 1)), k, v, averages, averages)
    bound = linformer.bound(*case, scale=1.0)
    assert judge(tight, case, 1.0) > SHARP
    assert bound[0, 0] >= (count**0.5 - 1) / (count**0.5 + 1) - evaluation(case, bound, 1.0)[0, 0]


# --- L2: softmax does not commute with a projection -------------------------------------------------------------------


def test_tiny_projected_logits_keep_the_output_is_false() -> None:
    """E = δR, F = e^−δR, δ → 0: p̂ is flat, and õ is the mean row of RV whatever the query.

    The claim is an error of at most ε‖p‖‖V‖ with high probability; for V = 1 the mean error is above half of that.
    """
    rng, rank, depth, tiny = np.random.default_rng(0), 64, 32, 2.0**-20
    means = []
    for n in (256, 1024, 4096):
        parts = []
        for _ in range(64):
            q, k, v = rng.standard_normal((1, depth)), rng.standard_normal((n, depth)), np.ones((n, 1))
            R = rng.standard_normal((rank, n)) / np.sqrt(rank)
            o = linformer.attend(q, k, v, tiny * R, np.exp(-tiny) * R)
            parts.append(abs(o[0, 0] - 1) / (np.linalg.norm(softmax.weights(q, k)) * np.sqrt(n)))
        means.append(np.mean(parts))
    assert min(means) > 0.5


def test_an_untrained_linformer_beats_the_mean_of_the_values_is_false() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 512, 32))
    o = softmax.attend(q, k, v)
    constant = np.abs(v.mean(axis=0) - o).max()
    for rank in (64, 128, 256):
        E, F = linformer.draw(rng, q, k, v, rank=rank, projections="shared")
        assert np.abs(linformer.attend(q, k, v, E, F) - o).max() > constant


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(1, 20))
def test_softmax_of_a_product_is_a_product_of_projections_is_false(seed: int, power: int) -> None:
    """Q(EK)ᵀ(EV) is 0 at Q = 0 and grows with Q, softmax(QKᵀ)V is a mean of V: integers, so all of this is exact."""
    rng = np.random.default_rng(seed)
    q, k, v, E = (rng.integers(-8, 9, shape).astype(float) for shape in ((1, 4), (8, 4), (8, 2), (3, 8)))

    def product(q: Array) -> Array:
        return q @ (E @ k).T @ (E @ v)

    assert (product(0 * q) == 0).all()
    assert (softmax.attend(0 * q, k, v) == v.mean(axis=0)).all()
    t = 2.0**power
    assert (product(t * q) == t * product(q)).all()
    o, error = softmax.attend(t * q, k, v), rounding.allowance(softmax.attend, t * q, k, v)
    assert (v.min(axis=0) - error <= o).all() and (o <= v.max(axis=0) + error).all()


def test_the_product_of_projections_leaves_the_values() -> None:
    q, k, v, E = np.array([[8.0]]), np.array([[1.0], [1.0]]), np.array([[1.0], [1.0]]), np.array([[1.0, 1.0]])
    assert (q @ (E @ k).T @ (E @ v) == 32.0).all() and (softmax.attend(q, k, v) == 1.0).all()


# --- L5 ---------------------------------------------------------------------------------------------------------------


@given(data=st.data(), n=st.integers(2, 6), symmetric=st.booleans())
def test_values_that_a_fixed_projection_cannot_see_are_lost(
    tight: Tight, data: st.DataObject, n: int, symmetric: bool
) -> None:
    rank = data.draw(st.integers(1, n - 1))
    entries = data.draw(st.lists(st.integers(-3, 3), min_size=rank * n, max_size=rank * n))
    F = np.array(entries, float).reshape(rank, n)
    if symmetric:
        F[:, 1] = F[:, 0]
    v = np.array([1.0, -1.0] + [0.0] * (n - 2))[:, None] if symmetric else kernel(F)
    q, k, at = 128 * np.eye(n), np.eye(n), np.abs(v).argmax()
    assert (linformer.attend(q, k, v, F, F, scale=1.0) == 0).all()
    assert (F @ v == 0).all() and v.any()
    o = softmax.attend(Ball.lift(q[at : at + 1]), Ball.lift(k), Ball.lift(v), scale=1.0).cells[0, 0]
    # what the other keys keep at t = 128, times what it moves
    missing = float(((n - 1) * (-arb(128)).exp()).upper()) * np.ptp(v)
    half = np.ptp(v) / 2
    ratio = tight("L5", half, number(abs(o)), missing + slack(half, 1))
    target(ratio)
    assert not symmetric or ratio > SHARP


def kernel(F: Array) -> Array:
    """Return an integer vector that F sends to 0."""
    basis, dimension = flint.fmpz_mat(F.astype(int).tolist()).nullspace()
    assert dimension
    return np.array([[float(int(basis[i, 0]))] for i in range(F.shape[1])])


def judge_trace(tight: Tight, weights: list[list[arb]], rank: int) -> float:
    """Judge the first half of L5(b): 1 − r/n is the bound from below, so the mean TV is in its denominator."""
    n = len(weights)
    one = [[arb(float(i == j)) for j in range(n)] for i in range(n)]
    apart = [
        sum((abs(a - b) for a, b in zip(x, y, strict=True)), arb(0)) / 2 for x, y in zip(weights, one, strict=True)
    ]
    mean = number(sum(apart, arb(0)) / n)
    return tight("L5", 1 - rank / n, mean, slack(1.0, 2))


@given(data=st.data(), n=st.integers(2, 6))
def test_stochastic_factors_of_low_rank_miss_the_identity(tight: Tight, data: st.DataObject, n: int) -> None:
    rank, rng = data.draw(st.integers(1, n - 1)), np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sharpness = data.draw(st.sampled_from([0.0, 1.0, 8.0, 64.0]))
    B = np.array([on_grid(np.exp(s - s.max())) for s in sharpness * rng.standard_normal((rank, n))])
    q, k, E = sharpness * rng.standard_normal((n, n)), rng.standard_normal((n, n)), rng.standard_normal((rank, n))
    P = linformer.weights(*(Ball.lift(x) for x in (q, k, E, B)), scale=1.0)
    target(judge_trace(tight, P.cells.tolist(), rank))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_keys_that_represent_themselves_reach_the_trace(tight: Tight, rank: int) -> None:
    """With t = 64 the other keys keep e^−64 of the weight."""
    eye = np.eye(5)
    P = linformer.weights(*(Ball.lift(x) for x in (64 * eye, eye, eye[:rank], eye[:rank])), scale=1.0)
    assert judge_trace(tight, P.cells.tolist(), rank) > SHARP


@given(data=st.data(), n=st.integers(2, 6))
def test_signed_factors_of_low_rank_miss_the_identity(tight: Tight, data: st.DataObject, n: int) -> None:
    rank, rng = data.draw(st.integers(1, n - 1)), np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    W = rng.standard_normal((n, n))
    A = np.linalg.qr(W)[0][:, :rank]  # the best factor of its span is its transpose
    B = A.T + data.draw(st.sampled_from([0.0, 0.125])) * rng.standard_normal((rank, n))
    P = Ball.lift(A) @ Ball.lift(B)
    missed = [x - arb(float(i == j)) for (i, j), x in np.ndenumerate(P.cells)]
    target(tight("L5", n - rank, number(dot(missed, missed)), slack(float(n), 1)))
