"""Which cluster a server is, so that neither its address nor its name leads to another one unnoticed.

PostgreSQL gives each cluster a system identifier when it is made. Standbys have that of their primary and keep it when
they are promoted, and so has what is restored from a base backup. A managed server may not let its administrator read
it; there a comment on the installation's owner role stands for it, which standbys have as well.
"""

from __future__ import annotations

from typing import Final
from uuid import uuid4

import asyncpg

from ..postgres.connections import Connection
from ..postgres.quoting import quote_identifier, quote_literal

_SYSTEM: Final = "SELECT system_identifier FROM pg_catalog.pg_control_system()"
_COMMENT: Final = (
    "SELECT pg_catalog.shobj_description(r.oid, 'pg_authid') FROM pg_catalog.pg_roles AS r WHERE r.rolname = $1"
)
_PREFIX: Final = "tenancy server "


async def read_identity(connection: Connection, owner: str | None = None) -> str | None:
    """Return what identifies the cluster, ``system:<number>`` or ``marker:<uuid>``; None where there is nothing.

    Args:
        connection: An administrative one.
        owner: The installation's owner role, where it is known.
    """
    try:
        return f"system:{await connection.fetchval(_SYSTEM)}"
    except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError):
        marker = None if owner is None else await connection.fetchval(_COMMENT, owner)
    comment = str(marker or "")
    return f"marker:{comment.removeprefix(_PREFIX)}" if comment.startswith(_PREFIX) else None


async def ensure_identity(connection: Connection, owner: str) -> None:
    """Leave a marker where the system identifier cannot be read and there is no marker yet.

    Args:
        connection: An administrative one that may comment on ``owner``.
        owner: The installation's owner role.
    """
    if await read_identity(connection, owner) is None:
        comment = quote_literal(f"{_PREFIX}{uuid4()}")
        await connection.execute(f"COMMENT ON ROLE {quote_identifier(owner)} IS {comment}")


def differ(known: str | None, found: str | None) -> bool:
    """Whether two identities are of two clusters, as far as can be told."""
    if known is None:
        return False
    if found is None:
        # everybody can read the marker: where it is missing, this installation has not prepared the server
        return known.startswith("marker:")
    # what can be read may change with the administrator's rights
    return known.partition(":")[0] == found.partition(":")[0] and known != found


__all__ = ["differ", "ensure_identity", "read_identity"]
