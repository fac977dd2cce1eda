"""Memformer on checked arrays: its three maps, their way through the segments, and back by replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from refattn import _check, masks, softmax
from refattn.engines import Backend
from refattn.heads import unbroadcast
from refattn.lifted import Lifted, concatenate
from refattn.masks import Pairs


class Inputs(NamedTuple):
    """The arrays of `attend`, checked; or their gradients."""

    q: Any
    k: Any
    v: Any
    w_query: Any
    w_key: Any
    w_value: Any
    retention: Any


class How(NamedTuple):
    """The options of `attend`, checked."""

    segment: int
    temperature: float
    scale: float | None
    backend: Backend


class Before(NamedTuple):
    """A segment's rows and keys, the memory before it, and how long its slots were before they became directions."""

    rows: slice
    keys: slice
    memory: Any
    length: Any


def segments(T: int, S: int, L: int) -> list[tuple[slice, slice]]:
    """Return the rows and the keys of each segment, up to the last row's; rows before the first key are its."""
    last = max(0, S - 1) // L if T else 0
    edges = [0, *(max(0, s * L - S + T) for s in range(1, last + 1)), T]
    keys = (slice(s * L, min((s + 1) * L, S)) for s in range(last + 1))
    return [(slice(*rows), of) for rows, of in zip(pairwise(edges), keys, strict=True)]


def first(x: Inputs) -> tuple[Any, Any]:
    """Return the memory before the first segment, with the leading axes of all that it will meet, and its lengths."""
    memory, length = direction(x.retention)
    if isinstance(memory, Lifted):
        return memory, length
    lead = np.broadcast_shapes(*(y.shape[:-2] for y in x[1:]))
    return np.broadcast_to(memory, lead + memory.shape[-2:]), length


def memories(x: Inputs, how: How, memory: Any = None) -> Iterator[Before]:
    """Yield what is before each segment; a memory that is given has no lengths."""
    memory, length = first(x) if memory is None else (memory, None)
    cut, seen = segments(x.q.shape[-2], x.k.shape[-2], how.segment), written(x, how)
    for n, (rows, keys) in enumerate(cut):
        if n:
            memory, length = after(memory, cut[n - 1][1], x, how, seen)
        yield Before(rows, keys, memory, length)


def after(memory: Any, keys: slice, x: Inputs, how: How, seen: Pairs) -> tuple[Any, Any]:
    """Return the memory after a whole segment, written and then forgotten, and its lengths."""
    k, v = x.k[..., keys, :], x.v[..., keys, :]
    return direction(write(memory, k, v, x.w_query, x.w_key, how, seen) + x.retention)


def reads(x: Inputs, how: How, through: Iterable[Before]) -> Any:
    """Return what all rows read."""
    parts = [read(x.q[..., at.rows, :], at.memory, x.w_key, x.w_value, how) for at in through]
    return concatenate(*parts, axis=-2)


def read(q: Any, memory: Any, w_key: Any, w_value: Any, how: How) -> Any:
    return softmax.attend(q, memory @ w_key, memory @ w_value, scale=how.scale, backend=how.backend)


def write(memory: Any, k: Any, v: Any, w_query: Any, w_key: Any, how: How, seen: Pairs) -> Any:
    arrays, options = as_attention(memory, k, v, w_query, w_key, how, seen)
    return softmax.attend(*arrays, **options)


def own_and_inputs(n: int, L: int) -> Pairs:
    """Return the pairs of a write of L inputs to n slots: each slot sees its own row and all inputs."""
    return (masks.window(0, 0).at(0) | ~masks.prefix(n)).on(n, n + L)


def written(x: Inputs, how: How) -> Pairs:
    """Return the pairs of the writes of whole segments: bound once, they are found once for all of them."""
    return own_and_inputs(x.retention.shape[-2], min(how.segment, x.k.shape[-2]))


def as_attention(
    memory: Any, k: Any, v: Any, w_query: Any, w_key: Any, how: How, seen: Pairs
) -> tuple[Any, dict[str, Any]]:
    """Return a write as softmax attention.

    τ divides the queries and not the scale, whose default is the real number 1/√D.
    """
    arrays = memory @ w_query / how.temperature, stacked(memory @ w_key, k), stacked(memory, v)
    return arrays, {"mask": seen, "scale": how.scale, "backend": how.backend}


