"""Callers: finds the credential of a request, and the tenant that it is for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ..authentication.credential import Credential, Membership
from ..authentication.directory import Directory
from ..authentication.subjects import Named
from ..context import close_generators_unbound
from ..errors import (
    ConfigurationError,
    CrossOriginError,
    InvalidCredentialError,
    MalformedRequestError,
    NotOpenError,
    TenancyError,
    TenantNotAllowedError,
    TenantNotFoundError,
    TenantNotNamedError,
)
from ..events import CredentialRejected
from ..tenant import Status
from .authenticators import ApiKeyAuthenticator, Authenticator, TextAuthenticator
from .exempt import ExemptPaths
from .origins import Origins
from .resolvers import Headers, KeyResolver, Resolver, TenantResolver, route_path

if TYPE_CHECKING:
    from ..tenancy import Tenancy

logger = logging.getLogger("tenancy_orm.asgi")

SpecialPath = Literal["public", "without tenant"]
PUBLIC: Final = "public"
WITHOUT_TENANT: Final = "without tenant"

_VISITED = frozenset({Status.ACTIVE, Status.TRIAL, Status.MAINTENANCE})
# what Starlette says of connection.session and connection.user
_NOT_INSTALLED = re.compile(r"(\w+Middleware) must be installed")


class Callers:
    """Finds who is calling, and for which tenant; the arguments are the middleware's.

    Raises:
        ConfigurationError: a path, a resolver, an authenticator or an origin is malformed.
    """

    def __init__(
        self,
        tenancy: Tenancy,
        *,
        authenticators: Iterable[Authenticator | ApiKeyAuthenticator],
        resolvers: Iterable[Resolver],
        public: Iterable[str],
        without_tenant: Iterable[str],
        trusted_origins: Iterable[str],
    ) -> None:
        self._tenancy = tenancy
        given = tuple(resolvers)
        if unknown := [r for r in given if not isinstance(r, (KeyResolver, TenantResolver))]:
            raise ConfigurationError(f"{unknown[0]!r} is neither a KeyResolver nor a TenantResolver")
        self.tenant_resolvers = tuple(r for r in given if isinstance(r, TenantResolver))
        self.authenticators = _authenticators(authenticators, tuple(r for r in given if isinstance(r, KeyResolver)))
        self.public = ExemptPaths(public, purpose="public")
        self.without_tenant = ExemptPaths(without_tenant, purpose="without_tenant")
        if self.public.patterns and not any(resolver.is_address for resolver in self.tenant_resolvers):
            raise ConfigurationError(
                "public paths need a resolver that reads the tenant from the address: SubdomainResolver or "
                "PathPrefixResolver"
            )
        self._foreign_subjects = {id(one): _foreign_prefixes(one, self.authenticators) for one in self.authenticators}
        self.has_special_paths = bool(self.public.patterns or self.without_tenant.patterns)
        self.origins = Origins(trusted_origins)
        self._keys = next((a for a in self.authenticators if isinstance(a, ApiKeyAuthenticator)), None)
        self.keys_first = self._keys is not None and self.authenticators[0] is self._keys
        """Whether keys are asked for before any other credential."""
        self.keys_alone = self.keys_first and len(self.authenticators) == 1
        """Whether no other credential is accepted."""
        key_resolvers = () if self._keys is None else self._keys.resolvers
        self.adapting = tuple(
            r for r in (*key_resolvers, *self.tenant_resolvers) if type(r).adapt_scope is not Resolver.adapt_scope
        )
        """The resolvers that change the scope for the application."""
        for one in self.authenticators:
            if isinstance(one, TextAuthenticator):
                one.on_withdrawal(partial(self._verify_opened, one.issuer))
        self._credential_headers = frozenset(h for a in self.authenticators for h in getattr(a, "headers", ()))
        self._headers = self._credential_headers.union(*(resolver.headers for resolver in self.tenant_resolvers))
        self._reads_tokens = any(
            isinstance(a, TextAuthenticator) and b"authorization" in a.headers for a in self.authenticators
        )
        self._warned_of_unknown = False

    def _verify_opened(self, issuer: str) -> None:
        with suppress(NotOpenError):
            self._tenancy.internals.directory.verify_issuer(issuer)

    # --- reading ----------------------------------------------------------------------------------------------------

    def read_headers(self, scope: Scope) -> Headers:
        """Return the headers that authenticators and resolvers read.

        Raises:
            InvalidCredentialError, MalformedRequestError: there is one of them twice.
        """
        found: dict[bytes, bytes] = {}
        wanted = self._headers
        for name, value in scope["headers"]:
            if name in wanted:
                if name not in found:
                    found[name] = value
                elif name == b"cookie":
                    # HTTP/2 and HTTP/3 may send each cookie in a header of its own (RFC 9113, 8.2.3)
                    found[name] += b"; " + value
                else:
                    raise self._repeated(scope, name)
        return found

    def read_key(self, scope: Scope, headers: Headers, directory: Directory) -> str | None:
        """Return what was sent where keys are sent; see ``ApiKeyAuthenticator.read``.

        Raises:
            InvalidCredentialError: there are several keys.
        """
        if self._keys is None:
            return None
        try:
            return self._keys.read(scope, headers, directory)
        except InvalidCredentialError as error:
            raise self.rejected(scope, error.reason) from None

    def _repeated(self, scope: Scope, header: bytes) -> TenancyError:
        if header in self._credential_headers:
            return self.rejected(scope, "ambiguous")
        return MalformedRequestError(f"the header {header.decode('ascii').title()}")

    def rejected(
        self, scope: Scope, reason: str, *, kind: str = "key", credential_id: str | None = None
    ) -> InvalidCredentialError:
        """Report that a credential is refused before it was looked up, and return the error."""
        self._tenancy.events.emit(
            CredentialRejected(reason=reason, kind=kind, credential_id=credential_id, source=source_of(scope))
        )
        return InvalidCredentialError(reason, kind=kind, credential_id=credential_id)

    def special_path(self, scope: Scope) -> SpecialPath | None:
        """Return whether the path is a public one or one without a tenant; None for all others."""
        path = route_path(scope)
        for resolver in self.tenant_resolvers:
            path = resolver.inner_path(path)
        if self.public.has(path):
            return PUBLIC
        return WITHOUT_TENANT if self.without_tenant.has(path) else None

    # --- tokens and sessions ----------------------------------------------------------------------------------------

    async def admit(
        self, scope: Scope, headers: Headers, source: str | None, text: str | None, *, with_tenant: bool
    ) -> Credential:
        """Return the credential of a request that has no key, or another one before it.

        ``text`` is what was sent in place of a key, if that was read already.
        """
        directory = self._tenancy.internals.directory
        authenticated = await self._authenticate(scope, headers, source)
        if authenticated is None:
            key = text if text is not None or self.keys_first else self.read_key(scope, headers, directory)
            if self._reads_tokens and not (key and directory.is_key(key)) and _has_bearer(headers):
                # of an issuer that is not configured, or no JWT: "missing" or "malformed" would hide the cause
                error = InvalidCredentialError("unrecognised", kind="token")
                await directory.report_refused(error, source)
                raise error
            if key is None:
                raise self.rejected(scope, "missing")
            # nobody's own, and no key: it is refused, and recorded
            authenticated = await directory.authenticate(key, source=source)
        if authenticated.bound is not None:
            return authenticated if with_tenant else replace(authenticated, bound=None)
        if authenticated.sent_by_browser:
            try:
                self.origins.check(scope)
            except CrossOriginError:
                self.rejected(scope, "cross-origin", kind=authenticated.kind, credential_id=authenticated.public_id)
                raise
        subjects = directory.subjects
        named = self.named(scope, headers)
        if with_tenant and (found := subjects.peek(authenticated, named)) is not None:
            return found
        close_generators_unbound()
        try:
            allowed = await subjects.allowed(authenticated)
        except InvalidCredentialError as error:
            await directory.report_refused(error, source)
            raise
        if authenticated.tenants and not allowed.memberships:
            self._warn_of_unknown(authenticated)
        # nothing is awaited from here on: what is chosen is what was allowed
        chosen = self._choose(authenticated, allowed.memberships, named, source) if with_tenant else None
        return subjects.admit(authenticated, allowed, chosen, named)

    async def _authenticate(self, scope: Scope, headers: Headers, source: str | None) -> Credential | None:
        """Return the credential that the first authenticator with one of its own finds."""
        directory = self._tenancy.internals.directory
        for authenticator in self.authenticators:
            if isinstance(authenticator, ApiKeyAuthenticator):
                if self.keys_first:
                    continue
                key = self.read_key(scope, headers, directory)
                if key is not None and directory.is_key(key):
                    return directory.peek(key, source) or await directory.authenticate(key, source=source)
            elif isinstance(authenticator, TextAuthenticator):
                try:
                    presented = authenticator.read(scope, headers)
                except InvalidCredentialError as error:
                    raise self.rejected(scope, error.reason, kind=error.kind) from None
                if presented is not None:
                    found = authenticator.peek(presented)
                    foreign = self._foreign_subjects[id(authenticator)]
                    if found is None or (foreign and found.subject.startswith(foreign)):
                        try:
                            found = await authenticator.verify(presented)
                            if foreign and found.subject.startswith(foreign):
                                raise InvalidCredentialError("subject", kind=found.kind, credential_id=found.id)
                        except InvalidCredentialError as error:
                            await directory.report_refused(error, source)
                            raise
                    if found.sent_by_browser is None:
                        return replace(found, sent_by_browser=presented.sent_by_browser)
                    return found
            else:
                try:
                    found = await authenticator.authenticate(HTTPConnection(scope))
                except InvalidCredentialError as error:
                    await directory.report_refused(error, source)
                    raise
                except AssertionError as error:
                    if (needed := _NOT_INSTALLED.match(str(error))) is None:
                        raise
                    raise ConfigurationError(
                        f"{type(authenticator).__name__} needs {needed[1]}: put it outside TenancyMiddleware; with "
                        "add_middleware, add it after"
                    ) from None
                if found is not None:
                    return _with_sender(_checked(found, authenticator), scope)
        return None

    def _warn_of_unknown(self, credential: Credential) -> None:
        """Log, once, that no tenant has the name that a credential allows: most often it is the provider's own id."""
        if self._warned_of_unknown:
            return
        self._warned_of_unknown = True
        assert credential.tenants is not None  # noqa: S101 - the caller asks
        logger.warning(
            "a %s allows the tenant %r, but there is no tenant with this slug or id, so it is refused as no-tenant; "
            "where it is an id of the identity provider's, give tenants_claim a function that finds the tenant by it",
            credential.kind,
            str(credential.tenants[0])[:64],
        )

    def _choose(
        self, credential: Credential, memberships: Sequence[Membership], named: Named, source: str | None
    ) -> Membership:
        """Return the tenant that the request names, or the only one that there is."""
        found = self.find_named(credential, memberships, named, source)
        if found is not None:
            return found
        if not memberships:
            raise TenantNotAllowedError
        if len(memberships) > 1:
            raise TenantNotNamedError(tuple(membership.tenant.slug for membership in memberships))
        return memberships[0]

    def named(self, scope: Scope, headers: Headers) -> Named:
        """Return the tenants that the request names, one for each resolver."""
        return tuple(resolver.claimed_tenant(scope, headers) for resolver in self.tenant_resolvers)

    def find_named(
        self, credential: Credential, memberships: Sequence[Membership], named: Named, source: str | None
    ) -> Membership | None:
        """Return the tenant that the request names first, None where it names none.

        Whether all names are of one tenant is checked later on, where one is bound.

        Raises:
            TenantNotAllowedError: one of the names is of none of ``memberships``, which is recorded.
        """
        found = None
        for resolver, name in zip(self.tenant_resolvers, named, strict=True):
            if name is None:
                continue
            match = next((one for one in memberships if resolver.matches(name, one.tenant)), None)
            if match is None:
                self._tenancy.internals.directory.report_cross_tenant(credential, name, resolver.name, source)
                raise TenantNotAllowedError(name)
            found = found or match
        return found

    def refuse_named(self, credential: Credential, scope: Scope, headers: Headers, source: str | None) -> None:
        """Refuse a request for a path without a tenant that names one which its credential does not allow.

        The address does not count for people, where a key's must be right: whoever was removed from a tenant must be
        able to log out at its host, and who is invited to accept.

        Raises:
            TenantNotAllowedError: it does, which is recorded.
        """
        named = self.named(scope, headers)
        if credential.kind != "key":
            pairs = zip(self.tenant_resolvers, named, strict=True)
            named = tuple(None if resolver.is_address else name for resolver, name in pairs)
        self.find_named(credential, credential.memberships, named, source)

    async def admit_visitor(self, scope: Scope, headers: Headers) -> Credential:
        """Return the credential of a visitor of the tenant that the address names.

        Raises:
            TenantNotFoundError: there is none, it may not be visited, or the request names another one besides.
        """
        named = [(resolver, resolver.claimed_tenant(scope, headers)) for resolver in self.tenant_resolvers]
        name = next((name for resolver, name in named if resolver.is_address and name is not None), None)
        if name is None:
            raise TenantNotFoundError(scope["path"])
        close_generators_unbound()
        credential = await self._tenancy.internals.directory.subjects.anonymous(name)
        tenant = credential.tenant
        if tenant.status not in _VISITED or any(
            claimed is not None and not resolver.matches(claimed, tenant) for resolver, claimed in named
        ):
            # as if it did not exist
            raise TenantNotFoundError(name)
        return credential


