r"""Segments, windows and sinks are masks, and a stream can say what they cost from summaries of the keys it forgot.

Notation     Row at position p, segments of L, memory M, s sinks: it keeps K = {⌊p/L⌋L − M ≤ j ≤ p} ∪ {j < s, j ≤ p} of
             A = {j ≤ p}, and has lost D = {s ≤ j < ⌊p/L⌋L − M}. õ, lse over K, o over A, ρ = p(D), x = max |·|.
Hypotheses   Hfin: inputs finite. Any L ≥ 1, M ≥ 0, s ≥ 0, any mask (but `certify`: none), T and S need not agree.
Uses         S1 (test_dropped.py), S2 (test_blocks.py), F1, F2 (test_rounding.py).
Loose        nowhere.

S1  Statement    |attend − exact| ≤ bound(q, k, v, …)        (..., T, E); exact is causal
    Derivation   attend is softmax over K, exact over A, both as far as the mask allows: S1.
    Equality     v = 1_D: õ = 0 and o = ρ.

M1  Statement    (a) A layer of Transformer-XL (each segment of L after a cache of the last M keys and values, causal
                     within the segment) is softmax over K with s = 0, and so is a stack of them, layer by layer.
                 (b) Through N such layers row p reaches back to r_N, r_0 = p, r_{n+1} = ⌊r_n/L⌋L − M, or to key 0:
                     NM ≤ ⌊p/L⌋L − r_N ≤ NM + (N−1)(L−1), and ⌊p/L⌋L − NM if L divides M.
                 (c) From blocks that summarise D, of counts n_b, means, covariances, radii and corners, without its
                     keys, ρ ≤ ρ̄ = expit(U − lse), ρ ≥ ρ̲ with S2's U; |õ − o| ≤ ρ̄·max(max_D v − õ, õ − min_D v).
                 (d) Blocks a, b join into n = n_a + n_b, c = c_a + (n_b/n)(c_b − c_a), nΣ = n_aΣ_a + n_bΣ_b +
                     (n_an_b/n)(c_b − c_a)(c_b − c_a)ᵀ, corners by min and max: those of the union. The ball of radius
                     min(max(r_a + ‖c_a − c‖, r_b + ‖c_b − c‖), distance from c to the farthest corner) holds it.
    Derivation   1  (a) ⌊p/L⌋L is where p's segment begins; the cache is the M keys before it, in each layer the input
                    of that layer, which later segments do not change: induction over layers.
                 2  (b) the least key that keys ≥ r see is ⌊r/L⌋L − M, as that never falls in r. ⌊r/L⌋L = r − (r mod L).
                 3  (d) is the parallel-axis identity, and the triangle inequality. A key alone has Σ = 0, r = 0.
                 4  (c) Keys enter their block when the first row has lost them, and no row sees them again: the blocks
                    of row p hold D, each key once. S2 holds for any such blocks, however they were chosen: balls and
                    boxes may be too large, never too small. S1's bound increases in ρ; max_D v, min_D v are kept.
    Rounding     A block of n keys, |k_jc| ≤ K_c, made by any tree of joins; away = c_b − c_a; u' = u(1 + tiny).
                 1  Centre: e(n) ≤ (n_a/n)e(n_a) + (n_b/n)e(n_b) + 7u'K_c (three roundings of (n_b/n)·|away| ≤ 2K_c, one
                    of the sum), so e(n) ≤ 8u'(n−1)K_c, and `away` is within 8u'nK_c.
                 2  Covariance: the errors of Σ_a, Σ_b enter with weights n_a/n, n_b/n; rounding adds 8u'K_iK_j, as the
                    parts sum to at most K_iK_j (Cauchy–Schwarz); `away` adds (n_an_b/n²)·2·2K_i·8u'nK_j. A node's share
                    of the root is n_node/n: Σ n_node ≤ n(n−1), and Σ n_an_b = n(n−1)/2, the pairs of keys, each of
                    which meets in one node. In all at most (8 + 16)u'(n−1)K_iK_j ≤ γ_{32n}K_iK_j.
                 3  Radius: r_a + (n_b/n)‖away‖ is too small by (n_b/n)(8u'n + 2γ_{D+6})‖K‖ + 2u'‖K‖ at most; from a
                    leaf to the root the siblings' n_b sum to n − 1: γ_{(2D+32)n}‖K‖. The corner's distance is off by
                    less.
                 4  T(r, ς²) of S2 increases in r and in ς² above (it is the largest ln E e^X of an X ≤ r of mean 0 and
                    variance at most ς²), below it falls in r and increases in ς², and so it does along r = ς√(n−1).
                    So S2 of the widened summary (`widened`) encloses ρ, and the difference to S2 of the computed one
                    is what the summary's rounding costs.
                 5  Evaluating S2 then: with X = |σ|Σ|q_c|K_c, R ≤ 2X, and an error of u in a logarithm's argument is
                    one of u in it. Each level passes D + 80 roundings relative to ln n + 8X + 4, the sum of B levels
                    and the logistic B + 80 more, relative to |lse| too; ln ρ is off by
                    γ_{D+B+160}(ln n + 8X + |lse| + 8) and by lse's allowance (F2) at most.
    Equality     D in one place, or in two along one axis; for the error v = 1_D besides.

Numbers are drawn, judged and charged for rounding as `proofs/exact.py` says.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from flint import arb
from hypothesis import assume, given, settings, target
from hypothesis import strategies as st

import refattn.study
from proofs.dropping import Seen, judge, mass_relative, reaches
from proofs.exact import SHARP, Array, Tight, distance, dot, exact, number, slack
from refattn import dropped, masks, rounding, softmax
from refattn.blocks import Blocks, Interval, mass_from_blocks
from refattn.memory import segments
from refattn.memory.segments import Certificate, State
from refattn.rounding import gamma
from refattn.testing import Ball, assert_within
from refattn.testing.strategies import KINDS, Case, cases, numbers

ALL = slice(None)
small = st.integers(0, 3)


def kept(T: int, S: int, length: int, memory: int, sinks: int) -> Seen:
    """Return what rows keep, pair by pair, from the definition in words."""
    seen = np.zeros((T, S), bool)
    for i in range(T):
        p = i + S - T
        segment = [j for j in range(S) if j // length == p // length]
        before = [j for j in range(S) if 0 < p - p % length - j <= memory]
        seen[i, [j for j in (*segment, *before, *range(min(sinks, S))) if j <= p]] = True
    return seen


# --- S1 ---------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Draw from the declared domain, with every segment, memory and number of sinks that small problems tell apart."""
    case = draw(cases(segments, most=9, least=1))
    return case.given(length=draw(st.integers(1, 4)), memory=draw(small), sinks=draw(small))


