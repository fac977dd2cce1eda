"""Known classes of bugs of what is read and of how logits are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from refattn.conventions import Call, Convention
from refattn.testing._changes import PICKS, TILES, Change, based, given, padded_at, rolled, scored
from refattn.testing._written import LN2, Floats, Outcome, Written, averaged, key_heads


def reading(call: Call, convention: Convention) -> Iterator[Change]:
    """Yield changes of which numbers of q, k and v are read."""
    heads, few = (np.shape(x)[-3] if np.ndim(x) > 2 else 1 for x in (call.q, call.k))
    if few > 1:
        h = np.arange(heads)
        for said, own in (
            ("lets query head h read key head h // Hk", np.minimum(h // few, few - 1)),
            ("lets every query head read the first key head", 0 * h),
            ("lets every query head read the last key head", 0 * h + few - 1),
            ("lets query head h read the key head after its own", (h // (heads // few) + 1) % few),
        ):
            yield Change("heads", said, given(own, lambda w, own: _heads(w, call, own)))
    yield from _batches(call)
    for name, many in (("q", "queries"), ("k", "keys"), ("v", "values")):
        x = np.asarray(getattr(call, name))
        flat = x.ravel("K").reshape(x.shape)
        yield Change(
            "layout",
            f"reads {many} as they lie in memory, not by their strides",
            given(name, flat, lambda w, n, x: _put(w, call, **{n: x})),
        )
        if x.ndim > 2 and x.shape[-3] > 1:
            y = x.reshape(*x.shape[:-3], x.shape[-2], x.shape[-3], -1).swapaxes(-2, -3)
            yield Change(
                "layout", f"swaps heads and tokens of {many}", given(name, y, lambda w, n, x: _put(w, call, **{n: x}))
            )
    yield Change("values", "returns K for V", _keys_as_values)
    yield Change("values", "shifts values by one key", lambda w: w.reading(v=np.roll(w.v, 1, -2)))
    yield Change("values", "shifts values by one key the other way", lambda w: w.reading(v=np.roll(w.v, -1, -2)))
    D, E = np.shape(call.q)[-1], np.shape(call.v)[-1]
    for t in (4, 8, 16, 32, 64, 128, D // 2, D - 1):
        for width, said in ((D // max(t, 1) * t, f"multiplies whole {t}s"), (min(t, D), f"multiplies the first {t}")):
            if 0 < width < D:
                said = f"{said} of the width of q and k only, {width} of {D}"
                yield Change("head dim", said, given(width, lambda w, n: _narrow(w, n)))
    for width in {D, *(E // t * t for t in (4, 8, 16, 32, 64, 128)), 64, 128}:
        if 0 < width < E:
            said = f"leaves columns of the output from {width} on 0"
            yield Change("head dim", said, given(width, lambda w, n: w.reading(v=_cut(w.v, n))))


def _heads(w: Written, call: Call, own: Any) -> Written:
    return w.reading(**{n: _wide(np.asarray(getattr(call, n), np.float64)[..., own, :, :], w, n) for n in ("k", "v")})


def _wide(x: Floats, w: Written, name: str) -> Floats:
    return np.broadcast_to(x, getattr(w, name).shape)


def _put(w: Written, call: Call, **given: Any) -> Written | None:
    heads = w.q.shape[-3]
    found: dict[str, Floats] = {}
    for name, x in given.items():
        x = np.asarray(x, np.float64)
        if np.array_equal(x, np.asarray(getattr(call, name), np.float64), equal_nan=True):
            return None
        few = x.shape[-3] if x.ndim > 2 else 1
        own = key_heads(heads, few, w.convention)
        found[name] = _wide(x[..., own, :, :] if x.ndim > 2 else x, w, name)
    return w.reading(**found)


def _batches(call: Call) -> Iterator[Change]:
    for name, many in (("k", "keys"), ("v", "values")):
        if np.ndim(getattr(call, name)) > 3 and np.shape(getattr(call, name))[0] > 1:
            said = f"reads the first batch's {many} in every batch"
            yield Change("batches", said, given(name, lambda w, n: w.reading(**{n: _wide(getattr(w, n)[:1], w, n)})))
    if np.ndim(call.k) > 3 and np.shape(call.k)[0] > 1:
        said = "reads the first batch's keys and values in every batch"
        yield Change("batches", said, lambda w: w.reading(k=_wide(w.k[:1], w, "k"), v=_wide(w.v[:1], w, "v")))


def _keys_as_values(w: Written) -> Written:
    width = w.v.shape[-1]
    return w.reading(v=np.concatenate([w.k] * -(-width // w.k.shape[-1]), -1)[..., :width])


def _narrow(w: Written, width: int) -> Written:
    return w.reading(q=_cut(w.q, width), k=_cut(w.k, width))


def _cut(x: Floats, width: int) -> Floats:
    """Return the first columns, and 0 for the others."""
    return x * (np.arange(int(x.shape[-1])) < width)


def logits(call: Call, convention: Convention) -> Iterator[Change]:
    """Yield changes of how logits are made of products."""
    D, E = np.shape(call.q)[-1], np.shape(call.v)[-1]
    right = D**-0.5 if call.scale is None else call.scale
    others = {
        "does not scale logits": 1.0,
        "scales logits twice": right**2,
        "divides by the scale": 1 / right,
        "scales with 1/D": 1 / D,
        f"scales with 1/√{E}, the width of v": E**-0.5,
        "scales with the fourth root of 1/D": D**-0.25,
        "multiplies logits by log₂e before a natural exponential": right / LN2,
        "multiplies logits by ln 2 before a natural exponential": right * LN2,
        "has logits of the other sign": -right,
    }
    if call.scale is not None:
        others["ignores the scale and takes 1/√D"] = D**-0.5
    for t in (8, 16, 32, 64, 128):
        others.setdefault(
            f"scales with 1/√{-(-D // t) * t}: the width of q and k rounded up to {t}s", (-(-D // t) * t) ** -0.5
        )
    others.setdefault("scales by the width rounded up to a power of two", (1 << (D - 1).bit_length()) ** -0.5)
    for said, x in others.items():
        if x != right:
            yield Change("scale", said, given(x, lambda w, x: replace(w, scale=x)))
    if call.softcap is not None:
        yield from _softcaps(call.softcap, call.sizes[1])
    if call.bias is not None:
        yield from _biases(right)
        yield from rolled("bias", "bias", (-1, -2, -3, -4))
    if call.slopes is not None:
        yield from _slopes(call, right)
    if call.sink is not None:
        yield from _sinks(right)
        yield from rolled("sink", "sink", (-3,))


def _softcaps(cap: float, S: int) -> Iterator[Change]:
    yield Change("softcap", "ignores the softcap", lambda w: replace(w, softcap=None))
    others: tuple[tuple[str, Callable[[Written, Floats], Floats]], ...] = (
        ("does not multiply capped logits by the cap again", lambda w, s: np.tanh(s / cap)),
        ("does not divide logits by the cap", lambda w, s: cap * np.tanh(s)),
        ("caps logits before the scale", lambda w, s: w.scale * cap * np.tanh(w.raw / cap)),
        ("clips logits at the cap", lambda w, s: np.clip(s, -cap, cap)),
    )
    for said, made in others:
        yield Change("softcap", said, given(made, lambda w, f: replace(w, own=f(w, w.scale * w.raw) + w.bias)))
    said = "caps what is hidden too, and so gives it the score −cap"
    yield Change("softcap", said, lambda w: scored(w, None, lambda _: -cap))
    for t in TILES:
        if S % t:
            words = f"{said}, with {-S % t} keys that pad the last tile of {t}"
            yield Change("softcap", words, given(-S % t, lambda w, n: padded_at(w, n, -cap)))


def _biases(right: float) -> Iterator[Change]:
    for said, factor in (
        ("ignores the bias", 0.0),
        ("does not turn the bias into bits, as logits are: it counts ln 2 times", LN2),
        ("counts the bias log₂e times", 1 / LN2),
        ("subtracts the bias", -1.0),
        ("adds the bias twice", 2.0),
        ("adds the bias before the scale", right),
        ("divides the bias by the scale", 1 / right),
    ):
        yield Change("bias", said, given(factor, lambda w, x: replace(w, bias=w.bias * x)))
    for words, pick in PICKS:
        said = words.format("bias")
        yield Change("bias", said, given(pick, lambda w, f: replace(w, bias=f(w.bias))))


def _slopes(call: Call, right: float) -> Iterator[Change]:
    slopes = np.asarray(call.slopes, np.float64)
    heads = slopes.shape[-1]
    h: Floats = np.arange(1.0, heads + 1)
    near = 2.0 ** round(math.log2(heads)) if heads else 1.0
    for said, x in (
        ("ignores ALiBi", 0 * slopes),
        ("favours distant keys: ALiBi has the other sign", -slopes),
        ("gives each head the slope of the head after it", np.roll(slopes, -1, -1)),
        ("gives each head the slope of the head before it", np.roll(slopes, 1, -1)),
        ("gives every head the first one's slope", slopes[..., :1]),
        ("gives heads the slopes in reverse", slopes[..., ::-1]),
        ("scales ALiBi too", slopes * right),
        ("does not turn ALiBi into bits, as logits are: it counts ln 2 times", slopes * LN2),
        ("counts ALiBi log₂e times", slopes / LN2),
        ("has the slopes of the nearest power of two of heads", 2.0 ** (-8 * h / near)),
        ("starts slopes with the exponent 0", 2.0 ** (-8 * (h - 1) / max(heads, 1))),
    ):
        ratio = np.divide(x, slopes, out=np.ones(np.broadcast_shapes(x.shape, slopes.shape)), where=slopes != 0)
        yield Change("ALiBi", said, given(ratio, lambda w, r: replace(w, bias=w.bias * r[..., None, None])))


def _sinks(right: float) -> Iterator[Change]:
    yield Change("sink", "ignores the sink", lambda w: replace(w, sink=None))
    for n in (2, 3, 4, 8):
        said = f"counts the sink {n} times, as if once a split"
        yield Change("sink", said, given(n, lambda w, n: _sink(w, lambda s: s + math.log(n))))
    for said, factor in (
        ("scales the sink as logits are", right),
        ("does not turn the sink into bits, as logits are: it counts ln 2 times", LN2),
        ("counts the sink log₂e times", 1 / LN2),
        ("has the sink with the other sign", -1.0),
    ):
        yield Change("sink", said, given(factor, lambda w, x: _sink(w, lambda s: s * x)))
    yield Change(
        "sink", "has every head's first sink", lambda w: _sink(w, lambda s: np.broadcast_to(s[..., :1], s.shape))
    )
    values: tuple[tuple[str, Callable[[Floats], Floats]], ...] = (
        ("gives the sink the first key's value", lambda v: v[..., :1, :]),
        ("gives the sink the last key's value", lambda v: v[..., -1:, :]),
        ("gives the sink the mean of v", lambda v: v.mean(-2, keepdims=True)),
        ("gives the sink the value 1", lambda v: np.ones_like(v[..., :1, :])),
    )
    for said, value in values:
        yield Change("sink", said, given(value, _valued))
    yield Change("sink", "gives the sink a part in the maximum and not in the row sum", _sink_in_maximum)


def _sink(w: Written, change: Callable[[Floats], Floats]) -> Written | None:
    return None if w.sink is None else replace(w, sink=change(w.sink))


def _valued(w: Written, value: Callable[[Floats], Floats]) -> Outcome | None:
    """Return what is answered where the sink has a value."""
    if w.sink is None or not w.v.shape[-2]:
        return None
    right = w.outcome()
    p = np.exp(w.sink[..., None] - w.normaliser)
    return replace(right, o=right.o + p[..., None] * value(w.v))


def _sink_in_maximum(w: Written) -> Outcome | None:
    if w.sink is None:
        return None
    plain = replace(w, sink=None)
    gain = np.exp(np.minimum(w.top - w.sink[..., None], 0.0))
    lse = plain.normaliser - w.top + np.maximum(w.top, w.sink[..., None])
    lse = np.where(np.isneginf(w.top), -np.inf, lse)
    o = gain[..., None] * averaged(plain.masked, w.v, plain.normaliser)
    return Outcome(np.where(np.isneginf(w.top)[..., None], 0.0, o), based(w, lse), w)
