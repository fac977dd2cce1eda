"""What a study runs: its arrays, problem by problem, and every method over its budgets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, masks, method, rounding, softmax
from refattn.heads import Leads, leads, matrix
from refattn.masks import MaskLike, Pairs
from refattn.method import REQUIRED, Claim, Method, accepted
from refattn.study._read import finite

Array = NDArray[np.float64]
Source = Literal["draw", "fit"] | None


class Sweep(NamedTuple):
    """One row to be: a method or variant at one budget, with its options and where what it draws comes from."""

    method: str
    module: ModuleType
    budget: tuple[str, Any] | None
    options: dict[str, Any]
    source: Source

    @property
    def declared(self) -> Method:
        """The method's declaration."""
        return self.module.METHOD

    @property
    def claim(self) -> Claim | None:
        """What is claimed over the arrays of the method's distance from exact attention."""
        return next(claims_over(self.declared, "arrays"), None)

    @property
    def text(self) -> str:
        """The budget as tables show it."""
        return "" if self.budget is None else f"{self.budget[0]}={self.budget[1]}"

    def at(self, budget: Any) -> Sweep:
        """Return the same at another budget."""
        name = self.declared.budget
        return self if name is None else self._replace(budget=(name, budget), options=self.options | {name: budget})


class Drawn(NamedTuple):
    """What a method drew for one head: arrays, and options."""

    arrays: dict[str, Any]
    options: dict[str, Any]


class Inputs:
    """The checked arrays of a study, its mask, scale and measured rows, and how their leading axes make problems."""

    def __init__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        mask: MaskLike = None,
        scale: float | None = None,
        *,
        rows: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check all of them, and choose `rows` rows where there are more."""
        named = (("q", q, "T D"), ("k", k, "S D"), ("v", v, "S E"))
        self.arrays: dict[str, Any] = {name: finite(name, x, axes) for name, x, axes in named}
        (T, D), (S, E) = self.arrays["q"].shape[-2:], self.arrays["v"].shape[-2:]
        _check.size("k", self.arrays["k"].shape[-1], D, "D", "q")
        _check.size("v", S, self.arrays["k"].shape[-2], "S", "k")
        self.sizes = {"T": T, "S": S, "D": D, "E": E}
        _check.scale(scale, D)
        self.scale, self.whole = scale, masks.bind(mask, T, S)
        prefix = self.whole is not None and masks.prefix_ends(self.whole) is not None
        joined = self._leads({})
        self.shape, self.heads = joined.shape, math.prod(joined.shape)
        if min(*self.sizes.values(), self.heads) == 0:
            raise ValueError(f"q, k and v leave nothing to compare: {self.sizes} and {self.heads} heads")
        self._of, self._prefix, self._wide = joined.of, prefix, dict[tuple[str, int], Array]()
        some = T if rows is None else min(T, _check.integer("rows", rows, 1))
        self._measure(np.sort(np.random.default_rng(seed).permutation(T)[:some]))

    def only(self, rows: ArrayLike) -> Inputs:
        """Return the same inputs with other measured rows, numbers of T that ascend."""
        other = copy.copy(self)
        other._measure(np.asarray(rows, np.int64))
        return other

    def masked(self, declared: Method) -> bool:
        """Whether the method takes the study's mask."""
        takes = declared.masks == "any" or (declared.masks == "prefix" and self._prefix)
        return takes and self.whole is not None

    def mask(self, declared: Method) -> Pairs | None:
        """Return what a method is given as its mask: where few rows are measured, one that places them."""
        return self._own if self.masked(declared) else self._all if declared.masks == "any" else None

    def one(self, pairs: Pairs | None, n: int) -> Pairs | None:
        """Return the mask of problem n; one without leading axes is the same for all."""
        return pairs.take(int(self._of["mask"][n])) if pairs is not None and pairs.lead else pairs

    def head(self, n: int) -> dict[str, Array]:
        """Return q, k and v of problem n in float64, all their rows."""
        return {name: self._widened(name, int(self._of[name][n])) for name in "qkv"}

    def _widened(self, name: str, flat: int) -> Array:
        if (name, flat) not in self._wide:
            self._wide[name, flat] = np.asarray(matrix(self.arrays[name], flat), np.float64)
        return self._wide[name, flat]

    def draw(self, sweep: Sweep, n: int, rng: np.random.Generator) -> Drawn:
        """Draw what the method draws for problem n; nothing where it draws nothing."""
        if sweep.source is None:
            return Drawn({}, {})
        verb, options = sweep.module.draw, {"scale": self.scale} | sweep.options
        made = verb(rng, *self.head(n).values(), **accepted(verb, options))
        named = dict(zip(sweep.declared.drawn, made, strict=True))
        own = {name: x for name, x in named.items() if name in sweep.declared.arrays}
        return Drawn(own, {name: x for name, x in named.items() if name not in own})

    def problem(self, sweep: Sweep, n: int, made: Drawn) -> Problem:
        """Return problem n of a sweep, given what was drawn for it."""
        arrays = self.head(n)
        own = {**arrays, "q": arrays["q"][self.rows] if self.sampled else arrays["q"], **made.arrays}
        options = {"scale": self.scale} | sweep.options | made.options
        return Problem(sweep, n, own, options | {"mask": self.one(self.mask(sweep.declared), n)})

    def cost(self, sweep: Sweep, n: int, made: Drawn) -> int:
        """Return the floating-point operations of problem n, with all its rows."""
        mask = self.one(self.whole, n) if self.masked(sweep.declared) else None
        options = {"mask": mask} | sweep.options | made.options
        return sweep.module.cost(**self.sizes, **accepted(sweep.module.cost, options)).flops

    @cached_property
    def exact_cost(self) -> int:
        """The floating-point operations of exact attention with the study's mask, over all heads."""
        return self.over_heads(lambda n: softmax.cost(**self.sizes, mask=self.one(self.whole, n)).flops)

    def over_heads(self, flops: Callable[[int], int]) -> int:
        """Sum over the heads what depends on a head by its mask alone."""
        own = self.whole is not None and bool(self.whole.lead)
        return sum(map(flops, range(self.heads))) if own else self.heads * flops(0)

    def fit(self, sweep: Sweep) -> list[Drawn]:
        """Fit what the method draws, to all heads at once, and return it head by head."""
        verb = sweep.module.fit
        made = verb(*(self.arrays[s] for s in "qkv"), **accepted(verb, {"scale": self.scale} | sweep.options))
        named = dict(zip(sweep.declared.drawn, made, strict=True))
        tails = {name: len(sweep.declared.arrays[name].split()) for name in named}
        of = self._leads({name: x.shape[: x.ndim - tails[name]] for name, x in named.items()}).of
        return [Drawn({name: matrix(x, int(of[name][n])) for name, x in named.items()}, {}) for n in range(self.heads)]

    def _measure(self, rows: NDArray[np.int64]) -> None:
        T, S = self.sizes["T"], self.sizes["S"]
        self.rows, self.sampled = rows, len(rows) < T
        self._all = masks.window(None, None).on(T, S).pick(rows) if self.sampled else None
        self._own = self.whole.pick(rows) if self.sampled and self.whole is not None else self.whole

    def _leads(self, drawn: Mapping[str, tuple[int, ...]]) -> Leads:
        q, k, v = (self.arrays[name].shape[:-2] for name in "qkv")
        mask = {} if self.whole is None else {"mask": self.whole.lead}
        return leads({"q": q} | mask, {"k": k, "v": v, **drawn})


