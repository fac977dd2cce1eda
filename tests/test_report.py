"""The report of a study: one page that needs nothing else, and JSON as its schema says; and a table in a notebook."""

import csv
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from refattn import masks, study
from refattn.study import Row, Setting, Table
from refattn.study._look import equal

RNG = np.random.default_rng(3)
Q, K, V = RNG.standard_normal((3, 2, 3, 24, 4))
TOKENS = ["<script>alert(1)</script>", "a&b", *"cdefghijklmnopqrstuvwx"]
NAMES = ["longformer", "linformer", "linear_transformer", "performer", "memformer"]
VOID = {"meta", "br", "img", "input", "link", "hr", "path", "use", "image", "rect"}
SCHEMA = json.loads((resources.files("refattn.study") / "schema.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What stands in a page: tags that are open, ids, names and captions of figures, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.figures: list[str] = []
        self.captions: list[str] = []
        self.tables = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [x for name, x in attrs if x and name == "id"]
        self.links += [x for name, x in attrs if x and name in ("href", "src", "xlink:href")]
        self.figures += [given.get("aria-label") or ""] * (tag == "figure")
        self.captions += [""] * (tag == "figcaption")
        self.tables += tag == "table"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "figcaption" in self.open:
            self.captions[-1] += data


@pytest.fixture(scope="module")
def table() -> Table:
    layers = ["zero", "last"]
    return study.compare(
        Q, K, V, mask=masks.causal(), methods=NAMES, trials=20, title="toy", layers=layers, tokens=TOKENS
    )


@pytest.fixture(scope="module")
def written(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    answer = study.target(Q, K, V, target=0.05, mask=masks.causal(), methods=["longformer"], title="toy")
    study.report(out, [table], targets=[answer], head=(1, 2))
    return out


def text_of(folder: Path) -> str:
    return (folder / "study.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_every_figure_has_a_name_and_two_sentences(written: Path) -> None:
    page = Page(text_of(written))
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    assert len(page.figures) == len(page.captions) >= 6 and all(page.figures) and page.tables >= 4
    for caption in page.captions:
        assert len(re.findall(r"[.]\s", " ".join(caption.split()) + " ")) == 2, caption


def test_the_page_needs_nothing_from_elsewhere(written: Path) -> None:
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=\s]*", "data:image/png;base64,", text_of(written))
    assert not re.findall(r"(?i)(?:https?:|ftp:)?//[a-z]|@import|<script|<link|<iframe|url\((?!#)", text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in Page(text_of(written)).links)


def test_tokens_are_text_and_not_markup(written: Path) -> None:
    text = text_of(written)
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_the_headline_names_the_method_that_errs_least_at_equal_cost(table: Table, written: Path) -> None:
    own = [row for row in equal(table).values() if row.reference == "softmax, same mask"]
    best = min(own, key=lambda row: row.error_relative)
    (said,) = re.findall(r"cost or less, (.*?) errs least", text_of(written))
    assert said == best.method
    assert "layer last, head 2" in text_of(written)


def test_the_same_study_gives_the_same_page(table: Table, written: Path, tmp_path: Path) -> None:
    answer = study.target(Q, K, V, target=0.05, mask=masks.causal(), methods=["longformer"], title="toy")
    study.report(tmp_path, [table], targets=[answer], head=(1, 2))
    assert text_of(tmp_path) == text_of(written)


def test_the_json_is_what_its_schema_says_and_says_what_the_table_says(table: Table, written: Path) -> None:
    data = json.loads((written / "study.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(data, SCHEMA)
    (one,) = data["studies"]
    words = {"inf": np.inf, "-inf": -np.inf, "nan": np.nan}
    for said, row in zip(one["rows"], table.rows, strict=True):
        for name, x in row._asdict().items():
            if name != "heads":
                back = words.get(said[name], said[name]) if isinstance(x, float) else said[name]
                assert back == x or (x != x and back != back), name
        assert [head["error_max"] for head in said["heads"]] == [head.error_max for head in row.heads]
    assert one["setting"]["tokens"] == TOKENS and one["setting"]["heads"] == [2, 3]
    assert data["targets"][0]["rows"][0]["error"]["value"] <= 0.05


@pytest.mark.parametrize("where", [("studies", 0), ("studies", 0, "rows", 0), ("studies", 0, "setting")])
def test_the_schema_refuses_what_is_added_or_missing(where: tuple[Any, ...], written: Path) -> None:
    for change in (lambda x: x.update(more=1), lambda x: x.pop(next(iter(x)))):
        data = json.loads((written / "study.json").read_text(encoding="utf-8"))
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


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_heads_of_any_shape_are_shown(lead: tuple[int, ...], tmp_path: Path) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, *lead, 9, 3))
    table = study.compare(q, k, v, methods=["longformer", "linear_transformer"])
    study.report(tmp_path, [table], head=(0,) * len(lead))
    Page(text_of(tmp_path))
    with pytest.raises(ValueError, match="^head is"):
        study.report(tmp_path, [table], head=(7, 7))


@pytest.mark.parametrize("v", [np.zeros((9, 3)), np.full((9, 3), 1e308) * np.array([1, -1, 0.5])])
def test_what_is_not_finite_or_not_positive_is_reported(v: Any, tmp_path: Path) -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 9, 3))
    table = study.compare(300 * q, k, v, methods=["longformer", "linear_transformer", "linformer"], trials=20)
    study.report(tmp_path, [table])
    jsonschema.validate(json.loads((tmp_path / "study.json").read_text(encoding="utf-8")), SCHEMA)
    Page(text_of(tmp_path))


def test_a_partial_study_says_so_first(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    table = study.compare(Q, K, V, methods=["longformer"], progress=stop, partial=True)
    study.report(tmp_path, [table])
    assert '<p class="note alarm">partial: stopped before the end</p>' in text_of(tmp_path)
    assert json.loads((tmp_path / "study.json").read_text())["studies"][0]["partial"] is True


def test_a_study_of_nothing_cheap_has_a_page(tmp_path: Path) -> None:
    table = study.compare(Q, K, V, methods=["polynomial"])
    study.report(tmp_path, [table], cost=0.01)
    assert "Nothing that was measured costs at most 1 %" in text_of(tmp_path)


def test_the_csv_beside_it_is_the_tables(table: Table, written: Path) -> None:
    with open(written / "study.csv", newline="", encoding="utf-8") as file:
        assert [line["method"] for line in csv.DictReader(file)] == [row.method for row in table.rows]


def test_a_table_is_sliced_by_method_and_by_rows(table: Table) -> None:
    assert table.methods == tuple(NAMES) or set(table.methods) == set(NAMES)
    alone = table["longformer"]
    assert isinstance(alone, Table) and {row.name for row in alone} == {"longformer"} and alone.title == "toy"
    both = table[["performer", "longformer"]]
    assert len(both) == sum(row.name in ("performer", "longformer") for row in table)
    assert list(table[2:4]) == list(table.rows[2:4]) and table[-1] == table.rows[-1]
    with pytest.raises(KeyError, match="is no method of this table"):
        table["nothing"]


def test_a_table_goes_to_pandas_with_its_numbers(table: Table) -> None:
    frame = table.to_pandas()
    assert list(frame["method"]) == [row.method for row in table]
    assert frame["cost"].tolist() == [row.cost for row in table]
    assert frame["holds"].isna().tolist() == [row.holds is None for row in table]


def test_a_table_shows_itself_in_a_notebook_as_text_and_not_markup(table: Table) -> None:
    row = table.rows[0]
    odd = Table([row._replace(budget="<b>")], "<i>")
    shown = odd._repr_html_()
    assert "<b>" not in shown and "<i>" not in shown and "&lt;b&gt;" in shown
    assert Page(table._repr_html_()).open == []


def test_a_table_is_plotted_with_every_method(table: Table) -> None:
    figure = table.plot()
    (axes,) = figure.axes
    labels = {line.get_label() for line in axes.get_lines()}
    assert {row.method for row in table if row.vacuous is None} <= labels


def test_a_table_that_was_made_by_hand_is_refused_by_the_report(tmp_path: Path) -> None:
    row = Row("longformer", "window=1", "softmax, unmasked", 0.1, 1.0, 0.5, 0.2, 0.1)
    setting = Setting({"T": 1, "S": 1, "D": 1, "E": 1}, (), None, None, None, 0, 0.05, 1)
    with pytest.raises(ValueError, match="table has no run"):
        study.report(tmp_path, [Table([row], setting=setting)])
