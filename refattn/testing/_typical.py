"""F6: how far a kernel of a stated arithmetic is from the real number if its roundings are independent. A model."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines
from refattn._mix import mix, tiles
from refattn.bias import BiasLike
from refattn.engines import One, Order
from refattn.heads import matrix
from refattn.masks import MaskLike
from refattn.rounding import Bounded
from refattn.testing._arithmetic import Arithmetic, arithmetic_of
from refattn.testing._backward import flat
from refattn.testing._forward import Inputs, Rows
from refattn.testing._tolerance import Tolerance

Array = NDArray[np.float64]

SHIFTS = np.arange(32) / 32
GUARD = 1.25


def typical(
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
    rate: float = 1e-6,
) -> Tolerance:
    r"""Return how far a kernel is from the real number where its roundings are independent and of mean zero (F6).

    With N numbers judged and a false-alarm rate δ, sums of h roundings cost :math:`\lambda u \sqrt h`,
    :math:`\lambda = \sqrt{2 \ln (12 N / \delta)}`, instead of :math:`h u`, and independent errors of the weights

    .. math:: \lambda \big(\textstyle\sum_j (p_j e_j (v_j - o))^2\big)^{1/2} \quad\text{instead of}\quad
              \textstyle\sum_j p_j e_j |v_j - o|.

    This is a model, not a theorem: what exceeds it is suspect, not wrong. Weights of a near-uniform row are all rounded
    the same way, so the cast of P is at least 1.25 times what it does to the exact weights at 32 scales.

    Parameters
    ----------
    arithmetic, q, k, v, bias, sink, softcap, order, mask, scale
        `tolerance`'s.
    rate : float
        δ, of the whole call: between 0 and 1.

    Returns
    -------
    Tolerance
        `o` and `lse`, never above `tolerance`'s; no gradients.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 64, 16)).astype(np.float32)
    >>> from refattn.testing import tolerance, typical
    >>> bool((typical("fp32", q, k, v).o <= tolerance("fp32", q, k, v).o).all())
    True
    """
    chosen = arithmetic_of(arithmetic)
    call = engines.problem(q, k, v, bias=bias, sink=sink, softcap=softcap, order=order, mask=mask, scale=scale)
    T, _, _, E = call.sizes
    o, lse = np.zeros((*call.leads.shape, T, E)), np.zeros((*call.leads.shape, T))
    odds = math.sqrt(2 * math.log(12 * max(1, o.size + lse.size) / _check.probability("rate", rate)))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for n, one in enumerate(call.all()):
            matrix(o, n)[:], flat(lse, 1)[n] = _one(one, chosen, odds)
    return Tolerance(o, lse)


def _one(one: One, arithmetic: Arithmetic, odds: float) -> tuple[Array, Array]:
    T, S, _, E = one.problem.sizes
    inputs, o, lse = Inputs(one, arithmetic), np.zeros((T, E)), np.zeros(T)
    definition, definition_lse = Bounded.lift(one.q).softmax_forward(one)
    for rows in tiles(np.arange(T), S):
        state = Rows(one, inputs, rows, arithmetic, definition.error[rows])
        answer, most = state.output()
        error, error_lse = _Typical(state, one, odds).errors(answer)
        o[rows] = np.fmin(error + definition.error[rows], most)
        lse[rows] = np.fmin(error_lse, state.log_sum_exp()) + definition_lse.error[rows]
    return o, np.where(np.isnan(lse), np.inf, lse)


class _Typical:
    """Some rows; errors of a weight are independent between keys, or common to them, for which nothing is gained."""

    def __init__(self, state: Rows, one: One, odds: float) -> None:
        self.state, self.odds, self.n_keys = state, odds, len(state.inputs.v)
        inputs, u = state.inputs, state.u
        self.live, self.p = state.live[:, : self.n_keys], state.p[:, : self.n_keys]
        D, self.sigma = one.problem.sizes[2], abs(one.problem.multiplier)
        q, k, self.dq, dk = np.abs(inputs.q[state.rows]), np.abs(inputs.k), inputs.dq[state.rows], inputs.dk
        size = self.sigma * (q @ k.T)
        # of what the proof charges a key, dot products, operands and rises of the maximum are replaced
        given = self.sigma * ((q + self.dq) @ (k + dk).T) - size
        sums = D * u.dots / (1 - D * u.dots) if D * u.dots < 1 else math.inf
        rises = state.rises[:, : self.n_keys]
        rest = state.e[:, : self.n_keys] + state.spared - given - sums * (size + given) - (rises + 1) * u.exp
        rest = np.maximum(rest - (-math.log1p(-state.uP) if state.common else 0.0), 0.0)
        alone = np.sqrt((u.dots * math.sqrt(D) * size) ** 2 + self.sigma**2 * (q**2 @ (dk**2).T) + rest**2)
        # the maximum of n keys in a random order rises ln n times
        few = np.minimum(rises, 1 + np.log(np.maximum(state.n, 1)))
        shared = self.sigma * (self.dq @ dk.T) + u.exp * (1 + odds * np.sqrt(few))
        self.alone, self.shared = np.where(self.live, alone, 0.0), np.where(self.live, shared, 0.0)

    def moved(self, x: Array) -> Array:
        """Return what errors of weights do to Σ p_j x_j: independent ones, those of q, and common ones."""
        k = np.where(np.isfinite(self.state.inputs.k), self.state.inputs.k, 0.0)
        of_q = self.sigma * np.sqrt((((self.p * x) @ k * self.dq) ** 2).sum(axis=1)) if self.dq.any() else 0.0
        each = np.sqrt(((self.p * self.alone * x) ** 2).sum(axis=1))
        return self.odds * (each + of_q) + (self.p * self.shared * np.abs(x)).sum(axis=1)

    def errors(self, o: Array) -> tuple[Array, Array]:
        """Return the typical errors of o and lse."""
        state, f, odds = self.state, self.state.arithmetic.formats, self.odds
        v, dv, p, live = state.inputs.v, state.inputs.dv, self.p, self.live
        error = np.empty(o.shape)
        for c in range(o.shape[1]):
            error[:, c] = self.moved(np.where(live, v[:, c] - o[:, c : c + 1], 0.0))
        if state.uP:
            error = error + np.maximum(self._cast(v, o), self._guard(v, o))
        h = np.sqrt(state.n + state.rises.max(axis=1, keepdims=True, initial=0.0)) * state.u.sums * odds
        size = np.abs(v)
        error = error + h * (mix(p, size, live) + np.abs(o)) + odds * np.sqrt(mix(p**2, dv**2, live))
        error = error + mix(np.where(live, state.zeta[:, : self.n_keys], 0.0), size, live)
        error = error + (3 * state.u.sums + f.output.u) * (np.abs(o) + error) + f.output.tiny + 2 * f.accumulate.tiny
        own = self.moved(np.where(live, 1.0, 0.0))
        ln, m = np.log(state.total[:, 0]), np.abs(state.m[:, 0])
        u = f.accumulate.u
        lse = own + h[:, 0] + (state.u.exp + u) * np.abs(ln) + u * (9 * m + 8 + np.abs(state.m[:, 0] + ln))
        lse = lse + state.zeta.sum(axis=1) + (odds * state.uP * np.sqrt((p**2).sum(axis=1)) if state.common else 0.0)
        lse = lse + f.lse.u * np.abs(state.m[:, 0] + ln)
        empty = state.empty[:, 0]
        return np.where(state.empty, 0.0, error), np.where(empty, 0.0, lse)

    def _cast(self, v: Array, o: Array) -> Array:
        """Return what independent casts of P do."""
        out = np.empty(o.shape)
        for c in range(o.shape[1]):
            size = np.where(self.live, np.abs(v[:, c] - (o[:, c : c + 1] if self.state.common else 0.0)), 0.0)
            out[:, c] = self.odds * self.state.uP * np.sqrt(((self.p * size) ** 2).sum(axis=1))
        return out

    def _guard(self, v: Array, o: Array) -> Array:
        """Return the most that a cast of the exact weights does, over scales within a binade, and a quarter."""
        state, a = self.state, self.state.arithmetic
        w, most = state.w[:, : self.n_keys] * a.weights_scale, np.zeros(o.shape)
        total = (state.total if a.normalise == "last" else 1.0) * a.weights_scale
        w = w if a.normalise == "last" else self.p * a.weights_scale
        for shift in 2.0**-SHIFTS:
            moved = (a.formats.weights.round(w * shift) - w * shift) / (shift * total)
            error = mix(moved, v, self.live)
            if state.common:
                error = error - moved.sum(axis=1, keepdims=True) * o
            most = np.maximum(most, np.abs(error))
        return GUARD * most
