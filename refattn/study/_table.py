"""The table that a study answers with: rows that are sliced, printed, drawn, and kept as CSV."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from refattn.study import _text

if TYPE_CHECKING:
    import rich.text
    from matplotlib.figure import Figure

    from refattn.study._run import Run

Array = NDArray[np.float64]


class Head(NamedTuple):
    """What a row says of one head alone; the columns are `Row`'s.

    `worst` are the measured rows (numbers of T) of the largest errors, the worst first, and `worst_error` each one's
    root mean square of error ÷ spread.
    """

    error_max: float
    error_relative: float
    bound_relative: float | None
    holds: bool | None
    worst: tuple[int, ...]
    worst_error: tuple[float, ...]


class Setting(NamedTuple):
    """What a table was measured on, and how.

    Parameters
    ----------
    sizes
        T, S, D and E.
    heads
        The leading axes of the answer, such as (layers, heads).
    mask
        The mask as text; None where all is seen.
    scale
        As given; None is 1/√D.
    rows
        The rows that were measured; None where all were.
    seed, delta, trials
        As given to `compare`.
    cost
        The largest cost that was measured; None where there was no limit.
    layers
        Labels of the first leading axis, where there are any.
    tokens
        The keys' tokens, where they are known.
    """

    sizes: Mapping[str, int]
    heads: tuple[int, ...]
    mask: str | None
    scale: float | None
    rows: tuple[int, ...] | None
    seed: int
    delta: float
    trials: int
    cost: float | None = None
    layers: tuple[str, ...] | None = None
    tokens: tuple[str, ...] | None = None


class Row(NamedTuple):
    """One method at one budget, over every head, row and column.

    Parameters
    ----------
    method
        The method's name, and its variant in brackets or after a comma. A claim over the draw has rows of its own.
    budget
        Such as ``"window=38"``; ``""`` where the method has none.
    reference
        What "exact" it is measured against.
    cost
        Its floating-point operations ÷ those of exact attention with the study's mask.
    error_max, error_rms
        Of |õ − o|.
    error_relative
        Root mean square, over all elements, of |õ − o| ÷ the range of that column of v over the keys that the head's
        rows see: 1 is as wrong as an average of the same values can be. An error within rounding counts as 0.
    seconds
        Spent in `attend`, over all heads.
    bound_max, bound_relative
        Of the proved bound: its largest value, and the same mean as `error_relative`. None without a claim.
    bound_ratio
        Median of bound ÷ error over the elements whose error is above rounding; NaN where there is none.
    holds
        Whether every element's error is within bound and rounding; None where there is no claim, or where some
        answer or its rounding is not finite and no other element fails.
    covered
        Of a claim that holds with probability 1 − δ: the part of all draws and elements in which it held. `holds` then
        says whether no element failed in more draws than the binomial distribution allows.
    vacuous
        Of such a claim: the part of elements that it says nothing of, its bound being infinite. The other columns are
        about the rest, errors in every draw; `bound_ratio` is the median of bound ÷ the error's 1 − δ quantile. NaN
        errors and an infinite bound where it says nothing at all.
    heads
        The same by head, in the order of the leading axes; empty for claims over the draw.
    """

    method: str
    budget: str
    reference: str
    cost: float
    error_max: float
    error_rms: float
    error_relative: float
    seconds: float
    bound_max: float | None = None
    bound_relative: float | None = None
    bound_ratio: float | None = None
    holds: bool | None = None
    covered: float | None = None
    vacuous: float | None = None
    heads: tuple[Head, ...] = ()

    @property
    def name(self) -> str:
        """The method's name in the table of methods, without its variant."""
        return self.method.partition(" ")[0].partition(",")[0]


STOPPED = "partial: stopped before the end"
"""The note of what was stopped."""
COLUMNS = Row._fields[:-1]
"""The fields of a row that are one value each."""


