"""Reading q, k and v, and what their axes are called: whatever is wrong with a file is said in one sentence."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from os import PathLike
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from refattn import _check
from refattn.heads import leads
from refattn.study._files import Stored, opened


class Capture(NamedTuple):
    """Queries (..., T, D), keys (..., S, D) and values (..., S, E), as stored, and labels where the file has some.

    `tokens` has the text of each key, and of each row where T = S; `layers` a label for each entry of the first of at
    least two leading axes.
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    tokens: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None


_AXES = {"q": "T D", "k": "S D", "v": "S E"}


def read(path: str | PathLike[str]) -> Capture:
    """Read q, k and v from an .npz, .safetensors or .npy file; nothing in it is ever unpickled.

    The first two hold arrays named q, k and v, or ``<label>.q``, ``<label>.k`` and ``<label>.v`` for each layer, of
    one shape: these are stacked in the natural order of the labels, 2 before 10. An .npy file holds q, k and v stacked,
    (3, ..., T, D). The bfloat16 of safetensors is widened to float32, exactly.

    `tokens` (a string for each key) and `layers` (an integer or string for each entry of the first leading axis, of
    two or more) are arrays of an .npz file, and JSON lists in the metadata of a .safetensors file. All else in a file
    is ignored.

    Raises
    ------
    ValueError, TypeError
        A file that is missing, truncated or of another kind; an array that is missing, ragged, not of finite real
        numbers, or of the wrong rank; layers of different shapes; labels that do not fit. One sentence, which names
        the argument.
    ImportError
        A .safetensors file without the package safetensors.

    Examples
    --------
    >>> from refattn import study
    >>> study.read("nowhere.npz")
    Traceback (most recent call last):
    ValueError: the file cannot be opened: No such file or directory
    """
    with opened(path) as stored:
        prefixes = _prefixes(stored.names)
        q, k, v = _layered(stored, prefixes) if prefixes else (_array(stored, name, name) for name in _AXES)
        tokens = _labels("tokens", stored, (str,), k.shape[-2], "one for each key")
        if prefixes:
            if stored.labels("layers") is not None:
                raise ValueError(f"layers is given beside {prefixes[0]}.q, which names its layer; leave one out")
            return Capture(q, k, v, tokens, tuple(prefixes))
        lead = leads({"q": q.shape[:-2]}, {"k": k.shape[:-2], "v": v.shape[:-2]}).shape
        layers = _labels("layers", stored, (str, int), lead[0] if len(lead) > 1 else None, "one for each layer")
        return Capture(q, k, v, tokens, layers)


def sample() -> Capture:
    """Return the small real capture that the package ships: two layers of two heads, 304 tokens, D = E = 32.

    Its provenance and licence stand beside it, in ``sample.md``.

    >>> from refattn import study
    >>> study.sample().q.shape
    (2, 2, 304, 32)
    """
    with resources.as_file(resources.files("refattn.study") / "sample.npz") as path:
        return read(path)


def finite(name: str, value: Any, axes: str) -> NDArray[Any]:
    """Return an array of finite real numbers with these trailing axes."""
    x = _check.array(name, value, axes)
    bad = ~np.isfinite(x.astype(np.float64))
    if bad.any():
        at = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name} holds {x[bad][0]} at [{at}] ({int(bad.sum())} such); expected finite numbers")
    return x


def _prefixes(names: Sequence[str]) -> list[str]:
    """Return the labels of layers that are stored one by one, or none; refuse a file that lacks an array."""
    whole = [name for name in _AXES if name in names]
    parts = [name.rpartition(".") for name in names]
    labels = sorted({label for label, _, name in parts if label and name in _AXES}, key=_natural)
    if not labels:
        for name in _AXES:
            if name not in whole:
                held = ", ".join(names[:8]) or "nothing"
                raise ValueError(f"{name} is missing; expected q, k and v, and the file holds {held}")
    for label in labels:
        have = [name for name in _AXES if f"{label}.{name}" in names]
        if whole:
            raise ValueError(
                f"{label}.{have[0]} is there beside {whole[0]}; expected layers one by one, or in one array"
            )
        for name in _AXES:
            if name not in have:
                raise ValueError(f"{label}.{name} is missing; expected q, k and v of every layer")
    return labels


def _natural(label: str) -> tuple[list[Any], str]:
    parts = re.split("([0-9]+)", label)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], label


def _layered(stored: Stored, labels: Sequence[str]) -> Iterator[NDArray[Any]]:
    """Yield q, k and v of layers that are stored one by one: layers become the first axis, before that of heads."""
    arrays = [_stacked(stored, labels, name) for name in _AXES]
    axes = max(4, *(x.ndim for x in arrays))
    return (x.reshape(len(x), *(axes - x.ndim) * (1,), *x.shape[1:]) for x in arrays)


def _stacked(stored: Stored, labels: Sequence[str], name: str) -> NDArray[Any]:
    parts: list[NDArray[Any]] = []
    for label in labels:
        x = _array(stored, f"{label}.{name}", name)
        if parts and x.shape != parts[0].shape:
            raise ValueError(
                f"{label}.{name} has shape {x.shape}; expected {parts[0].shape}, as {labels[0]}.{name} has"
            )
        parts.append(x)
    with _room(name):
        return np.stack(parts)


def _array(stored: Stored, stored_as: str, name: str) -> NDArray[Any]:
    with _room(stored_as):
        return finite(stored_as, stored.array(stored_as), _AXES[name])


@contextmanager
def _room(name: str) -> Generator[None]:
    try:
        yield
    except MemoryError:
        raise ValueError(f"{name} is too large for this machine's memory") from None


def _labels(name: str, stored: Stored, kinds: tuple[type, ...], count: int | None, each: str) -> tuple[str, ...] | None:
    with _room(name):
        value = stored.labels(name)
    if value is None:
        return None
    words = " or ".join({str: "strings", int: "integers"}[kind] for kind in kinds)
    if not isinstance(value, list):
        raise TypeError(f"{name} is {value!r:.60}; expected {words}, {each}")
    items = cast("list[Any]", value)
    for item in items:
        if type(item) not in kinds:
            raise TypeError(f"{name} holds {item!r:.60}; expected {words}, {each}")
    if count is None:
        raise ValueError(f"{name} is given, and q, k and v have no axis of layers before that of heads; leave it out")
    if len(items) != count:
        raise ValueError(f"{name} has {len(items)} entries; expected {count}, {each}")
    return tuple(map(str, items))
