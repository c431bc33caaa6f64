"""Which tenants are due: each tenant once, whoever asks, and by its own clock."""

from __future__ import annotations

import asyncio
import gc
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig, current_tenant_or_none
from tenancy_orm.errors import ConfigurationError, CrossTenantError
from tests.support.processes import opened

DAY = datetime(2031, 5, 5, tzinfo=UTC)  # a Monday
MINUTE = timedelta(minutes=1)


async def asked(tenancy: Tenancy, now: datetime, name: str = "daily", **options: Any) -> list[str]:
    """The slugs of who is due, each of which is sent."""
    options = {"at": "06:00", **options} if "cron" not in options else options
    found = []
    async for tenant in tenancy.schedules.due(name, now=now, **options):
        assert current_tenant_or_none() is tenant
        found.append(tenant.slug)
    assert current_tenant_or_none() is None
    return sorted(found)


async def many(tenancy: Tenancy, number: int) -> None:
    """Make rows of tenants after the first one's; they have no databases."""
    copied = (
        "INSERT INTO tenancy.tenants (id, slug, status, tier, server, database_name, role_name, sealed_password) "
        "SELECT gen_random_uuid(), slug || '-' || n, 'provisioning', tier, server, database_name || n, role_name || n, "
        "sealed_password FROM tenancy.tenants, generate_series(1, :number) AS n WHERE slug = 'acme'"
    )
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text(copied), {"number": number})
        await connection.execute(text("UPDATE tenancy.tenants SET status = 'active' WHERE status = 'provisioning'"))


async def seen(tenancy: Tenancy, name: str = "daily", **options: Any) -> None:
    """Ask for the first time, long before."""
    await asked(tenancy, DAY - timedelta(days=10), name, **options)


async def expire(tenancy: Tenancy) -> None:
    """Let all claims run out."""
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.schedule_runs SET claimed_until = now() - interval '1 s'"))


async def test_each_at_its_own_time(tenancy: Tenancy) -> None:
    """By the tenant's time zone or its metadata's; once for each time; not before it, nor before it was created."""
    await tenancy.tenants.create("acme")
    tokyo = (await tenancy.tenants.create("tokyo", metadata={"tz": "Asia/Tokyo"})).tenant
    await tenancy.tenants.create("paris")
    await tenancy.tenants.update("paris", timezone="Europe/Paris")
    await tenancy.tenants.create("broken", metadata={"tz": "Not/AZone"})
    await tenancy.tenants.create("resting")
    await tenancy.tenants.suspend("resting")
    key = {"timezone_key": "tz"}
    await seen(tenancy, **key)
    six = DAY + timedelta(hours=6)
    assert await asked(tenancy, DAY - timedelta(hours=3, seconds=1), **key) == []
    assert await asked(tenancy, DAY - timedelta(hours=3), **key) == ["tokyo"]
    assert await asked(tenancy, six - timedelta(hours=2), **key) == ["paris"]
    assert await asked(tenancy, six - timedelta(seconds=1), **key) == []
    assert await asked(tenancy, six, **key) == ["acme", "broken"]
    assert await asked(tenancy, six + MINUTE, **key) == []
    # the next day, after nobody has asked for a while: within the bound, and once; those too late come no more
    assert await asked(tenancy, six + timedelta(days=2, hours=5), **key) == ["acme", "broken"]
    assert await asked(tenancy, six + timedelta(days=2, hours=5), catch_up=timedelta(days=1), **key) == [
        "paris",
        "tokyo",
    ]
    # another schedule is another matter, and so is who it is for
    await seen(tenancy, "weekly")
    assert await asked(tenancy, six, "weekly", weekdays=["tue"]) == []
    assert await asked(tenancy, six, "weekly", weekdays=["mon"], tier="pro") == []
    assert await asked(tenancy, six, "weekly", cron="0 6 * * mon", status=["active"]) == [
        *("acme", "broken", "paris", "tokyo")
    ]
    # a schedule that is new sends nothing of the morning; nor is a tenant due for what was before it
    assert await asked(tenancy, six + timedelta(hours=2), "new") == []
    await asked(tenancy, datetime(2020, 1, 1, tzinfo=UTC), "past")
    assert await asked(tenancy, datetime(2021, 1, 1, 6, tzinfo=UTC), "past") == []
    assert len(await asked(tenancy, six, "past")) == 4
    assert {schedule.name for schedule in await tenancy.schedules.list()} == {"daily", "weekly", "new", "past"}
    assert await tenancy.schedules.forget("weekly") and not await tenancy.schedules.forget("weekly")
    assert [entry.before for entry in await tenancy.audit.events(action="schedule.forget")] == [{"name": "weekly"}]
    # a tenant that is purged leaves nothing
    await tenancy.tenants.delete(tokyo)
    await tenancy.tenants.purge(tokyo)
    async with tenancy.internals.control.connect() as connection:
        left = text("SELECT count(*) FROM tenancy.schedule_runs WHERE tenant_id = :id")
        assert await connection.scalar(left, {"id": tokyo.id}) == 0


