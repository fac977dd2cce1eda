"""The judge of attention: whether an output is right, within the bound of the arithmetic that made it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import engines
from refattn.bias import Bias
from refattn.conventions import Answer, Call, Convention, Meaning, profile
from refattn.partial import Partial
from refattn.rounding import TINY, U
from refattn.testing._arithmetic import PRESETS, Arithmetic, arithmetic_of
from refattn.testing._exact import exact, reach
from refattn.testing._outside import dtype_name, framework_of, to_numpy
from refattn.testing._tolerance import tolerance
from refattn.testing._typical import typical
from refattn.testing._verdicts import Part, Verdict, places, worst

BY_DTYPE = {"float64": "fp64", "float32": "fp32", "float16": "fa2-fp16", "bfloat16": "fa2-bf16"}
"""The preset that an array is judged by unless another is named."""
SMALL = 1 / 8
"""Above this part of the allowance the definition's own rounding is worth ball arithmetic."""
AXES = {"o": "head row column", "lse": "head row", "dq": "head row column", "dk": "head key column"}

Array = NDArray[np.float64]


def assert_attention(actual: Any, q: Any, k: Any, v: Any, **named: Any) -> Verdict:
    """Assert that `actual` is attention of q, k and v, within the proved bound of the arithmetic.

    Arguments are `judge`'s. A suspect answer passes: it is within what is proved.

    Raises
    ------
    AssertionError
        Any other verdict: the message has the worst element with its error ÷ bound, where the failures lie, and what
        would explain them.

    Examples
    --------
    >>> from refattn import softmax
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 8, 4))
    >>> assert_attention(softmax.attend(q, k, v), q, k, v).kind
    'right'
    """
    verdict = judge(actual, q, k, v, **named)
    if not verdict.ok:
        raise AssertionError(str(verdict))
    return verdict


def judge(
    actual: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    lse: Any = None,
    gradients: Mapping[str, Any] | None = None,
    do: Any = None,
    dlse: Any = None,
    arithmetic: Arithmetic | str | None = None,
    convention: Convention | str = Convention(),  # noqa: B008
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Any = None,
    bias: Any = None,
    slopes: Any = None,
    sink: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    lengths: Any = None,
    starts: tuple[Any, Any] | None = None,
    diagnose: bool = True,
) -> Verdict:
    r"""Judge an output of attention against the definition.

    .. math:: |\mathrm{actual} - \mathrm{exact}| \le \mathrm{tolerance}(\mathrm{arithmetic}, q, k, v, \dots)

    for each element, where the tolerance is proved of every kernel of that arithmetic, whatever its order of sums. The
    definition is evaluated in float64, whose own bound is added; where that is more than an eighth of the tolerance,
    what it leaves open is decided in ball arithmetic, if python-flint is installed.

    Parameters
    ----------
    actual : (..., H, T, E)
        The output: an array of NumPy, PyTorch, JAX, CuPy, MLX, or anything with DLPack or ``__array__``.
    q, k, v : (..., H, T, D), (..., Hk, S, D), (..., Hk, S, E)
        The inputs as the kernel got them, heads before tokens; of any of these frameworks.
    lse : (..., H, T), optional
        The kernel's log-sum-exp, in the convention's base: it tells more than o does.
    gradients : mapping, optional
        Of "q", "k", "v", "bias" or "sink", those of ⟨do, o⟩ + ⟨dlse, lse⟩.
    do, dlse : (..., H, T, E), (..., H, T)
        The cotangents: `do` is required with gradients.
    arithmetic : Arithmetic or str, optional
        What the kernel computes in, or the name of a preset; by the dtype of `actual` unless given.
    convention : Convention or str
        What the arguments mean: a convention, or the name of a profile such as "torch".
    causal, window, mask, bias, slopes, sink, scale, softcap, lengths, starts
        As in `refattn.conventions.Call`; `mask` is an array.
    diagnose : bool
        Whether to look for what would explain a wrong answer.

    Returns
    -------
    Verdict
        "right"; "suspect", within the proved bound but beyond what is usual; "wrong"; "non-finite"; "wrong shape" or
        "wrong dtype".

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit each other, before any work.

    Examples
    --------
    >>> from refattn import masks, softmax
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 8, 4))
    >>> o = softmax.attend(q, k, v)
    >>> judge(o, q, k, v).kind, judge(o, q, k, v, causal=True, diagnose=False).kind
    ('right', 'wrong')
    """
    how = convention if isinstance(convention, Convention) else profile(convention).convention
    arrays = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "slopes": slopes, "sink": sink, "lengths": lengths}
    given = {name: None if x is None else to_numpy(x) for name, x in arrays.items()}
    call = Call(causal=causal, window=window, scale=scale, softcap=softcap, starts=starts, **given)
    known = chosen(arithmetic, actual)
    if gradients is not None and do is None:
        raise ValueError("do is missing; expected the cotangent that the gradients are of")
    return judge_call(
        call,
        how,
        known,
        to_numpy(actual),
        None if lse is None else to_numpy(lse),
        gradients=None if gradients is None else {name: to_numpy(x) for name, x in gradients.items()},
        do=None if do is None else to_numpy(do),
        dlse=None if dlse is None else to_numpy(dlse),
        diagnose=diagnose,
    )


