"""A tenant's connection of psycopg's, and what closes its socket."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import weakref
from collections.abc import Callable, Generator
from threading import get_ident
from typing import Any

import psycopg
from psycopg import generators
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn

from ..connections.usage import tag_in, tagged
from ..errors import PoolerError
from ..forks import leave_socket
from ..postgres.poolers import LISTEN_NEEDS_A_SESSION
from ..postgres.quoting import quote_literal
from ..routing.connection import RESET
from ..routing.reading import FIX_SNAPSHOT, MODE, SET_MODE, control_refused, controls_transaction, is_plain
from ..routing.route import TenantRoute
from ..servers.server import Server

_READS = 6  # how often ``is_alive`` reads what the server has sent: its last message and the end come separately


class SocketEnding:
    """Closes the socket of a connection of psycopg's, in the event loop.

    Args:
        pgconn: libpq's connection.
    """

    __slots__ = ("_pgconn",)

    def __init__(self, pgconn: PGconn) -> None:
        self._pgconn = pgconn

    async def close(self, *, timeout: float) -> None:
        """End the session, and wait until the server has ended it. No thread may be using the connection.

        libpq closes its socket right after its last message. This waits on another descriptor of the same socket, since
        a slot is free only when the server has one connection less.
        """
        peer = self._duplicate()
        self._pgconn.finish()
        if peer is None:
            return
        with peer:
            peer.setblocking(False)
            async with asyncio.timeout(timeout):
                while await asyncio.get_running_loop().sock_recv(peer, 65_536):
                    pass

    def terminate(self) -> None:
        """Cut the socket, also while another thread uses it: that one gets an error, and libpq's memory stays."""
        peer = self._duplicate()
        if peer is not None:
            with peer:
                try:
                    peer.shutdown(socket.SHUT_RDWR)
                except OSError:
                    return  # the other side has closed it already

    def _duplicate(self) -> socket.socket | None:
        try:
            if self._pgconn.status != ConnStatus.OK:
                return None
            return socket.socket(fileno=os.dup(self._pgconn.socket))
        except (psycopg.Error, OSError):
            return None  # the thread that uses it has closed it in between


class _ModeCursor:
    """What the cursors of a ``ThreadConnection`` do before a statement of a read-only session."""

    _conn: ThreadConnection

    def _start_query(self, query: Any = None) -> Any:
        if self._conn.reading:
            self._conn.begin_reading(query, alone=isinstance(self, psycopg.Cursor))
        yield from super()._start_query(query)  # type: ignore[misc]

    def _execute_send(self, query: Any, *, force_extended: bool = False, **options: Any) -> None:
        # of several statements in one text, a later one might end the transaction
        super()._execute_send(query, force_extended=force_extended or self._conn.reading, **options)  # type: ignore[misc]


class _ThreadCursor(_ModeCursor, psycopg.Cursor[Any]):  # type: ignore[misc]
    """A cursor of a ``ThreadConnection``."""

    __slots__ = ()


class _ThreadServerCursor(_ModeCursor, psycopg.ServerCursor[Any]):  # type: ignore[misc]
    """A server-side cursor of a ``ThreadConnection``."""

    __slots__ = ()


