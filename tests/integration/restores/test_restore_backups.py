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
from tenancy_orm.protocols import GrantTarget
from tenancy_orm.provisioning import restoring
from tenancy_orm.restores import BackupSource, making
from tenancy_orm.restores.manager import READ_ONLY
from tests.integration.restores.test_restores import add, databases, notes
from tests.support.fleet import Fleet, fleet_config, open_fleet
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
    assert (await restores.settle()).errors == ()
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
    assert (await tenancy.restores.settle()).errors == ()
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
    assert (await tenancy.restores.settle()).errors == ()
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
        with pytest.raises(BackupDamagedError, match="is no tombstone that this installation has signed") as caught:
            await tenancy.restores.restore("acme", source)
        assert str(acme.id) in str(caught.value) and "delete the object" in str(caught.value), name
    path.unlink()
    assert await databases(fleet) == before
    assert (await tenancy.restores.restore("acme", source)).state == "done"
    # what an earlier version has written is signed by the next housekeeping, in each process once
    (tombstones / f"{globex.id}.json").write_bytes(forged["not signed"])
    async with opened(tenancy.config) as later:
        assert (await later.restores.settle()).errors == ()
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


def sandbox(target: GrantTarget) -> list[str]:
    """Let the tenant's role make objects in a schema of its own use."""
    return [
        f"CREATE SCHEMA IF NOT EXISTS sandbox AUTHORIZATION {target.owner}",
        f"GRANT USAGE, CREATE ON SCHEMA sandbox TO {target.role}",
    ]


async def test_what_a_tenant_has_made_itself_is_its_own_again(config: TenancyConfig) -> None:
    """Its code runs with its own rights, so that no revision needs to make it; elsewhere it would be the owner's."""
    provisioning = config.provisioning.model_copy(update={"grants": sandbox})
    async with open_fleet(config.replace(provisioning=provisioning), initialise=True) as fleet:
        await fleet.create("acme")
        async with fleet.tenancy.session("acme") as session:
            for statement in (
                "CREATE TABLE sandbox.drafts (id int GENERATED ALWAYS AS IDENTITY, body text)",
                "INSERT INTO sandbox.drafts (body) VALUES ('one')",
                "CREATE FUNCTION sandbox.shout(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT upper($1)'",
                "CREATE INDEX loud ON sandbox.drafts (sandbox.shout(body))",
            ):
                await session.execute(sa.text(statement))
            await session.commit()
        (backup,) = (await fleet.tenancy.backups.run(["acme"])).done
        source = BackupSource(fleet.tenancy.backups, backup)
        await fleet.tenancy.restores.restore("acme", source)
        owners = (
            "SELECT relname::text, pg_get_userbyid(relowner)::text FROM pg_class WHERE relname IN ('drafts', 'loud') "
            "UNION ALL SELECT proname::text, pg_get_userbyid(proowner)::text FROM pg_proc WHERE proname = 'shout'"
        )
        place = (await fleet.registry.find("acme")).placement
        assert place is not None
        assert set(await fleet.fetch("acme", owners)) == {(name, place.role) for name in ("drafts", "loud", "shout")}
        async with fleet.tenancy.session("acme") as session:
            await session.execute(sa.text("ALTER TABLE sandbox.drafts ADD COLUMN more int"))
        assert (await fleet.provisioner.reconcile()).clean

        # ... without the schema that the hook opens, the function would be the owner's
        async with fleet.connect("acme") as connection:
            await connection.execute(f'GRANT CREATE ON SCHEMA public TO "{place.role}"')
            await connection.execute(
                f"SET ROLE \"{place.role}\"; CREATE FUNCTION public.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'"
            )
        (backup,) = (await fleet.tenancy.backups.run(["acme"])).done
        with pytest.raises(ContentsRefusedError, match=r"function public\.mine"):
            await fleet.tenancy.restores.restore("acme", BackupSource(fleet.tenancy.backups, backup))


async def test_an_administrator_who_is_no_superuser_restores_too(
    postgres: Postgres, config: TenancyConfig, empty_url: str
) -> None:
    """As on a managed server; large objects, an undo and a purge included."""
    async with plain_administrator(postgres) as url:
        own = config.replace(control_url=empty_url, servers={"default": url}, provisioning={"revoke_public": False})
        async with open_fleet(own, initialise=True) as fleet:
            await restore_and_purge(fleet)


async def restore_and_purge(fleet: Fleet) -> None:
    await fleet.create("acme")
    async with fleet.tenancy.session("acme") as session:
        await session.execute(sa.text("SELECT lo_from_bytea(4711, 'a large object')"))
        await session.commit()
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
