"""Connections that another process holds are given up on request. Two routers stand for two processes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm.config import TenancyConfig, Tier
from tenancy_orm.control.notifications import ConnectionRequest
from tenancy_orm.errors import CheckoutTimeoutError, ConnectionLimitError, ControlUnavailableError
from tenancy_orm.routing import Router, connector, shortage
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.databases import Databases
from tests.support.waiting import until

LIMIT = 3
"""What a tenant's role may have here, and what each process may hold."""


async def ask(router: Router, tenant: Tenant, sql: str = "SELECT 1") -> Any:
    async with router.session(tenant) as session:
        return await session.scalar(text(sql))


async def fill(router: Router, tenant: Tenant, count: int = LIMIT) -> None:
    """Leave a process with idle connections of a tenant."""
    async with AsyncExitStack() as stack:
        for _ in range(count):
            await stack.enter_async_context(router.connection(tenant))


def idle(router: Router) -> int:
    return router.statistics().servers["default"].idle


@asynccontextmanager
async def processes(
    made: Databases, config: TenancyConfig, count: int = 2, *, hand_over: bool = True, **options: Any
) -> AsyncIterator[list[Router]]:
    """Several routers; their requests reach all of them, the one that asks too, as the control database sends them."""
    routers: list[Router] = []

    async def send(requests: Sequence[ConnectionRequest]) -> None:
        for payload in [request.payload for request in requests]:
            for router in routers:
                request = ConnectionRequest.parse(payload)
                assert request is not None
                router.give_up(request)

    async with AsyncExitStack() as stack:
        for _ in range(count):
            opened = support.router(made, config, ask=send if hand_over else None, **options)
            routers.append(await stack.enter_async_context(opened))
        yield routers


@asynccontextmanager
async def busy(router: Router, tenant: Tenant, requests: int = 9) -> AsyncIterator[list[int]]:
    """Keep all connections of a tenant in use, with more requests waiting; yields a list that counts the answers."""
    answers: list[int] = []

    async def work() -> None:
        while True:
            answers.append(await ask(router, tenant, "SELECT 1 FROM pg_sleep(0.01)"))

    tasks = [asyncio.create_task(work()) for _ in range(requests)]
    try:
        await until(lambda: len(answers) > requests)
        yield answers
        assert not any(task.done() for task in tasks), "a request failed"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def short(config: TenancyConfig) -> TenancyConfig:
    """Requests wait for two seconds at most: for those that get no connection."""
    return config.replace(pool={"checkout_timeout": 2.0})


@pytest.fixture
def patient(config: TenancyConfig) -> TenancyConfig:
    """Requests wait for a minute: for those that get one, however slow the machine is."""
    return config.replace(pool={"checkout_timeout": 60.0})


@pytest.mark.parametrize("state", [fill, busy], ids=["idle", "busy"])
async def test_without_the_hand_over_another_process_is_starved(
    made: Databases, short: TenancyConfig, state: Callable[..., Any]
) -> None:
    """The fault: one process holds all connections of a tenant, idle or busy, and the other gets none."""
    a = await made.create(connection_limit=LIMIT)
    async with processes(made, short, hand_over=False) as (first, second), AsyncExitStack() as stack:
        if state is fill:
            await fill(first, a)
        else:
            await stack.enter_async_context(busy(first, a))
        with pytest.raises(ConnectionLimitError):
            await ask(second, a)


async def test_idle_connections_of_another_process_are_given_up(made: Databases, patient: TenancyConfig) -> None:
    """A process that has none gets one soon, and the processes can take turns."""
    a = await made.create(connection_limit=LIMIT)
    taken = []
    async with processes(made, patient) as (first, second):
        for _ in range(6):
            for has, wants in ((first, second), (second, first)):
                await fill(has, a)
                began = time.monotonic()
                assert await ask(wants, a) == 1
                taken.append(time.monotonic() - began)
    # the fastest: the others tell how busy the machine is
    assert min(taken) < 1


async def test_a_busy_process_gives_up_a_connection(made: Databases, patient: TenancyConfig) -> None:
    """A process under constant load does not starve another, and loses no request itself."""
    a = await made.create(connection_limit=LIMIT)
    async with processes(made, patient) as (first, second), busy(first, a) as answers:
        for _ in range(5):
            assert await ask(second, a) == 1
        before = len(answers)
        await until(lambda: len(answers) > before + 5)


async def test_two_busy_processes_share(made: Databases, patient: TenancyConfig) -> None:
    """With a limit of one connection, too, requests of both are answered. Neither stops before the other has some."""
    a = await made.create(connection_limit=1)
    async with processes(made, patient) as (first, second):
        answered = {first: 0, second: 0}

        async def run(router: Router) -> None:
            while min(answered.values()) < 100:
                assert await ask(router, a) == 1
                answered[router] += 1

        await asyncio.gather(*(run(router) for router in (first, second) for _ in range(4)))


async def test_other_tenants_keep_their_connections(made: Databases, short: TenancyConfig) -> None:
    """A tenant at the limit of its own role costs no other tenant a connection, in whichever process."""
    a, b = await made.create(connection_limit=1), await made.create()
    assert a.placement is not None
    role = a.placement.role
    async with processes(made, short) as (first, second):
        await fill(first, b, 2)
        await fill(second, b, 2)
        url = made.postgres.url(role, user=role, password=made.passwords[a.id])
        hostile = await asyncpg.connect(url)
        try:
            with pytest.raises(ConnectionLimitError):
                await ask(first, a)
        finally:
            await hostile.close()
        assert (idle(first), idle(second)) == (2, 2)


