"""One call of somebody's function: arrays of its framework in, what it did out, as NumPy arrays and facts."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from refattn.engines import Unsupported
from refattn.testing._outside import device_name, framework_of, like, module_of, to_numpy

LAYOUTS = ("plain", "transposed", "strided", "broadcast")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a function is called with.

    Parameters
    ----------
    args, kwargs
        Its arguments, arrays as NumPy's.
    framework, device
        Whose arrays it takes, and where.
    layout
        How arrays lie in memory: "transposed", heads and tokens swapped; "strided", every second number; "broadcast",
        the first axis with stride 0, where all along it are equal.
    cotangents
        For each array that the function returned, its cotangent or None: then gradients are asked.
    twice
        Whether the function is called once more, with other numbers, before its first answer is read again.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    framework: str
    device: str | None = None
    layout: str = "plain"
    cotangents: tuple[Any, ...] | None = None
    twice: bool = False


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a call did.

    Parameters
    ----------
    kind
        "right" where it returned, whatever the numbers; otherwise a kind of verdict.
    said
        Why.
    returned
        What it returned, arrays as NumPy's.
    gradients
        For each array among the arguments, in order, its gradient or None.
    """

    kind: str = "right"
    said: str = ""
    returned: Any = None
    gradients: tuple[Any, ...] = ()


class Fault(Exception):
    """What ends a call with a verdict."""

    def __init__(self, kind: str, said: str) -> None:
        """Hold a kind of verdict and a sentence."""
        super().__init__(kind, said)
        self.kind, self.said = kind, said


def call(function: Callable[..., Any], vjp: Callable[..., Any] | None, ask: Ask) -> Told:
    """Call a function, and never raise: what goes wrong is told."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ask.cotangents is not None:
                return Told(gradients=_gradients(function, vjp, ask))
            return Told(returned=_forward(function, ask))
    except Fault as fault:
        return Told(kind=fault.kind, said=fault.said)


def leaves(tree: Any) -> Iterator[Any]:
    """Yield the arrays in tuples, lists and dictionaries, in order.

    >>> len(list(leaves((np.ones(2), {"a": [np.ones(1), None]}))))
    2
    """
    if isinstance(tree, dict):
        for x in cast("dict[str, Any]", tree).values():
            yield from leaves(x)
    elif isinstance(tree, (tuple, list)):
        for x in cast("Sequence[Any]", tree):
            yield from leaves(x)
    elif framework_of(tree) is not None or hasattr(tree, "__dlpack__"):
        yield tree


def mapped(tree: Any, f: Callable[[Any], Any]) -> Any:
    """Return the same tuples, lists and dictionaries with f of each array; named tuples become tuples."""
    if isinstance(tree, dict):
        return {name: mapped(x, f) for name, x in cast("dict[str, Any]", tree).items()}
    if isinstance(tree, (tuple, list)):
        items = [mapped(x, f) for x in cast("Sequence[Any]", tree)]
        return items if isinstance(tree, list) else tuple(items)
    return f(tree) if framework_of(tree) is not None or hasattr(tree, "__dlpack__") else tree


def _forward(function: Callable[..., Any], ask: Ask) -> Any:
    given = _made(ask)
    before = [_bits(x) for x in leaves(given)]
    returned = _called(function, *given)
    answer = _read(returned)
    if not list(leaves(answer)):
        raise Fault("wrong shape", f"it returned {type(returned).__name__}, which is no array")
    for n, (x, was) in enumerate(zip(leaves(given), before, strict=True)):
        if _bits(x) != was:
            raise Fault("wrote to its inputs", f"array {n} of its arguments is not what it was before the call")
    homes = {device_name(x) for x in leaves(given)}
    for x in leaves(returned):
        if framework_of(x) == ask.framework and device_name(x) not in homes:
            raise Fault("wrong device", f"the answer is on {device_name(x)}; expected {', '.join(sorted(homes))}")
    if ask.twice:
        first = [_bits(x) for x in leaves(answer)]
        _called(function, *_made(ask, lambda x: -x))
        if [_bits(x) for x in leaves(_read(returned))] != first:
            raise Fault("returned the same buffer twice", "the first answer changed when the function was called again")
    return answer


def _made(ask: Ask, change: Callable[[Any], Any] = lambda x: x) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def make(x: Any) -> Any:
        if x.dtype.kind in "iub" or x.ndim < 2:
            return like(ask.framework, x, device=ask.device)
        return _laid(np.asarray(change(x)), ask)

    try:
        return mapped(ask.args, make), mapped(ask.kwargs, make)
    except (ImportError, TypeError, AttributeError) as error:
        raise Fault("unsupported", f"no such arrays: {_line(error)}") from None


def _laid(x: Any, ask: Ask) -> Any:
    """Return a framework's array that lies in memory as asked; what its framework has no strides for is plain."""
    if ask.layout == "transposed" and x.ndim >= 3:
        return like(ask.framework, np.swapaxes(x, -3, -2), device=ask.device).swapaxes(-3, -2)
    if ask.layout == "strided":
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan).astype(x.dtype)
        wide[..., ::2] = x
        return like(ask.framework, wide, device=ask.device)[..., ::2]
    if ask.layout == "broadcast" and len(x) > 1 and all(np.array_equal(x[0], y, equal_nan=False) for y in x[1:]):
        one = like(ask.framework, x[:1], device=ask.device)
        if ask.framework == "torch":
            return one.expand(*x.shape)
        return module_of(ask.framework).broadcast_to(one, x.shape)
    return like(ask.framework, x, device=ask.device)


