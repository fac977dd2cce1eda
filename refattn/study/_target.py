"""A budget question: the cheapest budget found of each method whose error, and whose bound, is at most so much."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from refattn import _check
from refattn.masks import MaskLike
from refattn.study._run import Run, one_thread, silent
from refattn.study._sweep import Inputs, Sweep, options_of
from refattn.study._table import STOPPED

BEYOND = 8
"""How far beyond the typical budgets is looked."""
GRID = 64
"""How many budgets are tried at first where cost does not rise with them."""


class Least(NamedTuple):
    """The cheapest budget of a method that meets a target; `budget` is ``""`` where it has none.

    `value` is the error or the bound there, ÷ spread, and `cost` a part of exact attention's.
    """

    budget: str
    cost: float
    value: float


class Found(NamedTuple):
    """What was found for one method or variant; None where no budget that was tried meets the target.

    `claimed` says whether the method has a bound at all.
    """

    method: str
    error: Least | None
    bound: Least | None
    claimed: bool


class Targets:
    """The answer to a budget question, by method and variant.

    Examples
    --------
    >>> from refattn.study import Targets
    >>> print(Targets([], 0.01, "toy"))
    toy: the cheapest budget found whose error ÷ spread is at most 0.01, measured and proved
    method measured cost error proved cost bound
    """

    headings: tuple[str, ...] = ("method", "measured", "cost", "error", "proved", "cost", "bound")

    def __init__(
        self,
        rows: Iterable[Found],
        target: float,
        title: str = "",
        notes: Sequence[str] = (),
        *,
        partial: bool = False,
    ) -> None:
        """Hold the rows, what was asked, of what, what the rows do not cover, and whether the search was stopped."""
        self.rows, self.target, self.partial = tuple(rows), target, partial
        self.notes = (*[STOPPED] * partial, *notes)
        about = f"the cheapest budget found whose error ÷ spread is at most {target:g}, measured and proved"
        self.title = f"{title}: {about}" if title else about

    @property
    def lines(self) -> tuple[tuple[str, ...], ...]:
        """The rows as text, a cell a heading."""
        return tuple((row.method, *_cells(row.error, True), *_cells(row.bound, row.claimed)) for row in self.rows)

    def __str__(self) -> str:
        """Return plain text."""
        cells = [self.headings, *self.lines]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [" ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return "\n".join([self.title, *self.notes, *lines])


def target(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    target: float,
    mask: MaskLike = None,
    scale: float | None = None,
    methods: Sequence[str] | None = None,
    rows: int | None = None,
    seed: int = 0,
    title: str = "",
    partial: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Targets:
    r"""Return the cheapest budget found of each method whose error on these arrays, and whose bound, meets a target.

    Error and bound are the table's: root mean squares, over all elements, of :math:`|\tilde o - o|` and of the proved
    bound ÷ the spread of v. What is drawn is drawn once for each budget, from the seed. Tried are 0, the powers of two
    and the typical budgets, as far as they cost at most what exact attention costs and are at most 8 times the typical
    ones; where cost does not rise with the budget, 64 in geometric steps. From the cheapest that meets the target the
    search goes on by halving towards its cheaper neighbours. So no neighbour that is cheaper meets it; where the error
    rises and falls with the budget, a cheaper one that was not tried may.

    Parameters
    ----------
    q, k, v, mask, scale, methods, rows, seed, title, partial, progress
        As in `compare`; progress counts methods and variants.
    target : float
        The largest error ÷ spread, more than 0.

    Returns
    -------
    Targets

    Raises
    ------
    ValueError, TypeError
        As `compare`, and another target.

    Examples
    --------
    >>> from refattn import study
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 16, 4))
    >>> found = study.target(q, k, v, target=0.05, methods=["longformer"])
    >>> print([row.error.budget for row in found.rows])
    ['window=11', 'window=10']
    """
    most, seed = _check.positive("target", target), _check.integer("seed", seed, 0)
    run = Run(Inputs(q, k, v, mask, scale, rows=rows, seed=seed), methods, None, seed)
    first = {sweep.method: sweep for sweep in reversed(run.plan)}
    order = list(dict.fromkeys(sweep.method for sweep in run.plan))
    report, found, stopped = progress or silent, list[Found](), False
    report(0, len(order))
    try:
        with np.errstate(all="ignore"), one_thread():
            for name in order:
                found.append(_Search(run, first[name], most).found())
                report(len(found), len(order))
    except KeyboardInterrupt:
        if not partial:
            raise
        stopped = True
    return Targets(found, most, title, run.notes, partial=stopped)


class _Search:
    """The search for one method or variant: what was tried, and what that cost."""

    def __init__(self, run: Run, sweep: Sweep, most: float) -> None:
        self._run, self._sweep, self._most = run, sweep, most
        self._tried: dict[Any, tuple[float, float | None]] = {}
        name = sweep.declared.budget
        self._option = None if name is None else options_of(sweep.declared)[name]
        typical = () if self._option is None else self._option.values(run.inputs.sizes)
        self._falls = bool(typical) and typical[0] > typical[-1]
        self._known: list[Any] = [None] if self._option is None else self._affordable(self._grid(typical))

    def found(self) -> Found:
        """Return the cheapest budget whose error, and whose bound, meets the target."""
        return Found(self._sweep.method, self._least(0), self._least(1), self._sweep.claim is not None)

    def _least(self, which: int) -> Least | None:
        if which == 1 and self._sweep.claim is None:
            return None
        good = next((x for x in sorted(self._known, key=self._rank) if self._meets(x, which)), None)
        if good is None and not (self._option is None and self._meets(None, which)):
            return None
        while (middle := self._nearer(good)) is not None:
            insort(self._known, middle)
            if self._meets(middle, which) and self._rank(middle) < self._rank(good):
                good = middle
        value = self._tried[good][which]
        name = "" if self._option is None else f"{self._sweep.declared.budget}={good}"
        return Least(name, self._cost(good), math.nan if value is None else value)

    def _nearer(self, good: Any) -> Any:
        """Return a budget between this and a neighbour that is cheaper; None where there is none to try."""
        if good is None:
            return None
        at = self._known.index(good)
        for near in (at - 1, at + 1):
            if 0 <= near < len(self._known) and abs(other := self._known[near] - good) > 1:
                middle = good + other // 2
                if self._rank(self._known[near]) < self._rank(good) and self._allowed(middle):
                    return middle
        return None

    def _grid(self, typical: Sequence[int]) -> list[int]:
        """Return the budgets to try at first, ascending."""
        last = min(BEYOND * max(typical), max(self._run.inputs.sizes["S"], *typical))
        values = sorted({0, last, *typical, *(2**n for n in range(last.bit_length()))})
        values = [x for x in values if self._allowed(x)]
        costs = [self._cost(x) for x in values]
        if costs != sorted(costs, reverse=self._falls):
            steps = {int(x) for x in np.geomspace(max(1, values[0]), last, GRID).round()}
            values = sorted(x for x in {*values, *steps} if self._allowed(x))
        return values

    def _affordable(self, values: list[int]) -> list[int]:
        """Return those that cost at most what exact attention does, and the last such before one that costs more."""
        found = {x for x in values if self._cost(x) <= 1}
        for inside, outside in (pair for a, b in pairwise(values) for pair in ((a, b), (b, a))):
            if inside in found and outside not in found:
                while abs(outside - inside) > 1:
                    middle = (inside + outside) // 2
                    inside, outside = (middle, outside) if self._cost(middle) <= 1 else (inside, middle)
                found.add(inside)
        return sorted(found)

    def _allowed(self, budget: int) -> bool:
        return self._option is not None and self._option.domain(budget)

    def _rank(self, budget: Any) -> tuple[float, int]:
        """Return what orders budgets: the cost, then the budget itself, from the typical ones' first."""
        return self._cost(budget), 0 if budget is None else -budget if self._falls else budget

    def _cost(self, budget: Any) -> float:
        return self._run.cost(self._sweep.at(budget))

    def _meets(self, budget: Any, which: int) -> bool:
        if budget not in self._tried:
            self._tried[budget] = self._run.probe(self._sweep.at(budget))
        value = self._tried[budget][which]
        return value is not None and value <= self._most


def _cells(least: Least | None, claimed: bool) -> tuple[str, str, str]:
    if least is None:
        return "none" if claimed else "no bound", "—", "—"
    return least.budget or "yes", f"{least.cost:.3g}", f"{least.value:.2g}"


def as_dict(found: Targets) -> Mapping[str, Any]:
    """Return what JSON says of it."""
    rows = [
        {
            "method": row.method,
            "error": None if row.error is None else row.error._asdict(),
            "bound": None if row.bound is None else row.bound._asdict(),
            "claimed": row.claimed,
        }
        for row in found.rows
    ]
    return {"title": found.title, "target": found.target, "notes": list(found.notes), "rows": rows}
