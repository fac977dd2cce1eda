"""What evaluating ρ and S1's bound in float64 costs, and the judges of methods that drop keys or merge two parts."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proofs.exact import LIBM, SHARP, Array, Tight, distance, number, slack
from refattn import dropped, rounding, softmax
from refattn.method import accepted
from refattn.rounding import gamma
from refattn.testing import Ball
from refattn.testing.strategies import Case

Seen = NDArray[np.bool_]


def mass_relative(q: Array, k: Array, near: Seen, far: Seen, scale: float | None = None) -> Array:
    """Bound the relative error of the computed ρ, (T,), for rows that keep `near` and drop `far`.

    Its logit is a difference of two log-sum-exps, each within its allowance; then one exp, a sum and a quotient.
    """
    none = np.zeros((len(k), 0))
    kept, gone = (softmax.partial(q, k, none, mask=m, scale=scale).lse for m in (near, far))
    away = sum(rounding.allowance(softmax.partial, q, k, none, mask=m, scale=scale).lse for m in (near, far))
    gap = np.subtract(kept, gone, out=np.zeros(len(q)), where=np.isfinite(kept) & np.isfinite(gone))
    return np.expm1(away + gamma(1) * np.abs(gap)) + gamma(LIBM + 4)


def bound_rounding(
    bound: Array, q: Array, k: Array, v: Array, near: Seen, far: Seen, scale: float | None = None
) -> Array:
    """Bound the error of the computed S1, (T, E): that of ρ, of õ, one subtraction and one product."""
    relative, mass = mass_relative(q, k, near, far, scale), dropped.mass(q, k, kept=near, mask=near | far, scale=scale)
    o = rounding.allowance(softmax.attend, q, k, v, mask=near, scale=scale)
    return relative[:, None] * (bound + o) + mass[:, None] * o + slack(bound, 2)


def judge(
    tight: Tight, case: Case, near: Seen, far: Seen, o: Array | None = None, bound: Array | None = None
) -> tuple[Array, Array]:
    """Judge every output of a method whose rows keep `near` and drop `far`: its own, or those given.

    Return (error − rounding) ÷ bound and the rounding, (T, E).
    """
    (q, k, v), named = case.arguments()
    o, bound = case.attend() if o is None else o, case.bound() if bound is None else bound
    error, truth = np.abs(o - case.exact()), getattr(case.module, "exact", softmax.attend)
    room = rounding.allowance(case.module.attend, q, k, v, **named)
    room = room + rounding.allowance(truth, q, k, v, **accepted(truth, named)) + gamma(1) * error
    room = room + bound_rounding(bound, q, k, v, near, far, scale=named.get("scale"))
    ratios = [tight("S1", *parts) for parts in zip(error.flat, bound.flat, room.flat, strict=True)]
    return np.reshape(ratios, error.shape), room


def reaches(tight: Tight, case: Case, near: Seen, far: Seen) -> bool:
    """Judge values that are 1 on what a row drops, and return whether each row's own column reaches the bound."""
    case = case.given(**dict.fromkeys(case.module.METHOD.linear_in, far.T.astype(float)))
    bound, (ratios, room) = case.bound().diagonal(), (x.diagonal() for x in judge(tight, case, near, far))
    return bool(((ratios > SHARP) | (bound * (1 - SHARP) <= 2 * room)).all())  # unless too small a bound to be seen


def shares(case: Case, left: Seen, right: Seen) -> tuple[Any, Any]:
    """Return e^ℓ over two sets of pairs as columns of balls, scaled to sum 1 where a row sees something."""
    (q, k, _), none = (Ball.lift(case.arrays[s]) for s in "qkv"), Ball.lift(np.zeros((case.sizes["S"], 0)))
    parts = (softmax.partial(q, k, none, mask=seen, scale=case.options.get("scale")) for seen in (left, right))
    first, second = (np.exp(part.lse.reshape(-1, 1)) for part in parts)
    whole = first + second + np.where((left | right).any(axis=1, keepdims=True), 0.0, 1.0)
    return first / whole, second / whole


def judge_merge(tight: Tight, parts: tuple[Any, Any], weights: tuple[Any, Any], union: Any) -> list[float]:
    """Judge how far two parts' merge, of these shares and weights, is from one softmax over both, row by row."""
    merged, bound = parts[0] * weights[0] + parts[1] * weights[1], dropped.double_count(2)
    room = slack(bound, 3) + gamma(2) * math.sqrt(2)  # of a quotient with derivative at most ½ in the root of 2
    rows = zip(merged.cells, union.cells, strict=True)
    return [tight("S4", number(distance(list(a), list(b))), bound, room) for a, b in rows]
