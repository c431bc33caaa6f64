"""What must hold before a run goes on with its next wave: commands and functions of the application's operators.

Commands and functions are read from the run's record, by whichever machine is there when a wave ends. So that a row of
the control database is not enough to have a program run there, they are sealed with the installation's encryption key,
and nothing runs where the seal does not fit.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextvars
import hashlib
import inspect
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ..cancellation import run_to_completion
from ..config.values import load_object
from ..errors import ConfigurationError, SecretError, TenancyError
from ..migrations.failures import describe
from ..migrations.logs import logger
from ..postgres.errors import without_detail
from ..secrets.keyring import Keyring
from .waves import Wave, Waves

_KILL_SECONDS = 5.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveReport:
    """A wave of a run that has ended: what its checks are about.

    ``wave`` counts from 1. ``tenants`` and ``failed`` are slugs; who failed is in both.
    """

    run: int
    command: str
    target: str
    wave: int
    name: str
    tenants: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def failed_share(self) -> float:
        """The share of the tenants that failed."""
        return len(self.failed) / len(self.tenants) if self.tenants else 0.0


def over_budget(wave: Wave, report: WaveReport) -> str | None:
    """Return the reason why a run does not go on after a wave with so many failures; None if it does."""
    if report.failed_share <= wave.error_budget:
        return None
    names = ", ".join(report.failed[:5]) + (", ..." if len(report.failed) > 5 else "")
    allowed = f"{wave.error_budget * 100:g} % may" if wave.error_budget else "none may"
    return f"{len(report.failed)} of {len(report.tenants)} tenants failed in wave {report.name!r}, {allowed}: {names}"


def require_checks(waves: Waves) -> None:
    """Refuse commands and functions that this process cannot find, before a tenant is migrated.

    Raises:
        ConfigurationError: a program is not there or not executable, a command cannot be split, or a function cannot be
            loaded.
    """
    for wave in waves.waves:
        for command in wave.commands:
            try:
                arguments = shlex.split(command)
            except ValueError as exc:
                raise ConfigurationError(f"wave {wave.name!r}: command {command!r} cannot be read: {exc}") from exc
            if not arguments:
                raise ConfigurationError(f"wave {wave.name!r}: a command is empty")
            if shutil.which(arguments[0]) is None:
                raise ConfigurationError(
                    f"wave {wave.name!r}: command {command!r}: {arguments[0]!r} is not a program that can be "
                    "executed here; every machine of the run needs it, in its working directory or on its PATH"
                )
        for path in map(str, wave.functions):
            try:
                if not callable(load_object(path)):
                    raise ConfigurationError(f"{path!r} is not a function")
            except ConfigurationError as exc:
                raise ConfigurationError(f"wave {wave.name!r}: {exc}") from exc


def seal_checks(keyring: Keyring, waves: Waves, run: int) -> str | None:
    """Return a seal of the commands and functions of a run's ``waves``; None if there are none.

    It fits this run alone: who can write rows of the control database cannot have the checks of another run repeated.
    """
    found = _checks_of(waves)
    if not found:
        return None
    return base64.b64encode(keyring.seal(_digest(found), associated=_associated(run))).decode()


def is_sealed(keyring: Keyring, waves: Waves, run: int, seal: str | None) -> bool:
    """Whether ``seal`` was made for these commands and functions of this run by a process of this installation."""
    found = _checks_of(waves)
    if not found:
        return True
    try:
        opened = keyring.open(base64.b64decode(seal or "", validate=True), associated=_associated(run))
    except (SecretError, binascii.Error) as exc:
        logger.error("the checks between waves are refused: %s", exc)
        return False
    return opened == _digest(found)


def _associated(run: int) -> bytes:
    return f"migration-run-checks:{run}".encode()


def _checks_of(waves: Waves) -> list[Any]:
    if not any(wave.commands or wave.functions for wave in waves.waves):
        return []
    return [[list(wave.commands), list(wave.functions)] for wave in waves.waves]


def _digest(checks: list[Any]) -> bytes:
    return hashlib.sha256(json.dumps(checks).encode()).digest()


async def run_checks(wave: Wave, report: WaveReport) -> str | None:
    """Run the commands of a wave, then its functions; return the reason of the first that does not hold."""
    for command in wave.commands:
        if reason := await _bounded(_run_command(command, report), f"command {command!r}", wave.check_timeout):
            return reason
    for path in map(str, wave.functions):
        if reason := await _bounded(_call(path, report), f"function {path}", wave.check_timeout):
            return reason
    return None


async def _bounded(check: Any, name: str, seconds: float) -> str | None:
    logger.info("checking: %s", name)
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            reason: str | None = await check
    except TimeoutError as exc:
        if not deadline.expired():
            return f"{name} failed: {describe(exc)}"
        return f"{name} took longer than {seconds:g} s"
    except Exception as exc:  # noqa: BLE001 - a check may raise anything; then it does not hold
        logger.warning("%s raised an error", name, exc_info=without_detail(exc))
        return f"{name} failed: {describe(exc)}"
    return None if reason is None else f"{name} {reason}"


async def _run_command(command: str, report: WaveReport) -> str | None:
    """Run a command with the report as JSON on its standard input, and its output on standard error."""
    arguments = shlex.split(command)
    if not arguments:
        raise ConfigurationError("it is empty")
    with tempfile.TemporaryFile() as document:
        document.write(json.dumps(asdict(report)).encode())
        document.seek(0)
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=document,
            # standard output may be the JSON of this program
            stdout=_standard_error(),
            stderr=_standard_error(),
            env=os.environ | _variables(report),
            start_new_session=True,  # so that what it has started ends with it
        )
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            await run_to_completion(_end(process))
    if status < 0:
        return f"was ended by signal {-status}"
    return None if status == 0 else f"exited with status {status}"


def _standard_error() -> int | None:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # it was replaced by an object of Python
        return None


def _variables(report: WaveReport) -> Mapping[str, str]:
    return {
        "MIGRATION_RUN": str(report.run),
        "MIGRATION_WAVE": str(report.wave),
        "MIGRATION_WAVE_NAME": report.name,
        "MIGRATION_TENANTS": str(len(report.tenants)),
        "MIGRATION_FAILED": str(len(report.failed)),
    }


async def _end(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await process.wait()
                return


async def _call(path: str, report: WaveReport) -> str | None:
    function = load_object(path)
    if not callable(function):
        raise ConfigurationError("it is not a function")
    if inspect.iscoroutinefunction(function):
        found = await function(report)
    else:
        found = await _in_thread(function, report)
        found = await found if inspect.isawaitable(found) else found
    if found is None or found is True:
        return None
    return f"says: {found}" if isinstance(found, str) else f"returned {found!r}"


async def _in_thread(function: Callable[[WaveReport], Any], report: WaveReport) -> Any:
    """Call a plain function in a thread of its own, which the end of the process does not wait for.

    It would for those of ``asyncio.to_thread``, for ever if the function does not end.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    context = contextvars.copy_context()

    def finish(found: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result((found, error))

    def call() -> None:
        found, error = None, None
        try:
            found = context.run(function, report)
        except BaseException as exc:  # noqa: BLE001 - also that of sys.exit
            error = exc
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, found, error)

    threading.Thread(target=call, name="tenancy-check", daemon=True).start()
    found, error = await ended
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise TenancyError(f"it raised {error!r}") from error
    return found


__all__ = ["WaveReport", "is_sealed", "over_budget", "require_checks", "run_checks", "seal_checks"]
