r"""Gaussian kernel attention is softmax with a key bias, so no farther from softmax than the keys' lengths differ.

Notation     κ_j = e^{−σ‖q−k_j‖²/2}, p̃ = κ/Σκ, õ = Σp̃_jv_j; s_j = σq·k_j, p = e^s/Σe^s, o = Σp_jv_j, over the keys seen.
Hypotheses   Hfin: finite inputs, at least one key seen · Hpos: σ > 0, for the features only.
Uses         P1, P2 (test_perturbation.py).
Loose        nowhere.

K4  Statement    (a) p̃ = softmax(s − σ‖k‖²/2); it does not change when q and k move together.
                 (b) TV(p, p̃) ≤ tanh(|σ| osc_j‖k_j‖²/8), so |õ − o| ≤ tanh(…)·range(v). No smaller constant serves all
                 numbers of keys.
                 (c) p̃ = p if the keys seen are of one length; and softmax(ln κ + σ‖k‖²/2) = p always.
                 (d) Hpos: φ_f(x) = m^{−1/2}e^{√σ ω_f·x − σ‖x‖²} has φ(q)·φ(k) = κ·(1/m)Σ_f e^{ω_f·z − ‖z‖²/2} with
                 z = √σ(q + k). For ω_f ~ N(0, I) the sum has mean 1: E φ(q)·φ(k) = κ.
    Derivation   1  (a) −σ‖q − k‖²/2 = −σ‖q‖²/2 + σq·k − σ‖k‖²/2, of which softmax ignores the first; and distances do
                    not change when both ends move.
                 2  (b) p̃ is the tilt of p by δ = −σ‖k‖²/2, of span |σ| osc‖k‖²/2: P1, P2. It is K1's ln κ − s too.
                 3  (c) δ is constant; then ln κ + σ‖k‖²/2 is s and a constant.
                 4  (d) √σω·(q + k) − σ‖q‖² − σ‖k‖² = ω·z − ‖z‖²/2 − σ‖q − k‖²/2, as ‖q‖² + ‖k‖² is the mean of
                    ‖q + k‖² and ‖q − k‖². The density of N(0, I) times e^{ω·z − ‖z‖²/2} is that of N(z, I), whose
                    integral is 1.
    Equality     (b) two lengths, q = 0; rationals m₁/m₂ come as near as wanted to P1's two weights.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flint import arb
from hypothesis import given, target
from hypothesis import strategies as st

from proofs.exact import LIBM, SHARP, Array, Tight, distance, number, row, slack
from refattn import masks, rounding, softmax
from refattn.kernel import gaussian, linear_transformer
from refattn.rounding import U, gamma
from refattn.testing import Ball, assert_within
from refattn.testing.strategies import Case, cases


def differences(a: Ball, b: Ball) -> Array:
    """Return |a − b|, elementwise."""
    return np.vectorize(lambda x, y: number(abs(x - y)), otypes=[float])(a.cells, b.cells)


def agree(a: Ball, b: Ball) -> bool:
    """Return whether the balls of a − b contain 0 and are small: that they are one number is then no surprise."""
    return all(x.contains(0) and float(x.rad()) < 2.0**-100 for x in (a - b).cells.flat)


def matrix(rows: int, columns: int, size: float = 2.0) -> st.SearchStrategy[Array]:
    """Draw a matrix of multiples of 2⁻¹⁰."""
    return row(rows * columns, -size, size).map(lambda x: x.reshape(rows, columns))


def lifted(case: Case) -> Case:
    return case.given(**{name: Ball.lift(x) for name, x in case.arrays.items()})


def seen(case: Case) -> Any:
    pairs = masks.bind(case.options["mask"], case.sizes["T"], case.sizes["S"])
    return None if pairs is None else pairs.seen(slice(None), slice(None))


# --- K4(a), (c) -------------------------------------------------------------------------------------------------------


@given(data=st.data(), n=st.integers(1, 5), depth=st.integers(1, 3), scale=st.sampled_from([None, 0.75, -0.5]))
def test_the_weights_of_the_distances_are_softmax_with_a_key_bias(
    data: st.DataObject, n: int, depth: int, scale: float | None
) -> None:
    q, k, v = (Ball.lift(data.draw(matrix(*shape))) for shape in ((2, depth), (n, depth), (n, 1)))
    lengths = (k * k).sum(axis=1, keepdims=True).mT
    sigma = 1.0 / np.sqrt(Ball.lift(float(depth))) if scale is None else Ball.lift(scale)
    weights = gaussian.weights(q, k, scale=scale)
    assert agree(weights, softmax.weights(q, k, bias=lengths * sigma / -2.0, scale=scale))
    assert agree(weights @ v, gaussian.attend(q, k, v, scale=scale))
    restored = weights * np.exp(lengths * sigma / 2.0)
    assert agree(restored / restored.sum(axis=1, keepdims=True), softmax.weights(q, k, scale=scale))


@given(data=st.data(), depth=st.integers(1, 3))
def test_queries_and_keys_may_move_together(data: st.DataObject, depth: int) -> None:
    q, k, shift = (data.draw(matrix(n, depth)) for n in (2, 4, 1))
    assert agree(gaussian.weights(*map(Ball.lift, (q, k))), gaussian.weights(*map(Ball.lift, (q + shift, k + shift))))


@given(data=st.data(), depth=st.integers(1, 3))
def test_keys_of_one_length_make_it_softmax_attention(data: st.DataObject, depth: int) -> None:
    q, key, v = (data.draw(matrix(*shape)) for shape in ((2, depth), (1, depth), (4, 1)))
    k = key * data.draw(
        st.lists(st.sampled_from([-1.0, 1.0]), min_size=4 * depth, max_size=4 * depth).map(
            lambda x: np.reshape(x, (4, depth))
        )
    )
    assert (gaussian.bound(q, k, v) == 0).all()
    assert agree(*(method.weights(Ball.lift(q), Ball.lift(k)) for method in (gaussian, softmax)))


# --- K4(b) ------------------------------------------------------------------------------------------------------------


def judge(tight: Tight, case: Case) -> float:
    """Judge the bound as the code has it, charged for the squares, the tilt, and õ where the values' end is nearer."""
    positional, named = case.arguments()
    k, D = case.arrays["k"], case.sizes["D"]
    scale = case.options.get("scale")
    sigma = 1 / math.sqrt(D) if scale is None else abs(scale)
    off = 2 * gamma(D + 4) * sigma * (k * k).sum(axis=1).max(initial=0.0) / 2
    bound = case.bound()
    room = (off / 4 + LIBM * U) * np.ptp(case.arrays["v"], axis=0) + slack(bound, 6)
    room = room + rounding.allowance(gaussian.attend, *positional, **named) + U * np.abs(case.attend())
    return tight("K4", differences(lifted(case).attend(), lifted(case).exact()), bound, room)


