"""Servers that freeze, crash and start again: their tenants get an error at once, and other servers' tenants none."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic import command
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.asgi.problems import problem_for
from tenancy_orm.config import ServerAddresses
from tenancy_orm.control.database import _alembic_config
from tenancy_orm.errors import LoginRefusedError, ServerUnavailableError, TenancyError
from tenancy_orm.events import Event, ServerDown, ServerUp
from tenancy_orm.routing.outage import lost_server
from tenancy_orm.servers.breaker import Breaker, BreakerState
from tests.support.asgi import request
from tests.support.models import Base
from tests.support.outages import Writers, frozen, go_on, running
from tests.support.postgres import Postgres
from tests.support.processes import opened
from tests.support.proxy import proxied
from tests.support.replication import TestServer, primary_server
from tests.support.shell import ROOT, environment, python_path
from tests.support.waiting import until
from tests.support.warm import run_module

SECONDS = 30.0


@pytest.fixture(scope="module")
def other() -> Iterator[TestServer]:
    """The server that fails."""
    with primary_server() as server:
        yield server


@pytest.fixture
async def house(tenancy_config: TenancyConfig, other: TestServer, postgres: Postgres) -> AsyncIterator[Tenancy]:
    """Two servers: acme is on the good one, eve and mallory on the other."""
    config = tenancy_config.replace(
        servers={"default": postgres.admin_url, "other": other.url()},
        default_server="default",
        pool={"connect_timeout": 2.0, "checkout_timeout": 3.0},
        breaker={"timeout": 1.0, "longest_pause": 0.3, "end_after": 2.0},
    )
    tenancy = Tenancy(config)
    await tenancy.open(initialise=True)
    try:
        await tenancy.tenants.create("acme", server="default")
        await tenancy.tenants.create("eve", server="other")
        await tenancy.tenants.create("mallory", server="other")
        yield tenancy
    finally:
        await tenancy.close()
        await other.as_postgres(postgres).drop_all(config.name_prefix)


def breaker(tenancy: Tenancy) -> Breaker:
    return tenancy.internals.servers["other"].breaker


async def ask(tenancy: Tenancy, slug: str, sql: str = "SELECT 1") -> Any:
    async with tenancy.session(slug) as session:
        return await session.scalar(text(sql))


def ask_sync(tenancy: Tenancy, slug: str, sql: str = "SELECT 1") -> Any:
    with tenancy.sync.session(slug) as session:
        return session.scalar(text(sql))


async def answers(tenancy: Tenancy, slug: str) -> bool:
    try:
        return (await ask(tenancy, slug), await asyncio.to_thread(ask_sync, tenancy, slug)) == (1, 1)
    except (TenancyError, DBAPIError, OSError):
        return False


async def test_a_frozen_server_is_an_error_at_once_for_its_tenants_and_nothing_for_others(
    house: Tenancy, other: TestServer
) -> None:
    """What waits for it ends by its deadline, what comes later at once; when it runs again, so does everything."""
    seen: list[Event] = []
    house.events.subscribe(Event, seen.append)
    assert await answers(house, "eve") and await answers(house, "mallory") and await answers(house, "acme")
    neighbour = Writers(house, "acme")
    refused: list[ServerUnavailableError] = []
    async with running(neighbour.write), asyncio.timeout(SECONDS):
        with frozen(other):
            # on connections that are open already, and on new ones
            waiting = [asyncio.create_task(ask(house, slug)) for slug in ("eve", "mallory") * 4]
            threads = [asyncio.create_task(asyncio.to_thread(ask_sync, house, "eve")) for _ in range(2)]
            await until(lambda: house.internals.router.statistics().down == ("other",), seconds=SECONDS)
            for _ in range(200):
                with pytest.raises(ServerUnavailableError) as caught:
                    await ask(house, "eve")
                refused.append(caught.value)
                with pytest.raises(ServerUnavailableError):
                    await asyncio.to_thread(ask_sync, house, "mallory")
                with pytest.raises(ServerUnavailableError):
                    await house.tenants.create("frank", server="other")
                if all(task.done() for task in (*waiting, *threads)):
                    break
                await asyncio.sleep(0.05)
            ended = await asyncio.gather(*waiting, *threads, return_exceptions=True)
            assert all(isinstance(error, (TenancyError, DBAPIError, OSError)) for error in ended), ended
        await until(lambda: not breaker(house).is_open, seconds=SECONDS)
        await until(lambda: answers(house, "eve"), seconds=SECONDS)
        await until(lambda: answers(house, "mallory"), seconds=SECONDS)
    assert not neighbour.failures and neighbour.acknowledged
    assert refused[0].retry_after is not None and (refused[0].server, refused[0].tenant) == ("other", "eve")
    problem = problem_for(refused[0])
    assert problem is not None and problem.status == 503 and dict(problem.headers)[b"retry-after"] >= b"1"
    await until(lambda: [type(event) for event in seen if isinstance(event, (ServerDown, ServerUp))])
    outages = [event for event in seen if isinstance(event, (ServerDown, ServerUp))]
    assert [type(event) for event in outages] == [ServerDown, ServerUp] and {e.server for e in outages} == {"other"}
    statistics = house.internals.router.statistics().servers["other"]
    assert statistics.in_use == statistics.opening == statistics.waiting == 0


@pytest.mark.parametrize("how", ["session", "statement", "thread"])
async def test_a_request_that_has_waited_for_a_frozen_server_is_answered_503(
    house: Tenancy, other: TestServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When its connection is ended, with a traceback in the log; not for its own errors, and not without mapping."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        sql = {"/slow": "SELECT pg_sleep(0.5)", "/own": "SELECT 1/0"}.get(scope["path"], "SELECT 1")
        if how == "thread":
            await asyncio.to_thread(ask_sync, house, "eve", sql)
        elif how == "statement":
            await house.fetch_value(sql)
        else:
            await ask(house, "eve", sql)
        await PlainTextResponse("answered")(scope, receive, send)

    header = ("X-API-Key", (await house.keys.issue("eve", name="key")).text)
    served = TenancyMiddleware(application, tenancy=house)
    plain = TenancyMiddleware(application, tenancy=house, map_errors=False)
    # so that there is an idle connection for each of them
    await asyncio.gather(*(request(served, "/slow", [header]) for _ in range(2)))
    async with asyncio.timeout(SECONDS):
        with frozen(other):
            asked = [asyncio.create_task(request(app, "/", [header])) for app in (served, plain)]
            await asyncio.wait(asked)
            assert breaker(house).is_open
            answer = asked[0].result()
            assert (answer.status, answer.json()["type"]) == (503, "urn:tenancy:problem:database-unavailable")
            assert (answer.header("retry-after") or "").isdigit()
            assert isinstance(asked[1].exception(), DBAPIError)
            (record,) = [one for one in caplog.records if "was lost during a request" in one.message]
            assert record.levelname == "ERROR" and record.exc_info is not None
            assert isinstance(record.exc_info[1], DBAPIError)
        await until(lambda: answers(house, "eve"), seconds=SECONDS)
        with pytest.raises(DBAPIError, match="division"):
            await request(served, "/own", [header])
        # one that is lost while the server answers is the application's to handle
        with pytest.raises(DBAPIError) as caught:
            await ask(house, "eve", "SELECT pg_terminate_backend(pg_backend_pid())")
        assert lost_server(caught.value) == "other" and served._server_away(caught.value) is None


async def test_those_that_wait_for_a_connection_are_refused_when_the_breaker_opens(
    house: Tenancy, other: TestServer
) -> None:
    """At once, on both sides, and not when their time is over."""
    budget = house.internals.router._connector("other").budget
    async with asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        for _ in range(budget.per_tenant):
            session = await stack.enter_async_context(house.session("eve"))
            await session.scalar(text("SELECT 1"))
        with frozen(other):
            threads = asyncio.create_task(asyncio.to_thread(ask_sync, house, "eve"))
            waiting = [asyncio.create_task(ask(house, "eve")) for _ in range(2)]
            await until(lambda: budget.statistics().waiting == 3)
            waiting[0].cancel()
            breaker(house).suspect()
            errors = await asyncio.gather(threads, *waiting[1:], return_exceptions=True)
            assert [type(error) for error in errors] == [ServerUnavailableError] * 2, errors
            assert all(error.retry_after for error in errors if isinstance(error, ServerUnavailableError))
            assert budget.statistics().waiting == 0 and breaker(house).is_open
        await until(lambda: not breaker(house).is_open, seconds=SECONDS)
    await until(lambda: answers(house, "eve"), seconds=SECONDS)
    assert budget.statistics().waiting == 0


@pytest.mark.parametrize("how", ["halt", "kill", "terminate"])
async def test_writes_go_on_after_a_restart_and_none_is_made_twice(house: Tenancy, other: TestServer, how: str) -> None:
    """A clean restart, a crash, and all backends ended at once, on both sides. The other server's tenant sees none."""
    writers = [Writers(house, "eve"), Writers(house, "mallory"), Writers(house, "eve", sync=True)]
    neighbour = Writers(house, "acme")
    async with running(*(w.write for w in (*writers, *writers[:2], neighbour))), asyncio.timeout(SECONDS):
        await until(lambda: all(len(writer.acknowledged) > 5 for writer in writers), seconds=SECONDS)
        if how == "terminate":
            for _ in range(3):
                ending = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                await asyncio.to_thread(other.query, ending + " AND datid IS NOT NULL")
                await asyncio.sleep(0.1)
        else:
            await asyncio.to_thread(getattr(other, how))
            await asyncio.to_thread(other.start_again)
        await go_on(writers, seconds=10)
    for writer in (*writers, neighbour):
        await writer.check()
    assert not neighbour.failures
    assert breaker(house).state is BreakerState.CLOSED


