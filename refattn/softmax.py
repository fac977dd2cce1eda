r"""Exact softmax attention: the definition that everything else is measured against.

.. math::
    s_{ij} = \sigma\, q_i \cdot k_j, \qquad
    p_{ij} = \frac{e^{s_{ij}}}{\sum_{l} e^{s_{il}}}, \qquad
    o_i = \sum_j p_{ij} v_j, \qquad
    \mathrm{lse}_i = \ln \sum_l e^{s_{il}}

over the keys that row i sees. Vaswani et al. 2017, arXiv:1706.03762, eq. (1). Everything is computed in float64, a
tile of rows at a time: memory is O((T + S)·D) plus a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, masks
from refattn._mix import TILE_PAIRS, mix, rows_of
from refattn.bias import Bias, BiasLike, Table
from refattn.engines import Backend, One, Order, Problem
from refattn.heads import matrix
from refattn.lifted import Lifted
from refattn.masks import MaskLike
from refattn.method import Cost, Method, Option
from refattn.partial import Partial

METHOD = Method(
    name="softmax",
    family="",
    paper="arXiv:1706.03762, eq. (1)",
    arrays={"q": "T D", "k": "S D", "v": "S E", "bias": "T S?", "sink": "?"},
    options={
        "softcap": Option(
            doc="cap c of the logits, s → c·tanh(s/c)",
            domain=lambda c: c is None or c > 0,
            typical=(None, 2.0),
            default=None,
        ),
        "order": Option(
            doc="what comes first after the scale",
            domain=engines.ORDERS.__contains__,
            typical=engines.ORDERS,
            default="softcap, bias",
        ),
    },
    linear_in=("v",),
    masks="any",
    approximates=None,
    rows="stochastic",
    permutable=True,
)

Bools = NDArray[np.bool_]

TILE_ROWS = 64


class Gradients(NamedTuple):
    """Gradients by argument name; None for what was not given."""

    q: Any
    k: Any
    v: Any
    bias: Any
    sink: Any


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias: BiasLike = None,
    sink: ArrayLike | None = None,
    softcap: float | None = None,
    order: Order = "softcap, bias",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Exact softmax attention.

    .. math::
        o_i = \frac{\sum_j e^{s_{ij}} v_j}{\sum_j e^{s_{ij}} + e^{\beta}}, \qquad
        s_{ij} = c \tanh(\sigma\, q_i \cdot k_j / c) + b_{ij}

    Parameters
    ----------
    q : (..., T, D)
        Queries. Leading axes broadcast; axis −3 is heads, and query head h reads key head ⌊h / (H / Hk)⌋. Note that
        q (8, T, D) with k (2, S, D) is therefore answered, as grouped heads.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    bias : (..., T, S) or Bias, optional
        Added to the logits; −inf means unseen. `refattn.bias.alibi` makes a lazy one.
    sink : (...), optional
        One logit β a head, in nats, that takes part in the normaliser and carries no value.
    softcap : float, optional
        The cap c > 0.
    order : {"softcap, bias", "bias, softcap"}
        Which of the two comes first; the scale comes before both.
    mask : Mask or (..., T, S) of bool, optional
        Which pairs are seen, True = may look; see `refattn.masks`. Masks have q's leading axes.
    scale : float, optional
        σ; the real number 1/√D unless given, and exact if given.
    backend : str or Backend
        ``"numpy"`` answers in float64. Compiled backends answer in the dtype that they compute in.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0. What is not seen never matters, not even NaN.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument, before any work.

    Examples
    --------
    >>> from refattn import masks, softmax
    >>> q, k, v = np.zeros((2, 1)), np.zeros((2, 1)), np.array([[1.0], [3.0]])
    >>> softmax.attend(q, k, v, mask=masks.causal())
    array([[1.],
           [2.]])
    """
    call = engines.problem(q, k, v, bias=bias, sink=sink, softcap=softcap, order=order, mask=mask, scale=scale)
    return _forward(call, engines.choose(backend, "softmax")).o


