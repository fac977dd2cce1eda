"""What is added to the logits: small lazy objects, the masks' siblings.

−inf in a table means *unseen*, exactly as in a mask, so that a masked pair has one meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check
from refattn.lifted import Lifted


class Bias:
    """A number for each pair (row, key), evaluated one block at a time."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes, of q's."""
        raise NotImplementedError

    def on(self, T: int, S: int) -> Bias:
        """Bind the bias to T rows and S keys, checking that it fits."""
        raise NotImplementedError

    def block(self, flat: int, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the numbers of one problem, (rows, keys); `flat` indexes the bias's own leading axes."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Table(Bias):
    """An array (..., T, S), or one that broadcasts against it. See `table`."""

    array: Any

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return self.array.shape[:-2]

    def on(self, T: int, S: int) -> Table:
        """Bind to T rows and S keys."""
        if any(got not in (1, n) for got, n in zip(self.array.shape[-2:], (T, S), strict=True)):
            raise ValueError(f"bias has shape {self.array.shape}; expected axes that broadcast to (..., {T}, {S})")
        return self

    def block(self, flat: int, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the numbers of one problem."""
        one = self.array[np.unravel_index(flat, self.lead)]
        return np.asarray(one[self.index(rows, keys)], dtype=np.float64)

    def index(self, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> tuple[Any, Any]:
        """Return the index of a block into the last two axes, which may have length 1."""
        T, S = self.array.shape[-2:]
        return (rows if T != 1 else np.zeros_like(rows))[:, None], (keys if S != 1 else np.zeros_like(keys))


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """Slope times signed distance. See `alibi`."""

    slopes: NDArray[np.float64]
    position: int | NDArray[np.intp] | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return self.slopes.shape

    def at(self, position: int | ArrayLike) -> Alibi:
        """Place the rows: an integer is row 0's position, an array (T,) is each row's own."""
        where = np.asarray(position)
        if where.dtype.kind not in "iu" or where.ndim > 1:
            raise TypeError(f"position is {position!r}; expected an integer or an integer array (T,)")
        return Alibi(self.slopes, int(where) if where.ndim == 0 else where.astype(np.intp))

    def on(self, T: int, S: int) -> Alibi:
        """Bind to T rows and S keys: unplaced rows stand bottom-right."""
        if isinstance(self.position, np.ndarray):
            _check.size("bias", len(self.position), T, "row positions", "q's T")
        return Alibi(self.slopes, S - T if self.position is None else self.position)

    def block(self, flat: int, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the numbers of one problem."""
        p = self.position[rows] if isinstance(self.position, np.ndarray) else rows + (self.position or 0)
        slope = self.slopes.reshape(-1)[flat]
        return slope * (keys - p[:, None]).astype(np.float64)


BiasLike: TypeAlias = Bias | ArrayLike | None
"""What a bias argument may be: a bias, an array (..., T, S) or one that broadcasts against it, or None."""


def table(array: ArrayLike) -> Bias:
    """Return an array (..., T, S) of numbers to add to the logits; −inf means unseen.

    Axes of length 1 broadcast, and leading axes are q's.

    >>> table([[0.0, -1.0]]).on(2, 2).block(0, np.arange(2), np.arange(2)).tolist()
    [[0.0, -1.0], [0.0, -1.0]]
    """
    return Table(_check.array("bias", array, "T S"))


def alibi(slopes: ArrayLike) -> Bias:
    """Return ALiBi's bias: slope·(j − p), where p is the row's position: 0 or negative for the past.

    Press, Smith and Lewis 2022, arXiv:2108.12409, §3. One slope a head: `slopes` has q's leading axes, (..., H).

    >>> alibi([0.5]).on(2, 2).block(0, np.arange(2), np.arange(2)).tolist()
    [[0.0, 0.5], [-0.5, 0.0]]
    """
    s = np.asarray(_check.array("slopes", slopes, ""), dtype=np.float64)
    if not np.isfinite(s).all():
        raise ValueError("slopes holds numbers that are not finite")
    return Alibi(s)


def bind(bias: BiasLike, T: int, S: int) -> Bias | None:
    """Return a bias bound to T rows and S keys; an array is a table."""
    if bias is None:
        return None
    if isinstance(bias, Bias):
        return bias.on(T, S)
    if isinstance(bias, Lifted):
        return Table(_check.array("bias", bias, "T S")).on(T, S)
    x = _check.array("bias", bias, "")
    return Table(x.reshape((1,) * max(0, 2 - x.ndim) + x.shape)).on(T, S)
