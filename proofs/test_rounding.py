"""Computed sums, outputs, log-sum-exps and gradients are as far from the real ones as these statements say, at most.

Everything is about `refattn.softmax` in float64 with its order of operations, and is implemented in `refattn.rounding`
(`_Rows`: F1, F2; `_backward`: B4). Letters are those of README.md; u = 2⁻⁵³, TINY = 2⁻¹⁰⁷³, four times what gradual
underflow adds to one operation.

Hypotheses   Hstd: radix 2, round to nearest, gradual underflow, no overflow · Hexp, Hlibm: exp and log within 2u, tanh
             within 8u, relatively (measured: test_elementary.py) · Horder: sums in any order, with or without fma (any
             BLAS, any tile).

F0  Sums
Statement    A sum of n products x_iy_i in any order is off by ≤ γ_nΣ|x_iy_i|, as a chain of fma by ≤ n·u·Σ|x_iy_i|; a
             tree in which no term passes more than h roundings is off by ≤ γ_hΣ|t_i|.
Derivation   1 tree: the sum is Σt_i∏(1+δ), at most h factors; |∏(1+δ)−1| ≤ γ_h by induction on h. n products in any
             order are a tree with one rounding for the product and at most n−1 sums. 2 fma: ŝ ← fl(ŝ+t), A the sum of
             the earlier |t_i|, |ŝ−s| ≤ (n−1)uA. If |t| ≤ uA, the float ŝ is a candidate, so the rounding costs ≤ |t| ≤
             uA. Else it costs ≤ u/(1+u)·(|t|+(1+(n−1)u)A) ≤ u(|t|+A) + (n−1)u·uA ≤ u(A+n|t|), as uA < |t|. Both fit
             into nu(A+|t|) − (n−1)uA = u(A+n|t|).
Equality     nearly, one product just above a power of two and half a spacing off: 8/9 in 3 bits, 32/33 in 6.
Loose        nowhere for what it says; a BLAS sums in blocks, far below its γ_n.

F1  Output
Statement    With |η_j| ≤ e_j the logarithmic errors of the weights, G = γ_h for h keys seen (a sink is one, of value 0)
             and lost = h·TINY/z: |ô−o| ≤ E = E₀(1+ω) + ω|o| + TINY, ω = (1+u)²−1, where E₀ is
             [Σp_j(e^{e_j}−1)|v_j−o| + GΣp_je^{e_j}|v_j| + G|o|Σp_je^{e_j} + lost(1+max|v|+|o|)]
             / [(1−G)Σp_je^{−e_j} − lost].
Derivation   1 logits: the dot product costs γ_DΣ|q||k| (F0) and D·TINY, times |σ|; its product with σ costs u|s|, and
             1/√D as a float is off by 2u more (a root, a quotient). A bias is one rounding of the sum. A softcap is
             one rounding of s/c, after which an error of s is no larger in c·tanh(s/c), one tanh and one product.
             2 weights: m̂ is the row's largest computed logit and cancels in Σp_jv_j. s−m̂ is rounded once, u|s−m̂|,
             and exp costs −ln(1−2u) ≤ 2u(1+2u). These add up to e_j. A weight that underflows loses ≤ TINY.
             3 ô−o = [Σp_j(e^{η_j}−1)(v_j−o) + Σp_je^{η_j}(θ_jv_j−φ_jo)] / Σp_je^{η_j}(1+φ_j) with |θ_j|, |φ_j| ≤ G by
             F0 for the two sums: triangle inequality. 4 the quotient is one rounding: ω, TINY.
             5 E is evaluated with the p̂ and ô of one run in place of the real ones, and must hold for other runs. With
             e* = max e_j, p and p̂ differ by factors e^{±2e*}, and |v_j−o| ≤ |v_j−ô|+E: so E₀ ≤ A+BE₀, with
             B = e^{e*}(e^{e*}−1), and e^{4e*}/(1−B) ≤ e^{8e*} for e* ≤ 0.4 (`wide`). Beyond, ô and o are means of the
             values: ≤ 2(1+4G)max|v|.
Equality     nearly, two keys whose logits are large and rounded by half a spacing at each step: .88.
Loose        otherwise, by what rounding errors of the worst size and sign in every step would add.

F2  Log-sum-exp
Statement    |lsê−lse| ≤ [e_z + 2u|ln ẑ| + u|lsê|]/(1−4u),
             e_z = max(ln((1+G)Σp_je^{e_j}+lost), −ln((1−G)Σp_je^{−e_j}−lost)).
Derivation   1 lse = m̂ + ln Σe^{s_j−m̂} for any m̂, so the error of m̂ does not count. 2 ẑ is off by e^{±e_z} (F1, steps 1
             and 2, and F0), its logarithm by 2u, the sum by u. 3 for other runs than the one evaluated, step 5 of F1
             and the quotient by 1−4u; beyond e* = 0.4, |ln Σp_je^{η_j}| ≤ e*.
Equality     nearly, one key seen.
Loose        as F1.

F4  Merging
Statement    Parts (o_i+ε_i, lse_i+d_i) merge into an output off by ≤ tanh(osc d/4)·range(o_i) + Σŵ_i|ε_i|, where
             ŵ ∝ e^{lse_i+d_i}. Computed by `partial.merge` it is off as F1 and F2 say for keys of logits lse_i that
             have no error, and values o_i.
Derivation   1 the error is Σ(ŵ_i−w_i)o_i + Σŵ_iε_i, and ŵ is w tilted by d: P1 and P2. 2 `merge` subtracts the largest
             lse_i, exponentiates, multiplies, sums and divides once: steps 2–4 of F1.
Equality     two parts, w = (expit(−Δ/2), expit(Δ/2)), d = (Δ, 0), ε of the sign of the tilt.

B1  Gradients
Statement    With g_j = do·v_j, Δ = do·o: dS_j = p_j(g_j−Δ+dℓ), db = dS, dβ = p_β(dℓ−Δ), dZ = dS(1−tanh²(s/c)),
             dq = σΣdZ_jk_j, dk_j = σdZ_jq, dv_j = p_jdo; for k, v, β and tables that broadcast, summed over rows.
             Where the bias precedes the softcap, db = dZ.
Derivation   ∂o/∂s_j = p_j(v_j−o) and ∂lse/∂s_j = p_j by the quotient rule, the sink being one more key with v = 0; then
             the chain rule.
Equality     always.

B2  Size
Statement    ‖dS‖₁ = MAD_p(g) ≤ range(g)/2, and ‖dq‖ ≤ |σ|·‖dS‖₁·diam(K)/2 ≤ |σ|·range(g)·diam(K)/4 (dℓ = 0).
Derivation   1 ΣdS = 0, so with A = {g > Δ}, a = p(A): ‖dS‖₁ = 2a(E_A g−Δ) = 2a(1−a)(E_A g−E_Ā g) ≤ range(g)/2. 2 dq/σ
             is ½‖dS‖₁ times the difference of two means of keys, of the positive and of the negative part of dS.
Equality     g two-valued of weights ½; two keys.

B3  Changed weights
Statement    ‖dS′−dS‖₁ ≤ 2·TV(p, p′)·range(g); where p′ is p without keys of mass ρ, ≤ ρ·max(1, 2(1−ρ))·range(g). From
             there to dq as in B2.
Derivation   Let g lie in [0, 1]. 1 along p+t(p′−p), p′−p = τ(μ−ν), the derivative is τ[(μ−ν)∘(g−o_t) − p_t(μ−ν)·g], of
             norm ≤ τ(E_μ|g−o| + E_ν|g−o| + |E_μg−E_νg|). |g−o| is convex: E_μ|g−o| ≤ x(1−o)+(1−x)o, x = E_μg, and the
             same for y = E_νg. On either side of x = y the sum is linear in x and in y; its corners give ≤ 2.
             2 kept: dS′−dS is linear in g, its norm convex, so g = 1_A. Let a = p′(A), b = P(A | dropped), r = 1−ρ and,
             taking the complement if need be, x = a−b ≥ 0. If rx ≤ 1−a the norm is ρ(4a(1−a)−2ρx(1−2a+x)) ≤ ρ. Else it
             is ρf, f = rx+2a(1−a)+(1+ρ)(2a−1)x−2ρx²: over a at most ½(1+rx)² ≤ 2/(1+ρ)² where x ≤ 1/(1+ρ), which is
             ≤ max(1, 2r); otherwise largest at a = 1, 2x−2ρx² ≤ 2r for ρ ≤ ½ and ≤ 1/(2ρ) ≤ 1 for ρ ≥ ½.
Equality     1 a small weight given to an empty key, of two. 2 g = 1 on the kept and 0 on the dropped keys (ρ ≤ ½); g
             halved between 0 and 1 on both (ρ ≥ ½).

B4  Rounding of gradients
Statement    The formulas of B1 as `softmax.vjp` computes them, with p̂ = ŵ/ẑ and Δ̂ = do·ô, are within
             `rounding._backward`, whose letters these are.
Derivation   1 p̂_j = p_je^{η_j+λ}: |λ| ≤ e_z is common to the row (ẑ), |η_j| ≤ e_j+u; 2·TINY of underflow. 2 ĝ_j costs
             d_j = γ_EΣ|do||v_j|; dℓ−Δ̂ costs E_D = Σ|do|E + γ_EΣ|do|(|o|+E) and a rounding, ξ in all, common to the row.
             3 with X_j = g_j−Δ+dℓ, dŜ_j = p̂_jX̂_j of two roundings is dS_j + (e^λ−1)dS_j + e^λp_jξ and what is proper
             to j: I_j = e^{e_z}p_j[(e^{e_j}−1)(|X_j|+d_j+2E_D) + e^{e_j}(d_j+3u(|X_j|+E_D))], one E_D coming from ξ
             and one from evaluating X in one run; and underflow times 1+|X̂_j|. 4 a softcap's slope 4f/(1+f)²,
             f = e^{−2|s/c|}, moves by e^{±2e/c} with its logit, and 8u for its evaluation. 5 dq: the common parts
             multiply Σp_jk_j and ΣdZ_jk_j, in which signs cancel (`blur`: that evaluation, and other runs' p); the rest
             ΣI_j|k_j|; the sum γ_nΣ|dẐ_j||k_j|; u for σ, 3u for 1/√D. 6 dk, dv, db sum over rows, and nothing is common
             to two rows. A term passes its tile's sum, the product with σ and the sum of tiles: at most T+1 roundings.
             7 the sink's weight is an exponential as in F1; p̂_β(dℓ−Δ̂) takes two roundings. 8 other runs: `wide`, as
             step 5 of F1.
Equality     nearly, dv of the key of small weight in the case of F1: .88.
Loose        dq and dk, as F1.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from flint import arb
from hypothesis import given, settings, target
from hypothesis import strategies as st

from proofs.exact import (
    SHARP,
    Array,
    Tight,
    Tilt,
    change,
    distance,
    dot,
    exact,
    grid,
    norm,
    number,
    on_grid,
    row,
    slack,
    tilted,
    tilts,
    two_keys,
    values,
    weights,
)
from refattn import bias, masks, partial, rounding, softmax
from refattn import perturbation as pt
from refattn.rounding import gamma
from refattn.testing import Ball
from refattn.testing.ball import precision

# --- problems ---------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Arguments of `softmax.partial` and cotangents of its answers."""

    arrays: dict[str, Any]
    options: dict[str, Any]
    do: Array
    dlse: Array | None

    def lifted(self, lift: Callable[[str, Any], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments with every array lifted."""
        arrays = {name: lift(name, x) for name, x in self.arrays.items()}
        return [arrays.pop(name) for name in "qkv"], {**arrays, **self.options}


KINDS = ("normal", "ties", "huge", "faint", "peaked", "two")


@st.composite
def problems(draw: st.DrawFn, most: int = 4, kinds: tuple[str, ...] = KINDS) -> Problem:
    """Small problems of the kinds that hurt: logits to ±1e4, subnormal weights, ties, sinks, rows that see nothing."""
    size = st.integers(1, most)
    kind = draw(st.sampled_from(kinds))
    T, S, D, E = (draw(size), draw(size), draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    if kind == "two":
        T, S, D, E = 1, 2, 1, 1
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, k, v, do = (rng.standard_normal(shape) for shape in ((T, D), (S, D), (S, E), (T, E)))
    size = draw(st.sampled_from([1.0, 1.0, 1e-3, 1e3]))
    arrays: dict[str, Any] = {"q": q, "k": k, "v": v * size}
    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.7, 1.0, -0.3]))}
    if kind == "ties":
        arrays = {name: np.round(x) for name, x in arrays.items()}
    elif kind in ("huge", "two"):
        arrays["q"], arrays["k"] = q * 100, k * 100
    elif kind == "peaked":
        arrays["q"] = q * 16
    if kind == "two":
        arrays["k"][1] = arrays["k"][0] * (1 + rng.standard_normal() * 1e-4)
        return Problem(arrays, options, do, rng.standard_normal(T) if draw(st.booleans()) else None)
    tables = [None, None, (T, S), (1, S), (T, 1)]
    shape = (T, S) if kind == "faint" else draw(st.sampled_from(tables))
    if shape:
        arrays["bias"] = rng.standard_normal(shape)
        if kind == "faint":
            arrays["bias"] = np.where(rng.random(shape) < 0.5, rng.uniform(-745, -700, shape), arrays["bias"])
        if draw(st.booleans()):
            arrays["bias"] = np.where(rng.random(shape) < 0.3, -np.inf, arrays["bias"])
    elif draw(st.booleans()):
        options["bias"] = bias.alibi(rng.standard_normal())
    if draw(st.booleans()):
        arrays["sink"] = np.array(rng.standard_normal() * draw(st.sampled_from([1.0, 30.0, 3000.0])))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 2.0, 50.0, 3000.0]))
    options["order"] = draw(st.sampled_from(["softcap, bias", "bias, softcap"]))
    made = [None, masks.causal(), masks.lengths(S - 1), masks.window(1, 0), masks.dense(rng.random((T, S)) < 0.6)]
    options["mask"] = draw(st.sampled_from(made))
    do = do * draw(st.sampled_from([1.0, 1e3]))
    return Problem(arrays, options, do, rng.standard_normal(T) if draw(st.booleans()) else None)


def forward(case: Problem) -> Any:
    """Return computed o and lse, the real ones, and what is allowed."""
    q, named = case.lifted(lambda name, x: x)
    balls, ball_named = case.lifted(lambda name, x: Ball.lift(x))
    return (
        softmax.partial(*q, **named),
        softmax.partial(*balls, **ball_named),
        rounding.allowance(softmax.partial, *q, **named),
    )


def along(case: Problem, directions: dict[str, Array]) -> arb:
    """Return the directional derivative of ⟨do, o⟩ + ⟨dlse, lse⟩."""
    balls, named = case.lifted(lambda name, x: Ball.along(x, directions[name]))
    o, lse = softmax.partial(*balls, **named)
    terms = [d * arb(float(g)) for d, g in zip(o.derivative().cells.ravel(), case.do.ravel(), strict=True)]
    if case.dlse is not None:
        terms += [d * arb(float(g)) for d, g in zip(lse.derivative().cells.ravel(), case.dlse, strict=True)]
    return sum(terms, arb(0))


def backward(case: Problem) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return computed gradients and what is allowed."""
    arrays, named = case.lifted(lambda name, x: x)
    got = softmax.vjp(case.do, *arrays, dlse=case.dlse, **named)._asdict()
    allowed = rounding.allowance(softmax.vjp, case.do, *arrays, dlse=case.dlse, **named)._asdict()
    return {s: got[s] for s in case.arrays}, {s: allowed[s] for s in case.arrays}


def judge_gradients(tight: Tight, case: Problem, directions: dict[str, Array]) -> float:
    """Judge B4 along one direction: the float products and sums of the judge are exact balls."""
    got, allowed = backward(case)
    truth, bound = along(case, directions), arb(0)
    for name, d in directions.items():
        for g, room, step in zip(got[name].ravel(), allowed[name].ravel(), d.ravel(), strict=True):
            truth -= arb(float(g)) * arb(float(step))
            bound += arb(float(room)) * arb(abs(float(step)))
    return tight("B4", float(abs(truth).upper()), float(bound), 0.0)


# --- F0: a toy format in exact rationals ------------------------------------------------------------------------------


def rounded(x: Fraction, bits: int) -> Fraction:
    """Round to so many significant bits, ties to even; exponents are unlimited."""
    if not x:
        return x
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    spacing = Fraction(2) ** (exponent - bits + 1)
    return round(x / spacing) * spacing


def judge_sum(tight: Tight, computed: Fraction, terms: list[Fraction], factor: Fraction) -> float:
    """Judge a computed sum against factor·Σ|t|, each converted to a float with one rounding."""
    error, bound = abs(computed - sum(terms)), factor * sum(map(abs, terms), Fraction(0))
    assert error <= bound
    return tight("F0", float(error), float(bound), gamma(2) * float(bound))


@st.composite
def toys(draw: st.DrawFn) -> tuple[int, list[Fraction], list[Fraction]]:
    """Vectors in a format of 3 to 6 bits."""
    bits, n = draw(st.integers(3, 6)), draw(st.integers(1, 8))
    significand, exponent = st.integers(2 ** (bits - 1), 2**bits - 1), st.integers(-4, 2)
    numbers = st.builds(lambda m, e, s: s * m * Fraction(2) ** e, significand, exponent, st.sampled_from([1, -1]))
    vectors = st.lists(numbers, min_size=n, max_size=n)
    return bits, draw(vectors), draw(vectors)


def chained(x: list[Fraction], y: list[Fraction], bits: int) -> Fraction:
    """Accumulate by fma."""
    total = Fraction(0)
    for a, b in zip(x, y, strict=True):
        total = rounded(total + a * b, bits)
    return total


def summed(terms: list[Fraction], bits: int, cut: Callable[[int], int]) -> tuple[Fraction, int]:
    """Sum along a tree: cut(n) terms, the rest, and one rounding. Return the height too."""
    if len(terms) == 1:
        return terms[0], 0
    at = cut(len(terms))
    (left, one), (right, other) = summed(terms[:at], bits, cut), summed(terms[at:], bits, cut)
    return rounded(left + right, bits), 1 + max(one, other)


def gamma_of(h: int, bits: int) -> Fraction:
    u = Fraction(1, 2**bits)
    return h * u / (1 - h * u)


@settings(max_examples=300)
@given(case=toys())
def test_a_chain_of_fma_costs_one_unit_roundoff_for_each_term(
    tight: Tight, case: tuple[int, list[Fraction], list[Fraction]]
) -> None:
    bits, x, y = case
    terms = [a * b for a, b in zip(x, y, strict=True)]
    target(judge_sum(tight, chained(x, y, bits), terms, Fraction(len(x), 2**bits)))


@given(case=toys(), order=st.data())
def test_a_product_sum_in_any_order_costs_its_depth(
    tight: Tight, case: tuple[int, list[Fraction], list[Fraction]], order: st.DataObject
) -> None:
    bits, x, y = case
    exactly = order.draw(st.permutations([a * b for a, b in zip(x, y, strict=True)]))
    products = [rounded(t, bits) for t in exactly]
    total, height = summed(products, bits, lambda n: order.draw(st.integers(1, n - 1)))
    if len(x) < 2**bits:
        judge_sum(tight, total, exactly, gamma_of(len(x), bits))
        judge_sum(tight, total, products, gamma_of(height, bits) if height else Fraction(0))
        judge_sum(tight, total, exactly, gamma_of(height + 1, bits))


def test_one_product_next_to_one_reaches_eight_ninths_of_the_chain(tight: Tight) -> None:
    x, y = [Fraction(3, 2)], [Fraction(3, 4)]
    assert judge_sum(tight, chained(x, y, 3), [Fraction(9, 8)], Fraction(1, 8)) > 0.88


# --- F1, F2: the main evidence ----------------------------------------------------------------------------------------


@settings(max_examples=800)
@given(case=problems())
def test_output_and_log_sum_exp_are_within_rounding_of_200_bits(tight: Tight, case: Problem) -> None:
    with precision():
        got, truth, allowed = forward(case)
        target(tight("F1", truth.o.distance(got.o), allowed.o), label="output")
        target(tight("F2", truth.lse.distance(got.lse), allowed.lse), label="lse")


@settings(max_examples=200)
@given(case=problems())
def test_weights_are_within_rounding_of_200_bits(tight: Tight, case: Problem) -> None:
    (q, k, _), named = case.lifted(lambda name, x: x)
    (q_ball, k_ball, _), balls = case.lifted(lambda name, x: Ball.lift(x))
    with precision():
        truth = softmax.weights(q_ball, k_ball, **balls)
        error = truth.distance(softmax.weights(q, k, **named))
    target(tight("F1", error, rounding.allowance(softmax.weights, q, k, **named)))


# Two keys of logits near 4200 whose products and scalings all round by nearly half a spacing, found by search.
NEAR_TIES = [
    ("0x1.0002b22979524p+0", "0x1.014c5d4d4e810p+6", "0x1.05c2fe649c4edp+6", "0x1.064094b64fcc8p+6"),
    ("0x1.004c935235b0cp+0", "0x1.051ebddb088d9p+6", "0x1.005f4ccca8b7bp+6", "0x1.0074bc9e3d7d1p+6"),
]


@pytest.mark.parametrize("digits", NEAR_TIES)
def test_large_logits_of_two_keys_reach_most_of_what_is_allowed(tight: Tight, digits: tuple[str, ...]) -> None:
    scale, q, *k = map(float.fromhex, digits)
    keys, v = np.array(k)[:, None], np.array([[1.0], [0.0]])
    case = Problem({"q": np.array([[q]]), "k": keys, "v": v}, {"scale": scale}, np.ones((1, 1)), None)
    only = {name: np.zeros(np.shape(x)) for name, x in case.arrays.items()}
    only["v"][0] = 1.0
    with precision():
        got, truth, allowed = forward(case)
        assert tight("F1", truth.o.distance(got.o), allowed.o) > 0.6
        assert judge_gradients(tight, case, only) > 0.6


@pytest.mark.parametrize("gap", [700.0, 740.0, 745.0])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e300])
def test_weights_that_underflow_are_charged_for_it(tight: Tight, gap: float, size: float) -> None:
    arrays = {"q": np.ones((1, 1)), "k": np.array([[0.0], [-gap]]), "v": np.array([[0.0], [size]])}
    case = Problem(arrays, {"scale": 1.0}, np.array([[1e3]]), None)
    with precision():
        got, truth, allowed = forward(case)
        assert (truth.o.floats() > 0).all()
        tight("F1", truth.o.distance(got.o), allowed.o)
        if size < 1e300:
            every_coordinate(tight, case)


