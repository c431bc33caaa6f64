"""The progress of a run of the fleet: bars on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from ..errors import ControlUnavailableError, PreflightError, TenancyError
from ..events import MigrationRunStarted
from ..migrations.failures import describe
from ..runs import FleetReport, Progress, TenantOutcome
from ..runs.progress import RunProgress, duration_text
from ..tenancy import Tenancy
from .migrate_processes import helped
from .output import console, errors, failures_listed, note, print_json, print_table
from .runtime import EXIT_FAILED, run

LINE_SECONDS = 5.0
"""How often a log gets a line."""

EXIT_PAUSED = 3
"""The exit status of a command that has ended because its run is paused, as its waves ask for."""

_LOOK_SECONDS = 0.5


class _Display(Protocol):
    def show(self, progress: RunProgress) -> None: ...

    def close(self) -> None: ...


class _Bars:
    """A bar for all tenants, and one for each server where there are several."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[more]}"),
        )
        self._progress = Bars(*columns, console=errors, transient=False)
        self._tasks: dict[str, Any] = {}
        self._progress.start()

    def show(self, progress: RunProgress) -> None:
        more = [f"{progress.failed} failed"] * bool(progress.failed)
        more.append(f"{progress.rate:.1f}/s")
        if progress.remaining_seconds and progress.state == "running":
            more.append(f"{duration_text(progress.remaining_seconds)} left")
        if progress.data_text is not None:
            more.append(progress.data_text)
        if progress.wait_text is not None:
            more.append(progress.wait_text)
        wave = f" [{progress.wave}/{progress.waves} {progress.wave_name}]" if progress.waves > 1 else ""
        title = f"{progress.command} {progress.target}{wave}"
        self._bar("", title, progress.total, progress.done + progress.failed, ", ".join(more))
        if len(progress.servers) > 1:
            for one in progress.servers:
                failed = f"{one.failed} failed" if one.failed else ""
                self._bar(one.server, f"  {one.server}", one.total, one.done + one.failed, failed)

    def _bar(self, key: str, title: str, total: int, done: int, more: str) -> None:
        # a name in brackets is no markup
        title = title.replace("[", r"\[")
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(title, total=total, more=more)
        self._progress.update(self._tasks[key], description=title, total=total, completed=done, more=more)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """A line when something has changed, at most every few seconds."""

    def __init__(self) -> None:
        self._shown = ""
        self._since = float("-inf")

    def show(self, progress: RunProgress) -> None:
        now = asyncio.get_running_loop().time()
        line = progress.line()
        if line == self._shown or (now - self._since < LINE_SECONDS and progress.state == "running"):
            return
        self._shown, self._since = line, now
        note(line)

    def close(self) -> None: ...


class _Silent:
    """Receives the progress of a run, which is read from the records instead."""

    def total(self, count: int) -> None: ...

    def done(self, outcome: TenantOutcome) -> None: ...


@asynccontextmanager
async def shown(tenancy: Tenancy, *, quiet: bool) -> AsyncIterator[Progress]:
    """Show how far a run is on standard error, until the body has ended.

    Args:
        tenancy: An open ``Tenancy``.
        quiet: Show nothing.

    Yields what the run gets as its ``progress``.
    """
    number: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def started(event: MigrationRunStarted) -> None:
        if not number.done():
            number.set_result(event.run)
            # first: others may join it, and go on with it if this process is killed
            note(f"run {event.run}")

    unsubscribe = tenancy.events.subscribe(MigrationRunStarted, started)
    task = None if quiet else asyncio.create_task(_show(tenancy, number))
    try:
        yield _Silent()
    finally:
        unsubscribe()
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            # the report of the run is worth more than that error
            if not task.cancelled() and (error := task.exception()) is not None:
                note(f"the progress could not be shown: {describe(error)}")


async def _show(tenancy: Tenancy, run: asyncio.Future[int]) -> None:
    number = await run
    display: _Display = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        while True:
            # without the control database there is no progress either; the run itself says so
            with suppress(ControlUnavailableError):
                display.show(await tenancy.migrations.progress(number))
            await asyncio.sleep(_LOOK_SECONDS)
    except asyncio.CancelledError:
        with suppress(TenancyError):
            display.show(await tenancy.migrations.progress(number))
        raise
    finally:
        display.close()


def run_shown(
    migrate: Callable[[Tenancy, Progress], Awaitable[FleetReport]],
    *,
    as_json: bool,
    processes: int | None = None,
    x: Sequence[str] = (),
) -> None:
    """Run a command that migrates tenants, show its progress and its report, and exit with what has come of it.

    ``processes`` and ``x`` are those of ``migrate_processes.helped``.

    Status 1 is for tenants that failed or were not started, 3 for a pause that the waves of the run ask for. After
    Ctrl-C or SIGTERM what was begun is rolled back, and the tenants wait for whoever resumes the run.
    """
    runs: list[int] = []

    async def command(tenancy: Tenancy) -> FleetReport:
        # asyncio.run cancels on SIGINT alone
        main = asyncio.current_task()
        assert main is not None  # noqa: S101 - for the type checker
        # once: a second cancellation would interrupt the clean-up that the first one has started
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: main.cancelling() or main.cancel())
        tenancy.events.subscribe(MigrationRunStarted, lambda started: runs.append(started.run))
        async with shown(tenancy, quiet=as_json) as progress, helped(tenancy, processes, x):
            try:
                return await migrate(tenancy, progress)
            except PreflightError as exc:
                _show_preflight(exc, as_json=as_json)
                raise

    try:
        with failures_listed():
            report = run(command)
    except (asyncio.CancelledError, KeyboardInterrupt) as exc:
        if runs:
            note(f"run {runs[0]} is interrupted; continue with: tenancy migrate resume {runs[0]}")
        number = signal.SIGINT if isinstance(exc, KeyboardInterrupt) else signal.SIGTERM
        raise typer.Exit(128 + number) from None
    show_report(report, as_json=as_json)
    if report.is_planned and not report.failures:
        raise typer.Exit(EXIT_PAUSED)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def _show_preflight(error: PreflightError, *, as_json: bool) -> None:
    """List every tenant that did not pass: the message has the first ones alone."""
    if as_json:
        print_json({"preflight": error.failures, "total": error.total})
    else:
        print_table("failed", ("tenant", "found"), error.failures.items())


def show_report(report: FleetReport, *, as_json: bool) -> None:
    """Print the report of a run."""
    if as_json:
        print_json(report)
        return
    console.print(report.summary(), highlight=False, markup=False)
    reasons = report.reasons
    if report.state in ("paused", "cancelled"):
        # the others are not started because of that, and the summary counts them
        reasons = {outcome.slug: outcome.error or "" for outcome in report.failures}
    if reasons:
        revisions = {outcome.slug: outcome.after for outcome in report.failures}
        rows = [(slug, revisions.get(slug), reason) for slug, reason in reasons.items()]
        print_table("failed", ("tenant", "revision", "error"), rows)
    if report.next_step is not None:
        note(report.next_step)


__all__ = ["EXIT_PAUSED", "LINE_SECONDS", "run_shown", "show_report", "shown"]
