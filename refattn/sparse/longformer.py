r"""Longformer: a sliding window, dilated or not, and a few global tokens with projections of their own.

.. math::
    o_i = \sum_{j \in W(i) \cup G} \frac{e^{\sigma q_i \cdot k_j}}{z_i} v_j \quad (i \notin G), \qquad
    o_i = \sum_{j} \frac{e^{\sigma q^g_i \cdot k^g_j}}{z^g_i} v^g_j \quad (i \in G)

with W(i) the w keys on each side of row i's position, d apart, and i's own. Beltagy, Peters and Cohan 2020,
arXiv:2004.05150, §3.1. Global tokens are positions on the key axis: seen by all and seeing all, no pair twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, dropped, masks, softmax
from refattn.engines import Backend
from refattn.masks import Mask, MaskLike
from refattn.method import Claim, Cost, Method, Option

METHOD = Method(
    name="longformer",
    family="sparse",
    paper="arXiv:2004.05150, §3.1",
    arrays={"q": "T D", "k": "S D", "v": "S E", "q_global": "T D?", "k_global": "S D?", "v_global": "S E?"},
    options={
        "window": Option(
            doc="w, keys on each side",
            domain=lambda w: w >= 0,
            typical=lambda n: tuple(sorted({max(1, min(n["S"], 8192) // d) for d in (64, 32, 16, 8, 4)})),
        ),
        "dilation": Option(
            doc="d, distance between the window's keys", domain=lambda d: d >= 1, typical=(1, 2), default=1
        ),
        "tokens": Option(
            doc="positions of the global tokens",
            domain=lambda t: all(0 <= x for x in t),
            typical=lambda n: ((),) + (((0,),) if n["S"] else ()),
            default=(),
        ),
    },
    linear_in=("v", "v_global"),
    budget="window",
    variants=({"tokens": (0,)},),
    masks="any",
    rows="stochastic",
    permutable=False,
    claims=(
        Claim(
            verb="bound",
            statement="S1",
            assumes=(
                "Nothing beyond finite arrays: it reads every logit, the dropped keys' too; rows of global tokens have "
                "the projections that they use."
            ),
        ),
    ),
)


class Gradients(NamedTuple):
    """Gradients by argument name; None for what was not given."""

    q: Any
    k: Any
    v: Any
    q_global: Any
    k_global: Any
    v_global: Any


class Weights(NamedTuple):
    """One matrix for each argument that the output is linear in; v_global's multiplies v where that is not given."""

    v: Any
    v_global: Any


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    q_global: ArrayLike | None = None,
    k_global: ArrayLike | None = None,
    v_global: ArrayLike | None = None,
    window: int,
    dilation: int = 1,
    tokens: Sequence[int] = (),
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Longformer attention: exact softmax over the window and the global tokens.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    q_global, k_global, v_global : as q, k, v, optional
        The global projections, which the rows of global tokens use; q, k and v where not given. The other rows read
        the global tokens' own k and v.
    window : int
        w ≥ 0: keys on each side of a row's position; 2w + 1 with itself.
    dilation : int
        d ≥ 1: the window's keys are d apart.
    tokens : sequence of int
        Positions of the global tokens on the key axis. Row i stands at i + S − T.
    mask : Mask or (..., T, S) of bool, optional
        What may be seen at all, such as `refattn.masks.causal`.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn.sparse import longformer
    >>> x = np.zeros((3, 1))
    >>> longformer.attend(x, x, [[0.0], [3.0], [6.0]], window=0, tokens=[0])
    array([[3. ],
           [1.5],
           [3. ]])
    """
    near, far = _masks(q, k, window, dilation, tokens, mask)
    given = _global(q, k, v, q_global, k_global, v_global)
    o = softmax.attend(q, k, v, mask=near, scale=scale, backend=backend)
    return o if len(tokens) == 0 else o + softmax.attend(*given, mask=far, scale=scale, backend=backend)


def weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    q_global: ArrayLike | None = None,
    k_global: ArrayLike | None = None,
    window: int,
    dilation: int = 1,
    tokens: Sequence[int] = (),
    mask: MaskLike = None,
    scale: float | None = None,
) -> Weights:
    """Return the matrices that multiply v and v_global, each (..., T, S): a row lies in one of them.

    >>> from refattn.sparse import longformer
    >>> longformer.weights(np.zeros((2, 1)), np.zeros((2, 1)), window=0, tokens=[0]).v_global
    array([[0.5, 0.5],
           [0. , 0. ]])
    """
    near, far = _masks(q, k, window, dilation, tokens, mask)
    q_far, k_far, _ = _global(q, k, k, q_global, k_global, None)
    return Weights(softmax.weights(q, k, mask=near, scale=scale), softmax.weights(q_far, k_far, mask=far, scale=scale))


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    q_global: ArrayLike | None = None,
    k_global: ArrayLike | None = None,
    v_global: ArrayLike | None = None,
    window: int,
    dilation: int = 1,
    tokens: Sequence[int] = (),
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    """Gradients of ⟨do, o⟩: softmax's over the two masks; what was not given is None and its share goes to q, k, v.

    >>> from refattn.sparse import longformer
    >>> x = np.zeros((3, 1))
    >>> longformer.vjp(np.ones((3, 1)), x, x, x, window=0, tokens=[0]).v
    array([[1.33333333],
           [0.83333333],
           [0.83333333]])
    """
    near, far = _masks(q, k, window, dilation, tokens, mask)
    given = _global(q, k, v, q_global, k_global, v_global)
    local = softmax.vjp(do, q, k, v, mask=near, scale=scale, backend=backend)
    wide = softmax.vjp(do, *given, mask=far, scale=scale, backend=backend)
    shared = [x is None for x in (q_global, k_global, v_global)]
    own = [a + b if one else a for a, b, one in zip(local[:3], wide[:3], shared, strict=True)]
    return Gradients(*own, *(None if one else b for b, one in zip(wide[:3], shared, strict=True)))


def exact(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    q_global: ArrayLike | None = None,
    k_global: ArrayLike | None = None,
    v_global: ArrayLike | None = None,
    tokens: Sequence[int] = (),
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.floating[Any]]:
    """Exact softmax attention of each row with the projections that the row uses: what `bound` is measured against.

    >>> from refattn.sparse import longformer
    >>> x = np.zeros((3, 1))
    >>> longformer.exact(x, x, [[0.0], [3.0], [6.0]], tokens=[0], v_global=np.ones((3, 1)))
    array([[1.],
           [3.],
           [3.]])
    """
    rest, far = _rows(q, k, tokens, mask)
    given = _global(q, k, v, q_global, k_global, v_global)
    return softmax.attend(q, k, v, mask=rest, scale=scale) + softmax.attend(*given, mask=far, scale=scale)


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    q_global: ArrayLike | None = None,
    k_global: ArrayLike | None = None,
    v_global: ArrayLike | None = None,
    window: int,
    dilation: int = 1,
    tokens: Sequence[int] = (),
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from `exact`, at most (S1 with the row's own dropped keys, elementwise).

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \rho_i \max\Big(\max_{j \in D_i} v_{jc} - \tilde o_{ic},\;
        \tilde o_{ic} - \min_{j \in D_i} v_{jc}\Big)

    D_i are the keys that row i does not look at although the mask lets it, and ρ_i is their softmax mass, which
    takes every logit: O(T·S·D) time, a tile at a time. Rows of global tokens drop nothing.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.sparse import longformer
    >>> x = np.zeros((2, 1))
    >>> longformer.bound(x, x, [[0.0], [2.0]], window=0)
    array([[1.],
           [1.]])
    """
    near, _ = _masks(q, k, window, dilation, tokens, mask)
    rest, _ = _rows(q, k, tokens, mask)
    _global(q, k, v, q_global, k_global, v_global)
    return dropped.bound(q, k, v, kept=near, mask=rest, scale=scale)