# --- B1, B4 -----------------------------------------------------------------------------------------------------------


def directions(case: Problem, rng: np.random.Generator) -> dict[str, Array]:
    """Return one integer direction over all arguments jointly."""
    return {name: rng.integers(-2, 3, np.shape(x)).astype(np.float64) for name, x in case.arrays.items()}


def every_coordinate(tight: Tight, case: Problem) -> float:
    """Judge every gradient by itself."""
    worst = 0.0
    for name, x in case.arrays.items():
        for i in range(np.size(x)):
            only = {other: np.zeros(np.shape(y)) for other, y in case.arrays.items()}
            only[name].reshape(-1)[i] = 1.0
            worst = max(worst, judge_gradients(tight, case, only))
    return worst


@settings(max_examples=400)
@given(case=problems(), seed=st.integers(0, 2**32 - 1))
def test_gradients_are_within_rounding_of_derivatives_in_200_bits(tight: Tight, case: Problem, seed: int) -> None:
    with precision():
        target(judge_gradients(tight, case, directions(case, np.random.default_rng(seed))))


@settings(max_examples=100)
@given(case=problems(most=2))
def test_each_gradient_is_within_rounding_of_its_own_derivative(tight: Tight, case: Problem) -> None:
    with precision():
        target(every_coordinate(tight, case))


