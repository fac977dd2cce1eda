"""Sums of exponentials kept as logarithms: −inf is the sum of nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def share(dropped: Array, kept: Array) -> Array:
    """Return e^dropped / (e^dropped + e^kept), and 0 where both are −inf."""
    top = np.maximum(dropped, kept)
    shift = np.where(np.isneginf(top), 0.0, top)
    a, b = np.exp(dropped - shift), np.exp(kept - shift)
    return np.divide(a, a + b, out=np.zeros(top.shape), where=a + b != 0)


def log_sum_exp(x: Array) -> Array:
    """Return the log-sum-exp over the last axis; −inf where there is nothing."""
    top: Array = x.max(axis=-1, initial=-np.inf)
    shift = np.where(np.isneginf(top), 0.0, top)
    return shift + log(np.exp(x - shift[..., None]).sum(axis=-1))


def log(x: Array) -> Array:
    """Return ln x, −inf for 0 without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(x)
