r"""What leaving keys out costs: softmax over some of the keys against softmax over all that the mask allows.

A row may see the set A, and looks at K, the part of it that is kept; D = A \\ K is dropped. With o over A, õ over K,

.. math::
    \tilde o - o = \rho\,(\tilde o - \mu_D), \qquad \rho = \sum_{j \in D} p_j = \mathrm{TV}(p, p_K)
    = \frac{1}{1 + e^{\mathrm{lse}_K - \mathrm{lse}_D}}

where :math:`\mu_D` is the mean of v over D under p. Among all weights supported on K none is nearer to p in total
variation than softmax over K, at distance ρ. So a sparse method's error is ρ times a distance within the values:
`bound` computes both, `mass` ρ alone, and the rest bounds it before any key is read. `refattn.blocks` encloses ρ
without the dropped keys. The bounds are mathematics evaluated in float64: whoever compares adds the rounding.
Statements are numbered as in `proofs/README.md`, and `proofs/test_dropped.py` derives them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, _logs, engines, masks, softmax
from refattn._pairs import Ints, ranges
from refattn.heads import matrix
from refattn.masks import Mask, MaskLike, Pairs
from refattn.partial import Partial

Array = NDArray[np.float64]

ROWS = 64
CELLS = 2**22
BLOCK = 16


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    kept: Mask | Pairs | ArrayLike,
    mask: MaskLike = None,
    scale: float | None = None,
) -> Array:
    r"""How far softmax over the kept keys is from softmax over all that the mask allows, at most (S1).

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \rho_i \max\Big(\max_{j \in D_i} v_{jc} - \tilde o_{ic},\;
        \tilde o_{ic} - \min_{j \in D_i} v_{jc}\Big)

    Equal when v is 1 on the dropped keys and 0 on the kept ones. A row that keeps nothing has õ = 0 and ρ = 1.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    kept : Mask or (..., T, S) of bool
        What each row looks at, as far as the mask allows it.
    mask : Mask or (..., T, S) of bool, optional
        What each row may see; everything unless given.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64
        0 for rows that drop nothing. It reads every logit, a tile of rows at a time: O(T·S·D) time.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or masks that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn import dropped, masks
    >>> x = np.zeros((2, 1))
    >>> dropped.bound(x, x, [[0.0], [2.0]], kept=masks.window(0, 0))
    array([[1.],
           [1.]])
    """
    values: Any = _check.array("v", v, "S E")
    near, far = _split(q, k, kept, mask)
    o, lse = softmax.partial(q, k, values, mask=near, scale=scale)
    rho = _logs.share(softmax.partial(q, k, values[..., :0], mask=far, scale=scale).lse, lse)
    return rho[..., None] * reach(q, k, values, o, mask=far)


def reach(q: ArrayLike, k: ArrayLike, v: ArrayLike, o: ArrayLike, *, mask: MaskLike = None) -> Array:
    r"""How far each o is from the farther end of the values that the mask shows its row (P2).

    .. math:: \max\Big(\max_j v_{jc} - o_{ic},\; o_{ic} - \min_j v_{jc}\Big)

    `refattn.perturbation.trivial` for masks: of values and runs alone, in O(S·E·ln S) time and O(E) more a run. Of q
    and k only the shapes matter.

    Parameters
    ----------
    q, k, v, mask
        As in `bound`.
    o : (..., T, E)
        Answers, with the leading axes of q, k, v and mask together.

    Returns
    -------
    (..., T, E) of float64
        0 for rows that see nothing.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or masks that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn import dropped, masks
    >>> x = np.zeros((2, 1))
    >>> dropped.reach(x, x, [[0.0], [4.0]], [[1.0], [1.0]], mask=masks.causal())
    array([[1.],
           [3.]])
    """
    mask = masks.window(None, None) if mask is None else mask
    call = engines.problem(q, k, v, bias=None, sink=None, softcap=None, order="softcap, bias", mask=mask, scale=None)
    T, _, _, E = call.sizes
    o = _check.shaped("o", o, "T E", (*call.leads.shape, T, E))
    out = np.zeros(o.shape)
    for n, one in enumerate(call.all()):
        if one.pairs is not None:
            _reach(matrix(out, n), matrix(o, n), one.v, one.pairs)
    return out


def mass(
    q: ArrayLike,
    k: ArrayLike,
    *,
    kept: Mask | Pairs | ArrayLike,
    mask: MaskLike = None,
    scale: float | None = None,
) -> Array:
    r"""Softmax mass of the keys that each row leaves out, ρ, (..., T): exactly how far its weights move (S1).

    .. math:: \rho_i = \frac{1}{1 + e^{\mathrm{lse}_K - \mathrm{lse}_D}} = \mathrm{TV}(p_i, p_{i,K})

    Arguments are `bound`'s without v. 0 for rows that drop nothing, 1 for rows that drop everything.

    Examples
    --------
    >>> from refattn import dropped, masks
    >>> dropped.mass([[0.0]], np.zeros((4, 1)), kept=masks.window(0, 0))
    array([0.75])
    """
    none: Any = _check.array("k", k, "S D")[..., :0]
    near, far = (softmax.partial(q, k, none, mask=pairs, scale=scale).lse for pairs in _split(q, k, kept, mask))
    return _logs.share(far, near)


def mass_from_gap(gap: ArrayLike, kept: ArrayLike, keys: ArrayLike) -> Array:
    r"""Bound the dropped mass when every kept logit is above every dropped one by a gap Γ, of any sign (S3).

    .. math:: \rho \le \frac{(n - k)\,e^{-\Gamma}}{k + (n - k)\,e^{-\Gamma}}, \qquad
              \Gamma = \min_{j \in K} s_j - \max_{j \in D} s_j

    With |s| ≤ R nothing better than Γ = −2R is known: a window of any kind may drop nearly everything. Equal when the
    kept logits are one number and the dropped ones another.

    Examples
    --------
    >>> print(mass_from_gap(np.log(3.0), 2, 4).round(12))
    0.25
    """
    gap, kept, keys = _real("gap", gap), _real("kept", kept, 0), _real("keys", keys, 0)
    if np.any(kept > keys):
        raise ValueError(f"kept is {kept.max():g} somewhere; expected at most keys, {keys.min():g}")
    return _logs.share(_logs.log(keys - kept) - gap, _logs.log(kept))


def mass_from_topk(logits: ArrayLike, keys: ArrayLike) -> Array:
    r"""Bound the dropped mass when the k kept logits, on the last axis, are the largest of n (S3).

    .. math:: \rho \le \frac{(n - k)\,w_{(k)}}{W_K + (n - k)\,w_{(k)}} \le 1 - \frac kn, \qquad
              w = e^{s}, \quad w_{(k)} = \min_{j \in K} w_j, \quad W_K = \sum_{j \in K} w_j

    Equal when every dropped logit ties with the least kept one. No other set of k keys drops less. Keeping nothing
    drops everything: 1.

    Examples
    --------
    >>> print(mass_from_topk(np.log([3.0, 1.0]), 6).round(12))
    0.5
    """
    s = np.asarray(_check.array("logits", logits, "k"), np.float64)
    keys = _real("keys", keys, s.shape[-1])
    if np.any(np.isinf(keys)):
        raise ValueError("keys is infinite somewhere; expected how many keys there are")
    least = s.min(axis=-1) if s.shape[-1] else np.zeros(s.shape[:-1])  # of nothing kept any number tells the same
    return _logs.share(_logs.log(keys - s.shape[-1]) + least, _logs.log_sum_exp(s))


def mass_from_decay(slope: ArrayLike, window: ArrayLike, span: ArrayLike, keys: ArrayLike = np.inf) -> Array:
    r"""Bound the dropped mass of a causal window when logits fall with distance (S3).

    .. math:: s_j = c_j - \alpha\,d_j: \qquad \rho \le \frac{1}{1 + e^{-\operatorname{osc} c}\,r}, \qquad
              r = \frac{1 - e^{-\alpha (W + 1)}}{e^{-\alpha (W + 1)} - e^{-\alpha n}}
              \;\ge\; e^{\alpha (W + 1)} - 1

    for a row that sees n keys, at the distances d = 0, 1, …, n − 1, and keeps those with d ≤ W. Equal when c is at its
    least on the window and at its greatest outside.

    Parameters
    ----------
    slope : α > 0, such as ALiBi's.
    window : W ≥ 0.
    span : osc c ≥ 0, of the logits without the decay.
    keys : n; any number unless given.

    Examples
    --------
    >>> print(mass_from_decay(np.log(2.0), 1, 0.0).round(12), mass_from_decay(np.log(2.0), 1, 0.0, keys=3).round(12))
    0.25 0.142857142857
    """
    slope, near, span = _real("slope", slope), _real("window", window, 0) + 1, _real("span", span, 0)
    if np.any(slope <= 0):
        raise ValueError(f"slope is {slope.min():g} somewhere; expected numbers above 0")
    left = np.maximum(_real("keys", keys, 0) - near, 0.0)
    return _logs.share(span - slope * near + _logs.log(-np.expm1(-slope * left)), _logs.log(-np.expm1(-slope * near)))


def window_for_decay(slope: float, span: float, mass: float) -> int:
    r"""Return the smallest causal window that drops at most a given mass when logits fall with distance (S3).

    .. math:: W + 1 \ge \frac1\alpha \ln\Big(1 + e^{\operatorname{osc} c}\,\frac{1 - \varepsilon}{\varepsilon}\Big)

    The inverse of `mass_from_decay`, for any number of keys.

    Examples
    --------
    >>> window_for_decay(0.5, 2.0, 0.01)
    13
    """
    slope, mass = _check.positive("slope", slope), _check.probability("mass", mass)
    odds = float(_real("span", span, 0)) + math.log1p(-mass) - math.log(mass)
    least = float(np.logaddexp(0.0, odds)) / slope
    return max(math.ceil(least) - 1, 0)


def double_count(most: ArrayLike, least: ArrayLike = 1) -> Array:
    r"""Bound the total variation when key j is counted c_j times, as overlapping parts that are merged do (S4).

    .. math:: \mathrm{TV} \le \tanh\big(\tfrac14 \ln c\big) = \frac{\sqrt c - 1}{\sqrt c + 1}, \qquad
              c = \frac{\max c_j}{\min c_j}

    Equal when the keys counted most have mass 1/(1 + √c).

    Examples
    --------
    >>> print(double_count(4))
    0.3333333333333333
    """
    most, least = _real("most", most, 1), _real("least", least, 1)
    if np.any(most < least):
        raise ValueError(f"most is {most.min():g} somewhere; expected at least least, {least.max():g}")
    root = np.sqrt(most / least)
    return (root - 1) / (root + 1)


def averaging(left: Partial, right: Partial) -> Array:
    r"""Error of averaging two parts over disjoint keys instead of merging them, exactly and with its sign (S4).

    .. math:: \tfrac12 (o_L + o_R) - o = (\tfrac12 - \alpha)(o_L - o_R), \qquad
              \alpha = \frac{1}{1 + e^{\mathrm{lse}_R - \mathrm{lse}_L}}

    Adding them instead makes rows that sum to 2. Takes parts of which each row sees something in at least one.

    Examples
    --------
    >>> from refattn.partial import Partial
    >>> averaging(Partial(np.array([[1.0]]), np.array([0.0])), Partial(np.array([[0.0]]), np.array([np.log(3.0)])))
    array([[0.25]])
    """
    apart = np.asarray(right.lse, np.float64) - left.lse
    return np.tanh(apart / 2)[..., None] / 2 * (left.o - right.o)


def _split(q: Any, k: Any, kept: Any, mask: Any) -> tuple[Mask, Mask]:
    """Return which pairs are kept and which are dropped, of those that the mask allows."""
    T, S = _check.lengths(q, k)
    inner, whole = masks.bind(kept, T, S), masks.bind(mask, T, S)
    if inner is None:
        raise TypeError("kept is None; expected a mask or an array of booleans")
    if whole is None:
        return inner.mask, ~inner.mask
    return masks.meet(whole, inner.mask), masks.meet(whole, ~inner.mask)


def _reach(out: Array, o: Array, v: Array, pairs: Pairs) -> None:
    """Write how far each o is from the farther end of the values over the row's pairs; rows without pairs stay 0.

    A run is whole blocks of keys, whose extremes a table has, and fewer than a block at either end.
    """
    (T, E), S = o.shape, len(v)
    width = max(1, min(E, CELLS // max(1, S)))
    step = max(1, min(ROWS, 4 * CELLS // max(1, S * width)))
    for first in range(0, E, width):
        part = slice(first, first + width)
        columns = np.asarray(v[:, part], np.float64)
        tables = [_Ranges(pick, columns) for pick in (np.maximum, np.minimum)]
        for start in range(0, T, step):
            runs = pairs.runs(slice(start, min(start + step, T)))
            some = np.flatnonzero(np.diff(runs.indptr))
            if len(some) == 0:
                continue
            top, bottom = (table.of(runs.start, runs.stop, runs.indptr[some]) for table in tables)
            mine = o[start + some, part]
            out[start + some, part] = np.maximum(top - mine, mine - bottom)


class _Ranges:
    """Extremes of columns over ranges of rows: of whole blocks by a sparse table, of the rest row by row."""

    def __init__(self, pick: np.ufunc, x: Array) -> None:
        self.pick, self.x = pick, x
        whole = len(x) // BLOCK * BLOCK
        each = pick.reduce(x[:whole].reshape(-1, BLOCK, x.shape[1]), axis=1) if whole else x[:1]
        self.table = np.empty((max(1, len(each).bit_length()), *each.shape))
        self.table[0] = each  # entry (l, b) is the extreme of blocks b, …, b + 2^l − 1: any range is two of them
        for level in range(1, len(self.table)):
            half = 1 << (level - 1)
            count = len(each) - 2 * half + 1
            below = self.table[level - 1]
            self.table[level, :count] = pick(below[:count], below[half : half + count])

    def of(self, start: Ints, stop: Ints, groups: Ints) -> Array:
        """Return the extreme over the ranges from each of `groups` up to the next."""
        first, last = -(-start // BLOCK), stop // BLOCK
        whole = first < last
        left, right = np.where(whole, first * BLOCK, stop), np.where(whole, last * BLOCK, stop)
        _, ends = ranges(np.stack((start, right), axis=1).ravel(), np.stack((left, stop), axis=1).ravel())
        counts = np.cumsum((left - start) + (stop - right))
        level = np.frexp(np.where(whole, last - first, 1))[1] - 1
        found = np.where(
            whole[:, None],
            self.pick(self.table[level, first * whole], self.table[level, (last - (1 << level)) * whole]),
            self.x[start],
        )
        some = np.flatnonzero(np.diff(counts, prepend=0))
        if len(some):
            at = np.r_[0, counts[some][:-1]]
            found[some] = self.pick(found[some], self.pick.reduceat(self.x[ends], at, axis=0))
        return self.pick.reduceat(found, groups, axis=0)


def _real(name: str, value: ArrayLike, least: float = -np.inf) -> Array:
    """Widen real numbers to float64 and refuse those below `least`; NaN passes."""
    x = np.asarray(_check.array(name, value, ""), np.float64)
    if np.any(x < least):
        raise ValueError(f"{name} is {x.min():g} somewhere; expected at least {least:g}")
    return x
