"""A table's numbers as HTML: in a notebook, and in the report."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from refattn.study import _text

if TYPE_CHECKING:
    from refattn.study._table import Row, Table

STYLE = """
.refattn table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.refattn th,.refattn td{padding:.15em .6em;text-align:right;white-space:nowrap}
.refattn th:first-child,.refattn td:first-child{text-align:left}
.refattn tbody th{text-align:left;padding-top:.7em}
.refattn .violated{color:#c22;font-weight:bold}
"""


def notebook(table: Table) -> str:
    """Return a table with its title, notes and violations, as a notebook shows it."""
    said = "".join(f"<p>{visible(note)}</p>" for note in table.notes)
    failed = "".join(f'<p class="violated">{visible(one)}</p>' for one in table.violations)
    title = f"<p><strong>{visible(table.title)}</strong></p>" if table.title else ""
    return f'<div class="refattn"><style>{STYLE}</style>{title}{said}{numbers(table)}{failed}</div>'


def numbers(table: Table) -> str:
    """Return the rows as tables: one of the sweep, one of claims over the draw; each method is a group."""
    return "".join(_table(list(headings), rows) for headings, rows in _text.blocks(table.rows))


def _table(names: list[str], rows: list[Row]) -> str:
    above = "".join(f'<th scope="col">{_heading(name)}</th>' for name in names)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.reference), []).append(row)
    bodies = "".join(
        f'<tbody><tr><th scope="rowgroup" colspan="{len(names)}">{visible(method)}, against {visible(reference)}</th>'
        f"</tr>{''.join(_row(row, names) for row in own)}</tbody>"
        for (method, reference), own in groups.items()
    )
    return f"<table><thead><tr>{above}</tr></thead>{bodies}</table>"


def _row(row: Row, names: list[str]) -> str:
    cells = [_text.cell(row, name) for name in names]
    marked = [' class="violated"' if cell == "VIOLATED" else "" for cell in cells]
    return f"<tr>{''.join(f'<td{m}>{visible(c)}</td>' for m, c in zip(marked, cells, strict=True))}</tr>"


def _heading(name: str) -> str:
    text = {**_text.HEADINGS, **_text.HEADINGS_OVER_DRAWS}[name]
    return visible(text.replace("- ", "").replace("÷", " ÷"))


def visible(text: str) -> str:
    """Return text for HTML: escaped, with a sign in the place of what cannot be seen or written."""
    return escape(shown(text), quote=True)


def shown(text: str) -> str:
    """Return text in which line breaks and tabs are signs, and what cannot be shown is a question mark in a box."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(c if c.isprintable() else signs.get(c, "\ufffd") for c in text)


def unbroken(name: str) -> str:
    """Return a method's name whose options are not broken over lines, as at ``tokens=(0,)``."""
    return name.replace("=", "=\u2060")
