"""Flask behind ``TenancyWSGIMiddleware``: the credential decides, and nothing of a request is left for the next."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.handlers import SimpleHandler as ServerHandler
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from flask import Flask, Response, jsonify, request
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm import Tenancy, TenancyConfig, TenancyError, current_request_id, current_tenant, current_tenant_or_none
from tenancy_orm.context import set_current
from tenancy_orm.correlation import log_fields
from tenancy_orm.deadlines import current_deadline
from tenancy_orm.errors import EventLoopBlockedError, TooManyAttemptsError
from tenancy_orm.events import ConnectionOpened, CrossTenantRequest
from tenancy_orm.sync import hops
from tenancy_orm.wsgi import TenancyWSGIMiddleware, answer_with, credential_of, demand_scopes
from tests.support.asgi import Answer, Wire
from tests.support.callers import EVERYONE, KINDS, Caller, Callers, options
from tests.support.models import Note
from tests.support.waiting import HANGS, until


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection."""


class _KeepAlive(WSGIRequestHandler):
    """Serves all requests of a connection in its thread."""

    def handle(self) -> None:
        while line := self.rfile.readline(65_537):
            self.raw_requestline = line
            if not self.parse_request():
                return
            handler = ServerHandler(
                self.rfile,
                self.wfile,  # type: ignore[arg-type]
                self.get_stderr(),
                self.get_environ(),
            )
            handler.http_version = "1.1"
            handler.run(self.server.get_app())  # type: ignore[attr-defined]
            if self.path.startswith("/stream"):
                return  # its answer ends with the connection

    def log_message(self, *_: Any) -> None:
        pass


@asynccontextmanager
async def serve(app: Any) -> AsyncIterator[int]:
    """Serve an application on a free port."""
    server = make_server("127.0.0.1", 0, app, _Server, _KeepAlive)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        await asyncio.to_thread(server.shutdown)
        await asyncio.to_thread(thread.join)
        await asyncio.to_thread(server.server_close)


def build(tenancy: Tenancy) -> Flask:
    """An application with notes."""
    app = Flask(__name__)
    sync = tenancy.sync

    @app.errorhandler(TenancyError)
    def refused(error: TenancyError) -> tuple[str, int]:
        return answer_with(request.environ, error)

    @app.errorhandler(DBAPIError)
    def lost(error: DBAPIError) -> tuple[str, int]:
        if not error.connection_invalidated:
            raise error
        return answer_with(request.environ, error)

    def fail() -> Response:
        with sync.session() as session:
            session.execute(text(request.args["sql"]))
        raise AssertionError("it was to fail")

    def notes(tenant: str | None = None) -> Response:
        rows = sync.fetch_all("SELECT body FROM notes", tenant=tenant)
        return jsonify([row.body for row in rows])

    def who() -> Response:
        tenant = current_tenant_or_none()
        credential = credential_of(request.environ)
        return jsonify([tenant and tenant.slug, credential and credential.kind, request.script_root, request.path])

    def write() -> Response:
        demand_scopes(request.environ, "notes:write")
        raise AssertionError("it may not")

    def stream() -> Response:
        def parts() -> Iterator[str]:
            for _ in range(int(request.args["parts"])):
                yield f"{current_tenant().slug} {sync.fetch_value('SELECT count(*) FROM notes')}\n"

        from flask import stream_with_context

        return Response(stream_with_context(parts()))

    def leak() -> Response:
        # careless code: it binds and never ends it
        set_current(current_tenant())
        return jsonify(None)

    app.add_url_rule("/notes", view_func=notes)
    app.add_url_rule("/p/notes", "visitors", notes)
    app.add_url_rule("/notes/of/<tenant>", view_func=notes)
    for path in ("/who", "/open", "/p/who"):
        app.add_url_rule(path, path, who)
    app.add_url_rule("/write", view_func=write, methods=["POST"])
    app.add_url_rule("/stream", view_func=stream)
    app.add_url_rule("/leak", view_func=leak)
    app.add_url_rule("/fail", view_func=fail)
    return app


