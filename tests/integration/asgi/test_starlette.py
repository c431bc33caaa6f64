"""The middleware in a Starlette application, on a real PostgreSQL and through a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from tenancy_orm.asgi import (
    ApiKeyHeader,
    PathPrefixResolver,
    TenancyMiddleware,
    WebSocketKeyProtocol,
    credential_of,
    require_scope,
)
from tenancy_orm.config import TenancyConfig, Tier
from tenancy_orm.errors import CheckoutTimeoutError, ConfigurationError
from tenancy_orm.tenancy import Tenancy
from tenancy_orm.tenants.manager import CreatedTenant
from tests.support.asgi import PARSERS, Wire, request, serve
from tests.support.models import Note, Tag

DEADLINE = 10.0


@pytest.fixture
async def acme(tenancy: Tenancy) -> CreatedTenant:
    """A tenant with a note."""
    created = await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        session.add(Note(body="note of acme", tags=[Tag(name="first")]))
    return created


def build(tenancy: Tenancy, **options: Any) -> Starlette:
    async def notes(request: Request) -> JSONResponse:
        async with tenancy.transaction() as session:
            if request.method == "POST":
                session.add(Note(body=(await request.json())["body"]))
            return JSONResponse([note.body for note in await session.scalars(select(Note).order_by(Note.id))])

    async def duplicate(request: Request) -> PlainTextResponse:
        async with tenancy.transaction() as session:
            session.add(Note(body="second", tags=[Tag(name="first")]))
        return PlainTextResponse("never")

    async def conflict(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"handled": type(error).__name__}, 409)

    async def of_other(request: Request) -> JSONResponse:
        rows = await tenancy.fetch_all("SELECT body FROM notes", tenant=request.path_params["slug"])
        return JSONResponse([row.body for row in rows])

    @require_scope("notes:write")
    async def scoped(request: Request) -> JSONResponse:
        credential = credential_of(request)
        assert credential is not None
        return JSONResponse({"key": credential.id, "url": str(request.url_for("notes"))})

    async def chat(websocket: WebSocket) -> None:
        await websocket.accept(subprotocol=next(iter(websocket.scope["subprotocols"]), None))
        async for _ in websocket.iter_text():
            await websocket.send_text(str(await tenancy.fetch_value("SELECT body FROM notes")))

    return Starlette(
        routes=[
            Route("/notes", notes, methods=["GET", "POST"], name="notes"),
            Route("/duplicate", duplicate),
            Route("/of/{slug}", of_other),
            Route("/scoped", scoped),
            Route("/healthz", lambda _: PlainTextResponse("healthy")),
            WebSocketRoute("/chat", chat),
        ],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy, **options)],
        exception_handlers={IntegrityError: conflict},
        lifespan=tenancy.lifespan,
    )


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_request_reads_and_writes_its_tenants_database(
    tenancy: Tenancy, acme: CreatedTenant, parser: str
) -> None:
    """And nobody else's."""
    globex = await tenancy.tenants.create("globex")
    async with serve(build(tenancy), http=parser) as port, Wire.to(port) as wire:
        body = json.dumps({"body": "written"}).encode()
        written = await wire.request("/notes", [("X-API-Key", acme.api_key)], method="POST", body=body)
        assert written.json() == ["note of acme", "written"]
        bearer = [("Authorization", f"Bearer {globex.api_key}")]
        assert (await wire.request("/notes", bearer)).json() == []
        assert (await wire.request("/notes")).status == 401
        assert (await wire.request("/healthz")).body == b"healthy"


