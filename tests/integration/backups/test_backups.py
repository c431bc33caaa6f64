"""Backups of tenants: complete, encrypted, signed, restored to the same rows, and useless once a byte is changed."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.backups import Backup, DirectoryStore, dump
from tenancy_orm.backups.archive import pack
from tenancy_orm.backups.encryption import decrypt, encrypt, new_identity
from tenancy_orm.errors import (
    BackupDamagedError,
    BackupError,
    BackupKeyDestroyedError,
    BackupNotFoundError,
    ConfigurationError,
    SecretError,
    TenantNotFoundError,
)
from tenancy_orm.events import BackupCompleted, BackupEvent, BackupFailed, BackupVerified
from tenancy_orm.postgres.programs import RunningProgram, find_programs, run_program
from tenancy_orm.secrets.providers import EnvironmentSecrets, SecretKeyWrapper
from tests.support.fleet import fleet_config, open_fleet
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.projects import NOTES, Project
from tests.support.waiting import HANGS


def stored(tmp_path: Path) -> dict[str, bytes]:
    """What is in the store, by path."""
    root = tmp_path / "store"
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


async def pg_restore(postgres: Postgres, *arguments: str) -> str:
    programs = find_programs(int(postgres.version.partition(".")[0]))
    return await run_program([programs.path("pg_restore"), *arguments], {})


async def statement(tenancy: Tenancy, sql: str, **values: Any) -> Any:
    async with tenancy.internals.control.transaction() as connection:
        found = await connection.execute(text(sql), values)
        return found.all() if found.returns_rows else None


async def as_administrator(tenancy: Tenancy, postgres: Postgres, slug: str, sql: str) -> None:
    tenant = await tenancy.tenants.get_by_slug(slug)
    assert tenant.placement is not None
    async with postgres.connect(tenant.placement.database) as connection:
        await connection.execute(sql)


# --- making -----------------------------------------------------------------------------------------------------------


async def test_a_backup_has_the_rows_and_nothing_in_the_clear(
    tenancy: Tenancy, backup: Backup, tmp_path: Path, postgres: Postgres
) -> None:
    assert (backup.state, backup.slug, backup.error) == ("done", "acme", None)
    manifest = await tenancy.backups.manifest(backup)
    assert manifest == backup.manifest
    assert manifest.tables["public.notes"] == 100
    files = stored(tmp_path)
    assert {backup.archive_path, backup.manifest_path} < files.keys()
    assert not any(b"note 7" in data or b"AGE-SECRET-KEY" in data for data in files.values())
    assert files[backup.archive_path].startswith(b"age-encryption.org/v1")
    async with tenancy.backups.open(backup.id) as opened:
        listed = await pg_restore(postgres, "--list", str(opened.directory))
        data = await pg_restore(postgres, "--file=-", str(opened.directory))
    assert "TABLE DATA public notes" in listed
    assert data.count("\tnote ") == 100
    assert list((tmp_path / "spool").iterdir()) == []
    actions = [event.action for event in await tenancy.audit.events(tenant="acme")]
    assert actions[:2] == ["backup.run", "backup_key.create"]


async def test_a_second_backup_logs_in_as_the_administrator_no_more(
    tenancy: Tenancy, backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection that held the lock of the first one's login is kept for that of the next one."""
    server, opened = tenancy.internals.servers["default"], list[str]()
    connect = server.connect_admin

    async def noted(database: str | None = None, *, purpose: str = "tenancy-admin", **options: Any) -> Any:
        opened.append(purpose)
        return await connect(database, purpose=purpose, **options)

    monkeypatch.setattr(server, "connect_admin", noted)
    assert (await tenancy.backups.run(["acme"])).reasons == {}
    assert "tenancy-admin" not in opened


async def test_what_is_backed_up_is_one_snapshot_and_no_login_is_left(
    tenancy: Tenancy, acme: str, postgres: Postgres, name_prefix: str
) -> None:
    """While rows are written; and the counts are of the snapshot that was dumped."""
    writing = True

    async def write() -> None:
        while writing:
            async with tenancy.transaction("acme") as session:
                await session.execute(text("INSERT INTO notes (body) VALUES ('another')"))

    writer = asyncio.create_task(write())
    try:
        (made,) = (await tenancy.backups.run(["acme"])).done
    finally:
        writing = False
        await writer
    verified = await tenancy.backups.verify(made)
    assert (verified.error, verified.restored) == (None, True)
    left = (
        "SELECT rolname FROM pg_roles WHERE rolname LIKE '{0}%\\_x\\_%' "
        "UNION ALL SELECT datname FROM pg_database WHERE datname LIKE '{0}%\\_x\\_%'"
    )
    assert await postgres.administer(left.format(name_prefix)) == []


