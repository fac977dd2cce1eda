"""What ``refattn study`` does: files in, a table on the screen, a report in a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

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


def compared(found: Mapping[str, Capture], *, label: str, **options: Any) -> Iterator[Table]:
    """Compare file by file, print each table, and end with the first that was stopped."""
    import rich.console

    from refattn import study

    out = rich.console.Console()
    for name, capture in found.items():
        table = _asked(
            name,
            name + label,
            study.compare,
            capture,
            **options,
            layers=capture.layers,
            tokens=capture.tokens,
            partial=True,
        )
        out.print(table, soft_wrap=True)
        for sentence in table.violations:
            print(f"{name}: {sentence}", file=sys.stderr)
        yield table
        if table.partial:
            return


def answered(found: Mapping[str, Capture], *, label: str, **options: Any) -> Iterator[Targets]:
    """Answer the budget question file by file, and print each answer."""
    import rich.console

    from refattn import study

    out = rich.console.Console()
    for name, capture in found.items():
        one = _asked(name, name + label, study.target, capture, **options)
        out.print(str(one), soft_wrap=True, highlight=False, markup=False)
        yield one


def _asked(name: str, title: str, verb: Callable[..., Any], capture: Capture, **options: Any) -> Any:
    """Call a verb of the study under a progress bar; what it refuses is said of the file."""
    import click

    with bar(title) as progress:
        try:
            return verb(capture.q, capture.k, capture.v, title=title, progress=progress, **options)
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
