"""Two processes, or a process and a store, that meet: no backup that counts as good is one that is not there."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.audit.actor import SYSTEM
from tenancy_orm.backups import Backup, DirectoryStore, dump, manager, records
from tenancy_orm.backups.manifest import Manifest
from tenancy_orm.errors import BackupError, BackupNotFoundError, BackupUnderWayError
from tenancy_orm.jobs import Claimant
from tenancy_orm.postgres.programs import run_program
from tenancy_orm.provisioning.copies import archives, restoring
from tenancy_orm.registry.rows import uuid7
from tests.support.postgres import Postgres
from tests.support.processes import opened


async def execute(tenancy: Tenancy, sql: str) -> Any:
    async with tenancy.internals.control.transaction() as connection:
        found = await connection.execute(text(sql))
        return found.all() if found.returns_rows else None


def first_then(method: Callable[..., Awaitable[Any]], then: Callable[[], Awaitable[Any]]) -> Callable[..., Any]:
    """The method, and something that happens once after its first call."""
    called = False

    async def both(*args: Any, **options: Any) -> Any:
        nonlocal called
        found = await method(*args, **options)
        if not called:
            called = True
            await then()
        return found

    return both


# --- writers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "unlocked"])
async def test_a_table_that_is_emptied_and_filled_again_is_not_empty_in_the_backup(
    tenancy: Tenancy, acme: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, *, locked: bool
) -> None:
    """After the snapshot, and before pg_dump locks the table: no row would be in the dump, and none be counted."""
    placement = (await tenancy.tenants.get(acme)).placement
    assert placement is not None
    refilled = []

    async def refill() -> None:
        async with postgres.connect(placement.database) as connection:
            await connection.execute("SET lock_timeout = '200ms'")
            try:
                async with connection.transaction():
                    await connection.execute("TRUNCATE notes CASCADE; INSERT INTO notes (body) VALUES ('new')")
            except asyncpg.LockNotAvailableError:
                return
            refilled.append(True)

    async def unlocked(connection: Any, *_: Any) -> None:
        await connection.transaction(isolation="repeatable_read", readonly=True).start()

    if not locked:
        monkeypatch.setattr(dump, "begin_snapshot", unlocked)
    facts = dump.Dump._facts

    async def then_refilled(self: Any, holding: Any) -> Any:
        found = await facts(self, holding)
        await refill()
        return found

    monkeypatch.setattr(dump.Dump, "_facts", then_refilled)
    (made,) = (await tenancy.backups.run([acme])).done
    assert made.manifest is not None
    assert (made.manifest.tables["public.notes"], refilled) == ((100, []) if locked else (0, [True]))


# --- pruning ----------------------------------------------------------------------------------------------------------


async def test_a_complete_backup_that_another_process_takes_up_is_not_removed(
    tenancy: Tenancy, tenancy_config: TenancyConfig, backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that has made it died before it could say so. Housekeeping and the job of backups both prune."""
    await execute(tenancy, "UPDATE tenancy.backups SET state = 'failed', manifest = NULL")
    async with opened(tenancy_config) as other:
        pruner = tenancy.backups._pruner
        monkeypatch.setattr(pruner._records, "to_remove", first_then(pruner._records.to_remove, other.backups.prune))
        assert (await tenancy.backups.prune()).errors == ()
    assert (await tenancy.backups.get(backup.id)).state == "done"
    assert (await tenancy.backups.verify(backup.id)).error is None


async def test_two_processes_do_not_remove_one_backup_twice(
    tenancy: Tenancy, tenancy_config: TenancyConfig, backup: Backup, tmp_path: Path
) -> None:
    """What a process that died was removing is removed by another one later."""
    await execute(
        tenancy, "UPDATE tenancy.backups SET state = 'pruned', claimed_until = now() + interval '1 hour', claim = id"
    )
    assert (await tenancy.backups.prune()).errors == ()
    assert (tmp_path / "store" / backup.archive_path).exists()
    await execute(tenancy, "UPDATE tenancy.backups SET claimed_until = now()")
    await tenancy.backups.prune()
    assert not (tmp_path / "store" / backup.archive_path).exists()
    assert (await tenancy.backups.get(backup.id)).pruned_at is not None


