"""One study as it runs: its arrays, its plan, and what it measures of one method at one budget."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import rounding
from refattn.study._exact import References
from refattn.study._sweep import Drawn, Inputs, Problem, Sweep, chosen, sweeps
from refattn.study._table import Head, Row, over, rms, uncovered

Array = NDArray[np.float64]
WORST = 5
"""How many rows of each head are remembered as its worst."""
THREADS = 2


class Run:
    """Arrays, references and plan of a study. What a method draws depends on the seed and the head alone."""

    def __init__(
        self,
        inputs: Inputs,
        methods: Sequence[str] | None,
        budgets: Mapping[str, Sequence[Any]] | None,
        seed: int,
    ) -> None:
        """Plan every method over its budgets; what few rows cannot be asked for is left out."""
        self.inputs, self.seed, self.references = inputs, seed, References(inputs)
        self.left_out: dict[str, str] = {}
        every = sweeps(chosen(methods), inputs.sizes, budgets)
        self.plan = [sweep for sweep in every if self._answered(sweep)]
        self._costs: dict[tuple[str, str], float] = {}
        self._fitted: tuple[Sweep, list[Drawn]] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not covered."""
        inputs = self.inputs
        return uncovered(list(inputs.rows) if inputs.sampled else None, inputs.sizes["T"], self.left_out)

    def made(self, sweep: Sweep, n: int) -> Drawn:
        """Return what the method draws for head n, or what was fitted to it."""
        if sweep.source != "fit":
            return self.inputs.draw(sweep, n, np.random.default_rng([self.seed, n]))
        if self._fitted is None or self._fitted[0] is not sweep:
            self._fitted = sweep, self.inputs.fit(sweep)
        return self._fitted[1][n]

    def sweep(self, row: Row) -> Sweep:
        """Return the sweep of a row that this run measured."""
        return next(sweep for sweep in self.plan if (sweep.method, sweep.text) == (row.method, row.budget))

    def problem(self, sweep: Sweep, n: int) -> Problem:
        """Return head n of a sweep."""
        return self.inputs.problem(sweep, n, self.made(sweep, n))

    def cost(self, sweep: Sweep) -> float:
        """Return a sweep's cost, as a part of exact attention's; where it depends on what is drawn, head 0's."""
        known = (sweep.method, sweep.text)
        if known not in self._costs:
            options = set(sweep.declared.drawn) - set(sweep.declared.arrays)
            made, inputs = self.made(sweep, 0) if options else Drawn({}, {}), self.inputs
            flops = inputs.over_heads(lambda n: inputs.cost(sweep, n, made))
            self._costs[known] = flops / inputs.exact_cost if inputs.exact_cost else math.nan
        return self._costs[known]

    def measure(self, sweep: Sweep, step: Callable[[], None]) -> Row:
        """Return the row of a sweep, and call `step` after each head."""
        inputs = self.inputs
        shape = inputs.heads, len(inputs.rows), inputs.sizes["E"]
        error, slack, bound, seconds = np.empty(shape), np.empty(shape), np.empty(shape), 0.0
        spread = np.empty((inputs.heads, 1, inputs.sizes["E"]))

        def one(n: int) -> float:
            problem = self.problem(sweep, n)
            start = time.perf_counter()
            o = problem.attend()
            taken = time.perf_counter() - start
            exact, own = self.references.of(problem), problem.rounding()
            error[n], spread[n] = np.abs(o - exact.o), exact.spread
            slack[n] = exact.rounding + own + rounding.U * error[n]
            claim = problem.bound()
            if claim is not None:
                bound[n] = claim
                slack[n] = slack[n] + own + problem.claim_rounding()  # õ is in the claim too
            return taken

        for taken in self._by_head(one):
            seconds += taken
            step()
        claims = bound if sweep.claim is not None else None
        row = Row(
            method=sweep.method,
            budget=sweep.text,
            reference=self.references.text(sweep.declared),
            cost=self.cost(sweep),
            seconds=seconds,
            **_errors(error, slack, spread),
            **_claimed(error, slack, spread, claims),
        )
        each = [(error[n], slack[n], spread[n], None if claims is None else claims[n]) for n in range(inputs.heads)]
        return row._replace(heads=tuple(self._head(*one) for one in each))

    def probe(self, sweep: Sweep) -> tuple[float, float | None]:
        """Return the root mean squares of error ÷ spread and of bound ÷ spread, rounding being in the error."""

        def one(n: int) -> tuple[Array, Array | None]:
            problem = self.problem(sweep, n)
            exact, bound = self.references.of(problem), problem.bound()
            error = over(np.abs(problem.attend() - exact.o), exact.spread)
            return error, None if bound is None else over(bound, exact.spread)

        errors, bounds = zip(*self._by_head(one), strict=True)
        return rms(np.stack(errors)), None if sweep.claim is None else rms(np.stack(bounds))

    def _by_head(self, work: Callable[[int], Any]) -> Iterator[Any]:
        """Yield what the work answers of each head; long contexts are shared by two threads."""
        if not self.inputs.sampled:
            yield from map(work, range(self.inputs.heads))
            return

        def quiet(n: int) -> Any:
            with np.errstate(all="ignore"):  # a thread starts with NumPy's own
                return work(n)

        pool = ThreadPoolExecutor(THREADS)
        try:
            yield from pool.map(quiet, range(self.inputs.heads))
        finally:
            pool.shutdown(cancel_futures=True)

    def _head(self, error: Array, slack: Array, spread: Array, bound: Array | None) -> Head:
        """Return what a row says of one head."""
        each = np.sqrt(np.square(over(np.where(_sure(error, slack), error, 0.0), spread)).mean(axis=1))
        worst = np.argsort(-np.where(np.isnan(each), -1.0, each), kind="stable")[:WORST]
        found = _claimed(error, slack, spread, bound)
        errors = _errors(error, slack, spread)
        return Head(
            error_max=errors["error_max"],
            error_relative=errors["error_relative"],
            bound_relative=found.get("bound_relative"),
            holds=found.get("holds"),
            worst=tuple(int(self.inputs.rows[i]) for i in worst),
            worst_error=tuple(float(each[i]) for i in worst),
        )

    def _answered(self, sweep: Sweep) -> bool:
        if not self.inputs.sampled:
            return True
        if not sweep.declared.rowwise:
            self.left_out[sweep.declared.name] = "a row's answer depends on all rows"
        elif sweep.source == "fit":
            self.left_out[sweep.method] = "what is fitted depends on all rows"
        return sweep.declared.rowwise and sweep.source != "fit"


