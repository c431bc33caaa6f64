"""The middleware: binds every request to the tenant of its credential, or to none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from sqlalchemy.exc import DBAPIError
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from ..authentication.admission import tenant_for_source
from ..authentication.credential import Credential
from ..context import _current, close_generators_unbound, reset_current
from ..correlation import attach_labels, reset_labels, set_labels
from ..deadlines import check_deadline, reset_deadline, set_deadline
from ..errors import (
    CrossTenantError,
    ServerUnavailableError,
    TenancyError,
    TenantNotAllowedError,
    TenantNotNamedError,
    TooManyAttemptsError,
)
from ..events import OperatorAdmitted, QuotaRefused
from ..postgres.errors import without_detail
from ..quotas.overrides import REQUEST_RATE
from ..quotas.rates import Allowed, Denied
from ..registry.lifecycle import check_revision, check_usable
from ..routing.consistency import Consistency, reset_consistency, set_consistency
from ..routing.outage import lost_server
from ..tenant import Status, Tenant
from .authenticators import ApiKeyAuthenticator, Authenticator
from .callers import PUBLIC, Callers, source_of
from .connection import WatchedConnection
from .consistency import ConsistencyTransport
from .exempt import ExemptPaths
from .preflight import Preflights
from .problems import ADDRESS_LIMITED, RATE_LIMITED, problem_for, rate_headers
from .proxies import ProxyWarning
from .refusals import RefusalLog
from .request_ids import RequestIds
from .resolvers import Headers, Resolver

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
        exempt: Paths that need no credential: ``/healthz``, ``/static/*``. No tenant is bound there, whatever the
            request carries.
        public: Paths that visitors use, and webhooks: ``/p/*``. The tenant that host or path names is bound to a
            credential of kind "anonymous", without scopes; what credential the request has is not read. Rated by
            address. A tenant that does not exist, or is suspended, is answered by 404 alike.
        without_tenant: Paths that need a credential and bind no tenant: a list of the tenants that a person may use.
        trusted_origins: Origins of further pages that may use a cookie to change something: ``https://app.example.com``
            where the application itself is at another host.
        operators: Called with the scope and the credential of a request to a tenant in maintenance; returns whether it
            is an operator's. An operator's request and its sessions are served, and ``OperatorAdmitted`` is emitted.
            Without it nobody is served during maintenance: no scope of a credential makes a request an operator's.
        map_errors: Whether a ``TenancyError`` that the application raises before its response has started is
            answered by a problem document, where there is one for it; and so is a ``DBAPIError`` of a connection that
            was lost to a tenant's server, while its breaker is open. Other errors pass unchanged.
        deadline: How long a request would wait for connections, in seconds from its start, if that is less than
            ``pool.checkout_timeout``: give what its client waits for. None is no deadline. Websockets have none.
        request_id: Whether each request has an id: ``current_request_id()``, in logs, in the ``X-Request-ID`` of the
            answer and in problem documents. True takes the ``X-Request-ID`` of the request where it is 1 to 128
            letters, digits and ``._:@/+-``, else makes one; "new" always makes one.
        consistency_header: The name of a header that holds a consistency token: in the answer of each request that has
            committed something, one more round trip; and in later requests, of which the reads on replicas then see
            that. None for no header.
        consistency_cookie: The name of a cookie that does the same for browsers.

    Raises:
        ConfigurationError: a path, a resolver, an authenticator, an origin, a deadline, ``request_id`` or the name of a
            header or cookie is malformed.
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
        deadline: float | None = None,
        request_id: bool | Literal["new"] = False,
        consistency_header: str | None = None,
        consistency_cookie: str | None = None,
    ) -> None:
        self.app = app
        self.tenancy = tenancy
        self.map_errors = map_errors
        self.deadline = None if deadline is None else check_deadline(deadline)
        self.operators = operators
        self.exempt = ExemptPaths(exempt)
        self.callers = Callers(
            tenancy,
            authenticators=authenticators,
            resolvers=resolvers,
            public=public,
            without_tenant=without_tenant,
            trusted_origins=trusted_origins,
        )
        self.preflights = Preflights(app)
        self.proxy_warning = ProxyWarning()
        self._refusals = RefusalLog()
        self._request_ids = RequestIds(request_id) if request_id else None
        self._tokens: ConsistencyTransport | None = None
        if consistency_header is not None or consistency_cookie is not None:
            self._tokens = ConsistencyTransport(tenancy, header=consistency_header, cookie=consistency_cookie)
        self._tenant_resolvers = self.callers.tenant_resolvers
        self._adapting = self.callers.adapting
        self._needs_check = bool(self._tenant_resolvers or self._adapting)
        self._keys_first, self._keys_alone = self.callers.keys_first, self.callers.keys_alone
        self._special_paths = self.callers.has_special_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        token = _bind(None)
        connection = WatchedConnection(receive, send)
        labels = labelled = noted = None
        if self._request_ids is not None:
            connection.labels = labels = self._request_ids.labels_of(scope)
            labelled = set_labels(labels)
        admitted = False
        deadline = set_deadline(self.deadline) if self.deadline is not None and kind == "http" else None
        try:
            scope[TENANCY] = self.tenancy
            scope[CREDENTIAL] = None
            if not self.exempt.covers(scope):
                if kind == "http" and scope["method"] == "OPTIONS" and (answer := self.preflights.answer(scope)):
                    await answer(scope, connection.receive, connection.send)
                    return
                callers, internals = self.callers, self.tenancy.internals
                directory = internals.directory
                headers = callers.read_headers(scope)
                client = scope.get("client")
                source = client[0] if client else None
                path = callers.special_path(scope) if self._special_paths else None
                if path is PUBLIC:
                    rate = internals.rates.acquire_address(source)
                    if await self._limited(rate, "address", scope, connection):
                        return
                    credential = await callers.admit_visitor(scope, headers)
                else:
                    key = callers.read_key(scope, headers, directory) if self._keys_first else None
                    if key is None or not (self._keys_alone or directory.is_key(key)):
                        credential = await callers.admit(scope, headers, source, key, with_tenant=path is None)
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
                    callers.refuse_named(credential, scope, headers, source)
                    for adapting in self._adapting:
                        adapting.adapt_scope(scope)
                    scope[CREDENTIAL] = credential
                    connection.admitted = (None, scope, self.tenancy)
                else:
                    if (
                        self._needs_check
                        or (tenant.status is not _ACTIVE and tenant.status is not _TRIAL)
                        or tenant.revision_refusal is not None
                    ):
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
                    if internals.router.reads_replicas:
                        noted = set_consistency(
                            Consistency(tenant.id)
                            if self._tokens is None
                            else self._tokens.begin(tenant, scope, connection)
                        )
                    if labels is not None:
                        labels.tenant = tenant
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
        except DBAPIError as error:
            if labels is not None:
                attach_labels(labels, error)
            away = None if connection.started or not self.map_errors else self._server_away(error)
            if away is None:
                raise
            # nobody further out logs it, since it is answered
            logger.error(
                "a connection to server %s was lost during a request", away.server, exc_info=without_detail(error)
            )
            await self._answer(away, scope, connection, admitted=admitted)
        except BaseException as error:
            if labels is not None:
                attach_labels(labels, error)
            raise
        finally:
            reset_current(token)
            if deadline is not None:
                reset_deadline(deadline)
            if labelled is not None:
                reset_labels(labelled)
            if noted is not None:
                reset_consistency(noted)
            if connection.watched:
                await connection.release()

    # --- checking ---------------------------------------------------------------------------------------------------

    def _check(self, scope: Scope, headers: Headers, credential: Credential, tenant: Tenant) -> str | None:
        """Refuse what the credential does not admit. Returns a URL to redirect to where a former slug is claimed."""
        redirect = None
        if tenant.status is not _ACTIVE and tenant.status is not _TRIAL:
            if tenant.status in _GONE:
                raise self.callers.rejected(
                    scope, tenant.status.value, kind=credential.kind, credential_id=credential.public_id
                )
            check_usable(tenant, operator=self._is_operator_request(scope, credential, tenant))
        for resolver in self._tenant_resolvers:
            claimed = resolver.claimed_tenant(scope, headers)
            if claimed is not None and not resolver.matches(claimed, tenant):
                self.tenancy.internals.directory.report_cross_tenant(
                    credential, claimed, resolver.name, source_of(scope)
                )
                raise CrossTenantError("a request", bound=tenant.slug, requested=claimed)
            if claimed is not None and redirect is None:
                redirect = resolver.redirect_url(scope, claimed, tenant)
        for adapting in self._adapting:
            adapting.adapt_scope(scope)
        # an operator's request, too: the same code serves it
        check_revision(tenant)
        return redirect

    def _is_operator_request(self, scope: Scope, credential: Credential, tenant: Tenant) -> bool:
        """Whether a request to a tenant in maintenance is an operator's."""
        if tenant.status is not _MAINTENANCE or self.operators is None or not self.operators(scope, credential):
            return False
        self.tenancy.events.emit(
            OperatorAdmitted(
                tenant_id=tenant.id, slug=tenant.slug, credential_id=credential.public_id, source=source_of(scope)
            )
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
        else:
            self.proxy_warning.check(scope)
        problem = RATE_LIMITED if tenant is not None else ADDRESS_LIMITED
        await problem(scope, connection.receive, connection.send)
        return True

    def _server_away(self, error: DBAPIError) -> ServerUnavailableError | None:
        """Return the answer to a lost connection where the tenant's server does not answer now; None otherwise."""
        name = lost_server(error)
        if name is None:
            return None
        found = self.tenancy.internals.servers.get(name.partition("/")[0])
        servers = () if found is None else (found, *found.replicas)
        breaker = next((one.breaker for one in servers if one.name == name), None)
        return breaker.error() if breaker is not None and breaker.is_open else None

    async def _answer(
        self, error: TenancyError, scope: Scope, connection: WatchedConnection, *, admitted: bool
    ) -> None:
        if connection.labels is not None:
            attach_labels(connection.labels, error)
        credential: Credential | None = scope[CREDENTIAL]
        if credential is not None and isinstance(error, CrossTenantError):
            # something in the request that the application read itself named another tenant
            self.tenancy.internals.directory.report_cross_tenant(
                credential, error.requested or "*", "application", source_of(scope)
            )
        if isinstance(error, TooManyAttemptsError):
            self.proxy_warning.check(scope)
        if connection.started:
            if scope["type"] == "websocket" and connection.ended and type(error) is type(connection.ended.error):
                return  # it was closed for this reason already
            raise error
        if admitted and not self.map_errors and connection.ended is None:
            raise error
        if not admitted and not connection.headers and isinstance(error, (TenantNotAllowedError, TenantNotNamedError)):
            # the credential is valid, so no lock-out counts it; and it has no tenant with a rate that does
            rate = self.tenancy.internals.rates.acquire_address(source_of(scope))
            if await self._limited(rate, "address", scope, connection):
                return
        problem = problem_for(error, tenant=None if credential is None else credential.bound)
        if problem is None:
            raise error
        if problem.status >= 500:
            bound = None if credential is None else credential.bound
            self._refusals.add(problem.code, problem.status, error, "" if bound is None else bound.slug)
        await problem(scope, connection.receive, connection.answer)
