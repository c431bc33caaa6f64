"""The marker, which names the tenant that a database belongs to.

It is the database's comment (``COMMENT ON DATABASE``), set by the provisioner. No setting, no ``ALTER ROLE`` and
nothing else that the tenant's role may do can change it. Each new connection proves it before anything else runs on it:
see ``protocol``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from ..errors import MarkerMismatchError
from ..postgres.connections import Connection
from ..postgres.quoting import quote_literal

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


def marker_text(installation: UUID, tenant_id: UUID) -> str:
    """Return the marker of a tenant's database in this installation."""
    return f"tenancy:{installation}:{tenant_id}"


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
        tenant_id: Whose database it must be.
        tenant: The tenant's slug, for the error; its id where None.

    Raises:
        MarkerMismatchError: the marker is missing or another one. The caller closes the connection.
    """
    expected = marker_text(installation, tenant_id)
    if await connection.execute(proof(expected)) != PROVED:
        raise mismatch(expected, tenant or str(tenant_id), await connection.fetchrow(FIND))


__all__ = ["FIND", "PROVED", "marker_text", "mismatch", "proof", "refusal", "verify", "warm_text"]
