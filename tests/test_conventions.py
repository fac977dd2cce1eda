"""What libraries mean: every axis against dense formulas of this file, every library's words there and back."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.calls import drawn, written
from refattn import conventions as like
from refattn.conventions import AXES, LIBRARIES, Call, Convention, Profile, neighbours
from refattn.engines import Unsupported
from refattn.testing import assert_within, tolerance

PROFILES = [
    profile
    for library in LIBRARIES
    for profile in importlib.import_module(f"refattn.conventions.{library}").PROFILES.values()
]
NAMES = [profile.name for profile in PROFILES]

allowed = partial(tolerance, "fp64")


def rows_of(call: Call, rows: str, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each row's position, in numbers of its own sequence's keys; its sequence; each key's sequence; its own number."""
    T, S = call.sizes
    if call.starts is None:
        there = S if call.lengths is None else int(call.lengths[b])
        p = [i + there - T if rows == "bottom-right" else i for i in range(T)]
        return np.array(p), np.zeros(T), np.where(np.arange(S) < there, 0, -1), np.arange(S)
    p, ids, keys, own = [], [], [], []
    for n in range(len(call.starts[0]) - 1):
        t, s = (int(x[n + 1] - x[n]) for x in call.starts)
        p += [i + s - t if rows == "bottom-right" else i for i in range(t)]
        ids += [n] * t
        keys += [n] * s
        own += range(s)
    return np.array(p, int), np.array(ids), np.array(keys), np.array(own, int)


def head(x: Any, shape: tuple[int, ...], b: int, h: int) -> np.ndarray:
    return np.broadcast_to(x, shape)[b, h]


def dense(call: Call, how: Convention) -> Iterator[dict[str, Any]]:
    """Everything about one head at a time, as formulas."""
    q, k, v = (np.reshape(x, (-1, *np.shape(x)[-3:])) for x in (call.q, call.k, call.v))
    (B, H, T, D), (few, S) = q.shape, k.shape[1:3]
    scale = D**-0.5 if call.scale is None else call.scale
    for b in range(B):
        for h in range(H):
            kv = h // (H // few) if how.groups == "interleaved" else h % few
            p, ids, keys, own = rows_of(call, how.rows, b)
            w, a = rows_of(call, how.window_rows, b)[0], rows_of(call, how.alibi_rows, b)[0]
            seen = ids[:, None] == keys[None, :]
            if call.causal:
                seen = seen & (own <= p[:, None])
            left, right = call.window or (None, None)
            if left is not None:
                seen = seen & (own > w[:, None] - left - (how.window == "keys to the left"))
            if right is not None:
                seen = seen & (own <= w[:, None] + right)
            if call.mask is not None:
                seen = seen & (head(call.mask, (B, H, T, S), b, h) == (how.mask == "keep"))
            bias, factor = np.zeros((T, S)), scale if how.bias == "before the scale" else 1.0
            if call.bias is not None:
                bias = factor * head(call.bias, (B, H, T, S), b, h)
                seen = seen & (bias > -np.inf)
            if call.slopes is not None:
                distance = {
                    "signed distance": own - a[:, None],
                    "absolute distance": -np.abs(own - a[:, None]),
                    "key position": own + 0 * a[:, None],
                }
                most = S if call.starts is None else np.diff(call.starts[1]).max()
                only_past = (call.causal or right == 0) and (left is None or left >= most)
                distance["key position if causal"] = distance["key position" if only_past else "absolute distance"]
                bias = head(np.asarray(call.slopes)[..., None], (B, H, 1), b, h) * distance[how.alibi]
            z = scale * q[b, h] @ k[b, kv].T
            cap = (lambda x: x) if call.softcap is None else lambda x: call.softcap * np.tanh(x / call.softcap)
            z = np.where(seen, z, 0.0)
            bias = np.where(seen, bias, 0.0)
            inside = z + bias if how.order == "bias, softcap" else z
            s = cap(inside) + (0.0 if how.order == "bias, softcap" else bias)
            sink = -np.inf if call.sink is None else float(head(np.asarray(call.sink)[..., None], (B, H, 1), b, h)[0])
            empty = ~seen.any(1) & (call.sink is None)
            m = np.where(empty, 0.0, np.maximum(np.where(seen, s, -np.inf).max(1), sink))
            e = np.where(seen, np.exp(s - m[:, None]), 0.0)
            total, keyed = np.where(empty, 1.0, e.sum(1) + np.exp(sink - m)), e.sum(1)
            with np.errstate(divide="ignore"):
                lse = np.log(np.where(empty, 0.0, total if how.sink == "counted" else keyed)) + m
            yield {
                "at": (b, h, kv),
                "seen": seen,
                "empty": empty,
                "p": e / total[:, None],
                "lse": lse / (np.log(2.0) if how.lse == "bits" else 1.0),
                "slope": np.ones((T, S)) if call.softcap is None else 1.0 - np.tanh(inside / call.softcap) ** 2,
                "scale": scale,
                "factor": factor,
                "sink": np.exp(sink - m) / total,
            }


