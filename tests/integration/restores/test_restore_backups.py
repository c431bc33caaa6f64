"""Restores of backups: what the signed manifest says is checked, and a purged tenant is never restored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tenancy_orm.config import BackupConfig, TenancyConfig
from tenancy_orm.errors import (
    BackupDamagedError,
    BackupError,
    ContentsRefusedError,
    OperationError,
    TenantNotFoundError,
)
from tenancy_orm.protocols import GrantHook
from tenancy_orm.provisioning.copies import restoring
from tenancy_orm.restores import BackupSource, DumpSource, making
from tenancy_orm.restores.manager import READ_ONLY
from tests.integration.restores.test_restores import add, databases, notes
from tests.support.dumps import dump
from tests.support.fleet import Fleet, fleet_config, open_fleet
from tests.support.own_objects import MAKE, NAMES, OWNERS, sandbox, watched_sandbox
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.projects import Project
from tests.support.provisioning import plain_administrator


@pytest.fixture
def config(postgres: Postgres, name_prefix: str, control_url: str, project: Project, tmp_path: Path) -> TenancyConfig:
    made = fleet_config(postgres, control_url, name_prefix, project)
    return made.replace(backup=BackupConfig(store=f"file:{tmp_path / 'store'}"))


async def test_a_backup_is_restored_and_never_after_a_purge(fleet: Fleet, tmp_path: Path) -> None:
    """Not into the tenant, not as another one, and not where the control database has lost its tombstone."""
    tenancy, restores = fleet.tenancy, fleet.tenancy.restores
    (backup,) = (await tenancy.backups.run(["acme"])).done
    await add(fleet, "acme", "after the backup")
    source = BackupSource(tenancy.backups, backup)
    with pytest.raises(OperationError, match="another tenant"):
        await restores.restore("globex", source)
    assert (await restores.restore("acme", source)).revision == "0001"
    assert await notes(fleet, "acme") == 100

    acme = await fleet.registry.find("acme")
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.purge("acme")
    assert (await restores.tidy()).errors == ()
    left = await databases(fleet)
    for attempt, error in enumerate((TenantNotFoundError, OperationError)):
        with pytest.raises(error):
            await restores.restore(acme.id, source)
        with pytest.raises(error):
            await restores.restore_as("acme-copy", source)
        if attempt == 0:
            # as an older backup of the control database has it
            alive = "status = 'active', sealed_password = 'x', purge_started_at = NULL, deleted_at = NULL"
            async with fleet.services.control.transaction() as connection:
                await connection.execute(sa.text("ALTER TABLE tenancy.tenants DISABLE TRIGGER USER"))
                await connection.execute(sa.text(f"UPDATE tenancy.tenants SET {alive} WHERE id = '{acme.id}'"))
                await connection.execute(sa.text("ALTER TABLE tenancy.tenants ENABLE TRIGGER USER"))
            assert (await fleet.registry.find("acme")).status.value == "active"
    assert await databases(fleet) == left


async def test_no_copy_is_made_of_a_tenant_that_is_purged_meanwhile(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody was told that it is erased."""
    tenancy, restores = fleet.tenancy, fleet.tenancy.restores
    (backup,) = (await tenancy.backups.run(["acme"])).done
    original = restoring.restore_archive

    async def slow(*args: Any, **options: Any) -> Any:
        done = await original(*args, **options)
        await tenancy.tenants.delete("acme")
        await tenancy.tenants.purge("acme")
        return done

    monkeypatch.setattr(making, "restore_archive", slow)
    with pytest.raises(TenantNotFoundError, match="acme"):
        await restores.restore_as("acme-copy", BackupSource(tenancy.backups, backup))
    globex = (await fleet.registry.find("globex")).placement
    assert globex is not None and await databases(fleet) == {globex.database}


async def test_a_purged_tenant_has_a_tombstone_whatever_is_left_of_its_backups(fleet: Fleet, tmp_path: Path) -> None:
    """Base backups of its server may bring it back for longer, if an older control database says that it is alive."""
    tenancy = fleet.tenancy
    (backup,) = (await tenancy.backups.run(["acme"])).done
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.purge("acme")
    assert backup.tenant_id is not None
    await tenancy.backups.keys.destroy(backup.tenant_id)
    assert [one.id for one in (await tenancy.backups.prune()).pruned] == [backup.id]
    assert (await tenancy.restores.tidy()).errors == ()
    assert [path.stem for path in (tmp_path / "store").rglob("tombstones/*.json")] == [str(backup.tenant_id)]


