"""A tenant's life when things happen at once, are interrupted, or reach a tenant that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm import Status, Tenancy, Tenant
from tenancy_orm.errors import InvalidTransitionError, LoginNotBlockedError, TenantDeletedError, TenantNotFoundError
from tenancy_orm.events import TenantCreated, TenantEvent, TenantPurged, TenantStatusChanged, TenantUpdated
from tenancy_orm.postgres import locks
from tenancy_orm.provisioning.creation.pipeline import tenant_key
from tenancy_orm.provisioning.server_objects import roles
from tests.support.waiting import until


def ago(seconds: float) -> datetime:
    """A time in the past; in the future where negative."""
    return datetime.now(UTC) - timedelta(seconds=seconds)


@asynccontextmanager
async def held(tenancy: Tenancy, tenant: Tenant) -> AsyncIterator[None]:
    """Hold a tenant's lock on its server, as whoever rotates its password does."""
    connection = await tenancy.internals.servers["default"].connect_admin()
    try:
        await locks.lock(connection, tenant_key(tenant.id), timeout=1)
        yield
    finally:
        await connection.close()


async def waits_for_lock(tenancy: Tenancy, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """An event that is set when somebody begins to wait for the tenant's lock."""
    reached = asyncio.Event()
    real = locks.try_lock

    async def try_lock(connection: asyncpg.Connection[Any], key: int) -> bool:
        free = await real(connection, key)
        if key == tenant_key(tenant.id) and not free:
            reached.set()
        return free

    monkeypatch.setattr(locks, "try_lock", try_lock)
    return reached


# --- suspension -----------------------------------------------------------------------------------------------------


async def test_reconcile_ends_what_an_interrupted_suspension_left_open(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The role could log in no more, but whoever blocked it died before it had ended its connections."""
    await tenancy.tenants.create("acme")
    async with tenancy.session("acme") as session:
        await session.execute(text("SELECT 1"))
        real = roles.end_connections

        async def died(*_: object) -> bool:
            raise ConnectionResetError

        monkeypatch.setattr(roles, "end_connections", died)
        with pytest.raises(LoginNotBlockedError, match="tenancy reconcile") as caught:
            await tenancy.tenants.suspend("acme")
        assert (caught.value.tenant, caught.value.status) == ("acme", "suspended")
        assert (await tenancy.tenants.get("acme")).status is Status.SUSPENDED
        monkeypatch.setattr(roles, "end_connections", real)
        assert await session.scalar(text("SELECT 1")) == 1  # the hole
        assert (await tenancy.internals.provisioner.reconcile()).corrected == ("acme",)
        with pytest.raises(DBAPIError):
            await session.scalar(text("SELECT 1"))
        await session.rollback()
    assert (await tenancy.internals.provisioner.reconcile()).corrected == ()


async def test_a_suspension_does_not_wait_for_whoever_works_on_the_tenant(tenancy: Tenancy) -> None:
    """Its connections end at once; blocking the login needs the lock, and the caller gets an error."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    async with tenancy.session("acme") as session, held(tenancy, tenant):
        await session.execute(text("SELECT 1"))
        with pytest.raises(LoginNotBlockedError):
            await tenancy.tenants.suspend("acme")
        with pytest.raises(DBAPIError):
            await session.scalar(text("SELECT 1"))
        await session.rollback()


async def test_a_suspension_by_housekeeping_that_a_server_does_not_receive_is_an_error(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tenant is suspended all the same, and reconcile of the same run tells the server."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.schedule_suspension("acme", ago(1))
    real = roles.end_connections
    calls = 0

    async def fails_once(connection: asyncpg.Connection[Any], role: str, *pids: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ConnectionResetError
        return await real(connection, role, *pids)

    monkeypatch.setattr(roles, "end_connections", fails_once)
    async with tenancy.session("acme") as session:
        await session.execute(text("SELECT 1"))
        report = await tenancy.run_housekeeping()
        assert [error.startswith("suspend acme: ") for error in report.errors] == [True]
        assert report.chores["reconcile"].corrected == ("acme",)
        await session.invalidate()
    assert (await tenancy.tenants.get("acme")).status is Status.SUSPENDED


# --- what was listed and has changed --------------------------------------------------------------------------------


async def test_housekeeping_does_not_suspend_who_paid_after_it_looked(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list and the change, whenever that is: both look at one locked row."""
    created = await tenancy.tenants.create("acme", status="trial", trial_ends_at=ago(1))
    real = tenancy.internals.registry.transition

    async def paid_first(tenant_id: Any, target: Any, **options: Any) -> Any:
        if target is Status.SUSPENDED:
            await real(created.id, Status.ACTIVE, action="tenant.activate")
        return await real(tenant_id, target, **options)

    monkeypatch.setattr(tenancy.internals.registry, "transition", paid_first)
    report = await tenancy.run_housekeeping()
    assert (report.suspended, report.errors) == ((), ())
    assert (await tenancy.tenants.get("acme")).status is Status.ACTIVE


@pytest.mark.parametrize("change", ["postponed", "restored and deleted again"])
async def test_housekeeping_does_not_purge_what_was_changed_while_it_waited(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """For the tenant's lock, for as long as somebody works on it."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.schedule_purge("acme", ago(1))
    waits = await waits_for_lock(tenancy, tenant, monkeypatch)
    async with held(tenancy, tenant):
        running = asyncio.create_task(tenancy.run_housekeeping())
        await asyncio.wait_for(waits.wait(), 30)
        if change == "postponed":
            await tenancy.tenants.schedule_purge("acme", ago(-86_400))
        else:
            await tenancy.internals.registry.transition(tenant.id, None, action="tenant.restore")
            await tenancy.internals.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
    report = await running
    assert (report.purged, report.errors) == ((), ())
    assert (await tenancy.tenants.get("acme")).status is Status.DELETED


# --- maintenance mode -----------------------------------------------------------------------------------------------


async def test_the_end_of_maintenance_makes_a_tenant_what_it_was(tenancy: Tenancy) -> None:
    """A trial ends when it ended; who was suspended stays so, for the same reason, deletion in between or not."""
    await tenancy.tenants.create("tried", status="trial", trial_ends_at=ago(1))
    await tenancy.tenants.start_maintenance("tried")
    assert (await tenancy.run_housekeeping()).suspended == ()
    assert (await tenancy.tenants.end_maintenance("tried")).status is Status.TRIAL
    assert (await tenancy.run_housekeeping()).suspended == ("tried",)
    await tenancy.tenants.create("unpaid")
    await tenancy.tenants.suspend("unpaid", reason="invoice 7")
    await tenancy.tenants.start_maintenance("unpaid", reason="moving")
    await tenancy.tenants.delete("unpaid")
    assert (await tenancy.tenants.restore("unpaid")).status is Status.MAINTENANCE
    ended = await tenancy.tenants.end_maintenance("unpaid")
    assert (ended.status, ended.reason) == (Status.SUSPENDED, "invoice 7")
    for repeat in (tenancy.tenants.end_maintenance, tenancy.tenants.restore):
        assert await repeat("unpaid") == ended


async def test_a_scheduled_suspension_outlives_maintenance_and_payment(tenancy: Tenancy) -> None:
    """It is called off by hand, by the suspension itself, or by deletion."""
    await tenancy.tenants.create("acme", status="trial")
    await tenancy.tenants.schedule_suspension("acme", ago(1), reason="notice given")
    await tenancy.tenants.start_maintenance("acme")
    await tenancy.tenants.end_maintenance("acme")
    await tenancy.tenants.activate("acme")
    assert (await tenancy.run_housekeeping()).suspended == ("acme",)
    assert (await tenancy.tenants.get("acme")).reason == "notice given"
    await tenancy.tenants.activate("acme")
    assert (await tenancy.run_housekeeping()).suspended == ()


async def test_a_suspension_gives_the_reason_of_what_is_due(tenancy: Tenancy) -> None:
    """None where none was given; the trial's end where that came first."""
    await tenancy.tenants.create("scheduled")
    await tenancy.tenants.schedule_suspension("scheduled", ago(1))
    await tenancy.tenants.create("tried", status="trial", trial_ends_at=ago(1))
    await tenancy.tenants.schedule_suspension("tried", ago(-86_400), reason="contract ends")
    await tenancy.run_housekeeping()
    assert (await tenancy.tenants.get("scheduled")).reason is None
    assert (await tenancy.tenants.get("tried")).reason == "the trial has ended"


async def test_a_trial_that_has_ended_can_be_started_anew(tenancy: Tenancy) -> None:
    """With an end in the future, in one step."""
    await tenancy.tenants.create("acme", status="trial", trial_ends_at=ago(1))
    await tenancy.run_housekeeping()
    again = await tenancy.tenants.start_trial("acme", ends_at=ago(-60))
    assert (again.status, again.reason) == (Status.TRIAL, None)
    assert (await tenancy.run_housekeeping()).suspended == ()
    with pytest.raises(InvalidTransitionError):
        await tenancy.tenants.start_trial("acme", ends_at=ago(-60))


# --- tombstones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["rename", "update", "schedule_suspension", "schedule_purge"])
async def test_a_tombstone_is_not_written_on(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """By a change that found the tenant still there, and comes after its purge."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.delete("acme")
    find = tenancy.tenants._get_unpurged

    async def purged_since(ref: Any) -> Tenant:
        found = await find(ref)
        await tenancy.internals.provisioner.purge(found)
        return found

    monkeypatch.setattr(tenancy.tenants, "_get_unpurged", purged_since)
    arguments: dict[str, dict[str, Any]] = {
        "rename": {"slug": "other"},
        "update": {"metadata": {"name": "Jane Doe"}},
        "schedule_suspension": {"at": ago(-60)},
        "schedule_purge": {"at": ago(-60)},
    }
    with pytest.raises(TenantNotFoundError):
        await getattr(tenancy.tenants, verb)("acme", **arguments[verb])
    async with tenancy.internals.control.connect() as connection:
        row = (await connection.execute(text("SELECT slug, metadata, suspend_at, purge_at FROM tenancy.tenants"))).one()
        assert tuple(row) == ("acme", {}, None, None)
        assert (await connection.execute(text("SELECT * FROM tenancy.former_slugs"))).all() == []


async def test_a_tenant_that_is_gone_gets_no_domain(tenancy: Tenancy) -> None:
    """Nobody else could have it then."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    await tenancy.tenants.delete(tenant)
    with pytest.raises(TenantDeletedError):
        await tenancy.domains.claim(tenant, "acme.example")
    await tenancy.tenants.purge(tenant)
    with pytest.raises(TenantNotFoundError):
        await tenancy.domains.claim(tenant, "acme.example")


async def test_a_purge_leaves_nothing_of_what_was_counted_and_measured(tenancy: Tenancy) -> None:
    """Keys of idempotency are the application's own words, and may name people."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    await tenancy.quotas.consume(tenant, "api_calls", key="order of jane.doe@example.org")
    await tenancy.internals.sampler.run()
    await tenancy.tenants.delete(tenant)
    await tenancy.tenants.purge(tenant)
    async with tenancy.internals.control.connect() as connection:
        for table in ("usage_keys", "quota_holds", "quota_blocks", "quota_pressure", "tenant_metrics", "api_keys"):
            assert (await connection.execute(text(f"SELECT * FROM tenancy.{table}"))).all() == [], table


# --- what is told ---------------------------------------------------------------------------------------------------


async def test_changes_are_announced_in_their_order(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the first one's server is slow."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    seen: list[tuple[str, str]] = []
    tenancy.events.subscribe(TenantStatusChanged, lambda event: seen.append((event.before, event.after)))
    waits = await waits_for_lock(tenancy, tenant, monkeypatch)
    async with held(tenancy, tenant):
        suspending = asyncio.create_task(tenancy.tenants.suspend("acme"))
        await asyncio.wait_for(waits.wait(), 30)
        await tenancy.tenants.start_maintenance("acme")
        await tenancy.tenants.activate("acme")
    await asyncio.gather(suspending, return_exceptions=True)
    assert seen == [("active", "suspended"), ("suspended", "maintenance"), ("maintenance", "active")]


async def test_what_reconcile_finishes_is_announced(tenancy: Tenancy) -> None:
    """As if it had been done by whoever began it."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    await tenancy.tenants.delete("acme")
    await tenancy.internals.registry.begin_purge(tenant.id)
    seen: list[TenantEvent] = []
    tenancy.events.subscribe(TenantEvent, seen.append)
    assert (await tenancy.internals.provisioner.reconcile()).purged == ("acme",)
    assert [type(event) for event in seen] == [TenantPurged]


@pytest.mark.parametrize("verb", ["rename", "purge"])
async def test_a_change_whose_caller_is_cancelled_is_announced(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """It has taken place."""
    await tenancy.tenants.create("acme")
    if verb == "purge":
        await tenancy.tenants.delete("acme")
    seen: list[TenantEvent] = []
    tenancy.events.subscribe(TenantEvent, seen.append)
    name = {"rename": "rename", "purge": "finish_purge"}[verb]
    real = getattr(tenancy.internals.registry, name)
    task: asyncio.Task[Any]

    async def then_cancelled(*args: Any, **options: Any) -> Any:
        outcome = await real(*args, **options)
        task.cancel()
        await asyncio.sleep(0)
        return outcome

    monkeypatch.setattr(tenancy.internals.registry, name, then_cancelled)
    call = tenancy.tenants.rename("acme", "acme-corp") if verb == "rename" else tenancy.tenants.purge("acme")
    task = asyncio.create_task(call)
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: bool(seen))
    assert [type(event) for event in seen] == [{"rename": TenantUpdated, "purge": TenantPurged}[verb]]


async def test_a_creation_that_reconcile_finishes_is_announced(tenancy: Tenancy) -> None:
    """With the time that has passed since it was asked for."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("ALTER TABLE tenancy.tenants DISABLE TRIGGER USER"))
        await connection.execute(
            text("UPDATE tenancy.tenants SET status = 'provisioning', step = 'proved', next_status = 'active'")
        )
        await connection.execute(text("ALTER TABLE tenancy.tenants ENABLE TRIGGER USER"))
    seen: list[TenantEvent] = []
    tenancy.events.subscribe(TenantEvent, seen.append)
    assert (await tenancy.internals.provisioner.reconcile()).finished == ("acme",)
    [created] = seen
    assert isinstance(created, TenantCreated)
    assert (created.tenant_id, created.seconds > 0) == (tenant.id, True)
