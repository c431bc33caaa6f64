"""Guests: roles that are neither the tenant's nor this installation's, and may connect to the tenant's database.

The grant hook or an operator has let them in. Where a database is exchanged for another one, they are shut out of it
with the tenant's role: what they write to a database that is not in use is lost. Who was shut out is in the comment of
the tenant's role, written in the transaction that shuts them out. So whoever goes on after a crash, or goes back to the
database a day later, lets them in again.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any, Final

import asyncpg

from ...control.names import Names
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.membership import end_connections
from ...postgres.quoting import quote_identifier, quote_literal
from ..server_objects.blockers import Blockers

OUTSIDER: Final = """
starts_with(r.rolname::text, {tenants})
OR NOT r.rolsuper AND r.rolname <> current_user AND NOT starts_with(r.rolname::text, {stem})
   AND NOT pg_has_role(r.oid, {owner}::name, 'MEMBER')
"""
"""Of a role ``r``: whether it is a tenant's, or an operator's and no administrator. The names in braces are parameters,
which ``outsider_names`` returns."""

_SESSIONS: Final = f"""
SELECT a.pid::text AS pid, a.usename::text AS role, a.state IS DISTINCT FROM 'idle' AS busy
  FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid
 WHERE a.datname = $1 AND ({OUTSIDER.format(owner="$2", stem="$3", tenants="$4")})
"""  # noqa: S608 - constants

_KEY: Final = "tenancy shuts out"
_BEFORE: Final = "comment before"

_GUESTS: Final = """
SELECT r.rolname::text AS name, bool_or(a.is_grantable) AS grantable
  FROM pg_database d CROSS JOIN LATERAL aclexplode(d.datacl) a JOIN pg_roles r ON r.oid = a.grantee
 WHERE d.datname = $1 AND a.privilege_type = 'CONNECT' AND a.grantee <> d.datdba
   AND NOT r.rolsuper AND r.rolname <> current_user AND NOT pg_has_role(r.oid, $2::name, 'MEMBER')
   AND NOT starts_with(r.rolname::text, $3)
 GROUP BY 1 ORDER BY 1
"""
# PUBLIC is ''. The members of the owner and of superusers are administrators.
_LET_IN: Final = f"""
SELECT DISTINCT coalesce(r.rolname::text, '') AS name
  FROM pg_database d CROSS JOIN LATERAL aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
  LEFT JOIN pg_roles r ON r.oid = a.grantee
 WHERE d.datname = $1 AND a.privilege_type = 'CONNECT' AND a.grantee <> d.datdba
   AND (a.grantee = 0 OR ({OUTSIDER.format(owner="$2", stem="$3", tenants="$4")})) ORDER BY 1
"""  # noqa: S608 - constants
_COMMENT: Final = "SELECT shobj_description(oid, 'pg_authid') AS text FROM pg_roles WHERE rolname = $1"
_DATABASES: Final = "SELECT datname::text FROM pg_database WHERE datname::text = ANY ($1::text[])"
_ROLES: Final = "SELECT rolname::text FROM pg_roles WHERE rolname::text = ANY ($1::text[])"


def outsider_names(names: Names) -> tuple[str, str, str]:
    """Return what ``OUTSIDER`` is given: the owner, and the prefixes of this installation's and of tenants' roles."""
    return names.owner, f"{names.stem}_", names.tenant_stem


async def shut_out(connection: Connection, blockers: Blockers, names: Names, *, database: str, role: str) -> None:
    """Let no guest connect to a database any more; their sessions there go on. Does nothing where there is none.

    Args:
        connection: An administrative one, to the maintenance database.
        blockers: Of its server.
        names: Of this installation.
        database: The database.
        role: The tenant's role, of which the comment tells who was shut out.
    """
    if await _guests(connection, names, database):
        await blockers.run(connection, partial(_shut_out, connection, names, database, role), role=role)


async def let_in(connection: Connection, blockers: Blockers, *, database: str, role: str) -> None:
    """Let those connect to a database again who were shut out of it. Does nothing where nobody was.

    Args:
        connection: An administrative one, to the maintenance database.
        blockers: Of its server.
        database: The database.
        role: The tenant's role.
    """
    if database in _parse(await connection.fetchval(_COMMENT, role))[0]:
        await blockers.run(connection, partial(_let_in, connection, database, role), role=role)


async def who_may_connect(connection: Connection, names: Names, database: str) -> list[str]:
    """Return the roles that a database is open to beside administrators, by grants on it; "" is PUBLIC."""
    return [row["name"] for row in await connection.fetch(_LET_IN, database, *outsider_names(names))]


async def sessions(connection: Connection, names: Names, database: str) -> list[asyncpg.Record]:
    """Return the sessions in a database of all but administrators, the tenant's own included: pid, role and busy."""
    # asyncpg would ask the server for int[], so pids are text. An administrator without pg_read_all_stats sees no
    # state: it may be anything.
    found: list[asyncpg.Record] = await connection.fetch(_SESSIONS, database, *outsider_names(names))
    return found


