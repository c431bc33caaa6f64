"""The authenticator of signed tokens (JWT) of an identity provider: in a header, or in a cookie."""

from __future__ import annotations

import inspect
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType
from typing import Any
from uuid import UUID

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ..authentication.cache import put_bounded
from ..authentication.credential import ALL_SCOPES, Credential, is_name
from ..authentication.issuer import IssuerKeys, KeySource
from ..authentication.jwks import SECRET_ALGORITHMS, VerifyingKey, check_algorithms, import_jwt, read_keys, read_secret
from ..authentication.tokens import (
    MAX_TOKEN_CHARS,
    TokenRules,
    TokenVerifier,
    VerifiedEntry,
    VerifiedToken,
    VerifiedTokens,
    is_compact,
    refused,
    unverified_issuer,
)
from ..errors import ConfigurationError, InvalidCredentialError, TenantNotFoundError
from .authenticators import Presented, TextAuthenticator
from .resolvers import Headers

Claims = Mapping[str, Any]
TenantsOf = Callable[[Claims], "Iterable[str | UUID] | Awaitable[Iterable[str | UUID] | None] | None"]
ScopesOf = Callable[[Claims], Iterable[str]]

_COOKIE_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_MAX_LEEWAY = 300.0
_FOREIGN = 1_000  # tokens of other issuers that are remembered as such


class _Read(Presented):
    """What ``read`` has found, with its digest, which ``peek`` would have to compute a second time."""

    digest: bytes


