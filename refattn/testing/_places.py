"""A call in a library's words and back: of what each number of the arguments is a copy, and so its gradient's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.conventions import Call, Profile
from refattn.testing._calling import leaves, mapped
from refattn.testing._outside import numpy_dtype

ARRAYS = ("q", "k", "v", "bias", "sink", "slopes")
DIFFERENTIATED = ("q", "k", "v", "bias", "sink")


def cast(call: Call, dtype: str) -> Call:
    """Return the call with its arrays in a dtype, rounded to nearest; slopes and sinks in float32 if that is wider.

    >>> x = np.ones((1, 1, 2, 2))
    >>> cast(Call(q=x, k=x, v=x), "float16").q.dtype
    dtype('float16')
    """
    own = numpy_dtype(dtype)
    few = own if own.itemsize >= 4 else np.dtype(np.float32)
    found: dict[str, Any] = {}
    for name in ARRAYS:
        x = getattr(call, name)
        if x is not None:
            with np.errstate(over="ignore"):
                found[name] = np.asarray(x).astype(few if name in ("sink", "slopes") else own)
    return replace(call, **found)


def sayable(profile: Profile, call: Call) -> Call | None:
    """Return the call, or one that asks much the same, in a form that a profile has words for; None where it has none.

    Some take one sequence without a batch, some sequences packed into one, some a sink always.
    """
    for form in _forms(call):
        try:
            profile.write(form)
        except ValueError:  # `Unsupported` is one, and so are things that exclude each other
            continue
        return form
    return None


def _forms(call: Call) -> Iterator[Call]:
    yield from _without_batch(call)
    if call.sink is None:
        yield from _without_batch(replace(call, sink=np.linspace(-1, 1, np.shape(call.q)[-3])))


def _without_batch(call: Call) -> Iterator[Call]:
    yield call
    if np.ndim(call.q) != 4 or not len(call.q) or call.lengths is not None:
        return
    lone = {name: x[0] for name in ("q", "k", "v", "mask", "bias") if np.ndim(x := getattr(call, name)) == 4}
    yield replace(call, **lone)
    if call.starts is None and call.mask is None and call.bias is None:
        (B, _, T, _), S = np.shape(call.q), np.shape(call.k)[-2]
        packed = {name: _packed(getattr(call, name)) for name in "qkv"}
        yield replace(call, **packed, starts=(T * np.arange(B + 1), S * np.arange(B + 1)))


def _packed(x: Any) -> Any:
    """Return (B, H, N, D) as (H, B·N, D)."""
    return np.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[3]) if x.size else np.zeros((x.shape[1], 0, x.shape[3]))


def cotangents(profile: Profile, call: Call, returned: Any, do: NDArray[Any]) -> tuple[Any, ...]:
    """Return the cotangent of each array that was returned, where that of o is `do`; None for those without one."""
    arrays = list(leaves(returned))
    ends = np.cumsum([0, *(x.size for x in arrays)])
    each: list[Any] = [
        np.arange(first + 1, last + 1, dtype=np.float64).reshape(x.shape) for first, last, x in _spans(ends, arrays)
    ]
    numbered = iter(each)
    places = np.asarray(profile.read(mapped(returned, lambda _: next(numbered)), call).o, np.int64)
    whole = np.zeros(ends[-1])
    whole[places.ravel() - 1] = np.asarray(do, np.float64).ravel()
    touched = np.zeros(ends[-1], np.bool_)
    touched[places.ravel() - 1] = True
    return tuple(
        whole[first:last].reshape(x.shape).astype(x.dtype) if touched[first:last].any() else None
        for first, last, x in _spans(ends, arrays)
    )


def gradients(profile: Profile, call: Call, found: Sequence[Any]) -> dict[str, NDArray[np.float64]]:
    """Return gradients by a call's names, from those of each array among the arguments, in order."""
    by_name: dict[str, NDArray[np.float64]] = {}
    for name in DIFFERENTIATED:
        x = getattr(call, name)
        if x is None:
            continue
        own = np.arange(1, np.size(x) + 1, dtype=np.float64).reshape(np.shape(x))
        zeros = {s: np.zeros(np.shape(y)) for s in ARRAYS if s != name and (y := getattr(call, s)) is not None}
        written = list(leaves(tuple(profile.write(replace(call, **zeros, **{name: own})))))
        total, some = np.zeros(np.size(x)), False
        for numbers, gradient in zip(written, found, strict=False):
            if gradient is None or numbers.dtype.kind != "f" or not numbers.any():
                continue
            with np.errstate(invalid="ignore"):
                inside = (numbers >= 1) & (numbers <= total.size)  # beside copies there may be masks, ±∞ or large
            places, some = np.where(inside, numbers, 0).astype(np.int64).ravel(), True
            np.add.at(total, places[places > 0] - 1, np.asarray(gradient, np.float64).ravel()[places > 0])
        if some:
            by_name[name] = total.reshape(np.shape(x))
    return by_name


def _spans(ends: Any, arrays: list[Any]) -> zip[tuple[Any, Any, Any]]:
    return zip(ends[:-1], ends[1:], arrays, strict=True)
