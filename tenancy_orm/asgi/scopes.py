"""Scopes of credentials: rights that a route can demand."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from ..authentication.credential import Credential
from ..errors import ConfigurationError, InvalidCredentialError
from .middleware import CREDENTIAL

P = ParamSpec("P")
T = TypeVar("T")


class Connection(Protocol):
    """A request or websocket of Starlette, or of another framework on ASGI."""

    @property
    def scope(self) -> Any:
        """The ASGI scope."""


def credential_of(connection: Connection) -> Credential | None:
    """Return the credential that a request or websocket was admitted with; None on an exempt path.

    Where there must be one, ``demand_scopes(connection)`` returns it, and never None.

    Raises:
        ConfigurationError: the request did not pass through ``TenancyMiddleware``.
    """
    try:
        credential: Credential | None = connection.scope[CREDENTIAL]
    except KeyError:
        raise ConfigurationError("the request did not pass TenancyMiddleware: add it to the application") from None
    return credential


def demand_scopes(connection: Connection, *scopes: str) -> Credential:
    """Return the request's credential if it has all ``scopes``. One with the scope ``*`` has every scope.

    Without ``scopes`` any credential is enough, but a visitor's.

    Raises:
        InvalidCredentialError: the request has no credential, or is a visitor's.
        MissingScopeError: its credential lacks one of them.
    """
    return check_scopes(credential_of(connection), scopes)


def check_scopes(credential: Credential | None, scopes: Iterable[str]) -> Credential:
    """Return a request's credential if it has all ``scopes``; see ``demand_scopes``.

    Raises:
        InvalidCredentialError, MissingScopeError: as ``demand_scopes``.
    """
    if credential is None or credential.kind == "anonymous":
        raise InvalidCredentialError("missing")
    for scope in scopes:
        credential.require_scope(scope)
    return credential


def require_scope(*scopes: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a Starlette endpoint so that it demands all ``scopes`` of the request's credential.

    The endpoint is a function or method with a parameter ``request`` or ``websocket``. A request without one of the
    scopes gets 403; a websocket is refused before it is accepted.

    Raises:
        ConfigurationError: (when decorating) no scope is given, or the endpoint has no such parameter.

    Example:
        >>> @require_scope("orders:write")
        ... async def create_order(request): ...
    """
    if not scopes:
        raise ConfigurationError("require_scope needs at least one scope")

    def decorate(endpoint: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(endpoint)
        name = next((name for name in signature.parameters if name in ("request", "websocket")), None)
        if name is None:
            raise ConfigurationError(f"{endpoint!r} has no parameter named request or websocket")
        position = list(signature.parameters).index(name)

        def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            demand_scopes(kwargs[name] if name in kwargs else args[position], *scopes)

        if inspect.iscoroutinefunction(endpoint):

            @wraps(endpoint)
            async def checked(*args: P.args, **kwargs: P.kwargs) -> Any:
                check(args, kwargs)
                return await cast(Callable[P, Awaitable[Any]], endpoint)(*args, **kwargs)

            return cast(Callable[P, T], checked)

        @wraps(endpoint)
        def checked_sync(*args: P.args, **kwargs: P.kwargs) -> T:
            check(args, kwargs)
            return endpoint(*args, **kwargs)

        return checked_sync

    return decorate
