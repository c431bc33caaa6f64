"""What has to be done from time to time: ``tenancy housekeeping``, from a timer, on any number of machines.

Every part decides under a lock of its own (the tenant's row, its advisory lock on the server), so that two runs at once
share the work and never do anything twice, and a tenant that an operator has changed since it was listed is left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from .audit.actor import SYSTEM, Actor
from .audit.checkpoints import Checkpoint
from .audit.log import AuditLog
from .authentication.members import MemberManager
from .authentication.revocations import RevocationManager
from .backups import BackupManager
from .clones import CloneManager
from .config import TenancyConfig
from .errors import InvalidTransitionError, TenancyError, TenantNotFoundError
from .exports import ErasureManager
from .metering.metrics import StorageSampler, TenantMetrics
from .metering.policies import TierPolicies
from .metering.usage import UsageExporter
from .moves import MoveManager
from .postgres.failures import FAILURES
from .postgres.login import reason_of
from .provisioning import Provisioner
from .quotas.manager import QuotaManager
from .registry.registry import Registry
from .restores import RestoreManager
from .rotation import SecretManager
from .runs.catch_up import CatchUp
from .runs.records import RunRecords
from .tenant import Tenant
from .tenants.domain_upkeep import DomainUpkeep
from .tenants.manager import TenantManager

logger = logging.getLogger("tenancy_orm.housekeeping")

_SAMPLE_SECONDS = 240.0  # the tenants' databases are sampled unless this was done so recently

_Due = tuple[Tenant, str, str | None]

# what a server may answer, or fail to; a mistake in the code is none of them and ends the run


@dataclass(frozen=True, slots=True)
class HousekeepingReport:
    """What one run did: slugs of tenants suspended and purged, results of the chores by name, and what failed.

    If the server of a suspended tenant does not answer, the tenant is suspended all the same, and among the errors.
    """

    suspended: tuple[str, ...]
    purged: tuple[str, ...]
    chores: Mapping[str, Any]
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PrunedBackups:
    """How many backups were removed, how many bytes that has freed, and what could not be removed."""

    pruned: int
    freed_bytes: int
    errors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Housekeeping:
    """Does what is due, with the parts that know how. ``usage_exporter`` is None where usage is not exported."""

    config: TenancyConfig
    registry: Registry
    tenants: TenantManager
    members: MemberManager
    revocations: RevocationManager
    domains: DomainUpkeep
    provisioner: Provisioner
    secrets: SecretManager
    audit: AuditLog
    quotas: QuotaManager
    catch_up: CatchUp
    runs: RunRecords
    moves: MoveManager
    sampler: StorageSampler
    metrics: TenantMetrics
    backups: BackupManager
    tier_policies: TierPolicies
    usage_exporter: UsageExporter | None
    erasures: ErasureManager
    restores: RestoreManager
    clones: CloneManager

    async def run(self, *, actor: Actor = SYSTEM) -> HousekeepingReport:
        """Suspend and purge the tenants that are due, and do every chore; a failure does not stop the rest.

        Raises:
            ControlUnavailableError: the control database does not answer; excessive sessions have been ended.
        """
        run = _Run(self.tenants, actor)
        # before anything that needs the control database, which may suffer from what this ends
        await run.do("end_excessive_sessions", self.provisioner.end_excessive_sessions())
        # before those that are due are purged, which expired clones are then
        await run.do("expire_clones", self.clones.expire(actor=actor))
        await self._end_due(run)
        # before reconcile, which would report the logins of what was killed
        await run.do("tidy_restores", self.restores.tidy(actor=actor))
        await run.do("reconcile", self.provisioner.reconcile(thorough=False))
        # after reconcile, which finishes purges that were interrupted
        await run.do("complete_erasures", self.erasures.run(actor=actor))
        # before others are upgraded: what was killed may have moved them
        await run.do("clear_notices", self.catch_up.migrations.clear_notices())
        # after reconcile, which may have completed creations of older code
        await run.do("catch_up", self.catch_up.run(actor=actor))
        # after reconcile, which lets tenants connect again that a killed switch has left closed
        await run.do("tidy_moves", self.moves.tidy(actor=actor))
        if self.config.retention.template_seconds:
            await run.do("prune_templates", self.provisioner.templates.prune(actor=actor))
        if self.config.retention.run_seconds:
            await run.do("prune_runs", self.runs.prune(older_than=self.config.retention.run_seconds))
        await run.do("prune_warm_pool", self.provisioner.warm_pool.prune())
        await run.do("expire_former_slugs", self.registry.expire_former_slugs())
        await run.do("expire_claims", self.domains.expire_claims())
        await run.do("verify_domains", self.domains.verify_again())
        await run.do("prune_invitations", self.members.prune_invitations())
        await run.do("prune_revocations", self.revocations.prune())
        await run.do("finish_rotations", self.secrets.finish_rotations())
        await run.do("prepare_audit_partitions", self.audit.ensure_partitions())
        await run.do("prune_audit", self._prune_audit())
        await run.do("clean_quotas", self.quotas.clean())
        await run.do("sample_tenants", self.sampler.run(unless_within=_SAMPLE_SECONDS))
        await run.do("prune_metrics", self.metrics.prune())
        if self.config.backup.store is not None:
            await run.do("prune_backups", self._prune_backups(actor))
            await run.do("check_backups", self.backups.check())
        if self.config.metering.tier_policies:
            # after the sizes were measured, which the policies may be about
            await run.do("evaluate_tier_policies", self.tier_policies.evaluate())
        if self.usage_exporter is not None:
            await run.do("export_usage", self.usage_exporter.run())
            await run.do("prune_usage", self.usage_exporter.prune())
        return HousekeepingReport(tuple(run.suspended), tuple(run.purged), run.chores, tuple(run.errors))

    async def _end_due(self, run: _Run) -> None:
        due = await self.registry.due(retention_seconds=self.config.retention.tenant_seconds)
        by_server: dict[str, list[_Due]] = {}
        for one in due:
            by_server.setdefault(one[0].placement.server if one[0].placement else "", []).append(one)
        # side by side: a server that does not answer keeps no tenant of another waiting
        await asyncio.gather(*(run.end_all(listed) for listed in by_server.values()))

    async def _prune_backups(self, actor: Actor) -> PrunedBackups:
        report = await self.backups.prune(actor=actor)
        return PrunedBackups(len(report.pruned), report.freed_bytes, report.errors)

    async def _prune_audit(self) -> Checkpoint | None:
        kept = self.config.retention.audit_seconds
        return await self.audit.prune(before=datetime.now(UTC) - timedelta(seconds=kept)) if kept else None


def _reason(error: BaseException) -> str:
    # without DETAIL, which may quote a row
    return str(error) if isinstance(error, TenancyError) else reason_of(error)


class _Run:
    """What one run did, and how it ended."""

    def __init__(self, tenants: TenantManager, actor: Actor) -> None:
        self._tenants = tenants
        self._actor = actor
        self.suspended: list[str] = []
        self.purged: list[str] = []
        self.chores: dict[str, Any] = {}
        self.errors: list[str] = []

    async def do(self, name: str, chore: Awaitable[Any]) -> None:
        try:
            result = self.chores[name] = await chore
        except FAILURES as exc:
            logger.error("housekeeping could not do %s: %s", name, _reason(exc))
            self.errors.append(f"{name}: {_reason(exc)}")
        else:
            self.errors += [f"{name}: {error}" for error in getattr(result, "errors", ())]

    async def end_all(self, due: Sequence[_Due]) -> None:
        for tenant, what, reason in due:
            try:
                await self._end(tenant, what, reason)
            except (InvalidTransitionError, TenantNotFoundError) as exc:
                # another run, or an operator, was faster
                logger.debug("housekeeping does not %s tenant %s: %s", what, tenant.slug, exc)
            except FAILURES as exc:
                logger.error("housekeeping could not %s tenant %s: %s", what, tenant.slug, _reason(exc))
                self.errors.append(f"{what} {tenant.slug}: {_reason(exc)}")

    async def _end(self, tenant: Tenant, what: str, reason: str | None) -> None:
        if what == "suspend":
            await self._tenants.suspend_due(tenant, reason=reason, actor=self._actor)
            self.suspended.append(tenant.slug)
        else:
            await self._tenants.purge_due(tenant, actor=self._actor)
            self.purged.append(tenant.slug)
