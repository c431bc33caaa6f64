"""Backups, and their keys, that are in a store and that the control database does not know, since it was restored."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from ..audit.actor import Actor
from ..errors import BackupDamagedError, TenancyError
from .keys import BackupKeys
from .manifest import Manifest
from .opening import BackupReader
from .records import Backup, BackupRecords
from .stores import Store, StoredObject

logger = logging.getLogger("tenancy_orm.backups")

_MANIFEST = "/manifest.json"


@dataclass(frozen=True, slots=True)
class ScanReport:
    """The backups that were found in the store, and what could not be read there."""

    found: tuple[Backup, ...]
    errors: tuple[str, ...] = ()


class BackupScanner:
    """Finds backups in a store.

    Args:
        records: The rows of backups.
        reader: Reads backups.
        keys: The keys of backups.
        installation: The installation's id.
    """

    def __init__(self, records: BackupRecords, reader: BackupReader, keys: BackupKeys, installation: UUID) -> None:
        self._records = records
        self._reader = reader
        self._keys = keys
        self._installation = installation

    async def scan(self, store: Store, tenant_id: UUID | None = None, *, actor: Actor) -> ScanReport:
        """Write the rows of all keys and complete backups of this installation in a store that have none.

        Args:
            store: The store.
            tenant_id: Of this tenant alone; of all where None.
            actor: Who does this.
        """
        errors = await self._keys.take_up_all(store, tenant_id, actor=actor)
        known, found = await self._records.known(), list[Backup]()
        below = str(self._installation) if tenant_id is None else f"{self._installation}/{tenant_id}"
        listed = {one.path: one for one in await store.list(below)}
        for path in sorted(path for path in listed if path.endswith(_MANIFEST)):
            if _backup_id(path) in known:
                continue
            try:
                manifest = await self.take_up(store, path.removesuffix(_MANIFEST), listed.values(), actor=actor)
                if manifest is not None:
                    found.append(await self._records.get(manifest.id))
            except TenancyError as exc:
                logger.warning("%s was not registered: %s", path, exc)
                errors.append(f"{path}: {exc}")
        return ScanReport(tuple(found), tuple(errors))

    async def take_up(
        self, store: Store, path: str, listed: Iterable[StoredObject], *, actor: Actor
    ) -> Manifest | None:
        """Write the row of one backup, if it is complete; None if it is known, or its tenant is not.

        Its key is taken up by ``scan``: it opens the backup from the store as well.

        Raises:
            BackupNotFoundError: there is no manifest.
            BackupDamagedError: the manifest is not one of this installation at this place, or the archive is missing.
        """
        manifest = await self._reader.read_manifest(store, f"{path}{_MANIFEST}")
        if manifest.installation != self._installation or path.rpartition("/")[2] != str(manifest.id):
            raise BackupDamagedError("its manifest is that of another backup")
        size = {one.path: one.size for one in listed}.get(f"{path}/dump.tar.age")
        if size != manifest.archive_bytes:
            raise BackupDamagedError("its archive is missing, or has another size")
        stored = sum(one.size for one in listed if one.path.startswith(f"{path}/"))
        done = await self._records.take_up(manifest, store=store.url, path=path, stored_bytes=stored, actor=actor)
        return manifest if done else None


def _backup_id(path: str) -> UUID | None:
    try:
        return UUID(path.split("/")[-2])
    except ValueError:
        return None


__all__ = ["BackupScanner", "ScanReport"]
