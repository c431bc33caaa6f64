"""Backups that newer programs have made than those of the server, or of another worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.postgres.archive_headers import dump_version
from tenancy_orm.postgres.programs import find_programs
from tenancy_orm.restores import BackupSource, DumpSource
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.provisioning import running_server

OLDER, NEWER = 16, 18


@pytest.fixture(scope="module")
def older(postgres: Postgres) -> Iterator[Postgres]:
    """A server that is older than the newest programs on this machine."""
    with running_server(OLDER, postgres.worker) as server:
        yield server


async def test_a_backup_by_newer_programs_is_not_bad_where_there_are_only_older_ones(
    tenancy_config: TenancyConfig, older: Postgres, tmp_path: Path
) -> None:
    """Each server needs its own, and each dump those that made it; newer ones restore into an older server."""
    config = tenancy_config.replace(servers={"default": older.admin_url})

    def having(version: int) -> TenancyConfig:
        return config.replace(provisioning={"client_programs": str(find_programs(version).directory)})

    async with opened(having(NEWER), initialise=True) as making:
        await making.tenants.create("acme")
        async with making.transaction("acme") as session:
            await session.execute(text("INSERT INTO notes (body) VALUES ('first')"))
        (made,) = (await making.backups.run(["acme"])).done
        assert made.manifest is not None
        assert (made.manifest.dump_version, made.manifest.server_version.split(".")[0]) == (NEWER, str(OLDER))
        async with making.transaction("acme") as session:
            await session.execute(text("DELETE FROM notes"))
    async with opened(having(OLDER)) as verifying:
        source = BackupSource(verifying.backups, made)
        with pytest.raises(ConfigurationError, match=rf"a dump by pg_dump {NEWER} needs pg_restore of version {NEWER}"):
            await verifying.backups.verify(made)
        with pytest.raises(ConfigurationError, match=rf"a dump by pg_dump {NEWER} needs pg_restore of version {NEWER}"):
            await verifying.restores.restore("acme", source)
        found = await verifying.backups.get(made.id)
        assert (found.is_good, found.verified_at) == (True, None)
    # the embedded server brings both
    async with opened(config) as both:
        verified = await both.backups.verify(made)
        assert (verified.error, verified.restored) == (None, True)
        await both.restores.restore("acme", BackupSource(both.backups, made))
        async with both.backups.open(made) as extracted:
            assert dump_version(extracted.directory) == NEWER
            assert (await both.restores.restore("acme", DumpSource(extracted.directory))).state == "done"
        async with both.session("acme") as session:
            assert list(await session.scalars(text("SELECT body FROM notes"))) == ["first"]


def test_what_is_no_archive_says_no_version(tmp_path: Path) -> None:
    """``pg_restore`` says then what it is."""
    for number, content in enumerate((b"", b"PGDMP", b"PGDMP\x01\x0f\x00\x04\x08\x01\x01", b"SELECT 1;\n")):
        (tmp_path / str(number)).write_bytes(content)
        assert dump_version(tmp_path / str(number)) is None
    assert dump_version(tmp_path) is None
