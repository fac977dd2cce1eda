"""The zoo's kernel is right, and its mutants are not."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from refattn.conventions import Call, Convention
from refattn.testing import FORMATS, assert_within, tolerance
from refattn.testing.zoo import MUTANTS, Kernel

HOW = Convention()


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def call(T=37, S=70, heads=2, few=2, D=8, E=8, B=2, **options):
    return Call(q=numbers(B, heads, T, D), k=numbers(B, few, S, D, seed=1), v=numbers(B, few, S, E, seed=2), **options)


def masked(**options):
    return call(mask=np.random.default_rng(3).random((37, 70)) < 0.5, **options)


def beyond(value=np.nan):
    made = call(T=5, lengths=np.array([33, 70]))
    made.k[0, :, 33:], made.v[0, :, 33:] = value, value
    return made


CALLS = {
    "plain": call(),
    "other widths": call(D=12, E=20),
    "more rows than keys": call(T=70, S=37, causal=True),
    "grouped, window, sink": call(heads=4, causal=True, window=(5, 0), sink=numbers(4)),
    "two-sided window": call(window=(4, 3)),
    "mask, softcap, bias": masked(softcap=1.5, bias=numbers(2, 37, 70)),
    "ALiBi": call(heads=4, slopes=np.abs(numbers(4)), causal=True),
    "lengths": beyond(),
    "packed": call(B=1, T=38, S=70, causal=True, starts=([0, 3, 3, 38], [0, 20, 25, 70])),
    "far below": Call(q=numbers(1, 4, 2) * 0 + 300, k=numbers(1, 50, 2) * 0 - 300, v=numbers(1, 50, 2), scale=1.0),
    "one head, without leading axes": Call(q=numbers(5, 4), k=numbers(9, 4), v=numbers(9, 3)),
}


def error(kernel, call, arithmetic="fp32"):
    """Return the largest error ÷ bound of o and lse."""
    meaning = call.under(HOW)
    right, allowed = meaning.answer(), meaning.allowance(partial(tolerance, arithmetic))
    own = meaning.allowance(partial(tolerance, "fp64"))
    found = kernel.forward(call)
    return max(assert_within(x, y, a + b) for x, y, a, b in zip(found, right, allowed, own, strict=True))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_is_within_the_proved_bound(name, splits):
    kernel = Kernel()
    kernel.splits = splits
    error(kernel, CALLS[name])


def test_the_kernel_is_within_the_bound_of_the_formats_that_it_is_given():
    made = call()
    rounded = {s: FORMATS["bfloat16"].round(getattr(made, s)).astype(np.float32) for s in "qkv"}
    assert error(Kernel(FORMATS["bfloat16"], FORMATS["bfloat16"]), Call(**rounded), "fa2-bf16") > 0


@pytest.mark.parametrize("name", ["plain", "grouped, window, sink", "mask, softcap, bias", "packed"])
def test_the_gradients_are_within_the_proved_bound(name):
    made = CALLS[name]
    meaning = made.under(HOW)
    do, dlse = numbers(*meaning.answer().o.shape), numbers(*meaning.answer().lse.shape)

    def verb(do, q, k, v, **options):
        return tolerance("fp32", q, k, v, do=do, **options)

    right, allowed = meaning.vjp(do, dlse), meaning.gradient_allowance(verb, do, dlse)
    found = Kernel().backward(made, do, dlse)
    for x, y, bound in zip(found, right, (getattr(allowed, s) for s in right._fields), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert_within(x, y, bound)


GUILTY = {
    "causal from top left": call(causal=True),
    "one key ahead": call(causal=True),
    "window one more": call(causal=True, window=(5, 0)),
    "no limit is minus one": call(window=(5, None)),
    "mask inverted": masked(),
    "tail not masked": CALLS["plain"],
    "zero times nan": CALLS["lengths"],
    "next sequence seen": replace(CALLS["packed"], causal=False),
    "heads tiled": call(heads=4),
    "keys as values": CALLS["plain"],
    "scale twice": CALLS["plain"],
    "softcap after bias": CALLS["mask, softcap, bias"],
    "sink scaled": CALLS["grouped, window, sink"],
    "maximum starts finite": CALLS["far below"],
    "output not rescaled": CALLS["plain"],
    "splits averaged": CALLS["plain"],
    "lse in bits": CALLS["plain"],
    "lse of empty positive": CALLS["more rows than keys"],
}


@pytest.mark.parametrize("name", GUILTY)
def test_a_mutant_is_outside_the_proved_bound(name):
    with pytest.raises(AssertionError):
        error(MUTANTS[name].kernel(), GUILTY[name])


def test_a_mutant_changes_few_steps_of_the_kernel_and_says_what_is_wrong():
    assert len(MUTANTS) >= 40
    assert sum(one.held_out for one in MUTANTS.values()) >= 10
    for name, one in MUTANTS.items():
        changed = [x for x in vars(one.kernel) if not x.startswith("__")]
        assert 1 <= len(changed) <= 4, name
        assert all(hasattr(Kernel, x) for x in changed), name
        assert one.doc.endswith(".") and "\n" not in one.doc, name


def test_inputs_are_not_written_to():
    made = CALLS["mask, softcap, bias"]
    before = [np.array(x) for x in (made.q, made.k, made.v, made.mask, made.bias)]
    Kernel().forward(made)
    after = (made.q, made.k, made.v, made.mask, made.bias)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
