"""Problems and kernels that the tolerance is tried on: every preset, and changes of it, in every order of summation."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from refattn import bias, masks
from refattn.testing import PRESETS, Arithmetic

KINDS = (
    "normal",
    "small",
    "large",
    "huge",
    "ties",
    "two levels",
    "offset values",
    "positive values",
    "offset keys",
    "outlier",
    "ascending",
    "uniform",
    "midpoints",
    "cancelling",
)


class Run(NamedTuple):
    """A problem, an arithmetic, and how its kernel is run; `options` are the keywords of `softmax.attend`."""

    arithmetic: Arithmetic
    arrays: dict[str, Any]
    options: dict[str, Any]
    do: Any
    dlse: Any
    how: dict[str, Any]

    @property
    def qkv(self) -> list[Any]:
        """The positional arguments."""
        return [self.arrays[name] for name in "qkv"]

    @property
    def named(self) -> dict[str, Any]:
        """The keywords: bias, sink and options."""
        return {name: x for name, x in self.arrays.items() if name not in "qkv"} | self.options


def changed(rng: np.random.Generator, arithmetic: Arithmetic) -> Arithmetic:
    """Change some of what an arithmetic leaves to be stated."""
    some: dict[str, Any] = {
        "scale": rng.choice(["scores", "q", "q and k"]),
        "exp": rng.choice(["exp", "exp2"]),
        "tile": rng.choice([None, 2, 16]),
        "sums": rng.choice(["in place", "apart"]),
        "truncates": bool(rng.integers(2)),
        "exp_ulp": float(rng.choice([2.0, 20.0])),
        "lse": rng.choice([None, "float32"]),
        "stored_gradients": (int(rng.integers(1, 9)), int(rng.integers(1, 9))),
        "delta": rng.choice([None, "output", "weights"]),
    }
    if arithmetic.normalise == "last":
        some["row_sum"] = rng.choice(["unrounded weights", "rounded weights"])
        some["lazy"] = float(rng.choice([0.0, 0.5]))
        some["splits"] = int(rng.integers(1, 4))
    if arithmetic.formats.accumulate.bits == 24:
        some["accumulate"] = rng.choice(["float32", "float32", "float16"])
    plain = {name: str(x) if isinstance(x, np.str_) else x for name, x in some.items()}
    return replace(arithmetic, **{name: x for name, x in plain.items() if rng.random() < 0.4})


def draw(
    rng: np.random.Generator, preset: str, *, most: int = 40, change: bool = False, kind: str | None = None
) -> Run:
    """Draw a problem of a kind that hurts, and a kernel."""
    arithmetic, kind = PRESETS[preset], kind or str(rng.choice(KINDS))
    if change:
        arithmetic = changed(rng, arithmetic)
    f = arithmetic.formats
    T, S, D, E = (int(rng.integers(1, n)) for n in (6, most + 1, 17, 4))
    q, k, v = (rng.standard_normal(shape) for shape in ((T, D), (S, D), (S, E)))
    sink = np.array(rng.standard_normal() * rng.choice([1.0, 20.0])) if rng.random() < 0.2 else None
    options: dict[str, Any] = {"scale": rng.choice([None, None, 0.25, -0.7])}
    table = rng.standard_normal((T, S)) if rng.random() < 0.25 else None
    if kind == "small":
        q, k = q * 0.02, k * 0.02
    elif kind in ("large", "huge"):
        q, k = q * (4 if kind == "large" else 30), k * (1 if kind == "large" else 4)
    elif kind == "ties":
        k = np.repeat(k[:1], S, axis=0)
    elif kind == "two levels":
        k = k[rng.integers(0, min(2, S), S)]
    elif kind == "offset values":
        v = v + 50
    elif kind == "positive values":
        v = np.abs(v)
    elif kind == "offset keys":
        k = k + float(rng.choice([8, 64]))
    elif kind == "outlier":
        v[0], k = v[0] * 1e4, k + 2
    elif kind == "ascending":
        q[:], k = q[:1], k[np.argsort(k @ q[0])]
    elif kind == "uniform":
        q = q * 0.0
    elif kind == "midpoints":
        q, v[:, 1:] = q * 0.0, 0.0
        table = midpoints(f.weights.u, v[:, 0], rng)[None].repeat(T, axis=0)
        sink = np.array(0.0)
    elif kind == "cancelling":
        q = q * 16
        table = -(f.inputs.round(q) @ f.inputs.round(k).T) * (options["scale"] or D**-0.5)
    arrays: dict[str, Any] = {"q": f.inputs.round(q), "k": f.inputs.round(k), "v": f.inputs.round(v)}
    if table is not None:
        if kind not in ("midpoints", "cancelling") and rng.random() < 0.3:
            table = np.where(rng.random((T, S)) < 0.3, -np.inf, table)
        arrays["bias"] = table if kind == "midpoints" else f.inputs.round(table)
    elif rng.random() < 0.1:
        options["bias"] = bias.alibi(float(rng.choice([0.5, 0.3])))
    if sink is not None:
        arrays["sink"] = f.inputs.round(sink)
    if rng.random() < 0.2 and kind != "midpoints":
        options["softcap"] = float(rng.choice([2.0, 30.0]))
    if rng.random() < 0.2:
        options["order"] = "bias, softcap"
    seen = [
        None,
        None,
        masks.causal(),
        masks.lengths(S // 2),
        masks.window(2, 0),
        masks.dense(rng.random((T, S)) < 0.7),
    ]
    options["mask"] = seen[rng.integers(len(seen))] if kind != "midpoints" else None
    do = f.output.round(rng.standard_normal((T, E)))
    dlse = rng.standard_normal(T) if rng.random() < 0.3 else None
    least = arithmetic.tile or 1
    how = {
        "summation": str(rng.choice(["forward", "reversed", "pairwise", "tree"])),
        "tile": int(rng.choice([n for n in (1, 2, 16, 64) if n >= least])),
        "splits": int(rng.integers(1, arithmetic.splits + 1)),
    }
    return Run(arithmetic, arrays, options, do, dlse, how)


def midpoints(u: float, v: Any, rng: np.random.Generator) -> Any:
    """Return logits of weights near the middle of two numbers of a format, on the side on which v gains."""
    start = 0.5 if u == 2.0**-24 else float(rng.choice([0.5, 0.25]))
    away = 3e-6 if u > 2.0**-20 else 0.0
    return np.log(start * (1 + u) * (1 + away * np.sign(v)))
