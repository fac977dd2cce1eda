"""Mutants of what is seen: causal, windows, masks, lengths, packing, tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refattn.conventions import Call
from refattn.testing.zoo._mutant import mutant
from refattn.testing.zoo.kernel import Array, F, Kernel, Loaded, Tile


@mutant("causal alignment")
class CausalFromTopLeft(Kernel):
    """Row 0 stands at key 0."""

    def shift(self, x: Loaded) -> Array:  # noqa: D102
        return 0 * x.lengths

    def packed_shift(self, cq: Array, ck: Array) -> Array:  # noqa: D102
        return ck[:-1] - cq[:-1]


@mutant("causal alignment")
class CausalForgetsLengths(Kernel):
    """The last row stands at the end of the padded keys."""

    def shift(self, x: Loaded) -> Array:  # noqa: D102
        return 0 * x.lengths + np.shape(x.call.k)[-2] - x.T


@mutant("causal diagonal")
class DiagonalHidden(Kernel):
    """A row does not see its own key."""

    def causal(self, i: Array, j: Array) -> Array:  # noqa: D102
        return j < i


@mutant("causal diagonal")
class OneKeyAhead(Kernel):
    """A row sees one key after its own."""

    def causal(self, i: Array, j: Array) -> Array:  # noqa: D102
        return j <= i + 1

    def skips(self, x: Loaded, rows: Tile, keys: Tile) -> bool:  # noqa: D102
        return False


@mutant("causal ignored")
class CausalIgnored(Kernel):
    """Causal has no effect."""

    def causal(self, i: Array, j: Array) -> Array:  # noqa: D102
        return j <= i + np.inf

    def skips(self, x: Loaded, rows: Tile, keys: Tile) -> bool:  # noqa: D102
        return False


@mutant("causal direction")
class CausalReversed(Kernel):
    """A row sees what comes after it."""

    def causal(self, i: Array, j: Array) -> Array:  # noqa: D102
        return j >= i

    def skips(self, x: Loaded, rows: Tile, keys: Tile) -> bool:  # noqa: D102
        return False


@mutant("row positions")
class RowsDividedByGroup(Kernel):
    """The row's index is divided by the size of the head group, as if rows were packed."""

    def position(self, x: Loaded, rows: Tile) -> Array:  # noqa: D102
        own = np.arange(x.T)[rows][None, None, :, None]
        return super().position(x, rows) - own + own // x.group


@mutant("tile edges")
class CausalTileSkipped(Kernel):
    """A tile on the diagonal is skipped where its end is after the first row."""

    def skips(self, x: Loaded, rows: Tile, keys: Tile) -> bool:  # noqa: D102
        return x.call.causal and keys.stop > self.position(x, rows).min() + self.keys


@mutant("window size")
class WindowOneMore(Kernel):
    """The window has one key more on its left."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        return super().window(x, rows, j, None if left is None else left + 1, right)


@mutant("window size")
class WindowOneLess(Kernel):
    """The window's number counts the row's own key."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        return super().window(x, rows, j, None if left is None else left - 1, right)


@mutant("window size")
class WindowOneMoreRight(Kernel):
    """The window has one key more on its right."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        return super().window(x, rows, j, left, None if right is None else right + 1)


@mutant("window sentinel")
class NoLimitIsMinusOne(Kernel):
    """No limit on a side is the number −1."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        return super().window(x, rows, j, -1 if left is None else left, -1 if right is None else right)


@mutant("window alignment")
class WindowFromTopLeft(Kernel):
    """The window is counted with row 0 at key 0."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        moved = super().position(x, rows) - np.arange(x.T)[rows][None, None, :, None]
        return super().window(x, rows, j + moved, left, right)


@mutant("window ignored")
class WindowIgnored(Kernel):
    """The window has no effect."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        return super().window(x, rows, j, None, None)


