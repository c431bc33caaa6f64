"""The marker: a connection proves which tenant's database it is, before anything else takes place on it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, cast
from uuid import uuid4

import asyncpg
import pytest
from asyncpg.protocol.protocol import BaseProtocol
from sqlalchemy import text

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import MarkerMismatchError, ServerUnavailableError
from tenancy_orm.events import EventBus, IsolationIncident
from tenancy_orm.routing import Router, connector, marker, protocol
from tenancy_orm.routing.direct import run_alone
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.databases import Databases, moved
from tests.support.postgres import Postgres
from tests.support.waiting import until


@pytest.fixture
def config(postgres: Postgres, name_prefix: str) -> TenancyConfig:
    """A small budget."""
    return support.configuration(postgres, name_prefix)


@pytest.fixture
async def made(postgres: Postgres, config: TenancyConfig) -> AsyncIterator[Databases]:
    """A maker of tenants."""
    async with support.databases(postgres, config) as made:
        yield made


@pytest.fixture
def events() -> EventBus:
    """The events of incidents."""
    return EventBus()


@pytest.fixture
async def router(made: Databases, events: EventBus, config: TenancyConfig) -> AsyncIterator[Router]:
    """A router to them."""
    async with support.router(made, config, events=events) as router:
        yield router


async def swapped(made: Databases) -> tuple[Tenant, Tenant]:
    """Two tenants with registry rows that name each other's database, where PostgreSQL itself admits both."""
    a, b = await made.create("acme"), await made.create("globex")
    assert a.placement is not None and b.placement is not None
    for role, database in ((a.placement.role, b.placement.database), (b.placement.role, a.placement.database)):
        await made.admin.execute(f"GRANT CONNECT ON DATABASE {database} TO {role}")
        async with made.postgres.connect(database) as inside:
            await inside.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
            await inside.execute("INSERT INTO notes (body) VALUES ('secret of ' || current_database())")
    return moved(a, database=b.placement.database), moved(b, database=a.placement.database)


async def read(router: Router, tenant: Tenant) -> list[Any]:
    async with router.session(tenant) as session:
        return list(await session.scalars(text("SELECT body FROM notes")))


