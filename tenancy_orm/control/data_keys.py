"""Envelope encryption: the keys that seal tenants' passwords, kept in the control database, wrapped by a key elsewhere.

What seals and opens is a data key of 256 random bits, in the memory of the process alone. The control database holds
it wrapped: a copy of it, backups included, opens nothing without the ``KeyWrapper``. The wrapper is asked once per data
key when a process opens, never for a request, so that it may be slow, or away, while processes run.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import Row, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import SecretError
from ..protocols import KeyWrapper
from .database import ControlDatabase
from .models import data_keys
from .secrets import Keyring

logger = logging.getLogger("tenancy_orm.secrets")

_KEY_BYTES = 32
_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 12


class DataKeys:
    """The installation's data keys, oldest first; the newest one seals.

    Args:
        control: The control database, open.
        wrapper: Wraps and unwraps them.
    """

    def __init__(self, control: ControlDatabase, wrapper: KeyWrapper) -> None:
        self._control = control
        self._wrapper = wrapper
        self._installation: UUID = control.installation
        self._known: dict[str, bytes] = {}
        # held while the keys are read, so that many that ask at once unwrap once
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        """Name the wrapper and the keys' ids."""
        return f"DataKeys({self._wrapper.name}, {', '.join(self._known)})"

    async def open(self) -> Mapping[str, bytes]:
        """Return all data keys by id; makes the first one where there is none.

        Raises:
            SecretProviderError: the wrapper does not answer, or refuses.
            SecretError: what it unwrapped is no data key.
            ControlUnavailableError: the control database does not answer.
        """
        keys = await self._read()
        if not keys:
            await self._create(only_first=True)
            keys = await self._read()
        return keys

    async def rotate(self) -> Mapping[str, bytes]:
        """Make a new data key, which seals from now on, and return all of them.

        Raises:
            SecretProviderError, SecretError, ControlUnavailableError: as ``open``.
        """
        await self._create(only_first=False)
        return await self._read()

    async def renew(self, keyring: Keyring) -> None:
        """Make known to ``keyring`` what another process has added.

        Raises:
            SecretProviderError, SecretError, ControlUnavailableError: as ``open``.
        """
        keyring.renew(await self.open())

    async def forget(self, key_ids: list[str]) -> None:
        """Delete data keys that nothing is sealed with any more.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        async with self._control.transaction() as connection:
            await connection.execute(data_keys.delete().where(data_keys.c.id.in_(key_ids)))
        for key_id in key_ids:
            self._known.pop(key_id, None)

    async def _read(self) -> Mapping[str, bytes]:
        async with self._reading:
            async with self._control.connect() as connection:
                rows = (await connection.execute(select(data_keys).order_by(data_keys.c.number))).all()
            known = {}
            for row in rows:
                known[row.id] = self._known.get(row.id) or await self._unwrap(row)
            self._known = known
            return dict(known)

    async def _unwrap(self, row: Row[*tuple[object, ...]]) -> bytes:
        key = await self._wrapper.unwrap(row.wrapped, context=self._context(row.id))
        if len(key) != _KEY_BYTES:
            raise SecretError(f"data key {row.id!r} is damaged: it has {len(key)} bytes")
        return key

    async def _create(self, *, only_first: bool) -> None:
        key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
        # before the transaction: the wrapper may be slow, and no lock waits for it
        wrapped = await self._wrapper.wrap(secrets.token_bytes(_KEY_BYTES), context=self._context(key_id))
        async with self._control.transaction() as connection:
            if only_first and not await _is_first(connection):
                return
            values = {"id": key_id, "wrapped": wrapped, "wrapper": self._wrapper.name}
            await connection.execute(insert(data_keys).values(values))
        logger.info("data key %s made, wrapped by %s", key_id, self._wrapper.name)

    def _context(self, key_id: str) -> dict[str, str]:
        return {"purpose": "tenancy-data-key", "installation": str(self._installation), "id": key_id}


async def _is_first(connection: AsyncConnection) -> bool:
    """Whether there is no data key; until the transaction ends, no other process makes one."""
    await connection.execute(text("SET LOCAL lock_timeout = '10s'"))
    await connection.execute(text("LOCK TABLE tenancy.data_keys IN SHARE ROW EXCLUSIVE MODE"))
    return (await connection.execute(select(data_keys.c.id).limit(1))).first() is None


__all__ = ["DataKeys"]
