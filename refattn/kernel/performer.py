r"""Performer: random features take the place of the exponential of the logit (FAVOR+).

.. math::
    o_i = \frac{\sum_j \kappa_{ij} v_j}{\sum_j \kappa_{ij}}, \qquad
    \kappa_{ij} = \frac1m \sum_f \big(e^{x_i \cdot \omega_f - \|x_i\|^2/2 - a_i} + \varepsilon\big)
                  \big(e^{y_j \cdot \omega_f - \|y_j\|^2/2 - c_i} + \varepsilon\big), \qquad
    x_i = \sqrt\sigma\, q_i, \quad y_j = \sqrt\sigma\, (k_j - \bar k)

over the keys that row i sees, with other features for other kinds (`refattn.kernel.features`). Choromanski et al. 2021,
arXiv:2009.14794, §2. The centre k̄ is 0 there; softmax is the same for any, features are not.

The stabiliser subtracts a_i, the largest x_i·ω_f, and c_i, the largest y_j·ω_f of the keys that the row sees. With
ε = 0 neither changes the answer. With ε > 0 they say what ε is small against. The published code takes one c over all
keys, so that under a causal mask the future moves every row; without a mask this is its answer, with one it is causal.
A negative σ is the positive one with −q.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, linear
from refattn._mix import tiles
from refattn.arithmetic import Arithmetic, concatenate
from refattn.engines import Backend
from refattn.heads import Leads, leads, matrix
from refattn.kernel import _ratio
from refattn.kernel import features as random_features
from refattn.kernel._feature_map import FeatureMap
from refattn.kernel.features import EXPONENTIAL, Directions, Kind, Norms
from refattn.masks import MaskLike, causal
from refattn.method import Claim, Cost, Method, Option
from refattn.rounding import Bounded

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Stabilizer = Literal["none", "max"]
Centring = Literal["none", "mean"]

METHOD = Method(
    name="performer",
    family="kernel",
    paper="arXiv:2009.14794, §2",
    arrays={"q": "T D", "k": "S D", "v": "S E", "omega": "m D", "centre": "D"},
    options={
        "kind": Option(
            doc="which random features; only exponential ones cannot make the normaliser vanish",
            domain=random_features.KINDS.__contains__,
            typical=EXPONENTIAL,
            default="positive",
        ),
        "stabilizer": Option(
            doc="whether exponents are relative to their largest, for exponential features",
            domain=("none", "max").__contains__,
            typical=("none", "max"),
            default="none",
        ),
        "eps": Option(doc="ε added to every feature", domain=lambda e: e >= 0, typical=(0.0, 2.0**-10), default=0.0),
    },
    draw_options={
        "features": Option(
            doc="m, the number of random directions",
            domain=lambda m: m >= 1,
            typical=lambda n: tuple(sorted({max(1, n["D"] // 2), 2 * n["D"], 8 * n["D"]})),
        ),
        "directions": Option(
            doc="whether directions are independent, or orthogonal in blocks of D",
            domain=random_features.DIRECTIONS.__contains__,
            typical=random_features.DIRECTIONS[::-1],
            default="orthogonal",
        ),
        "norms": Option(
            doc="norms as of N(0, I), or all √D",
            domain=random_features.NORMS.__contains__,
            typical=random_features.NORMS,
            default="chi",
        ),
        "centring": Option(
            doc="what is subtracted from keys: nothing, or their mean",
            domain=("none", "mean").__contains__,
            typical=("none", "mean"),
            default="none",
        ),
    },
    drawn=("omega", "centre"),
    budget="features",
    variants=({"centring": "mean"},),
    masks="prefix",
    rows="sum to 1",
    permutable=True,
    engines=("linear",),
    claims=(Claim(verb="bound", statement="K1"), Claim(verb="bound", statement="R6")),
)


def _same(phi: Any) -> Any:
    return phi


def _pull_same(dphi: Any, phi: Any) -> Any:
    return dphi


_PLAIN = FeatureMap("features", _same, _pull_same)


class Gradients(NamedTuple):
    """Gradients by argument name."""

    q: Any
    k: Any
    v: Any
    omega: Any
    centre: Any


class State(NamedTuple):
    """What the past leaves behind: the linear engine's sums, and the largest y·ω so far, (...,)."""

    sums: linear.State
    peak: Any


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    omega: ArrayLike,
    centre: ArrayLike,
    *,
    kind: Kind = "positive",
    stabilizer: Stabilizer = "none",
    eps: float = 0.0,
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Attention with random features, in time and memory linear in the length.

    .. math:: o_i = \frac{\phi(x_i)^\top \sum_j \phi(y_j) v_j^\top}{\phi(x_i)^\top \sum_j \phi(y_j)}

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    omega : (..., m, D)
        Random directions, as `draw` returns them; their leading axes are k's.
    centre : (..., D)
        What is subtracted from every key, with k's leading axes; zeros for the published map.
    kind
        ``"positive"``, ``"hyperbolic"``, ``"trigonometric"`` or ``"relu"``: see `refattn.kernel.features`. The last
        approximates nothing.
    stabilizer
        ``"max"`` or ``"none"``: a_i = c_i = 0.
    eps : float
        ε ≥ 0, added to every feature, the factor m^{-1/2} aside. It biases the answer, however many features there are.
    mask : Mask, optional
        Rows must see the first keys, and never fewer than the row before: causal, lengths, prefix.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64
        A row that sees nothing is 0. One whose every κ is 0, as ReLU's may be and as any is where e^{−‖y‖²/2}
        underflows, is 0/0 = NaN.

    Raises
    ------
    ValueError, TypeError
        Shapes, options or a mask that do not fit, naming the argument; a stabiliser without exponential features.

    Examples
    --------
    >>> from refattn.kernel import performer
    >>> performer.attend([[1.0]], [[2.0], [2.0]], [[1.0], [3.0]], [[0.5]], [0.0])
    array([[2.]])
    """
    call = _call(q, k, v, omega, centre, kind, stabilizer, eps, mask, scale)
    return _forward(call, engines.choose(backend, "linear"))[0]


def weights(
    q: ArrayLike,
    k: ArrayLike,
    omega: ArrayLike,
    centre: ArrayLike,
    *,
    kind: Kind = "positive",
    stabilizer: Stabilizer = "none",
    eps: float = 0.0,
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""Return the attention matrix κ_ij / Σ_l κ_il, (..., T, S).

    >>> from refattn.kernel import performer
    >>> performer.weights([[1.0]], [[2.0], [2.0]], [[0.5]], [0.0])
    array([[0.5, 0.5]])
    """
    call = _call(q, k, _check.WEIGHTS, omega, centre, kind, stabilizer, eps, mask, scale)
    if isinstance(call.q, Arithmetic):
        return _forward(call, Backend("numpy"))[0]
    p = np.zeros((*call.leads.shape, call.q.shape[-2], call.k.shape[-2]))
    for n in range(math.prod(call.leads.shape)):
        head = call.head(n)
        seen = np.arange(p.shape[-1]) < head.ends[:, None]
        if not seen.any():
            continue
        f = head.features()
        kappa, some = np.where(seen, f.fq @ f.fk.T, 0.0), seen.any(axis=1, keepdims=True)
        matrix(p, n)[:] = np.where(some, kappa / np.where(some, kappa.sum(axis=1, keepdims=True), 1.0), 0.0)
    return p


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    omega: ArrayLike,
    centre: ArrayLike,
    *,
    kind: Kind = "positive",
    stabilizer: Stabilizer = "none",
    eps: float = 0.0,
    mask: MaskLike = None,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    r"""Gradients of ⟨do, o⟩: linear attention's, through the features; a maximum's goes to the first that attains it.

    >>> from refattn.kernel import performer
    >>> performer.vjp([[1.0]], [[1.0]], [[2.0], [2.0]], [[1.0], [3.0]], [[0.5]], [0.0]).v
    array([[0.5],
           [0.5]])
    """
    call = _call(q, k, v, omega, centre, kind, stabilizer, eps, mask, scale)
    backend = engines.choose(backend, "linear")
    lead, (T, E) = call.leads.shape, (call.q.shape[-2], call.v.shape[-1])
    do = _check.shaped("do", do, "T E", (*lead, T, E))
    if isinstance(call.q, Arithmetic):
        return call.head(0).pull(do, backend)
    out = Gradients(*(np.zeros(getattr(call, name).shape) for name in Gradients._fields))
    for n in range(math.prod(lead)):
        for name, g in call.head(n).pull(matrix(do, n), backend)._asdict().items():
            call.part(name, getattr(out, name), n)[...] += g
    return out


