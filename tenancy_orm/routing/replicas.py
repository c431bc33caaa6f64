"""Reads on replicas: which replica serves a read, or the primary in its place."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn
from uuid import UUID

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPICursor, ExecutionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import PoolProxiedConnection

from ..errors import (
    CheckoutTimeoutError,
    ConfigurationError,
    ConnectionLimitError,
    LoginRefusedError,
    MarkerMismatchError,
    ReadOnlyError,
    ServerUnavailableError,
)
from ..events import EventBus, ReplicaPassedOver
from ..postgres.errors import sqlstate_of
from ..servers.positions import Position
from ..servers.replicas import Replica, ReplicaMonitor
from ..servers.server import Server
from ..tenant import Tenant
from .budget import BudgetStatistics
from .connection import TenantEngine, VariantConnection
from .connector import Connector
from .consistency import ConsistencyTokens, WriteNotes, current_consistency
from .engines import EngineCache, Entry
from .reading import what_it_does

logger = logging.getLogger("tenancy_orm.routing")

AWAY: Final = "unavailable"
BUSY: Final = "busy"
CONFLICT: Final = "conflict"
STALE: Final = "stale"
TOKEN: Final = "token"  # noqa: S105 - not a secret
WRITTEN: Final = "written"

ELSEWHERE: Final = (ServerUnavailableError, CheckoutTimeoutError, ConnectionLimitError, MarkerMismatchError)
"""The errors of a replica's connection after which a read is tried elsewhere. ``LoginRefusedError`` is among them: a
tenant's database may not have been replayed yet."""

# what a standby raises where replay removes what a statement still sees, or locks what it has locked
_CONFLICTS = frozenset({"40001", "40P01"})

WAIT_SECONDS: Final = 0.25
"""How long a read waits for a connection to a replica; then it is served elsewhere."""


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """One replica, for one process.

    Attributes:
        connections: To it.
        reads: How often a session or a statement was given a connection to it.
        staleness: How old what it has may be, in seconds; None where that is not known.
        reason: Why it is not read from; None where it is.
    """

    connections: BudgetStatistics
    reads: int
    staleness: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class ReplicaDemand:
    """What a read asks of a replica.

    Args:
        max_staleness: How old what it sees may be, in seconds.
        after: A token: it sees what was committed before that was made.
    """

    max_staleness: float
    after: str | None = None


@dataclass(slots=True)
class _Known:
    """The parts of one replica: made when it is first read from."""

    connector: Connector
    cache: EngineCache
    reads: int = field(default=0)


def check_demand(*, read_only: bool, max_staleness: float | None, isolation_level: str | None) -> None:
    """Refuse what no replica can serve.

    Raises:
        ConfigurationError: the session may write, the bound is none, or the isolation level is one of primaries alone.
    """
    if not read_only:
        raise ConfigurationError("a session with replica=True only reads: give read_only=True as well")
    given: object = max_staleness
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if max_staleness is not None and not (is_number and max_staleness > 0):
        raise ConfigurationError(f"max_staleness must be a number of seconds above 0, not {max_staleness!r}")
    if isolation_level == "SERIALIZABLE":
        raise ConfigurationError("a replica has no SERIALIZABLE; use REPEATABLE READ, which reads the same snapshot")


def can_repeat(bind: Engine | Connection | None, error: DBAPIError) -> bool:
    """Whether a read that raised this can be repeated elsewhere: a replica has ended it, or is gone."""
    return isinstance(bind, ReplicaEngine) and bind.reads.ended_by(error)


