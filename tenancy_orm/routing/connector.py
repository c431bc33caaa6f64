"""Opening, verifying and closing the connections to one server's tenants.

Sockets are opened and closed in tasks of the ``Connector``, never in the task of a caller. So a caller may be cancelled
at any await: the opening of a connection is completed for the next caller, the closing of a socket is completed, and
the slot is freed only after that.

A slot belongs to a connection, not to SQLAlchemy's record of it. However SQLAlchemy drops a connection (invalidated,
detached, garbage-collected), it ends exactly once, in ``Connector.close`` or in the connection's finalizer.
"""

from __future__ import annotations

import asyncio
import logging
import select
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, cast
from uuid import UUID

from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import LRUCache

from ..config import TenancyConfig
from ..connections import ConnectionLeases
from ..connections.usage import tagged
from ..context import set_current
from ..errors import (
    ControlUnavailableError,
    MarkerMismatchError,
    NotOpenError,
    SecretError,
    SecretProviderError,
    ServerUnavailableError,
)
from ..events import ConnectionEvicted, ConnectionOpened, EventBus
from ..postgres import connections
from ..postgres.errors import INVALID_PASSWORD, PROTOCOL_VIOLATION, TOO_MANY_CONNECTIONS
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import clear_tracebacks
from ..secrets.keyring import Keyring
from ..secrets.sealed import SealedPasswords
from ..servers.positions import PROVED
from ..servers.server import CLOSE_SECONDS, Server
from .budget import Budget, BudgetStatistics, Share
from .connection import DriverConnection, TenantConnection
from .contention import Contention
from .dialect import SharedDialect
from .held import Ending, HeldConnection
from .marker import marker_text, verify
from .outage import Outage
from .protocol import Proof
from .route import FindsDatabases, TenantRoute
from .shortage import Ask, Shortages

logger = logging.getLogger("tenancy_orm.routing")

COMPILED_STATEMENTS = 1_000
"""Size of the compiled cache that all tenants of one server share, in statements."""

SURPLUS_SECONDS = 5.0
"""Seconds after which a tenant's idle connections, above one, are closed if other processes may need them."""

ALONE = 20
"""How many connections a process may have that shares a server with no other."""

_PASSWORD_READS = 3  # how often one login reads the tenant's stored passwords again

Record: TypeAlias = _ConnectionRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorServices:
    """What the connectors of a process work with.

    Attributes:
        config: Limits and timeouts.
        keyring: Opens the tenants' sealed passwords, each only for its login.
        installation: The id of this installation, for the markers.
        events: Receives openings, evictions and incidents.
        passwords: The sealed passwords of the registry, read again if PostgreSQL refuses the known one.
        ask: Asks the other processes for connections, if PostgreSQL accepts no further one of a tenant.
        is_listening: Whether such requests of other processes arrive here now.
        leases: This process's parts of the servers' connections; None: it shares them with no other.
    """

    config: TenancyConfig
    keyring: Keyring
    installation: UUID
    events: EventBus
    passwords: SealedPasswords | None
    ask: Ask | None
    is_listening: Callable[[], bool]
    leases: ConnectionLeases | None