async def test_without_the_check_swapped_rows_show_each_other_s_data(
    made: Databases, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check is for: the attack works where it is off."""
    monkeypatch.setattr(connector.Connector, "_begin_proof", lambda *_: None)
    for tenant in await swapped(made):
        assert tenant.placement is not None
        assert await read(router, tenant) == [f"secret of {tenant.placement.database}"]


async def test_two_tenants_with_swapped_rows_are_both_refused(
    made: Databases, router: Router, events: EventBus
) -> None:
    """Before anything is read, with the connection closed, and told."""
    told: list[IsolationIncident] = []
    events.subscribe(IsolationIncident, told.append)
    a, b = await swapped(made)
    for tenant, other in ((a, b), (b, a)):
        assert tenant.placement is not None
        with pytest.raises(MarkerMismatchError) as caught:
            await read(router, tenant)
        assert caught.value.tenant == tenant.slug
        assert caught.value.database == tenant.placement.database
        assert caught.value.expected == marker.marker_text(made.installation, tenant.id)
        assert caught.value.found == marker.marker_text(made.installation, other.id)
    assert [(event.slug, event.kind) for event in told] == [
        ("acme", "MarkerMismatchError"),
        ("globex", "MarkerMismatchError"),
    ]
    await until(lambda: router.statistics().servers["default"].open == 0)
    assert await made.sessions() == 0


WRITE = "INSERT INTO notes (body) VALUES ('written by another')"


async def by_session(router: Router, tenant: Tenant) -> None:
    async with router.session(tenant) as session:
        await session.execute(text(WRITE))
        await session.commit()


async def read_only(router: Router, tenant: Tenant) -> None:
    async with router.session(tenant, read_only=True) as session:
        await session.execute(text("SELECT body FROM notes"))


async def read_only_in_a_transaction(router: Router, tenant: Tenant) -> None:
    async with router.session(tenant, read_only=True) as session:
        await session.execute(text("LOCK TABLE notes IN ACCESS SHARE MODE"))


async def in_autocommit(router: Router, tenant: Tenant) -> None:
    async with router.connection(tenant) as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text(WRITE))


async def serializable(router: Router, tenant: Tenant) -> None:
    async with router.connection(tenant) as connection:
        await connection.execution_options(isolation_level="SERIALIZABLE")
        await connection.execute(text(WRITE))
        await connection.commit()


async def many(router: Router, tenant: Tenant) -> None:
    async with router.connection(tenant) as connection:
        await connection.execute(text("INSERT INTO notes (body) VALUES (:body)"), [{"body": "a"}, {"body": "b"}])
        await connection.commit()


async def streamed(router: Router, tenant: Tenant) -> None:
    async with router.connection(tenant) as connection:
        await connection.stream(text(f"{WRITE} RETURNING id"))


DRIVER: dict[str, Callable[[Any], Awaitable[object]]] = {
    "execute": lambda driver: driver.execute(WRITE),
    "begin": lambda driver: driver.execute(f"BEGIN; {WRITE}; COMMIT;"),
    "lower case": lambda driver: driver.execute(f"begin; {WRITE}; commit;"),
    "arguments": lambda driver: driver.execute("INSERT INTO notes (body) VALUES ($1)", "a"),
    "fetch": lambda driver: driver.fetch(f"{WRITE} RETURNING id"),
    "prepare": lambda driver: driver.prepare(WRITE),
    "executemany": lambda driver: driver.executemany("INSERT INTO notes (body) VALUES ($1)", [("a",)]),
    "copy in": lambda driver: driver.copy_records_to_table("notes", records=[("a",)], columns=["body"]),
    "copy out": lambda driver: driver.copy_from_query("SELECT body FROM notes", output=io.BytesIO()),
    "transaction": lambda driver: driver.transaction().start(),
    "listen": lambda driver: driver.add_listener("channel", print),
    "reset": lambda driver: driver.reset(),
}


def by_driver(name: str) -> Callable[[Router, Tenant], Awaitable[None]]:
    """A first operation on asyncpg's own connection."""

    async def use(router: Router, tenant: Tenant) -> None:
        async with router.connection(tenant) as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            await DRIVER[name](driver)

    return use


@pytest.mark.parametrize("after", [0.0, 2 * protocol._BEGUN_SECONDS], ids=["at once", "later"])
@pytest.mark.parametrize(
    "use",
    [
        *(by_session, read_only, read_only_in_a_transaction, in_autocommit, serializable, many, streamed),
        *map(by_driver, DRIVER),
    ],
)
async def test_whatever_comes_first_is_refused_and_has_no_effect(
    made: Databases, router: Router, use: Callable[[Router, Tenant], Awaitable[None]], after: float
) -> None:
    """However a connection is used first, before and after the proof has been answered."""
    a, b = await swapped(made)
    for tenant in (a, b):
        with pytest.raises(MarkerMismatchError):
            if after:
                async with router.connection(tenant) as connection:
                    driver: Any = (await connection.get_raw_connection()).driver_connection
                    await until(driver.is_closed)
                    await connection.execute(text(WRITE))
            else:
                await use(router, tenant)
        assert tenant.placement is not None
        async with made.postgres.connect(tenant.placement.database) as inside:
            assert await inside.fetchval("SELECT count(*) FROM notes") == 1
    await until(lambda: router.statistics().servers["default"].open == 0)
    assert await made.sessions() == 0


def test_all_that_asyncpg_sends_waits_for_the_proof() -> None:
    """A later asyncpg may have a further operation."""
    operations = {name for name, value in vars(BaseProtocol).items() if not name.startswith("_") and callable(value)}
    sends_nothing = {
        *("abort", "close", "connection_lost", "connection_made", "data_received", "eof_received", "get_record_class"),
        *("get_server_pid", "get_settings", "is_closed", "is_connected", "pause_writing", "resume_writing"),
        "set_connection",
    }
    assert operations - sends_nothing <= set(vars(protocol.UnprovedProtocol)) | {"is_ssl"}


@pytest.mark.parametrize("full_reset", [False, True])
async def test_a_connection_that_nobody_has_used_is_not_handed_out_as_proved(
    postgres: Postgres, made: Databases, name_prefix: str, full_reset: bool
) -> None:
    """Nor is it in a transaction, for whoever uses it next."""
    pool = {"max_connections": 1, "max_connections_per_tenant": 1, "full_reset": full_reset}
    async with support.router(made, support.configuration(postgres, name_prefix, pool=pool)) as router:
        a = await made.create()
        async with router.connection(a) as connection:
            first: Any = (await connection.get_raw_connection()).driver_connection
        await until(lambda: router.statistics().servers["default"].idle == 1 and first.is_proved)
        assert not first.is_in_transaction()
        for tenant in await swapped(made):
            async with router.connection(tenant):
                pass
            with pytest.raises(MarkerMismatchError):
                await read(router, tenant)
        await until(lambda: router.statistics().servers["default"].open == 0)


async def test_a_connection_that_waits_for_its_first_statement_is_in_no_transaction(
    made: Databases, router: Router
) -> None:
    """So now() is not in the past, and no time-out of idle transactions ends it."""
    a = await made.create()
    async with router.connection(a) as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await until(lambda: driver.is_proved)
        assert not driver.is_in_transaction()
        state = "SELECT state FROM pg_stat_activity WHERE pid = $1"
        assert await made.admin.fetchval(state, driver.get_server_pid()) == "idle"
        await connection.execute(text("SELECT 1"))
        assert driver.is_in_transaction()


async def test_the_first_transaction_is_the_application_s_own(made: Databases, router: Router) -> None:
    """What must come before any query may still come."""
    a = await made.create()
    async with router.session(a) as session:
        await session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY"))
        assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"
    router.retire(a.id)
    async with router.connection(a) as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        assert await connection.scalar(text("SHOW transaction_isolation")) == "repeatable read"


@pytest.mark.parametrize("reading", [False, True])
async def test_the_check_costs_no_round_trip_of_its_own(
    made: Databases, router: Router, monkeypatch: pytest.MonkeyPatch, reading: bool
) -> None:
    """BEGIN travels with it, or what makes a connection read-only."""
    a = await made.create()
    await read(router, await made.create())  # what the tenants of a server share is known
    sent: list[str] = []

    def count(name: str) -> None:
        operation = getattr(protocol.TenantProtocol, name)

        async def counted(self: Any, *args: Any, **options: Any) -> Any:
            sent.append(name)
            return await operation(self, *args, **options)

        monkeypatch.setattr(protocol.TenantProtocol, name, counted)

    for name in ("query", "prepare", "bind_execute"):
        count(name)
    async with router.session(a, read_only=reading) as session:
        await session.execute(text("SELECT body FROM notes"))
        assert sent == ["query", "prepare", "bind_execute"]


async def test_a_second_operation_does_not_wait_beside_the_first(made: Databases, router: Router) -> None:
    """As on every connection of asyncpg's: it would come into the first one's transaction."""
    a = await made.create()
    async with router.connection(a) as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        results = await asyncio.gather(driver.transaction().start(), driver.execute("SELECT 1"), return_exceptions=True)
    assert results[0] is None
    assert isinstance(results[1], asyncpg.InterfaceError)


async def alone(router: Router, tenant: Tenant, statement: str = "SELECT 1", *, writing: bool = False) -> Any:
    answer = await run_alone(router, tenant, statement, {}, writing=writing)
    assert answer is not None
    return answer.row_count if writing else answer.value


@pytest.mark.parametrize("use", [by_session, read_only, alone], ids=["session", "read-only session", "alone"])
@pytest.mark.parametrize("ended", ["by the time-out", "by the server"])
async def test_a_connection_that_cannot_prove_its_marker_is_closed(
    made: Databases,
    router: Router,
    use: Callable[[Router, Tenant], Awaitable[object]],
    ended: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The caller learns that the server does not answer, and the next one gets another connection."""
    a = await made.create()
    await read(router, await made.create())  # what the tenants of a server share is known
    if ended == "by the time-out":
        router._servers["default"].connect_timeout = 0.5
    sleeping = "FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND starts_with(datname, $1)"
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "refusal", lambda _: "SELECT pg_catalog.pg_sleep(60)")
        task = asyncio.create_task(cast("Coroutine[Any, Any, object]", use(router, a)))
        if ended == "by the server":
            await until(lambda: made.admin.fetchval(f"SELECT count(*) = 1 {sleeping}", made.names.stem))
            await made.admin.execute(f"SELECT pg_cancel_backend(pid) {sleeping}", made.names.stem)
        with pytest.raises(ServerUnavailableError) as caught:
            await task
    assert caught.value.tenant == a.slug
    router._servers["default"].connect_timeout = 10.0
    assert await alone(router, a) == 1
    await use(router, a)


async def test_a_begin_that_was_cancelled_is_not_left_to_the_next_caller(
    made: Databases, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been sent with the check: whatever came next would be rolled back with it."""
    a = await made.create()
    await read(router, await made.create())
    monkeypatch.setattr(protocol, "refusal", lambda _: "SELECT pg_catalog.pg_sleep(0.3)")
    async with router.connection(a) as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        begin = asyncio.create_task(driver.execute(protocol.BEGIN))
        await until(driver.is_in_transaction)
        begin.cancel()
        with pytest.raises(asyncio.CancelledError):
            await begin
    assert await alone(router, a, WRITE, writing=True) == 1
    assert await read(router, a) == ["written by another"]


async def test_every_new_connection_is_checked(made: Databases, router: Router) -> None:
    """Not the first one alone."""
    a = await made.create()
    assert a.placement is not None
    async with router.connection(a):
        await made.admin.execute(f"COMMENT ON DATABASE {a.placement.database} IS 'tenancy:of:another'")
        with pytest.raises(MarkerMismatchError):
            await read(router, a)


async def test_a_database_without_a_marker_is_nobody_s(made: Databases, router: Router) -> None:
    """One that was adopted, or restored by hand."""
    a = await made.create()
    assert a.placement is not None
    await made.admin.execute(f"COMMENT ON DATABASE {a.placement.database} IS NULL")
    with pytest.raises(MarkerMismatchError) as caught:
        await read(router, a)
    assert caught.value.found is None


async def test_the_marker_of_another_installation_does_not_pass(made: Databases, router: Router) -> None:
    """Two control databases can share a server."""
    a = await made.create()
    assert a.placement is not None
    await made.admin.execute(f"COMMENT ON DATABASE {a.placement.database} IS '{marker.marker_text(uuid4(), a.id)}'")
    with pytest.raises(MarkerMismatchError):
        await read(router, a)


async def test_a_tenant_cannot_forge_a_marker(made: Databases, router: Router) -> None:
    """Neither by a comment of its own, nor by names that stand before the catalogue's in its search_path."""
    a, b = await made.create("acme"), await made.create("globex")
    assert a.placement is not None and b.placement is not None
    forged = marker.marker_text(made.installation, a.id)
    role, database = a.placement.role, b.placement.database
    # even where it may do far more than it should: a schema, functions and operators of its own in the other database
    await made.admin.execute(f"GRANT CONNECT, CREATE ON DATABASE {database} TO {role}")
    login = await asyncpg.connect(made.postgres.url(database, user=role, password=made.passwords[a.id]), timeout=10)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await login.execute(f"COMMENT ON DATABASE {database} IS '{forged}'")
        await login.execute(
            f"""
            CREATE SCHEMA evil;
            CREATE FUNCTION evil.current_database() RETURNS name LANGUAGE sql
                AS $$ SELECT '{a.placement.database}'::name $$;
            CREATE FUNCTION evil.yes(text, text) RETURNS bool LANGUAGE sql AS $$ SELECT true $$;
            CREATE FUNCTION evil.yes(oid, oid) RETURNS bool LANGUAGE sql AS $$ SELECT true $$;
            CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.yes);
            CREATE OPERATOR evil.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = evil.yes);
            CREATE TABLE evil.pg_shdescription AS SELECT * FROM pg_catalog.pg_shdescription;
            UPDATE evil.pg_shdescription SET description = '{forged}';
            ALTER ROLE {role} SET search_path = evil, pg_catalog
            """
        )
        await login.execute("SET search_path = evil, pg_catalog")
        assert await login.fetchval("SELECT current_database()") == a.placement.database, "the names do stand before"
    finally:
        await login.close()
    with pytest.raises(MarkerMismatchError):
        await read(router, moved(a, database=database))


async def test_a_dead_check_lets_nothing_through(made: Databases, router: Router) -> None:
    """Cancelled or failing in the middle of the check: no connection is handed out unproved."""
    a = await made.create()
    task = asyncio.create_task(read(router, a))
    await until(lambda: router.statistics().servers["default"].opening == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert a.placement is not None
    await made.admin.execute(f"COMMENT ON DATABASE {a.placement.database} IS NULL")
    await until(lambda: router.statistics().servers["default"].opening == 0)
    router.retire(a.id)
    with pytest.raises(MarkerMismatchError):
        await read(router, a)
