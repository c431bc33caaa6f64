"""The missing revisions of one database that is not the one in use yet: of a restore or an adoption."""

from __future__ import annotations

from dataclasses import replace

from ..errors import MigrationError
from ..tenant import Placement, Tenant
from . import local
from .connections import Connections, Health
from .database import DatabaseMigration
from .plan import Plan, format_revision
from .scripts import Environment


async def upgrade_beside(
    tenant: Tenant, placement: Placement, connections: Connections, environment: Environment | None
) -> str | None:
    """Bring a database of a tenant to this code's head, and return the revision that it is at.

    Args:
        tenant: The tenant; revisions get it as ``op.get_context().opts["tenant"]``, with this placement.
        placement: Where the database is. It has the tenant's marker, or that of a database that was replaced.
        connections: Connects to databases.
        environment: The migrations; without any, nothing is done, and the revision is None.

    Raises:
        MigrationError: a revision failed, or the database is at one that this code does not have.
        MarkerMismatchError: the database is another tenant's.
    """
    if environment is None:
        return None
    local.install()
    health = Health()
    migration = DatabaseMigration(
        Plan.of(environment, "upgrade", "heads"),
        replace(connections.target(replace(tenant, placement=placement), health), may_be_replaced=True),
        adapter=connections.adapter(placement.server),
        limits=connections.limits,
    )
    await migration.run()
    if migration.after is None:
        raise MigrationError(f"the revision of database {placement.database!r} could not be read back")
    return format_revision(migration.after)


__all__ = ["upgrade_beside"]
