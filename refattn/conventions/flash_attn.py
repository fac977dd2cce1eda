"""FlashAttention's functions, answered by the definition; arrays are (B, T, H, D). Nothing of it is imported."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.engines import Unsupported

FA2 = Convention(alibi="key position if causal", empty_lse="+inf")


def flash_attn_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64], None]:
    """Return what `flash_attn.flash_attn_func` means, (B, T, H, E); with `return_attn_probs` also lse, (B, H, T)."""
    call = _call(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    o, lse = call.under(FA2).answer()
    return (o.swapaxes(-3, -2), lse, None) if return_attn_probs else o.swapaxes(-3, -2)


def _call(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float,
    scale: Any,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    slopes: Any,
) -> Call:
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0.0: what is dropped is drawn by the library")
    q, k, v = (np.swapaxes(np.asarray(x), -3, -2) for x in (q, k, v))
    sides = tuple(None if n < 0 else n for n in window)
    return Call(
        q=q,
        k=k,
        v=v,
        causal=causal,
        window=None if sides == (None, None) else (sides[0], sides[1]),
        softcap=softcap or None,
        slopes=slopes,
        scale=scale,
    )


def _write(call: Call) -> Written:
    for name in ("mask", "bias", "sink", "lengths", "starts"):
        if getattr(call, name) is not None:
            raise Unsupported(f"flash_attn_func has no argument for {name}")
    if call.softcap is not None and call.slopes is not None:
        raise Unsupported("flash_attn_func takes softcap or alibi_slopes")
    kwargs: dict[str, Any] = {"causal": call.causal, "return_attn_probs": True}
    if call.window is not None:
        kwargs["window_size"] = tuple(-1 if n is None else n for n in call.window)
    if call.softcap is not None:
        kwargs["softcap"] = call.softcap
    if call.slopes is not None:
        kwargs["alibi_slopes"] = call.slopes
    if call.scale is not None:
        kwargs["softmax_scale"] = call.scale
    return Written(tuple(np.swapaxes(x, -3, -2) for x in (call.q, call.k, call.v)), kwargs)


def _read(returned: Any, call: Call) -> Returned:
    parts: Any = returned
    o, lse = (parts[0], parts[1]) if isinstance(returned, tuple) else (parts, None)
    return Returned(o.swapaxes(-3, -2), lse)


PROFILES = {
    "flash_attn/fa2": Profile(
        name="flash_attn/fa2", function=flash_attn_func, convention=FA2, write=_write, read=_read, framework="torch"
    )
}
