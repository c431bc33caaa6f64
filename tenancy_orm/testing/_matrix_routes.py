"""The routes of an ASGI application, whatever framework has made it: Starlette, FastAPI, Litestar.

Nothing of a framework besides Starlette is imported: what is read are the attributes that its routes have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from starlette.endpoints import HTTPEndpoint
from starlette.routing import Host, Mount

from ..asgi.authenticators import ApiKeyAuthenticator
from ..asgi.middleware import TenancyMiddleware
from ..asgi.resolvers import ApiKeyHeader, BearerToken, KeyResolver, PathPrefixResolver, TenantResolver

WEBSOCKET: Final = "WEBSOCKET"
"""What stands where the method does, for a websocket."""

JSON: Final = "application/json"
FORMS: Final = ("application/x-www-form-urlencoded", "multipart/form-data")

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_PARAMETER = re.compile(r"{([^{}:]*)(?::([^{}]*))?}")
# where middleware and wrappers keep the application that they wrap
_INNER = ("app", "_app", "middleware_stack", "asgi_handler", "application", "wrapped")
_DEPTH = 8


@dataclass(frozen=True)
class Route:
    """One method of one path.

    Args:
        method: ``GET``; ``WEBSOCKET`` for a websocket.
        path: As the application writes it, without convertors: ``/notes/{id}``.
        parameters: The convertor of each parameter in the path: ``str``, ``int``, ``uuid``, ``path``.
        query: The JSON schema of each parameter in the query that the OpenAPI document names.
        headers: The JSON schema of each header that it names.
        body: The JSON schema of the body, where the document has one.
        media: The content type of the body.
        host: The host that it is served at, where it is served at one alone.
        is_provided: Whether the framework has made it, as FastAPI its pages of documentation.
    """

    method: str
    path: str
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False, repr=False)
    headers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False, repr=False)
    body: Mapping[str, Any] | None = field(default=None, hash=False, repr=False)
    media: str = JSON
    host: str | None = None
    is_provided: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def changes(self) -> bool:
        """Whether its method is one that changes things."""
        return self.method not in ("GET", "HEAD", WEBSOCKET)

    def fill(self, values: Mapping[str, object]) -> str:
        """Return the path with a value for each parameter."""
        return _PARAMETER.sub(lambda found: str(values[found[1]]), self.path)

    def noun(self, parameter: str) -> str | None:
        """Return what an ``id`` in the path is one of: the part of the path before it."""
        before = self.path.partition("{" + parameter + "}")[0].rstrip("/").rpartition("/")[2]
        return before if before and "{" not in before else None


def routes_of(app: Any) -> list[Route]:
    """Return all routes: those of mounted applications and included routers too, in the application's order."""
    found: dict[Route, None] = {}
    for route in _walk(app, "", None, _DEPTH):
        found.setdefault(route)
    return list(found)


def resolvers_of(app: Any) -> tuple[TenantResolver, ...]:
    """Return where the application's middleware reads the tenant that a request names."""
    found = _middleware_of(app)
    if found is not None:
        return found.callers.tenant_resolvers
    for options in _configured(app):
        return tuple(one for one in options.get("resolvers", ()) if isinstance(one, TenantResolver))
    return ()


def key_header_of(app: Any) -> tuple[str, str] | None:
    """Return the header that the application reads API keys from, and what stands before the key; None if in none."""
    found = _middleware_of(app)
    if found is not None:
        authenticators: Iterable[Any] = found.callers.authenticators
    else:
        options = next(_configured(app), {})
        given = [one for one in options.get("resolvers", ()) if isinstance(one, KeyResolver)]
        authenticators = options.get("authenticators") or (ApiKeyAuthenticator(*given),)
    keys = next((one for one in authenticators if isinstance(one, ApiKeyAuthenticator)), None)
    for resolver in () if keys is None else keys.resolvers:
        if isinstance(resolver, ApiKeyHeader):
            return resolver.name, ""
        if isinstance(resolver, BearerToken):
            return "Authorization", "Bearer "
    return None


