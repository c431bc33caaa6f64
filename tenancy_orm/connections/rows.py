"""The leases in the control database: which process may have how many connections of which server, and until when.

Every time is the control database's own, so the clocks of the processes need not agree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..control.notifications import CONNECTIONS_CHANNEL, LeaseCall
from .shares import Claim, cap_of

LEASE_SECONDS = 8.0
"""For how long a process has what it was granted without renewing it."""

ENDING_SECONDS = 15.0
"""For how long nobody else ends a lost process's connections after one has begun to."""

# Or further away than a renewal can have put it: the clock was set back since then.
_IS_EXPIRED = f"NOT expires_at BETWEEN clock_timestamp() AND clock_timestamp() + interval '{LEASE_SECONDS + 1} s'"

_MOST_CALLED = 400  # a notification holds 8,000 bytes

# A process may be stopped in a transaction: PostgreSQL ends it, and its locks with it. Said by the statement that takes
# the first lock, so that it costs no round trip.
_LOCK = text(
    "SELECT set_config('idle_in_transaction_session_timeout', '1500ms', true) FROM tenancy.connection_caps "
    "WHERE server = :server FOR UPDATE"
)
# Numbers are bound as text[], a type that asyncpg knows: for integer[] each connection would ask the server first, and
# that takes longer than all the rest.

