r"""How far a stated computation in floating point may be from the real number that it stands for.

The model is round to nearest, :math:`\mathrm{fl}(a \circ b) = (a \circ b)(1 + \delta)`, :math:`|\delta| \le u`, sums in
any order, with :math:`\gamma_n = n u / (1 - n u)`. A `Bounded` array carries a value and a bound on its error through
the verbs' own code; softmax attention and the linear engine have closed forms (statements F0–F2, B4, X1), which charge
the definition's order of operations: logits, one subtraction of the row maximum, exponentials, sums, one division.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check
from refattn._mix import mix, tiles
from refattn.bias import Bias, Table
from refattn.engines import One
from refattn.lifted import Lifted

U = 2.0**-53
"""Unit roundoff of float64."""
EXP = 2 * U
"""Hypothesis Hexp: NumPy's float64 exp and log are within one unit in the last place, and TINY.

The libraries and loops that NumPy uses stay near half a unit; `proofs/test_elementary.py` measures it.
"""
TANH = 8 * U
"""Hypothesis Hlibm: NumPy's other float64 functions are within four units in the last place, and TINY.

NumPy promises as much of its own loops; `proofs/test_elementary.py` measures those that verbs call: tanh, and sin and
cos, of which only an absolute error is taken, four units of 1.
"""
TINY = 2.0**-1073
"""Above what gradual underflow may add to one operation."""
LOST = 2 * TINY
"""Above what gradual underflow may add to a weight: to its exponential, then to its quotient."""
SMALL = 2**15
"""Pairs that are not worth splitting."""
EVALUATION = 1 + 2.0**-20
"""Covers the evaluation of a bound itself: sums of fewer than 2^31 terms that are not negative."""

Array = NDArray[np.float64]


def gamma(n: float, u: float = U) -> float:
    r"""Return :math:`\gamma_n = n u / (1 - n u)`, or ∞ where n·u ≥ 1 (F0).

    A sum of products in any order, with or without fma, is within γ_n of Σ|terms| if at most n roundings touch a term.

    >>> gamma(2, u=0.25)
    1.0
    """
    return n * u / (1 - n * u) if n * u < 1 else math.inf


class Bounded(Lifted):
    """Float64 values with a bound on how far each may be from the real number: running error analysis.

    `value` is what one run of the operations gave. The bound holds for every run, whatever the order of its sums, so
    another run is within twice the bound of this value.

    Parameters
    ----------
    value, error
        Arrays of one shape; `error` is not negative.

    Examples
    --------
    >>> third = Bounded.lift(1.0) / 3.0
    >>> bool(0 < third.error <= 2.0**-54)
    True
    """

    def __init__(self, value: ArrayLike, error: ArrayLike) -> None:
        """Hold a value with its error."""
        self.value: Array = np.asarray(value, np.float64)
        self.error: Array = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)
        self.shape = self.value.shape

    def __repr__(self) -> str:
        """Show both."""
        return f"Bounded({self.value!r}, {self.error!r})"

    @classmethod
    def lift(cls, x: Any) -> Self:
        """Return exact numbers with error 0; what float64 cannot hold is refused."""
        return x if isinstance(x, cls) else cls(np.asarray(_check.array("x", x, ""), np.float64), 0.0)

    def floats(self) -> Array:
        """Return the values."""
        return self.value

    @property
    def mT(self) -> Bounded:  # noqa: N802
        """The transpose."""
        return Bounded(self.value.T, self.error.T)

    def __getitem__(self, index: Any) -> Bounded:
        """Index both."""
        return Bounded(self.value[index], self.error[index])

    @classmethod
    def join(cls, parts: Sequence[Any], axis: int) -> Self:
        """Return arrays joined along an axis."""
        return cls(np.concatenate([x.value for x in parts], axis), np.concatenate([x.error for x in parts], axis))

    def sum(self, axis: int, keepdims: bool = False) -> Bounded:
        """Sum along an axis, in any order."""
        size = self.bulk()
        error = self.error.sum(axis, keepdims=keepdims) + gamma(self.shape[axis]) * size.sum(axis, keepdims=keepdims)
        return Bounded(self.value.sum(axis, keepdims=keepdims), error)

    def bulk(self) -> Array:
        """Bound the size of the real number and of every run."""
        size = np.abs(self.value)
        return size + 2 * self.error if self.error.any() else size

    def _add(self, other: Bounded) -> Bounded:
        value = self.value + other.value
        return Bounded(value, self.error + other.error + U * np.abs(value))

    def _negative(self) -> Bounded:
        return Bounded(-self.value, self.error)

    def _subtract(self, other: Bounded) -> Bounded:
        return self._add(other._negative())

    def _multiply(self, other: Bounded) -> Bounded:
        with np.errstate(invalid="ignore"):
            value = self.value * other.value
            carried = self.error * other.bulk() + self.bulk() * other.error
        # 0 for sure stays 0, even where nothing is known of the other: the gradient of what no row sees
        nothing = self._nothing() | other._nothing()
        return Bounded(np.where(nothing, 0.0, value), np.where(nothing, 0.0, carried + U * np.abs(value) + TINY))

    def _nothing(self) -> NDArray[np.bool_]:
        return (self.value == 0) & (self.error == 0)

    def _divide(self, other: Bounded) -> Bounded:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = self.value / other.value
            least = np.abs(other.value) - 2 * other.error
            error = (self.error + self.bulk() / (least + other.error) * other.error) / least
            error = error + U * (np.abs(value) + 2 * error) + TINY
        return Bounded(value, np.where(least > 0, error, np.inf))

    def _exp(self) -> Bounded:
        value = np.exp(self.value)
        with np.errstate(over="ignore", invalid="ignore"):
            grown = np.exp(self.error)
            return Bounded(value, (value + TINY) * grown * (np.expm1(self.error) + EXP * grown) + TINY)

    def _log(self) -> Bounded:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.log(self.value)
            error = np.log1p(self.error / (self.value - 2 * self.error))
            error = error + EXP * (np.abs(value) + 2 * error)
        return Bounded(value, np.where(2 * self.error < self.value, error, np.inf))

    def _sqrt(self) -> Bounded:
        with np.errstate(divide="ignore", invalid="ignore"):
            # |√a − √b| is |a − b| ÷ (√a + √b), where the real number is at least value − error
            value, error = np.sqrt(self.value), self.error / np.sqrt(self.value - self.error)
            error = np.where(self.error == 0, 0.0, error)
            return Bounded(value, np.where(2 * self.error <= self.value, error + U * (value + 2 * error), np.inf))

    def _sin(self) -> Bounded:
        return self._wave(np.sin)

    def _cos(self) -> Bounded:
        return self._wave(np.cos)

    def _wave(self, f: Callable[[Array], Array]) -> Bounded:
        with np.errstate(invalid="ignore"):  # of ∞ there is none
            return Bounded(f(self.value), np.where(np.isfinite(self.bulk()), np.minimum(self.error, 2) + TANH, np.inf))

    def _maximum(self, other: Bounded) -> Bounded:
        return Bounded(np.maximum(self.value, other.value), np.maximum(self.error, other.error))

    def _minimum(self, other: Bounded) -> Bounded:
        return Bounded(np.minimum(self.value, other.value), np.maximum(self.error, other.error))

    def _matmul(self, other: Bounded) -> Bounded:
        n = self.shape[-1]
        error = gamma(n) * (self.bulk() @ other.bulk()) + n * TINY
        if self.error.any():
            error = error + self.error @ other.bulk()
        if other.error.any():
            error = error + self.bulk() @ other.error
        return Bounded(self.value @ other.value, error)

    def softmax_forward(self, one: One) -> tuple[Bounded, Bounded]:
        """Return o and lse of exact attention with the definition's rounding: F1 and F2."""
        T, S, _, width = one.problem.sizes
        o, E, lse, E_lse = np.zeros((T, width)), np.zeros((T, width)), np.full(T, -np.inf), np.zeros(T)
        rows = np.arange(T)
        if one.pairs is not None and one.sink is None:  # the others answer 0
            rows = np.concatenate([x[one.pairs.seen(x, slice(None)).any(axis=1)] for x in tiles(rows, S)])
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite has no bound
            for some, keys in _parts(one, rows):
                o[some], E[some], lse[some], E_lse[some] = _Rows(one, some, keys).answer()
        return Bounded(o, E), Bounded(lse, E_lse)

    def softmax_backward(
        self, one: One, do: Any, dlse: Any
    ) -> tuple[Bounded, Bounded, Bounded, Bounded | None, Bounded | None]:
        """Return the gradients of exact attention with the definition's rounding: B4 for `refattn.softmax.vjp`."""
        with np.errstate(over="ignore", invalid="ignore"):  # where nothing is known `wide` is infinite
            return _backward(one, Bounded.lift(do), Bounded.lift(np.zeros(self.shape[0]) if dlse is None else dlse))

    def linear_forward(self, fq: Bounded, fk: Bounded | None, v: Any, seen: NDArray[np.bool_], eps: float) -> Bounded:
        """Return linear attention, in any of its orders: parallel, chunked, recurrent (X1)."""
        v = Bounded.lift(v)
        with np.errstate(over="ignore", invalid="ignore"):
            cut = tiles(np.arange(len(seen)), seen.shape[1])
            parts = [_linear(fq[rows], fk, v, seen[rows], eps)[0] for rows in cut]
        return Bounded(np.concatenate([x.value for x in parts]), np.concatenate([x.error for x in parts]))

    def linear_backward(
        self, fq: Bounded, fk: Bounded, v: Any, seen: NDArray[np.bool_], eps: float, do: Any
    ) -> tuple[Bounded, Bounded, Bounded]:
        """Return gradients with respect to φ(q), φ(k) and v, in any order of the sums."""
        with np.errstate(over="ignore", invalid="ignore"):
            return _linear_backward(fq, fk, Bounded.lift(v), seen, eps, Bounded.lift(do))


