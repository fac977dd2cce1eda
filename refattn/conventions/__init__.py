"""Attention as libraries mean it: one file a library, its own functions in its own words, answered by the definition.

>>> import numpy as np
>>> from refattn import conventions as like
>>> x = np.ones((1, 1, 2, 4))
>>> like.torch.scaled_dot_product_attention(x, x, x, is_causal=True).shape
(1, 1, 2, 4)
"""

import importlib
from types import ModuleType

from refattn.conventions._meaning import AXES, Answer, Call, Convention, Meaning, neighbours
from refattn.conventions._profile import LIBRARIES, Profile, Returned, Written, profile

__all__ = [
    "AXES",
    "Answer",
    "Call",
    "Convention",
    "LIBRARIES",
    "Meaning",
    "Profile",
    "Returned",
    "Written",
    "neighbours",
    "profile",
]


def __getattr__(name: str) -> ModuleType:
    """Import a library's file when it is asked for."""
    if name in LIBRARIES:
        return importlib.import_module(f"refattn.conventions.{name}")
    raise AttributeError(f"module 'refattn.conventions' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LIBRARIES})
