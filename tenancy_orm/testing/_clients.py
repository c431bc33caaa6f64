"""HTTP clients for the application under test, without a server: httpx on its ASGI interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._background import BackgroundLoop

BASE_URL = "http://testserver"
_SECONDS = 30.0


class ApplicationStartError(RuntimeError):
    """The lifespan of the application under test has failed."""


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[ASGIApp]:
    """Run the application's lifespan, as a server does, and yield an application that has its state.

    An application without a lifespan has none to run.

    Raises:
        ApplicationStartError: its start has failed, or its end.
    """
    state: dict[str, Any] = {}
    received: asyncio.Queue[Message] = asyncio.Queue()
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    received.put_nowait({"type": "lifespan.startup"})

    async def run() -> None:
        try:
            await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}, received.get, sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.get_running_loop().create_task(run())
    started = await _answer(sent, task, "start")

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    try:
        yield with_state
    finally:
        received.put_nowait({"type": "lifespan.shutdown"})
        if started:
            await _answer(sent, task, "end")
        await asyncio.wait([task], timeout=_SECONDS)
        task.cancel()


async def _answer(sent: asyncio.Queue[Message | None], task: asyncio.Task[None], what: str) -> bool:
    """Wait for the application's answer; False where it knows no lifespan."""
    async with asyncio.timeout(_SECONDS):
        message = await sent.get()
    if message is None:
        if task.done() and not task.cancelled():
            task.exception()
        return False
    if message["type"].endswith(".failed"):
        raise ApplicationStartError(f"the application does not {what}: {message.get('message', '')}".rstrip(": \n"))
    return True


class _SyncTransport(httpx.BaseTransport):
    """Sends requests of a thread to an application in the background loop."""

    def __init__(self, app: ASGIApp, background: BackgroundLoop) -> None:
        self._transport = httpx.ASGITransport(app)
        self._background = background

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._background.run(self._send(request))

    async def _send(self, request: httpx.Request) -> httpx.Response:
        asynchronous = httpx.Request(
            request.method, request.url, headers=request.headers, content=request.read(), extensions=request.extensions
        )
        response = await self._transport.handle_async_request(asynchronous)
        content = await response.aread()
        return httpx.Response(response.status_code, headers=response.headers, content=_Raw(content))


class _Raw(httpx.SyncByteStream):
    """A body as it was sent: with the encoding that its headers name."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Any:
        yield self._content


def asynchronous(app: ASGIApp, headers: Iterable[tuple[str, str]]) -> httpx.AsyncClient:
    """A client for coroutines."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE_URL, headers=dict(headers))


def synchronous(app: ASGIApp, headers: Iterable[tuple[str, str]], background: BackgroundLoop) -> httpx.Client:
    """A client for plain functions; the application runs in the background loop."""
    return httpx.Client(transport=_SyncTransport(app, background), base_url=BASE_URL, headers=dict(headers))


__all__ = ["ApplicationStartError", "asynchronous", "lifespan", "synchronous"]
