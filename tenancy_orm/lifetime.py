"""``Lifetime``: when the parts of a ``Tenancy`` are open, and in which event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import TypeAlias

from .assembly import Assembly
from .config import TenancyConfig
from .errors import NotOpenError, WrongEventLoopError
from .events import EventBus
from .forks import in_child
from .loops import HomeLoop
from .quotas.rates import Rates
from .seeds import Seed

logger = logging.getLogger("tenancy_orm")

Builder: TypeAlias = Callable[[TenancyConfig, EventBus, Rates, bool | None, Sequence[Seed]], Awaitable[Assembly]]
"""What opens the parts: of a configuration, whether the control database is to be created or upgraded first, and what
``Tenancy.on_create`` has made."""


async def build(
    config: TenancyConfig, events: EventBus, rates: Rates, initialise: bool | None, seeds: Sequence[Seed]
) -> Assembly:
    """Open the parts as an application does."""
    return await Assembly.build(config, events, rates, initialise=initialise, seeds=seeds)


_builders: list[Builder] = [build]
_parents: list[object] = []  # what the processes that this one was forked from have open


def push_builder(builder: Builder) -> None:
    """Have ``builder`` open the parts of every ``Tenancy`` of this process, until ``pop_builder``.

    For test runs: a suite must never reach the databases that the application's own settings name, whatever the
    application does when it is imported.
    """
    _builders.append(builder)


def pop_builder(builder: Builder) -> None:
    """Undo ``push_builder``."""
    if builder in _builders[1:]:
        _builders.remove(builder)


@dataclass(slots=True)
class Parked:
    """What ``Lifetime.park`` has taken out: the parts that are open in an event loop that does not run now."""

    home: HomeLoop | None
    assembly: Assembly | None
    entered: int
    opening: asyncio.Lock


class Lifetime:
    """Opens the parts and closes them, as often as wanted, in one event loop at a time.

    Args:
        config: What to connect to and how.
        events: Where the parts announce what happens. It outlives them.
        rates: The request rates of this process. They outlive the parts as well.

    Attributes:
        assembly (Assembly | None): The parts, while they are open.
        seeds (list[Seed]): What ``Tenancy.on_create`` has made. They outlive the parts.
    """

    def __init__(self, config: TenancyConfig, events: EventBus, rates: Rates) -> None:
        self.assembly: Assembly | None = None
        self.seeds: list[Seed] = []
        self._config = config
        self._events = events
        self._rates = rates
        self._home: HomeLoop | None = None  # from the beginning of ``open`` to the end of ``close``
        self._claims = 0  # calls of these two under way
        self._claiming = threading.Lock()  # it protects the two above against other threads
        self._opening = asyncio.Lock()
        self._entered = 0  # blocks, see ``enter``
        self._is_forked = False  # whether a parent process has it open, and this one does not
        in_child(self._leave_to_parent)

    @property
    def parts(self) -> Assembly:
        """The parts.

        Raises:
            NotOpenError: they are not open.
            WrongEventLoopError: they are open in the process that this one was forked from.
        """
        if self.assembly is None:
            raise self._not_open("async with tenancy: ...")
        return self.assembly

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that the parts belong to.

        Raises:
            NotOpenError, WrongEventLoopError: as ``parts``.
        """
        home = self._home
        if self.assembly is None or home is None or home.loop is None:
            raise self._not_open("async with tenancy: ...")
        return home.loop

    @property
    def home(self) -> HomeLoop:
        """The event loop that the parts belong to, and its thread.

        Raises:
            NotOpenError, WrongEventLoopError: as ``parts``.
        """
        home = self._home
        if self.assembly is None or home is None:
            raise self._not_open("with tenancy.sync: ...")
        return home

    def _not_open(self, remedy: str) -> Exception:
        if self._is_forked:
            return WrongEventLoopError(forked=True)
        return NotOpenError(f"this Tenancy is not open; use it within its lifespan, or: {remedy}")

    async def open(self, *, initialise: bool | None, warm: bool = True) -> None:
        """Open the parts, unless they are open; ``warm``: with what is configured to run ahead of need.

        Raises:
            TenancyError: as ``Tenancy.open``.
        """
        with self._at_home():
            async with self._opening:
                if self.assembly is None:
                    config = self._config
                    if not warm:
                        config = config.replace(pool={"warm_tenants": 0}, provisioning={"warm_pool_background": False})
                    self.assembly = await _builders[-1](config, self._events, self._rates, initialise, self.seeds)
                    self._is_forked = False

    async def close(self, *, timeout: float) -> None:
        """Let the subscribers finish for ``timeout`` seconds, then close the parts.

        Raises:
            WrongEventLoopError: they are open in another event loop or thread.
        """
        with self._at_home():
            try:
                await self._events.drain(timeout)
            finally:
                try:
                    await self._close_assembly()
                finally:
                    await self._events.cancel()

    async def enter(self) -> None:
        """Open the parts for a block. Blocks may be nested."""
        await self.open(initialise=None)
        self._entered += 1

    async def leave(self, *, timeout: float) -> None:
        """Close them, if this ends the outermost block."""
        if self._entered == 0:
            return  # it was entered by the process that this one was forked from
        self._entered -= 1
        if self._entered == 0:
            await self.close(timeout=timeout)

    def park(self) -> Parked:
        """Take the parts out, so that others can be opened in another event loop; ``resume`` puts them back.

        For test runs, in which one event loop stops before the next one runs.
        """
        with self._claiming:
            parked = Parked(self._home, self.assembly, self._entered, self._opening)
            self._put_in(Parked(None, None, 0, asyncio.Lock()))
        return parked

    def resume(self, parked: Parked) -> None:
        """Put back what ``park`` has taken out, in place of what is open."""
        with self._claiming:
            self._put_in(parked)

    def _put_in(self, parked: Parked) -> None:
        self.assembly, self._entered, self._opening = parked.assembly, parked.entered, parked.opening
        self._home = self._events.home = self._rates.home = parked.home
        self._claims = 0

    @contextmanager
    def _at_home(self) -> Iterator[None]:
        """Take the running event loop for its own, unless it has one; it has none while it is closed."""
        with self._claiming:
            if self._home is not None and self._home.is_closed:
                self._forget()
            if self._home is None:
                self._home = self._events.home = self._rates.home = HomeLoop()
                self._opening = asyncio.Lock()
            self._home.check()
            home = self._home
            self._claims += 1
        try:
            yield
        finally:
            with self._claiming:
                if home is self._home:
                    self._claims -= 1
                    if not self._claims and self.assembly is None:
                        self._home = self._events.home = self._rates.home = None

    def _leave_to_parent(self) -> None:
        """In a forked process, give up what is open in the parent; it can be opened here as well."""
        self._claiming = threading.Lock()  # another thread of the parent's may have held it
        if self._home is None:
            return
        self._is_forked = self.assembly is not None
        # never collected: that would report tasks and sockets which are the parent's to end
        _parents.append((self.assembly, self._opening, self._home.loop))
        self._home = self._events.home = self._rates.home = self.assembly = None
        self._opening = asyncio.Lock()
        self._claims = self._entered = 0
        self._events.discard_tasks()

    def _forget(self) -> None:
        """Give up what belongs to an event loop that was closed first: nothing can be closed there any more."""
        if self.assembly is not None:
            logger.warning(
                "the event loop of an open Tenancy was closed; its connections and background tasks are given up. "
                "Close a Tenancy in the loop that opened it"
            )
        self._home = self.assembly = None
        self._claims = self._entered = 0
        self._events.discard_tasks()

    async def _close_assembly(self) -> None:
        async with self._opening:
            assembly, self.assembly = self.assembly, None
            if assembly is not None:
                # A caller that is cancelled does not keep the remaining parts open. And what the parts write down at
                # their end is for all tenants, so they run unbound.
                loop = asyncio.get_running_loop()
                await asyncio.shield(loop.create_task(assembly.close(), context=Context()))


__all__ = ["Builder", "Lifetime", "Parked", "build", "pop_builder", "push_builder"]
