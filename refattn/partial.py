"""A partial result (o, lse), and how any number of them merge into one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


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
        Results whose o are (..., T, E) and whose lse, in nats, are (..., T); shapes broadcast.

    Raises
    ------
    ValueError
        No part, or an lse that does not have o's rows.

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
    for n, part in enumerate(parts):
        if np.shape(part.o)[:-1][-1:] != np.shape(part.lse)[-1:]:
            raise ValueError(
                f"parts[{n}].lse has shape {np.shape(part.lse)}; expected the rows of o, {np.shape(part.o)[:-1]}"
            )
    top: NDArray[Any] = np.asarray(parts[0].lse)
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
