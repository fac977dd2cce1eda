"""The sweep: every method over its budgets, against exact attention."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, rounding, softmax
from refattn.masks import MaskLike
from refattn.method import accepted
from refattn.study._draws import Trials
from refattn.study._exact import References
from refattn.study._sweep import Inputs, Sweep, arguments, chosen, claims_over, drawn, sweeps
from refattn.study._table import Row, Table, over, rms

Array = NDArray[np.float64]


class _Measured(NamedTuple):
    """All problems, elementwise: |õ − o|, the range of v, the claim, what rounding may add; seconds and flops."""

    error: Array
    spread: Array
    bound: Array | None
    slack: Array
    seconds: float
    flops: int


def compare(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: MaskLike = None,
    scale: float | None = None,
    methods: Sequence[str] | None = None,
    seed: int = 0,
    delta: float = 0.05,
    rows: int = 4,
    trials: int = 200,
    title: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    r"""Measure how far each efficient attention is from exact softmax on these arrays, and check its bound.

    Each method is swept over the typical values of its budget, its other options at their defaults. A method that takes
    the mask is measured against exact attention with that mask; one that cannot, such as Linformer, against unmasked
    attention; one that is causal whatever the mask, such as Sparse Transformer, against causal attention; the row says
    so. Cost is always a part of exact attention with the mask, so that it compares across rows; without a mask, what a
    causal method saves by being causal is in it. A bound holds where, in every element,

    .. math:: |\mathrm{fl}(\tilde o) - \mathrm{fl}(o)| \le \mathrm{bound} + \mathrm{rounding}

    with the rounding of both answers, derived from the arrays by `refattn.rounding.allowance`, and of the bound itself.
    Where an answer or its rounding is not finite, as when logits or values overflow, there is nothing to compare. A
    method that approximates nothing, or of which nothing is claimed, has errors and no bound.

    A claim over the draw, that the inequality holds with probability 1 − δ in each element, has rows of its own: it is
    tried in fresh draws on some rows of every head, and convicted where an element fails in more of them than the
    binomial distribution lets a true claim, but for a probability of 10⁻⁹ over all elements of the table. At δ = 0.05
    and 200 draws that is 41 failures at 10⁵ elements: half the quantile of a normal error, which fails in a third of
    all draws, is convicted at any one element with probability 0.9999.

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
        Seeds the generator of each row's drawn arrays, and of the draws and rows on which claims are tried.
    delta : float
        δ of the claims over the draw.
    rows : int
        How many rows of each head such claims are tried on, the same for all heads.
    trials : int
        In how many draws.
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
        Arrays that do not fit, hold NaN or infinity, or are empty; an unknown method; fewer trials than it takes to
        convict anything.

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
    inputs = Inputs(q, k, v, mask, scale)
    seed = _check.integer("seed", seed, 0)
    plan, references = list(sweeps(chosen(methods), inputs.sizes)), References(inputs)
    claims = Trials(inputs, references, plan, seed=seed, delta=delta, rows=rows, trials=trials)
    report, total, done = progress or _silent, (len(plan) + len(claims.plan)) * inputs.heads, 0

    def step() -> None:
        nonlocal done
        done += 1
        report(done, total)

    report(0, total)
    whole = sum(softmax.cost(**inputs.sizes, mask=inputs.taken(inputs.pairs, n)).flops for n in range(inputs.heads))
    with np.errstate(all="ignore"), _one_thread():  # the table says what is not finite
        measured = ((sweep, _measure(sweep, inputs, references, seed, step)) for sweep in plan)
        found = [_row(sweep, references.text(sweep.declared), whole, one) for sweep, one in measured]
        costs = {id(sweep): row.cost for sweep, row in zip(plan, found, strict=True)}
        found += [claims.row(sweep, claim, costs[id(sweep)], step) for sweep, claim in claims.plan]
    return Table(found, title)


def _one_thread() -> AbstractContextManager[Any]:
    """Keep BLAS to one thread, where threadpoolctl is there to do so.

    A head's products are small: two threads gain nothing, and wait for each other where a core has other work.
    """
    try:
        return importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas")
    except ImportError:
        return nullcontext()


def _silent(done: int, total: int) -> None:
    pass


def _measure(sweep: Sweep, inputs: Inputs, references: References, seed: int, step: Callable[[], None]) -> _Measured:
    declared, module = sweep.declared, sweep.module
    made = drawn(sweep, inputs, np.random.default_rng(seed))
    pairs, options = inputs.mask(declared), {"scale": inputs.scale} | sweep.options | made.options
    positional, named = arguments(declared, inputs.arrays | made.arrays)

    def whole(verb: Callable[..., Any]) -> Array:
        answer = np.asarray(verb(*positional, **named, **accepted(verb, {"mask": pairs} | options)), np.float64)
        T, E = inputs.sizes["T"], inputs.sizes["E"]
        return np.broadcast_to(answer, (*inputs.shape, T, E)).reshape(inputs.heads, T, E)

    start = time.perf_counter()
    o = whole(module.attend)
    seconds = time.perf_counter() - start
    claim = next(claims_over(declared, "arrays"), None)
    bound = None if claim is None else whole(getattr(module, claim.verb))
    error, spread, slack, flops = np.empty_like(o), np.empty_like(o), np.empty_like(o), 0
    for n, one in inputs.problems(made, declared):
        mine = {"mask": inputs.taken(pairs, n)} | options
        exact = references.of(sweep, one, n, options)
        alone, by_name = arguments(declared, one)
        own = rounding.allowance(module.attend, *alone, **by_name, **accepted(module.attend, mine))
        error[n], spread[n] = np.abs(o[n] - exact.o), exact.spread
        slack[n] = exact.rounding + own + rounding.U * error[n]
        if claim is not None:
            slack[n] = slack[n] + own + rounding.claim_rounding(module, one, mine)  # õ is in the claim too
        flops += module.cost(**inputs.sizes, **accepted(module.cost, mine)).flops
        step()
    return _Measured(error, spread, bound, slack, seconds, flops)


def _row(sweep: Sweep, reference: str, whole: int, measured: _Measured) -> Row:
    error, spread, bound, slack, seconds, flops = measured
    known = np.isfinite(error) & np.isfinite(slack)
    sure = known & (error > slack)
    row = Row(
        method=sweep.name,
        budget=sweep.text,
        reference=reference,
        cost=flops / whole if whole else math.nan,
        error_max=float(error.max()),
        error_rms=rms(error),
        error_relative=rms(over(np.where(np.isfinite(error) & ~sure, 0.0, error), spread)),
        seconds=seconds,
    )
    if bound is None:
        return row
    kept = (error <= bound + slack)[known].all()
    return row._replace(
        bound_max=float(bound.max()),
        bound_relative=rms(over(bound, spread)),
        bound_ratio=float(np.median(bound[sure] / error[sure])) if sure.any() else math.nan,
        holds=(True if known.all() else None) if kept else False,
    )
