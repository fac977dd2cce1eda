"""Claims over the draw: convicted and acquitted on toys whose law is known; what else a study takes from a method."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from math import comb
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from refattn import cli, masks, method, rounding, softmax, study
from refattn.method import Claim, Cost, Method, Option
from refattn.study._draws import ALARM, most_failures
from refattn.testing import assert_within

RNG = np.random.default_rng(5)
Q, K, V = RNG.standard_normal((2, 6, 3)), RNG.standard_normal((2, 8, 3)), RNG.standard_normal((2, 8, 4))


def toy(monkeypatch: pytest.MonkeyPatch, declaration: dict[str, Any], **verbs: Any) -> None:
    """Make a table of one method."""
    module = types.ModuleType("toy")
    common = {"name": "toy", "family": "toys", "paper": "", "arrays": {"q": "T D", "k": "S D", "v": "S E"}}
    rest = {"masks": "any", "rows": "any", "permutable": True}
    vars(module).update(METHOD=Method(**(common | rest | declaration)), cost=cost, **verbs)
    monkeypatch.setattr(method, "modules", lambda: {"toy": module})


def cost(T: int, S: int, D: int, E: int, *, mask: Any = None) -> Cost:
    return Cost(pairs=0, flops=softmax.cost(T, S, D, E, mask=mask).flops // 2, bytes=0)


def noisy(monkeypatch: pytest.MonkeyPatch, law: str, factor: Any = 1.0) -> None:
    """Make exact attention plus a number drawn for each column, with a claim that is off by a factor."""

    def attend(q: Any, k: Any, v: Any, noise: Any, *, mask: Any = None, scale: Any = None) -> Any:
        return softmax.attend(q, k, v, mask=mask, scale=scale) + noise

    def draw(rng: np.random.Generator, q: Any, k: Any, v: Any, *, size: float) -> tuple[Any]:
        shape = (1, v.shape[-1])
        return (size * (rng.standard_normal(shape) if law == "normal" else rng.choice([-1.0, 1.0], shape)),)

    def bound_over_draws(
        q: Any, k: Any, v: Any, *, size: float, delta: float, rows: Any, mask: Any = None, scale: Any = None
    ) -> Any:
        quantile = NormalDist().inv_cdf(1 - delta / 2) if law == "normal" else 1.0
        return np.broadcast_to(factor * size * quantile, (*q.shape[:-2], len(rows), v.shape[-1]))

    arrays = {"q": "T D", "k": "S D", "v": "S E", "noise": "r E"}
    size = Option(doc="", domain=lambda x: x > 0, typical=(0.5, 2.0))
    declaration = {"arrays": arrays, "drawn": ("noise",), "draw_options": {"size": size}, "budget": "size"}
    claim = Claim(verb="bound_over_draws", statement="toy", assumes="Nothing.", over="draw")
    toy(monkeypatch, declaration | {"claims": (claim,)}, attend=attend, draw=draw, bound_over_draws=bound_over_draws)


@pytest.mark.parametrize("law", ["normal", "two values"])
def test_a_claim_over_the_draw_is_acquitted_and_half_of_it_convicted(
    law: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", q=Q[0], k=K[0], v=V[0])
    for factor in (1.0, 0.5):
        noisy(monkeypatch, law, factor)
        table = study.compare(Q[0], K[0], V[0], seed=1)
        over = table.rows[2:]
        assert [(row.method, row.budget) for row in over] == [
            ("toy, over draws, δ=0.05", "size=0.5"),
            ("toy, over draws, δ=0.05", "size=2.0"),
        ]
        assert all(row.holds is (factor == 1.0) and row.vacuous == 0 for row in over)
        assert len(table.violations) == (0 if factor == 1.0 else 2)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["study", str(tmp_path / "a.npz")])
        assert stopped.value.code == (0 if factor == 1.0 else 1)
        shown, said = capsys.readouterr()
        assert ("VIOLATED: toy, over draws, δ=0.05 size=0.5: it fails in too many draws" in said) == (factor < 1)
        assert max(map(len, shown.splitlines()[1:])) <= 80 + 30 * (factor < 1)


def test_what_is_covered_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, "two values", np.array([1.0, 1.0, 0.5, np.inf]))
    row = study.compare(Q, K, V, trials=40).rows[-1]
    assert (row.vacuous, row.bound_max, row.error_max, row.holds) == (0.25, 2.0, row.error_max, False)
    assert row.covered == 2 / 3
    assert row.bound_ratio is not None
    assert_within(row.bound_ratio, 1.0, room(row.bound_ratio))
    assert_within(row.error_max, 2.0, room(2.0))


def room(x: float) -> float:
    """How far a ratio or an error of these toys may be from the real number: sums of at most 8 products."""
    return 4 * rounding.gamma(32) * (x + abs(V).max())


def test_a_claim_that_is_infinite_everywhere_is_vacuous_and_costs_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, "normal", np.inf)
    table = study.compare(Q, K, V)
    row = table.rows[-1]
    assert (row.vacuous, row.covered, row.holds, row.seconds) == (1.0, None, None, 0.0)
    assert str(table).count(" vacuous ") == 2 and "not finite" not in str(table) and not table.violations


@pytest.mark.parametrize("factor", [np.nan, -np.inf, 0.0])
def test_a_claim_over_the_draw_that_is_no_bound_is_convicted(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, "normal", factor)
    assert study.compare(Q[0], K[0], V[0], trials=40).rows[-1].holds is False


def test_few_trials_or_other_options_out_of_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, "normal")
    for options, words in (
        ({"trials": 3}, "trials is 3; expected more"),
        ({"trials": 0}, "trials is 0"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": np.nan}, "delta is nan"),
        ({"rows": 0}, "rows is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            study.compare(Q, K, V, **options)


@pytest.mark.parametrize("trials, delta, elements", [(30, 0.05, 10), (100, 0.25, 5000), (64, 0.5, 1)])
def test_the_number_of_failures_is_the_least_that_the_binomial_lets_pass(
    trials: int, delta: float, elements: int
) -> None:
    def beyond(c: int) -> Fraction:
        p = Fraction(delta)
        return sum((comb(trials, n) * p**n * (1 - p) ** (trials - n) for n in range(c + 1, trials + 1)), Fraction(0))

    c = most_failures(trials, delta, elements)
    assert elements * beyond(c) <= Fraction(ALARM) < elements * beyond(c - 1)


def test_progress_over_draws_runs_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, "normal")
    seen: list[tuple[int, int]] = []
    study.compare(Q, K, V, progress=lambda *at: seen.append(at), trials=41)
    assert seen == [(n, 8) for n in range(9)]


def test_options_that_are_drawn_and_arrays_of_any_rank_reach_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Any, k: Any, v: Any, *, centre: Any = None, positions: Any, mask: Any = None) -> Any:
        seen = masks.meet(mask, masks.global_tokens(positions))
        return softmax.attend(q, k - centre[..., None, :], v, mask=seen)

    def bound(
        q: Any, k: Any, v: Any, *, centre: Any = None, positions: Any, mask: Any = None, scale: Any = None
    ) -> Any:
        return np.full((*q.shape[:-1], v.shape[-1]), 100.0 + len(positions))

    def draw(rng: np.random.Generator, q: Any, k: Any, v: Any, *, many: int) -> tuple[Any, Any]:
        return tuple(range(many)), k.mean(axis=-2)

    def counted(T: int, S: int, D: int, E: int, *, positions: Any, many: int, mask: Any = None) -> Cost:
        assert len(positions) == many
        return cost(T, S, D, E)

    declaration = {
        "arrays": {"q": "T D", "k": "S D", "v": "S E", "centre": "D?"},
        "options": {"positions": Option(doc="", domain=lambda x: True, typical=((),))},
        "draw_options": {"many": Option(doc="", domain=lambda x: x > 0, typical=(1, 3))},
        "drawn": ("positions", "centre"),
        "budget": "many",
        "claims": (Claim(verb="bound", statement="toy", assumes="Nothing."),),
    }
    toy(monkeypatch, declaration, attend=attend, draw=draw, bound=bound)
    vars(method.modules()["toy"])["cost"] = counted
    taken: list[tuple[Any, Any]] = []

    def allowance(verb: Any, q: Any, k: Any, v: Any, *, centre: Any = None, **options: Any) -> Any:
        taken.extend([] if verb is softmax.attend else [(k, centre)])
        return np.zeros((6, 4))

    monkeypatch.setattr(rounding, "allowance", allowance)
    rows = study.compare(Q, K, V).rows
    # attend, bound and draw get all heads at once: what is taken apart for each head is seen here alone
    assert [k.tolist() for k, _ in taken] == 2 * K.tolist()
    assert all(np.array_equal(centre, k.mean(axis=0)) for k, centre in taken)
    found = [(row.budget, row.bound_max, row.holds) for row in rows]
    assert found == [("many=1", 101.0, True), ("many=3", 103.0, True)]
    whole = [attend(q, k, v, centre=k.mean(axis=0), positions=(0, 1, 2)) for q, k, v in zip(Q, K, V, strict=True)]
    assert rows[1].error_max == abs(np.array(whole) - softmax.attend(Q, K, V)).max()


def test_a_method_that_is_causal_by_itself_is_measured_against_causal_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exact(q: Any, k: Any, v: Any, *, mask: Any = None, scale: Any = None) -> Any:
        return softmax.attend(q, k, v, mask=masks.meet(mask, masks.causal()), scale=scale)

    def bound(q: Any, k: Any, v: Any, *, mask: Any = None, scale: Any = None) -> Any:
        return np.zeros((*q.shape[:-1], v.shape[-1]))

    claims = (Claim(verb="bound", statement="toy", assumes="Nothing."),)
    toy(monkeypatch, {"causal": True, "claims": claims}, attend=exact, exact=exact, bound=bound)
    for mask, reference in (
        (None, "softmax, causal"),
        (masks.causal(), "softmax, same mask"),
        (masks.window(1, 0), "softmax, same mask"),
        (masks.window(1, 1), "softmax, same mask and causal"),
    ):
        (row,) = study.compare(Q, K, V, mask=mask).rows
        assert (row.reference, row.error_max, row.holds, row.cost) == (reference, 0.0, True, 0.5)


def test_an_exact_answer_that_reads_what_is_drawn_is_what_the_method_is_measured_against(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend(q: Any, k: Any, v: Any, shift: Any, *, mask: Any = None, scale: Any = None) -> Any:
        return softmax.attend(q + shift, k, v, mask=mask, scale=scale)

    def draw(rng: np.random.Generator, q: Any, k: Any, v: Any) -> tuple[Any]:
        return (np.ones((1, q.shape[-1])),)

    declaration = {"arrays": {"q": "T D", "k": "S D", "v": "S E", "shift": "r D"}, "drawn": ("shift",)}
    toy(monkeypatch, declaration, attend=attend, exact=attend, draw=draw)
    assert study.compare(Q, K, V).rows[0].error_max == 0
    toy(monkeypatch, declaration, attend=attend, draw=draw)
    assert study.compare(Q, K, V).rows[0].error_max == abs(softmax.attend(Q + 1, K, V) - softmax.attend(Q, K, V)).max()


def test_a_method_that_approximates_nothing_has_errors_and_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        return 2.0 * softmax.attend(q, k, v)

    declaration = {"approximates": None, "masks": "none", "linear_in": ()}
    toy(monkeypatch, declaration, attend=attend)
    table = study.compare(Q, K, V, mask=masks.causal())
    (row,) = table.rows
    assert (row.reference, row.bound_max, row.holds) == ("softmax, unmasked", None, None)
    assert row.error_max == abs(softmax.attend(Q, K, V)).max()
    assert str(table).splitlines()[-1].endswith(" —")


@pytest.mark.parametrize("there", [False, True])
def test_blas_is_kept_to_one_thread_where_that_can_be_asked(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    @contextmanager
    def threadpool_limits(limits: int, user_api: str) -> Iterator[None]:
        asked.append((limits, user_api))
        yield
        asked.append("released")

    def attend(q: Any, k: Any, v: Any) -> Any:
        assert asked == ([(1, "blas")] if there else [])
        return softmax.attend(q, k, v)

    fake = types.SimpleNamespace(threadpool_limits=threadpool_limits) if there else None
    monkeypatch.setitem(sys.modules, "threadpoolctl", fake)
    toy(monkeypatch, {"masks": "none"}, attend=attend)
    study.compare(Q, K, V)
    assert asked == ([(1, "blas"), "released"] if there else [])
