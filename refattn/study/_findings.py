"""What a report says of a table: the best within a cost, and the closer looks that its pages and files share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refattn import _check
from refattn.method import Claim
from refattn.study import _look
from refattn.study._look import Curve, Matrices, Worst
from refattn.study._table import Row, Table

MOST = 384
"""Rows and keys of a matrix that is shown, at most: of the best method, and half as many of the others."""


class Assumption(NamedTuple):
    """A claim that was judged: of which method, and what it assumes."""

    method: str
    claim: Claim


class Findings(NamedTuple):
    """All that is found out for one table, once.

    Parameters
    ----------
    table, cost
        The table, and the part of exact attention's cost at which methods are compared.
    within
        By method and variant the row that errs least within that cost, the best first; what answers another
        question than the study's (no mask, or another one) comes after all that answer it.
    best
        The first of them; None where none has a finite error.
    head
        The flat index of the head whose weights are shown.
    worst, curves, assumptions
        Worst rows of these rows, what is drawn, and what the claims assume; empty without a run.
    matrices
        Weights of that head: the best method's, then each other method's.
    """

    table: Table
    cost: float
    within: tuple[Row, ...]
    best: Row | None
    head: int
    worst: tuple[Worst, ...]
    curves: tuple[Curve, ...]
    assumptions: tuple[Assumption, ...]
    matrices: tuple[Matrices, ...]

    @property
    def assumed(self) -> dict[str, tuple[str, ...]]:
        """The assumptions by method."""
        return {} if self.table.run is None else _look.assumptions(self.table)


def find(table: Table, cost: float, head: int | Sequence[int] | None = None) -> Findings:
    """Look closer at a table."""
    shape = () if table.setting is None else table.setting.heads
    chosen = None if head is None else flat(head, shape)
    rank = {name: n for n, name in enumerate(dict.fromkeys(row.method for row in table.rows))}
    rows = sorted(
        _look.within(table, cost).values(),
        key=lambda row: (not asked(table, row), _last(row.error_relative), rank[row.method]),
    )
    best = next((row for row in rows if math.isfinite(row.error_relative)), None)
    if chosen is None:
        errors = [] if best is None else [_first(one.error_relative) for one in best.heads]
        chosen = int(np.argmax(errors)) if errors else 0
    if table.run is None:
        return Findings(table, cost, tuple(rows), best, chosen, (), (), (), ())
    mine = [row for row in rows if row.heads]
    worst = [one for row in mine for one in _look.worst_rows(table, row, 3 if row is best else 1)]
    claims = {sweep.declared.name: sweep.declared.claims for sweep in table.run.plan}
    firsts = {row.name: row for row in reversed(mine) if best is not None and row.name != best.name}
    shown = [] if best is None or not best.heads else [best, *(row for row in mine if firsts.get(row.name) is row)]
    return Findings(
        table,
        cost,
        tuple(rows),
        best,
        chosen,
        tuple(worst),
        _look.curves(table),
        tuple(Assumption(name, claim) for name in table.methods for claim in claims.get(name, ())),
        tuple(_look.matrices(table, row, chosen, MOST if row is best else MOST // 2) for row in shown),
    )


def flat(head: int | Sequence[int], shape: tuple[int, ...]) -> int:
    """Return the number of a head that is given by its number, or by one index for each leading axis."""
    total = math.prod(shape)
    if isinstance(head, int | np.integer):
        number = _check.integer("head", head, 0)
        if number < total:
            return number
    elif len(head) == len(shape) and all(0 <= int(i) < n for i, n in zip(head, shape, strict=True)):
        return int(np.ravel_multi_index([int(i) for i in head], shape)) if shape else 0
    elif len(head) == 1 and 0 <= int(head[0]) < total:
        return int(head[0])
    raise ValueError(f"head is {head!r}; expected a head of {shape}, or its number below {total}")


def asked(table: Table, row: Row) -> bool:
    """Whether a row answers the study's question: exact attention with the study's mask."""
    masked = table.setting is not None and table.setting.mask is not None
    return row.reference == ("softmax, same mask" if masked else "softmax, unmasked")


def _last(x: float) -> float:
    return x if x == x else math.inf


def _first(x: float) -> float:
    return x if x == x else -1.0
