"""Whether a running PgBouncer, and the role that it asks for secrets as, fit an installation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import asyncpg

from ..control.names import Names
from ..errors import LoginRefusedError, PoolerError, ServerUnavailableError
from ..postgres import connections, login
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..postgres.poolers import check_transactions, is_direct
from .pgbouncer_auth import auth_user, function_name
from .server import Server

_FUNCTION = """
SELECT r.rolsuper AS is_superuser, r.rolcanlogin AS can_login,
       pg_catalog.to_regprocedure($2) IS NOT NULL AS has_function,
       (SELECT pg_catalog.array_agg(DISTINCT g.grantee::pg_catalog.regrole::text)
          FROM pg_catalog.pg_proc AS p,
               pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) AS g
         WHERE p.oid = pg_catalog.to_regprocedure($2) AND g.grantee <> p.proowner) AS grantees,
       (SELECT pg_catalog.array_agg(DISTINCT g.grantee::pg_catalog.regrole::text)
          FROM pg_catalog.pg_namespace AS n, pg_catalog.aclexplode(n.nspacl) AS g
         WHERE n.nspname = $1 AND g.privilege_type = 'CREATE' AND g.grantee <> n.nspowner) AS creators
  FROM pg_catalog.pg_roles AS r WHERE r.rolname = $1
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        ok: Whether it is as it should be.
        text: What was found, with the remedy where it is not.
    """

    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant's role, to log in as.

    Attributes:
        tenant: Its slug, for messages.
        role: The role.
        database: Its database.
        password: Its password.
    """

    tenant: str
    role: str
    database: str
    password: str

    def __repr__(self) -> str:
        """Leave the password out."""
        return f"<Caller {self.tenant!r}>"


async def check_function(connection: Connection, names: Names) -> list[Finding]:
    """Look at the role that PgBouncer asks as, and at its function, over an administrative connection."""
    user = auth_user(names)
    row = await connection.fetchrow(_FUNCTION, user, f"{function_name(names)}(pg_catalog.text)")
    if row is None:
        return [Finding(False, f"there is no role {user}; run auth_query.sql as a superuser")]
    found = [Finding(row["can_login"], f"the role {user} {'can' if row['can_login'] else 'cannot'} log in")]
    if row["is_superuser"]:
        text = f"{user} is a superuser, as PgBouncer before 1.19 needs it; from 1.19 on a function is enough"
        return [*found, Finding(True, text)]
    if not row["has_function"]:
        return [*found, Finding(False, f"there is no {function_name(names)}(text); run auth_query.sql as a superuser")]
    others = sorted(set(row["grantees"] or ()) - {user})
    found.append(
        Finding(
            not others and bool(row["grantees"]),
            f"the function may be executed by {', '.join(row['grantees'] or ['nobody else'])}"
            + (f"; REVOKE ALL ON FUNCTION {function_name(names)}(text) FROM {', '.join(others)}" if others else ""),
        )
    )
    if row["creators"]:
        found.append(Finding(False, f"its schema may be changed by {', '.join(row['creators'])}; revoke CREATE"))
    return found


async def check_logins(server: Server, caller: Caller, other: Caller | None) -> list[Finding]:
    """Log in through the pooler as a tenant: to its own database, and to another one's, which must be refused.

    Args:
        server: The server; its address of tenants' sessions is the pooler's.
        caller: A tenant.
        other: Another tenant of the same server, if there is one.
    """
    found = []
    try:
        connection = await _log_in(server, caller, caller.database)
    except (*SERVER_FAILURES, ServerUnavailableError) as exc:
        return [Finding(False, f"tenant {caller.tenant!r} cannot log in at {server.traffic.dsn}: {describe(exc)}")]
    try:
        found.append(Finding(True, f"tenant {caller.tenant!r} logs in at {server.traffic.dsn}"))
        if await is_direct(connection):
            return [Finding(False, f"PostgreSQL itself answers at {server.traffic.dsn}, and no pooler")]
        try:
            await check_transactions(connection, f"{server.traffic.dsn}")
            found.append(Finding(True, "a transaction keeps its connection"))
        except PoolerError as exc:
            found.append(Finding(False, str(exc)))
    finally:
        await connections.close(connection, timeout=2)
    if other is not None:
        found.append(await _refused(server, caller, other))
    return found


async def _refused(server: Server, caller: Caller, other: Caller) -> Finding:
    try:
        connection = await _log_in(server, caller, other.database)
    except (asyncpg.PostgresError, LoginRefusedError, ServerUnavailableError, OSError):
        return Finding(True, "it cannot reach another tenant's database")
    await connections.close(connection, timeout=2)
    return Finding(False, f"it reaches the database of {other.tenant!r}: run tenancy reconcile, which revokes CONNECT")


async def _log_in(server: Server, caller: Caller, database: str) -> Connection:
    return await login.connect(
        server.traffic.dsn,
        purpose="tenancy-check",
        timeout=server.connect_timeout,
        user=caller.role,
        database=database,
        password=caller.password,
        statement_cache_size=0,
    )


def check_settings(shown: Mapping[str, str], version: str, pool_size: int, names: Names) -> Iterator[Finding]:
    """Compare what the console of a PgBouncer shows with what an installation needs.

    Args:
        shown: ``SHOW CONFIG``, by key.
        version: The first column of ``SHOW VERSION``.
        pool_size: The most that ``default_pool_size`` may be.
        names: The installation's names.
    """
    yield Finding(True, version)
    for key, good, remedy in (
        ("pool_mode", {"transaction", "session"}, "set it to transaction"),
        ("auth_type", {"scram-sha-256", "hba"}, "set it to scram-sha-256: tenants' roles have no other secret"),
        ("auth_user", {auth_user(names)}, f"set it to {auth_user(names)}"),
    ):
        value = shown.get(key, "")
        yield Finding(value in good, f"{key} = {value}" + ("" if value in good else f"; {remedy}"))
    size = int(shown.get("default_pool_size", "20"))
    too_many = f"; a role may have {pool_size} at most" if size > pool_size else ""
    yield Finding(size <= pool_size, f"default_pool_size = {size}{too_many}")
    if "auth_dbname" in shown:
        given = shown["auth_dbname"]
        yield Finding(bool(given), f"auth_dbname = {given or 'not set; without it auth_query needs a superuser'}")


__all__ = ["Caller", "Finding", "check_function", "check_logins", "check_settings"]
