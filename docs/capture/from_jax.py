"""Capture q, k and v of a JAX model: wrap its attention function in one that calls back, also under jit.

python from_jax.py jax.npz && refattn study jax.npz --causal
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from agree import largest_difference

from refattn import masks

CALLS: list[dict[str, Any]] = []


def recorded_attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Call ``jax.nn.dot_product_attention`` and record what it was given, (B, T, heads, D), as (B, heads, T, D)."""
    o = jax.nn.dot_product_attention(q, k, v, **options)

    def record(*arrays: Any) -> None:
        moved = (np.moveaxis(np.asarray(x, np.float32), -2, -3) for x in arrays)
        CALLS.append(dict(zip("qkvo", moved, strict=True)))

    jax.debug.callback(record, q, k, v, o, ordered=True)
    return o


def model(x: Any, layers: Any, attention: Any = jax.nn.dot_product_attention) -> Any:
    """Return a small causal transformer's output, (B, T, 64): eight heads of width 8 that share two of keys."""
    for wq, wk, wv, wo in layers:
        y = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
        q, k, v = (jnp.einsum("btm,mhd->bthd", y, w) for w in (wq, wk, wv))
        x = x + jnp.einsum("bthd,hdm->btm", attention(q, k, v, is_causal=True), wo)
    return x


def main(file: str) -> None:
    """Record three layers on one sequence, compiled."""
    shapes = ((64, 8, 8), (64, 2, 8), (64, 2, 8), (8, 8, 64))
    keys = iter(jax.random.split(jax.random.key(0), 13))
    layers = [[jax.random.normal(next(keys), shape) / 8 for shape in shapes] for _ in range(3)]
    x = jax.random.normal(next(keys), (1, 96, 64))
    jax.block_until_ready(jax.jit(lambda x: model(x, layers, recorded_attention))(x))
    jax.effects_barrier()  # callbacks may still be under way

    assert len(CALLS) == 3
    worst = max(largest_difference(*(call[name] for name in "oqkv"), mask=masks.causal()) for call in CALLS)
    q, k, v = (np.stack([call[name][0] for call in CALLS]) for name in "qkv")
    np.savez(file, q=q, k=k, v=v, layers=np.arange(len(CALLS)))
    print(f"{len(CALLS)} layers of a compiled JAX model, causal, scale 1/√D")
    print(f"q: {q.shape} = (layers, heads, T, D); k, v: {k.shape}; {q.dtype}")
    print(f"largest difference from refattn.softmax.attend: {worst:.2g}, within the bound of float32")
    print(f"written to {file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
