"""The study: its numbers recomputed, its verdicts, the files that it writes, and what it says about bad options."""

import csv
import io
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import cli, masks, method, rounding, softmax, study
from refattn.kernel import linear_transformer
from refattn.memory import memformer
from refattn.sparse import longformer
from refattn.testing import assert_within

RNG = np.random.default_rng(7)
Q, K, V = RNG.standard_normal((2, 4, 24, 6)), RNG.standard_normal((2, 2, 32, 6)), RNG.standard_normal((2, 2, 32, 5))
ROOT = Path(cli.__file__).parents[1]
METHODS = {name: module for name, module in method.modules().items() if module.METHOD.family}


def planted(shrink: float) -> dict[str, types.ModuleType]:
    """Return a table of one method whose bound is too small by a factor."""
    module = types.ModuleType("planted")
    module.__dict__.update(vars(linear_transformer))
    module.__dict__["bound"] = lambda q, k, v, **options: shrink * linear_transformer.bound(q, k, v, **options)
    return {"linear_transformer": module}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **{"q": Q, "k": K, "v": V} | arrays)
    return str(path)


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(4, 2)], ids=["none", "causal", "window"])
def test_every_claim_holds_on_grouped_heads_with_fewer_rows_than_keys(mask: Any) -> None:
    table = study.compare(Q, K, V, mask=mask)
    assert {named(row) for row in table.rows} == set(METHODS)
    assert not table.violations
    for row in table.rows:
        claimed = {claim.over for claim in METHODS[named(row)].METHOD.claims}
        if row.vacuous is None:
            assert row.holds is (True if "arrays" in claimed else None)
            assert (row.bound_max is None) == ("arrays" not in claimed)
        else:
            assert "draw" in claimed and (row.holds is True or row.vacuous == 1)


def named(row: study.Row) -> str:
    return row.method.partition(" ")[0].partition(",")[0]


def test_a_claim_holds_for_a_sharp_softmax_and_a_scale_that_is_given() -> None:
    table = study.compare(30 * Q, K, V, scale=-2.0, mask=masks.causal())
    assert not table.violations
    assert all(row.holds for row in table.rows if named(row) in ("longformer", "linformer", "linear_transformer"))


@pytest.mark.parametrize("name", [name for name, module in METHODS.items() if hasattr(module, "exact")])
@pytest.mark.parametrize("mask", [None, masks.lengths(20), masks.window(4, 2)], ids=["none", "lengths", "window"])
def test_what_a_method_calls_exact_is_softmax_as_its_row_says(name: str, mask: Any) -> None:
    module, (q, k, v) = METHODS[name], (x[0, 0] for x in (Q, K, V))
    T, S = len(q), len(k)
    pairs = masks.bind(mask, T, S)
    if module.METHOD.causal:
        pairs = masks.meet(pairs, masks.causal()).on(T, S)
    own, plain = method.accepted(module.exact, {"mask": mask}), {"mask": pairs}
    room = rounding.allowance(module.exact, q, k, v, **own) + rounding.allowance(softmax.attend, q, k, v, **plain)
    assert_within(module.exact(q, k, v, **own), softmax.attend(q, k, v, **plain), room)


def references(mask: Any, **options: Any) -> dict[str, str]:
    return {row.method: row.reference for row in study.compare(Q, K, V, mask=mask, **options).rows}


def test_each_row_says_what_it_is_measured_against() -> None:
    free = [name for name, module in METHODS.items() if not module.METHOD.causal]
    assert set(references(None, methods=free).values()) == {"softmax, unmasked"}
    causal, window = (references(x, methods=free, trials=20) for x in (masks.causal(), masks.window(4, 0)))
    assert causal["longformer"] == causal["linear_transformer"] == window["longformer"] == "softmax, same mask"
    assert causal["linformer"] == causal["linformer (fit)"] == window["linear_transformer"] == "softmax, unmasked"


def test_a_mask_that_one_head_makes_unfit_is_left_out_for_all() -> None:
    seen = np.ones((4, 24, 32), bool)
    seen[3, :, 0] = False
    (row,) = study.compare(Q, K, V, mask=seen, methods=["linear_transformer"]).rows
    assert (row.reference, row.holds) == ("softmax, unmasked", True)


