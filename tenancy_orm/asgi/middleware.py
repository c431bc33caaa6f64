"""The middleware: binds every request to the tenant of its API key, or to none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from ..authentication.admission import tenant_for_source
from ..authentication.credential import Credential
from ..context import _current, close_generators_unbound, reset_current
from ..errors import ConfigurationError, CrossTenantError, InvalidCredentialError, MalformedRequestError, TenancyError
from ..events import CredentialRejected, OperatorAdmitted, QuotaRefused
from ..quotas.overrides import REQUEST_RATE
from ..registry.lifecycle import check_usable
from ..tenant import Status, Tenant
from .connection import WatchedConnection
from .exempt import ExemptPaths
from .preflight import Preflights
from .problems import RATE_LIMITED, problem_for, rate_headers
from .resolvers import ApiKeyHeader, BearerToken, Headers, KeyResolver, Resolver, TenantResolver

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


class TenancyMiddleware:
    """Binds each request to the tenant of its API key; pure ASGI, for HTTP and websockets.

    The key decides. If anything else in the request names a tenant, it must name the same one, or the request is
    refused and recorded. Requests without a valid key are refused unless they are exempt, and so are more requests per
    second than the tenant's tier admits. In the application ``current_tenant()`` and ``tenancy.session()`` are the
    tenant's, also in tasks, in threads started by ``asyncio.to_thread``, in background tasks and in streaming bodies.
    ``scope["tenancy"]`` holds the ``Credential``.

    A websocket or a streaming response is ended when its credential is no longer valid: the key was revoked or has
    expired, it lost scopes or networks, or the tenant's status no longer admits anyone.

    A CORS preflight has no key. It is answered where Starlette's ``CORSMiddleware`` stands outside this one, as it
    should, since refusals need its headers as well. Where it stands inside, a preflight gets its answer, and nothing
    inside is reached. Without it a preflight is refused like any other request.

    Outside the application no tenant is ever bound: the middleware first binds "none", the server's ``receive`` and
    ``send`` run unbound, and the binding ends with the request. A server that carries context from one request of a
    connection to the next (Kludex/uvicorn#2167) therefore carries no tenant.

    Args:
        app: The application.
        tenancy: The ``Tenancy`` that serves the requests; it must be open by the first request.
        resolvers: Where tenants are named besides the key (``SubdomainResolver`` and others), and where keys are sent;
            without a ``KeyResolver`` among them, keys are sent in ``X-API-Key`` or ``Authorization: Bearer``.
        exempt: Paths that need no key: ``/healthz``, ``/static/*``. No tenant is bound there, even with a key.
        operators: Called with the scope and the credential of a request to a tenant in maintenance; returns whether it
            is an operator's. An operator's request and its sessions are served, and ``OperatorAdmitted`` is emitted.
            Without it nobody is served during maintenance: no scope of a tenant's key makes a request an operator's.
        map_errors: Whether a ``TenancyError`` that the application raises before its response has started is
            answered by a problem document, where there is one for it. Other errors pass unchanged.

    Raises:
        ConfigurationError: an exempt path or a resolver is malformed.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tenancy: Tenancy,
        resolvers: Iterable[Resolver] = (),
        exempt: Iterable[str] = ("/healthz",),
        operators: Callable[[Scope, Credential], bool] | None = None,
        map_errors: bool = True,
    ) -> None:
        self.app = app
        self.tenancy = tenancy
        self.map_errors = map_errors
        self.operators = operators
        given = tuple(resolvers)
        self.keys = tuple(r for r in given if isinstance(r, KeyResolver)) or (ApiKeyHeader(), BearerToken())
        self.tenant_resolvers = tuple(r for r in given if isinstance(r, TenantResolver))
        if unknown := [r for r in given if not isinstance(r, (KeyResolver, TenantResolver))]:
            raise ConfigurationError(f"{unknown[0]!r} is neither a KeyResolver nor a TenantResolver")
        self.exempt = ExemptPaths(exempt)
        self.preflights = Preflights(app)
        self._key_headers = frozenset(header for resolver in self.keys for header in resolver.headers)
        self._headers = self._key_headers.union(*(resolver.headers for resolver in self.tenant_resolvers))
        self._adapting = tuple(
            r for r in (*self.keys, *self.tenant_resolvers) if type(r).adapt_scope is not Resolver.adapt_scope
        )
        # with the header that each reads, where it reads one alone: most requests send the key in one of them only
        self._readers = tuple((r.headers[0] if len(r.headers) == 1 else None, r) for r in self.keys)
        self._needs_check = bool(self.tenant_resolvers or self._adapting)

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
                key = self._read_key(scope, headers)
                internals = self.tenancy.internals
                directory = internals.directory
                client = scope.get("client")
                source = client[0] if client else None
                credential = directory.peek(key, source)
                if credential is None:
                    # here, not with every binding: it takes 0.2 us, and a cached key was looked up before
                    close_generators_unbound()
                    credential = await directory.authenticate(key, source=source)
                tenant = credential.tenant
                rate = internals.rates.acquire(tenant)
                if rate.limit is not None:
                    connection.headers = rate_headers(rate)
                    if not rate.allowed:
                        self._report_rate(tenant, rate.limit)
                        await RATE_LIMITED(scope, connection.receive, connection.send)
                        return
                if self._needs_check or (tenant.status is not _ACTIVE and tenant.status is not _TRIAL):
                    redirect = self._check(scope, headers, credential)
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
                if name in found:
                    raise self._repeated(scope, name)
                found[name] = value
        return found

    def _read_key(self, scope: Scope, headers: Headers) -> str:
        found = None
        for header, resolver in self._readers:
            if header is not None and header not in headers:
                continue
            try:
                key = resolver.key(scope, headers)
            except InvalidCredentialError as error:
                raise self._rejected(scope, error.reason) from None
            if key is not None:
                found = key if found is None or key == found else self._only_key(scope, found, key)
        if found is None:
            raise self._rejected(scope, "missing")
        return found

    def _only_key(self, scope: Scope, one: str, other: str) -> str:
        """Return the one of two texts that is an API key: beside it, a proxy may send a token of another system."""
        is_key = self.tenancy.internals.directory.is_key
        if is_key(one) and is_key(other):
            raise self._rejected(scope, "ambiguous")
        return one if is_key(one) else other

    def _repeated(self, scope: Scope, header: bytes) -> TenancyError:
        if header in self._key_headers:
            return self._rejected(scope, "ambiguous")
        return MalformedRequestError(f"the header {header.decode('ascii').title()}")

    def _rejected(self, scope: Scope, reason: str, credential_id: str | None = None) -> InvalidCredentialError:
        self.tenancy.events.emit(CredentialRejected(reason=reason, credential_id=credential_id, source=_source(scope)))
        return InvalidCredentialError(reason, credential_id=credential_id)

    def _check(self, scope: Scope, headers: Headers, credential: Credential) -> str | None:
        """Refuse what the key does not admit. Returns a URL to redirect to where the request claims a former slug."""
        tenant = credential.tenant
        redirect = None
        if tenant.status is not _ACTIVE and tenant.status is not _TRIAL:
            if tenant.status in _GONE:
                raise self._rejected(scope, tenant.status.value, credential.id)
            check_usable(tenant, operator=self._is_operator_request(scope, credential))
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

    def _is_operator_request(self, scope: Scope, credential: Credential) -> bool:
        """Whether a request to a tenant in maintenance is an operator's."""
        tenant = credential.tenant
        if tenant.status is not _MAINTENANCE or self.operators is None or not self.operators(scope, credential):
            return False
        self.tenancy.events.emit(
            OperatorAdmitted(tenant_id=tenant.id, slug=tenant.slug, credential_id=credential.id, source=_source(scope))
        )
        return True

    # --- answering --------------------------------------------------------------------------------------------------

    def _report_rate(self, tenant: Tenant, limit: int) -> None:
        self.tenancy.events.emit(
            QuotaRefused(tenant_id=tenant.id, slug=tenant.slug, resource=REQUEST_RATE, limit=limit, used=limit)
        )

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
        problem = problem_for(error, tenant=None if credential is None else credential.tenant)
        if problem is None:
            raise error
        if problem.status >= 500:
            logger.warning("answered %d: %s", problem.status, error)
        await problem(scope, connection.receive, connection.answer)


def _source(scope: Scope) -> str | None:
    client = scope.get("client")
    return None if client is None else client[0]
