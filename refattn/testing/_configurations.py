"""Edge configurations: small problems on which kernels go wrong, by the capability that they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.conventions import Call, Convention

Rng = np.random.Generator
Make = Callable[[Rng, Convention], Call]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One edge configuration.

    Parameters
    ----------
    name
        What it is, in words.
    capability
        What a function needs to answer it: the name that ``unsupported=`` takes, beside the configuration's own.
    make
        The call, from a generator and the convention, which only decides how what is meant is said.
    layout
        How the arrays lie in memory: see `refattn.testing._calling.Ask`.
    gradients
        Whether its gradients are asked too.
    twice
        Whether the function is called again before its first answer is read.
    promised
        Whether a wrong answer is a fault; otherwise it is a property that does not hold.
    thorough
        Whether it takes long enough to be left out by default.
    """

    name: str
    capability: str
    make: Make
    layout: str = "plain"
    gradients: bool = False
    twice: bool = False
    promised: bool = True
    thorough: bool = False


def ordinary(
    rng: Rng,
    *,
    B: int = 2,
    H: int = 2,
    Hk: int | None = None,
    T: int = 33,
    S: int | None = None,
    D: int = 16,
    E: int | None = None,
    size: float = 1.0,
    **options: Any,
) -> Call:
    """Return a call of normal numbers: every head and batch of its own."""
    few, keys = Hk or H, T if S is None else S
    q, k = size * rng.standard_normal((B, H, T, D)), rng.standard_normal((B, few, keys, D))
    return Call(q=q, k=k, v=rng.standard_normal((B, few, keys, E or D)), **options)


def _plain(**how: Any) -> Make:
    return lambda rng, _: ordinary(rng, **how)


