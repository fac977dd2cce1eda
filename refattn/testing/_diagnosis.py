"""What would explain a wrong answer: a search through changes of meaning and known classes of bugs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from refattn.conventions import LIBRARIES, Call, Convention, Profile, neighbours
from refattn.rounding import TINY
from refattn.testing import _changes, _gradient_changes, _logit_changes, _online_changes
from refattn.testing._arithmetic import Arithmetic, arithmetic_of
from refattn.testing._changes import AXES, Change
from refattn.testing._fits import Fits
from refattn.testing._gradient_changes import Pass
from refattn.testing._tolerance import tolerance
from refattn.testing._written import LN2, Bools, Floats, Outcome, Written, write

NEAREST = 24
"""How many of the nearest answers are given their own allowance, which changes that answer the same share."""
FAR = 1e4
"""Answers that are further off than this many allowances of what was asked are not."""
BEAM = 8
"""How many changes a second one is tried with."""
WORK = 6e6
"""How many pairs a search for two changes may look at."""


@dataclass(frozen=True)
class Explanation:
    """A change that explains the answer to rounding.

    Parameters
    ----------
    kinds
        The classes of bugs that it belongs to.
    said
        What the kernel does, as a sentence.
    ratio
        The largest error ÷ bound with the change, at most 1.
    confidence
        The largest error ÷ bound without it, over that with it.
    """

    kinds: tuple[str, ...]
    said: str
    ratio: float
    confidence: float


@dataclass(frozen=True)
class Diagnosis:
    """What explains an answer: all changes that fit and that the problem cannot tell apart.

    Parameters
    ----------
    ratio
        The largest error ÷ bound of the answer as it is; ∞ where a number should be finite and is not.
    explanations
        The changes that fit, the nearest first; none is an answer.
    unexercised
        Axes of the convention, and classes of bugs, of which this problem would show nothing.
    tried
        How many changes were tried.
    """

    ratio: float
    explanations: tuple[Explanation, ...]
    unexercised: tuple[str, ...]
    tried: int

    def __str__(self) -> str:
        """Say it in a few sentences."""
        if self.ratio <= 1:
            return f"nothing is to be explained: the largest error is {self.ratio:.3g} of its bound"
        if not self.explanations:
            return f"not explained by anything known: {self.tried} changes were tried"
        best = self.explanations[0]
        lines = [f"your kernel {best.said} (error ÷ bound {_short(self.ratio)} without this, {best.ratio:.2g} with it)"]
        more = list({one.kinds: one for one in self.explanations[:0:-1]}.values())[::-1]  # one of each class
        if more:
            lines.append("this problem cannot tell it from:")
            lines += [f"  your kernel {one.said} ({one.ratio:.2g})" for one in more]
            rest = len(self.explanations) - 1 - len(more)
            lines += [f"  and {rest} more like these"] if rest else []
        return "\n".join(lines)


def diagnose(
    call: Call,
    convention: Convention,
    o: ArrayLike,
    lse: ArrayLike | None = None,
    arithmetic: Arithmetic | str = "fp32",
    *,
    gradients: Mapping[str, ArrayLike] | None = None,
    do: ArrayLike | None = None,
    dlse: ArrayLike | None = None,
) -> Diagnosis:
    r"""Search for what explains a kernel's answer.

    Single changes are tried first: each other value of each axis of the convention, the convention of each library,
    and each known class of bugs, some with a number that is fitted. A change explains the answer if

    .. math:: |\mathrm{actual} - \mathrm{changed}| \le \mathrm{tolerance}(\mathrm{changed})

    for every element of o, and of lse if it is given. Two changes together are tried where no single one does.

    Parameters
    ----------
    call, convention
        What was asked, and what it means.
    o : (..., H, T, E)
        What the kernel answered.
    lse : (..., H, T), optional
        Its log-sum-exp, which tells more.
    arithmetic
        What the kernel computes in.
    gradients : mapping, optional
        Of "q", "k", "v", "bias" or "sink", in their shapes, those of ⟨do, o⟩ + ⟨dlse, lse⟩. They are looked at where o
        and lse are right.
    do, dlse : (..., H, T, E), (..., H, T), optional
        The cotangents; `do` is required with gradients.

    Raises
    ------
    ValueError
        An answer of another shape than the call has; gradients without `do`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> call = Call(q=rng.standard_normal((1, 2, 8)), k=rng.standard_normal((1, 5, 8)),
    ...             v=rng.standard_normal((1, 5, 8)), causal=True)
    >>> print(diagnose(call, Convention(), call.under(Convention(rows="top-left")).answer().o).explanations[0].said)
    aligns rows to the top-left: causal starts with row 0 at key 0
    """
    known = arithmetic_of(arithmetic)
    if gradients is not None and do is None:
        raise ValueError("do is missing; expected the cotangent that the gradients are of")
    base = write(call, convention)
    seen = _Answer.of(base, known, o, lse)
    ratio = seen.ratio(base.outcome(), known)
    if ratio <= 1 and gradients is not None:
        return _backward(call, convention, gradients, do, dlse, known)
    if ratio <= 1:
        return Diagnosis(ratio, (), (), 0)
    tried = [_tried(change, base, seen) for change in _singles(call, convention, known)]
    told = [one for one in tried if one.differs]
    fits = _fitting(told, seen, known, (1, 2))
    if not fits:
        found = [_tried(change, base, seen) for change in Fits(call, convention, base, seen.o, seen.lse).all()]
        tried, told = tried + found, told + [one for one in found if one.differs]
        fits = _fitting(told, seen, known, (1, 2))
    count = len(tried)
    if not fits:
        pairs = list(_pairs(told, base, seen))
        count += len(pairs)
        fits = _fitting(pairs, seen, known, (1, 2)) or _fitting(told, seen, known, (3,))
    told_of = [Explanation(one.kinds, one.said, r, ratio / max(r, 2.0**-20)) for one, r in fits]
    exercised = {kind for one in told for kind in one.kinds}
    axes = {one.axis for one in told} - {None}
    missing = [f"axis {name}" for name in AXES if name not in axes]
    missing += [kind for kind in dict.fromkeys(k for one in tried for k in one.kinds) if kind not in exercised]
    return Diagnosis(ratio, tuple(told_of), tuple(missing), count)


def _backward(
    call: Call, convention: Convention, gradients: Mapping[str, ArrayLike], do: Any, dlse: Any, arithmetic: Arithmetic
) -> Diagnosis:
    """Search for what explains gradients.

    A changed gradient is allowed what the right one is, and as much for each unit of its absolute terms.
    """
    right = _gradient_changes.backward(call, convention, do, dlse)
    allowed = _gradient_allowance(call, convention, right.do, right.dlse, arithmetic)
    actual = {name: np.asarray(x, np.float64) for name, x in gradients.items()}
    plain = right.gradients()
    for name, x in actual.items():
        if name not in plain or x.shape != plain[name].shape:
            wanted = plain[name].shape if name in plain else "no such gradient"
            raise ValueError(f"gradients has {name!r} of shape {x.shape}; expected {wanted}")

    with np.errstate(all="ignore"):
        level = {s: np.nanmax(allowed[s] / x, initial=0.0) for s, x in right.sizes().items()}

    def far(changed: Pass, actual: Mapping[str, Floats]) -> float:
        other, sizes = changed.gradients(), {} if changed is right else changed.sizes()
        return _largest(_ratio(x, other[s], allowed[s] + level[s] * sizes.get(s, 0.0)) for s, x in actual.items())

    ratio = far(right, actual)
    if ratio <= 1:
        return Diagnosis(ratio, (), (), 0)
    found: list[Explanation] = []
    seen: dict[str, bool] = {}
    count = 0
    with np.errstate(all="ignore"):
        every = (*_gradient_changes.changes(right), *_gradient_changes.fitted(right, actual))
        for change in every:
            count += 1
            changed = change.make(right)
            other = changed.gradients()
            seen[change.kind] = seen.get(change.kind, False) or far(right, {s: other[s] for s in actual}) > 2
            if (r := far(changed, actual)) <= 1 and (change.rank == 1 or not found):
                found.append(Explanation((change.kind,), change.said, r, ratio / max(r, 2.0**-20)))
    found.sort(key=lambda one: one.ratio)
    return Diagnosis(ratio, tuple(found), tuple(kind for kind, shown in seen.items() if not shown), count)


def _gradient_allowance(
    call: Call, convention: Convention, do: Any, dlse: Any, arithmetic: Arithmetic
) -> dict[str, Floats]:
    """Return how far right gradients may be off, with the definition's own rounding."""
    meaning = call.under(convention)
    shape = np.shape(call.q)[:-1] if np.ndim(call.q) < 3 else do.shape[:-1]
    do = do.reshape(*shape, do.shape[-1])
    dlse = dlse.reshape(shape) * (LN2 if convention.lse == "bits" else 1.0)
    bare = call.sink is not None and convention.sink == "not counted"
    total: dict[str, Floats] = {}
    for one in (arithmetic, "fp64"):

        def verb(do: Any, q: Any, k: Any, v: Any, one: Any = one, **options: Any) -> Any:
            return tolerance(one, q, k, v, do=do, **options)

        for name, x in meaning.gradient_allowance(verb, do, None if bare else dlse)._asdict().items():
            if name in "q k v bias sink".split() and x is not None:
                total[name] = total.get(name, 0.0) + np.asarray(x)
    return total


