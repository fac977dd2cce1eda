"""The judge of proved bounds: it is hard to fool, and it remembers the worst."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def judge(tight: Any) -> Any:
    """Start a judge of one's own, so that trials do not enter the session's table."""
    return type(tight)({"P1": {"T": 1.0}, "F1": {"T": 1.0, "loose": "because"}})


def test_it_returns_and_remembers_the_largest_part_of_the_bound(judge: Any) -> None:
    assert judge("P1", [1.0, 1.0], [4.0, 2.0]) == 0.5
    assert judge("P1", 1.0, 4.0) == 0.25
    assert judge.rows["P1"].worst == 0.5
    assert judge.rows["P1"].checks == 3
    assert "test_it_returns_and_remembers" in judge.rows["P1"].where


def test_rounding_is_allowed_and_counts_for_nothing(judge: Any) -> None:
    assert judge("P1", 1e-16, 0.0, 2e-16) == 0.0
    assert judge("P1", 0.75, 1.0, 0.25) == 0.5
    assert judge("P1", 1.25, 1.0, 0.25) == 1.0


@pytest.mark.parametrize(
    ("error", "bound", "rounding"),
    [
        (2.0, 1.0, 0.0),
        (1.5, 1.0, 0.25),
        (np.nan, 1.0, 0.0),
        (0.0, np.nan, 0.0),
        (0.0, 1.0, np.nan),
        (np.inf, np.inf, 0.0),
        (-np.inf, 1.0, 0.0),
        (2.0, 1.0, np.inf),
        (-1.0, -0.5, 0.0),
        (0.0, 1.0, -0.5),
        ([0.0, 2.0], [1.0, 1.0], 0.0),
        ([[0.0], [np.nan]], [1.0, 1.0], 0.0),
    ],
)
def test_it_is_not_fooled(judge: Callable[..., float], error: Any, bound: Any, rounding: Any) -> None:
    with pytest.raises(AssertionError, match="P1 is violated at"):
        judge("P1", error, bound, rounding)


def test_the_message_names_the_worst_place(judge: Any) -> None:
    with pytest.raises(AssertionError, match=r"violated at 2 of 4 places, worst at \(1, 0\): error 5, bound 1"):
        judge("P1", [[0.0, 2.0], [5.0, 0.0]], 1.0)


def test_nothing_to_judge_is_no_check(judge: Any) -> None:
    assert judge("P1", [], []) == 0.0
    assert not judge.rows


def test_half_of_the_reference_is_owed_unless_a_reason_is_given(judge: Any) -> None:
    judge("P1", 0.25, 1.0)
    judge("F1", 0.25, 1.0)
    judge("Q9", 1.0, 1.0)
    assert judge.shortcomings() == [
        "P1 reached 0.2500, below half of 1",
        "Q9 has no reference in proofs/reference.toml",
    ]
    judge("P1", 0.5, 1.0)
    assert len(judge.shortcomings()) == 1
    assert [line.split()[0] for line in judge.table()] == ["statement", "F1", "P1", "Q9"]
