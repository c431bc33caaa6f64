"""The addresses in the rows of servers, sealed: each can be opened in the row of its own server alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import select, update

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..config import ServerAddresses
from ..control.database import ControlDatabase
from ..control.models import servers
from ..errors import ConfigurationError, SecretError
from ..secrets.data_keys import DataKeys
from ..secrets.keyring import Keyring
from .rows import ServerRow, read_rows

logger = logging.getLogger("tenancy_orm.servers")


@dataclass(frozen=True, slots=True)
class ResealedAddresses:
    """How many servers' addresses were sealed again, and why others, by name, were not."""

    resealed: int
    failed: Mapping[str, str] = field(default_factory=dict)


class SealedAddresses:
    """Seals and opens the addresses in the rows of servers.

    Args:
        control: The control database.
        keyring: Opens and seals.
        data_keys: The source of the keyring's keys, with envelope encryption.
    """

    def __init__(self, control: ControlDatabase, keyring: Keyring, data_keys: DataKeys | None = None) -> None:
        self._control = control
        self._keyring = keyring
        self._data_keys = data_keys

    def seal(self, name: str, addresses: ServerAddresses) -> bytes:
        """Seal the addresses of the server of this name."""
        given = {"admin": addresses.admin, "tenants": addresses.tenants, "replicas": list(addresses.replicas)}
        if addresses.peer is not None:
            # processes of an earlier version open rows without it
            given["peer"] = addresses.peer
        return self._keyring.seal(json.dumps(given).encode(), associated=_associated(name))

    def open(self, row: ServerRow) -> ServerAddresses:
        """Return the addresses in a row.

        Raises:
            SecretError: there are none, or they do not open: the key is not configured, they are damaged, or they were
                sealed for another server.
        """
        if row.sealed_addresses is None:
            raise SecretError(f"the row of server {row.name!r} has no addresses")
        remedy = f"give all of them again: tenancy servers update {row.name} --admin URL"
        try:
            return ServerAddresses(
                **json.loads(self._keyring.open(row.sealed_addresses, associated=_associated(row.name)))
            )
        except SecretError as exc:
            reason = str(exc).replace("another tenant", "another server")
            raise SecretError(
                f"the addresses of server {row.name!r}: {reason}; configure the right key, or {remedy}"
            ) from None
        except (ValueError, TypeError, ConfigurationError):
            # without the reason, which may quote them
            raise SecretError(f"the addresses of server {row.name!r} are malformed; {remedy}") from None

    async def read(self) -> list[ServerRow]:
        """Return the rows of all servers; the keys that seal their addresses are in the keyring, if they exist.

        Raises:
            ControlUnavailableError: the control database does not answer.
            SecretProviderError: a new data key cannot be unwrapped.
        """
        rows = await read_rows(self._control)
        sealed = [row.sealed_addresses for row in rows if row.sealed_addresses is not None]
        if self._data_keys is not None and not all(self._has_key_of(value) for value in sealed):
            await self._data_keys.update(self._keyring)
        return rows

    def _has_key_of(self, sealed: bytes) -> bool:
        try:
            return self._keyring.has_key_of(sealed)
        except SecretError:
            return True  # it is damaged: no key opens it

    async def reseal(self, audit: AuditLog, *, actor: Actor = SYSTEM) -> ResealedAddresses:
        """Seal the addresses that are sealed under an older key under the newest one.

        Args:
            audit: Where that is recorded.
            actor: Who does this.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        failed: dict[str, str] = {}
        resealed = 0
        for row in await self.read():
            sealed = row.sealed_addresses
            try:
                if sealed is None or self._keyring.key_id(sealed) == self._keyring.current:
                    continue
                renewed = self.seal(row.name, self.open(row))
            except SecretError as exc:
                logger.error("the addresses of server %s were not resealed: %s", row.name, exc)
                failed[row.name] = str(exc)
                continue
            async with self._control.transaction() as connection:
                # unless somebody has changed them in between
                unchanged = (servers.c.name == row.name) & (servers.c.sealed_addresses == sealed)
                changed = await connection.execute(update(servers).where(unchanged).values(sealed_addresses=renewed))
                if changed.rowcount:
                    detail = {"key_id": self._keyring.current, "server": row.name}
                    await audit.append(connection, action="secrets.reseal", actor=actor, detail=detail)
                    resealed += 1
        return ResealedAddresses(resealed, failed)

    async def keys_in_use(self) -> frozenset[str]:
        """Return the ids of the keys that addresses are sealed under.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        found = set()
        async with self._control.connect() as connection:
            query = select(servers.c.sealed_addresses).where(servers.c.sealed_addresses.is_not(None))
            for sealed in await connection.scalars(query):
                try:
                    found.add(self._keyring.key_id(sealed))
                except SecretError:
                    continue  # it is damaged, and not sealed under any key
        return frozenset(found)


def _associated(name: str) -> bytes:
    return b"server-addresses:" + name.encode()


__all__ = ["ResealedAddresses", "SealedAddresses"]