def shared(diagnoses: Iterable[Diagnosis]) -> tuple[str, ...]:
    """Return the classes that explain most of the answers of one kernel, those that explain more first.

    >>> shared([])
    ()
    """
    votes: dict[str, float] = {}
    for one in diagnoses:
        kinds = dict.fromkeys(kind for x in one.explanations for kind in x.kinds)
        for n, kind in enumerate(kinds):
            votes[kind] = votes.get(kind, 0.0) + 1 - n / 1024
    return tuple(sorted(votes, key=lambda kind: -votes[kind]))


@dataclass(frozen=True)
class _Answer:
    """What a kernel answered, what is allowed of it as it was asked, and the same without zeros: what is near."""

    o: Floats
    lse: Floats | None
    judged: tuple[Bools, Bools]
    own: tuple[Floats, Floats]
    near: tuple[Floats, Floats]

    @classmethod
    def of(cls, w: Written, arithmetic: Arithmetic, o: ArrayLike, lse: ArrayLike | None) -> _Answer:
        right = w.outcome()
        how = w.convention
        judged = ~(w.empty & (how.empty == "any")), ~(w.empty & (how.empty_lse == "any"))
        own = right.allowance(arithmetic)
        near = tuple(np.where(x == 0, np.where(np.isfinite(x), x, 0.0).max(initial=TINY), x) for x in own)
        given = _shaped("o", o, right.o), None if lse is None else _shaped("lse", lse, right.lse)
        return cls(*given, (judged[0][..., None], judged[1]), own, (near[0], near[1]))

    def ratios(self, outcome: Outcome, allowed: tuple[Floats, Floats]) -> Iterator[Floats]:
        """Yield error ÷ bound of o, and of lse where it is given."""
        pairs = ((self.o, outcome.o), (self.lse, outcome.lse))
        for (x, y), bound, own, judged in zip(pairs, allowed, self.own, self.judged, strict=True):
            if x is not None:
                bound = np.where(np.isfinite(bound), bound, own)
                yield np.where(judged, _ratio(x, y, bound), 0.0)

    def ratio(self, outcome: Outcome, arithmetic: Arithmetic) -> float:
        """Return the largest error ÷ bound, the bound that of the changed problem."""
        return _largest(self.ratios(outcome, outcome.allowance(arithmetic)))

    def differs(self, a: Outcome, b: Outcome) -> bool:
        """Whether two answers are further apart than the bound of both."""
        pairs = zip((a.o, a.lse), (b.o, b.lse), self.own, (self.o, self.lse), strict=True)
        return any(bool((_ratio(x, y, 2 * bound) > 1).any()) for x, y, bound, given in pairs if given is not None)


