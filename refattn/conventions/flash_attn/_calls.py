"""FlashAttention's arguments as calls, and calls as its arguments: (B, T, H, D), or packed (tokens, H, D)."""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.conventions._meaning import Call
from refattn.conventions._profile import Returned, Written
from refattn.conventions._words import batched, has, minus_one, packed, pages, sides, some, swapped, two
from refattn.conventions._words import paged as gathered
from refattn.engines import Unsupported

PAGE = 256


def padded(q: Any, k: Any, v: Any, window: tuple[int | None, int | None], softcap: float, **given: Any) -> Call:
    """Return a call of sequences of one length each."""
    return Call(q=swapped(q), k=swapped(k), v=swapped(v), window=sides(*window), softcap=softcap or None, **given)


def several(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, table: Any, window: tuple[int, int], softcap: float, **given: Any
) -> Call:
    """Return a call of packed sequences; with a table of pages, cu_k counts the keys that each one has."""
    starts = (np.asarray(cu_q, np.int64), np.asarray(cu_k, np.int64))
    if table is not None:
        counts = np.diff(starts[1])
        k, v = (np.concatenate([own[:n] for own, n in zip(gathered(x, table), counts, strict=True)]) for x in (k, v))
    return padded(q, k, v, window, softcap, starts=starts, **given)


def cached(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    seqlens: Any,
    index: Any,
    leftpad: Any,
    table: Any,
    window: tuple[int, int],
    softcap: float,
    **given: Any,
) -> Call:
    """Return a call of queries that stand at the end of what a cache holds; new keys are written into a copy of it."""
    keys, values = (np.asarray(x) if table is None else gathered(x, table) for x in (k_cache, v_cache))
    if index is not None:
        keys, values = keys[np.asarray(index)], values[np.asarray(index)]
    B, S = np.shape(q)[0], keys.shape[1]
    lengths = np.broadcast_to(S if seqlens is None else np.asarray(seqlens, np.int64), (B,))
    if (k is None) != (v is None):
        raise ValueError("k or v is given alone; expected both or neither")
    if k is not None:
        keys, values, new = keys.copy(), values.copy(), np.shape(k)[1]
        if seqlens is None or lengths.max(initial=0) + new > S:
            raise ValueError(f"cache_seqlens is {seqlens}; expected at most {S - new}, so that the cache holds k too")
        for b, start in enumerate(lengths):
            keys[b, start : start + new], values[b, start : start + new] = np.asarray(k)[b], np.asarray(v)[b]
        lengths = lengths + new
    if leftpad is not None:
        if given.get("slopes") is not None:
            raise ValueError("cache_leftpad and alibi_slopes are both given; expected one of the two")
        given["mask"] = (np.arange(S) >= np.asarray(leftpad)[:, None])[:, None, None]
    return padded(q, keys, values, window, softcap, lengths=lengths, **given)


def words(call: Call, *, none: int | None = -1) -> dict[str, Any]:
    """Return the arguments that all its functions share."""
    left, right = minus_one(call) if none == -1 else call.window or (None, None)
    return some(
        softmax_scale=call.scale,
        causal=call.causal or None,
        window_size=None if call.window is None else (left, right),
        softcap=call.softcap,
    )


def slopes(call: Call) -> dict[str, Any]:
    """Return ALiBi's slopes, (H,) or (B, H), as an argument."""
    if call.slopes is not None and np.ndim(call.slopes) > 2:
        raise Unsupported("flash_attn takes slopes (H,) or (B, H)")
    return some(alibi_slopes=call.slopes)


def write_padded(who: str, call: Call, *names: str) -> tuple[Any, ...]:
    """Return q, k and v."""
    has(who, call, "causal", "window", "softcap", *names)
    q, k, v = batched(who, call)
    return swapped(q), swapped(k), swapped(v)


def write_packed(who: str, call: Call, *names: str) -> tuple[Any, ...]:
    """Return q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k."""
    has(who, call, "causal", "window", "softcap", "starts", *names)
    q, k, v, cq, ck = packed(who, call)
    return q, k, v, cq, ck, int(np.diff(cq).max(initial=0)), int(np.diff(ck).max(initial=0))


def write_cached(who: str, call: Call, table: str, extra: dict[str, Any], *names: str) -> Written:
    """Return the call with its keys in pages, in an order of their own."""
    if call.slopes is not None and call.window is not None:
        raise Unsupported(f"{who} with ALiBi and a window: what lse means depends on the pages")
    q, k, v = write_padded(who, call, "lengths", *names)
    lengths = np.full(len(q), k.shape[1]) if call.lengths is None else np.asarray(call.lengths)
    (k_cache, where), (v_cache, _) = pages(k, PAGE), pages(v, PAGE)
    how = {"cache_seqlens": lengths.astype(np.int32), table: where, "return_softmax_lse": True}
    return Written((q, k_cache, v_cache), {**how, **words(call), **extra})


def read(returned: Any, call: Call) -> Returned:
    """Return o and lse, (..., H, T)."""
    o, lse = two(returned)
    lead = tuple(np.shape(call.q)[:-1])
    o = o.swapaxes(-3, -2).reshape((*lead, np.shape(call.v)[-1]))
    return Returned(o, None if lse is None else lse.reshape(lead))
