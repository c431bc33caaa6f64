"""Typed in-process events: what happened, for metrics, tracing and the application's own subscribers.

Subscribe with ``tenancy.events.subscribe(TenantCreated, callback)``; subscribing to a base class receives all of its
subclasses. A callback runs after the fact, and after the commit where the event is about a change: one that fails is
logged and never breaks the operation. Delivery is at most once and within this process: nothing is written down, so a
process that ends takes with it what was not yet delivered.

A plain function is called at once, by the task that emits and with its tenant bound: for as long as it runs, nothing
else does, so it must not block. A coroutine runs later, in a task of its own with an empty context: no tenant is bound.
Of one subscription one coroutine runs at a time, in the order of emission; while it runs, a bounded number of events
wait, and beyond that they are dropped, which ``EventBus.dropped`` counts. Events carry ids and figures, never secrets.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from .loops import HomeLoop

logger = logging.getLogger("tenancy_orm.events")

DRAIN_TIMEOUT = 10.0
_CANCEL_TIMEOUT = 1.0  # for what a cancelled coroutine does in its ``finally``


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events."""


# --- tenants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantEvent(Event):
    """Something happened to, or for, one tenant."""

    tenant_id: UUID
    slug: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantCreated(TenantEvent):
    """A tenant became usable, ``seconds`` after its creation was asked for."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantCreationFailed(TenantEvent):
    """Creating a tenant failed at ``step``; ``undone`` tells whether nothing was left for ``reconcile``."""

    step: str
    undone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUpdated(TenantEvent):
    """Fields of a tenant changed."""

    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantStatusChanged(TenantEvent):
    """A tenant went from the status ``before`` to ``after``."""

    before: str
    after: str
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantPurged(TenantEvent):
    """A tenant's database, role, keys and secrets are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorAdmitted(TenantEvent):
    """A request to a tenant in maintenance was served, because ``TenancyMiddleware(operators=...)`` said so."""

    key_id: str
    source: str | None


# --- keys and requests ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRejected(Event):
    """A request's API key was refused. ``reason`` is for operators; the caller never learns it."""

    reason: str
    key_id: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTenantRequest(TenantEvent):
    """A request with this tenant's key named another tenant (by ``resolver``: sub-domain, header, path)."""

    named: str
    resolver: str
    key_id: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLockedOut(Event):
    """Failures from one ``source``, or on one ``key_id``, passed the threshold and are slowed down for ``seconds``.

    Exactly one of ``source`` and ``key_id`` is set.
    """

    failures: int
    seconds: float
    source: str | None = None
    key_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntrusionSuspected(TenantEvent):
    """This tenant's key named several other tenants; ``named`` are those seen within the last hour."""

    key_id: str
    named: tuple[str, ...]
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyIssued(TenantEvent):
    """A key was issued; ``rotated_from`` is the key that it replaces."""

    key_id: str
    rotated_from: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRevoked(TenantEvent):
    """A key was revoked; every process refuses it within a fraction of a second."""

    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionEnded(TenantEvent):
    """A connection was ended, since what it was let in with does not hold any more: revoked, expired, suspended, ...

    ``kind`` is "websocket" or "stream" (a streaming response); the caller never learns the ``reason``.
    """

    kind: str
    reason: str
    credential_id: str
    source: str | None = None


# --- directory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryMissed(Event):
    """A look-up went to the control database for ``keys`` keys and ``tenants`` tenants and took ``seconds``."""

    keys: int
    tenants: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryUnavailable(Event):
    """The control database did not answer a look-up; what is known keeps working for the grace time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerLost(Event):
    """The connection that carries invalidations was lost; the directory lives by its TTL until it is restored."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerRestored(Event):
    """Invalidations arrive again, after ``seconds`` without; everything remembered was marked for a fresh look-up."""

    seconds: float


# --- quotas ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaThresholdReached(TenantEvent):
    """Usage reached the soft limit ``fraction`` of ``limit``: raised at most once per period and fraction.

    It is raised by the process whose call reached it, and not at all where that call's answer was lost. A limit per
    lifetime raises it again once use had fallen a tenth below, one on concurrency after a day.
    """

    resource: str
    fraction: float
    limit: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRefused(TenantEvent):
    """A use was refused, since it would have passed the ``limit``."""

    resource: str
    limit: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChangeProposed(TenantEvent):
    """A policy found that the tenant should go from ``tier`` to ``proposed``; ``applied`` tells whether it has."""

    resource: str
    tier: str
    proposed: str
    applied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageExported(TenantEvent):
    """The usage record of a closed period was sent to where it is billed."""

    resource: str
    quantity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageExportFailed(TenantEvent):
    """A usage record could not be sent; ``permanent`` where it was given up, else it is tried again."""

    resource: str
    permanent: bool
    error: str