class Table:
    """Rows, in the order of the sweep, and what they were measured on.

    `str`, Rich and notebooks print it; `write_csv` keeps every digit. ``table["longformer"]`` is the table of that
    method alone, all its variants; ``table[["longformer", "performer"]]`` of several; ``table[3:8]`` of some rows; and
    ``table[3]`` is a row.

    Examples
    --------
    >>> from refattn.study import Row, Table
    >>> errors = {"error_max": 0.25, "error_rms": 0.1, "error_relative": 0.2}
    >>> row = Row(method="none", budget="", reference="softmax, unmasked", cost=0.5, seconds=0.01, **errors)
    >>> print(Table([row], "toy"))
    toy
           flops÷ error error error÷ bound bound÷ bound÷
    budget  exact   max   RMS spread   max spread  error    s holds
    none, against softmax, unmasked
    —         0.5  0.25   0.1    0.2     —      —      — 0.01     —
    >>> Table([row], "toy").methods
    ('none',)
    """

    def __init__(
        self,
        rows: Iterable[Row],
        title: str = "",
        *,
        setting: Setting | None = None,
        partial: bool = False,
        left_out: Mapping[str, str] | None = None,
        run: Run | None = None,
    ) -> None:
        """Hold rows under a title; `partial` where the study was stopped, `left_out` what was not measured and why."""
        self.rows: tuple[Row, ...] = tuple(rows)
        self.title, self.setting, self.partial = title, setting, partial
        self.left_out: dict[str, str] = dict(left_out or {})
        self.run = run

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows."""
        return iter(self.rows)

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice | str | Sequence[str]) -> Table: ...
    def __getitem__(self, key: int | slice | str | Sequence[str]) -> Row | Table:
        """Return a row by its number, or the table of some rows: by numbers, or by one or several methods' names."""
        if isinstance(key, int):
            return self.rows[key]
        if isinstance(key, slice):
            return self._of(self.rows[key])
        names = [key] if isinstance(key, str) else list(key)
        for name in names:
            if name not in self.methods:
                raise KeyError(f"{name!r} is no method of this table; it has {', '.join(self.methods)}")
        return self._of(row for row in self.rows if row.name in names)

    def _of(self, rows: Iterable[Row]) -> Table:
        """Return a table of these of the rows."""
        return Table(rows, self.title, setting=self.setting, partial=self.partial, left_out=self.left_out, run=self.run)

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods, in the order of the rows."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    def plot(self) -> Figure:
        """Return a Matplotlib figure of error against cost: every method, with its bounds as thin lines."""
        from refattn.study._figures import plot

        return plot(self)

    def to_pandas(self) -> Any:
        """Return the rows as a data frame of the columns that are one value each; NaN where a number is None.

        Raises
        ------
        ImportError
            Without pandas.
        """
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError:
            raise ImportError("to_pandas needs pandas, which is not installed: pip install pandas") from None
        kinds = {name: "boolean" if name == "holds" else "float64" for name in COLUMNS[3:]}
        return pandas.DataFrame([row[: len(COLUMNS)] for row in self.rows], columns=list(COLUMNS)).astype(kinds)

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        from refattn.study._html import notebook

        return notebook(self)

    def __repr__(self) -> str:
        """Return the plain text."""
        return str(self)

    def __str__(self) -> str:
        """Return plain text: a line for each row under its method, and one for each violated claim."""
        text = [line for line in (self.title, *self.notes) if line]
        for headings, rows in _text.blocks(self.rows):
            text += _text.lines(rows, headings)
        return "\n".join([*(line.rstrip() for line in text), *self.violations])

    def __rich__(self) -> rich.text.Text:
        """Return the same text for a Rich console, violated claims in red."""
        import rich.text

        text = rich.text.Text(str(self))
        text.highlight_regex(".*VIOLATED.*", "bold red")
        return text

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for all that the rows do not cover."""
        found, about = [STOPPED] * self.partial, self.setting
        if about is None:
            return (*found, *uncovered(None, 0, self.left_out))
        if not self.rows and about.cost is not None:
            found.append(f"nothing costs at most {about.cost:g} of exact attention")
        return (*found, *uncovered(about.rows, about.sizes["T"], self.left_out))

    @property
    def violations(self) -> tuple[str, ...]:
        """One sentence for each claim that failed."""
        return tuple(
            f"VIOLATED: {row.method} {row.budget}".rstrip()
            + (": an error is above its bound and rounding" if row.vacuous is None else ": it fails in too many draws")
            for row in self.rows
            if row.holds is False
        )


def write_csv(path: str | PathLike[str], tables: Sequence[Table]) -> None:
    """Write the rows of several tables, titles in the first column; floats come back bit for bit, None is empty."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["input", *COLUMNS])
        writer.writerows([table.title, *row[: len(COLUMNS)]] for table in tables for row in table.rows)


def uncovered(rows: Sequence[int] | None, T: int, left_out: Mapping[str, str]) -> tuple[str, ...]:
    """Say what a study does not cover: rows that were not measured, None where all were, and methods left out."""
    found = [] if rows is None else [f"measured on {len(rows)} of {T} rows of each head"]
    return (*found, *(f"left out: {name}: {why}" for name, why in left_out.items()))


def over(x: Array, spread: Array) -> Array:
    """Return x ÷ spread; where all values that a row sees are one, its answer is known: 0 stays 0, the rest is ∞."""
    return np.divide(x, spread, out=np.where(x > 0, np.inf, x), where=spread > 0)


def rms(x: Array) -> float:
    """Return the root mean square, whose squares neither overflow nor underflow together."""
    top = float(x.max())
    return top * float(np.sqrt(np.mean(np.square(x / top)))) if 0 < top < np.inf else top
