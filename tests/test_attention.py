"""The judge of attention: innocents of every framework are acquitted, and what is wrong is said with its place."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refattn import masks, softmax
from refattn.conventions import Convention
from refattn.testing import _exact, assert_attention, judge
from refattn.testing._outside import dtype_name, framework_of, like, numpy_dtype, to_numpy, widened
from refattn.testing._verdicts import places

rng = np.random.default_rng(0)
Q, K, V = rng.standard_normal((2, 4, 70, 16)), rng.standard_normal((2, 2, 90, 16)), rng.standard_normal((2, 2, 90, 8))
RIGHT, LSE = softmax.partial(Q, K, V)
DO = rng.standard_normal(RIGHT.shape)
GRADIENTS = softmax.vjp(DO, Q, K, V)


def test_the_definition_is_right_in_float64() -> None:
    assert judge(RIGHT, Q, K, V, lse=LSE).kind == "right"
    gradients = {name: getattr(GRADIENTS, name) for name in "qkv"}
    verdict = judge(RIGHT, Q, K, V, gradients=gradients, do=DO)
    assert [part.name for part in verdict.parts] == ["o", "dq", "dk", "dv"]
    assert verdict.kind == "right" and 0 <= verdict.ratio < 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_an_answer_that_is_only_rounded_is_right_and_one_off_by_more_is_not(dtype: str) -> None:
    own = np.dtype(numpy_dtype(dtype))
    q, k, v = (x.astype(own) for x in (Q, K, V))
    o = softmax.attend(q, k, v)
    assert assert_attention(o.astype(own), q, k, v).kind == "right"
    bad = o.copy()
    bad[1, 3, 65:, 5] += 1
    verdict = judge(bad.astype(own), q, k, v, diagnose=False)
    assert verdict.kind == "wrong"
    assert "only in batch 1 of 2; only in head 3 of 4; only in rows" in str(verdict)
    assert "only in column 5 of 8" in str(verdict)


def test_the_message_has_the_worst_element_its_ratio_and_what_explains_it() -> None:
    wrong = softmax.attend(Q, K, V, mask=masks.causal().at(0)).astype(np.float32)
    with pytest.raises(AssertionError) as raised:
        assert_attention(wrong, Q, K, V, causal=True)
    said = str(raised.value)
    assert re.search(r"worst at \[\d, \d, \d+, \d\]: \S+ where \S+ is right", said)
    assert "error ÷ bound" in said and "aligns rows to the top-left" in said


def test_a_convention_is_what_the_arguments_mean() -> None:
    o = softmax.attend(Q, K, V, mask=masks.causal().at(0))
    assert judge(o, Q, K, V, causal=True, convention="torch").kind == "right"
    assert judge(o, Q, K, V, causal=True, convention=Convention(rows="top-left")).kind == "right"
    assert judge(o, Q, K, V, causal=True, diagnose=False).kind == "wrong"


def test_lse_tells_what_o_does_not() -> None:
    assert judge(RIGHT, Q, K, V, lse=LSE / np.log(2), convention=Convention(lse="bits")).kind == "right"
    verdict = judge(RIGHT.astype(np.float32), Q, K, V, lse=LSE / np.log(2), diagnose=False)
    assert [part.kind for part in verdict.parts] == ["right", "wrong"]


def test_a_wrong_gradient_is_named() -> None:
    wrong = {"q": GRADIENTS.q, "k": GRADIENTS.k * (1 + 2.0**-20)}
    verdict = judge(RIGHT, Q, K, V, gradients=wrong, do=DO)
    assert [part.kind for part in verdict.parts] == ["right", "right", "wrong"]
    assert verdict.said[0].startswith("dk: worst")


def test_within_the_proof_and_beyond_the_usual_is_suspect() -> None:
    q, k, v = (rng.standard_normal((n, 64)).astype(np.float32) for n in (2, 4096, 4096))
    o = softmax.attend(q, k, v + 4)
    drawn = [judge(o * (1 + n * 2.0**-24), q, k, v + 4, arithmetic="fp32", diagnose=False) for n in (0, 4096, 16384)]
    assert [one.kind for one in drawn] == ["right", "suspect", "wrong"]
    assert "times what is usual" in str(drawn[1]) and drawn[1].ok


def test_a_row_that_a_convention_leaves_open_is_not_judged() -> None:
    mask = np.ones((70, 90), bool)
    mask[3] = False
    o = softmax.attend(Q, K, V, mask=mask)
    o[:, :, 3] = 7.0
    assert judge(o, Q, K, V, mask=mask, convention=Convention(empty="any", empty_lse="any")).kind == "right"
    verdict = judge(o, Q, K, V, mask=mask, diagnose=False)
    assert verdict.kind == "wrong" and "only in row 3 of 70" in str(verdict)
    o[:, :, 3] = np.nan
    assert judge(o, Q, K, V, mask=mask, convention=Convention(empty="NaN")).kind == "right"
    assert judge(o, Q, K, V, mask=mask, diagnose=False).kind == "non-finite"


def test_the_first_number_that_is_not_finite_is_named() -> None:
    o = RIGHT.copy()
    o[1, 2, 40:, 3] = np.inf
    verdict = judge(o, Q, K, V, diagnose=False)
    assert verdict.kind == "non-finite" and "inf first at [1, 2, 40, 3]" in str(verdict)


def test_of_what_is_seen_and_not_finite_nothing_is_demanded() -> None:
    v = V.copy()
    v[0, 0, 5] = np.nan
    o = softmax.attend(Q, K, v)
    verdict = judge(np.where(np.isnan(o), 3.0, o), Q, K, v)
    assert verdict.kind == "right" and verdict.parts[0].unjudged == np.isnan(o).sum() > 0


def test_a_wrong_shape_and_a_wrong_dtype_are_verdicts() -> None:
    assert judge(RIGHT[..., 1:, :], Q, K, V, arithmetic="fp64").kind == "wrong shape"
    assert judge(RIGHT, Q, K, V, lse=LSE[..., None]).kind == "wrong shape"
    assert judge(np.round(RIGHT).astype(int), Q, K, V, arithmetic="fp64").kind == "wrong dtype"
    assert judge(RIGHT, Q, K, V, gradients={"q": GRADIENTS.k}, do=DO).kind == "wrong shape"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"arithmetic": "bf17"}, "arithmetic is 'bf17'"),
        ({"convention": "numpi"}, "profile is 'numpi'"),
        ({"gradients": {"q": GRADIENTS.q}}, "do is missing"),
        ({"gradients": {"sink": 0.0}, "do": DO}, "gradients has 'sink'"),
        ({"gradients": {"Q": GRADIENTS.q}, "do": DO}, "gradients has 'Q'"),
        ({"bias": np.zeros((70, 90)), "slopes": np.zeros(4)}, "bias and slopes are both given"),
        ({"mask": object()}, "mask has dtype object"),
        ({"mask": np.ones((70, 90))}, "mask"),
    ],
)
def test_a_bad_call_names_its_argument(named: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        judge(RIGHT, Q, K, V, **named)


def test_an_answer_without_a_preset_for_its_dtype_asks_for_one() -> None:
    with pytest.raises(ValueError, match="arithmetic is not given, and no preset is for int64"):
        judge(np.zeros(RIGHT.shape, int), Q, K, V)


def test_inputs_are_not_written_to() -> None:
    arrays = [x.copy() for x in (RIGHT, Q, K, V)]
    for x in arrays:
        x.flags.writeable = False
    judge(*arrays, causal=True)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, (RIGHT, Q, K, V), strict=True))


def test_what_float64_leaves_open_is_decided_in_ball_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x[0, 0, :5] for x in (Q, K, V))
    from refattn.testing import Ball, tolerance
    from refattn.testing.ball import precision

    with precision(200):
        truth = softmax.attend(*(Ball.lift(x) for x in (q, k, v))).floats()
    allowed = tolerance("fp64", q, k, v).o
    just_in, just_out = truth + 0.97 * allowed, truth + 1.03 * allowed
    assert judge(just_in, q, k, v).ratio > 0.9
    assert judge(just_in, q, k, v).kind in ("right", "suspect")
    assert judge(just_out, q, k, v, diagnose=False).kind == "wrong"
    monkeypatch.setattr(_exact.importlib.util, "find_spec", lambda _: None)
    without = judge(just_out, q, k, v, diagnose=False)
    assert without.kind != "wrong" and "float64 rounding is not small" in without.notes[0]


def test_places_say_rows_columns_tiles_and_how_many_keys() -> None:
    def said(*index: Any, shape: tuple[int, ...] = (2, 4, 150, 8), seen: Any = None) -> list[str]:
        bad = np.zeros(shape, bool)
        bad[index] = True
        return places(bad, "head row column", seen)

    assert said(...) == []
    assert said(0) == ["only in batch 0 of 2"]
    assert said(slice(None), [0, 2]) == ["only in every 2th head from 0"]
    assert said(..., slice(128, None), slice(None)) == ["only in rows from 128 on, which is the last tile of 128"]
    assert said(..., slice(64, 128), slice(None)) == ["only in rows 64 to 127, which is a tile of 64"]
    assert said(..., slice(None, 9), slice(None)) == ["only in rows up to 8"]
    assert said(..., [1, 2, 9], slice(None)) == ["only in rows 1, 2, 9 of 150"]
    assert said(..., slice(4, None)) == ["only in columns from 4 on"]
    counts = np.arange(150)[None, None]
    assert said(..., slice(101, None), slice(None), seen=counts)[-1] == (
        "in all rows that see more than 100 keys, and in no other"
    )


class Foreign:
    """An array of a framework that nobody knows, with some of the protocols."""

    def __init__(self, x: Any) -> None:
        self.x, self.shape, self.dtype = x, x.shape, x.dtype


class WithDlpack(Foreign):
    def __dlpack__(self, **named: Any) -> Any:
        return self.x.__dlpack__(**named)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


class OnADevice(WithDlpack):
    """Comes to the CPU only when it is asked to."""

    def __dlpack__(self, *, dl_device: Any = None, copy: Any = None, **named: Any) -> Any:
        if dl_device is None or copy is not True:
            raise BufferError("not on the CPU")
        return self.x.__dlpack__(**named)

    def __dlpack_device__(self) -> Any:
        return (2, 0)


class WithArray(Foreign):
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.x


class Cupy(Foreign):
    __module__ = "cupy._core"

    def get(self) -> Any:
        return self.x


class Mlx(Foreign):
    """As MLX: its bfloat16 has no buffer that NumPy could read, only its bits have."""

    __module__ = "mlx.core"

    def view(self, dtype: Any) -> Any:
        return Mlx(self.x.view(dtype))

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if self.x.dtype.name == "bfloat16":
            raise RuntimeError("Item size 2 for PEP 3118 buffer format string")
        return self.x


@pytest.mark.parametrize("kind", [WithDlpack, OnADevice, WithArray, Cupy, Mlx])
def test_arrays_of_any_framework_are_judged(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", SimpleNamespace(uint16=np.uint16))
    arrays = [kind(x) for x in (RIGHT, Q, K, V)]
    assert np.array_equal(to_numpy(arrays[0]), RIGHT)
    assert judge(*arrays).kind == "right"
    arrays[0] = kind(RIGHT + 1)
    assert judge(*arrays, diagnose=False).kind == "wrong"


def test_mlx_and_cupy_are_known_by_their_names() -> None:
    assert [framework_of(x(Q)) for x in (Cupy, Mlx, WithArray)] == ["cupy", "mlx", None]


def test_bfloat16_of_mlx_travels_as_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", SimpleNamespace(uint16=np.uint16))
    x = Q.astype(ml_dtypes.bfloat16)
    assert to_numpy(Mlx(x)).tobytes() == x.tobytes()


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_bits_are_widened_exactly_without_ml_dtypes(name: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16) if name == "bfloat16" else np.arange(2**8, dtype=np.uint8)
    truth = bits.view(getattr(ml_dtypes, name)).astype(np.float32)
    assert np.array_equal(widened(bits, name), truth, equal_nan=True)


def test_what_does_not_come_to_numpy_is_refused_by_its_name() -> None:
    class Torn(Foreign):
        __module__ = "cupy"

    with pytest.raises(TypeError, match="Torn does not come to NumPy"):
        to_numpy(Torn(Q))


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e5m2"])
def test_arrays_go_to_a_framework_and_back_with_every_bit(framework: str, name: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    x = Q[0, 0].astype(numpy_dtype(name))
    there = like(framework, x)
    assert (framework_of(there), dtype_name(there)) == (framework, name)
    assert to_numpy(there).tobytes() == x.tobytes()


def test_no_framework_is_imported_that_is_not_there_already() -> None:
    script = """if True:
        import sys, numpy as np
        from refattn.testing import check, judge
        x = np.ones((2, 3, 4))
        assert judge(x, x, x, x).kind == "right"
        print(*sorted({"torch", "jax", "cupy", "mlx", "tensorflow"} & set(sys.modules)))
    """
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("", "")
