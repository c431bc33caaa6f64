"""The WSGI middleware: what ``TenancyMiddleware`` decides, for applications that threads serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import Context, copy_context
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from sqlalchemy.exc import DBAPIError
from starlette.types import Scope

from ..asgi.authenticators import ApiKeyAuthenticator, Authenticator
from ..asgi.middleware import CREDENTIAL, TenancyMiddleware
from ..asgi.resolvers import Resolver
from ..asgi.scopes import check_scopes
from ..authentication.credential import Credential
from ..context import set_current
from ..correlation import set_labels
from ..deadlines import set_deadline
from ..errors import ConfigurationError, TenancyError
from ..routing.consistency import set_consistency
from ..routing.outage import lost_server
from ..sync.hops import Answer, Hops
from ..sync.tenancy import hops_of
from .environ import adapt, scope_of
from .exchange import Admitted, Exchange, HeaderList, Response, stand_in

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from ..tenancy import Tenancy

ENVIRON_CREDENTIAL: Final = "tenancy.credential"
"""Key of a WSGI environ: the ``Credential`` of the request, or None where it has none."""

_ERROR: Final = "tenancy.error"


class TenancyWSGIMiddleware:
    """Binds each request to the tenant of its credential, for WSGI applications such as Flask.

    Each request is decided by ``tenancy_orm.asgi.TenancyMiddleware``, in the event loop: the same credentials,
    resolvers, paths, refusals, rates, lock-out, events and audit log. The application then runs in the server's thread.
    There ``current_tenant()`` and ``tenancy.sync.session()`` are the tenant's, also while the response is iterated.

    The application runs in a context of its own for each request. So nothing that it binds is left in the thread for
    the next one, also where the server does not exhaust or close the response.

    A response in several parts is cut short when its credential is no longer valid: asked before each part.

    Where no event loop has the ``Tenancy`` open, the first request of each process opens ``tenancy.sync``.

    Args:
        app: The application.
        tenancy: The ``Tenancy`` that serves the requests.
        authenticators: As in ``TenancyMiddleware``. The environ is ``connection.scope["wsgi.environ"]``.
        resolvers: As in ``TenancyMiddleware``; so are all that follow.
        exempt: Paths that need no credential.
        public: Paths of visitors.
        without_tenant: Paths that bind no tenant.
        trusted_origins: Further origins that may use a cookie.
        operators: Whether a request is an operator's.
        map_errors: Whether errors are answered by problem documents.
        deadline: How long a request would wait for connections, in seconds.
        request_id: Whether each request has an id.
        consistency_header: The name of a header with a consistency token.
        consistency_cookie: The name of a cookie with one.

    Raises:
        ConfigurationError: a path, a resolver, an authenticator, an origin, a deadline or ``request_id`` is
            malformed.
        MissingExtraError: psycopg is not installed.
    """

    def __init__(
        self,
        app: WSGIApplication,
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
        self._sync = tenancy.sync
        self.middleware = TenancyMiddleware(
            stand_in,
            tenancy=tenancy,
            authenticators=authenticators,
            resolvers=resolvers,
            exempt=exempt,
            public=public,
            without_tenant=without_tenant,
            trusted_origins=trusted_origins,
            operators=operators,
            map_errors=map_errors,
            deadline=deadline,
            request_id=request_id,
            consistency_header=consistency_header,
            consistency_cookie=consistency_cookie,
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        if not self._sync.is_open:
            self._sync.open()
        hops = hops_of(self._sync)
        scope = scope_of(environ)
        exchange = Exchange(self.middleware, scope)
        decided: Answer[Admitted | Response] = Answer(lambda _: exchange.finish())
        hops.put(decided, exchange.begin, decided)
        decision = hops.wait(decided)
        if isinstance(decision, Response):
            _start(start_response, decision)
            return [decision.body]
        environ[ENVIRON_CREDENTIAL] = scope[CREDENTIAL]
        adapt(environ, scope)
        context = copy_context()
        context.run(set_current, decision.tenant)
        context.run(set_labels, decision.labels)
        if self.middleware.deadline is not None:
            context.run(set_deadline, self.middleware.deadline)
        context.run(set_consistency, decision.consistency)
        return _Serving(
            hops, exchange, context, environ, start_response, has_request_id=decision.labels is not None
        ).serve(self.app)


class _Serving:
    """The response of an application, as the server iterates it; every step of the application runs in ``context``."""

    def __init__(
        self,
        hops: Hops,
        exchange: Exchange,
        context: Context,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        *,
        has_request_id: bool,
    ) -> None:
        self._hops = hops
        self._exchange = exchange
        self._context = context
        self._environ = environ
        self._start_response = start_response
        self._has_request_id = has_request_id
        self._given: tuple[str, list[tuple[str, str]]] | None = None
        self._started = False
        self._write: Callable[[bytes], object] | None = None
        self._parts: Iterable[bytes] = ()
        self._iterator: Iterator[bytes] = iter(())
        self._first: list[bytes] = []
        self._closed = False

    def serve(self, app: WSGIApplication) -> Iterable[bytes]:
        """Call the application, and return what the server iterates: up to its first part now, so that it has started.

        A ``TenancyError`` before that is answered by the middleware, and so may be the loss of a connection.
        """
        try:
            self._parts = self._context.run(app, self._environ, self._begin)
            self._iterator = self._context.run(iter, self._parts)
            for part in self._next():
                self._first.append(part)
                if self._given is not None:
                    break
            error = self._environ.get(_ERROR)
            if error is not None and not self._started:
                raise error
            self._commit()
        except TenancyError as error:
            if self._started:
                self.close()
                raise
            return self._refuse(error)
        except DBAPIError as error:
            if self._started or lost_server(error) is None:
                self.close()
                raise
            return self._refuse(error)
        except BaseException:
            self.close()
            raise
        return self

    def __iter__(self) -> Iterator[bytes]:
        """Return the parts of the body."""
        first, self._first = self._first, []
        yield from first
        for part in self._next():
            self._may_send()
            yield part

    def close(self) -> None:
        """End the request."""
        if self._closed:
            return
        self._closed = True
        self._hops.post(self._exchange.finish)
        close = getattr(self._parts, "close", None)
        if close is not None:
            self._context.run(close)

    def __del__(self) -> None:
        """Close, in the request's context: the server need not close what it has not exhausted."""
        self.close()

    def _next(self) -> Iterator[bytes]:
        missing = object()
        while (part := self._context.run(next, self._iterator, missing)) is not missing:
            yield cast("bytes", part)

    def _begin(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Callable[[bytes], object]:
        """``start_response``, as the application calls it: the server's own is called once its headers are known."""
        if exc_info is not None:
            try:
                if self._started:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None
        elif self._given is not None:
            raise AssertionError("start_response was called twice without exc_info")
        self._given = (status, list(headers))
        return self._written

    def _written(self, part: bytes) -> None:
        self._commit()
        assert self._write is not None  # noqa: S101 - for the type checker: set by the line above
        self._may_send()
        self._write(part)

    def _commit(self) -> None:
        if self._started:
            return
        if self._given is None:
            raise AssertionError("the application has not called start_response")
        status, headers = self._given
        if self._has_request_id:
            # the middleware replaces it by its own
            headers = [(name, value) for name, value in headers if name.lower() != "x-request-id"]
        answer: Answer[Response] = Answer()
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._hops.put(answer, self._exchange.start, answer, int(status.split()[0]), encoded)
        response = self._hops.wait(answer)
        if response.is_own:
            # the admission has ended since
            self._write = _start(self._start_response, response)
            self._first = [response.body]
            self._iterator = iter(())
        else:
            self._write = self._start_response(status, [*headers, *_decoded(response.headers[len(encoded) :])])
        self._started = True

    def _may_send(self) -> None:
        answer: Answer[None] = Answer()
        self._hops.put(answer, self._exchange.part, answer)
        self._hops.wait(answer)

    def _refuse(self, error: TenancyError | DBAPIError) -> Iterable[bytes]:
        answer: Answer[Response] = Answer()
        self._hops.put(answer, self._exchange.fail, answer, error)
        try:
            response = self._hops.wait(answer)
        finally:
            self.close()
        _start(self._start_response, response)
        return [response.body]


def _start(start_response: StartResponse, response: Response) -> Callable[[bytes], object]:
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "Unknown"
    return start_response(f"{response.status} {phrase}", _decoded(response.headers))


def _decoded(headers: HeaderList) -> list[tuple[str, str]]:
    return [(name.decode("latin-1").title(), value.decode("latin-1")) for name, value in headers]


def credential_of(environ: WSGIEnvironment) -> Credential | None:
    """Return the credential that a request was admitted with; None on an exempt path.

    Raises:
        ConfigurationError: the request did not pass through ``TenancyWSGIMiddleware``.
    """
    try:
        credential: Credential | None = environ[ENVIRON_CREDENTIAL]
    except KeyError:
        raise ConfigurationError("the request did not pass TenancyWSGIMiddleware: wrap the application in it") from None
    return credential


def demand_scopes(environ: WSGIEnvironment, *scopes: str) -> Credential:
    """Return the request's credential if it has all ``scopes``. One with the scope ``*`` has every scope.

    Without ``scopes`` any credential is enough, but a visitor's.

    Raises:
        InvalidCredentialError: the request has no credential, or is a visitor's.
        MissingScopeError: its credential lacks one of them.
    """
    return check_scopes(credential_of(environ), scopes)


def answer_with(environ: WSGIEnvironment, error: TenancyError | DBAPIError) -> tuple[str, int]:
    """Have the middleware answer with the problem document of ``error``, whatever the framework makes of it.

    Flask turns exceptions into answers itself. So its error handler calls this, and returns what it returns. Of a
    ``DBAPIError``, give it those with ``connection_invalidated``: the middleware raises what has no such document.

    Example:
        >>> @app.errorhandler(TenancyError)
        ... def refused(error):
        ...     return answer_with(request.environ, error)
    """
    environ[_ERROR] = error
    return "", 500


__all__ = ["ENVIRON_CREDENTIAL", "TenancyWSGIMiddleware", "answer_with", "credential_of", "demand_scopes"]
