"""Tenants that are upgraded before their use because the setting ``migration.on_demand`` says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import ControlUnavailableError, TaskRefusedError, TenantRevisionError
from tenancy_orm.events import TenantMigrated, TenantMigrationFailed
from tenancy_orm.tasks.gate import Message, TaskGate
from tests.support.fleet import until
from tests.support.projects import Project
from tests.support.releases import Release, create, next_project, released
from tests.support.waiting import HANGS


@pytest.fixture
async def old(config: TenancyConfig, project: Project) -> AsyncIterator[Release]:
    """The present release, at 0002; it would upgrade on demand, too."""
    next_project(project)
    settings = config.replace(compatible_revisions="0002", migration={"on_demand": True})
    async with released(settings, "*", initialise=True) as release:
        yield release


@pytest.fixture
def new_config(config: TenancyConfig, project: Project, old: Release) -> TenancyConfig:
    """The next release's: it needs 0003."""
    migrations = Project(project.root.parent / "next").migrations
    return config.replace(migrations=migrations, compatible_revisions="0003:", migration={"on_demand": True})


@asynccontextmanager
async def opened(config: TenancyConfig) -> AsyncIterator[tuple[Release, list[str]]]:
    """A process of the next release, and the tenants that were upgraded there, or failed to be."""
    async with released(config, "id, rating") as release:
        received: list[str] = []
        events = release.tenancy.events
        events.subscribe(TenantMigrated, lambda event: received.append(event.slug) if event.changed else None)
        events.subscribe(TenantMigrationFailed, lambda event: received.append(f"{event.slug} failed"))
        yield release, received


async def control(release: Release, sql: str) -> Any:
    async with release.tenancy.internals.control.transaction() as connection:
        result = await connection.execute(text(sql))
        return [tuple(row) for row in result] if result.returns_rows else None


async def test_requests_of_all_processes_share_one_upgrade(old: Release, new_config: TenancyConfig) -> None:
    """It is at the first request, in the audit log, and concerns that tenant alone."""
    acme, _ = [await create(old, slug) for slug in ("acme", "globex")]
    async with opened(new_config) as (one, received), opened(new_config) as (other, also_received):
        answers = await asyncio.gather(*(release.get(acme) for release in (one, other) * 20))
        assert answers == [200] * 40
        assert received + also_received == ["acme"]
        assert [await old.fleet.recorded(slug) for slug in ("acme", "globex")] == ["0003", "0002"]
        events = await one.tenancy.audit.events(action="tenant.upgrade")
        assert [(event.slug, event.detail) for event in events] == [("acme", {"before": "0002", "after": "0003"})]
        assert await control(one, "SELECT * FROM tenancy.tenant_upgrades") == []
    # older code neither serves nor changes it
    await until(lambda: old.get(acme), 503)
    assert await old.fleet.revision("acme") == "0003"


