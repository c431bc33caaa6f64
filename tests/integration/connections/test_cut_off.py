"""A process that cannot reach the control database, and what it goes on to use.

What it takes to be the time of its last renewal is set back here, so that its leases are about to expire at once.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.connections import Lease, usage
from tenancy_orm.connections.lease import CUT_OFF_SECONDS
from tenancy_orm.deadlines import clock
from tenancy_orm.errors import ServerUnavailableError
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.proxy import proxied
from tests.support.waiting import until

NAMES = ("one", "two", "three", "four", "five")


def of_many(config: TenancyConfig, postgres: Postgres) -> TenancyConfig:
    """A configuration with several servers: one cluster by as many names."""
    servers = dict.fromkeys(NAMES, postgres.admin_url)
    return config.replace(servers=servers, default_server="one", directory={"grace": 600.0})


def leases_of(tenancy: Tenancy, *names: str) -> list[Lease]:
    return [tenancy.internals.leases.lease(name) for name in names]


def proof_of(tenancy: Tenancy, server: str) -> int | None:
    """The process id of the backend that holds the lock which proves that a process lives."""
    connection: Any = tenancy.internals.leases._proofs.get(server)
    return None if connection is None else connection.get_server_pid()


@pytest.mark.new_installation
async def test_it_proves_that_it_lives_on_every_busy_server_before_its_leases_expire(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """However many servers it asks for more connections of, while the control database answers nothing."""
    config = of_many(tenancy_config, postgres)
    async with (
        opened(config, initialise=True),
        proxied(config.control_url) as proxy,
        opened(config.replace(control_url=proxy.url(config.control_url))) as cut,
    ):
        leases = leases_of(cut, *NAMES)
        processes = cut.internals.leases.processes
        proxy.swallow()
        asking = [asyncio.create_task(lease.ask(timeout=60)) for lease in leases]
        for lease in leases:
            lease.valid_until -= 3.0
        await until(
            lambda: all(lease.is_present for lease in leases) or any(clock() >= lease.valid_until for lease in leases)
        )
        assert [lease.is_present for lease in leases] == [True] * len(NAMES)
        assert [lease.allowed for lease in leases] == [min(lease.granted, lease.guaranteed) for lease in leases]
        assert all(lease.allowed > 0 for lease in leases)
        proxy.restore()
        await until(lambda: not any(lease.is_cut_off for lease in leases))
        assert cut.internals.leases.processes == processes
        await asyncio.gather(*asking)


@pytest.mark.new_installation
async def test_what_is_ended_on_a_server_is_not_another_name_of_the_same_cluster(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """The connections to each have a tag of their own, and each is none of the other's."""
    config = of_many(tenancy_config, postgres)
    async with opened(config, initialise=True) as tenancy, postgres.connect() as admin:
        acme = (await tenancy.tenants.create("acme", server="one")).tenant
        globex = (await tenancy.tenants.create("globex", server="two")).tenant
        one, two = leases_of(tenancy, "one", "two")
        async with tenancy.session(acme) as ended, tenancy.session(globex) as kept:
            for session in (ended, kept):
                await session.execute(text("SELECT 1"))
            counted = await usage.count(admin, tenancy.internals.leases._care._stem)
            assert (counted.tenants[one.tag], counted.tenants[two.tag]) == (1, 1)
            assert counted.others({one.tag: 1}, elsewhere={two.tag}) == counted.foreign + 1
            await usage.end_tagged(admin, one.tag, timeout=60)
            await kept.execute(text("SELECT 1"))


async def test_a_proof_that_is_lost_is_made_again(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """As where the tenants' server restarts during an outage of the control database; what it keeps, it keeps on."""
    await tenancy.tenants.create("acme")
    async with (
        proxied(tenancy_config.control_url) as proxy,
        opened(
            tenancy_config.replace(control_url=proxy.url(tenancy_config.control_url), directory={"grace": 600.0})
        ) as cut,
        postgres.connect() as admin,
    ):
        [lease] = leases_of(cut, "default")
        assert await cut.fetch_value("SELECT 1", tenant="acme") == 1
        proxy.refuse()
        lease.valid_until -= CUT_OFF_SECONDS
        await until(lambda: lease.is_present)
        assert "cut off from the control database" in lease.explain(1)
        former = proof_of(cut, "default")
        await admin.execute("SELECT pg_terminate_backend($1)", former)
        await until(lambda: proof_of(cut, "default") not in (None, former), seconds=20.0)
        lease.valid_until = clock() - 1.0
        assert lease.is_present and lease.allowed > 0
        assert await cut.fetch_value("SELECT 1", tenant="acme") == 1


async def test_a_process_whose_lease_is_over_refuses_at_once(
    tenancy: Tenancy, tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """Others may have its connections by then. Who waits is refused as well, and all goes on after the outage."""
    await tenancy.tenants.create("acme")
    async with (
        proxied(tenancy_config.control_url) as proxy,
        opened(
            tenancy_config.replace(
                control_url=proxy.url(tenancy_config.control_url),
                directory={"grace": 600.0},
                pool={"max_connections": 1, "checkout_timeout": 600.0},
            )
        ) as cut,
        postgres.connect() as admin,
    ):
        [lease] = leases_of(cut, "default")

        async def in_thread() -> Any:
            return await asyncio.to_thread(cut.sync.fetch_value, "SELECT 1", tenant="acme")

        async def in_loop() -> Any:
            return await cut.fetch_value("SELECT 1", tenant="acme")

        assert (await in_thread(), await in_loop()) == (1, 1)
        proxy.refuse()
        lease.valid_until -= CUT_OFF_SECONDS
        await until(lambda: lease.is_present)
        async with cut.session("acme") as busy:
            await busy.execute(text("SELECT 1"))
            waiting = [asyncio.create_task(work()) for work in (in_loop, in_thread)]
            await until(lambda: cut.internals.router.statistics().servers["default"].waiting == 2)
            lease.valid_until = clock() - 1.0
            await admin.execute("SELECT pg_terminate_backend($1)", proof_of(cut, "default"))
            await until(lambda: lease.is_over)
            for refused in (*waiting, in_loop(), in_thread()):
                with pytest.raises(ServerUnavailableError, match="could not renew its share") as raised:
                    await refused
                assert (raised.value.tenant, raised.value.retry_after) == ("acme", 1.0)
            await busy.invalidate()
        proxy.restore()
        await until(lambda: not lease.is_cut_off)
        assert (await in_thread(), await in_loop()) == (1, 1)


async def test_it_goes_by_its_own_clock_whatever_the_control_database_does(tenancy: Tenancy) -> None:
    """Also while it waits for an answer from there."""
    [lease] = leases_of(tenancy, "default")
    runner = tenancy.internals.leases._runner
    assert runner is not None
    runner.cancel()
    await asyncio.gather(runner, return_exceptions=True)
    lease.valid_until = clock() + CUT_OFF_SECONDS / 2
    await until(lambda: lease.is_cut_off and lease.is_present)
