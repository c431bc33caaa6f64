"""How many tenants are asked at once, on one server and in all."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from uuid import UUID

import pytest

from tenancy_orm.events import EventBus
from tenancy_orm.migrations.connections import Health
from tenancy_orm.migrations.preflight import Preflight
from tenancy_orm.tenant import Placement, Status, Tenant


def tenant(number: int, server: str) -> Tenant:
    placement = Placement(server, f"d{number}", f"r{number}", b"")
    return Tenant(UUID(int=number), f"t{number}", Status.ACTIVE, "free", placement)


async def test_a_server_is_asked_no_more_at_once_than_it_is_migrated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def ask_one(self: Preflight, one: Tenant) -> None:
        assert one.placement is not None
        server = one.placement.server
        asked[server] += 1
        most[server] = max(most[server], asked[server])
        for _ in range(5):
            await asyncio.sleep(0)
        asked[server] -= 1

    monkeypatch.setattr(Preflight, "_ask_one", ask_one)
    nothing: Any = None
    plan: Any = type("Plan", (), {"target": "head"})
    tenants = [tenant(number, "eu" if number % 2 else "us") for number in range(40)]
    asking = Preflight(plan, nothing, nothing, concurrency=8, per_server=2, health=Health(), events=EventBus())
    await asking.ask(tenants)
    assert most == {"eu": 2, "us": 2}
    asking = Preflight(plan, nothing, nothing, concurrency=8, health=Health(), events=EventBus())
    most.clear()
    await asking.ask(tenants)
    assert sum(most.values()) == 8
