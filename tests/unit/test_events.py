"""Events: delivered by class, and harmless when a subscriber fails."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import inspect
import logging
from pathlib import Path
from uuid import UUID

import pytest

from tenancy_orm import Status, Tenant, current_tenant_or_none, events
from tenancy_orm.context import bind
from tenancy_orm.events import Event, EventBus, TenantCreated, TenantEvent, TenantPurged
from tests.support.waiting import HANGS

CREATED = TenantCreated(tenant_id=UUID(int=1), slug="acme", seconds=0.1)
PURGED = TenantPurged(tenant_id=UUID(int=1), slug="acme")


def created(number: int) -> TenantCreated:
    """One of several distinguishable events."""
    return dataclasses.replace(CREATED, seconds=float(number))


class Gated:
    """A coroutine subscriber that records its events, and ends when the test lets it."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.gate = asyncio.Event()

    async def __call__(self, event: TenantCreated) -> None:
        self.began.append(event.seconds)
        await self.gate.wait()


# --- subscribing ----------------------------------------------------------------------------------------------------


def test_a_subscriber_receives_its_class_and_subclasses() -> None:
    """Subscribing to a base class receives all below it, in the order of subscription."""
    bus = EventBus()
    seen: list[tuple[str, Event]] = []
    bus.subscribe(TenantEvent, lambda event: seen.append(("base", event)))
    bus.subscribe(TenantCreated, lambda event: seen.append(("created", event)))
    bus.subscribe(TenantPurged, lambda event: seen.append(("purged", event)))
    bus.emit(CREATED)
    assert seen == [("base", CREATED), ("created", CREATED)]


def test_delivery_is_in_the_order_of_subscription() -> None:
    """Whatever class each was subscribed to."""
    bus = EventBus()
    seen: list[str] = []
    bus.subscribe(TenantEvent, lambda event: seen.append("first"))
    bus.subscribe(TenantCreated, lambda event: seen.append("second"))
    bus.subscribe(TenantEvent, lambda event: seen.append("third"))
    bus.emit(CREATED)
    assert seen == ["first", "second", "third"]


def test_unsubscribing_ends_delivery() -> None:
    """Calling the returned function, even twice, ends it."""
    bus = EventBus()
    seen: list[Event] = []
    unsubscribe = bus.subscribe(Event, seen.append)
    assert bus.has_subscribers(TenantCreated)
    unsubscribe()
    unsubscribe()
    bus.emit(CREATED)
    assert seen == []
    assert not bus.has_subscribers(TenantCreated)


def test_unsubscribing_twice_leaves_an_equal_subscription() -> None:
    """A callback subscribed twice is called twice, until each subscription has ended."""
    bus = EventBus()
    seen: list[Event] = []
    unsubscribe = bus.subscribe(Event, seen.append)
    bus.subscribe(Event, seen.append)
    bus.emit(CREATED)
    assert len(seen) == 2
    unsubscribe()
    unsubscribe()
    bus.emit(PURGED)
    assert seen == [CREATED, CREATED, PURGED]


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failing_subscriber_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next one still receives the event."""
    bus = EventBus()
    seen: list[Event] = []

    def fail(event: TenantCreated) -> None:
        raise RuntimeError("no disk")

    bus.subscribe(TenantCreated, fail)
    bus.subscribe(TenantCreated, seen.append)
    with caplog.at_level(logging.ERROR):
        bus.emit(CREATED)
    assert seen == [CREATED]
    assert "TenantCreated" in caplog.text


async def test_a_cancelled_error_of_a_subscriber_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A function that reads a cancelled task's result raises it, as does a coroutine that awaits one."""
    bus = EventBus()
    seen: list[Event] = []
    given_up = asyncio.get_running_loop().create_future()
    given_up.cancel()

    def ask(event: TenantCreated) -> None:
        given_up.result()

    async def wait(event: TenantCreated) -> None:
        await given_up

    for callback in (ask, wait, seen.append):
        bus.subscribe(TenantCreated, callback)
    bus.emit(CREATED)
    bus.emit(CREATED)
    assert await bus.drain()
    assert seen == [CREATED, CREATED]
    assert caplog.text.count("a subscriber to TenantCreated failed") == 4
    assert bus.dropped == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_comes_through(error: type[BaseException]) -> None:
    """A subscriber does not swallow it."""
    bus = EventBus()

    def interrupt(event: Event) -> None:
        raise error

    bus.subscribe(Event, interrupt)
    with pytest.raises(error):
        bus.emit(CREATED)


