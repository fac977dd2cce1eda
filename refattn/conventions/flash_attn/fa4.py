"""The function of ``flash_attn.cute`` (FlashAttention 4), answered by the definition; arrays are (B, T, H, D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Written
from refattn.conventions._words import NONE, nothing, some, sources, swapped
from refattn.conventions.flash_attn import _calls
from refattn.engines import Unsupported

FA4 = Convention()

Floats = NDArray[np.float64]


def flash_attn_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    qv: ArrayLike | None = None,
    gather_kv_indices: ArrayLike | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: ArrayLike | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[Any] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    block_sparse_tensors: object = None,
    block_sparse_tensors_bwd: object = None,
    return_lse: bool = False,
) -> tuple[Floats, Floats | None]:
    """Return what `flash_attn.cute.flash_attn_func` means: (B, T, H, E), and lse, (B, H, T), or None.

    The sink is one logit a head, which lse counts.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 1))
    >>> flash_attn_func(x, x, x, causal=True, learnable_sink=[1.0], return_lse=True)[1].round(3).tolist()
    [[[1.693, 2.099]]]
    """
    nothing(qv=qv, gather_kv_indices=gather_kv_indices, score_mod=score_mod, mask_mod=mask_mod)
    nothing(block_sparse_tensors=block_sparse_tensors)
    call = _calls.padded(q, k, v, window_size, softcap, scale=softmax_scale, causal=causal, sink=learnable_sink)
    o, lse = call.under(FA4).answer()
    return swapped(o), lse if return_lse else None


def _write(call: Call) -> Written:
    arrays = _calls.write_padded("flash_attn.cute", call, "sink")
    if call.sink is not None and np.ndim(call.sink) != 1:
        raise Unsupported("flash_attn.cute takes one sink a head")
    extra = some(learnable_sink=call.sink, return_lse=True)
    return Written(arrays, {**_calls.words(call, none=None), **extra})


PROFILES: dict[str, Profile] = {
    "flash_attn/fa4": Profile(
        name="flash_attn/fa4",
        function=flash_attn_func,
        convention=FA4,
        write=_write,
        read=_calls.read,
        framework="torch",
        sources=sources(
            "flash_attn/cute/mask.py",
            **dict.fromkeys(("mask", "bias", "order", "alibi", "alibi_rows"), NONE),
            groups="flash_attn/cute/interface.py",
            **dict.fromkeys(("empty", "empty_lse", "lse", "sink"), "flash_attn/cute/softmax.py"),
        ),
    )
}
