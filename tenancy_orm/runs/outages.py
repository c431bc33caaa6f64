"""``Outages``: which servers of a run are down, and whether a tenant waits for its server, or fails."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from ..errors import MigrationError, ProvisioningError
from ..migrations.connections import Connections, Health, is_down
from ..migrations.failures import describe
from ..migrations.logs import logger
from ..postgres.errors import READ_ONLY_SQL_TRANSACTION, sqlstate_of
from ..tenant import Tenant, placement_of


class Outages:
    """Decides for the tenants of one process.

    Args:
        connections: Connects to the servers.
        patience: For how many seconds a server that goes down is awaited.
    """

    def __init__(self, connections: Connections, patience: float = 0.0) -> None:
        self._connections = connections
        self.health = Health(patience)
        """Which servers are down."""
        self._tried_again: set[UUID] = set()  # tenants that could not be connected to once, although the server answers

    async def ask(self, server: str) -> None:
        """Ask a server whether it is there, before a run.

        Raises:
            ServerUnavailableError: it is not, or is a standby.
            asyncpg.PostgresError: it refuses.
        """
        await self._connections.ask(server, self.health)

    async def reach(self, server: str) -> datetime | None:
        """Ask whether a server answers, and return when it was started; None where it does not."""
        return await self._connections.reach(server, self.health)

    async def waits(
        self, tenant: Tenant, error: BaseException, *, since: float, server_started: datetime | None = None
    ) -> bool:
        """Whether a tenant has failed since its server went down: it waits for that, and is tried again then.

        Args:
            tenant: The tenant.
            error: What it has failed with.
            since: When its migration began, by ``time.monotonic``.
            server_started: When the server was started that its session was with; None where it had none.
        """
        server = placement_of(tenant).server
        if not _is_lost(error) or not self.health.may_await(server):
            return False
        if not await self._is_outage(tenant.id, server, since, server_started):
            return False
        logger.warning("tenant %s waits for server %s, and is tried again: %s", tenant.slug, server, describe(error))
        return True

    async def _is_outage(self, tenant: UUID, server: str, since: float, server_started: datetime | None) -> bool:
        started = await self.reach(server)
        if started is None or self.health.was_down(server, since):
            return True
        if server_started is not None:
            # Otherwise somebody has ended that session alone, to stop the migration. After a crash of one of its
            # processes a server has the time of before, and refuses connections for a while.
            return started != server_started
        # a log-in alone has failed; the server may have been started again by now
        if tenant not in self._tried_again:
            self._tried_again.add(tenant)
            return True
        self.health.odd(server)
        return False


def _is_lost(error: BaseException) -> bool:
    while isinstance(error, MigrationError | ProvisioningError) and error.__cause__ is not None:
        error = error.__cause__
    if sqlstate_of(error) == READ_ONLY_SQL_TRANSACTION:
        return True  # a standby that is not promoted yet
    # a session that is there and takes long is something else
    return is_down(error) and not isinstance(error, TimeoutError)


__all__ = ["Outages"]