async def test_a_failure_of_one_tenant_stops_no_other_and_leaves_nothing(
    tenancy: Tenancy, acme: str, tmp_path: Path, postgres: Postgres
) -> None:
    await tenancy.tenants.create("globex")
    received: list[BackupEvent] = []
    tenancy.events.subscribe(BackupEvent, received.append)
    lost = (await tenancy.tenants.get_by_slug("globex")).placement
    assert lost is not None
    await postgres.administer(f'ALTER DATABASE "{lost.database}" RENAME TO "{lost.database}_"')
    try:
        report = await tenancy.backups.run(["globex", "acme"])
    finally:
        await postgres.administer(f'ALTER DATABASE "{lost.database}_" RENAME TO "{lost.database}"')
    assert [one.slug for one in report.done] == ["acme"]
    assert list(report.reasons) == ["globex"]
    assert {type(event): event.slug for event in received} == {BackupCompleted: "acme", BackupFailed: "globex"}
    failed = [one for one in await tenancy.backups.list("globex") if one.state == "failed"]
    assert len(failed) == 1 and failed[0].error
    assert not any(str(failed[0].id) in path for path in stored(tmp_path))
    assert list((tmp_path / "spool").iterdir()) == []
    with pytest.raises(BackupNotFoundError, match="is failed"):
        await tenancy.backups.verify(failed[0])


