r"""What leaving keys out costs: softmax over some of the keys against softmax over all that the mask allows.

A row may see the set A, and looks at K, the part of it that is kept; D = A \\ K is dropped. With o over A, õ over K,

.. math::
    \tilde o - o = \rho\,(\tilde o - \mu_D), \qquad \rho = \sum_{j \in D} p_j = \mathrm{TV}(p, p_K)
    = \frac{1}{1 + e^{\mathrm{lse}_K - \mathrm{lse}_D}}

where :math:`\mu_D` is the mean of v over D under p. Among all weights supported on K none is nearer to p in total
variation than softmax over K, at distance ρ. So a sparse method's error is ρ times a distance within the values:
`bound` computes both, `mass` ρ alone, `mass_from_blocks` encloses ρ without reading the dropped keys, and the rest
bounds it before any key is read. The bounds are mathematics evaluated in float64: whoever compares adds the rounding.
Statements are numbered as in `proofs/README.md`, and `proofs/test_dropped.py` derives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, masks, softmax
from refattn._pairs import Ints, ranges
from refattn.heads import leads, matrix
from refattn.masks import Mask, MaskLike, Pairs
from refattn.partial import Partial
from refattn.rounding import gamma

Array = NDArray[np.float64]
Form = Literal["two_point", "cosh", "box", "ball"]
FORMS: tuple[str, ...] = ("two_point", "cosh", "box", "ball")

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
    rho = _share(softmax.partial(q, k, values[..., :0], mask=far, scale=scale).lse, lse)
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
    return _share(far, near)


class Interval(NamedTuple):
    """A lower and an upper bound."""

    low: Any
    high: Any


class Blocks(NamedTuple):
    """What is remembered of each block of keys: B blocks, without the keys.

    `count` (..., B) or (B,), `centre` (..., B, D), `covariance` (..., B, D, D) with divisor `count`, `radius` (..., B)
    about the centre, within which the block's keys lie, and the corners `low` and `high` (..., B, D).
    """

    count: Any
    centre: Any
    covariance: Any
    radius: Any
    low: Any
    high: Any

    @classmethod
    def of(cls, k: ArrayLike, size: int | Sequence[int]) -> Blocks:
        """Summarise keys (..., S, D) in blocks of `size`, of which the last may be shorter, or of the sizes given.

        Examples
        --------
        >>> Blocks.of([[0.0], [2.0], [7.0]], 2).centre
        array([[1.],
               [7.]])
        """
        k = np.asarray(_check.array("k", k, "S D"), np.float64)
        count, D = np.array(_check.parts("size", size, k.shape[-2]), np.int64), k.shape[-1]
        few, stops = (*k.shape[:-2], len(count)), np.cumsum(count)
        out = cls(
            count,
            np.zeros((*few, D)), np.zeros((*few, D, D)), np.zeros(few), np.zeros((*few, D)), np.zeros((*few, D)),
        )  # fmt: skip
        for b, (start, stop) in enumerate(zip(stops - count, stops, strict=True)):
            keys = k[..., start:stop, :]
            out.centre[..., b, :] = keys.mean(axis=-2)
            away = keys - out.centre[..., b : b + 1, :]
            out.covariance[..., b, :, :] = np.swapaxes(away, -1, -2) @ away / keys.shape[-2]
            out.radius[..., b] = np.sqrt((away * away).sum(axis=-1)).max(axis=-1)
            out.low[..., b, :], out.high[..., b, :] = keys.min(axis=-2), keys.max(axis=-2)
        return out

    def join(self, other: Blocks) -> Blocks:
        r"""Summarise the union of each block with the other's block of that place, without the keys (M1).

        .. math::
            c = c_a + \tfrac{n_b}{n} (c_b - c_a), \qquad
            \Sigma = \frac{n_a \Sigma_a + n_b \Sigma_b}{n} + \frac{n_a n_b}{n^2} (c_b - c_a)(c_b - c_a)^\top

        Count, centre, covariance and corners are those of the union. The radius is at least the union's own: it is the
        smaller of :math:`\max(r_a + \lVert c_a - c \rVert,\; r_b + \lVert c_b - c \rVert)` and the distance from c
        to the farthest corner.

        Examples
        --------
        >>> a, b = Blocks.of([[0.0], [2.0]], 2), Blocks.of([[7.0]], 1)
        >>> a.join(b).centre, a.join(b).radius
        (array([[3.]]), array([4.]))
        """
        a, b, n = self, other, self.count + other.count
        share, away = b.count / n, b.centre - a.centre
        centre, apart = a.centre + share[..., None] * away, _norm(away)
        between = (a.count * share)[..., None, None] * (away[..., :, None] * away[..., None, :])
        within = a.count[..., None, None] * a.covariance + b.count[..., None, None] * b.covariance
        low, high = np.minimum(a.low, b.low), np.maximum(a.high, b.high)
        radius = np.maximum(a.radius + share * apart, b.radius + (a.count / n) * apart)
        radius = np.minimum(radius, _norm(np.maximum(high - centre, centre - low)))
        return Blocks(n, centre, (within + between) / n[..., None, None], radius, low, high)

    def absorb(self, k: ArrayLike, limit: int) -> Blocks:
        r"""Take in keys (..., S, D), one at a time, and keep at most `limit` blocks.

        Each key starts a block of its own; where that is one too many, the two nearest blocks join, which are those
        whose joining adds least to the spread within blocks, :math:`\tfrac{n_a n_b}{n_a + n_b} \lVert c_a - c_b
        \rVert^2` (Ward 1963). Each of the leading axes, which are the keys', joins its own.

        Examples
        --------
        >>> Blocks.of(np.zeros((0, 1)), 1).absorb([[0.0], [7.0], [1.0]], 2).centre
        array([[0.5],
               [7. ]])
        """
        k = np.asarray(_check.array("k", k, "S D"), np.float64)
        limit, lead, D = _check.integer("limit", limit, 1), k.shape[:-2], k.shape[-1]
        if self.centre.shape[:-2] != lead or self.centre.shape[-1] != D:
            raise ValueError(f"k has shape {k.shape}; expected leading axes and D of blocks, {self.centre.shape}")
        heads, many, S = math.prod(lead), self.centre.shape[-2], k.shape[-2]
        places, tails = max(many, min(many + S, limit)) + 1, [(), (D,), (D, D), (), (D,), (D,)]
        flat = Blocks(*(np.zeros((heads, places, *tail), x.dtype) for x, tail in zip(self, tails, strict=True)))
        for x, own, tail in zip(flat, self, tails, strict=True):
            x[:, :many] = np.broadcast_to(own, (*lead, many, *tail)).reshape(heads, many, *tail)
        with np.errstate(over="ignore", invalid="ignore"):  # of what is not finite nothing is known
            while many > limit:
                _join_nearest(flat, many)
                many -= 1
            for key in np.moveaxis(k.reshape(heads, S, D), 1, 0):
                for x, own in zip(flat, (1, key, 0.0, 0.0, key, key), strict=True):
                    x[:, many] = own
                if many == limit:
                    _join_nearest(flat, many + 1)
                many = min(many + 1, limit)
        return Blocks(*(x[:, :many].reshape(*lead, many, *tail) for x, tail in zip(flat, tails, strict=True)))

    def one(self, flat: int | np.intp) -> Blocks:
        """Return the summaries at a flat index into the leading axes, as views."""
        at = np.unravel_index(flat, self.centre.shape[:-2])
        return Blocks(np.broadcast_to(self.count, self.radius.shape)[at], *(x[at] for x in self[1:]))

    def deviation(self, q: Array) -> Deviation:
        r"""Enclose what q·(k_j − c_b) is over each block (S2): blocks without leading axes, q (T, D) times the scale.

        With variance ς², no key is farther than ς√(n_b − 1) from the mean, and no two are farther apart than ς√(2n_b).

        Examples
        --------
        >>> x = Blocks.of([[-1.0], [1.0]], 2).deviation(np.array([[1.0]]))
        >>> print(x.span.round(6), x.log_mean.low.round(6), x.log_mean.high.round(6), np.log(np.cosh(1.0)).round(6))
        [[2.]] [[0.433781]] [[0.433781]] 0.433781
        """
        n, up, down = self.count, np.maximum(q, 0.0), np.minimum(q, 0.0)
        above, below = (self.high - self.centre).T, (self.low - self.centre).T
        ball = np.sqrt((q * q).sum(axis=1))[:, None] * self.radius
        variance = np.zeros(ball.shape)
        for b, covariance in enumerate(self.covariance):
            variance[:, b] = ((q @ covariance) * q).sum(axis=1)
        # What rounding leaves unknown of the variance goes outward: the upper end may rise steeply with it.
        blur = gamma(2 * q.shape[1] + int(n.max(initial=0)) + 8) * np.square(ball)
        most = np.maximum(variance, 0.0) + blur
        far = np.minimum(ball, np.sqrt(most * (n - 1)))
        left, right = -np.clip(-(up @ below + down @ above), 0.0, far), np.clip(up @ above + down @ below, 0.0, far)
        # ς² ≤ R₋R₊, without which the lower end could pass R₊.
        least = np.clip(variance - blur, 0.0, -left * right)
        return Deviation(
            np.minimum(right - left, np.sqrt(2 * n * most)), Interval(_two_point(left, least), _two_point(right, most))
        )


class Deviation(NamedTuple):
    r"""What :math:`x_j = \sigma q \cdot (k_j - c_b)` is over the keys of each block, (T, B).

    `span` is at least max x − min x, and `log_mean` encloses :math:`\ln \big(\tfrac{1}{n_b} \sum_j e^{x_j}\big)`.
    """

    span: Any
    log_mean: Interval


def mass_from_blocks(
    q: ArrayLike,
    blocks: Blocks,
    lse: ArrayLike,
    *,
    dropped: ArrayLike,
    scale: float | None = None,
    form: Form = "two_point",
) -> Interval:
    r"""Enclose the dropped mass ρ from summaries of the blocks that each row leaves out (S2).

    With :math:`x_j = \sigma q \cdot (k_j - c_b)`, of mean 0, variance ς² and range [−R₋, R₊] in block b,

    .. math::
        \ln \frac{R_-^2 e^{\varsigma^2/R_-} + \varsigma^2 e^{-R_-}}{R_-^2 + \varsigma^2}
        \;\le\; \ln \Big(\frac{1}{n_b} \sum_{j \in b} e^{x_j}\Big) \;\le\;
        \ln \frac{R_+^2 e^{-\varsigma^2/R_+} + \varsigma^2 e^{R_+}}{R_+^2 + \varsigma^2}

    and ρ increases with the sum over the dropped blocks. R is the smallest of the ball's ‖σq‖·radius, the box's side
    and ς√(n_b − 1), so that no other form here is tighter, on either end. Equal when a block has one place, or two
    along one axis; on the side of a key that is apart from all others, which are in one place, along any.

    Parameters
    ----------
    q : (..., T, D)
        Queries.
    blocks : Blocks
        Summaries of all keys, with the keys' leading axes.
    lse : (..., T)
        Log-sum-exp of each row over what it keeps, as `refattn.softmax.partial` returns it.
    dropped : (..., T, B) of bool
        The blocks that each row leaves out whole; every other key that it may see has to be in `lse`.
    scale : float, optional
        σ; the real number 1/√D unless given.
    form : {"two_point", "cosh", "box", "ball"}
        ``"cosh"`` is ln cosh R above and 0 below, ``"box"`` the corners, ``"ball"`` ±R. ``"two_point"`` costs O(B·D²)
        a row, the others O(B·D).

    Returns
    -------
    Interval of (..., T)
        low ≤ ρ ≤ high.

    Examples
    --------
    >>> from refattn import dropped
    >>> blocks = dropped.Blocks.of([[-1.0], [1.0]], 2)
    >>> low, high = dropped.mass_from_blocks([[1.0]], blocks, [np.log(np.cosh(1.0)) + np.log(2.0)], dropped=[[True]])
    >>> print(low.round(9), high.round(9))
    [0.5] [0.5]
    """
    q, lse = (np.asarray(_check.array(s, x, axes), np.float64) for s, x, axes in (("q", q, "T D"), ("lse", lse, "T")))
    _check.size("blocks", blocks.centre.shape[-1], q.shape[-1], "D", "q")
    _check.size("lse", lse.shape[-1], q.shape[-2], "T", "q")
    _check.choice("form", form, FORMS)
    left = np.asarray(dropped)
    T, B = q.shape[-2], blocks.centre.shape[-2]
    if left.dtype != np.bool_ or left.shape[-2:] != (T, B):
        raise ValueError(f"dropped is {left.dtype} of shape {left.shape}; expected bool of shape (..., {T}, {B})")
    sigma = _check.scale(scale, q.shape[-1])
    joined = leads(
        {"q": q.shape[:-2], "dropped": left.shape[:-2], "lse": lse.shape[:-1]}, {"blocks": blocks.centre.shape[:-2]}
    )
    ends = Interval(np.zeros((*joined.shape, T)), np.zeros((*joined.shape, T)))
    for n in range(math.prod(joined.shape)):
        at = {name: int(index[n]) for name, index in joined.of.items()}
        summary = blocks.one(at["blocks"])
        gone, own = matrix(left, at["dropped"]), lse[np.unravel_index(at["lse"], lse.shape[:-1])]
        with np.errstate(over="ignore", invalid="ignore"):  # where logits overflow the ends are NaN
            for end, level in zip(ends, _levels(sigma * matrix(q, at["q"]), summary, form), strict=True):
                end[np.unravel_index(n, joined.shape)] = _share(_lse(np.where(gone, level, -np.inf)), own)
    return ends


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
    return _share(_log(keys - kept) - gap, _log(kept))


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
    return _share(_log(keys - s.shape[-1]) + least, _lse(s))


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
    return _share(span - slope * near + _log(-np.expm1(-slope * left)), _log(-np.expm1(-slope * near)))


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


def _join_nearest(blocks: Blocks, many: int) -> None:
    """Join the two nearest of each head's first blocks, (heads, places, ...), in place; then one place less is used."""
    n, centre, (left, right) = blocks.count, blocks.centre, np.triu_indices(many, 1)
    away, a, b = centre[:, left] - centre[:, right], n[:, left], n[:, right]
    nearest = ((away * away).sum(axis=-1) * (a * (b / (a + b)))).argmin(axis=1)
    first, second = left[nearest], right[nearest]
    head = np.arange(len(n))
    one, other = (Blocks(*(x[head, at] for x in blocks)) for at in (first, second))
    for x, joined in zip(blocks, one.join(other), strict=True):
        x[head, second] = x[:, many - 1]
        x[head, first] = joined


