"""Erasure: backups that nobody can read, and certificates that say what remains."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.audit.checkpoints import Signer, Verifier
from tenancy_orm.backups import Backup
from tenancy_orm.errors import (
    BackupError,
    BackupKeyDestroyedError,
    BackupNotFoundError,
    CrossTenantError,
    ErasureError,
    TenantNotFoundError,
)
from tenancy_orm.exports import ErasureCertificate, erasure
from tenancy_orm.operations import Operations
from tenancy_orm.registry.rows import uuid7
from tenancy_orm.restores import BackupSource
from tests.integration.backups.conftest import acme, backup, tenancy_config
from tests.integration.backups.test_backups import pg_restore, statement
from tests.support.postgres import Postgres

__all__ = ["acme", "backup", "tenancy_config"]

UNREADABLE = (BackupKeyDestroyedError, BackupNotFoundError)


@pytest.fixture
async def elsewhere(postgres: Postgres, tenancy: Tenancy) -> AsyncIterator[str]:
    """The URL of an empty database, for the control database of the same installation."""
    name = postgres.new_name()
    yield await postgres.create_database(name)
    await postgres.drop_database(name, but=tenancy.internals.provisioner.names.stem)


async def read(tenancy: Tenancy, backup: Backup) -> None:
    """Decrypt a backup."""
    async with tenancy.backups.open(backup.id):
        pass


async def purge(tenancy: Tenancy, slug: str = "acme") -> None:
    await tenancy.tenants.delete(slug)
    await tenancy.tenants.purge(slug)


async def test_no_backup_of_a_purged_tenant_can_be_read_wherever_it_lies(
    tenancy: Tenancy, tenancy_config: TenancyConfig, backup: Backup, postgres: Postgres, elsewhere: str, tmp_path: Path
) -> None:
    """Not with an older control database either, which was backed up, and is restored elsewhere, after the purge."""
    control = await tenancy.backups.run_control()
    async with tenancy.backups.open(control) as opened:
        dump = tmp_path / "control"
        await asyncio.to_thread(shutil.copytree, opened.directory, dump)
    await pg_restore(postgres, "--no-owner", f"--dbname={elsewhere}", str(dump))
    before = Tenancy(tenancy_config.replace(control_url=elsewhere))
    async with before:
        # what a restored control database gives before the keys are destroyed
        assert (await before.tenants.get("acme")).slug == "acme"
        await read(before, backup)
        copies = tmp_path / "copies"
        await asyncio.to_thread(shutil.copytree, tmp_path / "store", copies, ignore=shutil.ignore_patterns("keys"))
        await purge(tenancy)
        certificate = await tenancy.erasures.complete(str(backup.tenant_id))
        for reader in (tenancy, before):
            with pytest.raises(UNREADABLE):
                await read(reader, backup)
    # the encrypted dump lies elsewhere still; no identity that opens it is anywhere in the store
    assert list(copies.rglob("*.age"))
    assert not [path for path in (tmp_path / "store").rglob("*.json") if str(backup.tenant_id) in path.parent.name]
    assert list(certificate.backup_keys) == [backup.key_id]


async def test_a_certificate_says_what_was_erased_and_what_remains(
    tenancy: Tenancy, tenancy_config: TenancyConfig, backup: Backup
) -> None:
    config = tenancy_config.replace(
        erasure={"server_backup_seconds": 14 * 86_400.0, "control_server_backup_seconds": 35 * 86_400.0},
        retention={"audit_seconds": 400 * 86_400.0},
    )
    tenancy.erasures._config = config
    tenant_id = backup.tenant_id
    assert tenant_id is not None
    with pytest.raises(ErasureError, match="has not been purged"):
        await tenancy.erasures.complete("acme")
    await purge(tenancy)
    with pytest.raises(ErasureError, match="no certificate of 'acme' yet"):
        await tenancy.erasures.certificate("acme")
    found = await tenancy.erasures.complete("acme")
    assert await tenancy.erasures.complete(tenant_id) == await tenancy.erasures.certificate("acme") == found
    assert (found.slug, found.tenant_id, found.installation) == (
        "acme",
        tenant_id,
        tenancy.internals.control.installation,
    )
    (purged,) = await tenancy.audit.events(tenant=tenant_id, action="tenant.purge")
    assert found.purged_at == purged.occurred_at <= found.issued_at
    remains = {one.what.split(":")[0]: one for one in found.remains}
    assert not remains[
        "1 encrypted backups of its database in this installation's stores, and their copies"
    ].is_readable
    assert remains["base backups and WAL of its whole server"].until == found.purged_at + timedelta(days=14)
    # with the sealed keys in them, copies of the encrypted backups can be read
    control = remains["base backups and WAL of the control database's server, and dumps of it by other means"]
    assert control.is_readable and "sealed keys" in control.note
    assert control.until == found.backup_keys[backup.key_id] + timedelta(days=35)
    assert remains["audit entries"].until == found.purged_at + timedelta(days=431)
    assert remains["backups of the control database"].until is None
    assert "erasure.control_backup_seconds is not set" in remains["backups of the control database"].note
    (entry,) = await tenancy.audit.events(tenant=tenant_id, action="tenant.erase")
    assert entry.detail is not None and entry.detail["backup_keys"] == 1
    assert "not readable alone" in found.text() and "by anybody" not in found.text()

    # verified with public keys alone, and by nothing else
    data = found.to_bytes()
    ErasureCertificate.from_bytes(data).verify(Verifier(tenancy.audit.public_keys))
    assert await tenancy.erasures.verify(data) == found
    with pytest.raises(ErasureError, match="not known"):
        await tenancy.erasures.verify(data, verifier=Verifier({}))
    changed = data.replace(b'"slug":"acme"', b'"slug":"acne"')
    assert changed != data
    with pytest.raises(ErasureError, match="signature is not valid"):
        await tenancy.erasures.verify(changed)
    for broken in (b"{}", data.replace(b",", b", ", 1), data[:-2]):
        with pytest.raises(ErasureError, match="is not a certificate"):
            await tenancy.erasures.verify(broken)
    statement = Signer({"1": bytes(32)}).sign_statement("tenancy-erasure-1", dict(found.statement.fields))
    with pytest.raises(ErasureError, match="signature is not valid"):
        await tenancy.erasures.verify(statement.to_bytes())
    async with tenancy.scope((await tenancy.tenants.create("globex")).tenant):
        with pytest.raises(CrossTenantError):
            await tenancy.erasures.certificate(tenant_id)


async def test_a_slug_of_several_tenants_leads_to_the_certificate_of_none(tenancy: Tenancy) -> None:
    """The certificate of the first would say to whoever asks by the slug that the second was erased."""
    first = (await tenancy.tenants.create("acme")).tenant
    await purge(tenancy)
    certified = await tenancy.erasures.complete("acme")
    assert certified == await tenancy.erasures.certificate("acme")
    second = (await tenancy.tenants.create("acme")).tenant
    for _ in range(2):
        for ask in (tenancy.erasures.certificate, tenancy.erasures.complete):
            with pytest.raises(ErasureError, match="several tenants have or had the slug 'acme'") as caught:
                await ask("acme")
            assert f"{first.id} (purged), {second.id} (active)" in str(caught.value)
        assert await tenancy.erasures.certificate(str(first.id)) == certified
        with pytest.raises(ErasureError, match="no certificate"):
            await tenancy.erasures.certificate(second)
        # the slug still names the second, while it redirects to it
        if (await tenancy.tenants.get(second)).slug == "acme":
            await tenancy.tenants.rename("acme", "acme-corp")
    await purge(tenancy, "acme-corp")
    assert (await tenancy.erasures.complete("acme-corp")).tenant_id == second.id
    # a purged tenant has no former slugs: the first is the only one with this as its last slug
    assert await tenancy.erasures.certificate("acme") == certified
    third = (await tenancy.tenants.create("acme")).tenant
    await purge(tenancy)
    with pytest.raises(ErasureError, match=f"{third.id} \\(purged\\)"):
        await tenancy.erasures.certificate("acme")


async def test_an_existing_tenant_is_found_by_all_of_its_names(tenancy: Tenancy) -> None:
    """As in every other part; it is then refused for what it is, and not said not to exist."""
    tenant = (await tenancy.tenants.create("acme")).tenant
    await tenancy.tenants.rename("acme", "acme-corp")
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(
            text(
                "INSERT INTO tenancy.domains (domain, tenant_id, token, verified_at) "
                "VALUES ('acme.example', :id, 't', now()), ('claimed.example', :id, 't', NULL)"
            ),
            {"id": tenant.id},
        )
    for name in ("acme-corp", "acme", "acme.example", tenant.id, tenant):
        with pytest.raises(ErasureError, match="no certificate of 'acme-corp' yet"):
            await tenancy.erasures.certificate(name)
        with pytest.raises(ErasureError, match="'acme-corp' has not been purged"):
            await tenancy.erasures.complete(name)
    for unknown in ("claimed.example", "nobody", "", "acme\0"):
        with pytest.raises(TenantNotFoundError):
            await tenancy.erasures.certificate(unknown)


async def test_housekeeping_certifies_what_it_purges_and_repeats_what_failed(
    tenancy: Tenancy, backup: Backup, tmp_path: Path
) -> None:
    """A store that is not mounted looks empty: nothing is certified until the keys in it are destroyed."""
    tenant_id, store = backup.tenant_id, tmp_path / "store"
    assert tenant_id is not None
    await tenancy.tenants.delete("acme")
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(text("UPDATE tenancy.tenants SET purge_at = now() WHERE slug = 'acme'"))
    moved = store.rename(tmp_path / "moved")
    report = await tenancy.run_housekeeping()
    assert report.purged == ("acme",)
    assert any("has nothing of tenant 'acme'" in error for error in report.errors), report.errors
    with pytest.raises(ErasureError):
        await tenancy.erasures.certificate(tenant_id)
    # housekeeping goes on to use the empty directory, which makes it no more the right one
    report = await tenancy.run_housekeeping()
    assert any("has nothing of tenant 'acme'" in error for error in report.errors), report.errors
    shutil.rmtree(store, ignore_errors=True)
    moved.rename(store)
    report = await tenancy.run_housekeeping()
    assert report.chores["complete_erasures"].completed == ("acme",)
    assert list((await tenancy.erasures.certificate(tenant_id)).backup_keys) == [backup.key_id]
    assert (await tenancy.run_housekeeping()).chores["complete_erasures"].completed == ()
    found = await Operations(tenancy.internals.control).list(tenant_id=tenant_id, kinds=("erasure",))
    assert [(one.state, one.error) for one in found] == [("done", None)]


async def test_what_fails_each_time_is_in_nobodys_way(
    tenancy: Tenancy, backup: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many fail in one run, the others have their turn; and a run goes on as long as it completes some."""
    monkeypatch.setattr(erasure, "_AT_ONCE", 1)
    # its backups are in the former store, which is not mounted
    former = tmp_path / "former"
    moved = (tmp_path / "store").rename(tmp_path / "moved")
    await statement(tenancy, "UPDATE tenancy.backups SET store = :url", url=f"file:{former}")
    await tenancy.backups.run_control()
    for slug in ("one", "two", "three"):
        await tenancy.tenants.create(slug)
        await purge(tenancy, slug)
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.purge("acme")
    completed = set[str]()
    errors = list[str]()
    for _ in range(4):
        report = await tenancy.erasures.run()
        completed.update(report.completed)
        errors += report.errors
    assert completed == {"one", "two", "three"}
    assert errors and all(str(backup.tenant_id) in error for error in errors)
    moved.rename(former)
    assert (await tenancy.erasures.run()).completed == ("acme",)


