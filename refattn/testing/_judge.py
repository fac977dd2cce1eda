"""The judge: an answer is right if every element is within its derived bound."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check
from refattn.lifted import Lifted
from refattn.testing.ball import Ball

Array = NDArray[np.float64]


def assert_within(actual: ArrayLike, expected: ArrayLike | Ball, bound: ArrayLike, *, empty: bool = False) -> float:
    """Assert |actual − expected| ≤ bound elementwise, and return the largest error ÷ bound.

    There is no default bound: it is derived, by `refattn.rounding.allowance` or by a method's `bound`.

    Parameters
    ----------
    actual
        What is judged.
    expected
        The truth: an array, or a `Ball`, whose radius is charged to the judge and not to the accused.
    bound
        What is allowed, of the answer's shape or broadcasting against it; finite and not negative.
    empty
        Whether an answer without elements is acquitted; otherwise there is nothing to judge, which is an error.

    Returns
    -------
    float
        The largest error ÷ bound; 0/0 counts as 0.

    Raises
    ------
    AssertionError
        An error above its bound, NaN or infinity that is not expected, another shape, or an answer that is not an
        array of real numbers that float64 holds. The message has the worst index, both values, the error and the
        allowance.
    ValueError, TypeError
        A bound that is not finite, or negative, nothing to judge, or a truth or bound that is not an array of real
        numbers that float64 holds.

    Examples
    --------
    >>> from refattn.testing import assert_within
    >>> assert_within([1.0], [1.5], [1.0])
    0.5
    """
    try:
        a = _reals("actual", actual)
    except (TypeError, ValueError) as error:
        raise AssertionError(str(error)) from None
    expected, b = expected if isinstance(expected, Ball) else _reals("expected", expected), _reals("bound", bound)
    if a.shape != expected.shape:
        raise AssertionError(f"actual has shape {a.shape}; expected {expected.shape}")
    try:
        b = np.broadcast_to(b, a.shape)
    except ValueError:
        raise ValueError(f"bound has shape {b.shape}, which does not broadcast to {a.shape}") from None
    if a.size == 0:
        if empty:
            return 0.0
        raise ValueError("there is nothing to judge: the answer has no elements")
    if not (np.isfinite(b).all() and (b >= 0).all()):
        raise ValueError("bound holds numbers that are negative or not finite: it allows nothing or anything")
    truth, error = _distance(a, expected)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(error <= b, np.where(b > 0, error / b, 0.0), np.where(b > 0, error / b, np.inf))
    ratio = np.where(np.isnan(error), np.inf, ratio)
    worst = np.unravel_index(int(ratio.argmax()), a.shape)
    if not (error <= b).all():
        wrong = int((~(error <= b)).sum())
        at = ", ".join(str(int(i)) for i in worst)
        raise AssertionError(
            f"{wrong} of {a.size} elements are out of bounds; worst at [{at}]: actual {a[worst]!r}, expected "
            f"{truth[worst]!r}, error {error[worst]:.6g}, allowed {b[worst]:.6g} (error / bound = {ratio[worst]:.4g})"
        )
    return float(ratio[worst])


def _reals(name: str, value: Any) -> Array:
    """Return real numbers that float64 holds; what it would round or leave out, an error could hide in."""
    if isinstance(value, Lifted):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an array of real numbers")
    return _check.array(name, value, "").astype(np.float64)


def _distance(a: Array, x: Array | Ball) -> tuple[Array, Array]:
    """Return the truth in float64 and an upper bound of |a − truth|; infinities of one sign agree."""
    if isinstance(x, Ball):
        return x.floats(), x.distance(a)
    with np.errstate(invalid="ignore", over="ignore"):
        error: Array = a - x
        # what rounding took from the difference, exactly (Knuth's two-sum): an error is never rounded down to its bound
        back = error - a
        lost = (a - (error - back)) - (x + back)
        size = np.abs(error)
        error = np.where(np.copysign(1.0, error) * lost > 0, np.nextafter(size, np.inf), size)
    return x, np.where(np.isinf(x) & (a == x), 0.0, error)
