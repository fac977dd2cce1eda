"""A closer look at a study: the best within a cost, worst rows and why, convergence of what is drawn, one head."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import _check
from refattn.study._run import WORST, Run, one_thread, silent
from refattn.study._some import Some
from refattn.study._sweep import Sweep
from refattn.study._table import Row, Table, over, rms
from refattn.study._why import effective, why

Array = NDArray[np.float64]
DRAWS = 16
"""Fresh draws from which a row's deviation is taken."""
HEADS = 4
"""Heads at most that curves are measured on."""


class Worst(NamedTuple):
    """A row of one head on which a method errs most, and what its weights say of it.

    Parameters
    ----------
    method, budget
        As in the table's row.
    head, row
        The flat index into the leading axes, and the row's number in T.
    error, bound
        Root mean square of error ÷ spread over the row's columns, and of bound ÷ spread; None without a claim.
    dropped
        Softmax mass of the keys that the row sees and the method gives a weight of exactly 0; None where its weights
        multiply something else than v, and so are not of keys.
    variation
        Half the absolute sum of the differences of weights; None where those are not of keys.
    span
        Largest less smallest logit over the keys that the row sees, in nats.
    keys
        Effective number of keys, the exponential of the entropy of the exact weights.
    deviation
        Of a method that draws: the root mean square, over columns and fresh draws, of the error less its mean over
        the draws, ÷ spread. None where nothing is drawn.
    top
        The three keys of the largest exact weights: (key, weight), the largest first; fewer where the row sees fewer.
    why
        One sentence that names what of these explains the error.
    """

    method: str
    budget: str
    head: int
    row: int
    error: float
    bound: float | None
    dropped: float | None
    variation: float | None
    span: float
    keys: float
    deviation: float | None
    top: tuple[tuple[int, float], ...]
    why: str


class Curve(NamedTuple):
    """Error of a method that draws, over its budgets, in fresh draws.

    `low`, `middle` and `high` are the 5 %, 50 % and 95 % quantiles, over `draws` draws, of the root mean square of
    error ÷ spread over the rows and heads tried; one for each of the ascending `budgets` of the option `name`.
    """

    method: str
    name: str
    budgets: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]
    draws: int


class Matrices(NamedTuple):
    """Weights of one head: exact and the method's, (rows, keys); `difference` is None where columns are not keys.

    `rows` and `keys` are the numbers of the rows and columns shown, evenly spaced where there are more than fit. Where
    the method's columns are not keys, they are the first ones, or evenly spaced ones, of its own.
    """

    method: str
    budget: str
    head: int
    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    exact: Array
    weights: Array
    difference: Array | None


def within(table: Table, cost: float = 0.25) -> dict[str, Row]:
    """Return by method and variant the row that errs least of those that cost at most `cost`, where there is one.

    An error that is NaN counts as the largest. Claims over the draw are no rows of their own here.
    """
    found: dict[str, Row] = {}
    for row in table.rows:
        if row.vacuous is None and row.cost <= cost:
            known = found.setdefault(row.method, row)
            if row.error_relative < known.error_relative or known.error_relative != known.error_relative:
                found[row.method] = row
    return found


def worst_rows(table: Table, row: Row, count: int = 3) -> tuple[Worst, ...]:
    """Return the rows of all heads on which a method errs most, the worst first, with what explains them.

    Exact weights and logits are those of the row's reference. Draws for the deviation are seeded by the study's seed,
    the head and the row. The sentence `why` names what the numbers say, never what the method is called.

    Parameters
    ----------
    table
        What `compare` returned.
    row
        One of its rows that is no claim over the draw.
    count
        How many, at most five: what a study remembers of each head.

    Raises
    ------
    ValueError, TypeError
        A table that `compare` did not make, a row that it does not have, another count.
    """
    run, sweep = _run(table), _sweep(table, row)
    if _check.integer("count", count, 1) > WORST:
        raise ValueError(f"count is {count}; expected at most {WORST}, the rows that a study remembers of each head")
    known = [
        (error, n, worst)
        for n, head in enumerate(row.heads)
        for worst, error in zip(head.worst, head.worst_error, strict=True)
    ]
    known.sort(key=lambda one: -one[0] if one[0] == one[0] else 1.0)
    with np.errstate(all="ignore"), one_thread():
        return tuple(_worst(run, sweep, n, i, error) for error, n, i in known[:count])


def curves(
    table: Table, draws: int = 32, rows: int = 16, progress: Callable[[int, int], None] | None = None
) -> tuple[Curve, ...]:
    """Return how the error of each method that draws falls with its budget, and how far draws part.

    That is each method and variant that approximates softmax and was measured at more than one budget. Its answers are
    computed for at most `rows` of the measured rows and four heads, evenly spaced. Draws are seeded by the study's
    seed, the head and the number of the draw. An error within rounding does not count as 0 here.

    Parameters
    ----------
    table
        What `compare` returned.
    draws, rows
        How many, at least 1.
    progress
        Called with (done, total) before the first budget of a head and after each.

    Raises
    ------
    ValueError, TypeError
        A table that `compare` did not make; other numbers of draws or rows.
    """
    run, draws = _run(table), _check.integer("draws", draws, 1)
    tried = run.inputs.rows[_spaced(len(run.inputs.rows), _check.integer("rows", rows, 1))]
    heads = [int(n) for n in _spaced(run.inputs.heads, HEADS)]
    found: dict[str, list[Sweep]] = {}
    for sweep in (_sweep(table, row) for row in table.rows if row.heads):
        if sweep.source == "draw" and sweep.declared.approximates == "softmax" and sweep.budget is not None:
            found.setdefault(sweep.method, []).append(sweep)
    plan = [sorted(sweeps, key=_budget) for sweeps in found.values() if len(sweeps) > 1]
    some, total, done = Some(run, tried), len(heads) * sum(map(len, plan)), 0
    report = progress or silent
    report(0, total)

    def quantiles(sweep: Sweep) -> Array:
        nonlocal done
        errors: list[Array] = []
        for n in heads:
            spread = some.spread(sweep, n)
            errors.append(np.stack([over(np.abs(x), spread) for x in some.errors(sweep, n, draws, 0)]))
            done += 1
            report(done, total)
        return np.quantile([rms(one) for one in np.stack(errors, axis=1)], (0.05, 0.5, 0.95))

    with np.errstate(all="ignore"), one_thread():
        return tuple(_curve(sweeps, [quantiles(sweep) for sweep in sweeps], draws) for sweeps in plan)


