"""refattn: the numerical oracle for attention.

The right answer, how far another may be from it (proved), and why. Every attention is a module and the verbs are the
same everywhere: ``attend``, ``weights``, ``vjp``, ``bound``, ``draw``, ``cost``, and ``step`` where there is a state.
"""

from refattn import (
    bias,
    dropped,
    engines,
    heads,
    kernel,
    lowrank,
    masks,
    memory,
    method,
    partial,
    perturbation,
    rounding,
    softmax,
    sparse,
)
from refattn.engines import Backend, Unsupported

__all__ = [
    "Backend",
    "Unsupported",
    "bias",
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
