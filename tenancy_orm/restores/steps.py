"""``Restore``: one restore of a tenant, step by step, so that whoever takes it over can finish it or undo it.

Each step is named in the operation's row before it begins. Until the swap the tenant uses the database that it had.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..audit.actor import Actor
from ..cancellation import run_to_completion
from ..errors import JobLostError, OperationError, OperationStateError, TenancyError
from ..events import EventBus, TenantRestored
from ..jobs import Claimant
from ..operations import Operation, Operations
from ..operations.progress import StepProgress, silent
from ..postgres.errors import describe
from ..postgres.failures import FAILURES, SERVER_FAILURES
from ..provisioning import Provisioner
from ..registry.databases import TenantDatabase
from ..registry.lifecycle import check_database_in_use
from ..registry.registry import Registry
from ..tenant import Tenant, placement_of
from .making import Making
from .report import RestoreReport
from .sources import RestoreSource
from .switching import Swapped, Switching

logger = logging.getLogger("tenancy_orm.restores")

UNDO = "tenant.undo_restore_backup"
"""The action of a restore that swaps back to the database which an earlier one has replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreServices:
    """What restores use."""

    operations: Operations
    registry: Registry
    provisioner: Provisioner
    making: Making
    switching: Switching
    events: EventBus


class Restore:
    """One restore that this process has claimed.

    Args:
        services: What it uses.
        claimant: Who has claimed it.
        operation: Its record.
        progress: Called with each step that begins.

    Attributes:
        operation: Its record, as it was last written.
        database: The name of the database that is restored, or swapped back to.
    """

    def __init__(
        self, services: RestoreServices, claimant: Claimant, operation: Operation, *, progress: StepProgress | None
    ) -> None:
        self._services = services
        self._claimant = claimant
        self._progress = progress or silent
        self.operation = operation
        self.database: str = operation.detail["database"]

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Keep the claim while the body works; where it fails, take the operation back and record why.

        Raises:
            OperationError: a server refused, or does not answer.
        """
        operation = self.operation
        try:
            async with self._services.operations.keep(operation, self._claimant):
                yield
        except JobLostError:
            raise  # another process has it by now
        except BaseException as exc:
            await run_to_completion(self._fail(exc))
            if isinstance(exc, SERVER_FAILURES) and not isinstance(exc, TenancyError):
                raise OperationError(
                    f"operation {operation.id}, a restore of tenant {operation.slug!r}, failed ({describe(exc)}); "
                    f"nothing was swapped: its database is {operation.detail['from']!r}, as before"
                ) from exc
            raise

    # --- forward ----------------------------------------------------------------------------------------------------

    async def make(self, tenant: Tenant, source: RestoreSource, *, accept: bool) -> None:
        """Make the database beside the one in use, filled and handed over.

        Raises:
            TenancyError: as ``Making.make``.
        """
        place = placement_of(tenant)
        await self._services.registry.record_database(
            TenantDatabase(
                server=place.server,
                name=self.database,
                tenant_id=tenant.id,
                role=place.role,
                state="making",
                operation=self.operation.id,
            )
        )
        self._progress("restoring")
        policy, restored = await self._services.making.make(tenant, place, self.database, source, accept=accept)
        await self._advance("upgrading", differences=policy.differences[:100], left_out=restored.left_out)

    async def upgrade(self, tenant: Tenant, *, then: str = "switching") -> None:
        """Run the revisions that the database lacks.

        Args:
            tenant: The tenant.
            then: The step that follows.

        Raises:
            OperationStateError: it is a replaced one, which is being dropped.
            MigrationError: a revision failed.
        """
        self._progress("running missing revisions")
        place = replace(placement_of(tenant), database=self.database)
        if self.operation.detail["action"] == UNDO:
            beside = await self._beside()
            if beside is None or beside.state == "dropping":
                raise OperationStateError(f"database {self.database!r} is being dropped")
            await self._services.provisioner.new_databases.open_to_administrators(beside)
        await self._advance(then, revision=await self._services.making.upgrade(tenant, place))

    async def wait(self) -> None:
        """Have the operation wait for somebody to look at the database, before the swap."""
        await self._services.operations.finish(self.operation, self._claimant, "waiting")

    async def swap(self, actor: Actor) -> Swapped:
        """Make the database the one in use, by which the operation is done.

        Raises:
            TenancyError: as ``Switching.swap``.
        """
        self._progress("swapping")
        operation, action = self.operation, self.operation.detail["action"]
        swapped = await self._services.switching.swap(
            operation, self.database, action=action, revision=operation.detail.get("revision"), actor=actor
        )
        self._services.events.emit(
            TenantRestored(
                tenant_id=swapped.tenant.id,
                slug=swapped.tenant.slug,
                operation=operation.id,
                undone=action == UNDO,
                seconds=swapped.seconds,
            )
        )
        await self._services.operations.finish(
            operation, self._claimant, "done", detail={"kept_until": swapped.kept_until}
        )
        return swapped

    async def go_on(self, actor: Actor) -> Swapped:
        """Finish what waits for its swap, or was left behind; what was left before its database was complete is undone.

        Raises:
            OperationStateError: it could only be undone.
            TenancyError: it failed, and was taken back.
        """
        async with self.working():
            tenant = await self._services.registry.get(self.operation.tenant_id)
            if self.operation.step == "making":
                raise OperationStateError(
                    f"operation {self.operation.id} was interrupted before its database was complete; it is undone: "
                    "restore again"
                )
            if placement_of(tenant).database != self.database:
                # again where its swap was interrupted: code with further revisions may go on with it
                check_database_in_use(tenant)
                await self.upgrade(tenant)
            return await self.swap(actor)

    async def _advance(self, step: str, **detail: Any) -> None:
        self.operation = await self._services.operations.advance(self.operation, self._claimant, step, detail=detail)

    # --- back -------------------------------------------------------------------------------------------------------

    async def discard(self, actor: Actor) -> None:
        """End it before its swap, and drop what it has made.

        Raises:
            OperationStateError: it has swapped already.
            TenancyError: a server refused, or does not answer; try again.
        """
        operation = self.operation
        async with self._services.operations.keep(operation, self._claimant):
            await self._take_back(operation)
            await self._services.operations.finish(operation, self._claimant, "undone")
        await self._services.registry.record(
            operation.tenant_id, "tenant.discard_restore", detail={"operation": operation.id}, actor=actor
        )

    async def _fail(self, error: BaseException) -> None:
        number, operations = self.operation.id, self._services.operations
        try:
            operation = await operations.get(number)
            if operation.state != "running":
                return
            async with operations.keep(operation, self._claimant):
                await self._take_back(operation)
                await operations.finish(operation, self._claimant, "failed", error=describe(error))
        except FAILURES as exc:
            reason = describe(exc)
            logger.error("operation %d could not be taken back, housekeeping will do it: %s", number, reason)

    async def _take_back(self, operation: Operation) -> None:
        """Let the tenant use what it used before, and drop what was made.

        Args:
            operation: The record as it is now.

        Raises:
            OperationStateError: it has swapped already.
        """
        switching = self._services.switching
        tenant = await self._services.registry.get(operation.tenant_id)
        if tenant.placement is None:
            return  # purged, with all its databases
        if operation.step == "switching":
            await switching.go_back(operation, self.database)
        beside = await self._beside()
        if beside is not None and beside.state == "making":
            await self._services.provisioner.new_databases.drop(beside)
        elif beside is not None and operation.step == "upgrading":
            await switching.close_beside(tenant, beside)

    async def _beside(self) -> TenantDatabase | None:
        found = await self._services.registry.databases_of(self.operation.tenant_id)
        return next((one for one in found if one.name == self.database), None)

    # --- what is said of it -----------------------------------------------------------------------------------------

    def report(self, tenant: Tenant, started: float, swapped: Swapped | None = None) -> RestoreReport:
        """Return how it has ended: swapped, or waiting for that where it was not."""
        detail = self.operation.detail
        return RestoreReport(
            operation=self.operation.id,
            tenant_id=tenant.id,
            slug=tenant.slug,
            state="waiting" if swapped is None else "done",
            server=detail["server"],
            database=detail["database"],
            replaced=None if swapped is None else swapped.replaced,
            kept_until=None if swapped is None else swapped.kept_until,
            revision=detail.get("revision"),
            differences=tuple(detail.get("differences", ())),
            left_out=tuple(detail.get("left_out", ())),
            seconds=time.monotonic() - started,
            pause_seconds=0.0 if swapped is None else swapped.seconds,
        )


async def begin(
    services: RestoreServices,
    tenant: Tenant,
    step: str,
    *,
    detail: Mapping[str, Any],
    progress: StepProgress | None,
    actor: Actor,
) -> Restore:
    """Write down that a tenant is restored, before anything is made.

    Raises:
        OperationConflictError: another operation changes its database.
    """
    claimant = Claimant()
    operation = await services.operations.begin(
        "restore", tenant.id, step=step, claimant=claimant, detail=detail, actor=actor
    )
    return Restore(services, claimant, operation, progress=progress)


async def claim(services: RestoreServices, number: int, *, progress: StepProgress | None = None) -> Restore:
    """Claim a restore that waits, or that no process does any more.

    Raises:
        OperationNotFoundError: there is no such operation.
        OperationStateError: it is no restore, has ended, or a process does it now.
    """
    operation, claimant = await services.operations.get(number), Claimant()
    if operation.kind != "restore":
        raise OperationStateError(f"operation {number} is not a restore: it is a {operation.kind}")
    return Restore(services, claimant, await services.operations.claim(number, claimant), progress=progress)


__all__ = ["UNDO", "Restore", "RestoreServices", "begin", "claim"]
