"""Known classes of bugs, each as a change of what the definition is asked: what is seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, overload

import numpy as np

from refattn.conventions import Call, Convention
from refattn.testing._written import LN2, Bools, Floats, Outcome, Written, averaged, positions, window

W = TypeVar("W")
A = TypeVar("A")
B = TypeVar("B")
R = TypeVar("R")
TILES = (16, 32, 64, 128, 256)
"""Tile sizes that are tried."""
SCORES = (0.0, -1e4, -5e4, -65504.0, -1e5, -1e9, -1e30, float(np.finfo(np.float32).min))
"""Scores that are tried for what is hidden."""


@dataclass(frozen=True)
class Change:
    """One thing that a kernel may do otherwise.

    Parameters
    ----------
    kind
        The class of bugs.
    said
        What the kernel does, as the rest of a sentence that starts with "your kernel".
    make
        The changed problem, or what is answered; None where it does not apply.
    rank
        How much it assumes: 1 a named change; 2 one with a number that was fitted; 3 a coarser arithmetic.
    axis
        The axis of the convention, where it is another value of one.
    """

    kind: str
    said: str
    make: Callable[[Written], Written | Outcome | None]
    rank: int = 1
    axis: str | None = None


@overload
def given(a: A, make: Callable[[W, A], R], /) -> Callable[[W], R]: ...
@overload
def given(a: A, b: B, make: Callable[[W, A, B], R], /) -> Callable[[W], R]: ...
def given(*fixed: Any) -> Callable[[Any], Any]:
    """Return a change with numbers that are known by now."""
    *known, make = fixed
    return lambda w: make(w, *known)


AXES: dict[str, tuple[str, dict[str, str]]] = {
    "rows": (
        "causal alignment",
        {
            "bottom-right": "aligns rows to the bottom-right",
            "top-left": "aligns rows to the top-left: causal starts with row 0 at key 0",
        },
    ),
    "window_rows": (
        "window alignment",
        {
            "bottom-right": "aligns the window to the bottom-right",
            "top-left": "aligns the window to the top-left",
        },
    ),
    "alibi_rows": (
        "ALiBi",
        {
            "bottom-right": "counts ALiBi's distances from the bottom-right",
            "top-left": "counts ALiBi's distances from the top-left",
        },
    ),
    "window": (
        "window size",
        {
            "keys to the left": "keeps one key more in the window: its left number does not count the row's own key",
            "keys with its own": "keeps one key less in the window: its left number counts the row's own key",
        },
    ),
    "mask": (
        "mask polarity",
        {"keep": "sees where the mask is True", "drop": "sees where the mask is False"},
    ),
    "bias": (
        "bias",
        {
            "after the scale": "adds the bias after the scale",
            "before the scale": "adds the bias before the scale, so that it is scaled too",
        },
    ),
    "order": (
        "order",
        {
            "softcap, bias": "caps logits before the bias is added",
            "bias, softcap": "adds the bias before the softcap, so that it is capped too",
        },
    ),
    "alibi": (
        "ALiBi",
        {
            "signed distance": "multiplies ALiBi's slope with the signed distance",
            "absolute distance": "multiplies ALiBi's slope with the absolute distance",
            "key position": "multiplies ALiBi's slope with the key's position",
            "key position if causal": "multiplies ALiBi's slope with the key's position where it is causal",
        },
    ),
    "groups": (
        "heads",
        {
            "interleaved": "lets query head h read key head h // G",
            "tiled": "lets query head h read key head h mod Hk",
        },
    ),
    "empty": (
        "empty rows",
        {
            "zero": "answers 0 for a row that sees nothing",
            "NaN": "answers NaN for a row that sees nothing",
            "mean of v": "answers the mean of v for a row that sees nothing",
        },
    ),
    "empty_lse": (
        "empty rows",
        {
            "-inf": "gives a row that sees nothing the lse −∞",
            "+inf": "gives a row that sees nothing the lse +∞",
            "0": "gives a row that sees nothing the lse 0",
        },
    ),
    "lse": ("lse", {"nats": "gives lse in nats", "bits": "gives lse in log2"}),
    "sink": (
        "sink",
        {"counted": "counts the sink in lse", "not counted": "leaves the sink out of lse"},
    ),
}
"""By axis: the class of bugs, and what a kernel does that has a value there."""


def seeing(call: Call, convention: Convention) -> Iterator[Change]:
    """Yield changes of which pairs are seen."""
    j = np.arange(call.sizes[1])
    yield from _sources(call, convention)
    if call.causal:
        yield from _causal(call, convention)
    elif call.sizes[0] > 1:
        for rows in ("bottom-right", "top-left"):
            later = j <= positions(call, rows)
            said = f"is causal ({rows}), which was not asked"
            yield Change("causal ignored", said, given(later, lambda w, x: w.hiding(causal=x)))
    if call.window is not None:
        yield from _windows(call, convention)
    if call.mask is not None:
        yield from _masks()
        yield from rolled("mask", "mask broadcast", (-1, -2, -3, -4))
    if call.lengths is not None:
        ends: Any = np.asarray(call.lengths)[:, None, None, None]
        for said, x in (
            ("gives every batch the first one's length", ends[:1]),
            ("gives every batch the longest one's length", ends.max(keepdims=True)),
            ("sees one key after a batch's length", ends + 1),
            ("misses the last key of a batch's length", ends - 1),
        ):
            yield Change("lengths", said, given(x, lambda w, x: w.hiding(lengths=j < x)))
    if call.starts is not None:
        yield from _packed(call, convention)


def _sources(call: Call, convention: Convention) -> Iterator[Change]:
    """Yield what may be done to any source of masking: ignored, applied too late, or with a score instead of −∞."""
    words = {
        "lengths": "lengths",
        "causal": "causal ignored",
        "window": "window ignored",
        "mask": "mask ignored",
        "packing": "packing",
    }
    for source, kind in words.items():
        if _source_given(call, source):
            yield Change(kind, f"ignores {_name(source)}", given(source, lambda w, s: w.without(s)))
            late = f"applies {_name(source)} after the softmax: hidden keys count in the row sum"
            yield Change("mask order", late, given(source, lambda w, s: _late(w, s)))
            yield from _scores(source, _name(source))
    yield Change("mask order", "hides keys after the softmax: they count in the row sum", lambda w: _late(w, None))
    yield from _scores(None, "any mask")
    for t in TILES:
        if n := -call.sizes[1] % t:
            for score in SCORES[1:]:
                said = f"gives what any mask hides, and {n} keys that pad the last tile of {t}, the score {score:g}"
                yield Change("padding score", said, given(n, score, padded_at))


def _scores(source: str | None, name: str) -> Iterator[Change]:
    for score in SCORES:
        said = f"gives what {name} hides the score {score:g} instead of −∞"
        yield Change("padding score", said, given(source, score, lambda w, s, c: scored(w, s, lambda _: c)))
    for drop in (1.0, 10.0, 100.0, 1e3, 1e4):
        said = f"lowers what {name} hides by {drop:g} only"
        yield Change("padding score", said, given(source, drop, lambda w, s, c: scored(w, s, lambda x: x - c)))


def _name(source: str) -> str:
    return {"causal": "causal", "packing": "the bounds of packed sequences"}.get(source, f"the {source}")


def _source_given(call: Call, source: str) -> bool:
    return (
        bool(call.causal)
        if source == "causal"
        else getattr(call, {"packing": "starts"}.get(source, source)) is not None
    )


def _hidden_by(w: Written, source: str | None) -> Bools:
    if source is None:
        return ~w.seen
    return w.without(source).seen & ~w.seen if source in w.sight else np.zeros_like(w.seen)


def scored(w: Written, source: str | None, score: Callable[[Floats], Floats | float]) -> Written | None:
    """Return the problem with what a source hides at a score."""
    hidden = _hidden_by(w, source)
    if not hidden.any():
        return None
    w = replace(w, sight={"all": w.seen | hidden})
    with np.errstate(invalid="ignore"):
        s = np.where(hidden, score(w.logits), w.logits)
    return replace(w, own=s)


def _late(w: Written, source: str | None) -> Outcome | None:
    """Return what is answered where what a source hides counts in the row sum alone."""
    hidden = _hidden_by(w, source)
    if not hidden.any():
        return None
    whole = replace(w, sight={"all": w.seen | hidden})
    lse = whole.normaliser
    with np.errstate(invalid="ignore"):
        gain = np.where(np.isneginf(w.normaliser), 0.0, np.exp(w.normaliser - lse))
    return Outcome(averaged(w.masked, w.v, lse), based(w, lse), w, gain, whole)


def based(w: Written, lse: Floats) -> Floats:
    """Return lse in the convention's base."""
    return lse / LN2 if w.convention.lse == "bits" else lse


