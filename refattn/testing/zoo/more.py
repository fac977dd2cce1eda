"""Mutants of all sorts that a first diagnosis, made without them, mostly did not know."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from refattn.conventions import Call
from refattn.testing.zoo._mutant import mutant
from refattn.testing.zoo.kernel import Array, F, Kernel, Loaded, State, Tile
from refattn.testing.zoo.online import rounded


@mutant("causal diagonal")
class DiagonalTileUnmasked(Kernel):
    """Causal skips tiles but hides nothing within one: a row sees its whole tile of keys."""

    def causal(self, i: Array, j: Array) -> Array:  # noqa: D102
        return j // self.keys <= i // self.keys


@mutant("window size")
class WindowTwice(Kernel):
    """The window's left number counts for each of two halves."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        return super().window(x, rows, j, None if left is None else 2 * left, right)


@mutant("heads")
class KeyHeadsReversed(Kernel):
    """Key heads are counted from the last."""

    def key_head(self, heads: int, few: int) -> Array:  # noqa: D102
        return super().key_head(heads, few)[::-1]


@mutant("batches")
class BatchesReversed(Kernel):
    """Batches read each other's values."""

    def arrays(self, call: Call) -> tuple[Any, Any, Any]:  # noqa: D102
        return call.q, call.k, np.asarray(call.v)[::-1] if np.ndim(call.v) > 3 else call.v


@mutant("tile edges")
class MiddleTileDropped(Kernel):
    """A loop that is unrolled by two leaves out the tile between its two halves."""

    def tiles(self, x: Loaded) -> list[Tile]:  # noqa: D102
        whole = super().tiles(x)
        return whole if len(whole) < 3 else [t for n, t in enumerate(whole) if n != len(whole) // 2]


@mutant("tile edges")
class RowsOfTheLastTileLost(Kernel):
    """A last tile of rows that is not whole is not written."""

    def attend(self, x: Loaded) -> tuple[Array, Array]:  # noqa: D102
        o, lse = super().attend(x)
        if x.T > self.rows:
            o[..., x.T // self.rows * self.rows :, :] = 0
        return o, lse


@mutant("rescaling")
class RescaledTwice(Kernel):
    """The running output is rescaled twice when the maximum rises."""

    def accumulate(self, a: Array, alpha: Array, p: Array, v: Array, seen: Array) -> Array:  # noqa: D102
        return super().accumulate(a, alpha * alpha, p, v, seen)


@mutant("lse")
class LseHasTheScaleAgain(Kernel):
    """The maximum in lse is scaled once more."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        self.again = x.scale
        return x

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return super().lse(m * F(self.again), l, empty)


@mutant("lse")
class LseOfOnePlusTheSum(Kernel):
    """Lse is of the row sum and one."""

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return super().lse(m, l + F(1), empty)


@mutant("scale")
class ScaleOfThreeQuarters(Kernel):
    """The scale is √(4/3) too large, as of a width that lacks a quarter."""

    def scale(self, call: Call) -> float:  # noqa: D102
        return super().scale(call) * math.sqrt(4 / 3)


@mutant("softcap")
class SoftcapHalved(Kernel):
    """The cap is half of what it should be."""

    def softcap(self, s: Array, cap: float) -> Array:  # noqa: D102
        return super().softcap(s, cap / 2)


@mutant("bias")
class BiasOfTheNextRow(Kernel):
    """Each row reads the bias of the row after it."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        return replace(x, bias=None if x.bias is None else np.roll(x.bias, -1, -2))


@mutant("sink")
class SinkOfTheNextHead(Kernel):
    """Each head has the sink of the head after it."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        return replace(x, sink=None if x.sink is None else np.roll(x.sink, -1, -1))


@mutant("sink")
class SinkHasAValue(Kernel):
    """The sink carries the first key's value."""

    def with_sink(self, x: Loaded, state: State, part: int) -> State:  # noqa: D102
        new = super().with_sink(x, state, part)
        if x.sink is None or part > 0:
            return new
        return new._replace(a=new.a + np.exp(x.sink[..., None] - new.m)[..., None] * x.v[..., :1, :])


@mutant("merge")
class SplitsMergedByMaximum(Kernel):
    """Of two splits the one with the larger lse is taken."""

    splits = 2

    def merge(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:  # noqa: D102
        first = parts[0][1] >= parts[-1][1]
        return np.where(first[..., None], parts[0][0], parts[-1][0]), super().merge(parts)[1]


@mutant("lengths")
class LengthsOfTheOtherBatch(Kernel):
    """Batches have each other's lengths."""

    def lengths(self, ends: Array) -> Array:  # noqa: D102
        return ends[::-1]


@mutant("packing")
class FirstKeyOfASequenceLost(Kernel):
    """A sequence misses its first key."""

    def packed(self, x: Loaded, rows: Tile, j: Array) -> Array:  # noqa: D102
        return super().packed(x, rows, j) & super().packed(x, rows, j - 1)


@mutant("precision", "precision")
class ProbabilitiesCutOff(Kernel):
    """Weights lose digits instead of being rounded to bfloat16."""

    def cast(self, p: Array) -> Array:  # noqa: D102
        return (p.astype(F).view(np.uint32) & np.uint32(0xFFFF0000)).view(F)


@mutant("precision", "precision")
class QueriesInFloat8(Kernel):
    """Queries are float8 before they multiply keys."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        return replace(x, q=rounded(x.q, "float8_e4m3"))


@mutant("backward delta", "gradients")
class DeltaOfTheFirstColumns(Kernel):
    """Do·o is of the first eight columns only."""

    def delta(self, do: Array, o: Array, dlse: Array) -> Array:  # noqa: D102
        return super().delta(do[..., :8], o[..., :8], dlse)


@mutant("backward heads", "gradients")
class GroupAveraged(Kernel):
    """The gradient of a key head is the mean over the query heads that read it."""

    def over_group(self, g: Array) -> Array:  # noqa: D102
        return g.mean(2)


@mutant("backward causal", "gradients")
class BackwardDiagonalHidden(Kernel):
    """The backward pass does not see a row's own key."""

    def sees_backward(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        seen = super().sees(x, rows, keys)
        own = np.arange(keys.start, keys.stop) == self.position(x, rows)
        return seen & ~own if x.call.causal else seen
