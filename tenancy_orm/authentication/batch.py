"""Look-ups made at the same moment share a query."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from contextvars import Context
from typing import Generic, TypeVar

from ..errors import ControlUnavailableError

_NO_ANSWER = "the control database did not answer in time"

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class PendingLookup(Generic[V]):
    """One look-up in progress.

    Each caller waits for a future of its own, so that cancelling one cancels no other.
    """

    __slots__ = ("_timer", "callers", "done", "invalidated")

    def __init__(self) -> None:
        self.callers: list[asyncio.Future[V | None]] = []
        self.invalidated: set[Hashable] = set()
        """Tags invalidated between the start of its query and its last caller."""
        self.done = False
        self._timer: asyncio.TimerHandle | None = None

    def limit(self, seconds: float) -> None:
        """Have its callers wait no longer than this."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._time_out)

    def answer(self, value: V | None) -> None:
        """Give its callers the value."""
        self._end()
        for caller in self.callers:
            if not caller.done():
                caller.set_result(value)

    def fail(self, error: Exception) -> None:
        """Give its callers an error, unless they have the answer."""
        if self.done:
            return
        self._end()
        for caller in self.callers:
            if not caller.done():
                caller.set_exception(error)

    def _end(self) -> None:
        self.done = True
        if self._timer is not None:
            self._timer.cancel()

    def _time_out(self) -> None:
        self.fail(ControlUnavailableError(_NO_ANSWER))


class BatchLoader(Generic[K, V]):
    """Loads values by key: one query for a key however many callers wait for it, and one query for many keys.

    Queries run in their own tasks, so a cancelled caller does not fail the others. While a query runs, further keys are
    collected for the next one: a flood of misses costs few large queries, not many small ones.

    Args:
        load: Returns the values of some keys; a key that it leaves out has none.
        size: How many keys one query may have.
        workers: How many queries may run at once.
        timeout: Seconds one query may take. A caller waits for at most twice as long: the query before, and its own.
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
        self._waiting: dict[K, PendingLookup[V]] = {}  # the query has not started
        self._joinable: dict[K, PendingLookup[V]] = {}  # it has, and nothing was invalidated since
        self._begun: set[PendingLookup[V]] = set()  # it has, and not every caller has been resumed with its outcome
        self._working = 0  # workers that will read _waiting once more; not the number of unfinished tasks
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def get(self, key: K) -> tuple[V | None, set[Hashable]]:
        """Return the value of ``key`` (None where it has none), and the tags invalidated while it was looked up.

        Raises:
            ControlUnavailableError: the server did not answer, or not in time.
        """
        lookup = self._waiting.get(key) or self._joinable.get(key)
        if lookup is None or lookup.done:
            lookup = self._start(key)
        caller: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        lookup.callers.append(caller)
        try:
            value = await caller
        finally:
            lookup.callers.remove(caller)
            self._discard_if_done(lookup)
        return value, lookup.invalidated

    def invalidate(self, tag: Hashable) -> None:
        """Mark running look-ups: what they read may be older than the change of ``tag``. No new caller joins them."""
        self._joinable.clear()
        for lookup in self._begun:
            lookup.invalidated.add(tag)

    async def close(self) -> None:
        """End every look-up; its callers get ``ControlUnavailableError``."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_waiting(ControlUnavailableError("the directory is closed"))

    def _start(self, key: K) -> PendingLookup[V]:
        if self._closed:
            raise ControlUnavailableError("the directory is closed")
        lookup = self._waiting[key] = PendingLookup()
        if self._working < self._workers:
            self._working += 1
            # a context of its own: the query does not belong to the request that happened to come first
            task = asyncio.get_running_loop().create_task(self._work(), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            # many may come before its query, and each query may take its time
            lookup.limit(2 * self._timeout)
        return lookup

    async def _work(self) -> None:
        try:
            while self._waiting:
                keys = list(self._waiting)[: self._size]
                pending = {key: self._waiting.pop(key) for key in keys}
                await self._run(pending)
        finally:
            # here, not when the task is found done: a caller in between must see that no worker is left
            self._working -= 1

    async def _run(self, pending: dict[K, PendingLookup[V]]) -> None:
        self._joinable.update(pending)
        self._begun.update(pending.values())
        try:
            async with asyncio.timeout(self._timeout):
                found = await self._load(list(pending))
            for key, lookup in pending.items():
                lookup.answer(found.get(key))
        except TimeoutError:
            error = ControlUnavailableError(_NO_ANSWER)
            self._fail(pending.values(), error)
            # or each of the queued ones would wait for as long, one after the other
            self._fail_waiting(error)
        except asyncio.CancelledError:
            self._fail(pending.values(), ControlUnavailableError("the directory is closed"))
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, the callers get it
            self._fail(pending.values(), exc)
        finally:
            for key, lookup in pending.items():
                self._discard_if_done(lookup)
                if self._joinable.get(key) is lookup:
                    del self._joinable[key]

    def _discard_if_done(self, lookup: PendingLookup[V]) -> None:
        """Stop marking a look-up once its last caller has resumed, which is some turns of the loop after its answer."""
        if lookup.done and not lookup.callers:
            self._begun.discard(lookup)

    def _fail_waiting(self, error: Exception) -> None:
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self._fail(waiting, error)

    @staticmethod
    def _fail(pending: Iterable[PendingLookup[V]], error: Exception) -> None:
        for lookup in pending:
            lookup.fail(error)
