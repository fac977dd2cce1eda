r"""Which pairs are seen: small lazy objects that combine with ``& | ~``.

A mask says whether the row that stands at position p of the key axis sees key j. Row i stands at p = i + S − T (the
last row at the last key) unless `Mask.at` places it. ``mask.on(T, S)`` binds it to sizes and gives its meaning in two
forms: `Pairs.seen`, the predicate, and `Pairs.runs`, the intervals of keys that each row sees. Runs are what engines
read today; a leaf may later offer a form of its own beside `_runs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Runs(NamedTuple):
    """Row i sees keys start[n] ≤ j < stop[n] for indptr[i] ≤ n < indptr[i + 1]: sorted, disjoint, not touching."""

    indptr: Ints
    start: Ints
    stop: Ints


@dataclass(frozen=True, eq=False)
class Mask:
    """A rule for which pairs are seen. Made by the functions of this module, combined with ``& | ~``.

    Examples
    --------
    >>> from refattn import masks
    >>> (masks.causal() & masks.window(1, 0)).on(3, 3).seen(slice(0, 3), slice(0, 3)).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """

    __array_ufunc__: ClassVar[None] = None

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes, of q's: () for a mask that is the same for all."""
        return ()

    def at(self, position: int | ArrayLike) -> Mask:
        """Place the rows: an integer is row 0's position (0: top-left), an array (..., T) is each row's own.

        It places everything in the expression that is not placed already.
        """
        where = np.asarray(position)
        if where.dtype.kind not in "iu":
            raise TypeError(f"position is {position!r}; expected an integer or an array (..., T) of integers")
        return _Placed(self, where.astype(np.int64))

    def on(self, T: int, S: int) -> Pairs:
        """Bind to T rows and S keys.

        Raises
        ------
        ValueError
            Arrays, tokens or tables that do not fit these sizes.
        """
        T, S = _check.integer("T", T, 0), _check.integer("S", S, 0)
        self._fits(T, S, S - T + np.arange(T))
        return Pairs(self, T, S, self.lead)

    def __and__(self, other: Mask) -> Mask:
        """What both see."""
        return _Both(self, other) if isinstance(other, Mask) else NotImplemented  # pyright: ignore[reportUnnecessaryIsInstance]

    def __or__(self, other: Mask) -> Mask:
        """What either sees."""
        return _Either(self, other) if isinstance(other, Mask) else NotImplemented  # pyright: ignore[reportUnnecessaryIsInstance]

    def __invert__(self) -> Mask:
        """What this does not see."""
        return _Not(self)

    def _fits(self, T: int, S: int, p: Ints) -> None:
        """Refuse sizes that do not fit; p are the rows' positions."""

    def _take(self, lead: tuple[int, ...], index: tuple[Any, ...]) -> Mask:
        """Return the mask of one problem."""
        return self

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        """Whether row i at position p sees key j; rows and p are (R, 1), keys (K,)."""
        raise NotImplementedError

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        """Return the keys seen by these rows, rows and p being (R,)."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Pairs:
    """A mask bound to T rows and S keys. Made by `Mask.on`."""

    mask: Mask
    T: int
    S: int
    lead: tuple[int, ...]

    def take(self, n: int) -> Pairs:
        """Return the pairs of one problem, by its flat index into the leading axes."""
        if not self.lead:
            return self
        return Pairs(self.mask._take(self.lead, np.unravel_index(n, self.lead)), self.T, self.S, ())  # pyright: ignore[reportPrivateUsage]

    def seen(self, rows: slice | ArrayLike, keys: slice | ArrayLike) -> Bools:
        """Return which of these pairs are seen, (rows, keys); for one problem."""
        i, j = _indices(rows, self.T), _indices(keys, self.S)
        seen = self.mask._seen(i[:, None], (i + self.S - self.T)[:, None], j)  # pyright: ignore[reportPrivateUsage]
        return np.ascontiguousarray(np.broadcast_to(seen, (len(i), len(j))))

    def runs(self, rows: slice | ArrayLike) -> Runs:
        """Return the intervals of keys that these rows see; for one problem."""
        i = _indices(rows, self.T)
        return self.mask._runs(i, i + self.S - self.T, self.S)  # pyright: ignore[reportPrivateUsage]

    @property
    def count(self) -> Any:
        """How many pairs are seen: an int, or an array of them with the mask's leading axes."""
        if self.lead:
            return np.array([self.take(n).count for n in range(math.prod(self.lead))], np.int64).reshape(self.lead)
        total = 0
        for first in range(0, self.T, 4096):
            runs = self.runs(slice(first, first + 4096))
            total += int((runs.stop - runs.start).sum())
        return total


