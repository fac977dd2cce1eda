r"""Sparse Transformer is within `bound` of causal softmax attention, each head with its own part of the pattern.

Notation     A row at p = i + S − T; C the keys j ≤ p that the mask shows; A₁ and A₂ the two parts of the pattern in C;
             o₁, ℓ₁ and o₂, ℓ₂ output and log-sum-exp over them, o₁₂ over A₁ ∪ A₂, o over C.
Hypotheses   Hfin: inputs finite. Any pattern, length, columns, mask; T and S need not agree.
Uses         S1, S4 (test_dropped.py).
Loose        nowhere.

Bound   Statement    |attend − exact| ≤ bound(q, k, v, …), (T, E), for A₁ ∪ A₂, for A₁, for A₂, and for heads that take
                     A₁ and A₂ in turn: head h with its own part.
        Derivation   1  `exact` is softmax over C, whatever the mask, and `attend` is softmax over one part of C, with
                        the same q, k, v: S1 with D what is left of C. A key in both parts counts once.
                     2  A head is such a row with a part of its own: nothing joins heads.
        Equality     v = 1_D: õ = 0 and o = ρ. l ≥ S: A₁ = C, and D = ∅.

Heads   Statement    Where A₁ and A₂ share no key, ½(o₁ + o₂) − o₁₂ = (½ − α)(o₁ − o₂), α = expit(ℓ₁ − ℓ₂). But they do
                     share: strided, the row's own key; fixed, the own block's last c columns up to p. The merge of
                     (o₁, ℓ₁) and (o₂, ℓ₂) counts those twice: TV ≤ tanh(ln(2)/4) to softmax over A₁ ∪ A₂.
        Derivation   1  S4 with A₁ and A₂ for the parts.
                     2  Strided: p − l < j ≤ p and l | p − j leave j = p. Fixed: A₂ within p's block. Counts are 1, 2.
        Equality     Shared keys of mass 1/(1 + √2).

False   That every key of C is reached in two steps of A₁ ∪ A₂ bounds one layer's error: put all of the mass on one
        dropped key. That the average of the two heads is attention over both parts: put it on one part.
"""

import math

import numpy as np
import pytest
from flint import arb
from hypothesis import given, settings, target
from hypothesis import strategies as st

from proofs.dropping import Seen, judge, judge_merge, reaches, shares
from proofs.exact import SHARP, Array, Tight
from refattn import masks, rounding
from refattn.sparse import sparse_transformer
from refattn.sparse.sparse_transformer import PATTERNS
from refattn.testing import Ball
from refattn.testing.strategies import Case, cases

