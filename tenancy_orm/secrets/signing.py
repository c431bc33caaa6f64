"""Signatures of what leaves the installation and comes back, a message of a task queue for example."""

from __future__ import annotations

import base64
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from uuid import UUID

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..context import refuse_other_tenant
from ..errors import TenancyError

logger = logging.getLogger("tenancy_orm.secrets")


class TenantSigner:
    """Signs that a text speaks for a tenant, with the newest key, and verifies with any.

    Args:
        installation: The id of the installation; what another one has signed does not verify.
        keys: The installation's 32-byte encryption keys by id, oldest first. Signing keys are derived from them by
            HKDF-SHA256, so that no key is used by two algorithms.
        purpose: What is signed; a signature for another purpose does not verify.
        read: Reads the keys that other processes have made, and calls ``add_keys``; None where they make none.
    """

    def __init__(
        self,
        installation: UUID,
        keys: Mapping[str, bytes],
        *,
        purpose: str,
        read: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._installation = installation
        self._purpose = purpose
        self._read = read
        self._keys: dict[str, bytes] = {}
        self._current = ""
        self._add(keys)

    def __repr__(self) -> str:
        """Name the key ids only."""
        return f"TenantSigner({self._purpose!r}, {', '.join(self._keys)})"

    async def add_keys(self, keys: Mapping[str, bytes]) -> None:
        """Also verify with these keys from now on, and sign with the last of them."""
        self._add(keys)

    def sign(self, tenant_id: UUID, parts: Sequence[str]) -> str:
        """Return a signature of ``parts`` for a tenant, 43 characters of URL-safe base64.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        return self._mac(self._keys[self._current], tenant_id, parts)

    async def verify(self, tenant_id: UUID, parts: Sequence[str], signature: str) -> bool:
        """Whether ``signature`` is one of exactly these ``parts`` for this tenant.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        if self._is_signed(tenant_id, parts, signature):
            return True
        if self._read is None:
            return False
        known = len(self._keys)
        try:
            await self._read()
        except TenancyError as exc:
            logger.warning("the keys that sign for tenants cannot be read (%s)", exc)
        return len(self._keys) != known and self._is_signed(tenant_id, parts, signature)

    def _is_signed(self, tenant_id: UUID, parts: Sequence[str], signature: str) -> bool:
        given = signature.encode()
        return any(hmac.compare_digest(self._mac(key, tenant_id, parts).encode(), given) for key in self._keys.values())

    def _add(self, keys: Mapping[str, bytes]) -> None:
        info = f"tenancy_orm {self._purpose}".encode()
        for key_id, key in keys.items():
            self._keys[key_id] = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(key)
        self._current = list(keys)[-1]

    def _mac(self, key: bytes, tenant_id: UUID, parts: Sequence[str]) -> str:
        message = [self._installation.bytes, tenant_id.bytes]
        for part in parts:
            encoded = part.encode("utf-8", "surrogatepass")
            # with its length, so that no two lists of parts give one message
            message += [len(encoded).to_bytes(8, "big"), encoded]
        return base64.urlsafe_b64encode(hmac.digest(key, b"".join(message), "sha256")).decode().rstrip("=")


__all__ = ["TenantSigner"]