@given(case=cases(gaussian, least=1, most=6))
def test_the_lengths_of_the_keys_bound_the_error(tight: Tight, case: Case) -> None:
    target(judge(tight, case))


@given(case=cases(gaussian, least=1, most=6))
def test_it_is_the_spread_of_the_logarithmic_ratio_to_softmax(case: Case) -> None:
    """ln κ − σq·k itself, by the distances, gives K4's number: reading the queries would not help."""
    q, k, v, scale = (*(case.arrays[s] for s in "qkv"), case.options.get("scale"))
    sigma = 1 / math.sqrt(case.sizes["D"]) if scale is None else scale
    ratio = -sigma / 2 * ((q[:, None] - k) ** 2).sum(axis=2) - sigma * q @ k.T
    off = gamma(case.sizes["D"] + 8) * sigma * 2 * ((np.abs(q)[:, None] + np.abs(k)) ** 2).sum(axis=2).max()
    for i, bound in enumerate(case.bound()):
        look = np.ones(len(k), bool) if seen(case) is None else seen(case)[i]
        if look.any():
            reach = np.tanh(np.ptp(ratio[i, look]) / 4) * np.ptp(v[look], axis=0)
            assert (bound <= reach + (off / 2 + 16 * LIBM * U) * np.ptp(v, axis=0)).all()


@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(1, 8), scale=st.sampled_from([None, 0.3]))
def test_squares_of_lengths_are_as_far_off_as_the_claim_is_charged(seed: int, depth: int, scale: float | None) -> None:
    k = np.random.default_rng(seed).standard_normal((1, depth))
    sigma = 1.0 / np.sqrt(Ball.lift(float(depth))) if scale is None else Ball.lift(scale)
    half = (k * k).sum(axis=1) * (1 / math.sqrt(depth) if scale is None else scale) / 2
    lifted_k = Ball.lift(k)
    assert_within(half, (lifted_k * lifted_k).sum(axis=1) * sigma / 2.0, gaussian.claim_logits([[0.0]], k, scale=scale))


def test_a_key_whose_length_overflows_is_not_a_key_that_nobody_sees() -> None:
    q, k, v = np.zeros((1, 1)), np.array([[0.0], [1e200]]), np.zeros((2, 1))
    with np.errstate(invalid="ignore"):
        assert np.isnan(gaussian.attend(q, k, v)).all() and np.isnan(gaussian.bound(q, k, v)).all()
        assert np.isnan(gaussian.weights(q, k)).all()
    assert gaussian.attend(q, k, v, mask=masks.lengths(1)) == 0


