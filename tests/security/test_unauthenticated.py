"""Without a valid credential nothing that needs one is reached, and refusals tell nothing about credentials."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.routing import APIRouter
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Host, Mount, Route, Router, WebSocketRoute
from starlette.types import ASGIApp

from examples.agent_platform.app import create_app
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.config import TenancyConfig
from tenancy_orm.events import CredentialRejected, DirectoryMissed
from tenancy_orm.keys.format import KeyDigester, _checksum, generate_key
from tenancy_orm.tenancy import Tenancy
from tenancy_orm.tenants.manager import CreatedTenant
from tests.support.asgi import PARSERS, MemoryTenancy, Wire, messages, request, serve, websocket_scope
from tests.support.callers import Callers, authenticators

EXEMPT = ["/healthz", "/static/*"]


# --- every route ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """One thing that can be asked for."""

    kind: str
    method: str
    path: str


def walk(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[Found]:
    """Every route of an application, below mounts and hosts, with its parameters filled in."""
    for route in routes:
        if isinstance(route, (Mount, Host)):
            path = prefix + (route.path if isinstance(route, Mount) else "")
            yield from walk(route.routes, path)
        elif isinstance(route, Route):
            # endpoints that are classes, and mounted applications, answer any method
            for method in sorted(route.methods or {"GET", "POST", "PUT", "PATCH", "DELETE"}):
                yield Found("http", method, filled(prefix + route.path))
        elif isinstance(route, WebSocketRoute):
            yield Found("websocket", "GET", filled(prefix + route.path))
        elif (included := getattr(route, "original_router", None)) is not None:
            # FastAPI keeps an included router as it is
            yield from walk(included.routes, prefix + getattr(route, "include_context").prefix)  # noqa: B009
        else:
            raise AssertionError(f"the walk does not know {route!r}")


def filled(path: str) -> str:
    """A path of the route ``path``."""
    return re.sub(r"\{[^}]+\}", "1", path)


def needs_credential(found: Found) -> bool:
    """Whether the list of exempt paths lacks it."""
    return found.path != "/healthz" and not found.path.startswith("/static/")


async def ok(request: Request) -> PlainTextResponse:
    return PlainTextResponse("reached")


class Thing(HTTPEndpoint):
    async def get(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("reached")

    post = put = patch = delete = get


async def follow(websocket: Any) -> None:
    await websocket.accept()
    await websocket.close()


class Socket(WebSocketEndpoint):
    pass


def starlette_app(*middleware: Middleware) -> Starlette:
    """Every kind of route that Starlette has."""
    return Starlette(
        routes=[
            Route("/healthz", ok),
            Mount("/static", routes=[Route("/{path:path}", ok)]),
            Route("/", ok),
            Route("/orders/{id:int}", ok, methods=["GET", "POST", "DELETE", "OPTIONS", "TRACE"]),
            Route("/thing", Thing),
            Mount("/v1", routes=[Route("/orders", ok), Mount("/deep", Router([Route("/{a}/{b:path}", ok)]))]),
            WebSocketRoute("/follow/{id}", follow),
            WebSocketRoute("/socket", Socket),
            Host("{any}", Router([Route("/by-host", ok)])),
        ],
        middleware=middleware,
    )


def fastapi_app(*middleware: Middleware) -> FastAPI:
    """Routers, its own documentation, and websockets."""
    app = FastAPI(middleware=list(middleware))
    router = APIRouter(prefix="/orders")
    router.add_api_route("/{order}", lambda order: order, methods=["GET"], name="show")
    router.add_api_route("/{order}", lambda order: order, methods=["PUT"], name="change")
    app.include_router(router)

    @app.websocket("/follow")
    async def _follow(websocket: WebSocket) -> None:
        await follow(websocket)

    return app


def guard() -> Middleware:
    tenancy = MemoryTenancy().as_tenancy()
    return Middleware(TenancyMiddleware, tenancy=tenancy, authenticators=authenticators(), exempt=EXEMPT)


async def outcome(app: ASGIApp, found: Found, headers: list[tuple[str, str]]) -> Any:
    """The status of a request; of a websocket, whether it was accepted."""
    if found.kind == "http":
        return (await request(app, found.path, headers, method=found.method)).status
    sent = await messages(app, websocket_scope(found.path, headers), [{"type": "websocket.connect"}])
    return "accepted" if sent[0]["type"] == "websocket.accept" else "refused"


CREDENTIALS: list[list[tuple[str, str]]] = [
    [],
    [("X-API-Key", "ten_live_nobody")],
    [("Authorization", "Bearer ten_live_nobody")],
    [("Authorization", "Basic YWRtaW46YWRtaW4=")],
    [("Cookie", "X-API-Key=ten_live_nobody")],
    [("Authorization", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.")],
    [("Cookie", "__Host-token=a.b.c; session=nobody")],
]


@pytest.mark.parametrize("make", [starlette_app, fastapi_app])
async def test_every_route_needs_a_credential(make: Any) -> None:
    """Each is reached with the middleware off, and none without a valid credential."""
    routes = list(walk(make().routes))
    assert len(routes) >= 5
    assert any(found.kind == "websocket" for found in routes)
    for found in routes:
        assert await outcome(make(), found, [("host", "h")]) in (200, 422, "accepted"), found
        for credential in CREDENTIALS:
            refused = await outcome(make(guard()), found, [("host", "h"), *credential])
            if needs_credential(found):
                assert refused == (401 if found.kind == "http" else "refused"), (found, credential)
            else:
                assert refused == 200, (found, credential)


async def test_what_is_no_route_needs_a_credential_as_well() -> None:
    """So that nobody learns which routes there are."""
    for path in ("/nowhere", "/orders/1/2", "/docs/x", "/v1"):
        assert (await request(starlette_app(guard()), path)).status == 401


async def test_every_route_of_the_example_needs_a_credential(tenancy: Tenancy) -> None:
    """The application that the documentation shows, as it is."""
    app = create_app(tenancy)
    every = create_app(tenancy)
    every.user_middleware[0].kwargs["authenticators"] = authenticators()
    routes = list(walk(app.routes))
    assert len(routes) > 10
    for found in routes:
        expected = 200 if found.path == "/healthz" else 401
        assert await outcome(app, found, [("host", "localhost")]) == expected, found
        for credential in CREDENTIALS:
            assert await outcome(every, found, [("host", "localhost"), *credential]) == expected, (found, credential)


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_websocket_is_refused_by_its_handshake(parser: str) -> None:
    """On the wire: an answer with a problem document, and never 101."""
    handshake = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ]
    async with serve(starlette_app(), http=parser) as port, Wire.to(port) as wire:
        wire.ask("/follow/1", handshake)
        assert (await wire.head()).status == 101
    async with serve(starlette_app(guard()), http=parser) as port, Wire.to(port) as wire:
        answer = await wire.request("/follow/1", handshake)
        assert answer.status == 401
        assert answer.json()["type"] == "urn:tenancy:problem:missing-credential"


# --- every bad key --------------------------------------------------------------------------------------------------


@pytest.fixture
def tenancy_config(tenancy_config: TenancyConfig) -> TenancyConfig:
    """Without the lock-out, which would answer the later ones otherwise."""
    return tenancy_config.replace(lockout={"failures": 0})


@pytest.fixture
async def acme(tenancy: Tenancy) -> CreatedTenant:
    """A tenant."""
    return await tenancy.tenants.create("acme")


def bad_keys(valid: str) -> dict[str, str]:
    """Keys that are not valid, by what is wrong with them."""
    other = generate_key("ten_live").text
    prefix, key_id, _ = valid.rsplit("_", 2)
    foreign_secret = other.rsplit("_", 1)[1]
    return {
        "unknown": other,
        "wrong secret": with_checksum(f"{prefix}_{key_id}_{foreign_secret[:-6]}"),
        "wrong checksum": valid[:-1] + ("a" if valid[-1] != "a" else "b"),
        "foreign prefix": generate_key("else_live").text,
        "malformed": "ten_live",
        "empty": "",
        "long": "x" * 5_000,
        "not ascii": "ten_live_\xe9",
        "cut": valid[:-1],
        "upper": valid.upper(),
        "digest": KeyDigester().digest(other).hex(),
    }


def with_checksum(body: str) -> str:
    """A key with the right checksum, so that only its secret is wrong."""
    return body + _checksum(body)


async def bad_credentials(callers: Callers) -> dict[str, list[tuple[str, str]]]:
    """Headers with tokens and sessions that are not valid, by what is wrong with them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for kind in ("token", "cookie", "member", "session"):
        caller = await callers.make(kind, "acme")
        found[f"{kind} forged"] = caller.forged()
        found[f"{kind} revoked"] = [*caller.headers]
        await callers.revoke(caller)
        person = await callers.make(kind, "acme")
        found[f"{kind} of a revoked person"] = [*person.headers]
        await callers.revoke_subject(person)
        found[f"{kind} expired"] = [*(await callers.make(kind, "acme", expires=-60.0)).headers]
        found[f"{kind} of no person"] = [
            *(await callers.make(kind, "acme", subject="a\nb" * 100, member=False)).headers
        ]
    for name, claims in (
        ("for another", {"aud": "https://other.example.com"}),
        ("not yet valid", {"nbf": time.time() + 600}),
        ("without an end", {"exp": None}),
        ("of too many tenants", {"org": [f"t{number}" for number in range(1_001)]}),
        ("of no tenant's name", {"org": {"acme": 1}}),
    ):
        found[f"token {name}"] = [*(await callers.make("token", "acme", **claims)).headers]
    return found


