"""A ``Tenancy`` with a directory as its store, and a tenant to back up."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup


@pytest.fixture
def tenancy_config(tenancy_config: TenancyConfig, tmp_path: Path) -> TenancyConfig:
    return tenancy_config.replace(backup={"store": f"file:{tmp_path / 'store'}", "directory": tmp_path / "spool"})


@pytest.fixture
async def acme(tenancy: Tenancy) -> str:
    """A tenant with 100 notes."""
    await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        await session.execute(text("INSERT INTO notes (body) SELECT 'note ' || n FROM generate_series(1, 100) n"))
    return "acme"


@pytest.fixture
async def backup(tenancy: Tenancy, acme: str) -> Backup:
    """A backup of it."""
    report = await tenancy.backups.run([acme])
    assert report.reasons == {}
    return report.done[0]
