"""Hypothesis strategies that draw a method's arguments from its own declaration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from refattn import masks
from refattn.conventions import Call, Profile
from refattn.conventions import profile as profile_of
from refattn.masks import Mask, Pairs
from refattn.method import REQUIRED, Method, accepted
from refattn.testing._places import sayable

KINDS = ("normal", "small", "large", "ties", "peaked", "offset")


@dataclass(frozen=True)
class Case:
    """A method with arguments drawn for it, without leading axes.

    `arrays` are those of ``METHOD.arrays`` that are given; `options` hold the options, the mask and the scale.
    """

    module: ModuleType
    sizes: Mapping[str, int]
    arrays: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """The method's declaration."""
        return self.module.METHOD

    def arguments(self, *, without: tuple[str, ...] = ()) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments of `attend`, without some."""
        given = {s: x for s, x in self.arrays.items() if s not in without}
        positional = [given.pop(s) for s in self.method.required if s not in without]
        return positional, {**given, **self.options}

    def attend(self) -> Any:
        """Return the method's output."""
        positional, named = self.arguments()
        return self.module.attend(*positional, **named)

    def weights(self) -> dict[str, Any]:
        """Return the weights, by the argument that each matrix multiplies."""
        positional, named = self.arguments(without=self.method.linear_in)
        out = self.module.weights(*positional, **named)
        names = self.method.linear_in
        return out._asdict() if len(names) > 1 else dict.fromkeys(names, out)

    def vjp(self, do: Any) -> dict[str, Any]:
        """Return the gradients by argument name, of those that are given."""
        positional, named = self.arguments()
        out = self.module.vjp(do, *positional, **named)._asdict()
        return {name: g for name, g in out.items() if name in self.arrays}

    def bound(self) -> Any:
        """Return the distance to exact attention at most."""
        positional, named = self.arguments()
        return self.module.bound(*positional, **named)

    def claim_rounding(self) -> Any:
        """Return what evaluating the bound may cost, beside the rounding of the answer."""
        from refattn import rounding

        return rounding.claim_rounding(self.module, self.arrays, self.options)

    def exact(self) -> Any:
        """Return what `bound` is measured against: the module's `exact`, or softmax attention."""
        from refattn import softmax

        verb = getattr(self.module, "exact", softmax.attend)
        return verb(**accepted(verb, {**self.arrays, **self.options}))

    def given(self, **changes: Any) -> Case:
        """Return the case with other arrays or options."""
        arrays = {s: changes.pop(s, x) for s, x in self.arrays.items()}
        return replace(self, arrays=arrays, options={**self.options, **changes})


@st.composite
def cases(
    draw: st.DrawFn,
    module: ModuleType,
    *,
    most: int = 7,
    least: int = 0,
    square: bool = False,
    masked: bool | None = None,
) -> Case:
    """Draw arguments from a method's declared domain.

    Parameters
    ----------
    module
        The method.
    most, least
        Largest and smallest T and S.
    square
        T = S.
    masked
        None: with or without a mask, as drawn. False: without. True: with one, where the method takes masks.
    """
    method: Method = module.METHOD
    size = st.integers(least, most)
    S = draw(size)
    sizes = {"T": S if square else draw(size), "S": S, "D": draw(st.integers(1, 4)), "E": draw(st.integers(1, 3))}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(KINDS))
    arrays: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, axes in method.arrays.items():
        if name in method.drawn or (axes.endswith("?") and not draw(st.booleans())):
            continue
        shape = tuple(sizes[a] for a in axes.rstrip("?").split())
        arrays[name] = numbers(rng, shape, kind)
    if method.drawn:
        chosen = {name: draw(st.sampled_from(option.values(sizes))) for name, option in method.draw_options.items()}
        made: tuple[Any, ...] = module.draw(rng, arrays["q"], arrays["k"], arrays["v"], **chosen)
        arrays.update((name, x) for name, x in zip(method.drawn, made, strict=True) if name in method.arrays)
        options.update((name, x) for name, x in zip(method.drawn, made, strict=True) if name in method.options)
    for name, option in method.options.items():
        if name not in method.drawn and (option.default is REQUIRED or draw(st.booleans())):
            options[name] = draw(st.sampled_from(option.values(sizes)))
    if method.masks != "none":
        options["mask"] = draw(prefix_masks(sizes) if method.masks == "prefix" else any_masks(sizes, rng))
        if masked is False:
            options["mask"] = None
        elif masked and options["mask"] is None:
            options["mask"] = masks.causal()
    if "scale" in module.attend.__kwdefaults__:
        options["scale"] = draw(st.sampled_from((None, 0.25, 1.0)))
    return Case(module, sizes, arrays, options)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> NDArray[np.float64]:
    """Return multiples of 1/64, so that sums of two are exact: of one of the kinds that attention meets."""
    x = np.asarray(rng.standard_normal(shape))
    if kind == "small":
        x = x / 16
    elif kind == "large":
        x = x * 8
    elif kind == "ties":
        x = np.round(x)
    elif kind == "peaked":
        x = x * np.where(rng.random(shape) < 0.25, 6.0, 0.25)
    elif kind == "offset":
        x = x + 4.0
    return np.asarray(np.round(x * 64) / 64)


def prefix_masks(sizes: Mapping[str, int]) -> st.SearchStrategy[Mask | None]:
    """Draw a mask whose rows see the first keys, never fewer than the row before; or None."""
    few = st.integers(0, sizes["S"])
    return st.one_of(
        st.none(),
        st.just(masks.causal()),
        few.map(masks.lengths),
        few.map(masks.prefix).map(_or_causal),
        st.integers(-2, 3).map(masks.causal().at),
    )


