"""What has to be done from time to time: ``tenancy housekeeping``, from a timer, on any number of machines.

Every part decides under a lock of its own (the tenant's row, its advisory lock on the server), so that two runs at once
share the work and never do anything twice, and a tenant that an operator has changed since it was listed is left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from .audit.actor import SYSTEM, Actor
from .config import TenancyConfig
from .errors import InvalidTransitionError, TenancyError, TenantNotFoundError
from .postgres.failures import SERVER_FAILURES
from .registry.registry import Registry
from .tenant import Tenant
from .tenants.manager import TenantManager

logger = logging.getLogger("tenancy_orm.housekeeping")

Chore = Callable[[], Awaitable[Any]]
_Due = tuple[Tenant, str, str | None]

# what a server may answer, or fail to; a mistake in the code is none of them and ends the run
_FAILURES = (TenancyError, SQLAlchemyError, *SERVER_FAILURES)


@dataclass(frozen=True, slots=True)
class HousekeepingReport:
    """What one run did: slugs of tenants suspended and purged, results of the chores by name, and what failed.

    A tenant whose server could not be told of its suspension is suspended, and among the errors.
    """

    suspended: tuple[str, ...]
    purged: tuple[str, ...]
    chores: Mapping[str, Any]
    errors: tuple[str, ...]


class Housekeeping:
    """Does what is due.

    Args:
        config: For the retention time.
        registry: Knows what is due.
        tenants: Suspends and purges.
        chores: What else is to be done at every run, by name, in this order.
        urgent: ... and what before anything that needs the control database, which may suffer from what they end.
    """

    def __init__(
        self,
        config: TenancyConfig,
        registry: Registry,
        tenants: TenantManager,
        chores: Mapping[str, Chore],
        *,
        urgent: Mapping[str, Chore],
    ) -> None:
        self._config = config
        self._registry = registry
        self._tenants = tenants
        self._chores = chores
        self._urgent = urgent

    async def run(self, *, actor: Actor = SYSTEM) -> HousekeepingReport:
        """Suspend and purge the tenants whose time has come, and do every chore; a failure does not stop the rest.

        Raises:
            ControlUnavailableError: the control database does not answer; what is urgent has been done.
        """
        run = _Run(self._tenants, actor)
        results = await run.do_chores(self._urgent)
        due = await self._registry.due(retention_seconds=self._config.retention.tenant_seconds)
        by_server: dict[str, list[_Due]] = {}
        for one in due:
            by_server.setdefault(one[0].placement.server if one[0].placement else "", []).append(one)
        # side by side: a server that does not answer keeps no tenant of another waiting
        await asyncio.gather(*(run.do_all(listed) for listed in by_server.values()))
        results |= await run.do_chores(self._chores)
        return HousekeepingReport(tuple(run.suspended), tuple(run.purged), results, tuple(run.errors))


class _Run:
    """What one run does to tenants, and how it ended."""

    def __init__(self, tenants: TenantManager, actor: Actor) -> None:
        self._tenants = tenants
        self._actor = actor
        self.suspended: list[str] = []
        self.purged: list[str] = []
        self.errors: list[str] = []

    async def do_chores(self, chores: Mapping[str, Chore]) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for name, chore in chores.items():
            try:
                results[name] = await chore()
            except _FAILURES as exc:
                logger.error("housekeeping could not do %s: %s", name, exc)
                self.errors.append(f"{name}: {exc}")
            else:
                self.errors += [f"{name}: {error}" for error in getattr(results[name], "errors", ())]
        return results

    async def do_all(self, due: Sequence[_Due]) -> None:
        for tenant, what, reason in due:
            try:
                await self._do(tenant, what, reason)
            except (InvalidTransitionError, TenantNotFoundError) as exc:
                # another run, or an operator, was faster
                logger.debug("housekeeping does not %s tenant %s: %s", what, tenant.slug, exc)
            except _FAILURES as exc:
                logger.error("housekeeping could not %s tenant %s: %s", what, tenant.slug, exc)
                self.errors.append(f"{what} {tenant.slug}: {exc}")

    async def _do(self, tenant: Tenant, what: str, reason: str | None) -> None:
        if what == "suspend":
            await self._tenants.suspend_due(tenant, reason=reason, actor=self._actor)
            self.suspended.append(tenant.slug)
        else:
            await self._tenants.purge_due(tenant, actor=self._actor)
            self.purged.append(tenant.slug)
