"""Guilty and innocent: the judge, the diagnosis and three rival rules on planted bugs and on kernels that are right.

Run ``python -m benchmarks.zoo [--quick]``; it fails where a mutant is missed, or an innocent kernel is convicted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from refattn.conventions import Call, Convention, Meaning
from refattn.testing import FORMATS, PRESETS, emulate, tolerance, typical
from refattn.testing._configurations import CONFIGURATIONS, Configuration, ordinary
from refattn.testing._diagnosis import Diagnosis, diagnose, shared
from refattn.testing._isolation import isolated
from refattn.testing._written import write
from refattn.testing.zoo import MUTANTS, Kernel, Mutant

HOW = Convention()
GIVEN = {"o": "float32", "gradients": "float32", "precision": "bfloat16"}
CLAIMED = {"o": "fp32", "gradients": "fp32", "precision": "fa2-bf16"}
DIAGNOSED = 3
RULES = ("refattn", "allclose(atol=1e-2)", "2 × the error of a same-dtype reference", "PyTorch's fudge rule")
DEFAULTS = {"float32": (1e-5, 1.3e-6), "bfloat16": (1e-3, 1.6e-2), "float16": (1e-3, 1e-3)}
"""PyTorch's default absolute and relative tolerances."""
FUDGE = 2.0


class Case:
    """A configuration with its numbers in a format, what is right of it and what is allowed."""

    def __init__(self, configuration: Configuration, given: str, seed: int) -> None:
        """Draw the numbers."""
        self.name, self.given, self.seed = configuration.name, given, seed
        call = configuration.make(np.random.default_rng(seed), HOW)
        arrays = {name: _rounded(getattr(call, name), given) for name in ("q", "k", "v")}
        arrays |= {name: _rounded(getattr(call, name), "float32") for name in ("bias", "slopes", "sink")}
        layout = LAYOUTS.get(configuration.layout, lambda x: x)
        arrays |= {name: layout(arrays[name]) for name in ("q", "k", "v")}
        self.call = replace(call, **arrays)
        rng = np.random.default_rng([seed, 1])
        lead = np.broadcast_shapes(np.shape(call.q)[:-3], np.shape(call.k)[:-3])
        self.do = _rounded(rng.standard_normal((*lead, *np.shape(call.q)[-3:-1], np.shape(call.v)[-1])), given)
        self.dlse = rng.standard_normal(self.do.shape[:-1]).astype(np.float32)
        if call.sink is None:
            self.dlse = np.where(call.under(HOW).empty, np.float32(0), self.dlse)

    @cached_property
    def right(self) -> dict[str, Any]:
        """What is right."""
        return self.call.under(HOW).answer()._asdict()

    def bounds(self, verb: Callable[..., Any], arithmetic: str) -> dict[str, Any]:
        """Return what is allowed of o and lse, by a verb of `refattn.testing`."""
        meaning = self.call.under(HOW)
        some, own = (meaning.allowance(partial(f, a)) for f, a in ((verb, arithmetic), (tolerance, "fp64")))
        return {name: getattr(some, name) + getattr(own, name) for name in some._fields}

    @cached_property
    def gradients(self) -> dict[str, Any]:
        """The right gradients."""
        return {f"d{s}": x for s, x in self.call.under(HOW).vjp(self.do, self.dlse)._asdict().items() if x is not None}

    def gradient_bounds(self, verb: Callable[..., Any], arithmetic: str) -> dict[str, Any]:
        """Return what is allowed of gradients."""

        def asked(a: str) -> Callable[..., Any]:
            return lambda do, q, k, v, **options: verb(a, q, k, v, do=do, **options)

        meaning = self.call.under(HOW)
        some, own = (meaning.gradient_allowance(asked(a), self.do, self.dlse) for a in (arithmetic, "fp64"))
        return {
            f"d{s}": getattr(some, s) + getattr(own, s)
            for s in "q k v bias sink".split()
            if getattr(some, s) is not None
        }


def emulated(call: Call) -> Meaning:
    """Return a call's meaning for the emulator, ALiBi as a table: it knows one form of it."""
    table = {} if call.slopes is None else {"slopes": None, "bias": write(call, HOW).bias}
    return replace(call, **table).under(HOW)


