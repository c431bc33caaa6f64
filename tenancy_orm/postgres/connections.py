"""Helpers for any asyncpg connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg

from .failures import SERVER_FAILURES

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

POLL_SECONDS = 0.02  # pause while polling for what another session does
CLOSE_SECONDS = 5.0


def version(connection: Connection) -> int:
    """The server's major version."""
    return int(connection.get_server_version().major)


async def close(connection: Connection, *, timeout: float | None = None) -> None:
    """Close a connection; terminate it if the server does not answer within ``timeout`` (``CLOSE_SECONDS``)."""
    try:
        await connection.close(timeout=CLOSE_SECONDS if timeout is None else timeout)
    except SERVER_FAILURES:
        connection.terminate()


async def is_alive(connection: Connection) -> bool:
    """Whether the connection answers within ``CLOSE_SECONDS``; a statement that was cancelled on it has ended then."""
    if connection.is_closed():
        return False
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            return bool(await connection.fetchval("SELECT true"))
    except SERVER_FAILURES:
        return False


async def finish(connection: Connection, work: Callable[[], Awaitable[object]]) -> None:
    """Await what ends a piece of work, a ROLLBACK for example; cut a connection that does not answer.

    After a statement that was cancelled, asyncpg waits without a deadline until the cancellation has reached the
    server, and a deadline around the whole has passed already.
    """
    if connection.is_closed():
        return
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await work()
    except TimeoutError:
        connection.terminate()


@asynccontextmanager
async def transaction(connection: Connection) -> AsyncIterator[None]:
    """A transaction, or a savepoint within one, as asyncpg's; its ROLLBACK has a deadline, see ``finish``."""
    begun = connection.transaction()
    await begun.start()
    try:
        yield
    except BaseException:
        await finish(connection, begun.rollback)
        raise
    await begun.commit()


async def execute_unflushed(connection: Connection, *statements: str) -> None:
    """Run statements in one transaction, and do not wait for the disk at its commit.

    One message holds them all, which PostgreSQL runs as one implicit transaction: an error or a cancellation at any of
    them leaves neither half of the work nor an open transaction.
    """
    await connection.execute("; ".join(("SET LOCAL synchronous_commit = off", *statements)))
