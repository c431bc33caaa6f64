"""Connections that stay open: watched from the right moment on, ended cleanly, and released."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from tenancy_orm.authentication.admission import Admission
from tenancy_orm.context import current_tenant
from tenancy_orm.errors import AdmissionEndedError
from tests.support.asgi import request
from tests.support.connections import CLOSE, KEY, Tenants, finish, stream, websocket
from tests.support.waiting import until


@pytest.fixture
async def tenants() -> AsyncIterator[Tenants]:
    """The tenants."""
    made = Tenants()
    yield made
    await made.admissions.close()


# --- websockets -----------------------------------------------------------------------------------------------------


async def test_a_websocket_is_closed_and_its_application_disconnected(tenants: Tenants) -> None:
    """The one that waits for a message gets the disconnect, as from its peer."""
    got: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        got.append(await receive())
        with pytest.raises(ConnectionAbortedError):
            await send({"type": "websocket.send", "text": "more"})
        with pytest.raises(ConnectionAbortedError):
            await receive()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        with pytest.raises(AdmissionEndedError):
            bound = current_tenant()
            assert bound.admission is not None
            bound.admission.check()

    server = websocket()
    task = server.serve(tenants.guard(app))
    await until(lambda: server.types() == ["websocket.accept"])
    assert tenants.admissions.watched == 1
    tenants.revoke()
    await finish(task)
    assert server.sent[1:] == [CLOSE]
    assert got == [{**CLOSE, "type": "websocket.disconnect"}]
    assert server.bound == [None] * len(server.bound)
    assert tenants.admissions.watched == 0
    assert [(e.slug, e.kind, e.reason, e.credential_id, e.source) for e in tenants.events] == [
        ("acme", "websocket", "unknown", "acmexxxxxxxxxxxx", "192.0.2.7")
    ]


async def test_starlettes_websocket_ends_as_if_its_peer_had_gone(tenants: Tenants) -> None:
    """Whether it receives or sends; what the endpoint raises then is nobody's failure."""
    raised: list[type[BaseException]] = []

    def endpoint(body: Callable[[WebSocket], Awaitable[None]]) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            opened = WebSocket(scope, receive, send)
            await opened.accept()
            try:
                while True:
                    await body(opened)
            except BaseException as error:
                raised.append(type(error))
                raise

        return app

    async def sending(opened: WebSocket) -> None:
        await opened.send_text("tick")
        await asyncio.sleep(0)

    async def receiving(opened: WebSocket) -> None:
        await opened.receive_text()

    servers = [websocket(), websocket()]
    tasks = [
        server.serve(tenants.guard(endpoint(body))) for server, body in zip(servers, (sending, receiving), strict=True)
    ]
    await until(lambda: tenants.admissions.watched == 2)
    tenants.revoke()
    for task in tasks:
        await finish(task)
    assert raised == [WebSocketDisconnect] * 2
    assert [server.sent[-1] for server in servers] == [CLOSE] * 2


@pytest.mark.parametrize("map_errors", [True, False])
async def test_a_websocket_is_not_accepted_with_what_has_ended(tenants: Tenants, map_errors: bool) -> None:
    """It was authenticated, and its key revoked before it was accepted."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        tenants.revoke()
        await tenants.ended()
        await send({"type": "websocket.accept"})

    server = websocket()
    await finish(server.serve(tenants.guard(app, map_errors=map_errors)))
    assert [(message["type"], message["code"]) for message in server.sent] == [("websocket.close", 1008)]
    assert (tenants.admissions.watched, tenants.events) == (0, [])


async def test_a_websocket_that_ends_while_it_is_accepted_is_closed_after_it(tenants: Tenants) -> None:
    """A close that came before would be another message to the server."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        pytest.fail("accepted")

    server = websocket()
    server.writable.clear()
    task = server.serve(tenants.guard(app))
    await until(lambda: tenants.admissions.watched)
    tenants.revoke()
    await tenants.ended()
    server.writable.set()
    await finish(task)
    assert server.sent == [{"type": "websocket.accept"}, CLOSE]


