"""Quotas on a real PostgreSQL: limits, periods, counting, soft limits, concurrency, leases."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Coroutine
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import text

from tenancy_orm.audit.actor import Actor
from tenancy_orm.config import Limit, Tier
from tenancy_orm.control.notifications import Change
from tenancy_orm.errors import (
    ConfigurationError,
    QuotaError,
    QuotaExceededError,
    TenantNotFoundError,
    UnknownQuotaError,
)
from tenancy_orm.events import QuotaRefused, QuotaThresholdReached, TenantUpdated
from tenancy_orm.quotas.usage import Usage
from tenancy_orm.tenant import Tenant
from tests.support.quotas import QuotaPlane, quota_plane
from tests.support.registry import synchronise
from tests.support.waiting import HANGS, until

TIERS = {
    "free": Tier(
        "free",
        {
            "users": Limit(3),
            "api_calls": Limit(10, "day"),
            "emails": Limit(100, "month", soft=(0.5, 0.9)),
            "jobs": Limit(2, "concurrent"),
            "views": Limit(None, "day"),
        },
    ),
    "pro": Tier("pro", {"users": Limit(50), "api_calls": Limit(1_000, "day")}),
}


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[QuotaPlane]:
    async with quota_plane(control_url, tiers=TIERS) as opened:
        yield opened


async def usage_of(plane: QuotaPlane, tenant: Any, resource: str, **options: Any) -> Usage:
    """The tenant's usage of one resource."""
    return next(usage for usage in await plane.quotas.usage(tenant, **options) if usage.resource == resource)


# --- limits ---------------------------------------------------------------------------------------------------------


async def test_limits_come_from_the_tier_and_overrides_replace_what_they_name(plane: QuotaPlane) -> None:
    """A number the amount, an object its own fields; other resources keep theirs."""
    tenant = await plane.tenant(quotas={"users": 7, "emails": {"period": "day"}, "extra": {"amount": 1, "soft": []}})
    limits = await plane.quotas.limits("acme")
    assert limits == await plane.quotas.limits(tenant) == await plane.quotas.limits(tenant.id)
    assert limits["users"] == Limit(7)
    assert limits["emails"] == Limit(100, "day", (0.5, 0.9))
    assert limits["extra"] == Limit(1, soft=())
    assert limits["api_calls"] == Limit(10, "day")
    assert limits["views"] == Limit(None, "day")


async def test_setting_limits_is_audited_and_announced(plane: QuotaPlane) -> None:
    """In the transaction of the change; what changes nothing is neither."""
    tenant = await plane.tenant()
    ada = Actor("operator", "ada")
    limits = await plane.quotas.set("acme", {"users": 5, "emails": {"amount": 7, "period": "day"}}, actor=ada)
    assert limits["users"].amount == 5
    await plane.quotas.set(tenant, {"users": 5}, actor=ada)
    [event] = await plane.audit.events(action="quota.set")
    assert (event.tenant_id, event.actor) == (tenant.id, ada)
    assert event.before == {"quotas": {}}
    assert event.after == {"quotas": {"users": 5, "emails": {"amount": 7, "period": "day"}}}
    assert [found.fields for found in plane.of(TenantUpdated)] == [("quotas",)]
    limits = await plane.quotas.set(tenant, {"users": None})
    assert limits["users"].amount == 3 and limits["emails"].amount == 7


async def test_a_change_takes_effect_at_once_whatever_the_caller_still_holds(plane: QuotaPlane) -> None:
    """The limit is read by the statement that counts: another process, or an old Tenant, cannot be stale."""
    stale = await plane.tenant()
    async with quota_plane(plane.config.control_url, initialise=False, tiers=TIERS) as other:
        for _ in range(3):
            await other.quotas.consume(stale, "users")
        with pytest.raises(QuotaExceededError):
            await other.quotas.consume(stale, "users")
        await plane.quotas.set(stale, {"users": 4})
        assert (await other.quotas.consume(stale, "users")).used == 4
        await plane.sql("UPDATE tenancy.tenants SET tier = 'pro', quotas = '{}'")
        assert (await other.quotas.consume(stale, "users")).limit == 50
        await plane.sql("UPDATE tenancy.tenants SET tier = 'free'")
        with pytest.raises(QuotaExceededError) as caught:
            await other.quotas.consume(stale, "users")
        assert (caught.value.used, caught.value.limit) == (5, 3)


async def test_a_change_is_notified(plane: QuotaPlane) -> None:
    """Every process that caches the tenant is notified of it, and of nothing else: usage never goes through NOTIFY."""
    tenant = await plane.tenant()
    payloads: asyncio.Queue[str] = asyncio.Queue()
    async with plane.control.engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.add_listener("tenancy", lambda *arguments: payloads.put_nowait(arguments[3]))
        await plane.quotas.consume(tenant, "users")
        async with plane.quotas.hold(tenant, "jobs"):
            await plane.quotas.leased(tenant, "api_calls").consume()
        await plane.quotas.set(tenant, {"users": 9})
        async with asyncio.timeout(HANGS):
            assert str(tenant.id) in await payloads.get()
    assert payloads.empty()


async def test_who_and_what_must_exist(plane: QuotaPlane) -> None:
    """By errors that say which of the two does not."""
    tenant = await plane.tenant()
    for missing in ("nobody", uuid4()):
        calls: list[Coroutine[Any, Any, object]] = [
            plane.quotas.consume(missing, "users"),
            plane.quotas.release(missing, "users"),
            plane.quotas.usage(missing),
            plane.quotas.check(missing, "users"),
            plane.quotas.set(missing, {"users": 1}),
            plane.quotas.measure(missing, "users", 1),
        ]
        for call in calls:
            with pytest.raises(TenantNotFoundError):
                await call
    calls = [
        plane.quotas.consume(tenant, "unicorns"),
        plane.quotas.release(tenant, "unicorns"),
        plane.quotas.check(tenant, "unicorns"),
        plane.quotas.leased(tenant, "unicorns").consume(),
    ]
    for call in calls:
        with pytest.raises(UnknownQuotaError, match="unicorns"):
            await call
    with pytest.raises(ConfigurationError):
        await plane.quotas.set(tenant, {"users": -1})


