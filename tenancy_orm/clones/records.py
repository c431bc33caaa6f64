"""What is recorded of clones: an operation each, with the tenant that it is of and the time at which it ends."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from ..control.database import ControlDatabase

# not from the tenant's metadata, which the application writes
_SELECT = """
SELECT o.id, o.tenant_id, t.slug, o.detail, (o.detail->>'expires_at')::timestamptz AS expires_at
  FROM tenancy.operations o JOIN tenancy.tenants t ON t.id = o.tenant_id
 WHERE o.kind = 'clone' AND o.detail ? 'expires_at'
"""
_OF = text(_SELECT + " AND o.tenant_id = :tenant ORDER BY o.id DESC LIMIT 1")
_DUE = text(
    _SELECT + " AND t.status NOT IN ('provisioning', 'purged') "
    "AND (o.detail->>'expires_at')::timestamptz <= clock_timestamp() "
    "AND (t.status <> 'deleted' OR t.purge_at IS NULL OR t.purge_at > clock_timestamp()) ORDER BY o.id"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """A tenant that is a clone of another one.

    Attributes:
        tenant_id: The clone.
        slug: Its slug.
        of: The tenant that it is a clone of.
        of_slug: The slug that this had then.
        expires_at: When housekeeping deletes and purges the clone.
        columns: The columns with values that were replaced, as ``schema.table.column``.
        operation: The number of the operation that has made it.
    """

    tenant_id: UUID
    slug: str
    of: UUID
    of_slug: str
    expires_at: datetime
    columns: tuple[str, ...]
    operation: int


class CloneRecords:
    """Reads the records of clones.

    Args:
        control: The control database.
    """

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control

    async def of(self, tenant_id: UUID) -> Clone | None:
        """Return what is recorded of a tenant; None where it is no clone."""
        async with self._control.connect() as connection:
            row = (await connection.execute(_OF, {"tenant": tenant_id})).one_or_none()
        return None if row is None else _clone(row)

    async def due(self) -> tuple[Clone, ...]:
        """Return the clones that have expired and are not about to be purged."""
        async with self._control.connect() as connection:
            return tuple(_clone(row) for row in await connection.execute(_DUE))


def _clone(row: Any) -> Clone:
    return Clone(
        tenant_id=row.tenant_id,
        slug=row.slug,
        of=UUID(row.detail["of"]),
        of_slug=row.detail["of_slug"],
        expires_at=row.expires_at,
        columns=tuple(row.detail["columns"]),
        operation=row.id,
    )


__all__ = ["Clone", "CloneRecords"]
