"""The preflight of a run: the checks of every tenant's pending revisions, asked before the first tenant is changed."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias
from uuid import UUID

from alembic.operations import Operations
from alembic.script import Script
from sqlalchemy import Connection as SyncConnection

from ..errors import MigrationError, PreflightError, counted
from ..events import EventBus, MigrationPreflightEnded
from ..postgres.connections import Connection
from ..postgres.errors import without_detail
from ..tenant import Tenant, placement_of
from . import local
from .checks import Finding, ask, refuse_foreign_code, script_of
from .concurrency import interleave, map_concurrently
from .connections import Connections, Health
from .data_checkpoints import read
from .data_migrations import data_migrations_of, of_step
from .database import State, active, close, read_state
from .failures import describe
from .limits import try_repeatedly
from .logs import labelled, logger
from .plan import Heads, Plan, format_revision
from .selection import Selection
from .waits import naming_blockers

ChecksAsked: TypeAlias = Literal["ahead", "in_place", "never"]
"""When a run asks checks: of all tenants before the first is changed, right before their revision, or not at all."""

# for the whole session: a revision that ends the transaction begins another one like it
_READ_ONLY_SESSION = "SET default_transaction_read_only = on"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightOutcome:
    """The result for one tenant.

    ``revision`` is the one that the tenant is at, ``checks`` how many of its pending revisions' checks were asked, and
    ``findings`` those that did not pass. ``answered`` are the revisions with checks that were all asked, ``deferred``
    those with checks that can be asked only when earlier ones have run. ``error`` is set if the tenant could not be
    asked at all.
    """

    tenant_id: UUID
    slug: str
    server: str
    revision: str | None
    checks: int = 0
    findings: tuple[Finding, ...] = ()
    answered: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every check passed or is deferred."""
        return self.error is None and not self.findings

    @property
    def reason(self) -> str | None:
        """One line with what did not pass; None if all did."""
        if self.ok:
            return None
        return "; ".join(([] if self.error is None else [self.error]) + [str(one) for one in self.findings])


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport:
    """The results for all tenants that were asked."""

    target: str
    outcomes: tuple[PreflightOutcome, ...]
    seconds: float

    @property
    def failures(self) -> tuple[PreflightOutcome, ...]:
        """The tenants that do not pass."""
        return tuple(outcome for outcome in self.outcomes if not outcome.ok)

    @property
    def ok(self) -> bool:
        """Whether every tenant passes."""
        return not self.failures

    @property
    def reasons(self) -> dict[str, str]:
        """What did not pass, by slug."""
        return {outcome.slug: outcome.reason or "" for outcome in self.failures}

    @property
    def checks(self) -> int:
        """How many checks were asked, over all tenants."""
        return sum(outcome.checks for outcome in self.outcomes)

    def raise_for_failures(self) -> None:
        """Raise if a tenant does not pass.

        Raises:
            PreflightError: it has what did not pass for each tenant.
        """
        if not self.ok:
            raise PreflightError(self.reasons, total=len(self.outcomes))

    def summary(self) -> str:
        """Return one line: how many tenants and checks, and how many tenants do not pass."""
        counts = [f"{self.checks} check{'s' * (self.checks != 1)} asked", f"{len(self.failures)} failed"]
        if deferred := {revision for outcome in self.outcomes for revision in outcome.deferred}:
            counts.append(f"deferred: {', '.join(sorted(deferred))}")
        return f"preflight of {self.target}: {counted(len(self.outcomes))}, {', '.join(counts)}, {self.seconds:.1f} s"


