r"""Sparse Transformer: causal attention whose pattern is factorised in two, strided or fixed.

.. math::
    o_i = \sum_{j \in A(i)} \frac{e^{\sigma q_i \cdot k_j}}{z_i} v_j, \qquad
    A(i) = A^{(1)}(p) \cup A^{(2)}(p), \quad A^{(1)}(p) \text{ or } A^{(2)}(p)

for a row at position p of the key axis, over the keys j ≤ p alone:

.. math::
    \text{strided:} \quad & A^{(1)}(p) = \{j : p - l < j\}, & A^{(2)}(p) &= \{j : (p - j) \bmod l = 0\} \\
    \text{fixed:} \quad & A^{(1)}(p) = \{j : \lfloor j/l \rfloor = \lfloor p/l \rfloor\},
    & A^{(2)}(p) &= \{j : j \bmod l \ge l - c\}

Child, Gray, Radford and Sutskever 2019, arXiv:1904.10509, §4. The window here is l keys, the row's own included, as in
the authors' code; the range that the paper writes, from p − l to p, has one key more.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, dropped, masks, softmax
from refattn.engines import Backend
from refattn.masks import Mask, MaskLike
from refattn.method import Claim, Cost, Method, Option

Pattern = Literal["strided", "fixed"]
Part = Literal["merged", "first", "second", "alternate"]
PATTERNS: tuple[str, ...] = ("strided", "fixed")
PARTS: tuple[str, ...] = ("merged", "first", "second", "alternate")

METHOD = Method(
    name="sparse_transformer",
    family="sparse",
    paper="arXiv:1904.10509, §4",
    arrays={"q": "T D", "k": "S D", "v": "S E"},
    options={
        "pattern": Option(
            doc="which factorised pattern", domain=PATTERNS.__contains__, typical=PATTERNS, default="strided"
        ),
        "length": Option(
            doc="l, the stride, or the size of a block",
            domain=lambda n: n >= 1,
            typical=lambda n: tuple(sorted({max(1, round(f * n["S"] ** 0.5)) for f in (0.5, 1, 2, 4)})),
        ),
        "columns": Option(
            doc="c, the last keys of a block that later rows see, where the pattern is fixed",
            domain=lambda n: n >= 1,
            typical=(1,),
            default=1,
        ),
        "part": Option(
            doc="both patterns in one softmax, one of them alone, or heads that take them in turn",
            domain=PARTS.__contains__,
            typical=("merged", "first", "second"),  # the fourth needs a heads axis
            default="merged",
        ),
    },
    budget="length",
    variants=({"pattern": "fixed"},),
    masks="any",
    causal=True,
    rows="stochastic",
    permutable=False,
    claims=(
        Claim(
            verb="bound",
            statement="S1",
            assumes=(
                "Nothing beyond finite arrays: it reads every logit up to the row's position, the dropped keys' too."
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
    pattern: Pattern = "strided",
    length: int,
    columns: int = 1,
    part: Part = "merged",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Sparse Transformer attention: exact softmax over the factorised pattern. It is causal by itself.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    pattern : {"strided", "fixed"}
        Strided: the last l keys, and every l-th key back from the row's position p = i + S − T. Fixed: the row's block
        of l keys, and the last c keys of every block; blocks are counted on positions of the key axis.
    length : int
        l ≥ 1; about √S makes both parts equally long.
    columns : int
        1 ≤ c ≤ l. The strided pattern has none.
    part : {"merged", "first", "second", "alternate"}
        One softmax over both parts, over the first (the near keys) or over the second (the far ones); or in turn, the
        heads 0, 2, … of q (axis −3) over the first and 1, 3, … over the second.
    mask : Mask or (..., T, S) of bool, optional
        What may be seen at all, beside causality: such as `refattn.masks.lengths`.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0, as are rows before the first block's last columns in the fixed pattern's second
        part.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument; heads in turn where q has no heads axis.

    Examples
    --------
    >>> from refattn.sparse import sparse_transformer
    >>> x, v = np.zeros((5, 1)), [[1.0], [2.0], [3.0], [4.0], [9.0]]
    >>> sparse_transformer.attend(x, x, v, length=2)  # the last row sees keys 3 and 4, and 0 and 2
    array([[1.  ],
           [1.5 ],
           [2.  ],
           [3.  ],
           [4.25]])
    """
    kept = _kept(q, k, pattern, length, columns, part, mask)
    return softmax.attend(q, k, v, mask=masks.meet(mask, kept), scale=scale, backend=backend)


def weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    pattern: Pattern = "strided",
    length: int,
    columns: int = 1,
    part: Part = "merged",
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    """Return the matrix that multiplies v, (..., T, S).

    >>> from refattn.sparse import sparse_transformer
    >>> x = np.zeros((4, 1))
    >>> sparse_transformer.weights(x, x, pattern="fixed", length=2)
    array([[1.        , 0.        , 0.        , 0.        ],
           [0.5       , 0.5       , 0.        , 0.        ],
           [0.        , 0.5       , 0.5       , 0.        ],
           [0.        , 0.33333333, 0.33333333, 0.33333333]])
    """
    kept = _kept(q, k, pattern, length, columns, part, mask)
    return softmax.weights(q, k, mask=masks.meet(mask, kept), scale=scale)


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    pattern: Pattern = "strided",
    length: int,
    columns: int = 1,
    part: Part = "merged",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    """Gradients of ⟨do, o⟩: softmax's, over the pattern.

    >>> from refattn.sparse import sparse_transformer
    >>> x = np.zeros((3, 1))
    >>> sparse_transformer.vjp(np.ones((3, 1)), x, x, x, length=2, part="second").v
    array([[1.5],
           [1. ],
           [0.5]])
    """
    kept = _kept(q, k, pattern, length, columns, part, mask)
    return Gradients(*softmax.vjp(do, q, k, v, mask=masks.meet(mask, kept), scale=scale, backend=backend)[:3])


def exact(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, mask: MaskLike = None, scale: float | None = None
) -> NDArray[np.floating[Any]]:
    """Causal softmax attention, also where the mask is not causal: what `bound` is measured against.

    >>> from refattn.sparse import sparse_transformer
    >>> x = np.zeros((2, 1))
    >>> sparse_transformer.exact(x, x, [[1.0], [3.0]])
    array([[1.],
           [2.]])
    """
    return softmax.attend(q, k, v, mask=_seen(q, k, mask), scale=scale)


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    pattern: Pattern = "strided",
    length: int,
    columns: int = 1,
    part: Part = "merged",
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from `exact`, at most (S1 with the row's own dropped keys, elementwise).

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \rho_i \max\Big(\max_{j \in D_i} v_{jc} - \tilde o_{ic},\;
        \tilde o_{ic} - \min_{j \in D_i} v_{jc}\Big)

    D_i are the keys j ≤ p outside A(i) that the mask shows, and ρ_i is their softmax mass, which takes every logit:
    O(T·S·D) time, a tile at a time. Each head is judged with its own part. That every key is reached in two steps, as
    the paper's patterns are made for, bounds nothing of one layer's error.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.sparse import sparse_transformer
    >>> x = np.zeros((4, 1))
    >>> sparse_transformer.bound(x, x, [[0.0], [3.0], [0.0], [0.0]], length=2, part="second")
    array([[0.  ],
           [1.5 ],
           [1.  ],
           [0.75]])
    """
    kept = _kept(q, k, pattern, length, columns, part, mask)
    return dropped.bound(q, k, v, kept=kept, mask=_seen(q, k, mask), scale=scale)


def cost(
    T: int,
    S: int,
    D: int,
    E: int,
    *,
    pattern: Pattern = "strided",
    length: int,
    columns: int = 1,
    part: Part = "merged",
    mask: MaskLike = None,
) -> Cost:
    """Return what one head costs: 2(D + E) flops a pair that is seen; of heads in turn, the dearer.

    >>> from refattn.sparse import sparse_transformer
    >>> sparse_transformer.cost(4, 4, 2, 2, length=2).pairs
    9
    """
    _check.sizes(T, S, D, E)
    masks.bind(mask, T, S)
    ways = _ways(T, S, pattern, length, columns, part)
    return max(softmax.cost(T, S, D, E, mask=masks.meet(mask, masks.causal() & way)) for way in ways)


def _seen(q: Any, k: Any, mask: Any) -> Mask:
    """Return what causal attention sees."""
    masks.bind(mask, *_check.lengths(q, k))
    return masks.meet(mask, masks.causal())


def _kept(q: Any, k: Any, pattern: str, length: int, columns: int, part: str, mask: Any) -> Mask:
    """Return the pattern, after checking everything that it and the mask are made of."""
    T, S = _check.lengths(q, k)
    masks.bind(mask, T, S)
    near, *far = _ways(T, S, pattern, length, columns, part)
    if not far:
        return masks.causal() & near
    shape: tuple[int, ...] = _check.array("q", q, "T D").shape
    if len(shape) < 3:
        raise ValueError(f"part is 'alternate', but q has shape {shape}; expected a heads axis: (..., H, T, D)")
    odd = masks.lengths(S * (np.arange(shape[-3]) % 2))  # heads 1, 3, … see every key of this mask, the others none
    return masks.causal() & (near & ~odd | far[0] & odd)


def _ways(T: int, S: int, pattern: str, length: int, columns: int, part: str) -> tuple[Mask, ...]:
    """Return the patterns that heads take in turn, without causality: one, or two."""
    _check.choice("pattern", pattern, PATTERNS)
    _check.choice("part", part, PARTS)
    n, c = _check.integer("length", length, 1), _check.integer("columns", columns, 1)
    both = masks.fixed(n, c)  # which refuses c > n
    if pattern == "strided":
        near, far = masks.window(n - 1, 0), masks.strided(n)
        both = near | far
    else:
        last = np.arange(S) % n >= n - c
        near, far = masks.block_local(n), masks.segments(np.ones(T, np.int64), last.astype(np.int64))
    return {"merged": (both,), "first": (near,), "second": (far,), "alternate": (near, far)}[part]
