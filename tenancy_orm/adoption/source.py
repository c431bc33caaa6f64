"""Where an adoption reads from: a database of somebody else, by a login that the caller has.

It is only ever read: every connection has ``default_transaction_read_only``, and what belongs together is read in one
snapshot of a READ ONLY transaction. The URL's password is stored nowhere, and given to ``pg_dump`` as a variable.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import asyncpg

from ..cancellation import run_to_completion
from ..errors import AdoptionError, ConfigurationError
from ..postgres import connections, login
from ..postgres.connections import Connection
from ..postgres.dsn import Dsn
from ..postgres.failures import SERVER_FAILURES
from ..postgres.snapshots import LOCK_WAIT, begin_snapshot

_OLDEST = 12  # the oldest server that these queries, and pg_dump of today, read
_SETTINGS = {
    "default_transaction_read_only": "on",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "lock_timeout": LOCK_WAIT,
}
# what is read of the source, as far as this login may
_TABLES = """
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND NOT c.relispartition
   AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
   AND ($1::text IS NULL OR n.nspname = $1 OR n.nspname || '.' || c.relname = ANY($2::text[]))
   AND n.nspname || '.' || c.relname <> ALL($3::text[])
   AND pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
 ORDER BY 1
"""
_FACTS = """
SELECT pg_catalog.current_database()::text AS database, session_user::text AS role,
       pg_catalog.shobj_description(d.oid, 'pg_database') AS comment,
       pg_catalog.pg_encoding_to_char(d.encoding)::text AS encoding,
       pg_catalog.pg_database_size(d.oid) AS size,
       pg_catalog.to_regclass('tenancy.former_slugs') IS NOT NULL AS is_control
  FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is adopted: a whole database, or a schema of it.

    Attributes:
        dsn: Where it is, and who reads it.
        schema: The schema, by its name; None: the whole database.
        shared: Tables of other schemas that come along, as ``schema.table``.
        without: Tables that do not come along, as ``schema.table``.
        at: The revision that its schema has, where it has no version table of Alembic.
    """

    dsn: Dsn = field(repr=False)
    schema: str | None = None
    shared: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    at: str | None = None

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        schema: str | None = None,
        shared: Sequence[str] = (),
        without: Sequence[str] = (),
        at: str | None = None,
    ) -> Source:
        """Read the arguments of an adoption.

        Raises:
            ConfigurationError: the URL is malformed, or the other arguments do not fit together.
        """
        try:
            dsn = Dsn.parse(url)
        except ConfigurationError as exc:
            raise ConfigurationError(f"the source's URL {exc}") from exc
        if shared and schema is None:
            raise ConfigurationError("shared tables are copied with a schema: name it, or leave the tables out")
        if schema is not None and (schema.startswith("pg_") or schema == "information_schema"):
            raise ConfigurationError(f"{schema!r} is a schema of PostgreSQL itself")
        for name in (*shared, *without):
            # a schema may have points in its name, as those that are named as hosts have
            rest = "" if schema is None else name.removeprefix(f"{schema}.")
            if rest in ("", name) and (name.count(".") != 1 or not all(name.split("."))):
                raise ConfigurationError(f"a table is named as schema.table, not {name!r}")
        return cls(
            dsn=dsn,
            schema=schema,
            shared=tuple(dict.fromkeys(shared)),
            without=tuple(dict.fromkeys(without)),
            at=at,
        )

    def __str__(self) -> str:
        """Return host, port, database and schema, for messages."""
        return f"{self.dsn}" if self.schema is None else f"{self.dsn}, schema {self.schema}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSource:
    """A source with an open transaction: what is read over ``connection`` and ``environment`` is one snapshot.

    Attributes:
        source: What was asked for.
        connection: In a READ ONLY transaction.
        snapshot: Its exported snapshot.
        database: The database's name.
        role: Who reads.
        size: The database's size in bytes.
        encoding: The database's encoding.
        marker: The database's comment.
        version: The server's major version.
    """

    source: Source
    connection: Connection = field(repr=False)
    snapshot: str
    database: str
    role: str
    size: int
    encoding: str
    marker: str | None
    version: int

    def environment(self) -> dict[str, str]:
        """Return libpq's variables for ``pg_dump``, the password included. Whatever it runs is read-only."""
        dsn = self.source.dsn
        # the host that has the snapshot
        pinned = replace(dsn, hosts=(login.peer_of(self.connection),)) if dsn.hosts else dsn
        # its settings come after the options of its URL, and win
        pinned = replace(pinned, settings={**pinned.settings, **_SETTINGS})
        login.check(pinned, user=self.role, database=self.database)
        found = pinned.environment(user=self.role, database=self.database, purpose="tenancy-adopt")
        if dsn.password is not None:
            return {**found, "PGPASSWORD": dsn.password}
        # where the connection above has found its password
        given = {name: os.environ[name] for name in ("PGPASSWORD", "PGPASSFILE") if os.environ.get(name)}
        return {"PGPASSFILE": str(Path.home() / ".pgpass"), **given, **found}


@asynccontextmanager
async def open_source(source: Source, *, timeout: float) -> AsyncIterator[OpenSource]:
    """Connect, and begin a transaction that lasts for the body.

    Args:
        source: What to read.
        timeout: Seconds that connecting may take.

    Raises:
        AdoptionError: the server refuses or does not answer, is too old, or the database is one that is not adopted.
    """
    try:
        connection: Connection = await login.connect(
            source.dsn, purpose="tenancy-adopt", timeout=timeout, settings=_SETTINGS
        )
    except SERVER_FAILURES as exc:
        raise AdoptionError(f"the source {source.dsn} cannot be read: {login.reason_of(exc)}") from exc
    try:
        yield await _begin(source, connection)
    finally:
        await run_to_completion(connections.close(connection))


async def _begin(source: Source, connection: Connection) -> OpenSource:
    version = connections.version(connection)
    if version < _OLDEST:
        raise AdoptionError(
            f"the source {source.dsn} runs PostgreSQL {version}; {_OLDEST} is the oldest that is supported"
        )
    try:
        if version >= 17:
            await connection.execute("SET transaction_timeout = 0")
        await connection.execute("SET row_security = off; SET search_path = pg_catalog, pg_temp")
        await begin_snapshot(connection, partial(_tables, source))
        facts = await connection.fetchrow(_FACTS)
        snapshot = await connection.fetchval("SELECT pg_catalog.pg_export_snapshot()")
    except asyncpg.LockNotAvailableError as exc:
        raise AdoptionError(f"the source {source.dsn} cannot be read: {exc}") from exc
    except SERVER_FAILURES as exc:
        raise AdoptionError(f"the source {source.dsn} cannot be read: {login.reason_of(exc)}") from exc
    assert facts is not None  # noqa: S101 - the database exists, we are connected to it
    if facts["is_control"]:
        raise AdoptionError(f"{source.dsn} is a control database, not a tenant's database")
    return OpenSource(
        source=source,
        connection=connection,
        snapshot=snapshot,
        database=facts["database"],
        role=facts["role"],
        size=facts["size"],
        encoding=facts["encoding"],
        marker=facts["comment"],
        version=version,
    )


async def _tables(source: Source, connection: Connection) -> list[str]:
    rows = await connection.fetch(_TABLES, source.schema, list(source.shared), list(source.without))
    return [row["name"] for row in rows]


__all__ = ["OpenSource", "Source", "open_source"]
