"""The scale in any arithmetic: where none is given it is the real number 1/√D, not a float near it."""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.arithmetic import Arithmetic


def scaled(x: Any, scale: float | None, depth: int) -> Any:
    """Return σx.

    >>> float(scaled(3.0, None, 4))
    1.5
    """
    return x / np.sqrt(_number(x, depth)) if scale is None else x * scale


def rooted(x: Any, scale: float | None, depth: int) -> Any:
    """Return √σ x, for features whose product has the factor σ.

    >>> float(rooted(3.0, 4.0, 1))
    6.0
    """
    return x / np.sqrt(np.sqrt(_number(x, depth))) if scale is None else x * np.sqrt(_number(x, scale))


def _number(x: Any, value: float) -> Any:
    return x.lift(float(value)) if isinstance(x, Arithmetic) else float(value)