def cost(
    T: int,
    S: int,
    D: int,
    E: int,
    *,
    window: int,
    dilation: int = 1,
    tokens: Sequence[int] = (),
    mask: MaskLike = None,
) -> Cost:
    """Return what one head costs: 2(D + E) flops a pair that is seen.

    >>> from refattn.sparse import longformer
    >>> longformer.cost(4, 4, 2, 2, window=1).pairs
    10
    """
    near = masks.dilated(window, window, dilation) | masks.global_tokens(tokens)
    return softmax.cost(T, S, D, E, mask=masks.meet(mask, near))


def _rows(q: Any, k: Any, tokens: Sequence[int], mask: Any) -> tuple[Mask, Mask]:
    """Return what the other rows may see, and what the rows of global tokens may see."""
    T, S = _check.lengths(q, k)
    masks.bind(mask, T, S)
    rows = np.isin(masks.positions(mask, T, S), _check.positions("tokens", tokens, S))
    far = masks.segments(rows.astype(int), np.ones(S, int))
    return masks.meet(mask, ~far), masks.meet(mask, far)


def _masks(q: Any, k: Any, window: int, dilation: int, tokens: Sequence[int], mask: Any) -> tuple[Mask, Mask]:
    """Return the pairs of the window and the global keys, and the pairs of the rows of global tokens."""
    w, d = _check.integer("window", window, 0), _check.integer("dilation", dilation, 1)
    rest, far = _rows(q, k, tokens, mask)
    return masks.meet(rest, masks.dilated(w, w, d) | masks.global_tokens(tokens)), far


def _global(q: Any, k: Any, v: Any, q_global: Any, k_global: Any, v_global: Any) -> tuple[Any, Any, Any]:
    """Return what the rows of global tokens read."""
    pairs = (
        ("q", q, "q_global", q_global, "T D"),
        ("k", k, "k_global", k_global, "S D"),
        ("v", v, "v_global", v_global, "S E"),
    )
    out: list[Any] = []
    for name, own, name_global, other, axes in pairs:
        own = _check.array(name, own, axes)
        if other is None:
            out.append(own)
            continue
        other = _check.array(name_global, other, axes)
        if other.shape[-2:] != own.shape[-2:]:
            raise ValueError(f"{name_global} has shape {other.shape}; expected {name}'s last axes, {own.shape[-2:]}")
        out.append(other)
    return out[0], out[1], out[2]
