"""One method beside exact softmax attention, as a picture: fifty points in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import _check, softmax
from refattn.method import Method
from refattn.study._exact import References
from refattn.study._sweep import (
    Inputs,
    Problem,
    Sweep,
    chosen,
    needed,
    options_of,
    sources,
)

Array = NDArray[np.float64]

POINTS = 50
TURNS = 2.0
UNSEEN = "0.88"
"""The grey of weights that are exactly 0."""
WEIGHT = "weight (grey: exactly 0; scale of square roots)"
SIGNED_WEIGHT = "weight (white: 0; scale of square roots)"


class Shown(NamedTuple):
    """What a picture shows, as arrays; T = S = 50 and v has one column.

    Parameters
    ----------
    name : str
        The method.
    options : str
        Its budget, the options that it must be given, and those that were given.
    causal : bool
        Whether the method is causal whatever the mask; then so is the exact matrix.
    v : (S,)
        The values.
    exact, weights : (T, S)
        The matrices that multiply v. Memformer's answer is no matrix times v: its weights are (T, slots).
    difference : (T, S) or None
        weights − exact; None where their columns do not mean the same.
    o_exact, o : (T,)
        The outputs.
    bound : (T,) or None
        What o is proved to be from o_exact at most; None where nothing is claimed of these arrays.
    """

    name: str
    options: str
    causal: bool
    v: Array
    exact: Array
    weights: Array
    difference: Array | None
    o_exact: Array
    o: Array
    bound: Array | None

    @property
    def title(self) -> str:
        """The method and its options."""
        return ", ".join(filter(None, (self.name, self.options)))

    @property
    def numbers(self) -> str:
        """The largest error and the largest bound in words."""
        error = f"largest error {np.abs(self.o - self.o_exact).max():.3g}"
        return f"{error}, " + ("no bound" if self.bound is None else f"largest bound {self.bound.max():.3g}")


def show(
    name: str, path: str | PathLike[str] | IO[bytes], *, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Shown:
    r"""Draw one method beside exact attention, on fifty points of a spiral, as a PNG.

    The points are queries and keys at once, ordered along two turns of a spiral about the origin whose radius grows
    from 0.8 to 2, moved by normal noise of 0.05; logits are :math:`x_i \cdot x_j / \sqrt 2`, between −2.9 and 2.9. A
    point so attends to its neighbours, to those a turn before or after it, and most to those that are far out, while
    the innermost rows are nearly flat. The values are a wave along the curve with noise, at most about 1.

    The picture has the exact matrix, which is causal softmax where the method is causal whatever the mask; the method's
    matrix, on the same scale of colours where no weight is negative; their difference; and the outputs, with the proved
    bound as a band about the method's output, within which the exact output lies. Grey is a weight of exactly 0, such
    as that of a pair that is not seen. Memformer's matrix is how each row reads the slots, and has no difference.

    Parameters
    ----------
    name : str
        A method of the table that belongs to a family.
    path : str, path or binary file
        Where the PNG goes.
    seed : int
        Seeds the points, the values and what the method draws.
    options : mapping, optional
        Options of the method's `attend` or `draw`. Others are at their defaults; without one, the budget takes the
        middle of its typical values at these sizes and any other option its first.

    Returns
    -------
    Shown
        The arrays.

    Raises
    ------
    ValueError, TypeError
        An unknown method; an option that it does not have; a value that is not allowed.

    Examples
    --------
    >>> import io
    >>> from refattn import study
    >>> shown = study.show("longformer", io.BytesIO(), options={"window": 4})
    >>> shown.title
    'longformer, window=4'
    >>> bool((np.abs(shown.o - shown.o_exact) <= shown.bound).all())
    True
    """
    shown = compute(name, seed, options or {})
    figure(shown).savefig(path, format="png", dpi=120)
    return shown


def example(rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the points (T, 2) and the values (T, 1) that `show` describes."""
    along = np.linspace(0.0, 1.0, POINTS)
    angle, radius = 2 * np.pi * TURNS * along, 0.8 + 1.2 * along
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    wave = 0.8 * np.sin(3 * np.pi * along + 0.5)
    return points + 0.05 * rng.standard_normal((POINTS, 2)), (wave + 0.1 * rng.standard_normal(POINTS))[:, None]


def problem(name: str, seed: int, options: Mapping[str, Any]) -> tuple[Inputs, Problem]:
    """Return the checked example, and the method's problem with its options and what it drew."""
    known = {module.METHOD.name: module for module in chosen(None)}
    module = known[_check.choice("name", name, tuple(known))]
    rng = np.random.default_rng(_check.integer("seed", seed, 0))
    points, v = example(rng)
    inputs = Inputs(points, points, v)
    sweep = _sweep(module, options, inputs.sizes)
    return inputs, inputs.problem(sweep, 0, inputs.draw(sweep, 0, rng))


def compute(name: str, seed: int, options: Mapping[str, Any]) -> Shown:
    """Return what `show` draws."""
    with np.errstate(all="ignore"):  # the picture shows what is not finite
        inputs, one = problem(name, seed, options)
        declared, q, k, v = one.sweep.declared, *(one.arrays[name] for name in "qkv")
        bound, references = one.bound(), References(inputs)
        exact = softmax.weights(q, k, mask=references.seen(declared))
        weights = one.weights()
        return Shown(
            name=declared.name,
            options=", ".join(f"{s}={one.sweep.options[s]}" for s in options_of(declared) if s in one.sweep.options),
            causal=declared.causal,
            v=v[:, 0],
            exact=exact,
            weights=weights,
            difference=weights - exact if "v" in declared.linear_in else None,
            o_exact=references.of(one).o[:, 0],
            o=one.attend()[:, 0],
            bound=None if bound is None else bound[:, 0],
        )


