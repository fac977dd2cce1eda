"""Compare libraries with what is said of them: ``python -m benchmarks.peers [--cases N] [--seed N] [--only NAME]``.

Each library that is installed here answers drawn calls, in its own words, in each dtype; its answers have to be within
the derived tolerance of the arithmetic that it computes in. An axis whose source is ``library`` also has to be told:
for every other value of it, some answer must be out of tolerance. Prints a table of libraries, with what they were not
asked because they have no words for it, and one of profiles and axes. Exits 1 on a disagreement.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks import peer_libraries
from benchmarks.calls import drawn
from refattn.conventions import LIBRARIES, Call, Convention, Profile, neighbours
from refattn.engines import Unsupported
from refattn.testing import FORMATS, Arithmetic, tolerance

HELD = {"float64": np.float64, "float32": np.float32, "bfloat16": np.float32, "float16": np.float16}


@dataclass
class Tally:
    """What a library met."""

    cases: int = 0
    worst: float = 0.0
    where: str = ""
    judged: int = 0
    open: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def cast(call: Call, dtype: str) -> Call:
    """Return the call in numbers that a dtype holds; slopes in those of float32 at least."""
    wide = "float32" if dtype in ("bfloat16", "float16") else dtype
    names = {"q": dtype, "k": dtype, "v": dtype, "bias": dtype, "sink": dtype, "slopes": wide}
    given = {s: (getattr(call, s), d) for s, d in names.items() if getattr(call, s) is not None}
    return replace(call, **{s: FORMATS[d].round(x).astype(HELD[d]) for s, (x, d) in given.items()})


def excess(call: Call, how: Convention, arithmetic: Arithmetic, o: Any, lse: Any) -> tuple[float, int, int]:
    """Return the largest error ÷ allowance, and of how many numbers, and of how many nothing is promised."""
    meaning = call.under(how)
    expected = meaning.answer()
    allowed = meaning.allowance(partial(tolerance, arithmetic))
    own = meaning.allowance(partial(tolerance, "fp64"))
    worst, judged, free = 0.0, 0, 0
    unjudged = {"o": how.empty == "any", "lse": how.empty_lse == "any"}
    for name, got in (("o", o), ("lse", lse)):
        if got is None:
            continue
        got, truth = np.asarray(got, np.float64), getattr(expected, name)
        if got.shape != truth.shape:
            return np.inf, 1, 0
        bound = np.broadcast_to(getattr(allowed, name) + getattr(own, name), truth.shape)
        skip = meaning.empty if unjudged[name] else np.zeros_like(meaning.empty)
        skip = np.broadcast_to(skip.reshape(skip.shape + (1,) * (truth.ndim - skip.ndim)), truth.shape)
        same = (got == truth) | (np.isnan(got) & np.isnan(truth))
        with np.errstate(invalid="ignore", divide="ignore"):
            part = np.where(same, 0.0, np.abs(got - truth) / bound)
        open_ = np.isinf(bound) & np.isfinite(truth)
        part = np.where(skip | open_, 0.0, np.where(np.isnan(part), np.inf, part))
        worst = max(worst, float(part.max(initial=0.0)))
        judged, free = judged + int((~(skip | open_)).sum()), free + int(open_.sum())
    return worst, judged, free


def told(call: Call, own: Convention, arithmetic: Arithmetic, o: Any, lse: Any, pending: list[Any]) -> list[Any]:
    """Return the neighbours of a convention that an answer does not refute."""
    base = call.under(own).answer()
    kept: list[Any] = []
    for axis, value, how in pending:
        other = call.under(how).answer()
        moved = getattr(own, axis) == "any" or not all(
            np.array_equal(x, y, equal_nan=True) for x, y in zip(base, other, strict=True)
        )
        if not (moved and excess(call, how, arithmetic, o, lse)[0] > 1):
            kept.append((axis, value, how))
    return kept


def compare(peer: peer_libraries.Peer, cases: int, seed: int, pending: list[Any]) -> tuple[Tally, list[Any]]:
    """Draw calls until so many were answered, and judge each."""
    tally, rng, own = Tally(), np.random.default_rng(seed), peer.profile.convention
    while tally.cases < cases and tally.refused.total() < 200 * cases:
        call = cast(drawn(rng, shapes=peer.shapes), peer.dtype)
        try:
            words = peer.write(call)
            o, lse = peer.profile.read(peer.run(call, words), call)
        except Unsupported as reason:
            tally.refused[str(reason)] += 1
            continue
        tally.cases += 1
        ratio, judged, free = excess(call, own, peer.arithmetic, o, lse)
        tally.judged, tally.open = tally.judged + judged, tally.open + free
        if ratio > tally.worst:
            tally.worst, tally.where = ratio, f"case {tally.cases}: {shown(call)}"
        if ratio > 1:
            tally.wrong.append(f"{peer.name}, case {tally.cases}: {ratio:.3g} times the tolerance; {shown(call)}")
        elif pending:
            pending = told(call, own, peer.arithmetic, o, lse, pending)
    return tally, pending


def shown(call: Call) -> str:
    """Return a call in a few words."""
    parts = [f"q {np.shape(call.q)}", f"k {np.shape(call.k)}", f"v {np.shape(call.v)}"]
    for name in ("causal", "window", "scale", "softcap", "lengths"):
        value = getattr(call, name)
        if value is not None and value is not False:
            parts.append(f"{name} {value}")
    return ", ".join(parts + [name for name in ("mask", "bias", "slopes", "sink") if getattr(call, name) is not None])


def profiles() -> Iterator[Profile]:
    """Yield every profile."""
    for library in LIBRARIES:
        yield from importlib.import_module(f"refattn.conventions.{library}").PROFILES.values()


def markdown() -> Iterator[str]:
    """Yield the table of profiles: what differs from `Convention()`, and where each axis was read."""
    yield "| profile | means, unlike the default | run | read in its sources | not checked |"
    yield "|---|---|---|---|---|"
    usual = Convention()
    for one in profiles():
        there = {axis: source for axis, source in one.sources.items() if source != "has none"}
        means = {axis: getattr(one.convention, axis) for axis in there}
        named = ", ".join(f"{axis}: {value}" for axis, value in means.items() if value != getattr(usual, axis))
        run, open_ = ([a for a, s in there.items() if s == word] for word in ("library", "not checked"))
        files: dict[str, list[str]] = {}
        for axis, source in there.items():
            if source not in ("library", "not checked"):
                files.setdefault(source, []).append(axis)
        read = "; ".join(f"`{file}`: {', '.join(axes)}" for file, axes in files.items())
        yield f"| {one.name} | {named or '–'} | {', '.join(run) or '–'} | {read or '–'} | {', '.join(open_) or '–'} |"


def untold(pending: dict[str, list[Any]]) -> list[str]:
    """Return the axes that were to be told by a library and were not."""
    return [f"{name}: {axis} might be {value!r}" for name, kept in pending.items() for axis, value, _ in kept]


def main() -> int:
    """Print the tables and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.peers")
    parser.add_argument("--cases", type=int, default=200, help="calls of each library in each dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="profiles whose names begin with this")
    chosen = parser.parse_args()
    started, pending, wrong = time.perf_counter(), dict[str, list[Any]](), list[str]()
    print(f"{'library':<44}{'cases':>6}{'numbers':>9}{'worst error / tolerance':>25}{'seconds':>9}")
    for peer in peer_libraries.peers():
        name = peer.profile.name
        if chosen.only and not name.startswith(chosen.only):
            continue
        if name not in pending:
            checked = [axis for axis, source in peer.profile.sources.items() if source == "library"]
            pending[name] = [one for one in neighbours(peer.profile.convention) if one[0] in checked]
        began = time.perf_counter()
        tally, pending[name] = compare(peer, chosen.cases, chosen.seed, pending[name])
        wrong += tally.wrong[:3]
        wrong += [f"{peer.name}: {tally.cases} cases"] if tally.cases < chosen.cases else []
        print(
            f"{peer.name:<44}{tally.cases:>6}{tally.judged:>9}{tally.worst:>25.3f}{time.perf_counter() - began:>9.0f}",
            flush=True,
        )
        for reason, count in tally.refused.most_common(2):
            print(f"    not asked {count} times: {reason}")
    absent = [library for library in peer_libraries.LIBRARIES if importlib.util.find_spec(library) is None]
    wrong += [f"{library} is not installed" for library in absent]
    wrong += untold(pending)
    print("", *markdown(), sep="\n")
    print(f"\n{time.perf_counter() - started:.0f} s, seed {chosen.seed}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
