"""Error against cost, as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

from refattn.study._table import Row, Table


def plot(path: str | PathLike[str], tables: Sequence[Table]) -> None:
    """Draw error ÷ spread against flops ÷ exact on log axes as a PNG: a panel a table, the proved bounds dashed.

    What a log axis has no place for, zeros and what is not finite, is left out; so are claims over the draw.

    Parameters
    ----------
    path
        Where the PNG goes.
    tables
        What `compare` answered.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.0 * len(tables), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    for n, table in enumerate(tables):
        axes: Any = figure.add_subplot(1, len(tables), n + 1)
        by_method: dict[str, list[Row]] = {}
        shown = [row for row in table.rows if row.vacuous is None]
        mixed = len({row.reference for row in shown}) > 1
        for row in shown:
            by_method.setdefault(f"{row.method} ({row.reference})" if mixed else row.method, []).append(row)
        for shade, (name, rows) in enumerate(by_method.items()):
            errors = [(r.cost, r.error_relative) for r in rows if _fits(r.cost, r.error_relative)]
            bounds = [(r.cost, r.bound_relative) for r in rows if _fits(r.cost, r.bound_relative)]
            colour = f"C{shade}"
            for points, style, label in ((errors, "o-", name), (bounds, "x--", None)):
                axes.plot(*zip(*points, strict=True) if points else ((), ()), style, color=colour, label=label)
        axes.plot((), (), "--", color="grey", label="proved bound")
        axes.axhline(1.0, color="lightgrey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="flops ÷ exact", xlim=_limits(r.cost for r in shown))
        axes.set(ylim=_limits([1.0, *(y for r in shown for y in (r.error_relative, r.bound_relative))]))
        axes.set_title(table.title.encode("utf-8", "replace").decode(), parse_math=False)
        axes.set_ylabel("error ÷ spread of v (root mean square)")
        axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _fits(*coordinates: float | None) -> bool:
    """Return whether log axes have a place for a point."""
    return all(x is not None and 0 < x < math.inf for x in coordinates)


def _limits(values: Iterable[float | None]) -> tuple[float, float]:
    """Return limits about the values that fit, or about 1: Matplotlib cannot choose any where none does."""
    found = [x for x in values if x is not None and _fits(x)] or [1.0]
    return max(min(found) / 1.5, 1e-300), min(max(found) * 1.5, 1e300)
