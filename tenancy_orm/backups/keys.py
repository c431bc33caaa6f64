"""``BackupKeys``: the key that a tenant's backups are encrypted with, and its destruction.

Each tenant has an age key of its own. Its recipient encrypts. Its identity, which decrypts, is sealed by the
installation's encryption keys and bound to the tenant and to the key's id, as a tenant's password is. It is in two
places: a row of the control database, and an object in the store, so that backups can be read after the control
database was lost. Backups of the control database leave the identities out: whoever destroys a key removes it from both
places, and no older backup of the control database brings it back. Base backups and WAL of that database's server have
them, as long as these are kept.

So a control database that was restored has no keys. They are taken up again from the stores, each once it was opened:
what an object says of itself is not believed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Row, bindparam, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import Text, Uuid

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
    SecretProviderError,
    TenantNotFoundError,
)
from ..secrets.data_keys import DataKeys
from ..secrets.keyring import Keyring
from ..tenant import Status
from .encryption import new_identity, recipient_of
from .key_objects import KeyName, SealedKey, associated, keys_directory, named_key, read_object, unseal, write_object
from .stores import Store, Stores

logger = logging.getLogger("tenancy_orm.backups")


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
        for store in await self.stores_of(tenant_id):
            # it is not where the keys are to be removed, which a control database that was restored does not know
            await self._refuse_unmounted(store)
        unknown = await self._unknown_keys(tenant_id)
        await self._delete_stored(tenant_id)
        async with self._control.transaction() as connection:
            for key_id, recipient in unknown.items():
                await connection.execute(_NOTE, {"id": key_id, "tenant": tenant_id, "recipient": recipient})
            destroyed = update(backup_keys).where(_is_of(tenant_id), backup_keys.c.destroyed_at.is_(None))
            values = {"sealed_identity": None, "destroyed_at": func.clock_timestamp()}
            changed = (await connection.execute(destroyed.values(values).returning(backup_keys.c.id))).all()
            if changed or unknown:
                await self._audit.append(
                    connection,
                    action="backup_key.destroy",
                    tenant_id=tenant_id,
                    slug=await connection.scalar(select(tenants.c.slug).where(tenants.c.id == tenant_id)),
                    actor=actor,
                    detail={"keys": sorted({*unknown, *(row.id for row in changed)})},
                )
        # a backup that ran until now may have put it there again
        await self._delete_stored(tenant_id)
        return await self.of(tenant_id)

    async def _unknown_keys(self, tenant_id: UUID) -> dict[str, str]:
        """Return the recipients of a tenant's keys that have no row, by id: of backups, and of objects that open.

        Recipients of keys that are in no store any more are empty.
        """
        async with self._control.connect() as connection:
            query = select(backups.c.key_id).where(backups.c.tenant_id == tenant_id).distinct()
            found = dict.fromkeys(await connection.scalars(query), "")
        for store in await self.stores_of(tenant_id):
            for one in await store.list(self._directory(tenant_id)):
                named = named_key(one)
                if named is None:
                    continue
                try:
                    found[named.id] = (await self._read(store, named)).recipient
                except _UNUSABLE as exc:
                    # it is deleted all the same
                    logger.warning("%s in %s is not a key that can be opened: %s", one.path, store.url, exc)
        known = {key.id for key in await self.of(tenant_id)}
        return {key_id: recipient for key_id, recipient in found.items() if key_id not in known}

    # --- keys of a store that the control database does not know ----------------------------------------------------

    async def take_up_all(self, store: Store, tenant_id: UUID | None = None, *, actor: Actor = SYSTEM) -> list[str]:
        """Write the rows of the keys in a store that have none, as after an older control database was restored.

        Args:
            store: The store.
            tenant_id: Of this tenant alone; of all, and of the control database, where None.
            actor: Who does this.

        Returns:
            What could not be taken up, and why.
        """
        refuse_while_bound("taking up the keys of backups")
        async with self._control.connect() as connection:
            known = set(await connection.scalars(select(backup_keys.c.id)))
        errors: list[str] = []
        directory = f"{self._control.installation}/keys" if tenant_id is None else self._directory(tenant_id)
        for one in await store.list(directory):
            named = named_key(one)
            if named is None or named.id in known:
                continue
            try:
                await self._take_up(store, named, one.modified_at, actor)
            except _UNUSABLE as exc:
                logger.warning("%s was not registered: %s", one.path, exc)
                errors.append(f"{one.path}: {exc}")
        return errors

    async def _take_up(self, store: Store, named: KeyName, made_at: datetime, actor: Actor) -> None:
        found = await self._read(store, named)
        values = {
            "id": named.id,
            "tenant_id": named.tenant_id,
            "recipient": found.recipient,
            "sealed_identity": found.sealed,
            "created_at": made_at,
        }
        async with self._control.transaction() as connection:
            try:
                slug = await self._lock_owner(connection, named.tenant_id)
            except TenantNotFoundError:
                return  # not known, or purged: what is left of its keys is not used any more
            added = pg_insert(backup_keys).values(values).on_conflict_do_nothing().returning(backup_keys.c.id)
            if (await connection.execute(added)).first() is None:
                return
            detail = {"key": named.id, "recipient": found.recipient, "store": store.url}
            await self._audit.append(
                connection,
                action="backup_key.take_up",
                tenant_id=named.tenant_id,
                slug=slug,
                actor=actor,
                detail=detail,
            )
        try:
            await store.get(self._path(named.id, named.tenant_id))
        except BackupNotFoundError:
            # destroyed since it was read
            async with self._control.transaction() as connection:
                gone = {"sealed_identity": None, "destroyed_at": func.clock_timestamp()}
                await connection.execute(
                    update(backup_keys)
                    .where(backup_keys.c.id == named.id, backup_keys.c.destroyed_at.is_(None))
                    .values(gone)
                )

    async def _read(self, store: Store, named: KeyName) -> SealedKey:
        """Read a sealed identity, and open it: only this shows that it is the tenant's.

        Raises:
            BackupNotFoundError, BackupDamagedError, SecretError, SecretProviderError: it is none, or cannot be opened.
            BackupError: the store does not answer.
        """
        sealed = read_object(await store.get(self._path(named.id, named.tenant_id)), named.id, named.tenant_id)
        if self._data_keys is not None and not self._keyring.has_key_of(sealed):
            await self._data_keys.update(self._keyring)
        return SealedKey(sealed, recipient_of(unseal(self._keyring, sealed, named.id, named.tenant_id)))

    # --- the stores -------------------------------------------------------------------------------------------------

    async def _delete_stored(self, tenant_id: UUID) -> None:
        for store in await self.stores_of(tenant_id):
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
                    associated=associated(row.id, row.tenant_id),
                )
                # first: what the row says is in the store is there
                for store in await self.stores_of(row.tenant_id):
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
            for store in await self.stores_of(row.tenant_id):
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

    async def stores_of(self, tenant_id: UUID | None) -> list[Store]:
        """Return the stores that have had backups of a tenant (None: the control database), and the configured one.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("the stores of backups")
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
                f"the store {store.url} is empty, but the control database lists backups in it; mount it, or "
                "correct backup.store"
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
        sealed = self._keyring.seal(identity.encode(), associated=associated(key_id, tenant_id))
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
            slug = await self._lock_owner(connection, tenant_id)
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

    @staticmethod
    async def _lock_owner(connection: AsyncConnection, tenant_id: UUID | None) -> str | None:
        """Lock the tenant, or the control database's keys where None, and return the slug.

        Raises:
            TenantNotFoundError: there is no such tenant, or it has been purged.
        """
        if tenant_id is None:
            await connection.execute(_LOCK_CONTROL)
            return None
        # the row is locked: a purge that destroys the keys comes before this, or sees the new one
        query = select(tenants.c.slug, tenants.c.status, tenants.c.purge_started_at)
        found = (await connection.execute(query.where(tenants.c.id == tenant_id).with_for_update())).one_or_none()
        if found is None or found.status == Status.PURGED or found.purge_started_at is not None:
            raise TenantNotFoundError(tenant_id)
        return str(found.slug)

    def _directory(self, tenant_id: UUID | None) -> str:
        return keys_directory(self._control.installation, tenant_id)

    def _path(self, key_id: str, tenant_id: UUID | None) -> str:
        return f"{self._directory(tenant_id)}/{key_id}.json"


