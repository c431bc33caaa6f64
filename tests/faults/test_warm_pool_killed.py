"""SIGKILL while a warm database is made, claimed or dropped: it becomes one tenant's, or nothing is left of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm.provisioning import ReconcileReport
from tests.faults.test_provisioning_killed import assert_usable, killed, process, reconcile
from tests.support.postgres import Postgres
from tests.support.provisioning import Workshop, open_workshop, placement

# what is left on the server is compared as a whole
pytestmark = pytest.mark.new_installation

POOL: dict[str, Any] = {"warm_pool": 1, "warm_pool_max": 1, "warm_pool_background": False}
CONFIG: dict[str, Any] = {"provisioning": POOL}


@pytest.fixture
async def workshop(postgres: Postgres, control_url: str, name_prefix: str) -> AsyncIterator[Workshop]:
    """A provisioner with an empty pool of one."""
    opened = await open_workshop(
        control_url=control_url, admin_url=postgres.admin_url, name_prefix=name_prefix, **CONFIG
    )
    try:
        yield opened
    finally:
        await opened.close()


async def rows(workshop: Workshop) -> list[tuple[str, str]]:
    """The pool's rows: names and states."""
    async with workshop.control.connect() as connection:
        found = await connection.execute(text("SELECT name, state FROM tenancy.warm_databases ORDER BY name"))
        return [(row.name, row.state) for row in found]


@pytest.mark.parametrize("at", ["after register", "before opened", "after opened", "before proved", "after proved"])
async def test_a_claim_that_is_killed_is_completed_or_removed(workshop: Workshop, at: str) -> None:
    """There is one active tenant, or neither row, role nor database; the claimed one is never claimed again."""
    (name,) = (await workshop.provisioner.warm_pool.refill()).made
    await killed(workshop, "create", at=at, config=CONFIG)
    assert await rows(workshop) == []
    report = await reconcile(workshop)
    removed, finished = ReconcileReport(removed=("acme",)), ReconcileReport(finished=("acme",))
    # between the two steps it depends on whether the second one's name was written
    allowed = {"after opened": (removed, finished), "before proved": (finished,), "after proved": (finished,)}
    assert report in allowed.get(at, (removed,))
    if report.removed:
        assert (await workshop.present(), await workshop.slugs()) == (set(), {})
        await workshop.create("acme")
        assert placement(await workshop.registry.find("acme")).database != name
    else:
        assert placement(await workshop.registry.find("acme")).database == name
    await assert_usable(workshop)


MAKING = ["add_warm", "create_sealed", "clone", "open_to_owner", "grant", "seal"]


@pytest.mark.parametrize("at", MAKING)
async def test_a_warm_database_whose_maker_is_killed_is_removed(workshop: Workshop, at: str) -> None:
    """Nobody claims it: the creation is a cold one, and reconcile drops what is left."""
    await workshop.provisioner.template("default")
    await killed(workshop, "refill", at=f"after {at}", config=CONFIG)
    ((name, state),) = await rows(workshop)
    assert state == "making"
    await workshop.create("acme")
    assert await reconcile(workshop) == ReconcileReport(orphans=(name,))
    assert await rows(workshop) == []
    await assert_usable(workshop)


async def test_a_filling_removes_what_a_killed_one_has_left(workshop: Workshop) -> None:
    """So the worker needs no reconcile."""
    await workshop.provisioner.template("default")
    await killed(workshop, "refill", at="after grant", config=CONFIG)
    ((name, _),) = await rows(workshop)
    made: list[str] = []
    async with asyncio.timeout(60):
        # the dead one's connection goes when its statement has ended
        while not made or await rows(workshop) != [(made[0], "ready")]:
            report = await workshop.provisioner.warm_pool.refill()
            made += report.made
    assert made != [name]
    assert await workshop.present() == {f"database {made[0]}", f"role {made[0]}"}


@pytest.mark.parametrize("at", ["after withdraw", "after drop_database", "after drop_role", "before remove_warm"])
async def test_a_drop_that_is_killed_is_finished(workshop: Workshop, at: str) -> None:
    """What is withdrawn cannot be claimed any more."""
    (name,) = (await workshop.provisioner.warm_pool.refill()).made
    await killed(workshop, "drain", at=at, config=CONFIG)
    assert await rows(workshop) == [(name, "dropping")]
    await workshop.create("acme")
    assert placement(await workshop.registry.find("acme")).database != name
    assert await reconcile(workshop) == ReconcileReport(orphans=(name,))
    assert await rows(workshop) == []
    await assert_usable(workshop)


@pytest.mark.parametrize("seed", range(3))
async def test_processes_that_are_killed_anywhere_share_no_database(workshop: Workshop, seed: int) -> None:
    """Two claim and fill without pause until they are killed: every database is one tenant's, or in the pool."""
    chance = random.Random(seed)
    config = {"provisioning": POOL | {"warm_pool": 4, "warm_pool_max": 4}}
    await workshop.provisioner.template("default")
    async with (
        process(workshop, "create and refill", slug=f"a{seed}", config=config) as first,
        process(workshop, "create and refill", slug=f"b{seed}", config=config) as second,
    ):
        await asyncio.sleep(chance.uniform(0.5, 1.5))
        first.kill()
        await asyncio.sleep(chance.uniform(0.0, 0.3))
        second.kill()
    await reconcile(workshop)
    async with workshop.control.connect() as connection:
        query = "SELECT database_name FROM tenancy.tenants UNION ALL SELECT name FROM tenancy.warm_databases"
        names = list(await connection.scalars(text(query)))
    assert len(names) == len(set(names))
    assert await workshop.present() == {f"{kind} {name}" for name in names for kind in ("database", "role")}
    for slug, status in (await workshop.slugs()).items():
        assert status == "active"
        tenant = await workshop.registry.find(slug)
        async with workshop.connect(tenant) as connection:
            assert await connection.fetchval("SELECT count(*) FROM notes") == 0
            await connection.execute("INSERT INTO notes (body) VALUES ('own')")
