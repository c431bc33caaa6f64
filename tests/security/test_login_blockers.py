"""A tenant's role that keeps others from connecting to a database, by queueing for a lock on it that it may not have.

PostgreSQL asks for the right to drop a database only once it has the lock. So ``DROP DATABASE`` waits behind whatever
lock the same role holds on that database in another session, and everybody who connects there waits behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from tenancy_orm.events import SessionTerminated
from tenancy_orm.migrations.connections import Connections, Health
from tenancy_orm.migrations.services import FleetServices
from tenancy_orm.postgres.failures import SERVER_FAILURES
from tenancy_orm.postgres.quoting import quote_identifier
from tenancy_orm.tenant import Status
from tests.support.arena import Arena, hostile, open_arena
from tests.support.postgres import Postgres
from tests.support.provisioning import VERSIONS, Workshops, open_workshops, placement, running_server
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def server(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Postgres]:
    """A server of each version, of this module's own."""
    with running_server(request.param, f"{postgres.worker}-blockers") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workshops(server: Postgres) -> AsyncIterator[Workshops]:
    """The workshops of that server."""
    async with open_workshops(server) as opened:
        yield opened


@pytest_asyncio.fixture(params=["superuser", "plain"], loop_scope="module")
async def arena(request: pytest.FixtureRequest, workshops: Workshops) -> AsyncIterator[Arena]:
    """Two tenants, with either kind of administrator."""
    async with open_arena(workshops, request.param) as opened:
        yield opened


@asynccontextmanager
async def blocked(arena: Arena, database: str) -> AsyncIterator[None]:
    """Nobody can connect to a database, which is seen first; at the end, whoever kept it blocked has been ended."""
    quoted = quote_identifier(database)
    await arena.attack("BEGIN", f"ALTER ROLE CURRENT_USER IN DATABASE {quoted} SET work_mem = '1MB'")
    second = await arena.attack()
    dropping = asyncio.create_task(second.execute(f"DROP DATABASE {quoted}"))
    try:
        async with arena.server.connect("template1") as connection:
            waiting = "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
            await until(lambda: connection.fetchval(waiting))
        with pytest.raises(TimeoutError):
            await asyncpg.connect(arena.server.url(database), timeout=0.5)
        yield
        with pytest.raises(SERVER_FAILURES):
            await dropping
    finally:
        dropping.cancel()
        await asyncio.gather(dropping, return_exceptions=True)


async def maintenance(arena: Arena) -> str:
    """The database of the administrator's URL."""
    async with arena.workshop.admin() as connection:
        return str(await connection.fetchval("SELECT current_database()"))


# --- who connects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["maintenance", "own", "other"])
async def test_a_tenant_does_not_lock_the_administrator_out(arena: Arena, database: str) -> None:
    """A DROP DATABASE that it may not do queues for a lock ahead of everybody who wants to connect."""
    own, other = (placement(tenant).database for tenant in (arena.attacker, arena.victim))
    name = {"maintenance": await maintenance(arena), "own": own, "other": other}[database]
    async with blocked(arena, name):
        connected = await arena.workshop.blockers().connect(name)
        await connected.close()
    # nor does it again: what the DROP DATABASE waited for is ended as well, unless it was in its own database
    assert await arena.connections(arena.attacker) == (1 if database == "own" else 0)
    await arena.purge(arena.attacker)


async def test_a_fresh_process_prepares_a_server_although_its_maintenance_database_is_blocked(arena: Arena) -> None:
    """Its first creation looks there before anything else."""
    fresh = arena.workshop.provisioner_of()
    async with blocked(arena, await maintenance(arena)):
        await fresh.create(arena.workshop.draft("fresh"), key=None)
    assert (await arena.workshop.slugs())["fresh"] == "active"


async def test_a_tenant_does_not_block_the_migration_of_others(arena: Arena) -> None:
    """Migrations log in to each tenant's database as its owner."""
    workshop = arena.workshop
    services = FleetServices(
        config=workshop.config,
        control=workshop.control,
        keyring=workshop.keyring,
        registry=workshop.registry,
        servers=workshop.servers,
        names=workshop.names,
        provisioner=workshop.provisioner,
        schema=workshop.schema,
        events=workshop.events,
    )
    database = placement(arena.victim).database
    async with blocked(arena, database):
        connection = await Connections(services).connect("default", database, Health())
        assert await connection.fetchval("SELECT current_user::text") == workshop.names.owner
        await connection.close()


