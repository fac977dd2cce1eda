"""What the proof files draw, what really happens to it, and what evaluating a bound in float64 costs.

Drawn numbers lie on dyadic grids (weights: multiples of 2⁻⁴⁰ that sum to exactly 1), so p, v, δ and their differences
are exact in float64. What really happens is computed from them in 200-bit ball arithmetic. A bound is the float64
function under test, charged γ_h for the h roundings on its longest path, where a NumPy elementary function, even
exp and log, counts as what `rounding.TANH` grants: 4 ulp, an ulp being at most 2u. Where a function centres v by a
computed mean, that mean is charged its own error.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from flint import arb
from hypothesis import strategies as st
from numpy.typing import NDArray

from refattn.rounding import TANH, U, gamma

Array = NDArray[np.float64]
Tight = Callable[..., float]

LIBM = round(TANH / U)
SHARP = 0.99  # what a case of equality must reach to count as one
SPANS = [2.0**-40, 2.0**-10, 1.0, 4.0, 40.0]


# --- what is drawn ----------------------------------------------------------------------------------------------------


class Tilt(NamedTuple):
    """Weights, values, a tilt of them and its span."""

    p: Array
    v: Array
    delta: Array
    span: float


def grid(low: float, high: float) -> st.SearchStrategy[float]:
    """Draw multiples of 2⁻¹⁰."""
    return st.integers(math.ceil(low * 1024), math.floor(high * 1024)).map(lambda i: i / 1024)


def row(n: int, low: float, high: float) -> st.SearchStrategy[Array]:
    """Draw n multiples of 2⁻¹⁰."""
    return st.lists(grid(low, high), min_size=n, max_size=n).map(np.array)


def on_grid(weights: Array, bits: int = 40) -> Array:
    """Round weights to positive multiples of 2**-bits that sum to exactly 1."""
    units = np.maximum(np.floor(weights / weights.sum() * 2.0**bits), 1.0)
    units[units.argmax()] += 2.0**bits - units.sum()
    return units * 2.0**-bits


@st.composite
def weights(draw: st.DrawFn, n: int) -> Array:
    """Softmax of logits of standard deviation about 0.1, 1 or 5."""
    s = draw(row(n, -2, 2)) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    return on_grid(np.exp(s - s.max()))


@st.composite
def values(draw: st.DrawFn, n: int) -> Array:
    """One column: numbers around 0 or around 10, or zeros and ones."""
    if draw(st.booleans()):
        return draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n).map(np.array))
    return draw(row(n, -3, 3)) + draw(st.sampled_from([0.0, 10.0]))


@st.composite
def tilts(draw: st.DrawFn, most: int = 12) -> Tilt:
    """Tilts of span up to 4: anything, corners of the cube, or one spike."""
    n = draw(st.integers(2, most))
    size = draw(st.integers(1, 4096)) * 2.0 ** draw(st.sampled_from([-10, -40]))
    spike = np.eye(n)[draw(st.integers(0, n - 1))]
    corner = st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n).map(np.array)
    delta = size * draw(st.one_of(row(n, 0, 1), corner, st.just(spike)))
    return Tilt(draw(weights(n)), draw(values(n)), delta, float(np.ptp(delta)))


def two_keys(first: float, span: float) -> Tilt:
    """Weights (t, 1−t) with the first key raised by the span and looked at: most cases of equality are this one."""
    return Tilt(on_grid(np.array([first, 1 - first]), 52), np.array([1.0, 0.0]), np.array([span, 0.0]), span)


# --- what really happens ----------------------------------------------------------------------------------------------


def exact(x: Sequence[float] | Array) -> list[arb]:
    """Take floats as they are."""
    return [arb(float(a)) for a in x]


def number(x: arb) -> float:
    """Return the number of the ball nearest to zero, as a float: rounded once, never exaggerated by the radius."""
    size = float(x.abs_lower())
    return size if x >= 0 else -size


def dot(x: Sequence[arb], y: Sequence[arb]) -> arb:
    """Return Σxy."""
    return sum((a * b for a, b in zip(x, y, strict=True)), arb(0))


def tilted(p: Array, delta: Array) -> list[arb]:
    """Return p' ∝ p·e^δ."""
    w = [a * d.exp() for a, d in zip(exact(p), exact(delta), strict=True)]
    z = sum(w, arb(0))
    return [a / z for a in w]


def distance(p: Sequence[arb], p2: Sequence[arb]) -> arb:
    """Return the total variation."""
    return sum((abs(a - b) for a, b in zip(p, p2, strict=True)), arb(0)) / 2


def change(case: Tilt) -> arb:
    """Return o' − o."""
    v = exact(case.v)
    return dot(tilted(case.p, case.delta), v) - dot(exact(case.p), v)


def norm(x: Sequence[arb]) -> arb:
    """Return the Euclidean norm."""
    return dot(x, x).nonnegative_part().sqrt()


def highest(x: Sequence[arb]) -> arb:
    """Return the largest entry."""
    best = x[0]
    for a in x[1:]:
        best = best.max(a)
    return best


def span_of(x: Sequence[arb]) -> arb:
    """Return max − min."""
    return highest(x) + highest([-a for a in x])


# --- what a bound costs -----------------------------------------------------------------------------------------------


def slack(bound: Array | float, roundings: int) -> Array:
    """Charge a result of positive terms for the roundings on its longest path; converting the truth is one more."""
    return gamma(roundings + 1) * np.abs(bound)


def centring(p: Array, v: Array) -> float:
    """Bound the error of the float64 mean of v, and of subtracting it."""
    return float(gamma(len(p) + 1) * np.sum(p * np.abs(v)) + gamma(1) * np.ptp(v))
