"""What has to be done from time to time: ``tenancy run-maintenance``, from a timer, on any number of machines.

Every part decides under a lock of its own (the tenant's row, its advisory lock on the server), so that two runs at once
share the work and never do anything twice.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from ..config import TenancyConfig
from ..context import Tenant
from ..errors import InvalidTransitionError, TenancyError, TenantNotFoundError
from .audit import SYSTEM, Actor
from .failures import SERVER_FAILURES
from .registry import Registry
from .tenants import TenantManager

logger = logging.getLogger("tenancy_orm.maintenance")

Chore = Callable[[], Awaitable[Any]]

# what a server may answer, or fail to; a mistake in the code is none of them and ends the run
_FAILURES = (TenancyError, SQLAlchemyError, *SERVER_FAILURES)


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one run did: slugs of tenants suspended and purged, results of the chores by name, and what failed."""

    suspended: tuple[str, ...]
    purged: tuple[str, ...]
    chores: Mapping[str, Any]
    errors: tuple[str, ...]


class Maintenance:
    """Does what is due.

    Args:
        config: For the retention time.
        registry: Knows what is due.
        tenants: Suspends and purges.
        chores: What else is to be done at every run, by name, in this order.
    """

    def __init__(
        self, config: TenancyConfig, registry: Registry, tenants: TenantManager, chores: Mapping[str, Chore]
    ) -> None:
        self._config = config
        self._registry = registry
        self._tenants = tenants
        self._chores = chores

    async def run(self, *, actor: Actor = SYSTEM) -> MaintenanceReport:
        """Suspend and purge the tenants whose time has come, and do every chore; a failure does not stop the rest.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        done: dict[str, list[str]] = {"suspend": [], "purge": []}
        errors: list[str] = []
        for tenant, what, reason in await self._registry.due(retention_seconds=self._config.retention_seconds):
            try:
                if await self._do(tenant, what, reason, actor):
                    done[what].append(tenant.slug)
            except _FAILURES as exc:
                logger.error("maintenance could not %s tenant %s: %s", what, tenant.slug, exc)
                errors.append(f"{what} {tenant.slug}: {exc}")
        results: dict[str, Any] = {}
        for name, chore in self._chores.items():
            try:
                results[name] = await chore()
            except _FAILURES as exc:
                logger.error("maintenance could not do %s: %s", name, exc)
                errors.append(f"{name}: {exc}")
        return MaintenanceReport(tuple(done["suspend"]), tuple(done["purge"]), results, tuple(errors))

    async def _do(self, tenant: Tenant, what: str, reason: str | None, actor: Actor) -> bool:
        """Do what is due; False where another run, or an operator, was faster."""
        try:
            # the list may be minutes old: a tenant that was changed since is looked at anew by the next run
            if (await self._registry.get(tenant.id)).updated_at != tenant.updated_at:
                return False
            if what == "suspend":
                await self._tenants.suspend(tenant, reason=reason, actor=actor)
            else:
                await self._tenants.purge(tenant, actor=actor)
        except (InvalidTransitionError, TenantNotFoundError):
            return False
        return True
