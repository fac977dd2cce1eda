"""MLX's attention, answered by the definition: same names, order and defaults; nothing of MLX is imported."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check
from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.conventions._words import NONE, batched, empties, has, like, one_of, some, sources
from refattn.engines import Unsupported

FAST = Convention(empty="mean of v")


def scaled_dot_product_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float,
    mask: str | ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    force_fused: bool = False,
    stream: object = None,
) -> NDArray[np.float64]:
    """Return what `mlx.core.fast.scaled_dot_product_attention` means: (B, H, T, E).

    The mask is ``"causal"``, which is bottom-right, or an array: booleans keep where they are True, numbers are added.
    A row that sees nothing answers the mean of v, or 0 with a sink, as the library's own fallback does.

    Examples
    --------
    >>> x = np.ones((1, 1, 2, 1))
    >>> scaled_dot_product_attention(x, x, x, scale=1.0, mask="causal").shape
    (1, 1, 2, 1)
    """
    how: dict[str, Any] = {}
    if isinstance(mask, str):
        how["causal"] = _check.choice("mask", mask, ("causal",)) == "causal"
    elif mask is not None:
        array = np.asarray(mask)
        how["mask" if array.dtype == np.bool_ else "bias"] = array
    return Call(q=q, k=k, v=v, scale=scale, sink=sinks, **how).under(FAST).answer().o


def _write(call: Call) -> Written:
    has("mlx", call, "causal", "mask", "bias", "sink")
    one_of("mlx", call, "causal", "mask", "bias")
    q, k, v = batched("mlx", call)
    if call.sink is not None and np.ndim(call.sink) != 1:
        raise Unsupported("mlx takes one sink a head")
    if call.sink is None and empties(call, FAST):
        raise Unsupported("mlx answers NaN where a row's bias is −inf")
    mask = "causal" if call.causal else call.mask if call.bias is None else call.bias
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    return Written((q, k, v), some(scale=scale, mask=mask, sinks=call.sink))


def _read(returned: Any, call: Call) -> Returned:
    return like(call, returned)


PROFILES = {
    "mlx": Profile(
        name="mlx",
        function=scaled_dot_product_attention,
        convention=FAST,
        write=_write,
        read=_read,
        framework="mlx",
        sources=sources(
            "mlx/fast.cpp",
            **dict.fromkeys(("window_rows", "window", "alibi", "alibi_rows", "order", "lse", "empty_lse"), NONE),
            sink=NONE,
        ),
    )
}