async def test_what_cannot_be_counted_is_refused_before_the_database_is_asked(plane: QuotaPlane) -> None:
    """By a ValueError: whole numbers alone, keys that fit, times that mean one instant."""
    tenant = await plane.tenant()
    share = plane.quotas.leased(tenant, "views")
    await share.consume()
    bad: tuple[Any, ...] = (0, -1, 10**16, 1.5, 0.5, 1.0, True, "1", float("nan"), float("inf"))
    for amount in bad:
        calls: list[Coroutine[Any, Any, object]] = [
            plane.quotas.consume(tenant, "users", amount),
            plane.quotas.release(tenant, "users", amount),
            plane.quotas.check(tenant, "users", amount),
            share.consume(amount),
            plane.quotas.hold(tenant, "jobs", amount).__aenter__(),
        ]
        if amount != 0:
            calls += [
                plane.quotas.measure(tenant, "users", amount),
                plane.quotas.measure_many("users", {tenant.id: amount}),
            ]
        for call in calls:
            with pytest.raises(ValueError, match="whole number"):
                await call
        assert not share.try_consume(amount)
    assert share.unspent == 99
    for key in ("", "x" * 201, "a\0b"):
        with pytest.raises(ValueError, match="key"):
            await plane.quotas.consume(tenant, "users", key=key)
    naive = datetime(2026, 1, 1)  # noqa: DTZ001 - what is refused
    calls = [
        plane.quotas.consume(tenant, "users", at=naive),
        plane.quotas.release(tenant, "users", at=naive),
        plane.quotas.usage(tenant, at=naive),
        plane.quotas.utilisation(at=naive),
        plane.quotas.at_risk(at=naive),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="aware"):
            await call
    assert (await plane.quotas.consume(tenant, "users", key="x" * 200)).used == 1


async def test_a_slug_cannot_be_leased(plane: QuotaPlane) -> None:
    """It makes no look-up; the error says what to pass instead."""
    slug: Any = (await plane.tenant()).slug
    with pytest.raises(TypeError, match="Tenant or its id"):
        plane.quotas.leased(slug, "api_calls")


async def test_a_purged_tenant_uses_nothing(plane: QuotaPlane) -> None:
    """It is not found, as if it had never been."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "users")
    await plane.sql("UPDATE tenancy.tenants SET status = 'deleted'")
    await plane.sql("UPDATE tenancy.tenants SET status = 'purged'")
    calls: list[Coroutine[Any, Any, object]] = [
        plane.quotas.consume(tenant.id, "users"),
        plane.quotas.release(tenant.id, "users"),
        plane.quotas.measure(tenant.id, "users", 1),
        plane.quotas.usage(tenant.id),
        plane.quotas.leased(tenant.id, "api_calls").consume(),
        plane.quotas.hold(tenant.id, "jobs").__aenter__(),
    ]
    for call in calls:
        with pytest.raises(TenantNotFoundError):
            await call


async def test_limits_of_a_tier_that_change_are_announced_to_every_process(plane: QuotaPlane) -> None:
    """By a change of anything, since it may concern any tenant; writing the same limits again is none."""
    payloads: asyncio.Queue[str] = asyncio.Queue()
    addresses = {"default": ("127.0.0.1", 5432)}
    async with plane.control.engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.add_listener("tenancy", lambda *arguments: payloads.put_nowait(arguments[3]))
        await synchronise(plane.control, TIERS, addresses)
        await synchronise(plane.control, {**TIERS, "pro": Tier("pro", {"users": Limit(40)})}, addresses)
        async with asyncio.timeout(HANGS):
            change = Change.parse(await payloads.get())
        await synchronise(plane.control, {**TIERS, "pro": Tier("pro", {"users": Limit(40)})}, addresses)
        # notifications arrive in the order of the commits
        await plane.sql("NOTIFY tenancy, 'last'")
        async with asyncio.timeout(HANGS):
            assert await payloads.get() == "last"
    assert (change.tenant_id, change.key_id, change.kind) == (None, None, "tier")


# --- counting -------------------------------------------------------------------------------------------------------


async def test_use_is_counted_up_to_the_limit_and_refused_past_it(plane: QuotaPlane) -> None:
    """The refusal says how much was used, asked for and allowed, and when it resets; nothing is counted."""
    tenant = await plane.tenant()
    assert await plane.quotas.check(tenant, "api_calls", 10)
    used = await plane.quotas.consume(tenant, "api_calls", 8)
    assert (used.used, used.limit, used.remaining, used.period) == (8, 10, 2, "day")
    assert not await plane.quotas.check(tenant, "api_calls", 3)
    with pytest.raises(QuotaExceededError) as caught:
        await plane.quotas.consume(tenant, "api_calls", 3)
    error = caught.value
    assert (error.tenant, error.resource, error.limit, error.used, error.requested) == ("acme", "api_calls", 10, 8, 3)
    assert error.resets_at is not None and timedelta(0) < error.resets_at - datetime.now(UTC) <= timedelta(days=1)
    assert (await plane.quotas.consume(tenant, "api_calls", 2)).used == 10
    assert [event.resource for event in plane.of(QuotaRefused)] == ["api_calls"]


async def test_tenants_and_resources_are_counted_apart(plane: QuotaPlane) -> None:
    """One tenant's use is nobody else's."""
    acme, globex = await plane.tenant("acme"), await plane.tenant("globex")
    await plane.quotas.consume(acme, "users", 3)
    assert (await plane.quotas.consume(globex, "users")).used == 1
    assert (await usage_of(plane, acme, "api_calls")).used == 0


async def test_what_is_released_can_be_used_again(plane: QuotaPlane) -> None:
    """Down to zero and no further."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "users", 3)
    assert (await plane.quotas.release(tenant, "users")).used == 2
    assert (await plane.quotas.consume(tenant, "users")).used == 3
    assert (await plane.quotas.release(tenant, "users", 99)).used == 0
    assert (await plane.quotas.release(tenant, "api_calls")).used == 0