class ThreadConnection(psycopg.Connection[Any]):
    """A tenant's connection.

    Each operation checks the bound tenant and its admission, also one that an application starts on the connection
    itself. ``finalizer`` represents the slot: the code that detaches it closes the connection and frees the slot.
    """

    route: TenantRoute
    finalizer: weakref.finalize[Any, Any]
    reading: bool = False
    """Whether a read-only session uses it."""
    native_mode: str | None = None
    """The mode that it has started with; None where a session's settings do not stay with it."""
    follows_server: bool = False
    """Whether it must heed a server that becomes read-only, so that another one is found."""
    name: str | None = None
    """The ``application_name`` with the tag of the process's lease; None where it has none."""
    _alone: bool = False
    _stable_snapshot: bool = False
    answer_seconds: float | None = None
    """How long to wait for the answer to a statement; None is for ever."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # the thread in which the pool itself uses it, or a transaction is being ended; in any other one a tenant's code
        # may use it at the same time
        self._ours: int | None = get_ident()
        self._poller = select.poll()
        self._poller.register(self.pgconn.socket, select.POLLIN)
        self.ending = SocketEnding(self.pgconn)
        self.cursor_factory = _ThreadCursor
        self.server_cursor_factory = _ThreadServerCursor
        leave_socket(self, _descriptor)

    def hand_over(self, route: TenantRoute, server: Server) -> None:
        """Let the tenant's code use it from now on."""
        self.route = route
        # a pooler gives each transaction another server connection, so a session's settings do not stay with it
        self.native_mode = None if server.is_pooled else self.mode
        self.follows_server = server.traffic.judges_hosts
        self._stable_snapshot = server.has_stable_snapshots
        self._ours = None

    # --- read-only sessions: see ``DriverConnection`` and ``TenantConnection``, which do the same ---------------------

    def use(self, *, reading: bool) -> None:
        """Begin the use by another session."""
        self.reading = reading
        self._alone = False

    @property
    def mode(self) -> str | None:
        """The value of ``default_transaction_read_only``, as PostgreSQL has reported it."""
        mode = self.pgconn.parameter_status(MODE.encode())
        return None if mode is None else mode.decode()

    def has_mode_of(self, *, reading: bool) -> bool:
        """Whether a session, read-only or not, can use it without changing its mode."""
        return self.is_closed or (self.mode == "on") == reading

    @property
    def _has_other_mode(self) -> bool:
        native = self.native_mode
        return native is not None and self.mode != ("on" if self.reading else native)

    def begin_reading(self, query: Any, *, alone: bool) -> None:
        """Prepare for a statement of a read-only session: within a read-only transaction, or alone where that will do.

        Raises:
            ReadOnlyError: it begins or ends a transaction, which is the session's to do.
        """
        if isinstance(query, bytes):
            query = query.decode(errors="replace")
        elif query is not None and not isinstance(query, str):
            query = query.as_string(self)
        plain = query is not None and is_plain(query)
        self._alone = (
            alone
            and plain
            and self.native_mode is not None
            and self._pipeline is None
            and self._sees_each_commit
            and self.pgconn.transaction_status == TransactionStatus.IDLE
        )
        if query is not None and not plain and controls_transaction(query):
            raise control_refused(self.route.slug)

    @property
    def _sees_each_commit(self) -> bool:
        level = self.isolation_level
        return level == psycopg.IsolationLevel.READ_COMMITTED or (level is None and not self._stable_snapshot)

    def _start_query(self) -> Any:
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            return
        if self.follows_server and not self.reading and self._has_other_mode:
            yield from self._set_mode()
        if self._alone or (self._autocommit and not self.reading):
            if self._has_other_mode:
                yield from self._set_mode()
            if not self.reading or self.native_mode is not None:
                return
        if not self.reading or self._pipeline is not None:
            yield from self._exec_command(self._get_tx_start_command())
            if self.reading:
                yield from self._exec_command(FIX_SNAPSHOT.encode())
            return
        self.pgconn.send_query(self._get_tx_start_command() + f"; {FIX_SNAPSHOT}".encode())
        for result in (yield from generators.execute(self.pgconn)):
            if result.status == ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(result, encoding=self.pgconn._encoding)

    def _exec_command(self, command: Any, *args: Any, **options: Any) -> Any:
        # ``transaction`` and ``tpc_begin`` begin a transaction without ``_start_query``
        if (
            self.follows_server
            and not self.reading
            and isinstance(command, bytes)
            and command.startswith(b"BEGIN")
            and self._has_other_mode
        ):
            yield from self._set_mode()
        return (yield from super()._exec_command(command, *args, **options))

    def _set_mode(self) -> Any:
        if self.follows_server and not self.reading:
            yield from self._exec_command(f"RESET {MODE}".encode())
            self.native_mode = self.mode  # the server's own, which an administrator may have changed to fence it
            return
        wanted = "on" if self.reading else self.native_mode
        assert wanted is not None  # noqa: S101 - for the type checker: otherwise there is no other mode
        yield from self._exec_command(SET_MODE[wanted].encode())
        if self.mode != wanted:
            # what answers is not PostgreSQL itself, so leave nothing behind
            self.native_mode = None
            yield from self._exec_command(f"RESET {MODE}".encode())

    def _get_tx_start_command(self) -> bytes:
        command = super()._get_tx_start_command()
        if self.reading:
            if self.read_only is None:
                command += b" READ ONLY"
            return command.replace(b"READ WRITE", b"READ ONLY")
        if self.read_only is None and self._has_other_mode:
            if self.follows_server:
                return command  # a primary that was fenced would heed READ WRITE
            command += b" READ ONLY" if self.native_mode == "on" else b" READ WRITE"
        return command

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """Wait for the server, as in psycopg: every operation comes by here.

        Raises:
            CrossTenantError, AdmissionEndedError, TenantUnavailableError, WrongEventLoopError: it may not be used here
                and now. Nothing was sent.
            psycopg.OperationalError: there was no answer within ``answer_seconds``. The connection is closed.
        """
        if self._ours != get_ident():
            self.route.check_bound()
            if self.route.on_write is not None and not self.reading:
                return self._wait_and_note(gen, *args, **options)
        return self._wait(gen, *args, **options)

    def _wait_and_note(self, gen: Any, *args: Any, **options: Any) -> Any:
        """Wait, and note that something may have been committed where no transaction is open after that."""
        try:
            return self._wait(gen, *args, **options)
        finally:
            if self.pgconn.transaction_status not in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                self.route.note_write()

    def _wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        if self.answer_seconds is None or "timeout" in options:  # ``notifies`` has one of its own
            return super().wait(gen, *args, **options)
        try:
            return super().wait(gen, *args, **{**options, "timeout": self.answer_seconds})
        except psycopg.errors._WaitTimeout:
            # nobody reads its answer any more
            self.pgconn.finish()
            raise psycopg.OperationalError(f"no answer within {self.answer_seconds:g} seconds") from None

    def notifies(self, **options: Any) -> Generator[psycopg.Notify, None, None]:
        """Receive notifications, as in psycopg.

        Raises:
            PoolerError: a pooler is in between, which would let nothing through.
        """
        backend = self.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
        if backend is None or backend[0] != self.info.backend_pid:
            raise PoolerError(LISTEN_NEEDS_A_SESSION)
        return super().notifies(**options)

    def rollback(self) -> None:
        """Roll back, whichever tenant is bound; refused in the event loop's thread and in a forked process."""
        if self.closed:
            # PostgreSQL has rolled back already, and the error that ended the connection must not be replaced
            return
        self.route.home.check()
        self._unchecked(super().rollback)

    # SQLAlchemy sets these back when a connection is returned, whoever is bound by then. They send nothing.

    def set_autocommit(self, value: bool) -> None:
        """Set ``autocommit``, whichever tenant is bound."""
        self._unchecked(super().set_autocommit, value)

    def set_isolation_level(self, value: psycopg.IsolationLevel | None) -> None:
        """Set ``isolation_level``, whichever tenant is bound."""
        self._unchecked(super().set_isolation_level, value)

    def set_read_only(self, value: bool | None) -> None:
        """Set ``read_only``, whichever tenant is bound."""
        self._unchecked(super().set_read_only, value)

    def set_deferrable(self, value: bool | None) -> None:
        """Set ``deferrable``, whichever tenant is bound."""
        self._unchecked(super().set_deferrable, value)

    def clean(self, *, full: bool) -> bool:
        """Prepare it for its next use, and return whether there can be one.

        Args:
            full: Whether to discard what the session has set, as ``DISCARD ALL`` does.
        """
        if not self.usable:
            return False
        try:
            if self.isolation_level or self.read_only is not None or self.deferrable is not None:
                self.isolation_level = self.read_only = self.deferrable = None
            if full:
                self.autocommit = True
                self._reset()
            if self.name is not None and self.reported("application_name") != self.name:
                self.autocommit = True
                self._tag_again(self.name)
            if self.autocommit:
                self.autocommit = False
        except psycopg.Error:
            return False
        return True

    def _reset(self) -> None:
        # the next read then needs no round trip for its mode
        reset = f"{RESET}; {SET_MODE['on']}" if self.reading and self.native_mode is not None else RESET
        self._clean_by(reset)

    def _tag_again(self, former: str) -> None:
        """Add the tag of the process's lease to the name that the session has given itself: or it would be nobody's."""
        reported = self.reported("application_name") or ""
        name = tagged(reported, tag_in(former))
        if name != reported:
            self._clean_by(f"SET application_name TO {quote_literal(name)}")
        self.name = name

    def _clean_by(self, statement: str) -> None:
        native, self.native_mode, self.reading = self.native_mode, None, False
        try:
            self._unchecked(self.execute, statement)
        finally:
            self.native_mode = native

    def _unchecked(self, call: Callable[..., object], *args: object) -> None:
        before, self._ours = self._ours, get_ident()
        try:
            call(*args)
        finally:
            self._ours = before

    @property
    def is_closed(self) -> bool:
        """Whether its socket is closed, as far as is known."""
        return bool(self.closed)

    @property
    def usable(self) -> bool:
        """Whether it can be reused, as far as is known: its socket and no transaction are open."""
        return self.pgconn.transaction_status == TransactionStatus.IDLE and self._pipeline is None

    @property
    def is_read_only(self) -> bool:
        """Whether its transaction was asked to be read-only."""
        return bool(self.read_only) or self.reading

    @property
    def peer(self) -> tuple[str, int]:
        """The host and the port that it leads to."""
        return (self.pgconn.host or b"").decode(), int(self.pgconn.port or 0)

    def reported(self, setting: str) -> str | None:
        """The value of a setting of which the server reports every change."""
        value = self.pgconn.parameter_status(setting.encode())
        return None if value is None else value.decode()

    def is_alive(self) -> bool:
        """Whether the server has not ended it while it was idle; reads what it has sent, without a round trip."""
        if not self._poller.poll(0):
            return self.usable
        severities: list[str | None] = []

        def note(message: psycopg.errors.Diagnostic) -> None:
            severities.append(message.severity_nonlocalized or message.severity)

        # libpq takes the server's last message for a notice where it is read before the end of the stream
        self.add_notice_handler(note)
        try:
            for _ in range(_READS):
                self.pgconn.consume_input()
                self.pgconn.is_busy()  # has libpq parse what it has read
                if not self._poller.poll(0):
                    break
        except psycopg.Error:
            return False
        finally:
            self.remove_notice_handler(note)
        return self.usable and not {"FATAL", "PANIC"}.intersection(severities)

    def __del__(self, *_: Any) -> None:
        """Do nothing: ``finalizer`` closes it."""


def _descriptor(connection: ThreadConnection) -> int:
    return connection.pgconn.socket if connection.pgconn.status == ConnStatus.OK else -1


__all__ = ["SocketEnding", "ThreadConnection"]