def test_a_coroutine_subscriber_without_a_loop_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It cannot run; the next one still receives the event."""
    bus = EventBus()
    seen: list[Event] = []

    async def note(event: Event) -> None:
        seen.append(event)

    bus.subscribe(Event, note)
    bus.subscribe(Event, seen.append)
    bus.emit(CREATED)
    assert seen == [CREATED]
    assert "no running event loop" in caplog.text


# --- coroutines -----------------------------------------------------------------------------------------------------


async def test_a_coroutine_subscriber_runs_and_is_drained(caplog: pytest.LogCaptureFixture) -> None:
    """Coroutines run in tasks of their own; a failing one is logged."""
    bus = EventBus()
    seen: list[Event] = []

    async def note(event: TenantCreated) -> None:
        seen.append(event)

    async def fail(event: TenantCreated) -> None:
        raise RuntimeError("no network")

    bus.subscribe(TenantCreated, fail)
    bus.subscribe(TenantCreated, note)
    bus.emit(CREATED)
    await bus.drain()
    assert seen == [CREATED]
    assert "no network" in caplog.text


async def test_a_coroutine_subscriber_receives_events_in_order() -> None:
    """The next one begins when the last has ended, although that one took longer."""
    bus = EventBus()
    log: list[str] = []
    gate = asyncio.Event()

    async def work(event: TenantCreated) -> None:
        log.append(f"begin {event.seconds:.0f}")
        if event.seconds == 0:
            await gate.wait()
        log.append(f"end {event.seconds:.0f}")

    bus.subscribe(TenantCreated, work)
    for number in range(3):
        bus.emit(created(number))
    for _ in range(5):
        await asyncio.sleep(0)
    assert log == ["begin 0"]
    gate.set()
    assert await bus.drain()
    assert log == ["begin 0", "end 0", "begin 1", "end 1", "begin 2", "end 2"]


async def test_a_hung_subscriber_does_not_hold_up_another() -> None:
    """Each subscription has a queue of its own."""
    bus = EventBus()
    hung = Gated()
    seen: list[float] = []

    async def note(event: TenantCreated) -> None:
        seen.append(event.seconds)

    bus.subscribe(TenantCreated, hung)
    bus.subscribe(TenantCreated, note)
    for number in range(3):
        bus.emit(created(number))
    assert not await bus.drain(0.05)
    assert (hung.began, seen) == ([0], [0, 1, 2])
    hung.gate.set()
    assert await bus.drain()


async def test_coroutines_run_with_no_tenant_bound() -> None:
    """Nor is anything else of the emitter's context set, or of the coroutine before; a function has the emitter's."""
    bus = EventBus()
    request: contextvars.ContextVar[str | None] = contextvars.ContextVar("request", default=None)
    in_function: list[tuple[Tenant | None, str | None]] = []
    in_coroutine: list[tuple[Tenant | None, str | None]] = []

    async def note(event: Event) -> None:
        in_coroutine.append((current_tenant_or_none(), request.get()))
        request.set("left behind")

    bus.subscribe(Event, lambda event: in_function.append((current_tenant_or_none(), request.get())))
    bus.subscribe(Event, note)
    tenant = Tenant(UUID(int=1), "acme", Status.ACTIVE, "free")
    request.set("r-1")
    with bind(tenant):
        bus.emit(CREATED)
        bus.emit(CREATED)
        await bus.drain()
    assert in_function == [(tenant, "r-1")] * 2
    assert in_coroutine == [(None, None)] * 2


async def test_unsubscribing_keeps_what_waits() -> None:
    """Events that were emitted before are still delivered, later ones are not."""
    bus = EventBus()
    work = Gated()
    unsubscribe = bus.subscribe(TenantCreated, work)
    bus.emit(created(0))
    bus.emit(created(1))
    unsubscribe()
    bus.emit(created(2))
    work.gate.set()
    assert await bus.drain()
    assert work.began == [0, 1]


# --- too slow -------------------------------------------------------------------------------------------------------


async def test_events_beyond_the_bound_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """One is running and two wait; each flood is logged once, and the other subscribers get every event."""
    bus = EventBus(max_waiting=2)
    slow = Gated()
    seen: list[Event] = []
    bus.subscribe(TenantCreated, slow)
    bus.subscribe(TenantCreated, seen.append)
    for flood in (1, 2):
        slow.gate.clear()
        for number in range(10):
            bus.emit(created(number))
        assert bus.dropped == 7 * flood
        assert caplog.text.count("Gated to TenantCreated is too slow: 2 events wait") == flood
        slow.gate.set()
        assert await bus.drain()
    assert slow.began == [0, 1, 2] * 2
    assert len(seen) == 20


# --- the end --------------------------------------------------------------------------------------------------------


async def test_drain_has_a_deadline() -> None:
    """It returns False, and lets the coroutine run on."""
    bus = EventBus()
    slow = Gated()
    bus.subscribe(TenantCreated, slow)
    bus.emit(CREATED)
    async with asyncio.timeout(HANGS):
        assert not await bus.drain(0.05)
        assert not await bus.drain(0)
    slow.gate.set()
    assert await bus.drain()


async def test_cancelling_ends_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """The running coroutine is cancelled and waiting events are dropped, which is counted and logged."""
    bus = EventBus()
    hung = Gated()
    bus.subscribe(TenantCreated, hung)
    for number in range(3):
        bus.emit(created(number))
    assert not await bus.drain(0.05)
    await bus.cancel()
    assert await bus.drain(0)
    assert (hung.began, bus.dropped) == ([0], 2)
    assert "Gated to TenantCreated was cancelled while running; 2 events that waited for it are dropped" in caplog.text
    hung.gate.set()
    bus.emit(created(3))
    assert await bus.drain()
    assert hung.began == [0, 3]


async def test_cancelling_ends_what_has_not_begun() -> None:
    """A coroutine that was never started is closed, or Python would warn that it was never awaited."""
    bus = EventBus()
    work = Gated()
    bus.subscribe(TenantCreated, work)
    bus.emit(CREATED)
    await bus.cancel()
    assert await bus.drain(0)
    assert work.began == []


async def test_cancelling_does_not_wait_for_who_will_not_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscriber that ignores its cancellation gets no more events, and delays nobody."""
    monkeypatch.setattr(events, "_CANCEL_TIMEOUT", 0.05)
    bus = EventBus()
    gate = asyncio.Event()
    began: list[float] = []

    async def deaf(event: TenantCreated) -> None:
        began.append(event.seconds)
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    bus.subscribe(TenantCreated, deaf)
    bus.emit(created(0))
    bus.emit(created(1))
    assert not await bus.drain(0.05)
    async with asyncio.timeout(HANGS):
        await bus.cancel()
    assert "deaf to TenantCreated was cancelled while running; 1 events" in caplog.text
    gate.set()
    assert await bus.drain()
    assert began == [0]


