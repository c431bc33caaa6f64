"""Who may take advisory locks in tenants' databases: migrations, and tenants only where the configuration says so.

One SELECT of ``pg_try_advisory_lock`` over ``generate_series`` fills the lock table that all databases of a server
share: then no neighbour can read, and nobody can log in. So EXECUTE on these functions is taken from PUBLIC in the
template, and clones inherit that. Only a superuser may do so. What gives locks back stays everybody's: a connection is
reset by it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..postgres.connections import Connection
from ..postgres.quoting import quote_identifier
from . import roles

logger = logging.getLogger("tenancy_orm.provisioning")

FUNCTIONS = tuple(
    f"pg_catalog.pg_{name}lock{shared}({arguments})"
    for name in ("advisory_", "advisory_xact_", "try_advisory_", "try_advisory_xact_")
    for shared in ("", "_shared")
    for arguments in ("bigint", "integer, integer")
)
"""The functions that take an advisory lock."""

_IS_OPEN = "SELECT has_function_privilege('public', 'pg_catalog.pg_try_advisory_lock(bigint)', 'EXECUTE')"


def restrictions(owner: str) -> Sequence[str]:
    """The statements, for a superuser, that leave these functions of one database to its owner."""
    functions = ", ".join(FUNCTIONS)
    return (
        f"REVOKE EXECUTE ON FUNCTION {functions} FROM PUBLIC",
        f"GRANT EXECUTE ON FUNCTION {functions} TO {quote_identifier(owner)} WITH GRANT OPTION",
    )


def grants(role: str) -> Sequence[str]:
    """The statements, for the owner, that let ``role`` take advisory locks in one database after all."""
    return (f"GRANT EXECUTE ON FUNCTION {', '.join(FUNCTIONS)} TO {quote_identifier(role)}",)


async def may_restrict(connection: Connection) -> bool:
    """Whether this administrator may change who executes PostgreSQL's own functions."""
    return await roles.is_superuser(connection)


async def restrict(connection: Connection, owner: str, *, server: str) -> None:
    """Leave the advisory locks of the database of ``connection`` to its owner, or say what a superuser can do.

    Args:
        connection: The administrator's, to a template under construction.
        owner: The owner of the database.
        server: What the server is called in a warning.
    """
    if await may_restrict(connection):
        await connection.execute("; ".join(restrictions(owner)))
    elif await connection.fetchval(_IS_OPEN):
        logger.warning(
            "tenants of server %s can take advisory locks, and fill its lock table with them: its administrator is no "
            "superuser, and may not change that; run as a superuser, in template0 (see docs/provisioning.md): %s",
            server,
            "; ".join(restrictions(owner)),
        )