def answer(call: Call, how: Convention) -> tuple[np.ndarray, np.ndarray]:
    q, v = (np.reshape(x, (-1, *np.shape(x)[-3:])) for x in (call.q, call.v))
    o, lse = np.zeros((*q.shape[:3], v.shape[3])), np.zeros(q.shape[:3])
    for one in dense(call, how):
        b, h, kv = one["at"]
        o[b, h] = one["p"] @ v[b, kv]
        o[b, h, one["empty"]] = {"zero": 0.0, "NaN": np.nan, "any": 0.0, "mean of v": v[b, kv].mean(0)}[how.empty]
        empty_lse = {"-inf": -np.inf, "+inf": np.inf, "0": 0.0, "any": -np.inf}[how.empty_lse]
        lse[b, h] = np.where(one["empty"], empty_lse, one["lse"])
    lead = np.shape(call.q)[:-1]
    return o.reshape(*lead, -1), lse.reshape(lead)


def gradients(call: Call, how: Convention, do: np.ndarray, dlse: np.ndarray) -> dict[str, np.ndarray]:
    q, k, v, do = (np.reshape(x, (-1, *np.shape(x)[-3:])) for x in (call.q, call.k, call.v, do))
    dlse = dlse.reshape(do.shape[:3]) / (np.log(2.0) if how.lse == "bits" else 1.0)
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape, "sink": q.shape[:2], "bias": (*q.shape[:3], k.shape[2])}
    out = {name: np.zeros(shape) for name, shape in shapes.items()}
    for one in dense(call, how):
        b, h, kv = one["at"]
        g, own = do[b, h], np.where(one["empty"], 0.0, dlse[b, h])
        own = (own - (g * (one["p"] @ v[b, kv])).sum(1))[:, None]
        ds = one["p"] * (g @ v[b, kv].T + own)
        dz = ds * one["slope"]
        out["q"][b, h] = one["scale"] * dz @ k[b, kv]
        out["k"][b, kv] += one["scale"] * dz.T @ q[b, h]
        lost = one["empty"] & (how.empty == "mean of v")
        out["v"][b, kv] += one["p"].T @ g + (g[lost].sum(0) / k.shape[2] if lost.any() else 0.0)
        out["sink"][b, h] = (one["sink"] * own[:, 0]).sum()
        out["bias"][b, h] = one["factor"] * (dz if how.order == "bias, softcap" else ds)
    return out


def fits(call: Call, how: Convention, o: Any, lse: Any = None) -> None:
    """Another evaluation of the same is within the rounding of both."""
    meaning = call.under(how)
    bound = meaning.allowance(allowed)
    expected = meaning.answer()
    judged = ~(meaning.empty & (how.empty in ("NaN", "any")))
    assert_within(o[judged], expected.o[judged], 2 * bound.o[judged], empty=True)
    assert np.isnan(o[meaning.empty]).all() or how.empty != "NaN"
    if lse is not None:
        plain = np.isfinite(expected.lse)
        assert_within(lse[plain], expected.lse[plain], 2 * bound.lse[plain], empty=True)
        assert how.empty_lse == "any" or (lse[~plain] == expected.lse[~plain]).all()


def some_convention(rng: np.random.Generator) -> Convention:
    return Convention(**{axis: str(rng.choice(values)) for axis, values in AXES().items()})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
