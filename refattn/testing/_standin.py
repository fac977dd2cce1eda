"""Stand-in until tolerance lands."""
from typing import Any, NamedTuple
from dataclasses import dataclass
import math
import numpy as np
from refattn import engines, rounding, softmax
from refattn.heads import matrix


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    inputs: str
    scores: str
    weights: str
    accumulate: str
    output: str


def A(a, b, c):
    return Arithmetic(inputs=a, scores=b, weights=c, accumulate=b, output=a)


PRESETS = {
    "fp64": A("float64", "float64", "float64"),
    "fp32": A("float32", "float32", "float32"),
    "fa2-fp16": A("float16", "float32", "float16"),
    "fa2-bf16": A("bfloat16", "float32", "bfloat16"),
}
U = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class Tolerance(NamedTuple):
    o: Any
    lse: Any
    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    sink: Any = None


def crude(arithmetic, q, k, v, *, do=None, dlse=None, **options):
    a = PRESETS[arithmetic] if isinstance(arithmetic, str) else arithmetic
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    call = engines.problem(q, k, v, **options)
    T, S, D, E = call.sizes
    o, lse = np.zeros((*call.leads.shape, T, E)), np.zeros((math.prod(call.leads.shape), T))
    g = [np.zeros(x.shape) for x in (q, k, v)]
    f, us, ul = 2.0, U[a.output], U[a.scores]
    for n, one in enumerate(call.all()):
        rows, keys = np.arange(T), np.arange(S)
        how = dict(bias=one.bias(rows, keys), sink=one.sink, softcap=call.softcap, order=call.order, mask=one.seen(), scale=call.scale)
        qq, kk, vv = (np.asarray(x, np.float64) for x in (one.q, one.k, one.v))
        part = rounding.allowance(softmax.partial, qq, kk, vv, **how)
        big = np.where(np.isfinite(one.v), np.abs(one.v), 0).max(initial=0)
        matrix(o, n)[:] = f * part.o * (ul / 2.0**-53) + 4 * U[a.weights] * big * 1.1
        lse[n] = f * part.lse * (ul / 2.0**-53)
        if do is not None:
            own = rounding.allowance(softmax.vjp, matrix(np.asarray(do, float), n), qq, kk, vv, **how)
            for x, y, name in zip(g, own, "qkv"):
                matrix(x, int(call.leads.of[name][n]))[:] += 4 * f * y * (us / 2.0**-53)
    empty = np.zeros(1)
    return Tolerance(o, lse.reshape(*call.leads.shape, T), *g)


def tolerance(arithmetic, q, k, v, *, do=None, dlse=None, **options):
    from refattn.testing import tolerance as real
    t = real(arithmetic, q, k, v, **options)
    if do is None:
        return t
    c = crude("fp32", q, k, v, do=do, dlse=dlse, **options)
    b = options.get("bias")
    return Tolerance(t.o, t.lse, c.q, c.k, c.v, None if not isinstance(b, np.ndarray) else np.full(b.shape, 1e-4))


def typical(arithmetic, q, k, v, *, rate=1e-6, **options):
    return tolerance(arithmetic, q, k, v, **options)