def matrices(table: Table, row: Row, head: int, most: int = 384) -> Matrices:
    """Return the exact weights of a head beside a method's, at most `most` of the measured rows and of the keys.

    Those shown are evenly spaced; their weights are exact, not averages of what is between.

    Parameters
    ----------
    table
        What `compare` returned.
    row
        One of its rows that is no claim over the draw.
    head
        The flat index into the leading axes.
    most
        Rows and columns at most.

    Raises
    ------
    ValueError, TypeError
        A table that `compare` did not make, a row or a head that it does not have, another size.
    """
    run, sweep = _run(table), _sweep(table, row)
    if _check.integer("head", head, 0) >= run.inputs.heads:
        raise ValueError(f"head is {head}; expected less than {run.inputs.heads}")
    most = _check.integer("most", most, 1)
    rows = run.inputs.rows[_spaced(len(run.inputs.rows), most)]
    keys, some, made = _spaced(run.inputs.sizes["S"], most), Some(run, rows), run.made(sweep, head)
    with np.errstate(all="ignore"), one_thread():
        exact, own = some.exact(sweep, head)[:, keys], some.weights(sweep, some.problem(sweep, head, made))
    own = own[:, _spaced(own.shape[1], most)]
    difference = own - exact if "v" in sweep.declared.linear_in else None
    return Matrices(row.method, row.budget, head, rows, keys, exact, own, difference)


def assumptions(table: Table) -> dict[str, tuple[str, ...]]:
    """Return by method what each of its claims assumes, after the claim's statement; nothing where nothing is claimed.

    Raises
    ------
    ValueError
        A table that `compare` did not make.
    """
    measured, run = {row.name for row in table.rows}, _run(table)
    known = {sweep.declared.name: sweep.declared.claims for sweep in run.plan}
    return {
        name: tuple(f"{claim.statement}: {claim.assumes}" for claim in claims)
        for name, claims in known.items()
        if name in measured
    }


def _run(table: Table) -> Run:
    if table.run is None:
        raise ValueError("table has no run; expected one that compare returned")
    return table.run


def _sweep(table: Table, row: Row) -> Sweep:
    if not row.heads or (row.method, row.budget) not in {(own.method, own.budget) for own in table.rows}:
        raise ValueError(f"row is {row.method} {row.budget}".rstrip() + "; expected one of the table's, by head")
    return _run(table).sweep(row)


def _budget(sweep: Sweep) -> int:
    return 0 if sweep.budget is None else sweep.budget[1]


def _curve(sweeps: list[Sweep], quantiles: list[Array], draws: int) -> Curve:
    low, middle, high = (tuple(map(float, x)) for x in zip(*quantiles, strict=True))
    name = str(sweeps[0].declared.budget)
    return Curve(sweeps[0].method, name, tuple(map(_budget, sweeps)), low, middle, high, draws)


def _spaced(n: int, most: int) -> NDArray[np.int64]:
    """Return at most so many of n numbers, evenly spaced from the first to the last."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(np.int64)


def _worst(run: Run, sweep: Sweep, n: int, row: int, error: float) -> Worst:
    declared, some, head = sweep.declared, Some(run, [row]), run.inputs.head(n)
    problem, spread, pairs = some.problem(sweep, n, run.made(sweep, n)), some.spread(sweep, n), some.seen(sweep, n)
    seen = np.arange(len(head["k"])) if pairs is None else np.flatnonzero(pairs.seen([0], slice(None))[0])
    exact, q = some.exact(sweep, n)[0], head["q"][row]
    logits = head["k"][seen] @ q * _check.scale(run.inputs.scale, len(q))
    own = some.weights(sweep, problem)[0] if "v" in declared.linear_in else None
    claim = problem.bound()
    deviation, drawn = None, 0.0
    if sweep.source == "draw":
        errors = np.stack(some.errors(sweep, n, DRAWS, row + 1))
        deviation = rms(over(np.abs(errors - errors.mean(axis=0)), spread))
        drawn = (deviation / (rms(over(np.abs(errors), spread)) or 1.0)) ** 2
    p = exact[seen]
    first = np.argsort(-p, kind="stable")[:3]
    worst = Worst(
        method=sweep.method,
        budget=sweep.text,
        head=n,
        row=row,
        error=error,
        bound=None if claim is None else rms(over(some.of(sweep, claim), spread)),
        dropped=None if own is None else float(exact[own == 0].sum()),
        variation=None if own is None else float(np.abs(own - exact).sum() / 2),
        span=float(np.ptp(logits)) if len(seen) else 0.0,
        keys=effective(p),
        deviation=deviation,
        top=tuple((int(seen[i]), float(p[i])) for i in first),
        why="",
    )
    return worst._replace(why=why(worst, p, None if own is None else own[seen], drawn))
