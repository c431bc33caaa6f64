"""Statements on databases, one function each, on an administrative asyncpg connection.

Identifiers are quoted by ``quote_identifier``; DDL takes no parameters, so constants are quoted by ``quote_literal``.
Errors are classified by SQLSTATE. An existing database is never adopted: creating over one raises
``DatabaseExistsError``. Dropping is idempotent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import asyncpg

from ...errors import DatabaseExistsError
from ...postgres.connections import Connection, execute_unflushed, version
from ...postgres.errors import DUPLICATE_DATABASE, UNIQUE_VIOLATION, sqlstate_of
from ...postgres.quoting import quote_identifier, quote_literal

Strategy = Literal["wal_log", "file_copy"]
"""How CREATE DATABASE copies: through the WAL (20 ms, best for a caller who waits) or by files (70 ms and two
checkpoints, but twice as many databases a second when thousands are created in a row)."""


# of a locale, of an encoding that does not go with it, of a provider, of one that was not built in, of an option
_NO_LOCALE = frozenset({"42809", "22023", "42P17", "0A000", "42601"})


class LocaleMissingError(Exception):
    """A server does not have a locale; its text is the locale."""


@dataclass(frozen=True, slots=True)
class DatabaseState:
    """A database's row in ``pg_database``. ``comment`` is its marker, if it has one."""

    name: str
    is_template: bool
    comment: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Locale:
    """How a database sorts and compares texts, by the columns of ``pg_database``.

    Attributes:
        provider: "libc", "icu" (PostgreSQL 15 and later) or "builtin" (17 and later).
        collate: The C library's locale for the order of texts.
        ctype: The C library's locale for kinds of characters.
        name: The locale of another provider than "libc".
        rules: Further rules of ICU (16 and later).
    """

    provider: str
    collate: str
    ctype: str
    name: str | None = None
    rules: str | None = None

    def __str__(self) -> str:
        """Return the provider and its locale, for messages."""
        own = self.collate if self.collate == self.ctype else f"{self.collate}, {self.ctype}"
        return f"{self.provider} {self.name or own!r}"

    def options(self, version: int) -> list[str]:
        """Return the options of CREATE DATABASE on a server of this major version."""
        found = [f"LC_COLLATE {quote_literal(self.collate)}", f"LC_CTYPE {quote_literal(self.ctype)}"]
        if version >= 15:
            found.append(f"LOCALE_PROVIDER {self.provider}")
        if self.name is not None:
            option = "BUILTIN_LOCALE" if self.provider == "builtin" else "ICU_LOCALE"
            found.append(f"{option} {quote_literal(self.name)}")
        if self.rules is not None:
            found.append(f"ICU_RULES {quote_literal(self.rules)}")
        return found


async def create(
    connection: Connection,
    name: str,
    *,
    template: str,
    owner: str,
    strategy: Strategy = "wal_log",
    open_to_connections: bool = True,
    locale: Locale | None = None,
) -> None:
    """Create a database as a clone of ``template``. It cannot run in a transaction (25001).

    Args:
        connection: To any database of the server except the template.
        name: The new database.
        template: The database to clone.
        owner: Its owner.
        strategy: See ``Strategy``. PostgreSQL 14 has FILE_COPY only.
        open_to_connections: False lets nobody connect before ``open_to_role``. PUBLIC may CONNECT to every new
            database, and a connection made before the REVOKE would outlive it.
        locale: Its locale, where ``template`` is template0; that of the template where None.

    Raises:
        DatabaseExistsError: a database of that name exists.
        LocaleMissingError: the server does not have the locale.
        asyncpg.ObjectInUseError: somebody is connected to the template.
        asyncpg.InvalidCatalogNameError: there is no such template.
    """
    options = [f"TEMPLATE {quote_identifier(template)}", f"OWNER {quote_identifier(owner)}"]
    if template == "template0":
        # the only template that may be cloned with another encoding than its own
        options.append("ENCODING 'UTF8'")
        options += [] if locale is None else locale.options(version(connection))
    if not open_to_connections:
        options.append("ALLOW_CONNECTIONS false")
    if version(connection) >= 15:
        options.append(f"STRATEGY {strategy}")
    try:
        await connection.execute(f"CREATE DATABASE {quote_identifier(name)} WITH {' '.join(options)}")
    except asyncpg.PostgresError as exc:
        if sqlstate_of(exc) in (DUPLICATE_DATABASE, UNIQUE_VIOLATION):
            raise DatabaseExistsError(f"database {name!r} exists already, and is not adopted") from exc
        if locale is not None and sqlstate_of(exc) in _NO_LOCALE:
            raise LocaleMissingError(str(locale)) from exc
        raise