async def test_a_key_makes_a_repeated_call_count_once(plane: QuotaPlane) -> None:
    """Also when two arrive at the same moment; a refused call leaves the key free."""
    tenant = await plane.tenant()
    for _ in range(3):
        assert (await plane.quotas.consume(tenant, "api_calls", 2, key="order-1")).used == 2
    await asyncio.gather(*(plane.quotas.consume(tenant, "api_calls", key="order-2") for _ in range(8)))
    assert (await usage_of(plane, tenant, "api_calls")).used == 3
    with pytest.raises(QuotaExceededError):
        await plane.quotas.consume(tenant, "api_calls", 8, key="order-3")
    await plane.quotas.set(tenant, {"api_calls": 20})
    assert (await plane.quotas.consume(tenant, "api_calls", 8, key="order-3")).used == 11
    other = await plane.tenant("globex")
    assert (await plane.quotas.consume(other, "api_calls", key="order-1")).used == 1


async def test_a_key_of_another_use_is_refused(plane: QuotaPlane) -> None:
    """Another amount or resource under the same key is a mistake of the caller's, and nothing is counted."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "api_calls", 2, key="order-1")
    for resource, amount in (("api_calls", 3), ("users", 2)):
        with pytest.raises(QuotaError, match="another amount or resource"):
            await plane.quotas.consume(tenant, resource, amount, key="order-1")
    assert (await usage_of(plane, tenant, "api_calls")).used == 2
    assert (await usage_of(plane, tenant, "users")).used == 0


async def test_a_first_use_past_the_limit_is_refused(plane: QuotaPlane) -> None:
    """Also where the unlocked look could not tell, since a lease may be returned."""
    tenant = await plane.tenant()
    await plane.sql(
        "INSERT INTO tenancy.quota_blocks (id, tenant_id, resource, period, period_start, unspent, expires_at) "
        "SELECT gen_random_uuid(), :id, 'api_calls', 'day', p.starts_at, 1, now() + interval '1 second' "
        "FROM tenancy.quota_period('day', 'UTC', now()) AS p",
        id=tenant.id,
    )
    with pytest.raises(QuotaExceededError):
        await plane.quotas.consume(tenant, "api_calls", 11)
    assert (await usage_of(plane, tenant, "api_calls")).used == 0


async def test_no_limit_is_counted_all_the_same(plane: QuotaPlane) -> None:
    """For billing."""
    tenant = await plane.tenant()
    usage = await plane.quotas.consume(tenant, "views", 10**12)
    assert (usage.used, usage.limit, usage.remaining) == (10**12, None, None)


async def test_hammering_on_a_limit_writes_nothing(plane: QuotaPlane) -> None:
    """A tenant past its limit costs the control database a read, not a row version per call."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "api_calls", 10)
    # a caught-up insert position, whatever wrote last
    before = (await plane.sql("SELECT pg_current_wal_insert_lsn(), xmin, ctid FROM tenancy.usage"))[0]
    for _ in range(20):
        with pytest.raises(QuotaExceededError):
            await plane.quotas.consume(tenant, "api_calls", key="x")
    after = (await plane.sql("SELECT pg_current_wal_insert_lsn(), xmin, ctid FROM tenancy.usage"))[0]
    assert after[1:] == before[1:]


