"""``BackupReader``: reads what is in a store, and verifies all of it: signature, checksums and encryption."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from ..audit.log import AuditLog
from ..config import BackupConfig
from ..errors import BackupDamagedError, BackupError, BackupNotFoundError
from .archive import Digest, unpack
from .dump import in_thread
from .encryption import decrypt
from .keys import BackupKeys
from .manifest import Manifest
from .records import Backup, BackupRecords
from .spool import Spool
from .stores import MANIFEST_BYTES, Store, Stores


@dataclass(frozen=True, slots=True)
class OpenBackup:
    """A backup that is decrypted.

    Attributes:
        backup: Its row.
        manifest: What it has; its signature was verified.
        directory: The dump, which ``pg_restore --format=directory`` reads; its checksums were verified.
    """

    backup: Backup
    manifest: Manifest
    directory: Path


class BackupReader:
    """Reads backups.

    Args:
        config: ``directory`` and ``max_temporary_bytes`` are read from it.
        installation: The installation's id.
        audit: Knows the public keys.
        keys: The keys of backups.
        stores: The stores.
        records: Where it is recorded which backups are decrypted now.
    """

    def __init__(
        self,
        config: BackupConfig,
        installation: UUID,
        audit: AuditLog,
        keys: BackupKeys,
        stores: Stores,
        records: BackupRecords,
    ) -> None:
        self._records = records
        self._spool = Spool(config.directory, config.max_temporary_bytes)
        self._installation = installation
        self._audit = audit
        self._keys = keys
        self._stores = stores

    def sweep(self) -> None:
        """Remove what killed processes have left on this machine, decrypted."""
        self._spool.sweep()

    async def manifest(self, backup: Backup) -> Manifest:
        """Read a backup's manifest, and verify its signature, and that it is the one of the backup's row.

        Raises:
            BackupNotFoundError: the backup is not done, or the store does not have it any more.
            BackupDamagedError: it is not what was written.
        """
        if backup.state != "done":
            raise BackupNotFoundError(f"the backup {backup.id} is {backup.state}")
        manifest = await self.read_manifest(self._stores.at(backup.store), backup.manifest_path)
        expected = (backup.id, backup.tenant_id, self._installation)
        if (manifest.id, manifest.tenant_id, manifest.installation) != expected:
            raise BackupDamagedError(f"the store has another backup at {backup.manifest_path}")
        if backup.manifest is not None and backup.manifest != manifest:
            raise BackupDamagedError("the manifest in the store and the one in the control database differ")
        return manifest

    async def read_manifest(self, store: Store, path: str) -> Manifest:
        """Read a manifest, and verify its signature.

        Raises:
            BackupNotFoundError: there is none.
            BackupDamagedError: it is not what was written.
        """
        return Manifest.read(await store.get(path, at_most=MANIFEST_BYTES), await self._audit.verifier())

    async def check(self, backup: Backup) -> Manifest:
        """Verify a backup without its key: the manifest's signature, and the archive's checksum.

        Raises:
            BackupNotFoundError, BackupDamagedError: as ``manifest``.
            BackupError: the store does not answer.
        """
        manifest = await self.manifest(backup)
        reading = _Reading(self._stores.at(backup.store), backup.archive_path)

        def work() -> None:
            digest = Digest()
            for _ in digest.passing(reading):
                pass
            digest.check(manifest)

        await in_thread(work, reading.stop)
        return manifest

    @asynccontextmanager
    async def open(self, backup: Backup) -> AsyncIterator[OpenBackup]:
        """Decrypt a backup for the body, into temporary space.

        Raises:
            BackupNotFoundError, BackupDamagedError: as ``manifest``.
            BackupKeyDestroyedError: its key was destroyed.
            BackupError: the store does not answer, or there is not enough temporary space.
        """
        manifest = await self.manifest(backup)
        store = self._stores.at(backup.store)
        # before the key is read: whoever destroys it knows that it may be in use
        async with self._records.reading(backup):
            identity = await self._keys.open(manifest.key_id, manifest.tenant_id, store)
            with self._spool.open(manifest.dump_bytes) as directory:
                await fetch(store, backup.archive_path, manifest, identity, directory)
                yield OpenBackup(backup, manifest, directory)


class _Reading:
    """An object that is read, until somebody stops it."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self._path = path
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._store.read(self._path):
            if self._stopped:
                raise BackupError("the reading was stopped")
            yield chunk


async def fetch(store: Store, path: str, manifest: Manifest, identity: str, directory: Path) -> None:
    """Read an archive, decrypt it and unpack it into a directory.

    Raises:
        BackupDamagedError: it is not what the manifest says.
        BackupError: the store does not answer.
    """
    reading = _Reading(store, path)

    def work() -> None:
        digest = Digest()
        unpack(decrypt(digest.passing(reading), identity), manifest, directory)
        digest.check(manifest)

    await in_thread(work, reading.stop)


__all__ = ["BackupReader", "OpenBackup", "fetch"]
