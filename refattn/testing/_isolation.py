"""What is wrong, from which calls a kernel answers wrongly and which it answers rightly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from refattn.conventions import Call, Convention

FEATURES: tuple[tuple[str, str, Callable[[Call], bool]], ...] = (
    ("empty rows", "rows see nothing", lambda call: bool(call.under(Convention()).empty.any())),
    ("softcap", "a softcap is given", lambda call: call.softcap is not None),
    ("sink", "sinks are given", lambda call: call.sink is not None),
    ("bias", "a bias is given", lambda call: call.bias is not None),
    ("ALiBi", "ALiBi's slopes are given", lambda call: call.slopes is not None),
    ("window shape", "a window is given", lambda call: call.window is not None),
    ("mask broadcast", "a mask is given", lambda call: call.mask is not None),
    ("lengths", "lengths are given", lambda call: call.lengths is not None),
    ("packing", "sequences are packed", lambda call: call.starts is not None),
    ("heads", "heads are grouped", lambda call: np.ndim(call.q) > 2 and np.shape(call.q)[-3] != np.shape(call.k)[-3]),
    ("layout", "arrays are views", lambda call: not all(np.asarray(x).flags.c_contiguous for x in (call.q, call.k))),
    ("head dim", "v has another width than k", lambda call: np.shape(call.v)[-1] != np.shape(call.k)[-1]),
    ("head dim", "8 does not divide the width", lambda call: np.shape(call.q)[-1] % 8 != 0),
    ("scale", "a scale is given", lambda call: call.scale is not None),
    ("causal alignment", "causal is asked", lambda call: call.causal),
    (
        "row positions",
        "positions count",
        lambda call: call.causal or call.window is not None or call.slopes is not None,
    ),
)
"""By what a call may have: the class of bugs that it points to, and the words for it."""


def isolated(wrong: Sequence[Call], right: Sequence[Call]) -> tuple[str, str] | None:
    """Return the class, and the words, of what all wrongly answered calls have and fewest rightly answered ones.

    None where they have nothing in common that any rightly answered call lacks.

    Examples
    --------
    >>> x = np.ones((1, 2, 8))
    >>> isolated([Call(q=x, k=x, v=x, softcap=1.0)], [Call(q=x, k=x, v=x)])
    ('softcap', 'a softcap is given')
    """
    shared = [(kind, words, has) for kind, words, has in FEATURES if wrong and all(map(has, wrong))]
    counted = [(sum(map(has, right)), n) for n, (_, _, has) in enumerate(shared)]
    if not counted or min(counted)[0] == len(right):
        return None
    kind, words, _ = shared[min(counted)[1]]
    return kind, words
