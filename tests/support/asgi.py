"""Talking to ASGI applications: directly, and through a real uvicorn on a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import uvicorn
from starlette.types import ASGIApp, Message, Scope

from tenancy_orm.authentication.credential import Credential
from tenancy_orm.config import Tier
from tenancy_orm.errors import InvalidCredentialError
from tenancy_orm.events import EventBus
from tenancy_orm.quotas.rates import Rates
from tenancy_orm.tenant import Status, Tenant

if TYPE_CHECKING:
    from tenancy_orm.tenancy import Tenancy

DEADLINE = 10.0
PARSERS = ("h11", "httptools")

Headers = Iterable[tuple[str, str]]


# --- directly -------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What an application, or a server, answered."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header, or None; an error where there are several."""
        values = [value.decode("latin-1") for key, value in self.headers if key.lower() == name.lower().encode()]
        assert len(values) <= 1, f"{name} was answered {len(values)} times"
        return values[0] if values else None

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


def http_scope(path: str = "/", headers: Headers = (), **more: Any) -> Scope:
    """A scope as a server makes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("192.0.2.7", 50_000),
        "server": ("127.0.0.1", 80),
        **more,
    }


def websocket_scope(path: str = "/", headers: Headers = (), **more: Any) -> Scope:
    """A scope as a server makes it."""
    scope = http_scope(path, headers, subprotocols=[], **more)
    del scope["method"]
    return {**scope, "type": "websocket", "scheme": "ws"}


async def messages(app: ASGIApp, scope: Scope, received: Iterable[Message] = ()) -> list[Message]:
    """Call an application and return what it sent."""
    waiting = list(received)
    sent: list[Message] = []

    async def receive() -> Message:
        if waiting:
            return waiting.pop(0)
        if scope["type"] == "http":
            return {"type": "http.disconnect"}
        return {"type": "websocket.disconnect", "code": 1005}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def request(app: ASGIApp, path: str = "/", headers: Headers = (), *, body: bytes = b"", **more: Any) -> Answer:
    """Call an application with one HTTP request."""
    sent = await messages(
        app, http_scope(path, headers, **more), [{"type": "http.request", "body": body, "more_body": False}]
    )
    start, *rest = sent
    return Answer(start["status"], list(start["headers"]), b"".join(m.get("body", b"") for m in rest))


# --- a tenancy in memory --------------------------------------------------------------------------------------------


@dataclass
class MemoryDirectory:
    """Answers as ``Directory`` does, from a dictionary. ``known`` holds what ``peek`` finds."""

    keys: dict[str, Credential] = field(default_factory=dict)
    known: bool = True
    error: Exception | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    reports: list[tuple[str, str, str]] = field(default_factory=list)

    def peek(self, key: str, source: str | None = None) -> Credential | None:
        """What is known."""
        return self.keys.get(key) if self.known else None

    def is_key(self, text: str) -> bool:
        """Whether it begins as this one's keys do."""
        return text.startswith("key-")

    async def authenticate(self, key: str, *, source: str | None = None) -> Credential:
        """What is looked up."""
        self.asked.append((key, source))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if key not in self.keys:
            raise InvalidCredentialError("unknown")
        return self.keys[key]

    async def report_refused(self, error: InvalidCredentialError, source: str | None) -> None:
        """Keeps nothing."""

    def report_cross_tenant(self, credential: Credential, named: str, resolver: str, source: str | None = None) -> None:
        """Keeps the report."""
        self.reports.append((credential.tenant.slug, named, resolver))


class MemoryTenancy:
    """What the middleware needs of a ``Tenancy``."""

    def __init__(self) -> None:
        self.directory = MemoryDirectory()
        self.events = EventBus()
        self.rates = Rates({"slow": Tier("slow", requests_per_second=2.0)})

    reads_replicas = False

    @property
    def internals(self) -> MemoryTenancy:
        """Itself, which has the parts that the middleware takes from there."""
        return self

    @property
    def router(self) -> MemoryTenancy:
        """Itself: no server has replicas."""
        return self

    def add(
        self,
        slug: str,
        *,
        status: Status = Status.ACTIVE,
        scopes: Iterable[str] = (),
        tier: str = "free",
        **more: Any,
    ) -> Tenant:
        """Make a tenant whose key is ``key-<slug>``."""
        tenant = Tenant(id=UUID(int=len(self.directory.keys) + 1), slug=slug, status=status, tier=tier, **more)
        self.directory.keys[f"key-{slug}"] = Credential("key", f"{slug:x<16}", scopes=frozenset(scopes), bound=tenant)
        return tenant

    def as_tenancy(self) -> Tenancy:
        """This, under the type that the middleware asks for."""
        return cast("Tenancy", self)


# --- through a server -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def serve(app: ASGIApp, *, http: Any = "h11", **options: Any) -> AsyncIterator[int]:
    """Serve ``app`` by a uvicorn on this event loop; yields the port. The application's lifespan is not run."""
    options = {"lifespan": "off", "ws": "websockets-sansio", "log_config": None, "access_log": False, **options}
    server = uvicorn.Server(uvicorn.Config(app, http=http, **options))
    listening = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        async with asyncio.timeout(DEADLINE):
            while not server.started:
                assert not task.done(), "uvicorn ended at once"
                await asyncio.sleep(0.005)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, DEADLINE)
        listening.close()


class Wire:
    """One HTTP/1.1 connection, and full control over the bytes on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator[Wire]:
        """Connect to a port of this machine."""
        reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), DEADLINE)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)

    def ask(self, target: str, headers: Headers = (), *, method: str = "GET", body: bytes = b"") -> None:
        """Send a request."""
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        if not any(name.lower() == "host" for name, _ in headers):
            lines.append("Host: testserver")
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    async def head(self) -> Answer:
        """Read the head of an answer: of one to HEAD, say, which has no body."""
        async with asyncio.timeout(DEADLINE):
            head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        headers = [(name.strip().lower(), value.strip()) for name, _, value in (x.partition(b":") for x in lines)]
        return Answer(int(first.split(b" ")[1]), headers, b"")

    async def answer(self) -> Answer:
        """Read one answer, whatever its length is given by."""
        head = await self.head()
        found = dict(head.headers)
        async with asyncio.timeout(DEADLINE):
            if found.get(b"transfer-encoding") == b"chunked":
                body = b""
                while size := int(await self._reader.readline(), 16):
                    body += (await self._reader.readexactly(size + 2))[:-2]
                await self._reader.readexactly(2)
            elif b"content-length" in found:
                body = await self._reader.readexactly(int(found[b"content-length"]))
            else:
                body = await self._reader.read()
        return Answer(head.status, head.headers, body)

    async def request(self, target: str, headers: Headers = (), *, method: str = "GET", body: bytes = b"") -> Answer:
        """Send a request and read its answer."""
        self.ask(target, headers, method=method, body=body)
        return await self.answer()