async def test_a_tenant_does_not_block_the_creation_of_others(arena: Arena) -> None:
    """It looks for new databases all the time, and blocks each one as soon as it sees it."""
    stop, blocks = asyncio.Event(), 0

    async def new_databases(known: set[str]) -> list[str]:
        async with hostile(arena.workshop, arena.attacker) as spy:
            while not stop.is_set():
                names = {row[0] for row in await spy.fetch("SELECT datname FROM pg_database WHERE NOT datistemplate")}
                if names - known:
                    return list(names - known)
        return []

    async def block(name: str) -> None:
        nonlocal blocks
        quoted = quote_identifier(name)
        async with hostile(arena.workshop, arena.attacker) as first, hostile(arena.workshop, arena.attacker) as second:
            await first.execute(f"BEGIN; ALTER ROLE CURRENT_USER IN DATABASE {quoted} SET work_mem = '1MB'")
            blocks += 1
            await second.execute(f"DROP DATABASE {quoted}")

    async def attack(known: set[str]) -> None:
        while not stop.is_set():
            with contextlib.suppress(*SERVER_FAILURES):
                for name in await new_databases(known):
                    await block(name)
            await asyncio.sleep(0)

    async with arena.server.connect() as connection:
        known = {row[0] for row in await connection.fetch("SELECT datname FROM pg_database")}
    attacking = asyncio.create_task(attack(known))
    try:
        await until(lambda: _connected(arena))
        assert (await arena.workshop.create("newcomer")).status is Status.ACTIVE
        await until(lambda: blocks > 0)
    finally:
        stop.set()
        attacking.cancel()
        await asyncio.gather(attacking, return_exceptions=True)


async def _connected(arena: Arena) -> bool:
    return await arena.connections(arena.attacker) > 0


async def test_the_administrator_opens_few_connections_to_find_a_way_in(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is only slow must not be given more to do at once; more are tried where three do not lead in."""
    server: Any = arena.workshop.servers["default"]
    connect_admin = server.connect_admin
    for hanging in (0, 3):
        tried: list[str | None] = []

        async def counted(
            database: str | None = None, *, tried: list[str | None] = tried, hanging: int = hanging, **options: Any
        ) -> Any:
            tried.append(database)
            # after the one that waits
            if 1 < len(tried) <= 1 + hanging:
                await asyncio.Event().wait()
            return await connect_admin(database, **options)

        name = await maintenance(arena)
        async with blocked(arena, name):
            with monkeypatch.context() as patch:
                patch.setattr(server, "connect_admin", counted)
                connected = await arena.workshop.blockers().connect(name)
                await connected.close()
        assert len(tried) == 1 + 3 if not hanging else len(tried) > 1 + 3


# --- the watchdog ---------------------------------------------------------------------------------------------------


async def test_the_watchdog_lets_a_tenants_own_connections_in_again(arena: Arena) -> None:
    """Whoever waits to drop another's database keeps that tenant out until the watchdog looks, which it tells."""
    told: list[SessionTerminated] = []
    arena.workshop.events.subscribe(SessionTerminated, told.append)
    async with blocked(arena, placement(arena.victim).database):
        report = await arena.workshop.provisioner.end_excessive_sessions()
        async with hostile(arena.workshop, arena.victim) as connection:
            assert await connection.fetchval("SELECT 1") == 1
    assert report.errors == ()
    # the one that waits, and the one that it waits for
    assert [(one.tenant_id, one.reason) for one in report.ended] == [(arena.attacker.id, "login_blocker")] * 2
    await arena.workshop.events.drain()
    assert [event.reason for event in told] == ["login_blocker", "login_blocker"]
    assert await arena.connections(arena.attacker) == 0


async def test_programs_that_notify_each_other_are_left_alone(arena: Arena) -> None:
    """A commit with NOTIFY waits for the commit of another; its lock is one on databases, but on none of them."""
    async with arena.server.connect() as superuser:
        try:
            await standby(superuser, "absent")
            first = await arena.attack("SET synchronous_commit = on")
            async with hostile(arena.workshop, arena.victim) as second:
                await second.execute("SET synchronous_commit = on")
                notify = "INSERT INTO notes (body) VALUES ('kept'); NOTIFY hello"
                commits = [asyncio.create_task(first.execute(notify))]
                await until(lambda: superuser.fetchval(_HELD, True))
                commits.append(asyncio.create_task(second.execute(notify)))
                await until(lambda: superuser.fetchval(_HELD, False))
                async with arena.workshop.admin() as connection:
                    assert await arena.workshop.blockers().end_login_blockers(connection) == []
                await standby(superuser, "")
                await asyncio.gather(*commits)
                assert await second.fetchval("SELECT count(*) FROM notes WHERE body = 'kept'") == 1
        finally:
            await standby(superuser, "")


_HELD = """
SELECT count(*) = 1 FROM pg_locks
WHERE locktype = 'object' AND classid = 'pg_database'::regclass AND objid = 0 AND granted = $1
"""


async def standby(superuser: Any, name: str) -> None:
    """Have commits wait for a standby that is not there, or for none."""
    await superuser.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    await superuser.execute("SELECT pg_reload_conf()")
    await until(lambda: superuser.fetchval("SELECT current_setting('synchronous_standby_names') = $1", name))