class Preflight:
    """The checks of a plan's revisions, for many tenants.

    Args:
        plan: The plan.
        connections: Connects to the databases.
        selection: Looks up tenants.
        concurrency: How many tenants at once.
        per_server: How many at once on one server; as many where None.
        health: Which servers are down.
        events: Where the end is announced.
    """

    def __init__(
        self,
        plan: Plan,
        connections: Connections,
        selection: Selection,
        *,
        concurrency: int,
        per_server: int | None = None,
        health: Health,
        events: EventBus,
    ) -> None:
        self._plan = plan
        self._events = events
        self._connections = connections
        self._selection = selection
        self._concurrency = concurrency
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(concurrency if per_server is None else per_server)
        )
        self._health = health

    async def before_run(self, tenants: Sequence[Tenant]) -> Mapping[UUID, frozenset[str]]:
        """Ask ``tenants``, and return for each the revisions with checks that have passed.

        If, according to the registry, no tenant has a check ahead, none is asked, and nothing is returned: a run with
        nothing to do must cost no more. ``DatabaseMigration`` asks checks that it meets all the same.

        Raises:
            PreflightError: a tenant does not pass.
        """
        if not any(self._has_checks(tenant) for tenant in tenants):
            return {}
        report = await self.ask(tenants)
        logger.info("%s", report.summary())
        report.raise_for_failures()
        return {outcome.tenant_id: frozenset(outcome.answered) for outcome in report.outcomes}

    async def ask(self, tenants: Sequence[Tenant]) -> PreflightReport:
        """Ask ``tenants``, and return the report. A tenant that was purged since it was listed is not in it."""
        started = time.monotonic()
        order = {tenant.id: number for number, tenant in enumerate(tenants)}
        found = await map_concurrently(self._outcome, interleave(list(tenants)), self._concurrency)
        outcomes = sorted((one for one in found if one is not None), key=lambda one: order[one.tenant_id])
        report = PreflightReport(target=self._plan.target, outcomes=tuple(outcomes), seconds=time.monotonic() - started)
        self._events.emit(
            MigrationPreflightEnded(
                target=report.target,
                tenants=len(outcomes),
                checks=report.checks,
                failed=len(report.failures),
                seconds=report.seconds,
            )
        )
        return report

    def _has_checks(self, tenant: Tenant) -> bool:
        return bool(self._pending(frozenset((tenant.schema_revision or "").split(",")) - {""}))

    def _pending(self, heads: Heads) -> list[tuple[int, Script]]:
        """The revisions with checks on the path from ``heads``, each with how many revisions run before it."""
        if self._plan.command != "upgrade":
            return []
        try:
            steps = self._plan.path_from(heads).steps
        except MigrationError:
            return []  # nothing will run there: that tenant's migration fails
        scripts = ((number, script_of(step)) for number, step in enumerate(steps))
        return [(number, script) for number, script in scripts if script is not None]

    async def _outcome(self, tenant: Tenant) -> PreflightOutcome | None:
        async with self._slots[placement_of(tenant).server]:
            return await self._ask_one(tenant)

    async def _ask_one(self, tenant: Tenant) -> PreflightOutcome | None:
        started = time.monotonic()
        question = _Question(self, tenant)
        error: str | None = None
        limits = self._connections.limits
        with local.isolated(), labelled(tenant.slug):
            try:
                async with asyncio.timeout(limits.total):
                    await try_repeatedly(question.ask, limits)
            except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
                if await self._selection.is_gone(tenant, exc):
                    return None
                logger.debug("tenant %s could not be asked", tenant.slug, exc_info=without_detail(exc))
                error = f"not asked: {describe(exc)}"
        return PreflightOutcome(
            tenant_id=tenant.id,
            slug=tenant.slug,
            server=placement_of(tenant).server,
            revision=None if question.state is None else format_revision(question.state.heads),
            checks=question.asked,
            findings=tuple(question.findings),
            answered=tuple(question.answered),
            deferred=tuple(question.deferred),
            error=error,
            seconds=time.monotonic() - started,
        )


class _Question:
    """What one tenant is asked, and what it answers."""

    def __init__(self, preflight: Preflight, tenant: Tenant) -> None:
        self._plan = preflight._plan
        self._pending = preflight._pending
        self._connections = preflight._connections
        self._tenant = tenant
        self._target = preflight._connections.target(tenant, preflight._health)
        self.state: State | None = None
        self._attempts = 0
        self._forget()

    def _forget(self) -> None:
        self.asked = 0
        self.findings: list[Finding] = []
        self.answered: list[str] = []
        self.deferred: list[str] = []

    async def ask(self) -> None:
        """Ask, on one connection."""
        self._forget()
        self._attempts += 1
        limits = self._connections.limits
        watch = self._target.connect_watch if self._attempts > 1 or limits.attempts == 1 else None
        connection = await self._target.connect()
        try:
            async with naming_blockers(connection, watch):
                await self._ask(connection)
        finally:
            await close(connection)

    async def _ask(self, connection: Connection) -> None:
        limits, environment = self._connections.limits, self._plan.environment
        self.state = state = await read_state(connection, environment, self._target, timeout=limits.connect)
        pending = self._pending(state.heads)
        if not pending:
            return
        wanted = self._target.extensions
        lacks_extensions = wanted is not None and bool(wanted.missing(state.extensions))
        await connection.execute(_READ_ONLY_SESSION)
        adapter = self._connections.adapter(placement_of(self._tenant).server)
        async with adapter.adapt(connection, self._target.url) as adapted:
            await adapted.run_sync(self._ask_each, pending, lacks_extensions)

    def _changing(self, connection: SyncConnection, number: int) -> set[str]:
        """The tables of the data migrations that run before a step: of earlier steps, or left by an earlier run."""
        assert self.state is not None  # noqa: S101 - read before
        found = {one.table for step in self._plan.path_from(self.state.heads).steps[:number] for one in of_step(step)}
        for checkpoint in read(connection) if self.state.has_data else ():
            module = self._plan.environment.script.get_revision(checkpoint.revision).module
            found |= {one.table for one in data_migrations_of(module) if one.name == checkpoint.name}
        return found

    def _ask_each(self, connection: SyncConnection, pending: list[tuple[int, Script]], lacks_extensions: bool) -> None:
        context = self._plan.environment.context(**self._plan.options)
        with connection.begin() as transaction, active(context, connection, self._plan.environment, self._tenant):
            refuse_foreign_code(connection, self._tenant)
            with Operations.context(context.get_context()):
                for number, script in pending:
                    result = ask(
                        connection,
                        script,
                        self._connections.limits.preflight,
                        ahead=True,
                        may_wait=number > 0 or lacks_extensions,
                        # what a data migration is about to mend is asked after it
                        changing=self._changing(connection, number),
                    )
                    self.asked += result.asked
                    self.findings += result.findings
                    (self.deferred if result.deferred else self.answered).append(script.revision)
            if transaction.is_active:
                transaction.rollback()


__all__ = ["ChecksAsked", "Preflight", "PreflightOutcome", "PreflightReport"]
