"""The report of a study: one page to read, and the same in files for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from refattn import _check
from refattn._need import need
from refattn.study import _html, _ink
from refattn.study._figures import percent
from refattn.study._findings import Findings, find, flat
from refattn.study._json import as_json, versions
from refattn.study._section import Section
from refattn.study._table import Table, write_csv
from refattn.study._target import Targets

if TYPE_CHECKING:
    import jinja2

PAGE, NUMBERS, DATA = FILES = "study.html", "study.csv", "study.json"
"""The files of a report."""


def report(
    folder: str | PathLike[str],
    studies: Sequence[Table],
    *,
    targets: Sequence[Targets] = (),
    head: int | Sequence[int] | None = None,
    cost: float = 0.25,
    command: str | None = None,
) -> None:
    """Write ``study.html``, ``study.csv`` and ``study.json`` into a folder that is there.

    The page needs no other file, no network and no script. It answers, for each table: which method errs least within a
    cost, and by how much at most; how error falls with cost; which heads differ; what the weights of one head look
    like; on which rows a method errs most, and why; how random methods converge; what each bound assumes. The JSON is
    described by ``schema.json`` beside this module.

    Parameters
    ----------
    folder
        Where the files go.
    studies
        Tables that `compare` returned.
    targets
        What `refattn.study.target` answered.
    head
        The head whose weights are shown: its number, or an index for each leading axis. Unless given, the one in which
        the best method errs most.
    cost
        The part of exact attention's cost within which methods are compared.
    command
        The command that makes this report again.

    Raises
    ------
    ValueError, TypeError
        Neither table nor target; a head that a table does not have; a cost that is not positive.
    ImportError
        Without Matplotlib or Jinja2.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from refattn import masks, study
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 4))
    >>> table = study.compare(q, k, v, mask=masks.causal(), methods=["longformer"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     study.report(folder, [table], cost=0.5)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['study.csv', 'study.html', 'study.json']
    """
    cost = _check.positive("cost", cost)
    if not studies and not targets:
        raise ValueError("studies is empty; expected at least one table, or targets")
    for table in studies:
        if head is not None:
            flat(head, () if table.setting is None else table.setting.heads)
    need("matplotlib", "jinja2")
    path = Path(folder)
    write_csv(path / NUMBERS, studies)  # first: the rest takes a while
    findings = [find(table, cost, head) for table in studies]
    (path / PAGE).write_text(html(findings, targets, command), encoding="utf-8", newline="\n")
    looked = [(found.table, found.worst, found.curves, found.assumed) for found in findings]
    text = json.dumps(as_json(looked, targets, command), indent=1, ensure_ascii=False, allow_nan=False)
    (path / DATA).write_text(text + "\n", encoding="utf-8", newline="\n")


def html(findings: Sequence[Findings], targets: Sequence[Targets] = (), command: str | None = None) -> str:
    """Return the page."""
    return _template().render(
        sections=[Section(found, f"s{n}") for n, found in enumerate(findings, 1)],
        targets=targets,
        command=command,
        versions=versions(),
        light=_ink.variables(_ink.LIGHT, _ink.METHODS_LIGHT),
        dark=_ink.variables(_ink.DARK, _ink.METHODS_DARK),
    )


@cache
def _template() -> jinja2.Template:
    import jinja2

    page = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["percent"], page.filters["digits"] = percent, "{:.3g}".format
    page.filters["shown"], page.filters["name"] = _html.shown, _html.unbroken
    return page.get_template("report.html.j2")


def _file(name: str) -> str:
    return (resources.files("refattn.study") / name).read_text(encoding="utf-8")
