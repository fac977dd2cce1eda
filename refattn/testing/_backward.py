"""B4 for any arithmetic: the gradients of one problem, and how far a kernel's may be from the real ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn._mix import mix, tiles
from refattn.bias import Table
from refattn.engines import One
from refattn.rounding import LOST, TINY, Bounded, U, gamma
from refattn.testing._arithmetic import Arithmetic
from refattn.testing._formats import Format
from refattn.testing._forward import Inputs, Rows, received, scaled

Array = NDArray[np.float64]


class Gradient(NamedTuple):
    """A gradient of the definition, and how far a kernel's may be from the real one before it is returned.

    `reach` is above what an accumulator holds on the way.
    """

    value: Array
    error: Array
    reach: Array


def flat(x: Array, axes: int) -> Array:
    """Return a view in which an array's leading axes are one."""
    cut = x.ndim - axes
    return x.reshape(math.prod(x.shape[:cut]), *x.shape[cut:])


def gradients(
    one: One, arithmetic: Arithmetic, do: Array, dlse: Array, definition: Bounded, lse: Bounded
) -> dict[str, Gradient]:
    """Return the gradients of one problem by argument name.

    `definition` and `lse` are the definition's answer with its rounding.
    """
    call, inputs = one.problem, Inputs(one, arithmetic)
    T, S, _, _ = call.sizes
    out: dict[str, Gradient] = {}
    for rows in tiles(np.arange(T), S):
        state = Rows(one, inputs, rows, arithmetic, definition.error[rows])
        part = _Part(state, one, do[rows], dlse[rows], lse.error[rows])
        for name, gradient in part.gradients(T).items():
            if name == "q" and name in out:
                out[name] = Gradient(*(np.concatenate(x) for x in zip(out[name], gradient, strict=True)))
            elif name in out:
                out[name] = Gradient(*(a + b for a, b in zip(out[name], gradient, strict=True)))
            else:
                out[name] = gradient
    return out


