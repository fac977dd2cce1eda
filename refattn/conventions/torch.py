"""PyTorch's attention, answered by the definition: same names, order and defaults; nothing of PyTorch is imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check
from refattn.conventions._meaning import Answer, Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.conventions._words import LIBRARY, NONE, four, has, no_dropout, one_of, some, sources, two
from refattn.engines import Unsupported

SDPA = Convention(rows="top-left")
CPU = Convention(rows="top-left", empty_lse="0")
FLASH = Convention(empty_lse="+inf")
FLEX = Convention()

Floats = NDArray[np.float64]


def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Floats:
    """Return what `torch.nn.functional.scaled_dot_product_attention` means: (..., H, T, E).

    A mask of booleans keeps where it is True, any other is added to the logits. Causal is top-left. A row that sees
    nothing answers 0.

    Examples
    --------
    >>> x = np.ones((1, 2, 1))
    >>> scaled_dot_product_attention(x, x, x, is_causal=True).shape
    (1, 2, 1)
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask is given and is_causal is True; expected one of the two")
    heads, few = (np.shape(x)[-3] if np.ndim(x) > 2 else 1 for x in (query, key))
    if not enable_gqa and heads != few and 1 not in (heads, few):
        raise ValueError(f"key has {few} heads; expected {heads}, as query has, where enable_gqa is False")
    mask = None if attn_mask is None else np.asarray(attn_mask)
    how: dict[str, Any] = {} if mask is None else {"mask" if mask.dtype == np.bool_ else "bias": mask}
    return _answer(query, key, value, dropout_p, SDPA, causal=is_causal, scale=scale, **how).o


def _scaled_dot_product_flash_attention_for_cpu(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: ArrayLike | None = None,
    scale: float | None = None,
) -> Answer:
    """Return what `torch.ops.aten._scaled_dot_product_flash_attention_for_cpu` means: o, and lse (B, H, T).

    The mask is added to the logits, booleans are none. A row that sees nothing answers 0, and its lse is 0.
    """
    mask = None if attn_mask is None else np.asarray(attn_mask)
    if mask is not None and mask.dtype == np.bool_:
        raise TypeError("attn_mask is of booleans; expected numbers to add to the logits")
    return _answer(query, key, value, dropout_p, CPU, causal=is_causal, bias=mask, scale=scale)


def _scaled_dot_product_flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Answer:
    """Return the first two of what `torch.ops.aten._scaled_dot_product_flash_attention` (CUDA) means: o and lse.

    Causal is bottom-right here, unlike everywhere else in PyTorch.
    """
    return _answer(query, key, value, dropout_p, FLASH, causal=is_causal, scale=scale)


def flex_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: object = None,
) -> Floats | tuple[Floats, Floats]:
    """Return what `torch.nn.attention.flex_attention.flex_attention` means: (B, H, T, E), and lse (B, H, T).

    Parameters
    ----------
    score_mod
        ``score_mod(score, b, h, q_idx, kv_idx)``, called once with arrays that broadcast to (B, H, T, S).
    block_mask
        ``mask_mod(b, h, q_idx, kv_idx)``, called once likewise, or an object whose `mask_mod` it is.

    Examples
    --------
    >>> x = np.ones((1, 1, 2, 1))
    >>> flex_attention(x, x, x, block_mask=lambda b, h, i, j: i >= j, return_lse=True)[1].round(3).tolist()
    [[[1.0, 1.693]]]
    """
    q, k, _ = (np.asarray(x, np.float64) for x in (query, key, value))
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"query has {q.ndim} axes and key {k.ndim}; expected (B, H, T, D) and (B, Hk, S, D)")
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(f"key has {k.shape[1]} heads; expected {q.shape[1]}, as query has, where enable_gqa is False")
    grid = np.ogrid[: q.shape[0], : q.shape[1], : q.shape[2], : k.shape[2]]
    call = Call(q=query, k=key, v=value, scale=scale)
    if block_mask is not None:
        call = replace(call, mask=np.asarray(getattr(block_mask, "mask_mod", block_mask)(*grid), np.bool_))
    if score_mod is not None:
        keys = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
        score = (q @ keys.swapaxes(-1, -2)) * _check.scale(scale, q.shape[-1])
        call = replace(call, bias=np.asarray(score_mod(score, *grid), np.float64) - score)
    o, lse = call.under(FLEX).answer()
    return (o, lse) if return_lse else o


