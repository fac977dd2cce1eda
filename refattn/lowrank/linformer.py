# pyright: reportConstantRedefinition=false
# E and F are the paper's names.
r"""Linformer: keys and values are projected along the sequence first.

.. math::
    o = \mathrm{softmax}\!\big(\sigma\, Q (E K)^\top\big)\, F V, \qquad E, F \in \mathbb{R}^{r \times S}

Wang et al. 2020, arXiv:2006.04768, eq. (7). Every row sees every projected key: there is no causal form. The effective
weights softmax(σ Q (E K)ᵀ) F may be negative and need not sum to 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, perturbation, softmax
from refattn._mix import tiles
from refattn.engines import Backend
from refattn.heads import leads, matrix, unbroadcast
from refattn.method import Claim, Cost, Method, Option

Array = NDArray[Any]

METHOD = Method(
    name="linformer",
    family="lowrank",
    paper="arXiv:2006.04768, eq. (7)",
    arrays={"q": "T D", "k": "S D", "v": "S E", "E": "r S", "F": "r S"},
    draw_options={
        "rank": Option(
            doc="r, the length to which the sequence is compressed",
            domain=lambda r: r >= 1,
            typical=lambda n: tuple(sorted({max(1, min(n["S"], 1024) // d) for d in (16, 8, 4, 2)})),
        ),
        "projections": Option(
            doc="whether E and F are one array",
            domain=("separate", "shared").__contains__,
            typical=("separate", "shared"),
            default="separate",
        ),
    },
    drawn=("E", "F"),
    budget="rank",
    masks="none",
    rows="any",
    permutable=True,
    claims=(
        Claim(
            verb="bound",
            statement="L4",
            assumes="Nothing beyond finite arrays, whatever E and F are: it reads the exact weights of every pair.",
        ),
        Claim(
            verb="bound",
            statement="L3",
            assumes=(
                "At most as many projections as keys, else it says only how far the values reach: it reads every key, "
                "but no exact weight."
            ),
        ),
    ),
)


class Gradients(NamedTuple):
    """Gradients by argument name."""

    q: Any
    k: Any
    v: Any
    E: Any
    F: Any


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    E: ArrayLike,
    F: ArrayLike,
    *,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Linformer attention: exact softmax attention over r projected keys and values.

    .. math:: o_i = \sum_{l=1}^{r} \hat p_{il} (F V)_l, \qquad \hat p_i = \mathrm{softmax}(\sigma\, (E K) q_i)

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    E, F : (..., r, S)
        Projections of keys and of values; their leading axes are k's. Sharing them is passing one array twice.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument; E or F with another S.

    Examples
    --------
    >>> from refattn.lowrank import linformer
    >>> mean = [[0.5, 0.5]]
    >>> linformer.attend([[1.0]], [[0.0], [2.0]], [[1.0], [3.0]], mean, mean)
    array([[2.]])
    """
    q, k, v, E, F = _inputs(q, k, v, E, F)
    backend = engines.choose(backend, "softmax")
    return softmax.attend(q, E @ k, F @ v, scale=scale, backend=backend)


