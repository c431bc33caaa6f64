"""An application served by the uvicorn command, in a process of its own; and the applications that are served so."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenancy_orm.asgi import TenancyMiddleware
from tenancy_orm.config import TenancyConfig
from tenancy_orm.context import current_tenant_or_none, set_current
from tenancy_orm.errors import NoTenantError
from tenancy_orm.tenancy import Tenancy
from tenancy_orm.wsgi import TenancyWSGIMiddleware
from tests.support import callers
from tests.support.models import Base
from tests.support.shell import ROOT, environment, python_path
from tests.support.warm import start_module

_DEADLINE = 30.0
_RUNNING = re.compile(rb"(?:Uvicorn running on|Listening at:) http://127\.0\.0\.1:(\d+)")


@asynccontextmanager
async def uvicorn_command(factory: str, config: TenancyConfig, *options: str) -> AsyncIterator[int]:
    """Run ``uvicorn --factory`` on the databases of ``config``; yields the port.

    The ``factory`` is one of this module, or "module:name".
    """
    factory = factory if ":" in factory else f"tests.support.served:{factory}"
    arguments = ("--factory", factory, "--host", "127.0.0.1", "--port", "0", "--ws", "websockets-sansio", *options)
    after = ["uvicorn.main", "uvicorn.protocols.websockets.websockets_sansio_impl", "tenancy_orm.asgi"]
    async with _served("uvicorn", arguments, config, after) as port:
        yield port


@asynccontextmanager
async def gunicorn_command(call: str, config: TenancyConfig, *options: str) -> AsyncIterator[int]:
    """Run ``gunicorn`` with two workers on the databases of ``config``; yields the port.

    The ``call`` of a function of this module returns the application.
    """
    arguments = (f"tests.support.served:{call}", "--bind", "127.0.0.1:0", "--workers", "2", *options)
    after = ["gunicorn.app.wsgiapp", "gunicorn.workers.gthread", "uvicorn_worker", "tenancy_orm.wsgi"]
    async with _served("gunicorn", arguments, config, after) as port:
        yield port


@asynccontextmanager
async def _served(
    program: str, arguments: Sequence[str], config: TenancyConfig, after: list[str]
) -> AsyncIterator[int]:
    process = await start_module(
        program,
        *arguments,
        cwd=ROOT,
        env=environment(**variables(config)),
        after=after,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        # with --workers there are further processes, which a failed test must not leave
        start_new_session=True,
    )
    log = b""
    try:
        async with asyncio.timeout(_DEADLINE):
            while (found := _RUNNING.search(log)) is None:
                line = await process.stderr.readline()
                assert line, f"{program} ended:\n{log.decode()}"
                log += line
        # what else it logs must not fill the pipe
        reading = asyncio.create_task(process.stderr.read())
        yield int(found[1])
        process.terminate()
        await asyncio.wait_for(reading, _DEADLINE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.wait_for(process.wait(), _DEADLINE)


def variables(config: TenancyConfig) -> Mapping[str, str]:
    """``config`` as ``TENANCY_*`` variables."""
    return {
        "TENANCY_CONTROL_URL": config.control_url,
        "TENANCY_SERVERS": " ".join(
            f"{name}={given}" if isinstance(given, str) else f"{name}={given.admin} {name}.tenants={given.tenants}"
            for name, given in (config.servers or {}).items()
        ),
        "TENANCY_ENCRYPTION_KEYS": ",".join(
            f"{key_id}:{key!s}" for key_id, key in (config.encryption_keys or {}).items()
        ),
        "TENANCY_NAME_PREFIX": config.name_prefix,
        "TENANCY_DIRECTORY_TTL": str(config.directory.ttl),
        "TENANCY_DIRECTORY_GRACE": str(config.directory.grace),
        **({"TENANCY_CONTROL_LISTEN_URL": config.control.listen_url} if config.control.listen_url else {}),
        "PYTHONPATH": python_path(ROOT),
    }


class NaiveMiddleware:
    """Binds the tenant where there is a credential, and does no more: what the real one must be better than."""

    def __init__(self, app: ASGIApp, *, tenancy: Tenancy) -> None:
        self.app = app
        self.guard = TenancyMiddleware(app, tenancy=tenancy, **callers.options())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http" and (tenant := await callers.believed(self.guard, scope)) is not None:
            set_current(tenant)
        await self.app(scope, receive, send)


class OutsideProbe:
    """Stands before every other middleware and answers with the tenant that it sees there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        tenant = current_tenant_or_none()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-outside", str(tenant and tenant.slug).encode())]
            await send(message)

        await self.app(scope, receive, tell)


def create_naive() -> Starlette:
    """The application below ``NaiveMiddleware``."""
    return _create(NaiveMiddleware)


def create_guarded() -> Starlette:
    """The application below the real middleware."""
    return _create(TenancyMiddleware, **callers.options(exempt=["/open"]))


def _create(middleware: Any, **options: object) -> Starlette:
    tenancy = Tenancy(TenancyConfig.from_env(metadata=Base.metadata))

    async def answer(request: Request) -> JSONResponse:
        length = len(await request.body())
        bound = current_tenant_or_none()
        try:
            notes = [row.body for row in await tenancy.fetch_all("SELECT body FROM notes")]
        except NoTenantError:
            notes = None
        return JSONResponse({"tenant": bound and bound.slug, "notes": notes, "length": length})

    return Starlette(
        routes=[
            Route(path, answer, methods=["GET", "POST"]) for path in ("/open", "/notes", f"{callers.PUBLIC}/notes")
        ],
        middleware=[Middleware(OutsideProbe), Middleware(middleware, tenancy=tenancy, **options)],
        lifespan=tenancy.lifespan,
    )


PIDS = "SELECT pg_backend_pid()"


def create_forking_asgi(opened: str | None = None) -> Starlette:
    """An application that answers with the processes of its request: see ``_processes``."""
    tenancy = Tenancy(TenancyConfig.from_env(metadata=Base.metadata))
    before = None if opened is None else _open_before(tenancy, opened)

    async def answer(request: Request) -> JSONResponse:
        return JSONResponse(_processes(before, await tenancy.fetch_value(PIDS)))

    return Starlette(
        routes=[Route("/", answer)],
        middleware=[Middleware(TenancyMiddleware, tenancy=tenancy)],
        lifespan=tenancy.lifespan,
    )


def create_forking_wsgi(opened: str | None = None) -> Any:
    """The same, for synchronous servers."""
    tenancy = Tenancy(TenancyConfig.from_env(metadata=Base.metadata))
    before = None if opened is None else _open_before(tenancy, opened)

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        body = json.dumps(_processes(before, tenancy.sync.fetch_value(PIDS))).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return TenancyWSGIMiddleware(application, tenancy=tenancy)


def _open_before(tenancy: Tenancy, slug: str) -> int:
    # what an application should not do, and some do: it is open when the server forks
    return int(tenancy.sync.open().fetch_value(PIDS, tenant=slug))


def _processes(before: int | None, session: int) -> dict[str, int | None]:
    """This process; that of its session on PostgreSQL; and that of a session of the server's first process."""
    return {"worker": os.getpid(), "session": session, "before": before}
