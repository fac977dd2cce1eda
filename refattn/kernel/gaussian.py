r"""Gaussian kernel attention: a key counts by its distance from the query rather than by their dot product.

.. math::
    o_i = \frac{\sum_j \kappa_{ij} v_j}{\sum_j \kappa_{ij}}, \qquad
    \kappa_{ij} = e^{-\sigma \|q_i - k_j\|^2 / 2}
    = e^{-\sigma \|q_i\|^2 / 2}\, e^{\sigma q_i \cdot k_j}\, e^{-\sigma \|k_j\|^2 / 2}

over the keys that row i sees. The first factor is common to the row, so this is exact softmax attention with the key
bias −σ‖k_j‖²/2 (K4), and softmax attention itself where all keys are of one length. Tsai et al. 2019,
arXiv:1908.11775, compare it with other kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, perturbation, softmax
from refattn._mix import tiles
from refattn.engines import Backend, One, Problem
from refattn.heads import matrix
from refattn.kernel._feature_map import FeatureMap
from refattn.kernel._scale import number, root, scaled
from refattn.lifted import Lifted
from refattn.masks import MaskLike
from refattn.method import Claim, Cost, Method
from refattn.rounding import gamma

METHOD = Method(
    name="gaussian",
    family="kernel",
    paper="arXiv:1908.11775",
    arrays={"q": "T D", "k": "S D", "v": "S E"},
    masks="any",
    rows="stochastic",
    permutable=True,
    claims=(
        Claim(
            verb="bound",
            statement="K4",
            assumes="Nothing beyond finite arrays: of q and k it reads the lengths of the keys that the row sees.",
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
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Gaussian kernel attention, as exact softmax attention with a key bias.

    .. math:: o_i = \sum_j \mathrm{softmax}_j\big(\sigma q_i \cdot k_j - \tfrac12 \sigma \|k_j\|^2\big)\, v_j

    The weights are those of the distances, shifted by what is common to a row, so nothing underflows; where queries
    and keys are far from 0 and near each other, the two terms cancel, and `refattn.rounding.allowance` says how much
    that costs: a shift common to q and k changes nothing and may be taken off first.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    mask : Mask or (..., T, S) of bool, optional
        Which pairs are seen; see `refattn.masks`.
    scale : float, optional
        σ; the real number 1/√D unless given. With σ < 0 the farthest keys count most: no Gaussian any more, but
        attention within the same bounds; features need σ > 0.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0. A key whose ‖k‖² overflows answers NaN to the rows that see it.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or a mask that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn.kernel import gaussian
    >>> gaussian.attend([[1.0]], [[0.0], [2.0]], [[1.0], [3.0]])
    array([[2.]])
    """
    call, backend = engines.problem(q, k, v, mask=mask, scale=scale), engines.choose(backend, "softmax")
    return softmax.attend(call.q, call.k, call.v, bias=_bias(call), mask=mask, scale=scale, backend=backend)


