"""Attention kernels of a stated arithmetic, emulated: right by construction, and as inaccurate as the statement allows.

Every number is a float64 that is rounded to the format that the arithmetic names, after each operation; a tile of keys
at a time with a running maximum, or all keys at once where P is normalised before it is cast. What a statement leaves
open (the order of sums, fused products, flushed results, errors of exp) is drawn from `rng`, or as plain as possible.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines
from refattn.bias import Alibi, Bias, BiasLike, Table
from refattn.engines import One, Order
from refattn.heads import matrix
from refattn.masks import MaskLike
from refattn.partial import Partial
from refattn.softmax import Gradients
from refattn.testing._arithmetic import Arithmetic, arithmetic_of
from refattn.testing._backward import flat
from refattn.testing._formats import Format

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Summation = Literal["forward", "reversed", "pairwise", "tree"]


def attend(
    arithmetic: Arithmetic | str,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias: BiasLike = None,
    sink: ArrayLike | None = None,
    softcap: float | None = None,
    order: Order = "softcap, bias",
    mask: MaskLike = None,
    scale: float | None = None,
    summation: Summation = "forward",
    tile: int | None = None,
    splits: int = 1,
    rng: np.random.Generator | None = None,
) -> Partial:
    """Return o and lse as a kernel of the arithmetic computes them.

    Parameters
    ----------
    arithmetic : Arithmetic or str
        What is computed in, or the name of a preset.
    q, k, v, bias, sink, softcap, order, mask, scale
        `refattn.softmax.attend`'s.
    summation : {"forward", "reversed", "pairwise", "tree"}
        The order of every sum, and of the tiles; a tree has lanes of terms in a random order, as a BLAS has.
    tile : int, optional
        Keys between two updates of the running maximum: the arithmetic's own, or 16.
    splits : int
        Into how many parts the keys are split, whose results are merged.
    rng : Generator, optional
        Draws what the arithmetic leaves open.

    Returns
    -------
    Partial
        o (..., T, E) and lse (..., T) in float64, each number one of its format.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit, or that contradict the arithmetic, naming them.

    Examples
    --------
    >>> from refattn.testing import emulate
    >>> x = np.array([[0.5], [1.0]])
    >>> emulate.attend("bf16", x, x, x).o
    array([[0.78125   ],
           [0.80859375]])
    """
    chosen = arithmetic_of(arithmetic)
    call = engines.problem(q, k, v, bias=bias, sink=sink, softcap=softcap, order=order, mask=mask, scale=scale)
    T, _, _, E = call.sizes
    o, lse = np.zeros((*call.leads.shape, T, E)), np.full((*call.leads.shape, T), -np.inf)
    with np.errstate(all="ignore"):
        for n, one in enumerate(call.all()):
            kernel = _Kernel(chosen, one, summation, tile, splits, rng)
            matrix(o, n)[:], flat(lse, 1)[n] = kernel.forward()
    return Partial(o, lse)


def vjp(
    arithmetic: Arithmetic | str,
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    dlse: ArrayLike | None = None,
    bias: BiasLike = None,
    sink: ArrayLike | None = None,
    softcap: float | None = None,
    order: Order = "softcap, bias",
    mask: MaskLike = None,
    scale: float | None = None,
    summation: Summation = "forward",
    tile: int | None = None,
    splits: int = 1,
    rng: np.random.Generator | None = None,
) -> Gradients:
    """Return the gradients of ⟨do, o⟩ + ⟨dlse, lse⟩ as a kernel of the arithmetic computes them.

    Arguments are `attend`'s and `refattn.softmax.vjp`'s. P is computed again from the logits and the kernel's own lse,
    or, where it is normalised before the cast, it is the forward's.

    Examples
    --------
    >>> from refattn.testing import emulate
    >>> x = np.array([[0.5], [1.0]])
    >>> emulate.vjp("bf16", x, x, x, x).v
    array([[0.59375   ],
           [0.90234375]])
    """
    chosen = arithmetic_of(arithmetic)
    call = engines.problem(q, k, v, bias=bias, sink=sink, softcap=softcap, order=order, mask=mask, scale=scale)
    T, _, _, E = call.sizes
    shape, f = call.leads.shape, chosen.formats
    do = _check.shaped("do", do, "T E", (*shape, T, E))
    dlse = np.zeros((*shape, T)) if dlse is None else _check.shaped("dlse", dlse, "T", (*shape, T))
    table = call.bias.array if isinstance(call.bias, Table) else None
    arrays = {"q": call.q, "k": call.k, "v": call.v, "bias": table, "sink": call.sink}
    out = {name: None if x is None else np.zeros(np.shape(x)) for name, x in arrays.items()}
    with np.errstate(all="ignore"):
        for n, one in enumerate(call.all()):
            kernel = _Kernel(chosen, one, summation, tile, splits, rng)
            cotangents = np.array(matrix(do, n), np.float64), np.array(matrix(dlse, n, 1), np.float64)
            for name, part in kernel.backward(*cotangents).items():
                total = out[name]
                assert total is not None
                shares, at = flat(total, np.ndim(part)), int(call.leads.of[name][n])
                shares[at] = f.accumulate.round(shares[at] + f.output.round(part))
    if out["bias"] is not None and not isinstance(bias, Bias):
        out["bias"] = out["bias"].reshape(np.asarray(bias).shape)
    return Gradients(**{name: None if x is None else f.output.round(x) for name, x in out.items()})


class _Kernel:
    """One problem in one arithmetic, with what it leaves open decided."""

    def __init__(
        self,
        arithmetic: Arithmetic,
        one: One,
        summation: str,
        tile: int | None,
        splits: int,
        rng: np.random.Generator | None,
    ) -> None:
        _check.choice("summation", summation, get_args(Summation))
        self.a, self.f, self.one, self.summation = arithmetic, arithmetic.formats, one, summation
        self.tile = _check.integer("tile", tile or arithmetic.tile or 16, 1)
        if arithmetic.tile is not None and self.tile < arithmetic.tile:
            raise ValueError(f"tile is {self.tile}; expected at least the arithmetic's own, {arithmetic.tile}")
        self.splits = _check.integer("splits", splits, 1)
        if splits > arithmetic.splits:
            raise ValueError(f"splits is {splits}; expected at most the arithmetic's own, {arithmetic.splits}")
        if summation == "tree" and rng is None:
            raise TypeError("rng is None; expected a numpy.random.Generator for summation='tree'")
        self.rng = rng
        self.fused, self.flush, self.inverse, self.folded, self.early = (
            (False,) * 5 if rng is None else (bool(x) for x in rng.random(5) < 0.5)
        )
        call = one.problem
        self.sigma = float(self.f.scores.round(np.array([call.multiplier]))[0])
        plain = call.bias is None and call.softcap is None and arithmetic.scale == "scores"
        self.folded = self.folded and plain and arithmetic.exp == "exp2" and self.f.stored_scores is None
        self.folded = self.folded and self.sigma > 0 and one.sink is None
        self.q, self.k, self.v = (self.operand(x) for x in (one.q, one.k, one.v))

    # --- numbers ------------------------------------------------------------------------------------------------------

    def operand(self, x: Any) -> Array:
        """Return what is multiplied: cast to `inputs`, then to `operands`."""
        x, f = self.f.inputs.round(np.asarray(x, np.float64)), self.f.operands
        if f is None:
            return x
        if not self.a.descale:
            return f.round(x)
        largest = np.abs(x[np.isfinite(x)]).max(initial=0.0)
        factor = float(np.float32(largest / f.largest)) if largest > 0 else 1.0
        return f.round(np.clip((x / factor).astype(np.float32).astype(np.float64), -f.largest, f.largest)) * factor

    def s(self, x: Array) -> Array:
        """Round to the scores' format."""
        return self.f.scores.round(x)

    def stored(self, x: Array) -> Array:
        """Round to what scores are stored in, if they are."""
        return x if self.f.stored_scores is None else self.f.stored_scores.round(x)

    def kept(self, x: Array, f: Format) -> Array:
        """Round as an accumulator does."""
        return chop(x, f) if self.a.truncates else f.round(x)

    def exp(self, x: Array, base: float = math.e) -> Array:
        """Return base^x with the error that the arithmetic grants; 1 at 0."""
        f, y = self.f.scores, np.exp2(x) if base == 2 else np.exp(x)
        if self.rng is not None:
            room = max(0.0, 2 * self.a.exp_ulp - 1 - 2.0**-20) * f.u - (2.0**-51 if f.bits == 53 else 0)
            y = y * (1 + max(room, 0.0) * self.rng.choice([-1.0, 1.0], y.shape))
        y = np.where(x == 0, 1.0, f.round(y))
        return np.where(y < f.tiny, 0.0, y) if self.flush else y

    def log(self, x: Array) -> Array:
        """Return ln x in the accumulator's format."""
        return self.f.accumulate.round(np.log(x))

    def sum(self, terms: Array, f: Format, start: Array | None = None) -> Array:
        """Sum along the first axis in the kernel's order, from products that are exact if they are fused."""
        terms = terms if self.fused and f.bits != 53 else f.round(terms)
        if len(terms) == 0:
            return np.zeros(terms.shape[1:]) if start is None else start
        if self.summation == "pairwise":
            total = self.pairs(f.round(terms), f)
        elif self.summation == "tree":
            assert self.rng is not None
            lanes = int(self.rng.choice([1, 2, 4, 8, 16]))
            terms = self.rng.permutation(terms, axis=0)
            rest = -len(terms) % lanes
            terms = np.concatenate([terms, np.zeros((rest, *terms.shape[1:]))])
            total = self.chain(self.chain(terms.reshape(-1, lanes, *terms.shape[1:]), f, None), f, None)
        else:
            terms = terms[::-1] if self.summation == "reversed" else terms
            if self.a.sums == "in place":
                return self.chain(terms, f, start)
            total = self.chain(terms, f, None)
        return total if start is None else self.kept(start + total, f)

    def chain(self, terms: Array, f: Format, start: Array | None) -> Array:
        """Add one term after the other."""
        total = np.zeros(terms.shape[1:]) if start is None else start
        for term in terms:
            total = self.kept(total + term, f)
        return total

    def pairs(self, terms: Array, f: Format) -> Array:
        """Add neighbours, then neighbouring sums."""
        while len(terms) > 1:
            odd = terms[-1:] if len(terms) % 2 else terms[:0]
            terms = np.concatenate([self.kept(terms[:-1:2] + terms[1::2], f), odd])
        return terms[0]

    def product(self, a: Array, b: Array, f: Format, start: Array | None = None) -> Array:
        """Return a @ b with every sum in the kernel's order."""
        return self.sum(a.T[:, :, None] * b[:, None, :], f, start)

    # --- logits -------------------------------------------------------------------------------------------------------

    def logits(self) -> tuple[Array, Array, Bools]:
        """Return logits, −inf where nothing is seen, the softcap's slope, and which pairs are seen."""
        call, f, T, S = self.one.problem, self.f, len(self.q), len(self.k)
        q, k, rows, keys = self.q, self.k, np.arange(T), np.arange(S)
        seen: Bools = np.ones((T, S), np.bool_)
        if self.one.pairs is not None:
            seen = self.one.pairs.seen(rows, keys)
        if self.a.scale == "q":
            q = f.scaled.round(self.s(q * self.sigma))
        elif self.a.scale == "q and k":
            root = float(self.s(np.sqrt(np.abs(np.array(self.sigma)))))
            q, k = (f.scaled.round(self.s(x * root)) for x in (q, k))
            q = q * np.sign(self.sigma)
        self.q_used, self.k_used = q, k
        z = self.stored(self.product(q, k.T, f.scores))
        slope = np.ones_like(z)
        if self.a.scale == "scores" and not self.folded:
            z = self.stored(self.s(z * self.sigma))
        b = self.bias(rows, keys)
        if b is not None:
            unseen: Bools = np.isneginf(b)
            seen = seen & ~unseen
        for step in call.order.split(", "):
            if step == "bias" and b is not None:
                z = self.stored(self.s(z + b))
            elif step == "softcap" and call.softcap is not None:
                c = call.softcap
                t = self.stored(self.tanh(self.stored(self.s(z / c))))
                slope, z = self.s(1 - self.s(t * t)), self.stored(self.s(t * c))
        return np.where(seen, z, -np.inf), slope, seen

    def tanh(self, x: Array) -> Array:
        """Return tanh with the error that the arithmetic grants."""
        y = np.tanh(x)
        if self.rng is not None:
            room = max(0.0, 2 * self.a.tanh_ulp - 2) * self.f.scores.u
            y = y * (1 + room * self.rng.choice([-1.0, 1.0], y.shape))
        return np.clip(self.s(y), -1.0, 1.0)

    def bias(self, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> Array | None:
        """Return the bias in the scores' format."""
        bias = self.one.problem.bias
        if isinstance(bias, Alibi):
            far = replace(bias, slopes=np.ones_like(bias.slopes)).block(self.one.bias_index, rows, keys)
            slope = np.broadcast_to(bias.slopes, bias.lead)[np.unravel_index(self.one.bias_index, bias.lead)]
            return self.s(self.s(slope) * far)
        b = self.one.bias(rows, keys)
        return None if b is None else self.s(np.asarray(b, np.float64))

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self) -> tuple[Array, Array]:
        """Return o and lse."""
        s, _, seen = self.logits()
        f = self.f
        self.empty: Bools = ~(seen.any(axis=1) | ~np.isneginf(self.sink()))
        if self.a.normalise == "before the cast":
            return self.at_once(s)
        starts = [s.shape[1] * n // self.splits for n in range(self.splits + 1)]
        parts = [
            self.online(s[:, i:j], seen[:, i:j], self.v[i:j], n == 0)
            for n, (i, j) in enumerate(zip(starts, starts[1:], strict=False))
        ]
        o, lse = parts[0] if len(parts) == 1 else self.merged(parts)
        return np.where(self.empty[:, None], 0.0, f.output.round(o)), np.where(self.empty, -np.inf, f.lse.round(lse))

    def at_once(self, s: Array) -> tuple[Array, Array]:
        """Return o and lse with the maximum and the sum known before P is cast."""
        f, sink = self.f, self.sink()
        m = np.maximum(s.max(axis=1, initial=-np.inf), sink)
        m = np.where(self.empty, 0.0, m)
        w = self.exp(self.s(s - m[:, None]))
        total = self.sum(np.c_[w, self.exp(self.s(sink - m))].T, f.accumulate)
        self.p = f.weights.round(self.s(w / np.where(self.empty, 1.0, total)[:, None]))
        o = f.output.round(self.product(self.p, self.clean(), f.accumulate))
        lse = f.lse.round(f.accumulate.round(m + self.log(total)))
        return np.where(self.empty[:, None], 0.0, o), np.where(self.empty, -np.inf, lse)

    def sink(self) -> Array:
        """Return the sink's logit for each row, −inf without one."""
        return self.s(np.full(len(self.q), -np.inf if self.one.sink is None else float(self.one.sink)))

    def clean(self) -> Array:
        """Return v without what is not finite: for pairs that are not seen."""
        return np.where(np.isfinite(self.v), self.v, 0.0)

    def online(self, s: Array, seen: Bools, v: Array, first: bool) -> tuple[Array, Array]:
        """Return o and lse of some keys, a tile at a time."""
        f, T, S = self.f, len(s), s.shape[1]
        m, total, acc = np.full(T, -np.inf), np.zeros(T), np.zeros((T, v.shape[1]))
        early = first and self.early
        if first and early:
            m = self.sink()
            total = np.where(np.isneginf(m), 0.0, 1.0)
        spans = [(i, min(i + self.tile, S)) for i in range(0, S, self.tile)]
        v = np.where(np.isfinite(v), v, 0.0)
        for i, j in spans[::-1] if self.summation == "reversed" else spans:
            m, total, acc = self.update(m, total, acc, s[:, i:j], seen[:, i:j], v[i:j])
        if first and not early and self.one.sink is not None:
            none = np.ones((T, 1), np.bool_)
            m, total, acc = self.update(m, total, acc, self.sink()[:, None], none, np.zeros((1, v.shape[1])), False)
        live = ~np.isneginf(m)
        below = np.where(live, total, 1.0)[:, None]
        one = f.accumulate.round(1 / below)
        o = f.accumulate.round(acc * one if self.inverse else acc / below)
        if self.folded:
            m = self.s(m * self.sigma)
        lse = np.where(live, f.accumulate.round(m + self.log(below[:, 0])), -np.inf)
        return np.where(live[:, None], o, 0.0), lse

    def update(
        self, m: Array, total: Array, acc: Array, s: Array, seen: Bools, v: Array, rounds: bool = True
    ) -> tuple[Array, Array, Array]:
        """Take a tile in."""
        a, f = self.a, self.f
        top = np.maximum(m, s.max(axis=1, initial=-np.inf))
        lazy = a.lazy / (self.sigma if self.folded else 1.0)
        top = np.where((top - m <= lazy) & ~np.isneginf(m), m, top)
        shift = np.where(np.isneginf(top), 0.0, top)
        if a.exp == "exp":
            factor = self.exp(self.s(m - shift))
            w = self.exp(self.s(s - shift[:, None]))
        else:
            c = float(self.s(np.array((self.sigma if self.folded else 1.0) * math.log2(math.e))))
            base = self.s(shift * c)
            w = self.exp(self.s(np.where(seen, s, -np.inf) * c - base[:, None]), 2)
            away = self.s(self.s(m - shift) * c) if self.inverse else self.s(self.s(m * c) - base)
            factor = self.exp(np.where(m == top, 0.0, away), 2)
        factor = np.where(np.isneginf(m), 0.0, np.where(m == top, 1.0, factor))
        w = np.where(seen, w, 0.0)
        cast = f.weights.round(w * a.weights_scale) / a.weights_scale if rounds else w
        total = f.accumulate.round(total * factor)
        summed = cast if a.row_sum == "rounded weights" else w
        fused, self.fused = self.fused, True  # its terms are no products
        total = self.sum(summed.T, f.accumulate, total)
        self.fused = fused
        acc = f.accumulate.round(acc * factor[:, None])
        return top, total, self.product(cast, v, f.accumulate, acc)

    def merged(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        """Merge results over parts of the keys."""
        f = self.f.accumulate
        top: Array = np.maximum.reduce([lse for _, lse in parts])
        shift = np.where(np.isneginf(top), 0.0, top)
        weights = [np.where(np.isneginf(lse), 0.0, self.exp(f.round(lse - shift))) for _, lse in parts]
        total, acc = np.zeros(len(top)), np.zeros(parts[0][0].shape)
        for w, (o, _) in zip(weights, parts, strict=True):
            total, acc = f.round(total + w), f.round(acc + f.round(w[:, None] * o))
        below = np.where(np.isneginf(top), 1.0, total)
        return f.round(acc / below[:, None]), f.round(shift + self.log(below))

    # --- backward -----------------------------------------------------------------------------------------------------

    def backward(self, do: Array, dlse: Array) -> dict[str, Array]:
        """Return the gradients by argument name, in the accumulator's format."""
        a, f, call = self.a, self.f, self.one.problem
        o, lse = self.forward()
        s, slope, seen = self.logits()
        do = np.where(np.logical_or.reduce(seen, axis=1, keepdims=True), do, 0.0)
        mult = self.operand(do)
        v = self.clean()
        g = np.where(seen, self.stored(self.product(mult, v.T, f.scores)), 0.0)
        shift = np.where(np.isneginf(lse), 0.0, lse)
        if a.normalise == "before the cast":
            p = self.p
        elif a.exp == "exp":
            p = self.exp(self.s(s - shift[:, None]))
        else:
            c = float(self.s(np.array((self.sigma if self.folded else 1.0) * math.log2(math.e))))
            base = self.s(shift * float(self.s(np.array(math.log2(math.e)))))
            p = self.exp(self.s(np.where(seen, s, -np.inf) * c - base[:, None]), 2)
        p = np.where(seen, p, 0.0)
        terms = p * g if a.delta == "weights" else do * o
        own = f.accumulate.round(dlse - self.sum(terms.T, f.accumulate))
        ds = np.where(seen, self.s(p * self.s(g + own[:, None])), 0.0)
        dz = self.s(ds * slope) if call.softcap is not None else ds
        fed = f.weights.round(dz)
        if f.stored_scores is not None:
            fed = self.stored(dz)
        k, q = np.where(np.isfinite(self.k), self.k, 0.0), np.where(np.isfinite(self.q), self.q, 0.0)
        sigma = self.sigma
        if f.stored_scores is not None and a.scale == "scores":
            fed, sigma = self.stored(self.s(fed * sigma)), 1.0
        out = {
            "q": self.blocks(fed, k, sigma, 1),
            "k": self.blocks(fed.T, q, sigma, 0),
            "v": self.blocks(f.weights.round(p).T, np.where(np.isfinite(mult), mult, 0.0), 1.0, 0),
        }
        if isinstance(call.bias, Table):
            db = dz if call.order == "bias, softcap" else ds
            for axis in (0, 1):
                if call.bias.array.shape[-2 + axis] == 1:
                    db = np.expand_dims(self.sum(np.moveaxis(db, axis, 0), f.accumulate), axis)
            out["bias"] = db
        if self.one.sink is not None:
            each = self.s(self.exp(self.s(self.sink() - shift)) * own)
            out["sink"] = self.sum(each, f.accumulate)
        return out

    def blocks(self, a: Array, b: Array, factor: float, which: int) -> Array:
        """Return factor·(a @ b), added up in `output` block by block where gradients are stored."""
        f, stored = self.f, self.a.stored_gradients
        if stored is None:
            return f.accumulate.round(self.product(a, b, f.accumulate) * factor)
        total = np.zeros((len(a), b.shape[1]))
        for first in range(0, len(b), stored[which]):
            some = slice(first, first + stored[which])
            part = f.accumulate.round(self.product(a[:, some], b[some], f.accumulate) * factor)
            total = f.output.round(f.accumulate.round(total + part))
        return total


def chop(x: Array, f: Format) -> Array:
    """Return x without the digits that a format does not hold: rounded towards zero."""
    near = f.round(x)
    if f.bits == 53:
        return near
    return np.where(np.abs(near) > np.abs(x), f.round(near * (1 - f.u)), near)