def _sweep(module: ModuleType, given: Mapping[str, Any], sizes: Mapping[str, int]) -> Sweep:
    """Return the method with the options given and, where they must be chosen, typical ones."""
    declared: Method = module.METHOD
    known = options_of(declared)
    for name in given:
        if name not in known:
            allowed = f"one of {', '.join(map(repr, known))}" if known else f"none, as {declared.name} takes no options"
            raise ValueError(f"options has {name!r}; expected {allowed}")
    budget = dict[str, Any]()
    if declared.budget is not None:
        typical = known[declared.budget].values(sizes)
        budget[declared.budget] = typical[len(typical) // 2]
    options = needed(declared, sizes) | budget | dict(given)
    return Sweep(declared.name, module, None, options, sources(module)[0])


def figure(shown: Shown) -> Any:
    """Return the figure: the matrices above, the outputs below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole: Any = Figure(figsize=(11.0, 7.8), layout="constrained")
    FigureCanvasAgg(whole)
    whole.suptitle(f"{shown.title}\n{shown.numbers}", parse_math=False)
    above, below = whole.subfigures(2, 1, height_ratios=(7, 4))
    _matrices(above, shown)
    _outputs(below, shown)
    return whole


def _matrices(part: Any, shown: Shown) -> None:
    from matplotlib.ticker import MaxNLocator

    title, name, below = f"exact {'causal ' * shown.causal}softmax", shown.name, {"location": "bottom", "aspect": 30}
    if shown.difference is None:
        exact, own = part.subplots(1, 2)
        images = _image(exact, title, shown.exact, "key"), _image(own, f"{name}: reads", shown.weights, "slot")
        own.set(aspect="auto", box_aspect=1)
        for image in images:
            weighted(image, largest(np.asarray(image.get_array())))
            part.colorbar(image, ax=image.axes, shrink=0.9, label=WEIGHT)
        return
    exact, own, apart = part.subplots(1, 3)
    images = _image(exact, title, shown.exact, "key"), _image(own, name, shown.weights, "key")
    signed, top = bool((shown.weights < 0).any()), max(largest(shown.exact), largest(shown.weights))
    for image in images:
        weighted(image, top, signed)
    part.colorbar(images[0], ax=[exact, own], shrink=0.7, label=SIGNED_WEIGHT if signed else WEIGHT, **below)
    third, most = _image(apart, f"{name} − exact", shown.difference, "key"), largest(shown.difference)
    third.set(cmap="RdBu_r", clim=(-most, most))
    part.colorbar(third, ax=apart, label="difference of weights", ticks=MaxNLocator(5), **below | {"aspect": 20})


def _image(axes: Any, title: str, x: Array, along: str) -> Any:
    """Draw a matrix, row 0 at the top."""
    image = axes.imshow(x, interpolation="nearest")
    axes.set_title(title, parse_math=False)
    axes.set(xlabel=along, ylabel="row")
    return image


def weighted(image: Any, top: float, signed: bool = False, unseen: str = UNSEEN) -> None:
    """Colour weights by their roots: else the first rows of causal attention, whose weights are large, hide all."""
    from matplotlib import colormaps
    from matplotlib.colors import FuncNorm, PowerNorm

    if signed:
        image.set(cmap="PuOr_r", norm=FuncNorm((_root, _square), -top, top))
        return
    image.set(cmap=colormaps["viridis"].with_extremes(bad=unseen), norm=PowerNorm(0.5, 0.0, top))
    image.set_data(np.ma.masked_equal(image.get_array(), 0.0))


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


def largest(x: Array) -> float:
    """Return the largest absolute value that is finite, or 1 where there is none above 0."""
    top = float(np.max(np.abs(x), where=np.isfinite(x), initial=0.0))
    return top or 1.0


def _outputs(part: Any, shown: Shown) -> None:
    """Draw the outputs; the axis holds the values, and bounds and answers that go far beyond leave it."""
    axes: Any = part.subplots()
    rows, own = np.arange(len(shown.o)), "C1"
    low, high = _limits(shown)
    if shown.bound is not None:
        edges = (np.clip(shown.o + sign * shown.bound, low, high) for sign in (-1, 1))
        axes.fill_between(rows, *edges, color=own, alpha=0.2, linewidth=0, label=f"{shown.name} ± proved bound")
    axes.plot(rows, shown.v, ".", color="0.6", markersize=5, label="values v")
    axes.plot(rows, shown.o_exact, color="black", linewidth=2.0, label="exact output")
    axes.plot(rows, shown.o, color=own, linewidth=2.0, linestyle=(0, (4, 1.5)), label=f"output of {shown.name}")
    axes.set(xlabel="row", ylabel="output", xlim=(-0.5, len(rows) - 0.5), ylim=(low, high))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    part.legend(loc="outside lower center", ncols=4, frameon=False)


def _limits(shown: Shown) -> tuple[float, float]:
    """Return an axis of all values and exact outputs, and of the rest where it is at most their width outside."""
    sure = np.concatenate([shown.v, shown.o_exact])
    low, high = float(sure.min()), float(sure.max())
    room, width = 0 if shown.bound is None else shown.bound, high - low
    rest = np.concatenate([sure, shown.o - room, shown.o + room])
    rest = np.clip(rest[np.isfinite(rest)], low - width / 2, high + width / 2)
    pad = 0.05 * float(np.ptp(rest))
    return float(rest.min()) - pad, float(rest.max()) + pad