def any_masks(
    sizes: Mapping[str, int], rng: np.random.Generator
) -> st.SearchStrategy[Mask | Pairs | NDArray[np.bool_] | None]:
    """Draw a mask, bound or not, or an array of booleans, or None."""
    T, S = sizes["T"], sizes["S"]
    some, small, step = rng.random((T, S)) < 0.6, st.integers(0, 3), st.integers(1, 3)
    leaves = st.one_of(
        prefix_masks(sizes).map(_or_causal),
        st.builds(masks.window, small, st.one_of(st.none(), small)),
        st.builds(masks.dilated, small, small, step),
        step.map(masks.block_local),
        st.builds(masks.segmented, step, small),
        step.map(masks.strided),
        st.just(masks.segments(rng.integers(0, 2, T), rng.integers(0, 2, S))),
        st.just(masks.dense(some)),
    )
    joined = st.one_of(leaves, st.builds(_meet, leaves, leaves), st.builds(_differ, leaves, leaves))

    def bound(mask: Mask) -> Pairs:
        return mask.on(T, S)

    return st.one_of(st.none(), joined, joined.map(bound), st.just(some))


def _or_causal(mask: Mask | None) -> Mask:
    return masks.causal() if mask is None else mask | masks.causal()


def _meet(one: Mask, other: Mask) -> Mask:
    return one & other


def _differ(one: Mask, other: Mask) -> Mask:
    return one | ~other


FEATURES = {
    "causal": "causal",
    "window": "window",
    "mask": "mask",
    "bias": "bias",
    "ALiBi": "slopes",
    "sink": "sink",
    "softcap": "softcap",
    "lengths": "lengths",
    "packed sequences": "starts",
}
"""What a call may ask for, by the name of the capability."""


@st.composite
def problems(draw: st.DrawFn, profile: str | Profile, *, most: int = 24, without: Collection[str] = ()) -> Call:
    """Draw a call that a profile has words for: sizes, features and numbers.

    Parameters
    ----------
    profile
        Whose words: what it cannot say is left out.
    most
        Largest T and S.
    without
        Capabilities that are left out too, as the kit names them: any of `FEATURES`, "grouped heads", "scale",
        "value head size" and "head sizes that 16 does not divide".

    Examples
    --------
    >>> from hypothesis import find
    >>> find(problems("torch"), lambda call: call.causal).q.shape
    (1, 1, 1, 1)
    """
    own = profile if isinstance(profile, Profile) else profile_of(profile)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(KINDS))
    few, group = draw(st.integers(1, 3)), 1 if "grouped heads" in without else draw(st.integers(1, 3))
    B, H, T, S = draw(st.integers(1, 2)), few * group, draw(st.integers(1, most)), draw(st.integers(1, most))
    depth = st.sampled_from((16, 32, 64)) if "head sizes that 16 does not divide" in without else st.integers(1, 8)
    D = draw(depth)
    E = D if "value head size" in without else draw(st.one_of(st.just(D), depth))
    call = Call(
        q=numbers(rng, (B, H, T, D), kind), k=numbers(rng, (B, few, S, D), kind), v=numbers(rng, (B, few, S, E), kind)
    )
    if "scale" not in without:
        call = _said(own, call, scale=draw(st.sampled_from((None, 0.25, 1.0))))
    known = [field for capability, field in FEATURES.items() if capability not in without]
    for feature in draw(st.lists(st.sampled_from(known), max_size=3, unique=True)) if known else ():
        call = _said(own, call, **_feature(draw, feature, rng, call, kind, own.convention.mask == "drop"))
    return sayable(own, call) or call


def _feature(
    draw: st.DrawFn, feature: str, rng: np.random.Generator, call: Call, kind: str, drop: bool
) -> dict[str, Any]:
    """Draw what a call asks for in one of its fields."""
    (B, H, T, _), S = call.q.shape, call.k.shape[-2]
    if feature == "causal":
        return {"causal": True}
    if feature == "window":
        sides = st.tuples(st.one_of(st.none(), st.integers(1, 8)), st.one_of(st.none(), st.integers(0, 8)))
        return {"window": draw(sides)}
    if feature == "mask":
        seen = rng.random((B, H, T, S)) < draw(st.sampled_from((0.2, 0.8)))
        return {"mask": ~seen if drop else seen}
    if feature == "bias":
        return {"bias": numbers(rng, (B, H, T, S), kind)}
    if feature == "slopes":
        return {"slopes": 2.0 ** -rng.integers(0, 6, H)}
    if feature == "sink":
        return {"sink": numbers(rng, (H,), kind)}
    if feature == "softcap":
        return {"softcap": draw(st.sampled_from((0.5, 4.0)))}
    if feature == "lengths":
        return {"lengths": rng.integers(0, S + 1, B)}
    cuts = draw(st.integers(1, 3))
    starts = tuple(np.r_[0, np.sort(rng.integers(0, n + 1, cuts - 1)), n].astype(np.int64) for n in (T, S))
    q, k, v = (x[:1] for x in (call.q, call.k, call.v))
    return {"starts": starts, "q": q, "k": k, "v": v}


def _said(profile: Profile, call: Call, **more: Any) -> Call:
    """Return the call with more, where the profile has words for that, and as it is elsewhere."""
    try:
        longer = replace(call, **more)
    except ValueError:  # such things exclude each other
        return call
    return call if sayable(profile, longer) is None else longer
