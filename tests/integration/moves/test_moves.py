"""Moves of tenants between two real servers, while they are written to."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.errors import OperationError
from tenancy_orm.operations import Switch
from tests.support.moving import Pair, Writer, rows, writing
from tests.support.replication import TestServer
from tests.support.waiting import until

pytestmark = pytest.mark.new_installation


async def go_on(writers: list[Writer]) -> None:
    """Wait until each writer has written some more."""
    reached = [len(writer.written) for writer in writers]
    await until(lambda: all(len(w.written) > r + 3 for w, r in zip(writers, reached, strict=True)), seconds=60.0)


async def test_a_tenant_moves_under_writes_and_back_and_nothing_is_lost(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    async with Tenancy(moving) as other, writing(acme, plane, other) as writers:
        await go_on(writers)
        operation = await plane.moves.move("acme", to="two")
        assert (operation.state, operation.step) == ("waiting", "switched")
        assert operation.detail["reverse"] == "following"
        await go_on(writers)
        moved = await plane.tenants.get("acme")
        assert pair.writable(moved) == ["two"]
        assert moved.placement is not None
        assert moved.placement.server == "two"
        operation = await plane.moves.rollback("acme")
        assert operation.state == "undone"
        await go_on(writers)
    assert [writer.errors for writer in writers] == [[]] * len(writers)
    back = await plane.tenants.get("acme")
    assert back.placement == acme.placement
    assert pair.writable(back) == ["one"]
    found = sorted(row[0] for row in pair.rows(back, "SELECT body FROM notes"))
    assert found == sorted(body for writer in writers for body in writer.written)
    assert pair.left(moving.name_prefix) == []
    assert back.placement is not None
    assert pair.databases(moving.name_prefix) == [f"one:{back.placement.database}"]


async def test_a_process_that_receives_nothing_and_threads_go_on_in_the_new_database(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    """PostgreSQL refuses the old database; sessions that were opened before the move are led to the new one."""
    acme = (await plane.tenants.create("acme")).tenant
    where = text("SELECT current_setting('port')")
    async with Tenancy(moving) as deaf:
        # it has no listener any more, and believes what it has cached
        await deaf.internals.directory._listener.close()
        moved, asked = threading.Event(), threading.Event()
        ports: list[str] = []

        def in_thread() -> None:
            with deaf.sync.session("acme") as session:
                ports.append(session.scalar(where))
                session.rollback()
                asked.set()
                assert moved.wait(120)
                ports.append(session.scalar(where))

        thread = asyncio.create_task(asyncio.to_thread(in_thread))
        async with deaf.session("acme") as held:
            assert await held.scalar(where) == str(pair.one.port)
            await held.rollback()
            await until(asked.is_set, seconds=60.0)
            await plane.moves.move("acme", to="two")
            moved.set()
            assert await held.scalar(where) == str(pair.two.port)
            await held.rollback()
            await thread
            assert ports == [str(pair.one.port), str(pair.two.port)]
            # a second one that was opened before, and a new one
            async with deaf.session("acme") as fresh:
                assert await fresh.scalar(where) == str(pair.two.port)
    await plane.tenants.delete("acme")
    # the former database, which follows, is purged with the other one
    await plane.tenants.purge("acme")
    await plane.run_housekeeping()
    assert pair.databases(moving.name_prefix) == []
    assert pair.left(moving.name_prefix) == []
    assert acme.placement is not None
    assert pair.writable(acme) == []


async def test_connections_are_counted_on_the_server_that_they_lead_to(
    plane: Tenancy, moving: TenancyConfig, pair: Pair
) -> None:
    """Those of statements and sessions that had the former server's engine: neither server's slots get lost."""
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    role, where = acme.placement.role, "SELECT current_setting('port')"
    ports = [str(pair.one.port), str(pair.two.port)]
    async with Tenancy(moving) as deaf, AsyncExitStack() as stack:
        # it has no listener any more, and believes what it has cached
        await deaf.internals.directory._listener.close()
        assert await deaf.fetch_value(where, tenant="acme") == ports[0]
        moved, ready = threading.Event(), threading.Event()
        stopped, found = False, list[str]()

        async def read() -> None:
            while not stopped:
                found.append(await plane.fetch_value(where, tenant="acme"))

        def detach_in_thread() -> str:
            with deaf.sync.session("acme") as session:
                ready.set()
                assert moved.wait(120)
                session.connection().detach()
                port: str = session.scalar(text(where))
                return port

        thread = asyncio.create_task(asyncio.to_thread(detach_in_thread))
        detached = await stack.enter_async_context(deaf.session("acme"))
        readers = [asyncio.create_task(read()) for _ in range(3)]
        await until(lambda: ready.is_set() and len(found) > 30)
        await plane.moves.move("acme", to="two")
        await until(lambda: found[-1] == ports[1])
        stopped = True
        await asyncio.gather(*readers)
        assert await deaf.fetch_value(where, tenant="acme") == ports[1]
        # of a detached connection, SQLAlchemy asks the pool that it first asked
        connection = await detached.connection()
        (await connection.get_raw_connection()).detach()
        assert await detached.scalar(text(where)) == ports[1]
        moved.set()
        assert await thread == ports[1]
        await stack.aclose()

        def are_right() -> bool:
            for name in ("one", "two"):
                for one in (plane, deaf):
                    used = one.internals.router.statistics().servers[name]
                    tag = one.internals.leases.lease(name).tag
                    if (used.open, used.in_use) != (open_at(pair.on(name), role, tag), 0):
                        return False
            return True

        await until(are_right, seconds=20.0)
    await plane.moves.confirm("acme")
    assert pair.left(moving.name_prefix) == []


def open_at(server: TestServer, role: str, tag: str) -> int:
    """How many connections of a tenant's role a server has from one process."""
    query = f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{role}' AND application_name = 'tenancy/{tag}'"
    [(number,)] = rows(server, "postgres", query)
    return int(number)