async def test_hammering_on_a_limit_writes_nothing_after_a_crash(plane: QuotaPlane) -> None:
    """A dead process's lease, which nobody will return, is not asked for once it has expired."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "api_calls", 10)
    await plane.sql(
        "INSERT INTO tenancy.quota_blocks (id, tenant_id, resource, period, period_start, unspent, expires_at) "
        "SELECT gen_random_uuid(), tenant_id, resource, period, period_start, 1, now() FROM tenancy.usage"
    )
    before = (await plane.sql("SELECT xmin, ctid FROM tenancy.usage"))[0]
    for _ in range(3):
        with pytest.raises(QuotaExceededError):
            await plane.quotas.consume(tenant, "api_calls")
        with pytest.raises(QuotaExceededError):
            await plane.quotas.leased(tenant, "api_calls").consume()
    assert (await plane.sql("SELECT xmin, ctid FROM tenancy.usage"))[0] == before


async def test_a_limit_of_zero_admits_nothing(plane: QuotaPlane) -> None:
    """And raises no soft limit."""
    tenant = await plane.tenant(quotas={"users": 0})
    with pytest.raises(QuotaExceededError):
        await plane.quotas.consume(tenant, "users")
    assert plane.of(QuotaThresholdReached) == []


async def test_a_measure_is_what_it_is(plane: QuotaPlane) -> None:
    """Up and down, past the limit too; each soft limit again once it has been left by a tenth."""
    tenant = await plane.tenant(quotas={"storage_bytes": 1_000})
    for value in (500, 850, 790, 860, 1_200, 600, 900):
        assert (await plane.quotas.measure(tenant, "storage_bytes", value)).used == value
    assert [(event.fraction, event.used) for event in plane.of(QuotaThresholdReached)] == [
        (0.8, 850),
        (1.0, 1_200),
        (0.8, 900),
    ]
    assert await plane.quotas.measure_many("storage_bytes", {tenant.id: 5, uuid4(): 6}) == 1
    assert (await usage_of(plane, tenant, "storage_bytes")).used == 5


# --- soft limits ----------------------------------------------------------------------------------------------------


async def test_soft_limits_are_announced_once_per_period_and_fraction(plane: QuotaPlane) -> None:
    """By whoever reaches them, however use goes up and down afterwards."""
    tenant = await plane.tenant()
    for amount in (49, 1, 5):
        await plane.quotas.consume(tenant, "emails", amount)
    await plane.quotas.release(tenant, "emails", 20)
    await plane.quotas.consume(tenant, "emails", 20)
    await plane.quotas.consume(tenant, "emails", 45)
    found = [(event.resource, event.fraction, event.used, event.limit) for event in plane.of(QuotaThresholdReached)]
    assert found == [("emails", 0.5, 50, 100), ("emails", 0.9, 100, 100)]
    await plane.quotas.set(tenant, {"emails": 200})
    await plane.quotas.consume(tenant, "emails")
    assert [event.fraction for event in plane.of(QuotaThresholdReached)][2:] == [0.5]
    next_month = datetime.now(UTC) + timedelta(days=40)
    await plane.quotas.consume(tenant, "emails", 190, at=next_month)
    assert [event.fraction for event in plane.of(QuotaThresholdReached)][3:] == [0.5, 0.9]


async def test_a_lifetimes_soft_limits_are_announced_again_when_use_comes_back(plane: QuotaPlane) -> None:
    """Once it was left by a tenth: a lifetime is too long for a single warning."""
    tenant = await plane.tenant(quotas={"seats": 100})
    for change in (85, -12, 12, -14, 14, 5):
        if change > 0:
            await plane.quotas.consume(tenant, "seats", change)
        else:
            await plane.quotas.release(tenant, "seats", -change)
    found = [(event.fraction, event.used) for event in plane.of(QuotaThresholdReached)]
    assert found == [(0.8, 85), (0.8, 85)]


async def test_soft_limits_on_concurrency_are_announced_once_a_day(plane: QuotaPlane) -> None:
    """However often holds come and go."""
    tenant = await plane.tenant()
    for _ in range(3):
        async with plane.quotas.hold(tenant, "jobs", 2):
            pass
    assert [event.fraction for event in plane.of(QuotaThresholdReached)] == [0.8, 1.0]
    await plane.sql("UPDATE tenancy.usage SET soft_at = soft_at - interval '25 hours'")
    for _ in range(3):
        async with plane.quotas.hold(tenant, "jobs", 2):
            pass
    assert [event.fraction for event in plane.of(QuotaThresholdReached)] == [0.8, 1.0, 0.8, 1.0]


async def test_one_call_can_reach_several_soft_limits(plane: QuotaPlane) -> None:
    """In ascending order."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "emails", 100)
    assert [event.fraction for event in plane.of(QuotaThresholdReached)] == [0.5, 0.9]


async def test_concurrent_callers_announce_a_soft_limit_once(plane: QuotaPlane) -> None:
    """The row's lock decides which of them reached it."""
    tenant = await plane.tenant()
    await asyncio.gather(*(plane.quotas.consume(tenant, "emails") for _ in range(60)))
    assert [event.fraction for event in plane.of(QuotaThresholdReached)] == [0.5]


# --- periods --------------------------------------------------------------------------------------------------------


async def test_a_day_begins_anew_in_the_tenants_time_zone(plane: QuotaPlane) -> None:
    """At its own midnight, not at the server's."""
    tenant = await plane.tenant(timezone="Asia/Tokyo")
    before = datetime(2026, 3, 9, 14, 59, 59, tzinfo=UTC)
    usage = await plane.quotas.consume(tenant, "api_calls", 10, at=before)
    assert usage.resets_at == datetime(2026, 3, 9, 15, tzinfo=UTC)
    with pytest.raises(QuotaExceededError):
        await plane.quotas.consume(tenant, "api_calls", at=before)
    assert (await plane.quotas.consume(tenant, "api_calls", at=before + timedelta(seconds=1))).used == 1
    assert (await usage_of(plane, tenant, "api_calls", at=before)).used == 10


# each has a change of its clocks at or around midnight, or none at all, or an odd offset
ZONES = {
    "UTC": date(2024, 2, 29),
    "Europe/Berlin": date(2024, 3, 31),
    "America/New_York": date(2024, 11, 3),
    "America/Havana": date(2024, 11, 3),
    "Africa/Cairo": date(2024, 4, 26),
    "Asia/Beirut": date(2022, 3, 27),
    "America/Asuncion": date(2023, 10, 1),
    "America/Santiago": date(2022, 9, 11),
    "Atlantic/Azores": date(2021, 3, 28),
    "Australia/Lord_Howe": date(2024, 4, 7),
    "Asia/Kathmandu": date(2024, 1, 1),
    "Pacific/Apia": date(2011, 12, 31),
    "America/St_Johns": date(2010, 11, 7),
    "Pacific/Kiritimati": date(2024, 12, 31),
}


def midnight(day: date, zone: ZoneInfo) -> datetime:
    """The first instant at which the clocks of a zone show ``day``, found by looking at every quarter of an hour."""
    start = datetime(day.year, day.month, day.day, tzinfo=UTC) - timedelta(hours=15)
    instants = (start + timedelta(minutes=15 * step) for step in range(4 * 48))
    return next(instant for instant in instants if instant.astimezone(zone).date() >= day)


