"""FlashAttention 3's functions (``flash_attn_interface``), answered by the definition; arrays are (B, T, H, D)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Written
from refattn.conventions._words import NONE, nothing, sources, swapped
from refattn.conventions.flash_attn import _calls

FA3 = Convention()

Floats = NDArray[np.float64]


def flash_attn_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: ArrayLike | None = None,
    q_descale: ArrayLike | None = None,
    k_descale: ArrayLike | None = None,
    v_descale: ArrayLike | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Floats | tuple[Floats, Floats]:
    """Return what `flash_attn_interface.flash_attn_func` means, (B, T, H, E), and lse, (B, H, T).

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 1))
    >>> flash_attn_func(x, x, x, causal=True).shape
    (1, 2, 1, 1)
    """
    nothing(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None
    )
    call = _calls.padded(q, k, v, window_size, softcap, scale=softmax_scale, causal=causal)
    return _two(call, return_attn_probs)


def flash_attn_varlen_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: ArrayLike | None = None,
    seqused_k: ArrayLike | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: ArrayLike | None = None,
    q_descale: ArrayLike | None = None,
    k_descale: ArrayLike | None = None,
    v_descale: ArrayLike | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Floats | tuple[Floats, Floats]:
    """Return what `flash_attn_interface.flash_attn_varlen_func` means, (tokens, H, E), and lse, (H, tokens)."""
    nothing(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None
    )
    nothing(seqused_q=seqused_q, seqused_k=seqused_k)
    call = _calls.several(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, window_size, softcap, scale=softmax_scale, causal=causal
    )
    return _two(call, return_attn_probs)


def flash_attn_with_kvcache(
    q: ArrayLike,
    k_cache: ArrayLike,
    v_cache: ArrayLike,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    qv: ArrayLike | None = None,
    rotary_cos: ArrayLike | None = None,
    rotary_sin: ArrayLike | None = None,
    cache_seqlens: ArrayLike | None = None,
    cache_batch_idx: ArrayLike | None = None,
    cache_leftpad: ArrayLike | None = None,
    page_table: ArrayLike | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k_new: ArrayLike | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: ArrayLike | None = None,
    q_descale: ArrayLike | None = None,
    k_descale: ArrayLike | None = None,
    v_descale: ArrayLike | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: object = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Floats | tuple[Floats, Floats]:
    """Return what `flash_attn_interface.flash_attn_with_kvcache` means, (B, T, H, E), and lse, (B, H, T).

    The cache is (B, S, H, D), or pages (pages, size, H, D) with `page_table`, (B, n). New keys take their places after
    `cache_seqlens`; unlike the library, the caches that were passed stay as they are.
    """
    nothing(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None
    )
    nothing(rotary_cos=rotary_cos, rotary_sin=rotary_sin, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new)
    call = _calls.cached(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        page_table,
        window_size,
        softcap,
        scale=softmax_scale,
        causal=causal,
    )
    return _two(call, return_softmax_lse)


def _two(call: Call, everything: bool) -> Floats | tuple[Floats, Floats]:
    o, lse = call.under(FA3).answer()
    return (swapped(o), lse) if everything else swapped(o)


def _write(call: Call) -> Written:
    arrays = _calls.write_padded("flash_attn_func", call)
    return Written(arrays, {**_calls.words(call), "return_attn_probs": True})


def _write_varlen(call: Call) -> Written:
    arrays = _calls.write_packed("flash_attn_varlen_func", call)
    return Written(arrays, {**_calls.words(call), "return_attn_probs": True})


def _write_kvcache(call: Call) -> Written:
    return _calls.write_cached("flash_attn_with_kvcache", call, "page_table", {})


_SOURCES = sources(
    "hopper/mask.h",
    **dict.fromkeys(("mask", "bias", "order", "alibi", "alibi_rows", "sink"), NONE),
    groups="hopper/flash_attn_interface.py",
    **dict.fromkeys(("empty", "empty_lse", "lse"), "hopper/softmax.h"),
)


def _profile(variant: str, function: Any, write: Any) -> Profile:
    return Profile(
        name=f"flash_attn/{variant}",
        function=function,
        convention=FA3,
        write=write,
        read=_calls.read,
        framework="torch",
        sources=_SOURCES,
    )


PROFILES: dict[str, Profile] = {
    "flash_attn/fa3": _profile("fa3", flash_attn_func, _write),
    "flash_attn/fa3-varlen": _profile("fa3-varlen", flash_attn_varlen_func, _write_varlen),
    "flash_attn/fa3-kvcache": _profile("fa3-kvcache", flash_attn_with_kvcache, _write_kvcache),
}
