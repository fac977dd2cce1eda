"""A call's meaning written out densely: what the diagnosis changes one thing of at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.conventions import Call, Convention
from refattn.testing._arithmetic import Arithmetic
from refattn.testing._tolerance import tolerance

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LN2 = math.log(2)
EMPTY_LSE = {"-inf": -math.inf, "+inf": math.inf, "0": 0.0, "any": -math.inf}
VANISHED = 103.97
"""The exponential of a number below minus this is 0 in float32."""


@dataclass(frozen=True, eq=False)
class Written:
    """The definition's arguments with all leading axes, a key head for each query head, and pairs as arrays.

    `raw` holds q·k. `sight` says of each source of masking which pairs it lets be seen; its arrays broadcast to
    (..., H, T, S). `pads` is the logit of what every row sees beside its own keys, with values 0. `own` are
    logits that are not made of the rest.
    """

    convention: Convention
    q: Floats
    k: Floats
    v: Floats
    raw: Floats
    scale: float
    softcap: float | None
    order: str
    bias: Floats
    sink: Floats | None
    sight: Mapping[str, Bools]
    pads: float = -math.inf
    own: Floats | None = None

    @cached_property
    def seen(self) -> Bools:
        """Which pairs are seen, (..., H, T, S)."""
        return np.broadcast_to(reduce(np.logical_and, self.sight.values(), np.True_), self.raw.shape)

    @cached_property
    def logits(self) -> Floats:
        """What every pair's logit is, seen or not."""
        if self.own is not None:
            return self.own
        with np.errstate(invalid="ignore", over="ignore"):
            s = self.scale * self.raw
            if self.softcap is None:
                return s + self.bias
            if self.order == "bias, softcap":
                return self.softcap * np.tanh((s + self.bias) / self.softcap)
            return self.softcap * np.tanh(s / self.softcap) + self.bias

    @cached_property
    def masked(self) -> Floats:
        """Logits, −inf where nothing is seen."""
        return np.where(self.seen, self.logits, -np.inf)

    @cached_property
    def top(self) -> Floats:
        """The largest logit that a row sees, without the sink, (..., H, T)."""
        return self.masked.max(-1, initial=-np.inf)

    @cached_property
    def empty(self) -> Bools:
        """Which rows see nothing and have no sink."""
        return np.isneginf(self.top) & (self.sink is None) & math.isinf(self.pads)

    @cached_property
    def normaliser(self) -> Floats:
        """The logarithm of the row sum, in nats and with the sink."""
        lse = summed(self.masked)
        if self.sink is not None:
            lse = np.logaddexp(lse, self.sink[..., None])
        return lse if math.isinf(self.pads) else np.logaddexp(lse, self.pads)

    def called(self, o: Floats, lse: Floats) -> tuple[Floats, Floats]:
        """Return o and lse, of which lse is in nats, as the convention has them."""
        how, empty = self.convention, self.empty
        if how.lse == "bits":
            lse = lse / LN2
        if empty.any():
            o = np.where(empty[..., None], self._of_empty(how.empty), o)
            lse = np.where(empty, EMPTY_LSE[how.empty_lse], lse)
        return o, lse

    def _of_empty(self, word: str) -> Any:
        return self.v.mean(-2, keepdims=True) if word == "mean of v" else np.nan if word == "NaN" else 0.0

    def outcome(self) -> Outcome:
        """Return what the definition answers."""
        lse = self.normaliser
        bare = self.sink is not None and self.convention.sink == "not counted"
        o, lse = self.called(averaged(self.masked, self.v, lse), summed(self.masked) if bare else lse)
        return Outcome(o, lse, self)

    def hiding(self, **sight: Bools) -> Written:
        """Return the same with sources of masking replaced or added."""
        return replace(self, sight={**self.sight, **sight})

    def without(self, source: str) -> Written:
        """Return the same with a source of masking ignored."""
        return replace(self, sight={name: x for name, x in self.sight.items() if name != source})

    def reading(self, *, q: Floats | None = None, k: Floats | None = None, v: Floats | None = None) -> Written:
        """Return the same with other arrays."""
        q, k, v = (own if x is None else x for own, x in ((self.q, q), (self.k, k), (self.v, v)))
        same = q is self.q and k is self.k
        return replace(self, q=q, k=k, v=v, raw=self.raw if same else products(q, k))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a changed kernel would answer: o and lse in the convention's numbers.

    `basis` is the problem whose tolerance is allowed, o's multiplied by `gain`; lse's is of `row_sum` where that is
    another. NaN stands for anything that is not finite.
    """

    o: Floats
    lse: Floats
    basis: Written
    gain: Floats | None = None
    row_sum: Written | None = None
    arithmetic: Arithmetic | None = None

    def allowance(self, arithmetic: Arithmetic) -> tuple[Floats, Floats]:
        """Return how far o and lse may be off; ∞ where nothing is promised."""
        arithmetic = self.arithmetic or arithmetic
        o, lse = allowed(self.basis, arithmetic)
        if self.row_sum is not None:
            lse = allowed(self.row_sum, arithmetic)[1]
        with np.errstate(over="ignore", invalid="ignore"):
            if self.gain is not None:
                o = o * np.abs(self.gain)[..., None] + np.abs(self.o) * np.expm1(2 * lse)[..., None]
            lse = lse / LN2 if self.basis.convention.lse == "bits" else lse
            lse = lse + 4 * arithmetic.formats.lse.u * np.where(np.isfinite(self.lse), np.abs(self.lse), 0.0)
        o, lse = (np.broadcast_to(x, y.shape) for x, y in ((o, self.o), (lse, self.lse)))
        return np.where(np.isnan(o), np.inf, o), np.where(np.isnan(lse), np.inf, lse)


def allowed(w: Written, arithmetic: Arithmetic) -> tuple[Floats, Floats]:
    """Return the tolerance of a problem: o's and, in nats, lse's."""
    options: dict[str, Any] = {"softcap": w.softcap, "order": w.order, "mask": w.seen, "scale": w.scale}
    sink, bias = w.sink, w.bias
    if not math.isinf(w.pads):
        pads = np.full(w.raw.shape[:-2], w.pads)
        sink = pads if sink is None else np.logaddexp(sink, pads)
    if w.own is not None:  # what is added to products, but for a number common to the row and weights that are 0
        top = np.where(np.isfinite(w.top), w.top, 0.0)[..., None]
        with np.errstate(invalid="ignore"):
            bias = (w.own - top) - w.scale * w.raw
            options |= {"softcap": None, "mask": w.seen & (w.own - top > -VANISHED)}
        sink = None if sink is None else sink - top.min((-1, -2))
    bias = np.broadcast_to(np.where(np.isfinite(bias), bias, 0.0), w.raw.shape) if np.any(bias) else None
    some = tolerance(arithmetic, w.q, w.k, w.v, bias=bias, sink=sink, **options)
    return some.o, some.lse


def products(q: Floats, k: Floats) -> Floats:
    """Return q·k of every pair."""
    with np.errstate(invalid="ignore", over="ignore"):
        return q @ k.mT


def summed(s: Floats) -> Floats:
    """Return the log-sum-exp of masked logits."""
    m = s.max(-1, initial=-np.inf)
    safe = np.where(np.isfinite(m), m, 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return safe + np.log(np.exp(s - safe[..., None]).sum(-1))


def averaged(s: Floats, v: Floats, lse: Floats) -> Floats:
    """Return Σ exp(s − lse) v over what is not −inf; NaN where such a value is not finite."""
    m = s.max(-1, initial=-np.inf, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        w = np.where(np.isneginf(s), 0.0, np.exp(s - np.where(np.isfinite(m), m, 0.0)))
        z = w.sum(-1, keepdims=True)
        own = (m + np.log(z))[..., 0]
        gain = np.where(own == lse, 1.0, np.exp(own - lse))
        sound = np.isfinite(v)
        o = np.where(z == 0, 0.0, gain[..., None] * (w @ np.where(sound, v, 0.0)) / z)
        if not sound.all():
            o = np.where((~np.isneginf(s)).astype(np.float64) @ (~sound).astype(np.float64) > 0, np.nan, o)
    return o


def write(call: Call, convention: Convention) -> Written:
    """Write a call out under a convention."""
    q, k, v = (np.asarray(x, np.float64) for x in (call.q, call.k, call.v))
    q, k, v = (x[None] if x.ndim == 2 else x for x in (q, k, v))
    heads, few = q.shape[-3], k.shape[-3]
    own, lead = key_heads(heads, few, convention), np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    q, k, v = (np.broadcast_to(x, (*lead, *x.shape[-3:])) for x in (q, k[..., own, :, :], v[..., own, :, :]))
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    bias, sight = np.zeros(1), sources(call, convention)
    if call.bias is not None:
        bias = np.asarray(call.bias, np.float64) * (scale if convention.bias == "before the scale" else 1.0)
        sight["bias"] = ~np.isneginf(bias)
        bias = np.where(np.isneginf(bias), 0.0, bias)
    if call.slopes is not None:
        bias = np.asarray(call.slopes, np.float64)[..., None, None] * distances(call, convention)
    sink = None if call.sink is None else np.broadcast_to(np.asarray(call.sink, np.float64), (*lead, heads))
    return Written(convention, q, k, v, products(q, k), scale, call.softcap, convention.order, bias, sink, sight)


def key_heads(heads: int, few: int, convention: Convention) -> NDArray[np.int64]:
    """Return which key head each query head reads."""
    each: NDArray[np.int64] = np.arange(heads)
    return each // (heads // few) if convention.groups == "interleaved" else each % few


def positions(call: Call, rows: str) -> NDArray[np.int64]:
    """Return where rows stand on the key axis, (..., T, 1)."""
    return call.positions(rows)[..., None]


def distances(call: Call, convention: Convention) -> Floats:
    """Return what ALiBi's slopes multiply, (..., T, S)."""
    j, p = np.arange(call.sizes[1]), positions(call, convention.alibi_rows)
    form = call.under(convention)._form()  # pyright: ignore[reportPrivateUsage]
    if form == "key position":
        starts = np.zeros(1, np.int64) if call.starts is None else np.asarray(call.starts[1])
        return (j - starts[np.searchsorted(starts, j, side="right") - 1] + 0.0 * p).astype(np.float64)
    return (j - p if form == "signed distance" else -np.abs(j - p)).astype(np.float64)


def sources(call: Call, convention: Convention) -> dict[str, Bools]:
    """Return which pairs each source of masking lets be seen."""
    (T, S), found = call.sizes, dict[str, Bools]()
    j = np.arange(S)
    if call.lengths is not None:
        found["lengths"] = j < np.asarray(call.lengths)[:, None, None, None]
    if call.causal:
        found["causal"] = j <= positions(call, convention.rows)
    if call.window is not None:
        found["window"] = window(call, convention, *call.window)
    if call.mask is not None:
        mask = np.asarray(call.mask, np.bool_)
        found["mask"] = ~mask if convention.mask == "drop" else mask
    if call.starts is not None:
        cq, ck = (np.asarray(x) for x in call.starts)
        found["packing"] = np.searchsorted(cq, np.arange(T), "right")[:, None] == np.searchsorted(ck, j, "right")
    return found


def window(call: Call, convention: Convention, left: int | None, right: int | None) -> Bools:
    """Return which pairs a window lets be seen."""
    j, p = np.arange(call.sizes[1]), positions(call, convention.window_rows)
    left = None if left is None else left - (convention.window == "keys with its own")
    low = np.True_ if left is None else j >= p - left
    return np.asarray(low & (np.True_ if right is None else j <= p + right))
