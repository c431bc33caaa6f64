"""Alembic in one process: ``alembic.op`` and ``alembic.context`` are each one object, whoever migrates what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import alembic.context
import alembic.op

# Held while a control database is migrated. Its holder awaits, and another event loop may want it: so it is polled.
_migrating = threading.Lock()


@asynccontextmanager
async def one_migration(*, timeout: float = 60.0) -> AsyncIterator[None]:
    """Wait until no other task or thread of this process migrates a control database, for ``timeout`` seconds.

    The revisions of two at once would reach the same database.

    Raises:
        TimeoutError: another one is still being migrated.
    """
    async with asyncio.timeout(timeout):
        # an asyncio.Lock belongs to one event loop
        while not _migrating.acquire(blocking=False):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    try:
        yield
    finally:
        _migrating.release()


@contextmanager
def proxies_restored() -> Iterator[None]:
    """Have ``alembic.op`` and ``alembic.context`` as they were, whatever happens in the body.

    Alembic leaves its ``Operations`` installed if a migration fails, and installs nothing again that was active before.
    """
    modules: tuple[Any, ...] = (alembic.op, alembic.context)
    before = [getattr(module, "_proxy", None) for module in modules]
    try:
        yield
    finally:
        for module, active in zip(modules, before, strict=True):
            left = getattr(module, "_proxy", None)
            if left is not None and left is not active:
                left._remove_proxy()
            if active is not None and getattr(module, "_proxy", None) is not active:
                active._install_proxy()
