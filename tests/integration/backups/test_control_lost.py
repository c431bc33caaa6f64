"""The control database is lost, and is read from its backup, which is older than what has happened since."""

from __future__ import annotations

import base64
import secrets
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup, recover_control
from tenancy_orm.errors import BackupDamagedError, BackupNotFoundError
from tenancy_orm.postgres.programs import find_programs, run_program
from tenancy_orm.secrets.providers import EnvironmentSecrets, SecretKeyWrapper
from tests.support.postgres import Postgres
from tests.support.processes import opened


@pytest.fixture
async def another_url(postgres: Postgres) -> AsyncIterator[str]:
    """A new database; with ``empty_url``, the role would be dropped that is another's here."""
    name = postgres.new_name()
    yield await postgres.create_database(name)
    await postgres.administer(f'DROP DATABASE "{name}" WITH (FORCE)')


async def test_a_damaged_key_object_is_named_and_others_are_read_all_the_same(
    tenancy: Tenancy, tenancy_config: TenancyConfig, tmp_path: Path
) -> None:
    """With a data key that a service has wrapped, which is in the object alone once the control database is lost."""
    await tenancy.close()
    wrapping = {"W_WRAPPING_KEYS": "1:" + base64.b64encode(secrets.token_bytes(32)).decode()}
    wrapper = SecretKeyWrapper(EnvironmentSecrets("W_", wrapping))
    config = tenancy_config.replace(encryption_keys=None, secrets={"key_wrapper": wrapper})
    async with opened(config) as other:
        made = await other.backups.run_control()
    (path,) = (tmp_path / "store").rglob("keys/control/*.json")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"[]", b"{}", whole.replace(b'"wrapped": "', b'"wrapped": "!')):
        path.write_bytes(damaged)
        with pytest.raises(BackupDamagedError, match=f"the object of the key {made.key_id} of control is damaged"):
            await recover_control(config, tmp_path / "control")
    path.write_bytes(whole)
    path.with_name(f"{'0' * 32}.json").write_bytes(b"{")
    path.with_name(f".{path.name}.0123.part").write_bytes(b"")
    assert (await recover_control(config, tmp_path / "control")).manifest.id == made.id


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
    manifest = (await recover_control(unreachable, tmp_path / "control")).manifest
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


async def test_whoever_may_only_write_to_the_store_brings_no_older_backup_back(
    tenancy: Tenancy, tenancy_config: TenancyConfig, tmp_path: Path
) -> None:
    """By a copy under a newer name, or over the newest; deleting it is noticed by a time that is known."""
    older, newest = await tenancy.backups.run_control(), await tenancy.backups.run_control()
    store, directory = tmp_path / "store", tmp_path / "control"
    old, new = store / older.path, store / newest.path
    saved = shutil.copytree(new, tmp_path / "saved")
    named = old.with_name("ffffffff-ffff-7fff-bfff-ffffffffffff")

    shutil.copytree(old, named)
    with pytest.raises(BackupDamagedError, match=f"{named.name}/manifest.json: it is the manifest of .* {older.id}"):
        await recover_control(tenancy_config, directory)
    assert not directory.exists()
    recovered = await recover_control(tenancy_config, directory, accept_older=True)
    assert (recovered.manifest.id, len(recovered.passed_over)) == (newest.id, 1)
    shutil.rmtree(directory)
    # what cannot be a newer one hides none
    named.rename(old.with_name("00000000-0000-7000-8000-000000000000"))
    recovered = await recover_control(tenancy_config, directory)
    assert (recovered.manifest.id, len(recovered.passed_over)) == (newest.id, 1)
    shutil.rmtree(directory)

    for damage in ("manifest.json", "dump.tar.age"):
        shutil.copy(old / damage, new / damage)
        with pytest.raises(BackupDamagedError, match=f"what may be a newer one cannot be read: .*{newest.id}"):
            await recover_control(tenancy_config, directory)
        recovered = await recover_control(tenancy_config, directory, accept_older=True)
        assert recovered.manifest.id == older.id
        assert any(str(newest.id) in one.path for one in recovered.passed_over)
        shutil.rmtree(directory)
        shutil.copy(saved / damage, new / damage)

    between = datetime.now(UTC)
    with pytest.raises(BackupNotFoundError, match="no readable backup of the control database since"):
        await recover_control(tenancy_config, directory, not_before=between)
    shutil.rmtree(new)
    with pytest.raises(BackupNotFoundError, match="the newest is of"):
        await recover_control(tenancy_config, directory, not_before=newest.started_at, accept_older=True)
    assert (await recover_control(tenancy_config, directory)).manifest.id == older.id