def weights(
    q: ArrayLike, k: ArrayLike, E: ArrayLike, F: ArrayLike, *, scale: float | None = None
) -> NDArray[np.float64]:
    r"""Return the effective weights softmax(σ Q (E K)ᵀ) F, (..., T, S): signed, of any row sum.

    >>> from refattn.lowrank import linformer
    >>> linformer.weights([[1.0]], [[0.0], [2.0]], [[0.5, 0.5]], [[1.0, -1.0]])
    array([[ 1., -1.]])
    """
    q, k, _, E, F = _inputs(q, k, _check.WEIGHTS, E, F)
    p = softmax.weights(q, E @ k, scale=scale)
    if F.ndim == 2:
        return p @ F
    joined = leads({"p": p.shape[:-2]}, {"F": F.shape[:-2]})
    out = np.empty((*joined.shape, p.shape[-2], F.shape[-1]))
    for n, (i, j) in enumerate(zip(joined.of["p"], joined.of["F"], strict=True)):
        matrix(out, n)[:] = matrix(p, i) @ matrix(F, j)
    return out


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    E: ArrayLike,
    F: ArrayLike,
    *,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    r"""Gradients of ⟨do, o⟩: softmax's, through the two projections.

    .. math:: dK = E^\top d(EK), \quad dE = d(EK)\, K^\top, \quad dV = F^\top d(FV), \quad dF = d(FV)\, V^\top

    Where E and F are one array, its gradient is the sum of the two.

    >>> from refattn.lowrank import linformer
    >>> linformer.vjp([[1.0]], [[1.0]], [[0.0], [2.0]], [[1.0], [3.0]], [[0.5, 0.5]], [[0.5, 0.5]]).F
    array([[1., 3.]])
    """
    q, k, v, E, F = _inputs(q, k, v, E, F)
    backend = engines.choose(backend, "softmax")
    g = softmax.vjp(do, q, E @ k, F @ v, scale=scale, backend=backend)
    return Gradients(
        g.q,
        unbroadcast(E.mT @ g.k, k.shape),
        unbroadcast(F.mT @ g.v, v.shape),
        unbroadcast(g.k @ k.mT, E.shape),
        unbroadcast(g.v @ v.mT, F.shape),
    )