def _rounded(x: Any, name: str) -> Any:
    return None if x is None else FORMATS[name].round(np.asarray(x, np.float64)).astype(np.float32)


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda x: x.swapaxes(-3, -2).copy().swapaxes(-3, -2),
    "strided": lambda x: np.repeat(x, 2, -1)[..., ::2],
}


def _lengths_and_rows(rng: np.random.Generator, _: Convention) -> Call:
    return ordinary(rng, B=3, T=5, S=70, lengths=np.array([9, 70, 33]), causal=True)


def _causal_and_mask(rng: np.random.Generator, _: Convention) -> Call:
    return ordinary(rng, T=40, S=70, causal=True, mask=rng.random((2, 2, 40, 70)) < 0.7)


MORE = (
    Configuration(name="lengths, causal, several rows", capability="lengths", make=_lengths_and_rows),
    Configuration(name="causal and a mask", capability="mask", make=_causal_and_mask),
)
"""Configurations beside the kit's."""


def cases(given: str, *, gradients: bool = False) -> Iterator[Case]:
    """Yield the kit's configurations that have numbers to judge."""
    for n, one in enumerate((*CONFIGURATIONS, *MORE)):
        if one.promised and not one.thorough and one.capability != "size 0" and (one.gradients or not gradients):
            yield Case(one, given, n)


def answered(kernel: Kernel, case: Case, where: str) -> dict[str, Any]:
    """Return what a kernel answers to a case."""
    with np.errstate(all="ignore"):
        if where == "gradients":
            found = kernel.backward(case.call, case.do, case.dlse)._asdict()
            return {f"d{s}": x for s, x in found.items() if x is not None}
        return kernel.forward(case.call)._asdict()


def kernel_of(kernel: type[Kernel], where: str) -> Kernel:
    """Return a kernel in the formats that it claims."""
    return kernel(FORMATS["bfloat16"], FORMATS["bfloat16"]) if where == "precision" else kernel()


def worst(actual: dict[str, Any], right: dict[str, Any], bounds: dict[str, Any]) -> float:
    """Return the largest error ÷ bound."""
    found = 0.0
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for name, x in actual.items():
            y, b = right[name], np.broadcast_to(bounds[name], right[name].shape)
            error = np.where(x == y, 0.0, np.abs(x.astype(np.float64) - y))
            ratio = np.where(np.isnan(error), np.inf, np.where(error == 0, 0.0, error / b))
            found = max(found, float(np.where(np.isinf(b), 0.0, ratio).max(initial=0.0)))
    return found


class Rivals:
    """What three rules of thumb say of an answer's arrays; True is a pass."""

    def __init__(self, case: Case, right: dict[str, Any], arithmetic: str) -> None:
        """Compute the reference in the same dtype: eager code that stores each step."""
        self.right, self.dtype = right, {"fp32": "float32"}.get(arithmetic, PRESETS[arithmetic].formats.output.name)
        name = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[self.dtype]
        meaning = emulated(case.call)
        if "o" in right:
            low = meaning.allowance(partial(emulate.attend, name))
            self.low = {"o": low.o, "lse": low.lse}
        else:
            verb = partial(_emulated_vjp, name)
            low = meaning.gradient_allowance(verb, case.do, case.dlse)
            self.low = {f"d{s}": x for s, x in low._asdict().items() if x is not None}

    def say(self, actual: dict[str, Any]) -> tuple[bool, bool, bool]:
        """Return each rule's word. They look at o and gradients, as the suites that use them do."""
        said = [True, True, True]
        for name, x in actual.items():
            if name == "lse":
                continue
            x, y, low = np.asarray(x, np.float64), self.right[name], self.low[name]
            with np.errstate(invalid="ignore", over="ignore"):
                apart = float(np.nan_to_num(np.abs(low - y), nan=0.0, posinf=0.0).max(initial=0.0))
                said[0] &= bool(np.allclose(x, y, atol=1e-2, rtol=0.0))
                said[1] &= bool((np.abs(x - y) <= 2 * apart).all())
                atol, rtol = DEFAULTS[self.dtype]
                said[2] &= bool(np.allclose(x, y, atol=FUDGE * max(apart, atol), rtol=rtol))
        return said[0], said[1], said[2]


