"""The sweep: every method over its budgets, against exact attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from refattn import _check
from refattn.masks import MaskLike
from refattn.study._draws import Trials
from refattn.study._run import Run, one_thread, silent
from refattn.study._sweep import Inputs
from refattn.study._table import Row, Setting, Table


def compare(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: MaskLike = None,
    scale: float | None = None,
    methods: Sequence[str] | None = None,
    budgets: Mapping[str, Sequence[Any]] | None = None,
    cost: float | None = None,
    rows: int | None = None,
    seed: int = 0,
    delta: float = 0.05,
    trials: int = 200,
    trial_rows: int = 4,
    title: str = "",
    layers: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
    partial: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    r"""Measure how far each efficient attention is from exact softmax on these arrays, and check its bound.

    Each method is swept over the typical values of its budget, its other options at their defaults. A method that takes
    the mask is measured against exact attention with that mask; one that cannot, such as Linformer, against unmasked
    attention; one that is causal whatever the mask, such as Sparse Transformer, against causal attention; the row says
    so. Cost is always a part of exact attention with the mask, so that it compares across rows; without a mask, what a
    causal method saves by being causal is in it. A bound holds where, in every element,

    .. math:: |\mathrm{fl}(\tilde o) - \mathrm{fl}(o)| \le \mathrm{bound} + \mathrm{rounding}

    with the rounding of both answers, derived from the arrays by `refattn.rounding.allowance`, and of the bound itself.
    Where an answer or its rounding is not finite, as when logits or values overflow, there is nothing to compare. A
    method that approximates nothing, or of which nothing is claimed, has errors and no bound.

    A claim over the draw, that the inequality holds with probability 1 − δ in each element, has rows of its own: it is
    tried in fresh draws on some rows of every head, and convicted where an element fails in more of them than the
    binomial distribution lets a true claim, but for a probability of 10⁻⁹ over all elements of the table. At δ = 0.05
    and 200 draws that is 41 failures at 10⁵ elements: half the quantile of a normal error, which fails in a third of
    all draws, is convicted at any one element with probability 0.9999.

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    mask : Mask or (..., T, S) of bool, optional
        Which pairs are seen; see `refattn.masks`.
    scale : float, optional
        The scale of the exact attention; the real number 1/√D unless given.
    methods : sequence of str, optional
        Names from the table of methods; all of them unless given.
    budgets : mapping of str to sequence of int, optional
        By method, the budgets to sweep instead of the typical ones, such as ``{"longformer": (64, 256)}``.
    cost : float, optional
        Measure only what costs at most this part of exact attention.
    rows : int, optional
        Measure only this many rows, drawn without replacement and the same for all heads, with exact attention on
        those rows: for long contexts. Left out are then methods whose rows cannot be answered alone, what is fitted to
        all rows, and, beyond 4096 keys, claims over the draw.
    seed : int
        Seeds the generators of what methods draw for each head, of the draws on which claims are tried, and of the
        rows.
    delta : float
        δ of the claims over the draw.
    trials : int
        In how many draws such claims are tried.
    trial_rows : int
        On how many of the measured rows of each head.
    title : str
        What the table is called.
    layers : sequence of str, optional
        Labels of the first leading axis, of at least two.
    tokens : sequence of str, optional
        The keys' tokens.
    partial : bool
        Whether a `KeyboardInterrupt` ends the study with the rows that are done, in a table marked partial, rather
        than with nothing.
    progress : callable, optional
        Called with (done, total) before the first problem and after each.

    Returns
    -------
    Table

    Raises
    ------
    ValueError, TypeError
        Arrays that do not fit, hold NaN or infinity, or are empty; an unknown method; fewer trials than it takes to
        convict anything.

    Examples
    --------
    >>> from refattn import masks, study
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 4))
    >>> table = study.compare(q, k, v, mask=masks.causal(), methods=["longformer", "linear_transformer"])
    >>> [row.budget for row in table.rows]
    ['window=1', 'window=2', 'window=1', 'window=2', '']
    >>> all(row.holds for row in table.rows)
    True
    """
    seed = _check.integer("seed", seed, 0)
    inputs = Inputs(q, k, v, mask, scale, rows=rows, seed=seed)
    most = math.inf if cost is None else _check.positive("cost", cost)
    labels = _labels("layers", layers, inputs.shape[0] if len(inputs.shape) > 1 else 0)
    words = _labels("tokens", tokens, inputs.sizes["S"])
    run = Run(inputs, methods, budgets, seed)
    claims = Trials(run, delta=delta, rows=trial_rows, trials=trials)
    report, total, done = progress or silent, (len(run.plan) + len(claims.plan)) * inputs.heads, 0
    setting = Setting(
        sizes=inputs.sizes,
        heads=inputs.shape,
        mask=None if inputs.whole is None else str(inputs.whole.mask),
        scale=scale,
        rows=tuple(map(int, inputs.rows)) if inputs.sampled else None,
        seed=seed,
        delta=claims.delta,
        trials=claims.trials,
        cost=cost,
        layers=labels,
        tokens=words,
    )

    def step() -> None:
        nonlocal done
        done += 1
        report(done, total)

    report(0, total)
    found, stopped = list[Row](), False
    try:
        with np.errstate(all="ignore"), one_thread():  # the table says what is not finite
            for sweep, claim in [*((sweep, None) for sweep in run.plan), *claims.plan]:
                if run.cost(sweep) > most:
                    for _ in range(inputs.heads):
                        step()
                else:
                    found.append(run.measure(sweep, step) if claim is None else claims.row(sweep, claim, step))
    except KeyboardInterrupt:
        if not partial:
            raise
        stopped = True
    return Table(found, title, setting=setting, partial=stopped, left_out=run.left_out, run=run)


def _labels(name: str, given: Sequence[str] | None, length: int) -> tuple[str, ...] | None:
    if given is None:
        return None
    if isinstance(given, str) or len(given) != length:
        got = repr(given) if isinstance(given, str) else f"of length {len(given)}"
        expected = f"{length} strings" if length else "None, as there are not two leading axes"
        raise ValueError(f"{name} is {got}; expected {expected}")
    return tuple(map(str, given))
