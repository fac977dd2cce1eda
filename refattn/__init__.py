"""refattn: the numerical oracle for attention.

The right answer, how far another may be from it (proved), and why. Every attention is a module and the verbs are the
same everywhere: ``attend``, ``weights``, ``vjp``, ``bound``, ``draw``, ``cost``, and ``step`` where there is a state.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from refattn import bias, blocks, dropped, engines, heads, masks, method, partial, perturbation, rounding, softmax
from refattn.engines import Backend, Unsupported

if TYPE_CHECKING:
    from refattn import kernel, lowrank, memory, sparse

__all__ = [
    "Backend",
    "Unsupported",
    "bias",
    "blocks",
    "dropped",
    "engines",
    "heads",
    "kernel",
    "lowrank",
    "masks",
    "memory",
    "method",
    "partial",
    "perturbation",
    "rounding",
    "softmax",
    "sparse",
]
__version__ = "0.1.0"

_FAMILIES = ("kernel", "lowrank", "memory", "sparse")


def __getattr__(name: str) -> ModuleType:
    """Import a family when it is asked for: who needs one method does not wait for all."""
    if name in _FAMILIES:
        return importlib.import_module(f"refattn.{name}")
    raise AttributeError(f"module 'refattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
