"""What evaluating ρ and S1's bound in float64 costs, and the judge of a method that drops keys."""

import numpy as np
from numpy.typing import NDArray

from proofs.exact import LIBM, Array, Tight, slack
from refattn import dropped, rounding, softmax
from refattn.method import accepted
from refattn.rounding import gamma
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
