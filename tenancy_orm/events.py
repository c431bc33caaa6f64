"""Typed events within one process, for metrics, tracing and the application's own subscribers.

Subscribe with ``tenancy.events.subscribe(TenantCreated, callback)``; subscribing to a base class receives all of its
subclasses. A callback runs after the fact, and after the commit where the event is about a change: one that fails is
logged and never breaks the operation. Delivery is at most once and within this process: nothing is stored, so an event
that was not delivered when the process ends is lost.

A plain function is called at once, by the task that emits and with its tenant bound: it blocks the event loop, so it
must be quick. A coroutine runs later, in its own task with an empty context: no tenant is bound. One coroutine of each
subscription runs at a time, in the order of emission; a bounded number of events wait for it, and further ones are
dropped and counted in ``EventBus.dropped``. Events carry ids and figures, never secrets.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from .loops import HomeLoop

logger = logging.getLogger("tenancy_orm.events")

DRAIN_TIMEOUT = 10.0
_CANCEL_TIMEOUT = 1.0  # for the ``finally`` of a cancelled coroutine


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events."""


# --- tenants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantEvent(Event):
    """Base of all events about one tenant."""

    tenant_id: UUID
    slug: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantCreated(TenantEvent):
    """A tenant became usable, ``seconds`` after its creation was requested."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantCreationFailed(TenantEvent):
    """Creating a tenant failed at ``step``; ``undone`` if nothing was left for ``tenancy reconcile``."""

    step: str
    undone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUpdated(TenantEvent):
    """Fields of a tenant changed."""

    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantStatusChanged(TenantEvent):
    """A tenant's status changed from ``before`` to ``after``."""

    before: str
    after: str
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantPurged(TenantEvent):
    """A tenant's database, role, keys and secrets were removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRestored(TenantEvent):
    """A tenant uses a restored database, or the one that a restore had replaced (``undone``).

    Attributes:
        operation: The number of the operation.
        undone: Whether a restore was undone.
        seconds: How long the tenant's sessions waited.
    """

    operation: int
    undone: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantCloned(TenantEvent):
    """A tenant was made as a clone of another one.

    Attributes:
        of: The other one.
        anonymised: Whether rules have replaced values.
        expires_at: When housekeeping deletes and purges it.
    """

    of: UUID
    anonymised: bool
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorAdmitted(TenantEvent):
    """A request to a tenant in maintenance was served, since ``TenancyMiddleware(operators=...)`` allowed it."""

    credential_id: str
    source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainFailing(TenantEvent):
    """The TXT record of a verified domain is missing; from ``lapses_at`` on it is no longer the tenant's."""

    domain: str
    lapses_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainLapsed(TenantEvent):
    """A domain was missing its TXT record for too long: it is a claim again, and does not name the tenant."""

    domain: str


