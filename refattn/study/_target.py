"""A budget question: the cheapest budget of each method whose error, and whose bound, is at most so much."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from refattn import _check
from refattn.masks import MaskLike
from refattn.study._compare import one_thread, silent
from refattn.study._run import Run
from refattn.study._sweep import Inputs, Sweep, options_of

BEYOND = 8
"""How far beyond the typical budgets is looked."""


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
    toy: the cheapest budget whose error ÷ spread is at most 0.01, measured and proved
    method measured cost error proved cost bound
    """

    headings: tuple[str, ...] = ("method", "measured", "cost", "error", "proved", "cost", "bound")

    def __init__(self, rows: Iterable[Found], target: float, title: str = "", notes: Sequence[str] = ()) -> None:
        """Hold the rows, what was asked, of what, and what the rows do not cover."""
        self.rows, self.target, self.notes = tuple(rows), target, tuple(notes)
        about = f"the cheapest budget whose error ÷ spread is at most {target:g}, measured and proved"
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
    progress: Callable[[int, int], None] | None = None,
) -> Targets:
    r"""Return the cheapest budget of each method whose error on these arrays, and whose bound, meets a target.

    Error and bound are the table's: root mean squares, over all elements, of :math:`|\tilde o - o|` and of the proved
    bound ÷ the spread of v. What is drawn is drawn once for each budget, from the seed. Budgets are doubled from the
    cheapest (halved, where fewer is dearer), as far as they cost at most what exact attention costs and are at most 8
    times the typical ones; then the interval below the first that meets the target is halved. So the next cheaper
    budget does not meet it; where the error rises and falls with the budget, one still cheaper may.

    Parameters
    ----------
    q, k, v, mask, scale, methods, rows, seed, title, progress
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
    first: dict[str, Sweep] = {}
    for sweep in run.plan:
        first.setdefault(sweep.name, sweep)
    report, found = progress or silent, list[Found]()
    report(0, len(first))
    with np.errstate(all="ignore"), one_thread():
        for sweep in first.values():
            found.append(_search(run, sweep, most))
            report(len(found), len(first))
    inputs = run.inputs
    some = [f"measured on {len(inputs.rows)} of {inputs.sizes['T']} rows of each head"] * inputs.sampled
    left = (f"left out: {name}: {why}" for name, why in run.left_out.items())
    return Targets(found, most, title, (*some, *left))


class _Tried(NamedTuple):
    cost: float
    error: float
    bound: float | None


def _search(run: Run, sweep: Sweep, most: float) -> Found:
    name, claimed = sweep.declared.budget, any(c.over == "arrays" for c in sweep.declared.claims)
    tried: dict[Any, _Tried] = {}

    def meets(budget: Any, which: str) -> bool:
        if budget not in tried:
            at = sweep.at(budget)
            tried[budget] = _Tried(run.cost(at), *run.probe(at))
        value = getattr(tried[budget], which)
        return value is not None and value <= most

    ladder = [None] if name is None else _ladder(run, sweep)
    order = sorted(ladder, key=lambda budget: run.cost(sweep.at(budget)))

    def least(which: str) -> Least | None:
        good = next((budget for budget in order if meets(budget, which)), None)
        if name is not None and good is not None:
            at = ladder.index(good)
            bad = ladder[at - 1] if at and not meets(ladder[at - 1], which) else good
            while abs(good - bad) > 1:
                middle = (good + bad) // 2
                good, bad = (middle, bad) if meets(middle, which) else (good, middle)
        if good is None and (name is not None or not meets(None, which)):
            return None
        one = tried[good]
        return Least("" if name is None else f"{name}={good}", one.cost, getattr(one, which))

    return Found(sweep.name, least("error"), least("bound"), claimed and sweep.declared.approximates == "softmax")


def _ladder(run: Run, sweep: Sweep) -> list[Any]:
    """Return the budgets to try at first, by doubling, from the end where the typical ones begin."""
    name = sweep.declared.budget or ""
    option, sizes = options_of(sweep.declared)[name], run.inputs.sizes
    typical = option.values(sizes)
    last = min(BEYOND * max(typical), max(sizes["S"], *typical))
    values = [2**n for n in range(last.bit_length())]
    if values[-1] < last:
        values.append(last)
    if typical[0] > typical[-1]:
        values.reverse()
    return [x for x in values if option.domain(x) and run.cost(sweep.at(x)) <= 1]


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
