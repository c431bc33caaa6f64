"""Invalid indexes, which an interrupted CREATE INDEX CONCURRENTLY leaves behind.

PostgreSQL does not use such an index, but its name is taken: the repeated CREATE INDEX fails (42P07) or, with IF NOT
EXISTS, skips it, and the revision is recorded as done. So an invalid index is dropped right before a statement that
creates one of its name. All others keep their name and definition, and are built again in place after the migration:
wherever a run is killed, the next one finds what is left to do in the database itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import asyncpg

from ..errors import MigrationError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import UNIQUE_VIOLATION
from ..postgres.quoting import quote_qualified
from .failures import describe
from .logs import logger
from .statements import statements, tokens

# Those that a migration may have left and may mend. Partitioned indexes (relkind I) are invalid until every partition
# has its own, and those of TOAST tables are PostgreSQL's. The role may not change others' indexes.
_IS_INVALID = (
    "NOT i.indisvalid AND c.relkind = 'i' AND c.relpersistence <> 't' "
    "AND n.nspname NOT IN ('pg_catalog', 'pg_toast') AND pg_catalog.pg_has_role(current_user, c.relowner, 'USAGE') "
    "AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')"
)
_FROM_INDEXES = (
    "FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid "
    "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
)

HAS_INVALID_INDEXES = f"EXISTS (SELECT {_FROM_INDEXES} WHERE {_IS_INVALID})"
"""Whether there are any, as an expression for a SELECT."""

MAY_HAVE_INVALID_INDEXES = "EXISTS (SELECT FROM pg_catalog.pg_index WHERE NOT indisvalid)"
"""False where there are none of any kind: of one table, so that it costs a new session little to ask."""

# A session that builds or drops an index concurrently has locked its table for all that time. So has autovacuum, which
# is no user's, and which gives way.
_INVALID = f"""
SELECT n.nspname AS schema, c.relname AS name, t.relname AS table, tn.nspname AS table_schema, NOT i.indislive AS dead,
    EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhrelid = c.oid) AS attached,
    coalesce((SELECT contype = 'x' FROM pg_catalog.pg_constraint WHERE conindid = c.oid AND contype IN ('p', 'u', 'x')
              LIMIT 1), false) AS excludes,
    EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE conindid = c.oid AND contype IN ('p', 'u', 'x')) AS constrains,
    EXISTS (SELECT FROM pg_catalog.pg_locks l
            WHERE l.locktype = 'relation' AND l.relation = i.indrelid AND l.granted
                AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
                AND l.mode = 'ShareUpdateExclusiveLock' AND l.pid <> pg_catalog.pg_backend_pid()
                AND EXISTS (SELECT FROM pg_catalog.pg_stat_activity a WHERE a.pid = l.pid AND a.usesysid IS NOT NULL)
           ) AS busy
{_FROM_INDEXES}
JOIN pg_catalog.pg_class t ON t.oid = i.indrelid
JOIN pg_catalog.pg_namespace tn ON tn.oid = t.relnamespace
WHERE {_IS_INVALID}
ORDER BY 1, 2
"""  # noqa: S608 - constants

# The names of REINDEX CONCURRENTLY's unfinished indexes: the original of each exists.
_REINDEXED = re.compile(r"_cc(?:new|old)\d*$")

_NAME = r'(?:"(?:[^"]|"")+"|[^\W\d][\w$]*)'
_TABLE = rf"(?:IF EXISTS )?(?:ONLY )?(?P<table>{_NAME}(?: \. {_NAME})?)"
_CREATE_INDEX = re.compile(
    rf"CREATE (?:UNIQUE )?INDEX (?:CONCURRENTLY )?(?:IF NOT EXISTS )?(?P<name>{_NAME}) ON {_TABLE}", re.IGNORECASE
)
_ALTER_TABLE = re.compile(rf"ALTER TABLE {_TABLE}", re.IGNORECASE)
# one with USING INDEX takes an index that exists
_ADD_CONSTRAINT = re.compile(rf"ADD CONSTRAINT ({_NAME}) (?:UNIQUE|PRIMARY KEY|EXCLUDE)(?! USING INDEX)", re.IGNORECASE)

_SCHEMA_OF = (
    "SELECT n.nspname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
    "WHERE c.oid = pg_catalog.to_regclass($1)"
)


@dataclass(frozen=True, slots=True)
class InvalidIndex:
    """An invalid index of a table.

    ``dead`` says that its DROP INDEX CONCURRENTLY was interrupted, ``attached`` that it is a partition's part of a
    partitioned index, ``constrains`` that it belongs to a constraint, ``excludes`` to an exclusion constraint. ``busy``
    says that another session has the table's lock, with which indexes are built concurrently.
    """

    schema: str
    name: str
    table: str
    table_schema: str
    dead: bool
    attached: bool
    excludes: bool
    constrains: bool
    busy: bool

    @property
    def qualified(self) -> str:
        """The quoted name, with its schema."""
        return quote_qualified(self.schema, self.name)

    @property
    def qualified_table(self) -> str:
        """The quoted name of the table, with its schema."""
        return quote_qualified(self.table_schema, self.table)

    @property
    def is_remainder(self) -> bool:
        """Whether nothing is lost if it is dropped."""
        return (self.dead or _REINDEXED.search(self.name) is not None) and not (self.attached or self.constrains)


async def invalid_indexes(connection: Connection) -> list[InvalidIndex]:
    """Return the invalid indexes of the current database that the current role may mend."""
    return [InvalidIndex(**dict(row)) for row in await connection.fetch(_INVALID)]


# --- before a statement that creates an index -------------------------------------------------------------------------


def indexes_created(text: str) -> tuple[tuple[str, str], ...]:
    """Return the name and the table of each index that ``text`` creates: by CREATE INDEX, or with a constraint.

    The table is as it is written, with or without a schema.
    """
    found = []
    for statement in statements(text):
        if statement.words[:1] not in (["CREATE"], ["ALTER"]):
            continue
        sql = text[statement.start : statement.end]
        # without comments, and with one space between tokens
        normal = " ".join(sql[start:end] for _, start, end in tokens(sql))
        if match := _CREATE_INDEX.match(normal):
            found.append((_plain(match["name"]), match["table"].replace(" . ", ".")))
        elif match := _ALTER_TABLE.match(normal):
            table = match["table"].replace(" . ", ".")
            found += [(_plain(name), table) for name in _ADD_CONSTRAINT.findall(normal, match.end())]
    return tuple(found)


def _plain(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name.lower()


async def make_room(connection: Connection, created: Iterable[tuple[str, str]]) -> None:
    """Drop the invalid indexes that have the names of those to be created (from ``indexes_created``).

    One that another session is building is waited for.

    Raises:
        asyncpg.PostgresError: a table stayed locked for longer than lock_timeout (55P03).
    """
    wanted = {(await connection.fetchval(_SCHEMA_OF, table), name) for name, table in created}
    concurrently = "" if connection.is_in_transaction() else "CONCURRENTLY "
    for index in await invalid_indexes(connection):
        if (index.schema, index.name) not in wanted or index.attached or index.constrains:
            continue
        # wait for a session that builds an index on this table: it has the same lock, which conflicts with itself
        async with connections.transaction(connection):
            await connection.execute(f"LOCK TABLE {index.qualified_table} IN SHARE UPDATE EXCLUSIVE MODE")
        if index.qualified in {found.qualified for found in await invalid_indexes(connection)}:
            await connection.execute(f"DROP INDEX {concurrently}IF EXISTS {index.qualified}")
            logger.warning("dropped the invalid index %s of an interrupted CREATE INDEX CONCURRENTLY", index.qualified)


# --- after the migration ----------------------------------------------------------------------------------------------


async def repair(connection: Connection) -> None:
    """Build invalid indexes again, in place, and drop what interrupted statements have left of others.

    An index that another session seems to be building or dropping is left to it.

    Raises:
        MigrationError: an index cannot be built: a unique one over rows that are not unique, for example.
        asyncpg.PostgresError: a wait for a lock took longer than lock_timeout (55P03).
    """
    failures = []
    # whatever statement_timeout is: an index is not built by halves
    await connection.execute("SET statement_timeout = 0")
    try:
        for index in sorted(await invalid_indexes(connection), key=lambda found: not found.is_remainder):
            if index.busy:
                logger.info("the invalid index %s is left to the session that has locked its table", index.qualified)
            elif index.is_remainder:
                await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {index.qualified}")
                logger.warning("dropped the remainder %s of an interrupted statement", index.qualified)
            elif (error := await _rebuild(connection, index)) is not None:
                failures.append(error)
    finally:
        if not connection.is_closed():
            await connection.execute("RESET statement_timeout")
    if failures:
        raise MigrationError(f"its revision is reached, but {'; '.join(map(_line, failures))}") from failures[0][1]


async def _rebuild(connection: Connection, index: InvalidIndex) -> tuple[InvalidIndex, asyncpg.PostgresError] | None:
    # PostgreSQL rebuilds the index of an exclusion constraint under an exclusive lock only
    concurrently = "" if index.excludes else "CONCURRENTLY "
    try:
        await connection.execute(f"REINDEX INDEX {concurrently}{index.qualified}")
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as exc:
        for left in await invalid_indexes(connection):
            if left.is_remainder and left.table == index.table and left.table_schema == index.table_schema:
                await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {left.qualified}")
        return index, exc
    logger.warning("built the invalid index %s again", index.qualified)
    return None


def _line(failure: tuple[InvalidIndex, asyncpg.PostgresError]) -> str:
    index, error = failure
    remedy = "; remove the duplicates, and run this again" if error.sqlstate == UNIQUE_VIOLATION else ""
    return f"the invalid index {index.qualified} cannot be built: {describe(error)}{remedy}"
