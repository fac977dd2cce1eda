"""What all masks share: combining, placing, binding to sizes, and the algebra of edges. See `refattn.masks`.

The pairs that some rows see are *edges* on one axis, n·(S + 1) + key for the n-th of these rows: where seeing turns on,
off, on, … in strictly ascending order. Column S is never seen, so runs of neighbouring rows cannot touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Shape = tuple[int, ...]

FAR = 2**60  # positions, distances and sizes up to here cannot overflow while the edges' axis is at most this long:
FLAT = 2**62  # `merge` needs twice an edge and a bit
AT_ONCE = 2**20  # edges, or pairs of a dense array, that are held at a time
KEPT = 2**22  # bytes of answers that a bound mask remembers


class Runs(NamedTuple):
    """Row i sees keys start[n] ≤ j < stop[n] for indptr[i] ≤ n < indptr[i + 1]: sorted, disjoint, not touching."""

    indptr: Ints
    start: Ints
    stop: Ints


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """A rule for which pairs are seen. Made by the functions of this module, combined with ``& | ~``.

    Examples
    --------
    >>> from refattn import masks
    >>> mask = masks.causal() & masks.window(1, 0)
    >>> mask
    (causal() & window(1, 0))
    >>> print(mask.on(3, 4))
    xx..
    .xx.
    ..xx
    """

    NAME: ClassVar[str] = "mask"
    __array_ufunc__: ClassVar[None] = None  # an array's & | ~ would answer an array of objects

    @property
    def lead(self) -> Shape:
        """The leading axes, of q's: () for a mask that is the same for all."""
        return ()

    @property
    def position(self) -> Ints | None:
        """Where `at` or `Pairs.pick` placed the rows of the whole expression; None where no such placing covers it."""
        return None

    def at(self, position: int | ArrayLike) -> Mask:
        """Place the rows on the key axis.

        Parameters
        ----------
        position : int or (..., T) of int
            An integer is row 0's position, and the others follow: 0 is top-left. An array is each row's own; its
            leading axes are q's.

        Returns
        -------
        Mask
            The whole expression placed, except for what is placed already: an inner placement stands. Masks that ask
            for a row's number, not its position (`segments`, `lengths`, `dense`), do not change.

        Raises
        ------
        ValueError, TypeError
            A position that is not an integer, or leading axes that do not broadcast with the mask's.

        Examples
        --------
        >>> from refattn.masks import causal, window
        >>> print(causal().at(0).on(2, 4))
        x...
        xx..
        >>> print(window(1, 0).at([3, 1]).on(2, 4))
        ..xx
        xx..
        """
        where = integers("position", position, 0)
        if where.size and (where.min() < -FAR or where.max() > FAR):
            raise ValueError(f"position reaches from {where.min()} to {where.max()}; expected at most 2**60 from 0")
        join("position", where.shape[:-1], self.lead)
        return _Placed(self, where)

    def on(self, T: int, S: int) -> Pairs:
        """Bind to T rows and S keys.

        Raises
        ------
        ValueError
            Arrays, tokens or tables that do not fit these sizes, or T·(S + 1) above 2**62.
        """
        rows, keys = integer("T", T, 0), integer("S", S, 0)
        flat("T", rows, keys)
        self._fits(rows, keys, keys - rows, keys - 1)
        return Pairs(self, rows, keys)

    def __and__(self, other: Mask) -> Mask:
        """Return what both see."""
        return _Both(self, other) if isinstance(other, Mask) else NotImplemented  # pyright: ignore[reportUnnecessaryIsInstance]

    def __or__(self, other: Mask) -> Mask:
        """Return what either sees."""
        return _Either(self, other) if isinstance(other, Mask) else NotImplemented  # pyright: ignore[reportUnnecessaryIsInstance]

    def __invert__(self) -> Mask:
        """Return what this does not see."""
        return _Not(self)

    def __bool__(self) -> bool:
        """Refuse `and`, `or` and `not`, which would silently drop a mask."""
        raise TypeError("a mask has no truth value; masks combine with & | ~, not with and, or, not")

    def __repr__(self) -> str:
        """Show the call that makes it; long arrays by shape."""
        return f"{self.NAME}({', '.join(show(getattr(self, f.name)) for f in fields(self))})"

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        """Refuse sizes that do not fit; the rows' positions reach from low to high (none: low > high)."""

    def _take(self, lead: Shape, index: tuple[Any, ...]) -> Mask:
        """Return the mask of one problem of these leading axes."""
        return self

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        """Whether row i at position p sees key j; rows and p are (R, 1), keys (K,); broadcasts to (R, K)."""
        raise NotImplementedError

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        """Return the edges of these rows, rows and p being (R,)."""
        raise NotImplementedError

    def _kin(self, rows: Ints, p: Ints) -> Ints | None:
        """Return a number for each row, one for rows that see many of the same keys; None where neighbours do."""
        return None


