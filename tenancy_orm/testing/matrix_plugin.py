"""``pytest --tenancy-matrix``: the tenancy matrix as one more test of a run, and its report at the end.

Like ``tenancy_orm.testing.plugin``, which registers it, this module imports nothing but pytest until it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ._run import TestRun
    from .matrix import Report

__all__: list[str] = []  # pytest finds all of it

OPTION = "--tenancy-matrix"
NAME = "tenancy_matrix"


def add_options(parser: pytest.Parser) -> None:
    """Add the option and its settings."""
    parser.getgroup("tenancy").addoption(
        OPTION,
        action="store_true",
        default=False,
        help="call every route of the application as another tenant's caller, and list what answered; a route that "
        "shows or changes another tenant's data fails the run",
    )
    parser.addini("tenancy_matrix_public", "paths that are expected to answer everybody: /healthz, /p/*", "linelist")
    parser.addini(
        "tenancy_matrix_examples",
        "module:attribute of a mapping from routes, as POST /notes, to examples of the bodies that they take",
        default="",
    )
    parser.addini(
        "tenancy_matrix_credentials",
        "module:attribute of a coroutine function of the Tenancy and a tenant, which returns the headers of somebody "
        "who may do everything there; callers have API keys where it is not set",
        default="",
    )


class LeakError(Exception):
    """Routes leak; the report at the end of the run says which."""


class MatrixItem(pytest.Item):
    """The walk, as a test."""

    run: TestRun

    def runtest(self) -> None:
        """Walk.

        Raises:
            LeakError: a route leaks.
        """
        report = self.run.background.run(self._walk())
        # the properties of a report come from the workers of pytest-xdist as well
        self.user_properties.append((NAME, str(report)))
        if report.leaks:
            leaking = {f"{one.method} {one.path}" for one in report.leaks}
            raise LeakError(f"{'routes leak' if len(leaking) > 1 else 'a route leaks'}: {', '.join(sorted(leaking))}")

    async def _walk(self) -> Report:
        from ..config.values import load_object
        from .matrix import check

        application = self.run.application
        if application.app is None:
            raise pytest.UsageError(f"{OPTION} needs an ASGI application: tenancy_app names a Tenancy")
        examples, credentials = (
            load_object(path) if (path := self.config.getini(f"tenancy_matrix_{name}")) else None
            for name in ("examples", "credentials")
        )
        await self.run.openings.enter()
        return await check(
            application.app,
            application.tenancy,
            public=self.config.getini("tenancy_matrix_public"),
            examples=examples,
            credentials=credentials,
            beside_others=True,  # of this installation, which is the tests' own
        )

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the leaks in one line: the traceback would show nothing of the application."""
        if isinstance(excinfo.value, LeakError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Return what the run calls it."""
        return self.path, None, NAME


class MatrixCollector:
    """Adds the walk to the tests."""

    def __init__(self, run: TestRun) -> None:
        self._run = run

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add it before options deselect: ``-k tenancy_matrix`` selects it alone."""
        item: MatrixItem = MatrixItem.from_parent(session, name=NAME, nodeid=NAME)
        item.run = self._run
        if session.config.pluginmanager.has_plugin("timeout"):
            item.add_marker(pytest.mark.timeout(0))  # as long as the application's routes take
        items.append(item)


class MatrixReporter:
    """Prints what the walk says at the end of the run, from whichever process it ran in."""

    def __init__(self) -> None:
        self._said: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep it."""
        if report.when == "call":
            self._said += [str(value) for name, value in report.user_properties if name == NAME]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print it."""
        for text in self._said:
            terminalreporter.section("tenancy matrix")
            terminalreporter.write_line(text)


def register(config: pytest.Config, run: TestRun) -> None:
    """Have the run walk, where it is asked to."""
    if config.getoption(OPTION):
        config.pluginmanager.register(MatrixCollector(run), "tenancy-matrix")
        config.pluginmanager.register(MatrixReporter(), "tenancy-matrix-reporter")