async def test_a_tombstone_counts_if_it_is_signed(fleet: Fleet, tmp_path: Path) -> None:
    """One that somebody has put there, and a damaged one, are named: neither passes, nor says that it was purged."""
    tenancy = fleet.tenancy
    (backup, other) = (await tenancy.backups.run(["acme", "globex"])).done
    source = BackupSource(tenancy.backups, backup if backup.slug == "acme" else other)
    acme, globex = await fleet.registry.find("acme"), await fleet.registry.find("globex")
    tombstones = tmp_path / "store" / str(tenancy.internals.control.installation) / "tombstones"
    await tenancy.tenants.delete("globex")
    await tenancy.tenants.purge("globex")
    assert (await tenancy.restores.tidy()).errors == ()
    signed = (tombstones / f"{globex.id}.json").read_bytes()
    forged = {
        "not signed": json.dumps({"tenant_id": str(acme.id), "purged_at": "2026-11-29T22:14:03+00:00"}).encode(),
        "malformed": b"{",
        "empty": b"",
        "a list": b"[]",
        "another tenant's": signed,
        "changed": signed.replace(str(globex.id).encode(), str(acme.id).encode()),
    }
    path = tombstones / f"{acme.id}.json"
    before = await databases(fleet)
    for name, data in forged.items():
        path.write_bytes(data)
        with pytest.raises(BackupDamagedError, match="is not a tombstone that this installation has signed") as caught:
            await tenancy.restores.restore("acme", source)
        assert str(acme.id) in str(caught.value) and "delete the object" in str(caught.value), name
    path.unlink()
    assert await databases(fleet) == before
    assert (await tenancy.restores.restore("acme", source)).state == "done"
    # what an earlier version has written is signed by the next housekeeping, in each process once
    (tombstones / f"{globex.id}.json").write_bytes(forged["not signed"])
    async with opened(tenancy.config) as later:
        assert (await later.restores.tidy()).errors == ()
    assert (tombstones / f"{globex.id}.json").read_bytes() == signed


async def test_another_tenant_is_made_where_the_first_ones_database_is_lost(fleet: Fleet, postgres: Postgres) -> None:
    """As when its server is gone: the signed manifest names the extensions."""
    (backup,) = (await fleet.tenancy.backups.run(["acme"])).done
    acme = await fleet.registry.find("acme")
    assert acme.placement is not None
    await postgres.drop_database(acme.placement.database)
    report = await fleet.tenancy.restores.restore_as("acme-2", BackupSource(fleet.tenancy.backups, backup))
    assert (report.slug, await notes(fleet, "acme-2")) == ("acme-2", 100)


async def test_a_backup_that_was_changed_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    """A flipped byte, before anything is made; and rows that are not those that were counted, after it."""
    tenancy, restores = fleet.tenancy, fleet.tenancy.restores
    (backup,) = (await tenancy.backups.run(["acme"])).done
    before = await databases(fleet)
    path = tmp_path / "store" / backup.archive_path
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(bytes(contents))
    with pytest.raises(BackupError):
        await restores.restore("acme", BackupSource(tenancy.backups, backup))
    assert await databases(fleet) == before
    assert await notes(fleet, "acme") == 100


def with_hook(config: TenancyConfig, hook: GrantHook) -> TenancyConfig:
    """A configuration with a grant hook."""
    return config.replace(provisioning=config.provisioning.model_copy(update={"grants": hook}))


async def make_own(fleet: Fleet, slug: str = "acme") -> None:
    """Let the tenant's role make objects of its own."""
    async with fleet.tenancy.session(slug) as session:
        for statement in MAKE:
            await session.execute(sa.text(statement))
        await session.commit()


async def test_what_a_tenant_has_made_itself_is_its_own_again(config: TenancyConfig) -> None:
    """Its code runs with its own rights, so that no revision needs to make it; at no moment is it the owner's."""
    async with open_fleet(with_hook(config, watched_sandbox), initialise=True) as fleet:
        await fleet.create("acme")
        await make_own(fleet)
        (backup,) = (await fleet.tenancy.backups.run(["acme"])).done
        await fleet.tenancy.restores.restore("acme", BackupSource(fleet.tenancy.backups, backup))
        place = (await fleet.registry.find("acme")).placement
        assert place is not None
        assert sorted(await fleet.fetch("acme", OWNERS)) == [(name, place.role) for name in NAMES]
        async with fleet.tenancy.session("acme") as session:
            await session.execute(sa.text("ALTER TABLE sandbox.drafts ADD COLUMN more int"))
        assert (await fleet.provisioner.reconcile()).clean


