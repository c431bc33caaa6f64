"""Rights to take advisory locks in tenants' databases: migrations have them, tenants only if configured.

One SELECT of ``pg_try_advisory_lock`` over ``generate_series`` can fill the lock table that all databases of a server
share; then no other tenant can read, and nobody can log in. So EXECUTE on these functions is revoked from PUBLIC in the
template, and clones inherit that. Only a superuser may revoke it. Everybody may execute the functions that release
locks: resetting a connection calls them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...postgres.connections import Connection
from ...postgres.quoting import quote_identifier
from . import roles

logger = logging.getLogger("tenancy_orm.provisioning")

FUNCTIONS = tuple(
    f"pg_catalog.pg_{name}lock{shared}({arguments})"
    for name in ("advisory_", "advisory_xact_", "try_advisory_", "try_advisory_xact_")
    for shared in ("", "_shared")
    for arguments in ("bigint", "integer, integer")
)
"""The functions that take an advisory lock."""

_IS_RESTRICTED = """
SELECT bool_and(NOT has_function_privilege('public', f, 'EXECUTE')
                AND has_function_privilege($2::name, f, 'EXECUTE WITH GRANT OPTION')) FROM unnest($1::text[]) f
"""
_IS_OPEN = "SELECT has_function_privilege('public', 'pg_catalog.pg_try_advisory_lock(bigint)', 'EXECUTE')"

LOCKED = """
SELECT d.datname::text FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.database
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = $1::bigint AND l.objid = $2::bigint
"""
"""The database in which somebody holds a lock: seen on that server alone, and by everybody there."""


def restrictions(owner: str) -> Sequence[str]:
    """The statements with which a superuser restricts these functions of one database to its owner."""
    functions = ", ".join(FUNCTIONS)
    return (
        f"REVOKE EXECUTE ON FUNCTION {functions} FROM PUBLIC",
        f"GRANT EXECUTE ON FUNCTION {functions} TO {quote_identifier(owner)} WITH GRANT OPTION",
    )


def releases(owner: str) -> Sequence[str]:
    """The statements that undo ``restrictions``."""
    functions = ", ".join(FUNCTIONS)
    return (
        f"REVOKE ALL ON FUNCTION {functions} FROM {quote_identifier(owner)} CASCADE",
        f"GRANT EXECUTE ON FUNCTION {functions} TO PUBLIC",
    )


async def may_restrict(connection: Connection) -> bool:
    """Whether this administrator may change the rights on PostgreSQL's own functions."""
    return await roles.is_superuser(connection)


async def is_restricted(connection: Connection, owner: str) -> bool:
    """Whether the owner alone may grant these functions in the database of ``connection``, and PUBLIC has none."""
    return bool(await connection.fetchval(_IS_RESTRICTED, list(FUNCTIONS), owner))


async def restrict(connection: Connection, owner: str, *, server: str) -> None:
    """Restrict advisory locks in the database of ``connection`` to its owner, or log what a superuser can run.

    Args:
        connection: An administrative one, to a template that is being built.
        owner: The owner of the database.
        server: The server's name, for the warning.
    """
    if await may_restrict(connection):
        await connection.execute("; ".join(restrictions(owner)))
    elif await connection.fetchval(_IS_OPEN):
        logger.warning(
            "tenants of server %s can take advisory locks, and fill its lock table with them: its administrator is not "
            "a superuser, and may not change that; run as a superuser, in template0 (see Advisory locks in the "
            "documentation of provisioning): %s",
            server,
            "; ".join(restrictions(owner)),
        )