# --- routing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationIncident(TenantEvent):
    """A layer of isolation refused: ``kind`` is the error's class name, ``detail`` its message."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOpened(TenantEvent):
    """A connection to a tenant's database was opened in ``seconds``."""

    server: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionEvicted(TenantEvent):
    """An idle connection of this tenant was closed to make room for another's."""

    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckoutTimedOut(TenantEvent):
    """No connection became free in time."""

    server: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvicted(TenantEvent):
    """A tenant's engine left the cache."""

    server: str


# --- servers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTerminated(Event):
    """A session of a tenant's role was ended, since it was above a bound: it would stop the server for others.

    ``reason`` is "locks", "transaction", "idle_in_transaction", "notify_queue", "prepared_transaction" or "door" (it
    kept others from connecting to a database that is not its own). It held ``locks`` locks, and its transaction was
    open for ``seconds`` (None where that is unknown). The tenant's slug is in the control database, which may not
    answer at such a time.
    """

    tenant_id: UUID
    server: str
    reason: str
    locks: int
    seconds: float | None


# --- migrations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantMigrated(TenantEvent):
    """A tenant's schema is at ``revision``; ``changed`` tells whether anything was applied."""

    revision: str | None
    changed: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantMigrationFailed(TenantEvent):
    """A tenant's migration failed; ``error`` is the message without secrets."""

    error: str


E = TypeVar("E", bound=Event)
Callback = Callable[[E], Awaitable[None] | None]


@dataclass(slots=True, eq=False)
class _Subscriber:
    """One subscription, and the coroutines of its callback that wait for the one under way."""

    event: type[Event]
    callback: Callback[Any]
    waiting: deque[tuple[Awaitable[None], Event]] = field(default_factory=deque)
    busy: bool = False  # a coroutine is under way
    flooded: bool = False  # events were dropped, which was logged, and those that wait have not been worked off since

    def __str__(self) -> str:
        """Name the callback; without its repr, which may show an object's secrets."""
        name = getattr(self.callback, "__qualname__", None) or type(self.callback).__qualname__
        return f"subscriber {name} to {self.event.__name__}"


