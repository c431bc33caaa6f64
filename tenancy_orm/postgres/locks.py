"""Session-level advisory locks, by a key that every process computes alike."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from .connections import POLL_SECONDS, Connection, finish


def lock_key(text: str) -> int:
    """Return the 64-bit advisory lock key of ``text``."""
    return int.from_bytes(hashlib.blake2b(b"tenancy:" + text.encode(), digest_size=8).digest(), signed=True)


async def try_lock(connection: Connection, key: int) -> bool:
    """Take the session-level lock ``key`` if it is free. It is released when the connection ends, however it ends."""
    return bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", key))


@asynccontextmanager
async def try_locked(connection: Connection, key: int) -> AsyncIterator[bool]:
    """Yield whether the session-level lock ``key`` was free; if so, the body runs under it."""
    if not await try_lock(connection, key):
        yield False
        return
    try:
        yield True
    finally:
        await finish(connection, partial(unlock, connection, key))


async def unlock(connection: Connection, key: int) -> bool:
    """Release the lock ``key`` once, and return whether the session had it.

    A session that took it several times must release it as often.
    """
    return bool(await connection.fetchval("SELECT pg_advisory_unlock($1)", key))


async def lock(connection: Connection, key: int, *, timeout: float) -> None:
    """Take the session-level lock ``key``, by polling. It is held until ``unlock``, or until the connection ends.

    A session that *waits* in pg_advisory_lock keeps a snapshot, and CREATE INDEX CONCURRENTLY in the session that has
    the lock waits for such snapshots: a deadlock. Polling keeps nothing between two attempts.

    Raises:
        TimeoutError: it was not free within ``timeout`` seconds.
    """
    async with asyncio.timeout(timeout):
        while not await try_lock(connection, key):  # noqa: ASYNC110 - the event is in another process
            await asyncio.sleep(POLL_SECONDS)
