r"""Memformer's memory: how far forgetting parts it, where it settles, how far a write moves it, and its gradients.

Notation     f(m) = (m + b)/‖m + b‖ forgets, r = ‖b‖ > 0; θ is the angle of m to b, θ' that of f(m), α = π − θ,
             α' = π − θ'.
             A write of one slot: y₀ = m, y_j = v_j, s₀ = (σ/τ) mW_q·mW_k, s_j = (σ/τ) mW_q·k_j, p = softmax(s),
             m' = Σp_jy_j; g_j = ∇_m s_j, that is g₀ = (σ/τ)(W_qW_kᵀ + W_kW_qᵀ)m and g_j = (σ/τ)W_qk_j.
Hypotheses   Hfin: finite inputs · Hsum: m + b ≠ 0 where f is named (else 0/0, which is refused).
Loose        nowhere.

M5  Statement    (a) ‖f(m) − f(n)‖ ≤ 2‖m − n‖/(‖m + b‖ + ‖n + b‖).
                 (b) ‖m‖ = 1: cos θ' = (cos θ + r)/‖m + b‖, sin θ' = sin θ/‖m + b‖. So θ' < θ for 0 < θ < π;
                     tan θ' ≤ tan θ/(1 + r) in front (cos θ > 0), and behind, where cos α > r, tan α' ≥ tan α/(1 − r).
                     Without writes every m but −b/r comes to b/r; −b/r stays for r < 1, goes to b/r at once for r > 1,
                     and is 0/0 for r = 1.
                 (c) ‖m'‖ ≤ max(‖m‖, max‖v_j‖).
                 (d) ‖∂m'/∂m‖₂ ≤ p₀ + ¼ diam(y) diam(g), and ∂m'/∂n = 0 for any other slot n.
                 (e) Gradients by replay are those of plain backpropagation, bitwise where the replay is.
                 (f) Keys and values of a row's own segment, and of later ones, do not matter to it.
    Derivation   1  (a) x = m + b, y = n + b, c the cosine of their angle, distance of directions √(2 − 2c):
                    4‖x − y‖² − (‖x‖ + ‖y‖)²(2 − 2c) = 2(‖x‖ − ‖y‖)²(1 + c) ≥ 0 (Dunkl and Williams).
                 2  (b) m + b lies in the plane of m and b, sin θ across b and cos θ + r along it. Then
                    sin(θ − θ') = r sin θ/‖m + b‖ > 0. In front tan θ' = tan θ · cos θ/(cos θ + r), cos θ ≤ 1; behind,
                    tan α' = tan α · cos α/(cos α − r). So behind tan α grows by 1/(1 − r) a step until cos α ≤ r, and
                    the step after that leads to the front: from α > 0 in a finite number of steps; then tan θ falls
                    by 1/(1 + r) a step. For m = −b/r the sum is (1 − 1/r)b.
                 3  (c) m' is a mean. (d) ∂m'/∂m = p₀I + Σp_j y_j(g_j − Σp_lg_l)ᵀ, the second a covariance; for unit
                    u, w it is Cov(u·y, w·g) ≤ sd(u·y) sd(w·g) ≤ ½ diam(y) · ½ diam(g) (Popoviciu). A slot sees no
                    other slot.
                 4  (e) Both evaluate the same chain rule from the same memories. (f) by construction.
    Equality     (a) lengths that agree, or opposite directions. (b) θ → 0, α → 0. (c) one value throughout.
                 (d) g constant; or two points of equal weight, with y₀ − y₁ and g₀ − g₁ along one direction.

What `draw` makes has ‖b‖ ≥ 2R, R = max(1, max‖v_j‖): by (c) a write is at most R long, ‖m' + b‖ ≥ R, and by (a)
forgetting is never 0/0 and never parts two memories further: 2/(R + R) ≤ 1.

Numbers are drawn, judged and charged for rounding as `proofs/exact.py` says.
"""

import math

import numpy as np
import pytest
from flint import arb
from hypothesis import assume, given, target
from hypothesis import strategies as st

