"""The pictures of a study: error against cost, heads, matrices, convergence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.study import _html
from refattn.study._ink import PLAIN, STROKES, Ink, drawing
from refattn.study._look import Curve
from refattn.study._show import weighted
from refattn.study._table import Row, Table

Array = NDArray[np.float64]
Point = tuple[float, float]

SPACE = "\u00a0"
COST, ERROR = "flops ÷ exact", "error ÷ spread of v (RMS)"


def plot(table: Table) -> Any:
    """Return the figure of `Table.plot`, with its legend beside it."""
    with drawing(PLAIN) as figure:
        figure.set_size_inches(9.0, 5.0)
        figure.set_facecolor(PLAIN.page)
        axes = figure.add_subplot()
        trade(axes, table.rows, PLAIN)
        for rows in variants(table.rows):
            colour = PLAIN.method(rows[0].name)[0]
            axes.plot(*_line(rows, "bound_relative", _floor(table.rows)), color=colour, linewidth=0.6, alpha=0.6)
        axes.set_title(_drawn(table.title), loc="left", parse_math=False)
        figure.legend(loc="outside right upper", frameon=False)
        return figure


def variants(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of the sweep by method and variant."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.vacuous is None:
            found.setdefault(row.method, []).append(row)
    return list(found.values())


def strokes(rows: Iterable[Row]) -> dict[str, Any]:
    """Return the stroke of each method and variant: solid for a method's first."""
    found: dict[str, dict[str, Any]] = {}
    for row, *_ in variants(rows):
        own = found.setdefault(row.name, {})
        own[row.method] = STROKES[len(own) % len(STROKES)]
    return {name: stroke for own in found.values() for name, stroke in own.items()}


def trade(axes: Any, rows: Sequence[Row], ink: Ink, cost: float | None = None) -> None:
    """Draw error against cost, every method, exact attention on the bottom edge at cost 1."""
    floor, known = _floor(rows), strokes(rows)
    _log_axes(axes, rows, floor, ink)
    if cost is not None:
        axes.axvline(cost, color=ink.soft, linewidth=0.8, linestyle=(0, (2, 2)))
    for own in variants(rows):
        colour, mark = ink.method(own[0].name)
        style = {"linestyle": known[own[0].method], "fillstyle": "none" if known[own[0].method] != "solid" else "full"}
        more = {"color": colour, "marker": mark, "markersize": 4.5, "linewidth": 1.4, "clip_on": False}
        axes.plot(*_line(own, "error_relative", floor), label=own[0].method, **style, **more)
    axes.set(xlabel=COST, ylabel=ERROR)


def panel(axes: Any, rows: Sequence[Row], name: str, ink: Ink) -> None:
    """Draw one method before the others in grey: a band from its first variant's error up to the proved bound."""
    floor, known = _floor(rows), strokes(rows)
    _log_axes(axes, rows, floor, ink, small=True)
    mine = [own for own in variants(rows) if own[0].name == name]
    for own in variants(rows):
        if own[0].name != name:
            axes.plot(*_line(own, "error_relative", floor), color=ink.line, linewidth=0.8)
    colour, mark = ink.method(name)
    first = sorted(
        (row for row in mine[0] if fits(row.bound_relative) and row.error_relative >= 0), key=lambda row: row.cost
    )
    x = [row.cost for row in first]
    low, high = ([max(getattr(row, of), floor) for row in first] for of in ("error_relative", "bound_relative"))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.vlines(x, low, high, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(x, high, color=colour, linewidth=0.8)
    for own in mine:
        more = {"linestyle": known[own[0].method], "marker": mark if own is mine[0] else "", "markersize": 3.5}
        axes.plot(*_line(own, "error_relative", floor), color=colour, linewidth=1.3, clip_on=False, **more)


def swatch(axes: Any, method: str, rows: Sequence[Row], ink: Ink) -> None:
    """Draw a method's line and mark alone, for a legend."""
    stroke = strokes(rows)[method]
    colour, mark = ink.method(next(row.name for row in rows if row.method == method))
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(-1, 1))
    axes.plot((0, 1), (0, 0), color=colour, linestyle=stroke, linewidth=1.6)
    axes.plot(0.5, 0, color=colour, marker=mark, fillstyle="none" if stroke != "solid" else "full", markersize=5)


