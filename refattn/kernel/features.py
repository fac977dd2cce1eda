r"""Random features of the kernel of softmax: φ(x)·φ(y) whose mean over ω ~ N(0, I) is e^{x·y}, for three of four kinds.

With ω of m rows and x = √σ q, y = √σ k, so that x·y is the logit:

.. math::
    \text{positive:}\quad & m^{-1/2}\, e^{\omega x - \|x\|^2/2} \\
    \text{hyperbolic:}\quad & (2m)^{-1/2}\, [e^{\omega x - \|x\|^2/2},\; e^{-\omega x - \|x\|^2/2}] \\
    \text{trigonometric:}\quad & m^{-1/2}\, e^{\|x\|^2/2}\, [\cos \omega x,\; \sin \omega x] \\
    \text{relu:}\quad & m^{-1/2}\, \max(\omega x, 0)

The first three are unbiased: Choromanski et al. 2021, arXiv:2009.14794, Lemma 1 and §2.3. ReLU's are not features of
this kernel: their mean is an arc-cosine kernel, whatever m is. How far the others stray: `refattn.kernel.moments`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refattn import _check
from refattn.heads import unbroadcast
from refattn.kernel._feature_map import FeatureMap
from refattn.kernel._scale import number, root
from refattn.lifted import concatenate
from refattn.rounding import Bounded

Kind = Literal["positive", "hyperbolic", "trigonometric", "relu"]
Directions = Literal["iid", "orthogonal"]
Norms = Literal["chi", "sqrt"]

KINDS = ("positive", "hyperbolic", "trigonometric", "relu")
EXPONENTIAL = ("positive", "hyperbolic")
"""Kinds whose features, and so whose kernels, are positive."""
DIRECTIONS = ("iid", "orthogonal")
NORMS = ("chi", "sqrt")

_POWER = {"positive": -1.0, "hyperbolic": -1.0, "trigonometric": 1.0, "relu": 0.0}  # φ has the factor e^{power·‖x‖²/2}


def of(x: Any, omega: Any, *, kind: Kind) -> Any:
    r"""Return φ(x), (..., n, r): r = m, or 2m for hyperbolic and trigonometric features.

    Parameters
    ----------
    x : (..., n, D)
        √|σ| times queries or keys; sign(σ) goes to one of them.
    omega : (..., m, D)
        As `draw` returns it, or any other.
    kind
        One of `KINDS`.

    Returns
    -------
    (..., n, r)
        In the arithmetic that x or omega is in.

    Raises
    ------
    ValueError, TypeError
        Shapes or a kind that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn.kernel import features
    >>> features.of([[0.0, 0.0]], np.ones((4, 2)), kind="positive")
    array([[0.5, 0.5, 0.5, 0.5]])
    """
    x, omega = _inputs(x, omega, kind)
    return raw(project(x, omega, kind), height(x, kind), kind) / _norm(omega, kind)


def vjp(dphi: Any, x: Any, omega: Any, *, kind: Kind) -> tuple[Any, Any]:
    r"""Return the gradients of ⟨dφ, φ(x)⟩ with respect to x and to omega.

    >>> from refattn.kernel import features
    >>> dx, domega = features.vjp([[1.0]], [[0.5]], [[2.0]], kind="relu")
    >>> dx, domega
    (array([[2.]]), array([[0.5]]))
    """
    x, omega = _inputs(x, omega, kind)
    projected = project(x, omega, kind)
    phi = raw(projected, height(x, kind), kind)
    dphi = _check.array("dphi", dphi, "n r")
    if dphi.shape != phi.shape:
        raise ValueError(f"dphi has shape {dphi.shape}; expected {phi.shape}")
    dx, domega = pull(*pull_raw(dphi / _norm(omega, kind), projected, phi, kind), x, omega, kind)
    return unbroadcast(dx, x.shape), unbroadcast(domega, omega.shape)


def draw(
    rng: np.random.Generator, count: int, depth: int, *, directions: Directions = "iid", norms: Norms = "chi"
) -> NDArray[np.float64]:
    """Draw ω, (m, D).

    Parameters
    ----------
    rng
        The source of randomness.
    count, depth
        m and D, at least 1.
    directions
        ``"iid"``: independent and uniform. ``"orthogonal"``: each block of D rows is orthogonal, the rows of a uniform
        (Haar) rotation, blocks independent; of the last block as many as are left.
    norms
        ``"chi"``: independent, those of N(0, I_D). ``"sqrt"``: all √D, which is not unbiased (R5).

    Raises
    ------
    ValueError, TypeError
        Numbers or words that are not allowed, naming the argument.

    Examples
    --------
    >>> from refattn.kernel import features
    >>> omega = features.draw(np.random.default_rng(0), 2, 2, directions="orthogonal", norms="sqrt")
    >>> (omega @ omega.T).round(12) + 0.0
    array([[2., 0.],
           [0., 2.]])
    """
    _check.generator("rng", rng)
    m, D = _check.integer("count", count, 1), _check.integer("depth", depth, 1)
    _check.choice("directions", directions, DIRECTIONS)
    _check.choice("norms", norms, NORMS)
    if directions == "iid":
        omega = rng.standard_normal((m, D))
        return omega if norms == "chi" else omega * (np.sqrt(D) / np.linalg.norm(omega, axis=1, keepdims=True))
    blocks, upper = np.linalg.qr(rng.standard_normal((-(-m // D), D, D)))
    # QR alone fixes signs by its algorithm; with R's diagonal made positive the rotation is uniform
    blocks = blocks * np.copysign(1.0, np.diagonal(upper, axis1=1, axis2=2))[:, None, :]
    rows = blocks.mT.reshape(-1, D)[:m]
    if norms == "sqrt":
        return rows * np.sqrt(D)
    return rows * np.linalg.norm(rng.standard_normal((m, D)), axis=1, keepdims=True)


def feature_map(omega: Any, *, kind: Kind, scale: float | None = None) -> FeatureMap:
    """Return φ(√σ ·) as a map for `refattn.kernel.linear_transformer`, whose answer is then Performer's.

    `scale` is σ ≥ 0, 1/√D unless given: a negative one asks for two maps, one for queries and one for keys.

    >>> from refattn.kernel import features, linear_transformer
    >>> phi = features.feature_map([[1.0, 0.0]], kind="positive")
    >>> linear_transformer.attend([[1.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]], [[1.0], [3.0]], feature_map=phi)
    array([[2.]])
    """
    omega = _check.widened(_check.array("omega", omega, "m D"))
    _check.choice("kind", kind, KINDS)
    if scale is not None and _check.finite("scale", scale) < 0:
        raise ValueError(f"scale is {scale}; expected at least 0, for one map serves queries and keys")

    def mapped(x: Any) -> Any:
        return of(x * root(scale, omega.shape[-1], x), omega, kind=kind)

    def pulled(dphi: Any, x: Any) -> Any:
        by = root(scale, omega.shape[-1], x)
        return vjp(dphi, x * by, omega, kind=kind)[0] * by

    return FeatureMap(f"{kind} features", mapped, pulled)


def columns(kind: Kind, count: int) -> int:
    """Return r, how many features there are for m rows of ω."""
    return 2 * count if kind in ("hyperbolic", "trigonometric") else count


def project(x: Any, omega: Any, kind: Kind) -> Any:
    """Return ω·x for each row, (n, m); for hyperbolic features ω·x and −ω·x."""
    dots = x @ omega.mT
    return concatenate(dots, -dots, axis=-1) if kind == "hyperbolic" else dots


def height(x: Any, kind: Kind) -> Any:
    """Return what features have in the exponent beside ω·x: ∓‖x‖²/2, or 0, (n, 1)."""
    return (x * x).sum(-1, keepdims=True) * (_POWER[kind] / 2)


def raw(projected: Any, height: Any, kind: Kind) -> Any:
    """Return features without their factor m^{-1/2}, or (2m)^{-1/2} for hyperbolic ones."""
    if kind in EXPONENTIAL:
        return np.exp(projected + height)
    if kind == "relu":
        return np.maximum(projected, 0.0)
    return concatenate(np.cos(projected), np.sin(projected), axis=-1) * np.exp(height)


def pull_raw(dphi: Any, projected: Any, phi: Any, kind: Kind) -> tuple[Any, Any]:
    """Return the gradients of ⟨dφ, raw⟩ with respect to what is projected and to the height."""
    if kind == "relu":
        return dphi * _step(projected), (dphi * 0.0).sum(-1, keepdims=True)
    each = dphi * phi
    total = each.sum(-1, keepdims=True)
    if kind in EXPONENTIAL:
        return each, total
    m = projected.shape[-1]
    return dphi[..., m:] * phi[..., :m] - dphi[..., :m] * phi[..., m:], total


def pull(dprojected: Any, dheight: Any, x: Any, omega: Any, kind: Kind) -> tuple[Any, Any]:
    """Return the gradients with respect to x and ω of what was projected, and of the height."""
    m = omega.shape[-2]
    dots = dprojected[..., :m] - dprojected[..., m:] if kind == "hyperbolic" else dprojected
    dx = dots @ omega
    return dx if kind == "relu" else dx + dheight * x * _POWER[kind], dots.mT @ x


def largest(x: Any) -> Any:
    """Return the largest of each row, (n, 1), in any arithmetic; among equals it is the first."""
    if isinstance(x, np.ndarray):
        return x.max(axis=-1, keepdims=True)
    parts: list[Any] = [x[:, f : f + 1] for f in range(x.shape[1])]
    return functools.reduce(lambda best, new: np.maximum(new, best), parts)


def _step(x: Any) -> Any:
    """Return 1 where x > 0, else 0; what rounding leaves undecided may be either."""
    if not isinstance(x, Bounded):
        return np.where(x > 0, 1.0, 0.0)
    return Bounded(np.where(x.value > 0, 1.0, 0.0), np.where(np.abs(x.value) <= 2 * x.error, 1.0, 0.0))


def _norm(omega: Any, kind: Kind) -> Any:
    m = omega.shape[-2]
    return np.sqrt(number(2 * m if kind == "hyperbolic" else m, omega))


def _inputs(x: Any, omega: Any, kind: Any) -> tuple[Any, Any]:
    x, omega = _check.array("x", x, "n D"), _check.array("omega", omega, "m D")
    _check.size("omega", omega.shape[-1], x.shape[-1], "D", "x")
    if omega.shape[-2] < 1:
        raise ValueError("omega has m = 0; expected at least 1 row")
    _check.choice("kind", kind, KINDS)
    return _check.widened(x), _check.widened(omega)
