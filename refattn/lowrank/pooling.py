r"""Pooling: keys and values of each segment are replaced by their means.

.. math::
    o_i = \sum_g p_{ig} \bar v_g, \qquad p_{ig} \propto c_g\, e^{\sigma q_i \cdot \bar k_g}, \qquad
    \bar k_g = \frac{1}{c_g} \sum_{j \in g} k_j, \quad \bar v_g = \frac{1}{c_g} \sum_{j \in g} v_j

for segments g of c_g neighbouring keys. Mean pooling is Linformer's, Wang et al. 2020, arXiv:2006.04768, §4, and
compressed memories', Rae et al. 2019, arXiv:1911.05507, without the counts. The count c_g makes it exact where the keys
of each segment are equal; without it, it is not, however equal they are. Every row sees every segment: there is no
causal form. What the means lose is bounded by statement L6, which needs summaries of the segments alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, perturbation, softmax
from refattn._mix import tiles
from refattn.blocks import Blocks
from refattn.engines import Backend
from refattn.heads import leads, matrix
from refattn.lifted import Lifted, concatenate
from refattn.method import Claim, Cost, Method, Option
from refattn.rounding import gamma

Array = NDArray[Any]
Ints = NDArray[np.int64]
Size = int | Sequence[int]
Counts = Literal["kept", "ignored"]
COUNTS: tuple[str, ...] = ("kept", "ignored")
LEAST = 2.0**-900
"""Sums of weights below it may have lost some to underflow."""

METHOD = Method(
    name="pooling",
    family="lowrank",
    paper="arXiv:2006.04768, §4; arXiv:1911.05507",
    arrays={"q": "T D", "k": "S D", "v": "S E"},
    options={
        "size": Option(
            doc="keys a segment, of which the last may have fewer; or those of each segment",
            domain=lambda s: s >= 1 if isinstance(s, int) else all(c >= 1 for c in s),
            typical=(16, 8, 4, 2),
        ),
        "counts": Option(
            doc="whether a segment weighs as many keys as it has, or one",
            domain=COUNTS.__contains__,
            typical=COUNTS,
            default="kept",
        ),
    },
    budget="size",
    masks="none",
    rows="stochastic",
    permutable=False,
    claims=(
        Claim(
            verb="bound",
            statement="L6",
            assumes=(
                "Nothing beyond finite arrays: it reads each key once, for the segments' means, covariances, radii and "
                "boxes."
            ),
        ),
    ),
)


class Gradients(NamedTuple):
    """Gradients by argument name."""

    q: Any
    k: Any
    v: Any


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    size: Size,
    counts: Counts = "kept",
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Attention over the segments' mean keys and values: exact softmax with ln c_g added to their logits.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    size : int or sequence of int
        How many neighbouring keys a segment has; the last may have fewer. Or each segment's own, which sum to S.
    counts : {"kept", "ignored"}
        ``"ignored"`` leaves out ln c_g: every segment weighs as if it were one key.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64
        0 where there is no key.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn.lowrank import pooling
    >>> pooling.attend([[0.0]], [[1.0], [1.0], [5.0]], [[1.0], [2.0], [6.0]], size=2)
    array([[3.]])
    >>> pooling.attend([[0.0]], [[1.0], [1.0], [5.0]], [[1.0], [2.0], [6.0]], size=2, counts="ignored")
    array([[3.75]])
    """
    q, k, v, c = _inputs(q, k, v, size, counts)
    backend = engines.choose(backend, "softmax")
    return softmax.attend(q, _means(k, c), _means(v, c), bias=_logs(k, c, counts), scale=scale, backend=backend)