def _answer(query: Any, key: Any, value: Any, dropout_p: float, how: Convention, **given: Any) -> Answer:
    no_dropout("dropout_p", dropout_p)
    return Call(q=query, k=key, v=value, **given).under(how).answer()


def _write(call: Call) -> Written:
    has("torch", call, "causal", "mask", "bias")
    one_of("torch", call, "causal", "mask", "bias")
    kwargs = some(
        is_causal=call.causal or None, attn_mask=call.mask if call.bias is None else call.bias, scale=call.scale
    )
    if _grouped(call):
        kwargs["enable_gqa"] = True
    return Written((call.q, call.k, call.v), kwargs)


def _write_cpu(call: Call) -> Written:
    has("the operation", call, "causal", "mask", "bias")
    one_of("the operation", call, "causal", "mask", "bias")
    if np.ndim(call.q) != 4 or _grouped(call) or np.shape(call.q)[-1] != np.shape(call.v)[-1]:
        raise Unsupported("the operation takes four axes, as many key heads as query heads, values as wide as keys")
    mask = call.bias
    if call.mask is not None:
        mask = np.where(call.mask, 0.0, -np.inf).astype(np.asarray(call.q).dtype)
    return Written(
        (call.q, call.k, call.v), some(is_causal=call.causal or None, attn_mask=four(mask), scale=call.scale)
    )


def _write_flash(call: Call) -> Written:
    has("the operation", call, "causal")
    if np.ndim(call.q) != 4:
        raise Unsupported("the operation takes four axes")
    return Written((call.q, call.k, call.v), some(is_causal=call.causal or None, scale=call.scale))


def _write_flex(call: Call) -> Written:
    has("flex_attention, without arrays in its functions,", call, "causal", "window")
    if np.ndim(call.q) != 4:
        raise Unsupported("flex_attention takes four axes")
    kwargs = some(scale=call.scale, enable_gqa=_grouped(call) or None, return_lse=True)
    if call.causal or call.window is not None:
        left, right = call.window or (None, None)
        right = 0 if call.causal else right
        kwargs["block_mask"] = _Band(call.sizes[1] - call.sizes[0], left, right)
    return Written((call.q, call.k, call.v), kwargs)


@dataclass(frozen=True)
class _Band:
    """A mask_mod: keys from so many to the left of a row's position to so many to its right."""

    shift: int
    left: int | None
    right: int | None

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        ahead = kv_idx - (q_idx + self.shift)
        return (ahead >= (-math.inf if self.left is None else -self.left)) & (
            ahead <= (math.inf if self.right is None else self.right)
        )


def _grouped(call: Call) -> bool:
    return np.ndim(call.q) > 2 and np.shape(call.q)[-3] != np.shape(call.k)[-3]


def _read(returned: Any, call: Call) -> Returned:
    return Returned(*two(returned))


_MASKS = {"window_rows": NONE, "window": NONE, "alibi": NONE, "alibi_rows": NONE, "order": NONE, "sink": NONE}
_BIAS_PY = "torch/nn/attention/bias.py"

PROFILES = {
    "torch": Profile(
        name="torch",
        function=scaled_dot_product_attention,
        convention=SDPA,
        write=_write,
        read=_read,
        framework="torch",
        sources=sources(LIBRARY, **_MASKS, lse=NONE, empty_lse=NONE),
    ),
    "torch/flash-cpu": Profile(
        name="torch/flash-cpu",
        function=_scaled_dot_product_flash_attention_for_cpu,
        convention=CPU,
        write=_write_cpu,
        read=_read,
        framework="torch",
        sources=sources(LIBRARY, **_MASKS, mask=NONE, groups=NONE),
    ),
    "torch/flash": Profile(
        name="torch/flash",
        function=_scaled_dot_product_flash_attention,
        convention=FLASH,
        write=_write_flash,
        read=_read,
        framework="torch",
        sources=sources("not checked", **_MASKS, rows=_BIAS_PY, mask=NONE, bias=NONE),
    ),
    "torch/flex": Profile(
        name="torch/flex",
        function=flex_attention,
        convention=FLEX,
        write=_write_flex,
        read=_read,
        framework="torch",
        sources=sources(
            LIBRARY,
            **dict.fromkeys(("rows", "window_rows", "window", "alibi", "alibi_rows", "order", "sink"), NONE),
        ),
    ),
}
