"""A partial result (o, lse), and how any number of them merge into one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import _check
from refattn.lifted import Lifted


class Partial(NamedTuple):
    """Attention over some of the keys: the output and the natural log of its normaliser.

    `o` is (..., T, E), `lse` is (..., T). A row that saw nothing has o = 0 and lse = −inf.
    """

    o: Any
    lse: Any


def merge(*parts: Partial) -> Partial:
    r"""Join partial results over disjoint sets of keys into the result over their union.

    .. math:: \ell = \ln \sum_i e^{\ell_i}, \qquad o = \sum_i e^{\ell_i - \ell}\, o_i

    This is exact and associative (statement S4): splitting keys costs rounding only. A key that stands in two parts
    is counted twice. A sink with logit β is the part with o = 0 and lse = β.

    Parameters
    ----------
    *parts
        Results whose o are (..., T, E) and whose lse, in nats, are (..., T); shapes broadcast. What is not float32
        is widened to float64.

    Raises
    ------
    ValueError, TypeError
        No part, one that does not hold real numbers, an lse that does not have o's rows, or shapes that do not
        broadcast.

    Examples
    --------
    >>> from refattn import partial, softmax
    >>> q, k, v = [[0.0]], [[0.0], [0.0]], [[1.0], [3.0]]
    >>> left, right = softmax.partial(q, k[:1], v[:1]), softmax.partial(q, k[1:], v[1:])
    >>> partial.merge(left, right).o
    array([[2.]])
    """
    if not parts:
        raise ValueError("parts is empty; expected at least one partial result")
    parts = tuple(_checked(n, part) for n, part in enumerate(parts))
    shape: tuple[int, ...] = ()
    for n, (o, lse) in enumerate(parts):
        try:
            shape = np.broadcast_shapes(shape, o.shape, (*lse.shape, 1))
        except ValueError:
            raise ValueError(
                f"parts[{n}] has o of shape {o.shape} and lse of shape {lse.shape}; expected shapes that broadcast "
                f"with each other and with the parts before, {shape}"
            ) from None
    top: NDArray[Any] = parts[0].lse
    for part in parts[1:]:
        top = np.maximum(top, part.lse)
    shift = np.where(np.isneginf(top), 0.0, top).astype(np.result_type(top))
    numerator: Any = 0.0
    z: Any = 0.0
    for part in parts:
        w = np.exp(part.lse - shift)
        z = z + w
        numerator = numerator + np.where(w[..., None] == 0, 0.0, w[..., None] * part.o)
    empty = np.isneginf(top)
    z = np.where(empty, 1.0, z).astype(np.result_type(top))
    o = np.where(empty[..., None], 0.0, numerator / z[..., None]).astype(np.result_type(*(p.o for p in parts)))
    return Partial(o, np.where(empty, -np.inf, shift + np.log(z)).astype(shift.dtype))


def _checked(n: int, part: Partial) -> Partial:
    if not isinstance(part, Partial):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"parts[{n}] is a {type(part).__name__}; expected a Partial")
    o, lse = _floats(f"parts[{n}].o", part.o, "T E"), _floats(f"parts[{n}].lse", part.lse, "T")
    if o.shape[-2] != lse.shape[-1]:
        raise ValueError(f"parts[{n}].lse has shape {lse.shape}; expected the rows of o, {o.shape[:-1]}")
    return Partial(o, lse)


def _floats(name: str, value: Any, axes: str) -> NDArray[Any]:
    if isinstance(value, Lifted):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an array of real numbers")
    x = _check.array(name, value, axes)
    return x.astype(np.float32 if x.dtype.kind == "f" and x.dtype.itemsize == 4 else np.float64, copy=False)
