r"""Known classes of bugs of the backward pass, each as a change of how gradients are made.

.. math::
    D_i = \langle do_i, o_i \rangle - dlse_i, \quad ds_{ij} = p_{ij} (\langle do_i, v_j \rangle - D_i), \quad
    dv_j = \sum_i p_{ij} do_i, \quad dq_i = \sigma \sum_j ds_{ij} k_j, \quad dk_j = \sigma \sum_i ds_{ij} q_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from refattn.conventions import Call, Convention
from refattn.testing import _changes, _logit_changes
from refattn.testing._changes import TILES, given
from refattn.testing._written import LN2, Floats, Written, key_heads, summed, write

Gradients = dict[str, Floats]


@dataclass(frozen=True, eq=False)
class Pass:
    """The backward pass written out, with what a change may replace; None is what is right."""

    call: Call
    w: Written
    do: Floats
    dlse: Floats
    p: Floats
    p_of_v: Floats | None = None
    delta: Floats | None = None
    slope: Floats | None = None
    factors: Mapping[str, float] = field(default_factory=dict[str, float])
    fold: str = "sum"
    rows: Any = None
    keys: Any = None

    @cached_property
    def do_o(self) -> Floats:
        """Do·o of each row."""
        return (self.do * np.nan_to_num(self.w.outcome().o)).sum(-1)

    @cached_property
    def right_slope(self) -> Floats:
        """The softcap's slope."""
        w = self.w
        if w.softcap is None:
            return np.ones(1)
        s = w.scale * w.raw + (w.bias if w.order == "bias, softcap" else 0.0)
        return 1 - np.tanh(s / w.softcap) ** 2

    def gradients(self) -> Gradients:
        """Return the gradients in the call's shapes, by argument name."""
        w, delta = self.w, self._delta
        k, v = (np.where(np.isfinite(x), x, 0.0) for x in (w.k, w.v))
        ds = self.p * (self.do @ v.mT - delta[..., None])
        dz = np.where(self.p > 0, ds * (self.right_slope if self.slope is None else self.slope), 0.0)
        out = self._products(ds if w.order == "softcap, bias" else dz, dz, w.q, k, self.do)
        if w.sink is not None:
            out["sink"] = self._of_sink(-np.exp(w.sink[..., None] - w.normaliser) * delta)
        return {name: x * self.factors.get(name, 1.0) for name, x in out.items()}

    def sizes(self) -> Gradients:
        """Return the sums of absolute terms that gradients are made of: what rounding errors are in proportion to."""
        w, delta = self.w, np.abs(self.do_o) + np.abs(self.dlse)
        k, v = (np.abs(np.where(np.isfinite(x), x, 0.0)) for x in (w.k, w.v))
        ds = self.p * (np.abs(self.do) @ v.mT + delta[..., None])
        out = self._products(ds, ds, np.abs(w.q), k, np.abs(self.do))
        if w.sink is not None:
            out["sink"] = self._of_sink(np.exp(w.sink[..., None] - w.normaliser) * delta)
        return {name: np.abs(x * self.factors.get(name, 1.0)) for name, x in out.items()}

    @property
    def _delta(self) -> Floats:
        return self.do_o - self.dlse if self.delta is None else self.delta

    def _products(self, ds: Floats, dz: Floats, q: Floats, k: Floats, do: Floats) -> Gradients:
        (T, S), scale = self.call.sizes, self.w.scale
        rows = np.ones(T, np.bool_) if self.rows is None else self.rows
        keys = np.ones(S, np.bool_) if self.keys is None else self.keys
        found = {
            "q": scale * (dz * keys) @ k,
            "k": scale * (dz * rows[:, None]).mT @ q,
            "v": (self.p if self.p_of_v is None else self.p_of_v).mT @ do,
            "bias": ds,
        }
        return {name: self._folded(name, x) for name, x in found.items() if _has(self.call, name)}

    def _of_sink(self, terms: Floats) -> Floats:
        return _summed(terms.sum(-1), np.shape(self.call.sink))

    def _folded(self, name: str, x: Floats) -> Floats:
        """Return a gradient in the shape of its argument: summed over the query heads that read a key head."""
        like = np.shape(getattr(self.call, name))
        if name in "kv" and x.shape[-3] != (few := like[-3] if len(like) > 2 else 1):
            out = np.zeros((*x.shape[:-3], few, *x.shape[-2:]))
            own = key_heads(x.shape[-3], few, self.w.convention)
            for h, at in enumerate(own):
                if (
                    self.fold == "sum"
                    or h == {"first": np.flatnonzero(own == at)[0], "last": np.flatnonzero(own == at)[-1]}[self.fold]
                ):
                    out[..., at, :, :] += x[..., h, :, :]
            x = out
        return _summed(x, like)


@dataclass(frozen=True)
class GradientChange:
    """One thing that a backward pass may do otherwise: its class, what it does, and the changed pass."""

    kind: str
    said: str
    make: Callable[[Pass], Pass]
    rank: int = 1


