"""The pool of one tenant's connections for synchronous code, within the budget that asynchronous code uses."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeAlias, cast
from uuid import UUID

import psycopg
from psycopg import errors as pg_errors
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from ..errors import LoginRefusedError, MarkerMismatchError, SecretError, ServerUnavailableError, TenancyError
from ..postgres.errors import TOO_MANY_CONNECTIONS
from ..postgres.login import PEER_KEEPALIVES, check, clear_tracebacks, hosts_to_try, suspect_hosts
from ..postgres.quoting import quote_literal
from ..routing.connection import TenantEngine
from ..routing.connector import Connector, Record
from ..routing.contention import WaitRefusedError
from ..routing.marker import FIND, PROVED, marker_text, mismatch, proof
from ..routing.route import TenantRoute
from ..routing.routed_pool import RoutedPool
from ..tenant import Placement
from .connection import SocketEnding, ThreadConnection
from .hops import Answer, Hops
from .server import ThreadServer

logger = logging.getLogger("tenancy_orm.sync")

_asked = threading.local()  # ``reading``: what kind of session the checkout that begins in this thread is for
Follow: TypeAlias = Callable[[TenantRoute, bool], Coroutine[Any, Any, tuple[TenantEngine, Callable[[], None]] | None]]

_LEAST_SECONDS = 2  # libpq and psycopg wait at least as long for a login
_PROBES = 3


class ThreadPool(RoutedPool):
    """SQLAlchemy's pool for one tenant, of psycopg's connections. They are opened and used in the calling thread.

    Its slots are counted in the event loop: names of methods that run there end in ``_here``.

    Args:
        connector: The connector of the tenant's server.
        server: What its tenants share.
        hops: Puts calls into the event loop.
        tenant_id: The tenant.
        slug: Its slug, for errors and events.
        tier: The name of its tier, which bounds its connections.
        placement: Where its database is.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.ThreadPool"

    def __init__(
        self,
        connector: Connector,
        server: ThreadServer,
        hops: Hops,
        *,
        tenant_id: UUID,
        slug: str,
        tier: str,
        placement: Placement,
    ) -> None:
        super().__init__(
            connector,
            server.dialect,
            home=hops.threads,
            tenant_id=tenant_id,
            slug=slug,
            tier=tier,
            placement=placement,
        )
        self._server = server
        self._hops = hops
        self.follow: Follow | None = None
        """Leases the engine of the database that the tenant has now, in the event loop; see ``Detours.find``."""

    # --- checkout ---------------------------------------------------------------------------------------------------

    def connect_for_reading(self) -> PoolProxiedConnection:
        """Return a connection like ``connect``, for a read-only session."""
        _asked.reading = True  # until ``_do_get`` takes note of it, before anything else
        return self.connect()

    def _do_get(self) -> Record:
        reading: bool = getattr(_asked, "reading", False)
        _asked.reading = False
        record = self._get(reading)
        cast("ThreadConnection", record.dbapi_connection).use(reading=reading)
        return record

    def _get(self, reading: bool) -> Record:
        self.route.check_bound()
        if self.detour:
            if (record := self._follow(reading, look_again=False)) is not None:
                return record
            # a pool that is not retired is in use again after a pause
            self.detour = self.retired
        try:
            return self._get_here(reading)
        except LoginRefusedError as exc:
            # the notification has not come yet, or was missed
            record = self._follow(reading, look_again=True)
            if record is None:
                raise exc
            return record

    def _follow(self, reading: bool, *, look_again: bool) -> Record | None:
        """Return a connection to the database that the tenant has now; None where it has this pool's."""
        if self.follow is None:
            return None
        found = self._hops.run_async(self.follow, self.route, look_again)
        if found is None:
            return None
        engine, release = found
        try:
            pool = engine.pool
            assert isinstance(pool, ThreadPool)  # noqa: S101 - for the type checker: nothing else makes pools here
            return pool._get_here(reading)
        finally:
            self._hops.post(release)

    def _get_here(self, reading: bool) -> Record:
        deadline, timeout = self._deadline()
        first = False
        while True:
            record = self._get_slot(deadline, timeout, first=first, reading=reading)
            if record is not None:
                if cast("ThreadConnection", record.dbapi_connection).is_alive():
                    return record
                self._hops.post(self.discard, record)
                continue
            try:
                return self._create_connection()  # type: ignore[return-value]
            except ServerUnavailableError as exc:
                if exc.sqlstate != TOO_MANY_CONNECTIONS:
                    raise
                if time.monotonic() >= deadline:
                    # by now the budget may have forgotten the refusal, since nobody waits
                    error = partial(self._timeout_error, timeout, refused=True)
                    raise self._hops.run_async(error, unbound=True) from exc
                # other processes may have them: wait as the first in the queue
                first = True

    def _get_slot(self, deadline: float, timeout: float, *, first: bool, reading: bool) -> Record | None:
        """Return an idle connection, or None: a slot is reserved, to open one in."""
        answer: Answer[Record | None] = Answer(self._give_back_here)
        waiting_for: list[str] = []
        since = time.monotonic()
        self._hops.put(answer, partial(self._begin_here, answer, deadline, waiting_for, first=first, reading=reading))
        try:
            record = self._hops.wait(answer, deadline - since)
        except TimeoutError:
            end = partial(self._end_wait_here, answer, timeout)
            try:
                return self._hops.run_async(end, undo=self._give_back_here, unbound=True)
            except BaseException:
                # the loop may not have come to it: nobody waits for the answer any more
                self._hops.post(answer.abandon)
                raise
        except WaitRefusedError as exc:
            error = partial(self._refused_error_here, exc, timeout)
            raise self._hops.run_async(error, unbound=True) from None
        if waiting_for:
            seconds = time.monotonic() - since
            self._hops.post(self.connector.contention.delayed, self.share.account, seconds, *waiting_for)
        return record

    def _begin_here(
        self, answer: Answer[Record | None], deadline: float, waiting_for: list[str], *, first: bool, reading: bool
    ) -> None:
        budget = self.connector.budget
        self.connector.check_wait(self.slug)
        if not first:
            budget.touch(self.share)
        record = self._take(reading=reading)
        if record is not None or budget.reserve(self.share):
            answer.set_result(record)
        elif (refusal := budget.wait(self.share, answer, deadline=deadline, first=first)) is not None:
            raise WaitRefusedError(refusal)
        else:
            waiting_for.append(budget.reason(self.share.account))
            self.connector.contention.begin()

    async def _refused_error_here(self, refused: WaitRefusedError, timeout: float) -> TenancyError:
        return self._refused_error(refused.refusal, timeout)

    async def _end_wait_here(self, answer: Answer[Record | None], timeout: float) -> Record | None:
        if (served := answer.take()) is not None:
            item, error = served
            if isinstance(error, WaitRefusedError):
                raise self._refused_error(error.refusal, timeout)
            if error is not None:
                raise error
            return item
        self.connector.budget.withdraw(self.share, answer)
        raise await self._timeout_error(timeout)

    def _give_back_here(self, record: Record | None) -> None:
        if record is None:
            self.connector.budget.failed(self.share)
        else:
            self._return_here(record, True)

    # --- opening ----------------------------------------------------------------------------------------------------

    def _invoke_creator(self, rec: ConnectionPoolEntry) -> DBAPIConnection:
        """Open a connection in a reserved slot, and verify that it leads to the tenant's own database.

        libpq does not tell why a login was refused. So an asynchronous one tells that, in the same slot, and finds the
        password if it has been rotated, or its key; after that the login is tried once more. It may be rotated again in
        between, so that is done ``_PROBES`` times at most.
        """
        started = time.monotonic()
        try:
            connection = self._open()
        except psycopg.Error as exc:
            # the same error as of an asynchronous login, which did succeed; psycopg's own holds the password
            self._hops.post(self._failed_here)
            raise self.connector.server.unavailable(
                _without_secret(exc), tenant=self.slug, database=self.route.placement.database
            ) from None
        connection.hand_over(self.route, self.connector.server)
        connection.name = self.connector.tagged_name(connection)
        self.connector.watch(connection)
        self._hops.post(self._opened_here, connection.ending, time.monotonic() - started)
        adapted = cast("DBAPIConnection", connection)
        if self._server.on_connect is not None:
            self._server.on_connect(adapted)
        return adapted

    def _open(self, *, probes: int = 0) -> ThreadConnection:
        if not self._server.ready:
            self._probe()
            probes += 1
        lease = self.connector.lease
        try:
            if lease is not None and not lease.is_valid:
                # as after a suspension of the machine: it is renewed in a moment
                self._hops.run_async(self.connector.leased, unbound=True)
            tag = None if lease is None else lease.tag
            connection = self._log_in()
        except pg_errors.ConnectionTimeout as exc:
            self._hops.post(self._timed_out_here)
            raise exc from None
        except (psycopg.Error, SecretError) as exc:
            if probes >= _PROBES:
                if isinstance(exc, SecretError):
                    self._hops.post(self._failed_here)
                raise
            self._probe()
            return self._open(probes=probes + 1)
        except BaseException:
            self._hops.post(self._failed_here)
            raise
        try:
            self._verify(connection)
            self.connector.check_lease(tag)
        except BaseException as exc:
            self._hops.post(self._not_completed_here, connection.ending, exc)
            if isinstance(exc, psycopg.Error):
                raise self.connector.server.unavailable(
                    _without_secret(exc), tenant=self.slug, database=self.route.placement.database
                ) from None
            raise
        return connection

    def _probe(self) -> None:
        self._hops.run_async(
            self.connector.probe,
            self.route,
            undo=lambda _: self._failed_here(),
            unbegun=self._failed_here,
            unbound=True,
        )
        self._server.prepare()

    def _log_in(self) -> ThreadConnection:
        server, placement = self.connector.server, self.route.placement
        dsn = replace(server.traffic.dsn, hosts=hosts_to_try(server.traffic.dsn))
        settings, later = self._server.startup()
        if not server.is_pooled:
            settings = {**settings, "application_name": self.connector.rename(settings["application_name"])}
        check(dsn, user=placement.role, database=placement.database)
        parameters = dsn.libpq_parameters(
            user=placement.role,
            database=placement.database,
            settings=settings,
            keepalives=PEER_KEEPALIVES,
        )
        seconds = max(_LEAST_SECONDS, math.ceil(server.connect_timeout / max(1, len(dsn.hosts))))
        try:
            connection = ThreadConnection.connect(
                **parameters,  # type: ignore[arg-type]
                password=self.connector.open_password(self.route),
                connect_timeout=seconds,
                autocommit=True,
                # a prepared statement that a migration outdates would fail, and a pooler knows none
                prepare_threshold=None,
                context=self._server.adapters,
            )
        except BaseException as exc:
            clear_tracebacks(exc)
            raise
        connection.answer_seconds = server.connect_timeout  # until it has proved the marker
        if later:
            try:
                connection.execute("; ".join(f"SET {name} TO {quote_literal(text)}" for name, text in later.items()))
            except BaseException:
                connection.close()
                raise
        return connection

    def _verify(self, connection: ThreadConnection) -> None:
        expected = marker_text(self.connector.installation, self.tenant_id)
        if connection.execute(proof(expected)).statusmessage != PROVED:
            raise mismatch(expected, self.slug, connection.execute(FIND).fetchone())
        standby = self.connector.server.standby_proof(self.slug)
        if standby is not None and connection.execute(standby.encode()).statusmessage != PROVED:
            raise self.connector.server.no_standby(self.slug)
        connection.answer_seconds = self.connector.server.answer_seconds
        connection.autocommit = False

    def _opened_here(self, ending: SocketEnding, seconds: float) -> None:
        self.connector.opened(self.route, ending, seconds)
        self.connector.server.read_again_if_old()

    def _timed_out_here(self) -> None:
        server = self.connector.server
        server.breaker.suspect()
        if len(hosts := server.traffic.dsn.hosts) > 1:
            suspect_hosts(server.traffic.dsn, *hosts)

    def _failed_here(self) -> None:
        self.connector.release_slot(self.share)

    def _not_completed_here(self, ending: SocketEnding, error: BaseException) -> None:
        self.connector.release_slot(self.share, ending)
        if isinstance(error, MarkerMismatchError):
            self.route.report_incident(error)
        elif isinstance(error, psycopg.Error):
            self.connector.server.breaker.suspect()

    # --- return -----------------------------------------------------------------------------------------------------

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        record = cast("Record", record)
        connection = cast("ThreadConnection | None", record.dbapi_connection)
        if connection is not None:  # otherwise it was invalidated or detached, and the connection has the slot
            self._hops.post(self._return_here, record, connection.clean(full=self.connector.full_reset))

    def _return_here(self, record: Record, usable: bool) -> None:
        if record.dbapi_connection is None:
            return
        if self.retired or not usable:
            self.discard(record)
        else:
            self._return_idle(record)

    # --- closing ----------------------------------------------------------------------------------------------------

    def dispose(self) -> None:
        """Retire this pool.

        Raises:
            WrongEventLoopError: this is the event loop's thread, or a forked process.
        """
        self._hops.run(self.retire)

    def recreate(self) -> Self:
        """Return a new pool for the same tenant; ``Engine.dispose`` calls this."""
        return self._hops.run(self._recreate_here)

    def _recreate_here(self) -> Self:
        route = self.route
        return type(self)(
            self.connector,
            self._server,
            self._hops,
            tenant_id=route.tenant_id,
            slug=route.slug,
            tier=route.tier,
            placement=route.placement,
        )


def _without_secret(error: psycopg.Error) -> Exception:
    """An error with psycopg's message; its own has the parameters of the login in ``pgconn``."""
    if isinstance(error, pg_errors.ConnectionTimeout):
        return TimeoutError()
    return ConnectionError(str(error).strip())


__all__ = ["ThreadPool"]
