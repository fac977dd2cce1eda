r"""The linear engine: attention whose weights are products of features, in time linear in the length.

.. math:: o_i = \frac{\phi(q_i)^\top S_i}{\phi(q_i)^\top z_i + \varepsilon}, \qquad
          S_i = \sum_{j < h_i} \phi(k_j) v_j^\top, \qquad z_i = \sum_{j < h_i} \phi(k_j)

Row i sees the first h_i keys, and h never falls from one row to the next: causal, padded and unmasked attention are
all of that form. The state (S, z) is carried over chunks of keys, each summed apart and then added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, masks
from refattn._mix import mix, rows_of
from refattn.arithmetic import Arithmetic
from refattn.heads import Leads, leads, matrix

CHUNK = 128
Feature = Any


class State(NamedTuple):
    """What the past leaves behind: s = Σ φ(k) vᵀ, (..., r, E), and z = Σ φ(k), (..., r)."""

    s: NDArray[np.float64]
    z: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One checked linear problem. `feature_map` has `of(x)` and `vjp(dphi, x)`; see `refattn.kernel.FeatureMap`."""

    q: Any
    k: Any
    v: Any
    feature_map: Feature
    pairs: masks.Pairs | None
    eps: float
    leads: Leads

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, S, E."""
        return self.q.shape[-2], self.k.shape[-2], self.v.shape[-1]

    def seen(self) -> NDArray[np.bool_]:
        """Return which pairs are seen, for a problem without leading axes."""
        T, S, _ = self.sizes
        return np.ones((T, S), bool) if self.pairs is None else self.pairs.seen(np.arange(T), np.arange(S))

    def ends(self, n: int) -> NDArray[np.int64]:
        """Return how many of the first keys each row of problem n sees."""
        T, S, _ = self.sizes
        if self.pairs is None:
            return np.full(T, S)
        pairs, ends = self.pairs.take(int(self.leads.of["mask"][n])), np.zeros(T, np.int64)
        for first in range(0, T, 4096):
            rows = slice(first, min(first + 4096, T))
            runs = pairs.runs(rows)
            each = np.diff(runs.indptr)
            if (each > 1).any() or runs.start.any():
                raise ValueError(_PREFIX)
            ends[rows][each == 1] = runs.stop
        if (np.diff(ends) < 0).any():
            raise ValueError(_PREFIX)
        return ends


_PREFIX = (
    "mask is not one that linear attention can use; expected rows that see the first keys, and never fewer than the "
    "row before (none, causal, lengths, prefix and their unions)"
)


def problem(q: ArrayLike, k: ArrayLike, v: ArrayLike | None, *, feature_map: Feature, eps: float, mask: Any) -> Problem:
    """Check a call once; without v, what is asked for is the weights."""
    q, k = _check.array("q", q, "T D"), _check.array("k", k, "S D")
    if v is None:
        v = k.lift(np.eye(k.shape[-2])) if isinstance(k, Arithmetic) else k[..., :0]
    v = _check.array("v", v, "S E")
    _check.size("k", k.shape[-1], q.shape[-1], "D", "q")
    _check.size("v", v.shape[-2], k.shape[-2], "S", "k")
    if not (hasattr(feature_map, "of") and hasattr(feature_map, "vjp")):
        raise TypeError(f"feature_map is {feature_map!r}; expected a refattn.kernel.FeatureMap")
    if _check.finite("eps", eps) < 0:
        raise ValueError(f"eps is {eps}; expected at least 0")
    pairs = masks.bind(mask, q.shape[-2], k.shape[-2])
    queries = {"q": q.shape[:-2]} | ({} if pairs is None else {"mask": pairs.lead})
    joined = leads(queries, {"k": k.shape[:-2], "v": v.shape[:-2]})
    return Problem(q=q, k=k, v=v, feature_map=feature_map, pairs=pairs, eps=float(eps), leads=joined)


def forward(call: Problem, backend: engines.Backend, state: State | None = None) -> tuple[Any, State | None]:
    """Return the output, and the state after the last key where one was given or T = S = 0 started one."""
    phi = call.feature_map.of
    if isinstance(call.q, Arithmetic):
        return call.q.linear_forward(phi(call.q), phi(call.k), call.v, call.seen(), call.eps), None
    if backend.name != "numpy":
        return engines.find("linear", backend).forward(call, backend, state)
    (T, _, E), lead = call.sizes, call.leads.shape
    o = np.zeros((*lead, T, E))
    r = phi(np.zeros((1, call.q.shape[-1]))).shape[-1]
    after = State(np.zeros((*lead, r, E)), np.zeros((*lead, r)))
    if state is not None:
        after = State(np.broadcast_to(state.s, after.s.shape).copy(), np.broadcast_to(state.z, after.z.shape).copy())
    for n in range(math.prod(lead)):
        at = np.unravel_index(n, lead)
        carried = np.c_[after.s[at], after.z[at]]
        carried = _sweep(call, n, carried, matrix(o, n), state is not None)[0]
        after.s[at], after.z[at] = carried[:, :-1], carried[:, -1]
    return o, after


def backward(call: Problem, do: Any, backend: engines.Backend) -> tuple[Any, Any, Any]:
    """Return gradients with respect to q, k and v."""
    (T, _, E), lead, of = call.sizes, call.leads.shape, call.leads.of
    do = _check.array("do", do, "T E")
    if do.shape != (*lead, T, E):
        raise ValueError(f"do has shape {do.shape}; expected the output's, {(*lead, T, E)}")
    phi, pull = call.feature_map.of, call.feature_map.vjp
    if isinstance(call.q, Arithmetic):
        to_q, to_k, dv = call.q.linear_backward(phi(call.q), phi(call.k), call.v, call.seen(), call.eps, do)
        return pull(to_q, call.q), pull(to_k, call.k), dv
    if backend.name != "numpy":
        return engines.find("linear", backend).backward(call, do, backend)
    dq, dk, dv = np.zeros(call.q.shape), np.zeros(call.k.shape), np.zeros(call.v.shape)
    for n in range(math.prod(lead)):
        r = phi(np.zeros((1, call.q.shape[-1]))).shape[-1]
        into = (matrix(x, of[name][n]) for name, x in (("q", dq), ("k", dk), ("v", dv)))
        _reverse(call, n, np.zeros((r, E + 1)), matrix(do, n), *into)
    return dq, dk, dv


def _ones(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Append the column of ones whose weighted sum is the normaliser."""
    return np.concatenate([v, np.ones((len(v), 1))], axis=1)


