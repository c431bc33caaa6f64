"""What happens to a tenant while a restore of it is under way: the restore goes on, or leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tenancy_orm.config import BackupConfig
from tenancy_orm.errors import JobLostError, OperationError, TenantDeletedError
from tenancy_orm.provisioning.copies import restoring as restoring_module
from tenancy_orm.restores import DumpSource, RestoreReport, making
from tenancy_orm.tenant import Status
from tests.integration.restores.test_restores import ADD_COLUMN, add, databases, notes
from tests.support.dumps import dump
from tests.support.fleet import Fleet
from tests.support.projects import Project

Meanwhile = Callable[[], Awaitable[None]]


@pytest.fixture
def restoring(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Meanwhile], Awaitable[RestoreReport]]:
    """Restore acme, and do something once the contents are in and nothing is handed over."""

    async def restore(meanwhile: Meanwhile) -> RestoreReport:
        archive = await dump(fleet, "acme", tmp_path / "dump")
        await add(fleet, "acme", "after the dump")
        original = restoring_module.restore_archive

        async def slow(*args: Any, **options: Any) -> Any:
            done = await original(*args, **options)
            await meanwhile()
            return done

        monkeypatch.setattr(making, "restore_archive", slow)
        return await fleet.tenancy.restores.restore("acme", DumpSource(archive))

    return restore


async def test_rotation_tier_suspension_and_a_run_are_as_they_would_be_without(
    fleet: Fleet, project: Project, restoring: Callable[[Meanwhile], Awaitable[RestoreReport]]
) -> None:
    """None of them waits for the restore, or is lost by it."""
    tenancy = fleet.tenancy

    async def meanwhile() -> None:
        project.add("0002", ADD_COLUMN, 'op.drop_column("notes", "pinned")', down="0001")
        assert (await tenancy.migrations.upgrade()).ok
        await tenancy.secrets.rotate_password("acme")
        await tenancy.secrets.rotate_encryption_key()
        await tenancy.tenants.update("acme", tier="pro")
        await tenancy.tenants.suspend("acme", reason="unpaid")

    report = await restoring(meanwhile)
    assert report.revision == "0002"
    tenant = await fleet.registry.find("acme")
    assert (tenant.status, tenant.reason, tenant.tier, tenant.schema_revision) == (
        Status.SUSPENDED,
        "unpaid",
        "pro",
        "0002",
    )
    assert (await fleet.provisioner.reconcile()).clean
    await tenancy.tenants.activate("acme")
    assert await notes(fleet, "acme") == 100
    assert (await fleet.provisioner.reconcile()).clean


async def test_a_tenant_that_is_deleted_meanwhile_keeps_its_database(
    fleet: Fleet, restoring: Callable[[Meanwhile], Awaitable[RestoreReport]]
) -> None:
    """The restore ends with an error, and what it has made is gone."""
    present = await databases(fleet)
    with pytest.raises(TenantDeletedError):
        await restoring(lambda: fleet.tenancy.tenants.delete("acme"))  # type: ignore[arg-type, return-value]
    assert await databases(fleet) == present
    await fleet.tenancy.tenants.restore("acme")
    assert await notes(fleet, "acme") == 101
    assert (await fleet.provisioner.reconcile()).clean


async def test_a_tenant_that_is_purged_meanwhile_stays_so(
    fleet: Fleet, restoring: Callable[[Meanwhile], Awaitable[RestoreReport]]
) -> None:
    """The purge takes the database that is being filled along, and no step after it makes another one."""
    globex = await fleet.registry.find("globex")

    async def purge() -> None:
        await fleet.tenancy.tenants.delete("acme")
        await fleet.tenancy.tenants.purge("acme")

    with pytest.raises(OperationError, match="failed"):
        await restoring(purge)
    assert globex.placement is not None
    assert await databases(fleet) == {globex.placement.database}
    assert (await fleet.tenancy.operations.list())[0].state == "failed"
    assert (await fleet.provisioner.reconcile()).clean
    assert (await fleet.tenancy.restores.tidy()).errors == ()


async def test_sessions_wait_for_the_swap_and_none_fails(
    fleet: Fleet, restoring: Callable[[Meanwhile], Awaitable[RestoreReport]]
) -> None:
    """What is written is in the database that was in use then, and each session that goes on is in the new one."""
    written: list[int] = []
    stopped = asyncio.Event()

    async def write() -> None:
        while not stopped.is_set():
            async with fleet.tenancy.session("acme") as session:
                insert = sa.text("INSERT INTO notes (body) VALUES ('writer') RETURNING id")
                written.append(int((await session.execute(insert)).scalar_one()))
                await session.commit()

    async def begin() -> None:
        tasks.append(asyncio.create_task(write()))

    tasks: list[asyncio.Task[None]] = []
    report = await restoring(begin)
    count = len(written)
    while len(written) < count + 3:
        await asyncio.sleep(0.01)
        assert not tasks[0].done()
    stopped.set()
    await tasks[0]
    assert report.replaced is not None
    async with fleet.connect("acme") as connection:
        now = {row[0] for row in await connection.fetch("SELECT id FROM notes WHERE body = 'writer'")}
    await fleet.tenancy.restores.undo("acme")
    async with fleet.connect("acme") as connection:
        former = {row[0] for row in await connection.fetch("SELECT id FROM notes WHERE body = 'writer'")}
    assert now
    assert former
    assert len(now) + len(former) == len(written)


async def test_a_failure_in_the_swap_leaves_the_old_database_in_use(
    fleet: Fleet, restoring: Callable[[Meanwhile], Awaitable[RestoreReport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails between the closing of the old one and the row."""
    present = await databases(fleet)

    async def fail(*_: Any, **__: Any) -> None:
        raise OperationError("the tenant is gone")

    async def nothing() -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(fleet.registry, "switch_database", fail)
        with pytest.raises(OperationError, match="the tenant is gone"):
            await restoring(nothing)
    await add(fleet, "acme", "still there")
    assert await notes(fleet, "acme") == 102
    assert await databases(fleet) == present
    (operation,) = await fleet.tenancy.operations.list("acme")
    assert (operation.state, operation.error) == ("failed", "the tenant is gone")
    assert (await fleet.provisioner.reconcile()).clean