OF = {"sink": "backward sink", "bias": "backward bias", "v": "backward values"}
"""By argument: the class of what is wrong with its whole gradient."""
Of: TypeAlias = tuple[tuple[str, Callable[[Pass], Floats]], ...]


def backward(call: Call, convention: Convention, do: Any, dlse: Any) -> Pass:
    """Return the right backward pass."""
    w = write(call, convention)
    do = np.asarray(do, np.float64).reshape(w.v.shape[:-2] + (w.q.shape[-2], w.v.shape[-1]))
    dlse = np.zeros(do.shape[:-1]) if dlse is None else np.asarray(dlse, np.float64).reshape(do.shape[:-1])
    dlse = np.where(w.empty, 0.0, dlse / LN2 if convention.lse == "bits" else dlse)
    return Pass(call, w, do, dlse, _weights(w, w))


def changes(right: Pass) -> Iterator[GradientChange]:
    """Yield changes of the backward pass."""
    yield from _recomputed(right)
    for names, words in ((("q", "k"), "q and k"), (("q",), "q"), (("k",), "k")):
        for factor, what in ((1 / right.w.scale, "does not scale"), (right.w.scale, "scales twice")):
            factors = dict.fromkeys(names, factor)
            yield GradientChange(
                "backward scale", f"{what} the gradients of {words}", given(factors, lambda x, f: replace(x, factors=f))
            )
    width = right.do.shape[-1]
    deltas: Of = (
        ("does not subtract do·o", lambda x: -x.dlse),
        ("adds do·o", lambda x: -x.do_o - x.dlse),
        ("divides do·o by the width of v", lambda x: x.do_o / width - x.dlse),
        (
            "takes o without its division by the row sum for do·o",
            lambda x: x.do_o * np.exp(np.nan_to_num(x.w.normaliser - x.w.top)) - x.dlse,
        ),
    )
    for said, of in deltas:
        yield GradientChange("backward delta", said, given(of, lambda x, f: replace(x, delta=f(x))))
    through: Of = (
        ("ignores the gradient that comes in through lse", lambda x: x.do_o),
        ("subtracts the gradient that comes in through lse", lambda x: x.do_o + x.dlse),
        ("takes the gradient that comes in through lse as if lse were in bits", lambda x: x.do_o - x.dlse / LN2),
        ("takes the gradient that comes in through lse ln 2 times", lambda x: x.do_o - x.dlse * LN2),
    )
    for said, of in through:
        yield GradientChange("backward lse", said, given(of, lambda x, f: replace(x, delta=f(x))))
    yield from _values(right)
    if right.w.softcap is not None:
        slopes: Of = (
            ("leaves out the slope of the softcap", lambda x: np.ones(1)),
            ("takes 1 − tanh for the slope of the softcap", lambda x: 1 - np.sqrt(1 - x.right_slope)),
            ("takes the slope of the softcap twice", lambda x: x.right_slope**2),
        )
        for said, of in slopes:
            yield GradientChange("backward softcap", said, given(of, lambda x, f: replace(x, slope=f(x))))
    for which in ("first", "last"):
        said = f"keeps the {which} query head's share of a key head's gradients, not the sum"
        yield GradientChange("backward heads", said, given(which, lambda x, f: replace(x, fold=f)))
    yield from _tiles(right)
    for name in ("sink", "bias", "q", "k", "v"):
        if _has(right.call, name):
            for factor, words in (
                (-1.0, "has the gradient of {} with the other sign"),
                (0.0, "leaves the gradient of {} 0"),
                (2.0, "counts the gradient of {} twice"),
            ):
                kind = OF.get(name, "backward scale")
                yield GradientChange(
                    kind, words.format(name), given(name, factor, lambda x, n, f: replace(x, factors={n: f}))
                )


def fitted(right: Pass, actual: Mapping[str, Any]) -> Iterator[GradientChange]:
    """Yield a factor for each gradient, and for each row the number in place of do·o, that are nearest."""
    plain = right.gradients()
    heads, few = right.w.q.shape[-3], np.shape(right.call.k)[-3] if np.ndim(right.call.k) > 2 else 1
    factors = dict[str, float]()
    for name, x in actual.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.asarray(x, np.float64) / plain[name]
        ratios = ratios[np.isfinite(ratios)]
        factors[name] = float(np.median(ratios)) if len(ratios) else 1.0
    words = ", ".join(f"{name}'s by {x:.5g}" for name, x in factors.items())
    shared = heads > few and abs(factors.get("k", 1.0) * heads / few - 1) < 2.0**-10
    kind = "backward heads" if shared else "backward scale"
    yield GradientChange(kind, f"multiplies gradients: {words}", given(factors, lambda x, f: replace(x, factors=f)), 2)
    if "q" in actual:
        none, one = (replace(right, delta=np.full(right.dlse.shape, d)).gradients()["q"] for d in (0.0, 1.0))
        slope = none - one
        with np.errstate(divide="ignore", invalid="ignore"):
            delta = ((none - np.asarray(actual["q"], np.float64)) * slope).sum(-1) / (slope**2).sum(-1)
        delta = np.where(np.isfinite(delta), delta, 0.0).reshape(right.dlse.shape)
        said = "has another number than do·o in each row"
        yield GradientChange("backward delta", said, given(delta, lambda x, d: replace(x, delta=d)), 2)


