"""The text of an invitation: its id, a secret and a signature. State without I/O.

``invite_`` and base64 (URL-safe, without padding) of ``version (1 byte) | id (16) | secret (32) | signature (32)``. The
control database has the secret's SHA-256 alone. The signature covers everything that the row says of the invitation: a
row that was edited (other roles, another tenant, a later end) no longer fits its text, and a row that was added fits
none.
"""

from __future__ import annotations

import base64
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final
from uuid import UUID

from ..secrets.signing import SigningKeys

PREFIX: Final = "invite_"

_VERSION = 1
_SECRET_BYTES = 32
_MAC_BYTES = 32
_BYTES = 1 + 16 + _SECRET_BYTES + _MAC_BYTES  # a multiple of 3: base64 has one form, without padding
_FORM = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{{_BYTES // 3 * 4}}}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class InvitationText:
    """A text that has been read; whether it is genuine, the row and the signature say."""

    id: UUID
    secret: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @property
    def digest(self) -> bytes:
        """What the control database has of the secret."""
        return sha256(self.secret).digest()

    def __str__(self) -> str:
        """The text."""
        raw = bytes([_VERSION]) + self.id.bytes + self.secret + self.signature
        return PREFIX + base64.urlsafe_b64encode(raw).decode()


@dataclass(frozen=True, slots=True)
class Signed:
    """What a signature covers besides the secret: what the row of the invitation says."""

    id: UUID
    tenant_id: UUID
    roles: Sequence[str]
    expires_at: datetime


def parse_invitation(text: str) -> InvitationText | None:
    """Read a text; None where it is malformed."""
    given: object = text  # it may be a field of a JSON body
    if not isinstance(given, str) or not _FORM.fullmatch(given):
        return None
    raw = base64.urlsafe_b64decode(given.removeprefix(PREFIX))
    if raw[0] != _VERSION:
        return None
    return InvitationText(UUID(bytes=raw[1:17]), raw[17 : 17 + _SECRET_BYTES], raw[17 + _SECRET_BYTES :])


class InvitationSigner:
    """Signs with the newest key and verifies with any.

    Args:
        installation: The id of the installation; an invitation of another one does not verify.
        keys: As in ``SigningKeys``.
        read: As in ``SigningKeys``.

    Attributes:
        keys (SigningKeys): What it signs with.
    """

    def __init__(
        self, installation: UUID, keys: Mapping[str, bytes], *, read: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        self._installation = installation
        self.keys = SigningKeys(keys, purpose="invitation", read=read)

    def issue(self, signed: Signed) -> InvitationText:
        """Return a new text for an invitation."""
        secret = secrets.token_bytes(_SECRET_BYTES)
        signature = self._mac(self.keys.newest, signed, sha256(secret).digest())
        return InvitationText(signed.id, secret, signature)

    def verify(self, text: InvitationText, signed: Signed) -> bool:
        """Whether the text was issued for exactly this invitation."""
        digest = text.digest
        return any(hmac.compare_digest(self._mac(key, signed, digest), text.signature) for key in self.keys)

    def _mac(self, key: bytes, signed: Signed, digest: bytes) -> bytes:
        microseconds = (signed.expires_at - _EPOCH) // timedelta(microseconds=1)
        message = b"".join(
            (
                b"tenancy-invitation-1",
                self._installation.bytes,
                signed.id.bytes,
                signed.tenant_id.bytes,
                digest,
                microseconds.to_bytes(8, "big", signed=True),
                # last, and PostgreSQL's text has no NUL
                "\x00".join(signed.roles).encode(),
            )
        )
        return hmac.digest(key, message, "sha256")
