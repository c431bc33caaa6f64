"""``PointInTime``: what a restore takes a tenant's contents from, where that is a time (a ``RestoreSource``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from ...backups.dump import lockable_tables, read_tables
from ...backups.sources import TENANT_SCOPE, facts_of
from ...cancellation import run_to_completion
from ...context import refuse_while_bound
from ...errors import ProvisioningError, RecoveryError
from ...postgres import connections, login
from ...postgres.connections import Connection
from ...postgres.failures import SERVER_FAILURES
from ...postgres.programs import find_programs, run_program
from ...postgres.snapshots import LOCK_WAIT, begin_snapshot
from ...provisioning.copies.empty_databases import read_extensions
from ...provisioning.copies.restoring import count_rows
from ...provisioning.creation.new_databases import SAFE_PATH
from ..sources import Archive
from .base_backups import check_space
from .providers import Recovery, RecoveryRequest
from .scratch import RecoveredDatabase

_CONNECT_SECONDS = 30.0
_COMPRESSION = "1"
_SETTINGS = {
    **SAFE_PATH,
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    # an error, in place of rows that are not counted
    "row_security": "off",
}


class PointInTime:
    """A tenant's database as it was at a time: recovered, dumped as a login that reads this database alone.

    Args:
        provider: Recovers the server.
        request: What is recovered.
        owner: The role that owns tenants' databases.
        role: The tenant's role: what it owned becomes its own again.
        description: What the audit log says of the source.
        max_bytes: How much space the dump may take.
        client_programs: The directory of PostgreSQL's programs; None as in ``find_programs``.
    """

    def __init__(
        self,
        provider: Recovery,
        request: RecoveryRequest,
        *,
        owner: str,
        role: str | None,
        description: Mapping[str, Any],
        max_bytes: int,
        client_programs: str | None,
    ) -> None:
        self._provider = provider
        self._request = request
        self._owner = owner
        self._role = role
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
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("recovering a whole server")
        async with self._provider.recover(self._request) as recovered:
            yield await self._dump(recovered)

    async def _dump(self, recovered: RecoveredDatabase) -> Archive:
        """Dump the database, and read what the manifest of a backup says, in one snapshot.

        The tenant's server need not have the database any more, nor answer: it may be the reason for the recovery.
        """
        path, failed = recovered.directory / "dump", f"the recovered database of tenant {self._request.slug!r}"
        try:
            connection: Connection = await login.connect(
                recovered.dsn, purpose="tenancy-recovery", timeout=_CONNECT_SECONDS, settings=_SETTINGS
            )
            try:
                if connections.version(connection) >= 17:
                    await connection.execute("SET transaction_timeout = 0")
                size = await connection.fetchval("SELECT pg_catalog.pg_database_size(pg_catalog.current_database())")
                await asyncio.to_thread(check_space, recovered.directory, int(size), most=self._max_bytes)
                # a server of somebody else's may be written to
                await begin_snapshot(connection, partial(lockable_tables, scope=TENANT_SCOPE))
                snapshot = await connection.fetchval("SELECT pg_catalog.pg_export_snapshot()")
                await self._run(recovered, path, snapshot)
                tables = [name for name, _ in await read_tables(connection, TENANT_SCOPE)]
                facts = await facts_of(connection, owner=self._owner, role=self._role)
                return Archive(
                    path=path,
                    tenant_owned=facts.tenant_owned,
                    rows=await count_rows(connection, tables),
                    server_version=recovered.version,
                    extensions=frozenset(one.name for one in await read_extensions(connection)),
                )
            finally:
                await run_to_completion(connections.close(connection))
        except SERVER_FAILURES as exc:
            raise RecoveryError(f"{failed} cannot be read: {login.reason_of(exc)}") from exc
        except ProvisioningError as exc:
            raise RecoveryError(f"{failed} cannot be read: {exc}") from exc

    async def _run(self, recovered: RecoveredDatabase, path: Path, snapshot: str) -> None:
        """Run ``pg_dump``.

        Raises:
            ProvisioningError: it failed.
        """
        programs = await asyncio.to_thread(find_programs, recovered.version, self._client_programs)
        dsn = recovered.dsn
        environment = dsn.environment(user=dsn.user or "", database=recovered.database, purpose="tenancy-recovery") | (
            {} if dsn.password is None else {"PGPASSWORD": dsn.secret()}
        )
        await run_program(
            [
                programs.path("pg_dump"),
                "--format=directory",
                f"--compress={_COMPRESSION}",
                "--no-sync",
                "--no-password",
                # a prepared transaction of that time has its locks in the recovered server as well
                f"--lock-wait-timeout={LOCK_WAIT}",
                f"--snapshot={snapshot}",
                "--no-publications",
                "--no-subscriptions",
                "--no-security-labels",
                *TENANT_SCOPE.to_arguments(),
                f"--file={path}",
            ],
            environment,
        )


__all__ = ["PointInTime"]
