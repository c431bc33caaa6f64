"""Administrative connections, kept open between creations and other work on tenants' roles.

A connection's first CREATE DATABASE takes 5 to 15 ms longer than later ones, since a new backend has to map the shared
buffers page by page; opening a connection takes 5 ms. CREATE DATABASE itself takes 20 ms.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ...cancellation import run_to_completion
from ...loops import HomeLoop
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.failures import SERVER_FAILURES
from ...servers.server import Server
from .blockers import Blockers

IDLE_SECONDS = 60.0

# With the first three, the server notices within a minute that a client's machine is lost, and releases its locks.
HOLDING = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "idle_session_timeout": "0",
}
"""Settings of a session that holds a lock, and is idle for as long as what it is the lock of takes."""


class AdminConnections:
    """Gives connections to servers' maintenance databases, each with an advisory lock taken.

    Args:
        blockers: Returns the ``Blockers`` of a server.
        keep: How many idle connections are kept for each server.
        idle: How long they are kept, in seconds.
    """

    def __init__(self, blockers: Callable[[Server], Blockers], *, keep: int, idle: float = IDLE_SECONDS) -> None:
        self._blockers = blockers
        self._keep = keep
        self._home = HomeLoop()
        self._idle_seconds = idle
        # by server, the most recently used last; a server with another address is another one
        self._idle: defaultdict[Server, list[Connection]] = defaultdict(list)
        self._timers: dict[Connection, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def acquire(self, server: Server, key: int, *, timeout: float) -> Connection:
        """Return a connection that holds the advisory lock ``key``.

        Raises:
            TimeoutError: the lock was not free within ``timeout`` seconds.
            ServerUnavailableError: the server does not answer.
            WrongEventLoopError: this is another event loop or thread than that of the kept connections.
        """
        self._home.check()
        server.breaker.check()
        while (idle := self._take_idle(server)) is not None:
            # this shows also whether it still works
            if (locked := await self._try_lock(idle, key)) is not None:
                return idle if locked else await self._take_lock(idle, key, timeout)
        return await self._take_lock(await self.connect(server), key, timeout)

    async def connect(self, server: Server) -> Connection:
        """Return a connection; the caller takes the lock that it is released with.

        Raises:
            ServerUnavailableError, WrongEventLoopError: as ``acquire``.
        """
        self._home.check()
        server.breaker.check()
        while (idle := self._take_idle(server)) is not None:
            if await self._is_usable(idle):
                return idle
        return await self._blockers(server).connect(settings=HOLDING)

    async def release(self, server: Server, connection: Connection, key: int) -> None:
        """Release the lock, and keep the connection for the next caller if there is room.

        A failure of the connection raises nothing: the work under the lock is done, and the lock ends with the
        connection. One that does not have the lock is closed.
        """
        if self._is_full(server) or not await self._release_lock(connection, key):
            await run_to_completion(connections.close(connection))
        else:
            self._put_back(server, connection)

    @asynccontextmanager
    async def use(self, server: Server) -> AsyncIterator[Connection]:
        """Yield a connection for statements that need no lock. It is kept for the next caller unless the body fails.

        Raises:
            ServerUnavailableError, WrongEventLoopError: as ``acquire``.
        """
        connection, works = await self.connect(server), False
        try:
            yield connection
            works = True
        finally:
            if not works or connection.is_closed() or self._is_full(server):
                await run_to_completion(connections.close(connection))
            else:
                self._put_back(server, connection)

    def _is_full(self, server: Server) -> bool:
        return len(self._idle.get(server, ())) >= self._keep

    def _put_back(self, server: Server, connection: Connection) -> None:
        self._idle[server].append(connection)
        self._timers[connection] = asyncio.get_running_loop().call_later(
            self._idle_seconds, self._expire, server, connection
        )

    async def close(self) -> None:
        """Close the idle connections."""
        self._home.check()
        for server, idle in tuple(self._idle.items()):
            for connection in tuple(idle):
                self._timers[connection].cancel()
                self._expire(server, connection)
        if self._closing:
            await asyncio.wait(self._closing)

    def _take_idle(self, server: Server) -> Connection | None:
        idle = self._idle.get(server)
        if not idle:
            return None
        connection = idle.pop()
        self._timers.pop(connection).cancel()
        return connection

    @staticmethod
    async def _try_lock(connection: Connection, key: int) -> bool | None:
        """Whether the lock was free, and is taken; None where an idle connection does not work, which is closed."""
        locked: bool | None = None
        try:
            async with asyncio.timeout(connections.CLOSE_SECONDS):
                locked = await locks.try_lock(connection, key)
        except SERVER_FAILURES:
            pass
        finally:
            if locked is None:
                # it has not answered once already
                connection.terminate()
        return locked

    @staticmethod
    async def _is_usable(connection: Connection) -> bool:
        """Whether an idle connection still works; if not, it is closed."""
        works = False
        try:
            works = await connections.is_alive(connection)
        finally:
            if not works:
                # it has not answered once already
                connection.terminate()
        return works

    @staticmethod
    async def _take_lock(connection: Connection, key: int, timeout: float) -> Connection:
        try:
            await locks.lock(connection, key, timeout=timeout)
        except BaseException:
            await run_to_completion(connections.close(connection))
            raise
        return connection

    @staticmethod
    async def _release_lock(connection: Connection, key: int) -> bool:
        """Release the lock, and return whether that succeeded, so that the connection can be used again."""
        try:
            async with asyncio.timeout(connections.CLOSE_SECONDS):
                return await locks.unlock(connection, key)
        except SERVER_FAILURES:
            return False

    def _expire(self, server: Server, connection: Connection) -> None:
        self._timers.pop(connection)
        self._idle[server].remove(connection)
        if not self._idle[server]:
            del self._idle[server]
        task = asyncio.get_running_loop().create_task(connections.close(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
