"""Complexity: what each method's own code does is what its `cost` says, and a wrong claim is found out."""

import math
import types

import pytest

from benchmarks import complexity
from benchmarks.complexity import Fit, fit, variants, verdict
from benchmarks.counted import count
from refattn import masks, method, rounding
from refattn.testing import assert_within

SIZES = [{"T": 5, "S": 7, "D": 3, "E": 2}, {"T": 9, "S": 4, "D": 1, "E": 3}]


@pytest.mark.parametrize("sizes", SIZES, ids=["T<S", "T>S"])
@pytest.mark.parametrize("name", method.modules())
def test_the_products_of_a_method_are_those_that_its_cost_says(name, sizes):
    for label, one in variants(name, sizes):
        assert count(one)[0].products == one.cost().flops, label


@pytest.mark.parametrize("name", method.modules())
def test_what_is_counted_is_the_answer(name):
    for _, one in variants(name, SIZES[0]):
        verb, arrays, options = one.arguments()
        error = rounding.allowance(verb, *arrays, **options)
        assert_within(count(one)[1].floats(), one.attend(), 2 * error)


def test_pairs_are_counted_by_asking_the_mask_for_each():
    size, mask = {"T": 4, "S": 4, "D": 2, "E": 1}, masks.causal() & masks.window(1, 0)
    one = complexity.call(method.modules()["softmax"], size, mask=mask)
    assert count(one)[0].products == 2 * (1 + 2 + 2 + 2) * 3


def test_a_cost_that_is_off_by_one_is_told(monkeypatch, capsys):
    softmax = method.modules()["softmax"]
    assert complexity.tally("softmax")
    cost = softmax.cost
    monkeypatch.setattr(softmax, "cost", lambda *sizes, **options: cost(*sizes, **options)._replace(flops=1))
    assert not complexity.tally("softmax")
    assert "differs" in capsys.readouterr().out


@pytest.mark.parametrize("power", [1, 2])
def test_the_slope_of_a_power_is_its_exponent(power):
    found = fit([1, 2, 4, 8, 16, 32], [3 * n**power for n in (1, 2, 4, 8, 16, 32)])
    room = rounding.gamma(64) * math.log(3 * 32**power)  # of logarithms, and sums of six of them
    assert abs(found.slope - power) <= room and found.half <= complexity.STUDENT * room


def test_the_interval_covers_19_slopes_in_20():
    """The quantile of Student's t with 4 degrees of freedom, whose distribution function is algebraic."""
    x = complexity.STUDENT / math.sqrt(4 + complexity.STUDENT**2)
    assert complexity.LENGTHS == 6
    assert abs(0.5 + x * (3 - x * x) / 4 - 0.975) <= 0.0005 * 3 / 8  # the digits given, times the largest density


@pytest.mark.parametrize(
    "claimed, found, said",
    [
        (1, Fit(1.1, 0.1), "within"),
        (1, Fit(1.5, 0.2), "above"),
        (1, Fit(1.4, 0.2), "within"),
        (1, Fit(1.4, 0.3), "unsure"),
        (2, Fit(1.5, 0.2), "below"),
        (1, Fit(2.0, 0.5), "above"),
    ],
)
def test_a_verdict_is_what_the_interval_says(claimed, found, said):
    assert verdict(claimed, found) == said


@pytest.mark.parametrize("power, good", [(0.5, True), (1, True), (1.4, False), (2, False)])
def test_time_that_grows_faster_than_is_claimed_is_told(power, good, monkeypatch, capsys):
    monkeypatch.setattr(complexity, "MOST", 1024)
    monkeypatch.setattr(complexity, "medians", lambda works, *_: {n: int(n) ** power for n in works})
    assert complexity.measure("linear_transformer", {}) is good
    said = capsys.readouterr().out.split()[-1]
    assert said == {0.5: "below", 1: "within"}.get(power, "above")


@pytest.mark.parametrize("counted, slopes, code", [(True, 0, 0), (False, 0, 1), (True, 1, 1)])
def test_one_half_that_fails_fails_the_table(counted, slopes, code, monkeypatch):
    monkeypatch.setattr(complexity, "tally", lambda name: counted)
    monkeypatch.setattr(complexity.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=slopes))
    monkeypatch.setattr(complexity.sys, "argv", ["complexity"])
    assert complexity.main() == code