def chosen(arithmetic: Arithmetic | str | None, like: Any) -> Arithmetic:
    """Return an arithmetic by name, as it is, or by the dtype of an array."""
    if arithmetic is None:
        name = dtype_name(like if framework_of(like) else to_numpy(like))
        if name not in BY_DTYPE:
            raise ValueError(f"arithmetic is not given, and no preset is for {name}; expected an Arithmetic")
        return PRESETS[BY_DTYPE[name]]
    return arithmetic_of(arithmetic)


def judge_call(
    call: Call,
    convention: Convention,
    arithmetic: Arithmetic,
    o: NDArray[Any] | None,
    lse: NDArray[Any] | None = None,
    *,
    gradients: Mapping[str, NDArray[Any]] | None = None,
    do: Any = None,
    dlse: Any = None,
    diagnose: bool = True,
) -> Verdict:
    """Judge NumPy arrays that a kernel answered to a call, those that are given; see `judge`."""
    call = _widened(call)
    meaning = call.under(convention)
    right = meaning.answer()
    for name, array, shape in (("o", o, right.o.shape), ("lse", lse, right.lse.shape)):
        refused = None if array is None else _refused(name, array, shape)
        if refused:
            return refused
    if not right.o.size:
        return Verdict("right")
    parts, notes = list[Part](), ()
    if o is not None or lse is not None:
        truth, notes = _truth(meaning, right, arithmetic, o, lse)
        seen = _keys_seen(meaning)
        given = {name: x for name, x in (("o", o), ("lse", lse)) if x is not None}
        parts += [_judged(name, np.asarray(x, np.float64), truth[name], seen) for name, x in given.items()]
    rights = _gradients(meaning, arithmetic, gradients, do, dlse) if gradients else {}
    for name, array in (gradients or {}).items():
        right = rights[name]
        refused = _refused(f"d{name}", array, right.value.shape)
        if refused:
            return refused
        parts.append(_judged(f"d{name}", np.asarray(array, np.float64), right, None))
    kind = worst(part.kind for part in parts)
    said = [f"{part.name}: {sentence}" for part in parts for sentence in part.said]
    explained = ""
    if diagnose and o is not None and kind in ("wrong", "non-finite"):
        explained = _explained(call, convention, arithmetic, o, lse)
    return Verdict(kind, tuple(parts), tuple(said), explained, notes)


class _Right(NamedTuple):
    """What is right of one array: the value, how far another may be from it and usually is, and what is left open."""

    value: Array
    bound: Array
    usual: Array
    judged: NDArray[np.bool_]


