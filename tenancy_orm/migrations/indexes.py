"""Invalid indexes, which an interrupted CREATE INDEX CONCURRENTLY leaves behind.

PostgreSQL does not use such an index, but its name is taken. The migration that creates it fails at the second attempt
(42P07), or, with IF NOT EXISTS, skips it and is recorded as done. So invalid indexes are dropped before a migration
runs. Those that the migration does not create itself are built again after it, from the definition read before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.quoting import quote_identifier
from .logs import logger

# partitioned indexes (relkind I) are invalid until every partition has its own; the role may not drop others' indexes
_INVALID = """
SELECT n.nspname AS schema, c.relname AS name, t.relname AS table, pg_get_indexdef(i.indexrelid) AS definition
FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
JOIN pg_catalog.pg_class t ON t.oid = i.indrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE NOT i.indisvalid AND c.relkind = 'i' AND n.nspname NOT IN ('pg_catalog', 'pg_toast')
    AND pg_catalog.pg_has_role(current_user, c.relowner, 'USAGE')
ORDER BY 1, 2
"""

_EXISTS = """
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = $2)
"""

# the names of REINDEX CONCURRENTLY's unfinished indexes; the originals still exist, so these are not built again
_REINDEXED = re.compile(r"_cc(?:new|old)\d*$")
_CREATE = re.compile(r"^CREATE (UNIQUE )?INDEX ")


@dataclass(frozen=True, slots=True)
class InvalidIndex:
    """An invalid index, with the definition to build it again."""

    schema: str
    name: str
    table: str
    definition: str

    @property
    def qualified(self) -> str:
        """The quoted name, with its schema."""
        return f"{quote_identifier(self.schema)}.{quote_identifier(self.name)}"

    @property
    def qualified_table(self) -> str:
        """The quoted name of the table, with its schema."""
        return f"{quote_identifier(self.schema)}.{quote_identifier(self.table)}"


async def invalid_indexes(connection: Connection) -> list[InvalidIndex]:
    """Return the invalid indexes of the current database that the current role may drop."""
    return [InvalidIndex(**dict(row)) for row in await connection.fetch(_INVALID)]


async def drop_invalid(connection: Connection) -> list[InvalidIndex]:
    """Drop the invalid indexes and return them. An index that another session is building is left alone.

    Raises:
        asyncpg.PostgresError: a table stayed locked for longer than lock_timeout (55P03).
    """
    dropped = []
    for index in await invalid_indexes(connection):
        # wait for sessions that build an index on this table: they take the same lock, which conflicts with itself
        async with connections.transaction(connection):
            await connection.execute(f"LOCK TABLE {index.qualified_table} IN SHARE UPDATE EXCLUSIVE MODE")
        if index in await invalid_indexes(connection):
            await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {index.qualified}")
            logger.warning("dropped the invalid index %s of an interrupted CREATE INDEX CONCURRENTLY", index.qualified)
            dropped.append(index)
    return dropped


async def build_missing(connection: Connection, dropped: list[InvalidIndex]) -> None:
    """Build those of the ``dropped`` indexes that the migration did not create itself.

    Raises:
        asyncpg.PostgresError: an index cannot be built (a unique one over duplicates, for example).
    """
    for index in dropped:
        if _REINDEXED.search(index.name) or await connection.fetchval(_EXISTS, index.schema, index.name):
            continue
        if not await connection.fetchval(_EXISTS, index.schema, index.table):
            continue  # the migration dropped its table
        statement = _CREATE.sub(lambda match: f"CREATE {match[1] or ''}INDEX CONCURRENTLY ", index.definition)
        await connection.execute(statement)
        logger.warning("built the index %s again", index.qualified)
