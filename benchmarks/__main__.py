"""Print the table of speed and memory: ``python -m benchmarks``; exit 1 where a goal is missed.

Each section runs in a process of its own, so that its peak memory is its own. Times are seconds on this machine, the
medians of a few repeats; those that a ratio compares take turns, so that a busy moment meets both.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

MIB = 2**20


class Measure(NamedTuple):
    """A number, how it is printed, and the most that it may be."""

    value: float
    text: str
    goal: float | None = None

    def __str__(self) -> str:
        """Return the number as printed."""
        return self.text.format(self.value)

    @property
    def missed(self) -> bool:
        """Whether there is a goal, and the number is not within it."""
        return self.goal is not None and not self.value <= self.goal


def medians(
    works: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median time of each piece of work, over repeats in which they take turns."""
    times: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            start = clock()
            work()
            times[key].append(clock() - start)
    return {key: statistics.median(taken) for key, taken in times.items()}


def peak() -> float:
    """Return this process's peak resident memory, or its largest child's, in MiB."""
    used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return used * 1024 / MIB


def importing() -> bool:
    """Time `import refattn` after `import numpy`, each in a fresh interpreter; the least is what it takes.

    Bytecode is cached in a folder of its own, as it is where a package is installed.
    """
    clock = "import time, numpy; t = time.perf_counter(); import refattn; print(time.perf_counter() - t)"
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as cache:
        environment["PYTHONPYCACHEPREFIX"] = cache
        runs = [subprocess.check_output([sys.executable, "-c", clock], env=environment) for _ in range(9)]
    taken = [float(x) for x in runs]
    return row("import refattn, beyond import numpy", Measure(1e3 * min(taken), "{:.0f} ms", 60))


def studying() -> bool:
    """Time `refattn study` on the shipped sample, as a process."""
    code = "import sys; from refattn.cli import main; sys.argv = ['refattn', 'study']; main()"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    taken = time.perf_counter() - start
    return row("refattn study, shipped sample", Measure(taken, "{:.1f} s", 30), Measure(peak(), "{:.0f} MiB", 1024))


def attending() -> bool:
    """Time exact attention at T = S = 16384, D = E = 64, one head, float64: whole, and with a window."""
    import numpy as np

    from refattn import masks, softmax

    q, k, v = np.random.default_rng(0).standard_normal((3, 16384, 64))
    works = {
        "narrow": lambda: softmax.attend(q, k, v, mask=masks.window(256, 0)),
        "whole": lambda: softmax.attend(q, k, v),
    }
    each = medians(works, 3)
    memory = Measure(peak(), "{:.0f} MiB", 600)
    within = row("softmax.attend, T = S = 16384, D = E = 64", Measure(each["whole"], "{:.1f} s"), memory)
    part = Measure(each["narrow"] / each["whole"], "{:.3f} of it", 1 / 8)
    return row("the same with window(256, 0)", Measure(each["narrow"], "{:.2f} s"), part) and within


def streaming() -> bool:
    """Time causal linear attention per token from 2^14 to 2^20 tokens, D = E = 32, float64."""
    import numpy as np

    from refattn import masks
    from refattn.kernel import linear_transformer

    q, k, v = np.random.default_rng(0).standard_normal((3, 2**20, 32))
    powers = (14, 16, 18, 20)
    attend = linear_transformer.attend
    works = {f"{p}": lambda n=2**p: attend(q[:n], k[:n], v[:n], mask=masks.causal()) for p in powers}
    taken = medians(works, 5)
    each = {p: taken[f"{p}"] / 2**p for p in powers}
    for p in powers:
        row(f"linear_transformer.attend, causal, n = 2^{p}", Measure(1e6 * each[p], "{:.2f} us a token"))
    ratio = Measure(each[20] / each[14], "{:.2f} times", 2)
    return row("a token of 2^20 against one of 2^14", ratio, Measure(peak(), "{:.0f} MiB", 2048))


def row(what: str, *measures: Measure) -> bool:
    """Print one row, and return whether it is within its goals."""
    goals = ", ".join("<= " + x.text.format(x.goal) for x in measures if x.goal is not None)
    missed = any(x.missed for x in measures)
    line(what, ", ".join(map(str, measures)), goals or "-", "missed" if missed else "met" if goals else "-")
    return not missed


def line(what: str, measured: str, goal: str, verdict: str) -> None:
    """Print four columns."""
    print(f"{what:<43} {measured:<20} {goal:<27} {verdict}", flush=True)


SECTIONS = {f.__name__: f for f in (importing, studying, attending, streaming)}


def main() -> int:
    """Run one section, or each in a process of its own; return the exit code."""
    if len(sys.argv) > 1:
        return 0 if SECTIONS[sys.argv[1]]() else 1
    import numpy

    print(f"numpy {numpy.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores; float64", flush=True)
    line("what", "measured", "goal", "verdict")
    failed = [subprocess.run([sys.executable, "-m", "benchmarks", name]).returncode for name in SECTIONS]
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
