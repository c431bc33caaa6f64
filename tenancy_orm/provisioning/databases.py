"""The verbs of a tenant database's life, one function each, on an administrative asyncpg connection.

Every identifier goes through ``quote_identifier``; DDL takes no parameters, so its constants go through
``quote_literal``. Errors are told apart by SQLSTATE. Nothing that exists is ever adopted: creating over a database or
a role raises ``DatabaseExistsError``. Dropping is idempotent.

The administrator need not be a superuser: CREATEDB and CREATEROLE are enough from PostgreSQL 16 on, as long as it is
a member of the owner role (``join_role``).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

import asyncpg

from ..errors import DatabaseExistsError, ProvisioningError
from ..postgres.failures import SERVER_FAILURES
from ..postgres.quoting import quote_identifier, quote_literal

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

Strategy = Literal["wal_log", "file_copy"]
"""How CREATE DATABASE copies: through the log (20 ms, best for a caller who waits) or by files (70 ms and two
checkpoints, but twice as many databases a second when thousands are made in a row)."""

DUPLICATE_DATABASE = "42P04"
DUPLICATE_OBJECT = "42710"
UNIQUE_VIOLATION = "23505"  # what the loser of a race to create one name gets in place of the two above
INSUFFICIENT_PRIVILEGE = "42501"
MISSING_DATABASE = "3D000"
OBJECT_IN_USE = "55006"
CONCURRENT_UPDATE = "XX000"  # "tuple concurrently updated": two sessions changed one catalogue row

POLL_SECONDS = 0.02
CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class DatabaseState:
    """What ``pg_database`` says of one database. ``comment`` is its marker, if it has one."""

    name: str
    is_template: bool
    comment: str | None


@dataclass(frozen=True, slots=True)
class RoleState:
    """What ``pg_roles`` and ``pg_database`` say of one role."""

    can_login: bool
    connection_limit: int
    connected: bool  # whether it has a connection now
    admitted_to: frozenset[str] = frozenset()  # the databases it may CONNECT to by a grant of its own


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of a PostgreSQL error, or None of any other."""
    return error.sqlstate if isinstance(error, asyncpg.PostgresError) else None


def version(connection: Connection) -> int:
    """The server's major version."""
    return int(connection.get_server_version().major)


async def close(connection: Connection) -> None:
    """Close a connection; at once where the server does not answer."""
    try:
        await connection.close(timeout=CLOSE_SECONDS)
    except SERVER_FAILURES:
        connection.terminate()


async def is_alive(connection: Connection) -> bool:
    """Whether the connection still works, and answers soon. What was cancelled on it has ended before this returns."""
    if connection.is_closed():
        return False
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            return bool(await connection.fetchval("SELECT true"))
    except SERVER_FAILURES:
        return False


async def _unflushed(connection: Connection, *statements: str) -> None:
    """Run statements in one transaction whose commit does not wait for the disk.

    One message holds them all, which PostgreSQL makes one implicit transaction: an error or a cancellation at any of
    them leaves neither a part of the work nor an open transaction behind.
    """
    await connection.execute("; ".join(("SET LOCAL synchronous_commit = off", *statements)))


# --- advisory locks -------------------------------------------------------------------------------------------------


def lock_key(text: str) -> int:
    """Return the 64-bit advisory lock key of ``text``."""
    return int.from_bytes(hashlib.blake2b(b"tenancy:" + text.encode(), digest_size=8).digest(), signed=True)


async def try_lock(connection: Connection, key: int) -> bool:
    """Take the session-level lock ``key`` if it is free. It goes with the connection, however that ends."""
    return bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", key))


async def unlock(connection: Connection, key: int) -> None:
    """Release one hold of the lock ``key``."""
    await connection.execute(f"SELECT pg_advisory_unlock({key})")


async def lock(connection: Connection, key: int, *, timeout: float) -> None:
    """Take the session-level lock ``key``, by polling. It is held until ``unlock``, or until the connection ends.

    A session that *waits* in pg_advisory_lock holds a snapshot all the while, and CREATE INDEX CONCURRENTLY in the
    session that holds the lock waits for exactly such snapshots: a deadlock. Polling holds nothing between two tries.

    Raises:
        TimeoutError: it was not free within ``timeout`` seconds.
    """
    async with asyncio.timeout(timeout):
        while not await try_lock(connection, key):  # noqa: ASYNC110 - the event is in another process
            await asyncio.sleep(POLL_SECONDS)


# --- databases ------------------------------------------------------------------------------------------------------


