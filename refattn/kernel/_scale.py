"""The scale in any arithmetic: where none is given it is the real number 1/√D, not a float near it."""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.lifted import Lifted


def scaled(x: Any, scale: float | None, depth: int) -> Any:
    """Return σx.

    >>> float(scaled(3.0, None, 4))
    1.5
    """
    return x / np.sqrt(number(depth, x)) if scale is None else x * scale


def root(scale: float | None, depth: int, like: Any) -> Any:
    """Return √|σ| in the arithmetic of an array, for features whose product has the factor |σ|.

    >>> float(root(4.0, 1, 0.0)), float(root(None, 16, 0.0))
    (2.0, 0.5)
    """
    return 1.0 / np.sqrt(np.sqrt(number(depth, like))) if scale is None else np.sqrt(number(abs(scale), like))


def number(x: float, like: Any) -> Any:
    """Return a number in the arithmetic of an array."""
    return like.lift(float(x)) if isinstance(like, Lifted) else float(x)
