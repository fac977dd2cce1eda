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

from refattn import dropped, masks, softmax
from refattn.blocks import Interval, mass_from_blocks
from refattn.engines import Backend
from refattn.heads import Leads, leads
from refattn.masks import MaskLike
from refattn.memory._stream import BLOCKS, State, Stream, pattern
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
            typical=lambda n: tuple(sorted({max(1, min(n["S"], 8192) // d) for d in (64, 32, 16, 8, 4)})),
        ),
        "sinks": Option(doc="s, first keys that stay", domain=lambda n: n >= 0, typical=(0, 2), default=0),
    },
    budget="memory",
    variants=({"sinks": 4}, {"length": 32}),
    masks="any",
    causal=True,
    rows="stochastic",
    permutable=False,
    claims=(
        Claim(
            verb="bound",
            statement="S1",
            assumes=(
                "Nothing beyond finite arrays: it reads every logit up to the row's position, the forgotten keys' too."
            ),
        ),
    ),
)


class Gradients(NamedTuple):
    """Gradients by argument name."""

    q: Any
    k: Any
    v: Any


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
    pairs = masks.meet(mask, pattern(length, memory, sinks))
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
    return softmax.weights(q, k, mask=masks.meet(mask, pattern(length, memory, sinks)), scale=scale)


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
    pairs = masks.meet(mask, pattern(length, memory, sinks))
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
    now = Stream(state, q, k, v, length, memory, sinks)
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
    exactly the keys that it has lost, which join the nearest as they are evicted (`refattn.blocks.Blocks.absorb`).
    Exact attention is over all of the past: a stream has no mask.

    Parameters
    ----------
    blocks : int
        How many summaries there are, at most. More are tighter and dearer: a token costs O(blocks·D·(blocks + D))
        beside its attention, and the state O(blocks·D²).

    Returns
    -------
    Certificate, State
        Mathematical: rounding is not in it. The state is the one that `step` returns, but for the number of blocks. Any
        split gives the same bounds, up to the rounding of o and lse.

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
    now = Stream(state, q, k, v, length, memory, sinks, blocks)
    o, lse = softmax.partial(q, now.k, now.v, mask=now.seen(), scale=scale)
    mass, error = Interval(np.zeros(lse.shape), np.zeros(lse.shape)), np.zeros(o.shape)
    joined = leads({"q": o.shape[:-2]}, {"v": np.shape(v)[:-2]})
    for first in np.unique(now.first):
        rows, past = now.first == first, now.forget(int(first))
        gone = np.ones((int(rows.sum()), past.evicted.centre.shape[-2]), bool)
        query = np.asarray(q)[..., rows, :]
        own = mass_from_blocks(query, past.evicted, lse[..., rows], dropped=gone, scale=scale)
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
    kept = pattern(length, memory, sinks)
    return dropped.bound(q, k, v, kept=kept, mask=masks.meet(mask, masks.causal()), scale=scale)


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
    return softmax.cost(T, S, D, E, mask=masks.meet(mask, pattern(length, memory, sinks)))


def _repeated(x: NDArray[np.float64], joined: Leads) -> NDArray[np.float64]:
    """Return what each problem reads of the values' extremes, (..., 1, E)."""
    E = x.shape[-1]
    return x.reshape(math.prod(x.shape[:-1]), E)[joined.of["v"]].reshape(*joined.shape, 1, E)