async def test_a_subscriber_that_drains_does_not_wait_for_itself() -> None:
    """Nor does it cancel itself."""
    bus = EventBus()
    drained: list[bool] = []

    async def finish(event: Event) -> None:
        drained.append(await bus.drain())
        await bus.cancel()

    bus.subscribe(Event, finish)
    bus.emit(CREATED)
    async with asyncio.timeout(HANGS):
        assert await bus.drain()
    assert drained == [True]


def test_the_end_of_the_loop_drops_what_waits(caplog: pytest.LogCaptureFixture) -> None:
    """A program that never closes drops it, and leaves no task or coroutine that Python would warn of."""
    bus = EventBus()

    async def program() -> None:
        bus.subscribe(TenantCreated, Gated())
        bus.emit(created(0))
        bus.emit(created(1))

    asyncio.run(program())
    assert bus.dropped == 1
    assert "Gated to TenantCreated was cancelled while running" in caplog.text
    assert asyncio.run(bus.drain(0)) is True


# --- the catalogue --------------------------------------------------------------------------------------------------


def test_the_catalogue_is_documented() -> None:
    """Every event is in docs/events.md, with all of its fields."""
    page = (Path(__file__).parents[2] / "docs" / "events.md").read_text()
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    known = {name: cls for name, cls in vars(events).items() if inspect.isclass(cls) and issubclass(cls, Event)}
    assert set(lines) == set(known) - {"Event", "TenantEvent", "JobEvent", "BackupEvent"}
    for name, line in lines.items():
        for field in dataclasses.fields(known[name]):
            assert f"`{field.name}`" in line or ("| tenant |" in line and field.name in ("tenant_id", "slug"))