@mutant("window ignored")
class WindowLeftIgnored(Kernel):
    """The window has no effect on its left."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        return super().window(x, rows, j, None, right)


@mutant("window shape")
class WindowInBlocks(Kernel):
    """The window is cut into blocks of its length, and a row sees its own block."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        if left is None:
            return super().window(x, rows, j, left, right)
        return (j // (left + 1) == self.position(x, rows) // (left + 1)) & super().window(x, rows, j, None, right)


@mutant("mask polarity")
class MaskInverted(Kernel):
    """True in the mask means the opposite."""

    def masked(self, mask: Array) -> Array:  # noqa: D102
        return ~mask


@mutant("mask ignored")
class MaskIgnored(Kernel):
    """The mask has no effect."""

    def masked(self, mask: Array) -> Array:  # noqa: D102
        return mask | True


@mutant("mask broadcast")
class MaskOfTheFirst(Kernel):
    """Every head and batch reads the first one's mask."""

    def masked(self, mask: Array) -> Array:  # noqa: D102
        return mask[:1, :1]


@mutant("mask order")
class MaskedAfterSoftmax(Kernel):
    """The row sum counts what is masked."""

    def hide(self, s: Array, seen: Array) -> Array:  # noqa: D102
        self.seen = seen
        return s

    def cast(self, p: Array) -> Array:  # noqa: D102
        return super().cast(np.where(self.seen, p, 0))


@mutant("padding score")
class HiddenScoreZero(Kernel):
    """What is hidden has the score 0, and so the weight of one."""

    hidden = 0.0


@mutant("padding score")
class HiddenScoreFinite(Kernel):
    """What is hidden has the score −10000, which logits may be below."""

    hidden = -1e4


@mutant("padding score")
class MaskAddsAFew(Kernel):
    """What is hidden is only lowered by 10."""

    def hide(self, s: Array, seen: Array) -> Array:  # noqa: D102
        return np.where(seen, s, s - F(10))


@mutant("padding score")
class TailNotMasked(Kernel):
    """Keys of zeros that pad the last tile are seen."""

    def exists(self, x: Loaded, j: Array) -> Array:  # noqa: D102
        return (j < x.lengths[:, None, None, None]) | (j >= np.shape(x.call.k)[-2])


@mutant("unseen NaN")
class ZeroTimesNan(Kernel):
    """A weight of 0 is multiplied with what stands in slots that nobody sees."""

    def mix(self, p: Array, v: Array, seen: Array) -> Array:  # noqa: D102
        return p @ v


@mutant("lengths")
class LengthsIgnored(Kernel):
    """All keys exist in every batch."""

    def exists(self, x: Loaded, j: Array) -> Array:  # noqa: D102
        return (j < np.shape(x.call.k)[-2])[None, None, None]


@mutant("lengths")
class LengthOfTheFirst(Kernel):
    """Every batch has the first one's length."""

    def lengths(self, ends: Array) -> Array:  # noqa: D102
        return np.full_like(ends, ends[0])


@mutant("tile edges")
class LastKeyDropped(Kernel):
    """The last key is never seen."""

    def exists(self, x: Loaded, j: Array) -> Array:  # noqa: D102
        return j < x.lengths[:, None, None, None] - 1


@mutant("packing")
class PackingIgnored(Kernel):
    """Rows see the keys of other sequences."""

    def packed(self, x: Loaded, rows: Tile, j: Array) -> Array:  # noqa: D102
        return np.ones((len(np.arange(x.T)[rows]), len(j)), bool)


@mutant("packing")
class NextSequenceSeen(Kernel):
    """A sequence's keys end one key too late."""

    def packed(self, x: Loaded, rows: Tile, j: Array) -> Array:  # noqa: D102
        return super().packed(x, rows, j) | super().packed(x, rows, j - 1)


@mutant("tile edges")
class LastTileDropped(Kernel):
    """A last tile that is not whole is dropped."""

    def tiles(self, x: Loaded) -> list[Tile]:  # noqa: D102
        return [t for t in super().tiles(x) if t.stop <= np.shape(x.call.k)[-2]]


@mutant("tile edges")
class LastTileTwice(Kernel):
    """The last tile counts twice."""

    def tiles(self, x: Loaded) -> list[Tile]:  # noqa: D102
        return super().tiles(x) + super().tiles(x)[-1:]


@mutant("tile edges")
class TilesOverlap(Kernel):
    """The key at the end of a tile counts again at the start of the next."""

    def tiles(self, x: Loaded) -> list[Tile]:  # noqa: D102
        return [slice(max(t.start - 1, 0), t.stop) for t in super().tiles(x)]


@mutant("tile edges")
class FirstTileDropped(Kernel):
    """The loop over tiles starts at the second."""

    def tiles(self, x: Loaded) -> list[Tile]:  # noqa: D102
        return super().tiles(x)[1:] or super().tiles(x)


@mutant("mask ignored")
class CausalDropsTheMask(Kernel):
    """A mask that comes with causal is ignored."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        return super().load(replace(call, mask=None) if call.causal else call)
