"""Verifying the signed tokens (JWT) of an identity provider. State without I/O; extra ``jwt``.

PyJWT checks the signature and the times, the issuer and the audience. Here is what it leaves to its caller: the
algorithms are those of the configuration, the keys suit them, and what two readers could read apart is refused.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import InvalidCredentialError
from .cache import SecondChance
from .credential import Credential, is_name
from .jwks import KeySet, VerifyingKey, import_jwt, load_json

MAX_TOKEN_CHARS: Final = 16_384

_COMPACT = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_LAST_SECOND: Final = 253_402_300_799 - 86_400  # of the year 9999, less what a leeway may add

# headers that change what the rest means: a reader that does not know them must refuse the token
_REFUSED_HEADERS: Final = ("crit", "b64", "enc", "zip")


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must say. Times in seconds.

    Args:
        issuer: Its ``iss``, exactly.
        audiences: One of these is its ``aud``, or one of them.
        algorithms: Those that it may be signed with.
        leeway: How far the issuer's clock may be from this one.
        max_age: How long ago it may have been issued; None: as long as its ``exp`` says.
        required: Claims that it must have besides ``iss``, ``aud`` and ``exp``.
        types: Its ``typ``, if it has one; in lower case.
    """

    issuer: str
    audiences: tuple[str, ...]
    algorithms: frozenset[str]
    leeway: float
    max_age: float | None
    required: tuple[str, ...]
    types: frozenset[str]


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """What a token says, and the key that signed it; ``ends_at`` is when it ends, as a Unix time with the leeway."""

    claims: Mapping[str, Any]
    key: VerifyingKey
    ends_at: float

    @property
    def id(self) -> str | None:
        """Its ``jti``."""
        return _text_or_none(self.claims.get("jti"))


class TokenVerifier:
    """Verifies tokens by ``rules``.

    Raises:
        MissingExtraError: PyJWT is not installed.
    """

    def __init__(self, rules: TokenRules) -> None:
        self.rules = rules
        self._jwt = import_jwt()
        # an object of its own: another library's registrations in the global one do not count
        self._reader = self._jwt.PyJWT()
        self._required = ["iss", "aud", "exp", *rules.required, *(["iat"] if rules.max_age is not None else [])]

    def check_form(self, text: str) -> Mapping[str, Any]:
        """Return the header of a token that may be valid, before any key is needed.

        Raises:
            InvalidCredentialError: it is malformed, or of an algorithm or a type that is not accepted.
        """
        header, claims = read_parts(text)
        algorithm, kind = header.get("alg"), header.get("typ")
        if not isinstance(algorithm, str) or algorithm not in self.rules.algorithms:
            raise refused("algorithm")
        if any(name in header for name in _REFUSED_HEADERS):
            raise refused("header")
        if not isinstance(header.get("kid", ""), str) or str(header.get("cty")).upper().endswith("JWT"):
            raise refused("header")
        if kind is not None and str(kind).lower().removeprefix("application/") not in self.rules.types:
            raise refused("type")
        for name in ("exp", "nbf", "iat"):
            if name in claims and not _is_time(claims[name]):
                raise refused("malformed")
        return header

    def verify(self, text: str, header: Mapping[str, Any], keys: KeySet) -> VerifiedToken | None:
        """Verify a token of which ``check_form`` has returned the ``header``.

        Returns None where none of the keys has signed it, and one that the issuer has just begun to use may have.

        Raises:
            InvalidCredentialError: it is not valid. Only where its signature is, the reason is "expired" or
                "not yet valid", and the error has its id.
        """
        kid, algorithm = header.get("kid"), header["alg"]
        named = keys.named(kid)
        for key in named:
            # the key's own algorithms: those of the configuration that suit its type
            if algorithm in key.algorithms and (claims := self._signed_by(text, key, algorithm)) is not None:
                return VerifiedToken(claims, key, self._end(claims))
        if kid is None or not any(key.kid == kid for key in named):
            return None
        raise refused("signature" if any(algorithm in key.algorithms for key in named) else "algorithm")

    def _signed_by(self, text: str, key: VerifyingKey, algorithm: str) -> Mapping[str, Any] | None:
        """The claims, or None where it is not signed by this key."""
        jwt = self._jwt
        rules = self.rules
        try:
            claims: dict[str, Any] = self._reader.decode(
                text,
                key=key.material,
                algorithms=[algorithm],
                audience=list(rules.audiences),
                issuer=rules.issuer,
                leeway=rules.leeway,
                options={"require": self._required},
            )
        except jwt.InvalidSignatureError:
            return None
        except (jwt.PyJWTError, ValueError, TypeError) as exc:
            # its signature is right where a claim is what is wrong: claims are checked last
            raise self._reason(exc, text) from None
        if claims.get("cnf") is not None:
            # RFC 7800: only the holder of a further key may use it, which nobody has proved
            raise refused("bound to a key", claims)
        if rules.max_age is not None and time.time() - claims["iat"] > rules.max_age + rules.leeway:
            raise refused("expired", claims)
        return claims

    def _reason(self, error: Exception, text: str) -> InvalidCredentialError:
        jwt = self._jwt
        for kind, reason in (
            (jwt.ExpiredSignatureError, "expired"),
            (jwt.ImmatureSignatureError, "not yet valid"),
            (jwt.InvalidIssuerError, "issuer"),
            (jwt.InvalidAudienceError, "audience"),
            (jwt.MissingRequiredClaimError, "missing claim"),
        ):
            if isinstance(error, kind):
                return refused(reason, read_parts(text)[1])
        return refused("malformed")

    def _end(self, claims: Mapping[str, Any]) -> float:
        end = float(claims["exp"])
        if self.rules.max_age is not None:
            end = min(end, claims["iat"] + self.rules.max_age)
        return end + self.rules.leeway


