r"""F1 and F2 for any arithmetic: some rows of one problem, with every quantity that the statements name.

What is bounded is any kernel of the arithmetic against the real number. The formulas are evaluated with the weights
and the output of the float64 definition in place of the real ones, for which `wide` makes up.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import rounding
from refattn._mix import mix
from refattn.bias import Table
from refattn.engines import One, Problem
from refattn.perturbation import box_interval
from refattn.rounding import EVALUATION, LOST, U, gamma
from refattn.testing._arithmetic import Arithmetic
from refattn.testing._formats import Format

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

COARSE = 0.2
"""Above this logarithmic error of a weight the first-order form of F1 is left."""
DEFINITION = Arithmetic(
    inputs="float64",
    scores="float64",
    weights="float64",
    accumulate="float64",
    output="float64",
    exp="exp",
    exp_ulp=rounding.EXP / (2 * U),
    tanh_ulp=rounding.TANH / (2 * U),
    tile=2**62,
)
"""What the float64 definition computes in."""


class Sizes(NamedTuple):
    """The unit roundoffs of an arithmetic's steps; accumulators that truncate have twice their format's."""

    scores: float
    dots: float
    sums: float
    exp: float


def sizes(arithmetic: Arithmetic) -> Sizes:
    """Return u of the scores' arithmetic, of their dot products, of the accumulators, and the error of exp."""
    f, chop = arithmetic.formats, 2 if arithmetic.truncates else 1
    return Sizes(
        f.scores.u, chop * f.scores.u, chop * f.accumulate.u, -math.log1p(-2 * arithmetic.exp_ulp * f.scores.u)
    )


def cast_error(x: Array, f: Format | None, descale: bool = False) -> Array:
    """Bound what rounding to a format does to each number, with or without a descaling factor for the whole."""
    if f is None:
        return np.zeros_like(x)
    size = np.abs(x)
    if not descale:
        held = f.round(size) == size
        return np.where(held, 0.0, np.where(size > f.largest, np.inf, f.u * size + f.tiny))
    rest = np.where(np.isfinite(size), size, 0.0)  # what nobody sees
    factor = rest.max(initial=0.0) / f.largest
    u = (1 + f.u) * (1 + 6 * 2.0**-24) - 1  # the factor and its products are float32
    return np.where(np.isfinite(size), u * size + 2 * factor * f.tiny, np.inf)


def received(x: Array, arithmetic: Arithmetic) -> Array:
    """Bound how far the numbers that are multiplied are from those of an argument: the cast to `inputs`, operands."""
    f = arithmetic.formats
    with np.errstate(invalid="ignore", over="ignore"):
        given = f.inputs.round(x)
        moved = np.where(given == x, 0.0, np.abs(given - x))
        error = moved + cast_error(given, f.operands, arithmetic.descale)
    return np.where(np.isnan(error), np.inf, error)


class Inputs:
    """q, k and v of one problem, and how far from them the numbers are that the kernel multiplies."""

    def __init__(self, one: One, arithmetic: Arithmetic) -> None:
        self.q, self.k, self.v = (np.array(x, np.float64) for x in (one.q, one.k, one.v))
        self.dq, self.dk, self.dv = (received(x, arithmetic) for x in (self.q, self.k, self.v))

    def exact(self) -> Inputs:
        """Return the same numbers as the definition multiplies them."""
        out = copy.copy(self)
        out.dq, out.dk, out.dv = (np.zeros_like(x) for x in (self.q, self.k, self.v))
        return out


class Logits(NamedTuple):
    """Logits of some rows in float64, a bound on a kernel's error of each, and the largest number on the way.

    `slope` is the softcap's, with a bound on its error. The errors of a row's logits may have a part in common, at most
    `shift`: `e` is what is left, which is less by `spared`.
    """

    z: Array
    e: Array
    top: Array
    slope: tuple[Array, Array] | None
    shift: Array
    spared: Array


def scaled(x: Array, dx: Array, factor: float, f: Format, u: float) -> tuple[Array, Array]:
    """Return the size and the error of x times a factor, rounded to a format; the factor is off by 3u."""
    if factor == 1:
        return np.abs(x), dx
    size, dx = factor * np.abs(x), factor * dx
    error = dx + ((1 + 3 * u) * (1 + f.u) - 1) * (size + dx) + f.tiny
    return size, np.where(size + error > f.largest, np.inf, error)


