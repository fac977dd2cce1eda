"""Kernels under trial, in NumPy and in the words of PyTorch's scaled_dot_product_attention: one is right."""

import os
import signal
import time
from typing import Any

import numpy as np


def right(
    query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False, scale: Any = None, **_: Any
) -> Any:
    """Compute attention the plain way, in the dtype of the query."""
    q, k, v = query, key, value
    if k.ndim > 2 and k.shape[-3] != q.shape[-3]:
        k, v = (np.repeat(x, q.shape[-3] // k.shape[-3], axis=-3) for x in (k, v))
    s = (q @ np.swapaxes(k, -1, -2)) * q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)
    seen = np.ones(s.shape, bool)
    if is_causal:
        seen &= np.arange(s.shape[-1]) <= np.arange(s.shape[-2])[:, None]
    if attn_mask is not None:
        seen, s = (seen & attn_mask, s) if attn_mask.dtype == bool else (seen, s + attn_mask)
    s = np.where(seen, s, -np.inf).astype(q.dtype)
    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isneginf(m), 0, m).astype(q.dtype))
    z = p.sum(axis=-1, keepdims=True)
    return (p @ v / np.where(z == 0, 1, z)).astype(q.dtype)


def bottom_right(query: Any, key: Any, value: Any, is_causal: bool = False, **named: Any) -> Any:
    """Align causal to the last key."""
    T, S = query.shape[-2], key.shape[-2]
    mask = np.arange(S) <= np.arange(T)[:, None] + S - T
    return right(query, key, value, **{**named, "attn_mask": mask} if is_causal else named)


def a_little_off(query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Be within the bound and beyond what is usual."""
    return right(query, key, value, **named) * np.float32(1 + 2.0**-10)


def raises(query: Any, *_: Any, **__: Any) -> Any:
    """Refuse with an error."""
    raise ValueError(f"head size {query.shape[-1]} is odd\nand more")


def refuses(*_: Any, **__: Any) -> Any:
    """Say that it cannot."""
    raise NotImplementedError("no such thing")


def hangs(*_: Any, **__: Any) -> Any:
    """Never answer."""
    time.sleep(3600)


def crashes(*_: Any, **__: Any) -> Any:
    """Die as a segmentation fault dies."""
    os.kill(os.getpid(), signal.SIGKILL)


def exits(*_: Any, **__: Any) -> Any:
    """Leave the process."""
    os._exit(7)


def wrong_shape(query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Answer one row too few."""
    return right(query, key, value, **named)[..., 1:, :]


def wrong_dtype(query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Answer in another dtype."""
    return right(query, key, value, **named).astype(np.float64)


def no_array(*_: Any, **__: Any) -> Any:
    """Answer nothing."""
    return None


def writes(query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Scale its query in place."""
    answer = right(query, key, value, **named)
    query *= 2
    return answer


_BUFFERS: dict[Any, Any] = {}


def same_buffer(query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Answer in memory that the next call of these sizes takes too."""
    answer = right(query, key, value, **named)
    buffer = _BUFFERS.setdefault(answer.shape, np.empty_like(answer))
    buffer[...] = answer
    return buffer


def not_a_number(query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Lose one row."""
    answer = right(query, key, value, **named)
    answer[..., 2:3, 1:] = np.nan
    return answer


def prints(query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Be right and talk."""
    print("talk, talk", flush=True)
    os.write(1, b"more talk\n")
    return right(query, key, value, **named)


def flattened(query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Read a transposed view as if it lay in order."""
    strided = not value.flags.c_contiguous
    return right(query, key, value.ravel("K").reshape(value.shape) if strided else value, **named)


def right_vjp(do: Any, query: Any, key: Any, value: Any, is_causal: bool = False, scale: Any = None, **_: Any) -> Any:
    """Return the gradients of `right` for heads that are not grouped, by the formulas of the softmax."""
    sigma = query.dtype.type(query.shape[-1] ** -0.5 if scale is None else scale)
    s = (query @ np.swapaxes(key, -1, -2)) * sigma
    if is_causal:
        s = np.where(np.arange(s.shape[-1]) <= np.arange(s.shape[-2])[:, None], s, -np.inf).astype(s.dtype)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p = p / p.sum(axis=-1, keepdims=True)
    dp = do @ np.swapaxes(value, -1, -2)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    return ds @ key * sigma, np.swapaxes(ds, -1, -2) @ query * sigma, np.swapaxes(p, -1, -2) @ do


def unscaled_vjp(do: Any, query: Any, key: Any, value: Any, **named: Any) -> Any:
    """Forget the scale of its own in the gradient of the keys."""
    dq, dk, dv = right_vjp(do, query, key, value, **named)
    return dq, dk if "scale" in named else dk * np.float32(query.shape[-1] ** 0.5), dv
