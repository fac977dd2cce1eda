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

from refattn import _check, engines, linear, softmax
from refattn.engines import Backend
from refattn.heads import Leads, leads, matrix
from refattn.kernel import features as random_features
from refattn.kernel import moments
from refattn.kernel._favor import Head, Stabilizer
from refattn.kernel._feature_map import IDENTITY
from refattn.kernel.features import EXPONENTIAL, Directions, Kind, Norms
from refattn.lifted import Lifted
from refattn.masks import MaskLike, causal
from refattn.method import Claim, Cost, Method, Option
from refattn.rounding import Bounded

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Centring = Literal["none", "mean", "balanced"]
CENTRINGS = ("none", "mean", "balanced")

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
            typical=random_features.DIRECTIONS,
            default="iid",
        ),
        "norms": Option(
            doc="norms as of N(0, I), or all √D",
            domain=random_features.NORMS.__contains__,
            typical=random_features.NORMS,
            default="chi",
        ),
        "centring": Option(
            doc="what is subtracted from keys: nothing, their mean, or that and the mean of queries",
            domain=CENTRINGS.__contains__,
            typical=CENTRINGS,
            default="none",
        ),
    },
    drawn=("omega", "centre"),
    budget="features",
    variants=({"centring": "balanced"}, {"directions": "orthogonal"}),
    masks="prefix",
    rows="sum to 1",
    permutable=True,
    engines=("linear",),
    claims=(
        Claim(
            verb="bound",
            statement="K1",
            assumes=(
                "Kernel values above 0 at all keys that the row sees, as exponential features have, else it says only "
                "how far the values reach: it reads every pair, whatever the features were drawn from."
            ),
        ),
        Claim(
            verb="bound",
            statement="R6",
            assumes="Exponential features to which an ε is added: it reads every pair, with the ε and without.",
        ),
        Claim(
            verb="bound_over_draws",
            statement="R3",
            assumes=(
                "omega of independent N(0, I) rows, unbiased features and eps = 0; with exact variances, it holds with "
                "probability 1 − δ over the draw for each element alone."
            ),
            over="draw",
        ),
    ),
)


class Gradients(NamedTuple):
    """Gradients by argument name."""

    q: Any
    k: Any
    v: Any
    omega: Any
    centre: Any


