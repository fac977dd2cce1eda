r"""Softmax attention over the runs of keys that each row sees; `refattn.softmax` is the definition.

Order of operations, for one row. The working type is float32 or float64; every operation is rounded to it once, to
nearest, and products are rounded before they are added: no fma. Sums start from the first term named.

1. s_j = 0 + q_0·k_j0 + q_1·k_j1 + …, in the order of the depth, then times the scale.
2. Softcap: c·tanh(s_j / c). Bias: s_j + b_j, added in float64 and then rounded. The problem says which comes first.
3. m = the largest of β and the s_j, where the sink β is −∞ if there is none.
4. w_j = exp(s_j − m). z = exp(β − m) + w_0 + w_1 + …, in the order of the keys.
5. o_e = (0 + w_0·v_0e + w_1·v_1e + …) / z. lse = m + log z.

A key that is not seen does not exist: nothing is read of it but, where a bias hides it, its dot product. So the bits
of a row depend on what it sees, and not on threads, batch, tasks, or how the mask is written.

Accumulators have the working type. exp and log are the C library's, taken to be within 2 units in the last place, and
tanh within 4. Nothing overflows, whatever the mask: a problem is refused where one of its finite numbers, or
2·D·max|q|·max|k|·max(1, |σ|) + max|b|, or 2·S·max|v|, would round to infinity; the 2 is for rounding on the way.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from numpy.typing import NDArray

from refattn._mix import tiles
from refattn.bias import Alibi, Table
from refattn.engines import Backend, Problem
from refattn.partial import Partial
from refattn_cpu._threads import share

TASK_ROWS = 64
TASK_PAIRS = 2**20
"""A task has this many rows and pairs at most, or one row: it bounds a thread's memory and the time to Ctrl-C."""
FLOAT32_INTEGERS = 2**24


class _Task(NamedTuple):
    problem: int
    first: int
    last: int


def refuses(problem: Problem, backend: Backend) -> str | None:
    """Return why the working type cannot hold this problem, or None."""
    dtype = working_dtype(problem, backend)
    return (_inexact(problem) if dtype == np.float32 else None) or _overflows(problem, dtype)


def _inexact(problem: Problem) -> str | None:
    for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
        if x.dtype.kind in "iu" and x.size and max(-int(x.min()), int(x.max())) > FLOAT32_INTEGERS:
            return f"{name} holds integers beyond 2**24, which float32 cannot represent exactly; ask for float64"
    tiny, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    for name, x in (("scale", problem.multiplier), ("softcap", problem.softcap)):
        if x and not tiny <= abs(x) <= most:
            return f"{name} is {x}, outside the normal numbers of float32; ask for float64"
    return None


def _overflows(problem: Problem, dtype: np.dtype[Any]) -> str | None:
    instead = "ask for float64" if dtype == np.float32 else "rescale the arrays"

    def overflows(x: float) -> bool:
        with np.errstate(over="ignore"):
            return bool(np.isinf(dtype.type(x)))

    _, S, D, _ = problem.sizes
    q, k, v = map(_largest, (problem.q, problem.k, problem.v))
    b, sink = _largest_bias(problem), 0.0 if problem.sink is None else _largest(problem.sink)
    for name, x in (("q", q), ("k", k), ("v", v), ("bias", b), ("sink", sink)):
        if overflows(x):
            return f"{name} holds finite numbers beyond {dtype}; {instead}"
    if overflows(2 * D * q * k * max(1.0, abs(problem.multiplier)) + b):
        return f"logits of q, k, scale and bias may overflow {dtype}; {instead}"
    if overflows(2 * S * v):
        return f"sums of v may overflow {dtype}; {instead}"
    return None


def _largest(x: NDArray[Any]) -> float:
    """Return the largest of the finite magnitudes."""
    x = x if x.dtype.kind in "fiu" else np.asarray(x, np.float64)
    finite = np.isfinite(x)
    return max(float(x.max(where=finite, initial=0)), -float(x.min(where=finite, initial=0)))


def _largest_bias(problem: Problem) -> float:
    bias, (T, S, _, _) = problem.bias, problem.sizes
    if bias is None:
        return 0.0
    if isinstance(bias, Table):
        return _largest(bias.array)
    keys = np.arange(S)[:: max(1, S - 1)] if isinstance(bias, Alibi) else np.arange(S)  # one is largest at an end
    flat, rows = range(math.prod(bias.lead)), tiles(np.arange(T), max(1, len(keys)))
    return max((_largest(bias.block(n, some, keys)) for n in flat for some in rows), default=0.0)


def working_dtype(problem: Problem, backend: Backend) -> np.dtype[np.floating[Any]]:
    """Return the dtype asked for, or the widest of q, k and v, where integers and 16-bit floats count as float32."""
    if backend.dtype is not None:
        return np.dtype(backend.dtype)
    wide = any(x.dtype.kind == "f" and x.dtype.itemsize == 8 for x in (problem.q, problem.k, problem.v))
    return np.dtype(np.float64 if wide else np.float32)


