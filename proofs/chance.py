"""Judges of claims that may fail: "this happens with probability at most δ" is judged by counting.

The number of draws is fixed before the first one, from the binomial law alone, so that the judge convicts what fails at
rate δ, or less, with probability below `ALARM`, and lets a given higher rate go with probability below it too.
Binomial tails are summed in ball arithmetic.
"""

import functools

from flint import arb

ALARM = 1e-9
"""Probability of a wrong verdict."""


def tail(count: int, draws: int, rate: float) -> arb:
    """Return the probability that `draws` independent events of this rate happen at least `count` times."""
    if count <= 0 or rate == 1:
        return arb(int(count <= draws))
    hit, miss, total = arb(rate), 1 - arb(rate), arb(0)
    term = arb.bin_uiui(draws, count) * hit**count * miss ** (draws - count) if count <= draws else arb(0)
    for k in range(count, draws + 1):
        total += term
        term = term * hit / miss * (draws - k) / (k + 1)
    return total


@functools.cache
def threshold(draws: int, delta: float, alarm: float = ALARM) -> int:
    """Return the smallest count that convicts the claim "at most δ": the innocent reach it less often than `alarm`."""
    low, high = 0, draws + 1  # `high` convicts, `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tail(middle, draws, delta) < alarm else (middle, high)
    return high


def draws_needed(delta: float, guilty: float, alarm: float = ALARM) -> int:
    """Return how many draws convict what happens at the rate `guilty` > δ, and acquit what happens at the rate δ.

    A guilty rate is that of the claim with its bound halved: a judge who cannot tell the two apart judges nothing.
    """
    if not 0 < delta < guilty <= 1:
        raise ValueError(f"no number of draws tells the rate {guilty} from at most {delta}")

    def enough(draws: int) -> bool:
        return bool(1 - tail(threshold(draws, delta, alarm), draws, guilty) < alarm)

    high = 1
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:  # larger numbers need not all be enough, but `high` is
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def judge_count(failures: int, draws: int, delta: float, alarm: float = ALARM) -> float:
    """Assert that failures seen among independent draws agree with a rate of at most δ; return their rate ÷ δ."""
    assert 0 <= failures <= draws and draws > 0, f"{failures} failures of {draws} draws"
    limit = threshold(draws, delta, alarm)
    assert failures < limit, (
        f"{failures} of {draws} draws fail, a rate of {failures / draws:.4g}; at most {delta:g} is claimed, "
        f"which reaches {limit} with probability below {alarm:g}"
    )
    return failures / draws / delta
