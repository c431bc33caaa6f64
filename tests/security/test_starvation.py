"""A tenant that runs SQL of its own cannot stop its server for the others: it is refused, or ended at a bound.

Every attack is for real, on a server of this module's own, and is first seen to work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from tenancy_orm.audit.log import AuditLog
from tenancy_orm.config import TenancyConfig, WatchdogConfig
from tenancy_orm.errors import TenancyError
from tenancy_orm.events import SessionTerminated
from tenancy_orm.provisioning import WatchReport
from tenancy_orm.provisioning.server_objects import advisory_locks, databases
from tenancy_orm.provisioning.templates.records import TemplateRecords
from tenancy_orm.provisioning.watchdog import Session, excessive
from tests.support.postgres import ENDED, Postgres
from tests.support.provisioning import (
    VERSIONS,
    Workshop,
    placement,
    plain_workshop,
    running_server,
    superuser_workshop,
)
from tests.support.waiting import until

FULL = "53200"
REFUSED = "42501"
# as small as can be, so that it is full soon
SMALL = {"max_locks_per_transaction": "10", "max_connections": "40", "max_prepared_transactions": "5"}
NOTIFY_PAGES = {"max_notify_queue_pages": "64"}
TAKE_ALL = "SELECT count(pg_try_advisory_lock(n)) FROM generate_series(1, 1000000) AS n"

# what is free is taken within microseconds
TAKE_FOR_EVER = """
DO $$ DECLARE n bigint := 0; BEGIN LOOP
    BEGIN n := n + 1; PERFORM pg_try_advisory_lock(n); EXCEPTION WHEN out_of_memory THEN NULL; END;
END LOOP; END $$
"""


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def versioned(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Postgres]:
    """A server of each version that is soon exhausted."""
    pages = NOTIFY_PAGES if request.param >= 17 else {}
    with running_server(request.param, f"{postgres.worker}-starved", **SMALL, **pages) as server:
        yield server


@pytest.fixture(params=[superuser_workshop, plain_workshop], ids=["superuser", "plain"])
def opened(request: pytest.FixtureRequest, versioned: Postgres) -> Callable[..., Any]:
    """Opens a provisioner with either kind of administrator. A plain one may see what sessions do (pg_monitor)."""

    @asynccontextmanager
    async def open_one(**config: Any) -> AsyncIterator[Workshop]:
        async with request.param(versioned, **config) as workshop:
            async with workshop.admin() as connection, versioned.connect() as superuser:
                administrator = await connection.fetchval("SELECT current_user::text")
                await superuser.execute(f'GRANT pg_monitor TO "{administrator}"')
            yield workshop

    return open_one


async def refused(work: Awaitable[Any]) -> str:
    """The SQLSTATE by which PostgreSQL refuses."""
    with pytest.raises(asyncpg.PostgresError) as caught:
        await work
    return str(caught.value.sqlstate)


SAVE = "SAVEPOINT s; INSERT INTO notes (body) VALUES ('x');"


async def fill_by_savepoints(connection: Any) -> None:
    """Hold as many locks as there are: one for the number of each subtransaction that writes."""
    await connection.execute("BEGIN")
    assert await refused(connection.execute(SAVE * 100_000)) == FULL


async def fill_by_large_objects(connection: Any) -> None:
    """One for each that its owner removes; then by savepoints, where the last ones would not fit."""
    await connection.execute("SELECT lo_create(0) FROM generate_series(1, 10000)")
    await connection.execute("BEGIN; SAVEPOINT s")
    remove = "SELECT lo_unlink(oid) FROM (SELECT oid FROM pg_largeobject_metadata LIMIT 100) AS chosen"
    with pytest.raises(asyncpg.OutOfMemoryError):
        for _ in range(100):
            await connection.execute(f"SAVEPOINT s; {remove}")
    await connection.execute("ROLLBACK TO s")
    assert await refused(connection.execute(SAVE * 10_000)) == FULL


async def fill_by_advisory_locks(connection: Any) -> None:
    """Where they could not be taken from tenants, or were granted."""
    assert await refused(connection.fetchval(TAKE_ALL)) == FULL


async def server_is_down(versioned: Postgres, workshop: Workshop, neighbour: Any) -> None:
    """A neighbour cannot read, nobody can log in, and no tenant can be created."""
    assert await refused(neighbour.fetch("SELECT count(*) FROM pg_database")) == FULL
    assert await refused(versioned.connect().__aenter__()) == FULL
    with pytest.raises(TenancyError):
        await workshop.create("failing")


async def server_is_up(versioned: Postgres, workshop: Workshop, neighbour: Any, slug: str = "later") -> None:
    """All of that works."""
    await neighbour.fetch("SELECT count(*) FROM pg_database")
    async with versioned.connect():
        pass
    await workshop.create(slug)


def reasons(report: WatchReport) -> list[tuple[Any, str]]:
    """The tenants with sessions that were ended, and the reasons."""
    assert report.errors == ()
    return [(one.tenant_id, one.reason) for one in report.ended]


# --- advisory locks -------------------------------------------------------------------------------------------------


async def test_advisory_locks_do_not_fill_the_table_of_locks(versioned: Postgres) -> None:
    """An unprotected role stops the whole server by one statement; a tenant's is refused each of the functions."""
    name, password = versioned.new_name("unprotected"), "pw"
    async with versioned.connect() as superuser:
        await superuser.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{password}'")
    url = versioned.url(await _database(versioned, name), user=name, password=password)
    async with superuser_workshop(versioned) as workshop:
        tenant, other = await workshop.create("acme"), await workshop.create("globex")
        async with workshop.connect(other) as neighbour:
            attacker = await asyncpg.connect(url)
            assert await refused(attacker.fetchval(TAKE_ALL)) == FULL
            await server_is_down(versioned, workshop, neighbour)
            await attacker.close()
            await until(lambda: _works(neighbour))
            async with workshop.connect(tenant) as connection:
                assert await refused(connection.fetchval(TAKE_ALL)) == REFUSED
                for function in advisory_locks.FUNCTIONS:
                    call = function.replace("bigint", "1").replace("integer", "1")
                    assert await refused(connection.fetchval(f"SELECT {call}")) == REFUSED
                await connection.execute("SELECT pg_advisory_unlock_all(); SELECT pg_advisory_unlock(1)")
            await server_is_up(versioned, workshop, neighbour)


