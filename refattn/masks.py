r"""Which pairs are seen: small lazy objects that combine with ``& | ~``.

A mask says whether row i, which stands at position p of the key axis, sees key j. A row stands at p = i + S − T (the
last row at the last key) unless `Mask.at` places it. ``mask.on(T, S)`` binds it to sizes and gives its meaning in two
forms that share no code: `Pairs.seen`, the predicate, and `Pairs.runs`, the intervals of keys that each row sees.
Neither builds a T × S array. Runs are what engines read today; a leaf may later offer them a form of its own, such as
64-bit words over tiles of 64 rows, beside its runs.

Here are the constructors and, below them, the leaves that they make; what all masks share is in `refattn._pairs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check
from refattn._pairs import (
    AT_ONCE,
    Bools,
    Ints,
    Mask,
    Pairs,
    Runs,
    Shape,
    integer,
    integers,
    join,
    limit,
    ranges,
    show,
    spans,
)

__all__ = [
    "Mask",
    "Pairs",
    "Runs",
    "bind",
    "block_local",
    "causal",
    "dense",
    "dilated",
    "draw_blocks",
    "fixed",
    "global_tokens",
    "lengths",
    "prefix",
    "random_blocks",
    "segmented",
    "segments",
    "strided",
    "window",
]


MaskLike: TypeAlias = Mask | Pairs | ArrayLike | None
"""What a mask argument may be: a mask, one that is bound, an array of bool (..., T, S), or None, which sees all."""


def causal() -> Mask:
    """Each row sees the keys up to its own position: j ≤ p.

    >>> print(causal().on(2, 3))
    xx.
    xxx
    """
    return _Window(None, 0)


def window(left: int | None, right: int | None) -> Mask:
    """Each row sees `left` keys to the left of its position, its own, and `right` to the right.

    That is p − left ≤ j ≤ p + right; None is no limit on that side.

    >>> print(window(1, 0).on(3, 3))
    x..
    xx.
    .xx
    """
    return _Window(limit("left", left), limit("right", right))


def dilated(left: int | None, right: int | None, step: int) -> Mask:
    """Each row sees keys `step` apart: j = p + step·t for −left ≤ t ≤ right. None is no limit on that side.

    >>> print(dilated(1, 1, 2).on(4, 4))
    x.x.
    .x.x
    x.x.
    .x.x
    """
    a, b, step = limit("left", left), limit("right", right), integer("step", step, 1)
    return _Window(a, b) if step == 1 else _Dilated(a, b, step)


def segments(queries: ArrayLike, keys: ArrayLike) -> Mask:
    """Row i sees key j where their ids are equal: integers, queries (..., T) and keys (..., S).

    >>> print(segments([0, 1], [0, 0, 1]).on(2, 3))
    xx.
    ..x
    """
    a, b = integers("queries", queries, 1), integers("keys", keys, 1)
    join("segments", a.shape[:-1], b.shape[:-1])
    return _Segments(a, b)


def lengths(keys: int | ArrayLike, queries: int | ArrayLike | None = None) -> Mask:
    """Only the first `keys` keys are seen, by the first `queries` rows (all, if None): padding.

    The shape of an array is q's leading axes: with heads, lengths that differ by batch are (B, 1).

    >>> lengths([[1], [3]]).on(2, 4).count.tolist()
    [[2], [6]]
    """
    a = integers("keys", keys, 0, least=0)
    if queries is None:
        return _Below(a, None)
    b = integers("queries", queries, 0, least=0)
    join("lengths", a.shape, b.shape)
    return _Below(a, b)


def prefix(length: int | ArrayLike) -> Mask:
    """Every row sees the first `length` keys; ``prefix(n) | causal()`` is a prefix language model's mask.

    >>> print((prefix(2) | causal()).on(3, 3))
    xx.
    xx.
    xxx
    """
    return _Below(integers("length", length, 0, least=0), None)


def block_local(size: int) -> Mask:
    """Each row sees the block of `size` keys that its position is in: ⌊p / size⌋ = ⌊j / size⌋.

    >>> print(block_local(2).on(3, 3))
    xx.
    xx.
    ..x
    """
    return _Block(integer("size", size, 1))


def segmented(length: int, memory: int) -> Mask:
    """Each row sees its own segment of `length` keys up to itself, and the `memory` keys before the segment.

    That is ⌊p / length⌋·length − memory ≤ j ≤ p. Of length 1 it is a window: `memory` keys and the row's own.

    >>> print(segmented(2, 1).on(4, 4))
    x...
    xx..
    .xx.
    .xxx
    """
    return _Segmented(integer("length", length, 1), integer("memory", memory, 0))


def strided(length: int) -> Mask:
    """Each row sees the keys at a multiple of `length` from its position, (p − j) mod length = 0, in both directions.

    >>> print(strided(2).on(3, 3))
    x.x
    .x.
    x.x
    """
    return dilated(None, None, integer("length", length, 1))


def fixed(length: int, columns: int) -> Mask:
    """Each row sees its own block of `length` keys, and the last `columns` keys of every block.

    Blocks are counted on positions of the key axis. Child et al. 2019, arXiv:1904.10509, §4.2, without causality.

    >>> print(fixed(2, 1).on(4, 4))
    xx.x
    xx.x
    .xxx
    .xxx
    """
    length, columns = integer("length", length, 1), integer("columns", columns, 0)
    if columns > length:
        raise ValueError(f"columns is {columns}; expected at most length = {length}")
    return _Block(length) | _Columns(length, columns)


def global_tokens(tokens: Sequence[int] | ArrayLike) -> Mask:
    """Keys at these positions are seen by all rows, and rows at these positions see all keys: tokens (..., n).

    >>> print(global_tokens([1]).on(3, 3))
    .x.
    xxx
    .x.
    """
    return _Tokens(integers("tokens", tokens, 1, least=0))


def random_blocks(table: ArrayLike, size: int) -> Mask:
    """Rows of block ⌊p / size⌋ see the key blocks that `table`, (..., row blocks, r), lists for it. See `draw_blocks`.

    >>> print(random_blocks([[1], [0]], 2).on(4, 4))
    ..xx
    ..xx
    xx..
    xx..
    """
    return _Blocks(integers("table", table, 2, least=0), integer("size", size, 1))


def draw_blocks(rng: np.random.Generator, rows: int, keys: int, per_row: int) -> Ints:
    """Draw a table for `random_blocks`: for each of `rows` row blocks, `per_row` of `keys` key blocks, all different.

    >>> draw_blocks(np.random.default_rng(0), 3, 4, 2).shape
    (3, 2)
    """
    _check.generator("rng", rng)
    rows, keys, per_row = integer("rows", rows, 0), integer("keys", keys, 0), integer("per_row", per_row, 0)
    if per_row > keys:
        raise ValueError(f"per_row is {per_row}; expected at most keys = {keys}")
    return np.sort(rng.permuted(np.tile(np.arange(keys), (rows, 1)), axis=1)[:, :per_row], axis=1)


def dense(array: ArrayLike) -> Mask:
    """Return a mask from an array (..., T, S) of bool, True = may look; axes of length 1 broadcast. It is not copied.

    >>> print(dense([[True, False]]).on(2, 2))
    x.
    x.
    """
    try:
        x = np.asarray(array)
    except ValueError as error:
        raise ValueError(f"mask is ragged: {error}") from None
    if x.dtype != np.bool_:
        raise TypeError(f"mask has dtype {x.dtype}; expected bool, True = may look (an additive mask is a bias)")
    if x.ndim < 2:
        raise ValueError(f"mask has shape {x.shape}; expected at least 2 axes: (..., T, S)")
    return _Dense(x)


def bind(mask: MaskLike, T: int, S: int) -> Pairs | None:
    """Return the pairs that a mask argument means for T rows and S keys; None sees all.

    Raises
    ------
    ValueError
        A mask bound to other sizes, or an array that does not broadcast to (..., T, S).
    TypeError
        An array of something else than bool.
    """
    if mask is None:
        return None
    if isinstance(mask, Pairs):
        if (mask.T, mask.S) != (T, S):
            raise ValueError(f"mask is bound to T = {mask.T}, S = {mask.S}; expected T = {T}, S = {S}")
        return mask
    return (mask if isinstance(mask, Mask) else dense(mask)).on(T, S)


def prefix_ends(pairs: Pairs) -> Ints | None:
    """Return how many of the first keys each row sees, (..., T), where that says it all and never falls; else None.

    >>> print(prefix_ends(causal().on(2, 3)))
    [2 3]
    """
    ends = np.zeros((math.prod(pairs.lead), pairs.T), np.int64)
    for n, own in enumerate(ends):
        one = pairs.take(n)
        for first in range(0, pairs.T, 4096):
            runs = one.runs(slice(first, first + 4096))
            each = np.diff(runs.indptr)
            if (each > 1).any() or runs.start.any():
                return None
            own[first : first + 4096][each == 1] = runs.stop
    falls = (np.diff(ends, axis=1) < 0).any()
    return None if falls else ends.reshape(*pairs.lead, pairs.T)


def meet(mask: MaskLike, pattern: Mask) -> Mask:
    """Return what both a mask argument and a method's own pattern see; None sees all.

    Where the mask places the rows, the pattern is placed alike, so that some rows of a problem can be answered alone.

    >>> meet(None, causal())
    causal()
    >>> print(meet(window(None, None).on(4, 4).pick([1, 3]), window(1, 0)).on(2, 4))
    xx..
    ..xx
    """
    if mask is None:
        return pattern
    own = mask.mask if isinstance(mask, Pairs) else mask if isinstance(mask, Mask) else dense(mask)
    return own & (pattern if own.position is None else pattern.at(own.position))


def positions(mask: MaskLike, T: int, S: int) -> Ints:
    """Return where on the key axis rows stand under a mask argument, (..., T): the last at the last key, unless placed.

    >>> positions(None, 2, 4), positions(causal().at(0), 2, 4)
    (array([2, 3]), array([0, 1]))
    """
    own = mask.mask if isinstance(mask, Pairs) else mask
    where = own.position if isinstance(own, Mask) else None
    if where is None:
        return np.arange(T) + (S - T)
    return where if where.ndim else where + np.arange(T)


@dataclass(frozen=True, eq=False, repr=False)
class _Leaf(Mask):
    """A mask whose array fields have leading axes and then as many axes as `TAILS` says."""

    TAILS: ClassVar[dict[str, int]] = {}

    def _arrays(self) -> dict[str, tuple[NDArray[Any], int]]:
        found = {name: getattr(self, name) for name in self.TAILS}
        return {name: (x, x.ndim - self.TAILS[name]) for name, x in found.items() if x is not None}

    @property
    def lead(self) -> Shape:
        return np.broadcast_shapes(*(x.shape[:n] for x, n in self._arrays().values()))

    def _take(self, lead: Shape, index: tuple[Any, ...]) -> Mask:
        if not self.lead:
            return self
        one = {s: np.asarray(np.broadcast_to(x, (*lead, *x.shape[n:]))[index]) for s, (x, n) in self._arrays().items()}
        return replace(self, **one)


@dataclass(frozen=True, eq=False, repr=False)
class _Window(Mask):
    NAME: ClassVar[str] = "window"
    left: int | None
    right: int | None

    def __repr__(self) -> str:
        return "causal()" if (self.left, self.right) == (None, 0) else super().__repr__()

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        seen = np.ones((1, 1), bool)
        if self.left is not None:
            seen = keys >= p - self.left
        if self.right is not None:
            seen = seen & (keys <= p + self.right)
        return seen

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        start = 0 if self.left is None else p - self.left
        stop = S if self.right is None else p + (self.right + 1)
        return spans(np.arange(len(p)), start, stop, S)


@dataclass(frozen=True, eq=False, repr=False)
class _Dilated(Mask):
    NAME: ClassVar[str] = "dilated"
    left: int | None
    right: int | None
    step: int

    def __repr__(self) -> str:
        return f"strided({self.step})" if (self.left, self.right) == (None, None) else super().__repr__()

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        t, rest = np.divmod(keys - p, self.step)
        seen = rest == 0
        if self.left is not None:
            seen &= t >= -self.left
        if self.right is not None:
            seen &= t <= self.right
        return seen

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        first, last = -(p // self.step), (S - 1 - p) // self.step
        if self.left is not None:
            first = np.maximum(first, -self.left)
        if self.right is not None:
            last = np.minimum(last, self.right)
        row, t = ranges(first, last + 1)
        keys = p[row] + self.step * t
        return spans(row, keys, keys + 1, S)

    def _kin(self, rows: Ints, p: Ints) -> Ints | None:
        # Rows a step apart share keys, and so do neighbours where a window joins: squares of 8 steps by 8 residues.
        return p // (8 * self.step) * self.step + p % self.step // 8


@dataclass(frozen=True, eq=False, repr=False)
class _Segments(_Leaf):
    NAME: ClassVar[str] = "segments"
    TAILS: ClassVar[dict[str, int]] = {"queries": 1, "keys": 1}
    queries: Ints
    keys: Ints

    @cached_property
    def _by_id(self) -> tuple[Ints, Ints, Ints]:
        """The keys' ids, starts and stops of equal neighbours, by id and then by start."""
        start = np.flatnonzero(np.diff(self.keys, prepend=~self.keys[:1]))
        order = np.argsort(self.keys[start], kind="stable")
        return self.keys[start][order], start[order], np.append(start[1:], len(self.keys))[order]

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        for ids, x, n, axis in (("query", self.queries, T, "T"), ("key", self.keys, S, "S")):
            if x.shape[-1] != n:
                raise ValueError(f"mask: segments has {x.shape[-1]} {ids} ids, but {axis} = {n}")

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return self.queries[rows] == self.keys[keys]

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        (ids, start, stop), own = self._by_id, self.queries[rows]
        row, n = ranges(np.searchsorted(ids, own, "left"), np.searchsorted(ids, own, "right"))
        return spans(row, start[n], stop[n], S)


