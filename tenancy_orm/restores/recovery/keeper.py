"""The process that runs the programs of one recovery, and ends them whatever happens to this one: see ``_keeper``."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cancellation import run_to_completion
from ...errors import RecoveryError
from .accounts import Account

_PROGRAM = Path(__file__).with_name("_keeper.py")
_PREFIX = "tenancy-recovery-"
_LOCK = "lock"
_LINE_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that has ended."""

    status: int
    output: str
    errors: str


class Keeper:
    """Runs programs for one recovery.

    Attributes:
        home: A new directory that the account alone can read.
        sockets: Another one, with a short path: that of a socket has 107 bytes at most.
    """

    def __init__(self, process: asyncio.subprocess.Process, home: Path, sockets: Path, account: Account) -> None:
        self._process = process
        self._mutex = asyncio.Lock()
        self.home = home
        self.sockets = sockets
        self.account = account

    async def run(
        self, *arguments: str, text: str = "", environment: Mapping[str, str] | None = None, as_account: bool = True
    ) -> Finished:
        """Run a program to its end."""
        request = {"do": "run", "arguments": arguments, "input": text, "as_account": as_account}
        answer = await self._ask({**request, "environment": environment or _environment()})
        return Finished(int(answer["status"]), str(answer["output"]), str(answer["errors"]))

    async def start(self, arguments: Sequence[str], log: Path) -> None:
        """Start the server; what it writes goes to ``log``."""
        await self._ask({"do": "start", "arguments": arguments, "environment": _environment(), "log": str(log)})

    async def status(self) -> int | None:
        """Return the exit status of the server; None while it runs."""
        status = (await self._ask({"do": "status"}))["status"]
        return None if status is None else int(status)

    async def stop(self) -> None:
        """Shut the server down, and wait for it."""
        await self._ask({"do": "stop"})

    async def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # noqa: S101 - they are pipes
        async with self._mutex:
            with suppress(ConnectionError):
                stdin.write(json.dumps(request).encode() + b"\n")
                await stdin.drain()
            line = await stdout.readline()
        if not line:
            raise RecoveryError("the process that keeps the recovered server was ended; try again")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def close(self) -> None:
        """End everything and delete the directories."""
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - it is a pipe
        stdin.close()
        await self._process.wait()
        # where it was killed itself
        await asyncio.to_thread(_clear, self.home)
        await asyncio.to_thread(shutil.rmtree, self.sockets, True)


@asynccontextmanager
async def open_keeper(parent: Path, account: Account) -> AsyncIterator[Keeper]:
    """Start a keeper for the body. At its end, and also if this process is killed, nothing of it remains.

    Args:
        parent: The directory in which it makes its own one.
        account: What its programs run as.

    Raises:
        OSError: the directory cannot be written.
    """
    # another account may go through it, into a directory that it alone can read
    await asyncio.to_thread(parent.mkdir, mode=0o711, parents=True, exist_ok=True)
    await asyncio.to_thread(_sweep, parent)
    home = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    sockets = Path(tempfile.mkdtemp(prefix="tenancy-s-", dir="/tmp"))
    process = None
    try:
        for directory in (home, sockets):
            account.take(directory)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(_PROGRAM),
            str(home / _LOCK),
            str(account.uid),
            str(account.gid),
            str(home),
            str(sockets),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
            limit=_LINE_BYTES,
        )
    finally:
        if process is None:
            for directory in (home, sockets):
                shutil.rmtree(directory, ignore_errors=True)
    keeper = Keeper(process, home, sockets, account)
    try:
        yield keeper
    finally:
        await run_to_completion(keeper.close())


def _environment() -> dict[str, str]:
    """This process's variables without libpq's, which redirect programs, and without settings, which are secret."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "TENANCY_"))}
    return {**own, "LC_ALL": "C", "TZ": "UTC", "PGPASSFILE": os.devnull}


def _sweep(parent: Path) -> None:
    """Delete what keepers have left that were killed themselves, or that a crash of the machine has ended."""
    for home in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(home / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(home)
            finally:
                os.close(descriptor)


def _clear(home: Path) -> None:
    """End the server of a directory that nobody keeps, and delete the directory."""
    data = home / "data"
    with suppress(OSError, ValueError):
        pid = int((data / "postmaster.pid").read_text("utf-8").split("\n", 1)[0])
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        # a pid proves nothing, it may be another process's by now
        if pid > 0 and str(data) in arguments:
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


__all__ = ["Finished", "Keeper", "open_keeper"]