# --- credentials and requests ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRejected(Event):
    """A request's credential was refused, or it had none. ``reason`` is for operators; the caller never learns it."""

    reason: str
    kind: str = "key"
    credential_id: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTenantRequest(Event):
    """A request named a tenant that its credential does not allow (by ``resolver``: sub-domain, header, path).

    ``tenant_id`` and ``slug`` are the credential's tenant, where it has exactly one: an API key always does.
    """

    named: str
    resolver: str
    kind: str = "key"
    subject: str = ""
    credential_id: str | None = None
    source: str | None = None
    tenant_id: UUID | None = None
    slug: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialLockedOut(Event):
    """Failures from one ``source``, or on one key, passed the threshold; it is slowed down for ``seconds``.

    Exactly one of ``source`` and ``credential_id`` is set.
    """

    failures: int
    seconds: float
    source: str | None = None
    credential_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntrusionSuspected(Event):
    """A credential named several tenants that it does not allow; ``named`` are those seen within the last hour.

    ``tenant_id`` and ``slug`` are the credential's tenant, where it has exactly one.
    """

    credential_id: str
    named: tuple[str, ...]
    kind: str = "key"
    subject: str = ""
    source: str | None = None
    tenant_id: UUID | None = None
    slug: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyIssued(TenantEvent):
    """A key was issued; ``rotated_from`` is the id of the key that it replaces."""

    key_id: str
    rotated_from: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRevoked(TenantEvent):
    """A key was revoked; every process refuses it within a fraction of a second."""

    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberAdded(TenantEvent):
    """A subject became a member of a tenant; ``invitation_id`` if it has accepted an invitation."""

    subject: str
    roles: tuple[str, ...]
    invitation_id: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberChanged(TenantEvent):
    """A member has other roles; ``before`` are the former ones."""

    subject: str
    roles: tuple[str, ...]
    before: tuple[str, ...]
    invitation_id: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRemoved(TenantEvent):
    """A subject is no member of a tenant any more; every process refuses it there within a fraction of a second."""

    subject: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InvitationRefused(Event):
    """The text of an invitation was refused. ``reason`` is for operators; the caller never learns it.

    ``tenant_id``, ``slug`` and ``invitation_id`` are those of the invitation, where the text was that of one.
    ``subject`` is who wanted to accept it; None where it was only read.
    """

    reason: str
    subject: str | None = None
    tenant_id: UUID | None = None
    slug: str | None = None
    invitation_id: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRevoked(Event):
    """What was issued to a ``subject`` before, or the one credential with this id, was revoked for every tenant."""

    subject: str | None = None
    credential_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionEnded(TenantEvent):
    """A connection was closed, since its credential is no longer valid: revoked, expired, tenant suspended, ...

    ``kind`` is "websocket" or "stream" (a streaming response); the caller never learns the ``reason``.
    """

    kind: str
    reason: str
    credential_id: str
    source: str | None = None


# --- directory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryMissed(Event):
    """The directory looked up keys, tenants and the memberships of ``subjects``, in the control database."""

    keys: int
    tenants: int
    seconds: float
    subjects: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryUnavailable(Event):
    """The control database did not answer a look-up; cached entries stay valid for the grace time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerLost(Event):
    """The connection that carries invalidations was lost; until it is restored, the cache relies on its TTL alone."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerRestored(Event):
    """Invalidations arrive again, after ``seconds`` without; all cached entries will be looked up again."""

    seconds: float


# --- tasks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRefused(Event):
    """A task did not run, or was not sent. ``reason`` is "suspended", "forged", "cross-tenant", ...

    ``queue`` is "celery", "taskiq", "arq" or "procrastinate"; ``outcome`` is "retry", "reject" or "drop". ``tenant_id``
    and ``slug`` are None where the header is not genuine.
    """

    queue: str
    task: str
    reason: str
    outcome: str
    tenant_id: UUID | None = None
    slug: str | None = None