@pytest.mark.parametrize("name", ZONES)
async def test_days_and_months_follow_daylight_saving(plane: QuotaPlane, name: str) -> None:
    """The database's periods are those of zoneinfo, around every change of the clocks, without a gap or an overlap."""
    zone, around = ZoneInfo(name), ZONES[name]
    for offset in range(-2, 4):
        day = around + timedelta(days=offset)
        first, last = midnight(day, zone), midnight(day + timedelta(days=1), zone)
        if first == last:
            continue  # a day that never was
        for instant in (first, first + (last - first) / 2, last - timedelta(microseconds=1)):
            rows = await plane.sql(
                "SELECT starts_at, ends_at FROM tenancy.quota_period('day', :zone, :at)", zone=name, at=instant
            )
            assert rows == [(first, last)], day
            rows = await plane.sql(
                "SELECT starts_at, ends_at FROM tenancy.quota_period('month', :zone, :at)", zone=name, at=instant
            )
            month = day.replace(day=1)
            after = (month + timedelta(days=32)).replace(day=1)
            assert rows == [(midnight(month, zone), midnight(after, zone))], day


async def test_moving_its_time_zone_gives_a_tenant_no_second_quota(plane: QuotaPlane) -> None:
    """A period that was begun is finished first."""
    tenant = await plane.tenant()
    usage = await plane.quotas.consume(tenant, "api_calls", 10)
    for zone in ("Pacific/Kiritimati", "Etc/GMT+12"):
        await plane.sql("UPDATE tenancy.tenants SET timezone = :zone", zone=zone)
        with pytest.raises(QuotaExceededError):
            await plane.quotas.consume(tenant, "api_calls")
        found = await usage_of(plane, tenant, "api_calls")
        assert (found.used, found.resets_at) == (10, usage.resets_at)


async def exhaust(plane: QuotaPlane, tenant: Tenant, resource: str, at: datetime) -> int:
    """Use all that is to be had at a time; returns how much it was."""
    used = 0
    with contextlib.suppress(QuotaExceededError):
        while True:
            await plane.quotas.consume(tenant, resource, at=at)
            used += 1
    return used


@pytest.mark.parametrize("step", [1, -1], ids=["westwards", "eastwards"])
async def test_moving_its_time_zone_on_and_on_gives_a_tenant_no_more_quota(plane: QuotaPlane, step: int) -> None:
    """A day lasts at least a day, whichever way the midnights run; days neither overlap nor leave time out."""
    tenant = await plane.tenant(quotas={"api_calls": 1})
    began = datetime(2026, 6, 1, tzinfo=UTC)
    zones = [f"Etc/GMT{hours:+d}" for hours in (*range(13), *range(-14, 0))]
    used = 0
    for hour in range(24 * 5):
        zone = zones[(step * hour) % len(zones)]
        await plane.sql("UPDATE tenancy.tenants SET timezone = :zone", zone=zone)
        used += await exhaust(plane, tenant, "api_calls", began + timedelta(hours=hour))
    assert used <= 5
    rows = await plane.sql("SELECT period_start, period_end FROM tenancy.usage ORDER BY 1")
    assert all(before.period_end == after.period_start for before, after in itertools.pairwise(rows))
    assert all(row.period_end - row.period_start >= timedelta(days=1) for row in rows)


@pytest.mark.parametrize(
    ("zone", "ends"),
    [
        ("Etc/GMT+10", datetime(2026, 8, 1, 10, tzinfo=UTC)),
        ("Etc/GMT-10", datetime(2026, 7, 31, 14, tzinfo=UTC)),
    ],
    ids=["westwards", "eastwards"],
)
async def test_a_month_after_a_change_of_the_time_zone_is_whole(plane: QuotaPlane, zone: str, ends: datetime) -> None:
    """It begins where the last one ended, and is neither some hours long nor two months."""
    tenant = await plane.tenant()
    usage = await plane.quotas.consume(tenant, "emails", at=datetime(2026, 6, 20, tzinfo=UTC))
    assert usage.resets_at == datetime(2026, 7, 1, tzinfo=UTC)
    await plane.sql("UPDATE tenancy.tenants SET timezone = :zone", zone=zone)
    usage = await plane.quotas.consume(tenant, "emails", at=datetime(2026, 7, 1, 1, tzinfo=UTC))
    assert usage.resets_at == ends
    rows = await plane.sql("SELECT period_start FROM tenancy.usage ORDER BY 1 DESC LIMIT 1")
    assert rows[0][0] == datetime(2026, 7, 1, tzinfo=UTC)


async def test_a_late_use_counts_in_no_period_that_has_begun_since(plane: QuotaPlane) -> None:
    """Where the time zone was changed in between, the earlier period ends where the later one begins."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "api_calls", at=datetime(2026, 6, 2, 12, tzinfo=UTC))
    await plane.sql("UPDATE tenancy.tenants SET timezone = 'Etc/GMT+6'")
    usage = await plane.quotas.consume(tenant, "api_calls", at=datetime(2026, 6, 1, 12, tzinfo=UTC))
    assert (usage.used, usage.resets_at) == (1, datetime(2026, 6, 2, tzinfo=UTC))


async def test_a_lifetime_never_resets(plane: QuotaPlane) -> None:
    """Whatever the time."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "users", at=datetime(2020, 1, 1, tzinfo=UTC))
    usage = await plane.quotas.consume(tenant, "users", at=datetime(2090, 1, 1, tzinfo=UTC))
    assert (usage.used, usage.resets_at) == (2, None)


# --- concurrency ----------------------------------------------------------------------------------------------------


async def test_a_hold_counts_while_it_lasts(plane: QuotaPlane) -> None:
    """And not after, however the body ends."""
    tenant = await plane.tenant()

    async def body() -> None:
        async with plane.quotas.hold(tenant, "jobs"):
            assert (await usage_of(plane, tenant, "jobs")).used == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    assert (await usage_of(plane, tenant, "jobs")).used == 0
    async with plane.quotas.hold(tenant, "jobs", 2), plane.quotas.hold(await plane.tenant("globex"), "jobs"):
        with pytest.raises(QuotaExceededError) as caught:
            async with plane.quotas.hold("acme", "jobs"):
                pytest.fail("one too many")
        assert (caught.value.used, caught.value.limit) == (2, 2)