def formulas(case: Problem) -> dict[str, Array]:
    """Evaluate B1 in balls, pair by pair."""
    balls = {name: Ball.lift(x).cells for name, x in case.arrays.items()}
    out = {name: np.full(np.shape(x), arb(0), object) for name, x in case.arrays.items()}
    (q, k, v), given = (balls[name] for name in "qkv"), case.options
    (T, D), S = q.shape, len(k)
    sigma = arb(D).rsqrt() if given["scale"] is None else arb(given["scale"])
    pairs = masks.bind(given.get("mask"), T, S)
    seen = np.ones((T, S), bool) if pairs is None else pairs.seen(np.arange(T), np.arange(S))
    cap, first = given.get("softcap"), given.get("order") == "bias, softcap"
    table = np.full((T, S), arb(0), object)
    if "bias" in balls:
        table = np.broadcast_to(balls["bias"], (T, S))
        seen = seen & ~np.isneginf(np.broadcast_to(case.arrays["bias"], (T, S)))
    elif "bias" in given:
        slope = arb(given["bias"].slopes.item())
        table = np.array([[slope * (j - i - S + T) for j in range(S)] for i in range(T)], object).reshape(T, S)
    for i in range(T):
        g = exact(case.do[i])
        dl = arb(0 if case.dlse is None else float(case.dlse[i]))
        weight, slope = {}, {}
        for j in np.flatnonzero(seen[i]):
            s, slope[j] = sigma * dot(q[i], k[j]) + (table[i, j] if first else arb(0)), arb(1)
            if cap is not None:
                y = s / arb(cap)
                s, slope[j] = y.tanh() * cap, 1 / y.cosh() ** 2
            weight[j] = (s if first else s + table[i, j]).exp()
        rest = balls["sink"].item().exp() if "sink" in balls else arb(0)
        z = sum(weight.values(), rest)
        if not (weight or "sink" in balls):
            continue
        o = [sum((w * v[j, c] for j, w in weight.items()), arb(0)) / z for c in range(v.shape[1])]
        own = dl - dot(g, o)
        if "sink" in balls:
            out["sink"][()] += rest / z * own
        for j, w in weight.items():
            ds = w / z * (dot(g, v[j]) + own)
            dz = ds * slope[j]
            out["q"][i] += sigma * dz * k[j]
            out["k"][j] += sigma * dz * q[i]
            out["v"][j] += w / z * np.array(g, object)
            if "bias" in balls:
                shape = out["bias"].shape
                out["bias"][min(i, shape[0] - 1), min(j, shape[1] - 1)] += dz if first else ds
    return out


