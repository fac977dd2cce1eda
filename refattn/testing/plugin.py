"""The pytest plugin: ``pytest --refattn my.module:fn`` adds one item for each configuration of the conformance kit.

Without the option it does nothing, and nothing of the kit is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refattn.testing._run import Run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --refattn and what goes with it."""
    group = parser.getgroup("refattn", "attention kernels against their definition")
    group.addoption("--refattn", metavar="MODULE:FUNCTION", help="run the conformance kit on this function")
    group.addoption("--refattn-profile", metavar="NAME", default="torch", help="whose words it takes (torch)")
    group.addoption("--refattn-arithmetic", metavar="PRESET", help="what it computes in (fp32)")
    group.addoption("--refattn-framework", metavar="NAME", help="whose arrays it takes; the profile's unless given")
    group.addoption("--refattn-unsupported", metavar="A,B", default="", help="capabilities that it does not claim")
    group.addoption("--refattn-seed", type=int, default=0, help="seed of what is drawn (0)")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the kit's items to what was collected."""
    option: Any = config.getoption
    name = option("--refattn")
    if name is None:
        return
    from refattn.testing._run import prepare

    listed: str = option("--refattn-unsupported")
    try:
        run = prepare(
            name,
            option("--refattn-profile"),
            option("--refattn-arithmetic"),
            framework=option("--refattn-framework"),
            unsupported=[one.strip() for one in listed.split(",") if one.strip()],
            seed=option("--refattn-seed"),
        )
        run.worker.__enter__()
    except (ValueError, TypeError, ImportError) as error:
        raise pytest.UsageError(f"--refattn: {error}") from None
    config.add_cleanup(lambda: run.worker.__exit__(None, None, None))
    kernel: Kernel = Kernel.from_parent(session, name=name)  # pyright: ignore[reportUnknownMemberType]
    kernel.run = run
    items.extend(kernel.collect())


class Kernel(pytest.Collector):
    """The function that is tried."""

    run: Run

    def collect(self) -> Iterator[Question]:
        """Yield one item a configuration."""
        from refattn.testing._run import names

        for name in names():
            question: Question = Question.from_parent(self, name=name)  # pyright: ignore[reportUnknownMemberType]
            yield question


class Question(pytest.Item):
    """One configuration."""

    def runtest(self) -> None:
        """Ask it, and end as the verdicts demand."""
        from refattn.testing._kit import conclude

        assert isinstance(self.parent, Kernel)
        conclude(self.parent.run, self.parent.run.results(self.name))

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Name it in reports."""
        assert isinstance(self.parent, Kernel)
        return self.path, None, f"{self.parent.name}[{self.name}]"
