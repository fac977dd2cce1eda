"""One study's section of a report: its sentences and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.study import _figures, _html, _ink
from refattn.study._figures import percent
from refattn.study._findings import Findings, asked
from refattn.study._look import Curve, Matrices, Worst
from refattn.study._show import largest
from refattn.study._table import Row

Array = NDArray[np.float64]
FEW = 24
"""Rows and keys of a matrix that are named by their tokens, at most."""
COSTS = {0.125: "an eighth of", 0.25: "a quarter of", 0.5: "half of", 1.0: ""}


class Section:
    """What the page shows of one table: sentences, and pictures whose ids start with a prefix."""

    def __init__(self, found: Findings, prefix: str) -> None:
        """Draw nothing yet."""
        self.found, self.prefix = found, prefix
        self.table, self.setting, self.best = found.table, found.table.setting, found.best
        self.rows = [row for row in found.table.rows if row.vacuous is None]
        self._drawn = 0

    @property
    def numbers(self) -> str:
        """The table's rows, as HTML."""
        return _html.numbers(self.table)

    @property
    def headline(self) -> str:
        """The answer in one sentence."""
        best, at = self.best, self.cost
        if best is None:
            what = "has a finite error" if self.found.within else "was measured"
            return f"No method {what} at {at} exact attention’s cost or less"
        proved = "" if best.bound_relative is None else f" (proved ≤ {percent(best.bound_relative)})"
        of = "the values’ spread"
        name = best.method.replace(", ", " with ", 1)
        return (
            f"At {at} exact attention’s cost or less, {name} errs least: {percent(best.error_relative)} of {of}{proved}"
        )

    @property
    def cost(self) -> str:
        """The cost of the comparison, in words that go before exact attention's."""
        known = COSTS.get(self.found.cost)
        return f"{percent(self.found.cost)} of" if known is None else known

    @property
    def legend(self) -> list[tuple[str, str, Row | None, bool]]:
        """Each variant, best first: its line, name, best row within the cost, and whether it answers the question."""
        best = {row.method: row for row in self.found.within}
        rest = [rows[0] for rows in _figures.variants(self.rows) if rows[0].method not in best]
        return [
            (self._swatch(row.method), row.method, best.get(row.method), asked(self.table, row))
            for row in (*self.found.within, *rest)
        ]

    def _swatch(self, method: str) -> str:
        def draw(figure: Any, ink: _ink.Ink) -> None:
            figure.set_size_inches(0.4, 0.16)
            figure.set_layout_engine("none")
            _figures.swatch(figure.add_axes((0, 0, 1, 1)), method, self.rows, ink)

        return self._svg(draw, "")

    def trade(self, width: float) -> str:
        """Draw error against cost."""

        def draw(figure: Any, ink: _ink.Ink) -> None:
            figure.set_size_inches(width, 4.6 if width > 5 else 4.2)
            _figures.trade(figure.add_subplot(), self.rows, ink, self.found.cost)

        return self._svg(draw, "error against cost, every method")

    @property
    def panels(self) -> list[tuple[str, str]]:
        """Each method's name, and its error below its bound."""

        def drawn(name: str) -> str:
            def draw(figure: Any, ink: _ink.Ink) -> None:
                figure.set_size_inches(1.85, 1.7)
                _figures.panel(figure.add_subplot(), self.rows, name, ink)

            return self._svg(draw, f"{name}: from measured error to proved bound, against cost")

        return [(name, drawn(name)) for name in dict.fromkeys(row.name for row in self.rows)]

    @property
    def about(self) -> str:
        """What was compared, in one sentence."""
        methods, rows = len({row.name for row in self.rows}), len(self.rows)
        against = "; ".join(dict.fromkeys(row.reference for row in self.rows))
        text = f"{methods} methods at {rows} budgets and variants, measured against exact attention ({against})"
        if self.setting is None:
            return f"{text}."
        sizes, shape = self.setting.sizes, " × ".join(map(str, self.setting.heads)) or "1"
        return f"{text} on {shape} heads with T = {sizes['T']} rows and S = {sizes['S']} keys."

    @property
    def notes(self) -> tuple[str, ...]:
        """What the rows do not cover, but for a study that was stopped, which the page says apart."""
        return self.table.notes[self.table.partial :]

    @property
    def others(self) -> str:
        """The references of what answers another question than the study's."""
        return "; ".join(dict.fromkeys(row.reference for row in self.rows if not asked(self.table, row)))

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The setting, a name and a value each."""
        one = self.setting
        if one is None:
            return []
        rows = f"{len(one.rows)} of {one.sizes['T']}, drawn" if one.rows is not None else "all"
        return [
            ("sizes", ", ".join(f"{name} = {size}" for name, size in one.sizes.items())),
            ("leading axes", " × ".join(map(str, one.heads)) or "none"),
            ("mask", one.mask or "none: every row sees every key"),
            ("scale", "1/√D" if one.scale is None else repr(one.scale)),
            ("rows of each head", rows),
            ("seed", str(one.seed)),
            ("claims over draws", f"δ = {one.delta:g}, {one.trials} draws"),
            ("dearest cost measured", "no limit" if one.cost is None else percent(one.cost)),
        ]

    @property
    def shown(self) -> str:
        """Say which head's weights are shown, and how many of them."""
        best, n, m = self.best, self.found.head, self.found.matrices[0]
        errors = [] if best is None else [one.error_relative for one in best.heads]
        text = f"{m.method} {m.budget}".rstrip() + f" errs by {percent(errors[n])} here"
        if len(errors) > 1 and errors[n] == np.nanmax(errors):
            text += ", more than in any other head"
        sizes = self.setting.sizes if self.setting else {"T": len(m.rows), "S": len(m.keys)}
        if len(m.rows) < sizes["T"] or len(m.keys) < sizes["S"]:
            text += f". Shown are {len(m.rows)} of {sizes['T']} rows and {len(m.keys)} of {sizes['S']} keys, spaced"
        return f"{text}."

    @property
    def matrices_more(self) -> bool:
        """Whether other methods have matrices too."""
        return len(self.found.matrices) > 1

    @property
    def heads(self) -> int:
        """The number of heads."""
        return math.prod(self.setting.heads) if self.setting else 1

    @property
    def several(self) -> bool:
        """Whether there are heads to tell apart."""
        return any(len(row.heads) > 1 for row in self.found.within)

    @property
    def winners(self) -> tuple[list[tuple[str, Row]], list[int]]:
        """The methods that err least in some head, with a letter each; and which of them does, by head, −1 for none."""
        mine = [row for row in self.found.within if row.heads and asked(self.table, row)]
        mine = mine or [row for row in self.found.within if row.heads]
        errors = np.array([[one.error_relative for one in row.heads] for row in mine])
        errors = np.where(np.isnan(errors), np.inf, errors)
        first = [int(n) for n in np.argmin(errors, axis=0)]
        won = sorted(set(first))
        letters = [(_figures.letter(i), mine[n]) for i, n in enumerate(won)]
        return letters, [won.index(n) if math.isfinite(errors[n, head]) else -1 for head, n in enumerate(first)]

    @property
    def limits(self) -> tuple[float, float]:
        """The scale of colours that all pictures of heads share."""
        return _figures.spread_of(one.error_relative for row in self.found.within for one in row.heads)

    @property
    def scale(self) -> str:
        """Draw that scale."""

        def draw(figure: Any, ink: _ink.Ink) -> None:
            figure.set_size_inches(3.2, 0.4)
            _figures.scale(figure, self.limits, ink)

        return self._svg(draw, "scale of colours: error ÷ spread")

    def grid(self, x: Array) -> Array:
        """Return one number a head as (rows, heads)."""
        return x.reshape(-1, self.setting.heads[-1] if self.setting and self.setting.heads else 1)

    @property
    def labels(self) -> list[str]:
        """What the rows of heads are called."""
        shape = self.setting.heads[:-1] if self.setting else ()
        first = self.setting.layers if self.setting and self.setting.layers else None
        found = [tuple(map(str, index)) for index in np.ndindex(*shape)] if shape else [("",)]
        return [".".join((first[int(i[0])] if first else i[0], *i[1:]) if shape else i) for i in found]

    def head_name(self, n: int) -> str:
        """Say which head a number is."""
        shape = self.setting.heads if self.setting else ()
        if len(shape) < 2:
            return f"head {n}"
        row, head = divmod(n, shape[-1])
        return f"layer {self.labels[row]}, head {head}"

    def map_of_best(self, width: float) -> str:
        """Draw the least error of each head and whose it is."""
        letters, number = self.winners
        values = [letters[i][1].heads[n].error_relative if i >= 0 else math.nan for n, i in enumerate(number)]
        x = self.grid(np.array(values))
        words = [f"{letters[i][0]}\n{percent(v)}" if i >= 0 else "—" for i, v in zip(number, values, strict=True)]
        turned = width < 5 and x.shape[1] > 6 and x.shape[0] < x.shape[1]
        room = (width - 0.5) / (x.shape[0] if turned else x.shape[1])
        texts = words if room > 0.42 else [text.partition("\n")[0] for text in words] if room > 0.15 else []
        return self._heads(x, f"least error of each head at {self.cost} exact cost", min(room, 0.62), texts, turned)

    @property
    def maps(self) -> list[tuple[Row, str]]:
        """Draw each method's error by head within the cost."""
        found: list[tuple[Row, str]] = []
        for row in self.found.within:
            if row.heads:
                x = self.grid(np.array([one.error_relative for one in row.heads]))
                room = min(1.2 / x.shape[1], 0.4)
                found.append((row, self._heads(x, f"{row.method}: error of each head", room)))
        return found

    def _heads(self, x: Array, label: str, cell: float, texts: Sequence[str] = (), turned: bool = False) -> str:
        labels, step = self.labels, math.ceil(0.17 / cell)
        height, width = map(int, x.shape)
        names = [str(n) for n in range(width)]
        if turned:
            texts = [texts[i * width + j] for j in range(width) for i in range(height)] if texts else texts
            x, labels, names = x.T, names, labels

        def draw(figure: Any, ink: _ink.Ink) -> None:
            figure.set_size_inches(cell * x.shape[1] + 0.55, cell * x.shape[0] + (0.5 if texts else 0.3))
            axes = figure.add_subplot()
            sides = ([text if n % step == 0 else "" for n, text in enumerate(side)] for side in (labels, names))
            _figures.heads(axes, x, self.limits, ink, labels=tuple(sides), texts=texts)
            if texts:
                axes.set(xlabel="layer" if turned else "head", ylabel="head" if turned else "layer" * (labels != [""]))

        return self._svg(draw, label)

    @property
    def matrices(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Each method's name and budget, and pictures of exact weights, its own, and their difference."""
        return [(f"{m.method} {m.budget}".rstrip(), self._matrix(m)) for m in self.found.matrices]

    def _matrix(self, m: Matrices) -> list[tuple[str, str]]:
        few = max(m.exact.shape) <= FEW
        tokens = self.setting.tokens if self.setting else None
        keys = [tokens[i] if tokens else str(i) for i in map(int, m.keys)] if few else list[str]()
        rows = [tokens[i] if tokens and self._same else str(i) for i in map(int, m.rows)] if few else list[str]()
        signed, top = bool((m.weights < 0).any()), max(largest(m.exact), largest(m.weights))
        weights = "signed weights" if signed else "weights"
        shown: list[tuple[str, Array, float, str]] = [("exact", m.exact, top, "weights")]
        shown.append((m.method if m.difference is not None else f"{m.method}: reads", m.weights, top, weights))
        if m.difference is not None:
            shown.append(("difference", m.difference, largest(m.difference), "differences"))

        def drawn(x: Array, most: float, of: str) -> Callable[[Any, _ink.Ink], None]:
            def draw(figure: Any, ink: _ink.Ink) -> None:
                own = keys if len(keys) == x.shape[1] else list[str]()
                _figures.matrix(figure, x, most, ink, of=of, rows=rows, keys=own)

            return draw

        return [
            (name, self._svg(drawn(x, most, of), f"{name}, {m.budget or 'no budget'}: {of}"))
            for name, x, most, of in shown
        ]

    @property
    def _same(self) -> bool:
        """Whether a row's token is the key's of the same number."""
        return self.setting is not None and self.setting.sizes["T"] == self.setting.sizes["S"]

    @property
    def worst(self) -> list[tuple[Worst, str | None, list[tuple[int, float, str | None]]]]:
        """The worst rows, each with its token, and the keys that exact attention looks at most."""
        tokens = self.setting.tokens if self.setting else None
        return [
            (
                one,
                tokens[one.row] if tokens and self._same else None,
                [(key, weight, tokens[key] if tokens else None) for key, weight in one.top],
            )
            for one in self.found.worst
        ]

    @property
    def curves(self) -> list[tuple[str, str]]:
        """Each method that draws, and its error against its budget."""

        def drawn(curve: Curve) -> Callable[[Any, _ink.Ink], None]:
            def draw(figure: Any, ink: _ink.Ink) -> None:
                figure.set_size_inches(1.85, 1.8)
                _figures.converging(figure.add_subplot(), curve, ink)

            return draw

        return [(c.method, self._svg(drawn(c), f"{c.method}: error against {c.name}")) for c in self.found.curves]

    def _svg(self, draw: Callable[[Any, _ink.Ink], None], label: str) -> str:
        self._drawn += 1
        return _ink.svg(draw, f"{self.prefix}-{self._drawn}", label)