def causal() -> Mask:
    """Each row sees the keys up to its own position: j ≤ p.

    >>> causal().on(2, 3).count
    5
    """
    return _Window(None, 0)


def window(left: int | None, right: int | None) -> Mask:
    """Each row sees `left` keys to the left of its position, itself, and `right` to the right; None is no limit.

    >>> window(1, 1).on(3, 3).count
    7
    """
    return _Window(*(None if n is None else _check.integer(s, n, 0) for s, n in (("left", left), ("right", right))))


def dilated(left: int, right: int, step: int) -> Mask:
    """Each row sees keys at p + step·t for −left ≤ t ≤ right.

    >>> dilated(1, 0, 2).on(3, 3).seen([2], slice(0, 3)).astype(int)
    array([[1, 0, 1]])
    """
    left, right = _check.integer("left", left, 0), _check.integer("right", right, 0)
    step = _check.integer("step", step, 1)
    return _Window(left, right) if step == 1 else _Dilated(left, right, step)


def segments(queries: ArrayLike, keys: ArrayLike) -> Mask:
    """Row i sees key j where their ids are equal: queries (..., T), keys (..., S).

    >>> segments([0, 1], [0, 0, 1]).on(2, 3).count
    3
    """
    return _Segments(_integers("queries", queries, 1), _integers("keys", keys, 1))


def lengths(keys: int | ArrayLike, queries: int | ArrayLike | None = None) -> Mask:
    """Padding: the first `keys` keys are seen, by the first `queries` rows (all, if None). Arrays have q's leading axes.

    >>> lengths([[1], [3]]).on(2, 4).count.tolist()
    [[2], [6]]
    """
    few = _integers("keys", keys, 0, least=0)
    return _Below(few, None if queries is None else _integers("queries", queries, 0, least=0))


def prefix(length: int | ArrayLike) -> Mask:
    """Every row sees the first `length` keys; ``prefix(n) | causal()`` is a prefix language model's mask.

    >>> (prefix(2) | causal()).on(3, 3).count
    7
    """
    return _Below(_integers("length", length, 0, least=0), None)


def block_local(size: int) -> Mask:
    """Each row sees the block of `size` keys that its position is in.

    >>> block_local(2).on(3, 3).count
    5
    """
    return _Block(_check.integer("size", size, 1))


def strided(length: int) -> Mask:
    """Each row sees the keys whose distance from its position is a multiple of `length`, in both directions.

    >>> strided(2).on(3, 3).count
    5
    """
    return _Strided(_check.integer("length", length, 1))


def fixed(length: int, columns: int) -> Mask:
    """Each row sees its own block of `length` keys, and the last `columns` keys of every block.

    >>> fixed(2, 1).on(4, 4).count
    12
    """
    length, columns = _check.integer("length", length, 1), _check.integer("columns", columns, 0)
    if columns > length:
        raise ValueError(f"columns is {columns}; expected at most length = {length}")
    return _Block(length) | _Columns(length, columns)


def global_tokens(tokens: Sequence[int] | ArrayLike) -> Mask:
    """Keys at these positions are seen by all rows, and rows at these positions see all keys.

    >>> global_tokens([0]).on(3, 3).count
    5
    """
    return _Tokens(np.unique(_integers("tokens", tokens, 1, least=0)))


def random_blocks(table: ArrayLike, size: int) -> Mask:
    """Rows of block p // size see the key blocks listed for it: table (..., row blocks, r). See `draw_blocks`.

    >>> random_blocks([[1], [0]], 2).on(4, 4).count
    8
    """
    return _Blocks(_integers("table", table, 2, least=0), _check.integer("size", size, 1))


