"""Positions in a cluster's write-ahead log: how far a primary has written, and how far a standby has replayed.

``pg_last_xact_replay_timestamp()`` cannot tell how stale a standby is: it stays where it was while the primary is idle,
and also while the standby receives nothing. So positions are compared with positions. A primary is asked for its
position at a known time of this process's clock; a standby that has replayed that position has everything that was
committed before that time.

Every role may ask for what is read here, an administrator without ``pg_monitor`` as well; only ``received_tli`` is
hidden from such a role.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..postgres.connections import Connection

# A CASE, since each function raises an error on the other kind of server. The timeline of a standby is the latest that
# it is known to follow: it learns of a new one only where that has all that it has replayed.
_READ: Final = """
SELECT r.recovering, pg_catalog.current_setting('transaction_read_only') = 'on' AS read_only,
    s.system_identifier::text AS system,
    EXTRACT(EPOCH FROM pg_catalog.pg_postmaster_start_time())::text AS instance,
    (CASE WHEN r.recovering THEN pg_catalog.pg_last_wal_replay_lsn()
        ELSE pg_catalog.pg_current_wal_insert_lsn() END - '0/0'::pg_catalog.pg_lsn)::text AS position,
    CASE WHEN r.recovering THEN GREATEST(
            (SELECT c.timeline_id FROM pg_catalog.pg_control_checkpoint() AS c),
            (SELECT c.min_recovery_end_timeline FROM pg_catalog.pg_control_recovery() AS c),
            (SELECT w.received_tli FROM pg_catalog.pg_stat_wal_receiver AS w))::text
        ELSE pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8) END
        AS timeline,
    pg_catalog.current_setting('wal_block_size')::int AS page,
    pg_catalog.pg_size_bytes(pg_catalog.current_setting('wal_segment_size')) AS segment
FROM (SELECT pg_catalog.pg_is_in_recovery() AS recovering) AS r, pg_catalog.pg_control_system() AS s
"""
# Its result is the command's tag, so that no statement is prepared: this is sent over each new connection of a tenant.
_PROOF: Final = (
    "SELECT WHERE pg_catalog.pg_is_in_recovery() "
    "AND EXTRACT(EPOCH FROM pg_catalog.pg_postmaster_start_time())::text OPERATOR(pg_catalog.=) '{instance}'"
)
PROVED: Final = "SELECT 1"

_PAGE_HEADER, _SEGMENT_HEADER = 24, 40  # bytes of XLogPageHeaderData, of XLogLongPageHeaderData


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a write-ahead log.

    Attributes:
        system: The cluster's system identifier, the same on a primary and its standbys.
        timeline: The number that each promotion raises.
        lsn: The place, in bytes.
    """

    system: int
    timeline: int
    lsn: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server says of itself.

    Attributes:
        recovering: Whether it is a standby.
        read_only: Whether it takes no writes: a standby, or a former primary that is fenced.
        instance: When it was started, as text: no two servers of a cluster have the same.
        position: What it has written, or replayed.
    """

    recovering: bool
    read_only: bool
    instance: str
    position: Position


async def read_position(connection: Connection) -> Reading:
    """Ask a server for its position.

    Raises:
        asyncpg.PostgresError: it refuses.
    """
    row = await connection.fetchrow(_READ)
    lsn = int(row["position"] or 0)
    if not row["recovering"]:
        lsn = end_of_records(lsn, page=row["page"], segment=row["segment"])
    timeline = int(row["timeline"], 10 if row["recovering"] else 16)
    return Reading(row["recovering"], row["read_only"], row["instance"], Position(int(row["system"]), timeline, lsn))


def end_of_records(lsn: int, *, page: int, segment: int) -> int:
    """Where the last record ends that was written before ``lsn``, the place of the next one.

    The next record may have its place behind a page's header where nothing was written to that page yet. A standby
    reports the end of what it has replayed, in front of that header.
    """
    offset = lsn % page
    header = _SEGMENT_HEADER if (lsn - offset) % segment == 0 else _PAGE_HEADER
    return lsn - offset if offset == header else lsn


def standby_proof(instance: str) -> str:
    """Return the statement that proves that a standby answers, and which: its command tag is ``PROVED``."""
    return _PROOF.format(instance=instance)


__all__ = ["PROVED", "Position", "Reading", "end_of_records", "read_position", "standby_proof"]
