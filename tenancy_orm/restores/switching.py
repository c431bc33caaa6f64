"""``Switching``: makes a database beside the one in use the one in use, while the tenant's sessions wait.

The order leaves one writable copy at any time, see ``operations.switch``. Until the tenant's row names the new
database, whoever takes the operation over can go on or go back; from then on, it goes on. The old one is sealed: not
even the owner connects to it before an undo opens it again. Its marker says which one has replaced it, so that nothing
else opens it, even if the control database is restored to a time before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from ..audit.actor import Actor
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..errors import (
    OperationStateError,
    ProvisioningError,
)
from ..migrations.connections import Connections, Health
from ..migrations.database import close, lock
from ..operations import Operation
from ..operations.switch import PAUSE_SECONDS, Paused, Switch
from ..postgres.errors import describe
from ..postgres.failures import FAILURES, SERVER_FAILURES
from ..provisioning import Provisioner
from ..provisioning.provisioner import services_of
from ..provisioning.server_objects import databases
from ..provisioning.server_objects.replaced_databases import refuse_stale
from ..registry.databases import TenantDatabase
from ..registry.lifecycle import LOGIN_BLOCKED, check_database_in_use
from ..registry.registry import Registry
from ..routing.marker import marker_text, replaced_text
from ..tenant import Tenant, placement_of

logger = logging.getLogger("tenancy_orm.restores")


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """A swap that is done."""

    tenant: Tenant
    replaced: str
    kept_until: datetime
    seconds: float


class Switching:
    """Swaps the database that a tenant uses.

    Args:
        config: ``backup.keep_replaced`` is read from it.
        registry: The tenants.
        provisioner: Opens and closes databases.
        connections: Connects to databases, to wait for a migration.
    """

    def __init__(
        self,
        config: TenancyConfig,
        registry: Registry,
        provisioner: Provisioner,
        connections: Connections,
    ) -> None:
        self._config = config
        self._registry = registry
        self._provisioner = provisioner
        self._new = provisioner.new_databases
        self._services = services_of(provisioner)
        self._switch = Switch(self._services)
        self._connections = connections

    async def swap(
        self, operation: Operation, database: str, *, action: str, revision: str | None, actor: Actor
    ) -> Swapped:
        """Make a database the one in use. To go on after an interruption, repeat it.

        Args:
            operation: The operation, in the step of the swap; its detail has the database in use as ``from``.
            database: The database's name; its server is the tenant's.
            action: The action for the audit log.
            revision: The revision of its schema.
            actor: Who does this.

        Raises:
            TenantDeletedError, TenantNotFoundError: the tenant was deleted or purged.
            OperationStateError: it has another placement by now, or the database is being dropped.
            TenancyError: the swap failed, and the tenant uses its old database.
        """
        started = time.monotonic()
        before = await self._registry.get(operation.tenant_id)
        place = placement_of(before)
        if place.database == database:
            await self._registry.end_pause(before.id)
            await self._finish(before, operation.detail["from"])
            return await self._done(before, str(operation.detail["from"]), started)
        if place.database != operation.detail["from"]:
            raise OperationStateError(
                f"tenant {before.slug!r} was moved or restored in the meantime: it uses {place.database}"
            )
        check_database_in_use(before)
        try:
            async with self._between_migrations(before), self._switch.pause(before, seconds=PAUSE_SECONDS) as paused:
                after = await self._exchange(paused, operation, database, action, revision, actor)
        except BaseException as exc:
            switched = await run_to_completion(self._go_back(operation, database))
            if switched is None or not isinstance(exc, Exception):
                raise
            after = switched  # the commit was in doubt, or only the end of the pause has failed
        await self._finish(after, place.database)
        return await self._done(after, place.database, started)

    async def _exchange(
        self, paused: Paused, operation: Operation, database: str, action: str, revision: str | None, actor: Actor
    ) -> Tenant:
        old = placement_of(paused.tenant)
        check_database_in_use(paused.tenant)
        new = replace(old, database=database)
        # by an undo: until here it says that the other one has replaced it
        mark = marker_text(self._services.installation, paused.tenant.id)
        await databases.set_marker(paused.connection, database, mark)
        if paused.tenant.status not in LOGIN_BLOCKED:
            await self._new.set_connect(new, True)
            await self._new.prove(paused.tenant, new)
        kept_until = datetime.now(UTC) + timedelta(seconds=self._config.backup.keep_replaced)
        return await paused.to(
            new, action=action, revision=revision, kept_until=kept_until, operation=operation.id, actor=actor
        )

    @asynccontextmanager
    async def _between_migrations(self, tenant: Tenant) -> AsyncIterator[None]:
        """Wait for the end of a migration of the tenant, so that the swap does not interrupt it."""
        target = self._connections.target(tenant, Health())
        try:
            connection = await target.connect()
        except SERVER_FAILURES as exc:
            # it was closed before an interruption: nobody migrates it
            logger.debug("database of tenant %s is closed already: %s", tenant.slug, describe(exc))
            yield
            return
        try:
            await lock(connection, timeout=self._connections.limits.wait)
            yield
        finally:
            # closing the database has ended it
            await run_to_completion(close(connection))

    async def _finish(self, tenant: Tenant, replaced: str) -> None:
        """Seal the old database, and let the role be as the tenant's status says, which may have changed."""
        try:
            await self._seal(tenant, replaced)
        except ProvisioningError as exc:
            if exc.step != "sessions":
                raise
            # nobody can connect: what is left is an administrator's
            logger.warning("tenant %s: sessions in the replaced database continue: %s", tenant.slug, exc)
        await self._provisioner.align(await self._registry.get(tenant.id))

    async def _seal(self, tenant: Tenant, replaced: str) -> None:
        """Let nobody connect to a database that the one in use has replaced, and let its marker say so.

        Raises:
            ProvisioningError: it may be the one in use, since the one that the tenant's row names was replaced, or does
                not exist; or the server refused, see ``set_connect``.
        """
        services, place = self._services, placement_of(tenant)
        await refuse_stale(services.admin_connections, services.servers[place.server], place.database)
        mark = replaced_text(services.installation, tenant.id, place)
        await self._new.set_connect(replace(place, database=replaced), False, mark=mark)

    async def _done(self, tenant: Tenant, replaced: str, started: float) -> Swapped:
        beside = [one for one in await self._registry.databases_of(tenant.id) if one.name == replaced]
        until = (beside[0].kept_until if beside else None) or datetime.now(UTC)
        return Swapped(tenant=tenant, replaced=replaced, kept_until=until, seconds=time.monotonic() - started)

    # --- back -------------------------------------------------------------------------------------------------------

    async def _go_back(self, operation: Operation, database: str) -> Tenant | None:
        """Go back after a failure, unless the tenant uses the new database already: then return it."""
        try:
            # a commit in doubt has ended by then
            current = await self._registry.get_after_pending_commits(operation.tenant_id)
            if current.placement is not None and current.placement.database == database:
                return current
            await self.go_back(operation, database)
        except FAILURES as exc:
            logger.error(
                "operation %d could not be taken back, housekeeping will do it: %s", operation.id, describe(exc)
            )
        return None

    async def go_back(self, operation: Operation, database: str) -> None:
        """Let the tenant use the database that its row names, and close the other one. To go on, repeat it.

        Raises:
            OperationStateError: its row names the other one.
            ProvisioningError: the one that its row names was replaced; or the server refused.
            TenancyError: a server does not answer, or refuses.
        """
        current = await self._registry.get(operation.tenant_id)
        if current.placement is None:
            return  # purged
        async with self._new.locked(current) as locked:
            place = placement_of(locked)
            if place.database == database:
                raise OperationStateError(f"tenant {locked.slug!r} uses database {database!r} already")
            beside = await self.beside(locked, database)
            if beside is not None:
                await self.close_beside(locked, beside)
            if locked.status not in LOGIN_BLOCKED:
                await self._new.set_connect(place, True)
            await self._switch.let_guests_in(place)
        # a pause of a process that was killed
        await self._registry.end_pause(operation.tenant_id)

    async def beside(self, tenant: Tenant, database: str) -> TenantDatabase | None:
        """Return a database beside the one in use, by its name."""
        return next((one for one in await self._registry.databases_of(tenant.id) if one.name == database), None)

    async def close_beside(self, tenant: Tenant, beside: TenantDatabase) -> None:
        """Let nobody connect to a database that is not the one in use.

        Raises:
            ProvisioningError: it may be the one in use, since the one that the tenant's row names was replaced; or the
                server refused.
        """
        if beside.state == "kept":
            await self._seal(tenant, beside.name)
            return
        services, place = self._services, placement_of(tenant)
        server = services.servers[place.server]
        await refuse_stale(services.admin_connections, server, place.database, missing=False)
        await self._new.set_connect(replace(place, database=beside.name), False)


__all__ = ["Swapped", "Switching"]
