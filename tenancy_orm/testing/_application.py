"""The application under test, and its ``Tenancy``: found from one ``module:attribute``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from traceback import extract_tb
from typing import Any

from starlette.types import ASGIApp

from ..config import TenancyConfig, values
from ..config.values import load_object
from ..errors import ConfigurationError
from ..tenancy import Tenancy

_DEEPEST = 12  # how many applications within each other are looked through


@dataclass(frozen=True, slots=True)
class Application:
    """What is tested: the ASGI application, where one is named, and its ``Tenancy``."""

    app: ASGIApp | None
    tenancy: Tenancy


def find(path: str, tenancy_path: str = "") -> Application:
    """Import the application under test.

    Args:
        path: ``module:attribute`` of an ASGI application, a function without arguments that returns one, a ``Tenancy``
            or a ``TenancyConfig``.
        tenancy_path: The same of the ``Tenancy``, where it cannot be found from the application.

    Raises:
        ConfigurationError: it cannot be imported, or its ``Tenancy`` is not found.
    """
    named = _made(_loaded(tenancy_path, "tenancy_object"), tenancy_path) if tenancy_path else None
    found = _made(_loaded(path, "tenancy_app"), path) if path else named
    if isinstance(named, TenancyConfig):
        named = Tenancy(named)
    if named is not None and not isinstance(named, Tenancy):
        raise ConfigurationError(f"tenancy_object = {tenancy_path!r} is a {type(named).__name__}, not a Tenancy")
    if isinstance(found, TenancyConfig):
        found = Tenancy(found)
    if isinstance(found, Tenancy):
        return Application(None, named or found)
    if not callable(found):
        raise ConfigurationError(
            f"tenancy_app = {path!r} is a {type(found).__name__}: name an ASGI application, a function that returns "
            "one, or a Tenancy"
        )
    return Application(found, named or _only(path, found))


def _loaded(path: str, setting: str) -> Any:
    """What a setting names.

    Raises:
        ConfigurationError: it cannot be imported; the message says where, as the frames are not shown.
    """
    try:
        return load_object(path)
    except ConfigurationError as exc:
        cause = exc.__cause__
        module = path.partition(":")[0]
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{module}.".startswith(f"{cause.name}."):
            where = '; set pythonpath = ["."] in the pytest configuration, or install the project'
        else:
            frames = extract_tb(cause.__traceback__) if cause is not None else []
            inner = next((one for one in reversed(frames) if "importlib" not in one.filename), None)
            where = f" ({inner.filename}, line {inner.lineno})" if inner and inner.filename != values.__file__ else ""
        raise ConfigurationError(f"{setting} = {exc}{where}") from exc


def _made(found: Any, path: str) -> Any:
    """What a function without arguments returns; anything else as it is."""
    if not (inspect.isfunction(found) or inspect.ismethod(found) or inspect.isclass(found)):
        return found
    parameters = inspect.signature(found).parameters.values()
    required = [one.name for one in parameters if one.default is one.empty and one.kind not in (2, 4)]
    if required:
        if len(required) == 3 and not inspect.isclass(found):  # scope, receive, send
            return found
        raise ConfigurationError(f"{path!r} takes the arguments {', '.join(required)}: name a function without any")
    if inspect.iscoroutinefunction(found):
        raise ConfigurationError(f"{path!r} is a coroutine function: name one that returns the application itself")
    return found()


def _only(path: str, app: Any) -> Tenancy:
    found = list({id(tenancy): tenancy for tenancy in _tenancies(app, _DEEPEST)}.values())
    if len(found) == 1:
        return found[0]
    what = "has no Tenancy that can be found" if not found else f"has {len(found)} Tenancy objects"
    raise ConfigurationError(
        f'the application {path!r} {what}: set tenancy_object = "module:attribute" in the pytest configuration'
    )


def _tenancies(app: Any, depth: int) -> Iterator[Tenancy]:
    """The ``Tenancy`` of the middleware, of the lifespan, of ``app.state``, and of mounted applications."""
    if app is None or depth == 0:
        return
    if isinstance(own := getattr(app, "tenancy", None), Tenancy):  # a TenancyMiddleware
        yield own
    for middleware in getattr(app, "user_middleware", ()):
        for value in (*middleware.args, *middleware.kwargs.values()):
            if isinstance(value, Tenancy):
                yield value
    for value in getattr(getattr(app, "state", None), "_state", {}).values():
        if isinstance(value, Tenancy):
            yield value
    router = getattr(app, "router", None)
    lifespan = getattr(router, "lifespan_context", None)
    if isinstance(owner := getattr(lifespan, "__self__", None), Tenancy):
        yield owner
    for route in getattr(router, "routes", ()):
        yield from _tenancies(getattr(route, "app", None) if hasattr(route, "routes") else None, depth - 1)
    yield from _tenancies(getattr(app, "app", None), depth - 1)


__all__ = ["Application", "find"]