async def test_a_process_finds_out_that_the_server_is_full(
    made: Databases, config: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PostgreSQL's figures, which are changed here; then it closes another tenant's connection, if it has one."""
    figures = shortage._LIMITS.replace("r.rolconnlimit AS", "-1 AS").replace(
        "'max_connections')::int", "'port')::int * 0"
    )
    monkeypatch.setattr(
        shortage, "_LIMITS", figures.replace("current_setting('superuser_reserved_connections')::int", "0")
    )
    a, b = await made.create(connection_limit=0), await made.create()
    small = config.replace(pool={"checkout_timeout": 1.0})
    async with processes(made, small) as (first, second):
        await fill(first, b, 1)
        await fill(second, b, 1)
        with pytest.raises(ConnectionLimitError) as caught:
            await ask(first, a)
        assert (idle(first), idle(second)) == (0, 1)
    assert "max_connections of the PostgreSQL server" in caught.value.setting


async def test_a_process_that_has_some_leaves_another_one(made: Databases, config: TenancyConfig) -> None:
    """Where the asking process has connections, the other keeps one of its own."""
    a = await made.create()
    async with processes(made, config, 1) as (router,):
        await fill(router, a)
        router.give_up(ConnectionRequest("another", "default", a.id, has_none=False))
        assert idle(router) == 1
        router.give_up(ConnectionRequest("another", "default", a.id, has_none=True))
        assert idle(router) == 0


async def test_a_process_without_notifications_keeps_one_idle_connection(
    made: Databases, patient: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since it receives no notifications of the others, it closes the others of each tenant soon."""
    monkeypatch.setattr(connector, "SURPLUS_SECONDS", 0.2)
    a = await made.create(connection_limit=LIMIT)
    async with processes(made, patient, hand_over=False, is_listening=lambda: False) as (first, second):
        await fill(first, a)
        assert await ask(second, a) == 1
        # all but one, and that one stays
        await until(lambda: idle(first) <= 1)
        assert (idle(first), first.statistics().servers["default"].open) == (1, 1)


async def test_a_failure_to_ask_changes_nothing(
    made: Databases, patient: TenancyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """The request goes on to try, and the failure is logged once."""
    failures: list[Sequence[ConnectionRequest]] = []

    async def fail(requests: Sequence[ConnectionRequest]) -> None:
        failures.append(requests)
        raise ControlUnavailableError("the control database is not available")

    a = await made.create(connection_limit=1)
    assert a.placement is not None
    role = a.placement.role
    other = await asyncpg.connect(made.postgres.url(role, user=role, password=made.passwords[a.id]))
    with caplog.at_level(logging.DEBUG, "tenancy_orm.routing"):
        async with support.router(made, patient, ask=fail) as router:
            waiting = asyncio.create_task(ask(router, a))
            await until(lambda: len(failures) > 1)
            await other.close()
            assert await waiting == 1
    assert caplog.text.count("cannot be asked") == 1


# --- the limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "setting"),
    [
        ("ALTER ROLE {name} CONNECTION LIMIT 1", "connection_limit of tier 'free'"),
        ("ALTER DATABASE {name} CONNECTION LIMIT 1", "the CONNECTION LIMIT of its database"),
    ],
)
async def test_the_error_names_the_limit(made: Databases, config: TenancyConfig, statement: str, setting: str) -> None:
    """It has the tenant, the limit and the setting to raise."""
    a = await made.create()
    assert a.placement is not None
    await made.admin.execute(statement.format(name=a.placement.role))
    async with support.router(made, config.replace(pool={"checkout_timeout": 0.5})) as router, router.connection(a):
        with pytest.raises(ConnectionLimitError) as caught:
            await ask(router, a)
    assert (caught.value.tenant, caught.value.limit, caught.value.setting) == (a.slug, 1, setting)
    assert setting in str(caught.value)


async def test_a_process_opens_no_more_than_the_tier_allows(made: Databases, config: TenancyConfig) -> None:
    """PostgreSQL is not asked for more, and the error names the tier's limit."""
    a = await made.create()
    small = config.replace(tiers={"free": Tier("free", connection_limit=1)}, pool={"checkout_timeout": 0.2})
    async with support.router(made, small) as router, router.connection(a):
        with pytest.raises(CheckoutTimeoutError) as caught:
            await ask(router, a)
    assert (caught.value.limit, caught.value.setting) == (1, "connection_limit of tier 'free'")


async def test_contradicting_limits_are_logged(
    made: Databases, config: TenancyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """In one line; the defaults contradict nothing."""
    default = TenancyConfig(control_url=config.control_url, encryption_keys=config.encryption_keys)
    for changes, expected in (
        ({}, []),
        ({"pool": {"max_connections_per_tenant": 7}, "quotas": {"rate_processes": 2}}, ["hold 7, 14 in 2"]),
        ({"quotas": {"rate_processes": 8}}, ["there are 8"]),
    ):
        caplog.clear()
        async with support.router(made, default.replace(**changes)):
            assert len(caplog.records) == len(expected)
            assert all(words in caplog.text for words in (*expected, *(["tier 'free' allows 5"] if expected else [])))
