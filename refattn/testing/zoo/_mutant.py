"""What a mutant is: a kernel with one step gone wrong, its name, and the class of bugs that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from refattn.testing.zoo.kernel import Kernel

Seen = Literal["o", "gradients", "precision"]
K = TypeVar("K", bound=type[Kernel])


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Parameters
    ----------
    name
        Its name, in words.
    kind
        The class of bugs that a diagnosis should name.
    kernel
        The kernel that has it.
    doc
        What is wrong, in a sentence.
    where
        Where it shows: in o or lse; in gradients; or in the precision of a kernel that claims ``fa2-bf16``.
    held_out
        Whether it was written after the diagnosis was done.
    """

    name: str
    kind: str
    kernel: type[Kernel]
    doc: str
    where: Seen
    held_out: bool


MUTANTS: dict[str, Mutant] = {}
"""All mutants by name."""


def mutant(kind: str, where: Seen = "o", *, held_out: bool = False) -> Callable[[K], K]:
    """Enter a kernel as a mutant, named for its class."""

    def enter(kernel: K) -> K:
        name = re.sub(r"(?<!^)(?=[A-Z])", " ", kernel.__name__).lower()
        MUTANTS[name] = Mutant(name, kind, kernel, (kernel.__doc__ or "").strip(), where, held_out)
        return kernel

    return enter
