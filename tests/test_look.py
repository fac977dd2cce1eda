"""A closer look at a study: what it says of its worst rows, of curves and of matrices, by formulas of its own."""

import math
import types
from typing import Any

import numpy as np
import pytest

from refattn import masks, method, rounding, softmax, study
from refattn.method import Cost, Method, Option
from refattn.sparse import longformer
from refattn.study._look import assumptions, curves, equal, matrices, worst_rows
from refattn.testing import assert_within

RNG = np.random.default_rng(17)
Q, K, V = RNG.standard_normal((3, 2, 14, 4))
NAMES = ["longformer", "linformer", "linear_transformer", "memformer"]


@pytest.fixture(scope="module")
def table() -> study.Table:
    return study.compare(Q, K, V, methods=NAMES, trials=20)


def row_of(table: study.Table, text: str) -> study.Row:
    return next(row for row in table if f"{row.method} {row.budget}" == text)


def test_the_worst_rows_are_those_of_the_largest_errors_and_say_what_was_dropped(table: study.Table) -> None:
    row = row_of(table, "longformer window=1")
    error = np.abs(longformer.attend(Q, K, V, window=1) - softmax.attend(Q, K, V)) / np.ptp(V, axis=1)[:, None, :]
    each = np.sqrt((error**2).mean(axis=2))
    found = worst_rows(table, row, 3)
    assert [(one.head, one.row) for one in found] == [divmod(int(at), 14) for at in np.argsort(-each.ravel())[:3]]
    for one in found:
        q, k = Q[one.head, one.row], K[one.head]
        logits = k @ q / 2.0
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        far = np.abs(np.arange(14) - one.row) > 1
        blur = 2 * rounding.allowance(softmax.weights, Q[one.head], k)[one.row].sum() + rounding.gamma(16)
        assert_within(one.dropped, p[far].sum(), blur)
        assert_within(one.span, np.ptp(logits), rounding.gamma(8) * 2 * (np.abs(k) @ np.abs(q)).max())
        assert [j for j, _ in one.top] == np.argsort(-p)[:3].tolist()
        entropy = -(p * np.log(p)).sum()
        slope = np.abs(np.log(p)).max() + 1  # of p ln p, and the exponential's own
        assert_within(one.keys, math.exp(entropy), 2 * math.exp(entropy) * 14 * slope * blur)
        assert f"{100 * p[far].sum():.0f} %" in one.why and one.deviation is None


def test_what_explains_an_error_is_read_from_its_numbers(table: study.Table) -> None:
    (drawn,) = worst_rows(table, row_of(table, "linformer rank=1"), 1)
    assert drawn.deviation is not None and drawn.deviation > 0 and drawn.dropped == 0
    (slots,) = worst_rows(table, next(row for row in table if row.method == "memformer"), 1)
    assert slots.dropped is None and slots.variation is None and slots.why


def test_the_same_study_looks_the_same_twice(table: study.Table) -> None:
    again = study.compare(Q, K, V, methods=NAMES, trials=20)
    for row in table:
        assert worst_rows(table, row, 2) == worst_rows(again, row, 2)
    assert curves(table, draws=3) == curves(again, draws=3)


def test_a_curve_has_the_quantiles_of_errors_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Any, k: Any, v: Any, noise: Any, *, mask: Any = None, scale: Any = None) -> Any:
        return softmax.attend(q, k, v, mask=mask, scale=scale) + noise

    def draw(rng: np.random.Generator, q: Any, k: Any, v: Any, *, size: int) -> tuple[Any]:
        return (rng.choice([-1.0, 1.0]) * size * np.ptp(v, axis=0)[None],)

    def cost(T: int, S: int, D: int, E: int, *, mask: Any = None) -> Cost:
        return Cost(1, 1, 1)

    module = types.ModuleType("toy")
    arrays = {"q": "T D", "k": "S D", "v": "S E", "noise": "r E"}
    size = Option(doc="", domain=lambda x: x > 0, typical=(1, 4))
    declared = Method(
        name="toy",
        family="toys",
        paper="",
        arrays=arrays,
        drawn=("noise",),
        draw_options={"size": size},
        budget="size",
        masks="any",
        rows="any",
        permutable=True,
    )
    vars(module).update(METHOD=declared, attend=attend, draw=draw, cost=cost)
    monkeypatch.setattr(method, "modules", lambda: {"toy": module})
    (curve,) = curves(study.compare(Q, K, V), draws=5)
    assert (curve.name, curve.budgets, curve.draws) == ("size", (1, 4), 5)
    room = max(float(rounding.allowance(softmax.attend, *x).max()) for x in zip(Q, K, V, strict=True))
    blur = 4 * (room / float(np.ptp(V, axis=1).min()) + rounding.gamma(V.size + 8) * 4)
    for values in (curve.low, curve.middle, curve.high):
        assert_within(np.array(values), np.array([1.0, 4.0]), np.full(2, blur))


def test_matrices_are_the_weights_at_the_places_shown(table: study.Table) -> None:
    found = matrices(table, row_of(table, "longformer window=1"), 1, most=5)
    assert found.rows.tolist() == found.keys.tolist() == [0, 3, 6, 10, 13]
    at = np.ix_(found.rows, found.keys)
    room = 2 * rounding.allowance(softmax.weights, Q[1], K[1])[at]
    assert_within(found.exact, softmax.weights(Q[1], K[1])[at], room)
    assert np.array_equal(found.weights > 0, np.eye(5, dtype=bool)) and found.difference is not None
    assert np.array_equal(found.difference, found.weights - found.exact)
    whole = matrices(table, next(row for row in table if row.method == "memformer"), 0)
    assert whole.difference is None and whole.exact.shape == (14, 14)


def test_rows_at_equal_cost_are_the_dearest_that_are_cheap_enough(table: study.Table) -> None:
    for name, row in equal(table, 0.5).items():
        costs = [own.cost for own in table if own.method == name and own.vacuous is None and own.cost <= 0.5]
        assert row.cost == max(costs)
    assert equal(table, 0.0) == {}


def test_sampled_rows_are_looked_at_alone() -> None:
    table = study.compare(Q, K, V, mask=masks.causal(), methods=["longformer", "linformer"], rows=4, trials=20)
    assert table.setting is not None and table.setting.rows is not None
    for row in table:
        assert all(one.row in table.setting.rows for one in worst_rows(table, row, 2))
    assert matrices(table, table.rows[0], 0).rows.tolist() == list(table.setting.rows)


def test_every_claim_of_what_was_measured_says_what_it_assumes(table: study.Table) -> None:
    said = assumptions(table)
    assert set(said) == set(NAMES) and said["memformer"] == () and said["longformer"][0].startswith("S1: ")


def test_what_a_study_does_not_have_is_refused(table: study.Table) -> None:
    row = table.rows[0]
    for wrong, message in (
        (lambda: worst_rows(study.Table([row]), row), "table has no run"),
        (lambda: worst_rows(table, row._replace(budget="window=99")), "row is longformer window=99"),
        (lambda: worst_rows(table, row, 6), "count is 6"),
        (lambda: matrices(table, row, 2), "head is 2"),
        (lambda: curves(table, draws=0), "draws is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
