"""A tenant's connection: the class that asyncpg instantiates, and the ones that SQLAlchemy wraps it in."""

from __future__ import annotations

import asyncio
import logging
import re
import select
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

import asyncpg
from asyncpg import prepared_stmt
from sqlalchemy.dialects.postgresql.asyncpg import (
    AsyncAdapt_asyncpg_cursor,
    AsyncAdapt_asyncpg_ss_cursor,
    PGExecutionContext_asyncpg,
)
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import PoolProxiedConnection

from ..connections.usage import tag_in, tagged
from ..errors import ConfigurationError, PoolerError, QueryError, TenancyError
from ..loops import HomeLoop
from ..postgres.login import peer_of
from ..postgres.poolers import LISTEN_NEEDS_A_SESSION, is_direct
from ..postgres.quoting import quote_literal
from ..postgres.sqlalchemy_versions import AdaptedConnection, forget_transaction, has_begun, roll_back
from .protocol import BEGIN, Proof, Spawn, TenantProtocol
from .reading import FIX_SNAPSHOT, MODE, SET_MODE, control_refused, controls_transaction, is_plain, mode_not_kept
from .route import TenantRoute

logger = logging.getLogger("tenancy_orm.routing")

# DISCARD ALL without DEALLOCATE ALL: the driver and SQLAlchemy go on to use their prepared statements.
RESET: Final = (
    "CLOSE ALL; RESET ROLE; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; "
    "SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES"
)


# what asyncpg's ``Transaction`` begins with
_BEGIN = re.compile(r"BEGIN(?: ISOLATION LEVEL [A-Z ]+?)?(?P<mode> READ ONLY)?(?P<deferrable> DEFERRABLE)?;")


