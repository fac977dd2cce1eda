"""Known classes of bugs of the online softmax: tiles, rescaling, the row sum, lse, splits, precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from refattn.conventions import Call
from refattn.testing._arithmetic import Arithmetic
from refattn.testing._changes import TILES, Change, based, given
from refattn.testing._formats import FORMATS, Format
from refattn.testing._written import LN2, VANISHED, Bools, Floats, Outcome, Written, averaged, summed

OVERFLOW = math.log(float(np.finfo(np.float32).max))
"""The largest number whose exponential float32 holds."""
FEW = 16
"""Single tiles are tried where there are no more than this."""


def tiling(call: Call) -> Iterator[Change]:
    """Yield changes of which tiles are visited, and how often."""
    (T, S), j = call.sizes, np.arange(call.sizes[1])
    kind = "tile edges"
    if S > 1:
        yield Change(kind, "drops the last key", lambda w: w.hiding(tiles=_before_end(w, 1)))
        yield Change(kind, "drops the last key of all", lambda w: w.hiding(tiles=j < S - 1))
        yield Change(kind, "drops the first key", lambda w: w.hiding(tiles=j > 0))
        yield Change(kind, "counts the last key twice", lambda w: _counted(w, j == S - 1))
    for t in (8, *TILES):
        if t < S:
            tail = S % t
            if tail:
                yield Change(
                    kind,
                    f"drops the last {tail} keys, a tile of {t} that is not whole",
                    given(S - tail, lambda w, n: w.hiding(tiles=j < n)),
                )
            last = j >= (S - 1) // t * t
            yield Change(kind, f"counts the last tile of {t} keys twice", given(last, lambda w, x: _counted(w, x)))
            yield Change(
                kind,
                f"counts the first key of each tile of {t} twice",
                given((j % t == 0) & (j > 0), lambda w, x: _counted(w, x)),
            )
            yield Change(
                kind,
                f"counts the last key of each tile of {t} twice",
                given((j % t == t - 1) & (j < S - 1), lambda w, x: _counted(w, x)),
            )
            yield Change(kind, f"sees the first tile of {t} keys only", given(t, lambda w, n: w.hiding(tiles=j < n)))
            if S // t < FEW:
                for n in range(-(-S // t)):
                    yield Change(
                        kind,
                        f"drops keys {n * t} to {min(n * t + t, S) - 1}, a tile of {t}",
                        given(j // t != n, lambda w, x: w.hiding(tiles=x)),
                    )
        if S % t:
            said = f"sees {-S % t} keys of zeros that pad the last tile of {t}"
            yield Change("padding score", said, given(-S % t, lambda w, n: also(w, n)))
        if t < T and T % t:
            said = f"does not write the last {T % t} rows, a tile of {t} that is not whole"
            yield Change(kind, said, given(T - T % t, lambda w, n: _rows_lost(w, np.arange(T) >= n)))


def also(w: Written, n: float) -> Written:
    """Return the problem with n keys of zeros, values too."""
    return replace(w, pads=float(np.logaddexp(w.pads, math.log(n))))


def _before_end(w: Written, n: int) -> Bools:
    """Return all but the last keys that exist."""
    j = np.arange(int(w.raw.shape[-1]))
    exists = w.sight.get("lengths", np.ones(1, np.bool_))
    ends = np.broadcast_to(exists, (*exists.shape[:-1], len(j))).sum(-1, keepdims=True)
    return j < ends - n


def _counted(w: Written, again: Bools) -> Written:
    return replace(w, bias=w.bias + np.where(again, LN2, 0.0))


def _rows_lost(w: Written, lost: Bools) -> Outcome:
    right = w.outcome()
    return replace(right, o=np.where(lost[:, None], 0.0, right.o))


def online(call: Call) -> Iterator[Change]:
    """Yield changes of the running maximum, row sum and output."""
    S = call.sizes[1]
    for t in TILES:
        if t < S:
            for power, does in POWERS:
                for which, words in (("o", "the output"), ("l", "the row sum"), ("o l", "output and row sum")):
                    said = f"merges keys in tiles of {t} {does} {words}"
                    yield Change("rescaling", said, given(power, which, partial(_rescaled, t)))
            said = f"takes the maximum of each tile of {t} keys alone, so that rescaling overflows"
            yield Change("running maximum", said, given(t, lambda w, t: _overflowing(w, t)))
            yield Change(
                "row sum", f"has the row sum of the last tile of {t} keys only", given(t, lambda w, t: _last_sum(w, t))
            )
    yield Change("running maximum", "takes exponentials of logits as they are, without the maximum", _unshifted)
    for low in (0.0, -1e3, -1e4, -5e4, -65504.0):
        said = (
            f"starts the maximum at {low:g}, so that rows whose logits are all far below answer as if they saw nothing"
        )
        yield Change("running maximum", said, given(low, lambda w, c: _floor(w, c)))
    yield Change("row sum", "does not divide by the row sum", lambda w: divided(w, lambda x: x))
    yield from _nan()


def _tops(w: Written, t: int) -> Floats:
    """Return the running maximum after the tile that each key is in, (..., T, S)."""
    s = w.masked
    tops = [s[..., n : n + t].max(-1) for n in range(0, s.shape[-1], t)]
    return np.repeat(np.maximum.accumulate(np.stack(tops, -1), -1), t, -1)[..., : s.shape[-1]]


POWERS = (
    (0.0, "without rescaling"),
    (-1.0, "and divides instead of rescaling"),
    (2.0, "and rescales twice"),
    (0.5, "and rescales with the root for"),
    (LN2, "and rescales with exp2 in place of exp for"),
    (1 / LN2, "and rescales with too many bits for"),
)
"""What the factor that should rescale is raised to, in words."""


def _rescaled(t: int, w: Written, power: float, which: str) -> Outcome:
    """Return what is answered where output, row sum or both are rescaled with a power of the right factor."""
    top, m = _tops(w, t), w.top
    end = end_of(w)
    with np.errstate(invalid="ignore", over="ignore"):
        right = w.masked - m[..., None]
        wrong = np.where(w.seen, w.masked - top + power * (top - m[..., None]), -np.inf)
        sink = 0.0 if w.sink is None else np.exp(w.sink[..., None] - end)
        keep = np.exp((m - end) * (power if which == "o l" else 1.0))
        keep = np.where(np.isneginf(m), 0.0, keep)
        l = np.exp(summed(right if which == "o" else wrong)) * keep + sink  # noqa: E741
        a = right if which == "l" else wrong
        alone = summed(a)
        gain = np.where(np.isneginf(alone), 0.0, np.exp(alone) * keep / l)
        o = gain[..., None] * averaged(a, w.v, alone)
        lse = np.where(l > 0, end + np.log(l), -np.inf)
    o, lse = w.called(np.where((l > 0)[..., None], o, 0.0), lse)
    return Outcome(o, lse, replace(w, own=np.where(w.seen, a, 0.0), sink=None), gain)


def _overflowing(w: Written, t: int) -> Outcome | None:
    s = w.masked
    tops: list[Floats] = [s[..., n : n + t].max(-1) for n in range(0, s.shape[-1], t)]
    broken, last = np.zeros(s.shape[:-1], np.bool_), tops[0]
    with np.errstate(invalid="ignore"):
        for top in tops[1:]:
            broken |= last - top > OVERFLOW
            last = np.where(np.isneginf(top), last, top)
    return _broken(w, broken & np.isfinite(w.top)) if broken.any() else None


def _unshifted(w: Written) -> Outcome:
    right = _broken(w, w.top > OVERFLOW)
    low = w.top < -VANISHED
    return replace(right, o=np.where(low[..., None], 0.0, right.o), lse=np.where(low, -np.inf, right.lse))


def _broken(w: Written, rows: Bools) -> Outcome:
    """Return what is right, but for rows that are not finite."""
    right = w.outcome()
    return replace(right, o=np.where(rows[..., None], np.nan, right.o), lse=np.where(rows, np.nan, right.lse))


def _floor(w: Written, low: float) -> Outcome | None:
    lost = w.top < low - VANISHED if low < 0 else w.top < -VANISHED
    if not (lost & np.isfinite(w.top)).any():
        return None
    right = w.outcome()
    return replace(right, o=np.where(lost[..., None], 0.0, right.o), lse=np.where(lost, -np.inf, right.lse))


def _last_sum(w: Written, t: int) -> Outcome:
    """Return what is answered with the row sum of the last tile in which a row sees anything."""
    j = np.arange(int(w.raw.shape[-1]))
    m = w.top
    final = np.where(w.seen, j // t, -1).max((-1, -2), keepdims=True)
    l = summed(np.where(j // t == final, w.masked, -np.inf))  # noqa: E741
    if w.sink is not None:
        l = np.logaddexp(l, w.sink[..., None])  # noqa: E741
    with np.errstate(over="ignore", invalid="ignore"):
        gain = np.where(np.isneginf(m) | np.isneginf(l), 0.0, np.exp(w.normaliser - l))
        o = gain[..., None] * averaged(w.masked, w.v, w.normaliser)
    return Outcome(*w.called(o, l), w, gain)


def divided(w: Written, gain: Callable[[Floats], Floats]) -> Outcome:
    """Return what is answered where o is multiplied by something of the row sum, which is of exp(s − max)."""
    right = w.outcome()
    end = w.top if w.sink is None else np.maximum(w.top, w.sink[..., None])
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        l = np.where(np.isneginf(w.normaliser), 1.0, np.exp(w.normaliser - end))  # noqa: E741
        return replace(right, o=right.o * gain(l)[..., None], gain=gain(l))


def _nan() -> Iterator[Change]:
    kind = "unseen NaN"
    yield Change(kind, "multiplies a weight of 0 with what stands in values that nobody sees", _poisoned)
    yield Change(kind, "lets keys that are not finite into rows that do not see them", lambda w: _broken_by_keys(w))


def _poisoned(w: Written) -> Outcome | None:
    bad: Bools = ~np.isfinite(w.v)
    if not bad.any():
        return None
    right = w.outcome()
    return replace(right, o=np.where(bad.max(-2, keepdims=True), np.nan, right.o))


def _broken_by_keys(w: Written) -> Outcome | None:
    bad = ~np.isfinite(w.k)
    return _broken(w, np.broadcast_to(bad.max((-1, -2))[..., None], w.top.shape)) if bad.any() else None


def sums(call: Call) -> Iterator[Change]:
    """Yield changes of lse alone."""

    def of(f: Callable[[Written, Floats], Floats]) -> Callable[[Written], Outcome]:
        def make(w: Written) -> Outcome:
            right = w.outcome()
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                return replace(right, lse=np.where(w.empty, right.lse, f(w, right.lse)))

        return make

    others: tuple[tuple[str, Callable[[Written, Floats], Floats]], ...] = (
        ("gives lse without the maximum: the logarithm of the row sum alone", lambda w, x: x - based(w, end_of(w))),
        ("gives the maximum for lse", lambda w, x: based(w, end_of(w))),
        ("gives lse with the other sign", lambda w, x: -x),
        ("gives the row sum for lse, not its logarithm", lambda w, x: np.exp(w.normaliser - end_of(w))),
        ("gives exp(lse) for lse", lambda w, x: np.exp(w.normaliser)),
        ("multiplies lse by ln 2", lambda w, x: x * LN2),
        ("multiplies lse by log₂e", lambda w, x: x / LN2),
        ("multiplies the maximum in lse by log₂e", lambda w, x: x + based(w, end_of(w)) * (1 / LN2 - 1)),
        ("multiplies the maximum in lse by ln 2", lambda w, x: x + based(w, end_of(w)) * (LN2 - 1)),
        (
            "gives the logarithm of the row sum in bits in lse",
            lambda w, x: x + based(w, w.normaliser - end_of(w)) * (1 / LN2 - 1),
        ),
        ("gives lse of logits that are not scaled", lambda w, x: x - based(w, end_of(w)) * (1 - 1 / w.scale)),
        ("gives lse minus the logarithm of the number of keys", lambda w, x: x - based(w, np.log(w.seen.sum(-1)))),
    )
    for said, f in others:
        yield Change("lse", said, of(f))


def end_of(w: Written) -> Floats:
    """Return the maximum at the end, with the sink."""
    return w.top if w.sink is None else np.maximum(w.top, w.sink[..., None])


def splits(call: Call) -> Iterator[Change]:
    """Yield changes of how parts of the keys are merged."""
    S = call.sizes[1]
    cuts: dict[tuple[int, ...], str] = {}
    for t in (1, *TILES):
        for n in (2, 3, 4, 8):
            step = math.ceil(math.ceil(S / t) / n) * t
            cuts.setdefault(tuple(range(0, S, step or 1)), f"{n} splits" + (f" of tiles of {t}" if t > 1 else ""))
    for starts, words in cuts.items():
        if len(starts) < 2:
            continue
        for said, how in (
            (f"averages {words} without their weights", "mean"),
            (f"merges {words} with lse in bits as if in nats", "bits"),
            (f"merges {words} with lse in nats as if in bits", "nats"),
            (f"gives a split that sees nothing a weight, of {words}", "empty"),
            (f"keeps the last of {words} only", "last"),
            (f"keeps the first of {words} only", "first"),
            (f"takes the one of {words} that has the largest lse", "largest"),
            (f"weighs {words} with their lse, not its exponential", "linear"),
        ):
            yield Change("merge", said, given(starts, how, lambda w, x, h: _merged(w, x, h)))


def _merged(w: Written, starts: tuple[int, ...], how: str) -> Outcome | None:
    s = w.masked
    parts: list[Floats] = np.split(s, starts[1:], axis=-1)
    lse = np.stack([summed(x) for x in parts])
    if w.sink is not None:
        lse[0] = np.logaddexp(lse[0], w.sink[..., None])
    values = np.split(w.v, starts[1:], axis=-2)
    o = np.stack([averaged(x, v, y) for x, v, y in zip(parts, values, lse, strict=True)])
    empty = np.isneginf(lse)
    if how == "empty" and not empty.any():
        return None
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if how in ("first", "last"):
            n = 0 if how == "first" else -1
            return Outcome(*w.called(o[n], lse[n]), w)
        if how == "largest":
            n = lse.argmax(0)[None]
            return Outcome(*w.called(np.take_along_axis(o, n[..., None], 0)[0], w.normaliser), w)
        if how == "mean":
            return Outcome(*w.called(o.mean(0), w.normaliser), w)
        if how == "linear":
            return Outcome(*w.called((lse[..., None] * o).sum(0) / lse.sum(0)[..., None], w.normaliser), w)
        known = (
            np.where(empty, 0.0, lse)
            if how == "empty"
            else lse / LN2
            if how == "bits"
            else lse * LN2
            if how == "nats"
            else lse
        )
        top: Floats = known.max(0)
        top = np.where(np.isneginf(top), 0.0, top)
        p = np.exp(known - top)
        z = p.sum(0)
        total = top + np.log(z)
        back = LN2 if how == "bits" else 1 / LN2 if how == "nats" else 1.0
        o = (p[..., None] * o).sum(0) / np.where(z == 0, 1, z)[..., None]
    if how == "empty":
        return Outcome(o, based(w, total), w)
    return Outcome(*w.called(o, total * back), w)


def precision(arithmetic: Arithmetic) -> Iterator[Change]:
    """Yield coarser arithmetics, and roundings at a place where there should be none."""
    weights = arithmetic.formats.weights
    formats = [f for f in FORMATS.values() if f.bits < 24]
    wide = [f for f in formats if f.bits >= 8]
    for t in (None, *TILES):
        words = "" if t is None else f", in tiles of {t}"
        for f in formats:
            if weights.bits < 24 and f is weights:
                said = f"rounds P to {f.name} before the row sum{words}"
                yield Change("precision", said, given(t, f, lambda w, t, f: _rounded_first(w, t, f, arithmetic)))
    yield Change("precision", "overflows float16 in q·k before the scale", lambda w: _half_overflow(w))
    for f in formats:
        if f.bits < arithmetic.formats.inputs.bits:
            coarse = replace(arithmetic, operands=f)
            said = f"multiplies q, k and v that are rounded to {f.name}"
            yield Change("precision", said, given(coarse, lambda w, a: replace(w.outcome(), arithmetic=a)), 3)
        if f in wide and f.bits < arithmetic.formats.scores.bits:
            words, kind, rank = f"in {f.name}", "precision", 3
            stored = replace(arithmetic, stored_scores=f)
            yield Change(
                kind, f"has logits {words}", given(stored, lambda w, a: replace(w.outcome(), arithmetic=a)), rank
            )
            sums = replace(arithmetic, accumulate=f, lse=arithmetic.formats.lse)
            yield Change(kind, f"sums {words}", given(sums, lambda w, a: replace(w.outcome(), arithmetic=a)), rank)
            lse = replace(arithmetic, lse=f)
            yield Change(kind, f"gives lse {words}", given(lse, lambda w, a: replace(w.outcome(), arithmetic=a)), rank)
        if f.bits < weights.bits:
            coarse = replace(arithmetic, weights=f)
            yield Change(
                "precision", f"rounds P to {f.name}", given(coarse, lambda w, a: replace(w.outcome(), arithmetic=a)), 3
            )
    for bits in (2, 4, 6, 8, 10, 12):
        quick = replace(arithmetic, exp_ulp=arithmetic.exp_ulp * 2.0**bits)
        said = f"has an exponential that is {2**bits} times less exact than stated"
        yield Change("precision", said, given(quick, lambda w, a: replace(w.outcome(), arithmetic=a)), 3)


def _rounded_first(w: Written, t: int | None, f: Format, arithmetic: Arithmetic) -> Outcome:
    """Return what is answered where the row sum is of weights that are rounded beside the running maximum."""
    top = np.broadcast_to(w.top[..., None], w.raw.shape) if t is None else _tops(w, t)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(w.seen, f.round(np.exp(w.masked - top)), 0.0)
        s = np.where(p > 0, np.log(p) + top, -np.inf)
    lse = summed(s)
    if w.sink is not None:
        lse = np.logaddexp(lse, w.sink[..., None])
    return Outcome(*w.called(averaged(s, w.v, lse), lse), w)


def _half_overflow(w: Written) -> Outcome | None:
    with np.errstate(invalid="ignore"):
        broken: Bools = ((w.raw > FORMATS["float16"].largest) & w.seen).max(-1)
    return _broken(w, broken) if broken.any() else None