async def test_a_change_of_the_schema_during_a_move_is_noticed_and_a_migration_waits(
    plane: Tenancy, moving: TenancyConfig, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = (await plane.tenants.create("acme")).tenant
    assert acme.placement is not None
    owner = plane.internals.provisioner.names.owner
    original = Switch._close
    locked: list[bool] = []

    async def change(switch: Switch, *arguments: object) -> None:
        # by hand, at the worst moment: the schema has been copied, and nobody has looked at it since
        await original(switch, *arguments)  # type: ignore[arg-type]
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
        locked.append(
            pair.rows(acme, f"{locks} (SELECT oid FROM pg_database WHERE datname = current_database())") != [(0,)]
        )
        pair.rows(acme, f'SET ROLE "{owner}"; ALTER TABLE notes ADD COLUMN more text; SELECT 1')

    monkeypatch.setattr(Switch, "_close", change)
    with pytest.raises(OperationError, match=r"was changed during its move: .*column more.*; move it again"):
        await plane.moves.move("acme", to="two")
    assert locked == [True]  # what a migration waits for
    async with plane.session("acme") as session:
        assert await session.scalar(text("SELECT count(more) FROM notes")) == 0
    assert pair.writable(acme) == ["one"]
    assert pair.left(moving.name_prefix) == []
    monkeypatch.undo()
    await plane.moves.move("acme", to="two")
    # the old database cannot follow a schema that was changed since
    moved = await plane.tenants.get("acme")
    pair.rows(moved, f'SET ROLE "{owner}"; ALTER TABLE notes ADD COLUMN even_more text; SELECT 1')
    with pytest.raises(OperationError, match=r"was changed since its move: .*even_more.*; confirm that"):
        await plane.moves.rollback("acme")
    assert pair.writable(moved) == ["two"]
    assert (await plane.moves.confirm("acme")).state == "done"
    assert pair.left(moving.name_prefix) == []
