r"""One head of Performer: the features of FAVOR+ with its stabiliser, made into what the linear engine takes.

With w = e^{y·ω − ‖y‖²/2} and u = e^{x·ω − ‖x‖²/2 − a},

.. math:: m \kappa_{ij} = \sum_f (u_{if} + \varepsilon)\, e^{-c_i} w_{jf}
          + \varepsilon \sum_f (u_{if} + \varepsilon) \cdot 1

so that c_i, which depends on what row i sees, belongs to the query, and one constant feature is added. Where c is so
far below 0 that e^{−c} could overflow, c_i and the exponents of w are less a shift, one number for all rows. With ε = 0
a row's features may have any factor: their largest becomes 1, so that they neither overflow nor all underflow.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from refattn import linear
from refattn.engines import Backend
from refattn.heads import leads
from refattn.kernel import _ratio, features
from refattn.kernel._feature_map import IDENTITY
from refattn.kernel._scale import root, scaled
from refattn.kernel.features import EXPONENTIAL, Kind
from refattn.lifted import Lifted, concatenate
from refattn.rounding import Bounded

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Stabilizer = Literal["none", "max"]
ROOM = 600.0
"""e^{±ROOM} leaves float64 room for ε and ‖y‖²/2 on either side."""


class Features(NamedTuple):
    """What is made on the way to the engine's features fq and fk; `fall` is e^{shift − c}, where c matters."""

    x: Any
    y: Any
    ex: Any
    ey: Any
    u: Any
    w: Any
    fq: Any
    fk: Any
    fall: Any
    peak: Any
    shift: float = 0.0