def pattern(case: Case) -> tuple[Seen, Seen]:
    """Return what rows keep and what they drop, of what mask and causality let them see."""
    T, S, options = case.sizes["T"], case.sizes["S"], case.options
    pairs = masks.bind(options["mask"], T, S)
    seen = np.tri(T, S, S - T, dtype=bool) & (True if pairs is None else pairs.seen(ALL, ALL))
    own = kept(T, S, *(options[name] for name in ("length", "memory", "sinks")))
    return seen & own, seen & ~own


@given(case=problems())
def test_segments_are_within_their_bound(tight: Tight, case: Case) -> None:
    target(float(judge(tight, case, *pattern(case))[0].max()))


@given(case=problems())
def test_values_that_mark_what_a_row_drops_reach_the_bound(tight: Tight, case: Case) -> None:
    assert reaches(tight, case, *pattern(case))


@given(case=problems())
def test_each_row_looks_at_its_segment_the_memory_and_the_sinks(case: Case) -> None:
    equal = case.given(**{s: 0 * x for s, x in case.arrays.items() if s in "qk"})
    assert ((equal.weights()["v"] > 0) == pattern(case)[0]).all()


@given(case=problems())
def test_rows_that_drop_nothing_are_exact(case: Case) -> None:
    _, gone = pattern(case)
    assert (case.bound()[~gone.any(axis=1)] == 0).all()
    assert (case.given(memory=case.sizes["S"]).bound() == 0).all()


