"""Feature maps: what takes the place of the exponential, with its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class FeatureMap(NamedTuple):
    """A map φ from rows (n, D) to features (n, r), and its pull-back.

    Parameters
    ----------
    name
        What it is called in tables.
    of
        φ, acting on each row alone.
    vjp
        (dφ, x) → dx: the gradient of ⟨dφ, φ(x)⟩.

    Both run in any arithmetic if they are written with operators, ``@`` and NumPy's exp, log, maximum and minimum.
    """

    name: str
    of: Callable[[Any], Any]
    vjp: Callable[[Any, Any], Any]

    def __repr__(self) -> str:
        """Return the name."""
        return self.name


def _elu_plus_one(x: Any) -> Any:
    return np.maximum(x, 0.0) + np.exp(np.minimum(x, 0.0))


def _pull_elu_plus_one(dphi: Any, x: Any) -> Any:
    return dphi * np.exp(np.minimum(x, 0.0))


elu_plus_one = FeatureMap("elu_plus_one", _elu_plus_one, _pull_elu_plus_one)


def _same(phi: Any) -> Any:
    return phi


def _pull_same(dphi: Any, phi: Any) -> Any:
    return dphi


IDENTITY = FeatureMap("identity", _same, _pull_same)
"""For what is features already."""