async def test_an_error_of_the_applications_own_reaches_its_handler(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """An IntegrityError is not the middleware's business."""
    answer = await request(build(tenancy), "/duplicate", [("X-API-Key", acme.api_key)])
    assert (answer.status, answer.json()) == (409, {"handled": "IntegrityError"})


@pytest.mark.parametrize("slug", ["globex", "nobody"])
async def test_reaching_for_another_tenant_is_answered_403(tenancy: Tenancy, acme: CreatedTenant, slug: str) -> None:
    """Whether or not there is one."""
    await tenancy.tenants.create("globex")
    answer = await request(build(tenancy), f"/of/{slug}", [("X-API-Key", acme.api_key)])
    assert answer.status == 403
    assert answer.json()["type"] == "urn:tenancy:problem:cross-tenant"


async def test_the_status_of_the_tenant_is_answered(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """At once: the change is known to this process without asking."""
    app = build(tenancy)
    headers = [("X-API-Key", acme.api_key)]
    assert (await request(app, "/notes", headers)).status == 200
    await tenancy.tenants.suspend("acme", reason="unpaid")
    suspended = await request(app, "/notes", headers)
    assert (suspended.status, b"unpaid" in suspended.body) == (403, False)
    await tenancy.tenants.activate("acme")
    assert (await request(app, "/notes", headers)).status == 200
    await tenancy.tenants.delete("acme")
    deleted = await request(app, "/notes", headers)
    assert (deleted.status, deleted.json()["type"]) == (401, "urn:tenancy:problem:invalid-credential")
    await tenancy.tenants.restore("acme")
    assert (await request(app, "/notes", headers)).status == 200


async def test_a_keys_networks_are_compared_with_the_peer(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """Also when the key is known, and was just used from inside."""
    app = build(tenancy)
    issued = await tenancy.keys.issue("acme", networks=["127.0.0.0/8"])
    headers = [("X-API-Key", issued.text)]
    for client, status in ((("127.0.0.1", 1), 200), (("203.0.113.1", 1), 401), (None, 401), (("127.0.0.1", 2), 200)):
        assert (await request(app, "/notes", headers, client=client)).status == status


async def test_scopes_are_those_of_the_key(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """Given when it is issued."""
    app = build(tenancy)
    writer = await tenancy.keys.issue("acme", name="writer", scopes=["notes:write"])
    reader = await tenancy.keys.issue("acme", name="reader", scopes=["notes:read"])
    allowed = await request(app, "/scoped", [("X-API-Key", writer.text), ("host", "h")])
    assert allowed.json()["key"] == writer.key_id
    refused = await request(app, "/scoped", [("X-API-Key", reader.text)])
    assert (refused.status, refused.json()["scope"]) == (403, "notes:write")


async def test_a_path_prefix_is_part_of_the_urls_that_are_built(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """Also where the application is mounted somewhere."""
    writer = await tenancy.keys.issue("acme", name="writer", scopes=["notes:write"])
    app = build(tenancy, resolvers=[PathPrefixResolver("/t/{tenant}")])
    headers = [("X-API-Key", writer.text), ("host", "h")]
    assert (await request(app, "/t/acme/notes", headers)).json() == ["note of acme"]
    assert (await request(app, "/t/acme/scoped", headers)).json()["url"] == "http://h/t/acme/notes"
    assert (await request(app, "/t/acme", headers)).status == 404
    outer = Starlette(routes=[Mount("/v1", app)])
    assert (await request(outer, "/v1/t/acme/notes", headers)).json() == ["note of acme"]
    assert (await request(outer, "/v1/t/globex/notes", headers)).status == 403


async def test_a_websocket_is_its_keys_tenants(tenancy: Tenancy, acme: CreatedTenant) -> None:
    """With the key in a header, or among the sub-protocols as a browser sends it, which is not echoed."""
    app = build(tenancy, resolvers=[ApiKeyHeader(), WebSocketKeyProtocol()])
    async with serve(app) as port, asyncio.timeout(DEADLINE):
        url = f"ws://127.0.0.1:{port}/chat"
        async with connect(url, additional_headers={"X-API-Key": acme.api_key}) as socket:
            await socket.send("?")
            assert await socket.recv() == "note of acme"
        offers = [Subprotocol(f"tenancy.key.{acme.api_key}"), Subprotocol("chat")]
        async with connect(url, subprotocols=offers) as socket:
            assert socket.subprotocol == "chat"
            await socket.send("?")
            assert await socket.recv() == "note of acme"
        with pytest.raises(InvalidStatus) as caught:
            await connect(url)
        assert caught.value.response.status_code == 401


async def test_a_tenants_connections_that_are_all_in_use_are_answered_503(
    tenancy_config: TenancyConfig, acme: CreatedTenant
) -> None:
    """With when to try again, and nothing about the server."""
    small = Tenancy(tenancy_config.replace(pool={"max_connections_per_tenant": 1, "checkout_timeout": 0.2}))
    async with small, small.session("acme") as session:
        await session.connection()
        with pytest.raises(CheckoutTimeoutError):
            await small.fetch_value("SELECT 1", tenant="acme")
        answer = await request(build(small), "/notes", [("X-API-Key", acme.api_key)])
    assert (answer.status, answer.header("retry-after")) == (503, "1")
    assert answer.json()["type"] == "urn:tenancy:problem:busy"


async def test_a_request_that_cannot_be_served_in_time_is_answered_503_at_once(
    tenancy_config: TenancyConfig, acme: CreatedTenant
) -> None:
    """By the deadline of the middleware, and not after ``pool.checkout_timeout``."""
    small = Tenancy(tenancy_config.replace(pool={"max_connections_per_tenant": 1, "checkout_timeout": 60.0}))
    async with small, small.session("acme") as session:
        await session.connection()
        answer = await request(build(small, deadline=0.1), "/notes", [("X-API-Key", acme.api_key)])
    assert (answer.status, answer.header("retry-after"), answer.json()["reason"]) == (503, "1", "timed-out")
    with pytest.raises(ConfigurationError, match="above 0"):
        TenancyMiddleware(build(small), tenancy=small, deadline=0.0)


async def test_a_tier_bounds_its_tenants_request_rate(tenancy_config: TenancyConfig, acme: CreatedTenant) -> None:
    """With 429 and the RateLimit headers."""
    tiers = {**tenancy_config.tiers, "free": Tier("free", requests_per_second=2.0)}
    async with Tenancy(tenancy_config.replace(tiers=tiers)) as limited:
        app = build(limited)
        answers = [await request(app, "/notes", [("X-API-Key", acme.api_key)]) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[2].header("retry-after") == "1"


async def test_the_lifespan_opens_and_closes_the_tenancy(tenancy_config: TenancyConfig, acme: CreatedTenant) -> None:
    """The middleware passes it on."""
    served = Tenancy(tenancy_config)
    async with serve(build(served), lifespan="on") as port, Wire.to(port) as wire:
        assert served.is_open
        assert (await wire.request("/notes", [("X-API-Key", acme.api_key)])).json() == ["note of acme"]
        assert (await wire.request("/notes")).status == 401
    assert not served.is_open
