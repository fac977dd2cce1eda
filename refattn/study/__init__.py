"""How far each efficient attention is from exact softmax on your own q, k and v, and how far it could be at worst.

`compare` measures every method of the table over its budgets; `sample` is a small real capture to try it on. `show`
draws one method beside exact softmax on fifty points. The command line says ``refattn study`` and ``refattn show``.
Rich and Matplotlib are imported by the functions that draw.
"""

from refattn.study._compare import compare
from refattn.study._plot import plot
from refattn.study._read import Capture, read, sample
from refattn.study._show import Shown, show
from refattn.study._table import Row, Table, write_csv
from refattn.study._target import Targets, target

__all__ = [
    "Capture",
    "Row",
    "Shown",
    "Table",
    "Targets",
    "compare",
    "plot",
    "read",
    "sample",
    "show",
    "target",
    "write_csv",
]
