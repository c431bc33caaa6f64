"""Mode rollback: every session of a tenant is on one connection, in one transaction that is rolled back after the test.

The pool of such a tenant gives each session a connection of its own to look at, and all of them are the same one behind
it. A session's BEGIN is a SAVEPOINT, so its commits and roll-backs work as ever within the test. The check of the
binding, the marker and the guard are those of production: this replaces the pool and nothing above or below it.
"""

from __future__ import annotations

import re
from typing import Any, cast

from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import greenlet_spawn

from ..postgres.errors import sqlstate_of
from ..postgres.sqlalchemy_versions import await_, forget_transaction, hold_transaction
from ..routing import Router
from ..routing.connection import TenantConnection, TenantCursor, _StreamCursor
from ..routing.connector import Connector, Record
from ..routing.engines import make_tenant_pool
from ..routing.pool import TenantPool
from ..tenant import Placement, Tenant
from ._savepoints import RollbackDriverConnection, Savepoint, Savepoints, running_test
from .errors import REMEDY, RollbackModeError

_READS = re.compile(r"\s*(select|show|values|fetch|table)\b", re.IGNORECASE)
_LISTENS = re.compile(r"\s*listen\b", re.IGNORECASE)
_IN_TRANSACTION = "25001"  # active_sql_transaction: CREATE INDEX CONCURRENTLY, VACUUM


class NestedCursor(TenantCursor):
    """A cursor on the connection that all share."""

    __slots__ = ()

    _adapt_connection: NestedConnection

    async def _prepare_and_execute(self, operation: Any, parameters: Any) -> None:
        connection = self._adapt_connection
        if _LISTENS.match(operation):
            raise RollbackModeError("LISTEN never receives anything")
        savepoints = connection.savepoints
        if savepoints.has_abandoned:
            async with savepoints.mutex:
                await savepoints.undo_abandoned()
        if connection.autocommit and not connection.reading:
            async with savepoints.mutex:
                savepoint = await savepoints.begin()
            try:
                await super()._prepare_and_execute(operation, parameters)
            except BaseException:
                await savepoint.rollback()
                raise
            await savepoint.commit()
            return
        try:
            await super()._prepare_and_execute(operation, parameters)
        except BaseException:
            connection.note_writing(True)  # it may have, and its transaction must be rolled back
            raise
        connection.note_writing(_READS.match(operation) is None)

    async def _executemany(self, operation: Any, seq_of_parameters: Any) -> Any:
        try:
            return await super()._executemany(operation, seq_of_parameters)
        finally:
            self._adapt_connection.note_writing(True)


class _NestedStreamCursor(_StreamCursor, NestedCursor):
    """A server-side cursor on it."""

    __slots__ = ()


class NestedConnection(TenantConnection):
    """What one session sees of the connection that all share."""

    __slots__ = ("read_only", "savepoints", "test")

    _cursor_cls = NestedCursor
    _ss_cursor_cls = _NestedStreamCursor

    savepoints: Savepoints
    test: object
    read_only: bool

    @classmethod
    def on(cls, root: TenantConnection, savepoints: Savepoints, pool: TenantPool, *, reading: bool) -> NestedConnection:
        """Make one for a session, which may be read-only."""
        made: NestedConnection = cls(root.dbapi, root._connection)
        made.savepoints, made.test = savepoints, savepoints.test
        made.route = pool.route
        made.read_only, made.alone = reading, False
        made._execute_mutex = savepoints.mutex
        made._prepared_statement_cache = root._prepared_statement_cache
        made._prepared_statement_name_func = root._prepared_statement_name_func
        return made

    @property
    def reading(self) -> bool:
        """Whether the session is read-only; others on the same connection may not be."""
        return self.read_only

    async def begin_reading(self, operation: str, *, alone: bool) -> None:
        """Prepare for a statement of a read-only session, which is always in a savepoint."""
        self._refuse_control(operation)

    async def leave_reading(self) -> None:
        """Do nothing: the connection has one mode."""

    @property
    def may_repeat(self) -> bool:
        """Never: the first statement of a session's transaction is not the first of the test's."""
        return False

    def cursor(self, server_side: bool = False) -> Any:
        """Return a cursor.

        Raises:
            RollbackModeError: the test has ended, and the connection is another one's now.
        """
        if self.test is not self.savepoints.test:
            raise RollbackModeError(f"a session on tenant {self.route.slug!r} is used after the test that it was for")
        return super().cursor(server_side)

    def abandon(self) -> None:
        """Undo the transaction that is open: the session will not end it."""
        transaction: Any = self._transaction
        if isinstance(transaction, Savepoint):
            forget_transaction(self)
            transaction.abandon()

    def note_writing(self, has_written: bool) -> None:
        """Remember that the transaction has written."""
        transaction: Any = self._transaction
        if has_written and isinstance(transaction, Savepoint):
            transaction.has_written = True

    async def _start_transaction(self) -> None:
        if self.isolation_level == "autocommit":
            return
        if self.isolation_level is not None and not self.read_only:
            raise RollbackModeError(f"isolation level {self.isolation_level} cannot be set for one session")
        hold_transaction(self, await self.savepoints.begin(readonly=bool(self.readonly or self.read_only)))

    def _handle_exception(self, error: Exception) -> Any:
        if sqlstate_of(error) == _IN_TRANSACTION:
            error.add_note(f"in mode rollback every statement is within a transaction; {REMEDY}")
        super()._handle_exception(error)


