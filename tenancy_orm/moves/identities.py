"""Replica identities: by which columns PostgreSQL finds a row of a table that is replicated."""

from __future__ import annotations

from collections.abc import Mapping

from ..cancellation import run_to_completion
from ..postgres import connections
from ..tenant import Placement
from .record import MoveRecord

# "i" had none either: its index was dropped
_KINDS = {"d": "DEFAULT", "n": "NOTHING", "i": "NOTHING"}


async def use_all_columns(move: MoveRecord, tables: Mapping[str, str]) -> None:
    """Let PostgreSQL tell rows of tables without a primary key apart by all their columns, in the old database.

    Args:
        move: The move.
        tables: The tables, quoted, with the identities that they have.
    """
    await _alter(move, move.old, dict.fromkeys(tables, "FULL"))


async def put_back(move: MoveRecord, place: Placement) -> None:
    """Undo that in one of the databases, by what the move's record says."""
    await _alter(move, place, {table: _KINDS[identity] for table, identity in move.identities.items()})


async def _alter(move: MoveRecord, place: Placement, identities: Mapping[str, str]) -> None:
    if not identities or place.server not in move.provisioning.servers:
        return
    connection = await move.forward.connect(place, role=move.provisioning.names.owner)
    blockers = move.provisioning.blockers(move.provisioning.servers[place.server])
    try:
        for table, identity in identities.items():
            statement = f"ALTER TABLE {table} REPLICA IDENTITY {identity}"

            async def alter(statement: str = statement) -> None:
                async with connections.transaction(connection):
                    await connection.execute("SET LOCAL lock_timeout = '2s'")
                    await connection.execute(statement)

            await blockers.run(connection, alter)
    finally:
        await run_to_completion(connections.close(connection))


__all__ = ["put_back", "use_all_columns"]
