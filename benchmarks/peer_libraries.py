"""The libraries that `benchmarks.peers` runs: how each is called, and the arithmetic that it computes in."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from refattn.conventions import Call, Profile, Written, profile
from refattn.engines import Unsupported
from refattn.testing import PRESETS, Arithmetic

LIBRARIES = ("torch", "jax", "onnx", "transformers", "x_transformers")
SHAPES = 6
"""Of how many calls JAX gets the shapes: it compiles each operation anew for every shape."""
TORCH_EXP = 20.0
"""What PyTorch declares of its fastest vectorised exponential, in units in the last place."""


class Peer(NamedTuple):
    """A library in a dtype: ``run(call, written)`` is its answer, arrays as NumPy's; `shapes` as `drawn` takes it."""

    name: str
    profile: Profile
    dtype: str
    arithmetic: Arithmetic
    write: Callable[[Call], Written]
    run: Callable[[Call, Written], Any]
    shapes: int | None = None


def peers() -> Iterator[Peer]:
    """Yield those of the libraries that are installed."""
    for library, own in (
        ("torch", torch_peers),
        ("jax", jax_peers),
        ("onnx", onnx_peers),
        ("transformers", transformers_peers),
        ("x_transformers", x_transformers_peers),
    ):
        if importlib.util.find_spec(library) is not None:
            yield from own()


def mapped(make: Callable[[Any], Any], x: Any) -> Any:
    """Return something with its arrays replaced."""
    if isinstance(x, np.ndarray):
        return make(x)
    if isinstance(x, dict):
        return {key: mapped(make, value) for key, value in x.items()}
    if isinstance(x, SimpleNamespace):
        return SimpleNamespace(**mapped(make, vars(x)))
    return x


def tensor(dtype: str, x: Any) -> Any:
    """Return a tensor: of this dtype where there were floats."""
    import torch

    own = torch.from_numpy(np.array(x))
    return own.to(getattr(torch, dtype)) if own.is_floating_point() else own


def numbers(x: Any) -> Any:
    """Return what torch returned as float64."""
    if isinstance(x, tuple):
        return tuple(numbers(y) for y in x)
    return x.detach().double().numpy() if hasattr(x, "detach") else x


def in_torch(function: Callable[..., Any], dtype: str) -> Callable[[Call, Written], Any]:
    """Return a run of a torch function."""
    make = partial(tensor, dtype)

    def run(call: Call, words: Written) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return numbers(function(*(mapped(make, x) for x in words.args), **mapped(make, words.kwargs)))

    return run


def eager(dtype: str, **changes: Any) -> Arithmetic:
    """Return the arithmetic of code that stores each step in a dtype, whose softmax is in float32."""
    if dtype in ("bfloat16", "float16"):
        return replace(PRESETS["bf16" if dtype == "bfloat16" else "fp16"], **{"exp_ulp": TORCH_EXP, **changes})
    # Softmax in float32, whatever comes in: a float64 answer is no better than a float32 one.
    return replace(PRESETS["fp32"], **{"inputs": dtype, "output": dtype, "exp_ulp": TORCH_EXP, **changes})


