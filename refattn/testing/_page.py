"""The report of the kit as a page that needs nothing else, and as a notebook shows it."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import refattn
from refattn._need import need
from refattn.study import _html, _ink
from refattn.testing._report import Report, described

if TYPE_CHECKING:
    import jinja2


def page(report: Report, command: str | None = None) -> str:
    """Return the page."""
    return _template().render(
        report=report,
        command=command,
        version=refattn.__version__,
        light=_ink.variables(_ink.LIGHT, _ink.METHODS_LIGHT),
        dark=_ink.variables(_ink.DARK, _ink.METHODS_DARK),
    )


def fragment(report: Report) -> str:
    """Return the table as a notebook shows it."""
    lines = "".join(f"<tr><td>{_html.visible(name)}</td>{_cells(x)}</tr>" for name, x in report.capabilities.items())
    style = f"<style>{_html.STYLE}</style>"
    head = f"<p><strong>{_html.visible(report.headline)}</strong></p>"
    return f'<div class="refattn">{style}{head}<table><tbody>{lines}</tbody></table></div>'


def _cells(counts: Any) -> str:
    text = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    return f"<td>{_html.visible(text)}</td>"


@cache
def _template() -> jinja2.Template:
    need("jinja2")
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["shown"], made.filters["described"] = _html.shown, described
    return made.get_template("report.html.j2")


def _file(name: str) -> str:
    room = "refattn.study" if name.endswith(".css") else "refattn.testing"
    return (resources.files(room) / name).read_text(encoding="utf-8")
