"""What each method of a study is measured against: exact attention of every problem, computed once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import masks, rounding, softmax
from refattn._mix import tiles
from refattn.masks import Pairs
from refattn.method import Method, accepted
from refattn.study._sweep import Inputs, Problem, arguments

Array = NDArray[np.float64]


class Exact(NamedTuple):
    """Exact attention of the measured rows of a problem, its rounding, and the range of each column of v, (E,)."""

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
        T, S, own = inputs.sizes["T"], inputs.sizes["S"], inputs.whole
        causal = masks.meet(own, masks.causal()).on(T, S), masks.causal().on(T, S)
        self._within = own is not None and bool(np.all(causal[0].count == own.count))
        self._causal = [pairs.pick(inputs.rows) if inputs.sampled else pairs for pairs in causal]

    def text(self, declared: Method) -> str:
        """Say what a method is measured against."""
        masked = self._inputs.masked(declared)
        if declared.causal and not (masked and self._within):
            return "softmax, same mask and causal" if masked else "softmax, causal"
        return "softmax, same mask" if masked else "softmax, unmasked"

    def seen(self, declared: Method) -> Pairs | None:
        """Return the pairs that the reference sees, of the measured rows."""
        masked = self._inputs.masked(declared)
        return self._causal[not masked] if declared.causal else self._inputs.mask(declared) if masked else None

    def of(self, problem: Problem) -> Exact:
        """Return the reference of a problem."""
        declared, module, one = problem.sweep.declared, problem.sweep.module, problem.arrays
        own = getattr(module, "exact", None)
        verb, arrays, given = softmax.attend, {name: one[name] for name in "qkv"}, dict[str, Any]()
        seen, options = self.seen(declared), problem.options
        if own is not None:
            verb, arrays, given = own, accepted(own, one), accepted(own, options)
            given = {name: x for name, x in given.items() if name not in ("mask", "scale")}
            seen = self._inputs.mask(declared)
        key = verb, problem.n, self._inputs.masked(declared), declared.causal, *((s, id(x)) for s, x in given.items())
        known = self._known.get(key)
        if known is None or set(arrays) & set(declared.drawn):
            common = {"mask": self._inputs.one(seen, problem.n), "scale": self._inputs.scale}
            positional, named = arguments(declared, arrays)
            call = named | given | accepted(verb, common)
            o = np.asarray(verb(*positional, **call), np.float64)
            spread = _spread(one["v"], self._inputs.one(self.seen(declared), problem.n))
            known = Exact(o, rounding.allowance(verb, *positional, **call), spread)
            self._known[key] = known
            self._kept.append(given)
        return known


def _spread(v: Array, seen: Pairs | None) -> Array:
    """Return the range of each column of v over the keys that any of the rows sees."""
    some = np.ones(len(v), np.bool_)
    if seen is not None:
        some = np.logical_or.reduce([seen.seen(x, slice(None)).any(axis=0) for x in tiles(np.arange(seen.T), len(v))])
    high: Array = v.max(axis=0, initial=-np.inf, where=some[:, None])
    low: Array = v.min(axis=0, initial=np.inf, where=some[:, None])
    return np.maximum(high - low, 0.0)