def test_the_error_columns_are_those_of_the_dense_formulas() -> None:
    def dense(q: Any, k: Any, v: Any) -> Any:
        return longformer.weights(q, k, window=2).v @ v - softmax.weights(q, k) @ v

    q, k, v = Q[0, 0], K[0, 0], V[0, 0]
    row = next(row for row in study.compare(q, k, v, methods=["longformer"]).rows if row.budget == "window=2")
    error, spread = np.abs(dense(q, k, v)), v.max(axis=0) - v.min(axis=0)
    both = rounding.allowance(longformer.attend, q, k, v, window=2) + rounding.allowance(softmax.attend, q, k, v)
    slack = both + rounding.allowance(dense, q, k, v) + 2 * rounding.U * error
    mean = rounding.gamma(error.size + 6)  # the sums of a mean, its root, and divisions by the largest and the spread
    assert_within(row.error_max, error.max(), slack.max())
    assert_within(row.error_rms, np.sqrt((error**2).mean()), slack.max() + mean * error.max())
    relative = error / spread
    assert_within(row.error_relative, np.sqrt((relative**2).mean()), (slack / spread).max() + mean * relative.max())
    bound = longformer.bound(q, k, v, window=2)
    assert row.bound_max == bound.max()
    sure = error > slack
    ratio = (bound / error)[sure]
    assert sure.mean() > 0.9 and row.bound_ratio is not None
    assert_within(row.bound_ratio, np.median(ratio), (ratio * 2 * slack[sure] / (error - slack)[sure]).max())


def test_a_method_that_is_causal_by_itself_is_measured_against_causal_attention_without_a_mask() -> None:
    q, k, v = Q[0, 0], K[0, 0, :24], V[0, 0, :24]
    row, *_ = study.compare(q, k, v, methods=["memformer"]).rows
    drawn = memformer.draw(np.random.default_rng([0, 0]), q, k, v, slots=int(row.budget.removeprefix("slots=")))
    segment, *_ = memformer.METHOD.options["segment"].values({"T": 24, "S": 24, "D": 6, "E": 5})
    o = memformer.attend(q, k, v, *drawn, segment=segment)
    error = np.abs(o - softmax.attend(q, k, v, mask=masks.causal()))
    assert row.reference == "softmax, causal" and row.error_max == error.max()
    relative = error / np.ptp(v, axis=0)
    room = rounding.gamma(error.size + 6) * relative.max()
    assert_within(row.error_relative, np.sqrt((relative**2).mean()), room)


def test_cost_is_a_part_of_exact_attention_with_the_mask() -> None:
    q = Q[0, 0]
    rows = study.compare(q, q, q, mask=masks.causal(), methods=["longformer", "linformer"]).rows
    pairs = sum(min(i, 1) + 1 for i in range(24))
    assert rows[0].cost == pairs / (24 * 25 / 2)
    assert next(row for row in rows if row.method == "linformer").cost == 48 / (24 * 25 / 2)


def test_an_error_within_rounding_counts_as_none() -> None:
    (row,) = study.compare(Q[0, 0], K[0, 0, :1], V[0, 0, :1], methods=["linear_transformer"]).rows
    assert row.error_relative == 0 and row.holds and np.isnan(row.bound_ratio)


def test_the_same_seed_draws_the_same_rows() -> None:
    def rows(seed: int) -> list[study.Row]:
        found = study.compare(Q, K, V, methods=["linformer"], seed=seed).rows
        return [row._replace(seconds=0.0) for row in found if row.method == "linformer"]

    assert rows(3) == rows(3) != rows(4)


def test_progress_runs_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    table = study.compare(Q, K, V, methods=["longformer"], progress=lambda *at: seen.append(at))
    total = 8 * len(table.rows)
    assert seen == [(n, total) for n in range(total + 1)]


def test_a_bound_that_is_too_small_is_reported_loudly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.compare(Q, K, V, methods=["linear_transformer"]).rows[0].holds
    monkeypatch.setattr(method, "modules", lambda: planted(0.01))
    table = study.compare(Q, K, V)
    assert table.rows[0].holds is False and "VIOLATED: linear_transformer" in str(table)
    assert run(saved(tmp_path / "a.npz")) == 1
    assert "VIOLATED" in capsys.readouterr().err


def test_a_bound_that_is_nan_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "modules", lambda: planted(np.nan))
    assert study.compare(Q, K, V).rows[0].holds is False


OVERFLOWING = {
    "features underflow": {"q": Q - 900},
    "features overflow": {"q": 1e150 * Q, "k": 1e150 * K},
    "values overflow": {"v": 3e307 * V},
}


