"""What a file of this room offers about its library, beside the library's own functions.

A library's file has the library's functions with its own argument names, order and defaults, each of which reads its
arguments into a `Call` and answers it under the library's `Convention`. Its `PROFILES` say the same to programs: how a
call is written in the library's words, and how what the library returns is read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from refattn.conventions._meaning import Call, Convention

LIBRARIES = (
    "cudnn",
    "flash_attn",
    "flashinfer",
    "jax",
    "mlx",
    "onnx",
    "torch",
    "transformer_engine",
    "transformers",
    "x_transformers",
    "xformers",
)


class Written(NamedTuple):
    """A call in a library's words: positional arguments and keyword arguments, arrays as NumPy's."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Returned(NamedTuple):
    """What a library returned, heads before tokens: o, and lse or None."""

    o: Any
    lse: Any


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One function of a library, to programs.

    Parameters
    ----------
    name
        The library, with a variant after a slash where it disagrees with itself: ``"flash_attn/fa2"``.
    function
        The library's function as this room has it: it answers ``function(*written.args, **written.kwargs)``.
    convention
        What the library means.
    write
        The call in the library's words; raises `refattn.Unsupported`, with the reason, where it has none for it.
    read
        What was returned, with the call that was written: `Returned`, in the layout of a `Call`.
    framework
        Whose arrays the library takes: "numpy", "torch", "jax", "mlx", "cupy".
    sources
        For each axis of `Convention`: "library" where it was run, or the named source, or "not checked".

    Examples
    --------
    >>> profile("torch").convention.rows
    'top-left'
    """

    name: str
    function: Callable[..., Any]
    convention: Convention
    write: Callable[[Call], Written]
    read: Callable[[Any, Call], Returned]
    framework: str
    sources: Mapping[str, str] = field(default_factory=dict[str, str])


def profile(name: str) -> Profile:
    """Return a profile by name, such as "torch" or "flash_attn/fa3"; the library alone names its first.

    Raises
    ------
    ValueError
        An unknown name: the message lists those that exist.
    """
    library = name.split("/")[0]
    if library not in LIBRARIES:
        raise ValueError(f"profile is {name!r}; expected one of {', '.join(map(repr, LIBRARIES))}")
    known: dict[str, Profile] = importlib.import_module(f"refattn.conventions.{library}").PROFILES
    if name == library:
        return next(iter(known.values()))
    if name not in known:
        raise ValueError(f"profile is {name!r}; expected one of {', '.join(map(repr, known))}")
    return known[name]