def _authenticators(
    given: Iterable[Authenticator | ApiKeyAuthenticator], key_resolvers: tuple[KeyResolver, ...]
) -> tuple[Authenticator | ApiKeyAuthenticator, ...]:
    """Return what authenticates; a lone ``ApiKeyAuthenticator`` reads what ``key_resolvers`` say."""
    found = tuple(given)
    for one in found:
        known = isinstance(one, ApiKeyAuthenticator) or callable(getattr(one, "authenticate", None))
        if not known or isinstance(one, type):
            why = "give an instance of the class" if isinstance(one, type) else "it has no method authenticate"
            raise ConfigurationError(f"{one!r} is not an authenticator: {why}")
    issuers = {one.issuer for one in found if isinstance(one, TextAuthenticator) and not one.subject_prefix} - {""}
    if len(issuers) > 1:
        raise ConfigurationError(
            f"the issuers {' and '.join(sorted(issuers))} may call two people by the same subject; give each "
            "authenticator a subject_prefix (the same one where their subjects are the same people)"
        )
    keys = [one for one in found if isinstance(one, ApiKeyAuthenticator)]
    if len(keys) > 1:
        raise ConfigurationError("give one ApiKeyAuthenticator, with all the resolvers of keys")
    if not found:
        return (ApiKeyAuthenticator(*key_resolvers),)
    if key_resolvers and not keys:
        raise ConfigurationError("resolvers of API keys need an ApiKeyAuthenticator among the authenticators")
    if key_resolvers:
        return tuple(ApiKeyAuthenticator(*key_resolvers) if one is keys[0] else one for one in found)
    return found


