"""The SQLAlchemy pool of one tenant's connections, within its server's budget."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Literal, TypeAlias, cast
from uuid import UUID

from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import greenlet_spawn

from ..errors import LoginRefusedError, ServerUnavailableError, TenancyError
from ..postgres.errors import TOO_MANY_CONNECTIONS
from ..postgres.failures import SERVER_FAILURES
from ..postgres.sqlalchemy_versions import await_
from ..tenant import Placement
from .connection import TenantConnection
from .connector import Connector, Record
from .contention import WaitRefusedError
from .routed_pool import RoutedPool

logger = logging.getLogger("tenancy_orm.routing")

Warmth: TypeAlias = Literal["connected", "busy", "full"]
"""What a pool answers that is to be warmed: it has a connection; not now, since others need what it takes; or half of
the process's connections to the server are open already."""


_ASK_SECONDS = 2.0  # how long it waits for connections that other processes leave unused

_Held: TypeAlias = "tuple[TenantPool, Record]"
"""A connection that is in use, and the pool that it is of: not always the one that was asked for it."""


class TenantPool(RoutedPool):
    """SQLAlchemy's pool for one tenant, of asyncpg's connections.

    Args:
        connector: The connector of the tenant's server.
        tenant_id: The tenant.
        slug: Its slug, for errors and events.
        tier: The name of its tier, which bounds its connections.
        placement: Where its database is.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.TenantPool"

    is_direct = True
    """Whether its connections can be used without SQLAlchemy's ``Connection``."""

    def __init__(self, connector: Connector, *, tenant_id: UUID, slug: str, tier: str, placement: Placement) -> None:
        super().__init__(
            connector,
            connector.dialect,
            home=connector.home,
            tenant_id=tenant_id,
            slug=slug,
            tier=tier,
            placement=placement,
        )
        self._reading = False
        self._opening_for_reading = False

    def _invoke_creator(self, rec: ConnectionPoolEntry) -> DBAPIConnection:
        connection = await_(self.connector.connect(self.route, reading=self._opening_for_reading))
        adapted = cast("DBAPIConnection", connection)
        try:
            if self.connector.on_connect is not None:
                self.connector.on_connect(adapted)
        except BaseException:
            self.connector.close(connection)
            raise
        return adapted

    # --- checkout ---------------------------------------------------------------------------------------------------

    def connect_for_reading(self) -> PoolProxiedConnection:
        """Return a connection like ``connect``, for a read-only session."""
        self._reading = True  # until ``_do_get`` takes note of it, before anything is awaited
        return self.connect()

    def _do_get(self) -> Record:
        reading, self._reading = self._reading, False
        record = self._get(reading)
        cast("TenantConnection", record.dbapi_connection).use(reading=reading)
        return record

    def _get(self, reading: bool) -> Record:
        if self.detour:
            return await_(self._get_by_detour(reading))[1]
        record = self._take_first(reading)
        if record is None:
            return await_(self._acquire(reading))[1]
        return record if self._is_ready(record) else await_(self._make_ready(record, reading))[1]

    async def get(self, *, reading: bool) -> _Held:
        """Return a connection without a connection of SQLAlchemy's around it, and the pool to return it to.

        ``give_back`` of that pool must follow. It is another one, and perhaps another server's, where the tenant's
        database was exchanged.

        Raises:
            TenancyError: as a session's first statement.
        """
        held = await (self._get_by_detour(reading) if self.detour else self._get_here(reading))
        cast("TenantConnection", held[1].dbapi_connection).use(reading=reading)
        return held

    async def _get_here(self, reading: bool) -> _Held:
        record = self._take_first(reading)
        if record is None:
            return await self._acquire(reading)
        return (self, record) if self._is_ready(record) else await self._make_ready(record, reading)

    async def _get_by_detour(self, reading: bool) -> _Held:
        """Wait while the tenant's sessions do, and return a connection to the database that it has then."""
        self.route.check_bound()
        if (held := await self._follow(reading)) is not None:
            return held
        # a pool that is not retired is in use again after a pause
        self.detour = self.retired
        return await self._get_here(reading)

    async def _follow(self, reading: bool, *, look_again: bool = False) -> _Held | None:
        """Return a connection to the database that the tenant has now; None where it has this pool's."""
        detours = self.connector.detours
        if detours is None or (entry := await detours.find(self.route, look_again=look_again)) is None:
            return None
        try:
            return await cast("TenantPool", entry.pool)._get_here(reading)
        finally:
            detours.release(entry)

    def give_back(self, record: Record, *, broken: bool) -> None:
        """Return a connection of this pool to it, or close it if it is in the middle of something."""
        if broken:
            self.discard(record)
        else:
            self._do_return_conn(record)

    def _take_first(self, reading: bool) -> Record | None:
        self.route.check_bound()
        self.connector.outage.check(self.route.slug)
        self.connector.budget.touch(self.share)
        return self._take(reading=reading) if self.share.idle else None

    def _is_ready(self, record: Record) -> bool:
        """Whether an idle connection can be used as it is: nothing has arrived on it, and it knows the schema."""
        connection = cast("TenantConnection", record.dbapi_connection)
        return (
            not connection.has_unread_data and self.route.schema_changed_at <= connection._invalidate_schema_cache_asof
        )

    async def _make_ready(self, record: Record | None, reading: bool) -> _Held:
        """Read what the server has sent, and forget what it has prepared; or return another connection."""
        while record is not None:
            connection = cast("TenantConnection", record.dbapi_connection)
            try:
                if connection.has_unread_data:
                    await connection.drain()
                if connection.usable:
                    if self.route.schema_changed_at > connection._invalidate_schema_cache_asof:
                        await connection.prepare_again(self.route.schema_changed_at)
                    return self, record
            except BaseException:
                self.discard(record)
                raise
            self.discard(record)
            record = self._take(reading=reading)
        return await self._acquire(reading)

    async def _acquire(self, reading: bool) -> _Held:
        """As ``_acquire_here``; where the role is refused since the tenant has another database by now, of that."""
        try:
            return self, await self._acquire_here(reading)
        except LoginRefusedError as exc:
            # the notification has not come yet, or was missed
            held = await self._follow(reading, look_again=True)
            if held is None:
                raise exc
            return held

    async def _acquire_here(self, reading: bool) -> Record:
        """Wait for a connection or a slot, and open a connection in the slot.

        If the server or the tenant's role has too many connections (53300), other processes may have them: wait until
        the deadline as the first in the queue, since a connection may be returned here or closed there.
        """
        deadline, timeout = self._deadline()
        refused = False
        while True:
            record = await self._wait_for_slot(deadline, timeout, first=refused)
            if record is not None:
                return record
            try:
                return await self._open(reading)
            except ServerUnavailableError as exc:
                if exc.sqlstate != TOO_MANY_CONNECTIONS:
                    raise
                if time.monotonic() >= deadline:
                    raise await self._timeout_error(timeout) from exc
                refused = True

    async def _wait_for_slot(self, deadline: float, timeout: float, *, first: bool) -> Record | None:
        """Reserve a slot and return None, or return a connection that is returned to the pool before."""
        # one may have been returned while PostgreSQL refused another: whoever waits is served by later returns alone
        if first and (record := self._take()) is not None:
            return record
        while not self.connector.budget.reserve(self.share):
            record = await self._wait(deadline, timeout, first=first)
            if record is None or self._reusable(record):
                return record
            self.discard(record)
        return None

    async def _wait(self, deadline: float, timeout: float, *, first: bool) -> Record | None:
        """Wait for a connection of this tenant (a record) or for a reserved slot (None)."""
        connector, account = self.connector, self.share.account
        connector.check_wait(self.route.slug)
        waiter: asyncio.Future[Record | None] = asyncio.get_running_loop().create_future()
        refusal = connector.budget.wait(self.share, waiter, deadline=deadline, first=first)
        if refusal is not None:
            raise self._refused_error(refusal, timeout)
        connector.contention.begin()
        since, waiting_for = time.monotonic(), connector.budget.reason(account)
        try:
            async with asyncio.timeout(deadline - since):
                record = await waiter
        except TimeoutError:
            self._stop_waiting(waiter)
            raise await self._timeout_error(timeout) from None
        except WaitRefusedError as exc:
            raise self._refused_error(exc.refusal, timeout) from None
        except BaseException:
            self._stop_waiting(waiter)
            raise
        connector.contention.delayed(account, time.monotonic() - since, waiting_for)
        return record

    def _stop_waiting(self, waiter: asyncio.Future[Record | None]) -> None:
        budget = self.connector.budget
        if not waiter.done() or waiter.cancelled():
            budget.withdraw(self.share, waiter)
        elif waiter.exception() is not None:
            pass  # it was refused in the same turn
        elif (record := waiter.result()) is not None:
            # the waiter was served in the same turn of the loop in which the caller was cancelled
            self._do_return_conn(record)
        else:
            budget.failed(self.share)

    async def _open(self, reading: bool) -> Record:
        task = self.connector.spawn(greenlet_spawn(self._create, reading))
        try:
            return cast("Record", await asyncio.shield(task))
        except asyncio.CancelledError:
            task.add_done_callback(self._return_unclaimed)
            raise

    async def warm(self, *, ask: bool = True) -> Warmth:
        """Open a connection where the tenant has none, in a slot that nobody needs; see ``EngineCache.warm``.

        Args:
            ask: Whether to ask for a larger lease where this process's is spent, which takes a while.

        Raises:
            TenancyError: as a session's first statement.
        """
        budget, lease = self.connector.budget, self.connector.lease
        if self.share.account.open:
            return "connected"
        if budget.has_waiters:
            return "busy"
        most = budget.limit if lease is None else min(lease.most, max(lease.guaranteed, budget.limit))
        if 2 * (budget.open + 1) > most:
            return "full"
        if budget.open >= budget.limit and lease is not None:
            return "busy" if ask and await lease.ask(timeout=_ASK_SECONDS) else "full"
        if not budget.reserve(self.share):
            return "busy"
        self._do_return_conn(await self._open(reading=False))
        return "connected"

    def _create(self, reading: bool) -> ConnectionPoolEntry:
        self._opening_for_reading = reading  # until ``_invoke_creator`` takes note of it, before anything is awaited
        return self._create_connection()

    def _return_unclaimed(self, task: asyncio.Task[Record]) -> None:
        """Return to the pool a connection that was opened for a cancelled caller."""
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.debug("opening a connection for a cancelled caller failed: %s", type(error).__name__)
        else:
            self._do_return_conn(task.result())

    # --- return -----------------------------------------------------------------------------------------------------

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        record = cast("Record", record)
        if record.dbapi_connection is None:
            return  # it was invalidated or detached, and the connection has the slot
        connection = cast("TenantConnection", record.dbapi_connection)
        if self.retired or not connection.usable:
            self.discard(record)
        elif self.connector.full_reset or connection.is_renamed:
            self.connector.spawn(self._reset(record))
        else:
            self._return_idle(record)

    async def _reset(self, record: Record) -> None:
        connection = cast("TenantConnection", record.dbapi_connection)
        timeout = self.connector.server.connect_timeout
        try:
            if self.connector.full_reset:
                await connection._connection.reset(timeout=timeout)
            if connection.is_renamed:
                # or nobody could tell which tenant's it is
                await connection.tag_again(timeout=timeout)
        except (*SERVER_FAILURES, TenancyError, asyncio.CancelledError) as exc:
            self.discard(record)
            if isinstance(exc, asyncio.CancelledError):
                raise
        else:
            if self.retired:
                self.discard(record)
            else:
                self._return_idle(record)

    # --- closing ----------------------------------------------------------------------------------------------------

    def dispose(self) -> None:
        """Retire this pool.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self.connector.home.check()
        self.retire()

    def admit_threads(self) -> None:
        """Raise where synchronous code may have no connections beside those of this pool: for tests."""

    def recreate(self) -> TenantPool:
        """Return a new pool for the same tenant; ``Engine.dispose`` calls this."""
        route = self.route
        return TenantPool(
            self.connector, tenant_id=route.tenant_id, slug=route.slug, tier=route.tier, placement=route.placement
        )


__all__ = ["TenantPool", "Warmth"]
