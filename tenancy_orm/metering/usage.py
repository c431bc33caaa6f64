"""Usage for billing: an outbox with one record per closed period, and the exporter that sends the records.

A record is made when its period has ended, in the transaction that closes the period, so that each use is billed in
exactly one record. It is sent at least once, with an idempotency key derived from tenant, resource and period: a
receiver that honours the key counts it once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text

from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..errors import UsageExportError
from ..events import EventBus, UsageExported, UsageExportFailed
from ..postgres.errors import without_detail
from ..protocols import UsageRecord, UsageSender

logger = logging.getLogger("tenancy_orm.usage")

# By then every block of the period has been returned, or its process is dead.
CLOSE_AFTER_SECONDS: Final = 300.0
# a record stays claimed for this much longer than sending it may take: for the statements before and after
_CLAIM_MARGIN_SECONDS: Final = 90.0
_FIRST_RETRY_SECONDS: Final = 30.0
_LAST_RETRY_SECONDS: Final = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The result of one run of the exporter: records made, sent, skipped, scheduled for a retry, and given up."""

    closed: int
    sent: int
    skipped: int
    retried: int
    failed: int


class UsageExporter:
    """Closes periods and sends their records. Safe to run from many processes at once: they share the work.

    Args:
        control: The control database.
        sender: Sends the records.
        events: Emits an event for each success and failure.
        close_after_seconds: How long after its end a period is closed.
        timeout: How long sending one record may take, in seconds.
        concurrency: How many records are sent at once.
    """

    def __init__(
        self,
        control: ControlDatabase,
        sender: UsageSender,
        events: EventBus,
        *,
        close_after_seconds: float = CLOSE_AFTER_SECONDS,
        timeout: float = 30.0,
        concurrency: int = 8,
    ) -> None:
        self._control = control
        self._sender = sender
        self._events = events
        self._close_after = close_after_seconds
        self._timeout = timeout
        self._claim_seconds = timeout + _CLAIM_MARGIN_SECONDS
        self._concurrency = asyncio.Semaphore(concurrency)

    async def run(self, *, at: datetime | None = None, batch: int = 100) -> ExportReport:
        """Close the periods that have ended, and send records until none is due.

        Args:
            at: The time of the run; the database's clock where None.
            batch: How many records are claimed at once.

        Raises:
            ControlUnavailableError: the control database does not answer. A record that was sent and could not be
                marked as sent is sent again, with the same key.
        """
        refuse_while_bound("exporting usage")
        closed = await self.close_periods(at=at)
        outcomes: list[str] = []
        while records := await self._claim(at, batch):
            # one at a time for each tenant and resource: receivers serialise these anyway, or refuse the second
            groups: dict[tuple[UUID, str], list[UsageRecord]] = {}
            for record in records:
                groups.setdefault((record.tenant_id, record.resource), []).append(record)
            work = (self._send_all(group, at) for group in groups.values())
            # all of them end before an error or the caller's cancellation is raised, so that none is still sending
            for done in await asyncio.gather(*work, return_exceptions=True):
                if isinstance(done, BaseException):
                    raise done
                outcomes += done
        count = outcomes.count
        return ExportReport(closed, count("sent"), count("skipped"), count("retried"), count("failed"))

    async def close_periods(self, *, at: datetime | None = None) -> int:
        """Make the records of the periods that have ended; returns how many."""
        refuse_while_bound("exporting usage")
        made = 0
        while True:
            async with self._control.transaction() as connection:
                row = (await connection.execute(_CLOSE, {"seconds": self._close_after, "at": at})).one()
            made += int(row.made)
            if row.closed == 0:
                return made

    async def failures(self, *, limit: int = 100) -> list[tuple[UsageRecord, str]]:
        """Return the records that were given up, newest first, each with its error."""
        refuse_while_bound("exporting usage")
        async with self._control.connect() as connection:
            rows = (await connection.execute(_FAILURES, {"limit": limit})).all()
        return [(_record(row), row.error) for row in rows]

    async def retry(self, record_ids: Sequence[int]) -> int:
        """Make records due again that were given up; returns how many."""
        refuse_while_bound("exporting usage")
        async with self._control.transaction() as connection:
            return int((await connection.execute(_RETRY, {"ids": list(record_ids)})).rowcount)

    async def prune(self, *, days: float = 400) -> int:
        """Remove records that were sent more than this many days ago; returns how many."""
        refuse_while_bound("exporting usage")
        async with self._control.transaction() as connection:
            return int((await connection.execute(_PRUNE, {"days": days})).rowcount)

    async def _claim(self, at: datetime | None, batch: int) -> list[UsageRecord]:
        # claimed, not locked: no transaction stays open while a record is sent. If the process dies, its claim expires
        # and the record is sent again with the same key.
        async with self._control.transaction() as connection:
            parameters = {"at": at, "seconds": self._claim_seconds, "limit": batch}
            return [_record(row) for row in (await connection.execute(_CLAIM, parameters)).all()]

    async def _send_all(self, records: Sequence[UsageRecord], at: datetime | None) -> list[str]:
        waiting = sorted(records, key=lambda record: record.period_start)
        outcomes: list[str] = []
        async with self._concurrency:
            while waiting := await self._renew_claims(waiting, at):
                outcomes.append(await self._send(waiting.pop(0), at))
        return outcomes

    async def _renew_claims(self, records: Sequence[UsageRecord], at: datetime | None) -> list[UsageRecord]:
        """Renew the claim on records; returns those that no other exporter has claimed since."""
        if not records:
            return []
        async with self._control.transaction() as connection:
            parameters = {
                "ids": [record.id for record in records],
                "attempts": [record.attempts for record in records],
                "at": at,
                "seconds": self._claim_seconds,
            }
            ours = set((await connection.scalars(_RENEW, parameters)).all())
        return [record for record in records if record.id in ours]

    async def _send(self, record: UsageRecord, at: datetime | None) -> str:
        try:
            async with asyncio.timeout(self._timeout):
                sent = await self._sender.send(record)
        except UsageExportError as exc:
            return await self._reschedule(record, at, exc)
        except TimeoutError:
            return await self._reschedule(record, at, UsageExportError(f"no answer within {self._timeout:g} s"))
        except Exception as exc:
            logger.error("the usage sender failed", exc_info=without_detail(exc))
            return await self._reschedule(record, at, UsageExportError(f"the sender failed: {type(exc).__name__}"))
        async with self._control.transaction() as connection:
            await connection.execute(_SENT, {"id": record.id})
        if not sent:
            return "skipped"
        self._events.emit(
            UsageExported(
                tenant_id=record.tenant_id, slug=record.slug, resource=record.resource, quantity=record.quantity
            )
        )
        return "sent"

    async def _reschedule(self, record: UsageRecord, at: datetime | None, error: UsageExportError) -> str:
        # the exponent is bounded too: a record that was tried for months has thousands of attempts
        delay = min(_FIRST_RETRY_SECONDS * 2 ** min(record.attempts - 1, 10), _LAST_RETRY_SECONDS)
        parameters = {
            "id": record.id,
            "attempts": record.attempts,
            "at": at,
            "seconds": delay,
            "error": str(error)[:500],
            "permanent": error.permanent,
        }
        async with self._control.transaction() as connection:
            if (await connection.execute(_RESCHEDULE, parameters)).rowcount == 0:
                return "overtaken"
        logger.warning("usage record %d of tenant %s was not sent: %s", record.id, record.slug, error)
        self._events.emit(
            UsageExportFailed(
                tenant_id=record.tenant_id,
                slug=record.slug,
                resource=record.resource,
                permanent=error.permanent,
                error=str(error),
            )
        )
        return "failed" if error.permanent else "retried"


