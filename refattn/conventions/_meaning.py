"""What libraries mean: every axis on which they disagree, once, and how a call translates to the definition.

A `Convention` names a value on each axis. A `Call` is what someone asks for, in nobody's words: arrays with heads
before tokens, and numbers that only a convention gives a meaning. `Call.under` joins the two to a `Meaning`, which is
answered by `refattn.softmax` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, masks, softmax
from refattn.bias import Alibi, Bias, Table
from refattn.masks import Mask

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

LOG2E = 1 / math.log(2)


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A value on each axis on which libraries disagree.

    Parameters
    ----------
    rows
        Where rows stand on the key axis for causal masks, and for what else is counted from a row's position: the last
        row at the last key, or row 0 at key 0.
    window_rows, alibi_rows
        The same for windows and for ALiBi's distances.
    window
        What the left number of a window counts: keys to the left of the row's own, or keys with it.
    mask
        What True means in a mask of booleans.
    bias
        Whether a bias is added after the scale, or before and so scaled too.
    order
        What comes first after the scale. ALiBi counts as a bias.
    alibi
        What a slope multiplies: j − p, −|j − p|, or j; or j where a row sees nothing after its position and has no
        limit on the left, and −|j − p| otherwise.
    groups
        Which key head query head h reads, of G query heads for each of Hk key heads: ⌊h / G⌋ or h mod Hk.
    empty, empty_lse
        What a row that sees nothing answers, without a sink. "any" is not judged.
    lse
        The logarithm's base: "nats" or "bits".
    sink
        Whether lse counts the sink.

    Examples
    --------
    >>> Convention(rows="top-left").rows
    'top-left'
    """

    rows: Literal["bottom-right", "top-left"] = "bottom-right"
    window_rows: Literal["bottom-right", "top-left"] = "bottom-right"
    alibi_rows: Literal["bottom-right", "top-left"] = "bottom-right"
    window: Literal["keys to the left", "keys with its own"] = "keys to the left"
    mask: Literal["keep", "drop"] = "keep"
    bias: Literal["after the scale", "before the scale"] = "after the scale"
    order: Literal["softcap, bias", "bias, softcap"] = "softcap, bias"
    alibi: Literal["signed distance", "absolute distance", "key position", "key position if causal"] = "signed distance"
    groups: Literal["interleaved", "tiled"] = "interleaved"
    empty: Literal["zero", "NaN", "mean of v", "any"] = "zero"
    empty_lse: Literal["-inf", "+inf", "0", "any"] = "-inf"
    lse: Literal["nats", "bits"] = "nats"
    sink: Literal["counted", "not counted"] = "counted"

    def __post_init__(self) -> None:
        """Refuse values that no axis has."""
        for axis, values in AXES().items():
            _check.choice(axis, getattr(self, axis), values)


def AXES() -> dict[str, tuple[str, ...]]:  # noqa: N802
    """Return the values of every axis."""
    hints = get_type_hints(Convention)
    return {field.name: get_args(hints[field.name]) for field in fields(Convention)}


def neighbours(convention: Convention) -> Iterator[tuple[str, str, Convention]]:
    """Yield (axis, value, convention) for every convention that differs on one axis.

    >>> len(list(neighbours(Convention())))
    17
    """
    for axis, values in AXES().items():
        for value in values:
            if value not in (getattr(convention, axis), "any"):
                yield axis, value, replace(convention, **{axis: value})


