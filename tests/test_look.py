"""A closer look at a study: worst rows and what explains them, curves over draws, matrices, and what claims assume."""

import tomllib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from refattn import masks, method, rounding, softmax, study
from refattn.memory import memformer
from refattn.method import Cost, Method, Option
from refattn.rounding import gamma
from refattn.study._look import Curve, Worst, assumptions, curves, matrices, within, worst_rows
from refattn.study._why import effective, why
from refattn.testing import assert_within

Array = NDArray[np.float64]

RNG = np.random.default_rng(11)
Q, K, V = RNG.standard_normal((3, 2, 12, 4))
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table() -> study.Table:
    """Every method, causal where it takes a mask."""
    return study.compare(Q, K, V, mask=masks.causal(), trials=41, trial_rows=1, delta=0.5)


def row_of(table: study.Table, name: str, budget: str) -> study.Row:
    return next(row for row in table.rows if (row.method, row.budget) == (name, budget))


def dense(q: Array, k: Array, seen: Any = True) -> Array:
    """Softmax weights as they are defined."""
    e = np.where(seen, np.exp(q @ k.T / np.sqrt(q.shape[-1])), 0.0)
    return e / e.sum(axis=1, keepdims=True)


def relative(q: Array, k: Array) -> float:
    """How far two computations of a softmax weight may be apart, as a part of it: of logits, exp, sum and quotient."""
    logit = gamma(q.shape[-1] + 3) * float((np.abs(q) @ np.abs(k).T).max()) / np.sqrt(q.shape[-1])
    return 2 * (np.expm1(2 * logit) + gamma(len(k) + 8))


def toy(monkeypatch: pytest.MonkeyPatch, declaration: dict[str, Any], **verbs: Any) -> None:
    """Make a table of one method, whose rounding counts as none."""
    module = types.ModuleType("toy")
    common = {"name": "toy", "family": "toys", "paper": "", "arrays": {"q": "T D", "k": "S D", "v": "S E"}}
    rest = {"masks": "none", "rows": "any", "permutable": True}
    cost = {"cost": lambda T, S, D, E: Cost(pairs=0, flops=1, bytes=0)}
    vars(module).update(METHOD=Method(**(common | rest | declaration)), **cost, **verbs)
    monkeypatch.setattr(method, "modules", lambda: {"toy": module})
    monkeypatch.setattr(rounding, "allowance", lambda *_, **__: 0.0)


# --- worst rows -------------------------------------------------------------------------------------------------------


