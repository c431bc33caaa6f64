"""Typed in-process events: what happened, for metrics, tracing and the application's own subscribers.

Subscribe with ``tenancy.events.subscribe(TenantCreated, callback)``; subscribing to a base class receives all of its
subclasses. A callback is a function or a coroutine function. It runs after the fact: one that fails is logged and never
breaks the operation. Coroutines run in tasks of their own, which ``EventBus.drain`` awaits at shutdown. Events carry
ids and figures, never secrets.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

logger = logging.getLogger("tenancy_orm.events")


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
    """Usage reached the soft limit ``fraction`` of ``limit``: raised once per period and fraction."""

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
class TierUpgradeProposed(TenantEvent):
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


class EventBus:
    """Delivers events to subscribers, in the order of subscription."""

    def __init__(self) -> None:
        self._subscribers: dict[type[Event], list[Callback[Any]]] = {}
        # per concrete event class: every callback that wants it, so that emitting without subscribers costs a look-up
        self._routes: dict[type[Event], tuple[Callback[Any], ...]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def subscribe(self, event: type[E], callback: Callback[E]) -> Callable[[], None]:
        """Call ``callback`` for every ``event`` of this class or a subclass; returns a function that unsubscribes."""
        callbacks = self._subscribers.setdefault(event, [])
        callbacks.append(callback)
        self._routes.clear()

        def unsubscribe() -> None:
            if callback in callbacks:
                callbacks.remove(callback)
                self._routes.clear()

        return unsubscribe

    def wants(self, event: type[Event]) -> bool:
        """Tell whether anyone listens, so that a hot path need not build the event."""
        return bool(self._route(event))

    def emit(self, event: Event) -> None:
        """Deliver ``event``. Never raises an ``Exception``: a failing subscriber is logged."""
        for callback in self._route(type(event)):
            try:
                outcome = callback(event)
                if inspect.isawaitable(outcome):
                    self._spawn(outcome, event)
            except Exception:
                logger.exception("a subscriber to %s failed", type(event).__name__)

    async def drain(self) -> None:
        """Wait for the coroutines that subscribers have under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _route(self, event: type[Event]) -> tuple[Callback[Any], ...]:
        route = self._routes.get(event)
        if route is None:
            route = tuple(c for cls, found in self._subscribers.items() if issubclass(event, cls) for c in found)
            self._routes[event] = route
        return route

    def _spawn(self, outcome: Awaitable[None], event: Event) -> None:
        async def run() -> None:
            try:
                await outcome
            except Exception:
                logger.exception("a subscriber to %s failed", type(event).__name__)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