def _operands(call: Problem, n: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    of = call.leads.of
    return matrix(call.q, of["q"][n]), matrix(call.k, of["k"][n]), matrix(call.v, of["v"][n])


def _spans(first: int, last: int) -> list[NDArray[np.intp]]:
    return [np.arange(a, min(a + CHUNK, last)) for a in range(first, last, CHUNK)]


def _sweep(
    call: Problem,
    n: int,
    state: NDArray[np.float64],
    o: NDArray[np.float64],
    started: bool,
    do: NDArray[Any] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Fill o from first row to last; with `do`, also return g = (do/den, −do·o/den) and the gradient of φ(q)."""
    (q, k, v), phi, ends = _operands(call, n), call.feature_map.of, call.ends(n)
    T, S, E = len(q), len(k), v.shape[1]
    g = np.zeros((0 if do is None else T, E + 1))
    dphi = np.zeros((0 if do is None else T, len(state)))
    done = 0
    for rows in _spans(0, T):
        first, last = int(ends[rows[0]]), int(ends[rows[-1]])
        for keys in _spans(done, first):
            state = state + phi(rows_of(k, keys)).T @ _ones(rows_of(v, keys))
        keys = np.arange(first, last)
        seen = keys < ends[rows][:, None]
        fq, fk, vk = phi(rows_of(q, rows)), phi(rows_of(k, keys)), _ones(rows_of(v, keys))
        both = fq @ state + mix(np.where(seen, fq @ fk.T, 0.0), vk, seen)
        sees = (ends[rows] > 0)[:, None] | started
        den = np.where(sees, both[:, -1:] + call.eps, 1.0)
        o[rows] = np.where(sees, both[:, :-1] / den, 0.0)
        if do is not None:
            cotangent = np.where(sees, rows_of(do, rows), 0.0)
            g[rows] = np.c_[cotangent, -(cotangent * o[rows]).sum(1)] / den
            dphi[rows] = np.where(sees, g[rows] @ state.T + mix(np.where(seen, g[rows] @ vk.T, 0.0), fk, seen), 0.0)
        if last > first:
            state = state + fk.T @ vk
        done = last
    for keys in _spans(done, S) if started else ():
        state = state + phi(rows_of(k, keys)).T @ _ones(rows_of(v, keys))
    return state, g, dphi


def _reverse(
    call: Problem,
    n: int,
    state: NDArray[np.float64],
    do: NDArray[Any],
    dq: NDArray[np.float64],
    dk: NDArray[np.float64],
    dv: NDArray[np.float64],
) -> None:
    """Add the gradients of one problem, from last row to first."""
    (q, k, v), ends = _operands(call, n), call.ends(n)
    phi, pull = call.feature_map.of, call.feature_map.vjp
    _, g, dphi = _sweep(call, n, state, np.zeros((len(q), v.shape[1])), False, do)
    for rows in _spans(0, len(q)):
        dq[rows] += np.where((ends[rows] > 0)[:, None], pull(dphi[rows], rows_of(q, rows)), 0.0)
    later = np.zeros_like(state)
    for rows in reversed(_spans(0, len(q))):
        first, last = int(ends[rows[0]]), int(ends[rows[-1]])
        before = int(ends[rows[0] - 1]) if rows[0] else 0
        fq = np.where((ends[rows] > 0)[:, None], phi(rows_of(q, rows)), 0.0)
        keys = np.arange(first, last)
        seen = keys < ends[rows][:, None]
        _pull_keys(k, v, keys, later, dk, dv, phi, pull, fq, g[rows], seen)
        later = later + fq.T @ g[rows]
        for keys in reversed(_spans(before, first)):
            _pull_keys(k, v, keys, later, dk, dv, phi, pull)


def _pull_keys(
    k: NDArray[Any],
    v: NDArray[Any],
    keys: NDArray[np.intp],
    later: NDArray[np.float64],
    dk: NDArray[np.float64],
    dv: NDArray[np.float64],
    phi: Any,
    pull: Any,
    fq: NDArray[np.float64] | None = None,
    g: NDArray[np.float64] | None = None,
    seen: NDArray[np.bool_] | None = None,
) -> None:
    """Add what later rows, and the chunk's own rows where given, send to these keys."""
    if len(keys) == 0:
        return
    x, vk = rows_of(k, keys), _ones(rows_of(v, keys))
    fk = phi(x)
    to_v, to_fk = fk @ later, vk @ later.T
    if fq is not None and g is not None and seen is not None:
        to_v = to_v + mix(np.where(seen, fq @ fk.T, 0.0).T, g, seen.T)
        to_fk = to_fk + mix(np.where(seen, g @ vk.T, 0.0).T, fq, seen.T)
    dv[keys] += to_v[:, :-1]
    dk[keys] += pull(to_fk, x)