def _called(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except (Unsupported, NotImplementedError) as error:
        raise Fault("unsupported", _line(error) or type(error).__name__) from None
    except Exception as error:
        raise Fault("raised", f"{type(error).__name__}: {_line(error)}") from None


def _read(returned: Any) -> Any:
    try:
        # a copy: what the function does with its buffers afterwards is not to change it
        return mapped(returned, lambda x: np.array(to_numpy(x)))
    except TypeError as error:
        raise Fault("raised", _line(error)) from None
    except Exception as error:  # asynchronous frameworks raise when the answer is read
        raise Fault("raised", f"{type(error).__name__}: {_line(error)}") from None


def _bits(x: Any) -> bytes:
    return to_numpy(x).tobytes()


def _gradients(function: Callable[..., Any], vjp: Callable[..., Any] | None, ask: Ask) -> tuple[Any, ...]:
    assert ask.cotangents is not None
    args, kwargs = _made(ask)
    cotangents = [None if x is None else like(ask.framework, x, device=ask.device) for x in ask.cotangents]
    if vjp is not None:
        found = _called(vjp, (*(x for x in cotangents if x is not None), *args), kwargs)
        return (*(None if x is None else np.array(to_numpy(x)) for x in found),)
    try:
        how = {"torch": _torch_gradients, "jax": _jax_gradients}[ask.framework]
    except KeyError:
        raise Fault("unsupported", f"{ask.framework} has no gradients of functions; give vjp=") from None
    try:
        return how(function, args, kwargs, cotangents)
    except (Fault, Unsupported, NotImplementedError):
        raise
    except Exception as error:
        raise Fault("raised", f"in the gradient: {type(error).__name__}: {_line(error)}") from None


def _torch_gradients(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cotangents: list[Any]
) -> tuple[Any, ...]:
    torch: Any = sys.modules["torch"]

    def tracked(x: Any) -> Any:
        return x.detach().requires_grad_() if x.is_floating_point() else x

    args, kwargs = mapped(args, tracked), mapped(kwargs, tracked)
    inputs = list(leaves((args, kwargs)))
    outputs = list(leaves(_called(function, args, kwargs)))
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=False) if g is not None]
    if not all(o.requires_grad for o, _ in pairs):
        raise Fault("unsupported", "its output carries no gradient")
    asked = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad([o for o, _ in pairs], asked, [g for _, g in pairs], allow_unused=True)
    by_id = {id(x): g for x, g in zip(asked, found, strict=True)}
    return tuple(None if by_id.get(id(x)) is None else np.array(to_numpy(by_id[id(x)])) for x in inputs)


def _jax_gradients(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cotangents: list[Any]
) -> tuple[Any, ...]:
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    inputs = list(leaves((args, kwargs)))
    floating = [bool(jnp.issubdtype(x.dtype, jnp.floating)) for x in inputs]

    def plain(*floats: Any) -> list[Any]:
        own = iter(floats)
        whole = iter([next(own) if f else x for x, f in zip(inputs, floating, strict=True)])
        a, k = mapped((args, kwargs), lambda _: next(whole))
        return list(leaves(_called(function, a, k)))

    outputs, back = jax.vjp(plain, *(x for x, f in zip(inputs, floating, strict=True) if f))
    pairs = zip(outputs, [*cotangents, *[None] * len(outputs)], strict=False)
    found = iter(back([jnp.zeros_like(o) if g is None else g for o, g in pairs]))
    return tuple(np.array(to_numpy(next(found))) if f else None for f in floating)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:297] + "…"