def _keep(how: Convention, seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask of booleans that shows these pairs under the convention."""
    return ~seen if how.mask == "drop" else seen


def _masked(rng: Rng, how: Convention, *, empty: bool = False, shape: tuple[int, ...] = (2, 2, 33, 70)) -> Call:
    seen = rng.random(shape) < 0.4
    seen[..., 0] = True
    if empty:
        seen[..., 3:6, :] = False
        seen[..., -1, :] = False
    return ordinary(rng, T=33, S=70, mask=_keep(how, seen))


def _behind_the_mask(rng: Rng, how: Convention) -> Call:
    call = ordinary(rng, T=33, S=70, mask=_keep(how, np.arange(70) < np.full((1, 1, 33, 1), 50)))
    call.k[..., 50:, :], call.v[..., 50:, :] = np.nan, np.inf
    return call


def _behind_causal(rng: Rng, _: Convention) -> Call:
    call = ordinary(rng, T=40, causal=True)
    call.k[..., -1, :], call.v[..., -1, :] = np.nan, np.inf
    return call


def _lengths(value: float = 0.0, lengths: tuple[int, ...] = (1, 70, 17), **how: Any) -> Make:
    def make(rng: Rng, _: Convention) -> Call:
        call = ordinary(rng, B=len(lengths), S=70, lengths=np.array(lengths), **how)
        for n, length in enumerate(lengths):
            if value:
                call.k[n, :, length:], call.v[n, :, length:] = value, value
        return call

    return make


def _packed(queries: tuple[int, ...], keys: tuple[int, ...], **how: Any) -> Make:
    def make(rng: Rng, _: Convention) -> Call:
        starts = np.cumsum([0, *queries]), np.cumsum([0, *keys])
        return ordinary(rng, B=1, T=sum(queries), S=sum(keys), starts=starts, **how)

    return make


def _biased(spread: float, *, hidden: bool = False, **how: Any) -> Make:
    def make(rng: Rng, _: Convention) -> Call:
        call = ordinary(rng, T=33, S=70, **how)
        bias = spread * rng.standard_normal((*call.q.shape[:-1], 70))
        if hidden:
            bias[..., rng.random(70) < 0.5] = -np.inf
            bias[..., 0] = 0.0
        return replace(call, bias=bias)

    return make


def _slopes(heads: int, **how: Any) -> Make:
    def make(rng: Rng, _: Convention) -> Call:
        return ordinary(rng, H=heads, slopes=2.0 ** (-8 * np.arange(1, heads + 1) / heads), **how)

    return make


def _sinks(spread: float, shift: float = 0.0, **how: Any) -> Make:
    return lambda rng, _: ordinary(rng, H=4, sink=shift + spread * rng.standard_normal(4), **how)


def _changed(change: Callable[[Rng, Call], Call], **how: Any) -> Make:
    return lambda rng, _: change(rng, ordinary(rng, **how))


def _logits_at(rng: Rng, call: Call, *, first: float, last: float) -> Call:
    """Return the call with logits near numbers that run from `first` at the first key to `last` at the last."""
    q, k = call.q.copy(), call.k.copy()
    S, width = k.shape[-2], 256.0 if max(abs(first), abs(last)) > 1e4 else 4.0
    q[..., 0] = width
    k[..., 0] = np.linspace(first, last, S) / width
    return replace(call, q=q, k=k, scale=1.0)


def _at(first: float, last: float, **how: Any) -> Make:
    return _changed(lambda rng, call: _logits_at(rng, call, first=first, last=last), T=33, S=150, **how)


def _ties(rng: Rng, call: Call) -> Call:
    return replace(call, q=np.round(call.q), k=np.round(call.k))


def _one_for_all(rng: Rng, call: Call) -> Call:
    return replace(call, k=np.repeat(call.k[..., :1, :], call.k.shape[-2], axis=-2))


def _nothing_asked(rng: Rng, call: Call) -> Call:
    return replace(call, q=0 * call.q)


def _far_values(rng: Rng, call: Call) -> Call:
    return replace(call, v=call.v + 50)


def _same_batches(rng: Rng, call: Call) -> Call:
    return replace(call, k=np.repeat(call.k[:1], 2, axis=0), v=np.repeat(call.v[:1], 2, axis=0))


def _table() -> tuple[Configuration, ...]:
    found: list[Configuration] = []

    def add(capability: str, name: str, make: Make, **more: Any) -> None:
        found.append(Configuration(name=name, capability=capability, make=make, **more))

    c = "plain"
    add(c, "sizes that tiles divide", _plain(T=128, D=32), gradients=True, twice=True)
    add(c, "one row past a tile", _plain(T=65, S=129), twice=True)
    add(c, "ragged sizes", _plain(T=67, S=131), gradients=True)
    add(c, "more rows than keys", _plain(T=90, S=7), gradients=True)
    add(c, "one row", _plain(T=1, S=200))
    add(c, "one key", _plain(T=33, S=1), gradients=True)
    add(c, "one row, one key", _plain(B=1, H=1, T=1))
    add(c, "many heads, one batch", _plain(B=1, H=9, T=17))
    add("size 0", "no rows", _plain(T=0, S=9))
    add("size 0", "no keys", _plain(T=9, S=0))
    add("size 0", "no batch", _plain(B=0, T=9))
    c = "head sizes"
    add(c, "head size 64", _plain(T=33, D=64))
    add(c, "head size 128", _plain(T=33, S=65, D=128), gradients=True)
    add("head sizes that 16 does not divide", "head size 40", _plain(D=40), gradients=True)
    add("head sizes that 16 does not divide", "head size 65", _plain(D=65))
    add("head sizes that 16 does not divide", "head size 1", _plain(D=1))
    add("value head size", "values wider than keys", _plain(D=16, E=48, S=40), gradients=True)
    add("value head size", "values narrower than keys", _plain(D=48, E=16, S=40))

    c = "causal"
    add(c, "causal, square", _plain(T=70, causal=True), gradients=True)
    add(c, "causal, tiles divide", _plain(T=128, causal=True))
    add(c, "causal, fewer rows than keys", _plain(T=37, S=100, causal=True), gradients=True)
    add(c, "causal, more rows than keys", _plain(T=100, S=37, causal=True), gradients=True)
    add(c, "causal, one row", _plain(T=1, S=70, causal=True))
    c = "window"
    for causal, words in ((True, "causal "), (False, "")):
        right = 0 if causal else 3
        add(c, f"{words}window", _plain(T=70, causal=causal, window=(5, right)), gradients=True)
        add(c, f"{words}window, fewer rows than keys", _plain(T=20, S=90, causal=causal, window=(20, right)))
        add(c, f"{words}window, more rows than keys", _plain(T=90, S=20, causal=causal, window=(3, right)))
    add(c, "window of a tile", _plain(T=150, window=(64, 0), causal=True))
    add(c, "narrow window", _plain(T=40, window=(1, 0), causal=True))
    add(c, "window beyond all keys", _plain(T=40, window=(1000, 1000)))
    add(c, "window to the left alone", _plain(T=40, window=(4, None)))
    add(c, "window to the right alone", _plain(T=40, window=(None, 4)))

    c = "mask"
    add(c, "mask", _masked, gradients=True)
    add(c, "mask, the same for all heads", lambda rng, how: _masked(rng, how, shape=(2, 1, 33, 70)))
    add(c, "mask, the same for all", lambda rng, how: _masked(rng, how, shape=(33, 70)))
    add(c, "mask, rows that see nothing", lambda rng, how: _masked(rng, how, empty=True), gradients=True)
    c = "bias"
    add(c, "bias", _biased(1.0), gradients=True)
    add(c, "strong bias", _biased(30.0))
    add(c, "bias, scale far from 1/√D", _biased(1.0, scale=1.5))
    add(c, "bias that hides keys", _biased(1.0, hidden=True))
    c = "ALiBi"
    add(c, "ALiBi", _slopes(8, T=40, S=70))
    add(c, "ALiBi, 12 heads", _slopes(12, B=1, T=40, S=70))
    add(c, "ALiBi, causal", _slopes(5, T=40, S=70, causal=True))

    c = "grouped heads"
    add(c, "grouped heads", _plain(H=6, Hk=2), gradients=True)
    add(c, "more key heads than in a group", _plain(B=1, H=8, Hk=4, T=20))
    add(c, "one key head", _plain(H=5, Hk=1, T=20))
    add(c, "grouped heads, causal", _plain(H=6, Hk=3, T=20, S=37, causal=True))
    c = "scale"
    add(c, "scale 1", _plain(scale=1.0, size=0.5), gradients=True)
    add(c, "scale 0.01", _plain(scale=0.01))
    c = "softcap"
    add(c, "softcap", _plain(softcap=2.0, size=3.0), gradients=True)
    add(c, "softcap, causal", _plain(softcap=1.0, size=3.0, causal=True, T=40, S=70))
    add(c, "softcap and bias", _biased(2.0, softcap=1.5, size=3.0))
    add(c, "softcap and ALiBi", _slopes(5, T=40, softcap=1.5, size=3.0))
    c = "sink"
    add(c, "sinks", _sinks(1.0, T=20), gradients=True)
    add(c, "large sinks", _sinks(1.0, shift=6.0, T=20, S=150))
    add(c, "sinks, rows that see nothing", _sinks(1.0, T=40, S=9, causal=True))

    c = "lengths"
    add(c, "lengths", _lengths(T=5))
    add(c, "lengths, causal", _lengths(T=1, causal=True))
    add(c, "NaN in unused slots", _lengths(np.nan, T=5))
    add(c, "Inf in unused slots", _lengths(np.inf, T=1))
    add(c, "a length of 0", _lengths(np.nan, lengths=(0, 70, 64), T=3))
    c = "packed sequences"
    add(c, "packed", _packed((5, 1, 40), (5, 1, 40)))
    add(c, "packed, causal", _packed((7, 64, 13), (7, 64, 13), causal=True))
    add(c, "packed, causal, more keys than rows", _packed((7, 1, 30), (20, 65, 31), causal=True))

    c = "numbers"
    add(c, "values far from 0", _changed(_far_values, T=33, S=70))
    add(c, "ties", _changed(_ties, T=33, S=70), gradients=True)
    add(c, "all keys are one", _changed(_one_for_all, T=33, S=70))
    add(c, "all logits are 0", _changed(_nothing_asked, T=33, S=70))
    add(c, "all logits are negative", _at(-40.0, -20.0))
    add(c, "rising logits", _at(-60.0, 60.0))
    add(c, "falling logits", _at(60.0, -60.0))
    add(c, "logits below −50000", _at(-70000.0, -69900.0))
    add(c, "logits beyond ±50000", _at(60000.0, -60000.0))
    add(c, "peaked", _plain(size=12.0, T=33, S=70), gradients=True)
    add(c, "4099 keys", _plain(B=1, T=3, S=4099))
    add(c, "65537 keys", _plain(B=1, T=2, S=65537), thorough=True)
    add(c, "1031 rows and keys, causal", _plain(B=1, T=1031, D=64, causal=True), thorough=True, gradients=True)
    c = "layout"
    for layout in ("transposed", "strided"):
        add(c, f"{layout} arrays", _plain(T=33, S=70), layout=layout)
    add(c, "broadcast keys and values", _changed(_same_batches, T=33, S=65), layout="broadcast")

    c = "properties"
    add(c, "NaN and Inf behind a mask", _behind_the_mask, promised=False)
    add(c, "NaN and Inf after a causal row", _behind_causal, promised=False)
    return tuple(found)


CONFIGURATIONS = _table()
"""Every configuration."""
CAPABILITIES = tuple(dict.fromkeys(one.capability for one in CONFIGURATIONS))
"""What they need, in their order."""
