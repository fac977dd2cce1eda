"""Capture q, k and v of a PyTorch model: record what scaled_dot_product_attention is given.

python from_pytorch.py pytorch.npz && refattn study pytorch.npz --causal
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from agree import largest_difference
from torch import nn

from refattn import masks


@contextmanager
def recording() -> Iterator[list[dict[str, Any]]]:
    """Record every call of ``torch.nn.functional.scaled_dot_product_attention``, in order: one a layer.

    `nn.MultiheadAttention` makes such a call where it is asked for no weights, as `nn.TransformerEncoderLayer` does;
    its fast path, which makes none, is turned off for the while.
    """
    calls: list[dict[str, Any]] = []
    attention, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

    def recorded(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Any:
        o = attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
        if attn_mask is not None or dropout_p:
            raise ValueError("record one sequence without padding or dropout: refattn study takes no mask but --causal")
        arrays = {
            name: x.detach().float().cpu().numpy() for name, x in zip("qkvo", (query, key, value, o), strict=True)
        }
        calls.append(arrays | {"causal": is_causal, "scale": more.get("scale")})
        return o

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", recorded):
            yield calls
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def main(file: str) -> None:
    """Record a small causal encoder made of `nn.MultiheadAttention`, on one sequence."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=128, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=3).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(96)
    with torch.no_grad(), recording() as calls:
        model(torch.randn(1, 96, 64), mask=mask, is_causal=True)

    assert len(calls) == 3 and all(call["causal"] and call["scale"] is None for call in calls)
    worst = max(largest_difference(*(call[name] for name in "oqkv"), mask=masks.causal()) for call in calls)
    np.savez(file, **{f"{n}.{name}": call[name][0] for n, call in enumerate(calls) for name in "qkv"})
    print(f"{len(calls)} layers of torch.nn.TransformerEncoder, causal, scale 1/√D")
    print(f"q, k, v of each: {calls[0]['q'].shape[1:]} = (heads, T, D), {calls[0]['q'].dtype}")
    print(f"largest difference from refattn.softmax.attend: {worst:.2g}, within the bound of float32")
    print(f"written to {file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
