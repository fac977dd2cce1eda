"""The table of speed and memory: a goal is a number that is compared."""

import subprocess
import sys
import types

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.__main__ import Measure, row


@pytest.mark.parametrize(
    "value, goal, verdict", [(2.0, 2, "met"), (2.1, 2, "missed"), (float("nan"), 2, "missed"), (9.0, None, "-")]
)
def test_a_row_says_whether_its_goal_is_met(
    value: float, goal: float | None, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert row("what", Measure(1.0, "{:.0f} s", 5), Measure(2.0, "{:.1f}")) is True
    capsys.readouterr()
    assert row("what", Measure(value, "{:.1f} s", goal)) is (verdict != "missed")
    assert capsys.readouterr().out.split()[-1] == verdict


@pytest.mark.parametrize("least, code", [(0.05, 0), (0.07, 1)])
def test_a_section_that_misses_its_goal_exits_1(least: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.09, least] + [0.08] * 7)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: str(next(taken)))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "importing"])
    assert benchmarks.main() == code


@pytest.mark.parametrize("codes, code", [([0, 0, 0, 0], 0), ([0, 1, 0, 0], 1)])
def test_one_section_that_fails_fails_the_table(codes: list[int], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(codes)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=next(left)))
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert benchmarks.main() == code and next(left, None) is None
