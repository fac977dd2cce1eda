"""Some rows of a study, looked at again: their exact weights, a method's, and its errors in fresh draws."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import softmax
from refattn.masks import Pairs
from refattn.study._exact import Exact, References
from refattn.study._run import Run
from refattn.study._sweep import Drawn, Problem, Sweep

Array = NDArray[np.float64]


class Some:
    """Some measured rows of a run: only they are computed, where a method can answer them alone."""

    def __init__(self, run: Run, rows: NDArray[np.int64] | list[int]) -> None:
        """Take rows by their numbers in T, which ascend."""
        self.run, self.few = run, run.inputs.only(rows)
        self.references, self.at = References(self.few), np.searchsorted(run.inputs.rows, rows)

    def problem(self, sweep: Sweep, n: int, made: Drawn) -> Problem:
        """Return head n, of these rows or of all."""
        return (self.few if sweep.declared.rowwise else self.run.inputs).problem(sweep, n, made)

    def of(self, sweep: Sweep, answer: NDArray[Any]) -> NDArray[Any]:
        """Return these rows of what such a problem answers."""
        return answer if sweep.declared.rowwise else answer[self.at]

    def reference(self, sweep: Sweep, n: int, made: Drawn) -> Exact:
        """Return the reference of head n, of these rows; its spread is that of these rows too."""
        return self.references.of(self.few.problem(sweep, n, made))

    def weights(self, sweep: Sweep, problem: Problem) -> Array:
        """Return the method's weights, (rows, columns)."""
        return self.of(sweep, problem.weights())

    def seen(self, sweep: Sweep, n: int) -> Pairs | None:
        """Return the pairs that the reference sees."""
        return self.few.one(self.references.seen(sweep.declared), n)

    def exact(self, sweep: Sweep, n: int) -> Array:
        """Return the exact weights, (rows, keys)."""
        head, mask = self.few.head(n), self.seen(sweep, n)
        return softmax.weights(head["q"][self.few.rows], head["k"], mask=mask, scale=self.few.scale)

    def spread(self, sweep: Sweep, n: int) -> Array:
        """Return the spread of the whole study, by which the table divides."""
        return self.run.references.of(self.run.problem(sweep, n)).spread

    def errors(self, sweep: Sweep, n: int, draws: int, stream: int) -> list[Array]:
        """Return the signed errors of fresh draws, (rows, E) each; another stream has other draws."""
        found = list[Array]()
        for trial in range(draws):
            made = self.few.draw(sweep, n, np.random.default_rng([self.run.seed, n, trial, stream, 2]))
            answer = self.of(sweep, self.problem(sweep, n, made).attend())
            found.append(answer - self.reference(sweep, n, made).o)
        return found