def draw_blocks(rng: np.random.Generator, rows: int, keys: int, per_row: int) -> Ints:
    """Draw a table for `random_blocks`: for each of `rows` row blocks, `per_row` of `keys` key blocks, all different.

    >>> draw_blocks(np.random.default_rng(0), 3, 4, 2).shape
    (3, 2)
    """
    _check.generator("rng", rng)
    rows, keys = _check.integer("rows", rows, 0), _check.integer("keys", keys, 0)
    if _check.integer("per_row", per_row, 0) > keys:
        raise ValueError(f"per_row is {per_row}; expected at most keys = {keys}")
    return np.sort(rng.permuted(np.tile(np.arange(keys), (rows, 1)), axis=1)[:, :per_row], axis=1)


def dense(array: ArrayLike) -> Mask:
    """Return a mask from an array (..., T, S) of bool, True = may look; axes of length 1 broadcast.

    >>> dense([[True, False]]).on(3, 2).count
    3
    """
    x = np.asarray(array)
    if x.dtype != np.bool_:
        raise TypeError(f"mask has dtype {x.dtype}; expected bool, True = may look (additive masks are a bias)")
    return _Dense(x.reshape((1,) * max(0, 2 - x.ndim) + x.shape))


def bind(mask: Mask | Pairs | ArrayLike | None, T: int, S: int) -> Pairs | None:
    """Return the pairs that a mask argument means for T rows and S keys; None sees all.

    Raises
    ------
    ValueError
        A mask bound to other sizes, or an array that does not broadcast to (..., T, S).
    """
    if mask is None:
        return None
    if isinstance(mask, Pairs):
        if (mask.T, mask.S) != (T, S):
            raise ValueError(f"mask is bound to T = {mask.T}, S = {mask.S}; expected T = {T}, S = {S}")
        return mask
    return (mask if isinstance(mask, Mask) else dense(mask)).on(T, S)


def _indices(index: slice | ArrayLike, n: int) -> Ints:
    if isinstance(index, slice):
        return np.arange(n, dtype=np.int64)[index] if index.step else np.arange(*index.indices(n)[:2], dtype=np.int64)
    return np.asarray(index, np.int64).reshape(-1)


def _integers(name: str, value: ArrayLike, ndim: int, least: int | None = None) -> Ints:
    x = np.asarray(value)
    if x.size == 0 and x.dtype.kind == "f":
        x = x.astype(np.int64)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {x.dtype}; expected integers")
    if x.ndim < ndim:
        raise ValueError(f"{name} has shape {x.shape}; expected at least {ndim} axes")
    if least is not None and x.size and x.min() < least:
        raise ValueError(f"{name} holds {x.min()}; expected at least {least}")
    return x.astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Leaf(Mask):
    """A mask whose array fields have the leading axes and then as many axes as `TAILS` says."""

    TAILS: ClassVar[dict[str, int]] = {}

    def _arrays(self) -> dict[str, tuple[NDArray[Any], int]]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in self.TAILS}
        return {s: (x, x.ndim - self.TAILS[s]) for s, x in found.items() if x is not None}

    @property
    def lead(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(x.shape[:n] for x, n in self._arrays().values()))

    def _take(self, lead: tuple[int, ...], index: tuple[Any, ...]) -> Mask:
        one = {s: np.broadcast_to(x, (*lead, *x.shape[n:]))[index] for s, (x, n) in self._arrays().items()}
        return replace(self, **one)


@dataclass(frozen=True, eq=False)
class _Window(Mask):
    left: int | None
    right: int | None

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        seen = np.ones((len(p), len(keys)), bool)
        if self.left is not None:
            seen &= keys >= p - self.left
        if self.right is not None:
            seen &= keys <= p + self.right
        return seen

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        start = np.zeros_like(p) if self.left is None else p - self.left
        stop = np.full_like(p, S) if self.right is None else p + self.right + 1
        return _single(start, stop, S)


