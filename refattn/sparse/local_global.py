r"""Local and global keys: each row's own block, and a few sampled positions of every block.

.. math::
    \text{union:} \quad & o_i = \sum_{j \in B(i) \cup P} \frac{e^{\sigma q_i \cdot k_j}}{z_i} v_j \\
    \text{sum:} \quad & o_i = \sum_{j \in B(i)} \frac{e^{\sigma q_i \cdot k_j}}{z^B_i} v_j
                            + \sum_{j \in P} \frac{e^{\sigma q_i \cdot k_j}}{z^P_i} v_j

with B(i) the block of b keys that row i's position p = i + S − T lies in, ⌊j/b⌋ = ⌊p/b⌋, and P the positions that all
rows see, such as g drawn from each block. With b = √S a row looks at √S + g√S keys.

The sum adds two answers, each normalised by itself. Its rows sum to 2 where both parts see something, so it is no mean
of the values and approximates no attention: of values that are all 1 it makes 2. Half of it is the average of the
parts, which is off the merged answer by (½ − α)(o_B − o_P), α the block's share, where P leaves the block out; and it
counts a position in the row's own block twice (statement S4). It stands here because it is what code that adds a local
and a global attention computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, dropped, masks, softmax
from refattn._pairs import integer
from refattn.engines import Backend
from refattn.masks import Mask, MaskLike
from refattn.method import Claim, Cost, Method, Option

Form = Literal["union", "sum"]
FORMS: tuple[str, ...] = ("union", "sum")

BLOCK = Option(
    doc="b, keys in a block; √S rounded unless given",
    domain=lambda n: n is None or n >= 1,
    typical=lambda n: tuple(sorted({max(1, round(f * n["S"] ** 0.5)) for f in (0.5, 1, 2, 4)})),
    default=None,
)

METHOD = Method(
    name="local_global",
    family="sparse",
    paper="",
    arrays={"q": "T D", "k": "S D", "v": "S E"},
    options={
        "positions": Option(
            doc="positions of the keys that all rows see",
            domain=lambda t: all(0 <= x for x in t),
            typical=lambda n: ((),) + (((0,),) if n["S"] else ()),
        ),
        "block": BLOCK,
        "form": Option(
            doc="one softmax over both, or the sum of two", domain=FORMS.__contains__, typical=FORMS, default="union"
        ),
    },
    draw_options={
        "block": BLOCK,
        "sampled": Option(doc="g, positions drawn from each block", domain=lambda n: n >= 0, typical=(1, 0, 2)),
    },
    drawn=("positions",),
    budget="block",
    variants=({"form": "sum"},),
    masks="any",
    rows="any",
    permutable=False,
    claims=(
        Claim(
            verb="bound",
            statement="S1",
            assumes=(
                "Nothing beyond finite arrays: it reads every logit, the dropped keys' too; of the sum of two answers "
                "it says only how far the values reach."
            ),
        ),
    ),
)


class Gradients(NamedTuple):
    """Gradients by argument name."""

    q: Any
    k: Any
    v: Any


class Drawn(NamedTuple):
    """What `draw` draws."""

    positions: tuple[int, ...]


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    positions: Sequence[int],
    block: int | None = None,
    form: Form = "union",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Attention to the row's own block and to positions that all rows see.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    positions : sequence of int
        P: positions on the key axis that every row sees, as far as the mask lets it; a set, in any order. See `draw`.
    block : int, optional
        b ≥ 1, keys in a block; √S, rounded and at least 1, unless given. Row i stands at p = i + S − T.
    form : {"union", "sum"}
        Exact softmax over block and positions, each key once; or the literal sum of two softmaxes, the block's and the
        positions', whose rows sum to 2.
    mask : Mask or (..., T, S) of bool, optional
        What may be seen at all, such as `refattn.masks.causal`.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0; in the sum, so is a part that sees nothing.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument.

    Examples
    --------
    >>> from refattn.sparse import local_global
    >>> x, v = np.zeros((4, 1)), [[1.0], [2.0], [3.0], [6.0]]
    >>> local_global.attend(x, x, v, positions=[0], block=2)
    array([[1.5       ],
           [1.5       ],
           [3.33333333],
           [3.33333333]])
    >>> local_global.attend(x, x, v, positions=[0], block=2, form="sum")
    array([[2.5],
           [2.5],
           [5.5],
           [5.5]])
    """
    first, *rest = _parts(*_check.lengths(q, k), positions, block, form, mask)
    o = softmax.attend(q, k, v, mask=first, scale=scale, backend=backend)
    return o if not rest else o + softmax.attend(q, k, v, mask=rest[0], scale=scale, backend=backend)


def weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    positions: Sequence[int],
    block: int | None = None,
    form: Form = "union",
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    """Return the matrix that multiplies v, (..., T, S): in the sum, of two softmaxes.

    >>> from refattn.sparse import local_global
    >>> x = np.zeros((2, 1))
    >>> local_global.weights(x, x, positions=[0], block=1, form="sum")
    array([[2., 0.],
           [1., 1.]])
    """
    first, *rest = _parts(*_check.lengths(q, k), positions, block, form, mask)
    p = softmax.weights(q, k, mask=first, scale=scale)
    return p if not rest else p + softmax.weights(q, k, mask=rest[0], scale=scale)


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    positions: Sequence[int],
    block: int | None = None,
    form: Form = "union",
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    """Gradients of ⟨do, o⟩: softmax's over the union, or the sum of both parts'.

    >>> from refattn.sparse import local_global
    >>> x = np.zeros((2, 1))
    >>> local_global.vjp(np.ones((2, 1)), x, x, x, positions=[0], block=1, form="sum").v
    array([[3.],
           [1.]])
    """
    parts = _parts(*_check.lengths(q, k), positions, block, form, mask)
    each = [softmax.vjp(do, q, k, v, mask=part, scale=scale, backend=backend)[:3] for part in parts]
    return Gradients(*each[0]) if len(each) == 1 else Gradients(*(a + b for a, b in zip(*each, strict=True)))


def draw(
    rng: np.random.Generator, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, block: int | None = None, sampled: int
) -> Drawn:
    """Draw `sampled` positions from each block, all different, the same for all heads; fewer where a block is shorter.

    >>> from refattn.sparse import local_global
    >>> x = np.zeros((5, 1))
    >>> positions, = local_global.draw(np.random.default_rng(0), x, x, x, block=2, sampled=1)
    >>> [p // 2 for p in positions]
    [0, 1, 2]
    """
    _check.generator("rng", rng)
    S, g = int(_check.array("k", k, "S D").shape[-2]), _check.integer("sampled", sampled, 0)
    b = _block(S, block)
    found: list[int] = []
    for start in range(0, S, b):
        size = min(b, S - start)
        found += sorted(start + int(n) for n in rng.choice(size, min(g, size), replace=False))
    return Drawn(tuple(found))


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    positions: Sequence[int],
    block: int | None = None,
    form: Form = "union",
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from exact attention with the same mask, at most, elementwise.

    Of the union, S1 with the keys D_i that the mask shows to row i and that are in neither part, of softmax mass ρ_i:

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \rho_i \max\Big(\max_{j \in D_i} v_{jc} - \tilde o_{ic},\;
        \tilde o_{ic} - \min_{j \in D_i} v_{jc}\Big)

    The sum approximates nothing, so all that is claimed of it is P2, that exact attention lies within the values of
    the keys that the mask shows, A_i, and how far õ is from there:

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \max\Big(\max_{j \in A_i} v_{jc} - \tilde o_{ic},\;
        \tilde o_{ic} - \min_{j \in A_i} v_{jc}\Big)

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it. O(T·S·D) time for the union, a tile at a time.

    Examples
    --------
    >>> from refattn.sparse import local_global
    >>> x = np.zeros((2, 1))
    >>> local_global.bound(x, x, [[0.0], [2.0]], positions=[], block=1)
    array([[1.],
           [1.]])
    """
    T, S = _check.lengths(q, k)
    kept = _parts(T, S, positions, block, form, None)
    if form == "union":
        return dropped.bound(q, k, v, kept=kept[0], mask=mask, scale=scale)
    o = attend(q, k, v, positions=positions, block=block, form=form, mask=mask, scale=scale)
    return dropped.reach(q, k, v, o, mask=mask)


def cost(
    T: int,
    S: int,
    D: int,
    E: int,
    *,
    positions: Sequence[int],
    block: int | None = None,
    form: Form = "union",
    mask: MaskLike = None,
) -> Cost:
    """Return what one head costs: 2(D + E) flops a pair that is seen; in the sum, each part's own.

    >>> from refattn.sparse import local_global
    >>> local_global.cost(4, 4, 2, 2, positions=[0], block=2).pairs
    10
    >>> local_global.cost(4, 4, 2, 2, positions=[0], block=2, form="sum").pairs
    12
    """
    _check.sizes(T, S, D, E)
    parts = [softmax.cost(T, S, D, E, mask=part) for part in _parts(T, S, positions, block, form, mask)]
    return Cost(sum(x.pairs for x in parts), sum(x.flops for x in parts), parts[0].bytes)


def _block(S: int, block: int | None) -> int:
    return max(1, round(math.sqrt(S))) if block is None else integer("block", block, 1)


def _parts(T: int, S: int, positions: Sequence[int], block: int | None, form: str, mask: Any) -> tuple[Mask, ...]:
    """Return the pairs of the one softmax, or of the two that are added, after checking what they are made of."""
    masks.bind(mask, T, S)
    _check.choice("form", form, FORMS)
    everyone = np.isin(np.arange(S), _check.positions("positions", positions, S)).astype(np.int64)
    local, wide = masks.block_local(_block(S, block)), masks.segments(np.ones(T, np.int64), everyone)
    return tuple(masks.meet(mask, part) for part in ((local | wide,) if form == "union" else (local, wide)))
