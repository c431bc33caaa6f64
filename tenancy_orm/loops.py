"""The event loop that a ``Tenancy`` and its parts belong to, and the refusal of any other.

A connection of asyncpg's belongs to the event loop that opened it. Used from another one, it is left amid a query that
nobody ends; used from two threads at once, it has been seen to end the process with a segmentation fault. A forked
process shares its parent's sockets: what it sends on one gets the parent answers to questions that it never asked.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import weakref
from collections.abc import Coroutine
from contextlib import suppress
from threading import get_ident
from typing import Any, Protocol, TypeVar

from .errors import WrongEventLoopError

T = TypeVar("T")

_FORKED = -1  # in place of a thread's number, which is never negative


class HomeLoop:
    """The event loop, and the thread it runs in, that something belongs to.

    That is the running one; where none is running, the first that asks. Where a tenth of a microsecond counts, compare
    ``thread`` with ``threading.get_ident()``, and ask ``check`` if they differ.
    """

    __slots__ = ("__weakref__", "loop", "thread")

    def __init__(self) -> None:
        _homes.add(self)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = 0
        with suppress(RuntimeError):  # made outside of any
            self._belong_to(asyncio.get_running_loop())

    def check(self) -> None:
        """Return where the loop runs and this is its thread: that is, where the running loop is this one.

        Without ``get_running_loop``, which makes a system call on Python 3.11.

        Raises:
            WrongEventLoopError: it is another, or none.
        """
        loop = self.loop
        if loop is None:
            self._belong_here()
        elif get_ident() != self.thread or not loop.is_running():
            raise WrongEventLoopError(forked=self.thread == _FORKED)

    def check_thread(self) -> None:
        """Return in the loop's thread: enough for what only counts in memory.

        Raises:
            WrongEventLoopError: it is another.
        """
        if get_ident() != self.thread and self.loop is not None:
            raise WrongEventLoopError(forked=self.thread == _FORKED)

    @property
    def is_forked(self) -> bool:
        """Whether it is the parent's: this process was forked from the one that the loop runs in."""
        return self.thread == _FORKED

    @property
    def is_closed(self) -> bool:
        """Whether the loop is closed: what belongs to it is of no use any more."""
        return self.loop is not None and self.loop.is_closed()

    def _belong_here(self) -> None:
        try:
            self._belong_to(asyncio.get_running_loop())
        except RuntimeError:
            raise WrongEventLoopError from None

    def _belong_to(self, loop: asyncio.AbstractEventLoop) -> None:
        self.thread = get_ident()
        self.loop = loop


class OtherThreads:
    """Every thread but that of an event loop: where synchronous code may use what waits for this loop.

    Args:
        home: The loop.
    """

    __slots__ = ("_home",)

    def __init__(self, home: HomeLoop) -> None:
        self._home = home

    def check(self) -> None:
        """Return in another thread than the loop's, which runs.

        Raises:
            WrongEventLoopError: this is the loop's thread, which would wait for itself; or a forked process.
        """
        home = self._home
        if home.thread == _FORKED:
            raise WrongEventLoopError(forked=True)
        if home.thread == get_ident() or home.loop is None or not home.loop.is_running():
            raise WrongEventLoopError(waiting=True)


def run_in(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of another thread, in this thread's context, and return its result.

    An interruption of this thread cancels it.
    """
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class Home(Protocol):
    """Where something may be used."""

    def check(self) -> None:
        """Return where it may be.

        Raises:
            WrongEventLoopError: it may not be used here.
        """


_homes: weakref.WeakSet[HomeLoop] = weakref.WeakSet()


def _forget_threads() -> None:
    """Refuse what the parent process has opened: the child's main thread has the number of the thread that forked."""
    loops = set()
    for home in list(_homes):
        if home.loop is not None:
            home.thread = _FORKED
            loops.add(home.loop)
    for loop in loops:
        _leave_selector(loop)


def _leave_selector(loop: asyncio.AbstractEventLoop) -> None:
    """Give the child's copy of a loop an epoll instance of its own, and a pipe by which threads wake it.

    The parent's are shared. A child that closes the loop, as ``asyncio.run`` does while ``sys.exit`` unwinds the stack,
    would take the pipe out of the epoll instance, and nothing would wake the parent's loop from another thread any
    more. Before that ``asyncio.run`` waits for threads of the child: what they send must wake the child, and not the
    parent.
    """
    selector: Any = getattr(loop, "_selector", None)
    if type(selector).__name__ != "EpollSelector" or loop.is_closed():
        return
    reading: Any = getattr(loop, "_ssock", None)
    writing: Any = getattr(loop, "_csock", None)
    with suppress(OSError), select.epoll() as fresh:
        if reading is not None and writing is not None:
            for own, shared in zip(socket.socketpair(), (reading, writing), strict=True):
                with own:
                    own.setblocking(False)
                    os.dup2(own.fileno(), shared.fileno(), inheritable=False)
            fresh.register(reading.fileno(), select.EPOLLIN)
        os.dup2(fresh.fileno(), selector.fileno(), inheritable=False)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_threads)


__all__ = ["Home", "HomeLoop", "OtherThreads", "run_in"]