@pytest.mark.parametrize("how", ["refuse", "swallow"])
async def test_the_administrators_address_is_no_reason_to_refuse_tenants(
    tenancy_config: TenancyConfig, postgres: Postgres, how: str
) -> None:
    """It is another one than tenants connect to: a slow statement of one tenant would cost all of them their server."""
    url = make_url(postgres.admin_url)
    async with proxied(postgres.admin_url) as proxy:
        config = tenancy_config.replace(
            servers={
                "default": ServerAddresses(
                    admin=proxy.url(postgres.admin_url), tenants=f"postgresql://{url.host}:{url.port}"
                )
            },
            breaker={"timeout": 0.2, "end_after": 0.2},
        )
        async with opened(config, initialise=True) as tenancy:
            for slug in ("acme", "globex"):
                await tenancy.tenants.create(slug)
                await tenancy.fetch_value("SELECT 1", tenant=slug)
            getattr(proxy, how)()
            try:
                slow = asyncio.create_task(tenancy.fetch_value("SELECT 'whole' FROM pg_sleep(2)", tenant="acme"))
                while not slow.done():
                    assert await tenancy.fetch_value("SELECT 1", tenant="globex") == 1
                    await asyncio.wait([slow], timeout=0.05)
                assert await slow == "whole"
            finally:
                proxy.restore()