def guarded(tenancy: Tenancy, **more: Any) -> Any:
    app: Any = build(tenancy)
    app.wsgi_app = TenancyWSGIMiddleware(app.wsgi_app, tenancy=tenancy, **options(exempt=["/open"], **more))
    return app


def naive(tenancy: Tenancy) -> Any:
    """Binds a request's tenant and leaves it, as in the thread of a server."""
    app: Any = build(tenancy)
    inner: Callable[..., Any] = app.wsgi_app

    def middleware(environ: dict[str, Any], start_response: Any) -> Any:
        key = environ.get("HTTP_X_API_KEY")
        directory = tenancy.internals.directory
        environ["tenancy.credential"] = None
        if key is not None:
            environ["tenancy.credential"] = found = tenancy.sync.call(directory.authenticate, key)
            named = environ.get("HTTP_X_TENANT")
            set_current(tenancy.sync.call(directory.tenant, named) if named else found.tenant)
        return inner(environ, start_response)

    app.wsgi_app = middleware
    return app


@pytest.fixture
def tenancy_config(tenancy_config: TenancyConfig) -> TenancyConfig:
    """Refusals are written soon, and visitors are rated."""
    return tenancy_config.replace(keys={"usage_interval": 0.1}, quotas={"address_requests_per_second": 500})


@pytest.fixture
async def two(tenancy: Tenancy) -> dict[tuple[str, str], Caller]:
    """Callers of two tenants with a note each, by kind and tenant."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
        async with tenancy.transaction(slug) as session:
            session.add(Note(body=f"note of {slug}"))
    callers = Callers(tenancy)
    return {(kind, slug): await callers.make(kind, slug) for kind in EVERYONE for slug in ("acme", "globex")}


async def test_naming_another_tenant_is_refused_and_recorded(
    tenancy: Tenancy, two: dict[tuple[str, str], Caller]
) -> None:
    """By host, header, path and argument, whatever the credential; the attack works where the request is trusted."""
    acme = two["key", "acme"]
    async with serve(naive(tenancy)) as port, Wire.to(port) as wire:
        answer = await wire.request("/notes", [*acme.headers, ("X-Tenant", "globex")])
        assert answer.json() == ["note of globex"]
    seen: list[CrossTenantRequest] = []
    opened: list[ConnectionOpened] = []
    tenancy.internals.router.retire((await tenancy.tenants.get("globex")).id)
    tenancy.events.subscribe(CrossTenantRequest, seen.append)
    tenancy.events.subscribe(ConnectionOpened, opened.append)
    named: list[tuple[str, list[tuple[str, str]], str]] = [
        ("/notes", [("Host", "globex.example.com")], "subdomain"),
        ("/notes", [("X-Tenant", "globex")], "header"),
        ("/t/globex/notes", [], "path"),
        ("/t/acme/notes", [("Host", "acme.example.com"), ("X-Tenant", "globex")], "header"),
        ("/notes/of/globex", [], "application"),
    ]
    async with serve(guarded(tenancy)) as port, Wire.to(port) as wire:
        for kind in KINDS:
            caller = two[kind, "acme"]
            for path, headers, _ in named:
                answer = await wire.request(path, [*caller.headers, *headers])
                assert answer.status == 403, (kind, path, headers)
                assert answer.json()["type"] == "urn:tenancy:problem:cross-tenant"
                assert b"globex" not in answer.body
            own = await wire.request("/t/acme/notes", [*caller.headers, ("Host", "acme.example.com")])
            assert own.json() == ["note of acme"]
    assert [(event.resolver, event.named, event.source) for event in seen] == [
        (resolver, "globex", "127.0.0.1") for _ in KINDS for _, _, resolver in named
    ]
    assert {event.slug for event in opened} <= {"acme"}

    async def recorded() -> bool:
        entries = await tenancy.audit.events(action="request.cross_tenant", limit=100)
        found = {(entry.actor.id, entry.detail["resolver"]) for entry in entries if entry.detail}
        return found == {(event.subject, event.resolver) for event in seen}

    await until(recorded)


async def test_a_request_does_not_inherit_the_tenant_of_the_one_before(
    tenancy: Tenancy, two: dict[tuple[str, str], Caller]
) -> None:
    """On one connection, in one thread: also after careless code, and after a response that nobody read to its end."""
    async with serve(naive(tenancy)) as port, Wire.to(port) as wire:
        await wire.request("/notes", two["key", "acme"].headers)
        assert (await wire.request("/open")).json()[0] == "acme", "the attack must work"
    async with serve(guarded(tenancy)) as port, Wire.to(port) as wire:
        for kind in EVERYONE:
            for slug in ("acme", "globex", "acme"):
                caller = two[kind, slug]
                found = await wire.request(caller.path("/who"), caller.headers)
                assert found.json()[0] == slug
                assert (await wire.request(caller.path("/notes"), caller.headers)).json() == [f"note of {slug}"]
                assert (await wire.request("/open")).json()[:2] == [None, None]
        caller = two["key", "acme"]
        for path in ("/leak", "/notes"):
            await wire.request(path, caller.headers)
            assert (await wire.request("/open")).json()[:2] == [None, None]
        assert (await wire.request("/t/acme/who", caller.headers)).json() == ["acme", "key", "/t/acme", "/who"]


async def test_what_a_server_does_not_read_or_close_leaves_nothing(
    tenancy: Tenancy, two: dict[tuple[str, str], Caller]
) -> None:
    """The application's steps run in a context of their own, and the connection of the request is given back."""
    app = guarded(tenancy)
    caller = two["key", "acme"]

    def abandoned() -> None:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/stream",
            "QUERY_STRING": "parts=5",
            "SERVER_NAME": "testserver",
            "SERVER_PORT": "80",
            "wsgi.url_scheme": "http",
            "HTTP_X_API_KEY": caller.headers[0][1],
        }
        response = iter(app.wsgi_app(environ, lambda *_: lambda _: None))
        assert next(response) == b"acme 1\n"
        assert current_tenant_or_none() is None
        del response
        assert current_tenant_or_none() is None

    await asyncio.to_thread(abandoned)
    statistics = tenancy.internals.router.statistics
    await until(lambda: statistics().servers["default"].in_use == 0)


