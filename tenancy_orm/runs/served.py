"""How many tenants the running code serves at their revisions, by the registry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ..config import TenancyConfig
from ..deadlines import clock
from ..errors import ConfigurationError, TenancyError, counted
from ..events import EventBus, TenantRevisionRefused
from ..registry.registry import Registry
from ..registry.revisions import FailedUpgrade
from ..tenant import Tenant
from .compatibility import Compatibility

logger = logging.getLogger("tenancy_orm.migrations")

_LOG_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionCount:
    """How many tenants have a revision (None: none), and whether this code serves them.

    ``migrating`` of them are being migrated now.
    """

    revision: str | None
    tenants: int
    migrating: int
    served: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompatibilityReport:
    """Which tenants code with a declaration serves, by their revisions in the registry; no database is asked.

    ``declared`` is the declaration, None where there is none: then every tenant is served. ``failed`` are upgrades
    before a tenant's use that have failed.
    """

    declared: str | None
    revisions: tuple[RevisionCount, ...]
    failed: tuple[FailedUpgrade, ...] = ()

    @property
    def total(self) -> int:
        """How many tenants there are, but for those that are created, deleted or purged."""
        return sum(one.tenants for one in self.revisions)

    @property
    def outside(self) -> int:
        """How many of them are not served."""
        return sum(one.tenants for one in self.revisions if not one.served)

    @property
    def ok(self) -> bool:
        """Whether every tenant is served."""
        return not self.outside

    def summary(self) -> str:
        """Return one line."""
        if self.declared is None:
            return f"{counted(self.total)}, all served: there are no compatible_revisions"
        return f"{counted(self.total)}, {self.outside} of them at revisions outside {self.declared}"


async def compatibility_report(registry: Registry, compatibility: Compatibility | None) -> CompatibilityReport:
    """Count the tenants by revision.

    Raises:
        ControlUnavailableError: the control database does not answer.
        CrossTenantError: a tenant is bound.
    """
    counts = await registry.count_revisions()
    return CompatibilityReport(
        declared=None if compatibility is None else compatibility.text,
        revisions=tuple(
            RevisionCount(
                revision=revision,
                tenants=tenants,
                migrating=migrating,
                served=compatibility is None or compatibility.allows(revision),
            )
            for revision, tenants, migrating in counts
        ),
        failed=tuple(await registry.failed_upgrades()),
    )


def with_declaration(config: TenancyConfig, declared: object) -> TenancyConfig:
    """Return the configuration of code with another declaration.

    Raises:
        ConfigurationError: there are no migrations.
    """
    if config.migrations is None:
        raise ConfigurationError("there are no revisions without migrations: set TenancyConfig.migrations")
    return config if declared is None else config.replace(compatible_revisions=declared)


class RevisionGate:
    """Judges tenants that were looked up, and reports those that are not served.

    Args:
        compatibility: What the code can work with.
        registry: Counts the tenants outside, for the log: once a minute at most.
        events: Receives ``TenantRevisionRefused``.
        start: Starts a task with no tenant bound.
    """

    def __init__(
        self,
        compatibility: Compatibility,
        registry: Registry,
        events: EventBus,
        *,
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._compatibility = compatibility
        self._registry = registry
        self._events = events
        self._start = start
        self._log_at = 0.0

    def judge(self, tenant: Tenant) -> str | None:
        """Return why a tenant is not served; None where it is."""
        refusal = self._compatibility.refusal(tenant)
        if refusal is not None:
            self._events.emit(
                TenantRevisionRefused(
                    tenant_id=tenant.id,
                    slug=tenant.slug,
                    revision=tenant.schema_revision,
                    migrating_to=tenant.migrating_to,
                )
            )
            if (now := clock()) >= self._log_at:
                self._log_at = now + _LOG_SECONDS
                self._start(self._log())
        return refusal

    async def _log(self) -> None:
        try:
            report = await compatibility_report(self._registry, self._compatibility)
        except TenancyError as exc:
            logger.warning("how many tenants are outside compatible_revisions is not known: %s", exc)
        else:
            logger.warning("%s; see: tenancy migrate compatible", report.summary())


__all__ = ["CompatibilityReport", "RevisionCount", "RevisionGate", "compatibility_report", "with_declaration"]