def weights(q: ArrayLike, k: ArrayLike, *, mask: MaskLike = None, scale: float | None = None) -> NDArray[np.float64]:
    r"""Return the attention matrix κ_ij / Σ_l κ_il, (..., T, S), from the distances themselves.

    >>> from refattn.kernel import gaussian
    >>> gaussian.weights([[1.0]], [[0.0], [2.0]])
    array([[0.5, 0.5]])
    """
    call = engines.problem(q, k, _check.WEIGHTS, mask=mask, scale=scale)
    T, S, D, _ = call.sizes
    if isinstance(call.q, Lifted):
        ones: Any = call.q.lift(np.zeros((T, 1))), call.q.lift(np.zeros((S, 1)))
        return softmax.weights(*ones, bias=scaled(_distances(call.q, call.k), scale, D) / -2.0, mask=mask, scale=1.0)
    logits = np.empty((*call.leads.shape, T, S))
    with np.errstate(over="ignore", invalid="ignore"):
        for n, one in enumerate(call.all()):
            matrix(logits, n)[:] = scaled(_distances(_check.widened(one.q), _check.widened(one.k)), scale, D) / -2.0
    return softmax.weights(np.zeros((T, 1)), np.zeros((S, 1)), bias=_known(logits), mask=mask, scale=1.0)


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    r"""Gradients of ⟨do, o⟩: softmax's, and what reaches the keys through their bias.

    With :math:`dS` of `refattn.softmax.vjp`:

    .. math:: dq_i = \sigma \sum_j dS_{ij} k_j = \sigma \sum_j dS_{ij} (k_j - q_i), \qquad
              dk_j = \sigma \sum_i dS_{ij} (q_i - k_j), \qquad dv_j = \sum_i p_{ij} do_i

    >>> from refattn.kernel import gaussian
    >>> gaussian.vjp([[1.0]], [[1.0]], [[0.0], [2.0]], [[1.0], [3.0]]).k
    array([[-0.5],
           [-0.5]])
    """
    call, backend = engines.problem(q, k, v, mask=mask, scale=scale), engines.choose(backend, "softmax")
    T, S, D, E = call.sizes
    do = _check.shaped("do", do, "T E", (*call.leads.shape, T, E))
    g = softmax.vjp(do, call.q, call.k, call.v, bias=_bias(call), mask=mask, scale=scale, backend=backend)
    if isinstance(call.q, Lifted):
        return Gradients(g.q, g.k - scaled(call.k * g.bias.mT, scale, D), g.v)
    to_bias = np.zeros((math.prod(call.k.shape[:-2]), S))
    np.add.at(to_bias, call.leads.of["k"], g.bias.reshape(len(call.leads.of["k"]), S))
    column = to_bias.reshape(*call.k.shape[:-1], 1)
    share = np.where(column == 0, 0.0, _check.widened(call.k) * column)  # NaN that nobody sees is not reached
    return Gradients(g.q, g.k - scaled(share, scale, D), g.v)


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from `refattn.softmax.attend` of the same arrays, mask and scale, at most (K4, elementwise).

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \tanh\!\big(\tfrac18 |\sigma| \operatorname*{osc}_j \|k_j\|^2\big)
        \operatorname*{range}_j v_{jc}

    over the keys that the row sees, and never more than the distance from õ to the far end of the values' range, in
    which the exact output lies. 0 where the keys seen are of one length. It is the spread of ln κ_ij − σ q_i·k_j too
    (K1), so reading the queries would not make it smaller.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.kernel import gaussian
    >>> gaussian.bound([[1.0]], [[1.0], [-1.0]], [[0.0], [3.0]])
    array([[0.]])
    """
    call = engines.problem(q, k, v, mask=mask, scale=scale)
    with np.errstate(all="ignore"):  # an answer that overflows has the bound NaN or ∞
        o = np.asarray(attend(q, k, v, mask=mask, scale=scale), np.float64)
        out = np.zeros_like(o)
        for n, one in enumerate(call.all()):
            _bound(matrix(out, n), matrix(o, n), one)
    return out


def claim_logits(q: ArrayLike, k: ArrayLike, *, scale: float | None = None) -> NDArray[np.float64]:
    """Return how far σ‖k‖²/2 in `bound` may be off, (T,): D + 4 roundings touch a term.

    >>> from refattn.kernel import gaussian
    >>> bool(gaussian.claim_logits([[1.0]], [[2.0]])[0] < 1e-14)
    True
    """
    k = np.asarray(k, np.float64)
    most = (k * k).sum(axis=1).max(initial=0.0)
    return np.full(len(np.asarray(q)), gamma(k.shape[1] + 4) * abs(_check.scale(scale, k.shape[1])) * most / 2)


def feature_map(omega: ArrayLike, *, scale: float | None = None) -> FeatureMap:
    r"""Return features whose product is the Gaussian kernel on average, for `linear_transformer.attend`.

    .. math::
        \phi(x) = m^{-1/2} \big(e^{\sqrt\sigma\, \omega_f \cdot x - \sigma \|x\|^2}\big)_{f \le m}, \qquad
        \operatorname{E} \phi(q) \cdot \phi(k) = e^{-\sigma \|q - k\|^2 / 2}
        \quad \text{for } \omega_f \sim N(0, I)

    Parameters
    ----------
    omega : (m, D)
        The directions, m ≥ 1: draw them with ``rng.standard_normal((m, D))``.
    scale : float, optional
        σ > 0; the real number 1/√D unless given.

    Examples
    --------
    >>> from refattn.kernel import gaussian, linear_transformer
    >>> phi = gaussian.feature_map(np.zeros((1, 1)), scale=1.0)
    >>> linear_transformer.weights([[0.0]], [[0.0], [1.0]], feature_map=phi).round(3)
    array([[0.731, 0.269]])
    """
    w = np.array(_check.array("omega", omega, "m D"), np.float64)
    if w.ndim != 2 or 0 in w.shape or not np.isfinite(w).all():
        raise ValueError(f"omega has shape {w.shape}; expected finite numbers (m, D), m and D at least 1")
    (m, D), sigma = w.shape, scale if scale is None else _check.positive("scale", scale)

    def of(x: Any) -> Any:
        _check.size("omega", D, x.shape[-1], "D", "q")
        y = x * root(sigma, D, x)
        return np.exp(y @ w.T - (y * y).sum(axis=1, keepdims=True)) / np.sqrt(number(m, x))

    def pull(dphi: Any, x: Any) -> Any:
        by, both = root(sigma, D, x), dphi * of(x)
        return (both @ w - both.sum(axis=1, keepdims=True) * (x * by * 2.0)) * by

    return FeatureMap(f"gaussian(m={m})", of, pull)


def cost(T: int, S: int, D: int, E: int, *, mask: MaskLike = None) -> Cost:
    """Return what one head costs: what exact attention does.

    >>> from refattn.kernel import gaussian
    >>> gaussian.cost(2, 3, 4, 4).flops
    96
    """
    return softmax.cost(T, S, D, E, mask=mask)


def _bias(call: Problem) -> Any:
    """Return −σ‖k_j‖²/2 for each problem, (..., 1, S): a bias goes with the queries' heads, a key has its own."""
    k, (_, S, D, _) = _check.widened(call.k), call.sizes
    with np.errstate(over="ignore", invalid="ignore"):
        row = scaled((k * k).sum(axis=-1, keepdims=True), call.scale, D).mT / -2.0
    if isinstance(row, Lifted):
        return row
    each = row.reshape(math.prod(row.shape[:-2]), 1, S)
    return _known(each[call.leads.of["k"]].reshape(*call.leads.shape, 1, S))


