"""Tenants that a cancelled or undone upgrade has not reached: no process upgrades them by itself."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

# Not those that were at the target before, or that a later run has moved. It locks in the order of ``Beginnings``.
_HOLD = text(
    "UPDATE tenancy.tenants h SET held_at = clock_timestamp() FROM (SELECT n.id FROM tenancy.migration_runs r "
    "JOIN tenancy.migration_run_tenants t ON t.run = r.id JOIN tenancy.tenants n ON n.id = t.tenant_id "
    "WHERE r.id = :run AND r.command = 'upgrade' AND t.state <> 'done' AND NOT t.changed AND n.held_at IS NULL "
    "AND n.schema_revision NOT IN (SELECT d.revision_after FROM tenancy.migration_run_tenants d "
    "WHERE d.run = :run AND d.state = 'done' AND d.revision_after IS NOT NULL) "
    "AND NOT EXISTS (SELECT FROM tenancy.migration_run_tenants l WHERE l.tenant_id = t.tenant_id AND l.run > t.run "
    "AND (l.changed OR l.is_read)) ORDER BY n.id FOR NO KEY UPDATE OF n) f WHERE h.id = f.id"
)


async def hold_unreached(connection: AsyncConnection, run: int) -> None:
    """Let only operators upgrade the tenants that an upgrade was for and has not changed; others are left alone.

    The next upgrade by an operator ends that, as for tenants that were moved back.
    """
    await connection.execute(_HOLD, {"run": run})


__all__ = ["hold_unreached"]