class State(NamedTuple):
    """What the past leaves behind: the linear engine's sums, and the largest y·ω so far, (...,).

    Where that is below −600, its features are divided by e^{⌊600 + y·ω⌋}, so that they do not all underflow.
    """

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
        underflows, is 0/0 = NaN. So is one that sees a key whose features overflow: their exponent is above 709 or,
        with ε and the stabiliser, 1300 above the first row's c.

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
    if isinstance(call.q, Lifted):
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
    if isinstance(call.q, Lifted):
        return Gradients(*call.head(0).pull(do, backend))
    out = Gradients(*(np.zeros(getattr(call, name).shape) for name in Gradients._fields))
    for n in range(math.prod(lead)):
        for name, g in zip(Gradients._fields, call.head(n).pull(matrix(do, n), backend), strict=True):
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
    directions: Directions = "iid",
    norms: Norms = "chi",
    centring: Centring = "none",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw ω, (m, D), one for all heads, by `refattn.kernel.features.draw`; and the centre, (..., D).

    Softmax ignores what is subtracted from all keys; the features' variance grows with x + y, for trigonometric ones
    with x − y. Centring ``"mean"`` subtracts the mean of the keys, ``"balanced"`` that and the mean of the queries (of
    the heads that share the keys), so that x + y is 0 on average for σ ≥ 0. Either knows the future: to stream, take
    the means of other tokens.

    >>> from refattn.kernel import performer
    >>> k = [[1.0, 0.0], [3.0, 2.0]]
    >>> omega, centre = performer.draw(np.random.default_rng(0), k, k, k, features=5, centring="mean")
    >>> omega.shape, centre
    ((5, 2), array([2., 1.]))
    """
    m, centre = _check.integer("features", features, 1), _centre(q, k, centring)
    return random_features.draw(rng, m, centre.shape[-1], directions=directions, norms=norms), centre


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


def bound_over_draws(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    features: int,
    directions: Directions = "iid",
    norms: Norms = "chi",
    centring: Centring = "none",
    kind: Kind = "positive",
    stabilizer: Stabilizer = "none",
    eps: float = 0.0,
    delta: float,
    rows: ArrayLike | None = None,
    mask: MaskLike = None,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""How far `attend` is from exact attention, at most, with probability 1 − δ over `draw` (R3, elementwise).

    .. math::
        \Pr\big(|\tilde o_{ic} - o_{ic}| > a_{ic}\big) \le \delta, \qquad
        a = \frac{\sqrt g}{\sqrt{m \delta} - \sqrt{(1 - \delta) h}}

    for each element alone, with g and h as in `refattn.kernel.moments.tail_radius`. It is proved for ω of independent
    N(0, I) rows, for unbiased features and ε = 0, and is ∞ for all else: orthogonal directions, norms √D, ReLU, ε > 0.
    It is ∞ too where m ≤ (1 − δ)h/δ. It costs O(S²·(D + E)) a row.

    Parameters
    ----------
    features, directions, norms, centring
        As `draw` is given them.
    delta : float
        δ, strictly between 0 and 1.
    rows : (R,) of int, optional
        Which rows of q are asked for; all of them unless given.

    Returns
    -------
    (..., R, E) of float64
        Mathematical: rounding is not in it.

    Examples
    --------
    >>> from refattn.kernel import performer
    >>> q, k, v = [[0.5]], [[0.5], [-0.5]], [[1.0], [0.0]]
    >>> performer.bound_over_draws(q, k, v, features=1024, delta=0.0625).round(3)
    array([[0.043]])
    """
    m, delta = _check.integer("features", features, 1), _check.probability("delta", delta)
    _check.choice("directions", directions, random_features.DIRECTIONS)
    _check.choice("norms", norms, random_features.NORMS)
    centre = _centre(q, k, centring)
    call = _call(q, k, v, np.zeros((1, centre.shape[-1])), centre, kind, stabilizer, eps, mask, scale)
    T, E = call.q.shape[-2], call.v.shape[-1]
    asked = cast("NDArray[Any]", np.arange(T) if rows is None else _check.array("rows", rows, "R"))
    if asked.dtype.kind not in "iu" or asked.ndim != 1 or not ((asked >= 0) & (asked < T)).all():
        raise ValueError(f"rows is {rows!r}; expected a list of integers from 0 to {T - 1}")
    out = np.zeros((*call.leads.shape, len(asked), E))
    for n in range(math.prod(call.leads.shape)):
        head = call.head(n)
        by, x, y = head.sides
        for at, i in enumerate(asked):
            seen = int(head.ends[i])
            if seen == 0:
                continue
            if kind == "relu" or eps > 0 or (directions, norms) != ("iid", "chi"):
                matrix(out, n)[at] = np.inf
                continue
            p = softmax.weights(head.q[i : i + 1], head.k[:seen], scale=scale)[0]
            C = moments.cross_covariances(x[i] * by, y[:seen] * by, kind=kind)
            matrix(out, n)[at] = moments.tail_radius(p, head.v[:seen], C, m, delta)
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
    r"""Return how far ln κ − s in `bound` may be off, (T,), by running error analysis of the features.

    With ε > 0 the claim has two kernels in it and β, which is off by no more than ln κ and ln κ⁰ are, together: twice
    their sum is charged.

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
    _check.choice("kind", kind, random_features.KINDS)
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

    def head(self, n: int) -> Head:
        """Return one head's problem, in float64 or another arithmetic."""
        arrays = {name: _check.widened(self.part(name, getattr(self, name), n)) for name in METHOD.arrays}
        ends: Ints = self.part("mask", self.ends, n)
        return Head(**arrays, ends=ends, kind=self.kind, stabilizer=self.stabilizer, eps=self.eps, scale=self.scale)


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
    plain = linear.problem(q, k, v, feature_map=IDENTITY, eps=eps, mask=mask)
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


def _centre(q: ArrayLike, k: ArrayLike, centring: Centring) -> Array:
    """Return what `draw` subtracts from keys, (..., D) with k's leading axes."""
    queries, keys = (
        _check.widened(_check.array(name, x, axes)) for name, x, axes in (("q", q, "T D"), ("k", k, "S D"))
    )
    _check.size("k", keys.shape[-1], queries.shape[-1], "D", "q")
    _check.choice("centring", centring, CENTRINGS)
    joined = leads({"q": queries.shape[:-2]}, {"k": keys.shape[:-2]})
    centre = np.zeros((*keys.shape[:-2], keys.shape[-1]))
    if centring != "none" and keys.shape[-2]:
        centre += keys.mean(axis=-2)
    if centring == "balanced" and queries.shape[-2]:
        heads = math.prod(joined.shape)
        for j in range(math.prod(keys.shape[:-2])):
            own = [matrix(queries, joined.of["q"][n]).mean(axis=0) for n in range(heads) if joined.of["k"][n] == j]
            matrix(centre, j, 1)[...] += np.mean(own, axis=0) if own else 0.0
    return centre


def _forward(call: _Call, backend: Backend, state: State | None = None) -> tuple[Any, State]:
    """Return the output of all heads, and the state after the last key."""
    if isinstance(call.q, Lifted):
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