async def test_tenants_are_spread(tenancy: Tenancy) -> None:
    """Each at its own moment of the ten minutes, the same every day, and about as many in each minute."""
    await tenancy.tenants.create("acme")
    await many(tenancy, 199)
    spread: dict[str, Any] = {"spread": timedelta(minutes=10)}
    await seen(tenancy, **spread)
    days = []
    for day in range(2):
        minutes = [
            await asked(tenancy, DAY + timedelta(days=day, hours=6, minutes=minute), **spread) for minute in range(11)
        ]
        assert sorted(slug for minute in minutes for slug in minute) == sorted({s for m in minutes for s in m})
        assert sum(map(len, minutes)) == 200
        assert len(minutes[0]) <= 1 and max(map(len, minutes)) < 50 > min(map(len, minutes[1:])) > 3
        days.append(minutes)
    assert days[0] == days[1]


async def test_several_ask_at_once(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """Two processes, three times each: every tenant goes to one of them."""
    await tenancy.tenants.create("acme")
    await many(tenancy, 149)
    await seen(tenancy)
    async with opened(tenancy_config) as other:
        six = DAY + timedelta(hours=6)
        answers = await asyncio.gather(*(asked(one, six) for one in (tenancy, other) * 3))
    found = [slug for answer in answers for slug in answer]
    assert len(found) == len(set(found)) == 150
    assert sum(bool(answer) for answer in answers) > 1


async def test_a_body_that_fails_loses_nobody(tenancy: Tenancy) -> None:
    """The failed tenant and those behind it are due again; one that always fails keeps nobody waiting."""
    await tenancy.tenants.create("acme")
    await many(tenancy, 59)
    await seen(tenancy)
    six = DAY + timedelta(hours=6)
    sent: list[UUID] = []
    keys: set[str] = set()
    failures = 0
    poisoned: UUID | None = None
    for _ in range(10):
        due = tenancy.schedules.due("daily", at="06:00", now=six)
        try:
            async for tenant in due:
                if poisoned is None and len(sent) == 20:
                    poisoned = tenant.id
                if tenant.id == poisoned:
                    keys.add(due.key)
                    raise RuntimeError
                sent.append(tenant.id)
        except RuntimeError:
            failures += 1
        del due
        gc.collect()
        assert current_tenant_or_none() is None
        # somebody else does not take what is claimed
        assert failures != 1 or len(await asked(tenancy, six)) == 10
        if failures == 1:
            sent += await sent_ids(tenancy, sent)
        await expire(tenancy)
    assert len(sent) == len(set(sent)) == 59 and poisoned not in sent
    assert failures == 10 and len(keys) == 1
    [schedule] = await tenancy.schedules.list()
    assert (schedule.sent, schedule.unfinished) == (59, 1)


async def sent_ids(tenancy: Tenancy, known: list[UUID]) -> list[UUID]:
    async with tenancy.internals.control.connect() as connection:
        rows = await connection.scalars(text("SELECT tenant_id FROM tenancy.schedule_runs WHERE sent_for IS NOT NULL"))
        return [tenant_id for tenant_id in rows if tenant_id not in known]


async def test_a_claim_that_has_run_out_is_another_s(tenancy: Tenancy) -> None:
    """A body that outlives its claim: what it has not begun goes to who asks next, and to no one twice."""
    await tenancy.tenants.create("acme")
    await many(tenancy, 4)
    await seen(tenancy)
    six = DAY + timedelta(hours=6)
    slow = tenancy.schedules.due("daily", at="06:00", now=six)
    first = await anext(slow)
    await expire(tenancy)
    async with tenancy.internals.control.transaction() as connection:
        # it has the one that it is at
        await connection.execute(
            text("UPDATE tenancy.schedule_runs SET claimed_until = now() + interval '1 min' WHERE tenant_id = :id"),
            {"id": first.id},
        )
    others = await asyncio.create_task(in_scope_of_nobody(tenancy, six))
    assert len(others) == 4 and first.slug not in others
    assert [tenant.slug async for tenant in slow] == []
    assert await asked(tenancy, six) == []


async def test_a_slow_body_leaves_the_claim_of_a_later_time(tenancy: Tenancy) -> None:
    """It outlives its claim, and the tenant's next time comes: that one goes to one process alone."""
    await tenancy.tenants.create("acme")
    await seen(tenancy)
    twice, six = ["06:00", "06:05"], DAY + timedelta(hours=6)
    slow = tenancy.schedules.due("daily", at=twice, now=six)
    assert (await anext(slow)).slug == "acme"
    await expire(tenancy)
    later = six + timedelta(minutes=5)

    async def others() -> None:
        async for _ in tenancy.schedules.due("daily", at=twice, now=later):
            await slow.done()
            assert await in_scope_of_nobody(tenancy, later, at=twice) == []

    from tenancy_orm.context import run_unbound

    await asyncio.create_task(run_unbound(others()))


async def in_scope_of_nobody(tenancy: Tenancy, now: datetime, **options: Any) -> list[str]:
    from tenancy_orm.context import run_unbound

    return await run_unbound(asked(tenancy, now, **options))


async def test_leaving_the_loop(tenancy: Tenancy) -> None:
    """The binding ends; a tenant that ``done`` has recorded does not come again."""
    await tenancy.tenants.create("acme")
    await seen(tenancy)
    six = DAY + timedelta(hours=6)
    with pytest.raises(ConfigurationError):
        _ = tenancy.schedules.due("daily", at="06:00").key
    due = tenancy.schedules.due("daily", at="06:00", now=six)
    async for tenant in due:
        assert due.due_at == six and due.key == f"daily:{tenant.id.hex}:{int(six.timestamp())}000"
        await due.done()
        break
    del due
    assert current_tenant_or_none() is None
    await expire(tenancy)
    assert await asked(tenancy, six) == []
    async with tenancy.scope("acme"):
        with pytest.raises(CrossTenantError):
            await anext(tenancy.schedules.due("daily", at="06:00"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "x" * 101},
        {"name": "a\nb"},
        {"spread": -MINUTE},
        {"spread": timedelta(days=32)},
        {"catch_up": timedelta(0)},
        {"catch_up": timedelta(days=32)},
        {"retry_after": timedelta(0)},
        {"now": datetime(2031, 1, 1)},  # noqa: DTZ001 - the point
        {"status": ["happy"]},
    ],
)
async def test_what_is_malformed_is_refused(tenancy_config: TenancyConfig, wrong: dict[str, Any]) -> None:
    """At once, and not in the loop."""
    from tenancy_orm.schedules import ScheduleManager

    manager = ScheduleManager(None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError):  # noqa: PT011 - a ConfigurationError, or the enumeration's
        manager.due(**{"name": "daily", "at": "06:00", **wrong})
