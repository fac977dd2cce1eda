"""The colours of a study's pictures, and a picture as SVG that takes them from the page that it stands in."""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

from refattn.method import TABLE
from refattn.study import _html

MARKS = "os^DvP*X<ph>8d"
"""A mark for each method: colour is never the only difference."""
STROKES: tuple[Any, ...] = ("solid", (0, (4, 1.6)), (0, (1, 1.4)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
"""A stroke for each variant of a method."""

LIGHT = {
    "ink": "#1d2530",
    "soft": "#5b6675",
    "line": "#c9d0d9",
    "back": "#9aa5b3",
    "page": "#ffffff",
    "unseen": "#dfe3e8",
}
DARK = {
    "ink": "#e7ebf0",
    "soft": "#a3aebc",
    "line": "#3b4654",
    "back": "#5f6c7c",
    "page": "#12171e",
    "unseen": "#323c48",
}
METHODS_LIGHT = (
    *("#c2485f", "#3f37a8", "#96801a", "#117733", "#2c83b4", "#882255", "#26867a", "#6f6f1f", "#9a3d92", "#c2571a"),
    "#5a6472",
)
"""Paul Tol's muted scheme, darkened to a contrast of 3 on white, with an orange and a grey."""
METHODS_DARK = (
    *("#e68293", "#9a93f5", "#ddcc77", "#57b877", "#88ccee", "#d0719f", "#5cc4b6", "#b9b94e", "#cf86c8", "#f0935a"),
    "#b4bdc9",
)
"""The same lightened for a dark page."""


class Ink(NamedTuple):
    """What a picture is drawn with: colours by name, and one for each method."""

    ink: str
    soft: str
    line: str
    back: str
    page: str
    unseen: str
    methods: tuple[str, ...]

    def method(self, name: str) -> tuple[str, str]:
        """Return a method's colour and mark: the same in every picture of every study."""
        known = [path.rpartition(".")[2] for path in TABLE[1:]]
        n = known.index(name) if name in known else len(known) + sum(name.encode("utf-8", "replace"))
        return self.methods[n % len(self.methods)], MARKS[n % len(MARKS)]


PLAIN = Ink(**LIGHT, methods=METHODS_LIGHT)
"""For a picture that stands alone."""
_SIGNS = {f"--{name}": f"#01{n:02x}fe" for n, name in enumerate(LIGHT)}
_METHOD_SIGNS = {f"--m{n}": f"#02{n:02x}fe" for n in range(len(METHODS_LIGHT))}
PAGE = Ink(*_SIGNS.values(), methods=tuple(_METHOD_SIGNS.values()))
"""Colours that stand for the page's own: `svg` writes its variables in their place."""

STYLE = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "refattn",
}


def variables(colours: dict[str, str], methods: tuple[str, ...]) -> str:
    """Return the page's variables in CSS."""
    named = {**colours, **{f"m{n}": colour for n, colour in enumerate(methods)}}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


@contextmanager
def drawing(ink: Ink) -> Generator[Any]:
    """Yield an empty figure, drawn in these colours and in no style of the user's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = {
        "text.color": ink.ink,
        "axes.edgecolor": ink.line,
        "axes.labelcolor": ink.soft,
        "xtick.color": ink.line,
        "ytick.color": ink.line,
        "xtick.labelcolor": ink.soft,
        "ytick.labelcolor": ink.soft,
        "grid.color": ink.line,
    }
    matplotlib: Any = importlib.import_module("matplotlib")
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font that lacks a token's letter: the reader's browser has another
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | own)
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def svg(draw: Callable[[Any, Ink], None], prefix: str, label: str = "") -> str:
    """Return a picture as an SVG element, in the page's colours and fonts, with ids that start with the prefix.

    It is an image named by the label, and hidden from a reader of the page's text where there is none.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with drawing(PAGE) as figure:
        draw(figure, PAGE)
        file, said = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(file, metadata=said)  # savefig would draw it twice
    text = file.getvalue()
    width = float(_found(r'\bwidth="([\d.]+)pt"', text)) * 4 / 3
    view = _found(r'\bviewBox="([^"]+)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style [^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = _named(body, prefix)
    for name, sign in {**_SIGNS, **_METHOD_SIGNS}.items():
        body = body.replace(sign, f"var({name})")
    body = re.sub(r"(font: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--sans)", body)
    said = f'role="img" aria-label="{_html.visible(label)}"' if label else 'aria-hidden="true"'
    body = re.sub(r">\s+<", "><", body).strip()
    return f'<svg viewBox="{view}" style="--width:{width:.4g}px" {said}>{body}</svg>'


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None
    return found[1]


def _named(body: str, prefix: str) -> str:
    """Keep the ids that something refers to, under the prefix; text between tags is left alone."""
    tags = re.findall(r"<[^>]*>", body)
    used = sorted({name for tag in tags for name in re.findall(r'(?:url\(#|href="#)([^")]+)', tag)})
    names = {name: f"{prefix}-{n}" for n, name in enumerate(used)}

    def renamed(tag: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", tag[0])
        text = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{names[m[1]]})", text)
        return re.sub(r'xlink:href="#([^"]+)"', lambda m: f'href="#{names[m[1]]}"', text).replace("xlink:", "")

    return re.sub(r"<[^>]*>", renamed, body)
