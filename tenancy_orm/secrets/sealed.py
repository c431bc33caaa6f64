"""The tenants' stored passwords: reading, rotation in two steps, and resealing under another key.

Every statement on ``sealed_password`` and ``next_sealed_password`` is here, except their first INSERT and their purge.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, LargeBinary, Row, Select, Uuid, bindparam, func, or_, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..control.database import ControlDatabase
from ..control.models import tenants
from ..errors import InvalidTransitionError, SecretError, TenantNotFoundError
from ..postgres.errors import LOCK_NOT_AVAILABLE, sqlstate_of
from ..tenant import Status
from .data_keys import DataKeys
from .keyring import Keyring, new_password

logger = logging.getLogger("tenancy_orm.secrets")

_BATCH = 200
_PASSES = 5
_WAIT_SECONDS = 5.0  # that reseal waits in total for rows that other transactions have locked
_COLUMNS = ("sealed_password", "next_sealed_password")


@dataclass(frozen=True, slots=True)
class ResealReport:
    """The result of ``reseal``: how many passwords it sealed under ``key_id``, and why others (by slug) were not.

    ``keys_in_use`` are the keys that something is still sealed under. A key that is not among them can be removed.
    """

    key_id: str
    resealed: int
    failed: Mapping[str, str] = field(default_factory=dict)
    keys_in_use: frozenset[str] = frozenset()

    @property
    def remaining(self) -> frozenset[str]:
        """The older keys that something is still sealed under: repeat ``reseal`` before you remove one of them."""
        return self.keys_in_use - {self.key_id}


class SealedPasswords:
    """Reads and writes the tenants' sealed passwords.

    Args:
        control: The control database.
        audit: Where changes are recorded.
        keyring: Opens and seals.
        data_keys: The source of the keyring's keys, with envelope encryption.
    """

    def __init__(
        self, control: ControlDatabase, audit: AuditLog, keyring: Keyring, data_keys: DataKeys | None = None
    ) -> None:
        self._control = control
        self._audit = audit
        self._keyring = keyring
        self._data_keys = data_keys
        self._subscribers: list[Callable[[UUID], None]] = []

    def on_read(self, subscriber: Callable[[UUID], None]) -> None:
        """Call ``subscriber`` with a tenant's id whenever ``candidates`` has read its passwords.

        That is after a login was refused: what the process has cached of this tenant may be stale.
        """
        self._subscribers.append(subscriber)

    async def candidates(self, tenant_id: UUID) -> tuple[bytes, ...]:
        """Return the sealed passwords that the tenant's role may have now: one, or two during a rotation.

        A new data key that another process has sealed them with is in the keyring when this returns.

        Raises:
            ControlUnavailableError: the control database does not answer.
            SecretProviderError: a new data key cannot be unwrapped.
        """
        query = select(tenants.c.sealed_password, tenants.c.next_sealed_password).where(tenants.c.id == tenant_id)
        async with self._control.connect() as connection:
            row = (await connection.execute(query)).one_or_none()
        found = tuple(sealed for sealed in row or () if sealed is not None)
        if self._data_keys is not None and not all(self._keyring.has_key_of(sealed) for sealed in found):
            await self._data_keys.update(self._keyring)
        for subscriber in self._subscribers:
            subscriber(tenant_id)
        return found

    # --- rotation ---------------------------------------------------------------------------------------------------

    async def start_rotation(self, tenant_id: UUID) -> str:
        """Return the role's next password; it is stored before this returns.

        An unfinished rotation continues with its password, which the role may have already. A password that cannot be
        opened is replaced, or that rotation could never end. The caller has the tenant's advisory lock, so that no
        other process is setting that password on the role.

        Raises:
            TenantNotFoundError: no such tenant, or it has been purged.
            InvalidTransitionError: it is still being created.
        """
        if self._data_keys is not None:
            # seal under the newest key, even if another process has created it
            await self._data_keys.update(self._keyring)
        async with self._control.transaction() as connection:
            row = await self._lock(connection, tenant_id)
            sealed = row.next_sealed_password
            if sealed is None or not self._can_open(tenant_id, row.slug, sealed):
                # the password is not in a variable: the frames of a traceback would contain it
                sealed = self._keyring.seal_password(tenant_id, new_password())
                await connection.execute(
                    update(tenants).where(tenants.c.id == tenant_id).values(next_sealed_password=sealed)
                )
        return self._keyring.open_password(tenant_id, sealed)

    async def finish_rotation(self, tenant_id: UUID, *, actor: Actor = SYSTEM) -> None:
        """Replace the password by the next one, once the role has it. Every process is notified.

        Raises:
            TenantNotFoundError: no such tenant, or it has been purged.
        """
        async with self._control.transaction() as connection:
            row = await self._lock(connection, tenant_id)
            if row.next_sealed_password is None:
                return
            changes = {"sealed_password": row.next_sealed_password, "next_sealed_password": None}
            await connection.execute(update(tenants).where(tenants.c.id == tenant_id).values(changes))
            await self._audit.append(
                connection, action="tenant.rotate_password", tenant_id=tenant_id, slug=row.slug, actor=actor
            )

    async def pending_rotations(self) -> list[UUID]:
        """Return the ids of the tenants with an unfinished rotation."""
        query = select(tenants.c.id).where(tenants.c.next_sealed_password.is_not(None)).order_by(tenants.c.id)
        async with self._control.connect() as connection:
            return list(await connection.scalars(query))

    def _can_open(self, tenant_id: UUID, slug: str, sealed: bytes) -> bool:
        try:
            self._keyring.open_password(tenant_id, sealed)
        except SecretError as exc:
            logger.error("the next password of tenant %s cannot be opened, and is replaced: %s", slug, exc)
            return False
        return True

    async def _lock(self, connection: AsyncConnection, tenant_id: UUID) -> Row[*tuple[Any, ...]]:
        query = (
            select(tenants.c.slug, tenants.c.status, tenants.c.next_sealed_password)
            .where(tenants.c.id == tenant_id)
            .with_for_update(key_share=True)
        )
        row = (await connection.execute(query)).one_or_none()
        if row is None or row.status == Status.PURGED:
            raise TenantNotFoundError(tenant_id)
        if row.status == Status.PROVISIONING:
            raise InvalidTransitionError(row.slug, row.status, "another password")
        return row

    # --- keys -------------------------------------------------------------------------------------------------------

    async def reseal(self, *, actor: Actor = SYSTEM) -> ResealReport:
        """Seal every password that is sealed under an older key under the newest one.

        It uses small transactions, and is safe to interrupt, to repeat, and to run in several places at once: with data
        keys, all runs end with the newest. Which of ``encryption_keys`` is the newest is each process's own
        configuration; run it where the new key is the last.

        Raises:
            ControlUnavailableError: the control database does not answer; what was resealed stays resealed.
        """
        resealed = 0
        failed: dict[str, str] = {}
        for column in _COLUMNS:
            done, failed_now = await self._reseal_column(column, actor)
            resealed += done
            failed.update(failed_now)
        return ResealReport(self._keyring.current, resealed, failed, await self.keys_in_use())

    async def keys_in_use(self) -> frozenset[str]:
        """Return the ids of the keys that something is sealed under.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        found: set[bytes] = set()
        async with self._control.connect() as connection:
            for column in _COLUMNS:
                query = (
                    f"SELECT DISTINCT substring({column} from 3 for get_byte({column}, 1)) "  # noqa: S608
                    # a shorter value is damaged, and not sealed under any key
                    f"FROM tenancy.tenants WHERE length({column}) > 2"
                )
                found.update(await connection.scalars(text(query)))
        return frozenset(key_id.decode(errors="replace") for key_id in found)

    async def _reseal_column(self, column: str, actor: Actor) -> tuple[int, dict[str, str]]:
        resealed = 0
        failed: dict[str, str] = {}
        for _ in range(_PASSES):
            # again, for rows that others had locked, or have sealed under a key that was not in the keyring
            newest = self._keyring.current
            done, failed = await self._reseal_unlocked(column, actor)
            resealed += done
            if failed and self._data_keys is not None:
                await self._data_keys.update(self._keyring)
            if not done and newest == self._keyring.current:
                break
        return resealed + await self._reseal_locked(column, actor, failed), failed

    async def _reseal_unlocked(self, column: str, actor: Actor) -> tuple[int, dict[str, str]]:
        done, after = 0, UUID(int=0)
        failed: dict[str, str] = {}
        while True:
            async with self._control.transaction() as connection:
                query = self._outdated(column).where(tenants.c.id > after).limit(_BATCH)
                rows = (await connection.execute(query.with_for_update(key_share=True, skip_locked=True))).all()
                if not rows:
                    return done, failed
                after = rows[-1].id
                done += await self._reseal_rows(connection, column, rows, actor, failed)

    async def _reseal_locked(self, column: str, actor: Actor, failed: dict[str, str]) -> int:
        """Reseal the rows that every pass found locked, and wait for them; add those that stay locked to ``failed``."""
        done, deadline = 0, time.monotonic() + _WAIT_SECONDS
        async with self._control.connect() as connection:
            rows = (await connection.execute(self._outdated(column))).all()
        for row in rows:
            if row.slug in failed:
                continue
            wait = max(deadline - time.monotonic(), 0.001)
            try:
                async with self._control.transaction() as connection:
                    await connection.execute(_LOCK_TIMEOUT, {"timeout": f"{int(wait * 1000)}ms"})
                    query = self._outdated(column).where(tenants.c.id == row.id).with_for_update(key_share=True)
                    found = (await connection.execute(query)).all()
                    done += await self._reseal_rows(connection, column, found, actor, failed)
            except DBAPIError as exc:
                if sqlstate_of(exc) != LOCK_NOT_AVAILABLE:
                    raise
                logger.error("the password of tenant %s was not resealed: its row is locked", row.slug)
                failed[row.slug] = "another transaction has locked the tenant's row; try again"
        return done

    def _outdated(self, column: str) -> Select[*tuple[Any, ...]]:
        """The query for passwords that are not sealed under the newest key."""
        stored = tenants.c[column]
        key_id = self._keyring.current.encode()
        prefix = bytes([1, len(key_id)]) + key_id
        return (
            select(tenants.c.id, tenants.c.slug, stored.label("sealed"))
            # a purge leaves an empty password
            .where(or_(func.length(stored) > 0, tenants.c.purge_started_at.is_(None)))
            .where(text(f"substring({column} for {len(prefix)}) <> :prefix").bindparams(prefix=prefix))
            .order_by(tenants.c.id)
        )

    async def _reseal_rows(
        self,
        connection: AsyncConnection,
        column: str,
        rows: Iterable[Row[*tuple[Any, ...]]],
        actor: Actor,
        failed: dict[str, str],
    ) -> int:
        renewed: dict[UUID, bytes] = {}
        for row in rows:
            try:
                renewed[row.id] = self._keyring.seal_password(row.id, self._keyring.open_password(row.id, row.sealed))
            except SecretError as exc:
                logger.error("the password of tenant %s was not resealed: %s", row.slug, exc)
                failed[row.slug] = str(exc)
        if renewed:
            await connection.execute(_RESEAL[column], {"ids": list(renewed), "values": list(renewed.values())})
            detail = {"key_id": self._keyring.current, "count": len(renewed)}
            await self._audit.append(connection, action="secrets.reseal", actor=actor, detail=detail)
        return len(renewed)


_LOCK_TIMEOUT = text("SELECT set_config('lock_timeout', :timeout, true)")
_RESEAL = {
    column: text(
        f"UPDATE tenancy.tenants t SET {column} = n.value "  # noqa: S608 - one of two constants
        "FROM unnest(:ids, :values) AS n (id, value) WHERE t.id = n.id"
    ).bindparams(bindparam("ids", type_=ARRAY(Uuid)), bindparam("values", type_=ARRAY(LargeBinary)))
    for column in _COLUMNS
}

__all__ = ["ResealReport", "SealedPasswords"]
