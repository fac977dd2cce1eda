"""The command line: ``refattn study``, ``refattn show``, ``refattn check`` and ``refattn golden``."""

from __future__ import annotations

import ast
import io
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from refattn import _check_command
from refattn import _study_command as command
from refattn._need import need
from refattn.study._report import FILES, NUMBERS

if TYPE_CHECKING:
    import click

    from refattn.study import Table, Targets


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 where a proved bound was violated, 2 where an argument is at fault.

    `check` also exits with 3, where nothing is proved wrong but something is suspect.

    >>> main(["study", "nowhere.npz"])
    Traceback (most recent call last):
    SystemExit: 2
    """
    click = _need("click")
    screen: Any = sys.stdout
    if isinstance(screen, io.TextIOWrapper):
        screen.reconfigure(errors="replace")  # not every terminal has a ÷
    try:
        given = None if arguments is None else list(arguments)
        code = _command().main(args=given, prog_name="refattn", standalone_mode=False, obj=given or sys.argv[1:])
    except click.ClickException as error:
        print(f"refattn: {_line(error.format_message())}", file=sys.stderr)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except OSError as error:
        _deafen()
        print(f"refattn: cannot write the answer: {error.strerror or error}", file=sys.stderr)
        code = 2
    except SystemExit as stopped:
        if stopped.code != 1:
            raise
        _deafen()  # only Click and Rich exit with 1, and where the reader of a pipe left; here 1 is a violation
        code = 128 + 13
    sys.exit(code if isinstance(code, int) else 0)


def _deafen() -> None:
    """Send what is still buffered nowhere: Python flushes standard output once more as it exits."""
    with suppress(AttributeError, OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _need(*names: str) -> Any:
    """Import what an extra brings and return the first, or exit with the pip line."""
    try:
        return need(*names)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _command() -> click.Group:
    import click

    import refattn

    @click.group(context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(refattn.__version__, prog_name="refattn")
    def group() -> None:
        """Answer questions about attention, with proofs."""

    @group.command()
    @click.argument("files", nargs=-1, metavar="[FILE]...")
    @click.option("--causal", is_flag=True, help="Each row sees its own position and those before it.")
    @click.option("--mask", metavar="MASK", help="Which pairs are seen, such as 'window(64, 0) | prefix(4)'.")
    @click.option("--scale", type=float, help="Scale of the logits; 1/sqrt(D) unless given.")
    @click.option("--methods", metavar="A,B", help="Only these methods.")
    @click.option(
        "--budget",
        "budgets",
        metavar="COST|A=1,2",
        multiple=True,
        help="Only what costs at most this part of exact attention; or a method's budgets.",
    )
    @click.option("--rows", type=int, help="Only so many rows of each head, drawn: for long contexts.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn.")
    @click.option(
        "--trials", type=int, default=200, show_default=True, help="Draws on which claims about them are tried."
    )
    @click.option(
        "--target",
        type=float,
        help="The cheapest budget whose error ÷ spread is at most this; the table only with --out.",
    )
    @click.option("--head", metavar="N,N", help="The head whose weights the report shows.")
    @click.option("--out", type=click.Path(path_type=Path), help="Folder for study.html, study.csv and study.json.")
    @click.pass_obj
    def study(  # pyright: ignore[reportUnusedFunction]
        arguments: list[str],
        files: tuple[str, ...],
        causal: bool,
        mask: str | None,
        scale: float | None,
        methods: str | None,
        budgets: tuple[str, ...],
        rows: int | None,
        seed: int,
        trials: int,
        target: float | None,
        head: str | None,
        out: Path | None,
    ) -> int:
        """Measure how far each efficient attention is from exact softmax, and how far it could be at worst.

        Each FILE, .npz, .npy or .safetensors, holds arrays q (..., T, D), k (..., S, D) and v (..., S, E). Without one,
        a small capture of a released model that comes with the package is used. Ctrl-C ends it with what is done.
        """
        _need("rich", *(["matplotlib", "jinja2"] if out else []))
        if head is not None and not out:
            raise click.UsageError("--head is about the report; it needs --out")
        if budgets and target is not None and not out:
            raise click.UsageError("--budget is about the table; leave it out with --target, or add --out")
        cost, own = command.budgets_of(budgets)
        common: dict[str, Any] = {
            "mask": command.mask_of(causal, mask),
            "scale": scale,
            "methods": None if methods is None else [name.strip() for name in methods.split(",") if name.strip()],
            "rows": rows,
            "seed": seed,
            "label": ", causal" * causal + (f", {mask}" if mask else ""),
        }
        with warnings.catch_warnings(), _folder(out, FILES) if out else nullcontext() as scratch:
            warnings.simplefilter("ignore")  # the table says what is not finite
            found = command.captures(files)
            shown = command.head_of(found, head)
            more = {"cost": cost, "budgets": own, "trials": trials}
            done = command.gather(found, target=target, table=target is None or bool(out), more=more, **common)
            if out and scratch:
                _write(scratch, out, done.tables, done.targets, shown, shlex.join(["refattn", *arguments]))
        if done.stopped is not None:
            raise done.stopped
        return 1 if any(table.violations for table in done.tables) else 0

    @group.command()
    @click.argument("method", required=False)
    @click.option("--all", "every", is_flag=True, help="Every method.")
    @click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="An option of the method.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Seed of the points and of what methods draw.")
    @click.option(
        "--out", type=click.Path(path_type=Path), help="The picture, METHOD.png unless given; with --all its folder."
    )
    def show(  # pyright: ignore[reportUnusedFunction]
        method: str | None, every: bool, settings: tuple[str, ...], seed: int, out: Path | None
    ) -> None:
        """Draw one efficient attention beside exact softmax, on fifty points in the plane.

        The picture has both matrices, their difference, and both outputs with the proved bound.
        """
        _need("matplotlib")
        pictures = _pictures(method, every, out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the picture shows what is not finite
            options = _settings(settings)
            if every and options:
                raise click.UsageError("--set is about one method; leave it out with --all")
            _show(pictures, seed=seed, options=options)

    @group.command()
    @click.argument("function", metavar="MODULE:FUNCTION")
    @click.option("--profile", default="torch", show_default=True, help="Whose words the function takes.")
    @click.option("--arithmetic", metavar="PRESET", help="What it computes in, such as fa2-bf16; fp32 unless given.")
    @click.option("--framework", help="Whose arrays it takes; the profile's unless given.")
    @click.option("--device", help="Where its arrays are, such as cuda.")
    @click.option("--vjp", metavar="MODULE:FUNCTION", help="Its gradients: vjp(do, *args, **kwargs).")
    @click.option("--unsupported", metavar="A,B", multiple=True, help="Capabilities that it does not claim.")
    @click.option("--only", metavar="A,B", multiple=True, help="Only these capabilities or configurations.")
    @click.option("--thorough", is_flag=True, help="Also what takes minutes.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn.")
    @click.option("--timeout", type=float, default=20.0, show_default=True, help="Seconds for each call.")
    @click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A page, report.html.")
    @click.pass_obj
    def check(  # pyright: ignore[reportUnusedFunction]
        arguments: list[str], function: str, unsupported: tuple[str, ...], only: tuple[str, ...], **options: Any
    ) -> int:
        """Ask a function of attention everything, and judge each answer by a proved bound.

        Exits with 0 where nothing is wrong, 1 where something is, with its diagnosis last, 3 where something is
        suspect only, and 2 where the call is at fault.
        """
        _need("rich", *(["jinja2"] if options["out"] else []))
        named = {"unsupported": unsupported, "only": only}
        return _check_command.run(
            function, arguments, **{name: _check_command.names_of(texts) for name, texts in named.items()}, **options
        )

    @group.command()
    @click.option("--profile", default="torch", show_default=True, help="Whose meaning.")
    @click.option(
        "--arithmetic", metavar="PRESET", default="fp32", show_default=True, help="What a kernel computes in."
    )
    @click.option("--only", metavar="A,B", multiple=True, help="Only these capabilities or configurations.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn.")
    @click.option(
        "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the files."
    )
    def golden(only: tuple[str, ...], **options: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        """Write problems, right answers and what is allowed, for projects that have no Python."""
        _need("safetensors")
        _check_command.golden(only=_check_command.names_of(only), **options)

    return group


def _pictures(name: str | None, every: bool, out: Path | None) -> dict[str, Path]:
    """Return the methods to draw, and where."""
    import click

    from refattn import method

    known = [name for name, module in method.modules().items() if module.METHOD.family]
    if every and name is not None:
        raise click.UsageError(f"--all draws every method; leave out {name}")
    if every:
        return {name: (out or Path()) / f"{name}.png" for name in known}
    if name not in known:
        got = "missing" if name is None else repr(name)
        raise click.UsageError(f"METHOD is {got}; expected --all or one of {', '.join(known)}")
    return {name: out or Path(f"{name}.png")}


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """Read name=value, where what is no Python literal is a word."""
    import click

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"--set is {text!r}; expected NAME=VALUE")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found[name.strip()] = value.strip()
    return found


def _show(pictures: Mapping[str, Path], **options: Any) -> None:
    """Draw all into a scratch folder first, so that none stands there where one fails; then say where they are."""
    import click

    from refattn import study

    folder = next(iter(pictures.values())).parent
    with _folder(folder, [path.name for path in pictures.values()]) as scratch:
        said: list[str] = []
        for name, path in pictures.items():
            with _writing(path):
                try:
                    shown = study.show(name, scratch / path.name, **options)
                except (ValueError, TypeError, ArithmeticError, MemoryError) as error:
                    raise click.UsageError(f"{name}: {error}") from None
            said.append(f"{path}: {shown.numbers}")
        for path in pictures.values():
            with _writing(path):
                os.replace(scratch / path.name, path)
    print(*said, sep="\n")


@contextmanager
def _folder(out: Path, outputs: Sequence[str]) -> Generator[Path]:
    """Make the folder before the work, with a scratch folder in it; on failure take away every folder made."""
    made: list[Path] = []
    try:
        with _writing(out):
            made = [folder for folder in (out, *out.parents) if not folder.exists()]
            out.mkdir(parents=True, exist_ok=True)
            for name in outputs:
                if (out / name).exists() and not (out / name).is_file():
                    raise OSError(f"{name} there is no file")
            scratch = tempfile.TemporaryDirectory(dir=out, prefix=".refattn-")
        with scratch as name:
            yield Path(name)
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _write(
    scratch: Path,
    out: Path,
    tables: Sequence[Table],
    targets: Sequence[Targets],
    head: tuple[int, ...] | None,
    made_by: str,
) -> None:
    """Write into the scratch folder first, so that what stands in the other is whole; stopped, at least the numbers."""
    from refattn import study

    with _writing(out):
        try:
            study.report(scratch, tables, targets=targets, head=head, command=made_by)
        except KeyboardInterrupt:
            os.replace(scratch / NUMBERS, out / NUMBERS)
            raise
        for name in FILES:
            os.replace(scratch / name, out / name)


@contextmanager
def _writing(out: Path) -> Generator[None]:
    import click

    try:
        yield
    except click.UsageError:
        raise
    except Exception as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise click.UsageError(f"--out: cannot write to {out}: {why}") from None


def _line(message: str) -> str:
    return " ".join(message.split())
