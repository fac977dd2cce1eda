r"""A kernel of a stated arithmetic is as far from the real number as its tolerance says, at most.

Implemented in `refattn.testing` (`tolerance`, `typical`); letters are README.md's. The arithmetic names its formats:
u_s of the scores' accumulator and of the logits' arithmetic, u of the accumulators of P·V and of the row sum
(each doubled where accumulators truncate), u_P and η_P of the cast of P, u_S of stored scores, u_out of the output.

Hypotheses   Hstd: radix 2, round to nearest in every format, underflow gradual or, with float32's exponents, flushed ·
             Hexp: the kernel's exp and log are within exp_ulp units in the last place (κ, as a logarithm), its tanh
             within tanh_ulp; exp(0) = 1 · Hmax: a weight is exp(ẑ_j − m̂), m̂ the largest computed logit so far, or, if
             it is lazy, at most τ below that; what was accumulated is rescaled by exp of the difference of two maxima,
             or of their products with log₂e as the weights use them · Horder: sums in any order, with or without fma,
             any tiles, unless they are named. Hexp and Hlibm of test_rounding.py for the definition.

F1a Output
Statement    |ô−o| ≤ E₀(1+ω) + ω|o| + η, with ω = (1+u)²(1+u_out)−1, G_j = γ_h of u, θ_j = (1+u_P)(1+G_j)−1 and
             E₀ = [Σp_j(e^{e_j}−1)|v_j−o| + Σp_je^{e_j}(θ_j|v_j|+(1+θ_j)dv_j) + |o|ΣG_jp_je^{e_j} + Σζ_j(1+G_j)|v_j|
             + lost(1+max|v|+|o|)] / [Σp_je^{−e_j}(1−G_j) − lost].
             Where the row sum is of the rounded P, u_P is a tilt: e_j ← e_j−ln(1−u_P), θ_j = G_j, ζ_j multiplies
             |v_j−o| + G_j(|v_j|+|o|) and leaves the divisor. ∞ where the divisor is ≤ 0, or by F5.
Derivation   1 operands: a cast to `inputs` moves a number by what it is seen to; to `operands` by u_in|x|+η_in. With
             bounds dq, dk on both, q̂·k̂ is off by (|q|+dq)·(|k|+dk) − |q|·|k|; a q that carries the scale is one cast
             more, of |σ|q. The error of q moves all logits by its product with the mean of the keys, which softmax
             ignores (P8): without softcap and sink, e_j has dq·|k_j−k̄| for dq·|k_j|, and F2a has σ dq·|k̄| more. 2 the
             dot product adds γ_D of that size (F0), then each step one rounding of its result, and a second one where
             it is stored. A softcap does not stretch. The constants (1/√D or a float that is rounded, log₂e, their
             product) move differences of logits by ≤ 4u_s; where a bias or a softcap follows, the scale's 2u_s are
             charged to the logit itself. 3 |m̂−m| ≤ em = max e, so an exponent's argument is at most g_j =
             |z_j−m|+e_j+em+2τ: 3u_sg_j for exp, 5u_sg_j + u_s(max|z|+em) for exp2, whose product m̂·log₂e is rounded
             once for each maximum; then κ. 4 rises: after key j was taken in, the maximum is at least ẑ_j, so each
             later rise is caused by another key of larger ẑ: their number r_j is at most that of the keys with z_l+e_l
             > z_j−e_j, and at most tiles − 1. A rise costs κ in e_j and one rounding of the accumulators; the arguments
             telescope to g_j; a factor exp(0) is exact. Hence e_j, and h = n+r_j in place; tiles summed apart: min(B,
             n) + tiles − 1 + r_j. 5 split keys: lse of a part is a tilt of its keys, its merge too; h grows by their
             number and 4. 6 the cast of P is u_P, and ζ_j = min(η_P/c·e^{em}, w_je^{e_j})/z of underflow (P stored as
             c·P); if P is divided first, min(η_P/c, p_je^{e_j}). 7 with the row sum's factors 1+φ_j, ô−o =
             [Σp_j(e^{η_j}−1)(v_j−o) + Σp_je^{η_j}(θ_jv_j−φ_jo)] / Σp_je^{η_j}(1+φ_j): triangle inequality. 8 the
             formula is evaluated with p̃ and õ of the float64 definition, e^{±2d} and E₆₄ from the real ones (F1 of
             test_rounding.py, d = max e there): each |v_j−o| grows by E₆₄, the quotient by e^{4d} (`wide`). 9 coarse
             weights (some e_j > 0.2): o' = Σp_je^{η_j}v_j/Σp_je^{η_j} is in the exact range of P4, R; the largest
             computed weight is 1, so Σŵ ≥ 1 and the casts lose ≤ nη_P/c of it. Means of values are ≤ max|v|: |ô−o| ≤ R
             + [θ max|v| + (1+θ)max dv + lost(1+2max|v|) + (G+lost)(|o|+R)]/(1−G−lost). The smaller counts.
Equality     nearly: weights at the middle of two numbers of P's format, on the side on which v gains.

F2a Log-sum-exp
Statement    |lsê−lse| ≤ [e_z + u(c(|m|+em)+a) + (κ+u)(|ln z|+e_z) + u|lse|]/(1−2u), where
             e_z = max(ln(Σp_je^{e_j}(1+G_j)+lost), −ln(Σp_je^{−e_j}(1−G_j)−lost)), (c, a) = (4, 0) for exp,
             (8, 8) for exp2; then its cast. ζ_j counts in both sums where the row sum is of the rounded P.
             Twice that where parts are merged.
Derivation   1 lse = m̂+ln Σe^{s_j−m̂} for any m̂; constants that are off move m̂ by c·u, a fast logarithm near 1 is off by
             2⁻²¹ = 8u. 2 F2 of test_rounding.py.
Equality     nearly: a softcap's tanh, or a stored score, off by all that is granted.

F5  Domain
Statement    The tolerance is ∞ where a number may leave its format: an operand, Σ|q||k|, a stored score, c·P, a row sum
             or Σŵ|v|, the output; and finite where none may, unless γ_h is.
Derivation   each is bounded by the sizes above; where one is exceeded nothing follows.
Equality     nearly: stored scores of 60000 are promised something in float16, of 65504 nothing.

F6  Typical errors. A model, not a theorem
Statement    If roundings are independent and of mean zero, with λ = √(2 ln(12N/δ)), none of N numbers exceeds `typical`
             but with probability δ: γ_h → λu√h; errors of weights add in squares over keys.
Derivation   Hoeffding's inequality for each, and a union over numbers and terms; Higham and Mary 2019.
Loose        casts are not independent for weights that are aligned with v (a test exhibits it) or for near-uniform
             rows, whose weights round alike: the cast of P is at least 5/4 of what it does to the exact weights at 32
             scales.

B4a Gradients
Statement    The formulas of B1 in the arithmetic are within `refattn.testing._backward`, whose letters these are.
Derivation   1 p̂_j = p_je^{η_j+λ}: either exp(ẑ−lsê), |λ| ≤ E_L+u|lse|, |η_j| ≤ e_j and the argument's rounding; or the
             forward's P, |λ| ≤ e_z, with its cast. 2 ĝ_j = do·v is off by d_j as a logit is. 3 Δ = do·o is off by
             Σ|do|E + γ_EΣ|do|(|o|+E) if it is of the output, by Σ|p̂_jĝ_j−p_jg_j| + γ_n if it is of the weights: E_D,
             common to the row. 4 dS, dZ, their casts and sums: steps 3–7 of B4 in test_rounding.py with those; a dS
             that is stored is rounded to that, before and after it is scaled. 5 gradients of arguments that several
             problems read are rounded once for each and summed; those that are stored between blocks of terms are
             rounded once a block, which is a tree of that many roundings more (F0).
Equality     nearly, as F1a: dv is P.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, target
from hypothesis import strategies as st

from proofs import emulated
from proofs.test_rounding import Problem, along
from refattn import softmax
from refattn.testing import FORMATS, PRESETS, Arithmetic, Ball, emulate, tolerance, typical

Tight = Any
Array = Any


def answered(run: emulated.Run, seed: int | None) -> tuple[Any, Any, Any]:
    """Return what a kernel answers, the real numbers and what is allowed; a kernel without a seed is plain."""
    rng = None if seed is None else np.random.default_rng(seed)
    got = emulate.attend(run.arithmetic, *run.qkv, **run.named, **run.how, rng=rng)
    lifted = {name: Ball.lift(x) for name, x in run.arrays.items()}
    rest = {name: lifted.pop(name) for name in "qkv"}
    truth = softmax.partial(*rest.values(), **lifted, **run.options)
    return got, truth, tolerance(run.arithmetic, *run.qkv, **run.named)


def judge(tight: Tight, name: str, got: Array, truth: Ball, allowed: Array) -> float:
    """Judge where something is promised."""
    promised = np.isfinite(allowed)
    error = np.where(promised, truth.distance(np.where(promised, got, 0.0)), 0.0)
    return tight(name, error, np.where(promised, allowed, 0.0))


seeds = st.integers(0, 2**32 - 1)
presets = st.sampled_from(sorted(PRESETS))


@settings(max_examples=400)
@given(seed=seeds, preset=presets, change=st.booleans())
def test_outputs_and_lse_of_any_kernel_are_within_tolerance(tight: Tight, seed: int, preset: str, change: bool) -> None:
    run = emulated.draw(np.random.default_rng(seed), preset, most=8, change=change)
    got, truth, allowed = answered(run, seed)
    target(judge(tight, "F1a", got.o, truth.o, allowed.o), label="output")
    target(judge(tight, "F2a", got.lse, truth.lse, allowed.lse), label="lse")


def judge_gradients(tight: Tight, run: emulated.Run, seed: int | None, steps: dict[str, Array]) -> float:
    """Judge the gradients along integer directions."""
    named, how = run.named, run.how | {"rng": None if seed is None else np.random.default_rng(seed)}
    got = emulate.vjp(run.arithmetic, run.do, *run.qkv, dlse=run.dlse, **named, **how)._asdict()
    allowed = tolerance(run.arithmetic, *run.qkv, **named, do=run.do, dlse=run.dlse)._asdict()
    truth = along(Problem(run.arrays, run.options, run.do, run.dlse), steps)
    room = Ball.lift(0.0).cells[()]
    for name, d in steps.items():
        for g, bound, step in zip(*map(np.ravel, (got[name], allowed[name], d)), strict=True):
            if step:
                if not math.isfinite(bound):
                    return 0.0
                truth -= float(g) * Ball.lift(float(step)).cells[()]
                room += float(bound) * Ball.lift(abs(float(step))).cells[()]
    return tight("B4a", float(abs(truth).upper()), float(room))


@settings(max_examples=300)
@given(seed=seeds, preset=presets, change=st.booleans(), single=st.booleans())
def test_gradients_of_any_kernel_are_within_tolerance(
    tight: Tight, seed: int, preset: str, change: bool, single: bool
) -> None:
    rng = np.random.default_rng(seed)
    run = emulated.draw(rng, preset, most=6, change=change)
    steps = {name: np.zeros(np.shape(x)) for name, x in run.arrays.items()}
    if single:
        chosen = rng.choice(sorted(steps))
        steps[chosen].reshape(-1)[rng.integers(steps[chosen].size)] = 1.0
    else:
        steps = {name: rng.integers(-2, 3, x.shape).astype(np.float64) for name, x in steps.items()}
    target(judge_gradients(tight, run, seed, steps))


def aligned(preset: str, copies: int) -> emulated.Run:
    """Return keys of weights beside the middle of two numbers, on the side on which v gains, and one of weight 1."""
    v = np.tile([1.0, -1.0], 2 * copies)
    logits = np.log(0.5 * (1 + PRESETS[preset].formats.weights.u) * (1 + 3e-6 * v))
    arrays = {
        "q": np.zeros((1, 1)),
        "k": np.zeros((len(v) + 1, 1)),
        "v": np.r_[v, 0.0][:, None],
        "bias": np.r_[logits, 0.0][None],
    }
    arithmetic = dataclasses.replace(PRESETS[preset], output="float32", exp_ulp=1.0, tile=2**10)
    return emulated.Run(arithmetic, arrays, {"scale": 1.0}, np.ones((1, 1)), None, {})


@pytest.mark.parametrize("preset", ["fa2-bf16", "fa2-fp16"])
def test_weights_between_two_numbers_reach_the_tolerance(tight: Tight, preset: str) -> None:
    got, truth, allowed = answered(aligned(preset, 1), None)
    assert judge(tight, "F1a", got.o, truth.o, allowed.o) > 0.9


def test_that_casts_are_independent_is_false(tight: Tight) -> None:
    run = aligned("fa2-bf16", 128)
    got, truth, allowed = answered(run, None)
    judge(tight, "F1a", got.o, truth.o, allowed.o)
    p = softmax.weights(*run.qkv[:2], **run.named)
    independent = math.sqrt(2 * math.log(12 * 2 / 1e-6)) * 2.0**-8 * np.linalg.norm(p[0] * run.arrays["v"][:, 0])
    error = np.abs(got.o - truth.o.floats())
    assert (error > 2 * independent).all()
    assert (error <= typical(run.arithmetic, *run.qkv, **run.named).o).all()  # its guard sees these weights


@pytest.mark.parametrize("preset", ["fa2-bf16", "fa2-fp16"])
def test_a_weight_between_two_numbers_reaches_the_tolerance_of_its_value(tight: Tight, preset: str) -> None:
    p = 0.5 * (1 + PRESETS[preset].formats.weights.u) * (1 + 3e-6)
    one = np.ones((1, 1))
    arrays = {"q": 0 * one, "k": one, "v": one, "bias": np.log(p / (1 - p)) * one, "sink": np.array(0.0)}
    arithmetic = dataclasses.replace(PRESETS[preset], output="float32", exp_ulp=1.0, tile=64)
    run = emulated.Run(arithmetic, arrays, {"scale": 1.0}, one, None, {})
    steps = {name: np.full(np.shape(x), float(name == "v")) for name, x in arrays.items()}
    assert judge_gradients(tight, run, None, steps) > 0.9


@pytest.mark.parametrize("preset", ["fa2-bf16", "fa2-fp16"])
def test_a_gradient_of_a_logit_between_two_numbers_reaches_the_tolerance_of_the_query(
    tight: Tight, preset: str
) -> None:
    # two keys of equal weight and opposite values: dS is ±v/2, of which dq has the first
    v = 2 * (1 + PRESETS[preset].formats.weights.u) * (1 + 1e-5)
    arrays = {"q": np.zeros((1, 1)), "k": np.array([[1.0], [0.0]]), "v": np.float32([[v], [-v]]).astype(np.float64)}
    changes: dict[str, Any] = {"inputs": "float32", "output": "float32", "exp_ulp": 1.0, "tile": 64, "delta": "weights"}
    arithmetic = dataclasses.replace(PRESETS[preset], **changes)
    run = emulated.Run(arithmetic, arrays, {"scale": 1.0}, np.ones((1, 1)), None, {})
    steps = {name: np.full(np.shape(x), float(name == "q")) for name, x in arrays.items()}
    assert judge_gradients(tight, run, None, steps) > 0.9


# --- formulas that are false ------------------------------------------------------------------------------------------

FP8 = Arithmetic(
    inputs="float32",
    scores="float32",
    weights="float8_e4m3",
    accumulate="float32",
    output="float32",
    row_sum="rounded weights",
)


def test_a_cast_inside_the_row_sum_as_a_relative_error_alone_is_false() -> None:
    # 600 weights of 2⁻¹¹, which e4m3 loses, beside one of 1
    v = np.zeros((601, 1))
    v[0] = 1.0
    logits = np.full((1, 601), -11 * math.log(2.0))
    logits[0, 0] = 0.0
    arrays, named = [np.zeros((1, 1)), np.zeros((601, 1)), v], {"bias": logits, "scale": 1.0}
    o, lse = emulate.attend(FP8, *arrays, **named)
    truth, truth_lse = softmax.partial(*arrays, **named)
    u, allowed = FORMATS["float8_e4m3"].u, tolerance(FP8, *arrays, **named)
    relative = ((1 + u) / (1 - u) - 1) * softmax.weights(*arrays[:2], **named) @ np.abs(v - truth)
    assert (np.abs(o - truth) > relative / 2).all()
    assert (np.abs(lse - truth_lse) > 2 * math.log1p(u)).all()
    assert (np.abs(o - truth) <= allowed.o).all()
    assert (np.abs(lse - truth_lse) <= allowed.lse).all()


def test_a_rounded_scaled_q_as_a_relative_error_of_the_logit_is_false() -> None:
    # q·k cancels, but the rounding of q does not
    f = FORMATS["bfloat16"]
    scale = 1 / 3
    q, k = np.array([[1.0, 1.0 + 2.0**-7]]), np.array([[1.0 + 2.0**-7, -1.0], [0.0, 0.0]])
    arithmetic = dataclasses.replace(PRESETS["fa2-bf16"], scale="q", output="float32")
    arrays, named = [q * 100, k * 100, np.array([[1.0], [0.0]])], {"scale": scale}
    arrays = [f.round(x) for x in arrays]
    o, lse = emulate.attend(arithmetic, *arrays, **named)
    truth, truth_lse = softmax.partial(*arrays, **named)
    logits = np.abs(scale * arrays[0] @ arrays[1].T).max()
    allowed = tolerance(arithmetic, *arrays, **named)
    assert (np.abs(lse - truth_lse) > 2 * f.u * logits).all()
    assert (np.abs(lse - truth_lse) <= allowed.lse).all()
    assert (np.abs(o - truth) <= allowed.o).all()


def contracted(logits: Array, v: Array, telescopes: bool) -> float:
    """Return attention in float32, a key at a time, with rescaling factors of fused products or of two that differ."""
    round_, c = FORMATS["float32"].round, float(np.float32(math.log2(math.e)))
    top, base, total, acc = logits[0], round_(logits[0] * c), np.array(1.0), v[0]
    for s, x in zip(logits[1:], v[1:], strict=True):
        old, old_base, top = top, base, max(top, s)
        base = round_(top * c)
        factor = round_(np.exp2(round_((old_base if telescopes else old * c) - base)))
        w = round_(np.exp2(round_(s * c - base)))
        total, acc = round_(round_(total * factor) + w), round_(round_(acc * factor) + w * x)
    return float(acc / total)


def test_rescaling_by_a_fused_product_of_the_old_maximum_is_not_covered() -> None:
    # rising maxima, each of whose products with log₂e is rounded up: the factors' errors add instead of cancelling
    f, c = FORMATS["float32"], float(np.float32(math.log2(math.e)))
    rising = f.round(900 + np.arange(4000) * 2.0**-13)
    logits = rising[(f.round(rising * c) - rising * c) > 0.7 * 2.0**-14][:128]
    v, one = f.round(np.linspace(-1, 1, len(logits))), np.zeros((1, 1))
    arrays, named = [one, np.zeros((len(logits), 1)), v[:, None]], {"bias": logits[None], "scale": 1.0}
    truth, allowed = softmax.attend(*arrays, **named), tolerance("fp32", *arrays, **named).o
    assert (np.abs(contracted(logits, v, telescopes=True) - truth) <= allowed).all()
    assert (np.abs(contracted(logits, v, telescopes=False) - truth) > 2 * allowed).all()


def test_the_error_of_delta_grows_with_an_offset_of_the_keys(tight: Tight) -> None:
    # dq does not depend on the offset, but the output's rounding enters it as Σp_jk_j times one number
    rng = np.random.default_rng(0)
    q, k, v, do = (FORMATS["bfloat16"].round(rng.standard_normal((4, 8)) / 4) for _ in range(4))
    bounds, errors = [], []
    for offset in (0.0, 64.0):
        moved = k + offset  # 8 bits hold 64 + x only where x is a multiple of 1/2
        moved = FORMATS["bfloat16"].round(moved)
        got = emulate.vjp("fa2-bf16", do, q, moved, v).q
        truth = softmax.vjp(do, q, moved, v).q
        allowed = tolerance("fa2-bf16", q, moved, v, do=do).q
        tight("B4a", np.abs(got - truth), allowed)
        bounds.append(np.median(allowed))
        errors.append(np.abs(got - truth).max())
    assert bounds[1] > 8 * bounds[0]
    assert errors[1] > 8 * errors[0]


# --- F5 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "promised"), [(65504.0, False), (60000.0, True), (65536.0, False)])
def test_stored_scores_that_may_overflow_are_promised_nothing(size: float, promised: bool) -> None:
    f = FORMATS["float16"]
    q, k = f.round(np.array([[size / 64]])), np.array([[64.0], [0.0]])
    allowed = tolerance("fp16", q, k, np.ones((2, 1)), scale=2.0**-12)
    assert bool(np.isfinite(allowed.o).all()) is promised


def test_values_beyond_the_output_format_are_promised_nothing() -> None:
    one, two = np.zeros((1, 1)), np.zeros((2, 1))
    for format_, largest in (("float16", 65504.0), ("bfloat16", 2.0**127)):
        arithmetic = dataclasses.replace(PRESETS["fp64"], output=format_)
        assert np.isfinite(tolerance(arithmetic, one, two, np.full((2, 1), largest * 0.9)).o).all()
        assert np.isinf(tolerance(arithmetic, one, two, np.full((2, 1), largest * 2)).o).all()


def test_sums_deeper_than_their_format_are_promised_nothing() -> None:
    arithmetic = dataclasses.replace(PRESETS["bf16"], accumulate="bfloat16")
    one, many = np.zeros((1, 1)), np.zeros((300, 1))
    assert np.isinf(tolerance(arithmetic, one, many, many).o).all()
    assert np.isfinite(tolerance(arithmetic, one, many[:20], many[:20]).o).all()


# --- F6 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_typical_errors_are_not_exceeded_by_ordinary_kernels(preset: str) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        kind = ("normal", "small", "uniform", "large", "offset values", "ties")[seed]
        run = emulated.draw(rng, preset, most=120, kind=kind)
        got = emulate.attend(run.arithmetic, *run.qkv, **run.named, **run.how)
        truth, model = softmax.partial(*run.qkv, **run.named), typical(run.arithmetic, *run.qkv, **run.named)
        assert (np.abs(got.o - truth.o) <= model.o).all()
        live = np.isfinite(truth.lse)
        assert (np.abs(got.lse - truth.lse)[live] <= model.lse[live]).all()


def test_typical_errors_are_a_fraction_of_what_is_proved() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 64)).astype(np.float32) for n in (8, 512, 512))
    proved, model = tolerance("fp32", q, k, v), typical("fp32", q, k, v)
    assert np.median(proved.o / model.o) > 3