async def test_what_a_restored_control_database_does_not_know_is_destroyed_and_removed_too(
    tenancy: Tenancy, backup: Backup, tmp_path: Path
) -> None:
    """Keys, which no backup of it has, and the backups that were made since it was backed up, whole or in part."""
    tenant_id, keys = backup.tenant_id, tenancy.backups.keys
    assert tenant_id is not None
    (later,) = (await tenancy.backups.run(["acme"])).done
    await statement(tenancy, "DELETE FROM tenancy.backup_keys")
    await statement(tenancy, "DELETE FROM tenancy.backups WHERE id = :id", id=later.id)
    (again,) = (await tenancy.backups.run(["acme"])).done
    assert again.key_id != backup.key_id == later.key_id
    # what a killed process had begun; and what somebody has put there, which is no key
    below = f"{tenancy.internals.control.installation}"
    await tenancy.backups.store.put(f"{below}/{tenant_id}/{uuid7()}/dump.tar.age", b"a part")
    await tenancy.backups.store.put(f"{below}/keys/{tenant_id}/{'0' * 32}.json", b"{}")
    await purge(tenancy)
    certificate = await tenancy.erasures.complete(tenant_id)
    assert certificate.backup_keys.keys() == {backup.key_id, again.key_id}
    assert {key.id: key.destroyed_at for key in await keys.of(tenant_id)} == certificate.backup_keys
    assert certificate.remains[0].what.startswith("3 encrypted backups")
    left = {path.parent.name for path in (tmp_path / "store" / below / str(tenant_id)).rglob("*.age")}
    assert left == {str(one.id) for one in (backup, later, again)}
    report = await tenancy.backups.prune()
    assert {one.id for one in report.pruned} == {backup.id, later.id, again.id}
    assert not [path for path in (tmp_path / "store" / below).rglob(f"*{tenant_id}*/**/*") if path.is_file()]


