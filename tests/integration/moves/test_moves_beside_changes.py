"""What else changes a tenant, or writes to it, in the moment in which it is moved."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text, update

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.control.models import operations, tenants
from tenancy_orm.errors import JobLostError, OperationError, ProvisioningError
from tenancy_orm.operations import Switch
from tenancy_orm.operations.switch import Paused
from tenancy_orm.provisioning.provisioner import services_of
from tests.support.moving import Pair

pytestmark = pytest.mark.new_installation


def in_the_pause(monkeypatch: pytest.MonkeyPatch, do: Callable[[Paused], Awaitable[None]]) -> None:
    """Do something once the old database is closed, before anything is copied in the pause."""
    original = Switch._close

    async def close(switch: Switch, paused: Paused, *arguments: object) -> None:
        await original(switch, paused, *arguments)  # type: ignore[arg-type]
        await do(paused)

    monkeypatch.setattr(Switch, "_close", close)


async def test_a_rotation_and_a_change_of_status_that_wait_for_a_move_go_on_on_the_new_server(
    plane: Tenancy, moving: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.tenants.create("acme")
    await plane.tenants.suspend("acme", reason="unpaid")
    tasks: list[asyncio.Task[object]] = []

    async def change(_: Paused) -> None:
        tasks.append(asyncio.create_task(plane.secrets.rotate_password("acme")))
        tasks.append(asyncio.create_task(plane.tenants.activate("acme")))
        await asyncio.sleep(0.5)  # until both wait for the lock
        assert not any(task.done() for task in tasks)

    in_the_pause(monkeypatch, change)
    await plane.moves.move("acme", to="two")
    await asyncio.gather(*tasks)
    async with Tenancy(moving) as other, other.session("acme") as session:
        assert await session.scalar(text("SELECT count(*) FROM notes")) == 0
    await plane.moves.confirm("acme")


async def test_a_purge_that_waits_for_a_move_leaves_nothing(
    plane: Tenancy, moving: TenancyConfig, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.tenants.create("acme")
    await plane.tenants.delete("acme")
    tasks: list[asyncio.Task[object]] = []

    async def purge(_: Paused) -> None:
        tasks.append(asyncio.create_task(plane.tenants.purge("acme")))
        await asyncio.sleep(0.5)

    in_the_pause(monkeypatch, purge)
    await plane.moves.move("acme", to="two")
    with pytest.raises(ProvisioningError, match="got another database while this waited; try again"):
        await asyncio.gather(*tasks)
    await plane.tenants.purge("acme")
    await plane.run_housekeeping()
    assert pair.databases(moving.name_prefix) == []
    assert pair.left(moving.name_prefix) == []


@pytest.mark.parametrize("offline", [False, True])
async def test_what_could_still_write_to_the_old_database_is_refused(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    database = acme.placement.database
    grants = [
        (f"GRANT CONNECT ON DATABASE {database} TO PUBLIC", "can connect to its database .* in the pause"),
        (
            "BEGIN; INSERT INTO notes (body) VALUES ('later'); PREPARE TRANSACTION 'later'",
            "prepared transactions later",
        ),
    ]
    for statement, error in grants:

        async def write(_: Paused, statement: str = statement) -> None:
            await asyncio.to_thread(pair.rows, acme, statement)

        with monkeypatch.context() as patch:
            in_the_pause(patch, write)
            with pytest.raises(OperationError, match=error):
                await plane.moves.move("acme", to="two", offline=offline)
        pair.rows(acme, f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
        assert pair.writable(acme) == ["one"]
    pair.rows(acme, "ROLLBACK PREPARED 'later'")

    async def lose(paused: Paused) -> None:
        # another process can change the tenant then, and open its database
        await asyncio.to_thread(pair.rows, acme, f"SELECT pg_terminate_backend({paused.connection.get_server_pid()})")

    with monkeypatch.context() as patch:
        in_the_pause(patch, lose)
        with pytest.raises(OperationError, match="has ended the session that kept tenant 'acme' closed"):
            await plane.moves.move("acme", to="two", offline=offline)
    assert pair.writable(acme) == ["one"]
    async with plane.session("acme") as session:
        assert await session.scalar(text("SELECT count(*) FROM notes")) == 0


async def test_a_login_that_takes_long_is_waited_for(plane: Tenancy, pair: Pair) -> None:
    """PostgreSQL has let it in before it was closed, and lists it among the sessions a while after that."""
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    place, services = acme.placement, services_of(plane.internals.provisioner)
    password = services.keyring.open_password(acme.id, place.sealed_password)
    connection = await plane.internals.provisioner.connect_admin("one")
    ended = threading.Event()

    def log_in() -> None:
        url = pair.one.url(place.database)
        try:
            with psycopg.connect(url, user=place.role, password=password) as late:
                late.execute("INSERT INTO notes (body) VALUES ('lost')")
        except psycopg.Error:
            ended.set()

    holder = psycopg.connect(pair.one.url("postgres"))
    try:
        holder.execute("LOCK TABLE pg_db_role_setting IN ACCESS EXCLUSIVE MODE")
        login = asyncio.create_task(asyncio.to_thread(log_in))
        stalled = "SELECT count(*) FROM pg_locks WHERE relation = 'pg_db_role_setting'::regclass AND NOT granted"
        count = 0
        while not count:
            count = await connection.fetchval(stalled)
            await asyncio.sleep(0.01)
        switch = Switch(services)
        closing = asyncio.create_task(switch._close(Paused(services, acme, connection), place, 0.2))
        await asyncio.sleep(0.5)
        assert not closing.done()
        holder.rollback()
        await closing
        await login
        assert ended.is_set() or pair.rows(acme, "SELECT count(*) FROM notes") == [(1,)]
    finally:
        holder.close()
        await connection.close()


async def test_a_migration_waits_for_a_move_by_a_dump_and_a_password_that_is_sealed_again_stays(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    keyring = services_of(plane.internals.provisioner).keyring
    sealed_again = keyring.seal_password(acme.id, keyring.open_password(acme.id, acme.placement.sealed_password))
    locked: list[object] = []

    async def look(_: Paused) -> None:
        async with plane.internals.control.transaction() as connection:
            await connection.execute(update(tenants).values(sealed_password=sealed_again))
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
        locked.append(pair.rows(acme, f"{locks} (SELECT oid FROM pg_database WHERE datname = current_database())"))

    in_the_pause(monkeypatch, look)
    await plane.moves.move("acme", to="two", offline=True)
    assert locked == [[(1,)]]
    # sealed under another key during the move, which may be the only one that remains
    assert (await plane.tenants.get("acme")).placement.sealed_password == sealed_again  # type: ignore[union-attr]


async def test_the_password_in_the_other_servers_catalogue_gives_no_rights_on_tables(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its login replicates one database; the owner, whose rights it had for the copy, has every tenant's."""
    acme = (await plane.tenants.create("acme")).tenant
    found = """
        SELECT rolreplication, EXISTS (SELECT FROM pg_auth_members WHERE member = r.oid),
               has_table_privilege(r.oid, 'notes', 'SELECT')
          FROM pg_roles r WHERE rolname ~ '_v_[0-9]+[fr]$'
    """
    rights: list[object] = []

    async def look(_: Paused) -> None:
        rights.append(pair.rows(acme, found))

    in_the_pause(monkeypatch, look)
    await plane.moves.move("acme", to="two")
    moved = await plane.tenants.get("acme")
    assert [*rights, pair.rows(moved, found)] == [[(True, False, False)]] * 2
    report = await plane.internals.provisioner.reconcile()
    assert (report.differences, report.errors) == ((), ())
    await plane.moves.rollback("acme")
    assert pair.left(plane.internals.provisioner.names.prefix) == []


async def test_a_move_that_another_process_has_taken_over_switches_nothing(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = (await plane.tenants.create("acme")).tenant

    async def take_over(_: Paused) -> None:
        async with plane.internals.control.transaction() as connection:
            await connection.execute(update(operations).values(claim=uuid4()))

    in_the_pause(monkeypatch, take_over)
    with pytest.raises(JobLostError):
        await plane.moves.move("acme", to="two")
    assert pair.writable(acme) == ["one"]
    assert (await plane.tenants.get("acme")).placement == acme.placement
