"""``BackupKeys``: the key that a tenant's backups are encrypted with, and its destruction.

Each tenant has an age key of its own. Its recipient encrypts. Its identity, which decrypts, is sealed by the
installation's encryption keys and bound to the tenant and to the key's id, as a tenant's password is. It is in two
places: a row of the control database, and an object in the store, so that backups can be read after the control
database was lost. Backups of the control database leave the identities out: whoever destroys a key removes it from both
places, and no older backup of the control database brings it back.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Row, func, insert, select, text, update

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import backup_keys, backups, data_keys, tenants
from ..errors import (
    BackupDamagedError,
    BackupError,
    BackupKeyDestroyedError,
    BackupNotFoundError,
    ConfigurationError,
    SecretError,
    TenantNotFoundError,
)
from ..secrets.data_keys import DataKeys
from ..secrets.keyring import Keyring
from ..tenant import Status
from .encryption import new_identity
from .stores import Store, Stores

logger = logging.getLogger("tenancy_orm.backups")

CONTROL = "control"
"""What stands in a path where a tenant's id would, for the control database."""


@dataclass(frozen=True, slots=True)
class ResealedKeys:
    """How many backup keys were sealed again, and why others, by id, were not."""

    resealed: int
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BackupKey:
    """A key: its id, its tenant (None: the control database), its age recipient, and when it was made or destroyed."""

    id: str
    tenant_id: UUID | None
    recipient: str
    created_at: datetime
    destroyed_at: datetime | None = None