@pytest.mark.parametrize(("length", "scale"), [(0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (3.0, 1.0), (2.0, -1.0)])
def test_keys_of_two_lengths_reach_the_bound(tight: Tight, length: float, scale: float) -> None:
    """The tilt raises key 0 by σ‖k‖²/2 = Δ; P1 wants e^{−Δ/2} of it for each of the others."""
    share = Fraction(math.exp(-scale * length**2 / 4)).limit_denominator(40)
    near, far = share.as_integer_ratio()
    k = np.repeat([[0.0], [length]], [near, far], axis=0)
    v = (k == 0).astype(float)
    sizes = {"T": 1, "S": near + far, "D": 1, "E": 1}
    case = Case(gaussian, sizes, {"q": np.zeros((1, 1)), "k": k, "v": v}, {"scale": scale, "mask": None})
    assert judge(tight, case) > SHARP


def test_gaussian_attention_is_softmax_attention_is_false() -> None:
    """Keys 0 and r before q = 0: softmax weighs them equally, the kernel leaves e^{−r²/2} to the second."""
    found = []
    for r in (1.0, 2.0, 4.0):
        q, k = Ball.lift(np.zeros((1, 1))), Ball.lift([[0.0], [r]])
        found.append(number(distance(gaussian.weights(q, k).cells[0], softmax.weights(q, k).cells[0])))
    assert (np.array(found) > [0.12, 0.38, 0.499]).all()


# --- K4(d) ------------------------------------------------------------------------------------------------------------


@given(data=st.data(), depth=st.integers(1, 3), m=st.integers(1, 3), scale=st.sampled_from([None, 0.75]))
def test_products_of_features_are_the_kernel_times_a_factor_of_mean_one(
    data: st.DataObject, depth: int, m: int, scale: float | None
) -> None:
    q, k, omega = (data.draw(matrix(n, depth)) for n in (1, 1, m))
    phi = gaussian.feature_map(omega, scale=scale).of
    root = np.sqrt(1.0 / np.sqrt(Ball.lift(float(depth))) if scale is None else Ball.lift(scale))
    x, y = Ball.lift(q) * root, Ball.lift(k) * root
    z, apart = x + y, x - y
    factor = np.exp(z @ omega.T - (z * z).sum(axis=1, keepdims=True) / 2.0).sum(axis=1, keepdims=True) / float(m)
    kappa = np.exp((apart * apart).sum(axis=1, keepdims=True) / -2.0)
    assert agree(phi(Ball.lift(q)) @ phi(Ball.lift(k)).mT, kappa * factor)


@pytest.mark.parametrize("z", [0.0, 0.5, 2.0])
def test_the_factor_has_mean_one(z: float) -> None:
    """A sum of width h over all integers is off by 2Σ_n e^{−2π²n²/h²} at most (Poisson); what is left out, by tails."""
    h, reach = 0.25, 15.0
    omega = Ball.lift(np.arange(-reach, reach + h, h))
    density = np.exp((omega * omega) / -2.0) / np.sqrt(Ball(2 * arb.pi()))
    total = (density * np.exp(omega * z - z * z / 2)).sum() * h
    missed = 4 * math.exp(-2 * math.pi**2 / h**2) + 4 * math.exp(-((reach - z) ** 2) / 2)
    assert number(abs(total.cells.item() - 1)) <= missed


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([None, 0.75]))
def test_features_pull_back_as_their_directional_derivative(seed: int, scale: float | None) -> None:
    rng = np.random.default_rng(seed)
    q, k, v, omega = (np.round(16 * rng.standard_normal(s)) / 16 for s in ((2, 2), (3, 2), (3, 1), (3, 2)))
    phi, do = gaussian.feature_map(omega, scale=scale), np.ones((2, 1))
    gradients = linear_transformer.vjp(do, q, k, v, feature_map=phi)
    room = rounding.allowance(linear_transformer.vjp, do, q, k, v, feature_map=phi)
    for name, g, allowed in zip("qkv", gradients, room, strict=True):
        direction = rng.integers(-2, 3, g.shape).astype(float)
        moved = {s: Ball.lift(x) for s, x in zip("qkv", (q, k, v), strict=True)}
        moved[name] = Ball.along({"q": q, "k": k, "v": v}[name], direction)
        truth = linear_transformer.attend(*moved.values(), feature_map=phi).derivative().sum()
        along = (Ball.lift(g) * direction).sum()
        assert_within(0.0, along - truth, (allowed * abs(direction)).sum() * rounding.EVALUATION)


@pytest.mark.parametrize("omega", [np.ones(2), np.ones((0, 2)), [[np.nan]]])
def test_directions_of_another_shape_are_refused(omega: Any) -> None:
    with pytest.raises(ValueError, match="omega"):
        gaussian.feature_map(omega)


def test_features_of_another_scale_or_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        gaussian.feature_map([[1.0]], scale=-1.0)
    with pytest.raises(ValueError, match="omega"):
        linear_transformer.attend(*np.ones((3, 2, 2)), feature_map=gaussian.feature_map([[1.0]]))
