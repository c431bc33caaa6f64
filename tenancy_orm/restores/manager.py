"""``RestoreManager``: brings a tenant's database back from a backup or a recovered server (``tenancy.restores``)."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from ..audit.actor import SYSTEM, Actor
from ..backups import BackupManager
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..context import refuse_while_bound
from ..errors import (
    JobLostError,
    OperationError,
    OperationStateError,
    TenancyError,
    TenantNotFoundError,
)
from ..events import EventBus, TenantRestored
from ..jobs import Claimant
from ..migrations.connections import Connections
from ..operations import Operation, Operations
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.filled_creation import Filling
from ..provisioning.new_databases import NewDatabase
from ..provisioning.pipeline import describe
from ..provisioning.provisioner import services_of
from ..provisioning.readers import Reader
from ..provisioning.replaced_databases import refuse_stale
from ..provisioning.restoring import Restored
from ..registry.databases import TenantDatabase
from ..runs import FleetMigrator
from ..tenant import Placement, Status, Tenant, TenantRef
from ..tenants.manager import TenantManager
from .making import Making, placement_of
from .report import RestoreReport, UpkeepReport
from .sources import RestoreSource
from .switching import Swapped, Switching, check_swappable
from .tombstones import Tombstones

logger = logging.getLogger("tenancy_orm.restores")

Tell = Callable[[str], None]
"""Called with what begins, for a progress display."""

READ_ONLY = {"default_transaction_read_only": "on"}
"""Settings of sessions that only look."""

_FAILURES = (TenancyError, SQLAlchemyError, *SERVER_FAILURES)
_LISTED = 1_000
_BLOCKING = ("restore", "adopt", "move")


def _silent(_: str) -> None:
    return None


class RestoreManager:
    """Restores tenants (``tenancy.restores``). Only operators may: while a tenant is bound, everything is refused.

    Args:
        config: The configuration.
        operations: The records of operations.
        tenants: Creates tenants.
        migrations: Loads the migrations.
        events: Receives ``TenantRestored``.
        backups: Has the store with tombstones.
    """

    def __init__(
        self,
        config: TenancyConfig,
        operations: Operations,
        tenants: TenantManager,
        migrations: FleetMigrator,
        events: EventBus,
        backups: BackupManager,
    ) -> None:
        services = migrations.services
        self._config = config
        self._operations = operations
        self._tenants = tenants
        self._registry = services.registry
        self._provisioner = services.provisioner
        self._events = events
        self._tombstones = Tombstones(config, services.control, backups)
        self._connections = Connections(services)
        self._making = Making(config, migrations, self._connections)
        self._switching = Switching(config, services.registry, services.provisioner, self._connections)

    # --- restoring --------------------------------------------------------------------------------------------------

    async def restore(
        self,
        tenant: TenantRef,
        source: RestoreSource,
        *,
        inspect: bool = False,
        accept: bool = False,
        tell: Tell = _silent,
        actor: Actor = SYSTEM,
    ) -> RestoreReport:
        """Restore a tenant's database beside the one in use, and swap the two while the tenant's sessions wait.

        The replaced database is kept for ``backup.keep_replaced`` seconds; until then ``undo`` swaps back. Usage, keys
        and the audit log are not turned back. Missing revisions run before the swap.

        Args:
            tenant: The tenant.
            source: What is restored.
            inspect: Stop before the swap; ``resume`` swaps, ``discard`` drops the restored database.
            accept: Let through code that the revision does not make, because an operator has looked at it.
            tell: Called with each step that begins.
            actor: Who does this, for the audit log.

        Raises:
            TenantDeletedError, TenantNotFoundError: the tenant is deleted, or has been purged.
            OperationConflictError: another operation changes the tenant's database.
            ContentsRefusedError: the contents would raise rights; nothing is left of them.
            MigrationError: they are newer than this code, or a missing revision failed.
            OperationError: the source cannot be read, or is another tenant's.
            ProvisioningError, ServerUnavailableError: the server refused, or does not answer.
        """
        refuse_while_bound("restoring a tenant")
        started = time.monotonic()
        found = await self._registry.find(tenant)
        check_swappable(found)
        if source.tenant_id is not None and source.tenant_id != found.id:
            raise OperationError(
                f"this is a backup of another tenant ({source.tenant_id}) than {found.slug!r}, and never restored into "
                "it; make a tenant of it with --as (as_slug in Python)"
            )
        await self._tombstones.refuse(found.id, found.slug)
        place = placement_of(found)
        await self._refuse_replaced(place)
        database, claimant = self._provisioner.new_databases.new_name(), Claimant()
        operation = await self._operations.begin(
            "restore",
            found.id,
            step="making",
            claimant=claimant,
            detail={
                "source": dict(source.describe()),
                "server": place.server,
                "database": database,
                "from": place.database,
                "action": "tenant.restore_backup",
            },
            actor=actor,
        )
        async with self._working(operation, claimant):
            await self._registry.record_database(
                TenantDatabase(
                    server=place.server,
                    name=database,
                    tenant_id=found.id,
                    role=place.role,
                    state="making",
                    operation=operation.id,
                )
            )
            tell("restoring")
            policy, restored = await self._making.make(found, place, database, source, accept=accept)
            operation = await self._operations.advance(
                operation,
                claimant,
                "upgrading",
                detail={"differences": policy.differences[:100], "left_out": restored.left_out},
            )
            tell("running missing revisions")
            revision = await self._making.upgrade(found, replace(place, database=database))
            operation = await self._operations.advance(
                operation, claimant, "inspect" if inspect else "switching", detail={"revision": revision}
            )
            if inspect:
                await self._operations.finish(operation, claimant, "waiting")
                return self._report(operation, found, started)
            tell("swapping")
            swapped = await self._swap(operation, actor)
            await self._operations.finish(operation, claimant, "done", detail={"kept_until": swapped.kept_until})
        return self._report(operation, swapped.tenant, started, swapped)

    async def restore_as(
        self,
        slug: str,
        source: RestoreSource,
        *,
        tier: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        server: str | None = None,
        region: str | None = None,
        accept: bool = False,
        tell: Tell = _silent,
        actor: Actor = SYSTEM,
    ) -> RestoreReport:
        """Make another tenant of a backup, all or nothing. It has usage, keys and an audit log of its own.

        Args:
            slug: The new tenant's slug.
            source: What is restored.
            tier: As for ``tenants.create``; that of the backup's tenant where None, as are the region and the server.
            metadata: As for ``tenants.create``.
            server: As for ``tenants.create``.
            region: As for ``tenants.create``.
            accept: As for ``restore``.
            tell: As for ``restore``.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: the tenant of the backup has been purged, or is not known.
            TenantExistsError: the slug is taken.
            TenancyError: as ``restore`` and ``tenants.create``; what was made has been undone.
        """
        refuse_while_bound("restoring a tenant")
        started = time.monotonic()
        origin = await self._origin(source)
        environment = await self._making.environment()
        restored = Restored()
        async with source.open() as archive:
            policy = self._making.policy(environment, archive, accept=accept)
            self._making.check_archive(environment, archive)
            extensions = await self._making.extensions(origin, archive)

            async def fill(new: NewDatabase) -> None:
                nonlocal restored
                tell("restoring")
                restored = await self._making.fill(new, archive, extensions)

            async def finish(tenant: Tenant) -> None:
                tell("running missing revisions")
                await self._making.upgrade(tenant, placement_of(tenant))
                # the first one may have been purged while its contents came in
                await self._origin(source)

            created = await self._tenants.create(
                slug,
                tier=tier or origin.tier,
                metadata=metadata,
                server=server,
                region=region or origin.region,
                filling=Filling(
                    fill=fill,
                    policy=policy,
                    timeout=self._config.backup.timeout,
                    extensions=extensions,
                    finish=finish,
                ),
                actor=actor,
            )
        await self._registry.record(
            created.id, "tenant.restored_as", detail={"source": source.describe(), "of": origin.id}, actor=actor
        )
        place = placement_of(created.tenant)
        return RestoreReport(
            operation=None,
            tenant_id=created.id,
            slug=created.slug,
            state="done",
            server=place.server,
            database=place.database,
            revision=created.tenant.schema_revision,
            differences=policy.differences,
            left_out=restored.left_out,
            api_key=created.api_key,
            seconds=time.monotonic() - started,
        )

    async def _origin(self, source: RestoreSource) -> Tenant:
        """The tenant that a source is of: a purged one's contents are never restored, under no name."""
        if source.tenant_id is None:
            raise OperationError("this source does not say which tenant it is of, so no other tenant is made of it")
        origin = await self._registry.get(source.tenant_id)
        if origin.status is Status.PURGED or origin.placement is None:
            raise TenantNotFoundError(origin.slug)
        await self._tombstones.refuse(origin.id, origin.slug)
        if await self._registry.find_unfinished(origin.id):
            raise OperationError(f"tenant {origin.slug!r} is being created or purged")
        return origin

    # --- swapping ---------------------------------------------------------------------------------------------------

    async def _swap(self, operation: Operation, actor: Actor) -> Swapped:
        detail = operation.detail
        swapped = await self._switching.swap(
            operation,
            detail["database"],
            action=detail["action"],
            revision=detail.get("revision"),
            actor=actor,
        )
        self._events.emit(
            TenantRestored(
                tenant_id=swapped.tenant.id,
                slug=swapped.tenant.slug,
                operation=operation.id,
                undone=detail["action"] == _UNDO,
                seconds=swapped.seconds,
            )
        )
        return swapped

    async def undo(self, tenant: TenantRef, *, tell: Tell = _silent, actor: Actor = SYSTEM) -> RestoreReport:
        """Swap back to the database that the last restore has replaced. What was written since is in the other one.

        That is kept in turn, so that this can be undone. Missing revisions run before the swap.

        Args:
            tenant: The tenant.
            tell: Called with each step that begins.
            actor: Who does this, for the audit log.

        Raises:
            OperationStateError: no replaced database is kept.
            TenancyError: as ``restore``.
        """
        refuse_while_bound("restoring a tenant")
        started = time.monotonic()
        found = await self._registry.find(tenant)
        check_swappable(found)
        place = placement_of(found)
        await self._refuse_replaced(place)
        kept = await self._kept(found, place.server)
        claimant = Claimant()
        operation = await self._operations.begin(
            "restore",
            found.id,
            step="upgrading",
            claimant=claimant,
            detail={"server": kept.server, "database": kept.name, "from": place.database, "action": _UNDO},
            actor=actor,
        )
        async with self._working(operation, claimant):
            tell("running missing revisions")
            operation = await self._upgrade_kept(operation, claimant, found)
            tell("swapping")
            swapped = await self._swap(operation, actor)
            await self._operations.finish(operation, claimant, "done", detail={"kept_until": swapped.kept_until})
        return self._report(operation, swapped.tenant, started, swapped)

    async def _kept(self, tenant: Tenant, server: str) -> TenantDatabase:
        kept = [
            one
            for one in await self._registry.databases_of(tenant.id)
            if one.state == "kept" and one.server == server and await self._is_restores(one)
        ]
        if not kept:
            raise OperationStateError(
                f"no restore of tenant {tenant.slug!r} can be undone: no database that it has replaced is kept"
            )
        return kept[-1]

    async def _refuse_replaced(self, place: Placement) -> None:
        """Refuse to work on a tenant with a row that is older than its last swap or move."""
        services = services_of(self._provisioner)
        server = services.servers[place.server]
        await refuse_stale(services.admin_connections, server, place.database, missing=False)

    async def _is_restores(self, beside: TenantDatabase) -> bool:
        return beside.operation is not None and (await self._operations.get(beside.operation)).kind == "restore"

    async def _upgrade_kept(self, operation: Operation, claimant: Claimant, tenant: Tenant) -> Operation:
        place = replace(placement_of(tenant), database=operation.detail["database"])
        beside = await self._beside(operation)
        if beside is None or beside.state == "dropping":
            raise OperationStateError(f"database {place.database!r} is being dropped")
        await self._provisioner.new_databases.open_to_administrators(beside)
        revision = await self._making.upgrade(tenant, place)
        return await self._operations.advance(operation, claimant, "switching", detail={"revision": revision})

    async def _beside(self, operation: Operation) -> TenantDatabase | None:
        database = operation.detail["database"]
        found = await self._registry.databases_of(operation.tenant_id)
        return next((one for one in found if one.name == database), None)

    # --- going on and back ------------------------------------------------------------------------------------------

    async def resume(self, number: int, *, tell: Tell = _silent, actor: Actor = SYSTEM) -> RestoreReport:
        """Go on with a restore that waits for its swap, or that a process has left behind.

        One that was left behind before its database was complete is undone.

        Raises:
            OperationNotFoundError: there is no such operation.
            OperationStateError: it is no restore, has ended, or a process does it now; or it could only be undone.
            TenancyError: as ``restore``.
        """
        refuse_while_bound("restoring a tenant")
        started = time.monotonic()
        operation, claimant = await self._claim(number)
        swapped: Swapped | None = None
        async with self._working(operation, claimant):
            tenant = await self._registry.get(operation.tenant_id)
            if operation.step == "making":
                raise OperationStateError(
                    f"operation {number} was interrupted before its database was complete; it is undone: restore again"
                )
            if placement_of(tenant).database != operation.detail["database"]:
                # again where its swap was interrupted: code with further revisions may go on with it
                check_swappable(tenant)
                tell("running missing revisions")
                if operation.detail["action"] == _UNDO:
                    operation = await self._upgrade_kept(operation, claimant, tenant)
                else:
                    place = replace(placement_of(tenant), database=operation.detail["database"])
                    detail = {"revision": await self._making.upgrade(tenant, place)}
                    operation = await self._operations.advance(operation, claimant, "switching", detail=detail)
            tell("swapping")
            swapped = await self._swap(operation, actor)
            await self._operations.finish(operation, claimant, "done", detail={"kept_until": swapped.kept_until})
        return self._report(operation, swapped.tenant, started, swapped)

    async def discard(self, number: int, *, actor: Actor = SYSTEM) -> None:
        """End a restore that waits for its swap, or that a process has left behind, and drop what it has made.

        Args:
            number: The operation's number.
            actor: Who does this, for the audit log.

        Raises:
            OperationNotFoundError: there is no such operation.
            OperationStateError: it is no restore, has ended, or a process does it now; or it has swapped already.
            ProvisioningError, ServerUnavailableError: the server refused, or does not answer; try again.
        """
        refuse_while_bound("restoring a tenant")
        operation, claimant = await self._claim(number)
        async with self._operations.keep(operation, claimant):
            await self._take_back(operation)
            await self._operations.finish(operation, claimant, "undone")
        await self._registry.record(
            operation.tenant_id, "tenant.discard_restore", detail={"operation": number}, actor=actor
        )

    @asynccontextmanager
    async def look(self, number: int, *, seconds: float = 3_600.0) -> AsyncIterator[Reader]:
        """Make a login that reads the restored database of a restore that waits for its swap, for the body.

        Give ``READ_ONLY`` to its sessions, so that nobody writes by mistake.

        Args:
            number: The operation's number.
            seconds: For how long the login is valid.

        Raises:
            OperationNotFoundError: there is no such operation.
            OperationStateError: it does not wait.
            ServerUnavailableError: the server does not answer.
        """
        refuse_while_bound("restoring a tenant")
        operation = await self._operations.get(number)
        if operation.kind != "restore" or operation.state != "waiting":
            raise OperationStateError(f"operation {number} ({operation.kind}) does not wait: it is {operation.state}")
        tenant = await self._registry.get(operation.tenant_id)
        place = replace(placement_of(tenant), database=operation.detail["database"])
        async with self._provisioner.readers.open(replace(tenant, placement=place), seconds=seconds) as login:
            yield login

    async def _claim(self, number: int) -> tuple[Operation, Claimant]:
        operation, claimant = await self._operations.get(number), Claimant()
        if operation.kind != "restore":
            raise OperationStateError(f"operation {number} is no restore: it is a {operation.kind}")
        return await self._operations.claim(number, claimant), claimant

    @asynccontextmanager
    async def _working(self, operation: Operation, claimant: Claimant) -> AsyncIterator[None]:
        """Keep the claim while the body works; where it fails, take the operation back and record why."""
        try:
            async with self._operations.keep(operation, claimant):
                yield
        except JobLostError:
            raise  # another process has it by now
        except BaseException as exc:
            await run_to_completion(self._fail(operation.id, claimant, exc))
            if isinstance(exc, SERVER_FAILURES) and not isinstance(exc, TenancyError):
                raise OperationError(
                    f"operation {operation.id}, a restore of tenant {operation.slug!r}, failed ({describe(exc)}); the "
                    "tenant uses the database that it had"
                ) from exc
            raise

    async def _fail(self, number: int, claimant: Claimant, error: BaseException) -> None:
        try:
            operation = await self._operations.get(number)
            if operation.state != "running":
                return
            async with self._operations.keep(operation, claimant):
                await self._take_back(operation)
                await self._operations.finish(operation, claimant, "failed", error=describe(error))
        except _FAILURES as exc:
            logger.error("operation %d could not be taken back, housekeeping will do it: %s", number, exc)

    async def _take_back(self, operation: Operation) -> None:
        """Let the tenant use what it used before, and drop what was made.

        Raises:
            OperationStateError: it has swapped already.
        """
        tenant = await self._registry.get(operation.tenant_id)
        if tenant.placement is None:
            return  # purged, with all its databases
        if operation.step == "switching":
            await self._switching.go_back(operation, operation.detail["database"])
        beside = await self._beside(operation)
        if beside is not None and beside.state == "making":
            await self._provisioner.new_databases.drop(beside)
        elif beside is not None and operation.step == "upgrading":
            await self._switching.close_beside(tenant, beside)

    async def settle(self, *, actor: Actor = SYSTEM) -> UpkeepReport:
        """End the restores that no process does any more, and drop replaced databases that are kept no longer.

        Purged tenants get a tombstone beside their backups, so that none of them is restored any more, even if the
        control database is restored to a time when the tenant was alive.

        One that was left behind while it swapped is finished; others are undone. Housekeeping does this.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("settling restores")
        settled, dropped, errors = list[int](), list[str](), list[str]()
        try:
            await self._tombstones.write()
        except _FAILURES as exc:
            errors.append(f"tombstones in the store of backups: {exc}")
        for operation in await self._operations.list(kinds=("restore",), states=("running", "waiting"), limit=_LISTED):
            if not operation.is_abandoned and not await self._is_over(operation):
                continue
            try:
                await self._settle(operation, actor)
                settled.append(operation.id)
            except _FAILURES as exc:
                errors.append(f"operation {operation.id}: {exc}")
        for beside in await self._registry.databases_to_drop():
            try:
                if await self._is_needed(beside):
                    continue
                await self._provisioner.new_databases.drop(beside)
                dropped.append(beside.name)
            except _FAILURES as exc:
                errors.append(f"database {beside.name}: {exc}")
        return UpkeepReport(settled=tuple(settled), dropped=tuple(dropped), errors=tuple(errors))

    async def _is_over(self, operation: Operation) -> bool:
        """Whether an operation waits for a tenant that has been purged since."""
        if operation.state != "waiting":
            return False
        return (await self._registry.get(operation.tenant_id)).status is Status.PURGED

    async def _settle(self, operation: Operation, actor: Actor) -> None:
        if operation.step == "switching":
            try:
                await self.resume(operation.id, actor=actor)
            except TenancyError:
                if (await self._operations.get(operation.id)).state == "running":
                    raise
            return  # finished, or failed and taken back
        await self.discard(operation.id, actor=actor)

    async def _is_needed(self, beside: TenantDatabase) -> bool:
        """Whether an operation that is not over may go back to a database."""
        if beside.state != "kept":
            return False
        unfinished = await self._operations.list(tenant_id=beside.tenant_id, states=("running", "waiting"), limit=10)
        return any(one.kind in _BLOCKING and one.detail.get("database") == beside.name for one in unfinished)

    @staticmethod
    def _report(operation: Operation, tenant: Tenant, started: float, swapped: Swapped | None = None) -> RestoreReport:
        detail = operation.detail
        return RestoreReport(
            operation=operation.id,
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


_UNDO = "tenant.undo_restore_backup"


__all__ = ["READ_ONLY", "RestoreManager", "Tell"]
