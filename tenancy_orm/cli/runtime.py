"""Shared by all commands: opening the ``Tenancy``, reporting errors, exit statuses."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.markup import escape
from sqlalchemy.exc import SQLAlchemyError

from ..audit.actor import operator as operator  # noqa: PLC0414 - the commands have it from here
from ..config import TenancyConfig, project
from ..config.values import load_object
from ..errors import ConfigurationError, TenancyError
from ..postgres.login import reason_of
from ..tenancy import Tenancy
from .output import errors, json_text, note, printable

T = TypeVar("T")

# whether the command of this process was given --json, for its errors
_as_json: ContextVar[bool] = ContextVar("tenancy_as_json", default=False)


def _remember(value: bool) -> bool:
    _as_json.set(value)
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.", callback=_remember)]
TENANT_NAMES = "A slug, a former slug that still redirects, a verified domain, or an id"
TenantArgument = Annotated[str, typer.Argument(help=f"{TENANT_NAMES}.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

ExpiresIn = Annotated[str | None, typer.Option("--expires-in", help="For how long, such as 30m, 12h or 7d.")]

EXIT_FAILED = 1
_LONGEST_DAYS = 36_500
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def days_from_now(days: float) -> datetime:
    """Return the time in so many days; what is none (below 0, over 100 years, nan) exits with an error."""
    if not 0 <= days <= _LONGEST_DAYS:
        fail(f"{days:g} days is not a time from now: give 0 to {_LONGEST_DAYS}")
    return datetime.now(UTC) + timedelta(days=days)


def duration(text: str | None, *, longest: timedelta = timedelta(days=_LONGEST_DAYS)) -> timedelta | None:
    """Read ``30m``, ``12h`` or ``7d``; None is None, and what is no time, or over ``longest``, exits with an error."""
    if text is None:
        return None
    # at most six digits: no timedelta overflows
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)([smhd])", text.strip())
    given = timedelta(**{_UNITS[found[2]]: float(found[1])}) if found else timedelta(0)
    if not timedelta(0) < given <= longest:
        examples = "90s, 30m, 12h or 7d" if longest >= timedelta(days=7) else "90s, 30m or 12h"
        most = f"at most {longest.days} day{'s' * (longest.days != 1)}"
        fail(f"{text!r} is {'too long' if given > longest else 'not a time'}: write {examples}, {most}")
    return given


def extend_path() -> None:
    """Let the application be imported from the working directory, or from the project's directory."""
    # sys.path of an installed script begins with the script's directory
    named = os.environ.get("TENANCY_CONFIG")
    found = Path(named).resolve().parent if named else project.find()
    for directory in (str(Path.cwd()), *([str(found)] if found else [])):
        if directory not in sys.path:
            sys.path.insert(0, directory)


def load_tenancy() -> Tenancy:
    """Return the ``Tenancy`` that ``TENANCY_APP`` names, or one built from the settings of the project.

    Raises:
        ConfigurationError: neither gives a configuration.
    """
    extend_path()
    path = os.environ.get("TENANCY_APP")
    if not path:
        return Tenancy(TenancyConfig.from_env())
    found = load_object(path)
    if isinstance(found, TenancyConfig):
        return Tenancy(found)
    if isinstance(found, Tenancy):
        return found
    raise ConfigurationError(f"TENANCY_APP={path!r} is neither a Tenancy nor a TenancyConfig")


def run(command: Callable[[Tenancy], Awaitable[T]], *, initialise: bool | None = None) -> T:
    """Open the ``Tenancy``, run ``command`` on it and close it. An error exits the program with its message."""

    async def opened() -> T:
        tenancy = load_tenancy()
        await tenancy.open(initialise=initialise, warm=False)
        try:
            return await command(tenancy)
        finally:
            await tenancy.close()

    return exit_on_error(lambda: asyncio.run(opened()))


def run_stoppable(command: Callable[[Tenancy], Awaitable[T]], *, stopped: str = "stopped") -> T:
    """Run a command; SIGTERM and SIGHUP stop it as Ctrl-C does, with what it has to clear away.

    ``stopped`` is what is said then.
    """

    async def stoppable(tenancy: Tenancy) -> T:
        # asyncio.run cancels on SIGINT alone
        main = asyncio.current_task()
        assert main is not None  # noqa: S101 - for the type checker
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            # once: a second cancellation would interrupt the clean-up that the first one has started
            loop.add_signal_handler(number, lambda: main.cancelling() or main.cancel())
        return await command(tenancy)

    try:
        return run(stoppable)
    except asyncio.CancelledError:
        note(stopped)
        raise typer.Exit(128 + signal.SIGTERM) from None


def exit_on_error(action: Callable[[], T]) -> T:
    """Call ``action``; on an error of this package or of the database, print its message and exit with status 1."""
    try:
        return action()
    except TenancyError as exc:
        fail(str(exc), kind=type(exc).__name__)
    except SQLAlchemyError as exc:
        # without the statement and its parameters, which SQLAlchemy adds, and without a row, which DETAIL may quote
        fail(reason_of(exc))


def confirm(question: str) -> bool:
    """Ask, and return whether the answer is yes. Exits with status 1 where there is nobody to answer."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        print(file=sys.stderr)
        fail("nothing was changed: this needs a confirmation; give it with --yes")


def given_url(url: str) -> str:
    """Return the URL of an option that may have a password: ``-`` reads the standard input, ``$NAME`` a variable."""
    if url == "-":
        return sys.stdin.readline().strip()
    return variable(url[1:]) if url.startswith("$") else url


def variable(name: str) -> str:
    """Return a variable's value; exit where it is not set."""
    if not (value := os.environ.get(name)):
        fail(f"the variable {name} is not set", kind="ConfigurationError")
    return value


def fail(message: str, *, kind: str = "Error") -> NoReturn:
    """Print ``message`` on standard error, as JSON with its kind after ``--json``, and exit with status 1.

    A server's message may have what a tenant wrote.
    """
    if _as_json.get():
        print(json_text({"error": kind, "message": message}), file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)
    errors.print(f"[bold red]error:[/] {escape(printable(message))}", highlight=False, soft_wrap=True)
    raise typer.Exit(EXIT_FAILED)
