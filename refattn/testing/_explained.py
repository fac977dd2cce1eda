"""Why a function is wrong: what explains each answer, and what explains them all."""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refattn.conventions import Convention
from refattn.testing._arithmetic import Arithmetic
from refattn.testing._report import Result

SECONDS = 15.0
"""For the diagnosis of all answers of a function."""


def explained(
    results: Sequence[Result], convention: Convention, arithmetic: Arithmetic, seconds: float = SECONDS
) -> tuple[list[Result], str]:
    """Return the results with diagnoses of wrong answers, small ones first while there is time, and what they share."""
    diagnosis: Any = importlib.import_module("refattn.testing._diagnosis")
    until, found, votes = time.monotonic() + seconds, list(results), Counter[str]()
    wrong = [n for n, one in enumerate(results) if one.answer is not None and not one.verdict.ok]
    done = 0
    for n in sorted(wrong, key=lambda n: np.size(getattr(results[n].answer, "o", 0))):
        if time.monotonic() > until:
            break
        call, answer = results[n].call, results[n].answer
        assert call is not None and answer is not None
        own = diagnosis.diagnose(call, convention, np.asarray(answer.o, np.float64), answer.lse, arithmetic)
        found[n] = replace(results[n], verdict=replace(results[n].verdict, diagnosis=str(own)))
        votes.update(dict.fromkeys(one.said for one in own.explanations).keys())
        done += 1
    if not done:
        return found, ""
    if not votes:
        return found, f"not explained by anything known: none of {done} wrong answers is"
    most = max(votes.values())
    said = [f"your kernel {said}" for said, n in votes.items() if n == most]
    return found, "\n".join([f"what explains {most} of {done} wrong answers that were looked at:", *said[:5]])
