r"""Block and positions under one softmax are within S1 of exact attention; the sum of two softmaxes is no attention.

Notation     A row at p = i + S − T; C the keys that the mask shows; B ⊆ C those of its block, P ⊆ C the positions that
             all rows see; o over C, o_B, ℓ_B and o_P, ℓ_P over B and P (0 and −∞ where empty), õ over B ∪ P.
Hypotheses   Hfin: inputs finite. Any block, positions, mask; T and S need not agree.
Uses         P2 (test_perturbation.py), S1, S4 (test_dropped.py).
Loose        nowhere.

Union   Statement    |õ − o| ≤ bound(q, k, v, …), (T, E).
        Derivation   S1 with D = C ∖ (B ∪ P). A position in the row's own block counts once.
        Equality     v = 1_D: õ = 0 and o = ρ. b ≥ S, or all positions: D = ∅.

Sum     Statement    (a) Where B and P are not empty the weights of o_B + o_P sum to 2, and of values that are all 1 it
                     makes 2: off by 1, the whole of the value, whatever q and k, even where B = P = C.
                     (b) |o_B + o_P − o| ≤ bound(…, form="sum"), the farther end of the values over C.
                     (c) Half of it is the average: ½(o_B + o_P) − õ = (½ − α)(o_B − o_P), α = expit(ℓ_B − ℓ_P), where
                     B and P share no key.
                     (d) The merge of (o_B, ℓ_B) and (o_P, ℓ_P), which is õ where B and P share no key, counts the
                     positions in the own block twice: TV ≤ tanh(ln(2)/4).
        Derivation   (a) 1 + 1. (b) P2: it holds of any answer, so it says nothing of this one. (c), (d) S4.
        Equality     (b) all of the mass on a key in neither part with the one value that is not 0. (d) shared keys of
                     mass 1/(1 + √2).

Draw    Statement    Over the draw of g positions from each block of n keys, E ρ = Σ (1 − min(g, n)/n) p(b ∩ C ∖ B) over
                     the blocks b: what sampling keeps is its share of the keys, whatever they weigh.
        Derivation   Every key of a block is drawn with probability min(g, n)/n, and ρ is a sum over keys.

False   That the sum stays within the values. That half of it is attention over the union: put the mass on one part.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from flint import arb
from hypothesis import given, settings, target
from hypothesis import strategies as st

from proofs.chance import ALARM, draws_needed, judge_count
from proofs.dropping import Seen, judge, judge_merge, reaches, shares
from proofs.exact import SHARP, Array, Tight, slack
from refattn import masks, rounding, softmax
from refattn.rounding import gamma
from refattn.sparse import local_global
from refattn.testing import Ball
from refattn.testing.strategies import Case, cases


@st.composite
def problems(draw: st.DrawFn, form: str = "union") -> Case:
    """Draw from the declared domain, with any positions."""
    case = draw(cases(local_global, most=9, least=1))
    positions = draw(st.lists(st.integers(0, case.sizes["S"] - 1), max_size=3))
    return case.given(positions=positions, block=draw(st.integers(1, 4)), form=form)


def parts(case: Case) -> tuple[Seen, Seen, Seen]:
    """Return B, P and C, (T, S), from the definition."""
    T, S, options = case.sizes["T"], case.sizes["S"], case.options
    row, key = (np.arange(T) + S - T)[:, None], np.arange(S)
    pairs = masks.bind(options["mask"], T, S)
    seen = np.ones((T, S), bool) if pairs is None else pairs.seen(slice(None), slice(None))
    return seen & (row // options["block"] == key // options["block"]), seen & np.isin(key, options["positions"]), seen


def pattern(case: Case) -> tuple[Seen, Seen]:
    """Return what rows keep and what they drop."""
    local, wide, seen = parts(case)
    return local | wide, seen & ~local & ~wide


def lifted(case: Case, **changes: Any) -> Case:
    """Return the case in balls."""
    return case.given(**{name: Ball.lift(x) for name, x in case.arrays.items()}, **changes)


def peaked(T: int, logits: Array, v: Array, **options: Any) -> Case:
    """Return T rows and keys in which every row has these logits, in two blocks."""
    arrays = {"q": np.ones((T, 1)), "k": logits[:, None], "v": v[:, None]}
    options = {"block": (T + 1) // 2, "form": "union", "mask": None, "scale": 1.0} | options
    return Case(local_global, {"T": T, "S": T, "D": 1, "E": 1}, arrays, options)


# --- one softmax ------------------------------------------------------------------------------------------------------


@given(case=problems())
def test_block_and_positions_are_within_the_bound(tight: Tight, case: Case) -> None:
    target(float(judge(tight, case, *pattern(case))[0].max()))


@given(case=problems())
def test_values_that_mark_what_a_row_drops_reach_the_bound(tight: Tight, case: Case) -> None:
    assert reaches(tight, case, *pattern(case))


@given(case=problems())
def test_rows_that_drop_nothing_have_bound_zero(case: Case) -> None:
    assert (case.bound()[~pattern(case)[1].any(axis=1)] == 0).all()


@settings(max_examples=50)
@given(case=problems())
def test_all_positions_are_exact_attention(tight: Tight, case: Case) -> None:
    case = case.given(positions=range(case.sizes["S"]))
    assert (case.bound() == 0).all()
    judge(tight, case, *pattern(case))


@given(case=problems())
def test_each_row_looks_at_its_block_and_the_positions(case: Case) -> None:
    equal = case.given(**{s: 0 * x for s, x in case.arrays.items() if s != "v"})
    assert ((equal.weights()["v"] > 0) == pattern(case)[0]).all()


# --- the sum of two ---------------------------------------------------------------------------------------------------


@given(case=problems("sum"))
def test_the_weights_of_the_sum_are_those_of_two_answers(case: Case) -> None:
    total, (local, wide, _) = lifted(case).weights()["v"].sum(axis=1), parts(case)
    assert all(a == b or a.overlaps(b) for a, b in zip(total.cells, map(arb, answers(local, wide)), strict=True))
    equal = case.given(**{s: 0 * x for s, x in case.arrays.items() if s != "v"}).weights()["v"]
    assert ((equal > 0) == (local | wide)).all()


def answers(local: Seen, wide: Seen) -> list[int]:
    """Return how many of the two parts each row has."""
    return [int(a) + int(b) for a, b in zip(local.any(axis=1), wide.any(axis=1), strict=True)]


@given(case=problems("sum"))
def test_of_values_that_are_all_one_the_sum_makes_as_many_as_it_has_parts(case: Case) -> None:
    local, wide, seen = parts(case)
    ones = lifted(case.given(v=np.ones_like(case.arrays["v"])))
    error = ones.attend() - ones.exact()
    for row, count, some in zip(error.cells, answers(local, wide), seen.any(axis=1), strict=True):
        assert all(x.overlaps(arb(count - int(some))) for x in row)


@given(case=problems("sum"))
def test_where_both_parts_see_everything_the_sum_is_twice_the_answer(case: Case) -> None:
    S = case.sizes["S"]
    case = case.given(q=case.arrays["q"][-S:], block=S, positions=range(S), mask=None)
    whole, twice = lifted(case, form="union").attend(), lifted(case).attend()
    assert all(a.overlaps(2 * b) for a, b in zip(twice.cells.flat, whole.cells.flat, strict=True))


def judge_sum(tight: Tight, case: Case) -> Array:
    (q, k, v), named = case.arguments()
    error, bound = np.abs(case.attend() - case.exact()), case.bound()
    own = rounding.allowance(local_global.attend, q, k, v, **named)  # õ stands in the error and in the bound
    exact = rounding.allowance(softmax.attend, q, k, v, mask=case.options["mask"], scale=case.options.get("scale"))
    room = 2 * own + exact + gamma(1) * error + slack(bound, 1)
    ratios = [tight("P2", *each) for each in zip(error.flat, bound.flat, room.flat, strict=True)]
    return np.reshape(ratios, error.shape)


@given(case=problems("sum"))
def test_the_sum_is_within_the_farther_end_of_the_values(tight: Tight, case: Case) -> None:
    target(float(judge_sum(tight, case).max()))


@given(T=st.integers(4, 8))
def test_all_mass_on_a_key_in_neither_part_reaches_it(tight: Tight, T: int) -> None:
    lost = (np.arange(T) == 1).astype(float)
    assert judge_sum(tight, peaked(T, 40.0 * lost, lost, positions=[0], form="sum"))[-1] > SHARP


def test_that_the_sum_stays_within_the_values_is_false() -> None:
    case = peaked(4, np.zeros(4), np.array([1.0, 1.0, 3.0, 3.0]), positions=[2, 3], form="sum")
    assert case.attend().ravel().tolist() == [4.0, 4.0, 6.0, 6.0]  # of values from 1 to 3; exact attention is 2


# --- half of it -------------------------------------------------------------------------------------------------------


@given(case=problems())
def test_half_of_the_sum_errs_by_the_unequal_shares_of_the_parts(case: Case) -> None:
    local, wide, seen = parts(case)
    case = case.given(mask=seen & ~(local & wide))
    local, wide, _ = parts(case)
    alpha, _ = shares(case, local, wide)
    live, total, union = (local | wide).any(axis=1), lifted(case, form="sum").attend(), lifted(case).attend()
    first = lifted(case, positions=[]).attend()  # o_B; o_P is the rest
    error, stated = total * 0.5 - union, (0.5 - alpha) * (first - (total - first))
    assert all(a.overlaps(b) for a, b in zip(error[live].cells.flat, stated[live].cells.flat, strict=True))


def merge(tight: Tight, case: Case) -> list[float]:
    """Judge the merge of block and positions."""
    one, both = (lifted(case, positions=x, form="sum").weights()["v"] for x in ([], case.options["positions"]))
    return judge_merge(tight, shares(case, *parts(case)[:2]), (one, both - one), lifted(case).weights()["v"])


@given(case=problems())
def test_merging_the_parts_counts_positions_in_the_own_block_twice(tight: Tight, case: Case) -> None:
    target(max(merge(tight, case)))


@pytest.mark.parametrize("T", [4, 7])
def test_a_position_of_mass_one_over_one_plus_root_two_reaches_it(tight: Tight, T: int) -> None:
    last = np.arange(T) == T - 1
    case = peaked(T, np.where(last, math.log((T // 2 - 1) / math.sqrt(2)), 0.0), np.zeros(T), positions=[T - 1])
    assert merge(tight, case)[-1] > SHARP


def test_that_half_of_the_sum_is_attention_over_the_union_is_false() -> None:
    first = (np.arange(4) == 0).astype(float)
    case = peaked(4, 40.0 * first, first, positions=[0])
    union, total = lifted(case).attend().cells[-1, 0], lifted(case, form="sum").attend().cells[-1, 0]
    assert union > arb(SHARP)
    assert total.overlaps(arb(1))  # the position makes 1 and the block, which sees zeros, nothing: half of it is ½


# --- the draw ---------------------------------------------------------------------------------------------------------


@given(S=st.integers(0, 12), block=st.none() | st.integers(1, 5), sampled=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_each_block_gives_as_many_positions_as_it_can(S: int, block: int | None, sampled: int, seed: int) -> None:
    k = np.zeros((S, 1))
    (positions,) = local_global.draw(np.random.default_rng(seed), k, k, k, block=block, sampled=sampled)
    b = block or max(1, round(math.sqrt(S)))
    sizes = [min(b, S - start) for start in range(0, S, b)]
    assert [sum(p // b == n for p in positions) for n in range(len(sizes))] == [min(sampled, n) for n in sizes]
    assert list(positions) == sorted(set(positions))


def test_each_position_of_a_block_is_drawn_as_often_as_the_others() -> None:
    """A position drawn more often or less often is convicted; one drawn half as often is, nearly for sure."""
    k, rng, chances, alarm = np.zeros((11, 1)), np.random.default_rng(4), [1 / 2] * 8 + [2 / 3] * 3, ALARM / 22
    draws = max(draws_needed(1 - p, 1 - p / 2, alarm) for p in set(chances))
    found = [x for _ in range(draws) for x in local_global.draw(rng, k, k, k, block=4, sampled=2).positions]
    for count, p in zip(np.bincount(found, minlength=11).tolist(), chances, strict=True):
        judge_count(count, draws, p, alarm)
        judge_count(draws - count, draws, 1 - p, alarm)


@settings(max_examples=50)
@given(case=problems(), sampled=st.integers(0, 3))
def test_sampled_positions_keep_their_share_of_the_keys_and_no_more(case: Case, sampled: int) -> None:
    T, S, b = case.sizes["T"], case.sizes["S"], case.options["block"]
    blocks = [range(start, min(start + b, S)) for start in range(0, S, b)]
    draws = itertools.product(*(itertools.combinations(x, min(sampled, len(x))) for x in blocks))
    (q, k), options = (Ball.lift(case.arrays[s]) for s in "qk"), case.options
    p = softmax.weights(q, k, mask=options["mask"], scale=options.get("scale")).cells
    equal = case.given(**{s: 0 * x for s, x in case.arrays.items() if s != "v"})
    kept = [equal.given(positions=[j for each in x for j in each]).weights()["v"] > 0 for x in draws]
    local, _, seen = parts(case)
    left = [1 - arb(min(sampled, len(blocks[j // b]))) / len(blocks[j // b]) for j in range(S)]
    for i in range(T):
        mean = sum((x for one in kept for x in p[i][seen[i] & ~one[i]]), arb(0)) / len(kept)
        assert mean.overlaps(sum((p[i, j] * left[j] for j in np.flatnonzero(seen[i] & ~local[i])), arb(0)))
