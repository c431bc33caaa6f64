"""Two versions of an application side by side, with a migration between them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tenancy_orm import TenancyConfig, Tenant
from tenancy_orm.errors import TenantProvisioningError, TenantSuspendedError
from tenancy_orm.events import TenantMigrated, TenantMigrationFailed
from tests.support.fleet import until
from tests.support.projects import Project
from tests.support.releases import Release, create, next_project, released
from tests.support.waiting import HANGS


@pytest.fixture
def new_project(project: Project) -> Project:
    """The next release's directory: ``project`` at its head, and the revision 0003."""
    return next_project(project)


@pytest.fixture
async def old(config: TenancyConfig, new_project: Project) -> AsyncIterator[Release]:
    """The present release, at 0002, with the tenants acme and globex."""
    async with released(config, "*", initialise=True) as release:
        await release.fleet.create("acme", "globex")
        yield release


@pytest.fixture
def new_config(config: TenancyConfig, new_project: Project) -> TenancyConfig:
    return config.replace(migrations=new_project.migrations)


@pytest.fixture
async def new(old: Release, new_config: TenancyConfig) -> AsyncIterator[Release]:
    """The next release, at 0003."""
    async with released(new_config, "id, rating") as release:
        yield release


async def audited(release: Release, slug: str) -> list[Any]:
    events = await release.tenancy.audit.events(action="tenant.catch_up")
    return [event.detail for event in events if event.slug == slug]


async def test_no_request_fails_and_every_tenant_reaches_the_new_revision(old: Release, new: Release) -> None:
    """Requests go on in both releases while the fleet is migrated and while old code creates tenants."""
    keys = [await create(old, slug) for slug in ("hooli", "initech")]
    answers: Counter[tuple[str, int]] = Counter()
    migrated = asyncio.Event()
    done = False

    async def request(release: Release, name: str, key: str) -> None:
        while not done:
            answers[name, await release.get(key)] += 1

    async def request_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for key in keys * 3:
                tasks.create_task(request(old, "old", key))
            await migrated.wait()
            for key in keys * 3:
                tasks.create_task(request(new, "new", key))

    serving = asyncio.create_task(request_all())
    await until(lambda: asyncio.sleep(0, answers["old", 200] > 30))
    (await new.fleet.migrations.upgrade()).raise_for_failures()
    migrated.set()
    for number in range(3):
        late = await create(old, f"late-{number}")
        assert await old.fleet.recorded(f"late-{number}") == "0002"
        # from the first request on, in both
        assert [await new.get(late), await old.get(late), await new.get(late)] == [200, 200, 200]
        assert await old.fleet.recorded(f"late-{number}") == "0003"
    await until(lambda: asyncio.sleep(0, answers["new", 200] > 30))
    done = True
    await serving
    assert set(answers) == {("old", 200), ("new", 200)}
    assert await audited(new, "late-0") == [{"before": "0002", "after": "0003"}]


async def test_housekeeping_upgrades_what_nobody_has_used(old: Release, new: Release) -> None:
    """Old code's housekeeping does nothing, before and after."""
    received: list[str] = []
    new.tenancy.events.subscribe(TenantMigrated, lambda event: received.append(event.slug))
    await new.fleet.migrations.upgrade()
    await create(old, "late")
    received.clear()
    assert (await old.tenancy.run_housekeeping()).chores["catch_up"].upgraded == ()
    reports = await asyncio.gather(*(new.tenancy.run_housekeeping() for _ in range(2)))
    assert {slug for report in reports for slug in report.chores["catch_up"].upgraded} == {"late"}
    assert await new.fleet.revision("late") == await new.fleet.recorded("late") == "0003"
    assert set(received) == {"late"}
    # one of the two migrated it
    assert len(await audited(new, "late")) == 1
    assert (await old.tenancy.run_housekeeping()).chores["catch_up"].upgraded == ()
    assert await old.fleet.recorded("late") == "0003"


