r"""Segments: softmax over the row's own segment, a memory before it, and the first keys of all.

.. math::
    o_i = \sum_{j \in K(p)} \frac{e^{\sigma q_i \cdot k_j}}{z_i} v_j, \qquad
    K(p) = \{\lfloor p/L \rfloor L - M \le j \le p\} \cup \{j < s,\ j \le p\}, \qquad p = i + S - T

One layer of Transformer-XL is L > 1, s = 0: a cache of M keys and values is put before each segment of L (Dai et al.
2019, arXiv:1901.02860, §3.2). A sliding window is L = 1, and StreamingLLM is L = 1, s > 0: the first s keys, "attention
sinks", stay (Xiao et al. 2023, arXiv:2309.17453); its cache of s + W keys with the row's own is M = W − 1. These are
masks: what such models do to positions (relative terms in the logits, rotary angles counted within the cache) is done
to q and k before they come here, and changes what `exact` is.

`certify` says how far a stream is from exact attention over everything that it forgot, from a summary of the keys that
it evicted: none of them is read again, and none is stored.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, dropped, masks, softmax
from refattn.arithmetic import Arithmetic
from refattn.dropped import Blocks, Interval
from refattn.engines import Backend
from refattn.heads import Leads, leads
from refattn.masks import Mask, MaskLike
from refattn.method import Claim, Cost, Method, Option

METHOD = Method(
    name="segments",
    family="memory",
    paper="arXiv:1901.02860, §3.2; arXiv:2309.17453",
    arrays={"q": "T D", "k": "S D", "v": "S E"},
    options={
        "length": Option(doc="L, keys in a segment", domain=lambda n: n >= 1, typical=(1, 4), default=1),
        "memory": Option(
            doc="M, keys before the segment",
            domain=lambda n: n >= 0,
            typical=lambda n: tuple(sorted({max(1, n["S"] // d) for d in (64, 32, 16, 8, 4)})),
        ),
        "sinks": Option(doc="s, first keys that stay", domain=lambda n: n >= 0, typical=(0, 2), default=0),
    },
    budget="memory",
    variants=({"sinks": 4}, {"length": 32}),
    masks="any",
    causal=True,
    rows="stochastic",
    permutable=False,
    claims=(Claim(verb="bound", statement="S1"),),
)

Ints = NDArray[np.int64]

BLOCKS = 8
"""How many summaries of evicted keys a state holds, at most, unless told: D² numbers each, however long the stream."""


class Gradients(NamedTuple):
    """Gradients by argument name."""

    q: Any
    k: Any
    v: Any


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


class Certificate(NamedTuple):
    """A stream's output `o` (..., T, E), and how far from exact causal attention over the whole stream it can be.

    `mass` encloses the softmax mass (..., T) of what each row had to leave out, and `error` (..., T, E) is |õ − o|
    at most.
    """

    o: Any
    mass: Interval
    error: Any


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    length: int = 1,
    memory: int,
    sinks: int = 0,
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    """Exact softmax over the row's segment up to itself, the memory before it, and the first keys.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    length : int
        L ≥ 1: segments begin at the multiples of L on the key axis, where row i stands at i + S − T.
    memory : int
        M ≥ 0: keys before the segment; with L = 1, before the row.
    sinks : int
        s ≥ 0: the first keys of all, which every row after them sees.
    mask : Mask or (..., T, S) of bool, optional
        What may be seen at all. The method is causal without one.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn.memory import segments
    >>> x = np.zeros((4, 1))
    >>> segments.attend(x, x, [[0.0], [3.0], [6.0], [9.0]], length=2, memory=1)
    array([[0. ],
           [1.5],
           [4.5],
           [6. ]])
    """
    pairs = masks.meet(mask, _pattern(length, memory, sinks))
    return softmax.attend(q, k, v, mask=pairs, scale=scale, backend=backend)


def weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    length: int = 1,
    memory: int,
    sinks: int = 0,
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    """Return the attention matrix, (..., T, S), which is 0 outside segment, memory and sinks.

    >>> from refattn.memory import segments
    >>> x = np.zeros((4, 1))
    >>> segments.weights(x, x, memory=1, sinks=1)[3].round(3)
    array([0.333, 0.   , 0.333, 0.333])
    """
    return softmax.weights(q, k, mask=masks.meet(mask, _pattern(length, memory, sinks)), scale=scale)


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    length: int = 1,
    memory: int,
    sinks: int = 0,
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    """Gradients of ⟨do, o⟩: softmax's over the mask.

    They are those of the map. Transformer-XL's training takes the memory for a constant and drops the part of `k` and
    `v` that rows of later segments send.

    >>> from refattn.memory import segments
    >>> x = np.zeros((2, 1))
    >>> segments.vjp(np.ones((2, 1)), x, x, x, memory=1).v
    array([[1.5],
           [0.5]])
    """
    pairs = masks.meet(mask, _pattern(length, memory, sinks))
    return Gradients(*softmax.vjp(do, q, k, v, mask=pairs, scale=scale, backend=backend)[:3])


def step(
    state: State | None,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    length: int = 1,
    memory: int,
    sinks: int = 0,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> tuple[NDArray[np.floating[Any]], State]:
    """Take any number of tokens: each sees itself and what of the past the method keeps.

    `state` None starts. Any split of a sequence into steps gives `attend` of the whole, up to rounding, and the same
    state to the last bit.

    Raises
    ------
    ValueError, TypeError
        As `attend`, and for a state that does not hold what these options keep.

    Examples
    --------
    >>> from refattn.memory import segments
    >>> o, state = segments.step(None, [[0.0]] * 3, [[0.0]] * 3, [[1.0], [3.0], [5.0]], memory=1)
    >>> segments.step(state, [[0.0]], [[0.0]], [[7.0]], memory=1)[0]
    array([[6.]])
    """
    now = _Stream(state, q, k, v, length, memory, sinks)
    o = softmax.attend(q, now.k, now.v, mask=now.seen(), scale=scale, backend=backend)
    return o, now.later()


def certify(
    state: State | None,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    length: int = 1,
    memory: int,
    sinks: int = 0,
    blocks: int = BLOCKS,
    scale: float | None = None,
) -> tuple[Certificate, State]:
    r"""Take tokens as `step` does, and bound how far each output is from exact causal attention, without evicted keys.

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \bar\rho_i \max\Big(\max_{j \in D_i} v_{jc} - \tilde o_{ic},\;
        \tilde o_{ic} - \min_{j \in D_i} v_{jc}\Big), \qquad
        \rho_i \le \bar\rho_i = \frac{1}{1 + e^{\mathrm{lse}_i - U_i}}

    D_i are the keys that row i would see but for this method, ρ_i their mass, lse_i is over those that it keeps, and
    U_i bounds the log-sum-exp over D_i from summaries of them (M1: S1 with S2's two points). A row's summaries are of
    exactly the keys that it has lost, which join the nearest as they are evicted (`refattn.dropped.Blocks.absorb`).
    Exact attention is over all of the past: a stream has no mask.

    Parameters
    ----------
    blocks : int
        How many summaries there are, at most. More are tighter and dearer: a token costs O(blocks·D²) beside its
        attention, and so does the state.

    Returns
    -------
    Certificate, State
        Mathematical: rounding is not in it. The state is the one that `step` returns. Any split gives the same bounds,
        up to the rounding of o and lse.

    Raises
    ------
    ValueError, TypeError
        As `step`.

    Examples
    --------
    >>> from refattn.memory import segments
    >>> x = np.zeros((3, 1))
    >>> (o, mass, error), state = segments.certify(None, x, x, [[0.0], [3.0], [3.0]], memory=0)
    >>> print(mass.high.round(12), error.ravel().round(12), state.k.shape)
    [0.         0.5        0.66666667] [0.  1.5 2. ] (0, 1)
    """
    now = _Stream(state, q, k, v, length, memory, sinks, blocks)
    o, lse = softmax.partial(q, now.k, now.v, mask=now.seen(), scale=scale)
    mass, error = Interval(np.zeros(lse.shape), np.zeros(lse.shape)), np.zeros(o.shape)
    joined = leads({"q": o.shape[:-2]}, {"v": np.shape(v)[:-2]})
    for first in np.unique(now.first):
        rows, past = now.first == first, now.forget(int(first))
        gone = np.ones((int(rows.sum()), past.evicted.centre.shape[-2]), bool)
        query = np.asarray(q)[..., rows, :]
        own = dropped.mass_from_blocks(query, past.evicted, lse[..., rows], dropped=gone, scale=scale)
        for end, value in zip(mass, own, strict=True):
            end[..., rows] = value
        if gone.shape[1]:
            low, high = (_repeated(x, joined) for x in (past.low, past.high))
            reach = np.maximum(high - o[..., rows, :], o[..., rows, :] - low)
            error[..., rows, :] = own.high[..., None] * reach
    return Certificate(o, mass, error), now.later()


def exact(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, mask: MaskLike = None, scale: float | None = None
) -> NDArray[np.floating[Any]]:
    """Exact causal softmax attention: what `bound` is measured against, as the method never looks ahead.

    >>> from refattn.memory import segments
    >>> x = np.zeros((2, 1))
    >>> segments.exact(x, x, [[1.0], [3.0]])
    array([[1.],
           [2.]])
    """
    return softmax.attend(q, k, v, mask=masks.meet(mask, masks.causal()), scale=scale)


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    length: int = 1,
    memory: int,
    sinks: int = 0,
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from `exact`, at most (S1 with the row's own dropped keys, elementwise).

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \rho_i \max\Big(\max_{j \in D_i} v_{jc} - \tilde o_{ic},\;
        \tilde o_{ic} - \min_{j \in D_i} v_{jc}\Big)

    D_i are the keys up to row i's position that it does not look at although the mask lets it, and ρ_i is their
    softmax mass, which takes every logit: O(T·S·D) time, a tile at a time. `certify` needs none of them.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.memory import segments
    >>> x = np.zeros((3, 1))
    >>> segments.bound(x, x, [[0.0], [3.0], [3.0]], memory=0).round(12)
    array([[0. ],
           [1.5],
           [2. ]])
    """
    pattern = _pattern(length, memory, sinks)
    return dropped.bound(q, k, v, kept=pattern, mask=masks.meet(mask, masks.causal()), scale=scale)


def cost(
    T: int,
    S: int,
    D: int,
    E: int,
    *,
    length: int = 1,
    memory: int,
    sinks: int = 0,
    mask: MaskLike = None,
) -> Cost:
    """Return what one head costs: 2(D + E) flops a pair that is seen.

    >>> from refattn.memory import segments
    >>> segments.cost(4, 4, 2, 2, length=2, memory=1).pairs
    8
    """
    _check.sizes(T, S, D, E)
    pairs = int(np.max(masks.meet(mask, _pattern(length, memory, sinks)).on(T, S).count, initial=0))
    return Cost(pairs=pairs, flops=2 * pairs * (D + E), bytes=8 * (T + S) * (D + E))


def _pattern(length: int, memory: int, sinks: int) -> Mask:
    near = masks.segmented(length, memory)
    return near if _check.integer("sinks", sinks, 0) == 0 else near | (masks.prefix(sinks) & masks.causal())


def _repeated(x: NDArray[np.float64], joined: Leads) -> NDArray[np.float64]:
    """Return what each problem reads of the values' extremes, (..., 1, E)."""
    E = x.shape[-1]
    return x.reshape(math.prod(x.shape[:-1]), E)[joined.of["v"]].reshape(*joined.shape, 1, E)


class _Stream:
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
            if isinstance(x, Arithmetic):
                raise TypeError(f"{name} is a {type(x).__name__}; expected an array of real numbers")
        q, k, v = _check.qkv(q, k, v)
        n, D, E = q.shape[-2], k.shape[-1], v.shape[-1]
        _check.size("k", k.shape[-2], n, "S", "q's T")
        _pattern(length, memory, sinks)
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
