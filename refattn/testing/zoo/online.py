"""Mutants of the online softmax: maximum, rescaling, row sum, lse, merging of splits, precision."""

from __future__ import annotations

import math

import numpy as np

from refattn.testing._formats import FORMATS
from refattn.testing.zoo._mutant import mutant
from refattn.testing.zoo.kernel import Array, F, Kernel, Loaded, Tile


def rounded(x: Array, name: str) -> Array:
    """Return x as a format holds it."""
    return FORMATS[name].round(x.astype(np.float64)).astype(F)


@mutant("running maximum")
class MaximumStartsAtZero(Kernel):
    """The running maximum starts at 0: rows whose logits are all far below underflow."""

    lowest = 0.0


@mutant("running maximum")
class MaximumStartsFinite(Kernel):
    """The running maximum starts at −50000: rows whose logits are all below answer as if they saw nothing."""

    lowest = -5e4


@mutant("running maximum")
class MaximumOfTheTile(Kernel):
    """The maximum is the tile's own: right in exact numbers, but the rescaling overflows."""

    def maximum(self, m: Array, s: Array) -> Array:  # noqa: D102
        own: Array = s.max(-1)
        return np.where(np.isneginf(own), m, own)


@mutant("running maximum")
class MaximumMissing(Kernel):
    """Exponentials are taken of the logits as they are."""

    def maximum(self, m: Array, s: Array) -> Array:  # noqa: D102
        return np.zeros_like(m)


@mutant("rescaling")
class OutputNotRescaled(Kernel):
    """The running output is not rescaled when the maximum rises."""

    def accumulate(self, a: Array, alpha: Array, p: Array, v: Array, seen: Array) -> Array:  # noqa: D102
        return a + self.mix(p, v, seen)


@mutant("rescaling")
class RowSumNotRescaled(Kernel):
    """The running row sum is not rescaled when the maximum rises."""

    def row_sum(self, l: Array, alpha: Array, p: Array) -> Array:  # noqa: D102, E741
        return l + p.sum(-1)


@mutant("rescaling")
class NothingRescaled(Kernel):
    """Neither output nor row sum are rescaled when the maximum rises."""

    def alpha(self, old: Array, new: Array) -> Array:  # noqa: D102
        return np.ones_like(new)


@mutant("rescaling")
class RescalingInverted(Kernel):
    """The state is divided by what it should be multiplied by."""

    def alpha(self, old: Array, new: Array) -> Array:  # noqa: D102
        return np.where(np.isneginf(old), 0, 1 / super().alpha(old, new))


@mutant("row sum")
class RowSumOfTheLastTile(Kernel):
    """The row sum is the last tile's."""

    def row_sum(self, l: Array, alpha: Array, p: Array) -> Array:  # noqa: D102, E741
        return p.sum(-1)


