"""The lemmas take arrays, refuse nonsense, and answer at the ends of their domains. That they are true: proofs/."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refattn import perturbation as pt

P, V = np.array([0.25, 0.75]), np.array([1.0, 3.0])

ROWS: dict[str, Callable[..., Any]] = {
    "tilt_by_deviation": lambda p, v, e: pt.tilt_by_deviation(p, v, e[..., 0]),
    "tilt_by_mean_deviation": lambda p, v, e: pt.tilt_by_mean_deviation(p, v, e[..., 0]),
    "tilt_first_order": pt.tilt_first_order,
    "box_interval": pt.box_interval,
    "box_output": pt.box_output,
    "lse_interval": lambda p, v, e: pt.lse_interval(p, e),
    "projection_deviation": lambda p, v, e: pt.projection_deviation(p, v, 3, entries="sign"),
    "signed_output": lambda p, v, e: pt.signed_output(p, e, v),
}


@pytest.mark.parametrize("name", ROWS)
def test_leading_axes_are_independent_rows(name: str) -> None:
    rng = np.random.default_rng(5)
    p, v, e = rng.dirichlet(np.ones(4), (3, 1)), rng.normal(size=(2, 4)), rng.random((3, 2, 4))
    together = np.stack(np.broadcast_arrays(*np.atleast_1d(*[ROWS[name](p, v, e)])))
    alone = [[ROWS[name](p[i, 0], v[j], e[i, j]) for j in range(2)] for i in range(3)]
    assert np.array_equal(together.reshape(-1, 3, 2), np.moveaxis(np.array(alone).reshape(3, 2, -1), -1, 0))


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: pt.tilt_total_variation(-1.0), "span is -1 somewhere; expected numbers in [0, inf]"),
    (lambda: pt.tilt_total_variation([1j]), "span has dtype complex128"),
    (lambda: pt.tilt_total_variation([True]), "span has dtype bool"),
    (lambda: pt.total_variation_from_ratios(1.5, 2.0), "low is 1.5 somewhere; expected numbers in [0, 1]"),
    (lambda: pt.total_variation_from_ratios(0.5, 0.75), "high is 0.75 somewhere; expected numbers in [1, inf]"),
    (lambda: pt.weight_interval(1.25, 1.0), "p is 1.25 somewhere"),
    (lambda: pt.tilt_by_deviation(P, [1.0, 2.0, 3.0], 1.0), "v has shape (3,); expected the keys of p, of shape (2,)"),
    (lambda: pt.box_interval(P, V, [-1.0, 0.0]), "error is -1 somewhere"),
    (lambda: pt.spread([1.0]), "v has shape (1,)"),
    (lambda: pt.spread([[1.0], [2.0]], [[1, 0]]), "seen is int64 of shape (1, 2); expected bool of shape (..., T, 2)"),
    (lambda: pt.spread([[1.0], [2.0]], [[True]]), "seen is bool of shape (1, 1)"),
    (lambda: pt.relative_total_variation(2.0), "error is 2 somewhere"),
    (lambda: pt.softcap_span(0.0, 1.0, 0.0), "cap is 0 somewhere; expected numbers above 0"),
    (lambda: pt.compose(1.5, 0.0), "dropped is 1.5 somewhere"),
    (lambda: pt.projection_deviation(P, V, 0), "rank is 0"),
    (lambda: pt.projection_deviation(P, V, 1, entries="cauchy"), "entries is 'cauchy'"),  # type: ignore[arg-type]
    (lambda: pt.chebyshev_radius(1.0, 0.0), "delta is 0 somewhere; expected numbers strictly between 0 and 1"),
    (lambda: pt.chebyshev_radius(1.0, 1.0), "delta is 1 somewhere"),
    (lambda: pt.chebyshev_radius(1.0, [0.5, -0.5]), "delta is -0.5 somewhere"),
    (lambda: pt.ball_diameter([1.0]), "x has shape (1,)"),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_nonsense_is_refused_in_a_sentence_that_names_it(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        call()


def test_nothing_moves_without_a_tilt() -> None:
    assert pt.tilt_total_variation(0.0) == pt.compose_tilt(0.0, 0.0) == pt.relative_total_variation(0.0) == 0.0
    assert pt.total_variation_from_ratios(1.0, 1.0) == pt.softcap_span(-2.0, 2.0, np.inf) == 0.0
    assert pt.weight_interval(0.25, 0.0) == (0.25, 0.25)
    assert pt.box_interval([0.5, 0.5], [1.0, 2.0], 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("span", [800.0, 1e6])
def test_a_tilt_without_limit_reaches_the_ends_and_no_further(span: float) -> None:
    assert pt.tilt_total_variation(span) == pt.compose_tilt(0.5, span) == 1.0
    assert pt.weight_interval([0.0, 0.5, 1.0], span)[0].tolist() == [0.0, 0.0, 1.0]
    assert pt.weight_interval([0.0, 0.5, 1.0], span)[1].tolist() == [0.0, 1.0, 1.0]
    assert pt.box_interval(P, V, span) == (-1.5, 0.5)
    assert pt.total_variation_from_ratios(0.0, np.inf) == 1.0
    assert pt.tilt_by_deviation(P, V, 2 * span) == pt.box_output(P, V, span) == np.inf
    assert pt.tilt_by_deviation(P, [2.0, 2.0], 2 * span) == pt.tilt_by_mean_deviation(P, [2.0, 2.0], span) == 0.0


def test_a_key_without_weight_moves_nothing() -> None:
    assert pt.box_interval([1.0, 0.0], [2.0, 9.0], [1.0, 5.0]) == (0.0, 0.0)
    assert pt.weight_interval(0.0, 3.0) == (0.0, 0.0)


def test_no_keys_move_nothing() -> None:
    none = np.zeros((2, 0))
    assert pt.spread(np.zeros((0, 3))).tolist() == [[0.0, 0.0, 0.0]]
    assert pt.ball_diameter(np.zeros((0, 3))) == 0.0
    for name in ("box_interval", "tilt_first_order"):
        assert [side.tolist() for side in ROWS[name](none, none, none)] == [[0.0, 0.0], [0.0, 0.0]]
    assert pt.signed_output(none, none, none).tolist() == [0.0, 0.0]
    assert pt.signed_output([], [], []) == 0.0


def test_nan_in_unseen_values_stays_unseen() -> None:
    v, seen = [[np.nan], [1.0], [4.0]], [[False, True, True], [False, False, False]]
    assert pt.spread(v, seen).tolist() == [[3.0], [0.0]]
    assert pt.trivial(v, [[2.0], [-0.5]], seen).tolist() == [[2.0], [0.5]]


def test_nan_is_never_mistaken_for_a_bound() -> None:
    assert np.isnan(pt.tilt_total_variation(np.nan))
    assert np.isnan(pt.compose(np.nan, 0.5))
    assert np.isnan(pt.box_output(P, [np.nan, 1.0], 1.0))
    assert np.isnan(pt.box_interval(P, [np.nan, 1.0], 1.0)).all()


def test_the_norms_of_the_jacobian_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        pt.JACOBIAN["2->2"] = 1.0  # type: ignore[index]
