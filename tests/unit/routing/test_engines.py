"""The engine cache: one engine per tenant, bounded, and none dropped while it is leased. Nothing here connects."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from tenancy_orm.config import PoolConfig, TenancyConfig
from tenancy_orm.errors import NotOpenError, UnknownServerError
from tenancy_orm.events import EngineEvicted, EventBus
from tenancy_orm.routing import Router
from tenancy_orm.secrets.keyring import Keyring
from tenancy_orm.servers import Servers
from tenancy_orm.tenant import Placement, Status, Tenant

KEYRING = Keyring({"1": bytes(32)})


def tenant(number: int) -> Tenant:
    name = f"db{number}"
    return Tenant(
        id=UUID(int=number),
        slug=f"t{number}",
        status=Status.ACTIVE,
        tier="free",
        placement=Placement("default", name, name, b"sealed"),
    )


def make(max_engines: int = 3, events: EventBus | None = None) -> Router:
    config = TenancyConfig(control_url="postgresql://nobody@127.0.0.1:1/none", pool=PoolConfig(max_engines=max_engines))
    return Router(config, Servers(config), KEYRING, uuid4(), events or EventBus())


async def test_everybody_gets_the_same_engine() -> None:
    """Concurrent requests for one tenant get the same engine."""
    router = make()

    async def request() -> int:
        async with router.lease(tenant(1)) as engine:
            await asyncio.sleep(0)
            return id(engine)

    assert len(set(await asyncio.gather(*(request() for _ in range(100))))) == 1
    assert router.statistics().engines == 1


async def test_the_engine_used_longest_ago_is_dropped() -> None:
    """The age of an engine is counted from the end of its last lease."""
    events, dropped = EventBus(), list[str]()
    events.subscribe(EngineEvicted, lambda event: dropped.append(event.slug))
    router = make(3, events)
    for number in (1, 2, 3, 1, 4, 5):
        async with router.lease(tenant(number)):
            pass
    assert dropped == ["t2", "t3"]
    assert router.statistics().engines == 3


async def test_no_engine_is_dropped_while_it_is_leased() -> None:
    """The cache exceeds its bound until leases end."""
    router = make(2)
    leases = [router.lease(tenant(number)) for number in range(6)]
    engines = [await lease.__aenter__() for lease in leases]
    assert router.statistics().engines == router.statistics().leased == 6
    for number, engine in enumerate(engines):
        async with router.lease(tenant(number)) as again:
            assert again is engine
            assert not engine.sync_engine.pool.retired  # type: ignore[attr-defined]
    for lease in leases:
        await lease.__aexit__(None, None, None)
    assert (router.statistics().engines, router.statistics().leased) == (2, 0)


async def test_any_order_of_leases_keeps_the_bound_and_the_leased() -> None:
    """Random leases of ten times more tenants than the bound never drop a leased engine."""
    router, chance = make(10), random.Random(3)

    async def request() -> None:
        for _ in range(50):
            number = chance.randrange(100)
            async with router.lease(tenant(number)) as engine:
                await asyncio.sleep(0)
                pool = engine.sync_engine.pool
                assert pool.slug == f"t{number}"  # type: ignore[attr-defined]
                assert not pool.retired  # type: ignore[attr-defined]
                statistics = router.statistics()
                assert statistics.engines <= max(10, statistics.leased)

    await asyncio.gather(*(request() for _ in range(20)))
    assert (router.statistics().engines, router.statistics().leased) == (10, 0)


@pytest.mark.parametrize("field", ["database", "role", "sealed_password"])
async def test_another_placement_is_another_engine(field: str) -> None:
    """A changed placement gets a new engine, also for code that looked the tenant up before the change."""
    router, before = make(), tenant(1)
    assert before.placement is not None
    changes: dict[str, Any] = {field: b"other" if field == "sealed_password" else "other"}
    after = replace(before, placement=replace(before.placement, **changes))
    async with router.lease(before) as old, router.lease(after) as new:
        assert old is not new
        assert old.sync_engine.pool.retired  # type: ignore[attr-defined]
        assert not new.sync_engine.pool.retired  # type: ignore[attr-defined]
    assert (router.statistics().engines, router.statistics().leased) == (1, 0)


async def test_an_engine_does_not_keep_the_old_slug() -> None:
    """Errors and events name a renamed tenant by its new slug."""
    router = make()
    async with router.lease(tenant(1)):
        pass
    async with router.lease(replace(tenant(1), slug="renamed")) as engine:
        assert engine.sync_engine.pool.slug == "renamed"  # type: ignore[attr-defined]


async def test_a_retired_engine_is_not_found_again() -> None:
    """After a retirement a lease gets another engine, and the end of the old lease changes nothing."""
    router = make()
    async with router.lease(tenant(1)) as old:
        router.retire(tenant(1).id)
        async with router.lease(tenant(1)) as new:
            assert new is not old
    assert (router.statistics().engines, router.statistics().leased) == (1, 0)
    router.retire(uuid4())


async def test_a_dropped_engine_is_gone() -> None:
    """A dropped engine is freed at once, without the cyclic garbage collector."""
    router = make(1)
    async with router.lease(tenant(1)) as engine:
        dropped = weakref.ref(engine.sync_engine.pool)
    del engine
    gc.disable()
    try:
        async with router.lease(tenant(2)):
            pass
        assert dropped() is None
    finally:
        gc.enable()


async def test_an_unknown_server_is_an_error_that_names_it() -> None:
    """A placement on a server that is no longer configured raises an error with the server's name."""
    router, lost = make(), tenant(1)
    assert lost.placement is not None
    with pytest.raises(UnknownServerError, match="'elsewhere'"):
        async with router.lease(replace(lost, placement=replace(lost.placement, server="elsewhere"))):
            pass
    assert router.statistics().engines == 0


async def test_a_closed_router_leases_nothing() -> None:
    """A closed router leases no engine, not even one that it had."""
    router = make()
    async with router.lease(tenant(1)):
        pass
    await router.close()
    with pytest.raises(NotOpenError):
        async with router.lease(tenant(1)):
            pass
