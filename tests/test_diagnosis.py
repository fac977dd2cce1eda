"""The diagnosis names what is wrong, says what the problem does not show, and does not explain what it cannot."""

from dataclasses import replace

import numpy as np
import pytest

from refattn import rounding, softmax
from refattn.conventions import Call, Convention, neighbours
from refattn.testing import FORMATS, assert_within
from refattn.testing._diagnosis import Diagnosis, diagnose, shared
from refattn.testing._gradient_changes import backward
from refattn.testing._isolation import isolated
from refattn.testing._written import write
from refattn.testing.zoo import MUTANTS, Kernel

HOW = Convention()


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def call(B=None, T=9, S=40, heads=2, few=2, D=8, E=6, **options):
    lead = () if B is None else (B,)
    shapes = (*lead, heads, T, D), (*lead, few, S, D), (*lead, few, S, E)
    q, k, v = (numbers(*shape, seed=n) for n, shape in enumerate(shapes))
    return Call(q=q, k=k, v=v, **options)


def of_mutant(name, call, arithmetic="fp32"):
    mutant = MUTANTS[name]
    kernel = mutant.kernel() if mutant.where != "precision" else mutant.kernel(*[FORMATS["bfloat16"]] * 2)
    return diagnose(call, HOW, *kernel.forward(call), arithmetic)


def rounded(call):
    arrays = {s: FORMATS["bfloat16"].round(getattr(call, s)).astype(np.float32) for s in "qkv"}
    return replace(call, **arrays)


