"""The tenants' stored passwords: read anew, rotated in two steps, and sealed under another key.

Every statement on ``sealed_password`` and ``next_sealed_password`` but their first INSERT and their purge is here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, LargeBinary, Row, Uuid, bindparam, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..context import Status
from ..errors import InvalidTransitionError, SecretError, TenantNotFoundError
from .audit import SYSTEM, Actor, AuditLog
from .data_keys import DataKeys
from .database import ControlDatabase
from .models import tenants
from .secrets import Keyring, new_password

logger = logging.getLogger("tenancy_orm.secrets")

_BATCH = 200
_PASSES = 5
_STORED = ("sealed_password", "next_sealed_password")


@dataclass(frozen=True, slots=True)
class ResealReport:
    """What ``reseal`` did: how many passwords are sealed under ``key_id`` now, and the tenants whose do not open."""

    key_id: str
    resealed: int
    failed: Mapping[str, str] = field(default_factory=dict)


class SealedPasswords:
    """Reads and writes the tenants' sealed passwords.

    Args:
        control: The control database.
        audit: Where changes are recorded.
        keyring: Opens and seals.
        data_keys: Where the keyring's keys come from, with envelope encryption.
    """

    def __init__(
        self, control: ControlDatabase, audit: AuditLog, keyring: Keyring, data_keys: DataKeys | None = None
    ) -> None:
        self._control = control
        self._audit = audit
        self._keyring = keyring
        self._data_keys = data_keys

    async def of(self, tenant_id: UUID) -> tuple[bytes, ...]:
        """Return what may be the password of a tenant's role now: one, or two while it is being rotated.

        What another process has sealed under a new data key can be opened once this returns.

        Raises:
            ControlUnavailableError: the control database does not answer.
            SecretProviderError: a new data key cannot be unwrapped.
        """
        query = select(tenants.c.sealed_password, tenants.c.next_sealed_password).where(tenants.c.id == tenant_id)
        async with self._control.connect() as connection:
            row = (await connection.execute(query)).one_or_none()
        found = tuple(sealed for sealed in row or () if sealed is not None)
        if self._data_keys is not None and not all(self._keyring.knows(sealed) for sealed in found):
            await self._data_keys.renew(self._keyring)
        return found

    # --- rotation ---------------------------------------------------------------------------------------------------

    async def begin(self, tenant_id: UUID) -> str:
        """Return the password that the tenant's role is to get; it is stored before this returns.

        A rotation that was begun and not finished goes on with the password it had: the role may have it already.

        Raises:
            TenantNotFoundError: no such tenant, or it has been purged.
            InvalidTransitionError: it is still being created.
            SecretError: the password of a rotation that was begun does not open.
        """
        async with self._control.transaction() as connection:
            row = await self._locked(connection, tenant_id)
            if row.next_sealed_password is not None:
                return self._keyring.open_password(tenant_id, row.next_sealed_password)
            password = new_password()
            sealed = self._keyring.seal_password(tenant_id, password)
            await connection.execute(
                update(tenants).where(tenants.c.id == tenant_id).values(next_sealed_password=sealed)
            )
        return password

    async def finish(self, tenant_id: UUID, *, actor: Actor = SYSTEM) -> None:
        """Make the next password the only one, once the role has it. Every process is notified.

        Raises:
            TenantNotFoundError: no such tenant, or it has been purged.
        """
        async with self._control.transaction() as connection:
            row = await self._locked(connection, tenant_id)
            if row.next_sealed_password is None:
                return
            changes = {"sealed_password": row.next_sealed_password, "next_sealed_password": None}
            await connection.execute(update(tenants).where(tenants.c.id == tenant_id).values(changes))
            await self._audit.append(
                connection, action="tenant.rotate_password", tenant_id=tenant_id, slug=row.slug, actor=actor
            )

    async def pending(self) -> list[UUID]:
        """Return the tenants whose rotation was begun and not finished."""
        query = select(tenants.c.id).where(tenants.c.next_sealed_password.is_not(None)).order_by(tenants.c.id)
        async with self._control.connect() as connection:
            return list(await connection.scalars(query))

    async def _locked(self, connection: AsyncConnection, tenant_id: UUID) -> Row[*tuple[Any, ...]]:
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
        """Seal every password under the newest key that is sealed under an older one.

        In small transactions, and safe to interrupt, to repeat, and to run in several places at once.

        Raises:
            ControlUnavailableError: the control database does not answer; what was done is done.
        """
        resealed = 0
        failed: dict[str, str] = {}
        for column in _STORED:
            for _ in range(_PASSES):
                # another pass for what others had locked
                done, failed_now = await self._reseal_column(column, actor)
                resealed += done
                failed.update(failed_now)
                if not done:
                    break
        return ResealReport(self._keyring.current, resealed, failed)

    async def keys_in_use(self) -> set[str]:
        """Return the ids of the keys that something is sealed under."""
        found: set[str] = set()
        for column in _STORED:
            query = (
                f"SELECT DISTINCT convert_from(substring({column} from 3 for get_byte({column}, 1)), 'UTF8') "  # noqa: S608
                f"FROM tenancy.tenants WHERE {column} IS NOT NULL"
            )
            async with self._control.connect() as connection:
                found.update(await connection.scalars(text(query)))
        return found

    async def _reseal_column(self, column: str, actor: Actor) -> tuple[int, dict[str, str]]:
        done, after = 0, UUID(int=0)
        failed: dict[str, str] = {}
        while True:
            async with self._control.transaction() as connection:
                rows = await self._take(connection, column, after)
                if not rows:
                    return done, failed
                after = rows[-1].id
                renewed, failed_now = self._reseal_rows(rows)
                failed.update(failed_now)
                if renewed:
                    await connection.execute(_RESEAL[column], {"ids": list(renewed), "values": list(renewed.values())})
                    detail = {"key_id": self._keyring.current, "count": len(renewed)}
                    await self._audit.append(connection, action="secrets.reseal", actor=actor, detail=detail)
                    done += len(renewed)

    async def _take(self, connection: AsyncConnection, column: str, after: UUID) -> list[Row[*tuple[Any, ...]]]:
        stored = tenants.c[column]
        key_id = self._keyring.current.encode()
        prefix = bytes([1, len(key_id)]) + key_id
        query = (
            select(tenants.c.id, tenants.c.slug, stored.label("sealed"))
            .where(tenants.c.id > after, stored.is_not(None))
            .where(text(f"substring({column} for {len(prefix)}) <> :prefix").bindparams(prefix=prefix))
            .order_by(tenants.c.id)
            .limit(_BATCH)
            .with_for_update(key_share=True, skip_locked=True)
        )
        return list((await connection.execute(query)).all())

    def _reseal_rows(self, rows: Iterable[Row[*tuple[Any, ...]]]) -> tuple[dict[UUID, bytes], dict[str, str]]:
        renewed: dict[UUID, bytes] = {}
        failed: dict[str, str] = {}
        for row in rows:
            try:
                password = self._keyring.open_password(row.id, row.sealed)
            except SecretError as exc:
                logger.error("the password of tenant %s was not sealed again: %s", row.slug, exc)
                failed[row.slug] = str(exc)
            else:
                renewed[row.id] = self._keyring.seal_password(row.id, password)
        return renewed, failed


_RESEAL = {
    column: text(
        f"UPDATE tenancy.tenants t SET {column} = n.value "  # noqa: S608 - one of two constants
        "FROM unnest(:ids, :values) AS n (id, value) WHERE t.id = n.id"
    ).bindparams(bindparam("ids", type_=ARRAY(Uuid)), bindparam("values", type_=ARRAY(LargeBinary)))
    for column in _STORED
}

__all__ = ["ResealReport", "SealedPasswords"]