def backward(do: Any, x: Inputs, how: How) -> Inputs:
    """Return the gradients by replay: of what a segment computed only the memory after it is kept, and its lengths."""
    kept, seen = list(memories(x, how)), written(x, how)
    g, later = Inputs(*(np.zeros(y.shape) for y in x)), np.zeros(kept[0].memory.shape)
    for n, (rows, keys, memory, _) in reversed(list(enumerate(kept))):
        if n + 1 < len(kept):
            later = pull(later, kept[n + 1].memory, kept[n + 1].length)
            g, later = replay(g, later, memory, keys, x, how, seen)
        of = softmax.vjp(
            do[..., rows, :],
            x.q[..., rows, :],
            memory @ x.w_key,
            memory @ x.w_value,
            scale=how.scale,
            backend=how.backend,
        )
        later = later + of.k @ x.w_key.mT + of.v @ x.w_value.mT
        g = g._replace(
            q=put(g.q, rows, of.q),
            w_key=g.w_key + unbroadcast(memory.mT @ of.k, x.w_key.shape),
            w_value=g.w_value + unbroadcast(memory.mT @ of.v, x.w_value.shape),
        )
    start = pull(later, kept[0].memory, kept[0].length)
    return g._replace(retention=g.retention + unbroadcast(start, x.retention.shape))


def replay(g: Inputs, later: Any, memory: Any, keys: slice, x: Inputs, how: How, seen: Pairs) -> tuple[Inputs, Any]:
    """Compute a segment's write again, and return the gradients with its share and that of the memory before it."""
    n, k, v = memory.shape[-2], x.k[..., keys, :], x.v[..., keys, :]
    arrays, options = as_attention(memory, k, v, x.w_query, x.w_key, how, seen)
    of = softmax.vjp(later, *arrays, **options)
    asked, own, k_seen, v_seen = of.q / how.temperature, of.k[..., :n, :], of.k[..., n:, :], of.v[..., n:, :]
    g = g._replace(
        k=put(g.k, keys, unbroadcast(k_seen, k.shape)),
        v=put(g.v, keys, unbroadcast(v_seen, v.shape)),
        w_query=g.w_query + unbroadcast(memory.mT @ asked, x.w_query.shape),
        w_key=g.w_key + unbroadcast(memory.mT @ own, x.w_key.shape),
        retention=g.retention + unbroadcast(later, x.retention.shape),
    )
    return g, of.v[..., :n, :] + own @ x.w_key.mT + asked @ x.w_query.mT


def stacked(above: Any, below: Any) -> Any:
    """Return rows under rows, in float64."""
    if isinstance(above, Lifted) or isinstance(below, Lifted):
        return concatenate(above, below)
    lead = np.broadcast_shapes(above.shape[:-2], below.shape[:-2])
    return np.concatenate([np.broadcast_to(_check.widened(x), lead + x.shape[-2:]) for x in (above, below)], axis=-2)


def direction(x: Any) -> tuple[Any, Any]:
    """Return each row divided by its length, and the length; a power of two is taken out of its squares."""
    x = _check.widened(x)
    top = np.abs(x.floats() if isinstance(x, Lifted) else x).max(axis=-1, initial=0.0, keepdims=True)
    if (top == 0).any():
        slot = np.argwhere(top == 0)[0][-2]
        raise ValueError(
            f"retention leaves slot {slot} at 0, which has no direction; expected rows that no slot cancels"
        )
    top = np.ldexp(1.0, np.where(np.isfinite(top), np.frexp(top)[1] - 1, 0))
    x = x / top
    length = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    return x / length, length * top


def pull(dy: Any, y: Any, length: Any) -> Any:
    """Return the gradient of x from that of its direction y = x/‖x‖."""
    return (dy - y * (y * dy).sum(axis=-1, keepdims=True)) / length


def put(whole: Any, rows: slice, part: Any) -> Any:
    """Return an array with some of its rows replaced, in place where that can be."""
    if isinstance(part, Lifted):
        return concatenate(whole[: rows.start], part, whole[rows.stop :])
    whole[..., rows, :] = part
    return whole