def test_the_worst_rows_of_a_window_are_those_of_the_dense_formulas() -> None:
    q, k, v = Q[:, :6], K[:, :6], V[:, :6]
    table = study.compare(q, k, v, methods=["longformer"], budgets={"longformer": [1]})
    found = worst_rows(table, table.rows[0], 4)
    near = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) <= 1
    p = np.stack([dense(*x) for x in zip(q, k, strict=True)])
    own = np.stack([dense(*x, near) for x in zip(q, k, strict=True)])
    part = np.abs(own @ v - p @ v) / np.ptp(v, axis=1, keepdims=True)
    each = np.sqrt((part**2).mean(axis=2))
    order = np.argsort(-each.ravel())[:4]
    assert [(w.head, w.row) for w in found] == [(int(i) // 6, int(i) % 6) for i in order]
    for w in found:
        n, i = w.head, w.row
        one, far, r = p[n, i], ~near[i], relative(q[n], k[n])
        ends = np.maximum(v[n][far].max(axis=0) - own[n, i] @ v[n], own[n, i] @ v[n] - v[n][far].min(axis=0))
        bound = one[far].sum() * ends / np.ptp(v[n], axis=0)
        reach = 4 * float(np.abs(v[n]).max()) / float(np.ptp(v[n], axis=0).min())
        assert w.dropped is not None and w.variation is not None and w.bound is not None
        assert_within(w.error, each[n, i], (r + gamma(16)) * reach)
        assert_within(w.bound, np.sqrt((bound**2).mean()), (2 * r + gamma(16)) * reach)
        assert_within(w.dropped, one[far].sum(), r)
        assert_within(w.variation, one[far].sum(), 2 * r)  # a part of softmax is exactly that far from it
        logits = k[n] @ q[n, i] / 2
        assert_within(w.span, np.ptp(logits), 2 * gamma(8) * (np.abs(k[n]) @ np.abs(q[n, i])).max())
        entropy = -(one * np.log(one)).sum()
        nats = (r + gamma(12)) * (1 + (one * np.abs(np.log(one))).sum())
        assert_within(w.keys, np.exp(entropy), np.exp(entropy) * np.expm1(2 * nats))
        assert [j for j, _ in w.top] == np.argsort(-one)[:3].tolist()
        assert_within([x for _, x in w.top], np.sort(one)[:-4:-1], r)
        assert w.deviation is None
        assert w.why == f"It drops {100 * one[far].sum():.0f} % of the row's softmax mass."


def test_a_planted_bad_row_is_found_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(q: Any, k: Any) -> Any:
        first = np.eye(len(k))[0]  # such a row looks at the first key alone
        return np.where(q[:, :1] == 9.0, first, softmax.weights(q, k))

    toy(monkeypatch, {}, attend=lambda q, k, v: weights(q, k) @ v, weights=weights)
    q = Q.copy()
    q[1, 7, 0] = 9.0
    table = study.compare(q, K, V)
    first, second = worst_rows(table, table.rows[0], 2)
    assert (first.head, first.row, first.bound) == (1, 7, None)
    gone = 1.0 - dense(q[1, 7:8], K[1])[0, 0]
    assert first.dropped is not None
    assert_within(first.dropped, gone, relative(q[1], K[1]))
    assert first.why == f"It drops {100 * gone:.0f} % of the row's softmax mass."
    assert second.error < first.error and second.dropped == 0


@pytest.mark.parametrize("mask, rows", [(None, None), (masks.window(5, 1), 5)], ids=["all rows", "some rows"])
def test_a_row_alone_explains_the_error_of_the_whole(mask: Any, rows: int | None) -> None:
    # A mean errs by at most the variation of its weights, in parts of the values' range, and by its bound.
    table = study.compare(Q, K, V, mask=mask, rows=rows, trials=41, trial_rows=1, delta=0.5)
    assert table.run is not None
    for row in (row for row in table.rows if row.heads):
        (w,), sweep = worst_rows(table, row, 1), table.run.sweep(row)
        problem, declared = table.run.problem(sweep, w.head), sweep.declared
        exact = table.run.references.of(problem)
        assert w.row in table.run.inputs.rows and w.error == max(head.worst_error[0] for head in row.heads)
        assert (w.deviation is None) == (sweep.source != "draw") and (w.bound is None) == (not declared.claims)
        assert w.why.endswith(".") and all(0 <= j < 12 for j, _ in w.top)
        room = (2 * exact.rounding + 4 * problem.rounding()).max() / exact.spread.min()
        if w.variation is not None and declared.rows != "any":
            assert_within(max(w.error - w.variation, 0.0), 0.0, room)
        if w.bound is not None:
            room += 2 * problem.claim_rounding().max() / exact.spread.min()
            assert_within(max(w.error - w.bound, 0.0), 0.0, room + gamma(16) * w.bound)


def test_deviation_and_mean_error_make_the_error_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, lambda rng, size: size * rng.choice([-1.0, 1.0]))
    table = study.compare(Q[0], K[0], V[0])
    (w,) = worst_rows(table, table.rows[0], 1)
    # Noise of ±2 deviates by 2 about a mean that is a multiple of 1/4 in 16 draws.
    assert w.deviation is not None and w.deviation < w.error
    scale = np.sqrt((1 / np.ptp(V[0], axis=0) ** 2).mean())
    ups = [2 * np.sqrt(1 - (1 - n / 8) ** 2) * scale for n in range(1, 16)]
    off = min(abs(x - w.deviation) for x in ups)
    assert_within(off, 0.0, gamma(64) * (2 + np.abs(V).max()) * scale)
    assert w.why == f"Most of its error is the draw's: deviation {w.deviation:.2g}, error {w.error:.2g}."
    assert worst_rows(table, table.rows[0], 1) == (w,)


def test_weights_that_are_not_of_keys_have_no_mass_and_no_variation(table: study.Table) -> None:
    row = next(row for row in table.rows if row.method == "memformer")
    for w in worst_rows(table, row):
        assert (w.dropped, w.variation, w.bound) == (None, None, None)
        p = dense(Q[w.head], K[w.head], np.tri(12, dtype=bool))[w.row]
        assert_within(w.top[0][1], p.max(), relative(Q[w.head], K[w.head]))
        assert w.why.startswith(("Its weights multiply something else", "Most of its error is the draw's"))


FLAT = np.full(4, 0.25)
SHARP = np.array([0.97, 0.01, 0.01, 0.01])
REASONS = {
    "dropped": (FLAT, np.array([0.5, 0.5, 0.0, 0.0]), 0.9, 0.0, "It drops 50 % of the row's softmax mass."),
    "little dropped": (
        np.array([0.99, 0.008, 0.002, 0.0]),
        np.array([1.0, 0.0, 0.0, 0.0]),
        0.9,
        0.0,
        "It drops 1 % of the row's softmax mass.",
    ),
    "sum": (FLAT, 2 * FLAT, 0.0, 0.0, "Its weights sum to 2, not to 1."),
    "draw": (FLAT, SHARP, 0.0, 0.6, "Most of its error is the draw's: deviation 0.1, error 0.2."),
    "flat": (SHARP, FLAT, 9.0, 0.4, "Its kernel is far from exp: weights span 0 nats where logits span 9."),
    "signed": (
        FLAT,
        np.array([1.25, -0.25, 0.5, -0.5]),
        0.0,
        0.0,
        "Its weights are off softmax's by 1.2, half the absolute sum of differences.",
    ),
    "moved": (
        SHARP,
        SHARP[::-1],
        4.0,
        0.0,
        "It gives 96 % of the weight to other keys than softmax does, over 1.2 effective keys rather than 1.2.",
    ),
    "other": (FLAT, None, 0.0, 0.0, "Its weights multiply something else than v: it computes another answer than "),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_follows_the_numbers(name: str) -> None:
    p, own, span, drawn, sentence = REASONS[name]
    worst = Worst("toy", "", 0, 0, 0.2, None, None, None, span, effective(p), 0.1 if drawn else None, (), "")
    if own is not None:
        worst = worst._replace(dropped=float(p[own == 0].sum()), variation=float(np.abs(own - p).sum() / 2))
    assert why(worst, p, own, drawn).startswith(sentence)
    assert why(worst._replace(error=0.0), p, own, drawn) == "Its error is within rounding."
    assert why(worst._replace(error=np.nan), p, own, drawn) == "Its answer or the error is not finite."


def test_the_effective_number_of_keys_counts_equal_ones() -> None:
    assert effective(np.array([1.0, 0.0])) == 1.0 and effective(np.zeros(0)) == 0.0
    assert_within(effective(FLAT), 4.0, 4 * gamma(16))


# --- curves -----------------------------------------------------------------------------------------------------------


def noisy(monkeypatch: pytest.MonkeyPatch, law: Any) -> list[Array]:
    """Make exact attention plus one number that is drawn, and return what it will have answered with."""
    used: list[Array] = []

    def attend(q: Any, k: Any, v: Any, noise: Any) -> Any:
        used.append(noise)
        return softmax.attend(q, k, v) + noise

    def draw(rng: np.random.Generator, q: Any, k: Any, v: Any, *, size: int) -> tuple[Any]:
        return (np.full((1, v.shape[-1]), law(rng, size)),)

    declaration = {
        "arrays": {"q": "T D", "k": "S D", "v": "S E", "noise": "r E"},
        "drawn": ("noise",),
        "draw_options": {"size": Option(doc="", domain=lambda x: x > 0, typical=(2, 1))},
        "budget": "size",
    }
    toy(monkeypatch, declaration, attend=attend, draw=draw, weights=lambda q, k, noise: softmax.weights(q, k))
    return used


def test_curves_are_the_quantiles_of_the_errors_of_fresh_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    used = noisy(monkeypatch, lambda rng, size: size * rng.standard_normal())
    table = study.compare(Q[0], K[0], V[0])
    used.clear()
    (curve,) = curves(table, draws=7, rows=3)
    assert (curve.method, curve.name, curve.budgets, curve.draws) == ("toy", "size", (1, 2), 7)
    scale = np.sqrt((1 / np.ptp(V[0], axis=0) ** 2).mean())
    room = gamma(64) * (np.abs(used).max() + np.abs(V).max()) * scale
    sizes = [sorted(abs(float(x[0, 0])) * scale for x in used[start : start + 7]) for start in (0, 7)]
    for part, x in zip((curve.low, curve.middle, curve.high), np.array([0.3, 3.0, 5.7]), strict=True):
        below, rest = int(x), x - int(x)
        assert_within(part, [s[below] + rest * (s[below + 1] - s[below]) for s in sizes], room)
    assert np.unique(np.abs(used)).size == 7 * 2  # every draw is a fresh one, and another one at each size


def test_curves_are_of_approximations_that_draw_over_more_than_one_budget(table: study.Table) -> None:
    found = {curve.method: curve for curve in curves(table, draws=3, rows=2)}
    drawn = {
        row.method
        for row in table.rows
        if row.heads and row.name in ("performer", "linformer", "local_global") and "fit" not in row.method
    }
    assert set(found) == drawn
    for curve in found.values():
        budgets = {int(row.budget.partition("=")[2]) for row in table.rows if row.method == curve.method}
        assert curve.budgets == tuple(sorted(budgets))
        assert all(a <= b <= c for a, b, c in zip(curve.low, curve.middle, curve.high, strict=True))
    one = study.compare(Q, K, V, methods=["linformer"], budgets={"linformer": [3]})
    assert curves(one) == ()


def test_curves_reproduce_with_the_seed_and_report_their_progress() -> None:
    def made(seed: int) -> tuple[Curve, ...]:
        return curves(study.compare(Q, K, V, methods=["linformer"], seed=seed), draws=3)

    assert made(3) == made(3) != made(4)
    many = study.compare(np.repeat(Q, 3, 0), np.repeat(K, 3, 0), np.repeat(V, 3, 0), methods=["linformer"])
    seen: list[tuple[int, int]] = []
    (curve,) = curves(many, draws=1, rows=1, progress=lambda *at: seen.append(at))
    total = 4 * len(curve.budgets)  # of six heads four are tried
    assert seen == [(n, total) for n in range(total + 1)]


# --- matrices ---------------------------------------------------------------------------------------------------------


def test_matrices_are_the_dense_weights_at_their_rows_and_keys(table: study.Table) -> None:
    row = row_of(table, "longformer", "window=1")
    shown = matrices(table, row, 1, 5)
    at = [0, 3, 6, 8, 11]
    assert shown.rows.tolist() == shown.keys.tolist() == at
    near = np.subtract.outer(np.arange(12), np.arange(12))
    r = relative(Q[1], K[1])
    assert_within(shown.exact, dense(Q[1], K[1], near >= 0)[np.ix_(at, at)], r)
    assert_within(shown.weights, dense(Q[1], K[1], (near >= 0) & (near <= 1))[np.ix_(at, at)], r)
    assert shown.difference is not None and (shown.difference == shown.weights - shown.exact).all()
    whole = matrices(table, row, 1)
    assert whole.exact.shape == whole.weights.shape == (12, 12)


def test_a_matrix_whose_columns_are_no_keys_has_no_difference(table: study.Table) -> None:
    row = row_of(table, "memformer", "slots=6")
    drawn = memformer.draw(np.random.default_rng([0, 1]), Q[1], K[1], V[1], slots=6)
    segment, *_ = memformer.METHOD.options["segment"].values({"T": 12, "S": 12, "D": 4, "E": 4})
    shown = matrices(table, row, 1, 7)
    weights = memformer.weights(Q[1], K[1], V[1], *drawn, segment=segment)
    assert shown.difference is None and (shown.weights == weights[shown.rows]).all()
    assert shown.exact.shape == (7, 7)


def test_sampled_rows_are_the_rows_shown() -> None:
    table = study.compare(Q, K, V, mask=masks.causal(), rows=4, methods=["longformer"])
    assert table.setting is not None and table.setting.rows is not None
    shown = matrices(table, table.rows[0], 0)
    assert tuple(shown.rows.tolist()) == table.setting.rows
    p = dense(Q[0], K[0], np.tri(12, dtype=bool))[shown.rows]
    assert_within(shown.exact, p, relative(Q[0], K[0]))


# --- the best within a cost, what claims assume, and what is refused ------------------------------------------------


def test_the_best_within_a_cost_errs_least_of_what_is_cheap_enough(table: study.Table) -> None:
    found = within(table, 0.5)
    assert found
    for name, row in found.items():
        errors = [own.error_relative for own in table.rows if own.method == name and own.heads and own.cost <= 0.5]
        assert row.cost <= 0.5 and row.error_relative == min(errors)
    assert within(table, 0.0) == {}


def test_a_dearer_budget_that_errs_more_and_an_error_that_is_nan_are_not_the_best() -> None:
    first = study.Row("toy", "n=1", "softmax, unmasked", 0.1, 1.0, 1.0, 0.2, 0.0)
    errors = (0.2, 0.3, float("nan"))
    rows = [first._replace(budget=f"n={n}", cost=0.1 * n, error_relative=x) for n, x in enumerate(errors, 1)]
    for order in (rows, rows[::-1]):
        assert within(study.Table(order), 0.5)["toy"].budget == "n=1"


def test_every_claim_says_what_it_assumes_of_a_statement_that_is_proved() -> None:
    known = tomllib.loads((ROOT / "proofs" / "reference.toml").read_text(encoding="utf-8"))
    claims = [claim for module in method.modules().values() for claim in module.METHOD.claims]
    assert claims
    for claim in claims:
        assert claim.statement in known
        assert claim.assumes.endswith(".") and claim.assumes.count(". ") == 0


def test_a_table_lists_the_assumptions_of_what_it_measured() -> None:
    table = study.compare(Q, K, V, methods=["linformer", "memformer"])
    found = assumptions(table)
    assert found.keys() == {"linformer", "memformer"} and found["memformer"] == ()
    assert [text.partition(": ")[0] for text in found["linformer"]] == ["L4", "L3"]


def test_tables_rows_and_numbers_that_do_not_fit_are_refused(table: study.Table) -> None:
    row, other = table.rows[0], study.Table(table.rows)
    for call in (lambda: worst_rows(other, row), lambda: curves(other), lambda: assumptions(other)):
        with pytest.raises(ValueError, match="table has no run"):
            call()
    with pytest.raises(ValueError, match="table has no run"):
        matrices(other, row, 0)
    for wrong in (row._replace(budget="length=77"), next(row for row in table.rows if not row.heads)):
        with pytest.raises(ValueError, match="row is .*; expected one of the table's"):
            worst_rows(table, wrong)
    for call, words in (
        (lambda: worst_rows(table, row, 6), "count is 6; expected at most 5"),
        (lambda: worst_rows(table, row, 0), "count is 0"),
        (lambda: matrices(table, row, 2), "head is 2; expected less than 2"),
        (lambda: matrices(table, row, 0, 0), "most is 0"),
        (lambda: curves(table, 0), "draws is 0"),
        (lambda: curves(table, 1, 0), "rows is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
