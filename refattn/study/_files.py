"""Files of arrays: .npz, .npy and .safetensors, told apart by how they begin. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from refattn._need import need

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"} | {
    f"{letter.upper()}{8 * size}": f"<{letter}{size}" for letter in "iu" for size in (1, 2, 4, 8)
}
"""The names that safetensors and NumPy have for the same numbers."""


class Stored(NamedTuple):
    """A file's arrays: their names, how to get one, and how to get what it calls an axis, or None."""

    names: Sequence[str]
    array: Callable[[str], NDArray[Any]]
    labels: Callable[[str], Any]


@contextmanager
def opened(path: str | os.PathLike[str]) -> Generator[Stored]:
    """Open a file, whatever its kind; an array is read when it is asked for."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"the file cannot be opened: {error.strerror or error}") from None
    with file:
        try:
            start = file.read(9)
            file.seek(0)
        except OSError as error:
            raise ValueError(f"the file cannot be read: {error.strerror or error}") from None
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            yield _npz(file)
        elif start.startswith(b"\x93NUMPY"):
            yield _npy(file)
        elif start[8:] == b"{" or os.fspath(path).endswith(".safetensors"):  # after the header's length
            yield _safetensors(file, os.fspath(path))
        else:
            raise ValueError("the file is no .npz, .npy or .safetensors, or is truncated")


def _npz(file: BinaryIO) -> Stored:
    try:
        stored: Any = np.load(file, allow_pickle=False)
    except Exception:  # whatever NumPy and the archive's decoders raise
        raise ValueError("the file is not an .npz archive, or is truncated") from None
    names: list[str] = stored.files

    def array(name: str) -> NDArray[Any]:
        return _held(name, lambda: stored[name])

    def labels(name: str) -> Any:
        return array(name).tolist() if name in names else None

    return Stored(names, array, labels)


def _npy(file: BinaryIO) -> Stored:
    x = _held("the array", lambda: np.load(file, allow_pickle=False))
    if x.ndim < 3 or len(x) != 3:
        raise ValueError(f"the file holds one array, of shape {x.shape}; expected (3, ..., T, D), q, k and v stacked")

    def labels(name: str) -> None:
        return None

    return Stored(tuple("qkv"), dict(zip("qkv", x, strict=True)).__getitem__, labels)


def _held(name: str, get: Callable[[], Any]) -> NDArray[Any]:
    try:
        x = get()
    except MemoryError:
        raise ValueError(f"{name} is too large for this machine's memory") from None
    except Exception as error:  # whatever NumPy and the archive's decoders raise, such as tokenize.TokenError
        if "allow_pickle" in str(error):
            raise TypeError(f"{name} holds Python objects (it may be ragged), which are never unpickled") from None
        raise ValueError(f"{name} cannot be read; the file is truncated or damaged") from None
    if not isinstance(x, np.ndarray):
        raise ValueError(f"{name} is not an array")
    return cast("NDArray[Any]", x)


def _safetensors(file: BinaryIO, path: str) -> Stored:
    library = need("safetensors")
    try:
        with library.safe_open(path, "np") as whole:
            names: list[str] = whole.keys()
            metadata: dict[str, str] = whole.metadata() or {}
    except library.SafetensorError:
        raise ValueError("the file is not in the format of safetensors, or is truncated") from None

    @cache  # on the first call, so that a file without q, k and v is never read
    def tensors() -> dict[str, Mapping[str, Any]]:
        return dict(library.deserialize(file.read()))

    def array(name: str) -> NDArray[Any]:
        return _tensor(name, **tensors()[name])

    def labels(name: str) -> Any:
        try:
            return json.loads(metadata[name]) if name in metadata else None
        except (ValueError, RecursionError):
            raise ValueError(f"{name} of the file's metadata is not JSON; expected a list") from None

    return Stored(names, array, labels)


def _tensor(name: str, *, dtype: str, shape: Sequence[int], data: bytes) -> NDArray[Any]:
    if dtype == "BF16":  # NumPy has none: it is the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        expected = "real numbers (float16, bfloat16, float32, float64, int)"
        raise TypeError(f"{name} has dtype {dtype} of safetensors; expected {expected}")
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
