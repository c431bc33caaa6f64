"""Callers with every kind of credential, for tests that hold for each: one application admits them all.

Tokens are signed with secrets that every process of a test run knows, so that none of them asks an identity provider;
``tests.support.issuer`` is a real one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import jwt
from itsdangerous import BadSignature, URLSafeSerializer
from starlette.requests import HTTPConnection
from starlette.types import Scope
from websockets.asyncio.client import ClientConnection, connect

from tenancy_orm import Tenancy
from tenancy_orm.asgi import (
    ApiKeyAuthenticator,
    HeaderResolver,
    JwtAuthenticator,
    PathPrefixResolver,
    SubdomainResolver,
    TenancyMiddleware,
)
from tenancy_orm.authentication.credential import Credential
from tenancy_orm.errors import InvalidCredentialError
from tenancy_orm.tenant import Tenant

KINDS = ("key", "token", "cookie", "member", "session")
"""An API key; a token with the tenant in a claim, as a header and as a cookie; a token without, so that the memberships
of its subject decide; and a signed cookie of the application's own, with the tenant and the scopes in it."""

EVERYONE = (*KINDS, "anonymous")
"""And a visitor of a public path."""

DOMAIN = "example.com"
SCOPES = ("notes:read",)
PUBLIC = "/p"
COOKIE = "__Host-token"
SESSION = "session"

_AUDIENCE = "https://api.example.com"
_CLAIMS, _MEMBERS = "https://claims.example.com/", "https://members.example.com/"
_SECRETS = {_CLAIMS: "c" * 32, _MEMBERS: "m" * 32}
_PREFIXES = {_CLAIMS: "claims|", _MEMBERS: "members|"}
_SESSIONS = URLSafeSerializer("s" * 32)


class Sessions:
    """The application's own login: a signed cookie."""

    async def authenticate(self, connection: HTTPConnection) -> Credential | None:
        """Read it."""
        signed = connection.cookies.get(SESSION)
        if signed is None:
            return None
        try:
            found = _SESSIONS.loads(signed)
        except BadSignature:
            raise InvalidCredentialError("signature", kind="session") from None
        return Credential(
            "session",
            found["subject"],
            tenants=found["tenants"],
            scopes=frozenset(found["scopes"]),
            id=found["id"],
            issued_at=datetime.fromtimestamp(found["at"], UTC),
            expires_at=datetime.fromtimestamp(found["until"], UTC),
        )


def authenticators() -> list[Any]:
    """One for each kind."""
    signed = {"audience": _AUDIENCE, "algorithms": ("HS256",), "leeway": 0.0}
    return [
        ApiKeyAuthenticator(),
        JwtAuthenticator(
            issuer=_CLAIMS,
            secret=_SECRETS[_CLAIMS],
            tenants_claim="org",
            scopes_claim="scope",
            cookie=COOKIE,
            subject_prefix=_PREFIXES[_CLAIMS],
            **signed,  # type: ignore[arg-type]
        ),
        JwtAuthenticator(
            issuer=_MEMBERS,
            secret=_SECRETS[_MEMBERS],
            subject_prefix=_PREFIXES[_MEMBERS],
            **signed,  # type: ignore[arg-type]
        ),
        Sessions(),
    ]


def options(**more: Any) -> dict[str, Any]:
    """The middleware's options that admit every kind."""
    resolvers = [SubdomainResolver(DOMAIN), PathPrefixResolver("/t/{tenant}"), HeaderResolver("X-Tenant")]
    return {"authenticators": authenticators(), "resolvers": resolvers, "public": [f"{PUBLIC}/*"], **more}


async def believed(guard: TenancyMiddleware, scope: Scope) -> Tenant | None:
    """The tenant of a request's credential, by the parts of the real middleware and with none of its checks.

    What a careless middleware would bind.
    """
    headers = guard.callers.read_headers(scope)
    directory = guard.tenancy.internals.directory
    if guard.callers.public.covers(scope):
        credential = await guard.callers.admit_visitor(scope, headers)
    else:
        key = guard.callers.read_key(scope, headers, directory)
        if key is not None and directory.is_key(key):
            credential = await directory.authenticate(key)
        else:
            try:
                credential = await guard.callers.admit(scope, headers, None, key, with_tenant=True)
            except InvalidCredentialError as error:
                if error.reason != "missing":
                    raise
                return None
    return replace(credential.tenant, admission=None)