async def test_a_new_release_migrates_no_fleet_by_being_started(old: Release, new: Release) -> None:
    """Neither before the fleet was migrated, nor after a migration that did not reach all, nor after a downgrade."""

    async def unmoved(slug: str) -> None:
        await new.tenancy.run_housekeeping()
        assert await new.tenancy.fetch_value("SELECT 1", tenant=slug) == 1
        assert await new.fleet.recorded(slug) == "0002"

    assert await new.fleet.registry.fleet_revision() is None
    await unmoved("acme")
    await new.fleet.migrations.upgrade(tenants=["globex"])
    assert await new.fleet.registry.fleet_revision() is None
    await unmoved("acme")
    # a failure
    await old.fleet.execute("acme", "ALTER TABLE notes ADD rating text")
    assert not (await new.fleet.migrations.upgrade()).ok
    assert await new.fleet.registry.fleet_revision() is None
    await unmoved("acme")
    await old.fleet.execute("acme", "ALTER TABLE notes DROP rating")
    await new.fleet.migrations.upgrade()
    assert await new.fleet.registry.fleet_revision() == "0003"
    # what an operator has moved on purpose stays there
    await new.fleet.migrations.downgrade("0002", tenants=["acme"])
    await unmoved("acme")
    await new.fleet.migrations.downgrade("0002")
    assert await new.fleet.registry.fleet_revision() == "0002"
    await create(old, "late")
    await unmoved("late")


async def test_it_can_be_turned_off(old: Release, new_config: TenancyConfig) -> None:
    """Then the application's own code fails on a tenant that is behind, as everywhere without it."""
    async with released(new_config.replace(migration={"catch_up": False}), "id, rating") as new:
        await new.fleet.migrations.upgrade()
        key = await create(old, "late")
        assert await new.get(key) == 500
        assert (await new.tenancy.run_housekeeping()).chores["catch_up"].upgraded == ()
        assert await new.fleet.recorded("late") == "0002"


async def test_a_failed_upgrade_is_reported_and_not_tried_at_each_request(old: Release, new: Release) -> None:
    """The tenant is used as it is: new code may still be able to."""
    failed: list[str] = []
    new.tenancy.events.subscribe(TenantMigrationFailed, lambda event: failed.append(event.slug))
    await new.fleet.migrations.upgrade()
    await create(old, "late")
    await old.fleet.execute("late", "ALTER TABLE notes ADD rating text")
    for _ in range(3):
        assert await new.tenancy.fetch_value("SELECT count(rating) FROM notes", tenant="late") == 0
        new.tenancy.internals.directory.invalidate()
    assert failed == ["late"]
    report = await new.tenancy.run_housekeeping()
    assert "late" in report.chores["catch_up"].errors[0]
    assert any("catch_up" in error for error in report.errors)


async def test_an_upgrade_that_takes_long_is_not_waited_for(old: Release, new_config: TenancyConfig) -> None:
    """The answer is 503, with a time after which to try again, and the upgrade goes on."""
    async with released(new_config.replace(migration={"upgrade_wait": 0.05}), "id, rating") as new:
        await new.fleet.migrations.upgrade()
        key = await create(old, "late")
        async with old.fleet.connect("late") as other, other.transaction():
            await other.execute("LOCK TABLE notes")
            answer = await new.client.get("/notes", headers={"X-API-Key": key})
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
            with pytest.raises(TenantProvisioningError):
                await new.tenancy.fetch_value("SELECT 1", tenant="late")
        await until(lambda: new.fleet.recorded("late"), "0003")
        assert await new.get(key) == 200


async def test_what_changes_during_an_upgrade_counts(old: Release, new: Release) -> None:
    """The look-ups that wait for it have read the key and the tenant before it was revoked, and suspended."""
    await new.fleet.migrations.upgrade()
    keys = [await create(old, slug) for slug in ("late", "later")]
    credentials = [await old.tenancy.internals.directory.authenticate(key) for key in keys]
    begun = asyncio.Event()
    go_on = asyncio.Event()

    async def stopped(tenant: Tenant) -> None:
        begun.set()
        await go_on.wait()
        new.tenancy._lifetime.parts.first_use._leave(tenant.id, 60.0)  # as after a failure

    new.tenancy._lifetime.parts.first_use._upgrade = stopped  # type: ignore[method-assign]
    requests = [asyncio.create_task(new.get(key)) for key in keys]
    fetch = asyncio.create_task(new.tenancy.fetch_value("SELECT 1", tenant="later"))
    await begun.wait()
    received: list[object] = []
    new.tenancy.internals.directory.on_invalidate(received.append)
    await old.tenancy.keys.revoke(credentials[0].id)
    await old.tenancy.tenants.suspend("later")
    await until(lambda: asyncio.sleep(0, credentials[1].tenant.id in received))
    go_on.set()
    assert await asyncio.gather(*requests) == [401, 403]
    with pytest.raises(TenantSuspendedError):
        await fetch