class JwtAuthenticator(TextAuthenticator):
    """Authenticates by a signed token (JWT) of an identity provider. Needs the extra ``jwt``.

    A token is refused unless it is signed by a key of the issuer, with an algorithm that is named here, and has the
    right ``iss`` and ``aud`` and an ``exp`` that is not past; ``nbf`` and ``iat`` count where it has them. A token of
    another issuer, an API key, or any other text is left to the next authenticator.

    The keys are fetched from the issuer when the first token comes, and kept. A token that was verified is not verified
    again until it ends, or until the issuer no longer publishes its key.

    ```python
    JwtAuthenticator(issuer="https://example.eu.auth0.com/", audience="https://api.example.com", tenants_claim="org_id")
    ```

    Args:
        issuer: The ``iss`` of its tokens, exactly as they have it: with the slash at the end where they have one.
        audience: The ``aud`` that a token must have: this application's own name at the issuer; or several.
        jwks_url: Where the issuer publishes its keys. None: read from its discovery document, at
            ``/.well-known/openid-configuration`` below the issuer.
        keys: Its public keys, in place of an address: a JWKS (a mapping), or keys or certificates in PEM.
        secret: The secret of HMAC algorithms, in place of public keys.
        algorithms: The algorithms that tokens may be signed with. What a token says never adds one.
        tenants_claim: The claim with the tenant, or the list of tenants, by slug or id; a token without it allows
            none. Or a function of the claims, which may be async, that returns them, or None; where it raises
            ``TenantNotFoundError``, the token allows none. None: the memberships of the subject decide.
        scopes_claim: The claim with the scopes: a text with spaces between them, as ``scope``, or a list, as
            ``permissions``; never ``*``. Or a function of the claims. None: no scopes where a claim gives the tenants;
            for memberships, no limit on what the roles give.
        subject_claim: The claim that says who it is. It must never be another person's: an address of e-mail may be.
        subject_prefix: Put before the subject, where several issuers serve one application.
        header: Whether tokens are read from ``Authorization: Bearer``.
        cookie: The cookie that tokens are read from, if any. Begin its name with ``__Host-``, so that no other host can
            set it. Its requests are checked for their origin (CSRF).
        leeway: Seconds that the issuer's clock may differ; at most 300.
        max_age: Seconds since ``iat`` for which a token is accepted. None: until its ``exp``.
        require: Claims that a token must have besides ``iss``, ``aud``, ``exp`` and the subject: ``jti``, ``nbf``.
        types: The ``typ`` that a token may have. One without it is accepted.
        cache_size: How many verified tokens are remembered, per process.
        keys_seconds: Seconds after which the keys are fetched again; less where the answer's ``Cache-Control`` says so.
        refresh_seconds: The least seconds between two fetches for tokens that name an unknown key.
        stale_seconds: Seconds for which known keys are used while the issuer does not answer.
        timeout: Seconds that a fetch of the keys may take.

    Raises:
        ConfigurationError: an argument is malformed, or two contradict each other.
        MissingExtraError: the extra is not installed.
    """

    def __init__(
        self,
        *,
        issuer: str,
        audience: str | Iterable[str],
        jwks_url: str | None = None,
        keys: Mapping[str, Any] | str | bytes | Iterable[str | bytes] | None = None,
        secret: str | bytes | None = None,
        algorithms: Iterable[str] = ("RS256",),
        tenants_claim: str | TenantsOf | None = None,
        scopes_claim: str | ScopesOf | None = None,
        subject_claim: str = "sub",
        subject_prefix: str = "",
        header: bool = True,
        cookie: str | None = None,
        leeway: float = 10.0,
        max_age: float | None = None,
        require: Iterable[str] = (),
        types: Iterable[str] = ("JWT", "at+jwt"),
        cache_size: int = 10_000,
        keys_seconds: float = 600.0,
        refresh_seconds: float = 60.0,
        stale_seconds: float = 86_400.0,
        timeout: float = 5.0,
    ) -> None:
        import_jwt()
        audiences = (audience,) if isinstance(audience, str) else tuple(audience)
        _check_texts(issuer=issuer, audience=min(audiences, default=""), subject_claim=subject_claim)
        _check_numbers(leeway=leeway, max_age=max_age, cache_size=cache_size)
        pinned = check_algorithms(algorithms)
        self.issuer = issuer
        self.audiences = audiences
        self._tenants_claim = tenants_claim
        self._scopes_claim = scopes_claim
        self._subject_claim = subject_claim
        self.subject_prefix = subject_prefix
        self._header = header
        self._cookie = _check_cookie(cookie, header=header)
        self.headers = (b"authorization",) if header else ()
        self._verifier = TokenVerifier(
            TokenRules(
                issuer=issuer,
                audiences=audiences,
                algorithms=pinned,
                leeway=leeway,
                max_age=max_age,
                required=tuple(require),
                types=frozenset(name.lower().removeprefix("application/") for name in types),
            )
        )
        given = {"jwks_url": jwks_url, "keys": keys, "secret": secret}
        _check_source({name for name, value in given.items() if value is not None}, pinned)
        self._keys: KeySource
        if secret is not None:
            self._keys = KeySource(read_secret(secret, pinned))
        elif keys is not None:
            self._keys = KeySource(read_keys(keys, pinned))
        else:
            self._keys = IssuerKeys(
                issuer,
                jwks_url,
                pinned,
                keys_seconds=keys_seconds,
                refresh_seconds=refresh_seconds,
                stale_seconds=stale_seconds,
                timeout=timeout,
            )
        self._verified = VerifiedTokens(cache_size)
        self._entries = self._verified.entries
        self._foreign: OrderedDict[bytes, None] = OrderedDict()

    def __repr__(self) -> str:
        """Name the issuer and the audience."""
        return f"JwtAuthenticator(issuer={self.issuer!r}, audience={self.audiences!r})"

    def on_withdrawal(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the issuer's keys have changed."""
        self._keys.on_change.append(callback)

    # --- the request ------------------------------------------------------------------------------------------------

    def read(self, scope: Scope, headers: Headers) -> Presented | None:
        """Return the token of this issuer that a request carries.

        Raises:
            InvalidCredentialError: the header and the cookie, or two cookies of the name, have different ones.
        """
        found = None
        if self._header and (value := headers.get(b"authorization")) is not None and value[:7].lower() == b"bearer ":
            found = self._own(value[7:].strip(b" "), sent_by_browser=False)
        if self._cookie is not None and (value := self._read_cookie(scope)) is not None:
            by_cookie = self._own(value, sent_by_browser=True)
            if found is None:
                return by_cookie
            if by_cookie is not None and by_cookie.text != found.text:
                raise InvalidCredentialError("ambiguous", kind="token")
        return found

    def peek(self, presented: Presented) -> Credential | None:
        """Return the credential of a token that was verified before: the same object each time."""
        keys = self._keys
        now = time.monotonic()
        return None if now >= keys.due else self._known(presented, now)

    async def verify(self, presented: Presented) -> Credential:
        """Verify a token.

        Raises:
            InvalidCredentialError: it is not valid.
            CredentialsUnavailableError: the issuer's keys are not known, and cannot be fetched.
        """
        text = presented.text
        header = self._verifier.check_form(text)
        keys = await self._keys.current()
        if (known := self._known(presented, time.monotonic())) is not None:
            return known  # only the keys were due
        token = self._verifier.verify(text, header, keys)
        if token is None and (refreshed := await self._keys.refreshed()) is not keys:
            keys = refreshed
            token = self._verifier.verify(text, header, keys)
        if token is None:
            raise refused("signature" if keys.named(header.get("kid")) else "unknown key")
        try:
            tenants = await self._tenants(token.claims)
        except TenantNotFoundError:
            # not remembered: it may be created before the token ends
            return replace(self._credential(token, ()), sent_by_browser=presented.sent_by_browser)
        by_program = self._credential(token, tenants)
        digest = self._digest(presented)
        entry = self._entries.get(digest)
        if entry is None or not entry.is_valid(keys, time.monotonic()):  # another request may have been quicker
            entry = VerifiedEntry(token, keys, by_program, replace(by_program, sent_by_browser=True))
            self._verified.put(digest, entry)
        return entry.by_browser if presented.sent_by_browser else entry.by_program

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        """Return the credential of a request, without the middleware, which reads the headers itself.

        Raises:
            InvalidCredentialError: as ``read`` and ``verify``; or the header is there twice.
            CredentialsUnavailableError: as ``verify``.
        """
        if self._header and sum(name == b"authorization" for name, _ in connection.scope["headers"]) > 1:
            raise InvalidCredentialError("ambiguous", kind="token")
        return await super().authenticate(connection)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _own(self, raw: bytes, *, sent_by_browser: bool) -> _Read | None:
        digest = self._verified.digest(raw)
        if digest not in self._entries and (digest in self._foreign or not self._is_own(raw, digest)):
            return None
        found = _Read(raw.decode("ascii"), sent_by_browser)
        found.digest = digest
        return found

    def _is_own(self, raw: bytes, digest: bytes) -> bool:
        if not is_compact(raw):
            return False
        if len(raw) > MAX_TOKEN_CHARS:
            return True  # nothing is read of it, and it is refused
        issuer = unverified_issuer(raw)
        # with a slash too many or too few it is meant for this one: the audit log then says what is wrong
        if issuer is not None and issuer.rstrip("/") == self.issuer.rstrip("/"):
            return True
        # remembered, since reading it takes longer than all else here: that of another authenticator comes often
        put_bounded(self._foreign, digest, None, _FOREIGN)
        return False

    def _read_cookie(self, scope: Scope) -> bytes | None:
        """The cookie's value. HTTP/2 may send cookies in several headers, so the scope is read."""
        wanted = self._cookie
        assert wanted is not None  # noqa: S101 - read() asks
        found: bytes | None = None
        for name, header in scope["headers"]:
            if name != b"cookie" or wanted not in header:
                continue
            for part in header.split(b";"):
                part = part.strip(b" \t")
                if not part.startswith(wanted):
                    continue
                value = part[len(wanted) :].strip(b'" \t')
                if found is not None and value != found:
                    # another host of the domain may have set one of them
                    raise InvalidCredentialError("ambiguous", kind="token")
                found = value
        return found

    def _digest(self, presented: Presented) -> bytes:
        if isinstance(presented, _Read):
            return presented.digest
        return self._verified.digest(presented.text.encode("utf-8", "replace"))

    def _known(self, presented: Presented, now: float) -> Credential | None:
        entry = self._entries.get(self._digest(presented))
        if entry is None or not entry.is_valid(self._keys.keys, now):
            return None
        entry.used = now
        return entry.by_browser if presented[1] else entry.by_program

    def _is_published(self, key: VerifyingKey) -> bool:
        keys = self._keys.keys
        return keys is not None and key in keys

    # --- the credential ---------------------------------------------------------------------------------------------

    def _credential(self, token: VerifiedToken, tenants: tuple[str | UUID, ...] | None) -> Credential:
        claims = MappingProxyType(dict(token.claims))
        named = claims.get(self._subject_claim)
        subject = f"{self.subject_prefix}{named}"
        if not is_name(named) or not is_name(subject):
            raise refused("subject", claims)
        if claims.get("jti") is not None and token.id is None:
            raise refused("malformed", claims)
        optional: dict[str, Any] = {}
        if (scopes := self._scopes(claims)) is not None:
            optional["scopes"] = scopes
        issued_at = claims.get("iat")
        return Credential(
            kind="token",
            subject=subject,
            tenants=tenants,
            id=token.id or "",
            expires_at=datetime.fromtimestamp(token.ends_at, UTC),
            issued_at=None if issued_at is None else datetime.fromtimestamp(issued_at, UTC),
            sent_by_browser=False,
            claims=claims,
            holds=partial(self._is_published, token.key),
            **optional,
        )

    async def _tenants(self, claims: Claims) -> tuple[str | UUID, ...] | None:
        if self._tenants_claim is None:
            return None
        if isinstance(self._tenants_claim, str):
            found = claims.get(self._tenants_claim)
            found = () if found is None else (found,) if isinstance(found, str) else found
            if not isinstance(found, list | tuple) or not all(is_name(tenant) for tenant in found):
                raise refused("tenants", claims)
            return tuple(found)
        result = self._tenants_claim(claims)
        chosen = await result if inspect.isawaitable(result) else result
        # one name that is not in a list is refused by Credential
        return None if chosen is None else chosen if isinstance(chosen, str) else tuple(chosen)  # type: ignore[return-value]

    def _scopes(self, claims: Claims) -> frozenset[str] | None:
        if self._scopes_claim is None:
            return None
        if not isinstance(self._scopes_claim, str):
            return frozenset(self._scopes_claim(claims))
        found = claims.get(self._scopes_claim)
        names = [] if found is None else found.split() if isinstance(found, str) else found
        if not isinstance(names, list) or not all(is_name(name) for name in names):
            raise refused("scopes", claims)
        # a provider's wildcard is not this application's
        return frozenset(names) - {ALL_SCOPES}


def _check_texts(**texts: object) -> None:
    for name, value in texts.items():
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"{name} must be given: tokens of other issuers or for others would be accepted")