_CLOSE = text(
    "SELECT closed, made FROM tenancy.usage_close(CAST(:seconds AS double precision), CAST(:at AS timestamptz))"
)
_FIELDS = (
    "r.id, r.tenant_id, t.slug, coalesce(r.metadata, t.metadata) AS metadata, r.resource, r.period, r.period_start, "
    "r.period_end, r.quantity, r.idempotency_key, r.attempts, r.error"
)
_CLAIM = text(
    "UPDATE tenancy.usage_records AS r SET attempts = r.attempts + 1, "  # noqa: S608 - a constant of this module
    "due_at = coalesce(CAST(:at AS timestamptz), now()) + make_interval(secs => :seconds) "
    "FROM tenancy.tenants AS t WHERE t.id = r.tenant_id AND r.id IN ("
    "SELECT d.id FROM tenancy.usage_records AS d WHERE d.sent_at IS NULL AND d.failed_at IS NULL "
    "AND d.due_at <= coalesce(CAST(:at AS timestamptz), now()) ORDER BY d.due_at LIMIT :limit "
    f"FOR UPDATE SKIP LOCKED) RETURNING {_FIELDS}"
)
# each claim counts an attempt: by the number an exporter recognises its own
_RENEW = text(
    "UPDATE tenancy.usage_records AS r "
    "SET due_at = coalesce(CAST(:at AS timestamptz), now()) + make_interval(secs => :seconds) "
    "FROM unnest(CAST(:ids AS bigint[]), CAST(:attempts AS integer[])) AS c (id, attempts) "
    "WHERE r.id = c.id AND r.attempts = c.attempts AND r.sent_at IS NULL AND r.failed_at IS NULL RETURNING r.id"
)
# the metadata of a purged tenant is no longer needed
_SENT = text(
    "UPDATE tenancy.usage_records SET sent_at = now(), failed_at = NULL, error = NULL, metadata = NULL WHERE id = :id"
)
# unless another exporter has claimed or sent it
_RESCHEDULE = text(
    "UPDATE tenancy.usage_records SET error = :error, "
    "due_at = coalesce(CAST(:at AS timestamptz), now()) + make_interval(secs => :seconds), "
    "failed_at = CASE WHEN :permanent THEN now() END WHERE id = :id AND attempts = :attempts AND sent_at IS NULL"
)
_FAILURES = text(
    f"SELECT {_FIELDS} FROM tenancy.usage_records AS r JOIN tenancy.tenants AS t ON t.id = r.tenant_id "  # noqa: S608 - the same
    "WHERE r.failed_at IS NOT NULL ORDER BY r.failed_at DESC LIMIT :limit"
)
_RETRY = text(
    "UPDATE tenancy.usage_records SET failed_at = NULL, due_at = now() "
    "WHERE id = ANY(CAST(:ids AS bigint[])) AND failed_at IS NOT NULL AND sent_at IS NULL"
)
_PRUNE = text("DELETE FROM tenancy.usage_records WHERE sent_at < now() - make_interval(secs => 86400 * :days)")


def _record(row: Any) -> UsageRecord:
    return UsageRecord(
        id=row.id,
        tenant_id=row.tenant_id,
        slug=row.slug,
        metadata=MappingProxyType(row.metadata),
        resource=row.resource,
        period=row.period,
        period_start=row.period_start,
        period_end=row.period_end,
        quantity=row.quantity,
        idempotency_key=row.idempotency_key,
        attempts=row.attempts,
    )