# in one order, so that two processes that open do not wait for each other
_SAVE_CAPS = text(
    "INSERT INTO tenancy.connection_caps AS c (server, accepted) "
    "SELECT * FROM unnest(CAST(:servers AS text[]), CAST(:accepted AS text[])::integer[]) AS s (server, accepted) "
    "ORDER BY 1 ON CONFLICT (server) DO UPDATE SET accepted = coalesce(excluded.accepted, c.accepted) "
    "RETURNING set_config('idle_in_transaction_session_timeout', '1500ms', true)"
)
_READ = text(
    "SELECT c.server, c.accepted, c.others, s.max_connections, s.max_opening, "  # noqa: S608 - a constant of this module
    "coalesce(abs(extract(epoch FROM clock_timestamp() - c.counted_at)), 'infinity')::float8 AS counted_ago, "
    "extract(epoch FROM clock_timestamp())::float8 AS now, "
    "l.process, l.host, l.pid, l.granted, l.guaranteed, l.wanted, l.in_use, "
    f"{_IS_EXPIRED} AS is_expired, l.ending_at IS NOT NULL AS is_ending "
    "FROM tenancy.connection_caps AS c LEFT JOIN tenancy.servers AS s ON s.name = c.server "
    "LEFT JOIN tenancy.connection_leases AS l ON l.server = c.server "
    "WHERE c.server = ANY(CAST(:servers AS text[])) ORDER BY c.server, l.started_at, l.process"
)
_ADD = text(
    "INSERT INTO tenancy.connection_leases "
    "(server, process, host, pid, granted, guaranteed, wanted, in_use, expires_at) "
    "SELECT l.server, l.process, :host, CAST(:pid AS integer), l.granted, l.guaranteed, l.wanted, 0, "
    "clock_timestamp() + make_interval(secs => :seconds) FROM unnest(CAST(:servers AS text[]), "
    "CAST(:processes AS text[])::uuid[], CAST(:granted AS text[])::integer[], "
    "CAST(:guaranteed AS text[])::integer[], CAST(:wanted AS text[])::integer[]) "
    "AS l (server, process, granted, guaranteed, wanted) "
    # it is there already where the answer to a former attempt was lost; one that is being ended must not come back
    "ON CONFLICT ON CONSTRAINT connection_leases_pkey DO UPDATE SET granted = excluded.granted, "
    "guaranteed = excluded.guaranteed, wanted = excluded.wanted, in_use = 0, expires_at = excluded.expires_at "
    "WHERE connection_leases.ending_at IS NULL RETURNING server"
)
_RENEW = text(
    "UPDATE tenancy.connection_leases AS l SET guaranteed = v.guaranteed, wanted = v.wanted, in_use = v.in_use, "
    "expires_at = clock_timestamp() + make_interval(secs => :seconds) "
    "FROM unnest(CAST(:servers AS text[]), CAST(:processes AS text[])::uuid[], "
    "CAST(:guaranteed AS text[])::integer[], CAST(:wanted AS text[])::integer[], CAST(:in_use AS text[])::integer[]) "
    "AS v (server, process, guaranteed, wanted, in_use) "
    "WHERE l.server = v.server AND l.process = v.process AND l.ending_at IS NULL "
    "RETURNING l.server, set_config('idle_in_transaction_session_timeout', '1500ms', true)"
)
_GRANT = text(
    "UPDATE tenancy.connection_leases SET granted = :granted, guaranteed = :guaranteed, wanted = :wanted, "
    "in_use = :in_use, expires_at = clock_timestamp() + make_interval(secs => :seconds) "
    # another process may have begun to end its connections since the row was read
    "WHERE server = :server AND process = :process AND ending_at IS NULL RETURNING true"
)
_COUNTED = text(
    # of fewer than before, half is believed each time: what was there a moment ago comes back
    "UPDATE tenancy.connection_caps SET accepted = :accepted, "
    "others = greatest(CAST(:others AS integer), (coalesce(others, 0) + CAST(:others AS integer)) / 2), "
    "counted_at = clock_timestamp() WHERE server = :server"
)
_GRANTED = text(
    "SELECT server = :server AS is_here, left(replace(process::text, '-', ''), 12) AS tag, granted "
    "FROM tenancy.connection_leases"
)
_CLAIM_COUNT = text(
    "UPDATE tenancy.connection_caps SET counted_at = clock_timestamp() WHERE server = :server "
    "AND (counted_at BETWEEN clock_timestamp() - make_interval(secs => :seconds) AND clock_timestamp()) IS NOT TRUE "
    "RETURNING true"
)
_BEGIN_END = text(
    "UPDATE tenancy.connection_leases SET ending_at = clock_timestamp() WHERE server = :server "  # noqa: S608 - the same
    f"AND process = :process AND {_IS_EXPIRED} "
    "AND (ending_at IS NULL OR ending_at < clock_timestamp() - make_interval(secs => :seconds)) RETURNING true"
)
_KEEP_GUARANTEED = text(
    "UPDATE tenancy.connection_leases SET granted = least(granted, guaranteed) WHERE server = :server "  # noqa: S608
    f"AND process = :process AND {_IS_EXPIRED} AND ending_at IS NULL RETURNING granted"
)
_REMOVE = text(
    "DELETE FROM tenancy.connection_leases WHERE server = :server AND process = :process AND ending_at IS NOT NULL"
)
# one statement, since it is the last thing that a process does; those who miss connections learn of it
_CLOSE = text(
    "WITH gone AS (DELETE FROM tenancy.connection_leases WHERE process = ANY(CAST(:processes AS text[])::uuid[]) "
    "RETURNING server, process, granted), "
    "missed AS (SELECT l.server, json_agg(left(replace(l.process::text, '-', ''), 12)) AS called "
    "FROM tenancy.connection_leases AS l JOIN gone AS g ON g.server = l.server AND g.granted > 0 "
    "WHERE l.granted < l.wanted AND l.process <> g.process GROUP BY 1) "
    "SELECT pg_notify(:channel, json_build_object('s', server, 'l', called)::text) FROM missed"
)
_NOTIFY = text("SELECT pg_notify(:channel, :payload)")
# A process that goes on renews its lease of a removed server as well: a lease that disappears would say to it that
# others are ending all its connections. A replica has the name of its server and a number, eu/1.
_SERVERS = text(
    "SELECT server FROM tenancy.connection_caps "
    "WHERE split_part(server, '/', 1) IN (SELECT name FROM tenancy.servers) ORDER BY 1"
)
_FORGET_LEASES = text(
    "DELETE FROM tenancy.connection_leases WHERE split_part(server, '/', 1) = :server "
    "AND expires_at < clock_timestamp()"
)
_FORGET_CAPS = text(
    "DELETE FROM tenancy.connection_caps AS c WHERE split_part(server, '/', 1) = :server "
    "AND NOT EXISTS (SELECT FROM tenancy.connection_leases AS l WHERE l.server = c.server)"
)


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """A process's lease of connections of one server.

    Attributes:
        process: The id of the process, another one on each server. Its connections have the first part of it in their
            ``application_name``.
        host: The name of its machine.
        pid: Its process id there.
        granted: How many connections it may have.
        guaranteed: How many of them it keeps while it cannot reach the control database.
        wanted: How many it needed when it last renewed its lease.
        in_use: How many were in use then.
        is_expired: Whether it has not renewed its lease in time.
        is_ending: Whether another process is ending its connections.
    """

    process: UUID
    host: str
    pid: int
    granted: int
    guaranteed: int
    wanted: int
    in_use: int
    is_expired: bool
    is_ending: bool

    @property
    def state(self) -> str:
        """What it is: active, lost where it did not renew its lease in time, ending while its connections are ended."""
        return "ending" if self.is_ending else "lost" if self.is_expired else "active"

    @property
    def borrowed(self) -> int:
        """How many it has beyond its guaranteed part."""
        return max(0, self.granted - self.guaranteed)


