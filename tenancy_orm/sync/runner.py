"""An event loop in a thread of its own, for a process that has none."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_JOIN_SECONDS = 10.0


class LoopThread:
    """A thread that runs an event loop until ``stop``.

    It is a daemon, so that Python runs the functions of ``atexit``, one of which stops it, and does not wait for the
    thread before.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="tenancy", daemon=True)
        self._thread.start()
        self.loop = self._started.result()

    @property
    def is_ours(self) -> bool:
        """Whether this process started it: a forked one has no such thread."""
        return self._pid == os.getpid()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop, in this thread's context, and wait for it; an interruption cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what is left in the loop, and end the thread."""
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as exc:
            if not self._started.done():
                self._started.set_exception(exc)
            raise

    async def _main(self) -> None:
        self._started.set_result(asyncio.get_running_loop())
        await self._stop.wait()


__all__ = ["LoopThread"]
