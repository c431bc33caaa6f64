"""``RestoreDrill``: whether a tenant, which nobody has chosen, could be brought back today."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import text

from ..audit.actor import Actor
from ..errors import BackupError
from ..events import RestoreDrilled
from ..tenant import Tenant
from .making import BackupServices
from .records import BackupRecords
from .verification import BackupVerifier, Verification

_CHOOSE = text(
    "SELECT id FROM tenancy.tenants WHERE status NOT IN ('provisioning', 'deleted', 'purged') "
    "AND id NOT IN (SELECT tenant_id FROM tenancy.operations WHERE kind = 'clone' AND tenant_id IS NOT NULL) "
    "ORDER BY random() LIMIT 1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillReport:
    """The result of a restore drill.

    Attributes:
        tenant_id: The tenant.
        slug: Its slug.
        verification: What a restore of its newest backup has found; None where there was none.
        age_seconds: How old the backup's contents are: what a restore now would lose.
        error: Why the tenant could not be brought back, or not in time; None where it could.
    """

    tenant_id: UUID
    slug: str
    verification: Verification | None
    age_seconds: float | None
    error: str | None

    @property
    def is_good(self) -> bool:
        """Whether the tenant could be brought back."""
        return self.error is None


class RestoreDrill:
    """Drills restores.

    Args:
        services: What it uses.
        records: The rows of backups.
        verifier: Restores into a scratch database, and compares.
    """

    def __init__(self, services: BackupServices, records: BackupRecords, verifier: BackupVerifier) -> None:
        self._services = services
        self._records = records
        self._verifier = verifier

    async def run(
        self, tenant: Tenant | None, *, server: str | None, max_age: float | None, actor: Actor
    ) -> DrillReport:
        """Drill the restore of a tenant, or of a random one, and record the result.

        Raises:
            BackupError: there is no tenant to drill with.
            TenancyError: it could not be drilled now: a server or the store does not answer, say.
        """
        chosen = tenant or await self._choose()
        newest = await self._records.list(tenant_id=chosen.id, control=False, states=("done",), limit=1)
        verification, age, error = None, None, None
        if not newest:
            error = "there is no backup"
        else:
            age = (datetime.now(UTC) - newest[0].started_at).total_seconds()
            verification = await self._verifier.verify(newest[0], restore=True, server=server, actor=actor)
            error = verification.error
            if error is None and max_age is not None and age > max_age:
                error = f"the newest backup is {age:.0f} s old, more than {max_age:.0f}"
        report = DrillReport(
            tenant_id=chosen.id, slug=chosen.slug, verification=verification, age_seconds=age, error=error
        )
        backup = None if verification is None else str(verification.backup.id)
        detail = {"backup": backup, "good": report.is_good}
        await self._services.registry.record(chosen.id, "backup.drill", detail=detail, actor=actor)
        self._services.events.emit(
            RestoreDrilled(
                tenant_id=chosen.id,
                slug=chosen.slug,
                backup_id=None if verification is None else verification.backup.id,
                error=error,
                age_seconds=age,
                seconds=0.0 if verification is None else verification.seconds,
            )
        )
        return report

    async def _choose(self) -> Tenant:
        async with self._services.control.connect() as connection:
            found = (await connection.execute(_CHOOSE)).scalar_one_or_none()
        if found is None:
            raise BackupError("there is no tenant to drill a restore with")
        return await self._services.registry.get(found)


__all__ = ["DrillReport", "RestoreDrill"]