class Answer(NamedTuple):
    """The output (..., H, T, E) and the log-sum-exp (..., H, T)."""

    o: Floats
    lse: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A call of attention, in nobody's words.

    Parameters
    ----------
    q, k, v : (..., H, T, D), (..., Hk, S, D), (..., Hk, S, E)
        Heads before tokens; numbers of any kind that float64 holds.
    causal
        Whether a row sees nothing after its position.
    window
        Numbers for the left and for the right; None is no limit.
    mask : (..., T, S) of bool, optional
        Its polarity is the convention's.
    bias : (..., T, S), optional
        Added to logits; −inf means unseen.
    slopes : (..., H), optional
        ALiBi's.
    sink : (..., H), optional
        A logit in the normaliser without a value, in nats.
    scale, softcap
        None: 1/√D; no cap.
    lengths : (B,) of int, optional
        How many of the keys exist, by batch; the rows of bottom-right stand at the end of those.
    starts : ((N + 1,), (N + 1,)) of int, optional
        Packed sequences: where those of the queries and of the keys start, and the ends.

    Raises
    ------
    ValueError
        Things that exclude each other.
    """

    q: Any
    k: Any
    v: Any
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: Any = None
    bias: Any = None
    slopes: Any = None
    sink: Any = None
    scale: float | None = None
    softcap: float | None = None
    lengths: Any = None
    starts: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        """Check what belongs together."""
        q, k, _ = _check.qkv(self.q, self.k, self.v)
        if self.bias is not None and self.slopes is not None:
            raise ValueError("bias and slopes are both given; add slope × distance to the bias yourself")
        if self.lengths is not None and self.starts is not None:
            raise ValueError("lengths and starts are both given; sequences are padded or packed")
        if self.starts is not None:
            for name, x, total in zip(("queries", "keys"), self.starts, (q.shape[-2], k.shape[-2]), strict=True):
                own = np.asarray(x)
                if own.ndim != 1 or not len(own) or own[0] != 0 or own[-1] != total or (np.diff(own) < 0).any():
                    raise ValueError(f"starts of {name} is {own.tolist()}; expected to rise from 0 to {total}")
            if len(self.starts[0]) != len(self.starts[1]):
                raise ValueError("starts of queries and of keys differ in number")

    @property
    def sizes(self) -> tuple[int, int]:
        """T and S."""
        return np.shape(self.q)[-2], np.shape(self.k)[-2]

    def positions(self, rows: str) -> Ints:
        """Return where rows stand on the key axis, (..., T)."""
        T, S = self.sizes
        if self.starts is not None:
            cq, ck = (np.asarray(x, np.int64) for x in self.starts)
            own = np.repeat(np.arange(len(cq) - 1), np.diff(cq))
            shift = np.diff(ck) - np.diff(cq) if rows == "bottom-right" else np.zeros(len(cq) - 1, np.int64)
            return (np.arange(T) - cq[own]) + ck[own] + shift[own]
        if rows == "top-left":
            return np.arange(T)
        ends = np.asarray(S) if self.lengths is None else np.asarray(self.lengths, np.int64)[:, None, None]
        return np.arange(T) + (ends - T)

    def under(self, convention: Convention) -> Meaning:
        """Return what the call means under a convention.

        >>> x = np.ones((1, 2, 1))
        >>> Call(q=x, k=x, v=x, causal=True).under(Convention()).answer().lse.round(3).tolist()
        [[1.0, 1.693]]
        """
        return Meaning(self, convention)


@dataclass(frozen=True, eq=False)
class Meaning:
    """A call under a convention: the definition's arguments, and what its answer is called there."""

    call: Call
    convention: Convention

    @cached_property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `refattn.softmax.partial`, heads in the definition's order."""
        call, order = self.call, self._order
        bias = self._bias()
        sink = None if call.sink is None else np.asarray(call.sink)
        return {
            "bias": bias if order is None or isinstance(bias, Bias) or bias is None else _reorder(bias, order, -3),
            "sink": sink if order is None or sink is None else _reorder(sink, order, -1),
            "softcap": call.softcap,
            "order": self.convention.order,
            "mask": self._mask(),
            "scale": call.scale,
        }

    @cached_property
    def arrays(self) -> tuple[Any, Any, Any]:
        """The definition's q, k and v."""
        q = np.asarray(self.call.q)
        return q if self._order is None else _reorder(q, self._order, -3), self.call.k, self.call.v

    @cached_property
    def empty(self) -> Bools:
        """Which rows answer as the convention says of those that see nothing, (..., H, T); none with a sink."""
        q, k, _ = self.arrays
        few = softmax.partial(q[..., :1] * 0, np.zeros_like(k[..., :1]), np.zeros_like(k[..., :1]), **self._sight)
        return self.back(np.isneginf(few.lse) & (self.call.sink is None), -2)

    def answer(self) -> Answer:
        """Return what is right, in the convention's numbers: o and lse."""
        main, plain, uniform = self._parts(softmax.partial)
        how, empty = self.convention, self.empty
        o: Floats = self.back(main.o, -3)
        lse: Floats = self.back(plain.lse, -2)
        if how.lse == "bits":
            lse = lse * LOG2E
        if uniform is not None:
            o = np.where(empty[..., None], self.back(uniform.o, -3), o)
        elif how.empty == "NaN":
            o = np.where(empty[..., None], np.nan, o)
        if how.empty_lse in ("+inf", "0"):
            lse = np.where(empty, math.inf if how.empty_lse == "+inf" else 0.0, lse)
        return Answer(o, lse)

    def allowance(self, verb: Callable[..., Any]) -> Answer:
        """Return how far an answer may be off, where `verb` says so of the definition's (o, lse).

        Rows that see nothing answer exactly, unless with the mean of v.
        """
        main, plain, uniform = self._parts(verb)
        o: Floats = self.back(main.o, -3)
        lse: Floats = self.back(plain.lse, -2)
        if self.convention.lse == "bits":
            lse = lse * LOG2E
        if uniform is not None:
            o = np.where(self.empty[..., None], self.back(uniform.o, -3), o)
        return Answer(o, lse)

    def vjp(self, do: ArrayLike, dlse: ArrayLike | None = None) -> softmax.Gradients:
        """Return gradients of ⟨do, o⟩ + ⟨dlse, lse⟩ with respect to the call's q, k, v, bias and sink."""
        return self._gradients(softmax.vjp, do, dlse)

    def gradient_allowance(self, verb: Callable[..., Any], do: ArrayLike, dlse: ArrayLike | None = None) -> Any:
        """Return how far gradients may be off, where ``verb(do, q, k, v, …)`` says so of the definition's."""
        return self._gradients(verb, do, dlse)

    def back(self, x: Any, axis: int) -> Any:
        """Return something of the definition's query heads in the call's order."""
        if self._order is None or np.ndim(x) < -axis or np.shape(x)[axis] == 1:
            return x
        return np.take(x, np.argsort(self._order), axis=axis)

    def _parts(self, verb: Callable[..., Any]) -> tuple[Any, Any, Any]:
        q, k, v = self.arrays
        main = verb(q, k, v, **self.options)
        bare = self.call.sink is not None and self.convention.sink == "not counted"
        plain = verb(q, k, v, **{**self.options, "sink": None}) if bare else main
        uniform = None
        if self.convention.empty == "mean of v" and self.empty.any():
            uniform = verb(np.zeros_like(q), np.zeros_like(k), v)
        return main, plain, uniform

    def _gradients(self, verb: Callable[..., Any], do: ArrayLike, dlse: ArrayLike | None) -> Any:
        if self.call.sink is not None and dlse is not None and self.convention.sink == "not counted":
            raise ValueError("dlse is given; a gradient of an lse that does not count the sink is not defined here")
        order, (q, k, v) = self._order, self.arrays
        do = np.asarray(do, np.float64)
        if dlse is not None:
            dlse = np.asarray(dlse, np.float64) * (LOG2E if self.convention.lse == "bits" else 1.0)
        forward = [
            None if x is None else x if order is None else _reorder(x, order, a) for x, a in ((do, -3), (dlse, -2))
        ]
        out = verb(forward[0], q, k, v, dlse=forward[1], **self.options)
        out = out._replace(q=self.back(out.q, -3))
        if out.sink is not None:
            out = out._replace(sink=self.back(out.sink, -1))
        if out.bias is not None:
            factor = _check.scale(self.call.scale, q.shape[-1]) if self.convention.bias == "before the scale" else 1.0
            out = out._replace(bias=factor * self.back(out.bias, -3))
        if self.convention.empty == "mean of v" and self.empty.any():
            lone: Any = np.where(self.empty[..., None], do, 0.0)
            lone = lone if order is None else _reorder(lone, order, -3)
            out = out._replace(v=out.v + verb(lone, np.zeros_like(q), np.zeros_like(k), v).v)
        return out

    @cached_property
    def _order(self) -> Ints | None:
        """Which of the call's query heads the definition's h-th is; None where they are the same."""
        heads, few = (np.shape(x)[-3] if np.ndim(x) > 2 else 1 for x in (self.call.q, self.call.k))
        if self.convention.groups == "interleaved" or few in (1, heads) or heads % few:
            return None
        return np.arange(heads).reshape(heads // few, few).T.ravel()

    @cached_property
    def _sight(self) -> dict[str, Any]:
        """What decides which pairs are seen: the mask, and a bias for its −inf."""
        bias = self.options["bias"]
        table: Any = bias.array if isinstance(bias, Table) else None if isinstance(bias, Bias) else bias
        hidden = None if table is None else np.where(np.isneginf(np.asarray(table)), -np.inf, 0.0)
        return {"mask": self.options["mask"], "bias": hidden}

    def _mask(self) -> Mask | None:
        call, how = self.call, self.convention
        parts: list[Mask] = []
        if call.causal:
            parts.append(masks.causal().at(call.positions(how.rows)))
        if call.window is not None:
            left, right = call.window
            if left is not None and how.window == "keys with its own":
                left -= 1
            parts.append(masks.window(left, right).at(call.positions(how.window_rows)))
        if call.mask is not None:
            given = np.asarray(call.mask)
            given = given if self._order is None else _reorder(given, self._order, -3)
            parts.append(masks.dense(~given if how.mask == "drop" else given))
        if call.lengths is not None:
            parts.append(masks.lengths(np.asarray(call.lengths, np.int64)[:, None]))
        if call.starts is not None:
            parts.append(masks.segments(*(np.repeat(np.arange(len(x) - 1), np.diff(x)) for x in call.starts)))
        if not parts:
            return None
        whole = parts[0]
        for part in parts[1:]:
            whole = whole & part
        return whole

    def _form(self) -> str:
        """Return which form ALiBi takes here."""
        call, form = self.call, self.convention.alibi
        if form != "key position if causal":
            return form
        left, right = call.window or (None, None)
        ahead = not call.causal and right != 0
        most = call.sizes[1] if call.starts is None else int(np.diff(call.starts[1]).max(initial=0))
        return "absolute distance" if ahead or (left is not None and left < most) else "key position"

    def _bias(self) -> Any:
        call, how = self.call, self.convention
        if call.slopes is not None:
            slopes = np.asarray(call.slopes, np.float64)
            slopes = slopes if self._order is None else _reorder(slopes, self._order, -1)
            starts = np.zeros(1, np.int64) if call.starts is None else np.asarray(call.starts[1], np.int64)
            return Slopes(slopes, None, self._form(), call.positions(how.alibi_rows), starts)
        if call.bias is None or how.bias == "after the scale":
            return call.bias
        return np.asarray(call.bias, np.float64) * _check.scale(call.scale, np.shape(call.q)[-1])


@dataclass(frozen=True, eq=False)
class Slopes(Alibi):
    """ALiBi in any of the forms that libraries give it, of rows at these positions, (..., T).

    `starts` are where packed sequences of keys start: the form "key position" counts from there.
    """

    form: str = "signed distance"
    where: Ints = None  # pyright: ignore[reportAssignmentType]
    starts: Ints = None  # pyright: ignore[reportAssignmentType]

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return np.broadcast_shapes(self.slopes.shape, self.where.shape[:-1])

    def on(self, T: int, S: int) -> Slopes:
        """Bind to T rows and S keys."""
        _check.size("bias", self.where.shape[-1], T, "row positions", "q's T")
        return self

    def block(self, flat: int, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> Floats:
        """Return the numbers of one problem."""
        at = np.unravel_index(flat, self.lead)
        slope = np.broadcast_to(self.slopes, self.lead)[at]
        p = np.broadcast_to(self.where, (*self.lead, self.where.shape[-1]))[at][rows, None]
        if self.form == "key position":
            first = self.starts[np.searchsorted(self.starts, keys, side="right") - 1]
            return slope * np.broadcast_to((keys - first).astype(np.float64), (len(rows), len(keys)))
        distance = (keys - p).astype(np.float64)
        return slope * (distance if self.form == "signed distance" else -np.abs(distance))


def _reorder(x: Any, order: Ints, axis: int) -> Any:
    """Return an array with its heads in another order; one that has none, or one for all, as it is."""
    x = np.asarray(x)
    return x if x.ndim < -axis or x.shape[axis] == 1 else np.take(x, order, axis=axis)
