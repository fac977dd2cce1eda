"""Leading axes and grouped heads: one place that says which operand each problem reads.

Leading axes broadcast. Axis −3 is heads: where q has H heads and k has fewer, query head h reads key head
⌊h / (H / Hk)⌋. A problem is one index into the broadcast leading axes; `Leads.of` maps it to each operand's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.lifted import Lifted


class Leads(NamedTuple):
    """The leading axes of an answer, and for each operand the flat index that a problem reads."""

    shape: tuple[int, ...]
    of: dict[str, NDArray[np.intp]]


def leads(queries: Mapping[str, tuple[int, ...]], keyed: Mapping[str, tuple[int, ...]]) -> Leads:
    """Join the leading shapes of operands with the query's heads and of operands with the key's heads.

    Raises
    ------
    ValueError
        Leading axes that do not broadcast, or key heads that do not divide query heads.
    """
    lead = _broadcast(queries)
    heads = lead[-1] if lead else 1
    own = {name: np.arange(math.prod(shape)).reshape(shape) for name, shape in {**queries, **keyed}.items()}
    for name, shape in keyed.items():
        few = shape[-1] if shape else 1
        if heads == 1 or few in (1, heads):
            continue
        if few == 0 or heads % few:
            raise ValueError(f"{name} has {few} heads (axis -3); expected a divisor of q's {heads}")
        own[name] = np.repeat(own[name], heads // few, axis=-1)
    shape = _broadcast({name: ids.shape for name, ids in own.items()})
    return Leads(shape, {name: np.broadcast_to(ids, shape).ravel() for name, ids in own.items()})


def _broadcast(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    joined: tuple[int, ...] = ()
    for name, shape in shapes.items():
        try:
            joined = np.broadcast_shapes(joined, shape)
        except ValueError:
            raise ValueError(f"{name} has leading axes {shape}; expected axes that broadcast with {joined}") from None
    return joined


def matrix(x: Any, flat: int | np.intp, axes: int = 2) -> Any:
    """Return the matrix, or what else has so many axes, at a flat index into the leading axes, as a view."""
    return x if isinstance(x, Lifted) else x[np.unravel_index(flat, x.shape[: x.ndim - axes])]


def unbroadcast(x: Any, shape: tuple[int, ...]) -> Any:
    """Sum a gradient over the axes along which its argument was broadcast."""
    if x.shape == shape:
        return x
    extra = x.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + a for a, n in enumerate(shape) if n == 1 and x.shape[extra + a] != 1)
    return x.sum(axis=axes, keepdims=True).reshape(shape)