async def test_no_tenant_can_open_the_breaker_of_its_server(
    house: Tenancy, other: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow statements, a locked database, logins that she ends, a lost password, no connection left: others go on."""
    eve = (await house.tenants.get("eve")).placement
    assert eve is not None

    async def neighbour() -> None:
        assert await ask(house, "mallory") == 1
        assert not breaker(house).is_open

    async def fails(slug: str, sql: str = "SELECT 1") -> BaseException:
        with pytest.raises((TenancyError, DBAPIError, OSError)) as caught:
            await ask(house, slug, sql)
        return caught.value

    async with running(neighbour), asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        # longer than the server may be silent, for one connection of hers
        sleeps = asyncio.create_task(ask(house, "eve", "SELECT pg_sleep(2.5)"))
        admin = await asyncpg.connect(other.url())
        stack.push_async_callback(admin.close)
        # a login that waits for a lock on its database
        holder, dropper = await asyncpg.connect(other.url()), await asyncpg.connect(other.url())
        await holder.execute(f'BEGIN; ALTER ROLE "{eve.role}" IN DATABASE "{eve.database}" SET a.b = \'1\'')
        dropping = asyncio.create_task(dropper.execute(f'DROP DATABASE "{eve.database}"'))
        await until(lambda: admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted AND objid > 0"))
        house.internals.router.retire((await house.tenants.get("eve")).id)
        await fails("eve")
        # which her role ends: the server says then (57P01) what it says where it is shut down
        failing = asyncio.create_task(fails("eve"))
        ends = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted AND objid > 0 AND pid <> $1"
        await admin.execute(f'SET ROLE "{eve.role}"')
        while not failing.done():
            await admin.fetch(ends, dropper.get_server_pid())
        await admin.execute("RESET ROLE")
        assert getattr(await failing, "sqlstate", None) == "57P01"
        for pid in (dropper.get_server_pid(), holder.get_server_pid()):
            await admin.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
        await asyncio.gather(dropping, return_exceptions=True)
        await asyncio.gather(sleeps, return_exceptions=True)
        await admin.execute(f'ALTER ROLE "{eve.role}" CONNECTION LIMIT 0')
        await fails("eve")
        await admin.execute(f"ALTER ROLE \"{eve.role}\" CONNECTION LIMIT -1 PASSWORD 'another'")
        assert isinstance(await fails("eve"), LoginRefusedError)
        await admin.execute(f'DROP DATABASE "{eve.database}" WITH (FORCE)')
        assert isinstance(await fails("eve"), LoginRefusedError)
        await until(lambda: breaker(house)._probing is None)

    # what happens where the probe's answer is lost: these were reasons to ask
    async def no_answer() -> None:
        raise TimeoutError

    monkeypatch.setattr(breaker(house), "_probe", no_answer)
    breaker(house).suspect()
    await until(lambda: breaker(house).is_open)
    assert isinstance(await fails("mallory"), ServerUnavailableError)


async def test_a_password_and_a_database_change_under_open_pools(house: Tenancy, other: TestServer) -> None:
    """A rotation fails no write. A database that was renamed by hand is found once the registry has its name."""
    eve = await house.tenants.get("eve")
    assert eve.placement is not None
    old, new = eve.placement.database, f"{eve.placement.database}_m"
    writers = [Writers(house, "eve"), Writers(house, "eve", sync=True)]
    async with running(*(writer.write for writer in writers)), asyncio.timeout(SECONDS):
        await go_on(writers, seconds=SECONDS)
        for _ in range(3):
            await house.secrets.rotate_password("eve")
            house.internals.router.retire(eve.id)  # so that new connections need the new one
        await go_on(writers, seconds=SECONDS)
        assert [writer.failures for writer in writers] == [{}, {}]
        admin = await asyncpg.connect(other.url())
        await admin.execute(f'ALTER DATABASE "{old}" ALLOW_CONNECTIONS false')
        ending = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datname = $1"
        await admin.execute(f'ALTER DATABASE "{old}" CONNECTION LIMIT 0')
        await admin.fetchval(ending, old)
        await admin.execute(f'ALTER DATABASE "{old}" RENAME TO "{new}"')
        await admin.execute(f'ALTER DATABASE "{new}" CONNECTION LIMIT -1')
        await admin.execute(f'ALTER DATABASE "{new}" ALLOW_CONNECTIONS true')
        await admin.close()
        await until(lambda: all(writer.failures for writer in writers))
        async with house.internals.control.transaction() as connection:
            moving = text("UPDATE tenancy.tenants SET database_name = :new WHERE id = :id")
            await connection.execute(moving, {"new": new, "id": eve.id})
        await go_on(writers, seconds=10)
    for writer in writers:
        await writer.check()
    assert breaker(house).opened_at == 0.0


async def downgrade(tenancy: Tenancy) -> None:
    """Leave the control database as a former version had it, and close."""
    async with tenancy.internals.control.connect() as connection:
        await connection.run_sync(lambda sync: command.downgrade(_alembic_config(sync), "0014_schedules"))
        await connection.commit()
    await tenancy.close()


async def test_an_upgrade_of_the_package_passes_over_a_server_that_is_down(
    house: Tenancy, other: TestServer, tmp_path: Path
) -> None:
    """``tenancy init`` upgrades the control database, prepares the others and names it; new code works from then on."""
    config = house.config
    assert config.servers is not None and config.encryption_keys is not None
    variables = environment(
        TENANCY_CONTROL_URL=config.control_url,
        TENANCY_SERVERS=",".join(f"{name}={url}" for name, url in config.servers.items()),
        TENANCY_ENCRYPTION_KEYS=",".join(f"{name}:{key!s}" for name, key in config.encryption_keys.items()),
        TENANCY_NAME_PREFIX=config.name_prefix,
        TENANCY_DEFAULT_SERVER="default",
        TENANCY_POOL_CONNECT_TIMEOUT="2",
        PYTHONPATH=python_path(ROOT),
        COLUMNS="200",
        NO_COLOR="1",
    )
    (tmp_path / "tenancy.toml").write_text('metadata = "tests.support.models:Base.metadata"\n')

    async def init(*arguments: str) -> Any:
        return await run_module("tenancy_orm.cli", "init", *arguments, cwd=tmp_path, env=variables)

    await downgrade(house)
    upgrade = "the control database is upgraded from 0014_schedules to 0027_control_backups"
    with frozen(other):
        planned = await init("--dry-run")
        assert (planned.status, upgrade in planned.out) == (0, True), planned.err
        assert "server 'other' is not available" in planned.out
        done = await init("--yes")
        assert done.status == 1 and upgrade in done.out and upgrade.replace("is", "was") in done.out, done.err
        assert "servers that are not prepared: other; the control database and the other servers are" in done.err
        assert "Run tenancy init again" in done.err and "no answer in time" in done.err
        assert list(json.loads((await init("--json")).out)["unprepared"]) == ["other"]
        async with Tenancy(config) as tenancy:
            assert await ask(tenancy, "acme") == 1
            with pytest.raises((TenancyError, DBAPIError, OSError)):
                await ask(tenancy, "eve")
    again = await init()
    assert again.status == 0 and "upgraded" not in again.out, again.err


@pytest.mark.parametrize("how", ["frozen", "password"])
async def test_an_opening_that_initialises_goes_on_without_a_server(
    house: Tenancy, other: TestServer, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Its tenants get their errors, everybody else works, and what is said is what happened."""
    await downgrade(house)
    config, servers = house.config, house.config.servers
    assert servers is not None
    if how == "password":
        address = other.url().replace("://postgres:", "://postgres:not")
        assert address != other.url()
        config = config.replace(servers={"default": servers["default"], "other": address})
    tenancy = Tenancy(config)
    with frozen(other) if how == "frozen" else nullcontext(), caplog.at_level(logging.WARNING, "tenancy_orm"):
        await tenancy.open(initialise=True)
        try:
            assert await ask(tenancy, "acme") == 1
            assert list(tenancy.internals.provisioner.unprepared) == ["other"]
            with pytest.raises(TenancyError, match="password authentication" if how == "password" else "not available"):
                await tenancy.tenants.create("frank", server="other")
        finally:
            await tenancy.close()
    [said] = [record.getMessage() for record in caplog.records if "could not be prepared" in record.getMessage()]
    assert "CREATEDB" not in said
    assert ("servers update other --admin ... --password-stdin" in said) is (how == "password")


async def test_an_embedded_control_database_opens_for_the_repair_of_a_server(other: TestServer, tmp_path: Path) -> None:
    """It initialises at each start: a password that was changed must not keep away the command that corrects it."""
    other.query("CREATE ROLE repaired SUPERUSER LOGIN PASSWORD 'former'")
    config = TenancyConfig(control_url=f"embedded:{tmp_path}/data", metadata=Base.metadata, name_prefix="repaired")
    address = "postgresql://repaired:{}@" + other.url().split("@")[1]
    async with Tenancy(config) as tenancy:
        await tenancy.servers.add("eu", address.format("former"))
        await tenancy.tenants.create("acme", server="default")
    other.query("ALTER ROLE repaired PASSWORD 'changed'")
    async with Tenancy(config) as tenancy:
        assert list(tenancy.internals.provisioner.unprepared) == ["eu"]
        assert await ask(tenancy, "acme") == 1
        await tenancy.servers.update("eu", addresses=address.format("changed"))
        await tenancy.tenants.create("eve", server="eu")
