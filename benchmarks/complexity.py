"""Print the table of complexity: ``python -m benchmarks.complexity``; exit 1 where a claim is wrong.

The first half counts: each method's own code is run in an arithmetic that tallies operations (`benchmarks.counted`),
and the products are what `cost` says, exactly.

The second half measures: `attend` at six lengths n = T = S, each √2 times the one before, the longest of which takes
about `LONGEST` seconds; medians of repeats that take turns; and the slope of log time on log n by least squares with
its 95 % confidence interval (Student's t, 4 degrees of freedom). Time is that of the processor, on one thread that
keeps the memory it was given: the work, which is what is claimed, whoever else is at the machine. The lengths are as
long as patience allows, since fixed overheads flatten the slope. What they leave bends the line, and the interval is
the wider for it.

What is claimed is the slope of `cost` between the same two ends. Options are held so that it means something: a
window, a rank, a number of features stays; a block or a stride is √n. Exponents of the claims that could be mistaken
for one another are ½ or 1 apart (1, 3/2, 2), so a quarter tells them apart:

    within    the interval is no wider than claimed ± ¼, and meets it
    below     all of it is below claimed − ¼: overheads hide the claim, or n is too short to see it
    unsure    it is so wide that it could not tell
    above     all of it is above claimed + ¼: the claim is wrong, and the command exits 1
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.__main__ import medians
from benchmarks.counted import Call, call, count
from refattn import masks, method

DEPTH = {"D": 32, "E": 32}
LENGTHS = 6
STUDENT = 2.776  # the 97.5 % point of Student's t with LENGTHS − 2 degrees of freedom
LONGEST = 0.4
MOST = 2**16
REPEATS = 3
APART = 0.25

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
KEPT = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # glibc's: else some lengths pay for their pages each time
ENVIRONMENT = dict.fromkeys(THREADS, "1") | dict.fromkeys(KEPT, str(2**32))

Growth = Callable[[int], Any]


def root(n: int) -> int:
    """Return √n, rounded down."""
    return math.isqrt(n)


# What grows with n, and what does not; other options have their defaults. A method that is not here has, of options
# without a default, the first that is typical of the shortest of these lengths, at all of them.
HELD: Mapping[str, Sequence[Mapping[str, Growth]]] = {
    "longformer": [{"window": lambda n: 32}],
    "sparse_transformer": [{"length": root}, {"length": root, "pattern": lambda n: "fixed"}],
    "local_global": [{"block": root, "sampled": lambda n: 1}],
    "linformer": [{"rank": lambda n: 32}],
    "pooling": [{"size": lambda n: n // 32}, {"size": lambda n: 8}],
    "performer": [{"features": lambda n: 64}],
    "segments": [{"memory": lambda n: 64}],
    "memformer": [{"slots": lambda n: 16, "segment": lambda n: 64}],
}


class Fit(NamedTuple):
    """A slope and the half-width of its confidence interval."""

    slope: float
    half: float


def fit(lengths: Sequence[float], times: Sequence[float]) -> Fit:
    """Return the slope of log time on log length."""
    x, y = ([math.log(a) for a in values] for values in (lengths, times))
    n, mx, my = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mx) ** 2 for a in x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    return Fit(slope, STUDENT * math.sqrt(rest / (n - 2) / spread))


def verdict(claimed: float, found: Fit) -> str:
    """Say what a slope means for a claim."""
    if found.slope - found.half > claimed + APART:
        return "above"
    if found.half > APART:
        return "unsure"
    return "below" if found.slope + found.half < claimed - APART else "within"


def build(name: str, growth: Mapping[str, Growth], n: int, shortest: int) -> Call:
    """Return a method's call at length n."""
    module = method.modules()[name]
    declared = {**module.METHOD.draw_options, **module.METHOD.options}
    start = {"T": shortest, "S": shortest, **DEPTH}
    options = {
        option: declared[option].values(start)[0]
        for option in declared
        if declared[option].default is method.REQUIRED and option not in module.METHOD.drawn
    }
    return call(module, {"T": n, "S": n, **DEPTH}, **options | {option: of(n) for option, of in growth.items()})


