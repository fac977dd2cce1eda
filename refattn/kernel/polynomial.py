r"""Polynomial kernel attention: the exponential of a logit becomes a polynomial of degree p in it.

.. math::
    o_i = \frac{\sum_j \kappa(s_{ij}) v_j}{\sum_j \kappa(s_{ij})}, \quad s_{ij} = \sigma q_i \cdot k_j, \qquad
    \kappa(s) = T_p(s) = \sum_{t=0}^{p} \frac{s^t}{t!} \quad\text{or}\quad \kappa(s) = (1 + s/p)^p

over the keys that row i sees. Taylor's polynomial with p = 2 is Based's, Arora et al. 2024, arXiv:2402.18668; both are
polynomial kernels as in Tsai et al. 2019, arXiv:1908.11775. With p even T_p is positive and (1 + s/p)^p is 0 at s = −p
only. With p odd both are negative left of their one real zero: weights are signed there, a sum of them may be 0 or
near it, and no more is known than the values' range.

Here is the kernel form, which reads every pair. `feature_map` has the same kernel as a product of C(D+p, p) features,
for `linear_transformer.attend` in time linear in the length, and for `linear_transformer.step`: the state belongs to
the features, so there is no `step` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, linear, masks, perturbation
from refattn._mix import mix, rows_of, tiles
from refattn.engines import Backend
from refattn.heads import matrix
from refattn.kernel import _monomials, _ratio
from refattn.kernel._feature_map import IDENTITY, FeatureMap
from refattn.kernel._polynomials import as_written, kernel, log_ratio, slope
from refattn.kernel._scale import scaled
from refattn.lifted import Lifted
from refattn.masks import MaskLike
from refattn.method import Claim, Cost, Method, Option
from refattn.rounding import Bounded

Form: TypeAlias = Literal["taylor", "power"]
FORMS: tuple[str, ...] = ("taylor", "power")

METHOD = Method(
    name="polynomial",
    family="kernel",
    paper="arXiv:2402.18668; arXiv:1908.11775",
    arrays={"q": "T D", "k": "S D", "v": "S E"},
    options={
        # p even, whose weights are a mean's; "power" is a variant, as its weights may all be 0: 0/0
        "degree": Option(doc="p, the polynomial's degree", domain=lambda p: p >= 1, typical=(2, 4, 6, 8), default=2),
        "form": Option(doc="T_p(s), or (1 + s/p)^p", domain=FORMS.__contains__, typical=("taylor",), default="taylor"),
    },
    budget="degree",
    variants=({"form": "power"},),
    masks="prefix",
    rows="sum to 1",
    permutable=True,
    engines=(),
    claims=(
        Claim(
            verb="bound",
            statement="K1",
            assumes=(
                "Polynomials above 0 at all keys that the row sees, as Taylor's of even degree are, else it says only "
                "how far the values reach: it reads every pair."
            ),
        ),
    ),
)

Array = NDArray[np.float64]


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
    degree: int = 2,
    form: Form = "taylor",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Polynomial kernel attention, pair by pair: O(T·S·(D + E)) time, a tile of rows at a time.

    .. math:: o_i = \frac{\sum_j \kappa(\sigma q_i \cdot k_j)\, v_j}{\sum_j \kappa(\sigma q_i \cdot k_j)}

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    degree : int
        p ≥ 1.
    form : {"taylor", "power"}
        κ = T_p, or κ(s) = (1 + s/p)^p.
    mask : Mask, optional
        Rows must see the first keys, and never fewer than the row before, as the feature form needs it: causal,
        lengths, prefix.
    scale : float, optional
        σ; the real number 1/√D unless given.
    backend : str or Backend
        ``"numpy"``: no compiled engine has this form. The feature form runs on the linear engine.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0. One whose κ sum to 0 is 0/0 = NaN, or x/0, as IEEE 754 says.

    Raises
    ------
    ValueError, TypeError
        Shapes, options or a mask that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn.kernel import polynomial
    >>> polynomial.attend([[1.0]], [[0.0], [2.0]], [[0.0], [6.0]])  # κ = 1 and 1 + 2 + 2
    array([[5.]])
    """
    call = _problem(q, k, v, degree, form, mask, scale, backend)
    if isinstance(call.at.q, Lifted):
        return _in_another_arithmetic(
            call, kernel(call.degree, call.form, _logits(call) * call.at.seen().astype(float))
        )
    return _forward(call)


def weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    degree: int = 2,
    form: Form = "taylor",
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""Return the attention matrix κ(s_ij) / Σ_l κ(s_il), (..., T, S), each κ summed or multiplied as it is written.

    >>> from refattn.kernel import polynomial
    >>> polynomial.weights([[1.0]], [[0.0], [2.0]], form="power").tolist()  # κ = 1 and (1 + 2/2)²
    [[0.2, 0.8]]
    """
    call = _problem(q, k, _check.WEIGHTS, degree, form, mask, scale)
    if isinstance(call.at.q, Lifted):
        return _in_another_arithmetic(
            call, as_written(call.degree, call.form, _logits(call) * call.at.seen().astype(float))
        )
    T, S, _, _ = call.at.sizes
    p = np.zeros((*call.at.leads.shape, T, S))
    for n in range(math.prod(call.at.leads.shape)):
        for rows, _, _, kappa, den in _tiles(call, n, as_written):
            matrix(p, n)[rows] = kappa / den
    return p


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    degree: int = 2,
    form: Form = "taylor",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    r"""Gradients of ⟨do, o⟩, pair by pair.

    With den_i = Σ_j κ(s_ij), and κ′ = T_{p−1} or (1 + s/p)^{p−1}:

    .. math::
        g_i = do_i / \mathrm{den}_i, \qquad dS_{ij} = \kappa'(s_{ij}) \, g_i \cdot (v_j - o_i), \qquad
        dq_i = \sigma \sum_j dS_{ij} k_j, \quad dk_j = \sigma \sum_i dS_{ij} q_i, \quad
        dv_j = \sum_i \kappa(s_{ij})\, g_i

    >>> from refattn.kernel import polynomial
    >>> polynomial.vjp([[1.0]], [[1.0]], [[0.0], [2.0]], [[0.0], [6.0]]).q  # κ′(2) = 1 + 2
    array([[1.]])
    """
    call = _problem(q, k, v, degree, form, mask, scale, backend)
    (T, S, D, E), lead, of = call.at.sizes, call.at.leads.shape, call.at.leads.of
    do = _check.shaped("do", do, "T E", (*lead, T, E))
    if isinstance(call.at.q, Lifted):
        x, seen = call.at.q, call.at.seen()
        s = _logits(call) * seen.astype(float)
        to_kappa, _, dv = x.linear_backward(
            kernel(call.degree, call.form, s), x.lift(np.eye(S)), call.at.v, seen, 0.0, do
        )
        ds = to_kappa * slope(call.degree, call.form, s)
        return Gradients(scaled(ds @ call.at.k, scale, D), scaled(ds.mT @ x, scale, D), dv)
    dq, dk, dv = np.zeros(call.at.q.shape), np.zeros(call.at.k.shape), np.zeros(call.at.v.shape)
    for n in range(math.prod(lead)):
        x, y, z, _ = call.at.one(n)
        y, z, cotangent = _check.widened(y), _check.widened(z), matrix(do, n)
        to_q, to_k, to_v = (matrix(array, of[name][n]) for name, array in (("q", dq), ("k", dk), ("v", dv)))
        for rows, seen, s, kappa, den in _tiles(call, n, kernel):
            g = np.where(seen.any(axis=1, keepdims=True), rows_of(cotangent, rows) / den, 0.0)
            own = (g * (mix(kappa, z, seen) / den)).sum(axis=1, keepdims=True)
            ds = np.where(seen, (g @ z.T - own) * slope(call.degree, call.form, s), 0.0)
            to_q[rows] += mix(ds, y, seen)
            to_k += mix(ds.T, rows_of(x, rows), seen.T)
            to_v += mix(kappa.T, g, seen.T)
    return Gradients(scaled(dq, scale, D), scaled(dk, scale, D), dv)


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    degree: int = 2,
    form: Form = "taylor",
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from `refattn.softmax.attend` of the same arrays, mask and scale, at most (K1, elementwise).

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \tanh\!\big(\tfrac14 \operatorname*{osc}_j(\ln \kappa(s_{ij}) - s_{ij})\big)
        \operatorname*{range}_j v_{jc}

    over the keys that the row sees, and never more than the distance from õ to the far end of the values' range,
    in which the exact output lies. Where some κ ≤ 0 only the latter is known. It reads every pair;
    `bound_from_logits` needs no more than their extremes.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.kernel import polynomial
    >>> polynomial.bound([[1.0]], [[2.0], [2.0]], [[0.0], [3.0]])
    array([[0.]])
    """
    call = _problem(q, k, v, degree, form, mask, scale)
    with np.errstate(all="ignore"):  # an answer that is 0/0 or overflows has the bound NaN or ∞
        o = _forward(call)
        out = np.zeros_like(o)
        for n in range(math.prod(call.at.leads.shape)):
            matrix(out, n)[:] = _bound(call, n, matrix(o, n))
    return out


