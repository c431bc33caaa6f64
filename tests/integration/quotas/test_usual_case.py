"""Counting in one UPDATE, without the function that decides every case: the two must never differ."""

from __future__ import annotations

import random
from typing import Any

import pytest
from sqlalchemy import text

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
            for tenant, statement in ((one, manager._CONSUME_NOW), (other, manager._CONSUME)):
                if change:
                    async with plane.control.transaction() as connection:
                        await connection.execute(text(change), {"id": tenant.id, **arguments})
                    continue
                if 0.12 <= kind < 0.2 and resource in ("users", "mails"):
                    await plane.quotas.release(tenant, resource, amount)
                    continue
                rest = () if statement is manager._CONSUME_NOW else (None, None)
                (row,) = await plane.control.fetch(statement, tenant.id, resource, amount, *rest)
                outcomes.append((row.outcome, row.amount_limit, row.period, row.used, row.resets_at, row.crossed))
                usual += statement is manager._CONSUME_NOW and row.outcome == "counted"
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
