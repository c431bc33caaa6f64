"""A tenant's session against one engine made by hand, and a cold tenant's first query against a bare connect.

Run by ``make bench ARGS='-k session'``. What is compared is called in turns, in one process, on one database.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import asyncpg
import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from tenancy_orm import Tenancy
from tenancy_orm.routing import Router
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.databases import Databases
from tests.support.models import Note
from tests.support.postgres import Postgres

TURNS = int(os.environ.get("BENCH_TURNS", "1500"))
ROWS = 100


@dataclass
class Sides:
    """The same database, by hand and by tenant."""

    made: Databases
    engine: AsyncEngine
    router: Router
    tenant: Tenant


@pytest.fixture
async def sides(postgres: Postgres, name_prefix: str) -> AsyncIterator[Sides]:
    config = support.configuration(postgres, name_prefix)
    async with support.databases(postgres, config) as made:
        tenant = await made.create()
        assert tenant.placement is not None
        role = tenant.placement.role
        engine = create_async_engine(
            postgres.url(role, user=role, password=made.passwords[tenant.id], driver="asyncpg")
        )
        async with support.router(made, config) as router:
            async with router.session(tenant) as session:
                session.add_all([Note(body=f"note {number}") for number in range(ROWS)])
                await session.commit()
            yield Sides(made, engine, router, tenant)
        await engine.dispose()


@dataclass
class Timed:
    """Seconds on the clock of every call, and of the processor for all of them."""

    clock: list[float] = field(default_factory=list)
    processor: float = 0.0

    @property
    def typical(self) -> float:
        """The median."""
        return statistics.median(self.clock)

    @property
    def quiet(self) -> float:
        """The fastest tenth: what else the machine does only ever adds."""
        return statistics.quantiles(self.clock, n=10)[0]


async def turns(*calls: Callable[[], Awaitable[object]], count: int = TURNS) -> list[Timed]:
    """Call all of them in turns; who begins changes with every turn."""
    for _ in range(50):
        for call in calls:
            await call()
    timed = [Timed() for _ in calls]
    order = list(zip(timed, calls, strict=True))
    gc.collect()
    for _ in range(count):
        order.append(order.pop(0))
        for one, call in order:
            started, processor = time.perf_counter(), time.process_time()
            await call()
            one.clock.append(time.perf_counter() - started)
            one.processor += time.process_time() - processor
    return timed


def report(what: str, plain: Timed, tenant: Timed) -> None:
    print(f"\n{what}, {len(plain.clock)} times each, in turns; by hand, by tenant, ratio:", end="")
    for name, one, other in (
        ("median", plain.typical, tenant.typical),
        ("fastest tenth", plain.quiet, tenant.quiet),
        ("processor", plain.processor / len(plain.clock), tenant.processor / len(tenant.clock)),
    ):
        print(f"\n    {name:14}{one * 1e6:7.0f} us {other * 1e6:7.0f} us {other / one:7.3f}", end="")


async def test_bench_session(sides: Sides) -> None:
    """One row by its key, many rows, and nothing at all."""
    one, many = select(Note).where(Note.id == 1), select(Note)

    async def plain_row() -> None:
        async with AsyncSession(sides.engine, expire_on_commit=False) as session:
            assert (await session.scalars(one)).one().id == 1

    async def tenant_row() -> None:
        async with sides.router.session(sides.tenant) as session:
            assert (await session.scalars(one)).one().id == 1

    async def plain_rows() -> None:
        async with AsyncSession(sides.engine, expire_on_commit=False) as session:
            assert len((await session.scalars(many)).all()) == ROWS

    async def tenant_rows() -> None:
        async with sides.router.session(sides.tenant) as session:
            assert len((await session.scalars(many)).all()) == ROWS

    async def plain_nothing() -> None:
        async with AsyncSession(sides.engine, expire_on_commit=False):
            pass

    async def tenant_nothing() -> None:
        async with sides.router.session(sides.tenant):
            pass

    report("session, one row by key (goal: at most 1.05)", *await turns(plain_row, tenant_row))
    report(f"session, {ROWS} rows", *await turns(plain_rows, tenant_rows))
    report("session, opened and closed", *await turns(plain_nothing, tenant_nothing))
    print()


async def test_bench_read_session(sides: Sides) -> None:
    """One row by its key, in a read-only session."""
    one = select(Note).where(Note.id == 1)

    async def plain_row() -> None:
        async with AsyncSession(sides.engine, expire_on_commit=False) as session:
            assert (await session.scalars(one)).one().id == 1

    async def tenant_row() -> None:
        async with sides.router.session(sides.tenant, read_only=True) as session:
            assert (await session.scalars(one)).one().id == 1

    report("read-only session, one row by key (goal: at most 0.75)", *await turns(plain_row, tenant_row))
    print()


async def test_bench_fetch(tenancy: Tenancy, postgres: Postgres) -> None:
    """One row by its key, textually; on a pool of asyncpg's, which cleans each connection that is returned."""
    await tenancy.tenants.create("acme")
    await tenancy.execute("INSERT INTO notes (body) SELECT 'note' FROM generate_series(1, 100)", tenant="acme")
    placement = (await tenancy.tenants.get("acme")).placement
    assert placement is not None
    pool = await asyncpg.create_pool(postgres.url(placement.database), min_size=1, max_size=1)
    query, named = "SELECT id, body FROM notes WHERE id = $1", "SELECT id, body FROM notes WHERE id = :id"
    written, named_write = "UPDATE notes SET body = $2 WHERE id = $1", "UPDATE notes SET body = :body WHERE id = :id"

    async def plain_row() -> None:
        assert (await pool.fetchrow(query, 1))["id"] == 1

    async def prepared_row() -> None:
        async with pool.acquire() as connection:
            for _ in range(10):
                assert (await connection.fetchrow(query, 1))["id"] == 1

    async def tenant_row() -> None:
        row = await tenancy.fetch_one(named, {"id": 1}, tenant="acme")
        assert row is not None and row.id == 1

    async def plain_write() -> None:
        assert await pool.execute(written, 1, "x") == "UPDATE 1"

    async def tenant_write() -> None:
        assert await tenancy.execute(named_write, {"id": 1, "body": "x"}, tenant="acme") == 1

    report("fetch_one, one row by key, over asyncpg's pool (goal: at most 1.3)", *await turns(plain_row, tenant_row))
    ten, row = await turns(prepared_row, tenant_row)
    print(f"\nfetch_one over one query on a connection that asyncpg holds: {row.quiet / ten.quiet * 10:.3f}", end="")
    report("execute, one row by key, over asyncpg's pool", *await turns(plain_write, tenant_write))
    print()
    await pool.close()


async def test_bench_session_of_a_cold_tenant(sides: Sides) -> None:
    """The first query of a tenant without an engine, against a bare login and the same query."""
    tenant = sides.tenant
    assert tenant.placement is not None
    url = sides.made.postgres.url(
        tenant.placement.database, user=tenant.placement.role, password=sides.made.passwords[tenant.id]
    )

    async def bare() -> None:
        connection = await asyncpg.connect(url)
        try:
            assert await connection.fetchval("SELECT body FROM notes WHERE id = 1")
        finally:
            await connection.close()

    async def cold() -> None:
        sides.router.retire(tenant.id)
        async with sides.router.session(tenant) as session:
            assert await session.scalar(text("SELECT body FROM notes WHERE id = 1"))

    async def cold_read() -> None:
        sides.router.retire(tenant.id)
        async with sides.router.session(tenant, read_only=True) as session:
            assert await session.scalar(text("SELECT body FROM notes WHERE id = 1"))

    by_hand, by_tenant, reading = await turns(bare, cold, cold_read, count=TURNS // 10)
    report("first query of a cold tenant, by hand: login, query and close", by_hand, by_tenant)
    report("the same in a read-only session", by_hand, reading)
    print()
