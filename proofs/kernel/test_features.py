r"""Random features have the mean that they are for, the gradients of what they are, and are drawn as stated.

Notation     φ: features of m rows ω; κ(x, y) = φ(x)·φ(y); z = x + y, for trigonometric features x − y.
Hypotheses   Hqr: LAPACK's Householder QR leaves ‖Q − Q′‖ ≤ γ_{16D²}√D for an orthogonal Q′ (Higham 2002, §19.3, whose
             constant is not stated). NumPy's normal generator is taken at its word.
Uses         F0 (rounding); the inequality of Dvoretzky, Kiefer and Wolfowitz with Massart's constant.
Loose        nowhere.

Mean   Statement    E κ = e^{x·y} for positive, hyperbolic and trigonometric features, ω ~ N(0, I).
       Derivation   1  One row's κ is e^{ω·z}, cosh ω·z or cos ω·z, times e^{∓(‖x‖² + ‖y‖²)/2}: E e^{ω·z} = e^{‖z‖²/2}.
                    2  N nodes of Gauss–Hermite integrate ω^{2n} exactly for n < N; for n ≥ N they give between 0 and
                       E ω^{2n}, for the remainder has the sign of the (2N)th derivative. So they integrate e^{ωz} and
                       e^{iωz} within Σ_{n≥N}(z²/2)ⁿ/n!. In the plane nodes are pairs and exponentials are products.

Draws  Statement    A coordinate of a uniform direction in R³ is uniform on [−1, 1]; N(0, I₂) has a norm below r with
                    probability 1 − e^{−r²/2}; an entry of a uniform rotation is positive with probability ½.
       Derivation   Archimedes; polar coordinates; −Q is as uniform as Q. The empirical distribution of N draws strays
                    by ε somewhere with probability at most 2e^{−2Nε²}.

ReLU   Statement    max(ω·x, 0) approximates nothing: for t > 0, q and tq have the same weights, for every ω and m.
       Derivation   The features of tx are t times those of x, and t cancels. Softmax's weights differ, so those of q or
                    of tq are wrong by at least half of that difference.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flint import arb, fmpz_poly
from hypothesis import assume, given
from hypothesis import strategies as st

from proofs.chance import ALARM, draws_needed, judge_count
from proofs.exact import Array, distance, dot, row
from refattn import rounding, softmax
from refattn.kernel import features, linear_transformer, performer
from refattn.kernel.features import DIRECTIONS, EXPONENTIAL, KINDS, Directions, Kind
from refattn.rounding import gamma
from refattn.testing import Ball, assert_within

UNBIASED = KINDS[:3]
NODES = 20
TINY = arb(2) ** -150  # above the radius of 200-bit balls of the sizes here


def matrix(rows: int, columns: int, size: float = 1.0) -> st.SearchStrategy[Array]:
    """Draw a matrix of multiples of 2⁻¹⁰."""
    return row(rows * columns, -size, size).map(lambda x: x.reshape(rows, columns))


# --- the mean ---------------------------------------------------------------------------------------------------------


@functools.cache
def quadrature() -> list[tuple[arb, arb]]:
    """Return the nodes and weights of Gauss–Hermite for N(0, 1)."""
    below, whole, x = fmpz_poly([1]), fmpz_poly([0, 2]), fmpz_poly([0, 1])
    for n in range(1, NODES):
        below, whole = whole, 2 * x * whole - 2 * n * below
    roots = [root.real for root, _ in whole.complex_roots()]
    scale = arb(2) ** (NODES - 1) * arb.fac_ui(NODES) / NODES**2
    return [(arb(2).sqrt() * at, scale / _at(below, at) ** 2) for at in roots]


def _at(polynomial: Any, x: arb) -> arb:
    total = arb(0)
    for c in reversed(list(polynomial)):
        total = total * x + arb(c)
    return total


def rest(half: arb) -> arb:
    """Return Σ_{n≥N} hⁿ/n! at most: a geometric series from the first term on."""
    return half**NODES / arb.fac_ui(NODES) / (1 - half / (NODES + 1))


@given(data=st.data(), D=st.sampled_from([1, 2]), kind=st.sampled_from(UNBIASED))
def test_the_mean_of_the_kernel_is_the_exponential_of_the_logit(data: st.DataObject, D: int, kind: Kind) -> None:
    x, y = (Ball.lift(data.draw(matrix(1, D))) for _ in range(2))
    nodes = list(itertools.product(quadrature(), repeat=D))
    omega = Ball(np.array([[node for node, _ in at] for at in nodes], object))
    shares = [math.prod((share for _, share in at), start=arb(1)) for at in nodes]
    each = (features.of(x, omega, kind=kind) * features.of(y, omega, kind=kind)).cells[0] * len(nodes)
    mean = dot(list(each), shares * (len(each) // len(nodes)))
    z = (x - y if kind == "trigonometric" else x + y).cells[0]
    exact, most = arb(1), arb(1)
    for c in z:
        exact, most = exact * (c * c / 2).exp(), most * ((c * c / 2).exp() + rest(c * c / 2))
    tall = dot(list(x.cells[0]), list(x.cells[0])) + dot(list(y.cells[0]), list(y.cells[0]))
    outer = (tall / 2 if kind == "trigonometric" else -tall / 2).exp()
    assert abs(mean - dot(list(x.cells[0]), list(y.cells[0])).exp()) <= outer * (most - exact) + TINY


def test_relu_features_have_another_mean() -> None:
    """E max(ω, 0)² = ½ at x = y = 1 in one dimension, where softmax has e."""
    one = Ball.lift([[1.0]])
    nodes = quadrature()
    omega = Ball(np.array([[node] for node, _ in nodes], object))
    each = features.of(one, omega, kind="relu").cells[0]
    assert abs(dot([c * c for c in each], [w * len(nodes) for _, w in nodes]) - arb(0.5)) <= TINY  # ω² is even


@pytest.mark.parametrize("m", [1, 7, 64])
def test_relu_approximates_softmax_with_enough_features_is_false(m: int) -> None:
    rng = np.random.default_rng(m)
    omega = Ball.lift(np.abs(features.draw(rng, m, 1)))  # positive, that no κ vanishes
    q, k = [[0.5], [8.0]], [[0.5], [1.0]]
    p = performer.weights(*map(Ball.lift, (q, k)), omega, Ball.lift([0.0]), kind="relu").cells
    truth = softmax.weights(*map(Ball.lift, (q, k))).cells
    same, apart = distance(p[0], p[1]), distance(truth[0], truth[1])
    assert same <= TINY
    wrong = max(float(distance(a, b).lower()) for a, b in zip(p, truth, strict=True))
    assert wrong >= float(apart.lower()) / 2 - float(same.upper()) > 0.2


# --- values and gradients ---------------------------------------------------------------------------------------------


@given(data=st.data(), n=st.integers(1, 3), m=st.integers(1, 3), D=st.integers(1, 3), kind=st.sampled_from(KINDS))
def test_features_are_within_rounding_of_ball_arithmetic(
    data: st.DataObject, n: int, m: int, D: int, kind: Kind
) -> None:
    x, omega = data.draw(matrix(n, D, 2)), data.draw(matrix(m, D, 2))
    bound = rounding.allowance(features.of, x, omega, kind=kind)
    assert_within(features.of(x, omega, kind=kind), features.of(Ball.lift(x), Ball.lift(omega), kind=kind), bound)


@given(
    data=st.data(), m=st.integers(1, 3), D=st.integers(1, 3), kind=st.sampled_from(KINDS), name=st.sampled_from("xo")
)
def test_the_pull_back_is_the_directional_derivative(
    data: st.DataObject, m: int, D: int, kind: Kind, name: str
) -> None:
    x, omega = data.draw(matrix(2, D, 2)), data.draw(matrix(m, D, 2))
    assume(kind != "relu" or (x @ omega.T != 0).all())
    r = features.columns(kind, m)
    dphi = data.draw(matrix(2, r))
    g = dict(zip("xo", features.vjp(dphi, x, omega, kind=kind), strict=True))[name]
    room = dict(zip("xo", rounding.allowance(features.vjp, dphi, x, omega, kind=kind), strict=True))[name]
    direction = data.draw(matrix(*g.shape))
    lifted = {"x": Ball.lift(x), "o": Ball.lift(omega), name: Ball.along({"x": x, "o": omega}[name], direction)}
    truth = (features.of(lifted["x"], lifted["o"], kind=kind).derivative() * dphi).sum()
    along = (Ball.lift(g) * direction).sum()
    assert_within(0.0, along - truth, (room * abs(direction)).sum() * rounding.EVALUATION)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_the_shapes_of_their_arguments(kind: Kind) -> None:
    """One ω for two heads gets what reaches it from both."""
    rng = np.random.default_rng(0)
    x, omega, dphi = (
        rng.integers(-8, 9, shape) / 8 for shape in ((2, 3, 2), (4, 2), (2, 3, features.columns(kind, 4)))
    )
    dx, domega = features.vjp(dphi, x, omega, kind=kind)
    alone, room = (
        [f(*one, omega, kind=kind) for one in zip(dphi, x, strict=True)]
        for f in (features.vjp, functools.partial(rounding.allowance, features.vjp))
    )
    assert_within(dx, np.stack([g[0] for g in alone]), 2 * np.stack([g[0] for g in room]))
    total = sum(g[1] for g in alone)
    own = sum(g[1] + gamma(2) * (abs(h[1]) + g[1]) for g, h in zip(room, alone, strict=True))
    assert_within(domega, total, 2 * own)


@given(data=st.data(), kind=st.sampled_from(EXPONENTIAL), scale=st.sampled_from([None, 0.25]))
def test_as_a_feature_map_they_make_linear_attention_a_performer(
    data: st.DataObject, kind: Kind, scale: float | None
) -> None:
    q, k, v, omega = (data.draw(matrix(n, 2)) for n in (3, 4, 4, 5))
    phi = features.feature_map(omega, kind=kind, scale=scale)
    own = rounding.allowance(linear_transformer.attend, q, k, v, feature_map=phi)
    arrays = q, k, v, omega, np.zeros(2)
    other = rounding.allowance(performer.attend, *arrays, kind=kind, scale=scale)
    expected = performer.attend(*arrays, kind=kind, scale=scale)
    assert_within(linear_transformer.attend(q, k, v, feature_map=phi), expected, own + other)


# --- draws ------------------------------------------------------------------------------------------------------------

DRAWS = 4000
RADIUS = math.sqrt(math.log(2 / ALARM) / (2 * DRAWS))
"""How far an empirical distribution strays with probability `ALARM` at most."""


def strays(values: Array, distribution: Callable[[Array], Array]) -> float:
    """Return the largest distance of the empirical distribution to the stated one."""
    known, n = distribution(np.sort(values)), len(values)
    return float(max(abs(np.arange(1, n + 1) / n - known).max(), abs(np.arange(n) / n - known).max()))


def draws(m: int, D: int, **options: Any) -> Array:
    """Return many draws, (N, m, D)."""
    rng = np.random.default_rng(0)
    return np.array([features.draw(rng, m, D, **options) for _ in range(DRAWS)])


def uniform(x: Array) -> Array:
    """Return the distribution of a coordinate of a direction in R³."""
    return (1 + x) / 2


def rayleigh(x: Array) -> Array:
    """Return the distribution of the norm of N(0, I₂)."""
    return 1 - np.exp(-x * x / 2)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_directions_are_uniform_and_blocks_independent(directions: Directions) -> None:
    omega = draws(4, 3, directions=directions)
    unit = omega / np.linalg.norm(omega, axis=2, keepdims=True)
    for f, c in itertools.product(range(4), range(3)):
        assert strays(unit[:, f, c], uniform) <= RADIUS
    assert strays((unit[:, 0] * unit[:, 3]).sum(axis=1), uniform) <= RADIUS  # row 3 opens another block
    assert (strays((unit[:, 0] * unit[:, 1]).sum(axis=1), uniform) <= RADIUS) == (directions == "iid")


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_norms_are_those_of_a_normal_vector_and_independent(directions: Directions) -> None:
    norms = np.linalg.norm(draws(2, 2, directions=directions), axis=2)
    for f in range(2):
        assert strays(norms[:, f], rayleigh) <= RADIUS
    # the smaller of two independent norms is below r with probability 1 − (1 − P)²
    assert strays(norms.min(axis=1), lambda r: 1 - (1 - rayleigh(r)) ** 2) <= RADIUS


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_norms_of_the_regularised_kernel_are_all_one(directions: Directions) -> None:
    omega = features.draw(np.random.default_rng(0), 7, 5, directions=directions, norms="sqrt")
    squares = (omega * omega).sum(axis=1)
    assert_within(squares, np.full(7, 5.0), 5 * (2 * gamma(16 * 25) * math.sqrt(5) + gamma(20)))


@given(m=st.integers(1, 12), D=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_rows_of_a_block_are_orthogonal(m: int, D: int, seed: int) -> None:
    omega = features.draw(np.random.default_rng(seed), m, D, directions="orthogonal", norms="sqrt")
    assert omega.shape == (m, D)
    for at in range(0, m, D):
        block = omega[at : at + D]
        off = block @ block.T - np.diag((block * block).sum(axis=1))
        assert_within(off, np.zeros_like(off), D * (gamma(16 * D * D) * math.sqrt(D) + gamma(2 * D + 8)))


RATE = 0.5
GUILTY = 0.75


def judge_signs(omega: Array) -> None:
    """Judge that the first entry of the first row is positive, and negative, with probability ½ at most."""
    for sign in (1, -1):
        judge_count(int((sign * omega[:, 0, 0] > 0).sum()), len(omega), RATE)


def test_rotations_have_no_favoured_sign() -> None:
    assert draws_needed(RATE, GUILTY) <= DRAWS
    judge_signs(draws(2, 2, directions="orthogonal"))


def test_without_the_sign_fix_the_judge_convicts() -> None:
    """LAPACK's reflections leave the first diagonal entry of R with the sign opposite to what they started from."""
    with mock.patch.object(np, "copysign", lambda one, x: np.ones_like(x)):
        rotations = draws(2, 2, directions="orthogonal")
    with pytest.raises(AssertionError, match="draws fail"):
        judge_signs(rotations)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: features.of([[1.0]], [[1.0, 2.0]], kind="positive"), "omega"),
        (lambda: features.of([[1.0]], np.zeros((0, 1)), kind="positive"), "omega"),
        (lambda: features.of([[1.0]], [[1.0]], kind="gaussian"), "kind"),
        (lambda: features.vjp([[1.0]], [[1.0]], [[1.0]], kind="hyperbolic"), "dphi"),
        (lambda: features.feature_map([[1.0]], kind="positive", scale=-1.0), "scale"),
        (lambda: features.draw(np.random.default_rng(0), 0, 2), "count"),
        (lambda: features.draw(np.random.default_rng(0), 2, 0), "depth"),
        (lambda: features.draw(np.random.default_rng(0), 2, 2, directions="both"), "directions"),
        (lambda: features.draw(np.random.default_rng(0), 2, 2, norms="unit"), "norms"),
        (lambda: features.draw(0, 2, 2), "rng"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Callable[[], Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        call()
