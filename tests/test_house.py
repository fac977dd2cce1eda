"""Rules of the house that a text search can hold."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("refattn", "backends", "proofs", "tests", "benchmarks", "docs")

# Letters in brackets keep these patterns from finding themselves.
HAND_PICKED = r"all[c]lose|is[c]lose|assert_[a]lmost|[ra]tol|(rel|abs)_tol|[a]pprox\("
DOUBLE_IMPORT = r"^\s*(import|from)\s+[b]ackends\b"


def found(suffix: str, *rooms: str) -> list[Path]:
    """Files of these rooms; `.` is the top folder without its rooms."""
    paths = [path for room in rooms for path in (ROOT.glob("*") if room == "." else (ROOT / room).rglob("*"))]
    chosen = sorted(path for path in paths if path.suffix == suffix)
    assert chosen
    return chosen


def finds(pattern: str, paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line):
                yield f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def drawn_tree() -> set[str]:
    """Paths in the picture of CONTRIBUTING.md."""
    picture = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    room, paths = "", set[str]()
    for line in filter(None, picture.splitlines()):
        name = line.split()[0]
        room = room if line.startswith(" ") else name
        paths.add(room + name if line.startswith(" ") else name)
    return {path.rstrip("/") for path in paths}


def test_no_tolerance_is_picked_by_hand() -> None:
    assert not list(finds(HAND_PICKED, found(".py", ".", "tests", "proofs", "docs")))


def test_no_kernel_asks_for_fast_math() -> None:
    assert not list(finds("fast[m]ath", found(".py", "backends")))


def test_backends_are_imported_by_their_own_name() -> None:
    # Through the folder's name the same module would load twice.
    assert not list(finds(DOUBLE_IMPORT, found(".py", ".", *ROOMS)))


def test_importing_refattn_loads_numpy_only() -> None:
    script = """if True:
        import sys, numpy.random
        before = set(sys.modules)
        import refattn
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new - sys.stdlib_module_names - {"numpy", "refattn"}))
    """
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "backends")))
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (run.stdout.strip(), run.stderr) == ("", "")


@pytest.mark.parametrize("command", ["pip install -e '.[all]' && refattn study", "pip install -e '.[test]' && pytest"])
def test_the_readme_has_the_two_commands(command: str) -> None:
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_every_module_has_a_docstring() -> None:
    modules = found(".py", "refattn", "backends")
    assert not [path for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


def test_the_extra_all_is_the_four_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras["all"] == ["refattn[cpu,study,testing,certify]"]
    assert "refattn[all]" in extras["test"]


def test_relative_links_lead_somewhere() -> None:
    links = [
        (path, link)
        for path in found(".md", ".", *ROOMS)
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:", link)
    ]
    assert links
    assert not [(str(path.relative_to(ROOT)), link) for path, link in links if not (path.parent / link).exists()]


def test_the_picture_of_the_house_is_the_house() -> None:
    drawn = drawn_tree()
    assert not [path for path in sorted(drawn) if not (ROOT / path).exists()]
    built = {path.relative_to(ROOT) for path in found(".py", "refattn", "backends")}
    rooms = {"/".join(path.parts[:2]) for path in built if not path.parts[1].startswith("_")}
    assert rooms <= drawn