async def test_a_restore_that_is_cancelled_leaves_nothing(
    fleet: Fleet, restoring: Callable[[Meanwhile], Awaitable[RestoreReport]]
) -> None:
    """By a cancellation, which leaves nothing."""
    present = await databases(fleet)

    async def forever() -> None:
        begun.set()
        await asyncio.Event().wait()

    begun = asyncio.Event()
    task = asyncio.ensure_future(restoring(forever))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await databases(fleet) == present
    (operation,) = await fleet.tenancy.operations.list("acme")
    assert (operation.state, operation.step) == ("failed", "making")


async def test_contents_that_do_not_come_in_in_time_are_given_up(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``backup.timeout``."""
    archive, present = await dump(fleet, "acme", tmp_path / "dump"), await databases(fleet)

    async def never(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    made = fleet.tenancy.restores._making
    monkeypatch.setattr(made, "_config", made._config.replace(backup=BackupConfig(timeout=0.2)))
    monkeypatch.setattr(making, "restore_archive", never)
    with pytest.raises(OperationError, match=r"raise backup\.timeout"):
        await fleet.tenancy.restores.restore("acme", DumpSource(archive))
    assert await databases(fleet) == present


async def test_revisions_that_came_since_run_before_an_interrupted_swap_goes_on(
    fleet: Fleet, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is killed when a release is deployed; the code of today would meet the schema of yesterday."""
    archive = await dump(fleet, "acme", tmp_path / "dump")
    restores = fleet.tenancy.restores

    async def killed(*_: Any, **__: Any) -> None:
        raise JobLostError

    with monkeypatch.context() as patch, pytest.raises(JobLostError):
        patch.setattr(restores._services.switching, "swap", killed)
        await restores.restore("acme", DumpSource(archive))
    async with fleet.services.control.transaction() as connection:
        await connection.execute(sa.text("UPDATE tenancy.operations SET claimed_until = now()"))
    project.add("0002", ADD_COLUMN, 'op.drop_column("notes", "pinned")', down="0001")
    assert (await fleet.tenancy.migrations.upgrade()).ok
    report = await restores.tidy()
    assert (len(report.ended), report.errors) == (1, ())
    (operation,) = await fleet.tenancy.operations.list("acme")
    tenant = await fleet.registry.find("acme")
    assert tenant.placement is not None
    assert (operation.state, tenant.placement.database) == ("done", operation.detail["database"])
    assert tenant.schema_revision == "0002"
    assert await fleet.fetch("acme", "SELECT count(*) FROM notes WHERE pinned IS NULL OR NOT pinned") == [(100,)]
