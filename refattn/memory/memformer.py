r"""Memformer: a row reads a memory of n slots, which each whole segment writes and which forgets towards a bias.

.. math::
    o_x &= \mathrm{softmax}(\sigma\, Q_x K_M^\top)\, V_M, \qquad K_M = M W_k, \quad V_M = M W_v \\
    m_i' &= p_{i0}\, m_i + \sum_j p_{ij} v_j, \qquad
    p_i = \mathrm{softmax}\big(\tfrac{\sigma}{\tau}\, m_i W_q\, [m_i W_k;\, K_x]^\top\big) \\
    m_i &\leftarrow \frac{m_i' + b_i}{\lVert m_i' + b_i \rVert}, \qquad m_i^{(0)} = \frac{b_i}{\lVert b_i \rVert}

with b the learnable `retention` (the paper's v, a letter that values have here): the paper's memory reading, its memory
slot attention (slot i sees itself and the inputs, no other slot) and its biased memory normalisation. Wu et al. 2020,
arXiv:2010.06891. The memory lives among the values. The key axis is cut into segments of L; row i stands at
p = i + S − T and reads the memory as it was before its own segment. Memformer approximates no other attention, and its
output is not linear in v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn import _check, engines, softmax
from refattn.engines import Backend
from refattn.heads import leads
from refattn.lifted import concatenate
from refattn.memory import _slots
from refattn.memory._slots import How, Inputs
from refattn.method import Cost, Method, Option

METHOD = Method(
    name="memformer",
    family="memory",
    paper="arXiv:2010.06891",
    arrays={
        "q": "T D",
        "k": "S D",
        "v": "S E",
        "w_query": "E D",
        "w_key": "E D",
        "w_value": "E E",
        "retention": "n E",
    },
    options={
        "segment": Option(
            doc="L, the positions of a segment",
            domain=lambda length: length >= 1,
            typical=lambda n: tuple(sorted({max(1, n["S"] // d) for d in (8, 4, 2)})),
        ),
        "temperature": Option(
            doc="τ, by which the logits of a write are divided",
            domain=lambda t: t > 0,
            typical=(1.0, 0.75),
            default=1.0,
        ),
    },
    draw_options={
        "slots": Option(
            doc="n, the slots of the memory",
            domain=lambda n: n >= 1,
            typical=lambda n: tuple(sorted({max(1, min(n["S"], 1024) // d) for d in (16, 8, 4, 2)})),
        ),
    },
    drawn=("w_query", "w_key", "w_value", "retention"),
    linear_in=(),
    budget="slots",
    masks="none",
    causal=True,
    rowwise=False,
    approximates=None,
    rows="stochastic",
    permutable=False,
)


class Gradients(NamedTuple):
    """Gradients by argument name."""

    q: Any
    k: Any
    v: Any
    w_query: Any
    w_key: Any
    w_value: Any
    retention: Any


class State(NamedTuple):
    """What the past leaves behind: the memory, (..., n, E), and the tokens of the segment that is not whole yet."""

    memory: Any
    k: Any
    v: Any


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    retention: ArrayLike,
    *,
    segment: int,
    temperature: float = 1.0,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Memformer's reads: each row reads the memory that the segments before its own have written.

    .. math:: M_0 = b / \lVert b \rVert, \qquad M_{s+1} = \mathrm{forget}(\mathrm{write}(M_s, k_s, v_s), b), \qquad
              o_i = \mathrm{read}(q_i, M_{\lfloor p / L \rfloor}), \quad p = i + S - T

    Parameters
    ----------
    q : (..., T, D)
        Queries; leading axes and grouped heads as in `refattn.softmax.attend`.
    k : (..., S, D)
        Keys.
    v : (..., S, E)
        Values.
    w_query, w_key : (..., E, D)
        What a slot asks the inputs, and its own key. Their leading axes, as those of what follows, are k's and v's.
    w_value : (..., E, E)
        What a row reads of a slot.
    retention : (..., n, E)
        b, one row a slot: where the slot starts, and what it returns to where nothing is written.
    segment : int
        L ≥ 1. Keys of a row's own segment, and of later ones, never matter to it. Rows with p < 0 read M₀.
    temperature : float
        τ > 0.
    scale : float, optional
        σ, of reads and writes; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or options that do not fit, naming the argument; a row of `retention` that is 0, or that a slot
        cancels exactly when it forgets: its direction is 0/0.

    Examples
    --------
    >>> from refattn.memory import memformer
    >>> one = [[1.0]]
    >>> memformer.attend([[1.0], [1.0]], [[0.0], [0.0]], [[-9.0], [5.0]], one, one, one, [[2.0]], segment=1, scale=0.0)
    array([[ 1.],
           [-1.]])
    """
    x, how = _fit(q, k, v, w_query, w_key, w_value, retention), _how(segment, temperature, scale, backend)
    return _slots.reads(x, how, _slots.memories(x, how))


