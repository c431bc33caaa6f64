"""No spelling of a request gets by without a credential and reaches what needs one."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tenancy_orm import Tenancy
from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.quotas.rates import Allowed
from tests.support.asgi import PARSERS, MemoryTenancy, Wire, request, serve
from tests.support.callers import Callers, options

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


# --- public paths, and paths without a tenant -----------------------------------------------------------------------


TRICKS = [
    "{public}x",
    "{public}../orders",
    "{public}..%2forders",
    "{public}%2e%2e/orders",
    "{public}./../orders",
    "{public}%2forders",
    "{public}..%5corders",
    "{public}%00",
    "{public};/orders",
    "/{public}orders",
    "/orders/..{public}x",
    "/orders{public}x",
    "/orders%2f..{public}x",
    "/%2e{public}x",
    "{bare}",
    "{bare}?/x",
    "{upper}x",
]
"""Targets that are, or look like, paths below a public one or one without a tenant."""

PREFIXES = [
    "",
    "/t/acme",
    "/t/globex",
    "/t/nobody",
    "/t//",
    "/t",
    "/t/acme/t/globex",
    "/t/acme%2f..%2fglobex",
    "//t/acme",
]


async def spell(
    app: ASGIApp, root_path: str, headers: Sequence[tuple[str, str]], below: str
) -> dict[tuple[str, str], dict[str, Any]]:
    """Ask for every spelling of a path below ``below``, and return what was answered with 200, by host and target."""
    reached = {}
    for host in ("acme.example.com", "globex.example.com", "nobody.example.com", "testserver"):
        for prefix in PREFIXES:
            for trick in TRICKS:
                target = prefix + trick.format(public=f"{below}/", bare=below, upper=f"{below.upper()}/")
                # as uvicorn does
                path = root_path + unquote(target.partition("?")[0])
                answer = await request(app, path, [("Host", host), *headers], root_path=root_path)
                if answer.status == 200:
                    reached[host, target] = answer.json()
    return reached


@pytest.mark.parametrize("root_path", ["", "/p", "/t/acme"])
async def test_no_spelling_gets_around_the_public_paths(tenancy: Tenancy, root_path: str) -> None:
    """A visitor reaches public routes of the tenant that the address names alone, and who is a person theirs alone."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
    person = await Callers(tenancy).make("member", "acme")

    def route(path: str, name: str) -> Route:
        async def tell(request: Request) -> JSONResponse:
            credential = request.scope["tenancy"]
            bound = credential.bound and credential.bound.slug
            return JSONResponse({"route": name, "kind": credential.kind, "tenant": bound})

        return Route(path, tell)

    app = Starlette(
        routes=[route("/p/{path:path}", "public"), route("/me/{path:path}", "me"), route("/{path:path}", "other")],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy, **options(without_tenant=["/me/*"]))],
    )
    tenancy.internals.rates.acquire_address = lambda source: Allowed(None, None, 0.0)  # type: ignore[method-assign]
    visited = await spell(app, root_path, (), "/p")
    listed = await spell(app, root_path, person.headers, "/me")
    below = await spell(app, root_path, person.headers, "/p")
    assert {(found["route"], found["kind"]) for found in visited.values()} == {("public", "anonymous")}
    for (host, target), found in visited.items():
        named = {host.partition(".")[0], *re.findall("^/+t/([a-z]+)", target)} - {"testserver"}
        assert named == {found["tenant"]}, (host, target)
    for (host, target), found in (listed | below).items():
        if found["kind"] == "anonymous":
            assert found["route"] == "public", (host, target)
        else:
            # what is ambiguous is no such path, and binds the person's own tenant
            if (found["tenant"], found["route"]) != (None, "me"):
                assert found["tenant"] == "acme", (host, target)
                assert host != "globex.example.com" and not re.match("/+t/globex", target), (host, target)
    assert None in {found["tenant"] for found in listed.values()}
