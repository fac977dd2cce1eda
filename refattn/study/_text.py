"""A table's rows as text: what is above each column, each cell, and the lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refattn.study._table import Row

HEADINGS: Mapping[str, str] = {
    "budget": "budget",
    "cost": "flops÷ exact",
    "error_max": "error max",
    "error_rms": "error RMS",
    "error_relative": "error÷ spread",
    "bound_max": "bound max",
    "bound_relative": "bound÷ spread",
    "bound_ratio": "bound÷ error",
    "seconds": "s",
    "holds": "holds",
}
"""What is above each column of the text."""
HEADINGS_OVER_DRAWS: Mapping[str, str] = {
    "budget": "budget",
    "error_max": "error max",
    "error_relative": "error÷ spread",
    "bound_max": "bound max",
    "bound_relative": "bound÷ spread",
    "bound_ratio": "bound÷ error",
    "vacuous": "vac- uous",
    "covered": "covered",
    "seconds": "s",
    "holds": "holds",
}
"""And above those of claims over the draw."""


def blocks(rows: Iterable[Row]) -> Iterator[tuple[Mapping[str, str], list[Row]]]:
    """Yield rows that share their columns, with what is above those: the sweep, then claims over the draw."""
    every = list(rows)
    for headings, over_draws in ((HEADINGS, False), (HEADINGS_OVER_DRAWS, True)):
        found = [row for row in every if (row.vacuous is not None) == over_draws]
        if found:
            yield headings, found


def lines(rows: Sequence[Row], headings: Mapping[str, str]) -> list[str]:
    """Return the lines of rows with the same columns, under their headings."""
    above = [["", *heading.split(" ", 1)][-2:] for heading in headings.values()]
    cells = [*zip(*above, strict=True), *([cell(row, name) for name in headings] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [" ".join([one.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for one, *rest in cells]
    shown, group = text[:2], None
    for row, line in zip(rows, text[2:], strict=True):
        if (row.method, row.reference) != group:
            group = row.method, row.reference
            shown.append(f"{row.method}, against {row.reference}")
        shown.append(line)
    return shown


def cell(row: Row, name: str) -> str:
    """Return one value as it is shown."""
    x: Any = getattr(row, name)
    if row.vacuous == 1 and name == "bound_max":
        return "vacuous"
    if name == "holds" and x is None and row.bound_max is not None and row.vacuous != 1:
        return "not finite"
    if x is None or x == "" or x != x:
        return "—"
    if name == "holds":
        return "yes" if x else "VIOLATED"
    if isinstance(x, str):
        return x
    if name == "seconds":
        return f"{x:.2f}"
    if name in ("covered", "vacuous"):
        return _part(x)
    return f"{x:.3g}" if x == 0 or 1e-3 <= x < 1e3 else f"{x:.1e}"


def _part(x: float) -> str:
    """Show a part of all, such that only none is 0 and only all is 1."""
    text = f"{x:.4g}"
    return text if text not in ("0", "1") or x in (0, 1) else ("<1e-4" if x < 0.5 else ">.9999")