async def test_a_backup_that_is_found_after_the_erasure_is_removed(
    tenancy: Tenancy, backup: Backup, tmp_path: Path
) -> None:
    """As the newest good one it would be kept for ever, and until a time that was set."""
    tenant_id, store = backup.tenant_id, tmp_path / "store"
    assert tenant_id is not None
    await tenancy.backups.keep(backup, datetime.now(UTC) + timedelta(days=30))
    await asyncio.to_thread(shutil.copytree, store / backup.path, tmp_path / "copy")
    await statement(tenancy, "DELETE FROM tenancy.backup_keys")
    await purge(tenancy)
    # not before the keys are destroyed: its row says in which store they are
    assert (await tenancy.backups.prune()).pruned == ()
    assert list((await tenancy.erasures.complete(tenant_id)).backup_keys) == [backup.key_id]
    assert [one.id for one in (await tenancy.backups.prune()).pruned] == [backup.id]
    await statement(tenancy, "DELETE FROM tenancy.backup_keys")
    await statement(tenancy, "DELETE FROM tenancy.backups")
    await asyncio.to_thread(shutil.copytree, tmp_path / "copy", store / backup.path)
    assert [one.id for one in (await tenancy.backups.scan()).found] == [backup.id]
    assert [one.id for one in (await tenancy.backups.prune()).pruned] == [backup.id]
    assert not list((store / backup.path).rglob("*.age"))