class Head(NamedTuple):
    """One head's problem, in float64 or another arithmetic."""

    q: Any
    k: Any
    v: Any
    omega: Any
    centre: Any
    ends: Ints
    kind: Kind
    stabilizer: Stabilizer
    eps: float
    scale: float | None

    @property
    def sides(self) -> tuple[Any, Any, Any]:
        """√|σ|, ±q and k less its centre."""
        q = -self.q if self.scale is not None and self.scale < 0 else self.q
        return root(self.scale, self.q.shape[1], self.q), q, self.k - self.centre

    def features(self, peak: Any = -np.inf) -> Features:
        """Return the features; `peak` is the largest y·ω of the past."""
        (by, q, k), kind, eps = self.sides, self.kind, self.eps
        x, y = q * by, k * by
        # scaled last: what has been rounded once less is what another arithmetic compares
        plain_x, plain_y = (features.project(z, self.omega, kind) for z in (q, k))
        ex, ey = plain_x * by, plain_y * by
        w = features.raw(ey, features.height(y, kind), kind)
        if eps == 0:
            u = features.raw(ex, -_values(ex).max(axis=1, keepdims=True) if kind in EXPONENTIAL else 0.0, kind)
            return Features(x, y, ex, ey, u, w, u, w, None, peak)
        tall = features.height(x, kind)
        if self.stabilizer == "none":
            u = features.raw(ex, tall, kind)
            return Features(x, y, ex, ey, u, w, u + eps, w + eps, None, peak)
        u = features.raw(ex, tall - features.largest(plain_x) * by, kind)
        c = _running(features.largest(plain_y), self.ends) * by
        c = c if peak == -np.inf else np.maximum(c, peak)
        last, shift = _values(c)[-1, 0], _shift(_values(c)[np.searchsorted(self.ends, 1), 0])
        if shift < 0:
            w, c = features.raw(ey, features.height(y, kind) - shift, kind), c - shift
        fall = np.exp(-c)
        fq = concatenate((u + eps) * fall, (u + eps).sum(1, keepdims=True) * eps, axis=1)
        return Features(x, y, ex, ey, u, w, fq, concatenate(w, np.ones((w.shape[0], 1)), axis=1), fall, last, shift)

    def forward(self, backend: Backend, before: linear.State | None, peak: Any) -> tuple[Any, linear.State | None, Any]:
        """Return the output and what the engine and the maximum leave behind."""
        if not self.ends.any():
            return _nothing((self.q.shape[0], self.v.shape[1]), self.q), before, peak
        f = self.features(peak)
        if isinstance(self.q, Lifted):
            return *linear.forward(self.problem(f), backend), f.peak
        if peak != -np.inf:
            before = _moved(before, _shift(peak) - f.shift)
        o, after = linear.forward(self.problem(f, before), backend)
        return o, _moved(after, f.shift - _shift(f.peak)), f.peak

    def problem(self, f: Features, before: linear.State | None = None) -> linear.Problem:
        """Return what the linear engine is asked."""
        alone = leads({"q": (), "mask": ()}, {"k": (), "v": ()})
        return linear.Problem(
            q=f.fq, k=f.fk, v=self.v, feature_map=IDENTITY, ends=self.ends, eps=0.0, state=before, leads=alone
        )

    def kappa(self, f: Features, rows: NDArray[np.intp]) -> Any:
        """Return κ of some rows, up to a factor of the row."""
        return f.fq[rows] @ f.fk.mT

    def logits(self, rows: NDArray[np.intp]) -> Any:
        """Return those of softmax attention in some rows."""
        return scaled(self.q[rows] @ self.k.mT, self.scale, self.q.shape[1])

    def bound(self, o: Array) -> Array:
        """Return the least of K1, K1 with R6, and the distance to the far end of the values."""
        v, ends, f = self.v, self.ends, self.features()
        claim = _ratio.bound(o, v, ends, lambda rows: self.kappa(f, rows), self.logits)
        if self.eps == 0 or self.kind not in EXPONENTIAL:
            return claim
        plain = self._replace(eps=0.0)
        f0, o0 = plain.features(), plain.forward(Backend("numpy"), None, -np.inf)[0]
        near = _ratio.bound(o0, v, ends, lambda rows: plain.kappa(f0, rows), self.logits)
        # κ − κ⁰ = ε(Σw e^−c + Σu + rε), with the factor that features() gives a row
        fall = 1.0 if f.fall is None else f.fall
        r, live, seen = f.u.shape[1], np.flatnonzero(ends), np.maximum(ends - 1, 0)
        added = ends[:, None] * (f.u.sum(axis=1, keepdims=True) + r * self.eps)
        added = added + np.cumsum(f.w.sum(axis=1))[seen, None] * fall
        whole = (f.fq * np.cumsum(f.fk, axis=0)[seen]).sum(axis=1, keepdims=True)
        low, high = np.minimum.accumulate(v)[seen], np.maximum.accumulate(v)[seen]
        farther = near + self.eps * added / whole * np.maximum(np.abs(o0 - low), np.abs(high - o0))
        claim[live] = np.fmin(claim, farther)[live]
        return claim

    def log_error(self) -> Array:
        """Return how far ln κ − σq·k may be off over what each row sees, (T,), in Bounded arithmetic."""
        with np.errstate(all="ignore"):
            f = self.features()
        return _ratio.evaluation(self.ends, self.k.shape[0], lambda rows: self.kappa(f, rows), self.logits)

    def pull(self, do: Any, backend: Backend) -> tuple[Any, ...]:
        """Return the gradients of q, k, v, ω and the centre; rows and keys that see nothing stay out of every sum."""
        blind, seen = int(np.searchsorted(self.ends, 1)), int(self.ends.max(initial=0))
        if seen == 0:
            return tuple(_nothing(x.shape, x) for x in self[:5])
        live = self._replace(q=self.q[blind:], k=self.k[:seen], v=self.v[:seen], ends=self.ends[blind:])
        dq, dk, dv, domega = live._pull(do[blind:], backend)
        dq = concatenate(np.zeros((blind, dq.shape[1])), dq)
        dk, dv = (concatenate(x, np.zeros((self.k.shape[0] - seen, x.shape[1]))) for x in (dk, dv))
        return dq, dk, dv, domega, -dk.sum(0)

    def _pull(self, do: Any, backend: Backend) -> tuple[Any, Any, Any, Any]:
        f, kind, omega = self.features(), self.kind, self.omega
        du, dw, dv = linear.backward(self.problem(f), do, backend)
        dc: Any = None
        if f.fall is not None:
            r = f.u.shape[1]
            dc = -(du[:, :r] * f.fq[:, :r]).sum(1, keepdims=True)
            du, dw = du[:, :r] * f.fall + du[:, r:] * self.eps, dw[:, :r]
        (dex, tall_x), (dey, tall_y) = (
            features.pull_raw(d, e, phi, kind) for d, e, phi in ((du, f.ex, f.u), (dw, f.ey, f.w))
        )
        if f.fall is not None:
            dex = dex - _largest(f.ex) * tall_x
            dey = dey + _largest(f.ey) * _to_largest(features.largest(f.ey), self.ends, dc)
        if self.eps == 0:
            tall_x = tall_x * 0.0  # the factor of a row cancels
        (dx, from_q), (dy, from_k) = (
            features.pull(d, tall, z, omega, kind) for d, tall, z in ((dex, tall_x, f.x), (dey, tall_y, f.y))
        )
        by = self.sides[0]
        dq = dx * by
        return -dq if self.scale is not None and self.scale < 0 else dq, dy * by, dv, from_q + from_k


