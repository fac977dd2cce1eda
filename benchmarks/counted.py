"""An arithmetic that counts: the verbs' own code is run in float64, and what it would cost is tallied beside.

A multiply-add is two operations. Products of matrices count as many as they have; so do the engines, whose order of
operations is not spelled out: softmax forms the pairs that its mask's predicate shows, asked pair by pair, and the
linear engine a state. What is done element by element (exponentials, sums, divisions) is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from refattn import softmax
from refattn.bias import Table
from refattn.lifted import Lifted
from refattn.method import REQUIRED, Cost, Method, accepted


@dataclass
class Tally:
    """Floating-point operations: of products, and of each element."""

    products: int = 0
    elementwise: int = 0


class Counted(Lifted):
    """Float64 values whose operations are counted, in the `tally` of a subclass that `count` makes for one run."""

    tally: ClassVar[Tally]

    def __init__(self, value: Any) -> None:
        self.value: NDArray[np.float64] = np.asarray(value, np.float64)
        self.shape = self.value.shape

    @classmethod
    def lift(cls, x: Any) -> Self:
        return x if isinstance(x, cls) else cls(x)

    @classmethod
    def join(cls, parts: Sequence[Any], axis: int) -> Self:
        return cls(np.concatenate([x.value for x in parts], axis))

    @property
    def mT(self) -> Counted:  # noqa: N802
        return type(self)(self.value.T)

    def __getitem__(self, index: Any) -> Counted:
        return type(self)(self.value[index])

    def floats(self) -> NDArray[np.float64]:
        return self.value

    def sum(self, axis: int, keepdims: bool = False) -> Counted:
        self.tally.elementwise += self.value.size
        return type(self)(self.value.sum(axis, keepdims=keepdims))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options or ufunc.__name__ not in self.UFUNCS:
            return NotImplemented
        values = [self.lift(x).value for x in inputs]
        out = ufunc(*values)
        if ufunc is np.matmul:
            self.tally.products += 2 * out.size * values[0].shape[-1]
        else:
            self.tally.elementwise += out.size
        return type(self)(out)

    def softmax_forward(self, one: Any) -> tuple[Any, Any]:
        call, seen = one.problem, int(one.seen().sum())
        self.tally.products += 2 * seen * (call.q.shape[-1] + call.v.shape[-1])
        self.tally.elementwise += seen
        bias = call.bias
        if isinstance(bias, Table):
            bias = Table(_plain(bias.array))
        options = {"softcap": call.softcap, "order": call.order, "mask": one.pairs, "scale": call.scale}
        sink = None if one.sink is None else _plain(one.sink)
        part = softmax.partial(*map(_plain, (one.q, one.k, one.v)), bias=bias, sink=sink, **options)
        return type(self)(part.o), type(self)(part.lse)

    def linear_forward(self, fq: Any, fk: Any, v: Any, seen: NDArray[np.bool_], eps: float) -> Any:
        fq, v = _plain(fq), _plain(v)
        if fk is None:  # fq is κ, formed before
            self.tally.products += 2 * int(seen.sum()) * v.shape[1]
            kappa = np.where(seen, fq, 0.0)
        else:
            fk = _plain(fk)
            self.tally.products += 2 * (len(fq) + len(fk)) * fk.shape[1] * (v.shape[1] + 1)
            kappa = np.where(seen, fq @ fk.T, 0.0)
        den = kappa.sum(axis=1, keepdims=True) + eps
        return type(self)(np.divide(kappa @ v, den, out=np.zeros((len(fq), v.shape[1])), where=den != 0))


def _plain(x: Any) -> NDArray[np.float64]:
    return x.value if isinstance(x, Counted) else np.asarray(x, np.float64)


class Call(NamedTuple):
    """A call of a method's `attend`, and all that `cost` may want to know of it."""

    module: ModuleType
    sizes: Mapping[str, int]
    arrays: Mapping[str, Any]
    options: Mapping[str, Any]

    def arguments(self) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        """Return `attend`, its arrays and its options."""
        verb = self.module.attend
        return verb, [self.arrays[name] for name in self.module.METHOD.required], accepted(verb, self.options)

    def attend(self, lift: Callable[[Any], Any] = np.asarray) -> Any:
        """Run it, in the arithmetic that `lift` makes."""
        verb, arrays, options = self.arguments()
        return verb(*map(lift, arrays), **options)

    def cost(self) -> Cost:
        """What the method says of it."""
        return self.module.cost(**self.sizes, **accepted(self.module.cost, self.options))


def call(module: ModuleType, sizes: Mapping[str, int], mask: Any = None, **chosen: Any) -> Call:
    """Build a call at some sizes: required options not chosen are the first that is typical; what is drawn is drawn."""
    declared: Method = module.METHOD
    every = {**declared.draw_options, **declared.options}
    options = {
        name: option.values(sizes)[0]
        for name, option in every.items()
        if option.default is REQUIRED and name not in declared.drawn
    } | chosen
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        name: rng.standard_normal([sizes[axis] for axis in declared.arrays[name].split()])
        for name in declared.required
        if name not in declared.drawn
    }
    if declared.drawn:
        made = module.draw(rng, *(arrays[name] for name in "qkv"), **accepted(module.draw, options))
        for name, x in zip(declared.drawn, made, strict=True):
            (arrays if name in declared.arrays else options)[name] = x
    if declared.masks != "none":
        options["mask"] = mask
    return Call(module, sizes, arrays, options)


def count(one: Call) -> tuple[Tally, Any]:
    """Return what a call of `attend` does, by its own code, and its answer."""
    kind = type("Counting", (Counted,), {"tally": Tally()})
    answer = one.attend(kind.lift)
    return kind.tally, answer
