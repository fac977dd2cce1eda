r"""The two polynomials in place of e^s, κ = T_p and κ = (1 + s/p)^p, in any arithmetic; and their ratio to e^s."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FAR = 700.0
"""Up to there e^x is a float64, and the series for T_p(x)/e^x are summed."""


def kernel(degree: int, form: str, s: Any) -> Any:
    """Return κ(s).

    >>> float(kernel(2, "taylor", 2.0)), float(kernel(2, "power", 2.0))
    (5.0, 4.0)
    """
    return _horner(s, degree) if form == "taylor" else _power(s / degree + 1.0, degree)


def slope(degree: int, form: str, s: Any) -> Any:
    """Return κ′(s): T_{p−1}, or (1 + s/p)^{p−1}; the number 1 if that is constant."""
    return _horner(s, degree - 1) if form == "taylor" else _power(s / degree + 1.0, degree - 1)


def as_written(degree: int, form: str, s: Any) -> Any:
    """Return κ(s), term by term or factor by factor."""
    if form == "power":
        return functools.reduce(operator.mul, [s / degree + 1.0] * degree)
    total, term = s + 1.0, s
    for t in range(2, degree + 1):
        term = term * s / t
        total = total + term
    return total


def log_ratio(degree: int, form: str, x: Array) -> Array:
    r"""Return ρ(x) = ln κ(x) − x without cancellation; −∞ where κ(x) ≤ 0, ∞ where it overflows or is not computed.

    T_p(x)e^{−x} is 1 − ∫_0^x t^p e^{−t} dt / p!: integrals of positive functions on either side of 0, whose series
    have positive terms (K2c). Beyond x = p + 1, or 700, the logarithm of T_p is taken, and never too large.
    """
    p = degree
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if form == "power":
            return np.where(x > -p, p * np.log1p(np.maximum(x / p, -1.0)) - x, -np.inf)
        last = min(p + 1.0, FAR)  # up to there the integral is below 2/3
        near, y = np.clip(x, 0.0, last), np.clip(-x, 0.0, FAR)
        below = np.log1p(-np.exp(-near) * _power_over_factorial(near, p + 1) * _kummer(1, p + 2, near))
        above = np.log(np.minimum(_horner(np.maximum(x, 0.0), p), np.finfo(np.float64).max)) - x
        first, series = _power_over_factorial(y, p + 1), _kummer(p + 1, p + 2, y)
        grown = first * series
        if p % 2:
            left = np.where((x >= -FAR) & (_horner(x, p) > 0), np.log1p(-np.minimum(grown, 1.0)), -np.inf)
        else:
            left = np.where(np.isinf(grown), np.log(first) + np.log(series), np.log1p(grown))
            left = np.where(x < -FAR, np.inf, left)
    return np.where(x < 0, left, np.where(x <= last, below, above))


def _horner(s: Any, degree: int) -> Any:
    """Return T_degree(s); the number 1 if that is constant."""
    total: Any = 1.0
    for t in range(degree, 0, -1):
        total = (s if t == degree else s * total) / t + 1.0
    return total


def _power(x: Any, n: int) -> Any:
    """Return x^n by squaring; the number 1 if n = 0."""
    if n <= 1:
        return x if n else 1.0
    half = _power(x, n // 2)
    return half * half * x if n % 2 else half * half


def _power_over_factorial(y: Array, n: int) -> Array:
    """Return y^n/n!, every partial product of which is a term of e^y."""
    out = np.ones_like(y)
    for t in range(1, n + 1):
        out = out * y / t
    return out


def _kummer(a: int, b: int, y: Array) -> Array:
    """Return M(a, b, y) = Σ_n (a)_n/(b)_n·y^n/n! for a ≤ b, y ≥ 0, until what is left is below one rounding."""
    total, term, n = np.ones_like(y), np.ones_like(y), 0
    while ((term > 2.0**-56 * total) | (2 * y > n + 1)).any():
        term = term * ((a + n) * y / ((b + n) * (n + 1)))
        total, n = total + term, n + 1
    return total
