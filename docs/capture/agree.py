r"""Whether captured arrays give the output that the model itself computed in float32, within what float32 may do.

A library computes softmax(σ q kᵀ) v in an order of its own; u = 2⁻²⁴. Hypotheses:

- every operation is rounded to the nearest float32, sums are in any order, and nothing underflows but weights, to 0 and
  below 2⁻¹²⁶;
- beside the D roundings of its dot product a logit meets at most 8, for the scale, wherever that is applied;
- an exponential is within 20 units in the last place, 40u, as PyTorch declares of its fastest;
- keys come in B blocks at most, of 128 or more, and what is summed so far is rescaled once a block;
- so a term of a sum meets at most S + 2B + 2 roundings: sums, rescaling, its product and the quotient.

Then a weight, before it is normalised, is off by a factor within e^±Δ, beside one that is common to its row,

    Δ_i = max_j e_ij + u (span_i + 2 max_j e_ij) + 41u B + γ_{S+2B+2},   e_ij = γ_{D+8} |σ| Σ_c |q_ic k_jc|,

where the differences from a growing maximum, each rounded, telescope to the span of the row's logits, and
ln(1 + 40u) < 41u. Normalised it is off by a factor within e^±2Δ, and what underflowed is at most 2S·2⁻¹²⁶ of the sums:

    |õ_ic − o_ic| ≤ (e^{2Δ_i} − 1) Σ_j p_ij |v_jc| + S·2⁻¹²⁴ max_j |v_jc|      for Δ_i ≤ ln(2)/2

to which the float64 answer adds its own `rounding.allowance`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refattn import rounding, softmax
from refattn.masks import Mask
from refattn.testing import assert_within

U = 2.0**-24


def largest_difference(
    o: Any, q: Any, k: Any, v: Any, *, mask: Mask | None = None, scale: float | None = None
) -> float:
    """Return the largest |o − softmax.attend(q, k, v)|, or fail where one element is out of the bound above.

    All are in the layout of refattn, (..., heads, T, D); k and v may have fewer heads.
    """
    o, q, k, v = (np.asarray(x, np.float64) for x in (o, q, k, v))
    k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    exact = softmax.attend(q, k, v, mask=mask, scale=scale)
    bound = np.empty_like(exact)
    for head in np.ndindex(q.shape[:-2]):
        one = q[head], k[head], v[head]
        bound[head] = _bound(*one, mask, scale) + rounding.allowance(softmax.attend, *one, mask=mask, scale=scale)
    assert_within(o, exact, bound)
    return float(np.abs(o - exact).max())


def _bound(q: Any, k: Any, v: Any, mask: Mask | None, scale: float | None) -> Any:
    (S, D), sigma = k.shape, 1 / math.sqrt(q.shape[1]) if scale is None else abs(scale)
    p, logits = softmax.weights(q, k, mask=mask, scale=scale), sigma * (q @ k.T)
    blocks, e = math.ceil(S / 128), (rounding.gamma(D + 8, U) * sigma * (abs(q) @ abs(k).T)).max(axis=1)
    span = logits.max(axis=1) - logits.min(axis=1)  # of all keys: no less than that of the keys seen
    delta = e + U * (span + 2 * e) + 41 * U * blocks + rounding.gamma(S + 2 * blocks + 2, U)
    if delta.max() > math.log(2) / 2:
        raise ValueError(f"logits are too large to say anything of float32: Δ = {delta.max():.3g}")
    bound = np.expm1(2 * delta)[:, None] * (p @ abs(v)) + S * 2.0**-124 * abs(v).max(axis=0)
    return bound * rounding.EVALUATION