def heads(
    axes: Any, x: Array, limits: Point, ink: Ink, *, labels: Sequence[Sequence[str]], texts: Sequence[str] = ()
) -> None:
    """Draw a grid of numbers as colours on a log scale, with labels of rows and columns, and texts in the cells."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    norm = LogNorm(*limits, clip=True)
    colours = colormaps["viridis_r"].with_extremes(bad=ink.unseen)
    seen = np.ma.masked_invalid(np.where(x > 0, x, np.where(x == 0, limits[0], np.nan)))
    axes.pcolormesh(seen, cmap=colours, norm=norm, edgecolors=ink.page, linewidth=1.0)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    _ticks(axes, "y", labels[0])
    _ticks(axes, "x", labels[1])
    for n, text in enumerate(texts):
        i, j = divmod(n, x.shape[1])
        dark = fits(float(x[i, j])) and float(x[i, j]) > math.sqrt(limits[0] * limits[1])
        where = {"ha": "center", "va": "center", "linespacing": 1.3, "parse_math": False}
        axes.text(j + 0.5, i + 0.5, text, color="#ffffff" if dark else "#101418", **where)


def matrix(
    figure: Any, x: Array, top: float, ink: Ink, *, of: str, rows: Sequence[str] = (), keys: Sequence[str] = ()
) -> None:
    """Draw a matrix over its scale of colours: ``of`` is "weights", "signed weights" or "differences", up to `top`."""
    from matplotlib import rcParams

    rcParams["font.size"] = 7.0
    side, left, below, bar = 2.2, 0.7 * bool(rows), 0.7 * bool(keys), 0.42
    width, height = side + left, side + below + bar
    figure.set_size_inches(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((left / width, (below + bar) / height, side / width, side / height))
    image = axes.imshow(x, interpolation="none", aspect="auto")
    weighted(image, top, of != "weights", "none")
    ticks = (-top, 0.0, top) if of != "weights" else (0.0, top / 16, top / 4, top)
    if of == "weights":
        axes.set_facecolor(ink.unseen)
    else:
        image.set_cmap(_two_sided("#2b6cc4", "#c8323c") if of == "differences" else _two_sided("#8a56c2", "#c26a12"))
    for edge in axes.spines.values():
        edge.set_visible(of != "weights")
    axes.tick_params(length=0)
    _ticks(axes, "x", keys, shift=0.0, turn=90)
    _ticks(axes, "y", rows, shift=0.0)
    colours = figure.add_axes(((left + 0.15) / width, 0.26 / height, (side - 0.3) / width, 0.07 / height))
    scale = figure.colorbar(image, cax=colours, orientation="horizontal")
    scale.set_ticks(ticks, labels=[f"{t:.2g}".replace("-", "−") for t in ticks])
    scale.ax.minorticks_off()
    scale.outline.set_visible(False)


def converging(axes: Any, curve: Curve, ink: Ink) -> None:
    """Draw quantiles over the draws against the budget, and the line m^(−1/2) through the first median."""
    colour, mark = ink.method(curve.method.partition(" ")[0].partition(",")[0])
    m = np.array(curve.budgets, np.float64)
    low, middle, high = (np.array(x) for x in (curve.low, curve.middle, curve.high))
    line = middle[0] * np.sqrt(m[0] / m)
    every = [x for x in (*low, *high, *line) if fits(x)] or [1.0]
    axes.set(xscale="log", yscale="log", xlim=(m[0] / 1.2, m[-1] * 1.2), ylim=(min(every) / 1.3, max(every) * 1.3))
    axes.fill_between(m, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(m, line, color=ink.soft, linestyle=(0, (3, 2)), linewidth=0.9)
    axes.plot(m, middle, color=colour, marker=mark, markersize=3.5, linewidth=1.3)
    few = curve.budgets if len(curve.budgets) <= 4 else curve.budgets[:: len(curve.budgets) // 3]
    axes.set_xticks(few, [str(n) for n in few])
    axes.minorticks_off()
    _percents(axes, "y", (min(every) / 1.3, max(every) * 1.3), 4)
    axes.grid(True, axis="y")
    axes.set_xlabel(curve.name)


def scale(figure: Any, limits: Point, ink: Ink) -> None:
    """Draw the scale of colours of `heads` alone."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    figure.set_layout_engine("none")
    axes = figure.add_axes((0.06, 0.62, 0.88, 0.3))
    mappable = ScalarMappable(LogNorm(*limits), colormaps["viridis_r"])
    bar = figure.colorbar(mappable, cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    _percents(bar.ax, "x", limits, 5)


def percent(x: float | None) -> str:
    """Show a part as a percentage of two digits, and what is tenfold or more as a factor."""
    if x is None or x != x:
        return "—"
    if math.isinf(x):
        return "∞"
    if x >= 10:
        return f"{x:.2g}{SPACE}×" if x < 100 else f"{x:.0e}{SPACE}×"
    return f"{float(f'{100 * x:.2g}'):g}{SPACE}%" if x == 0 or x >= 1e-5 else f"{100 * x:.0e}{SPACE}%"


def fits(x: float | None) -> bool:
    """Return whether a log axis has a place for a number."""
    return x is not None and 0 < x < math.inf


def _drawn(text: str) -> str:
    """Return text that a font can be asked for."""
    return _html.shown(text)


def _floor(rows: Iterable[Row]) -> float:
    """Return the bottom edge: below every error that is more than 0."""
    found = [row.error_relative for row in rows if row.vacuous is None and fits(row.error_relative)]
    return max(min(found, default=0.01) / 2, 1e-300)


def _line(rows: Sequence[Row], column: str, floor: float) -> tuple[list[float], list[float]]:
    """Return costs and errors, an error of 0 on the bottom edge, a gap where a number is not finite."""
    ys = [getattr(row, column) for row in rows]
    inside = [y is not None and 0 <= y < math.inf and fits(row.cost) for row, y in zip(rows, ys, strict=True)]
    y = [max(y, floor) if ok else math.nan for y, ok in zip(ys, inside, strict=True)]
    return [row.cost if ok else math.nan for row, ok in zip(rows, inside, strict=True)], y


def _log_axes(axes: Any, rows: Sequence[Row], floor: float, ink: Ink, *, small: bool = False) -> None:
    shown = [row for row in rows if row.vacuous is None]
    costs = [row.cost for row in shown if fits(row.cost)] + [1.0, 0.09]
    tops = [y for row in shown for y in (row.error_relative, row.bound_relative) if y is not None and fits(y)] + [1.0]
    x, y = (min(costs) / 1.25, max(costs) * 1.25), (floor, min(max(tops) * 1.3, 1e300))
    axes.set(xscale="log", yscale="log", xlim=x, ylim=y)
    _percents(axes, "x", x, 2 if small else 6)
    _percents(axes, "y", y, 3 if small else 6)
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.axhline(1.0, color=ink.back, linewidth=0.8)
    axes.axvline(1.0, color=ink.back, linewidth=0.8)
    axes.plot(1.0, floor, marker="*", color=ink.ink, markersize=6 if small else 10, clip_on=False, zorder=5)
    if not small:
        place = {"textcoords": "offset points", "va": "bottom"}
        axes.annotate("exact", (1.0, floor), (6, 3), color=ink.ink, weight="bold", **place)


def _percents(axes: Any, side: str, limits: Point, most: int) -> None:
    """Put percentages on a log axis: as many of 1, 2, 5 a decade as find room, else some decades."""
    low, high = (math.log10(x) for x in limits)
    decades = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**n for n in decades for d in digits if limits[0] <= d * 10.0**n <= limits[1]]
        if len(found) <= most:
            break
    else:
        found = found[:: math.ceil(len(found) / most)]
    getattr(axes, f"set_{side}ticks")(found, [percent(x) for x in found])
    axes.minorticks_off()