async def create_database(
    connection: Connection,
    name: str,
    *,
    template: str,
    owner: str,
    strategy: Strategy = "wal_log",
    open_to_connections: bool = True,
) -> None:
    """Clone ``template``. Not in a transaction (25001).

    Args:
        connection: To any database of the server but the template.
        name: The new database.
        template: What it is cloned from.
        owner: Its owner.
        strategy: See ``Strategy``. PostgreSQL 14 has FILE_COPY only.
        open_to_connections: False keeps everybody out, until ``admit``: PUBLIC may CONNECT to every new database, and
            a connection made in the moment before the REVOKE would outlive it.

    Raises:
        DatabaseExistsError: there is a database of that name.
        asyncpg.ObjectInUseError: somebody is connected to the template.
        asyncpg.InvalidCatalogNameError: there is no such template.
    """
    options = [f"TEMPLATE {quote_identifier(template)}", f"OWNER {quote_identifier(owner)}"]
    if template == "template0":
        # the only template that admits another encoding than its own
        options.append("ENCODING 'UTF8'")
    if not open_to_connections:
        options.append("ALLOW_CONNECTIONS false")
    if version(connection) >= 15:
        options.append(f"STRATEGY {strategy}")
    try:
        await connection.execute(f"CREATE DATABASE {quote_identifier(name)} WITH {' '.join(options)}")
    except asyncpg.PostgresError as exc:
        if sqlstate(exc) in (DUPLICATE_DATABASE, UNIQUE_VIOLATION):
            raise DatabaseExistsError(f"database {name!r} exists already, and is not adopted") from exc
        raise


async def drop_database(connection: Connection, name: str) -> None:
    """Drop a database, a template as well, and end the connections to it. Does nothing where it is gone.

    Raises:
        asyncpg.ObjectInUseError: a prepared transaction, replication slot or subscription holds it (55006): see
            ``removal.drop_database``.
    """
    quoted = quote_identifier(name)
    try:
        if await connection.fetchval("SELECT datistemplate FROM pg_database WHERE datname = $1", name):
            await connection.execute(f"ALTER DATABASE {quoted} WITH IS_TEMPLATE false")
        await connection.execute(f"DROP DATABASE IF EXISTS {quoted} WITH (FORCE)")
    except asyncpg.InvalidCatalogNameError:  # 3D000
        return


async def database_state(connection: Connection, name: str) -> DatabaseState | None:
    """Look a database up, or return None."""
    row = await connection.fetchrow(
        "SELECT datname, datistemplate, shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", name
    )
    return None if row is None else DatabaseState(*row)


async def database_states(connection: Connection, stem: str) -> list[DatabaseState]:
    """Look up every database whose name begins with ``stem``."""
    rows = await connection.fetch(
        "SELECT datname, datistemplate, shobj_description(oid, 'pg_database') FROM pg_database "
        "WHERE starts_with(datname::text, $1) ORDER BY datname",
        stem,
    )
    return [DatabaseState(*row) for row in rows]


async def admit(connection: Connection, name: str, *, role: str) -> None:
    """Open a new database to its tenant's role and to nobody else, in one transaction.

    A revoke on a template is not copied to its clones, so each database needs its own. The commit is not flushed by
    itself: the next synchronous one on this server, that of ``grant_and_mark``, covers it.
    """
    database, quoted_role = quote_identifier(name), quote_identifier(role)
    await _unflushed(
        connection,
        f"REVOKE ALL ON DATABASE {database} FROM PUBLIC",
        f"GRANT CONNECT ON DATABASE {database} TO {quoted_role}",
        f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS true",
    )


async def admit_owner(connection: Connection, name: str) -> None:
    """Open a new database to its owner and the administrator, and to nobody else, in one transaction."""
    database = quote_identifier(name)
    await _unflushed(
        connection,
        f"REVOKE ALL ON DATABASE {database} FROM PUBLIC",
        f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS true",
    )


async def close_to_public(connection: Connection, name: str, *, but: Iterable[str] = ()) -> None:
    """Take every right on a database from PUBLIC: it has CONNECT and TEMP on every one by default.

    Args:
        connection: To any database of the server.
        name: The database.
        but: Roles that get these rights for themselves, in the same transaction.

    Raises:
        asyncpg.InsufficientPrivilegeError: the administrator has no rights on that database at all. With some rights,
            but not that one, PostgreSQL only warns, and ``is_open_to_public`` stays true.
    """
    database = quote_identifier(name)
    kept = [f"GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {quote_identifier(role)}" for role in but]
    await connection.execute("; ".join([*kept, f"REVOKE ALL ON DATABASE {database} FROM PUBLIC"]))


