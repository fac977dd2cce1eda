"""What a judge says: verdicts, and in words where failures lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = (
    "right",
    "unsupported",
    "does not hold",
    "suspect",
    "wrong",
    "non-finite",
    "wrong shape",
    "wrong dtype",
    "wrong device",
    "wrote to its inputs",
    "returned the same buffer twice",
    "raised",
    "hung",
    "crashed",
)
"""From the best to the worst: what follows "suspect" is a fault, and "does not hold" is said of what none promises."""
INNOCENT = KINDS[: KINDS.index("suspect") + 1]
TILES = (128, 64, 32, 16)


@dataclass(frozen=True)
class Part:
    """One array that was judged: o, lse, or a gradient.

    Parameters
    ----------
    name
        "o", "lse", "dq", …
    kind
        "right", "suspect", "wrong" or "non-finite".
    ratio
        The largest error ÷ proved bound.
    usual
        The largest error ÷ what is typical; NaN where that was not asked.
    said
        What is wrong with it, in sentences; empty where nothing is.
    unjudged
        How many of its elements nothing is promised of.
    """

    name: str
    kind: str
    ratio: float
    usual: float = math.nan
    said: tuple[str, ...] = ()
    unjudged: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    Parameters
    ----------
    kind
        One of `KINDS`.
    parts
        What was compared, each with its largest error ÷ bound.
    said
        What is wrong, in sentences.
    diagnosis
        What would explain it, as printed; empty where nothing is wrong or nobody asked.
    notes
        What the judge could not do.

    Examples
    --------
    >>> Verdict("raised", said=("ValueError: head size 5",)).ok
    False
    """

    kind: str
    parts: tuple[Part, ...] = ()
    said: tuple[str, ...] = ()
    diagnosis: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing is at fault; a suspect is none."""
        return self.kind in INNOCENT

    @property
    def ratio(self) -> float:
        """The largest error ÷ proved bound of all parts."""
        return max((part.ratio for part in self.parts), default=0.0)

    def __str__(self) -> str:
        """Return the kind, what was measured, what is wrong and what explains it, a line each."""
        measured = ", ".join(f"{part.name} {part.ratio:.3g}" for part in self.parts)
        first = self.kind + (f" (largest error ÷ bound: {measured})" if measured else "")
        return "\n".join([first, *self.said, *filter(None, [self.diagnosis]), *self.notes])


def worst(kinds: Any) -> str:
    """Return the worst of some kinds; "right" of none.

    >>> worst(["right", "wrong", "suspect"])
    'wrong'
    """
    return max(kinds, key=KINDS.index, default="right")


def places(bad: NDArray[np.bool_], axes: str, seen: NDArray[np.intp] | None = None) -> list[str]:
    """Say where elements fail: in which batches, heads, rows, columns, tiles, or beyond how many keys.

    Parameters
    ----------
    bad
        Which elements fail.
    axes
        The last axes in words, such as "head row column"; what comes before is "batch".
    seen
        How many keys each row sees, of the leading axes and rows of `bad`.

    Examples
    --------
    >>> bad = np.zeros((2, 100, 4), bool)
    >>> bad[1, 64:] = True
    >>> places(bad, "head row column")
    ['only in head 1 of 2', 'only in rows from 64 on, which is the last tile of 64']
    """
    names = axes.split()[-bad.ndim :] if bad.ndim else []
    names = ["batch"] * (bad.ndim - len(names)) + names
    found: list[str] = []
    for axis, name in enumerate(names):
        others = tuple(a for a in range(bad.ndim) if a != axis)
        fails = np.asarray(bad.any(axis=others))
        if fails.size > 1 and fails.any() and not fails.all():
            found.append(f"only in {_which(name, fails)}")
    if seen is not None and "row" in names:
        rows = bad.any(axis=-1) if names[-1] == "column" else bad
        counts = np.broadcast_to(seen, rows.shape)
        if rows.any() and not rows.all() and counts[rows].min() > counts[~rows].max():
            found.append(f"in all rows that see more than {int(counts[~rows].max())} keys, and in no other")
    return found


def _which(name: str, fails: NDArray[np.bool_]) -> str:
    at, size = np.flatnonzero(fails), fails.size
    first, last = int(at[0]), int(at[-1])
    if len(at) == 1:
        return f"{name} {first} of {size}"
    if len(at) < last - first + 1:
        steps = np.unique(np.diff(at))
        if len(steps) == 1:
            return f"every {int(steps[0])}th {name} from {first}"
        few = ", ".join(map(str, at[:8])) + (", …" if len(at) > 8 else "")
        return f"{_plural(name)} {few} of {size}"
    if last == size - 1:
        tile = next((n for n in TILES if size > n and first == (size - 1) // n * n), None)
        return f"{_plural(name)} from {first} on" + (f", which is the last tile of {tile}" if tile else "")
    if first == 0:
        return f"{_plural(name)} up to {last}"
    tile = next((n for n in TILES if first % n == 0 and last - first + 1 == n), None)
    return f"{_plural(name)} {first} to {last}" + (f", which is a tile of {tile}" if tile else "")


def _plural(name: str) -> str:
    return name + ("es" if name == "batch" else "s")
