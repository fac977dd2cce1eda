"""Number formats: what a kernel may compute, store and return in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Format:
    r"""A binary floating-point format, as the numbers that float64 also holds.

    Parameters
    ----------
    name
        The field's name for it.
    bits
        Bits of the significand with the leading one, so that the unit roundoff is :math:`u = 2^{-bits}`.
    least
        Exponent of the least positive number: subnormals are multiples of :math:`2^{least}`.
    largest
        The largest finite number.
    infinite
        Whether what is too large becomes infinite; otherwise it becomes NaN.

    Examples
    --------
    >>> FORMATS["bfloat16"].round(np.array([1.0, 1.001, 1.005]))
    array([1.       , 1.       , 1.0078125])
    """

    name: str
    bits: int
    least: int
    largest: float
    infinite: bool = True

    @property
    def u(self) -> float:
        """Unit roundoff."""
        return 2.0**-self.bits

    @property
    def tiny(self) -> float:
        """What underflow may take from one result.

        Half the spacing of subnormals; the least normal number where exponents are float32's or wider, because
        hardware flushes results below it to zero.
        """
        normal = self.least + self.bits - 1
        return 2.0**normal if normal <= -126 else 2.0 ** (self.least - 1)

    def round(self, x: NDArray[Any]) -> Array:
        """Return x rounded to nearest, ties to even, with gradual underflow; what is too large overflows.

        Parameters
        ----------
        x
            Numbers of any shape, in float64.
        """
        x = np.asarray(x, np.float64)
        if self.bits == 53:
            return x
        with np.errstate(over="ignore", invalid="ignore"):
            if self.bits == 24:
                return x.astype(np.float32).astype(np.float64)
            spacing = np.maximum(np.frexp(x)[1] - self.bits, self.least)
            near = np.ldexp(np.rint(np.ldexp(x, -spacing)), spacing)
            beyond = np.copysign(np.inf, x) if self.infinite else np.nan
            return np.where(np.abs(near) > self.largest, beyond, near)


_ALL = (
    Format("float64", 53, -1074, float(np.finfo(np.float64).max)),
    Format("float32", 24, -149, float(np.finfo(np.float32).max)),
    Format("tf32", 11, -136, float((2 - 2.0**-10) * 2.0**127)),
    Format("bfloat16", 8, -133, float((2 - 2.0**-7) * 2.0**127)),
    Format("float16", 11, -24, 65504.0),
    Format("float8_e4m3", 4, -9, 448.0, infinite=False),
    Format("float8_e5m2", 3, -16, 57344.0),
)
FORMATS: Mapping[str, Format] = MappingProxyType({f.name: f for f in _ALL})
"""The formats by name."""
_ALIASES = {"float8_e4m3fn": "float8_e4m3"}


def format_of(name: str, value: Any) -> Format:
    """Return a format that is given as one, by its name, or as a dtype.

    >>> format_of("inputs", np.dtype("float16")).u == 2.0**-11
    True
    """
    if isinstance(value, Format):
        return value
    word = value
    if not isinstance(value, str):
        try:
            word = np.dtype(value).name
        except TypeError:
            raise TypeError(f"{name} is {value!r}; expected a format, its name or a dtype") from None
    found = FORMATS.get(_ALIASES.get(word, word))
    if found is None:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, FORMATS))}")
    return found