class ServerReplicas:
    """The replicas of one server, for this process.

    Args:
        server: The primary.
        connect_to: Makes a connector for a replica.
        max_engines: How many engines are kept for each replica.
        events: Receives what is lost, restored and passed over.
        tokens: Reads tokens.
        notes: Tells what was written.
    """

    def __init__(
        self,
        server: Server,
        connect_to: Callable[[Server], Connector],
        *,
        max_engines: int,
        events: EventBus,
        tokens: ConsistencyTokens | None,
        notes: WriteNotes,
    ) -> None:
        self.server = server
        self.monitor = ReplicaMonitor(server, events, self._forget)
        self.passed_over: Counter[str] = Counter()
        self._connect_to = connect_to
        self._max_engines = max_engines
        self._events = events
        self._tokens = tokens
        self._notes = notes
        self._known: dict[Replica, _Known] = {}
        self._closed = False

    # --- choosing ---------------------------------------------------------------------------------------------------

    async def choose(self, tenant: Tenant, demand: ReplicaDemand, passed: Mapping[Replica, str]) -> Replica | None:
        """Return the replica that serves a read now; None for the primary, which is counted and reported.

        Args:
            tenant: The tenant.
            demand: What the read asks for.
            passed: Replicas that could not serve it, and why.
        """
        found = await self._find(tenant.id, demand, passed)
        if isinstance(found, Replica):
            return found
        self._pass_over(tenant, found)
        return None

    async def _find(self, tenant_id: UUID, demand: ReplicaDemand, passed: Mapping[Replica, str]) -> Replica | str:
        """A replica, or the reason why none will do."""
        if self._closed:
            return AWAY
        if not self.monitor.started(demand.max_staleness):
            await self.monitor.start(demand.max_staleness)
        usable = [
            replica for replica in self.monitor.usable() if replica not in passed and not replica.server.breaker.is_open
        ]
        if not usable:
            return next(iter(passed.values()), AWAY)
        now = time.monotonic()
        fresh = [replica for replica in usable if now - replica.fresh_at <= demand.max_staleness]
        if not fresh:
            return STALE
        written_at = self._notes.last(tenant_id)
        fresh = [replica for replica in fresh if replica.fresh_at >= written_at]
        if not fresh:
            return WRITTEN
        for token in self._tokens_of(tenant_id, demand):
            marked = None if self._tokens is None else self._tokens.read(tenant_id, token)
            if marked is None:
                return TOKEN
            if marked.concerns(demand.max_staleness):
                fresh = await self._with(fresh, marked.position)
                if not fresh:
                    return WRITTEN
        return next((replica for replica in fresh if not self._is_busy(replica)), BUSY)

    def _tokens_of(self, tenant_id: UUID, demand: ReplicaDemand) -> list[str]:
        found = current_consistency(tenant_id)
        return [token for token in (demand.after, None if found is None else found.token) if token]

    async def _with(self, replicas: list[Replica], position: Position) -> list[Replica]:
        found = [replica for replica in replicas if replica.has(position)]
        known = replicas[0].position
        if not found and known is not None and known.system == position.system:
            # by now it may have it; a look takes as long as the read on the primary, which it spares
            await self.monitor.ask_again(replicas[0])
            found = [replica for replica in replicas if replica.has(position)]
        return found

    def _is_busy(self, replica: Replica) -> bool:
        """Whether a read would wait for a connection until another one is returned."""
        if (known := self._known.get(replica)) is None:
            return False
        budget = known.connector.budget
        # what waits makes the process ask for more of the connections that all processes share
        return bool(budget.idle == 0 and budget.open >= max(budget.limit, budget.reachable))

    def _pass_over(self, tenant: Tenant, reason: str) -> None:
        self.passed_over[reason] += 1
        if self._events.has_subscribers(ReplicaPassedOver):
            staleness = min((self._staleness(replica) for replica in self.monitor.replicas), default=math.inf)
            self._events.emit(
                ReplicaPassedOver(
                    tenant_id=tenant.id,
                    slug=tenant.slug,
                    server=self.server.name,
                    reason=reason,
                    staleness=None if staleness == math.inf else staleness,
                )
            )

    def _staleness(self, replica: Replica) -> float:
        return time.monotonic() - replica.fresh_at

    # --- engines ----------------------------------------------------------------------------------------------------

    def acquire(self, replica: Replica, tenant: Tenant) -> Entry:
        """Return a tenant's engine for a replica with one more lease, which ``release`` must end."""
        known = self._known.get(replica)
        if known is None:
            connector = self._connect_to(replica.server)
            # the primary is there for those who would have to wait
            connector.checkout_timeout = min(connector.checkout_timeout, WAIT_SECONDS)
            cache = EngineCache(lambda _: connector, max_engines=self._max_engines, events=self._events)
            known = self._known[replica] = _Known(connector, cache)
            if self._closed:
                cache.close()
        entry = known.cache.acquire(tenant)
        known.reads += 1
        return entry

    def connector(self, name: str) -> Connector | None:
        """The connector of the replica of this name, if it has been read from."""
        return next((known.connector for known in self._known.values() if known.connector.server.name == name), None)

    def release(self, replica: Replica, entry: Entry) -> None:
        """End a lease."""
        self._known[replica].cache.release(entry)

    def retire(self, tenant_id: UUID) -> None:
        """Drop a tenant's engines."""
        for known in self._known.values():
            known.cache.retire(tenant_id)

    def schema_changed(self, tenant_id: UUID | None, *, changing_seconds: float) -> None:
        """Have connections prepare their statements again."""
        for known in self._known.values():
            known.cache.schema_changed(tenant_id, changing_seconds=changing_seconds)

    def _forget(self, replica: Replica) -> None:
        """Close the connections to a replica that is none any more: what they read is not this server's."""
        if (known := self._known.get(replica)) is not None:
            known.cache.retire_server(known.connector)

    def statistics(self) -> dict[str, ReplicaStatistics]:
        """Count, by replica."""
        found = {}
        for replica in self.monitor.replicas:
            known, staleness = self._known.get(replica), self._staleness(replica)
            found[replica.server.name] = ReplicaStatistics(
                connections=BudgetStatistics(*(0,) * 8) if known is None else known.connector.budget.statistics(),
                reads=0 if known is None else known.reads,
                staleness=None if staleness == math.inf else staleness,
                reason=replica.reason,
            )
        return found

    def close(self) -> list[Connector]:
        """Retire every engine; returns the connectors, which are still to be shut down."""
        self._closed = True
        self.monitor.stop()
        for known in self._known.values():
            known.cache.close()
        return [known.connector for known in self._known.values()]


