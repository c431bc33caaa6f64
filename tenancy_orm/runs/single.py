"""``bring``: applies a plan to a few tenants without a recorded run, for what happens by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace
from uuid import UUID

from ..cancellation import run_to_completion
from ..errors import ControlUnavailableError, NotOpenError, TenancyError
from ..migrations.concurrency import map_concurrently
from ..migrations.connections import Connections
from ..migrations.logs import logger, warning_once
from ..migrations.plan import Plan
from ..migrations.preflight import ChecksAsked
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..tenant import Tenant, TenantRef, placement_of
from .report import FleetReport, TenantOutcome
from .work import MigrationWork


async def bring(
    plan: Plan,
    tenants: Iterable[TenantRef],
    services: FleetServices,
    connections: Connections,
    concurrency: int,
    *,
    checks: ChecksAsked,
) -> FleetReport:
    """Apply ``plan`` to ``tenants``, and return the report."""
    started = time.monotonic()
    chosen = await Selection(services.registry).choose(tenants)
    outcomes: dict[UUID, TenantOutcome] = {}
    work = MigrationWork(plan, services, connections, checks=checks)

    async def one(tenant: Tenant) -> None:
        outcome = await _bring(work, tenant)
        if outcome is not None:
            work.emit(outcome)
            outcomes[tenant.id] = outcome

    with warning_once():
        await work.prepare(dict.fromkeys(placement_of(tenant).server for tenant in chosen))
        await map_concurrently(one, chosen, concurrency)
    return FleetReport(
        command=plan.command,
        target=plan.target,
        outcomes=tuple(outcomes[tenant.id] for tenant in chosen if tenant.id in outcomes),
        seconds=time.monotonic() - started,
    )


async def _bring(work: MigrationWork, tenant: Tenant) -> TenantOutcome | None:
    registry, seconds = work.services.registry, work.services.config.migration.timeout

    async def announce(before: str | None, target: str | None) -> None:
        """Tell every process that the schema changes now; without that it is not changed: old code may serve it."""
        await registry.announce_migration(tenant.id, target=target, seconds=seconds)

    async def end() -> None:
        try:
            await registry.set_revision(tenant.id, result.revision, held=held)
        except (ControlUnavailableError, NotOpenError) as exc:
            logger.warning("tenant %s: that its migration has ended could not be recorded: %s", tenant.slug, exc)

    held = work.plan.command != "upgrade"
    result = await work.migrate_tenant(tenant, announce)
    if result.is_interrupted:
        if result.has_read and result.is_granted:
            await run_to_completion(end())
        raise asyncio.CancelledError
    outcome = result.outcome
    has_read = result.has_read and result.is_granted
    if outcome is None or not has_read or (outcome.after == tenant.schema_revision and not result.is_announced):
        return outcome
    try:
        await registry.set_revision(tenant.id, outcome.after, held=held)
    except TenancyError as exc:
        error = f"it is at {outcome.after or 'base'}, but the registry could not record that: {exc}"
        return replace(outcome, error=outcome.error or error)
    return outcome


__all__ = ["bring"]
