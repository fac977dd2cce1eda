"""JAX's attention, answered by the definition: same names, order and defaults; nothing of JAX is imported.

`dot_product_attention` takes (B, T, N, H), or (T, N, H); `pallas_tpu_flash_attention` takes heads before tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.conventions._words import (
    LIBRARY,
    NONE,
    batched,
    below,
    empties,
    four,
    has,
    like,
    some,
    sources,
    swapped,
    two,
)
from refattn.engines import Unsupported

NN = Convention(rows="top-left", window_rows="top-left", empty="mean of v", empty_lse="any")
PALLAS_TPU = Convention(rows="top-left", bias="before the scale", empty="mean of v", empty_lse="any")

Floats = NDArray[np.float64]


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Floats | tuple[Floats, Floats]:
    """Return what `jax.nn.dot_product_attention` means, (B, T, N, H); with `return_residual` also lse, (B, T, N).

    Causal and windows are top-left, whatever the lengths. A row that sees nothing answers the mean of v over all keys,
    those that do not exist among them; a row after its `query_seq_lengths` answers 0.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 1))
    >>> dot_product_attention(x, x, x, is_causal=True, return_residual=True)[1].round(3).tolist()
    [[[1.0], [1.693]]]
    """
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation is {implementation!r}; expected None or 'xla'")
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    seen: Any = None if mask is None else np.asarray(mask)
    rows: Any = None
    if query_seq_lengths is not None:
        rows = below(np.shape(query)[-3], query_seq_lengths)[:, None, :, None]
        seen = rows if seen is None else seen & rows
    call = Call(
        q=swapped(query),
        k=swapped(key),
        v=swapped(value),
        causal=is_causal,
        window=local_window_size,
        mask=seen,
        bias=bias,
        scale=scale,
        lengths=key_value_seq_lengths,
    )
    o, lse = call.under(NN).answer()
    if rows is not None:
        o = np.where(rows, o, 0.0)
    return (swapped(o), lse.swapaxes(-1, -2)) if return_residual else swapped(o)


class SegmentIds(NamedTuple):
    """Ids of queries (B, T) and of keys (B, S): those that are equal see each other."""

    q: Any
    kv: Any


def pallas_tpu_flash_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    ab: ArrayLike | None = None,
    segment_ids: SegmentIds | None = None,
    *,
    causal: bool = False,
    sm_scale: float = 1.0,
    block_sizes: object = None,
    debug: bool = False,
) -> Floats:
    """Return what `jax.experimental.pallas.ops.tpu.flash_attention.flash_attention` means: (B, H, T, D).

    The scale multiplies the bias `ab` too, and is 1 unless given. Causal is top-left.
    """
    mask = None
    if segment_ids is not None:
        mask = (np.asarray(segment_ids.q)[:, :, None] == np.asarray(segment_ids.kv)[:, None, :])[:, None]
    return Call(q=q, k=k, v=v, bias=ab, mask=mask, causal=causal, scale=sm_scale).under(PALLAS_TPU).answer().o


def _write(call: Call) -> Written:
    has("jax", call, "causal", "window", "mask", "bias", "lengths")
    q, k, v = batched("jax", call, wide=False)
    if empties(call, NN):
        raise Unsupported("jax answers a row whose bias is −inf with what else is masked in it")
    window = call.window
    if window is not None:
        T, S = call.sizes
        window = (T + S if window[0] is None else window[0], T + S if window[1] is None else window[1])
    return Written(
        (swapped(q), swapped(k), swapped(v)),
        some(
            bias=four(call.bias),
            mask=four(call.mask),
            scale=call.scale,
            is_causal=call.causal or None,
            key_value_seq_lengths=None if call.lengths is None else np.asarray(call.lengths, np.int32),
            local_window_size=window,
            return_residual=True,
        ),
    )


def _read(returned: Any, call: Call) -> Returned:
    o, lse = two(returned)
    return like(call, o.swapaxes(-3, -2), None if lse is None else lse.swapaxes(-1, -2))


def _write_tpu(call: Call) -> Written:
    has("jax's Pallas kernel", call, "causal", "bias")
    q, k, v = batched("jax's Pallas kernel", call, grouped=False, wide=False)
    if empties(call, PALLAS_TPU):
        raise Unsupported("jax's Pallas kernel answers NaN where a row's bias is −inf")
    ab = None if call.bias is None else np.broadcast_to(four(call.bias), (*q.shape[:3], k.shape[2])).copy()
    return Written(
        (q, k, v, *(() if ab is None else (ab,))),
        some(causal=call.causal or None, sm_scale=q.shape[-1] ** -0.5 if call.scale is None else call.scale),
    )


def _read_tpu(returned: Any, call: Call) -> Returned:
    return like(call, returned)


PROFILES = {
    "jax": Profile(
        name="jax",
        function=dot_product_attention,
        convention=NN,
        write=_write,
        read=_read,
        framework="jax",
        sources=sources(LIBRARY, **dict.fromkeys(("alibi", "alibi_rows", "order", "sink"), NONE)),
    ),
    "jax/pallas-tpu": Profile(
        name="jax/pallas-tpu",
        function=pallas_tpu_flash_attention,
        convention=PALLAS_TPU,
        write=_write_tpu,
        read=_read_tpu,
        framework="jax",
        sources=sources(
            NONE, **dict.fromkeys(("rows", "bias", "empty"), "jax/experimental/pallas/ops/tpu/flash_attention.py")
        ),
    ),
}