def _causal(call: Call, convention: Convention) -> Iterator[Change]:
    (T, S), p = call.sizes, positions(call, convention.rows)
    i, j = np.arange(T)[:, None], np.arange(S)
    for off in (-2, -1, 1, 2):
        said = f"lets a row see {off} key{'s' * (off > 1)} after its own"
        if off < 0:
            said = "does not let a row see its own key" if off == -1 else "hides a row's own key and the one before"
        yield Change("causal diagonal", said, given(j <= p + off, lambda w, x: w.hiding(causal=x)))
    yield Change("causal direction", "sees what comes after a row", lambda w: w.hiding(causal=j >= p))
    said = "aligns the last row to the end of all keys, whatever the lengths"
    yield Change("causal alignment", said, lambda w: w.hiding(causal=j <= i + S - T))
    yield Change("causal alignment", "aligns row 0 to key 0 of all", lambda w: w.hiding(causal=j <= i))
    heads, few = (np.shape(x)[-3] if np.ndim(x) > 2 else 1 for x in (call.q, call.k))
    if heads > few:
        group = heads // few
        said = "divides a row's index by the number of query heads in a group"
        yield Change("row positions", said, lambda w: w.hiding(causal=j <= p - i + i // group))
    for t in TILES:
        if t < max(S, T):
            said = f"decides causal by whole tiles of {t}"
            yield Change("causal diagonal", said, given(j // t <= p // t, lambda w, x: w.hiding(causal=x)))
            first = p[..., np.arange(T) // t * t, :]
            for more, which in (
                (0, "ends after the first row of"),
                (t, "reaches beyond the tile after the first row of"),
            ):
                said = f"skips a tile of {t} keys that {which} a tile of rows"
                kept = (j // t + 1) * t <= first + more
                yield Change("tile edges", said, given(kept, lambda w, x: w.hiding(tiles=x)))


def _windows(call: Call, convention: Convention) -> Iterator[Change]:
    assert call.window is not None
    left, right = call.window

    def other(kind: str, said: str, left: int | None, right: int | None) -> Change:
        x = window(call, convention, left, right)
        return Change(kind, said, lambda w: w.hiding(window=x))

    for off in (1, 2, -1, -2):
        word = f"{'one key' if abs(off) == 1 else 'two keys'} too {'many' if off > 0 else 'few'}"
        if left is not None:
            yield other("window size", f"keeps {word} on the window's left", left + off, right)
        if right is not None:
            yield other("window size", f"keeps {word} on the window's right", left, right + off)
    if left is not None:
        yield other("window ignored", "ignores the window on its left", None, right)
        yield other("window size", "takes the window's left for both sides", left, left)
        p, j = positions(call, convention.window_rows), np.arange(call.sizes[1])
        for length in {left, left + 1}:
            if length > 0:
                blocks = (j // length == p // length) & window(call, convention, None, right)
                said = f"cuts keys into blocks of {length} instead of a window that slides"
                yield Change("window shape", said, given(blocks, lambda w, x: w.hiding(window=x)))
    if right is not None:
        yield other("window ignored", "ignores the window on its right", left, None)
    for number in (-1, 0):
        if left is None or right is None:
            said = f"takes no limit of the window for the number {number}"
            yield other("window sentinel", said, *(number if x is None else x for x in (left, right)))


PICKS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("reads the first batch's {} in every batch", lambda x: x[:1] if x.ndim > 3 else x),
    ("reads the first head's {} in every head", lambda x: x[..., :1, :, :] if x.ndim > 2 else x),
    ("reads the first {} everywhere", lambda x: x[:1, :1] if x.ndim > 3 else x[:1] if x.ndim > 2 else x),
    ("reads row 0 of the {} in every row", lambda x: x[..., :1, :]),
    ("reads the {} transposed", lambda x: x.swapaxes(-1, -2) if x.shape[-1] == x.shape[-2] else x),
)
"""Ways to read one part of a mask or a bias everywhere."""


def _masks() -> Iterator[Change]:
    for words, pick in PICKS:
        said = words.format("mask")
        kind = "mask broadcast"
        yield Change(
            kind, said, given(pick, lambda w, f: w.hiding(mask=f(w.sight["mask"])) if "mask" in w.sight else None)
        )


def _packed(call: Call, convention: Convention) -> Iterator[Change]:
    assert call.starts is not None
    (T, S), (cq, ck) = call.sizes, (np.asarray(x) for x in call.starts)
    i, j = np.arange(T), np.arange(S)
    own = np.searchsorted(cq, i, "right")[:, None]
    near = [np.searchsorted(ck, x, "right") for x in (j, j - 1, j + 1)]
    yield Change(
        "packing",
        "ends a sequence's keys one key too late",
        lambda w: w.hiding(packing=(own == near[0]) | (own == near[1])),
    )
    yield Change(
        "packing",
        "starts a sequence's keys one key too early",
        lambda w: w.hiding(packing=(own == near[0]) | (own == near[2])),
    )
    yield Change("packing", "lets a sequence see those before it", lambda w: w.hiding(packing=own >= near[0]))
    if call.causal:
        for said, x in (
            ("counts causal over the whole packed array", j <= i[:, None]),
            ("counts causal from the end of the whole packed array", j <= i[:, None] + S - T),
        ):
            yield Change("packing", said, given(x, lambda w, x: w.hiding(causal=x)))


def padded_at(w: Written, n: int, score: float) -> Written:
    """Return the problem with what is hidden, and keys of zeros, at a score."""
    return replace(scored(w, None, lambda _: score) or w, pads=float(np.logaddexp(w.pads, math.log(n) + score)))


def rolled(name: str, kind: str, axes: tuple[int, ...]) -> Iterator[Change]:
    """Yield what reads each part of an array where its neighbour belongs."""
    along = {-1: "key", -2: "row", -3: "head", -4: "batch"}
    for axis in axes:
        for off, word in ((1, "before"), (-1, "after")):
            said = f"reads the {name} of the {along[axis]} {word} each one's own"
            yield Change(kind, said, given(axis, off, partial(_roll, name)))


def _roll(name: str, w: Written, axis: int, off: int) -> Written | None:
    if name == "sink":
        return None if w.sink is None else replace(w, sink=np.roll(w.sink, off, axis + 2))
    x: Any = w.bias if name == "bias" else w.sight.get("mask")
    if x is None or x.ndim < -axis or x.shape[axis] == 1:
        return None
    return replace(w, bias=np.roll(x, off, axis)) if name == "bias" else w.hiding(mask=np.roll(x, off, axis))