def weights(
    q: ArrayLike, k: ArrayLike, *, size: Size, counts: Counts = "kept", scale: float | None = None
) -> NDArray[np.float64]:
    r"""Return the effective weights, (..., T, S): each segment's, spread evenly over its keys.

    >>> from refattn.lowrank import pooling
    >>> pooling.weights([[0.0]], [[1.0], [1.0], [5.0], [1.0]], size=[3, 1])
    array([[0.25, 0.25, 0.25, 0.25]])
    """
    q, k, _, c = _inputs(q, k, _check.WEIGHTS, size, counts)
    p = softmax.weights(q, _means(k, c), bias=_logs(k, c, counts), scale=scale)
    return (p / c[None])[..., _segment(c)]


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    size: Size,
    counts: Counts = "kept",
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    r"""Gradients of ⟨do, o⟩: softmax's, spread evenly over the keys of each segment.

    .. math:: dk_j = d\bar k_g / c_g, \qquad dv_j = d\bar v_g / c_g \qquad (j \in g)

    >>> from refattn.lowrank import pooling
    >>> pooling.vjp([[1.0]], [[0.0]], [[1.0], [1.0], [5.0]], [[1.0], [2.0], [6.0]], size=[2, 1], counts="ignored").v
    array([[0.25],
           [0.25],
           [0.5 ]])
    """
    q, k, v, c = _inputs(q, k, v, size, counts)
    backend = engines.choose(backend, "softmax")
    g = softmax.vjp(do, q, _means(k, c), _means(v, c), bias=_logs(k, c, counts), scale=scale, backend=backend)
    at = _segment(c)
    return Gradients(g.q, (g.k / c[:, None])[..., at, :], (g.v / c[:, None])[..., at, :])


def bound(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, size: Size, counts: Counts = "kept", scale: float | None = None
) -> NDArray[np.float64]:
    r"""How far `attend` is from exact, unmasked softmax attention, at most (L6, elementwise).

    It encloses the exact output from summaries of the segments, and goes to the enclosure's farther end. In segment g
    the numbers :math:`x_j = \sigma q \cdot (k_j - \bar k_g)` have mean 0; from the covariance, radius and box of its
    keys S2 encloses the logarithm of the mean of their exponentials in [lo_g, hi_g], and their span in Δ_g. So the
    segment's exact mass is P_g below, and the exact mean of its values is between l_g and u_g:

    .. math::
        |\tilde o - o| \le \max\Big( \max_m \sum_g P_g u_g - \tilde o,\; \tilde o - \min_m \sum_g P_g l_g \Big), \qquad
        P_g \propto c_g\, e^{\sigma q \cdot \bar k_g + m_g}, \quad \mathrm{lo}_g \le m_g \le \mathrm{hi}_g

    .. math::
        u_g = \min\big(\bar v_g + \beta_g,\ \max_{j \in g} v_j\big), \qquad
        \beta_g = \operatorname*{range}_{j \in g} v_j\,
        \max_{f = 1/c_g, \ldots, 1 - 1/c_g} \Big( \frac{f}{f + (1 - f) e^{-\Delta_g}} - f \Big)

    and l_g likewise. It is never more than the distance from õ to the far end of the values' range. The summaries read
    each key once; then a row takes O(G·(D² + E)) time for G segments.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    Two keys in one segment: all is lost that can be.

    >>> from refattn import softmax
    >>> from refattn.lowrank import pooling
    >>> x = [[1.0]], [[0.0], [2.0]], [[0.0], [1.0]]
    >>> error = softmax.attend(*x) - pooling.attend(*x, size=2)
    >>> print(error.round(6), pooling.bound(*x, size=2).round(6))
    [[0.380797]] [[0.380797]]
    """
    o = attend(q, k, v, size=size, counts=counts, scale=scale)
    q, k, v, _ = _inputs(q, k, v, size, counts)
    sigma, out = _check.scale(scale, q.shape[-1]), np.zeros(o.shape)
    with np.errstate(all="ignore"):  # where numbers overflow, only the values' range is known
        blocks = Blocks.of(k, size)
    joined = leads({"o": o.shape[:-2], "q": q.shape[:-2]}, {"k": k.shape[:-2], "v": v.shape[:-2]})
    for n in range(math.prod(joined.shape)):
        own, queries, values = (matrix(x, joined.of[s][n]) for s, x in (("o", o), ("q", _check.widened(q)), ("v", v)))
        claim, summary = perturbation.trivial(values, own), blocks.one(joined.of["k"][n])
        for rows in tiles(np.arange(len(own)), len(summary.count)):
            with np.errstate(all="ignore"):
                low, high = _enclosure(sigma * queries[rows], values, summary)
                off = np.maximum(np.maximum(high - own[rows], own[rows] - low), 0.0)
            claim[rows] = np.fmin(claim[rows], off)
        matrix(out, n)[:] = claim
    return out


