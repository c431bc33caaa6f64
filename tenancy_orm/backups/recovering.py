"""Reading a backup of the control database with what is in the store and in the configuration alone.

For when the control database is lost. The sealed key of its backups is in the store; the encryption keys that open it
are in the configuration, or are unwrapped by the service that has wrapped them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from uuid import UUID

from ..audit.checkpoints import Signer
from ..config import TenancyConfig
from ..errors import (
    BackupDamagedError,
    BackupError,
    BackupNotFoundError,
    SecretError,
    SecretProviderError,
    TenancyError,
)
from ..secrets.keyring import Keyring
from ..secrets.providers import read_secrets
from .key_objects import CONTROL, keys_directory, read_data_key, read_object, unseal
from .manifest import Manifest
from .opening import fetch
from .stores import MANIFEST_BYTES, Store, Stores

logger = logging.getLogger("tenancy_orm.backups")


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A backup of the control database that could not be read.

    Attributes:
        path: The path of its manifest in the store.
        reason: Why it could not.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class RecoveredControl:
    """The backup that was decrypted.

    Attributes:
        manifest: What it has; its signature was verified.
        passed_over: What could not be read before it was found.
    """

    manifest: Manifest
    passed_over: tuple[PassedOver, ...] = ()


async def recover_control(
    config: TenancyConfig,
    directory: Path,
    *,
    installation: UUID | None = None,
    not_before: datetime | None = None,
    accept_older: bool = False,
) -> RecoveredControl:
    """Decrypt the newest backup of the control database into a new directory, for ``pg_restore``.

    Which one is the newest, its signed manifest says, and not its name in the store. That a newer one was deleted from
    the store cannot be seen there: give ``not_before``, and compare the audit log with a checkpoint that is kept
    elsewhere.

    Args:
        config: ``backup.store`` and the encryption keys are read from it. Nothing else is connected to.
        directory: A directory that does not exist.
        installation: The installation, where the store has backups of several.
        not_before: A time, with its time zone, at which there was a backup for certain: an older one is refused.
        accept_older: Take the newest that can be read, also if something that may be a newer one cannot be.

    Raises:
        BackupNotFoundError: there is none, or none since ``not_before``.
        BackupDamagedError: none can be verified or decrypted; or one cannot that may be newer than those that can.
        BackupError: there are several installations, the directory exists, or the store does not answer.
        SecretError, SecretProviderError: its key cannot be opened.
    """
    _refuse_existing(directory)
    config = await read_secrets(config)
    try:
        store = Stores(config.backup).current
        found = await _installation(store) if installation is None else installation
        keys = await _encryption_keys(config, store, found)
        return await _Recovery(store, found, keys).run(directory, not_before=not_before, accept_older=accept_older)
    finally:
        for provider in (config.secrets.provider, config.secrets.key_wrapper):
            if provider is not None:
                await provider.close()


def _refuse_existing(directory: Path) -> None:
    if directory.exists():
        raise BackupError(f"{directory} exists already; name a new directory")


async def _installation(store: Store) -> UUID:
    """Return the only installation that has backups in a store."""
    paths = [one.path.split("/") for one in await store.list("") if f"/keys/{CONTROL}/" in one.path]
    names = sorted({parts[0] for parts in paths})
    if len(names) != 1:
        raise BackupError(
            f"{store.url} has backups of {len(names)} installations{': ' if names else ''}{', '.join(names)}; name one"
        )
    return UUID(names[0])


async def _encryption_keys(config: TenancyConfig, store: Store, installation: UUID) -> Mapping[str, bytes]:
    """Return the configured keys, and the data keys that lie wrapped beside the sealed ones.

    Raises:
        BackupDamagedError: none of them can be read.
        SecretProviderError: none of them is unwrapped.
    """
    keys, wrapper = dict(config.sealing_keys), config.secrets.key_wrapper
    if wrapper is None:
        return keys
    failed: TenancyError | None = None
    for one in await store.list(keys_directory(installation, None)):
        name = PurePosixPath(one.path)
        if name.suffix != ".json" or name.name.startswith("."):
            continue  # a part of one that a killed process has left
        try:
            data_key = read_data_key(await store.get(one.path), name.stem, None)
            if data_key is not None and data_key[0] not in keys:
                context = {"purpose": "tenancy-data-key", "installation": str(installation), "id": data_key[0]}
                keys[data_key[0]] = await wrapper.unwrap(data_key[1], context=context)
        except (BackupDamagedError, BackupNotFoundError, SecretError, SecretProviderError) as exc:
            # another one may be that of a backup
            logger.error("%s is skipped: %s", one.path, exc)
            failed = exc
    if failed is not None and not keys:
        raise failed
    return keys


class _Recovery:
    """Looks for the newest backup in a store.

    Args:
        store: The store.
        installation: The installation's id.
        keys: The encryption keys.
    """

    def __init__(self, store: Store, installation: UUID, keys: Mapping[str, bytes]) -> None:
        self._store = store
        self._installation = installation
        self._signer = Signer(keys)
        self._keyring = Keyring(keys)
        self._passed_over: list[PassedOver] = []

    async def run(self, directory: Path, *, not_before: datetime | None, accept_older: bool) -> RecoveredControl:
        for path, manifest in await self._manifests():
            if not_before is not None and manifest.snapshot_at < not_before:
                raise BackupNotFoundError(
                    f"{self._store.url} has no readable backup of the control database since {_told(not_before)}: the "
                    f"newest is of {_told(manifest.snapshot_at)}{self._listed()}"
                )
            newer = [one for one in self._passed_over if _may_be_newer(one, manifest)]
            if newer and not accept_older:
                raise BackupDamagedError(
                    f"the newest backup of the control database that can be read is of {_told(manifest.snapshot_at)}, "
                    f"and what may be a newer one cannot be read: {'; '.join(map(str, newer))}; find out why, then "
                    "take the older one by --accept-older (accept_older=True)"
                )
            try:
                await self._fetch(path, manifest, directory)
            except (BackupDamagedError, BackupNotFoundError) as exc:
                self._pass_over(path, exc)
                continue
            return RecoveredControl(manifest, tuple(self._passed_over))
        if not self._passed_over:
            raise BackupNotFoundError(
                f"{self._store.url} has no backup of the control database of installation {self._installation}"
            )
        raise BackupDamagedError(f"no backup of the control database can be read{self._listed()}")

    async def _manifests(self) -> list[tuple[str, Manifest]]:
        """Return what can be verified, the newest first."""
        found = []
        for one in await self._store.list(f"{self._installation}/{CONTROL}"):
            if not one.path.endswith("/manifest.json"):
                continue
            try:
                manifest = Manifest.read(await self._store.get(one.path, at_most=MANIFEST_BYTES), self._signer)
                if (manifest.installation, manifest.tenant_id) != (self._installation, None):
                    raise BackupDamagedError("it is the manifest of another database")
                if _name_of(one.path) != str(manifest.id):
                    # whoever may only write to the store can copy an old one to a newer name
                    raise BackupDamagedError(
                        f"it is the manifest of the backup {manifest.id}, of {_told(manifest.snapshot_at)}"
                    )
                found.append((one.path, manifest))
            except (BackupDamagedError, BackupNotFoundError) as exc:
                self._pass_over(one.path, exc)
        return sorted(found, key=lambda one: (one[1].snapshot_at, one[1].id), reverse=True)

    async def _fetch(self, path: str, manifest: Manifest, directory: Path) -> None:
        beside = directory.with_name(f".{directory.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            stored = await self._store.get(f"{keys_directory(self._installation, None)}/{manifest.key_id}.json")
            identity = unseal(self._keyring, read_object(stored, manifest.key_id, None), manifest.key_id, None)
            beside.mkdir(parents=True, mode=0o700)
            await fetch(self._store, f"{path.rpartition('/')[0]}/dump.tar.age", manifest, identity, beside)
            beside.rename(directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _pass_over(self, path: str, error: TenancyError) -> None:
        logger.error("%s is skipped: %s", path, error)
        self._passed_over.append(PassedOver(path, str(error)))

    def _listed(self) -> str:
        return f"; these cannot be read: {'; '.join(map(str, self._passed_over))}" if self._passed_over else ""


def _may_be_newer(passed_over: PassedOver, manifest: Manifest) -> bool:
    """Whether something that cannot be read may be a newer backup: ids are in the order of time."""
    try:
        return UUID(_name_of(passed_over.path)) > manifest.id
    except ValueError:
        return True


def _name_of(path: str) -> str:
    return path.split("/")[-2]


def _told(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


__all__ = ["PassedOver", "RecoveredControl", "recover_control"]
