"""For tests of attention, refattn's and yours.

`check` asks a function everything and `judge` judges one answer, by a bound that is derived: how far a kernel of a
stated arithmetic may be from the real number. `assert_within` takes a bound of your own; balls enclose the truth.
"""

import importlib
from typing import TYPE_CHECKING, Any

from refattn.testing._arithmetic import PRESETS, Arithmetic
from refattn.testing._formats import FORMATS, Format
from refattn.testing._judge import assert_within
from refattn.testing._tolerance import Tolerance, tolerance
from refattn.testing._typical import typical
from refattn.testing.ball import Ball

if TYPE_CHECKING:
    from refattn.testing._attention import assert_attention, judge
    from refattn.testing._golden import golden
    from refattn.testing._kit import check, conformance
    from refattn.testing._report import Report
    from refattn.testing._verdicts import Verdict

__all__ = [
    "FORMATS",
    "PRESETS",
    "Arithmetic",
    "Ball",
    "Format",
    "Report",
    "Tolerance",
    "Verdict",
    "assert_attention",
    "assert_within",
    "check",
    "conformance",
    "golden",
    "judge",
    "tolerance",
    "typical",
]
_LATER = {
    "Report": "_report",
    "Verdict": "_verdicts",
    "assert_attention": "_attention",
    "check": "_kit",
    "conformance": "_kit",
    "golden": "_golden",
    "judge": "_attention",
}


def __getattr__(name: str) -> Any:
    """Import the judge and the kit when they are asked for: the pytest plugin stands in this room."""
    if name in _LATER:
        return getattr(importlib.import_module(f"refattn.testing.{_LATER[name]}"), name)
    raise AttributeError(f"module 'refattn.testing' has no attribute {name!r}")