async def test_what_a_tenant_has_made_elsewhere_never_runs_as_the_owner(config: TenancyConfig) -> None:
    """Where no hook lets its role make objects, they would be the owner's: that is accepted for no such code."""
    async with open_fleet(config, initialise=True) as fleet:
        await fleet.create("acme")
        restores, backups = fleet.tenancy.restores, fleet.tenancy.backups
        place = (await fleet.registry.find("acme")).placement
        assert place is not None
        async with fleet.connect("acme") as connection:
            await connection.execute(f'GRANT CREATE ON SCHEMA public TO "{place.role}"')
            await connection.execute(
                f"SET ROLE \"{place.role}\"; CREATE FUNCTION public.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'"
            )
        (backup,) = (await backups.run(["acme"])).done
        await fleet.execute("acme", "ALTER FUNCTION public.mine() SECURITY DEFINER")
        (definer,) = (await backups.run(["acme"])).done
        for accept in (False, True):
            with pytest.raises(ContentsRefusedError, match=r"the tenant's role has made that") as refused:
                await restores.restore("acme", BackupSource(backups, definer), accept=accept)
            assert (refused.value.findings, refused.value.may_accept) == (("function public.mine()",), False)
        source = BackupSource(backups, backup)
        with pytest.raises(ContentsRefusedError, match=r"function public\.mine.*--accept-differences"):
            await restores.restore("acme", source)
        # ... it runs with the rights of who calls it
        await restores.restore("acme", source, accept=True)
        owner = "SELECT pg_get_userbyid(proowner)::text, prosecdef FROM pg_proc WHERE proname = 'mine'"
        assert await fleet.fetch("acme", owner) == [(fleet.services.names.owner, False)]


async def test_code_that_nobody_says_the_owner_of_is_not_accepted_where_the_tenants_role_makes_its_own(
    config: TenancyConfig, tmp_path: Path
) -> None:
    """A dump does not vouch for owners: its tenant's code would run with the rights of the owner of all databases."""
    async with open_fleet(with_hook(config, sandbox), initialise=True) as fleet:
        await fleet.create("acme")
        restores, before = fleet.tenancy.restores, await databases(fleet)
        await make_own(fleet)
        source = DumpSource(await dump(fleet, "acme", tmp_path / "dump"))
        for accept in (False, True):
            with pytest.raises(ContentsRefusedError, match="restore a backup, which says who owned what") as refused:
                await restores.restore("acme", source, accept=accept)
            assert not refused.value.may_accept
            assert set(refused.value.findings) == {
                "function sandbox.shout(text)",
                "index loud on table sandbox.drafts",
                "view sandbox.shouted",
            }
        assert await databases(fleet) == before
        # what runs with the rights of who calls it may be accepted
        await fleet.execute("acme", "DROP FUNCTION sandbox.shout CASCADE")
        source = DumpSource(await dump(fleet, "acme", tmp_path / "other"))
        with pytest.raises(ContentsRefusedError, match=r"function sandbox\.fire\(\).*--accept-differences"):
            await restores.restore("acme", source)
        await restores.restore("acme", source, accept=True)


async def test_an_administrator_who_is_no_superuser_restores_too(
    postgres: Postgres, config: TenancyConfig, empty_url: str
) -> None:
    """As on a managed server; large objects, what the tenant has made itself, an undo and a purge included."""
    async with plain_administrator(postgres) as url:
        provisioning = {"revoke_public": False, "grants": watched_sandbox}
        own = config.replace(control_url=empty_url, servers={"default": url}, provisioning=provisioning)
        async with open_fleet(own, initialise=True) as fleet:
            await restore_and_purge(fleet)


async def restore_and_purge(fleet: Fleet) -> None:
    await fleet.create("acme")
    async with fleet.tenancy.session("acme") as session:
        await session.execute(sa.text("SELECT lo_from_bytea(4711, 'a large object')"))
        await session.commit()
    await make_own(fleet)
    (backup,) = (await fleet.tenancy.backups.run(["acme"])).done
    await add(fleet, "acme", "later")
    restores, source = fleet.tenancy.restores, BackupSource(fleet.tenancy.backups, backup)
    waiting = await restores.restore("acme", source, inspect=True)
    async with restores.look(waiting.operation or 0) as reader:
        connection = await reader.connect(timeout=10, settings=READ_ONLY)
        assert await connection.fetchval("SELECT count(*) FROM notes") == 0
        await connection.close()
    await restores.resume(waiting.operation or 0)
    assert await notes(fleet, "acme") == 0
    place = (await fleet.registry.find("acme")).placement
    assert place is not None
    assert sorted(await fleet.fetch("acme", OWNERS)) == [(name, place.role) for name in NAMES]
    async with fleet.tenancy.session("acme") as session:
        assert (await session.execute(sa.text("SELECT lo_get(4711)"))).scalar_one() == b"a large object"
        await session.execute(sa.text("SELECT lo_unlink(4711)"))
    await restores.undo("acme")
    assert await notes(fleet, "acme") == 1
    assert (await restores.restore_as("acme-copy", source)).slug == "acme-copy"
    assert (await fleet.provisioner.reconcile()).errors == ()
    for slug in ("acme", "acme-copy"):
        await fleet.tenancy.tenants.delete(slug)
        await fleet.tenancy.tenants.purge(slug)
    assert await databases(fleet) == set()
