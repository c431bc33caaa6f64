"""Rows of tenants as an older backup of the control database has them."""

from __future__ import annotations

from sqlalchemy import text

from tenancy_orm.control.database import ControlDatabase

_TENANT = text(
    "UPDATE tenancy.tenants SET status = 'provisioning', next_status = 'active', step = :step, schema_revision = NULL "
    "WHERE slug = :slug"
)
_OPERATIONS = text(
    "UPDATE tenancy.operations SET state = 'running', ended_at = NULL, claimed_until = now() "
    "WHERE tenant_id = (SELECT id FROM tenancy.tenants WHERE slug = :slug)"
)


async def turn_back(control: ControlDatabase, slug: str, step: str, *, operations: bool = False) -> None:
    """Turn a tenant's row back to a step of its creation, and the operations that have made it to their running."""
    async with control.transaction() as connection:
        await connection.execute(text("ALTER TABLE tenancy.tenants DISABLE TRIGGER USER"))
        await connection.execute(_TENANT, {"step": step, "slug": slug})
        if operations:
            await connection.execute(_OPERATIONS, {"slug": slug})
        await connection.execute(text("ALTER TABLE tenancy.tenants ENABLE TRIGGER USER"))