def weights(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    retention: ArrayLike,
    *,
    segment: int,
    temperature: float = 1.0,
    scale: float | None = None,
) -> NDArray[np.float64]:
    r"""Return the matrix of the reads, softmax(σ Q K_Mᵀ), (..., T, n): which slots each row reads.

    >>> from refattn.memory import memformer
    >>> x, slots = np.ones((3, 2)), np.eye(2)
    >>> memformer.weights(x, x, x, slots, slots, slots, slots, segment=2)
    array([[0.5, 0.5],
           [0.5, 0.5],
           [0.5, 0.5]])
    """
    x, how = _fit(q, k, v, w_query, w_key, w_value, retention), _how(segment, temperature, scale, "numpy")
    through = _slots.memories(x, how)
    parts = (softmax.weights(x.q[..., at.rows, :], at.memory @ x.w_key, scale=scale) for at in through)
    return concatenate(*parts, axis=-2)


def read(
    q: ArrayLike,
    memory: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    *,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Read a memory: exact softmax attention over its slots.

    .. math:: o = \mathrm{softmax}\big(\sigma\, Q (M W_k)^\top\big)\, M W_v

    Parameters
    ----------
    q : (..., T, D)
        Queries.
    memory : (..., n, E)
        M.
    w_key, w_value : (..., E, D), (..., E, E)
        The slots' keys and values.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., T, E) of float64

    Examples
    --------
    >>> from refattn.memory import memformer
    >>> memformer.read([[0.0]], [[1.0], [-1.0]], [[1.0]], [[3.0]])
    array([[0.]])
    """
    x = _arrays(q=q, memory=memory, w_key=w_key, w_value=w_value)
    return _slots.read(x["q"], x["memory"], x["w_key"], x["w_value"], _how(1, 1.0, scale, backend))


def write(
    memory: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    *,
    temperature: float = 1.0,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> NDArray[np.floating[Any]]:
    r"""Write a segment: each slot attends itself and the segment's inputs, and no other slot.

    .. math:: m_i' = \frac{e^{s_{ii}} m_i + \sum_j e^{s_{ij}} v_j}{e^{s_{ii}} + \sum_j e^{s_{ij}}}, \qquad
              s_{ii} = \tfrac{\sigma}{\tau}\, m_i W_q \cdot m_i W_k, \quad
              s_{ij} = \tfrac{\sigma}{\tau}\, m_i W_q \cdot k_j

    Parameters
    ----------
    memory : (..., n, E)
        M.
    k, v : (..., L, D), (..., L, E)
        The segment's keys and values.
    w_query, w_key : (..., E, D)
        What a slot asks, and its own key.
    temperature : float
        τ > 0.
    scale : float, optional
        σ; the real number 1/√D unless given.

    Returns
    -------
    (..., n, E) of float64
        Not normalised: `forget` follows.

    Examples
    --------
    >>> from refattn.memory import memformer
    >>> memformer.write([[1.0]], [[0.0]], [[5.0]], [[0.0]], [[0.0]])
    array([[3.]])
    """
    x = _arrays(memory=memory, k=k, v=v, w_query=w_query, w_key=w_key)
    how = _how(1, temperature, scale, backend)
    seen = _slots.own_and_inputs(x["memory"].shape[-2], x["k"].shape[-2])
    return _slots.write(x["memory"], x["k"], x["v"], x["w_query"], x["w_key"], how, seen)


def forget(memory: ArrayLike, retention: ArrayLike) -> NDArray[np.float64]:
    r"""Forget: move each slot towards its bias, on the sphere.

    .. math:: m_i \leftarrow \frac{m_i + b_i}{\lVert m_i + b_i \rVert}

    Parameters
    ----------
    memory, retention : (..., n, E)
        M and b.

    Returns
    -------
    (..., n, E) of float64
        Rows of length 1.

    Raises
    ------
    ValueError
        A row of `retention` that is exactly −m: 0/0.

    Examples
    --------
    >>> from refattn.memory import memformer
    >>> memformer.forget([[0.0, 1.0], [0.0, -1.0]], [[0.0, 1.0], [3.0, -3.0]])
    array([[ 0. ,  1. ],
           [ 0.6, -0.8]])
    """
    x = _arrays(memory=memory, retention=retention)
    return _slots.direction(x["memory"] + x["retention"])[0]


def vjp(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    retention: ArrayLike,
    *,
    segment: int,
    temperature: float = 1.0,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> Gradients:
    r"""Gradients of ⟨do, o⟩ through time by memory replay back-propagation: what a segment computed is not kept.

    Forward, only y and ‖u‖ at the segments' boundaries are kept, n·(E + 1) numbers each. Backward, from the last
    segment to the first, each is computed again from the memory before it, and the gradient of that memory is carried
    on:

    .. math:: u = m' + b, \quad du = \frac{dm - y (y \cdot dm)}{\lVert u \rVert},\ y = \frac{u}{\lVert u \rVert}, \quad
              db \mathrel{+}= du, \quad dm' = du

    and softmax's gradients for the write and for the reads.

    >>> from refattn.memory import memformer
    >>> x, one = [[1.0]], np.eye(1)
    >>> memformer.vjp([[1.0]], x, x, x, one, one, one, one, segment=1).w_value
    array([[1.]])
    """
    x, how = _fit(q, k, v, w_query, w_key, w_value, retention), _how(segment, temperature, scale, backend)
    lead = leads({"q": x.q.shape[:-2]}, {s: y.shape[:-2] for s, y in x._asdict().items() if s != "q"}).shape
    do = _check.shaped("do", do, "T E", (*lead, x.q.shape[-2], x.v.shape[-1]))
    return Gradients(*_slots.backward(do, x, how))


def step(
    state: State | None,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    retention: ArrayLike,
    *,
    segment: int,
    temperature: float = 1.0,
    scale: float | None = None,
    backend: str | Backend = "numpy",
) -> tuple[NDArray[np.floating[Any]], State]:
    """Take any number of tokens; a segment is written once it is whole.

    `state` None starts. Any split of a sequence into steps gives `attend` of the whole, up to rounding. All steps take
    the same parameters and options.

    >>> from refattn.memory import memformer
    >>> one, same = [[1.0]], dict(segment=1, scale=0.0)
    >>> o, state = memformer.step(None, one, one, [[-9.0]], one, one, one, [[2.0]], **same)
    >>> memformer.step(state, one, one, one, one, one, one, [[2.0]], **same)[0]
    array([[-1.]])
    """
    x, how = _fit(q, k, v, w_query, w_key, w_value, retention), _how(segment, temperature, scale, backend)
    _check.size("k", x.k.shape[-2], x.q.shape[-2], "S", "q's T")
    start = _started(state, x, how)
    x = x._replace(k=_slots.stacked(start.k, x.k), v=_slots.stacked(start.v, x.v))
    S = x.k.shape[-2]
    through = list(_slots.memories(x, how, start.memory))
    o = _slots.reads(x, how, through)
    _, keys, memory, _ = through[-1]
    if S and S % how.segment == 0:
        memory, keys = _slots.after(memory, keys, x, how, _slots.written(x, how))[0], slice(S, S)
    return o, State(memory, x.k[..., keys, :].copy(), x.v[..., keys, :].copy())


def draw(
    rng: np.random.Generator, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, slots: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    r"""Draw w_query, w_key, w_value and retention for these keys and values; there is no training here.

    A slot stands for a value: `w_key` maps it to the key that goes with such a value, by least squares, and `w_query`
    asks for keys like that. Slots have length 1, so with r the mean length of the values (1 where there is none)

    .. math:: W_q = W_k = r\, V^+ K, \qquad W_v = r\, I

    Each row of `retention` has the direction of a value picked at random, of a normal one where that is 0 or there
    are no values, and length 2·max(1, maxⱼ‖vⱼ‖): a write is at most half as long, so forgetting is never near 0/0 and
    brings two memories no further apart (M5).

    Returns
    -------
    w_query, w_key, w_value, retention : (..., E, D), (..., E, D), (..., E, E), (..., n, E)
        With the leading axes of k and v.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit, naming them; k or v that is not finite.

    Examples
    --------
    >>> from refattn.memory import memformer
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 6, 2))
    >>> [x.shape for x in memformer.draw(np.random.default_rng(0), q, k, v, slots=3)]
    [(2, 2), (2, 2), (2, 2), (3, 2)]
    """
    _check.generator("rng", rng)
    n = _check.integer("slots", slots, 1)
    x = {s: _check.widened(y) for s, y in _arrays(q=q, k=k, v=v).items()}
    for name in "kv":
        if not np.isfinite(x[name]).all():
            raise ValueError(f"{name} is not finite; expected finite numbers to draw from")
    lead = np.broadcast_shapes(x["k"].shape[:-2], x["v"].shape[:-2])
    v, (S, E) = np.broadcast_to(x["v"], (*lead, *x["v"].shape[-2:])), x["v"].shape[-2:]
    length = np.linalg.norm(v, axis=-1)[..., None]
    mean = length.mean(axis=-2, keepdims=True) if S else np.ones((*lead, 1, 1))
    mean = np.where(mean == 0, 1.0, mean)
    away = rng.standard_normal((*lead, n, E))
    if S:
        picked = np.take_along_axis(v, rng.integers(0, S, (*lead, n, 1)), axis=-2)
        away = np.where((picked == 0).all(axis=-1, keepdims=True), away, picked)
    retention = 2 * length.max(axis=-2, initial=1.0, keepdims=True) * _slots.direction(away)[0]
    w_key = mean * (np.linalg.pinv(v, rcond=_RANK) @ x["k"])
    return w_key.copy(), w_key, mean * np.broadcast_to(np.eye(E), (*lead, E, E)), retention


def cost(T: int, S: int, D: int, E: int, *, slots: int, segment: int) -> Cost:
    """Return what one head costs: T·n pairs for the reads, n·(L + 1) for each segment written, and the projections.

    >>> from refattn.memory import memformer
    >>> memformer.cost(8, 8, 4, 4, slots=2, segment=4).pairs
    26
    """
    _check.sizes(T, S, D, E)
    n, L = _check.integer("slots", slots, 1), _check.integer("segment", segment, 1)
    cut = _slots.segments(T, S, L)
    writes = len(cut) - 1
    pairs = T * n + writes * n * (L + 1)
    projections = 2 * n * E * (len(cut) * (D + E) + writes * 2 * D)
    numbers = (T + S) * (D + E) + E * (2 * D + E) + n * E
    return Cost(pairs=pairs, flops=2 * pairs * (D + E) + projections, bytes=8 * numbers)


_AXES = {**METHOD.arrays, "memory": "n E"}
_RANK = 2.0**-26
"""Singular values of V below this part of the largest are rounding's as much as V's: the root of u."""


def _arrays(**given: Any) -> dict[str, Any]:
    """Check arrays by name: each letter has one length, and leading axes broadcast, q's in grouped heads.

    All but q, k and v are widened, for they meet each other first.
    """
    arrays = {name: _check.array(name, x, _AXES[name]) for name, x in given.items()}
    lengths: dict[str, tuple[int, str]] = {}
    for name, x in arrays.items():
        for letter, size in zip(_AXES[name].split(), x.shape[-2:], strict=True):
            known, owner = lengths.setdefault(letter, (size, name))
            _check.size(name, size, known, letter, owner)
            if size < 1 and letter in "Dn":
                raise ValueError(f"{name} has {letter} = 0; expected at least 1")
    keyed = {name: x.shape[:-2] for name, x in arrays.items() if name != "q"}
    leads({"q": arrays["q"].shape[:-2]} if "q" in arrays else {}, keyed)
    leads({}, keyed)
    return {name: x if name in "qkv" else _check.widened(x) for name, x in arrays.items()}


def _fit(*arrays: Any) -> Inputs:
    """Check the arrays of `attend`."""
    return Inputs(**_arrays(**dict(zip(Inputs._fields, arrays, strict=True))))


def _how(segment: Any, temperature: Any, scale: Any, backend: Any) -> How:
    """Check the options of `attend`."""
    L, tau = _check.integer("segment", segment, 1), _check.positive("temperature", temperature)
    sigma = None if scale is None else _check.finite("scale", scale)
    return How(L, tau, sigma, engines.choose(backend, "softmax"))


def _started(state: Any, x: Inputs, how: How) -> State:
    """Return the state to go on from, after checking that it fits."""
    if state is None:
        return State(_slots.first(x)[0], x.k[..., :0, :], x.v[..., :0, :])
    if not isinstance(state, State):
        raise TypeError(f"state is {state!r}; expected a State that step returned, or None")
    _check.shaped("state.memory", state.memory, "n E", _slots.first(x)[0].shape)
    k, v = _check.array("state.k", state.k, "S D"), _check.array("state.v", state.v, "S E")
    pending = k.shape[-2]
    if pending >= how.segment:
        raise ValueError(f"state.k has {pending} tokens; expected fewer than segment = {how.segment}")
    _check.shaped("state.k", k, "S D", (*x.k.shape[:-2], pending, x.k.shape[-1]))
    _check.shaped("state.v", v, "S E", (*x.v.shape[:-2], pending, x.v.shape[-1]))
    return state
