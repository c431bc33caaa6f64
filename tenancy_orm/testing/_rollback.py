"""Mode rollback: every session of a tenant is on one connection, in one transaction that is rolled back after the test.

The pool of such a tenant gives each session a connection of its own to look at, and all of them are the same one behind
it. A session's BEGIN is a SAVEPOINT, so its commits and roll-backs work as ever within the test. The check of the
binding, the marker and the guard are those of production: this replaces the pool and nothing above or below it.
"""

from __future__ import annotations

import re
from typing import Any, cast
from weakref import WeakSet

from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import greenlet_spawn

from ..postgres.errors import sqlstate_of
from ..postgres.sqlalchemy_versions import await_, hold_transaction
from ..routing import Router
from ..routing.connection import TenantConnection, TenantCursor
from ..routing.connector import Connector, Record
from ..routing.engines import make_tenant_pool
from ..routing.pool import TenantPool
from ..tenant import Placement, Tenant
from ._savepoints import RollbackDriverConnection, Savepoint, Savepoints
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
            raise RollbackModeError("LISTEN never hears anything")
        if connection.autocommit:
            async with connection._execute_mutex:
                savepoint = await connection.savepoints.begin()
            try:
                await super()._prepare_and_execute(operation, parameters)
            except BaseException:
                await savepoint.rollback()
                raise
            await savepoint.commit()
            return
        await super()._prepare_and_execute(operation, parameters)
        connection.note_writing(_READS.match(operation) is None)

    async def _executemany(self, operation: Any, seq_of_parameters: Any) -> Any:
        result = await super()._executemany(operation, seq_of_parameters)
        self._adapt_connection.note_writing(True)
        return result


class NestedConnection(TenantConnection):
    """What one session sees of the connection that all share."""

    __slots__ = ("savepoints",)

    _cursor_cls = NestedCursor

    savepoints: Savepoints

    @classmethod
    def on(cls, root: TenantConnection, savepoints: Savepoints, pool: TenantPool) -> NestedConnection:
        """Make one for a session."""
        made: NestedConnection = cls(root.dbapi, root._connection)
        made.savepoints = savepoints
        made.route = pool.route
        made._execute_mutex = savepoints.mutex
        made._prepared_statement_cache = root._prepared_statement_cache
        made._prepared_statement_name_func = root._prepared_statement_name_func
        return made

    @property
    def may_repeat(self) -> bool:
        """Never: the first statement of a session's transaction is not the first of the test's."""
        return False

    def note_writing(self, has_written: bool) -> None:
        """Remember that the transaction has written."""
        transaction: Any = self._transaction
        if has_written and isinstance(transaction, Savepoint):
            transaction.has_written = True

    async def _start_transaction(self) -> None:
        if self.isolation_level == "autocommit":
            return
        if self.isolation_level is not None:
            raise RollbackModeError(f"isolation level {self.isolation_level} cannot be set for one session")
        hold_transaction(self, await self.savepoints.begin(readonly=bool(self.readonly)))

    def _handle_exception(self, error: Exception) -> Any:
        if sqlstate_of(error) == _IN_TRANSACTION:
            error.add_note(f"in mode rollback every statement is within a transaction; {REMEDY}")
        super()._handle_exception(error)

    async def prepare_again(self, now: float) -> None:
        """Forget the types of the schema, and every statement that is prepared, as of now."""
        cache: Any = self._prepared_statement_cache
        if cache is not None:
            cache.clear()
        await self._connection.reload_schema_state()
        self._invalidate_schema_cache_asof = now


class RollbackPool(TenantPool):
    """Gives every session the same connection."""

    def __init__(self, pinned: Pinned, connector: Connector, tenant: Tenant, placement: Placement) -> None:
        super().__init__(connector, tenant_id=tenant.id, slug=tenant.slug, tier=tenant.tier, placement=placement)
        self._pinned = pinned

    def _do_get(self) -> Record:
        self.route.check_bound()
        return cast("Record", self._create_connection())

    def _invoke_creator(self, rec: ConnectionPoolEntry) -> DBAPIConnection:
        nested = self._pinned.connect(self)
        if self.route.schema_changed_at > nested._invalidate_schema_cache_asof:
            await_(nested.prepare_again(self.route.schema_changed_at))
        return cast("DBAPIConnection", nested)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._pinned.nested.discard(cast("NestedConnection", record.dbapi_connection))
        cast("Record", record).dbapi_connection = None

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        self._pinned.nested.discard(cast("NestedConnection", connection))

    def discard(self, record: Record) -> None:
        """Forget what a session saw of the connection."""
        record.dbapi_connection = None

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
        self.nested: WeakSet[NestedConnection] = WeakSet()
        self._router = router
        self._tenant = tenant
        place = tenant.placement
        assert place is not None  # noqa: S101 - for the type checker: it was created for tests
        self._pool = make_tenant_pool(router._connector(place.server), tenant, place)
        self._record: Record | None = None
        self._savepoints: Savepoints | None = None
        router.use_pool(tenant.id, self._make_pool)

    async def begin(self) -> None:
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
        await self._savepoints.begin_test()

    async def end(self) -> list[str]:
        """Roll the test's transaction back, and return what the test has left open."""
        savepoints, self.nested = self._savepoints, WeakSet()
        if savepoints is None:
            return []
        unfinished = savepoints.unfinished
        await savepoints.end_test()
        if not unfinished:
            return []
        what = f"{unfinished} open transaction{'s' if unfinished > 1 else ''} of tenant {self._tenant.slug!r}"
        return [
            f"{what}: close every session, best by `async with tenancy.session(...)`, and await the tasks that use one"
        ]

    def connect(self, pool: RollbackPool) -> NestedConnection:
        """Return what a session of this test sees of the connection.

        Raises:
            RollbackModeError: no test has this tenant now.
        """
        if self._record is None or self._savepoints is None or not self._savepoints.is_active:
            raise RollbackModeError(f"a session on tenant {pool.slug!r} is opened after the test that it was for")
        nested = NestedConnection.on(cast("TenantConnection", self._record.dbapi_connection), self._savepoints, pool)
        self.nested.add(nested)
        return nested

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
