"""Try the tolerance on kernels that are right: ``python -m benchmarks.innocent [--runs N] [--seed N]``.

Emulated kernels of every preset, and of arithmetics that change it, on drawn problems of every kind that hurts; and,
where torch can be imported, torch's own CPU kernels. A ratio is error ÷ allowance, against the definition, whose
own rounding is allowed too. The table has the worst of each; `suspect` counts runs beyond `typical`. Exits 1 on a
violation.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from proofs import emulated
from refattn import masks, rounding, softmax
from refattn.testing import PRESETS, Arithmetic, emulate, tolerance, typical

ANSWERS = ("o", "lse", "q", "k", "v", "bias", "sink")


class Row(NamedTuple):
    """What one kind of kernel met."""

    worst: dict[str, float]
    runs: list[int]
    violations: list[str]
    beyond: list[float]


def ratio(got: Any, truth: Any, allowed: Any) -> float:
    """Return the largest error ÷ allowance; where nothing is promised there is none."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(got == truth, 0.0, np.abs(got - truth))
        part = np.where(error > 0, error / allowed, 0.0)
    part = np.where(np.isinf(allowed), 0.0, np.where(np.isnan(part), np.inf, part))
    return float(part.max(initial=0.0))


def judge(row: Row, name: str, run: emulated.Run, answers: dict[str, Any]) -> None:
    """Compare a kernel's answers with the definition."""
    named, arithmetic = run.named, run.arithmetic
    gradients = any(answers.get(x) is not None for x in "qkv")
    do = {"do": run.do, "dlse": run.dlse} if gradients else {}
    allowed = tolerance(arithmetic, *run.qkv, **named, **do)._asdict()
    truth = softmax.partial(*run.qkv, **named)._asdict()
    own = rounding.allowance(softmax.partial, *run.qkv, **named)._asdict()
    if gradients:
        truth |= softmax.vjp(run.do, *run.qkv, dlse=run.dlse, **named)._asdict()
        own |= rounding.allowance(softmax.vjp, run.do, *run.qkv, dlse=run.dlse, **named)._asdict()
    row.runs[0] += 1
    for answer in ANSWERS:
        if answers.get(answer) is None:
            continue
        met = ratio(answers[answer], truth[answer], allowed[answer] + own[answer])
        row.worst[answer] = max(row.worst[answer], met)
        if met > 1:
            row.violations.append(f"{name}: {answer} is {met:.4g} of what is allowed")
    model = typical(arithmetic, *run.qkv, **named)
    row.beyond.append(
        max(ratio(answers[s], truth[s], getattr(model, s) + own[s]) for s in ("o", "lse") if s in answers)
    )


def emulation(rng: np.random.Generator, run: emulated.Run) -> dict[str, Any]:
    """Return what the emulated kernel answers."""
    state = rng.integers(2**32)
    o, lse = emulate.attend(run.arithmetic, *run.qkv, **run.named, **run.how, rng=np.random.default_rng(state))
    g = emulate.vjp(
        run.arithmetic, run.do, *run.qkv, dlse=run.dlse, **run.named, **run.how, rng=np.random.default_rng(state)
    )
    return {"o": o, "lse": lse} | g._asdict()


def torch_runs(rng: np.random.Generator, count: int) -> Iterator[tuple[str, emulated.Run, dict[str, Any]]]:
    """Yield torch's own kernels: its CPU flash path and its math path, forward and backward."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # the vectorised exp of the flash path is within 20 units in the last place; k and v are read in tiles
    table: dict[str, tuple[Any, Arithmetic, Arithmetic]] = {}
    for dtype, name in (("float64", "fp64"), ("float32", "fp32"), ("bfloat16", "fa2-bf16"), ("float16", "fa2-fp16")):
        flash = PRESETS[name] if name == "fp64" else replace(PRESETS[name.replace("fa2", "torch-cpu")], exp_ulp=20.0)
        # the math path computes in float32, and multiplies q and k by the root of the scale
        plain = replace(PRESETS["fp32"], output=dtype, scale="q and k") if name.startswith("fa2") else None
        table[dtype] = (getattr(torch, dtype), flash, plain or replace(PRESETS[name], scale="q and k"))
    for n in range(count):
        dtype = list(table)[n % len(table)]
        kind, flash, plain = table[dtype]
        run = emulated.draw(rng, "fp32", most=300)
        arrays = {s: np.asarray(run.arrays[s]) for s in "qkv"}
        width = max(arrays["v"].shape[1], arrays["q"].shape[1])
        arrays = {s: np.pad(x, ((0, 0), (0, width - x.shape[1]))) for s, x in arrays.items()}
        tensors = [torch.from_numpy(arrays[s]).to(kind)[None, None].requires_grad_() for s in "qkv"]
        causal = arrays["q"].shape[0] == arrays["k"].shape[0]
        for backend, arithmetic in ((SDPBackend.FLASH_ATTENTION, flash), (SDPBackend.MATH, plain)):
            for x in tensors:
                x.grad = None
            with sdpa_kernel(backend):
                o = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
            do = torch.from_numpy(rng.standard_normal(o.shape)).to(kind)
            o.backward(do)
            given = {s: x.detach()[0, 0].double().numpy() for s, x in zip("qkv", tensors, strict=True)}
            options = {"mask": masks.causal() if causal else None}
            case = emulated.Run(arithmetic, given, options, do[0, 0].double().numpy(), None, {})
            answers = {"o": o.detach()[0, 0].double().numpy()}
            answers |= {s: x.grad[0, 0].double().numpy() for s, x in zip("qkv", tensors, strict=True)}
            label = "flash" if backend == SDPBackend.FLASH_ATTENTION else "math"
            yield f"torch {label} {dtype}", case, answers


def main() -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.innocent")
    parser.add_argument("--runs", type=int, default=10_000, help="emulated kernels in all")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    start, rng = time.perf_counter(), np.random.default_rng(chosen.seed)
    rows: dict[str, Row] = defaultdict(lambda: Row(defaultdict(float), [0], [], []))
    for n in range(chosen.runs):
        preset = list(PRESETS)[n % len(PRESETS)]
        change = n // len(PRESETS) % 2 == 1
        run = emulated.draw(rng, preset, most=200 if n % 50 == 0 else 40, change=change)
        judge(rows[preset + (", changed" if change else "")], f"run {n}", run, emulation(rng, run))
    if importlib.util.find_spec("torch"):
        for name, run, answers in torch_runs(rng, max(4, chosen.runs // 50)):
            judge(rows[name], name, run, answers)
    print(
        f"worst error / allowance; {sum(r.runs[0] for r in rows.values())} runs, seed {chosen.seed}, "
        f"{time.perf_counter() - start:.0f} s"
    )
    print(
        f"{'kernel':<22}{'runs':>6}"
        + "".join(f"{s if s in ('o', 'lse') else 'd' + s:>8}" for s in ANSWERS)
        + f"{'wrong':>7}{'typical':>9}{'suspect':>9}"
    )
    for name, row in sorted(rows.items()):
        cells = "".join(f"{row.worst[s]:>8.3f}" if s in row.worst else f"{'-':>8}" for s in ANSWERS)
        suspect = sum(x > 1 for x in row.beyond)
        print(f"{name:<22}{row.runs[0]:>6}{cells}{len(row.violations):>7}{max(row.beyond):>9.3f}{suspect:>9}")
    wrong = [line for row in rows.values() for line in row.violations]
    print(*wrong[:20], sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
