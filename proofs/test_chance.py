"""The judge of rates convicts the guilty and acquits the innocent, however the draws fall: its error is enumerated."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proofs.chance import ALARM, draws_needed, judge_count, tail, threshold


def enumerated(count: int, draws: int, rate: Fraction) -> Fraction:
    """Return P(X ≥ count) term by term."""
    hit, all_ = rate.as_integer_ratio()
    lost, term = 0, (all_ - hit) ** draws
    for k in range(max(count, 0)):
        lost += term
        term = term * (draws - k) * hit // ((k + 1) * (all_ - hit)) if hit < all_ else int(k + 1 == draws)
    return 1 - Fraction(lost, all_**draws)


@given(draws=st.integers(1, 40), count=st.integers(-1, 41), sixteenths=st.integers(1, 16))
def test_a_tail_is_the_sum_of_its_terms(draws: int, count: int, sixteenths: int) -> None:
    truth = enumerated(count, draws, Fraction(sixteenths, 16))
    assert (tail(count, draws, sixteenths / 16) * truth.denominator).contains(truth.numerator)


@pytest.mark.parametrize(("delta", "guilty"), [(1 / 16, 1 / 4), (1 / 16, 1 / 2), (1 / 2, 3 / 4), (1 / 2, 1.0)])
def test_both_errors_of_the_judge_are_below_the_alarm(delta: float, guilty: float) -> None:
    draws = draws_needed(delta, guilty)
    limit = threshold(draws, delta)
    assert enumerated(limit, draws, Fraction(delta)) < ALARM <= enumerated(limit - 1, draws, Fraction(delta))
    assert 1 - enumerated(limit, draws, Fraction(guilty)) < ALARM
    judge_count(limit - 1, draws, delta)
    with pytest.raises(AssertionError, match="at most"):
        judge_count(limit, draws, delta)


def test_drawn_coins_get_their_verdicts() -> None:
    delta, guilty = 1 / 16, 1 / 4
    draws = draws_needed(delta, guilty)
    coins = np.random.default_rng(1).random((16, draws))
    for coin in coins:
        judge_count(int((coin < delta).sum()), draws, delta)
        with pytest.raises(AssertionError, match="at most"):
            judge_count(int((coin < guilty).sum()), draws, delta)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="tells the rate"):
        draws_needed(0.5, 0.25)
    with pytest.raises(AssertionError):
        judge_count(0, 0, 0.5)
    with pytest.raises(AssertionError):
        judge_count(3, 2, 0.5)
