"""Credentials: who is calling, for which tenants, and with which scopes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Literal, TypeGuard
from uuid import UUID

from ..audit.actor import Actor
from ..errors import ConfigurationError, MissingScopeError, NoTenantError
from ..keys.networks import Network
from ..tenant import Tenant

CredentialKind = Literal["key", "token", "session", "anonymous"]

CREDENTIAL_KINDS: Final[tuple[CredentialKind, ...]] = ("key", "token", "session", "anonymous")

MAX_NAME_CHARS: Final = 255  # of a subject, an id, a tenant
ALL_SCOPES: Final = "*"
"""The scope that includes every other one."""

_ALL: Final = frozenset({ALL_SCOPES})
_DEFAULT_SCOPES: Final = frozenset({"*", "default"})  # recognised by its identity, never by its value
_NO_CLAIMS: Final[Mapping[str, Any]] = MappingProxyType({})


def _no_claims() -> Mapping[str, Any]:
    return _NO_CLAIMS


def is_name(value: object) -> TypeGuard[str]:
    """Whether this is a text that may be a subject, an id or a tenant: neither empty, nor long, nor unprintable."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS and value.isprintable()


@dataclass(frozen=True, slots=True)
class Membership:
    """A tenant that a credential may act for, and the roles that its subject has there."""

    tenant: Tenant
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Credential:
    """Who is calling, for which tenants, and with which scopes.

    An ``Authenticator`` returns one for a request; the middleware chooses the tenant, and puts the credential with its
    ``tenant`` into ``scope["tenancy"]``.

    Args:
        kind: "key" (an API key), "token" (a signed token of an identity provider), "session" (the application's own
            login) or "anonymous" (nobody yet).
        subject: Who it is: the id of the key or of the person. It must be the same for one person at each login, and
            never another person's: memberships are stored under it. 1 to 255 printable characters.
        tenants: The slugs or ids of the tenants it may act for. None: those that ``subject`` is a member of. An id
            always means the same tenant; a slug means whoever has it, after a former owner's ceased to redirect.
        scopes: What it may do. For tenants that it names itself the default is nothing. For memberships it is a limit
            on what the subject's roles give, and the default is no limit.
        id: The public id of this one credential: of the key, the token (``jti``) or the session; 1 to 255 printable
            characters. Empty where it has none: it can be revoked by its subject alone.
        expires_at: When it ends, an aware datetime; what it opened ends then.
        issued_at: When the person logged in, an aware datetime. ``tenancy.revocations.add(subject=...)`` refuses what
            was issued before; without a time, until the revocation is removed.
        sent_by_browser: Whether the browser sends it by itself, as it does cookies. Such a request is refused where
            a page of another origin makes it (CSRF). None: true for sessions, false for the others; for a token of an
            authenticator of the application's own, true where the request has cookies and no ``Authorization``.
        claims: What else the token says, verified; not in the repr.
        holds: Whether it still holds, where its authenticator can tell: a token does until its key is withdrawn. Asked
            when what it has opened is verified; see ``TextAuthenticator.on_withdrawal``.
    """

    kind: CredentialKind
    subject: str
    tenants: tuple[str | UUID, ...] | None = None
    scopes: frozenset[str] = _DEFAULT_SCOPES
    id: str = ""
    expires_at: datetime | None = None
    issued_at: datetime | None = None
    sent_by_browser: bool | None = None
    claims: Mapping[str, Any] = field(default_factory=_no_claims, repr=False, compare=False, hash=False)
    holds: Callable[[], bool] | None = field(default=None, repr=False, compare=False, hash=False)
    roles: frozenset[str] = frozenset()
    """The roles of its subject in ``tenant``; set by the middleware."""
    memberships: tuple[Membership, ...] = ()
    """Every tenant that it may act for; set by the middleware."""
    name: str = ""
    """What people call the key."""
    prefix: str = ""
    """The key's prefix."""
    networks: tuple[Network, ...] = ()
    """Where the key may be used from; anywhere where empty."""
    bound: Tenant | None = None
    """As ``tenant``, but None where no tenant is chosen."""

    def __post_init__(self) -> None:
        """Set the defaults that depend on other fields."""
        if self.kind not in CREDENTIAL_KINDS:
            raise ConfigurationError(f"a credential's kind is one of {', '.join(CREDENTIAL_KINDS)}, not {self.kind!r}")
        # an application's number of a user, for example
        if any(not isinstance(given, str) for given in (self.subject, self.id)):
            raise ConfigurationError("a credential's subject and id are texts: pass str(user.id), not a number or UUID")
        _refuse_text(self.tenants, self.scopes)
        for name in ("expires_at", "issued_at"):
            moment: datetime | None = getattr(self, name)
            if moment is not None and getattr(moment, "tzinfo", None) is None:
                raise ConfigurationError(f"a credential's {name} must be an aware datetime")
        assign = object.__setattr__
        if self.tenants is not None:
            assign(self, "tenants", tuple(self.tenants))
            if not all(isinstance(tenant, str | UUID) for tenant in self.tenants):
                raise ConfigurationError("a credential's tenants are slugs or ids, as str or UUID")
        if self.scopes is _DEFAULT_SCOPES:
            assign(self, "scopes", _ALL if self.tenants is None and self.kind in ("token", "session") else frozenset())
        else:
            assign(self, "scopes", frozenset(self.scopes))
        if self.sent_by_browser is None and self.kind != "token":  # the request that has a token decides it
            assign(self, "sent_by_browser", self.kind == "session")
        if self.kind == "key" and not self.id:
            assign(self, "id", self.subject)

    @property
    def public_id(self) -> str:
        """What it is called in events and logs: its ``id``, or the subject where it has none."""
        return self.id or self.subject

    @property
    def tenant(self) -> Tenant:
        """The tenant that the request is bound to.

        Raises:
            NoTenantError: the request has none.
        """
        if self.bound is None:
            raise NoTenantError
        return self.bound

    def actor(self, *, request_id: str | None = None, source: str | None = None) -> Actor:
        """Return who acts, for the audit log: ``tenancy.members.add(..., actor=credential.actor())``.

        Args:
            request_id: The request's id in the application's own logs.
            source: The address that the request came from.
        """
        return Actor(self.kind, self.subject or None, request_id=request_id, source=source)

    def has_scope(self, scope: str) -> bool:
        """Whether it may do ``scope``; with the scope ``*`` it may do everything."""
        return scope in self.scopes or ALL_SCOPES in self.scopes

    def require_scope(self, scope: str) -> None:
        """Raise unless it may do ``scope``.

        Raises:
            MissingScopeError: it may not.
        """
        if not self.has_scope(scope):
            raise MissingScopeError(scope)


def _refuse_text(*sequences: object) -> None:
    if any(isinstance(sequence, str) for sequence in sequences):
        raise ConfigurationError("a credential's tenants and scopes are sequences, not one string")