@dataclass(frozen=True, eq=False)
class _Dilated(Mask):
    left: int
    right: int
    step: int

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        near = (keys >= p - self.left * self.step) & (keys <= p + self.right * self.step)
        return near & ((keys - p) % self.step == 0)

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        keys = p[:, None] + self.step * np.arange(-self.left, self.right + 1)
        row, n = np.nonzero((keys >= 0) & (keys < S))
        return _pack(row, keys[row, n], keys[row, n] + 1, len(p))


@dataclass(frozen=True, eq=False)
class _Segments(_Leaf):
    TAILS: ClassVar[dict[str, int]] = {"queries": 1, "keys": 1}
    queries: Ints
    keys: Ints

    def _fits(self, T: int, S: int, p: Ints) -> None:
        for name, x, n, axis in (("queries", self.queries, T, "T"), ("keys", self.keys, S, "S")):
            if x.shape[-1] != n:
                raise ValueError(f"mask: segments has {x.shape[-1]} ids for {name}; expected {axis} = {n}")

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return self.queries[rows] == self.keys[keys]

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        if S == 0:
            return _single(np.zeros_like(p), np.zeros_like(p), S)
        start = np.flatnonzero(np.r_[True, self.keys[1:] != self.keys[:-1]])
        stop, order = np.r_[start[1:], S], np.argsort(self.keys[start], kind="stable")
        ids, mine = self.keys[start][order], self.queries[rows]
        first, last = np.searchsorted(ids, mine, "left"), np.searchsorted(ids, mine, "right")
        row, n = _ranges(first, last)
        return _pack(row, start[order[n]], stop[order[n]], len(p))


@dataclass(frozen=True, eq=False)
class _Below(_Leaf):
    TAILS: ClassVar[dict[str, int]] = {"keys": 0, "queries": 0}
    keys: Ints
    queries: Ints | None

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        seen = np.broadcast_to(keys < self.keys, (len(p), len(keys)))
        return seen if self.queries is None else seen & (rows < self.queries)

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        live = np.ones(len(p), bool) if self.queries is None else rows < self.queries
        return _single(np.zeros_like(p), np.where(live, self.keys, 0), S)


@dataclass(frozen=True, eq=False)
class _Block(Mask):
    size: int

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return p // self.size == keys // self.size

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        start = p // self.size * self.size
        return _single(start, start + self.size, S)


