"""Changes with numbers that are found from the answer: factors, integers, which heads were read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from refattn.conventions import Call, Convention
from refattn.testing._changes import Change, based, given
from refattn.testing._online_changes import also, divided, end_of
from refattn.testing._written import LN2, Floats, Outcome, Written, averaged, positions, window

MANY = 300
"""Integers are searched where there are no more keys than this."""
HEADS = 24
"""Heads are matched where there are no more key heads than this, over all batches."""


@dataclass(frozen=True)
class Fits:
    """A call with the answer that numbers are found from."""

    call: Call
    convention: Convention
    w: Written
    o: Floats
    lse: Floats | None

    def all(self) -> Iterator[Change]:
        """Yield every change that could be fitted."""
        yield from self.outputs()
        yield from self.factors()
        if self.lse is not None:
            yield from self.sums(self.lse)
        yield from self.heads()
        if self.call.sizes[1] <= MANY:
            yield from self.integers()

    def outputs(self) -> Iterator[Change]:
        """Yield factors of the output and of its divisor."""
        right = self.w.outcome()
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            factor = _middle(self.o / right.o)
            l = np.exp(np.nan_to_num(self.w.normaliser - end_of(self.w)))  # noqa: E741
            more = _middle(l[..., None] * (right.o / self.o - 1))
        if factor is not None:
            yield Change("output", f"multiplies the output by {factor:.6g}", given(factor, _times), 2)
        if more is not None and more > 0:
            said = f"divides by the row sum and {more:.3g}"
            yield Change("row sum", said, given(more, lambda w, x: divided(w, lambda z: z / (z + x))), 2)

    def factors(self) -> Iterator[Change]:
        """Yield factors of what logits are made of."""
        w, found = self.w, list[tuple[str, str, Callable[[Written, float], Written]]]()
        found.append(
            ("scale", "scales logits by {:.6g} times what is right", lambda w, x: replace(w, scale=w.scale * x))
        )
        if np.any(w.bias):
            found.append(("bias", "counts the bias {:.6g} times", lambda w, x: replace(w, bias=w.bias * x)))
        if w.softcap is not None:
            found.append(("softcap", "has a softcap {:.6g} times what is right", _capped))
        if w.sink is not None:
            found.append(("sink", "has sinks that are off by ln {:.6g}", _sunk))
        for kind, words, made in found:
            best = self._factor(partial(made, w))
            yield Change(kind, words.format(best), given(best, made), 2)

    def sums(self, lse: Floats) -> Iterator[Change]:
        """Yield numbers that are too many in the row sum, and lines of what lse is made of."""
        w, right = self.w, self.w.outcome()
        base = LN2 if w.convention.lse == "bits" else 1.0
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            more = _middle(np.exp(lse * base) - np.exp(w.normaliser))
            extra = _middle(np.exp(lse * base - end_of(w)) - np.exp(w.normaliser - end_of(w)))
            sink = lse * base + np.log(-np.expm1(replace(w, sink=None).normaliser - lse * base))
        if more is not None and more > 0:
            said = f"counts {more:.4g} too much in every row sum, as of a key with the score {math.log(more):.4g}"
            yield Change("padding score", said, given(more, also), 2)
        if extra is not None:
            said = f"counts {extra:.4g} too much beside the row sum in lse"
            yield Change("lse", said, given(extra, _longer), 2)
        if w.sink is not None:
            each = np.median(np.where(np.isfinite(sink), sink, 0.0), -1)
            yield Change("sink", f"has other sinks: {np.round(each.ravel()[:8], 3)}", given(each, _with_sinks), 2)
        with np.errstate(invalid="ignore"):
            top, rest = based(w, end_of(w)), based(w, w.normaliser - end_of(w))
        sure = np.isfinite(lse) & np.isfinite(top) & np.isfinite(rest)
        if sure.sum() > 3:
            made = np.linalg.lstsq(np.stack([top[sure], rest[sure], 1 + 0 * top[sure]], -1), lse[sure])[0]
            a, b, c = made.tolist()
            said = f"gives lse as {a:.5g} times the maximum, {b:.5g} times the logarithm of the row sum, and {c:.5g}"
            line = np.where(np.isfinite(right.lse), a * top + b * rest + c, right.lse)
            yield Change("lse", said, given(line, lambda w, x: replace(w.outcome(), lse=x)), 2)

    def heads(self) -> Iterator[Change]:
        """Yield the key head, of any batch, that explains each query head best."""
        w = self.w
        given_k, given_v = (np.asarray(x, np.float64) for x in (self.call.k, self.call.v))
        k, v = (x.reshape(-1, *x.shape[-2:]) for x in (given_k, given_v))
        if not 1 < len(k) == len(v) <= HEADS:
            return
        arrays = {"k": k, "v": v}
        wide = w.raw.shape[:-2]
        for names, words in (("kv", "keys and values"), ("v", "values"), ("k", "keys")):
            off: list[Floats] = []
            for n in range(len(k)):
                read = {name: np.broadcast_to(arrays[name][n], getattr(w, name).shape) for name in names}
                off.append(self._far(w.reading(**read), (-1, -2)))
            best = np.argmin(off, 0)
            said = f"lets query heads read the {words} of the heads {best.ravel()[:8].tolist()}, counted over batches"
            few = max(len(k) // max(math.prod(wide[:-1]), 1), 1)
            crossed = (best // few != np.arange(math.prod(wide[:-1])).reshape(*wide[:-1], 1)).any()
            made = w.reading(**{name: arrays[name][best] for name in names})
            yield Change("batches" if crossed else "heads", said, given(made, _instead), 2)

    def integers(self) -> Iterator[Change]:
        """Yield whole numbers: windows, diagonals, lengths, ranges of keys."""
        call, how, w, (T, S) = self.call, self.convention, self.w, self.call.sizes
        j = np.arange(S)
        if call.window is not None:
            left, right = call.window
            for side, number in (("left", left), ("right", right)):
                if number is not None:
                    made = [
                        w.hiding(window=window(call, how, *((n, right) if side == "left" else (left, n))))
                        for n in range(-1, S + 1)
                    ]
                    n = self._nearest(made)
                    said = f"has {n - 1} for the window's {side} number"
                    yield Change("window size", said, given(made[n], _instead), 2)
        if call.causal:
            p = positions(call, how.rows)
            made = [w.hiding(causal=j <= p + n) for n in range(-S, S + 1)]
            n = self._nearest(made)
            kind = "causal diagonal" if abs(n - S) < 3 else "causal alignment"
            yield Change(kind, f"shifts the diagonal by {n - S}", given(made[n], _instead), 2)
        if call.lengths is not None:
            off = [self._far(w.hiding(lengths=j < n), (-1, -2, -3)) for n in range(S + 1)]
            best = np.argmin(off, 0)
            made = w.hiding(lengths=j < best[:, None, None, None])
            yield Change("lengths", f"has the lengths {best.tolist()[:8]}", given(made, _instead), 2)
        made = [w.hiding(tiles=j >= n) for n in range(1, S)]
        made += [w.hiding(tiles=j < n) for n in range(1, S)]
        if made:
            n = self._nearest(made)
            said = f"drops keys before {n + 1}" if n < S - 1 else f"drops keys from {n - S + 2} on"
            yield Change("tile edges", said, given(made[n], _instead), 2)
        if call.starts is not None:
            yield from self._bounds(T, S)

    def _bounds(self, T: int, S: int) -> Iterator[Change]:
        """Yield packed sequences whose keys start or end a few keys from where they should."""
        assert self.call.starts is not None
        cq, ck = (np.asarray(x) for x in self.call.starts)
        own = np.searchsorted(cq, np.arange(T), "right") - 1
        first, last, j = ck[own][:, None], ck[own + 1][:, None], np.arange(S)
        for a in (-2, -1, 0, 1, 2):
            for b in (-2, -1, 0, 1, 2):
                seen = (j >= first + a) & (j < last + b)
                said = f"starts a sequence's keys {a:+d} and ends them {b:+d} from where they should be"
                yield Change("packing", said, given(seen, lambda w, x: w.hiding(packing=x)))

    def _far(self, w: Written, axes: tuple[int, ...]) -> Floats:
        """Return how far an answer is, summed over axes of o: what is not finite is as far as all numbers."""
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.abs(averaged(w.masked, w.v, w.normaliser) - self.o)
            off = np.where(np.isfinite(off), off, np.where(np.isfinite(self.o), 1e3, 0.0)).sum(axes)
        return off

    def _nearest(self, made: Iterable[Written]) -> int:
        every = tuple(range(self.o.ndim))
        return int(np.argmin([float(self._far(w, every)) for w in made]))

    def _factor(self, made: Callable[[float], Written]) -> float:
        """Return the factor, from 1/16 to 16, whose answer is nearest: a coarse look, then a golden section."""
        every = tuple(range(self.o.ndim))

        def off(t: float) -> float:
            w = made(2.0**t)
            far = float(self._far(w, every))
            if self.lse is None:
                return far
            with np.errstate(invalid="ignore"):
                apart = np.abs(based(w, w.normaliser) - self.lse)
            return far + float(apart[np.isfinite(apart)].sum())

        at = int(np.argmin([off(t / 2 - 4) for t in range(17)]))
        low, high = max(at - 1, 0) / 2 - 4, min(at + 1, 16) / 2 - 4
        golden = (math.sqrt(5) - 1) / 2
        a, b = high - golden * (high - low), low + golden * (high - low)
        fa, fb = off(a), off(b)
        for _ in range(36):
            if fa < fb:
                high, b, fb = b, a, fa
                a = high - golden * (high - low)
                fa = off(a)
            else:
                low, a, fa = a, b, fb
                b = low + golden * (high - low)
                fb = off(b)
        return float(2.0 ** ((low + high) / 2))


def _middle(x: Floats) -> float | None:
    """Return the median of what is finite, unless there is nothing."""
    x = x[np.isfinite(x)]
    return float(np.median(x)) if len(x) else None


def _instead(_: Written, made: Written) -> Written:
    return made


def _times(w: Written, factor: float) -> Outcome:
    right = w.outcome()
    return replace(right, o=right.o * factor, gain=np.full(right.lse.shape, factor))


def _capped(w: Written, factor: float) -> Written:
    return replace(w, softcap=None if w.softcap is None else w.softcap * factor)


def _sunk(w: Written, factor: float) -> Written:
    return replace(w, sink=None if w.sink is None else w.sink + math.log(factor))


def _with_sinks(w: Written, each: Floats) -> Written:
    return replace(w, sink=each)


def _longer(w: Written, more: float) -> Outcome:
    """Return what is answered where lse is of the row sum, beside its maximum, and more."""
    right = w.outcome()
    with np.errstate(invalid="ignore", over="ignore"):
        lse = end_of(w) + np.log(np.exp(w.normaliser - end_of(w)) + more)
    return replace(right, lse=np.where(np.isfinite(right.lse), based(w, lse), right.lse))