@settings(max_examples=200)
@given(case=problems(), seed=st.integers(0, 2**32 - 1))
def test_the_formulas_are_the_derivatives(tight: Tight, case: Problem, seed: int) -> None:
    with precision():
        steps = directions(case, np.random.default_rng(seed))
        apart = -along(case, steps)
        for name, g in formulas(case).items():
            apart += dot(g.ravel(), exact(steps[name].ravel()))
        tight("B1", number(apart), 0.0)
        assert apart.rad() < rounding.U


# --- B2, B3 -----------------------------------------------------------------------------------------------------------


def gradient(p: list[arb], g: list[arb]) -> list[arb]:
    mean = dot(p, g)
    return [a * (x - mean) for a, x in zip(p, g, strict=True)]


def total(x: list[arb]) -> arb:
    return sum(map(abs, x), arb(0))


def diameter(keys: Array) -> float:
    return max(float(np.linalg.norm(a - b)) for a in keys for b in keys)


def moved_query(scale: float, ds: list[arb], keys: Array) -> float:
    """Return ‖σΣdS_jk_j‖."""
    return number(abs(arb(scale)) * norm([dot(ds, exact(column)) for column in keys.T]))


def judge_queries(tight: Tight, name: str, ds: list[arb], bound: float, keys: Array, scale: float) -> None:
    """Judge the query's gradient, or its change, behind a bound on ‖dS‖₁."""
    limit = pt.query_gradient(scale, bound, diameter(keys))
    tight(name, moved_query(scale, ds, keys), limit, slack(limit, keys.shape[1] + 8))