def read_parts(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the claims of a token, unverified.

    Raises:
        InvalidCredentialError: it is malformed.
    """
    raw = text.encode("utf-8", "replace")
    if len(text) > MAX_TOKEN_CHARS or not is_compact(raw):
        raise refused("malformed")
    try:
        header, claims = (load_json(_decode(part)) for part in raw.split(b".")[:2])
    except ValueError:
        raise refused("malformed") from None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise refused("malformed")
    return header, claims


def is_compact(raw: bytes) -> bool:
    """Whether these are three parts in base64url, as a signed token has."""
    return _COMPACT.fullmatch(raw) is not None


def unverified_issuer(raw: bytes) -> str | None:
    """Return the ``iss`` of what ``is_compact``, to choose who is to verify it; None where it has none."""
    try:
        claims = load_json(_decode(raw.split(b".")[1]))
    except ValueError:
        return None
    issuer = claims.get("iss") if isinstance(claims, dict) else None
    return issuer if isinstance(issuer, str) else None


def refused(reason: str, verified: Mapping[str, Any] | None = None) -> InvalidCredentialError:
    """The refusal of a token; with the ``verified`` claims, where its signature is right, it has the token's id."""
    return InvalidCredentialError(
        reason, kind="token", credential_id=None if verified is None else _text_or_none(verified.get("jti"))
    )


def _text_or_none(value: object) -> str | None:
    return value if is_name(value) else None


def _is_time(value: object) -> bool:
    # not a bool, which is an int; not a text, which PyJWT would convert
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 <= value <= _LAST_SECOND
    )


def _decode(part: bytes) -> bytes:
    # binascii.Error is a ValueError; is_compact has seen the characters, of which it would skip strange ones
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


# --- verified tokens ------------------------------------------------------------------------------------------------


class VerifiedEntry:
    """A token that was verified: its credential, as sent in a header and as sent in a cookie."""

    __slots__ = ("_ends", "_ends_at", "by_browser", "by_program", "key", "keys", "placed_at", "used")

    def __init__(self, token: VerifiedToken, keys: KeySet, by_program: Credential, by_browser: Credential) -> None:
        self.key = token.key
        self.keys = keys
        self.by_program = by_program
        self.by_browser = by_browser
        # by both clocks: that of the day may be set back, and the other stands still while the machine sleeps
        self.used = self.placed_at = time.monotonic()
        self._ends = self.used + (token.ends_at - time.time())
        self._ends_at = token.ends_at

    def is_valid(self, keys: KeySet | None, now: float) -> bool:
        """Whether it has not ended, and its key is still one of the ``keys``."""
        if keys is not self.keys:
            if keys is None or self.key not in keys:
                return False
            self.keys = keys
        return now < self._ends and time.time() < self._ends_at


class VerifiedTokens:
    """The tokens that were verified, by a hash of their text with a secret salt: the texts are not kept.

    Args:
        capacity: How many.
    """

    def __init__(self, capacity: int) -> None:
        self._salt = secrets.token_bytes(32)
        self._cache: SecondChance[bytes, VerifiedEntry] = SecondChance(capacity, lambda *_: None)
        self.entries = self._cache.entries

    def __len__(self) -> int:
        """How many there are."""
        return len(self._cache)

    def digest(self, raw: bytes) -> bytes:
        """Return what a token is found by."""
        return hashlib.blake2b(raw, digest_size=16, key=self._salt).digest()

    def put(self, digest: bytes, entry: VerifiedEntry) -> None:
        """Add one."""
        self._cache.put(digest, entry)
