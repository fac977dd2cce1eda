"""The picture of one method: what its panels hold, and what the command says about bad arguments."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import cli, masks, method, rounding, softmax, study
from refattn.study import _show
from refattn.testing import assert_within

METHODS = {name: module.METHOD for name, module in method.modules().items() if module.METHOD.family}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["show", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def shown(name: str, seed: int = 0, **options: Any) -> study.Shown:
    return _show.compute(name, seed, options)


def panels(picture: study.Shown) -> tuple[list[Any], Any]:
    """Return the arrays of the matrices, and the axes of the outputs."""
    axes = _show.figure(picture).get_axes()
    (outputs,) = (one for one in axes if one.get_ylabel() == "output")
    return [np.ma.filled(image.get_array(), 0.0) for one in axes for image in one.get_images()], outputs


def png(name: str, seed: int = 0) -> bytes:
    file = io.BytesIO()
    study.show(name, file, seed=seed)
    return file.getvalue()


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[study.Shown, bytes]]:
    found: dict[str, tuple[study.Shown, bytes]] = {}
    for name in METHODS:
        path = tmp_path_factory.mktemp("show") / f"{name}.png"
        picture = study.show(name, path)
        found[name] = picture, path.read_bytes()
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_picture_of_what_it_answered(name: str, every: Any) -> None:
    picture, file = every[name]
    assert file[:8] == b"\x89PNG\r\n\x1a\n" and 30_000 < len(file) < 300_000
    assert [int.from_bytes(file[at : at + 4], "big") for at in (16, 20)] == [1320, 936]
    images, outputs = panels(picture)
    arrays = [picture.exact, picture.weights, picture.difference]
    for image, array in zip(images, [x for x in arrays if x is not None], strict=True):
        assert np.isfinite(image).all() and np.array_equal(image, array)
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in outputs.get_lines()}
    assert np.array_equal(lines["exact output"], picture.o_exact) and np.array_equal(lines["values v"], picture.v)
    assert np.array_equal(lines[f"output of {name}"], picture.o)
    low, high = outputs.get_ylim()
    assert all(((low < line) & (line < high)).all() for line in lines.values())


@pytest.mark.parametrize("name", METHODS)
def test_the_matrices_make_the_outputs(name: str, every: Any) -> None:
    picture, _ = every[name]
    _, one = _show.problem(name, 0, {})
    sweep, declared, options = one.sweep, one.sweep.declared, method.accepted(one.sweep.module.attend, one.options)
    q, k, v = (one.arrays[letter] for letter in "qkv")
    mask = masks.causal() if declared.causal else None

    def dense(*arrays: Any, **options: Any) -> Any:
        by_name = dict(zip(declared.required, arrays, strict=True))
        found = sweep.module.weights(*(x for s, x in by_name.items() if s not in declared.linear_in), **options)
        return (sum(found) if isinstance(found, tuple) else found) @ by_name["v"]

    def exact(q: Any, k: Any, v: Any) -> Any:
        return softmax.weights(q, k, mask=mask) @ v

    room = rounding.allowance(exact, q, k, v) + rounding.allowance(softmax.attend, q, k, v, mask=mask)
    assert_within(picture.o_exact[:, None], picture.exact @ v, room)
    assert declared.causal == (not np.triu(picture.exact, 1).any())
    if not declared.linear_in:
        assert picture.difference is None and picture.weights.shape == (50, 12)
        return
    assert np.array_equal(picture.difference, picture.weights - picture.exact)
    assert not (declared.causal and np.triu(picture.weights, 1).any())
    arrays = [one.arrays[s] for s in declared.required]
    room = rounding.allowance(dense, *arrays, **options) + rounding.allowance(sweep.module.attend, *arrays, **options)
    assert_within(picture.o[:, None], picture.weights @ v, room)


@pytest.mark.parametrize("name", METHODS)
def test_the_band_holds_the_exact_output(name: str, every: Any) -> None:
    picture, _ = every[name]
    _, outputs = panels(picture)
    claimed = any(claim.over == "arrays" for claim in METHODS[name].claims)
    assert (picture.bound is not None) == claimed == (len(outputs.collections) == 1)
    if not claimed:
        assert picture.numbers.endswith(", no bound")
        return
    edge = outputs.collections[0].get_paths()[0].vertices
    low, high = (np.clip(picture.o + sign * picture.bound, *outputs.get_ylim()) for sign in (-1, 1))
    for x, floor, ceiling in zip(range(50), low, high, strict=True):
        at = edge[edge[:, 0] == x, 1]
        assert (at.min(), at.max()) == (floor, ceiling)
    error = np.abs(picture.o - picture.o_exact)
    assert picture.numbers == f"largest error {error.max():.3g}, largest bound {picture.bound.max():.3g}"


def test_a_matrix_and_the_exact_one_share_their_colours() -> None:
    for name, signed in (("longformer", False), ("segments", False), ("linformer", True)):
        axes = _show.figure(shown(name)).get_axes()
        first, second, difference = (image for one in axes for image in one.get_images())
        assert (first.get_clim(), first.cmap) == (second.get_clim(), second.cmap)
        assert (first.get_clim()[0] == 0) != signed
        for image in (difference, *([first] if signed else [])):
            low, high = image.get_clim()
            assert -low == high >= np.abs(image.get_array()).max()


def test_patterns_are_seen_where_they_are_defined() -> None:
    i, j = np.indices((50, 50))
    causal = j <= i
    cases: dict[str, tuple[dict[str, Any], Any]] = {
        "longformer": ({"window": 3, "tokens": (0,)}, (abs(i - j) <= 3) | (i == 0) | (j == 0)),
        "segments": ({"memory": 6}, causal & (i - j <= 6)),
        "sparse_transformer": (
            {"length": 7, "pattern": "fixed"},
            causal & ((i // 7 == j // 7) | (j % 7 == 6)),
        ),
    }
    for name, (options, seen) in cases.items():
        picture = shown(name, **options)
        assert np.array_equal(picture.weights > 0, seen), name
        (image, *_) = (one.get_images() for one in _show.figure(picture).get_axes()[1:])
        assert np.array_equal(~np.ma.getmaskarray(image[0].get_array()), seen)


def test_the_seed_makes_the_points_and_what_is_drawn(every: Any) -> None:
    assert every["performer"][1] == png("performer", 0) != png("performer", 1)
    assert not np.array_equal(shown("performer").difference, shown("performer", 1).difference)
    assert not np.array_equal(shown("gaussian").exact, shown("gaussian", 1).exact)


def test_options_are_those_given_and_otherwise_typical() -> None:
    assert shown("pooling").title == "pooling, size=4"
    assert shown("longformer", dilation=2, window=3).title == "longformer, window=3, dilation=2"
    assert shown("gaussian").title == "gaussian"


def test_what_is_not_finite_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"o": np.full(50, np.nan), "weights": np.full((50, 50), np.nan), "bound": np.full(50, np.inf)}
    picture = shown("pooling")._replace(**answers)
    with np.errstate(all="ignore"):
        _show.figure(picture._replace(difference=picture.weights - picture.exact)).savefig(io.BytesIO(), format="png")
    assert picture.numbers == "largest error nan, largest bound inf"


def test_a_method_that_does_not_exist_and_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="name is 'softmax'; expected one of 'sparse_transformer'"):
        shown("softmax")
    with pytest.raises(ValueError, match="options has 'widow'; expected one of 'window'"):
        shown("longformer", widow=3)
    with pytest.raises(ValueError, match="options has 'x'; expected none, as gaussian takes no options"):
        shown("gaussian", x=3)
    with pytest.raises(ValueError, match="window is -1"):
        shown("longformer", window=-1)
    with pytest.raises(ValueError, match="seed is -1"):
        shown("gaussian", seed=-1)


def test_the_command_writes_one_picture_and_says_where(
    every: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("pooling") == 0
    assert (tmp_path / "pooling.png").read_bytes() == every["pooling"][1]
    out = Path("new") / "folder" / "of windows.png"
    assert run("longformer", "--set", "window=2", "--set", "tokens=(0,)", "--seed", "3", "--out", str(out)) == 0
    said, err = capsys.readouterr()
    words = [shown("pooling").numbers, shown("longformer", 3, window=2, tokens=(0,)).numbers]
    assert (said, err) == (f"pooling.png: {words[0]}\n{out}: {words[1]}\n", "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "new", "of windows.png", "pooling.png"]


def test_all_methods_go_into_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quick(name: str, path: Path, **options: Any) -> Any:
        path.write_text(name)
        return shown_once

    shown_once = shown("gaussian")
    monkeypatch.setattr(study, "show", quick)
    out = tmp_path / "out"
    assert run("--all", "--out", str(out)) == 0
    assert {path.name: path.read_text() for path in out.iterdir()} == {f"{name}.png": name for name in METHODS}
    assert capsys.readouterr().out.splitlines() == [f"{out / name}.png: {shown_once.numbers}" for name in METHODS]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "METHOD is missing; expected --all or one of sparse_transformer, "),
        (["softmin"], "METHOD is 'softmin'; expected --all or one of sparse_transformer, "),
        (["--all", "longformer"], "--all draws every method; leave out longformer"),
        (["--all", "--set", "window=3"], "--set is about one method"),
        (["longformer", "--set", "window"], "--set is 'window'; expected NAME=VALUE"),
        (["longformer", "--set", "widow=3"], "options has 'widow'; expected one of 'window'"),
        (["longformer", "--set", "window=wide"], "window is 'wide'; expected an integer"),
        (["longformer", "--set", "window=-1"], "window is -1"),
        (["pooling", "--set", "counts=lost"], "counts is 'lost'; expected one of"),
        (["pooling", "--seed", "-1"], "seed is -1"),
        (["pooling", "--seed", "x"], "--seed"),
        (["pooling", "--sideways"], "--sideways"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line_and_leaves_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--out", str(tmp_path / "new" / "out.png")) == 2
    said, err = capsys.readouterr()
    assert said == "" and err.count("\n") == 1 and words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["a folder", "below a file", "a name too long", "not a file"])
def test_a_path_that_cannot_be_written_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    out = {
        "a folder": tmp_path,
        "below a file": tmp_path / "file" / "x.png",
        "a name too long": tmp_path / "new" / ("x" * 300),
        "not a file": Path("/dev/null"),
    }[case]
    assert run("pooling", "--out", str(out)) == 2
    said, err = capsys.readouterr()
    assert said == "" and err.count("\n") == 1 and "--out: cannot write to" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("error", [RuntimeError("no font"), MemoryError("no room"), OSError(28, "No space left")])
def test_whatever_goes_wrong_is_said_in_one_line_and_leaves_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(name: str, path: Path, **options: Any) -> Any:
        if name == "longformer":
            raise error
        path.write_text("whole")
        return first

    first = shown("gaussian")
    monkeypatch.setattr(study, "show", failed)
    assert run("--all", "--out", str(tmp_path / "new")) == 2
    said, err = capsys.readouterr()
    assert said == "" and err.count("\n") == 1 and error.args[-1] in err and "longformer" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["click", "matplotlib"])
def test_a_missing_extra_is_named_with_the_pip_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert run("pooling", "--out", str(tmp_path / "x.png")) == 2
    line = f"refattn needs {name}, which is not installed; install it with: pip install 'refattn[study]'\n"
    assert capsys.readouterr().err == line and not list(tmp_path.iterdir())