def allowance(verb: Callable[..., Any], *arrays: ArrayLike, **options: Any) -> Any:
    """Return how far the float64 answer of a verb may be from the real number, elementwise.

    The verb's own code is run in `Bounded` arithmetic, so this is a proof for what was computed, sums in any order.

    Parameters
    ----------
    verb
        ``attend``, ``partial``, ``weights`` or ``vjp`` of a method.
    *arrays, **options
        Its arguments, without leading axes.

    Returns
    -------
    Arrays of errors, in the shape of the verb's answer; ∞ where it is not finite. What a row does not see, not even
    NaN, does not matter to it.

    Raises
    ------
    TypeError, ValueError
        An array of something else than real numbers that float64 holds exactly, naming the argument.

    Examples
    --------
    >>> from refattn import rounding, softmax
    >>> x = [[0.5], [1.0]]
    >>> rounding.allowance(softmax.attend, x, x, x).shape
    (2, 1)
    """
    from refattn import method

    declared = {m.__name__: m.METHOD for m in method.modules().values()}.get(verb.__module__)
    named = set(declared.arrays) | {"do", "dlse"} if declared else set[str]()
    plain = (type(None), Bias)
    lifted = {s: _lifted(s, x) if s in named and not isinstance(x, plain) else x for s, x in options.items()}
    names = list(inspect.signature(verb).parameters)
    names += [f"argument {n}" for n in range(len(names) + 1, len(arrays) + 1)]
    return _errors(verb(*map(_lifted, names, arrays), **lifted))


