"""Transformers' attention functions, answered by the definition: the masks, too, mean what its models make of them.

A model makes a mask out of causality, a sliding window and padding, with its rows at the end of the keys; the functions
here take that mask. ``"eager"`` masks are added and hold the least finite number, ``"sdpa"`` masks are of booleans.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import masks
from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.conventions._words import LIBRARY, NONE, batched, four, has, like, no_dropout, some, sources, swapped, two
from refattn.engines import Unsupported

EAGER = Convention(window="keys with its own", empty="mean of v", order="softcap, bias")
SDPA = Convention(window="keys with its own")

Floats = NDArray[np.float64]


def eager_attention_forward(
    module: Any,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attention_mask: ArrayLike | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Floats, None]:
    """Return what `eager_attention_forward` of a model means: (B, T, H, E), and None where it returns weights.

    Of Llama, of Gemma 2 (`softcap`, before the mask), and of gpt-oss where `module` has `sinks`. A row whose mask is
    the least finite number everywhere answers the mean of v, as it does there: what is added swallows the logit.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> x = np.ones((1, 1, 2, 1))
    >>> eager_attention_forward(SimpleNamespace(num_key_value_groups=1), x, x, x, None, 1.0)[0].shape
    (1, 2, 1, 1)
    """
    no_dropout("dropout", dropout)
    mask = None if attention_mask is None else np.asarray(attention_mask)
    if mask is not None and mask.dtype == np.bool_:
        raise TypeError("attention_mask is of booleans; expected numbers to add to the logits")
    how: dict[str, Any] = {}
    if mask is not None:
        seen = mask.astype(np.float64) > _least(query)
        how = {"mask": seen, "bias": np.where(seen, mask, 0.0)}
    call = Call(
        q=query,
        k=key,
        v=value,
        **how,
        scale=scaling,
        softcap=softcap,
        sink=getattr(module, "sinks", None),
    )
    _groups(module, call)
    return swapped(call.under(EAGER).answer().o), None


def sdpa_attention_forward(
    module: Any,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attention_mask: ArrayLike | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: ArrayLike | None = None,
    **kwargs: object,
) -> tuple[Floats, None]:
    """Return what `transformers.integrations.sdpa_attention.sdpa_attention_forward` means: (B, T, H, E), and None.

    Without a mask, more than one row is causal from the top left unless `is_causal`, or the module's, is False. A row
    that sees nothing answers 0.
    """
    no_dropout("dropout", dropout)
    if position_bias is not None:
        raise ValueError("position_bias is given; expected it inside attention_mask")
    mask = None if attention_mask is None else np.asarray(attention_mask)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    how: dict[str, Any] = {} if mask is None else {"mask" if mask.dtype == np.bool_ else "bias": mask}
    call = Call(q=query, k=key, v=value, scale=scaling, **how)
    if causal and mask is None and call.sizes[0] > 1:
        call = Call(q=query, k=key, v=value, scale=scaling, causal=True)
    _groups(module, call)
    return swapped(call.under(Convention(rows="top-left")).answer().o), None


def _groups(module: Any, call: Call) -> None:
    groups, heads, few = getattr(module, "num_key_value_groups", 1), np.shape(call.q)[1], np.shape(call.k)[1]
    if groups * few != heads:
        raise ValueError(f"module.num_key_value_groups is {groups}; expected {heads} / {few} heads")


def _least(query: Any) -> float:
    """Return a number, as low as masks of a dtype go, that every format of as wide a range holds exactly."""
    return -65504.0 if np.asarray(query).dtype == np.float16 else -(2.0**127)


def _seen(call: Call, convention: Convention) -> Any:
    """Return the mask that a model makes of causality, windows, padding and a mask: (B or 1, H or 1, T, S), or None."""
    T, S = call.sizes
    whole = Call(
        q=call.q,
        k=call.k,
        v=call.v,
        causal=call.causal,
        window=call.window,
        mask=call.mask,
        lengths=call.lengths,
    )
    mask: masks.Mask | None = whole.under(convention).options["mask"]
    if mask is None:
        return None
    pairs = mask.on(T, S)
    each = [pairs.take(n).seen(np.arange(T), np.arange(S)) for n in range(math.prod(pairs.lead))]
    return four(np.reshape(each, (*pairs.lead, T, S)))


def _write_eager(call: Call) -> Written:
    return _written("eager attention", call, "softcap", sinks=False)


def _write_gpt_oss(call: Call) -> Written:
    if call.sink is None or np.ndim(call.sink) != 1:
        raise Unsupported("gpt-oss takes one sink a head, always")
    return _written("gpt-oss", call, "sink", sinks=True)


def _written(who: str, call: Call, *names: str, sinks: bool) -> Written:
    has(who, call, "causal", "window", "mask", "bias", "lengths", *names)
    q, k, v = batched(who, call)
    dtype = q.dtype
    seen, least = _seen(call, EAGER), _least(q)
    mask = None if call.bias is None else np.asarray(call.bias)
    if mask is not None and (mask.astype(np.float64) <= least).any():
        raise Unsupported(f"{who} takes finite biases")
    if seen is not None:
        mask = np.where(seen, np.zeros((), dtype) if mask is None else mask, np.asarray(least, dtype)).astype(dtype)
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    if sinks:
        module.sinks = call.sink
    scaling = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    return Written((module, q, k, v, mask), some(scaling=scaling, softcap=call.softcap))


def _write_sdpa(call: Call) -> Written:
    has("sdpa attention", call, "causal", "window", "mask", "bias", "lengths")
    q, k, v = batched("sdpa attention", call)
    seen = _seen(call, SDPA)
    if seen is not None and call.bias is not None:
        raise Unsupported("sdpa attention takes one of a mask and a bias")
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=False)
    return Written((module, q, k, v, call.bias if seen is None else seen), some(scaling=call.scale))


def _read(returned: Any, call: Call) -> Returned:
    return like(call, two(returned)[0].swapaxes(1, 2))


_NONE = dict.fromkeys(("alibi", "alibi_rows", "lse", "empty_lse", "sink"), NONE)

PROFILES = {
    name: Profile(
        name=name,
        function=function,
        convention=convention,
        write=write,
        read=_read,
        framework="torch",
        sources=sources(LIBRARY, **_NONE, **dict.fromkeys(none, NONE)),
    )
    for name, function, convention, write, none in (
        ("transformers/eager", eager_attention_forward, EAGER, _write_eager, ()),
        ("transformers/gpt-oss", eager_attention_forward, EAGER, _write_gpt_oss, ("order", "empty")),
        ("transformers/sdpa", sdpa_attention_forward, SDPA, _write_sdpa, ("order",)),
    )
}