class DriverConnection(asyncpg.Connection):  # type: ignore[misc]
    """The connection class that asyncpg is given; its ``reset`` cleans as ``DISCARD ALL`` does.

    An application can reach it by ``get_raw_connection``. So it calls ``check_use``, which the connector sets, before
    each operation, except for those that end a transaction.

    Attributes:
        reading (bool): Whether a read-only session uses it.
        follows_server (bool): Whether it must heed a server that becomes read-only, so that another one is found.
        native_mode (str | None): The value of ``default_transaction_read_only`` that it has started with; None where a
            session's settings do not stay with it, as behind a pooler.
    """

    __slots__ = ("_home", "check_use", "follows_server", "native_mode", "reading", "refused", "rolling_back")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._protocol.__class__ = TenantProtocol
        # uvloop's transports look the methods up only here
        self._transport.set_protocol(self._protocol)
        self._home = HomeLoop()
        self.check_use: Callable[[], None] | None = None
        self.rolling_back = False
        self.reading = False
        self.follows_server = False
        self.native_mode: str | None = None
        self.refused: TenancyError | None = None
        """Set where the connection was closed because it has not proved that its database is the tenant's."""

    def prove(self, proof: Proof, spawn: Spawn) -> None:
        """Begin to prove the marker; whatever is done with this connection waits for that, and fails where it fails."""
        self._protocol.prove(proof, spawn)

    @property
    def is_proved(self) -> bool:
        """Whether the marker is proved. No statement has run before."""
        return bool(self._protocol.is_proved)

    async def rename(self, name: str, *, timeout: float) -> None:
        """Set the ``application_name``."""
        await super().execute(f"SET application_name TO {quote_literal(name)}", timeout=timeout)

    def first_statement(self, *, reading: bool) -> str:
        """What a session, read-only or not, most likely sends first on this new connection; empty if it is a query."""
        if not reading:
            return BEGIN
        return SET_MODE["on"] if self.native_mode == "off" else ""

    def get_reset_query(self) -> str:
        """The statements that ``reset`` runs."""
        # the next read then needs no round trip for it
        return f"{RESET}; {SET_MODE['on']}" if self.reading and self.native_mode is not None else RESET

    # --- whether the transactions that PostgreSQL begins by itself are read-only --------------------------------------

    # PostgreSQL reports each change of ``default_transaction_read_only`` (since 14), whoever has made it: a function,
    # ALTER ROLE with a new login, RESET ALL, a transaction that is rolled back. So what is compared is never a guess.

    @property
    def mode(self) -> str | None:
        """The value of ``default_transaction_read_only``, as PostgreSQL has reported it; None where it is closed."""
        protocol = self._protocol
        if protocol is None:
            return None
        # what was sent with the proof is not answered yet, and another session may be the first to use the connection
        mode: str | None = protocol.coming_mode or getattr(protocol.get_settings(), MODE, None)
        return mode

    @property
    def has_other_mode(self) -> bool:
        """Whether the next statement, outside a transaction, would be run with the mode of another session.

        Also where that is not known yet.
        """
        native, protocol = self.native_mode, self._protocol
        if native is None or protocol is None:
            return False
        if self.reading and not protocol.is_proved:
            return True
        return self.mode != ("on" if self.reading else native) and not protocol.is_in_transaction()

    async def set_mode(self) -> None:
        """Give the connection the mode of the session that uses it."""
        if self.follows_server and not self.reading:
            await super().execute(f"RESET {MODE}")
            self.native_mode = self.mode  # the server's own, which an administrator may have changed to fence it
            return
        wanted = "on" if self.reading else self.native_mode
        if wanted is None:
            return
        await self._protocol.wait_until_proved()
        if self.mode != wanted:
            await super().execute(SET_MODE[wanted])
        if self.mode != wanted:
            # what answers is not PostgreSQL itself, so leave nothing behind
            self.native_mode = None
            await super().execute(f"RESET {MODE}")

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Execute one command, or several where there are no ``args``, as in asyncpg."""
        if self.reading or self.has_other_mode:
            begin = None if args else _BEGIN.fullmatch(query)
            if begin is not None and (self.reading or not self.follows_server):
                query = self._begin(begin)
            elif query != RESET:
                await self._enter_mode()
        status: str = await super().execute(query, *args, timeout=timeout)
        return status

    def _begin(self, begin: re.Match[str]) -> str:
        """The statement that begins a transaction in the mode of the session, in no more round trips."""
        end = begin.start("deferrable") if begin["deferrable"] else begin.end() - 1
        if self.reading:
            mode = "" if begin["mode"] else " READ ONLY"
            return f"{begin.string[:end]}{mode}{begin.string[end:]} {FIX_SNAPSHOT};"
        if begin["mode"]:
            return begin.string
        return f"{begin.string[:end]} READ {'ONLY' if self.native_mode == 'on' else 'WRITE'}{begin.string[end:]}"

    async def _get_statement(self, *args: Any, **options: Any) -> Any:
        await self._enter_mode()
        return await super()._get_statement(*args, **options)

    async def _copy_in(self, *args: Any, **options: Any) -> Any:
        await self._enter_mode()
        return await super()._copy_in(*args, **options)

    async def _copy_out(self, *args: Any, **options: Any) -> Any:
        await self._enter_mode()
        return await super()._copy_out(*args, **options)

    async def _enter_mode(self) -> None:
        """Prepare for an operation that begins no transaction.

        Raises:
            ReadOnlyError: outside a transaction nothing would keep the read-only session from writing.
        """
        if self.has_other_mode:
            await self.set_mode()
        self._check_mode()

    def _check_mode(self) -> None:
        if self.reading and self.native_mode is None and not self.is_in_transaction():
            raise mode_not_kept()

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        """Refuse an operation on a closed connection, as asyncpg does before each one, or where ``check_use`` does."""
        try:
            super()._check_open()
        except asyncpg.InterfaceError as exc:
            if self.refused is None:
                raise
            raise self.refused from exc
        if self.check_use is None or self.rolling_back:
            self._home.check()
        else:
            self.check_use()

    async def add_listener(self, channel: str, callback: Any) -> None:
        """Receive notifications, as in asyncpg.

        Raises:
            PoolerError: a pooler is in between, which would let nothing through. Nothing was sent.
        """
        if (self.reading and self.native_mode is None) or not await is_direct(self):
            raise PoolerError(LISTEN_NEEDS_A_SESSION)
        await super().add_listener(channel, callback)

    async def _prepare(self, *args: Any, **options: Any) -> Any:
        statement = await super()._prepare(*args, **options)
        statement.__class__ = PreparedStatement
        return statement

    async def close(self, *, timeout: float | None = None) -> None:
        """Close, as in asyncpg.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self._home.check()
        await super().close(timeout=timeout)

    def terminate(self) -> None:
        """Close the socket at once, as in asyncpg.

        Raises:
            WrongEventLoopError: this is another event loop or thread.
        """
        self._home.check()
        super().terminate()


