"""Signatures of what leaves the installation and comes back: an invitation, or a message of a task queue."""

from __future__ import annotations

import base64
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from uuid import UUID

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..context import refuse_other_tenant
from ..errors import TenancyError

logger = logging.getLogger("tenancy_orm.secrets")


class SigningKeys:
    """The keys that sign for one purpose, derived from the installation's.

    Args:
        keys: The installation's 32-byte encryption keys by id, oldest first. Signing keys are derived from them by
            HKDF-SHA256, so that no key is used by two algorithms.
        purpose: What is signed; a signature for another purpose does not verify.
        read: Reads the keys that other processes have made, and calls ``add``; None where they make none.
    """

    def __init__(
        self, keys: Mapping[str, bytes], *, purpose: str, read: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        self._purpose = purpose
        self._read = read
        self._keys: dict[str, bytes] = {}
        self._current = ""
        self._add(keys)

    def __repr__(self) -> str:
        """Name the purpose and the key ids only."""
        return f"SigningKeys({self._purpose!r}, {', '.join(self._keys)})"

    def __iter__(self) -> Iterator[bytes]:
        """All keys: any of them may have made a signature."""
        return iter(self._keys.values())

    @property
    def newest(self) -> bytes:
        """The key to sign with."""
        return self._keys[self._current]

    @property
    def ids(self) -> frozenset[str]:
        """The ids of all keys."""
        return frozenset(self._keys)

    async def add(self, keys: Mapping[str, bytes]) -> None:
        """Also verify with these keys from now on, and sign with the last of them."""
        self._add(keys)

    async def has_any_besides(self, tried: frozenset[str]) -> bool:
        """Whether there are keys besides those that were tried; reads those that other processes have made."""
        # another caller may have read them since
        if self._read is not None and self.ids <= tried:
            try:
                await self._read()
            except TenancyError as exc:
                logger.warning("the keys that sign for the purpose %r cannot be read (%s)", self._purpose, exc)
        return not self.ids <= tried

    def _add(self, keys: Mapping[str, bytes]) -> None:
        info = f"tenancy_orm {self._purpose}".encode()
        for key_id, key in keys.items():
            self._keys[key_id] = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(key)
        self._current = list(keys)[-1]


class TenantSigner:
    """Signs that a text speaks for a tenant, with the newest key, and verifies with any.

    Args:
        installation: The id of the installation; what another one has signed does not verify.
        keys: As in ``SigningKeys``; so are the others.
        purpose: What is signed.
        read: Reads the keys that other processes have made.
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
        self._keys = SigningKeys(keys, purpose=purpose, read=read)

    def __repr__(self) -> str:
        """Name the key ids only."""
        return f"TenantSigner({self._purpose!r}, {', '.join(sorted(self._keys.ids))})"

    async def add_keys(self, keys: Mapping[str, bytes]) -> None:
        """Also verify with these keys from now on, and sign with the last of them."""
        await self._keys.add(keys)

    def sign(self, tenant_id: UUID, parts: Sequence[str]) -> str:
        """Return a signature of ``parts`` for a tenant, 43 characters of URL-safe base64.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        return self._mac(self._keys.newest, tenant_id, parts)

    async def verify(self, tenant_id: UUID, parts: Sequence[str], signature: str) -> bool:
        """Whether ``signature`` is one of exactly these ``parts`` for this tenant.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        tried = self._keys.ids
        if self._is_signed(tenant_id, parts, signature):
            return True
        return await self._keys.has_any_besides(tried) and self._is_signed(tenant_id, parts, signature)

    def _is_signed(self, tenant_id: UUID, parts: Sequence[str], signature: str) -> bool:
        given = signature.encode()
        return any(hmac.compare_digest(self._mac(key, tenant_id, parts).encode(), given) for key in self._keys)

    def _mac(self, key: bytes, tenant_id: UUID, parts: Sequence[str]) -> str:
        message = [self._installation.bytes, tenant_id.bytes]
        for part in parts:
            encoded = part.encode("utf-8", "surrogatepass")
            # with its length, so that no two lists of parts give one message
            message += [len(encoded).to_bytes(8, "big"), encoded]
        return base64.urlsafe_b64encode(hmac.digest(key, b"".join(message), "sha256")).decode().rstrip("=")


__all__ = ["SigningKeys", "TenantSigner"]