async def _database(versioned: Postgres, name: str) -> str:
    await versioned.create_database(name)
    return name


async def _works(connection: Any) -> bool:
    try:
        await connection.fetch("SELECT count(*) FROM pg_database")
    except asyncpg.PostgresError:
        return False
    return True


async def test_every_function_that_takes_an_advisory_lock_is_known(versioned: Postgres) -> None:
    """Those that PostgreSQL has, of this version too."""
    query = (
        "SELECT 'pg_catalog.' || oid::regprocedure::text FROM pg_proc "
        "WHERE proname LIKE '%advisory%' AND proname NOT LIKE '%unlock%'"
    )
    async with versioned.connect() as connection:
        found = {row[0].replace(",", ", ") for row in await connection.fetch(query)}
    assert found == set(advisory_locks.FUNCTIONS)


async def test_migrations_take_advisory_locks(versioned: Postgres) -> None:
    """The owner may, as migrations do; so may tenants where the configuration says it."""
    async with superuser_workshop(versioned, provisioning={"tenant_advisory_locks": True}) as workshop:
        tenant = await workshop.create("acme")
        database = placement(tenant).database
        owning = await workshop.servers["default"].connect_admin(database, role=workshop.names.owner)
        async with workshop.connect(tenant) as connection:
            for one in (owning, connection):
                assert await one.fetchval("SELECT pg_try_advisory_lock(42)") is (one is owning)
                await one.execute("SELECT pg_advisory_xact_lock_shared(1, 2)")
        await owning.close()


async def test_a_template_of_other_rights_is_not_used(versioned: Postgres) -> None:
    """One that an administrator of fewer rights has built has another base."""
    async with superuser_workshop(versioned) as workshop:
        templates = workshop.provisioner._templates
        assert templates.base(restricted=True) != templates.base(restricted=False)
        template = await workshop.provisioner.template("default")
        (record,) = await TemplateRecords(workshop.control).of_server("default")
        assert (record.name, record.base) == (template.name, templates.base(restricted=True))


