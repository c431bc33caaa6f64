"""``WalReceiver``: receives a server's WAL into a directory as it is written (``tenancy backup wal``).

``pg_receivewal`` does it, with a replication slot, so that the server keeps what is not received yet. This starts it
again where it ends, ends a transaction on the server now and then (a recovery knows by it how far it has come), and
finds out when the slot was lost: WAL is missing then, and a directory of its own begins.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...cancellation import run_to_completion
from ...errors import ServerIdentityError, ServerUnavailableError
from ...postgres import connections
from ...postgres.connections import POLL_SECONDS, Connection
from ...postgres.failures import SERVER_FAILURES
from ...postgres.login import reason_of
from ...postgres.programs import environment_of, find_server_programs
from ...servers import Server
from ...servers.identity import differ, read_identity
from .base_backups import BackupDirectory, check_replication, connected, replication_environment
from .kept_wal import directory_system

logger = logging.getLogger("tenancy_orm.recovery")

_AGAIN_SECONDS = 1.0
_LONGEST_AGAIN_SECONDS = 30.0
_END_SECONDS = 10.0
_REMOVED = "has already been removed"
_LEFT = "is not in this server's history"
_COMMIT = "SELECT pg_catalog.pg_logical_emit_message(true, 'tenancy', '')"
_MAY = "SELECT rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user"
_SLOT = "SELECT active_pid, wal_status FROM pg_catalog.pg_replication_slots WHERE slot_name = $1"

WalEventKind = Literal["receiving", "received", "interrupted", "gap"]


@dataclass(frozen=True, slots=True)
class WalEvent:
    """Something that has happened to a receiver.

    Attributes:
        kind: "receiving" where it has begun, "received" after each look at the server, "interrupted" where it begins
            again, and "gap" where WAL is missing: times after it can be recovered from the next base backup on.
        text: What happened.
    """

    kind: WalEventKind
    text: str


class WalReceiver:
    """Receives the WAL of one server.

    Args:
        server: The server.
        directory: Where it goes.
        slot: The name of the replication slot.
        client_programs: The directory of PostgreSQL's programs; None as in ``find_programs``.
        look_seconds: How often a transaction is ended on the server, and the slot is looked at.
        progress: Called with what happens.
    """

    def __init__(
        self,
        server: Server,
        directory: BackupDirectory,
        *,
        slot: str,
        client_programs: str | None,
        look_seconds: float,
        progress: Callable[[WalEvent], None] | None = None,
    ) -> None:
        self._server = server
        self._directory = directory
        self._slot = slot
        self._client_programs = client_programs
        self._look_seconds = look_seconds
        self._progress = progress

    async def run(self) -> None:
        """Receive until this is cancelled; a server that does not answer is tried again.

        Raises:
            RecoveryError: the administrator may not replicate.
            ConfigurationError: there are no programs of the server's version.
            OperationStateError: another process receives the server's WAL in this directory.
            ServerIdentityError: another cluster answers at the server's address.
        """
        await asyncio.to_thread(self._directory.prepare)
        pause = _AGAIN_SECONDS
        with self._directory.locked("wal.lock"):
            while True:
                try:
                    await self._receive()
                    pause = _AGAIN_SECONDS
                except SERVER_FAILURES as exc:
                    self._note("interrupted", reason_of(exc))
                except ServerIdentityError:
                    raise  # the WAL of another cluster is not what is kept here
                except ServerUnavailableError as exc:
                    self._note("interrupted", str(exc))
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_AGAIN_SECONDS)

    async def drop_slot(self) -> None:
        """Drop the slot, so that the server keeps no WAL for this receiver any more."""
        async with connected(self._server) as connection:
            await self._release(connection)
            await connection.execute(
                "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots "
                "WHERE slot_name = $1",
                self._slot,
            )

    async def _receive(self) -> None:
        """Receive until the program ends."""
        async with connected(self._server) as connection:
            check_replication(self._server, bool(await connection.fetchval(_MAY)))
            version = connections.version(connection)
            programs = await asyncio.to_thread(find_server_programs, version, self._client_programs)
            await self._release(connection)
            target = await self._ensure_slot(connection)
            process = await asyncio.create_subprocess_exec(
                programs.path("pg_receivewal"),
                f"--directory={target}",
                f"--slot={self._slot}",
                "--no-loop",
                "--no-password",
                "--status-interval=5",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=environment_of(replication_environment(self._server)),
                start_new_session=True,
            )
            try:
                self._note("receiving", f"into {target}")
                await self._watch(connection, process)
            finally:
                await run_to_completion(_end(process))

    async def _watch(self, connection: Connection, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None  # noqa: S101 - it is a pipe
        reading = asyncio.ensure_future(process.stderr.read())
        try:
            while not reading.done():
                await connection.execute(_COMMIT)
                row = await connection.fetchrow(_SLOT, self._slot)
                if row is None or row["wal_status"] == "lost":
                    return  # the next attempt makes another one
                self._note("received", str(await connection.fetchval("SELECT pg_catalog.pg_current_wal_flush_lsn()")))
                await asyncio.wait([reading], timeout=self._look_seconds)
            printed = (await reading).decode(errors="replace").strip()
            self._note("interrupted", printed.splitlines()[-1] if printed else "pg_receivewal has ended")
            if _REMOVED in printed:
                await self._drop_lost(connection)
            elif _LEFT in printed:
                # what was received last is on a timeline that this server has left before that
                await asyncio.to_thread(self._begin_directory)
                self._gap(
                    "the server continues from an earlier position than was received: it was recovered or promoted"
                )
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _ensure_slot(self, connection: Connection) -> Path:
        """Return the directory that is received into: the last one, or a new one with a new slot."""
        row = await connection.fetchrow(_SLOT, self._slot)
        if row is not None and row["wal_status"] == "lost":
            await self._drop_lost(connection)
            row = None
        found = await asyncio.to_thread(self._directory.wal_directories)
        is_replaced = bool(found) and await self._is_replaced(connection, found[-1])
        if row is not None and found and not is_replaced:
            last: Path = found[-1]
            return last
        if row is None:
            await connection.execute("SELECT pg_catalog.pg_create_physical_replication_slot($1, true)", self._slot)
        if any(any(path.iterdir()) for path in found):
            replaced, lost = (
                "the server is another cluster now",
                "the server did not keep the WAL that was not received yet",
            )
            self._gap(replaced if is_replaced else lost)
        return await asyncio.to_thread(self._begin_directory)

    def _begin_directory(self) -> Path:
        found = self._directory.wal_directories()
        target = self._directory.wal / f"{int(found[-1].name) + 1 if found else 1:06d}"
        target.mkdir(mode=0o700)
        return target

    def _gap(self, reason: str) -> None:
        self._note("gap", f"{reason}; take a base backup now: only times before this and after that can be recovered")

    async def _is_replaced(self, connection: Connection, directory: Path) -> bool:
        """Whether the WAL in a directory is that of another cluster, as far as this can be told."""
        identity = await read_identity(connection)
        received = await asyncio.to_thread(directory_system, directory)
        return received is not None and differ(f"system:{received}", identity)

    async def _drop_lost(self, connection: Connection) -> None:
        await self._release(connection)
        await connection.execute("SELECT pg_catalog.pg_drop_replication_slot($1)", self._slot)

    async def _release(self, connection: Connection) -> None:
        """End whoever uses the slot. The directory's lock is held: it is a program that a killed process has left."""
        while (pid := await connection.fetchval(_SLOT, self._slot)) is not None:
            await connection.execute("SELECT pg_catalog.pg_terminate_backend($1)", pid)
            await asyncio.sleep(POLL_SECONDS)

    def _note(self, kind: WalEventKind, text: str) -> None:
        if kind == "gap":
            logger.error("server %s: %s", self._server.name, text)
        elif kind == "interrupted":
            logger.warning("server %s: its WAL is not received now: %s", self._server.name, text)
        if self._progress is not None:
            self._progress(WalEvent(kind, text))


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


__all__ = ["WalEvent", "WalEventKind", "WalReceiver"]