async def test_a_store_that_is_not_mounted_may_have_what_a_restored_control_database_does_not_know(
    tenancy: Tenancy, backup: Backup, tmp_path: Path
) -> None:
    """No row says that the tenant has ever been backed up."""
    tenant_id, store = backup.tenant_id, tmp_path / "store"
    assert tenant_id is not None
    await tenancy.tenants.create("globex")
    assert (await tenancy.backups.run(["globex"])).reasons == {}
    await statement(tenancy, "DELETE FROM tenancy.backup_keys WHERE tenant_id = :id", id=tenant_id)
    await statement(tenancy, "DELETE FROM tenancy.backups WHERE tenant_id = :id", id=tenant_id)
    moved = store.rename(tmp_path / "moved")
    await purge(tenancy)
    with pytest.raises(BackupError, match="is empty, but the control database lists backups"):
        await tenancy.erasures.complete(tenant_id)
    shutil.rmtree(store, ignore_errors=True)
    moved.rename(store)
    certificate = await tenancy.erasures.complete(tenant_id)
    assert list(certificate.backup_keys) == [backup.key_id]
    assert certificate.remains[0].what.startswith("1 encrypted backups")


async def test_nothing_is_certified_while_a_backup_is_decrypted(tenancy: Tenancy, backup: Backup) -> None:
    """A verification has the rows in files and in a scratch database, which a certificate does not know."""
    tenant_id = backup.tenant_id
    assert tenant_id is not None
    async with tenancy.backups.open(backup):
        await purge(tenancy)
        with pytest.raises(ErasureError, match=f"backup {backup.id} of tenant 'acme' is decrypted on"):
            await tenancy.erasures.complete(tenant_id)
        # no later reader comes
        with pytest.raises(UNREADABLE):
            await read(tenancy, backup)
    certificate = await tenancy.erasures.complete(tenant_id)
    assert "decrypted" not in certificate.text()
    assert await statement(tenancy, "SELECT readers FROM tenancy.backups") == [(None,)]


async def test_a_copy_is_named_although_nothing_was_recorded_after_it(
    tenancy: Tenancy, backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its process is killed right then, or once retention has removed the entry."""
    tenant_id, record = backup.tenant_id, tenancy.internals.registry.record
    assert tenant_id is not None

    async def dies(about: UUID, action: str, **values: Any) -> None:
        if action == "tenant.restored_as":
            raise ConnectionResetError
        await record(about, action, **values)

    monkeypatch.setattr(tenancy.internals.registry, "record", dies)
    with pytest.raises(ConnectionResetError):
        await tenancy.restores.restore_as("copy", BackupSource(tenancy.backups, backup))
    assert await tenancy.audit.events(action="tenant.restored_as") == []
    await purge(tenancy)
    found = {one.what for one in (await tenancy.erasures.complete(tenant_id)).remains}
    assert "tenant 'copy', which was made of a copy of its database" in found


async def test_a_certificate_names_what_was_made_of_copies(tenancy: Tenancy, backup: Backup) -> None:
    """Clones, their clones, and tenants of a backup, which have its rows; not those that are purged."""
    tenant_id = backup.tenant_id
    assert tenant_id is not None
    clones = tenancy.clones
    made = await clones.create("acme", "debug", ttl=timedelta(days=2))
    await clones.create("debug", "again", ttl=timedelta(days=1))
    await clones.create("acme", "gone", ttl=timedelta(days=1))
    await tenancy.restores.restore_as("restored", BackupSource(tenancy.backups, backup))
    await tenancy.tenants.create("globex")
    await purge(tenancy, "gone")
    await purge(tenancy)
    found = {one.what: one for one in (await tenancy.erasures.complete(tenant_id)).remains}
    named = [what.split("'")[1] for what in found if what.startswith("tenant ")]
    assert named == ["debug", "again", "restored"]
    debug = found["tenant 'debug', which was made of a copy of its database"]
    assert debug.is_readable and debug.until == made.clone.expires_at
    assert found["tenant 'restored', which was made of a copy of its database"].until is None
