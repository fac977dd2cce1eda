r"""How far an attention kernel of a stated arithmetic may be from the real number: statements F1, F2, F5, B4."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines
from refattn._mix import tiles
from refattn.bias import BiasLike, Table
from refattn.engines import One, Order, Problem
from refattn.heads import matrix
from refattn.masks import MaskLike
from refattn.rounding import EVALUATION, Bounded, gamma
from refattn.testing._arithmetic import Arithmetic, arithmetic_of
from refattn.testing._backward import Gradient, flat, gradients
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
    shape = call.leads.shape
    asked = do is not None or dlse is not None
    do = np.zeros((*shape, T, E)) if do is None else _check.shaped("do", do, "T E", (*shape, T, E))
    dlse = np.zeros((*shape, T)) if dlse is None else _check.shaped("dlse", dlse, "T", (*shape, T))
    out, to_lse, sums = np.zeros((*shape, T, E)), np.zeros((*shape, T)), _Sums(call, chosen)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # where a number is not finite nothing is sure
        for n, one in enumerate(call.all()):
            definition, lse = Bounded.lift(one.q).softmax_forward(one)
            matrix(out, n)[:], flat(to_lse, 1)[n] = _forward(one, chosen, definition, lse)
            if asked:
                cotangents = (np.array(matrix(do, n), np.float64), np.array(matrix(dlse, n, 1), np.float64))
                sums.add(n, gradients(one, chosen, *cotangents, definition, lse))
    return Tolerance(out, to_lse, *(sums.bounds() if asked else ()))


def _forward(one: One, arithmetic: Arithmetic, definition: Bounded, lse: Bounded) -> tuple[Array, Array]:
    """Return E and E_L of one problem."""
    T, S, _, width = one.problem.sizes
    inputs, E, E_L = Inputs(one, arithmetic), np.zeros((T, width)), np.zeros(T)
    for rows in tiles(np.arange(T), S):
        some = Rows(one, inputs, rows, arithmetic, definition.error[rows])
        _, E[rows] = some.output()
        E_L[rows] = some.log_sum_exp() + lse.error[rows]
    return E, np.where(np.isnan(E_L), np.inf, E_L)


class _Sums:
    """Gradients by argument, summed over the problems that read it."""

    def __init__(self, call: Problem, arithmetic: Arithmetic) -> None:
        self.call, self.arithmetic = call, arithmetic
        table = call.bias.array if isinstance(call.bias, Table) else None
        arrays = {"q": call.q, "k": call.k, "v": call.v, "bias": table, "sink": call.sink}
        self.shapes = {name: np.shape(x) for name, x in arrays.items() if x is not None}
        zeros = ({s: np.zeros(x) for s, x in self.shapes.items()} for _ in range(4))
        self.value, self.error, self.size, self.reach = zeros

    def add(self, n: int, found: dict[str, Gradient]) -> None:
        """Add one problem's."""
        for name, (value, error, reach) in found.items():
            at = int(self.call.leads.of[name][n])
            parts = (value, error, np.abs(value) + error, reach)
            for total, part in zip((self.value, self.error, self.size, self.reach), parts, strict=True):
                flat(total[name], part.ndim)[at] += part

    def bounds(self) -> tuple[Array | None, ...]:
        """Return what is allowed: the sum over problems is rounded too, as are its terms, if there are several."""
        f, problems = self.arithmetic.formats, math.prod(self.call.leads.shape)
        u, kept = f.output.u, f.output.bits >= f.accumulate.bits and f.output.least <= f.accumulate.least
        out: list[Array | None] = []
        for name in ("q", "k", "v", "bias", "sink"):
            if name not in self.shapes:
                out.append(None)
                continue
            error, shape = self.error[name], self.shapes[name]
            count = problems * math.prod(shape[len(shape) - (0 if name == "sink" else 2) :]) // max(1, math.prod(shape))
            if count > 1:
                each = gamma(count, f.accumulate.u) + u
                error = error + each * (1 + each) * self.size[name] + count * f.output.tiny
            total = np.abs(self.value[name]) * EVALUATION + error
            error = error if kept else error + u * total + np.minimum(f.output.tiny, total)
            size = np.maximum(total, self.size[name])
            over = (size + u * size > f.output.largest) | (self.reach[name] > f.accumulate.largest) | np.isnan(error)
            out.append(np.where(over, np.inf, error * EVALUATION))
        return tuple(out)
