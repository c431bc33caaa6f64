"""Counting in one UPDATE, without the function that decides every case: the two must never differ."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tenancy_orm.config import Limit, Tier
from tenancy_orm.errors import QuotaError, QuotaExceededError
from tenancy_orm.quotas import manager
from tests.support.quotas import QuotaPlane, quota_plane

RESOURCES = {
    "users": Limit(30),
    "calls": Limit(60, "day"),
    "mails": Limit(50, "month", soft=(0.5, 0.9)),
    "views": Limit(None, "day"),
    "none": Limit(0),
    "quiet": Limit(20, soft=()),
    "jobs": Limit(2, "concurrent"),
}


async def rows(plane: QuotaPlane, tenant_id: Any) -> list[Any]:
    async with plane.control.connect() as connection:
        statement = (
            "SELECT resource, period, period_start, period_end, used, soft_reached, soft_limit FROM tenancy.usage "
            "WHERE tenant_id = :id ORDER BY 1, 2, 3"
        )
        return [tuple(row) for row in await connection.execute(text(statement), {"id": tenant_id})]


async def count(plane: QuotaPlane, tenant_id: Any, resource: str, amount: int) -> tuple[bool, Any]:
    """Count as ``consume`` does; returns whether there was headroom, and what the answer tells."""
    for row in await plane.control.fetch(manager._CONSUME_HEADROOM, tenant_id, resource, amount):
        return True, ("counted", row.amount_limit, row.period, row.used, row.resets_at, None)
    (row,) = await plane.control.fetch(manager._CONSUME_NOW, tenant_id, resource, amount)
    return False, (row.outcome, row.amount_limit, row.period, row.used, row.resets_at, row.crossed)


async def count_by_function(plane: QuotaPlane, tenant_id: Any, resource: str, amount: int) -> tuple[bool, Any]:
    """Count by the function that decides every case."""
    (row,) = await plane.control.fetch(manager._CONSUME, tenant_id, resource, amount, None, None)
    return False, (row.outcome, row.amount_limit, row.period, row.used, row.resets_at, row.crossed)


@pytest.mark.parametrize("seed", range(4))
async def test_the_usual_case_counts_as_the_function_does(control_url: str, seed: int) -> None:
    """Any uses, releases, changes of limits, of the tier and of the time zone, on two tenants: one by each way."""
    tiers = {"free": Tier("free", RESOURCES), "pro": Tier("pro", {**RESOURCES, "users": Limit(45, "day")})}
    chance = random.Random(seed)
    async with quota_plane(control_url, tiers=tiers) as plane:
        one, other = await plane.tenant("acme"), await plane.tenant("globex")
        usual = 0
        for _ in range(150):
            resource, amount = chance.choice([*RESOURCES, "unknown"]), chance.choice([1, 1, 1, 2, 7, 40])
            outcomes = []
            kind = chance.random()
            change, arguments = "", {}
            if kind < 0.05:
                change, arguments = (
                    "UPDATE tenancy.tenants SET tier = :tier WHERE id = :id",
                    {"tier": chance.choice(["free", "pro"])},
                )
            elif kind < 0.1:
                change, arguments = (
                    "UPDATE tenancy.tenants SET quotas = CAST(:quotas AS jsonb) WHERE id = :id",
                    {"quotas": chance.choice(["{}", '{"users": 40}', '{"calls": {"amount": 90, "soft": [0.1, 0.2]}}'])},
                )
            elif kind < 0.12:
                change, arguments = (
                    "UPDATE tenancy.tenants SET timezone = :zone WHERE id = :id",
                    {"zone": chance.choice(["UTC", "Asia/Tokyo", "America/New_York"])},
                )
            elif kind < 0.14:
                change, arguments = (
                    "UPDATE tenancy.tiers SET limits = jsonb_set(limits, '{mails}', CAST(:limit AS jsonb))",
                    {"limit": chance.choice(['{"amount": 50, "period": "month", "soft": [0.5, 0.9]}', "{}"])},
                )
            for tenant, counting in ((one, count), (other, count_by_function)):
                if change:
                    async with plane.control.transaction() as connection:
                        await connection.execute(text(change), {"id": tenant.id, **arguments})
                elif kind < 0.2 and resource in ("users", "mails"):
                    await plane.quotas.release(tenant, resource, amount)
                elif kind < 0.24 and resource in ("users", "quiet"):
                    await plane.quotas.measure(tenant, resource, amount)
                else:
                    quick, outcome = await counting(plane, tenant.id, resource, amount)
                    outcomes.append(outcome)
                    usual += quick
            assert len(set(map(str, outcomes))) <= 1, (resource, amount, outcomes)
            assert await rows(plane, one.id) == await rows(plane, other.id)
        assert usual > 20


async def test_the_usual_case_does_not_call_the_function(control_url: str) -> None:
    """Neither does it count where the function would refuse."""
    async with quota_plane(control_url, tiers={"free": Tier("free", {"users": Limit(3, soft=())})}) as plane:
        tenant = await plane.tenant()
        await plane.quotas.consume(tenant, "users")
        async with plane.control.transaction() as connection:
            await connection.execute(
                text("ALTER FUNCTION tenancy.quota_consume RENAME TO quota_consume_of_the_function")
            )
            await connection.execute(
                text(
                    "CREATE FUNCTION tenancy.quota_consume(uuid, text, bigint, text DEFAULT NULL, "
                    "timestamptz DEFAULT NULL) RETURNS tenancy.quota_state LANGUAGE plpgsql "
                    "AS $$ BEGIN RAISE EXCEPTION 'called'; END $$"
                )
            )
        assert (await plane.quotas.consume(tenant, "users", 2)).used == 3
        with pytest.raises(Exception, match="called"):
            await plane.quotas.consume(tenant, "users")


async def test_a_period_that_is_closed_is_not_counted_in(control_url: str) -> None:
    """Billing has made its record."""
    async with quota_plane(control_url, tiers={"free": Tier("free", {"users": Limit(3)})}) as plane:
        tenant = await plane.tenant()
        await plane.quotas.consume(tenant, "users")
        async with plane.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.usage SET closed_at = now()"))
        with pytest.raises(QuotaError, match="closed") as caught:
            await plane.quotas.consume(tenant, "users")
        assert not isinstance(caught.value, QuotaExceededError)


async def test_headroom_ends_with_the_limit_it_follows_from(control_url: str) -> None:
    """A limit that is lowered holds with its commit, whoever has looked at the former one."""
    async with quota_plane(control_url, tiers={"free": Tier("free", {"users": Limit(100)})}) as plane:
        tenant, neighbour = await plane.tenant(), await plane.tenant("globex")
        for one in (tenant, neighbour):
            await plane.quotas.consume(one, "users")
        await plane.quotas.set(tenant, {"users": 1})
        with pytest.raises(QuotaExceededError):
            await plane.quotas.consume(tenant, "users")
        assert (await plane.quotas.consume(neighbour, "users")).limit == 100
        await plane.sql("UPDATE tenancy.tiers SET limits = jsonb_set(limits, '{users,amount}', '1')")
        with pytest.raises(QuotaExceededError):
            await plane.quotas.consume(neighbour, "users")


@pytest.mark.parametrize(
    ("changed", "value"), [("resource", "'No Name'"), ("period", "'week'"), ("period_end", "period_start")]
)
async def test_no_usage_is_inserted_that_cannot_be(control_url: str, changed: str, value: str) -> None:
    """The database checks it, not only what calls it."""
    async with quota_plane(control_url, tiers={"free": Tier("free", {"users": Limit(3)})}) as plane:
        await plane.quotas.consume(await plane.tenant(), "users")
        columns = {"resource": "'other'", "period": "period", "period_end": "period_end"} | {changed: value}
        with pytest.raises(IntegrityError, match="no usage can be counted"):
            await plane.sql(
                "INSERT INTO tenancy.usage (tenant_id, resource, period, period_start, period_end) "
                f"SELECT tenant_id, {columns['resource']}, {columns['period']}, period_start, {columns['period_end']} "
                "FROM tenancy.usage"
            )
