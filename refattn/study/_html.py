"""A table's rows for a page of HTML, and as a notebook shows them."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, NamedTuple

from refattn.study import _text

if TYPE_CHECKING:
    from refattn.study._table import Row, Table


class Group(NamedTuple):
    """The rows of one method and variant, as cells; `wrong` says which of them are violated."""

    method: str
    reference: str
    lines: list[list[str]]
    wrong: list[bool]


def blocks(table: Table) -> list[tuple[list[str], list[Group]]]:
    """Return the headings and groups of the sweep, and of claims over the draw."""
    return [([*headings.values()], _groups(rows, [*headings])) for headings, rows in _text.blocks(table.rows)]


def _groups(rows: list[Row], names: list[str]) -> list[Group]:
    found: list[Group] = []
    for row in rows:
        if not found or (found[-1].method, found[-1].reference) != (row.method, row.reference):
            found.append(Group(row.method, row.reference, [], []))
        found[-1].lines.append([_text.cell(row, name) for name in names])
        found[-1].wrong.append(row.holds is False)
    return found


def notebook(table: Table) -> str:
    """Return the table as HTML that stands alone in a notebook's cell."""
    parts = [f"<p><strong>{_said(line)}</strong></p>" for line in (table.title,) if line]
    parts += [f"<p>{_said(line)}</p>" for line in (*table.notes, *table.violations)]
    for headings, groups in blocks(table):
        head = "".join(f"<th>{_said(heading)}</th>" for heading in headings)
        body = "".join(
            f'<tr><th colspan="{len(headings)}" style="text-align:left">{_said(group.method)}, against '
            f"{_said(group.reference)}</th></tr>"
            + "".join("<tr>" + "".join(f"<td>{_said(cell)}</td>" for cell in line) + "</tr>" for line in group.lines)
            for group in groups
        )
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return "".join(parts)


def _said(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())
