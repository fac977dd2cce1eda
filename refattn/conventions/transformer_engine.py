"""Transformer Engine's DotProductAttention, answered by the definition; nothing of it is imported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

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
    empties,
    four,
    has,
    like,
    minus_one,
    no_dropout,
    nothing,
    packed,
    sides,
    some,
    sources,
    swapped,
)
from refattn.engines import Unsupported

FUSED = Convention(mask="drop", alibi="absolute distance")
TORCH = replace(FUSED, empty="mean of v")

MASKS = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)

Floats = NDArray[np.float64]


class DotProductAttention:
    """What `transformer_engine.pytorch.DotProductAttention` means, called with its forward's arguments.

    A mask is True where it drops. Windows and ALiBi follow `bottom_right_diagonal`, which the types ``"causal"`` and
    ``"padding_causal"`` make False and others True. `unfused` answers a row that sees nothing with the mean of v, as
    its torch softmax does; otherwise it answers 0. The sink of ``softmax_type="learnable"`` is `softmax_offset`, (H,).

    Examples
    --------
    >>> x = np.ones((2, 1, 1, 4))
    >>> DotProductAttention(1, 4)(x, x, x).shape
    (2, 1, 4)
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        softmax_offset: ArrayLike | None = None,
        unfused: bool = False,
    ) -> None:
        """Take the options that mean something for the answer."""
        no_dropout("attention_dropout", attention_dropout)
        _check.choice("softmax_type", softmax_type, ("vanilla", "off-by-one", "learnable"))
        if (softmax_type == "learnable") != (softmax_offset is not None):
            raise ValueError("softmax_offset: expected one logit a head with softmax_type 'learnable', and only then")
        self.heads, self.format, self.type = num_attention_heads, qkv_format, attn_mask_type
        self.window, self.bottom_right, self.scale = window_size, bottom_right_diagonal, softmax_scale
        self.sink: Any = np.zeros(num_attention_heads) if softmax_type == "off-by-one" else softmax_offset
        self.convention = TORCH if unfused else FUSED

    def __call__(
        self,
        query_layer: ArrayLike,
        key_layer: ArrayLike,
        value_layer: ArrayLike,
        attention_mask: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: ArrayLike | None = None,
        cu_seqlens_kv: ArrayLike | None = None,
        cu_seqlens_q_padded: ArrayLike | None = None,
        cu_seqlens_kv_padded: ArrayLike | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: ArrayLike | None = None,
        alibi_slopes: ArrayLike | None = None,
    ) -> Floats:
        """Return o with heads and their width in one axis: (S, B, H·E), (B, S, H·E) or (tokens, H·E)."""
        nothing(cu_seqlens_q_padded=cu_seqlens_q_padded, cu_seqlens_kv_padded=cu_seqlens_kv_padded)
        form = _check.choice("qkv_format", qkv_format or self.format, ("sbhd", "bshd", "thd"))
        name = _check.choice("attn_mask_type", attn_mask_type or self.type, MASKS)
        given = self.bottom_right if bottom_right_diagonal is None else bottom_right_diagonal
        from_end = name not in ("causal", "padding_causal") and (given is not False or name.endswith("bottom_right"))
        rows: Any = "bottom-right" if from_end else "top-left"
        how = replace(self.convention, rows=rows, window_rows=rows, alibi_rows=rows)
        left, right = self.window or (-1, -1) if window_size is None else window_size
        call = Call(
            **{s: _heads_first(x, form) for s, x in zip("qkv", (query_layer, key_layer, value_layer), strict=True)},
            causal="causal" in name,
            window=sides(left, right),
            scale=self.scale,
            sink=self.sink,
            starts=(cu_seqlens_q, cu_seqlens_kv) if form == "thd" else None,
            **self._bias(core_attention_bias_type, core_attention_bias, alibi_slopes),
        )
        if core_attention_bias_type == "pre_scale_bias":
            how = replace(how, bias="before the scale")
        if name == "arbitrary":
            call = replace(call, mask=attention_mask)
        elif "padding" in name and form != "thd":
            call = replace(call, lengths=_lengths(attention_mask, cu_seqlens_q, cu_seqlens_kv, call.sizes[0]))
        o = np.moveaxis(call.under(how).answer().o, -3, -2)
        o = o.reshape(*o.shape[:-2], o.shape[-2] * o.shape[-1])
        return o.swapaxes(0, 1) if form == "sbhd" else o

    def _bias(self, kind: str, bias: Any, slopes: Any) -> dict[str, Any]:
        _check.choice("core_attention_bias_type", kind, ("no_bias", "pre_scale_bias", "post_scale_bias", "alibi"))
        if (bias is not None) != kind.endswith("scale_bias"):
            raise ValueError(f"core_attention_bias does not go with core_attention_bias_type {kind!r}")
        if kind == "alibi":
            return {"slopes": alibi_slopes(self.heads) if slopes is None else slopes}
        return {"bias": bias}


