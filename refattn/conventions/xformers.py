"""xFormers' attention and its mask classes, answered by the definition; arrays are (B, M, H, K). Nothing is imported.

As of its own kernels, before they moved to the package mslk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention, Ints
from refattn.conventions._profile import Profile, Returned, Written
from refattn.conventions._words import (
    NONE,
    batched,
    has,
    hides,
    like,
    no_dropout,
    nothing,
    one_of,
    packed,
    some,
    sources,
    swapped,
    two,
)
from refattn.engines import Unsupported

XFORMERS = Convention(empty="NaN", empty_lse="any")

Floats = NDArray[np.float64]


class AttentionBias:
    """A bias or mask by class: `under` says what a call means with it."""

    def under(self, call: Call) -> tuple[Call, Convention]:
        """Return the call with the mask in it, and the convention that the class stands for."""
        raise NotImplementedError


@dataclass(frozen=True)
class LowerTriangularMask(AttentionBias):
    """Causal, top-left."""

    def under(self, call: Call) -> tuple[Call, Convention]:
        """Return a causal call from the top left."""
        return replace(call, causal=True), replace(XFORMERS, rows="top-left")


@dataclass(frozen=True)
class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, bottom-right."""

    def under(self, call: Call) -> tuple[Call, Convention]:
        """Return a causal call."""
        return replace(call, causal=True), XFORMERS

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """Return it with a window."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass(frozen=True)
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal, bottom-right, and `_window_size` keys with the row's own."""

    _window_size: int = 1

    def under(self, call: Call) -> tuple[Call, Convention]:
        """Return a causal call with a window that counts its own key."""
        return replace(call, causal=True, window=(self._window_size, None)), replace(
            XFORMERS, window="keys with its own"
        )


@dataclass(frozen=True)
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window, bottom-right: so many keys to the left of a row's own and so many to its right."""

    window_left: int
    window_right: int

    def under(self, call: Call) -> tuple[Call, Convention]:
        """Return a call with a window."""
        return replace(call, window=(self.window_left, self.window_right)), XFORMERS


@dataclass(frozen=True)
class BlockDiagonalMask(AttentionBias):
    """Packed sequences of these lengths, (1, tokens, H, K)."""

    q_seqlen: tuple[int, ...]
    kv_seqlen: tuple[int, ...]
    causal: bool = False
    rows: str = "bottom-right"

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None) -> BlockDiagonalMask:
        """Return the mask of sequences; keys have the queries' lengths unless given."""
        return cls(tuple(q_seqlen), tuple(q_seqlen if kv_seqlen is None else kv_seqlen))

    def make_causal(self) -> BlockDiagonalMask:
        """Return it causal, each sequence from its top left."""
        return replace(self, causal=True, rows="top-left")

    def make_causal_from_bottomright(self) -> BlockDiagonalMask:
        """Return it causal, each sequence from its bottom right."""
        return replace(self, causal=True, rows="bottom-right")

    def under(self, call: Call) -> tuple[Call, Convention]:
        """Return a packed call."""
        starts = (_starts(self.q_seqlen), _starts(self.kv_seqlen))
        call = replace(call, q=_flat(call.q), k=_flat(call.k), v=_flat(call.v), starts=starts, causal=self.causal)
        return call, replace(XFORMERS, rows=self.rows)


