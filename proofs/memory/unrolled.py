"""Memformer's gradients by plain backpropagation through time: every segment's activations are kept, T = S.

Written from the paper's formulas and softmax's textbook backward, which reads the weights that the forward kept; each
product and sum as the NumPy engine has it (one tile: n, L ≤ 64), so that only replay is different.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.memory.memformer import Gradients

Array = NDArray[np.float64]


class Attention(NamedTuple):
    """What softmax attention computed, and from what."""

    q: Array
    k: Array
    v: Array
    p: Array
    o: Array


class Segment(NamedTuple):
    """What a segment computed: its reads and, but for the last, its write and how long each slot was then."""

    memory: Array
    reads: Attention
    write: Attention | None
    length: Array | None


def attention(q: Array, k: Array, v: Array, seen: NDArray[np.bool_] | bool, sigma: float) -> Attention:
    """Attend, and keep it all."""
    s = np.where(seen, (q @ k.T) * sigma, -np.inf)
    w = np.exp(s - s.max(axis=1)[:, None])
    z = w.sum(axis=1)[:, None]
    return Attention(q, k, v, w / z, w @ v / z)


def pull(do: Array, kept: Attention, sigma: float) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v."""
    ds = kept.p * (do @ kept.v.T - (do * kept.o).sum(1)[:, None])
    return sigma * (ds @ kept.k), sigma * (ds.T @ kept.q), kept.p.T @ do


def length_of(x: Array) -> tuple[Array, Array]:
    """Return each row's length, and x divided by it; a power of two is taken out first, as memformer does."""
    top = np.ldexp(1.0, np.frexp(np.abs(x).max(axis=1, keepdims=True))[1] - 1)
    length = np.sqrt((x / top * (x / top)).sum(axis=1, keepdims=True))
    return length * top, x / top / length


def forward(
    q: Array,
    k: Array,
    v: Array,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    retention: Array,
    *,
    segment: int,
    temperature: float = 1.0,
    scale: float | None = None,
) -> list[Segment]:
    """Run all segments, and keep all that they compute."""
    sigma, n = 1 / math.sqrt(q.shape[1]) if scale is None else scale, len(retention)
    memory, kept = length_of(retention)[1], list[Segment]()
    for start in range(0, len(q), segment):
        at = slice(start, start + segment)
        reads = attention(q[at], memory @ w_key, memory @ w_value, True, sigma)
        if start + segment >= len(q):
            return [*kept, Segment(memory, reads, None, None)]
        seen = np.hstack([np.eye(n, dtype=bool), np.ones((n, segment), bool)])
        own, inputs = np.vstack([memory @ w_key, k[at]]), np.vstack([memory, v[at]])
        write = attention(memory @ w_query / temperature, own, inputs, seen, sigma)
        length, after = length_of(write.o + retention)
        kept.append(Segment(memory, reads, write, length))
        memory = after
    return kept


def vjp(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    w_query: Array,
    w_key: Array,
    w_value: Array,
    retention: Array,
    *,
    segment: int,
    temperature: float = 1.0,
    scale: float | None = None,
) -> Gradients:
    """Return all gradients."""
    arrays, options = (q, k, v, w_query, w_key, w_value, retention), {"temperature": temperature, "scale": scale}
    kept = forward(*arrays, segment=segment, **options)
    sigma, n = 1 / math.sqrt(q.shape[1]) if scale is None else scale, len(retention)
    g, later = Gradients(*map(np.zeros_like, arrays)), np.zeros_like(retention)

    def forgotten(later: Array, y: Array, length: Array) -> Array:
        du = (later - y * (y * later).sum(axis=1, keepdims=True)) / length
        g.retention[:] += du
        return du

    for s in reversed(range(len(kept))):
        memory, reads, write, length = kept[s]
        at = slice(s * segment, (s + 1) * segment)
        if write is not None and length is not None:
            asked, own, inputs = pull(forgotten(later, kept[s + 1].memory, length), write, sigma)
            asked = asked / temperature
            g.k[at], g.v[at] = own[n:], inputs[n:]
            g.w_query[:] += memory.T @ asked
            g.w_key[:] += memory.T @ own[:n]
            later = inputs[:n] + own[:n] @ w_key.T + asked @ w_query.T
        g.q[at], own, seen = pull(do[at], reads, sigma)
        g.w_key[:] += memory.T @ own
        g.w_value[:] += memory.T @ seen
        later = later + own @ w_key.T + seen @ w_value.T
    length, _ = length_of(retention)
    forgotten(later, kept[0].memory, length)
    return g
