"""CORS preflights have no key: they reach a ``CORSMiddleware``, and never a route."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tenancy_orm import Tenancy
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.asgi.scopes import credential_of
from tenancy_orm.context import current_tenant_or_none
from tenancy_orm.errors import NoTenantError
from tests.support.asgi import request

ORIGIN = ("Origin", "https://app.example")
PREFLIGHT = (ORIGIN, ("Access-Control-Request-Method", "GET"))


class Passing(CORSMiddleware):
    """One that passes preflights on."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer nothing by itself."""
        await self.app(scope, receive, send)


def build(tenancy: Tenancy, reached: list[Scope], *inside: Middleware, exempt: tuple[str, ...] = ()) -> Starlette:
    """An application with a route for OPTIONS, and middleware inside ours."""

    async def route(request: Request) -> Response:
        reached.append(request.scope)
        assert current_tenant_or_none() is None and credential_of(request) is None
        async with tenancy.session() as session:
            return JSONResponse(await session.scalar(text("SELECT 1")))

    return Starlette(
        routes=[Route("/notes", route, methods=["OPTIONS", "GET"])],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy, exempt=exempt, map_errors=False), *inside],
    )


CORS = Middleware(CORSMiddleware, allow_origins=["https://app.example"])
SHAPES: dict[str, Callable[[Tenancy, list[Scope]], ASGIApp]] = {
    "next": lambda tenancy, reached: build(tenancy, reached, CORS),
    "further": lambda tenancy, reached: build(tenancy, reached, Middleware(GZipMiddleware), CORS),
    "wrapped": lambda tenancy, reached: TenancyMiddleware(
        Starlette(routes=build(tenancy, reached).routes, middleware=[CORS]), tenancy=tenancy
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_preflight_is_answered_by_cors_inside(
    tenancy: Tenancy, shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With its headers, without reaching a route; what is no preflight is refused; the log names the right order."""
    reached: list[Scope] = []
    app = SHAPES[shape](tenancy, reached)
    with caplog.at_level(logging.WARNING, "tenancy_orm.asgi"):
        for _ in range(2):
            answer = await request(app, "/notes", PREFLIGHT, method="OPTIONS")
            assert answer.status == 200
            assert (b"access-control-allow-origin", b"https://app.example") in answer.headers
    [warning] = [record.getMessage() for record in caplog.records]
    assert "browsers cannot read refusals" in warning and "with add_middleware, add it after" in warning
    for method, headers in (("OPTIONS", ()), ("OPTIONS", (ORIGIN,)), ("OPTIONS", PREFLIGHT[1:]), ("GET", PREFLIGHT)):
        assert (await request(app, "/notes", headers, method=method)).status == 401
    assert reached == []


@pytest.mark.parametrize("inside", [(), (Middleware(Passing),)], ids=["none", "passes-on"])
async def test_a_preflight_reaches_no_route(tenancy: Tenancy, inside: tuple[Middleware, ...]) -> None:
    """The attack: a route for OPTIONS, asked without a key. Let in, as an exempt path is, it still has no session."""
    reached: list[Scope] = []
    with pytest.raises(NoTenantError):
        await request(build(tenancy, reached, exempt=("/notes",)), "/notes", PREFLIGHT, method="OPTIONS")
    assert len(reached) == 1
    answer = await request(build(tenancy, reached, *inside), "/notes", PREFLIGHT, method="OPTIONS")
    assert answer.status == 401
    assert len(reached) == 1


class Dispatcher:
    """Leads to its application on some paths alone, as routers of one's own do."""

    def __init__(self, app: ASGIApp, other: ASGIApp) -> None:
        self.app, self.other = app, other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve ``/notes`` elsewhere."""
        await (self.other if scope["path"] == "/notes" else self.app)(scope, receive, send)


async def test_what_stands_before_cors_is_not_reached(tenancy: Tenancy) -> None:
    """It may lead elsewhere, to a route that trusts that whoever comes here has a key."""
    reached: list[Scope] = []

    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope)
        await Response()(scope, receive, send)

    inside = Dispatcher(CORSMiddleware(build(tenancy, reached), allow_origins=["https://app.example"]), other)
    await request(inside, "/notes", PREFLIGHT, method="OPTIONS")
    assert len(reached) == 1
    answer = await request(TenancyMiddleware(inside, tenancy=tenancy), "/notes", PREFLIGHT, method="OPTIONS")
    assert (answer.status, len(reached)) == (200, 1)


async def test_cors_of_a_mounted_application_is_not_ahead_of_the_routes(tenancy: Tenancy) -> None:
    """Other paths have no such middleware."""
    app = Starlette(
        routes=[Mount("/api", routes=build(tenancy, []).routes, middleware=[CORS])],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)],
    )
    assert (await request(app, "/api/notes", PREFLIGHT, method="OPTIONS")).status == 401


async def test_cors_outside_lets_a_browser_read_refusals(tenancy: Tenancy) -> None:
    """The right order: preflights never come in, and a 401 has the headers."""
    app = Starlette(middleware=[CORS, Middleware(TenancyMiddleware, tenancy=tenancy)])
    assert (await request(app, "/notes", PREFLIGHT, method="OPTIONS")).status == 200
    refused = await request(app, "/notes", (ORIGIN,))
    assert refused.status == 401
    assert (b"access-control-allow-origin", b"https://app.example") in refused.headers
