r"""Linear Transformer: the exponential of a dot product becomes a dot product of features.

.. math::
    o_i = \frac{\sum_j \phi(q_i) \cdot \phi(k_j)\, v_j}{\sum_j \phi(q_i) \cdot \phi(k_j) + \varepsilon}, \qquad
    \phi(x) = \mathrm{elu}(x) + 1

over the keys that row i sees. Katharopoulos et al. 2020, arXiv:2006.16236, eq. (5), (7) and, causally, (9)–(12). It
is another attention rather than an approximation of softmax: only `bound`, evaluated on the arrays, says how far.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, linear, perturbation
from refattn.engines import Backend
from refattn.heads import matrix
from refattn.kernel import _ratio
from refattn.kernel._feature_map import FeatureMap, elu_plus_one
from refattn.lifted import Lifted
from refattn.linear import State
from refattn.masks import MaskLike, causal
from refattn.method import Claim, Cost, Method, Option

METHOD = Method(
    name="linear_transformer",
    family="kernel",
    paper="arXiv:2006.16236, eq. (5), (7)",
    arrays={"q": "T D", "k": "S D", "v": "S E"},
    options={
        "feature_map": Option(
            doc="φ", domain=lambda f: isinstance(f, FeatureMap), typical=(elu_plus_one,), default=elu_plus_one
        ),
        "eps": Option(doc="ε added to the normaliser", domain=lambda e: e >= 0, typical=(0.0, 0.125), default=0.0),
    },
    masks="prefix",
    rows="stochastic",
    permutable=True,
    engines=("linear",),
    claims=(
        Claim(
            verb="bound",
            statement="K1",
            assumes=(
                "Kernel values above 0 at all keys that the row sees, else it says only how far the values reach: "
                "it reads every pair."
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
    feature_map: FeatureMap = elu_plus_one,
    eps: float = 0.0,
    mask: MaskLike = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Linear attention in time and memory linear in the length (in chunks).

    .. math:: o_i = \frac{\phi(q_i)^\top \sum_{j} \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_{j} \phi(k_j) + \varepsilon}

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`. The map has no scale.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    feature_map : FeatureMap
        φ, with its derivative.
    eps : float
        ε ≥ 0. It shrinks every output by the factor den / (den + ε), which `bound` accounts for.
    mask : Mask, optional
        Rows must see the first keys, and never fewer than the row before: causal, lengths, prefix.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0. One whose every κ underflows to 0, with ε = 0, is 0/0 = NaN, as IEEE 754 says.

    Raises
    ------
    ValueError, TypeError
        Shapes, options or a mask that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn import masks
    >>> from refattn.kernel import linear_transformer
    >>> linear_transformer.attend([[0.0], [0.0]], [[0.0], [1.0]], [[0.0], [3.0]], mask=masks.causal())
    array([[0.],
           [2.]])
    """
    call = linear.problem(q, k, v, feature_map=feature_map, eps=eps, mask=mask)
    return linear.forward(call, engines.choose(backend, "linear"))[0]


def weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    feature_map: FeatureMap = elu_plus_one,
    eps: float = 0.0,
    mask: MaskLike = None,
) -> NDArray[np.float64]:
    r"""Return the attention matrix κ_ij / (Σ_l κ_il + ε), κ_ij = φ(q_i)·φ(k_j), (..., T, S): eq. (5), in parallel.

    >>> from refattn.kernel import linear_transformer
    >>> linear_transformer.weights([[0.0]], [[0.0], [1.0]]).round(3)
    array([[0.333, 0.667]])
    """
    call = linear.problem(q, k, _check.WEIGHTS, feature_map=feature_map, eps=eps, mask=mask)
    if isinstance(call.q, Lifted):
        return linear.forward(call, Backend("numpy"))[0]
    T, S, _, _ = call.sizes
    p = np.zeros((*call.leads.shape, T, S))
    for n in range(math.prod(call.leads.shape)):
        x, y, _, ends = call.one(n)
        seen = np.arange(S) < ends[:, None]
        kappa = np.where(seen, feature_map.of(_check.widened(x)) @ feature_map.of(_check.widened(y)).T, 0.0)
        some = seen.any(axis=1, keepdims=True)
        matrix(p, n)[:] = np.where(some, kappa / np.where(some, kappa.sum(axis=1, keepdims=True) + eps, 1.0), 0.0)
    return p


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    feature_map: FeatureMap = elu_plus_one,
    eps: float = 0.0,
    mask: MaskLike = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    r"""Gradients of ⟨do, o⟩, in linear time: a sweep forward for q and one backward for k and v (§3.3.1).

    With g_i = do_i / den_i and h_i = −do_i·o_i / den_i:

    .. math::
        d\phi(q_i) = \sum_j (g_i \cdot v_j + h_i)\, \phi(k_j), \quad
        d\phi(k_j) = \sum_i (g_i \cdot v_j + h_i)\, \phi(q_i), \quad dv_j = \sum_i \kappa_{ij} g_i

    >>> from refattn.kernel import linear_transformer
    >>> linear_transformer.vjp([[1.0]], [[0.0]], [[0.0], [0.0]], [[0.0], [3.0]]).v
    array([[0.5],
           [0.5]])
    """
    call = linear.problem(q, k, v, feature_map=feature_map, eps=eps, mask=mask)
    return Gradients(*linear.backward(call, do, engines.choose(backend, "linear")))


