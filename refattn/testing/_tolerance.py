r"""How far an attention kernel of a stated arithmetic may be from the real number: statements F1, F2, F5, B4."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import engines
from refattn._mix import tiles
from refattn.bias import BiasLike
from refattn.engines import One, Order
from refattn.heads import matrix
from refattn.masks import MaskLike
from refattn.rounding import Bounded
from refattn.testing._arithmetic import Arithmetic, arithmetic_of
from refattn.testing._forward import Inputs, Rows

Array = NDArray[np.float64]


class Tolerance(NamedTuple):
    """What is allowed of a kernel: an array for each answer, of its shape; None for what was not asked."""

    o: Any
    lse: Any
    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    sink: Any = None


def tolerance(
    arithmetic: Arithmetic | str,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias: BiasLike = None,
    sink: ArrayLike | None = None,
    softcap: float | None = None,
    order: Order = "softcap, bias",
    mask: MaskLike = None,
    scale: float | None = None,
    do: ArrayLike | None = None,
    dlse: ArrayLike | None = None,
) -> Tolerance:
    r"""Return how far any kernel of an arithmetic may be from the real number, elementwise.

    To first order, with :math:`e_j` the logarithmic error of a weight, h the depth of the sums and u their roundoff,

    .. math::
        |\hat o - o| \lesssim \sum_j p_j e_j |v_j - o| + (u_P + h u) \sum_j p_j |v_j| + (h u + u_{out}) |o|.

    The whole statement, which holds for any order of summation and any tiling unless the arithmetic names one, is F1
    and F2, and B4 for gradients, in ``proofs/test_tolerance.py``.

    Parameters
    ----------
    arithmetic : Arithmetic or str
        What the kernel computes in, or the name of one of `PRESETS`.
    q, k, v : (..., T, D), (..., S, D), (..., S, E)
        What the kernel was given, and what `refattn.softmax.attend` takes; so are the other arguments.
    do : (..., T, E), optional
        Cotangent of the output: asks for gradients too.
    dlse : (..., T), optional
        Cotangent of lse.

    Returns
    -------
    Tolerance
        `o` (..., T, E) and `lse` (..., T) for the answer; each gradient has its argument's shape. ∞ where nothing can
        be promised, because a number may overflow its format or no digit of a row's sum is certain. 0 where a row
        sees nothing. What is not seen never matters, not even NaN.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument, before any work.

    Examples
    --------
    >>> from refattn import softmax
    >>> from refattn.testing import tolerance
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 8, 16)).astype(np.float32)
    >>> allowed = tolerance("fp32", q, k, v)
    >>> bool((abs(softmax.attend(q, k, v).astype(np.float32) - softmax.attend(q, k, v)) <= allowed.o).all())
    True
    """
    chosen = arithmetic_of(arithmetic)
    call = engines.problem(q, k, v, bias=bias, sink=sink, softcap=softcap, order=order, mask=mask, scale=scale)
    T, _, _, E = call.sizes
    o, lse = np.zeros((*call.leads.shape, T, E)), np.zeros((*call.leads.shape, T))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # where a number is not finite nothing is sure
        for n, one in enumerate(call.all()):
            to_o, to_lse = _forward(one, chosen)
            matrix(o, n)[:] = to_o
            lse.reshape(-1, T)[n] = to_lse
    return Tolerance(o, lse)


def _forward(one: One, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """Return E and E_L of one problem."""
    T, S, _, width = one.problem.sizes
    inputs = Inputs(one, arithmetic)
    definition, lse = Bounded.lift(one.q).softmax_forward(one)
    E, E_L = np.zeros((T, width)), np.zeros(T)
    for rows in tiles(np.arange(T), S):
        some = Rows(one, inputs, rows, arithmetic, definition.error[rows])
        _, E[rows] = some.output()
        E_L[rows] = some.log_sum_exp() + lse.error[rows]
    return E, E_L
