"""``tenancy worker``, which does what is due, and ``tenancy jobs``, which shows it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ControlUnavailableError
from ..jobs import JobStatus
from ..tenancy import Tenancy
from ..worker import Worker, WorkerReport, show_alive
from .output import Column, console, json_text, note, print_json, print_table
from .runtime import Json, exit_on_error, fail, load_tenancy, run

app = typer.Typer(help="What workers do: when it is due, who does it, how it has ended.", no_args_is_help=True)
logger = logging.getLogger("tenancy_orm.worker")

_RETRY_SECONDS = 5.0
_LATE_SECONDS = 300.0
_LISTED = (Column("job", keep=True), "state", "due", Column("by", drop=1), "ended", "failures", Column("error", drop=2))


def worker(
    jobs: Annotated[
        list[str] | None, typer.Option("--jobs", help="Only these jobs: names, separated by commas; repeatable.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Do what is due now, and exit.")] = False,
    alive_file: Annotated[
        Path | None, typer.Option(help="Touch this file every few seconds, for a liveness probe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Do what is due, until SIGTERM: housekeeping and other jobs. Run it anywhere, any number of times."""
    names = [name.strip() for given in jobs or () for name in given.split(",") if name.strip()] or None
    _log(as_json=as_json)

    async def work() -> WorkerReport:
        stopping, running = asyncio.Event(), list[Worker]()

        def stop() -> None:
            stopping.set()
            for each in running:
                each.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        tenancy = load_tenancy()
        if not await _open(tenancy, stopping, alive_file, patient=not once):
            return WorkerReport()
        try:
            made = tenancy.worker(names, alive_file=alive_file)
            running.append(made)
            if stopping.is_set():
                made.stop()
            logger.info("worker starts, for %s", ", ".join(made.names))
            report = await made.run(once=once)
            logger.info("worker ends: %d done, %d failed, %d lost", report.done, report.failed, report.lost)
            return report
        finally:
            await tenancy.close()

    report = exit_on_error(lambda: asyncio.run(work()))
    if once and (report.failed or report.lost):
        raise typer.Exit(1)


async def _open(tenancy: Tenancy, stopping: asyncio.Event, alive_file: Path | None, *, patient: bool) -> bool:
    """Open it, as soon as the control database answers; False if the process is to end before."""
    while not stopping.is_set():
        try:
            await tenancy.open(warm=False)
        except ControlUnavailableError as exc:
            if not patient:
                raise
            logger.error("the worker does not start yet: %s", exc)
            if alive_file is not None:
                show_alive(alive_file)
            try:
                await asyncio.wait_for(stopping.wait(), _RETRY_SECONDS)
            except TimeoutError:
                continue
        else:
            return True
    return False


class _JsonFormatter(logging.Formatter):
    """One JSON object on each line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return " ".join(json_text(fields).splitlines())


def _log(*, as_json: bool) -> None:
    """Log on standard error, unless the application has set up its own logging."""
    if logging.getLogger().hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_JsonFormatter() if as_json else plain)
    ours = logging.getLogger("tenancy_orm")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)


@app.command("list")
def list_jobs(
    check: Annotated[
        bool,
        typer.Option("--check", help="Exit with status 1 if a job has failed, or if no worker runs one that is due."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the jobs of the workers."""

    async def command(tenancy: Tenancy) -> tuple[JobStatus, ...]:
        return await tenancy.jobs.list()

    found = run(command)
    wrong = [job for job in found if job.failures or job.late_seconds > _LATE_SECONDS]
    if as_json:
        print_json({"items": [asdict(job) for job in found]})
    else:
        rows = [
            (x.name, x.state, x.due_at, f"{x.host}/{x.pid}" if x.host else None, x.ended_at, x.failures, x.error)
            for x in found
        ]
        print_table("jobs", _LISTED, rows)
        if not found:
            note("no worker has run yet: tenancy worker")
    if check and (wrong or not found):
        for job in wrong:
            note(f"{job.name}: failed {job.failures} times in a row, due since {job.late_seconds:.0f} s")
        raise typer.Exit(1)


@app.command()
def hasten(name: Annotated[str, typer.Argument(help="The job.")]) -> None:
    """Make a job due now: the next worker that looks does it."""

    async def command(tenancy: Tenancy) -> bool:
        return await tenancy.jobs.hasten(name)

    if not run(command):
        fail(f"there is no job {name!r}")
    console.print(f"{name} is due now", highlight=False)


@app.command()
def forget(name: Annotated[str, typer.Argument(help="The job.")]) -> None:
    """Remove the row of a job that no code has any more."""

    async def command(tenancy: Tenancy) -> bool:
        return await tenancy.jobs.forget(name)

    if not run(command):
        fail(f"there is no job {name!r} that can be forgotten: it is unknown, or a worker runs it now")
    console.print(f"{name} is forgotten", highlight=False)
