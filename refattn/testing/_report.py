"""The report of the conformance kit: capabilities × verdicts, as text and as a page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.conventions import Call, Returned
from refattn.testing._verdicts import INNOCENT, KINDS, Verdict, worst


@dataclass(frozen=True, eq=False)
class Result:
    """One verdict, with what was asked.

    Parameters
    ----------
    configuration, capability
        Names.
    asked
        "forward" or "gradients".
    verdict
        What the judge says.
    call
        The problem, to ask it again; of drawn problems the smallest that fails.
    seed
        What draws it again.
    answer
        What was answered, where it is wrong.
    """

    configuration: str
    capability: str
    asked: str
    verdict: Verdict
    call: Call | None
    seed: int
    answer: Returned | None = None

    def __str__(self) -> str:
        """Return the verdict under its name."""
        said = str(self.verdict).replace("\n", "\n    ")
        return f"{self.configuration}, {self.asked}: {said}"


@dataclass(frozen=True, eq=False)
class Report:
    """What `refattn.testing.check` found.

    Parameters
    ----------
    function, profile, arithmetic, seed
        What was asked.
    results
        Every verdict.
    diagnosis
        What explains the most wrong answers.
    notes
        What could not be done.
    seconds
        How long it took.
    """

    function: str
    profile: str
    arithmetic: str
    seed: int
    results: tuple[Result, ...]
    diagnosis: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no verdict is a fault."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Result, ...]:
        """The verdicts that are faults, each with the call to replay it."""
        return tuple(one for one in self.results if one.verdict.kind not in INNOCENT)

    @property
    def suspect(self) -> tuple[Result, ...]:
        """The answers within what is proved but beyond what is usual."""
        return tuple(one for one in self.results if one.verdict.kind == "suspect")

    @property
    def smallest(self) -> Result | None:
        """The fault of the smallest problem."""
        return min((one for one in self.wrong if one.call is not None), key=_size, default=None)

    @property
    def capabilities(self) -> dict[str, Counter[str]]:
        """For each capability, forward and gradients apart, how many verdicts of each kind."""
        found: dict[str, Counter[str]] = {}
        for one in self.results:
            name = one.capability if one.asked == "forward" else f"{one.capability}, gradients"
            found.setdefault(name, Counter())[one.verdict.kind] += 1
        return found

    @property
    def headline(self) -> str:
        """The answer in a sentence."""
        counts = Counter(one.verdict.kind for one in self.results)
        gaps = f"; {counts['unsupported']} not supported" if counts["unsupported"] else ""
        if self.wrong:
            kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items() if kind not in INNOCENT)
            return f"{self.function} is wrong on {len(self.wrong)} of {len(self.results)} ({kinds}){gaps}"
        if not counts["right"] and not counts["suspect"]:
            return f"{self.function} answered nothing that could be judged{gaps}"
        if self.suspect:
            return f"nothing is proved wrong with {self.function}; {len(self.suspect)} are suspect{gaps}"
        return f"{self.function} is right on all {counts['right']} that it answers{gaps}"

    def __str__(self) -> str:
        """Return the table, the headline, then each fault; what explains the smallest stands last."""
        lines = [f"{self.function} as {self.profile} in {self.arithmetic}, seed {self.seed}: {self.seconds:.0f} s", ""]
        rows = [(name, *self._row(name)) for name in self.capabilities]
        width = max((len(name) for name, *_ in rows), default=0)
        lines += [f"  {name:<{width}}  {verdict}{more}".rstrip() for name, verdict, more in rows]
        lines += ["", *(f"note: {note}" for note in self.notes), self.headline]
        for one in (*self.suspect, *self.wrong):
            lines += ["", str(one), f"    replay: {self.replay(one)}"]
        smallest = self.smallest
        if smallest is not None and smallest.call is not None:
            lines += ["", f"the smallest problem that fails: {described(smallest.call)}"]
        lines += [self.diagnosis] if self.diagnosis else []
        return "\n".join(lines)

    def replay(self, one: Result) -> str:
        """Return the call that asks one thing again."""
        return (
            f"check({self.function!r}, {self.profile!r}, {self.arithmetic!r}, seed={one.seed}, "
            f"only=[{one.configuration!r}])"
        )

    def _row(self, name: str) -> tuple[str, str]:
        counts = self.capabilities[name]
        kind, total = worst(counts), sum(counts.values())
        many = f" {counts[kind]} of {total}" if total > 1 else ""
        own = [one for one in self.results if _under(one) == name]
        ratios = [one.verdict.ratio for one in own if one.verdict.parts and one.verdict.kind in ("right", "suspect")]
        largest = f", error ÷ bound ≤ {max(ratios):.2g}" if ratios and kind in ("right", "suspect") else ""
        return kind + many, largest

    def _repr_html_(self) -> str:
        from refattn.testing._page import fragment

        return fragment(self)

    def to_html(self, path: Any, *, command: str | None = None) -> None:
        """Write one page that needs nothing else.

        Raises
        ------
        ImportError
            Without Jinja2: the message has the pip line.
        """
        from refattn.testing._page import page

        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(page(self, command))


def _under(one: Result) -> str:
    return one.capability if one.asked == "forward" else f"{one.capability}, gradients"


def _size(one: Result) -> tuple[float, int]:
    call = one.call
    assert call is not None
    return float(sum(np.size(x) for x in (call.q, call.k, call.v))), KINDS.index(one.verdict.kind)


def described(call: Call) -> str:
    """Return a call in one line: shapes, and numbers where they are few.

    >>> x = np.ones((1, 1, 1, 1))
    >>> described(Call(q=x, k=x, v=x, causal=True))
    'q=[[[[1.0]]]], k=[[[[1.0]]]], v=[[[[1.0]]]], causal=True'
    """
    parts: list[str] = []
    for name in (field.name for field in fields(Call)):
        x: Any = getattr(call, name)
        if x is None or x is False:
            continue
        if isinstance(x, np.ndarray):
            array: NDArray[Any] = x  # pyright: ignore[reportUnknownVariableType]
            shown = str(array.astype(np.float64).tolist() if array.dtype.kind not in "iub" else array.tolist())
            x = shown if array.size <= 8 else f"array{array.shape}"
        elif name == "starts":
            x = tuple(np.asarray(y).tolist() for y in x)
        parts.append(f"{name}={x}")
    return ", ".join(parts)
