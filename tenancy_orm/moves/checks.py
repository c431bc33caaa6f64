"""What a database is refused for, before its tenant is moved and again within the pause."""

from __future__ import annotations

from ..drift import catalogue
from ..drift.catalogue import Catalogue
from ..errors import OperationError
from ..postgres.connections import Connection
from ..provisioning.checks.differences import enumeration
from ..tenant import Tenant
from .policy import refuse_own_objects, schema_differences
from .record import MoveRecord
from .survey import Survey, survey

LAST_VERSION = 18
"""The newest version of PostgreSQL that is supported."""

_PREPARED = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY 1"
_SHOWN = 5


async def look(move: MoveRecord, source: Connection) -> Survey:
    """Look into the database that is left, by an administrative connection.

    Raises:
        OperationError: it cannot be moved in this way.
    """
    await refuse_own_objects(source, move.old.role, tenant=move.tenant.slug)
    return await survey(
        source,
        tenant=move.tenant.slug,
        owner=move.provisioning.names.owner,
        stem=move.provisioning.names.stream_stem,
        online=move.online,
        most=move.config.pause_bytes,
        version=int(move.operation.detail.get("version") or LAST_VERSION),
    )


async def read_schema(move: MoveRecord, connection: Connection) -> Catalogue:
    """Read the schema of one of the databases, by an administrative connection."""
    # the role has the same name on both servers
    return await catalogue.read(connection, owner=move.provisioning.names.owner, role=move.old.role)


async def refuse_other_schema(
    move: MoveRecord,
    connection: Connection,
    expected: Catalogue,
    *,
    remedy: str = "during its move: {}; move it again",
) -> None:
    """Refuse a database with another schema than the copy was made of.

    Raises:
        OperationError: it has another one.
    """
    found = await read_schema(move, connection)
    if differences := list(schema_differences(expected, found)):
        told = "; ".join(one.text for one in differences[:_SHOWN])
        raise OperationError(f"the schema of tenant {move.tenant.slug!r} was changed {remedy.format(told)}")


async def refuse_prepared(move: MoveRecord, source: Connection) -> None:
    """Refuse to leave transactions behind that have no session, and can be committed later.

    Raises:
        OperationError: the database has such transactions.
    """
    if found := [row["gid"] for row in await source.fetch(_PREPARED)]:
        raise OperationError(
            f"tenant {move.tenant.slug!r} cannot be moved: its database has the prepared transactions "
            f"{enumeration(found)}; end them by COMMIT PREPARED or ROLLBACK PREPARED"
        )


def refuse_migrated(move: MoveRecord, now: Tenant) -> None:
    """Refuse a tenant with another revision than when its move began, or with a migration under way.

    Raises:
        OperationError: it has one.
    """
    if now.schema_revision != move.tenant.schema_revision or now.migrating_to is not None:
        raise OperationError(
            f"the schema of tenant {now.slug!r} was migrated from {move.tenant.schema_revision} to "
            f"{now.migrating_to or now.schema_revision} during its move; move it again"
        )


__all__ = ["look", "read_schema", "refuse_migrated", "refuse_other_schema", "refuse_prepared"]
