"""The conformance kit: a function against every edge configuration and drawn problems, and a report of verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from refattn.conventions import Profile
from refattn.testing._arithmetic import Arithmetic
from refattn.testing._explained import explained
from refattn.testing._report import Report, Result
from refattn.testing._run import Run, names, prepare
from refattn.testing._verdicts import INNOCENT, worst


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
    asked = names(only, thorough=thorough)
    run = prepare(
        fn,
        profile,
        arithmetic,
        vjp=vjp,
        lse=lse,
        gradients=gradients,
        unsupported=unsupported,
        framework=framework,
        device=device,
        thorough=thorough,
        seed=seed,
        timeout=timeout,
    )
    began, results = time.monotonic(), list[Result]()
    with run.worker:
        for n, name in enumerate(asked, 1):
            results += run.results(name)
            if progress is not None:
                progress(n, len(asked))
    found, shared = explained(results, run.profile.convention, run.arithmetic)
    return Report(
        function=fn if isinstance(fn, str) else getattr(fn, "__qualname__", repr(fn)),
        profile=run.profile.name,
        arithmetic=arithmetic if isinstance(arithmetic, str) else "fp32" if arithmetic is None else "its own",
        seed=seed,
        results=tuple(found),
        diagnosis=shared,
        notes=(run.worker.note,) if run.worker.note else (),
        seconds=time.monotonic() - began,
    )


def conformance(
    fn: Callable[..., Any] | str,
    profile: str | Profile = "torch",
    arithmetic: Arithmetic | str | None = None,
    **options: Any,
) -> Callable[[str], None]:
    """Return a test for pytest with one item a configuration: ``test_mine = conformance("my.module:fn", "torch")``.

    Arguments are `check`'s, without `only` and `progress`. An item fails where a verdict is a fault, is skipped where
    the function does not support it, and is an expected failure where the answer is suspect.

    Raises
    ------
    ValueError, TypeError
        As `check`, when the test is collected.
    ImportError
        Without pytest.
    """
    import pytest

    run = prepare(fn, profile, arithmetic, **options)

    @pytest.mark.parametrize("configuration", names(thorough=run.thorough))
    def test(configuration: str) -> None:
        conclude(run, run.results(configuration))

    return test


def conclude(run: Run, results: Sequence[Result]) -> None:
    """End a test of pytest as these verdicts demand."""
    import pytest

    results, _ = explained(results, run.profile.convention, run.arithmetic)
    kind = worst(one.verdict.kind for one in results)
    said = "\n".join(str(one) for one in results if one.verdict.kind == kind)
    if kind not in INNOCENT:
        pytest.fail(said, pytrace=False)
    if kind == "suspect":
        pytest.xfail(said)
    if kind == "does not hold" or all(one.verdict.kind == "unsupported" for one in results):
        pytest.skip(said)
