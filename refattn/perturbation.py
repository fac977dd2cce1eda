r"""How far attention moves when its logits, weights or values do: the lemmas that every bound is built from.

One row at a time: weights :math:`p`, values of one column :math:`v`, output :math:`o = \sum_j p_j v_j`. A *tilt*
is :math:`p' \propto p\,e^{\delta}`; its *span* is :math:`\operatorname{osc}\delta = \max\delta - \min\delta`, the
total variation is :math:`\mathrm{TV} = \tfrac12\sum_j |p'_j - p_j|`. Softmax ignores a constant, so only spans matter.

Keys are the last axis and leading axes broadcast, unless a function says otherwise (`spread`, `trivial`,
`ball_diameter` and `logit_error` take whole arrays of keys or values). NaN passes through. An argument outside its
domain raises ValueError, one that does not hold real numbers TypeError. The bounds are mathematics evaluated in
float64: whoever compares adds the rounding. Statements are numbered as in `proofs/README.md`, and
`proofs/test_perturbation.py` derives them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check

Array = NDArray[np.float64]

JACOBIAN: Final[Mapping[str, float]] = MappingProxyType({"2->2": 0.5, "inf->inf": 0.5, "1->inf": 0.25, "inf->1": 1.0})
r"""P7: no norm of :math:`\partial p/\partial s = \mathrm{diag}(p) - pp^\top` is larger; equal at p = (1/2, 1/2)."""


def tilt_total_variation(span: ArrayLike) -> Array:
    r"""Bound the total variation between p and any tilt of it (P1).

    .. math:: \mathrm{TV}(p, p') \le \tanh(\operatorname{osc}(\delta) / 4)

    With an error bar on each logit, :math:`|\delta_j| \le \varepsilon`, the span is :math:`2\varepsilon`.
    Equal for two keys, :math:`p_1 = 1/(1 + e^{\Delta/2})`, :math:`\delta = (\Delta, 0)`.

    >>> print(tilt_total_variation([0.0, 1.0, 4.0]).round(4))
    [0.     0.2449 0.7616]
    """
    return np.tanh(_real("span", span, 0.0) / 4)


def total_variation_from_ratios(low: ArrayLike, high: ArrayLike) -> Array:
    r"""Bound the total variation when every ratio p'/p lies in [low, high] (P1).

    .. math:: \mathrm{TV}(p, p') \le \frac{(1 - a)(b - 1)}{b - a}, \qquad a \le p'_j / p_j \le b

    Equal when the ratio takes the values a and b only.

    >>> float(total_variation_from_ratios(0.5, 2.0))
    0.3333333333333333
    """
    below, above = 1 - _real("low", low, 0.0, 1.0), _real("high", high, 1.0) - 1
    with np.errstate(divide="ignore"):
        return 1 / (1 / below + 1 / above)  # neither 0/0 at a = b = 1 nor inf/inf at b = inf


def weight_interval(p: ArrayLike, span: ArrayLike) -> tuple[Array, Array]:
    r"""Enclose the tilted weight of each key, or of any set of keys (P1).

    .. math:: \frac{p\,e^{-\Delta}}{1 - p + p\,e^{-\Delta}} \le p' \le \frac{p}{p + (1 - p)\,e^{-\Delta}}

    that is, the log-odds move by at most the span. Equal when the set has one end of the tilt and the rest the other.

    >>> low, high = weight_interval(0.5, np.log(3.0))
    >>> print(low.round(4), high.round(4))
    0.25 0.75
    """
    p, span = np.broadcast_arrays(_real("p", p, 0.0, 1.0), _real("span", span, 0.0))
    shrink = np.exp(-span)
    shrunk = p * shrink
    low = np.divide(shrunk, 1 - p + shrunk, out=np.ones(p.shape), where=p != 1)
    high = np.divide(p, p + (1 - p) * shrink, out=np.zeros(p.shape), where=p != 0)
    return low, high


def spread(v: ArrayLike, seen: ArrayLike | None = None) -> Array:
    r"""Range of each column of v over the keys that a row sees (P2).

    .. math:: |o' - o| \le \mathrm{TV}(p, p')\,(\max_j v_j - \min_j v_j)

    for any two weights on the same keys. Equal when v is 1 where p' > p and 0 elsewhere.

    Parameters
    ----------
    v : (..., S, E)
        Values; unseen ones may be anything, NaN included.
    seen : (..., T, S) of bool, optional
        Keys that each row sees; all of them if absent. A row that sees nothing has range 0.

    Returns
    -------
    (..., T, E), with T = 1 if `seen` is absent.

    >>> spread([[0.0, 5.0], [1.0, 7.0], [9.0, 6.0]], [[True, True, False], [False, False, False]])
    array([[1., 2.],
           [0., 0.]])
    """
    low, high = _extent(v, seen)
    return high - low


def trivial(v: ArrayLike, o: ArrayLike, seen: ArrayLike | None = None) -> Array:
    r"""How far any answer o can be from exact attention, which stays within the values seen (P2).

    .. math:: |\tilde o - o| \le \max(\max_j v_j - \tilde o,\ \tilde o - \min_j v_j)

    The cap of every bound that knows the answer. Equal when exact attention looks at one extreme key. Shapes as in
    `spread`, with o of shape (..., T, E); a row that sees nothing has the exact answer 0.

    >>> trivial([[0.0], [4.0]], [[1.0]])
    array([[3.]])
    """
    low, high = _extent(v, seen)
    o = _real("o", o)
    return np.maximum(high - o, o - low)


def tilt_by_deviation(p: ArrayLike, v: ArrayLike, span: ArrayLike) -> Array:
    r"""Bound the change of the output by the standard deviation of v under p (P3a).

    .. math:: |o' - o| \le \sinh(\Delta/2)\,\sqrt{\textstyle\sum_j p_j (v_j - o)^2}

    Equal for two keys with weights such that p'/p is (1 + e^Δ)/2 and (1 + e^-Δ)/2.

    >>> float(tilt_by_deviation([0.5, 0.5], [0.0, 2.0], 2 * np.log(2.0)))
    0.75
    """
    p, x = _centred(p, v)
    with np.errstate(over="ignore"):
        return _times(np.sinh(_real("span", span, 0.0) / 2), np.sqrt(np.sum(p * x * x, axis=-1)))


def tilt_by_mean_deviation(p: ArrayLike, v: ArrayLike, span: ArrayLike) -> Array:
    r"""Bound the change of the output by the mean absolute deviation of v under p (P3b).

    .. math:: |o' - o| \le \tfrac12 (e^{\Delta} - 1) \textstyle\sum_j p_j |v_j - o|

    Equal in the limit of one key of vanishing weight whose value stands apart.

    >>> round(float(tilt_by_mean_deviation([0.5, 0.5], [0.0, 2.0], np.log(2.0))), 12)
    0.5
    """
    p, x = _centred(p, v)
    with np.errstate(over="ignore"):
        return _times(np.expm1(_real("span", span, 0.0)) / 2, np.sum(p * np.abs(x), axis=-1))


def tilt_first_order(p: ArrayLike, v: ArrayLike, delta: ArrayLike) -> tuple[Array, Array]:
    r"""Change of the output to first order in a known tilt, and the radius about it (P3d).

    .. math:: |o' - o - \mathrm{Cov}_p(\delta, v)| \le \frac{\operatorname{osc}(\delta)^2\,(\max v - \min v)}{12\sqrt3}

    Equal in the limit of small δ ∝ v ∈ {0, 1} with o = (3 - √3)/6.

    >>> first, radius = tilt_first_order([0.5, 0.5], [0.0, 1.0], [0.0, 0.1])
    >>> print(first.round(4), radius.round(6))
    0.025 0.000481
    """
    p, x = _centred(p, v)
    _, slope = _centred(p, delta, "delta")
    (low, high), (least, most) = _ends(x), _ends(slope)
    return np.sum(p * slope * x, axis=-1), (most - least) ** 2 * (high - low) / (12 * np.sqrt(3.0))


def box_interval(p: ArrayLike, v: ArrayLike, error: ArrayLike) -> tuple[Array, Array]:
    r"""Exact range of the change of the output when each logit has its own error bar (P4; P3c).

    .. math:: o' - o \in [t_-, t_+], \qquad \sum_j p_j\,e^{\pm\varepsilon_j\,\mathrm{sgn}(v_j - o - t_\pm)}\,
              (v_j - o - t_\pm) = 0, \qquad |\delta_j| \le \varepsilon_j

    Both ends are attained: keys above a threshold go one way, the others the other way, so the best of the n ways to
    split the sorted values is the answer. A tilt of span Δ is the box with every error Δ/2. The sums of the weights
    after the tilt must not underflow; no size of error overflows.

    >>> low, high = box_interval([0.5, 0.5], [0.0, 1.0], np.log(3.0) / 2)
    >>> print(low.round(4), high.round(4))
    -0.25 0.25
    """
    p, x = _centred(p, v)
    p, x, error = np.broadcast_arrays(p, np.where(p > 0, x, 0.0), _real("error", error, 0.0))
    order = np.argsort(x, axis=-1)
    p, x, error = (np.take_along_axis(a, order, axis=-1) for a in (p, x, error))
    most = np.max(error, axis=-1, keepdims=True, initial=0.0)
    up, down = p * np.exp(error - most), p * np.exp(-error - most)
    high = _splits(x, down, up).max(axis=-1, initial=0.0)
    low = -_splits(-x[..., ::-1], down[..., ::-1], up[..., ::-1]).max(axis=-1, initial=0.0)
    return low, high


def box_output(p: ArrayLike, v: ArrayLike, error: ArrayLike) -> Array:
    r"""Bound the change of the output from an error bar on each logit, without sorting (P4).

    .. math:: |o' - o| \le \frac{\sum_j p_j (e^{\varepsilon_j} - 1)\,|v_j - o|}{\sum_j p_j e^{-\varepsilon_j}}

    Equal in the limit of small errors with v two-valued and p = (1/2, 1/2); `box_interval` is never wider.

    >>> round(float(box_output([0.5, 0.5], [0.0, 1.0], np.log(2.0))), 12)
    1.0
    """
    p, x = _centred(p, v)
    error = _real("error", error, 0.0)
    with np.errstate(over="ignore", divide="ignore"):
        return _times(1 / np.sum(p * np.exp(-error), axis=-1), np.sum(_times(np.expm1(error), p * np.abs(x)), axis=-1))


def relative_total_variation(error: ArrayLike) -> Array:
    r"""Bound the total variation when unnormalised weights have relative errors (P5).

    .. math:: \hat w_j = w_j (1 + \theta_j),\ |\theta_j| \le \varepsilon
              \quad\Rightarrow\quad \mathrm{TV} \le \frac{\varepsilon}{1 + \sqrt{1 - \varepsilon^2}}

    Equal for two keys, θ = (ε, -ε), w₁/w₂ = √((1 - ε)/(1 + ε)).

    >>> float(relative_total_variation(0.6))
    0.3333333333333333
    """
    error = _real("error", error, 0.0, 1.0)
    return error / (1 + np.sqrt((1 - error) * (1 + error)))


def lse_interval(p: ArrayLike, error: ArrayLike) -> tuple[Array, Array]:
    r"""Exact range of the change of the log-sum-exp when each logit has its own error bar (P6).

    .. math:: \ln\textstyle\sum_j p_j e^{-\varepsilon_j} \le \mathrm{lse}' - \mathrm{lse}
              \le \ln\sum_j p_j e^{\varepsilon_j} \le \max_j \varepsilon_j

    Equal when every logit is off by its whole error bar, in one direction.

    >>> low, high = lse_interval([0.5, 0.5], [0.0, np.log(3.0)])
    >>> print(low.round(4), high.round(4))
    -0.4055 0.6931
    """
    p, error = _real("p", p, 0.0), _real("error", error, 0.0)
    with np.errstate(over="ignore"):
        high = np.log1p(np.sum(_times(np.expm1(error), p), axis=-1))
    return np.log1p(np.maximum(np.sum(p * np.expm1(-error), axis=-1), -1.0)), high


def query_jacobian(scale: ArrayLike, key_diameter: ArrayLike, value_diameter: ArrayLike) -> Array:
    r"""Bound the largest singular value of the output's Jacobian in q (P7).

    .. math:: \|\partial o / \partial q\|_2 \le |\sigma|\,\mathrm{diam}(K)\,\mathrm{diam}(V) / 4

    Equal for two keys of equal weight.

    >>> float(query_jacobian(0.5, 2.0, 4.0))
    1.0
    """
    diameters = _real("key_diameter", key_diameter, 0.0) * _real("value_diameter", value_diameter, 0.0)
    return np.abs(_real("scale", scale)) * diameters / 4


def ball_diameter(x: ArrayLike) -> Array:
    r"""Diameter of a ball that holds every key (or value): never less than the largest distance between two.

    .. math:: \max_{i,j} \|x_i - x_j\|_2 \le 2 \max_j \|x_j - c\|_2,
              \qquad c = \tfrac12(\textstyle\max_j x_j + \min_j x_j)

    Equal for one column, and for any two keys. Takes (..., S, D), answers (...): 0 where there is no key.

    >>> float(ball_diameter([[0.0, 0.0], [3.0, 4.0]]))
    5.0
    """
    x = np.asarray(_check.array("x", x, "S D"), dtype=np.float64)
    if x.shape[-2] == 0:
        return np.zeros(x.shape[:-2])
    centre = (x.max(axis=-2, keepdims=True) + x.min(axis=-2, keepdims=True)) / 2
    return 2 * np.linalg.norm(x - centre, axis=-1).max(axis=-1)


def input_span(
    scale: ArrayLike,
    *,
    q_change: ArrayLike = 0.0,
    key_diameter: ArrayLike = 0.0,
    q_norm: ArrayLike = 0.0,
    key_change_diameter: ArrayLike = 0.0,
) -> Array:
    r"""Bound the span of the tilt that changed queries and keys cause (P8).

    .. math:: \operatorname{osc}\delta \le |\sigma|\,(\|dq\|\,\mathrm{diam}(K) + \|q + dq\|\,\mathrm{diam}(dK))

    A change common to all keys costs nothing. Feed the result to `tilt_total_variation`; changed values add
    :math:`\max_j \|dv_j\|` to the output. Equal for two keys with k₁ - k₂ along dq and dk₁ - dk₂ along q + dq.

    Parameters
    ----------
    scale : σ.
    q_change, q_norm : ‖dq‖, and ‖q + dq‖ of the query as changed.
    key_diameter, key_change_diameter : largest distances within k and within dk, or more (`ball_diameter`).

    >>> float(input_span(0.5, q_norm=4.0, key_change_diameter=0.25))
    0.5
    """
    from_q = _real("q_change", q_change, 0.0) * _real("key_diameter", key_diameter, 0.0)
    from_k = _real("q_norm", q_norm, 0.0) * _real("key_change_diameter", key_change_diameter, 0.0)
    return np.abs(_real("scale", scale)) * (from_q + from_k)


def logit_error(q: ArrayLike, key_error: ArrayLike, scale: ArrayLike) -> Array:
    r"""Error bar of each logit when the entries of k are known to an error, as stored keys are (P8).

    .. math:: \varepsilon_{ij} = |\sigma| \sum_c |q_{ic}|\,|dk_{jc}|

    Takes q (..., T, D) and errors (..., S, D), answers (..., T, S), for `box_interval`. Equal when the signs agree.

    >>> logit_error([[1.0, -2.0]], [[0.1, 0.1], [0.0, 0.2]], 1.0).round(4)
    array([[0.3, 0.4]])
    """
    sizes = np.abs(_real("q", q)) @ np.swapaxes(np.abs(_real("key_error", key_error)), -1, -2)
    return np.abs(_real("scale", scale)) * sizes


def softcap_span(low: ArrayLike, high: ArrayLike, cap: ArrayLike) -> Array:
    r"""Span of the tilt that a softcap causes on logits with the extremes low and high, exactly (P9).

    .. math:: \operatorname{osc}\delta = g(\max s) - g(\min s), \qquad g(x) = x - c \tanh(x / c) \approx x^3 / 3c^2

    Equal always: g increases.

    >>> float(softcap_span(-1.0, 1.0, 1e6).round(16))
    6.667e-13
    """
    cap = _real("cap", cap, 0.0)
    if np.any(cap == 0):
        raise ValueError("cap is 0 somewhere; expected numbers above 0")
    return _capped(_real("high", high), cap) - _capped(_real("low", low), cap)


def temperature_span(span: ArrayLike, error: ArrayLike) -> Array:
    r"""Span of the tilt when the scale is off by a factor 1 + error, on logits of the given span (P9).

    .. math:: \operatorname{osc}\delta = |\eta|\,\operatorname{osc}(s)

    Equal always.

    >>> float(temperature_span(8.0, -0.25))
    2.0
    """
    return np.abs(_real("error", error)) * _real("span", span, 0.0)


def compose(dropped: ArrayLike, total_variation: ArrayLike) -> Array:
    r"""Bound the total variation when keys of mass ρ are dropped, then the rest is moved by at most τ (P10).

    .. math:: \mathrm{TV}(p, p') \le 1 - (1 - \rho)(1 - \tau)

    Equal when the second step empties some keys. Several tilts: add their spans.

    >>> round(float(compose(0.1, 0.2)), 12)
    0.28
    """
    dropped = _real("dropped", dropped, 0.0, 1.0)
    return dropped + (1 - dropped) * _real("total_variation", total_variation, 0.0, 1.0)


def compose_tilt(dropped: ArrayLike, span: ArrayLike) -> Array:
    r"""Bound the total variation when keys of mass ρ are dropped and the rest is tilted by a span Δ (P10).

    .. math:: \mathrm{TV}(p, p') \le \frac{(1 - r g)^2}{1 - g^2}, \qquad r = \sqrt{1 - \rho},\ g = e^{-\Delta/2} < r

    and :math:`\rho` alone while :math:`g \ge r`: a small tilt is free. Never more than `compose` of the two.
    Equal for two kept keys with :math:`p_1 : p_2 = (1 - r g) : (r/g - 1)`, the first raised by Δ.

    >>> float(compose_tilt(0.1, 0.1)), round(float(compose_tilt(0.0, 1.0)), 4)
    (0.1, 0.2449)
    """
    dropped, span = np.broadcast_arrays(_real("dropped", dropped, 0.0, 1.0), _real("span", span, 0.0))
    r, g = np.sqrt(1 - dropped), np.exp(-span / 2)
    gap = g * dropped / (1 + r) - np.expm1(-span / 2)  # 1 - rg without cancellation
    return np.divide(gap * gap, -np.expm1(-span), out=dropped.copy(), where=g < r)


def projection_deviation(
    p: ArrayLike, v: ArrayLike, rank: int, *, entries: Literal["normal", "sign"] = "normal"
) -> Array:
    r"""Return the standard deviation of p Rᵀ R v over random R of `rank` rows (L1).

    .. math:: \mathbb{E}[p R^\top R v] = p \cdot v, \qquad
              \mathrm{Var} = \bigl(\|p\|^2 \|v\|^2 + (p \cdot v)^2
              - 2\,[\text{signs}] \textstyle\sum_j p_j^2 v_j^2\bigr) / r

    for independent entries of variance 1/r, normal or of random sign. Equal always. Projecting v - c and adding c
    back replaces v by v - c.

    >>> float(projection_deviation([0.5, 0.5], [1.0, -1.0], 4))
    0.5
    """
    p, v = _real("p", p), _real("v", v)
    _same_keys(p, v, "v")
    rank, kind = _check.integer("rank", rank, 1), _check.choice("entries", entries, ("normal", "sign"))
    squares = np.sum(p * p, axis=-1) * np.sum(v * v, axis=-1)
    variance = squares + np.sum(p * v, axis=-1) ** 2
    if kind == "sign":
        variance = np.maximum(variance - 2 * np.sum((p * v) ** 2, axis=-1), 0.0)
    return np.sqrt(variance / rank)


def chebyshev_radius(deviation: ArrayLike, delta: ArrayLike) -> Array:
    r"""Radius that a variable leaves with probability at most 0 < delta < 1, whatever its distribution (L1).

    .. math:: \Pr(|X - \mathbb{E}X| > \mathrm{sd}/\sqrt\delta) \le \delta

    Equal in the limit of three values, two of them at the radius.

    >>> float(chebyshev_radius(0.5, 0.25))
    1.0
    """
    delta = _real("delta", delta)
    wrong = delta[(delta <= 0) | (delta >= 1)]
    if wrong.size:
        raise ValueError(f"delta is {wrong[0]:g} somewhere; expected numbers strictly between 0 and 1")
    return _real("deviation", deviation, 0.0) / np.sqrt(delta)


def signed_output(p: ArrayLike, a: ArrayLike, v: ArrayLike) -> Array:
    r"""Bound the change of the output when weights p become any numbers a, signed or not summing to 1 (L4).

    .. math:: |\textstyle\sum_j a_j v_j - o| \le \tfrac12 (\max v - \min v)\,\|a - p\|_1
              + \tfrac12 |\max v + \min v|\,|\sum_j a_j - 1|

    Equal when v is one extreme where a > p and the other elsewhere, and its middle has the sign of Σa - 1.

    >>> float(signed_output([0.5, 0.5], [0.75, 0.5], [0.0, 2.0]))
    0.5
    """
    p, a, v = _real("p", p, 0.0), _real("a", a), _real("v", v)
    _same_keys(p, a, "a")
    _same_keys(p, v, "v")
    low, high = _ends(v)
    moved, surplus = np.sum(np.abs(a - p), axis=-1), np.abs(np.sum(a - p, axis=-1))
    return (high - low) / 2 * moved + np.abs(high + low) / 2 * surplus


def logit_gradient(spread: ArrayLike) -> Array:
    r"""Bound the sum of a row's absolute logit gradients by the spread of g = v·do over its keys (B2).

    .. math:: \|dS\|_1 = \textstyle\sum_j p_j |g_j - \bar g| \le (\max g - \min g) / 2

    Equal when g is two-valued and each value has half the weight.

    >>> float(logit_gradient(3.0))
    1.5
    """
    return _real("spread", spread, 0.0) / 2


def query_gradient(scale: ArrayLike, norm: ArrayLike, key_diameter: ArrayLike) -> Array:
    r"""Bound a row's query gradient by the sum of its absolute logit gradients, which sum to 0 (B2, B3).

    .. math:: \|dq\|_2 = |\sigma|\,\|\textstyle\sum_j dS_j k_j\|_2
              \le |\sigma|\,\|dS\|_1\,\mathrm{diam}(K) / 2

    Holds for the change of dq from that of dS. Equal for two keys.

    Parameters
    ----------
    scale : σ.
    norm : ‖dS‖₁, or more (`logit_gradient`), or that of a change of dS (`gradient_change`, `gradient_of_kept`).
    key_diameter : largest distance of two keys, or more (`ball_diameter`).

    >>> float(query_gradient(0.5, logit_gradient(1.0), 4.0))
    0.5
    """
    return np.abs(_real("scale", scale)) * _real("norm", norm, 0.0) * _real("key_diameter", key_diameter, 0.0) / 2


def gradient_change(total_variation: ArrayLike, spread: ArrayLike) -> Array:
    r"""Bound the change of a row's logit gradients when its weights change, g = v·do being the same (B3).

    .. math:: \|dS' - dS\|_1 \le 2\,\mathrm{TV}(p, p')\,(\max g - \min g)

    Equal in the limit of two keys, a small weight moved onto the one that had none.

    >>> float(gradient_change(0.25, 2.0))
    1.0
    """
    return 2 * _real("total_variation", total_variation, 0.0, 1.0) * _real("spread", spread, 0.0)


def gradient_of_kept(dropped: ArrayLike, spread: ArrayLike) -> Array:
    r"""Bound the change of a row's logit gradients when keys of mass ρ are dropped (B3).

    .. math:: \|dS_S - dS\|_1 \le \rho \max(1, 2(1 - \rho))\,(\max g - \min g)

    with 0 for the gradients of dropped keys; the spread is that of g = v·do over all keys. Equal when g is one number
    on the kept keys and another on the dropped (ρ ≤ 1/2), or two numbers of half the weight each on both (ρ ≥ 1/2).

    >>> float(gradient_of_kept(0.25, 2.0)), float(gradient_of_kept(0.75, 2.0))
    (0.75, 1.5)
    """
    dropped = _real("dropped", dropped, 0.0, 1.0)
    return dropped * np.maximum(1.0, 2 * (1 - dropped)) * _real("spread", spread, 0.0)


def _real(name: str, value: ArrayLike, low: float = -np.inf, high: float = np.inf) -> Array:
    """Widen real numbers to float64 and refuse those outside [low, high]; NaN passes."""
    array: Array = _check.array(name, value, "").astype(np.float64, copy=False)
    if np.any((array < low) | (array > high)):
        worst = array.min() if np.any(array < low) else array.max()
        raise ValueError(f"{name} is {worst:g} somewhere; expected numbers in [{low:g}, {high:g}]")
    return array


def _same_keys(p: Array, x: Array, name: str) -> None:
    """Refuse arrays whose last axes are not the same keys."""
    if p.shape[-1:] != x.shape[-1:] or p.ndim == 0:
        raise ValueError(f"{name} has shape {x.shape}; expected the keys of p, of shape {p.shape}, on its last axis")


def _centred(p: ArrayLike, x: ArrayLike, name: str = "v") -> tuple[Array, Array]:
    """Check p and x, and subtract from x its mean under p."""
    p, x = _real("p", p, 0.0), _real(name, x)
    _same_keys(p, x, name)
    return p, x - np.sum(p * x, axis=-1, keepdims=True)


def _ends(x: Array) -> tuple[Array, Array]:
    """Least and greatest of each row; 0 and 0 where there is no key."""
    if x.shape[-1] == 0:
        return np.zeros(x.shape[:-1]), np.zeros(x.shape[:-1])
    return x.min(axis=-1), x.max(axis=-1)


def _times(factor: Array, size: Array) -> Array:
    """Multiply, with 0 where the size is 0 even if the factor overflowed."""
    with np.errstate(invalid="ignore"):
        return np.where(size == 0, 0.0, factor * size)


def _splits(x: Array, down: Array, up: Array) -> Array:
    """Mean of sorted x when the keys before each split weigh `down` and the others `up`; 0 where nothing weighs."""

    def total(below: Array, above: Array) -> Array:
        sums = np.cumsum(above[..., ::-1], axis=-1)[..., ::-1]
        sums[..., 1:] += np.cumsum(below[..., :-1], axis=-1)
        return sums

    weight = total(down, up)
    return np.divide(total(down * x, up * x), weight, out=np.zeros(weight.shape), where=weight > 0)


def _extent(v: ArrayLike, seen: ArrayLike | None) -> tuple[Array, Array]:
    """Least and greatest seen value of each column, (..., T, E); 0 and 0 where a row sees nothing."""
    v = np.asarray(_check.array("v", v, "S E"), dtype=np.float64)
    keep = np.ones((1, v.shape[-2]), dtype=np.bool_) if seen is None else np.asarray(seen)
    if keep.dtype != np.bool_ or keep.ndim < 2 or keep.shape[-1] != v.shape[-2]:
        raise ValueError(f"seen is {keep.dtype} of shape {keep.shape}; expected bool of shape (..., T, {v.shape[-2]})")
    columns, keep = np.broadcast_arrays(np.swapaxes(v, -1, -2)[..., None, :, :], keep[..., :, None, :])
    low = np.min(columns, axis=-1, where=keep, initial=np.inf)
    high = np.max(columns, axis=-1, where=keep, initial=-np.inf)
    some = keep.any(axis=-1)
    return np.where(some, low, 0.0), np.where(some, high, 0.0)


def _capped(x: Array, cap: Array) -> Array:
    """Return what a softcap takes away, x - c tanh(x/c), to full relative accuracy."""
    size = np.abs(x / cap)
    square = np.square(np.minimum(size, 1.0))
    # tanh y = y/(1 + A), A = y²/(3 + y²/(5 + ...)): no subtraction; 9 levels reach below 2^-60 for y <= 1
    rest = np.zeros(square.shape)
    for odd in range(19, 1, -2):
        rest = square / (odd + rest)
    with np.errstate(invalid="ignore"):
        return np.where(size < 1, x * rest / (1 + rest), x - cap * np.tanh(x / cap))