def logits(
    one: One, inputs: Inputs, rows: NDArray[np.intp], seen: Bools, bias: Array | None, arithmetic: Arithmetic
) -> Logits:
    """Return the logits of some rows and the error of each: the dot product, then one rounding a step."""
    call, f, u = one.problem, arithmetic.formats, sizes(arithmetic)
    D, sigma = call.sizes[2], call.multiplier
    left, right, after = {"scores": (1.0, 1.0, abs(sigma)), "q": (abs(sigma), 1.0, 1.0)}.get(
        arithmetic.scale, (math.sqrt(abs(sigma)), math.sqrt(abs(sigma)), 1.0)
    )
    q, dq = scaled(inputs.q[rows], inputs.dq[rows], left, f.scaled, u.scores)
    k, dk = scaled(inputs.k, inputs.dk, right, f.scaled, u.scores)
    with np.errstate(invalid="ignore", over="ignore"):
        dots = (inputs.q[rows] @ inputs.k.T) * sigma
        size = (q + dq) @ (k + dk).T
        e = dq @ (k + dk).T + q @ dk.T + gamma(D, u.dots) * size + D * f.scores.tiny
        steps = _Steps(dots / after if after else dots, e, arithmetic)
        steps.top = np.maximum(size * (1 + gamma(D, u.dots)), (q + dq).max(axis=1, initial=0.0)[:, None])
        steps.store()
        if arithmetic.scale == "scores":
            # 1/√D or the float that is given is off by 2u, which moves differences of logits: unless something follows
            steps.times(dots, after, 2 if bias is not None or call.softcap is not None else 0)
        if bias is not None and call.order == "bias, softcap":
            steps.plus(bias, _bias_error(call, bias, arithmetic))
        if call.softcap is not None:
            steps.cap(call.softcap)
        if bias is not None and call.order == "softcap, bias":
            steps.plus(bias, _bias_error(call, bias, arithmetic))
    z, e, top = (np.where(seen, x, rest) for x, rest in ((steps.z, -np.inf), (steps.e, 0.0), (steps.top, 0.0)))
    if steps.slope is not None:
        steps.slope = np.where(seen, steps.slope[0], 0.0), np.where(seen, steps.slope[1], 0.0)
    shift, spared = np.zeros((len(rows), 1)), np.zeros(seen.shape)
    if call.softcap is None and (one.sink is None or np.isneginf(one.sink)) and dq.any():
        shift, spared = _common(inputs.k * right, dq, seen)
        shift, spared = after * shift, after * spared
    return Logits(z, e - spared, top, steps.slope, shift, spared)


def _common(k: Array, dq: Array, seen: Bools) -> tuple[Array, Array]:
    """Split what an error of q does to logits: the part in common, through the keys' mean, and what each is spared.

    Softmax ignores the former (P8). Rows that gain nothing are not split.
    """
    mean = mix(seen.astype(np.float64), k, seen) / np.maximum(seen.sum(axis=1, keepdims=True), 1)
    spared = np.zeros(seen.shape)
    for c in range(k.shape[1]):
        spared += dq[:, c, None] * (np.abs(k[:, c]) * (1 - 8 * k.shape[1] * U) - np.abs(k[:, c] - mean[:, c, None]))
    spared = np.where(seen, spared, 0.0)
    gains = np.isfinite(spared).all(axis=1, keepdims=True) & (spared.sum(axis=1, keepdims=True) > 0)
    shift = (dq * np.abs(mean)).sum(axis=1, keepdims=True)
    return np.where(gains, shift, 0.0), np.where(gains, spared, 0.0)


