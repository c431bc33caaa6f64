"""``PointInTime``: what a restore takes a tenant's contents from, where that is a time (a ``RestoreSource``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from ...cancellation import run_to_completion
from ...errors import ProvisioningError, RecoveryError
from ...postgres import connections, login
from ...postgres.connections import Connection
from ...postgres.failures import SERVER_FAILURES
from ...postgres.programs import find_programs, run_program
from ...provisioning import event_trigger
from ..sources import Archive
from .base_backups import check_space
from .providers import Recovery, RecoveryRequest
from .scratch import RecoveredDatabase

_CONNECT_SECONDS = 30.0
_COMPRESSION = "1"
_LOCK_WAIT = "30s"


class PointInTime:
    """A tenant's database as it was at a time: recovered, dumped as a login that reads this database alone.

    Args:
        provider: Recovers the server.
        request: What is recovered.
        description: What the audit log says of the source.
        max_bytes: How much space the dump may take.
        client_programs: The directory of PostgreSQL's programs; None as in ``find_programs``.
    """

    def __init__(
        self,
        provider: Recovery,
        request: RecoveryRequest,
        *,
        description: Mapping[str, Any],
        max_bytes: int,
        client_programs: str | None,
    ) -> None:
        self._provider = provider
        self._request = request
        self._description = description
        self._max_bytes = max_bytes
        self._client_programs = client_programs

    @property
    def tenant_id(self) -> UUID:
        """The tenant, which the marker of the recovered database names."""
        return self._request.tenant_id

    def describe(self) -> Mapping[str, Any]:
        """Return the time, the server and the database."""
        request = self._request
        return {
            "kind": "point in time",
            "time": request.time.isoformat(),
            "server": request.server,
            "database": request.database,
            **self._description,
        }

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Archive]:
        """Recover the server, and dump the one database.

        Raises:
            RecoveryTargetError, RecoveryError, MarkerMismatchError, ConfigurationError: as ``RecoveryManager.open``.
        """
        async with self._provider.recover(self._request) as recovered:
            path = recovered.directory / "dump"
            await self._dump(recovered, path)
            yield Archive(path=path, server_version=recovered.version)

    async def _dump(self, recovered: RecoveredDatabase, path: Path) -> None:
        try:
            connection: Connection = await login.connect(
                recovered.dsn, purpose="tenancy-recovery", timeout=_CONNECT_SECONDS
            )
            try:
                size = await connection.fetchval("SELECT pg_catalog.pg_database_size(current_database())")
            finally:
                await run_to_completion(connections.close(connection))
        except SERVER_FAILURES as exc:
            raise RecoveryError(f"the recovered database cannot be read: {login.reason_of(exc)}") from exc
        await asyncio.to_thread(check_space, recovered.directory, int(size), most=self._max_bytes)
        programs = await asyncio.to_thread(find_programs, recovered.version, self._client_programs)
        dsn = recovered.dsn
        environment = dsn.environment(user=dsn.user or "", database=recovered.database, purpose="tenancy-recovery") | (
            {} if dsn.password is None else {"PGPASSWORD": dsn.secret()}
        )
        try:
            await run_program(
                [
                    programs.path("pg_dump"),
                    "--format=directory",
                    f"--compress={_COMPRESSION}",
                    "--no-sync",
                    "--no-password",
                    # a prepared transaction of that time has its locks in the recovered server as well
                    f"--lock-wait-timeout={_LOCK_WAIT}",
                    "--no-publications",
                    "--no-subscriptions",
                    "--no-security-labels",
                    f'--exclude-schema="{event_trigger.NAME}"',
                    f"--file={path}",
                ],
                environment,
            )
        except ProvisioningError as exc:
            raise RecoveryError(
                f"the recovered database of tenant {self._request.slug!r} cannot be read: {exc}"
            ) from exc


__all__ = ["PointInTime"]
