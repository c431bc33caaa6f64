"""A managed server: its administrator is no superuser."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.provisioning import plain_administrator


@pytest.mark.new_installation
async def test_backups_are_made_and_verified_without_a_superuser(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    async with (
        plain_administrator(postgres) as url,
        opened(tenancy_config.replace(servers={"default": url}), initialise=True) as tenancy,
    ):
        tenant = (await tenancy.tenants.create("acme")).tenant
        async with tenancy.transaction("acme") as session:
            await session.execute(text("INSERT INTO notes (body) VALUES ('a'), ('b')"))
        (made,) = (await tenancy.backups.run(["acme"])).done
        found = await tenancy.backups.verify(made)
        assert (found.error, found.rows) == (None, 2)
        # it may not let anybody read what row security hides from owners: no backup is better than a part of one
        assert tenant.placement is not None
        async with postgres.connect(tenant.placement.database) as connection:
            await connection.execute(
                "ALTER TABLE notes ENABLE ROW LEVEL SECURITY; ALTER TABLE notes FORCE ROW LEVEL SECURITY"
            )
        report = await tenancy.backups.run(["acme"])
        assert "BYPASSRLS" in report.reasons["acme"]