def _lifted(name: str, x: Any) -> Bounded:
    return x if isinstance(x, Bounded) else Bounded.lift(_check.array(name, x, ""))


def _errors(answer: Any) -> Any:
    if isinstance(answer, Bounded):
        return np.where(np.isnan(answer.error), np.inf, answer.error * EVALUATION)
    if not isinstance(answer, tuple):
        return answer
    whole = cast("tuple[Any, ...]", answer)
    parts = [_errors(x) for x in whole]
    return type(whole)(*parts) if hasattr(whole, "_fields") else tuple(parts)


def claim_rounding(module: ModuleType, arrays: Mapping[str, ArrayLike], options: Mapping[str, Any]) -> Array:
    """Return `claim_evaluation` of a method's claims over the arrays: (T, E).

    A module whose claims are made of more than dot products has a function ``claim_logits``, with `bound`'s arguments,
    that answers how far its numbers like logits may be off, (T,).

    >>> from refattn import softmax
    >>> x = np.array([[0.5], [1.0]])
    >>> claim_rounding(softmax, {"q": x, "k": x, "v": x}, {}).shape
    (2, 1)
    """
    from refattn.method import Method, accepted

    declared: Method = module.METHOD
    drawn = [x for name in declared.drawn if (x := arrays.get(name)) is not None and "S" in declared.arrays[name]]
    own = getattr(module, "claim_logits", None)
    logits = 0.0 if own is None else own(**accepted(own, {**arrays, **options}))
    q, k, v = (arrays[name] for name in "qkv")
    return claim_evaluation(q, k, v, drawn=drawn, scale=options.get("scale"), logits=logits)


