"""Retention: the removal of whole months, which are partitions, from the beginning of the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..control.database import ControlDatabase
from ..errors import AuditError
from ..postgres.errors import DEADLOCK_DETECTED, INSUFFICIENT_PRIVILEGE, LOCK_NOT_AVAILABLE, sqlstate_of
from ..postgres.quoting import quote_identifier
from .actor import Actor
from .chain import ChainCheck
from .checkpoints import Checkpoint, Signer, Verifier
from .entries import insert_entry
from .verification import SNAPSHOT, check_entries, check_next_entry, read_cuts

_LOCK_WAIT = 0.2  # seconds that retention waits for a lock, while all appends wait
_PAUSE = 0.1  # seconds before it tries again, in which they proceed
_REFUSED = {
    INSUFFICIENT_PRIVILEGE: "only the owner of the control tables may; run it as the role that ran tenancy init",
    LOCK_NOT_AVAILABLE: "a transaction that reads the log kept it locked for too long; try again",
    DEADLOCK_DETECTED: "a transaction that reads the log waits to append to it; try again",
}
_BUSY = (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED)
_PARTITIONS = text(
    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
    "WHERE i.inhparent = 'tenancy.audit_log'::regclass ORDER BY c.relname"
)
# by the clock that times the entries; the application's may be ahead of it
_THIS_MONTH = text("SELECT date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'")
_NEWEST = text(
    "SELECT sequence, hash FROM tenancy.audit_log WHERE occurred_at < :until "
    "ORDER BY occurred_at DESC, sequence DESC LIMIT 1"
)


@dataclass(frozen=True, slots=True)
class _VerifiedMonths:
    """The months that ended by ``until``, verified; ``last`` is the row of their last entry."""

    until: datetime
    last: Any


class Retention:
    """Removes whole months of the log, once they are verified, and signs the cut.

    Args:
        control: The control database.
        signer: Signs the cut.
    """

    def __init__(self, control: ControlDatabase, signer: Signer) -> None:
        self._control = control
        self._signer = signer

    async def prune(
        self, *, before: datetime, detach: bool, actor: Actor, lock_timeout: float, verifier: Verifier
    ) -> Checkpoint | None:
        """Verify and remove the months that ended by ``before``; see ``AuditLog.prune``."""
        verified = await self._verify(before, verifier)
        if verified is None:
            return None
        deadline = time.monotonic() + lock_timeout
        while True:
            try:
                return await self._remove(verified, detach, actor, min(lock_timeout, _LOCK_WAIT))
            except DBAPIError as exc:
                state = sqlstate_of(exc) or ""
                if state not in _REFUSED:
                    raise
                if state not in _BUSY or time.monotonic() >= deadline:
                    raise AuditError(f"old months of the audit log were not removed: {_REFUSED[state]}") from exc
            await asyncio.sleep(_PAUSE)

    async def _remove(
        self, verified: _VerifiedMonths, detach: bool, actor: Actor, lock_wait: float
    ) -> Checkpoint | None:
        async with self._control.transaction() as connection:
            await connection.execute(
                text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": f"{int(lock_wait * 1000)}ms"}
            )
            # the head first and the tables after it, the order in which every append locks them
            await connection.execute(text("SELECT 1 FROM tenancy.audit_head FOR UPDATE"))
            names = await _ended_partitions(connection, verified.until)
            if not names:
                return None  # another process has removed them
            newest = (await connection.execute(_NEWEST, {"until": verified.until})).one_or_none()
            if newest is None or (newest.sequence, newest.hash) != (verified.last.sequence, verified.last.hash):
                raise AuditError("old months of the audit log have changed since they were verified; try again")
            cut = await self._record_cut(connection, verified.last, names, actor)
            for name in names:
                table = f"tenancy.{quote_identifier(name)}"
                await connection.exec_driver_sql(
                    f"ALTER TABLE tenancy.audit_log DETACH PARTITION {table}" if detach else f"DROP TABLE {table}"
                )
        return cut

    async def _verify(self, before: datetime, verifier: Verifier) -> _VerifiedMonths | None:
        """Verify the months that ended by ``before``; returns None if there are none."""
        # its own transaction, since its cursor keeps the tables locked to the end
        async with self._control.transaction() as connection:
            await connection.execute(SNAPSHOT)
            names = await _ended_partitions(connection, before)
            if not names:
                return None
            until = max(map(_month_end, names))
            chain = ChainCheck(await read_cuts(connection, self._control.installation), [], verifier, None)
            valid = await check_entries(connection, chain, None, until)
            last = chain.previous
            if valid:
                await check_next_entry(connection, chain, until)
        chain.report().raise_if_bad()
        return None if last is None else _VerifiedMonths(until, last)

    async def _record_cut(
        self, connection: AsyncConnection, last: Any, names: Sequence[str], actor: Actor
    ) -> Checkpoint:
        cut = self._signer.sign(
            "cut",
            installation=self._control.installation,
            sequence=last.sequence,
            digest=last.hash,
            occurred_at=last.occurred_at,
        )
        await connection.execute(
            text(
                "INSERT INTO tenancy.audit_cuts (sequence, occurred_at, hash, cut_at, key_id, signature) "
                "VALUES (:sequence, :occurred_at, :hash, :cut_at, :key_id, :signature)"
            ),
            {
                "sequence": cut.sequence,
                "occurred_at": cut.occurred_at,
                "hash": cut.hash,
                "cut_at": cut.signed_at,
                "key_id": cut.key_id,
                "signature": cut.signature,
            },
        )
        detail = {"sequence": cut.sequence, "hash": cut.hash.hex(), "months": list(names)}
        await insert_entry(connection, action="audit.cut", actor=actor, detail=detail)
        return cut


async def _ended_partitions(connection: AsyncConnection, before: datetime) -> list[str]:
    """The partitions of months that ended by ``before``, the current month never among them."""
    until = min(before, await connection.scalar(_THIS_MONTH))
    return [name for name in await connection.scalars(_PARTITIONS) if _month_end(name) <= until]


def _month_end(partition: str) -> datetime:
    """The end of a partition's month, such as ``audit_log_y2026m11``."""
    try:
        first = datetime.strptime(partition, "audit_log_y%Ym%m").replace(tzinfo=UTC)
        return (first + timedelta(days=31)).replace(day=1)
    except (ValueError, OverflowError) as exc:
        raise AuditError(f"partition {partition!r} of the audit log was not created by this package") from exc
