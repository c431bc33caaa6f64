"""``Leftovers``: slots, subscriptions and logins of moves that are no more.

A control database that was restored from a backup knows nothing of later moves, and a purge may have removed the record
of one. An abandoned slot keeps its server's log until the disk is full.
"""

from __future__ import annotations

import asyncio
import logging
import re
from functools import partial

from ..cancellation import run_to_completion
from ..errors import OperationNotFoundError, TenancyError
from ..operations import Operations
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..postgres.quoting import quote_identifier
from ..provisioning.creation.pipeline import ProvisioningServices
from ..provisioning.logins.copy_logins import end_login
from ..provisioning.server_objects import removal
from ..provisioning.server_objects.blockers import Blockers
from ..servers import Server
from .streams import drop_slot

logger = logging.getLogger("tenancy_orm.moves")

_SUBSCRIPTIONS = """
SELECT s.subname::text AS name, d.datname::text AS database FROM pg_subscription s
  JOIN pg_database d ON d.oid = s.subdbid WHERE starts_with(s.subname::text, $1) ORDER BY 1
"""
_SLOTS = "SELECT slot_name::text AS name FROM pg_replication_slots WHERE starts_with(slot_name::text, $1) ORDER BY 1"
_LOGINS = "SELECT rolname::text AS name FROM pg_roles WHERE starts_with(rolname::text, $1) ORDER BY 1"


class Leftovers:
    """Finds and removes what moves have left on servers.

    Args:
        services: Of provisioning.
        operations: Knows which moves are under way.
    """

    def __init__(self, services: ProvisioningServices, operations: Operations) -> None:
        self._services = services
        self._operations = operations

    async def remove(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Remove them from every server; returns what was removed, and the errors."""
        removed: list[str] = []
        errors: list[str] = []

        async def look(server: Server) -> None:
            try:
                removed.extend(await self._look(server))
            except (TenancyError, *SERVER_FAILURES) as exc:
                errors.append(f"server {server.name}: {describe(exc)}")

        await asyncio.gather(*(look(server) for server in list(self._services.servers.values())))
        return tuple(sorted(removed)), tuple(errors)

    async def _look(self, server: Server) -> list[str]:
        names, blockers = self._services.names, self._services.blockers(server)
        connection = await blockers.connect(purpose="tenancy-move")
        try:
            removed = []
            for name, database in await connection.fetch(_SUBSCRIPTIONS, names.stream_stem):
                if await self._is_over(name, names.stream_stem):
                    await drop_subscription(blockers, database, name)
                    removed.append(f"subscription {name} on {server.name}")
            for (name,) in await connection.fetch(_SLOTS, names.stream_stem):
                if await self._is_over(name, names.stream_stem):
                    await drop_slot(connection, name)
                    removed.append(f"slot {name} on {server.name}")
            for (name,) in await connection.fetch(_LOGINS, names.replicator_stem):
                if await self._is_over(name, names.replicator_stem):
                    await self._drop_login(connection, blockers, name)
                    removed.append(f"login {name} on {server.name}")
        finally:
            await run_to_completion(connections.close(connection))
        for one in removed:
            logger.warning("a move that is over has left %s, which was removed", one)
        return removed

    async def _drop_login(self, connection: Connection, blockers: Blockers, name: str) -> None:
        await end_login(connection, blockers, name)
        await removal.drop_retired(connection, blockers, self._services.names, name)

    async def _is_over(self, name: str, stem: str) -> bool:
        found = re.fullmatch(r"([0-9]{1,18})[fr]", name.removeprefix(stem))
        if found is None:
            return False
        try:
            return (await self._operations.get(int(found[1]))).state not in ("running", "waiting")
        except OperationNotFoundError:
            return True


async def drop_subscription(blockers: Blockers, database: str, name: str) -> None:
    """Drop a subscription; its slot, on another server, stays."""
    connection = await blockers.connect(database, purpose="tenancy-move")
    try:
        quoted = quote_identifier(name)
        for statement in (
            f"ALTER SUBSCRIPTION {quoted} DISABLE",
            f"ALTER SUBSCRIPTION {quoted} SET (slot_name = NONE)",
            f"DROP SUBSCRIPTION {quoted}",
        ):
            await blockers.run(connection, partial(connection.execute, statement))
    finally:
        await run_to_completion(connections.close(connection))


__all__ = ["Leftovers", "drop_subscription"]