def test_dropping_attention_sinks_only_loses_position_is_false(tight: Tight) -> None:
    """Keys that know no position, all alike but the first, which has the value 0: the answer moves by its weight."""
    n, logit = 8, 4.0
    q, k, v = np.ones((n, 1)), np.where(np.arange(n) == 0, logit, 0.0)[:, None], np.where(np.arange(n) == 0, 0.0, 1.0)
    with_sink, without = (segments.attend(q, k, v[:, None], memory=2, sinks=s, scale=1.0)[-1, 0] for s in (1, 0))
    sink = arb(logit).exp() / (arb(logit).exp() + 3)
    room = sum(
        rounding.allowance(segments.attend, q, k, v[:, None], memory=2, sinks=s, scale=1.0)[-1, 0] for s in (1, 0)
    )
    move = abs(with_sink - without)
    assert tight("S1", [move, number(sink)], [number(sink), move], room + gamma(2)) > SHARP
    weights = [exact(segments.weights(q, k, memory=2, sinks=s, scale=1.0)[-1]) for s in (1, 0)]
    assert abs(number(distance(*weights) - sink)) <= n * (room + gamma(2))
    assert move > 0.9


# --- M1 (a), (b) ------------------------------------------------------------------------------------------------------


def attention(q: list[arb], keys: list[list[arb]]) -> list[arb]:
    """Return softmax attention of one row over keys that are their own values, of scale 1."""
    w = [dot(q, x).exp() for x in keys]
    z = sum(w, arb(0))
    return [dot(w, column) / z for column in map(list, zip(*keys, strict=True))]


def recurrent(h: list[list[arb]], length: int, memory: int, layers: int) -> list[list[arb]]:
    """Run layers over segments, each layer with a cache of the last `memory` of its inputs."""
    caches: list[list[list[arb]]] = [[] for _ in range(layers)]
    out: list[list[arb]] = []
    for start in range(0, len(h), length):
        segment = h[start : start + length]
        for layer in range(layers):
            keys = caches[layer] + segment
            caches[layer] = keys[len(keys) - min(memory, len(keys)) :]
            segment = [attention(x, keys[: len(keys) - len(segment) + i + 1]) for i, x in enumerate(segment)]
        out += segment
    return out