def _nothing(shape: tuple[int, ...], like: Any) -> Any:
    return like.lift(np.zeros(shape)) if isinstance(like, Lifted) else np.zeros(shape)


def _values(x: Any) -> Array:
    return x.floats() if isinstance(x, Lifted) else x


def _shift(c: float) -> float:
    """Return what exponents are less, so that for c and for what is above it e^{shift − c} does not overflow."""
    return min(0.0, float(np.floor(c + ROOM))) if np.isfinite(c) else 0.0


def _moved(sums: Any, by: float) -> Any:
    """Return the engine's sums of features that are e^by times as large, by ≤ 0; the constant one stays."""
    if by == 0:
        return sums
    factor = np.r_[np.full(len(sums.z) - 1, np.exp(by)), 1.0]
    return linear.State(sums.s * factor[:, None], sums.z * factor)


def _running(each: Any, ends: Ints) -> Any:
    """Return the largest of what each row sees, (T, 1), of one number a key, (S, 1); a row that sees none gets any."""
    rows = np.maximum(ends - 1, 0)
    if not isinstance(each, Lifted):
        running: Array = np.maximum.accumulate(each, axis=0)
        return running[rows]
    each = cast("Any", each)
    found: list[Any] = [each[:1]]
    for j in range(1, each.shape[0]):
        found.append(np.maximum(each[j : j + 1], found[-1]))
    return concatenate(*found)[rows]


def _largest(x: Any) -> Any:
    """Return 1 at the first largest of each row, else 0; what rounding leaves undecided may be either."""
    values = _values(x)
    first: NDArray[np.bool_] = np.arange(int(values.shape[1])) == values.argmax(axis=1)[:, None]
    if not isinstance(x, Bounded):
        return first.astype(np.float64)
    rival = values + 2 * x.error >= (values - 2 * x.error).max(axis=1, keepdims=True)
    return Bounded(first, rival & (rival.sum(axis=1, keepdims=True) > 1))


def _to_largest(each: Any, ends: Ints, g: Any) -> Any:
    """Send one number a row, (T, 1), to the first largest of the keys that it sees: (S, 1)."""
    values, S = _values(each)[:, 0], int(each.shape[0])
    best = np.maximum.accumulate(values)
    record = np.where(values > np.r_[-np.inf, best[:-1]], np.arange(S), 0)
    picked = np.maximum.accumulate(record)[ends - 1]
    if not isinstance(each, Bounded):
        out = np.zeros((S, 1))
        np.add.at(out, picked, g)
        return out
    error = 2 * each.error[:, 0]
    seen = np.arange(S) < ends[:, None]
    rival = seen & (values + error >= np.maximum.accumulate(values - error)[ends - 1][:, None])
    first: NDArray[np.bool_] = np.arange(S) == picked[:, None]
    return Bounded(first, rival & (rival.sum(axis=1, keepdims=True) > 1)).mT @ g