# --- quotas ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaThresholdReached(TenantEvent):
    """Usage reached the soft limit ``fraction`` of ``limit``: emitted at most once per period and fraction.

    The process in which the call reached it emits it; where the answer to that call was lost, none does. For a limit
    per lifetime it is emitted again after use had fallen a tenth below, for one on concurrency after a day.
    """

    resource: str
    fraction: float
    limit: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRefused(TenantEvent):
    """A use was refused, since it would have exceeded the ``limit``."""

    resource: str
    limit: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChangeProposed(TenantEvent):
    """A policy proposes to change the tenant's tier from ``tier`` to ``proposed``; ``applied`` if it was changed."""

    resource: str
    tier: str
    proposed: str
    applied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageExported(TenantEvent):
    """The usage record of a closed period was sent for billing."""

    resource: str
    quantity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageExportFailed(TenantEvent):
    """A usage record could not be sent; ``permanent`` if it will not be tried again."""

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
    """A connection to a tenant's database was opened, in ``seconds``."""

    server: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionEvicted(TenantEvent):
    """An idle connection of this tenant was closed to make room for another tenant's."""

    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckoutTimedOut(TenantEvent):
    """A session got no connection within ``seconds``: the ``pool.checkout_timeout``, or a sooner ``deadline``.

    ``waiting_for`` is what it waited for: "server", a slot of the server; "tenant", a connection of its own tenant,
    which has all that it may have; "login", that fewer connections are being opened; "postgresql", that PostgreSQL
    accepts another one. Emitted for each tenant once a second at most; ``requests`` counts those since the last one.
    """

    server: str
    seconds: float
    waiting_for: str = "server"
    requests: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckoutRefused(TenantEvent):
    """A session was refused a connection at once. ``reason`` is "deadline" or "queue", as in ``CheckoutRefusedError``.

    It would have waited for ``seconds`` at least; the other fields are those of ``CheckoutTimedOut``. Emitted for each
    tenant once a second at most.
    """

    server: str
    reason: str
    seconds: float
    retry_after: float
    waiting_for: str
    requests: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckoutDelayed(TenantEvent):
    """A session waited for a connection for ``seconds``, 0.1 or more, and got it.

    ``waiting_for`` is as in ``CheckoutTimedOut``. Emitted for each tenant once a second at most; ``requests`` counts
    those since the last one.
    """

    server: str
    seconds: float
    waiting_for: str
    requests: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPassedOver(TenantEvent):
    """A read that asked for a replica went to the primary. ``reason`` is "stale", "written", "unavailable", ...

    ``staleness`` is how stale the freshest replica may be, in seconds; None where that is not known.
    """

    server: str
    reason: str
    staleness: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLost(Event):
    """Nothing is read from a replica: ``reason`` says that it does not answer, or why it is none of this server's."""

    server: str
    replica: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRestored(Event):
    """A replica can be read from again, ``seconds`` after it was lost."""

    server: str
    replica: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLeaseLost(Event):
    """This process cannot renew its lease of a server's connections, and keeps ``limit`` of them: its guaranteed part.

    The control database does not answer, or the process was stopped for some seconds.
    """

    server: str
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLeaseRestored(Event):
    """This process renews its lease of a server's connections again, and may have ``limit`` of them."""

    server: str
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLeaseReclaimed(Event):
    """Another process was lost; this one has ended its connections to a server, and ``connections`` are free again.

    ``host`` and ``pid`` say which process it was.
    """

    server: str
    host: str
    pid: int
    connections: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvicted(TenantEvent):
    """A tenant's engine was removed from the cache."""

    server: str


# --- servers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerChanged(Event):
    """This process follows a change of a server: it was added or changed, or removed, and then ``state`` is None."""

    server: str
    state: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDown(Event):
    """A server does not answer, for the ``reason`` that a probe has met: its tenants are refused until it does."""

    server: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUp(Event):
    """A server answers again, after ``seconds`` without."""

    server: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryChanged(Event):
    """A server refused a write, since it is a standby or read-only now: idle connections to it were closed."""

    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTerminated(Event):
    """The watchdog ended a session of a tenant's role that exceeded a bound and could block others on the server.

    ``reason`` is "locks", "transaction", "idle_in_transaction", "notify_queue", "prepared_transaction" or
    "login_blocker" (it kept others from connecting to a database that is not its own). It held ``locks`` locks, and
    its transaction was open for ``seconds`` (None if unknown). The slug is missing, since it is in the control
    database, which may not answer at such a time.
    """

    tenant_id: UUID
    server: str
    reason: str
    locks: int
    seconds: float | None


# --- migrations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent(Event):
    """Base of all events about a job of a worker."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDone(JobEvent):
    """This process has done a job, in ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailed(JobEvent):
    """A job of this process failed after ``seconds``, as so many times in a row; ``error`` is without secrets."""

    error: str
    failures: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTakenOver(JobEvent):
    """This process does a job that another one, ``taken_from`` (its host and pid), had begun and has not finished."""

    taken_from: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLost(JobEvent):
    """This process stopped a job after ``seconds``: it could not renew its claim, and another one goes on with it."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantMigrated(TenantEvent):
    """A tenant's schema is at ``revision``; ``changed`` if a migration was applied."""

    revision: str | None
    changed: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantMigrationFailed(TenantEvent):
    """A tenant's migration failed; ``error`` is the message, without secrets."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRevisionRefused(TenantEvent):
    """A tenant was looked up and is not served, since its revision, or the one that it is migrated to, is outside.

    It is emitted at each look-up, and not at each request.
    """

    revision: str | None
    migrating_to: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRunStarted(Event):
    """This process takes part in a recorded run over the fleet, for so many ``tenants``; ``is_new``: it started it."""

    run: int
    command: str
    target: str
    tenants: int
    is_new: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPreflightEnded(Event):
    """This process has asked ``tenants`` the ``checks`` of the revisions up to ``target``; ``failed`` do not pass."""

    target: str
    tenants: int
    checks: int
    failed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRunEnded(Event):
    """A run that this process took part in has ended or paused; ``state``: "done", "failed", "cancelled", "paused"."""

    run: int
    command: str
    target: str
    state: str
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantMoved(TenantEvent):
    """A tenant's database is on another server; its sessions waited for ``pause_seconds``, None where that is unknown.

    The former database is kept until the move is confirmed.
    """

    moved_from: str
    moved_to: str
    pause_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSeeded(TenantEvent):
    """An existing tenant got the seeds and reference data of these ``names``. Creations do not emit it."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSeedingFailed(TenantEvent):
    """Seeds or reference data could not be applied to an existing tenant; ``error`` is the message, without secrets."""

    error: str


