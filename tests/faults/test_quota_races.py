"""Quotas while processes race, die, and lose their database: never one too many, and no more lost than is said."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tenancy_orm.config import Limit, Tier
from tenancy_orm.errors import ControlUnavailableError, QuotaError, QuotaExceededError
from tenancy_orm.events import QuotaThresholdReached
from tenancy_orm.quotas.usage import Usage
from tenancy_orm.tenant import Tenant
from tests.support.proxy import proxied
from tests.support.quotas import QuotaPlane, line, quota_plane, race, say, start_worker
from tests.support.waiting import HANGS, until

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
    return int((await plane.sql("SELECT coalesce(sum(unspent), 0) FROM tenancy.quota_blocks"))[0][0])


# --- races ----------------------------------------------------------------------------------------------------------


async def test_counting_without_the_database_deciding_goes_over_the_limit(plane: QuotaPlane) -> None:
    """The attack: read, compare, write. Concurrent callers all find room for one more."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "calls", 399)

    async def naive() -> bool:
        async with plane.control.transaction() as connection:
            used = await connection.scalar(text("SELECT used FROM tenancy.usage"))
            await connection.execute(text("SELECT pg_sleep(0.05)"))
            if used >= 400:
                return False
            await connection.execute(text("UPDATE tenancy.usage SET used = used + 1"))
            return True

    assert sum(await asyncio.gather(*(naive() for _ in range(4)))) > 1


async def test_of_callers_that_all_found_room_for_one_more_one_succeeds(plane: QuotaPlane) -> None:
    """All have read 399 of 400 when the first of them counts: the check that matters is made under the row's lock."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "calls", 399)
    async with plane.holding("SELECT 1 FROM tenancy.usage FOR UPDATE"):
        tasks = [asyncio.create_task(plane.quotas.consume(tenant, "calls")) for _ in range(4)]
        await plane.waiting(*tasks)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, Usage) for result in results) == 1
    assert sum(isinstance(result, QuotaExceededError) for result in results) == 3
    assert (await usage_of(plane, tenant)).used == 400


async def test_a_use_refused_at_the_last_moment_leaves_its_key_free(plane: QuotaPlane) -> None:
    """It found room, wrote its key, and then another was first."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "calls", 399)
    async with plane.holding("UPDATE tenancy.usage SET used = 400"):
        task = asyncio.create_task(plane.quotas.consume(tenant, "calls", key="order"))
        await plane.waiting(task)
    with pytest.raises(QuotaExceededError):
        await task
    await plane.quotas.release(tenant, "calls", 10)
    assert (await plane.quotas.consume(tenant, "calls", key="order")).used == 391


async def test_of_holders_that_all_found_a_place_one_gets_it(plane: QuotaPlane) -> None:
    """What another transaction has taken and not committed counts as soon as it has."""
    tenant = await plane.tenant()
    taken = "SELECT outcome FROM tenancy.quota_hold(:tenant, 'jobs', 1, gen_random_uuid(), 30)"
    async with plane.holding(taken, tenant=tenant.id):
        task = asyncio.create_task(enter(plane, tenant))
        await plane.waiting(task)
    with pytest.raises(QuotaExceededError):
        await task


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


async def test_a_lease_that_is_returned_takes_its_locks_in_the_order_of_all_others(plane: QuotaPlane) -> None:
    """The usage row first: whoever has that gets at the leases, and does not wait in a circle."""
    tenant = await plane.tenant()
    share = plane.quotas.leased(tenant, "calls", block=10)
    await share.consume()
    async with plane.holding("SELECT 1 FROM tenancy.usage FOR UPDATE") as connection:
        task = asyncio.create_task(share.release())
        await plane.waiting(task)
        await connection.execute(text("SET LOCAL lock_timeout = '2s'"))
        await connection.execute(text("UPDATE tenancy.quota_blocks SET reclaim = true"))
    await task
    assert (await usage_of(plane, tenant)).used == 1


