"""Drawn calls of attention: small, of every feature that a library may have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refattn.conventions import Call, Profile, Written
from refattn.conventions._words import alibi_slopes
from refattn.engines import Unsupported

FEATURES = ("causal", "window", "mask", "bias", "slopes", "sink", "softcap", "scale", "lengths", "starts")
APART = ({"bias", "slopes"}, {"lengths", "starts"})


def drawn(rng: np.random.Generator, *, most: int = 7, shapes: int | None = None) -> Call:
    """Return a call with up to four of the features, whose numbers are multiples of 1/64.

    Sizes are at most `most`; with `shapes`, those of so many calls, for libraries that compile anew for each.
    """
    chosen = set(rng.choice(FEATURES, rng.integers(0, 5), replace=False).tolist())
    for pair in APART:
        if pair <= chosen:
            chosen.discard(str(rng.choice(sorted(pair))))
    sizes = rng if shapes is None else np.random.default_rng(int(rng.integers(shapes)))
    T, S = (int(n) for n in sizes.integers(1, most + 1, 2))
    S = T if sizes.random() < 0.3 else S
    few, D = (int(n) for n in sizes.integers(1, 4, 2))
    heads, E = few * int(sizes.choice([1, 1, 2, 3])), D if sizes.random() < 0.7 else int(sizes.integers(1, 4))
    lead = (int(sizes.integers(1, 3)),) if "starts" not in chosen else ()
    given: dict[str, Any] = {
        "q": _numbers(rng, (*lead, heads, T, D)),
        "k": _numbers(rng, (*lead, few, S, D)),
        "v": _numbers(rng, (*lead, few, S, E)),
    }
    across = (*lead, heads) if rng.random() < 0.5 else (*lead[:1], 1) if lead else (1,)
    for name in sorted(chosen):
        given[name] = _feature(rng, name, across, heads, T, S, lead)
    return Call(**given)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return np.round(rng.standard_normal(shape) * rng.choice([0.25, 1.0, 4.0]) * 64) / 64


def _feature(
    rng: np.random.Generator, name: str, across: tuple[int, ...], heads: int, T: int, S: int, lead: tuple[int, ...]
) -> Any:
    match name:
        case "causal":
            return True
        case "window":
            left, right = (None if rng.random() < 0.3 else int(rng.integers(least, 4)) for least in (1, 0))
            return left, right
        case "mask":
            return rng.random((*across, T, S)) < rng.choice([0.4, 0.8])
        case "bias":
            bias = _numbers(rng, (*across, T, S))
            return np.where(rng.random(bias.shape) < 0.5, bias, -np.inf) if rng.random() < 0.3 else bias
        case "slopes":
            return alibi_slopes(heads) if rng.random() < 0.7 else rng.integers(1, 64, heads) / 64
        case "sink":
            return _numbers(rng, (heads,))
        case "softcap":
            return float(rng.choice([0.5, 2.0, 30.0]))
        case "scale":
            return float(rng.choice([0.125, 0.5, 1.0]))
        case "lengths":
            return rng.integers(0, S + 1, lead)
        case _:
            number = int(rng.integers(1, 4))
            return tuple(np.concatenate([[0], np.sort(rng.integers(0, n + 1, number - 1)), [n]]) for n in (T, S))


def written(rng: np.random.Generator, profile: Profile, count: int, *, most: int = 7) -> Iterator[tuple[Call, Written]]:
    """Yield so many calls that a library has words for."""
    while count:
        call = drawn(rng, most=most)
        try:
            words = profile.write(call)
        except Unsupported:
            continue
        count -= 1
        yield call, words
