"""Behind a network that swallows packets, every operation ends by its deadline.

Each operation is a generator: it gets ready, the network swallows what is sent from then on, and it goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.errors import TenancyError
from tests.support.fleet import activity, open_fleet, until
from tests.support.models import Note
from tests.support.outages import Writers, go_on, running
from tests.support.postgres import Postgres
from tests.support.projects import NOTES, Project
from tests.support.proxy import proxied

CONNECT, STATEMENT, STEP = 1.0, 1.0, 3.0
DEADLINE = 40.0  # far above every deadline, far below the system's own; the machine may be busy

Operation = Callable[[Tenancy, str], AsyncGenerator[None, None]]

SELECT, SLOW, INSERT = text("SELECT 1"), text("SELECT pg_sleep(0.5)"), text("INSERT INTO notes (body) VALUES ('x')")


# --- a tenant's sessions --------------------------------------------------------------------------------------------


async def opening(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    async with tenancy.session(slug) as session:
        await session.execute(SELECT)


async def statement(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.session(slug) as session:
        await session.execute(SELECT)
        yield
        await session.execute(SELECT)


async def commit(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.transaction(slug) as session:
        await session.execute(INSERT)
        yield


async def rollback(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.session(slug) as session:
        await session.execute(INSERT)
        yield


async def savepoint(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.session(slug) as session:
        await session.execute(INSERT)
        async with session.begin_nested():
            yield


async def flush(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.session(slug) as session:
        await session.execute(SELECT)
        session.add_all(Note(body=str(number)) for number in range(100))
        yield
        await session.flush()


async def cancelled(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.session(slug) as session:
        await session.execute(SELECT)
        yield
        async with asyncio.timeout(0.2):
            await session.execute(SLOW)


async def stream(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.session(slug) as session:
        rows = await session.stream(text("SELECT generate_series(1, 100000)"))
        await rows.fetchone()
        yield
        async for _ in rows:
            pass


async def on_the_driver(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.internals.router.connection(await tenancy.tenants.get(slug)) as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        await raw.fetch("SELECT 1")
        yield
        await raw.copy_records_to_table("notes", columns=["body"], records=[("x",)] * 1000)


async def each_answer(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    async for _ in tenancy.query_all("SELECT 1", timeout=2.0):
        pass


async def in_a_thread(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    goes_on = asyncio.Event()
    ready, loop = asyncio.Semaphore(0), asyncio.get_running_loop()

    def work(step: str) -> None:
        with tenancy.sync.session(slug) as session:
            session.execute(INSERT)
            loop.call_soon_threadsafe(ready.release)
            asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result()
            if step == "statement":
                session.execute(SELECT)
            elif step == "commit":
                session.commit()

    threads = [asyncio.create_task(asyncio.to_thread(work, step)) for step in ("statement", "commit", "rollback")]
    for _ in threads:
        await ready.acquire()
    yield
    goes_on.set()
    ended = await asyncio.gather(*threads, return_exceptions=True)
    assert all(isinstance(error, (DBAPIError, TenancyError, OSError)) for error in ended), ended
    raise TimeoutError


async def opening_in_a_thread(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    def work() -> None:
        with tenancy.sync.session(slug) as session:
            session.execute(SELECT)

    yield
    await asyncio.to_thread(work)


# --- administration -------------------------------------------------------------------------------------------------


async def creation(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.tenants.create(f"{slug}-new")


async def suspension(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.tenants.suspend(slug, reason="test")


async def purge(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    await tenancy.tenants.delete(slug)
    yield
    await tenancy.tenants.purge(slug)


async def rotation(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.secrets.rotate_password(slug)


async def migration(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.migrations.upgrade(tenants=[slug])


async def status(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    assert [one.error for one in await tenancy.migrations.status(verify=True, tenants=[slug])] != [None]


async def creation_under_way(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    task = asyncio.create_task(tenancy.tenants.create(f"{slug}-new"))
    await asyncio.sleep(0.03)
    yield
    await task


async def maintenance(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    provisioner = tenancy.internals.provisioner
    reports = await asyncio.gather(
        provisioner.reconcile(),
        provisioner.end_excessive_sessions(),
        tenancy.templates.rebuild(),
        tenancy.internals.sampler.run(),
        return_exceptions=True,
    )
    assert not any(isinstance(report, (AssertionError, AttributeError, TypeError)) for report in reports), reports


async def housekeeping(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.run_housekeeping()


async def temporary_login(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.internals.provisioner.logins.issue(await tenancy.tenants.get(slug))


# --- the control database -------------------------------------------------------------------------------------------


async def look_up(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.internals.directory.tenant("unknown")


async def listing(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.tenants.list()


async def key(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.keys.issue(slug, name="x")


async def quota(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    await tenancy.quotas.set(slug, {"requests": 10})
    yield
    await tenancy.quotas.consume(slug, "requests", 1)


async def quota_under_way(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(SELECT)
        yield
        await connection.execute(SELECT)


async def control_commit(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(SELECT)
        yield


async def control_cancelled(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    async with tenancy.internals.control.transaction() as connection:
        await connection.execute(SELECT)
        yield
        async with asyncio.timeout(0.2):
            await connection.execute(SLOW)


async def history(tenancy: Tenancy, slug: str) -> AsyncGenerator[None, None]:
    yield
    await tenancy.audit.events()


SESSIONS: list[Operation] = [
    *(opening, statement, commit, rollback, savepoint, flush, cancelled, stream, on_the_driver, each_answer),
    *(in_a_thread, opening_in_a_thread),
]
ADMINISTRATION: list[Operation] = [
    *(creation, creation_under_way, suspension, purge, rotation, migration, status, maintenance, housekeeping),
    temporary_login,
]
CONTROL: list[Operation] = [
    *(look_up, listing, key, quota, quota_under_way, control_commit, control_cancelled, history, creation, suspension),
    migration,
]


async def run_all(tenancy: Tenancy, operations: list[Operation], swallow: Callable[[], None]) -> Mapping[str, Any]:
    """Get all ready, swallow, and let all go on; returns the error of each, and None where one has not ended."""
    for operation in operations:
        await tenancy.tenants.create(operation.__name__.replace("_", "-"))
    begun = [operation(tenancy, operation.__name__.replace("_", "-")) for operation in operations]
    for generator in begun:
        await anext(generator)
    swallow()

    async def finish(generator: AsyncGenerator[None, None]) -> str:
        try:
            await anext(generator)
        except StopAsyncIteration:
            return "succeeded"
        except (DBAPIError, TenancyError, OSError) as exc:
            return f"{type(exc).__name__}: {exc}"
        return "goes on"

    names = [operation.__name__ for operation in operations]
    tasks = [asyncio.create_task(finish(generator), name=name) for generator, name in zip(begun, names, strict=True)]
    done, pending = await asyncio.wait(tasks, timeout=DEADLINE)
    for task in pending:
        task.print_stack()
    ended = {task.get_name(): task.result() for task in done}
    return ended | {task.get_name(): None for task in pending}


@pytest.mark.parametrize("operations", [SESSIONS, ADMINISTRATION], ids=("sessions", "administration"))
async def test_every_operation_on_a_server_ends_by_its_deadline(
    tenancy_config: TenancyConfig, postgres: Postgres, tmp_path: Path, operations: list[Operation]
) -> None:
    async with proxied(postgres.admin_url) as proxy, AsyncExitStack() as stack:
        project = Project.create(tmp_path)
        project.add("0001", NOTES)
        config = tenancy_config.replace(
            servers={"default": proxy.url(postgres.admin_url)},
            migrations=project.migrations,
            metadata=None,
            pool={"connect_timeout": CONNECT, "checkout_timeout": CONNECT, "max_connections": 60},
            sessions={"statement_timeout": STATEMENT},
            breaker={"enabled": False},
            provisioning={"timeout": STEP},
            migration={"timeout": STEP, "wait": STEP},
        )
        tenancy = Tenancy(config)
        await tenancy.open(initialise=True)
        stack.push_async_callback(tenancy.close)
        ended = await run_all(tenancy, operations, proxy.swallow)
        assert None not in ended.values(), ended
        assert "succeeded" not in ended.values() or operations is ADMINISTRATION, ended
        async with asyncio.timeout(DEADLINE):
            await stack.aclose()


BATCHES = """