class PreparedStatement(prepared_stmt.PreparedStatement):  # type: ignore[misc]
    """A prepared statement; each use makes the checks of its connection."""

    __slots__ = ()

    def _check_conn_validity(self, meth_name: str) -> None:
        super()._check_conn_validity(meth_name)
        self._connection._check_open()
        self._connection._check_mode()


ROWS_ONLY = "tenancy_rows_only"
"""An execution option of streamed statements: refuse one that returns no rows, before it is executed."""

# how often ``drain`` lets the event loop run: twice for each message, and for the end of the stream
_TURNS = 6

# What PostgreSQL answers, before it executes a prepared statement, where a type in it has been replaced since: no such
# type (XX000, 42704), no such operator (42883), no cast (42846), not the column's type (42804).
_OTHER_TYPE = frozenset({"XX000", "42704", "42883", "42846", "42804"})


class TenantCursor(AsyncAdapt_asyncpg_cursor):
    """A cursor that repeats a statement once if it was prepared before a change of the schema.

    Only the first statement of a transaction is repeated, in a new transaction: nothing was executed or read before. In
    AUTOCOMMIT only one that PostgreSQL has refused before it executed it.
    """

    __slots__ = ()

    _adapt_connection: TenantConnection

    async def _prepare_and_execute(self, operation: Any, parameters: Any) -> None:
        connection = self._adapt_connection
        if connection.reading:
            await connection.begin_reading(operation, alone=not self.server_side)
        else:
            await connection.leave_reading()
        if not connection.may_repeat:
            await super()._prepare_and_execute(operation, parameters)  # type: ignore[no-untyped-call]
            return
        was_prepared = connection.has_prepared(operation)
        try:
            await super()._prepare_and_execute(operation, parameters)  # type: ignore[no-untyped-call]
            return
        except Exception as exc:
            if not connection.is_outdated(exc, was_prepared):
                raise
            error = exc
        await connection.begin_again(error)
        await super()._prepare_and_execute(operation, parameters)  # type: ignore[no-untyped-call]
        connection.has_repeated()

    async def _executemany(self, operation: Any, seq_of_parameters: Any) -> Any:
        connection = self._adapt_connection
        if connection.reading:
            await connection.begin_reading(operation, alone=False)
        else:
            await connection.leave_reading()
        if not connection.may_repeat:
            return await super()._executemany(operation, seq_of_parameters)  # type: ignore[no-untyped-call]
        try:
            return await super()._executemany(operation, seq_of_parameters)  # type: ignore[no-untyped-call]
        except Exception as exc:
            # asyncpg's own cache of prepared statements does not tell whether it had this one
            if not connection.is_outdated(exc, True):
                raise
            error = exc
        await connection.begin_again(error)
        result = await super()._executemany(operation, seq_of_parameters)  # type: ignore[no-untyped-call]
        connection.has_repeated()
        return result


