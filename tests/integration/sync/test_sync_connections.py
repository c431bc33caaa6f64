"""Connections of threads: within one budget with those of coroutines, behind a pooler, interrupted, closed in use."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from tenancy_orm import Tenancy, TenancyConfig, TenancyError
from tenancy_orm.config import ServerAddresses
from tenancy_orm.errors import EventLoopBlockedError, NotOpenError, SecretError, ServerUnavailableError
from tenancy_orm.sync import hops, pool
from tenancy_orm.sync.hops import Answer
from tenancy_orm.sync.tenancy import hops_of
from tenancy_orm.testing.embedded import fast_directory
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import Postgres
from tests.support.shell import python_path
from tests.support.waiting import HANGS, until


@asynccontextmanager
async def _opened(config: TenancyConfig) -> AsyncIterator[Tenancy]:
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        yield tenancy
    finally:
        await tenancy.close()


_COUNTS = "SELECT usename, count(*) FROM pg_stat_activity WHERE starts_with(usename, $1) GROUP BY usename"


async def test_never_more_connections_than_allowed(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """PostgreSQL itself counts, while threads and coroutines of three tenants compete for four slots."""
    config = tenancy_config.replace(
        pool={"max_connections": 4, "max_connections_per_tenant": 2, "checkout_timeout": 60}
    )
    async with _opened(config) as tenancy, postgres.connect() as admin:
        slugs = ["acme", "globex", "initech"]
        for slug in slugs:
            await tenancy.tenants.create(slug)
        stem = tenancy.internals.provisioner.names.stem + "_t_"
        done: list[str] = []
        ended = asyncio.Event()

        def in_thread(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(25):
                with tenancy.sync.session(chance.choice(slugs)) as session:
                    session.execute(text("SELECT pg_sleep(0.001)"))
                done.append("thread")

        async def in_task(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(25):
                async with tenancy.session(chance.choice(slugs)) as session:
                    await session.execute(text("SELECT pg_sleep(0.001)"))
                done.append("task")

        async def count() -> list[dict[str, int]]:
            found = []
            while not ended.is_set():
                found.append(dict(await admin.fetch(_COUNTS, stem)))
                await asyncio.sleep(0)
            return found

        counting = asyncio.create_task(count())
        await asyncio.gather(*(asyncio.to_thread(in_thread, n) for n in range(5)), *(in_task(n) for n in range(5)))
        ended.set()
        counts = await counting
        assert done.count("thread") == done.count("task") == 125
        assert max(sum(one.values()) for one in counts) == 4
        assert max(max(one.values(), default=0) for one in counts) == 2
        statistics = tenancy.internals.router.statistics().servers["default"]
        assert statistics.open == statistics.idle
        assert (statistics.opening, statistics.closing, statistics.waiting, statistics.in_use) == (0, 0, 0, 0)


async def test_neither_kind_starves_the_other_at_a_tenants_limit(tenancy_config: TenancyConfig) -> None:
    """With one connection for a tenant, threads and coroutines take turns, though each change costs a login."""
    config = tenancy_config.replace(pool={"max_connections": 4, "max_connections_per_tenant": 1})
    async with _opened(config) as tenancy:
        await tenancy.tenants.create("acme")
        order: list[str] = []

        def in_thread() -> None:
            for _ in range(4):
                tenancy.sync.fetch_value("SELECT 1", tenant="acme")
                order.append("thread")

        async def in_task() -> None:
            while order.count("thread") < 8:
                assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
                order.append("task")

        async with asyncio.timeout(HANGS):
            await asyncio.gather(*(asyncio.to_thread(in_thread) for _ in range(2)), in_task(), in_task())
        assert "task" in order


async def test_a_dialect_of_its_own_would_find_the_same(tenancy: Tenancy, postgres: Postgres) -> None:
    """What the synchronous dialect takes from the asynchronous one is what it would read from the server itself."""
    created = await tenancy.tenants.create("acme")
    assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1
    assert created.tenant.placement is not None
    engine = create_engine(postgres.url(created.tenant.placement.database, driver="psycopg"), use_native_hstore=False)

    def read() -> None:
        with engine.connect():
            pass
        engine.dispose()

    await asyncio.to_thread(read)
    ours = await asyncio.to_thread(lambda: _dialect(tenancy))
    names = vars(engine.dialect).keys() - {"_psycopg_adapters_map", "_type_memos", "use_native_hstore"}
    plain = {name for name in names if isinstance(getattr(engine.dialect, name), (bool, int, str, tuple, type(None)))}
    assert {n: getattr(ours, n) for n in plain} == {n: getattr(engine.dialect, n) for n in plain}


def _dialect(tenancy: Tenancy) -> object:
    with tenancy.sync.session("acme") as session:
        return session.connection().dialect


async def test_behind_a_pooler(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """PgBouncer takes no ``options``: what it tracks is set after the login, whatever the tenant's role has set."""
    with pgbouncer(postgres) as bouncer:
        addresses = ServerAddresses(admin=postgres.admin_url, tenants=bouncer.address)
        async with _opened(tenancy_config.replace(servers={"default": addresses})) as tenancy:
            created = await tenancy.tenants.create("acme")
            assert created.tenant.placement is not None
            async with postgres.connect() as admin:
                await admin.execute(f"ALTER ROLE \"{created.tenant.placement.role}\" SET timezone TO 'Asia/Tokyo'")
                expected = await admin.fetchval("SHOW timezone")
            for _ in range(3):
                assert await asyncio.to_thread(tenancy.sync.fetch_value, "SHOW timezone", tenant="acme") == expected


