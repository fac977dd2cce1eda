"""The definition in ball arithmetic, where its float64 rounding is not small against what is allowed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import engines, softmax
from refattn.bias import Table
from refattn.heads import matrix
from refattn.partial import Partial
from refattn.testing.ball import Ball, precision

MOST = 150_000
"""Products that ball arithmetic is asked for in one judgement: about half a second."""


def reach(sizes: tuple[int, int, int, int], problems: int) -> int:
    """Return how many rows ball arithmetic may take; 0 without python-flint.

    >>> reach((5, 10**7, 8, 8), 1)
    0
    """
    if importlib.util.find_spec("flint") is None:
        return 0
    T, S, D, E = sizes
    return min(T, MOST // max(1, problems * S * (D + E)))


def exact(rows: NDArray[np.intp]) -> Callable[..., Partial]:
    """Return a verb like `refattn.softmax.partial` that answers these rows to within half a unit, and others NaN.

    Its bias is an array or None.
    """

    def partial(q: Any, k: Any, v: Any, **options: Any) -> Partial:
        call = engines.problem(q, k, v, **options)
        T, _, _, E = call.sizes
        o, lse = np.full((*call.leads.shape, T, E), np.nan), np.full((math.prod(call.leads.shape), T), np.nan)
        with precision(200):
            for n, one in enumerate(call.all()):
                seen = one.seen()[rows]
                some = seen.any(axis=0)
                keys, all_keys = np.flatnonzero(some), np.arange(call.sizes[1])
                bias = None
                if isinstance(call.bias, Table):
                    bias = np.where(seen, one.bias(rows, all_keys), 0.0)[:, keys]
                how: dict[str, Any] = {
                    "sink": one.sink,
                    "softcap": call.softcap,
                    "order": call.order,
                    "scale": call.scale,
                }
                lifted: list[Any] = [
                    Ball.lift(np.asarray(x, np.float64)) for x in (one.q[rows], one.k[keys], one.v[keys])
                ]
                own: Any = softmax.partial(*lifted, bias=bias, mask=seen[:, keys], **how)
                matrix(o, n)[rows], lse[n, rows] = own.o.floats(), own.lse.floats()
        return Partial(o, lse.reshape(*call.leads.shape, T))

    return partial
