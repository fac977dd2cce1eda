"""Measure what replay saves: ``python -m benchmarks.replay``.

Peak memory, as NumPy asks for it, of the gradients of Memformer by replay (`refattn.memory.memformer.vjp`) and by plain
backpropagation through time, which keeps every segment's activations, at three lengths; beside it what is beyond the
gradients that both return, of which the ratio is. The gradients are compared bit for bit. Exits 1 where they differ or
replay takes more.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from benchmarks.__main__ import MIB
from proofs.memory import unrolled
from refattn.memory import memformer

DEPTH, SLOTS, SEGMENT = 16, 16, 64
POWERS = (12, 14, 16)


def measure(work: Callable[[], memformer.Gradients]) -> tuple[memformer.Gradients, float, float]:
    """Return the gradients, the peak of what was allocated on the way, in MiB, and the seconds without a tracer."""
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    g = work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return g, peak / MIB, seconds


def main() -> int:
    """Print the table and return the exit status."""
    print(f"Memformer's gradients, D = E = {DEPTH}, n = {SLOTS} slots, segments of {SEGMENT}; float64")
    print("beyond: what is beyond the gradients themselves")
    print(f"{'tokens':<8}{'replay':>12}{'beyond':>12}{'plain':>12}{'beyond':>12}{'plain / replay':>18}{'seconds':>16}")
    beyond: list[tuple[float, float]] = []
    same = True
    for power in POWERS:
        rng = np.random.default_rng(0)
        q, k, v, do = rng.standard_normal((4, 2**power, DEPTH))
        arrays = (do, q, k, v, *memformer.draw(rng, q, k, v, slots=SLOTS))
        g, replay, fast = measure(lambda: memformer.vjp(*arrays, segment=SEGMENT))  # noqa: B023
        h, plain, slow = measure(lambda: unrolled.vjp(*arrays, segment=SEGMENT))  # noqa: B023
        same = same and all((a == b).all() for a, b in zip(g, h, strict=True))
        own = sum(x.nbytes for x in g) / MIB
        beyond.append((replay - own, plain - own))
        cells = "".join(f"{x:>8.2f} MiB" for x in (replay, replay - own, plain, plain - own))
        ratio = beyond[-1][1] / beyond[-1][0]
        print(f"2^{power:<6}{cells}{ratio:>18.1f}{f'{fast:.2f} and {slow:.2f}':>16}", flush=True)
    for name, sizes in zip(("replay", "plain"), zip(*beyond, strict=True), strict=True):
        grown = ", ".join(f"{after / before:.2f}" for before, after in pairwise(sizes))
        print(f"{name}: {grown} times as much beyond the gradients for 4 times the length")
    print(f"gradients {'agree' if same else 'DIFFER'}, bit for bit")
    return 0 if same and all(replay < plain for replay, plain in beyond) else 1


if __name__ == "__main__":
    sys.exit(main())
