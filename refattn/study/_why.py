"""What explains the error of a row, in one sentence, from its weights: never from what the method is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from refattn.study._look import Worst

Array = NDArray[np.float64]
MOST = 0.5
"""What part explains most of an error."""


def why(worst: Worst, p: Array, own: Array | None, drawn: float) -> str:
    """Name what explains most of an error.

    Parameters
    ----------
    worst
        All but its `why`.
    p, own
        Exact weights and the method's of the keys that the row sees; None where the method's are not of keys.
    drawn
        The draw's part of the mean square error over fresh draws; 0 where nothing is drawn.
    """
    if not np.isfinite(worst.error):
        return "Its answer or the error is not finite."
    if worst.error == 0:
        return "Its error is within rounding."
    parts, total = {"drawn": drawn}, 0.0
    if own is not None and worst.dropped is not None and worst.variation:
        total = float(own.sum())
        parts |= {"dropped": worst.dropped / worst.variation, "excess": abs(total - p.sum()) / 2 / worst.variation}
    most = max(parts, key=parts.__getitem__)
    if parts[most] < MOST:
        return _shape(worst, own)
    if most == "drawn":
        return f"Most of its error is the draw's: deviation {worst.deviation:.2g}, error {worst.error:.2g}."
    if most == "excess":
        return f"Its weights sum to {total:.3g}, not to 1."
    return f"It drops {_percent(worst.dropped)} of the row's softmax mass."


def effective(p: Array) -> float:
    """Return the effective number of keys: the exponential of the entropy of weights that sum to 1; 0 without any."""
    heavy = p[p > 0]
    return float(np.exp(-(heavy * np.log(heavy)).sum())) if len(heavy) else 0.0


def _shape(worst: Worst, own: Array | None) -> str:
    """Say how weights differ that drop little, sum to 1 or nearly, and are much the same in every draw."""
    if own is None:
        return "Its weights multiply something else than v: it computes another answer than softmax."
    if not (own > 0).all():
        return f"Its weights are off softmax's by {worst.variation:.2g}, half the absolute sum of differences."
    nats = float(np.ptp(np.log(own)))
    if min(nats, worst.span) < MOST * max(nats, worst.span):
        return f"Its kernel is far from exp: weights span {nats:.2g} nats where logits span {worst.span:.2g}."
    spread = f"over {effective(own / own.sum()):.2g} effective keys rather than {worst.keys:.2g}"
    return f"It gives {_percent(worst.variation)} of the weight to other keys than softmax does, {spread}."


def _percent(part: float | None) -> str:
    if part is None:
        return "none"
    return f"{100 * part:.0f} %" if part >= 0.1 else f"{100 * part:.2g} %"