from proofs.exact import SHARP, Array, Tight, dot, exact, grid, highest, norm, number, row, slack
from proofs.memory import unrolled
from refattn import rounding
from refattn.memory import _slots, memformer
from refattn.testing import Ball, assert_within
from refattn.testing.strategies import Case, cases

Vector = list[arb]


@st.composite
def problems(draw: st.DrawFn, most: int = 7, square: bool = False) -> Case:
    """Draw from the declared domain, with slots that ask for other keys than their own."""
    case = draw(cases(memformer, most=most, least=1, square=square))
    return case.given(w_query=case.arrays["w_query"][:, ::-1] / 2)


def judge(tight: Tight, error: arb, bound: arb) -> float:
    """Judge M5 with numbers that are known to 200 bits."""
    most = float(bound.upper())
    return tight("M5", number(error), most, slack(most, 1))


def forgets(m: Vector, b: Vector) -> Vector:
    """Forget, in ball arithmetic."""
    return list(memformer.forget(Ball(np.array([m], object)), Ball(np.array([b], object))).cells[0])


def plus(x: Vector, y: Vector, times: arb | int = 1) -> Vector:
    """Return x + times·y."""
    return [a + times * c for a, c in zip(x, y, strict=True)]


def over(x: Vector, size: arb) -> Vector:
    return [a / size for a in x]


# --- the map ----------------------------------------------------------------------------------------------------------