async def test_what_fails_once_a_backup_is_done_does_not_remove_it(
    tenancy: Tenancy, acme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation after the commit, or a connection that is lost at that moment: the row says done, and so it is."""
    records = tenancy.backups._records
    finish = records.finish

    async def lost(*args: Any, **options: Any) -> Backup:
        await finish(*args, **options)
        raise ConnectionResetError

    monkeypatch.setattr(records, "finish", lost)
    assert (await tenancy.backups.run([acme])).reasons.keys() == {acme}
    (made,) = await tenancy.backups.list(acme)
    assert made.state == "done"
    async with tenancy.backups.open(made):
        pass


async def test_temporary_space_is_checked_first(tenancy: Tenancy, acme: str, tmp_path: Path) -> None:
    tenancy.backups._maker._config = tenancy.config.backup.replace(max_temporary_bytes=1)
    report = await tenancy.backups.run(["acme"])
    assert "raise it" in report.reasons["acme"] and "max_temporary_bytes" in report.reasons["acme"]


async def test_a_backup_that_no_restore_has_room_for_says_so(
    tenancy: Tenancy, acme: str, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """It needs as much at once as its largest table, and a restore all of it: nobody would know before that day."""
    tables = "; ".join(f"CREATE TABLE t{n} (id int PRIMARY KEY, c text NOT NULL)" for n in range(60))
    await as_administrator(
        tenancy, postgres, "acme", f'SET ROLE "{tenancy.internals.provisioner.names.owner}"; {tables}'
    )
    (first,) = (await tenancy.backups.run(["acme"])).done
    assert first.manifest is not None and "neither restored" not in caplog.text
    settings = tenancy.config.backup.replace(max_temporary_bytes=first.manifest.dump_bytes - 1)
    tenancy.backups._maker._config, tenancy.backups._reader._spool.max_bytes = settings, settings.max_temporary_bytes
    (made,) = (await tenancy.backups.run(["acme"])).done
    assert f"the backup {made.id} of acme is done, and can be neither restored nor verified" in caplog.text
    with pytest.raises(BackupError, match="bytes of temporary space are needed"):
        await tenancy.backups.verify(made)


async def test_without_a_store_nothing_is_begun(tenancy: Tenancy, acme: str) -> None:
    tenancy.backups._stores._config = tenancy.config.backup.replace(store=None)
    with pytest.raises(ConfigurationError, match=r"backup\.store is not set"):
        await tenancy.backups.run(["acme"])
    with pytest.raises(TenantNotFoundError):
        await tenancy.backups.list("nobody")


async def test_force_row_security_hides_no_rows(tenancy: Tenancy, acme: str, postgres: Postgres) -> None:
    """A backup with the rows that a policy shows would be one without the others."""
    await as_administrator(
        tenancy,
        postgres,
        "acme",
        "ALTER TABLE notes ENABLE ROW LEVEL SECURITY; ALTER TABLE notes FORCE ROW LEVEL SECURITY; "
        "CREATE POLICY few ON notes USING (id < 10)",
    )
    (made,) = (await tenancy.backups.run(["acme"])).done
    assert made.manifest is not None and made.manifest.tables["public.notes"] == 100
    assert (await tenancy.backups.verify(made)).error is None


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


async def test_a_flipped_byte_anywhere_is_found(tenancy: Tenancy, backup: Backup, tmp_path: Path) -> None:
    """In the data, the manifest and its signature; with the key and without it."""
    root = tmp_path / "store"
    archive, manifest = root / backup.archive_path, root / backup.manifest_path
    whole = {file: file.read_bytes() for file in (archive, manifest)}
    await tenancy.backups._reader.check(backup)
    for file, data in whole.items():
        # every 7th of the manifest, and so of the signature; some of the archive: the first and last bytes, and between
        positions = range(0, len(data), 7) if file == manifest else (0, 30, 150, 300, len(data) // 2, len(data) - 1)
        for position in positions:
            flip(file, position)
            with pytest.raises(BackupDamagedError):
                await tenancy.backups._reader.check(backup)
            if file == archive:
                with pytest.raises(BackupDamagedError):
                    async with tenancy.backups.open(backup):
                        pass
            file.write_bytes(data)
    for file, data in whole.items():
        for changed in (data[:-1], data + b"\n", b""):
            file.write_bytes(changed)
            with pytest.raises(BackupDamagedError):
                await tenancy.backups._reader.check(backup)
        file.write_bytes(data)
    received: list[BackupVerified] = []
    tenancy.events.subscribe(BackupVerified, received.append)
    flip(archive, 500)
    bad = await tenancy.backups.verify(backup)
    assert bad.error is not None and not bad.restored
    assert (bad.backup.verify_error, bad.backup.is_good) == (bad.error, False)
    archive.write_bytes(whole[archive])
    assert (await tenancy.backups.verify(backup)).backup.is_good
    assert [event.error is None for event in received] == [False, True]


async def test_another_backup_in_its_place_is_found(tenancy: Tenancy, backup: Backup, tmp_path: Path) -> None:
    """Who can write to the store can exchange whole backups, which are signed as well."""
    (newer,) = (await tenancy.backups.run(["acme"])).done
    root = tmp_path / "store"
    for path, other in ((backup.manifest_path, newer.manifest_path), (backup.archive_path, newer.archive_path)):
        (root / path).write_bytes((root / other).read_bytes())
    with pytest.raises(BackupDamagedError, match="has another backup"):
        await tenancy.backups.manifest(backup)
    (root / newer.archive_path).unlink()
    assert "there is no" in str((await tenancy.backups.verify(newer)).error)


async def test_a_backup_that_lacks_rows_does_not_pass(tenancy: Tenancy, backup: Backup) -> None:
    """The rows are counted in the database that was restored, and not read from the manifest."""
    assert backup.manifest is not None
    fields = {**backup.manifest.to_fields(), "tables": {**backup.manifest.tables, "public.notes": 101}}
    signed = tenancy.backups._services.signer.sign_statement("tenancy-backup-1", fields).to_bytes()
    await tenancy.backups.store.put(backup.manifest_path, signed)
    await statement(tenancy, "UPDATE tenancy.backups SET manifest = NULL")
    found = await tenancy.backups.verify(backup.id)
    assert found.error is not None and "public.notes has 100 rows, not 101" in found.error
    fields["tables"]["public.notes"] = 100
    fields["structure"] = "0" * 32
    await tenancy.backups.store.put(
        backup.manifest_path, tenancy.backups._services.signer.sign_statement("tenancy-backup-1", fields).to_bytes()
    )
    assert "the schema" in str((await tenancy.backups.verify(backup.id)).error)


async def test_a_manifest_of_many_large_objects_is_read(tenancy: Tenancy, backup: Backup) -> None:
    """It has a line for each: a backup that says done, and cannot be read, is none."""
    assert backup.manifest is not None
    fields = backup.manifest.to_fields()
    fields["files"] = [{"name": f"blob_{n}.dat", "bytes": 1, "sha256": "0" * 64} for n in range(160_000)]
    signed = tenancy.backups._services.signer.sign_statement("tenancy-backup-1", fields).to_bytes()
    await tenancy.backups.store.put(backup.manifest_path, signed)
    await statement(tenancy, "UPDATE tenancy.backups SET manifest = NULL")
    assert len((await tenancy.backups.manifest(backup.id)).files) == 160_000


async def test_a_forged_archive_does_not_fill_the_disk(tenancy: Tenancy, backup: Backup, tmp_path: Path) -> None:
    """Anybody who can write to the store can encrypt for the key; the checksum is known at the end."""
    assert backup.manifest is not None and backup.tenant_id is not None
    (key,) = await tenancy.backups.keys.of(backup.tenant_id)
    large = tmp_path / backup.manifest.files[0].name
    large.write_bytes(bytes(5_000_000))
    forged = encrypt(pack([large], lambda _: None), [key.recipient])
    (tmp_path / "store" / backup.archive_path).write_bytes(b"".join(forged))
    with pytest.raises(BackupDamagedError, match="has 5000000 bytes"):
        async with tenancy.backups.open(backup):
            pass


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_a_key_opens_its_own_tenants_backups_alone(tenancy: Tenancy, backup: Backup) -> None:
    """Also where somebody moves the sealed identity to another tenant, in the control database."""
    globex = (await tenancy.tenants.create("globex")).tenant
    (other,) = (await tenancy.backups.run(["globex"])).done
    assert other.key_id != backup.key_id
    keys = tenancy.backups.keys
    with pytest.raises(BackupNotFoundError):
        await keys.open(backup.key_id, globex.id)
    await statement(tenancy, "UPDATE tenancy.backup_keys SET tenant_id = :id", id=globex.id)
    with pytest.raises(SecretError, match="belongs to another tenant"):
        await keys.open(backup.key_id, globex.id)


async def test_a_destroyed_key_ends_all_backups(tenancy: Tenancy, backup: Backup, tmp_path: Path) -> None:
    keys, tenant_id = tenancy.backups.keys, backup.tenant_id
    assert tenant_id is not None
    # it is in the store, so that backups outlive the control database
    await statement(tenancy, "DELETE FROM tenancy.backup_keys")
    async with tenancy.backups.open(backup):
        pass
    (again,) = (await tenancy.backups.run(["acme"])).done
    await keys.destroy(tenant_id)
    assert not any("/keys/" in path for path in stored(tmp_path))
    for one in (backup, again):
        with pytest.raises((BackupKeyDestroyedError, BackupNotFoundError)):
            async with tenancy.backups.open(one):
                pass
    # also the one that no row told of
    found = await keys.of(tenant_id)
    assert {key.id for key in found} == {backup.key_id, again.key_id}
    assert all(key.destroyed_at is not None and key.recipient.startswith("age1") for key in found)
    assert (await keys.destroy(tenant_id)) == found
    assert await statement(tenancy, "SELECT sealed_identity FROM tenancy.backup_keys") == [(None,), (None,)]
    report = await tenancy.backups.prune()
    assert {one.id for one in report.pruned} == {backup.id, again.id}
    assert not any(path.endswith(".age") for path in stored(tmp_path))


async def test_backups_are_not_listed_for_a_prune_while_there_are_no_others(
    tenancy: Tenancy, backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Housekeeping prunes every minute, a fleet's tens of thousands."""
    pruner, listed = tenancy.backups._pruner, []
    to_prune = pruner.to_prune

    async def listing() -> list[Backup]:
        listed.append(await to_prune())
        return listed[-1]

    monkeypatch.setattr(pruner, "to_prune", listing)
    for _ in range(3):
        assert (await tenancy.backups.prune()).pruned == ()
    assert listed == [[]]
    assert backup.tenant_id is not None
    await tenancy.backups.keys.destroy(backup.tenant_id)
    assert [one.id for one in (await tenancy.backups.prune(dry_run=True)).pruned] == [backup.id]
    assert [one.id for one in (await tenancy.backups.prune()).pruned] == [backup.id]
    await tenancy.backups.run(["acme"])
    assert (await tenancy.backups.prune()).pruned == ()
    assert len(listed) == 4


async def test_a_key_that_is_destroyed_while_it_is_written_is_not_left_in_the_store(
    tenancy: Tenancy, backup: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a backup into a store that did not have it, or by whoever seals it again."""
    keys, tenant_id, store = tenancy.backups.keys, backup.tenant_id, tenancy.backups.store
    assert tenant_id is not None
    await keys._delete_stored(tenant_id)
    keys._stored.clear()
    put = store.put

    async def late(path: str, data: bytes) -> None:
        monkeypatch.setattr(store, "put", put)
        await keys.destroy(tenant_id)
        await put(path, data)

    monkeypatch.setattr(store, "put", late)
    assert "destroyed" in (await tenancy.backups.run(["acme"])).reasons["acme"]
    assert not any("/keys/" in path for path in stored(tmp_path))


async def test_a_store_that_is_not_mounted_says_nothing_of_backups(
    tenancy: Tenancy, backup: Backup, tmp_path: Path
) -> None:
    """A backup in it is not bad, and what is pruned is not removed from it yet."""
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    (tmp_path / "store").mkdir()
    with pytest.raises(BackupError, match="mount it"):
        await tenancy.backups.verify(backup)
    assert (await tenancy.backups.get(backup.id)).is_good
    await statement(tenancy, "UPDATE tenancy.backups SET state = 'pruned'")
    assert "mount it" in (await tenancy.backups.prune()).errors[0]
    (tmp_path / "store").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert (await tenancy.backups.prune()).errors == ()
    assert not any(str(backup.id) in path for path in stored(tmp_path))


# --- the control database ---------------------------------------------------------------------------------------------


async def test_the_control_database_is_backed_up_without_the_tenants_keys(
    tenancy: Tenancy, backup: Backup, postgres: Postgres
) -> None:
    """A backup of it that outlives a tenant's key must not bring that key back."""
    made = await tenancy.backups.run_control()
    assert made.manifest is not None and made.manifest.tables["tenancy.tenants"] == 1
    async with tenancy.backups.open(made) as opened:
        text_of = await pg_restore(postgres, "--file=-", str(opened.directory))
    assert "COPY tenancy.backup_keys" not in text_of
    assert "COPY tenancy.tenants" in text_of
    verified = await tenancy.backups.verify(made)
    assert (verified.error, verified.rows) == (None, made.manifest.rows)
    assert await tenancy.backups.list() == (await tenancy.backups.get(backup.id),)
    assert [one.id for one in await tenancy.backups.list(control=True)] == [made.id]


async def test_further_recipients_read_the_control_database_and_no_tenant(tenancy: Tenancy, acme: str) -> None:
    identity, recipient = new_identity()
    tenancy.backups._maker._config = tenancy.config.backup.replace(control_recipients=(recipient,))
    made = await tenancy.backups.run_control()
    store = tenancy.backups.store
    assert sum(map(len, decrypt(store.read(made.archive_path), identity))) > 10_000
    (of_tenant,) = (await tenancy.backups.run(["acme"])).done
    with pytest.raises(BackupDamagedError):
        list(decrypt(store.read(of_tenant.archive_path), identity))


async def test_keys_are_sealed_again_with_the_passwords(
    tenancy_config: TenancyConfig, tenancy: Tenancy, tmp_path: Path
) -> None:
    """In the control database and in the store; a data key that still seals one is not deleted."""
    await tenancy.close()
    wrapping = {"W_WRAPPING_KEYS": "1:" + base64.b64encode(secrets.token_bytes(32)).decode()}
    wrapper = SecretKeyWrapper(EnvironmentSecrets("W_", wrapping))
    config = tenancy_config.replace(encryption_keys=None, secrets={"key_wrapper": wrapper})
    async with opened(config) as other:
        await other.tenants.create("acme")
        (made,) = (await other.backups.run(["acme"])).done
        (first,) = await other.secrets.keys_in_use()
        await other.secrets.rotate_encryption_key()
        (second,) = await other.secrets.keys_in_use()
        assert await other.secrets.forget_unused_keys() == [first]
        async with other.backups.open(made):
            pass
        await statement(other, "DELETE FROM tenancy.backup_keys")
        async with other.backups.open(made):
            pass
        (path,) = [path for path in stored(tmp_path) if "/keys/" in path]
        assert json.loads(stored(tmp_path)[path])["data_key"]["id"] == second


async def test_the_revision_is_the_one_of_the_snapshot(
    postgres: Postgres, control_url: str, name_prefix: str, tmp_path: Path
) -> None:
    """And not the one that is recorded, which may be older by the time of the dump."""
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    config = fleet_config(postgres, control_url, name_prefix, project)
    async with open_fleet(config.replace(backup={"store": f"file:{tmp_path / 'store'}"}), initialise=True) as fleet:
        await fleet.create("acme")
        await statement(fleet.tenancy, "UPDATE tenancy.tenants SET schema_revision = '0000'")
        (made,) = (await fleet.tenancy.backups.run(["acme"])).done
        assert made.manifest is not None and made.manifest.revision == "0001"
        verified = await fleet.tenancy.backups.verify(made)
        assert verified.error is None


async def test_pg_dump_waits_while_the_store_is_slow(
    tenancy: Tenancy, acme: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that temporary space stays bounded; large objects and other tables are in the backup as well."""
    tables = "; ".join(
        f"CREATE TABLE t{n} AS SELECT repeat(md5(i::text), 100) AS c FROM generate_series(1, 2000) i" for n in range(8)
    )
    await as_administrator(
        tenancy, postgres, "acme", f'SET ROLE "{tenancy.internals.provisioner.names.owner}"; {tables}'
    )
    async with tenancy.transaction("acme") as session:
        await session.execute(text("SELECT lo_from_bytea(0, 'large')"))
    settings = tenancy.config.backup.replace(compression="none", max_temporary_bytes=26_000_000)
    monkeypatch.setattr(tenancy.backups._maker, "_config", settings)
    # pg_dump writes 50 MB, and must not have ended before anybody looks
    monkeypatch.setattr(dump, "_POLL_SECONDS", 0.002)
    is_paused, is_resumed = threading.Event(), threading.Event()
    signalled = RunningProgram._signal

    def signal(self: RunningProgram, number: Any, *, paused: bool) -> None:
        before = self._paused
        signalled(self, number, paused=paused)
        if self._paused and not before:
            is_paused.set()
        elif before and not self._paused and not self.has_ended:
            is_resumed.set()

    monkeypatch.setattr(RunningProgram, "_signal", signal)

    class Slow(DirectoryStore):
        def write(self, path: str, chunks: Iterable[bytes], *, size: int | None = None) -> None:
            super().write(path, self._late(chunks) if path.endswith(".age") else chunks, size=size)

        def _late(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
            assert is_paused.wait(HANGS)
            yield from chunks

    tenancy.backups.store.__class__ = Slow
    (made,) = (await tenancy.backups.run(["acme"])).done
    assert is_resumed.is_set()
    assert made.manifest is not None
    assert (made.manifest.large_objects, made.manifest.tables["public.t7"]) == (1, 2000)
    assert (await tenancy.backups.verify(made)).error is None


async def test_a_clock_that_is_set_back_cuts_no_table_off(
    tenancy: Tenancy, acme: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that pg_dump writes looks older than one that is complete, and nothing is written to it for a while."""
    tables = "; ".join(
        f"CREATE TABLE t{n} AS SELECT string_agg(md5(i::text || j), '') AS c FROM generate_series(1, 2000) i, "
        "generate_series(1, 100) j GROUP BY i"
        for n in range(3)
    )
    await as_administrator(
        tenancy, postgres, "acme", f'SET ROLE "{tenancy.internals.provisioner.names.owner}"; {tables}'
    )
    monkeypatch.setattr(tenancy.backups._maker, "_config", tenancy.config.backup.replace(compression="gzip:9"))
    # pg_dump takes some 300 ms for each of them, and writes 3.6 MB
    monkeypatch.setattr(dump, "_POLL_SECONDS", 0.002)
    is_stopped, looks, bound = threading.Event(), 0, dump.Dump._bound

    def stopping(self: dump.Dump, program: Any, directory: Path, feed: Any) -> None:
        nonlocal looks
        if looks > 10 and not feed.waiting:
            bound(self, program, directory, feed)
            return
        if not looks:
            if not directory.exists():
                return
            program.pause()
            written = sorted(directory.glob("*.dat.gz"), key=lambda file: file.stat().st_mtime_ns)
            if len(written) < 2 or not 100_000 < written[-1].stat().st_size < 3_000_000:
                program.resume()
                return
            os.utime(written[-1], ns=(1, 1))
            is_stopped.set()
        looks += 1

    monkeypatch.setattr(dump.Dump, "_bound", stopping)

    class Waiting(DirectoryStore):
        def write(self, path: str, chunks: Iterable[bytes], *, size: int | None = None) -> None:
            super().write(path, self._late(chunks) if path.endswith(".age") else chunks, size=size)

        def _late(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
            assert is_stopped.wait(HANGS)
            yield from chunks

    tenancy.backups.store.__class__ = Waiting
    (made,) = (await tenancy.backups.run(["acme"])).done
    assert looks > 10
    assert (await tenancy.backups.verify(made)).error is None
