"""What else changes a tenant, or writes to it, in the moment in which it is moved."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text, update

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import MoveConfig, ServerAddresses
from tenancy_orm.control.models import operations, tenants
from tenancy_orm.errors import (
    ControlUnavailableError,
    JobLostError,
    OperationError,
    ProvisioningError,
    TenantNotFoundError,
)
from tenancy_orm.operations import Operation, Operations, Switch
from tenancy_orm.operations.switch import Paused
from tenancy_orm.provisioning.provisioner import services_of
from tenancy_orm.registry.registry import Registry
from tests.support.moving import Pair, moving_config
from tests.support.waiting import until

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


async def test_a_move_of_a_tenant_that_was_purged_as_it_began_has_failed(
    plane: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation is left that seems to run."""
    await plane.tenants.create("acme")
    await plane.tenants.delete("acme")
    original = Operations.begin

    async def begin(*arguments: Any, **options: Any) -> Operation:
        await plane.tenants.purge("acme")
        return await original(*arguments, **options)

    monkeypatch.setattr(Operations, "begin", begin)
    with pytest.raises(TenantNotFoundError):
        await plane.moves.move("acme", to="two")
    (operation,) = await plane.operations.list()
    assert (operation.state, operation.is_claimed) == ("failed", False)


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
        (f"GRANT CONNECT ON DATABASE {database} TO PUBLIC", "PUBLIC, .* can connect to its database .* in the pause"),
        (
            f"GRANT CONNECT ON DATABASE {database} TO pg_monitor",
            "pg_monitor can connect to its database .* in the pause",
        ),
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
        pair.rows(acme, f"REVOKE ALL ON DATABASE {database} FROM PUBLIC, pg_monitor")
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


async def test_an_administrator_who_sees_no_states_lets_transactions_end(
    pair: Pair, control_url: str, name_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pg_read_all_stats, PostgreSQL does not say which sessions have a transaction."""
    admin = f"{name_prefix}_blind"
    for server in (pair.one, pair.two):
        server.query(f"CREATE ROLE {admin} LOGIN CREATEDB CREATEROLE REPLICATION PASSWORD 'secret'")
        server.query(f"GRANT CONNECT ON DATABASE postgres TO {admin}")
        server.query(f"GRANT pg_signal_backend, pg_create_subscription TO {admin}")
    addresses = {
        name: ServerAddresses(admin=f"postgresql://{admin}:secret@127.0.0.1:{pair.on(name).port}/postgres")
        for name in ("one", "two")
    }
    patient = MoveConfig(drain_seconds=20.0)
    tenancy = Tenancy(moving_config(pair, control_url, name_prefix, servers=addresses, move=patient))
    await tenancy.open(initialise=True)
    try:
        acme = (await tenancy.tenants.create("acme")).tenant
        original = Switch._close
        begun = asyncio.Event()

        async def close(switch: Switch, *arguments: Any) -> None:
            begun.set()
            await original(switch, *arguments)

        monkeypatch.setattr(Switch, "_close", close)
        async with tenancy.session("acme") as session:
            # nothing is written yet: a slot is made once every transaction that writes has ended
            await session.execute(text("SELECT 1"))
            moving = asyncio.create_task(tenancy.moves.move("acme", to="two"))
            await begun.wait()
            await session.execute(text("INSERT INTO notes (body) VALUES ('slow')"))
            await until(lambda: pair.writable(acme) == [])
            # longer than sessions without a transaction are left to their processes
            await asyncio.sleep(1.0)
            await session.commit()
        operation = await moving
        assert operation.detail["ended_sessions"] == 0
        async with tenancy.session("acme") as session:
            assert await session.scalar(text("SELECT body FROM notes")) == "slow"
        await tenancy.moves.confirm("acme")
    finally:
        await tenancy.close()


SLOW_COMMIT = """
CREATE FUNCTION public.wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_catalog.pg_advisory_xact_lock(4711); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER wait_at_commit AFTER UPDATE ON tenancy.tenants DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (OLD.server <> NEW.server) EXECUTE FUNCTION public.wait_at_commit();
"""


async def test_a_switch_that_is_committed_after_its_answer_was_lost_is_finished(
    plane: Tenancy, pair: Pair, control_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control database goes on with a COMMIT; what undoes the move before that would open the wrong database."""
    acme = (await plane.tenants.create("acme")).tenant
    original = Registry.switch_database
    held = psycopg.connect(control_url, autocommit=True)

    def waiting(what: str) -> int:
        row = held.execute(
            "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted "
            "AND a.datname = current_database() AND l.locktype = %s",
            (what,),
        ).fetchone()
        assert row is not None
        return int(row[0])

    committing: list[asyncio.Task[object]] = []

    async def lose_the_answer(registry: Registry, *arguments: Any, **options: Any) -> None:
        committing.append(asyncio.create_task(original(registry, *arguments, **options)))
        await until(lambda: waiting("advisory"))
        raise ControlUnavailableError("the connection was lost")

    try:
        held.execute(SLOW_COMMIT.encode())
        held.execute("SELECT pg_advisory_lock(4711)")
        monkeypatch.setattr(Registry, "switch_database", lose_the_answer)
        moving = asyncio.create_task(plane.moves.move("acme", to="two"))
        # somebody asks for the tenant's row, which the transaction still has
        await until(lambda: waiting("transactionid"))
        assert pair.writable(acme) == []
        held.execute("SELECT pg_advisory_unlock(4711)")
        with pytest.raises(ControlUnavailableError):
            await moving
        await asyncio.gather(*committing)
    finally:
        held.close()
    async with plane.session("acme") as session:
        await session.execute(text("INSERT INTO notes (body) VALUES ('there')"))
        await session.commit()
    moved = await plane.tenants.get("acme")
    assert pair.writable(moved) == ["two"]
    async with plane.internals.control.transaction() as connection:
        await connection.execute(update(operations).values(claimed_until=text("now()")))
    assert (await plane.moves.tidy()).errors == ()
    await plane.moves.confirm("acme")
    assert pair.rows(moved, "SELECT body FROM notes") == [("there",)]
