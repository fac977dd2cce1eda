"""Claims that hold with probability 1 − δ over what is drawn, judged by many draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from refattn import _check, rounding
from refattn.method import Claim, accepted
from refattn.study._exact import References
from refattn.study._sweep import Drawn, Inputs, Sweep, arguments, claims_over, drawn
from refattn.study._table import Row, over, rms

Array = NDArray[np.float64]
ALARM = 1e-9
"""The probability at most that a table whose claims are true convicts one of them."""


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
    """The claims over the draw of a plan, and what they are tried on: some rows of every head, in fresh draws."""

    def __init__(
        self,
        inputs: Inputs,
        references: References,
        plan: Sequence[Sweep],
        *,
        seed: int,
        delta: float,
        rows: int,
        trials: int,
    ) -> None:
        """Check the options and choose the rows."""
        self._inputs, self._references, self._seed = inputs, references, seed
        self.delta, self.trials = _check.finite("delta", delta), _check.integer("trials", trials, 1)
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {delta}; expected more than 0 and less than 1")
        T, some = inputs.sizes["T"], _check.integer("rows", rows, 1)
        self.rows = np.sort(np.random.default_rng(seed).choice(T, min(some, T), replace=False))
        self.plan = [(s, claim) for s in plan if s.source == "draw" for claim in claims_over(s.declared, "draw")]
        elements = len(self.plan) * inputs.heads * len(self.rows) * inputs.sizes["E"]
        self._allowed = most_failures(self.trials, self.delta, elements) if elements else 0

    def row(self, sweep: Sweep, claim: Claim, cost: float, step: Callable[[], None]) -> Row:
        """Try one claim, and call `step` as often as there are heads."""
        bound = self._bound(sweep, claim)
        judged = bound != np.inf  # NaN is judged, and fails
        heads = np.flatnonzero(judged.any(axis=(1, 2)))
        rngs = np.random.default_rng([self._seed, 1]).spawn(self.trials if len(heads) else 0)
        errors, spread = np.zeros((len(rngs), *bound.shape)), np.zeros(bound.shape)
        fails, unknown, first = (np.zeros(bound.shape) for _ in range(3))
        seconds, ticks = 0.0, 0
        for trial, rng in enumerate(rngs):
            made = drawn(sweep, self._inputs, rng)
            for n, one in self._inputs.problems(made, sweep.declared, heads):
                problem = _One(sweep, self._inputs, made, one, n)
                exact = self._references.of(sweep, one, n, problem.options)
                start = time.perf_counter()
                o = problem.attend()
                seconds += time.perf_counter() - start
                error = np.abs(o - exact.o)[self.rows]
                errors[trial, n], spread[n] = error, exact.spread[self.rows]
                late = judged[n] & ~(error <= bound[n])
                if trial and not late.any():
                    continue
                own, evaluation = problem.roundings()
                slack = (exact.rounding + 2 * own + evaluation)[self.rows] + rounding.U * error
                late &= ~(error <= bound[n] + slack)
                known = np.isfinite(error) & np.isfinite(slack)
                fails[n] += late & known
                unknown[n] += late & ~known
                first[n] = first[n] if trial else slack
            while ticks < (trial + 1) * self._inputs.heads // len(rngs):
                step()
                ticks += 1
        for _ in range(self._inputs.heads - ticks):
            step()
        row = Row(
            method=f"{sweep.name}, over draws, δ={self.delta:g}",
            budget=sweep.text,
            reference=self._references.text(sweep.declared),
            cost=cost,
            error_max=math.nan,
            error_rms=math.nan,
            error_relative=math.nan,
            seconds=seconds,
            bound_max=math.inf,
            vacuous=1.0 - float(judged.mean()),
        )
        if len(heads) == 0:
            return row
        error, claimed = errors[:, judged], bound[judged]
        within = np.where(np.isfinite(error) & (error <= first[judged]), 0.0, error)
        most = np.sort(within, axis=0)[math.ceil((1 - self.delta) * len(rngs)) - 1]
        sure, tried = most > 0, len(rngs) * int(judged.sum()) - int(unknown.sum())
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

    def _bound(self, sweep: Sweep, claim: Claim) -> Array:
        """Return the claim for the chosen rows of every head, (heads, rows, E)."""
        inputs, declared, verb = self._inputs, sweep.declared, getattr(sweep.module, claim.verb)
        asked = {"delta": self.delta, "rows": tuple(map(int, self.rows)), "mask": inputs.mask(declared)}
        positional, named = arguments(declared, inputs.arrays)
        options = accepted(verb, asked | {"scale": inputs.scale} | sweep.options)
        shape = len(self.rows), inputs.sizes["E"]
        bound = np.asarray(verb(*positional, **named, **options), np.float64)
        return np.broadcast_to(bound, (*inputs.shape, *shape)).reshape(inputs.heads, *shape)


class _One:
    """One problem with what was drawn for it."""

    def __init__(self, sweep: Sweep, inputs: Inputs, made: Drawn, one: dict[str, Array], n: int) -> None:
        mask = inputs.taken(inputs.mask(sweep.declared), n)
        self._module, self._arrays = sweep.module, one
        self.options = {"mask": mask, "scale": inputs.scale} | sweep.options | made.options
        self._positional, named = arguments(sweep.declared, one)
        self._named = named | accepted(sweep.module.attend, self.options)

    def attend(self) -> Array:
        return np.asarray(self._module.attend(*self._positional, **self._named), np.float64)

    def roundings(self) -> tuple[Array, Array]:
        """Return the rounding of the answer, and of the claim's evaluation."""
        own = rounding.allowance(self._module.attend, *self._positional, **self._named)
        return own, rounding.claim_rounding(self._module, self._arrays, self.options)