async def test_a_server_that_does_not_say_whose_database_it_is_is_not_waited_for_for_long(
    tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as for the login, and not as long as a statement of the application's may take."""
    async with _opened(tenancy_config.replace(pool={"connect_timeout": 2.0})) as tenancy:
        await tenancy.tenants.create("acme")
        assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1
        tenancy.internals.router.retire((await tenancy.tenants.get("acme")).id)
        with monkeypatch.context() as patch:
            patch.setattr(pool, "proof", lambda _: "SELECT pg_catalog.pg_sleep(60)")
            with pytest.raises(ServerUnavailableError, match="no answer within 2 seconds"):
                await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme")
        assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1


async def test_an_interrupted_thread_keeps_no_slot(tenancy: Tenancy) -> None:
    """What is answered after nobody waits any more is undone: a connection goes back, a look-up is cancelled."""
    returned: list[int] = []
    putting = await asyncio.to_thread(lambda: hops_of(tenancy.sync))
    answer: Answer[int] = Answer(returned.append)
    answer.abandon()
    answer.set_result(1)
    served: Answer[int] = Answer(returned.append)
    served.set_result(2)
    served.abandon()
    assert returned == [1, 2]
    cancelled = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    pending: Answer[None] = Answer()

    def interrupted() -> None:
        putting.put(pending, pending.start, forever)
        with pytest.raises(TimeoutError):
            putting.wait(pending, 0.05)
        putting.post(pending.abandon)

    await asyncio.to_thread(interrupted)
    await asyncio.wait_for(cancelled.wait(), 10)


async def test_a_loop_that_waits_for_a_thread_is_not_waited_for_for_ever(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would wait for the other. The thread gets an error that names the remedy, and keeps no lease and no slot."""
    await tenancy.tenants.create("acme")
    monkeypatch.setattr(hops, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(hops, "_BLOCKED_LOOKS", 4)
    statistics = tenancy.internals.router.statistics
    with ThreadPoolExecutor(1) as pool:
        # a loop that is busy for a shorter time only delays the thread
        for blocked in (True, False):
            future = pool.submit(tenancy.sync.fetch_value, "SELECT 1", tenant="acme")
            if blocked:
                with pytest.raises(EventLoopBlockedError, match="to_thread"):
                    future.result(10)
            else:
                wait([future], 0.1)
                assert await asyncio.wrap_future(future) == 1
        opened = await asyncio.wrap_future(pool.submit(tenancy.sync.session, "acme"))
        session = await asyncio.wrap_future(pool.submit(opened.__enter__))
        with pytest.raises(EventLoopBlockedError):
            pool.submit(session.scalar, text("SELECT 1")).result(10)
        await asyncio.wrap_future(pool.submit(opened.__exit__, None, None, None))
    await until(lambda: statistics().servers["default"].idle == statistics().servers["default"].open == 1)
    assert statistics().leased == 0


async def test_a_blocked_loop_costs_no_slot_of_a_thread_that_gives_up(
    tenancy_config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First its time is up, and then nobody takes back what it has asked for."""
    async with _opened(tenancy_config.replace(pool={"checkout_timeout": 0.2})) as tenancy:
        await tenancy.tenants.create("acme")
        await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme")
        monkeypatch.setattr(hops, "_LOOK_SECONDS", 0.05)
        monkeypatch.setattr(hops, "_BLOCKED_LOOKS", 4)
        statistics = tenancy.internals.router.statistics
        with ThreadPoolExecutor(3) as pool:
            opened = [await asyncio.wrap_future(pool.submit(tenancy.sync.session, "acme")) for _ in range(3)]
            sessions = [await asyncio.wrap_future(pool.submit(one.__enter__)) for one in opened]
            futures = [pool.submit(session.scalar, text("SELECT 1")) for session in sessions]
            for future in futures:
                with pytest.raises(EventLoopBlockedError):
                    future.result(10)
            for one in opened:
                await asyncio.wrap_future(pool.submit(one.__exit__, None, None, None))
        await until(lambda: statistics().servers["default"].idle == statistics().servers["default"].open)
        assert statistics().servers["default"].opening == 0
        assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1


async def test_a_coroutine_that_is_cancelled_before_it_begins_is_told() -> None:
    """It cannot clean up itself."""
    told: list[str] = []
    answer: Answer[None] = Answer(unbegun=lambda: told.append("unbegun"))

    async def work() -> None:
        told.append("begun")

    answer.start(work)
    answer.abandon()
    await until(lambda: bool(told))
    assert told == ["unbegun"]


async def test_a_variable_of_libpqs_does_not_lead_to_another_server(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor to another address of it: threads connect where coroutines do."""
    await tenancy.tenants.create("acme")
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.9")
    assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
    assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1


async def test_a_password_under_a_key_that_came_later_is_found(
    tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the asynchronous side finds it: another process has made the key. And where there is none, no slot is lost."""
    created = await tenancy.tenants.create("acme")
    assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1
    router = tenancy.internals.router
    (connector,) = router._connectors.values()
    inner = connector._keyring.open_password
    unknown = 1

    def open_password(*args: Any) -> str:
        nonlocal unknown
        unknown -= 1
        if unknown >= 0:
            raise SecretError("sealed with key 'x', which is not configured")
        return inner(*args)

    monkeypatch.setattr(connector._keyring, "open_password", open_password)
    for times, found in ((1, True), (100, False)):
        unknown = times
        router.retire(created.tenant.id)
        if found:
            assert await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme") == 1
        else:
            with pytest.raises(SecretError, match="sealed with key"):
                await asyncio.to_thread(tenancy.sync.fetch_value, "SELECT 1", tenant="acme")
    await until(lambda: router.statistics().servers["default"].open == 0)


async def test_closing_does_not_wait_for_a_thread_for_ever(tenancy_config: TenancyConfig) -> None:
    """A thread that is in a statement gets an error when its socket is cut, and one that comes later NotOpenError."""
    tenancy = Tenancy(tenancy_config)
    await tenancy.open(initialise=True)
    await tenancy.tenants.create("acme")
    began = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with tenancy.sync.session("acme") as session:
                session.scalar(text("SELECT 1"))
                began.set()
                session.scalar(text("SELECT pg_sleep(60)"))
        except (DBAPIError, TenancyError) as exc:
            errors.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    await asyncio.to_thread(began.wait, 30)
    await tenancy.internals.router.close(timeout=0.2)
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()
    assert len(errors) == 1
    sync = tenancy.sync
    await tenancy.close()
    with pytest.raises(NotOpenError):
        await asyncio.to_thread(sync.session, "acme")


_SCRIPT = """
import sys, threading, time
from tenancy_orm import Tenancy
tenancy = Tenancy()
tenancy.sync.open()
print("open", flush=True)
if sys.argv[1] == "wait":
    async def wait():
        print("waits", flush=True)
        await __import__("asyncio").sleep(60)
    tenancy.sync.call(wait)
elif sys.argv[1] == "thread":
    def work():
        time.sleep(0.3)
        print(tenancy.sync.is_open, flush=True)
    threading.Thread(target=work).start()
"""


@pytest.mark.parametrize(("how", "status", "out"), [("end", 0, "open\n"), ("thread", 0, "open\nTrue\n")])
def test_a_process_that_closes_nothing_ends(tenancy_config: TenancyConfig, how: str, status: int, out: str) -> None:
    """At its exit, after its other threads; without a warning."""
    done = _run(tenancy_config, how)
    stdout, stderr = done.communicate(timeout=60)
    assert (done.returncode, stdout, stderr) == (status, out, "")


def test_a_process_that_closes_nothing_stops_its_own_server(tmp_path: Path) -> None:
    """What its closing would do in a thread is done although Python starts no more threads; without a warning."""
    work = "tenancy.sync.call(tenancy.tenants.create, 'acme'); tenancy.sync.fetch_value('SELECT 1', tenant='acme')"
    with tempfile.TemporaryDirectory(dir=fast_directory()) as data:
        Path(data).chmod(0o711)  # the server may run as another account
        done = subprocess.run(
            [sys.executable, "-c", f"{_SCRIPT}\n{work}", "end"],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("TENANCY_")},
                "TENANCY_CONTROL_URL": f"embedded:{data}/server",
                "TENANCY_METADATA": "tests.support.models:Base.metadata",
                "PYTHONPATH": python_path(),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "open\n", "")
        assert list(Path(data).rglob("PG_VERSION"))
        assert not list(Path(data).rglob("postmaster.pid"))


def test_ctrl_c_ends_a_call(tenancy_config: TenancyConfig) -> None:
    """The main thread raises KeyboardInterrupt at once, and the process ends."""
    process = _run(tenancy_config, "wait")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["open\n", "waits\n"]
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in stderr
    assert process.returncode == -signal.SIGINT


def _run(config: TenancyConfig, *arguments: str) -> subprocess.Popen[str]:
    tenancy = Tenancy(config)
    tenancy.sync.open(initialise=True)
    tenancy.sync.close()
    keys = ",".join(f"{key}:{value!s}" for key, value in (config.encryption_keys or {}).items())
    variables = {
        "TENANCY_CONTROL_URL": config.control_url,
        "TENANCY_SERVERS": " ".join(f"{name}={url}" for name, url in (config.servers or {}).items()),
        "TENANCY_ENCRYPTION_KEYS": keys,
        "TENANCY_NAME_PREFIX": config.name_prefix,
        "TENANCY_METADATA": "tests.support.models:Base.metadata",
        "PYTHONPATH": python_path(),
    }
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *arguments],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