def one_thread() -> AbstractContextManager[Any]:
    """Keep BLAS to one thread, where threadpoolctl is there to do so.

    A head's products are small: two threads gain nothing, and wait for each other where a core has other work.
    """
    try:
        return importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas")
    except ImportError:
        return nullcontext()


def silent(done: int, total: int) -> None:
    """Report nothing."""


def _sure(error: Array, slack: Array) -> NDArray[np.bool_]:
    """Return which errors are above rounding, or not finite."""
    return ~np.isfinite(error) | (error > slack)


def _errors(error: Array, slack: Array, spread: Array) -> dict[str, Any]:
    within = np.where(_sure(error, slack), error, 0.0)
    return {
        "error_max": float(error.max()),
        "error_rms": rms(error),
        "error_relative": rms(over(within, spread)),
    }


def _claimed(error: Array, slack: Array, spread: Array, bound: Array | None) -> dict[str, Any]:
    if bound is None:
        return {}
    known = np.isfinite(error) & np.isfinite(slack)
    sure, kept = known & (error > slack), (error <= bound + slack)[known].all()
    return {
        "bound_max": float(bound.max()),
        "bound_relative": rms(over(bound, spread)),
        "bound_ratio": float(np.median(bound[sure] / error[sure])) if sure.any() else math.nan,
        "holds": (True if known.all() else None) if kept else False,
    }