def _has_bearer(headers: Headers) -> bool:
    return headers.get(b"authorization", b"")[:7].lower() == b"bearer "


def _with_sender(credential: Credential, scope: Scope) -> Credential:
    """Return a credential that says whether the browser has sent it: where its authenticator does not, a token may."""
    if credential.sent_by_browser is not None:
        return credential
    names = {name for name, _ in scope["headers"]}
    return replace(credential, sent_by_browser=b"cookie" in names and b"authorization" not in names)


def _foreign_prefixes(
    authenticator: Authenticator | ApiKeyAuthenticator, others: Iterable[Authenticator | ApiKeyAuthenticator]
) -> tuple[str, ...]:
    """Return what none of an authenticator's subjects may begin with: prefixes that make it a subject of another one.

    With the prefixes "" and "b|", the first issuer's "b|ada" would be the second issuer's "ada".
    """
    if not isinstance(authenticator, TextAuthenticator):
        return ()
    own = authenticator.subject_prefix
    prefixes = {one.subject_prefix for one in others if isinstance(one, TextAuthenticator)} - {own}
    return tuple(prefix for prefix in prefixes if prefix.startswith(own))


def _checked(credential: Credential, authenticator: Authenticator) -> Credential:
    given: object = credential
    if not isinstance(given, Credential) or credential.kind not in ("token", "session") or credential.bound is not None:
        raise ConfigurationError(
            f"{type(authenticator).__name__} must return a credential of kind token or session, without a tenant"
        )
    if credential.roles:
        raise ConfigurationError(
            f"{type(authenticator).__name__} must return a credential without roles; set scopes, not roles: "
            "roles come from memberships"
        )
    return credential


def source_of(scope: Scope) -> str | None:
    """Return the peer's address."""
    client = scope.get("client")
    return None if client is None else client[0]