def _shaped(name: str, x: ArrayLike, like: Floats) -> Floats:
    """Return an answer in the shape that it has with all leading axes."""
    x = np.asarray(x, np.float64)
    if x.size != like.size:
        raise ValueError(f"{name} has shape {x.shape}; expected {like.shape}")
    return x.reshape(like.shape)


def _ratio(x: Floats, y: Floats, bound: Floats) -> Floats:
    """Return |x − y| ÷ bound; NaN in y stands for anything that is not finite."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(x - y)
        error = np.where((x == y) | (np.isnan(y) & ~np.isfinite(x)), 0.0, np.where(np.isnan(error), np.inf, error))
        return np.where(error == 0, 0.0, np.where(np.isinf(bound), 0.0, error / bound))


def _largest(parts: Iterable[Floats]) -> float:
    return max((float(x.max(initial=0.0)) for x in parts), default=0.0)


@dataclass(frozen=True)
class _Tried:
    """A change, or two, with what it answers and how near that is to what was answered."""

    changes: tuple[Change, ...]
    outcome: Outcome | None
    changed: Written | None
    far: float
    mean: float
    differs: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(change.kind for change in self.changes))

    @property
    def said(self) -> str:
        return ", and ".join(change.said for change in self.changes)

    @property
    def rank(self) -> int:
        return max(change.rank for change in self.changes)

    @property
    def same(self) -> Any:
        """What changes that answer the same share."""
        x = self.outcome
        return (
            None if x is None else (x.arithmetic, x.o.astype(np.float32).tobytes(), x.lse.astype(np.float32).tobytes())
        )

    @property
    def axis(self) -> str | None:
        return next((change.axis for change in self.changes if change.axis), None)


def _tried(change: Change, w: Written, seen: _Answer, first: tuple[Change, ...] = ()) -> _Tried:
    with np.errstate(all="ignore"):
        made = change.make(w)
        outcome = made.outcome() if isinstance(made, Written) else made
        changed = made if isinstance(made, Written) else None
        changes = (*first, change)
        if outcome is None or outcome.o.shape != seen.o.shape:
            return _Tried(changes, None, None, math.inf, math.inf, False)
        if outcome.arithmetic is not None:
            return _Tried(changes, outcome, changed, 0.0, math.inf, True)
        parts = list(seen.ratios(outcome, seen.near))
        mean = sum(float(np.log1p(np.minimum(x, 1e6)).mean()) for x in parts if x.size)
        right = w.outcome()
        return _Tried(changes, outcome, changed, _largest(parts), mean, seen.differs(outcome, right))


def _singles(call: Call, convention: Convention, known: Arithmetic) -> Iterator[Change]:
    for axis, value, other in neighbours(convention):
        kind, words = AXES[axis]
        yield Change(kind, words[value], lambda _, c=other: write(call, c), axis=axis)
    yield from _libraries(call, convention)
    yield from _changes.seeing(call, convention)
    yield from _logit_changes.reading(call, convention)
    yield from _logit_changes.logits(call, convention)
    yield from _online_changes.tiling(call)
    yield from _online_changes.online(call)
    yield from _online_changes.sums(call)
    yield from _online_changes.splits(call)
    yield from _online_changes.precision(known)


def _libraries(call: Call, convention: Convention) -> Iterator[Change]:
    """Yield the conventions of libraries that differ on more than one axis."""
    done = {convention}
    for library in LIBRARIES:
        try:
            known: dict[str, Profile] = importlib.import_module(f"refattn.conventions.{library}").PROFILES
        except ModuleNotFoundError:
            continue
        for name, profile in known.items():
            other = profile.convention
            apart = [f.name for f in fields(Convention) if getattr(other, f.name) != getattr(convention, f.name)]
            opened = {axis: getattr(convention, axis) for axis in apart if getattr(other, axis) == "any"}
            other = replace(other, **opened)
            apart = [axis for axis in apart if axis not in opened]
            if other not in done and len(apart) > 1:
                done.add(other)
                said = f"means what {name} means: it " + ", ".join(AXES[a][1][getattr(other, a)] for a in apart)
                yield Change("convention", said, lambda _, c=other: write(call, c), 2)


def _fitting(
    tried: list[_Tried], seen: _Answer, arithmetic: Arithmetic, ranks: tuple[int, ...]
) -> list[tuple[_Tried, float]]:
    """Return those that explain the answer with the fewest assumptions, and how well."""
    for rank in ranks:
        groups: dict[Any, list[_Tried]] = {}
        for one in sorted((x for x in tried if x.rank == rank and x.far < FAR), key=lambda x: (x.far, x.mean)):
            groups.setdefault(one.same, []).append(one)
        fits: list[tuple[_Tried, float]] = []
        with np.errstate(all="ignore"):
            for group in list(groups.values())[:NEAREST]:
                assert group[0].outcome is not None
                ratio = seen.ratio(group[0].outcome, arithmetic)
                fits += [(one, ratio) for one in group]
        fits = sorted(((one, r) for one, r in fits if r <= 1), key=lambda x: x[1])
        if fits:
            return fits if rank < 3 else fits[::-1][:3]  # of coarser arithmetics the least coarse says most
    return []


def _pairs(tried: list[_Tried], w: Written, seen: _Answer) -> Iterator[_Tried]:
    """Yield two changes together: those that come nearest alone, with every other."""
    room = int(WORK / max(w.raw.size, 1000))
    some = sorted((one for one in tried if one.rank < 3 and one.changed is not None), key=lambda one: one.mean)
    for first in some[:BEAM]:
        for second in tried:
            if second.changes == first.changes or second.axis or second.rank > 1:
                continue
            room -= 1
            if room < 0:
                return
            assert first.changed is not None
            both = _tried(second.changes[0], first.changed, seen, first.changes)
            if both.outcome is not None:
                yield both


def _short(x: float) -> str:
    return "not finite" if math.isinf(x) else f"{x:.3g}"
