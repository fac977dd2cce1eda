"""The compiled softmax engine against the definition, within the error of the order of operations that it declares."""

import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numba
import numpy as np
import pytest
from flint import arb
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import refattn_cpu._threads
import refattn_cpu.softmax
from refattn import bias as biases
from refattn import engines, masks, softmax
from refattn.engines import Backend, Unsupported
from refattn.rounding import EVALUATION, gamma
from refattn.testing import Ball, assert_within
from refattn.testing.ball import precision
from refattn.testing.strategies import any_masks

DTYPES = ("float32", "float64")
ROUNDING = {"float32": (2.0**-24, 2.0**-148), "float64": (2.0**-53, 2.0**-1073)}
"""Unit roundoff, and above what underflow may take."""
EXP, LOG, TANH = 4, 4, 8
"""Hypothesis, in u: the engine's exp and log are within 2 units in the last place, its tanh within 4."""
# q, k, v: alone, batched, grouped, broadcast; none at all; one query head for several of k.
LEADS = (
    ((), (), ()),
    ((2,), (2,), (2,)),
    ((4,), (2,), (2,)),
    ((4,), (1,), (4,)),
    ((2, 1, 2), (3, 2), (1,)),
    ((1,), (3,), (3,)),
    ((0, 2), (2,), (2,)),
)


def row_errors(one, u, tiny):
    """Return F1 and F2 for one problem: the errors of o and lse in the order that the engine's docstring states.

    Hypotheses: operations are rounded to u, and what underflows is off by `tiny` at most; exp, log and tanh are as
    `EXP`, `LOG` and `TANH` say. Then e bounds the logarithmic error of a weight:
    γ_D of the dot product; 3u of the scale, its cast and product; 4u + tanh's of the softcap, whose slope is at most 1;
    2u of the bias's sum, rounded twice; u of the exponent's argument; exp. A sum has n terms, with the sink, so no term
    meets more than n + 1 roundings: its product, and the sums.
    """
    call, seen = one.problem, one.seen()
    q, k, v = (np.nan_to_num(np.asarray(x, np.float64)) for x in (one.q, one.k, one.v))
    (T, D), S, sigma = q.shape, len(v), call.multiplier
    exp, log, tanh = EXP * u, LOG * u, TANH * u
    s = (q @ k.T) * sigma
    e = abs(sigma) * (gamma(D, u) * (np.abs(q) @ np.abs(k).T) + D * tiny)
    e = e + 3 * u * (1 + 3 * u) * (np.abs(s) + e) + tiny
    b = one.bias(np.arange(T), np.arange(S))
    for step in call.order.split(", "):
        if step == "softcap" and call.softcap is not None:
            c = call.softcap
            e = e + u * (np.abs(s) + e)
            s = c * np.tanh(s / c)
            e = e + (tanh + u) * (1 + u) * (np.abs(s) + e) + (c + 1) * tiny
        if step == "bias" and b is not None:
            s = s + np.where(seen, b, 0.0)
            e = e + 2 * u * (1 + u) * (np.abs(s) + e)
    sink = -np.inf if one.sink is None else float(one.sink)
    s, e = np.where(seen, s, -np.inf), np.where(seen, e, 0.0)
    s, e, n = np.c_[s, np.full(T, sink)], np.c_[e, np.zeros(T)], S + 1
    alive = seen.any(axis=1)
    m = np.where(alive, s.max(axis=1), 0.0)[:, None]
    top = e.max(axis=1, keepdims=True)
    live = np.isfinite(s)
    e = np.where(live, e + u * (np.where(live, np.abs(s - m), 0.0) + e + top) + exp * (1 + exp), 0.0)
    w = np.where(alive[:, None], np.exp(s - m), 0.0)
    z = np.where(alive, w.sum(axis=1), 1.0)[:, None]
    p = w / z
    o, G, lost = p[:, :-1] @ v, gamma(n + 1, u), n * tiny / z
    up, down = p * np.expm1(e), p * -np.expm1(-e)
    more, less = ((1 + G) * x.sum(axis=1, keepdims=True) + G + lost for x in (up, down))
    wide = EVALUATION * np.exp(4 * e.max(axis=1, keepdims=True))
    error = np.einsum("ij,ijc->ic", up[:, :-1], np.abs(v[None] - o[:, None])) + up[:, -1:] * np.abs(o)
    error = error + G * ((p + up)[:, :-1] @ np.abs(v)) + G * np.abs(o) * (p + up).sum(axis=1, keepdims=True)
    error = error + lost * (1 + np.abs(v).max(axis=0, initial=0.0) + np.abs(o))
    on_o = np.where(alive[:, None], error / (1 - less) * wide * (1 + u) + u * np.abs(o) + tiny, 0.0)
    ratio = np.maximum(np.log1p(more), -np.log1p(-less)) * wide
    size = np.abs(np.log(z)) + ratio + top
    raw = ratio + (log + u) * size + u * (np.abs(m) + top + size)
    return on_o, np.where(alive, raw[:, 0] * (1 + u) * EVALUATION, 0.0)