def claim_logits(q: ArrayLike, k: ArrayLike, *, size: Size, scale: float | None = None) -> NDArray[np.float64]:
    r"""How far the ends lo and hi of L6, as `bound` computes them, may be inside the real ones, (T,).

    With :math:`X = |\sigma| \sum_a |q_a| \max_j |k_{ja}|`, x is off by at most :math:`\eta = \gamma_{c + 2D + 8} X`
    for the largest count c. The upper end has slope at most 1 in R₊, the lower one at most 2c in R₋ ≥ R₊/(c − 1); with
    the variance, which is off by η² and cut at R₋R₊, it moves by at most 2cη more. Evaluation is within 32 roundings
    of 1 + R, R ≤ 2X. What else the variance may be off by, `refattn.blocks.Blocks.deviation` rounds outward.
    """
    q, k = (np.abs(np.asarray(_check.array(s, x, f"{s} D"), np.float64)) for s, x in (("q", q), ("k", k)))
    most = max(_check.parts("size", size, k.shape[-2]), default=1)
    reach = abs(_check.scale(scale, q.shape[-1])) * (q @ k.max(axis=-2, initial=0.0))
    return 4 * (most + 1) * gamma(most + 2 * q.shape[-1] + 40) * (reach + 1)


def bound_from_radius(radius: float, within: float, across: float, *, ratio: float = 1.0) -> float:
    r"""Bound the error before any key is read: logits of a segment within R of their mean (L6, a priori).

    .. math::
        |\tilde o - o| \le \tanh\!\big(\tfrac14 (\ln \cosh R + \ln r)\big) \operatorname*{range}_g \bar v_g
        + \tanh\!\big(\tfrac12 R\big) \max_g \operatorname*{range}_{j \in g} v_j

    With R = 0, all keys of a segment being equal, what is left is what ignoring the counts costs: (√r − 1)/(√r + 1).

    Parameters
    ----------
    radius
        R ≥ |σ|‖q‖·‖k_j − k̄_g‖ for every key: then `bound` is never above. Or any other bound of |σ q·(k_j − k̄_g)|.
    within, across
        The largest range of values in a segment, and the range of the segments' mean values.
    ratio
        r, 1 where counts are kept; the largest count ÷ the least where they are ignored.

    Raises
    ------
    ValueError, TypeError
        Numbers that are not finite, a negative radius or range, a ratio below 1.

    Examples
    --------
    >>> from refattn.lowrank import pooling
    >>> pooling.bound_from_radius(0.0, 2.0, 3.0)
    0.0
    >>> round(pooling.bound_from_radius(0.0, 2.0, 3.0, ratio=4.0), 12)
    1.0
    """
    given = {"radius": (radius, 0.0), "within": (within, 0.0), "across": (across, 0.0), "ratio": (ratio, 1.0)}
    for name, (value, least) in given.items():
        if _check.finite(name, value) < least:
            raise ValueError(f"{name} is {value}; expected at least {least:g}")
    span = np.logaddexp(radius, -radius) - math.log(2) + math.log(ratio)
    return math.tanh(span / 4) * across + math.tanh(radius / 2) * within


def cost(T: int, S: int, D: int, E: int, *, size: Size) -> Cost:
    """Return what one head costs: exact attention over the segments; the means are sums, which are not counted.

    >>> from refattn.lowrank import pooling
    >>> pooling.cost(8, 8, 4, 4, size=3).pairs
    24
    """
    _check.sizes(T, S, D, E)
    pairs = T * len(_check.parts("size", size, S))
    return Cost(pairs=pairs, flops=2 * pairs * (D + E), bytes=8 * (T + S) * (D + E))


