"""The sparse methods' patterns and values on problems small enough to write out."""

import numpy as np
import pytest

from refattn import masks
from refattn.sparse import local_global, sparse_transformer


def shown(weights):
    return ["".join(".x"[int(w > 0)] for w in row) for row in weights]


STRIDED = {  # l = 3
    "first": ["x......", "xx.....", "xxx....", ".xxx...", "..xxx..", "...xxx.", "....xxx"],
    "second": ["x......", ".x.....", "..x....", "x..x...", ".x..x..", "..x..x.", "x..x..x"],
    "merged": ["x......", "xx.....", "xxx....", "xxxx...", ".xxxx..", "..xxxx.", "x..xxxx"],
}
FIXED = {  # l = 4, c = 2
    "first": ["x......", "xx.....", "xxx....", "xxxx...", "....x..", "....xx.", "....xxx"],
    "second": [".......", ".......", "..x....", "..xx...", "..xx...", "..xx...", "..xx..x"],
    "merged": ["x......", "xx.....", "xxx....", "xxxx...", "..xxx..", "..xxxx.", "..xxxxx"],
}


@pytest.mark.parametrize("part", STRIDED)
def test_the_sparse_transformers_patterns_are_those_of_the_paper(part):
    x = np.zeros((7, 1))
    assert shown(sparse_transformer.weights(x, x, length=3, part=part)) == STRIDED[part]
    assert shown(sparse_transformer.weights(x, x, pattern="fixed", length=4, columns=2, part=part)) == FIXED[part]


@pytest.mark.parametrize(("pattern", "want"), [("strided", STRIDED), ("fixed", FIXED)])
def test_fewer_rows_than_keys_are_the_last_rows(pattern, want):
    length, columns = (3, 1) if pattern == "strided" else (4, 2)
    got = sparse_transformer.weights(
        np.zeros((2, 1)), np.zeros((7, 1)), pattern=pattern, length=length, columns=columns
    )
    assert shown(got) == want["merged"][-2:]


def test_heads_take_the_parts_in_turn():
    x = np.zeros((3, 7, 1))
    w = sparse_transformer.weights(x, x, length=3, part="alternate")
    assert [shown(one) for one in w] == [STRIDED[part] for part in ("first", "second", "first")]
    grouped = sparse_transformer.weights(np.zeros((2, 4, 7, 1)), np.zeros((2, 2, 7, 1)), length=3, part="alternate")
    assert [shown(one) for one in grouped[1]] == [STRIDED[part] for part in ("first", "second") * 2]


def test_heads_in_turn_meet_a_mask_of_each_head():
    x, few = np.zeros((2, 4, 1)), masks.lengths([2, 3])
    w = sparse_transformer.weights(x, x, length=2, part="alternate", mask=few)
    assert [shown(one) for one in w] == [["x...", "xx..", ".x..", "...."], ["x...", ".x..", "x.x.", ".x.."]]


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_heads_in_turn_cost_what_the_dearer_costs(pattern):
    first, second, both = (
        sparse_transformer.cost(16, 16, 2, 2, pattern=pattern, length=4, part=part)
        for part in ("first", "second", "alternate")
    )
    assert both == max(first, second)


def test_a_block_and_positions_that_all_rows_see():
    x = np.zeros((5, 1))
    w = local_global.weights(x, x, positions=[4, 1], block=2)
    assert shown(w) == ["xx..x", "xx..x", ".xxxx", ".xxxx", ".x..x"]
    assert local_global.cost(5, 5, 2, 2, positions=[4, 1], block=2).pairs == (w > 0).sum()
    assert local_global.cost(5, 5, 2, 2, positions=[4, 1], block=2, form="sum").pairs == 9 + 10


def test_a_position_that_is_named_twice_is_seen_once():
    x, v = np.zeros((2, 1)), [[2.0], [6.0]]
    assert local_global.attend(x, x, v, positions=[1, 1], block=1).tolist() == [[4.0], [6.0]]


@pytest.mark.parametrize(("keys", "block"), [(0, 1), (1, 1), (2, 1), (3, 2), (6, 2), (7, 3), (100, 10)])
def test_a_block_is_the_root_of_the_number_of_keys_unless_given(keys, block):
    x = np.zeros((keys, 1))
    given, own = (local_global.weights(x, x, positions=[], block=b) for b in (block, None))
    assert (given == own).all()
