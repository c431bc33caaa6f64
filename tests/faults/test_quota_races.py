"""Quotas while processes race, die, and lose their database: never one too many, and no more lost than is said."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm.config import Limit, Tier
from tenancy_orm.context import Tenant
from tenancy_orm.control.quotas import Usage
from tenancy_orm.errors import ControlUnavailableError, QuotaExceededError
from tenancy_orm.events import QuotaThresholdReached
from tests.support.proxy import proxied
from tests.support.quotas import QuotaPlane, line, quota_plane, race, say, start_worker

TIERS = {"free": Tier("free", {"calls": Limit(400, "day", soft=(0.5,)), "jobs": Limit(1, "concurrent")})}


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[QuotaPlane]:
    async with quota_plane(control_url, tiers=TIERS) as opened:
        yield opened


async def usage_of(plane: QuotaPlane, tenant: Tenant, resource: str = "calls") -> Usage:
    """The tenant's usage of one resource."""
    return next(usage for usage in await plane.quotas.usage(tenant) if usage.resource == resource)


async def outstanding(plane: QuotaPlane) -> int:
    """How much is leased and unspent, at most."""
    return int((await plane.sql("SELECT coalesce(sum(unspent), 0) FROM tenancy.quota_leases"))[0][0])


# --- races ----------------------------------------------------------------------------------------------------------


