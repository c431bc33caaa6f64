"""Pauses: while a tenant's database is exchanged for another one, its sessions wait, in every process."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import func, update

from ..context import refuse_other_tenant
from ..control.models import tenants
from ..errors import TenantNotFoundError
from ..tenant import Status
from .table import TenantTable


class Pauses(TenantTable):
    """Pauses tenants, and ends pauses."""

    async def pause(self, tenant_id: UUID, *, seconds: float) -> None:
        """Have the tenant's sessions wait for their next connection. All processes learn of it.

        Args:
            tenant_id: The tenant.
            seconds: For how long, unless ``end_pause`` comes first: a process that dies pauses nobody for longer.

        Raises:
            TenantNotFoundError: there is no such tenant, or it has been purged.
        """
        refuse_other_tenant(tenant_id)
        until = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
        statement = update(tenants).where(tenants.c.id == tenant_id, tenants.c.status != Status.PURGED)
        async with self._control.transaction() as connection:
            if not (await connection.execute(statement.values(paused_until=until))).rowcount:
                raise TenantNotFoundError(tenant_id)

    async def end_pause(self, tenant_id: UUID) -> None:
        """Have the tenant's sessions go on, in the database that its row names now. Repeating it changes nothing."""
        refuse_other_tenant(tenant_id)
        paused = tenants.c.paused_until.is_not(None)
        statement = update(tenants).where(tenants.c.id == tenant_id, paused).values(paused_until=None)
        async with self._control.transaction() as connection:
            await connection.execute(statement)


__all__ = ["Pauses"]