def inner_path(path: str, resolvers: Iterable[TenantResolver]) -> str:
    """Return a path without the part that names the tenant."""
    for resolver in resolvers:
        if isinstance(resolver, PathPrefixResolver):
            path = resolver.inner_path(path)
    return path


# --- wrappers ---------------------------------------------------------------------------------------------------------


def _layers(app: Any) -> Iterator[Any]:
    """Every application within another one, from the outside in: it, and what its middleware wraps."""
    waiting, seen = [app], set[int]()
    while waiting and len(seen) < 100:
        one = waiting.pop(0)
        if one is None or id(one) in seen or isinstance(one, (str, bytes, type)):
            continue
        seen.add(id(one))
        yield one
        waiting += [vars(one).get(name) for name in _INNER] if hasattr(one, "__dict__") else []
        slots = [name for name in _INNER if name in getattr(type(one), "__slots__", ())]
        waiting += [getattr(one, name, None) for name in slots]


def _middleware_of(app: Any) -> TenancyMiddleware | None:
    return next((one for one in _layers(app) if isinstance(one, TenancyMiddleware)), None)


def _configured(app: Any) -> Iterator[Mapping[str, Any]]:
    """The arguments of a ``TenancyMiddleware`` that the application adds to each of its routes."""
    for one in _layers(app):
        for added in (*getattr(one, "user_middleware", ()), *(getattr(one, "middleware", None) or ())):
            cls = getattr(added, "cls", None) or getattr(added, "middleware", None)
            if isinstance(cls, type) and issubclass(cls, TenancyMiddleware):
                yield getattr(added, "kwargs", {})


# --- routes -----------------------------------------------------------------------------------------------------------


def _walk(app: Any, prefix: str, host: str | None, depth: int) -> Iterator[Route]:
    routed = next((one for one in _layers(app) if _routes(one) is not None), None)
    if routed is None:
        # a file server, or an application of nobody knows which routes
        yield Route("GET", f"{prefix}/{{path}}", {"path": "path"}, host=host)
        return
    operations = _operations(routed)
    for route in _routes(routed) or ():
        yield from _expand(route, prefix, host, operations, depth)


def _routes(app: Any) -> list[Any] | None:
    found = getattr(app, "routes", None)
    return list(found) if isinstance(found, (list, tuple)) else None


def _expand(route: Any, prefix: str, host: str | None, operations: Mapping[Any, Any], depth: int) -> Iterator[Route]:
    # a router that FastAPI includes says its routes with the paths that they have in the application
    included = getattr(route, "effective_route_contexts", None)
    if callable(included):
        for context in included():
            yield from _expand(getattr(context, "starlette_route", None) or context, prefix, host, operations, depth)
        return
    if isinstance(route, Host) or (isinstance(route, Mount) and depth):
        path = prefix + _plain(getattr(route, "path", ""))
        inside = route.host if isinstance(route, Host) else host
        parameters = {name: _kind(one) for name, one in route.param_convertors.items() if name != "path"}
        if _routes(route):
            # not by the application's own layers: the mount's routes are those of what its middleware wraps
            served = getattr(route, "_base_app", route.app)
            found: Iterable[Route] = _walk(served, path, inside, depth - 1)
        else:
            found = _walk(route.app, path, inside, depth - 1)
        for inner in found:
            yield _with_parameters(inner, {} if isinstance(route, Host) else parameters)
        return
    own = getattr(route, "path", None)
    if isinstance(own, str):
        yield from _methods(route, prefix, own, host, operations)


