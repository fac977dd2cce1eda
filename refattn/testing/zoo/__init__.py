"""The bug zoo: a flash-style kernel that is right, and named mutants of it that are wrong, to try judges with.

>>> MUTANTS["lse in bits"].doc
'Lse is a logarithm to the base 2.'
"""

from refattn.testing.zoo import backward, held_out, more, online, sight, wiring
from refattn.testing.zoo._mutant import MUTANTS, Mutant
from refattn.testing.zoo.kernel import Kernel

__all__ = ["MUTANTS", "Kernel", "Mutant", "backward", "held_out", "more", "online", "sight", "wiring"]