def claim_evaluation(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    drawn: Sequence[ArrayLike] = (),
    scale: float | None = None,
    logits: ArrayLike = 0.0,
) -> Array:
    r"""Return how far the float64 value of a claim may be below the claim, beside what õ in it costs.

    Claims are made of numbers like logits (dot products of a query with keys or with projected keys, logarithms of
    counts, of sums of exponentials and of sums of positive features), of functions of their differences with
    slope at most ¼ (tanh of a quarter span, the logistic function) or of their softmax, and of products of these
    with values. With X the largest absolute row sum of a drawn array (0 without) and n the roundings that touch any
    term, of which the sums make D + S + r and what a claim does to one number at most 32, a number like a logit is
    off by at most

    .. math:: \varepsilon_i = \gamma_n \big(|\sigma| (1 + X) \textstyle\sum_c |q_{ic}| \max_j |k_{jc}|
              + \max_c |q_{ic}| + \max_{jc} |k_{jc}| + \ln S + 1\big),

    so a span by 2ε and tanh(span/4) or a mass by ε/2 + γ_n; weights p̂ by ε in absolute sum. These multiply values
    or their differences, at most 2(1 + X) max|v|; the sums add γ_n of that. What linear attention's `eps` takes from
    õ is at most max|v|, and 3γ_n of that covers its rounding. The total is at most

    .. math:: 4 (1 + X) (\varepsilon_i + \gamma_n) \max_j |v_{jc}|

    Parameters
    ----------
    q, k, v : (T, D), (S, D), (S, E)
        As the claim's verb was given them, without leading axes.
    drawn : sequence of (r, S)
        The arrays that the method draws.
    scale : float, optional
        σ; the real number 1/√D unless given.
    logits : (T,), optional
        How far numbers like logits that are made in another way may be off: it is added to ε.

    Returns
    -------
    (T, E) of float64

    Examples
    --------
    >>> x = [[0.5], [1.0]]
    >>> claim_evaluation(x, x, x).shape
    (2, 1)
    """
    q, k, v = (np.abs(np.asarray(x, np.float64)) for x in (q, k, v))
    sums = [np.abs(np.asarray(x, np.float64)).sum(axis=1) for x in drawn]
    stretch = 1 + max((float(x.max(initial=0.0)) for x in sums), default=0.0)
    n, S = q.shape[1] + len(k) + max(map(len, sums), default=0) + 32, max(len(k), 1)
    size = abs(_check.scale(scale, q.shape[1])) * stretch * (q @ k.max(axis=0, initial=0.0))
    size = size + q.max(axis=1, initial=0.0) + k.max(initial=0.0) + math.log(S) + 1
    return 4 * stretch * (gamma(n) * (size + 1) + logits)[:, None] * v.max(axis=0, initial=0.0)


