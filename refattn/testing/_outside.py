"""Arrays of any framework: exactly to NumPy, and back with their dtype. No framework is imported that is not loaded.

What a type is called says whose it is. Sixteen and eight bits travel as integers, since frameworks and NumPy do not
share their own types for them.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""Formats that NumPy has no type of its own for, and integers of their size."""
FRAMEWORKS = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "cupy": "cupy", "mlx": "mlx", "numpy": "numpy"}


def framework_of(x: Any) -> str | None:
    """Return whose array this is; None for what is none that is known.

    >>> framework_of(np.ones(2))
    'numpy'
    """
    if not hasattr(x, "shape"):
        return None
    for base in type(x).__mro__:
        found = FRAMEWORKS.get(base.__module__.partition(".")[0])
        if found:
            return found
    return None


def dtype_name(x: Any) -> str:
    """Return an array's dtype as NumPy and ml_dtypes would call it: ``torch.bfloat16`` is "bfloat16".

    >>> dtype_name(np.ones(2, np.float16))
    'float16'
    """
    return str(x.dtype).rpartition(".")[2]


def device_name(x: Any) -> str:
    """Return where an array lives, in its framework's words; "" where that says nothing.

    >>> device_name(np.ones(2))
    'cpu'
    """
    where = getattr(x, "device", "")
    return str(where() if callable(where) else where)


def to_numpy(x: Any) -> NDArray[Any]:
    """Return an array as NumPy's, exactly; a 16- or 8-bit float in ml_dtypes' type, or float32 without that package.

    Raises
    ------
    TypeError
        Something that is no array, or one that does not come to the CPU.

    Examples
    --------
    >>> to_numpy([1.0, 2.0])
    array([1., 2.])
    """
    whose = framework_of(x)
    try:
        if whose in (None, "numpy"):
            return _foreign(x) if whose is None else np.asarray(x)
        if whose == "jax":
            return np.asarray(x)
        if whose == "cupy":
            return np.asarray(x.get())
        name = dtype_name(x)
        if whose == "mlx":
            return _of_bits(np.array(x.view(sys.modules["mlx.core"].uint16)), name) if name in BITS else np.array(x)
        x = x.detach().cpu()
        if name in BITS:
            torch = sys.modules["torch"]
            signed = {"uint16": torch.int16, "uint8": torch.uint8}[BITS[name]]
            return _of_bits(x.contiguous().view(signed).numpy(), name)
        return x.resolve_neg().numpy()
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        raise TypeError(f"{type(x).__name__} does not come to NumPy: {error}") from None


def _foreign(x: Any) -> NDArray[Any]:
    """Return an array of a framework that is not known, by DLPack or by `__array__`; a list as NumPy reads it."""
    if hasattr(x, "__dlpack__"):
        try:
            return np.from_dlpack(x)
        except (BufferError, TypeError, RuntimeError, ValueError):
            if not hasattr(x, "__array__"):
                return np.from_dlpack(x, device="cpu", copy=True)
    return np.asarray(x)


def _of_bits(bits: NDArray[Any], name: str) -> NDArray[Any]:
    bits = bits.view(BITS[name])
    try:
        return bits.view(getattr(importlib.import_module("ml_dtypes"), name))
    except ImportError:
        return widened(bits, name)


def widened(bits: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Return what the bits of a 16- or 8-bit float say, in float32.

    >>> widened(np.array([0x3FC0], np.uint16), "bfloat16")
    array([1.5], dtype=float32)
    """
    if name == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if name == "float8_e5m2":  # the upper half of a float16
        return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    sign, rest = np.where(bits >> 7, -1.0, 1.0), (bits & 0x7F).astype(np.int32)
    exponent, fraction = rest >> 3, rest & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + fraction, exponent - 10), np.ldexp(fraction * 1.0, -9))
    return (sign * np.where(rest == 0x7F, np.nan, size)).astype(np.float32)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy type of a format, ml_dtypes' where NumPy has none.

    Raises
    ------
    ImportError
        Such a format without ml_dtypes.

    Examples
    --------
    >>> numpy_dtype("float16")
    dtype('float16')
    """
    if name not in BITS:
        return np.dtype(name)
    try:
        return np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
    except ImportError:
        raise ImportError(
            f"{name} needs ml_dtypes, which is not installed; install it with: pip install 'refattn[testing]'"
        ) from None


def like(framework: str, x: NDArray[Any], *, device: str | None = None) -> Any:
    """Return a NumPy array as a framework's, of the same numbers and dtype; it shares no memory with x.

    The framework is imported: whoever calls has it.

    Raises
    ------
    TypeError
        A framework that would change the dtype.

    Examples
    --------
    >>> like("numpy", np.ones(2, np.float16))
    array([1., 1.], dtype=float16)
    """
    x = np.array(x, order="C")
    out = x if framework == "numpy" else _made(framework, x, device)
    if dtype_name(out) != x.dtype.name:  # as JAX does with float64
        raise TypeError(f"{framework} makes {dtype_name(out)} of {x.dtype.name}")
    return out


def module_of(framework: str) -> Any:
    """Return the module that makes a framework's arrays."""
    return importlib.import_module({"mlx": "mlx.core", "jax": "jax.numpy"}.get(framework, framework))


def _made(framework: str, x: NDArray[Any], device: str | None) -> Any:
    name = x.dtype.name
    module = module_of(framework)
    if framework == "torch":
        if name in BITS:
            signed = {"uint16": "int16", "uint8": "uint8"}[BITS[name]]
            out = module.from_numpy(x.view(signed)).view(getattr(module, name))
        else:
            out = module.from_numpy(x)
        return out if device is None else out.to(device)
    if framework == "mlx" and name in BITS:
        return module.array(x.view(BITS[name])).view(getattr(module, name))
    if framework == "jax":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that float64 is truncated: the caller is told
            out = module.asarray(x)
        if device is None:
            return out
        jax = importlib.import_module("jax")
        return jax.device_put(out, jax.devices(device)[0])
    return module.asarray(x) if framework == "cupy" else module.array(x)
