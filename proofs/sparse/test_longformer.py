r"""Longformer is within `bound` of exact softmax attention with the projections that each row uses.

Statement    |attend − exact| ≤ bound(q, k, v, …)        (..., T, E); 0 in the rows of global tokens
Hypotheses   Hfin: inputs finite. Any window, dilation, tokens, mask; T and S need not agree.
Uses         S1 (test_dropped.py).
Derivation   1  Row i stands at p = i + S − T. If p is no global token, `exact` is softmax over the keys A that the mask
                lets it see, and `attend` is softmax over those of A in the window {p + d·t: |t| ≤ w} or among the
                tokens, with the same q, k, v: S1 with D what is left of A. Tokens count once, in the window or not.
             2  If p is a global token, both are softmax over A with the global projections: the same number.
Equality     v = 1_D: õ = 0 and o = ρ.
Loose        nowhere.
"""

import numpy as np
from hypothesis import given, target
from hypothesis import strategies as st

from proofs.dropping import Seen, judge, reaches
from proofs.exact import Tight
from refattn import masks
from refattn.sparse import longformer
from refattn.testing.strategies import Case, cases


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Draw from the declared domain, with every window, dilation and set of tokens that a small problem tells apart."""
    case = draw(cases(longformer, most=9, least=1))
    tokens = draw(st.lists(st.integers(0, case.sizes["S"] - 1), max_size=2, unique=True))
    return case.given(window=draw(st.integers(0, 3)), dilation=draw(st.integers(1, 3)), tokens=tokens)


def pattern(case: Case) -> tuple[Seen, Seen, Seen]:
    """Return what rows keep, what they drop, and what rows of global tokens see, (T, S), from the definition."""
    T, S, options = case.sizes["T"], case.sizes["S"], case.options
    row, key = (np.arange(T) + S - T)[:, None], np.arange(S)
    pairs = masks.bind(options["mask"], T, S)
    seen = np.ones((T, S), bool) if pairs is None else pairs.seen(slice(None), slice(None))
    wide = np.isin(row, options["tokens"])
    steps, off = np.divmod(np.abs(key - row), options["dilation"])
    kept = (off == 0) & (steps <= options["window"]) | np.isin(key, options["tokens"])
    return seen & ~wide & kept, seen & ~wide & ~kept, seen & wide


@given(case=problems())
def test_longformer_is_within_its_bound(tight: Tight, case: Case) -> None:
    target(float(judge(tight, case, *pattern(case)[:2])[0].max()))


@given(case=problems())
def test_values_that_mark_what_a_row_drops_reach_the_bound(tight: Tight, case: Case) -> None:
    assert reaches(tight, case, *pattern(case)[:2])


@given(case=problems())
def test_rows_that_drop_nothing_have_bound_zero(case: Case) -> None:
    _, gone, _ = pattern(case)
    assert (case.bound()[~gone.any(axis=1)] == 0).all()


@given(case=problems())
def test_a_window_over_everything_is_exact_attention(tight: Tight, case: Case) -> None:
    case = case.given(window=sum(case.sizes.values()), dilation=1)
    assert (case.bound() == 0).all()
    judge(tight, case, *pattern(case)[:2])


@given(case=problems())
def test_each_row_looks_at_its_window_and_the_tokens_and_tokens_look_at_everything(case: Case) -> None:
    equal = case.given(**{s: 0 * x for s, x in case.arrays.items() if s[0] in "qk"})
    weights, (kept, _, wide) = equal.weights(), pattern(case)
    assert ((weights["v"] > 0) == kept).all()
    assert ((weights["v_global"] > 0) == wide).all()
