r"""Softmax and attention move with their inputs no faster than `refattn.perturbation` says, and can move as fast.

Notation     As in test_perturbation.py: weights p, tilt δ of span osc δ, logits s_j = σq·k_j, output o, lse.
Hypotheses   Hfin: inputs finite, at least one key.
Uses         P1, P2 (test_perturbation.py).
Loose        nowhere.

P7  Statement    J = diag(p) − ppᵀ has ‖J‖₂ ≤ ½, ‖J‖_{∞→∞} ≤ ½, ‖J‖_{1→∞} ≤ ¼, ‖J‖_{∞→1} ≤ 1; the same constants bound
                 p' − p by δ. ‖∂o/∂q‖₂ ≤ |σ|·diam(K)·diam(V)/4, also with diameters of enclosing balls.
    Derivation   1  Absolute row sums are 2p_j(1−p_j) ≤ ½; J is symmetric, so its spectrum is within them.
                 2  Entries of J are at most p_j(1−p_j) ≤ ¼ in size. ‖Jx‖₁ = Σp_j|x_j − x̄| ≤ ½osc x ≤ max|x|.
                 3  p' − p is the mean of J_τδ over the segment from s to s'.
                 4  ∂o/∂q = σ·Cov_p(v, k): for unit a, b, |Cov(a·v, b·k)| ≤ sd·sd ≤ ½diam(V)·½diam(K) (Popoviciu).
    Equality     p = (½, ½), x = (1, −1), or one key's unit vector for 1→∞; two keys and values.

P8  Statement    q, k, v changed by dq, dk, dv: osc δ ≤ |σ|(‖dq‖diam(K) + ‖q+dq‖diam(dK)),
                 |o'−o| ≤ tanh(osc δ/4)·range(v) + max|dv_j|, and |δ_j| ≤ |σ|Σ_c|q_c||dk_jc| when dq = 0.
    Derivation   δ_j = σ(dq·k_j + (q+dq)·dk_j); differences over j, Cauchy–Schwarz; P1, P2; Σp'_jdv_j.
    Equality     two keys, with the differences along dq and q + dq.

P9  Statement    Softcap: osc δ = g(max s) − g(min s), g(x) = x − c·tanh(x/c). Scale off by 1+η: osc δ = |η|·osc s.
    Derivation   −δ = g(s), and g' = tanh² ≥ 0. The second is linear.
    Equality     always.

Numbers are drawn, judged and charged for rounding as `proofs/exact.py` says.
"""

import math
from fractions import Fraction

import numpy as np
from flint import arb
from hypothesis import given, target
from hypothesis import strategies as st

from proofs.exact import (
    LIBM,
    SHARP,
    Array,
    Tight,
    Tilt,
    dot,
    exact,
    grid,
    highest,
    norm,
    number,
    row,
    slack,
    span_of,
    tilted,
    tilts,
)
from refattn import perturbation as pt

# --- P7 ---------------------------------------------------------------------------------------------------------------

NORMS = {"1": lambda x: sum(map(abs, x), arb(0)), "2": norm, "inf": lambda x: highest([abs(a) for a in x])}


def judge_jacobian(tight: Tight, p: Array, x: Array) -> dict[str, float]:
    """Judge the four norms of J on a direction."""
    mean = dot(exact(p), exact(x))
    image = [a * (b - mean) for a, b in zip(exact(p), exact(x), strict=True)]
    return judge_norms(tight, exact(x), image)


def judge_norms(tight: Tight, x: list[arb], image: list[arb]) -> dict[str, float]:
    """Judge one image of x in each pair of norms."""
    ratios: dict[str, float] = {}
    for name, constant in pt.JACOBIAN.items():
        domain, codomain = name.split("->")
        bound = constant * number(NORMS[domain](x))
        ratios[name] = tight("P7", number(NORMS[codomain](image)), bound, slack(bound, 2))
    return ratios


@given(case=tilts(), x=st.data())
def test_the_jacobian_of_softmax_stretches_no_direction_beyond_its_norms(
    tight: Tight, case: Tilt, x: st.DataObject
) -> None:
    for name, ratio in judge_jacobian(tight, case.p, x.draw(row(len(case.p), -1, 1))).items():
        target(ratio, label=name)