def _emulated_vjp(name: str, do: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    return emulate.vjp(name, do, q, k, v, **options)


@dataclass
class Record:
    """What became of a mutant."""

    mutant: Mutant
    convicted: list[tuple[Case, float]]
    suspect: list[tuple[Case, float]]
    acquitted: list[Case]
    rivals: list[bool]


def tried(where: str) -> tuple[dict[str, Record], list[str]]:
    """Try every mutant of a sort on every case, and the correct kernel beside it, which must be acquitted."""
    records = {n: Record(m, [], [], [], [True] * 3) for n, m in MUTANTS.items() if m.where == where}
    wrong = list[str]()
    for case in cases(GIVEN[where], gradients=where == "gradients"):
        claimed = CLAIMED[where]
        if where == "gradients":
            right, bounds = case.gradients, case.gradient_bounds(tolerance, claimed)
            usual = bounds
        else:
            right, bounds = case.right, case.bounds(tolerance, claimed)
            usual = case.bounds(typical, claimed)
        rivals = Rivals(case, right, claimed)
        own = answered(kernel_of(Kernel, where), case, where)
        fair = rivals.say(own)
        if (ratio := worst(own, right, bounds)) > 1:
            wrong.append(f"the correct kernel, {case.name}, {where}: {ratio:.3g}")
        for record in records.values():
            actual = answered(kernel_of(record.mutant.kernel, where), case, where)
            if all(np.array_equal(x, own[name], equal_nan=True) for name, x in actual.items()):
                record.acquitted.append(case)
                continue
            if (ratio := worst(actual, right, bounds)) > 1:
                record.convicted.append((case, ratio))
            elif (ratio := worst(actual, right, usual)) > 1:
                record.suspect.append((case, ratio))
            else:
                record.acquitted.append(case)
            said = zip(record.rivals, rivals.say(actual), fair, strict=True)
            record.rivals = [passes and (now or not right) for passes, now, right in said]
    return records, wrong


def innocents(presets: tuple[str, ...]) -> tuple[int, list[int], list[str]]:
    """Return how many emulated kernels were tried, how many each rule failed, and those that the judge convicted."""
    count, failed, wrong = 0, [0, 0, 0], list[str]()
    for preset in presets:
        given = PRESETS[preset].formats.inputs.name
        for case in cases(given):
            bounds, rivals = case.bounds(tolerance, preset), Rivals(case, case.right, preset)
            rng = np.random.default_rng(case.seed)
            verb = partial(emulate.attend, preset, summation="tree", tile=32, rng=rng)
            if PRESETS[preset].normalise != "last":
                verb = partial(emulate.attend, preset, summation="tree", rng=rng)
            actual = emulated(case.call).allowance(verb)._asdict()
            count += 1
            if (ratio := worst(actual, case.right, bounds)) > 1:
                wrong.append(f"emulated {preset}, {case.name}: {ratio:.3g}")
            failed = [n + (not said) for n, said in zip(failed, rivals.say(actual), strict=True)]
    return count, failed, wrong


def diagnosed(record: Record, limit: int) -> list[Diagnosis]:
    """Diagnose a few of a mutant's convictions, or suspicions, from the first on."""
    found: list[Diagnosis] = []
    where, mutant = record.mutant.where, record.mutant
    failing = record.convicted or record.suspect
    for case, _ in [failing[n * len(failing) // limit] for n in range(min(limit, len(failing)))]:
        kernel = kernel_of(mutant.kernel, where)
        actual = answered(kernel, case, "o")
        if where == "gradients":
            told = answered(kernel, case, where)
            given = {name[1:]: x for name, x in told.items()}
            found.append(
                diagnose(
                    case.call,
                    HOW,
                    actual["o"],
                    actual["lse"],
                    CLAIMED[where],
                    gradients=given,
                    do=case.do,
                    dlse=case.dlse,
                )
            )
        else:
            found.append(diagnose(case.call, HOW, actual["o"], actual["lse"], CLAIMED[where]))
    return found


def main() -> int:
    """Print the three tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one diagnosis a mutant, and one preset of innocents")
    quick: bool = parser.parse_args().quick
    start, wrong, records = time.monotonic(), list[str](), dict[str, Record]()
    for where in ("o", "gradients", "precision"):
        some, complaints = tried(where)
        records |= some
        wrong += complaints
    missed = [name for name, r in records.items() if not r.convicted and not r.suspect]
    print(f"{'mutant':34} {'verdict':9} {'where it shows first':38} {'error ÷ bound':>13}")
    for name, r in records.items():
        first = (r.convicted or r.suspect or [None])[0]
        verdict = "convicted" if r.convicted else "suspect" if r.suspect else "missed"
        print(f"{name:34} {verdict:9} " + (f"{first[0].name:38} {first[1]:13.3g}" if first else ""))
    print(
        f"\n{len(records)} mutants: {sum(bool(r.convicted) for r in records.values())} convicted, "
        f"{sum(not r.convicted and bool(r.suspect) for r in records.values())} suspect, {len(missed)} missed "
        f"({time.monotonic() - start:.0f} s)"
    )
    _rivals(records, wrong, ("fa2-bf16",) if quick else ("fp32", "fa2-bf16", "bf16", "fa2-fp16", "fp16"))
    _diagnoses(records, 1 if quick else DIAGNOSED)
    for line in [f"missed: {name}" for name in missed] + [f"innocent and convicted: {line}" for line in wrong]:
        print(line)
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if missed or wrong else 0


def _rivals(records: dict[str, Record], wrong: list[str], presets: tuple[str, ...]) -> None:
    count, failed, complaints = innocents(presets)
    wrong += complaints
    print(f"\n{'rule':42} {'guilty passed':>14} {'innocent failed':>16}")
    passed = [sum(not r.convicted for r in records.values())]
    passed += [sum(r.rivals[n] for r in records.values()) for n in range(3)]
    for rule, guilty, innocent in zip(RULES, passed, [len(complaints), *failed], strict=True):
        print(f"{rule:42} {guilty:6} of {len(records):4} {innocent:8} of {count:4}")


def _diagnoses(records: dict[str, Record], limit: int) -> None:
    kinds = sorted({m.kind for m in MUTANTS.values()})
    rng, right = np.random.default_rng(0), {False: np.zeros(4), True: np.zeros(4)}
    seconds: list[float] = []
    print(f"\n{'mutant':34} {'its class':20} what the diagnosis names")
    for name, r in records.items():
        began, kind = time.monotonic(), r.mutant.kind
        found = diagnosed(r, limit)
        seconds.append((time.monotonic() - began) / max(len(found), 1))
        named = shared(found)
        place = isolated([c.call for c, _ in r.convicted], [c.call for c in r.acquitted])
        prefix = "backward " if r.mutant.where == "gradients" else ""
        alone = named or (() if place is None else (prefix + place[0],))
        chance = np.mean(
            [kind in rng.choice(kinds, min(max(len(named), 1), len(kinds)), replace=False) for _ in range(100)]
        )
        right[r.mutant.held_out] += [named[:1] == (kind,), alone[:1] == (kind,), chance, 1]
        mark = "" if named[:1] == (kind,) else "  *" if alone[:1] == (kind,) else "  (another)" if alone else ""
        said = ", ".join(named[:3]) or (
            "nothing known" if place is None else f"nothing known; wrong only where {place[1]}"
        )
        print(f"{name:34} {kind:20} {said}{mark}{' (held out)' if r.mutant.held_out else ''}")
    for held, (first, where, chance, n) in right.items():
        if n:
            words = "held out: written after the search was done" if held else "mutants"
            print(f"\n{words}: {n:.0f}")
            print(f"  the search names the class first      {first:4.0f} ({first / n:.0%})")
            print(f"  with what wrong answers share (*)     {where:4.0f} ({where / n:.0%})")
            print(f"  as many random labels have it         {chance:4.1f} ({chance / n:.0%})")
    print(f"seconds a diagnosis: median {np.median(seconds):.2f}, longest {max(seconds):.2f}")


if __name__ == "__main__":
    sys.exit(main())