async def test_without_a_notice_nothing_is_changed(
    old: Release, new_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old code would go on to serve the tenant at a schema that it does not know."""
    acme = await create(old, "acme")

    async def fail(*_: object, **__: object) -> None:
        raise ControlUnavailableError("the control database", "injected")

    async with opened(new_config) as (new, received):
        monkeypatch.setattr(new.fleet.registry, "announce_migration", fail)
        assert (await new.get(acme), received) == (503, ["acme failed"])
    assert await old.fleet.revision("acme") == "0002"
    assert await old.get(acme) == 200


async def test_an_upgrade_that_takes_long_answers_503_and_goes_on(old: Release, new_config: TenancyConfig) -> None:
    acme = await create(old, "acme")
    async with opened(new_config.replace(migration={"upgrade_wait": 0.05})) as (new, received):
        async with old.fleet.connect("acme") as other, other.transaction():
            await other.execute("LOCK TABLE notes")
            answer = await new.client.get("/notes", headers={"X-API-Key": acme})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            # later ones at once
            async with asyncio.timeout(HANGS):
                assert [await new.get(acme) for _ in range(3)] == [503] * 3
            # and a task is tried again
            message = Message(task="count", id="1", arguments=())
            async with old.tenancy.scope("acme"):
                header = TaskGate(old.tenancy, queue="tests").send(message)
            with pytest.raises(TaskRefusedError, match="being provisioned") as raised:
                await TaskGate(new.tenancy, queue="tests").arrive(header, message)
            assert (raised.value.reason, raised.value.outcome) == ("provisioning", "retry")
        await until(lambda: new.get(acme), 200)
        assert received == ["acme"]


async def test_a_failed_upgrade_is_recorded_and_left_alone_by_every_process(
    old: Release, new_config: TenancyConfig
) -> None:
    """For a minute, then for twice as long; and served again after the next migration that succeeds."""
    acme = await create(old, "acme")
    await old.fleet.execute("acme", "ALTER TABLE notes ADD rating text")
    async with opened(new_config) as (one, received), opened(new_config) as (other, also_received):
        answers = await asyncio.gather(*(release.get(acme) for release in (one, other) * 5))
        assert answers == [503] * 10
        assert [await one.get(acme), await other.get(acme)] == [503, 503]
        assert received + also_received == ["acme failed"]
        [failed] = await one.fleet.registry.failed_upgrades()
        assert (failed.slug, failed.target, failed.failures, failed.sqlstate) == ("acme", "0003", 1, "42701")
        assert 50 < (failed.next_at - failed.failed_at).total_seconds() < 61  # each by a clock of its own

        async def again() -> None:
            await control(one, "UPDATE tenancy.tenant_upgrades SET next_at = now()")
            one.tenancy._lifetime.parts.first_use._left.clear()
            one.tenancy.internals.directory.invalidate()

        await again()
        assert await one.get(acme) == 503
        [failed] = await one.fleet.registry.failed_upgrades()
        assert (failed.failures, (failed.next_at - failed.failed_at).total_seconds() > 100) == (2, True)
        await old.fleet.execute("acme", "ALTER TABLE notes DROP rating")
        assert await one.get(acme) == 503
        (await other.fleet.migrations.upgrade(tenants=["acme"])).raise_for_failures()
        await until(lambda: one.get(acme), 200)
        assert await one.fleet.registry.failed_upgrades() == []
        # by either of them
        assert sorted(received + also_received) == ["acme", "acme failed", "acme failed"]


async def test_without_a_declaration_every_tenant_that_is_behind_is_upgraded(
    old: Release, new_config: TenancyConfig
) -> None:
    """One that fails is used as it is."""
    acme, globex = [await create(old, slug) for slug in ("acme", "globex")]
    await old.fleet.execute("globex", "ALTER TABLE notes ADD rating text")
    async with opened(new_config.replace(compatible_revisions=None)) as (new, received):
        assert [await new.get(acme), await new.get(globex)] == [200, 200]
        assert received == ["acme", "globex failed"]


async def test_what_an_operator_has_moved_back_stays_there(old: Release, new_config: TenancyConfig) -> None:
    """Until an operator upgrades it again."""
    acme = await create(old, "acme")
    async with opened(new_config) as (new, received):
        assert await new.get(acme) == 200
        await new.fleet.migrations.downgrade("0002", tenants=["acme"])
        await until(lambda: old.get(acme), 200)
        await until(lambda: new.get(acme), 503)
        assert await old.fleet.revision("acme") == "0002"
        await new.fleet.migrations.upgrade(tenants=["acme"])
        await until(lambda: new.get(acme), 200)
        assert received == ["acme"] * 3


async def test_older_code_upgrades_nothing(old: Release, new_config: TenancyConfig) -> None:
    """Not even to its own head, once the fleet is at a revision that it does not know."""
    await old.fleet.create("acme")
    async with opened(new_config) as (new, _):
        await new.fleet.migrations.upgrade(tenants=[])
        await new.fleet.registry.set_fleet_revision("0003")
        await new.fleet.registry.set_revision(old.fleet.tenants["acme"].id, "0001")
        received: list[object] = []
        old.tenancy.events.subscribe(TenantMigrated, received.append)
        await until(lambda: asyncio.sleep(0, old.tenancy.internals.directory.peek_tenant("acme") is None))
        with pytest.raises(TenantRevisionError):
            await old.tenancy.fetch_value("SELECT 1", tenant="acme")
        assert (received, await old.fleet.recorded("acme")) == ([], "0001")


async def test_the_claim_of_a_killed_process_ends_and_another_one_goes_on(
    old: Release, new_config: TenancyConfig
) -> None:
    """Until then it may still be at work."""
    acme = await create(old, "acme")
    async with opened(new_config.replace(migration={"upgrade_wait": 0.1})) as (new, received):
        await control(
            new,
            "INSERT INTO tenancy.tenant_upgrades (tenant_id, target, claim, claimed_until) "
            "SELECT id, '0003', gen_random_uuid(), 'infinity' FROM tenancy.tenants WHERE slug = 'acme'",
        )
        assert (await new.get(acme), received) == (503, [])
        await control(new, "UPDATE tenancy.tenant_upgrades SET claimed_until = now()")
        await until(lambda: new.get(acme), 200)
        assert received == ["acme"]


async def test_closing_lets_the_next_process_go_on_at_once(old: Release, new_config: TenancyConfig) -> None:
    acme = await create(old, "acme")
    async with old.fleet.connect("acme") as other, other.transaction():
        await other.execute("LOCK TABLE notes")
        async with opened(new_config) as (new, _):
            using = asyncio.create_task(new.get(acme))
            await until(lambda: other.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
            await new.tenancy.close(timeout=1)
            assert await using == 503
    assert await old.fleet.revision("acme") == "0002"
    assert await control(old, "SELECT claim, failures FROM tenancy.tenant_upgrades") == [(None, 0)]
    async with opened(new_config) as (again, _):
        assert await again.get(acme) == 200