async def test_a_path_reaches_the_application_as_the_server_had_it(
    tenancy: Tenancy, two: dict[tuple[str, str], Caller]
) -> None:
    """Byte for byte, also one that is no UTF-8; only a prefix with the tenant is moved."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        seen.append((environ["SCRIPT_NAME"], environ["PATH_INFO"]))
        return [b"ok"]

    seen: list[tuple[str, str]] = []
    async with (
        serve(TenancyWSGIMiddleware(app, tenancy=tenancy, **options())) as port,
        Wire.to(port) as wire,
    ):
        for path in ("/caf%E9", "/caf%C3%A9", "/t/acme/caf%C3%A9"):
            assert (await wire.request(path, two["key", "acme"].headers)).status == 200
    assert seen == [("", "/caf\xe9"), ("", "/caf\xc3\xa9"), ("/t/acme", "/caf\xc3\xa9")]


async def test_it_refuses_as_the_asgi_middleware_does(tenancy: Tenancy, two: dict[tuple[str, str], Caller]) -> None:
    """Missing, forged and repeated keys, missing scopes, suspended tenants; a lock-out; a stream that is cut."""
    caller = two["key", "acme"]
    async with serve(guarded(tenancy)) as port, Wire.to(port) as wire:

        async def problem(path: str, headers: Any = (), method: str = "GET") -> tuple[int, str]:
            answer: Answer = await wire.request(path, headers, method=method)
            return answer.status, str(answer.json()["type"]).rpartition(":")[2]

        assert await problem("/notes") == (401, "missing-credential")
        assert await problem("/notes", caller.forged()) == (401, "invalid-credential")
        assert (await problem("/notes", [*caller.headers, *two["key", "globex"].headers]))[0] == 401
        assert await problem("/write", caller.headers, "POST") == (403, "missing-scope")
        answer = await wire.request("/p/who", two["anonymous", "acme"].headers)
        assert answer.json()[:2] == ["acme", "anonymous"]
        assert answer.header("ratelimit")
        assert answer.header("ratelimit-policy")
        await tenancy.tenants.suspend("globex", reason="x")
        assert await problem("/notes", two["key", "globex"].headers) == (403, "tenant-suspended")
        wire.ask("/stream?parts=100000", caller.headers)
        assert (await wire.head()).status == 200
        await tenancy.keys.revoke(caller.id)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            async with asyncio.timeout(HANGS):
                await wire._reader.readuntil(b"\r\n0\r\n\r\n")
    async with serve(guarded(tenancy)) as port, Wire.to(port) as wire:
        for _ in range(200):
            answer = await wire.request("/notes", [("X-API-Key", "ten_live_" + "0" * 16 + "_" + "x" * 40)])
            if answer.status == 429:
                break
        assert answer.status == 429, TooManyAttemptsError
        assert answer.header("retry-after")


async def test_what_pep_3333_allows_an_application_works(tenancy: Tenancy, two: dict[tuple[str, str], Caller]) -> None:
    """``write``, a generator that starts late, an error in place of a response; a validator watches both sides."""
    plain, closed = [("Content-Type", "text/plain")], []

    class Body:
        def __init__(self, *parts: bytes) -> None:
            self.parts = iter(parts)

        def __iter__(self) -> Iterator[bytes]:
            return self.parts

        def close(self) -> None:
            closed.append(current_tenant().slug)

    def writes(environ: Any, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", plain)
        write(b"1 ")
        write(f"{current_tenant().slug} ".encode())
        return Body(b"2")

    def late(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*plain, ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
        yield current_tenant().slug.encode()

    def fails(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", plain)
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            start_response("500 Sorry", plain, sys.exc_info())
        return [b"sorry"]

    def call(app: Any, method: str) -> tuple[str, bytes, int]:
        environ: dict[str, Any] = {"SCRIPT_NAME": "", "PATH_INFO": "/x", "QUERY_STRING": "", "REQUEST_METHOD": method}
        setup_testing_defaults(environ)
        environ["HTTP_X_API_KEY"] = two["key", "acme"].headers[0][1]
        started: list[tuple[str, list[tuple[str, str]]]] = []
        sent: list[bytes] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            started.append((status, headers))
            return sent.append

        response: Any = validator(TenancyWSGIMiddleware(validator(app), tenancy=tenancy))(environ, start_response)
        sent += response
        response.close()
        ((status, headers),) = started
        return status, b"".join(sent), len(headers)

    for app, expected in (
        (writes, ("200 OK", b"1 acme 2", 1)),
        (late, ("200 OK", b"acme", 3)),
        (fails, ("500 Sorry", b"sorry", 1)),
    ):
        for method in ("GET", "HEAD"):
            assert await asyncio.to_thread(call, app, method) == expected
    assert closed == ["acme", "acme"]


async def test_a_request_that_its_thread_gave_up_is_ended(
    tenancy: Tenancy, two: dict[tuple[str, str], Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the middleware decides about it later is for nobody, and no task waits for the thread."""
    app = guarded(tenancy)
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/notes",
        "SERVER_NAME": "testserver",
        "SERVER_PORT": "80",
        "HTTP_X_API_KEY": two["key", "acme"].headers[0][1],
    }
    monkeypatch.setattr(hops, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(hops, "_BLOCKED_LOOKS", 3)
    with ThreadPoolExecutor(1) as pool, pytest.raises(EventLoopBlockedError):
        pool.submit(app.wsgi_app, environ, lambda *_: lambda _: None).result(10)
    await asyncio.to_thread(tenancy.sync.call, asyncio.sleep, 0)  # by now the loop has begun with it
    await until(lambda: not any("Exchange" in repr(task) for task in asyncio.all_tasks()))


def test_an_unusable_thread_is_told_so(tenancy_config: TenancyConfig) -> None:
    """Where no event loop has it open, the first request opens it; ``close`` ends it."""
    tenancy = Tenancy(tenancy_config)
    tenancy.sync.open(initialise=True)
    key = tenancy.sync.call(tenancy.tenants.create, "acme").api_key
    tenancy.sync.close()
    client = guarded(tenancy).test_client()
    try:
        assert client.get("/who", headers={"X-API-Key": key}).json[0] == "acme"
        assert tenancy.is_open
        with tenancy.sync.session("acme") as session:
            assert session.scalar(text("SELECT 1")) == 1
    finally:
        tenancy.sync.close()
    assert not tenancy.is_open


async def test_a_request_has_its_id_in_the_application_s_thread(
    tenancy: Tenancy, two: dict[tuple[str, str], Caller]
) -> None:
    """As with ASGI: taken, sent back once, in refusals, and not left in the thread for the next request."""
    acme = two["key", "acme"]

    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = f"{current_request_id()} {log_fields().tenant}".encode()
        headers = [("X-Request-ID", "of the application"), ("Content-Length", str(len(body)))]
        start_response("200 OK", [*headers, ("Content-Type", "text/plain")])
        return [body]

    labelled = TenancyWSGIMiddleware(app, tenancy=tenancy, request_id=True)
    async with serve(labelled) as port, Wire.to(port) as wire:
        for request_id in ("edge-1", "edge-2"):
            answer = await wire.request("/", [*acme.headers, ("X-Request-ID", request_id)])
            assert (answer.header("x-request-id"), answer.body) == (request_id, f"{request_id} acme".encode())
            assert answer.header("content-type") == "text/plain"
        refused = await wire.request("/", [("X-Request-ID", "edge-3")])
        assert (refused.status, refused.header("x-request-id"), refused.json()["request_id"]) == (
            401,
            "edge-3",
            "edge-3",
        )
    async with serve(TenancyWSGIMiddleware(app, tenancy=tenancy)) as port, Wire.to(port) as wire:
        without = await wire.request("/", [*acme.headers, ("X-Request-ID", "edge-4")])
        assert (without.header("x-request-id"), without.body) == ("of the application", b"None acme")


async def test_the_deadline_of_a_request_holds_in_the_application_s_thread(
    tenancy: Tenancy, two: dict[tuple[str, str], Caller]
) -> None:
    """For its connections, and for none of the next request that has no deadline."""
    left: list[float] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        left.append(current_deadline() - time.monotonic())
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "0")])
        return []

    for middleware in (
        TenancyWSGIMiddleware(app, tenancy=tenancy, deadline=30.0),
        TenancyWSGIMiddleware(app, tenancy=tenancy),
    ):
        async with serve(middleware) as port, Wire.to(port) as wire:
            assert (await wire.request("/", two["key", "acme"].headers)).status == 200
    assert 0 < left[0] <= 30 and left[1] == math.inf


async def test_a_connection_that_is_lost_to_a_server_that_is_down_is_answered_503(
    tenancy: Tenancy,
    two: dict[tuple[str, str], Caller],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not while the server answers, and no other error of the database."""
    app = guarded(tenancy)
    app.logger.disabled = True
    headers = two["key", "acme"].headers
    ended = "/fail?sql=SELECT%20pg_terminate_backend(pg_backend_pid())"
    breaker = tenancy.internals.servers["default"].breaker
    async with serve(app) as port, Wire.to(port) as wire:
        assert (await wire.request("/fail?sql=SELECT%201/0", headers)).status == 500
        monkeypatch.setattr(app.wsgi_app.middleware, "_server_away", lambda error: breaker.error())
        answer = await wire.request(ended, headers)
        assert (answer.status, answer.json()["type"]) == (503, "urn:tenancy:problem:database-unavailable")
        assert answer.header("retry-after") is not None
        assert "was lost during a request" in caplog.text and "pg_terminate_backend" in caplog.text
        assert (await wire.request("/fail?sql=SELECT%201/0", headers)).status == 500
    async with serve(app) as port, Wire.to(port) as wire:
        monkeypatch.undo()
        assert (await wire.request(ended, headers)).status == 500