class _Steps:
    """The steps from dot products to logits, each with its rounding, and a second one where it is stored."""

    def __init__(self, z: Array, e: Array, arithmetic: Arithmetic) -> None:
        self.z, self.e, self.top = z, e, np.abs(z)
        self.f, self.u = arithmetic.formats.scores, arithmetic.formats.scores.u
        self.stored, self.tanh = arithmetic.formats.stored_scores, 2 * arithmetic.tanh_ulp * self.u
        self.slope: tuple[Array, Array] | None = None

    def rounding(self, u: float, tiny: float) -> None:
        self.top = np.maximum(self.top, np.abs(self.z) + self.e)
        self.e = self.e + u * (np.abs(self.z) + self.e) + tiny

    def store(self) -> None:
        if self.stored is not None:
            over = np.abs(self.z) + self.e > self.stored.largest
            self.rounding(self.stored.u, self.stored.tiny)
            self.e = np.where(over, np.inf, self.e)

    def times(self, z: Array, factor: float, more: int) -> None:
        self.z, self.e = z, factor * self.e
        self.rounding((1 + more) * (1 + self.u) * self.u, self.f.tiny)
        self.store()

    def plus(self, bias: Array, error: Array) -> None:
        self.z, self.e = self.z + bias, self.e + error
        self.rounding(self.u, self.f.tiny)
        self.store()

    def cap(self, c: float) -> None:
        stored = 0.0 if self.stored is None else self.stored.u
        tiny = 0.0 if self.stored is None else self.stored.tiny
        inner = 2 * self.u + stored
        self.top = np.maximum(self.top, np.abs(self.z) + self.e)
        self.e = self.e + inner * (1 + inner) * (np.abs(self.z) + self.e) + c * (2 * self.f.tiny + tiny)
        t = np.tanh(self.z / c)
        fall = np.exp(-2 * np.abs(self.z / c))
        slope = 4 * fall / (1 + fall) ** 2
        # 1 − tanh²: with the logit it moves by a factor, with tanh's own error and its roundings absolutely
        moved = slope * np.expm1(np.minimum(2 * self.e / c, 700.0)) * (1 + 2.0**-40)
        own = 2 * self.tanh + 4 * (self.u + stored) + 2 * (self.f.tiny + tiny)
        self.slope = slope, np.minimum(moved, 1.0) + own * (1 + own)
        self.z = c * t
        turn = self.tanh + self.u + stored
        self.e = self.e + turn * (1 + turn) * (np.abs(self.z) + self.e) + (1 + c) * (self.f.tiny + tiny)
        self.store()


def _bias_error(call: Problem, bias: Array, arithmetic: Arithmetic) -> Array:
    """Bound what the kernel's bias may be off by: its cast to the scores' format, a slope's product, log₂e."""
    f = arithmetic.formats.scores
    count = (0 if isinstance(call.bias, Table) else 2) + (1 if arithmetic.exp == "exp2" else 0)
    given = f.round(bias)
    moved = np.where(given == bias, 0.0, np.abs(given - bias))
    return np.where(np.isneginf(bias), 0.0, moved + count * f.u * np.abs(bias))


