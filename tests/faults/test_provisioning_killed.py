"""SIGKILL at every step and at random points: reconcile leaves one active tenant or nothing."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tenancy_orm.provisioning import ReconcileReport
from tenancy_orm.provisioning.server_objects import roles
from tenancy_orm.tenant import Status
from tests.support.postgres import Postgres
from tests.support.provisioning import Workshop, names_of, open_workshop, placement
from tests.support.shell import ROOT, environment
from tests.support.warm import Program, start_module

# what is left on the server is compared as a whole
pytestmark = pytest.mark.new_installation

SECONDS = 60.0


@pytest.fixture
async def workshop(postgres: Postgres, control_url: str, name_prefix: str) -> AsyncIterator[Workshop]:
    """A provisioner without tenants, on the server of the run."""
    opened = await open_workshop(control_url=control_url, admin_url=postgres.admin_url, name_prefix=name_prefix)
    try:
        yield opened
    finally:
        await opened.close()


@asynccontextmanager
async def process(
    workshop: Workshop, what: str, slug: str = "acme", at: str | None = None, config: dict[str, Any] | None = None
) -> AsyncIterator[Program]:
    """Another process on the same installation, which has begun when this yields; it is killed in the end."""
    assert workshop.config.servers is not None
    task = {
        "control_url": workshop.config.control_url,
        "admin_url": workshop.config.servers["default"],
        "name_prefix": workshop.config.name_prefix,
        "what": what,
        "slug": slug,
        "at": at,
        "config": config or {},
    }
    child = await start_module(
        "tests.support.provisioning_process", cwd=ROOT, env=environment(), after=["tests.support.provisioning"]
    )
    try:
        child.stdin.write(json.dumps(task).encode())
        child.stdin.close()
        async with asyncio.timeout(SECONDS):
            assert await child.stdout.readline() == b"ready\n"
        yield child
    finally:
        child.kill()
        await child.wait()


async def killed(workshop: Workshop, what: str, *, at: str, config: dict[str, Any] | None = None) -> None:
    """Run another process that dies at a given point."""
    async with process(workshop, what, at=at, config=config) as child, asyncio.timeout(SECONDS):
        assert await child.wait() == -signal.SIGKILL


async def reconcile(workshop: Workshop) -> ReconcileReport:
    """Reconcile until there is nothing left to do; what was done, in all.

    PostgreSQL lets the dead process's connections go once their statements have ended.
    """
    done: dict[str, list[str]] = {}
    async with asyncio.timeout(SECONDS):
        while True:
            report = await workshop.provisioner.reconcile()
            assert report.errors == ()
            assert report.differences == ()
            for name in set(report.__slots__) - {"differences"}:
                done.setdefault(name, []).extend(getattr(report, name))
            if report == ReconcileReport() and not await workshop.registry.unfinished():
                values: dict[str, Any] = {name: tuple(sorted(found)) for name, found in done.items()}
                return ReconcileReport(**values)
            await asyncio.sleep(0.02)


REMOVED = [
    "after register",
    "before role",
    "after role",
    "before database",
    "after database",
    "before grants",
]


@pytest.mark.parametrize("at", REMOVED)
async def test_a_creation_that_is_killed_early_is_removed(workshop: Workshop, at: str) -> None:
    """Neither row nor role nor database is left, and the slug is free again."""
    await workshop.provisioner.template("default")
    await killed(workshop, "create", at=at)
    assert await reconcile(workshop) == ReconcileReport(removed=("acme",))
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})
    await workshop.create("acme")
    await assert_usable(workshop)


async def test_a_creation_that_is_killed_between_the_last_steps_is_removed_or_completed(workshop: Workshop) -> None:
    """It is completed if the last step's name was written, else removed; nothing incomplete stays."""
    await workshop.provisioner.template("default")
    await killed(workshop, "create", at="after grants")
    report = await reconcile(workshop)
    assert report in (ReconcileReport(removed=("acme",)), ReconcileReport(finished=("acme",)))
    if report.removed:
        assert (await workshop.present(), await workshop.slugs()) == (set(), {})
        await workshop.create("acme")
    await assert_usable(workshop)


@pytest.mark.parametrize("at", ["before proved", "after proved", "before complete"])
async def test_a_creation_that_is_killed_late_is_completed(workshop: Workshop, at: str) -> None:
    """If only the last step or the last commit is missing, reconcile repeats it, and the tenant becomes active."""
    await workshop.provisioner.template("default")
    await killed(workshop, "create", at=at)
    assert await reconcile(workshop) == ReconcileReport(finished=("acme",))
    assert await workshop.consistent()
    await assert_usable(workshop)