def test_every_meaning_is_its_dense_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(25):
        call, how = drawn(rng), some_convention(rng)
        fits(call, how, *answer(call, how))


def differ(call: Call, one: Convention, other: Convention) -> bool:
    """Whether two meanings of a call are further apart than the rounding of both, or one is NaN or infinite alone."""
    bounds, a, b = call.under(one).allowance(allowed), call.under(one).answer(), call.under(other).answer()
    for x, y, bound in zip(a, b, bounds, strict=True):
        with np.errstate(invalid="ignore"):
            far = ~(np.abs(x - y) <= 2 * bound) & ~(x == y) & ~(np.isnan(x) & np.isnan(y))
        if far.any():
            return True
    return False


def test_every_value_of_every_axis_changes_some_answer() -> None:
    rng, pending = np.random.default_rng(0), list(neighbours(Convention()))
    for _ in range(400):
        call = drawn(rng)
        pending = [(axis, value, how) for axis, value, how in pending if not differ(call, Convention(), how)]
        if not pending:
            break
    assert not [(axis, value) for axis, value, _ in pending]


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_the_dense_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(15):
        call, how = drawn(rng, most=5), some_convention(rng)
        if call.sink is not None:
            how = Convention(**{**vars(how), "sink": "counted"})
        meaning = call.under(how)
        do, dlse = (rng.standard_normal(x.shape) for x in meaning.answer())
        expected, actual = gradients(call, how, do, dlse), meaning.vjp(do, dlse)._asdict()
        bound = meaning.gradient_allowance(
            lambda do, q, k, v, **options: tolerance("fp64", q, k, v, do=do, **options), do, dlse
        )
        for name in ("q", "k", "v", "bias", "sink"):
            given = getattr(call, name)
            if given is None:
                continue
            allowed_here = np.broadcast_to(getattr(bound, name), np.shape(given))
            assert_within(actual[name], summed(expected[name], np.shape(given)), 2 * allowed_here, empty=True)