@given(case=tilts(), scale=grid(-2, 2), more=st.data())
def test_gradients_of_logits_and_query_are_bounded_by_the_spread(
    tight: Tight, case: Tilt, scale: float, more: st.DataObject
) -> None:
    keys = np.stack([more.draw(row(len(case.p), -2, 2)) for _ in range(2)], axis=1)
    ds, bound = gradient(exact(case.p), exact(case.v)), float(pt.logit_gradient(np.ptp(case.v)))
    target(tight("B2", number(total(ds)), bound, slack(bound, 2)))
    judge_queries(tight, "B2", ds, bound, keys, scale)


def test_halves_reach_the_size_of_gradients(tight: Tight) -> None:
    keys = np.array([[1.0, 2.0], [4.0, 6.0]])
    ds = gradient(exact([0.5, 0.5]), exact([0.0, 1.0]))
    assert tight("B2", number(total(ds)), pt.logit_gradient(1.0)) > SHARP
    assert moved_query(0.5, ds, keys) > SHARP * pt.query_gradient(0.5, pt.logit_gradient(1.0), diameter(keys))


@given(case=tilts(), other=st.data())
def test_changed_weights_change_gradients_by_twice_their_distance(
    tight: Tight, case: Tilt, other: st.DataObject
) -> None:
    n = len(case.p)
    moved = exact(other.draw(weights(n))) if other.draw(st.booleans()) else tilted(case.p, case.delta)
    g, keys = exact(case.v), np.stack([other.draw(row(n, -2, 2)) for _ in range(2)], axis=1)
    apart = [b - a for a, b in zip(gradient(exact(case.p), g), gradient(moved, g), strict=True)]
    bound = pt.gradient_change(number(distance(exact(case.p), moved)), np.ptp(case.v))
    target(tight("B3", number(total(apart)), bound, slack(bound, 4)))
    judge_queries(tight, "B3", apart, float(bound), keys, 0.5)


