"""Mutants that were written after the diagnosis was done, to try it with what it was not made for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from refattn.conventions import Call
from refattn.testing.zoo._mutant import mutant
from refattn.testing.zoo.kernel import Array, F, Kernel, Loaded, State, Tile
from refattn.testing.zoo.online import rounded


@mutant("row positions", held_out=True)
class PositionsInSixteens(Kernel):
    """Rows of a sixteen all have the position of the first of them."""

    def position(self, x: Loaded, rows: Tile) -> Array:  # noqa: D102
        own = np.arange(x.T)[rows][None, None, :, None]
        return super().position(x, rows) - own % 16


@mutant("heads", held_out=True)
class GroupOneTooLarge(Kernel):
    """A group of query heads is taken to have one head more."""

    def key_head(self, heads: int, few: int) -> Array:  # noqa: D102
        return np.arange(heads) // (heads // few + 1)


@mutant("layout", held_out=True)
class ValuesTransposed(Kernel):
    """Values are read as if rows and columns were swapped."""

    def arrays(self, call: Call) -> tuple[Any, Any, Any]:  # noqa: D102
        v = np.asarray(call.v)
        return call.q, call.k, v.reshape(*v.shape[:-2], v.shape[-1], v.shape[-2]).swapaxes(-1, -2)


@mutant("scale", held_out=True)
class ScaleOfAllHeads(Kernel):
    """The scale is of the width of all heads together."""

    def scale(self, call: Call) -> float:  # noqa: D102
        return float(np.shape(call.q)[-1] * np.shape(call.q)[-3]) ** -0.5 if call.scale is None else call.scale


@mutant("softcap", held_out=True)
class SoftcapIsRational(Kernel):
    """The cap is s/(1 + |s|/c), not c·tanh(s/c)."""

    def softcap(self, s: Array, cap: float) -> Array:  # noqa: D102
        return s / (1 + np.abs(s) / F(cap))


@mutant("bias", held_out=True)
class BiasOfTheFirstTile(Kernel):
    """Every tile of keys reads the bias of the first."""

    def bias(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return super().bias(x, rows, keys if x.bias is None else slice(0, self.keys))


@mutant("ALiBi", held_out=True)
class SlopesRooted(Kernel):
    """Slopes are those of twice as many heads."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        return replace(x, slopes=None if x.slopes is None else np.sqrt(x.slopes))


@mutant("sink", held_out=True)
class SinkNotShifted(Kernel):
    """The sink's exponential does not lack the maximum, as those of logits do."""

    def with_sink(self, x: Loaded, state: State, part: int) -> State:  # noqa: D102
        if x.sink is None or part > 0:
            return state
        return state._replace(l=state.l + np.exp(x.sink[..., None]))


@mutant("rescaling", held_out=True)
class WeightsOfTheOldMaximum(Kernel):
    """Weights of a tile are taken beside the maximum before it."""

    def step(self, x: Loaded, rows: Tile, keys: Tile, state: State) -> State:  # noqa: D102
        self.old = state.m
        return super().step(x, rows, keys, state)

    def exponential(self, s: Array, m: Array) -> Array:  # noqa: D102
        return super().exponential(s, np.where(np.isneginf(self.old), m, self.old))


@mutant("lse", held_out=True)
class LseDividedByScale(Kernel):
    """Lse is divided by the scale."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        self.factor = x.scale
        return x

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return super().lse(m, l, empty) / F(self.factor)


@mutant("merge", held_out=True)
class LseOfTheFirstSplit(Kernel):
    """Lse is the first split's."""

    splits = 2

    def merge(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:  # noqa: D102
        return super().merge(parts)[0], parts[0][1]


@mutant("lengths", held_out=True)
class LengthsFromTheEnd(Kernel):
    """The keys that exist are taken to be the last, as if padding were on the left."""

    def exists(self, x: Loaded, j: Array) -> Array:  # noqa: D102
        S = np.shape(x.call.k)[-2]
        return (j < S) & (j >= S - x.lengths[:, None, None, None])


@mutant("window shape", held_out=True)
class WindowByTiles(Kernel):
    """The window's left is rounded down to whole tiles."""

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:  # noqa: D102
        wide = super().window(x, rows, j // self.keys * self.keys + self.keys - 1, left, None)
        return wide & super().window(x, rows, j, None, right)


@mutant("empty rows", held_out=True)
class EmptyRowsOfTheFirstKey(Kernel):
    """A row that sees nothing answers the first key's value."""

    def attend(self, x: Loaded) -> tuple[Array, Array]:  # noqa: D102
        o, lse = super().attend(x)
        return np.where(np.isneginf(lse)[..., None], x.v[..., :1, :], o), lse


@mutant("precision", "precision", held_out=True)
class ScaledQueriesRounded(Kernel):
    """Queries are scaled, with log₂e, and rounded to bfloat16 before they multiply keys."""

    def product(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        bits = F(x.scale / math.log(2))
        return F(math.log(2)) * (rounded(bits * x.q[..., rows, :], "bfloat16") @ x.k[..., keys, :].mT)


@mutant("backward lse", "gradients", held_out=True)
class BackwardLseInBits(Kernel):
    """The backward pass takes lse as if it were in bits."""

    def recomputed(self, x: Loaded, rows: Tile, keys: Tile, seen: Array, lse: Array) -> Array:  # noqa: D102
        return super().recomputed(x, rows, keys, seen, lse * F(math.log(2)))


@mutant("backward values", "gradients", held_out=True)
class ValueGradientOfTheLastRows(Kernel):
    """Weights of v's gradient are of half the rows of each tile."""

    def to_v(self, p: Array, do: Array) -> Array:  # noqa: D102
        return super().to_v(p[..., : p.shape[-2] // 2 + 1, :], do[..., : p.shape[-2] // 2 + 1, :])


@mutant("backward softcap", "gradients", held_out=True)
class SoftcapSlopeOfTheLogits(Kernel):
    """The slope of the softcap is taken of logits that are not divided by the cap."""

    def through_softcap(self, x: Loaded, rows: Tile, keys: Tile, ds: Array, seen: Array) -> Array:  # noqa: D102
        if x.call.softcap is None:
            return ds
        return np.where(seen, ds * (1 - np.tanh(self.product(x, rows, keys)) ** 2), 0)
