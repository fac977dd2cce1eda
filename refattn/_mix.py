"""The only weighted sum, and the tiles in which T×S is visited: never all of it at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE_PAIRS = 2**20


def mix(w: NDArray[Any], v: NDArray[Any], seen: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Return w @ v in which a pair that is not seen contributes nothing, not even where v is NaN or infinite."""
    if seen is None:
        return w @ v
    bad = ~np.isfinite(v).all(axis=1)
    if not bad.any():
        return w @ v
    out = w[:, ~bad] @ v[~bad]
    for j in np.flatnonzero(bad & seen.any(axis=0)):
        out += w[:, j, None] * np.where(seen[:, j, None], v[j], 0.0)
    return out


def rows_of(x: NDArray[Any], index: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return some rows of a matrix in float64, as a view where they are neighbours."""
    if len(index) and index[-1] - index[0] + 1 == len(index):
        return np.asarray(x[index[0] : index[-1] + 1], dtype=np.float64)
    return np.asarray(x[index], dtype=np.float64)


def tiles(rows: NDArray[np.intp], width: int) -> list[NDArray[np.intp]]:
    """Split rows so that a block of them, `width` wide, stays small."""
    return np.array_split(rows, max(1, min(len(rows), len(rows) * width // TILE_PAIRS)))
