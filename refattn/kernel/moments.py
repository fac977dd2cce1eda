r"""Moments of random features: how far an average over m rows of ω strays from e^{x·y}, and attention from softmax.

Inputs are scaled so that the logit is x·y: x = √σ q, y = √σ k. One row ω ~ N(0, I) gives the kernel value κ, whose mean
is w = e^{x·y} for each kind; with z = x + y,

.. math::
    \text{positive:}\ \ & e^{\omega \cdot z - (\|x\|^2 + \|y\|^2)/2} \\
    \text{hyperbolic:}\ \ & \cosh(\omega \cdot z)\, e^{-(\|x\|^2 + \|y\|^2)/2} \\
    \text{trigonometric:}\ \ & \cos(\omega \cdot (x - y))\, e^{(\|x\|^2 + \|y\|^2)/2}

as the features of `refattn.kernel.features` do for i.i.d. rows of χ_D norms; m rows are averaged. Moments are
*relative*, those of κ/w, unless a function says otherwise: e^{x·y} itself may be out of range. An overflow is ∞.

The series for orthogonal rows and for norms √D have about ‖z‖² terms: beyond 2^16 they are refused.

A bound is mathematics evaluated in float64: whoever compares adds the rounding. Statements are numbered as in
`proofs/README.md`, and `proofs/kernel/test_moments.py` derives them.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, perturbation

Array = NDArray[np.float64]
Kind = Literal["positive", "hyperbolic", "trigonometric"]

KINDS = ("positive", "hyperbolic", "trigonometric")
"""Kinds of unbiased features."""
LONGEST = 2.0**16
"""The largest ‖z‖² whose series are summed: one takes seconds there."""


def kernel_variance(x: ArrayLike, y: ArrayLike, *, kind: Kind) -> Array:
    r"""Return the variance of κ, of one row ω, for each pair (R1): m rows have 1/m of it.

    .. math::
        \text{positive:}\ \ & e^{2 x \cdot y} (e^{\|z\|^2} - 1) \\
        \text{hyperbolic:}\ \ & \tfrac12 e^{-\|x\|^2 - \|y\|^2} (e^{\|z\|^2} - 1)^2 \\
        \text{trigonometric:}\ \ & \tfrac12 e^{\|x\|^2 + \|y\|^2} (1 - e^{-\|x - y\|^2})^2

    Choromanski et al. 2021, arXiv:2009.14794, Lemma 2.

    Parameters
    ----------
    x : (..., T, D)
        √σ q.
    y : (..., S, D)
        √σ k.
    kind
        One of `KINDS`.

    Returns
    -------
    (..., T, S)

    Raises
    ------
    ValueError, TypeError
        Shapes or a kind that do not fit, naming the argument.

    Examples
    --------
    >>> float(kernel_variance([[1.0]], [[-1.0]], kind="positive")[0, 0])
    0.0
    """
    x, y = _pairs(x, y)
    s = _squares(x, y, kind)
    with np.errstate(over="ignore"):
        grown = np.exp(2 * (x @ y.mT) + s)
        return grown * -np.expm1(-s) if kind == "positive" else grown * np.expm1(-s) ** 2 / 2


def relative_variance(x: ArrayLike, y: ArrayLike, *, kind: Kind) -> Array:
    r"""Return the variance of κ/w, of one row ω, for each pair (R1): m rows have 1/m of it.

    .. math::
        e^{\|z\|^2} - 1, \qquad \cosh \|z\|^2 - 1, \qquad \cosh \|x - y\|^2 - 1

    for positive, hyperbolic and trigonometric features. Hyperbolic ones, which take two exponentials a row, have at
    most half the variance of positive ones. Shapes and errors as in `kernel_variance`.

    >>> relative_variance([[1.0]], [[-1.0], [1.0]], kind="positive").round(2)
    array([[ 0. , 53.6]])
    """
    x, y = _pairs(x, y)
    return _excess(_squares(x, y, kind), kind)


def cross_covariances(x: ArrayLike, y: ArrayLike, *, kind: Kind) -> Array:
    r"""Return C_ij, the covariance of κ_i/w_i and κ_j/w_j, of one row ω, for all pairs of keys of each query (R2).

    .. math::
        e^{z_i \cdot z_j} - 1, \qquad \cosh(z_i \cdot z_j) - 1, \qquad \cosh((x - y_i) \cdot (x - y_j)) - 1

    for positive, hyperbolic and trigonometric features. The second moments E κ_iκ_j/(w_iw_j) are 1 + C, but would
    drown C where it is small.

    Parameters
    ----------
    x : (..., D)
        √σ q. Queries are leading axes: each has its own S × S covariances.
    y : (..., S, D)
        √σ k.
    kind
        One of `KINDS`.

    Returns
    -------
    (..., S, S)

    Examples
    --------
    >>> cross_covariances([0.0], [[1.0], [-1.0]], kind="trigonometric").round(3)
    array([[0.543, 0.543],
           [0.543, 0.543]])
    """
    x, y = _real("x", x, "D"), _real("y", y, "S D")
    _check.choice("kind", kind, KINDS)
    _check.size("y", y.shape[-1], x.shape[-1], "D", "x")
    z = y - x[..., None, :] if kind == "trigonometric" else y + x[..., None, :]
    return _excess(z @ z.mT, kind)


def tail_radius(p: ArrayLike, v: ArrayLike, covariances: ArrayLike, count: int, delta: float) -> Array:
    r"""Return a, which |õ − o| of features over `count` independent rows exceeds with probability at most δ (R3).

    .. math::
        \Pr\bigl(|\tilde o - o| > a \ \text{or}\ \textstyle\sum_j \kappa_j \le 0\bigr) \le \delta, \qquad
        a = \frac{\sqrt g}{\sqrt{m \delta} - \sqrt{(1 - \delta) h}}, \qquad
        g = c^\top C c, \quad h = p^\top C p, \quad c_j = p_j (v_j - o)

    and ∞ unless mδ > (1 − δ)h: with fewer rows the normaliser itself may be anything. No smaller radius follows from
    g and h alone. It is for one query and one column; all columns of a query together have ‖õ − o‖₂ > ‖a‖₂ with
    probability at most δ. A shift common to all keys changes C but neither p nor o: where it makes z small it makes the
    radius small. Any unbiased kernel values will do, signed or not, that are averaged over rows ω that are independent
    and alike: not orthogonal ones.

    Parameters
    ----------
    p : (..., S)
        Weights of softmax attention, which sum to 1.
    v : (..., S, E)
        Values.
    covariances : (..., S, S)
        C, of one row ω, as `cross_covariances` has it.
    count
        m, how many rows ω are averaged.
    delta
        δ, strictly between 0 and 1.

    Returns
    -------
    (..., E)
        NaN where a value is NaN; ∞ where a covariance is.

    Raises
    ------
    ValueError, TypeError
        Shapes or numbers that do not fit, naming the argument.

    Examples
    --------
    >>> C = cross_covariances([0.5], [[0.5], [-0.5]], kind="positive")
    >>> tail_radius([0.75, 0.25], [[1.0], [0.0]], C, 1024, 0.0625).round(3)
    array([0.035])
    """
    p, v, C = _real("p", p, "S"), _real("v", v, "S E"), _real("covariances", covariances, "S S")
    for name, got in (("v", v.shape[-2]), ("covariances", C.shape[-1]), ("covariances", C.shape[-2])):
        _check.size(name, got, p.shape[-1], "S", "p")
    m, delta = _check.integer("count", count, 1), _check.probability("delta", delta)
    p = p[..., None]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        c = p * (v - p.mT @ v)
        g = np.sum(c * (C @ c), axis=-2)
        h = np.sum(p * (C @ p), axis=-2)
        # both are variances; rounding may leave them a little below zero
        room = math.sqrt(m * delta) - np.sqrt((1 - delta) * np.maximum(h, 0.0))
        return np.where(room > 0, np.sqrt(np.maximum(g, 0.0)) / room, np.inf)  # overflow leaves h ∞ or NaN


def orthogonal_gain(x: ArrayLike, y: ArrayLike) -> Array:
    r"""Return minus the covariance of κ/w between two rows ω that are orthogonal, positive features (R4).

    .. math::
        1 - e^{-\|z\|^2}\, {}_1F_1\bigl(D; \tfrac D2; \tfrac{\|z\|^2}{2}\bigr)

    It is in [0, 1) and at most ‖z‖⁴/(2(D + 2)); for D = 1 it is a number without meaning. Shapes as in
    `kernel_variance`.

    >>> orthogonal_gain([[1.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]).round(3)
    array([[0.   , 0.594]])
    """
    x, y = _pairs(x, y)
    return _mixture(_summable(x, y), x.shape[-1], 1)[1]


def orthogonal_variance(x: ArrayLike, y: ArrayLike, count: int) -> Array:
    r"""Return the variance of the mean of κ/w over `count` orthogonal rows of χ_D norms, positive features (R4).

    .. math::
        \frac{e^{\|z\|^2} - 1}{m} - \frac{m - 1}{m} \Bigl(1 - e^{-\|z\|^2}\,
        {}_1F_1\bigl(D; \tfrac D2; \tfrac{\|z\|^2}{2}\bigr)\Bigr), \qquad m \le D

    The first term is what independent rows have, `relative_variance`/m; the second, `orthogonal_gain`, is less than a
    third of it, and nearly nothing where the first is large. More than D rows are independent blocks: the variance of
    each, averaged. Outputs of attention may gain or lose.

    >>> orthogonal_variance([[0.5, 0.0]], [[0.5, 0.0]], 2).round(4)
    array([[0.814]])
    """
    x, y = _pairs(x, y)
    m = _check.integer("count", count, 1)
    if m > x.shape[-1]:
        raise ValueError(f"count is {m}; at most D = {x.shape[-1]} rows are orthogonal")
    t = _summable(x, y)
    return (_excess(t, "positive") - (m - 1) * _mixture(t, x.shape[-1], 1)[1]) / m


def regularized_log_ratio(x: ArrayLike, y: ArrayLike) -> Array:
    r"""Return ln E κ/w for rows ω of norm √D and any uniform direction, positive features (R5).

    .. math::
        \ln {}_0F_1\bigl(; \tfrac D2; \tfrac{D \|z\|^2}{4}\bigr) - \frac{\|z\|^2}{2} \;\in\;
        \Bigl[-\frac{D + 2}{2} (u - \ln(1 + u)),\; 0\Bigr], \qquad u = \frac{\|z\|^2}{D + 2}

    Such features are biased: however many, they give another kernel than softmax's, the regularised one of Choromanski
    et al. 2021. Its attention tilts softmax's weights by this ratio. Shapes as in `kernel_variance`.

    >>> regularized_log_ratio([[1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]).round(3)
    array([[-0.051, -0.553]])
    """
    x, y = _pairs(x, y)
    log, lost = _mixture(_summable(x, y) / 2, x.shape[-1], 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lost < 0.5, np.log1p(-np.minimum(lost, 0.5)), log)


def regularized_total_variation(radius: ArrayLike, depth: int) -> Array:
    r"""Bound the distance of softmax's weights to those of infinitely many rows ω of norm √D, if all ‖z_j‖ ≤ r (R5).

    .. math::
        \mathrm{TV} \le \tanh\bigl(\tfrac{D + 2}{8} (u - \ln(1 + u))\bigr) \le
        \tanh\bigl(\tfrac{r^4}{16 (D + 2)}\bigr), \qquad u = \frac{r^2}{D + 2}

    >>> print(regularized_total_variation([0.0, 1.0, 4.0], 64).round(4))
    [0.     0.0009 0.2062]
    """
    r, D = _real("radius", radius, ""), _check.integer("depth", depth, 1)
    if np.any(r < 0):
        raise ValueError(f"radius is {r.min():g} somewhere; expected numbers that are at least 0")
    r = np.minimum(r, 2.0**400)  # where the bound has long been 1
    return perturbation.tilt_total_variation((D + 2) / 2 * _beyond_log(r * r / (D + 2)))


def _real(name: str, value: Any, axes: str) -> Array:
    return np.asarray(_check.array(name, value, axes), np.float64)


def _pairs(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    x, y = _real("x", x, "T D"), _real("y", y, "S D")
    if x.shape[-1] < 1:
        raise ValueError("x has depth D = 0; expected at least 1")
    _check.size("y", y.shape[-1], x.shape[-1], "D", "x")
    return x, y


def _squares(x: Array, y: Array, kind: str) -> Array:
    """Return ‖x − y‖² for trigonometric features, ‖x + y‖² for others, without cancellation."""
    _check.choice("kind", kind, KINDS)
    sign = -1.0 if kind == "trigonometric" else 1.0
    total = np.zeros(np.broadcast_shapes(x.shape[:-2], y.shape[:-2]) + (x.shape[-2], y.shape[-2]))
    for c in range(x.shape[-1]):
        total += np.square(x[..., :, None, c] + sign * y[..., None, :, c])
    return total


def _summable(x: Array, y: Array) -> Array:
    """Return ‖x + y‖², which the series take."""
    with np.errstate(over="ignore"):
        t = _squares(x, y, "positive")
    if not (t <= LONGEST).all():
        raise ValueError(f"x and y have ‖x + y‖² = {t.max():g} somewhere; expected at most {LONGEST:g}")
    return t


def _excess(s: Array, kind: str) -> Array:
    """Return e^s − 1, or cosh s − 1."""
    with np.errstate(over="ignore"):
        return np.expm1(s) if kind == "positive" else 2 * np.square(np.sinh(s / 2))


def _mixture(mean: Array, depth: int, step: int) -> tuple[Array, Array]:
    r"""Return ln E P_K and 1 − E P_K, K ~ Poisson(mean), P_k = Π_{i<k} (1 − step·i/(D + 2i)): sums of positive terms.

    Past 2·mean + 64 terms, the rest is below e^{−60} of the sum (R4).
    """
    kept, lost, left, gone = np.zeros(mean.shape), np.zeros(mean.shape), 1.0, 0.0  # P_k and 1 − P_k
    a, b, log_a, log_b = np.ones(mean.shape), np.ones(mean.shape), -mean, -mean
    for k in range(math.ceil(2 * mean.max(initial=0.0)) + 64):
        kept, lost, grow = kept + a, lost + gone * b, mean / (k + 1)
        a, b = a * grow * ((depth + (2 - step) * k) / (depth + 2 * k)), b * grow
        left, gone = left * (depth + (2 - step) * k) / (depth + 2 * k), gone + left * step * k / (depth + 2 * k)
        a, kept, log_a = _rescaled(a, kept, log_a)
        b, lost, log_b = _rescaled(b, lost, log_b)
    return log_a + np.log(kept), lost * np.exp(log_b)


def _rescaled(term: Array, total: Array, log: Array) -> tuple[Array, Array, Array]:
    """Keep a growing series, term and total times e^log, in range."""
    if term.max(initial=0.0) < 2.0**500:
        return term, total, log
    big = np.maximum(term, 1.0)
    return term / big, total / big, log + np.log(big)


def _beyond_log(u: Array) -> Array:
    """Return u − ln(1 + u) for u ≥ 0, to full relative accuracy."""
    w = np.minimum(u, 1.0) / (2 + np.minimum(u, 1.0))
    # ln(1 + u) = 2 artanh w, w ≤ 1/3, and u − 2w = uw
    rest = np.zeros(u.shape)
    for odd in range(39, 1, -2):
        rest = w * w * (1 / odd + rest)
    return np.where(u < 1, w * (u - 2 * rest), u - np.log1p(u))