async def test_counting_without_the_database_deciding_goes_over_the_limit(plane: QuotaPlane) -> None:
    """The attack: read, compare, write. Concurrent callers all find room for one more."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "calls", 399)

    async def naive() -> bool:
        async with plane.control.transaction() as conn:
            used = await conn.scalar(text("SELECT used FROM tenancy.usage"))
            await conn.execute(text("SELECT pg_sleep(0.05)"))
            if used >= 400:
                return False
            await conn.execute(text("UPDATE tenancy.usage SET used = used + 1"))
            return True

    assert sum(await asyncio.gather(*(naive() for _ in range(4)))) > 1


async def test_four_processes_race_one_quota_and_exactly_the_limit_succeed(plane: QuotaPlane) -> None:
    """One call, one count; the soft limit was reached by one of them."""
    tenant = await plane.tenant()
    results = await race(4, "consume", plane.config.control_url, tenant.id, "calls")
    assert sum(results) == 400
    assert (await usage_of(plane, tenant)).used == 400
    assert (await plane.sql("SELECT soft_reached FROM tenancy.usage"))[0][0] == 0.5


async def test_four_processes_race_one_leased_quota_and_exactly_the_limit_succeed(plane: QuotaPlane) -> None:
    """In blocks far larger than what is left at the end."""
    tenant = await plane.tenant(quotas={"calls": 5_000})
    results = await race(4, "lease", plane.config.control_url, tenant.id, "calls", 250)
    assert sum(results) == 5_000
    assert (await usage_of(plane, tenant)).used == 5_000
    assert await outstanding(plane) == 0


async def test_both_modes_race_one_quota_and_exactly_the_limit_succeed(plane: QuotaPlane) -> None:
    """They share one count."""
    tenant = await plane.tenant(quotas={"calls": 1_000})
    url = plane.config.control_url
    leased, counted = await asyncio.gather(
        race(2, "lease", url, tenant.id, "calls", 100), race(2, "consume", url, tenant.id, "calls")
    )
    assert sum(leased) + sum(counted) == 1_000
    assert (await usage_of(plane, tenant)).used == 1_000


async def test_leases_taken_returned_and_called_back_at_random_never_deadlock(plane: QuotaPlane) -> None:
    """Every statement locks the usage row before the lease's."""
    tenants = [await plane.tenant(f"t{number}", quotas={"calls": 60}) for number in range(3)]
    shares = [[plane.quotas.leased(tenant, "calls", block=20) for tenant in tenants]]
    counts = {tenant.id: 0 for tenant in tenants}
    async with quota_plane(plane.config.control_url, initialise=False, tiers=TIERS) as other:
        shares.append([other.quotas.leased(tenant, "calls", block=20) for tenant in tenants])

        async def user(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(12):
                share = chance.choice(chance.choice(shares))
                try:
                    await share.consume()
                    counts[share.tenant_id] += 1
                except QuotaExceededError:
                    pass
                if chance.random() < 0.2:
                    await share.release()

        async with asyncio.timeout(60):
            await asyncio.gather(*(user(seed) for seed in range(30)))
    for row in shares[0]:
        await row.release()
    for tenant in tenants:
        assert (await usage_of(plane, tenant)).used == counts[tenant.id] <= 60


# --- processes that die ---------------------------------------------------------------------------------------------


async def test_a_process_that_is_killed_loses_at_most_its_block(plane: QuotaPlane) -> None:
    """What it had not spent stays counted: the limit is never passed, and nobody waits for it twice its patience."""
    tenant = await plane.tenant()
    worker = await start_worker("sit", plane.config.control_url, tenant.id, "calls", 40)
    assert await line(worker) == "ready"
    worker.kill()
    await worker.wait()
    done = 0
    async with asyncio.timeout(30):
        while True:
            try:
                await plane.quotas.leased(tenant, "calls", block=50).consume()
                done += 1
            except QuotaExceededError:
                break
    assert 400 - 40 <= done < 400
    assert (await usage_of(plane, tenant)).used == 400
    # once its lease has run out, a refusal is immediate again
    await plane.sql("UPDATE tenancy.quota_leases SET expires_at = now()")
    began = asyncio.get_running_loop().time()
    with pytest.raises(QuotaExceededError):
        await plane.quotas.consume(tenant, "calls")
    assert asyncio.get_running_loop().time() - began < 1


async def test_a_process_that_leaves_properly_loses_nothing(plane: QuotaPlane) -> None:
    """The counterpart: its block is back before it is gone."""
    tenant = await plane.tenant()
    worker = await start_worker("sit", plane.config.control_url, tenant.id, "calls", 40)
    assert await line(worker) == "ready"
    assert (await usage_of(plane, tenant)).used == 40
    await say(worker)
    assert await line(worker) == "39"
    async with asyncio.timeout(30):
        assert await worker.wait() == 0
    assert (await usage_of(plane, tenant)).used == 1


async def test_a_killed_holder_is_forgotten_when_its_hold_runs_out(plane: QuotaPlane) -> None:
    """Its place is free then, and not before."""
    tenant = await plane.tenant()
    worker = await start_worker("hold", plane.config.control_url, tenant.id, "jobs")
    assert await line(worker) == "ready"
    worker.kill()
    await worker.wait()
    with pytest.raises(QuotaExceededError):
        await enter(plane, tenant)
    left = await plane.sql("SELECT extract(epoch FROM expires_at - now()) FROM tenancy.quota_holds")
    assert 0 < left[0][0] <= 30
    await plane.sql("UPDATE tenancy.quota_holds SET expires_at = now()")
    assert (await usage_of(plane, tenant, "jobs")).used == 0
    await enter(plane, tenant)


async def enter(plane: QuotaPlane, tenant: Tenant) -> None:
    """Hold a job for a moment."""
    async with plane.quotas.hold(tenant, "jobs"):
        pass


# --- a database that is away ----------------------------------------------------------------------------------------


async def test_a_block_in_hand_is_spent_while_the_database_is_away(plane: QuotaPlane) -> None:
    """It is counted already. Past it the answer is that the database is away, not that the limit is reached."""
    tenant = await plane.tenant()
    async with (
        proxied(plane.config.control_url) as proxy,
        quota_plane(proxy.url(plane.config.control_url), initialise=False, tiers=TIERS) as app,
    ):
        share = app.quotas.leased(tenant, "calls", block=10)
        await share.consume()
        proxy.refuse()
        for _ in range(9):
            await share.consume()
        with pytest.raises(ControlUnavailableError):
            await share.consume()
        with pytest.raises(ControlUnavailableError):
            await app.quotas.consume(tenant, "calls")
        proxy.restore()
        await share.consume()
    assert (await usage_of(plane, tenant)).used == 11


async def test_what_could_not_be_returned_is_returned_later(plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper tries again at its next beat."""
    monkeypatch.setattr("tenancy_orm.control.leases.HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr("tenancy_orm.control.leases.IDLE_SECONDS", 0.2)
    tenant = await plane.tenant()
    async with (
        proxied(plane.config.control_url) as proxy,
        quota_plane(proxy.url(plane.config.control_url), initialise=False, tiers=TIERS) as app,
    ):
        share = app.quotas.leased(tenant, "calls", block=10)
        await share.consume()
        proxy.refuse()
        with pytest.raises(ControlUnavailableError):
            await share.release()
        assert share.held == 9
        proxy.restore()
        async with asyncio.timeout(10):
            while share.held:  # noqa: ASYNC110 - the keeper works in the background
                await asyncio.sleep(0.02)
        assert (await usage_of(plane, tenant)).used == 1


async def test_a_hold_ends_without_an_error_while_the_database_is_away(plane: QuotaPlane) -> None:
    """The work was done; its place is free when the hold runs out."""
    tenant = await plane.tenant()
    async with (
        proxied(plane.config.control_url) as proxy,
        quota_plane(proxy.url(plane.config.control_url), initialise=False, tiers=TIERS) as app,
    ):
        async with app.quotas.hold(tenant, "jobs"):
            proxy.refuse()
        assert (await usage_of(plane, tenant, "jobs")).used == 1
        proxy.restore()


async def test_a_hold_that_was_given_to_another_says_so(plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that runs on can look."""
    monkeypatch.setattr("tenancy_orm.control.holds._RENEW_SECONDS", 0.02)
    tenant = await plane.tenant()
    async with plane.quotas.hold(tenant, "jobs") as hold:
        assert not hold.lost
        await plane.sql("DELETE FROM tenancy.quota_holds")
        async with asyncio.timeout(10):
            while not hold.lost:  # noqa: ASYNC110 - the keeper works in the background
                await asyncio.sleep(0.01)


async def test_connections_that_break_lose_and_double_nothing_that_has_a_key(plane: QuotaPlane) -> None:
    """A call whose answer was lost may have counted: repeated under its key it counts once."""
    tenant = await plane.tenant(quotas={"calls": 10_000})
    lost: list[int] = []
    done: list[int] = []

    async def call(app: QuotaPlane, number: int) -> None:
        while True:
            try:
                await app.quotas.consume(tenant, "calls", key=f"call-{number}")
            except ControlUnavailableError:
                lost.append(number)
                await asyncio.sleep(0.01)
                continue
            done.append(number)
            if len(done) % 100 == 0:
                proxy.cut()
            return

    async with (
        proxied(plane.config.control_url) as proxy,
        quota_plane(proxy.url(plane.config.control_url), initialise=False, tiers=TIERS) as app,
    ):
        async with asyncio.timeout(120):
            await asyncio.gather(*(call(app, number) for number in range(1_000)))
    assert lost and sorted(done) == list(range(1_000))
    assert (await usage_of(plane, tenant)).used == 1_000


async def test_events_go_to_the_process_whose_call_crossed(plane: QuotaPlane) -> None:
    """And to no other."""
    tenant = await plane.tenant()
    async with quota_plane(plane.config.control_url, initialise=False, tiers=TIERS) as other:
        await other.quotas.consume(tenant, "calls", 199)
        await plane.quotas.consume(tenant, "calls", 1)
        await other.quotas.consume(tenant, "calls", 1)
        seen: list[Any] = other.of(QuotaThresholdReached)
    assert seen == [] and len(plane.of(QuotaThresholdReached)) == 1
