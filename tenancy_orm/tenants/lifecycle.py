"""``TenantLifecycle``: changes of a tenant's status, at once or at a set time, and its purge."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping
from datetime import datetime
from typing import Any

from ..audit.actor import SYSTEM, Actor
from ..authentication.directory import Directory
from ..cancellation import run_to_completion
from ..context import refuse_other_tenant
from ..errors import LoginNotBlockedError, ProvisioningError, RoutingError, TenantNotFoundError
from ..events import EventBus, TenantPurged, TenantStatusChanged, TenantUpdated
from ..provisioning import Provisioner
from ..registry.lifecycle import LOGIN_BLOCKED
from ..registry.registry import Registry
from ..tenant import Status, Tenant, TenantRef
from .fields import check_aware

logger = logging.getLogger("tenancy_orm.tenants")


class TenantLifecycle:
    """Changes tenants' statuses, at once or at a set time, and purges; a part of ``TenantManager``.

    Every change is audited in the same transaction, under ``actor``. What is so already is no error, and no change:
    suspending a suspended tenant returns it, writes no audit entry and emits no event, so that scripts and webhooks can
    be repeated. Another reason is recorded. A login that could not be blocked the first time is blocked then.
    """

    def __init__(self, *, registry: Registry, directory: Directory, provisioner: Provisioner, events: EventBus) -> None:
        self._registry = registry
        self._directory = directory
        self._provisioner = provisioner
        self._events = events

    # --- status -----------------------------------------------------------------------------------------------------

    async def activate(self, tenant: TenantRef, *, actor: Actor = SYSTEM) -> Tenant:
        """Make a tenant active that is suspended, in trial or in maintenance.

        After maintenance, ``end_maintenance`` restores the status that the tenant had before.

        Raises:
            InvalidTransitionError: it is being created, or is deleted: restore it first.
            TenantNotFoundError: no such tenant.
        """
        return await self._transition(tenant, Status.ACTIVE, action="tenant.activate", actor=actor)

    async def suspend(self, tenant: TenantRef, *, reason: str | None = None, actor: Actor = SYSTEM) -> Tenant:
        """Refuse the tenant's requests and end its connections, in every process; its data stays.

        Raises:
            InvalidTransitionError: it is being created, or is deleted.
            TenantNotFoundError: no such tenant.
            LoginNotBlockedError: it is suspended, but its login could not be blocked on its server.
        """
        return await self._transition(tenant, Status.SUSPENDED, action="tenant.suspend", reason=reason, actor=actor)

    async def start_maintenance(self, tenant: TenantRef, *, reason: str | None = None, actor: Actor = SYSTEM) -> Tenant:
        """Put a tenant into maintenance: its requests get 503 with Retry-After, and only operators are served.

        ``end_maintenance`` ends it.

        Raises:
            InvalidTransitionError: it is being created, or is deleted.
            TenantNotFoundError: no such tenant.
        """
        return await self._transition(tenant, Status.MAINTENANCE, action="tenant.maintain", reason=reason, actor=actor)

    async def end_maintenance(self, tenant: TenantRef, *, actor: Actor = SYSTEM) -> Tenant:
        """End the maintenance of a tenant: its status is again active, trial or suspended, as before.

        Raises:
            InvalidTransitionError: it is being created, or is deleted.
            TenantNotFoundError: no such tenant.
        """
        return await self._transition(
            tenant, None, action="tenant.end_maintenance", leaving=Status.MAINTENANCE, actor=actor
        )

    async def start_trial(self, tenant: TenantRef, *, ends_at: datetime, actor: Actor = SYSTEM) -> Tenant:
        """Start another trial of a suspended tenant, until ``ends_at``.

        ``update(trial_ends_at=...)`` extends a trial that is running. Where ``ends_at`` has passed, the next
        housekeeping suspends the tenant again.

        Raises:
            InvalidTransitionError: it is neither suspended nor in maintenance, nor in a trial until ``ends_at``.
            ConfigurationError: the time is naive.
            TenantNotFoundError: no such tenant.
        """
        values = {"trial_ends_at": check_aware("ends_at", ends_at)}
        return await self._transition(tenant, Status.TRIAL, action="tenant.start_trial", actor=actor, values=values)

    async def delete(self, tenant: TenantRef, *, reason: str | None = None, actor: Actor = SYSTEM) -> Tenant:
        """Delete a tenant softly: its keys are refused and its connections ended; its data is kept until ``purge``.

        Raises:
            InvalidTransitionError: it is being created.
            TenantNotFoundError: no such tenant.
            LoginNotBlockedError: it is deleted, but its login could not be blocked on its server.
        """
        return await self._transition(tenant, Status.DELETED, action="tenant.delete", reason=reason, actor=actor)

    async def restore(self, tenant: TenantRef, *, actor: Actor = SYSTEM) -> Tenant:
        """Undo ``delete``: the tenant has its previous status again.

        Raises:
            InvalidTransitionError: its purge has begun, or it is being created.
            TenantNotFoundError: no such tenant.
        """
        return await self._transition(tenant, None, action="tenant.restore", actor=actor)

    # --- schedules --------------------------------------------------------------------------------------------------

    async def schedule_suspension(
        self, tenant: TenantRef, at: datetime | None, *, reason: str | None = None, actor: Actor = SYSTEM
    ) -> Tenant:
        """Schedule a suspension by ``run_housekeeping`` at a time, an aware datetime; None cancels it.

        Raises:
            ConfigurationError: the time is naive.
            TenantNotFoundError: no such tenant.
        """
        at = check_aware("at", at)
        found = await self._get_unpurged(tenant)
        return await self._registry.schedule_suspension(found.id, at, reason=reason, actor=actor)

    async def schedule_purge(self, tenant: TenantRef, at: datetime | None, *, actor: Actor = SYSTEM) -> Tenant:
        """Schedule the purge of a deleted tenant by ``run_housekeeping`` at this time; None: after the usual retention.

        Raises:
            ConfigurationError: the time is naive.
            InvalidTransitionError: the tenant is not deleted.
            TenantNotFoundError: no such tenant.
        """
        at = check_aware("at", at)
        found = await self._get_unpurged(tenant)
        return await self._registry.schedule_purge(found.id, at, actor=actor)

    async def suspend_due(self, listed: Tenant, *, reason: str | None, actor: Actor = SYSTEM) -> Tenant:
        """Suspend a tenant unless it has changed since ``Registry.due`` listed it: for ``run_housekeeping``.

        Raises:
            InvalidTransitionError: it has changed since.
            LoginNotBlockedError: it is suspended, but its login could not be blocked on its server.
        """
        refuse_other_tenant(listed)
        return await self._transition(
            listed, Status.SUSPENDED, action="tenant.suspend", reason=reason, listed=listed, actor=actor
        )

    async def purge_due(self, listed: Tenant, *, actor: Actor = SYSTEM) -> None:
        """Purge a tenant unless it has changed since ``Registry.due`` listed it: for ``run_housekeeping``.

        Raises:
            InvalidTransitionError: it has changed since.
            ProvisioningError, ServerUnavailableError: its server refused, or does not answer.
        """
        refuse_other_tenant(listed)
        await run_to_completion(self._purge(listed, listed, actor))

    # --- purge ------------------------------------------------------------------------------------------------------

    async def purge(self, tenant: TenantRef, *, lost_server: str | None = None, actor: Actor = SYSTEM) -> None:
        """Remove a deleted tenant permanently: database, role, keys and secrets. A tombstone stays in the registry.

        To finish a purge that was interrupted, call this again or ``reconcile``. By its id, a purged tenant can be
        purged again, which does nothing; by its slug it is not found, since the slug may be another tenant's by now.

        Args:
            tenant: The tenant.
            lost_server: A server that does not exist any more, and never will again: what the tenant has there is
                forgotten, and not dropped. The audit log, and the certificate of the erasure, say so.
            actor: Who does this, for the audit log.

        Raises:
            InvalidTransitionError: it is not deleted: delete it first.
            TenantNotFoundError: no such tenant.
            ProvisioningError, ServerUnavailableError: its server refused, or does not answer; try again. Or
                ``lost_server`` answers, or has nothing of the tenant.
        """
        found = await self._registry.find(tenant)
        if found.status is not Status.PURGED:
            await run_to_completion(self._purge(found, None, actor, lost_server))

    async def _purge(
        self, found: Tenant, listed: Tenant | None, actor: Actor, lost_server: str | None = None
    ) -> Tenant:
        await self._provisioner.purge(found, listed=listed, lost_server=lost_server, actor=actor)
        self._directory.invalidate(tenant_id=found.id)
        self._events.emit(TenantPurged(tenant_id=found.id, slug=found.slug))
        return found

    # --- what they share --------------------------------------------------------------------------------------------

    async def _transition(
        self,
        tenant: TenantRef,
        target: Status | None,
        *,
        action: str,
        actor: Actor,
        leaving: Status = Status.DELETED,
        reason: str | None = None,
        listed: Tenant | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Tenant:
        found = await self._get_unpurged(tenant)
        change = self._registry.transition(
            found.id,
            target,
            action=action,
            leaving=leaving,
            reason=reason,
            listed=listed,
            actor=actor,
            **(values or {}),
        )
        return await run_to_completion(self._change_status(change))

    async def _change_status(self, change: Coroutine[Any, Any, tuple[Tenant, Tenant]]) -> Tenant:
        before, after = await change
        self._directory.invalidate(tenant_id=after.id)
        if before.status is after.status:
            if before.reason != after.reason:
                self._events.emit(TenantUpdated(tenant_id=after.id, slug=after.slug, fields=("reason",)))
            await self._align(after)
            return after
        # before the server is changed, which takes a while: events come in the order of the changes
        self._events.emit(
            TenantStatusChanged(
                tenant_id=after.id,
                slug=after.slug,
                before=before.status.value,
                after=after.status.value,
                reason=after.reason,
            )
        )
        if (before.status in LOGIN_BLOCKED) != (after.status in LOGIN_BLOCKED):
            await self._align(after)
        return after

    async def _align(self, tenant: Tenant) -> None:
        """Block or unblock the tenant's login on its server, and apply the connection limit of its tier.

        The registry's change is in force already, in every process. ``reconcile`` repeats this on a server that does
        not answer now.

        Raises:
            LoginNotBlockedError: the login could not be blocked.
        """
        try:
            await self._provisioner.align(tenant)
        except (RoutingError, ProvisioningError) as exc:
            if tenant.status in LOGIN_BLOCKED:
                raise LoginNotBlockedError(tenant.slug, tenant.status.value, str(exc)) from exc
            logger.error("tenant %s was changed, but not on its server; reconcile will do it (%s)", tenant.slug, exc)

    async def _get_unpurged(self, tenant: TenantRef) -> Tenant:
        found = await self._registry.find(tenant)
        if found.status is Status.PURGED:
            raise TenantNotFoundError(found.slug)
        return found


__all__ = ["TenantLifecycle"]
