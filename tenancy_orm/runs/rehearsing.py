"""``Rehearsing``: tries an upgrade on clones of tenants; a part of ``FleetMigrator``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_while_bound
from ..operations.progress import StepProgress
from ..provisioning.copies.making import Content
from ..rehearsal.rehearsal import DEFAULT_CLONES, Rehearsal
from ..rehearsal.report import RehearsalReport
from ..tenant import TenantRef
from .commands import DEFAULT_CONCURRENCY, check_concurrency
from .steering import Steering


class Rehearsing(Steering):
    """What operators do on clones before a run; part of ``FleetMigrator``.

    Args:
        services: The services of an open ``Tenancy``.
    """

    async def rehearse(
        self,
        revision: str = "head",
        *,
        clones: int = DEFAULT_CLONES,
        tenants: Iterable[TenantRef] | None = None,
        content: Content = "data",
        downgrade: bool = True,
        concurrency: int = DEFAULT_CONCURRENCY,
        progress: StepProgress | None = None,
        x: Sequence[str] = (),
        actor: Actor = SYSTEM,
    ) -> RehearsalReport:
        """Try ``upgrade(revision)`` on clones of some tenants, which are dropped at the end. No tenant is changed.

        Each clone is upgraded, downgraded and upgraded again. After each step its schema is compared: with that of a
        new database, or with the one before. The report has the time of each statement, the locks that it held, what
        it rewrote, and an estimate for the fleet.

        Args:
            revision: As for ``upgrade``.
            clones: How many tenants are cloned, of those that are behind: the largest, the oldest, others at random.
            tenants: The tenants to clone; then ``clones`` is not used.
            content: "data" clones everything; "schema" the schema, with the statistics from PostgreSQL 18 on.
            downgrade: False: upgrade only.
            concurrency: How many tenants the run would upgrade at once, for the estimate.
            progress: Called with each step that begins, in words.
            x: As for ``upgrade``.
            actor: Who does this, for the audit log.

        Raises:
            ConfigurationError: as ``upgrade``; or ``clones`` or ``concurrency`` is less than 1.
            MigrationError: the revision does not exist, or no tenant is behind it.
            TenantNotFoundError: one of ``tenants`` does not exist.
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("rehearsing a migration")
        check_concurrency(concurrency)
        rehearsal = Rehearsal(
            self.services,
            self._connections,
            await self.environment(x),
            revision,
            content=content,
            downgrade=downgrade,
            concurrency=concurrency,
            progress=progress,
            actor=actor,
        )
        return await rehearsal.run(tenants, clones)


__all__ = ["Rehearsing"]