@pytest.mark.parametrize("mass", [2.0**-40, 2.0**-10])
def test_a_small_weight_given_to_an_empty_key_reaches_it(tight: Tight, mass: float) -> None:
    g, bound = exact([0.0, 1.0]), pt.gradient_change(mass, 1.0)
    moved = gradient(exact([1 - mass, mass]), g)  # a key of weight 1 has no gradient
    assert tight("B3", number(total(moved)), bound, slack(bound, 2)) > SHARP


@given(case=tilts(), kept=st.integers(1, 12))
def test_dropped_keys_change_gradients_by_their_mass(tight: Tight, case: Tilt, kept: int) -> None:
    target(judge_kept(tight, case.p, case.v, min(kept, len(case.p))))


def judge_kept(tight: Tight, p: Array, g: Array, kept: int) -> float:
    """Judge B3 where the first keys are kept; p is on a grid, so that the dropped mass is exact."""
    dropped, y = float(p[kept:].sum()), exact(g)
    rest = [a / arb(1 - dropped) for a in exact(p[:kept])] + [arb(0)] * (len(p) - kept)
    apart = [b - a for a, b in zip(gradient(exact(p), y), gradient(rest, y), strict=True)]
    bound = pt.gradient_of_kept(dropped, np.ptp(g))
    return tight("B3", number(total(apart)), bound, slack(bound, 4))


