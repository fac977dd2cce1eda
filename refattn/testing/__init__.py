"""For tests of attention, refattn's and yours.

A judge that takes a derived bound, balls that enclose the truth, and the bound itself: how far a kernel of a stated
arithmetic may be from the real number.
"""

from refattn.testing._arithmetic import PRESETS, Arithmetic
from refattn.testing._formats import FORMATS, Format
from refattn.testing._judge import assert_within
from refattn.testing._tolerance import Tolerance, tolerance
from refattn.testing._typical import typical
from refattn.testing.ball import Ball

__all__ = ["FORMATS", "PRESETS", "Arithmetic", "Ball", "Format", "Tolerance", "assert_within", "tolerance", "typical"]
