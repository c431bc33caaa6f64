"""CORS preflights: requests of browsers that carry no credential, and ask whether they may send one that does."""

from __future__ import annotations

import logging
from typing import Any, cast

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

logger = logging.getLogger("tenancy_orm.asgi")

_ORDER = "put CORSMiddleware outside TenancyMiddleware: with add_middleware, add it after"


class Preflights:
    """Answers preflights as a ``CORSMiddleware`` inside does.

    It is asked for its answer, and the request goes no further: what stands between the two, a router for example, may
    not lead to it on every path.

    Args:
        app: The application that ``TenancyMiddleware`` wraps.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._warned = False

    def answer(self, scope: Scope) -> Response | None:
        """Return the answer to this OPTIONS request; None if it is no preflight, or there is no ``CORSMiddleware``.

        The condition for a preflight is that of ``CORSMiddleware``: anything else it would pass on, to a route.
        """
        names = {name for name, _ in scope["headers"]}
        if not {b"origin", b"access-control-request-method"} <= names:
            return None
        cors = _find_cors(self._app)
        if not self._warned:
            self._warned = True
            logger.warning(
                "a CORS preflight is refused, since it has no credential; %s"
                if cors is None
                else "browsers cannot read refusals such as 401, which have no CORS headers; %s",
                _ORDER,
            )
        return None if cors is None else cors.preflight_response(request_headers=Headers(scope=scope))


def _find_cors(app: Any) -> CORSMiddleware | None:
    """Return the ``CORSMiddleware`` that an application is, or that it has before its routes."""
    while app is not None:
        if _is_cors(type(app)):
            found: CORSMiddleware = app
            return found
        if isinstance(app, Starlette):
            for middleware in app.user_middleware:
                if _is_cors(middleware.cls):
                    made: Any = middleware.cls
                    return cast("CORSMiddleware", made(app, *middleware.args, **middleware.kwargs))
        app = getattr(app, "app", None)
    return None


def _is_cors(kind: Any) -> bool:
    # a subclass that answers in another way may pass preflights on
    return isinstance(kind, type) and issubclass(kind, CORSMiddleware) and kind.__call__ is CORSMiddleware.__call__
