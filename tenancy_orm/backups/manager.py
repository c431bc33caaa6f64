"""``BackupManager``: encrypted backups of tenants' databases, and of the control database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_while_bound
from ..control.lookup import resolve_tenant_id
from ..errors import BackupUnderWayError, FleetBackupError, TenantNotFoundError
from ..events import BackupsChecked
from ..loops import HomeLoop
from ..migrations.failures import describe
from ..migrations.selection import Selection
from ..tenant import Tenant, TenantRef
from .drill import DrillReport, RestoreDrill
from .key_objects import CONTROL
from .keys import BackupKeys
from .making import FAILURES, BackupMaker, BackupServices
from .manifest import Manifest
from .opening import BackupReader, OpenBackup
from .pruning import BackupPruner, PruneReport
from .records import Backup, BackupRecords, BackupState
from .scanning import BackupScanner, ScanReport
from .status import BackupStatus
from .stores import Store
from .verification import BackupVerifier, Verification

logger = logging.getLogger("tenancy_orm.backups")

_AT_ONCE = 200  # tenants of a server that are due and are taken in one go
_LISTED = 20  # tenants that are named as overdue


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a run over several tenants did: the backups that are done, and why others are not, by slug."""

    done: tuple[Backup, ...]
    reasons: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def raise_for_failures(self) -> None:
        """Raise an error if a tenant could not be backed up.

        Raises:
            FleetBackupError: one could not.
        """
        if self.reasons:
            raise FleetBackupError(self.reasons, len(self.done))


