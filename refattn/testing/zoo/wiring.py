"""Mutants of what is read and how logits are made: heads, layout, widths, scale, softcap, bias, ALiBi, sink."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refattn.conventions import Call
from refattn.testing.zoo._mutant import mutant
from refattn.testing.zoo.kernel import Array, F, Kernel, Loaded, State, Tile


@mutant("heads")
class HeadsTiled(Kernel):
    """Query head h reads key head h mod Hk."""

    def key_head(self, heads: int, few: int) -> Array:  # noqa: D102
        return np.arange(heads) % few


@mutant("heads")
class HeadsDividedByKeyHeads(Kernel):
    """Query head h reads key head ⌊h / Hk⌋: right where a group has as many heads as there are groups."""

    def key_head(self, heads: int, few: int) -> Array:  # noqa: D102
        return np.minimum(np.arange(heads) // few, few - 1)


@mutant("heads")
class FirstKeyHead(Kernel):
    """Every query head reads the first key head."""

    def key_head(self, heads: int, few: int) -> Array:  # noqa: D102
        return np.zeros(heads, int)


@mutant("layout")
class KeysReadContiguous(Kernel):
    """Keys of a transposed view are read as they lie in memory."""

    def arrays(self, call: Call) -> tuple[Any, Any, Any]:  # noqa: D102
        k = np.asarray(call.k)
        return call.q, k.ravel("K").reshape(k.shape), call.v


@mutant("layout")
class ValuesReadContiguous(Kernel):
    """Values of a transposed view are read as they lie in memory."""

    def arrays(self, call: Call) -> tuple[Any, Any, Any]:  # noqa: D102
        v = np.asarray(call.v)
        return call.q, call.k, v.ravel("K").reshape(v.shape)


@mutant("layout")
class HeadsAndTokensSwapped(Kernel):
    """Heads and tokens of k are read in the other order."""

    def arrays(self, call: Call) -> tuple[Any, Any, Any]:  # noqa: D102
        k = np.asarray(call.k)
        return call.q, k.reshape(*k.shape[:-3], k.shape[-2], k.shape[-3], -1).swapaxes(-2, -3), call.v


@mutant("values")
class KeysAsValues(Kernel):
    """K is returned for V."""

    def arrays(self, call: Call) -> tuple[Any, Any, Any]:  # noqa: D102
        k, width = np.asarray(call.k), np.shape(call.v)[-1]
        return call.q, call.k, np.concatenate([k] * -(-width // k.shape[-1]), -1)[..., :width]


@mutant("head dim")
class WidthCutToEights(Kernel):
    """Only whole eights of the head's width are multiplied."""

    def product(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        D = max(x.q.shape[-1] // 8 * 8, 1)
        return F(x.scale) * (x.q[..., rows, :D] @ x.k[..., keys, :D].mT)


@mutant("head dim")
class ValuesCutToKeysWidth(Kernel):
    """Only as many columns of v are read as k has."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        D = x.k.shape[-1]
        return replace(x, v=np.concatenate([x.v[..., :D], 0 * x.v[..., D:]], -1))


@mutant("scale")
class ScaleOfPaddedWidth(Kernel):
    """The scale is of the width rounded up to a power of two."""

    def scale(self, call: Call) -> float:  # noqa: D102
        return (1 << (np.shape(call.q)[-1] - 1).bit_length()) ** -0.5 if call.scale is None else call.scale


@mutant("scale")
class ScaleTwice(Kernel):
    """Queries are scaled, and then logits."""

    def scale(self, call: Call) -> float:  # noqa: D102
        return super().scale(call) ** 2


@mutant("scale")
class ScaleMissing(Kernel):
    """Logits are not scaled."""

    def scale(self, call: Call) -> float:  # noqa: D102
        return 1.0


@mutant("scale")
class ScaleArgumentIgnored(Kernel):
    """A scale that is given is not used."""

    def scale(self, call: Call) -> float:  # noqa: D102
        return np.shape(call.q)[-1] ** -0.5


@mutant("scale")
class ScaleOfValuesWidth(Kernel):
    """The scale is of the width of v."""

    def scale(self, call: Call) -> float:  # noqa: D102
        return np.shape(call.v)[-1] ** -0.5 if call.scale is None else call.scale


@mutant("scale")
class LogitsInBitsTwice(Kernel):
    """Logits are multiplied by log₂e before an exponential that is natural."""

    def scale(self, call: Call) -> float:  # noqa: D102
        return super().scale(call) / np.log(2)


@mutant("softcap")
class SoftcapIgnored(Kernel):
    """The softcap is taken and not used."""

    def softcap(self, s: Array, cap: float) -> Array:  # noqa: D102
        return s


@mutant("softcap")
class SoftcapNotScaledBack(Kernel):
    """Capped logits are not multiplied by the cap again."""

    def softcap(self, s: Array, cap: float) -> Array:  # noqa: D102
        return np.tanh(s / F(cap))


@mutant("order")
class SoftcapAfterBias(Kernel):
    """The bias is capped too."""

    def logits(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        s = self.product(x, rows, keys) + self.bias(x, rows, keys)
        return s if x.call.softcap is None else self.softcap(s, x.call.softcap)


@mutant("softcap")
class SoftcapAfterMask(Kernel):
    """What is hidden is capped too, and so seen at the cap's negative."""

    def hide(self, s: Array, seen: Array) -> Array:  # noqa: D102
        cap = self.cap
        return super().hide(s, seen) if cap is None else np.where(seen, s, F(-cap))

    def load(self, call: Call) -> Loaded:  # noqa: D102
        self.cap = call.softcap
        return super().load(call)


@mutant("bias")
class BiasIgnored(Kernel):
    """The bias has no effect."""

    def bias(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return super().bias(x, rows, keys) if x.bias is None else np.zeros(1, F)


@mutant("bias")
class BiasNotInBits(Kernel):
    """Logits are turned into bits for exp2, the bias is not."""

    def bias(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return F(np.log(2)) * super().bias(x, rows, keys)


@mutant("bias")
class BiasScaled(Kernel):
    """The bias is added before the scale."""

    def bias(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return super().bias(x, rows, keys) * F(1 if x.bias is None else x.scale)


@mutant("bias")
class BiasOfTheFirst(Kernel):
    """Every head and batch reads the first one's bias."""

    def bias(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return super().bias(x, rows, keys)[:1, :1] if x.bias is not None else super().bias(x, rows, keys)


@mutant("ALiBi")
class SlopesOfTheNextHead(Kernel):
    """Each head has the slope of the head after it."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        return replace(x, slopes=None if x.slopes is None else np.roll(x.slopes, -1, -1))


@mutant("ALiBi")
class AlibiInverted(Kernel):
    """Distant keys are favoured."""

    def alibi(self, slopes: Array, i: Array, j: Array) -> Array:  # noqa: D102
        return (slopes * (i - j)).astype(F)


@mutant("ALiBi")
class AlibiAbsolute(Kernel):
    """The slope multiplies −|j − i|."""

    def alibi(self, slopes: Array, i: Array, j: Array) -> Array:  # noqa: D102
        return (-slopes * np.abs(i - j)).astype(F)


@mutant("ALiBi")
class AlibiByKey(Kernel):
    """The slope multiplies the key's index, which only lse shows."""

    def alibi(self, slopes: Array, i: Array, j: Array) -> Array:  # noqa: D102
        return (slopes * (j + 0 * i)).astype(F)


@mutant("sink")
class SinkIgnored(Kernel):
    """The sink is not in the normaliser."""

    def with_sink(self, x: Loaded, state: State, part: int) -> State:  # noqa: D102
        return state


@mutant("sink")
class SinkInEverySplit(Kernel):
    """Both splits count the sink."""

    splits = 2

    def with_sink(self, x: Loaded, state: State, part: int) -> State:  # noqa: D102
        return super().with_sink(x, state, 0)


@mutant("sink")
class SinkInMaximumOnly(Kernel):
    """The sink takes part in the maximum and not in the row sum."""

    def with_sink(self, x: Loaded, state: State, part: int) -> State:  # noqa: D102
        if x.sink is None:
            return state
        m = np.maximum(state.m, x.sink[..., None])
        return State(m, state.l, self.alpha(state.m, m)[..., None] * state.a)


@mutant("sink")
class SinkScaled(Kernel):
    """The sink is scaled as logits are."""

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        return replace(x, sink=None if x.sink is None else F(x.scale) * x.sink)


@mutant("sink")
class SinkNotInLse(Kernel):
    """Lse leaves the sink out."""

    def with_sink(self, x: Loaded, state: State, part: int) -> State:  # noqa: D102
        self.before = state
        return super().with_sink(x, state, part)

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: D102, E741
        return self.before.m + np.log(self.before.l)