@pytest.mark.parametrize("case", OVERFLOWING)
def test_an_answer_that_is_not_finite_is_said_by_the_table_alone(case: str) -> None:
    arrays = {"q": Q, "k": K, "v": V} | OVERFLOWING[case]
    rows = study.compare(**arrays, methods=["linear_transformer"]).rows  # warnings are errors here
    assert [row.holds for row in rows] == [None]


@pytest.mark.parametrize("case", OVERFLOWING)
def test_an_answer_that_is_not_finite_is_no_violation(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(saved(tmp_path / "a.npz", **OVERFLOWING[case]), "--trials", "20") == 0
    shown, said = capsys.readouterr()
    assert said == "" and "VIOLATED" not in shown
    line, *_ = shown.split("linear_transformer, against softmax, unmasked\n")[1].splitlines()
    assert line.endswith(" not finite") and max(map(len, shown.splitlines()[1:])) <= 80


def test_one_answer_that_is_not_finite_does_not_hide_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "modules", lambda: planted(0.01))
    q = Q.copy()
    q[0, 0, 0] = -900
    (row,) = study.compare(q, K, V).rows
    assert np.isnan(row.error_max) and np.isnan(row.error_relative) and row.holds is False


def test_a_row_of_linear_attention_whose_features_underflow_is_nan_and_its_bound_does_not_warn() -> None:
    q = np.array([[-900.0], [0.0]])
    with pytest.warns(RuntimeWarning, match="divide"):
        o = linear_transformer.attend(q, q[1:], q[1:])
    assert np.isnan(o[0]) and o[1] == 0
    assert np.isnan(linear_transformer.bound(q, q[1:], q[1:])[0])


def test_the_root_mean_square_neither_overflows_nor_underflows() -> None:
    for size in (1e-250, 1e250):
        for row in study.compare(Q, K, size * V, methods=["longformer"]).rows:
            assert 0 < row.error_rms <= row.error_max < np.inf


def test_a_table_comes_back_from_csv_bit_for_bit(tmp_path: Path) -> None:
    table = study.compare(Q, K, V, title="drawn")
    study.write_csv(tmp_path / "t.csv", [table])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        back = list(csv.DictReader(file))
    assert [line.pop("input") for line in back] == ["drawn"] * len(table.rows)
    for line, row in zip(back, table.rows, strict=True):
        values = {name: x for name, x in row._asdict().items() if name != "heads"}
        assert set(line) == set(values)
        for name, x in values.items():
            if x is None or x != x:
                assert line[name] == ("" if x is None else "nan"), name
            else:
                assert x == (line[name] == "True" if isinstance(x, bool) else type(x)(line[name])), name


def test_the_text_fits_80_columns_and_a_console_shows_the_same() -> None:
    from rich.console import Console

    table = study.compare(Q, K, V, title="drawn [toy]")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    text = str(table)
    assert console.export_text(clear=False) == f"{text}\n"
    lines = text.splitlines()
    assert lines[0] == "drawn [toy]" and max(map(len, lines)) <= 80
    yes = [row.budget or "—" for row in table.rows if row.holds]
    assert yes and [line.split()[0] for line in lines if line.endswith(" yes")] == yes
    assert all(f"\n{row.method}, against {row.reference}\n" in text for row in table.rows)


def test_a_console_shows_a_violation_in_red() -> None:
    from rich.console import Console

    (row, *_) = study.compare(Q, K, V, methods=["linear_transformer"]).rows
    console = Console(width=80, force_terminal=True, color_system="standard", no_color=False, file=io.StringIO())
    console.print(study.Table([row, row._replace(holds=False)]))
    assert isinstance(console.file, io.StringIO)
    red = [line for line in console.file.getvalue().splitlines() if "\x1b[1;31m" in line]
    assert len(red) == 2 and all("VIOLATED" in line for line in red)