def bound_from_logits(
    low: ArrayLike, high: ArrayLike, *, degree: int = 2, form: Form = "taylor"
) -> NDArray[np.float64]:
    r"""Total variation from softmax attention, at most, where all logits of a row lie in [low, high] (K2, K3).

    .. math::
        \mathrm{TV} \le \tanh\!\big(\tfrac14 \operatorname*{osc}_{[s_{\min}, s_{\max}]} \rho\big), \qquad
        \rho(x) = \ln \kappa(x) - x

    No smaller number holds for every number of keys. For T_p, :math:`e^{\rho} = Q(p + 1, x)`, the regularised
    incomplete gamma function: for p even ρ falls everywhere and the oscillation is ρ(low) − ρ(high); for p odd, and for
    (1 + x/p)^p, ρ rises to ρ(0) = 0 and falls after it. The outputs of a column differ by at most that part of the
    range of its values.

    Parameters
    ----------
    low, high : (...)
        Extremes of the logits; they broadcast.
    degree : int
        p ≥ 1.
    form : {"taylor", "power"}
        κ.

    Returns
    -------
    (...) of float64
        ∞ where κ(low) ≤ 0, left of κ's real zero: signed weights have no such bound. Where low < −700 nothing is
        computed: 1 for T_p with p even, ∞ with p odd.

    Raises
    ------
    ValueError, TypeError
        Logits that are NaN or out of order, another degree or form, naming the argument.

    Examples
    --------
    >>> from refattn.kernel import polynomial
    >>> polynomial.bound_from_logits([-1.0, -2.0], [1.0, 2.0]).round(4)
    array([0.0973, 0.5354])
    """
    p = _check.integer("degree", degree, 1)
    _check.choice("form", form, FORMS)
    low, high = (np.asarray(_check.array(name, x, ""), np.float64) for name, x in (("low", low), ("high", high)))
    if not (low <= high).all():
        raise ValueError("low is above high somewhere, or NaN; expected low ≤ high")
    falls = form == "taylor" and p % 2 == 0
    top = low if falls else np.clip(0.0, low, high)
    left, right = log_ratio(p, form, low), log_ratio(p, form, high)
    with np.errstate(invalid="ignore"):
        span = log_ratio(p, form, top) - (right if falls else np.minimum(left, right))
    known = np.full(span.shape, falls) | (left > -np.inf)
    tv = perturbation.tilt_total_variation(np.where(known & ~np.isnan(span), np.maximum(span, 0.0), np.inf))
    return np.where(known, tv, np.inf)


