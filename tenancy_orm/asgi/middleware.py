"""The middleware: binds every request to the tenant of its credential, or to none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from ..authentication.admission import tenant_for_source
from ..authentication.credential import Credential, Membership
from ..authentication.subjects import Named
from ..context import _current, close_generators_unbound, reset_current
from ..errors import (
    ConfigurationError,
    CrossOriginError,
    CrossTenantError,
    InvalidCredentialError,
    MalformedRequestError,
    TenancyError,
    TenantNotAllowedError,
    TenantNotFoundError,
    TenantNotNamedError,
)
from ..events import CredentialRejected, OperatorAdmitted, QuotaRefused
from ..quotas.overrides import REQUEST_RATE
from ..quotas.rates import Allowed, Denied
from ..registry.lifecycle import check_usable
from ..tenant import Status, Tenant
from .authenticators import ApiKeyAuthenticator, Authenticator, TextAuthenticator
from .connection import WatchedConnection
from .exempt import ExemptPaths
from .origins import Origins
from .preflight import Preflights
from .problems import ADDRESS_LIMITED, RATE_LIMITED, problem_for, rate_headers
from .resolvers import Headers, KeyResolver, Resolver, TenantResolver, route_path

if TYPE_CHECKING:
    from ..tenancy import Tenancy

logger = logging.getLogger("tenancy_orm.asgi")

CREDENTIAL: Final = "tenancy"
"""Key of an ASGI scope: the ``Credential`` of the request, or None where it has none."""

TENANCY: Final = "tenancy_orm.tenancy"
"""Key of an ASGI scope: the ``Tenancy`` that the request is served by."""

# bound here: attributes of an enum are slow to read, and the variable's own method is called without a wrapper
_ACTIVE, _TRIAL, _MAINTENANCE = Status.ACTIVE, Status.TRIAL, Status.MAINTENANCE
_bind = _current.set
_GONE = frozenset({Status.DELETED, Status.PURGED})
_VISITED = frozenset({Status.ACTIVE, Status.TRIAL, Status.MAINTENANCE})

_PUBLIC: Final = "public"
_WITHOUT_TENANT: Final = "without tenant"


class TenancyMiddleware:
    """Binds each request to the tenant of its credential; pure ASGI, for HTTP and websockets.

    The credential decides: an API key belongs to one tenant, a token or session may allow several, of which the request
    names one by host, path or header. A request that names a tenant that its credential does not allow is refused and
    recorded. Requests without a valid credential are refused unless they are exempt, and so are more requests per
    second than the tenant's tier admits. In the application ``current_tenant()`` and ``tenancy.session()`` are the
    tenant's, also in tasks, in threads started by ``asyncio.to_thread``, in background tasks and in streaming bodies.
    ``scope["tenancy"]`` holds the ``Credential``.

    A websocket or a streaming response is ended when its credential is no longer valid: it was revoked or has expired,
    it lost scopes or networks, its subject is no longer a member, or the tenant's status no longer admits anyone.

    A CORS preflight has no credential. It is answered where Starlette's ``CORSMiddleware`` stands outside this one, as
    it should, since refusals need its headers as well. Where it stands inside, a preflight gets its answer, and nothing
    inside is reached. Without it a preflight is refused like any other request.

    Outside the application no tenant is ever bound: the middleware first binds "none", the server's ``receive`` and
    ``send`` run unbound, and the binding ends with the request. A server that carries context from one request of a
    connection to the next (Kludex/uvicorn#2167) therefore carries no tenant.

    Args:
        app: The application.
        tenancy: The ``Tenancy`` that serves the requests; it must be open by the first request.
        authenticators: What finds credentials, asked in this order until one does: ``ApiKeyAuthenticator``,
            ``JwtAuthenticator``, the application's own. API keys alone by default; where others are given, keys are
            accepted only if ``ApiKeyAuthenticator`` is among them.
        resolvers: Where tenants are named besides the credential (``SubdomainResolver`` and others); and where keys are
            sent, for an ``ApiKeyAuthenticator`` that is given no resolvers of its own.
        exempt: Paths that need no credential: ``/healthz``, ``/static/*``. No tenant is bound there, even with a key.
        public: Paths that visitors use, and webhooks: ``/p/*``. The tenant that host or path names is bound to a
            credential of kind "anonymous", without scopes; what credential the request has is not read. Rated by
            address. A tenant that does not exist, or is suspended, is answered by 404 alike.
        without_tenant: Paths that need a credential and bind no tenant: a list of the tenants that a person may use.
        trusted_origins: Origins of further pages that may use a cookie to change something: ``https://app.example.com``
            where the application itself is at another host.
        operators: Called with the scope and the credential of a request to a tenant in maintenance; returns whether it
            is an operator's. An operator's request and its sessions are served, and ``OperatorAdmitted`` is emitted.
            Without it nobody is served during maintenance: no scope of a tenant's key makes a request an operator's.
        map_errors: Whether a ``TenancyError`` that the application raises before its response has started is
            answered by a problem document, where there is one for it. Other errors pass unchanged.

    Raises:
        ConfigurationError: a path, a resolver, an authenticator or an origin is malformed.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tenancy: Tenancy,
        authenticators: Iterable[Authenticator | ApiKeyAuthenticator] = (),
        resolvers: Iterable[Resolver] = (),
        exempt: Iterable[str] = ("/healthz",),
        public: Iterable[str] = (),
        without_tenant: Iterable[str] = (),
        trusted_origins: Iterable[str] = (),
        operators: Callable[[Scope, Credential], bool] | None = None,
        map_errors: bool = True,
    ) -> None:
        self.app = app
        self.tenancy = tenancy
        self.map_errors = map_errors
        self.operators = operators
        given = tuple(resolvers)
        if unknown := [r for r in given if not isinstance(r, (KeyResolver, TenantResolver))]:
            raise ConfigurationError(f"{unknown[0]!r} is neither a KeyResolver nor a TenantResolver")
        self.tenant_resolvers = tuple(r for r in given if isinstance(r, TenantResolver))
        self.authenticators = _authenticators(authenticators, tuple(r for r in given if isinstance(r, KeyResolver)))
        self.exempt = ExemptPaths(exempt)
        self.public = ExemptPaths(public, purpose="public")
        self.without_tenant = ExemptPaths(without_tenant, purpose="without_tenant")
        if self.public.patterns and not any(resolver.is_address for resolver in self.tenant_resolvers):
            raise ConfigurationError(
                "public paths need a resolver that reads the tenant from the address: SubdomainResolver or "
                "PathPrefixResolver"
            )
        self.origins = Origins(trusted_origins)
        self.preflights = Preflights(app)
        self._keys = next((a for a in self.authenticators if isinstance(a, ApiKeyAuthenticator)), None)
        self._keys_first = self._keys is not None and self.authenticators[0] is self._keys
        self._keys_alone = self._keys_first and len(self.authenticators) == 1
        key_resolvers = () if self._keys is None else self._keys.resolvers
        self._credential_headers = frozenset(h for a in self.authenticators for h in getattr(a, "headers", ()))
        self._headers = self._credential_headers.union(*(resolver.headers for resolver in self.tenant_resolvers))
        self._adapting = tuple(
            r for r in (*key_resolvers, *self.tenant_resolvers) if type(r).adapt_scope is not Resolver.adapt_scope
        )
        self._needs_check = bool(self.tenant_resolvers or self._adapting)
        self._special_paths = bool(self.public.patterns or self.without_tenant.patterns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        token = _bind(None)
        connection = WatchedConnection(receive, send)
        admitted = False
        try:
            scope[TENANCY] = self.tenancy
            scope[CREDENTIAL] = None
            if not self.exempt.covers(scope):
                if kind == "http" and scope["method"] == "OPTIONS" and (answer := self.preflights.answer(scope)):
                    await answer(scope, connection.receive, connection.send)
                    return
                headers = self._read_headers(scope)
                internals = self.tenancy.internals
                directory = internals.directory
                client = scope.get("client")
                source = client[0] if client else None
                path = self._special_path(scope) if self._special_paths else None
                if path is _PUBLIC:
                    rate = internals.rates.acquire_address(source)
                    if await self._limited(rate, "address", scope, connection):
                        return
                    credential = await self._admit_visitor(scope, headers)
                else:
                    key = self._read_key(scope, headers) if self._keys_first else None
                    if key is None or not (self._keys_alone or directory.is_key(key)):
                        credential = await self._admit(scope, headers, source, key, with_tenant=path is None)
                    else:
                        found = directory.peek(key, source)
                        if found is None:
                            # here, not with every binding: it takes 0.2 us, and a cached key was looked up before
                            close_generators_unbound()
                            found = await directory.authenticate(key, source=source)
                        credential = found if path is None else replace(found, bound=None)
                    if credential.bound is None:
                        rate = internals.rates.acquire_address(source)
                        if await self._limited(rate, "address", scope, connection):
                            return
                    else:
                        rate = internals.rates.acquire(credential.bound)
                        if rate.limit is not None and await self._limited(
                            rate, "tenant", scope, connection, credential.bound
                        ):
                            return
                tenant = credential.bound
                if tenant is None:
                    self._find_named(credential, credential.memberships, self._named(scope, headers), source)
                    for adapting in self._adapting:
                        adapting.adapt_scope(scope)
                    scope[CREDENTIAL] = credential
                else:
                    if self._needs_check or (tenant.status is not _ACTIVE and tenant.status is not _TRIAL):
                        redirect = self._check(scope, headers, credential, tenant)
                        if redirect is not None and kind == "http":
                            await RedirectResponse(redirect, 308)(scope, connection.receive, connection.send)
                            return
                        if tenant.status is _MAINTENANCE:
                            tenant = replace(tenant, operator=True)  # _check refuses everyone else
                    if kind == "websocket":
                        tenant = tenant_for_source(tenant, source)
                    scope[CREDENTIAL] = credential
                    connection.admitted = (tenant, scope, self.tenancy)
                    _bind(tenant)
            admitted = True
            await self.app(scope, connection.receive, connection.send)
            if connection.ended is not None and (kind == "http" or not connection.started):
                # otherwise a middleware further out would complete the response
                raise connection.abort_error()
        except TenancyError as error:
            await self._answer(error, scope, connection, admitted=admitted)
        except (ConnectionAbortedError, ClientDisconnect, WebSocketDisconnect):
            # the application raises these because its connection was ended: not a failure of its own
            refusal = connection.refusal
            if refusal is not None:
                await self._answer(refusal, scope, connection, admitted=admitted)
            elif connection.ended is None or kind == "http":
                raise
        finally:
            reset_current(token)
            if connection.watched:
                await connection.release()

    # --- identifying the caller -------------------------------------------------------------------------------------

    def _read_headers(self, scope: Scope) -> Headers:
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

    def _read_key(self, scope: Scope, headers: Headers) -> str | None:
        if self._keys is None:
            return None
        try:
            return self._keys.read(scope, headers, self.tenancy.internals.directory.is_key)
        except InvalidCredentialError as error:
            raise self._rejected(scope, error.reason) from None

    def _repeated(self, scope: Scope, header: bytes) -> TenancyError:
        if header in self._credential_headers:
            return self._rejected(scope, "ambiguous")
        return MalformedRequestError(f"the header {header.decode('ascii').title()}")

    def _rejected(
        self, scope: Scope, reason: str, *, kind: str = "key", credential_id: str | None = None
    ) -> InvalidCredentialError:
        self.tenancy.events.emit(
            CredentialRejected(reason=reason, kind=kind, credential_id=credential_id, source=_source(scope))
        )
        return InvalidCredentialError(reason, kind=kind, credential_id=credential_id)

    def _special_path(self, scope: Scope) -> str | None:
        """Return whether the path is a public one or one without a tenant; None for all others."""
        path = route_path(scope)
        for resolver in self.tenant_resolvers:
            path = resolver.inner_path(path)
        if self.public.has(path):
            return _PUBLIC
        return _WITHOUT_TENANT if self.without_tenant.has(path) else None

    # --- tokens and sessions ----------------------------------------------------------------------------------------

    async def _admit(
        self, scope: Scope, headers: Headers, source: str | None, text: str | None, *, with_tenant: bool
    ) -> Credential:
        """Return the credential of a request that has no key, or another one before it.

        ``text`` is what was sent in place of a key, if that was read already.
        """
        directory = self.tenancy.internals.directory
        authenticated = await self._authenticate(scope, headers, source)
        if authenticated is None:
            key = text if text is not None or self._keys_first else self._read_key(scope, headers)
            if key is None:
                raise self._rejected(scope, "missing")
            # nobody's own, and no key: it is refused, and recorded
            authenticated = await directory.authenticate(key, source=source)
        if authenticated.bound is not None:
            return authenticated if with_tenant else replace(authenticated, bound=None)
        if authenticated.sent_by_browser:
            try:
                self.origins.check(scope)
            except CrossOriginError:
                self._rejected(scope, "cross-origin", kind=authenticated.kind, credential_id=authenticated.id)
                raise
        subjects = directory.subjects
        named = self._named(scope, headers)
        if with_tenant and (found := subjects.peek(authenticated, named)) is not None:
            return found
        close_generators_unbound()
        try:
            allowed = await subjects.allowed(authenticated)
        except InvalidCredentialError as error:
            await directory.report_refused(error, source)
            raise
        # nothing is awaited from here on: what is chosen is what was allowed
        chosen = self._choose(authenticated, allowed.memberships, named, source) if with_tenant else None
        return subjects.admit(authenticated, allowed, chosen, named)

    async def _authenticate(self, scope: Scope, headers: Headers, source: str | None) -> Credential | None:
        """Return the credential that the first authenticator with one of its own finds."""
        directory = self.tenancy.internals.directory
        for authenticator in self.authenticators:
            if isinstance(authenticator, ApiKeyAuthenticator):
                if self._keys_first:
                    continue
                key = self._read_key(scope, headers)
                if key is not None and directory.is_key(key):
                    return directory.peek(key, source) or await directory.authenticate(key, source=source)
            elif isinstance(authenticator, TextAuthenticator):
                try:
                    presented = authenticator.read(scope, headers)
                except InvalidCredentialError as error:
                    raise self._rejected(scope, error.reason, kind=error.kind) from None
                if presented is not None:
                    found = authenticator.peek(presented)
                    if found is None:
                        verify = partial(authenticator.verify, presented)
                        found = await directory.attempt(verify, what=hash(presented.text), source=source)
                    return found
            else:
                try:
                    found = await authenticator.authenticate(HTTPConnection(scope))
                except InvalidCredentialError as error:
                    await directory.report_refused(error, source)
                    raise
                if found is not None:
                    return _checked(found, authenticator)
        return None

    def _choose(
        self, credential: Credential, memberships: Sequence[Membership], named: Named, source: str | None
    ) -> Membership:
        """Return the tenant that the request names, or the only one that there is."""
        found = self._find_named(credential, memberships, named, source)
        if found is not None:
            return found
        if not memberships:
            raise TenantNotAllowedError
        if len(memberships) > 1:
            raise TenantNotNamedError(tuple(membership.tenant.slug for membership in memberships))
        return memberships[0]

    def _named(self, scope: Scope, headers: Headers) -> Named:
        return tuple(resolver.claimed_tenant(scope, headers) for resolver in self.tenant_resolvers)

    def _find_named(
        self, credential: Credential, memberships: Sequence[Membership], named: Named, source: str | None
    ) -> Membership | None:
        """Return the tenant that the request names, None where it names none; further names are checked later on.

        Raises:
            TenantNotAllowedError: it is none of ``memberships``, which is recorded.
        """
        for resolver, name in zip(self.tenant_resolvers, named, strict=True):
            if name is not None:
                for membership in memberships:
                    if resolver.matches(name, membership.tenant):
                        return membership
                self.tenancy.internals.directory.report_cross_tenant(credential, name, resolver.name, source)
                raise TenantNotAllowedError(name)
        return None

    async def _admit_visitor(self, scope: Scope, headers: Headers) -> Credential:
        """Return the credential of a visitor of the tenant that the address names.

        Raises:
            TenantNotFoundError: there is none, it may not be visited, or the request names another one besides.
        """
        named = [(resolver, resolver.claimed_tenant(scope, headers)) for resolver in self.tenant_resolvers]
        name = next((name for resolver, name in named if resolver.is_address and name is not None), None)
        if name is None:
            raise TenantNotFoundError(scope["path"])
        close_generators_unbound()
        credential = await self.tenancy.internals.directory.subjects.anonymous(name)
        tenant = credential.tenant
        if tenant.status not in _VISITED or any(
            claimed is not None and not resolver.matches(claimed, tenant) for resolver, claimed in named
        ):
            # as if it did not exist
            raise TenantNotFoundError(name)
        return credential

    # --- checking ---------------------------------------------------------------------------------------------------

    def _check(self, scope: Scope, headers: Headers, credential: Credential, tenant: Tenant) -> str | None:
        """Refuse what the credential does not admit. Returns a URL to redirect to where a former slug is claimed."""
        redirect = None
        if tenant.status is not _ACTIVE and tenant.status is not _TRIAL:
            if tenant.status in _GONE:
                raise self._rejected(scope, tenant.status.value, kind=credential.kind, credential_id=credential.id)
            check_usable(tenant, operator=self._is_operator_request(scope, credential, tenant))
        for resolver in self.tenant_resolvers:
            claimed = resolver.claimed_tenant(scope, headers)
            if claimed is not None and not resolver.matches(claimed, tenant):
                self.tenancy.internals.directory.report_cross_tenant(credential, claimed, resolver.name, _source(scope))
                raise CrossTenantError("a request", bound=tenant.slug, requested=claimed)
            if claimed is not None and redirect is None:
                redirect = resolver.redirect_url(scope, claimed, tenant)
        for adapting in self._adapting:
            adapting.adapt_scope(scope)
        return redirect

    def _is_operator_request(self, scope: Scope, credential: Credential, tenant: Tenant) -> bool:
        """Whether a request to a tenant in maintenance is an operator's."""
        if tenant.status is not _MAINTENANCE or self.operators is None or not self.operators(scope, credential):
            return False
        self.tenancy.events.emit(
            OperatorAdmitted(tenant_id=tenant.id, slug=tenant.slug, credential_id=credential.id, source=_source(scope))
        )
        return True

    # --- answering --------------------------------------------------------------------------------------------------

    async def _limited(
        self,
        rate: Allowed | Denied,
        policy: str,
        scope: Scope,
        connection: WatchedConnection,
        tenant: Tenant | None = None,
    ) -> bool:
        """Add the headers about a rate to the answer; answer now, and return True, where it is exceeded."""
        connection.headers = rate_headers(rate, policy)
        if rate.allowed:
            return False
        if tenant is not None and rate.limit is not None:
            about = {"tenant_id": tenant.id, "slug": tenant.slug}
            self.tenancy.events.emit(
                QuotaRefused(resource=REQUEST_RATE, limit=rate.limit, used=rate.limit, **about)  # type: ignore[arg-type]
            )
        problem = RATE_LIMITED if tenant is not None else ADDRESS_LIMITED
        await problem(scope, connection.receive, connection.send)
        return True

    async def _answer(
        self, error: TenancyError, scope: Scope, connection: WatchedConnection, *, admitted: bool
    ) -> None:
        credential: Credential | None = scope[CREDENTIAL]
        if credential is not None and isinstance(error, CrossTenantError):
            # something in the request that the application read itself named another tenant
            self.tenancy.internals.directory.report_cross_tenant(
                credential, error.requested or "*", "application", _source(scope)
            )
        if connection.started:
            if scope["type"] == "websocket" and connection.ended and type(error) is type(connection.ended.error):
                return  # it was closed for this reason already
            raise error
        if admitted and not self.map_errors and connection.ended is None:
            raise error
        problem = problem_for(error, tenant=None if credential is None else credential.bound)
        if problem is None:
            raise error
        if problem.status >= 500:
            logger.warning("answered %d: %s", problem.status, error)
        await problem(scope, connection.receive, connection.answer)


def _authenticators(
    given: Iterable[Authenticator | ApiKeyAuthenticator], key_resolvers: tuple[KeyResolver, ...]
) -> tuple[Authenticator | ApiKeyAuthenticator, ...]:
    """Return what authenticates; a lone ``ApiKeyAuthenticator`` reads what ``key_resolvers`` say."""
    found = tuple(given)
    for one in found:
        known = isinstance(one, ApiKeyAuthenticator) or callable(getattr(one, "authenticate", None))
        if not known or isinstance(one, type):
            raise ConfigurationError(f"{one!r} is no authenticator: it has no method authenticate")
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


def _checked(credential: Credential, authenticator: Authenticator) -> Credential:
    if credential.kind not in ("token", "session") or credential.bound is not None:
        raise ConfigurationError(
            f"{type(authenticator).__name__} must return a credential of kind token or session, without a tenant"
        )
    return credential


def _source(scope: Scope) -> str | None:
    client = scope.get("client")
    return None if client is None else client[0]
