"""A study as JSON, as ``schema.json`` beside this file describes it."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import refattn
from refattn.study._look import Curve, Worst
from refattn.study._table import COLUMNS, Head, Row, Table
from refattn.study._target import Targets, as_dict


def as_json(
    studies: Sequence[tuple[Table, Sequence[Worst], Sequence[Curve], Mapping[str, Sequence[str]]]],
    targets: Sequence[Targets],
    command: str | None,
) -> dict[str, Any]:
    """Return what the file holds: a number that is not finite is one of the strings "inf", "-inf" and "nan"."""
    whole = {
        "versions": versions(),
        "command": command,
        "studies": [_study(*one) for one in studies],
        "targets": [as_dict(one) for one in targets],
    }
    return _plain(whole)


def versions() -> dict[str, str]:
    """Return what computed a study."""
    return {"refattn": refattn.__version__, "numpy": np.__version__, "python": platform.python_version()}


def _study(
    table: Table, worst: Sequence[Worst], curves: Sequence[Curve], assumptions: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    return {
        "title": table.title,
        "partial": table.partial,
        "notes": table.notes,
        "left_out": table.left_out,
        "violations": table.violations,
        "setting": None if table.setting is None else table.setting._asdict(),
        "rows": [_row(row) for row in table.rows],
        "worst": [one._asdict() for one in worst],
        "curves": [one._asdict() for one in curves],
        "assumptions": assumptions,
    }


def _row(row: Row) -> dict[str, Any]:
    heads: list[Head] = list(row.heads)
    return {**dict(zip(COLUMNS, row, strict=False)), "heads": [head._asdict() for head in heads]}


def _plain(x: Any) -> Any:
    """Return what JSON has words for."""
    if isinstance(x, Mapping):
        return {str(name): _plain(value) for name, value in x.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(x, str):
        return x.encode("utf-8", "replace").decode()
    if isinstance(x, np.generic):
        return _plain(x.item())
    if isinstance(x, float) and not math.isfinite(x):
        return "nan" if x != x else "inf" if x > 0 else "-inf"
    return x