async def test_a_plain_administrator_names_what_a_superuser_can_do(
    postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the SQL. After that has been run in template0, tenants are refused here too."""
    with running_server(max(VERSIONS), f"{postgres.worker}-plain") as server:
        async with plain_workshop(server) as workshop:
            with caplog.at_level(logging.WARNING):
                tenant = await workshop.create("acme")
                await workshop.create("globex")
            statements = advisory_locks.restrictions(workshop.names.owner)
            assert caplog.text.count("; ".join(statements)) == 1
            async with workshop.connect(tenant) as connection:
                assert await connection.fetchval("SELECT pg_try_advisory_lock(1)")
            async with server.connect() as superuser:
                await superuser.execute("ALTER DATABASE template0 ALLOW_CONNECTIONS true")
                async with server.connect("template0") as inside:
                    await inside.execute("; ".join(statements))
                await superuser.execute("ALTER DATABASE template0 ALLOW_CONNECTIONS false")
            async with workshop.admin() as admin:
                await databases.drop(admin, (await workshop.provisioner.template("default")).name)
            caplog.clear()
            again = workshop.provisioner_of()
            with caplog.at_level(logging.WARNING):
                tenant = await again.create(workshop.draft("initech"), key=None)
            assert "advisory" not in caplog.text
            async with workshop.connect(tenant) as connection:
                assert await refused(connection.fetchval("SELECT pg_try_advisory_lock(1)")) == REFUSED


# --- the table of locks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [fill_by_savepoints, fill_by_large_objects, fill_by_advisory_locks])
async def test_who_fills_the_table_of_locks_is_ended(
    versioned: Postgres, opened: Callable[..., Any], fill: Callable[[Any], Awaitable[None]]
) -> None:
    """A watchdog that was connected before ends the session, and emits an event."""
    async with opened(watchdog={"max_session_locks": 500}, provisioning={"tenant_advisory_locks": True}) as workshop:
        tenant, other = await workshop.create("acme"), await workshop.create("globex")
        told: list[SessionTerminated] = []
        workshop.events.subscribe(SessionTerminated, told.append)
        async with workshop.connect(tenant) as connection, workshop.connect(other) as neighbour:
            assert reasons(await workshop.provisioner.end_excessive_sessions()) == []
            await fill(connection)
            await server_is_down(versioned, workshop, neighbour)
            report = await workshop.provisioner.end_excessive_sessions()
            assert reasons(report) == [(tenant.id, "locks")]
            assert report.ended[0].locks > 500
            await server_is_up(versioned, workshop, neighbour)
            await until(connection.is_closed)
        assert [(event.tenant_id, event.reason) for event in told] == [(tenant.id, "locks")]
        (entry,) = [e for e in await AuditLog(workshop.control).events() if e.action == "session.terminate"]
        assert (entry.tenant_id, entry.slug) == (tenant.id, "acme")
        assert entry.detail is not None
        assert entry.detail["reason"] == "locks"
        assert reasons(await workshop.provisioner.end_excessive_sessions()) == []


async def test_who_goes_on_taking_locks_is_ended(versioned: Postgres, opened: Callable[..., Any]) -> None:
    """It would take the room that the watchdog makes for itself, were that not used in the same message.

    One that has taken it all the same is ended without a lock.
    """
    async with opened(watchdog={"max_session_locks": 500}, provisioning={"tenant_advisory_locks": True}) as workshop:
        async with workshop.admin() as admin, versioned.connect() as superuser:
            # so that it need not join the role first
            await superuser.execute(f'GRANT pg_signal_backend TO "{await admin.fetchval("SELECT current_user::text")}"')
        tenant = await workshop.create("acme")
        for has_reserve in (False, True):
            async with workshop.connect(tenant) as connection:
                assert reasons(await workshop.provisioner.end_excessive_sessions()) == []
                again = asyncio.create_task(connection.execute(TAKE_FOR_EVER))
                await until(lambda: _refuses_logins(versioned))
                if not has_reserve:
                    watching = workshop.provisioner.watchdog._watched["default"].connection
                    assert watching is not None
                    await watching.execute("SELECT pg_advisory_unlock_all()")
                    await until(lambda: _refuses_logins(versioned))
                found: list[Any] = []

                async def ended(found: list[Any] = found) -> bool:
                    report = await workshop.provisioner.end_excessive_sessions()
                    found.extend((one.tenant_id, one.reason) for one in report.ended)
                    return bool(found)

                await until(ended)
                assert found == [(tenant.id, "locks")]
                with pytest.raises(ENDED):
                    await again
            await until(lambda: _accepts_logins(versioned))


async def _refuses_logins(versioned: Postgres) -> bool:
    try:
        async with versioned.connect():
            return False
    except asyncpg.OutOfMemoryError:
        return True


async def _accepts_logins(versioned: Postgres) -> bool:
    return not await _refuses_logins(versioned)


async def test_a_session_that_logged_in_since_the_last_look_is_ended(
    versioned: Postgres, opened: Callable[..., Any]
) -> None:
    """Its role is not known yet: the reserve of locks makes room to look it up."""
    async with opened(watchdog={"max_session_locks": 500}) as workshop:
        tenant, other = await workshop.create("acme"), await workshop.create("globex")
        async with workshop.connect(other) as neighbour:
            assert reasons(await workshop.provisioner.end_excessive_sessions()) == []
            async with workshop.connect(tenant) as connection:
                await fill_by_savepoints(connection)
                await server_is_down(versioned, workshop, neighbour)
                assert reasons(await workshop.provisioner.end_excessive_sessions()) == [(tenant.id, "locks")]
                await server_is_up(versioned, workshop, neighbour)


async def test_a_watchdog_that_comes_late_waits_for_room(versioned: Postgres) -> None:
    """Nobody can log in then: it says so after its deadline, and works as soon as it gets in."""
    async with superuser_workshop(
        versioned, provisioning={"timeout": 2.0}, watchdog={"max_session_locks": 500}
    ) as workshop:
        tenant = await workshop.create("acme")
        late = workshop.provisioner_of()
        async with workshop.connect(tenant) as connection:
            await fill_by_savepoints(connection)
            report = await late.end_excessive_sessions()
            assert report.ended == ()
            assert len(report.errors) == 1
        assert await late.end_excessive_sessions() == WatchReport()


async def test_what_a_serializable_transaction_has_read_is_no_lock(
    versioned: Postgres, opened: Callable[..., Any]
) -> None:
    """It is in a table of its own: an honest program that reads much is left alone, prepared or not."""
    reading = (
        "SET enable_seqscan = off; SET enable_bitmapscan = off; BEGIN ISOLATION LEVEL SERIALIZABLE;"
        + "".join(f"SELECT body FROM notes WHERE id = {8 * n + 1};" for n in range(25))
        + "INSERT INTO notes (body) VALUES ('x')"
    )
    counted = "SELECT count(*) FROM pg_locks WHERE pid IS NOT DISTINCT FROM $1 AND (mode = 'SIReadLock') = $2"
    async with opened(watchdog={"max_session_locks": 20}) as workshop, versioned.connect() as superuser:
        tenant = await workshop.create("acme")
        async with workshop.connect(tenant) as session, workshop.connect(tenant) as prepared:
            # eight rows are a page
            await session.execute("INSERT INTO notes (body) SELECT repeat('x', 900) FROM generate_series(1, 300)")
            await session.execute(reading)
            await prepared.execute(reading + "; PREPARE TRANSACTION 'honest'")
            for pid in (session.get_server_pid(), None):
                assert await superuser.fetchval(counted, pid, True) > 20
                assert 0 < await superuser.fetchval(counted, pid, False) < 20
            for _ in range(2):  # the second time, its roles are known
                assert reasons(await workshop.provisioner.end_excessive_sessions()) == []
            await session.execute("COMMIT")
            await prepared.execute("ROLLBACK PREPARED 'honest'")


async def test_0_is_no_bound(versioned: Postgres) -> None:
    """The operator may switch each of them off."""
    off = {
        "max_session_locks": 0,
        "max_transaction_seconds": 0,
        "max_idle_transaction_seconds": 0,
        "max_notify_queue": 0,
    }
    async with superuser_workshop(versioned, watchdog=off) as workshop:
        tenant = await workshop.create("acme")
        async with workshop.connect(tenant) as connection:
            await connection.execute("BEGIN; " + "SAVEPOINT s; INSERT INTO notes (body) VALUES ('x');" * 1_000)
            assert await workshop.provisioner.end_excessive_sessions() == WatchReport()
            await connection.execute("COMMIT")


CONFIG = TenancyConfig(
    control_url="postgresql://admin@db.example/control", watchdog=WatchdogConfig(max_session_locks=100)
)


def test_many_sessions_of_one_tenant_are_taken_together() -> None:
    """Each below the bound, and all of them twice above it: those with the most locks go, until the rest is below."""
    own = [Session(pid, 1, "acme", 60 + pid) for pid in range(4)]
    others = [Session(pid, pid, f"other{pid}", 90) for pid in range(10, 20)]
    assert {pid: reason for pid, (_, reason) in excessive([*own, *others], CONFIG).items()} == {3: "locks"}


# --- transactions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["idle_in_transaction", "transaction"])
async def test_a_transaction_that_stays_open_is_ended(opened: Callable[..., Any], kind: str) -> None:
    """Although the tenant has lifted its own limits; sessions of others, and short ones, stay."""
    bound = {"max_idle_transaction_seconds": 0.5} if kind == "idle_in_transaction" else {"max_transaction_seconds": 0.5}
    async with opened(watchdog=bound) as workshop:
        tenant, other = await workshop.create("acme"), await workshop.create("globex")
        async with workshop.connect(tenant) as connection, workshop.connect(other) as neighbour:
            await connection.execute("SET idle_in_transaction_session_timeout = 0; BEGIN; SELECT 1")
            found: list[tuple[Any, str]] = []

            async def ended() -> bool:
                await neighbour.execute("BEGIN; SELECT 1; COMMIT")
                found.extend(reasons(await workshop.provisioner.end_excessive_sessions()))
                return bool(found)

            await until(ended)
            assert found == [(tenant.id, kind)]
            with pytest.raises(ENDED):
                await connection.execute("COMMIT")
            assert await neighbour.fetchval("SELECT 1") == 1


async def test_an_administrator_who_cannot_see_transactions_says_so_once(
    versioned: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """With the statement that helps."""
    async with plain_workshop(versioned) as workshop:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert await workshop.provisioner.end_excessive_sessions() == WatchReport()
        assert caplog.text.count("GRANT pg_monitor TO") == 1


async def test_a_prepared_transaction_is_rolled_back(versioned: Postgres, opened: Callable[..., Any]) -> None:
    """It keeps its locks without a session: it is found by its age, and by its locks."""
    for bound in ({"max_transaction_seconds": 0.1}, {"max_session_locks": 2}):
        async with opened(watchdog=bound) as workshop:
            tenant = await workshop.create("acme")
            async with workshop.connect(tenant) as connection:
                await connection.execute("BEGIN; INSERT INTO notes (body) VALUES ('x'); PREPARE TRANSACTION 'it''s'")
            async with versioned.connect() as superuser:
                assert await superuser.fetchval("SELECT count(*) FROM pg_prepared_xacts") == 1
                found: list[tuple[Any, str]] = []

                async def ended(workshop: Workshop = workshop, found: list[tuple[Any, str]] = found) -> bool:
                    found.extend(reasons(await workshop.provisioner.end_excessive_sessions()))
                    return bool(found)

                await until(ended)
                assert found == [(tenant.id, "prepared_transaction")]
                assert await superuser.fetchval("SELECT count(*) FROM pg_prepared_xacts") == 0


# --- the notification queue -----------------------------------------------------------------------------------------

TOO_MANY = "54000"
SEND = "SELECT count(pg_notify('c', n || repeat('x', 7000))) FROM generate_series(1, 50) AS n"


async def test_who_keeps_the_notification_queue_full_is_ended(versioned: Postgres, opened: Callable[..., Any]) -> None:
    """A listener with an open transaction, while another session sends: nobody can send any more, on small queues."""
    async with versioned.connect() as superuser:
        small = int(await superuser.fetchval("SHOW server_version_num")) >= 170000
    async with opened(watchdog={"max_notify_queue": 0.25 if small else 1e-7}) as workshop:
        tenant, other = await workshop.create("acme"), await workshop.create("globex")
        async with (
            workshop.connect(tenant) as listener,
            workshop.connect(tenant) as sender,
            workshop.connect(other) as neighbour,
        ):
            await listener.execute("LISTEN c")
            await listener.execute("BEGIN; SELECT 1")
            await sender.execute(SEND)
            if small:
                assert await refused(_send_for_ever(sender)) == TOO_MANY
                assert await refused(neighbour.execute("NOTIFY d")) == TOO_MANY
            found: list[tuple[Any, str]] = []

            async def ended() -> bool:
                found.extend((one.tenant_id, one.reason) for one in (await look(workshop)).ended)
                return bool(found)

            await until(ended)
            assert found == [(tenant.id, "notify_queue")]
            await neighbour.execute("NOTIFY d")
            assert await look(workshop) == WatchReport()


async def look(workshop: Workshop) -> WatchReport:
    return await workshop.provisioner.end_excessive_sessions()


async def _send_for_ever(connection: Any) -> None:
    while True:
        await connection.execute(SEND)


# --- temporary files ------------------------------------------------------------------------------------------------


async def test_temporary_files_are_bounded(versioned: Postgres) -> None:
    """A tenant may raise everything but this; without the bound the same statement works."""
    statement = "SET work_mem = '64kB'; SELECT count(*) FROM (SELECT n FROM generate_series(1, 300000) n ORDER BY -n) s"
    async with superuser_workshop(versioned, provisioning={"role_settings": {"temp_file_limit": "1MB"}}) as workshop:
        tenant = await workshop.create("acme")
        async with workshop.admin(placement(tenant).database) as unbounded:
            await unbounded.execute(statement)
        async with workshop.connect(tenant) as connection:
            assert await refused(connection.execute("SET temp_file_limit = -1")) == REFUSED
            assert await refused(connection.execute(statement)) == "53400"


def test_bounds_are_checked() -> None:
    """None is negative."""
    with pytest.raises(TenancyError, match="max_session_locks"):
        CONFIG.replace(watchdog={"max_session_locks": -1})
