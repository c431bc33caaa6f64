"""A tenant that was restored has a database of another name than its role: all upkeep knows both."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from tenancy_orm.restores import DumpSource
from tests.integration.restores.test_restores import databases
from tests.support.dumps import dump
from tests.support.fleet import Fleet


async def test_a_restored_tenant_is_looked_after_like_any_other(fleet: Fleet, tmp_path: Path) -> None:
    """Settings of its role, what a temporary login leaves, and rights that it has given to another tenant."""
    archive, restores = await dump(fleet, "acme", tmp_path / "dump"), fleet.tenancy.restores
    first = await restores.restore("acme", DumpSource(archive))
    async with fleet.services.control.transaction() as connection:
        await connection.execute(sa.text("UPDATE tenancy.tenant_databases SET kept_until = now()"))
    assert (await restores.tidy()).dropped == (first.replaced,)
    acme, globex = await fleet.registry.find("acme"), await fleet.registry.find("globex")
    assert acme.placement is not None
    assert globex.placement is not None
    role, provisioner = acme.placement.role, fleet.provisioner
    assert acme.placement.database != role

    async with fleet.tenancy.session("acme") as session:
        await session.execute(sa.text("ALTER ROLE CURRENT_USER SET search_path = 'elsewhere'"))
        # what keeps another tenant's role from being dropped
        await session.execute(sa.text("SELECT lo_create(4711)"))
        await session.execute(sa.text(f'GRANT SELECT ON LARGE OBJECT 4711 TO "{globex.placement.role}"'))
        grant = f'ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO "{globex.placement.role}"'
        await session.execute(sa.text(grant))
        await session.commit()
    report = await provisioner.reconcile()
    assert "acme" in report.corrected
    assert report.complete

    login = await provisioner.logins.issue(acme)
    async with fleet.connect("acme") as connection:
        await connection.execute(f'SET SESSION AUTHORIZATION "{login.role}"; SELECT lo_create(4712)')
    await provisioner.logins.drop(acme, login.role)
    assert login.role not in await databases(fleet)
    owner = "SELECT pg_get_userbyid(lomowner)::text FROM pg_largeobject_metadata WHERE oid = 4712"
    assert await fleet.fetch("acme", owner) == [(role,)]

    await fleet.tenancy.tenants.delete("globex")
    await fleet.tenancy.tenants.purge("globex")
    assert await databases(fleet) == {acme.placement.database, role}
    await fleet.tenancy.tenants.delete("acme")
    await fleet.tenancy.tenants.purge("acme")
    assert await databases(fleet) == set()
    assert (await provisioner.reconcile()).clean
