"""``Stream``: PostgreSQL's logical replication of one tenant's database to another server.

A slot and a publication in the source, a subscription in the target, and a login that the subscription uses. All four
have names that the operation's number gives, so that whoever takes the operation over finds them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import asyncpg

from ..cancellation import run_to_completion
from ..errors import OperationError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import describe, sqlstate_of
from ..postgres.failures import SERVER_FAILURES
from ..postgres.quoting import quote_identifier, quote_literal
from ..provisioning.creation.pipeline import ProvisioningServices
from ..provisioning.logins.copy_logins import CopyLogin, create_login, end_login, extend_login, see_all_rows
from ..provisioning.server_objects import databases, removal, roles
from ..provisioning.server_objects.admin_connections import HOLDING
from ..provisioning.server_objects.blockers import Blockers
from ..provisioning.server_objects.scram import scram_verifier
from ..servers import Server
from ..tenant import Placement

POLL_SECONDS = 0.01
SLOT_SECONDS = 60.0
"""How long a server has for making a slot: it waits for the end of every transaction that is open there."""

# it may be idle for hours, with the lock that keeps migrations away
_SETTINGS: Mapping[str, str] = {
    **HOLDING,
    "search_path": "pg_catalog, pg_temp",
    "statement_timeout": "0",
    "synchronous_commit": "local",
    # what a database is set to keeps the tenant's sessions from writing, not a move
    "default_transaction_read_only": "off",
}

# the position is that of a record of its own, which the commit flushes: the end of what others have written may be in
# front of a page's header, where a slot comes only with the next record
_WRITE = "SELECT pg_logical_emit_message(true, 'tenancy', '')::text"
WORKER_SECONDS = 60.0
"""For how long nobody may read from a slot before whoever waits for it gives up."""
MORE_WORKERS = (
    ", since each move that waits to be confirmed uses one on the former server: raise "
    "max_logical_replication_workers, max_worker_processes and max_replication_slots there, or confirm moves"
)
"""Why a server has no worker left, and what to do."""
_NO_WORKER = f"; see its log: it has no worker left, for example{MORE_WORKERS}"

_PLACE = "TENANCYPASSWORD"
_RANDOM = (
    "SELECT set_config('tenancy_move.password', replace(gen_random_uuid()::text || gen_random_uuid()::text || "
    "gen_random_uuid()::text, '-', ''), false)"
)
# A statement within DO is not logged by log_statement, and the error of one would have it in its context.
_BODY = (
    "BEGIN EXECUTE replace({}, '" + _PLACE + "', current_setting('tenancy_move.password')); "
    "EXCEPTION WHEN query_canceled OR OTHERS THEN RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM; END"
)

FAILED = "applying changes failed {failures} times, see its log; the schema may have been changed"
"""Why a server does not follow."""

_REMEDY = "; or move it with --offline"
_SLOT = """
SELECT active, active_pid, confirmed_flush_lsn >= $2::text::pg_lsn AS reached,
       pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint AS kept_bytes, wal_status = 'lost' AS lost
  FROM pg_replication_slots WHERE slot_name = $1
"""
_SUBSCRIPTION = """
SELECT s.subenabled FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid
 WHERE s.subname = $1 AND d.datname = current_database()
"""
ATTACH_SECONDS = 20.0
"""How long a server has for beginning to read from a slot, once it has a subscription. A worker that has failed begins
again after ``wal_retrieve_retry_interval``, 5 s by default."""
_FAILURES = """
SELECT apply_error_count FROM pg_stat_subscription_stats WHERE subname = $1
"""
_CONFIRMED = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a slot was made at: the name of the exported snapshot, which others can read by until it is closed."""

    name: str


@dataclass(frozen=True, slots=True)
class Failing:
    """A subscription that has failed to apply something: how often in all, and which position it has reached."""

    failures: int
    reached: str | None

    def fields(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"failures": self.failures, "reached": self.reached}

    def since(self, earlier: Mapping[str, Any] | None) -> bool:
        """Whether it has failed again since an earlier look, of ``fields``, and has got no further."""
        return earlier is not None and self.failures > int(earlier["failures"]) and self.reached == earlier["reached"]


