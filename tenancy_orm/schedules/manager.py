"""``ScheduleManager``: which tenants are due."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Any, Self
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

from sqlalchemy import select

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..context import TenantInTurn, refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import tenants
from ..errors import ConfigurationError
from ..registry.rows import TENANT_COLUMNS, tenant_from_row
from ..tenant import Status, Tenant
from .rows import BEGIN, CLAIM, FORGET, LIST, SEEN, SENT, ZONES
from .times import Times

logger = logging.getLogger("tenancy_orm.schedules")

_BATCH = 50
# a schedule that was added together with its first tick, a few seconds late
_MARGIN = timedelta(minutes=1)
_LONGEST = timedelta(days=31)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule, as it is recorded. Times are aware datetimes in UTC.

    Attributes:
        name: Its name.
        first_seen_at: Nothing is due before.
        seen_at: When somebody last asked which tenants are due.
        sent: To how many tenants it was ever sent.
        last_sent_at: When it was last sent to one.
        unfinished: For how many it is being sent, or was begun and has failed.
    """

    name: str
    first_seen_at: datetime
    seen_at: datetime
    sent: int
    last_sent_at: datetime | None
    unfinished: int


class ScheduleManager:
    """Says which tenants are due, in each tenant's own time zone; ``tenancy.schedules``.

    Have a queue's scheduler ask once a minute. Several may ask at once, on several machines: each tenant that is due
    goes to one of them. What was sent is recorded in the control database.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog) -> None:
        self._control = control
        self._audit = audit

    def due(
        self,
        name: str,
        *,
        at: str | time | Iterable[str | time] | None = None,
        cron: str | None = None,
        weekdays: Iterable[str | int] | None = None,
        spread: timedelta = timedelta(0),
        catch_up: timedelta = timedelta(hours=6),
        timezone_key: str | None = None,
        status: Iterable[Status | str] = (Status.TRIAL, Status.ACTIVE),
        tier: str | Iterable[str] = (),
        retry_after: timedelta = timedelta(minutes=2),
        now: datetime | None = None,
    ) -> DueTenants:
        """Iterate over the tenants that are due now, each bound in turn, and each once for each of its times.

        ```python
        async for tenant in tenancy.schedules.due("daily-report", at="06:00", spread=timedelta(minutes=10)):
            await report.kiq()
        ```

        A tenant counts as sent when the body has ended without an error and the loop asks for the next one. If the body
        raises, or the process is killed, the tenant is due again when ``retry_after`` has passed; those behind it as
        well. So a process that is killed between sending and recording sends twice: ``DueTenants.key`` is the same both
        times.

        Args:
            name: Under what it is recorded, up to 100 characters. One that is renamed is a new one.
            at: A time of the day such as "06:00", or several, by the tenant's clock.
            cron: A cron expression of five fields in place of ``at``, by the tenant's clock; needs the extra ``cron``.
            weekdays: Only on these days: "mon" to "sun", or 0 (Monday) to 6.
            spread: Tenants come one by one over this time from then on; each at its own moment, which depends on its id
                and ``name`` alone.
            catch_up: How late a tenant may come, after nobody has asked for a while. Of several times that were missed
                the last one comes. At most 31 days.
            timezone_key: The key of the tenants' metadata that has the name of their time zone. ``Tenant.timezone``
                where it is None, and for tenants without that key. UTC where a name is unknown, which is logged.
            status: Only tenants with these statuses.
            tier: Only tenants of these tiers.
            retry_after: When a tenant is due again after the body has failed. The body must take less time for one
                tenant: while it takes longer, another process may send as well.
            now: The moment, for tests; the control database's clock where None.

        Raises:
            ConfigurationError: an argument is malformed.
            MissingExtraError: ``cron`` is given, and croniter is not installed.
            CrossTenantError: a tenant is bound; work over the fleet is not a tenant's to do.
            ControlUnavailableError: (in the loop) the control database does not answer.
        """
        refuse_while_bound("asking who is due")
        if not 1 <= len(name) <= 100 or not name.isprintable():
            raise ConfigurationError("the name of a schedule must be 1 to 100 printable characters")
        if spread < timedelta(0) or not timedelta(0) < catch_up <= _LONGEST or retry_after <= timedelta(0):
            raise ConfigurationError("spread must not be negative, catch_up up to 31 days, retry_after above 0")
        if spread > _LONGEST:
            raise ConfigurationError("spread must not be more than 31 days")
        if now is not None and now.tzinfo is None:
            raise ConfigurationError("now must be an aware datetime, such as datetime.now(UTC)")
        question = _Question(
            name=name,
            times=Times.parse(at, cron, weekdays),
            spread=spread,
            catch_up=catch_up,
            timezone_key=timezone_key,
            status=tuple(Status(one).value for one in status),
            tier=(tier,) if isinstance(tier, str) else tuple(tier),
            retry_after=retry_after,
            now=now,
        )
        return DueTenants(self._control, question)

    async def list(self) -> list[Schedule]:
        """Return the schedules that anybody has asked for, by name.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("listing schedules")
        async with self._control.connect() as connection:
            rows = await connection.execute(LIST)
            return [
                Schedule(row.name, row.first_seen_at, row.seen_at, row.sent, row.last_sent_at, row.unfinished)
                for row in rows
            ]

    async def forget(self, name: str, *, actor: Actor = SYSTEM) -> bool:
        """Remove what is recorded of a schedule that is no longer in use. Returns whether there was one.

        Where somebody asks for it again, nothing from before that moment is due.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("forgetting a schedule")
        async with self._control.transaction() as connection:
            found = (await connection.execute(FORGET, {"name": name})).rowcount > 0
            if found:
                await self._audit.append(connection, action="schedule.forget", actor=actor, before={"name": name})
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    name: str
    times: Times
    spread: timedelta
    catch_up: timedelta
    timezone_key: str | None
    status: tuple[str, ...]
    tier: tuple[str, ...]
    retry_after: timedelta
    now: datetime | None


class DueTenants(TenantInTurn):
    """An iterator over the tenants that are due, which binds each in turn; see ``ScheduleManager.due``.

    It is no async generator for the reason that ``scopes.BoundTenants`` is none: the binding ends with the loop.
    """

    def __init__(self, control: ControlDatabase, question: _Question) -> None:
        super().__init__("asking who is due")
        self._control = control
        self._question = question
        self._source = _Claims(control, question).tenants()
        self._current: tuple[Tenant, datetime] | None = None

    @property
    def due_at(self) -> datetime:
        """When the tenant that was returned last is due: its own moment, in UTC."""
        return self._returned()[1]

    @property
    def key(self) -> str:
        """A text that is the same whenever this tenant is sent for this time: for a queue that drops duplicates."""
        tenant, due_at = self._returned()
        return f"{self._question.name}:{tenant.id.hex}:{int(due_at.timestamp() * 1000)}"

    def _returned(self) -> tuple[Tenant, datetime]:
        if self._current is None:
            raise ConfigurationError("no tenant is due here; ask within the loop")
        return self._current

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Tenant:
        """Record the last tenant as sent; bind and return the next one.

        Raises:
            CrossTenantError: the body has bound a tenant of its own, or one is bound already.
        """
        self.between()
        if self._current is not None:
            await self.done()
        self._current = await anext(self._source)
        return self.bind_next(self._current[0])

    async def done(self) -> None:
        """Record the tenant that was returned last as sent: before a ``break``, which asks for no further one.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        tenant, due_at = self._returned()
        refuse_other_tenant(tenant)
        values = {"name": self._question.name, "tenant": tenant.id, "due_at": due_at}
        async with self._control.transaction() as connection:
            await connection.execute(SENT, values)
        self._current = None


