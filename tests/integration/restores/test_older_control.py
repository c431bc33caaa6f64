"""A control database that is restored from before a swap: its row names a database that another one has replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import OperationStateError, ProvisioningError, TenancyError
from tenancy_orm.provisioning.creation.new_databases import NewDatabases
from tenancy_orm.restores import DumpSource
from tenancy_orm.tenant import Placement, Status
from tests.integration.restores.test_restores import add, databases, notes
from tests.support.dumps import dump, restored_copy
from tests.support.fleet import Fleet, open_fleet
from tests.support.older_rows import turn_back
from tests.support.postgres import Postgres

# what is left on the server is compared as a whole
pytestmark = pytest.mark.new_installation

CONNECTS = """
SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1) AND datallowconn
   AND has_database_privilege($2::name, oid, 'CONNECT')
"""
MARKERS = """
SELECT datname::text AS name, shobj_description(oid, 'pg_database') AS marker FROM pg_database
 WHERE starts_with(datname::text, $1)
"""


@dataclass
class Swapper:
    """A tenant that is restored from a dump with 100 notes, and its control database, as it was at some time."""

    fleet: Fleet
    config: TenancyConfig
    postgres: Postgres
    archive: Path

    async def restore(self) -> str:
        """Restore it, and write to it; returns the database that it uses now."""
        report = await self.fleet.tenancy.restores.restore("acme", DumpSource(self.archive))
        await add(self.fleet, "acme", "after the restore")
        return report.database

    async def undo(self) -> str:
        """Undo that, and write to the first database again, which is returned."""
        report = await self.fleet.tenancy.restores.undo("acme")
        await add(self.fleet, "acme", "after the undo")
        return report.database

    async def remember(self) -> str:
        """The URL of the control database as it is now."""
        return await restored_copy(self.postgres, self.config.control_url)

    @asynccontextmanager
    async def back(self, url: str) -> AsyncIterator[Fleet]:
        """Go on with a control database that was remembered, as after the loss of the present one."""
        await self.fleet.tenancy.close()
        async with open_fleet(self.config.replace(control_url=url), initialise=True) as again:
            async with again.services.control.transaction() as connection:
                await connection.execute(sa.text("UPDATE tenancy.operations SET claimed_until = now()"))
            yield again
        await self.postgres.administer(f'DROP DATABASE "{self.postgres.database_of(url)}" WITH (FORCE)')


@pytest.fixture
async def swapper(fleet: Fleet, config: TenancyConfig, postgres: Postgres, tmp_path: Path) -> Swapper:
    return Swapper(fleet, config, postgres, await dump(fleet, "acme", tmp_path / "dump"))


async def writable(fleet: Fleet) -> list[str]:
    """The databases that the role of acme can connect to."""
    place = (await fleet.registry.find("acme")).placement
    assert place is not None
    connection = await fleet.provisioner.connect_admin("default")
    try:
        return [row[0] for row in await connection.fetch(CONNECTS, fleet.services.names.tenant_stem, place.role)]
    finally:
        await connection.close()


async def markers(fleet: Fleet) -> dict[str, str]:
    connection = await fleet.provisioner.connect_admin("default")
    try:
        return {row["name"]: row["marker"] for row in await connection.fetch(MARKERS, fleet.services.names.tenant_stem)}
    finally:
        await connection.close()


async def rebuild(fleet: Fleet, used: str, instead_of: str) -> None:
    """Rebuild, by which the row of acme gets the database that it uses."""
    looked = await fleet.tenancy.rebuilding.look()
    (found,) = [one for one in looked.databases if one.state == "found"]
    assert (found.database, found.slug, found.replaces) == (used, "acme", f"default/{instead_of}")
    report = await fleet.tenancy.rebuilding.run()
    assert report.complete and [one.database for one in report.databases if one.state == "taken"] == [used]
    place = (await fleet.registry.find("acme")).placement
    assert place is not None and place.database == used
    assert await writable(fleet) == [used]
    assert (await fleet.tenancy.rebuilding.look()).databases == ()
    assert (await fleet.provisioner.reconcile()).clean


async def test_what_was_replaced_is_opened_by_nothing_and_a_rebuild_finds_what_is_used(swapper: Swapper) -> None:
    first = swapper.fleet.database("acme")
    older = await swapper.remember()
    used = await swapper.restore()
    async with swapper.back(older) as fleet:
        tenancy = fleet.tenancy
        for check in (True, False):
            report = await fleet.provisioner.reconcile(check=check)
            (found,) = [one for one in report.differences if one.kind.startswith("database.")]
            assert (found.tenant, found.kind, found.mended, found.remedy) == ("acme", "database.replaced", False, "")
            assert used in found.detail and report.unknown == (used,)
            assert await writable(fleet) == [used]
        assert used in (await fleet.provisioner.reconcile(drop_unknown=True)).unknown
        with pytest.raises(TenancyError):
            await notes(fleet, "acme")

        tenant = await fleet.registry.find("acme")
        assert tenant.placement is not None and tenant.placement.database == first
        place = tenant.placement

        async def read() -> None:
            async with fleet.provisioner.readers.open(tenant, seconds=60):
                pass

        refused: list[Callable[[], Awaitable[object]]] = [
            lambda: tenancy.restores.restore("acme", DumpSource(swapper.archive)),
            lambda: tenancy.restores.undo("acme"),
            lambda: fleet.provisioner.align(tenant),
            lambda: fleet.provisioner.new_databases.set_connect(place, True),
            read,
        ]
        for attempt in refused:
            with pytest.raises(ProvisioningError, match="is not in use any more"):
                await attempt()
        assert await writable(fleet) == [used]

        await rebuild(fleet, used, first)
        assert await notes(fleet, "acme") == 101
        with pytest.raises(OperationStateError, match="no database that it has replaced is kept"):
            await tenancy.restores.undo("acme")
        # as after a restore
        assert (await tenancy.restores.tidy()).dropped == ()
        await expire(fleet)
        assert (await tenancy.restores.tidy()).dropped == (first,)
        assert await notes(fleet, "acme") == 101


async def expire(fleet: Fleet) -> None:
    """Let the time pass for which databases are kept."""
    async with fleet.services.control.transaction() as connection:
        await connection.execute(sa.text("UPDATE tenancy.tenant_databases SET kept_until = now()"))


async def test_a_rebuild_finds_what_is_used_once_what_it_has_replaced_is_dropped(swapper: Swapper) -> None:
    first = swapper.fleet.database("acme")
    older = await swapper.remember()
    used = await swapper.restore()
    await expire(swapper.fleet)
    assert (await swapper.fleet.tenancy.restores.tidy()).dropped == (first,)
    async with swapper.back(older) as fleet:
        report = await fleet.provisioner.reconcile()
        assert [one.kind for one in report.differences if one.kind.startswith("database.")] == ["database.missing"]
        await rebuild(fleet, used, first)
        assert await notes(fleet, "acme") == 101
        await expire(fleet)
        assert (await fleet.tenancy.restores.tidy()).errors == ()
        assert await fleet.registry.databases_of(swapper.fleet.tenants["acme"].id) == ()


@pytest.mark.parametrize("is_dropped", [False, True])
async def test_a_row_of_its_creation_takes_nothing_from_a_tenant_that_was_restored_since(
    swapper: Swapper, is_dropped: bool
) -> None:
    """Neither its role nor its database, also once the first one is gone; a rebuild has it name the one in use."""
    first = swapper.fleet.database("acme")
    older = await swapper.remember()
    used = await swapper.restore()
    if is_dropped:
        await expire(swapper.fleet)
        assert (await swapper.fleet.tenancy.restores.tidy()).dropped == (first,)
    async with swapper.back(older) as fleet:
        await turn_back(fleet.services.control, "acme", "grants")
        for check, drop_unknown in ((True, False), (False, False), (False, True)):
            report = await fleet.provisioner.reconcile(check=check, drop_unknown=drop_unknown)
            (error,) = report.errors
            assert "acme: the row of its creation is of an older backup, and nothing is removed" in error
            assert (report.removed, report.finished, report.unknown) == ((), (), (used,))
            assert await writable(fleet) == [used]
        await rebuild(fleet, used, first)
        assert (await fleet.registry.find("acme")).status is Status.ACTIVE
        assert await notes(fleet, "acme") == 101


async def test_what_an_undo_has_brought_back_is_not_dropped_as_kept(swapper: Swapper) -> None:
    """The older control database says that the restored one is in use, and for how long the first one is kept."""
    first = swapper.fleet.database("acme")
    restored = await swapper.restore()
    older = await swapper.remember()
    await swapper.undo()
    async with swapper.back(older) as fleet:
        await expire(fleet)
        report = await fleet.tenancy.restores.tidy()
        assert report.dropped == () and f"database {first}: database '{restored}' is not in use" in report.errors[0]
        await rebuild(fleet, first, restored)
        assert await notes(fleet, "acme") == 101


async def test_what_a_restore_has_made_is_not_dropped_with_its_operation(swapper: Swapper) -> None:
    """In the older control database it waits for its swap, and is discarded, resumed, or purged with the tenant."""
    first, restores = swapper.fleet.database("acme"), swapper.fleet.tenancy.restores
    waiting = await restores.restore("acme", DumpSource(swapper.archive), inspect=True)
    assert waiting.operation is not None
    older = await swapper.remember()
    await restores.resume(waiting.operation)
    await add(swapper.fleet, "acme", "after the restore")
    async with swapper.back(older) as fleet:
        for attempt in (fleet.tenancy.restores.discard, fleet.tenancy.restores.resume):
            with pytest.raises(ProvisioningError, match="is not in use any more"):
                await attempt(waiting.operation)
            assert await writable(fleet) == [waiting.database]
            async with fleet.services.control.transaction() as connection:
                await connection.execute(sa.text("UPDATE tenancy.operations SET claimed_until = now()"))
        assert f"operation {waiting.operation}" in (await fleet.tenancy.restores.tidy()).errors[0]
        await rebuild(fleet, waiting.database, first)
        assert (await fleet.tenancy.restores.tidy()).errors == ()
        assert await writable(fleet) == [waiting.database]
        assert await notes(fleet, "acme") == 101


async def test_a_tenant_is_not_purged_without_the_database_that_it_uses(swapper: Swapper) -> None:
    older = await swapper.remember()
    used = await swapper.restore()
    async with swapper.back(older) as fleet:
        await fleet.tenancy.tenants.delete("acme")
        with pytest.raises(ProvisioningError, match="is not in use any more"):
            await fleet.tenancy.tenants.purge("acme")
        assert {swapper.fleet.database("acme"), used} <= await databases(fleet)


async def test_a_restore_of_before_is_undone_although_no_marker_says_what_was_replaced(swapper: Swapper) -> None:
    first = swapper.fleet.database("acme")
    await swapper.restore()
    plain = f"tenancy:{swapper.fleet.services.control.installation}:{swapper.fleet.tenants['acme'].id}"
    assert (await markers(swapper.fleet))[first].startswith(f"{plain}:replaced:default/")
    await swapper.postgres.administer(f"COMMENT ON DATABASE \"{first}\" IS '{plain}'")
    assert await swapper.undo() == first
    assert (await markers(swapper.fleet))[first] == plain
    assert await notes(swapper.fleet, "acme") == 101


async def test_a_seal_that_fails_is_repeated_by_housekeeping(swapper: Swapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the tenant is served in the restored database, and its role cannot connect to the other one."""
    first, fleet = swapper.fleet.database("acme"), swapper.fleet
    original = NewDatabases.set_connect

    async def refused(self: NewDatabases, place: Placement, allowed: bool, *, mark: str | None = None) -> None:
        if not allowed:
            raise ProvisioningError(f"database {place.database!r} was not closed", step="connect")
        await original(self, place, allowed, mark=mark)

    with monkeypatch.context() as patch:
        patch.setattr(NewDatabases, "set_connect", refused)
        with pytest.raises(ProvisioningError, match="was not closed"):
            await fleet.tenancy.restores.restore("acme", DumpSource(swapper.archive))
    assert await notes(fleet, "acme") == 100
    assert await writable(fleet) != [first]
    async with fleet.services.control.transaction() as connection:
        await connection.execute(sa.text("UPDATE tenancy.operations SET claimed_until = now()"))
    assert len((await fleet.tenancy.restores.tidy()).ended) == 1
    assert ":replaced:" in (await markers(fleet))[first]
    assert (await fleet.provisioner.reconcile()).clean