class RollbackPool(TenantPool):
    """Gives every session the same connection."""

    is_direct = False

    def __init__(self, pinned: Pinned, connector: Connector, tenant: Tenant, placement: Placement) -> None:
        super().__init__(connector, tenant_id=tenant.id, slug=tenant.slug, tier=tenant.tier, placement=placement)
        self._pinned = pinned

    def _do_get(self) -> Record:
        self.route.check_bound()
        record = cast("Record", self._create_connection())
        self._pinned.in_use.add(record)
        return record

    def _invoke_creator(self, rec: ConnectionPoolEntry) -> DBAPIConnection:
        reading, self._reading = self._reading, False
        nested = self._pinned.connect(self, reading=reading)
        if self.route.schema_changed_at > nested._invalidate_schema_cache_asof:
            await_(nested.prepare_again(self.route.schema_changed_at))
        return cast("DBAPIConnection", nested)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self.discard(cast("Record", record))

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        cast("NestedConnection", connection).abandon()

    def discard(self, record: Record) -> None:
        """Forget what a session saw of the connection."""
        self._pinned.in_use.discard(record)
        connection, record.dbapi_connection = record.dbapi_connection, None
        if connection is not None:  # None where it was invalidated, as where its task is cancelled
            cast("NestedConnection", connection).abandon()

    def admit_threads(self) -> None:
        """Refuse: a connection of psycopg's would be another one.

        Raises:
            RollbackModeError: always.
        """
        raise RollbackModeError("tenancy.sync needs a connection of its own")

    def recreate(self) -> RollbackPool:
        """Return this one: ``Engine.dispose`` in a test must not open another connection."""
        return self


class Pinned:
    """A tenant's one connection in one event loop, and the transaction of the test that has the tenant now."""

    def __init__(self, router: Router, tenant: Tenant) -> None:
        self._router = router
        self._tenant = tenant
        place = tenant.placement
        assert place is not None  # noqa: S101 - for the type checker: it was created for tests
        self._pool = make_tenant_pool(router._connector(place.server), tenant, place)
        self._record: Record | None = None
        self._savepoints: Savepoints | None = None
        self.in_use = set[Record]()  # by sessions of the test
        router.use_pool(tenant.id, self._make_pool)

    async def begin(self, test: object) -> None:
        """Begin the transaction of a test.

        Raises:
            TenancyError: the server does not answer.
        """
        if self._savepoints is None or self._savepoints.driver.is_closed():
            self._drop()
            record: Record = await greenlet_spawn(self._pool._do_get)
            driver = cast("TenantConnection", record.dbapi_connection)._connection
            driver.__class__ = RollbackDriverConnection
            self._record, self._savepoints = record, Savepoints(driver)
        await self._savepoints.begin_test(test)

    async def end(self) -> tuple[bool, list[str]]:
        """Roll the test's transaction back.

        Returns:
            Whether nothing of it stays, so that another test may have the tenant; and what the test has left.
        """
        savepoints, left = self._savepoints, list[str]()
        if savepoints is None:
            return True, left
        if (unfinished := savepoints.unfinished) and not savepoints.driver.is_closed():
            what = f"{unfinished} open transaction{'s' if unfinished > 1 else ''} of tenant {self._tenant.slug!r}"
            left.append(
                f"{what}: close every session, best by `async with tenancy.session(...)`, and await the tasks that use "
                "one"
            )
        if stays := await savepoints.end_test():
            left.append(f"in tenant {self._tenant.slug!r} {stays}")
        # the session that holds one is reported with this test: the garbage collector would do so with a later one
        while self.in_use:
            self.in_use.pop().fairy_ref = None
        return stays is None, left

    def connect(self, pool: RollbackPool, *, reading: bool) -> NestedConnection:
        """Return what a session of this test, which may be read-only, sees of the connection.

        Raises:
            RollbackModeError: no test has this tenant now, or another one than that which the caller runs for.
        """
        if self._record is None or self._savepoints is None or not self._savepoints.is_active:
            raise RollbackModeError(f"a session on tenant {pool.slug!r} is opened after the test that it was for")
        if (test := running_test.get()) is not None and test is not self._savepoints.test:
            raise RollbackModeError(
                f"a session on tenant {pool.slug!r} is opened by a task of a test that has ended; await the tasks that "
                "a test starts, or cancel them"
            )
        root = cast("TenantConnection", self._record.dbapi_connection)
        return NestedConnection.on(root, self._savepoints, pool, reading=reading)

    async def close(self) -> None:
        """Close the connection."""
        self._router.use_pool(self._tenant.id, None)
        self._drop()

    def _drop(self) -> None:
        record, self._record, self._savepoints = self._record, None, None
        if record is not None:
            self._pool.discard(record)

    def _make_pool(self, connector: Connector, tenant: Tenant, placement: Placement) -> TenantPool:
        return RollbackPool(self, connector, tenant, placement)


__all__ = ["Pinned"]
