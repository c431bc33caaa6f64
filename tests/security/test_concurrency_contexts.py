"""Code that a request starts runs for the request's tenant, or for none."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.context import current_tenant_or_none, set_current
from tenancy_orm.errors import NoTenantError
from tenancy_orm.tenancy import Tenancy
from tenancy_orm.tenant import Tenant
from tests.support.asgi import Wire, serve
from tests.support.callers import EVERYONE, KINDS, PUBLIC, Caller, Callers, believed, options
from tests.support.models import Note

SLUGS = ("acme", "globex", "initech")
ROUNDS = len(EVERYONE)
DEADLINE = 30.0

Everyone = dict[str, list[Caller]]


@pytest.fixture
async def everyone(tenancy: Tenancy) -> Everyone:
    """Three tenants, each with a note that names it, and callers of each kind."""
    for slug in SLUGS:
        await tenancy.tenants.create(slug)
        async with tenancy.transaction(slug) as session:
            session.add(Note(body=slug))
    callers = Callers(tenancy)
    return {slug: [await callers.make(kind, slug) for kind in EVERYONE] for slug in SLUGS}


class Application:
    """Routes that reach the tenant's database from everywhere a request can run code."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        self.executor = ThreadPoolExecutor(4)
        self.background: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        # every request waits here for the others, so that all are in progress at once
        self.together = asyncio.Barrier(len(SLUGS))

    async def canary(self) -> str:
        """The note of the database that a session opens here; the name of the error where it opens none."""
        try:
            return str(await self.tenancy.fetch_value("SELECT string_agg(body, ',') FROM notes"))
        except NoTenantError:
            return "NoTenantError"

    def canary_of_thread(self) -> str:
        """The same from a thread: asked on the event loop, with the tenant that is bound in the thread."""
        bound = current_tenant_or_none()
        if bound is None:
            return "NoTenantError"
        return asyncio.run_coroutine_threadsafe(self.tenancy.run(bound, self.canary), self.loop).result(DEADLINE)

    async def gather(self) -> list[str]:
        """From tasks, and tasks of tasks."""

        async def nested() -> str:
            await self.together.wait()
            return await asyncio.create_task(self.canary())

        return [await nested(), *await asyncio.gather(*(self.canary() for _ in range(3)))]

    async def threads(self) -> list[str]:
        """From threads that copy the context."""
        await self.together.wait()
        return [await asyncio.to_thread(self.canary_of_thread), await run_in_threadpool(self.canary_of_thread)]

    async def foreign_threads(self) -> list[str]:
        """From threads that do not: they belong to no request."""
        await self.together.wait()
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(self.canary_of_thread()))
        thread.start()
        seen.append(await self.loop.run_in_executor(self.executor, self.canary_of_thread))
        await asyncio.to_thread(thread.join, DEADLINE)
        return seen

    async def callbacks(self) -> list[str]:
        """From callbacks of the event loop."""
        await self.together.wait()
        seen: asyncio.Queue[str] = asyncio.Queue()

        def call() -> None:
            bound = current_tenant_or_none()
            seen.put_nowait(bound.slug if bound else "none")

        self.loop.call_soon(call)
        self.loop.call_later(0.01, call)
        self.loop.call_soon_threadsafe(call)
        return [await seen.get() for _ in range(3)]

    async def numbers(self) -> AsyncGenerator[str, None]:
        """An async generator, asked with others' requests in between."""
        for _ in range(3):
            await self.together.wait()
            yield await self.canary()

    async def generator(self) -> list[str]:
        """From an async generator."""
        async with aclosing(self.numbers()) as numbers:
            return [number async for number in numbers]

    async def remember(self, slug: str) -> None:
        """A background task."""
        await asyncio.sleep(0)
        self.background.put_nowait((slug, await self.canary()))

    def routes(self) -> list[Any]:
        """One route for each."""

        def route(path: str, ask: Callable[[], Awaitable[list[str]]]) -> Route:
            async def endpoint(request: Request) -> JSONResponse:
                return JSONResponse(await ask())

            return Route(path, endpoint)

        own = [
            route("/tasks", self.gather),
            route("/threads", self.threads),
            route("/foreign-threads", self.foreign_threads),
            route("/callbacks", self.callbacks),
            route("/generator", self.generator),
            Route("/stream", self.stream),
            Route("/background", self.in_background),
            Route("/plain", self.plain),
            WebSocketRoute("/socket", self.socket),
        ]
        return [*own, Mount(PUBLIC, routes=own)]

    async def stream(self, request: Request) -> Response:
        """From the generator of a streaming response, which runs after the endpoint has returned."""

        async def chunks() -> AsyncIterator[str]:
            async for number in self.numbers():
                yield number + "\n"

        return StreamingResponse(chunks())

    async def in_background(self, request: Request) -> Response:
        """After the response."""
        return JSONResponse([], background=BackgroundTask(self.remember, request.headers["x-slug"]))

    def plain(self, request: Request) -> Response:
        """An endpoint without async, which Starlette runs in a thread."""
        return JSONResponse([self.canary_of_thread()])

    async def socket(self, websocket: WebSocket) -> None:
        """With every message of a websocket."""
        await websocket.accept()
        async for _ in websocket.iter_text():
            await self.together.wait()
            await websocket.send_text(await self.canary())


