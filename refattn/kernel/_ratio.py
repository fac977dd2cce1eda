"""How far attention with any kernel is from softmax attention: the spread of their logarithmic ratio (K1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import perturbation
from refattn._mix import tiles

Array = NDArray[np.float64]
Block = Callable[[NDArray[np.intp]], Any]


def bound(o: Array, v: Array, ends: NDArray[np.int64], kappa: Block, logits: Block, eps: float = 0.0) -> Array:
    r"""Return K1's bound of one problem, (T, E), never more than the distance to the far end of the values seen.

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \tanh\!\big(\tfrac14 \operatorname*{osc}_j(\ln \kappa_{ij} - s_{ij})\big)
        \operatorname*{range}_j v_{jc} + |\tilde o_{ic}| \frac{\varepsilon}{\mathrm{den}_i}

    Row i sees the first ``ends[i]`` keys; `kappa` and `logits` return some rows, (rows, S). Where some κ ≤ 0 only the
    distance is known; rows that see nothing are 0.
    """
    out, live, keys = np.zeros_like(o), np.flatnonzero(ends), np.arange(len(v))
    if len(live) == 0:
        return out
    low, high = np.minimum.accumulate(v), np.maximum.accumulate(v)
    for rows in tiles(live, len(v)):
        seen = keys < ends[rows][:, None]
        kernel = kappa(rows)
        positive = seen & (kernel > 0)
        ratio = np.log(np.where(positive, kernel, 1.0)) - logits(rows)
        span = np.where(seen, ratio, -np.inf).max(axis=1) - np.where(seen, ratio, np.inf).min(axis=1)
        sure = (positive == seen).all(axis=1)
        tv = perturbation.tilt_total_variation(np.where(sure, span, 0.0))[:, None]
        shrink = eps / np.where(sure, np.where(seen, kernel, 0.0).sum(axis=1), 1.0)[:, None]
        lo, hi, here = low[ends[rows] - 1], high[ends[rows] - 1], o[rows]
        claim = np.where(sure[:, None], tv * (hi - lo) + np.abs(here) * shrink, np.inf)
        out[rows] = np.minimum(claim, np.maximum(np.abs(here - lo), np.abs(hi - here)))
    return out


def evaluation(ends: NDArray[np.int64], S: int, kappa: Block, logits: Block) -> Array:
    """Return how far the ratio's logarithm may be off in each row, (T,), of blocks in Bounded arithmetic.

    Where some κ is not positive in any run, no logarithm is in the claim.
    """
    found, keys = np.zeros(len(ends)), np.arange(S)
    with np.errstate(all="ignore"):
        for rows in tiles(np.arange(len(ends)), S):
            kernel, seen = kappa(rows), keys < ends[rows][:, None]
            signed = (seen & (kernel.value + 2 * kernel.error <= 0)).any(axis=1)
            error = np.where(seen, (np.log(kernel) - logits(rows)).error, 0.0).max(axis=1, initial=0.0)
            found[rows] = np.where(signed, 0.0, np.where(np.isnan(error), np.inf, error))
    return found