@given(length=st.integers(1, 4), memory=st.integers(0, 4), layers=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_layers_with_caches_are_layers_with_a_mask(length: int, memory: int, layers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    h = rng.integers(-64, 65, (int(rng.integers(1, 8)), 2)) / 64
    masked = Ball.lift(h)
    for _ in range(layers):
        masked = segments.attend(masked, masked, masked, length=length, memory=memory, scale=1.0)
    for mine, theirs in zip(masked.cells, recurrent([exact(x) for x in h], length, memory, layers), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.overlaps(b) and float((a - b).abs_upper()) < 2.0**-100


@given(T=st.integers(1, 24), length=st.integers(1, 4), memory=st.integers(0, 4), layers=st.integers(1, 4))
def test_layers_reach_as_far_back_as_their_memories_together(T: int, length: int, memory: int, layers: int) -> None:
    seen = kept(T, T, length, memory, 0).astype(int)
    reach = np.linalg.matrix_power(seen, layers) > 0
    for p in range(T):
        start = r = p // length * length
        for _ in range(layers):
            r = r // length * length - memory
        assert reach[p].argmax() == max(r, 0) and reach[p, max(r, 0) : p + 1].all()
        assert layers * memory <= start - r <= layers * memory + (layers - 1) * (length - 1)
        if memory % length == 0:
            assert r == start - layers * memory


# --- M1 (d) -----------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """Keys, and how many blocks may summarise them."""

    k: Array
    limit: int

    @property
    def reach(self) -> Array:
        return np.abs(self.k).max(axis=0)


@st.composite
def keys(draw: st.DrawFn, most: int = 24) -> Keys:
    """Keys of every kind, some of them equal, of any floats."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, most)), draw(st.integers(1, 3))
    k = numbers(rng, shape, draw(st.sampled_from(KINDS))) * draw(st.sampled_from([1.0, 1 / 3, 2.0**40 / 3]))
    if draw(st.booleans()):
        k = k[rng.integers(0, len(k), len(k))]
    return Keys(k, draw(st.sampled_from([1, 2, 5])))


@given(case=keys())
def test_blocks_that_join_are_the_block_of_their_union(case: Keys) -> None:
    none = Blocks.of(case.k[:0], 1)
    (n, centre, covariance, radius, low, high), N = none.absorb(case.k, 1), len(case.k)
    assert n.tolist() == [N]
    assert (low == case.k.min(axis=0)).all() and (high == case.k.max(axis=0)).all()
    rows = [[Fraction(x) for x in row] for row in case.k.tolist()]
    mean = [sum(column) / N for column in zip(*rows, strict=True)]
    away = [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]
    D = case.k.shape[1]
    for i in range(D):
        assert abs(Fraction(centre[0, i]) - mean[i]) <= Fraction(gamma(8 * N) * case.reach[i])
        for j in range(D):
            product = sum(x[i] * x[j] for x in away) / N
            charged = Fraction(gamma(32 * N)) * Fraction(case.reach[i]) * Fraction(case.reach[j])
            assert abs(Fraction(covariance[0, i, j]) - product) <= charged
    corner = sum(max(Fraction(a) - m, m - Fraction(b)) ** 2 for a, b, m in zip(high[0], low[0], mean, strict=True))
    room = gamma((2 * D + 32) * N) * math.sqrt((case.reach**2).sum()) * rounding.EVALUATION
    assert max(sum(x * x for x in row) for row in away) <= Fraction(radius[0] + room) ** 2
    assert Fraction(max(radius[0] - room, 0.0)) ** 2 <= corner


@given(case=keys())
def test_no_key_is_lost_or_counted_twice_and_no_more_blocks_are_kept_than_asked_for(case: Keys) -> None:
    blocks = Blocks.of(case.k[:0], 1).absorb(case.k, case.limit)
    N = len(case.k)
    assert blocks.count.shape == (min(N, case.limit),) and blocks.count.sum() == N
    total, charged = (blocks.count[:, None] * blocks.centre).sum(axis=0), gamma(10 * N + 4) * N * case.reach
    for got, column, bound in zip(total, case.k.T, charged, strict=True):
        assert abs(Fraction(got) - sum(map(Fraction, column.tolist()))) <= Fraction(bound)
    again = Blocks.of(case.k[:0], 1).absorb(case.k, N).absorb(case.k[:0], case.limit)
    assert again.count.sum() == N and again.count.shape == blocks.count.shape


def test_the_two_nearest_blocks_join() -> None:
    blocks = Blocks.of([[0.0], [4.0], [5.0], [9.0]], 1).absorb(np.zeros((0, 1)), 2)
    assert sorted(zip(blocks.centre.ravel().tolist(), blocks.count.tolist(), strict=True)) == [(3.0, 3), (9.0, 1)]


# --- M1 (c) -----------------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """T tokens, the options, and how many blocks there may be."""

    q: Array
    k: Array
    v: Array
    options: dict[str, Any]
    blocks: int

    @property
    def kept(self) -> Seen:
        return kept(len(self.q), len(self.k), *(self.options[s] for s in ("length", "memory", "sinks")))

    @property
    def gone(self) -> Seen:
        return np.tri(len(self.q), dtype=bool) & ~self.kept

    def certify(self, *cuts: int) -> Certificate:
        """Return the certificate of the tokens, taken in several steps."""
        state, parts = None, []
        for a, b in zip((0, *cuts), (*cuts, len(self.q)), strict=True):
            tokens = (x[a:b] for x in self[:3])
            part, state = segments.certify(state, *tokens, blocks=self.blocks, **self.options)
            parts.append(part)
        o, mass, error = zip(*parts, strict=True)
        ends = (np.concatenate(x) for x in zip(*mass, strict=True))
        return Certificate(np.concatenate(o), Interval(*ends), np.concatenate(error))

    def states(self) -> Iterator[State]:
        """Yield what is held before each token, and after the last."""
        state = None
        for i in range(len(self.q) + 1):
            tokens = (x[max(i - 1, 0) : i] for x in self[:3])
            _, state = segments.certify(state, *tokens, blocks=self.blocks, **self.options)
            yield state


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Tokens of every kind, or clustered keys, with every window that a short stream tells apart."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    T, D, E = draw(st.integers(2, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    q, k, v = (numbers(rng, (T, n), draw(st.sampled_from(KINDS))) for n in (D, D, E))
    if draw(st.booleans()):
        k = k[rng.integers(0, 3, T) % T] + numbers(rng, (T, D), "small")
    options = {"length": draw(st.integers(1, 3)), "memory": draw(small), "sinks": draw(small)}
    options["scale"] = draw(st.sampled_from([None, 0.25, 1.0]))
    return Stream(q, k, v, options, draw(st.sampled_from([1, 2, 8])))


def widened(blocks: Blocks, q: Array, reach: Array, sign: int) -> Blocks:
    """Return blocks that certainly hold what these do, as one query sees them: for the upper end, or for the lower."""
    n, D = int(blocks.count.sum()), len(q)
    side, e = np.sign(q) * sign, gamma(8 * n) * reach * rounding.EVALUATION
    spread = gamma(32 * n + 2 * D + 8) * np.outer(side * reach, side * reach) * rounding.EVALUATION
    return Blocks(
        blocks.count,
        blocks.centre + side * e,
        blocks.covariance + sign * spread,
        blocks.radius + gamma((2 * D + 32) * n) * math.sqrt((reach * reach).sum()) * rounding.EVALUATION,
        blocks.low - 2 * e,
        blocks.high + 2 * e,
    )


def mass_rooms(case: Stream, mass: Interval) -> Array:
    """Return how far the ends of the rows' ρ may be off by rounding, (2, T): M1, Rounding."""
    scale, rooms = case.options["scale"], np.zeros((2, len(case.q)))
    plain = (*case[:2], np.zeros((len(case.k), 0)))
    lse = softmax.partial(*plain, mask=case.kept, scale=scale).lse
    off = rounding.allowance(softmax.partial, *plain, mask=case.kept, scale=scale).lse
    sigma = 1 / math.sqrt(case.q.shape[1]) if scale is None else abs(scale)
    for i, (state, gone) in enumerate(zip(case.states(), case.gone, strict=False)):
        if gone.any():
            q, reach, blocks = case.q[i], np.abs(case.k[gone]).max(axis=0), state.evicted
            size = sigma * float(np.abs(q) @ reach)
            count = len(q) + len(blocks.count) + 160
            relative = math.expm1(gamma(count) * (math.log(gone.sum()) + 8 * size + abs(lse[i]) + 8) + off[i])
            every = np.ones((1, len(blocks.count)), bool)
            for n, (sign, end) in enumerate(((-1, mass.low[i]), (1, mass.high[i]))):
                wide = widened(blocks, q if scale is None else q * np.sign(scale), reach, sign)
                sure = mass_from_blocks(q[None], wide, lse[i : i + 1], dropped=every, scale=scale)[n][0]
                rooms[n, i] = abs(sure - end) + 2 * relative * max(sure, end)
    return rooms


def error_rooms(case: Stream, found: Certificate, room: Array) -> Array:
    """Return how far the rows' claims about the error may be off by rounding, given that of ρ̄."""
    o = rounding.allowance(softmax.attend, *case[:3], mask=case.kept, scale=case.options["scale"])
    high = (found.mass.high + room)[:, None]
    reach = np.divide(found.error, found.mass.high[:, None], out=np.zeros(o.shape), where=found.error > 0)
    return room[:, None] * reach * rounding.EVALUATION + high * o + slack(found.error, 3)


def judge_stream(tight: Tight, case: Stream, *cuts: int) -> Array:
    """Judge ρ's ends and every output, and return the ratios of each row: above, below, error."""
    found = case.certify(*cuts)
    rooms = mass_rooms(case, found.mass)
    allowed = error_rooms(case, found, rooms[1])
    sigma = 1 / arb(case.q.shape[1]).sqrt() if case.options["scale"] is None else arb(case.options["scale"])
    ratios = np.zeros((len(case.q), 3))
    for i, (near, far) in enumerate(zip(case.kept, case.gone, strict=True)):
        w = [(dot(exact(case.q[i]), exact(x)) * sigma).exp() for x in case.k]
        kept_mass, lost = (sum((x for x, s in zip(w, seen, strict=True) if s), arb(0)) for seen in (near, far))
        rho = number(lost / (kept_mass + lost))
        ratios[i, 0] = tight("M1", rho, found.mass.high[i], rooms[1, i] + gamma(1) * rho)
        ratios[i, 1] = tight("M1", found.mass.low[i], rho, rooms[0, i] + gamma(1) * rho)
        for c, column in enumerate(case.v.T):
            values = exact(column)
            own = sum((x * y for x, y, s in zip(w, values, near, strict=True) if s), arb(0)) / kept_mass
            whole = sum((x * y for x, y, s in zip(w, values, near | far, strict=True) if s), arb(0)) / (
                kept_mass + lost
            )
            error = number(abs(own - whole))
            ratio = tight("M1", error, found.error[i, c], allowed[i, c] + gamma(1) * error)
            ratios[i, 2] = max(ratios[i, 2], ratio)
    return ratios


@given(case=streams(), data=st.data())
def test_a_stream_encloses_what_it_forgot_and_bounds_its_error(tight: Tight, case: Stream, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(case.q)))
    target(float(judge_stream(tight, case, cut).max()))


@st.composite
def placed(draw: st.DrawFn, places: int) -> Stream:
    """Evicted keys in one place, or in two along one axis; values that mark what the last row has lost."""
    case = draw(streams())
    if places == 2:
        case = case._replace(q=case.q[:, :1], k=case.k[:, :1], blocks=draw(st.sampled_from([1, 2])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, k = (np.clip(x, -2, 2) for x in (case.q, case.k))
    k[:, :] = k[rng.integers(0, min(places, len(k)), len(k))]
    gone = case.gone[-1]
    assume(gone.any())
    k[~gone] = numbers(rng, k[~gone].shape, "normal")
    return case._replace(q=q, k=k, v=gone[:, None].astype(float))


@given(case=placed(1))
def test_keys_that_were_in_one_place_are_known_exactly(tight: Tight, case: Stream) -> None:
    assert (judge_stream(tight, case)[-1] > SHARP).all()


@given(case=placed(2))
def test_keys_that_were_in_two_places_along_one_axis_are_known_exactly(tight: Tight, case: Stream) -> None:
    assert (judge_stream(tight, case)[-1] > SHARP).all()


@given(case=streams())
def test_as_many_blocks_as_keys_are_the_keys(tight: Tight, case: Stream) -> None:
    gone = case.gone.any(axis=1)
    assert (judge_stream(tight, case._replace(blocks=len(case.k)))[gone, :2] > SHARP).all()


@settings(max_examples=40)
@given(case=streams(), data=st.data())
def test_any_split_leaves_the_same_state_which_holds_what_later_rows_see(case: Stream, data: st.DataObject) -> None:
    options = {s: x for s, x in case.options.items() if s != "scale"}
    for i, state in enumerate(case._replace(blocks=segments.BLOCKS).states()):
        later = kept(1, i + 1, *options.values())[0, :i]  # what the row at i sees of the past
        assert state.position == i
        assert (state.k == case.k[:i][later]).all() and (state.v == case.v[:i][later]).all()
        cuts = sorted(data.draw(st.lists(st.integers(0, i), max_size=2)))
        other: State | None = None
        for a, b in zip((0, *cuts), (*cuts, i), strict=True):
            _, other = segments.step(other, *(x[a:b] for x in case[:3]), **case.options)
        assert other is not None
        for a, b in zip((*state[1:3], *state.evicted), (*other[1:3], *other.evicted), strict=True):
            assert np.array_equal(a, b)
        gone = case.v[:i][~later]
        assert (state.low == gone.min(axis=0, initial=np.inf)).all()
        assert (state.high == gone.max(axis=0, initial=-np.inf)).all()
        assert (other.low == state.low).all() and (other.high == state.high).all()


def test_a_state_does_not_grow() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 200, 4))
    sizes = []
    for n in (100, 200):
        state = segments.step(None, q[:n], k[:n], v[:n], memory=5, sinks=2)[1]
        sizes.append([x.shape for x in (*state[1:3], *state.evicted, state.low, state.high)])
    assert sizes[0] == sizes[1] and sizes[0][0] == (7, 4)


def test_heads_and_batches_are_certified_each_with_its_own_keys_and_values() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-64, 65, (*lead, 9, 2)) / 64 for lead in ((2, 4), (2, 2), (1, 2)))
    options: dict[str, Any] = {"length": 2, "memory": 2, "sinks": 1, "blocks": 2}
    whole, state = segments.certify(None, q, k, v, **options)
    assert state.evicted.count.shape == (2, 2, 2) and whole.error.shape == (2, 4, 9, 2)
    for b, h in np.ndindex(2, 4):
        one, own = segments.certify(None, q[b, h], k[b, h // 2], v[0, h // 2], **options)
        room = rounding.allowance(softmax.attend, q[b, h], k[b, h // 2], v[0, h // 2], mask=kept(9, 9, 2, 2, 1))
        assert_within(whole.o[b, h], one.o, 2 * room)
        assert all(np.array_equal(x[b, h // 2], y) for x, y in zip(state.evicted, own.evicted, strict=True))
        assert (state.high[0, h // 2] == own.high).all()
        case = Stream(q[b, h], k[b, h // 2], v[0, h // 2], {**options, "scale": None}, 2)
        del case.options["blocks"]
        rooms = mass_rooms(case, one.mass)
        for n, end in enumerate(one.mass):
            assert_within(whole.mass[n][b, h], end, 2 * rooms[n])
        assert_within(whole.error[b, h], one.error, 2 * error_rooms(case, one, rooms[1]))


@pytest.mark.parametrize("head", range(4))
def test_on_a_real_model_the_certificate_holds_in_every_row(tight: Tight, head: int) -> None:
    """A window of 32 and four sinks over the sample of a released model, made causal."""
    arrays = np.load(Path(refattn.study.__file__).parent / "sample.npz")
    q, k, v = (arrays[s].reshape(4, -1, 32)[head, :128].astype(float) for s in "qkv")
    case = Stream(q, k, v[:, :2], {"length": 1, "memory": 32, "sinks": 4, "scale": None}, segments.BLOCKS)
    found = case.certify()
    rho = dropped.mass(q, k, kept=case.kept, mask=masks.causal())
    rooms, off = mass_rooms(case, found.mass), mass_relative(q, k, case.kept, case.gone) * rho
    tight("M1", rho, found.mass.high, rooms[1] + off)
    tight("M1", found.mass.low, rho, rooms[0] + off)
    error = np.abs(found.o - segments.exact(q, k, v[:, :2]))
    room = error_rooms(case, found, rooms[1]) + rounding.allowance(segments.exact, q, k, v[:, :2])
    room = room + rounding.allowance(segments.attend, q, k, v[:, :2], memory=32, sinks=4) + gamma(1) * error
    tight("M1", error, found.error, room)
