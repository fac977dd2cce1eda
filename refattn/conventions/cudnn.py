"""The operation sdpa of cuDNN's graphs (cudnn-frontend), answered by the definition; nothing of it is imported."""

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
    below,
    four,
    has,
    like,
    no_dropout,
    nothing,
    own_slopes,
    paged,
    some,
    sources,
    two,
)
from refattn.engines import Unsupported

TOP_LEFT = Convention(rows="top-left", window_rows="top-left", alibi_rows="top-left", window="keys with its own")
BOTTOM_RIGHT = Convention(alibi_rows="top-left", window="keys with its own")

Floats = NDArray[np.float64]


def sdpa(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    is_inference: bool | None = None,
    attn_scale: float | None = None,
    bias: ArrayLike | None = None,
    block_mask: ArrayLike | None = None,
    use_alibi_mask: bool = False,
    use_padding_mask: bool = False,
    seq_len_q: ArrayLike | None = None,
    seq_len_kv: ArrayLike | None = None,
    use_causal_mask: bool = False,
    use_causal_mask_bottom_right: bool = False,
    sliding_window_length: int | None = None,
    diagonal_alignment: str = "TOP_LEFT",
    diagonal_band_left_bound: int | None = None,
    diagonal_band_right_bound: int | None = None,
    dropout: object = None,
    rng_dump: object = None,
    paged_attention_k_table: ArrayLike | None = None,
    paged_attention_v_table: ArrayLike | None = None,
    paged_attention_max_seq_len_kv: int | None = None,
    compute_data_type: object = None,
    name: str = "",
    score_mod: object = None,
    generate_stats: bool | None = None,
    implementation: object = None,
    score_max: object = None,
    score_sum_exp: object = None,
    sink_token: ArrayLike | None = None,
    unfuse_fma: bool = False,
) -> tuple[Floats, Floats]:
    """Return what the operation sdpa means: o, (B, H, T, E), and its stats, lse (B, H, T, 1) with the sink.

    The scale is 1 unless given. The band's left bound counts the row's own key, its right bound does not, and both are
    counted along `diagonal_alignment`, ``"TOP_LEFT"`` or ``"BOTTOM_RIGHT"``. ALiBi has the library's slopes and counts
    rows from the first. The sink is (1, H, 1, 1). Rows after `seq_len_q` answer 0.

    Examples
    --------
    >>> x = np.ones((1, 1, 2, 1))
    >>> sdpa(x, x, x, diagonal_band_right_bound=0)[1].round(3).tolist()
    [[[[1.0], [1.693]]]]
    """
    no_dropout("dropout", None)
    nothing(dropout=dropout, rng_dump=rng_dump, block_mask=block_mask, score_mod=score_mod)
    nothing(use_causal_mask=use_causal_mask, use_causal_mask_bottom_right=use_causal_mask_bottom_right)
    nothing(sliding_window_length=sliding_window_length)
    _check.choice("diagonal_alignment", diagonal_alignment, ("TOP_LEFT", "BOTTOM_RIGHT"))
    if use_padding_mask != (seq_len_kv is not None):
        raise ValueError(f"seq_len_kv is {seq_len_kv}; expected it with use_padding_mask, and only then")
    if paged_attention_k_table is not None and paged_attention_v_table is not None:
        k = paged(np.swapaxes(k, 1, 2), _table(paged_attention_k_table)).swapaxes(1, 2)
        v = paged(np.swapaxes(v, 1, 2), _table(paged_attention_v_table)).swapaxes(1, 2)
    lengths = None if seq_len_kv is None else np.ravel(seq_len_kv).astype(np.int64)
    B, H, T, _ = np.shape(q)
    rows = np.full(B, T) if seq_len_q is None else np.ravel(seq_len_q).astype(np.int64)
    if diagonal_alignment == "BOTTOM_RIGHT" and (rows != T).any():
        raise ValueError(f"seq_len_q is {rows.tolist()}; expected q's T = {T} where rows stand bottom-right")
    call = Call(
        q=q,
        k=k,
        v=v,
        window=None
        if diagonal_band_left_bound is None and diagonal_band_right_bound is None
        else (diagonal_band_left_bound, diagonal_band_right_bound),
        bias=bias if not use_alibi_mask else None,
        slopes=alibi_slopes(H) if use_alibi_mask else None,
        sink=None if sink_token is None else np.reshape(sink_token, (1, H)),
        scale=1.0 if attn_scale is None else attn_scale,
        lengths=lengths,
    )
    if use_alibi_mask and bias is not None:
        raise ValueError("bias and use_alibi_mask are both given; expected one of the two")
    o, lse = call.under(TOP_LEFT if diagonal_alignment == "TOP_LEFT" else BOTTOM_RIGHT).answer()
    there = below(T, rows)[:, None, :, None]
    return np.where(there, o, 0.0), lse[..., None]


def _table(table: Any) -> Any:
    """Return a table (B, 1, n, 1) of pages as (B, n)."""
    return np.reshape(table, (np.shape(table)[0], -1))


def _write_top_left(call: Call) -> Written:
    return _write(call, "TOP_LEFT")


def _write_bottom_right(call: Call) -> Written:
    return _write(call, "BOTTOM_RIGHT")


def _write(call: Call, alignment: str) -> Written:
    has("cudnn", call, "causal", "window", "bias", "slopes", "sink", "lengths")
    q, k, v = batched("cudnn", call)
    left, right = call.window or (None, None)
    if left is not None and left < 1:
        raise Unsupported("cudnn takes a left bound of at least 1: it counts the row's own key")
    if call.sink is not None and np.ndim(call.sink) != 1:
        raise Unsupported("cudnn takes one sink a head")
    own = own_slopes("cudnn", call)
    lengths = None if call.lengths is None else np.asarray(call.lengths, np.int32).reshape(-1, 1, 1, 1)
    kwargs = some(
        attn_scale=q.shape[-1] ** -0.5 if call.scale is None else call.scale,
        bias=four(call.bias),
        use_alibi_mask=own or None,
        use_padding_mask=None if lengths is None else True,
        seq_len_q=None if lengths is None else np.full(lengths.shape, q.shape[2], np.int32),
        seq_len_kv=lengths,
        diagonal_alignment=alignment,
        diagonal_band_left_bound=left,
        diagonal_band_right_bound=0 if call.causal else right,
        sink_token=None if call.sink is None else np.reshape(call.sink, (1, -1, 1, 1)),
        generate_stats=True,
    )
    return Written((q, k, v), kwargs)


def _read(returned: Any, call: Call) -> Returned:
    return like(call, *two(returned))


_SOURCES = sources("test/python/sdpa/fp16_ref.py", mask=NONE, order=NONE, window="python/pygraph/sdpa.cpp")

PROFILES = {
    name: Profile(
        name=name,
        function=sdpa,
        convention=convention,
        write=write,
        read=_read,
        framework="torch",
        sources=_SOURCES,
    )
    for name, convention, write in (
        ("cudnn", TOP_LEFT, _write_top_left),
        ("cudnn/bottom-right", BOTTOM_RIGHT, _write_bottom_right),
    )
}