class Rows:
    """F1 and F2 for some rows of one problem and one arithmetic; letters are those of proofs/test_tolerance.py.

    `moved` is how far the definition's o may be from the real one.
    """

    def __init__(self, one: One, inputs: Inputs, rows: NDArray[np.intp], arithmetic: Arithmetic, moved: Array) -> None:
        self.arithmetic, self.inputs, self.moved, f = arithmetic, inputs, moved, arithmetic.formats
        self.u, keys = sizes(arithmetic), np.arange(len(inputs.k))
        bias: Array | None = one.bias(rows, keys)
        live: Bools = np.ones((len(rows), len(keys)), np.bool_)
        if one.pairs is not None:
            live = one.pairs.seen(rows, keys)
        if bias is not None:
            unseen: Bools = np.isneginf(bias)
            live = live & ~unseen
        own = logits(one, inputs, rows, live, bias, arithmetic)
        definition = logits(one, inputs.exact(), rows, live, bias, DEFINITION)
        self.rows, self.slope = rows, own.slope
        self.top = own.top.max(axis=1, initial=0.0)[:, None]
        z, e, e64 = own.z, own.e, definition.e
        if one.sink is not None:  # one more key, of value 0
            sink = float(one.sink)
            size = 0.0 if np.isneginf(sink) else abs(sink)
            blur = abs(size - float(f.scores.round(np.array(size)))) + f.scores.u * size
            more = ((z, sink), (e, blur), (e64, U * size))
            z, e, e64 = (np.concatenate([x, np.full((len(rows), 1), cell)], axis=1) for x, cell in more)
            live = np.concatenate([live, np.full((len(rows), 1), not np.isneginf(sink))], axis=1)
        self.live: Bools = live
        self.n: Array = live.sum(axis=1, keepdims=True).astype(np.float64)
        self.empty: Bools = self.n == 0
        self.m: Array = np.where(self.empty, 0.0, z.max(axis=1, keepdims=True, initial=-np.inf))
        away = np.where(live, np.abs(z - self.m), 0.0)
        e64 = np.where(live, e64 + 3 * U * away + rounding.EXP * (1 + rounding.EXP), 0.0)
        self.doubt: Array = e64.max(axis=1, keepdims=True, initial=0.0)
        self.wide: Array = EVALUATION * np.exp(4 * self.doubt)
        self.em: Array = e.max(axis=1, keepdims=True, initial=0.0)
        self.shift, self.spared = own.shift, own.spared
        self.rises: Array = _rises(z, e, live, arithmetic, z.shape[1] - len(keys))
        self.e: Array = np.where(live, self._exponents(z, e, away), 0.0)
        w = np.where(live, np.exp(z - self.m), 0.0)
        self.total: Array = np.where(self.empty, 1.0, w.sum(axis=1, keepdims=True))
        self.w: Array = w
        self.p: Array = w / self.total
        self._cast()
        self._sums()

    def _exponents(self, z: Array, e: Array, away: Array) -> Array:
        """Return e_j: the logit's error, the exponent's roundings, exp, and the rises of the maximum after it."""
        a, u, em = self.arithmetic, self.u, self.em
        largest = np.where(self.live, np.abs(z), 0.0).max(axis=1, keepdims=True, initial=0.0) + em + self.shift
        g, steps = away + e + em + 2 * a.lazy, 3 if a.exp == "exp" else 5
        e = e + steps * u.scores * g + (1 + self.rises) * (u.exp + steps * a.formats.scores.tiny)
        if a.exp == "exp2":
            e = e + u.scores * largest
        if a.splits > 1:  # lse of the part, and e^(lse of the part − lse), whose argument is rounded like a weight's
            n, sums = np.log(np.maximum(self.n, 1)), a.formats.accumulate.u
            e = e + sums * ((steps + 3) * (largest + n) + steps * (g + n) + 8) + u.exp * (1 + n)
        return e

    def _cast(self) -> None:
        """Set u_P and ζ of the cast of P; where the row sum is of what was cast, it is a tilt."""
        a, f = self.arithmetic, self.arithmetic.formats
        exact = f.weights.bits >= f.scores.bits and f.weights.least <= f.scores.least
        self.uP, lost = (0.0, 0.0) if exact else (f.weights.u, f.weights.tiny / a.weights_scale)
        prenorm = a.normalise == "before the cast"
        pe = self.p * np.exp(self.e)
        self.zeta: Array = np.minimum(lost if prenorm else lost * np.exp(self.em) / self.total, pe)
        self.common = a.row_sum == "rounded weights"
        if self.common:
            self.e = np.where(self.live, self.e - math.log1p(-self.uP), 0.0)

    def _sums(self) -> None:
        """Set G_j, what underflow takes, and the sums up and down that a row's normaliser lies between."""
        a, f, n = self.arithmetic, self.arithmetic.formats, self.n
        depth = n + self.rises
        if a.tile is not None and a.sums == "apart":
            updates = max(0, -(-len(self.inputs.k) // a.tile) - 1)
            depth = np.minimum(depth, np.minimum(a.tile, n) + updates + self.rises)
        h = (depth + (a.splits + 4 if a.splits > 1 else 0)) * self.u.sums
        self.G: Array = np.where(h < 1, h / np.where(h < 1, 1 - h, 1.0), np.inf)
        self.pe: Array = self.p * np.exp(self.e)
        tiny = 2 * (f.scores.tiny + 2 * f.accumulate.tiny) + LOST
        self.lost: Array = n * tiny * np.exp(self.e.max(axis=1, keepdims=True, initial=0.0)) * self.wide
        self.missed: Array = self.zeta.sum(axis=1, keepdims=True) * self.wide * self.common
        up = (self.pe * (1 + self.G)).sum(axis=1, keepdims=True) + self.lost + self.missed
        down = (self.p * np.exp(-self.e) * (1 - self.G)).sum(axis=1, keepdims=True) - self.lost - self.missed
        self.up: Array = np.where(self.empty, 1.0, up)
        self.down: Array = np.where(self.empty, 1.0, np.maximum(down, 0.0))

    def _overflows(self, size: Array, live: Bools) -> Bools:
        """Return where a number may leave its format (F5): (rows, E)."""
        a, f = self.arithmetic, self.arithmetic.formats
        high = np.exp(self.em + a.lazy)
        # a computed weight is at most exp(0), whatever the error of its logit
        largest = a.weights_scale * math.exp(a.lazy + self.u.exp) * (1 + self.uP)
        over = (self.top > f.scores.largest) | (largest > f.weights.largest)
        over = over | (self.total * self.up * high > f.accumulate.largest)
        reach = mix(self.pe[:, : len(size)] * (1 + self.uP) * 2, size, live)
        return over | (reach * high * (self.total if a.normalise == "last" else 1.0) > f.accumulate.largest)

    def output(self) -> tuple[Array, Array]:
        """Return o of the definition and F1's E: (rows, E) each."""
        a, f, u, v, dv = self.arithmetic, self.arithmetic.formats, self.u.sums, self.inputs.v, self.inputs.dv
        p, e, pe, G, zeta = (x[:, : len(v)] for x in (self.p, self.e, self.pe, self.G, self.zeta))
        live = self.live[:, : len(v)]
        o, size = mix(p, v, live), np.abs(v)
        divided = max(u, self.u.scores) if a.normalise == "before the cast" else 0.0
        theta: Array = (1 + (0.0 if self.common else self.uP)) * (1 + G) * (1 + divided) - 1
        tilt = p * np.expm1(e)
        numerator = _spans(tilt + zeta if self.common else tilt, v, o, live)
        numerator += mix(pe * theta + zeta * (G if self.common else 1 + G), size, live)
        numerator += mix(pe * (1 + theta) + zeta * (1 + G), dv, live)
        numerator += np.abs(o) * (self.pe * self.G).sum(axis=1, keepdims=True)
        if self.common:
            numerator += np.abs(o) * (self.zeta * self.G).sum(axis=1, keepdims=True)
        if self.p.shape[1] > len(v):
            numerator += np.abs(o) * (self.p * np.expm1(self.e))[:, -1:]
        numerator += self.lost * (1 + _highest(size + dv, live) + np.abs(o))
        # |v_j − o| and |o| are those of the definition's o
        spread = (self.p * np.expm1(self.e) + self.pe * self.G + self.zeta * (1 + self.G)).sum(axis=1, keepdims=True)
        error = (numerator + spread * self.moved) / self.down * self.wide
        if (self.e > COARSE).any():
            error = np.minimum(error, self._coarse(o, theta, size + dv, dv))
        kept = f.output.bits >= f.accumulate.bits and f.output.least <= f.accumulate.least
        omega = (1 + u) ** 2 * (1 + (0.0 if kept else f.output.u)) - 1
        tiny = 2 * f.accumulate.tiny + (0.0 if kept else f.output.tiny)
        error = error * (1 + omega) + omega * (np.abs(o) + self.moved) + tiny
        over = self._overflows(size + dv, live) | (np.abs(o) + error > f.output.largest) | np.isnan(error)
        return np.where(self.empty, 0.0, o), np.where(self.empty, 0.0, np.where(over, np.inf, error))

    def _coarse(self, o: Array, theta: Array, size: Array, dv: Array) -> Array:
        """Bound the output's error where weights are coarse: the exact range of their tilt (P4), means of values."""
        a, live = self.arithmetic, self.live[:, : len(size)]
        high, G = _highest(size, live), self.G.max(axis=1, keepdims=True, initial=0.0)
        share, column, reach = theta.max(axis=1, keepdims=True, initial=0.0), np.zeros(self.p.shape), np.empty(o.shape)
        tilt = np.minimum(np.where(self.live, self.e + 2 * self.doubt, 0.0), 700.0)
        for c in range(o.shape[1]):
            column[:, : len(size)] = np.where(live, self.inputs.v[:, c], 0.0)
            low, top = box_interval(self.p, column, tilt)
            reach[:, c] = np.maximum(top, -low)
        # the largest computed weight is 1, so of the sum of the weights a cast loses at most n·η
        missed = self.n * ((2 * a.formats.weights.tiny / a.weights_scale if self.uP else 0.0) + 2.0**-48) + self.lost
        rest = share * high + (1 + share) * _highest(dv, live) + missed * (1 + 2 * high)
        rest = rest + (G + missed) * (np.abs(o) + reach)
        certain = np.where(G + missed < 1, 1 - G - missed, 0.0)
        return (reach + 2 * self.moved + rest / certain) * self.wide

    def log_sum_exp(self) -> Array:
        """Return F2's E_L: (rows,)."""
        a, f = self.arithmetic, self.arithmetic.formats
        u, ln = f.accumulate.u, np.log(self.total)
        lse = np.abs(self.m + ln)
        self.e_z: Array = np.maximum(np.log(self.up), -np.log(self.down)) + 4 * self.doubt + self.shift
        # the constants of the logits are off for the whole row, and a fast log of nearly 1 is known only absolutely
        constants, absolute = (4, 0) if a.exp == "exp" else (8, 8)
        error = self.e_z + u * (constants * (np.abs(self.m) + self.em + self.shift) + absolute)
        error = (error + (self.u.exp + u) * (np.abs(ln) + self.e_z) + u * lse) / (1 - 2 * u) * EVALUATION
        error = error * 2 if a.splits > 1 else error
        if f.lse.bits < f.accumulate.bits or f.lse.least > f.accumulate.least:
            error = error + f.lse.u * (lse + error) + f.lse.tiny
        high = np.exp(self.em + a.lazy)
        over = (self.top > f.scores.largest) | (self.total * self.up * high > f.accumulate.largest)
        over = over | (lse + error > f.lse.largest) | np.isnan(error)
        return np.where(self.empty, 0.0, np.where(over, np.inf, error))[:, 0]


def _spans(tilted: Array, v: Array, o: Array, live: Bools) -> Array:
    """Return Σ_j tilted_ij |v_jc − o_ic|, without what is not seen."""
    clean, out = bool(np.isfinite(v).all()), np.empty(o.shape)
    for c in range(o.shape[1]):
        apart = np.abs(v[:, c] - o[:, c : c + 1])
        out[:, c] = (tilted * (apart if clean else np.where(live, apart, 0.0))).sum(axis=1)
    return out


def _highest(size: Array, live: Bools) -> Array:
    """Return the largest |v_jc| that a row sees, or more where everything is finite: (rows or 1, E)."""
    if np.isfinite(size).all():
        return size.max(axis=0, keepdims=True, initial=0.0)
    return np.stack([np.where(live, column, 0.0).max(axis=1, initial=0.0) for column in size.T], axis=1)


def _rises(z: Array, e: Array, live: Bools, arithmetic: Arithmetic, sinks: int) -> Array:
    """Bound how often the running maximum rises after each key: by the keys whose computed logits may be above its.

    A rise rescales what was accumulated; a factor of 1 is exact.
    """
    if arithmetic.normalise == "before the cast":
        return np.zeros_like(z)
    most = np.maximum(live.sum(axis=1, keepdims=True) - 1, 0)
    if arithmetic.tile is not None:
        most = np.minimum(most, max(0, -(-(z.shape[1] - sinks) // arithmetic.tile) - 1) + sinks)
    if not most.any():
        return np.zeros_like(z)
    above, upper = np.empty_like(z), np.sort(np.where(live, z + e, -np.inf), axis=1)
    for i in range(len(z)):
        above[i] = z.shape[1] - np.searchsorted(upper[i], z[i] - e[i], side="right") - (e[i] > 0)  # but itself
    return np.where(live, np.minimum(above, most), 0.0)
