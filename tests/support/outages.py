"""Servers that freeze, and what an application does in the time: what tests of faults share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tenancy_orm import Tenancy
from tenancy_orm.errors import TenancyError
from tenancy_orm.testing.embedded import EmbeddedServer
from tests.support.waiting import until


@contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    """Stop every process of a server (SIGSTOP) for the body: the kernel goes on to accept connections for it."""
    assert server.pid is not None
    postmaster = psutil.Process(server.pid)
    # first, so that it starts no more of them
    postmaster.suspend()
    stopped = [postmaster]
    try:
        for child in postmaster.children(recursive=True):
            child.suspend()
            stopped.append(child)
        yield
    finally:
        for process in reversed(stopped):
            if process.is_running():
                process.resume()


@dataclass
class Writers:
    """Writes rows of a tenant, one after the other, and counts what it was told about each."""

    tenancy: Tenancy
    slug: str
    sync: bool = False
    alone: bool = False
    """Whether each is one statement, without a transaction around it."""
    acknowledged: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    tried: int = 0

    async def write(self) -> bool:
        """Write one row; returns whether that was acknowledged."""
        self.tried += 1
        body = f"{self.slug} {'sync' if self.sync else 'async'} {self.tried}"
        try:
            await (asyncio.to_thread(self._write_sync, body) if self.sync else self._write(body))
        except (TenancyError, DBAPIError, OSError) as exc:
            self.failures[type(exc).__name__] += 1
            return False
        self.acknowledged.append(body)
        return True

    async def _write(self, body: str) -> None:
        if self.alone:
            await self.tenancy.execute("INSERT INTO notes (body) VALUES (:body)", {"body": body}, tenant=self.slug)
            return
        async with self.tenancy.transaction(self.slug) as session:
            await session.execute(text("INSERT INTO notes (body) VALUES (:body)"), {"body": body})

    def _write_sync(self, body: str) -> None:
        with self.tenancy.sync.transaction(self.slug) as session:
            session.execute(text("INSERT INTO notes (body) VALUES (:body)"), {"body": body})

    async def check(self) -> None:
        """Check that what was acknowledged is there once, and what failed once at most."""
        async with self.tenancy.session(self.slug) as session:
            rows = await session.scalars(text("SELECT body FROM notes WHERE body LIKE :like"), {"like": self._like})
            found = Counter(rows)
        assert set(self.acknowledged) <= set(found), "an acknowledged write is lost"
        assert max(found.values(), default=1) == 1, "a write was made twice"

    @property
    def _like(self) -> str:
        return f"{self.slug} {'sync' if self.sync else 'async'} %"


async def go_on(writers: Sequence[Writers], *, seconds: float) -> None:
    """Wait until each has written some more."""
    before = [len(writer.acknowledged) for writer in writers]
    await until(
        lambda: all(len(writer.acknowledged) > count + 3 for writer, count in zip(writers, before, strict=True)),
        seconds=seconds,
    )


@asynccontextmanager
async def running(*loops: Callable[[], Any]) -> AsyncIterator[None]:
    """Call coroutine functions again and again beside the body, a moment apart."""
    ends = asyncio.Event()

    async def repeat(call: Callable[[], Any]) -> None:
        while not ends.is_set():
            await call()
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for call in loops:
            group.create_task(repeat(call))
        try:
            yield
        finally:
            ends.set()