# --- periods that are closed ----------------------------------------------------------------------------------------


LATE = datetime(2026, 3, 1, 12, tzinfo=UTC)


async def test_nothing_is_counted_in_a_period_while_it_is_being_closed(plane: QuotaPlane) -> None:
    """Whoever waited for the row finds it closed: no record would have the use."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "calls", 7, at=LATE)
    async with plane.holding("SELECT tenancy.usage_close(300)"):
        tasks: list[asyncio.Task[Usage]] = [
            asyncio.create_task(plane.quotas.consume(tenant, "calls", 5, key="late", at=LATE)),
            asyncio.create_task(plane.quotas.release(tenant, "calls", 5, at=LATE)),
        ]
        await plane.waiting(*tasks)
    for task in tasks:
        with pytest.raises(QuotaError, match="closed for billing"):
            await task
    assert await plane.sql("SELECT used FROM tenancy.usage") == [(7,)]
    assert await plane.sql("SELECT quantity FROM tenancy.usage_records") == [(7,)]
    assert await plane.sql("SELECT * FROM tenancy.usage_keys") == []


async def test_a_use_that_was_counted_can_be_repeated_after_its_period_was_closed(plane: QuotaPlane) -> None:
    """Under its key: the caller who lost the answer learns that it was counted. A new one is refused."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "calls", 7, key="late", at=LATE)
    await plane.sql("SELECT tenancy.usage_close(300)")
    assert (await plane.quotas.consume(tenant, "calls", 7, key="late", at=LATE)).used == 7
    with pytest.raises(QuotaError, match="closed for billing"):
        await plane.quotas.consume(tenant, "calls", 7, key="later", at=LATE)


async def test_no_block_is_taken_from_a_period_while_it_is_being_closed(plane: QuotaPlane) -> None:
    """The same for blocks and measures; the caller asks again, in the current period."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "calls", 7)
    async with plane.holding("UPDATE tenancy.usage SET closed_at = now()"):
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(plane.quotas.leased(tenant, "calls").consume()),
            asyncio.create_task(plane.quotas.measure(tenant, "calls", 9)),
        ]
        await plane.waiting(*tasks)
    for task in tasks:
        with pytest.raises(QuotaError, match="closed for billing"):
            await task
    assert await plane.sql("SELECT used FROM tenancy.usage") == [(7,)]


# --- processes that die ---------------------------------------------------------------------------------------------


async def test_a_process_that_is_killed_loses_at_most_its_block(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had not spent stays counted: the limit is never passed, and nobody waits for it twice its patience."""
    tenant = await plane.tenant()
    worker = await start_worker("sit", plane.config.control_url, tenant.id, "calls", 40)
    assert await line(worker) == "ready"
    worker.kill()
    await worker.wait()
    done = 0
    async with asyncio.timeout(HANGS):
        while True:
            try:
                await plane.quotas.leased(tenant, "calls", block=50).consume()
                done += 1
            except QuotaExceededError:
                break
    assert 400 - 40 <= done < 400
    assert (await usage_of(plane, tenant)).used == 400
    # once its lease has run out, a refusal is immediate again
    await plane.sql("UPDATE tenancy.quota_blocks SET expires_at = now()")
    monkeypatch.setattr("tenancy_orm.quotas.manager.RECLAIM_SECONDS", 3_600.0)
    async with asyncio.timeout(HANGS):
        with pytest.raises(QuotaExceededError):
            await plane.quotas.consume(tenant, "calls")


async def test_a_process_that_leaves_properly_loses_nothing(plane: QuotaPlane) -> None:
    """The counterpart: its block is back before it is gone."""
    tenant = await plane.tenant()
    worker = await start_worker("sit", plane.config.control_url, tenant.id, "calls", 40)
    assert await line(worker) == "ready"
    assert (await usage_of(plane, tenant)).used == 40
    await say(worker)
    assert await line(worker) == "39"
    async with asyncio.timeout(HANGS):
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


