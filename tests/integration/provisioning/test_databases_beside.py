"""Databases beside the one in use: reconcile leaves them alone, and a purge leaves none, on whichever server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from tenancy_orm.errors import OperationStateError
from tenancy_orm.provisioning.creation import new_databases
from tenancy_orm.provisioning.server_objects import databases
from tenancy_orm.registry.databases import TenantDatabase
from tenancy_orm.routing.marker import marker_text
from tenancy_orm.tenant import Status, Tenant
from tests.support.postgres import Postgres
from tests.support.provisioning import Workshop, names_of, open_workshop, placement


@pytest.fixture
async def workshop(
    postgres: Postgres, own_server: Postgres, control_url: str, name_prefix: str
) -> AsyncIterator[Workshop]:
    """Two servers; "again" is another name of the first one."""
    servers = {"default": postgres.admin_url, "other": own_server.admin_url, "again": postgres.admin_url}
    opened = await open_workshop(
        control_url=control_url, admin_url=postgres.admin_url, name_prefix=name_prefix, servers=servers
    )
    try:
        yield opened
    finally:
        await opened.close()


async def make(workshop: Workshop, tenant: Tenant, server: str, role: str) -> TenantDatabase:
    """A database of the tenant's beside the one in use, with a row and a marker, and the role where it is missing."""
    made = workshop.provisioner.new_databases
    beside = TenantDatabase(
        server=server, name=made.new_name(), tenant_id=tenant.id, role=role, state="making", revision="0001"
    )
    await workshop.provisioner.prepare_server(server)
    await workshop.registry.record_database(beside)
    async with workshop.admin(server=server) as connection:
        if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
            await connection.execute(f'CREATE ROLE "{role}" LOGIN')
        await databases.create(connection, beside.name, template="template0", owner=workshop.names.owner)
        text = marker_text(workshop.control.installation, tenant.id)
        await connection.execute(
            f'REVOKE ALL ON DATABASE "{beside.name}" FROM PUBLIC; COMMENT ON DATABASE "{beside.name}" IS \'{text}\''
        )
    return beside


async def test_a_purge_and_its_repetition_leave_no_database_and_no_role(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one name of a server holds the lock that the other one needs, and after an interruption."""
    tenant = await workshop.create("acme")
    role = placement(tenant).role
    made = [await make(workshop, tenant, server, role) for server in ("default", "other", "again")]
    report = await workshop.provisioner.reconcile()
    assert (report.unknown, report.orphans, report.errors) == ((), (), ())
    assert {f"database {one.name}" for one in made if one.server == "other"} <= await workshop.present(server="other")
    await workshop.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")

    original, calls = new_databases.drop_beside, 0

    async def interrupted(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise TimeoutError("the server is away")
        await original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(new_databases, "drop_beside", interrupted)
        with pytest.raises(Exception, match="the server is away"):
            await workshop.provisioner.purge(tenant)
    with pytest.raises(OperationStateError, match="is being purged"):
        await make(workshop, tenant, "default", role)
    report = await workshop.provisioner.reconcile()
    assert (report.purged, report.errors) == (("acme",), ())
    assert (await workshop.present(), await workshop.present(server="other")) == (set(), set())
    assert await workshop.registry.databases_of(tenant.id) == ()
    assert (await workshop.provisioner.reconcile()).clean


async def test_what_is_in_use_is_never_dropped_as_one_beside_it(workshop: Workshop) -> None:
    """A row that a switch has taken away names nothing any more; another tenant's database is kept."""
    acme, globex = await workshop.create("acme"), await workshop.create("globex")
    place = placement(globex)
    for owner in (acme, globex):
        stale = TenantDatabase(server="default", name=place.database, tenant_id=owner.id, role=place.role, state="kept")
        await workshop.provisioner.new_databases.drop(stale)
        assert names_of(globex) <= await workshop.present()
    # ... and one with a row, but with another tenant's marker
    beside = await make(workshop, acme, "default", placement(acme).role)
    async with workshop.admin() as connection:
        text = marker_text(workshop.control.installation, globex.id)
        await connection.execute(f"COMMENT ON DATABASE \"{beside.name}\" IS '{text}'")
    await workshop.provisioner.new_databases.drop(beside)
    assert f"database {beside.name}" in await workshop.present()
    assert await workshop.registry.databases_of(acme.id) == ()


async def test_one_that_a_switch_has_left_behind_once_more_is_not_dropped_as_it_was_listed(workshop: Workshop) -> None:
    """It is kept for longer by now, as an operator was told who has undone a restore twice."""
    tenant = await workshop.create("acme")
    listed = await make(workshop, tenant, "default", placement(tenant).role)
    later = "UPDATE tenancy.tenant_databases SET state = 'kept', kept_until = now() + interval '7 days'"
    async with workshop.control.transaction() as connection:
        await connection.execute(text(later))
    await workshop.provisioner.new_databases.drop(listed)
    (kept,) = await workshop.registry.databases_of(tenant.id)
    async with workshop.admin() as connection:
        assert await databases.state(connection, kept.name) is not None
    assert kept.state == "kept"
    await workshop.provisioner.new_databases.drop(kept)
    assert await workshop.registry.databases_of(tenant.id) == ()
