"""`refattn.partial.merge`: what it takes, what it answers in, what it refuses. That it is the whole: test_laws.py."""

import ml_dtypes
import numpy as np
import pytest

from refattn import partial, rounding
from refattn.partial import Partial
from refattn.testing import Ball, assert_within

OUT, LSE = np.array([[1.0], [2.0]]), np.zeros(2)
OTHER = np.array([[2.0], [5.0]])
MEAN, BOTH = [[1.5], [3.5]], np.full(2, np.log(2.0))
LOGS = 2 * rounding.EXP * BOTH  # two logarithms of 2


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint64, np.float16, ml_dtypes.bfloat16, np.float64, ">f8"])
def test_what_is_not_float32_is_merged_in_float64(dtype):
    merged = partial.merge(*(Partial(o.astype(dtype), LSE.astype(dtype)) for o in (OUT, OTHER)))
    assert (merged.o == MEAN).all()
    assert_within(merged.lse, BOTH, LOGS)
    assert merged.o.dtype == merged.lse.dtype == np.float64


def test_lists_are_merged():
    merged = partial.merge(Partial(OUT.tolist(), [0, 0]), Partial(OTHER.tolist(), [0.0, 0.0]))
    assert (merged.o == MEAN).all()
    assert_within(merged.lse, BOTH, LOGS)


def test_float32_stays_float32_among_its_own():
    narrow = Partial(OUT.astype(np.float32), LSE.astype(np.float32))
    assert {x.dtype.name for x in partial.merge(narrow, narrow)} == {"float32"}
    assert {x.dtype.name for x in partial.merge(narrow, Partial(OTHER, LSE))} == {"float64"}


def test_shapes_of_parts_broadcast():
    merged = partial.merge(
        Partial(OUT, LSE), Partial(np.full((3, 1, 1), 5), [[0]]), Partial(np.zeros((1, 4)), [-np.inf])
    )
    assert (merged.o == np.broadcast_to([[3.0], [3.5]], (3, 2, 4))).all()
    assert_within(merged.lse, BOTH[None], LOGS)


@pytest.mark.parametrize(
    ("parts", "error", "sentence"),
    [
        ([Partial(OUT, LSE), Partial(np.ones((3, 1)), np.zeros(3))], ValueError, r"parts\[1\] has o of shape \(3, 1\)"),
        ([Partial(np.ones((2, 2, 1)), np.zeros((3, 2)))], ValueError, r"parts\[0\] .* lse of shape \(3, 2\)"),
        ([Partial(OUT, LSE), Partial(OUT, np.zeros(3))], ValueError, r"parts\[1\]\.lse has shape \(3,\)"),
        ([Partial(OUT, 0.0)], ValueError, r"parts\[0\]\.lse has shape \(\); expected at least 1 axes"),
        ([Partial(OUT[0], LSE)], ValueError, r"parts\[0\]\.o has shape \(1,\); expected at least 2 axes"),
        ([Partial([[1.0], [2.0, 3.0]], LSE)], ValueError, r"parts\[0\]\.o is ragged"),
        ([Partial(OUT, LSE), Partial(OUT, LSE > 0)], TypeError, r"parts\[1\]\.lse has dtype bool"),
        ([Partial(OUT * 1j, LSE)], TypeError, r"parts\[0\]\.o has dtype complex128"),
        ([Partial(np.ma.masked_array(OUT), LSE)], TypeError, r"parts\[0\]\.o is a masked array"),
        ([Partial(Ball.lift(OUT), LSE)], TypeError, r"parts\[0\]\.o is a Ball"),
        ([(OUT, LSE)], TypeError, r"parts\[0\] is a tuple; expected a Partial"),
    ],
)
def test_what_does_not_merge_is_refused_by_name(parts, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        partial.merge(*parts)
    assert "\n" not in str(caught.value)