async def drop(connection: Connection, name: str) -> None:
    """Drop a database or template, and end the connections to it. Does nothing if there is none.

    Raises:
        asyncpg.ObjectInUseError: it has a prepared transaction, replication slot or subscription (55006): see
            ``removal.drop_database``.
    """
    quoted = quote_identifier(name)
    try:
        if await connection.fetchval("SELECT datistemplate FROM pg_database WHERE datname = $1", name):
            await connection.execute(f"ALTER DATABASE {quoted} WITH IS_TEMPLATE false")
        await connection.execute(f"DROP DATABASE IF EXISTS {quoted} WITH (FORCE)")
    except asyncpg.InvalidCatalogNameError:  # 3D000
        return


async def state(connection: Connection, name: str) -> DatabaseState | None:
    """Return the state of a database, or None if there is no such database."""
    row = await connection.fetchrow(
        "SELECT datname, datistemplate, shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", name
    )
    return None if row is None else DatabaseState(*row)


async def states(connection: Connection, stem: str) -> list[DatabaseState]:
    """Return the state of every database with a name that begins with ``stem``."""
    rows = await connection.fetch(
        "SELECT datname, datistemplate, shobj_description(oid, 'pg_database') FROM pg_database "
        "WHERE starts_with(datname::text, $1) ORDER BY datname",
        stem,
    )
    return [DatabaseState(*row) for row in rows]


async def open_to_role(connection: Connection, name: str, *, role: str) -> None:
    """Let only the tenant's role connect to a new database, in one transaction.

    A revoke on a template is not copied to its clones, so each database needs its own. The commit is not flushed to
    disk: the next synchronous one on this server, that of ``grant_and_mark``, does that.
    """
    database, quoted_role = quote_identifier(name), quote_identifier(role)
    await execute_unflushed(
        connection,
        f"REVOKE ALL ON DATABASE {database} FROM PUBLIC",
        f"GRANT CONNECT ON DATABASE {database} TO {quoted_role}",
        f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS true",
    )


async def open_to_owner(connection: Connection, name: str) -> None:
    """Let only the owner and the administrator connect to a new database, in one transaction."""
    database = quote_identifier(name)
    await execute_unflushed(
        connection,
        f"REVOKE ALL ON DATABASE {database} FROM PUBLIC",
        f"ALTER DATABASE {database} WITH ALLOW_CONNECTIONS true",
    )


async def seal(connection: Connection, name: str) -> None:
    """Let nobody connect to a database. Its open connections stay."""
    await connection.execute(f"ALTER DATABASE {quote_identifier(name)} WITH ALLOW_CONNECTIONS false")


async def set_marker(connection: Connection, name: str, text: str) -> None:
    """Give a database another marker."""
    await connection.execute(f"COMMENT ON DATABASE {quote_identifier(name)} IS {quote_literal(text)}")


async def close_to_public(connection: Connection, name: str, *, but: Iterable[str] = ()) -> None:
    """Revoke every right on a database from PUBLIC, which has CONNECT and TEMP on every database by default.

    Args:
        connection: To any database of the server.
        name: The database.
        but: Roles that are granted these rights, in the same transaction.

    Raises:
        asyncpg.InsufficientPrivilegeError: the administrator has no rights on the database at all. If it has some, but
            not that to revoke, PostgreSQL only warns, and ``is_open_to_public`` stays true.
    """
    await connection.execute("; ".join(closing_statements(name, but=but)))


def closing_statements(name: str, *, but: Iterable[str] = ()) -> list[str]:
    """Return the statements of ``close_to_public``."""
    database = quote_identifier(name)
    kept = [f"GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {quote_identifier(role)}" for role in but]
    return [*kept, f"REVOKE ALL ON DATABASE {database} FROM PUBLIC"]


async def is_open_to_public(connection: Connection, name: str) -> bool:
    """Whether PUBLIC has any right on a database. False if there is no such database."""
    query = (
        "SELECT EXISTS (SELECT FROM pg_database, aclexplode(coalesce(datacl, acldefault('d', datdba))) AS granted "
        "WHERE datname = $1 AND granted.grantee = 0)"
    )
    return bool(await connection.fetchval(query, name))


async def sizes(connection: Connection, names: Sequence[str]) -> dict[str, int]:
    """Return the sizes of databases in bytes, by name; without those that this administrator may not ask for."""
    rows = await connection.fetch(
        "SELECT datname::text AS name, pg_database_size(oid) AS size FROM pg_database "
        "WHERE datname::text = ANY($1::text[]) AND has_database_privilege(oid, 'CONNECT')",
        list(names),
    )
    return {row["name"]: row["size"] for row in rows}


async def complete_template(connection: Connection, name: str, *, comment: str) -> None:
    """Mark a template as complete; the last statement on it.

    Nobody can connect to it afterwards, since an open connection makes cloning fail (55006, after 5 s).
    """
    quoted = quote_identifier(name)
    await connection.execute(
        f"COMMENT ON DATABASE {quoted} IS {quote_literal(comment)}; "
        f"ALTER DATABASE {quoted} WITH IS_TEMPLATE true ALLOW_CONNECTIONS false"
    )