@dataclass(frozen=True, eq=False, repr=False)
class _Below(_Leaf):
    NAME: ClassVar[str] = "lengths"
    TAILS: ClassVar[dict[str, int]] = {"keys": 0, "queries": 0}
    keys: Ints
    queries: Ints | None

    def __repr__(self) -> str:
        return f"lengths({show(self.keys)})" if self.queries is None else super().__repr__()

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        seen = keys < self.keys
        return seen if self.queries is None else seen & (rows < self.queries)

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        stop = self.keys if self.queries is None else np.where(rows < self.queries, self.keys, 0)
        return spans(np.arange(len(rows)), 0, stop, S)


@dataclass(frozen=True, eq=False, repr=False)
class _Block(Mask):
    NAME: ClassVar[str] = "block_local"
    size: int

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return p // self.size == keys // self.size

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        start = p // self.size * self.size
        return spans(np.arange(len(p)), start, start + self.size, S)


@dataclass(frozen=True, eq=False, repr=False)
class _Segmented(Mask):
    NAME: ClassVar[str] = "segmented"
    length: int
    memory: int

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return (keys >= p // self.length * self.length - self.memory) & (keys <= p)

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        return spans(np.arange(len(p)), p // self.length * self.length - self.memory, p + 1, S)


@dataclass(frozen=True, eq=False, repr=False)
class _Columns(Mask):
    NAME: ClassVar[str] = "columns"
    length: int
    columns: int

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return keys % self.length >= self.length - self.columns

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        stop = self.length * np.arange(1, S // self.length + 2)
        return spans(np.arange(len(p))[:, None], stop - self.columns, stop, S)


@dataclass(frozen=True, eq=False, repr=False)
class _Tokens(_Leaf):
    NAME: ClassVar[str] = "global_tokens"
    TAILS: ClassVar[dict[str, int]] = {"tokens": 1}
    tokens: Ints

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        if self.tokens.size and self.tokens.max() >= S:
            raise ValueError(f"mask: global_tokens has token {self.tokens.max()}, but S = {S}")

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        return np.isin(keys, self.tokens) | np.isin(p, self.tokens)

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        # One token is a run, and touching ones join; a wide row has one run instead, in the first place.
        tokens = np.unique(self.tokens)
        fresh = np.flatnonzero(np.diff(tokens, prepend=-2) > 1)
        wide, start = np.isin(p, tokens)[:, None], tokens[fresh]
        stop = np.append(tokens[fresh[1:] - 1], tokens[-1:]) + 1
        stop = np.concatenate((np.where(wide, S, 0), np.where(wide, 0, stop)), axis=1)
        return spans(np.arange(len(p))[:, None], np.append(0, start), stop, S)


@dataclass(frozen=True, eq=False, repr=False)
class _Blocks(_Leaf):
    NAME: ClassVar[str] = "random_blocks"
    TAILS: ClassVar[dict[str, int]] = {"table": 2}
    table: Ints
    size: int

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        blocks, size = self.table.shape[-2], self.size
        if low <= high and (low < 0 or high // size >= blocks):
            raise ValueError(
                f"mask: random_blocks has {blocks} blocks of {size} rows, but the rows' positions reach from {low} to "
                f"{high}"
            )
        if self.table.size and self.table.max() >= -(-S // size):
            raise ValueError(
                f"mask: random_blocks lists key block {self.table.max()}, but S = {S} has {-(-S // size)} of {size}"
            )

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        seen = np.zeros((len(p), len(keys)), bool)
        for block in self.table[p[:, 0] // self.size].T:
            seen |= block[:, None] == keys // self.size
        return seen

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        start = np.sort(self.table[p // self.size], axis=1) * self.size
        again = np.diff(start, axis=1, prepend=-1) == 0
        return spans(np.arange(len(p))[:, None], start, np.where(again, 0, start + self.size), S)


@dataclass(frozen=True, eq=False, repr=False)
class _Dense(_Leaf):
    NAME: ClassVar[str] = "dense"
    TAILS: ClassVar[dict[str, int]] = {"array": 2}
    array: Bools

    def _fits(self, T: int, S: int, low: int, high: int) -> None:
        if any(got not in (1, n) for got, n in zip(self.array.shape[-2:], (T, S), strict=True)):
            raise ValueError(f"mask has shape {self.array.shape}; expected axes that broadcast to (..., {T}, {S})")

    def _seen(self, rows: Ints, p: Ints, keys: Ints) -> Bools:
        T, S = self.array.shape
        return self.array[rows if T != 1 else rows * 0, keys if S != 1 else keys * 0]

    def _edges(self, rows: Ints, p: Ints, S: int) -> Ints:
        found, some = [np.zeros(0, np.int64)], max(1, AT_ONCE // (S + 1))
        for first in range(0, len(rows), some):
            few = rows[first : first + some]
            seen = np.zeros((len(few), S + 1), bool)
            seen[:, :S] = self.array[few if self.array.shape[0] != 1 else few * 0]
            found.append(np.flatnonzero(np.diff(seen.ravel(), prepend=False)) + first * (S + 1))
        return np.concatenate(found)
