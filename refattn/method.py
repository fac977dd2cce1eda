"""What a method declares about itself, and the table of all methods.

A method is a module; its verbs are functions; `METHOD` says what the verbs take, what the answer is linear in, what
its rows sum to, which masks it accepts and what is proved about it. Laws, study and documentation are generated from
these declarations, and one test holds every signature equal to its declaration.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, Literal, NamedTuple

REQUIRED: Any = ...

TABLE: tuple[str, ...] = (
    "refattn.softmax",
    "refattn.sparse.sparse_transformer",
    "refattn.sparse.longformer",
    "refattn.sparse.local_global",
    "refattn.lowrank.linformer",
    "refattn.lowrank.pooling",
    "refattn.kernel.linear_transformer",
    "refattn.kernel.performer",
    "refattn.kernel.gaussian",
    "refattn.kernel.polynomial",
    "refattn.memory.memformer",
    "refattn.memory.segments",
)


def _none() -> Mapping[str, Any]:
    return MappingProxyType({})


class Cost(NamedTuple):
    """What one head costs: pairs formed, floating-point operations, and bytes of float64 read and written once.

    The operations are those of products, two for each multiply-add: what is done element by element, such as
    exponentials, sums and divisions, is not among them. ``python -m benchmarks.complexity`` counts them in the verbs'
    own code.
    """

    pairs: int
    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a verb.

    Parameters
    ----------
    doc
        What it is, in one line.
    domain
        Whether a value is allowed; the verb refuses others.
    typical
        Values that laws draw and study sweeps, or a function of the sizes {"T", "S", "D", "E"} that returns them.
    default
        The default; `REQUIRED` where there is none.
    """

    doc: str
    domain: Callable[[Any], bool]
    typical: tuple[Any, ...] | Callable[[Mapping[str, int]], tuple[Any, ...]]
    default: Any = REQUIRED

    def values(self, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """Return the typical values at these sizes."""
        return self.typical(sizes) if callable(self.typical) else self.typical


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A proved statement about how far the method is from exact softmax.

    Parameters
    ----------
    verb
        The function that evaluates it.
    statement
        Its key in proofs/ and in the tightness table.
    assumes
        What it asks of the arrays, and what evaluating it reads, in one sentence.
    over
        ``"arrays"``: holds for the arrays given. ``"draw"``: holds with probability 1 − δ over what is drawn.
    """

    verb: str
    statement: str
    assumes: str
    over: Literal["arrays", "draw"] = "arrays"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method's declaration.

    Parameters
    ----------
    name, family, paper
        The module's name, its family's folder ("" for softmax itself) and where the map is defined.
    arrays
        Array arguments of `attend` in order, with their trailing axes in letters; "T D?" is optional.
    options, draw_options
        Options of `attend`, and of `draw` and `fit`.
    drawn
        Arrays, or options, that `draw` makes, in the order in which it returns them.
    linear_in
        Arguments that the output is linear in; `weights` drops them and returns one matrix for each.
    budget
        The option (of attend or of draw) that study sweeps, from cheap to dear.
    variants
        Option values that study runs beside the defaults, each a sweep of its own.
    masks
        ``"any"``; ``"prefix"``: rows that see the first keys, never fewer than the row before, such as causal;
        ``"none"``: no mask argument.
    causal
        Whether rows see no key after their own position, whatever the mask: then it is measured against softmax
        attention that is causal too.
    rowwise
        Whether a row's answer depends on no other row of q, so that some rows can be asked for alone.
    approximates
        ``"softmax"``, or None: then it has no `bound`.
    rows
        ``"stochastic"``: weights ≥ 0 that sum to 1 (0 where nothing is seen, less with a sink or an ε);
        ``"sum to 1"``: signed; ``"any"``: nothing is promised.
    permutable
        Whether keys may be permuted together with every array along S, where there is no mask.
    engines
        The engines that answer it.
    claims
        What is proved, the sharpest first.
    """

    name: str
    family: str
    paper: str
    arrays: Mapping[str, str]
    options: Mapping[str, Option] = field(default_factory=_none)
    draw_options: Mapping[str, Option] = field(default_factory=_none)
    drawn: tuple[str, ...] = ()
    linear_in: tuple[str, ...] = ("v",)
    budget: str | None = None
    variants: tuple[Mapping[str, Any], ...] = ()
    masks: Literal["any", "prefix", "none"]
    causal: bool = False
    rowwise: bool = True
    approximates: Literal["softmax"] | None = "softmax"
    rows: Literal["stochastic", "sum to 1", "any"]
    permutable: bool
    engines: tuple[str, ...] = ("softmax",)
    claims: tuple[Claim, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """Array arguments without a default, in order."""
        return tuple(name for name, axes in self.arrays.items() if not axes.endswith("?"))

    @property
    def optional(self) -> tuple[str, ...]:
        """Array arguments that may be left out, in order."""
        return tuple(name for name, axes in self.arrays.items() if axes.endswith("?"))


def accepted(verb: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that a verb takes.

    >>> accepted(lambda q, *, scale: q * scale, {"scale": 0.5, "window": 3})
    {'scale': 0.5}
    """
    names = inspect.signature(verb).parameters
    return {name: value for name, value in options.items() if name in names}


def modules() -> dict[str, ModuleType]:
    """Return every method's module by name, in the order of the table.

    >>> list(modules())[0]
    'softmax'
    """
    found = map(importlib.import_module, TABLE)
    return {module.METHOD.name: module for module in found}