def summed(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What was broadcast collects the gradients of all that it was broadcast to."""
    if x.size == int(np.prod(shape)):
        return x.reshape(shape)
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] > 1), keepdims=True).reshape(shape)


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES)
def test_what_a_library_means_is_what_its_words_mean(profile: Profile) -> None:
    rng = np.random.default_rng(len(profile.name))
    call = Call(q=rng.normal(size=(1, 2, 3, 4)), k=rng.normal(size=(1, 2, 5, 4)), v=rng.normal(size=(1, 2, 5, 4)))
    cases = list(written(rng, profile, 20))
    with contextlib.suppress(Unsupported):
        both = replace(call, causal=True, window=(1, 2))
        cases.append((both, profile.write(both)))
    for call, words in cases:
        before = [np.array(x) for x in words.args if isinstance(x, np.ndarray)]
        returned = profile.read(profile.function(*words.args, **words.kwargs), call)
        assert returned.o.shape == (*np.shape(call.q)[:-1], np.shape(call.v)[-1])
        fits(call, profile.convention, returned.o, returned.lse)
        after = [x for x in words.args if isinstance(x, np.ndarray)]
        assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES)
def test_a_library_says_where_every_axis_was_read(profile: Profile) -> None:
    assert set(profile.sources) == set(AXES())
    files = [x for x in profile.sources.values() if x not in ("library", "has none", "not checked")]
    assert not [x for x in files if not re.fullmatch(r"[\w./-]+\.(py|h|cpp|cu|cuh)", x)]


def test_nothing_of_a_library_is_imported() -> None:
    names = "import refattn.conventions as c; [c.profile(n) for n in c.LIBRARIES]"
    script = f"import sys, numpy.random; before = set(sys.modules); {names}; print(*(set(sys.modules) - before))"
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True
    )
    tops = {name.partition(".")[0] for name in run.stdout.decode().split()}
    assert tops
    assert not tops - sys.stdlib_module_names - {"numpy", "refattn"}


def test_a_profile_by_name() -> None:
    assert like.profile("flash_attn").name == "flash_attn/fa2"
    assert like.profile("torch/flex").name == "torch/flex"
    for name in ("tor", "torch/flux"):
        with pytest.raises(ValueError, match=f"profile is '{name}'; expected one of 'to|c"):
            like.profile(name)


x = np.ones((1, 2, 3, 4))
row = np.ones((3, 2, 4))


@pytest.mark.parametrize(
    "names, ask",
    [
        ("rows is 'left'", lambda: Convention(rows="left")),  # type: ignore[arg-type]
        ("bias and slopes", lambda: Call(q=x, k=x, v=x, bias=0.0, slopes=[1.0, 1.0])),
        ("lengths and starts", lambda: Call(q=x, k=x, v=x, lengths=[1], starts=([0, 3], [0, 3]))),
        ("starts of keys", lambda: Call(q=x[0], k=x[0], v=x[0], starts=([0, 3], [0, 2]))),
        ("profile is", lambda: like.profile("nothing")),
        ("dropout_p is 0.5", lambda: like.torch.scaled_dot_product_attention(x, x, x, dropout_p=0.5)),
        ("attn_mask is given", lambda: like.torch.scaled_dot_product_attention(x, x, x, x, is_causal=True)),
        ("key has 1", lambda: like.torch.flex_attention(x, x[:, :1], x[:, :1])),
        ("query has 3 axes", lambda: like.torch.flex_attention(row, x, x)),
        ("rotary_cos", lambda: like.flash_attn.flash_attn_with_kvcache(x, x, x, rotary_cos=x)),
        ("k or v is given alone", lambda: like.flash_attn.flash_attn_with_kvcache(x, x, x, k=x)),
        ("cache_seqlens is 2", lambda: like.flash_attn.flash_attn_with_kvcache(x, x, x, k=x, v=x, cache_seqlens=2)),
        ("qv is", lambda: like.flash_attn.fa3.flash_attn_func(x, x, x, qv=x)),
        ("score_mod is", lambda: like.flash_attn.fa4.flash_attn_func(x, x, x, score_mod=max)),
        ("implementation is 'cudnn'", lambda: like.jax.dot_product_attention(x, x, x, implementation="cudnn")),
        ("scale is -1", lambda: like.onnx.Attention(x, x, x, scale=-1.0)),
        ("q_num_heads", lambda: like.onnx.Attention(row, row, row)),
        ("past_key or past_value", lambda: like.onnx.Attention(x, x, x, past_key=x)),
        ("mask is 'full'", lambda: like.mlx.scaled_dot_product_attention(x, x, x, scale=1.0, mask="full")),
        ("flash is True", lambda: like.x_transformers.Attend(flash=True)),
        ("kv_layout is 'X'", lambda: like.flashinfer.single_prefill_with_kv_cache(row, row, row, kv_layout="X")),
        ("seq_len_kv is None", lambda: like.cudnn.sdpa(x, x, x, use_padding_mask=True)),
        ("diagonal_alignment is", lambda: like.cudnn.sdpa(x, x, x, diagonal_alignment="LEFT")),
        ("attn_mask_type is", lambda: like.transformer_engine.dot_product_attention(x, x, x, attn_mask_type="none")),
        ("num_key_value_groups is 2", lambda: like.transformers.sdpa_attention_forward(Two(), x, x, x, None)),
        (
            "query has 2 sequences",
            lambda: like.xformers.memory_efficient_attention(*[np.ones((2, 3, 1, 1))] * 3, PACKED),
        ),
    ],
)
def test_bad_input_names_its_argument(names: str, ask: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(names)):
        ask()


class Two:
    num_key_value_groups = 2


PACKED = like.xformers.BlockDiagonalMask.from_seqlens([3])


def test_masks_that_are_chosen_by_name_are_placed_as_named() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 3, 2, 4)), rng.standard_normal((1, 5, 2, 4))
    heads = {"q": q.swapaxes(1, 2), "k": k.swapaxes(1, 2), "v": k.swapaxes(1, 2)}
    corner = dict.fromkeys(("rows", "window_rows", "alibi_rows"), "top-left")
    te, xf = like.transformer_engine.dot_product_attention, like.xformers
    window, slopes = {"window_size": (1, 0)}, {"core_attention_bias_type": "alibi", "alibi_slopes": [0.5, 1.0]}
    local = xf.LowerTriangularFromBottomRightMask().make_local_attention(2)

    def same(o: np.ndarray, how: dict[str, str], **asked: Any) -> None:
        meaning = Call(**heads, **asked).under(Convention(**how))  # type: ignore[arg-type]
        expected, bound = meaning.answer().o.swapaxes(1, 2), meaning.allowance(allowed).o.swapaxes(1, 2)
        assert_within(o.reshape(expected.shape), expected, 2 * bound)

    for name, how in (("causal", corner), ("causal_bottom_right", {})):
        options = {"qkv_format": "bshd", "attn_mask_type": name}
        same(te(q, k, k, **options), how, causal=True)
        same(te(q, k, k, **options, **window), how, causal=True, window=(1, 0))
        absolute = {**how, "alibi": "absolute distance"}
        same(te(q, k, k, **options, **slopes), absolute, causal=True, slopes=[0.5, 1.0])
        wide = {"qkv_format": "bshd", "attn_mask_type": "no_mask", "bottom_right_diagonal": not how}
        same(te(q, k, k, **wide, **slopes), absolute, slopes=[0.5, 1.0])
        same(te(q, k, k, **wide, window_size=(1, 1)), how, window=(1, 1))
    same(te(q, k, k, softmax_type="off-by-one", qkv_format="bshd", attn_mask_type="no_mask"), {}, sink=[0.0, 0.0])
    same(xf.memory_efficient_attention(q, k, k, xf.LowerTriangularMask()), corner, causal=True)
    same(xf.memory_efficient_attention(q, k, k, local), {}, causal=True, window=(1, 0))
    same(xf.memory_efficient_attention(q, k, k, xf.LocalAttentionFromBottomRightMask(2, 1)), {}, window=(2, 1))


def test_pages_and_a_copied_cache_are_the_padded_call() -> None:
    rng = np.random.default_rng(0)
    q, cache = rng.standard_normal((2, 2, 2, 4)), rng.standard_normal((2, 6, 1, 4))
    new, lengths, fa = rng.standard_normal((2, 2, 1, 4)), np.array([1, 4]), like.flash_attn
    joined, table = cache.copy(), np.array([[3, 1, 0], [2, 4, 5]])
    for b, n in enumerate(lengths):
        joined[b, n : n + 2] = new[b]
    pages = np.full((6, 2, 1, 4), np.nan)
    pages[table.ravel()] = joined.reshape(6, 2, 1, 4)
    expected = fa.flash_attn_with_kvcache(q, joined, joined, cache_seqlens=lengths + 2, causal=True)
    appended = fa.flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=lengths, causal=True)
    paged = fa.flash_attn_with_kvcache(q, pages, pages, cache_seqlens=lengths + 2, block_table=table, causal=True)
    assert np.array_equal(appended, expected)
    assert np.array_equal(paged, expected)


def test_who_does_not_scale_unless_asked() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 2, 3, 4)), rng.standard_normal((1, 2, 5, 4))
    meaning = Call(q=q, k=k, v=k, scale=1.0).under(Convention())
    for o in (like.cudnn.sdpa(q, k, k)[0], like.jax.pallas_tpu_flash_attention(q, k, k)):
        assert_within(o, meaning.answer().o, 2 * meaning.allowance(allowed).o)


def test_packed_sequences_are_a_loop_over_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        call = drawn(rng)
        if call.starts is None:
            continue
        o = call.under(Convention()).answer().o
        bound = call.under(Convention()).allowance(allowed).o
        for t, T, s, S in zip(*(y for x in call.starts for y in (x[:-1], x[1:])), strict=True):
            cut = {"q": np.s_[..., t:T, :], "k": np.s_[..., s:S, :], "v": np.s_[..., s:S, :]}
            cut |= {"mask": np.s_[..., t:T, s:S], "bias": np.s_[..., t:T, s:S]}
            part = {name: getattr(call, name)[at] for name, at in cut.items() if getattr(call, name) is not None}
            alone = replace(call, starts=None, **part).under(Convention()).answer().o
            assert_within(o[..., t:T, :], alone, 2 * bound[..., t:T, :], empty=True)


def test_the_page_has_the_table_of_profiles() -> None:
    page = (Path(__file__).parents[1] / "docs/conventions.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in peers.markdown() if line not in page]
