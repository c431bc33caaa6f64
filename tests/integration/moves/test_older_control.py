"""A control database that is restored from before a switch between servers, or from the middle of a move."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig, Tenant
from tenancy_orm.errors import ProvisioningError
from tenancy_orm.moves import way_back
from tenancy_orm.moves.record import MoveRecord
from tenancy_orm.moves.survey import Survey
from tests.support.dumps import restored_copy
from tests.support.moving import Pair
from tests.support.postgres import Postgres

pytestmark = pytest.mark.new_installation


@asynccontextmanager
async def back(plane: Tenancy, moving: TenancyConfig, url: str, postgres: Postgres) -> AsyncIterator[Tenancy]:
    """Go on with another control database, as after the loss of the present one."""
    await plane.close()
    again = Tenancy(moving.replace(control_url=url))
    await again.open(initialise=True)
    try:
        async with again.internals.control.transaction() as connection:
            await connection.execute(
                text("UPDATE tenancy.operations SET claimed_until = now() WHERE claim IS NOT NULL")
            )
        yield again
    finally:
        await again.close()
        await postgres.administer(f'DROP DATABASE "{postgres.database_of(url)}" WITH (FORCE)')


async def write(plane: Tenancy, body: str) -> None:
    async with plane.transaction("acme") as session:
        await session.execute(text("INSERT INTO notes (body) VALUES (:body)"), {"body": body})


async def bodies(plane: Tenancy) -> list[str]:
    async with plane.session("acme") as session:
        return list(await session.scalars(text("SELECT body FROM notes ORDER BY id")))


def marker(pair: Pair, tenant: Tenant) -> str:
    """The marker of a tenant's database."""
    return str(
        pair.rows(
            tenant, "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()"
        )[0][0]
    )


async def rebuild(plane: Tenancy, server: str) -> None:
    """Rebuild, by which the row of acme gets the database that it uses."""
    report = await plane.rebuilding.run()
    assert report.complete and [one.server for one in report.databases if one.state == "taken"] == [server]
    place = (await plane.tenants.get("acme")).placement
    assert place is not None and place.server == server
    assert await bodies(plane) == ["first", "second"]


async def test_a_tenant_that_was_moved_is_not_opened_where_it_was(
    plane: Tenancy, moving: TenancyConfig, pair: Pair, postgres: Postgres
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    await write(plane, "first")
    older = await restored_copy(postgres, moving.control_url)
    await plane.moves.move("acme", to="two")
    await write(plane, "second")
    async with back(plane, moving, older, postgres) as again:
        report = await again.internals.provisioner.reconcile()
        assert [one.kind for one in report.differences if one.kind.startswith("database.")] == ["database.replaced"]
        for attempt in (again.internals.provisioner.align(acme), again.moves.move("acme", to="two")):
            with pytest.raises(ProvisioningError, match="is not in use any more"):
                await attempt
        await again.moves.tidy()
        assert pair.writable(acme) == ["two"]
        await rebuild(again, "two")
        assert pair.writable(acme) == ["two"]
        # ... and it can be moved again
        await again.moves.move("acme", to="one")
        await again.moves.confirm("acme")
        assert await bodies(again) == ["first", "second"]
        assert pair.left(moving.name_prefix) == []


async def test_a_move_that_has_ended_since_is_not_undone(
    plane: Tenancy, moving: TenancyConfig, pair: Pair, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undo would close and drop the new database; the move waits to be confirmed once the row names that."""
    acme = (await plane.tenants.create("acme")).tenant
    await write(plane, "first")
    original, older = way_back.prepare, list[str]()

    async def remembered(move: MoveRecord, found: Survey) -> str:
        older.append(await restored_copy(postgres, moving.control_url))
        return await original(move, found)

    with monkeypatch.context() as patch:
        patch.setattr(way_back, "prepare", remembered)
        operation = await plane.moves.move("acme", to="two")
    await write(plane, "second")
    present = pair.databases(moving.name_prefix)
    async with back(plane, moving, older[0], postgres) as again:
        report = await again.moves.tidy()
        assert report.resumed == () and "is not in use any more" in report.errors[0]
        assert (pair.writable(acme), pair.databases(moving.name_prefix)) == (["two"], present)
        await rebuild(again, "two")
        async with again.internals.control.transaction() as connection:
            await connection.execute(
                text("UPDATE tenancy.operations SET claimed_until = now() WHERE claim IS NOT NULL")
            )
        report = await again.moves.tidy()
        assert (report.resumed, report.errors) == ((operation.id,), ())
        assert (await again.moves.confirm("acme")).state == "done"
        assert len(pair.databases(moving.name_prefix)) == 1 and pair.left(moving.name_prefix) == []
        assert await bodies(again) == ["first", "second"]


async def test_a_move_that_was_rolled_back_since_is_not_confirmed(
    plane: Tenancy, moving: TenancyConfig, pair: Pair, postgres: Postgres
) -> None:
    """It would drop the former database, which is in use again and is the only one."""
    acme = (await plane.tenants.create("acme")).tenant
    await write(plane, "first")
    plain = marker(pair, acme)
    await plane.moves.move("acme", to="two")
    moved = await plane.tenants.get("acme")
    assert moved.placement is not None
    assert marker(pair, moved) == plain
    assert marker(pair, acme) == f"{plain}:replaced:two/{moved.placement.database}"
    older = await restored_copy(postgres, moving.control_url)
    await plane.moves.rollback("acme")
    assert marker(pair, acme) == plain
    await write(plane, "second")
    async with back(plane, moving, older, postgres) as again:
        with pytest.raises(ProvisioningError, match="does not exist"):
            await again.moves.confirm("acme")
        await again.moves.tidy()
        assert pair.writable(acme) == ["one"]
        await rebuild(again, "one")
        assert pair.writable(acme) == ["one"]