async def test_a_creation_that_is_killed_after_its_commit_stands(workshop: Workshop) -> None:
    """A creation killed after its commit leaves an active tenant, and nothing to reconcile."""
    await killed(workshop, "create", at="after complete")
    assert await reconcile(workshop) == ReconcileReport()
    assert await workshop.consistent()
    await assert_usable(workshop)


async def test_a_creation_that_is_killed_before_its_row_leaves_nothing(workshop: Workshop) -> None:
    """The lock went with the process."""
    await killed(workshop, "create", at="before register")
    assert await reconcile(workshop) == ReconcileReport()
    assert (await workshop.present(), await workshop.slugs()) == (set(), {})


async def assert_usable(workshop: Workshop) -> None:
    """The tenant works, wholly."""
    tenant = await workshop.registry.find("acme")
    assert (tenant.status, tenant.schema_revision) == (Status.ACTIVE, "0001")
    assert await workshop.present() == names_of(tenant)
    async with workshop.connect(tenant) as connection:
        await connection.execute("INSERT INTO notes (body) VALUES ('works')")


@pytest.mark.parametrize("seed", range(6))
async def test_a_process_that_is_killed_anywhere_leaves_whole_tenants(workshop: Workshop, seed: int) -> None:
    """If a process with several creations is killed, each becomes an active tenant or nothing."""
    await workshop.create("before")
    delay = random.Random(seed).uniform(0.05, 0.6)
    async with process(workshop, "create many", slug=f"t{seed}") as child:
        await asyncio.sleep(delay)
        child.kill()
    await reconcile(workshop)
    assert await workshop.consistent()
    for slug, status in (await workshop.slugs()).items():
        assert status == "active"
        async with workshop.connect(await workshop.registry.find(slug)) as connection:
            assert await connection.fetchval("SELECT count(*) FROM notes") == 0
    leftovers = {name for name in await workshop.databases() if workshop.names.parse(name) is None}
    assert leftovers == {(await workshop.provisioner.template("default")).name}


PURGE = ["begin_purge", "block", "drop_database", "erase", "drop_role", "finish_purge"]


@pytest.mark.parametrize("at", PURGE)
async def test_a_purge_that_is_killed_is_finished(workshop: Workshop, at: str) -> None:
    """The tombstone stays, and nothing else; the slug is free."""
    tenant = await workshop.deleted("acme")
    await workshop.provisioner.align(tenant)
    await killed(workshop, "purge", at=f"after {at}")
    expected = ReconcileReport() if at == "finish_purge" else ReconcileReport(purged=("acme",))
    assert await reconcile(workshop) == expected
    assert (await workshop.present(), await workshop.slugs()) == (set(), {"acme": "purged"})
    await workshop.create("acme")


@pytest.mark.parametrize("at", ["erase", "retire", "revoke_rights"])
async def test_a_purge_that_another_tenant_resists_is_finished(workshop: Workshop, at: str) -> None:
    """If such a purge is killed after the role was renamed, the renamed role is dropped as well."""
    tenant, other = await workshop.deleted("acme"), await workshop.create("globex")
    async with workshop.connect(other) as connection:
        await connection.execute(f'ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO "{placement(tenant).role}"')
    await killed(workshop, "purge", at=f"after {at}")
    report = await reconcile(workshop)
    # the tenant is purged before its role is forgotten elsewhere, which may take long
    purged = () if at == "revoke_rights" else ("acme",)
    assert (report.purged, len(report.orphans)) == (purged, 0 if at == "erase" else 1)
    async with workshop.admin() as connection:
        assert await roles.states(connection, workshop.names.retired("")) == {}
    assert await workshop.present() == names_of(other)
    assert await workshop.slugs() == {"acme": "purged", "globex": "active"}
    await workshop.create("acme")


@pytest.mark.parametrize("at", ["before apply", "after apply", "before complete_template", "after complete_template"])
async def test_a_template_whose_builder_is_killed_is_built_anew(workshop: Workshop, at: str) -> None:
    """An incomplete template is never cloned."""
    await killed(workshop, "template", at=at)
    tenant = await workshop.create("acme")
    async with workshop.connect(tenant) as connection:
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == "0001"
    assert await reconcile(workshop) == ReconcileReport()


async def test_a_template_whose_builder_is_killed_is_removed(workshop: Workshop) -> None:
    """Reconcile drops an incomplete template that no process builds."""
    await killed(workshop, "template", at="after apply")
    report = await reconcile(workshop)
    assert report.orphans != ()
    assert await workshop.databases() == set()


async def test_a_scratch_database_whose_user_is_killed_is_removed(workshop: Workshop) -> None:
    """Its lock went with the process."""
    template = await workshop.provisioner.template("default")
    await killed(workshop, "scratch", at="after scratch")
    report = await reconcile(workshop)
    assert len(report.orphans) == 1
    assert await workshop.databases() == {template.name}