@given(case=tilts())
def test_the_norms_of_the_jacobian_bound_whole_changes_of_the_logits(tight: Tight, case: Tilt) -> None:
    delta = case.delta - case.span / 2
    moved = [b - a for a, b in zip(exact(case.p), tilted(case.p, delta), strict=True)]
    for name, ratio in judge_norms(tight, exact(delta), moved).items():
        target(ratio, label=name)


def test_two_equal_keys_reach_every_norm_of_the_jacobian(tight: Tight) -> None:
    half = np.array([0.5, 0.5])
    apart, alone = (judge_jacobian(tight, half, np.array(x)) for x in ([1.0, -1.0], [1.0, 0.0]))
    assert min(apart["2->2"], apart["inf->inf"], apart["inf->1"], alone["1->inf"]) > SHARP


@given(case=tilts(), arrays=st.data(), scale=grid(-2, 2))
def test_diameters_bound_the_jacobian_in_the_query(
    tight: Tight, case: Tilt, arrays: st.DataObject, scale: float
) -> None:
    n = len(case.p)
    k, v = (arrays.draw(row(2 * n, -3, 3)).reshape(n, 2) for _ in "kv")
    target(judge_query_jacobian(tight, case.p, k, v, scale))


def judge_query_jacobian(tight: Tight, p: Array, k: Array, v: Array, scale: float) -> float:
    """Judge the largest singular value of the two-by-two σ·Cov_p(v, k)."""
    weights_ = exact(p)
    means = [[dot(weights_, exact(a[:, c])) for c in (0, 1)] for a in (v, k)]
    entries = [
        arb(scale) * (dot(weights_, [a * b for a, b in zip(exact(v[:, i]), exact(k[:, j]), strict=True)])
                      - means[0][i] * means[1][j])
        for i in (0, 1) for j in (0, 1)
    ]  # fmt: skip
    size, determinant = dot(entries, entries), entries[0] * entries[3] - entries[1] * entries[2]
    gap = (size * size - 4 * determinant * determinant).nonnegative_part().sqrt()
    bound = pt.query_jacobian(scale, pt.ball_diameter(k), pt.ball_diameter(v))
    return tight("P7", number(((size + gap) / 2).nonnegative_part().sqrt()), bound, slack(bound, 14))


def test_two_equal_keys_reach_the_jacobian_in_the_query(tight: Tight) -> None:
    k, v = np.array([[1.0, 2.0], [4.0, 6.0]]), np.array([[0.0, 0.0], [-1.0, 1.0]])
    assert judge_query_jacobian(tight, np.array([0.5, 0.5]), k, v, -0.5) > SHARP


def test_one_is_the_best_lipschitz_constant_of_softmax_is_false() -> None:
    """‖p' − p‖₂ ≤ ‖δ‖₂ is true and twice too large: exactly, ½ is an eigenvalue of some J, and none is larger.

    ½I − J has the diagonal ½ − p_i(1 − p_i), and the other entries of the row sum to p_i(1 − p_i): Gershgorin.
    """
    for i in range(33):
        for j in range(33 - i):
            for x in (Fraction(n, 32) for n in (i, j, 32 - i - j)):
                assert Fraction(1, 2) - x * (1 - x) >= x * (1 - x)
    half = Fraction(1, 2)
    assert [half * (1 - half) * 1 - half * half * -1, -half * half * 1 + half * (1 - half) * -1] == [half, -half]


def test_self_attention_is_lipschitz_in_its_tokens_is_false() -> None:
    """Tokens (h, t, −t) as queries, keys and values: the first output moves (1 + 2t²)/3 times as fast as h."""
    for t in (10.0, 1e3, 1e5):
        h = arb(2.0**-60)
        tokens = [h, arb(t), arb(-t)]
        w = [(h * a).exp() for a in tokens]
        assert dot(w, tokens) / sum(w, arb(0)) / h > t * t / 2


# --- P8 ---------------------------------------------------------------------------------------------------------------


@given(case=tilts(), arrays=st.data(), scale=grid(-1, 1))
def test_changed_inputs_tilt_by_at_most_the_product_of_norms_and_diameters(
    tight: Tight, case: Tilt, arrays: st.DataObject, scale: float
) -> None:
    n, depth = len(case.p), arrays.draw(st.sampled_from([1, 2, 3]))
    k, dk = (arrays.draw(row(n * depth, -size, size)).reshape(n, depth) for size in (2, 0.125))
    q, dq = arrays.draw(row(depth, -2, 2)), arrays.draw(row(depth, -0.5, 0.5))
    ratios = judge_inputs(tight, scale, q, dq, k, dk, case.v, arrays.draw(row(n, -0.125, 0.125)))
    for name, ratio in ratios.items():
        target(ratio, label=name)