SAID = {
    "causal from top left": (call(causal=True), "aligns rows to the top-left"),
    "diagonal hidden": (call(causal=True), "does not let a row see its own key"),
    "window one more": (call(window=(3, 2)), "keeps one key too many on the window's left"),
    "no limit is minus one": (call(window=(3, None)), "takes no limit of the window for the number -1"),
    "mask inverted": (call(mask=numbers(9, 40) > 0), "sees where the mask is False"),
    "tail not masked": (call(), "sees 24 keys of zeros that pad the last tile of 32"),
    "heads tiled": (call(heads=4), "lets query head h read key head h mod Hk"),
    "keys as values": (call(), "returns K for V"),
    "scale missing": (call(), "does not scale logits"),
    "softcap ignored": (call(softcap=0.5), "ignores the softcap"),
    "bias not in bits": (call(bias=numbers(9, 40)), "does not turn the bias into bits"),
    "alibi inverted": (call(slopes=np.array([0.5, 0.25])), "favours distant keys"),
    "sink in every split": (call(sink=numbers(2)), "counts the sink 2 times"),
    "output not rescaled": (call(), "merges keys in tiles of 32 without rescaling the output"),
    "splits merged in bits": (call(), "with lse in bits as if in nats"),
    "lse in bits": (call(), "gives lse in log2"),
    "lse of empty positive": (call(T=40, S=9, causal=True), "gives a row that sees nothing the lse +∞"),
    "divisor has an epsilon": (call(), "divides by the row sum and 0.001"),
    "window twice": (call(T=30, window=(3, 2)), "has 6 for the window's left number"),
    "lengths of the other batch": (call(B=2, lengths=np.array([33, 20])), "has the lengths [20, 33]"),
    "key heads reversed": (call(heads=6, few=3), "read the keys and values of the heads [2, 2, 1, 1, 0, 0]"),
    "rescaled twice": (call(), "merges keys in tiles of 32 and rescales twice the output"),
    "lse has the scale again": (call(), "gives lse as 0.35355 times the maximum, 1 times the logarithm"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_mutant_is_named(name):
    made, words = SAID[name]
    found = of_mutant(name, made)
    assert any(words in one.said for one in found.explanations), str(found)
    assert all(one.ratio <= 1 < one.confidence for one in found.explanations)
    assert str(found).startswith("your kernel ")


def test_weights_that_are_rounded_before_the_row_sum_are_named():
    found = of_mutant("weights rounded before row sum", rounded(call(S=90)), "fa2-bf16")
    assert "rounds P to bfloat16 before the row sum" in str(found)


def test_a_coarser_arithmetic_is_named_where_nothing_else_fits():
    found = of_mutant("scores in bfloat16", rounded(call(S=90)), "fa2-bf16")
    assert {kind for one in found.explanations for kind in one.kinds} == {"precision"}, str(found)


def test_a_factor_is_fitted():
    made = call()
    wrong = replace(made, scale=0.9 * 8**-0.5).under(HOW).answer()
    assert "scales logits by 0.9 times what is right" in str(diagnose(made, HOW, *wrong))


def test_the_output_alone_is_enough_where_it_shows():
    made = call(causal=True)
    found = diagnose(made, HOW, made.under(Convention(rows="top-left")).answer().o)
    assert "top-left" in found.explanations[0].said


def test_two_changes_are_found_together():
    made = call(causal=True)
    wrong = replace(made, scale=1.0).under(Convention(rows="top-left")).answer()
    best = diagnose(made, HOW, *wrong).explanations[0]
    assert ", and " in best.said
    assert {"causal alignment", "scale"} <= set(best.kinds)


def test_what_a_problem_does_not_show_is_said():
    plain, full = call(), call(causal=True, window=(3, 0), mask=numbers(9, 40) > -1)
    lost = of_mutant("lse in bits", plain).unexercised
    assert {"axis rows", "axis window", "axis mask", "axis sink", "axis alibi"} <= set(lost)
    assert "axis lse" not in lost
    kept = of_mutant("lse in bits", full).unexercised
    assert not {"axis rows", "axis window", "axis mask"} & set(kept)


def test_what_cannot_be_told_apart_is_listed_together():
    made = call(T=1, S=2)
    found = diagnose(made, HOW, made.v[:, :1])  # as if the last key were dropped, or causal from the top-left
    assert len(found.explanations) > 1
    assert "cannot tell it from" in str(found)


def test_noise_is_not_explained():
    found = diagnose(call(), HOW, 1 + numbers(2, 9, 6, seed=5), numbers(2, 9))
    assert found.explanations == ()
    assert str(found).startswith("not explained by anything known")


def test_a_right_answer_needs_no_explanation():
    made = call()
    found = diagnose(made, HOW, *Kernel().forward(made))
    assert found.ratio <= 1 and found.explanations == ()
    assert "nothing is to be explained" in str(found)


def test_numbers_that_are_not_finite_are_told():
    made = call(B=1, lengths=np.array([33]))
    made.v[..., 33:, :] = np.nan
    found = of_mutant("zero times nan", made)
    assert np.isinf(found.ratio)
    assert any("that nobody sees" in one.said for one in found.explanations)


@pytest.mark.parametrize(
    ("name", "made", "words"),
    [
        ("gradients not scaled", call(), "does not scale the gradients of q and k"),
        ("lse gradient ignored", call(), "ignores the gradient that comes in through lse"),
        ("backward causal ignored", call(causal=True), "it ignores causal"),
        ("group not summed", call(heads=4), "keeps the last query head's share"),
        ("group averaged", call(heads=4), "multiplies gradients: q's by 1, k's by 0.5, v's by 0.5"),
        ("delta of the first columns", call(E=12), "has another number than do·o in each row"),
    ],
)
def test_a_wrong_gradient_is_named(name, made, words):
    right = made.under(HOW).answer()
    do, dlse = numbers(*right.o.shape, seed=7), numbers(*right.lse.shape, seed=8)
    wrong = MUTANTS[name].kernel().backward(made, do, dlse)
    given = {s: x for s, x in wrong._asdict().items() if x is not None}
    found = diagnose(made, HOW, *Kernel().forward(made), gradients=given, do=do, dlse=dlse)
    assert any(words in one.said for one in found.explanations), str(found)
    own = {s: x for s, x in Kernel().backward(made, do, dlse)._asdict().items() if x is not None}
    assert diagnose(made, HOW, *Kernel().forward(made), gradients=own, do=do, dlse=dlse).ratio <= 1


FULL = {
    "causal": call(T=12, S=9, causal=True, window=(2, 1)),
    "bias": call(heads=4, bias=numbers(9, 40), softcap=1.0, sink=numbers(4)),
    "mask": call(mask=numbers(9, 40) > 0.5),
    "slopes": call(slopes=np.array([0.5, 0.25]), causal=True),
    "packed": call(T=9, S=40, causal=True, starts=([0, 4, 9], [0, 30, 40])),
}


@pytest.mark.parametrize("name", FULL)
def test_a_call_is_written_out_as_it_is_meant(name):
    made = FULL[name]
    for how in (HOW, *(other for _, _, other in neighbours(HOW))):
        right, found = made.under(how).answer(), write(made, how).outcome()
        allowed = made.under(how).allowance(each)
        for x, y, bound in zip((found.o, found.lse), right, allowed, strict=True):
            sure = np.isfinite(y)
            assert np.array_equal(np.isfinite(x), sure)
            if sure.any():
                assert_within(x[sure], y[sure], 2 * np.broadcast_to(bound, y.shape)[sure])


def each(q, k, v, **options):
    """Return the definition's rounding, head by head."""
    from refattn import engines
    from refattn.partial import Partial

    problem = engines.problem(q, k, v, **options)
    rows, keys = np.arange(problem.sizes[0]), np.arange(problem.sizes[1])
    parts = [
        rounding.allowance(
            softmax.partial,
            one.q,
            one.k,
            one.v,
            bias=one.bias(rows, keys),
            sink=one.sink,
            softcap=problem.softcap,
            order=problem.order,
            mask=one.seen(),
            scale=problem.scale,
        )
        for one in problem.all()
    ]
    shape = (*problem.leads.shape, problem.sizes[0])
    return Partial(np.array([x.o for x in parts]).reshape(*shape, -1), np.array([x.lse for x in parts]).reshape(shape))


def test_the_written_backward_pass_is_the_definitions():
    made = FULL["bias"]
    right = made.under(HOW)
    do, dlse = numbers(*right.answer().o.shape, seed=7), numbers(*right.answer().lse.shape, seed=8)
    found = backward(made, HOW, do, dlse)
    sizes = found.sizes()
    for name, x in found.gradients().items():
        # sums of fewer than 2¹⁰ products of numbers that are right to a few units each
        assert_within(x, getattr(right.vjp(do, dlse), name), 2.0**-40 * sizes[name])


def test_classes_are_shared_by_vote():
    made = call(causal=True)
    found = [of_mutant("causal from top left", made), of_mutant("causal from top left", call(T=5, causal=True))]
    assert shared(found)[0] == "causal alignment"
    assert shared([Diagnosis(2.0, (), (), 0)]) == ()


def test_what_wrong_answers_have_in_common_is_named():
    plain, capped, windowed = call(), call(softcap=1.0), call(softcap=1.0, causal=True, window=(2, 0))
    assert isolated([capped, windowed], [plain]) == ("softcap", "a softcap is given")
    assert isolated([windowed], [plain, capped]) == ("window shape", "a window is given")
    assert isolated([plain, capped], [windowed]) is None
    assert isolated([], [plain]) is None


def test_an_answer_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"o has shape \(2, 9, 5\); expected \(2, 9, 6\)"):
        diagnose(call(), HOW, numbers(2, 9, 5))
    with pytest.raises(ValueError, match="do is missing"):
        diagnose(call(), HOW, numbers(2, 9, 6), gradients={"q": numbers(2, 9, 8)})