def dot_product_attention(
    query_layer: ArrayLike,
    key_layer: ArrayLike,
    value_layer: ArrayLike,
    *,
    softmax_scale: float | None = None,
    softmax_type: str = "vanilla",
    softmax_offset: ArrayLike | None = None,
    unfused: bool = False,
    **forward: Any,
) -> Floats:
    """Make a `DotProductAttention` of the arrays' sizes and call it."""
    width = (np.shape(query_layer)[-1], np.shape(value_layer)[-1])
    module = DotProductAttention(
        np.shape(query_layer)[-2],
        width,
        np.shape(key_layer)[-2],
        softmax_scale=softmax_scale,
        softmax_type=softmax_type,
        softmax_offset=softmax_offset,
        unfused=unfused,
    )
    return module(query_layer, key_layer, value_layer, **forward)


def _heads_first(x: Any, form: str) -> Any:
    x = np.asarray(x)
    if x.ndim != (3 if form == "thd" else 4):
        raise ValueError(f"query_layer, key_layer or value_layer has {x.ndim} axes; expected those of {form}")
    return swapped(x.swapaxes(0, 1) if form == "sbhd" else x)


def _lengths(mask: Any, cu_q: Any, cu_kv: Any, T: int) -> Any:
    """Return how many keys exist, from a padding mask (True is padding) or cumulative lengths."""
    if mask is None:
        if cu_q is None or cu_kv is None:
            raise ValueError("attention_mask is None; expected it, or cu_seqlens_q and cu_seqlens_kv, with padding")
        queries, keys = np.diff(np.asarray(cu_q)), np.diff(np.asarray(cu_kv))
    else:
        both = cast("tuple[Any, Any]", mask) if isinstance(mask, tuple) else (mask, mask)
        queries, keys = ((~np.asarray(x)).sum(-1).reshape(-1) for x in both)
    if (queries != T).any():
        raise ValueError(f"queries have lengths {queries.tolist()}; expected {T}: what a padded row answers is its own")
    return keys


def _write(call: Call) -> Written:
    return _written(call, FUSED)


def _write_unfused(call: Call) -> Written:
    written = _written(call, TORCH)
    if call.lengths is not None or call.starts is not None:
        raise Unsupported("transformer_engine's torch softmax answers 0 for rows that padding empties")
    if call.sink is None and empties(call, TORCH):
        raise Unsupported("transformer_engine's torch softmax answers NaN where a row's bias is −inf")
    return written._replace(kwargs={**written.kwargs, "unfused": True})


def _written(call: Call, convention: Convention) -> Written:
    who = "transformer_engine"
    has(who, call, "causal", "window", "mask", "bias", "slopes", "sink", "lengths", "starts")
    if call.mask is not None and (call.causal or call.lengths is not None or call.starts is not None):
        raise Unsupported(f"{who} takes a mask alone")
    if call.sink is not None and np.ndim(call.sink) != 1:
        raise Unsupported(f"{who} takes one sink a head")
    padding = call.lengths is not None or call.starts is not None
    name = "_".join(["padding"] * padding + ["causal_bottom_right"] * call.causal) or "no_mask"
    kwargs = some(
        attn_mask_type=name if call.mask is None else "arbitrary",
        attention_mask=four(call.mask),
        window_size=None if call.window is None else minus_one(call),
        core_attention_bias_type=None
        if call.bias is None and call.slopes is None
        else "post_scale_bias"
        if call.slopes is None
        else "alibi",
        core_attention_bias=four(call.bias),
        alibi_slopes=call.slopes,
        softmax_scale=call.scale,
        softmax_type=None if call.sink is None else "learnable",
        softmax_offset=call.sink,
    )
    if call.starts is not None:
        q, k, v, cq, ck = packed(who, call)
        return Written((q, k, v), {**kwargs, "qkv_format": "thd", "cu_seqlens_q": cq, "cu_seqlens_kv": ck})
    q, k, v = batched(who, call)
    if call.lengths is not None:
        there = np.zeros((len(q), 1, 1, q.shape[2]), np.bool_)
        gone = ~below(k.shape[2], call.lengths)[:, None, None, :]
        kwargs["attention_mask"] = (there, gone)
    arrays = (swapped(q), swapped(k), swapped(v))
    return Written(arrays, {**kwargs, "qkv_format": "bshd"})


def _read(returned: Any, call: Call) -> Returned:
    heads, width = (np.shape(call.q)[-3] if np.ndim(call.q) > 2 else 1), np.shape(call.v)[-1]
    o = returned.reshape((*returned.shape[:-1], heads, width)).swapaxes(-3, -2)
    return like(call, o)


_BACKENDS = "transformer_engine/pytorch/attention/dot_product_attention/backends.py"
_UTILS = "transformer_engine/pytorch/attention/dot_product_attention/utils.py"


def _sources(empty: str) -> dict[str, str]:
    return sources(
        _UTILS,
        mask="transformer_engine/pytorch/utils.py",
        empty=empty,
        **dict.fromkeys(("bias", "groups"), _BACKENDS),
        **dict.fromkeys(("order", "lse", "empty_lse", "sink"), NONE),
    )


PROFILES = {
    name: Profile(
        name=name,
        function=dot_product_attention,
        convention=convention,
        write=write,
        read=_read,
        framework="torch",
        sources=_sources(empty),
    )
    for name, convention, write, empty in (
        ("transformer_engine", FUSED, _write, "transformer_engine/common/fused_softmax/scaled_masked_softmax.cu"),
        (
            "transformer_engine/unfused",
            TORCH,
            _write_unfused,
            "transformer_engine/pytorch/attention/dot_product_attention/softmax.py",
        ),
    )
}
