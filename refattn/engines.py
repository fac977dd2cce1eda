"""Finding the engine that answers a problem, and the one checked `Problem` that it gets.

A backend implements engines — few hot loops — and never the methods. An engine is a module with

- ``forward(problem, backend) -> Partial``: (o, lse) in the dtype that it computed in;
- ``backward(problem, do, dlse, backend)``, where it has one;
- ``refuses(problem, backend) -> str | None``: its reason, where it cannot answer.

Built-in backends stand in a literal table; other people's are entry points of the group ``refattn.backends`` whose
value is a package with one module for each engine. There are no priorities, no environment variable and no silent
fall-back.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, masks
from refattn import bias as _bias
from refattn.heads import Leads, leads, matrix
from refattn.lifted import Lifted

Order = Literal["softcap, bias", "bias, softcap"]
ORDERS: tuple[str, ...] = ("softcap, bias", "bias, softcap")
BUILT_IN = {"cpu": "refattn_cpu"}
EXTRAS = {"cpu": "numba"}


class Unsupported(ValueError):
    """An engine's refusal: it says what it cannot do rather than answer something else."""


@dataclass(frozen=True)
class Backend:
    """A backend by name, with its options.

    Parameters
    ----------
    name
        ``"numpy"``, ``"cpu"``, or an entry point of the group ``refattn.backends``.
    dtype
        What a compiled engine computes in: ``"float32"`` or ``"float64"``; None takes the widest of q, k and v
        (integers and 16-bit floats in float32).
    threads
        How many threads share the rows; None takes the machine's cores.

    Examples
    --------
    >>> Backend("cpu", dtype="float32", threads=2)
    Backend(name='cpu', dtype='float32', threads=2)
    """

    name: str
    dtype: Literal["float32", "float64"] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        if self.dtype is not None:
            _check.choice("dtype", self.dtype, ("float32", "float64"))
        if self.threads is not None:
            _check.integer("threads", self.threads, 1)
        if self.name == "numpy" and (self.dtype not in (None, "float64") or self.threads is not None):
            raise ValueError(
                f"dtype is {self.dtype!r}, threads is {self.threads!r}; numpy answers in float64, on its own"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One checked softmax problem: arrays as given, a bound mask and bias, and who reads what.

    The answer's leading axes are `leads.shape`. Problem n of them reads operand x at flat index ``leads.of[x][n]`` of
    x's own leading axes, which covers broadcasting and grouped heads without a copy.
    """

    q: Any
    k: Any
    v: Any
    pairs: masks.Pairs | None
    bias: _bias.Bias | None
    sink: Any
    scale: float | None
    softcap: float | None
    order: Order
    leads: Leads

    @property
    def multiplier(self) -> float:
        """The scale as a float; `scale` is None where the real number 1/√D is meant."""
        return _check.scale(self.scale, self.q.shape[-1])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """T, S, D, E."""
        return self.q.shape[-2], self.k.shape[-2], self.q.shape[-1], self.v.shape[-1]

    def one(self, n: int) -> One:
        """Return problem n alone: matrices as views in their own dtype, its mask, its sink."""
        of = self.leads.of
        pairs = None if self.pairs is None else self.pairs.take(int(of["mask"][n]))
        sink = self.sink
        if sink is not None and not isinstance(sink, Lifted):
            sink = sink.reshape(-1)[of["sink"][n]]
        flat = 0 if self.bias is None else int(of["bias"][n])
        q, k, v = (matrix(x, int(of[s][n])) for s, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        return One(self, q, k, v, pairs, sink, flat)

    def all(self) -> Iterator[One]:
        """Yield every problem in the order of the flat leading axes."""
        return map(self.one, range(math.prod(self.leads.shape)))


@dataclass(frozen=True, eq=False)
class One:
    """A problem without leading axes. See `Problem.one`."""

    problem: Problem
    q: Any
    k: Any
    v: Any
    pairs: masks.Pairs | None
    sink: Any
    bias_index: int

    def bias(self, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> Any:
        """Return the bias of a block, (rows, keys); a table in another arithmetic is returned whole."""
        whole = self.problem.bias
        if isinstance(whole, _bias.Table) and isinstance(whole.array, Lifted):
            return whole.array
        return None if whole is None else whole.block(self.bias_index, rows, keys)

    def seen(self) -> NDArray[np.bool_]:
        """Return which pairs are seen, (T, S): for dense evaluations of small problems."""
        T, S = int(self.q.shape[0]), int(self.k.shape[0])
        rows, keys = np.arange(T), np.arange(S)
        seen = np.ones((len(rows), len(keys)), bool) if self.pairs is None else self.pairs.seen(rows, keys)
        b = self.bias(rows, keys)
        if b is None:
            return seen
        return seen & ~np.isneginf(b.floats() if isinstance(b, Lifted) else b)


def problem(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias: _bias.BiasLike = None,
    sink: ArrayLike | None = None,
    softcap: float | None = None,
    order: Order = "softcap, bias",
    mask: masks.MaskLike = None,
    scale: float | None = None,
) -> Problem:
    """Check a call once and return it as a `Problem`; v may be `_check.WEIGHTS`."""
    q, k, v = _check.qkv(q, k, v)
    T, S = q.shape[-2], k.shape[-2]
    if scale is not None:
        scale = _check.finite("scale", scale)
    if softcap is not None:
        softcap = _check.positive("softcap", softcap)
    _check.choice("order", order, ORDERS)
    pairs, bound = masks.bind(mask, T, S), _bias.bind(bias, T, S)
    queries = {"q": q.shape[:-2]}
    if pairs is not None:
        queries["mask"] = pairs.lead
    if bound is not None:
        queries["bias"] = bound.lead
    if sink is not None:
        sink = _check.array("sink", sink, "")
        queries["sink"] = np.shape(sink)
    joined = leads(queries, {"k": k.shape[:-2], "v": v.shape[:-2]})
    if isinstance(q, Lifted) and joined.shape:
        raise ValueError(f"mask, bias or sink has leading axes {joined.shape}; another arithmetic takes one problem")
    return Problem(
        q=q, k=k, v=v, pairs=pairs, bias=bound, sink=sink, scale=scale, softcap=softcap, order=order, leads=joined
    )


def find(engine: str, backend: Backend) -> ModuleType:
    """Return a backend's module for an engine.

    Raises
    ------
    ValueError
        An unknown backend: the message lists those that exist.
    ImportError
        A backend whose packages are not installed: the message has the pip line.
    Unsupported
        A backend that has no such engine.
    """
    package = BUILT_IN.get(backend.name)
    if package is None:
        from importlib.metadata import entry_points

        others = {point.name: point.value for point in entry_points(group="refattn.backends")}
        package = others.get(backend.name)
        if package is None:
            known = ", ".join(map(repr, ("numpy", *BUILT_IN, *sorted(others))))
            raise ValueError(f"backend is {backend.name!r}; expected one of {known}")
    try:
        importlib.import_module(package)
        return importlib.import_module(f"{package}.{engine}")
    except ModuleNotFoundError as error:
        if error.name == f"{package}.{engine}":
            raise Unsupported(f"backend {backend.name!r} has no engine for {engine}") from None
        extra = backend.name if backend.name in EXTRAS else None
        line = f"; install it with: pip install 'refattn[{extra}]'" if extra else ""
        raise ImportError(f"backend {backend.name!r} needs {error.name}, which is not installed{line}") from None


def choose(backend: str | Backend, engine: str) -> Backend:
    """Return a backend by name or as it is, once it is known to have the engine."""
    if not isinstance(backend, (str, Backend)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"backend is {backend!r}; expected a name or a Backend")
    chosen = backend if isinstance(backend, Backend) else Backend(backend)
    if chosen.name != "numpy":
        find(engine, chosen)
    return chosen


def ask(engine: str, verb: str, backend: Backend, problem: Any, *more: Any) -> Any:
    """Have a backend's engine answer a problem, or refuse it.

    Raises
    ------
    Unsupported
        The backend's own reason, or a verb that its engine does not have.
    """
    module = find(engine, backend)
    if not hasattr(module, verb):
        raise Unsupported(f"backend {backend.name!r} has no {verb} for {engine}")
    reason = module.refuses(problem, backend)
    if reason:
        raise Unsupported(f"backend {backend.name!r}: {reason}")
    return getattr(module, verb)(problem, *more, backend)
