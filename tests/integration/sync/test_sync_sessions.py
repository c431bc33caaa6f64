"""``tenancy.sync``: from worker threads of an application's event loop, and in a process without one."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text

from tenancy_orm import Tenancy, TenancyConfig, current_tenant_or_none
from tenancy_orm.errors import CrossTenantError, FleetQueryError, NoTenantError, NotOpenError, WrongEventLoopError
from tests.support.models import Note
from tests.support.waiting import until


async def test_a_worker_thread_works_on_the_tenant_that_is_bound_where_it_was_started(tenancy: Tenancy) -> None:
    """As a ``def`` endpoint does; what it wrote is there for asynchronous code."""
    await tenancy.tenants.create("acme")

    def work() -> list[str]:
        with tenancy.sync.transaction() as session:
            session.add(Note(body="from a thread"))
        with tenancy.sync.session() as session:
            return list(session.scalars(select(Note.body)))

    async with tenancy.scope("acme"):
        assert await asyncio.to_thread(work) == ["from a thread"]
        async with tenancy.session() as session:
            assert list(await session.scalars(select(Note.body))) == ["from a thread"]


async def test_textual_sql_scopes_and_loops_are_as_on_the_asynchronous_side(tenancy: Tenancy) -> None:
    """Each tenant is bound in turn; the binding ends with the block and with the loop."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.create("globex")
    sync = tenancy.sync

    def work() -> None:
        with pytest.raises(NoTenantError), sync.session():
            pass
        for tenant in sync.each():
            assert sync.execute("INSERT INTO notes (body) VALUES (:body)", {"body": tenant.slug}) == 1
        assert current_tenant_or_none() is None
        for _ in sync.each():
            break
        assert current_tenant_or_none() is None
        with sync.scope("globex") as tenant:
            assert sync.fetch_value("SELECT body FROM notes") == tenant.slug == "globex"
            assert sync.fetch_one("SELECT body FROM notes WHERE body = :b", {"b": "acme"}) is None
            with pytest.raises(CrossTenantError), sync.session("acme"):
                pass
        assert sync.run("acme", lambda extra: (sync.fetch_all("SELECT body FROM notes"), extra), 1) == ([("acme",)], 1)
        assert sync.run("acme", tenancy.fetch_value, "SELECT body FROM notes") == "acme"
        assert sync.call(tenancy.tenants.get, "acme").slug == "acme"
        answers = {tenant.slug: list(rows) for tenant, rows in sync.query_all("SELECT body FROM notes")}
        assert answers == {"acme": [("acme",)], "globex": [("globex",)]}
        with sync.query_all("SELECT nothing") as failing, pytest.raises(FleetQueryError):
            next(failing)

    await asyncio.to_thread(work)


async def test_in_the_thread_of_the_event_loop_it_is_refused_at_once(tenancy: Tenancy) -> None:
    """It would wait for itself for ever. The message names the remedy."""
    await tenancy.tenants.create("acme")
    for use in (tenancy.sync.session, tenancy.sync.scope("acme").__enter__, tenancy.sync.open):
        with pytest.raises(WrongEventLoopError, match="to_thread"):
            use()
    opened = await asyncio.to_thread(lambda: tenancy.sync.session("acme"))
    session = await asyncio.to_thread(opened.__enter__)
    await asyncio.to_thread(session.scalar, text("SELECT 1"))
    for later in (lambda: session.scalar(text("SELECT 1")), session.commit, session.close):
        with pytest.raises(WrongEventLoopError, match="to_thread"):
            later()
    await asyncio.to_thread(opened.__exit__, None, None, None)


async def test_what_is_left_out_is_named(tenancy: Tenancy) -> None:
    """A session that is not entered, and a coroutine in place of its function; no coroutine is left over."""
    await tenancy.tenants.create("acme")
    with pytest.raises(AttributeError, match=r"'execute'; use: async with tenancy\.session"):
        tenancy.session("acme").execute  # type: ignore[attr-defined]  # noqa: B018

    def work() -> None:
        with pytest.raises(AttributeError, match=r"'begin'; use: with tenancy\.sync\.session"):
            tenancy.sync.session("acme").begin  # type: ignore[attr-defined]  # noqa: B018
        with pytest.raises(TypeError, match=r"tenancy\.sync\.call\(tenancy\.tenants\.create"):
            tenancy.sync.call(tenancy.tenants.get("acme"))  # type: ignore[arg-type]

    await asyncio.to_thread(work)


def test_a_script_opens_it_in_a_thread_of_its_own(tenancy_config: TenancyConfig) -> None:
    """The thread ends with the block; blocks may be nested, and it may be opened again."""
    tenancy = Tenancy(tenancy_config)
    with pytest.raises(NotOpenError, match=r"tenancy\.sync\.open"):
        tenancy.sync.session("acme")
    threads = threading.active_count()
    tenancy.sync.open(initialise=True)
    with tenancy.sync as sync, tenancy.sync:
        sync.call(tenancy.tenants.create, "acme")
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(lambda n: sync.fetch_value(f"SELECT {n}", tenant="acme"), range(20))) == sum(range(20))
    assert not tenancy.is_open
    assert threading.active_count() == threads
    with tenancy.sync:
        assert tenancy.sync.fetch_value("SELECT 1", tenant="acme") == 1


def test_a_forked_process_opens_its_own(tenancy_config: TenancyConfig) -> None:
    """What was opened before the fork belongs to the parent, which goes on with it; the child may open it as well."""
    tenancy = Tenancy(tenancy_config)
    tenancy.sync.open(initialise=True)
    try:
        tenancy.sync.call(tenancy.tenants.create, "acme")
        with tenancy.sync.session("acme") as session:
            assert session.scalar(text("SELECT 1")) == 1
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    refused = 0
                    for use in (tenancy.sync.session, lambda: session.scalar(text("SELECT 2"))):
                        try:
                            use()
                        except WrongEventLoopError as exc:
                            refused += "after the fork" in str(exc)
                    tenancy.sync.close()
                    with tenancy.sync as own:
                        assert own.fetch_value("SELECT 2", tenant="acme") == 2
                    status = 0 if refused == 2 else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert session.scalar(text("SELECT 3")) == 3
        assert tenancy.sync.fetch_value("SELECT 4", tenant="acme") == 4
    finally:
        tenancy.sync.close()


async def test_connections_of_both_kinds_share_the_slots(tenancy: Tenancy) -> None:
    """An idle one of a thread is closed for a coroutine, and the other way round; never are there more than allowed."""
    config = tenancy.config.pool
    await tenancy.tenants.create("acme")
    budget = tenancy.internals.router.statistics

    def hold(count: int) -> None:
        barrier = threading.Barrier(count)

        def one() -> None:
            with tenancy.sync.session("acme") as session:
                session.scalar(text("SELECT 1"))
                barrier.wait(30)

        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(one) for _ in range(count)]:
                future.result()

    async def hold_async(count: int) -> None:
        barrier = asyncio.Barrier(count)

        async def one() -> None:
            async with tenancy.session("acme") as session:
                await session.scalar(text("SELECT 1"))
                await barrier.wait()

        await asyncio.gather(*(one() for _ in range(count)))

    limit = config.max_connections_per_tenant
    for _ in range(2):
        await asyncio.to_thread(hold, limit)
        await until(lambda: budget().servers["default"].idle == limit)
        assert budget().servers["default"].open == limit
        await hold_async(limit)
        await until(lambda: budget().servers["default"].idle == limit)
        assert budget().servers["default"].open == limit
