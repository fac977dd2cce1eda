"""What a kernel computes in, stated in the field's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from refattn import _check
from refattn.testing._formats import Format, format_of

Where = Literal["scores", "q", "q and k"]
Exp = Literal["exp", "exp2"]
RowSum = Literal["unrounded weights", "rounded weights"]
Normalise = Literal["last", "before the cast"]
Sums = Literal["in place", "apart"]
Delta = Literal["output", "weights"]
FormatLike: TypeAlias = str | Format | type[Any] | np.dtype[Any]


class Formats(NamedTuple):
    """The formats of an `Arithmetic`, looked up."""

    inputs: Format
    scores: Format
    weights: Format
    accumulate: Format
    output: Format
    lse: Format
    scaled: Format
    stored_scores: Format | None
    operands: Format | None


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The number formats of an attention kernel and where it rounds: what a tolerance is derived from.

    A format is a `Format`, its name (``"float64"``, ``"float32"``, ``"tf32"``, ``"bfloat16"``, ``"float16"``,
    ``"float8_e4m3"``, ``"float8_e5m2"``) or a dtype. Every result is rounded to nearest, except where `truncates`.

    Parameters
    ----------
    inputs
        Of q, k and v as the kernel receives them. Numbers that the format does not hold are charged the cast.
    scores
        Of the accumulator of q·k, and of the logits' arithmetic up to the exponential.
    weights
        Of P as it is fed to P·V, and of dS as it is fed to dS·K.
    accumulate
        Of the accumulators of P·V, of the row sum and of the gradients.
    output
        Of the output, and of the gradients.
    lse
        Of lse; `accumulate` unless given.
    stored_scores
        What scores are rounded to after each step, where they are stored between steps; so are do·v.
    operands
        What q, k and v are rounded to inside, before they are multiplied: tf32, or fp8.
    descale
        Whether operands are first divided by (largest absolute number of the matrix) ÷ (largest of the format).
    scale
        Whether the scale multiplies the scores, q, or, as its root, q and k.
    scaled
        What a q (or q and k) that carries the scale is rounded to; `inputs` unless given.
    exp, exp_ulp
        The exponential that is called (``"exp2"`` multiplies logits and their maximum by log₂e), and its error, in
        units in the last place of `scores`; exp(0) is 1. The logarithm of lse has the same.
    tanh_ulp
        Error of the softcap's tanh.
    row_sum
        Whether the normaliser sums weights before or after they are rounded to `weights`.
    normalise
        Whether P·V is divided by the row sum, or P before it is rounded: then there is one maximum, known first.
    tile
        Number of keys between two updates of the running maximum; None is any tiling in any order.
    sums
        Whether a tile's products are added into the running accumulator, or summed apart and then added.
    truncates
        Whether accumulators drop digits instead of rounding to nearest.
    lazy
        The running maximum is left as it is until it would rise by more than this, in nats.
    weights_scale
        P is rounded as this times P.
    splits
        Into how many parts the keys may be split, whose outputs and lse are merged in `accumulate`.
    stored_gradients
        After how many rows dk and dv, and after how many keys dq, are rounded to `output` and read back, at least; None
        where accumulators are kept.
    delta
        Whether gradients subtract do·o, of the output as it was returned, or Σp·(do·v); None is either.

    Notes
    -----
    What was accumulated is rescaled by the exponential of the difference of two maxima, or of two products of a maximum
    with log₂e as the weights use them. A factor exp2(fma(m, log₂e, −m' · log₂e)) is not covered: its errors add up.

    Examples
    --------
    >>> import dataclasses
    >>> fa2 = Arithmetic(inputs="bfloat16", scores="float32", weights="bfloat16", accumulate="float32",
    ...                  output="bfloat16")
    >>> dataclasses.replace(fa2, tile=64).formats.lse.name
    'float32'
    """

    inputs: FormatLike
    scores: FormatLike
    weights: FormatLike
    accumulate: FormatLike
    output: FormatLike
    lse: FormatLike | None = None
    stored_scores: FormatLike | None = None
    operands: FormatLike | None = None
    descale: bool = False
    scale: Where = "scores"
    scaled: FormatLike | None = None
    exp: Exp = "exp2"
    exp_ulp: float = 4.0
    tanh_ulp: float = 4.0
    row_sum: RowSum = "unrounded weights"
    normalise: Normalise = "last"
    tile: int | None = None
    sums: Sums = "in place"
    truncates: bool = False
    lazy: float = 0.0
    weights_scale: float = 1.0
    splits: int = 1
    stored_gradients: tuple[int, int] | None = None
    delta: Delta | None = None

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        _ = self.formats
        words = {"scale": Where, "exp": Exp, "row_sum": RowSum, "normalise": Normalise, "sums": Sums}
        for name, allowed in words.items():
            _check.choice(name, getattr(self, name), get_args(allowed))
        if self.delta is not None:
            _check.choice("delta", self.delta, get_args(Delta))
        if self.tile is not None:
            _check.integer("tile", self.tile, 1)
        _check.integer("splits", self.splits, 1)
        for length in self.stored_gradients or ():
            _check.integer("stored_gradients", length, 1)
        _check.positive("weights_scale", self.weights_scale)
        for name in ("exp_ulp", "tanh_ulp", "lazy"):
            if _check.finite(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number that is not negative")
        if self.normalise == "before the cast" and (self.splits > 1 or self.lazy or self.row_sum == "rounded weights"):
            raise ValueError(
                "normalise is 'before the cast', which knows the row's maximum and sum first; expected splits = 1, "
                "lazy = 0 and row_sum = 'unrounded weights' with it"
            )
        if self.descale and self.operands is None:
            raise ValueError("descale is True; expected operands, the format that is descaled to, with it")

    @property
    def formats(self) -> Formats:
        """The formats themselves."""
        given = {name: getattr(self, name) for name in Formats._fields}
        given["lse"] = self.accumulate if self.lse is None else self.lse
        given["scaled"] = self.inputs if self.scaled is None else self.scaled
        return Formats(**{name: None if x is None else format_of(name, x) for name, x in given.items()})  # pyright: ignore


def _eager(name: str) -> Arithmetic:
    return Arithmetic(
        inputs=name,
        scores="float32",
        stored_scores=name,
        weights=name,
        accumulate="float32",
        output=name,
        exp="exp",
        normalise="before the cast",
        delta="weights",
    )


def _flash(name: str) -> Arithmetic:
    return Arithmetic(
        inputs=name, scores="float32", weights=name, accumulate="float32", output=name, tanh_ulp=4096, delta="output"
    )


def _plain(name: str, operands: str | None = None) -> Arithmetic:
    return Arithmetic(inputs=name, scores=name, weights=name, accumulate=name, output=name, operands=operands)


PRESETS: Mapping[str, Arithmetic] = MappingProxyType(
    {
        "fp64": _plain("float64"),
        "fp32": _plain("float32"),
        "tf32": Arithmetic(
            inputs="float32",
            operands="tf32",
            scores="float32",
            weights="tf32",
            accumulate="float32",
            output="float32",
        ),
        "fp16": _eager("float16"),
        "bf16": _eager("bfloat16"),
        "fa2-fp16": _flash("float16"),
        "fa2-bf16": _flash("bfloat16"),
        "torch-cpu-fp16": replace(_flash("float16"), exp_ulp=20, stored_gradients=(32, 512)),
        "torch-cpu-bf16": replace(_flash("bfloat16"), exp_ulp=20, stored_gradients=(32, 512)),
        "fp8-e4m3": Arithmetic(
            inputs="float32",
            operands="float8_e4m3",
            descale=True,
            scores="float32",
            weights="float8_e4m3",
            weights_scale=256.0,
            accumulate="float32",
            output="bfloat16",
            delta="output",
        ),
    }
)
"""Arithmetics by name.

``fp64``, ``fp32``: one format throughout, any kernel. ``tf32``: float32 whose products are of tf32 numbers. ``fp16``,
``bf16``: eager code that stores every step. ``fa2-…``: flash attention on tensor cores, with the hardware's tanh.
``torch-cpu-…``: PyTorch's flash attention on CPUs, whose exp is off by up to 20 units in the last place, and which adds
gradients up in 16 bits between blocks.
``fp8-e4m3``: q, k, v and P are rounded to e4m3 with descaling factors.
"""


def arithmetic_of(value: Any) -> Arithmetic:
    """Return an arithmetic that is given as one or by its preset's name."""
    if isinstance(value, Arithmetic):
        return value
    if not isinstance(value, str):
        raise TypeError(f"arithmetic is {value!r}; expected an Arithmetic or the name of a preset")
    if value not in PRESETS:
        raise ValueError(f"arithmetic is {value!r}; expected an Arithmetic or one of {', '.join(map(repr, PRESETS))}")
    return PRESETS[value]
