"""What the database of a clone says of itself: the tenant that it is a copy of, and the time at which it ends.

The control database records the same. This is for the day on which that is lost: a clone has somebody's data, and would
be an ordinary tenant for ever. It is the comment of the package's own schema, which no tenant's role can change, and
which goes wherever the database goes: into its backups, and along with it when it moves. So it names the clone: a copy
that is another tenant's has it as well, and there it means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from ...errors import ProvisioningError
from ...postgres.connections import Connection
from ...postgres.quoting import quote_literal
from ..rights.tenant_rights import RECORD_SCHEMA

METADATA = "clone"
"""The key of a clone's metadata with what its database says of it."""

_PREFIX = "tenancy-clone:"
# a role that may create schemas could make one of this name
_READ = """
SELECT pg_catalog.obj_description(oid, 'pg_namespace') FROM pg_catalog.pg_namespace
 WHERE nspname = $1 AND pg_catalog.pg_get_userbyid(nspowner) = $2
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneMark:
    """What a clone's database says of itself.

    Attributes:
        of: The tenant that it is a clone of.
        of_slug: The slug that this had then.
        expires_at: When housekeeping deletes and purges the clone.
        columns: The columns with values that were replaced, as ``schema.table.column``.
    """

    of: UUID
    of_slug: str
    expires_at: datetime
    columns: tuple[str, ...] = ()

    @property
    def detail(self) -> dict[str, Any]:
        """The details of the operation that the control database has of it."""
        return {
            "of": str(self.of),
            "of_slug": self.of_slug,
            "expires_at": self.expires_at.isoformat(),
            "columns": list(self.columns),
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """What the tenant's metadata says of it, as ``METADATA``."""
        return {
            "of": str(self.of),
            "slug": self.of_slug,
            "expires_at": self.expires_at.isoformat(),
            "anonymised": bool(self.columns),
        }


async def write(connection: Connection, tenant_id: UUID, mark: CloneMark) -> None:
    """Write the mark of a clone into its database.

    Args:
        connection: To the database, as a role that owns its schemas and may create them.
        tenant_id: The clone.
        mark: What it says.
    """
    comment = _PREFIX + json.dumps({"clone": str(tenant_id), **mark.detail})
    await connection.execute(
        f"CREATE SCHEMA IF NOT EXISTS {RECORD_SCHEMA}; COMMENT ON SCHEMA {RECORD_SCHEMA} IS {quote_literal(comment)}"
    )


async def read(connection: Connection, tenant_id: UUID, *, owner: str) -> CloneMark | None:
    """Return the mark of a tenant's database; None where the tenant is no clone.

    Args:
        connection: To the database.
        tenant_id: The tenant that the database is of.
        owner: The owner of tenants' databases.

    Raises:
        ProvisioningError: it is malformed.
    """
    comment = await connection.fetchval(_READ, RECORD_SCHEMA, owner)
    if comment is None or not comment.startswith(_PREFIX):
        return None
    try:
        found: Mapping[str, Any] = json.loads(comment.removeprefix(_PREFIX))
        if UUID(found["clone"]) != tenant_id:
            return None
        expires_at = datetime.fromisoformat(found["expires_at"])
        if expires_at.tzinfo is None:
            raise ValueError("the time has no zone")
        return CloneMark(
            of=UUID(found["of"]),
            of_slug=str(found["of_slug"]),
            expires_at=expires_at,
            columns=tuple(map(str, found["columns"])),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ProvisioningError(
            f"the comment of schema {RECORD_SCHEMA} does not say of which tenant this is a clone, and until when: "
            "correct it, or set it to NULL if it is no clone",
            step="clone",
        ) from exc


__all__ = ["METADATA", "CloneMark", "read", "write"]
