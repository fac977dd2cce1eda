"""What each method of a study is measured against: exact attention of every problem, computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import masks, perturbation, rounding, softmax
from refattn._mix import tiles
from refattn.masks import Pairs
from refattn.method import Method, accepted
from refattn.study._sweep import Inputs, Sweep, arguments

Array = NDArray[np.float64]


class Exact(NamedTuple):
    """Exact attention of one problem, its rounding, and the range of v over the keys that each row sees."""

    o: Array
    rounding: Array
    spread: Array


class References:
    """The module's own `exact`, or softmax attention: with the mask where the method takes it."""

    def __init__(self, inputs: Inputs) -> None:
        """Compute nothing yet."""
        self._inputs = inputs
        self._known: dict[tuple[Any, ...], Exact] = {}
        self._kept: list[dict[str, Any]] = []  # what the keys name by its id stays
        T, S, pairs = inputs.sizes["T"], inputs.sizes["S"], inputs.pairs
        self._causal = masks.meet(pairs, masks.causal()).on(T, S), masks.causal().on(T, S)
        self._within = pairs is not None and bool(np.all(self._causal[0].count == pairs.count))

    def text(self, declared: Method) -> str:
        """Say what a method is measured against."""
        masked = self._inputs.mask(declared) is not None
        if declared.causal and not (masked and self._within):
            return "softmax, same mask and causal" if masked else "softmax, causal"
        return "softmax, same mask" if masked else "softmax, unmasked"

    def seen(self, declared: Method) -> Pairs | None:
        """Return the pairs that the reference sees."""
        pairs = self._inputs.mask(declared)
        return pairs if not declared.causal else self._causal[pairs is None]

    def of(self, sweep: Sweep, one: Mapping[str, Array], n: int, options: Mapping[str, Any]) -> Exact:
        """Return the reference of problem n, whose arrays and options these are."""
        declared, own = sweep.declared, getattr(sweep.module, "exact", None)
        verb, arrays, given = softmax.attend, {name: one[name] for name in "qkv"}, dict[str, Any]()
        if own is not None:
            verb, arrays, given = own, accepted(own, one), accepted(own, options)
        pairs = self._inputs.mask(declared)
        seen = self.seen(declared) if own is None else pairs
        key = verb, n, pairs is None, declared.causal, *((name, id(x)) for name, x in given.items())
        known = self._known.get(key)
        if known is None or set(arrays) & set(declared.drawn):
            common = {"mask": self._inputs.taken(seen, n), "scale": self._inputs.scale}
            positional, named = arguments(declared, arrays)
            call = named | given | accepted(verb, common)
            o = np.asarray(verb(*positional, **call), np.float64)
            spread = _spread(one["v"], self._inputs.taken(self.seen(declared), n), len(one["q"]))
            known = Exact(o, rounding.allowance(verb, *positional, **call), spread)
            self._known[key] = known
            self._kept.append(given)
        return known


def _spread(v: Array, seen: Pairs | None, T: int) -> Array:
    out, keys = np.zeros((T, v.shape[1])), np.arange(len(v))
    for rows in tiles(np.arange(T), len(v)):
        out[rows] = perturbation.spread(v, None if seen is None else seen.seen(rows, keys))
    return out