class _Claims:
    """Claims tenants that are due, some at a time.

    It does not know the iterator: the two would keep each other alive when the loop is left, and with it the binding.
    """

    def __init__(self, control: ControlDatabase, question: _Question) -> None:
        self._control = control
        self._question = question
        self._claim = uuid4()

    async def tenants(self) -> AsyncIterator[tuple[Tenant, datetime]]:
        values = await self._ask()
        while values is not None:
            async with self._control.transaction() as connection:
                rows = (await connection.execute(CLAIM, values)).all()
                found = await connection.execute(
                    select(*TENANT_COLUMNS).where(tenants.c.id.in_([row.tenant_id for row in rows if row.tenant_id]))
                )
                by_id = {row.id: tenant_from_row(row) for row in found}
            claimed = deque(row.tenant_id for row in rows if row.tenant_id)
            while claimed:
                tenant_id = claimed.popleft()
                if (due_at := await self._begin(tenant_id)) is not None:
                    yield by_id[tenant_id], due_at
            if rows[0].waiting == 0:
                return

    async def _begin(self, tenant_id: UUID) -> datetime | None:
        values = {
            "name": self._question.name,
            "tenant": tenant_id,
            "claim": self._claim,
            "retry_after": self._question.retry_after,
        }
        async with self._control.transaction() as connection:
            found: datetime | None = (await connection.execute(BEGIN, values)).scalar_one_or_none()
        return found

    async def _ask(self) -> dict[str, Any] | None:
        """What ``CLAIM`` needs to know; None where no time has come in any time zone."""
        question = self._question
        async with self._control.transaction() as connection:
            seen = {"name": question.name, "now": question.now, "margin": _MARGIN}
            row = (await connection.execute(SEEN, seen)).one()
            chosen = {"key": question.timezone_key or "", "status": list(question.status)}
            zones = (await connection.execute(ZONES, chosen)).scalars().all()
        oldest = max(row.first_seen_at, row.now - question.catch_up)
        names: list[str] = []
        moments: list[datetime] = []
        for name in zones:
            zone = _zone(name, question.name)
            for moment in question.times.candidates(oldest - question.spread, row.now, zone, question.spread):
                names.append(name)
                moments.append(moment)
        if not names:
            return None
        return {
            **chosen,
            "zones": names,
            "moments": moments,
            "spread": question.spread // timedelta(milliseconds=1),
            "name": question.name,
            "tier": list(question.tier) or None,
            "now": row.now,
            "oldest": oldest,
            "batch": _BATCH,
            "retry_after": question.retry_after,
            "claim": self._claim,
        }


def _zone(name: str, schedule: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError):  # malformed; a directory's; unknown
        logger.warning(
            "schedule %r: %r is not a time zone; tenants with it are taken to be in UTC", schedule, name[:100]
        )
        return ZoneInfo("UTC")


__all__ = ["DueTenants", "Schedule", "ScheduleManager"]
