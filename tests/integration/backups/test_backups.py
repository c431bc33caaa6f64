"""Backups of tenants: complete, encrypted, signed, and restored to the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup
from tenancy_orm.postgres.programs import find_programs, run_program
from tests.support.postgres import Postgres


@pytest.fixture
def tenancy_config(tenancy_config: TenancyConfig, tmp_path: Path) -> TenancyConfig:
    settings = {"store": f"file:{tmp_path / 'store'}", "directory": tmp_path / "spool"}
    return tenancy_config.replace(backup=settings)


@pytest.fixture
async def acme(tenancy: Tenancy) -> None:
    """A tenant with 100 notes."""
    await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        await session.execute(text("INSERT INTO notes (body) SELECT 'note ' || n FROM generate_series(1, 100) n"))


async def back_up(tenancy: Tenancy, slug: str = "acme") -> Backup:
    report = await tenancy.backups.run([slug])
    assert report.reasons == {}
    (made,) = report.done
    return made


async def test_a_backup_has_the_rows_and_nothing_in_the_clear(
    tenancy: Tenancy, acme: None, tmp_path: Path, postgres: Postgres
) -> None:
    made = await back_up(tenancy)
    assert (made.state, made.slug, made.error) == ("done", "acme", None)
    manifest = await tenancy.backups.manifest(made)
    assert manifest == made.manifest
    assert manifest.tables["public.notes"] == 100
    stored = {file.name: file.read_bytes() for file in (tmp_path / "store").rglob("*") if file.is_file()}
    assert sorted(stored)[1:] == ["dump.tar.age", "manifest.json"]
    assert not any(b"note 7" in data or b"AGE-SECRET-KEY" in data for data in stored.values())
    assert stored["dump.tar.age"].startswith(b"age-encryption.org/v1")
    async with tenancy.backups.open(made.id) as opened:
        programs = find_programs(int(postgres.version.partition(".")[0]))
        listed = await run_program([programs.path("pg_restore"), "--list", str(opened.directory)], {})
        data = await run_program([programs.path("pg_restore"), "--file=-", str(opened.directory)], {})
    assert "TABLE DATA public notes" in listed
    assert data.count("\tnote ") == 100
    assert list((tmp_path / "spool").iterdir()) == []
    actions = [event.action for event in await tenancy.audit.events(tenant="acme")]
    assert actions[:2] == ["backup.run", "backup_key.create"]
