r"""What is remembered of a block of keys that are gone: enough to enclose the softmax mass that they had.

With n_b keys of mean c_b in block b and :math:`x_j = \sigma q \cdot (k_j - c_b)`, the dropped mass of a row is

.. math::
    \rho = \frac{1}{1 + e^{\mathrm{lse} - L}}, \qquad
    L = \ln \sum_b e^{\sigma q \cdot c_b} \sum_{j \in b} e^{x_j}

where lse is over the keys that it keeps and b runs over the blocks that it drops. `Blocks` holds each block's count,
mean, covariance, radius and corners, O(D²) numbers; two may join without their keys. `Blocks.deviation` encloses the
mean of e^x over a block, and `mass_from_blocks` ρ. The bounds are mathematics evaluated in float64: whoever compares
adds the rounding. Statements S2 and M1 are derived in `proofs/test_blocks.py` and `proofs/memory/test_segments.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, _logs
from refattn.heads import leads, matrix
from refattn.rounding import gamma

Array = NDArray[np.float64]
Form = Literal["two_point", "cosh", "box", "ball"]
FORMS: tuple[str, ...] = ("two_point", "cosh", "box", "ball")


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
    >>> blocks = Blocks.of([[-1.0], [1.0]], 2)
    >>> low, high = mass_from_blocks([[1.0]], blocks, [np.log(np.cosh(1.0)) + np.log(2.0)], dropped=[[True]])
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
                lost = _logs.log_sum_exp(np.where(gone, level, -np.inf))
                end[np.unravel_index(n, joined.shape)] = _logs.share(lost, own)
    return ends


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
        both = np.logaddexp(_logs.log(variance / whole) + end, np.log(end * end / whole) - variance / end)
    return np.where(still, 0.0, both)
