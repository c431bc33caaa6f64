"""``RestoreManager``: brings a tenant's database back from a backup or a recovered server (``tenancy.restores``)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from ..audit.actor import SYSTEM, Actor
from ..config import TenancyConfig
from ..context import refuse_while_bound
from ..errors import OperationError, OperationStateError, TenantNotFoundError
from ..events import EventBus
from ..migrations.connections import Connections
from ..operations import Operations
from ..operations.progress import StepProgress, silent
from ..provisioning.copies.restoring import Restored
from ..provisioning.creation.filled_creation import Filling
from ..provisioning.creation.new_databases import NewDatabase
from ..provisioning.logins.readers import Reader
from ..provisioning.provisioner import services_of
from ..provisioning.server_objects.replaced_databases import refuse_stale
from ..registry.databases import TenantDatabase
from ..registry.lifecycle import check_database_in_use
from ..runs import FleetMigrator
from ..tenant import Placement, Status, Tenant, TenantRef, placement_of
from ..tenants.manager import TenantManager
from .making import Making
from .report import RestoreReport, UpkeepReport
from .sources import RestoreSource
from .steps import UNDO, RestoreServices, begin, claim
from .switching import Switching
from .tombstones import Tombstones
from .upkeep import RestoreUpkeep

READ_ONLY = {"default_transaction_read_only": "on"}
"""Settings of sessions that only look."""


class RestoreManager:
    """Restores tenants (``tenancy.restores``). Only operators may: while a tenant is bound, everything is refused.

    Args:
        config: The configuration.
        operations: The records of operations.
        tenants: Creates tenants.
        migrations: Loads the migrations.
        events: Receives ``TenantRestored``.
        tombstones: Know who was purged, as the store of backups says.
    """

    def __init__(
        self,
        config: TenancyConfig,
        operations: Operations,
        tenants: TenantManager,
        migrations: FleetMigrator,
        events: EventBus,
        tombstones: Tombstones,
    ) -> None:
        services = migrations.services
        self._config = config
        self._operations = operations
        self._tenants = tenants
        self._registry = services.registry
        self._provisioner = services.provisioner
        self._tombstones = tombstones
        connections = Connections(services)
        self._making = Making(config, migrations, connections)
        self._services = RestoreServices(
            operations=operations,
            registry=services.registry,
            provisioner=services.provisioner,
            making=self._making,
            switching=Switching(config, services.registry, services.provisioner, connections),
            events=events,
        )
        self._upkeep = RestoreUpkeep(self._services, tombstones)

    # --- restoring --------------------------------------------------------------------------------------------------

    async def restore(
        self,
        tenant: TenantRef,
        source: RestoreSource,
        *,
        inspect: bool = False,
        accept: bool = False,
        progress: StepProgress | None = None,
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
            progress: Called with each step that begins, in words.
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
        check_database_in_use(found)
        if source.tenant_id is not None and source.tenant_id != found.id:
            raise OperationError(
                f"this is a backup of another tenant ({source.tenant_id}) than {found.slug!r}, and cannot be restored "
                "into it; make a tenant of it with --as (as_slug in Python)"
            )
        await self._tombstones.refuse(found.id, found.slug)
        place = placement_of(found)
        await self._refuse_replaced(place)
        restore = await begin(
            self._services,
            found,
            "making",
            detail={
                "source": dict(source.describe()),
                "server": place.server,
                "database": self._provisioner.new_databases.new_name(),
                "from": place.database,
                "action": "tenant.restore_backup",
            },
            progress=progress,
            actor=actor,
        )
        async with restore.working():
            await restore.make(found, source, accept=accept)
            await restore.upgrade(found, then="inspect" if inspect else "switching")
            if inspect:
                await restore.wait()
                return restore.report(found, started)
            swapped = await restore.swap(actor)
        return restore.report(swapped.tenant, started, swapped)

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
        progress: StepProgress | None = None,
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
            progress: As for ``restore``.
            actor: Who does this, for the audit log.

        Raises:
            TenantNotFoundError: the tenant of the backup has been purged, or is not known.
            TenantExistsError: the slug is taken.
            TenancyError: as ``restore`` and ``tenants.create``; what was made has been undone.
        """
        refuse_while_bound("restoring a tenant")
        started = time.monotonic()
        origin = await self._origin(source)
        progress = progress or silent
        environment = await self._making.environment()
        restored = Restored()
        async with source.open() as archive:
            policy = self._making.policy(environment, archive, accept=accept)
            self._making.check_archive(environment, archive)
            extensions = await self._making.extensions(origin, archive)

            async def fill(new: NewDatabase) -> None:
                nonlocal restored
                progress("restoring")
                restored = await self._making.fill(new, archive, extensions)

            async def finish(tenant: Tenant) -> None:
                progress("running missing revisions")
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
                    copied_from=origin.id,
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
            raise OperationError("this source names no tenant, so no other tenant can be made of it")
        origin = await self._registry.get(source.tenant_id)
        if origin.status is Status.PURGED or origin.placement is None:
            raise TenantNotFoundError(origin.slug)
        await self._tombstones.refuse(origin.id, origin.slug)
        if await self._registry.find_unfinished(origin.id):
            raise OperationError(f"tenant {origin.slug!r} is being created or purged")
        return origin

    # --- going on and back ------------------------------------------------------------------------------------------

    async def undo(
        self, tenant: TenantRef, *, progress: StepProgress | None = None, actor: Actor = SYSTEM
    ) -> RestoreReport:
        """Swap back to the database that the last restore has replaced. What was written since is in the other one.

        That is kept in turn, so that this can be undone. Missing revisions run before the swap.

        Args:
            tenant: The tenant.
            progress: Called with each step that begins, in words.
            actor: Who does this, for the audit log.

        Raises:
            OperationStateError: no replaced database is kept.
            TenancyError: as ``restore``.
        """
        refuse_while_bound("restoring a tenant")
        started = time.monotonic()
        found = await self._registry.find(tenant)
        check_database_in_use(found)
        place = placement_of(found)
        await self._refuse_replaced(place)
        kept = await self._kept(found, place.server)
        restore = await begin(
            self._services,
            found,
            "upgrading",
            detail={"server": kept.server, "database": kept.name, "from": place.database, "action": UNDO},
            progress=progress,
            actor=actor,
        )
        async with restore.working():
            await restore.upgrade(found)
            swapped = await restore.swap(actor)
        return restore.report(swapped.tenant, started, swapped)

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

    async def resume(
        self, number: int, *, progress: StepProgress | None = None, actor: Actor = SYSTEM
    ) -> RestoreReport:
        """Go on with a restore that waits for its swap, or that a process has left behind.

        One that was left behind before its database was complete is undone.

        Raises:
            OperationNotFoundError: there is no such operation.
            OperationStateError: it is no restore, has ended, or a process does it now; or it could only be undone.
            TenancyError: as ``restore``.
        """
        refuse_while_bound("restoring a tenant")
        started = time.monotonic()
        restore = await claim(self._services, number, progress=progress)
        swapped = await restore.go_on(actor)
        return restore.report(swapped.tenant, started, swapped)

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
        restore = await claim(self._services, number)
        await restore.discard(actor)

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

    async def tidy(self, *, actor: Actor = SYSTEM) -> UpkeepReport:
        """End the restores that no process does any more, and drop replaced databases that are kept no longer.

        Purged tenants get a tombstone beside their backups, so that none of them is restored any more, even if the
        control database is restored to a time when the tenant was alive.

        One that was left behind while it swapped is finished; others are undone. Housekeeping does this.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("tidying restores")
        return await self._upkeep.tidy(actor=actor)


__all__ = ["READ_ONLY", "RestoreManager"]
