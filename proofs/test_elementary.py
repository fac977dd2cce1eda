"""NumPy's elementary functions are as near to the real ones as `rounding` takes them to be: measured, not proved.

Hypotheses   Hexp: float64 exp and log are off by at most `EXP`·|result| + `TINY`, one unit in the last place.
             Hlibm: the others are off by at most `TANH`·|result| + `TINY`, four units.
Evidence     Points spread over the whole domain, and those where implementations are at their worst: next to where a
             table or the reduction of the argument changes, where the result is next to 0, and where it becomes
             subnormal. In whole arrays, in strided ones and one at a time, which are different loops.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flint import arb

from proofs.exact import LIBM, Array
from refattn.rounding import EXP, TANH, TINY, U
from refattn.testing import Ball, assert_within

SPREAD = 24_000
RNG = np.random.default_rng(0)


def beside(x: Array) -> Array:
    """Return the floats at x and next to them."""
    return np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf)])


def powers(low: int, high: int, n: int) -> Array:
    """Return numbers with all their bits, whose exponents are spread evenly."""
    return RNG.uniform(1, 2, n) * 2.0 ** RNG.integers(low, high, n)


def of_exp() -> Array:
    turns = np.arange(-2150, 2048) * (np.log(2) / 2)
    fine = np.log(2) / 128 * np.arange(-700, 700)
    x = np.concatenate([RNG.uniform(-745, 709, SPREAD), RNG.uniform(-1, 1, 4000), -powers(-60, 9, 2000)])
    x = np.concatenate([x, powers(-60, 9, 2000), beside(turns), beside(fine), [-745.0, 709.0, 0.0]])
    return x[(x >= -745) & (x <= 709)]


def of_log() -> Array:
    near = 1 + np.concatenate([powers(-52, -1, 2000), -powers(-53, -2, 2000)])
    exact = 2.0 ** np.arange(-1074, 1024)
    fine = 1 + np.arange(-64, 257) / 256
    x = np.concatenate([powers(-1022, 1023, SPREAD), RNG.uniform(0.5, 2, 4000), near, exact, beside(fine)])
    return np.concatenate([x, RNG.integers(1, 2**52, 1000) * 2.0**-1074, [np.finfo(float).max]])


def of_tanh() -> Array:
    fine = np.arange(0, 22 * 64) / 64
    x = np.concatenate([RNG.uniform(0, 22, SPREAD), powers(-1022, 10, 4000), powers(-30, 0, 4000), beside(fine)])
    return np.concatenate([x, -x])


@pytest.mark.parametrize(
    ("f", "real", "points", "units"),
    [(np.exp, arb.exp, of_exp, EXP), (np.log, arb.log, of_log, EXP), (np.tanh, arb.tanh, of_tanh, TANH)],
)
def test_elementary_functions_keep_their_hypothesis(
    f: Callable[[Any], Any], real: Callable[[arb], arb], points: Callable[[], Array], units: float
) -> None:
    x = points()
    assert len(x) >= 20_000
    truth = Ball(np.array([real(arb(a)) for a in x.tolist()], object))
    strided = np.zeros(2 * len(x))
    strided[::2] = x
    for y in (f(x), f(strided[::2]), np.array([f(a) for a in x])):
        # an error that is below this part of the computed number is below `units` of the real one
        assert_within(y, truth, units * (1 - 2 * units) * np.abs(y) + TINY)


@pytest.mark.parametrize(("f", "real"), [(np.sin, arb.sin), (np.cos, arb.cos)])
def test_sine_and_cosine_are_within_four_units_of_one(f: Callable[[Any], Any], real: Callable[[arb], arb]) -> None:
    turns = beside(np.arange(-2000, 2000) * (np.pi / 4))
    x = np.concatenate([RNG.uniform(-100, 100, SPREAD), powers(-1022, 1023, 4000), powers(-30, 20, 4000), turns])
    truth = Ball(np.array([real(arb(a)) for a in x.tolist()], object))
    for y in (f(x), np.array([f(a) for a in x])):
        assert_within(y, truth, np.full(len(x), TANH))


def test_the_units_are_stated_once() -> None:
    assert (EXP, TANH) == (2 * U, LIBM * U)
