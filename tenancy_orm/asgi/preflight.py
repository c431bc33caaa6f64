"""CORS preflights: requests of browsers that carry no key, and ask whether they may send one that does."""

from __future__ import annotations

import logging
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Scope

logger = logging.getLogger("tenancy_orm.asgi")

_ORDER = "put CORSMiddleware outside TenancyMiddleware: with add_middleware, add it after"


class Preflights:
    """Says which requests are preflights that a ``CORSMiddleware`` inside answers, so that no route is reached.

    Args:
        app: The application that ``TenancyMiddleware`` wraps.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._warned = False

    def are_answered(self, scope: Scope) -> bool:
        """Whether this OPTIONS request is a preflight, and a ``CORSMiddleware`` inside will answer it.

        The condition for a preflight is that of ``CORSMiddleware``: anything else it would pass on, to a route.
        """
        names = {name for name, _ in scope["headers"]}
        if not {b"origin", b"access-control-request-method"} <= names:
            return False
        answered = _has_cors(self._app)
        if not self._warned:
            self._warned = True
            logger.warning(
                "browsers cannot read refusals such as 401, which have no CORS headers; %s"
                if answered
                else "a CORS preflight is refused, since it has no key; %s",
                _ORDER,
            )
        return answered


def _has_cors(app: Any) -> bool:
    """Whether an application, or what it wraps before its routes, is a ``CORSMiddleware``."""
    while app is not None:
        if _is_cors(type(app)):
            return True
        if isinstance(app, Starlette) and any(_is_cors(middleware.cls) for middleware in app.user_middleware):
            return True
        app = getattr(app, "app", None)
    return False


def _is_cors(kind: Any) -> bool:
    # a subclass that answers in another way may pass preflights on
    return isinstance(kind, type) and issubclass(kind, CORSMiddleware) and kind.__call__ is CORSMiddleware.__call__