def by_definition(case: Case) -> Ball:
    """Return the output by the formulas, slot by slot and row by row, in ball arithmetic."""
    q, k, v, w_query, w_key, w_value, b = (Ball.lift(x).cells for x in case.arrays.values())
    (T, S), (L, tau) = (len(q), len(k)), (case.options["segment"], arb(case.options.get("temperature", 1.0)))
    scale = case.options["scale"]
    sigma = 1 / arb(q.shape[1]).sqrt() if scale is None else arb(scale)

    def mean(logits: Vector, values: list[Vector]) -> Vector:
        w = [s.exp() for s in logits]
        return over([dot(w, list(column)) for column in zip(*values, strict=True)], sum(w, arb(0)))

    def times(x: Vector, w: Array) -> Vector:
        return [dot(x, list(column)) for column in w.T]

    memory = [over(list(x), norm(list(x))) for x in b]
    through = [memory]
    for start in range(0, S, L):
        keys, values = [[list(y) for y in x[start : start + L]] for x in (k, v)]
        memory = through[-1]
        if len(keys) == L:
            written = []
            for m in memory:
                asked = times(m, w_query)
                logits = [sigma / tau * dot(asked, key) for key in (times(m, w_key), *keys)]
                written.append(mean(logits, [m, *values]))
            sums = [plus(m, list(x)) for m, x in zip(written, b, strict=True)]
            through.append([over(x, norm(x)) for x in sums])
    out = np.empty((T, v.shape[1]), object)
    for i in range(T):
        memory = through[max(0, i + S - T) // L]
        out[i] = mean([sigma * dot(list(q[i]), times(m, w_key)) for m in memory], [times(m, w_value) for m in memory])
    return Ball(out)


@given(case=problems())
def test_attend_is_the_papers_formulas(case: Case) -> None:
    arrays, options = case.arguments()
    assert_within(case.attend(), by_definition(case), rounding.allowance(memformer.attend, *arrays, **options))


@given(case=problems())
def test_attend_is_its_three_maps(case: Case) -> None:
    """In float64, bit for bit: what `read`, `write` and `forget` say is what `attend` does."""
    q, k, v, w_query, w_key, w_value, b = case.arrays.values()
    L, scale, T, S = case.options["segment"], case.options["scale"], case.sizes["T"], case.sizes["S"]
    memory, o, at = memformer.forget(0 * b, b), np.empty((T, case.sizes["E"])), np.maximum(np.arange(T) + S - T, 0)
    for start in range(0, S, L):
        rows, keys = at // L == start // L, slice(start, start + L)
        o[rows] = memformer.read(q[rows], memory, w_key, w_value, scale=scale)
        options = {"scale": scale, "temperature": case.options.get("temperature", 1.0)}
        memory = memformer.forget(memformer.write(memory, k[keys], v[keys], w_query, w_key, **options), b)
    assert (o == case.attend()).all()


# --- (a) --------------------------------------------------------------------------------------------------------------


def parting(tight: Tight, m: Vector, n: Vector, b: Vector) -> float:
    """Judge (a)."""
    lengths = norm(plus(m, b)) + norm(plus(n, b))
    return judge(tight, norm(plus(forgets(m, b), forgets(n, b), -1)), 2 * norm(plus(m, n, -1)) / lengths)


@given(data=st.data(), E=st.sampled_from([1, 2, 4]), size=st.sampled_from([1.0, 2.0**-20]))
def test_forgetting_parts_two_memories_by_at_most(tight: Tight, data: st.DataObject, E: int, size: float) -> None:
    m, n, b = (data.draw(row(E, -2, 2)) for _ in range(3))
    n = m + size * n
    assume((m + b).any() and (n + b).any() and (m != n).any())
    target(parting(tight, exact(m), exact(n), exact(b)))


@given(data=st.data(), E=st.sampled_from([2, 4]))
def test_lengths_that_agree_reach_it(tight: Tight, data: st.DataObject, E: int) -> None:
    x, b, order = data.draw(row(E, -2, 2)), data.draw(row(E, -2, 2)), data.draw(st.permutations(range(E)))
    y = x[list(order)]
    assume((x != y).any())
    assert parting(tight, exact(x - b), exact(y - b), exact(b)) > SHARP


@given(data=st.data(), E=st.sampled_from([1, 2, 4]), times=grid(0, 4))
def test_opposite_directions_reach_it(tight: Tight, data: st.DataObject, E: int, times: float) -> None:
    x, b = data.draw(row(E, -2, 2)), data.draw(row(E, -2, 2))
    assume(x.any() and times)
    assert parting(tight, exact(x - b), exact(-times * x - b), exact(b)) > SHARP


@given(case=cases(memformer, least=1, square=True))
def test_what_is_drawn_is_never_near_0_over_0(tight: Tight, case: Case) -> None:
    v, b = case.arrays["v"], case.arrays["retention"]
    R = highest([arb(1), *(norm(exact(x)) for x in v)])
    for x in b:
        least = norm(exact(x))
        assert 2 * R <= least * (1 + rounding.gamma(2 * case.sizes["E"] + 10))
        m, n = (over(exact(y), highest([arb(1), norm(exact(y)) / R])) for y in (v[0], v[-1]))
        if (v[0] != v[-1]).any():
            parted = norm(plus(forgets(m, exact(x)), forgets(n, exact(x)), -1))
            judge(tight, parted, norm(plus(m, n, -1)) * (1 + rounding.gamma(4 * case.sizes["E"] + 20)))


def test_forgetting_brings_memories_nearer_is_false() -> None:
    """Behind a short bias they part: by 1/(1 − r) as they approach −b/r."""
    for r in (0.5, 0.9):
        m, n, b = exact([-1.0, 0.0]), over(exact([-1.0, 2.0**-20]), norm(exact([-1.0, 2.0**-20]))), exact([r, 0.0])
        before, after = (norm(plus(x, y, -1)) for x, y in ((m, n), (forgets(m, b), forgets(n, b))))
        assert after / before > SHARP / (1 - arb(r))


# --- (b) --------------------------------------------------------------------------------------------------------------


def along(m: Vector, b: Vector) -> tuple[arb, arb]:
    """Return the cosine and the sine of the angle of m to b."""
    size = norm(m) * norm(b)
    cosine = dot(m, b) / size
    across = plus(m, b, -dot(m, b) / dot(b, b))
    return cosine, norm(across) / norm(m)


@given(data=st.data(), E=st.sampled_from([2, 3]), r=grid(1 / 8, 4), near=st.sampled_from([0, 1, -1, 2**20, -(2**20)]))
def test_forgetting_turns_a_memory_towards_the_bias(
    tight: Tight, data: st.DataObject, E: int, r: float, near: int
) -> None:
    direction, m = data.draw(row(E, -2, 2)), data.draw(row(E, -2, 2))
    assume(direction.any())
    b = over([arb(r) * x for x in exact(direction)], norm(exact(direction)))
    m = plus(exact(m), exact(direction), near)
    assume(norm(m) > 0)
    m = over(m, norm(m))
    cosine, sine = along(m, b)
    assume(sine > 0)
    length, (cosine_after, sine_after) = norm(plus(m, b)), along(forgets(m, b), b)
    assert (cosine_after - (cosine + arb(r)) / length).contains(0) and (sine_after - sine / length).contains(0)
    assert sine * cosine_after > cosine * sine_after  # sin(θ − θ') > 0
    if cosine > 0:
        target(judge(tight, sine_after / cosine_after, sine / cosine / (1 + arb(r))), label="in front")
    elif -cosine > r:
        target(judge(tight, sine / -cosine / (1 - arb(r)), sine_after / -cosine_after), label="behind")


@pytest.mark.parametrize("r", [0.125, 0.5, 2.0])
def test_near_the_bias_the_rate_is_reached(tight: Tight, r: float) -> None:
    m, b = exact([1.0, 2.0**-10]), exact([r, 0.0])
    (cosine, sine), (after, across) = along(m, b), along(forgets(over(m, norm(m)), b), b)
    assert judge(tight, across / after, sine / cosine / (1 + arb(r))) > SHARP
    if r < 1:
        cosine, sine = -cosine, sine
        after, across = along(forgets(over([-m[0], m[1]], norm(m)), b), b)
        assert judge(tight, sine / -cosine / (1 - arb(r)), across / -after) > SHARP


@pytest.mark.parametrize("r", [0.25, 0.75, 1.0, 3.0])
@pytest.mark.parametrize("power", [0, -10, -40])
def test_every_memory_but_the_opposite_comes_to_the_bias_in_the_steps_that_are_stated(r: float, power: int) -> None:
    tangent, b = arb(2) ** power, exact([r, 0.0])
    m = over([arb(-1), tangent], (1 + tangent * tangent).sqrt())
    behind = 1
    if r < 1:  # tan α < √(1/r² − 1) while cos α > r
        behind += max(0, math.ceil(math.log(math.sqrt(1 / r**2 - 1) / 2.0**power) / -math.log1p(-r)))
    for _ in range(behind):
        m = forgets(m, b)
    cosine, sine = along(m, b)
    assert cosine >= 0 or cosine.contains(0)
    m = forgets(m, b)
    cosine, sine = along(m, b)
    front, steps = sine / cosine, 8
    for _ in range(steps):
        m = forgets(m, b)
    cosine, sine = along(m, b)
    assert sine / cosine <= front / (1 + arb(r)) ** steps


@pytest.mark.parametrize(("r", "after"), [(0.5, -1.0), (0.75, -1.0), (1.25, 1.0), (2.0, 1.0)])
def test_a_slot_that_is_never_written_returns_to_its_bias_is_false(r: float, after: float) -> None:
    """Where it is opposite to the bias it stays there for r < 1, and returns at once for r > 1."""
    m, b = np.array([[-1.0, 0.0]]), np.array([[r, 0.0]])
    assert (memformer.forget(m, b) == [[after, 0.0]]).all()


def test_a_memory_opposite_to_a_bias_of_length_1_is_refused() -> None:
    with pytest.raises(ValueError, match="retention"):
        memformer.forget([[-1.0, 0.0]], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="retention"):
        memformer.attend([[0.0]], [[0.0]], [[0.0]], [[0.0]], [[0.0]], [[0.0]], [[0.0]], segment=1)
    x, zero, one = np.zeros((2, 1)), np.zeros((1, 1)), np.ones((1, 1))
    for verb in (memformer.attend, lambda *a, **o: memformer.vjp(x, *a, **o)):  # (1 − 3)/2 = −1
        with pytest.raises(ValueError, match="retention"):
            verb(x, x, np.full((2, 1), -3.0), zero, zero, one, one, segment=1)


@pytest.mark.parametrize("power", [-1070, -600, 600, 1020])
def test_lengths_whose_squares_leave_the_range_have_a_direction(power: int) -> None:
    b = np.ldexp([[3.0, 4.0]], power)
    assert_within(memformer.forget(0 * b, b), [[0.6, 0.8]], rounding.gamma(6))


# --- (c), (d) ---------------------------------------------------------------------------------------------------------


def written(case: Case) -> tuple[dict[str, Array], dict[str, float | None]]:
    """Return what `write` takes: the first segment, and memory that need not have length 1."""
    x, L = case.arrays, case.options["segment"]
    arrays = {"memory": x["retention"], "k": x["k"][:L], "v": x["v"][:L], "w_query": x["w_query"], "w_key": x["w_key"]}
    return arrays, {s: y for s, y in case.options.items() if s != "segment"}


def slot(arrays: dict[str, Array], options: dict[str, float | None]) -> tuple[Vector, list[Vector], list[Vector]]:
    """Return p, y and g of the first slot, by their formulas."""
    m, k, v, w_query, w_key = (Ball.lift(x) for x in arrays.values())
    scale, D = options["scale"], k.shape[1]
    rate = (1 / arb(D).sqrt() if scale is None else arb(scale)) / arb(options.get("temperature", 1.0))
    m, asked, own = m[:1], m[:1] @ w_query, m[:1] @ w_key
    logits = [rate * x for x in ((asked @ own.mT).cells[0, 0], *(asked @ k.mT).cells[0])]
    g = [(own @ w_query.mT + asked @ w_key.mT).cells[0], *(k @ w_query.mT).cells]
    w = [s.exp() for s in logits]
    return over(w, sum(w, arb(0))), [list(m.cells[0]), *map(list, v.cells)], [[rate * x for x in y] for y in g]


def diameter(points: list[Vector]) -> arb:
    return highest([norm(plus(x, y, -1)) for x in points for y in points])


def moved(arrays: dict[str, Array], options: dict[str, float | None], direction: Array) -> Ball:
    """Return ∂m'/∂m along a direction of the memory."""
    balls = {s: Ball.lift(x) for s, x in arrays.items()}
    balls["memory"] = Ball.along(arrays["memory"], direction)
    return memformer.write(*balls.values(), **options).derivative()


def steepest(p: Vector, y: list[Vector], g: list[Vector]) -> Array:
    """Return about the direction in which the derivative is largest, in float64."""
    p_, y_, g_ = (np.array(x, dtype=float) for x in (p, y, g))
    jacobian = p_[0] * np.eye(y_.shape[1]) + y_.T @ (p_[:, None] * (g_ - p_ @ g_))
    return np.linalg.svd(jacobian)[2][0]


def judge_derivative(tight: Tight, arrays: dict[str, Array], options: dict[str, float | None]) -> float:
    """Judge (d) for the first slot."""
    p, y, g = slot(arrays, options)
    u = steepest(p, y, g)
    direction = np.zeros_like(arrays["memory"])
    direction[0] = u
    most = (p[0] + diameter(y) * diameter(g) / 4) * norm(exact(u))
    change = moved(arrays, options, direction).cells
    assert all(x == 0 for other in change[1:] for x in other)
    return judge(tight, norm(list(change[0])), most)


@given(case=problems())
def test_a_write_stays_within_the_longest_of_what_it_mixes(tight: Tight, case: Case) -> None:
    arrays, options = written(case)
    after = memformer.write(*map(Ball.lift, arrays.values()), **options).cells
    longest = [highest([norm(exact(y)) for y in (m, *arrays["v"])]) for m in arrays["memory"]]
    target(max(judge(tight, norm(list(x)), most) for x, most in zip(after, longest, strict=True)))


@given(v=row(3, -2, 2), k=row(4, -2, 2))
def test_one_value_throughout_reaches_it(tight: Tight, v: Array, k: Array) -> None:
    assume(v.any())
    balls = (Ball.lift(x) for x in (v[None], k[:, None], np.tile(v, (4, 1)), np.ones((3, 1)), np.ones((3, 1))))
    assert judge(tight, norm(list(memformer.write(*balls).cells[0])), norm(exact(v))) > SHARP


@given(case=problems(), size=st.sampled_from([1.0, 2.0**-3, 2.0**-10]))
def test_the_derivative_of_a_write_is_at_most(tight: Tight, case: Case, size: float) -> None:
    arrays, options = written(case)
    target(judge_derivative(tight, {**arrays, "w_query": size * arrays["w_query"]}, options))


@given(case=problems())
def test_slots_that_ask_nothing_reach_it(tight: Tight, case: Case) -> None:
    arrays, options = written(case)
    assert judge_derivative(tight, {**arrays, "w_query": 0 * arrays["w_query"]}, options) > SHARP


@given(m=grid(1 / 8, 4), v=grid(-4, 4), asks=grid(-4, 4), own=grid(-4, 4))
def test_two_points_of_equal_weight_reach_it(tight: Tight, m: float, v: float, asks: float, own: float) -> None:
    """D = E = L = 1, k = mw_k: s₀ = s₁, and g₀ − g₁ = m w_q w_k."""
    assume((m - v) * asks * own >= 0)
    numbers = {"memory": m, "k": m * own, "v": v, "w_query": asks, "w_key": own}
    assert judge_derivative(tight, {s: np.array([[x]]) for s, x in numbers.items()}, {"scale": 1.0}) > SHARP


@given(case=problems(), other=st.integers(0, 7))
def test_a_slot_sees_no_other_slot(case: Case, other: int) -> None:
    arrays, options = written(case)
    n = len(arrays["memory"])
    rotten = arrays["memory"].copy()
    rotten[other % n] = np.nan
    rest = np.arange(n) != other % n
    bad, good = (memformer.write(*{**arrays, "memory": x}.values(), **options) for x in (rotten, arrays["memory"]))
    room = rounding.allowance(memformer.write, *arrays.values(), **options)
    assert np.isnan(bad[~rest]).all()
    assert_within(bad[rest], good[rest], 2 * room[rest], empty=True)


# --- (e), (f) ---------------------------------------------------------------------------------------------------------


@given(case=problems(most=24, square=True), seed=st.integers(0, 2**32 - 1))
def test_replay_is_plain_backpropagation_through_time_bit_for_bit(case: Case, seed: int) -> None:
    arrays, options = case.arguments()
    do = np.random.default_rng(seed).standard_normal((case.sizes["T"], case.sizes["E"]))
    plain = unrolled.vjp(do, *arrays, **options)._asdict()
    for name, g in memformer.vjp(do, *arrays, **options)._asdict().items():
        assert (g == plain[name]).all(), name


def test_one_bit_in_a_replayed_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v, do = rng.standard_normal((4, 8, 3))
    arrays = (q, k, v, *memformer.draw(rng, q, k, v, slots=2))
    plain, work = unrolled.vjp(do, *arrays, segment=2), _slots.memories

    def changed(*args):
        return [at._replace(memory=np.nextafter(at.memory, 2)) if n == 1 else at for n, at in enumerate(work(*args))]

    monkeypatch.setattr(_slots, "memories", changed)
    assert any((a != b).any() for a, b in zip(memformer.vjp(do, *arrays, segment=2), plain, strict=True))


def unseen(case: Case, first: int) -> Case:
    """Put NaN into the keys and values from a position on."""
    k, v = case.arrays["k"].copy(), case.arrays["v"].copy()
    k[first:], v[first:] = np.nan, np.nan
    return case.given(k=k, v=v)


@given(case=problems(), at=st.integers(0, 6))
def test_keys_of_the_own_and_of_later_segments_do_not_matter(case: Case, at: int) -> None:
    T, S, L = case.sizes["T"], case.sizes["S"], case.options["segment"]
    first = min(at, S - 1) // L * L
    rows = np.maximum(np.arange(T) + S - T, 0) < first + L
    assert (unseen(case, first).attend()[rows] == case.attend()[rows]).all()
    g = case.vjp(np.where(rows[:, None], 1.0, np.zeros((T, case.sizes["E"]))))
    assert (g["k"][first:] == 0).all() and (g["v"][first:] == 0).all()


@given(case=problems())
def test_what_no_row_reads_does_not_matter_to_a_gradient(case: Case) -> None:
    do, first = np.ones((case.sizes["T"], case.sizes["E"])), (case.sizes["S"] - 1) // case.options["segment"]
    plain = case.vjp(do)
    for name, g in unseen(case, first * case.options["segment"]).vjp(do).items():
        assert (g == plain[name]).all(), name