async def test_a_process_that_has_lost_its_claim_leaves_the_store_to_those_who_prune(
    tenancy: Tenancy, acme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then another one may have found the backup complete, and says so."""
    store = tenancy.backups.store
    put = store.put

    async def late(path: str, data: bytes) -> None:
        await put(path, data)
        if path.endswith("manifest.json"):
            await execute(tenancy, "UPDATE tenancy.backups SET claimed_until = now() WHERE state = 'running'")
            await tenancy.backups.prune()

    monkeypatch.setattr(store, "put", late)
    assert (await tenancy.backups.run([acme])).reasons.keys() == {acme}
    (made,) = await tenancy.backups.list(acme)
    assert made.state == "done"
    assert (await tenancy.backups.verify(made)).error is None


async def test_what_comes_into_the_store_late_is_removed_by_the_next(
    tenancy: Tenancy, acme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped for a while, and whose backup was removed as abandoned, writes on."""
    store = tenancy.backups.store
    put = store.put

    async def late(path: str, data: bytes) -> None:
        if path.endswith("manifest.json"):
            await execute(tenancy, "UPDATE tenancy.backups SET claimed_until = now() WHERE state = 'running'")
            await tenancy.backups.prune()
        await put(path, data)

    monkeypatch.setattr(store, "put", late)
    await tenancy.backups.run([acme])
    (failed,) = await tenancy.backups.list(acme)
    assert (failed.state, (tmp_path / "store" / failed.path).exists()) == ("failed", True)
    await tenancy.backups.prune()
    assert not (tmp_path / "store" / failed.path).exists()


async def test_the_last_good_one_stays_if_the_newer_one_is_found_to_be_bad_meanwhile(
    tenancy: Tenancy, backup: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (newer,) = (await tenancy.backups.run(["acme"])).done
    pruner = tenancy.backups._pruner
    pruner._config = tenancy.config.backup.replace(keep_last=1, keep_daily=0, keep_weekly=0, keep_monthly=0)

    async def meanwhile() -> None:
        (tmp_path / "store" / newer.archive_path).write_bytes(b"x")
        assert not (await tenancy.backups.verify(newer, restore=False)).is_good

    assert [one.id for one in await pruner.to_prune()] == [backup.id]
    monkeypatch.setattr(pruner, "to_prune", first_then(pruner.to_prune, meanwhile))
    assert (await tenancy.backups.prune()).pruned == ()
    assert (await tenancy.backups.verify(backup)).is_good


async def test_what_is_removed_cannot_be_kept_any_more(tenancy: Tenancy, backup: Backup) -> None:
    """Somebody who wants to keep it has to know."""
    await execute(tenancy, "UPDATE tenancy.backups SET state = 'pruned'")
    with pytest.raises(BackupNotFoundError, match="cannot be kept: it is pruned"):
        await tenancy.backups.keep(backup.id, datetime.now(UTC) + timedelta(days=1))


async def test_rows_of_removed_backups_do_not_grow_for_ever(tenancy: Tenancy, backup: Backup) -> None:
    """Each has a manifest, with a line for each table and file; and is deleted once it is old."""
    await tenancy.backups.run(["acme"])
    await execute(tenancy, f"UPDATE tenancy.backups SET state = 'pruned' WHERE id = '{backup.id}'")
    await tenancy.backups.prune()
    assert await execute(tenancy, "SELECT manifest IS NULL FROM tenancy.backups ORDER BY started_at") == [
        (True,),
        (False,),
    ]
    await execute(tenancy, "UPDATE tenancy.backups SET pruned_at = now() - interval '91 days' WHERE state = 'pruned'")
    await tenancy.backups.prune()
    assert await execute(tenancy, "SELECT state FROM tenancy.backups") == [("done",)]
    # the last one says in which store the tenant's key is
    await execute(tenancy, "UPDATE tenancy.backups SET state = 'pruned', pruned_at = now() - interval '91 days'")
    await tenancy.backups.prune()
    assert len(await tenancy.backups.list(states=None)) == 1


# --- verifying --------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_lost_while_a_backup_is_verified_says_nothing_of_the_backup(
    tenancy: Tenancy, backup: Backup, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would count as bad, and go before its time."""

    async def cut_off(arguments: Any, environment: Any) -> str:
        if "--exit-on-error" in arguments:
            role = environment["PGUSER"]
            await postgres.administer(f'ALTER ROLE "{role}" NOLOGIN')
        return await run_program(arguments, environment)

    monkeypatch.setattr(restoring, "run_program", cut_off)
    with pytest.raises(BackupError, match=r"cannot be verified on server 'default' now: .*; before that: pg_restore"):
        await tenancy.backups.verify(backup)
    found = await tenancy.backups.get(backup.id)
    assert (found.is_good, found.verified_at) == (True, None)


async def test_a_restore_that_fails_is_tried_again_and_says_nothing_of_the_backup(
    tenancy: Tenancy, backup: Backup, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server may have too many connections at that moment, or lack something; a bad backup goes before its time."""
    refusals = 1

    async def refused(arguments: Any, environment: Any) -> str:
        nonlocal refusals
        if "--exit-on-error" not in arguments or not refusals:
            return await run_program(arguments, environment)
        refusals -= 1
        role = environment["PGUSER"]
        await postgres.administer(f'ALTER ROLE "{role}" CONNECTION LIMIT 0')
        try:
            return await run_program(arguments, environment)
        finally:
            await postgres.administer(f'ALTER ROLE "{role}" CONNECTION LIMIT -1')

    monkeypatch.setattr(restoring, "run_program", refused)
    found = await tenancy.backups.verify(backup)
    assert (found.error, found.restored, refusals) == (None, True, 0)
    await execute(tenancy, "UPDATE tenancy.backups SET verified_at = NULL")
    refusals = 2
    with pytest.raises(
        BackupError, match=r"could not be restored on server 'default', also when.*too many connections"
    ):
        await tenancy.backups.verify(backup)
    kept = await tenancy.backups.get(backup.id)
    assert (kept.is_good, kept.verified_at, refusals) == (True, None, 0)


async def test_what_is_missing_in_what_was_restored_is_found(
    tenancy: Tenancy, backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = archives.select

    def broken(entries: str, schemas: set[str]) -> tuple[str, tuple[str, ...]]:
        kept, left_out = select(entries, schemas)
        lines = kept.splitlines(keepends=True)
        return "".join(line for line in lines if " TABLE DATA public notes " not in line), left_out

    monkeypatch.setattr(archives, "select", broken)
    found = await tenancy.backups.verify(backup)
    assert found.error is not None and "public.notes has 0 rows, not 100" in found.error
    assert not (await tenancy.backups.get(backup.id)).is_good


async def test_a_sequence_that_was_not_set_is_found(
    tenancy: Tenancy, backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next row would get the number of one that is there. One that was used during the dump is not compared."""
    assert backup.manifest is not None
    (name,) = backup.manifest.sequences
    assert backup.manifest.sequences == {name: 100}
    assert (await tenancy.backups.verify(backup)).error is None
    select = archives.select

    def broken(entries: str, schemas: set[str]) -> tuple[str, tuple[str, ...]]:
        kept, left_out = select(entries, schemas)
        return "".join(line for line in kept.splitlines(keepends=True) if " SEQUENCE SET " not in line), left_out

    with monkeypatch.context() as patch:
        patch.setattr(archives, "select", broken)
        found = await tenancy.backups.verify(backup)
    assert found.error == f"sequences have other values: {name} is at no value, not 100"

    count = dump.Dump._count

    async def used(*args: Any) -> Any:
        async with tenancy.transaction("acme") as session:
            await session.execute(text("INSERT INTO notes (body) VALUES ('another')"))
        return await count(*args)

    monkeypatch.setattr(dump.Dump, "_count", used)
    (made,) = (await tenancy.backups.run(["acme"])).done
    assert made.manifest is not None and made.manifest.sequences == {}
    assert (await tenancy.backups.verify(made)).error is None
    # what older versions of the package have signed
    fields = made.manifest.to_fields()
    del fields["sequences"]
    assert Manifest.from_fields(fields) == made.manifest


async def test_only_a_restore_takes_back_what_one_has_found(tenancy: Tenancy, backup: Backup) -> None:
    """Checksums say that it is what was written, and not that it can be restored."""
    await execute(tenancy, "UPDATE tenancy.backups SET verified_at = now(), verify_error = 'rows are missing'")
    assert (await tenancy.backups.verify(backup, restore=False)).is_good
    assert not (await tenancy.backups.get(backup.id)).is_good
    assert (await tenancy.backups.verify(backup)).backup.is_good
    await execute(tenancy, "UPDATE tenancy.backups SET verified_at = NULL")
    assert (await tenancy.backups.verify(backup, restore=False)).backup.verified_at is None


async def test_one_that_is_pruned_while_it_is_verified_is_not_bad(
    tenancy: Tenancy, backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tenancy.backups._reader.manifest

    async def prune() -> None:
        await execute(tenancy, "UPDATE tenancy.backups SET state = 'pruned'")
        assert (await tenancy.backups.prune()).errors == ()

    monkeypatch.setattr(tenancy.backups._reader, "manifest", first_then(manifest, prune))
    with pytest.raises(BackupNotFoundError, match="is pruned now"):
        await tenancy.backups.verify(backup, restore=False)
    assert (await tenancy.backups.get(backup.id)).verify_error is None


# --- stores -----------------------------------------------------------------------------------------------------------


async def test_nothing_is_written_to_a_store_that_is_not_mounted(
    tenancy: Tenancy, backup: Backup, tmp_path: Path
) -> None:
    """It would fill another disk, count as the newest backup, and be hidden by what is mounted next."""
    store = tmp_path / "store"
    store.rename(tmp_path / "elsewhere")
    store.mkdir()
    await tenancy.tenants.create("globex")
    report = await tenancy.backups.run(["acme", "globex"])
    assert all("is empty, but the control database lists backups" in reason for reason in report.reasons.values()), (
        report.reasons
    )
    assert report.reasons.keys() == {"acme", "globex"}
    assert list(store.rglob("*")) == []
    assert backup.tenant_id is not None
    with pytest.raises(BackupError, match="mount it"):
        await tenancy.backups.keys.destroy(backup.tenant_id)
    store.rmdir()
    (tmp_path / "elsewhere").rename(store)
    assert (await tenancy.backups.run(["acme", "globex"])).reasons == {}
    await tenancy.backups.keys.destroy(backup.tenant_id)
    await tenancy.backups.keys.destroy(backup.tenant_id)


async def test_a_key_in_the_store_that_is_damaged_is_written_again(
    tenancy: Tenancy, tenancy_config: TenancyConfig, backup: Backup, tmp_path: Path
) -> None:
    """It is needed on the day on which the control database is lost; so nobody would notice before."""
    path = tmp_path / "store" / f"{tenancy.internals.control.installation}/keys/{backup.tenant_id}/{backup.key_id}.json"
    whole = json.loads(path.read_text("utf-8"))["sealed"]
    for damaged in (b"", b"{}", path.read_bytes().replace(whole.encode(), whole[:-8].encode())):
        path.write_bytes(damaged)
        async with opened(tenancy_config) as other:
            assert (await other.backups.run(["acme"])).reasons == {}
        assert json.loads(path.read_text("utf-8"))["sealed"] == whole


async def test_a_key_that_is_sealed_again_while_a_store_gets_it_is_the_newest_there(
    tenancy: Tenancy, backup: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former encryption key may be forgotten once no row needs it."""
    keys, store = tenancy.backups.keys, tenancy.backups.store
    path = f"{tenancy.internals.control.installation}/keys/{backup.tenant_id}/{backup.key_id}.json"
    await store.delete(path)
    keys._stored.clear()
    put = store.put

    async def late(where: str, data: bytes) -> None:
        monkeypatch.setattr(store, "put", put)
        keyring = keys._keyring
        keyring.add_keys({"later": b"k" * 32})
        assert (await keys.reseal(tenancy.audit)).resealed == 1
        await put(where, data)

    monkeypatch.setattr(store, "put", late)
    await tenancy.backups.run(["acme"])
    ((sealed,),) = await execute(tenancy, "SELECT sealed_identity FROM tenancy.backup_keys")
    assert keys._keyring.key_id(bytes(sealed)) == "later"
    stored = json.loads((tmp_path / "store" / path).read_text("utf-8"))["sealed"]
    assert base64.b64decode(stored) == bytes(sealed)


# --- what is due ------------------------------------------------------------------------------------------------------


async def test_tenants_that_fail_keep_no_others_from_their_turn(
    tenancy: Tenancy, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a server that is lost are the longest due of all, and are due again before the others had a turn."""
    lost = (await tenancy.tenants.create("acme")).tenant.placement
    await tenancy.tenants.create("globex")
    assert lost is not None
    monkeypatch.setattr(manager, "_AT_ONCE", 1)
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.0)
    await postgres.administer(f'ALTER DATABASE "{lost.database}" RENAME TO "{lost.database}_"')
    try:
        report = await tenancy.backups.run_due()
    finally:
        await postgres.administer(f'ALTER DATABASE "{lost.database}_" RENAME TO "{lost.database}"')
    assert report.reasons.keys() == {"acme"}
    assert {one.slug for one in report.done} == {None, "globex"}


async def test_the_control_database_does_not_wait_for_the_tenants(
    tenancy: Tenancy, acme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet that takes longer than a worker lives would leave it without a backup."""

    class Slow(DirectoryStore):
        async def put(self, path: str, data: bytes) -> None:
            if path.endswith("manifest.json") and "/control/" not in path:
                await asyncio.Event().wait()
            await super().put(path, data)

    tenancy.backups.store.__class__ = Slow
    running = asyncio.create_task(tenancy.backups.run_due())
    try:
        while not await tenancy.backups.list(control=True, states=("done",)):
            assert not running.done()
            await asyncio.sleep(0.05)
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_backup_that_ends_as_another_process_begins_one_is_not_made_twice(
    tenancy: Tenancy, acme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not done yet when the other process looks for what is done, and not under way any more after that."""
    tenant_id = (await tenancy.tenants.get(acme)).id
    key = await tenancy.backups.keys.current(tenant_id, tenancy.backups.store, actor=SYSTEM)

    async def begin(*, due: float | None) -> bool:
        return await kept.begin(
            uuid7(),
            tenant_id,
            Claimant(),
            server="default",
            at_most=5,
            store="file:/store",
            path="path",
            key_id=key.id,
            kept_until=None,
            due=due,
        )

    async def end() -> None:
        ending = "UPDATE tenancy.backups SET state = 'done', claim = NULL, claimed_until = NULL, manifest = '{}'"
        await execute(tenancy, ending)

    kept = tenancy.backups._records
    assert await begin(due=None)
    monkeypatch.setattr(kept, "_refuse_recent", first_then(kept._refuse_recent, end))
    with pytest.raises(BackupUnderWayError):
        await begin(due=3_600.0)
    assert await execute(tenancy, "SELECT state FROM tenancy.backups") == [("done",)]


async def test_a_tenant_with_a_bad_backup_is_due(tenancy: Tenancy, backup: Backup) -> None:
    assert "acme" not in {one.slug for one in (await tenancy.backups.run_due()).done}
    await execute(tenancy, "UPDATE tenancy.backups SET verify_error = 'bad' WHERE tenant_id IS NOT NULL")
    assert [one.slug for one in (await tenancy.backups.run_due()).done] == ["acme"]


async def test_a_server_that_is_slow_is_not_taken_for_a_backup_that_is(
    tenancy: Tenancy, acme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads "raise backup.timeout" after a moment looks in the wrong place."""

    def slow(*_: Any, **__: Any) -> Any:
        raise TimeoutError("the server is slow")

    monkeypatch.setattr(tenancy.internals.provisioner.readers, "open", slow)
    reason = (await tenancy.backups.run([acme])).reasons[acme]
    assert reason == "timed out: the server is slow"