async def is_open_to_public(connection: Connection, name: str) -> bool:
    """Whether PUBLIC has any right on a database. False where there is no such database."""
    query = (
        "SELECT EXISTS (SELECT FROM pg_database, aclexplode(coalesce(datacl, acldefault('d', datdba))) AS granted "
        "WHERE datname = $1 AND granted.grantee = 0)"
    )
    return bool(await connection.fetchval(query, name))


async def set_marker(connection: Connection, name: str, marker: str | None) -> None:
    """Set the comment by which a database proves whose it is."""
    text = "NULL" if marker is None else quote_literal(marker)
    await connection.execute(f"COMMENT ON DATABASE {quote_identifier(name)} IS {text}")


async def seal_template(connection: Connection, name: str, *, comment: str) -> None:
    """Declare a template complete, as the last thing ever done to it.

    Nobody can connect to it afterwards, so that no stray connection fails a clone (55006, after 5 s).
    """
    quoted = quote_identifier(name)
    await connection.execute(
        f"COMMENT ON DATABASE {quoted} IS {quote_literal(comment)}; "
        f"ALTER DATABASE {quoted} WITH IS_TEMPLATE true ALLOW_CONNECTIONS false"
    )


# --- roles ----------------------------------------------------------------------------------------------------------

_TENANT_ROLE = "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOREPLICATION NOBYPASSRLS"
_OWNER_ROLE = "NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS"


async def create_role(
    connection: Connection, name: str, *, verifier: str, connection_limit: int, settings: Sequence[str] = ()
) -> None:
    """Create a tenant's login role.

    The commit is not flushed by itself: CREATE DATABASE, which comes next, flushes everything before it.

    Args:
        connection: To any database of the server.
        name: The role.
        verifier: What ``scram_verifier`` made of its password.
        connection_limit: How many connections it may have at once.
        settings: Statements that give it its settings, in the same transaction.

    Raises:
        DatabaseExistsError: there is a role of that name.
    """
    await _create_role(
        connection,
        name,
        f"{_TENANT_ROLE} CONNECTION LIMIT {int(connection_limit)} PASSWORD {quote_literal(verifier)}",
        *settings,
    )


async def create_owner(connection: Connection, name: str) -> None:
    """Create the NOLOGIN role that owns tenant databases and their tables.

    Raises:
        DatabaseExistsError: there is a role of that name.
    """
    await _create_role(connection, name, _OWNER_ROLE)


async def _create_role(connection: Connection, name: str, attributes: str, *settings: str) -> None:
    try:
        await _unflushed(connection, f"CREATE ROLE {quote_identifier(name)} {attributes}", *settings)
    except asyncpg.PostgresError as exc:
        if sqlstate(exc) in (DUPLICATE_OBJECT, UNIQUE_VIOLATION):
            raise DatabaseExistsError(f"role {name!r} exists already, and is not adopted") from exc
        raise


async def drop_role(connection: Connection, name: str) -> None:
    """Drop a role whose database is gone already. Does nothing where the role is gone.

    Raises:
        asyncpg.DependentObjectsStillExistError: somebody gave it rights in a database that is still there (2BP01).
    """
    await connection.execute(f"DROP ROLE IF EXISTS {quote_identifier(name)}")


async def role_exists(connection: Connection, name: str) -> bool:
    """Whether there is a role of that name."""
    return await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", name) is not None


async def roles(connection: Connection, stem: str) -> dict[str, RoleState]:
    """Every role whose name begins with ``stem``, by its name."""
    rows = await connection.fetch(
        "SELECT rolname, rolcanlogin, rolconnlimit, "
        "EXISTS (SELECT FROM pg_stat_activity WHERE usesysid = pg_roles.oid) AS connected, "
        "coalesce(admitted.names, '{}') AS admitted_to FROM pg_roles LEFT JOIN ("
        "SELECT granted.grantee, array_agg(datname::text) AS names FROM pg_database, aclexplode(datacl) AS granted "
        "WHERE granted.privilege_type = 'CONNECT' GROUP BY 1) AS admitted ON admitted.grantee = oid "
        "WHERE starts_with(rolname::text, $1) ORDER BY rolname",
        stem,
    )
    return {
        row["rolname"]: RoleState(
            row["rolcanlogin"], row["rolconnlimit"], row["connected"], frozenset(row["admitted_to"])
        )
        for row in rows
    }


async def is_superuser(connection: Connection) -> bool:
    """Whether the connection's role is a superuser."""
    return bool(await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))


async def is_member(connection: Connection, name: str) -> bool:
    """Whether the administrator has the rights of role ``name`` and may SET ROLE to it."""
    can_set = "SET" if version(connection) >= 16 else "MEMBER"
    query = "SELECT pg_has_role(current_user, $1::name, 'USAGE') AND pg_has_role(current_user, $1::name, $2)"
    return bool(await connection.fetchval(query, name, can_set))