from tenancy_orm.migrations import data_migration

@data_migration(table="notes")
def slow(batch):
    return "SELECT pg_sleep(1)"
"""


@pytest.mark.parametrize("kind", ["revision", "batch"])
async def test_a_migration_under_way_ends_by_its_deadline(
    tenancy_config: TenancyConfig, postgres: Postgres, tmp_path: Path, kind: str
) -> None:
    """In a statement of a revision, and in a batch of a data migration, which ``migration.timeout`` does not bound."""
    project = Project.create(tmp_path)
    project.add("0001", NOTES)
    async with proxied(postgres.admin_url) as proxy:
        config = tenancy_config.replace(
            servers={"default": proxy.url(postgres.admin_url)},
            migrations=project.migrations,
            metadata=None,
            pool={"connect_timeout": CONNECT},
            migration={"timeout": STEP, "wait": STEP, "data_statement_timeout": 2.0},
        )
        async with open_fleet(config, initialise=True) as fleet:
            await fleet.create("acme")
            await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('x')")
            slow = 'op.get_context().opts["tenant"] and op.execute("SELECT pg_sleep(1)")'
            path = project.add("0002", slow if kind == "revision" else "pass", down="0001")
            if kind == "batch":
                path.write_text(path.read_text() + BATCHES)
            await fleet.provisioner.template("default")
            running = asyncio.create_task(fleet.migrations.upgrade())
            async with postgres.connect(fleet.database("acme")) as connection:
                await until(lambda: activity(connection, "wait_event = 'PgSleep'"), 1)
            proxy.swallow()
            async with asyncio.timeout(DEADLINE):
                report = await running
            assert "not done within" in report.reasons["acme"]
            proxy.restore()


async def test_every_operation_on_the_control_database_ends_by_its_deadline(
    tenancy_config: TenancyConfig, control_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Closing the ``Tenancy`` too."""
    assert ControlDatabase.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(ControlDatabase.__init__.__kwdefaults__, "command_timeout", 2.0)
    project = Project.create(tmp_path)
    project.add("0001", NOTES)
    async with proxied(control_url) as proxy:
        config = tenancy_config.replace(
            control_url=proxy.url(control_url),
            migrations=project.migrations,
            metadata=None,
            control={"pool_size": 10},
            pool={"connect_timeout": CONNECT},
            directory={"timeout": CONNECT},
            provisioning={"timeout": STEP},
        )
        tenancy = Tenancy(config)
        await tenancy.open(initialise=True)
        try:
            ended = await run_all(tenancy, CONTROL, proxy.swallow)
            assert None not in ended.values() and "succeeded" not in ended.values(), ended
        finally:
            async with asyncio.timeout(DEADLINE):
                await tenancy.close()


async def test_a_slow_network_that_loses_and_resets_is_no_outage(
    tenancy_config: TenancyConfig, postgres: Postgres
) -> None:
    """Writes go on, none is lost or made twice, and no breaker opens."""
    async with proxied(postgres.admin_url) as proxy:
        config = tenancy_config.replace(
            servers={"default": proxy.url(postgres.admin_url)}, breaker={"timeout": 2.0, "longest_pause": 0.2}
        )
        tenancy = Tenancy(config)
        await tenancy.open(initialise=True)
        try:
            await tenancy.tenants.create("acme")
            proxy.slow_down(0.01, lost=0.1, seed=7)
            writers = [Writers(tenancy, "acme"), Writers(tenancy, "acme", sync=True)]
            async with running(*(writer.write for writer in writers)):
                for _ in range(4):
                    await go_on(writers, seconds=DEADLINE)
                    proxy.cut()
            assert tenancy.internals.servers["default"].breaker.opened_at == 0.0
            proxy.restore()
            for writer in writers:
                await writer.check()
        finally:
            await tenancy.close()
