"""Drawn problems in the conformance kit: Hypothesis draws them and shrinks what fails."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis
import numpy as np

from refattn.conventions import Call
from refattn.testing import strategies
from refattn.testing._calling import Told
from refattn.testing._places import cast
from refattn.testing._report import Result
from refattn.testing._verdicts import INNOCENT, KINDS, Verdict

if TYPE_CHECKING:
    from refattn.testing._run import Run

MOST, SECONDS, THOROUGH = 100, 10.0, 10
"""Problems, seconds for them and again for shrinking one, and how much more a thorough run takes."""


class _Guilty(Exception):
    """A drawn problem on which the function is at fault."""


class _Enough(BaseException):
    """Time is up: passes through Hypothesis."""


def draw(run: Run) -> Result:
    """Return the verdict on drawn problems: the worst that any has, or that on the smallest with a fault."""
    from refattn.testing._run import DRAWN

    more = THOROUGH if run.thorough else 1
    most, seconds, began = MOST * more, SECONDS * more, time.monotonic()
    found: list[tuple[float, Call, Verdict, Told | None]] = []
    worst, tried = Verdict("right"), 0

    @hypothesis.seed(run.seed)
    @hypothesis.settings(
        max_examples=most,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @hypothesis.given(strategies.problems(run.profile, without=run.unsupported))
    def trial(call: Call) -> None:
        nonlocal worst, tried
        if time.monotonic() - began > (2 * seconds if found else seconds):
            raise _Enough
        call = cast(call, run.dtype)
        verdict, told = run.answer(call)
        tried += 1
        if verdict.kind in INNOCENT:
            if KINDS.index(verdict.kind) > KINDS.index(worst.kind) or verdict.ratio > worst.ratio:
                worst = verdict
            return
        size = float(sum(np.size(x) for x in (call.q, call.k, call.v)))
        if not found or size <= found[-1][0]:
            found.append((size, call, verdict, told))
        if verdict.kind in ("hung", "crashed"):
            raise _Enough  # each costs a deadline or a start: not shrunk
        raise _Guilty(verdict.kind)

    try:
        trial()
    except (_Guilty, _Enough):
        pass
    verdict, call, answer = worst, None, None
    if found:
        _, call, verdict, told = found[-1]
        answer = run.kept(verdict, call, told)
    spent = f"{tried} problems were drawn in {time.monotonic() - began:.0f} s"
    verdict = replace(verdict, notes=(*verdict.notes, spent))
    return Result(DRAWN, DRAWN, "forward", verdict, call, run.seed, answer)