@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """A mask bound to T rows and S keys. Made by `Mask.on`; reusable for every call of these sizes."""

    mask: Mask
    T: int
    S: int

    @cached_property
    def lead(self) -> Shape:
        """The mask's leading axes."""
        return self.mask.lead

    def take(self, n: int) -> Pairs:
        """Return the pairs of one problem, by its flat index into the leading axes.

        >>> from refattn.masks import lengths
        >>> lengths([1, 2]).on(4, 4).take(1).count
        8
        """
        lead = self.lead
        if _check.integer("n", n, 0) >= math.prod(lead):
            raise ValueError(f"n is {n}; expected less than {math.prod(lead)}, the problems in leading axes {lead}")
        if not lead:
            return self
        return Pairs(self.mask._take(lead, np.unravel_index(n, lead)), self.T, self.S)  # pyright: ignore[reportPrivateUsage]

    def seen(self, rows: slice | ArrayLike, keys: slice | ArrayLike) -> Bools:
        """Return which of these pairs are seen, (rows, keys); for one problem.

        >>> from refattn.masks import causal
        >>> causal().on(3, 3).seen([2, 0], slice(1, 3))
        array([[ True,  True],
               [False, False]])
        """
        self._one()
        i, j = _indices("rows", rows, self.T), _indices("keys", keys, self.S)

        def find() -> tuple[Bools]:
            p = (i + (self.S - self.T))[:, None]
            return (np.broadcast_to(self.mask._seen(i[:, None], p, j), (len(i), len(j))),)  # pyright: ignore[reportPrivateUsage]

        return self._remembered((i.tobytes(), j.tobytes()), find)[0]

    def runs(self, rows: slice | ArrayLike) -> Runs:
        """Return the intervals of keys that these rows see, in the rows' order; for one problem.

        >>> from refattn.masks import causal, prefix
        >>> runs = (causal() & ~prefix(1)).on(3, 3).runs(slice(1, 3))
        >>> runs.indptr.tolist(), runs.start.tolist(), runs.stop.tolist()
        ([0, 1, 2], [1, 1], [2, 3])
        """
        self._one()
        i = _indices("rows", rows, self.T)
        flat("rows", len(i), self.S)

        def find() -> Runs:
            edges, width = self._edges(i), self.S + 1
            row = edges[::2] // width
            indptr = np.searchsorted(row, np.arange(len(i) + 1)).astype(np.int64)
            return Runs(indptr, edges[::2] - row * width, edges[1::2] - row * width)

        return Runs(*self._remembered((i.tobytes(),), find))

    @cached_property
    def count(self) -> int | Ints:
        """How many pairs are seen: an int, or an array of them with the mask's leading axes.

        >>> from refattn.masks import causal
        >>> causal().on(3, 3).count
        6
        """
        if self.lead:
            return np.array([self.take(n).count for n in range(math.prod(self.lead))], np.int64).reshape(self.lead)
        total, first, some = 0, 0, 64
        while first < self.T:
            edges = self._edges(np.arange(first, min(first + some, self.T)))
            total += int((edges[1::2] - edges[::2]).sum())
            first, some = first + some, max(1, min(4 * some, some * AT_ONCE // max(1, len(edges))))
        return total

    def order(self) -> Ints:
        """Return the rows in an order in which neighbours see many of the same keys; for one problem.

        >>> from refattn.masks import strided
        >>> strided(2).on(32, 32).order()[:4], strided(16).on(32, 32).order()[6:10]
        (array([0, 1, 2, 3]), array([ 6,  7, 16, 17]))
        """
        self._one()
        rows = np.arange(self.T, dtype=np.int64)
        kin = self.mask._kin(rows, rows + (self.S - self.T))  # pyright: ignore[reportPrivateUsage]
        return rows if kin is None else np.argsort(kin, kind="stable")

    def pick(self, rows: ArrayLike) -> Pairs:
        """Return the pairs of some rows, which keep their positions: what a method is asked for these rows alone.

        Raises
        ------
        ValueError, TypeError
            Rows that are not integers from 0 to T − 1.

        Examples
        --------
        >>> from refattn.masks import causal
        >>> print(causal().on(4, 4).pick([1, 3]))
        xx..
        xxxx
        """
        some = _indices("rows", rows, self.T)
        return Pairs(_Picked(self.mask, some, self.T, self.S), len(some), self.S)

    def __repr__(self) -> str:
        """Show the mask and its sizes."""
        return f"Pairs({self.mask}, T={self.T}, S={self.S})"

    def __str__(self) -> str:
        """Draw one small problem: a line for each row, x where a key is seen."""
        if self.lead or self.T * self.S > 4096:
            return repr(self)
        return "\n".join("".join(".x"[int(see)] for see in row) for row in self.seen(slice(None), slice(None)))

    def _edges(self, rows: Ints) -> Ints:
        return self.mask._edges(rows, rows + (self.S - self.T), self.S)  # pyright: ignore[reportPrivateUsage]

    def _remembered(self, asked: tuple[bytes, ...], find: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Return copies of what was found: heads that share a mask ask it the same, one after the other."""
        found = self._memo.get(asked)
        if found is None:
            found = find()
            if sum(x.nbytes for known in (found, *self._memo.values()) for x in known) <= KEPT:
                self._memo[asked] = found
        return tuple(np.array(x) for x in found)

    @cached_property
    def _memo(self) -> dict[tuple[bytes, ...], tuple[Any, ...]]:
        return {}

    def _one(self) -> None:
        if self.lead:
            raise ValueError(f"mask has leading axes {self.lead}; expected one problem: take(n) it first")


@dataclass(frozen=True, eq=False, repr=False)
class _Placed(Mask):
    inner: Mask
    where: Ints

    def __repr__(self) -> str:
        return f"{self.inner}.at({show(self.where)})"

    @property
    def lead(self) -> Shape:
        return np.broadcast_shapes(self.inner.lead, self.where.shape[:-1])

    @property
    def position(self) -> Ints | None:
        return self.where if self.inner.position is None else self.inner.position

    def _of(self, rows: Ints) -> Ints:
        return self.where[rows] if self.where.ndim else self.where + rows

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        x = self.where
        if x.ndim and x.shape[-1] != T:
            raise ValueError(f"mask: position has {x.shape[-1]} rows, but T = {T}")
        low, high = (int(x.min()), int(x.max()) + (0 if x.ndim else T - 1)) if x.size else (0, -1)
        self.inner._fits(T, S, low, high)

    def _take(self, lead: Shape, index: tuple[Any, ...]) -> Mask:
        x = self.where
        own = x if x.ndim < 2 else np.broadcast_to(x, (*lead, x.shape[-1]))[index]
        return _Placed(self.inner._take(lead, index), own)

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return self.inner._seen(rows, self._of(rows), keys)

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        return self.inner._edges(rows, self._of(rows), S)

    def _kin(self, rows: Ints, p: Ints) -> Ints | None:
        return self.inner._kin(rows, self._of(rows))


@dataclass(frozen=True, eq=False, repr=False)
class _Picked(Mask):
    NAME: ClassVar[str] = "pick"
    inner: Mask
    rows: Ints
    T: int
    S: int

    @property
    def lead(self) -> Shape:
        return self.inner.lead

    @property
    def position(self) -> Ints | None:
        x = self.inner.position
        if x is None:
            return self.rows + (self.S - self.T)
        return x[..., self.rows] if x.ndim else x + self.rows

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        if (T, S) != (len(self.rows), self.S):
            raise ValueError(f"mask: {len(self.rows)} rows are picked for S = {self.S}, but T = {T} and S = {S}")
        self.inner._fits(self.T, S, S - self.T, S - 1)

    def _take(self, lead: Shape, index: tuple[Any, ...]) -> Mask:
        return _Picked(self.inner._take(lead, index), self.rows, self.T, self.S)

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        own = self.rows[rows]
        return self.inner._seen(own, own + (self.S - self.T), keys)

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        own = self.rows[rows]
        return self.inner._edges(own, own + (self.S - self.T), S)

    def _kin(self, rows: Ints, p: Ints) -> Ints | None:
        own = self.rows[rows]
        return self.inner._kin(own, own + (self.S - self.T))


@dataclass(frozen=True, eq=False, repr=False)
class _Two(Mask):
    one: Mask
    other: Mask

    def __post_init__(self) -> None:
        join("mask", self.one.lead, self.other.lead)

    def __repr__(self) -> str:
        return f"({self.one} {self.NAME} {self.other})"

    @property
    def lead(self) -> Shape:
        return np.broadcast_shapes(self.one.lead, self.other.lead)

    @property
    def position(self) -> Ints | None:
        one, other = self.one.position, self.other.position
        return one if one is not None and other is not None and np.array_equal(one, other) else None

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        self.one._fits(T, S, low, high)
        self.other._fits(T, S, low, high)

    def _take(self, lead: Shape, index: tuple[Any, ...]) -> Mask:
        return type(self)(self.one._take(lead, index), self.other._take(lead, index))

    def _kin(self, rows: Ints, p: Ints) -> Ints | None:
        kin = self.one._kin(rows, p)
        return self.other._kin(rows, p) if kin is None else kin


@dataclass(frozen=True, eq=False, repr=False)
class _Both(_Two):
    NAME: ClassVar[str] = "&"

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return self.one._seen(rows, p, keys) & self.other._seen(rows, p, keys)

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        return merge(np.bitwise_and, self.one._edges(rows, p, S), self.other._edges(rows, p, S))


@dataclass(frozen=True, eq=False, repr=False)
class _Either(_Two):
    NAME: ClassVar[str] = "|"

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return self.one._seen(rows, p, keys) | self.other._seen(rows, p, keys)

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        return merge(np.bitwise_or, self.one._edges(rows, p, S), self.other._edges(rows, p, S))


@dataclass(frozen=True, eq=False, repr=False)
class _Not(Mask):
    inner: Mask

    def __repr__(self) -> str:
        return f"~{self.inner}"

    @property
    def lead(self) -> Shape:
        return self.inner.lead

    @property
    def position(self) -> Ints | None:
        return self.inner.position

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        self.inner._fits(T, S, low, high)

    def _take(self, lead: Shape, index: tuple[Any, ...]) -> Mask:
        return _Not(self.inner._take(lead, index))

    def _kin(self, rows: Ints, p: Ints) -> Ints | None:
        return self.inner._kin(rows, p)

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return ~self.inner._seen(rows, p, keys)

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        return merge(np.bitwise_xor, self.inner._edges(rows, p, S), spans(np.arange(len(rows)), 0, S, S))


def spans(row: Ints, start: Ints | int, stop: Ints | int, S: int) -> Ints:
    """Return the edges of runs, sorted and disjoint within a row: clipped to the keys; touching runs join."""
    base = row * (S + 1)
    on, off = base + np.maximum(start, 0), base + np.minimum(stop, S)
    edges = np.stack((on, off), axis=-1)[on < off].ravel()
    apart = edges[1:-1:2] != edges[2::2]
    if apart.all():
        return edges
    return edges[np.concatenate(([True], np.repeat(apart, 2), [True]))]


def merge(op: np.ufunc, a: Ints, b: Ints) -> Ints:
    """Return where op of the two sides turns on and off: one sort, then the parity of the edges passed on each side."""
    both = np.concatenate((2 * a, 2 * b + 1))
    both.sort(kind="stable")
    passed_b = np.cumsum(both & 1)
    passed_a = np.arange(1, len(both) + 1) - passed_b
    at, on = both >> 1, op(passed_a & 1, passed_b & 1)
    last = np.append(at[1:] != at[:-1], True)[: len(at)]
    at, on = at[last], on[last]
    return at[np.diff(on, prepend=0) != 0]


def ranges(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Return (row, n) for every row and every first ≤ n < last of its own."""
    each = np.maximum(last - first, 0)
    row = np.repeat(np.arange(len(each)), each)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(each) - each - first, each)


def _indices(name: str, index: slice | ArrayLike, n: int) -> Ints:
    if isinstance(index, slice):
        return np.arange(*index.indices(n), dtype=np.int64)
    x = integers(name, index, 1)
    if x.ndim != 1:
        raise ValueError(f"{name} has shape {x.shape}; expected one axis")
    if x.size and (x.min() < 0 or x.max() >= n):
        raise ValueError(f"{name} reach from {x.min()} to {x.max()}; expected at least 0 and less than {n}")
    return x


def integer(name: str, value: Any, least: int) -> int:
    """Return an integer that cannot overflow."""
    n = _check.integer(name, value, least)
    if n > FAR:
        raise ValueError(f"{name} is {n}; expected at most 2**60")
    return n


def flat(name: str, rows: int, S: int) -> None:
    """Refuse rows whose edges would overflow."""
    if rows * (S + 1) > FLAT:
        raise ValueError(f"{name} makes {rows} rows; expected at most {FLAT // (S + 1)} with S = {S} keys")


def limit(name: str, value: int | None) -> int | None:
    """Return a distance; None is no limit."""
    return None if value is None else integer(name, value, 0)


def integers(name: str, value: ArrayLike, ndim: int, least: int | None = None) -> Ints:
    """Return integers with at least so many axes, as a copy."""
    try:
        x = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is ragged: {error}") from None
    if x.size == 0 and x.dtype == np.float64:
        x = x.astype(np.int64)  # an empty list says nothing about its kind
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {x.dtype}; expected integers")
    if x.ndim < ndim:
        raise ValueError(f"{name} has shape {x.shape}; expected at least {ndim} axes")
    if least is not None and x.size and x.min() < least:
        raise ValueError(f"{name} holds {x.min()}; expected at least {least}")
    if x.dtype == np.uint64 and x.size and x.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {x.max()}; expected less than 2**63")
    return x.astype(np.int64)


def join(name: str, one: Shape, other: Shape) -> None:
    """Refuse leading axes that do not broadcast."""
    try:
        np.broadcast_shapes(one, other)
    except ValueError:
        raise ValueError(f"{name} joins leading axes {one} and {other}, which do not broadcast") from None


def show(value: int | NDArray[Any] | None) -> str:
    """Show a field: long arrays by shape."""
    if not isinstance(value, np.ndarray):
        return repr(value)
    return repr(value.tolist()) if value.ndim < 2 and value.size <= 8 else f"array {value.shape}"
