"""Events: delivered by class, and harmless when a subscriber fails."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from pathlib import Path
from uuid import UUID

import pytest

from tenancy_orm import events
from tenancy_orm.events import Event, EventBus, TenantCreated, TenantEvent, TenantPurged

CREATED = TenantCreated(tenant_id=UUID(int=1), slug="acme", seconds=0.1)


def test_a_subscriber_receives_its_class_and_subclasses() -> None:
    """Subscribing to a base class receives all below it, in the order of subscription."""
    bus = EventBus()
    seen: list[tuple[str, Event]] = []
    bus.subscribe(TenantEvent, lambda event: seen.append(("base", event)))
    bus.subscribe(TenantCreated, lambda event: seen.append(("created", event)))
    bus.subscribe(TenantPurged, lambda event: seen.append(("purged", event)))
    bus.emit(CREATED)
    assert seen == [("base", CREATED), ("created", CREATED)]


def test_unsubscribing_ends_delivery() -> None:
    """Calling the returned function, even twice, ends it."""
    bus = EventBus()
    seen: list[Event] = []
    unsubscribe = bus.subscribe(Event, seen.append)
    assert bus.wants(TenantCreated)
    unsubscribe()
    unsubscribe()
    bus.emit(CREATED)
    assert seen == []
    assert not bus.wants(TenantCreated)


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


def test_the_catalogue_is_documented() -> None:
    """Every event stands in docs/events.md, with all of its fields."""
    page = (Path(__file__).parents[2] / "docs" / "events.md").read_text()
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    known = {name: cls for name, cls in vars(events).items() if inspect.isclass(cls) and issubclass(cls, Event)}
    assert set(lines) == set(known) - {"Event", "TenantEvent"}
    for name, line in lines.items():
        for field in dataclasses.fields(known[name]):
            assert f"`{field.name}`" in line or ("| tenant |" in line and field.name in ("tenant_id", "slug"))