def torch_peers() -> Iterator[Peer]:
    """Yield PyTorch's paths on a CPU."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend: Any) -> Callable[..., Any]:
        def attention(*args: Any, **kwargs: Any) -> Any:
            try:
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
            except RuntimeError as error:
                raise Unsupported(f"torch: {str(error).splitlines()[0]}") from None

        return attention

    sdpa, cpu, flex = profile("torch"), profile("torch/flash-cpu"), profile("torch/flex")
    for dtype, preset in (("float64", "fp64"), ("float32", "fp32"), ("bfloat16", "fa2-bf16"), ("float16", "fa2-fp16")):
        half = dtype in ("bfloat16", "float16")
        flash = PRESETS[preset] if dtype == "float64" else replace(PRESETS[preset], exp_ulp=TORCH_EXP)
        math = replace(PRESETS["fp32"], output=dtype) if half else PRESETS[preset]
        math = replace(math, scale="q and k", exp_ulp=TORCH_EXP)
        for label, backend, arithmetic in (
            ("math", SDPBackend.MATH, math),
            ("flash", SDPBackend.FLASH_ATTENTION, flash),
        ):
            yield Peer(
                f"torch, {label}, {dtype}", sdpa, dtype, arithmetic, sdpa.write, in_torch(through(backend), dtype)
            )
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        yield Peer(f"torch/flash-cpu, {dtype}", cpu, dtype, flash, cpu.write, in_torch(operation, dtype))
    for dtype, preset in (("float64", "fp64"), ("float32", "fp32")):
        arithmetic = replace(PRESETS[preset], exp_ulp=TORCH_EXP)
        yield Peer(f"torch/flex, {dtype}", flex, dtype, arithmetic, flex_words, flex_run(dtype))


def flex_words(call: Call) -> Written:
    """Refuse what flex has nothing for; its functions are made of the call itself."""
    if np.ndim(call.q) != 4 or call.sink is not None or call.lengths is not None:
        raise Unsupported("flex_attention has no sinks, and lengths only as a function")
    return Written((call.q, call.k, call.v), {})


def flex_run(dtype: str) -> Callable[[Call, Written], Any]:
    """Return a run of flex_attention, whose functions close over tensors."""
    import torch
    from torch.nn.attention import flex_attention as flex

    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # small problems: without tracing, as its warning says

    def run(call: Call, words: Written) -> Any:
        q, k, v = (tensor(dtype, np.asarray(x)) for x in words.args)
        (B, H, T), S = q.shape[:3], k.shape[2]
        band = profile("torch/flex").write(replace(call, mask=None, bias=None, slopes=None, softcap=None))
        sees = band.kwargs.get("block_mask")
        mask = None if call.mask is None else torch.from_numpy(np.broadcast_to(call.mask, (B, H, T, S)).copy())
        bias = None if call.bias is None else tensor(dtype, np.broadcast_to(call.bias, (B, H, T, S)))
        slopes = None if call.slopes is None else tensor(dtype, np.asarray(call.slopes))

        def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
            by_mask = j == j if mask is None else mask[b, h, i, j]
            return by_mask if sees is None else by_mask & sees(b, h, i, j)

        def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if call.softcap is not None:
                s = call.softcap * torch.tanh(s / call.softcap)
            if slopes is not None:
                s = s + slopes[h] * (j - i - (S - T))
            return s if bias is None else s + bias[b, h, i, j]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kwargs = {"scale": call.scale, "enable_gqa": H != k.shape[1], "return_lse": True, "score_mod": score}
            block_mask = flex.create_block_mask(seen, B, H, T, S, device="cpu")
            return numbers(flex.flex_attention(q, k, v, block_mask=block_mask, **kwargs))

    return run


def jax_peers() -> Iterator[Peer]:
    """Yield JAX's functions on a CPU."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.flash_attention import mha_reference

    jax.config.update("jax_enable_x64", True)
    nn, pallas = profile("jax"), profile("jax/pallas-tpu")

    def made(dtype: str, x: Any) -> Any:
        return jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype)

    def numpy(x: Any) -> Any:
        return tuple(map(numpy, x)) if isinstance(x, tuple) else np.asarray(x, np.float64)

    def run(function: Callable[..., Any], dtype: str, call: Call, words: Written) -> Any:
        make = partial(made, dtype)
        return numpy(function(*(mapped(make, x) for x in words.args), **mapped(make, words.kwargs)))

    def reference(q: Any, k: Any, v: Any, ab: Any = None, **kwargs: Any) -> Any:
        return mha_reference(q, k, v, ab, **kwargs)

    for dtype in ("float64", "float32", "bfloat16", "float16"):
        half = dtype in ("bfloat16", "float16")
        arithmetic = eager(dtype, lse=dtype, **({"stored_scores": None} if half else {"stored_scores": "float32"}))
        yield Peer(
            f"jax, {dtype}", nn, dtype, arithmetic, nn.write, partial(run, jax.nn.dot_product_attention, dtype), SHAPES
        )
    yield Peer(
        "jax/pallas-tpu, its reference, float32",
        pallas,
        "float32",
        eager("float32"),
        pallas.write,
        partial(run, reference, "float32"),
        SHAPES,
    )


