"""What one process does with its connections to a server that does not answer, or is not the primary any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool.base import _ConnectionRecord

from ..errors import TenancyError
from ..events import EventBus, PrimaryChanged, ServerDown, ServerUp
from ..postgres import connections
from ..postgres.errors import READ_ONLY_SQL_TRANSACTION, describe
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import peer_of
from ..servers.breaker import Breaker
from ..servers.server import CLOSE_SECONDS, Server
from .budget import Budget
from .held import Ending, HeldConnection

logger = logging.getLogger("tenancy_orm.routing")

_MOST_PATIENCE = 30.0
"""The longest time, in seconds, after which a server that is waited for is probed again."""

_LOST: Final = "tenancy_orm_server"
"""The attribute of a driver's error in which the name of the server is, and not the server: errors are pickled."""

_CLOSE_SECONDS = 1.0
"""How often idle connections are closed for a change of the primary, at most."""


def lost_server(error: DBAPIError) -> str | None:
    """Return the server, or replica, to which a tenant's connection was lost by this error; None where none was."""
    return getattr(error.orig, _LOST, None) if error.connection_invalidated else None


class Outage:
    """Watches whether a server answers what is waited for, and asks its breaker.

    A statement may take for ever, and so may a transaction. So silence alone means nothing: it makes the breaker probe
    the server.

    Args:
        server: The server.
        budget: Its budget.
        events: Receives outages.
        endings: Returns what closes each open connection.
        drop_idle: Closes every idle connection.
        spawn: Starts a task in which no tenant is bound.
        in_loop: Lets the event loop call a function with arguments. In any thread.
    """

    def __init__(
        self,
        server: Server,
        budget: Budget[_ConnectionRecord],
        events: EventBus,
        *,
        endings: Callable[[], Iterable[Ending]],
        drop_idle: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
        in_loop: Callable[..., None],
    ) -> None:
        self.answers = 0
        """How many connections were opened, or returned in order: the server has answered as often at least."""
        self._server = server
        self._breaker = server.breaker
        self._budget = budget
        self._events = events
        self._endings = endings
        self._drop_idle = drop_idle
        self._spawn = spawn
        self._in_loop = in_loop
        self._answered = -1
        self._timer: asyncio.TimerHandle | None = None
        self._awake = False  # whether the timer runs with the shortest delay
        self._delay = self._breaker.config.timeout
        self._closed = False
        self._changed_at = float("-inf")
        self._finding: asyncio.Task[None] | None = None
        self._breaker.on_change(self._changed)

    def check(self, tenant: str) -> None:
        """Return where a connection may be used, or opened: the server answers, as far as is known.

        Args:
            tenant: The slug of the tenant that it is for, for the error.

        Raises:
            ServerUnavailableError: the breaker is open.
        """
        if not self._awake:
            self._wake()
        if self._breaker.is_open:
            raise self._breaker.error(tenant=tenant)

    def close(self) -> None:
        """Watch no more."""
        self._closed = self._awake = True
        if self._timer is not None:
            self._timer.cancel()

    # --- a server that does not answer ------------------------------------------------------------------------------

    def _changed(self, breaker: Breaker) -> None:
        if self._closed:
            return
        if breaker.is_open:
            for share, waiter in self._budget.dismiss():
                waiter.set_exception(breaker.error(tenant=share.account.slug))
            # when it answers again, it may be another machine
            self._drop_idle()
            self._events.emit(ServerDown(server=self._server.name, reason=breaker.reason))
        else:
            self._events.emit(ServerUp(server=self._server.name, seconds=time.monotonic() - breaker.opened_at))

    def _wake(self) -> None:
        self._awake = True
        self._delay = self._breaker.config.timeout
        if self._breaker.config.enabled:
            self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._delay, self._look)

    def _look(self) -> None:
        self._timer = None
        budget, breaker, config = self._budget, self._breaker, self._breaker.config
        if budget.open - budget.idle - budget.closing <= 0:
            self._awake = False  # nothing is waited for; the next checkout wakes it
            return
        silent, self._answered = self.answers == self._answered, self.answers
        if silent:
            breaker.suspect()
        if breaker.is_open and config.end_after and time.monotonic() - breaker.opened_at >= config.end_after:
            self._end_all()
        if silent and not breaker.is_open:
            # a long transaction, most likely: look less and less often, until there is another checkout
            self._awake = False
            self._delay = min(2 * self._delay, _MOST_PATIENCE)
        else:
            self._awake = True
            self._delay = config.timeout
        self._schedule()

    def _end_all(self) -> None:
        endings = list(self._endings())
        if not endings:
            return
        logger.warning(
            "server %s has not answered for %g s: %d connections that wait for it are closed",
            self._server.name,
            self._breaker.config.end_after,
            len(endings),
        )
        for ending in endings:
            ending.terminate()

    def lost(self, error: Any) -> None:
        """Note at an error of the driver's that it is about a lost connection to this server."""
        setattr(error, _LOST, self._server.name)

    # --- a server that takes no writes ------------------------------------------------------------------------------

    def is_disconnect(self, usual: Callable[..., bool]) -> Callable[..., bool]:
        """Return a dialect's ``is_disconnect`` that also ends connections to what is not the primary any more.

        Args:
            usual: The dialect's own.
        """

        def is_disconnect(error: Any, connection: Any, cursor: Any) -> bool:
            if usual(error, connection, cursor):
                self.lost(error)
                return True
            if getattr(error, "sqlstate", None) != READ_ONLY_SQL_TRANSACTION:
                return False
            held: HeldConnection | None = getattr(connection, "dbapi_connection", None)
            return held is not None and self.write_refused(held)

        return is_disconnect

    def write_refused(self, connection: HeldConnection) -> bool:
        """Return whether a connection that has refused a write (25006) leads to no primary any more. In any thread.

        The server reports what it is. A tenant's role cannot make it report that it is a standby. It can make its own
        sessions read-only; so that is a reason to close this tenant's connections, and to find out where others lead.
        """
        if connection.is_read_only or self._server.is_replica:
            return False
        is_standby = connection.reported("in_hot_standby") == "on"
        if not is_standby and connection.reported("default_transaction_read_only") != "on":
            return False
        self._in_loop(self._primary_changed if is_standby else self._find_primary, connection.peer)
        return True

    def _primary_changed(self, peer: tuple[str, int]) -> None:
        now = time.monotonic()
        if self._closed or now - self._changed_at < _CLOSE_SECONDS:
            return
        self._changed_at = now
        logger.warning("server %s is read-only at %s:%d: idle connections are closed", self._server.name, *peer)
        self._drop_idle()
        self._events.emit(PrimaryChanged(server=self._server.name))

    def _find_primary(self, peer: tuple[str, int]) -> None:
        if not self._closed and (self._finding is None or self._finding.done()):
            self._finding = self._spawn(self._compare_with_primary(peer))

    async def _compare_with_primary(self, peer: tuple[str, int]) -> None:
        """Close the idle connections unless the administrator's login leads to ``peer`` too."""
        found = None
        try:
            connection = await self._server.connect_as_tenants_do()
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning("the primary of server %s is not found now: %s", self._server.name, describe(exc))
        else:
            found = peer_of(connection)
            await connections.close(connection, timeout=CLOSE_SECONDS)
        if found != peer:
            self._primary_changed(peer)


__all__ = ["Outage", "lost_server"]