async def test_an_application_that_waits_for_a_slow_peer_is_not_left_waiting(tenants: Tenants) -> None:
    """Nor does the close wait for that peer for ever."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        server.writable.clear()
        with pytest.raises(ConnectionAbortedError):
            await send({"type": "websocket.send", "text": "never read"})

    server = websocket()
    task = server.serve(tenants.guard(app))
    await until(lambda: server.types() == ["websocket.accept"] and not server.writable.is_set())
    tenants.revoke()
    await finish(task)
    assert server.types() == ["websocket.accept"]


@pytest.mark.parametrize("end", ["returns", "closes", "crashes", "is cancelled"])
async def test_however_the_application_ends_it_is_not_watched_any_more(tenants: Tenants, end: str) -> None:
    """And is not closed a second time."""
    accepted = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        accepted.set()
        if end == "closes":
            await send({"type": "websocket.close"})
            assert tenants.admissions.watched == 0
        elif end == "crashes":
            raise ZeroDivisionError
        elif end == "is cancelled":
            await receive()

    server = websocket()
    task = server.serve(tenants.guard(app))
    await accepted.wait()
    if end == "is cancelled":
        assert tenants.admissions.watched == 1
        task.cancel()
    with suppress(ZeroDivisionError, asyncio.CancelledError):
        await task
    assert task.cancelled() is (end == "is cancelled")
    assert tenants.admissions.watched == 0
    tenants.revoke()
    await tenants.ended()
    assert CLOSE not in server.sent


async def test_a_cancellation_from_elsewhere_is_not_swallowed(tenants: Tenants) -> None:
    """Though it meets the end."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        pytest.fail("received")

    server = websocket()
    task = server.serve(tenants.guard(app))
    await until(lambda: tenants.admissions.watched)
    derived: list[Admission] = list(tenants.admissions._watched)
    task.cancel()
    derived[0].verify(None)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.sent[1:] == [CLOSE]


# --- streams --------------------------------------------------------------------------------------------------------