def claim_logits(
    q: ArrayLike,
    k: ArrayLike,
    *,
    degree: int = 2,
    form: Form = "taylor",
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    """Return how far ln κ(s) − s in `bound` may be off, (T,), by running error analysis: κ cancels at negative s.

    >>> from refattn.kernel import polynomial
    >>> bool(polynomial.claim_logits([[1.0]], [[-2.0]], degree=8)[0] < 1e-13)
    True
    """
    call = _problem(q, k, _check.WEIGHTS, degree, form, mask, scale)
    x, y = Bounded.lift(call.at.q), Bounded.lift(call.at.k)
    return _ratio.evaluation(call.at.ends, len(y.value), *_blocks(call, x, y))


def feature_map(degree: int, depth: int, *, form: Form = "taylor", scale: float | None = None) -> FeatureMap:
    r"""Return the features whose product is κ(σ q·k), for `linear_transformer.attend`: C(D+p, p) of them.

    .. math::
        \phi_\alpha(x) = \sqrt{c_\alpha}\, (\sqrt{\sigma}\, x)^\alpha, \quad |\alpha| \le p, \qquad
        c_\alpha = \frac{1}{\alpha!} \quad\text{or}\quad
        c_\alpha = \frac{p (p - 1) \cdots (p - |\alpha| + 1)}{p^{|\alpha|}\, \alpha!}

    By the multinomial theorem :math:`(x \cdot y)^t = \sum_{|\alpha| = t} \frac{t!}{\alpha!} x^\alpha y^\alpha`.

    Parameters
    ----------
    degree : int
        p ≥ 1.
    depth : int
        D ≥ 1.
    form : {"taylor", "power"}
        κ.
    scale : float, optional
        σ > 0; the real number 1/√D unless given.

    Raises
    ------
    ValueError, TypeError
        Another degree, depth, form or scale, naming the argument.

    Examples
    --------
    >>> from refattn.kernel import linear_transformer, polynomial
    >>> phi = polynomial.feature_map(2, 1)
    >>> linear_transformer.attend([[1.0]], [[0.0], [2.0]], [[0.0], [6.0]], feature_map=phi).round(12)
    array([[5.]])
    """
    p, D = _check.integer("degree", degree, 1), _check.integer("depth", depth, 1)
    _check.choice("form", form, FORMS)
    sigma = scale if scale is None else _check.positive("scale", scale)
    return _monomials.feature_map(f"{form}({p})", _monomials.coefficients(p, D, form), sigma)


def cost(T: int, S: int, D: int, E: int, *, mask: MaskLike = None) -> Cost:
    """Return what one head costs in the kernel form: 2(D + E) flops a pair that is seen.

    >>> from refattn.kernel import polynomial
    >>> polynomial.cost(2, 3, 4, 4).flops
    96
    """
    _check.sizes(T, S, D, E)
    pairs = masks.bind(mask, T, S)
    count = T * S if pairs is None else int(np.max(pairs.count, initial=0))
    return Cost(pairs=count, flops=2 * count * (D + E), bytes=8 * (T + S) * (D + E))


class _Problem(NamedTuple):
    """A checked call: a problem of the linear engine, whose masks it shares, and the kernel."""

    at: linear.Problem
    degree: int
    form: str
    scale: float | None


class _Tile(NamedTuple):
    """Some rows against every key: what is seen, logits, κ, and its sums."""

    rows: NDArray[np.intp]
    seen: NDArray[np.bool_]
    s: Array
    kappa: Array
    den: Array


def _problem(
    q: Any, k: Any, v: Any, degree: int, form: str, mask: Any, scale: float | None, backend: str | Backend = "numpy"
) -> _Problem:
    p = _check.integer("degree", degree, 1)
    _check.choice("form", form, FORMS)
    sigma = scale if scale is None else _check.finite("scale", scale)
    at = linear.problem(q, k, v, feature_map=IDENTITY, eps=0.0, mask=mask)
    engines.choose(backend, "polynomial")
    return _Problem(at, p, form, sigma)


def _logits(call: _Problem) -> Any:
    return scaled(call.at.q @ call.at.k.mT, call.scale, call.at.q.shape[-1])


def _tiles(call: _Problem, n: int, of: Callable[[int, str, Any], Any]) -> Iterator[_Tile]:
    """Yield some rows of problem n at a time; where nothing is seen the logit and κ are 0, and a row's sum is 1."""
    x, y, _, ends = call.at.one(n)
    y, keys = _check.widened(y), np.arange(len(y))
    for rows in tiles(np.arange(len(x)), len(y)):
        seen = keys < ends[rows][:, None]
        s = np.where(seen, scaled(rows_of(x, rows) @ y.T, call.scale, x.shape[1]), 0.0)
        kappa, some = np.where(seen, of(call.degree, call.form, s), 0.0), seen.any(axis=1, keepdims=True)
        yield _Tile(rows, seen, s, kappa, np.where(some, kappa.sum(axis=1, keepdims=True), 1.0))


def _in_another_arithmetic(call: _Problem, kappa: Any) -> Any:
    """Return Σκv/Σκ."""
    return call.at.q.linear_forward(kappa, None, call.at.v, call.at.seen(), 0.0)


def _forward(call: _Problem) -> Array:
    T, _, _, E = call.at.sizes
    o = np.zeros((*call.at.leads.shape, T, E))
    for n in range(math.prod(call.at.leads.shape)):
        v = _check.widened(call.at.one(n)[2])
        for rows, seen, _, kappa, den in _tiles(call, n, kernel):
            matrix(o, n)[rows] = mix(kappa, v, seen) / den
    return o


def _bound(call: _Problem, n: int, o: Array) -> Array:
    q, k, v, ends = call.at.one(n)
    q, k, v = _check.widened(q), _check.widened(k), _check.widened(v)
    return _ratio.bound(o, v, ends, *_blocks(call, q, k))


def _blocks(call: _Problem, q: Any, k: Any) -> tuple[_ratio.Block, _ratio.Block]:
    """Return κ and the logits of some rows, in any arithmetic."""

    def logits(rows: NDArray[np.intp]) -> Any:
        return scaled(q[rows] @ k.mT, call.scale, q.shape[1])

    return lambda rows: kernel(call.degree, call.form, logits(rows)), logits
