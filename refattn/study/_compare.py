"""The sweep: every method that approximates softmax, over its budgets, against exact attention."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, masks, method, perturbation, rounding, softmax
from refattn._mix import tiles
from refattn.heads import leads, matrix
from refattn.masks import MaskLike, Pairs
from refattn.method import REQUIRED, accepted
from refattn.study._read import finite
from refattn.study._table import Row, Table

Array = NDArray[np.float64]
Source = Literal["draw", "fit"] | None


class _Sweep(NamedTuple):
    """One row to be: a method at one budget, with its other options and where its drawn arrays come from."""

    name: str
    module: ModuleType
    budget: tuple[str, Any] | None
    options: dict[str, Any]
    source: Source


class _Exact(NamedTuple):
    """Exact attention of one problem, its rounding, and the range of v over the keys that each row sees."""

    o: Array
    rounding: Array
    spread: Array


class _Measured(NamedTuple):
    """One problem, elementwise: |õ − o|, the range of v, the claim, and what rounding may add to the error and it."""

    error: Array
    spread: Array
    bound: Array | None
    slack: Array
    seconds: float


def compare(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: MaskLike = None,
    scale: float | None = None,
    methods: Sequence[str] | None = None,
    seed: int = 0,
    title: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    r"""Measure how far each efficient attention is from exact softmax on these arrays, and check its bound.

    Each method that approximates softmax is swept over the typical values of its budget, its other options at their
    defaults. A method that takes the mask is measured against exact attention with that mask; one that cannot, such
    as Linformer, against unmasked attention, and the row says so. Cost is always a part of exact attention with the
    mask. A bound holds where, in every element,

    .. math:: |\mathrm{fl}(\tilde o) - \mathrm{fl}(o)| \le \mathrm{bound} + \mathrm{rounding}

    with the rounding of both answers, derived from the arrays by `refattn.rounding.allowance`, and of the bound itself.
    Where an answer or its rounding is not finite, as when logits or values overflow, there is nothing to compare.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    mask : Mask or (..., T, S) of bool, optional
        Which pairs are seen; see `refattn.masks`.
    scale : float, optional
        The scale of the exact attention; the real number 1/√D unless given.
    methods : sequence of str, optional
        Names from the table of methods; all of them unless given.
    seed : int
        Seeds the generator of each row's drawn arrays.
    title : str
        What the table is called.
    progress : callable, optional
        Called with (done, total) before the first problem and after each.

    Returns
    -------
    Table

    Raises
    ------
    ValueError, TypeError
        Arrays that do not fit, hold NaN or infinity, or are empty; an unknown method.

    Examples
    --------
    >>> from refattn import masks, study
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 4))
    >>> table = study.compare(q, k, v, mask=masks.causal(), methods=["longformer", "linear_transformer"])
    >>> [row.budget for row in table.rows]
    ['window=1', 'window=2', 'window=1', 'window=2', '']
    >>> all(row.holds for row in table.rows)
    True
    """
    given = {name: finite(name, x, axes) for name, x, axes in (("q", q, "T D"), ("k", k, "S D"), ("v", v, "S E"))}
    (T, D), (S, E) = given["q"].shape[-2:], given["v"].shape[-2:]
    _check.size("k", given["k"].shape[-1], D, "D", "q")
    _check.size("v", S, given["k"].shape[-2], "S", "k")
    sizes = {"T": T, "S": S, "D": D, "E": E}
    _check.scale(scale, D)
    seed = _check.integer("seed", seed, 0)
    pairs = masks.bind(mask, T, S)
    queries = {"q": given["q"].shape[:-2]} | ({} if pairs is None else {"mask": pairs.lead})
    keyed = {name: given[name].shape[:-2] for name in "kv"}
    lead = leads(queries, keyed)
    heads = math.prod(lead.shape)
    if min(*sizes.values(), heads) == 0:
        raise ValueError(f"q, k and v leave nothing to compare: {sizes} and {heads} heads")
    seen = [None] * heads if pairs is None else [pairs.take(int(n)) for n in lead.of["mask"]]
    takes = {
        "any": pairs is not None,
        "prefix": pairs is not None and masks.prefix_ends(pairs) is not None,
        "none": False,
    }
    whole = sum(softmax.cost(**sizes, mask=one).flops for one in seen)
    sweeps = list(_sweeps(_chosen(methods), sizes))

    report, total = progress or _silent, len(sweeps) * heads
    report(0, total)
    exacts: dict[tuple[int, bool], _Exact] = {}
    rows: list[Row] = []
    for sweep in sweeps:
        drawn = _drawn(sweep, given, scale, seed)
        axes = {name: len(sweep.module.METHOD.arrays[name].split()) for name in drawn}
        of = leads(queries, keyed | {name: x.shape[: x.ndim - axes[name]] for name, x in drawn.items()}).of
        masked = takes[sweep.module.METHOD.masks]
        found: list[_Measured] = []
        flops = 0
        for n in range(heads):
            parts = ((name, matrix(x, of[name][n], axes.get(name, 2))) for name, x in (given | drawn).items())
            one = {name: np.asarray(x, np.float64) for name, x in parts}
            mine = seen[n] if masked else None
            common = {"mask": mine, "scale": scale} | sweep.options
            if (n, masked) not in exacts:
                exacts[n, masked] = _exact(one, mine, scale)
            flops += sweep.module.cost(**sizes, **accepted(sweep.module.cost, common)).flops
            found.append(_measure(sweep.module, one, exacts[n, masked], common))
            report(len(rows) * heads + n + 1, total)
        reference = "softmax, same mask" if masked else "softmax, unmasked"
        rows.append(_row(sweep, reference, flops / whole if whole else math.nan, found))
    return Table(rows, title)


def _silent(done: int, total: int) -> None:
    pass


def _chosen(names: Sequence[str] | None) -> list[ModuleType]:
    known = {name: m for name, m in method.modules().items() if m.METHOD.approximates == "softmax"}
    if names is None:
        return list(known.values())
    if isinstance(names, str):
        raise TypeError(f"methods is {names!r}; expected a sequence of names")
    if not names:
        raise ValueError(f"methods is empty; expected some of {', '.join(map(repr, known))}")
    for name in names:
        _check.choice("methods", name, tuple(known))
    return [known[name] for name in names]


def _sweeps(modules: Sequence[ModuleType], sizes: Mapping[str, int]) -> Iterator[_Sweep]:
    """Yield the rows to be, method by method, from the cheapest budget to the dearest."""
    for module in modules:
        declared: method.Method = module.METHOD
        every = {**declared.draw_options, **declared.options}
        base = {
            name: option.values(sizes)[0]
            for name, option in every.items()
            if option.default is REQUIRED and name != declared.budget
        }
        swept = (None,) if declared.budget is None else every[declared.budget].values(sizes)
        budgets = [None if declared.budget is None else (declared.budget, x) for x in swept]
        variants: tuple[Mapping[str, Any], ...] = ({}, *declared.variants)
        for extra in variants:
            variant = "".join(f", {name}={value}" for name, value in extra.items())
            for source in _sources(module):
                note = " (fit)" if source == "fit" else ""
                for budget in budgets:
                    options = base | dict(extra) | ({} if budget is None else {budget[0]: budget[1]})
                    yield _Sweep(declared.name + note + variant, module, budget, options, source)


def _sources(module: ModuleType) -> tuple[Source, ...]:
    if not module.METHOD.drawn:
        return (None,)
    return ("draw", "fit") if hasattr(module, "fit") else ("draw",)


def _drawn(sweep: _Sweep, given: Mapping[str, Any], scale: float | None, seed: int) -> dict[str, Any]:
    """Draw or fit the method's own arrays, for all heads at once."""
    if sweep.source is None:
        return {}
    verb, options = getattr(sweep.module, sweep.source), {"scale": scale} | sweep.options
    first = (np.random.default_rng(seed),) if sweep.source == "draw" else ()
    arrays = verb(*first, *(given[name] for name in "qkv"), **accepted(verb, options))
    return dict(zip(sweep.module.METHOD.drawn, arrays, strict=True))


