"""Try libraries' own kernels: ``python -m benchmarks.kernels [--only NAME]``.

The conformance kit on each kernel that runs on a CPU here, in each arithmetic that it computes in. Prints a line a
kernel, and each fault with what is known of it. Exits 1 where a fault is not known, or a known one is gone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from typing import Any, NamedTuple

from refattn.testing import Report, check


class Kernel(NamedTuple):
    """A library's kernel, what it is called with, and which faults are known: configuration → why."""

    name: str
    function: str
    profile: str
    arithmetic: str
    library: str
    known: dict[str, str]
    options: dict[str, Any]


def torch_flash(*args: Any, **named: Any) -> Any:
    """PyTorch's blocked kernel alone: what it does not take it refuses."""
    return _torch("FLASH_ATTENTION", *args, **named)


def torch_math(*args: Any, **named: Any) -> Any:
    """PyTorch's plain composition alone."""
    return _torch("MATH", *args, **named)


def _torch(backend: str, *args: Any, **named: Any) -> Any:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        try:
            return torch.nn.functional.scaled_dot_product_attention(*args, **named)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise NotImplementedError(f"PyTorch has no {backend} kernel for this") from None
            raise


UNUSED = {
    f"{name}, forward": "a weight of 0 times NaN or infinity in a slot that no row sees"
    for name in ("NaN in unused slots", "Inf in unused slots", "a length of 0")
}
SDPA = "torch.nn.functional:scaled_dot_product_attention"
HERE = "benchmarks.kernels"
KERNELS = (
    Kernel("torch", SDPA, "torch", "fp32", "torch", {}, {}),
    Kernel("torch", SDPA, "torch", "fp64", "torch", {}, {}),
    Kernel("torch", SDPA, "torch", "torch-cpu-bf16", "torch", {}, {}),
    Kernel("torch", SDPA, "torch", "torch-cpu-fp16", "torch", {}, {}),
    Kernel("torch, flash", f"{HERE}:torch_flash", "torch", "torch-cpu-bf16", "torch", {}, {}),
    Kernel("torch, math", f"{HERE}:torch_math", "torch", "fp32", "torch", {}, {}),
    Kernel("torch, math", f"{HERE}:torch_math", "torch", "bf16", "torch", {}, {}),
    Kernel("jax", "jax.nn:dot_product_attention", "jax", "fp32", "jax", UNUSED, {}),
    Kernel(
        "transformers, Llama eager",
        "transformers.models.llama.modeling_llama:eager_attention_forward",
        "transformers/eager",
        "fp32",
        "transformers",
        UNUSED,
        {"unsupported": ["softcap"]},  # which it takes, as it takes any other keyword, and ignores
    ),
)


def judged(kernel: Kernel) -> tuple[Report, list[str]]:
    """Return the report on a kernel, and what is to be said of it that nobody knew."""
    report = check(kernel.function, kernel.profile, kernel.arithmetic, **kernel.options)
    faults = {f"{one.configuration}, {one.asked}" for one in report.wrong}
    new = [f"{kernel.name} in {kernel.arithmetic}: {one}" for one in report.wrong if _of(one) not in kernel.known]
    gone = [f"{kernel.name} in {kernel.arithmetic}: {name} is right" for name in kernel.known if name not in faults]
    return report, new + gone


def _of(one: Any) -> str:
    return f"{one.configuration}, {one.asked}"


def main() -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.kernels")
    parser.add_argument("--only", default="", help="kernels whose names begin with this")
    chosen, unknown = parser.parse_args(), list[str]()
    print(
        f"{'kernel':<28}{'arithmetic':<12}{'right':>6}{'suspect':>9}{'faults':>8}{'gaps':>6}{'worst':>8}{'seconds':>9}"
    )
    for kernel in KERNELS:
        if not kernel.name.startswith(chosen.only):
            continue
        if importlib.util.find_spec(kernel.library) is None:
            unknown.append(f"{kernel.library} is not installed")
            continue
        began = time.perf_counter()
        report, new = judged(kernel)
        kinds = [one.verdict.kind for one in report.results]
        worst = max(
            (one.verdict.ratio for one in report.results if one.verdict.kind in ("right", "suspect")), default=0
        )
        print(
            f"{kernel.name:<28}{kernel.arithmetic:<12}{kinds.count('right'):>6}{kinds.count('suspect'):>9}"
            f"{len(report.wrong):>8}{kinds.count('unsupported'):>6}{worst:>8.2g}{time.perf_counter() - began:>9.0f}",
            flush=True,
        )
        for one in report.wrong:
            if _of(one) in kernel.known:
                print(f"    {_of(one)}: {one.verdict.kind}, {one.verdict.ratio:.3g} times the bound;")
                print(f"        {kernel.known[_of(one)]}")
        unknown += new
    print(*unknown, sep="\n", end="\n" if unknown else "")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