def forward(problem: Problem, backend: Backend) -> Partial:
    """Return (o, lse) in the working type."""
    dtype, (T, S, D, E) = working_dtype(problem, backend), problem.sizes
    lead, of = problem.leads
    q = _door(problem.q, dtype).reshape(math.prod(problem.q.shape[:-2]), T, D)
    k = _door(problem.k.swapaxes(-1, -2), dtype).reshape(math.prod(problem.k.shape[:-2]), D, S)
    v = _door(problem.v, dtype).reshape(math.prod(problem.v.shape[:-2]), S, E)
    # What no task writes stays NaN.
    o, lse = np.full((math.prod(lead), T, E), np.nan, dtype), np.full((math.prod(lead), T), np.nan, dtype)

    def work(task: _Task) -> None:
        n, rows = task.problem, slice(task.first, task.last)
        one, count = problem.one(n), task.last - task.first
        if one.pairs is None:
            runs = np.arange(count + 1), np.zeros(count), np.full(count, S)
        else:
            runs = one.pairs.runs(rows)
        indptr, start, stop = (_door(x, np.dtype(np.int64)) for x in runs)
        # Bias is evaluated for the keys between the first and the last that these rows see.
        near, far = int(start.min(initial=S)), int(stop.max(initial=0))
        keys = np.arange(near, max(near, far))
        bias = one.bias(np.arange(task.first, task.last), keys)
        bias = np.zeros((0, 0)) if bias is None else np.broadcast_to(bias, (count, len(keys)))
        numbers = np.array(
            [problem.multiplier, problem.softcap or 0.0, -np.inf if one.sink is None else float(one.sink)]
        )
        _rows(
            q[of["q"][n], rows],
            k[of["k"][n]],
            v[of["v"][n]],
            indptr,
            start,
            stop,
            _door(bias, np.dtype(np.float64)),
            near,
            problem.order == "bias, softcap",
            _door(numbers, dtype),
            o[n, rows],
            lse[n, rows],
        )

    step = max(1, min(TASK_ROWS, TASK_PAIRS // max(1, S)))
    tasks = [_Task(n, t, min(t + step, T)) for n in range(len(o)) for t in range(0, T, step)]
    share(work, tasks, backend.threads)
    return Partial(o.reshape(*lead, T, E), lse.reshape(*lead, T))


def _door(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return x in one dtype, layout and writability: each other combination would be compiled anew."""
    with np.errstate(over="ignore", under="ignore"):
        out = np.require(x, dtype, ["C", "A"]).view()
    out.flags.writeable = False
    return out


@njit(nogil=True, cache=True, error_model="numpy")  # pyright: ignore[reportUntypedFunctionDecorator]
def _rows(
    q: Any,  # (R, D)
    k: Any,  # (D, S), so that neighbouring keys share a vector
    v: Any,  # (S, E)
    indptr: Any,  # (R + 1,), into start and stop
    start: Any,
    stop: Any,
    bias: Any,  # (R, keys from `near` on), or (0, 0); always float64
    near: int,
    bias_first: bool,
    numbers: Any,  # scale, softcap or 0, sink or -inf
    o: Any,  # (R, E)
    lse: Any,  # (R,)
) -> None:
    scale, cap, sink = numbers
    most = 0
    for i in range(len(q)):
        runs = slice(indptr[i], indptr[i + 1])
        most = max(most, np.sum(stop[runs] - start[runs]))
    scores, keys = np.empty(most, q.dtype), np.empty(most, np.int64)
    for i in range(len(q)):
        seen, m = 0, sink
        for r in range(indptr[i], indptr[i + 1]):
            first, last = start[r], stop[r]
            # A run's dot products stand behind the scores so far, which grow into their place.
            dots = scores[seen : seen + last - first]
            _dots(q[i], k[:, first:last], dots)
            for j in range(first, last):
                s = dots[j - first] * scale
                b = bias[i, j - near] if len(bias) > 0 else 0.0
                if b == -np.inf:
                    continue
                if bias_first and len(bias) > 0:
                    scores[seen] = s + b
                    s = scores[seen]
                if cap > 0:
                    s = cap * np.tanh(s / cap)
                if not bias_first and len(bias) > 0:
                    scores[seen] = s + b
                    s = scores[seen]
                scores[seen], keys[seen] = s, j
                seen += 1
                if s > m:
                    m = s
        sums = o[i]
        sums[:] = 0
        if seen == 0:
            lse[i] = sink
            continue
        z = np.exp(sink - m)
        for t in range(seen):
            w, values = np.exp(scores[t] - m), v[keys[t]]
            z += w
            for e in range(len(sums)):
                sums[e] += w * values[e]
        for e in range(len(sums)):
            sums[e] /= z
        lse[i] = m + np.log(z)


@njit(nogil=True, cache=True, error_model="numpy")  # pyright: ignore[reportUntypedFunctionDecorator]
def _dots(q: Any, k: Any, out: Any) -> None:
    """Write q·k for every key, a stretch of keys at a time, which stays in the nearest cache."""
    for first in range(0, len(out), 1024):
        part = out[first : first + 1024]
        part[:] = 0
        for d in range(len(q)):
            x, line = q[d], k[d, first : first + 1024]
            for j in range(len(part)):
                part[j] += x * line[j]
