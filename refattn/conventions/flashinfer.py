"""FlashInfer's functions, answered by the definition; arrays are (tokens, H, D). Nothing of it is imported."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check
from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.conventions._words import (
    NONE,
    alibi_slopes,
    batched,
    has,
    like,
    nothing,
    one_of,
    own_slopes,
    packed,
    sides,
    some,
    sources,
    swapped,
    two,
)
from refattn.engines import Unsupported

FI = Convention(alibi_rows="top-left", lse="bits")

Floats = NDArray[np.float64]


def single_prefill_with_kv_cache(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    scale_q: ArrayLike | None = None,
    scale_k: ArrayLike | None = None,
    scale_v: ArrayLike | None = None,
    o_dtype: object = None,
    custom_mask: ArrayLike | None = None,
    packed_custom_mask: ArrayLike | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: object = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Floats | tuple[Floats, Floats]:
    """Return what `flashinfer.single_prefill_with_kv_cache` means, (T, H, E), and lse, (T, H), in bits.

    With a custom mask, which keeps where it is True, `causal` does nothing. ALiBi has the library's slopes, and counts
    rows from the first.

    Examples
    --------
    >>> x = np.ones((2, 1, 1))
    >>> single_prefill_with_kv_cache(x, x, x, causal=True, return_lse=True)[1].round(3).tolist()
    [[1.443], [2.443]]
    """
    nothing(scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, packed_custom_mask=packed_custom_mask)
    nothing(kv_cache_sf=kv_cache_sf, k_scale=k_scale, v_scale=v_scale, rope_scale=rope_scale, rope_theta=rope_theta)
    how = _options(np.shape(q)[1], pos_encoding_mode, sm_scale, window_left, logits_soft_cap)
    call = Call(
        q=swapped(q),
        k=_keys(k, kv_layout),
        v=_keys(v, kv_layout),
        causal=causal and custom_mask is None,
        mask=custom_mask,
        **how,
    )
    return _both(call, return_lse)


def single_decode_with_kv_cache(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Floats | tuple[Floats, Floats]:
    """Return what `flashinfer.single_decode_with_kv_cache` means: q is (H, D), o (H, E), lse (H,), in bits."""
    nothing(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, rope_scale=rope_scale, rope_theta=rope_theta)
    if pos_encoding_mode == "ALIBI":
        raise ValueError("pos_encoding_mode is 'ALIBI'; expected 'NONE': a decoded row's place is not checked")
    how = _options(np.shape(q)[0], pos_encoding_mode, sm_scale, window_left, logits_soft_cap)
    call = Call(q=np.asarray(q)[:, None, :], k=_keys(k, kv_layout), v=_keys(v, kv_layout), **how)
    o, lse = call.under(FI).answer()
    return (o[:, 0], lse[:, 0]) if return_lse else o[:, 0]


class BatchPrefillWithRaggedKVCacheWrapper:
    """What `flashinfer.BatchPrefillWithRaggedKVCacheWrapper` means: `plan`, then `run` with packed (tokens, H, D).

    Examples
    --------
    >>> x = np.ones((3, 1, 1))
    >>> wrapper = BatchPrefillWithRaggedKVCacheWrapper()
    >>> wrapper.plan([0, 1, 3], [0, 1, 3], 1, 1, 1, causal=True)
    >>> wrapper.run(x, x, x, return_lse=True)[1].round(3).tolist()
    [[1.443], [1.443], [2.443]]
    """

    def __init__(self, float_workspace_buffer: object = None, kv_layout: str = "NHD", **options: object) -> None:
        """Take the library's arguments, of which the layout means something."""
        if kv_layout != "NHD":
            raise ValueError(f"kv_layout is {kv_layout!r}; expected 'NHD' for ragged keys")
        self._planned: dict[str, Any] = {}

    def plan(
        self,
        qo_indptr: ArrayLike,
        kv_indptr: ArrayLike,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: ArrayLike | None = None,
        packed_custom_mask: ArrayLike | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        **options: object,
    ) -> None:
        """Take where sequences start and the options."""
        nothing(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
        self._planned = {
            "starts": (np.asarray(qo_indptr), np.asarray(kv_indptr)),
            "causal": causal,
            **_options(num_qo_heads, pos_encoding_mode, sm_scale, window_left, logits_soft_cap),
        }

    def run(
        self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, return_lse: bool = False, **options: object
    ) -> Floats | tuple[Floats, Floats]:
        """Return o, (tokens, H, E), and lse, (tokens, H), in bits."""
        return _both(Call(q=swapped(q), k=swapped(k), v=swapped(v), **self._planned), return_lse)


def ragged_prefill(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, qo_indptr: ArrayLike, kv_indptr: ArrayLike, **options: Any
) -> Floats | tuple[Floats, Floats]:
    """Plan and run a `BatchPrefillWithRaggedKVCacheWrapper` at once; returns lse too."""
    wrapper = BatchPrefillWithRaggedKVCacheWrapper()
    heads, few, width = np.shape(q)[1], np.shape(k)[1], np.shape(q)[2]
    wrapper.plan(qo_indptr, kv_indptr, heads, few, width, np.shape(v)[2], **options)
    return wrapper.run(q, k, v, return_lse=True)


def _keys(x: Any, layout: str) -> Any:
    return swapped(x) if _check.choice("kv_layout", layout, ("NHD", "HND")) == "NHD" else np.asarray(x)


def _options(heads: int, encoding: str, scale: Any, left: int, softcap: Any) -> dict[str, Any]:
    _check.choice("pos_encoding_mode", encoding, ("NONE", "ALIBI"))
    if encoding == "ALIBI" and softcap:
        raise ValueError("logits_soft_cap is given with ALIBI; expected one of the two: together they scale twice")
    slopes = alibi_slopes(heads) if encoding == "ALIBI" else None
    return {"slopes": slopes, "scale": scale, "window": sides(left, -1), "softcap": softcap or None}


def _both(call: Call, everything: bool) -> Floats | tuple[Floats, Floats]:
    o, lse = call.under(FI).answer()
    return (swapped(o), lse.swapaxes(-1, -2)) if everything else swapped(o)


def _words(who: str, call: Call) -> dict[str, Any]:
    if call.window is not None and call.window[1] is not None:
        raise Unsupported(f"{who} has no window to the right")
    one_of(who, call, "slopes", "softcap")
    return some(
        causal=call.causal or None,
        pos_encoding_mode="ALIBI" if own_slopes(who, call) else None,
        sm_scale=call.scale,
        window_left=None if call.window is None else call.window[0],
        logits_soft_cap=call.softcap,
    )


def _write(call: Call) -> Written:
    who = "single_prefill_with_kv_cache"
    has(who, call, "causal", "window", "mask", "slopes", "softcap")
    one_of(who, call, "causal", "mask")
    q, k, v = batched(who, call)
    mask = None if call.mask is None else np.asarray(call.mask)
    if len(q) != 1 or (mask is not None and mask.shape != mask.shape[-2:]):
        raise Unsupported(f"{who} takes one sequence, and one mask for all heads")
    return Written(
        (swapped(q[0]), swapped(k[0]), swapped(v[0])), {**_words(who, call), **some(custom_mask=mask, return_lse=True)}
    )


def _write_ragged(call: Call) -> Written:
    who = "the ragged wrapper"
    has(who, call, "causal", "window", "slopes", "softcap", "starts")
    q, k, v, cq, ck = packed(who, call)
    if call.slopes is not None:
        raise Unsupported(f"{who} with ALiBi: where its rows stand is not checked")
    return Written((q, k, v, cq, ck), _words(who, call))


def _read(returned: Any, call: Call) -> Returned:
    o, lse = two(returned)
    return like(call, o.swapaxes(-3, -2), None if lse is None else lse.swapaxes(-1, -2))


_VARIANTS = "include/flashinfer/attention/variants.cuh"
_SOURCES = sources(
    _VARIANTS,
    bias=NONE,
    order=NONE,
    sink=NONE,
    rows="flashinfer/prefill.py",
    mask="flashinfer/prefill.py",
    groups="include/flashinfer/attention/decode.cuh",
    **dict.fromkeys(("empty", "empty_lse", "lse"), "include/flashinfer/attention/state.cuh"),
)

PROFILES = {
    name: Profile(
        name=name,
        function=function,
        convention=FI,
        write=write,
        read=_read,
        framework="torch",
        sources=_SOURCES,
    )
    for name, function, write in (
        ("flashinfer", single_prefill_with_kv_cache, _write),
        ("flashinfer/ragged", ragged_prefill, _write_ragged),
    )
}