@dataclass(frozen=True, slots=True)
class ServerLeases:
    """The connections of one server, and which processes have how many.

    Attributes:
        server: Its name.
        cap: How many all processes together may have.
        is_configured: Whether the server's row says that; otherwise it is what the server says and others leave.
        max_opening: How many may be opened at once, by all processes together; None is no bound.
        accepted: How many the server accepts, less those that it reserves, if it has ever said so.
        others: How many connections others had when they were last counted, if they were.
        counted_ago: Seconds since then.
        now: The time by the control database's clock, in seconds, when this was read.
        leases: Those of the processes, the oldest first.
    """

    server: str
    cap: int
    is_configured: bool
    max_opening: int | None
    accepted: int | None
    others: int | None
    counted_ago: float
    now: float
    leases: tuple[LeaseRow, ...]

    @property
    def guaranteed(self) -> int:
        """The guaranteed part of each process."""
        return self.cap // max(1, len(self.leases))

    @property
    def claims(self) -> list[Claim]:
        """What the processes have and want; one that is lost can use no more than it has."""
        return [
            Claim(lease.granted, min(lease.wanted, lease.granted) if lease.is_expired else lease.wanted)
            for lease in self.leases
        ]

    def position(self, process: UUID) -> int | None:
        """The position of a process's lease, unless it has none that it can renew."""
        for position, lease in enumerate(self.leases):
            if lease.process == process and not lease.is_ending:
                return position
        return None


async def save_caps(connection: AsyncConnection, accepted: Mapping[str, int | None]) -> None:
    """Insert the rows of these servers or update what they accept, and lock them until the transaction ends."""
    numbers = [None if number is None else str(number) for number in accepted.values()]
    await connection.execute(_SAVE_CAPS, {"servers": list(accepted), "accepted": numbers})


async def lock_cap(connection: AsyncConnection, server: str) -> None:
    """Let no other process change who has how many connections of a server until the transaction ends."""
    await connection.execute(_LOCK, {"server": server})


async def read(connection: AsyncConnection, servers: Collection[str]) -> dict[str, ServerLeases]:
    """Return the leases of these servers, by name."""
    found: dict[str, list[Any]] = {}
    for row in await connection.execute(_READ, {"servers": list(servers)}):
        found.setdefault(row.server, []).append(row)
    return {server: _server_leases(rows) for server, rows in found.items()}


def _server_leases(rows: Sequence[Any]) -> ServerLeases:
    first = rows[0]
    return ServerLeases(
        server=first.server,
        cap=cap_of(first.accepted, first.others, first.max_connections),
        is_configured=first.max_connections is not None,
        max_opening=first.max_opening,
        accepted=first.accepted,
        others=first.others,
        counted_ago=first.counted_ago,
        now=first.now,
        leases=tuple(
            LeaseRow(
                process=row.process,
                host=row.host,
                pid=row.pid,
                granted=row.granted,
                guaranteed=row.guaranteed,
                wanted=row.wanted,
                in_use=row.in_use,
                is_expired=row.is_expired,
                is_ending=row.is_ending,
            )
            for row in rows
            if row.process is not None
        ),
    )


async def read_all(connection: AsyncConnection) -> list[ServerLeases]:
    """Return the leases of every server, by name."""
    servers = list(await connection.scalars(_SERVERS))
    return list((await read(connection, servers)).values())


async def forget_server(connection: AsyncConnection, server: str) -> None:
    """Remove what there is of a removed server and its replicas, but the leases of processes that still renew them."""
    await connection.execute(_FORGET_LEASES, {"server": server})
    await connection.execute(_FORGET_CAPS, {"server": server})


@dataclass(frozen=True, slots=True)
class Demand:
    """What a process says of itself when it renews a lease: its id in it first."""

    process: UUID
    guaranteed: int
    wanted: int
    in_use: int