@pytest.mark.parametrize("dropped", [0.01, 0.1, 0.3, 0.5, 0.8])
def test_two_levels_reach_the_gradients_of_kept_keys(tight: Tight, dropped: float) -> None:
    if dropped <= 0.5:
        p, g, kept = on_grid(np.array([1 - dropped, dropped])), np.array([1.0, 0.0]), 1
    else:
        p = np.array([1.0, 1.0, 4.0, 4.0]) / 10
        p, g, kept = on_grid(p), np.array([1.0, 0.0, 1.0, 0.0]), 2
    assert judge_kept(tight, p, g, kept) > SHARP


# --- F4 ---------------------------------------------------------------------------------------------------------------


@given(case=tilts(), more=st.data())
def test_errors_of_parts_pass_through_a_merge(tight: Tight, case: Tilt, more: st.DataObject) -> None:
    errors = more.draw(row(len(case.p), -1, 1)) * more.draw(st.sampled_from([0.0, 2.0**-10, 1.0]))
    target(judge_merge(tight, case, errors))


def judge_merge(tight: Tight, case: Tilt, errors: Array) -> float:
    """Judge F4: parts of weights p and outputs v, whose lse are off by δ and whose outputs by `errors`."""
    shared = tilted(case.p, case.delta)
    apart = change(case) + dot(shared, exact(errors))
    carried = dot(shared, [abs(x) for x in exact(errors)])
    bound = pt.tilt_total_variation(case.span) * np.ptp(case.v) + number(carried)
    return tight("F4", number(abs(apart)), bound, slack(bound, 8 + 5))


