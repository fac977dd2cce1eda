"""What evaluating ρ and S1's bound in float64 costs."""

import numpy as np
from numpy.typing import NDArray

from proofs.exact import LIBM, Array, slack
from refattn import dropped, rounding, softmax
from refattn.rounding import gamma

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