class GlobalMiddleware:
    """Keeps the tenant in one place for the whole process, which is what these tests must be able to notice."""

    def __init__(self, app: ASGIApp, *, tenancy: Tenancy) -> None:
        self.app = app
        self.guard = TenancyMiddleware(app, tenancy=tenancy, **options())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        GLOBAL[:] = [tenant for tenant in [await believed(self.guard, scope)] if tenant is not None]
        await self.app(scope, receive, send)


GLOBAL: list[Tenant] = []


async def ask_all(port: int, path: str, everyone: Everyone, turn: int = 0) -> dict[str, list[str]]:
    """Ask as every tenant at once, each with another kind of credential; in the next turn with the next kind."""

    async def ask(slug: str) -> list[str]:
        caller = everyone[slug][(turn + SLUGS.index(slug)) % len(EVERYONE)]
        async with Wire.to(port) as wire:
            answer = await wire.request(caller.path(path), [*caller.headers, ("X-Slug", slug)])
            assert answer.status == 200, answer
            return list(answer.json()) if path != "/stream" else answer.body.decode().split()

    return dict(zip(SLUGS, await asyncio.gather(*(ask(slug) for slug in SLUGS)), strict=True))


def build(application: Application, *middleware: Middleware) -> Starlette:
    guard = Middleware(TenancyMiddleware, tenancy=application.tenancy, **options())
    return Starlette(routes=application.routes(), middleware=middleware or [guard])


async def test_a_global_variable_would_mix_tenants_up(tenancy: Tenancy, everyone: Everyone) -> None:
    """Under these very requests: the attack."""
    application = Application(tenancy)

    async def canary() -> str:
        return str(await tenancy.fetch_value("SELECT string_agg(body, ',') FROM notes", tenant=GLOBAL[0]))

    application.canary = canary  # type: ignore[method-assign]
    async with serve(build(application, Middleware(GlobalMiddleware, tenancy=tenancy))) as port:
        answers = [await ask_all(port, "/tasks", everyone, turn) for turn in range(ROUNDS)]
    assert all(any(set(seen) != {slug} for slug, seen in answer.items()) for answer in answers)


@pytest.mark.parametrize("path", ["/tasks", "/threads", "/callbacks", "/generator", "/stream", "/plain"])
async def test_what_a_request_starts_runs_for_its_tenant(tenancy: Tenancy, everyone: Everyone, path: str) -> None:
    """With other tenants' requests in progress at the same time."""
    async with serve(build(Application(tenancy))) as port:
        for turn in range(ROUNDS):
            for slug, seen in (await ask_all(port, path, everyone, turn)).items():
                assert seen and set(seen) == {slug}


async def test_threads_without_a_context_have_no_tenant(tenancy: Tenancy, everyone: Everyone) -> None:
    """They get an error, and not the tenant of whichever request came last."""
    async with serve(build(Application(tenancy))) as port:
        for turn in (0, 3):
            for seen in (await ask_all(port, "/foreign-threads", everyone, turn)).values():
                assert seen == ["NoTenantError", "NoTenantError"]


