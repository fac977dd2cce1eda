"""What the files of this room share: how a library's words become those of a call, and what a library has none for."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

from refattn.conventions._meaning import AXES, Call, Floats
from refattn.conventions._profile import Returned
from refattn.engines import Unsupported

NONE = "has none"
"""The source of an axis that a library does not have."""
LIBRARY = "library"
"""The source of an axis on which the library itself was run."""


def sources(default: str, **own: str) -> dict[str, str]:
    """Return a source for every axis: one for all, and those of some.

    >>> sources("library", lse="has none")["lse"]
    'has none'
    """
    return {axis: own.get(axis, default) for axis in AXES()}


def swapped(x: Any) -> Any:
    """Return an array with heads and tokens swapped: (..., T, H, D) to (..., H, T, D) or back."""
    return np.swapaxes(np.asarray(x), -3, -2)


def sides(left: int | None, right: int | None) -> tuple[int | None, int | None] | None:
    """Return a call's window from numbers of which a negative one or None is no limit.

    >>> sides(-1, 0), sides(-1, -1)
    ((None, 0), None)
    """
    both = tuple(None if n is None or n < 0 else int(n) for n in (left, right))
    return None if both == (None, None) else (both[0], both[1])


def minus_one(call: Call) -> tuple[int, int]:
    """Return a call's window where −1 is no limit."""
    left, right = call.window or (None, None)
    return -1 if left is None else left, -1 if right is None else right


def no_dropout(name: str, p: float | None) -> None:
    """Refuse dropout: what is dropped is drawn by the library."""
    if p:
        raise ValueError(f"{name} is {p}; expected 0.0: what is dropped is drawn by the library")


def nothing(**given: Any) -> None:
    """Refuse arguments that are known and have no answer here."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is {type(value).__name__}; expected it to be left out: it has no answer here")


def has(who: str, call: Call, *names: str) -> None:
    """Refuse a call that asks for more than q, k, v, a scale and these.

    >>> x = np.ones((1, 1, 1))
    >>> has("torch", Call(q=x, k=x, v=x, causal=True), "causal")
    """
    for name in ("causal", "window", "mask", "bias", "slopes", "sink", "softcap", "lengths", "starts"):
        if name not in names and given(call, name):
            raise Unsupported(f"{who} has no argument for {name}")


def one_of(who: str, call: Call, *names: str) -> None:
    """Refuse a call that asks for two of these at once."""
    asked = [name for name in names if given(call, name)]
    if len(asked) > 1:
        raise Unsupported(f"{who} takes one of {' and '.join(asked)}")


def given(call: Call, name: str) -> bool:
    """Return whether a call asks for this."""
    return call.causal if name == "causal" else getattr(call, name) is not None


def some(**given: Any) -> dict[str, Any]:
    """Return the arguments that are not None."""
    return {name: value for name, value in given.items() if value is not None}


def batched(who: str, call: Call, *, grouped: bool = True, wide: bool = True) -> tuple[Any, Any, Any]:
    """Return q, k and v as (B, H, T, D), for libraries that take no other shape; `like` is the way back."""
    q, k, v = (np.asarray(x) for x in (call.q, call.k, call.v))
    if {q.ndim, k.ndim, v.ndim} not in ({3}, {4}):
        raise Unsupported(f"{who} takes arrays of four axes; q has {q.ndim}, k {k.ndim}, v {v.ndim}")
    q, k, v = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (q, k, v))
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise Unsupported(f"{who} takes one number of sequences; q, k and v have {[x.shape[0] for x in (q, k, v)]}")
    if k.shape[1] != v.shape[1] or (q.shape[1] != k.shape[1] and (not grouped or q.shape[1] % k.shape[1])):
        raise Unsupported(f"{who} takes no heads in numbers like {[x.shape[1] for x in (q, k, v)]}")
    if not wide and v.shape[-1] != q.shape[-1]:
        raise Unsupported(f"{who} takes values as wide as keys; they have {v.shape[-1]} and {q.shape[-1]}")
    return q, k, v


def packed(who: str, call: Call) -> tuple[Any, Any, Any, Any, Any]:
    """Return q, k and v as (tokens, H, D), and where sequences start, or refuse a call that is not packed."""
    if call.starts is None or np.ndim(call.q) != 3 or np.ndim(call.k) != 3 or np.ndim(call.v) != 3:
        raise Unsupported(f"{who} takes packed sequences of three axes, with starts")
    q, k, v = (swapped(x) for x in (call.q, call.k, call.v))
    queries, keys = (np.asarray(x, np.int32) for x in call.starts)
    return q, k, v, queries, keys


def like(call: Call, o: Any, lse: Any = None) -> Returned:
    """Return o (B, H, T, E) and lse (B, H, T) with the call's own leading axes."""
    lead = tuple(np.shape(call.q)[:-1])
    return Returned(o.reshape((*lead, np.shape(call.v)[-1])), None if lse is None else lse.reshape(lead))