async def test_upgrades_delay_no_other_tenant(
    old: Release, new_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First uses of keys from one address are limited, as guesses are; a right key that waits is none."""
    async with released(new_config.replace(lockout={"failures": 1}), "id, rating") as new:
        await new.fleet.migrations.upgrade()
        key = await create(old, "late")
        known = await create(new, "initech")
        async with old.fleet.connect("late") as other, other.transaction():
            await other.execute("LOCK TABLE notes")
            waiting = asyncio.create_task(new.get(key))
            await until(lambda: other.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
            async with asyncio.timeout(HANGS):
                assert await new.get(known) == 200
        assert await waiting == 200


async def test_closing_ends_an_upgrade(old: Release, new_config: TenancyConfig) -> None:
    """What it has not committed is rolled back, and the next process does it."""
    async with released(new_config, "*") as new:
        await new.fleet.migrations.upgrade()
        key = await create(old, "late")
        async with old.fleet.connect("late") as other, other.transaction():
            await other.execute("LOCK TABLE notes")
            using = asyncio.create_task(new.get(key))
            await until(lambda: other.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
            await new.tenancy.close(timeout=1)
            assert await using == 503
        assert await old.fleet.revision("late") == "0002"
    async with released(new_config, "id, rating") as again:
        assert await again.get(key) == 200


async def test_open_connections_learn_that_a_schema_changes(
    old: Release, new: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the notifications, the second statement of a transaction fails once in each open connection."""
    key = await create(old, "initech")
    assert await old.get(key) == 200
    router = old.tenancy.internals.router
    received: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(router, "schema_changed", lambda tenant, changing: received.append(changing))
        old.tenancy.internals.directory._schema_callbacks[:] = [router.schema_changed]
        await new.fleet.migrations.upgrade(tenants=["initech"])
        await until(lambda: asyncio.sleep(0, received == [True, False]))
        assert await old.get(key) == 500
    old.tenancy.internals.directory._schema_callbacks[:] = [router.schema_changed]
    before = await old.tenancy.fetch_value("SELECT pg_backend_pid()", tenant="initech")
    assert await old.get(key) == 200
    # the connection stays open
    await new.fleet.migrations.downgrade("0002", tenants=["initech"])
    await new.fleet.migrations.upgrade(tenants=["initech"])
    assert await old.get(key) == 200
    assert await old.tenancy.fetch_value("SELECT pg_backend_pid()", tenant="initech") == before
    # and so are notifications that it has missed
    listener = old.tenancy.internals.directory._listener
    await listener.close()
    await new.fleet.migrations.downgrade("0002", tenants=["initech"])
    await listener.open()
    assert await old.get(key) == 200


async def test_many_tenants_are_used_at_once(old: Release, new_config: TenancyConfig) -> None:
    """Their upgrades wait for each other, one by one here, and each request for its own."""
    async with released(new_config.replace(provisioning={"concurrency": 1}), "id, rating") as new:
        await new.fleet.migrations.upgrade()
        keys = [await create(old, f"late-{number}") for number in range(4)]
        at_once: list[int] = []
        bring = new.fleet.migrations.bring

        async def counted(*arguments: Any, **options: Any) -> Any:
            at_once.append(at_once[-1] + 1 if at_once else 1)
            try:
                return await bring(*arguments, **options)
            finally:
                at_once.append(at_once[-1] - 1)

        new.fleet.migrations.bring = counted  # type: ignore[method-assign]
        answers = await asyncio.gather(*(new.get(key) for key in keys * 3))
    assert answers == [200] * 12
    assert at_once == [1, 0] * 4


async def test_the_schema_of_a_tenant_in_use_changes_only_after_a_notice(
    old: Release, new_config: TenancyConfig
) -> None:
    """So that a process learns of it even if its event loop is busy. A tenant that nobody uses is not waited for."""
    key = await create(old, "initech")
    assert await old.get(key) == 200
    initech = old.fleet.tenants["initech"].id
    received: list[bool] = []
    old.tenancy.internals.directory.on_schema_change(
        lambda tenant, changing: received.append(changing) if tenant == initech else None
    )
    async with released(new_config.replace(migration={"notice": 3600.0}), "*") as new:
        run = asyncio.create_task(new.fleet.migrations.upgrade(tenants=["initech", "globex"]))
        await until(lambda: new.fleet.recorded("globex"), "0003")
        await until(lambda: asyncio.sleep(0, received), [True])
        # nothing of it has changed yet, so it needs no look-up
        assert old.tenancy.internals.directory.peek(key) is not None
        assert await old.fleet.revision("initech") == "0002"
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        # an interrupted one says that it has ended
        await until(lambda: asyncio.sleep(0, received), [True, False])
    assert await old.get(key) == 200
