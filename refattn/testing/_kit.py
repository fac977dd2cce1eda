"""The conformance kit: a function against every edge configuration and drawn problems, and a report of verdicts."""

from __future__ import annotations

import importlib.util
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refattn import _check
from refattn.conventions import Call, Profile, Written
from refattn.conventions import profile as profile_of
from refattn.engines import Unsupported
from refattn.testing._arithmetic import Arithmetic, arithmetic_of
from refattn.testing._attention import judge_call
from refattn.testing._calling import Ask, Told, leaves
from refattn.testing._configurations import CAPABILITIES, CONFIGURATIONS, Configuration, ordinary
from refattn.testing._formats import Format
from refattn.testing._report import Report, Result
from refattn.testing._verdicts import Verdict
from refattn.testing._worker import Worker
from refattn.testing._places import cast, cotangents, gradients

DRAWN = "drawn problems"
DRAWN_SECONDS = 12.0
THOROUGH = 10


def check(
    fn: Callable[..., Any] | str,
    profile: str | Profile = "torch",
    arithmetic: Arithmetic | str | None = None,
    *,
    vjp: Callable[..., Any] | str | None = None,
    lse: bool | None = None,
    gradients: bool = True,
    unsupported: Sequence[str] = (),
    only: Sequence[str] = (),
    framework: str | None = None,
    device: str | None = None,
    thorough: bool = False,
    seed: int = 0,
    timeout: float = 20.0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Run a function of attention on every edge configuration and on drawn problems, and judge each answer.

    The function is called in a process of its own, with a deadline: one that raises, hangs, crashes, answers in the
    wrong shape, writes to its inputs or returns the same buffer twice has that verdict, and the run goes on.

    Parameters
    ----------
    fn
        The function, or where it is: "module:function" or "file.py:function". It is called in the profile's words.
    profile
        Whose words and meaning: the name of a profile of `refattn.conventions`, or one of your own.
    arithmetic
        What the function computes in: an `Arithmetic` or a preset's name. Inputs have its dtype. "fp32" unless given.
    vjp
        Its gradients, for a framework without automatic ones: ``vjp(do, *args, **kwargs)`` returns those of the
        positional arguments. PyTorch and JAX differentiate the function itself.
    lse
        Whether lse is judged: where it is returned, unless given; True asks for it.
    gradients
        Whether gradients are asked.
    unsupported
        Capabilities or configurations that the function does not claim: they show as gaps.
    only
        Capabilities or configurations that alone are run.
    framework, device
        Whose arrays it takes, and where, if not the profile's and the framework's own.
    thorough
        Also the large configurations, and ten times as many drawn problems.
    seed
        Of all that is drawn: the same seed asks the same.
    timeout
        Seconds for each call.
    progress
        Is called with the number of configurations done and of all.

    Returns
    -------
    Report
        A verdict for each configuration; ``report.ok`` where none is a fault.

    Raises
    ------
    ValueError, TypeError
        A function that cannot be found, an unknown profile, arithmetic or name, before any work.

    Examples
    --------
    >>> import math
    >>> report = check(math.hypot, framework="numpy", only=["one row, one key"])
    >>> report.results[0].verdict.kind
    'raised'
    """
    own = profile if isinstance(profile, Profile) else profile_of(profile)
    known = arithmetic_of("fp32" if arithmetic is None else arithmetic)
    _check.integer("seed", seed, 0)
    _check.positive("timeout", timeout)
    _named("unsupported", unsupported)
    _named("only", only)
    if not isinstance(fn, str) and not callable(fn):
        raise TypeError(f"fn is a {type(fn).__name__}; expected a function or where it is, module:function")
    began = time.monotonic()
    chosen = [
        one
        for one in CONFIGURATIONS
        if (one.name in only or one.capability in only if only else thorough or not one.thorough)
    ]
    drawn = (not only or DRAWN in only) and DRAWN not in unsupported
    with Worker(fn, vjp) as worker:
        run = Run(
            worker=worker,
            profile=own,
            arithmetic=known,
            framework=framework or own.framework,
            device=device,
            lse=lse,
            gradients=gradients,
            unsupported=tuple(unsupported),
            seed=seed,
            timeout=timeout,
        )
        results: list[Result] = []
        for n, one in enumerate(chosen):
            results += run.configuration(one)
            if progress is not None:
                progress(n + 1, len(chosen) + drawn)
        if not only:
            results += run.properties()
        notes = [worker.note] if worker.note else []
        if drawn and importlib.util.find_spec("hypothesis") is None:
            notes.append("no problems were drawn: Hypothesis is not installed (pip install 'refattn[testing]')")
        elif drawn:
            from refattn.testing._drawn import draw

            most = 40 * (THOROUGH if thorough else 1)
            seconds = DRAWN_SECONDS * (THOROUGH if thorough else 1)
            results.append(draw(run, most, seconds, dtype_of(known.formats.inputs)))
            if progress is not None:
                progress(len(chosen) + 1, len(chosen) + 1)
    name = fn if isinstance(fn, str) else getattr(fn, "__qualname__", repr(fn))
    return Report(
        function=name,
        profile=own.name,
        arithmetic=arithmetic if isinstance(arithmetic, str) else "fp32" if arithmetic is None else "its own",
        seed=seed,
        results=tuple(results),
        notes=tuple(notes),
        seconds=time.monotonic() - began,
    )


def _named(argument: str, names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise TypeError(f"{argument} is {names!r}; expected a sequence of names")
    known = [*CAPABILITIES, DRAWN, *(one.name for one in CONFIGURATIONS)]
    for name in names:
        if name not in known:
            raise ValueError(f"{argument} holds {name!r}; expected capabilities or configurations, such as {known[1]!r}")


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
    seed: int
    timeout: float

    def configuration(self, one: Configuration) -> Iterator[Result]:
        """Yield the verdict on a configuration, and on its gradients where they are asked."""
        call = self.call(one)
        if one.name in self.unsupported or one.capability in self.unsupported:
            yield self.result(one, Verdict("unsupported", said=("as declared",)), call)
            return
        verdict, told = self.answer(call, layout=one.layout, twice=one.twice)
        if not one.promised and verdict.kind in ("wrong", "non-finite", "suspect"):
            verdict = replace(verdict, kind="does not hold", diagnosis="")
        yield self.result(one, verdict, call)
        if one.gradients and self.gradients and told is not None:
            yield replace(self.result(one, self.gradient(call, told), call), asked="gradients")

    def result(self, one: Configuration, verdict: Verdict, call: Call) -> Result:
        """Return a verdict with what it is about."""
        return Result(one.name, one.capability, "forward", verdict, call, self.seed)

    def call(self, one: Configuration) -> Call:
        """Return a configuration's call, in the dtype of the arithmetic's inputs."""
        rng = np.random.default_rng([self.seed, zlib.crc32(one.name.encode())])
        return cast(one.make(rng, self.profile.convention), dtype_of(self.arithmetic.formats.inputs))

    def answer(
        self, call: Call, *, layout: str = "plain", twice: bool = False, diagnose: bool = True
    ) -> tuple[Verdict, Told | None]:
        """Return the verdict on the function's answer to a call, and what it returned where that is right or near."""
        try:
            written = self.profile.write(call)
        except Unsupported as error:
            return Verdict("unsupported", said=(str(error),)), None
        told = self.ask(written, layout=layout, twice=twice)
        if told.kind != "right":
            return Verdict(told.kind, said=(told.said,)), None
        verdict = self.judged(call, told, diagnose)
        return verdict, told if verdict.kind in ("right", "suspect") else None

    def ask(self, written: Written, **more: Any) -> Told:
        """Call the function once."""
        ask = Ask(args=written.args, kwargs=written.kwargs, framework=self.framework, device=self.device, **more)
        return self.worker.ask(ask, self.timeout)

    def judged(self, call: Call, told: Told, diagnose: bool) -> Verdict:
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
            call, self.profile.convention, self.arithmetic, o, None if self.lse is False else lse, diagnose=diagnose
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

    def properties(self) -> Iterator[Result]:
        """Yield what is worth knowing and promised by none: whether bits depend on the call, and on the batch."""
        for name, changed in (("same bits when called again", _same), ("bits do not depend on the batch", _first)):
            one = Configuration(name=name, capability="properties", make=lambda rng, how: _batched(rng), promised=False)
            call = self.call(one)
            if "properties" in self.unsupported:
                continue
            yield self.result(one, self._same_bits(call, changed(call)), call)

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


def _batched(rng: np.random.Generator) -> Call:
    return ordinary(rng, B=3, H=4, T=37, S=100)


def _same(call: Call) -> Call:
    return call


def _first(call: Call) -> Call:
    return replace(call, q=call.q[:1], k=call.k[:1], v=call.v[:1])
