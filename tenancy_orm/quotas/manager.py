"""Quotas: how much of each resource a tenant may use, counted exactly over any number of processes.

Limits come from the tenant's tier, with its own overrides. The database resolves them in the statement that counts, so
a change takes effect with its commit, whatever a process has cached. The database's clock and time zones decide which
period a use falls in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID
from weakref import WeakValueDictionary

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..config import Limit, TenancyConfig
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..control.lookup import find_tenant_id, resolve_tenant_id
from ..control.models import tenants
from ..errors import QuotaError, QuotaExceededError, TenancyError, TenantNotFoundError, UnknownQuotaError
from ..events import EventBus, QuotaRefused, QuotaThresholdReached, TenantUpdated
from ..tenant import Status, Tenant, TenantRef
from .blocks import POLL_SECONDS, RECLAIM_SECONDS, BlockManager, LeasedQuota, check_amount
from .holds import Hold, HoldManager
from .overrides import Override, check_overrides
from .usage import Remaining, TenantUsage, Usage

_LONGEST_KEY = 200
_DONE = frozenset({"counted", "replayed"})

_CONSUME = (
    "SELECT outcome, slug, amount_limit, period, used, nullif(ends_at, 'infinity') AS resets_at, crossed, in_blocks "
    "FROM tenancy.quota_consume($1::uuid, $2::text, $3::bigint, $4::text, $5::timestamptz)"
)
# The usual case: a use without a key, now, in a period that has begun, which reaches neither the limit nor a soft
# limit. An earlier use has noted how far that is (below), and the limits that it follows from, which must not have
# changed since.
_CONSUME_HEADROOM = """
    UPDATE tenancy.usage AS u SET used = u.used + $3::bigint
    FROM tenancy.tenants AS t JOIN tenancy.tiers AS i ON i.name = t.tier
    WHERE t.id = $1::uuid AND t.status <> 'purged' AND u.tenant_id = $1 AND u.resource = $2::text
        AND u.period_start <= statement_timestamp() AND u.period_end > statement_timestamp() AND u.closed_at IS NULL
        AND u.used + $3 < u.headroom_below
        AND u.headroom_tier IS NOT DISTINCT FROM i.limits -> $2
        AND u.headroom_override IS NOT DISTINCT FROM t.quotas -> $2
        AND u.headroom_reached = u.soft_reached AND u.headroom_soft_limit IS NOT DISTINCT FROM u.soft_limit
    RETURNING u.headroom_limit AS amount_limit, u.period, u.used, nullif(u.period_end, 'infinity') AS resets_at
    """
_CONSUME_NOW = (
    "SELECT outcome, slug, amount_limit, period, used, nullif(ends_at, 'infinity') AS resets_at, crossed, in_blocks "
    "FROM tenancy.quota_consume_and_look_ahead($1::uuid, $2::text, $3::bigint)"
)
_RELEASE = text(
    "SELECT *, nullif(ends_at, 'infinity') AS resets_at FROM tenancy.quota_release("
    "CAST(:tenant_id AS uuid), :resource, CAST(:amount AS bigint), CAST(:at AS timestamptz))"
)
_USAGE = text(
    "SELECT resource, used, amount_limit, period, nullif(ends_at, 'infinity') AS resets_at "
    "FROM tenancy.quota_usage(CAST(:tenant_id AS uuid), CAST(:at AS timestamptz))"
)
_MEASURE = text(
    "SELECT *, nullif(ends_at, 'infinity') AS resets_at FROM tenancy.quota_measure("
    "CAST(:tenant_id AS uuid), :resource, CAST(:value AS bigint))"
)
_MEASURE_MANY = text(
    "SELECT m.id AS tenant_id, q.*, nullif(q.ends_at, 'infinity') AS resets_at "
    "FROM unnest(CAST(:ids AS uuid[]), CAST(:values AS bigint[])) WITH ORDINALITY AS m (id, value, position) "
    "CROSS JOIN LATERAL tenancy.quota_measure(m.id, :resource, m.value) AS q ORDER BY m.position"
)
_UTILISATION = text(
    "SELECT *, nullif(ends_at, 'infinity') AS resets_at FROM tenancy.quota_utilisation(CAST(:at AS timestamptz)) "
    "WHERE CAST(:resource AS text) IS NULL OR resource = :resource ORDER BY fraction DESC, slug, resource LIMIT :limit"
)
_AT_RISK = text(
    "SELECT *, nullif(ends_at, 'infinity') AS resets_at FROM tenancy.quota_at_risk("
    "CAST(:fraction AS double precision), CAST(:at AS timestamptz)) ORDER BY fraction DESC, slug, resource LIMIT :limit"
)
_CLEAN = (
    "DELETE FROM tenancy.usage_keys WHERE created_at < now() - make_interval(secs => 86400 * :days)",
    # where usage is billed, unbilled periods are kept
    (
        "DELETE FROM tenancy.usage WHERE period_end < now() - make_interval(secs => 86400 * :days) "
        "AND (closed_at IS NOT NULL OR NOT (CAST(:bills AS boolean) OR EXISTS (SELECT 1 FROM tenancy.usage_records)))"
    ),
    "DELETE FROM tenancy.quota_holds WHERE expires_at < now() - make_interval(secs => 86400 * :days)",
    "DELETE FROM tenancy.quota_blocks WHERE expires_at < now() - make_interval(secs => 86400 * :days)",
)
_LIMITS = text("SELECT resource, amount, period, soft FROM tenancy.quota_limits(CAST(:tenant_id AS uuid))")


class QuotaManager:
    """Sets limits and counts what is used; ``tenancy.quotas``.

    ``tenant`` arguments accept a slug, an id or a ``Tenant``; an id or a ``Tenant`` saves a look-up.
    """

    def __init__(
        self,
        control: ControlDatabase,
        config: TenancyConfig,
        events: EventBus,
        audit: AuditLog,
    ) -> None:
        self._control = control
        self._config = config
        self._events = events
        self._audit = audit
        self._blocks = BlockManager(control, self._handle_outcome)
        self._holds = HoldManager(control)
        # quotas in use; those with a block are also referenced by _blocks
        self._leased: WeakValueDictionary[tuple[UUID, str], LeasedQuota] = WeakValueDictionary()

    async def close(self) -> None:
        """Return every block; where the control database does not answer, they stay counted as used."""
        self._control.home.check()
        await self._holds.close()
        await self._blocks.close()

    def invalidate(self, tenant_id: UUID | None) -> None:
        """Return the blocks of a tenant (None: of all tenants) before more is used: the limits may have changed."""
        self._control.home.check()
        for quota in list(self._leased.values()):
            if tenant_id is None or quota.tenant_id == tenant_id:
                quota.expire()

    # --- limits -----------------------------------------------------------------------------------------------------

    async def set(
        self, tenant: TenantRef, overrides: Mapping[str, Override], *, actor: Actor = SYSTEM
    ) -> dict[str, Limit]:
        """Override limits of the tenant's tier; returns the limits now in force.

        The change takes effect with the commit, in every process.

        Args:
            tenant: The tenant with these limits.
            overrides: By resource: an amount, a ``Limit``, a mapping such as ``{"amount": 500, "period": "day"}`` (an
                amount of None is no limit), or None to fall back to the tier. Other resources keep their overrides.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: no such tenant.
            ConfigurationError: an override is malformed.
        """
        checked = check_overrides(overrides)
        removed = {name for name, value in overrides.items() if value is None}
        async with self._control.transaction() as connection:
            tenant_id = await find_tenant_id(connection, tenant)
            unpurged = (tenants.c.id == tenant_id) & (tenants.c.status != Status.PURGED)
            query = select(tenants.c.slug, tenants.c.quotas).where(unpurged).with_for_update()
            row = (await connection.execute(query)).one_or_none()
            if row is None:
                raise TenantNotFoundError(tenant_id)
            before = dict(row.quotas)
            after = {name: value for name, value in before.items() if name not in removed} | checked
            if after != before:
                await connection.execute(update(tenants).where(tenants.c.id == tenant_id).values(quotas=after))
            limits = _limits((await connection.execute(_LIMITS, {"tenant_id": tenant_id})).all())
            if after != before:
                await self._audit.append(
                    connection,
                    action="quota.set",
                    tenant_id=tenant_id,
                    slug=row.slug,
                    actor=actor,
                    before={"quotas": before},
                    after={"quotas": after},
                )
        if after != before:
            self._events.emit(TenantUpdated(tenant_id=tenant_id, slug=row.slug, fields=("quotas",)))
        return limits

    async def limits(self, tenant: TenantRef) -> dict[str, Limit]:
        """Return the tenant's limits by resource: its tier's, with its own overrides applied.

        Raises:
            TenantNotFoundError: no such tenant.
        """
        async with self._control.connect() as connection:
            tenant_id = await find_tenant_id(connection, tenant)
            return _limits((await connection.execute(_LIMITS, {"tenant_id": tenant_id})).all())

    # --- usage ------------------------------------------------------------------------------------------------------

    async def usage(self, tenant: TenantRef, *, at: datetime | None = None) -> list[Usage]:
        """Return what the tenant has used of each resource that it has a quota for, sorted by name.

        Args:
            tenant: The tenant that has used it.
            at: A time in the periods to report, an aware datetime; now where None.

        Raises:
            TenantNotFoundError: no such tenant.
            ValueError: ``at`` is naive.
        """
        _check_time(at)
        tenant_id = await resolve_tenant_id(self._control, tenant)
        async with self._control.viewing(tenant_id) as connection:
            rows = (await connection.execute(_USAGE, {"tenant_id": tenant_id, "at": at})).all()
            if not rows:
                await self._check_exists(connection, tenant_id)
        return [Usage(row.resource, row.used, row.amount_limit, row.period, row.resets_at) for row in rows]

    async def check(self, tenant: TenantRef, resource: str, amount: int = 1) -> Remaining:
        """Return whether ``amount`` more would fit now. Reserves nothing: only ``consume`` decides.

        Raises:
            TenantNotFoundError: no such tenant.
            UnknownQuotaError: the resource has no limit for this tenant.
        """
        check_amount(amount)
        for usage in await self.usage(tenant):
            if usage.resource == resource:
                return Remaining(usage, amount)
        raise UnknownQuotaError(resource, tenant=_name(tenant))

    async def consume(
        self, tenant: TenantRef, resource: str, amount: int = 1, *, key: str | None = None, at: datetime | None = None
    ) -> Usage:
        """Count ``amount`` more as used, or refuse all of it.

        One statement on one locked row checks the limit and counts: over any number of processes exactly as much as the
        limit is admitted, never one more or less.

        Args:
            tenant: Who uses it.
            resource: What is used.
            amount: How much, at least 1.
            key: An idempotency key of 1 to 200 characters: calls with the same key count once.
            at: The time of the use, an aware datetime; the database's clock where None.

        Raises:
            TenantNotFoundError: no such tenant.
            UnknownQuotaError: the resource has no limit for this tenant.
            QuotaExceededError: it would pass the limit; nothing was counted.
            QuotaError: the limit is one on concurrency, its period has been closed for billing, or the key was used
                for another amount or resource.
            ValueError: ``amount`` is not a whole number from 1 to 10**15, ``key`` is too long, or ``at`` is naive.
        """
        check_amount(amount)
        _check_key(key)
        _check_time(at)
        tenant_id = await resolve_tenant_id(self._control, tenant)
        statement = _CONSUME
        rest: tuple[object, ...] = (key, at)
        if key is None and at is None:
            for counted in await self._control.fetch(_CONSUME_HEADROOM, tenant_id, resource, amount):
                return Usage(resource, counted.used, counted.amount_limit, counted.period, counted.resets_at)
            statement, rest = _CONSUME_NOW, ()
        (row,) = await self._control.fetch(statement, tenant_id, resource, amount, *rest)
        deadline = time.monotonic() + RECLAIM_SECONDS
        while row.outcome == "exceeded" and row.in_blocks and time.monotonic() < deadline:
            # processes with unspent blocks return them at their next heartbeat
            await asyncio.sleep(POLL_SECONDS)
            (row,) = await self._control.fetch(statement, tenant_id, resource, amount, *rest)
        return self._handle_outcome(tenant_id, resource, amount, row)

    def leased(self, tenant: UUID | Tenant, resource: str, *, block: int = 100) -> LeasedQuota:
        """Return this process's part of a quota, counted in memory: for what is used thousands of times a second.

        ``await quotas.leased(tenant, "api_calls").consume()`` takes a microsecond or two while the current block covers
        it. The limit is never passed. Usage and soft limits run ahead by the unspent part of the blocks. A process that
        dies loses at most ``block``, or the amount of one call beyond it. A lowered limit reaches a process with its
        next block, or with the notification of the change.

        Args:
            tenant: The tenant with this quota, by id or as a ``Tenant``.
            resource: Which.
            block: How much is taken at once; less near the limit. The value of the first call applies while the result
                is in use.

        Raises:
            TypeError: ``tenant`` is a slug, which would need a query.
            ValueError: ``block`` is not a whole number from 1 to 10**15.
        """
        refuse_other_tenant(tenant)
        given: object = tenant
        if isinstance(given, str):
            raise TypeError("leased() takes a Tenant or its id, not a slug: it does not query the database")
        check_amount(block, what="a block")
        key = (tenant.id if isinstance(tenant, Tenant) else tenant, resource)
        quota = self._leased.get(key)
        if quota is None:
            quota = self._leased[key] = LeasedQuota(self._blocks, *key, block)
        return quota

    @asynccontextmanager
    async def hold(self, tenant: TenantRef, resource: str, amount: int = 1) -> AsyncIterator[Hold]:
        """Hold ``amount`` of a resource with a "concurrent" limit while the body runs.

        The holds of a process that dies expire after ``holds.HOLD_SECONDS``. A long body can check ``Hold.lost``: the
        hold could not be renewed in time, and its place may have been given to another one.

        Raises:
            TenantNotFoundError: no such tenant.
            UnknownQuotaError: the resource has no limit for this tenant.
            QuotaError: the limit is not one on concurrency.
            QuotaExceededError: no place is free.
        """
        check_amount(amount)
        tenant_id = await resolve_tenant_id(self._control, tenant)
        hold = Hold()
        async with self._holds.releasing(hold):
            row = await self._holds.acquire(hold, tenant_id, resource, amount)
            self._handle_outcome(tenant_id, resource, amount, row)
            yield hold

    async def measure(self, tenant: TenantRef, resource: str, value: int) -> Usage:
        """Set the usage to a measured value, such as the size of a database, whatever the limit.

        Raises:
            TenantNotFoundError: no such tenant.
            UnknownQuotaError: the resource has no limit for this tenant.
            ValueError: ``value`` is not a whole number from 0 to 10**15.
        """
        check_amount(value, least=0)
        async with self._control.connect() as connection:
            tenant_id = await find_tenant_id(connection, tenant)
            parameters = {"tenant_id": tenant_id, "resource": resource, "value": value}
            row = (await connection.execute(_MEASURE, parameters)).one()
        return self._handle_outcome(tenant_id, resource, value, row)

    async def measure_many(self, resource: str, values: Mapping[UUID, int]) -> int:
        """Record measured values of many tenants in one statement; returns how many have a quota for ``resource``."""
        for tenant_id in values:
            refuse_other_tenant(tenant_id)
        for value in values.values():
            check_amount(value, least=0)
        # sorted, so that two calls at once cannot deadlock
        ordered = sorted(values.items())
        parameters = {"resource": resource, "ids": [i for i, _ in ordered], "values": [v for _, v in ordered]}
        async with self._control.connect() as connection:
            rows = (await connection.execute(_MEASURE_MANY, parameters)).all()
        counted = [row for row in rows if row.outcome == "counted"]
        for row in counted:
            self._handle_outcome(row.tenant_id, resource, row.used, row)
        return len(counted)

    async def release(self, tenant: TenantRef, resource: str, amount: int = 1, *, at: datetime | None = None) -> Usage:
        """Reduce the usage by ``amount``, at most to 0: a user was removed, a call failed.

        Raises:
            TenantNotFoundError: no such tenant.
            UnknownQuotaError: the resource has no limit for this tenant.
            QuotaError: the limit is one on concurrency, or its period has been closed for billing.
            ValueError: ``amount`` is not a whole number from 1 to 10**15, or ``at`` is naive.
        """
        check_amount(amount)
        _check_time(at)
        async with self._control.connect() as connection:
            tenant_id = await find_tenant_id(connection, tenant)
            parameters = {"tenant_id": tenant_id, "resource": resource, "amount": amount, "at": at}
            row = (await connection.execute(_RELEASE, parameters)).one()
        return self._handle_outcome(tenant_id, resource, amount, row)

    # --- over all tenants -------------------------------------------------------------------------------------------

    async def utilisation(
        self, *, resource: str | None = None, limit: int = 1_000, at: datetime | None = None
    ) -> list[TenantUsage]:
        """Return the tenants that use most of a limit, highest fraction first.

        Args:
            resource: Only this resource.
            limit: How many at most.
            at: A time in the periods to report, an aware datetime; now where None.
        """
        refuse_while_bound("reading the usage of all tenants")
        _check_time(at)
        async with self._control.connect() as connection:
            rows = (await connection.execute(_UTILISATION, {"resource": resource, "limit": limit, "at": at})).all()
        return [_tenant_usage(row) for row in rows]

    async def at_risk(
        self, fraction: float = 0.8, *, limit: int = 1_000, at: datetime | None = None
    ) -> list[TenantUsage]:
        """Return the tenants that have used ``fraction`` of a limit or more, highest fraction first."""
        refuse_while_bound("reading the usage of all tenants")
        _check_time(at)
        async with self._control.connect() as connection:
            rows = (await connection.execute(_AT_RISK, {"fraction": fraction, "limit": limit, "at": at})).all()
        return [_tenant_usage(row) for row in rows]

    async def clean(self, *, keys_days: float = 7, usage_days: float = 400) -> int:
        """Remove idempotency keys and ended periods of this age, and the holds and blocks of dead processes.

        Where usage is exported for billing, a period is kept until its usage record has been made.

        Safe to run from many processes at once. Returns how many rows were removed.
        """
        refuse_while_bound("removing old usage")
        bills = self._config.metering.usage_sender is not None
        async with self._control.transaction() as connection:
            return sum(
                [
                    (await connection.execute(text(statement), {"days": days, "bills": bills})).rowcount
                    for statement, days in zip(_CLEAN, (keys_days, usage_days, 1, 1), strict=True)
                ]
            )

    # --- internals --------------------------------------------------------------------------------------------------

    def _handle_outcome(self, tenant_id: UUID, resource: str, amount: int, row: Any) -> Usage:
        """Return the usage or raise the error in the database's answer, and emit events for soft limits reached."""
        if row.outcome not in _DONE:
            raise self._refusal(tenant_id, resource, amount, row)
        for fraction in row.crossed or ():
            self._events.emit(
                QuotaThresholdReached(
                    tenant_id=tenant_id,
                    slug=row.slug,
                    resource=resource,
                    fraction=fraction,
                    limit=row.amount_limit,
                    used=row.used,
                )
            )
        return Usage(resource, row.used, row.amount_limit, row.period, row.resets_at)

    def _refusal(self, tenant_id: UUID, resource: str, amount: int, row: Any) -> TenancyError:
        """Return the error in the database's answer, and emit the event for a limit that would be passed."""
        if row.outcome == "no_tenant":
            return TenantNotFoundError(tenant_id)
        if row.outcome == "unknown":
            return UnknownQuotaError(resource, tenant=row.slug)
        if row.outcome == "period":
            verb = "hold" if row.period == "concurrent" else "consume"
            return QuotaError(f"quota {resource!r} of tenant {row.slug!r} is per {row.period}: use {verb}()")
        if row.outcome == "closed":
            return QuotaError(
                f"quota {resource!r} of tenant {row.slug!r}: the period has been closed for billing, and cannot change"
            )
        if row.outcome == "mismatched":
            return QuotaError(
                f"the idempotency key of this use of {resource!r} by tenant {row.slug!r} has counted another amount or "
                "resource: give every use its own key"
            )
        self._events.emit(
            QuotaRefused(tenant_id=tenant_id, slug=row.slug, resource=resource, limit=row.amount_limit, used=row.used)
        )
        return QuotaExceededError(
            tenant=row.slug,
            resource=resource,
            limit=row.amount_limit,
            used=row.used,
            requested=amount,
            resets_at=row.resets_at,
            period=row.period,
        )

    async def _check_exists(self, connection: AsyncConnection, tenant_id: UUID) -> None:
        known = select(tenants.c.id).where(tenants.c.id == tenant_id, tenants.c.status != Status.PURGED)
        if await connection.scalar(known) is None:
            raise TenantNotFoundError(tenant_id)


def _check_key(key: str | None) -> None:
    if key is not None and (not 1 <= len(key) <= _LONGEST_KEY or "\0" in key):
        raise ValueError(f"an idempotency key must have 1 to {_LONGEST_KEY} characters, none of them NUL, not {key!r}")


def _check_time(at: datetime | None) -> None:
    # the driver would read a naive time in the time zone of this machine
    if at is not None and at.utcoffset() is None:
        raise ValueError(f"a time must be aware, such as datetime.now(UTC): {at!r} is not")


def _tenant_usage(row: Any) -> TenantUsage:
    usage = Usage(row.resource, row.used, row.amount_limit, row.period, row.resets_at)
    return TenantUsage(row.tenant_id, row.slug, row.tier, row.fraction, usage)


def _limits(rows: Any) -> dict[str, Limit]:
    return {row.resource: Limit(row.amount, row.period, tuple(row.soft)) for row in rows}


def _name(tenant: TenantRef) -> str:
    return tenant.slug if isinstance(tenant, Tenant) else str(tenant)