async def add(
    connection: AsyncConnection, *, host: str, pid: int, granted: Mapping[str, tuple[UUID, int, int, int]]
) -> set[str]:
    """Insert the leases of a process, and return the servers of those that it has. The rows of the caps are locked.

    Args:
        connection: In a transaction.
        host: The name of its machine.
        pid: Its process id there.
        granted: By server, its id, how many connections are granted and guaranteed, and how many it wants.
    """
    values = list(granted.values())
    added = await connection.scalars(
        _ADD,
        {
            "servers": list(granted),
            "processes": [str(value[0]) for value in values],
            "host": host,
            "pid": pid,
            "granted": [str(value[1]) for value in values],
            "guaranteed": [str(value[2]) for value in values],
            "wanted": [str(value[3]) for value in values],
            "seconds": LEASE_SECONDS,
        },
    )
    return set(added)


async def renew(connection: AsyncConnection, demands: Mapping[str, Demand]) -> set[str]:
    """Renew a process's leases of these servers, and return the servers of those that it still has."""
    values = list(demands.values())
    renewed = await connection.scalars(
        _RENEW,
        {
            "servers": list(demands),
            "processes": [str(value.process) for value in values],
            "guaranteed": [str(value.guaranteed) for value in values],
            "wanted": [str(value.wanted) for value in values],
            "in_use": [str(value.in_use) for value in values],
            "seconds": LEASE_SECONDS,
        },
    )
    return set(renewed)


async def grant(connection: AsyncConnection, server: str, granted: int, demand: Demand) -> bool:
    """Change how many connections of a server a process has been granted. The row of the cap is locked.

    False: another process ends its connections.
    """
    parameters = {
        "server": server,
        "process": demand.process,
        "granted": granted,
        "guaranteed": demand.guaranteed,
        "wanted": demand.wanted,
        "in_use": demand.in_use,
        "seconds": LEASE_SECONDS,
    }
    return bool(await connection.scalar(_GRANT, parameters))


async def call(connection: AsyncConnection, server: str, processes: Sequence[UUID]) -> None:
    """Have these processes look at their leases as soon as the transaction is committed."""
    payload = LeaseCall(server, frozenset(map(tag_of, processes[:_MOST_CALLED]))).payload
    await connection.execute(_NOTIFY, {"channel": CONNECTIONS_CHANNEL, "payload": payload})


async def close(connection: AsyncConnection, processes: Collection[UUID]) -> None:
    """Remove a process's leases, by its ids in them, and have those that miss connections look."""
    await connection.execute(_CLOSE, {"processes": list(map(str, processes)), "channel": CONNECTIONS_CHANNEL})


async def claim_count(connection: AsyncConnection, server: str, *, every: float) -> bool:
    """Whether this process is to count a server's connections now: nobody has for so many seconds."""
    return bool(await connection.scalar(_CLAIM_COUNT, {"server": server, "seconds": every}))


async def read_granted(connection: AsyncConnection, server: str) -> tuple[dict[str, int], set[str]]:
    """Return how many connections each process was granted, by its tag, and the tags in the leases of other servers."""
    found = (await connection.execute(_GRANTED, {"server": server})).all()
    return {row.tag: row.granted for row in found if row.is_here}, {row.tag for row in found if not row.is_here}


async def save_count(connection: AsyncConnection, server: str, *, accepted: int, others: int) -> None:
    """Record what a server accepts, and how many connections others have."""
    await connection.execute(_COUNTED, {"server": server, "accepted": accepted, "others": others})


async def begin_end(connection: AsyncConnection, server: str, process: UUID) -> bool:
    """Keep a process from renewing its lease, if it has expired and nobody else does so now: to end its connections."""
    parameters = {"server": server, "process": process, "seconds": ENDING_SECONDS}
    return bool(await connection.scalar(_BEGIN_END, parameters))


async def keep_guaranteed(connection: AsyncConnection, server: str, process: UUID) -> int | None:
    """Take what a process has borrowed, if its lease has expired; return what it keeps."""
    kept: int | None = await connection.scalar(_KEEP_GUARANTEED, {"server": server, "process": process})
    return kept


async def remove(connection: AsyncConnection, server: str, process: UUID) -> None:
    """Remove the lease of a process that has no connections any more."""
    await connection.execute(_REMOVE, {"server": server, "process": process})


def tag_of(process: UUID) -> str:
    """What the ``application_name`` of a process's connections ends in, after a slash."""
    return process.hex[:12]


__all__ = [
    "ENDING_SECONDS",
    "LEASE_SECONDS",
    "Demand",
    "LeaseRow",
    "ServerLeases",
    "add",
    "begin_end",
    "call",
    "claim_count",
    "close",
    "forget_server",
    "grant",
    "keep_guaranteed",
    "lock_cap",
    "read",
    "read_all",
    "read_granted",
    "remove",
    "renew",
    "save_caps",
    "save_count",
    "tag_of",
]
