"""The report: its page as a reader and a browser take it, its JSON, and a table in a notebook."""

import csv
import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from refattn import masks, study
from refattn.study import Head, Row, Setting, Table, _ink
from refattn.study._findings import find
from refattn.study._report import html
from refattn.study._table import COLUMNS

RNG = np.random.default_rng(11)
Q, K, V = RNG.standard_normal((3, 2, 2, 24, 6))
METHODS = ["longformer", "linformer", "memformer"]
NASTY = (
    "<script>alert(1)</script>",
    "http://a//b",
    "\n",
    "$_$",
    '"',
    "&amp;",
    "\x00",
    "日",
    'url(#a"b)',
    ' id="x"',
    "<a href='#q'>",
)
TOKENS = [NASTY[n] if n < len(NASTY) else f" w{n}" for n in range(24)]

COMMAND = "refattn study 'a <b>'"
SCHEMA = json.loads((resources.files("refattn.study") / "schema.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """A page's elements: what is open where, each with its attributes and its text."""

    def __init__(self, text: str) -> None:
        """Parse the whole page, and fail where a tag is closed that is not the last one open."""
        super().__init__()
        self.open: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self.open, [one["tag"] for one in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        one = {"tag": tag, "text": "", "in": [outer["tag"] for outer in self.open], **dict(attrs)}
        self.found.append(one)
        if tag not in ("meta", "link", "br"):
            self.open.append(one)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for one in self.open:
            one["text"] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [one for one in self.found if one["tag"] == tag]


@pytest.fixture(scope="module")
def table() -> Table:
    return study.compare(
        Q, K, V, mask=masks.causal(), methods=METHODS, title="a <b> $x$", layers=["in", "out"], tokens=TOKENS, trials=20
    )


@pytest.fixture(scope="module")
def folder(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    asked = study.target(Q, K, V, target=0.05, mask=masks.causal(), methods=["longformer"], title="a <b>")
    study.report(out, [table, toy((2, 2))], targets=[asked], head=(1, 0), command=COMMAND)
    return out


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "study.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def toy(heads: tuple[int, ...], errors: tuple[float, ...] = (0.25,), **options: Any) -> Table:
    """Return a table without a run: a row for each error, the first head's error that of the row, the others' twice."""
    count = int(np.prod(heads))
    setting = Setting({"T": 4, "S": 4, "D": 2, "E": 2}, heads, None, None, None, 0, 0.05, 200)
    rows: list[Row] = []
    for n, e in enumerate(errors):
        each = [Head(e * (1 + (h > 0)), e * (1 + (h > 0)), None, None, (0,), (e,)) for h in range(count)]
        rows.append(Row(f"toy{n}", "", "softmax, unmasked", 0.2, e, e, e, 0.01, heads=tuple(each)))
    return Table(rows, "toy", setting=setting, **options)


def shown(table: Table, **options: Any) -> str:
    return html([find(table, 0.25)], **options)


def test_tags_are_balanced_and_ids_are_unique(page: Page) -> None:
    ids = Counter(one["id"] for one in page.found if "id" in one)
    assert ids and max(ids.values()) == 1
    used = [one[name][1:] for one in page.found for name in ("href",) if (one.get(name) or "").startswith("#")]
    attributes = [x for one in page.found for name, x in one.items() if name != "text"]
    used += [name for x in attributes for name in re.findall(r"url\(#([^)]+)\)", str(x))]
    used += [one["aria-labelledby"] for one in page.found if "aria-labelledby" in one]
    assert used and set(used) <= set(ids)


def test_every_figure_has_a_name_and_a_caption_of_two_sentences(page: Page) -> None:
    figures = page.all("figure")
    captions = [one["text"] for one in page.all("figcaption")]
    assert len(figures) == len(captions) >= 5
    assert all(one["role"] in ("group", "img") and one["aria-label"].strip() for one in figures)
    for caption in captions:
        assert len(re.findall(r"[.!?](?=\s|$)", caption.strip())) == 2, caption
    for one in page.all("svg"):
        assert one.get("aria-label") or one.get("aria-hidden") == "true"


def test_the_page_needs_nothing_from_elsewhere(page: Page, text: str) -> None:
    for one in page.found:
        for name in ("href", "src", "xlink:href", "data", "action", "srcset"):
            address = one.get(name) or "#"
            assert address.startswith(("#", "data:")), address
        assert not [name for name in one if name.startswith(("xmlns", "on"))]
    assert not page.all("script") and not page.all("iframe")
    bare = re.sub(r"data:image/png;base64,[\w+/=\s]+", "", text).replace("http://a//b", "")
    assert not re.search(r"https?:|//|@import|@font-face|url\((?!#)", bare)


def test_what_a_file_is_called_and_its_tokens_are_text(page: Page, text: str) -> None:
    assert "a &lt;b&gt; $x$" in text and "<b>" not in text and "\x00" not in text
    tokens = {one["text"] for one in page.found if one.get("class") == "token"}
    assert tokens and tokens <= {study_token(token) for token in TOKENS}
    drawn = {one["text"] for one in page.all("text")}
    assert {"<script>alert(1)</script>", "$_$", "日"} <= drawn


def study_token(token: str) -> str:
    return {"\n": "↵", "\x00": "\ufffd"}.get(token, token)


def test_the_headline_names_the_method_that_errs_least_within_the_cost(table: Table, page: Page) -> None:
    cheap = [row for row in table if row.vacuous is None and row.cost <= 0.25]
    best = min((row for row in cheap if row.reference == "softmax, same mask"), key=lambda row: row.error_relative)
    headline = page.all("h2")[0]["text"].replace("\u2060", "")
    assert headline.startswith("At a quarter of exact attention’s cost or less, ")
    assert best.method.replace(", ", " with ") + " errs least" in headline


def test_the_json_is_what_its_schema_says_and_says_what_the_table_says(table: Table, folder: Path) -> None:
    data = json.loads((folder / "study.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(data, SCHEMA)
    one, _ = data["studies"]
    words = {"inf": np.inf, "-inf": -np.inf, "nan": np.nan}
    for said, row in zip(one["rows"], table.rows, strict=True):
        for name, x in row._asdict().items():
            if name != "heads":
                back = words.get(said[name], said[name]) if isinstance(x, float) else said[name]
                assert back == x or (x != x and back != back), name
        assert [head["error_max"] for head in said["heads"]] == [head.error_max for head in row.heads]
    assert one["setting"]["tokens"] == TOKENS and data["command"] == COMMAND and one["setting"]["heads"] == [2, 2]
    assert data["targets"][0]["rows"][0]["error"]["value"] <= 0.05


@pytest.mark.parametrize("where", [("studies", 0), ("studies", 0, "rows", 0), ("studies", 0, "setting")])
def test_the_schema_refuses_what_is_added_or_missing(where: tuple[Any, ...], folder: Path) -> None:
    for change in (lambda x: x.update(more=1), lambda x: x.pop(next(iter(x)))):
        data = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        part = data
        for key in where:
            part = part[key]
        change(part)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data, SCHEMA)


def test_every_word_of_the_schema_is_explained() -> None:
    def check(part: Any, path: str) -> None:
        for name, one in part.get("properties", {}).items():
            assert "description" in one or "$ref" not in one and path.endswith("sizes"), f"{path}.{name}"
            check(one, f"{path}.{name}")

    check(SCHEMA, "")
    for name, one in SCHEMA["$defs"].items():
        check(one, name)


def test_a_study_that_was_stopped_says_so_first() -> None:
    whole, part = (shown(toy((2,), partial=partial)) for partial in (False, True))
    assert "PARTIAL" not in whole and part.index("PARTIAL") < part.index("<figure")


def test_a_violated_claim_is_said_first() -> None:
    (row,) = toy((2,)).rows
    text = shown(Table([row._replace(holds=False, bound_max=0.1, bound_relative=0.1)]))
    assert text.index("VIOLATED: toy0") < text.index("<figure")


@pytest.mark.parametrize("heads", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_heads_of_any_shape_have_their_map(heads: tuple[int, ...]) -> None:
    page = Page(shown(toy(heads, (0.25, 0.5))))
    pictures = [one for one in page.all("svg") if "each head" in (one.get("aria-label") or "")]
    assert bool(pictures) == bool(heads)
    cells = [one for one in page.all("text") if "25\u00a0%" in one["text"] or "50\u00a0%" in one["text"]]
    assert len(cells) >= int(np.prod(heads)) or not heads


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0], ids=str)
def test_a_report_is_drawn_of_what_no_axis_holds(bad: float, tmp_path: Path) -> None:
    study.report(tmp_path, [toy((), (bad,)), toy((2,), (0.25, bad))])
    Page((tmp_path / "study.html").read_text(encoding="utf-8"))
    found = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, SCHEMA)
    assert [one["rows"][-1]["error_max"] for one in found["studies"]] == [bad if bad == 0 else str(bad)] * 2


def test_the_csv_beside_it_is_the_tables(table: Table, folder: Path) -> None:
    with open(folder / "study.csv", newline="", encoding="utf-8") as file:
        assert [line["method"] for line in csv.DictReader(file)] == [*(row.method for row in table.rows), "toy0"]


def test_a_report_without_rows_says_that_nothing_was_measured() -> None:
    assert "No method was measured at a quarter of" in shown(Table([], "empty"))


def test_the_same_tables_make_the_same_bytes() -> None:
    one = toy((2,), (0.25, 0.5))
    assert shown(one) == shown(one)


def test_a_readers_own_style_of_matplotlib_changes_nothing() -> None:
    import matplotlib

    plain = shown(toy((2,)))
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "text.usetex": True}):
        assert shown(toy((2,))) == plain


def test_colours_of_methods_stand_out_from_the_page() -> None:
    def light(colour: str) -> float:
        parts = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((light(a), light(b)))
        return (high + 0.05) / (low + 0.05)

    for colours, methods in ((_ink.LIGHT, _ink.METHODS_LIGHT), (_ink.DARK, _ink.METHODS_DARK)):
        assert all(contrast(one, colours["page"]) >= 3 for one in methods)
        assert contrast(colours["ink"], colours["page"]) >= 7 and contrast(colours["soft"], colours["page"]) >= 4.5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"studies": []}, "studies is empty"),
        ({"cost": 0}, "cost is 0"),
        ({"head": 4}, "head is 4; expected a head of (2, 2)"),
        ({"head": (0, 2)}, "head is (0, 2); expected a head of (2, 2)"),
    ],
)
def test_a_report_that_cannot_be_is_refused_before_work(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        study.report(tmp_path, **{"studies": [toy((2, 2))]} | options)
    assert not list(tmp_path.iterdir())


def test_a_table_is_sliced_by_method_and_by_number(table: Table) -> None:
    assert table.methods == tuple(METHODS) == tuple(dict.fromkeys(row.name for row in table))
    assert {row.method for row in table["longformer"]} == {"longformer", "longformer, tokens=(0,)"}
    some = table[["longformer", "memformer"]]
    assert some.methods == ("longformer", "memformer") and len(some) + len(table["linformer"]) == len(table)
    assert table[3:8].rows == table.rows[3:8] and table[-1] == table.rows[-1]
    assert (some.title, some.setting, some.run) == (table.title, table.setting, table.run)
    with pytest.raises(KeyError, match="softmax.*longformer, linformer"):
        table["softmax"]


def test_a_table_goes_to_pandas_as_numbers(table: Table) -> None:
    frame = table.to_pandas()
    assert list(frame.columns) == list(COLUMNS) and len(frame) == len(table)
    assert frame["error_max"].dtype == frame["bound_max"].dtype == np.float64
    assert frame["error_max"].tolist()[0] == table[0].error_max
    assert [None if x else y for x, y in zip(frame["holds"].isna(), frame["holds"], strict=True)] == [
        row.holds for row in table
    ]


def test_a_missing_pandas_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas, which is not installed: pip install pandas"):
        toy(()).to_pandas()


def test_a_notebook_shows_the_rows_as_text(table: Table) -> None:
    text = table._repr_html_()
    page = Page(text)
    assert "a &lt;b&gt; $x$" in text
    assert len(page.all("tbody")) == len({(row.method, row.reference) for row in table})
    assert len(page.all("tr")) == len(table) + len(page.all("tbody")) + len(page.all("table"))


def test_a_table_is_plotted_with_a_line_for_each_method_and_variant(table: Table) -> None:
    figure = table.plot()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == list(dict.fromkeys(row.method for row in table if row.vacuous is None))
