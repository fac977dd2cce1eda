# pyright: reportConstantRedefinition=false
# E and F are the paper's names.
r"""Linformer: keys and values are projected along the sequence first.

.. math::
    o = \mathrm{softmax}\!\big(\sigma\, Q (E K)^\top\big)\, F V, \qquad E, F \in \mathbb{R}^{r \times S}

Wang et al. 2020, arXiv:2006.04768, eq. (7). Every row sees every projected key: there is no causal form. The effective
weights softmax(σ Q (E K)ᵀ) F may be negative and need not sum to 1.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, perturbation, softmax
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
            typical=lambda n: tuple(sorted({max(1, n["S"] // d) for d in (16, 8, 4, 2)})),
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
    claims=(Claim(verb="bound", statement="L3"),),
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
    q, k, v = _inputs(q, k, v)
    E, F = _projections(E, F, k)
    return softmax.attend(q, E @ k, F @ v, scale=scale, backend=backend)


def weights(
    q: ArrayLike, k: ArrayLike, E: ArrayLike, F: ArrayLike, *, scale: float | None = None
) -> NDArray[np.float64]:
    r"""Return the effective weights softmax(σ Q (E K)ᵀ) F, (..., T, S): signed, of any row sum.

    >>> from refattn.lowrank import linformer
    >>> linformer.weights([[1.0]], [[0.0], [2.0]], [[0.5, 0.5]], [[1.0, -1.0]])
    array([[ 1., -1.]])
    """
    q, k, _ = _inputs(q, k, k)
    E, F = _projections(E, F, k)
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
    q, k, v = _inputs(q, k, v)
    E, F = _projections(E, F, k)
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

    Examples
    --------
    >>> from refattn.lowrank import linformer
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 6, 2))
    >>> [x.shape for x in linformer.fit(q, k, v, rank=2)]
    [(2, 6), (2, 6)]
    """
    q, k, v = _inputs(q, k, v)
    rank = _check.integer("rank", rank, 1)
    P = softmax.weights(q, k, scale=scale)
    T, S = P.shape[-2:]
    joined = leads({"q": q.shape[:-2]}, {"k": k.shape[:-2]})
    keys = int(np.prod(k.shape[:-2]))
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
    r"""How far `attend` is from exact, unmasked softmax attention, at most (L3 with known p̂, elementwise).

    Give each key the nearest projected key, g(j), so that every projected key has one; c_l keys chose l. Then

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \Big| \sum_l \hat p_{il} (\tilde v_{lc} - \bar v_{lc}) \Big|
        + \tanh\!\big(\tfrac14 \operatorname*{osc}_j \delta_{ij}\big) \operatorname*{range}_j v_{jc},
        \qquad \delta_{ij} = \sigma q_i \cdot (\tilde k_{g(j)} - k_j) - \ln c_{g(j)}

    with :math:`\tilde k = E K`, :math:`\tilde v = F V` and :math:`\bar v_l` the mean value of the keys that chose l;
    and never more than the distance from õ to the far end of the values' range, in which the exact output lies. With
    more projections than keys only the latter is known. It reads every pair: O(T·S·D) time, a tile at a time.

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
    q, k, v = _inputs(q, k, v)
    E, F = _projections(E, F, k)
    sigma = _check.scale(scale, q.shape[-1])
    o, kt, vt = attend(q, k, v, E, F, scale=scale), E @ k, F @ v
    phat = softmax.weights(q, kt, scale=scale)
    out = np.zeros(o.shape)
    if v.shape[-2] == 0:
        return np.abs(o)
    joined = leads(
        {"o": o.shape[:-2], "q": q.shape[:-2], "p": phat.shape[:-2]},
        {name: x.shape[:-2] for name, x in (("k", k), ("v", v), ("kt", kt), ("vt", vt))},
    )
    named = {"o": o, "q": q, "p": phat, "k": k, "v": v, "kt": kt, "vt": vt}
    for n in range(int(np.prod(joined.shape))):
        x = {s: np.asarray(matrix(a, joined.of[s][n]), np.float64) for s, a in named.items()}
        matrix(out, n)[:] = _bound(**x, sigma=sigma)
    return out


def cost(T: int, S: int, D: int, E: int, *, rank: int) -> Cost:
    """Return what one head costs: two projections and exact attention over r keys.

    >>> from refattn.lowrank import linformer
    >>> linformer.cost(8, 8, 4, 4, rank=2).pairs
    16
    """
    flops = 2 * rank * (T + S) * (D + E)
    return Cost(pairs=T * rank, flops=flops, bytes=8 * (T * (D + E) + S * (D + E) + 2 * rank * S))


def _inputs(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[Array, Array, Array]:
    """Check q, k and v; keys and values are widened, for the projections meet them first."""
    q, k, v = _check.array("q", q, "T D"), _check.array("k", k, "S D"), _check.array("v", v, "S E")
    _check.size("k", k.shape[-1], q.shape[-1], "D", "q")
    _check.size("v", v.shape[-2], k.shape[-2], "S", "k")
    return q, _check.widened(k), _check.widened(v)


def _projections(E: ArrayLike, F: ArrayLike, k: Array) -> tuple[Array, Array]:
    E, F = _check.array("E", E, "r S"), _check.array("F", F, "r S")
    _check.size("E", E.shape[-1], k.shape[-2], "S", "k")
    _check.size("F", F.shape[-1], k.shape[-2], "S", "k")
    _check.size("F", F.shape[-2], E.shape[-2], "r", "E")
    if E.shape[-2] < 1:
        raise ValueError("E has r = 0; expected at least 1 projected key")
    return _check.widened(E), _check.widened(F)


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
    o: NDArray[np.float64],
    q: NDArray[np.float64],
    p: NDArray[np.float64],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    kt: NDArray[np.float64],
    vt: NDArray[np.float64],
    sigma: float,
) -> NDArray[np.float64]:
    low, high = v.min(axis=0), v.max(axis=0)
    trivial = np.maximum(np.abs(o - low), np.abs(high - o))
    if len(kt) > len(k):
        return trivial
    g = _groups(k, kt)
    counts = np.bincount(g, minlength=len(kt)).astype(np.float64)
    members = np.zeros((len(kt), len(k)))
    members[g, np.arange(len(k))] = 1.0 / counts[g]
    moved = np.abs(p @ (vt - members @ v))
    shift, seats = sigma * (kt[g] - k), np.log(counts)[g]
    tiles = np.array_split(np.arange(len(q)), max(1, len(q) * len(k) // 2**20))
    span = np.concatenate([np.ptp(q[rows] @ shift.T - seats, axis=1) for rows in tiles])
    return np.minimum(moved + perturbation.tilt_total_variation(span)[:, None] * (high - low), trivial)
