"""Calls into the event loop, from other threads.

What counts slots and looks tenants up belongs to one event loop. A thread puts a call there and waits for the answer:
that costs two switches of threads, 20 to 50 us, so a checkout makes one. What needs no answer is put there alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from ..errors import EventLoopBlockedError, NotOpenError
from ..loops import HomeLoop, OtherThreads

logger = logging.getLogger("tenancy_orm.sync")

T = TypeVar("T")

_LOOK_SECONDS = 1.0  # how often a thread that waits looks whether the loop still runs
_BLOCKED_LOOKS = 30  # after how many of these in which the loop has run nothing the thread gives up


class Answer(Generic[T]):
    """What one thread waits for. All but ``Hops.wait`` runs in the loop.

    It can wait in a queue of the budget, since it has the methods of a ``Waiter``.

    Args:
        undo: Called with an answer that comes when nobody waits any more: the thread was interrupted.
        unbegun: Called where a coroutine was cancelled before it began, so that it could not clean up itself.
    """

    __slots__ = ("_abandoned", "_answered", "_begun", "_box", "_task", "_unbegun", "_undo")

    def __init__(self, undo: Callable[[T], object] | None = None, unbegun: Callable[[], object] | None = None) -> None:
        self._box: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._undo = undo
        self._unbegun = unbegun
        self._begun = False
        self._answered = False
        self._abandoned = False
        self._task: asyncio.Task[T] | None = None

    def done(self) -> bool:
        """Whether it is answered, or nobody waits any more."""
        return self._answered or self._abandoned

    def set_result(self, item: T, /) -> None:
        """Answer."""
        if not self._abandoned:
            self._answered = True
            self._box.put((item, None))
        elif self._undo is not None:
            self._undo(item)

    def set_error(self, error: BaseException) -> None:
        """Have the thread raise an error."""
        self._answered = True
        self._box.put((None, error))

    def set_exception(self, error: BaseException, /) -> None:
        """Have the thread raise an error, as a ``Waiter``."""
        self.set_error(error)

    def take(self) -> tuple[T | None, BaseException | None] | None:
        """Return the answer if there is one, and otherwise take no later one."""
        try:
            return self._box.get_nowait()
        except Empty:
            self._abandoned = True
            return None

    def abandon(self) -> None:
        """Undo the answer, or what is still to come."""
        if self._task is not None:
            self._task.cancel()
        answer = self.take()
        if answer is not None and answer[1] is None and self._undo is not None:
            self._undo(answer[0])  # type: ignore[arg-type]

    def start(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """Answer with what a coroutine returns."""

        async def begin() -> T:
            self._begun = True
            return await work()

        self._task = asyncio.get_running_loop().create_task(begin())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            if not self._begun and self._unbegun is not None:
                self._unbegun()
            self.set_error(NotOpenError("this Tenancy was closed while a thread waited for it"))
        elif (error := task.exception()) is not None:
            self.set_error(error)
        else:
            self.set_result(task.result())


class Hops:
    """Puts calls into an event loop, from other threads.

    Args:
        home: The loop.
    """

    def __init__(self, home: HomeLoop) -> None:
        self.threads = OtherThreads(home)
        self._home = home

    @property
    def is_forked(self) -> bool:
        """Whether the loop is that of the process that this one was forked from."""
        return self._home.is_forked

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop."""
        loop = self._home.loop
        assert loop is not None  # noqa: S101 - for the type checker: it is made for a running one
        return loop

    def post(self, call: Callable[..., object], *args: object) -> None:
        """Put a call into the loop, with no tenant bound, and do not wait for it. In any thread."""
        try:
            self.loop.call_soon_threadsafe(call, *args, context=Context())
        except RuntimeError:
            # the loop is closed, and with it every socket that it counts
            logger.debug("%s was not called: the event loop is closed", getattr(call, "__name__", call))

    def run(self, call: Callable[..., T], *args: Any, undo: Callable[[T], object] | None = None) -> T:
        """Return what ``call`` returns in the loop, in this thread's context.

        Raises:
            WrongEventLoopError: this is the loop's thread, or a forked process.
            NotOpenError: the loop was closed.
            EventLoopBlockedError: the loop runs nothing for half a minute.
        """
        answer: Answer[T] = Answer(undo)
        self._put(_answer_with, answer, call, args)
        return self.wait(answer)

    def run_async(
        self,
        call: Callable[..., Coroutine[Any, Any, T]],
        *args: Any,
        undo: Callable[[T], object] | None = None,
        unbegun: Callable[[], object] | None = None,
        unbound: bool = False,
    ) -> T:
        """Return what a coroutine function returns in the loop, in this thread's context.

        Where this thread is interrupted, the coroutine is cancelled.

        Args:
            call: The coroutine function.
            args: Its arguments.
            undo: Called with what it returns if this thread was interrupted.
            unbegun: Called if this thread was interrupted before it began.
            unbound: Whether it runs with no tenant bound: what administers connections does.

        Raises:
            TenancyError: as ``run``; and whatever ``call`` raises.
        """
        answer: Answer[T] = Answer(undo, unbegun)
        self._put(_start_with, answer, call, args, context=Context() if unbound else None)
        return self.wait(answer)

    def put(self, answer: Answer[T], call: Callable[..., object], *args: object) -> None:
        """Have ``call``, with no tenant bound, see to it that ``answer`` is answered: now or later.

        Raises:
            TenancyError: as ``run``.
        """
        self._put(_attempt, answer, call, args, context=Context())

    def wait(self, answer: Answer[T], timeout: float | None = None) -> T:
        """Wait for an answer.

        Args:
            answer: What was put into the loop.
            timeout: For how many seconds.

        Raises:
            TimeoutError: there is none in time; it may still come.
            NotOpenError: the loop has ended.
            EventLoopBlockedError: the loop runs nothing for half a minute.
        """
        try:
            item, error = self._wait(answer, timeout)
        except TimeoutError:
            raise
        except BaseException:
            # Ctrl-C, for example
            self.post(answer.abandon)
            raise
        if error is not None:
            raise error
        return item  # type: ignore[no-any-return]

    def _wait(self, answer: Answer[Any], timeout: float | None) -> tuple[Any, BaseException | None]:
        deadline = None if timeout is None else time.monotonic() + timeout
        beats: SimpleQueue[None] = SimpleQueue()
        looks = 0  # since the loop was last asked for a beat; looks, and not seconds: the whole process may be stopped
        while True:
            seconds = _LOOK_SECONDS if deadline is None else min(_LOOK_SECONDS, deadline - time.monotonic())
            try:
                return answer._box.get(timeout=max(0.0, seconds))
            except Empty:
                if not self.loop.is_running():
                    raise NotOpenError("the event loop of this Tenancy has ended; open it again") from None
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError from None
                if not beats.empty():
                    beats.get()
                    looks = 0
                if not looks:
                    self.post(beats.put, None)
                elif looks >= _BLOCKED_LOOKS:
                    raise EventLoopBlockedError(looks * _LOOK_SECONDS) from None
                looks += 1

    def _put(self, step: Callable[..., object], *args: object, context: Context | None = None) -> None:
        self.threads.check()
        try:
            self.loop.call_soon_threadsafe(step, *args, context=copy_context() if context is None else context)
        except RuntimeError:
            raise NotOpenError("the event loop of this Tenancy is closed; open it again") from None


def _answer_with(answer: Answer[T], call: Callable[..., T], args: tuple[Any, ...]) -> None:
    try:
        item = call(*args)
    except Exception as exc:  # noqa: BLE001 - the thread raises it
        answer.set_error(exc)
    else:
        answer.set_result(item)


def _attempt(answer: Answer[Any], call: Callable[..., object], args: tuple[Any, ...]) -> None:
    try:
        call(*args)
    except Exception as exc:  # noqa: BLE001 - the thread raises it
        answer.set_error(exc)


def _start_with(answer: Answer[T], call: Callable[..., Coroutine[Any, Any, T]], args: tuple[Any, ...]) -> None:
    answer.start(lambda: call(*args))


__all__ = ["Answer", "Hops"]
