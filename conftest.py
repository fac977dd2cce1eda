"""Every test session: Hypothesis' profile, and the table of how tight the proved bounds were met.

`pytest --tightness` prints the table, and fails where a statement stayed below half of its reference in
`proofs/reference.toml` without a derived reason there, or has no reference.
"""

import dataclasses
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from numpy.typing import ArrayLike

hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@dataclasses.dataclass
class Row:
    """What one statement met."""

    worst: float = -1.0
    checks: int = 0
    where: str = ""


class Tightness:
    """Judge of proved bounds that remembers, for each statement, the largest error it met as a part of the bound."""

    def __init__(self, reference: dict[str, dict[str, Any]]) -> None:
        self.reference = reference
        self.rows: dict[str, Row] = {}

    def __call__(self, statement: str, error: ArrayLike, bound: ArrayLike, rounding: ArrayLike = 0.0) -> float:
        """Assert error <= bound + rounding for every element, and return the largest (error - rounding) / bound.

        `rounding` is what evaluating both sides may cost; an error within it counts as ratio 0, and so does an
        empty array, which is not a check. NaN, an infinite error and a negative bound or rounding fail.
        """
        error, bound, rounding = np.broadcast_arrays(
            *(np.asarray(a, dtype=np.float64) for a in (error, bound, rounding))
        )
        if not error.size:
            return 0.0
        sound = (
            (error <= bound + rounding) & np.isfinite(error) & (bound >= 0) & (rounding >= 0) & np.isfinite(rounding)
        )
        if not sound.all():
            with np.errstate(invalid="ignore"):
                excess = error - (bound + rounding)
            at = np.unravel_index(np.argmax(np.where(sound, -np.inf, np.nan_to_num(excess, nan=np.inf))), error.shape)
            index = tuple(map(int, at))
            raise AssertionError(
                f"{statement} is violated at {int((~sound).sum())} of {error.size} places, worst at {index}: "
                f"error {error[at]:.17g}, bound {bound[at]:.17g}, rounding {rounding[at]:.3g}"
            )
        proved = np.maximum(error - rounding, 0.0)  # what of the error is certainly not rounding
        ratios = np.divide(proved, bound, out=np.zeros(error.shape), where=bound > 0)
        ratio = min(float(ratios.max()), 1.0)
        row = self.rows.setdefault(statement, Row())
        row.checks += error.size
        if ratio > row.worst:
            row.worst, row.where = ratio, os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        return ratio

    def shortcomings(self) -> list[str]:
        """Return one sentence for each statement met that has no reference or stayed below half of it."""
        found: list[str] = []
        for statement in sorted(self.rows, key=_natural):
            row, known = self.rows[statement], self.reference.get(statement)
            if known is None:
                found.append(f"{statement} has no reference in proofs/reference.toml")
            elif row.worst < known["T"] / 2 and "loose" not in known:
                found.append(f"{statement} reached {row.worst:.4f}, below half of {known['T']:g}")
        return found

    def table(self) -> list[str]:
        """Return the lines of the table: statement, worst ratio, reference, checks, on what."""
        lines = [f"{'statement':<10}{'worst':>9}{'reference':>11}{'checks':>10}  on"]
        for statement in sorted(self.rows, key=_natural):
            row, known = self.rows[statement], self.reference.get(statement)
            reference = f"{known['T']:g}" if known else "none"
            loose = f"  (loose: {known['loose']})" if known and "loose" in known else ""
            lines.append(f"{statement:<10}{row.worst:>9.6f}{reference:>11}{row.checks:>10}  {row.where}{loose}")
        return lines


def _natural(statement: str) -> list[tuple[int, str]]:
    """Sort P2 before P10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", statement)]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --tightness and --laws."""
    parser.addoption("--tightness", action="store_true", help="print how tight each proved bound was met")
    parser.addoption("--laws", action="store_true", help="print which law was run on which method")


def pytest_configure(config: pytest.Config) -> None:
    """Start with an empty table."""
    reference = tomllib.loads((Path(__file__).parent / "proofs" / "reference.toml").read_text(encoding="utf-8"))
    config.stash[TIGHTNESS] = Tightness(reference)
    config.stash[CELLS] = Cells()


TIGHTNESS = pytest.StashKey[Tightness]()


class Cells(dict[tuple[str, str], float]):
    """The laws that were run, (method, law), each with the largest error / bound that it met."""

    def __repr__(self) -> str:
        """Stay short in a failing test's report."""
        return f"<{len(self)} cells>"


CELLS = pytest.StashKey[Cells]()


@pytest.fixture(scope="session")
def tight(pytestconfig: pytest.Config) -> Tightness:
    """Judge a proved bound and record how tight it was met: `target(tight("P1", error, bound, rounding))`."""
    return pytestconfig.stash[TIGHTNESS]


@pytest.fixture(scope="session")
def cells(pytestconfig: pytest.Config) -> Cells:
    """Collect the laws that are run."""
    return pytestconfig.stash[CELLS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that asked for the table and fell short of it."""
    if session.config.getoption("--tightness") and session.exitstatus == 0:
        if session.config.stash[TIGHTNESS].shortcomings():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables."""
    if config.getoption("--laws"):
        terminalreporter.section("laws: largest error / bound; - where a method does not declare what the law needs")
        for line in law_table(config.stash[CELLS]):
            terminalreporter.write_line(line)
    if config.getoption("--tightness"):
        ledger = config.stash[TIGHTNESS]
        terminalreporter.section("tightness: largest (error - rounding) / bound")
        for line in [*ledger.table(), *(f"FELL SHORT: {sentence}" for sentence in ledger.shortcomings())]:
            terminalreporter.write_line(line)


def law_table(cells: dict[tuple[str, str], float]) -> list[str]:
    """Return the lines of the table laws x methods."""
    methods, laws = (list(dict.fromkeys(cell[n] for cell in cells)) for n in (0, 1))
    lines = [f"{'law':<54}" + "".join(f"{name:>20}" for name in methods)]
    for law in laws:
        ratios = (cells.get((name, law)) for name in methods)
        lines.append(f"{law:<54}" + "".join(f"{'-':>20}" if r is None else f"{r:>20.3g}" for r in ratios))
    return [*lines, f"{len(cells)} cells run"]
