"""One snapshot of a database. Nobody rewrites its tables while it is read.

A table that is truncated, or rewritten by an ALTER TABLE, has no rows for an older snapshot. So the tables are locked
before the snapshot is taken; ``pg_dump`` locks those that it reads after that. Nor can a table become a view then,
which would run code of its own as whoever reads it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import asyncpg

from .connections import Connection, finish

LOCK_WAIT = "10s"
"""How long a table's lock is waited for: a migration that has it is not queued behind for longer."""

_ATTEMPTS = 5

# a lock on a partitioned table is one on its partitions
_READABLE = """
SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND NOT c.relispartition
   AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
   AND pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
 ORDER BY 1
"""


async def begin_snapshot(
    connection: Connection,
    read_names: Callable[[Connection], Awaitable[Sequence[str]]],
    *,
    settings: Mapping[str, str] | None = None,
) -> asyncpg.transaction.Transaction:
    """Begin a read-only transaction of one snapshot, in which the tables stay as they are until it ends.

    Args:
        connection: A connection without a transaction.
        read_names: Reads which tables there are: their names, quoted, in one order. Read again in the snapshot.
        settings: What else is set for the transaction; each value as it is written in SET.

    Returns:
        The transaction. It has begun.

    Raises:
        asyncpg.LockNotAvailableError: somebody holds a lock on a table, or makes and drops tables all the time.
    """
    begin = [
        f"SET LOCAL {name} = {value}" for name, value in {**(settings or {}), "lock_timeout": f"'{LOCK_WAIT}'"}.items()
    ]
    for _ in range(_ATTEMPTS):
        names = await read_names(connection)
        transaction = connection.transaction(isolation="repeatable_read", readonly=True)
        await transaction.start()
        try:
            # neither these nor what came before takes the snapshot; the list that is read next does
            locking = [f"LOCK TABLE {', '.join(names)} IN ACCESS SHARE MODE"] if names else []
            await connection.execute("; ".join((*begin, *locking)))
            if await read_names(connection) == names:
                return transaction
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            pass  # it was dropped, or has another name now
        except asyncpg.LockNotAvailableError as exc:
            await finish(connection, transaction.rollback)
            raise asyncpg.LockNotAvailableError(
                f"a table was locked for more than {LOCK_WAIT}, by a migration for example; try again"
            ) from exc
        except BaseException:
            await finish(connection, transaction.rollback)
            raise
        await finish(connection, transaction.rollback)
    raise asyncpg.LockNotAvailableError("tables are made and dropped all the time; try again")


async def readable_tables(connection: Connection) -> list[str]:
    """Return the names of all tables that this login may read, quoted, for ``begin_snapshot``."""
    return [row["name"] for row in await connection.fetch(_READABLE)]


__all__ = ["LOCK_WAIT", "begin_snapshot", "readable_tables"]
