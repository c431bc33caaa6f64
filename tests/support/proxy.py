"""A TCP proxy in front of PostgreSQL, to take the network away."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator

from sqlalchemy.engine import make_url

# the message BackendKeyData up to the process id, between two of the login's others
_BACKEND_KEY = re.compile(rb"(K\x00\x00\x00\x0c)....(?=....Z\x00\x00\x00\x05)", re.DOTALL)


_LOGIN_BYTES = 512


class Proxy:
    """Forwards connections to a server, until told otherwise.

    ``connections`` counts those that were ever accepted, and ``forwarded`` the pieces of data, either way. With
    ``own_process_ids`` it tells clients another process id than their backend's, as the proxies of managed servers do.
    """

    def __init__(self, host: str, port: int, *, own_process_ids: bool = False) -> None:
        self._own_process_ids = own_process_ids
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._ends = asyncio.Event()
        self._ends.set()
        self._refusing = False
        self._latency = 0.0
        self._lost = 0.0
        self._random = random.Random()
        self.port = 0
        self.connections = 0
        self.forwarded = 0
        # of each connection, what its client has sent first, and the pieces of data
        self._carried: list[tuple[bytearray, list[int]]] = []

    def forwarded_of(self, user: str) -> int:
        """The pieces of data of the connections of one role: others, such as the administrator's, are never idle."""
        login = f"user\0{user}\0".encode()
        return sum(len(pieces) for first, pieces in self._carried if login in first)

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Cut everything and stop listening."""
        self.cut()
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def url(self, url: str) -> str:
        """``url``, by way of this proxy."""
        return make_url(url).set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    def lead_to(self, host: str, port: int) -> None:
        """Forward new connections to another server."""
        self._target = (host, port)

    def cut(self) -> None:
        """Reset every connection."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    def refuse(self) -> None:
        """Reset every connection, and every new one: the server is down."""
        self._refusing = True
        self.cut()

    def swallow(self) -> None:
        """Forward nothing more, and close nothing: packets get lost."""
        self._open.clear()

    def slow_down(self, latency: float, *, lost: float = 0.0, seed: int = 0) -> None:
        """Forward each piece after ``latency`` seconds; a share of them, as if lost at first, after ten times that."""
        self._latency, self._lost, self._random = latency, lost, random.Random(seed)

    def hold_ends(self) -> None:
        """Forward what is sent, but not that a side has closed its connection."""
        self._ends.clear()

    def restore(self) -> None:
        """Forward again."""
        self._refusing = False
        self._latency = self._lost = 0.0
        self._open.set()
        self._ends.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(asyncio.CancelledError):  # by ``stop``
            await self._forward(reader, writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        outward: asyncio.StreamWriter | None = None
        try:
            await self._open.wait()
            inward, outward = await asyncio.open_connection(*self._target)
            self._writers.add(outward)
            first, pieces = carried = bytearray(), list[int]()
            self._carried.append(carried)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, outward, pieces, first))
                group.create_task(self._pump(inward, writer, pieces))
        except* OSError:
            pass  # one side is gone; so is the other, below
        finally:
            for end in (writer, outward):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pieces: list[int],
        first: bytearray | None = None,
    ) -> None:
        while data := await reader.read(65_536):
            if first is not None and len(first) < _LOGIN_BYTES:
                first += data
            pieces.append(len(data))
            if self._latency:
                await asyncio.sleep(self._latency * (10 if self._random.random() < self._lost else 1))
            await self._open.wait()
            if self._own_process_ids:
                data = _BACKEND_KEY.sub(lambda found: found[1] + b"\x7f\x00\x00\x01", data)
            writer.write(data)
            self.forwarded += 1
            await writer.drain()
        await self._ends.wait()
        raise ConnectionResetError


@contextlib.asynccontextmanager
async def proxied(url: str, *, own_process_ids: bool = False) -> AsyncIterator[Proxy]:
    """A proxy in front of the server of ``url``."""
    target = make_url(url)
    proxy = Proxy(target.host or "127.0.0.1", target.port or 5432, own_process_ids=own_process_ids)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