def _weights(w: Written, lse_of: Written) -> Floats:
    """Return exp(s − lse), of one problem's logits and another's lse."""
    lse = lse_of.normaliser
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(w.seen, np.exp(w.logits - np.where(np.isfinite(lse), lse, np.inf)[..., None]), 0.0)


def _recomputed(right: Pass) -> Iterator[GradientChange]:
    """Yield each change of what is seen and of logits as one of the backward pass alone."""
    how = right.w.convention
    for change in (*_changes.seeing(right.call, how), *_logit_changes.logits(right.call, how), *_axes(right.call, how)):
        if change.kind in BACKWARD:
            said = f"recomputes weights otherwise than the forward pass: it {change.said}"
            yield GradientChange(BACKWARD[change.kind], said, given(change.make, lambda x, f: _again(x, f)))


def _axes(call: Call, convention: Convention) -> Iterator[_changes.Change]:
    if call.causal or call.slopes is not None:
        other = "top-left" if convention.rows == "bottom-right" else "bottom-right"
        kind, words = _changes.AXES["rows"]
        yield _changes.Change(kind, words[other], lambda w: write(call, replace(convention, rows=other)))


BACKWARD = {
    "causal alignment": "backward causal",
    "causal diagonal": "backward causal",
    "causal ignored": "backward causal",
    "causal direction": "backward causal",
    "row positions": "backward causal",
    "window size": "backward window",
    "window ignored": "backward window",
    "window sentinel": "backward window",
    "mask ignored": "backward mask",
    "mask broadcast": "backward mask",
    "lengths": "backward mask",
    "packing": "backward mask",
    "softcap": "backward softcap",
    "bias": "backward bias",
    "ALiBi": "backward bias",
    "scale": "backward scale",
    "sink": "backward sink",
}
"""By class: the same of the backward pass."""


def _again(x: Pass, make: Callable[[Written], Any]) -> Pass:
    made = make(x.w)
    return replace(x, p=_weights(made, x.w)) if isinstance(made, Written) else x


def _values(right: Pass) -> Iterator[GradientChange]:
    s = right.w.masked
    said = "does not divide the weights of v's gradient by the row sum"
    for words, top in (("", right.w.top), (", beside the maximum of each tile of {}", None)):
        for t in (0,) if top is not None else TILES:
            if t < s.shape[-1]:
                yield GradientChange(
                    "backward values",
                    said + words.format(t),
                    given(top, t, lambda x, m, t: replace(x, p_of_v=_bare(s, m, t))),
                )
    yield GradientChange(
        "backward values",
        "takes the row sum twice in v's gradient",
        lambda x: replace(x, p_of_v=x.p * np.exp(-np.nan_to_num(summed(s) - x.w.top))[..., None]),
    )


def _bare(s: Floats, top: Floats | None, t: int) -> Floats:
    if top is None:
        tops = [s[..., n : n + t].max(-1) for n in range(0, s.shape[-1], t)]
        top_of = np.repeat(np.stack(tops, -1), t, -1)[..., : s.shape[-1]]
    else:
        top_of = top[..., None]
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(s), 0.0, np.exp(s - top_of))


def _tiles(right: Pass) -> Iterator[GradientChange]:
    T, S = right.call.sizes
    for t in TILES:
        if t < T:
            for said, rows in (
                (f"keeps the last tile of {t} rows' share of the gradient of k", np.arange(T) >= (T - 1) // t * t),
                (f"keeps the first tile of {t} rows' share of the gradient of k", np.arange(T) < t),
                (f"drops the last {T % t} rows in the gradient of k", np.arange(T) < T - T % t),
            ):
                yield GradientChange("backward tiles", said, given(rows, lambda x, r: replace(x, rows=r)))
        if t < S:
            for said, keys in (
                (f"keeps the last tile of {t} keys' share of the gradient of q", np.arange(S) >= (S - 1) // t * t),
                (f"keeps the first tile of {t} keys' share of the gradient of q", np.arange(S) < t),
                (f"drops the last {S % t} keys in the gradient of q", np.arange(S) < S - S % t),
            ):
                yield GradientChange("backward tiles", said, given(keys, lambda x, r: replace(x, keys=r)))


def _has(call: Call, name: str) -> bool:
    return getattr(call, name) is not None


def _summed(x: Floats, shape: tuple[int, ...]) -> Floats:
    """Return a gradient summed over the axes that its array was broadcast along."""
    x = x.sum(tuple(range(max(x.ndim - len(shape), 0)))) if x.ndim > len(shape) else x
    for axis, n in enumerate(shape):
        if n == 1 and x.shape[axis] != 1:
            x = x.sum(axis, keepdims=True)
    return x
