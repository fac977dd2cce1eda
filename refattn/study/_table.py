"""The table that a study answers with: plain text, Rich, CSV and dictionaries."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import rich.console


class Row(NamedTuple):
    """One method at one budget, over every head, row and column.

    Parameters
    ----------
    method
        The method's name, and its variant in brackets or after a comma.
    budget
        Such as ``"window=38"``; ``""`` where the method has none.
    reference
        What "exact" it is measured against.
    cost
        Its floating-point operations ÷ those of exact attention with the study's mask.
    error_max, error_rms
        Of |õ − o|.
    error_relative
        Root mean square, over all elements, of |õ − o| ÷ the range of that column of v over the keys that the row
        sees: 1 is as wrong as an average of the same values can be. An error within rounding counts as 0.
    bound_max, bound_relative
        Of the proved bound: its largest value, and the same mean as `error_relative`. None without a claim.
    bound_ratio
        Median of bound ÷ error over the elements whose error is above rounding; NaN where there is none.
    seconds
        Spent in `attend`, over all heads.
    holds
        Whether every element's error is within bound and rounding; None where there is no claim, or the rounding
        itself has no finite bound.
    """

    method: str
    budget: str
    reference: str
    cost: float
    error_max: float
    error_rms: float
    error_relative: float
    bound_max: float | None
    bound_relative: float | None
    bound_ratio: float | None
    seconds: float
    holds: bool | None


HEADINGS: tuple[str, ...] = (
    "method", "budget", "exact is", "flops ÷ exact", "error max", "error RMS", "error ÷ spread", "bound max",
    "bound ÷ spread", "bound ÷ error", "s", "holds",
)  # fmt: skip


class Table:
    """Rows, in the order of the sweep, and what they were measured on.

    `str` and Rich print it; `to_csv` and `to_dict` keep every digit.

    Examples
    --------
    >>> from refattn.study import Row, Table
    >>> row = Row("none", "", "softmax, unmasked", 0.5, 0.25, 0.1, 0.2, 0.5, 0.4, 2.0, 0.01, True)
    >>> Table([row], "toy").to_dict()["error_max"]
    [0.25]
    """

    def __init__(self, rows: Iterable[Row], title: str = "") -> None:
        """Hold rows under a title."""
        self.rows: tuple[Row, ...] = tuple(rows)
        self.title = title

    def __repr__(self) -> str:
        """Return the plain text."""
        return str(self)

    def __str__(self) -> str:
        """Return plain text: a heading, a line for each row, and a line for each violated claim."""
        lines = [HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if n < 3 else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*([self.title] if self.title else []), *text, *self.violations])

    def __rich_console__(self, console: rich.console.Console, options: rich.console.ConsoleOptions) -> Iterator[Any]:
        """Render for a Rich console, a method at a time so that it fits a terminal of 80 columns."""
        import rich.table
        import rich.text

        if self.title:
            yield rich.text.Text(self.title, style="bold")
        headings = [heading.split(" ", 1) for heading in ("budget", *HEADINGS[3:])]
        lines = [(cells[1], *cells[3:]) for cells in map(_cells, self.rows)]
        widths = [max(map(len, (*heading, *column))) for heading, *column in zip(headings, *lines, strict=True)]
        table, above = rich.table.Table(), None
        for row, cells in zip(self.rows, lines, strict=True):
            if (row.method, row.reference) != above:
                if above:
                    yield table
                title = rich.text.Text(f"{row.method}, against {row.reference}", style="italic")
                table = rich.table.Table(
                    title=title,
                    title_justify="left",
                    box=None,
                    padding=(0, 1, 0, 0),
                    pad_edge=False,
                    show_header=above is None,
                )
                for n, (heading, width) in enumerate(zip(headings, widths, strict=True)):
                    table.add_column(
                        "\n".join(heading), justify="right" if n else "left", min_width=width, no_wrap=True
                    )
                above = row.method, row.reference
            table.add_row(*map(rich.text.Text, cells), style="bold red" if row.holds is False else None)
        yield table
        yield from (rich.text.Text(sentence, style="bold red") for sentence in self.violations)

    @property
    def violations(self) -> tuple[str, ...]:
        """One sentence for each claim that failed."""
        return tuple(
            f"VIOLATED: {row.method} {row.budget}".rstrip() + ": an error is above its bound and rounding"
            for row in self.rows
            if row.holds is False
        )

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the columns by name."""
        return {name: [row[n] for row in self.rows] for n, name in enumerate(Row._fields)}

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the rows as CSV, with the title in the first column; floats come back bit for bit."""
        write_csv(path, [self])


def write_csv(path: str | PathLike[str], tables: Sequence[Table]) -> None:
    """Write the rows of several tables as one CSV file; what is None is empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["input", *Row._fields])
        writer.writerows([table.title, *row] for table in tables for row in table.rows)


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (row.cost, *row[4:10])
    shown = ("—" if x is None or x != x else f"{x:.3g}" for x in numbers)
    verdict = {True: "yes", False: "VIOLATED", None: "—"}[row.holds]
    return row.method, row.budget or "—", row.reference, *shown, f"{row.seconds:.2f}", verdict
