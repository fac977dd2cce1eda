"""The operator Attention of ONNX (opset 25), answered by the definition; nothing of ONNX is imported."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.conventions._words import LIBRARY, NONE, additive, batched, has, like, minus_one, sides, some, sources, two
from refattn.engines import Unsupported

OPERATOR = Convention(rows="top-left", window_rows="top-left")
CACHE = Convention()

Floats = NDArray[np.float64]


class Outputs(NamedTuple):
    """What the operator returns, without qk_matmul_output."""

    Y: Floats
    present_key: Any
    present_value: Any


def Attention(  # noqa: N802
    Q: ArrayLike,  # noqa: N803
    K: ArrayLike,  # noqa: N803
    V: ArrayLike,  # noqa: N803
    attn_mask: ArrayLike | None = None,
    past_key: ArrayLike | None = None,
    past_value: ArrayLike | None = None,
    nonpad_kv_seqlen: ArrayLike | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> Outputs:
    """Return what the operator Attention means: Y (B, H, T, E), or (B, T, H·E) where Q is (B, T, H·D).

    Without a cache, causal and windows are top-left. With `past_key`, or with `nonpad_kv_seqlen`, the rows stand at the
    end of the keys that exist. A mask of booleans keeps where it is True; one with fewer columns than keys hides the
    others.

    Examples
    --------
    >>> x = np.ones((1, 1, 2, 1))
    >>> Attention(x, x, x, is_causal=1).Y.shape
    (1, 1, 2, 1)
    """
    if scale is not None and scale < 0:
        raise ValueError(f"scale is {scale}; expected no negative number: the operator takes its root")
    if (past_key is None) != (past_value is None):
        raise ValueError("past_key or past_value is given alone; expected both or neither")
    if nonpad_kv_seqlen is not None and past_key is not None:
        raise ValueError("nonpad_kv_seqlen and past_key are both given; expected one of the two")
    flat = np.ndim(Q) == 3
    q, k, v = np.asarray(Q), np.asarray(K), np.asarray(V)
    if flat:
        if q_num_heads is None or kv_num_heads is None:
            raise ValueError("q_num_heads or kv_num_heads is missing; expected both where Q has 3 axes")
        q, k, v = (_split(x, n) for x, n in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads)))
    if past_key is not None and past_value is not None:
        k, v = (np.concatenate(pair, axis=2) for pair in ((past_key, k), (past_value, v)))
    mask = None if attn_mask is None else np.asarray(attn_mask)
    how: dict[str, Any] = {}
    if mask is not None:
        short = [(0, 0)] * (mask.ndim - 1) + [(0, k.shape[2] - mask.shape[-1])]
        boolean = mask.dtype == np.bool_
        how = {
            "mask" if boolean else "bias": np.pad(mask, short, constant_values=False if boolean else -np.inf),
        }
    call = Call(
        q=q,
        k=k,
        v=v,
        causal=bool(is_causal),
        window=sides(left_window_size, right_window_size),
        scale=scale,
        softcap=softcap or None,
        lengths=nonpad_kv_seqlen,
        **how,
    )
    o = call.under(OPERATOR if past_key is None and nonpad_kv_seqlen is None else CACHE).answer().o
    return Outputs(o.swapaxes(1, 2).reshape(*o.shape[:1], o.shape[2], -1) if flat else o, k, v)


def _split(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _write(call: Call) -> Written:
    if call.lengths is not None:
        raise Unsupported("onnx without a cache has no argument for lengths")
    return _written(call)


def _write_cache(call: Call) -> Written:
    written = _written(call)
    lengths = np.full(len(written.args[0]), call.sizes[1]) if call.lengths is None else np.asarray(call.lengths)
    return written._replace(kwargs={**written.kwargs, "nonpad_kv_seqlen": lengths.astype(np.int64)})


def _written(call: Call) -> Written:
    has("onnx", call, "causal", "window", "mask", "bias", "softcap", "lengths")
    if call.scale is not None and call.scale < 0:
        raise Unsupported("onnx takes the root of the scale")
    left, right = minus_one(call)
    kwargs = some(
        attn_mask=call.mask if call.bias is None else additive(call, -np.inf),
        is_causal=int(call.causal) or None,
        scale=call.scale,
        softcap=call.softcap,
        left_window_size=None if left < 0 else left,
        right_window_size=None if right < 0 else right,
    )
    return Written(batched("onnx", call), kwargs)


def _read(returned: Any, call: Call) -> Returned:
    return like(call, two(returned)[0])


PROFILES = {
    name: Profile(
        name=name,
        function=Attention,
        convention=convention,
        write=write,
        read=_read,
        framework="numpy",
        sources=sources(LIBRARY, **dict.fromkeys(("alibi", "alibi_rows", "lse", "empty_lse", "sink"), NONE)),
    )
    for name, convention, write in (("onnx", OPERATOR, _write), ("onnx/cache", CACHE, _write_cache))
}
