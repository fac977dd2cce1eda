"""What a study runs: its arrays, problem by problem, and every method over its budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, masks, method
from refattn.heads import Leads, leads
from refattn.masks import MaskLike, Pairs
from refattn.method import REQUIRED, Claim, Method, accepted
from refattn.study._read import finite

Array = NDArray[np.float64]
Source = Literal["draw", "fit"] | None


class Sweep(NamedTuple):
    """One row to be: a method at one budget, with its other options and where what it draws comes from."""

    name: str
    module: ModuleType
    budget: tuple[str, Any] | None
    options: dict[str, Any]
    source: Source

    @property
    def declared(self) -> Method:
        """The method's declaration."""
        return self.module.METHOD

    @property
    def text(self) -> str:
        """The budget as tables show it."""
        return "" if self.budget is None else f"{self.budget[0]}={self.budget[1]}"


class Drawn(NamedTuple):
    """What a method drew: arrays, for all heads at once, and options."""

    arrays: dict[str, Any]
    options: dict[str, Any]


class Inputs:
    """The checked arrays of a study, its mask and scale, and how their leading axes make problems."""

    def __init__(self, q: ArrayLike, k: ArrayLike, v: ArrayLike, mask: MaskLike, scale: float | None) -> None:
        """Check all of them."""
        named = (("q", q, "T D"), ("k", k, "S D"), ("v", v, "S E"))
        self.arrays: dict[str, Any] = {name: finite(name, x, axes) for name, x, axes in named}
        (T, D), (S, E) = self.arrays["q"].shape[-2:], self.arrays["v"].shape[-2:]
        _check.size("k", self.arrays["k"].shape[-1], D, "D", "q")
        _check.size("v", S, self.arrays["k"].shape[-2], "S", "k")
        self.sizes = {"T": T, "S": S, "D": D, "E": E}
        _check.scale(scale, D)
        self.scale, self.pairs = scale, masks.bind(mask, T, S)
        self.prefix = self.pairs is not None and masks.prefix_ends(self.pairs) is not None
        joined = self._leads({})
        self.shape, self.heads = joined.shape, math.prod(joined.shape)
        if min(*self.sizes.values(), self.heads) == 0:
            raise ValueError(f"q, k and v leave nothing to compare: {self.sizes} and {self.heads} heads")
        self._mask_of = joined.of.get("mask")

    def mask(self, declared: Method) -> Pairs | None:
        """Return the mask, where the method takes it."""
        return self.pairs if declared.masks == "any" or (declared.masks == "prefix" and self.prefix) else None

    def taken(self, pairs: Pairs | None, n: int) -> Pairs | None:
        """Return the mask of problem n; one that is not the study's own, such as causal, is the same for all."""
        return pairs if pairs is None or self._mask_of is None else pairs.take(int(self._mask_of[n]))

    def problems(
        self, drawn: Drawn, declared: Method, which: Iterable[int] | None = None
    ) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield the number of each problem and its arrays, without leading axes, in float64."""
        arrays = self.arrays | drawn.arrays
        lead = {name: x.shape[: x.ndim - len(declared.arrays[name].split())] for name, x in arrays.items()}
        of = self._leads({name: lead[name] for name in drawn.arrays}).of
        for n in range(self.heads) if which is None else which:
            at: dict[str, Any] = {name: np.unravel_index(of[name][n], lead[name]) for name in arrays}
            yield int(n), {name: np.asarray(x[at[name]], np.float64) for name, x in arrays.items()}

    def _leads(self, drawn: Mapping[str, tuple[int, ...]]) -> Leads:
        q, k, v = (self.arrays[name].shape[:-2] for name in "qkv")
        mask = {} if self.pairs is None else {"mask": self.pairs.lead}
        return leads({"q": q} | mask, {"k": k, "v": v, **drawn})


def chosen(names: Sequence[str] | None) -> list[ModuleType]:
    """Return the named methods, or all that belong to a family."""
    known = {name: m for name, m in method.modules().items() if m.METHOD.family}
    if names is None:
        return list(known.values())
    if isinstance(names, str):
        raise TypeError(f"methods is {names!r}; expected a sequence of names")
    if not names:
        raise ValueError(f"methods is empty; expected some of {', '.join(map(repr, known))}")
    for name in names:
        _check.choice("methods", name, tuple(known))
    return [known[name] for name in names]


def sweeps(modules: Sequence[ModuleType], sizes: Mapping[str, int]) -> Iterator[Sweep]:
    """Yield the rows to be, method by method, from the cheapest budget to the dearest."""
    for module in modules:
        declared: Method = module.METHOD
        swept = (None,) if declared.budget is None else options_of(declared)[declared.budget].values(sizes)
        budgets = [None if declared.budget is None else (declared.budget, x) for x in swept]
        variants: tuple[Mapping[str, Any], ...] = ({}, *declared.variants)
        for extra in variants:
            variant = "".join(f", {name}={value}" for name, value in extra.items())
            for source in sources(module):
                note = " (fit)" if source == "fit" else ""
                for budget in budgets:
                    own = dict(extra) | ({} if budget is None else {budget[0]: budget[1]})
                    options = needed(declared, sizes) | own
                    yield Sweep(declared.name + note + variant, module, budget, options, source)


def options_of(declared: Method) -> dict[str, method.Option]:
    """Return the options of `attend`, `draw` and `fit` that are chosen rather than drawn."""
    every = {**declared.draw_options, **declared.options}
    return {name: option for name, option in every.items() if name not in declared.drawn}


def needed(declared: Method, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the first typical value of each option that has no default and is not swept."""
    return {
        name: option.values(sizes)[0]
        for name, option in options_of(declared).items()
        if option.default is REQUIRED and name != declared.budget
    }


def sources(module: ModuleType) -> tuple[Source, ...]:
    """Return the verbs that make what the method draws."""
    if not module.METHOD.drawn:
        return (None,)
    return ("draw", "fit") if hasattr(module, "fit") else ("draw",)


def drawn(sweep: Sweep, inputs: Inputs, rng: np.random.Generator) -> Drawn:
    """Draw or fit what the method draws, for all heads at once."""
    if sweep.source is None:
        return Drawn({}, {})
    verb, options = getattr(sweep.module, sweep.source), {"scale": inputs.scale} | sweep.options
    first = (rng,) if sweep.source == "draw" else ()
    made = verb(*first, *(inputs.arrays[name] for name in "qkv"), **accepted(verb, options))
    named = dict(zip(sweep.declared.drawn, made, strict=True))
    arrays = {name: x for name, x in named.items() if name in sweep.declared.arrays}
    return Drawn(arrays, {name: x for name, x in named.items() if name not in arrays})


def claims_over(declared: Method, over: Literal["arrays", "draw"]) -> Iterator[Claim]:
    """Yield what is claimed of the method's distance from exact attention."""
    return (claim for claim in declared.claims if claim.over == over and declared.approximates == "softmax")


def arguments(declared: Method, arrays: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return those of a method's arrays that are here: the required by position, the optional by name."""
    positional = [arrays[name] for name in declared.required if name in arrays]
    return positional, {name: arrays[name] for name in declared.optional if name in arrays}
