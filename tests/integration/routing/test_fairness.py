"""A tenant that saturates its server waits itself, and its neighbours do not: on a real server, by order and share."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig, Tier, deadline
from tenancy_orm.errors import CheckoutRefusedError, CheckoutTimeoutError, ConfigurationError
from tenancy_orm.events import CheckoutDelayed, CheckoutRefused, CheckoutTimedOut, EventBus
from tenancy_orm.routing import Router
from tenancy_orm.routing.budget import Budget
from tenancy_orm.routing.queue import Queue
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.contention import FirstCome
from tests.support.databases import Databases
from tests.support.waiting import until

SLOTS = 4


async def ask(router: Router, tenant: Tenant, sql: str = "SELECT 1") -> Any:
    async with router.session(tenant) as session:
        return await session.scalar(text(sql))


def budget_of(router: Router) -> Budget[Any]:
    return router._connectors["default"].budget


def waiting(router: Router) -> int:
    return router.statistics().servers["default"].waiting


@pytest.mark.parametrize("fair", [True, False], ids=["fair", "first come, first served"])
async def test_a_neighbour_is_served_before_those_that_saturate(
    made: Databases, config: TenancyConfig, fair: bool
) -> None:
    """A crowd of one tenant has every slot; others come, one request after the other. Without fairness, last."""
    loud, *quiet = await made.create_many(4)
    small = config.replace(pool={"max_connections": SLOTS, "max_connections_per_tenant": SLOTS})
    async with support.router(made, small) as router:
        await ask(router, loud)
        budget_of(router)._waiting = Queue() if fair else FirstCome()
        served: list[Tenant] = []
        most = 0

        async def request(tenant: Tenant) -> None:
            nonlocal most
            async with router.session(tenant) as session:
                await session.scalar(text("SELECT pg_sleep(0.005)"))
                most = max(most, budget_of(router).open)
            served.append(tenant)

        crowd = [asyncio.create_task(request(loud)) for _ in range(200)]
        await until(lambda: waiting(router) >= 150)
        waited = []
        for tenant in [*quiet, *quiet]:
            before = len(served)
            await request(tenant)
            waited.append(len(served) - 1 - before)
        await asyncio.gather(*crowd)
        if fair:
            # those that had a connection when it came, and those that are served while it logs in
            assert max(waited) <= 4 * SLOTS
        else:
            assert waited[0] > 100
        assert most <= SLOTS


async def test_tenants_that_saturate_share_by_the_weight_of_their_tiers(made: Databases, config: TenancyConfig) -> None:
    """Of three hundred requests, one with three times the weight gets about three times as many."""
    light, heavy = await made.create_many(2)
    small = config.replace(pool={"max_connections": SLOTS, "max_connections_per_tenant": SLOTS})
    small = small.replace(tiers={"free": Tier("free"), "pro": Tier("pro", weight=3.0)})
    heavy = Tenant(**{name: getattr(heavy, name) for name in ("id", "slug", "status", "placement")}, tier="pro")
    async with support.router(made, small) as router:
        served: list[Tenant] = []

        async def client(tenant: Tenant) -> None:
            while len(served) < 300:
                await ask(router, tenant, "SELECT pg_sleep(0.005)")
                served.append(tenant)

        await asyncio.gather(*(client(tenant) for tenant in (light, heavy) for _ in range(12)))
    assert 1.8 < served.count(heavy) / served.count(light) < 4.5


async def test_who_cannot_be_served_in_time_is_refused_before_it(made: Databases, config: TenancyConfig) -> None:
    """Of a crowd, those with too many before them; the others are served. One event for many of them."""
    loud, quiet = await made.create_many(2)
    events = EventBus()
    refused, delayed = list[CheckoutRefused](), list[CheckoutDelayed]()
    events.subscribe(CheckoutRefused, refused.append)
    events.subscribe(CheckoutDelayed, delayed.append)
    small = config.replace(pool={"max_connections_per_tenant": 1, "checkout_timeout": 20.0})
    async with support.router(made, small, events=events) as router:
        await ask(router, loud)
        crowd = [asyncio.create_task(ask(router, loud, "SELECT pg_sleep(0.1)")) for _ in range(400)]
        await until(lambda: waiting(router) == 399)
        [one] = router.waiting()["default"]
        assert (one.slug, one.waiting_for, one.requests, one.busy) == (loud.slug, "tenant", 399, 1)
        await until(lambda: router.statistics().servers["default"].refused > 100)
        assert await ask(router, quiet) == 1
        with pytest.raises(CheckoutRefusedError) as caught:
            await asyncio.gather(*crowd)
        for task in crowd:
            task.cancel()
        results = await asyncio.gather(*crowd, return_exceptions=True)
        statistics = router.statistics().servers["default"]
    error = caught.value
    assert isinstance(error, CheckoutTimeoutError), "what handles time-outs handles this"
    assert (error.tenant, error.reason, error.setting) == (loud.slug, "deadline", "pool.max_connections_per_tenant")
    assert error.expected > 0 and 1 <= error.retry_after <= 60 and error.waiting > 0
    assert 0 < error.left < error.expected and f"{error.left:.3g} s are left" in str(error)
    assert any(result is None for result in results)
    assert statistics.refused == sum(isinstance(result, CheckoutRefusedError) for result in results)
    assert statistics.waited >= 1 and statistics.waited_seconds > 0
    assert {event.slug for event in refused} == {loud.slug} and len(refused) < 20
    assert len(delayed) < 20 and delayed[0].waiting_for == "tenant"


async def test_a_queue_that_is_full_refuses(made: Databases, config: TenancyConfig) -> None:
    """The tenant's further requests, and nobody else's."""
    loud, quiet = await made.create_many(2)
    small = config.replace(
        pool={"max_connections_per_tenant": 1, "max_waiting_per_tenant": 2, "checkout_timeout": 60.0}
    )
    async with support.router(made, small) as router:
        async with router.connection(loud):
            crowd = [asyncio.create_task(ask(router, loud)) for _ in range(2)]
            await until(lambda: waiting(router) == 2)
            with pytest.raises(CheckoutRefusedError, match=r"pool\.max_waiting_per_tenant") as caught:
                await ask(router, loud)
            assert caught.value.reason == "queue"
            assert await ask(router, quiet) == 1
        assert await asyncio.gather(*crowd) == [1, 1]


async def test_a_deadline_of_the_code_is_sooner_than_the_time_out(made: Databases, config: TenancyConfig) -> None:
    """It waits until then; after it, nothing waits, and what needs not wait is served."""
    [a] = await made.create_many(1)
    events, told = EventBus(), list[CheckoutTimedOut]()
    events.subscribe(CheckoutTimedOut, told.append)
    small = config.replace(pool={"max_connections_per_tenant": 1, "checkout_timeout": 60.0})
    async with support.router(made, small, events=events) as router:
        async with router.connection(a):
            with deadline(30.0), deadline(0.05), deadline(20.0):
                with pytest.raises(CheckoutTimeoutError) as caught:
                    await ask(router, a)
                assert not isinstance(caught.value, CheckoutRefusedError) and 0 < caught.value.timeout <= 0.05
                with pytest.raises(CheckoutRefusedError) as refused:
                    await ask(router, a)
                assert refused.value.timeout == 0.0
            waits = asyncio.create_task(ask(router, a))
            await until(lambda: waiting(router) == 1)
        assert await waits == 1
        with deadline(0.001):
            await asyncio.sleep(0.002)
            assert await ask(router, a) == 1
    assert [(event.slug, event.waiting_for) for event in told] == [(a.slug, "tenant")]
    for wrong in (0, -1, True, "1"):
        with pytest.raises(ConfigurationError, match="above 0"), deadline(wrong):  # type: ignore[arg-type]
            pass


async def test_default_settings_refuse_nothing_on_an_idle_system(tenancy: Tenancy) -> None:
    """Bursts of every tier, cold and warm, then single requests."""
    tenants = [(await tenancy.tenants.create(f"t-{tier}", tier=tier)).tenant for tier in tenancy.config.tiers]

    async def value(tenant: Tenant) -> int:
        return int(await tenancy.fetch_value("SELECT 1", tenant=tenant))

    for _ in range(2):
        assert set(await asyncio.gather(*(value(tenant) for tenant in tenants for _ in range(100)))) == {1}
    for tenant in tenants:
        assert await value(tenant) == 1
    statistics = tenancy.internals.router.statistics().servers["default"]
    assert (statistics.refused, statistics.timed_out, statistics.waiting) == (0, 0, 0)


async def test_threads_have_their_turn_and_their_deadlines(tenancy_config: TenancyConfig) -> None:
    """They share the slots and the order with asynchronous code."""
    small = tenancy_config.replace(pool={"max_connections": 2, "max_connections_per_tenant": 2})
    async with await Tenancy(small).open(initialise=True) as tenancy:
        for slug in ("loud", "quiet"):
            await tenancy.tenants.create(slug)
        served: list[str] = []

        async def request() -> None:
            await tenancy.fetch_value("SELECT pg_sleep(0.01)", tenant="loud")
            served.append("loud")

        def work() -> int:
            with tenancy.sync.session("quiet") as session:
                found = int(session.scalar(text("SELECT 1")) or 0)
            served.append("quiet")
            return found

        crowd = [asyncio.create_task(request()) for _ in range(100)]
        router = tenancy.internals.router
        await until(lambda: waiting(router) >= 90)
        assert await asyncio.to_thread(work) == 1
        assert served.index("quiet") < 50
        await asyncio.gather(*crowd)

        def refused() -> None:
            with deadline(0.05):
                with pytest.raises(CheckoutTimeoutError), tenancy.sync.session("loud") as session:
                    session.scalar(text("SELECT 1"))
                with pytest.raises(CheckoutRefusedError), tenancy.sync.session("loud") as session:
                    session.scalar(text("SELECT 1"))

        async with tenancy.session("loud") as one, tenancy.session("loud") as other:
            await one.connection()
            await other.connection()
            await asyncio.to_thread(refused)


async def test_a_weight_that_is_applied_is_in_force_in_open_processes(tenancy: Tenancy) -> None:
    """Stored with the tiers, shown, and audited; every process shares its connections by it at once."""
    tenant = (await tenancy.tenants.create("acme", tier="pro")).tenant
    assert await tenancy.fetch_value("SELECT 1", tenant=tenant) == 1
    account = budget_of(tenancy.internals.router).account(tenant.id)
    assert account is not None and account.weight == tenancy.config.tiers["pro"].weight == 4.0
    changed = {**tenancy.config.tiers, "pro": Tier("pro", tenancy.config.tiers["pro"].limits, weight=7.5)}
    assert (await tenancy.tiers.apply(changed)).changed == ("pro",)
    assert (await tenancy.tiers.weights())["pro"] == 7.5
    [entry] = await tenancy.audit.events(action="tiers.apply", limit=1)
    assert ((entry.before or {})["pro"]["connection weight"], (entry.after or {})["pro"]["connection weight"]) == (
        4,
        7.5,
    )
    await until(lambda: account.weight == 7.5)
