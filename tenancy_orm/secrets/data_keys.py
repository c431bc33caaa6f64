"""Envelope encryption: data keys seal tenants' passwords, and are themselves stored wrapped by a key elsewhere.

A data key is 256 random bits, and unwrapped only in the memory of a process. The control database stores it wrapped: a
copy of that database, backups included, opens nothing without the ``KeyWrapper``. The wrapper is called once per data
key when a process opens, never for a request, so that it may be slow or unavailable while processes run.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Row, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..control.database import ControlDatabase
from ..control.models import data_keys
from ..errors import ConfigurationError, SecretError, SecretProviderError, TenancyError
from ..protocols import KeyWrapper
from .keyring import Keyring

logger = logging.getLogger("tenancy_orm.secrets")

_KEY_BYTES = 32
_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 12
_RETRY_SECONDS = 10.0  # until the wrapper is called again for a key that it has refused


class DataKeys:
    """The installation's data keys, oldest first; the newest seals.

    Args:
        control: The control database, open.
        wrapper: Wraps and unwraps the data keys.
    """

    def __init__(self, control: ControlDatabase, wrapper: KeyWrapper) -> None:
        self._control = control
        self._wrapper = wrapper
        self._installation: UUID = control.installation
        self._known: dict[str, bytes] = {}
        # when and why the wrapper refused a key
        self._refused: dict[str, tuple[float, TenancyError]] = {}
        self._subscribers: list[Callable[[Mapping[str, bytes]], Awaitable[None]]] = []
        # locked while the keys are read, so that concurrent callers unwrap each key once
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        """Name the wrapper and the keys' ids."""
        return f"DataKeys({self._wrapper.name}, {', '.join(self._known)})"

    def on_read(self, subscriber: Callable[[Mapping[str, bytes]], Awaitable[None]]) -> None:
        """Call ``subscriber`` with all keys whenever they have been read."""
        self._subscribers.append(subscriber)

    async def open(self) -> Mapping[str, bytes]:
        """Return all data keys by id; creates the first one if there is none.

        Raises:
            SecretProviderError: the wrapper does not answer, or refuses.
            SecretError: an unwrapped value is not a data key.
            ControlUnavailableError: the control database does not answer.
        """
        keys = await self._read()
        if not keys:
            await self._create(only_first=True)
            keys = await self._read()
        return keys

    async def rotate(self) -> Mapping[str, bytes]:
        """Create a new data key, which seals from now on, and return all of them.

        Raises:
            SecretProviderError: it cannot be wrapped or unwrapped; the newest former key still seals.
            ControlUnavailableError: the control database does not answer.
        """
        key_id = await self._create(only_first=False)
        keys = await self._read()
        if key_id not in keys:
            raise SecretProviderError(f"{self._wrapper.name} does not unwrap the new data key {key_id!r}; try again")
        return keys

    async def update(self, keyring: Keyring) -> None:
        """Add the keys that other processes have created to ``keyring``.

        Raises:
            SecretProviderError, SecretError, ControlUnavailableError: as ``open``.
        """
        keyring.add_keys(await self.open())

    async def wrapped_for(self, installation: UUID) -> dict[str, bytes]:
        """Return all data keys by id, wrapped for another installation; nothing is stored.

        Raises:
            SecretProviderError, SecretError, ControlUnavailableError: as ``open``.
        """
        return {
            key_id: await self._wrapper.wrap(key, context=self._context(key_id, installation))
            for key_id, key in (await self.open()).items()
        }

    async def delete_unused(self) -> list[str]:
        """Delete the data keys that seal nothing, except the newest, and return their ids.

        Keys that do not unwrap are deleted too. A key that is newer than the newest known one is another process's, and
        is kept.

        Raises:
            SecretProviderError, SecretError, ControlUnavailableError: as ``open``.
        """
        newest = list(await self.open())[-1]
        async with self._control.transaction() as connection:
            deleted = list(await connection.scalars(_DELETE_UNUSED, {"newest": newest}))
        for key_id in deleted:
            self._known.pop(key_id, None)
        return deleted

    async def _read(self) -> Mapping[str, bytes]:
        async with self._reading:
            async with self._control.connect() as connection:
                rows = (await connection.execute(select(data_keys).order_by(data_keys.c.number))).all()
            refused = await self._unwrap_all(rows)
            self._known = {row.id: self._known[row.id] for row in rows if row.id in self._known}
            if refused is not None and not self._known:
                raise refused.with_traceback(None)
            for subscriber in self._subscribers:
                await subscriber(dict(self._known))
            return dict(self._known)

    async def _unwrap_all(self, rows: Sequence[Row[*tuple[Any, ...]]]) -> TenancyError | None:
        """Unwrap the keys that are not known yet; returns the error of the last one that does not unwrap.

        One bad row must not keep every process from opening: only what is sealed with that key cannot be opened.
        """
        reason: TenancyError | None = None
        for row in rows:
            if row.id in self._known:
                continue
            since, reason = self._refused.get(row.id, (-_RETRY_SECONDS, None))
            if reason is not None and time.monotonic() - since < _RETRY_SECONDS:
                continue
            try:
                # not in a variable: the frames of a traceback would contain the key
                self._known[row.id] = await self._unwrap(row)
            except (SecretError, SecretProviderError, ConfigurationError) as exc:
                logger.error("data key %s, wrapped by %s, cannot be unwrapped: %s", row.id, row.wrapper, exc)
                reason = exc.with_traceback(None)
                self._refused[row.id] = (time.monotonic(), reason)
        return reason

    async def _unwrap(self, row: Row[*tuple[Any, ...]]) -> bytes:
        key = await self._wrapper.unwrap(row.wrapped, context=self._context(row.id))
        if len(key) != _KEY_BYTES:
            raise SecretError(f"data key {row.id!r} is damaged: it has {len(key)} bytes, not {_KEY_BYTES}")
        return key

    async def _create(self, *, only_first: bool) -> str | None:
        key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
        # before the transaction, so that no lock is held while the wrapper, which may be slow, is called
        wrapped = await self._wrapper.wrap(secrets.token_bytes(_KEY_BYTES), context=self._context(key_id))
        async with self._control.transaction() as connection:
            if only_first and not await _is_first(connection):
                return None
            values = {"id": key_id, "wrapped": wrapped, "wrapper": self._wrapper.name}
            await connection.execute(insert(data_keys).values(values))
        logger.info("data key %s created, wrapped by %s", key_id, self._wrapper.name)
        return key_id

    def _context(self, key_id: str, installation: UUID | None = None) -> dict[str, str]:
        of = installation or self._installation
        return {"purpose": "tenancy-data-key", "installation": str(of), "id": key_id}