def _methods(route: Any, prefix: str, path: str, host: str | None, operations: Mapping[Any, Any]) -> Iterator[Route]:
    plain = _plain(path)
    parameters = {one[1]: one[2] or "str" for one in _PARAMETER.finditer(path)}
    is_provided = (getattr(getattr(route, "endpoint", None), "__module__", None) or "").startswith("fastapi.")
    for method in _methods_of(route):
        operation = operations.get((method, plain)) or (method == "HEAD" and operations.get(("GET", plain))) or None
        body, media = (None, JSON) if operation is None else operation.body
        query, headers = ({}, {}) if operation is None else (operation.query, operation.headers)
        full = prefix + plain or "/"
        yield Route(method, full, parameters, query, headers, body, media, host, is_provided)


def _methods_of(route: Any) -> list[str]:
    kind = str(getattr(getattr(route, "scope_type", None), "value", ""))
    if kind == "websocket" or (not hasattr(route, "methods") and "websocket" in type(route).__name__.lower()):
        return [WEBSOCKET]
    methods = getattr(route, "methods", None)
    endpoint = getattr(route, "endpoint", None)
    if not methods and isinstance(endpoint, type) and issubclass(endpoint, HTTPEndpoint):
        methods = [name for name in _METHODS if hasattr(endpoint, name.lower())]
        methods += ["HEAD"] if "GET" in methods and "HEAD" not in methods else []
    elif not methods:
        # an ASGI application as an endpoint: it takes all
        methods = _METHODS if callable(endpoint) or not kind else ["GET"]
    order = {name: number for number, name in enumerate(_METHODS)}
    return sorted((name for name in map(str, methods) if name != "OPTIONS"), key=lambda name: order.get(name, 9))


def _with_parameters(route: Route, more: Mapping[str, str]) -> Route:
    return replace(route, parameters={**more, **route.parameters}) if more else route


def _plain(path: str) -> str:
    return _PARAMETER.sub(lambda found: "{" + found[1] + "}", path).rstrip("/") or ("/" if path == "/" else "")


def _kind(convertor: object) -> str:
    return type(convertor).__name__.removesuffix("Convertor").lower().replace("string", "str").replace("integer", "int")


# --- the OpenAPI document ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operation:
    query: Mapping[str, Mapping[str, Any]]
    headers: Mapping[str, Mapping[str, Any]]
    body: tuple[Mapping[str, Any] | None, str]


def _operations(app: Any) -> dict[tuple[str, str], _Operation]:
    """What the application's own OpenAPI document says of each method of each path."""
    document = _document(app)
    found = {}
    for path, methods in document.get("paths", {}).items():
        shared = methods.get("parameters", ())
        for method, operation in methods.items():
            if not isinstance(operation, Mapping):
                continue
            described = [_resolved(one, document) for one in (*shared, *operation.get("parameters", ()))]
            query, headers = (
                {one["name"]: one.get("schema", {}) for one in described if one.get("in") == place}
                for place in ("query", "header")
            )
            found[method.upper(), path.rstrip("/") or "/"] = _Operation(query, headers, _body(operation, document))
    return found


def _document(app: Any) -> Mapping[str, Any]:
    try:
        if callable(generate := getattr(app, "openapi", None)):
            document = generate()
        else:
            document = app.openapi_schema.to_schema()
    except Exception:  # noqa: BLE001 - no document, or one that the application cannot make; its routes remain
        return {}
    return document if isinstance(document, Mapping) else {}


def _body(operation: Mapping[str, Any], document: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    content = _resolved(operation.get("requestBody", {}), document).get("content", {})
    for media in (JSON, *FORMS, *content):
        if media in content:
            return content[media].get("schema", {}), media
    return None, JSON


def _resolved(schema: Any, document: Mapping[str, Any], depth: int = _DEPTH) -> Any:
    """Return a schema with what its references refer to in their place, as deep as bodies are."""
    if isinstance(schema, list):
        return [_resolved(one, document, depth) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:
        target: Any = document
        if not depth:
            return {}
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target.get(part.replace("~1", "/").replace("~0", "~"), {})
        return _resolved(target, document, depth - 1)
    return {name: _resolved(value, document, depth) for name, value in schema.items()}