def step(
    state: State | None,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    omega: ArrayLike,
    centre: ArrayLike,
    *,
    kind: Kind = "positive",
    stabilizer: Stabilizer = "none",
    eps: float = 0.0,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> tuple[NDArray[np.floating[Any]], State]:
    """Take any number of tokens: each sees itself, those before it and what the state holds.

    `state` None starts. Any split of a sequence into steps gives causal `attend` of the whole, up to rounding.

    >>> from refattn.kernel import performer
    >>> o, state = performer.step(None, [[1.0]], [[2.0]], [[1.0]], [[0.5]], [0.0])
    >>> performer.step(state, [[1.0]], [[2.0]], [[3.0]], [[0.5]], [0.0])[0]
    array([[2.]])
    """
    call = _call(q, k, v, omega, centre, kind, stabilizer, eps, causal(), scale)
    _check.size("k", call.k.shape[-2], call.q.shape[-2], "S", "q's T")
    if state is not None:
        if not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"state is {state!r}; expected a State that step returned, or None")
        lead, r, E = call.leads.shape, call.columns, call.v.shape[-1]
        _check.shaped("state.sums.s", state.sums.s, "r E", (*lead, r, E))
        _check.shaped("state.sums.z", state.sums.z, "r", (*lead, r))
        _check.shaped("state.peak", state.peak, "", lead)
    return _forward(call, engines.choose(backend, "linear"), state)


