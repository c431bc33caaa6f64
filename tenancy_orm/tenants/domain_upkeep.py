"""Domains with time: claims that nobody verifies expire, and verified domains are looked up again.

A domain changes hands, and its new owner has not published the token. A missing record may also be a mistake that is
mended tomorrow, so the domain stays the tenant's for a grace time, which begins with a warning. Only an answer of the
DNS counts: a name server that is down says nothing about the record.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Row, and_, delete, func, select, tuple_, update

from ..audit.log import AuditLog
from ..config.sections import DomainConfig
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import domains, tenants
from ..errors import DomainError, MissingExtraError
from ..events import DomainFailing, DomainLapsed, EventBus
from .domains import CHALLENGE, TextRecords, has_expired, is_published

logger = logging.getLogger("tenancy_orm.tenants")

_AT_MOST = 500  # domains of one run
_AT_ONCE = 20  # look-ups
_FEWEST_FAILURES = 3  # a grace time of 0 does not let one answer decide

_Outcome = Literal["published", "failing", "lapsed", "unanswered"]


@dataclass(frozen=True, slots=True)
class DomainReport:
    """What one run of look-ups found: how many records are published, which domains fail, which have lapsed.

    ``unanswered`` is the number of look-ups that no name server answered; they count for nothing, and neither does the
    time since the look-ups before them.
    """

    published: int = 0
    failing: tuple[str, ...] = ()
    lapsed: tuple[str, ...] = ()
    unanswered: int = 0


class DomainUpkeep:
    """Expires claims and looks up verified domains again; a part of housekeeping.

    Args:
        control: The control database.
        audit: The log of changes.
        records: Where TXT records are looked up.
        config: The times.
        events: Where warnings are emitted.
    """

    def __init__(
        self,
        control: ControlDatabase,
        audit: AuditLog,
        records: TextRecords,
        config: DomainConfig,
        events: EventBus,
    ) -> None:
        self._control = control
        self._audit = audit
        self._records = records
        self._config = config
        self._events = events

    async def expire_claims(self) -> tuple[str, ...]:
        """Remove claims that were not verified in time; returns their domains."""
        refuse_while_bound("expiring claims of domains")
        if not self._config.claim_seconds:
            return ()
        key = (domains.c.domain, domains.c.tenant_id)
        due = select(*key).where(has_expired(self._config.claim_seconds)).limit(_AT_MOST)
        statement = delete(domains).where(tuple_(*key).in_(due.with_for_update(skip_locked=True))).returning(*key)
        async with self._control.transaction() as connection:
            rows = (await connection.execute(statement)).all()
            for row in rows:
                slug = await connection.scalar(select(tenants.c.slug).where(tenants.c.id == row.tenant_id))
                await self._audit.append(
                    connection,
                    action="domain.expire",
                    tenant_id=row.tenant_id,
                    slug=slug,
                    before={"domain": row.domain},
                )
        return tuple(sorted(row.domain for row in rows))

    async def verify_again(self) -> DomainReport:
        """Look up verified domains that have not been looked up for ``domains.verify_seconds``.

        Raises:
            MissingExtraError: there are such domains, and dnspython is not installed.
        """
        refuse_while_bound("verifying domains")
        if not self._config.verify_seconds:
            return DomainReport()
        slots = asyncio.Semaphore(_AT_ONCE)

        async def check(row: Row[*tuple[Any, ...]]) -> tuple[str, _Outcome]:
            async with slots:
                return row.domain, await self._check(row)

        checks = [check(row) for row in await self._take_due()]
        done = await asyncio.gather(*checks, return_exceptions=True)
        found = [one for one in done if not isinstance(one, BaseException)]
        if errors := [one for one in done if isinstance(one, BaseException)]:
            raise errors[0]  # only now: none of the others goes on behind the caller's back
        return DomainReport(
            published=sum(outcome == "published" for _, outcome in found),
            failing=tuple(sorted(domain for domain, outcome in found if outcome == "failing")),
            lapsed=tuple(sorted(domain for domain, outcome in found if outcome == "lapsed")),
            unanswered=sum(outcome == "unanswered" for _, outcome in found),
        )

    async def _take_due(self) -> list[Row[*tuple[Any, ...]]]:
        """Return domains that are due, and mark them, so that of two runs at once one looks each up.

        ``previous`` is when each was looked up before.
        """
        checked_at = func.coalesce(domains.c.checked_at, domains.c.verified_at)
        due = (
            select(domains.c.domain, domains.c.tenant_id, checked_at.label("previous"))
            .where(
                domains.c.verified_at.is_not(None),
                checked_at <= func.now() - timedelta(seconds=self._config.verify_seconds),
            )
            .order_by(checked_at)
            .limit(_AT_MOST)
            .with_for_update(skip_locked=True)
            .cte("due")
        )
        statement = (
            update(domains)
            .where(
                domains.c.domain == due.c.domain,
                domains.c.tenant_id == due.c.tenant_id,
                domains.c.tenant_id == tenants.c.id,
            )
            .values(checked_at=func.now())
            .returning(domains, due.c.previous, tenants.c.slug)
        )
        async with self._control.transaction() as connection:
            return list(await connection.execute(statement))

    async def _check(self, row: Row[*tuple[Any, ...]]) -> _Outcome:
        try:
            texts = await self._records.lookup(f"{CHALLENGE}.{row.domain}")
        except MissingExtraError:
            raise
        except DomainError as exc:
            logger.info("domain %s of tenant %s could not be looked up: %s", row.domain, row.slug, exc)
            if row.failing_since is not None:
                # for all that is known, the record was published again after the look-up before
                await self._set(row, None, failing_since=row.failing_since + (row.checked_at - row.previous))
            return "unanswered"
        if not is_published(row.token, texts):
            return await self._count_failure(row)
        if row.failures:
            await self._set(row, "domain.recover", failures=0, failing_since=None)
        return "published"

    async def _count_failure(self, row: Row[*tuple[Any, ...]]) -> _Outcome:
        now = await self._now()
        since: datetime = row.failing_since or now
        lapses_at = since + timedelta(seconds=self._config.grace_seconds)
        failures = row.failures + 1
        if failures >= _FEWEST_FAILURES and lapses_at <= now:
            lapsed = {"verified_at": None, "lapsed_at": now, "failures": 0, "failing_since": None}
            if await self._set(row, "domain.lapse", **lapsed):
                logger.warning("domain %s is no longer tenant %s's: its TXT record is missing", row.domain, row.slug)
                self._events.emit(DomainLapsed(tenant_id=row.tenant_id, slug=row.slug, domain=row.domain))
            return "lapsed"
        action = "domain.fail" if failures == 1 else None
        if await self._set(row, action, failures=failures, failing_since=since) and action:
            logger.warning("the TXT record of domain %s of tenant %s is missing", row.domain, row.slug)
            self._events.emit(
                DomainFailing(tenant_id=row.tenant_id, slug=row.slug, domain=row.domain, lapses_at=lapses_at)
            )
        return "failing"

    async def _now(self) -> datetime:
        async with self._control.connect() as connection:
            now: datetime = (await connection.execute(select(func.now()))).scalar_one()
        return now

    async def _set(self, row: Row[*tuple[Any, ...]], action: str | None, **values: Any) -> bool:
        """Set columns of a domain unless it was released or verified since; returns whether it was not."""
        same = and_(
            domains.c.domain == row.domain,
            domains.c.tenant_id == row.tenant_id,
            domains.c.token == row.token,
            domains.c.verified_at == row.verified_at,
        )
        async with self._control.transaction() as connection:
            if (await connection.execute(update(domains).where(same).values(**values))).rowcount == 0:
                return False
            if action is not None:
                await self._audit.append(
                    connection,
                    action=action,
                    tenant_id=row.tenant_id,
                    slug=row.slug,
                    after={"domain": row.domain},
                )
        return True


__all__ = ["DomainReport", "DomainUpkeep"]