def judge_inputs(
    tight: Tight, scale: float, q: Array, dq: Array, k: Array, dk: Array, v: Array, dv: Array
) -> dict[str, float]:
    """Judge the span, the output and, for changed keys alone, each logit."""
    sigma, ratios = arb(scale), {}
    before = [sigma * dot(exact(q), exact(a)) for a in k]
    after = [sigma * dot(exact(q + dq), exact(a)) for a in k + dk]
    span = pt.input_span(
        scale,
        q_change=np.linalg.norm(dq),
        key_diameter=pt.ball_diameter(k),
        q_norm=np.linalg.norm(q + dq),
        key_change_diameter=pt.ball_diameter(dk),
    )
    charged = slack(span, 2 * len(q) + 9)
    moved = span_of([b - a for a, b in zip(before, after, strict=True)])
    ratios["span"] = tight("P8", number(moved), span, charged)

    p, p2 = ([w / sum(ws, arb(0)) for w in ws] for ws in ([s.exp() for s in before], [s.exp() for s in after]))
    moved = abs(dot(p2, exact(v + dv)) - dot(p, exact(v)))
    bound = pt.tilt_total_variation(span) * np.ptp(v) + np.abs(dv).max()
    ratios["output"] = tight("P8", number(moved), bound, slack(bound, LIBM + 3) + charged / 4 * np.ptp(v))

    alone = [number(abs(sigma * dot(exact(q), exact(a)))) for a in dk]
    bars = pt.logit_error(q[None], np.abs(dk), scale)[0]
    ratios["logits"] = tight("P8", alone, bars, slack(bars, len(q) + 1))
    return ratios


def test_two_keys_along_the_changes_reach_the_bounds_of_changed_inputs(tight: Tight) -> None:
    """k₁ − k₂ = 2dq, dk₁ − dk₂ = (q + dq)/4, then (second) q = 0 and the weights of P1's equality."""
    q, dq = np.array([0.25, 1.5]), np.array([0.75, 1.0])
    k, dk = np.array([2 * dq, 0 * dq]), np.array([(q + dq) / 4, 0 * q])
    ratios = judge_inputs(tight, 0.5, q, dq, k, dk, np.array([1.0, 0.0]), np.zeros(2))
    assert min(ratios["span"], ratios["logits"]) > SHARP
    middle, one = np.array([-0.5]), np.array([1.0])  # logits from (−½, 0) to (½, 0), so the span is 1
    ratios = judge_inputs(
        tight, 1.0, middle, one, np.array([one, 0 * one]), np.zeros((2, 1)), one * [1, 0], one * [2, 2]
    )
    assert ratios["output"] > SHARP


# --- P9 ---------------------------------------------------------------------------------------------------------------


@given(s=st.lists(grid(-60, 60), min_size=1, max_size=8), shrink=st.sampled_from([0, 8, 30]), cap=grid(1 / 16, 64))
def test_a_softcap_tilts_by_exactly_what_it_takes_from_the_extremes(
    tight: Tight, s: list[float], shrink: int, cap: float
) -> None:
    logits = [a * 2.0**-shrink for a in s]
    c = arb(cap)
    taken = [a - c * (a / c).tanh() for a in exact(logits)]
    bound = pt.softcap_span(min(logits), max(logits), cap)
    # x/c counts 3 (the condition of y − tanh y), the fraction 4 and its use 3; beyond |y| = 1 the subtraction
    # magnifies tanh (LIBM + 2) by at most tanh 1/(1 − tanh 1) < 3.2
    roundings = math.ceil(3.2 * (LIBM + 2)) + 1
    ends = number(abs(highest(taken))) + number(abs(highest([-a for a in taken])))
    rounding = slack(ends, roundings) + slack(bound, 1)
    target(tight("P9", number(span_of(taken)), bound, rounding))
    tight("P9", bound, number(span_of(taken)), rounding)


@given(s=st.lists(grid(-60, 60), min_size=1, max_size=8), error=grid(-1, 3))
def test_a_wrong_temperature_tilts_by_its_share_of_the_span(tight: Tight, s: list[float], error: float) -> None:
    bound = pt.temperature_span(np.ptp(s), error)
    target(tight("P9", number(span_of([arb(error) * a for a in exact(s)])), bound, slack(bound, 1)))