class ReplicaReads:
    """What one session, or one statement, reads: on a replica where one can serve it, and else on the primary.

    Args:
        replicas: The server's replicas.
        primary: The tenant's engine on the primary, which the caller has leased.
        demand: What it asks of a replica.
    """

    def __init__(self, replicas: ServerReplicas, primary: Entry, demand: ReplicaDemand) -> None:
        self._replicas = replicas
        self._tenant = primary.tenant
        self._demand = demand
        self._leased: dict[Replica, Entry] = {}
        self._chosen: Replica | None = None
        self._passed: dict[Replica, str] = {}
        self.primary = primary

    async def choose(self) -> Entry:
        """Return the engine to connect to, for one transaction or statement."""
        chosen = self._chosen = await self._replicas.choose(self._tenant, self._demand, self._passed)
        if chosen is None:
            return self.primary
        entry = self._leased.get(chosen)
        if entry is None or entry.retired:
            if entry is not None:
                self._replicas.release(chosen, entry)
                del self._leased[chosen]
            entry = self._leased[chosen] = self._replicas.acquire(chosen, self._tenant)
        return entry

    def failed(self, error: BaseException) -> bool:
        """Note that the chosen replica gave no connection; returns whether it was one, so that ``choose`` goes on."""
        chosen = self._chosen
        if chosen is None or not isinstance(error, ELSEWHERE):
            return False
        away = isinstance(error, ServerUnavailableError)
        self._passed[chosen] = AWAY if away or isinstance(error, MarkerMismatchError) else BUSY
        if away and not isinstance(error, LoginRefusedError):
            self._replicas.monitor.avoid(chosen)
        logger.info("tenant %s is not read on replica %s: %s", self._tenant.slug, chosen.server.name, error)
        return True

    def ended_by(self, error: DBAPIError) -> bool:
        """Whether a replica has ended a statement, or is gone, so that it can be repeated: the next choice is another.

        Args:
            error: What the statement has raised.
        """
        chosen = self._chosen
        if chosen is None:
            return False
        if sqlstate_of(error) in _CONFLICTS:
            self._passed[chosen] = CONFLICT
        elif error.connection_invalidated:
            self._passed[chosen] = AWAY
            self._replicas.monitor.avoid(chosen)
        else:
            return False
        return True

    def close(self) -> None:
        """End the leases of replicas' engines."""
        leased, self._leased = self._leased, {}
        for replica, entry in leased.items():
            self._replicas.release(replica, entry)


