"""A server that is lost for good keeps no tenant from being purged, and the certificate says what was not dropped."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import ProvisioningError, RoutingError
from tenancy_orm.registry.databases import TenantDatabase
from tenancy_orm.tenant import Placement, Status, Tenant
from tests.support.postgres import Postgres
from tests.support.processes import opened

LOST = "postgresql://nobody@127.0.0.1:1/postgres"


@pytest.fixture
async def losing(tenancy: Tenancy, tenancy_config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """A process that knows another server, which does not answer any more."""
    await tenancy.close()
    async with opened(tenancy_config.replace(servers={**(tenancy_config.servers or {}), "lost": LOST})) as other:
        yield other


async def deleted(tenancy: Tenancy, slug: str) -> tuple[Tenant, Placement]:
    tenant = (await tenancy.tenants.create(slug, server="default")).tenant
    await tenancy.tenants.delete(slug)
    assert tenant.placement is not None
    return tenant, tenant.placement


async def leave(tenancy: Tenancy, tenant: Tenant, server: str, name: str) -> None:
    """Let a database beside the one in use be on a server."""
    place = tenant.placement
    assert place is not None
    row = TenantDatabase(server=server, name=name, tenant_id=tenant.id, role=place.role, state="kept")
    await tenancy.internals.registry.record_database(row)


async def remaining(tenancy: Tenancy, tenant: Tenant) -> tuple[list[str], str]:
    """What the certificate says of databases that were not dropped, and of those that were."""
    certificate = await tenancy.erasures.complete(tenant.id)
    return [one.what for one in certificate.remains if one.what.startswith("database ")], certificate.erased[0]


async def test_a_database_that_was_kept_there_is_forgotten(losing: Tenancy, postgres: Postgres) -> None:
    """Only where an operator says so, and the server does not answer; what is on other servers is dropped."""
    acme, place = await deleted(losing, "acme")
    await leave(losing, acme, "lost", "kept_on_lost")
    with pytest.raises(RoutingError):
        await losing.tenants.purge(acme.id)
    with pytest.raises(ProvisioningError, match="server 'default' answers"):
        await losing.tenants.purge(acme.id, lost_server="default")
    with pytest.raises(ProvisioningError, match="has no database on server 'elsewhere'"):
        await losing.tenants.purge(acme.id, lost_server="elsewhere")
    await losing.tenants.purge(acme.id, lost_server="lost")
    assert (await losing.tenants.get(acme.id)).status is Status.PURGED
    assert await postgres.administer("SELECT 1 FROM pg_database WHERE datname = %s", [place.database]) == []
    (entry,) = await losing.audit.events(tenant=acme.id, action="tenant.forget_database")
    assert entry.detail == {"server": "lost", "database": "kept_on_lost"}
    assert await remaining(losing, acme) == (
        ["database kept_on_lost on server lost"],
        "its databases on the servers that exist",
    )


async def test_a_tenant_that_was_there_is_purged_and_its_slug_is_free(losing: Tenancy, postgres: Postgres) -> None:
    """What it has on servers that are left is dropped."""
    acme, place = await deleted(losing, "acme")
    kept = f"{place.database}k"
    await postgres.administer(f'ALTER DATABASE "{place.database}" RENAME TO "{kept}"')
    await leave(losing, acme, "default", kept)
    async with losing.internals.control.transaction() as connection:
        await connection.execute(text("ALTER TABLE tenancy.tenants DISABLE TRIGGER USER"))
        await connection.execute(text("UPDATE tenancy.tenants SET server = 'lost'"))
        await connection.execute(text("ALTER TABLE tenancy.tenants ENABLE TRIGGER USER"))
    with pytest.raises(RoutingError):
        await losing.tenants.purge(acme.id)
    await losing.tenants.purge(acme.id, lost_server="lost")
    assert (await losing.tenants.get(acme.id)).status is Status.PURGED
    assert await postgres.administer("SELECT 1 FROM pg_database WHERE datname = %s", [kept]) == []
    assert (await remaining(losing, acme))[0] == [f"database {place.database} on server lost"]
    assert (await losing.tenants.create("acme", server="default")).tenant.slug == "acme"


async def test_what_a_removed_server_has_kept_is_in_the_certificate(losing: Tenancy) -> None:
    acme, _ = await deleted(losing, "acme")
    await leave(losing, acme, "lost", "kept_on_lost")
    without = {name: url for name, url in (losing.config.servers or {}).items() if name != "lost"}
    async with Tenancy(losing.config.replace(servers=without)) as other:
        await other.servers.drain("lost")
        await other.servers.remove("lost", templates="forget")
        await other.tenants.purge(acme.id)
        assert (await remaining(other, acme))[0] == ["database kept_on_lost on server lost"]