async def join_role(connection: Connection, name: str) -> None:
    """Make the administrator a member of ``name``, with its rights and able to SET ROLE to it. Superusers need not."""
    options = " WITH INHERIT TRUE, SET TRUE" if version(connection) >= 16 else ""
    await connection.execute(f"GRANT {quote_identifier(name)} TO CURRENT_USER{options}")


async def leave_role(connection: Connection, name: str) -> None:
    """Undo ``join_role``. The right to administer the role, which its creator has, is another grant and stays."""
    await connection.execute(f"REVOKE {quote_identifier(name)} FROM CURRENT_USER")


async def set_login(connection: Connection, name: str, allowed: bool) -> None:
    """Let a role log in, or refuse it. Its open connections stay, see ``terminate``.

    Raises:
        ProvisioningError: there is no such role.
    """
    await _alter_role(connection, name, "LOGIN" if allowed else "NOLOGIN")


async def set_password(connection: Connection, name: str, *, verifier: str) -> None:
    """Give a role another password. Its open connections stay.

    Args:
        connection: To any database of the server.
        name: The role.
        verifier: What ``scram_verifier`` made of the password.

    Raises:
        ProvisioningError: there is no such role.
    """
    await _alter_role(connection, name, f"PASSWORD {quote_literal(verifier)}")


async def set_connection_limit(connection: Connection, name: str, limit: int) -> None:
    """Set how many connections a role may have at once. Those it has stay.

    Raises:
        ProvisioningError: there is no such role.
    """
    await _alter_role(connection, name, f"CONNECTION LIMIT {int(limit)}")


async def _alter_role(connection: Connection, name: str, attributes: str) -> None:
    try:
        await connection.execute(f"ALTER ROLE {quote_identifier(name)} {attributes}")
    except asyncpg.UndefinedObjectError as exc:
        raise ProvisioningError(f"role {name!r} does not exist; run: tenancy reconcile") from exc


@asynccontextmanager
async def joined(connection: Connection, *names: str) -> AsyncIterator[None]:
    """Have the rights of roles while the body runs. Superusers have them anyway.

    An administrator who is not a superuser is a member of a tenant's role only while it needs to be: with thousands of
    memberships PostgreSQL would get slow for it.
    """
    wanted = () if await is_superuser(connection) else names
    try:
        for name in wanted:
            await join_role(connection, name)
        yield
    finally:
        for name in wanted:
            if not connection.is_closed():
                with suppress(asyncpg.UndefinedObjectError):  # dropped, or renamed, by the body
                    await leave_role(connection, name)


async def terminate(connection: Connection, role: str, *, timeout: float) -> None:
    """End every connection of ``role``, which may log in no more, and wait until they are gone.

    Raises:
        TimeoutError: some are still there after ``timeout`` seconds.
    """
    async with asyncio.timeout(timeout):
        # a login that was admitted just before appears among the connections a moment later: look again
        looks_left = 2
        while looks_left:
            looks_left = 2 if await end_connections(connection, role) else looks_left - 1
            if looks_left:
                await asyncio.sleep(POLL_SECONDS)


async def end_connections(connection: Connection, role: str, pids: Sequence[int] | None = None) -> bool:
    """End the connections that ``role`` has now, or some of them, and return whether there were any."""
    query = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE usename = $1 AND ($2::int[] IS NULL OR pid = ANY ($2))"
    )
    try:
        return bool(await connection.fetch(query, role, pids))
    except asyncpg.InsufficientPrivilegeError:
        try:
            async with joined(connection, role):
                return bool(await connection.fetch(query, role, pids))
        except asyncpg.PostgresError as exc:
            if sqlstate(exc) not in (INSUFFICIENT_PRIVILEGE, CONCURRENT_UPDATE):
                raise
            return True  # another administrator has just left the role: there may be some, look again


# --- rights inside a database ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contents:
    """The owner's schemas, tables, sequences and version tables in a database: quoted, ready for a GRANT."""

    schemas: tuple[str, ...]
    tables: tuple[str, ...]
    sequences: tuple[str, ...]
    version_tables: tuple[str, ...]


_CONTENTS = """
WITH owner AS (SELECT oid FROM pg_roles WHERE rolname = $1),
versions AS (SELECT attrelid FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped
              GROUP BY attrelid HAVING array_agg(attname::text) = ARRAY['version_num'])
SELECT 'schema' AS kind, quote_ident(nspname) AS name FROM pg_namespace
 WHERE nspname = 'public' OR nspowner = (TABLE owner)
UNION ALL
SELECT CASE WHEN relkind = 'S' THEN 'sequence' WHEN c.oid IN (TABLE versions) THEN 'version' ELSE 'table' END,
       quote_ident(nspname) || '.' || quote_ident(relname)
  FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
 WHERE relowner = (TABLE owner) AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
 ORDER BY 1, 2
"""