def allowed(call, dtype):
    """Return what the engine's o and lse may differ from NumPy's: what the one loses and what the other loses."""
    both = ROUNDING[dtype], ROUNDING["float64"]
    T, _, _, E = call.sizes
    errors = [[sum(part) for part in zip(*(row_errors(one, *t) for t in both), strict=True)] for one in call.all()]
    on_o, on_lse = zip(*errors, strict=True) if errors else ((), ())
    lead = call.leads.shape
    return np.array(on_o, np.float64).reshape(*lead, T, E), np.array(on_lse, np.float64).reshape(*lead, T)


@st.composite
def calls(draw, most=9):
    """Draw arguments that float32 holds exactly, with leading axes: q, k, v and the rest by name."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leads = draw(st.sampled_from(LEADS))
    T, S = draw(st.integers(0, most)), draw(st.integers(0, most))
    D, E = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    if draw(st.integers(0, 9)) == 0:
        T = refattn_cpu.softmax.TASK_ROWS + 3
    size = draw(st.sampled_from((2.0**-6, 1.0, 4.0, 64.0)))

    def numbers(*shape):
        x = rng.standard_normal(shape) * size
        return np.asarray(np.round(x) if size == 4.0 else x, np.float32).astype(np.float64)

    q, k, v = (numbers(*lead, *shape) for lead, shape in zip(leads, ((T, D), (S, D), (S, E)), strict=True))
    queries = leads[0]
    lead = draw(st.sampled_from(((), queries, queries[-1:])))
    mask = draw(
        st.one_of(
            any_masks({"T": T, "S": S}, rng),
            st.builds(lambda: masks.lengths(rng.integers(0, S + 1, lead))),
            st.builds(lambda: masks.dense(rng.random((*lead, T, S)) < 0.5)),
        )
    )
    kind = draw(st.sampled_from(("none", "table", "row", "column", "alibi")))
    given = None
    if kind == "alibi":
        given = biases.alibi(numbers(*lead))
    elif kind != "none":
        given = numbers(*lead, 1 if kind == "row" else T, 1 if kind == "column" else S)
        given[rng.random(given.shape) < 0.2] = -np.inf
    named = dict(
        mask=mask,
        bias=given,
        sink=draw(st.sampled_from((None, numbers(), numbers(*queries[-1:])))),
        softcap=draw(st.sampled_from((None, 0.5, 30.0))),
        order=draw(st.sampled_from(engines.ORDERS)),
        scale=draw(st.sampled_from((None, 0.1, -2.0))),
    )
    return (q, k, v), named


def checked(arrays, named):
    """Return the call as engines get it."""
    return engines.problem(*arrays, **named)


def pairs_seen(call):
    """Return which keys each row sees, with the leading axes."""
    return np.array([one.seen() for one in call.all()], bool).reshape(*call.leads.shape, *call.sizes[:2])


def same(a, b):
    """Assert that two answers have the same bits, and the same shapes and types."""
    for x, y in zip(a, b, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.tobytes() == y.tobytes()


def plain(rng, dtype="float32", T=200, S=150):
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((4, T, 6), (2, S, 6), (2, S, 5)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=calls())
@settings(max_examples=120)
def test_answers_are_the_definitions_within_the_derived_error(dtype, case):
    arrays, named = case
    call = checked(arrays, named)
    got, truth = softmax.partial(*arrays, **named, backend=Backend("cpu", dtype)), softmax.partial(*arrays, **named)
    on_o, on_lse = allowed(call, dtype)
    assert got.o.dtype == got.lse.dtype == dtype
    assert_within(got.o, truth.o, on_o, empty=True)
    assert_within(got.lse, truth.lse, on_lse, empty=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(2100, 0), masks.strided(7)])
def test_long_rows_are_within_the_derived_error_too(dtype, mask):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((70, 16), (2500, 16), (2500, 3)))
    call = checked((q, k, v), dict(mask=mask, bias=None, sink=None, softcap=None, order=engines.ORDERS[0], scale=None))
    got, truth = softmax.partial(q, k, v, mask=mask, backend=Backend("cpu", dtype)), softmax.partial(q, k, v, mask=mask)
    for actual, expected, bound in zip(got, truth, allowed(call, dtype), strict=True):
        assert_within(actual, expected, bound)


@given(case=calls(), dtype=st.sampled_from(DTYPES), data=st.data())
def test_nan_in_a_key_reaches_the_rows_that_see_it_and_no_other(case, dtype, data):
    (q, k, v), named = case
    assume(k.shape[-2] > 0)
    j = data.draw(st.integers(0, k.shape[-2] - 1))
    backend = Backend("cpu", dtype)
    before = softmax.partial(q, k, v, **named, backend=backend)
    sees = pairs_seen(checked((q, k, v), named))[..., j]
    k, v = k.copy(), v.copy()
    k[..., j, :] = v[..., j, :] = np.nan
    after = softmax.partial(q, k, v, **named, backend=backend)
    assert np.isnan(after.lse[sees]).all() and np.isnan(after.o[sees]).all()
    same((after.o[~sees], after.lse[~sees]), (before.o[~sees], before.lse[~sees]))


@given(case=calls(), dtype=st.sampled_from(DTYPES))
def test_a_row_that_sees_nothing_answers_zero_whatever_its_query(case, dtype):
    (q, k, v), named = case
    call = checked((q, k, v), named)
    o, lse = softmax.partial(np.full_like(q, np.nan), k, v, **named, backend=Backend("cpu", dtype))
    empty = ~pairs_seen(call).any(axis=-1)
    sinks = -np.inf if named["sink"] is None else np.asarray(named["sink"])[..., None]
    assert not o[empty].any()
    assert (lse[empty] == np.broadcast_to(sinks, lse.shape)[empty]).all()
    assert np.isnan(lse[~empty]).all()


@given(case=calls(), dtype=st.sampled_from(DTYPES), threads=st.integers(2, 5), data=st.data())
def test_threads_batch_and_tasks_do_not_change_a_bit(case, dtype, threads, data):
    (q, k, v), named = case
    alone = softmax.partial(q, k, v, **named, backend=Backend("cpu", dtype, threads=1))
    same(alone, softmax.partial(q, k, v, **named, backend=Backend("cpu", dtype, threads=threads)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refattn_cpu.softmax, "TASK_ROWS", data.draw(st.integers(1, 5)))
        same(alone, softmax.partial(q, k, v, **named, backend=Backend("cpu", dtype, threads=threads)))
    call = checked((q, k, v), named)
    for lead, one in zip(np.ndindex(call.leads.shape), call.all(), strict=True):
        bias = one.bias(np.arange(call.sizes[0]), np.arange(call.sizes[1]))
        rest = {**named, "mask": one.pairs, "bias": bias, "sink": one.sink}
        part = softmax.partial(one.q, one.k, one.v, **rest, backend=Backend("cpu", dtype))
        same(part, (alone.o[lead], alone.lse[lead]))


@given(case=calls(), dtype=st.sampled_from(DTYPES))
def test_how_a_mask_is_written_does_not_change_a_bit(case, dtype):
    arrays, named = case
    call = checked(arrays, named)
    assume(call.leads.shape == arrays[0].shape[:-2])  # a mask has q's leading axes
    backend, dense = Backend("cpu", dtype), {**named, "mask": pairs_seen(call)}
    same(softmax.partial(*arrays, **dense, backend=backend), softmax.partial(*arrays, **named, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_is_read_and_none_is_written_or_compiled_for(dtype):
    rng = np.random.default_rng(2)
    q, k, v = plain(rng, dtype, 20, 15)
    expected = softmax.partial(q, k, v, backend="cpu")
    for change in (
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
        lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
        lambda x: np.frombuffer(b"-" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
        lambda x: x.astype(x.dtype.newbyteorder()),
    ):
        given = [change(x) for x in (q, k, v)]
        same(softmax.partial(*given, backend="cpu"), expected)
        assert all(np.array_equal(x, y) for x, y in zip(given, (q, k, v), strict=True))
    assert len(refattn_cpu.softmax._rows.signatures) <= len(DTYPES)


def test_products_are_rounded_before_they_are_added():
    # (1 + ε)² rounds to 1 + 2ε, so this dot product is 0; an fma would leave ε².
    for dtype, e in (("float32", 2.0**-13), ("float64", 2.0**-28)):
        q, k = np.array([[-(1 + 2 * e), 1 + e]], dtype), np.array([[1, 1 + e]], dtype)
        assert softmax.partial(q, k, k, scale=1.0, backend="cpu").lse == 0


@pytest.mark.parametrize(
    ("dtypes", "asked", "answer"),
    [
        (("float32", "float32", "float32"), None, "float32"),
        (("float32", "float32", "float64"), None, "float64"),
        (("float16", "bfloat16", "int8"), None, "float32"),
        (("int64", "int64", "int64"), None, "float32"),
        (("int64", "float64", "float16"), None, "float64"),
        (("float64", "float64", "float64"), "float32", "float32"),
        (("float16", "float16", "float16"), "float64", "float64"),
    ],
)
def test_the_answer_has_the_widest_of_the_callers_dtypes_or_what_is_asked(dtypes, asked, answer):
    types = {"bfloat16": ml_dtypes.bfloat16}
    arrays = [np.arange(6).reshape(3, 2).astype(types.get(d, d)) for d in dtypes]
    wide = [x.astype(answer) for x in arrays]
    got = softmax.partial(*arrays, bias=np.zeros((3, 3)), sink=np.float64(1.0), backend=Backend("cpu", asked))
    assert got.o.dtype == got.lse.dtype == answer
    same(got, softmax.partial(*wide, bias=np.zeros((3, 3)), sink=np.float64(1.0), backend=Backend("cpu", asked)))


def test_what_no_task_writes_is_nan(monkeypatch):
    monkeypatch.setattr(refattn_cpu.softmax, "share", lambda *_: None)
    for x in softmax.partial(*plain(np.random.default_rng(3)), backend="cpu"):
        assert np.isnan(x).all()


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (dict(q=np.array([[2**24 + 1]])), "q holds integers beyond 2\\*\\*24"),
        (dict(v=np.array([[-(2**24) - 1]])), "v holds integers beyond 2\\*\\*24"),
        (dict(scale=1e-40), "scale is 1e-40"),
        (dict(scale=-1e39), "scale is -1e[+]39"),
        (dict(softcap=1e39), "softcap is 1e[+]39"),
        (dict(q=np.array([[1e39]])), "q holds finite numbers beyond float32"),
        (dict(k=np.array([[-1e39]])), "k holds finite numbers beyond float32"),
        (dict(v=np.array([[1e39]])), "v holds finite numbers beyond float32"),
        (dict(sink=[-1e39]), "sink holds finite numbers beyond float32"),
        (dict(bias=[[-1e300]]), "bias holds finite numbers beyond float32"),
        (dict(bias=biases.alibi(1e300).at(-1)), "bias holds finite numbers beyond float32"),
        (dict(q=np.array([[1e20]]), k=np.array([[-1e20]])), "logits of q, k, scale and bias may overflow float32"),
        (dict(q=np.array([[1e20]]), scale=1e19), "logits of q, k, scale and bias may overflow float32"),
        (dict(k=np.array([[3e37]]), bias=[[-3e38]]), "logits of q, k, scale and bias may overflow float32"),
        (dict(v=np.array([[2e38]])), "sums of v may overflow float32"),
    ],
)
def test_what_float32_cannot_hold_is_refused_and_float64_answers_it(given, word):
    arrays = {name: given.get(name, np.ones((1, 1), np.float32)) for name in "qkv"}
    named = {name: x for name, x in given.items() if name not in arrays}
    with pytest.raises(Unsupported, match=f"backend 'cpu': {word}.*ask for float64"):
        softmax.attend(*arrays.values(), **named, backend=Backend("cpu", "float32"))
    wide = softmax.attend(*arrays.values(), **named, backend=Backend("cpu", "float64"))
    assert wide.dtype == np.float64
    assert np.isfinite(wide).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_bias_at_the_edge_is_seen_and_minus_infinity_is_not(dtype):
    x, v = np.zeros((1, 1), dtype), np.array([[1.0], [3.0], [4.0]], dtype)
    edge = float(np.finfo(dtype).min)
    for bias, answer in (([[0.0, edge, -np.inf]], 1.0), ([[edge, edge, -np.inf]], 2.0)):
        assert softmax.attend(x, np.zeros((3, 1), dtype), v, bias=bias, backend="cpu").tolist() == [[answer]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_that_is_not_refused_overflows(dtype):
    largest, rng = float(np.finfo(dtype).max), np.random.default_rng(7)
    refused = 0
    for trial in range(300):
        sizes = (1, 1), (2, 1), (2, 1), (1, 2)
        q, k, v, bias = (rng.choice([-1.0, 1.0], size) * largest ** rng.choice([0.3, 0.5, 1.0]) for size in sizes)
        q, v, bias = (x * rng.uniform(0.1, 0.9) for x in (q, v, bias))
        named = {"scale": rng.choice([1e-3, 1.0, 10.0]), "bias": bias if trial % 2 else None}
        try:
            with np.errstate(over="ignore"):
                o, lse = softmax.partial(*(x.astype(dtype) for x in (q, k, v)), **named, backend="cpu")
        except Unsupported:
            refused += 1
            continue
        assert np.isfinite(o).all() and np.isfinite(lse).all()
    assert 50 < refused < 250


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_and_not_seen_is_not_a_reason_to_refuse(dtype):
    q, k, v = (np.ones((3, 2), dtype) for _ in range(3))
    k[2], v[2] = np.nan, -np.inf
    bias = np.array([[0.0, 0.0, np.nan]] * 3)
    o = softmax.attend(q, k, v, mask=masks.lengths(2), bias=bias, sink=-np.inf, backend=Backend("cpu", dtype))
    assert (o == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("f", "real", "units"), [(np.exp, arb.exp, EXP), (np.log, arb.log, LOG), (np.tanh, arb.tanh, TANH)]
)
def test_the_engines_elementary_functions_keep_their_hypothesis(dtype, f, real, units):
    @numba.njit(error_model="numpy")
    def each(x, out):
        for i in range(len(x)):
            out[i] = f(x[i])

    (u, tiny), rng = ROUNDING[dtype], np.random.default_rng(8)
    spread = rng.uniform(0, 1, 20_000)
    small = rng.uniform(1, 2, 4000) * 2.0 ** rng.integers(-20, 0, 4000)
    # what the engine asks for: exp of what is not positive, log of a sum that is at least 1, tanh of anything
    x = {
        np.exp: np.concatenate([spread * np.log(tiny), -small]),
        np.log: np.concatenate([2.0 ** (30 * spread), 1 + small]),
        np.tanh: np.concatenate([40 * spread - 20, small, -small]),
    }[f].astype(dtype)
    got = np.full_like(x, np.nan)
    each(x, got)
    with precision(100):
        truth = Ball(np.array([real(arb(float(a))) for a in x], object))
        # an error that is below this part of the computed number is below `units` of the real one
        assert_within(got, truth, units * u * (1 - 2 * units * u) * np.abs(got.astype(np.float64)) + tiny)


def test_errors_are_one_sentence_that_names_what_is_wrong(monkeypatch):
    x = np.ones((2, 2))
    with pytest.raises(ValueError, match="backend is 'gpu'; expected one of 'numpy', 'cpu'"):
        softmax.attend(x, x, x, backend="gpu")
    with pytest.raises(TypeError, match="backend is 3"):
        softmax.attend(x, x, x, backend=3)
    with pytest.raises(ValueError, match="dtype is 'float16'; expected one of"):
        Backend("cpu", dtype="float16")
    with pytest.raises(ValueError, match="threads is 0; expected at least 1"):
        Backend("cpu", threads=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'fast'"):
        Backend("cpu", fast=True)
    with pytest.raises(Unsupported, match="backend 'cpu' has no backward for softmax"):
        softmax.vjp(x, x, x, x, backend="cpu")
    with pytest.raises(Unsupported, match="backend 'cpu' has no engine for juggling"):
        engines.find("juggling", Backend("cpu"))
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "refattn_cpu.softmax")
    with pytest.raises(ImportError, match="backend 'cpu' needs numba.*pip install 'refattn\\[cpu\\]'"):
        softmax.attend(x, x, x, backend="cpu")


def test_callers_in_several_threads_get_the_same_bits():
    arrays = plain(np.random.default_rng(4))
    expected = softmax.partial(*arrays, mask=masks.causal(), backend="cpu")
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(softmax.partial, *arrays, mask=masks.causal(), backend=Backend("cpu", threads=2))
            for _ in range(12)
        ]
        for call in calls:
            same(call.result(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_makes_its_own_threads():
    arrays = plain(np.random.default_rng(5))
    expected = softmax.partial(*arrays, backend=Backend("cpu", threads=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads alive is what is tried here
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            same(softmax.partial(*arrays, backend=Backend("cpu", threads=2)), expected)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_ctrl_c_reaches_the_caller_and_drops_what_has_not_begun(request):
    # who is started in the background may have been told to ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    begun, release = [], threading.Event()

    def work(task):
        begun.append(task)
        release.wait(20)

    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        refattn_cpu._threads.share(work, range(100), 2)
    waited = time.monotonic() - start
    release.set()
    assert waited < 20  # it did not wait for the work
    done = []
    refattn_cpu._threads.share(done.append, range(100), 2)
    assert sorted(done) == list(range(100))
    assert len(begun) == 2


def test_an_error_in_a_task_reaches_the_caller():
    class Broken(biases.Bias):
        lead = ()

        def on(self, T, S):
            return self

        def block(self, flat, rows, keys):
            if threading.current_thread() is not threading.main_thread():
                raise ArithmeticError("no bias today")
            return np.zeros((len(rows), len(keys)))

    with pytest.raises(ArithmeticError, match="no bias today"):
        softmax.attend(*plain(np.random.default_rng(6)), bias=Broken(), backend=Backend("cpu", threads=2))


def test_a_bias_of_another_class_is_read_before_any_work():
    class Steep(biases.Bias):
        lead = ()

        def on(self, T, S):
            return self

        def block(self, flat, rows, keys):
            return np.where((rows[:, None] == 1) & (keys == 1), 1e39, 0.0)

    x = np.ones((3, 1), np.float32)
    with pytest.raises(Unsupported, match="bias holds finite numbers beyond float32"):
        softmax.attend(x, x, x, bias=Steep(), backend="cpu")
