"""Lifted arrays: types that carry more than a float64 through the verbs' own code.

A verb that is handed such an array runs unchanged, so what it computes and how far that may be from the real number
come from one text. There are two: `refattn.rounding.Bounded` (a value with a proved bound on its rounding error) and
`refattn.testing.Ball` (an enclosure at any precision, optionally with a directional derivative).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray


class Lifted(np.lib.mixins.NDArrayOperatorsMixin):
    """Base of these types: two-dimensional arrays, without leading axes.

    A subclass supplies `shape`, `floats`, `mT`, indexing, `sum`, `join` and, through `__array_ufunc__`, the ufuncs
    named in `UFUNCS`; and it supplies the engines, whose order of operations the verbs do not spell out:
    `softmax_forward`, `softmax_backward`, `linear_forward`, `linear_backward`.
    """

    UFUNCS: ClassVar[tuple[str, ...]] = (
        "add",
        "subtract",
        "multiply",
        "divide",
        "negative",
        "matmul",
        "exp",
        "log",
        "sqrt",
        "sin",
        "cos",
        "maximum",
        "minimum",
    )

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Carry the ufunc out in this arithmetic."""
        if method != "__call__" or options or ufunc.__name__ not in self.UFUNCS:
            return NotImplemented
        first, *rest = map(self.lift, inputs)
        return getattr(first, f"_{ufunc.__name__}")(*rest)

    def floats(self) -> NDArray[np.float64]:
        """Return the values in float64."""
        raise NotImplementedError

    @classmethod
    def lift(cls, x: Any) -> Self:
        """Return exact numbers in this arithmetic."""
        raise NotImplementedError

    @classmethod
    def join(cls, parts: Sequence[Any], axis: int) -> Self:
        """Return arrays joined along an axis."""
        raise NotImplementedError

    def softmax_forward(self, one: Any) -> tuple[Any, Any]:
        """Return o and lse of one problem."""
        raise NotImplementedError

    def softmax_backward(self, one: Any, do: Any, dlse: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Return the gradients of one problem: q, k, v, bias, sink."""
        raise NotImplementedError

    def linear_forward(self, fq: Any, fk: Any, v: Any, seen: NDArray[np.bool_], eps: float) -> Any:
        """Return linear attention from the features of q and k, or from κ itself where those of k are None."""
        raise NotImplementedError

    def linear_backward(
        self, fq: Any, fk: Any, v: Any, seen: NDArray[np.bool_], eps: float, do: Any
    ) -> tuple[Any, Any, Any]:
        """Return gradients with respect to the features of q and k, and to v."""
        raise NotImplementedError


def concatenate(*parts: Any, axis: int = 0) -> Any:
    """Return matrices joined along an axis, in the arithmetic that any of them is in.

    >>> concatenate(np.zeros((1, 1)), np.ones((1, 1))).tolist()
    [[0.0], [1.0]]
    """
    kind = next((type(x) for x in parts if isinstance(x, Lifted)), None)
    return np.concatenate(parts, axis) if kind is None else kind.join([kind.lift(x) for x in parts], axis)
