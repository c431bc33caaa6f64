"""A tenant's connection of psycopg's, and what closes its socket."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any

import psycopg
from psycopg.pq import ConnStatus, TransactionStatus
from psycopg.pq.abc import PGconn

from ..routing.connection import RESET
from ..routing.route import TenantRoute

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


class ThreadConnection(psycopg.Connection[Any]):
    """A tenant's connection.

    Each operation checks the bound tenant and its admission, also one that an application starts on the connection
    itself. ``finalizer`` represents the slot: the code that detaches it closes the connection and frees the slot.
    """

    route: TenantRoute
    finalizer: weakref.finalize[Any, Any]
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

    def hand_over(self, route: TenantRoute) -> None:
        """Let the tenant's code use it from now on."""
        self.route = route
        self._ours = None

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """Wait for the server, as in psycopg: every operation comes by here.

        Raises:
            CrossTenantError, AdmissionEndedError, TenantUnavailableError, WrongEventLoopError: it may not be used here
                and now. Nothing was sent.
            psycopg.OperationalError: there was no answer within ``answer_seconds``. The connection is closed.
        """
        if self._ours != get_ident():
            self.route.check_bound()
        if self.answer_seconds is None or "timeout" in options:  # ``notifies`` has one of its own
            return super().wait(gen, *args, **options)
        try:
            return super().wait(gen, *args, **{**options, "timeout": self.answer_seconds})
        except psycopg.errors._WaitTimeout:
            # nobody reads its answer any more
            self.pgconn.finish()
            raise psycopg.OperationalError(f"no answer within {self.answer_seconds:g} seconds") from None

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
                self._unchecked(self.execute, RESET)
            if self.autocommit:
                self.autocommit = False
        except psycopg.Error:
            return False
        return True

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


__all__ = ["SocketEnding", "ThreadConnection"]
