"""The text of an API key, and the digest that is stored of it.

A key is ``<prefix>_<key id>_<secret><checksum>``: the id is 16 base62 characters, public, and identifies the key; the
secret is 43 base62 characters that encode 256 random bits; the checksum is the CRC-32 of everything before it, in 6
base62 characters. So a mistyped key is refused without a look-up, and a secret scanner can tell a real key from a
look-alike offline, as with GitHub's tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..errors import InvalidCredentialError

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_LENGTH = 16
SECRET_LENGTH = 43  # 62**43 > 2**256
CHECKSUM_LENGTH = 6  # 62**6 > 2**32
MAX_KEY_LENGTH = 24 + 1 + ID_LENGTH + 1 + SECRET_LENGTH + CHECKSUM_LENGTH

PLAIN_VERSION = "0"  # a digest without a pepper

_SHAPE = re.compile(
    rf"([a-z][a-z0-9_]{{0,23}})_([0-9A-Za-z]{{{ID_LENGTH}}})_[0-9A-Za-z]{{{SECRET_LENGTH + CHECKSUM_LENGTH}}}"
)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A well-formed key: its text, prefix and public id. It may still be unknown, revoked or expired."""

    prefix: str
    key_id: str
    text: str = field(repr=False)

    def __str__(self) -> str:
        """Name the key by its id."""
        return f"API key {self.key_id}"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A new key. ``text`` is the whole key, to be shown once; ``digest`` is what is stored."""

    prefix: str
    key_id: str
    text: str = field(repr=False)
    digest: bytes = field(repr=False)
    digest_version: str = PLAIN_VERSION

    def __str__(self) -> str:
        """Name the key by its id; use ``text`` to show it."""
        return f"API key {self.key_id}"


class KeyDigester:
    """Makes and compares the stored digests of keys.

    With a pepper a digest is HMAC-SHA256 under it, so that a copy of the control database alone does not show whether a
    guess is right; without one (version "0") it is SHA-256, which is safe for 256 random bits. Both digest the whole
    text, so that a digest belongs to one key id and prefix and matches no other row.

    Args:
        peppers: Peppers by version, oldest first.
        current: The version of new digests; None: the last one.
    """

    def __init__(self, peppers: Mapping[str, bytes] | None = None, current: str | None = None) -> None:
        self._peppers = dict(peppers or {})
        versions = [PLAIN_VERSION, *self._peppers]
        self.current = versions[-1] if current is None else current
        self._older = frozenset(versions[: versions.index(self.current)])
        # an unknown id is compared with this, which no known key digests to
        self._dummy = secrets.token_bytes(32)

    def __repr__(self) -> str:
        """Name the versions only."""
        return f"KeyDigester({', '.join([PLAIN_VERSION, *self._peppers])})"

    def has_pepper(self, version: str) -> bool:
        """Whether digests of this version can be verified."""
        return version == PLAIN_VERSION or version in self._peppers

    def is_older(self, version: str) -> bool:
        """Whether this version is older than the current one. A digest of a newer version stays as it is."""
        return version in self._older

    def digest(self, text: str, version: str | None = None) -> bytes:
        """Digest a key under a pepper version (default: the current one); an unknown version digests like "0"."""
        pepper = self._peppers.get(self.current if version is None else version)
        data = text.encode("utf-8", "surrogatepass")
        if pepper is None:
            return hashlib.sha256(data).digest()
        return hmac.digest(pepper, data, "sha256")

    def matches(self, text: str, digest: bytes | None, version: str | None = None) -> bool:
        """Compare a key with a stored digest, in constant time.

        Args:
            text: The key.
            digest: The stored digest; None for an unknown id, which takes the same work and returns False.
            version: The version of the digest's pepper.
        """
        stored = self._dummy if digest is None or not self.has_pepper(version or PLAIN_VERSION) else digest
        return hmac.compare_digest(self.digest(text, version or self.current), stored)


PLAIN = KeyDigester()


def generate_key(prefix: str, digester: KeyDigester = PLAIN) -> NewKey:
    """Make a new random key.

    Args:
        prefix: Its prefix, see ``TenancyConfig.keys.prefix``.
        digester: Makes the digest to store; without peppers by default.
    """
    key_id = "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))
    secret = _base62(int.from_bytes(secrets.token_bytes(32)), SECRET_LENGTH)
    body = f"{prefix}_{key_id}_{secret}"
    text = body + _checksum(body)
    return NewKey(prefix, key_id, text, digester.digest(text), digester.current)


def parse_key(text: str, prefix: str | Collection[str]) -> ParsedKey:
    """Parse a key and check its checksum, without a look-up.

    Args:
        text: The key as it was presented.
        prefix: The accepted prefix, or several.

    Raises:
        InvalidCredentialError: it does not have the format or the prefix, or is mistyped.
    """
    match = _SHAPE.fullmatch(text) if len(text) <= MAX_KEY_LENGTH else None
    if match is None:
        raise InvalidCredentialError("malformed")
    found, key_id = match[1], match[2]
    if found not in ((prefix,) if isinstance(prefix, str) else prefix):
        raise InvalidCredentialError("prefix")
    # not in constant time: the checksum is not secret, since it can be computed from the rest
    if _checksum(text[:-CHECKSUM_LENGTH]) != text[-CHECKSUM_LENGTH:]:
        raise InvalidCredentialError("checksum", credential_id=key_id)
    return ParsedKey(found, key_id, text)


def scanner_pattern(prefix: str) -> str:
    """Return the regular expression that matches keys with this prefix, for secret scanners.

    Example:
        >>> scanner_pattern("acme_live")
        'acme_live_[0-9A-Za-z]{16}_[0-9A-Za-z]{49}'
    """
    return rf"{prefix}_[0-9A-Za-z]{{{ID_LENGTH}}}_[0-9A-Za-z]{{{SECRET_LENGTH + CHECKSUM_LENGTH}}}"


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode("ascii")), CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))
