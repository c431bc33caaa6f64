"""Running psql with this terminal, for the commands that open it on a database."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NoReturn

import typer

from ..errors import ConfigurationError, MissingExtraError
from ..tenancy import Tenancy
from .runtime import run


def exit_with_psql(command: Callable[[Tenancy], Awaitable[int]]) -> NoReturn:
    """Run a command that ends with ``run_psql``, and exit with its status."""
    # psql handles Ctrl-C itself
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = run(command)
    finally:
        signal.signal(signal.SIGINT, previous)
    raise typer.Exit(status)


async def run_psql(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run psql to its end, with this terminal, and return its exit status.

    Raises:
        ConfigurationError: there is no psql.
    """
    process = await asyncio.create_subprocess_exec(_find_psql(), *arguments, env=environment)
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()


def _find_psql() -> str:
    found = shutil.which("psql")
    if found is None:
        try:
            from ..testing.embedded import find_binary
        except MissingExtraError as exc:
            raise ConfigurationError("there is no psql on PATH; install PostgreSQL's client programs") from exc
        found = str(find_binary("psql"))
    return found


__all__ = ["exit_with_psql", "run_psql"]
