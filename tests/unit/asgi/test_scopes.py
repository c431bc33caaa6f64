"""Routes that demand scopes of the key."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tenancy_orm.asgi import TenancyMiddleware, credential_of, demand_scopes, require_scope
from tenancy_orm.context import current_tenant
from tenancy_orm.errors import ConfigurationError, InvalidCredentialError, MissingScopeError
from tests.support.asgi import MemoryTenancy, http_scope, messages, request, websocket_scope


@require_scope("orders:read")
async def read(request: Request) -> PlainTextResponse:
    return PlainTextResponse(current_tenant().slug)


@require_scope("orders:read", "orders:write")
def write(request: Request) -> PlainTextResponse:
    return PlainTextResponse(current_tenant().slug)


class Endpoint(HTTPEndpoint):
    @require_scope("orders:read")
    async def get(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse(current_tenant().slug)


@require_scope("orders:read")
async def follow(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close()


@pytest.fixture
def app() -> Starlette:
    tenants = MemoryTenancy()
    tenants.add("reader", scopes=["orders:read"])
    tenants.add("writer", scopes=["orders:read", "orders:write"])
    tenants.add("owner", scopes=["*"])
    tenants.add("nothing")
    routes = [
        Route("/read", read),
        Route("/write", write),
        Route("/class", Endpoint),
        WebSocketRoute("/follow", follow),
        Route("/healthz", read),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TenancyMiddleware, tenancy=tenants.as_tenancy())])


@pytest.mark.parametrize(
    ("slug", "allowed"),
    [
        ("reader", {"/read", "/class"}),
        ("writer", {"/read", "/class", "/write"}),
        ("owner", {"/read", "/class", "/write"}),
        ("nothing", set()),
    ],
)
@pytest.mark.parametrize("path", ["/read", "/class", "/write"])
async def test_a_route_demands_all_its_scopes(app: Starlette, slug: str, allowed: set[str], path: str) -> None:
    """A key with the scope * has them all, one without any has none."""
    answer = await request(app, path, [("X-API-Key", f"key-{slug}")])
    assert answer.status == (200 if path in allowed else 403)
    if path in allowed:
        assert answer.body.decode() == slug
    else:
        assert answer.json()["scope"] in ("orders:read", "orders:write")
        assert 'error="insufficient_scope"' in (answer.header("www-authenticate") or "")


@pytest.mark.parametrize(("slug", "types"), [("reader", ["accept", "close"]), ("nothing", ["close"])])
async def test_a_websocket_without_the_scope_is_never_accepted(app: Starlette, slug: str, types: list[str]) -> None:
    """It is refused as one without a key."""
    scope = websocket_scope("/follow", [("X-API-Key", f"key-{slug}")])
    sent = await messages(app, scope, [{"type": "websocket.connect"}])
    assert [message["type"] for message in sent] == [f"websocket.{name}" for name in types]


async def test_an_exempt_route_has_no_scopes(app: Starlette) -> None:
    """It is answered 401, not 500: a key would help on another path."""
    assert (await request(app, "/healthz")).status == 401


def test_a_route_outside_the_middleware_is_a_mistake() -> None:
    """Said as such, rather than answered as if no key were sent."""
    with pytest.raises(ConfigurationError, match="TenancyMiddleware"):
        credential_of(HTTPConnection(http_scope()))


def test_scopes_can_be_demanded_anywhere() -> None:
    """Where a decorator does not fit."""
    tenants = MemoryTenancy()
    tenants.add("reader", scopes=["orders:read"])
    credential = tenants.directory.keys["key-reader"]
    connection = HTTPConnection(http_scope(tenancy=credential))
    assert demand_scopes(connection, "orders:read") is credential
    with pytest.raises(MissingScopeError) as caught:
        demand_scopes(connection, "orders:read", "orders:write")
    assert caught.value.scope == "orders:write"
    with pytest.raises(InvalidCredentialError):
        demand_scopes(HTTPConnection(http_scope(tenancy=None)), "orders:read")


def test_a_decorator_that_checks_nothing_is_refused() -> None:
    """When the module is imported."""
    with pytest.raises(ConfigurationError):
        require_scope()
    with pytest.raises(ConfigurationError):
        require_scope("orders:read")(lambda value: value)
