"""A study of a long context: ``python -m benchmarks.long`` prints its table, its time and its memory.

65536 tokens, 8 heads, D = E = 64, float32, causal; 8 rows of each head, every method of which rows can be answered
alone and that costs at most half of exact attention, at budgets that are in use at such lengths. Queries and keys have
a part that moves slowly along the sequence and a part of their own, so that a row attends to its neighbourhood and to
keys far away that are like it. It fails where it takes more than 120 seconds or 3 GiB.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
from numpy.typing import NDArray

from refattn import masks, study

TOKENS, HEADS, DEPTH, ROWS = 65536, 8, 64, 8
SECONDS, BYTES = 120.0, 3 * 2**30
BUDGETS = {
    "sparse_transformer": (256,),
    "longformer": (256, 2048),
    "local_global": (256,),
    "linformer": (64,),
    "pooling": (64,),
    "performer": (32,),
    "segments": (256, 2048),
}


def capture(rng: np.random.Generator) -> tuple[NDArray[np.float32], ...]:
    """Return q, k and v."""
    walk = rng.standard_normal((HEADS, TOKENS // 256 + 2, DEPTH), dtype=np.float32)
    at, within = np.divmod(np.arange(TOKENS), 256)
    part = (within / 256).astype(np.float32)[:, None]
    slow = (1 - part) * walk[:, at] + part * walk[:, at + 1]
    q, k, v = (slow + rng.standard_normal(slow.shape, dtype=np.float32) for _ in range(3))
    return q, k, v


def main() -> int:
    """Print the table, the time and the memory."""
    q, k, v = capture(np.random.default_rng(0))
    start = time.perf_counter()
    table = study.compare(
        q, k, v, mask=masks.causal(), rows=ROWS, budgets=BUDGETS, cost=0.5, title=f"{TOKENS} tokens, {HEADS} heads"
    )
    seconds, most = time.perf_counter() - start, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(table)
    print(f"\n{len(table.rows)} rows in {seconds:.0f} s (at most {SECONDS:.0f})", end=", ")
    print(f"{most / 2**30:.2f} GiB (at most {BYTES / 2**30:.0f})")
    return 0 if seconds <= SECONDS and most <= BYTES and not table.violations else 1


if __name__ == "__main__":
    sys.exit(main())