# A sealed value begins with a version, the length of its key's id, and that id.
_DELETE_UNUSED = text("""
    DELETE FROM tenancy.data_keys k
    WHERE k.number < (SELECT number FROM tenancy.data_keys WHERE id = :newest)
      AND NOT EXISTS (
        SELECT FROM tenancy.tenants t
        WHERE substring(t.sealed_password from 3 for length(k.id)) = convert_to(k.id, 'UTF8')
           OR substring(t.next_sealed_password from 3 for length(k.id)) = convert_to(k.id, 'UTF8')
      )
      AND NOT EXISTS (
        SELECT FROM tenancy.servers s
        WHERE substring(s.sealed_addresses from 3 for length(k.id)) = convert_to(k.id, 'UTF8')
      )
      AND NOT EXISTS (
        SELECT FROM tenancy.backup_keys b
        WHERE substring(b.sealed_identity from 3 for length(k.id)) = convert_to(k.id, 'UTF8')
      )
    RETURNING k.id
""")


async def _is_first(connection: AsyncConnection) -> bool:
    """Whether there is no data key; until the transaction ends, no other process can create one."""
    await connection.execute(text("SET LOCAL lock_timeout = '10s'"))
    await connection.execute(text("LOCK TABLE tenancy.data_keys IN SHARE ROW EXCLUSIVE MODE"))
    return (await connection.execute(select(data_keys.c.id).limit(1))).first() is None


__all__ = ["DataKeys"]
