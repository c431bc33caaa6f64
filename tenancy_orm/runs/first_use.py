"""``FirstUse``: upgrades a tenant before it is used, where this code is to do that by itself."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextvars import Context
from functools import partial
from uuid import UUID

from ..audit.actor import SYSTEM
from ..cancellation import run_to_completion
from ..control.database import ControlDatabase
from ..errors import ControlUnavailableError, JobLostError, NotOpenError, TenantProvisioningError
from ..jobs import Claimant, keep_claims
from ..migrations.failures import describe
from ..postgres.errors import sqlstate_of
from ..provisioning.templates.building import SchemaSource
from ..tenant import Status, Tenant
from .attempts import UpgradeAttempts
from .catch_up import CatchUp
from .compatibility import Compatibility

logger = logging.getLogger("tenancy_orm.migrations")

_LEFT_SECONDS = 60.0  # for how long a tenant that is not to be upgraded is not looked at again
_IDLE_SECONDS = 5.0  # for how long no tenant is looked at after the fleet was found at another revision
_POLL_SECONDS = 0.25  # how often it is looked whether another process has done it
_SERVED = frozenset({Status.TRIAL, Status.ACTIVE})


class FirstUse:
    """Upgrades tenants before they are used.

    Always those that ``CatchUp`` is for. With ``migration.on_demand``, also each that this code does not serve at its
    revision; or, where the application declares no ``compatible_revisions``, each that is not at this code's head.
    Older code upgrades nothing that newer code has upgraded, and no code what an operator has moved back.

    One process does it, and the others wait. After a failure no process tries again for a minute, then for twice as
    long, up to an hour.

    Args:
        catch_up: Upgrades tenants.
        control: The control database, which has the claims.
        schema: The schema of the code that runs.
        compatibility: What the code can work with, if it declares that.
    """

    def __init__(
        self, catch_up: CatchUp, control: ControlDatabase, schema: SchemaSource, compatibility: Compatibility | None
    ) -> None:
        self._catch_up = catch_up
        self._schema = schema
        self._compatibility = compatibility
        config = catch_up.services.config
        self._registry = catch_up.services.registry
        self._on_demand = config.migrations is not None and config.migration.on_demand
        self._wait_seconds = config.migration.upgrade_wait
        self.attempts = UpgradeAttempts(control, Claimant())
        self._head: str | None = None
        # as many at once as there are creations: each needs an administrative connection
        self._slots = asyncio.Semaphore(config.provisioning.concurrency)
        self._running: dict[UUID, tuple[asyncio.Task[None], float]] = {}  # until when a use waits for it
        self._left: dict[UUID, float] = {}  # until when a tenant is used as it is
        self._most_left = 100  # with more, those that are over are removed
        self._idle_until = 0.0  # until when every tenant is, but for those that are upgraded on demand

    def before_use(self, tenant: Tenant) -> Awaitable[None] | None:
        """Return what upgrades a tenant before it is used; None if it can be used at once, as in the common case.

        Concurrent calls share one upgrade, which a cancellation of the caller does not end. If it fails, the tenant is
        used as it is, where the code serves it at its revision.

        Awaiting it raises:
            TenantProvisioningError: the upgrade takes longer than ``migration.upgrade_wait``; it goes on.
        """
        if tenant.schema_revision is None or tenant.schema_revision == self._head or tenant.status not in _SERVED:
            return None
        demanded = self._is_demanded(tenant)
        now = time.monotonic()
        if not demanded and (not self._catch_up.enabled or now < self._idle_until):
            return None
        if now < self._left.get(tenant.id, 0.0):
            return None
        return self._wait(tenant)

    async def close(self) -> None:
        """End the upgrades that run; whatever they have not committed is rolled back."""
        tasks = [task for task, _ in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_demanded(self, tenant: Tenant) -> bool:
        if not self._on_demand:
            return False
        if self._compatibility is not None:
            return not self._compatibility.allows(tenant.schema_revision)
        return tenant.schema_revision != self._head

    async def _wait(self, tenant: Tenant) -> None:
        task, until = self._running.get(tenant.id) or self._begin(tenant)
        # from its beginning: requests for a tenant with a long upgrade must not pile up
        await asyncio.wait({task}, timeout=max(0.0, until - time.monotonic()))
        if not task.done() or task.cancelled():
            raise TenantProvisioningError(tenant.slug, reason="its schema is being upgraded")

    def _begin(self, tenant: Tenant) -> tuple[asyncio.Task[None], float]:
        # unbound: the upgrade is an operator's work, whoever runs now
        task = asyncio.get_running_loop().create_task(self._upgrade(tenant), context=Context())
        task.add_done_callback(lambda _: self._running.pop(tenant.id, None))
        self._running[tenant.id] = begun = task, time.monotonic() + self._wait_seconds
        return begun

    async def _upgrade(self, tenant: Tenant) -> None:
        try:
            # in a thread: it reads every revision
            head = self._head = self._head or await asyncio.to_thread(self._schema.head)
            if head is None or tenant.schema_revision == head:
                return
            found, action = await self._find(tenant)
            if found is None:
                self._leave(tenant.id, _LEFT_SECONDS)
            else:
                await self._claim(found, head, action)
        except Exception as exc:  # noqa: BLE001 - env.py and revisions may raise anything, and no request fails for it
            logger.warning("tenant %s is not upgraded before its use: %s", tenant.slug, describe(exc))
            self._leave(tenant.id, _LEFT_SECONDS)

    async def _find(self, tenant: Tenant) -> tuple[Tenant | None, str]:
        """Return the tenant as it is now, if it is to be upgraded, and what the audit log calls that."""
        behind = await self._catch_up.behind(tenant.id) if self._catch_up.enabled else []
        if behind:
            return behind[0], "tenant.catch_up"
        if behind is None:
            self._idle_until = time.monotonic() + _IDLE_SECONDS
        if not self._is_demanded(tenant):
            return None, ""
        return await self._catch_up.upgradable(tenant.id), "tenant.upgrade"

    async def _claim(self, tenant: Tenant, head: str, action: str) -> None:
        while not (claim := await self.attempts.claim(tenant.id, head)).granted:
            if claim.pause is not None:
                self._leave(tenant.id, min(claim.pause, _LEFT_SECONDS))
                return
            await asyncio.sleep(_POLL_SECONDS)
            if (await self._registry.get(tenant.id)).schema_revision == head:
                return
        try:
            async with keep_claims(partial(self.attempts.renew, tenant.id)), self._slots:
                report = await self._catch_up.upgrade([tenant], SYSTEM, action)
        except asyncio.CancelledError:
            await run_to_completion(self._release(tenant.id))
            raise
        except JobLostError:
            raise
        except Exception as exc:  # noqa: BLE001 - as above: the template fails, for example
            await self._failed(tenant, describe(exc), sqlstate_of(exc))
            return
        for outcome in () if report is None else report.failures:
            await self._failed(tenant, outcome.error or "", outcome.sqlstate)
            return
        await self.attempts.end(tenant.id)
        if report is None:
            self._leave(tenant.id, _LEFT_SECONDS)

    async def _failed(self, tenant: Tenant, error: str, sqlstate: str | None) -> None:
        pause = await self.attempts.fail(tenant.id, error, sqlstate)
        logger.warning(
            "tenant %s could not be upgraded before its use, and is not tried again for %.0f s: %s",
            tenant.slug,
            pause,
            error,
        )
        self._leave(tenant.id, min(pause, _LEFT_SECONDS))

    async def _release(self, tenant_id: UUID) -> None:
        try:
            await self.attempts.release(tenant_id)
        except (ControlUnavailableError, NotOpenError) as exc:
            logger.debug("a claim is left to end by itself: %s", exc)

    def _leave(self, tenant_id: UUID, seconds: float) -> None:
        now = time.monotonic()
        self._left[tenant_id] = now + seconds
        # not each time: after a deploy, each of thousands of tenants comes here at its first use
        if len(self._left) > self._most_left:
            self._left = {known: until for known, until in self._left.items() if until > now}
            self._most_left = 2 * len(self._left) + 100


__all__ = ["FirstUse"]