# --- backups --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupEvent(Event):
    """Base of the events about backups; ``tenant_id`` and ``slug`` are None for the control database."""

    tenant_id: UUID | None
    slug: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupCompleted(BackupEvent):
    """A backup is in the store: ``bytes`` of it, encrypted, after ``seconds``."""

    backup_id: UUID
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupFailed(BackupEvent):
    """A backup could not be made. ``error`` is the message."""

    error: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupVerified(BackupEvent):
    """A backup was verified; ``error`` is what was wrong with it."""

    backup_id: UUID
    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreDrilled(BackupEvent):
    """The restore of a tenant was drilled; ``error`` is why it could not be brought back.

    Attributes:
        backup_id: The backup; None where there is none.
        error: None where the tenant could be brought back.
        age_seconds: How old the backup is.
        seconds: How long the restore took.
    """

    backup_id: UUID | None
    error: str | None
    age_seconds: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPruned(BackupEvent):
    """A backup was removed from the store."""

    backup_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupsChecked(Event):
    """Housekeeping has looked how old the newest good backups are: figures for gauges, and for an alarm.

    Attributes:
        tenants: How many tenants there are, without deleted ones.
        backed_up: How many of them have a good backup.
        verified: How many of them have one that was restored by a verification.
        overdue: How many have had none for longer than ``backup.overdue_seconds``.
        oldest_seconds: The age of the oldest of all tenants' newest good backups; None where there is none.
        oldest_verified_seconds: The same of those that were verified.
        control_seconds: The age of the control database's newest good backup; None where there is none.
        control_is_overdue: Whether that is longer than ``backup.overdue_seconds``.
    """

    tenants: int
    backed_up: int
    verified: int
    overdue: int
    oldest_seconds: float | None
    oldest_verified_seconds: float | None
    control_seconds: float | None
    control_is_overdue: bool


E = TypeVar("E", bound=Event)
Callback = Callable[[E], Awaitable[None] | None]


@dataclass(slots=True, eq=False)
class _Subscriber:
    """One subscription, and the coroutines of its callback that wait for the running one."""

    event: type[Event]
    callback: Callback[Any]
    waiting: deque[tuple[Awaitable[None], Event]] = field(default_factory=deque)
    busy: bool = False  # a coroutine is running
    flooded: bool = False  # events were dropped, which was logged; until none waits, it is not logged again

    def __str__(self) -> str:
        """Name the callback by its qualified name: its repr may show an object's secrets."""
        name = getattr(self.callback, "__qualname__", None) or type(self.callback).__qualname__
        return f"subscriber {name} to {self.event.__name__}"


