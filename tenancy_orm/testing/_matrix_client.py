"""Calls an ASGI application within this process, as a server would."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, urlencode

from starlette.types import ASGIApp, Message, Scope

MAX_BODY_BYTES: Final = 4 * 1024 * 1024
QUIET_SECONDS: Final = 0.5
"""How long nothing comes of a stream that has begun before it is taken for all that comes."""

_IDLE_SECONDS: Final = 0.1
# how long other tasks may take to write to a websocket after its own has nothing more to do


@dataclass(frozen=True)
class Call:
    """One request: what is sent, and where."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""
    media: str | None = None
    messages: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All that the caller names, to tell what an answer only repeats."""
        parts = (self.path, *self.query.values(), *self.headers.values(), *self.messages)
        return "\n".join((*parts, self.content.decode("utf-8", "replace")))

    @property
    def target(self) -> str:
        """The path with its query."""
        return self.path + (f"?{urlencode(self.query)}" if self.query else "")


@dataclass
class Answer:
    """What came back. ``status`` is 101 for a websocket that was accepted, 403 for one that was not."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: BaseException | None = None

    @property
    def text(self) -> str:
        """Headers and body, as the caller can read them."""
        headers = "\n".join(self.headers.values())
        return f"{headers}\n{self.body.decode('utf-8', 'replace')}"

    def json(self) -> Any:
        """The body, read as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def is_refusal(self) -> bool:
        """Whether nothing was done: the caller may not, there is no such thing, or the request is malformed."""
        return 400 <= self.status < 500

    @property
    def is_success(self) -> bool:
        """Whether the application did what was asked."""
        return 200 <= self.status < 400 or self.status == 101


class Client:
    """Calls one application.

    Each call comes from an address of its own: what is counted by address is no part of what is tried. It runs in an
    empty context, as each connection of a server does.

    Args:
        app: The application.
        state: What its lifespan yields.
        host: The host of the requests that name no other.
        timeout: How long an answer may take, in seconds.
    """

    def __init__(self, app: ASGIApp, state: Mapping[str, Any], *, host: str, timeout: float = 30.0) -> None:
        self._app = app
        self._state = state
        self._host = host
        self._timeout = timeout
        self._addresses = itertools.count()
        self.count = 0

    async def request(self, call: Call) -> Answer:
        """Send a request, or open a websocket, say what there is to say, and close it."""
        if call.method == "WEBSOCKET":
            async with self.websocket(call) as opened:
                for message in call.messages:
                    await opened.send(message)
                return await opened.answer()
        return await self._http(call)

    async def _http(self, call: Call) -> Answer:
        self.count += 1
        answer = Answer(0)
        body: list[bytes] = []
        disconnected, progress = asyncio.Event(), asyncio.Event()
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": call.content, "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            progress.set()
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = _headers(message["headers"])
            elif message["type"] == "http.response.body":
                body.append(message.get("body", b""))
                if not message.get("more_body") or sum(map(len, body)) > MAX_BODY_BYTES:
                    disconnected.set()

        scope = {**self._scope(call), "type": "http", "method": call.method, "scheme": "http"}
        task = asyncio.get_running_loop().create_task(self._run(scope, receive, send), context=Context())
        try:
            async with asyncio.timeout(self._timeout):
                while not task.done() and not disconnected.is_set():
                    progress.clear()
                    # a stream may never end: once it has begun, it is given up when nothing more comes
                    patience = QUIET_SECONDS if body else None
                    waiting = asyncio.create_task(progress.wait())
                    await asyncio.wait({task, waiting}, timeout=patience, return_when="FIRST_COMPLETED")
                    quiet = not waiting.done() and not task.done()
                    waiting.cancel()
                    if quiet:
                        break
                disconnected.set()
                if not task.done():
                    await asyncio.wait({task}, timeout=self._timeout / 2)
        except TimeoutError:
            answer.error = TimeoutError(f"no answer within {self._timeout:g} s")
        finally:
            await _end(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            answer.error = error
            answer.status = answer.status or 500
        answer.body = b"" if call.method == "HEAD" else b"".join(body)  # a server does not send it
        answer.status = answer.status or 500
        return answer

    @asynccontextmanager
    async def websocket(self, call: Call) -> AsyncIterator[Socket]:
        """Open a websocket; it is closed at the end."""
        self.count += 1
        scope = {
            **self._scope(call),
            "type": "websocket",
            "scheme": "ws",
            "subprotocols": [],
            "extensions": {"websocket.http.response": {}},
        }
        opened = Socket(self._timeout)
        running = self._run(scope, opened.receive, opened.take)
        opened.task = asyncio.get_running_loop().create_task(running, context=Context())
        try:
            await opened.connected()
            yield opened
        finally:
            opened.incoming.put_nowait({"type": "websocket.disconnect", "code": 1000})
            await asyncio.wait({opened.task}, timeout=self._timeout / 2)
            await _end(opened.task)

    async def _run(self, scope: Scope, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    def _scope(self, call: Call) -> Scope:
        number = next(self._addresses)
        # 198.18.0.0/15 is for tests of networks (RFC 2544)
        address = f"198.{18 + (number >> 16) % 2}.{number >> 8 & 255}.{number & 255}"
        headers = {"host": self._host, "accept": "*/*"}
        headers |= {name.lower(): value for name, value in call.headers.items()}
        if call.media is not None:
            headers["content-type"] = call.media
        if call.content:
            headers["content-length"] = str(len(call.content))
        path = call.path
        return {
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "path": path,
            "raw_path": quote(path, safe="/:@!$&'()*+,;=~").encode(),
            "query_string": urlencode(call.query).encode(),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
            "client": (address, 50_000),
            "server": (headers["host"].partition(":")[0], 80),
            "state": dict(self._state),
        }


class Socket:
    """An open websocket, or one that was refused."""

    task: asyncio.Task[None]

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.incoming.put_nowait({"type": "websocket.connect"})
        self.received: list[str] = []
        self.status = 0
        self.headers: dict[str, str] = {}
        self._progress = asyncio.Event()
        self.closed = False
        self._idle = False

    async def receive(self) -> Message:
        """Return what the application receives next."""
        self._idle = self.incoming.empty()
        self._progress.set()
        message = await self.incoming.get()
        self._idle = False
        return message

    async def take(self, message: Message) -> None:
        """Keep what the application sends."""
        kind = message["type"]
        if kind == "websocket.accept":
            self.status = 101
        elif kind == "websocket.close":
            self.status = self.status or 403
            self.received.append(message.get("reason") or "")
            self.closed = True
        elif kind == "websocket.http.response.start":
            self.status, self.headers = message["status"], _headers(message["headers"])
        else:
            content = message.get("text")
            body = message.get("bytes") or message.get("body") or b""
            self.received.append(content if content is not None else body.decode("utf-8", "replace"))
            self.closed = self.closed or (kind == "websocket.http.response.body" and not message.get("more_body"))
        self._progress.set()

    async def connected(self) -> None:
        """Wait until it is accepted or refused."""
        await self._wait(lambda: self.status, self._timeout)

    async def send(self, text: str) -> None:
        """Send a message."""
        if not self.closed:
            self.incoming.put_nowait({"type": "websocket.receive", "text": text})

    async def answer(self) -> Answer:
        """Wait until nothing more comes, and return all that came."""
        while not self.closed and not self.task.done():
            before = len(self.received)
            if not self._is_idle() and not await self._wait(self._is_idle, self._timeout):
                break
            if not await self._wait(lambda before=before: len(self.received) > before or self.closed, _IDLE_SECONDS):
                break
        error = self.task.exception() if self.task.done() and not self.task.cancelled() else None
        status = self.status or (500 if error else 403)
        return Answer(status, dict(self.headers), "\n".join(self.received).encode(), error)

    def _is_idle(self) -> bool:
        return self.closed or (self._idle and self.incoming.empty())

    async def _wait(self, condition: Any, timeout: float) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not condition():
            self._progress.clear()
            left = deadline - loop.time()
            if left <= 0 or self.task.done():
                return bool(condition())
            waiting = asyncio.create_task(self._progress.wait())
            await asyncio.wait({self.task, waiting}, timeout=left, return_when="FIRST_COMPLETED")
            waiting.cancel()
        return True


@asynccontextmanager
async def lifespan_of(app: ASGIApp) -> AsyncIterator[dict[str, Any]]:
    """Run an application's lifespan; yields what it gives its requests.

    Raises:
        RuntimeError: it did not start.
    """
    state: dict[str, Any] = {}
    received: asyncio.Queue[Message] = asyncio.Queue()
    said: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}

    async def run() -> None:
        await app(scope, received.get, said.put)

    task = asyncio.get_running_loop().create_task(run(), context=Context())

    async def ask(event: str) -> Message | None:
        received.put_nowait({"type": f"lifespan.{event}"})
        answered = asyncio.ensure_future(said.get())
        await asyncio.wait({task, answered}, return_when="FIRST_COMPLETED")
        if answered.done():
            return answered.result()
        answered.cancel()
        return None

    try:
        message = await ask("startup")
        if message is not None and message["type"] == "lifespan.startup.failed":
            raise RuntimeError(f"the application did not start: {message.get('message', '')}")
        # an application that raises instead has no lifespan, as servers see it
        yield state
        if not task.done():
            await ask("shutdown")
    finally:
        await _end(task)


async def _end(task: asyncio.Task[None]) -> None:
    if not task.done():
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _headers(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in pairs:
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        found[key] = f"{found[key]}\n{text}" if key in found else text
    return found
