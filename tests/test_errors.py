"""Bad input is refused in one sentence that names the argument, before any work."""

import re
import sys

import numpy as np
import pytest

from refattn import Backend, bias, dropped, engines, linear, masks, method, partial, rounding, softmax
from refattn import perturbation as pt
from refattn.blocks import Blocks
from refattn.kernel import linear_transformer
from refattn.lowrank import linformer, pooling
from refattn.memory import memformer, segments
from refattn.sparse import local_global, longformer, sparse_transformer
from refattn.testing import Ball

T, S, D, E, R = 3, 5, 2, 4, 2
SIZES = {"T": T, "S": S, "D": D, "E": E, "r": R, "n": R, "m": R}
Q, K, V, DO = np.ones((T, D)), np.ones((S, D)), np.ones((S, E)), np.ones((T, E))
P = np.ones((R, S))
MODULES = list(method.modules().values())


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Whoever starts to compute fails the test, with an error that no test expects."""

    def worked(*_):
        raise NotImplementedError("work was done before the arguments were checked")

    monkeypatch.setattr(engines.Problem, "one", worked)
    monkeypatch.setattr(linear, "rows_of", worked)


def arguments(module):
    """Every array of a method, of the declared shape."""
    return {
        name: np.ones([SIZES[axis] for axis in axes.rstrip("?").split()]) for name, axes in module.METHOD.arrays.items()
    }


def needed(module):
    """A value of every option that has no default."""
    options = module.METHOD.options.items()
    return {name: option.values(SIZES)[0] for name, option in options if option.default is method.REQUIRED}


def call(module, verb, arrays):
    """Call a verb of a method with arrays by name."""
    declared, given = module.METHOD, dict(arrays)
    if verb == "weights":
        given = {name: x for name, x in given.items() if name not in declared.linear_in}
    first = [DO] if verb == "vjp" else []
    positional = [given.pop(name) for name in declared.required if name in given]
    return getattr(module, verb)(*first, *positional, **given, **needed(module))


def refuses(error, name, work):
    """Run, expect exactly this class, and judge the sentence."""
    with pytest.raises(error) as caught:
        work()
    message = str(caught.value)
    assert caught.type is error
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message), message
    assert "\n" not in message and len(message) < 250
    assert caught.value.__cause__ is None


VERBS = [
    (module, verb, name)
    for module in MODULES
    for verb in ("attend", "partial", "weights", "vjp", "bound")
    if hasattr(module, verb)
    for name in module.METHOD.arrays
    if verb != "weights" or name not in module.METHOD.linear_in
]
VERB_IDS = [f"{module.__name__.rpartition('.')[2]}.{verb}-{name}" for module, verb, name in VERBS]
STREAM = segments.step(None, Q, Q, Q, memory=1)[1]
DTYPES = {
    "bool": lambda x: x.astype(bool),
    "complex": lambda x: x.astype(complex),
    "object": lambda x: x.astype(object),
    "string": lambda x: x.astype(str),
    "date": lambda x: np.zeros(x.shape, "datetime64[s]"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("module", "verb", "name"), VERBS, ids=VERB_IDS)
def test_arrays_that_are_not_real_numbers_are_refused(module, verb, name, dtype):
    arrays = arguments(module)
    refuses(TypeError, name, lambda: call(module, verb, {**arrays, name: DTYPES[dtype](arrays[name])}))


@pytest.mark.parametrize(("module", "verb", "name"), VERBS, ids=VERB_IDS)
def test_integers_that_float64_cannot_hold_are_refused(module, verb, name):
    arrays = arguments(module)
    for many in (np.int64(2**53 + 1), np.int64(-(2**63)), np.uint64(2**64 - 1)):
        bad = np.full(arrays[name].shape, many)
        refuses(ValueError, name, lambda bad=bad: call(module, verb, {**arrays, name: bad}))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is float64 here")
@pytest.mark.parametrize(("module", "verb", "name"), VERBS, ids=VERB_IDS)
def test_floats_wider_than_float64_are_refused(module, verb, name):
    arrays = arguments(module)
    refuses(TypeError, name, lambda: call(module, verb, {**arrays, name: arrays[name].astype(np.longdouble)}))


@pytest.mark.parametrize(("module", "verb", "name"), VERBS, ids=VERB_IDS)
def test_masks_of_masked_arrays_are_not_ignored(module, verb, name):
    arrays = arguments(module)
    for mask in (True, False):
        bad = np.ma.masked_array(arrays[name], mask)
        refuses(TypeError, name, lambda bad=bad: call(module, verb, {**arrays, name: bad}))


MATRICES = [case for case in VERBS if len(case[0].METHOD.arrays[case[2]].rstrip("?").split()) == 2]
MATRIX_IDS = [VERB_IDS[VERBS.index(case)] for case in MATRICES]


@pytest.mark.parametrize(("module", "verb", "name"), MATRICES, ids=MATRIX_IDS)
def test_axes_of_one_letter_that_differ_are_refused(module, verb, name):
    arrays = arguments(module)
    axes = module.METHOD.arrays[name].rstrip("?").split()
    for axis, letter in enumerate(axes):
        shared = [other for other, its in module.METHOD.arrays.items() if letter in its.rstrip("?").split()]
        if verb == "weights":
            shared = [other for other in shared if other not in module.METHOD.linear_in]
        if shared == [name] or letter == "T" and verb != "vjp" and "bias" not in shared:
            continue  # nothing else has this axis
        shape = list(arrays[name].shape)
        shape[axis] += 1
        with pytest.raises(ValueError, match="|".join(rf"\b{other}\b" for other in shared)) as caught:
            call(module, verb, {**arrays, name: np.ones(shape)})
        assert caught.type is ValueError


@pytest.mark.parametrize(("module", "verb", "name"), MATRICES, ids=MATRIX_IDS)
def test_one_axis_where_two_are_needed_is_refused(module, verb, name):
    arrays = arguments(module)
    if name != "bias":
        refuses(ValueError, name, lambda: call(module, verb, {**arrays, name: np.ones(3)}))
        refuses(ValueError, name, lambda: call(module, verb, {**arrays, name: [[1.0, 2.0], [3.0]]}))


@pytest.mark.parametrize(("module", "verb"), sorted({c[:2] for c in VERBS}, key=str))
def test_key_heads_that_do_not_divide_query_heads_are_refused(module, verb):
    for name in ("k", "v"):
        if verb == "weights" and name == "v":
            continue
        arrays = {s: x for s, x in arguments(module).items() if s in module.METHOD.required}
        arrays["q"] = np.ones((3, T, D))
        arrays[name] = np.ones((2, *arrays[name].shape))
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            if verb == "vjp":
                module.vjp(np.ones((3, T, E)), *arrays.values(), **needed(module))
            else:
                call(module, verb, arrays)


OPTIONS = [
    # what is bad, the class, the word that the sentence must have
    ({"k": np.ones((S, D + 1))}, ValueError, "k"),
    ({"v": np.ones((S - 1, E))}, ValueError, "v"),
    ({"q": np.ones((T, 0)), "k": np.ones((S, 0))}, ValueError, "q"),
    ({"q": np.ones((2, T, D)), "k": np.ones((3, 2, S, D)), "v": np.ones((2, 2, S, E))}, ValueError, "v"),
    ({"mask": np.ones((T, S + 1), bool)}, ValueError, "mask"),
    ({"mask": np.ones((T + 1, S), bool)}, ValueError, "mask"),
    ({"mask": np.ones((3, T, S), bool), "q": np.ones((2, T, D))}, ValueError, "mask"),
    ({"mask": np.ones(S, bool)}, ValueError, "mask"),
    ({"mask": np.zeros((T, S))}, TypeError, "mask"),
    ({"mask": np.ones((T, S), int)}, TypeError, "mask"),
    ({"mask": "causal"}, TypeError, "mask"),
    ({"mask": masks.causal().on(T, S + 1)}, ValueError, "mask"),
    ({"mask": masks.causal().on(T + 1, S)}, ValueError, "mask"),
    ({"mask": masks.segments(np.zeros(T, int), np.zeros(S + 1, int))}, ValueError, "segments"),
    ({"mask": masks.causal().at(np.zeros(T + 1, int))}, ValueError, "position"),
    ({"mask": masks.global_tokens([S])}, ValueError, "global_tokens"),
    ({"bias": np.ones((T, S + 1))}, ValueError, "bias"),
    ({"bias": np.ones((T + 1, 1))}, ValueError, "bias"),
    ({"bias": np.ones(S + 1)}, ValueError, "bias"),
    ({"bias": np.ones((3, T, S)), "q": np.ones((2, T, D))}, ValueError, "bias"),
    ({"bias": np.ones((T, S), bool)}, TypeError, "bias"),
    ({"bias": bias.alibi([0.5, 0.25]), "q": np.ones((3, T, D))}, ValueError, "bias"),
    ({"bias": bias.alibi(0.5).at(np.zeros(T + 1, int))}, ValueError, "bias"),
    ({"sink": np.zeros(3), "q": np.ones((2, T, D))}, ValueError, "sink"),
    ({"sink": True}, TypeError, "sink"),
    ({"sink": 1j}, TypeError, "sink"),
    ({"scale": np.nan}, ValueError, "scale"),
    ({"scale": np.inf}, ValueError, "scale"),
    ({"scale": 10**400}, ValueError, "scale"),
    ({"scale": "1"}, TypeError, "scale"),
    ({"scale": True}, TypeError, "scale"),
    ({"scale": 1j}, TypeError, "scale"),
    ({"scale": np.ones(2)}, TypeError, "scale"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"softcap": np.nan}, ValueError, "softcap"),
    ({"softcap": np.inf}, ValueError, "softcap"),
    ({"softcap": -(10**400)}, ValueError, "softcap"),
    ({"softcap": "30"}, TypeError, "softcap"),
    ({"softcap": True}, TypeError, "softcap"),
    ({"order": "softcap"}, ValueError, "order"),
    ({"order": None}, ValueError, "order"),
    ({"unknown": 1}, TypeError, "unknown"),
]
OPTION_IDS = [f"{'-'.join(bad)}-{n}" for n, (bad, _, _) in enumerate(OPTIONS)]


@pytest.mark.parametrize("verb", ["attend", "partial", "weights", "vjp"])
@pytest.mark.parametrize(("bad", "error", "name"), OPTIONS, ids=OPTION_IDS)
def test_arguments_of_softmax_that_do_not_fit_are_refused(verb, bad, error, name):
    given = {"q": Q, "k": K, "v": V, **bad}
    positional = [given.pop(s) for s in "qkv"]
    if verb == "weights" and "v" in bad:
        return  # weights take no v
    if verb == "weights":
        positional = positional[:2]
    if verb == "vjp":
        positional.insert(0, np.ones((*positional[0].shape[:-1], E)))
    refuses(error, name, lambda: getattr(softmax, verb)(*positional, **given))


@pytest.mark.parametrize("verb", ["attend", "partial", "vjp"])
@pytest.mark.parametrize(
    ("backend", "error", "name"),
    [
        ("fast", ValueError, "backend"),
        ("", ValueError, "backend"),
        (None, TypeError, "backend"),
        (Backend("tpu"), ValueError, "tpu"),
    ],
)
def test_unknown_backends_are_refused(verb, backend, error, name):
    arrays = [Q, K, V] if verb != "vjp" else [DO, Q, K, V]
    refuses(error, name, lambda: getattr(softmax, verb)(*arrays, backend=backend))


def test_an_unknown_backend_is_told_those_that_exist():
    with pytest.raises(ValueError, match="'numpy', 'cpu'"):
        softmax.attend(Q, K, V, backend="fast")


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"dtype": "float16"}, ValueError, "dtype"),
        ({"dtype": np.float32}, ValueError, "dtype"),
        ({"threads": 0}, ValueError, "threads"),
        ({"threads": 1.5}, TypeError, "threads"),
        ({"threads": True}, TypeError, "threads"),
        ({"warps": 4}, TypeError, "warps"),
    ],
)
def test_unknown_options_of_a_backend_are_refused(options, error, name):
    refuses(error, name, lambda: Backend("cpu", **options))


def test_a_missing_extra_is_named_with_its_pip_line(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("refattn_cpu", "numba")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r"numba.*pip install 'refattn\[cpu\]'"):
        softmax.attend(Q, K, V, backend="cpu")


def test_missing_ball_arithmetic_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "flint", None)
    with pytest.raises(ImportError, match=r"python-flint.*pip install 'refattn\[certify\]'"):
        Ball.lift(Q)


def remember(verb=memformer.attend, **changes):
    """Call a verb of Memformer, D = E, with some arguments changed."""
    square = np.eye(E)
    given = {"q": DO, "k": DO, "v": DO, "w_query": square, "w_key": square, "w_value": square, "retention": DO[:R]}
    first = [changes.pop("state")] if "state" in changes else []
    arrays = [changes.pop(name, x) for name, x in given.items()]
    return verb(*first, *arrays, **{"segment": 2, **changes})


CALLS = [
    ("do", ValueError, lambda: softmax.vjp(np.ones((T, E + 1)), Q, K, V)),
    ("do", ValueError, lambda: softmax.vjp(np.ones((T + 1, E)), Q, K, V)),
    ("do", ValueError, lambda: softmax.vjp(np.ones((1, T, E)), Q, K, V)),
    ("do", TypeError, lambda: softmax.vjp(DO > 0, Q, K, V)),
    ("dlse", ValueError, lambda: softmax.vjp(DO, Q, K, V, dlse=np.ones(T + 1))),
    ("dlse", ValueError, lambda: softmax.vjp(DO, Q, K, V, dlse=1.0)),
    ("dlse", TypeError, lambda: softmax.vjp(DO, Q, K, V, dlse=np.ones(T, complex))),
    ("parts", ValueError, lambda: partial.merge()),
    ("lse", ValueError, lambda: partial.merge(partial.Partial(DO, np.zeros(T + 1)))),
    ("slopes", ValueError, lambda: bias.alibi([np.nan])),
    ("slopes", TypeError, lambda: bias.alibi(["0.5"])),
    ("position", TypeError, lambda: bias.alibi(0.5).at(0.5)),
    ("position", TypeError, lambda: bias.alibi(0.5).at([[0]])),
    ("bias", ValueError, lambda: bias.table([1.0])),
    ("left", ValueError, lambda: masks.window(-1, 0)),
    ("right", ValueError, lambda: masks.window(0, -1)),
    ("left", TypeError, lambda: masks.window(0.5, 0)),
    ("left", ValueError, lambda: masks.dilated(-1, 0, 1)),
    ("step", ValueError, lambda: masks.dilated(1, 0, 0)),
    ("size", ValueError, lambda: masks.block_local(0)),
    ("length", ValueError, lambda: masks.strided(0)),
    ("length", ValueError, lambda: masks.prefix(-1)),
    ("keys", ValueError, lambda: masks.lengths(-1)),
    ("keys", TypeError, lambda: masks.lengths(1.5)),
    ("columns", ValueError, lambda: masks.fixed(2, 3)),
    ("tokens", ValueError, lambda: masks.global_tokens([-1])),
    ("position", TypeError, lambda: masks.causal().at(0.5)),
    ("mask", TypeError, lambda: masks.dense(np.zeros((T, S)))),
    ("T", ValueError, lambda: masks.causal().on(-1, S)),
    ("window", ValueError, lambda: longformer.attend(Q, K, V, window=-1)),
    ("window", TypeError, lambda: longformer.attend(Q, K, V, window=1.5)),
    ("dilation", ValueError, lambda: longformer.attend(Q, K, V, window=1, dilation=0)),
    ("tokens", ValueError, lambda: longformer.attend(Q, K, V, window=1, tokens=(S,))),
    ("tokens", ValueError, lambda: longformer.attend(Q, K, V, window=1, tokens=(-1,))),
    ("tokens", TypeError, lambda: longformer.attend(Q, K, V, window=1, tokens=(0.5,))),
    ("tokens", TypeError, lambda: longformer.attend(Q, K, V, window=1, tokens=5)),
    ("length", ValueError, lambda: sparse_transformer.attend(Q, K, V, length=0)),
    ("columns", ValueError, lambda: sparse_transformer.attend(Q, K, V, pattern="fixed", length=2, columns=3)),
    ("part", ValueError, lambda: sparse_transformer.attend(Q, K, V, length=2, part="alternate")),
    ("part", ValueError, lambda: sparse_transformer.bound(Q, K, V, length=2, part="alternate")),
    ("pattern", ValueError, lambda: sparse_transformer.cost(T, S, D, E, length=2, pattern="sliding")),
    ("mask", ValueError, lambda: sparse_transformer.exact(Q, K, V, mask=masks.causal().on(T, S + 1))),
    ("positions", ValueError, lambda: local_global.attend(Q, K, V, positions=(S,))),
    ("positions", ValueError, lambda: local_global.bound(Q, K, V, positions=(-1,))),
    ("positions", TypeError, lambda: local_global.attend(Q, K, V, positions=3)),
    ("block", ValueError, lambda: local_global.attend(Q, K, V, positions=(), block=0)),
    ("block", ValueError, lambda: local_global.attend(Q, K, V, positions=(), block=2**61)),
    ("form", ValueError, lambda: local_global.attend(Q, K, V, positions=(), form="average")),
    ("sampled", ValueError, lambda: local_global.draw(np.random.default_rng(0), Q, K, V, sampled=-1)),
    ("rng", TypeError, lambda: local_global.draw(0, Q, K, V, sampled=1)),
    ("mask", ValueError, lambda: local_global.attend(Q, K, V, positions=(), mask=masks.causal().on(T, S + 1))),
    ("v", TypeError, lambda: softmax.attend(Q, K, None)),
    ("v", TypeError, lambda: linear_transformer.attend(Q, K, None)),
    ("dtype", ValueError, lambda: softmax.attend(Q, K, V, backend=Backend("numpy", dtype="float32"))),
    ("mask", ValueError, lambda: rounding.allowance(softmax.attend, Q, K, V, mask=masks.lengths([1, 2]))),
    ("mask", ValueError, lambda: rounding.allowance(linear_transformer.attend, Q, K, V, mask=masks.lengths([1, 2]))),
    ("T", ValueError, lambda: softmax.cost(-1, S, D, E)),
    ("S", TypeError, lambda: linear_transformer.cost(T, "a", D, E)),
    ("rank", ValueError, lambda: linformer.cost(T, S, D, E, rank=-3)),
    ("E", ValueError, lambda: linformer.attend(Q, np.ones((2, S, D)), np.ones((2, S, E)), np.ones((3, 1, S)), P)),
    ("length", ValueError, lambda: masks.segmented(0, 1)),
    ("length", ValueError, lambda: segments.attend(Q, K, V, length=0, memory=1)),
    ("memory", ValueError, lambda: segments.attend(Q, K, V, memory=-1)),
    ("memory", TypeError, lambda: segments.step(None, Q, Q, Q, memory=0.5)),
    ("sinks", ValueError, lambda: segments.bound(Q, K, V, memory=1, sinks=-1)),
    ("sinks", ValueError, lambda: segments.bound(Q, K, V, memory=1, sinks=2**64)),
    ("sinks", TypeError, lambda: segments.certify(None, Q, Q, Q, memory=1, sinks="2")),
    ("k", ValueError, lambda: segments.step(None, Q, K, V, memory=1)),
    ("v", TypeError, lambda: segments.certify(None, Q, Q, Ball.lift(Q), memory=1)),
    ("scale", ValueError, lambda: segments.certify(None, Q, Q, Q, memory=1, scale=np.nan)),
    ("state", TypeError, lambda: segments.step(3, Q, Q, Q, memory=1)),
    ("state.k", ValueError, lambda: segments.step(STREAM, Q, Q, Q, memory=2)),
    ("state.k", ValueError, lambda: segments.step(STREAM, DO, DO, Q, memory=1)),
    ("state.k", ValueError, lambda: segments.step(STREAM, Q, np.ones((2, T, D)), Q, memory=1)),
    ("state.v", ValueError, lambda: segments.certify(STREAM, Q, Q, DO, memory=1)),
    ("limit", ValueError, lambda: Blocks.of(K, 2).absorb(K, 0)),
    ("k", ValueError, lambda: Blocks.of(K, 2).absorb(DO, 1)),
    ("k", ValueError, lambda: Blocks.of(K, 2).absorb(np.ones((2, S, D)), 1)),
    ("size", ValueError, lambda: pooling.attend(Q, K, V, size=0)),
    ("size", ValueError, lambda: pooling.attend(Q, K, V, size=[S - 1])),
    ("size", ValueError, lambda: pooling.bound(Q, K, V, size=[S, 0])),
    ("size", TypeError, lambda: pooling.cost(T, S, D, E, size=2.0)),
    ("size", TypeError, lambda: pooling.vjp(DO, Q, K, V, size="2")),
    ("size", ValueError, lambda: Blocks.of(K, [1, S])),
    ("counts", ValueError, lambda: pooling.weights(Q, K, size=2, counts="logs")),
    ("radius", ValueError, lambda: pooling.bound_from_radius(-1.0, 1.0, 1.0)),
    ("across", TypeError, lambda: pooling.bound_from_radius(1.0, 1.0, "1")),
    ("ratio", ValueError, lambda: pooling.bound_from_radius(1.0, 1.0, 1.0, ratio=0.5)),
    ("state", TypeError, lambda: linear_transformer.step(3, DO, DO, DO)),
    ("state.s", ValueError, lambda: linear_transformer.step(linear.State(P, P), DO, DO, DO)),
    ("state.s", TypeError, lambda: linear_transformer.step(linear.State(P * 1j, P), DO, DO, DO)),
    ("k_global", ValueError, lambda: longformer.attend(Q, K, V, window=1, tokens=(0,), k_global=np.ones((S, D + 1)))),
    ("mask", ValueError, lambda: longformer.attend(Q, K, V, window=1, mask=masks.causal().on(T, S + 1))),
    ("scale", ValueError, lambda: longformer.attend(Q, K, V, window=1, scale=np.nan)),
    ("backend", ValueError, lambda: longformer.attend(Q, K, V, window=1, backend="fast")),
    ("E", ValueError, lambda: linformer.attend(Q, K, V, np.ones((R, S + 1)), P)),
    ("F", ValueError, lambda: linformer.attend(Q, K, V, P, np.ones((R, S - 1)))),
    ("F", ValueError, lambda: linformer.attend(Q, K, V, P, np.ones((R + 1, S)))),
    ("E", ValueError, lambda: linformer.attend(Q, K, V, np.ones((0, S)), np.ones((0, S)))),
    ("E", ValueError, lambda: linformer.weights(Q, K, np.ones((R, S + 1)), P)),
    ("F", ValueError, lambda: linformer.vjp(DO, Q, K, V, P, np.ones((R, S - 1)))),
    ("E", ValueError, lambda: linformer.bound(Q, K, V, np.ones((R, S + 1)), P)),
    ("scale", ValueError, lambda: linformer.attend(Q, K, V, P, P, scale=np.inf)),
    ("backend", ValueError, lambda: linformer.attend(Q, K, V, P, P, backend="fast")),
    ("rank", ValueError, lambda: linformer.draw(np.random.default_rng(0), Q, K, V, rank=0)),
    ("rank", TypeError, lambda: linformer.draw(np.random.default_rng(0), Q, K, V, rank=2.0)),
    ("rng", TypeError, lambda: linformer.draw(0, Q, K, V, rank=1)),
    ("projections", ValueError, lambda: linformer.draw(np.random.default_rng(0), Q, K, V, rank=1, projections="one")),
    ("rank", ValueError, lambda: linformer.fit(Q, K, V, rank=0)),
    ("feature_map", TypeError, lambda: linear_transformer.attend(Q, K, V, feature_map=np.exp)),
    ("eps", ValueError, lambda: linear_transformer.attend(Q, K, V, eps=-1.0)),
    ("eps", ValueError, lambda: linear_transformer.attend(Q, K, V, eps=np.nan)),
    ("mask", ValueError, lambda: linear_transformer.attend(Q, K, V, mask=masks.window(1, 0))),
    ("mask", ValueError, lambda: linear_transformer.attend(Q, K, V, mask=masks.causal().on(T, S + 1))),
    ("backend", ValueError, lambda: linear_transformer.attend(Q, K, V, backend="fast")),
    ("segment", ValueError, lambda: remember(segment=0)),
    ("segment", TypeError, lambda: remember(segment=1.5)),
    ("temperature", ValueError, lambda: remember(temperature=0.0)),
    ("scale", ValueError, lambda: remember(scale=np.nan)),
    ("backend", ValueError, lambda: remember(backend="fast")),
    ("retention", ValueError, lambda: remember(retention=np.zeros((R, E)))),
    ("retention", ValueError, lambda: remember(retention=np.ones((0, E)))),
    ("w_key", ValueError, lambda: remember(w_query=np.ones((3, E, E)), w_key=np.ones((2, E, E)))),
    ("state", TypeError, lambda: remember(memformer.step, state=3)),
    ("state.memory", ValueError, lambda: remember(memformer.step, state=memformer.State(DO, DO[:1], DO[:1]))),
    ("state.k", ValueError, lambda: remember(memformer.step, state=memformer.State(DO[:R], DO[:2], DO[:2]))),
    ("state.v", ValueError, lambda: remember(memformer.step, state=memformer.State(DO[:R], DO[:1], DO[:0]))),
    ("S", ValueError, lambda: remember(memformer.step, state=None, k=V, v=V)),
    ("retention", ValueError, lambda: memformer.forget(DO, -DO)),
    ("memory", ValueError, lambda: memformer.read(DO, DO[:, :2], DO[:2], DO)),
    ("v", ValueError, lambda: memformer.draw(np.random.default_rng(0), Q, K, V * np.nan, slots=1)),
    ("slots", ValueError, lambda: memformer.draw(np.random.default_rng(0), Q, K, V, slots=0)),
    ("box", ValueError, lambda: linear_transformer.bound_from_box(-1.0, 2)),
    ("depth", ValueError, lambda: linear_transformer.bound_from_box(1.0, 0)),
    ("delta", ValueError, lambda: pt.chebyshev_radius(1.0, 0.0)),
    ("delta", ValueError, lambda: pt.chebyshev_radius(1.0, 1.5)),
    ("delta", ValueError, lambda: pt.chebyshev_radius(1.0, -0.5)),
    ("keys", ValueError, lambda: dropped.mass_from_topk(np.zeros(2), np.inf)),
    ("kept", TypeError, lambda: dropped.bound(Q, K, V, kept=None)),
    ("mask", TypeError, lambda: dropped.bound(Q, K, V, kept=np.ones((T, S)))),
    ("scale", ValueError, lambda: dropped.bound(Q, K, V, kept=masks.causal(), scale=np.nan)),
]


@pytest.mark.parametrize(("name", "error", "work"), CALLS, ids=[f"{c[0]}-{n}" for n, c in enumerate(CALLS)])
def test_other_arguments_that_do_not_fit_are_refused(name, error, work):
    refuses(error, name, work)