def memory_efficient_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_bias: ArrayLike | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: object = None,
) -> Floats:
    """Return what `xformers.ops.memory_efficient_attention` means, with the shape of the query, values' width.

    Arrays are (B, M, H, K), (B, M, K), or (B, M, G, H, K) for grouped heads. A bias is an array to add or one of the
    mask classes here.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 1))
    >>> memory_efficient_attention(x, x, x, LowerTriangularMask()).shape
    (1, 2, 1, 1)
    """
    return _both(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward_requires_grad(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_bias: ArrayLike | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: object = None,
) -> tuple[Floats, Floats]:
    """Return what `xformers.ops.memory_efficient_attention_forward_requires_grad` means: o, and lse (B, H, M)."""
    return _both(query, key, value, attn_bias, p, scale, output_dtype)


def _both(
    query: Any, key: Any, value: Any, attn_bias: Any, p: float, scale: float | None, output_dtype: object
) -> tuple[Floats, Floats]:
    no_dropout("p", p)
    nothing(output_dtype=output_dtype)
    shape = (*np.shape(query)[:-1], np.shape(value)[-1])
    q, k, v = (_heads(x) for x in (query, key, value))
    call, how = Call(q=q, k=k, v=v, scale=scale), XFORMERS
    if isinstance(attn_bias, AttentionBias):
        call, how = attn_bias.under(call)
    elif attn_bias is not None:
        bias = np.asarray(attn_bias)
        call = replace(
            call, bias=bias.reshape(bias.shape[0], -1, *bias.shape[-2:]) if len(shape) > 3 else bias[:, None]
        )
    o, lse = call.under(how).answer()
    return swapped(o).reshape(shape), lse


def _heads(x: Any) -> Any:
    """Return (B, H, M, K) of any of the layouts, grouped heads in one axis."""
    x = np.asarray(x)
    if x.ndim not in (3, 4, 5):
        raise ValueError(f"query, key or value has {x.ndim} axes; expected 3, 4 or 5")
    return swapped(x.reshape(*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1]))


def _flat(x: Any) -> Any:
    if np.shape(x)[0] != 1:
        raise ValueError(f"query has {np.shape(x)[0]} sequences; expected 1 of all tokens with a block-diagonal mask")
    return x[0]


def _starts(lengths: Sequence[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _write(call: Call) -> Written:
    has("xformers", call, "causal", "window", "bias", "starts")
    one_of("xformers", call, "bias", "causal", "starts")
    one_of("xformers", call, "bias", "window")
    if hides(call.bias):
        raise Unsupported("xformers' kernels disagree on rows whose bias is −inf")
    if call.starts is not None:
        return _write_packed(call)
    q, k, v = batched("xformers", call)
    left, right = call.window or (None, None)
    mask: Any = None
    if call.causal:
        if left is not None or right is not None:
            mask = LocalAttentionFromBottomRightMask(call.sizes[1] if left is None else left, 0)
        else:
            mask = LowerTriangularFromBottomRightMask()
    elif call.window is not None:
        S, T = call.sizes[1], call.sizes[0]
        mask = LocalAttentionFromBottomRightMask(S if left is None else left, T + S if right is None else right)
    elif call.bias is not None:
        mask = np.broadcast_to(call.bias, (*q.shape[:3], k.shape[2])).copy()
    few, groups = k.shape[1], q.shape[1] // k.shape[1]
    q, k, v = swapped(q), swapped(k), swapped(v)
    if groups > 1:
        q = q.reshape(*q.shape[:2], few, groups, q.shape[-1])
        k, v = (np.repeat(x[:, :, :, None], groups, axis=3) for x in (k, v))
        if call.bias is not None:
            mask = mask.reshape(len(mask), few, groups, *mask.shape[-2:])
    return Written((q, k, v), some(attn_bias=mask, scale=call.scale))


def _write_packed(call: Call) -> Written:
    q, k, v, cq, ck = packed("xformers", call)
    if call.window is not None or q.shape[1] != k.shape[1]:
        raise Unsupported("xformers' packed sequences have no window here, and as many key heads as query heads")
    mask = BlockDiagonalMask.from_seqlens(np.diff(cq).tolist(), np.diff(ck).tolist())
    mask = mask.make_causal_from_bottomright() if call.causal else mask
    return Written((q[None], k[None], v[None]), some(attn_bias=mask, scale=call.scale))


def _read(returned: Any, call: Call) -> Returned:
    o = two(returned)[0]
    heads, width = (np.shape(call.q)[-3] if np.ndim(call.q) > 2 else 1), np.shape(call.v)[-1]
    return like(call, o.reshape((o.shape[0], o.shape[1], heads, width)).swapaxes(1, 2))


_ATTN_BIAS = "xformers/ops/fmha/attn_bias.py"

PROFILES = {
    "xformers": Profile(
        name="xformers",
        function=memory_efficient_attention,
        convention=XFORMERS,
        write=_write,
        read=_read,
        framework="torch",
        sources=sources(
            NONE,
            **dict.fromkeys(("rows", "window_rows", "window"), _ATTN_BIAS),
            **dict.fromkeys(("bias", "groups"), "xformers/ops/fmha/__init__.py"),
            empty="xformers/attn_bias_utils.py",
            empty_lse="not checked",
            lse="not checked",
        ),
    )
}
