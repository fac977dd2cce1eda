"""Every proof file computes its balls with 200 bits."""

from collections.abc import Iterator

import pytest

from refattn.testing.ball import precision


@pytest.fixture(autouse=True, scope="module")
def exactly() -> Iterator[None]:
    with precision():
        yield