class Connector:
    """Opens, verifies and closes the connections to one server's tenants.

    It has what these tenants share: the budget, the dialect and the compiled cache.

    Args:
        server: The server.
        services: What it works with.
        weights: The weights of the tiers in force; those of the configuration where None.
    """

    def __init__(
        self,
        server: Server,
        services: ConnectorServices,
        *,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        config, events, leases = services.config, services.events, services.leases
        self.server = server
        self._services = services
        # a replica has connections of its own
        lease = self.lease = None if leases is None else leases.lease(server.name, server)
        self.home = server.home
        self.events = events
        self.full_reset = config.pool.full_reset
        self.checkout_timeout = config.pool.checkout_timeout
        self.idle_timeout = config.pool.idle_timeout
        self.budget: Budget[Record] = Budget(
            (config.pool.max_connections or ALONE) if lease is None else 0,
            config.pool.max_connections_per_tenant,
            lambda _, record: self._evict(record),
            max_waiting=config.pool.max_waiting_per_tenant,
        )
        if lease is not None:
            lease.attach(self.budget)
        self.shortages = Shortages(
            server, self.budget, spawn=self.spawn, ask=services.ask, discard=self.discard, lease=lease
        )
        self.outage = Outage(
            server,
            self.budget,
            events,
            endings=lambda: self._endings,
            drop_idle=self._drop_idle,
            spawn=self.spawn,
            in_loop=lambda *call: _in_loop(self.loop, *call),
        )
        explain = {} if lease is None else {"explain": lease.explain}
        self.contention = Contention(server.name, self.budget, events, in_vain=self._in_vain, **explain)
        self._tiers = config.tiers
        self._weights = weights
        self.compiled_cache: LRUCache[Any, Any] = LRUCache(COMPILED_STATEMENTS)
        self.texts: LRUCache[str, Any] = LRUCache(COMPILED_STATEMENTS)  # textual statements, by their text
        self._shared = SharedDialect(server, self.spawn)
        self.dialect = self._shared.dialect
        self.dialect.is_disconnect = self.outage.is_disconnect(self.dialect.is_disconnect)  # type: ignore[method-assign]
        self.on_connect = self._shared.on_connect
        self._keyring = services.keyring
        self._passwords = services.passwords
        self.installation = services.installation
        self.detours: FindsDatabases | None = None
        """Finds the database of a tenant that was moved while a session on it was open."""
        self.on_write: Callable[[UUID], None] | None = None
        """Called with a tenant after something of it was committed; None where nobody wants to know."""
        self._closed = False
        self._endings: set[Ending] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._all_closed = asyncio.Event()

    def __repr__(self) -> str:
        """Return the server's name."""
        return f"Connector({self.server.name!r})"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop in which slots are counted and sockets closed."""
        loop = self.home.loop
        assert loop is not None  # noqa: S101 - for the type checker: it was made in one
        return loop

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``work`` in a task of its own, with no tenant bound; a cancellation of the caller does not end it."""
        context = copy_context()
        context.run(set_current, None)
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def share(self, tenant_id: UUID, tier: str, *, slug: str = "") -> Share[Record]:
        """Return a share of the budget for a new pool of this tenant; its tier's limit and weight count as well."""
        found = self._tiers.get(tier)
        weight = 1.0 if found is None else found.weight
        return self.budget.share(
            tenant_id,
            limit=None if found is None else found.connection_limit,
            weight=weight if self._weights is None else self._weights.get(tier, weight),
            slug=slug,
            tier=tier,
        )

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Share the connections by other weights of the tiers from now on."""
        self._weights = weights
        self.budget.reweigh(weights)

    # --- opening ----------------------------------------------------------------------------------------------------

    async def connect(self, route: TenantRoute, *, reading: bool = False) -> TenantConnection:
        """Open a connection in a reserved slot. Its first use waits for the proof that the database is the tenant's.

        Args:
            route: The tenant's.
            reading: Whether a read-only session will use it first.

        Raises:
            LoginRefusedError, ServerUnavailableError: the server refuses, or does not answer in time.
            MarkerMismatchError: (at a pooler) the database is another tenant's. The connection is closed, the incident
                reported. Elsewhere the first use raises this.
            SecretError: the tenant's password does not open under any key.
        """
        started = time.monotonic()
        driver_connection, is_proved = await self._open(route)
        connection = self._adapt(route, driver_connection, time.monotonic() - started)
        if not is_proved:
            self._begin_proof(route, driver_connection, driver_connection.first_statement(reading=reading))
        return connection

    async def probe(self, route: TenantRoute) -> None:
        """Open a connection as ``connect`` does and close it again, for a thread that will open one in the same slot.

        The thread's own connection proves the marker.

        Afterwards ``route.placement`` has the password that works, and the server's settings, what its address takes
        and the dialect are known.

        Raises:
            TenancyError: as ``connect``. The slot is free then.
        """
        driver_connection, _ = await self._open(route)
        try:
            await connections.close(driver_connection, timeout=CLOSE_SECONDS)
        except BaseException:
            driver_connection.terminate()
            self.release_slot(route.share)
            raise

    def _begin_proof(self, route: TenantRoute, driver_connection: DriverConnection, then: str) -> None:
        proof = Proof(
            driver_connection,
            marker_text(self.installation, route.tenant_id),
            then=then,
            tenant=route.slug,
            timeout=self.server.connect_timeout,
            report=route.report_incident,
            unavailable=partial(self._unproved, route),
        )
        driver_connection.prove(proof, self.spawn)

    def _unproved(self, route: TenantRoute, error: Exception) -> ServerUnavailableError:
        """Return the error for a connection of which the server has not said where it leads."""
        self.server.breaker.failed(error)
        return self.server.unavailable(error, tenant=route.slug, database=route.placement.database)

    async def _open(self, route: TenantRoute) -> tuple[DriverConnection, bool]:
        """Open a connection; returns it, and whether it has proved the marker."""
        driver_connection: DriverConnection | None = None
        try:
            if self._closed:
                raise NotOpenError("the router is closed; open another Tenancy")
            self.outage.check(route.slug)
            async with asyncio.timeout(self.server.connect_timeout):
                tag = await self.leased()
                if not self._shared.ready:
                    await self._prepare(self._shared.begin, route)
                driver_connection = await self._log_in(route)
                # a pooler accepts logins for PostgreSQL, which may refuse them: a statement shows that
                if is_proved := self.server.is_pooled or self.server.is_replica:
                    await verify(driver_connection, self.installation, route.tenant_id, tenant=route.slug)
                    await self._verify_standby(driver_connection, route)
                self.check_lease(tag)
                if not self._shared.ready:
                    await self._prepare(self._shared.finish, route)
        except SERVER_FAILURES as exc:
            self.release_slot(route.share, driver_connection)
            self.server.breaker.failed(exc)
            raise self.server.unavailable(
                exc, tenant=route.slug, database=route.placement.database
            ) from clear_tracebacks(exc)
        except asyncio.CancelledError:
            # only when the connector shuts down: there is no time left for a regular close
            if driver_connection is not None:
                driver_connection.terminate()
            self.release_slot(route.share)
            raise
        except BaseException as exc:
            refused = isinstance(exc, ServerUnavailableError) and exc.sqlstate == TOO_MANY_CONNECTIONS
            self.release_slot(route.share, driver_connection, refused=refused)
            if refused:
                self.shortages.refused(route)
            elif isinstance(exc, ServerUnavailableError) and exc.retry_after is None:
                self.server.breaker.failed(exc)
            if isinstance(exc, MarkerMismatchError):
                route.report_incident(exc)
            raise
        return driver_connection, is_proved

    async def _verify_standby(self, driver_connection: DriverConnection, route: TenantRoute) -> None:
        proof = self.server.standby_proof(route.slug)
        if proof is not None and await driver_connection.execute(proof) != PROVED:
            raise self.server.no_standby(route.slug)

    async def leased(self) -> str | None:
        """Return the tag of the lease in which a connection is opened, once it is in force.

        Raises:
            ServerUnavailableError: it has expired, and cannot be renewed.
        """
        if self.lease is None:
            return None
        leases = self._services.leases
        if not (self.lease.is_valid or self.lease.is_over) and leases is not None:
            await leases.renewed(self.lease, timeout=self.server.connect_timeout / 2)
        tag = self.lease.tag
        self.check_lease(tag)
        return tag

    def check_lease(self, tag: str | None) -> None:
        """Check that a connection that was opened with this tag may be kept: in any thread.

        A process may be stopped during a login, and go on when others have got its connections.

        Raises:
            ServerUnavailableError: the lease has expired.
        """
        if self.lease is not None and not (self.lease.is_valid and self.lease.tag == tag):
            raise self._unleased()

    def check_wait(self, tenant: str) -> None:
        """Return where a connection may be waited for: there can be one, as far as is known.

        Args:
            tenant: The slug of the tenant that it is for, for the error.

        Raises:
            ServerUnavailableError: the breaker is open; or the lease has expired, and the control database does not
                answer.
        """
        self.outage.check(tenant)
        if (error := self._in_vain(tenant)) is not None:
            raise error

    def _in_vain(self, tenant: str) -> ServerUnavailableError | None:
        return self._unleased(tenant) if self.lease is not None and self.lease.is_over else None

    def _unleased(self, tenant: str | None = None) -> ServerUnavailableError:
        return ServerUnavailableError(
            server=self.server.name,
            tenant=tenant,
            reason="this process could not renew its share of the connections, which others may have taken",
            retry_after=1.0,
        )

    def rename(self, name: str) -> str:
        """Return the ``application_name`` of a tenant's connection, for the one that it would have: in any thread."""
        return name if self.lease is None else tagged(name, self.lease.tag)

    def tagged_name(self, connection: HeldConnection) -> str | None:
        """The ``application_name`` of a new connection, where it has a tag. In any thread."""
        return None if self.lease is None or self.server.is_pooled else connection.reported("application_name")

    def statistics(self) -> BudgetStatistics:
        """Return the current counts."""
        counted = self.budget.statistics()
        lease = self.lease
        return counted if lease is None else replace(counted, guaranteed=lease.guaranteed, borrowed=lease.borrowed)

    async def _log_in(self, route: TenantRoute) -> DriverConnection:
        # read before the login, during which another login of the same tenant may replace it
        sealed = route.placement.sealed_password
        try:
            return await self._log_in_with(route, sealed)
        except (ServerUnavailableError, SecretError) as exc:
            if self._passwords is None or not _concerns_password(exc):
                raise
            return await self._log_in_again(route, sealed, exc)

    async def _log_in_again(
        self, route: TenantRoute, used: bytes, refused: ServerUnavailableError | SecretError
    ) -> DriverConnection:
        """Log in with the passwords that the registry has now: the password or its key may have been rotated.

        They are read again while they change, since a rotation may begin between a read and a login.
        """
        # a password that did not open is tried again: reading the registry may have loaded its key
        tried = {used} if isinstance(refused, ServerUnavailableError) else set()
        for _ in range(_PASSWORD_READS):
            stored = await self._stored_passwords(route, refused)
            if tried.issuperset(stored):
                break
            for sealed in stored:
                if sealed in tried:
                    continue
                tried.add(sealed)
                try:
                    driver_connection = await self._log_in_with(route, sealed)
                except (ServerUnavailableError, SecretError) as exc:
                    if not _concerns_password(exc):
                        raise
                    refused = exc
                else:
                    route.placement = replace(route.placement, sealed_password=sealed)
                    return driver_connection
        raise refused

    async def _stored_passwords(self, route: TenantRoute, refused: Exception) -> Sequence[bytes]:
        assert self._passwords is not None  # noqa: S101 - for the type checker: the caller has checked
        try:
            return await self._passwords.candidates(route.tenant_id)
        except (ControlUnavailableError, SecretProviderError) as exc:
            logger.warning("the password of tenant %s cannot be read again: %s", route.slug, exc)
            raise refused from exc

    async def _log_in_with(self, route: TenantRoute, sealed: bytes) -> DriverConnection:
        return await self.server.connect_tenant(
            route.placement,
            partial(self._keyring.open_password, route.tenant_id, sealed),
            tenant=route.slug,
            connection_class=DriverConnection,
            rename=self.rename if self.lease is not None else None,
        )

    def open_password(self, route: TenantRoute) -> str:
        """Return the password that a tenant's role logs in by, as far as is known. In any thread.

        Raises:
            SecretError: it does not open under any key.
        """
        return self._keyring.open_password(route.tenant_id, route.placement.sealed_password)

    async def _prepare(self, phase: Callable[[], Awaitable[None]], route: TenantRoute) -> None:
        """Await a phase of the shared dialect's initialisation; an error names the tenant that waits for it."""
        try:
            await phase()
        except ServerUnavailableError as exc:
            # many callers may wait for one task, each gets an error of its own
            raise ServerUnavailableError(
                server=exc.server,
                tenant=route.slug,
                sqlstate=exc.sqlstate,
                address=exc.address,
                reason=exc.reason,
                retry_after=exc.retry_after,
            ) from exc

    def _adapt(self, route: TenantRoute, driver_connection: DriverConnection, seconds: float) -> TenantConnection:
        connection = TenantConnection(  # type: ignore[no-untyped-call]
            self.dialect.loaded_dbapi,
            driver_connection,
            prepared_statement_cache_size=self.server.prepared_statement_cache_size,
            # the unnamed statement is parsed and run in one turn, on whichever connection a pooler chooses for that
            prepared_statement_name_func=_no_name if self.server.is_pooled else None,
        )
        connection.route = route
        connection.use(reading=False)
        connection.stable_snapshot = self.server.has_stable_snapshots
        connection.name = self.tagged_name(connection)
        connection.reports = driver_connection._protocol.get_settings().__getattr__
        # a pooler gives each transaction another server connection, so a session's settings do not stay with it
        driver_connection.follows_server = self.server.traffic.judges_hosts
        driver_connection.native_mode = None if self.server.is_pooled else driver_connection.mode
        driver_connection.check_use = route.check_bound
        connection.poller = select.poll()
        connection.poller.register(driver_connection._transport.get_extra_info("socket").fileno(), select.POLLIN)
        self.watch(connection)
        self.opened(route, driver_connection, seconds)
        return connection

    def watch(self, connection: HeldConnection) -> None:
        """Have the finalizer of a connection close it and free its slot, in the loop: for the garbage collector too.

        In any thread.
        """
        finalizer = weakref.finalize(
            connection, _in_loop, self.loop, self._begin_close, connection.route.share, connection.ending
        )
        finalizer.atexit = False
        connection.finalizer = finalizer

    def opened(self, route: TenantRoute, ending: Ending, seconds: float) -> None:
        """Record that a connection was opened in a reserved slot; it is in use.

        Args:
            route: The tenant's.
            ending: What closes its socket.
            seconds: How long that took.
        """
        self._endings.add(ending)
        self.outage.answers += 1
        self.budget.opened(seconds)
        if route.share.account.ceiling is not None:
            self.shortages.accepted(route)
        if self.events.has_subscribers(ConnectionOpened):
            self.events.emit(
                ConnectionOpened(tenant_id=route.tenant_id, slug=route.slug, server=self.server.name, seconds=seconds)
            )

    def release_slot(self, share: Share[Record], ending: Ending | None = None, *, refused: bool = False) -> None:
        """Free the slot of a connection that was not completed, once its socket is closed."""
        if ending is None:
            self.budget.failed(share, refused=refused)
            self._check_all_closed()
        else:
            self.budget.opened()
            self._begin_close(share, ending)

    # --- closing ----------------------------------------------------------------------------------------------------

    def close(self, connection: HeldConnection) -> None:
        """Begin to close a connection that is in use. Call it in the loop's thread; a second call does nothing."""
        if connection.finalizer.detach() is not None:
            self._begin_close(connection.route.share, connection.ending)

    def discard(self, record: Record) -> None:
        """Close a connection that counts as in use, and empty its record."""
        self.close(cast("HeldConnection", record.dbapi_connection))
        record.close()

    def _begin_close(self, share: Share[Record], ending: Ending) -> None:
        self.budget.discard(share)
        self.spawn(self._close_socket(share, ending))

    async def _close_socket(self, share: Share[Record], ending: Ending) -> None:
        """Close a socket, then free its slot. The server ends the session first, so it never has too many."""
        try:
            await ending.close(timeout=CLOSE_SECONDS)
        except SERVER_FAILURES as exc:
            logger.debug("a connection to server %s was terminated: %s", self.server.name, type(exc).__name__)
            ending.terminate()
        finally:
            self._endings.discard(ending)
            self.budget.closed(share)
            self._check_all_closed()

    def _evict(self, record: Record) -> None:
        route = cast("HeldConnection", record.dbapi_connection).route
        self.discard(record)
        if self.events.has_subscribers(ConnectionEvicted):
            self.events.emit(ConnectionEvicted(tenant_id=route.tenant_id, slug=route.slug, server=self.server.name))

    def _drop_idle(self) -> None:
        for _, record in self.budget.take_expired(float("inf")):
            self.discard(record)

    def schedule_sweep(self) -> None:
        """Schedule the next sweep, which closes connections that are idle for too long."""
        if self._sweeper is None:
            delay = max(min(self.idle_timeout, SURPLUS_SECONDS), 0.1)
            self._sweeper = asyncio.get_running_loop().call_later(delay, self._sweep)

    def _sweep(self) -> None:
        """Close connections that are idle for longer than ``idle_timeout``, or may be missing in another process.

        A process that receives no notifications of the others keeps one idle connection for each tenant, and so
        does one that has competed with them for a tenant's connections lately.
        """
        self._sweeper = None
        now = time.monotonic()
        for _, record in self.budget.take_expired(now - self.idle_timeout):
            self.discard(record)
        recent = self.shortages.recent()
        surplus = self.budget.take_surplus(now - SURPLUS_SECONDS, recent if self._services.is_listening() else None)
        for _, record in surplus:
            self.discard(record)
        if self.budget.idle:
            self.schedule_sweep()

    async def shut_down(self, timeout: float) -> None:
        """Wait until every connection is closed. After ``timeout`` seconds, terminate the remaining ones.

        The caller has retired the pools: idle connections are being closed, busy ones will be when they are returned.
        """
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.contention.close()
        self._all_closed.clear()
        self._check_all_closed()
        try:
            async with asyncio.timeout(timeout):
                await self._all_closed.wait()
        except TimeoutError:
            logger.warning("%d connections to server %s were still in use", len(self._endings), self.server.name)
        self._closed = True
        self.shortages.close()
        self.outage.close()
        if self._endings and self.lease is not None:
            self.lease.was_cut = True
        for ending in list(self._endings):
            ending.terminate()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check_all_closed(self) -> None:
        if self.budget.open == 0:
            self._all_closed.set()


def _concerns_password(error: ServerUnavailableError | SecretError) -> bool:
    # PgBouncer refuses a wrong password as it refuses anything, as a violation of the protocol
    return isinstance(error, SecretError) or error.sqlstate in (INVALID_PASSWORD, PROTOCOL_VIOLATION)


def _no_name() -> str:
    return ""


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        # the loop is closed, and so is every socket of it
        logger.debug("a connection outlived its event loop")


__all__ = ["ALONE", "COMPILED_STATEMENTS", "Connector", "ConnectorServices", "Record"]
