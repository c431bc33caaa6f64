"""``RecoveredServer``: a server that somebody else has recovered, RDS, Cloud SQL or Neon for example."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ...cancellation import run_to_completion
from ...control.names import Names
from ...errors import ConfigurationError, RecoveryError, RecoveryTargetError, ServerUnavailableError
from ...postgres import connections, login
from ...postgres.connections import Connection
from ...postgres.dsn import Dsn
from ...postgres.errors import INVALID_CATALOG_NAME, NOT_IN_PREREQUISITE_STATE, sqlstate_of
from ...postgres.failures import SERVER_FAILURES
from ...postgres.quoting import quote_identifier
from ...provisioning.logins.copy_logins import HIDES_ROWS, create_login, see_all_rows
from ...provisioning.server_objects import advisory_locks
from ...routing import marker
from ...servers import Servers
from .accounts import Account
from .base_backups import connected
from .keeper import open_keeper
from .providers import RecoveryRequest, RecoveryWindow
from .scratch import RecoveredDatabase, dropped

logger = logging.getLogger("tenancy_orm.recovery")

_CONNECT_SECONDS = 30.0
_VALID_SECONDS = 24 * 3_600.0

_OWNERS = """
SELECT DISTINCT r.rolname FROM pg_catalog.pg_shdepend s JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
 WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND s.deptype = 'o'
   AND s.dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
   AND r.rolname <> current_user
"""


class RecoveredServer:
    """A server that was recovered already. One database of it is opened, and a login made that reads that one.

    Args:
        url: The URL of its administrator. Its database is not opened; the tenant's is.
        servers: The installation's own servers, none of which it may be.
        names: Of this installation.
        directory: Where a dump of it is for a time.
        is_timed: Whether the time was given that it was recovered to.
    """

    def __init__(self, url: str, servers: Servers, names: Names, directory: Path, *, is_timed: bool) -> None:
        try:
            self._dsn = Dsn.parse(url)
        except ConfigurationError as exc:
            raise ConfigurationError(f"the URL of the recovered server {exc}") from exc
        self._servers = servers
        self._names = names
        self._directory = directory
        self._is_timed = is_timed

    async def window(self, server: str) -> RecoveryWindow:
        """Return that nothing is known of it."""
        return RecoveryWindow(server=server, oldest=None, newest=None)

    @asynccontextmanager
    async def recover(self, request: RecoveryRequest) -> AsyncIterator[RecoveredDatabase]:
        """Make a login that reads the tenant's database, for the body; see ``Recovery``."""
        connection = await self._open(request)
        role = self._names.scratch(secrets.token_hex(8))
        try:
            async with open_keeper(self._directory, Account()) as keeper:
                yield RecoveredDatabase(
                    dsn=await self._reader(connection, role, request.database),
                    database=request.database,
                    version=connections.version(connection),
                    directory=keeper.home,
                    time=request.time if self._is_timed else None,
                )
        finally:
            await run_to_completion(self._close(connection, role))

    async def check(self, request: RecoveryRequest) -> None:
        """Make sure that the server answers, and that the database there is the tenant's."""
        connection = await self._open(request)
        await run_to_completion(connections.close(connection))

    async def _open(self, request: RecoveryRequest) -> Connection:
        """Connect to the tenant's database, and to no other one."""
        for server in self._servers.values():
            if self._dsn.shares_host(server.dsn):
                raise ConfigurationError(
                    f"the URL of the recovered server leads to server {server.name!r} itself, at {self._dsn}"
                )
        try:
            connection: Connection = await login.connect(
                self._dsn, purpose="tenancy-recovery", timeout=_CONNECT_SECONDS, database=request.database
            )
        except SERVER_FAILURES as exc:
            if sqlstate_of(exc) == INVALID_CATALOG_NAME:
                raise RecoveryTargetError(
                    f"the recovered server has no database {request.database!r}, which tenant {request.slug!r} had at "
                    f"{request.time.isoformat()}"
                ) from exc
            if sqlstate_of(exc) == NOT_IN_PREREQUISITE_STATE:
                # at that time the tenant used it, so it was open
                raise dropped(request.database, request.slug) from exc
            raise RecoveryError(f"the recovered server cannot be opened: {login.reason_of(exc)}") from exc
        try:
            await marker.verify(connection, request.installation, request.tenant_id, tenant=request.slug)
            if await self._is_present(connection, request.server):
                raise ConfigurationError(
                    f"the URL of the recovered server leads to server {request.server!r} itself, by another name"
                )
        except BaseException:
            await run_to_completion(connections.close(connection))
            raise
        return connection

    async def _is_present(self, connection: Connection, server: str) -> bool:
        """Whether this is the server that the tenant has now: its rows would be taken for those of that time."""
        if server not in self._servers:
            return False
        first, second = secrets.randbits(31), secrets.randbits(31)
        # where no lock may be taken, or the server was lost, nothing can be said
        with suppress(ServerUnavailableError, *SERVER_FAILURES):
            await connection.execute(f"SELECT pg_catalog.pg_advisory_lock_shared({first}, {second})")
            async with connected(self._servers[server]) as present:
                return await present.fetchval(advisory_locks.LOCKED, first, second) is not None
        return False

    async def _reader(self, connection: Connection, role: str, database: str) -> Dsn:
        """Make the login, with the rights of those that own something in the database."""
        if await connection.fetchval("SELECT pg_catalog.pg_is_in_recovery()"):
            # nothing can be made there: a standby, or one that is paused at its target
            return replace(self._dsn, database=database)
        try:
            owners = [row["rolname"] for row in await connection.fetch(_OWNERS)]
            made = await create_login(connection, self._dsn, role, database, seconds=_VALID_SECONDS, member_of=owners)
            quoted = quote_identifier(role)
            await connection.execute(
                f"ALTER ROLE {quoted} SET default_transaction_read_only = on; "
                f"GRANT CONNECT ON DATABASE {quote_identifier(database)} TO {quoted}"
            )
            if await connection.fetchval(HIDES_ROWS):
                await see_all_rows(connection, role)
        except SERVER_FAILURES as exc:
            raise RecoveryError(f"the recovered server refuses another login: {login.reason_of(exc)}") from exc
        return replace(made.dsn, user=made.role, password=made.password, database=database)

    async def _close(self, connection: Connection, role: str) -> None:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                if await connection.fetchval("SELECT true FROM pg_catalog.pg_roles WHERE rolname = $1", role):
                    quoted = quote_identifier(role)
                    await connection.execute(f"DROP OWNED BY {quoted}; DROP ROLE {quoted}")
        except SERVER_FAILURES as exc:
            logger.warning("role %s of the recovered server is left behind: %s", role, login.reason_of(exc))
        finally:
            await connections.close(connection)


__all__ = ["RecoveredServer"]
