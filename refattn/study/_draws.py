"""Claims that hold with probability 1 − δ over what is drawn, judged by many draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from refattn import _check, rounding
from refattn.method import Claim
from refattn.study._run import Run
from refattn.study._some import Some
from refattn.study._sweep import Drawn, Sweep, claims_over
from refattn.study._table import Row, over, rms

Array = NDArray[np.float64]
ALARM = 1e-9
"""The probability at most that a table whose claims are true convicts one of them."""
MANY = 4096
"""Keys up to which the claims over the draw of some rows are evaluated."""


def most_failures(trials: int, delta: float, elements: int) -> int:
    r"""Return how many of these trials may fail before a claim is convicted: the exact binomial, for all elements.

    It is the least c with ``elements`` · P(Bin(trials, δ) > c) ≤ 10⁻⁹, so by the union bound true claims about all
    elements survive, whatever their dependence, with probability 1 − 10⁻⁹. Integers count it, and nothing is rounded.

    Raises
    ------
    ValueError
        Trials so few that not even an element that always fails would be convicted.

    Examples
    --------
    >>> most_failures(200, 0.05, 10**5)
    41
    """
    part = Fraction(delta)
    p, q = part.numerator, part.denominator - part.numerator
    allowed = Fraction(ALARM) * Fraction(part.denominator) ** trials / max(1, elements)
    term, tail, c = p**trials, 0, trials
    while tail + term <= allowed:  # term counts P(exactly c failures), tail P(more)
        tail, term, c = tail + term, term * c * q // ((trials - c + 1) * p), c - 1
    if c == trials:
        raise ValueError(f"trials is {trials}; expected more, for {elements} elements that fail with delta = {delta}")
    return c


class Trials:
    """The claims over the draw of a run, and what they are tried on: some rows of every head, in fresh draws."""

    def __init__(self, run: Run, *, delta: float, rows: int, trials: int) -> None:
        """Check the options and choose among the measured rows."""
        self._run, self._inputs = run, run.inputs
        self.delta, self.trials = _check.finite("delta", delta), _check.integer("trials", trials, 1)
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {delta}; expected more than 0 and less than 1")
        measured, some = len(self._inputs.rows), _check.integer("trial_rows", rows, 1)
        few = np.sort(np.random.default_rng(run.seed).choice(measured, min(some, measured), replace=False))
        self._some = Some(run, self._inputs.rows[few])
        drawn = [sweep for sweep in run.plan if sweep.source == "draw"]
        self.plan = [(sweep, claim) for sweep in drawn for claim in claims_over(sweep.declared, "draw")]
        if self._inputs.sampled and self._inputs.sizes["S"] > MANY:
            left = {sweep.declared.name for sweep, _ in self.plan}
            run.left_out |= {f"{name}, over draws": f"evaluating it takes S² time a row, S > {MANY}" for name in left}
            self.plan = []
        elements = len(self.plan) * self._inputs.heads * len(few) * self._inputs.sizes["E"]
        self._allowed = most_failures(self.trials, self.delta, elements) if elements else 0

    def row(self, sweep: Sweep, claim: Claim, step: Callable[[], None]) -> Row:
        """Try one claim, and call `step` after each head."""
        inputs, some = self._inputs, self._some
        shape = inputs.heads, len(some.at), inputs.sizes["E"]
        errors, seconds = np.zeros((self.trials, *shape)), 0.0
        bound, spread, fails, unknown, first = (np.zeros(shape) for _ in range(5))
        for n in range(inputs.heads):
            bound[n], spread[n] = self._bound(sweep, claim, n), some.spread(sweep, n)
            judged = bound[n] != np.inf  # NaN is judged, and fails
            for trial in range(self.trials if judged.any() else 0):
                made = inputs.draw(sweep, n, np.random.default_rng([self._run.seed, n, trial, 1]))
                problem, exact = some.problem(sweep, n, made), some.reference(sweep, n, made)
                start = time.perf_counter()
                o = problem.attend()
                seconds += time.perf_counter() - start
                errors[trial, n] = error = np.abs(some.of(sweep, o) - exact.o)
                late = judged & ~(error <= bound[n])
                if trial and not late.any():
                    continue
                own = some.of(sweep, 2 * problem.rounding() + problem.claim_rounding())
                slack = exact.rounding + own + rounding.U * error
                late &= ~(error <= bound[n] + slack)
                known = np.isfinite(error) & np.isfinite(slack)
                fails[n] += late & known
                unknown[n] += late & ~known
                first[n] = first[n] if trial else slack
            step()
        judged = bound != np.inf
        row = Row(
            method=f"{sweep.method}, over draws, δ={self.delta:g}",
            budget=sweep.text,
            reference=self._run.references.text(sweep.declared),
            cost=self._run.cost(sweep),
            error_max=math.nan,
            error_rms=math.nan,
            error_relative=math.nan,
            seconds=seconds,
            bound_max=math.inf,
            vacuous=1.0 - float(judged.mean()),
        )
        if not judged.any():
            return row
        error, claimed = errors[:, judged], bound[judged]
        within = np.where(np.isfinite(error) & (error <= first[judged]), 0.0, error)
        most = np.sort(within, axis=0)[math.ceil((1 - self.delta) * self.trials) - 1]
        sure, tried = most > 0, self.trials * int(judged.sum()) - int(unknown.sum())
        holds = None if unknown.any() else True
        return row._replace(
            error_max=float(error.max()),
            error_rms=rms(error),
            error_relative=rms(over(within, np.broadcast_to(spread[judged], error.shape))),
            bound_max=float(claimed.max()),
            bound_relative=rms(over(claimed, spread[judged])),
            bound_ratio=float(np.median(claimed[sure] / most[sure])) if sure.any() else math.nan,
            holds=False if (fails > self._allowed).any() else holds,
            covered=(tried - float(fails.sum())) / tried if tried else math.nan,
        )

    def _bound(self, sweep: Sweep, claim: Claim, n: int) -> Array:
        """Return the claim for the chosen rows of a head, (rows, E)."""
        problem = self._some.problem(sweep, n, Drawn({}, {}))
        rows = self._some.of(sweep, np.arange(len(problem.arrays["q"])))
        verb = getattr(sweep.module, claim.verb)
        return np.asarray(problem.call(verb, delta=self.delta, rows=tuple(map(int, rows))), np.float64)
