r"""A tiled flash-style kernel in float32: correct, and made of small steps, so that a mutant overrides one of them.

Rows and keys are cut into tiles. For each tile of rows the tiles of keys pass by, with a running maximum m, a running
row sum l and a running output a:

.. math::
    m' = \max(m, \max_j s_{ij}), \quad \alpha = e^{m - m'}, \quad p_{ij} = e^{s_{ij} - m'}, \quad
    l' = \alpha l + \sum_j p_{ij}, \quad a' = \alpha a + \sum_j p_{ij} v_j

and at the end o = a/l and lse = m + ln l. The backward pass recomputes p = exp(s − lse) tile by tile. Dao et al. 2022,
arXiv:2205.14135, algorithms 1 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from refattn.conventions import Answer, Call
from refattn.softmax import Gradients
from refattn.testing._formats import Format

Array = NDArray[Any]
Tile: TypeAlias = "slice[int, int, None]"
F = np.float32


class State(NamedTuple):
    """What is carried from one tile of keys to the next: maximum, row sum, output."""

    m: Array
    l: Array  # noqa: E741
    a: Array


@dataclass(frozen=True)
class Loaded:
    """A call as the kernel has it: (B, H, …) throughout, a key head for each query head, keys padded to whole tiles."""

    call: Call
    q: Array
    k: Array
    v: Array
    scale: float
    lengths: Array
    mask: Array | None
    bias: Array | None
    slopes: Array | None
    sink: Array | None
    lead: tuple[int, ...]
    group: int

    @property
    def T(self) -> int:  # noqa: N802
        """How many rows there are."""
        return self.q.shape[-2]


class Kernel:
    """The correct kernel, under the default `Convention`.

    Parameters
    ----------
    weights, output
        The formats that P is rounded to before it multiplies V, and that o and gradients are rounded to; float32
        unless given.

    Examples
    --------
    >>> x = np.ones((1, 2, 1))
    >>> Kernel().forward(Call(q=x, k=x, v=x)).o.tolist()
    [[[1.0], [1.0]]]
    """

    rows = 32
    keys = 32
    splits = 1
    lowest = -math.inf
    hidden = -math.inf

    def __init__(self, weights: Format | None = None, output: Format | None = None) -> None:
        """Hold the formats."""
        self.weights = weights
        self.output = output

    def forward(self, call: Call) -> Answer:
        """Return o, (..., H, T, E), and lse, (..., H, T)."""
        with np.errstate(all="ignore"):
            x = self.load(call)
            o, lse = self.attend(x)
            return Answer(self.stored(o).reshape(*x.lead, *o.shape[-2:]), lse.reshape(*x.lead, x.T))

    def backward(self, call: Call, do: Any, dlse: Any = None) -> Gradients:
        """Return the gradients of ⟨do, o⟩ + ⟨dlse, lse⟩ by q, k, v, bias and sink."""
        with np.errstate(all="ignore"):
            x = self.load(call)
            do = np.asarray(do, F).reshape(*x.q.shape[:-1], -1)
            dlse = np.zeros(x.q.shape[:-1], F) if dlse is None else np.asarray(dlse, F).reshape(x.q.shape[:-1])
            return self.gradients(x, do, dlse)

    # Loading: shapes, heads, padding.

    def load(self, call: Call) -> Loaded:
        """Return the call in float32."""
        q, k, v = (_four(np.asarray(x)) for x in self.arrays(call))
        lead = (max(len(q), len(k), len(v)), q.shape[1])
        own = self.key_head(q.shape[1], k.shape[1])
        T, S = q.shape[-2], k.shape[-2]
        ends = np.full(lead[0], S) if call.lengths is None else np.asarray(call.lengths)
        k, v = (_padded(np.broadcast_to(x, (lead[0], *x.shape[1:])), -2, self.keys, 0) for x in (k, v))
        wide = [
            None if y is None else _padded(np.broadcast_to(y, (*lead, T, S)), -1, self.keys, fill)
            for y, fill in ((call.mask, True), (call.bias, 0))
        ]
        heads = [None if y is None else np.broadcast_to(np.asarray(y, F), lead) for y in (call.slopes, call.sink)]
        return Loaded(
            call,
            np.broadcast_to(q, (*lead, *q.shape[2:])).astype(F),
            k[:, own].astype(F),
            v[:, own].astype(F),
            self.scale(call),
            self.lengths(ends),
            wide[0],
            None if wide[1] is None else wide[1].astype(F),
            heads[0],
            heads[1],
            np.broadcast_shapes(*(np.shape(y)[:-3] for y in (call.q, call.k, call.v))) + np.shape(call.q)[-3:-2],
            q.shape[1] // k.shape[1],
        )

    def arrays(self, call: Call) -> tuple[Any, Any, Any]:
        """Return q, k and v as they lie in memory."""
        return call.q, call.k, call.v

    def scale(self, call: Call) -> float:
        """Return what multiplies q·k."""
        return np.shape(call.q)[-1] ** -0.5 if call.scale is None else call.scale

    def key_head(self, heads: int, few: int) -> Array:
        """Return which key head each query head reads."""
        return np.arange(heads) // (heads // few)

    def lengths(self, ends: Array) -> Array:
        """Return how many keys exist, by batch."""
        return ends

    # Which pairs are seen.

    def tiles(self, x: Loaded) -> list[Tile]:
        """Return the tiles of keys."""
        return [slice(n, n + self.keys) for n in range(0, x.k.shape[-2], self.keys)]

    def parts(self, x: Loaded) -> Iterator[list[Tile]]:
        """Yield the tiles of each split."""
        whole = self.tiles(x)
        step = -(-len(whole) // self.splits) or 1
        for n in range(0, max(len(whole), 1), step):
            yield whole[n : n + step]

    def skips(self, x: Loaded, rows: Tile, keys: Tile) -> bool:
        """Whether no row of the tile sees any of these keys, under causal alone."""
        return x.call.causal and keys.start > self.position(x, rows).max()

    def position(self, x: Loaded, rows: Tile) -> Array:
        """Return where rows stand on the key axis, (B, 1, rows, 1)."""
        if x.call.starts is None:
            shift = self.shift(x)[:, None]
        else:
            cq, ck = (np.asarray(y) for y in x.call.starts)
            shift = np.repeat(self.packed_shift(cq, ck), np.diff(cq))[None, rows]
        return (np.arange(x.T)[rows] + shift)[:, None, :, None]

    def shift(self, x: Loaded) -> Array:
        """Return what is added to a row's index, by batch: the last row stands at the last key."""
        return x.lengths - x.T

    def packed_shift(self, cq: Array, ck: Array) -> Array:
        """Return the same by packed sequence."""
        return ck[1:] - cq[1:]

    def sees(self, x: Loaded, rows: Tile, keys: Tile) -> Array:
        """Return which pairs of a tile are seen, (B, H or 1, rows, keys)."""
        call, i = x.call, self.position(x, rows)
        j: Array = np.arange(keys.start, keys.stop)
        seen = self.exists(x, j)
        if call.causal:
            seen = seen & self.causal(i, j)
        if call.window is not None:
            seen = seen & self.window(x, rows, j, *call.window)
        if x.mask is not None:
            seen = seen & self.masked(x.mask[..., rows, keys])
        if call.starts is not None:
            seen = seen & self.packed(x, rows, j)
        if x.bias is not None:
            seen = seen & ~np.isneginf(x.bias[..., rows, keys])
        return np.broadcast_to(seen, np.broadcast_shapes(seen.shape, (1, 1, len(i[0, 0]), 1)))

    def exists(self, x: Loaded, j: Array) -> Array:
        """Whether there is such a key, and not padding."""
        return j < x.lengths[:, None, None, None]

    def causal(self, i: Array, j: Array) -> Array:
        """Whether a key is not after the row."""
        return j <= i

    def window(self, x: Loaded, rows: Tile, j: Array, left: int | None, right: int | None) -> Array:
        """Whether a key is within the window of the row."""
        i = self.position(x, rows)
        return (j >= i - (x.k.shape[-2] + x.T if left is None else left)) & (
            j <= i + (x.k.shape[-2] + x.T if right is None else right)
        )

    def masked(self, mask: Array) -> Array:
        """Whether the caller's mask lets a pair be seen."""
        return mask

    def packed(self, x: Loaded, rows: Tile, j: Array) -> Array:
        """Whether row and key are of one sequence."""
        assert x.call.starts is not None
        cq, ck = x.call.starts
        return np.searchsorted(cq, np.arange(x.T)[rows], "right")[:, None] == np.searchsorted(ck, j, "right")

    # Logits.

    def logits(self, x: Loaded, rows: Tile, keys: Tile) -> Array:
        """Return the logits of a tile: scale, softcap, bias."""
        s = self.product(x, rows, keys)
        if x.call.softcap is not None:
            s = self.softcap(s, x.call.softcap)
        return s + self.bias(x, rows, keys)

    def product(self, x: Loaded, rows: Tile, keys: Tile) -> Array:
        """Return scaled products of queries and keys."""
        return F(x.scale) * (x.q[..., rows, :] @ x.k[..., keys, :].mT)

    def softcap(self, s: Array, cap: float) -> Array:
        """Cap the logits."""
        return F(cap) * np.tanh(s / F(cap))

    def bias(self, x: Loaded, rows: Tile, keys: Tile) -> Array:
        """Return what is added to logits."""
        if x.slopes is not None:
            j: Array = np.arange(keys.start, keys.stop)
            return self.alibi(x.slopes[..., None, None], self.position(x, rows), j)
        return np.zeros(1, F) if x.bias is None else x.bias[..., rows, keys]

    def alibi(self, slopes: Array, i: Array, j: Array) -> Array:
        """Return ALiBi's bias."""
        return (slopes * (j - i)).astype(F)

    # Online softmax.

    def attend(self, x: Loaded) -> tuple[Array, Array]:
        """Return o and lse, a tile of rows at a time."""
        o, lse = np.zeros((*x.q.shape[:-1], x.v.shape[-1]), F), np.zeros(x.q.shape[:-1], F)
        for rows in (slice(n, min(n + self.rows, x.T)) for n in range(0, x.T, self.rows)):
            parts: list[tuple[Array, Array]] = []
            for n, tiles in enumerate(self.parts(x)):
                state = self.start(x, rows)
                for keys in tiles:
                    if not self.skips(x, rows, keys):
                        state = self.step(x, rows, keys, state)
                parts.append(self.finish(self.with_sink(x, state, n)))
            o[..., rows, :], lse[..., rows] = parts[0] if len(parts) == 1 else self.merge(parts)
        return o, lse

    def start(self, x: Loaded, rows: Tile) -> State:
        """Return the state before any key."""
        lead = (*x.q.shape[:2], len(range(*rows.indices(x.T))))
        return State(np.full(lead, self.lowest, F), np.zeros(lead, F), np.zeros((*lead, x.v.shape[-1]), F))

    def step(self, x: Loaded, rows: Tile, keys: Tile, state: State) -> State:
        """Return the state after a tile of keys."""
        seen = self.sees(x, rows, keys)
        s = self.hide(self.logits(x, rows, keys), seen)
        m = self.maximum(state.m, s)
        p = self.exponential(s, m)
        alpha = self.alpha(state.m, m)
        return State(
            m, self.row_sum(state.l, alpha, p), self.accumulate(state.a, alpha, self.cast(p), x.v[..., keys, :], seen)
        )

    def hide(self, s: Array, seen: Array) -> Array:
        """Return logits with those that are not seen taken out."""
        return np.where(seen, s, F(self.hidden))

    def maximum(self, m: Array, s: Array) -> Array:
        """Return the running maximum."""
        return np.maximum(m, s.max(-1))

    def exponential(self, s: Array, m: Array) -> Array:
        """Return the weights, unnormalised."""
        return np.exp(s - _finite(m)[..., None])

    def alpha(self, old: Array, new: Array) -> Array:
        """Return what the state is rescaled by."""
        return np.exp(old - _finite(new))

    def row_sum(self, l: Array, alpha: Array, p: Array) -> Array:  # noqa: E741
        """Return the running row sum."""
        return alpha * l + p.sum(-1)

    def accumulate(self, a: Array, alpha: Array, p: Array, v: Array, seen: Array) -> Array:
        """Return the running output."""
        return alpha[..., None] * a + self.mix(p, v, seen)

    def mix(self, p: Array, v: Array, seen: Array) -> Array:
        """Return Σ p v over the pairs that are seen: what is not seen never matters, not even NaN."""
        sound = np.isfinite(v)
        out = p @ np.where(sound, v, 0)
        for j in np.flatnonzero(~sound.all((0, 1, 3))):
            bad = np.where(sound[..., j, :], 0, v[..., j, :])[..., None, :]
            out = out + np.where(seen[..., j, None], p[..., j, None] * bad, 0)
        return out

    def cast(self, p: Array) -> Array:
        """Return the weights as they multiply V."""
        return p if self.weights is None else self.weights.round(p.astype(np.float64)).astype(F)

    def stored(self, o: Array) -> Array:
        """Return what is written out."""
        return o if self.output is None else self.output.round(o.astype(np.float64)).astype(F)

    def with_sink(self, x: Loaded, state: State, part: int) -> State:
        """Return the state with the sink in it, which the first split has."""
        if x.sink is None or part > 0:
            return state
        m = np.maximum(state.m, x.sink[..., None])
        alpha = self.alpha(state.m, m)
        return State(m, alpha * state.l + np.exp(x.sink[..., None] - m), alpha[..., None] * state.a)

    def finish(self, state: State) -> tuple[Array, Array]:
        """Return o and lse: a row that saw nothing answers 0 and −inf."""
        empty = state.l == 0
        l = np.where(empty, 1, state.l)  # noqa: E741
        return self.normalise(state.a, l, empty), self.lse(state.m, l, empty)

    def normalise(self, a: Array, l: Array, empty: Array) -> Array:  # noqa: E741
        """Return o."""
        return np.where(empty[..., None], 0, a / l[..., None])

    def lse(self, m: Array, l: Array, empty: Array) -> Array:  # noqa: E741
        """Return the log-sum-exp in nats."""
        return np.where(empty, F(-math.inf), m + np.log(l))

    def merge(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        """Return the parts of a row's keys as one."""
        o, lse = (np.stack(y) for y in zip(*parts, strict=True))
        top = _finite(lse.max(0))
        w = np.exp(lse - top)
        z = w.sum(0)
        return (w[..., None] * o).sum(0) / np.where(z == 0, 1, z)[..., None], top + np.log(z)

    # The backward pass.

    def gradients(self, x: Loaded, do: Array, dlse: Array) -> Gradients:
        """Return the gradients, a tile of rows and a tile of keys at a time."""
        o, lse = self.attend(x)
        delta = self.delta(do, self.stored(o), dlse)
        dq, dk, dv = np.zeros_like(x.q), np.zeros_like(x.k), np.zeros_like(x.v)
        db = None if x.bias is None else np.zeros_like(x.bias)
        for rows in (slice(n, min(n + self.rows, x.T)) for n in range(0, x.T, self.rows)):
            for keys in self.tiles(x):
                seen = self.sees_backward(x, rows, keys)
                p = self.recomputed(x, rows, keys, seen, lse[..., rows])
                dv[..., keys, :] += self.to_v(p, do[..., rows, :])
                dp = np.where(seen, do[..., rows, :] @ x.v[..., keys, :].mT, 0)
                ds = p * (dp - delta[..., rows, None])
                if db is not None:
                    db[..., rows, keys] += ds
                ds = self.through_scale(x, self.through_softcap(x, rows, keys, ds, seen))
                self.to_q(dq, rows, self.mix(ds, x.k[..., keys, :], seen))
                self.to_k(dk, keys, self.mix(ds.mT, x.q[..., rows, :], seen.mT))
        sink = None if x.sink is None else self.to_sink(np.exp(x.sink[..., None] - lse), delta)
        return self.unloaded(x, dq, dk, dv, db, sink)

    def delta(self, do: Array, o: Array, dlse: Array) -> Array:
        """Return do·o − dlse of each row."""
        return (do * o).sum(-1) - dlse

    def sees_backward(self, x: Loaded, rows: Tile, keys: Tile) -> Array:
        """Return which pairs the backward pass takes as seen."""
        return self.sees(x, rows, keys)

    def recomputed(self, x: Loaded, rows: Tile, keys: Tile, seen: Array, lse: Array) -> Array:
        """Return the weights again, from lse."""
        return np.exp(np.where(seen, self.logits(x, rows, keys), -math.inf) - _finite(lse)[..., None])

    def to_v(self, p: Array, do: Array) -> Array:
        """Return what a tile adds to v's gradient."""
        return self.cast(p).mT @ do

    def through_softcap(self, x: Loaded, rows: Tile, keys: Tile, ds: Array, seen: Array) -> Array:
        """Return ds times the slope of the softcap."""
        if x.call.softcap is None:
            return ds
        slope = 1 - np.tanh(self.product(x, rows, keys) / F(x.call.softcap)) ** 2
        return np.where(seen, ds * slope, 0)

    def through_scale(self, x: Loaded, ds: Array) -> Array:
        """Return ds times the scale, which q and k share."""
        return self.cast(F(x.scale) * ds)

    def to_q(self, dq: Array, rows: Tile, part: Array) -> None:
        """Add what a tile of keys gives to q's gradient."""
        dq[..., rows, :] += part

    def to_k(self, dk: Array, keys: Tile, part: Array) -> None:
        """Add what a tile of rows gives to k's gradient."""
        dk[..., keys, :] += part

    def to_sink(self, p: Array, delta: Array) -> Array:
        """Return the sink's gradient."""
        return -(p * delta).sum(-1)

    def unloaded(self, x: Loaded, dq: Array, dk: Array, dv: Array, db: Array | None, sink: Array | None) -> Gradients:
        """Return gradients in the call's shapes."""
        call = x.call

        def fitting(g: Array, like: Any) -> Array:
            return self.stored(_summed_to(g, np.shape(like)))

        S = np.shape(call.k)[-2]
        few = (x.q.shape[0], -1, x.group, S)
        dk, dv = (self.over_group(y[..., :S, :].reshape(*few, y.shape[-1])) for y in (dk, dv))
        return Gradients(
            fitting(dq, call.q),
            fitting(dk, call.k),
            fitting(dv, call.v),
            None if db is None else fitting(db[..., :S], call.bias),
            None if sink is None else _summed_to(sink, np.shape(call.sink)),
        )

    def over_group(self, g: Array) -> Array:
        """Return the gradient of a key head, from those of the query heads that read it: (B, Hk, G, S, …)."""
        return g.sum(2)


def _four(x: Array) -> Array:
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _padded(x: Array, axis: int, tile: int, fill: float) -> Array:
    room = [(0, 0)] * x.ndim
    room[axis] = (0, -x.shape[axis] % tile)
    return np.pad(x, room, constant_values=fill)


def _finite(m: Array) -> Array:
    """Return the maximum, with 0 for rows that saw nothing yet: −inf less −inf is no number."""
    return np.where(np.isneginf(m), F(0), m)


def _summed_to(g: Array, shape: tuple[int, ...]) -> Array:
    """Return a gradient summed over the axes that its array was broadcast along."""
    g = g.sum(tuple(range(g.ndim - len(shape)))) if g.ndim > len(shape) else g
    for axis, n in enumerate(shape):
        if n == 1 and g.shape[axis] != 1:
            g = g.sum(axis, keepdims=True)
    return g.reshape(shape)