async def end_sessions(connection: Connection, names: Names, database: str) -> None:
    """End those sessions, in a database that they cannot connect to any more, and wait until none is left.

    Raises:
        TimeoutError: some are left after some seconds.
    """
    async with asyncio.timeout(connections.CLOSE_SECONDS):
        while found := await sessions(connection, names, database):
            for row in found:
                await end_connections(connection, row["role"], [int(row["pid"])])
            await asyncio.sleep(connections.POLL_SECONDS)


async def _guests(connection: Connection, names: Names, database: str) -> dict[str, bool]:
    """Return those who may connect by a grant of their own, each with whether they may pass that on."""
    owner, stem, _ = outsider_names(names)
    return {row["name"]: row["grantable"] for row in await connection.fetch(_GUESTS, database, owner, stem)}


async def _shut_out(connection: Connection, names: Names, database: str, role: str) -> None:
    async with connections.transaction(connection):
        await _lock(connection, role)
        if not (found := await _guests(connection, names, database)):
            return
        row = await connection.fetchrow(_COMMENT, role)
        if row is not None:
            noted, before = _parse(row["text"])
            noted[database] = {**noted.get(database, {}), **found}
            await _note(connection, role, noted, before)
        listed = ", ".join(map(quote_identifier, found))
        # whom they have let in is among them
        await connection.execute(f"REVOKE CONNECT ON DATABASE {quote_identifier(database)} FROM {listed} CASCADE")


async def _let_in(connection: Connection, database: str, role: str) -> None:
    async with connections.transaction(connection):
        await _lock(connection, role)
        noted, before = _parse(await connection.fetchval(_COMMENT, role))
        found = noted.pop(database, {})
        there = {row[0] for row in await connection.fetch(_ROLES, list(found))}
        for name, grantable in found.items():
            if name in there:
                option = " WITH GRANT OPTION" if grantable else ""
                grantee = quote_identifier(name)
                await connection.execute(f"GRANT CONNECT ON DATABASE {quote_identifier(database)} TO {grantee}{option}")
        await _note(connection, role, noted, before)


async def _lock(connection: Connection, role: str) -> None:
    # of two that change the comment, the later one reads what the other has written
    await connection.execute(f"SELECT pg_advisory_xact_lock({locks.lock_key(f'guests of {role}')})")


def _parse(text: str | None) -> tuple[dict[str, dict[str, bool]], str | None]:
    """Return who is shut out by the comment, by database, and the comment that somebody else had written before."""
    try:
        found: Any = json.loads(text or "")
    except ValueError:
        return {}, text
    if not isinstance(found, dict) or _KEY not in found:
        return {}, text
    return dict(found[_KEY]), found.get(_BEFORE)


async def _note(connection: Connection, role: str, noted: dict[str, dict[str, bool]], before: str | None) -> None:
    there = {row[0] for row in await connection.fetch(_DATABASES, list(noted))}
    kept = {database: roles for database, roles in noted.items() if database in there}
    text = json.dumps({_KEY: kept, _BEFORE: before}) if kept else before
    value = "NULL" if text is None else quote_literal(text)
    await connection.execute(f"COMMENT ON ROLE {quote_identifier(role)} IS {value}")


__all__ = ["OUTSIDER", "end_sessions", "let_in", "outsider_names", "sessions", "shut_out", "who_may_connect"]
