"""What ``refattn check`` does: a function in, verdicts on the screen, a report in a file; and ``refattn golden``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refattn._study_command import bar

RIGHT, WRONG, SUSPECT = 0, 1, 3
"""Exit codes; 2 is a bad call."""


def names_of(texts: Sequence[str]) -> list[str]:
    """Read ``--unsupported`` and ``--only``: capabilities, or a configuration, whose name may have commas."""
    from refattn.testing._configurations import CONFIGURATIONS

    whole = {one.name for one in CONFIGURATIONS}
    return [name.strip() for text in texts for name in ([text] if text in whole else text.split(",")) if name.strip()]


def run(fn: str, arguments: Sequence[str], out: Path | None, **options: Any) -> int:
    """Try the function and print the report, the diagnosis of the smallest fault last; return the exit code."""
    import click

    from refattn.testing import check

    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"--out: cannot write to {out}: its folder is not there")
    try:
        with bar(fn) as progress:
            report = check(fn, progress=progress, **options)
    except (ValueError, TypeError, ImportError) as error:
        raise click.UsageError(str(error)) from None
    print(report)
    if out is not None:
        try:
            report.to_html(out, command=shlex.join(["refattn", *arguments]))
        except OSError as error:
            raise click.UsageError(f"--out: cannot write to {out}: {error.strerror or error}") from None
    sys.stdout.flush()
    return WRONG if report.wrong else SUSPECT if report.suspect else RIGHT


def golden(out: Path, **options: Any) -> None:
    """Write golden files and say how many."""
    import click

    from refattn.testing import golden

    try:
        paths = golden(out, **options)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.UsageError(f"--out: cannot write to {out}: {error.strerror or error}") from None
    print(f"{len(paths) // 2} problems, each as .npz and .safetensors, and golden.json, in {out}")