class _StreamCursor(AsyncAdapt_asyncpg_ss_cursor, TenantCursor):
    """A server-side cursor; each fetch checks the bound tenant and its admission again.

    With ``rows_only``, a statement that returns no rows is refused while it is only prepared: the first fetch executes.
    """

    __slots__ = ("rows_only",)

    rows_only: bool

    def __init__(self, adapt_connection: TenantConnection) -> None:
        super().__init__(adapt_connection)  # type: ignore[no-untyped-call]
        self.rows_only = False

    async def _prepare_and_execute(self, operation: Any, parameters: Any) -> None:
        await super()._prepare_and_execute(operation, parameters)
        if self.rows_only and self.description is None:
            raise QueryError(
                f"tenant {self._adapt_connection.route.slug!r}: the statement returns no rows, so it was not executed; "
                "to let it write, give write=True (in a shell: --write)"
            )

    def fetchone(self) -> Any:
        self._adapt_connection.route.check_bound()
        return super().fetchone()  # type: ignore[no-untyped-call]

    def fetchmany(self, size: int | None = None) -> Any:
        self._adapt_connection.route.check_bound()
        return super().fetchmany(size)  # type: ignore[no-untyped-call]

    def fetchall(self) -> Any:
        self._adapt_connection.route.check_bound()
        return super().fetchall()  # type: ignore[no-untyped-call]


class _NotingCursor(TenantCursor):
    """A cursor in AUTOCOMMIT, of a tenant that is read on replicas: each statement may have committed something."""

    __slots__ = ()

    def execute(self, *args: Any, **options: Any) -> Any:
        try:
            return super().execute(*args, **options)  # type: ignore[no-untyped-call]
        finally:
            self._adapt_connection.route.note_write()

    def executemany(self, *args: Any, **options: Any) -> Any:
        try:
            return super().executemany(*args, **options)  # type: ignore[no-untyped-call]
        finally:
            self._adapt_connection.route.note_write()


class _NotingStreamCursor(_StreamCursor, _NotingCursor):
    """The same, of the server's."""

    __slots__ = ()