class EventBus:
    """Delivers events to subscribers, in the order of subscription. For one event loop: it is not thread-safe.

    Args:
        max_waiting: How many events may wait for one subscription's coroutine before further ones are dropped.

    Attributes:
        dropped: How many events were dropped since too many were waiting, or since the coroutine that they waited for
            was cancelled.
    """

    def __init__(self, *, max_waiting: int = 10_000) -> None:
        self.dropped = 0
        self.home: HomeLoop | None = None  # of the open Tenancy that this belongs to
        self._max_waiting = max_waiting
        self._subscribers: list[_Subscriber] = []
        # per concrete event class: all that want it, so that emitting without subscribers costs a look-up
        self._routes: dict[type[Event], tuple[_Subscriber, ...]] = {}
        self._tasks: dict[asyncio.Task[None], _Subscriber] = {}

    def subscribe(self, event: type[E], callback: Callback[E]) -> Callable[[], None]:
        """Call ``callback`` for every ``event`` of this class or a subclass; returns a function that unsubscribes.

        A callback that is subscribed twice is called twice. Unsubscribing ends this one subscription, and does nothing
        the second time; coroutines that wait for their turn by then still run.

        Args:
            event: The class; subclasses are received as well.
            callback: A function, which blocks the event loop while it runs, or a coroutine function, which runs later
                and with no tenant bound. Whatever ``Exception`` or ``CancelledError`` it raises is logged.
        """
        subscriber = _Subscriber(event, callback)
        self._subscribers.append(subscriber)
        self._routes.clear()

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)
                self._routes.clear()

        return unsubscribe

    def wants(self, event: type[Event]) -> bool:
        """Tell whether anyone listens, so that a hot path need not build the event."""
        return bool(self._route(event))

    def emit(self, event: Event) -> None:
        """Deliver ``event``: functions are called before this returns, coroutines start later.

        Of what a subscriber raises, ``KeyboardInterrupt`` and ``SystemExit`` alone come through.
        """
        for subscriber in self._route(type(event)):
            if len(subscriber.waiting) >= self._max_waiting:
                self._drop(subscriber)
                continue
            try:
                outcome = subscriber.callback(event)
                if inspect.isawaitable(outcome):
                    self._enqueue(subscriber, outcome, event)
            # a CancelledError as well: nothing is awaited here, so it is not the cancellation of the task that emits
            except (Exception, asyncio.CancelledError):
                logger.exception("a subscriber to %s failed", type(event).__name__)

    async def drain(self, timeout: float = DRAIN_TIMEOUT) -> bool:
        """Wait until every coroutine of a subscriber has ended, those that wait for their turn included.

        A subscriber that calls this does not wait for itself.

        Args:
            timeout: For how long at most, in seconds.

        Returns:
            Whether they have all ended.

        Raises:
            WrongEventLoopError: the ``Tenancy`` of this bus is open in another event loop or thread.
        """
        self._check_loop()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while tasks := self._others():
            left = deadline - loop.time()
            if left <= 0:
                return False
            await asyncio.wait(tasks, timeout=left)
        return True

    async def cancel(self) -> None:
        """Cancel the coroutines that ``drain`` has left, and drop the events that wait for them; both are logged.

        Raises:
            WrongEventLoopError: the ``Tenancy`` of this bus is open in another event loop or thread.
        """
        self._check_loop()
        tasks = self._others()
        for task in tasks:
            task.cancel()
        if tasks:
            _, deaf = await asyncio.wait(tasks, timeout=_CANCEL_TIMEOUT)
            for task in deaf:
                self._abandon(self._tasks[task])

    def forget(self) -> None:
        """Give up the coroutines of an event loop that is closed: nothing can end them. What waits is dropped."""
        for subscriber in self._tasks.values():
            subscriber.busy = False
            self._abandon(subscriber)
        self._tasks.clear()

    def _check_loop(self) -> None:
        if self.home is not None:
            self.home.check()

    def _others(self) -> list[asyncio.Task[None]]:
        current = asyncio.current_task()
        return [task for task in self._tasks if task is not current]

    def _route(self, event: type[Event]) -> tuple[_Subscriber, ...]:
        route = self._routes.get(event)
        if route is None:
            route = self._routes[event] = tuple(s for s in self._subscribers if issubclass(event, s.event))
        return route

    def _drop(self, subscriber: _Subscriber) -> None:
        self.dropped += 1
        if not subscriber.flooded:
            subscriber.flooded = True
            logger.warning(
                "%s is too slow: %d events wait for it, and further ones are dropped",
                subscriber,
                len(subscriber.waiting),
            )

    def _enqueue(self, subscriber: _Subscriber, outcome: Awaitable[None], event: Event) -> None:
        try:
            self._check_loop()
            loop = asyncio.get_running_loop()
        except RuntimeError:
            _close(outcome)
            raise
        subscriber.waiting.append((outcome, event))
        if not subscriber.busy:
            self._start(subscriber, loop)

    def _start(self, subscriber: _Subscriber, loop: asyncio.AbstractEventLoop) -> None:
        outcome, event = subscriber.waiting.popleft()
        subscriber.busy = True
        # a task and a context for each: what one binds is not seen by the next
        task = loop.create_task(_guard(outcome, event), context=Context())
        self._tasks[task] = subscriber
        task.add_done_callback(partial(self._ended, subscriber, outcome))

    def _ended(self, subscriber: _Subscriber, outcome: Awaitable[None], task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        subscriber.busy = False
        if task.cancelled() or task.exception() is not None:
            # by ``cancel``, or since the event loop comes to its end: nothing new may be started in it
            _close(outcome)
            self._abandon(subscriber)
        elif subscriber.waiting:
            self._start(subscriber, task.get_loop())
        else:
            subscriber.flooded = False

    def _abandon(self, subscriber: _Subscriber) -> None:
        waiting = len(subscriber.waiting)
        while subscriber.waiting:
            _close(subscriber.waiting.popleft()[0])
        subscriber.flooded = False
        self.dropped += waiting
        logger.warning("%s was cancelled at work; %d events that waited for it are dropped", subscriber, waiting)


async def _guard(outcome: Awaitable[None], event: Event) -> None:
    try:
        await outcome
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # of something that it awaited
        logger.exception("a subscriber to %s failed", type(event).__name__)
    except Exception:
        logger.exception("a subscriber to %s failed", type(event).__name__)


def _close(outcome: Awaitable[None]) -> None:
    """Give up what was not begun: a coroutine that is merely forgotten has Python warn of it."""
    if inspect.iscoroutine(outcome):
        outcome.close()
    elif asyncio.isfuture(outcome):
        outcome.cancel()