def _inputs(q: Any, k: Any, v: Any, size: Any, counts: Any) -> tuple[Array, Array, Array, Ints]:
    """Check the arguments, and return the arrays, keys and values widened, and how many keys each segment has."""
    q, k, v = _check.qkv(q, k, v)
    _check.choice("counts", counts, COUNTS)
    c = np.array(_check.parts("size", size, k.shape[-2]), np.int64)
    return q, _check.widened(k), _check.widened(v), c


def _means(x: Array, c: Ints) -> Array:
    """Return the mean of each segment, along the last axis but one: a sum, then a division."""
    if len(c) == 0:
        return x
    stops = np.cumsum(c)
    starts = stops - c
    if isinstance(x, Lifted):
        total = concatenate(*(x[a:b].sum(axis=0, keepdims=True) for a, b in zip(starts, stops, strict=True)))
    else:
        total = np.add.reduceat(x, starts, axis=-2)
    return total / c[:, None]


def _logs(k: Array, c: Ints, counts: str) -> Any:
    """Return what the counts add to the logits, (1, G), in the arithmetic of the keys."""
    if counts == "ignored":
        return None
    return np.log(type(k).lift(c[None]) if isinstance(k, Lifted) else c[None])


def _segment(c: Ints) -> NDArray[np.intp]:
    """Return the segment of each key."""
    return np.repeat(np.arange(len(c)), c)


def _enclosure(q: Array, v: Array, blocks: Blocks) -> tuple[Array, Array]:
    """Enclose the exact output of some rows, (T, E) twice; q is scaled."""
    low, high = np.zeros((len(q), v.shape[1])), np.zeros((len(q), v.shape[1]))
    if len(v) == 0:
        return low, high
    span, (lo, hi) = blocks.deviation(q)
    s = np.log(blocks.count) + q @ blocks.centre.T
    peak = (s + hi).max(axis=1, keepdims=True)
    up, down, moved = np.exp(s + hi - peak), np.exp(s + lo - peak), _moved(span, blocks.count)
    starts = np.cumsum(blocks.count) - blocks.count
    mean, top, bottom = _means(v, blocks.count), np.maximum.reduceat(v, starts), np.minimum.reduceat(v, starts)
    for e in range(v.shape[1]):
        beta = moved * (top[:, e] - bottom[:, e])
        low[:, e] = -_highest(up, down, -np.maximum(mean[:, e] - beta, bottom[:, e]))
        high[:, e] = _highest(up, down, np.minimum(mean[:, e] + beta, top[:, e]))
    return low, high


def _moved(span: Array, count: Ints) -> Array:
    """Bound the total variation when c equal weights are tilted by a span: by the worst of the tilts of two values."""
    best = np.zeros(span.shape)
    first = np.floor(count / (1 + np.exp(span / 2)))  # what is bounded is concave in f: the best m is first or next
    for m in (first, first + 1):
        f = np.clip(m, 1, np.maximum(count - 1, 1)) / count
        best = np.maximum(best, f * (1 - f) * -np.expm1(-span) / (f + (1 - f) * np.exp(-span)))
    return best


def _highest(up: Array, down: Array, x: Array) -> Array:
    """Return the largest mean of x in each row when each weight may be `up` or `down`: up above a threshold (P4).

    Newton's method on the threshold, from below: each step drops some of those above it, so it ends.
    """
    t = np.full(len(x), -np.inf)
    while True:
        w = np.where(x > t[:, None], up, down)
        total = w.sum(axis=1)
        new = np.divide((w * x).sum(axis=1), total, out=x.max(axis=1), where=total > LEAST)
        if not (new > t).any():
            return np.maximum(t, new)  # NaN where x is
        t = np.maximum(t, new)
