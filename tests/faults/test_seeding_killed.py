"""SIGKILL in a seed: a creation is removed, a run over the fleet is taken up again, and no seed is applied twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy
from tenancy_orm.provisioning import ReconcileReport
from tests.support.killed import run_killed
from tests.support.postgres import Postgres
from tests.support.seeding_process import config_of, seeds_of
from tests.support.waiting import until

pytestmark = pytest.mark.new_installation

SECONDS = 60.0
BODIES = text("SELECT body FROM notes ORDER BY id")

Task = dict[str, Any]


@pytest.fixture
def task(postgres: Postgres, control_url: str, name_prefix: str) -> Task:
    """Where the other process works."""
    return {"control_url": control_url, "admin_url": postgres.admin_url, "name_prefix": name_prefix}


@asynccontextmanager
async def opened(task: Task, *, seeded: bool = True) -> AsyncIterator[Tenancy]:
    """The same application in this process."""
    tenancy = Tenancy(config_of(task, seeds_of("") if seeded else []))
    await tenancy.open(initialise=True)
    try:
        yield tenancy
    finally:
        await tenancy.close()


async def killed(task: Task, what: str, *, at: str) -> None:
    """Run another process that dies at a given point."""
    await run_killed("seeding_process", {**task, "what": what, "at": at}, seconds=SECONDS)


async def reconciled(tenancy: Tenancy) -> ReconcileReport:
    """What a reconcile has done about the creation of a process that has died, after which nothing is left to do."""
    reports: list[ReconcileReport] = []

    async def is_done() -> bool:
        # PostgreSQL lets the dead process's connections go once their statements have ended
        reports.append(await tenancy.internals.provisioner.reconcile())
        return not reports[-1].clean

    await until(is_done, seconds=SECONDS)
    assert (await tenancy.internals.provisioner.reconcile()).clean
    return reports[-1]


@pytest.mark.parametrize("at", ["after seeds", "before complete"])
async def test_a_creation_that_is_killed_after_its_seeds_is_completed(task: Task, at: str) -> None:
    async with opened(task) as tenancy:
        await tenancy.internals.provisioner.template("default")
        await killed(task, "create", at=at)
        assert await reconciled(tenancy) == ReconcileReport(finished=("acme",))
        async with tenancy.session("acme") as session:
            assert list(await session.scalars(BODIES)) == ["base", "first", "second"]


@pytest.mark.parametrize("at", ["before seeds", "in acme"])
async def test_a_creation_that_is_killed_with_its_seeds_is_removed(task: Task, at: str) -> None:
    """Reconcile leaves no tenant that has some of its seeds, and the slug is free."""
    async with opened(task) as tenancy:
        await tenancy.internals.provisioner.template("default")
        await killed(task, "create", at=at)
        assert await reconciled(tenancy) == ReconcileReport(removed=("acme",))
        await tenancy.tenants.create("acme")
        async with tenancy.session("acme") as session:
            assert list(await session.scalars(BODIES)) == ["base", "first", "second"]


async def test_a_run_that_is_killed_is_taken_up_again(task: Task) -> None:
    """What was committed is recorded, what was not is done again, each seed once."""
    async with opened(task, seeded=False) as tenancy:
        for slug in ("acme", "globex", "initech"):
            await tenancy.tenants.create(slug)
    async with opened(task) as tenancy:
        await killed(task, "apply", at="in globex")
        outstanding = [x.outstanding for x in await tenancy.seeds.status()]
        assert outstanding == [(), ("second",), ("base", "first", "second")]
        assert (await tenancy.seeds.apply()).ok
        for slug in ("acme", "globex", "initech"):
            async with tenancy.session(slug) as session:
                assert list(await session.scalars(BODIES)) == ["base", "first", "second"]