def _known(logits: Array) -> Array:
    """Return logits in which overflow is NaN: −∞ would mean that the key is not seen."""
    return np.where(np.isneginf(logits), np.nan, logits)


def _distances(q: Any, k: Any) -> Any:
    """Return ‖q_i − k_j‖², (T, S)."""
    total: Any = 0.0
    for c in range(q.shape[1]):
        apart = q[:, c : c + 1] - k[:, c : c + 1].mT
        total = apart * apart + total
    return total


def _bound(out: Array, o: Array, one: One) -> None:
    k, v, call = _check.widened(one.k), _check.widened(one.v), one.problem
    half = scaled((k * k).sum(axis=1), call.scale, k.shape[1]) / 2
    for rows in tiles(np.arange(len(o)), len(k)):
        seen = np.ones((len(rows), len(k)), np.bool_) if one.pairs is None else one.pairs.seen(rows, np.arange(len(k)))
        high, low = (np.where(seen, x, -np.inf).max(axis=1, initial=-np.inf) for x in (half, -half))
        span = np.where(seen.any(axis=1), high + low, 0.0)
        tv = perturbation.tilt_total_variation(span)[:, None]
        out[rows] = np.minimum(tv * perturbation.spread(v, seen), perturbation.trivial(v, o[rows], seen))