def _is_of(tenant_id: UUID | None) -> Any:
    return backup_keys.c.tenant_id.is_(None) if tenant_id is None else backup_keys.c.tenant_id == tenant_id


def _key(row: Row[Any] | Mapping[str, Any]) -> BackupKey:
    found: Any = row
    return BackupKey(found.id, found.tenant_id, found.recipient, found.created_at, found.destroyed_at)


# what is wrong with one object, and not with the store
_UNUSABLE = (BackupNotFoundError, BackupDamagedError, SecretError, SecretProviderError)
# one that was destroyed with its object, and that the control database did not know
_NOTE = text(
    "INSERT INTO tenancy.backup_keys (id, tenant_id, recipient, created_at, destroyed_at) "
    "SELECT :id, t.id, :recipient, COALESCE((SELECT min(b.started_at) FROM tenancy.backups b WHERE b.key_id = :id), "
    "clock_timestamp()), clock_timestamp() FROM tenancy.tenants t WHERE t.id = :tenant ON CONFLICT DO NOTHING"
).bindparams(bindparam("id", type_=Text), bindparam("tenant", type_=Uuid))
_LOCK_CONTROL = text("SELECT pg_advisory_xact_lock(hashtextextended('tenancy backup key of the control database', 0))")

__all__ = ["BackupKey", "BackupKeys", "ResealedKeys"]