def onnx_peers() -> Iterator[Peer]:
    """Yield the operator's reference implementation."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    kinds = {
        np.dtype(np.float64): TensorProto.DOUBLE,
        np.dtype(np.float32): TensorProto.FLOAT,
        np.dtype(np.float16): TensorProto.FLOAT16,
        np.dtype(np.bool_): TensorProto.BOOL,
        np.dtype(np.int64): TensorProto.INT64,
    }
    inputs = ("attn_mask", "nonpad_kv_seqlen")
    places = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")

    def run(call: Call, words: Written) -> Any:
        given = dict(zip("QKV", words.args, strict=True)) | {s: x for s, x in words.kwargs.items() if s in inputs}
        options = {s: x for s, x in words.kwargs.items() if s not in inputs}
        names = [s if s in given else "" for s in places[: max(places.index(s) for s in given) + 1]]
        node = helper.make_node("Attention", names, ["Y"], **options)
        values = [helper.make_tensor_value_info(s, kinds[x.dtype], x.shape) for s, x in given.items()]
        out = helper.make_tensor_value_info("Y", kinds[given["Q"].dtype], None)
        model = helper.make_model(
            helper.make_graph([node], "attention", values, [out]), opset_imports=[helper.make_opsetid("", 25)]
        )
        with np.errstate(all="ignore"):
            return np.asarray(ReferenceEvaluator(model).run(None, given)[0], np.float64)

    for name in ("onnx", "onnx/cache"):
        own = profile(name)
        for dtype, preset in (("float64", "fp64"), ("float32", "fp32")):
            # the operator's scale is a float32, and so is its root
            arithmetic = replace(PRESETS[preset], scale="q and k", scaled="float32")
            yield Peer(f"{name}, its reference, {dtype}", own, dtype, arithmetic, own.write, run)


def transformers_peers() -> Iterator[Peer]:
    """Yield the functions that Transformers' models call, with masks that its own functions make."""
    import torch
    from transformers import masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss
    from transformers.models.llama.modeling_llama import eager_attention_forward as llama

    def masked(call: Call, words: Written, dtype: str) -> Written:
        """Let the library make the mask, where it can: causal, with a window of keys to the left or without."""
        plain = call.mask is None and call.bias is None and call.lengths is None
        left, right = call.window or (None, None)
        if not plain or not call.causal or right is not None:
            return words
        function = masking_utils.causal_mask_function
        function = function if left is None else masking_utils.sliding_window_causal_mask_function(left)
        T, S = call.sizes
        sizes = {"batch_size": len(call.q), "q_length": T, "kv_length": S, "q_offset": S - T}
        if words.args[4].dtype == np.bool_:
            mask = masking_utils.sdpa_mask(**sizes, mask_function=function, allow_is_causal_skip=False)
        else:
            mask = masking_utils.eager_mask(**sizes, mask_function=function, dtype=getattr(torch, dtype))
        return Written((*words.args[:4], mask), words.kwargs)

    def run(function: Callable[..., Any], dtype: str, call: Call, words: Written) -> Any:
        return in_torch(function, dtype)(call, masked(call, words, dtype))

    one, oss, sdpa = (profile(f"transformers/{name}") for name in ("eager", "gpt-oss", "sdpa"))

    def uncapped(call: Call) -> Written:
        if call.softcap is not None:
            raise Unsupported("llama has no softcap")
        return one.write(call)

    for dtype in ("float64", "float32", "bfloat16"):
        for label, own, write, function in (
            ("eager, gemma2", one, one.write, gemma2),
            ("eager, llama", one, uncapped, llama),
            ("gpt-oss", oss, oss.write, gpt_oss),
        ):
            # gpt-oss takes its softmax in the dtype of the logits; the others in float32, where the least finite
            # number of a float64 mask is −inf, and a row of nothing else NaN
            if dtype == "float64" and own is one:
                continue
            arithmetic = PRESETS["fp64"] if dtype == "float64" else eager(dtype)
            if own is oss and dtype == "bfloat16":
                # it stores the differences from the maximum too, in bfloat16
                arithmetic = replace(arithmetic, scores="bfloat16")
            yield Peer(f"transformers/{label}, {dtype}", own, dtype, arithmetic, write, partial(run, function, dtype))
    arithmetic = replace(PRESETS["fp32"], exp_ulp=TORCH_EXP, scale="q and k")
    yield Peer(
        "transformers/sdpa, float32",
        sdpa,
        "float32",
        arithmetic,
        sdpa.write,
        partial(run, sdpa_attention_forward, "float32"),
    )


def x_transformers_peers() -> Iterator[Peer]:
    """Yield x-transformers' Attend."""
    import torch
    from x_transformers.attend import Attend

    own = profile("x_transformers")

    def attend(q: Any, k: Any, v: Any, mask: Any = None, attn_bias: Any = None, **options: Any) -> Any:
        sink = options.pop("head_attn_sink", None)
        module = Attend(**options, heads=q.shape[1], head_learned_sink=sink is not None)
        if sink is not None:
            module.head_attn_sink = torch.nn.Parameter(sink)
        return module(q, k, v, mask=mask, attn_bias=attn_bias)[0]

    for dtype in ("float64", "float32", "bfloat16"):
        yield Peer(f"x_transformers, {dtype}", own, dtype, eager(dtype), own.write, in_torch(attend, dtype))