def _widened(call: Call) -> Call:
    """Return the call with q, k and v in float64, which is exact: what follows need not know other types."""
    wide = {
        name: None if x is None else np.asarray(x, np.float64)
        for name, x in ((s, getattr(call, s)) for s in ("q", "k", "v", "bias", "slopes", "sink"))
    }
    return replace(call, **wide)


def _truth(
    meaning: Meaning, right: Answer, arithmetic: Arithmetic, o: Any, lse: Any
) -> tuple[dict[str, _Right], tuple[str, ...]]:
    """Return what is right of o and of lse, and what could not be decided."""
    may = meaning.allowance(partial(tolerance, arithmetic))
    usual = meaning.allowance(partial(typical, arithmetic))
    own = meaning.allowance(partial(tolerance, "fp64"))
    values = {"o": np.array(right.o), "lse": np.array(right.lse)}
    owns = {name: np.array(np.broadcast_to(getattr(own, name), x.shape)) for name, x in values.items()}
    bounds = {name: np.broadcast_to(getattr(may, name), x.shape) for name, x in values.items()}
    open_rows = {"o": meaning.convention.empty == "any", "lse": meaning.convention.empty_lse == "any"}
    notes = _sharpen(meaning, values, owns, bounds, {"o": o, "lse": lse})
    found: dict[str, _Right] = {}
    for name, value in values.items():
        judged = np.ones(value.shape, np.bool_)
        if open_rows[name]:
            judged = judged & ~(meaning.empty[..., None] if name == "o" else meaning.empty)
        near = np.broadcast_to(getattr(usual, name), value.shape) + owns[name]
        found[name] = _Right(value, bounds[name] + owns[name], near, judged)
    return found, notes


def _sharpen(
    meaning: Meaning,
    values: dict[str, Array],
    owns: dict[str, Array],
    bounds: Mapping[str, Array],
    actual: Mapping[str, Any],
) -> tuple[str, ...]:
    """Replace by exact numbers, in place, those rows of which float64 cannot say whether they are within bounds."""
    T = values["lse"].shape[-1]
    doubt = np.zeros(T)
    for name, value in values.items():
        x = actual[name]
        if x is None or np.shape(x) != value.shape or not value.size:
            continue
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            error = np.abs(np.asarray(x, np.float64) - value)
            loose = (owns[name] > SMALL * bounds[name]) & (np.abs(error - bounds[name]) <= owns[name])
            how = np.where(loose & np.isfinite(error), error / (bounds[name] + owns[name]), 0.0)
        axes = tuple(a for a in range(value.ndim) if a != (value.ndim - 2 if name == "o" else value.ndim - 1))
        doubt = np.maximum(doubt, how.max(axis=axes, initial=0.0))
    rows = np.argsort(-doubt, kind="stable")[: int((doubt > 0).sum())]
    if not len(rows):
        return ()
    q, k, v = meaning.arrays
    call = engines.problem(q, k, v, **meaning.options)
    few = reach(call.sizes, math.prod(call.leads.shape))
    if isinstance(meaning.options["bias"], Bias) or not few:
        return ("the definition's own float64 rounding is not small here: an error within it is not seen",)
    rows = np.sort(rows[:few])
    best = meaning.allowance(exact(rows))
    for name, value in values.items():
        x = np.asarray(getattr(best, name))
        index = (..., rows, slice(None)) if name == "o" else (..., rows)
        better = np.isfinite(x[index])
        value[index] = np.where(better, x[index], value[index])
        owns[name][index] = np.where(better, U * np.abs(x[index]) + TINY, owns[name][index])
    return ()


