"""How many former databases can follow at once: each uses a worker on one server, and a slot on another.

PostgreSQL has 4 workers by default. A subscription without one follows nothing, while its slot keeps the log.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from ..cancellation import run_to_completion
from ..errors import OperationError, TenancyError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES

logger = logging.getLogger("tenancy_orm.moves")

# One of max_worker_processes launches the others. Before PostgreSQL 18, max_replication_slots also bounds the origins,
# of which each subscription has one.
_ROOM = """
SELECT least(current_setting('max_logical_replication_workers')::int, current_setting('max_worker_processes')::int - 1,
             coalesce(current_setting('max_active_replication_origins', true),
                      current_setting('max_replication_slots'))::int)
       - (SELECT count(*) FROM pg_subscription WHERE subenabled)::int AS workers,
       least(current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_replication_slots),
             current_setting('max_wal_senders')::int - (SELECT count(*) FROM pg_stat_replication))::int AS slots
"""


@dataclass(frozen=True, slots=True)
class Room:
    """What a server has left: for databases that follow others, and for slots by which others follow."""

    workers: int
    slots: int


async def look(connection: Connection) -> Room:
    """Return what is left on a server, at most: other extensions may take some of it.

    Args:
        connection: An administrative one to it.
    """
    row = await connection.fetchrow(_ROOM)
    return Room(max(row["workers"], 0), max(row["slots"], 0))


async def check_room(
    connect: Callable[[str], Awaitable[Connection]], planned: Iterable[tuple[str, str | None]]
) -> None:
    """Refuse more moves than former databases can follow. A server that does not answer is left to its own moves.

    Args:
        connect: Connects to a server, given by its name.
        planned: The moves: from which server, and to which one where that is known.

    Raises:
        OperationError: there are too many; the message says how many can be moved.
    """
    sources, targets = Counter[str](), Counter[str]()
    for source, target in planned:
        sources[source] += 1
        targets.update([] if target is None else [target])
    for name in sorted(sources | targets):
        try:
            connection = await connect(name)
            try:
                left = await look(connection)
            finally:
                await run_to_completion(connections.close(connection))
        except (TenancyError, *SERVER_FAILURES) as exc:
            # one that fails does not stop the others
            logger.warning("how many databases can follow on server %s is not known: %s", name, describe(exc))
            continue
        if sources[name] > left.workers:
            raise _too_many(
                name,
                f"has workers for {left.workers} more databases that follow their successors",
                sources[name],
                "max_logical_replication_workers, max_worker_processes and max_replication_slots, from PostgreSQL 18 "
                "on also max_active_replication_origins",
                left.workers,
            )
        if targets[name] > left.slots:
            what = f"has {left.slots} slots left by which former databases could follow"
            raise _too_many(name, what, targets[name], "max_replication_slots and max_wal_senders", left.slots)


def _too_many(server: str, what: str, planned: int, settings: str, most: int) -> OperationError:
    some = (
        f"move {most} at once and confirm them (tenancy rebalance --apply --limit {most})" if most else "confirm moves"
    )
    return OperationError(
        f"server {server!r} {what}, and {planned} moves are planned; raise {settings} there, {some}, or do without the "
        "way back: --no-way-back"
    )


__all__ = ["Room", "check_room", "look"]