@dataclass(frozen=True, eq=False)
class _Strided(Mask):
    length: int

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return (p - keys) % self.length == 0

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        if self.length == 1:
            return _single(np.zeros_like(p), np.full_like(p, S), S)
        first = p % self.length
        row, n = _ranges(np.zeros_like(p), np.maximum(0, -((first - S) // self.length)))
        keys = first[row] + self.length * n
        return _pack(row, keys, keys + 1, len(p))


@dataclass(frozen=True, eq=False)
class _Columns(Mask):
    length: int
    columns: int

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return np.broadcast_to(keys % self.length >= self.length - self.columns, (len(p), len(keys)))

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        if self.columns == self.length:
            return _single(np.zeros_like(p), np.full_like(p, S), S)
        stop = np.arange(self.length, S + self.length, self.length)
        return _same(stop - self.columns, stop, len(p), S)


@dataclass(frozen=True, eq=False)
class _Tokens(Mask):
    tokens: Ints

    def _fits(self, T: int, S: int, p: Ints) -> None:
        if len(self.tokens) and self.tokens[-1] >= S:
            raise ValueError(f"mask: tokens holds {self.tokens[-1]}; expected positions below S = {S}")

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return np.isin(keys, self.tokens) | np.isin(p, self.tokens)

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        fresh = np.flatnonzero(np.diff(self.tokens, prepend=-2) > 1)
        start = self.tokens[fresh]
        stop = self.tokens[np.r_[fresh[1:] - 1, len(self.tokens) - 1]] + 1 if len(start) else start
        wide = np.isin(p, self.tokens)
        some = _same(start, stop, len(p), S)
        if not wide.any():
            return some
        row = np.repeat(np.arange(len(p)), np.diff(some.indptr))
        keep = ~wide[row]
        every = np.flatnonzero(wide)
        row = np.r_[row[keep], every]
        order = np.argsort(row, kind="stable")
        start = np.r_[some.start[keep], np.zeros_like(every)][order]
        return _pack(row[order], start, np.r_[some.stop[keep], np.full_like(every, S)][order], len(p))


@dataclass(frozen=True, eq=False)
class _Blocks(_Leaf):
    TAILS: ClassVar[dict[str, int]] = {"table": 2}
    table: Ints
    size: int

    def _fits(self, T: int, S: int, p: Ints) -> None:
        if T and (p.min() < 0 or p.max() // self.size >= self.table.shape[-2]):
            raise ValueError(
                f"mask: table has {self.table.shape[-2]} row blocks of {self.size}; expected positions "
                f"{p.min()}…{p.max()} inside"
            )

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        listed = self.table[p[:, 0] // self.size]
        seen = np.zeros((len(p), len(keys)), bool)
        for blocks in listed.T:
            seen |= blocks[:, None] == keys // self.size
        return seen

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        start = np.minimum(np.sort(self.table[p // self.size], axis=1) * self.size, S)
        base = (np.arange(len(p)) * (S + 1))[:, None]
        stop = np.minimum(start + self.size, S)
        some = start < stop
        return _combine([(base + start)[some]], [(base + stop)[some]], 1, len(p), S)


@dataclass(frozen=True, eq=False)
class _Dense(_Leaf):
    TAILS: ClassVar[dict[str, int]] = {"array": 2}
    array: Bools

    def _fits(self, T: int, S: int, p: Ints) -> None:
        if any(got not in (1, n) for got, n in zip(self.array.shape[-2:], (T, S), strict=True)):
            raise ValueError(f"mask has shape {self.array.shape}; expected axes that broadcast to (..., {T}, {S})")

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        T, S = self.array.shape
        return self.array[rows if T != 1 else rows * 0, keys if S != 1 else keys * 0]

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        seen = np.broadcast_to(self._seen(rows[:, None], p[:, None], np.arange(S)), (len(rows), S))
        edges = np.diff(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        row, start = np.nonzero(edges == 1)
        return _pack(row, start, np.nonzero(edges == -1)[1], len(rows))


@dataclass(frozen=True, eq=False)
class _Placed(Mask):
    inner: Mask
    position: Ints

    @property
    def lead(self) -> tuple[int, ...]:
        return np.broadcast_shapes(self.inner.lead, self.position.shape[:-1])

    def _p(self, rows: Ints) -> Ints:
        return self.position + rows if self.position.ndim == 0 else self.position[rows]

    def _fits(self, T: int, S: int, p: Ints) -> None:
        if self.position.ndim and self.position.shape[-1] != T:
            raise ValueError(f"mask: position has {self.position.shape[-1]} rows; expected T = {T}")
        self.inner._fits(T, S, (self.position + np.arange(T) if self.position.ndim == 0 else self.position).ravel())

    def _take(self, lead: tuple[int, ...], index: tuple[Any, ...]) -> Mask:
        p = self.position
        own = p if p.ndim < 2 else np.broadcast_to(p, (*lead, p.shape[-1]))[index]
        return _Placed(self.inner._take(lead, index), own)

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return self.inner._seen(rows, self._p(rows), keys)

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        return self.inner._runs(rows, self._p(rows), S)


@dataclass(frozen=True, eq=False)
class _Pair(Mask):
    one: Mask
    other: Mask

    @property
    def lead(self) -> tuple[int, ...]:
        try:
            return np.broadcast_shapes(self.one.lead, self.other.lead)
        except ValueError:
            raise ValueError(
                f"mask joins leading axes {self.one.lead} and {self.other.lead}, which do not broadcast"
            ) from None

    def _fits(self, T: int, S: int, p: Ints) -> None:
        self.one._fits(T, S, p)
        self.other._fits(T, S, p)

    def _take(self, lead: tuple[int, ...], index: tuple[Any, ...]) -> Mask:
        return type(self)(self.one._take(lead, index), self.other._take(lead, index))


@dataclass(frozen=True, eq=False)
class _Both(_Pair):
    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return self.one._seen(rows, p, keys) & self.other._seen(rows, p, keys)

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        a, b = self.one._runs(rows, p, S), self.other._runs(rows, p, S)
        if all(len(x.start) == len(rows) and (np.diff(x.indptr) == 1).all() for x in (a, b)):
            return _single(np.maximum(a.start, b.start), np.minimum(a.stop, b.stop), S)
        return _join(a, b, 2, len(rows), S)


@dataclass(frozen=True, eq=False)
class _Either(_Pair):
    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return self.one._seen(rows, p, keys) | self.other._seen(rows, p, keys)

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        return _join(self.one._runs(rows, p, S), self.other._runs(rows, p, S), 1, len(rows), S)


@dataclass(frozen=True, eq=False)
class _Not(Mask):
    inner: Mask

    @property
    def lead(self) -> tuple[int, ...]:
        return self.inner.lead

    def _fits(self, T: int, S: int, p: Ints) -> None:
        self.inner._fits(T, S, p)

    def _take(self, lead: tuple[int, ...], index: tuple[Any, ...]) -> Mask:
        return _Not(self.inner._take(lead, index))

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return ~np.broadcast_to(self.inner._seen(rows, p, keys), (len(p), len(keys)))

    def _runs(self, rows: Ints, p: Ints, S: int) -> Runs:
        start, stop = _flat(self.inner._runs(rows, p, S), S)
        base = np.arange(len(rows)) * (S + 1)
        start, stop = np.sort(np.r_[base, stop]), np.sort(np.r_[start, base + S])
        some = start < stop
        return _unflat(start[some], stop[some], len(rows), S)


def _single(start: Ints, stop: Ints, S: int) -> Runs:
    """One run a row, clipped to the keys; an empty one is none."""
    start, stop = np.clip(start, 0, S), np.clip(stop, 0, S)
    some = start < stop
    return Runs(np.r_[0, np.cumsum(some)], start[some], stop[some])


def _same(start: Ints, stop: Ints, rows: int, S: int) -> Runs:
    """The same runs for every row, clipped to the keys."""
    start, stop = np.clip(start, 0, S), np.clip(stop, 0, S)
    start, stop = start[start < stop], stop[start < stop]
    return Runs(np.arange(rows + 1) * len(start), np.tile(start, rows), np.tile(stop, rows))


def _pack(row: NDArray[np.intp], start: Ints, stop: Ints, rows: int) -> Runs:
    """Runs sorted by row and start."""
    return Runs(np.r_[0, np.cumsum(np.bincount(row, minlength=rows))].astype(np.int64), start, stop)


def _ranges(first: Ints, last: Ints) -> tuple[NDArray[np.intp], Ints]:
    """Return (row, n) for every row and every first ≤ n < last of its own."""
    each = last - first
    row = np.repeat(np.arange(len(each)), each)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(each) - each - first, each)


def _flat(runs: Runs, S: int) -> tuple[Ints, Ints]:
    """Put runs on one axis, row·(S + 1) + key, where those of neighbouring rows cannot touch."""
    base = np.repeat(np.arange(len(runs.indptr) - 1) * (S + 1), np.diff(runs.indptr))
    return base + runs.start, base + runs.stop


def _unflat(start: Ints, stop: Ints, rows: int, S: int) -> Runs:
    row = start // (S + 1)
    return _pack(row, start - row * (S + 1), stop - row * (S + 1), rows)


def _join(a: Runs, b: Runs, least: int, rows: int, S: int) -> Runs:
    (one, end), (other, fin) = _flat(a, S), _flat(b, S)
    return _combine([one, other], [end, fin], least, rows, S)


def _combine(starts: list[Ints], stops: list[Ints], least: int, rows: int, S: int) -> Runs:
    """Return where at least so many of these flat runs lie."""
    at = np.concatenate([*starts, *stops])
    change = np.concatenate([np.ones(sum(map(len, starts)), int), -np.ones(sum(map(len, stops)), int)])
    order = np.argsort(at, kind="stable")
    at, depth = at[order], np.cumsum(change[order])
    last = np.r_[at[1:] != at[:-1], [True] * min(1, len(at))].astype(bool)
    at, on = at[last], depth[last] >= least
    turn = np.diff(on, prepend=False)
    return _unflat(at[turn & on], at[turn & ~on], rows, S)
