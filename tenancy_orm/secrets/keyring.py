"""Sealed secrets: AES-256-GCM with the tenant's id as associated data.

A sealed value is ``version (1 byte) | length of key id (1) | key id | nonce (12) | ciphertext and tag``. Associated
data binds it to its tenant: if the values of two rows are swapped in the registry, neither can be opened.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import ConfigurationError, SecretError

_VERSION = 1
_NONCE_BYTES = 12
_TAG_BYTES = 16


def new_password() -> str:
    """Return a random password of 256 bits, in URL-safe characters."""
    return secrets.token_urlsafe(32)


class Keyring:
    """Seals with the newest key and opens with any.

    Args:
        keys: 32-byte keys by id, oldest first.

    Raises:
        ConfigurationError: there is no key.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        if not keys:
            raise ConfigurationError(
                "encryption_keys is empty; make one with: tenancy secret, and set TENANCY_ENCRYPTION_KEYS to what it "
                "prints"
            )
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self.current = list(keys)[-1]

    def __repr__(self) -> str:
        """Name the key ids only."""
        return f"Keyring({', '.join(self._ciphers)})"

    def add_keys(self, keys: Mapping[str, bytes]) -> None:
        """Also open with these keys from now on, and seal with the last of them."""
        self._ciphers.update((key_id, AESGCM(key)) for key_id, key in keys.items())
        self.current = list(keys)[-1]

    def has_key_of(self, sealed: bytes) -> bool:
        """Whether this keyring has the key that sealed this value."""
        return self.key_id(sealed) in self._ciphers

    def seal(self, plaintext: bytes, *, associated: bytes) -> bytes:
        """Encrypt ``plaintext`` so that it can only be opened with the same ``associated`` data."""
        nonce = os.urandom(_NONCE_BYTES)
        key_id = self.current.encode()
        header = bytes([_VERSION, len(key_id)]) + key_id
        cipher = self._ciphers[self.current]
        return header + nonce + cipher.encrypt(nonce, plaintext, header + associated)

    def open(self, sealed: bytes, *, associated: bytes) -> bytes:
        """Decrypt what ``seal`` made.

        Raises:
            SecretError: the key is not configured, the value is damaged, or it belongs to something else.
        """
        key_id = self.key_id(sealed)
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise SecretError(f"the secret was sealed with key {key_id!r}, which is not configured")
        start = 2 + len(key_id.encode())
        header, nonce, body = sealed[:start], sealed[start : start + _NONCE_BYTES], sealed[start + _NONCE_BYTES :]
        try:
            return cipher.decrypt(nonce, body, header + associated)
        except InvalidTag:
            raise SecretError(
                f"the secret cannot be opened with key {key_id!r}: it was sealed with another key of that id, is "
                "damaged, or belongs to another tenant"
            ) from None

    def key_id(self, sealed: bytes) -> str:
        """The id of the key that sealed this value.

        Raises:
            SecretError: the value is not a sealed secret.
        """
        if len(sealed) < 2 or sealed[0] != _VERSION or len(sealed) < 2 + sealed[1] + _NONCE_BYTES + _TAG_BYTES:
            raise SecretError("the stored secret is not in a known format")
        try:
            return sealed[2 : 2 + sealed[1]].decode()
        except UnicodeDecodeError:
            raise SecretError("the stored secret is not in a known format") from None

    def seal_password(self, tenant_id: UUID, password: str) -> bytes:
        """Seal the password of a tenant's role."""
        return self.seal(password.encode(), associated=b"tenant-password:" + tenant_id.bytes)

    def open_password(self, tenant_id: UUID, sealed: bytes) -> str:
        """Open the password of a tenant's role.

        Raises:
            SecretError: it cannot be opened, see ``open``; the message has the remedy.
        """
        try:
            return self.open(sealed, associated=b"tenant-password:" + tenant_id.bytes).decode()
        except SecretError as exc:
            raise SecretError(
                f"{exc}; configure the right key, or replace the password: tenancy secrets rotate-passwords"
            ) from None
