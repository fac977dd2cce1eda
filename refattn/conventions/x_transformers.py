"""x-transformers' Attend, answered by the definition: same names and defaults; nothing of it is imported."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.conventions._meaning import Call, Convention
from refattn.conventions._profile import Profile, Returned, Written
from refattn.conventions._words import (
    LIBRARY,
    NONE,
    batched,
    empties,
    four,
    has,
    hides,
    like,
    no_dropout,
    nothing,
    some,
    sources,
    two,
)
from refattn.engines import Unsupported

ATTEND = Convention(order="bias, softcap", groups="tiled", alibi="absolute distance")
"""Where the mask alone empties a row; one that the causal mask empties answers the mean of v."""


class Attend:
    """What `x_transformers.attend.Attend` means, called with q (B, H, T, D), k (B, Hk, S, D), v and a mask.

    A mask, (B, S) or (B, H, T, S), keeps where it is True. A row that it empties answers 0; one that sees nothing for
    another reason answers the mean of v over all keys. The bias comes before the softcap. Head h reads key head h mod
    Hk. Other options of the library make another attention and are not taken.

    Examples
    --------
    >>> x = np.ones((1, 1, 2, 1))
    >>> Attend(causal=True)(x, x, x)[0].shape
    (1, 1, 2, 1)
    """

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        heads: int | None = None,
        scale: float | None = None,
        flash: bool = False,
        softclamp_logits: bool = False,
        logit_softclamp_value: float = 50.0,
        head_learned_sink: bool = False,
    ) -> None:
        """Take the library's options; with `head_learned_sink`, the sink is the attribute `head_attn_sink`."""
        no_dropout("dropout", dropout)
        if flash:
            raise ValueError(
                "flash is True; expected False: it is torch's own attention, and means something else in its corners"
            )
        if head_learned_sink and heads is None:
            raise ValueError("heads is None; expected a number with head_learned_sink")
        self.causal, self.scale = causal, scale
        self.softcap = logit_softclamp_value if softclamp_logits else None
        self.head_attn_sink: Any = np.zeros(heads or 0) if head_learned_sink else None

    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        mask: ArrayLike | None = None,
        attn_bias: ArrayLike | None = None,
        prev_attn: object = None,
        attn_delta: object = None,
        row_mask: object = None,
        flash_pack_seq_kwargs: object = None,
        causal: bool | None = None,
    ) -> tuple[NDArray[np.float64], None]:
        """Return o, (B, H, T, E), and None where the library returns what it computed on the way."""
        nothing(
            prev_attn=prev_attn, attn_delta=attn_delta, row_mask=row_mask, flash_pack_seq_kwargs=flash_pack_seq_kwargs
        )
        if self.softcap is not None and hides(attn_bias):
            raise ValueError("attn_bias holds −inf; expected finite numbers with a softcap, which caps −inf too")
        seen: Any = None if mask is None else np.asarray(mask)
        if seen is not None and seen.ndim == 2:
            seen = seen[:, None, None, :]
        call = Call(
            q=q,
            k=k,
            v=v,
            causal=self.causal if causal is None else causal,
            mask=seen,
            bias=attn_bias,
            scale=self.scale,
            softcap=self.softcap,
            sink=self.head_attn_sink,
        )
        uniform = Convention(order=ATTEND.order, groups=ATTEND.groups, empty="mean of v")
        o = call.under(uniform).answer().o
        return o if seen is None else np.where(seen.any(-1)[..., None], o, 0.0), None


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: ArrayLike | None = None,
    attn_bias: ArrayLike | None = None,
    *,
    head_attn_sink: ArrayLike | None = None,
    **options: Any,
) -> tuple[NDArray[np.float64], None]:
    """Return ``Attend(**options)(q, k, v, mask, attn_bias)``, with a sink of these values."""
    if head_attn_sink is not None:
        options = {**options, "head_learned_sink": True, "heads": np.shape(q)[1]}
    module = Attend(**options)
    if head_attn_sink is not None:
        module.head_attn_sink = head_attn_sink
    return module(q, k, v, mask, attn_bias)


def _write(call: Call) -> Written:
    has("x-transformers", call, "causal", "mask", "bias", "softcap", "sink")
    q, k, v = batched("x-transformers", call)
    if hides(call.bias) and (call.softcap is not None or empties(call, ATTEND)):
        raise Unsupported("x-transformers caps a bias of −inf, and answers NaN for a row of them")
    mask = None if call.mask is None else four(np.asarray(call.mask))
    by_mask = np.zeros(1, np.bool_) if mask is None else ~mask.any(-1)
    if (call.under(ATTEND).empty & ~by_mask).any():
        raise Unsupported("x-transformers answers the mean of v for a row that the causal mask empties")
    if call.sink is not None and np.ndim(call.sink) != 1:
        raise Unsupported("x-transformers takes one sink a head")
    kwargs = some(
        mask=mask,
        attn_bias=call.bias,
        causal=call.causal or None,
        scale=call.scale,
        softclamp_logits=None if call.softcap is None else True,
        logit_softclamp_value=call.softcap,
        head_attn_sink=call.sink,
    )
    return Written((q, k, v), kwargs)


def _read(returned: Any, call: Call) -> Returned:
    return like(call, two(returned)[0])


PROFILES = {
    "x_transformers": Profile(
        name="x_transformers",
        function=attend,
        convention=ATTEND,
        write=_write,
        read=_read,
        framework="torch",
        sources=sources(
            LIBRARY,
            **dict.fromkeys(("window_rows", "window", "lse", "empty_lse", "sink"), NONE),
            alibi="x_transformers/x_transformers.py",
            alibi_rows="x_transformers/x_transformers.py",
        ),
    )
}