def _ticks(axes: Any, side: str, labels: Sequence[str], *, shift: float = 0.5, turn: int = 0, most: int = 24) -> None:
    """Label every place, or some where there are many; the labels are no mathematics."""
    chosen = range(0, len(labels), math.ceil(len(labels) / most) or 1)
    getattr(axes, f"set_{side}ticks")([n + shift for n in chosen], [_drawn(labels[n]) for n in chosen], rotation=turn)
    for text in getattr(axes, f"get_{side}ticklabels")():
        text.set_parse_math(False)


def _two_sided(low: str, high: str) -> Any:
    """Return colours of negative and positive numbers that fade into the page at 0."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    ends = [(0.0, to_rgba(low, 1.0)), (0.5, to_rgba(low, 0.0)), (0.5, to_rgba(high, 0.0)), (1.0, to_rgba(high, 1.0))]
    return LinearSegmentedColormap.from_list("two-sided", ends)


def spread_of(values: Iterable[float | None]) -> Point:
    """Return limits of a log scale of colours: of the values that fit, at most three decades down from the largest."""
    found = [float(x) for x in values if x is not None and fits(x)] or [1.0]
    low, high = max(min(found), max(found) / 1000), max(found)
    return (low, high) if high > low * 1.01 else (low / 1.5, high * 1.5)


def letter(n: int) -> str:
    """Return a, b, c … and then aa, bb, cc."""
    return chr(97 + n % 26) * (1 + n // 26)
