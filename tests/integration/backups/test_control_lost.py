"""The control database is lost, and is read from its backup, which is older than what has happened since."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup, recover_control
from tenancy_orm.postgres.programs import find_programs, run_program
from tests.support.postgres import Postgres
from tests.support.processes import opened


@pytest.fixture
async def another_url(postgres: Postgres) -> AsyncIterator[str]:
    """A new database; with ``empty_url``, the role would be dropped that is another's here."""
    name = postgres.new_name()
    yield await postgres.create_database(name)
    await postgres.administer(f'DROP DATABASE "{name}" WITH (FORCE)')


async def test_tenants_and_their_backups_are_there_again(
    tenancy: Tenancy,
    tenancy_config: TenancyConfig,
    backup: Backup,
    postgres: Postgres,
    another_url: str,
    tmp_path: Path,
) -> None:
    control = await tenancy.backups.run_control()
    later = (await tenancy.backups.run(["acme"])).done[0]
    await tenancy.close()
    unreachable = tenancy_config.replace(control_url="postgresql://nobody@127.0.0.1:1/lost")
    manifest = await recover_control(unreachable, tmp_path / "control")
    assert manifest.id == control.id
    programs = find_programs(int(postgres.version.partition(".")[0]))
    arguments = ["--exit-on-error", "--no-owner", "--no-acl", f"--dbname={another_url}", str(tmp_path / "control")]
    await run_program([programs.path("pg_restore"), *arguments], {})
    async with opened(tenancy_config.replace(control_url=another_url), initialise=True) as again:
        assert await again.fetch_value("SELECT count(*) FROM notes", tenant="acme") == 100
        assert (await again.audit.verify()).ok
        # its own row says that it is being made, and nobody makes it
        async with again.internals.control.transaction() as connection:
            await connection.execute(text("UPDATE tenancy.backups SET claimed_until = now() WHERE state = 'running'"))
        report = await again.backups.prune()
        assert (report.pruned, report.errors) == ((), ())
        assert [one.id for one in (await again.backups.scan()).found] == [later.id]
        assert (await again.backups.scan()).found == ()
        for one in (control, backup, later):
            assert (await again.backups.verify(one.id)).error is None
        assert [one.id for one in await again.backups.list()] == [later.id, backup.id]