@dataclass(frozen=True)
class Caller:
    """Someone with a credential for a tenant; ``headers`` send it."""

    kind: str
    slug: str
    subject: str
    id: str
    headers: tuple[tuple[str, str], ...]

    @classmethod
    def with_key(cls, key: str) -> Caller:
        """Whoever has this key."""
        return cls("key", "", "", "", (("X-API-Key", key),))

    def path(self, path: str) -> str:
        """Where it asks for ``path``: visitors are served below a path of their own."""
        return PUBLIC + path if self.kind == "anonymous" else path

    @asynccontextmanager
    async def websocket(self, port: int, path: str, *more: tuple[str, str]) -> AsyncIterator[ClientConnection]:
        """Open a websocket as it, with ``more`` headers."""
        headers = [*((name, value) for name, value in self.headers if name != "Host"), *more]
        host = dict(self.headers).get("Host", "127.0.0.1")
        uri = f"ws://{host}:{port}{self.path(path)}"
        async with connect(uri, host="127.0.0.1", port=port, additional_headers=headers, close_timeout=1) as opened:
            yield opened

    def forged(self) -> list[tuple[str, str]]:
        """Headers with another signature, or another secret."""
        name, value = self.headers[0]
        end = "A" if value[-8] != "A" else "B"
        return [(name, value[:-8] + end + value[-7:]), *self.headers[1:]]


class Callers:
    """Makes callers, and ends their credentials as an operator would."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy

    async def make(
        self,
        kind: str,
        *slugs: str,
        subject: str | None = None,
        scopes: Iterable[str] = SCOPES,
        expires: float = 600.0,
        member: bool = True,
        **more: Any,
    ) -> Caller:
        """Make one for some tenants, of which ``slug`` is the first.

        Args:
            kind: One of ``EVERYONE``.
            slugs: The tenants.
            subject: Who it is.
            scopes: What it may do; a member is an owner.
            expires: After how many seconds it expires.
            member: Whether a "member" is made one.
            more: Further claims of a token, or None in place of one; further content of a session.
        """
        slug = slugs[0]
        subject = subject or f"{kind}-{secrets.token_hex(4)}"
        credential_id = f"id-{secrets.token_hex(8)}"
        end = time.time() + expires
        if kind == "anonymous":
            return Caller(kind, slug, "", "", (("Host", f"{slug}.{DOMAIN}"),))
        if kind == "key":
            issued = await self.tenancy.keys.issue(
                slug, scopes=list(scopes), expires_at=datetime.fromtimestamp(end, UTC)
            )
            return Caller(kind, slug, issued.key_id, issued.key_id, (("X-API-Key", issued.text),))
        if kind == "session":
            content = {
                "subject": subject,
                "id": credential_id,
                "tenants": list(slugs),
                "scopes": list(scopes),
                "at": time.time() - 60,
                "until": end,
                **more,
            }
            header = ("Cookie", f"{SESSION}={_SESSIONS.dumps(content)}")
        else:
            issuer = _MEMBERS if kind == "member" else _CLAIMS
            claims = {
                "iss": issuer,
                "aud": _AUDIENCE,
                "sub": subject,
                "jti": credential_id,
                "iat": int(time.time()) - 60,
                "exp": end,
                **({} if kind == "member" else {"org": list(slugs), "scope": " ".join(scopes)}),
                **more,
            }
            claims = {name: value for name, value in claims.items() if value is not None}
            token = jwt.encode(claims, _SECRETS[issuer], "HS256")
            subject = _PREFIXES[issuer] + subject
            header = ("Cookie", f"{COOKIE}={token}") if kind == "cookie" else ("Authorization", f"Bearer {token}")
            if kind == "member" and member:
                for one in slugs:
                    await self.tenancy.members.add(one, subject, ["owner"])
        return Caller(kind, slug, subject, credential_id, (header,))

    async def revoke(self, caller: Caller) -> None:
        """Revoke the credential itself."""
        if caller.kind == "key":
            await self.tenancy.keys.revoke(caller.id)
        else:
            await self.tenancy.revocations.add(token_id=caller.id)

    async def revoke_subject(self, caller: Caller) -> None:
        """Revoke whatever its subject has now."""
        await self.tenancy.revocations.add(subject=caller.subject)

    async def remove(self, caller: Caller) -> None:
        """Remove the member."""
        await self.tenancy.members.remove(caller.slug, caller.subject)

    async def demote(self, caller: Caller) -> None:
        """Give the member a role without scopes."""
        await self.tenancy.members.add(caller.slug, caller.subject, ["member"])

    async def wait(self, caller: Caller) -> None:
        """Do nothing: it ends at its time."""
