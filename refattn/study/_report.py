"""The report of a study: one page of HTML, a table as CSV, and everything as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import refattn
from refattn import _check
from refattn._need import need
from refattn.study import _figures as figures
from refattn.study import _html
from refattn.study._ink import DARK, LIGHT, METHODS_DARK, METHODS_LIGHT, svg, variables
from refattn.study._json import as_json
from refattn.study._look import Curve, Worst, assumptions, curves, equal, matrices, worst_rows
from refattn.study._table import Row, Table, write_csv
from refattn.study._target import Targets

Array = NDArray[np.float64]
WORST_OF = 6
"""How many methods show their worst rows: those that err least at equal cost."""
FEW = 40
"""Rows and keys up to which a matrix names each token."""


class Looked(NamedTuple):
    """A table with what a closer look says of it.

    `best` are the rows at equal cost, first those measured against exact attention with the study's own mask, which
    alone are `comparable`, each from the least error.
    """

    table: Table
    best: dict[str, Row]
    comparable: int
    worst: tuple[Worst, ...]
    curves: tuple[Curve, ...]
    assumptions: Mapping[str, Sequence[str]]
    head: int


def report(
    folder: str | Path,
    studies: Sequence[Table],
    *,
    targets: Sequence[Targets] = (),
    head: Sequence[int] | None = None,
    cost: float = 0.25,
) -> None:
    """Write ``study.html``, ``study.csv`` and ``study.json`` into a folder.

    The page needs nothing else: no address outside it is asked for anything. The JSON is described by the file
    ``schema.json`` beside this module.

    Parameters
    ----------
    folder
        Where; it exists.
    studies
        What `compare` answered, a section each.
    targets
        What `target` answered.
    head
        Index into the leading axes of the head whose weights are shown; where the best method errs most unless given.
    cost
        The part of exact attention's cost at which methods are compared head by head.

    Raises
    ------
    ValueError
        A head that a study does not have; a table that `compare` did not make.
    ImportError
        Without Jinja2 or Matplotlib.

    Examples
    --------
    >>> import tempfile
    >>> from refattn import study
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 8, 4))
    >>> table = study.compare(q, k, v, methods=["longformer"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     study.report(folder, [table])
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['study.csv', 'study.html', 'study.json']
    """
    need("jinja2", "matplotlib")
    looked = [look(table, head, _check.positive("cost", cost)) for table in studies]
    out = Path(folder)
    (out / "study.html").write_text(page(looked, targets, cost), encoding="utf-8")
    write_csv(out / "study.csv", studies)
    data = as_json([(one.table, one.worst, one.curves, one.assumptions) for one in looked], targets)
    (out / "study.json").write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def look(table: Table, head: Sequence[int] | None, cost: float) -> Looked:
    """Look closely at a table."""
    masked = table.setting is not None and table.setting.mask is not None
    own = "softmax, same mask" if masked else "softmax, unmasked"
    found = equal(table, cost)
    keys = {name: (row.reference != own, _order(row.error_relative)) for name, row in found.items()}
    best = {name: found[name] for name in sorted(found, key=lambda name: keys[name])}
    comparable = sum(row.reference == own for row in best.values()) or len(best)
    judged = [row for row in best.values() if row.bound_relative is not None] or [*best.values()]
    worst = [one for row in judged[:WORST_OF] for one in worst_rows(table, row, 2)]
    worst.sort(key=lambda one: -_order(one.error))
    return Looked(table, best, comparable, tuple(worst), curves(table), assumptions(table), _head(table, best, head))


def page(looked: Sequence[Looked], targets: Sequence[Targets], cost: float) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("refattn.study", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        sections=[_section(n, one, cost) for n, one in enumerate(looked)],
        targets=targets,
        version=refattn.__version__,
        numpy=np.__version__,
        light=variables(LIGHT, METHODS_LIGHT),
        dark=variables(DARK, METHODS_DARK),
        percent=figures.percent,
    ).encode("utf-8", "replace").decode()  # fmt: skip


def _order(x: float) -> float:
    return math.inf if x != x else x


def _head(table: Table, best: Mapping[str, Row], given: Sequence[int] | None) -> int:
    """Return the head that is shown, by its flat index."""
    shape = () if table.setting is None else table.setting.heads
    if given is not None:
        if len(given) != len(shape) or not all(0 <= n < size for n, size in zip(given, shape, strict=True)):
            raise ValueError(f"head is {tuple(given)}; expected an index into the heads, {shape}")
        return int(np.ravel_multi_index(tuple(given), shape)) if shape else 0
    first = next(iter(best.values()), None)
    errors = [0.0] if first is None else [_order(head.error_relative) for head in first.heads]
    return int(np.argmax(np.where(np.isfinite(errors), errors, -1.0)))


def _section(n: int, one: Looked, cost: float) -> dict[str, Any]:
    """Return what the template says of a study."""
    table, best = one.table, one.best
    rows = [row for row in table.rows if row.vacuous is None]
    shape = (1, 1) if table.setting is None else _grid(table.setting.heads)
    labels = _labels(table, shape)
    first = next(iter(best.values()), None)
    title = table.title or f"study {n + 1}"
    names = list(dict.fromkeys(row.name for row in rows))
    return {
        "table": table,
        "title": title,
        "cost": figures.percent(cost),
        "best": first,
        "blocks": _html.blocks(table),
        "wide": _trade(f"s{n}w", rows, cost, (7.2, 4.0), f"Error against cost of {len(names)} methods"),
        "narrow": _trade(f"s{n}n", rows, cost, (3.6, 3.9), f"Error against cost of {len(names)} methods"),
        "legend": [
            (own[0].method, _swatch(f"s{n}l{i}", own[0].method, rows)) for i, own in enumerate(figures.variants(rows))
        ],
        "panels": [(name, _panel(f"s{n}p{i}", rows, name)) for i, name in enumerate(names)],
        "heat": None if not best else _heat(n, best, one.comparable, shape, labels),
        "matrices": None if first is None else _matrices(f"s{n}m", one, first, exact=True),
        "others": [_matrices(f"s{n}o{i}", one, row, exact=False) for i, row in enumerate([*best.values()][1:])],
        "head": _place(table, one.head),
        "worst": [_worst(table, row) for row in one.worst],
        "curves": [(curve.method, _curve(f"s{n}c{i}", curve)) for i, curve in enumerate(one.curves)],
        "assumptions": one.assumptions,
    }


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _labels(table: Table, shape: tuple[int, int]) -> list[str]:
    own = None if table.setting is None else table.setting.layers
    return list(own) if own is not None and len(own) == shape[0] else [str(i) for i in range(shape[0])]


def _place(table: Table, head: int) -> str:
    """Say which head it is."""
    shape = () if table.setting is None else table.setting.heads
    if not shape:
        return "the only head"
    at = [int(i) for i in np.unravel_index(head, shape)]
    if len(at) == 1:
        return f"head {at[0]}"
    layer = _labels(table, (math.prod(shape[:-1]), shape[-1]))[int(np.ravel_multi_index(at[:-1], shape[:-1]))]
    return f"layer {layer}, head {at[-1]}"


def _trade(prefix: str, rows: Sequence[Row], cost: float, size: tuple[float, float], label: str) -> str:
    def draw(figure: Any, ink: Any) -> None:
        figure.set_size_inches(*size)
        figures.trade(figure.add_subplot(), rows, ink, cost)

    return svg(draw, prefix, label)


def _panel(prefix: str, rows: Sequence[Row], name: str) -> str:
    def draw(figure: Any, ink: Any) -> None:
        figure.set_size_inches(1.9, 1.7)
        figures.panel(figure.add_subplot(), rows, name, ink)

    return svg(draw, prefix, f"{name}: measured error and proved bound against cost")


def _swatch(prefix: str, method: str, rows: Sequence[Row]) -> str:
    def draw(figure: Any, ink: Any) -> None:
        figure.set_size_inches(0.42, 0.14)
        figure.set_layout_engine("none")
        figures.swatch(figure.add_axes((0, 0, 1, 1)), method, rows, ink)

    return svg(draw, prefix)


def _heat(
    n: int, best: Mapping[str, Row], comparable: int, shape: tuple[int, int], labels: Sequence[str]
) -> dict[str, Any]:
    """Return the maps of heads: the best method's letter and error in each, and each method's error."""
    errors = np.array([[head.error_relative for head in row.heads] for row in best.values()])
    winner = np.argmin(np.where(np.isnan(errors), np.inf, errors)[:comparable], axis=0)
    least, letters = errors[winner, np.arange(errors.shape[1])], dict(figures.named(best))
    limits = figures.spread_of(errors.ravel())
    texts = [f"{letters[[*best][w]]}\n{figures.percent(x)}" for w, x in zip(winner, least, strict=True)]

    def maps(prefix: str, x: Array, label: str, size: float, texts: Sequence[str] = ()) -> str:
        def draw(figure: Any, ink: Any) -> None:
            figure.set_size_inches(0.35 + size * shape[1], 0.25 + size * shape[0])
            figures.heads(figure.add_subplot(), x.reshape(shape), limits, ink, labels=labels, texts=texts)

        return svg(draw, prefix, label)

    def draw_scale(figure: Any, ink: Any) -> None:
        figure.set_size_inches(3.4, 0.42)
        figures.scale(figure, limits, ink)

    names = [*best]
    won = sorted({int(w) for w in winner})
    return {
        "best": maps(f"s{n}h", least, "The method that errs least in each head", 0.52, texts),
        "letters": [(letters[names[w]], names[w], int((winner == w).sum())) for w in won],
        "each": [
            (row, i >= comparable, maps(f"s{n}h{i}", own, f"Error of {row.method} in each head", 0.16))
            for i, (row, own) in enumerate(zip(best.values(), errors, strict=True))
        ],
        "scale": svg(draw_scale, f"s{n}hs", "The scale of colours"),
    }


def _matrices(prefix: str, one: Looked, row: Row, *, exact: bool) -> dict[str, Any]:
    found = matrices(one.table, row, one.head)
    tokens = None if one.table.setting is None else one.table.setting.tokens
    keys = list[str]() if tokens is None or len(found.keys) > FEW else [tokens[int(j)] for j in found.keys]
    top = max(_largest(found.exact), _largest(found.weights))
    signed = "signed weights" if bool((found.weights < 0).any()) else "weights"

    def drawn(tail: str, x: Array, top: float, of: str, label: str) -> str:
        def draw(figure: Any, ink: Any) -> None:
            figure.set_size_inches(2.5, 2.85)
            figures.matrix(figure, x, top, ink._replace(unseen="none"), of=of, keys=keys)

        return svg(draw, prefix + tail, label)

    where = _place(one.table, one.head)
    parts = [("exact softmax", drawn("e", found.exact, top, "weights", f"Exact weights of {where}"))] if exact else []
    parts.append((row.method, drawn("w", found.weights, top, signed, f"Weights of {row.method} in {where}")))
    if found.difference is not None:
        most = _largest(found.difference)
        label = f"{row.method} less exact in {where}"
        parts.append((f"{row.method} − exact", drawn("d", found.difference, most, "differences", label)))
    return {"row": row, "parts": parts}


def _largest(x: Array) -> float:
    return float(np.max(np.abs(x), where=np.isfinite(x), initial=0.0)) or 1.0


def _curve(prefix: str, curve: Curve) -> str:
    def draw(figure: Any, ink: Any) -> None:
        figure.set_size_inches(2.3, 1.9)
        figures.converging(figure.add_subplot(), curve, ink)

    return svg(draw, prefix, f"Error of {curve.method} against {curve.name}, over {curve.draws} draws")


def _worst(table: Table, one: Worst) -> list[str]:
    tokens = None if table.setting is None else table.setting.tokens
    square = table.setting is not None and table.setting.sizes["T"] == table.setting.sizes["S"]

    def said(j: int) -> str:
        return f"{j} “{tokens[j]}”" if tokens is not None else str(j)

    share: Callable[[float | None], str] = figures.percent
    return [
        f"{one.method} {one.budget}".rstrip(),
        _place(table, one.head),
        said(one.row) if square else str(one.row),
        ", ".join(f"{said(j)} {share(p)}" for j, p in one.top),
        share(one.error),
        share(one.bound),
        share(one.dropped),
        share(one.variation),
        f"{one.span:.3g}",
        f"{one.keys:.3g}",
        share(one.deviation),
        one.why,
    ]