async def test_a_cancelled_body_releases_its_hold(plane: QuotaPlane) -> None:
    """Before its task is over."""
    tenant = await plane.tenant()
    entered = asyncio.Event()

    async def body() -> None:
        async with plane.quotas.hold(tenant, "jobs"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await usage_of(plane, tenant, "jobs")).used == 0


async def test_a_body_that_is_cancelled_twice_releases_its_hold(plane: QuotaPlane) -> None:
    """Also when the second cancellation comes during the release."""
    tenant = await plane.tenant()
    entered = asyncio.Event()

    async def body() -> None:
        async with plane.quotas.hold(tenant, "jobs"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    async with plane.holding("SELECT 1 FROM tenancy.quota_holds FOR UPDATE"):
        task.cancel()
        await plane.waiting(task)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def free() -> bool:
        return bool(await plane.sql("SELECT 1 FROM tenancy.quota_holds HAVING count(*) = 0"))

    await until(free)


async def test_a_hold_is_renewed_while_its_body_runs(plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that is."""
    monkeypatch.setattr("tenancy_orm.quotas.holds._RENEW_SECONDS", 0.02)
    tenant = await plane.tenant()
    async with plane.quotas.hold(tenant, "jobs") as hold:
        await plane.sql("UPDATE tenancy.quota_holds SET expires_at = now()")

        async def renewed() -> bool:
            return (await usage_of(plane, tenant, "jobs")).used == 1

        await until(renewed)
        assert not hold.lost


async def test_a_hold_is_certain_for_half_a_minute_from_its_last_renewal(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the process's own clock, from before the database was asked: it is lost there no earlier than here."""
    now = 1_000.0
    monkeypatch.setattr("tenancy_orm.quotas.holds.time", SimpleNamespace(monotonic=lambda: now))
    lost = []
    async with plane.quotas.hold(await plane.tenant(), "jobs") as hold:
        now += 20
        await plane.quotas._holds._renew()
        for seconds in (29, 1):
            now += seconds
            lost.append(hold.lost)
        # nobody came
        await plane.quotas._holds._renew()
        lost.append(hold.lost)
    assert lost == [False, True, False]


async def test_a_renewal_while_a_hold_is_taken_does_not_take_it_for_lost(
    plane: QuotaPlane, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not there yet, and was never lost."""
    tenant = await plane.tenant()
    async with plane.quotas.hold(tenant, "jobs"):
        pass  # the row that the next hold has to lock

    async def body() -> bool:
        async with plane.quotas.hold(tenant, "jobs") as hold:
            return hold.lost

    async with plane.holding("SELECT 1 FROM tenancy.usage FOR UPDATE"):
        task = asyncio.create_task(body())
        await plane.waiting(task)
        await plane.quotas._holds._renew()
    assert await task is False
    # asyncio's and the pool's complaints about what an earlier test has left come whenever that is collected
    assert [record for record in caplog.records if record.name.startswith("tenancy_orm")] == []


async def test_never_more_than_the_limit_is_held_at_once(plane: QuotaPlane) -> None:
    """Fifty tasks, two places."""
    tenant = await plane.tenant()
    holding = most = 0

    async def body() -> None:
        nonlocal holding, most
        try:
            async with plane.quotas.hold(tenant, "jobs"):
                holding += 1
                most = max(most, holding)
                await asyncio.sleep(0)
                holding -= 1
        except QuotaExceededError:
            pass

    await asyncio.gather(*(body() for _ in range(50)))
    assert 1 <= most <= 2


async def test_holds_and_uses_are_not_mixed_up(plane: QuotaPlane) -> None:
    """The error says what to call instead."""
    tenant = await plane.tenant()
    with pytest.raises(QuotaError, match=r"hold\(\)"):
        await plane.quotas.consume(tenant, "jobs")
    with pytest.raises(QuotaError, match=r"consume\(\)"):
        async with plane.quotas.hold(tenant, "users"):
            pytest.fail("no such hold")


# --- leases ---------------------------------------------------------------------------------------------------------


async def test_a_leased_quota_asks_the_database_once_per_block(plane: QuotaPlane) -> None:
    """The rest is a subtraction in memory; the unspent part counts as used until it is returned."""
    tenant = await plane.tenant(quotas={"api_calls": 10_000})
    share = plane.quotas.leased(tenant, "api_calls", block=100)
    assert not share.try_consume()
    await share.consume()
    assert share.unspent == 99
    while share.try_consume():
        pass
    assert (share.unspent, (await usage_of(plane, tenant, "api_calls")).used) == (0, 100)
    await share.consume(7)
    await share.release()
    assert (share.unspent, (await usage_of(plane, tenant, "api_calls")).used) == (0, 107)
    assert await plane.sql("SELECT * FROM tenancy.quota_blocks") == []
    assert plane.quotas.leased(tenant.id, "api_calls") is share


async def test_blocks_shrink_towards_the_limit(plane: QuotaPlane) -> None:
    """To an eighth of what is left, so that no process holds what another needs; a spent one leaves nothing behind."""
    tenant = await plane.tenant(quotas={"api_calls": 16})
    share = plane.quotas.leased(tenant, "api_calls", block=1_000)
    await share.consume()
    assert (share.unspent, await plane.sql("SELECT unspent FROM tenancy.quota_blocks")) == (1, [(1,)])
    await share.consume()
    # one at a time from here on: no block is unspent, and nobody waits for one to be returned
    await share.consume()
    assert (share.unspent, await plane.sql("SELECT unspent FROM tenancy.quota_blocks")) == (0, [])
    assert (await usage_of(plane, tenant, "api_calls")).used == 3


async def test_no_more_is_returned_than_was_leased_and_no_more_than_once(plane: QuotaPlane) -> None:
    """Whatever a process says it has left: use of others is none of it."""
    tenant = await plane.tenant(quotas={"api_calls": 1_000})
    await plane.quotas.consume(tenant, "api_calls", 100)
    share = plane.quotas.leased(tenant, "api_calls", block=10)
    await share.consume()
    statement = "SELECT tenancy.quota_return_block(:id, 1000)"
    assert await plane.sql(statement, id=share.id) == [(True,)]
    assert await plane.sql(statement, id=share.id) == [(False,)]
    assert (await usage_of(plane, tenant, "api_calls")).used == 101


async def test_nothing_is_returned_into_a_period_that_was_billed(plane: QuotaPlane) -> None:
    """Its record has been made, with the block in it."""
    tenant = await plane.tenant(quotas={"api_calls": 1_000})
    share = plane.quotas.leased(tenant, "api_calls", block=10)
    await share.consume()
    await plane.sql("UPDATE tenancy.usage SET closed_at = now()")
    await share.release()
    assert await plane.sql("SELECT used FROM tenancy.usage") == [(10,)]
    assert await plane.sql("SELECT * FROM tenancy.quota_blocks") == []


async def test_a_counted_use_is_not_refused_while_a_process_sits_on_a_block(plane: QuotaPlane) -> None:
    """It waits for the block, which is called back."""
    tenant = await plane.tenant(quotas={"api_calls": 100})
    async with quota_plane(plane.config.control_url, initialise=False, tiers=TIERS) as other:
        sitting = other.quotas.leased(tenant, "api_calls", block=12)
        await sitting.consume()
        assert (await plane.quotas.consume(tenant, "api_calls", 99)).used == 100
        assert sitting.unspent == 0


async def test_leases_use_up_the_limit_exactly(plane: QuotaPlane) -> None:
    """Blocks shrink towards it; the call past it is refused."""
    tenant = await plane.tenant()
    share = plane.quotas.leased(tenant, "api_calls", block=100)
    for _ in range(10):
        await share.consume()
    with pytest.raises(QuotaExceededError) as caught:
        await share.consume()
    assert (caught.value.used, caught.value.limit) == (10, 10)
    assert caught.value.resets_at is not None


async def test_closing_returns_what_is_in_hand(plane: QuotaPlane) -> None:
    """A clean shutdown loses nothing."""
    tenant = await plane.tenant(quotas={"api_calls": 10_000})
    async with quota_plane(plane.config.control_url, initialise=False, tiers=TIERS) as other:
        await other.quotas.leased(tenant, "api_calls", block=50).consume(3)
        assert (await usage_of(plane, tenant, "api_calls")).used == 50
    assert (await usage_of(plane, tenant, "api_calls")).used == 3


async def test_many_tasks_share_one_lease(plane: QuotaPlane) -> None:
    """Each counts once, and the database is asked about once per block."""
    tenant = await plane.tenant(quotas={"api_calls": 100_000})
    share = plane.quotas.leased(tenant, "api_calls", block=500)
    await asyncio.gather(*(share.consume() for _ in range(2_000)))
    await share.release()
    assert (await usage_of(plane, tenant, "api_calls")).used == 2_000


async def test_many_tasks_at_the_limit_are_refused_by_few_questions(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal holds for everybody who was already waiting; exactly the limit gets through."""
    tenant = await plane.tenant()
    share = plane.quotas.leased(tenant, "api_calls")
    asked, ask = list[int](), share._blocks.take_block

    async def count(*arguments: Any) -> Any:
        asked.append(len(asked))
        return await ask(*arguments)

    monkeypatch.setattr(share._blocks, "take_block", count)
    results = await asyncio.gather(*(share.consume() for _ in range(2_000)), return_exceptions=True)
    assert sum(result is None for result in results) == 10
    assert all(result is None or isinstance(result, QuotaExceededError) for result in results)
    # one for each that gets through, and one refusal
    assert len(asked) <= 11


async def test_a_block_that_another_process_sits_on_is_called_back(plane: QuotaPlane) -> None:
    """Whoever is refused for want of it waits a moment and gets it: exact in both modes."""
    tenant = await plane.tenant(quotas={"api_calls": 100})
    async with quota_plane(plane.config.control_url, initialise=False, tiers=TIERS) as other:
        sitting = other.quotas.leased(tenant, "api_calls", block=12)
        await sitting.consume()
        assert sitting.unspent == 11
        mine = plane.quotas.leased(tenant, "api_calls", block=10)
        for _ in range(95):
            await mine.consume()
        assert sitting.unspent == 0
        for _ in range(4):
            await plane.quotas.consume(tenant, "api_calls")
        with pytest.raises(QuotaExceededError):
            await plane.quotas.consume(tenant, "api_calls")
    assert (await usage_of(plane, tenant, "api_calls")).used == 100


async def test_an_idle_block_is_returned_unasked(plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage then shows what was used."""
    monkeypatch.setattr("tenancy_orm.quotas.blocks.IDLE_SECONDS", 0.2)
    monkeypatch.setattr("tenancy_orm.quotas.blocks.HEARTBEAT_SECONDS", 0.05)
    tenant = await plane.tenant(quotas={"api_calls": 10_000})
    share = plane.quotas.leased(tenant, "api_calls", block=50)
    await share.consume()
    async with asyncio.timeout(HANGS):
        while (await usage_of(plane, tenant, "api_calls")).used != 1:  # noqa: ASYNC110 - it happens in the database
            await asyncio.sleep(0.02)
    assert share.unspent == 0
    await share.consume()
    assert share.unspent == 49


async def test_a_lowered_limit_reaches_a_lease_when_the_tenant_is_invalidated(plane: QuotaPlane) -> None:
    """The current block is returned before more is used."""
    tenant = await plane.tenant(quotas={"api_calls": 10_000})
    share = plane.quotas.leased(tenant, "api_calls", block=50)
    await share.consume(5)
    await plane.quotas.set(tenant, {"api_calls": 6})
    plane.quotas.invalidate(uuid4())
    assert share.try_consume()
    plane.quotas.invalidate(tenant.id)
    with pytest.raises(QuotaExceededError):
        await share.consume()
    await plane.quotas.set(tenant, {"api_calls": 7})
    plane.quotas.invalidate(None)
    await share.consume()
    assert (await usage_of(plane, tenant, "api_calls")).used == 7


async def test_a_lease_is_renewed_while_it_is_in_hand(plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would take it for a dead process's, and be refused without waiting for it."""
    monkeypatch.setattr("tenancy_orm.quotas.blocks.HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr("tenancy_orm.quotas.blocks.IDLE_SECONDS", 1_000.0)
    tenant = await plane.tenant(quotas={"api_calls": 10_000})
    share = plane.quotas.leased(tenant, "api_calls")
    await share.consume()
    plane.quotas._blocks._renewed = 0.0
    await plane.sql("UPDATE tenancy.quota_blocks SET expires_at = now()")

    async def renewed() -> bool:
        return bool((await plane.sql("SELECT expires_at > now() FROM tenancy.quota_blocks"))[0][0])

    await until(renewed)


async def test_a_lease_does_not_outlive_its_period(plane: QuotaPlane) -> None:
    """Yesterday's block does not count today; it is returned to yesterday."""
    tenant = await plane.tenant(quotas={"api_calls": 10_000})
    share = plane.quotas.leased(tenant, "api_calls", block=50)
    await share.consume()
    # the day ends, as far as both can see
    await plane.sql("UPDATE tenancy.usage SET period_start = period_start - interval '1 day', period_end = now()")
    await plane.sql("UPDATE tenancy.quota_blocks SET period_start = period_start - interval '1 day'")
    share._valid_until = time.monotonic()
    await share.consume(2)
    assert (await usage_of(plane, tenant, "api_calls")).used == 50
    await share.release()
    rows = await plane.sql("SELECT used FROM tenancy.usage WHERE resource = 'api_calls' ORDER BY period_start")
    assert [row[0] for row in rows] == [1, 2]


async def test_a_cancelled_caller_takes_no_block_with_it(plane: QuotaPlane) -> None:
    """The block that was being taken can be spent afterwards."""
    tenant = await plane.tenant(quotas={"api_calls": 10_000})
    share = plane.quotas.leased(tenant, "api_calls", block=50)
    task = asyncio.create_task(share.consume())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await share.consume()
    assert share.unspent == 48
    await share.release()
    assert (await usage_of(plane, tenant, "api_calls")).used == 2


async def test_an_unlimited_resource_can_be_leased(plane: QuotaPlane) -> None:
    """It is counted, in whole blocks."""
    tenant = await plane.tenant()
    share = plane.quotas.leased(tenant, "views", block=1_000)
    await share.consume()
    assert share.unspent == 999
    for bad in (0, -1):
        with pytest.raises(ValueError, match="whole number"):
            await share.consume(bad)
    with pytest.raises(ValueError, match="block"):
        plane.quotas.leased(tenant, "views", block=0)


# --- over all tenants -----------------------------------------------------------------------------------------------


async def test_utilisation_and_risk_over_all_tenants(plane: QuotaPlane) -> None:
    """Highest first; without a limit, without use, or of a tenant that is gone: not there."""
    for slug, users in (("acme", 3), ("globex", 1), ("initech", 2)):
        await plane.quotas.consume(await plane.tenant(slug), "users", users)
    await plane.quotas.consume("acme", "views", 5)
    found = await plane.quotas.utilisation()
    assert [(row.slug, row.usage.resource, round(row.fraction, 2)) for row in found] == [
        ("acme", "users", 1.0),
        ("initech", "users", 0.67),
        ("globex", "users", 0.33),
    ]
    assert [row.slug for row in await plane.quotas.at_risk(0.6)] == ["acme", "initech"]
    assert [row.slug for row in await plane.quotas.utilisation(resource="users", limit=1)] == ["acme"]
    await plane.sql("UPDATE tenancy.tenants SET status = 'deleted' WHERE slug = 'acme'")
    assert [row.slug for row in await plane.quotas.at_risk(0.6)] == ["initech"]
    await plane.quotas.set("globex", {"users": 0})
    assert (await plane.quotas.at_risk(0.6))[0].fraction == float("inf")


async def test_risk_is_judged_in_the_period_that_runs(plane: QuotaPlane) -> None:
    """Yesterday's use is over."""
    tenant = await plane.tenant()
    usage = await plane.quotas.consume(tenant, "api_calls", 10)
    assert len(await plane.quotas.at_risk()) == 1
    assert await plane.quotas.at_risk(at=usage.resets_at) == []


async def test_cleaning_removes_what_is_old_and_nothing_else(plane: QuotaPlane) -> None:
    """Keys, periods, and what dead processes left."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "users", key="recent")
    await plane.quotas.consume(tenant, "users", key="old")
    await plane.sql("UPDATE tenancy.usage_keys SET created_at = now() - interval '8 days' WHERE key = 'old'")
    await plane.quotas.consume(tenant, "api_calls")
    await plane.sql(
        "UPDATE tenancy.usage SET period_start = 'epoch', period_end = now() - interval '401 days' "
        "WHERE resource = 'api_calls'"
    )
    await plane.sql(
        "INSERT INTO tenancy.quota_holds VALUES (gen_random_uuid(), :id, 'jobs', 1, now() - interval '2 days')",
        id=tenant.id,
    )
    assert await plane.quotas.clean() == 3
    assert await plane.quotas.clean() == 0
    assert (await plane.quotas.consume(tenant, "users", key="recent")).used == 2
    async with plane.control.transaction() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM tenancy.usage")) == 1
