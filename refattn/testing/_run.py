"""A function under trial, and the verdict on each thing that it is asked."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refattn import _check
from refattn.conventions import Call, Convention, Profile, Returned, Written
from refattn.conventions import profile as profile_of
from refattn.engines import Unsupported
from refattn.testing._arithmetic import Arithmetic, arithmetic_of
from refattn.testing._attention import judge_call
from refattn.testing._calling import Ask, Told, leaves
from refattn.testing._configurations import CAPABILITIES, CONFIGURATIONS, Configuration, ordinary
from refattn.testing._formats import Format
from refattn.testing._places import cast, cotangents, gradients, sayable
from refattn.testing._report import Result
from refattn.testing._verdicts import Verdict
from refattn.testing._worker import Worker

DRAWN = "drawn problems"
_BY_NAME = {one.name: one for one in CONFIGURATIONS}


def prepare(
    fn: Callable[..., Any] | str,
    profile: str | Profile = "torch",
    arithmetic: Arithmetic | str | None = None,
    *,
    vjp: Callable[..., Any] | str | None = None,
    lse: bool | None = None,
    gradients: bool = True,
    unsupported: Sequence[str] = (),
    framework: str | None = None,
    device: str | None = None,
    thorough: bool = False,
    seed: int = 0,
    timeout: float = 20.0,
) -> Run:
    """Check the arguments of `refattn.testing.check` and return the trial; its process is not started yet."""
    own = profile if isinstance(profile, Profile) else profile_of(profile)
    known = arithmetic_of("fp32" if arithmetic is None else arithmetic)
    _check.integer("seed", seed, 0)
    _check.positive("timeout", timeout)
    known_names("unsupported", unsupported)
    for name, f in (("fn", fn), ("vjp", vjp)):
        if f is not None and not isinstance(f, str) and not callable(f):
            raise TypeError(f"{name} is a {type(f).__name__}; expected a function or where it is, module:function")
    return Run(
        worker=Worker(fn, vjp),
        profile=own,
        arithmetic=known,
        framework=framework or own.framework,
        device=device,
        lse=lse,
        gradients=gradients,
        unsupported=tuple(unsupported),
        thorough=thorough,
        seed=seed,
        timeout=timeout,
    )


def names(only: Sequence[str] = (), *, thorough: bool = False) -> list[str]:
    """Return what is asked, by name: of all, or of those capabilities and configurations alone."""
    known_names("only", only)
    found = [
        one.name
        for one in CONFIGURATIONS
        if (one.name in only or one.capability in only if only else thorough or not one.thorough)
    ]
    return found + [name for name in (*PROPERTIES, DRAWN) if not only or name in only]


def known_names(argument: str, given: Sequence[str]) -> None:
    """Refuse names of no capability and no configuration."""
    if isinstance(given, str):
        raise TypeError(f"{argument} is {given!r}; expected a sequence of names")
    for name in given:
        if name not in (*CAPABILITIES, DRAWN, *PROPERTIES, *_BY_NAME):
            raise ValueError(
                f"{argument} holds {name!r}; expected a configuration or one of {', '.join(map(repr, CAPABILITIES))}"
            )


def dtype_of(kept: Format) -> str:
    """Return the dtype in which numbers of a format are kept."""
    return {"tf32": "float32", "float8_e4m3": "float8_e4m3fn"}.get(kept.name, kept.name)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A function with everything that its calls have in common."""

    worker: Worker
    profile: Profile
    arithmetic: Arithmetic
    framework: str
    device: str | None
    lse: bool | None
    gradients: bool
    unsupported: tuple[str, ...]
    thorough: bool
    seed: int
    timeout: float

    @property
    def dtype(self) -> str:
        """Of the inputs."""
        return dtype_of(self.arithmetic.formats.inputs)

    def results(self, name: str) -> list[Result]:
        """Return the verdicts on a configuration, a property or the drawn problems."""
        if name == DRAWN:
            return [self._drawn()]
        if name in PROPERTIES:
            return [self._property(name)]
        return list(self.configuration(_BY_NAME[name]))

    def configuration(self, one: Configuration) -> Iterator[Result]:
        """Yield the verdict on a configuration, and on its gradients where they are asked."""
        call = self.call(one)
        if {one.name, one.capability} & set(self.unsupported):
            yield self.result(one, Verdict("unsupported", said=("as declared",)), call)
            return
        verdict, told = self.answer(call, layout=one.layout, twice=one.twice)
        if not one.promised and verdict.kind in ("wrong", "non-finite", "suspect"):
            verdict = replace(verdict, kind="does not hold")
        yield replace(self.result(one, verdict, call), answer=self.kept(verdict, call, told))
        if one.gradients and self.gradients and told is not None and verdict.kind in ("right", "suspect"):
            yield replace(self.result(one, self.gradient(call, told), call), asked="gradients")

    def result(self, one: Configuration, verdict: Verdict, call: Call) -> Result:
        """Return a verdict with what it is about."""
        return Result(one.name, one.capability, "forward", verdict, call, self.seed)

    def call(self, one: Configuration) -> Call:
        """Return a configuration's call in a form that the profile has words for, in the dtype of the inputs."""
        rng = np.random.default_rng([self.seed, zlib.crc32(one.name.encode())])
        call = one.make(rng, self.profile.convention)
        return cast(sayable(self.profile, call) or call, self.dtype)

    def kept(self, verdict: Verdict, call: Call, told: Told | None) -> Returned | None:
        """Return the answer itself, where it is wrong and can be looked at."""
        if told is None or verdict.kind not in ("wrong", "non-finite"):
            return None
        return self.profile.read(told.returned, call)

    def answer(self, call: Call, *, layout: str = "plain", twice: bool = False) -> tuple[Verdict, Told | None]:
        """Return the verdict on the function's answer to a call, and what it returned."""
        try:
            written = self.profile.write(call)
        except Unsupported as error:
            return Verdict("unsupported", said=(str(error),)), None
        told = self.ask(written, layout=layout, twice=twice)
        if told.kind != "right":
            return Verdict(told.kind, said=(told.said,)), None
        return self.judged(call, told), told

    def ask(self, written: Written, **more: Any) -> Told:
        """Call the function once."""
        ask = Ask(args=written.args, kwargs=written.kwargs, framework=self.framework, device=self.device, **more)
        return self.worker.ask(ask, self.timeout)

    def judged(self, call: Call, told: Told) -> Verdict:
        """Judge what was returned."""
        try:
            o, lse = self.profile.read(told.returned, call)
        except (IndexError, ValueError, AttributeError, TypeError) as error:
            return Verdict("wrong shape", said=(f"what it returned cannot be read as {self.profile.name}'s: {error}",))
        output = dtype_of(self.arithmetic.formats.output)
        if getattr(o, "dtype", None) != output:
            return Verdict("wrong dtype", said=(f"o has dtype {getattr(o, 'dtype', None)}; expected {output}",))
        if lse is None and self.lse:
            return Verdict("wrong shape", said=("lse was asked for and is not returned",))
        return judge_call(
            call, self.profile.convention, self.arithmetic, o, None if self.lse is False else lse, diagnose=False
        )

    def gradient(self, call: Call, told: Told) -> Verdict:
        """Return the verdict on the function's gradients."""
        rng = np.random.default_rng(self.seed)
        how = self.profile.convention
        o = np.asarray(self.profile.read(told.returned, call).o)
        do = rng.standard_normal(o.shape).astype(o.dtype)
        empty = call.under(how).empty
        if empty.any():
            if how.empty in ("NaN", "any"):
                return Verdict("unsupported", said=("rows that see nothing have no gradient in this convention",))
            do = np.where(empty[..., None], 0, do).astype(o.dtype)
        written = self.profile.write(call)
        gave = self.ask(written, cotangents=cotangents(self.profile, call, told.returned, do))
        if gave.kind != "right":
            return Verdict(gave.kind, said=(gave.said,))
        try:
            found = gradients(self.profile, call, gave.gradients)
        except ValueError as error:
            return Verdict("wrong shape", said=(f"gradients: {error}",))
        if not found:
            return Verdict("unsupported", said=("it gives no gradients",))
        return judge_call(call, how, self.arithmetic, None, gradients=found, do=do)

    def _drawn(self) -> Result:
        if importlib.util.find_spec("hypothesis") is None:
            why = "drawn problems need hypothesis, which is not installed (pip install 'refattn[testing]')"
            return Result(DRAWN, DRAWN, "forward", Verdict("unsupported", said=(why,)), None, self.seed)
        from refattn.testing._drawn import draw

        return draw(self)

    def _property(self, name: str) -> Result:
        own = Configuration(name=name, capability="properties", make=_batched, promised=False)
        call = self.call(own)
        if np.ndim(call.q) != 4:
            return self.result(own, Verdict("unsupported", said=(f"{self.profile.name} has no batches",)), call)
        return self.result(own, self._same_bits(call, PROPERTIES[name](call)), call)

    def _same_bits(self, call: Call, other: Call) -> Verdict:
        answers: list[Any] = []
        for each in (call, other):
            try:
                told = self.ask(self.profile.write(each))
            except Unsupported as error:
                return Verdict("unsupported", said=(str(error),))
            if told.kind != "right":
                return Verdict(told.kind, said=(told.said,))
            if not list(leaves(told.returned)):
                return Verdict("wrong shape", said=("it returned no array",))
            answers.append(self.profile.read(told.returned, each).o)
        whole, part = answers
        same = whole[: len(part)].tobytes() == part.tobytes()
        return Verdict("right") if same else Verdict("does not hold", said=("its bits differ",))


def _batched(rng: np.random.Generator, _: Convention) -> Call:
    return ordinary(rng, B=3, H=4, T=37, S=100)


def _same(call: Call) -> Call:
    return call


def _first(call: Call) -> Call:
    return replace(call, q=call.q[:1], k=call.k[:1], v=call.v[:1])


PROPERTIES: Mapping[str, Callable[[Call], Call]] = {
    "same bits when called again": _same,
    "bits do not depend on the batch": _first,
}
"""What is worth knowing and promised by none: the call whose first rows have the same bits."""