def lengths(name: str, growth: Mapping[str, Growth]) -> list[int]:
    """Return the lengths at which a method is timed, doubled until one call takes long enough."""
    n = 1024
    while n < MOST:
        one = build(name, growth, n, n)
        if medians({"": one.attend}, 3, time.process_time)[""] > LONGEST / 2:  # twice as long takes LONGEST or more
            break
        n *= 2
    return [64 * round(n / 64 / 2 ** (i / 2)) for i in reversed(range(LENGTHS))]


def measure(name: str, growth: Mapping[str, Growth]) -> bool:
    """Time a method, print its row, and return whether its claim stands."""
    sizes = lengths(name, growth)
    calls = {n: build(name, growth, n, sizes[0]) for n in sizes}
    times = medians({str(n): one.attend for n, one in calls.items()}, REPEATS, time.process_time)
    ends = [calls[n].cost().flops for n in (sizes[0], sizes[-1])]
    claimed, found = math.log(ends[1] / ends[0], sizes[-1] / sizes[0]), fit(sizes, [times[str(n)] for n in sizes])
    said, options = verdict(claimed, found), calls[sizes[-1]].options
    held = ", ".join(f"{option}={options[option]}" for option in growth)
    slope = f"{found.slope:.2f} ± {found.half:.2f}"
    line(name, held, f"{sizes[0]}–{sizes[-1]}", f"{claimed:.2f}", slope, said)
    return said != "above"


def tally(name: str) -> bool:
    """Count a method's operations with each of its options in turn, print its rows, and return whether all agree."""
    sizes, good = {"T": 48, "S": 64, "D": 8, "E": 6}, True
    for label, one in variants(name, sizes):
        (done, _), said = count(one), one.cost().flops
        good &= done.products == said
        share = f"{done.products / said:.3f}" if said else "-"
        how = "equal" if done.products == said else "differs"
        columns(name, label, done.products, said, share, done.elementwise, how)
    return good


def columns(what: str, option: str, counted: Any, cost: Any, ratio: str, elementwise: Any, said: str) -> None:
    """Print a row of the first half."""
    print(f"{what:<19} {option:<29} {counted:>9} {cost:>9} {ratio:>6} {elementwise:>12}   {said}", flush=True)


def line(what: str, held: str, where: str, claimed: str, measured: str, said: str) -> None:
    """Print a row of the second half."""
    print(f"{what:<19} {held:<29} {where:<12} {claimed:>7}   {measured:<12} {said}", flush=True)


def variants(name: str, sizes: Mapping[str, int]) -> list[tuple[str, Call]]:
    """Return a method's calls with each typical value of each option in turn, and masked where an engine takes masks.

    A method without an engine forms all pairs in another arithmetic, whatever the mask.
    """
    module = method.modules()[name]
    declared = module.METHOD
    options = {s: x for s, x in {**declared.draw_options, **declared.options}.items() if s not in declared.drawn}
    found = [
        (f"{s}={value}", call(module, sizes, **{s: value})) for s, x in options.items() for value in x.values(sizes)
    ]
    if declared.masks != "none" and declared.engines:
        found.append(("causal", call(module, sizes, mask=masks.causal())))
    return [("", call(module, sizes)), *found]


def main() -> int:
    """Print both halves, the second from a process with one thread, and return the exit status."""
    names = list(method.modules())
    if sys.argv[1:] == ["slopes"]:
        line("method", "held, at the longest", "n", "claimed", "measured", "verdict")
        return 0 if all([measure(name, growth) for name in names for growth in HELD.get(name, [{}])]) else 1
    columns("method", "option", "counted", "cost", "ratio", "elementwise", "verdict")
    counted = all([tally(name) for name in names])
    print(flush=True)
    code = subprocess.run(
        [sys.executable, "-m", "benchmarks.complexity", "slopes"], env={**os.environ, **ENVIRONMENT}
    ).returncode
    return 0 if counted and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
