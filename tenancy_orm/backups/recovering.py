"""Reading a backup of the control database with what is in the store and in the configuration alone.

For when the control database is lost. The sealed key of its backups is in the store; the encryption keys that open it
are in the configuration, or are unwrapped by the service that has wrapped them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
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


async def recover_control(config: TenancyConfig, directory: Path, *, installation: UUID | None = None) -> Manifest:
    """Decrypt the newest good backup of the control database into a new directory, for ``pg_restore``.

    Args:
        config: ``backup.store`` and the encryption keys are read from it. Nothing else is connected to.
        directory: A directory that does not exist.
        installation: The installation, where the store has backups of several.

    Returns:
        Its manifest; the signature was verified.

    Raises:
        BackupNotFoundError: there is none.
        BackupDamagedError: none can be verified or decrypted.
        BackupError: there are several installations, the directory exists, or the store does not answer.
        SecretError, SecretProviderError: its key cannot be opened.
    """
    _refuse_existing(directory)
    config = await read_secrets(config)
    try:
        store = Stores(config.backup).current
        found = await _installation(store) if installation is None else installation
        keys = await _encryption_keys(config, store, found)
        return await _newest(store, found, keys, directory)
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
            logger.error("%s is passed over: %s", one.path, exc)
            failed = exc
    if failed is not None and not keys:
        raise failed
    return keys


async def _newest(store: Store, installation: UUID, keys: Mapping[str, bytes], directory: Path) -> Manifest:
    signer, keyring = Signer(keys), Keyring(keys)
    prefix = f"{installation}/{CONTROL}"
    # ids are in the order of time
    paths = sorted((one.path for one in await store.list(prefix) if one.path.endswith("/manifest.json")), reverse=True)
    if not paths:
        raise BackupNotFoundError(f"{store.url} has no backup of the control database of installation {installation}")
    last: TenancyError | None = None
    for path in paths:
        beside = directory.with_name(f".{directory.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            manifest = Manifest.read(await store.get(path, at_most=MANIFEST_BYTES), signer)
            if (manifest.installation, manifest.tenant_id) != (installation, None):
                raise BackupDamagedError("it is of something else")
            stored = await store.get(f"{keys_directory(installation, None)}/{manifest.key_id}.json")
            identity = unseal(keyring, read_object(stored, manifest.key_id, None), manifest.key_id, None)
            beside.mkdir(parents=True, mode=0o700)
            await fetch(store, f"{path.rpartition('/')[0]}/dump.tar.age", manifest, identity, beside)
            beside.rename(directory)
        except (BackupDamagedError, BackupNotFoundError) as exc:
            logger.error("%s is passed over: %s", path, exc)
            last = exc
        else:
            return manifest
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    raise BackupDamagedError(f"no backup of the control database can be read; the oldest: {last}")


__all__ = ["recover_control"]
