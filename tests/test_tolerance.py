"""The tolerance as users meet it: formats, arithmetics, shapes, what is not seen, and what is refused."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refattn import bias, masks, softmax
from refattn.conventions import Call, Convention
from refattn.testing import (
    FORMATS,
    PRESETS,
    Arithmetic,
    Format,
    Tolerance,
    assert_within,
    emulate,
    tolerance,
    typical,
)

GRADIENTS = ("q", "k", "v", "bias", "sink")


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def parts(allowed: Tolerance) -> list[Any]:
    return [x for x in allowed if x is not None]


# --- formats ----------------------------------------------------------------------------------------------------------

OTHERS = {
    "float32": np.float32,
    "float16": np.float16,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_rounding_is_that_of_the_dtype(name: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20_000) * np.exp2(rng.integers(-30, 18, 20_000))
    x = np.concatenate([x, x.astype(np.float32), [0.0, -0.0, np.inf, -np.inf, np.nan, 448.0, 464.0, 465.0, 65520.0]])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(OTHERS[name]).astype(np.float64)
    np.testing.assert_array_equal(FORMATS[name].round(x), expected)


@pytest.mark.parametrize("name", ["bfloat16", "tf32"])
def test_rounding_is_to_the_nearest_number_with_ties_to_even(name: str) -> None:
    f = FORMATS[name]
    rng = np.random.default_rng(1)
    scale = np.exp2(rng.integers(-20, 20, 2000).astype(np.float64))
    whole = rng.integers(2 ** (f.bits - 1), 2**f.bits, 2000).astype(np.float64)
    part = rng.choice([0.0, 0.25, 0.5, 0.75], 2000)
    expected = np.where(part == 0.5, whole + whole % 2, whole + (part > 0.5))
    np.testing.assert_array_equal(f.round((whole + part) * scale), expected * scale)


def test_subnormals_are_rounded_to_their_spacing() -> None:
    f = FORMATS["bfloat16"]
    np.testing.assert_array_equal(
        f.round(2.0**-133 * np.array([0.5, 0.75, 1.5, 2.5])), 2.0**-133 * np.array([0, 1, 2, 2])
    )


@pytest.mark.parametrize("given", ["bfloat16", np.dtype(ml_dtypes.bfloat16), ml_dtypes.bfloat16, FORMATS["bfloat16"]])
def test_a_format_may_be_given_by_name_by_dtype_or_itself(given: Any) -> None:
    assert dataclasses.replace(PRESETS["fp32"], weights=given).formats.weights is FORMATS["bfloat16"]


def test_a_format_of_ones_own_is_taken() -> None:
    own = Format("fp22", 14, -139, 2.0**127)
    coarse = dataclasses.replace(PRESETS["fa2-bf16"], accumulate=own)
    q, k, v = drawn((3, 8), (20, 8), (20, 2))
    assert (tolerance(coarse, q, k, v).o > tolerance("fa2-bf16", q, k, v).o).all()


# --- what is stated ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": "float33"}, "scores is 'float33'"),
        ({"weights": 3}, "weights is 3"),
        ({"scale": "k"}, "scale is 'k'"),
        ({"exp": "fast"}, "exp is 'fast'"),
        ({"row_sum": "rounded"}, "row_sum is 'rounded'"),
        ({"normalise": "first"}, "normalise is 'first'"),
        ({"sums": "both"}, "sums is 'both'"),
        ({"delta": "do"}, "delta is 'do'"),
        ({"tile": 0}, "tile is 0"),
        ({"splits": 0}, "splits is 0"),
        ({"lazy": -1.0}, "lazy is -1.0"),
        ({"weights_scale": 0.0}, "weights_scale is 0.0"),
        ({"normalise": "before the cast", "splits": 2}, "normalise is 'before the cast'"),
        ({"descale": True}, "descale is True"),
    ],
)
def test_an_arithmetic_that_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message.replace("(", r"\(")):
        dataclasses.replace(PRESETS["fp32"], **change)


def test_an_unknown_preset_is_refused_with_those_that_exist() -> None:
    x = np.ones((1, 1))
    with pytest.raises(ValueError, match="arithmetic is 'bf17'.*'fa2-bf16'"):
        tolerance("bf17", x, x, x)
    with pytest.raises(TypeError, match="arithmetic is 3"):
        tolerance(3, x, x, x)  # type: ignore[arg-type]


def test_shapes_of_cotangents_are_checked_by_name() -> None:
    x = np.ones((2, 1))
    with pytest.raises(ValueError, match="do has shape"):
        tolerance("fp32", x, x, x, do=np.ones((3, 1)))
    with pytest.raises(ValueError, match="dlse has shape"):
        tolerance("fp32", x, x, x, dlse=np.ones(3))
    with pytest.raises(ValueError, match="rate is 2"):
        typical("fp32", x, x, x, rate=2)


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        ({"tile": None}, {"tile": 64}),
        ({"sums": "in place", "tile": 4}, {"sums": "apart", "tile": 4}),
        ({"truncates": True}, {}),
        ({"exp_ulp": 20.0}, {}),
        ({"exp": "exp2"}, {"exp": "exp"}),
        ({"lazy": 5.0}, {}),
        ({"splits": 4}, {}),
        ({"output": "float16"}, {}),
        ({"operands": "tf32"}, {}),
        ({"weights": "float16"}, {}),
        ({"stored_scores": "float16"}, {}),
        ({"scale": "q", "scaled": "float16"}, {}),
    ],
)
def test_a_statement_that_promises_more_is_allowed_less(coarse: dict[str, Any], fine: dict[str, Any]) -> None:
    q, k, v = drawn((4, 8), (40, 8), (40, 3))
    more, less = (tolerance(dataclasses.replace(PRESETS["fp32"], **change), q, k, v).o for change in (coarse, fine))
    assert (less < more).all()


def test_rounded_weights_in_the_row_sum_spare_an_offset_of_the_values() -> None:
    q, k, v = (FORMATS["bfloat16"].round(x) for x in drawn((4, 8), (40, 8), (40, 3)))
    v = 8 * np.sign(v) + 1024  # which bfloat16 holds
    summed = dataclasses.replace(PRESETS["fa2-bf16"], row_sum="rounded weights", output="float32")
    plain = dataclasses.replace(PRESETS["fa2-bf16"], output="float32")
    assert (20 * tolerance(summed, q, k, v).o < tolerance(plain, q, k, v).o).all()


def test_an_offset_of_the_keys_spares_the_output_and_not_lse() -> None:
    # a rounded q moves all logits by its product with the offset
    q, k, v = drawn((4, 8), (40, 8), (40, 3))
    k = np.round(k)
    scaled = dataclasses.replace(PRESETS["fp32"], scale="q", scaled="bfloat16")
    near, far = (tolerance(scaled, q, k + offset, v) for offset in (0, 1024))
    assert (far.o < 2 * near.o).all()
    assert (far.lse > 100 * near.lse).all()


def test_numbers_that_the_inputs_do_not_hold_are_charged_their_cast() -> None:
    q, k, v = drawn((4, 8), (40, 8), (40, 3))
    held = [FORMATS["bfloat16"].round(x) for x in (q, k, v)]
    assert (tolerance("fa2-bf16", q, k, v).lse > 10 * tolerance("fa2-bf16", *held).lse).all()


# --- shapes and what is not seen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_grouped_heads_and_leading_axes_are_those_of_attend(preset: str) -> None:
    q, k, v, do = drawn((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 3), (2, 4, 5, 3))
    table, sink = drawn((4, 5, 9), (4,))
    named: dict[str, Any] = {"bias": table, "sink": sink, "mask": masks.causal()}
    allowed = tolerance(preset, q, k, v, do=do, **named)
    assert allowed.o.shape == (2, 4, 5, 3)
    assert allowed.lse.shape == (2, 4, 5)
    for name, x in zip(GRADIENTS, (q, k, v, table, sink), strict=True):
        assert getattr(allowed, name).shape == x.shape
    for b, h in np.ndindex(2, 4):
        one = tolerance(
            preset, q[b, h], k[b, h // 2], v[b, h // 2], bias=table[h], sink=sink[h], mask=masks.causal(), do=do[b, h]
        )
        np.testing.assert_array_equal(one.o, allowed.o[b, h])
        np.testing.assert_array_equal(one.lse, allowed.lse[b, h])
        np.testing.assert_array_equal(one.q, allowed.q[b, h])
        assert (one.k <= allowed.k[b, h // 2]).all()
        assert (one.v <= allowed.v[b, h // 2]).all()
    got = emulate.vjp(preset, do, q, k, v, **named)
    truth = softmax.vjp(do, q, k, v, **named)
    for name in GRADIENTS:
        assert (np.abs(getattr(got, name) - getattr(truth, name)) <= getattr(allowed, name)).all()


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"fp8-e4m3"}))  # whose descaling factors are of all numbers
def test_what_is_not_seen_never_matters(preset: str) -> None:
    q, k, v, do = drawn((4, 8), (6, 8), (6, 3), (4, 3))
    named: dict[str, Any] = {"mask": masks.lengths(4), "do": do}
    clean = tolerance(preset, q, k, v, **named)
    k[4:], v[5:] = np.nan, np.inf
    v[4] = np.nan
    for a, b in zip(parts(clean), parts(tolerance(preset, q, k, v, **named)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_row_that_sees_nothing_is_allowed_nothing(preset: str) -> None:
    q, k, v, do = drawn((3, 8), (6, 8), (6, 3), (3, 3))
    q[1], do[1] = np.nan, np.nan
    seen = np.ones((3, 6), bool)
    seen[1] = False
    allowed = tolerance(preset, q, k, v, mask=seen, do=do)
    for x in (allowed.o[1], allowed.lse[1], allowed.q[1]):
        np.testing.assert_array_equal(x, np.zeros_like(x))
    assert all(np.isfinite(x).all() for x in parts(allowed))
    model = typical(preset, q, k, v, mask=seen)
    np.testing.assert_array_equal(model.o[1], np.zeros(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("where", range(3))
def test_nothing_is_promised_where_a_number_may_not_be_finite(value: float, where: int) -> None:
    arrays = drawn((3, 8), (6, 8), (6, 3))
    arrays[where][0, 0] = value
    allowed = tolerance("fp16", *arrays, do=np.ones((3, 3)))
    assert not any(np.isnan(x).any() for x in parts(allowed))
    assert np.isinf(allowed.o[0, 0])


def test_gradients_whose_sums_may_overflow_are_promised_nothing() -> None:
    narrow = dataclasses.replace(PRESETS["fp16"], accumulate="float16")
    q, k, v = np.full((4, 1), 64.0), np.array([[0.0], [2.0**-9]]), np.array([[0.0], [1.0]])
    near, far = (tolerance(narrow, q, k, v, do=np.full((4, 1), size)) for size in (64.0, 4096.0))
    assert np.isfinite(near.k).all()
    assert np.isinf(far.k).all()
    assert np.isfinite(far.o).all()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_sink_of_weight_zero_allows_as_much_as_none(preset: str) -> None:
    q, k, v, do = drawn((3, 8), (6, 8), (6, 3), (3, 3))
    q = FORMATS["bfloat16"].round(q)
    named: dict[str, Any] = {"do": do, "mask": masks.causal()}
    none, zero = tolerance(preset, q, k, v, **named), tolerance(preset, q, k, v, sink=-np.inf, **named)
    for name in ("o", "lse", "q", "k", "v"):
        np.testing.assert_array_equal(getattr(zero, name), getattr(none, name))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_empty_and_single_axes_have_tolerances(sizes: tuple[int, int]) -> None:
    T, S = sizes
    q, k, v = np.ones((T, 2)), np.ones((S, 2)), np.ones((S, 1))
    for preset in PRESETS:
        allowed = tolerance(preset, q, k, v, do=np.ones((T, 1)))
        assert allowed.o.shape == (T, 1)
        assert allowed.k.shape == (S, 2)
        assert emulate.attend(preset, q, k, v).o.shape == (T, 1)
        assert typical(preset, q, k, v).lse.shape == (T,)


def test_inputs_are_not_written_to() -> None:
    arrays = [*drawn((4, 8), (6, 8), (6, 3), (4, 3), (4, 6))]
    for x in arrays:
        x.flags.writeable = False
    q, k, v, do, table = arrays
    for preset in PRESETS:
        tolerance(preset, q, k, v, do=do, bias=table)
        typical(preset, q, k, v, bias=table)
        emulate.attend(preset, q, k, v, bias=table)
        emulate.vjp(preset, do, q, k, v, bias=table)


def test_a_shift_of_a_softmax_row_is_no_error_of_its_output() -> None:
    # one key: the weight is 1 whatever the logit
    q, k, v = np.full((1, 4), 50.0), np.full((1, 4), 50.0), np.array([[3.0]])
    allowed = tolerance("fp32", q, k, v)
    assert allowed.o[0, 0] < 32 * 2.0**-24
    assert allowed.lse[0] > 2.0**-24 * 5000


# --- the emulator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_emulated_numbers_are_of_the_output_format(preset: str) -> None:
    q, k, v, do = drawn((4, 8), (20, 8), (20, 3), (4, 3))
    f = PRESETS[preset].formats
    o, lse = emulate.attend(preset, q, k, v, rng=np.random.default_rng(0), summation="tree")
    np.testing.assert_array_equal(o, f.output.round(o))
    np.testing.assert_array_equal(lse, f.lse.round(lse))
    for g in emulate.vjp(preset, do, q, k, v)[:3]:
        np.testing.assert_array_equal(g, f.output.round(g))


def test_emulated_float64_is_the_definition_for_one_key() -> None:
    q, k, v = (x.astype(np.float64) for x in drawn((4, 8), (1, 8), (1, 3)))
    np.testing.assert_array_equal(emulate.attend("fp64", q, k, v).o, np.repeat(v, 4, axis=0))


def test_orders_of_summation_give_other_digits() -> None:
    q, k, v = drawn((4, 8), (60, 8), (60, 3))
    rng = np.random.default_rng(0)
    kinds = ("forward", "reversed", "pairwise", "tree")
    answers = [emulate.attend("fp32", q, k, v, summation=kind, rng=rng).o for kind in kinds]
    assert len({x.tobytes() for x in answers}) == 4
    plain = [emulate.attend("fp32", q, k, v).o for _ in range(2)]
    np.testing.assert_array_equal(*plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"summation": "backward"}, "summation is 'backward'"),
        ({"summation": "tree"}, "rng is None"),
        ({"splits": 2}, "splits is 2"),
        ({"tile": -1}, "tile is -1"),
    ],
)
def test_a_kernel_that_contradicts_its_arithmetic_is_refused(options: dict[str, Any], message: str) -> None:
    x = np.ones((2, 1))
    with pytest.raises((TypeError, ValueError), match=message):
        emulate.attend("fp32", x, x, x, **options)


def test_lazy_biases_and_tables_are_allowed_alike() -> None:
    q, k, v = drawn((4, 8), (6, 8), (6, 3))
    lazy = bias.alibi(0.5)
    table = 0.5 * (np.arange(6) - np.arange(4)[:, None] - 2)
    both = [tolerance("fa2-bf16", q, k, v, bias=b) for b in (lazy, table)]
    assert (both[0].o >= both[1].o).all()
    assert (both[0].o < 2 * both[1].o).all()
    got, truth = emulate.attend("fa2-bf16", q, k, v, bias=lazy), softmax.partial(q, k, v, bias=lazy)
    assert (np.abs(got.o - truth.o) <= both[0].o).all()


def test_every_named_field_has_a_default_but_the_formats() -> None:
    required = [f.name for f in dataclasses.fields(Arithmetic) if f.default is dataclasses.MISSING]
    assert required == ["inputs", "scores", "weights", "accumulate", "output"]


@pytest.mark.parametrize("form", ["signed distance", "absolute distance", "key position"])
def test_an_emulated_kernel_knows_where_the_rows_of_a_conventions_alibi_stand(form):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, n, 5)) for n in (4, 6, 6))
    call = Call(q=q, k=k, v=v, slopes=np.array([0.5, 0.25, 0.1]), lengths=np.array([3, 6]))
    meaning = call.under(Convention(alibi=form))
    allowed, got = (f("fp64", *meaning.arrays, **meaning.options) for f in (tolerance, emulate.attend))
    right = meaning.answer()
    assert_within(got.o, right.o, 2 * allowed.o)  # the definition is one of these kernels too
    assert_within(got.lse, right.lse, 2 * allowed.lse)