class TenantConnection(AdaptedConnection):
    """A tenant's DBAPI connection, as SQLAlchemy uses it.

    ``finalizer`` represents the slot: the code that detaches it closes the connection and frees the slot. ``poller``
    polls the socket. ``name`` is the ``application_name`` with the tag of the process's lease; None where it has none.
    ``reports`` returns the value of a setting of which the server reports every change, in a tenth of the time that
    ``reported`` takes; there must be such a setting.
    """

    _cursor_cls = TenantCursor
    _ss_cursor_cls = _StreamCursor
    _connection: DriverConnection

    __slots__ = ("__weakref__", "alone", "finalizer", "name", "poller", "reports", "route", "stable_snapshot")

    alone: bool  # whether the next statement of a read-only session is sent without a transaction
    stable_snapshot: bool  # whether PostgreSQL's default isolation level keeps the snapshot of the first statement
    name: str | None
    route: TenantRoute
    poller: select.poll
    reports: Callable[[str], str]
    finalizer: weakref.finalize[Any, TenantConnection]

    def cursor(self, server_side: bool = False) -> Any:
        """Return a cursor; refused if another tenant is bound, the admission has ended, or the loop is another."""
        self.route.check_bound()
        cursor: Any = super().cursor(server_side)
        if self.route.on_write is not None and self.isolation_level == "autocommit" and not self._connection.reading:
            cursor.__class__ = _NotingStreamCursor if server_side else _NotingCursor
        cursor._invalidate_schema_cache_asof = self.route.schema_valid_since()
        return cursor

    def commit(self) -> None:
        """Commit; refused like ``cursor``, before anything is sent."""
        self.route.check_bound()
        try:
            super().commit()  # type: ignore[no-untyped-call]
        finally:
            # an error need not mean that nothing was committed
            if self.route.on_write is not None and not self._connection.reading:
                self.route.note_write()

    def rollback(self) -> None:
        """Roll back; refused in another event loop, before anything is sent."""
        driver_connection = self._connection
        if driver_connection.is_closed():
            # PostgreSQL has rolled back already, and the error that ended the connection must not be replaced
            forget_transaction(self)
            return
        driver_connection.rolling_back = True
        try:
            super().rollback()  # type: ignore[no-untyped-call]
        finally:
            driver_connection.rolling_back = False

    # --- read-only sessions -------------------------------------------------------------------------------------------

    def use(self, *, reading: bool) -> None:
        """Begin the use by another session."""
        self._connection.reading = reading
        self.alone = False

    @property
    def reading(self) -> bool:
        """Whether a read-only session uses it."""
        return self._connection.reading

    def has_mode_of(self, *, reading: bool) -> bool:
        """Whether a session, read-only or not, can use it without changing its mode."""
        return (self._connection.mode == "on") == reading

    async def begin_reading(self, operation: str, *, alone: bool) -> None:
        """Prepare for a statement of a read-only session: within a read-only transaction, or alone where that will do.

        A query needs no transaction of its own: PostgreSQL runs it in one that is read-only by the session's default.
        Any other statement gets one that begins with a snapshot, after which PostgreSQL lets nothing make it writable.

        Args:
            operation: The statement.
            alone: Whether it may be sent alone.

        Raises:
            ReadOnlyError: it begins or ends a transaction, which is the session's to do.
        """
        self.alone = False
        if has_begun(self):
            if not is_plain(operation):
                self._refuse_control(operation)
            return
        driver_connection = self._connection
        if (
            alone
            and driver_connection.native_mode is not None
            and self._sees_each_commit
            and not self.route.is_changing
            and not driver_connection.is_in_transaction()
            and is_plain(operation)
        ):
            if driver_connection.has_other_mode:
                await self._set_mode()
            if driver_connection.native_mode is not None:
                self.alone = True
                return
        self._refuse_control(operation)
        if self.isolation_level == "autocommit":
            self.isolation_level = None

    async def leave_reading(self) -> None:
        """Prepare for a statement of a session that may write, if its transaction was ended by a statement of its own.

        Otherwise the connection has the right mode, or the beginning of a transaction sees to that.
        """
        if self._connection.has_other_mode and has_begun(self):
            await self._set_mode()

    @property
    def _sees_each_commit(self) -> bool:
        """Whether each statement has a snapshot of its own in a transaction as well."""
        level = self.isolation_level
        return level == "read_committed" or (level in (None, "autocommit") and not self.stable_snapshot)

    def _refuse_control(self, operation: str) -> None:
        if controls_transaction(operation):
            raise control_refused(self.route.slug)

    async def _set_mode(self) -> None:
        try:
            await self._connection.set_mode()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            self._handle_exception(error)

    async def _start_transaction(self) -> None:
        if self.alone:
            return
        if self.isolation_level == "autocommit":
            if self._connection.has_other_mode:
                await self._set_mode()
            return
        await super()._start_transaction()  # type: ignore[no-untyped-call]

    # --- statements that were prepared before a change of the schema -------------------------------------------------

    @property
    def may_repeat(self) -> bool:
        """Whether the next statement is the first of its transaction."""
        return not has_begun(self) and not self._connection.is_in_transaction()

    def has_prepared(self, operation: str) -> bool:
        """Whether a statement is prepared already."""
        cache: Any = self._prepared_statement_cache  # None where its size is 0
        return cache is not None and operation in cache

    def is_outdated(self, error: Exception, was_prepared: bool) -> bool:
        """Whether the first statement of a transaction may be repeated after this error.

        ``was_prepared`` tells whether it had been prepared for an earlier one.
        """
        cause = error.__cause__
        if self.isolation_level == "autocommit" and not self.alone:
            # with a context it comes from within a procedure, which may have committed
            return isinstance(cause, asyncpg.exceptions.InvalidCachedStatementError) and cause.context is None
        if isinstance(
            cause, asyncpg.exceptions.InvalidCachedStatementError | asyncpg.exceptions.OutdatedSchemaCacheError
        ):
            return True
        # with a context it comes from within a function
        return (
            was_prepared
            and isinstance(cause, asyncpg.PostgresError)
            and cause.sqlstate in _OTHER_TYPE
            and cause.context is None
        )

    async def begin_again(self, error: Exception) -> None:
        """Roll back, and forget what this connection has prepared.

        Raises:
            Exception: ``error``, where the connection cannot be used any more.
        """
        driver_connection = self._connection
        driver_connection.rolling_back = True
        try:
            if has_begun(self):
                await roll_back(self)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            raise error from error.__cause__
        finally:
            driver_connection.rolling_back = False
        await self.prepare_again(time.time())

    def has_repeated(self) -> None:
        """Have this tenant's other connections prepare their statements again: the repetition was of use.

        Where it was not, the error is the application's, and may come with every request: it must not cost the other
        connections what they have prepared.
        """
        logger.info("tenant %s: the schema has changed, so a statement was prepared and sent again", self.route.slug)
        self.route.outdated_before(self._invalidate_schema_cache_asof)

    async def prepare_again(self, now: float) -> None:
        """Forget the types of the schema, and every statement that is prepared, as of now."""
        cache: Any = self._prepared_statement_cache
        if cache is not None:
            # they are dated, but the clock may have been set back since
            cache.clear()
        await self._connection.reload_schema_state()
        self._invalidate_schema_cache_asof = now

    @property
    def ending(self) -> DriverConnection:
        """What closes its socket."""
        return self._connection

    @property
    def is_closed(self) -> bool:
        """Whether its socket is closed, as far as is known."""
        return bool(self._connection.is_closed())

    @property
    def usable(self) -> bool:
        """Whether the connection can be reused, as far as is known: its socket and no transaction are open."""
        driver_connection = self._connection
        # if a BEGIN was refused (no lock available, for example), asyncpg considers the transaction open for ever
        return (
            not driver_connection.is_closed()
            and not driver_connection.is_in_transaction()
            and driver_connection._top_xact is None
        )

    @property
    def is_renamed(self) -> bool:
        """Whether the session has given itself another ``application_name``. PostgreSQL reports each change of it."""
        return self.name is not None and self.reports("application_name") != self.name

    async def tag_again(self, *, timeout: float) -> None:
        """Add the tag of the process's lease to the name that the session has given itself."""
        assert self.name is not None  # noqa: S101 - for the type checker: it is renamed
        reported = self.reports("application_name")
        name = tagged(reported, tag_in(self.name))
        if name != reported:
            await self._connection.rename(name, timeout=timeout)
        self.name = name

    @property
    def is_read_only(self) -> bool:
        """Whether its transaction was asked to be read-only."""
        return bool(self.readonly) or self._connection.reading

    @property
    def peer(self) -> tuple[str, int]:
        """The host and the port that it leads to."""
        return peer_of(self._connection)

    def reported(self, setting: str) -> str | None:
        """The value of a setting of which the server reports every change."""
        return getattr(self._connection._protocol.get_settings(), setting, None)

    @property
    def has_unread_data(self) -> bool:
        """Whether the server has sent data that is not read yet: very likely, that it has ended the connection.

        One system call, without a round trip.
        """
        return bool(self.poller.poll(0))

    async def drain(self) -> None:
        """Let the event loop read what the server has sent: a few turns, since the end of the stream comes last."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
            if self._connection.is_closed() or not self.has_unread_data:
                return


class _CoreConnection(Connection):
    """SQLAlchemy's ``Connection``. Returning or dropping the driver's connection is refused in another event loop."""

    def close(self) -> None:
        self._check_loop()
        super().close()

    def invalidate(self, exception: BaseException | None = None) -> None:
        self._check_loop()
        super().invalidate(exception)

    def detach(self) -> None:
        self._check_loop()
        super().detach()

    def _check_loop(self) -> None:
        pool: Any = self.engine.pool
        pool.route.home.check()


def _is_listened_to(target: Engine | Dialect) -> bool:
    """Whether an engine or a dialect has a listener, of its own or of its class, for any event.

    SQLAlchemy's ``_has_events`` says whether there ever was one: it stays true when the listener is removed. Once
    somebody has listened to the class ``Engine``, it is true for each engine of the process.
    """
    dispatch: Any = target.dispatch
    return any(dispatch._event_descriptors)


_LEVELS = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT")


class TenantEngine(Engine):
    """A tenant's engine; its connections are refused in another event loop."""

    _connection_cls = _CoreConnection

    @property
    def has_listeners(self) -> bool:
        """Whether the application listens to what SQLAlchemy does with the connections of this engine."""
        pool: Any = self.pool.dispatch
        return bool(
            (self._has_events and _is_listened_to(self))
            or (self.dialect._has_events and _is_listened_to(self.dialect))
            or pool.checkout
            or pool.checkin
            or pool.reset
        )

    _variants: dict[tuple[bool, str | None], Engine] | None = None

    def variant(self, *, reading: bool, isolation_level: str | None) -> Engine:
        """Return an engine on the same pool: for read-only sessions, or with another isolation level.

        Raises:
            ConfigurationError: there is no such isolation level.
        """
        if not reading and isolation_level is None:
            return self
        if self._variants is None:
            self._variants = {}
        found = self._variants.get((reading, isolation_level))
        if found is None:
            if isolation_level is not None and isolation_level not in _LEVELS:
                raise ConfigurationError(
                    f"{isolation_level!r} is not an isolation level; they are {', '.join(_LEVELS)}"
                )
            found = self._variants[reading, isolation_level] = _Variant(
                self, reading=reading, isolation_level=isolation_level
            )
        return found


