"""For tests of attention, refattn's and yours: a judge that takes a derived bound, and balls that enclose the truth."""

from refattn.testing._judge import assert_within
from refattn.testing.ball import Ball

__all__ = ["Ball", "assert_within"]
