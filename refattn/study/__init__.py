"""How far each efficient attention is from exact softmax on your own q, k and v, and how far it could be at worst.

`compare` measures every method of the table over its budgets, `target` looks for the cheapest that meets an error, and
`report` writes a page about what was measured; `sample` is a small real capture to try it on. `show` draws one method
beside exact softmax on fifty points. The command line says ``refattn study`` and ``refattn show``. Rich, Matplotlib and
Jinja2 are imported by the functions that draw.
"""

from refattn.study._compare import compare
from refattn.study._read import Capture, read, sample
from refattn.study._report import report
from refattn.study._show import Shown, show
from refattn.study._table import Head, Row, Setting, Table, write_csv
from refattn.study._target import Targets, target

__all__ = [
    "Capture",
    "Head",
    "Row",
    "Setting",
    "Shown",
    "Table",
    "Targets",
    "compare",
    "read",
    "report",
    "sample",
    "show",
    "target",
    "write_csv",
]
