"""Removal of backups that the retention policy does not keep, and of what failed ones have left in a store."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..audit.actor import Actor
from ..cancellation import run_to_completion
from ..config import BackupConfig
from ..errors import BackupDamagedError, BackupNotFoundError, TenancyError
from ..events import BackupPruned, EventBus
from ..jobs import Claimant
from .key_objects import check_store
from .records import Backup, BackupRecords
from .retention import expired
from .scanning import BackupScanner
from .stores import Store, Stores

logger = logging.getLogger("tenancy_orm.backups")


@dataclass(frozen=True, slots=True)
class PruneReport:
    """The backups that were removed, or would be, how many bytes that frees, and what could not be removed."""

    pruned: tuple[Backup, ...]
    freed_bytes: int
    errors: tuple[str, ...] = ()


class BackupPruner:
    """Removes backups.

    Args:
        config: The retention policy.
        records: The rows of backups.
        stores: The stores.
        scanner: Knows which backups are complete.
        events: Receives ``BackupPruned``.
    """

    def __init__(
        self,
        config: BackupConfig,
        records: BackupRecords,
        stores: Stores,
        scanner: BackupScanner,
        events: EventBus,
    ) -> None:
        self._config = config
        self._scanner = scanner
        self._records = records
        self._stores = stores
        self._events = events
        self._pruned: tuple[Any, ...] | None = None

    async def prune(self, *, dry_run: bool, actor: Actor) -> PruneReport:
        """Remove what is not kept. It can be repeated, and interrupted, and runs beside others."""
        # every minute in housekeeping, and nothing is to be pruned unless this has changed
        fingerprint = await self._records.fingerprint()
        planned, errors = [] if fingerprint == self._pruned else await self.to_prune(), list[str]()
        self._pruned = None if planned else fingerprint
        if not dry_run:
            planned = [one for one in planned if await self._records.begin_pruning(one, actor)]
        found = [await self._records.get(one.id) for one in planned]  # with their manifests, which are not kept
        if not dry_run:
            errors = [error for one in await self._records.to_remove() if (error := await self._remove(one, actor))]
            await self._records.forget_removed()
        return PruneReport(tuple(found), sum(one.bytes or 0 for one in found), tuple(errors))

    async def to_prune(self) -> list[Backup]:
        """Return the backups that the policy does not keep, and those that nobody can read any more."""
        gone, over, now = list[Backup](), list[Backup](), datetime.now(UTC)
        lost = await self._records.lost()
        async for done in self._records.done_by_tenant():
            gone += [one for one in done if one.id in lost]
            over += expired([one for one in done if one.id not in lost], self._config, now=now)
        return [*gone, *over]

    async def _remove(self, backup: Backup, actor: Actor) -> str | None:
        """Remove a backup's objects, the manifest first; returns why that failed."""
        try:
            store, claimant = self._stores.at(backup.store), Claimant()
            if backup.state == "failed" and await self._is_complete(backup, store, actor):
                return None
            if not await self._records.begin_removing(backup, claimant):
                return None
            removed = False
            try:
                listed = [found.path for found in await store.list(backup.path)]
                if not listed and backup.state == "pruned":
                    await check_store(store, backup.path.partition("/")[0])
                # what has no manifest is no backup
                await store.delete(backup.manifest_path, *listed)
                removed = True
            finally:
                await run_to_completion(self._records.finish_removing(backup, claimant, removed=removed))
        except TenancyError as exc:
            logger.warning("the backup %s could not be removed: %s", backup.id, exc)
            return f"{backup.id}: {exc}"
        if backup.state == "pruned":
            self._events.emit(BackupPruned(tenant_id=backup.tenant_id, slug=backup.slug, backup_id=backup.id))
        return None

    async def _is_complete(self, backup: Backup, store: Store, actor: Actor) -> bool:
        """Whether a backup that counts as failed is complete: the row may be older than the backup.

        After an older backup of the control database was restored, that backup itself is one.
        """
        try:
            listed = await store.list(backup.path)
            return await self._scanner.take_up(store, backup.path, listed, actor=actor) is not None
        except (BackupNotFoundError, BackupDamagedError):
            return False


__all__ = ["BackupPruner", "PruneReport"]