def _gradients(meaning: Meaning, arithmetic: Arithmetic, names: Iterable[str], do: Any, dlse: Any) -> dict[str, _Right]:
    def allowed(what: Arithmetic | str) -> Any:
        def verb(do: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
            return tolerance(what, q, k, v, do=do, **options)

        return meaning.gradient_allowance(verb, do, dlse)

    right, own, may = meaning.vjp(do, dlse), allowed("fp64"), allowed(arithmetic)
    found: dict[str, _Right] = {}
    for name in names:
        value = getattr(right, name, None)
        if value is None:
            raise ValueError(f"gradients has {name!r}, of which the call has none")
        bound = np.broadcast_to(getattr(may, name) + getattr(own, name), value.shape)
        found[name] = _Right(value, bound, np.full(value.shape, np.inf), np.ones(value.shape, np.bool_))
    return found


def _refused(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> Verdict | None:
    if array.shape != shape:
        return Verdict("wrong shape", said=(f"{name} has shape {array.shape}; expected {shape}",))
    if array.dtype.kind not in "f" and array.dtype.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        return Verdict("wrong dtype", said=(f"{name} has dtype {array.dtype}; expected floating point",))
    return None


def _judged(name: str, actual: Array, right: _Right, seen: NDArray[np.intp] | None) -> Part:
    value, bound, usual, judged = right
    same = (actual == value) | (np.isnan(actual) & np.isnan(value))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(actual - value))
        promised = judged & (np.isfinite(bound) | same) & (np.isfinite(value) | (bound == 0))
        ratios = [np.where(error == 0, 0.0, error / b) for b in (bound, usual)]
    ratio, near = (np.where(promised, np.where(np.isnan(r), np.inf, r), 0.0) for r in ratios)
    open_places = int((~promised).sum())
    bad = ratio > 1
    if not bad.any():
        largest, most = (float(r.max(initial=0.0)) for r in (ratio, near))
        if most > 1:
            said = (f"the largest error is {most:.3g} times what is usual, within the proved bound",)
            return Part(name, "suspect", largest, most, said, open_places)
        return Part(name, "right", largest, most, (), open_places)
    broken = bad & ~np.isfinite(actual) & np.isfinite(value)
    kind = "non-finite" if broken.any() else "wrong"
    at = np.unravel_index(int(broken.argmax() if kind == "non-finite" else ratio.argmax()), bad.shape)
    where = "[" + ", ".join(str(int(i)) for i in at) + "]"
    if kind == "non-finite":
        first = f"{actual[at]} first at {where}, where {value[at]:.9g} is right"
    else:
        first = (
            f"worst at {where}: {actual[at]:.9g} where {value[at]:.9g} is right, off by {error[at]:.3g}, "
            f"allowed {bound[at]:.3g} (error ÷ bound = {ratio[at]:.4g})"
        )
    count = f"{int(bad.sum())} of {bad.size} elements are out of bounds"
    spots = places(bad, AXES.get(name, "head key column"), seen)
    return Part(name, kind, float(ratio.max()), float(near.max()), (first, "; ".join([count, *spots])), open_places)


def _keys_seen(meaning: Meaning) -> NDArray[np.intp]:
    """Return how many keys each row sees, (..., H, T)."""

    def count(q: Any, k: Any, v: Any, **options: Any) -> Partial:
        call = engines.problem(q, k, v, **options)
        T, E = call.sizes[0], call.sizes[3]
        seen = np.array([one.seen().sum(axis=1) for one in call.all()], np.float64)
        shape = (*call.leads.shape, T)
        return Partial(np.zeros((*shape, E)), seen.reshape(shape))

    return Meaning(meaning.call, replace(meaning.convention, lse="nats")).allowance(count).lse.astype(np.intp)


def _explained(call: Call, convention: Convention, arithmetic: Arithmetic, o: Any, lse: Any) -> str:
    """Return what would explain a wrong answer, as the diagnosis says it."""
    diagnosis: Any = importlib.import_module("refattn.testing._diagnosis")
    return str(diagnosis.diagnose(call, convention, np.asarray(o, np.float64), lse, arithmetic))
