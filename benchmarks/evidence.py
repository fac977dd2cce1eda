"""Print the table of ball arithmetic: ``python -m benchmarks.evidence``.

Every method's verbs are run in float64 on drawn problems and compared with the same verbs in 200-bit ball arithmetic;
gradients with directional derivatives, one random integer direction over all arguments. What is allowed is derived
(`refattn.rounding.allowance`). The problems are those of the laws, and for softmax those of its proof too: logits to
±1e4, subnormal weights, sinks, rows that see nothing, softcaps, biases. Exits 1 if anything is out of bounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st

from refattn import method, rounding
from refattn.testing import Ball, assert_within
from refattn.testing.ball import precision
from refattn.testing.strategies import Case, cases

VERBS = ("attend", "partial", "weights", "vjp")


@dataclass
class Row:
    """What one verb met."""

    problems: int = 0
    elements: int = 0
    worst: float = 0.0
    violations: int = 0

    def judge(self, actual: Any, expected: Ball, bound: Any) -> None:
        """Judge one answer, and count instead of stopping."""
        self.elements += int(np.size(actual))
        try:
            self.worst = max(self.worst, assert_within(actual, expected, bound, empty=True))
        except AssertionError as error:
            self.violations += 1
            print(error, file=sys.stderr)


def forward(case: Case, verb: str) -> Iterator[tuple[Any, Any, Any]]:
    """Yield answers of a forward verb: computed, real, allowed."""
    without = case.method.linear_in if verb == "weights" else ()
    work: Callable[..., Any] = getattr(case.module, verb)
    positional, named = case.arguments(without=without)
    lifted, lifted_named = case.given(**{s: Ball.lift(x) for s, x in case.arrays.items()}).arguments(without=without)
    answers = work(*positional, **named), work(*lifted, **lifted_named), rounding.allowance(work, *positional, **named)
    yield from zip(*(x if isinstance(x, tuple) else (x,) for x in answers), strict=True)


def backward(case: Case, rng: np.random.Generator) -> Iterator[tuple[Any, Any, Any]]:
    """Yield zero, how far gradients are from the derivative along one direction, and what is allowed."""
    positional, named = case.arguments()
    do = rng.integers(-4, 5, (case.sizes["T"], case.sizes["E"])) / 2
    got = case.module.vjp(do, *positional, **named)._asdict()
    allowed = rounding.allowance(case.module.vjp, do, *positional, **named)._asdict()
    steps = {s: rng.integers(-2, 3, np.shape(x)).astype(float) for s, x in case.arrays.items()}
    moved = case.given(**{s: Ball.along(x, steps[s]) for s, x in case.arrays.items()})
    apart, room = -(moved.attend().derivative() * do).sum(), 0.0
    for name, step in steps.items():
        apart = apart + (Ball.lift(got[name]) * step).sum()
        room += float((allowed[name] * abs(step)).sum())
    yield 0.0, apart, room * rounding.EVALUATION


def measure(module: ModuleType, verb: str, examples: int) -> Row:
    """Judge a verb on drawn problems, the same ones each time."""
    row = Row()

    @hypothesis.settings(max_examples=examples, database=None, derandomize=True, deadline=None)
    @hypothesis.given(case=cases(module, least=1), seed=st.integers(0, 2**32 - 1))
    def judge(case: Case, seed: int) -> None:
        rng = np.random.default_rng(seed)
        if module.__name__ == "refattn.softmax" and rng.random() < 0.5:
            case = harder(case, rng)
        row.problems += 1
        with precision():
            for answer in backward(case, rng) if verb == "vjp" else forward(case, verb):
                row.judge(*answer)

    judge()
    return row


def harder(case: Case, rng: np.random.Generator) -> Case:
    """Make a problem of softmax hurt: huge logits, weights that underflow, keys that a bias hides."""
    arrays, shape = dict(case.arrays), (case.sizes["T"], case.sizes["S"])
    if rng.random() < 0.5:
        arrays["q"], arrays["k"] = arrays["q"] * 50, arrays["k"] * 50
    else:
        arrays["bias"] = np.where(rng.random(shape) < 0.5, rng.uniform(-745, -700, shape), 0.0)
        arrays["bias"][rng.random(shape) < 0.2] = -np.inf
    return Case(case.module, case.sizes, arrays, case.options)


def main() -> int:
    """Print the table and return the exit status."""
    start, bad = time.perf_counter(), 0
    print(f"{'method':<22}{'verb':<9}{'problems':>9}{'elements':>10}{'worst error / bound':>21}")
    for module in method.modules().values():
        for verb in VERBS:
            if hasattr(module, verb):
                row = measure(module, verb, 400 if module.__name__ == "refattn.softmax" else 100)
                bad += row.violations
                name = module.__name__.rpartition(".")[2]
                print(f"{name:<22}{verb:<9}{row.problems:>9}{row.elements:>10}{row.worst:>21.3f}", flush=True)
    print(f"{bad} out of bounds, {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