def _exact(one: Mapping[str, Array], seen: Pairs | None, scale: float | None) -> _Exact:
    q, k, v = (one[name] for name in "qkv")
    T, S = len(q), len(k)
    spread = np.zeros((T, v.shape[1]))
    for rows in tiles(np.arange(T), S):
        spread[rows] = perturbation.spread(v, None if seen is None else seen.seen(rows, np.arange(S)))
    o = np.asarray(softmax.attend(q, k, v, mask=seen, scale=scale), np.float64)
    return _Exact(o, rounding.allowance(softmax.attend, q, k, v, mask=seen, scale=scale), spread)


def _measure(module: ModuleType, one: Mapping[str, Array], exact: _Exact, common: Mapping[str, Any]) -> _Measured:
    declared: method.Method = module.METHOD
    arrays = [one[name] for name in declared.required]
    options = accepted(module.attend, common)
    start = time.perf_counter()
    o = np.asarray(module.attend(*arrays, **options), np.float64)
    seconds = time.perf_counter() - start
    own = rounding.allowance(module.attend, *arrays, **options)
    error = np.abs(o - exact.o)
    slack = exact.rounding + own + rounding.U * error
    claim = next((c for c in declared.claims if c.over == "arrays"), None)
    if claim is None:
        return _Measured(error, exact.spread, None, slack, seconds)
    verb = getattr(module, claim.verb)
    bound = np.broadcast_to(verb(*arrays, **accepted(verb, common)), error.shape)
    evaluation = rounding.claim_rounding(module, one, common)
    return _Measured(error, exact.spread, bound, slack + own + evaluation, seconds)  # õ is in the claim too


def _over(x: Array, spread: Array) -> Array:
    """Return x ÷ spread; where all values that a row sees are one, its answer is known: 0 stays 0, the rest is ∞."""
    return np.divide(x, spread, out=np.where(x > 0, np.inf, x), where=spread > 0)


def _row(sweep: _Sweep, reference: str, cost: float, found: Sequence[_Measured]) -> Row:
    error, spread, slack = (np.array([getattr(x, field) for x in found]) for field in ("error", "spread", "slack"))
    known = np.isfinite(error) & np.isfinite(slack)
    sure = known & (error > slack)
    row = Row(
        method=sweep.name,
        budget="" if sweep.budget is None else f"{sweep.budget[0]}={sweep.budget[1]}",
        reference=reference,
        cost=cost,
        error_max=float(error.max()),
        error_rms=_rms(error),
        error_relative=_rms(_over(np.where(np.isfinite(error) & ~sure, 0.0, error), spread)),
        seconds=sum(x.seconds for x in found),
    )
    bounds = [x.bound for x in found if x.bound is not None]
    if not bounds:
        return row
    bound = np.array(bounds)
    kept = (error <= bound + slack)[known].all()
    return row._replace(
        bound_max=float(bound.max()),
        bound_relative=_rms(_over(bound, spread)),
        bound_ratio=float(np.median(bound[sure] / error[sure])) if sure.any() else math.nan,
        holds=(True if known.all() else None) if kept else False,
    )


def _rms(x: Array) -> float:
    """Return the root mean square, whose squares neither overflow nor underflow together."""
    top = float(x.max())
    return top * float(np.sqrt(np.mean(np.square(x / top)))) if 0 < top < np.inf else top
