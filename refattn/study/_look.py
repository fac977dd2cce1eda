"""A closer look at what a study measured: equal cost, worst rows and why, convergence of what is drawn, one head."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.study._table import Row, Table

Array = NDArray[np.float64]


class Worst(NamedTuple):
    """A row of one head on which a method errs most, and what its weights say of it.

    Parameters
    ----------
    method, budget
        As in the table's row.
    head, row
        The flat index into the leading axes, and the row's number in T.
    error, bound
        Root mean square of error ÷ spread over the row's columns, and of bound ÷ spread; None without a claim.
    dropped
        Softmax mass of the keys that the row sees and the method gives a weight of exactly 0.
    variation
        Half the absolute sum of the differences of weights; None where they multiply something else than v.
    span
        Largest less smallest logit over the keys that the row sees, in nats.
    keys
        Effective number of keys, the exponential of the entropy of the exact weights.
    deviation
        Of a method that draws: the root mean square, over columns and fresh draws, of the error less its mean over
        the draws, ÷ spread. None where nothing is drawn.
    top
        The three keys of the largest exact weights: (key, weight), the largest first.
    why
        One sentence that names what of these explains the error.
    """

    method: str
    budget: str
    head: int
    row: int
    error: float
    bound: float | None
    dropped: float | None
    variation: float | None
    span: float
    keys: float
    deviation: float | None
    top: tuple[tuple[int, float], ...]
    why: str


class Curve(NamedTuple):
    """Error of a method that draws, over its budgets, in fresh draws.

    `low`, `middle` and `high` are the 5 %, 50 % and 95 % quantiles, over `draws` draws, of the root mean square of
    error ÷ spread over the rows tried of all heads; one for each of the ascending `budgets` of the option `name`.
    """

    method: str
    name: str
    budgets: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]
    draws: int


class Matrices(NamedTuple):
    """Weights of one head: exact and the method's, (rows, keys); `difference` is None where columns are not keys.

    `rows` and `keys` are the numbers of the rows and columns shown, evenly spaced where there are more than fit.
    """

    method: str
    budget: str
    head: int
    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    exact: Array
    weights: Array
    difference: Array | None


def equal(table: Table, cost: float = 0.25) -> dict[str, Row]:
    """Return by method and variant its row of the largest cost that is at most `cost`, where it has one.

    Claims over the draw are no rows of their own here.
    """
    found: dict[str, Row] = {}
    for row in table.rows:
        if row.vacuous is None and row.cost <= cost and (row.method not in found or row.cost > found[row.method].cost):
            found[row.method] = row
    return found
