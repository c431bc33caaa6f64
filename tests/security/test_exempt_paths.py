"""No spelling of a request gets by without a key and reaches what needs one."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tenancy_orm.asgi import TenancyMiddleware
from tests.support.asgi import PARSERS, MemoryTenancy, Wire, serve

SECRET = b"secret"

TARGETS = [
    "/healthz",
    "/healthz/",
    "//healthz",
    "///healthz",
    "/healthz//",
    "/./healthz",
    "/x/../healthz",
    "/orders/../healthz",
    "/healthz/../orders",
    "/healthz/..%2forders",
    "/healthz%2f..%2forders",
    "/healthz%2f",
    "/%2fhealthz",
    "%2fhealthz",
    "/%68ealthz",
    "/healthz%00",
    "/healthz%0a",
    "/healthz%3f",
    "/healthz%23",
    "/healthz;a=b",
    "/HEALTHZ",
    "/Healthz",
    "/orders?/healthz",
    "/orders?path=/healthz",
    "/orders#/healthz",
    "/orders;/healthz",
    "/orders/healthz",
    "/orders%2fhealthz",
    "/static/app.js",
    "/static/../orders",
    "/static/%2e%2e/orders",
    "/static/%2e%2e%2forders",
    "/static/%252e%252e/orders",
    "/static/..%5corders",
    "/static/..\\orders",
    "/static//orders",
    "/static",
    "/STATIC/app.js",
    "/api/healthz",
    "/api/api/healthz",
    "/api/orders",
    "http://testserver/healthz",
    "http://testserver/orders",
    "http://healthz/orders",
    "http://testserver//healthz",
    "http://testserver/static/../orders",
    "HTTP://TESTSERVER/healthz",
    "//testserver/healthz",
    "healthz",
    "*",
    "",
]

HOSTS = [
    "testserver",
    "x/healthz?",
    "x/healthz#",
    "/healthz",
    "healthz",
    "x\\healthz",
    "testserver/healthz",
    "x:80/static/",
]

FORWARDED = [
    ("X-Forwarded-Prefix", "/healthz"),
    ("X-Forwarded-Host", "x/healthz?"),
    ("X-Original-URL", "/healthz"),
    ("X-Rewrite-URL", "/healthz"),
    ("X-Forwarded-Path", "/healthz"),
    ("X-Script-Name", "/orders"),
]


def by_url(scope: Scope) -> bool:
    """Decides on a URL that is put together from the Host header, as Starlette once did for ``request.url``."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    return urlsplit(f"http://{host}{scope['path']}").path == "/healthz"


def by_normal_form(scope: Scope) -> bool:
    """Decides on the path as a file system would read it."""
    return posixpath.normpath(unquote(scope["path"])).strip("/").lower() == "healthz"


def by_beginning(scope: Scope) -> bool:
    """Decides on the beginning, without a look at what follows."""
    return bool(scope["path"].startswith(("/healthz", "/static")))


class NaiveMiddleware:
    """Refuses what its rule does not exempt, as the real one does by a better rule."""

    def __init__(self, app: ASGIApp, *, rule: Callable[[Scope], bool]) -> None:
        self.app = app
        self.rule = rule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if self.rule(scope):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("no key", 401)(scope, receive, send)


async def healthy(request: Request) -> PlainTextResponse:
    return PlainTextResponse("healthy")


async def secret(request: Request) -> PlainTextResponse:
    return PlainTextResponse(SECRET)


async def file(request: Request) -> PlainTextResponse:
    # as a careless file server would: whoever can get ".." here, reads what needs a key
    return PlainTextResponse(SECRET if ".." in request.path_params["path"].replace("\\", "/").split("/") else "file")


def build(middleware: Middleware) -> Starlette:
    """An application in which every path that is not exempt is secret."""
    return Starlette(
        routes=[
            Route("/healthz", healthy),
            Mount("/static", routes=[Route("/{path:path}", file)]),
            Route("/{path:path}", secret),
        ],
        middleware=[middleware],
    )


def guarded() -> Starlette:
    """The application below the real middleware."""
    tenancy = MemoryTenancy().as_tenancy()
    return build(Middleware(TenancyMiddleware, tenancy=tenancy, exempt=["/healthz", "/static/*"]))


async def attack(port: int) -> dict[tuple[str, str], bytes]:
    """Send every request that might get by, and return what was answered with 200."""
    reached = {}
    for target in TARGETS:
        for host in HOSTS:
            async with Wire.to(port) as wire:
                wire.ask(target, [("Host", host), ("Connection", "close"), *FORWARDED])
                answer = await wire.answer()
                if answer.status == 200:
                    reached[target, host] = answer.body
    return reached


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("rule", [by_url, by_normal_form, by_beginning])
async def test_naive_rules_are_got_around(parser: str, rule: Callable[[Scope], bool]) -> None:
    """Which shows that these requests are hostile indeed."""
    async with serve(build(Middleware(NaiveMiddleware, rule=rule)), http=parser) as port:
        assert SECRET in (await attack(port)).values()


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("root_path", ["", "/api", "/healthz", "/static"])
async def test_no_request_gets_around_the_list(parser: str, root_path: str) -> None:
    """What is answered without a key is exempt; the plain spelling still is."""
    async with serve(guarded(), http=parser, root_path=root_path) as port:
        reached = await attack(port)
    assert set(reached.values()) <= {b"healthy", b"file"}
    # uvicorn prepends root_path, so the list is below it
    assert reached["/healthz", "testserver"] == b"healthy"
    assert reached["/static/app.js", "testserver"] == b"file"
    exempt = {"/healthz", "/%68ealthz", "http://testserver/healthz", "HTTP://TESTSERVER/healthz", "/static/app.js"}
    exempt |= {"%2fhealthz"}  # an ASGI path of /healthz, and routed as such
    assert {target for target, _ in reached} <= exempt


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("method", ["HEAD", "POST", "OPTIONS", "DELETE", "TRACE", "PROPFIND"])
async def test_no_method_gets_around_the_list(parser: str, method: str) -> None:
    """Not every method has a handler, but every one needs a key."""
    async with serve(guarded(), http=parser) as port, Wire.to(port) as wire:
        wire.ask("/orders", [("Connection", "close")], method=method)
        head = await wire.head()
        assert head.status in (400, 401)


async def test_a_path_that_was_mounted_is_matched_where_it_is_mounted() -> None:
    """Below a Mount, the list is of the mounted application's own paths."""
    outer = Starlette(routes=[Mount("/v1", guarded())])
    async with serve(outer) as port, Wire.to(port) as wire:
        assert (await wire.request("/v1/healthz")).body == b"healthy"
        assert (await wire.request("/v1/v1/healthz")).status == 401
        assert (await wire.request("/v1/orders")).status == 401
