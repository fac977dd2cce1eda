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
        self._known: dict[tuple[tuple[bool, bool], int], Exact] = {}
        T, S, own = inputs.sizes["T"], inputs.sizes["S"], inputs.whole
        both = masks.meet(own, masks.causal()).on(T, S)
        self._within = own is not None and bool(np.all(both.count == own.count))
        whole = {(False, False): None, (True, False): own, (False, True): masks.causal().on(T, S), (True, True): both}
        self._seen = {
            kind: pairs.pick(inputs.rows) if inputs.sampled and pairs is not None else pairs
            for kind, pairs in whole.items()
        }

    def text(self, declared: Method) -> str:
        """Say what a method is measured against."""
        masked, causal = self._kind(declared)
        if causal:
            return "softmax, same mask and causal" if masked else "softmax, causal"
        return "softmax, same mask" if masked else "softmax, unmasked"

    def seen(self, declared: Method) -> Pairs | None:
        """Return the pairs that the reference sees, of the measured rows."""
        return self._seen[self._kind(declared)]

    def of(self, problem: Problem) -> Exact:
        """Return the reference of a problem: the module's own where it reads more than q, k and v."""
        declared, module, one = problem.sweep.declared, problem.sweep.module, problem.arrays
        kind, own = self._kind(declared), getattr(module, "exact", None)
        if own is not None and set(accepted(own, one)) - set("qkv"):
            positional, named = arguments(declared, accepted(own, one))
            return self._exact(own, positional, named | accepted(own, problem.options), one["v"], kind, problem.n)
        if (kind, problem.n) not in self._known:
            mask = self._inputs.one(self._seen[kind], problem.n)
            common, arrays = {"mask": mask, "scale": self._inputs.scale}, [one[name] for name in "qkv"]
            self._known[kind, problem.n] = self._exact(softmax.attend, arrays, common, one["v"], kind, problem.n)
        return self._known[kind, problem.n]

    def _kind(self, declared: Method) -> tuple[bool, bool]:
        """Return whether the study's mask is seen through, and causality beside it."""
        masked = self._inputs.masked(declared)
        return masked, declared.causal and not (masked and self._within)

    def _exact(self, verb: Any, arrays: list[Any], named: dict[str, Any], v: Array, kind: Any, n: int) -> Exact:
        o = np.asarray(verb(*arrays, **named), np.float64)
        return Exact(o, rounding.allowance(verb, *arrays, **named), _spread(v, self._inputs.one(self._seen[kind], n)))


def _spread(v: Array, seen: Pairs | None) -> Array:
    """Return the range of each column of v over the keys that any of the rows sees."""
    some = np.ones(len(v), np.bool_)
    if seen is not None:
        some = np.logical_or.reduce([seen.seen(x, slice(None)).any(axis=0) for x in tiles(np.arange(seen.T), len(v))])
    high: Array = v.max(axis=0, initial=-np.inf, where=some[:, None])
    low: Array = v.min(axis=0, initial=np.inf, where=some[:, None])
    return np.maximum(high - low, 0.0)
