"""Events through the public surface: what subscribers may do, and what closing does with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tenancy_orm import Status, Tenancy, TenancyConfig, current_tenant_or_none
from tenancy_orm.events import KeyIssued, TenantCreated, TenantEvent, TenantStatusChanged
from tests.support.waiting import HANGS


@pytest.fixture
async def closable(tenancy: Tenancy, tenancy_config: TenancyConfig) -> AsyncIterator[Tenancy]:
    """A second ``Tenancy``, which the test closes itself."""
    opened = await Tenancy(tenancy_config).open()
    yield opened
    await opened.close(timeout=0)


async def count_notes(tenancy: Tenancy, slug: str) -> int:
    """How many notes a tenant has."""
    return int(await tenancy.fetch_value("SELECT count(*) FROM notes", tenant=slug))


# --- what a subscriber may do ---------------------------------------------------------------------------------------


async def test_a_cancelled_error_of_a_subscriber_does_not_break_the_operation(tenancy: Tenancy) -> None:
    """The suspension succeeds, and the next subscriber gets the event."""
    await tenancy.tenants.create("acme")
    told: list[TenantEvent] = []

    def give_up(event: TenantStatusChanged) -> None:
        raise asyncio.CancelledError

    tenancy.events.subscribe(TenantStatusChanged, give_up)
    tenancy.events.subscribe(TenantStatusChanged, told.append)
    assert (await tenancy.tenants.suspend("acme")).status is Status.SUSPENDED
    assert len(told) == 1


async def test_a_coroutine_subscriber_may_work_on_another_tenant(tenancy: Tenancy) -> None:
    """Whether or not the event is emitted in a tenant's scope, the coroutine has no tenant bound."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.create("ops")
    bound: list[object] = []

    async def record(event: KeyIssued) -> None:
        bound.append(current_tenant_or_none())
        await tenancy.execute("INSERT INTO notes (body) VALUES (:slug)", {"slug": event.slug}, tenant="ops")

    tenancy.events.subscribe(KeyIssued, record)
    async with tenancy.scope("acme"):
        await tenancy.keys.issue("acme", name="inside")
    await tenancy.keys.issue("acme", name="outside")
    assert await tenancy.events.drain()
    assert bound == [None, None]
    assert await count_notes(tenancy, "ops") == 2


# --- closing --------------------------------------------------------------------------------------------------------


async def test_a_subscriber_at_work_when_it_closes_may_finish(tenancy: Tenancy, tenancy_config: TenancyConfig) -> None:
    """It finds the ``Tenancy`` open, so a script need not wait for what it started."""
    closable = Tenancy(tenancy_config)

    async def welcome(event: TenantCreated) -> None:
        await closable.execute("INSERT INTO notes (body) VALUES ('welcome')", tenant=event.slug)

    closable.events.subscribe(TenantCreated, welcome)
    async with closable:
        await closable.tenants.create("acme")
        await closable.tenants.create("globex")
    assert not closable.is_open
    assert [await count_notes(tenancy, slug) for slug in ("acme", "globex")] == [1, 1]


async def test_a_hung_subscriber_does_not_hold_up_closing(closable: Tenancy, caplog: pytest.LogCaptureFixture) -> None:
    """It is cancelled after the deadline, which is logged, and everything is closed."""
    cut_short: list[str] = []

    async def hang(event: TenantCreated) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cut_short.append(event.slug)

    closable.events.subscribe(TenantCreated, hang)
    await closable.tenants.create("acme")
    async with asyncio.timeout(HANGS):
        await closable.close(timeout=0.05)
    assert not closable.is_open
    assert cut_short == ["acme"]
    assert "hang to TenantCreated was cancelled while running" in caplog.text


async def test_closing_that_is_cancelled_closes_all_the_same(closable: Tenancy) -> None:
    """A caller that gives up while subscribers are waited for leaves no connection open."""

    async def hang(event: TenantCreated) -> None:
        await asyncio.Event().wait()

    closable.events.subscribe(TenantCreated, hang)
    await closable.tenants.create("acme")
    closing = asyncio.create_task(closable.close())
    done, _ = await asyncio.wait([closing], timeout=0.05)
    assert not done
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert not closable.is_open
    assert await closable.events.drain(0)


async def test_parts_are_closed_though_closing_is_cancelled(closable: Tenancy) -> None:
    """A slow one is not cut short, and those after it are closed as well."""
    began, gate, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def close_slowly() -> None:
        began.set()
        await gate.wait()

    async def close_last() -> None:
        ended.set()

    opened = closable._lifetime.parts._opened
    opened.insert(0, close_last)
    opened.append(close_slowly)
    closing = asyncio.create_task(closable.close())
    await began.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert opened
    gate.set()
    async with asyncio.timeout(HANGS):
        await ended.wait()


async def test_a_part_that_cannot_be_closed_does_not_spare_subscribers(closable: Tenancy) -> None:
    """What is left of them is cancelled although closing raises."""

    async def fail() -> None:
        raise RuntimeError("no way to close")

    async def hang(event: TenantCreated) -> None:
        await asyncio.Event().wait()

    closable._lifetime.parts._opened.append(fail)
    closable.events.subscribe(TenantCreated, hang)
    await closable.tenants.create("acme")
    with pytest.raises(RuntimeError, match="no way to close"):
        await closable.close(timeout=0.05)
    assert not closable.is_open
    assert await closable.events.drain(0)


async def test_a_subscriber_may_close_what_it_opened(
    tenancy: Tenancy, tenancy_config: TenancyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A block of its own, which turns out to be the outermost one, does not wait for itself."""
    closable = Tenancy(tenancy_config)
    received: list[str] = []

    async def enter(event: TenantCreated) -> None:
        async with closable:
            received.append((await closable.tenants.get(event.slug)).slug)

    closable.events.subscribe(TenantCreated, enter)
    async with closable:
        await closable.tenants.create("acme")
    assert received == ["acme"]
    assert not closable.is_open
    assert "cancelled while running" not in caplog.text