class BackupManager:
    """Makes, lists, opens, verifies and removes backups: ``tenancy.backups``.

    Args:
        services: What it uses.
    """

    def __init__(self, services: BackupServices) -> None:
        self._services = services
        self._config = services.config.backup
        self._records = records = BackupRecords(services.control, services.audit)
        self._stores = stores = services.stores
        self._maker = BackupMaker(services, records)
        self._reader = BackupReader(
            self._config, services.control.installation, services.audit, services.keys, stores, records
        )
        self._verifier = BackupVerifier(services, records, self._reader)
        self._scanner = BackupScanner(records, self._reader, services.keys, services.control.installation)
        self._pruner = BackupPruner(self._config, records, stores, self._scanner, services.events)
        self._drill = RestoreDrill(services, records, self._verifier)
        self._home = HomeLoop()

    @property
    def keys(self) -> BackupKeys:
        """The keys that backups are encrypted with."""
        return self._services.keys

    @property
    def store(self) -> Store:
        """The store of new backups.

        Raises:
            ConfigurationError: ``backup.store`` is not set.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("using a store of backups")
        return self._stores.current

    # --- making -----------------------------------------------------------------------------------------------------

    async def run(
        self,
        tenants: Iterable[TenantRef],
        *,
        kept_until: datetime | None = None,
        due: float | None = None,
        progress: Callable[[Tenant, Backup | str], None] | None = None,
        actor: Actor = SYSTEM,
    ) -> BackupReport:
        """Back tenants up, ``backup.concurrency`` of each server at once; a failure does not stop the others.

        Args:
            tenants: Slugs, ids or tenants.
            kept_until: Until when the backups are kept, whatever the retention policy says.
            due: Leave out tenants with a backup that was begun less than so many seconds ago.
            progress: Called with each tenant and its backup, or why there is none.
            actor: Who does this.

        Raises:
            TenantNotFoundError, TenantProvisioningError: a tenant does not exist, or is being created; nothing was
                done.
            ConfigurationError: ``backup.store`` is not set.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("backing tenants up")
        self._home.check()
        store = self.store
        chosen = await Selection(self._services.registry).choose(tenants)
        return await self._run(chosen, store, kept_until=kept_until, due=due, progress=progress, actor=actor)

    async def _run(
        self,
        chosen: Iterable[Tenant],
        store: Store,
        *,
        kept_until: datetime | None,
        due: float | None,
        progress: Callable[[Tenant, Backup | str], None] | None,
        actor: Actor,
    ) -> BackupReport:
        done: list[Backup] = []
        reasons: dict[str, str] = {}
        skipped: list[str] = []

        async def work(queue: list[Tenant]) -> None:
            while queue:
                tenant = queue.pop(0)
                try:
                    made = await self._maker.make(tenant, store, kept_until=kept_until, due=due, actor=actor)
                except (BackupUnderWayError, TenantNotFoundError) as exc:
                    if due is None:
                        reasons[tenant.slug] = str(exc)
                    else:
                        skipped.append(tenant.slug)
                    outcome: Backup | str = str(exc)
                except FAILURES as exc:
                    outcome = reasons[tenant.slug] = describe(exc)
                else:
                    done.append(made)
                    outcome = made
                if progress is not None:
                    progress(tenant, outcome)

        by_server: dict[str, list[Tenant]] = {}
        for tenant in chosen:
            by_server.setdefault(tenant.placement.server if tenant.placement else "", []).append(tenant)
        async with asyncio.TaskGroup() as group:
            for queue in by_server.values():
                for _ in range(min(self._config.concurrency, len(queue))):
                    group.create_task(work(queue))
        return BackupReport(tuple(done), reasons, tuple(skipped))

    async def run_control(
        self, *, kept_until: datetime | None = None, due: float | None = None, actor: Actor = SYSTEM
    ) -> Backup:
        """Back the control database up: everything in it but the identities of backup keys, which are in the store.

        Raises:
            BackupError: it failed, or another process does it now.
            ConfigurationError: ``backup.store`` is not set.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("backing the control database up")
        self._home.check()
        return await self._maker.make(None, self.store, kept_until=kept_until, due=due, actor=actor)

    async def run_due(
        self, *, progress: Callable[[Tenant, Backup | str], None] | None = None, actor: Actor = SYSTEM
    ) -> BackupReport:
        """Back up the tenants with no backup of the last ``backup.every_seconds``, and the control database.

        Any number of processes may do so at once: each tenant is backed up by one of them. One that failed is tried
        again after a quarter of an hour. Nothing is due where ``backup.store`` is not set, or ``every_seconds`` is 0.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("backing tenants up")
        self._home.check()
        every = self._config.every_seconds
        if self._config.store is None or not every:
            return BackupReport(())
        reports: list[BackupReport] = []
        store = self.store

        async def back_up(server: str) -> None:
            seen: set[UUID] = set()
            while chosen := await self._records.due(server, every=every, but=seen, limit=_AT_ONCE):
                seen.update(chosen)
                tenants = [await self._services.registry.get(one) for one in chosen]
                reports.append(
                    await self._run(tenants, store, kept_until=None, due=every, progress=progress, actor=actor)
                )

        # a server that is slow, or does not answer, keeps neither tenants of others nor the control database waiting
        work = [self._run_control_due(every, actor), *map(back_up, await self._records.servers())]
        for ended in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended
            if ended is not None:
                reports.append(ended)
        return BackupReport(
            tuple(one for report in reports for one in report.done),
            {slug: reason for report in reports for slug, reason in report.reasons.items()},
            tuple(slug for report in reports for slug in report.skipped),
        )

    async def _run_control_due(self, every: float, actor: Actor) -> BackupReport:
        try:
            return BackupReport((await self.run_control(due=every, actor=actor),))
        except BackupUnderWayError:
            return BackupReport((), skipped=(CONTROL,))
        except FAILURES as exc:
            return BackupReport((), {CONTROL: describe(exc)})

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, backup_id: UUID) -> Backup:
        """Return a backup.

        Raises:
            BackupNotFoundError: there is none of this id.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("reading backups")
        return await self._records.get(backup_id)

    async def list(
        self,
        tenant: TenantRef | None = None,
        *,
        control: bool = False,
        states: Iterable[BackupState] | None = ("running", "done", "failed"),
        limit: int | None = None,
    ) -> tuple[Backup, ...]:
        """Return backups, the newest first.

        Args:
            tenant: Of this tenant; None: of all tenants.
            control: Those of the control database instead.
            states: Of these states alone; all where None.
            limit: At most so many.

        Raises:
            TenantNotFoundError: there is no such tenant.
            CrossTenantError: another tenant is bound.
        """
        tenant_id = None if tenant is None else await resolve_tenant_id(self._services.control, tenant)
        return await self._records.list(tenant_id=tenant_id, control=control, states=states, limit=limit)

    async def status(self) -> BackupStatus:
        """Return how old the newest good backups are, and how many tenants wait for one for too long.

        Too long is longer than ``backup.overdue_seconds``.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("the status of backups")
        return await self._records.status(overdue_after=self._config.overdue_after, listed=_LISTED)

    async def check(self) -> BackupStatus:
        """Look at the ``status``, and announce it as ``BackupsChecked``: for metrics and alarms, by housekeeping.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        found = await self.status()
        for error in found.errors:
            logger.error("%s", error)
        self._services.events.emit(
            BackupsChecked(
                tenants=found.tenants,
                backed_up=found.backed_up,
                verified=found.verified,
                overdue=found.overdue,
                oldest_seconds=found.oldest_seconds,
                oldest_verified_seconds=found.oldest_verified_seconds,
                control_seconds=found.control_seconds,
                control_is_overdue=found.control_is_overdue,
            )
        )
        return found

    async def manifest(self, backup: UUID | Backup) -> Manifest:
        """Read a backup's manifest from the store, and verify its signature, and that it is this backup's.

        Raises:
            BackupNotFoundError: there is no such backup, or the store does not have it any more.
            BackupDamagedError: it is not what was written.
            CrossTenantError: a tenant is bound.
        """
        return await self._reader.manifest(await self._find(backup))

    @asynccontextmanager
    async def open(self, backup: UUID | Backup) -> AsyncIterator[OpenBackup]:
        """Decrypt a backup for the body, into temporary space; it is verified: signature, checksums and encryption.

        ```python
        async with tenancy.backups.open(backup_id) as opened:
            opened.directory  # for pg_restore --format=directory
        ```

        Raises:
            BackupNotFoundError: there is no such backup, or the store does not have it any more.
            BackupDamagedError: it is not what was written.
            BackupKeyDestroyedError: its key was destroyed.
            BackupError: the store does not answer, or there is not enough temporary space.
            CrossTenantError: a tenant is bound.
        """
        async with self._reader.open(await self._find(backup)) as opened:
            yield opened

    async def verify(
        self, backup: UUID | Backup, *, restore: bool = True, server: str | None = None, actor: Actor = SYSTEM
    ) -> Verification:
        """Verify a backup: signature, checksums, and what a restore into a scratch database makes of it.

        The restore is done by a login that can do nothing else. The rows of each table, the large objects and the
        schema are compared with what the manifest says, and the scratch database is dropped.

        Args:
            backup: The backup.
            restore: Whether it is restored; if not, signature and checksum alone are verified, without its key.
            server: The server of the scratch database; the tenant's own where None.
            actor: Who does this.

        Returns:
            What was found. The row of the backup has it, too.

        Raises:
            BackupKeyDestroyedError: its key was destroyed.
            BackupError: the store does not answer, or there is not enough temporary space.
            ServerUnavailableError, UnknownServerError: the server does not answer, or there is none of this name.
            CrossTenantError: a tenant is bound.
        """
        found = await self._find(backup)
        return await self._verifier.verify(found, restore=restore, server=server, actor=actor)

    async def drill(
        self,
        tenant: TenantRef | None = None,
        *,
        server: str | None = None,
        max_age: float | None = None,
        actor: Actor = SYSTEM,
    ) -> DrillReport:
        """Restore the newest backup of a tenant into a scratch database, and compare: for a timer.

        A tenant without a backup is a bad result, and no error. The result is in the audit log, and an event.

        Args:
            tenant: The tenant; a random one where None, which is no clone.
            server: The server of the scratch database; the tenant's own where None.
            max_age: Seconds that the newest backup may be old.
            actor: Who does this.

        Raises:
            TenantNotFoundError: there is no such tenant.
            BackupError: there is no tenant at all, or as for ``verify``.
            ServerUnavailableError, UnknownServerError: as for ``verify``.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("drilling a restore")
        self._home.check()
        found = None if tenant is None else await self._services.registry.find(tenant)
        return await self._drill.run(found, server=server, max_age=max_age, actor=actor)

    async def _find(self, backup: UUID | Backup) -> Backup:
        refuse_while_bound("reading backups")
        self._home.check()
        return backup if isinstance(backup, Backup) else await self._records.get(backup)

    # --- keeping ----------------------------------------------------------------------------------------------------

    async def keep(self, backup: UUID | Backup, until: datetime | None, *, actor: Actor = SYSTEM) -> Backup:
        """Keep a backup until a time whatever the retention policy says; None: as the policy says.

        Raises:
            BackupNotFoundError: there is no such backup, or it was removed.
            CrossTenantError: a tenant is bound.
        """
        return await self._records.keep(await self._find(backup), until, actor)

    async def scan(self, tenant: TenantRef | None = None, *, actor: Actor = SYSTEM) -> ScanReport:
        """Find the backups in the store that the control database does not know, and list them from then on.

        After an older backup of the control database was restored, there are some. Those of tenants that it does not
        know, either, are left alone. So are the keys, which no backup of the control database has.

        Args:
            tenant: Look for this tenant's alone, in all stores that have had backups of it; for all where None.
            actor: Who does this.

        Raises:
            ConfigurationError: ``backup.store`` is not set, unless a tenant is given.
            BackupError: the store does not answer.
            TenantNotFoundError: there is no such tenant.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("looking for backups")
        if tenant is None:
            return await self._scanner.scan(self.store, actor=actor)
        tenant_id = await resolve_tenant_id(self._services.control, tenant)
        stores = await self._services.keys.stores_of(tenant_id)
        reports = [await self._scanner.scan(store, tenant_id, actor=actor) for store in stores]
        return ScanReport(
            tuple(one for report in reports for one in report.found),
            tuple(error for report in reports for error in report.errors),
        )

    async def prune(self, *, dry_run: bool = False, actor: Actor = SYSTEM) -> PruneReport:
        """Remove the backups that ``backup.keep_*`` do not keep, and what failed ones have left in the store.

        On this machine, the files of processes that were killed are removed as well.

        The newest good backup of each tenant always stays, and so does the newest one that was restored for a proof.
        Backups with a key that was destroyed, and those of tenants that were erased, go at once.

        Args:
            dry_run: Whether to say what would be removed, and to remove nothing.
            actor: Who does this.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("pruning backups")
        if not dry_run:
            await asyncio.to_thread(self._reader.sweep)
        return await self._pruner.prune(dry_run=dry_run, actor=actor)


__all__ = ["BackupManager", "BackupReport"]