def two(returned: Any) -> tuple[Any, Any]:
    """Return o and lse of what was returned, None for what was not."""
    parts = cast("tuple[Any, ...]", returned) if isinstance(returned, tuple) else (returned, None)
    return parts[0], parts[1]


def below(count: int, limits: Any) -> Any:
    """Return which of so many are below each limit, (..., count).

    >>> below(3, [1]).tolist()
    [[True, False, False]]
    """
    return np.arange(count) < np.asarray(limits, np.int64)[..., None]


def four(x: Any) -> Any:
    """Return a mask or bias with four axes, the first of length 1 where there were fewer."""
    return x if x is None else np.reshape(x, (1,) * (4 - np.ndim(x)) + np.shape(x))


def additive(call: Call, hidden: float) -> Any:
    """Return a call's mask (True keeps) and bias as one array to add, in q's dtype; None where it has neither."""
    if call.mask is None:
        return call.bias
    dtype = np.result_type(np.asarray(call.q) if call.bias is None else np.asarray(call.bias))
    return np.where(np.asarray(call.mask), 0.0 if call.bias is None else call.bias, hidden).astype(dtype)


def hides(bias: Any) -> bool:
    """Return whether a bias holds −inf."""
    return bias is not None and bool(np.isneginf(np.asarray(bias, np.float64)).any())


def paged(cache: Any, table: Any) -> Any:
    """Return the keys (B, S, H, D) that a table (B, n) of pages names in a cache (pages, size, H, D).

    >>> cache = np.arange(6.0).reshape(3, 2, 1, 1)
    >>> paged(cache, [[2, 0]])[0, :, 0, 0].tolist()
    [4.0, 5.0, 0.0, 1.0]
    """
    cache, table = np.asarray(cache), np.asarray(table)
    return cache[table].reshape(table.shape[0], table.shape[1] * cache.shape[1], *cache.shape[2:])


def pages(x: Any, size: int) -> tuple[Any, Any]:
    """Return keys (B, S, H, D) as pages, the last ones filled with zeros, and their table: the reverse of `paged`."""
    x = np.asarray(x)
    count = -(-x.shape[1] // size)
    filled = np.pad(x, ((0, 0), (0, count * size - x.shape[1]), (0, 0), (0, 0)))
    table = np.arange(x.shape[0] * count, dtype=np.int32).reshape(x.shape[0], count)[:, ::-1]
    cache = np.zeros((x.shape[0] * count, size, *x.shape[2:]), x.dtype)
    cache[table.ravel()] = filled.reshape(-1, size, *x.shape[2:])
    return cache, table


def alibi_slopes(heads: int) -> Floats:
    """Return ALiBi's slopes as libraries that take none choose them.

    A power of two n has 2^(−8i/n); other numbers of heads have those of the power below, and every other one of twice
    that power. Press, Smith and Lewis 2022, arXiv:2108.12409, their code.

    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    n = 2 ** math.floor(math.log2(heads))
    more = np.exp2(-4.0 / n * np.arange(1.0, 2 * (heads - n), 2))
    return np.concatenate([np.exp2(-8.0 / n * np.arange(1.0, 1 + n)), more])


def own_slopes(who: str, call: Call) -> bool:
    """Return whether a call has ALiBi with the library's own slopes; refuse others."""
    if call.slopes is None:
        return False
    heads = np.shape(call.q)[-3] if np.ndim(call.q) > 2 else 1
    if not np.array_equal(np.asarray(call.slopes), alibi_slopes(heads).astype(np.asarray(call.slopes).dtype)):
        raise Unsupported(f"{who} has ALiBi with its own slopes only")
    return True


def empties(call: Call, convention: Any) -> bool:
    """Return whether a row sees nothing because of a bias of −inf: libraries with a finite −inf answer their own."""
    return hides(call.bias) and bool(call.under(convention).empty.any())