class _Part:
    """Some rows' share of the gradients; letters are those of proofs/test_tolerance.py."""

    def __init__(self, state: Rows, one: One, do: Array, dlse: Array, lse_error: Array) -> None:
        self.state, self.one, a = state, one, state.arithmetic
        f, self.u = a.formats, max(a.formats.scores.u, state.u.sums)
        inputs, self.live = state.inputs, state.live[:, : len(state.inputs.v)]
        some = self.live.any(axis=1, keepdims=True)
        self.do = np.where(some, do, 0.0)
        self.ddo = np.where(some, received(self.do, a), 0.0)
        o, E = state.output()
        E_L = (state.log_sum_exp() + lse_error)[:, None]
        size, v, dv = np.abs(self.do), np.abs(inputs.v), inputs.dv
        width = v.shape[1]
        g = np.where(self.live, self.do @ inputs.v.T, 0.0)
        d = (size + self.ddo) @ (v + dv).T * (1 + gamma(width, state.u.dots)) - size @ v.T + width * f.scores.tiny
        blur = gamma(width) * (size @ v.T) + width * TINY
        d = np.maximum(d, 0.0) + blur
        over = 2 * (size + self.ddo) @ (v + dv).T > f.scores.largest
        if f.stored_scores is not None:
            over |= 2 * (np.abs(g) + d) > f.stored_scores.largest
            d = d + f.stored_scores.u * (np.abs(g) + d) + f.stored_scores.tiny
        d = np.where(over, np.inf, d)
        d = np.where(self.live, d, 0.0)
        own = dlse[:, None] - (self.do * o).sum(axis=1, keepdims=True)
        moved = (size * state.moved).sum(axis=1, keepdims=True) + gamma(width + 1) * (size * np.abs(o)).sum(
            axis=1, keepdims=True
        )
        # the weights: exp(s − lse), or the forward's; one error for the row and one for each key
        n = np.log(np.maximum(state.n, 1))
        steps = 3 if a.exp == "exp" else 5
        common = E_L + self.u * np.abs(state.m + np.log(state.total))
        e = np.where(self.live, state.e[:, : len(v)] + steps * self.u * (n + E_L) + 2 * self.u, 0.0)
        self.p = state.p[:, : len(v)]
        stored = a.normalise == "before the cast"
        cast = state.uP if stored else 0.0
        lost = np.where(self.live, state.zeta[:, : len(v)] if stored else 0.0, 0.0)
        e = np.where(self.live, e - math.log1p(-cast), 0.0)
        self.e, self.common, self.grow = e, common, np.exp(common)
        delta = self._delta(o, E, g, d, lost) + moved
        E_D = delta + self.u * (np.abs(own) + delta + np.abs(dlse[:, None]))
        X = np.where(self.live, g + own, 0.0)
        far = np.where(self.live, np.abs(X) + blur + moved, 0.0)
        self._ds(X, far, d, E_D, lost)
        self.E_D, self.own = E_D, own

    def _delta(self, o: Array, E: Array, g: Array, d: Array, lost: Array) -> Array:
        """Bound the error of do·o, taken from the output or from the weights."""
        a, state = self.state.arithmetic, self.state
        size, reach = np.abs(self.do) + self.ddo, np.abs(o) + E
        width = o.shape[1]
        bounds: list[Array] = []
        if a.delta != "weights":
            depth = gamma(width, state.u.sums)
            terms = (np.abs(self.do) * E + self.ddo * reach + depth * size * reach).sum(axis=1, keepdims=True)
            terms = np.where(
                2 * (size * reach).sum(axis=1, keepdims=True) > a.formats.accumulate.largest, np.inf, terms
            )
            bounds.append(terms + width * a.formats.accumulate.tiny)
        if a.delta != "output":
            both = np.minimum(self.e + self.common, 700.0)
            each = self.p * (np.expm1(both) * np.abs(g) + np.exp(both) * d) + lost * (np.abs(g) + d)
            whole = (self.p * np.exp(both) + lost) * (np.abs(g) + d)
            each = np.where(2 * whole.sum(axis=1, keepdims=True) > a.formats.accumulate.largest, np.inf, each)
            n = state.n * state.u.sums
            depth = np.where(n < 1, n / np.where(n < 1, 1 - n, 1.0), np.inf)
            bounds.append(
                each.sum(axis=1, keepdims=True)
                + depth * whole.sum(axis=1, keepdims=True)
                + state.n * a.formats.accumulate.tiny
            )
        return np.maximum.reduce(bounds)

    def _ds(self, X: Array, far: Array, d: Array, E_D: Array, lost: Array) -> None:
        """Set dS and dZ of the definition, what of their errors is each pair's own, and sizes."""
        a, state, u, p, e, grow, live = (
            self.state.arithmetic,
            self.state,
            self.u,
            self.p,
            self.e,
            self.grow,
            self.live,
        )
        f = a.formats
        self.ds = p * X
        proper = grow * (p * (np.expm1(e) * far + np.exp(e) * (d * (1 + 3 * u) + 3 * u * (far + E_D))))
        proper = proper + (lost + state.lost / np.maximum(state.n, 1) + LOST) * (far + d + E_D)
        size = p * far + proper + grow * np.exp(e) * p * E_D
        proper = proper + grow * p * np.expm1(e) * E_D
        self.own_s, self.size_s = (np.where(live, x, 0.0) for x in (proper, size))
        self.ps, self.far, self.dz = p, far, self.ds
        own, size = self.own_s, self.size_s
        if state.slope is not None:
            slope, error = state.slope
            self.dz, self.ps = self.ds * slope, p * slope
            own = slope * own + (error + u * (slope + error)) * size
            size = (slope + error) * (1 + u) * size
        # dS is rounded as P is, and where steps are stored, once before and once after it is scaled
        sigma = abs(self.one.problem.multiplier)
        casts: list[tuple[Format, float]] = [(f.weights, 1.0)] if state.uP else []
        if f.stored_scores is not None:
            casts = [(f.stored_scores, 1.0), (f.stored_scores, sigma)]
        over = 2 * size > f.scores.largest
        for f_s, factor in casts:
            tiny = f_s.tiny / factor if factor else 0.0
            over |= factor * size > f_s.largest
            own = own + f_s.u * size + np.minimum(tiny, size)
            size = size * (1 + f_s.u) + tiny
        own = np.where(over, np.inf, own)
        self.own_z, self.size_z = (np.where(live, x, 0.0) for x in (own, size))

    def gradients(self, T: int) -> dict[str, Gradient]:
        """Return each argument's share; sums over rows have T terms."""
        state, one, a = self.state, self.one, self.state.arithmetic
        call, live, turned, wide, u = one.problem, self.live, self.live.T, state.wide, self.u
        f, inputs = a.formats, state.inputs
        sigma, n = abs(call.multiplier), live.shape[1]
        grow, tilt = self.grow, np.expm1(self.common)
        own, size = (np.where(live, x * wide, 0.0) for x in (self.own_z, self.size_z))
        q, dq_in, k, dk_in = self._factors()
        out: dict[str, Gradient] = {}

        to_k, p_k = mix(self.dz, inputs.k, live), mix(self.ps, inputs.k, live)
        real = np.where(live, self.ps * self.far, 0.0)
        blur = np.expm1(4 * state.doubt) + 2 * n * U
        unsure = mix((1 + blur) * real - np.abs(self.dz), k, live)
        cost, lost = self._sums(n, n, 1)
        error = mix(own, k, live) + grow * self.E_D * wide * (np.abs(p_k) + blur * mix(self.ps, k, live))
        error = error + tilt * (np.abs(to_k) + unsure) + cost * mix(size, k + dk_in, live)
        error = error + mix(size, dk_in, live) + n * f.accumulate.tiny
        value = call.multiplier * to_k
        error = sigma * error * (1 + 3 * u) + 3 * u * np.abs(value) + f.accumulate.tiny + lost
        reach = 2 * max(1.0, sigma)
        out["q"] = Gradient(
            value, np.where(live.any(axis=1, keepdims=True), error, 0.0), reach * mix(size, k + dk_in, live)
        )

        whole = own + np.where(live, wide * (grow * self.E_D * self.ps_error() + tilt * real), 0.0)
        value = call.multiplier * mix(self.dz.T, inputs.q[state.rows], turned)
        cost, lost = self._sums(T, T + 1, 0)
        error = mix(whole.T, q, turned) + cost * mix(size.T, q + dq_in, turned)
        error = error + mix(size.T, dq_in, turned) + T * f.accumulate.tiny
        error = sigma * error * (1 + 3 * u) + 3 * u * np.abs(value) + f.accumulate.tiny + lost
        out["k"] = Gradient(value, error, reach * mix(size.T, q + dq_in, turned))

        both, rounded = np.minimum(self.e + self.common, 700.0), a.normalise == "before the cast"
        w = self.p * np.expm1(both) * wide
        cast = w + self.p
        if state.uP and not rounded:
            cast = (w + self.p) * (1 + state.uP) + np.minimum(f.weights.tiny, w + self.p)
        elif rounded:
            cast = cast + state.zeta[:, :n]
        cast = np.where(live, cast + 2 * f.scores.tiny + LOST, 0.0)
        size_o = np.abs(self.do)
        error = mix(np.maximum(cast - self.p, 0.0).T, size_o, turned)
        cost, lost = self._sums(T, T, 0)
        error = error + cost * mix(cast.T, size_o + self.ddo, turned) + mix(cast.T, self.ddo, turned)
        reach = 2 * mix(cast.T, size_o + self.ddo, turned)
        out["v"] = Gradient(mix(self.p.T, self.do, turned), error + T * f.accumulate.tiny + lost, reach)

        if isinstance(call.bias, Table):
            out["bias"] = self._bias(call.bias, whole, T)
        if call.sink is not None:
            out["sink"] = self._sink(T)
        return out

    def _sums(self, n: int, roundings: int, which: int) -> tuple[float, float]:
        """Bound what a sum of n terms costs, as a part of their sizes, and what underflow takes from it.

        Where gradients are stored, every block of terms but the last is rounded to `output` once more.
        """
        a, cost = self.state.arithmetic, gamma(roundings, self.state.u.sums)
        if a.stored_gradients is None:
            return cost, 0.0
        blocks = -(-n // a.stored_gradients[which]) - 1
        f = a.formats.output
        return (1 + cost) * (1 + gamma(blocks, f.u)) - 1, blocks * f.tiny

    def ps_error(self) -> Array:
        """Bound p times the softcap's slope as it is computed."""
        return self.ps if self.state.slope is None else self.ps + self.p * self.state.slope[1]

    def _factors(self) -> tuple[Array, Array, Array, Array]:
        """Return sizes of q and k and the errors of what is multiplied with dZ; they may carry the scale already."""
        state, a = self.state, self.state.arithmetic
        inputs, f, u = state.inputs, a.formats, state.u.scores
        sigma = abs(self.one.problem.multiplier)
        q, k = np.abs(inputs.q[state.rows]), np.abs(inputs.k)
        dq, dk = inputs.dq[state.rows], inputs.dk
        if a.scale != "scores" and sigma:
            factor = sigma if a.scale == "q" else math.sqrt(sigma)
            dq = scaled(q, dq, factor, f.scaled, u)[1] / factor
            if a.scale == "q and k":
                dk = scaled(k, dk, factor, f.scaled, u)[1] / factor
        return q, dq, k, dk

    def _bias(self, table: Table, whole: Array, T: int) -> Gradient:
        first = self.one.problem.order == "bias, softcap"
        value = self.dz if first else self.ds
        if not first and self.state.slope is not None:
            common = self.grow * self.E_D * self.p + np.expm1(self.common) * self.p * self.far
            whole = np.where(self.live, self.state.wide * (self.own_s + common), 0.0)
            whole = whole + np.where(self.live, self.own_z, 0.0)
        size = np.abs(value) + whole
        axes = tuple(x for x in (0, 1) if table.array.shape[-2 + x] == 1)
        count = (T if 0 in axes else 1) * (self.live.shape[1] if 1 in axes else 1)
        error = whole + gamma(count, self.state.u.sums) * size + self.state.arithmetic.formats.accumulate.tiny
        return Gradient(*(x.sum(axis=axes, keepdims=True) for x in (value, error, 2 * size)))

    def _sink(self, T: int) -> Gradient:
        state = self.state
        p, e = state.p[:, -1:], state.e[:, -1:]
        size = np.abs(self.own) + self.E_D
        tilt = np.expm1(self.common + e + 8 * self.u)
        error = p * (tilt * size + self.E_D) * state.wide + (state.lost + LOST) * (1 + size)
        value = p * self.own
        error = error + gamma(T, state.u.sums) * (np.abs(value) + error) + state.arithmetic.formats.accumulate.tiny
        return Gradient(value.sum(), error.sum(), 2 * (np.abs(value) + error).sum())