class _ReplicaConnection(VariantConnection):
    """A connection of a ``ReplicaEngine``."""

    # not the event ``handle_error``, which all dialects share: each statement of every engine would look for listeners
    def _handle_dbapi_exception(self, *args: Any, **options: Any) -> NoReturn:
        try:
            super()._handle_dbapi_exception(*args, **options)
        except DBAPIError as exc:
            engine = self.engine
            if isinstance(engine, ReplicaEngine):
                engine.reads.ended_by(exc)
            raise


class ReplicaEngine(TenantEngine):
    """The engine of one session that reads on replicas: each of its connections leads where ``choose`` says.

    Args:
        primary: The tenant's engine on the primary.
        reads: What the session reads on; its ``choose`` runs in the event loop.
        choose: Returns the engine that ``reads`` chooses.
        isolation_level: That of the session.
    """

    _connection_cls = _ReplicaConnection

    def __init__(
        self,
        primary: Engine,
        reads: ReplicaReads,
        *,
        choose: Callable[[], Engine],
        isolation_level: str | None,
    ) -> None:
        super().__init__(primary.pool, primary.dialect, primary.url, query_cache_size=0)
        self.isolation_level = isolation_level
        self.reads = reads
        self._choose = choose

    def connect(self) -> Connection:
        """Return a connection to a replica that can serve the read, or to the primary."""
        while True:
            chosen = self._choose()
            self.pool, self.dialect, self.url = chosen.pool, chosen.dialect, chosen.url
            self._execution_options = chosen._execution_options
            try:
                return super().connect()
            except BaseException as exc:
                if not self.reads.failed(exc):
                    raise

    def raw_connection(self) -> PoolProxiedConnection:
        """Return a connection for reading alone."""
        pool: Any = self.pool
        connection: PoolProxiedConnection = pool.connect_for_reading()
        return connection


def _refuse_writes(
    connection: Connection,
    cursor: DBAPICursor,
    statement: str,
    parameters: object,
    context: ExecutionContext | None,
    executemany: bool,
) -> None:
    """Refuse what can be seen to write or lock, before it is sent; PostgreSQL refuses the rest."""
    compiled: Any = getattr(context, "compiled", None)
    what = None
    if getattr(context, "isddl", False):
        what = "changes the schema"
    elif compiled is not None and (compiled.isinsert or compiled.isupdate or compiled.isdelete):
        what = "writes"
    elif getattr(getattr(compiled, "statement", None), "_for_update_arg", None) is not None:
        what = "locks rows (with_for_update)"
    else:
        what = what_it_does(statement)
    if what is not None:
        pool: Any = connection.engine.pool
        raise _refused(pool.slug, what)


def refuse_text(slug: str, statement: str) -> None:
    """Refuse a text that writes or locks, as far as is seen, before it is sent to a replica.

    Raises:
        ReadOnlyError: it does.
    """
    if (what := what_it_does(statement)) is not None:
        raise _refused(slug, what)


def _refused(slug: str, what: str) -> ReadOnlyError:
    return ReadOnlyError(
        f"tenant {slug!r}: the statement {what}, and it would be read on a replica; use tenancy.session() or "
        "tenancy.transaction() for it"
    )


event.listen(ReplicaEngine, "before_cursor_execute", _refuse_writes)


__all__ = [
    "ELSEWHERE",
    "ReplicaDemand",
    "ReplicaEngine",
    "ReplicaReads",
    "ReplicaStatistics",
    "ServerReplicas",
    "can_repeat",
    "check_demand",
    "refuse_text",
]
