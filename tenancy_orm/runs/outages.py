"""``Outages``: a tenant waits where its server goes down during a run, or fails."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

from ..errors import MigrationError
from ..migrations.connections import Connections, Health, is_down, placement_of
from ..tenant import Tenant

# How often one tenant waits. If it was being changed when its server crashed, that may have been the cause.
_MOST = 5
_MOST_BEGUN = 1


class Outages:
    """Decides for the tenants of one process.

    Args:
        connections: Connects to the servers.
        health: Which servers are down.
    """

    def __init__(self, connections: Connections, health: Health) -> None:
        self._connections = connections
        self._health = health
        self._waited: Counter[UUID] = Counter()

    async def waits(self, tenant: Tenant, error: BaseException, *, has_begun: bool) -> bool:
        """Whether a tenant waits for its server, and is tried again then.

        Args:
            tenant: The tenant.
            error: What it has failed with.
            has_begun: Whether something of it may have been changed.
        """
        server = placement_of(tenant).server
        cause = error
        while isinstance(cause, MigrationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        # a session that is there and takes long is something else
        if not is_down(cause) or isinstance(cause, TimeoutError) or not self._health.may_await(server):
            return False
        if self._waited[tenant.id] >= (_MOST_BEGUN if has_begun else _MOST):
            return False
        if has_begun:
            # Somebody may have ended this session alone, to stop the migration. A server that shuts down or recovers
            # refuses new ones by the time that it ends the old ones.
            if await self._connections.reach(server, self._health):
                return False
            self._health.down(server)
        self._waited[tenant.id] += 1
        return True


__all__ = ["Outages"]
