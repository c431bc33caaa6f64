"""What open connections have prepared before a change of the schema harms no request after it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm.config import TenancyConfig
from tenancy_orm.routing import Router
from tenancy_orm.routing.connection import TenantConnection
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.databases import Databases

Use = Callable[[AsyncConnection], Awaitable[Any]]

TABLES = """
CREATE TYPE mood AS ENUM ('good', 'bad');
CREATE TYPE point2 AS (x int, y int);
CREATE DOMAIN grade AS int;
CREATE TABLE things (id int, mood mood, place point2, grade grade, extra int);
INSERT INTO things VALUES (1, 'good', ROW(1, 2), 3, 4);
"""


def runs(statement: str, *parameters: dict[str, Any]) -> Use:
    """Execute a statement, several times if several sets of parameters are given; returns what it returned."""

    async def use(connection: AsyncConnection) -> Any:
        given = list(parameters) if len(parameters) > 1 else (parameters or ({},))[0]
        result = await connection.execute(text(statement), given)
        return [tuple(row) for row in result.all()] if result.returns_rows else result.rowcount

    return use


def streams(statement: str) -> Use:
    """Execute a statement with a server-side cursor."""

    async def use(connection: AsyncConnection) -> Any:
        async with connection.stream(text(statement)) as rows:
            return [tuple(row) async for row in rows]

    return use


READ = runs("SELECT * FROM things")
REPLACED_MOOD = """
ALTER TYPE mood RENAME TO old_mood;
CREATE TYPE mood AS ENUM ('good', 'bad', 'ugly');
ALTER TABLE things ALTER mood TYPE mood USING mood::text::mood;
DROP TYPE old_mood;
"""
# the use, the change, and whether the use fails in an open connection where nothing is repeated
CHANGES: dict[str, tuple[Use, str, bool]] = {
    "wider column": (runs("SELECT id FROM things"), "ALTER TABLE things ALTER id TYPE bigint", True),
    "another type": (runs("SELECT id FROM things"), "ALTER TABLE things ALTER id TYPE text", True),
    "column added": (READ, "ALTER TABLE things ADD more int", True),
    "column dropped": (READ, "ALTER TABLE things DROP extra", True),
    "streamed": (streams("SELECT * FROM things"), "ALTER TABLE things DROP extra", True),
    "domain": (runs("SELECT grade FROM things"), "ALTER TABLE things ALTER grade TYPE bigint", True),
    "enum value": (
        runs("SELECT count(*) FROM things WHERE mood <> :mood", {"mood": "bad"}),
        "ALTER TYPE mood ADD VALUE 'ugly'",
        False,
    ),
    "enum replaced, read": (runs("SELECT mood FROM things"), REPLACED_MOOD, True),
    "enum replaced, compared": (
        runs("SELECT id FROM things WHERE mood = :mood", {"mood": "good"}),
        REPLACED_MOOD,
        True,
    ),
    "enum replaced, written": (runs("UPDATE things SET mood = :mood", {"mood": "good"}), REPLACED_MOOD, True),
    "enum replaced, written many times": (
        runs("INSERT INTO things (mood) VALUES (:mood)", {"mood": "good"}, {"mood": "bad"}),
        REPLACED_MOOD,
        True,
    ),
    "composite type": (
        runs("SELECT place FROM things"),
        "ALTER TYPE point2 DROP ATTRIBUTE y; ALTER TYPE point2 ADD ATTRIBUTE y text",
        True,
    ),
}


async def use_it(router: Router, tenant: Tenant, use: Use, **options: Any) -> Any:
    """Use one connection of the pool; there is only one."""
    async with router.connection(tenant) as connection:
        if options:
            await connection.execution_options(**options)
        result = await use(connection)
        await connection.commit()
        return result


async def change(made: Databases, tenant: Tenant, ddl: str) -> None:
    """Change the schema as an administrator does by hand: nobody is notified."""
    assert tenant.placement is not None
    async with made.postgres.connect(tenant.placement.database) as inside:
        await inside.execute(ddl)


@pytest.fixture
async def acme(made: Databases) -> Tenant:
    acme = await made.create("acme")
    assert acme.placement is not None
    await change(made, acme, TABLES + f"GRANT ALL ON things TO {acme.placement.role}")
    return acme


@pytest.mark.parametrize("what", CHANGES)
async def test_the_first_statement_of_a_transaction_is_repeated(
    made: Databases, router: Router, acme: Tenant, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDL by hand, of which no process learns. Without the repetition each open connection fails once."""
    use, ddl, fails = CHANGES[what]
    async with router.connection(acme) as one, router.connection(acme) as other:
        for connection in (one, other):
            await use(connection)
            await connection.commit()
        await change(made, acme, ddl)
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(TenantConnection, "may_repeat", False)
                with pytest.raises(DBAPIError):
                    await use(one)
            await one.rollback()
        assert await use(other)
        await other.commit()
        assert await use(other)


async def test_nothing_is_repeated_after_another_statement(made: Databases, router: Router, acme: Tenant) -> None:
    """What a transaction has read or written before must not be lost, so the error is the application's."""
    use, ddl, _ = CHANGES["column dropped"]
    await use_it(router, acme, use)
    await change(made, acme, ddl)
    async with router.connection(acme) as connection:
        await connection.execute(text("INSERT INTO things (id) VALUES (2)"))
        with pytest.raises(DBAPIError):
            await use(connection)
        await connection.rollback()
        # the failed one has told the others, and its own connection
        assert len(await use(connection)) == 1