class Failures:
    """Every statement of a plane fails with ``error`` until ``stop()``; ``times`` counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, plane: QuotaPlane, error: Exception) -> None:
        self.times = 0
        self._error = error
        self.stop = partial(monkeypatch.setattr, plane.control, "connect", plane.control.connect)
        monkeypatch.setattr(plane.control, "connect", lambda: self)

    async def __aenter__(self) -> None:
        self.times += 1
        raise self._error

    async def __aexit__(self, *_: object) -> None:
        """Nothing was entered."""


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
    """The next heartbeat tries again."""
    monkeypatch.setattr("tenancy_orm.quotas.blocks.HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr("tenancy_orm.quotas.blocks.IDLE_SECONDS", 0.2)
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
        # it may be with others by now
        assert not share.try_consume()
        proxy.restore()

        async def returned() -> bool:
            return (await usage_of(plane, tenant)).used == 1

        await until(returned)


@pytest.mark.parametrize("answered", [False, True], ids=["cancelled", "answer lost"])
async def test_what_was_given_back_is_not_spent_though_nobody_said_so(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """The database may have it back, and given it to another; telling it again returns nothing twice."""
    monkeypatch.setattr("tenancy_orm.quotas.blocks.HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr("tenancy_orm.quotas.blocks.IDLE_SECONDS", 1_000.0)
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "calls", 100)
    share = plane.quotas.leased(tenant, "calls", block=10)
    await share.consume()
    blocks = plane.quotas._blocks
    return_block, times = blocks.return_block, 0

    async def lost(block_id: UUID, unspent: int) -> None:
        nonlocal times
        times += 1
        await return_block(block_id, unspent)
        if times == 1:
            raise ControlUnavailableError("the answer was lost") if answered else asyncio.CancelledError

    monkeypatch.setattr(blocks, "return_block", lost)
    with pytest.raises(ControlUnavailableError if answered else asyncio.CancelledError):
        await share.release()
    assert (await usage_of(plane, tenant)).used == 101
    assert not share.try_consume()
    await until(lambda: times == 2)
    await until(lambda: not share.has_pending_returns)
    assert (await usage_of(plane, tenant)).used == 101
    await share.consume()
    assert (share.unspent, (await usage_of(plane, tenant)).used) == (9, 111)


async def test_a_release_that_breaks_at_any_moment_gives_nothing_away_twice(plane: QuotaPlane) -> None:
    """Cut off at random, against the real thing."""
    chance = random.Random(1)
    async with (
        proxied(plane.config.control_url) as proxy,
        quota_plane(proxy.url(plane.config.control_url), initialise=False, tiers=TIERS) as app,
    ):
        for number in range(40):
            tenant = await plane.tenant(f"t{number}")
            share = app.quotas.leased(tenant, "calls", block=10)
            while not share.unspent:
                with contextlib.suppress(ControlUnavailableError):
                    await share.consume()
            used = (await usage_of(plane, tenant)).used
            task = asyncio.create_task(share.release())
            await asyncio.sleep(chance.random() * 0.002)
            proxy.cut()
            await asyncio.gather(task, return_exceptions=True)
            assert not share.try_consume()
            while share.has_pending_returns:
                with contextlib.suppress(ControlUnavailableError):
                    await share.return_pending()
            assert (await usage_of(plane, tenant)).used == used - 9


async def test_a_block_whose_answer_was_lost_is_returned(plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the call asked for may count; the rest of the block does not stay counted, with nobody to spend it."""
    monkeypatch.setattr("tenancy_orm.quotas.blocks.HEARTBEAT_SECONDS", 0.02)
    tenant = await plane.tenant()
    share = plane.quotas.leased(tenant, "calls", block=10)
    await share.consume(6)
    blocks = plane.quotas._blocks
    lease = blocks.take_block

    async def lost(*arguments: Any) -> Any:
        await lease(*arguments)
        raise ControlUnavailableError("the answer was lost")

    monkeypatch.setattr(blocks, "take_block", lost)
    with pytest.raises(ControlUnavailableError):
        await share.consume(5)
    assert not share.try_consume()
    await until(lambda: not share.has_pending_returns)
    assert (await usage_of(plane, tenant)).used == 6 + 5
    assert await outstanding(plane) == 0


