"""The marker, which names the tenant that a database belongs to.

It is the database's comment (``COMMENT ON DATABASE``), set by the provisioner. No setting, no ``ALTER ROLE`` and
nothing else that the tenant's role may do can change it. Each new connection proves it before anything else runs on it:
see ``protocol``. A database that a restore or a move has replaced has a longer one, which no such proof accepts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from ..errors import MarkerMismatchError
from ..postgres.connections import Connection
from ..postgres.quoting import quote_literal
from ..tenant import Placement

# All names are qualified: a role can set its own search_path. No parameter is bound: a statement without parameters
# uses the simple protocol, one round trip instead of two, and its command tag has the number of rows.
# 1262 is the fixed oid of pg_database itself; without looking it up, a new connection answers 0.3 ms sooner.
_WHERE: Final = (
    " FROM pg_catalog.pg_shdescription AS c WHERE c.classoid OPERATOR(pg_catalog.=) 1262 "
    "AND c.objoid OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database AS d "
    "WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) "
    "AND c.description OPERATOR(pg_catalog.=) "
)
FIND: Final = (
    "SELECT d.datname AS name, pg_catalog.shobj_description(d.oid, 'pg_database') AS marker "
    "FROM pg_catalog.pg_database AS d WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
)

PROVED: Final = "SELECT 1"
_REPLACED: Final = re.compile(r"tenancy:[^:]+:[^:]+:replaced:(.+)", re.DOTALL)
_PLAIN: Final = re.compile(r"tenancy:([0-9a-f-]{36}):([0-9a-f-]{36})")


def marker_text(installation: UUID, tenant_id: UUID) -> str:
    """Return the marker of a tenant's database in this installation."""
    return f"tenancy:{installation}:{tenant_id}"


def replaced_text(installation: UUID, tenant_id: UUID, by: Placement) -> str:
    """Return the marker of a database of a tenant that another one has replaced: no session uses it."""
    return f"{marker_text(installation, tenant_id)}:replaced:{by.server}/{by.database}"


def replaced_by(text: str | None) -> str | None:
    """Return the server and the database that have replaced the one with this marker; None where nothing has."""
    match = _REPLACED.fullmatch(text or "")
    return None if match is None else match[1]


def tenant_of(text: str | None, installation: UUID) -> UUID | None:
    """Return the tenant of this installation that a marker names; None where it is another one, or was replaced."""
    match = _PLAIN.fullmatch(text or "")
    return UUID(match[2]) if match is not None and match[1] == str(installation) else None


def warm_text(installation: UUID) -> str:
    """Return the comment of a warm database, which no tenant has had."""
    return f"tenancy-warm:{installation}"


def proof(marker: str) -> str:
    """Return the statement that proves a marker: its command tag is ``SELECT 1`` where the database has it."""
    return f"SELECT{_WHERE}{quote_literal(marker)}"


def refusal(marker: str) -> str:
    """Return the statement that fails with a division by zero (22012) where the database does not have the marker."""
    return f"SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*){_WHERE}{quote_literal(marker)}"


def mismatch(expected: str, tenant: str, found: Sequence[Any] | None) -> MarkerMismatchError:
    """Return the error for a database with another marker.

    Args:
        expected: The marker that it must have.
        tenant: The tenant, for the message.
        found: The row of ``FIND``: the database's name and its marker.
    """
    name, marker = ("", None) if found is None else (str(found[0]), found[1])
    return MarkerMismatchError(tenant=tenant, database=name, expected=expected, found=marker)


async def verify(connection: Connection, installation: UUID, tenant_id: UUID, *, tenant: str | None = None) -> None:
    """Check that a connection leads to a tenant's own database.

    Args:
        connection: A new connection.
        installation: The id of this installation.
        tenant_id: The tenant that must own the database.
        tenant: The tenant's slug, for the error; its id where None.

    Raises:
        MarkerMismatchError: the marker is missing or another one. The caller closes the connection.
    """
    expected = marker_text(installation, tenant_id)
    if await connection.execute(proof(expected)) != PROVED:
        raise mismatch(expected, tenant or str(tenant_id), await connection.fetchrow(FIND))


__all__ = [
    "FIND",
    "PROVED",
    "marker_text",
    "mismatch",
    "proof",
    "refusal",
    "replaced_by",
    "replaced_text",
    "tenant_of",
    "verify",
    "warm_text",
]
