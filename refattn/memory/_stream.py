"""A stream of tokens: the keys that its rows can still see, and summaries of those that they cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import _check, masks
from refattn._pairs import integer
from refattn.blocks import Blocks
from refattn.lifted import Lifted
from refattn.masks import Mask

Ints = NDArray[np.int64]

BLOCKS = 8
"""How many summaries of evicted keys a state holds, at most, unless told: D² numbers each, however long the stream."""


class State(NamedTuple):
    """What a stream holds after `position` tokens.

    `k` (..., n, D) and `v` (..., n, E) are the keys and values that a later row can still see. Of what was evicted
    there are a summary of the keys, `evicted`, and each column's least and greatest value, `low` and `high` (..., E).
    """

    position: int
    k: Any
    v: Any
    evicted: Blocks
    low: Any
    high: Any


def pattern(length: int, memory: int, sinks: int) -> Mask:
    """Return which pairs of a segment, a memory before it and first keys are seen."""
    near = masks.segmented(length, memory)
    return near if integer("sinks", sinks, 0) == 0 else near | (masks.prefix(sinks) & masks.causal())


class Stream:
    """Some tokens after a state: the keys at hand, which of them each row sees, and what it has lost.

    `first` (T,) is where each row's window begins, or the sinks end if that is later: D_i = {sinks ≤ j < first_i}. Keys
    at hand are the sinks and those from the first row's window on; key j ≥ sinks is at place j − `shift`.
    """

    def __init__(
        self,
        state: State | None,
        q: Any,
        k: Any,
        v: Any,
        length: int,
        memory: int,
        sinks: int,
        blocks: int = BLOCKS,
    ) -> None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if isinstance(x, Lifted):
                raise TypeError(f"{name} is a {type(x).__name__}; expected an array of real numbers")
        q, k, v = _check.qkv(q, k, v)
        n, D, E = q.shape[-2], k.shape[-1], v.shape[-1]
        _check.size("k", k.shape[-2], n, "S", "q's T")
        pattern(length, memory, sinks)
        if state is None:
            none = np.full((*v.shape[:-2], E), np.inf)
            state = State(0, k[..., :0, :], v[..., :0, :], Blocks.of(k[..., :0, :], 1), none, -none)
        elif not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"state is {state!r}; expected a State that step returned, or None")
        at: Ints = _check.integer("state.position", state.position, 0) + np.arange(n + 1, dtype=np.int64)
        start: Ints = at // length * length - memory
        begin = np.maximum(start, sinks)
        held = min(state.position, sinks) + max(0, state.position - int(begin[0]))
        _check.shaped("state.k", state.k, "n D", (*k.shape[:-2], held, D))
        _check.shaped("state.v", state.v, "n E", (*v.shape[:-2], held, E))
        self.sinks, self.shift = sinks, int(begin[0]) - sinks
        self.k, self.v = (np.concatenate(pair, axis=-2) for pair in ((state.k, k), (state.v, v)))
        self.at, self.start, self.first, self.next = at[:-1], start[:-1], begin[:-1], int(begin[-1])
        self.state, self.done, self.blocks = state, int(begin[0]), _check.integer("blocks", blocks, 1)

    def seen(self) -> Mask:
        """Return which of the keys at hand each row sees."""
        up_to = masks.causal().at(self.at - self.shift)
        before = masks.causal().at(np.maximum(self.start - self.shift, 0) - 1)
        return up_to & (~before | masks.prefix(self.sinks))

    def forget(self, first: int) -> State:
        """Evict the keys before `first` that are not evicted yet, and return the state, whose keys are the old ones."""
        gone = slice(self.done - self.shift, first - self.shift)
        k, v = self.k[..., gone, :], np.asarray(self.v[..., gone, :], np.float64)
        self.done = max(self.done, first)
        self.state = self.state._replace(
            evicted=self.state.evicted.absorb(k, self.blocks),
            low=np.minimum(self.state.low, v.min(axis=-2, initial=np.inf)),
            high=np.maximum(self.state.high, v.max(axis=-2, initial=-np.inf)),
        )
        return self.state

    def later(self) -> State:
        """Return the state after these tokens."""
        kept = slice(self.next - self.shift, None)
        past = self.forget(self.next)
        k, v = (np.concatenate((x[..., : self.sinks, :], x[..., kept, :]), axis=-2) for x in (self.k, self.v))
        return past._replace(position=past.position + len(self.at), k=k, v=v)