@pytest.mark.parametrize("away", [ControlUnavailableError("away"), RuntimeError("read-only")], ids=["away", "other"])
async def test_leases_are_looked_after_again_once_that_works(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch, away: Exception
) -> None:
    """Whatever the error was: it would end the renewing of all of this process's leases, and their return."""
    monkeypatch.setattr("tenancy_orm.quotas.blocks.HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr("tenancy_orm.quotas.blocks.IDLE_SECONDS", 0.1)
    tenant = await plane.tenant()
    await plane.quotas.leased(tenant, "calls", block=10).consume()
    failed = Failures(monkeypatch, plane, away)
    await until(lambda: failed.times >= 2)
    failed.stop()

    async def returned() -> bool:
        return (await usage_of(plane, tenant)).used == 1

    await until(returned)


@pytest.mark.parametrize("away", [ControlUnavailableError("away"), RuntimeError("read-only")], ids=["away", "other"])
async def test_holds_are_renewed_again_once_that_works(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch, away: Exception
) -> None:
    """Whatever the error was: it would end the renewing of all of this process's holds."""
    monkeypatch.setattr("tenancy_orm.quotas.holds._RENEW_SECONDS", 0.02)
    tenant = await plane.tenant()
    async with plane.quotas.hold(tenant, "jobs") as hold:
        failed = Failures(monkeypatch, plane, away)
        await until(lambda: failed.times >= 2)
        failed.stop()
        await plane.sql("UPDATE tenancy.quota_holds SET expires_at = now()")

        async def renewed() -> bool:
            return (await usage_of(plane, tenant, "jobs")).used == 1

        await until(renewed)
        assert not hold.lost


async def test_a_hold_that_cannot_be_renewed_says_so_in_time(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the process's own clock, when the place is free for others; not only once the database is back."""
    monkeypatch.setattr("tenancy_orm.quotas.holds.HOLD_SECONDS", 0.3)
    monkeypatch.setattr("tenancy_orm.quotas.holds._RENEW_SECONDS", 0.02)
    tenant = await plane.tenant()
    async with plane.quotas.hold(tenant, "jobs") as hold:
        failed = Failures(monkeypatch, plane, RuntimeError("read-only"))
        await until(lambda: hold.lost)
        failed.stop()


async def test_an_end_returns_blocks_though_holds_had_trouble(
    plane: QuotaPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one block that cannot be returned does not keep the others."""
    tenants = [await plane.tenant(f"t{number}") for number in range(3)]
    shares = [plane.quotas.leased(tenant, "calls", block=10) for tenant in tenants]
    for share in shares:
        await share.consume()

    async def fail() -> None:
        raise RuntimeError("trouble")

    plane.quotas._holds._task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    blocks = plane.quotas._blocks
    return_block, refused = blocks.return_block, shares[0].id

    async def picky(block_id: UUID, unspent: int) -> None:
        if block_id == refused:
            raise RuntimeError("not this one")
        await return_block(block_id, unspent)

    monkeypatch.setattr(blocks, "return_block", picky)
    await plane.quotas.close()
    assert [(await usage_of(plane, tenant)).used for tenant in tenants] == [10, 1, 1]


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
    monkeypatch.setattr("tenancy_orm.quotas.holds._RENEW_SECONDS", 0.02)
    tenant = await plane.tenant()
    async with plane.quotas.hold(tenant, "jobs") as hold:
        assert not hold.lost
        await plane.sql("DELETE FROM tenancy.quota_holds")
        async with asyncio.timeout(HANGS):
            while not hold.lost:  # noqa: ASYNC110 - renewals run in the background
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