@pytest.mark.parametrize("header", ["X-API-Key", "Authorization"])
async def test_every_bad_credential_gets_the_same_answer(tenancy: Tenancy, acme: CreatedTenant, header: str) -> None:
    """To the byte, on the wire, of whatever kind it is, and whether it is known, revoked, expired or never was."""
    revoked = await tenancy.keys.issue("acme", name="revoked")
    await tenancy.keys.revoke(revoked.key_id)
    gone = await tenancy.tenants.create("gone")
    await tenancy.tenants.delete("gone")
    keys = {**bad_keys(acme.api_key), "revoked": revoked.text, "deleted tenant": gone.api_key}
    scheme = "Bearer " if header == "Authorization" else ""
    credentials = {name: [(header, scheme + key)] for name, key in keys.items()}
    if header == "Authorization":
        credentials |= await bad_credentials(Callers(tenancy))
    app = starlette_app(Middleware(TenancyMiddleware, tenancy=tenancy, authenticators=authenticators()))
    answers = set()
    async with serve(app, date_header=False) as port, Wire.to(port) as wire:
        for name, headers in credentials.items():
            for _ in range(2):  # looked up, and remembered as unknown
                answer = await wire.request("/", headers)
                assert answer.status == 401, name
                answers.add((tuple(answer.headers), answer.body))
        assert (await wire.request("/", [(header, scheme + acme.api_key)])).status == 200
    assert len(answers) == 1


async def test_an_unknown_id_and_a_wrong_secret_take_the_same_path(
    tenancy: Tenancy, acme: CreatedTenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query and one comparison in constant time each; they differ only in what operators see."""
    keys = bad_keys(acme.api_key)
    compared: list[int] = []
    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append(len(b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    missed: list[DirectoryMissed] = []
    rejected: list[CredentialRejected] = []
    tenancy.events.subscribe(DirectoryMissed, missed.append)
    tenancy.events.subscribe(CredentialRejected, rejected.append)
    app = starlette_app(Middleware(TenancyMiddleware, tenancy=tenancy))
    paths = []
    for name in ("unknown", "wrong secret"):
        compared.clear()
        missed.clear()
        assert (await request(app, headers=[("X-API-Key", keys[name])])).status == 401
        paths.append((tuple(compared), [(event.keys, event.tenants) for event in missed]))
    assert paths[0] == paths[1] == ((32,), [(1, 0)])
    assert [event.reason for event in rejected] == ["unknown", "secret"]