def _check_source(given: set[str], pinned: frozenset[str]) -> None:
    if len(given) > 1:
        raise ConfigurationError(f"give one of {' and '.join(sorted(given))}")
    if bool(pinned & SECRET_ALGORITHMS) != ("secret" in given):
        raise ConfigurationError(
            "HMAC algorithms (HS256) need secret=..., and secret=... needs algorithms=('HS256',); "
            "a public key is never used as a secret"
        )


def _check_numbers(*, leeway: float, max_age: float | None, cache_size: int) -> None:
    if not 0 <= leeway <= _MAX_LEEWAY:
        raise ConfigurationError(f"leeway must be between 0 and {_MAX_LEEWAY:.0f} seconds")
    if max_age is not None and max_age <= 0:
        raise ConfigurationError("max_age must be positive")
    if cache_size < 1:
        raise ConfigurationError("cache_size must be at least 1")


def _check_cookie(cookie: str | None, *, header: bool) -> bytes | None:
    """Return what the cookie's pair begins with."""
    if cookie is None:
        if not header:
            raise ConfigurationError("a JwtAuthenticator reads a header, a cookie, or both")
        return None
    if not _COOKIE_NAME.fullmatch(cookie):
        raise ConfigurationError(f"cookie {cookie!r} is not the name of a cookie")
    return f"{cookie}=".encode("ascii")