class EventBus:
    """Delivers events to subscribers, in the order of subscription. It is for one event loop and not thread-safe.

    Args:
        max_waiting: How many events may wait for one subscription's coroutine before further ones are dropped.

    Attributes:
        dropped: How many events were dropped, because too many were waiting or because the coroutine that they waited
            for was cancelled.
    """

    def __init__(self, *, max_waiting: int = 10_000) -> None:
        self.dropped = 0
        self.home: HomeLoop | None = None  # the open Tenancy's
        self._max_waiting = max_waiting
        self._subscribers: list[_Subscriber] = []
        # the subscribers of each concrete event class, so that emitting without subscribers costs one look-up
        self._routes: dict[type[Event], tuple[_Subscriber, ...]] = {}
        self._tasks: dict[asyncio.Task[None], _Subscriber] = {}

    def subscribe(self, event: type[E], callback: Callback[E]) -> Callable[[], None]:
        """Call ``callback`` for every ``event`` of this class or a subclass; returns a function that unsubscribes.

        A callback that is subscribed twice is called twice. Unsubscribing ends this one subscription, and does nothing
        the second time; coroutines that are waiting then still run.

        Args:
            event: The class of events.
            callback: A function, which blocks the event loop while it runs, or a coroutine function, which runs later
                and with no tenant bound. An ``Exception`` or ``CancelledError`` that it raises is logged.
        """
        subscriber = _Subscriber(event, callback)
        self._subscribers.append(subscriber)
        self._routes.clear()

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)
                self._routes.clear()

        return unsubscribe

    def has_subscribers(self, event: type[Event]) -> bool:
        """Whether ``event`` has a subscriber: where it has none, a hot path need not build the event."""
        return bool(self._route(event))

    def emit(self, event: Event) -> None:
        """Deliver ``event``: functions are called before this returns, coroutines run later.

        Of the exceptions of a subscriber, only ``KeyboardInterrupt`` and ``SystemExit`` are raised here.
        """
        for subscriber in self._route(type(event)):
            if len(subscriber.waiting) >= self._max_waiting:
                self._drop(subscriber)
                continue
            try:
                outcome = subscriber.callback(event)
                if outcome is not None and inspect.isawaitable(outcome):
                    self._enqueue(subscriber, outcome, event)
            # CancelledError too: nothing is awaited here, so it is not a cancellation of the task that emits
            except (Exception, asyncio.CancelledError):
                logger.exception("a subscriber to %s failed", type(event).__name__)

    async def drain(self, timeout: float = DRAIN_TIMEOUT) -> bool:
        """Wait until every coroutine of a subscriber has ended, including those that wait for their turn.

        A subscriber that calls this does not wait for itself.

        Args:
            timeout: The longest time to wait, in seconds.

        Returns:
            True if all have ended.

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
        """Cancel the coroutines that are still running, and drop the events that wait for them; both are logged.

        Raises:
            WrongEventLoopError: the ``Tenancy`` of this bus is open in another event loop or thread.
        """
        self._check_loop()
        tasks = self._others()
        for task in tasks:
            task.cancel()
        if tasks:
            _, unresponsive = await asyncio.wait(tasks, timeout=_CANCEL_TIMEOUT)
            for task in unresponsive:
                self._abandon(self._tasks[task])

    def discard_tasks(self) -> None:
        """Discard the coroutines of a closed event loop, which can never end, and the events that wait for them."""
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
                "%s is too slow: %d events wait for it, and further events are dropped",
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
        # a task and a context for each, so that no coroutine sees what another has bound
        task = loop.create_task(_guard(outcome, event), context=Context())
        self._tasks[task] = subscriber
        task.add_done_callback(partial(self._ended, subscriber, outcome))

    def _ended(self, subscriber: _Subscriber, outcome: Awaitable[None], task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        subscriber.busy = False
        if task.cancelled() or task.exception() is not None:
            # by ``cancel``, or because the event loop is closing: nothing may be started in it any more
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
        logger.warning("%s was cancelled while running; %d events that waited for it are dropped", subscriber, waiting)


async def _guard(outcome: Awaitable[None], event: Event) -> None:
    try:
        await outcome
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # raised by something that it awaited
        logger.exception("a subscriber to %s failed", type(event).__name__)
    except Exception:
        logger.exception("a subscriber to %s failed", type(event).__name__)


def _close(outcome: Awaitable[None]) -> None:
    """Close a coroutine that was not started, or Python warns that it was never awaited."""
    if inspect.iscoroutine(outcome):
        outcome.close()
    elif asyncio.isfuture(outcome):
        outcome.cancel()
