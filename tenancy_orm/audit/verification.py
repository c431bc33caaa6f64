"""Reads the entries in the chain's order, through a server-side cursor, and checks them up to the head."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from .chain import ChainCheck
from .checkpoints import Checkpoint

_BATCH = 500  # entries hashed between two reads, so that the event loop is never blocked for long
SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
HEAD = text("SELECT sequence, occurred_at, hash FROM tenancy.audit_head")
_SELECT_ENTRIES = (
    "SELECT sequence, occurred_at, action, tenant_id, slug, actor_kind, actor_id, before::text AS before, "
    "after::text AS after, detail::text AS detail, request_id, source, database_role, previous_hash, hash "
    "FROM tenancy.audit_log WHERE occurred_at >= :since AND occurred_at < :until ORDER BY occurred_at, sequence"
)
_ENTRIES = text(_SELECT_ENTRIES)
_FIRST_ENTRY = text(f"{_SELECT_ENTRIES} LIMIT 1")
# Python can represent every time between these, in any time zone
_EARLIEST, _LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
_STRAY = text(
    "SELECT sequence FROM tenancy.audit_log WHERE occurred_at < :earliest OR occurred_at >= :latest "
    "ORDER BY sequence LIMIT 1"
)


async def read_cuts(connection: AsyncConnection, installation: UUID) -> dict[int, Checkpoint]:
    """Return the cuts that retention made, by the sequence number of the last entry before each."""
    rows = (await connection.execute(text("SELECT * FROM tenancy.audit_cuts"))).all()
    return {
        row.sequence: Checkpoint(
            kind="cut",
            installation=installation,
            sequence=row.sequence,
            hash=row.hash,
            occurred_at=row.occurred_at,
            signed_at=row.cut_at,
            key_id=row.key_id,
            signature=row.signature,
        )
        for row in rows
    }


async def check_entries(
    connection: AsyncConnection, chain: ChainCheck, since: datetime | None, until: datetime | None = None
) -> bool:
    """Check the entries of a range of time up to the first that is not valid; returns whether all are."""
    async for batch in _stream(connection, since, until):
        if not all(chain.check_entry(row) for row in batch):
            return False
    return True


async def check_next_entry(connection: AsyncConnection, chain: ChainCheck, until: datetime) -> None:
    """Check the first entry from ``until`` on, or else the head: only there a missing entry before it shows."""
    kept = (await connection.execute(_FIRST_ENTRY, {"since": until, "until": _LATEST})).one_or_none()
    if kept is None:
        await check_end(connection, chain)
    else:
        chain.check_entry(kept)


async def check_end(connection: AsyncConnection, chain: ChainCheck) -> None:
    """Check, after the last entry, the head, and that no entry has an impossible time."""
    stray = await connection.scalar(_STRAY, {"earliest": _EARLIEST, "latest": _LATEST})
    if stray is not None:
        chain.add_problem(stray, "its time is outside the years 1 to 9999")
    head = (await connection.execute(HEAD)).one_or_none()
    if head is None:
        chain.add_problem(chain.sequence + 1, "the head of the chain is missing")
    else:
        chain.check_head(head.sequence, head.hash)


async def _stream(
    connection: AsyncConnection, since: datetime | None, until: datetime | None
) -> AsyncIterator[Sequence[Any]]:
    """Yield entries in the chain's order, a batch at a time, through a server-side cursor."""
    parameters = {"since": since or _EARLIEST, "until": until or _LATEST}
    options = {"yield_per": _BATCH}
    async with connection.stream(_ENTRIES, parameters, execution_options=options) as result:
        async for batch in result.partitions(_BATCH):
            yield batch