class BackupKeys:
    """Makes, opens and destroys the keys of backups (``tenancy.backups.keys``).

    Args:
        control: The control database.
        audit: Where changes are recorded.
        keyring: Seals and opens.
        data_keys: The source of the keyring's keys, with envelope encryption.
        stores: The stores.
    """

    def __init__(
        self,
        control: ControlDatabase,
        audit: AuditLog,
        keyring: Keyring,
        data_keys: DataKeys | None,
        stores: Stores,
    ) -> None:
        self._stores = stores
        self._stored: set[tuple[str, str]] = set()  # stores, by URL, and keys that are known to be in them
        self._control = control
        self._audit = audit
        self._keyring = keyring
        self._data_keys = data_keys

    async def of(self, tenant_id: UUID | None) -> tuple[BackupKey, ...]:
        """Return the keys of a tenant, or of the control database where None; the newest first.

        Raises:
            CrossTenantError: a tenant is bound, as for all methods.
        """
        refuse_while_bound("the keys of backups")
        query = select(backup_keys).where(_is_of(tenant_id)).order_by(backup_keys.c.created_at.desc(), backup_keys.c.id)
        async with self._control.connect() as connection:
            return tuple(_key(row) for row in await connection.execute(query))

    async def current(self, tenant_id: UUID | None, store: Store, *, actor: Actor = SYSTEM) -> BackupKey:
        """Return the key that a tenant's backups are encrypted with now; the first call makes it.

        Raises:
            TenantNotFoundError: it has been purged.
            BackupError: the store does not take the sealed identity, or is empty and should not be.
            MissingExtraError: pyrage is not installed.
        """
        for key in await self.of(tenant_id):
            if key.destroyed_at is None:
                await self._keep_in(store, key)
                return key
        await self._refuse_unmounted(store)
        return await self._make(tenant_id, store, actor)

    async def open(self, key_id: str, tenant_id: UUID | None, store: Store | None = None) -> str:
        """Return the age identity of a key.

        Args:
            key_id: The key.
            tenant_id: The tenant that it must be of; None: the control database.
            store: Where it is looked for if the control database does not have it.

        Raises:
            BackupKeyDestroyedError: it was destroyed.
            BackupNotFoundError: there is none.
            SecretError: it cannot be opened.
        """
        refuse_while_bound("the keys of backups")
        query = select(backup_keys).where(backup_keys.c.id == key_id, _is_of(tenant_id))
        async with self._control.connect() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is not None and row.destroyed_at is not None:
            raise BackupKeyDestroyedError(f"the key {key_id} was destroyed at {row.destroyed_at:%Y-%m-%d %H:%M} UTC")
        if row is not None:
            sealed = bytes(row.sealed_identity)
        elif store is None:
            raise BackupNotFoundError(f"there is no backup key {key_id}")
        else:
            sealed = read_object(await store.get(self._path(key_id, tenant_id)), key_id, tenant_id)
        if self._data_keys is not None and not self._keyring.has_key_of(sealed):
            await self._data_keys.update(self._keyring)
        return unseal(self._keyring, sealed, key_id, tenant_id)

    async def destroy(self, tenant_id: UUID, *, actor: Actor = SYSTEM) -> tuple[BackupKey, ...]:
        """Destroy all keys of a tenant, in all stores and in the control database: no backup of it can be read then.

        The stores come first. Repeating it changes nothing. ``prune`` removes what is left of the backups.

        Args:
            tenant_id: The tenant.
            actor: Who does this.

        Returns:
            The keys that were destroyed, now or before.

        Raises:
            BackupError: a store cannot be reached, or is empty and should not be; the keys that are left in it still
                open backups.
        """
        refuse_while_bound("destroying the keys of backups")
        if any(key.destroyed_at is None for key in await self.of(tenant_id)):
            for store in await self._all_stores(tenant_id):
                # it is not where the key is to be removed
                await self._refuse_unmounted(store)
        await self._delete_stored(tenant_id)
        async with self._control.transaction() as connection:
            destroyed = update(backup_keys).where(_is_of(tenant_id), backup_keys.c.destroyed_at.is_(None))
            values = {"sealed_identity": None, "destroyed_at": func.clock_timestamp()}
            changed = (await connection.execute(destroyed.values(values).returning(backup_keys.c.id))).all()
            if changed:
                await self._audit.append(
                    connection,
                    action="backup_key.destroy",
                    tenant_id=tenant_id,
                    slug=await connection.scalar(select(tenants.c.slug).where(tenants.c.id == tenant_id)),
                    actor=actor,
                    detail={"keys": sorted(row.id for row in changed)},
                )
        # a backup that ran until now may have put it there again
        await self._delete_stored(tenant_id)
        return await self.of(tenant_id)

    async def _delete_stored(self, tenant_id: UUID) -> None:
        for store in await self._all_stores(tenant_id):
            listed = [found.path for found in await store.list(self._directory(tenant_id))]
            await store.delete(*listed)

    async def reseal(self, audit: AuditLog, *, actor: Actor = SYSTEM) -> ResealedKeys:
        """Seal the identities that are sealed under an older key under the newest one, in the store as well.

        Args:
            audit: Where that is recorded.
            actor: Who does this.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("the keys of backups")
        resealed, failed = 0, dict[str, str]()
        async with self._control.connect() as connection:
            usable = select(backup_keys).where(backup_keys.c.destroyed_at.is_(None))
            rows = (await connection.execute(usable.order_by(backup_keys.c.created_at))).all()
        for row in rows:
            sealed = bytes(row.sealed_identity)
            try:
                if self._keyring.key_id(sealed) == self._keyring.current:
                    continue
                renewed = self._keyring.seal(
                    unseal(self._keyring, sealed, row.id, row.tenant_id).encode(),
                    associated=_associated(row.id, row.tenant_id),
                )
                # first: what the row says is in the store is there
                for store in await self._all_stores(row.tenant_id):
                    await self._put(store, renewed, row.id, row.tenant_id, row.recipient)
                    await self._remove_if_destroyed(store, row.id, row.tenant_id)
            except (SecretError, BackupError, ConfigurationError) as exc:
                logger.error("the backup key %s was not resealed: %s", row.id, exc)
                failed[row.id] = str(exc)
                continue
            async with self._control.transaction() as connection:
                # unless somebody has changed it in between
                unchanged = (backup_keys.c.id == row.id) & (backup_keys.c.sealed_identity == sealed)
                changed = await connection.execute(update(backup_keys).where(unchanged).values(sealed_identity=renewed))
                if changed.rowcount:
                    detail = {"key_id": self._keyring.current, "backup_key": row.id}
                    await audit.append(connection, action="secrets.reseal", actor=actor, detail=detail)
                    resealed += 1
            if not changed.rowcount:
                await self._correct_stored(row, renewed)
        return ResealedKeys(resealed, failed)

    async def _correct_stored(self, row: Row[Any], written: bytes) -> None:
        """Write what the row says to all stores: another process has sealed the identity again, or destroyed it."""
        with suppress(BackupKeyDestroyedError):
            for store in await self._all_stores(row.tenant_id):
                await self._put_as_recorded(store, row.id, row.tenant_id, row.recipient, written)

    async def keys_in_use(self) -> frozenset[str]:
        """Return the ids of the encryption keys that identities are sealed under.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("the keys of backups")
        async with self._control.connect() as connection:
            usable = select(backup_keys.c.sealed_identity).where(backup_keys.c.destroyed_at.is_(None))
            found = [bytes(sealed) for sealed in await connection.scalars(usable)]
        return frozenset(self._keyring.key_id(sealed) for sealed in found)

    async def _all_stores(self, tenant_id: UUID | None) -> list[Store]:
        """Return the stores that have had backups of a tenant, and the configured one."""
        async with self._control.connect() as connection:
            query = select(backups.c.store).where(
                backups.c.tenant_id.is_(None) if tenant_id is None else backups.c.tenant_id == tenant_id
            )
            urls = set(await connection.scalars(query.distinct()))
        found = {url: self._stores.at(url) for url in sorted(urls)}
        if self._stores.is_configured:
            found.setdefault(self._stores.current.url, self._stores.current)
        return list(found.values())

    async def _keep_in(self, store: Store, key: BackupKey) -> None:
        """See that the sealed identity is in a store, as the row has it: the key may be older than the store."""
        stored: bytes | None = None
        # each time: a store that is not mounted any more looks like an empty one
        try:
            stored = read_object(await store.get(self._path(key.id, key.tenant_id)), key.id, key.tenant_id)
        except BackupNotFoundError:
            await self._refuse_unmounted(store)
        except BackupDamagedError as exc:
            logger.error("%s; it is written again to %s", exc, store.url)
        if stored is None or (store.url, key.id) not in self._stored:
            await self._put_as_recorded(store, key.id, key.tenant_id, key.recipient, stored)
        self._stored.add((store.url, key.id))

    async def _put_as_recorded(
        self, store: Store, key_id: str, tenant_id: UUID | None, recipient: str, stored: bytes | None
    ) -> None:
        """Write a sealed identity to a store until it is what the row says: others may seal it again, or destroy it.

        Raises:
            BackupKeyDestroyedError: it was destroyed; it is not in the store.
        """
        query = select(backup_keys.c.sealed_identity).where(backup_keys.c.id == key_id)
        while True:
            async with self._control.connect() as connection:
                sealed = await connection.scalar(query)
            if sealed is None:
                await store.delete(self._path(key_id, tenant_id))
                raise BackupKeyDestroyedError(f"the key {key_id} was destroyed")
            if bytes(sealed) == stored:
                return
            stored = bytes(sealed)
            await self._put(store, stored, key_id, tenant_id, recipient)

    async def _refuse_unmounted(self, store: Store) -> None:
        """Refuse a store that is empty although it has backups, as the rows say: a directory that is not mounted.

        What is written there would be lost, or in the way of what is mounted next.

        Raises:
            BackupError: it is.
        """
        query = select(backups.c.id).where(backups.c.store == store.url, backups.c.state == "done").limit(1)
        async with self._control.connect() as connection:
            if (await connection.execute(query)).first() is None:
                return
        prefix = str(self._control.installation)
        if await asyncio.to_thread(lambda: next(iter(store.find(prefix)), None)) is None:
            raise BackupError(
                f"the store {store.url} is empty, and has backups as the control database says; mount it, or correct "
                "backup.store"
            )

    async def _remove_if_destroyed(self, store: Store, key_id: str, tenant_id: UUID | None) -> bool:
        """Remove a sealed identity that was written while another process destroyed the key; tells whether one has."""
        query = select(backup_keys.c.id).where(backup_keys.c.id == key_id, backup_keys.c.destroyed_at.is_(None))
        async with self._control.connect() as connection:
            if (await connection.execute(query)).first() is not None:
                return False
        await store.delete(self._path(key_id, tenant_id))
        return True

    async def _put(self, store: Store, sealed: bytes, key_id: str, tenant_id: UUID | None, recipient: str) -> None:
        data_key = None
        if self._data_keys is not None:
            # the control database has it alone; with it, and the service that wraps, the store can be read
            query = select(data_keys.c.id, data_keys.c.wrapped).where(data_keys.c.id == self._keyring.key_id(sealed))
            async with self._control.connect() as connection:
                row = (await connection.execute(query)).one_or_none()
            data_key = None if row is None else (row.id, bytes(row.wrapped))
        await store.put(
            self._path(key_id, tenant_id), write_object(sealed, key_id, tenant_id, recipient, data_key=data_key)
        )

    async def _make(self, tenant_id: UUID | None, store: Store, actor: Actor) -> BackupKey:
        if self._data_keys is not None:
            # seal under the newest key, even if another process has created it
            await self._data_keys.update(self._keyring)
        key_id = uuid4().hex
        identity, recipient = new_identity()
        sealed = self._keyring.seal(identity.encode(), associated=_associated(key_id, tenant_id))
        del identity  # the frames of a traceback would contain it
        # before the row: a backup that was made with a key that is not in the store is lost with the control database
        await self._put(store, sealed, key_id, tenant_id, recipient)
        values = {"id": key_id, "tenant_id": tenant_id, "recipient": recipient, "sealed_identity": sealed}
        kept: BackupKey | None = None
        try:
            kept = await self._insert(values, tenant_id, actor)
            return kept
        finally:
            if kept is None or kept.id != key_id:  # purged, or another process was faster
                await store.delete(self._path(key_id, tenant_id))

    async def _insert(self, values: Mapping[str, Any], tenant_id: UUID | None, actor: Actor) -> BackupKey:
        """Insert a key's row, or return the one that another process has inserted."""
        async with self._control.transaction() as connection:
            slug = None
            if tenant_id is not None:
                # the row is locked: a purge that destroys the keys comes before this, or sees the new one
                query = select(tenants.c.slug, tenants.c.status, tenants.c.purge_started_at)
                found = (
                    await connection.execute(query.where(tenants.c.id == tenant_id).with_for_update())
                ).one_or_none()
                if found is None or found.status == Status.PURGED or found.purge_started_at is not None:
                    raise TenantNotFoundError(tenant_id)
                slug = found.slug
            else:
                await connection.execute(_LOCK_CONTROL)
            usable = select(backup_keys).where(_is_of(tenant_id), backup_keys.c.destroyed_at.is_(None))
            row = (await connection.execute(usable.order_by(backup_keys.c.created_at.desc()).limit(1))).one_or_none()
            if row is None:
                row = (await connection.execute(insert(backup_keys).values(values).returning(*backup_keys.c))).one()
                await self._audit.append(
                    connection,
                    action="backup_key.create",
                    tenant_id=tenant_id,
                    slug=slug,
                    actor=actor,
                    detail={"key": row.id, "recipient": row.recipient},
                )
        return _key(row)

    def _directory(self, tenant_id: UUID | None) -> str:
        return keys_directory(self._control.installation, tenant_id)

    def _path(self, key_id: str, tenant_id: UUID | None) -> str:
        return f"{self._directory(tenant_id)}/{key_id}.json"


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
        return keyring.open(sealed, associated=_associated(key_id, tenant_id)).decode()
    except SecretError as exc:
        raise SecretError(f"the backup key {key_id}: {exc}") from None


def _associated(key_id: str, tenant_id: UUID | None) -> bytes:
    owner = b"control" if tenant_id is None else tenant_id.bytes
    return b"backup-key:" + key_id.encode() + b":" + owner


def _is_of(tenant_id: UUID | None) -> Any:
    return backup_keys.c.tenant_id.is_(None) if tenant_id is None else backup_keys.c.tenant_id == tenant_id


def _key(row: Row[Any] | Mapping[str, Any]) -> BackupKey:
    found: Any = row
    return BackupKey(found.id, found.tenant_id, found.recipient, found.created_at, found.destroyed_at)


_LOCK_CONTROL = text("SELECT pg_advisory_xact_lock(hashtextextended('tenancy backup key of the control database', 0))")

__all__ = ["CONTROL", "BackupKey", "BackupKeys"]