async def test_a_statement_is_repeated_once(made: Databases, router: Router, acme: Tenant) -> None:
    """An error of the application's own comes back as it is, and writes of the first try are rolled back."""
    written = runs("INSERT INTO things (id) VALUES (2) RETURNING place, id", {})
    broken = runs("UPDATE things SET mood = :mood RETURNING id", {"mood": "good"})
    for use in (written, broken):
        await use_it(router, acme, use)
    await change(made, acme, CHANGES["composite type"][1] + "; ALTER TABLE things ALTER mood TYPE int USING 1")
    # executed, but its result cannot be decoded: the first try is rolled back
    assert await use_it(router, acme, written) == [(None, 2)]
    assert await use_it(router, acme, runs("SELECT count(*) FROM things")) == [(3,)]
    with pytest.raises(DBAPIError, match="invalid input"):
        await use_it(router, acme, broken)


async def test_a_vain_repetition_costs_other_connections_nothing(made: Databases, router: Router, acme: Tenant) -> None:
    """An application that calls a function which was dropped fails at every request."""
    await change(made, acme, "CREATE FUNCTION answer() RETURNS int LANGUAGE sql AS 'SELECT 42'")
    use = runs("SELECT answer()")
    async with router.lease(acme) as engine:
        pool: Any = engine.sync_engine.pool
        assert await use_it(router, acme, use) == [(42,)]
        await change(made, acme, "DROP FUNCTION answer")
        before = pool.route.schema_changed_at
        with pytest.raises(DBAPIError, match="answer"):
            await use_it(router, acme, use)
        assert pool.route.schema_changed_at == before


async def test_a_clock_that_was_set_back_changes_nothing(
    made: Databases, router: Router, acme: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy dates what is prepared; this was prepared in the future."""
    use, ddl, _ = CHANGES["column dropped"]
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 3600)
        await use_it(router, acme, use)
    await change(made, acme, ddl)
    assert len(await use_it(router, acme, use)) == 1


async def test_in_autocommit_only_what_was_not_executed_is_repeated(
    made: Databases, router: Router, acme: Tenant
) -> None:
    reading, writing = (
        runs("SELECT * FROM things"),
        runs("INSERT INTO things (place) VALUES (ROW(1,2)) RETURNING place"),
    )
    for use in (reading, writing):
        await use_it(router, acme, use, isolation_level="AUTOCOMMIT")
    await change(made, acme, "ALTER TABLE things DROP extra")
    assert len(await use_it(router, acme, reading, isolation_level="AUTOCOMMIT")) == 2
    await change(made, acme, CHANGES["composite type"][1])
    async with router.connection(acme) as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(DBAPIError, match="unexpected data type"):
            await writing(connection)
    # it was executed, once
    assert await use_it(router, acme, runs("SELECT count(*) FROM things")) == [(3,)]


@pytest.mark.parametrize("what", CHANGES)
async def test_connections_that_learn_of_it_prepare_again(
    made: Databases, router: Router, acme: Tenant, what: str
) -> None:
    """Then it may be any statement of a transaction; the connection stays the same, and so do other tenants'."""
    use, ddl, _ = CHANGES[what]
    pid = await use_it(router, acme, runs("SELECT pg_backend_pid()"))
    await use_it(router, acme, use)
    await change(made, acme, ddl)
    router.schema_changed(acme.id)
    async with router.connection(acme) as connection:
        assert await runs("SELECT pg_backend_pid()")(connection) == pid
        assert await use(connection)


async def test_during_a_migration_no_statement_of_a_transaction_is_out_of_date(
    made: Databases, router: Router, acme: Tenant
) -> None:
    """The schema may change at any moment; a statement that is prepared in its transaction locks what it names."""
    use, ddl, _ = CHANGES["column dropped"]
    await use_it(router, acme, use)
    async with router.connection(acme) as connection:
        await connection.execute(text("SELECT 1"))
        router.schema_changed(acme.id, changing=True)
        await change(made, acme, ddl)
        assert len(await use(connection)) == 1
        await connection.rollback()
        await connection.execute(text("SELECT 1"))
        await change(made, acme, "ALTER TABLE things ALTER id TYPE text")
        assert await use(connection)
        await connection.rollback()
    async with router.lease(acme) as engine:
        pool: Any = engine.sync_engine.pool
        # neither a repeated statement nor the application's own DDL tells that the migration has ended
        pool.route.outdated_before(time.time())
        assert pool.route.schema_valid_since() > pool.route.schema_changed_at
        router.schema_changed(acme.id)
        assert pool.route.schema_valid_since() == pool.route.schema_changed_at


async def test_the_driver_s_own_statements_are_prepared_again(made: Databases, router: Router, acme: Tenant) -> None:
    """An application that uses asyncpg's connection of the pool, in a transaction of asyncpg's."""

    async def rows(connection: AsyncConnection) -> int:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        async with driver.transaction():
            return len(await driver.fetch("SELECT * FROM things"))

    assert await use_it(router, acme, rows) == 1
    await change(made, acme, "ALTER TABLE things DROP extra")
    router.schema_changed(acme.id)
    assert await use_it(router, acme, rows) == 1


async def test_without_a_cache_of_prepared_statements(made: Databases, config: TenancyConfig, acme: Tenant) -> None:
    """As behind PgBouncer in transaction mode: nothing is out of date, and nothing is repeated in vain."""
    assert config.servers is not None
    url = f"{config.servers['default']}?prepared_statement_cache_size=0&statement_cache_size=0"
    use, ddl, _ = CHANGES["column dropped"]
    async with support.router(made, config.replace(servers={"default": url})) as router:
        await use_it(router, acme, use)
        await change(made, acme, ddl)
        async with router.connection(acme) as connection:
            await connection.execute(text("SELECT 1"))
            assert await use(connection)