def step(
    state: State | None,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    feature_map: FeatureMap = elu_plus_one,
    eps: float = 0.0,
    backend: str | Backend = "numpy",
) -> tuple[NDArray[np.floating[Any]], State]:
    """Take any number of tokens: each sees itself, those before it and what the state holds (eq. 16–20).

    `state` None starts. Any split of a sequence into steps gives causal `attend` of the whole, up to rounding.

    >>> from refattn.kernel import linear_transformer
    >>> o, state = linear_transformer.step(None, [[0.0]], [[0.0]], [[1.0]])
    >>> linear_transformer.step(state, [[0.0]], [[0.0]], [[3.0]])[0]
    array([[2.]])
    """
    call = linear.problem(q, k, v, feature_map=feature_map, eps=eps, mask=causal(), state=state)
    _check.size("k", call.k.shape[-2], call.q.shape[-2], "S", "q's T")
    return linear.forward(call, engines.choose(backend, "linear"))


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    feature_map: FeatureMap = elu_plus_one,
    eps: float = 0.0,
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from `refattn.softmax.attend` of the same arrays, mask and scale, at most (K1, elementwise).

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \tanh\!\big(\tfrac14 \operatorname*{osc}_j(\ln \kappa_{ij} - s_{ij})\big)
        \operatorname*{range}_j v_{jc} + |\tilde o_{ic}| \frac{\varepsilon}{\mathrm{den}_i}

    over the keys that the row sees, and never more than the distance from õ to the far end of the values' range,
    in which the exact output lies. Where some κ ≤ 0 only the latter is known. It reads every pair: O(T·S·D) time,
    a tile at a time.

    Parameters
    ----------
    scale : float, optional
        The scale of the softmax attention that this is measured against; 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.kernel import linear_transformer
    >>> linear_transformer.bound([[0.0]], [[1.0], [1.0]], [[0.0], [3.0]])
    array([[0.]])
    """
    call = linear.problem(q, k, v, feature_map=feature_map, eps=eps, mask=mask)
    sigma = _check.scale(scale, call.q.shape[-1])
    with np.errstate(all="ignore"):  # an answer that is 0/0 or overflows has the bound NaN or ∞
        o = linear.forward(call, Backend("numpy"))[0]
        out = np.zeros_like(o)
        for n in range(math.prod(call.leads.shape)):
            matrix(out, n)[:] = _bound(call, n, matrix(o, n), sigma)
    return out


def bound_from_box(box: float, depth: int, *, scale: float | None = None) -> float:
    r"""Total variation between elu + 1 attention and softmax attention, at most, for entries that are at most B (K5).

    .. math::
        \mathrm{TV} \le \tanh\!\big(\tfrac14 (B + \ln(1 + B) + 2 |\sigma| D B^2)\big)
        \qquad \text{if } |q_c| \le B,\ |k_{jc}| \le B

    No constant is smaller. It holds for `elu_plus_one`, ε = 0 and any mask; the outputs of a column then differ by at
    most that part of its values' range. Unlike `bound` it reads no array. It falls like B/2 where weights that ignore
    the keys are off by B²: small inputs are not what elu + 1 is good at.

    Parameters
    ----------
    box
        B ≥ 0, the largest absolute entry of q and k.
    depth
        D.
    scale
        The scale of the softmax attention that this is measured against; 1/√D unless given.

    Raises
    ------
    ValueError, TypeError
        Another box, depth or scale, naming the argument.

    Examples
    --------
    >>> from refattn.kernel import linear_transformer
    >>> round(linear_transformer.bound_from_box(1.0, 1), 4)
    0.7274
    """
    B = _check.finite("box", box)
    if B < 0:
        raise ValueError(f"box is {B}; expected at least 0")
    D = _check.integer("depth", depth, 1)
    span = B + np.log1p(B) + 2 * abs(_check.scale(scale, D)) * D * B * B
    return float(perturbation.tilt_total_variation(span))


def cost(
    T: int,
    S: int,
    D: int,
    E: int,
    *,
    feature_map: FeatureMap = elu_plus_one,
    mask: MaskLike = None,
) -> Cost:
    """Return what one head costs: no pair is formed, 2r(E+1) flops a key and a query each.

    >>> from refattn.kernel import linear_transformer
    >>> linear_transformer.cost(8, 8, 4, 4).pairs
    0
    """
    _check.sizes(T, S, D, E)
    r = feature_map.of(np.zeros((1, D))).shape[-1]
    return Cost(pairs=0, flops=2 * (T + S) * r * (E + 1), bytes=8 * (T * (D + E) + S * (D + E)))


def _bound(call: linear.Problem, n: int, o: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    q, k, v, ends = call.one(n)
    q, k, v, phi = _check.widened(q), _check.widened(k), _check.widened(v), call.feature_map.of
    fk = phi(k)
    return _ratio.bound(
        o, v, ends, lambda rows: phi(q[rows]) @ fk.T, lambda rows: sigma * (q[rows] @ k.T), eps=call.eps
    )
