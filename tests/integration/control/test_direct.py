"""``ControlDatabase.fetch``: one statement on asyncpg's connection, out of the same pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.errors import ControlUnavailableError
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import Postgres
from tests.support.waiting import until


@pytest.fixture
async def control(empty_url: str) -> AsyncIterator[ControlDatabase]:
    control = ControlDatabase(empty_url, pool_size=1, connect_timeout=5.0)
    yield control
    await control.close()


async def pid(control: ControlDatabase) -> int:
    (row,) = await control.fetch("SELECT pg_backend_pid() AS pid")
    return int(row.pid)


async def test_a_connection_is_used_again_whatever_a_statement_raises(control: ControlDatabase) -> None:
    """PostgreSQL's refusal is the caller's, and harms no connection."""
    first = await pid(control)
    with pytest.raises(asyncpg.UndefinedTableError):
        await control.fetch("SELECT FROM nothing")
    assert await pid(control) == first
    async with control.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None and driver.get_server_pid() == first
    (row,) = await control.fetch("SELECT $1::text AS a", "x")
    assert row.a == "x" and row["a"] == "x"
    with pytest.raises(AttributeError):
        _ = row.b


async def test_a_connection_that_the_server_has_ended_is_replaced(control: ControlDatabase, postgres: Postgres) -> None:
    """One caller gets the error, the next one another connection."""
    first = await pid(control)
    async with postgres.connect() as admin:
        await admin.execute("SELECT pg_terminate_backend($1)", first)
    with pytest.raises(ControlUnavailableError):
        await pid(control)
    assert await pid(control) != first


async def test_a_cancelled_statement_costs_its_connection_alone(control: ControlDatabase) -> None:
    """Its answer may still come."""
    first = await pid(control)
    pool: Any = control.engine.sync_engine.pool
    running = asyncio.create_task(control.fetch("SELECT pg_sleep(60)"))
    await until(lambda: pool.checkedout() == 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await pid(control) != first
    assert pool.checkedout() == 0


async def test_a_hot_statement_is_planned_once_and_reads_by_an_index(empty_url: str) -> None:
    """From the first connection on, which has shown where the address leads, and while its table is still empty."""
    control = ControlDatabase(empty_url, hot=True)
    query = "SELECT a FROM things WHERE id = ANY($1::text[])"
    try:
        await control.fetch("CREATE TABLE things (id text PRIMARY KEY, a int)")
        for number in range(7):
            await control.fetch(query, [str(number)])
        (row,) = await control.fetch(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1", query
        )
        assert (row.generic_plans, row.custom_plans) == (7, 0)
        await control.fetch(f"PREPARE again AS {query}")
        plan = "\n".join(row[0] for row in await control.fetch("EXPLAIN EXECUTE again ('{x}')"))
        assert "things_pkey" in plan and "Seq Scan" not in plan
    finally:
        await control.close()


async def test_a_server_that_does_not_answer_is_not_available() -> None:
    """As for every other statement."""
    control = ControlDatabase("postgresql://nobody@127.0.0.1:1/none", connect_timeout=1.0)
    with pytest.raises(ControlUnavailableError, match="not available"):
        await control.fetch("SELECT 1")
    await control.close()


async def test_a_burst_leaves_no_connection_open_beyond_the_size_of_the_pool(
    control: ControlDatabase, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that were opened for it are closed in order, also where its statement is refused, or its caller leaves."""
    none_beyond = "SELECT count(*) <= 1 FROM pg_stat_activity WHERE datname = $1"
    async with postgres.connect() as admin:
        for query in ("SELECT pg_sleep(0.1)", "SELECT 1 / length(pg_sleep(0.1)::text)"):
            await asyncio.gather(*(control.fetch(query) for _ in range(2)), return_exceptions=True)
            await until(lambda: admin.fetchval(none_beyond, control.database))
        tasks = [asyncio.create_task(control.fetch("SELECT pg_sleep(0.02)")) for _ in range(20)]
        for number, task in enumerate(tasks):
            asyncio.get_running_loop().call_later(number * 0.01, task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: admin.fetchval(none_beyond, control.database))
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_statements_through_a_pooler_in_transaction_mode(postgres: Postgres, empty_url: str) -> None:
    """None is prepared on one connection and run on another, and the pooler is sent no parameter that it refuses."""
    with pgbouncer(postgres, default_pool_size="2") as pooler:
        control = ControlDatabase(pooler.url(empty_url), pool_size=6, hot=True)

        async def ask(number: int) -> None:
            for turn in range(20):
                (row,) = await control.fetch("SELECT $1::int AS a, pg_backend_pid() AS pid", turn)
                assert row.a == turn
                (row,) = await control.fetch("SELECT $1::text AS b, $2::int AS c", str(turn), number)
                assert (row.b, row.c) == (str(turn), number)

        try:
            await asyncio.gather(*map(ask, range(12)))
            assert control.is_pooled
        finally:
            await control.close()
