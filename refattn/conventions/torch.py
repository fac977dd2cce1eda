"""PyTorch's attention, answered by the definition: same names, order and defaults; nothing of PyTorch is imported."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.engines import Unsupported

CONVENTION = Convention(rows="top-left", window_rows="top-left")


def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> NDArray[np.float64]:
    """Return what `torch.nn.functional.scaled_dot_product_attention` means: (..., H, T, E).

    A mask of booleans keeps where it is True, any other is added to the logits. Causal is top-left. A row that sees
    nothing answers 0.

    Examples
    --------
    >>> x = np.ones((1, 2, 1))
    >>> scaled_dot_product_attention(x, x, x, is_causal=True).shape
    (1, 2, 1)
    """
    call = _call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return call.under(CONVENTION).answer().o


def _call(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, scale: Any, enable_gqa: bool
) -> Call:
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected 0.0: what is dropped is drawn by the library")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask is given and is_causal is True; expected one of the two")
    heads, few = (np.shape(x)[-3] if np.ndim(x) > 2 else 1 for x in (query, key))
    if not enable_gqa and heads != few and 1 not in (heads, few):
        raise ValueError(f"key has {few} heads; expected {heads}, as query has, where enable_gqa is False")
    mask = None if attn_mask is None else np.asarray(attn_mask)
    how: dict[str, Any] = {} if mask is None else {"mask" if mask.dtype == np.bool_ else "bias": mask}
    return Call(q=query, k=key, v=value, causal=is_causal, scale=scale, **how)


def _write(call: Call) -> Written:
    for name in ("window", "slopes", "sink", "softcap", "lengths", "starts"):
        if getattr(call, name) is not None:
            raise Unsupported(f"torch has no argument for {name}")
    both = [
        name
        for name, given in (("causal", call.causal), ("mask", call.mask is not None), ("bias", call.bias is not None))
        if given
    ]
    if len(both) > 1:
        raise Unsupported(f"torch takes one of {' and '.join(both)}")
    kwargs: dict[str, Any] = {}
    if call.causal:
        kwargs["is_causal"] = True
    if call.mask is not None or call.bias is not None:
        kwargs["attn_mask"] = call.mask if call.bias is None else call.bias
    if call.scale is not None:
        kwargs["scale"] = call.scale
    if np.ndim(call.q) > 2 and np.shape(call.q)[-3] != np.shape(call.k)[-3]:
        kwargs["enable_gqa"] = True
    return Written((call.q, call.k, call.v), kwargs)


def _read(returned: Any, call: Call) -> Returned:
    return Returned(returned, None)


PROFILES = {
    "torch": Profile(
        name="torch",
        function=scaled_dot_product_attention,
        convention=CONVENTION,
        write=_write,
        read=_read,
        framework="torch",
    )
}
