"""The sealed keys of backups as objects in a store, below ``keys/``: where they are, and how they are written."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from uuid import UUID

from ..errors import BackupDamagedError, BackupError, SecretError
from ..secrets.keyring import Keyring
from .stores import Store, StoredObject

CONTROL = "control"
"""What stands in a path where a tenant's id would, for the control database."""

_NAME = re.compile(r"([0-9a-f]{32})\.json")
_LARGEST_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class KeyName:
    """A key as the path of its object names it: its id, and its tenant (None: the control database)."""

    id: str
    tenant_id: UUID | None


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A sealed identity that was opened, and its recipient."""

    sealed: bytes = field(repr=False)
    recipient: str


def named_key(found: StoredObject) -> KeyName | None:
    """Return the key that an object is named for; None where it is none, as a part that a killed process has left."""
    if found.size > _LARGEST_BYTES:
        return None
    *_, owner, name = found.path.split("/")
    if (matched := _NAME.fullmatch(name)) is None:
        return None
    try:
        return KeyName(matched[1], None if owner == CONTROL else UUID(owner))
    except ValueError:
        return None


def keys_directory(installation: UUID, tenant_id: UUID | None) -> str:
    """Return where the sealed identities of a tenant's keys are in a store."""
    return f"{installation}/keys/{tenant_id or CONTROL}"


async def check_store(store: Store, installation: UUID | str) -> None:
    """Refuse a store that has no key of the installation: each store with backups has some.

    Raises:
        BackupError: it has none: a directory that is not mounted looks like that.
    """
    if not await store.list(f"{installation}/keys"):
        raise BackupError(f"the store {store.url} has nothing of this installation; mount it, or correct backup.store")


def write_object(
    sealed: bytes, key_id: str, tenant_id: UUID | None, recipient: str, *, data_key: tuple[str, bytes] | None = None
) -> bytes:
    """Return a sealed identity as an object in a store, with the wrapped data key that it is sealed under."""
    values = {
        "format": "tenancy-backup-key-1",
        "id": key_id,
        "tenant_id": None if tenant_id is None else str(tenant_id),
        "recipient": recipient,
        "sealed": base64.b64encode(sealed).decode(),
        "data_key": data_key and {"id": data_key[0], "wrapped": base64.b64encode(data_key[1]).decode()},
    }
    return json.dumps(values, indent=2).encode() + b"\n"


def read_object(data: bytes, key_id: str, tenant_id: UUID | None) -> bytes:
    """Return the sealed identity in such an object. What else is in it says nothing: sealing binds it to its names.

    Raises:
        BackupDamagedError: it is none.
    """
    try:
        return base64.b64decode(json.loads(data)["sealed"], validate=True)
    except (ValueError, KeyError, TypeError) as exc:
        raise BackupDamagedError(f"the object of the key {key_id} of {tenant_id or CONTROL} is damaged") from exc


def read_data_key(data: bytes, key_id: str, tenant_id: UUID | None) -> tuple[str, bytes] | None:
    """Return the id and the wrapped form of the data key in such an object; None where it is sealed without one.

    Raises:
        BackupDamagedError: it is none.
    """
    try:
        given = json.loads(data)["data_key"]
        return None if given is None else (str(given["id"]), base64.b64decode(given["wrapped"], validate=True))
    except (ValueError, KeyError, TypeError) as exc:
        raise BackupDamagedError(f"the object of the key {key_id} of {tenant_id or CONTROL} is damaged") from exc


def unseal(keyring: Keyring, sealed: bytes, key_id: str, tenant_id: UUID | None) -> str:
    """Return the age identity.

    Raises:
        SecretError: it cannot be opened.
    """
    try:
        return keyring.open(sealed, associated=associated(key_id, tenant_id)).decode()
    except SecretError as exc:
        raise SecretError(f"the backup key {key_id}: {exc}") from None


def associated(key_id: str, tenant_id: UUID | None) -> bytes:
    """Return what a sealed identity is bound to: its tenant, and its id."""
    owner = b"control" if tenant_id is None else tenant_id.bytes
    return b"backup-key:" + key_id.encode() + b":" + owner


__all__ = [
    "CONTROL",
    "KeyName",
    "SealedKey",
    "associated",
    "check_store",
    "keys_directory",
    "named_key",
    "read_data_key",
    "read_object",
    "unseal",
    "write_object",
]
