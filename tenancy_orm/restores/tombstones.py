"""Tombstones in the backups' store: a purged tenant stays purged, also after the control database was restored.

The control database has a tombstone for each purged tenant. An older backup of it does not: there the tenant is still
alive. Housekeeping therefore writes another one beside the tenant's backups, where the restore looks. It has no more
than the tenant's id and a time.
"""

from __future__ import annotations

import json
from uuid import UUID

from sqlalchemy import text

from ..backups import BackupManager
from ..config import TenancyConfig
from ..control.database import ControlDatabase
from ..errors import BackupNotFoundError, OperationError

# Also those with no backup that can be read: base backups of a server have their rows for longer. Not older ones: each
# is written by the first housekeeping after its purge.
_PURGED = text("""
SELECT id, updated_at FROM tenancy.tenants
 WHERE status = 'purged' AND updated_at > now() - make_interval(days => 90) ORDER BY id
""")


class Tombstones:
    """Writes tombstones of tenants that were purged within 90 days to the store, and refuses tenants that have one.

    Args:
        config: ``backup.store``: without one there are no backups, and no tombstones.
        control: Knows who was purged.
        backups: Has the store.
    """

    def __init__(self, config: TenancyConfig, control: ControlDatabase, backups: BackupManager) -> None:
        self._config = config
        self._control = control
        self._backups = backups

    async def write(self) -> int:
        """Write those that are missing; returns how many that were.

        Raises:
            BackupError: the store refuses, or does not answer.
        """
        if self._config.backup.store is None:
            return 0
        async with self._control.connect() as connection:
            purged = (await connection.execute(_PURGED)).all()
        if not purged:
            return 0
        store = self._backups.store
        present = {found.path for found in await store.list(self._directory)}
        missing = [row for row in purged if self._path(row.id) not in present]
        for row in missing:
            tombstone = {"tenant_id": str(row.id), "purged_at": row.updated_at.isoformat()}
            await store.put(self._path(row.id), json.dumps(tombstone).encode())
        return len(missing)

    async def refuse(self, tenant_id: UUID, slug: str) -> None:
        """Refuse a tenant that has been purged, whatever the control database says.

        Raises:
            OperationError: it has.
            BackupError: the store does not answer.
        """
        if (purged_at := await self.purged_at(tenant_id)) is not None:
            raise OperationError(
                f"tenant {slug!r} was purged ({purged_at}), as the store of backups says, and stays so; "
                "the control database is older than that"
            )

    async def purged_at(self, tenant_id: UUID, installation: UUID | None = None) -> str | None:
        """Return when a tenant was purged, as the store says; None where it has no tombstone, or there is no store.

        Args:
            tenant_id: The tenant.
            installation: The installation that it is of; that of the control database where None.

        Raises:
            BackupError: the store does not answer.
        """
        if self._config.backup.store is None:
            return None
        try:
            tombstone = json.loads(await self._backups.store.get(self._path(tenant_id, installation)))
        except BackupNotFoundError:
            return None
        return str(tombstone["purged_at"])

    @property
    def _directory(self) -> str:
        return self._directory_of(self._control.installation)

    @staticmethod
    def _directory_of(installation: UUID) -> str:
        return f"{installation}/tombstones"

    def _path(self, tenant_id: UUID, installation: UUID | None = None) -> str:
        return f"{self._directory_of(installation or self._control.installation)}/{tenant_id}.json"


__all__ = ["Tombstones"]