def streaming(*, idle: bool = False) -> ASGIApp:
    """An application that streams for ever."""

    async def lines() -> AsyncIterator[bytes]:
        while True:
            yield b"line"
            await asyncio.sleep(3_600 if idle else 0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(lines())(scope, receive, send)

    return app


@pytest.mark.parametrize(("spec", "idle"), [("2.3", True), ("2.3", False), ("2.4", False)])
async def test_a_stream_is_cut_and_not_completed(tenants: Tenants, spec: str, idle: bool) -> None:
    """Also one that is idle, where the application listens for the disconnect, as Starlette does below uvicorn."""
    server = stream()
    server.scope["asgi"] = {"version": "3.0", "spec_version": spec}
    task = server.serve(tenants.guard(streaming(idle=idle)))
    await until(lambda: tenants.admissions.watched)
    tenants.revoke()
    with pytest.raises((ConnectionAbortedError, ClientDisconnect)):
        await finish(task)
    assert all(message["more_body"] for message in server.sent[1:])
    assert tenants.admissions.watched == 0
    assert [(event.kind, event.reason) for event in tenants.events] == [("stream", "unknown")]


async def test_no_middleware_completes_what_was_cut(tenants: Tenants) -> None:
    """Neither one further out, which gets the failure, nor ``BaseHTTPMiddleware`` further in."""

    async def pass_on(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    guarded = tenants.guard(BaseHTTPMiddleware(streaming(idle=True), pass_on))

    async def completing(scope: Scope, receive: Receive, send: Send) -> None:
        await guarded(scope, receive, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    server = stream()
    server.scope["asgi"] = {"version": "3.0", "spec_version": "2.3"}
    task = server.serve(completing)
    await until(lambda: tenants.admissions.watched)
    tenants.revoke()
    with pytest.raises(ConnectionAbortedError):
        await finish(task)
    assert all(message["more_body"] for message in server.sent[1:])


async def test_a_stream_that_begins_after_the_end_is_refused(tenants: Tenants) -> None:
    """Its first part is not sent."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tenants.revoke()
        await tenants.ended()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})

    server = stream()
    with pytest.raises(ConnectionAbortedError):
        await finish(server.serve(tenants.guard(app)))
    assert server.types() == ["http.response.start"]
    assert [event.kind for event in tenants.events] == ["stream"]


@pytest.mark.parametrize("spec", ["none", "2.3"])
async def test_a_stream_that_has_no_part_yet_is_cut_where_it_listens(tenants: Tenants, spec: str) -> None:
    """Server-sent events that wait for the first one, by hand and by Starlette."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b"never"

    async def by_hand(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert await receive() == {"type": "http.disconnect"}
        with pytest.raises(ConnectionAbortedError):
            await send({"type": "http.response.body", "body": b"all at once"})

    server = stream()
    server.scope["asgi"] = {"version": "3.0", "spec_version": spec}
    task = server.serve(tenants.guard(by_hand if spec == "none" else StreamingResponse(nothing())))
    await until(lambda: tenants.admissions.watched)
    assert server.types() == ["http.response.start"]
    tenants.revoke()
    with pytest.raises(ConnectionAbortedError):
        await finish(task)
    assert server.types() == ["http.response.start"]
    assert tenants.admissions.watched == 0
    assert [(event.kind, event.reason) for event in tenants.events] == [("stream", "unknown")]


@pytest.mark.parametrize("map_errors", [True, False])
@pytest.mark.parametrize("then", ["answers", "answers, whatever is raised", "returns", "raises"])
async def test_a_request_that_listens_before_it_answers_is_refused(
    tenants: Tenants, then: str, map_errors: bool
) -> None:
    """An upload that never ends, for example. What the application answers afterwards does not pass."""
    start: Message = {"type": "http.response.start", "status": 200, "headers": []}
    sends: list[Send] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        sends.append(send)
        await receive()
        assert await receive() == {"type": "http.disconnect"}
        if then == "answers":
            await send(start)
        elif then == "raises":
            raise ClientDisconnect
        elif then != "returns":
            for _ in range(2):
                with pytest.raises(AdmissionEndedError):
                    await send(start)

    server = stream()
    task = server.serve(tenants.guard(app, map_errors=map_errors))
    await until(lambda: tenants.admissions.watched)
    tenants.revoke()
    await finish(task)
    assert server.types() == ["http.response.start", "http.response.body"]
    assert server.sent[0]["status"] == 401
    assert b"invalid-credential" in server.sent[1]["body"]
    assert (tenants.admissions.watched, tenants.events) == (0, [])
    for late in (start, {"type": "http.response.body", "body": b"late"}):
        with pytest.raises(ConnectionAbortedError):
            await sends[0]({**late, "more_body": True})
    assert len(server.sent) == 2


async def test_a_request_that_begins_to_listen_after_the_end_is_refused(tenants: Tenants) -> None:
    """It was let in, and its key revoked before it received a second time."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        tenants.revoke()
        await tenants.ended()
        assert await receive() == {"type": "http.disconnect"}

    server = stream()
    await finish(server.serve(tenants.guard(app)))
    assert server.sent[0]["status"] == 401


@pytest.mark.parametrize("listens", ["before", "during", "after"])
async def test_a_response_that_is_complete_is_left_alone_by_who_listens(tenants: Tenants, listens: str) -> None:
    """Its connection serves further requests: nothing may interrupt what waits for them, nor fail."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def listen(when: str) -> None:
            if when == listens:
                listening.append(asyncio.ensure_future(receive()))
                await asyncio.sleep(0)
                assert tenants.admissions.watched == (when != "after")

        listening: list[asyncio.Task[Message]] = []
        await receive()
        await listen("before")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await listen("during")
        await send({"type": "http.response.body", "body": b"all"})
        assert tenants.admissions.watched == 0
        await listen("after")
        tenants.revoke()
        await tenants.ended()
        assert not listening[0].done()
        server.incoming.put_nowait({"type": "http.disconnect"})
        await listening[0]

    server = stream()
    await finish(server.serve(tenants.guard(app)))
    assert server.types() == ["http.response.start", "http.response.body"]
    assert tenants.events == []


async def test_a_stream_that_was_completed_is_left_alone(tenants: Tenants) -> None:
    """Though its application goes on, with background tasks for example."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        assert tenants.admissions.watched == 1
        await send({"type": "http.response.body", "body": b"end"})
        assert tenants.admissions.watched == 0
        tenants.revoke()
        await tenants.ended()

    server = stream()
    await finish(server.serve(tenants.guard(app)))
    assert server.sent[-1] == {"type": "http.response.body", "body": b"end"}
    assert tenants.events == []


async def test_an_ordinary_request_is_not_watched(tenants: Tenants) -> None:
    """It is answered; what it does with its tenant afterwards is refused."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tenants.revoke()
        await tenants.ended()
        assert tenants.admissions.watched == 0
        bound = current_tenant()
        assert bound.admission is not None
        bound.admission.check()

    answer = await request(tenants.guard(app), headers=[KEY])
    assert (answer.status, answer.json()["type"]) == (401, "urn:tenancy:problem:invalid-credential")
    assert b"revoked" not in answer.body
    assert b"unknown" not in answer.body


async def test_exempt_paths_stay_open(tenants: Tenants) -> None:
    """They are nobody's."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        tenants.revoke()
        await tenants.ended()
        await send({"type": "websocket.send", "text": "still here"})

    server = websocket()
    await finish(server.serve(tenants.guard(app, exempt=["/"])))
    assert server.types() == ["websocket.accept", "websocket.send"]