class Problem(NamedTuple):
    """One head of a sweep, with what was drawn for it; q are the rows that are measured."""

    sweep: Sweep
    n: int
    arrays: dict[str, Array]
    options: dict[str, Any]

    def call(self, verb: Callable[..., Any], **more: Any) -> Any:
        """Call a verb of the module with these arrays and those options that it takes."""
        positional, named = arguments(self.sweep.declared, accepted(verb, self.arrays))
        return verb(*positional, **named, **accepted(verb, self.options | more))

    def attend(self) -> Array:
        """Return the method's answer, (rows, E)."""
        return np.asarray(self.call(self.sweep.module.attend), np.float64)

    def bound(self) -> Array | None:
        """Return the claim over the arrays, (rows, E); None where there is none."""
        claim, shape = self.sweep.claim, (len(self.arrays["q"]), self.arrays["v"].shape[1])
        return None if claim is None else np.broadcast_to(self.call(getattr(self.sweep.module, claim.verb)), shape)

    def weights(self) -> Array:
        """Return the sum of the matrices that multiply v: an optional argument that is not given is v."""
        found: Any = self.call(self.sweep.module.weights)
        return np.asarray(found if isinstance(found, np.ndarray) else sum(found), np.float64)

    def rounding(self) -> Array:
        """Return how far rounding may take the answer, (rows, E)."""
        attend = self.sweep.module.attend
        positional, named = arguments(self.sweep.declared, self.arrays)
        return rounding.allowance(attend, *positional, **named, **accepted(attend, self.options))

    def claim_rounding(self) -> Array:
        """Return how far the evaluation of a claim may be below the claim, (rows, E)."""
        return rounding.claim_rounding(self.sweep.module, self.arrays, self.options)


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


def sweeps(
    modules: Sequence[ModuleType], sizes: Mapping[str, int], budgets: Mapping[str, Sequence[Any]] | None = None
) -> Iterator[Sweep]:
    """Yield the rows to be, method by method, from the cheapest budget to the dearest.

    Raises
    ------
    ValueError, TypeError
        Budgets of a method that is not among these or has none, or outside its domain.
    """
    given, names = dict(budgets or {}), [module.METHOD.name for module in modules]
    for name in given:
        _check.choice("budgets", name, tuple(names))
    for module in modules:
        declared: Method = module.METHOD
        swept = _budgets(declared, sizes, given.get(declared.name))
        variants: tuple[Mapping[str, Any], ...] = ({}, *declared.variants)
        for extra in variants:
            variant = "".join(f", {name}={value}" for name, value in extra.items())
            for source in sources(module):
                note = " (fit)" if source == "fit" else ""
                for budget in swept:
                    own = dict(extra) | ({} if budget is None else {budget[0]: budget[1]})
                    options = needed(declared, sizes) | own
                    yield Sweep(declared.name + note + variant, module, budget, options, source)


def _budgets(declared: Method, sizes: Mapping[str, int], given: Sequence[Any] | None) -> list[tuple[str, Any] | None]:
    name = declared.budget
    if name is None:
        if given is not None:
            raise ValueError(f"budgets has {declared.name}, which has no budget")
        return [None]
    option = options_of(declared)[name]
    typical = option.values(sizes)
    if given is None:
        return [(name, value) for value in typical]
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not option.domain(value):
            raise ValueError(f"budgets: {declared.name} has {name} {value!r}; expected {option.doc}")
    return [(name, value) for value in sorted(set(map(int, given)), reverse=typical[0] > typical[-1])]


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


def claims_over(declared: Method, over: Literal["arrays", "draw"]) -> Iterator[Claim]:
    """Yield what is claimed of the method's distance from exact attention."""
    return (claim for claim in declared.claims if claim.over == over and declared.approximates == "softmax")


def arguments(declared: Method, arrays: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return those of a method's arrays that are here: the required by position, the optional by name."""
    positional = [arrays[name] for name in declared.required if name in arrays]
    return positional, {name: arrays[name] for name in declared.optional if name in arrays}