def draw(
    rng: np.random.Generator,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    rank: int,
    projections: Literal["separate", "shared"] = "separate",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw E and F with independent N(0, 1/r) entries, one pair for all heads: the paper's random projections.

    >>> from refattn.lowrank import linformer
    >>> q = np.zeros((3, 2))
    >>> [x.shape for x in linformer.draw(np.random.default_rng(0), q, q, q, rank=2)]
    [(2, 3), (2, 3)]
    """
    _check.generator("rng", rng)
    r, S = _check.integer("rank", rank, 1), _check.array("k", k, "S D").shape[-2]
    _check.choice("projections", projections, ("separate", "shared"))
    E = rng.standard_normal((r, S)) / np.sqrt(r)
    return E, E if projections == "shared" else rng.standard_normal((r, S)) / np.sqrt(r)


def fit(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, rank: int, scale: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Fit E and F to these queries and keys by the singular value decomposition of their attention matrix.

    With :math:`P = U \Sigma W^\top` stacked over the queries that share a key head, E holds the leading rows of
    :math:`W^\top`, each scaled to absolute sum 1, and F is the least-squares answer :math:`A^+ P` for
    :math:`A = \mathrm{softmax}(\sigma Q (E K)^\top)`, so that no F does better for that E, in the Frobenius norm of
    the weights. It forms P: T×S memory.

    Returns
    -------
    E, F : (..., r, S)
        One pair for each key head; r is at most S and the number of queries that share a key head.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit, naming them; q and k whose attention weights are not finite.

    Examples
    --------
    >>> from refattn.lowrank import linformer
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 6, 2))
    >>> [x.shape for x in linformer.fit(q, k, v, rank=2)]
    [(2, 6), (2, 6)]
    """
    q, k, v = _check.qkv(q, k, v)
    rank = _check.integer("rank", rank, 1)
    P = softmax.weights(q, k, scale=scale)
    if not np.isfinite(P).all():
        raise ValueError("q and k give attention weights that are not finite")
    T, S = P.shape[-2:]
    joined = leads({"q": q.shape[:-2]}, {"k": k.shape[:-2]})
    keys = math.prod(k.shape[:-2])
    r = min(rank, S, T * len(joined.of["k"]) // max(1, keys))
    E, F = np.empty((*k.shape[:-2], r, S)), np.empty((*k.shape[:-2], r, S))
    for j in range(keys):
        sharing = np.flatnonzero(joined.of["k"] == j)
        stacked = np.concatenate([matrix(P, n) for n in sharing])
        W = np.linalg.svd(stacked, full_matrices=False)[2][:r]
        matrix(E, j)[:] = W / np.abs(W).sum(axis=1, keepdims=True)
        projected = matrix(E, j) @ matrix(k, j)
        A = np.concatenate([softmax.weights(matrix(q, joined.of["q"][n]), projected, scale=scale) for n in sharing])
        matrix(F, j)[:] = np.linalg.pinv(A) @ stacked
    return E, F


def bound(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, E: ArrayLike, F: ArrayLike, *, scale: float | None = None
) -> NDArray[np.float64]:
    r"""How far `attend` is from exact, unmasked softmax attention, at most (L3 and L4, elementwise).

    It is the least of three. L4: with the effective weights :math:`a_i = \hat p_i F` and exact ones :math:`p_i`,

    .. math:: \tfrac12 \|a_i - p_i\|_1 \operatorname*{range}_j v_{jc} + \Big|\sum_j a_{ij} - 1\Big|
              \cdot \tfrac12 \big|\max_j v_{jc} + \min_j v_{jc}\big|

    L3, which does not look at exact weights: give each key the nearest projected key, g(j), so that every projected key
    has one; c_l keys chose l. Then

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \Big| \sum_l \hat p_{il} (\tilde v_{lc} - \bar v_{lc}) \Big|
        + \tanh\!\big(\tfrac14 \operatorname*{osc}_j \delta_{ij}\big) \operatorname*{range}_j v_{jc},
        \qquad \delta_{ij} = \sigma q_i \cdot (\tilde k_{g(j)} - k_j) - \ln c_{g(j)}

    with :math:`\tilde k = E K`, :math:`\tilde v = F V` and :math:`\bar v_l` the mean value of the keys that chose l; it
    needs at most as many projections as keys. And the distance from õ to the far end of the values' range, in which the
    exact output lies. It reads every pair: O(T·S·(D + r)) time, a tile at a time.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.lowrank import linformer
    >>> same = np.array([[0.5, 0.5]])
    >>> linformer.bound([[1.0]], [[1.0], [1.0]], [[2.0], [2.0]], same, same)
    array([[0.]])
    """
    q, k, v, E, F = _inputs(q, k, v, E, F)
    sigma = _check.scale(scale, q.shape[-1])
    o, kt, vt = attend(q, k, v, E, F, scale=scale), E @ k, F @ v
    phat = softmax.weights(q, kt, scale=scale)
    out = np.zeros(o.shape)
    joined = leads(
        {"o": o.shape[:-2], "q": q.shape[:-2], "p": phat.shape[:-2]},
        {name: x.shape[:-2] for name, x in (("k", k), ("v", v), ("kt", kt), ("vt", vt), ("F", F))},
    )
    named = {"o": o, "q": _check.widened(q), "p": phat, "k": k, "v": v, "kt": kt, "vt": vt, "F": F}
    for n in range(math.prod(joined.shape)):
        matrix(out, n)[:] = _bound(**{s: matrix(x, joined.of[s][n]) for s, x in named.items()}, sigma=sigma)
    return out


def cost(T: int, S: int, D: int, E: int, *, rank: int) -> Cost:
    """Return what one head costs: two projections and exact attention over r keys.

    >>> from refattn.lowrank import linformer
    >>> linformer.cost(8, 8, 4, 4, rank=2).pairs
    16
    """
    _check.sizes(T, S, D, E)
    rank = _check.integer("rank", rank, 1)
    flops = 2 * rank * (T + S) * (D + E)
    return Cost(pairs=T * rank, flops=flops, bytes=8 * (T * (D + E) + S * (D + E) + 2 * rank * S))


def _inputs(q: Any, k: Any, v: Any, E: Any, F: Any) -> tuple[Array, Array, Array, Array, Array]:
    """Check the arrays; keys, values and projections are widened, for they meet each other first."""
    q, k, v = _check.qkv(q, k, v)
    E, F = _check.array("E", E, "r S"), _check.array("F", F, "r S")
    _check.size("E", E.shape[-1], k.shape[-2], "S", "k")
    _check.size("F", F.shape[-1], k.shape[-2], "S", "k")
    _check.size("F", F.shape[-2], E.shape[-2], "r", "E")
    if E.shape[-2] < 1:
        raise ValueError("E has r = 0; expected at least 1 projected key")
    for name, x, like, y in (("E", E, "k", k), ("F", F, "v", v)):
        try:
            np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        except ValueError:
            raise ValueError(
                f"{name} has leading axes {x.shape[:-2]}; expected axes that broadcast with {like}'s, {y.shape[:-2]}"
            ) from None
    return q, _check.widened(k), _check.widened(v), _check.widened(E), _check.widened(F)


def _groups(k: NDArray[np.float64], kt: NDArray[np.float64]) -> NDArray[np.intp]:
    """Give each key a projected key, the nearest where possible, so that every projected key has one (r ≤ S)."""
    distance = (kt**2).sum(axis=1) - 2 * (k @ kt.T)  # less ‖k‖², which does not change who is nearest
    g = distance.argmin(axis=1)
    counts = np.bincount(g, minlength=len(kt))
    for lone in np.flatnonzero(counts == 0):
        spare = np.where(counts[g] > 1, distance[:, lone], np.inf)
        j = int(spare.argmin())
        counts[g[j]] -= 1
        g[j], counts[lone] = lone, 1
    return g


def _bound(
    o: Array, q: Array, p: Array, k: Array, v: Array, kt: Array, vt: Array, F: Array, sigma: float
) -> NDArray[np.float64]:
    """Return the bound of one problem: the least of L3, L4 and the distance to the end of the values' range."""
    trivial = perturbation.trivial(v, o)
    if len(k) == 0:
        return trivial
    return np.minimum.reduce([trivial, _by_weights(q, p, k, v, F, sigma), _by_lift(q, p, k, v, kt, vt, sigma)])


def _by_weights(q: Array, p: Array, k: Array, v: Array, F: Array, sigma: float) -> NDArray[np.float64]:
    """L4: how far effective weights are from exact ones."""
    gap, excess = np.empty((len(q), 1)), np.empty((len(q), 1))
    for rows in tiles(np.arange(len(q)), len(k)):
        a = p[rows] @ F
        gap[rows] = np.abs(a - softmax.weights(q[rows], k, scale=sigma)).sum(axis=1, keepdims=True)
        excess[rows] = np.abs(a.sum(axis=1, keepdims=True) - 1)
    middle = np.abs(v.max(axis=0) / 2 + v.min(axis=0) / 2)
    return gap / 2 * perturbation.spread(v) + excess * middle


def _by_lift(q: Array, p: Array, k: Array, v: Array, kt: Array, vt: Array, sigma: float) -> NDArray[np.float64]:
    """L3: how far keys are from the projected keys that they chose, and their values from the projected values."""
    if len(kt) > len(k):
        return np.full((len(q), v.shape[1]), np.inf)
    g = _groups(k, kt)
    counts = np.bincount(g, minlength=len(kt)).astype(np.float64)
    order = np.argsort(g, kind="stable")
    means = np.add.reduceat(v[order], np.searchsorted(g[order], np.arange(len(kt))), axis=0) / counts[:, None]
    shift, seats = sigma * (kt[g] - k).T, np.log(counts)[g]
    span = np.concatenate([np.ptp(q[rows] @ shift - seats, axis=1) for rows in tiles(np.arange(len(q)), len(k))])
    tilt = perturbation.tilt_total_variation(span)[:, None] * perturbation.spread(v)
    return np.abs(p @ (vt - means)) + tilt
