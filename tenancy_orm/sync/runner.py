"""An event loop in a thread of its own, for a process that has none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from ..loops import run_in

P = ParamSpec("P")
T = TypeVar("T")

_JOIN_SECONDS = 10.0


class _Executor(ThreadPoolExecutor):
    """Threads for ``asyncio.to_thread``. Where Python starts no more, the function runs in the event loop's.

    Python ends the threads of all executors before it runs the functions of ``atexit``. What is closed there may need
    one: to stop a server, to resolve a host's name.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:  # Python, or this executor, is being shut down: nothing was queued
            future: Future[T] = Future()
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as exc:  # noqa: BLE001 - whoever waits raises it
                future.set_exception(exc)
            return future


class LoopThread:
    """A thread that runs an event loop until ``stop``.

    It is a daemon, so that Python runs the functions of ``atexit``, one of which stops it, and does not wait for the
    thread before.
    """

    def __init__(self) -> None:
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="tenancy", daemon=True)
        self._thread.start()
        self.loop = self._started.result()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop, in this thread's context, and wait for it; an interruption cancels it."""
        return run_in(self.loop, work)

    def stop(self) -> None:
        """Cancel what is left in the loop, and end the thread."""
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        # not asyncio.run: at its end it starts a thread, which Python refuses while it runs the functions of atexit
        try:
            loop = asyncio.new_event_loop()
        except BaseException as exc:
            self._started.set_exception(exc)
            raise
        executor = _Executor(thread_name_prefix="tenancy")
        loop.set_default_executor(executor)
        try:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(self._main())
            executor.shutdown()
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        self._started.set_result(loop)
        await self._stop.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await loop.shutdown_asyncgens()


__all__ = ["LoopThread"]
