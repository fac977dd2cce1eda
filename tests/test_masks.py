"""Masks: the predicate, the runs and the counts say what the definitions say, pair by pair, in plain Python."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn import masks

ALL = slice(None)
LEADS: list[tuple[int, ...]] = [(), (), (2,), (2, 3), (1, 2), (0,)]


class Rule(NamedTuple):
    """A mask beside its definition: sees(n, i, p, j) for problem n (an index into the whole lead)."""

    mask: masks.Mask
    sees: Callable[[tuple[int, ...], int, int, int], bool]
    lead: tuple[int, ...]


def read(x: np.ndarray, tail: int, n: tuple[int, ...]) -> Any:
    """What problem n reads of an array whose leading axes broadcast."""
    shape = x.shape[: x.ndim - tail]
    n = n[len(n) - len(shape) :]
    return x[tuple(0 if size == 1 else at for size, at in zip(shape, n, strict=True))].tolist()


@st.composite
def numbers(draw: st.DrawFn, lead: tuple[int, ...], tail: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Integers whose leading axes broadcast to `lead`."""
    own = lead[draw(st.integers(0, len(lead))) :]
    own = tuple(draw(st.sampled_from((1, size))) for size in own)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(low, high, (*own, *tail))


@st.composite
def leaves(draw: st.DrawFn, T: int, S: int, lead: tuple[int, ...]) -> Rule:
    small, size = st.integers(0, 4), st.integers(1, 5)
    side = st.one_of(st.none(), small)
    kind = draw(st.sampled_from(masks_by_name))
    if kind == "causal":
        return Rule(masks.causal(), lambda n, i, p, j: j <= p, ())
    if kind == "window":
        a, b = draw(side), draw(side)
        return Rule(masks.window(a, b), lambda n, i, p, j: (a is None or p - a <= j) and (b is None or j <= p + b), ())
    if kind == "dilated":
        a, b, c = draw(small), draw(small), draw(size)
        return Rule(masks.dilated(a, b, c), lambda n, i, p, j: j in [p + c * t for t in range(-a, b + 1)], ())
    if kind == "segments":
        x, y = draw(numbers(lead, (T,), 0, 3)), draw(numbers(lead, (S,), 0, 3))
        joined = np.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        return Rule(masks.segments(x, y), lambda n, i, p, j: read(x, 1, n)[i] == read(y, 1, n)[j], joined)
    if kind == "lengths":
        x, y = draw(numbers(lead, (), 0, S + 2)), draw(st.one_of(st.none(), numbers(lead, (), 0, T + 2)))
        joined = x.shape if y is None else np.broadcast_shapes(x.shape, y.shape)
        return Rule(
            masks.lengths(x, y), lambda n, i, p, j: j < read(x, 0, n) and (y is None or i < read(y, 0, n)), joined
        )
    if kind == "prefix":
        a = draw(st.integers(0, S + 2))
        return Rule(masks.prefix(a), lambda n, i, p, j: j < a, ())
    if kind == "block_local":
        a = draw(size)
        return Rule(masks.block_local(a), lambda n, i, p, j: p // a == j // a, ())
    if kind == "segmented":
        a, b = draw(size), draw(small)
        return Rule(masks.segmented(a, b), lambda n, i, p, j: j <= p and (j // a == p // a or j >= p - p % a - b), ())
    if kind == "strided":
        a = draw(size)
        return Rule(masks.strided(a), lambda n, i, p, j: (p - j) % a == 0, ())
    if kind == "fixed":
        a = draw(size)
        b = draw(st.integers(0, a))
        return Rule(masks.fixed(a, b), lambda n, i, p, j: p // a == j // a or j % a >= a - b, ())
    if kind == "global_tokens":
        x = draw(numbers(lead, (draw(st.integers(0, 3)) if S else 0,), 0, max(S, 1)))
        return Rule(masks.global_tokens(x), lambda n, i, p, j: j in read(x, 1, n) or p in read(x, 1, n), x.shape[:-1])
    if kind == "random_blocks":
        # Positions outside the table are refused, so this one is placed here, and the inner placement stands.
        a, start = draw(size), draw(st.integers(0, 4))
        shape = ((start + T) // a + 1, draw(st.integers(0, 3)) if S else 0)
        x = draw(numbers(lead, shape, 0, max(1, -(-S // a))))
        return Rule(
            masks.random_blocks(x, a).at(start),
            lambda n, i, p, j: j // a in read(x, 2, n)[(start + i) // a],
            x.shape[:-2],
        )
    x = draw(numbers(lead, (draw(st.sampled_from((1, T))), draw(st.sampled_from((1, S)))), 0, 2)).astype(bool)

    def sees(n: tuple[int, ...], i: int, p: int, j: int) -> bool:
        row = read(x, 2, n)[0 if x.shape[-2] == 1 else i]
        return row[0 if x.shape[-1] == 1 else j]

    return Rule(masks.dense(x), sees, x.shape[:-2])


masks_by_name = [
    "causal", "window", "dilated", "segments", "lengths", "prefix", "block_local", "segmented", "strided", "fixed",
    "global_tokens", "random_blocks", "dense",
]  # fmt: skip


@st.composite
def rules(draw: st.DrawFn, T: int, S: int, lead: tuple[int, ...], depth: int) -> Rule:
    """An expression tree."""
    how = draw(st.sampled_from(("leaf", "&", "|", "~", "at", "at each"))) if depth else "leaf"
    if how == "leaf":
        return draw(leaves(T, S, lead))
    a = draw(rules(T, S, lead, depth - 1))
    if how == "~":
        return Rule(~a.mask, lambda n, i, p, j: not a.sees(n, i, p, j), a.lead)
    if how == "at":
        start = draw(st.integers(-4, 5))
        return Rule(a.mask.at(start), lambda n, i, p, j: a.sees(n, i, start + i, j), a.lead)
    if how == "at each":
        x = draw(numbers(lead, (T,), -3, S + 3))
        joined = np.broadcast_shapes(a.lead, x.shape[:-1])
        return Rule(a.mask.at(x), lambda n, i, p, j: a.sees(n, i, read(x, 1, n)[i], j), joined)
    b = draw(rules(T, S, lead, depth - 1))
    joined = np.broadcast_shapes(a.lead, b.lead)
    if how == "&":
        return Rule(a.mask & b.mask, lambda n, i, p, j: a.sees(n, i, p, j) and b.sees(n, i, p, j), joined)
    return Rule(a.mask | b.mask, lambda n, i, p, j: a.sees(n, i, p, j) or b.sees(n, i, p, j), joined)


class Problem(NamedTuple):
    rule: Rule
    T: int
    S: int

    def expected(self, n: tuple[int, ...]) -> np.ndarray:
        rows = [[self.rule.sees(n, i, i + self.S - self.T, j) for j in range(self.S)] for i in range(self.T)]
        return np.array(rows, bool).reshape(self.T, self.S)


@st.composite
def problems(draw: st.DrawFn, depth: int = 3) -> Problem:
    T, S = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return Problem(draw(rules(T, S, draw(st.sampled_from(LEADS)), depth)), T, S)


def painted(runs: masks.Runs, S: int) -> np.ndarray:
    """The pairs of some runs, having judged that they are in their one canonical form."""
    assert {x.dtype for x in runs} == {np.dtype(np.int64)}
    assert runs.indptr[0] == 0 and runs.indptr[-1] == len(runs.start) == len(runs.stop)
    out = np.zeros((len(runs.indptr) - 1, S), bool)
    for i, (first, last) in enumerate(zip(runs.indptr[:-1], runs.indptr[1:], strict=True)):
        reach = -1
        for start, stop in zip(runs.start[first:last], runs.stop[first:last], strict=True):
            assert reach < start < stop <= S
            out[i, start:stop], reach = True, stop
    return out


def same(a: masks.Runs, b: masks.Runs) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@given(problems())
@settings(max_examples=400)
def test_the_definition_the_predicate_the_runs_and_the_count_are_one(problem: Problem) -> None:
    pairs = problem.rule.mask.on(problem.T, problem.S)
    assert (pairs.T, pairs.S, pairs.lead) == (problem.T, problem.S, problem.rule.lead)
    counts = np.zeros(pairs.lead, np.int64)
    for flat, n in enumerate(np.ndindex(pairs.lead)):
        one, expected = pairs.take(flat), problem.expected(n)
        seen = one.seen(ALL, ALL)
        assert one.lead == () and seen.dtype == bool
        assert np.array_equal(seen, expected)
        assert np.array_equal(painted(one.runs(ALL), problem.S), expected)
        assert isinstance(one.count, int) and one.count == expected.sum()
        counts[n] = expected.sum()
    assert np.array_equal(pairs.count, counts)


@pytest.mark.parametrize("name", masks_by_name)
def test_every_constructor_is_what_it_is_defined_to_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "masks_by_name", [name])

    @given(problems(depth=0))
    @settings(max_examples=60)
    def check(problem: Problem) -> None:
        pairs = problem.rule.mask.on(problem.T, problem.S)
        for flat, n in enumerate(np.ndindex(pairs.lead)):
            expected = problem.expected(n)
            assert np.array_equal(pairs.take(flat).seen(ALL, ALL), expected)
            assert np.array_equal(painted(pairs.take(flat).runs(ALL), problem.S), expected)

    check()


def test_every_constructor_is_drawn() -> None:
    made = set(masks_by_name) | {"draw_blocks", "bind"}
    public = {name for name, x in vars(masks).items() if callable(x) and x.__module__ == masks.__name__}
    assert public >= made and set(masks.__all__) == made | {"Mask", "Pairs", "Runs"}


@given(problems(), st.data())
def test_any_rows_in_any_order_are_those_rows_of_the_whole(problem: Problem, data: st.DataObject) -> None:
    pairs = problem.rule.mask.on(problem.T, problem.S)
    if 0 in pairs.lead:
        return
    one = pairs.take(0)
    whole = one.seen(ALL, ALL)
    edge = st.integers(-12, 12)
    for rows in (
        slice(data.draw(edge), data.draw(edge), data.draw(st.sampled_from((None, 1, 2, -1)))),
        np.array(data.draw(st.lists(st.integers(0, problem.T - 1), max_size=5)) if problem.T else [], int),
    ):
        assert np.array_equal(painted(one.runs(rows), problem.S), whole[rows])
        keys = np.array(data.draw(st.lists(st.integers(0, problem.S - 1), max_size=5)) if problem.S else [], int)
        assert np.array_equal(one.seen(rows, keys), whole[rows][:, keys])


@given(problems())
def test_the_order_of_visits_has_every_row_once(problem: Problem) -> None:
    pairs = problem.rule.mask.on(problem.T, problem.S)
    for n in range(math.prod(pairs.lead)):
        assert sorted(pairs.take(n).order()) == list(range(problem.T))


def test_rows_that_are_visited_together_share_their_keys() -> None:
    """Tiles of 64 rows of a strided mask touch few keys beside those that a row sees: √n of each, not all n."""
    n, step = 4096, 64
    for mask, most in (
        (masks.strided(step), 8 * n // step),
        (masks.strided(step) | masks.window(step - 1, 0), 16 * (n // step + step)),
    ):
        pairs = (mask & masks.causal()).on(n, n)
        order = pairs.order()
        for first in range(0, n, 64):
            assert pairs.seen(order[first : first + 64], slice(None)).any(axis=0).sum() <= most


@given(problems(depth=2), problems(depth=2))
def test_the_laws_of_sets_hold_run_by_run(first: Problem, second: Problem) -> None:
    T, S = first.T, first.S
    a = first.rule.mask
    try:
        b = second.rule.mask
        (a | b).on(T, S)
    except ValueError:
        b = masks.window(1, 1)
    none, every = masks.prefix(0), masks.prefix(S)
    for left, right in (
        (~(a & b), ~a | ~b), (~(a | b), ~a & ~b), (~~a, a), (a & a, a), (a | a, a), (a & ~a, none & a),
        (a | ~a, every | a), (a & b, b & a), (a | b, b | a), (a & (a | b), a & (b | ~b)),
    ):  # fmt: skip
        x, y = left.on(T, S), right.on(T, S)
        assert x.lead == y.lead
        assert all(same(x.take(n).runs(ALL), y.take(n).runs(ALL)) for n in range(int(np.prod(x.lead))))


@settings(deadline=None)
@given(problems(), st.data())
def test_picked_rows_are_those_rows_of_the_whole(problem: Problem, data: st.DataObject) -> None:
    some = data.draw(st.lists(st.integers(0, problem.T - 1), max_size=6)) if problem.T else []
    whole = problem.rule.mask.on(problem.T, problem.S)
    picked = whole.pick(some)
    again = (picked.mask & masks.window(None, None)).on(len(some), problem.S)
    for n in range(math.prod(picked.lead)):
        seen = whole.take(n).seen(some, ALL)
        for one in (picked, again):
            assert np.array_equal(one.take(n).seen(ALL, ALL), seen)
            assert same(one.take(n).runs(ALL), whole.take(n).runs(some))


def test_a_pattern_stands_where_its_mask_placed_the_rows() -> None:
    near = masks.window(1, 1)
    whole = near.on(9, 9)
    picked = masks.meet(masks.causal().on(9, 9).pick([2, 7]), near).on(2, 9)
    assert np.array_equal(picked.seen(ALL, ALL), (whole.seen(ALL, ALL) & np.tri(9, dtype=bool))[[2, 7]])
    twice = masks.causal().at([2, 5, 7]).on(3, 9).pick([0, 2])
    assert np.array_equal(masks.meet(twice, near).on(2, 9).seen(ALL, ALL), picked.seen(ALL, ALL))
    half = masks.causal().at(0) & masks.window(3, 0)  # one part alone is placed: that places nothing beside it
    assert half.position is None and (~masks.causal().at([1])).position is not None


@given(st.integers(0, 9), st.integers(0, 9))
def test_rows_stand_bottom_right_unless_they_are_placed(T: int, S: int) -> None:
    rule = masks.window(2, 1)
    default = rule.on(T, S).seen(ALL, ALL)
    assert np.array_equal(default, rule.at(S - T).on(T, S).seen(ALL, ALL))
    assert np.array_equal(default, rule.at(np.arange(T) + S - T).on(T, S).seen(ALL, ALL))
    assert np.array_equal(masks.causal().on(T, S).seen(ALL, ALL), np.tri(T, S, S - T, dtype=bool))
    assert np.array_equal(masks.causal().at(0).on(T, S).seen(ALL, ALL), np.tri(T, S, dtype=bool))


def test_an_inner_placement_wins_and_the_outer_one_places_the_rest() -> None:
    both = (masks.causal().at(0) | masks.window(0, 0)).at(2).on(3, 5)
    each = (masks.causal().at(0) | masks.window(0, 0).at(2)).on(3, 5)
    assert same(both.runs(ALL), each.runs(ALL))


def test_packed_sequences_are_positions_and_segments() -> None:
    # Two sequences with 2 and 3 rows over 3 and 4 keys, each causal bottom-right on its own keys.
    packed = masks.causal().at([1, 2, 4, 5, 6]) & masks.segments([0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1])
    expected = np.zeros((5, 7), bool)
    expected[:2, :3], expected[2:, 3:] = np.tri(2, 3, 1), np.tri(3, 4, 1)
    assert np.array_equal(packed.on(5, 7).seen(ALL, ALL), expected)


def test_the_windows_edge_is_where_it_is_said_to_be() -> None:
    runs = masks.window(2, 1).on(6, 6).runs(ALL)
    assert runs.start.tolist() == [0, 0, 0, 1, 2, 3]
    assert runs.stop.tolist() == [2, 3, 4, 5, 6, 6]
    assert masks.window(0, 0).on(4, 4).count == 4


def test_a_long_mask_answers_for_a_few_rows_without_its_pairs() -> None:
    n = 2**20
    rng = np.random.default_rng(0)
    long = [
        masks.causal() & masks.window(256, 0),
        masks.window(128, 128) | masks.global_tokens(range(0, 128, 2)),
        ~masks.causal(),
        masks.dilated(n, n, 4096) & masks.causal(),
        masks.strided(4096),
        masks.fixed(4096, 1),
        masks.segments(np.arange(n) // 100, np.arange(n) // 100),
        masks.random_blocks(rng.integers(0, n // 64, (n // 64, 8)), 64),
    ]
    tracemalloc.start()
    try:
        for mask in long:
            pairs = mask.on(n, n)
            runs = pairs.runs(slice(n // 2, n // 2 + 3))
            keys = np.arange(n // 2 - 5000, n // 2 + 5000)
            seen = pairs.seen(np.arange(n // 2, n // 2 + 3), keys)
            for i, row in enumerate(seen):
                own = slice(runs.indptr[i], runs.indptr[i + 1])
                inside = (runs.start[own] <= keys[:, None]) & (keys[:, None] < runs.stop[own])
                assert np.array_equal(inside.any(1), row)
        assert tracemalloc.get_traced_memory()[1] < 400 * n
    finally:
        tracemalloc.stop()
    assert masks.causal().on(n, n).count == n * (n + 1) // 2


@pytest.mark.parametrize(("T", "S"), [(1, 2**60), (3, 2**60), (4, 2**60 - 1), (64, 2**56 - 1)])
def test_the_longest_axes_do_not_overflow(T: int, S: int) -> None:
    assert masks.causal().on(T, S).count == T * S - T * (T - 1) // 2
    assert masks.window(1, 0).on(T, S).count == 2 * T
    assert (masks.causal() & ~masks.window(1, 0)).on(T, S).count == T * (S - 2) - T * (T - 1) // 2
    runs = (masks.causal() & masks.window(1, 0)).on(T, S).runs(ALL)
    assert runs.indptr.tolist() == list(range(T + 1))
    assert runs.start.tolist() == [S - T + i - 1 for i in range(T)]
    assert runs.stop.tolist() == [S - T + i + 1 for i in range(T)]


def test_dilation_and_dense_arrays_are_read_in_blocks_of_rows() -> None:
    n = 8192
    for mask in (masks.dilated(n, n, n // 4), masks.dense(np.eye(n, dtype=bool))):
        pairs = mask.on(n, n)
        tracemalloc.start()
        try:
            pairs.runs(ALL)
            assert tracemalloc.get_traced_memory()[1] < n * n // 2
        finally:
            tracemalloc.stop()


def test_drawn_blocks_are_different_within_a_row_and_the_same_for_the_same_seed() -> None:
    table = masks.draw_blocks(np.random.default_rng(3), 50, 7, 4)
    assert table.shape == (50, 4) and table.dtype == np.int64
    assert all(len(set(row)) == 4 and set(row) <= set(range(7)) for row in table.tolist())
    assert set(table.ravel().tolist()) == set(range(7))
    assert np.array_equal(table, masks.draw_blocks(np.random.default_rng(3), 50, 7, 4))
    assert masks.draw_blocks(np.random.default_rng(0), 0, 0, 0).shape == (0, 0)


def test_a_mask_keeps_its_own_copy_of_small_arrays() -> None:
    ids = np.array([0, 0, 1])
    mask = masks.segments(ids, ids)
    ids[:] = [0, 1, 2]
    assert mask.on(3, 3).count == 5


def test_what_is_seen_is_the_callers_own_to_write() -> None:
    seen = masks.prefix(1).on(2, 2).seen(ALL, ALL)
    seen[:] = False
    assert masks.prefix(1).on(2, 2).count == 2


def test_arrays_and_masks_do_not_mix() -> None:
    array = np.ones((2, 2), bool)
    for mix in (
        lambda: array & masks.causal(), lambda: masks.causal() & array, lambda: array | masks.causal(),
        lambda: masks.causal() | True, lambda: np.logical_and(array, masks.causal()), lambda: np.invert(masks.causal()),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            mix()
    with pytest.raises(TypeError, match="combine with & | ~"):
        assert masks.causal() and masks.window(1, 0)


def test_a_mask_says_what_it_is() -> None:
    mask = ~(masks.causal() & masks.window(2, None)).at(0) | masks.lengths([3, 5])
    assert repr(mask) == "(~(causal() & window(2, None)).at(0) | lengths([3, 5]))"
    assert repr(masks.segments(np.zeros((2, 9), int), np.zeros(4, int))) == "segments(array (2, 9), [0, 0, 0, 0])"
    assert repr(masks.strided(4).on(2, 3)) == "Pairs(strided(4), T=2, S=3)"
    assert repr(masks.lengths([3, 5]).on(6, 6).take(1)) == "Pairs(lengths(5), T=6, S=6)"
    assert str(masks.causal().on(2, 3)) == "xx.\nxxx"


def test_binding_takes_what_a_mask_argument_may_be() -> None:
    pairs = masks.causal().on(2, 3)
    assert masks.bind(None, 2, 3) is None
    assert masks.bind(pairs, 2, 3) is pairs
    for given_as in (masks.causal(), [[True, True, False], [True, True, True]], np.tri(2, 3, 1, dtype=bool)):
        bound = masks.bind(given_as, 2, 3)
        assert bound is not None and same(bound.runs(ALL), pairs.runs(ALL))
    bound = masks.bind(np.ones((4, 1, 1, 3), bool), 2, 3)
    assert bound is not None and bound.lead == (4, 1) and bound.count.tolist() == [[6]] * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: masks.window(-1, 0), "left is -1"),
        (lambda: masks.window(0, -2), "right is -2"),
        (lambda: masks.window(2**70, 0), "left is 1180591620717411303424; expected at most"),
        (lambda: masks.dilated(1, 1, 0), "step is 0"),
        (lambda: masks.dilated(-1, 1, 1), "left is -1"),
        (lambda: masks.prefix(-1), "length .*-1"),
        (lambda: masks.lengths([2, -1]), "keys holds -1"),
        (lambda: masks.lengths([1, 2], [1, 2, 3]), r"lengths.*\(2,\).*\(3,\)"),
        (lambda: masks.lengths(np.array([2**63], np.uint64)), "keys holds 9223372036854775808"),
        (lambda: masks.block_local(0), "size is 0"),
        (lambda: masks.segmented(0, 1), "length is 0"),
        (lambda: masks.segmented(1, -1), "memory is -1"),
        (lambda: masks.strided(0), "length is 0"),
        (lambda: masks.fixed(0, 0), "length is 0"),
        (lambda: masks.fixed(4, 5), "columns is 5; expected at most length = 4"),
        (lambda: masks.global_tokens([-1]), "tokens holds -1"),
        (lambda: masks.global_tokens(3), "tokens has shape"),
        (lambda: masks.global_tokens([3]).on(3, 3), "mask: .*token.* 3.* S = 3"),
        (lambda: masks.segments(0, [0]), "queries has shape"),
        (lambda: masks.segments([[0], [0]], [[0], [0], [0]]), r"segments.*\(2,\).*\(3,\)"),
        (lambda: masks.segments([0] * 5, [0] * 7).on(7, 7), "mask: segments has 5 query ids, but T = 7"),
        (lambda: masks.segments([0] * 7, [0] * 5).on(7, 7), "mask: segments has 5 key ids, but S = 7"),
        (lambda: masks.segments([[0], [0, 1]], [0]), "queries is ragged"),
        (lambda: masks.causal().at([0, 1]).on(3, 3), "mask: position has 2 rows, but T = 3"),
        (lambda: masks.causal().at([[0], [0, 1]]), "position is ragged"),
        (lambda: masks.causal().at(2**61), "position"),
        (lambda: masks.causal().on(64, 2**60), f"T makes 64 rows; expected at most 3 with S = {2**60} keys"),
        (lambda: masks.window(1, 0).on(64, 2**58), "T makes 64 rows; expected at most 15"),
        (lambda: masks.causal().on(64, 2**56), "T makes 64 rows; expected at most 63"),
        (lambda: masks.causal().on(1, 2**60).runs([0] * 4), "rows makes 4 rows; expected at most 3"),
        (lambda: masks.random_blocks([0], 1), "table has shape"),
        (lambda: masks.random_blocks([[-1]], 1), "table holds -1"),
        (lambda: masks.random_blocks([[0]], 2).on(3, 3), "mask: random_blocks has 1 .*positions reach from 0 to 2"),
        (lambda: masks.random_blocks([[0]], 2).on(2, 1), "mask: random_blocks has 1 .*positions reach from -1 to 0"),
        (lambda: masks.random_blocks([[0]], 2).at([0, 2]).on(2, 2), "positions reach from 0 to 2"),
        (lambda: masks.random_blocks([[0], [2]], 2).on(2, 4), "mask: random_blocks lists key block 2, but S = 4"),
        (lambda: masks.draw_blocks(np.random.default_rng(0), 1, 2, 3), "per_row is 3"),
        (lambda: masks.dense([True]), "mask has shape"),
        (lambda: masks.dense([[True], [True, False]]), "mask is ragged"),
        (lambda: masks.bind(True, 2, 2), "mask has shape"),
        (lambda: masks.bind(np.ones((2, 3), bool), 3, 3), r"mask has shape \(2, 3\); .*\(\.\.\., 3, 3\)"),
        (lambda: masks.bind(masks.causal().on(2, 3), 3, 3), "mask is bound to T = 2, S = 3; expected T = 3, S = 3"),
        (lambda: masks.lengths([1, 2]) & masks.lengths([1, 2, 3]), r"mask joins .*\(2,\).*\(3,\)"),
        (lambda: masks.lengths([1, 2]).at(np.zeros((3, 2), int)), r"position.*\(3,\).*\(2,\)"),
        (lambda: masks.causal().on(-1, 2), "T is -1"),
        (lambda: masks.lengths([1, 2]).on(2, 2).runs(ALL), r"mask has leading axes \(2,\)"),
        (lambda: masks.lengths([1, 2]).on(2, 2).seen(ALL, ALL), r"mask has leading axes \(2,\)"),
        (lambda: masks.lengths([1, 2]).on(2, 2).take(2), "n is 2"),
        (lambda: masks.causal().on(2, 2).take(1), "n is 1"),
        (lambda: masks.causal().on(2, 2).runs([2]), "rows reach from 2 to 2"),
        (lambda: masks.causal().on(2, 2).seen([0], [-1]), "keys reach from -1 to -1"),
        (lambda: masks.causal().on(2, 2).runs([[0]]), "rows has shape"),
        (lambda: masks.causal().on(2, 2).pick([2]), "rows reach from 2 to 2"),
        (lambda: masks.causal().on(2, 2).pick([1]).mask.on(2, 2), "mask: 1 rows are picked for S = 2, but T = 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: masks.window(1.0, 0), "left is 1.0"),
        (lambda: masks.window(True, 0), "left is True"),
        (lambda: masks.segmented(1, 2.0), "memory is 2.0"),
        (lambda: masks.segments([0.0], [0]), "queries has dtype float64"),
        (lambda: masks.segments([0], [True]), "keys has dtype bool"),
        (lambda: masks.global_tokens([0.5]), "tokens has dtype float64"),
        (lambda: masks.causal().at(True), "position has dtype bool"),
        (lambda: masks.causal().at(0.0), "position has dtype float64"),
        (lambda: masks.bind(np.zeros((2, 2)), 2, 2), "mask has dtype float64; expected bool.*bias"),
        (lambda: masks.bind("causal", 2, 2), "mask has dtype"),
        (lambda: masks.causal().on(2, 2).runs(np.array([True, False])), "rows has dtype bool"),
        (lambda: masks.draw_blocks(0, 1, 2, 1), "rng is 0"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        wrong()