def draw(
    rng: np.random.Generator,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    features: int,
    directions: Directions = "orthogonal",
    norms: Norms = "chi",
    centring: Centring = "none",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw ω, (m, D), one for all heads, by `refattn.kernel.features.draw`; and the centre, (..., D).

    The mean of all keys, as a centre, knows the future: to stream, take the mean of other keys.

    >>> from refattn.kernel import performer
    >>> k = [[1.0, 0.0], [3.0, 2.0]]
    >>> omega, centre = performer.draw(np.random.default_rng(0), k, k, k, features=5, centring="mean")
    >>> omega.shape, centre
    ((5, 2), array([2., 1.]))
    """
    keys = _check.widened(_check.array("k", k, "S D"))
    m, D = _check.integer("features", features, 1), keys.shape[-1]
    _check.choice("centring", centring, ("none", "mean"))
    omega = random_features.draw(rng, m, D, directions=directions, norms=norms)
    if centring == "none" or keys.shape[-2] == 0:
        return omega, np.zeros((*keys.shape[:-2], D))
    return omega, keys.mean(axis=-2)


def bound(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    omega: ArrayLike,
    centre: ArrayLike,
    *,
    kind: Kind = "positive",
    stabilizer: Stabilizer = "none",
    eps: float = 0.0,
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from `refattn.softmax.attend` of the same arrays, mask and scale, at most (K1, R6).

    .. math::
        |\tilde o_{ic} - o_{ic}| \le \tanh\!\big(\tfrac14 \operatorname*{osc}_j(\ln \kappa_{ij} - s_{ij})\big)
        \operatorname*{range}_j v_{jc}

    over the keys that the row sees, for these features, whatever they were drawn from. With ε > 0 and κ⁰ the kernel
    without it, õ⁰ its answer, it is the least of that and of

    .. math::
        \tanh\!\big(\tfrac14 \operatorname*{osc}_j(\ln \kappa^0_{ij} - s_{ij})\big) \operatorname*{range}_j v_{jc}
        + \beta_i \max_j |v_{jc} - \tilde o^0_{ic}|, \qquad
        \beta_i = \frac{\sum_j (\kappa_{ij} - \kappa^0_{ij})}{\sum_j \kappa_{ij}}

    and it is never more than the distance from õ to the far end of the values' range, in which the exact output lies:
    where some κ ≤ 0, as trigonometric and ReLU features allow, only that is known. It reads every pair: O(T·S·m) time.

    Returns
    -------
    (..., T, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.kernel import performer
    >>> performer.bound([[1.0]], [[2.0], [2.0]], [[1.0], [3.0]], [[0.5]], [0.0])
    array([[0.]])
    """
    call = _call(q, k, v, omega, centre, kind, stabilizer, eps, mask, scale)
    with np.errstate(all="ignore"):  # an answer that is 0/0 or overflows has the bound NaN or ∞
        o = _forward(call, Backend("numpy"))[0]
        out = np.zeros_like(o)
        for n in range(math.prod(call.leads.shape)):
            head = call.head(n)
            if head.ends.any():
                matrix(out, n)[:] = head.bound(matrix(o, n))
    return out


def claim_logits(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    omega: ArrayLike,
    centre: ArrayLike,
    *,
    kind: Kind = "positive",
    stabilizer: Stabilizer = "none",
    eps: float = 0.0,
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""Return how far ln κ, evaluated in float64, may be off in each row, (T,): see `refattn.rounding.claim_rounding`.

    The features are run in `refattn.rounding.Bounded` arithmetic. With ε > 0 the claim has two kernels in it and β,
    which is off by no more than ln κ and ln κ⁰ are, together: twice their sum is charged. A row of which some κ is
    surely not positive claims no kernel.

    >>> from refattn.kernel import performer
    >>> performer.claim_logits([[1.0]], [[2.0], [2.0]], [[1.0], [3.0]], [[0.5]], [0.0]).shape
    (1,)
    """
    x, y, values = (Bounded.lift(_check.array(name, a, "")) for name, a in (("q", q), ("k", k), ("v", v)))
    head = _call(x, y, values, omega, centre, kind, stabilizer, eps, mask, scale).head(0)
    if not head.ends.any():
        return np.zeros(len(head.ends))
    if eps == 0:
        return head.log_error()
    return 2 * (head.log_error() + head._replace(eps=0.0).log_error())


def cost(
    T: int,
    S: int,
    D: int,
    E: int,
    *,
    features: int,
    kind: Kind = "positive",
    mask: MaskLike = None,
) -> Cost:
    """Return what one head costs: no pair is formed; 2mD flops a query and a key for ω·x, 2r(E+1) for the sums.

    >>> from refattn.kernel import performer
    >>> performer.cost(8, 8, 4, 4, features=16)
    Cost(pairs=0, flops=4608, bytes=1536)
    """
    _check.sizes(T, S, D, E)
    m = _check.integer("features", features, 1)
    r = random_features.columns(kind, m)
    flops = 2 * (T + S) * (m * D + r * (E + 1))
    return Cost(pairs=0, flops=flops, bytes=8 * (T * (D + E) + S * (D + E) + m * D))


class _Call(NamedTuple):
    """One checked call."""

    q: Any
    k: Any
    v: Any
    omega: Any
    centre: Any
    ends: Ints
    kind: Kind
    stabilizer: Stabilizer
    eps: float
    scale: float | None
    leads: Leads

    def part(self, name: str, x: Any, n: int) -> Any:
        """Return what head n reads of an argument, or has of its gradient, as a view."""
        return matrix(x, self.leads.of[name][n], len(METHOD.arrays.get(name, "T").split()))

    @property
    def columns(self) -> int:
        """How many features the engine gets."""
        own = random_features.columns(self.kind, self.omega.shape[-2])
        return own + 1 if self.stabilizer == "max" and self.eps > 0 else own

    def head(self, n: int) -> _Head:
        """Return one head's problem, in float64 or another arithmetic."""
        arrays = {name: _check.widened(self.part(name, getattr(self, name), n)) for name in METHOD.arrays}
        ends: Ints = self.part("mask", self.ends, n)
        return _Head(**arrays, ends=ends, kind=self.kind, stabilizer=self.stabilizer, eps=self.eps, scale=self.scale)


class _Head(NamedTuple):
    r"""One head's problem.

    The engine takes κ as a product. With w = e^{y·ω − ‖y‖²/2} and u = e^{x·ω − ‖x‖²/2 − a},

    .. math:: m \kappa_{ij} = \sum_f (u_{if} + \varepsilon) e^{-c_i} w_{jf}
              + \varepsilon \sum_f (u_{if} + \varepsilon) \cdot 1

    so c_i belongs to the query. With ε = 0 a row's features may have any factor: their largest becomes 1.
    """

    q: Any
    k: Any
    v: Any
    omega: Any
    centre: Any
    ends: Ints
    kind: Kind
    stabilizer: Stabilizer
    eps: float
    scale: float | None

    @property
    def sides(self) -> tuple[Any, Any, Any]:
        """√|σ|, ±q and k less its centre."""
        q = -self.q if self.scale is not None and self.scale < 0 else self.q
        return random_features.root(self.scale, self.q.shape[1], self.q), q, self.k - self.centre

    def features(self, peak: Any = -np.inf) -> _Features:
        """Return the features; `peak` is the largest y·ω of the past."""
        (by, q, k), kind, eps = self.sides, self.kind, self.eps
        x, y = q * by, k * by
        # scaled last: what has been rounded once less is what another arithmetic compares
        plain_x, plain_y = (random_features.project(z, self.omega, kind) for z in (q, k))
        ex, ey = plain_x * by, plain_y * by
        w = random_features.raw(ey, random_features.height(y, kind), kind)
        if eps == 0:
            u = random_features.raw(ex, -_values(ex).max(axis=1, keepdims=True) if kind in EXPONENTIAL else 0.0, kind)
            return _Features(x, y, ex, ey, u, w, u, w, None, peak)
        tall = random_features.height(x, kind)
        if self.stabilizer == "none":
            u = random_features.raw(ex, tall, kind)
            return _Features(x, y, ex, ey, u, w, u + eps, w + eps, None, peak)
        u = random_features.raw(ex, tall - random_features.largest(plain_x) * by, kind)
        c = _running(random_features.largest(plain_y), self.ends) * by
        c = c if peak == -np.inf else np.maximum(c, peak)
        fall, last = np.exp(-c), _values(c)[-1, 0]
        fq = concatenate((u + eps) * fall, (u + eps).sum(1, keepdims=True) * eps, axis=1)
        return _Features(x, y, ex, ey, u, w, fq, concatenate(w, np.ones((w.shape[0], 1)), axis=1), fall, last)

    def forward(self, backend: Backend, before: linear.State | None, peak: Any) -> tuple[Any, linear.State | None, Any]:
        """Return the output and what the engine and the maximum leave behind."""
        if not self.ends.any():
            nothing = np.zeros((self.q.shape[0], self.v.shape[1]))
            return self.q.lift(nothing) if isinstance(self.q, Arithmetic) else nothing, before, peak
        f = self.features(peak)
        return *linear.forward(self.problem(f, before), backend), f.peak

    def problem(self, f: _Features, before: linear.State | None = None) -> linear.Problem:
        """Return what the linear engine is asked."""
        alone = leads({"q": (), "mask": ()}, {"k": (), "v": ()})
        return linear.Problem(
            q=f.fq, k=f.fk, v=self.v, feature_map=_PLAIN, ends=self.ends, eps=0.0, state=before, leads=alone
        )

    def kappa(self, f: _Features, rows: NDArray[np.intp]) -> Any:
        """Return κ of some rows, up to a factor of the row."""
        return f.fq[rows] @ f.fk.mT

    def bound(self, o: Array) -> Array:
        """Return the least of K1, K1 with R6, and the distance to the far end of the values."""
        q, k, v, ends, f = self.q, self.k, self.v, self.ends, self.features()
        sigma = _check.scale(self.scale, q.shape[1])

        def logits(rows: NDArray[np.intp]) -> Array:
            return sigma * (q[rows] @ k.T)

        claim = _ratio.bound(o, v, ends, lambda rows: self.kappa(f, rows), logits)
        if self.eps == 0 or self.kind not in EXPONENTIAL:
            return claim
        plain = self._replace(eps=0.0)
        f0, o0 = plain.features(), plain.forward(Backend("numpy"), None, -np.inf)[0]
        near = _ratio.bound(o0, v, ends, lambda rows: plain.kappa(f0, rows), logits)
        # κ − κ⁰ = ε(Σw e^−c + Σu + rε), with the factor that features() gives a row
        fall = 1.0 if f.fall is None else f.fall
        r, live, seen = f.u.shape[1], np.flatnonzero(ends), np.maximum(ends - 1, 0)
        added = np.cumsum(f.w.sum(axis=1))[seen, None] * fall + ends[:, None] * (
            f.u.sum(axis=1, keepdims=True) + r * self.eps
        )
        whole = (f.fq * np.cumsum(f.fk, axis=0)[seen]).sum(axis=1, keepdims=True)
        low, high = np.minimum.accumulate(v)[seen], np.maximum.accumulate(v)[seen]
        farther = near + self.eps * added / whole * np.maximum(np.abs(o0 - low), np.abs(high - o0))
        claim[live] = np.fmin(claim, farther)[live]
        return claim

    def log_error(self) -> Array:
        """Return how far ln κ may be off over what each row sees, (T,), in Bounded arithmetic."""
        f, found = self.features(), np.zeros(len(self.ends))
        keys = np.arange(int(self.k.shape[0]))
        with np.errstate(all="ignore"):
            for rows in tiles(np.arange(len(self.ends)), len(keys)):
                kappa, seen = self.kappa(f, rows), keys < self.ends[rows][:, None]
                signed = (seen & (kappa.value + 2 * kappa.error <= 0)).any(axis=1)
                off: Array = np.log(kappa).error
                error = np.where(seen, off, 0.0).max(axis=1, initial=0.0)
                found[rows] = np.where(signed, 0.0, np.where(np.isnan(error), np.inf, error))
        return found

    def pull(self, do: Any, backend: Backend) -> Gradients:
        """Return the gradients; rows that see nothing and keys that nobody sees are left out of every sum."""
        blind, seen = int(np.searchsorted(self.ends, 1)), int(self.ends.max(initial=0))
        if seen == 0:
            return Gradients(*(x * 0.0 for x in self[:5]))
        live = self._replace(q=self.q[blind:], k=self.k[:seen], v=self.v[:seen], ends=self.ends[blind:])
        dq, dk, dv, domega = live._pull(do[blind:], backend)
        dq = concatenate(np.zeros((blind, dq.shape[1])), dq)
        dk, dv = (concatenate(x, np.zeros((self.k.shape[0] - seen, x.shape[1]))) for x in (dk, dv))
        return Gradients(dq, dk, dv, domega, -dk.sum(0))

    def _pull(self, do: Any, backend: Backend) -> tuple[Any, Any, Any, Any]:
        f, kind, omega = self.features(), self.kind, self.omega
        du, dw, dv = linear.backward(self.problem(f), do, backend)
        dc: Any = None
        if f.fall is not None:
            r = f.u.shape[1]
            dc = -(du[:, :r] * f.fq[:, :r]).sum(1, keepdims=True)
            du, dw = du[:, :r] * f.fall + du[:, r:] * self.eps, dw[:, :r]
        (dex, tall_x), (dey, tall_y) = (
            random_features.pull_raw(d, e, phi, kind) for d, e, phi in ((du, f.ex, f.u), (dw, f.ey, f.w))
        )
        if f.fall is not None:
            dex = dex - _largest(f.ex) * tall_x
            dey = dey + _largest(f.ey) * _to_largest(random_features.largest(f.ey), self.ends, dc)
        if self.eps == 0:
            tall_x = tall_x * 0.0  # the factor of a row cancels
        (dx, from_q), (dy, from_k) = (
            random_features.pull(d, tall, z, omega, kind) for d, tall, z in ((dex, tall_x, f.x), (dey, tall_y, f.y))
        )
        by = self.sides[0]
        dq = dx * by
        return -dq if self.scale is not None and self.scale < 0 else dq, dy * by, dv, from_q + from_k


class _Features(NamedTuple):
    """What is made on the way to the engine's features fq and fk; `fall` is e^{−c}, where c matters."""

    x: Any
    y: Any
    ex: Any
    ey: Any
    u: Any
    w: Any
    fq: Any
    fk: Any
    fall: Any
    peak: Any


def _call(
    q: Any,
    k: Any,
    v: Any,
    omega: Any,
    centre: Any,
    kind: Any,
    stabilizer: Any,
    eps: Any,
    mask: Any,
    scale: Any,
) -> _Call:
    """Check the arguments."""
    plain = linear.problem(q, k, v, feature_map=_PLAIN, eps=eps, mask=mask)
    omega, centre = _check.array("omega", omega, "m D"), _check.array("centre", centre, "D")
    D = plain.q.shape[-1]
    _check.size("omega", omega.shape[-1], D, "D", "q")
    _check.size("centre", centre.shape[-1], D, "D", "q")
    if omega.shape[-2] < 1:
        raise ValueError("omega has m = 0; expected at least 1 row")
    _check.choice("kind", kind, random_features.KINDS)
    _check.choice("stabilizer", stabilizer, ("none", "max"))
    if stabilizer == "max" and kind not in EXPONENTIAL:
        raise ValueError(f"stabilizer is 'max'; expected 'none' for {kind} features, which have no exponent")
    _check.scale(scale, D)
    keyed = {"k": plain.k.shape[:-2], "v": plain.v.shape[:-2], "omega": omega.shape[:-2], "centre": centre.shape[:-1]}
    joined = leads({"q": plain.q.shape[:-2], "mask": plain.ends.shape[:-1]}, keyed)
    return _Call(plain.q, plain.k, plain.v, omega, centre, plain.ends, kind, stabilizer, plain.eps, scale, joined)


def _forward(call: _Call, backend: Backend, state: State | None = None) -> tuple[Any, State]:
    """Return the output of all heads, and the state after the last key."""
    if isinstance(call.q, Arithmetic):
        return call.head(0).forward(backend, None, -np.inf)[0], State(linear.State(None, None), None)
    lead, r, E = call.leads.shape, call.columns, call.v.shape[-1]
    o, s, z, peak = (np.zeros((*lead, *own)) for own in ((call.q.shape[-2], E), (r, E), (r,), ()))
    peak -= np.inf
    if state is not None:
        s[:], z[:], peak[...] = state.sums.s, state.sums.z, state.peak
    for n, at in enumerate(np.ndindex(lead)):
        o[at], after, peak[at] = call.head(n).forward(backend, linear.State(s[at], z[at]), peak[at])
        if after is not None:
            s[at], z[at] = after
    return o, State(linear.State(s, z), peak)


def _values(x: Any) -> Array:
    return x.floats() if isinstance(x, Arithmetic) else x


def _running(each: Any, ends: Ints) -> Any:
    """Return the largest of what each row sees, (T, 1), of one number a key, (S, 1); a row that sees none gets any."""
    rows = np.maximum(ends - 1, 0)
    if not isinstance(each, Arithmetic):
        running: Array = np.maximum.accumulate(each, axis=0)
        return running[rows]
    each = cast("Any", each)
    found: list[Any] = [each[:1]]
    for j in range(1, each.shape[0]):
        found.append(np.maximum(each[j : j + 1], found[-1]))
    return concatenate(*found)[rows]


def _largest(x: Any) -> Any:
    """Return 1 at the first largest of each row, else 0; what rounding leaves undecided may be either."""
    values = _values(x)
    first: NDArray[np.bool_] = np.arange(int(values.shape[1])) == values.argmax(axis=1)[:, None]
    if not isinstance(x, Bounded):
        return first.astype(np.float64)
    rival = values + 2 * x.error >= (values - 2 * x.error).max(axis=1, keepdims=True)
    return Bounded(first, rival & (rival.sum(axis=1, keepdims=True) > 1))


def _to_largest(each: Any, ends: Ints, g: Any) -> Any:
    """Send one number a row, (T, 1), to the first largest of the keys that it sees: (S, 1)."""
    values, S = _values(each)[:, 0], int(each.shape[0])
    best = np.maximum.accumulate(values)
    record = np.where(values > np.r_[-np.inf, best[:-1]], np.arange(S), 0)
    picked = np.maximum.accumulate(record)[ends - 1]
    if not isinstance(each, Bounded):
        out = np.zeros((S, 1))
        np.add.at(out, picked, g)
        return out
    error = 2 * each.error[:, 0]
    seen = np.arange(S) < ends[:, None]
    rival = seen & (values + error >= np.maximum.accumulate(values - error)[ends - 1][:, None])
    first: NDArray[np.bool_] = np.arange(S) == picked[:, None]
    return Bounded(first, rival & (rival.sum(axis=1, keepdims=True) > 1)).mT @ g
