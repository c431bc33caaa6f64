"""Further processes of this machine that take part in a run, since one Python process uses one core.

Each is a ``migrate_process``, which loads the application as ``tenancy migrate join`` does on another machine; the
records of the run keep them from doing each other's work. It ends with the run, or with the command that has started
it, whatever has ended that: its standard input is closed then.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import typer

from ..cancellation import run_to_completion
from ..events import MigrationRunEnded, MigrationRunStarted
from ..tenancy import Tenancy
from .output import note

Processes = Annotated[
    int | None,
    typer.Option(
        min=1, max=64, help="Processes of this machine that take part; by default several if there are many tenants."
    ),
]

MOST = 4
"""How many processes there are at most, unless more are asked for."""

MANY = 500
"""From so many tenants on there are several: what starting one costs would not pay otherwise."""

_END_SECONDS = 30.0  # how long the migrations of a process may take to be rolled back


def wanted(given: int | None, configured: int | None, tenants: int) -> int:
    """Return how many processes take part in a run over so many tenants.

    Args:
        given: How many the command asks for.
        configured: How many the setting asks for.
        tenants: How many tenants the run has.
    """
    number = configured if given is None else given
    if number is not None:
        return number
    return max(1, min(MOST, _cores())) if tenants >= MANY else 1


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@asynccontextmanager
async def helped(tenancy: Tenancy, processes: int | None, x: Sequence[str] = ()) -> AsyncIterator[None]:
    """Let further processes of this machine take part in the run that begins in the body, until it ends.

    Args:
        tenancy: An open ``Tenancy``.
        processes: How many there are with this one, as for ``wanted``.
        x: The ``-x`` arguments of the run.
    """
    helpers: list[asyncio.Task[None]] = []
    is_over = asyncio.Event()

    def started(event: MigrationRunStarted) -> None:
        number = wanted(processes, tenancy.config.migration.processes, event.tenants)
        task = json.dumps({"run": event.run, "x": list(x)}).encode() + b"\n"
        missing = range(number - 1 - len(helpers))
        helpers.extend(asyncio.create_task(_help(task, is_over), name="tenancy-run-process") for _ in missing)

    def ended(event: MigrationRunEnded) -> None:
        # otherwise others may still be migrating tenants, and end once they have
        if event.state == "done":
            is_over.set()

    bus = tenancy.events
    unsubscribe = (bus.subscribe(MigrationRunStarted, started), bus.subscribe(MigrationRunEnded, ended))
    try:
        yield
        await _wait_for(helpers)
    finally:
        for one in unsubscribe:
            one()
        is_over.set()
        await run_to_completion(_wait_for(helpers))


async def _wait_for(helpers: Sequence[asyncio.Task[None]]) -> None:
    if helpers:
        await asyncio.wait(helpers)


async def _help(task: bytes, is_over: asyncio.Event) -> None:
    """Start a process that takes part in a run, and return once it has ended; it is to end when ``is_over`` is set."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"{__package__}.migrate_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=sys.stderr.fileno(),  # what revisions print must not be in the report
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )
    except OSError as exc:
        note(f"a process that was to take part in the run cannot be started: {exc.strerror}")
        return
    assert process.stdin is not None  # noqa: S101 - for the type checker
    with suppress(OSError):
        process.stdin.write(task)
        await process.stdin.drain()
    ended = asyncio.ensure_future(process.wait())
    over = asyncio.ensure_future(is_over.wait())
    await asyncio.wait((ended, over), return_when=asyncio.FIRST_COMPLETED)
    over.cancel()
    process.stdin.close()
    if process.returncode is None:
        process.terminate()  # one that is still loading the application does not look at its input
    try:
        async with asyncio.timeout(_END_SECONDS):
            status = await ended
    except TimeoutError:
        process.kill()
        status = await process.wait()
    if status and not is_over.is_set():
        note(f"a process that took part in the run has ended with status {status}; the others continue")


__all__ = ["MANY", "MOST", "Processes", "helped", "wanted"]