def partial(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias: BiasLike = None,
    sink: ArrayLike | None = None,
    softcap: float | None = None,
    order: Order = "softcap, bias",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Partial:
    r"""Exact attention over these keys as a part that merges with others: (o, lse).

    Arguments are `attend`'s; lse, (..., T), is in nats and counts the sink where one is given (give it to one part
    only). A row that sees nothing has o = 0 and lse = −inf, or the sink's logit.

    Examples
    --------
    >>> from refattn import softmax
    >>> softmax.partial([[0.0]], [[0.0], [0.0]], [[1.0], [3.0]]).lse
    array([0.69314718])
    """
    call = engines.problem(q, k, v, bias=bias, sink=sink, softcap=softcap, order=order, mask=mask, scale=scale)
    return _forward(call, engines.choose(backend, "softmax"))


def weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    bias: BiasLike = None,
    sink: ArrayLike | None = None,
    softcap: float | None = None,
    order: Order = "softcap, bias",
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""Return the attention matrix p, (..., T, S), whole: the one verb here whose memory is T×S.

    Arguments are `attend`'s without v. Rows sum to 1; with a sink to less, and to 0 where nothing is seen.

    Examples
    --------
    >>> from refattn import softmax
    >>> softmax.weights([[0.0]], [[0.0], [0.0]])
    array([[0.5, 0.5]])
    """
    call = engines.problem(
        q, k, _check.WEIGHTS, bias=bias, sink=sink, softcap=softcap, order=order, mask=mask, scale=scale
    )
    T, S, _, _ = call.sizes
    if isinstance(call.q, Lifted):
        return call.q.softmax_forward(call.one(0))[0]
    p = np.zeros((*call.leads.shape, T, S))
    for n, one in enumerate(call.all()):
        for tile in _tiles(one):
            matrix(p, n)[np.ix_(tile.rows, tile.keys)] = tile.w / tile.z[:, None]
    return p


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    dlse: ArrayLike | None = None,
    bias: BiasLike = None,
    sink: ArrayLike | None = None,
    softcap: float | None = None,
    order: Order = "softcap, bias",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    r"""Gradients of ⟨do, o⟩ + ⟨dlse, lse⟩ with respect to q, k, v, the bias and the sink (statement B1).

    .. math::
        g_{ij} = do_i \cdot v_j, \quad \Delta_i = do_i \cdot o_i, \quad
        dS_{ij} = p_{ij} (g_{ij} - \Delta_i + d\ell_i), \quad
        dZ_{ij} = dS_{ij} (1 - \tanh^2(\sigma q_i \cdot k_j / c))

    .. math::
        dq_i = \sigma \sum_j dZ_{ij} k_j, \quad dk_j = \sigma \sum_i dZ_{ij} q_i, \quad dv_j = \sum_i p_{ij} do_i, \quad
        db = dS, \quad d\beta = \sum_i p_{i\beta} (d\ell_i - \Delta_i)

    Parameters
    ----------
    do : (..., T, E)
        Cotangent of the output.
    dlse : (..., T), optional
        Cotangent of lse (the one that counts the sink, where there is one).

    Returns
    -------
    Gradients
        Each of the shape of its argument, summed over the axes along which that was broadcast; `bias` for a table
        only, None for what was not given. Rows that see nothing contribute 0.

    Examples
    --------
    >>> from refattn import softmax
    >>> dq, dk, dv, *_ = softmax.vjp([[1.0]], [[1.0]], [[0.0], [0.0]], [[1.0], [3.0]])
    >>> dv
    array([[0.5],
           [0.5]])
    """
    call = engines.problem(q, k, v, bias=bias, sink=sink, softcap=softcap, order=order, mask=mask, scale=scale)
    T, _, _, E = call.sizes
    do = _check.shaped("do", do, "T E", (*call.leads.shape, T, E))
    if dlse is not None:
        dlse = _check.shaped("dlse", dlse, "T", (*call.leads.shape, T))
    chosen = engines.choose(backend, "softmax")
    if isinstance(call.q, Lifted):
        return Gradients(*call.q.softmax_backward(call.one(0), do, dlse))
    if chosen.name != "numpy":
        return engines.ask("softmax", "backward", chosen, call, do, dlse)
    out = _backward(call, do, dlse)
    if out.bias is None or isinstance(bias, Bias):
        return out
    return out._replace(bias=out.bias.reshape(np.asarray(bias).shape))


def cost(T: int, S: int, D: int, E: int, *, mask: MaskLike = None) -> Cost:
    """Return what one head costs: 2(D + E) flops a pair that is seen; of several masks, the dearest.

    >>> from refattn import softmax
    >>> softmax.cost(2, 3, 4, 4).flops
    96
    """
    _check.sizes(T, S, D, E)
    pairs = masks.bind(mask, T, S)
    count = T * S if pairs is None else int(np.max(pairs.count, initial=0))
    return Cost(pairs=count, flops=2 * count * (D + E), bytes=8 * (T + S) * (D + E))


class _Tile(NamedTuple):
    """Some rows against every key that any of them sees: unnormalised weights, and what made them."""

    rows: NDArray[np.intp]
    keys: NDArray[np.intp]
    seen: NDArray[np.bool_] | None
    m: NDArray[np.float64]
    w: NDArray[np.float64]
    sink: NDArray[np.float64]
    z: NDArray[np.float64]
    slope: NDArray[np.float64] | None


def _forward(call: Problem, backend: Backend) -> Partial:
    if isinstance(call.q, Lifted):
        return Partial(*call.q.softmax_forward(call.one(0)))
    if backend.name != "numpy":
        return engines.ask("softmax", "forward", backend, call)
    T, _, _, E = call.sizes
    o, lse = np.zeros((*call.leads.shape, T, E)), np.full((*call.leads.shape, T), -np.inf)
    flat_lse = lse.reshape(math.prod(call.leads.shape), T)
    for n, one in enumerate(call.all()):
        if one.sink is not None:
            flat_lse[n] = one.sink
        for tile in _tiles(one):
            matrix(o, n)[tile.rows] = mix(tile.w, rows_of(one.v, tile.keys), tile.seen) / tile.z[:, None]
            flat_lse[n, tile.rows] = tile.m + np.log(tile.z)
    return Partial(o, lse)


def _backward(call: Problem, do: NDArray[Any], dlse: NDArray[Any] | None) -> Gradients:
    T, of, sigma = call.sizes[0], call.leads.of, call.multiplier
    dq, dk, dv = np.zeros(call.q.shape), np.zeros(call.k.shape), np.zeros(call.v.shape)
    table = call.bias if isinstance(call.bias, Table) else None
    dbias = None if table is None else np.zeros(table.array.shape)
    dsink = None if call.sink is None else np.zeros(call.sink.shape)
    for n, one in enumerate(call.all()):
        cotangent = matrix(do, n)
        dl = np.zeros(T) if dlse is None else np.array(dlse[np.unravel_index(n, call.leads.shape)], np.float64)
        to_q, to_k, to_v = (matrix(x, of[name][n]) for name, x in (("q", dq), ("k", dk), ("v", dv)))
        to_sink = np.array(dl)
        for rows, keys, seen, _, w, sink, z, slope in _tiles(one):
            g, k, v = rows_of(cotangent, rows), rows_of(one.k, keys), rows_of(one.v, keys)
            p, dp = w / z[:, None], g @ v.T
            if seen is not None:
                dp, p = np.where(seen, dp, 0.0), np.where(seen, p, 0.0)
                g = np.where(seen.any(axis=1, keepdims=True), g, 0.0)
            own = dl[rows] - (g * (mix(w, v, seen) / z[:, None])).sum(1)
            ds = p * (dp + own[:, None])
            dz = ds if slope is None else ds * slope
            if seen is not None:
                ds, dz = np.where(seen, ds, 0.0), np.where(seen, dz, 0.0)
            turned = None if seen is None else seen.T
            to_q[rows] += sigma * mix(dz, k, seen)
            to_k[keys] += sigma * mix(dz.T, rows_of(one.q, rows), turned)
            to_v[keys] += mix(p.T, g, turned)
            to_sink[rows] = sink / z * own
            if table is not None and dbias is not None:
                at = table.index(rows, keys)
                db = dz if call.order == "bias, softcap" else ds
                np.add.at(matrix(dbias, of["bias"][n]), at, db)
        if dsink is not None:
            dsink.reshape(-1)[of["sink"][n]] += to_sink.sum()
    return Gradients(dq, dk, dv, dbias, dsink)


def _tiles(one: One) -> Iterator[_Tile]:
    """Yield the rows that see something, a tile at a time, with every key that the tile touches."""
    T, S, pairs = int(one.q.shape[0]), int(one.k.shape[0]), one.pairs
    if S == 0:
        return
    step = max(1, min(TILE_ROWS, TILE_PAIRS // S)) if pairs is None else TILE_ROWS
    order = np.arange(T) if pairs is None else pairs.order()
    for start in range(0, T, step):
        rows, keys = np.sort(order[start : start + step]), np.arange(S)
        if pairs is not None:
            runs = pairs.runs(rows)
            rows, keys = rows[np.diff(runs.indptr) > 0], _union(runs.start, runs.stop)
        few = max(1, TILE_PAIRS // max(1, len(keys)))
        for first in range(0, len(rows), few):
            some = rows[first : first + few]
            yield _tile(one, some, keys, None if pairs is None else pairs.seen(some, keys))


def _tile(one: One, rows: NDArray[np.intp], keys: NDArray[np.intp], seen: Bools | None) -> _Tile:
    call, slope = one.problem, None
    s = (rows_of(one.q, rows) @ rows_of(one.k, keys).T) * call.multiplier
    b = one.bias(rows, keys)
    if b is not None:
        unseen: Bools = b == -np.inf
        if unseen.any():
            seen = ~unseen if seen is None else seen & ~unseen
        if call.order == "bias, softcap":
            s = s + b
    if call.softcap is not None:
        c = call.softcap
        fall = np.exp(-2.0 * np.abs(s / c))
        slope = 4.0 * fall / (1.0 + fall) ** 2
        s = c * np.tanh(s / c)
    if b is not None and call.order == "softcap, bias":
        s = s + b
    if seen is not None and np.logical_and.reduce(seen, axis=None):
        seen = None
    if seen is not None:
        s = np.where(seen, s, -np.inf)
    beta = -np.inf if one.sink is None else float(one.sink)
    m, empty = np.maximum(s.max(axis=1), beta), np.zeros(len(rows), np.bool_)
    if seen is not None and beta == -np.inf:
        empty = ~np.logical_or.reduce(seen, axis=1)
    shift = np.where(empty, 0.0, m)
    w, sink = np.exp(s - shift[:, None]), np.exp(beta - shift)
    return _Tile(rows, keys, seen, m, w, sink, np.where(empty, 1.0, w.sum(axis=1) + sink), slope)


def _union(start: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return the keys in any of these runs, ascending."""
    if len(start) == 0:
        return np.zeros(0, np.intp)
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    gap = np.flatnonzero(start[1:] > reach[:-1])
    first, last = np.concatenate([start[:1], start[gap + 1]]), np.concatenate([reach[gap], reach[-1:]])
    return np.concatenate([np.arange(int(a), int(b)) for a, b in zip(first, last, strict=True)])
