"""Arguments are checked here, before any work, and refused in one sentence that names them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from refattn.lifted import Lifted

_EXACT_INTEGERS = 2**53
WEIGHTS: Any = object()


def array(name: str, value: Any, axes: str) -> NDArray[Any]:
    """Return `value` as an array of real numbers with at least the named trailing axes.

    An array keeps its dtype: engines decide what to compute in. An `Lifted` passes through, so that the
    verbs' own code runs in it.
    """
    ndim = len(axes.split())
    if isinstance(value, Lifted):
        if value.ndim != ndim:
            raise ValueError(f"{name} has shape {value.shape}; another arithmetic takes exactly ({axes})")
        return cast("NDArray[Any]", value)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored; pass its data, and its mask as mask=…")
    try:
        x = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is ragged: {error}") from None
    if x.dtype.kind not in "fiu" and x.dtype.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raise TypeError(f"{name} has dtype {x.dtype}; expected real numbers (float16, bfloat16, float32, float64, int)")
    if x.dtype.kind == "f" and x.dtype.itemsize > 8:
        raise TypeError(f"{name} has dtype {x.dtype}; wider than float64, so it would be rounded: cast it yourself")
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8 and x.size and max(-int(x.min()), int(x.max())) > _EXACT_INTEGERS:
        raise ValueError(f"{name} holds integers beyond 2**53, which float64 cannot represent exactly")
    if x.ndim < ndim:
        raise ValueError(f"{name} has shape {x.shape}; expected at least {ndim} axes: (..., {axes.replace(' ', ', ')})")
    return x


def qkv(q: Any, k: Any, v: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Check queries, keys and values; with v = `WEIGHTS`, what is asked for is the weights.

    Other arithmetics get the weights as the answer to v = I; float64 has them at hand and needs no values.
    """
    q = array("q", q, "T D")
    if v is WEIGHTS:
        v = k.lift(np.eye(k.shape[-2])) if isinstance(k, Lifted) else array("k", k, "S D")[..., :0]
    k, v = array("k", k, "S D"), array("v", v, "S E")
    if q.shape[-1] < 1:
        raise ValueError("q has depth D = 0; expected at least 1")
    size("k", k.shape[-1], q.shape[-1], "D", "q")
    size("v", v.shape[-2], k.shape[-2], "S", "k")
    return q, k, v


def lengths(q: Any, k: Any) -> tuple[int, int]:
    """Return T and S, of queries and keys that may not fit each other yet."""
    return int(array("q", q, "T D").shape[-2]), int(array("k", k, "S D").shape[-2])


def positions(name: str, value: Any, S: int) -> NDArray[np.int64]:
    """Return positions on the key axis, each below S."""
    if np.ndim(value) != 1:
        raise TypeError(f"{name} is {value!r}; expected a sequence of positions")
    for x in value:
        if integer(name, x, 0) >= S:
            raise ValueError(f"{name} holds {x}; expected positions below S = {S}")
    return np.asarray(value, np.int64)


def shaped(name: str, value: Any, axes: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Check an array whose whole shape is known, such as a cotangent."""
    x = array(name, value, axes)
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; expected {shape}")
    return x


def sizes(*values: int) -> None:
    """Check T, S, D and E, given as numbers."""
    for name, value in zip("TSDE", values, strict=True):
        integer(name, value, 0)


def widened(x: NDArray[Any]) -> NDArray[Any]:
    """Return an array in float64, exactly; another arithmetic as it is."""
    return x if isinstance(x, Lifted) else np.asarray(x, np.float64)


def size(name: str, got: int, expected: int, axis: str, like: str) -> None:
    """Refuse arrays whose axes of one letter differ."""
    if got != expected:
        raise ValueError(f"{name} has {axis} = {got}; expected {expected}, as {like} has")


def scale(value: float | None, depth: int) -> float:
    """Return the scale of the logits: 1/√D unless given."""
    if value is None:
        return 1.0 / math.sqrt(depth)
    return finite("scale", value)


def finite(name: str, value: Any) -> float:
    """Return a finite real number as a float."""
    if isinstance(value, (bool, np.bool_, str, bytes, complex)) or np.ndim(value) != 0:
        raise TypeError(f"{name} is {value!r}; expected a real number")
    try:
        x = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; expected a real number") from None
    except OverflowError:
        raise ValueError(f"{name} is beyond the range of float64; expected a finite number") from None
    if not math.isfinite(x):
        raise ValueError(f"{name} is {x}; expected a finite number")
    return x


def positive(name: str, value: Any) -> float:
    """Return a finite number above zero."""
    x = finite(name, value)
    if x <= 0:
        raise ValueError(f"{name} is {x}; expected a number above 0")
    return x


def integer(name: str, value: Any, least: int) -> int:
    """Return an integer that is at least `least`."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    try:
        n = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an integer") from None
    if n < least:
        raise ValueError(f"{name} is {n}; expected at least {least}")
    return n


def parts(name: str, value: Any, length: int) -> list[int]:
    """Return the sizes of the parts into which an axis is cut: an integer's worth each, or those of a sequence.

    Of an integer the last part may be shorter; a sequence has to sum to the axis's length.
    """
    if not (isinstance(value, Sequence) or getattr(value, "ndim", 0)):
        size = integer(name, value, 1)
        return [min(size, length - start) for start in range(0, length, size)]
    sizes = [integer(name, n, 1) for n in cast("Sequence[Any]", value)]
    if sum(sizes) != length:
        raise ValueError(f"{name} sums to {sum(sizes)}; expected {length}, the number of keys")
    return sizes


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
    return value


def probability(name: str, value: Any) -> float:
    """Return a number strictly between 0 and 1."""
    x = finite(name, value)
    if not 0 < x < 1:
        raise ValueError(f"{name} is {x}; expected a number strictly between 0 and 1")
    return x


def generator(name: str, value: Any) -> np.random.Generator:
    """Return `value` if it is a NumPy Generator: randomness is an argument."""
    if not isinstance(value, np.random.Generator):
        raise TypeError(f"{name} is {value!r}; expected a numpy.random.Generator")
    return value
