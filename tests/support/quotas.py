"""The parts of the control plane that count and write down, with tenants that have no databases."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy_orm.audit.checkpoints import Signer
from tenancy_orm.audit.log import AuditLog
from tenancy_orm.config import TenancyConfig
from tenancy_orm.control.database import ControlDatabase
from tenancy_orm.events import Event, EventBus
from tenancy_orm.quotas.manager import QuotaManager
from tenancy_orm.quotas.overrides import check_overrides
from tenancy_orm.registry.registry import Registry
from tenancy_orm.registry.rows import TenantDraft, uuid7
from tenancy_orm.tenant import Status, Tenant
from tests.support.registry import synchronise
from tests.support.shell import ROOT
from tests.support.waiting import until
from tests.support.warm import Program, start_module

KEYS: Mapping[str, bytes] = {"1": b"k" * 32}


@dataclass
class QuotaPlane:
    """One process's view of a control database. ``seen`` holds every event since it was opened."""

    config: TenancyConfig
    control: ControlDatabase
    audit: AuditLog
    quotas: QuotaManager
    registry: Registry
    events: EventBus
    seen: list[Event] = field(default_factory=list)

    async def tenant(
        self,
        slug: str = "acme",
        *,
        tier: str | None = None,
        timezone: str = "UTC",
        quotas: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Tenant:
        """Register a tenant as if it had been provisioned."""
        tenant_id = uuid7()
        draft = TenantDraft(
            id=tenant_id,
            slug=slug,
            tier=tier or self.config.default_tier,
            server="default",
            database=f"db_{tenant_id.hex}",
            role=f"role_{tenant_id.hex}",
            sealed_password=b"sealed",
            target_status=Status.ACTIVE,
            metadata=metadata or {},
            quotas=check_overrides(quotas or {}),
            timezone=timezone,
        )
        await self.registry.register(draft)
        return await self.registry.complete(tenant_id, revision=None, key=None)

    async def append(self, action: str = "test.done", **options: Any) -> int:
        """Append one audit entry in a transaction of its own."""
        async with self.control.transaction() as connection:
            return await self.audit.append(connection, action=action, **options)

    async def sql(self, statement: str, **parameters: Any) -> Any:
        """Run SQL as the owner, committed; returns the rows, or None."""
        async with self.control.transaction() as connection:
            result = await connection.execute(text(statement), parameters)
            return result.all() if result.returns_rows else None

    @asynccontextmanager
    async def holding(self, statement: str, **parameters: Any) -> AsyncIterator[AsyncConnection]:
        """Run SQL as the owner in a transaction that is left open for as long as the body runs, with its locks."""
        async with self.control.transaction() as connection:
            await connection.execute(text(statement), parameters)
            yield connection

    async def waiting(self, *tasks: asyncio.Task[Any]) -> None:
        """Wait until as many sessions wait for a lock as there are tasks that are not done."""

        async def all_wait() -> bool:
            rows = await self.sql(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return int(rows[0][0]) >= sum(not task.done() for task in tasks)

        await until(all_wait)

    def of(self, *kinds: type[Event]) -> list[Any]:
        """The events of some classes, in order."""
        return [event for event in self.seen if isinstance(event, kinds)]


@asynccontextmanager
async def quota_plane(
    url: str, *, initialise: bool = True, keys: Mapping[str, bytes] = KEYS, **options: Any
) -> AsyncIterator[QuotaPlane]:
    """Open a control database, migrated first unless ``initialise`` is false; ``options`` go to ``TenancyConfig``."""
    config = TenancyConfig(control_url=url, **options)
    events = EventBus()
    control = ControlDatabase(url)
    audit = AuditLog(control, Signer(keys))
    quotas = QuotaManager(control, config, events, audit)
    plane = QuotaPlane(config, control, audit, quotas, Registry(control, audit), events)
    events.subscribe(Event, plane.seen.append)
    try:
        if initialise:
            await control.upgrade()
            await synchronise(control, config.tiers, {"default": ("127.0.0.1", 5432)})
        await control.open()
        yield plane
        await quotas.close()
    finally:
        await control.close()
        await events.drain()


async def start_worker(*arguments: object) -> Program:
    """Run ``tests.support.quota_worker`` in a process of its own, with a pipe to and from it."""
    return await start_module(
        "tests.support.quota_worker",
        *map(str, arguments),
        cwd=ROOT,
        env=dict(os.environ),
        after=["tests.support.quotas"],
    )


async def line(worker: Program, *, timeout: float = 30.0) -> str:
    """The next line that a worker prints."""
    async with asyncio.timeout(timeout):
        return (await worker.stdout.readline()).decode().strip()


async def say(worker: Program, message: str = "go") -> None:
    """Send a worker one line."""
    worker.stdin.write(f"{message}\n".encode())
    await worker.stdin.drain()


async def race(count: int, *arguments: object) -> list[int]:
    """Start workers, let them go all at once when all are ready, and return the number that each prints at the end."""
    workers = [await start_worker(*arguments, number) for number in range(count)]
    try:
        assert [await line(worker) for worker in workers] == ["ready"] * count
        for worker in workers:
            await say(worker)
        results = [int(await line(worker, timeout=120)) for worker in workers]
        for worker in workers:
            async with asyncio.timeout(30):
                assert await worker.wait() == 0
        return results
    finally:
        for worker in workers:
            worker.kill()
            await worker.wait()
