"""Ball arithmetic (python-flint): enclosures of the real number at any precision, and of directional derivatives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.bias import Alibi, Table
from refattn.engines import One
from refattn.lifted import Lifted


@contextlib.contextmanager
def precision(bits: int = 200) -> Generator[None]:
    """Compute with this many bits inside the block.

    >>> with precision(100):
    ...     third = Ball.lift(1.0) / 3.0
    """
    flint = _flint()
    before, flint.ctx.prec = flint.ctx.prec, bits
    try:
        yield
    finally:
        flint.ctx.prec = before


def _flint() -> Any:
    try:
        import flint
    except ModuleNotFoundError:
        raise ImportError(
            "ball arithmetic needs python-flint, which is not installed; "
            "install it with: pip install 'refattn[certify]'"
        ) from None
    return flint


@dataclass(frozen=True, slots=True)
class Dual:
    """A number and its derivative along one direction."""

    x: Any
    dx: Any

    def __add__(self, other: Any) -> Dual:
        """Sum."""
        o = _dual(other)
        return Dual(self.x + o.x, self.dx + o.dx)

    __radd__ = __add__

    def __neg__(self) -> Dual:
        """Negative."""
        return Dual(-self.x, -self.dx)

    def __sub__(self, other: Any) -> Dual:
        """Difference."""
        return self + -_dual(other)

    def __rsub__(self, other: Any) -> Dual:
        """Difference."""
        return _dual(other) - self

    def __mul__(self, other: Any) -> Dual:
        """Product rule."""
        o = _dual(other)
        return Dual(self.x * o.x, self.x * o.dx + self.dx * o.x)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Dual:
        """Quotient rule."""
        o = _dual(other)
        y = self.x / o.x
        return Dual(y, (self.dx - y * o.dx) / o.x)

    def __rtruediv__(self, other: Any) -> Dual:
        """Quotient rule."""
        return _dual(other) / self

    def exp(self) -> Dual:
        """Exponential."""
        y = self.x.exp()
        return Dual(y, y * self.dx)

    def log(self) -> Dual:
        """Natural logarithm."""
        return Dual(self.x.log(), self.dx / self.x)

    def sqrt(self) -> Dual:
        """Square root."""
        y = self.x.sqrt()
        return Dual(y, self.dx / (y + y))

    def sin(self) -> Dual:
        """Sine."""
        return Dual(self.x.sin(), self.x.cos() * self.dx)

    def cos(self) -> Dual:
        """Cosine."""
        return Dual(self.x.cos(), -(self.x.sin() * self.dx))

    def tanh(self) -> Dual:
        """Hyperbolic tangent."""
        c = self.x.cosh()  # 1 − tanh² would cancel where tanh is near 1
        return Dual(self.x.tanh(), self.dx / (c * c))


def _dual(x: Any) -> Dual:
    return x if isinstance(x, Dual) else Dual(x, _flint().arb(0))


class Ball(Lifted):
    """An array of balls, each of which contains the real number that it stands for.

    Parameters
    ----------
    cells
        An object array of `flint.arb`, or of `Dual` numbers over them.

    Notes
    -----
    Precision is that of the surrounding `precision` block. The engines are the definitions, written densely.

    Examples
    --------
    >>> from refattn import softmax
    >>> x = Ball.lift([[0.5], [1.0]])
    >>> o = softmax.attend(x, x, x)
    >>> bool((o.distance(softmax.attend(x.floats(), x.floats(), x.floats())) < 1e-15).all())
    True
    """

    def __init__(self, cells: Any) -> None:
        """Hold an object array."""
        self.cells: NDArray[Any] = cells if isinstance(cells, np.ndarray) else _cell(cells)
        self.shape = self.cells.shape

    @classmethod
    def lift(cls, x: Any) -> Self:
        """Return exact balls for numbers that are floats."""
        if isinstance(x, cls):
            return x
        return cls(_map(lambda y: _flint().arb(float(y)), np.asarray(x)))

    @classmethod
    def along(cls, x: ArrayLike, direction: ArrayLike) -> Self:
        """Return x as it moves along a direction: what is computed from it carries the directional derivative."""
        arb, values, steps = _flint().arb, np.asarray(x), np.asarray(direction)
        out = np.empty(values.shape, object)
        for i in np.ndindex(values.shape):
            out[i] = Dual(arb(float(values[i])), arb(float(steps[i])))
        return cls(out)

    @property
    def mT(self) -> Ball:  # noqa: N802
        """The transpose."""
        return Ball(self.cells.T)

    def __getitem__(self, index: Any) -> Ball:
        """Index the array."""
        return Ball(self.cells[index])

    def reshape(self, *shape: int) -> Ball:
        """Reshape the array."""
        return Ball(self.cells.reshape(*shape))

    @classmethod
    def join(cls, parts: Sequence[Any], axis: int) -> Self:
        """Return arrays joined along an axis."""
        return cls(np.concatenate([x.cells for x in parts], axis))

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Ball:
        """Sum along an axis, or of everything."""
        if axis is None:
            return Ball(_cell(_total(self.cells.ravel())))
        moved = np.moveaxis(self.cells, axis, -1)
        out = np.empty(moved.shape[:-1], object)
        for i in np.ndindex(out.shape):
            out[i] = _total(moved[i])
        return Ball(np.expand_dims(out, axis) if keepdims else out)

    def floats(self) -> NDArray[np.float64]:
        """Return the float64 nearest to each midpoint."""
        return self._floats(lambda x: float(x.mid()))

    def distance(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return an upper bound of |value − real number| for each element; infinities of one sign agree."""
        arb, x, out = _flint().arb, np.asarray(values, np.float64), np.empty(self.shape)
        for i in np.ndindex(self.shape):
            cell, y = _plain(self.cells[i]), float(x[i])
            if math.isinf(y) or not math.isfinite(float(cell.mid())):
                out[i] = 0.0 if float(cell.mid()) == y and math.isinf(y) else math.inf
            else:
                out[i] = math.nan if math.isnan(y) else _above(abs(cell - arb(y)).upper())
        return out

    def derivative(self) -> Ball:
        """Return the directional derivative that the arrays made with `along` carry."""
        return Ball(_map(lambda c: _dual(c).dx, self.cells))

    def _floats(self, f: Callable[[Any], Any]) -> NDArray[np.float64]:
        out = np.empty(self.shape)
        for i in np.ndindex(self.shape):
            out[i] = f(_plain(self.cells[i]))
        return out

    def _add(self, other: Ball) -> Ball:
        return _pairwise(lambda a, b: a + b, self, other)

    def _subtract(self, other: Ball) -> Ball:
        return _pairwise(lambda a, b: a - b, self, other)

    def _multiply(self, other: Ball) -> Ball:
        return _pairwise(lambda a, b: a * b, self, other)

    def _divide(self, other: Ball) -> Ball:
        return _pairwise(lambda a, b: a / b, self, other)

    def _maximum(self, other: Ball) -> Ball:
        return _pairwise(_larger, self, other)

    def _minimum(self, other: Ball) -> Ball:
        return _pairwise(_smaller, self, other)

    def _negative(self) -> Ball:
        return Ball(_map(lambda a: -a, self.cells))

    def _exp(self) -> Ball:
        return Ball(_map(lambda a: a.exp(), self.cells))

    def _log(self) -> Ball:
        return Ball(_map(lambda a: a.log(), self.cells))

    def _sqrt(self) -> Ball:
        return Ball(_map(lambda a: a.sqrt(), self.cells))

    def _sin(self) -> Ball:
        return Ball(_map(lambda a: a.sin(), self.cells))

    def _cos(self) -> Ball:
        return Ball(_map(lambda a: a.cos(), self.cells))

    def _tanh(self) -> Ball:
        return Ball(_map(lambda a: a.tanh(), self.cells))

    def _matmul(self, other: Ball) -> Ball:
        a, b = self.cells, other.cells
        out = np.empty((a.shape[0], b.shape[1]), object)
        for i, j in np.ndindex(out.shape):
            out[i, j] = _total([x * y for x, y in zip(a[i], b[:, j], strict=True)])
        return Ball(out)

    def softmax_forward(self, one: One) -> tuple[Ball, Ball]:
        """Return o and lse by the definition; rows that see nothing have o = 0 and lse = −inf, or the sink's logit."""
        s, seen, sink = _logits(one), one.seen(), one.problem.sink
        v, (T, S) = Ball.lift(one.v), seen.shape
        o, lse = np.empty((T, v.shape[1]), object), np.empty(T, object)
        arb = _flint().arb
        for i in range(T):
            w = {j: s.cells[i, j].exp() for j in range(S) if seen[i, j]}
            z = _total(w.values())
            if sink is not None:
                z = z + _only(sink).exp()
            some = bool(w) or sink is not None
            lse[i] = z.log() if some else arb("-inf")
            for c in range(v.shape[1]):
                total = _total([w[j] * v.cells[j, c] for j in w])
                o[i, c] = total / z if some else arb(0)
        return Ball(o), Ball(lse)

    def softmax_backward(self, one: Any, do: Any, dlse: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Refuse: gradients are judged by directional derivatives of the forward (`along`), not by a second formula."""
        raise NotImplementedError("take directional derivatives with Ball.along")

    def linear_forward(self, fq: Ball, fk: Ball | None, v: Any, seen: NDArray[np.bool_], eps: float) -> Ball:
        """Return linear attention in the parallel form; rows that see nothing are 0."""
        kappa, values, arb = fq if fk is None else fq @ fk.mT, Ball.lift(v), _flint().arb
        out = np.empty((seen.shape[0], values.shape[1]), object)
        for i, c in np.ndindex(out.shape):
            js = np.flatnonzero(seen[i])
            den = _total([kappa.cells[i, j] for j in js]) + arb(eps)
            total = _total([kappa.cells[i, j] * values.cells[j, c] for j in js])
            out[i, c] = total / den if len(js) else arb(0)
        return Ball(out)

    def linear_backward(
        self, fq: Any, fk: Any, v: Any, seen: NDArray[np.bool_], eps: float, do: Any
    ) -> tuple[Any, Any, Any]:
        """Refuse, as `softmax_backward`."""
        raise NotImplementedError("take directional derivatives with Ball.along")


def _logits(one: One) -> Ball:
    call, arb = one.problem, _flint().arb
    q, k = Ball.lift(one.q), Ball.lift(one.k)
    scale = arb(1) / arb(q.shape[1]).sqrt() if call.scale is None else arb(call.scale)
    s, bias = (q @ k.mT) * Ball(scale), None
    if call.bias is not None:
        table = call.bias.array if isinstance(call.bias, Table) else None
        if isinstance(table, Ball):
            bias = table
        else:
            slope, whole = 1.0, call.bias
            if isinstance(whole, Alibi):  # slope × distance is rounded in its block, the distance alone is not
                slope, whole = whole.slopes.item(), replace(whole, slopes=np.ones_like(whole.slopes))
            numbers = whole.block(0, np.arange(q.shape[0]), np.arange(k.shape[0]))
            bias = Ball.lift(np.where(np.isneginf(numbers), 0.0, numbers)) * Ball.lift(slope)
    if bias is not None and call.order == "bias, softcap":
        s = s + bias
    if call.softcap is not None:
        cap = Ball.lift(call.softcap)
        s = (s / cap)._tanh() * cap
    return s + bias if bias is not None and call.order == "softcap, bias" else s


def _only(sink: Any) -> Any:
    return Ball.lift(sink).cells.reshape(-1)[0]


def _above(x: Any) -> float:
    """Return the least float that is not below x."""
    near = float(x)
    return near if _flint().arb(near) >= x else math.nextafter(near, math.inf)


def _plain(cell: Any) -> Any:
    return cell.x if isinstance(cell, Dual) else cell


def _larger(a: Any, b: Any) -> Any:
    x, y = _plain(a), _plain(b)
    if x > y:
        return a
    return b if x < y or x == y else _undecided(a, b, x.max(y))


def _smaller(a: Any, b: Any) -> Any:
    x, y = _plain(a), _plain(b)
    if x < y or x == y:
        return a
    return b if x > y else _undecided(a, b, x.min(y))


def _undecided(a: Any, b: Any, either: Any) -> Any:
    """Return what encloses an extreme of balls that overlap; which of the two derivatives it has is not known."""
    if isinstance(a, Dual) or isinstance(b, Dual):
        raise ValueError(f"the larger of {_plain(a)} and {_plain(b)} is not known, and so is the derivative")
    return either


def _total(cells: Any) -> Any:
    out = _flint().arb(0)
    for x in cells:
        out = x + out
    return out


def _cell(x: Any) -> NDArray[Any]:
    out = np.empty((), object)
    out[()] = x
    return out


def _map(f: Callable[[Any], Any], cells: NDArray[Any]) -> NDArray[Any]:
    out = np.empty(cells.shape, object)
    for i in np.ndindex(cells.shape):
        out[i] = f(cells[i])
    return out


def _pairwise(f: Callable[[Any, Any], Any], a: Ball, b: Ball) -> Ball:
    x, y = np.broadcast_arrays(a.cells, b.cells)
    out = np.empty(x.shape, object)
    for i in np.ndindex(out.shape):
        out[i] = f(x[i], y[i])
    return Ball(out)