class _TenantOptionEngine(OptionEngine):
    """What ``TenantEngine.execution_options`` returns."""

    _connection_cls = _CoreConnection


TenantEngine._option_cls = _TenantOptionEngine


class VariantConnection(_CoreConnection):
    """A connection of a ``_Variant``."""

    def __init__(self, engine: Engine, *args: Any, **options: Any) -> None:
        super().__init__(engine, *args, **options)
        level = getattr(engine, "isolation_level", None)
        if level is not None:
            try:
                self.execution_options(isolation_level=level)
            except BaseException:
                self.close()
                raise


class _VariantOptionEngine(_TenantOptionEngine):
    """What ``_Variant.execution_options`` returns."""

    _connection_cls = VariantConnection

    @property
    def isolation_level(self) -> str | None:
        level: str | None = getattr(self._proxied, "isolation_level", None)
        return level

    def raw_connection(self) -> PoolProxiedConnection:
        return self._proxied.raw_connection()


class _Variant(OptionEngine):
    """The engine of a tenant, for sessions of one kind."""

    _connection_cls = VariantConnection
    _option_cls = _VariantOptionEngine

    def __init__(self, engine: Engine, *, reading: bool, isolation_level: str | None) -> None:
        super().__init__(engine, {})
        self.reading = reading
        self.isolation_level = isolation_level

    def raw_connection(self) -> PoolProxiedConnection:
        if not self.reading:
            return super().raw_connection()
        pool: Any = self.pool
        connection: PoolProxiedConnection = pool.connect_for_reading()
        return connection