class Stream:
    """One direction of replication.

    Args:
        services: Of provisioning.
        operation: The number of the move.
        direction: "f" for forward, "r" for back.
        source: The database that is replicated.
        target: The database that follows it.
    """

    def __init__(
        self, services: ProvisioningServices, operation: int, direction: str, source: Placement, target: Placement
    ) -> None:
        self._services = services
        self.name = services.names.stream(operation, direction)
        self.login_name = services.names.replicator(operation, direction)
        self.source = source
        self.target = target

    # --- the source -------------------------------------------------------------------------------------------------

    async def publish(self, connection: Connection, tables: Sequence[str]) -> None:
        """Create the publication of these tables, which are quoted.

        Args:
            connection: To the source database, as the owner of the tables.
            tables: The tables, without partitioned ones: their partitions are.
        """
        name = quote_identifier(self.name)
        listed = f" FOR TABLE {', '.join(f'ONLY {table}' for table in tables)}" if tables else ""
        await connection.execute(f"DROP PUBLICATION IF EXISTS {name}; CREATE PUBLICATION {name}{listed}")

    async def create_login(
        self, *, seconds: float, reads: bool = True, replicates: bool = True, member_of: Sequence[str] = ()
    ) -> CopyLogin:
        """Create the login that reads the source and replicates it.

        Args:
            seconds: For how long it is valid.
            reads: Whether it has the rights of the owner of tenants' databases, until ``restrict_login``.
            replicates: Whether it may replicate.
            member_of: Further roles that it has the rights of.

        Raises:
            OperationError: the administrator may not let a login replicate.
        """
        server, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            await self._drop_login(connection, blockers)
            login = await create_login(
                connection,
                server.dsn,
                self.login_name,
                self.source.database,
                seconds=seconds,
                member_of=[*([self._services.names.owner] if reads else []), *member_of],
            )
            if not reads:
                await self._let_connect(connection)
            if replicates:
                await self._let_replicate(connection, server)
            return login
        finally:
            await run_to_completion(connections.close(connection))

    async def restrict_login(self) -> None:
        """Leave the login nothing but the right to replicate the source.

        Its password comes into the catalogue of another server next, while the owner has every tenant's database.
        """
        _, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            await self._let_connect(connection)
            owner = quote_identifier(self._services.names.owner)
            await connection.execute(f"REVOKE {owner} FROM {quote_identifier(self.login_name)}")
        finally:
            await run_to_completion(connections.close(connection))

    async def _let_connect(self, connection: Connection) -> None:
        database, login = quote_identifier(self.source.database), quote_identifier(self.login_name)
        await connection.execute(f"GRANT CONNECT ON DATABASE {database} TO {login}")

    async def see_all_rows(self) -> None:
        """Let the login read rows that row security hides from owners as well, until it is dropped.

        Raises:
            ProvisioningError: the administrator may not do that.
        """
        _, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            await see_all_rows(connection, self.login_name)
        finally:
            await run_to_completion(connections.close(connection))

    async def _let_replicate(self, connection: Connection, server: Server) -> None:
        quoted = quote_identifier(self.login_name)
        try:
            await connection.execute(f"ALTER ROLE {quoted} REPLICATION")
        except asyncpg.InsufficientPrivilegeError as exc:
            # Amazon RDS has a role for it
            if not await roles.exists(connection, "rds_replication"):
                raise OperationError(
                    f"the administrator of server {server.name!r} may not let a login replicate; it needs REPLICATION "
                    f"itself{_REMEDY}"
                ) from exc
            try:
                await connection.execute(f"GRANT rds_replication TO {quoted}")
            except asyncpg.InsufficientPrivilegeError:
                raise OperationError(
                    f"the administrator of server {server.name!r} may not grant rds_replication{_REMEDY}"
                ) from exc

    @asynccontextmanager
    async def begin(self, login: CopyLogin, *, timeout: float) -> AsyncIterator[Snapshot]:
        """Make the slot, and a snapshot of exactly the rows that it does not replicate, for the body to read by.

        Raises:
            OperationError: the server refuses, or did not make it in time: it waits for open transactions.
        """
        connection = await self._replicating(login)
        try:
            try:
                async with asyncio.timeout(timeout):
                    await connection.execute("BEGIN READ ONLY ISOLATION LEVEL REPEATABLE READ")
                    await connection.execute(
                        f"CREATE_REPLICATION_SLOT {quote_identifier(self.name)} LOGICAL pgoutput (SNAPSHOT 'use')"
                    )
                    # the protocol of replication returns no rows to this driver; the server reports this setting
                    await connection.execute("SELECT set_config('application_name', pg_export_snapshot(), false)")
            except TimeoutError as exc:
                raise OperationError(
                    f"server {self.source.server!r} made no replication slot within {timeout:g} s: it waits for the "
                    "end of every transaction that is open there"
                ) from exc
            except asyncpg.PostgresError as exc:
                raise self._refused("makes no replication slot", self.source.server, exc) from exc
            yield Snapshot(str(connection.get_settings().application_name))
        finally:
            await run_to_completion(connections.close(connection))

    async def _replicating(self, login: CopyLogin) -> Connection:
        timeout = self._services.config.pool.connect_timeout
        try:
            return await login.connect(
                timeout=timeout, settings={"replication": "database", "statement_timeout": "0"}, purpose="tenancy-move"
            )
        except asyncpg.PostgresError as exc:
            raise self._refused("refuses to replicate", self.source.server, exc) from exc

    async def create_slot(self, *, timeout: float) -> None:
        """Make the slot, which replicates what is written from now on.

        Raises:
            OperationError: the administrator may not, or the server did not make it in time.
        """
        connection = await self.connect(self.source)
        try:
            async with asyncio.timeout(timeout):
                await connection.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", self.name)
        except TimeoutError as exc:
            raise OperationError(
                f"server {self.source.server!r} made no replication slot within {timeout:g} s: it waits for the end of "
                "every transaction that is open there"
            ) from exc
        except asyncpg.PostgresError as exc:
            raise self._refused("makes no replication slot", self.source.server, exc) from exc
        finally:
            await run_to_completion(connections.close(connection))

    async def skip(self, connection: Connection) -> None:
        """Have the slot replicate nothing of what was written until now.

        Args:
            connection: An administrative one to the source database.
        """
        await connection.execute(
            "SELECT pg_replication_slot_advance(slot_name, pg_current_wal_lsn()) FROM pg_replication_slots "
            "WHERE slot_name = $1 AND confirmed_flush_lsn < pg_current_wal_lsn()",
            self.name,
        )

    # --- the target -------------------------------------------------------------------------------------------------

    async def subscribe(self, login: CopyLogin, *, replicated: bool = True) -> None:
        """Have the target follow the source from where the slot is. Rows that it has are not copied again.

        A subscription that is there goes on: only the target knows what it has applied. One that is made again would
        begin where the slot is, which may be before that.

        The login gets another password, which the target makes: no statement has it that a server may log.

        Args:
            login: What the target logs in to the source by.
            replicated: Whether it also gets what the source has from a subscription of its own.

        Raises:
            OperationError: the administrator of the target may not, or the target does not reach the source.
        """
        server, _ = self._server(self.source)
        uri = server.peer.uri(user=login.role, password=_PLACE, database=login.database, purpose="tenancy-move")
        name, slot = quote_identifier(self.name), quote_literal(self.name)
        create = (
            f"CREATE SUBSCRIPTION {name} CONNECTION {quote_literal(uri)} PUBLICATION {name} WITH ("
            f"create_slot = false, slot_name = {slot}, copy_data = false, synchronous_commit = 'local', "
            f"origin = '{'any' if replicated else 'none'}')"
        )
        go_on = (
            f"ALTER SUBSCRIPTION {name} CONNECTION {quote_literal(uri)}; "
            f"ALTER SUBSCRIPTION {name} SET (slot_name = {slot}); ALTER SUBSCRIPTION {name} ENABLE"
        )
        connection = await self.connect(self.target)
        try:
            found = await connection.fetchval(_SUBSCRIPTION, self.name)
            await self._set_password(str(await connection.fetchval(_RANDOM)))
            statement = create if found is None else go_on
            await connection.execute("DO " + quote_literal(_BODY.format(quote_literal(statement))))
        except asyncpg.PostgresError as exc:
            raise self._refused(f"cannot follow server {self.source.server!r}", self.target.server, exc) from None
        finally:
            await run_to_completion(connections.close(connection))

    async def follow(self, *, seconds: float) -> None:
        """Have the target follow the source, and wait until it does. To finish an interrupted attempt, repeat it.

        What the source has from a subscription of its own is left out: the target has it.

        Args:
            seconds: For how long its login is valid.

        Raises:
            OperationError: the target cannot follow, and why.
        """
        if await self.kept_bytes() is None:
            raise OperationError(f"the replication slot {self.name!r} of server {self.source.server!r} is lost")
        if not await self._keeps_following(seconds):
            await self.subscribe(await self.create_login(seconds=seconds, reads=False), replicated=False)
        await self._wait_for_reader()

    async def _keeps_following(self, seconds: float) -> bool:
        """Whether the target has a subscription that is enabled, and the login of it; that is valid for longer then."""
        connection = await self.connect(self.target)
        try:
            if not await connection.fetchval(_SUBSCRIPTION, self.name):
                return False
        finally:
            await run_to_completion(connections.close(connection))
        _, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            if not await roles.exists(connection, self.login_name):
                return False
            await extend_login(connection, self.login_name, seconds=seconds)
            return True
        finally:
            await run_to_completion(connections.close(connection))

    async def _wait_for_reader(self) -> None:
        """Wait until somebody reads from the slot: a subscription without a worker keeps the log, and follows nothing.

        Raises:
            OperationError: nobody does within ``ATTACH_SECONDS``.
        """
        _, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            began = time.monotonic()
            while (row := await connection.fetchrow(_SLOT, self.name, "0/0")) is None or not row["active"]:
                if time.monotonic() - began >= ATTACH_SECONDS:
                    raise OperationError(
                        f"server {self.target.server!r} has not read from server {self.source.server!r} for "
                        f"{ATTACH_SECONDS:g} s{await self._failure() or _NO_WORKER}"
                    )
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await run_to_completion(connections.close(connection))

    async def _set_password(self, password: str) -> None:
        _, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            await roles.set_password(connection, self.login_name, verifier=scram_verifier(password))
        finally:
            await run_to_completion(connections.close(connection))

    async def wait(self, connection: Connection, *, timeout: float) -> None:
        """Wait until the target has all that was written to the source until now.

        Args:
            connection: To the source database, as ``connect`` makes it.
            timeout: For how many seconds.

        Raises:
            OperationError: it has not in time, or fails to apply something.
        """
        lsn = await connection.fetchval(_WRITE)
        began = looked = worked = time.monotonic()
        while True:
            row = await connection.fetchrow(_SLOT, self.name, lsn)
            if row is None or row["lost"]:
                raise OperationError(f"the replication slot {self.name!r} of server {self.source.server!r} is lost")
            if row["reached"]:
                return
            now = time.monotonic()
            if row["active"]:
                worked = now
            if now - began >= timeout:
                raise OperationError(
                    f"server {self.target.server!r} did not catch up with {self.source.server!r} within {timeout:g} s"
                    f"{await self._failure()}"
                )
            if now - worked >= WORKER_SECONDS:
                raise OperationError(
                    f"server {self.target.server!r} has not read from server {self.source.server!r} for "
                    f"{WORKER_SECONDS:g} s{await self._failure() or _NO_WORKER}"
                )
            if now - looked > 1.0:
                looked = now
                if failure := await self._failure():
                    raise OperationError(f"server {self.target.server!r} cannot follow{failure}")
            await asyncio.sleep(POLL_SECONDS)

    async def _count_failures(self) -> int:
        connection = await self.connect(self.target)
        try:
            return int(await connection.fetchval(_FAILURES, self.name) or 0)
        finally:
            await run_to_completion(connections.close(connection))

    async def _failure(self) -> str:
        failures = await self._count_failures()
        return f": {FAILED.format(failures=failures)}" if failures else ""

    async def failing(self) -> Failing | None:
        """Return how often the target has failed to apply something, and what it has reached; None if it never has."""
        _, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            reached = await connection.fetchval(_CONFIRMED, self.name)
        finally:
            await run_to_completion(connections.close(connection))
        failures = await self._count_failures()
        return Failing(failures, reached) if failures else None

    # --- the end ----------------------------------------------------------------------------------------------------

    async def kept_bytes(self) -> int | None:
        """How much of its log the source's server keeps for the slot, in bytes; None where it is gone, or is lost."""
        _, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            row = await connection.fetchrow(_SLOT, self.name, "0/0")
            return None if row is None or row["lost"] else int(row["kept_bytes"] or 0)
        finally:
            await run_to_completion(connections.close(connection))

    async def drop(self) -> None:
        """Drop the subscription, the slot, the publication and the login, as far as they exist.

        Nothing is left of them on a server that is not one any more.

        Raises:
            OperationError: one of them could not be dropped.
            ServerUnavailableError: a server does not answer.
        """
        try:
            await self.drop_subscription()
        finally:
            # also where the target does not answer: the slot would fill the source's disk
            await self.drop_source()

    async def drop_subscription(self) -> None:
        """Drop the subscription, if there is one; what the source has of it stays."""
        if self.target.server not in self._services.servers:
            return
        _, blockers = self._server(self.target)
        if not await self._exists(blockers, self.target.database):
            return
        connection = await self.connect(self.target)
        try:
            enabled = await connection.fetchval(_SUBSCRIPTION, self.name)
            if enabled is None:
                return
            name = quote_identifier(self.name)
            if enabled:
                await connection.execute(f"ALTER SUBSCRIPTION {name} DISABLE")
            # the slot is dropped on the source, which need not answer now
            await connection.execute(f"ALTER SUBSCRIPTION {name} SET (slot_name = NONE)")
            await connection.execute(f"DROP SUBSCRIPTION {name}")
        except SERVER_FAILURES as exc:
            raise OperationError(
                f"subscription {self.name!r} on server {self.target.server!r} could not be dropped ({describe(exc)})"
            ) from exc
        finally:
            await run_to_completion(connections.close(connection))

    async def drop_source(self) -> None:
        """Drop the slot, the publication and the login."""
        if self.source.server not in self._services.servers:
            return
        _, blockers = self._server(self.source)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            if await roles.exists(connection, self.login_name):
                # ends what still replicates
                await end_login(connection, blockers, self.login_name)
            await drop_slot(connection, self.name)
            if await databases.state(connection, self.source.database) is not None:
                inside = await self.connect(self.source)
                try:
                    await inside.execute(f"DROP PUBLICATION IF EXISTS {quote_identifier(self.name)}")
                finally:
                    await run_to_completion(connections.close(inside))
            await self._drop_login(connection, blockers)
        except SERVER_FAILURES as exc:
            raise OperationError(
                f"replication {self.name!r} could not be ended on server {self.source.server!r} ({describe(exc)})"
            ) from exc
        finally:
            await run_to_completion(connections.close(connection))

    async def _drop_login(self, connection: Connection, blockers: Blockers) -> None:
        if await roles.exists(connection, self.login_name):
            await end_login(connection, blockers, self.login_name)
            await removal.drop_retired(connection, blockers, self._services.names, self.login_name)

    async def _exists(self, blockers: Blockers, database: str) -> bool:
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            return await databases.state(connection, database) is not None
        finally:
            await run_to_completion(connections.close(connection))

    async def connect(
        self, place: Placement, *, role: str | None = None, settings: Mapping[str, str] = MappingProxyType({})
    ) -> Connection:
        """Open an administrative connection to one of the databases; the caller closes it."""
        _, blockers = self._server(place)
        return await blockers.connect(
            place.database, role=role, settings={**_SETTINGS, **settings}, purpose="tenancy-move"
        )

    def _server(self, place: Placement) -> tuple[Server, Blockers]:
        server = self._services.servers[place.server]
        return server, self._services.blockers(server)

    def _refused(self, what: str, server: str, error: asyncpg.PostgresError) -> OperationError:
        remedy = {
            "42501": "; its administrator needs pg_create_subscription (PostgreSQL 16 and later) or REPLICATION, or "
            "must be a superuser",
            "53400": "; raise max_replication_slots there",
            "55000": "; it needs wal_level = logical",
        }.get(sqlstate_of(error) or "", "")
        return OperationError(f"server {server!r} {what} ({describe(error)}){remedy}{_REMEDY}")


async def drop_slot(connection: Connection, name: str) -> None:
    """Drop a replication slot, and end who uses it. Does nothing if there is none.

    Raises:
        TimeoutError: it is still in use after some seconds.
    """
    async with asyncio.timeout(connections.CLOSE_SECONDS):
        while (row := await connection.fetchrow(_SLOT, name, "0/0")) is not None:
            if row["active"]:
                await connection.execute(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active",
                    name,
                )
                await asyncio.sleep(POLL_SECONDS)
                continue
            with suppress(asyncpg.ObjectInUseError, asyncpg.UndefinedObjectError):
                await connection.execute("SELECT pg_drop_replication_slot($1)", name)


__all__ = ["FAILED", "MORE_WORKERS", "SLOT_SECONDS", "Failing", "Snapshot", "Stream", "drop_slot"]