async def contents(connection: Connection, owner: str) -> Contents:
    """List what ``owner`` has in the database of ``connection``. What an extension brought is not the owner's.

    A version table can have any name (``version_table`` in env.py), but always the one column ``version_num``.
    """
    found: dict[str, list[str]] = {"schema": [], "table": [], "sequence": [], "version": []}
    for kind, name in await connection.fetch(_CONTENTS, owner):
        found[kind].append(name)
    return Contents(*(tuple(found[kind]) for kind in ("schema", "table", "sequence", "version")))


async def grant_and_mark(
    connection: Connection, name: str, *, role: str, what: Contents, marker: str, further: Sequence[str] = ()
) -> None:
    """Give ``role`` the data and nothing else, now and in whatever the owner makes later; and set the marker.

    One transaction: a database that has its marker has everything else as well, and one without it has never been a
    tenant's.

    Rights are the role's own rather than a group's, so that another tenant's role has none here even if it could
    connect. Alembic's version table can be read, not written. A table needs SELECT, INSERT, UPDATE and DELETE;
    TRUNCATE, REFERENCES and TRIGGER are left out. Sequences are needed whole, since loading rows sets them.

    Args:
        connection: To the tenant's database, as the owner.
        name: The tenant's database.
        role: The tenant's role.
        what: The database's contents.
        marker: What ``routing.marker`` will look for.
        further: Statements that give the role more, in the same transaction.
    """
    grantee = f"TO {quote_identifier(role)}"
    rows, counters = "SELECT, INSERT, UPDATE, DELETE", "USAGE, SELECT, UPDATE"
    statements = [
        f"ALTER DEFAULT PRIVILEGES GRANT USAGE ON SCHEMAS {grantee}",
        f"ALTER DEFAULT PRIVILEGES GRANT {rows} ON TABLES {grantee}",
        f"ALTER DEFAULT PRIVILEGES GRANT {counters} ON SEQUENCES {grantee}",
        *_grant("USAGE", "SCHEMA", what.schemas, grantee),
        *_grant(rows, "TABLE", what.tables, grantee),
        *_grant(counters, "SEQUENCE", what.sequences, grantee),
        *_grant("SELECT", "TABLE", what.version_tables, grantee),
        *further,
        f"COMMENT ON DATABASE {quote_identifier(name)} IS {quote_literal(marker)}",
    ]
    await connection.execute("; ".join(statements))


def _grant(rights: str, kind: str, names: Sequence[str], grantee: str) -> Iterable[str]:
    if names:
        yield f"GRANT {rights} ON {kind} {', '.join(names)} {grantee}"


async def revision(connection: Connection, owner: str) -> str | None:
    """Read the schema's revision from Alembic's version table, or None where the database has no such table."""
    for table in (await contents(connection, owner)).version_tables:
        found = await connection.fetch(f"SELECT version_num FROM {table} ORDER BY 1")  # noqa: S608 - quoted by PostgreSQL
        return ",".join(row["version_num"] for row in found) or None
    return None


async def protect_version_table(connection: Connection, role: str, table: str) -> None:
    """Leave ``role`` only SELECT on a version table that was made after the role's default privileges.

    Args:
        connection: To the tenant's database, as the owner.
        role: The tenant's role.
        table: The version table, quoted.
    """
    await connection.execute(f"REVOKE INSERT, UPDATE, DELETE ON TABLE {table} FROM {quote_identifier(role)}")


async def prepare_schema(connection: Connection, owner: str) -> None:
    """Make the owner, and not PUBLIC, master of schema ``public``, as PostgreSQL 15 and later have it by default.

    Args:
        connection: To a database under construction, as the administrator.
        owner: The owner of the database.

    Raises:
        asyncpg.InsufficientPrivilegeError: PostgreSQL 14, and the administrator is not a superuser.
    """
    if version(connection) < 15:
        await connection.execute(
            f"ALTER SCHEMA public OWNER TO {quote_identifier(owner)}; REVOKE CREATE ON SCHEMA public FROM PUBLIC"
        )


async def create_extension(connection: Connection, name: str) -> None:
    """Install an extension in the database of ``connection``."""
    await connection.execute(f"CREATE EXTENSION IF NOT EXISTS {quote_identifier(name)} SCHEMA public CASCADE")