class TenantExecutionContext(PGExecutionContext_asyncpg):
    """Stores for the tenant's pool, not on the dialect, when prepared statements became stale.

    On the shared dialect, a change to one tenant's schema would make all tenants' connections prepare everything again.
    """

    def handle_dbapi_exception(self, e: BaseException) -> None:
        """Store the time of a schema change if PostgreSQL's error is about one."""
        dbapi = self.dialect.loaded_dbapi
        route = self._route
        if route is not None and isinstance(e, dbapi.InvalidCachedStatementError | dbapi.InternalServerError):
            route.outdated_before(time.time())

    def pre_exec(self) -> None:
        """After DDL, prepare again: the cursor was given its time when it was created."""
        route = self._route
        if self.isddl and route is not None:
            route.outdated_before(time.time())
            cursor: Any = self.cursor
            cursor._invalidate_schema_cache_asof = route.schema_changed_at

    def create_server_side_cursor(self) -> Any:
        """Return a server-side cursor, which the execution option ``ROWS_ONLY`` restricts to queries."""
        cursor: Any = super().create_server_side_cursor()  # type: ignore[no-untyped-call]
        if self.execution_options.get(ROWS_ONLY, False):
            cursor.rows_only = True
        return cursor

    @property
    def _route(self) -> TenantRoute | None:
        # of another class while the dialect is being initialised
        return getattr(self.root_connection.engine.pool, "route", None)


__all__ = [
    "RESET",
    "ROWS_ONLY",
    "DriverConnection",
    "TenantConnection",
    "TenantEngine",
    "TenantExecutionContext",
    "VariantConnection",
]
