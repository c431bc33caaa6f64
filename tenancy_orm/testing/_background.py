"""An event loop in a thread of its own: for what outlives the tests' event loops, and for tests that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..loops import run_in

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for other threads, one event loop for all of them."""

    def __init__(self) -> None:
        self._starting = threading.Lock()  # protects the two below
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, which runs from the first use on."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="tenancy-tests", daemon=True)
                self._thread.start()
            return self._loop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` there, wait for it, and return its result; an interrupt cancels it."""
        return run_in(self.loop, work)

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` there, for a coroutine of another event loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def stop(self) -> None:
        """End the thread and close the loop."""
        with self._starting:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        try:
            if tasks := asyncio.all_tasks(loop):
                for task in tasks:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(tasks))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


__all__ = ["BackgroundLoop"]
