"""Reading q, k and v from .npz files: whatever is wrong with one is said in one sentence."""

from __future__ import annotations

from importlib import resources
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import _check


class Capture(NamedTuple):
    """Queries (..., T, D), keys (..., S, D) and values (..., S, E), as stored."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]


_AXES = {"q": "T D", "k": "S D", "v": "S E"}


def read(path: str | PathLike[str]) -> Capture:
    """Read q, k and v from an .npz file; other arrays in it are ignored, and nothing in it is ever unpickled.

    Raises
    ------
    ValueError, TypeError
        A file that is missing, truncated or no .npz; an array that is missing, ragged, not of finite real numbers,
        or of the wrong rank. One sentence, which names the argument.

    Examples
    --------
    >>> from refattn import study
    >>> study.read("nowhere.npz")
    Traceback (most recent call last):
    ValueError: the file cannot be opened: No such file or directory
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"the file cannot be opened: {error.strerror or error}") from None
    with file:
        try:
            stored = np.load(file, allow_pickle=False)
        except Exception:  # whatever NumPy and the archive's decoders raise, such as tokenize.TokenError
            raise ValueError("the file is not an .npz archive, or is truncated") from None
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("the file holds one array; expected an .npz archive of q, k and v")
        missing = [name for name in _AXES if name not in stored.files]
        if missing:
            held = ", ".join(stored.files[:8]) or "nothing"
            raise ValueError(f"{missing[0]} is missing; expected q, k and v, and the file holds {held}")
        return Capture(*(_array(stored, name, axes) for name, axes in _AXES.items()))


def sample() -> Capture:
    """Return the small real capture that the package ships: two layers of two heads, 304 tokens, D = E = 32.

    Its provenance and licence stand beside it, in ``sample.md``.

    >>> from refattn import study
    >>> study.sample().q.shape
    (2, 2, 304, 32)
    """
    with resources.as_file(resources.files("refattn.study") / "sample.npz") as path:
        return read(path)


def _array(stored: Any, name: str, axes: str) -> NDArray[Any]:
    try:
        try:
            x = stored[name]
        except MemoryError:
            raise
        except Exception as error:
            if "allow_pickle" in str(error):
                raise TypeError(f"{name} holds Python objects (it may be ragged); expected real numbers") from None
            raise ValueError(f"{name} cannot be read; the file is truncated or damaged") from None
        if not isinstance(x, np.ndarray):
            raise ValueError(f"{name} is not an array")
        return finite(name, x, axes)
    except MemoryError:
        raise ValueError(f"{name} is too large for this machine's memory") from None


def finite(name: str, value: Any, axes: str) -> NDArray[Any]:
    """Return an array of finite real numbers with these trailing axes."""
    x = _check.array(name, value, axes)
    bad = ~np.isfinite(x.astype(np.float64))
    if bad.any():
        at = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name} holds {x[bad][0]} at [{at}] ({int(bad.sum())} such); expected finite numbers")
    return x