@pytest.mark.parametrize("span", [2.0**-20, 1.0, 8.0])
def test_two_parts_reach_the_error_of_a_merge(tight: Tight, span: float) -> None:
    case = two_keys(1 / (1 + math.exp(span / 2)), span)
    assert judge_merge(tight, case, np.array([0.125, 0.125])) > SHARP


@settings(max_examples=200)
@given(data=st.data(), n=st.integers(1, 6), big=st.sampled_from([1.0, 50.0, 1e4]))
def test_a_computed_merge_is_softmax_over_the_parts(tight: Tight, data: st.DataObject, n: int, big: float) -> None:
    lse, o = data.draw(row(n, -2, 2)) * big, data.draw(values(n)) / 3
    unseen = data.draw(st.integers(0, n))
    parts = [partial.Partial(np.array([[x]]), np.array([s])) for x, s in zip(o, lse, strict=True)]
    parts += [partial.Partial(np.zeros((1, 1)), np.array([-np.inf]))] * unseen
    one, keys, outputs = np.ones((1, 1)), lse[:, None], o[:, None]
    allowed = rounding.allowance(softmax.partial, one, keys, outputs, scale=1.0)
    with precision():
        truth = softmax.partial(*map(Ball.lift, (one, keys, outputs)), scale=1.0)
        got = partial.merge(*data.draw(st.permutations(parts)))
        tight("F1", truth.o.distance(got.o), allowed.o)
        tight("F2", truth.lse.distance(got.lse), allowed.lse)