def _parts(one: One, rows: NDArray[np.intp]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Split rows into parts, each with the keys that any of its rows sees: few where neighbours see few."""
    S = int(one.k.shape[0])
    waiting = tiles(rows, S)[::-1]
    while waiting:
        some = waiting.pop()
        if one.pairs is None:
            yield some, np.arange(S)
            continue
        seen = one.pairs.seen(some, slice(None))
        keys = np.flatnonzero(seen.any(axis=0))
        area = len(some) * len(keys)
        if len(some) > 1 and area > max(SMALL, 2 * int(seen.sum())):
            waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
        else:
            yield some, keys


class _Rows:
    """Softmax attention of one problem with every quantity that F1, F2 and B4 name; letters are theirs.

    What is bounded is any run of the definition's operations, sums in any order, against the real number. The runs'
    quantities and the real ones differ by factors within e^±2·max e; `wide` makes up for using this run's.
    """

    def __init__(self, one: One, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> None:
        call = one.problem
        S, D, sigma = len(keys), call.sizes[2], abs(call.multiplier)
        q, k, v = Bounded.lift(one.q)[rows], Bounded.lift(one.k), Bounded.lift(one.v)
        if S < len(k.value):
            k, v = k[keys], v[keys]
        b = _bias(one, rows, keys)
        seen = np.ones((len(rows), len(keys)), np.bool_) if one.pairs is None else one.pairs.seen(rows, keys)
        if b is not None:
            seen = seen & ~np.isneginf(b.value)
        self.q, self.k, self.v, self.seen = q, k, v, seen
        z = (q.value @ k.value.T) * call.multiplier
        sizes = gamma(D) * (q.bulk() @ k.bulk().T) + q.error @ k.bulk().T + q.bulk() @ k.error.T
        e = sigma * (sizes + D * TINY)
        e = e + (U if call.scale is not None else 3 * U * (1 + 3 * U)) * (np.abs(z) + e) + TINY
        if b is not None and call.order == "bias, softcap":
            z, e = _plus(z, e, b)
        self.slope, self.slope_error = np.ones_like(z), np.zeros_like(z)
        if call.softcap is not None:
            c = call.softcap
            e = e + U * (np.abs(z) + e) + c * TINY
            fall = np.exp(-2 * np.abs(z / c))
            self.slope = np.where(seen, 4 * fall / (1 + fall) ** 2, 0.0)
            turn = 2 * e / c + EXP + 8 * U
            near = np.minimum(turn, 1.0)
            self.slope_error = np.where(turn < 1, self.slope * np.exp(near) * np.expm1(near) + 16 * TINY, 1.0)
            z = c * np.tanh(z / c)
            e = e + (TANH + U) * (1 + U) * (np.abs(z) + e) + (1 + c) * TINY
        if b is not None and call.order == "softcap, bias":
            z, e = _plus(z, e, b)
        live, z, e = seen, np.where(seen, z, -np.inf), np.where(seen, e, 0.0)
        if one.sink is not None:
            sink = Bounded.lift(one.sink)
            z, e, live = (
                np.c_[x, np.full(len(x), own)]
                for x, own in ((z, sink.value.item()), (e, sink.error.item()), (live, not np.isneginf(sink.value)))
            )
        self.empty: NDArray[np.bool_] = ~np.logical_or.reduce(live, axis=1)
        m = np.where(self.empty, 0.0, z.max(axis=1, initial=-np.inf))[:, None]
        # the maximum is common to the row and cancels; what is rounded is the difference, then its exponential
        e = np.where(live, e + U * np.abs(z - m) + EXP * (1 + EXP), 0.0)
        self.top = e.max(axis=1, initial=0.0)[:, None]
        sure = self.top <= 0.4
        e = np.minimum(e, 1.0)
        self.wide = np.where(sure, EVALUATION * np.exp(np.where(sure, 8 * self.top, 0.0)), np.inf)
        w = np.where(live, np.exp(z - m), 0.0)
        total = np.where(self.empty, 1.0, w.sum(axis=1))[:, None]
        h = live.sum(axis=1, keepdims=True) * U
        p, G = np.where(live, w / total, 0.0), h / (1 - h)
        up, down = (np.where(self.empty, 1.0, (p * np.exp(x)).sum(axis=1))[:, None] for x in (e, -e))
        lost = live.sum(axis=1, keepdims=True) * TINY / total
        self.e, self.p = e[:, :S], p[:, :S]
        self.e_sink, self.p_sink = (np.zeros(len(p)),) * 2 if one.sink is None else (e[:, S], p[:, S])
        self.o = mix(self.p, v.value, seen)
        pe, size = self.p * np.exp(self.e), v.bulk()
        tilt, high = _spans(self.p * np.expm1(self.e), v.value, self.o, size, seen, sure[:, 0])
        tilt = tilt + (self.p_sink * np.expm1(self.e_sink))[:, None] * np.abs(self.o)
        error = tilt + G * mix(pe, size, seen) + G * np.abs(self.o) * up + mix(pe, v.error, seen)
        error = error + lost * (1 + high + np.abs(self.o))
        error: Array = error / ((1 - G) * down - lost)
        ratio: Array = np.maximum(np.log((1 + G) * up + lost), -np.log((1 - G) * down - lost))
        # where even the first digit of a weight is in doubt: both answers are means of the values, both lse maxima
        error = np.where(sure, error * self.wide, 2 * (1 + 4 * G) * high)
        ratio = np.where(sure, ratio * self.wide, self.top + 2 * G + 2 * lost)[:, 0]
        omega = (1 + U) ** 2 - 1
        self.E = np.where(self.empty[:, None], 0.0, error * (1 + omega) + omega * np.abs(self.o) + TINY)
        self.e_z = np.where(self.empty, 0.0, ratio)
        lse: Array = m[:, 0] + np.log(total[:, 0])
        raw = self.e_z + EXP * np.abs(np.log(total[:, 0])) + U * np.abs(lse)
        self.E_lse = np.where(self.empty, 0.0, raw / (1 - 4 * U))
        self.lse = np.where(self.empty, -np.inf, lse)

    def answer(self) -> tuple[Array, Array, Array, Array]:
        """Return o and lse, each with its bound."""
        return self.o, self.E, self.lse, self.E_lse


def _spans(tilted: Array, v: Array, o: Array, size: Array, seen: NDArray[np.bool_], sure: NDArray[np.bool_]) -> Any:
    """Return Σ_j tilted_ij |v_jc − o_ic| and the largest |v_jc| that row i sees, or more where the row is sure.

    There the latter only meets what underflow takes. What is not seen has no tilt, which hides it where it is finite.
    """
    tilt, high, apart = np.zeros(o.shape), np.zeros(o.shape), np.empty(tilted.shape)
    clean = bool(np.isfinite(2 * size).all())  # then so are distances
    some = np.flatnonzero(~sure) if clean else np.arange(len(o))
    if clean:
        high[:] = size.max(axis=0, initial=0.0)
    for c in range(o.shape[1]):
        np.abs(np.subtract(v[:, c], o[:, c : c + 1], out=apart), out=apart)
        if not clean:
            apart[~seen] = 0.0
        tilt[:, c] = np.multiply(tilted, apart, out=apart).sum(axis=1)
        high[some, c] = np.where(seen[some], size[:, c], 0.0).max(axis=1, initial=0.0)
    return tilt, high


def _bias(one: One, rows: NDArray[np.intp], keys: NDArray[np.intp]) -> Bounded | None:
    bias = one.problem.bias
    if bias is None:
        return None
    if isinstance(bias, Table) and isinstance(bias.array, Bounded):
        return bias.array[bias.index(rows, keys)]
    exact = Bounded.lift(one.bias(rows, keys))
    return exact if isinstance(bias, Table) else Bounded(exact.value, U * np.abs(exact.value))


def _plus(z: Array, e: Array, b: Bounded) -> tuple[Array, Array]:
    z, e = z + b.value, e + b.error
    return z, e + U * (np.abs(z) + e)


def _backward(one: One, do: Bounded, dlse: Bounded) -> tuple[Bounded, Bounded, Bounded, Bounded | None, Bounded | None]:
    call = one.problem
    T, n, _, width = call.sizes
    row, sigma = _Rows(one, np.arange(T), np.arange(n)), abs(call.multiplier)
    q, k, v, seen, turned = row.q, row.k, row.v, row.seen, row.seen.T
    live = seen.any(axis=1, keepdims=True)
    g, size, g_error = (np.where(live, x, 0.0) for x in (do.value, do.bulk(), do.error))
    dots = np.where(seen, g @ v.value.T, 0.0)
    d_dots = gamma(width) * (size @ v.bulk().T) + g_error @ v.bulk().T + size @ v.error.T + width * TINY
    own = dlse.value - (g * row.o).sum(axis=1)
    reach = np.abs(row.o) + row.E
    delta = (g_error * reach + size * row.E).sum(axis=1) + gamma(width) * (size * reach).sum(axis=1) + width * TINY
    delta = delta + dlse.error + U * (np.abs(own) + delta)
    X, e, p, slope = dots + own[:, None], row.e + U, row.p, row.slope
    e_z, E_D, wide = row.e_z[:, None], delta[:, None], row.wide
    grow, tilt = np.exp(e_z), np.expm1(e)
    # weights: one exponent for each pair (e) and one for the row (e_z); the error of own is one number for the row too
    ds = np.where(seen, p * X, 0.0)
    inner = grow * p * (tilt * (np.abs(X) + d_dots + 2 * E_D) + np.exp(e) * (d_dots + 3 * U * (np.abs(X) + E_D)))
    inner = np.where(seen, inner + LOST * (1 + np.abs(X) + d_dots + E_D), 0.0)
    size_s = np.where(seen, np.abs(ds) + inner + grow * np.exp(e) * p * E_D, 0.0)
    whole_s = inner + grow * E_D * p + np.expm1(e_z) * np.abs(ds)
    dz, ps, inner_z = ds, p, inner
    if call.softcap is not None:
        dz, ps, steep = ds * slope, p * slope, slope + row.slope_error
        inner_z = np.where(seen, slope * inner + (row.slope_error + U * steep) * size_s + TINY, 0.0)
        ps_size, size_z = np.where(seen, p * steep, 0.0), np.where(seen, steep * size_s, 0.0)
    else:
        ps_size, size_z = p, size_s
    whole_z = inner_z + grow * E_D * ps_size + np.expm1(e_z) * np.abs(dz)
    # `wide` is infinite, and a row's numbers NaN, where nothing is known of it: that stays with what the row sees
    wide_s, wide_z, wide_size = (np.where(seen, x * wide, 0.0) for x in (whole_s, whole_z, size_z))
    scaled = U if call.scale is not None else 3 * U * (1 + 3 * U)

    to_k = mix(dz, k.value, seen)
    value = call.multiplier * to_k
    blur = np.expm1(np.minimum(4 * row.top, 4.0)) + gamma(n)
    common = grow * E_D * (np.abs(mix(ps, k.value, seen)) + blur * mix(ps_size, k.bulk(), seen))
    common = common + np.expm1(e_z) * (np.abs(to_k) + blur * mix(np.abs(dz), k.bulk(), seen))
    error = mix(inner_z, k.bulk(), seen) + common + gamma(n) * mix(size_z, k.bulk(), seen)
    error = error + mix(size_z, k.error, seen) + n * TINY
    error = sigma * (error * wide) * (1 + scaled) + scaled * np.abs(value) + TINY
    dq = Bounded(value, np.where(live, error, 0.0))

    # 1/√D as a float is common; the product with it is rounded once for each tile of rows, so counted among the sums
    value = call.multiplier * mix(dz.T, q.value, turned)
    error = mix(wide_z.T, q.bulk(), turned) + gamma(T + 1) * mix(wide_size.T, q.bulk(), turned)
    error = error + mix(size_z.T, q.error, turned) + T * TINY
    common = (scaled - U) * (1 + scaled) * np.abs(value)
    dk = Bounded(value, sigma * error * (1 + scaled) + common + T * TINY)

    w = np.where(seen, (p * np.expm1(e_z + e) + LOST) * wide, 0.0)
    error = mix(w.T, size, turned) + gamma(T) * mix((p + w).T, size, turned) + mix((p + w).T, g_error, turned)
    dv = Bounded(mix(p.T, g, turned), error + T * TINY)

    dbias = dsink = None
    if isinstance(call.bias, Table):
        table = call.bias.array
        db, db_error = (dz, wide_z) if call.order == "bias, softcap" else (ds, wide_s)
        axes = tuple(a for a in (0, 1) if table.shape[-2 + a] == 1)
        count = math.prod(db.shape[a] for a in axes) - 1
        magnitude = np.abs(db) + db_error
        error = db_error.sum(axis=axes, keepdims=True) + gamma(count) * magnitude.sum(axis=axes, keepdims=True)
        dbias = Bounded(db.sum(axis=axes, keepdims=True), error)
    if call.sink is not None:
        each, size = row.p_sink * own, np.abs(own) + delta
        tilt = np.expm1(row.e_z + row.e_sink + 2 * U)
        error = row.p_sink * (tilt * size + delta) * wide[:, 0] + LOST * (1 + size)
        dsink = Bounded(each.sum(), error.sum() + gamma(T - 1) * (np.abs(each) + error).sum())
    return dq, dk, dv, dbias, dsink


def _lost(a: Bounded, c: Bounded, seen: NDArray[np.bool_]) -> Array:
    """Bound what underflow takes from (a bᵀ over the seen pairs) c, in any order of the two products.

    Each product loses at most TINY, and the loss of the first is multiplied by the factor that follows: by c where
    a·b, of r terms, comes first; by a where bᵀc, of n terms, does.
    """
    n, r = seen.sum(axis=1, keepdims=True), a.shape[1]
    follows = r * mix(seen.astype(np.float64), c.bulk(), seen) + n * a.bulk().sum(axis=1, keepdims=True)
    return TINY * (r + n + follows)


def _linear(
    fq: Bounded, fk: Bounded | None, v: Bounded, seen: NDArray[np.bool_], eps: float
) -> tuple[Bounded, Bounded]:
    """Return o and den, whichever of the products comes first and in any order of the sums (X1).

    A term φ(q)φ(k)v meets r + n roundings for the n keys of its row, and one fewer in den, where v = 1. Where κ is
    given instead, r = 0.
    """
    some, n = seen.any(axis=1, keepdims=True), seen.sum(axis=1, keepdims=True)
    v = Bounded(np.c_[v.value, np.ones(len(v.value))], np.c_[v.error, np.zeros(len(v.value))])
    if fk is None:
        r, kappa, carried, size, lost = 0, fq.value, fq.error, fq.bulk(), n * TINY
    else:
        r, kappa, size, lost = fk.shape[1], fq.value @ fk.value.T, fq.bulk() @ fk.bulk().T, _lost(fq, v, seen)
        carried = fq.error @ fk.bulk().T + np.abs(fq.value) @ fk.error.T
    kappa, carried, size = (np.where(seen, x, 0.0) for x in (kappa, carried, size))
    h = (r + n - np.r_[np.zeros(v.shape[1] - 1), 1.0]) * U
    error = mix(carried, v.bulk(), seen) + mix(size, v.error, seen) + h / (1 - h) * mix(size, v.bulk(), seen)
    error = error + lost
    top = Bounded(mix(kappa, v.value, seen)[:, :-1], error[:, :-1])
    den = Bounded(np.where(some, kappa.sum(axis=1, keepdims=True), 1.0), np.where(some, error[:, -1:], 0.0))
    if eps:
        den = den + eps
    least = np.abs(den.value) - 2 * den.error  # of what any order computes
    with np.errstate(divide="ignore", invalid="ignore"):
        truth = top.bulk() / (least + den.error)
        error = (top.error + truth * den.error) / least
        error = np.where(least > 0, error + U * (truth + error) + TINY, np.inf)
        value = top.value / den.value
    return Bounded(np.where(some, value, 0.0), np.where(some, error, 0.0)), den


def _linear_backward(
    fq: Bounded, fk: Bounded, v: Bounded, seen: NDArray[np.bool_], eps: float, do: Bounded
) -> tuple[Bounded, Bounded, Bounded]:
    (n, r), T, width = fk.shape, len(fq.value), v.shape[1]
    o, den = _linear(fq, fk, v, seen, eps)
    some = seen.any(axis=1, keepdims=True)
    do = Bounded(np.where(some, do.value, 0.0), np.where(some, do.error, 0.0))
    g, fall = do / den, -((do * o).sum(1, keepdims=True)) / den
    g = Bounded(np.c_[g.value, fall.value], np.c_[g.error, fall.error])
    ones = np.ones((n, 1))
    tilted = Bounded(np.c_[v.value, ones], np.c_[v.error, 0 * ones])
    h = gamma(r + n + T + width + 6)

    def product(a: Bounded, b: Bounded, c: Bounded, pairs: NDArray[np.bool_]) -> Bounded:
        """Return (a bᵀ over the seen pairs) c, in any order of the two products."""
        value = mix(np.where(pairs, a.value @ b.value.T, 0.0), c.value, pairs)
        plain = mix(np.where(pairs, np.abs(a.value) @ np.abs(b.value).T, 0.0), np.abs(c.value), pairs)
        whole = mix(np.where(pairs, a.bulk() @ b.bulk().T, 0.0), c.bulk(), pairs)
        error = np.maximum(whole - plain, 0.0) + 2 * h * whole + _lost(a, c, pairs)
        live = pairs.any(axis=1, keepdims=True)
        return Bounded(np.where(live, value, 0.0), np.where(live, error, 0.0))

    to_q, to_k = product(g, tilted, fk, seen), product(tilted, g, fq, seen.T)
    return to_q, to_k, product(fk, fq, g, seen.T)[:, :-1]