@mutant("row sum")
class NotNormalised(Kernel):
    """The output is not divided by the row sum."""

    def normalise(self, a: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return a


@mutant("row sum")
class DivisorHasAnEpsilon(Kernel):
    """The row sum is divided by with 0.001 added."""

    def normalise(self, a: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return super().normalise(a, l + F(1e-3), empty)


@mutant("lse")
class LseInBits(Kernel):
    """Lse is a logarithm to the base 2."""

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return super().lse(m, l, empty) / F(math.log(2))


@mutant("lse")
class LseWithoutMaximum(Kernel):
    """Lse is the logarithm of the row sum alone."""

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return np.where(empty, F(-math.inf), np.log(l))


@mutant("lse")
class LseIsTheMaximum(Kernel):
    """Lse lacks the logarithm of the row sum."""

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return m


@mutant("lse")
class LseNegative(Kernel):
    """Lse has the other sign."""

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return -super().lse(m, l, empty)


@mutant("empty rows")
class LseOfEmptyPositive(Kernel):
    """The lse of a row that sees nothing is +∞."""

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return np.where(empty, F(math.inf), super().lse(m, l, empty))


@mutant("empty rows")
class EmptyRowsDividedByZero(Kernel):
    """A row that sees nothing is divided by its row sum, 0."""

    def normalise(self, a: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return a / np.where(empty, 0, l)[..., None]


@mutant("padding score")
class EmptyRowsAverage(Kernel):
    """What is hidden has the least number, so that a row that sees nothing answers the mean of v."""

    hidden = float(np.finfo(F).min)

    def skips(self, x: Loaded, rows: Tile, keys: Tile) -> bool:  # noqa: D102
        return False

    def hide(self, s: Array, seen: Array) -> Array:  # noqa: D102
        return np.where(seen, s, F(self.hidden))

    def tiles(self, x: Loaded) -> list[Tile]:  # noqa: D102
        S = np.shape(x.call.k)[-2]
        return [slice(t.start, min(t.stop, S)) for t in super().tiles(x)]


@mutant("merge")
class SplitsAveraged(Kernel):
    """Splits are merged without their weights."""

    splits = 2

    def merge(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:  # noqa: D102
        return np.mean([o for o, _ in parts], axis=0), super().merge(parts)[1]


@mutant("merge")
class SplitsMergedInBits(Kernel):
    """The splits' lse are in bits, and merged as if in nats."""

    splits = 2

    def merge(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:  # noqa: D102
        o, lse = super().merge([(o, lse / F(math.log(2))) for o, lse in parts])
        return o, lse * F(math.log(2))


@mutant("merge")
class EmptySplitCounts(Kernel):
    """A split that sees nothing has the lse 0, and so a weight."""

    splits = 2

    def merge(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:  # noqa: D102
        return super().merge([(o, np.where(np.isneginf(lse), 0, lse)) for o, lse in parts])


@mutant("precision", "precision")
class WeightsRoundedBeforeRowSum(Kernel):
    """The row sum is of weights that are rounded to bfloat16."""

    def exponential(self, s: Array, m: Array) -> Array:  # noqa: D102
        return rounded(super().exponential(s, m), "bfloat16")


@mutant("precision", "precision")
class ScoresInFloat16(Kernel):
    """Products of queries and keys are float16 before they are scaled."""

    def product(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return F(x.scale) * rounded(x.q[..., rows, :] @ x.k[..., keys, :].mT, "float16")


@mutant("precision", "precision")
class ScoresInBfloat16(Kernel):
    """Logits are bfloat16."""

    def logits(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return rounded(super().logits(x, rows, keys), "bfloat16")


@mutant("precision", "precision")
class RowSumInBfloat16(Kernel):
    """The running row sum is bfloat16."""

    def row_sum(self, l: Array, alpha: Array, p: Array) -> Array:  # noqa: D102, E741
        return rounded(super().row_sum(l, alpha, p), "bfloat16")


@mutant("precision", "precision")
class OutputInBfloat16(Kernel):
    """The running output is bfloat16."""

    def accumulate(self, a: Array, alpha: Array, p: Array, v: Array, seen: Array) -> Array:  # noqa: D102
        return rounded(super().accumulate(a, alpha, p, v, seen), "bfloat16")


@mutant("precision", "precision")
class WeightsInFloat8(Kernel):
    """Weights are float8 before they multiply v."""

    def cast(self, p: Array) -> Array:  # noqa: D102
        return rounded(p, "float8_e5m2")


@mutant("precision", "precision")
class QuickExponential(Kernel):
    """The exponential is a polynomial of degree 3, off by 0.0001."""

    def exponential(self, s: Array, m: Array) -> Array:  # noqa: D102
        t = np.maximum((s - np.where(np.isneginf(m), 0, m)[..., None]) / F(math.log(2)), F(-150))
        n = np.floor(t)
        f = t - n
        near = 1 + f * (F(0.6951786) + f * (F(0.2276396) + f * F(0.0771818)))
        return np.where(np.isneginf(s), F(0), np.ldexp(near, n.astype(int)))


@mutant("precision", "precision")
class LseInBfloat16(Kernel):
    """Lse is bfloat16."""

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return rounded(super().lse(m, l, empty), "bfloat16")
