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
from refattn.heads import Leads, leads, matrix
from refattn.lifted import Lifted

CHUNK = 128
Array = NDArray[np.float64]
Ints = NDArray[np.int64]


class State(NamedTuple):
    """What the past leaves behind: s = Σ φ(k) vᵀ, (..., r, E), and z = Σ φ(k), (..., r)."""

    s: Any
    z: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One checked linear problem.

    Row i of `ends`, which has the mask's leading axes, sees that many of the first keys. `feature_map` has ``of(x)``
    and ``vjp(dphi, x)``; see `refattn.kernel.FeatureMap`. `state` is what came before the first key.
    """

    q: Any
    k: Any
    v: Any
    feature_map: Any
    ends: Ints
    eps: float
    state: State | None
    leads: Leads

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """T, S, r, E."""
        features = self.feature_map.of(np.zeros((1, self.q.shape[-1]))).shape[-1]
        return self.q.shape[-2], self.k.shape[-2], features, self.v.shape[-1]

    def seen(self) -> NDArray[np.bool_]:
        """Return which pairs are seen, (T, S), for a problem without leading axes."""
        S = int(self.k.shape[-2])
        return np.arange(S) < self.ends[:, None]

    def one(self, n: int) -> tuple[Any, Any, Any, Ints]:
        """Return q, k, v and the ends of problem n, as views."""
        of = self.leads.of
        q, k, v = (matrix(x, of[s][n]) for s, x in (("q", self.q), ("k", self.k), ("v", self.v)))
        return q, k, v, self.ends[np.unravel_index(of["mask"][n], self.ends.shape[:-1])]


def problem(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    feature_map: Any,
    eps: float,
    mask: Any = None,
    state: State | None = None,
) -> Problem:
    """Check a call once; v may be `_check.WEIGHTS`."""
    q, k, v = _check.qkv(q, k, v)
    if not (hasattr(feature_map, "of") and hasattr(feature_map, "vjp")):
        raise TypeError(f"feature_map is {feature_map!r}; expected a refattn.kernel.FeatureMap")
    if _check.finite("eps", eps) < 0:
        raise ValueError(f"eps is {eps}; expected at least 0")
    T, S = q.shape[-2], k.shape[-2]
    pairs = masks.bind(mask, T, S)
    ends = np.full(T, S) if pairs is None else masks.prefix_ends(pairs)
    if ends is None:
        raise ValueError(
            "mask is not one that linear attention can use; expected rows that see the first keys, and never fewer "
            "than the row before (none, causal, lengths, prefix and their unions)"
        )
    joined = leads({"q": q.shape[:-2], "mask": ends.shape[:-1]}, {"k": k.shape[:-2], "v": v.shape[:-2]})
    if isinstance(q, Lifted) and joined.shape:
        raise ValueError(f"mask has leading axes {joined.shape}; another arithmetic takes one problem")
    call = Problem(q=q, k=k, v=v, feature_map=feature_map, ends=ends, eps=float(eps), state=state, leads=joined)
    if state is not None:
        if not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"state is {state!r}; expected a State that step returned, or None")
        _, _, r, E = call.sizes
        _check.shaped("state.s", state.s, "r E", (*joined.shape, r, E))
        _check.shaped("state.z", state.z, "r", (*joined.shape, r))
    return call


def forward(call: Problem, backend: engines.Backend) -> tuple[Any, State]:
    """Return the output, and the state after the last key that the last row sees."""
    phi, (T, _, r, E), lead = call.feature_map.of, call.sizes, call.leads.shape
    if isinstance(call.q, Lifted):
        o = call.q.linear_forward(phi(call.q), phi(call.k), call.v, call.seen(), call.eps)
        return o, State(None, None)
    if backend.name != "numpy":
        return engines.ask("linear", "forward", backend, call)
    before = call.state or State(np.zeros((*lead, r, E)), np.zeros((*lead, r)))
    o, after = np.zeros((*lead, T, E)), State(np.array(before.s, np.float64), np.array(before.z, np.float64))
    for at in np.ndindex(lead):
        n = int(np.ravel_multi_index(at, lead)) if lead else 0
        carried = _sweep(call, n, np.c_[after.s[at], after.z[at]], o[at])[0]
        after.s[at], after.z[at] = carried[:, :-1], carried[:, -1]
    return o, after


def backward(call: Problem, do: Any, backend: engines.Backend) -> tuple[Any, Any, Any]:
    """Return gradients with respect to q, k and v."""
    (T, _, r, E), lead, of = call.sizes, call.leads.shape, call.leads.of
    do = _check.shaped("do", do, "T E", (*lead, T, E))
    phi, pull = call.feature_map.of, call.feature_map.vjp
    if isinstance(call.q, Lifted):
        to_q, to_k, dv = call.q.linear_backward(phi(call.q), phi(call.k), call.v, call.seen(), call.eps, do)
        return pull(to_q, call.q), pull(to_k, call.k), dv
    if backend.name != "numpy":
        return engines.ask("linear", "backward", backend, call, do)
    dq, dk, dv = np.zeros(call.q.shape), np.zeros(call.k.shape), np.zeros(call.v.shape)
    for n in range(math.prod(lead)):
        into = (matrix(x, of[name][n]) for name, x in (("q", dq), ("k", dk), ("v", dv)))
        _reverse(call, n, np.zeros((r, E + 1)), matrix(do, n), *into)
    return dq, dk, dv


def _ones(v: Array) -> Array:
    """Append the column of ones whose weighted sum is the normaliser."""
    return np.concatenate([v, np.ones((len(v), 1))], axis=1)


def _spans(first: int, last: int) -> list[NDArray[np.intp]]:
    return [np.arange(a, min(a + CHUNK, last)) for a in range(first, last, CHUNK)]


def _sweep(call: Problem, n: int, state: Array, o: Array, do: Any = None) -> tuple[Array, Array, Array]:
    """Fill o from first row to last; with `do`, also return g = (do/den, −do·o/den) and the gradient of φ(q)."""
    (q, k, v, ends), phi = call.one(n), call.feature_map.of
    T, E = len(q), v.shape[1]
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
        sees = (ends[rows] > 0)[:, None]
        den = np.where(sees, both[:, -1:] + call.eps, 1.0)
        o[rows] = np.where(sees, both[:, :-1] / den, 0.0)
        if do is not None:
            cotangent = np.where(sees, rows_of(do, rows), 0.0)
            g[rows] = np.c_[cotangent, -(cotangent * o[rows]).sum(1)] / den
            dphi[rows] = np.where(sees, g[rows] @ state.T + mix(np.where(seen, g[rows] @ vk.T, 0.0), fk, seen), 0.0)
        if last > first:
            state = state + fk.T @ vk
        done = last
    return state, g, dphi


def _reverse(call: Problem, n: int, state: Array, do: Any, dq: Array, dk: Array, dv: Array) -> None:
    """Add the gradients of one problem, from last row to first."""
    (q, k, v, ends), phi, pull = call.one(n), call.feature_map.of, call.feature_map.vjp
    _, g, dphi = _sweep(call, n, state, np.zeros((len(q), v.shape[1])), do)
    later = np.zeros_like(state)

    def pull_keys(keys: NDArray[np.intp], fq: Array, g: Array, seen: NDArray[np.bool_]) -> None:
        """Add what all later rows, and these, send to these keys."""
        x, vk = rows_of(k, keys), _ones(rows_of(v, keys))
        fk = phi(x)
        dv[keys] += (fk @ later + mix(np.where(seen, fq @ fk.T, 0.0).T, g, seen.T))[:, :-1]
        dk[keys] += pull(vk @ later.T + mix(np.where(seen, g @ vk.T, 0.0).T, fq, seen.T), x)

    for rows in reversed(_spans(0, len(q))):
        first, last = int(ends[rows[0]]), int(ends[rows[-1]])
        before, sees = int(ends[rows[0] - 1]) if rows[0] else 0, (ends[rows] > 0)[:, None]
        x = rows_of(q, rows)
        dq[rows] += np.where(sees, pull(dphi[rows], x), 0.0)
        fq, keys = np.where(sees, phi(x), 0.0), np.arange(first, last)
        pull_keys(keys, fq, g[rows], keys < ends[rows][:, None])
        later = later + fq.T @ g[rows]
        for keys in reversed(_spans(before, first)):
            pull_keys(keys, fq[:0], g[:0], np.zeros((0, len(keys)), bool))
