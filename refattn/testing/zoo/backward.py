"""Mutants of the backward pass: o and lse are right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refattn.conventions import Call
from refattn.testing.zoo._mutant import mutant
from refattn.testing.zoo.kernel import Array, F, Kernel, Loaded, Tile


@mutant("backward causal", "gradients")
class BackwardCausalIgnored(Kernel):
    """The backward pass sees what causal hides."""

    def sees_backward(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return super().sees(replace(x, call=replace(x.call, causal=False)), rows, keys)


@mutant("backward causal", "gradients")
class BackwardCausalFromTopLeft(Kernel):
    """The backward pass aligns causal to the top-left."""

    def sees_backward(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        seen = super().sees(replace(x, call=replace(x.call, causal=False)), rows, keys)
        if not x.call.causal or x.call.starts is not None:
            return super().sees(x, rows, keys)
        j: Array = np.arange(keys.start, keys.stop)
        return seen & (j <= np.arange(x.T)[rows][:, None])


@mutant("backward window", "gradients")
class BackwardWindowIgnored(Kernel):
    """The backward pass sees what the window hides."""

    def sees_backward(self, x: Loaded, rows: Tile, keys: Tile) -> Array:  # noqa: D102
        return super().sees(replace(x, call=replace(x.call, window=None)), rows, keys)


@mutant("backward scale", "gradients")
class GradientsNotScaled(Kernel):
    """The gradients of q and k lack the scale."""

    def through_scale(self, x: Loaded, ds: Array) -> Array:  # noqa: D102
        return self.cast(ds)


@mutant("backward scale", "gradients")
class KeyGradientNotScaled(Kernel):
    """The gradient of k lacks the scale."""

    def to_k(self, dk: Array, keys: Tile, part: Array) -> None:  # noqa: D102
        super().to_k(dk, keys, part / F(self.factor))

    def load(self, call: Call) -> Loaded:  # noqa: D102
        x = super().load(call)
        self.factor = x.scale
        return x


@mutant("backward delta", "gradients")
class DeltaMissing(Kernel):
    """Do·o is not subtracted."""

    def delta(self, do: Array, o: Array, dlse: Array) -> Array:  # noqa: D102
        return -dlse


@mutant("backward delta", "gradients")
class DeltaAdded(Kernel):
    """Do·o is added."""

    def delta(self, do: Array, o: Array, dlse: Array) -> Array:  # noqa: D102
        return -super().delta(do, o, dlse) - 2 * dlse


@mutant("backward delta", "gradients")
class DeltaIsTheMean(Kernel):
    """Do·o is divided by the width of v."""

    def delta(self, do: Array, o: Array, dlse: Array) -> Array:  # noqa: D102
        return (do * o).mean(-1) - dlse


@mutant("backward lse", "gradients")
class LseGradientIgnored(Kernel):
    """The gradient that comes in through lse is ignored."""

    def delta(self, do: Array, o: Array, dlse: Array) -> Array:  # noqa: D102
        return super().delta(do, o, 0 * dlse)


@mutant("backward lse", "gradients")
class LseGradientSubtracted(Kernel):
    """The gradient that comes in through lse has the other sign."""

    def delta(self, do: Array, o: Array, dlse: Array) -> Array:  # noqa: D102
        return super().delta(do, o, -dlse)


@mutant("backward values", "gradients")
class ValueGradientNotNormalised(Kernel):
    """The gradient of v is of weights that are not divided by the row sum."""

    def to_v(self, p: Array, do: Array) -> Array:  # noqa: D102
        return super().to_v(p / np.where(p.max(-1, keepdims=True) == 0, 1, p.max(-1, keepdims=True)), do)


@mutant("backward softcap", "gradients")
class SoftcapSlopeMissing(Kernel):
    """The slope of the softcap is left out."""

    def through_softcap(self, x: Loaded, rows: Tile, keys: Tile, ds: Array, seen: Array) -> Array:  # noqa: D102
        return ds


@mutant("backward softcap", "gradients")
class SoftcapIgnoredBackward(Kernel):
    """The backward pass recomputes weights without the softcap."""

    def recomputed(self, x: Loaded, rows: Tile, keys: Tile, seen: Array, lse: Array) -> Array:  # noqa: D102
        return super().recomputed(replace(x, call=replace(x.call, softcap=None)), rows, keys, seen, lse)


@mutant("backward heads", "gradients")
class GroupNotSummed(Kernel):
    """The gradient of a key head is that of the last query head that reads it."""

    def over_group(self, g: Array) -> Array:  # noqa: D102
        return g[:, :, -1]


@mutant("backward tiles", "gradients")
class KeyGradientOfTheLastRows(Kernel):
    """Each tile of rows overwrites the gradient of k."""

    def to_k(self, dk: Array, keys: Tile, part: Array) -> None:  # noqa: D102
        dk[..., keys, :] = part


@mutant("backward tiles", "gradients")
class QueryGradientOfTheLastKeys(Kernel):
    """Each tile of keys overwrites the gradient of q."""

    def to_q(self, dq: Array, rows: Tile, part: Array) -> None:  # noqa: D102
        dq[..., rows, :] = part


@mutant("backward sink", "gradients")
class SinkGradientInverted(Kernel):
    """The gradient of the sink has the other sign."""

    def to_sink(self, p: Array, delta: Array) -> Array:  # noqa: D102
        return (p * delta).sum(-1)


@mutant("backward bias", "gradients")
class BiasIgnoredBackward(Kernel):
    """The backward pass recomputes weights without the bias."""

    def recomputed(self, x: Loaded, rows: Tile, keys: Tile, seen: Array, lse: Array) -> Array:  # noqa: D102
        plain = replace(x, bias=None, slopes=None)
        return super().recomputed(plain, rows, keys, seen, lse)