def _norm(x: Array) -> Array:
    """Return the Euclidean norm over the last axis."""
    return np.sqrt((x * x).sum(axis=-1))


def _levels(q: Array, blocks: Blocks, form: str) -> tuple[Array, Array]:
    """Bound the log-sum-exp of each block, (T, B), from below and above; q is scaled."""
    middle = np.log(blocks.count) + q @ blocks.centre.T
    if form == "two_point":
        low, high = blocks.deviation(q).log_mean
        return middle + low, middle + high
    up, down = np.maximum(q, 0.0), np.minimum(q, 0.0)
    above, below = (blocks.high - blocks.centre).T, (blocks.low - blocks.centre).T
    ball = np.sqrt((q * q).sum(axis=1))[:, None] * blocks.radius
    if form == "box":
        return middle + up @ below + down @ above, middle + up @ above + down @ below
    if form == "ball":
        return middle - ball, middle + ball
    return middle, middle + np.logaddexp(ball, -ball) - math.log(2)


def _two_point(end: Array, variance: Array) -> Array:
    """Return ln E e^X of the X of mean 0 and this variance that is either `end` or one other number."""
    still = end == 0
    end = np.where(still, 1.0, end)
    whole = end * end + variance
    with np.errstate(invalid="ignore"):  # logaddexp warns of NaN, which may stand in blocks that nobody drops
        both = np.logaddexp(_log(variance / whole) + end, np.log(end * end / whole) - variance / end)
    return np.where(still, 0.0, both)


def _share(dropped: Array, kept: Array) -> Array:
    """Return e^dropped / (e^dropped + e^kept), and 0 where both are −inf."""
    top = np.maximum(dropped, kept)
    shift = np.where(np.isneginf(top), 0.0, top)
    a, b = np.exp(dropped - shift), np.exp(kept - shift)
    return np.divide(a, a + b, out=np.zeros(top.shape), where=a + b != 0)


def _lse(x: Array) -> Array:
    """Log-sum-exp over the last axis; −inf where there is nothing."""
    top: Array = x.max(axis=-1, initial=-np.inf)
    shift = np.where(np.isneginf(top), 0.0, top)
    return shift + _log(np.exp(x - shift[..., None]).sum(axis=-1))


def _log(x: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(x)


def _real(name: str, value: ArrayLike, least: float = -np.inf) -> Array:
    """Widen real numbers to float64 and refuse those below `least`; NaN passes."""
    x = np.asarray(_check.array(name, value, ""), np.float64)
    if np.any(x < least):
        raise ValueError(f"{name} is {x.min():g} somewhere; expected at least {least:g}")
    return x
