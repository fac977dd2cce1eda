"""Break the code on purpose, one fault at a time, and see tests fail: ``python -m benchmarks.broken``.

Each fault is planted in a copy of the tree. The command fails if a fault survives its tests, or if the tests that are
to catch it fail without it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """One change of the source, and the tests that must notice it."""

    what: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


RATES = ("proofs/kernel/test_performer.py", "-k", "(root_of_the_number and positive) or two_opposite_rows")
"""What Performer's error has to be as its features grow in number, and for two of them."""

FAULTS = (
    Fault(
        "a window that is one key short",
        "refattn/masks.py",
        "start = 0 if self.left is None else p - self.left",
        "start = 0 if self.left is None else p - self.left + 1",
        ("tests/test_masks.py",),
    ),
    Fault(
        "1/√D dropped",
        "refattn/_check.py",
        "return 1.0 / math.sqrt(depth)",
        "return 1.0",
        ("tests/test_laws.py", "-k", "softmax-attend"),
    ),
    Fault(
        "no row maximum subtracted",
        "refattn/softmax.py",
        "shift = np.where(empty, 0.0, m)",
        "shift = np.zeros_like(m)",
        ("proofs/test_rounding.py",),
    ),
    Fault(
        "a bound scaled by 0.5",
        "refattn/perturbation.py",
        'return np.tanh(_real("span", span, 0.0) / 4)',
        'return 0.5 * np.tanh(_real("span", span, 0.0) / 4)',
        ("proofs/test_perturbation.py",),
    ),
    Fault(
        "a vjp without the −do·o term",
        "refattn/softmax.py",
        "own = dl[rows] - ",
        "own = dl[rows] - 0 * ",
        ("tests/test_laws.py", "-k", "softmax-vjp"),
    ),
    Fault(
        "Performer: keys meet another projection",
        "refattn/kernel/_favor.py",
        "(features.project(z, self.omega, kind) for z in (q, k))",
        "(features.project(z, w, kind) for z, w in ((q, self.omega), (k, self.omega[::-1])))",
        RATES,
    ),
    Fault(
        "Performer: no ‖x‖²/2 in the keys",
        "refattn/kernel/_favor.py",
        "w = features.raw(ey, features.height(y, kind), kind)",
        "w = features.raw(ey, features.height(y, kind) * 0.0, kind)",
        RATES,
    ),
    Fault(
        "Performer: each key's own maximum",
        "refattn/kernel/_favor.py",
        "w = features.raw(ey, features.height(y, kind), kind)",
        "w = features.raw(ey, features.height(y, kind) - features.largest(plain_y) * by, kind)",
        RATES,
    ),
    Fault(
        "pooling forgets the counts",
        "refattn/lowrank/pooling.py",
        "np.log(type(k).lift(c[None]) if isinstance(k, Lifted) else c[None])",
        "0.0 * np.log(type(k).lift(c[None]) if isinstance(k, Lifted) else c[None])",
        ("proofs/lowrank/test_pooling.py",),
    ),
    Fault(
        "a memory that is one key short",
        "refattn/masks.py",
        "(keys >= p // self.length * self.length - self.memory)",
        "(keys > p // self.length * self.length - self.memory)",
        ("tests/test_masks.py", "proofs/memory/test_segments.py"),
    ),
    Fault(
        "Memformer's slots see each other",
        "refattn/memory/_slots.py",
        "masks.window(0, 0).at(0) | ~masks.prefix(n)",
        "masks.window(None, None)",
        ("proofs/memory/test_memformer.py",),
    ),
    Fault(
        "a doctest with another answer",
        "refattn/softmax.py",
        "    array([0.69314718])",
        "    array([0.69314719])",
        ("refattn/softmax.py",),
    ),
)


def passes(tree: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Run some tests in a tree, and return whether they pass and what pytest says last."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest did not run:\n{done.stdout}{done.stderr}")
    return done.returncode == 0, done.stdout.strip().splitlines()[-1]


def main() -> int:
    """Plant every fault in turn, and print what its tests say."""
    survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".hypothesis"))
        for fault in FAULTS:
            path = tree / fault.file
            text = path.read_text(encoding="utf-8")
            if text.count(fault.right) != 1:
                raise SystemExit(f"{fault.file} has {fault.right!r} {text.count(fault.right)} times; expected once")
            path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
            caught, last = not passes(tree, fault.tests)[0], ""
            path.write_text(text, encoding="utf-8")
            sound, last = passes(tree, fault.tests)
            survived += not (caught and sound)
            verdict = ("caught" if caught else "SURVIVED") + ("" if sound else ", BUT FAILS WITHOUT IT")
            print(f"{fault.what:<42} {verdict:<10} by {' '.join(fault.tests):<70} (unbroken: {last})", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