BOTH = ("first", "second")


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Draw from the declared domain, with every pattern that a small problem tells apart."""
    case, length = draw(cases(sparse_transformer, most=9, least=1)), draw(st.integers(1, 5))
    part, columns = draw(st.sampled_from(("merged", *BOTH))), draw(st.integers(1, length))
    return case.given(pattern=draw(st.sampled_from(PATTERNS)), length=length, columns=columns, part=part)


def keys(T: int, S: int, pattern: str, length: int, columns: int = 1) -> dict[str, Seen]:
    """Return what each part sees of the causal pairs, (T, S), from the definition."""
    row, key = (np.arange(T) + S - T)[:, None], np.arange(S)
    if pattern == "strided":
        first, second = key > row - length, (row - key) % length == 0
    else:
        first, second = key // length == row // length, key % length >= length - columns
    causal = key <= row
    return {"first": causal & first, "second": causal & second, "merged": causal & (first | second), "exact": causal}


def parts(case: Case) -> dict[str, Seen]:
    """Return what each part keeps, and what exact attention sees."""
    T, S, options = case.sizes["T"], case.sizes["S"], case.options
    pairs = masks.bind(options["mask"], T, S)
    seen = True if pairs is None else pairs.seen(slice(None), slice(None))
    return {s: seen & x for s, x in keys(T, S, options["pattern"], options["length"], options["columns"]).items()}


def pattern(case: Case) -> tuple[Seen, Seen]:
    """Return what rows keep and what they drop."""
    every = parts(case)
    kept = every[case.options["part"]]
    return kept, every["exact"] & ~kept


def lifted(case: Case, part: str) -> Case:
    """Return the case of one part, in balls."""
    return case.given(**{name: Ball.lift(x) for name, x in case.arrays.items()}, part=part)


# --- the bound --------------------------------------------------------------------------------------------------------


@given(case=problems())
def test_the_sparse_transformer_is_within_its_bound(tight: Tight, case: Case) -> None:
    target(float(judge(tight, case, *pattern(case))[0].max()))


@given(case=problems())
def test_values_that_mark_what_a_row_drops_reach_the_bound(tight: Tight, case: Case) -> None:
    assert reaches(tight, case, *pattern(case))


@given(case=problems())
def test_rows_that_drop_nothing_have_bound_zero(case: Case) -> None:
    assert (case.bound()[~pattern(case)[1].any(axis=1)] == 0).all()


@settings(max_examples=50)
@given(case=problems(), part=st.sampled_from(("merged", "first")))
def test_a_length_that_covers_all_keys_is_causal_attention(tight: Tight, case: Case, part: str) -> None:
    case = case.given(length=case.sizes["S"], columns=1, part=part)
    assert (case.bound() == 0).all()
    judge(tight, case, *pattern(case))


@given(case=problems())
def test_each_row_looks_at_its_pattern(case: Case) -> None:
    equal = case.given(**{s: 0 * x for s, x in case.arrays.items() if s != "v"})
    assert ((equal.weights()["v"] > 0) == pattern(case)[0]).all()


@settings(max_examples=50)
@given(case=problems(), heads=st.integers(1, 3))
def test_heads_in_turn_are_within_the_bound_of_their_own_part(tight: Tight, case: Case, heads: int) -> None:
    several = case.given(q=np.stack([np.roll(case.arrays["q"], h, axis=0) for h in range(heads)]), part="alternate")
    do = np.ones((heads, case.sizes["T"], case.sizes["E"]))
    o, bound, w, dq = several.attend(), several.bound(), several.weights()["v"], several.vjp(do)["q"]
    for h in range(heads):
        alone = case.given(q=several.arrays["q"][h], part=BOTH[h % 2])
        judge(tight, alone, *pattern(alone), o=o[h], bound=bound[h])
        assert ((w[h] == 0) | pattern(alone)[0]).all()
        (q, k, v), named = alone.arguments()
        room = 2 * rounding.allowance(sparse_transformer.vjp, do[h], q, k, v, **named).q
        assert (np.abs(dq[h] - alone.vjp(do[h])["q"]) <= room).all()


# --- two heads --------------------------------------------------------------------------------------------------------


@given(case=problems())
def test_averaging_heads_over_disjoint_parts_errs_by_their_unequal_shares(case: Case) -> None:
    seen = parts(case)
    case = case.given(mask=~(seen["first"] & seen["second"]) & seen["exact"])
    seen = parts(case)
    (alpha, _), live = shares(case, *(seen[part] for part in BOTH)), seen["merged"].any(axis=1)
    one, two, merged = (lifted(case, part).attend() for part in (*BOTH, "merged"))
    error, stated = (one + two) * 0.5 - merged, (0.5 - alpha) * (one - two)
    assert all(a.overlaps(b) for a, b in zip(error[live].cells.flat, stated[live].cells.flat, strict=True))


@given(case=problems())
def test_the_parts_share_the_own_key_or_the_last_columns_of_the_own_block(case: Case) -> None:
    seen, (T, S) = parts(case), (case.sizes["T"], case.sizes["S"])
    row, key, n = (np.arange(T) + S - T)[:, None], np.arange(S), case.options["length"]
    own = row == key
    if case.options["pattern"] == "fixed":
        own = (row // n == key // n) & (key % n >= n - case.options["columns"])
    assert ((seen["first"] & seen["second"]) == (own & seen["exact"])).all()


def merge(tight: Tight, case: Case) -> list[float]:
    """Judge the merge of the two heads."""
    one, two, union = (lifted(case, part).weights()["v"] for part in (*BOTH, "merged"))
    return judge_merge(tight, shares(case, *(parts(case)[part] for part in BOTH)), (one, two), union)


@given(case=problems())
def test_merging_the_two_heads_counts_what_they_share_twice(tight: Tight, case: Case) -> None:
    target(max(merge(tight, case)))


def peaked(kind: str, T: int, length: int, logits: Array, v: Array, part: str = "merged") -> Case:
    """Return T rows and keys in which every row has these logits."""
    arrays = {"q": np.ones((T, 1)), "k": logits[:, None], "v": v[:, None]}
    options = {"pattern": kind, "length": length, "columns": 1, "part": part, "mask": None, "scale": 1.0}
    return Case(sparse_transformer, {"T": T, "S": T, "D": 1, "E": 1}, arrays, options)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("length", [2, 3])
def test_an_own_key_of_mass_one_over_one_plus_root_two_reaches_it(tight: Tight, kind: str, length: int) -> None:
    T = 3 * length
    others = keys(T, T, kind, length)["merged"][-1].sum() - 1
    own = np.where(np.arange(T) == T - 1, math.log(others / math.sqrt(2)), 0.0)  # the last row's is a last column too
    assert merge(tight, peaked(kind, T, length, own, np.zeros(T)))[-1] > SHARP


@pytest.mark.parametrize("kind", PATTERNS)
def test_that_the_average_of_the_heads_is_attention_over_both_parts_is_false(kind: str) -> None:
    far = np.arange(9) == 2  # a key of the second part alone
    one, two, merged = (
        lifted(peaked(kind, 9, 3, 40.0 * far, far.astype(float), part), part).attend()[-1].cells[0]
        for part in (*BOTH, "merged")
    )
    assert (merged > arb(SHARP)) and ((one + two) / 2 < arb(1) / 2)


@settings(max_examples=50)
@given(kind=st.sampled_from(PATTERNS), length=st.integers(2, 4), more=st.integers(1, 4), sharp=st.integers(8, 40))
def test_that_two_hops_reach_every_key_bounds_the_error_of_one_layer_is_false(
    tight: Tight, kind: str, length: int, more: int, sharp: int
) -> None:
    T = 2 * length + more
    seen = keys(T, T, kind, length)
    hop = seen["merged"].astype(int)
    assert ((hop @ hop > 0) == seen["exact"]).all()
    lost = np.arange(T) == np.flatnonzero(seen["exact"][-1] & ~seen["merged"][-1])[0]
    case = peaked(kind, T, length, float(sharp) * lost, lost.astype(float))
    assert case.attend()[-1] == 0
    assert lifted(case, "merged").exact()[-1].cells[0] >= 1 - T * arb(-sharp).exp()  # of a range of 1
    judge(tight, case, *pattern(case))  # what bounds it is S1