async def test_background_tasks_run_for_their_tenant(tenancy: Tenancy, everyone: Everyone) -> None:
    """Although the response has gone, and the connection may serve another already."""
    application = Application(tenancy)
    async with serve(build(application)) as port:
        for turn in range(ROUNDS):
            await ask_all(port, "/background", everyone, turn)
        async with asyncio.timeout(DEADLINE):
            for _ in range(ROUNDS * len(SLUGS)):
                slug, seen = await application.background.get()
                assert seen == slug


async def test_every_message_of_a_websocket_is_its_tenants(tenancy: Tenancy, everyone: Everyone) -> None:
    """With the other tenants' messages in between."""
    async with serve(build(Application(tenancy))) as port:

        async def talk(slug: str, turn: int) -> list[str]:
            caller = everyone[slug][(turn + SLUGS.index(slug)) % len(EVERYONE)]
            async with caller.websocket(port, "/socket") as socket:
                seen = []
                for _ in range(2):
                    await socket.send("?")
                    seen.append(str(await socket.recv()))
                return seen

        for turn in range(ROUNDS):
            async with asyncio.timeout(DEADLINE):
                answers = await asyncio.gather(*(talk(slug, turn) for slug in SLUGS))
            assert answers == [[slug] * 2 for slug in SLUGS]


# --- abandoned generators -------------------------------------------------------------------------------------------


async def abandon(seen: list[Tenant | None]) -> None:
    """Leave an async generator behind that only the garbage collector finds."""

    async def generator() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            seen.append(current_tenant_or_none())

    left: list[Any] = [generator()]
    await anext(left[0])
    left.append(left)


async def collect() -> None:
    """Run the collector in this tenant's request."""
    gc.collect()
    for _ in range(5):
        await asyncio.sleep(0)


async def as_tenant(tenant: Tenant, func: Callable[[], Awaitable[None]]) -> None:
    set_current(tenant)
    await func()


@pytest.fixture
def no_collection() -> Any:
    """The collector runs on demand."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_an_abandoned_generator_ends_for_nobody(
    tenancy: Tenancy, everyone: Everyone, no_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to asyncio, what one tenant's generator does in its ``finally`` is done for another tenant."""
    acme, globex = [await tenancy.tenants.get(slug) for slug in ("acme", "globex")]
    seen: list[Tenant | None] = []
    with monkeypatch.context() as off:
        off.setattr("tenancy_orm.context.close_generators_unbound", lambda: None)
        await asyncio.create_task(as_tenant(acme, lambda: abandon(seen)))
        await asyncio.create_task(as_tenant(globex, collect))
        assert seen == [globex], "the attack must work"
    seen.clear()
    await asyncio.create_task(as_tenant(acme, lambda: abandon(seen)))
    await asyncio.create_task(as_tenant(globex, collect))
    assert seen == [None]


async def test_a_request_that_runs_the_collector_does_no_strangers_work(
    tenancy: Tenancy, everyone: Everyone, no_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through the middleware, which sees to it when it looks a credential up."""
    seen: list[Tenant | None] = []

    async def leave(request: Request) -> JSONResponse:
        await abandon(seen)
        return JSONResponse([])

    async def collecting(request: Request) -> JSONResponse:
        await collect()
        return JSONResponse([])

    app = Starlette(
        routes=[Route("/leave", leave), Route("/collect", collecting)],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy, **options())],
    )

    async def attack(by: int) -> list[str | None]:
        seen.clear()
        sys.set_asyncgen_hooks(*hooks)  # as in a process that has not served anyone
        tenancy.internals.directory.invalidate()
        async with serve(app) as port, Wire.to(port) as wire:
            await wire.request("/leave", everyone["acme"][by].headers)
            await wire.request("/collect", everyone["globex"][by].headers)
        return [None if tenant is None else tenant.slug for tenant in seen]

    hooks, kinds = sys.get_asyncgen_hooks(), range(len(KINDS))
    with monkeypatch.context() as off:
        for module in ("middleware", "callers"):
            off.setattr(f"tenancy_orm.asgi.{module}.close_generators_unbound", lambda: None)
        assert [await attack(by) for by in kinds] == [["globex"]] * len(kinds), "the attack must work"
    assert [await attack(by) for by in kinds] == [[None]] * len(kinds)
