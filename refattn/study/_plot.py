"""Error against cost, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from refattn.study._table import Row, Table


def plot(path: str | PathLike[str], tables: Sequence[Table]) -> None:
    """Draw error ÷ spread against flops ÷ exact on log axes as a PNG: a panel a table, the proved bounds dashed.

    Zeros, which a log axis has no place for, are left out.

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
        mixed = len({row.reference for row in table.rows}) > 1
        for row in table.rows:
            by_method.setdefault(f"{row.method} ({row.reference})" if mixed else row.method, []).append(row)
        for shade, (name, rows) in enumerate(by_method.items()):
            errors = [(r.cost, r.error_relative) for r in rows if r.error_relative > 0]
            bounds = [(r.cost, r.bound_relative) for r in rows if r.bound_relative]
            colour = f"C{shade}"
            for points, style, label in ((errors, "o-", name), (bounds, "x--", None)):
                axes.plot(*zip(*points, strict=True) if points else ((), ()), style, color=colour, label=label)
        axes.plot((), (), "--", color="grey", label="proved bound")
        axes.axhline(1.0, color="lightgrey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="flops ÷ exact", title=table.title)
        axes.set_ylabel("error ÷ spread of v (root mean square)")
        axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)
