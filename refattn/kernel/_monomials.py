"""Features that are monomials: the kernel Σ c_α (σ)^{|α|} x^α y^α as a product of C(D+p, p) of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from refattn import _check
from refattn.kernel._feature_map import FeatureMap
from refattn.kernel._scale import root
from refattn.lifted import Lifted, concatenate

Monomial = tuple[int, ...]
"""The variables of a monomial, ascending, each as often as its power says: x₀²x₂ is (0, 0, 2)."""


def coefficients(degree: int, depth: int, form: str) -> dict[Monomial, Fraction]:
    """Return c_α for every monomial of `depth` variables up to a degree, the lower degrees first.

    A degree whose coefficients are not quotients of integers that float64 holds is refused: T_p beyond p = 18.

    >>> [str(c) for c in coefficients(2, 1, "power").values()]
    ['1', '1', '1/4']
    """
    out: dict[Monomial, Fraction] = {}
    for t in range(degree + 1):
        top = Fraction(1) if form == "taylor" else Fraction(math.perm(degree, t), degree**t)
        for alpha in combinations_with_replacement(range(depth), t):
            out[alpha] = top / math.prod(math.factorial(n) for n in Counter(alpha).values())
            if max(out[alpha].numerator, out[alpha].denominator) > 2**53:
                raise ValueError(
                    f"degree is {degree}; expected coefficients that are quotients of integers up to 2**53"
                )
    return out


def feature_map(name: str, c: Mapping[Monomial, Fraction], scale: float | None) -> FeatureMap:
    """Return φ_α(x) = √c_α (√σ x)^α; the coefficients' order is that of `coefficients`."""
    place = {alpha: n for n, alpha in enumerate(c)}
    depth, degree = len([alpha for alpha in c if len(alpha) == 1]), max(map(len, c))
    ends = np.cumsum([0, *np.bincount([len(alpha) for alpha in c])])
    parent = np.array([place[alpha[:-1]] for alpha in c])
    last = np.array([alpha[-1] if alpha else 0 for alpha in c])
    parts = np.array([[float(x.numerator), float(x.denominator)] for x in c.values()]).T
    # x^α falls to α_c x^{α − e_c}: for each variable, which monomials have it, how often, and where they fall
    falls = [_falls(c, place, variable) for variable in range(depth)]

    def roots(x: Any) -> Any:
        return np.sqrt(_like(x, parts[0]) / parts[1])

    def powers(y: Any) -> Any:
        levels = [_like(y, np.ones((y.shape[0], 1)))]
        for t in range(1, degree + 1):
            at = slice(ends[t], ends[t + 1])
            levels.append(levels[-1][:, parent[at] - ends[t - 1]] * y[:, last[at]])
        return concatenate(*levels, axis=1)

    def of(x: Any) -> Any:
        _check.size("feature_map", x.shape[-1], depth, "D", "its depth")
        return powers(x * root(scale, depth, x)) * roots(x)

    def pull(dphi: Any, x: Any) -> Any:
        by = root(scale, depth, x)
        to_powers, low = dphi * roots(x), powers(x * by)
        columns = [(to_powers[:, own] * low[:, down]) @ times for own, down, times in falls]
        return concatenate(*columns, axis=1) * by

    return FeatureMap(name, of, pull)


def _like(x: Any, numbers: Any) -> Any:
    return x.lift(numbers) if isinstance(x, Lifted) else numbers


def _falls(c: Mapping[Monomial, Fraction], place: Mapping[Monomial, int], variable: int) -> tuple[Any, Any, Any]:
    own = [alpha for alpha in c if variable in alpha]
    down = [place[_without(alpha, variable)] for alpha in own]
    times = np.array([[float(alpha.count(variable))] for alpha in own])
    return np.array([place[alpha] for alpha in own]), np.array(down), times


def _without(alpha: Monomial, variable: int) -> Monomial:
    at = alpha.index(variable)
    return alpha[:at] + alpha[at + 1 :]
