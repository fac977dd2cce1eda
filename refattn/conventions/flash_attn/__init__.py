"""FlashAttention's functions, answered by the definition; arrays are (B, T, H, D). Nothing of it is imported.

Here are those of FlashAttention 2. `fa3` has FlashAttention 3's (``flash_attn_interface``) and `fa4` those of
``flash_attn.cute``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Written
from refattn.conventions._words import NONE, no_dropout, nothing, sources, swapped
from refattn.conventions.flash_attn import _calls, fa3, fa4

FA2 = Convention(alibi="key position if causal", empty_lse="+inf")
KVCACHE = Convention(alibi="key position if causal", empty_lse="any")

Floats = NDArray[np.float64]


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
) -> Floats | tuple[Floats, Floats, None]:
    """Return what `flash_attn.flash_attn_func` means, (B, T, H, E); with `return_attn_probs` also lse, (B, H, T).

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 1))
    >>> flash_attn_func(x, x, x, causal=True, return_attn_probs=True)[1].round(3).tolist()
    [[[1.0, 1.693]]]
    """
    no_dropout("dropout_p", dropout_p)
    call = _calls.padded(q, k, v, window_size, softcap, scale=softmax_scale, causal=causal, slopes=alibi_slopes)
    return _three(call, return_attn_probs)


def flash_attn_varlen_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: ArrayLike | None = None,
) -> Floats | tuple[Floats, Floats, None]:
    """Return what `flash_attn.flash_attn_varlen_func` means, (tokens, H, E); with probs also lse, (H, tokens).

    With `block_table`, (sequences, n), k and v are pages, (pages, size, H, D).
    """
    no_dropout("dropout_p", dropout_p)
    call = _calls.several(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        block_table,
        window_size,
        softcap,
        scale=softmax_scale,
        causal=causal,
        slopes=alibi_slopes,
    )
    return _three(call, return_attn_probs)


def flash_attn_with_kvcache(
    q: ArrayLike,
    k_cache: ArrayLike,
    v_cache: ArrayLike,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    rotary_cos: ArrayLike | None = None,
    rotary_sin: ArrayLike | None = None,
    cache_seqlens: ArrayLike | None = None,
    cache_batch_idx: ArrayLike | None = None,
    cache_leftpad: ArrayLike | None = None,
    block_table: ArrayLike | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: ArrayLike | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Floats | tuple[Floats, Floats]:
    """Return what `flash_attn.flash_attn_with_kvcache` means, (B, T, H, E), and lse, (B, H, T).

    The cache is (B, S, H, D), or pages (pages, size, H, D) with `block_table`, (B, n). New keys take their places
    after `cache_seqlens`; unlike the library, the caches that were passed stay as they are.
    """
    nothing(rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    call = _calls.cached(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        window_size,
        softcap,
        scale=softmax_scale,
        causal=causal,
        slopes=alibi_slopes,
    )
    o, lse = call.under(KVCACHE).answer()
    return (swapped(o), lse) if return_softmax_lse else swapped(o)


def _three(call: Call, everything: bool) -> Floats | tuple[Floats, Floats, None]:
    o, lse = call.under(FA2).answer()
    return (swapped(o), lse, None) if everything else swapped(o)


def _write(call: Call) -> Written:
    arrays = _calls.write_padded("flash_attn_func", call, "slopes")
    return Written(arrays, {**_calls.words(call), **_calls.slopes(call), "return_attn_probs": True})


def _write_varlen(call: Call) -> Written:
    arrays = _calls.write_packed("flash_attn_varlen_func", call, "slopes")
    return Written(arrays, {**_calls.words(call), **_calls.slopes(call), "return_attn_probs": True})


def _write_kvcache(call: Call) -> Written:
    extra = _calls.slopes(call)
    return _calls.write_cached("flash_attn_with_kvcache", call, "block_table", extra, "slopes")


_SOURCE = "csrc/flash_attn/src/mask.h"
_SOURCES = sources(
    _SOURCE,
    mask=NONE,
    bias=NONE,
    sink=NONE,
    alibi="csrc/flash_attn/src/alibi.h",
    alibi_rows="csrc/flash_attn/src/alibi.h",
    order="csrc/flash_attn/src/flash_fwd_kernel.h",
    groups="flash_attn/flash_attn_interface.py",
    **dict.fromkeys(("empty", "empty_lse", "lse"), "csrc/flash_attn/src/softmax.h"),
)


def _profile(variant: str, function: Any, write: Any, convention: Convention) -> Profile:
    return Profile(
        name=f"flash_attn/{variant}",
        function=function,
        convention=convention,
        write=write,
        read=_calls.read,
        framework="torch",
        sources=_SOURCES,
    )


PROFILES: dict[str, Profile] = {
    "flash_attn/fa2": _profile("fa2", flash_attn_func, _write, FA2),
    "flash_attn/fa2-varlen": _profile("fa2-varlen", flash_attn_varlen_func, _write_varlen, FA2),
    "flash_attn/fa2-kvcache": _profile("fa2-kvcache", flash_attn_with_kvcache, _write_kvcache, KVCACHE),
    **fa3.PROFILES,
    **fa4.PROFILES,
}
