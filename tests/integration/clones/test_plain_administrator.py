"""A managed server: its administrator is no superuser."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import ProvisioningError
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.provisioning import plain_administrator


@pytest.mark.new_installation
async def test_a_tenant_is_cloned_and_the_clone_purged_without_a_superuser(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    async with (
        plain_administrator(postgres) as url,
        opened(tenancy_config.replace(servers={"default": url}), initialise=True) as tenancy,
    ):
        acme = (await tenancy.tenants.create("acme")).tenant
        async with tenancy.transaction("acme") as session:
            await session.execute(text("INSERT INTO notes (body) VALUES ('Original'), ('Original')"))
            await session.execute(text("SELECT lo_from_bytea(4711, 'Original object')"))
        rules = {"tables": {"notes": {"body": "hash"}}, "keep_large_objects": True}
        made = await tenancy.clones.create("acme", "clone", ttl=timedelta(1), rules=rules)
        assert made.rows >= 2
        async with tenancy.transaction("clone") as session:
            bodies = set(await session.scalars(text("SELECT body FROM notes")))
            assert len(bodies) == 1 and "Original" not in bodies
            assert await session.scalar(text("SELECT convert_from(lo_get(4711), 'UTF8')")) == "Original object"
            await session.execute(text("INSERT INTO notes (body) VALUES ('own')"))
        await tenancy.tenants.delete("clone")
        await tenancy.tenants.purge("clone")
        # it may not let anybody read what row security hides from owners: no clone is better than a part of one
        assert acme.placement is not None
        async with postgres.connect(acme.placement.database) as connection:
            await connection.execute(
                "ALTER TABLE notes ENABLE ROW LEVEL SECURITY; ALTER TABLE notes FORCE ROW LEVEL SECURITY"
            )
        with pytest.raises(ProvisioningError, match="BYPASSRLS"):
            await tenancy.clones.create("acme", "clone", ttl=timedelta(1), rules=rules, accept=True)
        assert (await tenancy.internals.provisioner.reconcile(check=True)).clean
