"""Look-ups that are asked for at the same moment share a query."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from contextvars import Context
from typing import Generic, TypeVar

from ..errors import ControlUnavailableError

_NO_ANSWER = "the control database did not answer in time"

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Flight(Generic[V]):
    """One look-up under way. ``touched``: what was invalidated from its query's begin until its last caller has it."""

    __slots__ = ("future", "touched", "waiters")

    def __init__(self) -> None:
        self.future: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        # with nobody left to wait for it, a failure is nobody's news
        self.future.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.touched: set[Hashable] = set()
        self.waiters = 0


class Batch(Generic[K, V]):
    """Loads values by key: one query for each key however many wait for it, and one for many keys at once.

    The queries belong to tasks of their own, so a caller that is cancelled fails nobody else. While a query runs, what
    is asked for gathers for the next one: a flood of misses costs few, large queries rather than many small ones.

    Args:
        load: Returns the values of some keys; a key that it leaves out has none.
        size: How many keys one query may name.
        workers: How many queries may run at once.
        timeout: Seconds one query may take. A caller waits for twice as long at most, for the query before and its own.
    """

    def __init__(
        self,
        load: Callable[[list[K]], Awaitable[Mapping[K, V]]],
        *,
        size: int = 200,
        workers: int = 2,
        timeout: float,
    ) -> None:
        self._load = load
        self._size = size
        self._workers = workers
        self._timeout = timeout
        self._waiting: dict[K, Flight[V]] = {}  # their query has not begun
        self._joinable: dict[K, Flight[V]] = {}  # it has, and nothing was invalidated since
        self._begun: set[Flight[V]] = set()  # it has, and not every caller has been resumed with its outcome
        self._working = 0  # workers that will look at _waiting once more; not the same as tasks that are not done
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def get(self, key: K) -> tuple[V | None, set[Hashable]]:
        """Return the value of ``key`` (None where it has none), and what was invalidated while it was looked up.

        Raises:
            ControlUnavailableError: the query failed for want of a server, or took too long.
        """
        flight = self._waiting.get(key) or self._joinable.get(key)
        if flight is None:
            flight = self._start(key)
        flight.waiters += 1
        try:
            async with asyncio.timeout(2 * self._timeout):
                value = await asyncio.shield(flight.future)
        except TimeoutError:
            raise ControlUnavailableError(_NO_ANSWER) from None
        finally:
            flight.waiters -= 1
            self._end_if_seen(flight)
        return value, flight.touched

    def touch(self, tag: Hashable) -> None:
        """Note that ``tag`` was invalidated: what is being read may be old, and nobody may join it from now on."""
        self._joinable.clear()
        for flight in self._begun:
            flight.touched.add(tag)

    async def close(self) -> None:
        """End every look-up; whoever waits gets ``ControlUnavailableError``."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_waiting(ControlUnavailableError("the directory is closed"))

    def _start(self, key: K) -> Flight[V]:
        if self._closed:
            raise ControlUnavailableError("the directory is closed")
        flight = self._waiting[key] = Flight()
        if self._working < self._workers:
            self._working += 1
            # a context of its own: the query is not that of whoever happened to ask first
            task = asyncio.get_running_loop().create_task(self._work(), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return flight

    async def _work(self) -> None:
        try:
            while self._waiting:
                keys = list(self._waiting)[: self._size]
                flights = {key: self._waiting.pop(key) for key in keys}
                await self._run(flights)
        finally:
            # at once, not when the task is found done: who asks in between must see that nobody works any more
            self._working -= 1

    async def _run(self, flights: dict[K, Flight[V]]) -> None:
        self._joinable.update(flights)
        self._begun.update(flights.values())
        try:
            async with asyncio.timeout(self._timeout):
                found = await self._load(list(flights))
            for key, flight in flights.items():
                flight.future.set_result(found.get(key))
        except TimeoutError:
            error = ControlUnavailableError(_NO_ANSWER)
            self._fail(flights.values(), error)
            # those in the queue would wait for as long each in their turn
            self._fail_waiting(error)
        except asyncio.CancelledError:
            self._fail(flights.values(), ControlUnavailableError("the directory is closed"))
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is belongs to those who asked
            self._fail(flights.values(), exc)
        finally:
            for key, flight in flights.items():
                self._end_if_seen(flight)
                if self._joinable.get(key) is flight:
                    del self._joinable[key]

    def _end_if_seen(self, flight: Flight[V]) -> None:
        """What is invalidated concerns a look-up until its last caller runs on, some turns of the loop later."""
        if flight.future.done() and flight.waiters == 0:
            self._begun.discard(flight)

    def _fail_waiting(self, error: Exception) -> None:
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self._fail(waiting, error)

    @staticmethod
    def _fail(flights: Iterable[Flight[V]], error: Exception) -> None:
        for flight in flights:
            if not flight.future.done():
                flight.future.set_exception(error)
