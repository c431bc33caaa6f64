"""Applications with connections that stay open: a websocket, a streaming response, and a session in a task."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.config import TenancyConfig
from tenancy_orm.context import set_current
from tenancy_orm.errors import TenancyError
from tenancy_orm.events import AdmissionEnded
from tenancy_orm.tenancy import Tenancy
from tests.support import callers
from tests.support.models import Base

_TICK = 0.005

ALONE = "/alone"
"""What is below has no tenant."""


class UnwatchedMiddleware:
    """Authenticates and binds, as the real one does, and never looks again."""

    def __init__(self, app: ASGIApp, *, tenancy: Tenancy) -> None:
        self.app = app
        self.guard = TenancyMiddleware(app, tenancy=tenancy, **callers.options())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "lifespan" and (tenant := await callers.believed(self.guard, scope)) is not None:
            set_current(tenant)
        await self.app(scope, receive, send)


def create_unwatched() -> Starlette:
    """The application below ``UnwatchedMiddleware``."""
    return create(Tenancy(TenancyConfig.from_env(metadata=Base.metadata)), UnwatchedMiddleware)


def create_watched() -> Starlette:
    """The application below the real middleware."""
    tenancy = Tenancy(TenancyConfig.from_env(metadata=Base.metadata))
    return create(
        tenancy,
        TenancyMiddleware,
        **callers.options(exempt=["/state"], without_tenant=[f"{ALONE}/*"], operators=_is_operator),
    )


def _is_operator(scope: Scope, credential: object) -> bool:
    return (b"x-operator", b"yes") in scope["headers"]


async def _refusal(attempt: Callable[[], Awaitable[object]]) -> str:
    while True:
        try:
            await attempt()
        except TenancyError as error:
            return type(error).__name__
        await asyncio.sleep(_TICK)


def create(tenancy: Tenancy, middleware: Any, **options: Any) -> Starlette:
    """The application. ``/state`` tells how the work of ended connections was refused, and what is left of them.

    With ``speak`` it has the streams that are silent begin.
    """
    refused: Counter[tuple[str, str]] = Counter()
    ended: list[list[str | None]] = []
    running: set[asyncio.Task[None]] = set()
    spoken = asyncio.Event()
    tenancy.events.subscribe(
        AdmissionEnded, lambda event: ended.append([event.kind, event.reason, event.credential_id, event.source])
    )

    async def read() -> list[str]:
        return [row.body for row in await tenancy.fetch_all("SELECT body FROM notes")]

    async def work() -> None:
        """What a connection has begun in a task of its own: a session that stays open."""
        with contextlib.suppress(asyncio.CancelledError):
            try:
                async with tenancy.session() as session:
                    while True:
                        await session.execute(text("SELECT body FROM notes"))
                        await asyncio.sleep(_TICK)
            except (TenancyError, DBAPIError) as error:
                # suspension ends the role's connections besides
                refused["open session", type(error).__name__] += 1
        attempts: dict[str, Callable[[], Awaitable[object]]] = {
            "new session": read,
            "named session": lambda: tenancy.fetch_all("SELECT 1", tenant="acme"),
            "scope": lambda: tenancy.run("acme", read),
            "manager": lambda: tenancy.quotas.usage("acme"),
        }
        for name, attempt in attempts.items():
            # PostgreSQL may have refused the session before this process knew why
            refused[name, await _refusal(attempt)] += 1

    def begin() -> None:
        task = asyncio.create_task(work())
        running.add(task)
        task.add_done_callback(running.discard)

    async def websocket(websocket: WebSocket) -> None:
        await websocket.accept()
        if websocket.query_params.get("work"):
            begin()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                await websocket.receive_text()
                await websocket.send_text(json.dumps(await read()))

    async def echo(websocket: WebSocket) -> None:
        """Without a tenant."""
        await websocket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            async for sent in websocket.iter_text():
                await websocket.send_text(sent)

    async def ticks(request: Request) -> StreamingResponse:
        """Without a tenant."""

        async def lines() -> AsyncIterator[bytes]:
            while True:
                yield b"0\n"
                await asyncio.sleep(_TICK)

        return StreamingResponse(lines())

    async def stream(request: Request) -> StreamingResponse:
        async def lines() -> AsyncIterator[bytes]:
            if request.query_params.get("silent"):
                await spoken.wait()
            for number in itertools.count():
                yield json.dumps([number, *await read()]).encode() + b"\n"
                # one that is idle waits for what never comes
                await asyncio.sleep(3_600 if request.query_params.get("idle") else _TICK)

        return StreamingResponse(lines())

    async def state(request: Request) -> JSONResponse:
        if request.query_params.get("speak"):
            spoken.set()
        parts = tenancy.internals.directory.admissions
        return JSONResponse(
            {
                "refused": sorted([*key, count] for key, count in refused.items()),
                "ended": ended,
                "watched": parts.watched,
                "tasks": len(running),
                "listening": tenancy.internals.directory.statistics.listening,
            }
        )

    lasting = [WebSocketRoute("/ws", websocket), Route("/stream", stream)]
    return Starlette(
        routes=[
            *lasting,
            Mount(callers.PUBLIC, routes=lasting),
            Mount(ALONE, routes=[WebSocketRoute("/ws", echo), Route("/stream", ticks)]),
            Route("/state", state),
        ],
        middleware=[Middleware(middleware, tenancy=tenancy, **options)],
        lifespan=tenancy.lifespan,
    )
