"""What ``refattn study`` does: files in, a table on the screen, a report in a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from refattn.study import Capture, Table, Targets


def captures(files: Sequence[str]) -> dict[str, Capture]:
    """Read every file before any work."""
    import click

    from refattn import study

    if not files:
        return {"the shipped sample": study.sample()}
    found: dict[str, Capture] = {}
    for name in files:
        try:
            found[name] = study.read(name)
        except (ValueError, TypeError, ImportError) as error:
            raise click.UsageError(f"{name}: {error}") from None
    return found


def mask_of(causal: bool, text: str | None) -> Any:
    """Return the mask that ``--causal`` and ``--mask`` say together."""
    import click

    from refattn import masks
    from refattn.study import _expression

    if text is None:
        return masks.causal() if causal else None
    try:
        own = _expression.mask(text)
    except ValueError as error:
        raise click.UsageError(f"--mask: {error}") from None
    return own & masks.causal() if causal else own


def budgets_of(texts: Sequence[str]) -> tuple[float | None, dict[str, list[int]]]:
    """Read ``--budget``: the largest cost, or budgets of a method as name=1,2."""
    import click

    most, found = None, dict[str, list[int]]()
    for text in texts:
        name, equals, values = text.partition("=")
        try:
            if equals:
                found[name.strip()] = [int(x) for x in values.split(",")]
            else:
                most = float(text)
        except ValueError:
            raise click.UsageError(
                f"--budget is {text!r}; expected a part of exact attention's cost, or budgets such as longformer=64,256"
            ) from None
    return most, found


def head_of(found: Mapping[str, Capture], text: str | None) -> tuple[int, ...] | None:
    """Read ``--head``, an index into the leading axes of every input."""
    import click

    from refattn.heads import leads

    if text is None:
        return None
    try:
        head = tuple(int(x) for x in text.split(","))
    except ValueError:
        raise click.UsageError(f"--head is {text!r}; expected integers such as 0,3") from None
    for name, capture in found.items():
        q, k, v = (x.shape[:-2] for x in (capture.q, capture.k, capture.v))
        with suppress(ValueError):  # which comparing says better
            shape = leads({"q": q}, {"k": k, "v": v}).shape
            if len(head) != len(shape) or not all(0 <= n < size for n, size in zip(head, shape, strict=True)):
                raise click.UsageError(f"--head is {text!r}; expected an index into the heads of {name}, {shape}")
    return head


class Gathered(NamedTuple):
    """What was answered and measured, and what stopped the rest: an interrupt, or something that is wrong with it."""

    targets: list[Targets]
    tables: list[Table]
    stopped: BaseException | None


def gather(
    found: Mapping[str, Capture],
    *,
    target: float | None,
    table: bool,
    label: str,
    more: Mapping[str, Any],
    **common: Any,
) -> Gathered:
    """Answer the budget question and compare, file by file, and print each answer: what is done stays when it stops."""
    import click
    import rich.console

    from refattn import study
    from refattn.study._sweep import Inputs

    out, done = rich.console.Console(), Gathered([], [], None)
    for name, capture in found.items():  # before any work
        _refused(name, Inputs, *capture[:3], common["mask"], common["scale"])
    try:
        for name, capture in found.items() if target is not None else ():
            answer = _asked(name, name + label, study.target, capture, target=target, **common)
            done.targets.append(answer)
            out.print(str(answer), soft_wrap=True, highlight=False, markup=False)
            if answer.partial:
                raise KeyboardInterrupt
        for name, capture in found.items() if table else ():
            labels = {"layers": capture.layers, "tokens": capture.tokens}
            own = _asked(name, name + label, study.compare, capture, **labels, **more, **common)
            done.tables.append(own)
            out.print(own, soft_wrap=True)
            for sentence in own.violations:
                print(f"{name}: {sentence}", file=sys.stderr)
            if own.partial:
                raise KeyboardInterrupt
    except (KeyboardInterrupt, click.UsageError) as error:
        if not done.targets and not done.tables:
            raise
        return done._replace(stopped=error)
    return done


def _asked(name: str, title: str, verb: Callable[..., Any], capture: Capture, **options: Any) -> Any:
    """Call a verb of the study under a progress bar."""
    with bar(title) as progress:
        return _refused(name, verb, *capture[:3], title=title, progress=progress, partial=True, **options)


def _refused(name: str, verb: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call something; what it refuses is said of the file."""
    import click

    try:
        return verb(*arguments, **options)
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"{name}: {error}") from None
    except MemoryError as error:
        raise click.UsageError(f"{name}: not enough memory: {error}") from None


@contextmanager
def bar(title: str) -> Generator[Callable[[int, int], None]]:
    """Show how much is done and how long the rest takes, on a terminal alone."""
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("left:"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(title)

        def progress(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)

        yield progress
