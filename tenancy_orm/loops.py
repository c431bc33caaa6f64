"""The event loop that a ``Tenancy`` and its parts belong to, and the refusal of any other.

A connection of asyncpg's belongs to the event loop that opened it. Used from another one, it is left amid a query that
nobody ends; used from two threads at once, it has been seen to end the process with a segmentation fault.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from threading import get_ident

from .errors import WrongEventLoopError


class HomeLoop:
    """The event loop, and the thread it runs in, that something belongs to.

    That is the running one; where none is running, the first that asks. Where a tenth of a microsecond counts, compare
    ``thread`` with ``threading.get_ident()``, and ask ``check`` if they differ.
    """

    __slots__ = ("loop", "thread")

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = 0
        with suppress(RuntimeError):  # made outside of any
            self._settle(asyncio.get_running_loop())

    def check(self) -> None:
        """Return where the loop runs and this is its thread: that is, where the running loop is this one.

        Without ``get_running_loop``, which makes a system call on Python 3.11.

        Raises:
            WrongEventLoopError: it is another, or none.
        """
        loop = self.loop
        if loop is None:
            self._settle_here()
        elif get_ident() != self.thread or not loop.is_running():
            raise WrongEventLoopError

    def check_thread(self) -> None:
        """Return in the loop's thread: enough for what only counts in memory.

        Raises:
            WrongEventLoopError: it is another.
        """
        if get_ident() != self.thread and self.loop is not None:
            raise WrongEventLoopError

    @property
    def is_closed(self) -> bool:
        """Whether the loop is closed: what belongs to it is of no use any more."""
        return self.loop is not None and self.loop.is_closed()

    def _settle_here(self) -> None:
        try:
            self._settle(asyncio.get_running_loop())
        except RuntimeError:
            raise WrongEventLoopError from None

    def _settle(self, loop: asyncio.AbstractEventLoop) -> None:
        self.thread = get_ident()
        self.loop = loop


__all__ = ["HomeLoop"]
