"""One snapshot of a tenant's database, whose tables nobody rewrites while it is read.

A table that is truncated, or rewritten by an ALTER TABLE, has no rows for an older snapshot. So the tables are locked
before the snapshot is taken, as ``pg_dump`` locks those that it reads. Nor can a table become a view then, which would
run code of its own as whoever reads it.
"""

from __future__ import annotations

import asyncpg

from ..errors import OperationError
from ..postgres.connections import Connection
from ..postgres.quoting import quote_identifier
from .plan import read_tables

LOCK_WAIT = "10s"
_ATTEMPTS = 5


async def begin_snapshot(connection: Connection) -> None:
    """Begin a read-only transaction of one snapshot, in which the tables stay as they are until it ends.

    Raises:
        OperationError: somebody holds a lock on a table, or makes and drops tables all the time.
    """
    for _ in range(_ATTEMPTS):
        tables = await read_tables(connection)
        listed = ", ".join(
            f"ONLY {quote_identifier(row['schema'])}.{quote_identifier(row['name'])}" for row in tables.values()
        )
        transaction = connection.transaction(isolation="repeatable_read", readonly=True)
        await transaction.start()
        try:
            await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_WAIT}'")
            if listed:
                # neither this nor what came before takes the snapshot
                await connection.execute(f"LOCK TABLE {listed} IN ACCESS SHARE MODE")
            if (await read_tables(connection)).keys() == tables.keys():
                return
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            pass  # it was dropped, or has another name now
        except asyncpg.LockNotAvailableError as exc:
            raise OperationError(
                f"a table was locked for more than {LOCK_WAIT}, by a migration for example; try again"
            ) from exc
        await transaction.rollback()
    raise OperationError("tables are made and dropped all the time; try again")


__all__ = ["LOCK_WAIT", "begin_snapshot"]