def test_out_gets_a_table_and_a_picture_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [saved(tmp_path / f"{name}.npz", token_ids=np.arange(3)) for name in "ab"]
    out = tmp_path / "new" / "out"
    assert run(*files, "--causal", "--methods", "longformer, linear_transformer", "--out", str(out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["study.csv", "study.html", "study.json"]
    assert (out / "study.html").read_bytes().startswith(b"<!doctype html>")
    lines = (out / "study.csv").read_text(encoding="utf-8").splitlines()
    shown, said = capsys.readouterr()
    assert said == "" and shown.count("linear_transformer") == 2
    assert {line.split('"')[1] for line in lines[1:]} == {f"{name}, causal" for name in files}


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_cannot_be_used_is_refused_before_the_study(
    made: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("the study ran before its folder was tried")

    monkeypatch.setattr(study, "compare", worked)
    out = tmp_path / "new" / "out" / ("x" * 300)
    if made:
        out = tmp_path / "out"
        (out / "study.html").mkdir(parents=True)
        (out / "study.csv").write_text("kept")
    assert run(saved(tmp_path / "a.npz"), "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--out" in said
    assert not (tmp_path / "new").exists() and (not made or len(list(out.iterdir())) == 2)


@pytest.mark.parametrize("error", [ValueError("no font"), MemoryError("no room"), OSError(28, "No space left")])
def test_whatever_goes_wrong_in_writing_is_said_in_one_line_and_leaves_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(study, "report", failed)
    out = tmp_path / "new" / "out"
    assert run(saved(tmp_path / "a.npz"), "--methods", "longformer", "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--out" in said and error.args[-1] in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("v", [np.ones_like(V), np.linspace(0, 1e-290, V.size).reshape(V.shape)])
def test_a_picture_without_a_positive_error_is_drawn(v: Any, tmp_path: Path) -> None:
    file, out = saved(tmp_path / "a$b_$.npz", v=v), tmp_path / "out"
    assert run(file, "--methods", "longformer,linear_transformer", "--out", str(out)) == 0
    assert (out / "study.html").stat().st_size > 0


def test_too_little_memory_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 7 TiB")

    monkeypatch.setattr(study, "compare", full)
    assert run(saved(tmp_path / "a.npz")) == 2
    assert capsys.readouterr().err.endswith("a.npz: not enough memory: Unable to allocate 7 TiB\n")


def piped(stdout: Any, *arguments: str, **environment: str) -> tuple[int, bytes]:
    """Run the command as a process that writes there; return its code and what it said on standard error."""
    script = "import sys; from refattn.cli import main; main(sys.argv[1:])"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "backends")))
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [["study", "--methods", "linear_transformer"], ["--help"]])
def test_a_reader_that_left_is_no_violation(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert piped(writer, *arguments) == (141, b"")
    finally:
        os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_a_full_device_is_said_in_one_line() -> None:
    with open("/dev/full", "wb") as full:
        code, said = piped(full, "study", "--methods", "linear_transformer")
    assert code == 2 and said.count(b"\n") == 1 and b"No space left" in said


def test_a_terminal_without_the_signs_gets_the_table(tmp_path: Path) -> None:
    with open(tmp_path / "shown", "wb") as shown:
        arguments = ("study", "--methods", "linear_transformer")
        assert piped(shown, *arguments, PYTHONIOENCODING="ascii", PYTHONUTF8="0") == (0, b"")
    assert b"flops? " in (tmp_path / "shown").read_bytes()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--methods", "softmin"], "methods is 'softmin'; expected one of"),
        (["--methods", ""], "methods is empty"),
        (["--scale", "nan"], "scale is nan"),
        (["--scale", "wide"], "--scale"),
        (["--seed", "-1"], "seed is -1"),
        (["--out", __file__], "--out"),
        (["--sideways"], "--sideways"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and words in said.err and said.out == ""


def test_a_scale_that_overflows_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "a.npz")
    assert run(file, "--scale", "1e308") == 2
    assert capsys.readouterr().err == f"refattn: {file}: q and k give attention weights that are not finite\n"


@pytest.mark.parametrize("name", ["rich", "click", "matplotlib"])
def test_a_missing_extra_is_named_with_the_pip_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert run("--out", "unused") == 2
    line = f"refattn needs {name}, which is not installed; install it with: pip install 'refattn[study]'\n"
    assert capsys.readouterr().err == line


def test_importing_the_study_loads_no_extra() -> None:
    extras = {"click", "jinja2", "matplotlib", "pandas", "rich", "safetensors"}
    script = f"import sys, refattn.cli, refattn.study; print({extras} & set(sys.modules))"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "backends")))
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    assert done.stdout.split() == [b"set()"], done.stderr


def test_an_argument_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="mask is bound to T = 3"):
        study.compare(Q, K, V, mask=masks.causal().on(3, 3))
    with pytest.raises(TypeError, match="methods is 'softmax'; expected a sequence"):
        study.compare(Q, K, V, methods="softmax")
    with pytest.raises(ValueError, match=f"methods is 'softmax'; expected one of {next(iter(METHODS))!r}"):
        study.compare(Q, K, V, methods=["softmax"])
