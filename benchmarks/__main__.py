"""Print the table of speed and memory: ``python -m benchmarks``.

Each row runs in a process of its own, so that its peak memory is its own. Times are seconds on this machine, the
medians of a few repeats; goals that are ratios are measured side by side in one process.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

MIB = 2**20


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of some repeats."""
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak() -> float:
    """Return this process's peak resident memory, or its largest child's, in MiB."""
    used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return used * 1024 / MIB


def importing() -> None:
    """Time `import refattn` after `import numpy`, each in a fresh interpreter."""
    clock = "import time, numpy; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    taken = [float(subprocess.check_output([sys.executable, "-c", clock.format("import refattn")])) for _ in range(9)]
    row("import refattn, beyond import numpy", f"{1e3 * statistics.median(taken):.0f} ms", "<= 60 ms")


def studying() -> None:
    """Time `refattn study` on the shipped sample, as a process."""
    code = "import sys; from refattn.cli import main; sys.argv = ['refattn', 'study']; main()"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    row("refattn study, shipped sample", f"{time.perf_counter() - start:.1f} s, {peak():.0f} MiB", "<= 30 s, 1024 MiB")


def attending() -> None:
    """Time exact attention at T = S = 16384, D = E = 64, one head, float64: whole, and with a window."""
    import numpy as np

    from refattn import masks, softmax

    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 16384, 64))
    narrow = seconds(lambda: softmax.attend(q, k, v, mask=masks.window(256, 0)), 3)
    whole = seconds(lambda: softmax.attend(q, k, v), 3)
    row("softmax.attend, T = S = 16384, D = E = 64", f"{whole:.1f} s, {peak():.0f} MiB", "<= 600 MiB")
    row("the same with window(256, 0)", f"{narrow:.2f} s, 1/{whole / narrow:.0f} of it", "<= 1/8")


def streaming() -> None:
    """Time causal linear attention per token from 2^14 to 2^20 tokens, D = E = 32, float64."""
    import numpy as np

    from refattn import masks
    from refattn.kernel import linear_transformer

    rng, each = np.random.default_rng(0), {}
    for power in (14, 16, 18, 20):
        q, k, v = (rng.standard_normal((2**power, 32)) for _ in range(3))
        taken = seconds(lambda q=q, k=k, v=v: linear_transformer.attend(q, k, v, mask=masks.causal()), 3)
        each[power] = taken / 2**power
        row(f"linear_transformer.attend, causal, n = 2^{power}", f"{1e6 * each[power]:.2f} us a token", "flat")
    row("the same, 2^20 against 2^14", f"{each[20] / each[14]:.2f}, {peak():.0f} MiB", "flat, <= 2048 MiB")


def row(what: str, measured: str, goal: str) -> None:
    """Print one row."""
    print(f"{what:<46} {measured:<24} {goal}", flush=True)


SECTIONS = {f.__name__: f for f in (importing, studying, attending, streaming)}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        SECTIONS[sys.argv[1]]()
    else:
        import numpy

        print(f"numpy {numpy.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores; float64")
        row("what", "measured", "goal")
        for name in SECTIONS:
            subprocess.run([sys.executable, "-m", "benchmarks", name], check=True)
