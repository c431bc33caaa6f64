"""What a process does when PostgreSQL accepts no further connection of a tenant (53300).

The connections may be idle in another process: a role's CONNECTION LIMIT is for all processes together. So a process
that is refused asks the others, over the control database, to close some; and it tries again after a pause, with one
connection of the tenant at a time. Waiting requests keep their order.

No process can starve another: one that has no connection of the tenant, and finds only busy ones elsewhere, gets the
next one that is returned there. One that has some waits for its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool.base import _ConnectionRecord

from ..connections.lease import Lease
from ..control.notifications import ConnectionRequest
from ..errors import ConnectionLimitError, ServerUnavailableError, TenancyError
from ..postgres import connections
from ..postgres.errors import TOO_MANY_CONNECTIONS
from ..postgres.failures import SERVER_FAILURES
from ..servers.server import Server
from .budget import Account, Budget
from .route import TenantRoute

logger = logging.getLogger("tenancy_orm.routing")

ASK_SECONDS = 0.1
"""How often one tenant's connections are asked for, at most."""

PROMISE_SECONDS = 1.0
"""For how long the next connection that is returned is another process's."""

HOLD_SECONDS = 0.25
"""For how long a process does not open a connection in the place of one that it gave up: longer than any pause of the
process that asked for it."""

REMEMBER_SECONDS = 60.0
"""For how long a tenant counts as refused recently."""

_FIRST_PAUSE, _LAST_PAUSE, _LAST_PAUSE_WITH_SOME = 0.005, 0.1, 0.5
_LIMIT_SECONDS = 2.0  # how long finding the limit may take
_BELIEVED_SECONDS = {"role": 30.0, "database": 30.0, "server": 2.0}

Ask = Callable[[Sequence[ConnectionRequest]], Awaitable[None]]

# Superusers' and other reserved connections are not for tenants. Parallel workers do not count.
_LIMITS = """
SELECT r.rolconnlimit AS role_limit, d.datconnlimit AS database_limit,
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0) AS server_limit,
       count(*) FILTER (WHERE a.usesysid = r.oid) AS of_role,
       count(*) FILTER (WHERE a.datid = d.oid) AS of_database,
       count(*) FILTER (WHERE a.pid <> pg_backend_pid()) AS of_server
FROM pg_catalog.pg_roles AS r, pg_catalog.pg_database AS d, pg_catalog.pg_stat_activity AS a
WHERE r.rolname = $1 AND d.datname = $2
  AND a.datid IS NOT NULL AND a.backend_type IS DISTINCT FROM 'parallel worker'
GROUP BY r.oid, r.rolconnlimit, d.oid, d.datconnlimit
"""


class Limit:
    """A limit that PostgreSQL applies: "role", "database" or "server", and the number if it is known."""

    __slots__ = ("believed_until", "kind", "number")

    def __init__(self, kind: str, number: int | None) -> None:
        self.kind = kind
        self.number = number
        self.believed_until = time.monotonic() + _BELIEVED_SECONDS[kind]

    @property
    def is_believed(self) -> bool:
        """Whether it need not be read again yet."""
        return time.monotonic() < self.believed_until


class Shortage:
    """What is known of one tenant that was refused."""

    __slots__ = ("asked_at", "limit", "pause", "refusals", "refused_at", "timer")

    def __init__(self) -> None:
        self.refused_at = self.asked_at = float("-inf")
        self.pause = _FIRST_PAUSE
        self.refusals = 0  # since a connection was last accepted
        self.limit: Limit | None = None
        self.timer: asyncio.TimerHandle | None = None


class Shortages:
    """The tenants of one server that PostgreSQL refuses, or has refused lately.

    Args:
        server: The server.
        budget: Its budget.
        spawn: Starts a task in which no tenant is bound.
        ask: Sends requests to the other processes; None if there is no way to.
        discard: Closes a connection that counts as in use.
        lease: This process's part of the connections that all processes may have; None: there are no others.
    """

    def __init__(
        self,
        server: Server,
        budget: Budget[_ConnectionRecord],
        *,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
        ask: Ask | None,
        discard: Callable[[_ConnectionRecord], None],
        lease: Lease | None = None,
    ) -> None:
        self._server = server
        self._budget = budget
        self._spawn = spawn
        self._ask = ask
        self._discard = discard
        self._lease = lease
        self._process = uuid4().hex
        self._by_tenant: dict[UUID, Shortage] = {}
        self._pending: dict[UUID, TenantRoute] = {}
        self._sender: asyncio.Task[None] | None = None
        self._finding: dict[UUID, asyncio.Task[None]] = {}
        self._one_login = asyncio.Lock()  # for ``_read_limit``
        self._failure_logged = False

    # --- this process is refused ------------------------------------------------------------------------------------

    def refused(self, route: TenantRoute) -> None:
        """Ask the other processes for connections, and let one waiter try again after a pause.

        The slot of the connection that was refused is free already.
        """
        shortage = self._by_tenant.setdefault(route.tenant_id, Shortage())
        shortage.refused_at = time.monotonic()
        shortage.refusals += 1
        account = route.share.account
        last = _LAST_PAUSE_WITH_SOME if account.open else _LAST_PAUSE
        self._retry_later(account, shortage, min(shortage.pause, last) * random.uniform(0.5, 1.0))
        shortage.pause = min(2 * shortage.pause, _LAST_PAUSE_WITH_SOME)
        self._request(route, shortage)
        if shortage.refusals > 1:
            self._find_limit(route, shortage)

    def accepted(self, route: TenantRoute) -> None:
        """Let all waiters of a tenant go on, since PostgreSQL accepts its connections again."""
        shortage = self._by_tenant.get(route.tenant_id)
        if shortage is not None:
            shortage.refusals = 0
            shortage.pause = _FIRST_PAUSE
        self._budget.accepted(route.share.account)

    def recent(self) -> set[Account]:
        """The accounts of the tenants that were refused lately; what is known of the others is forgotten."""
        before = time.monotonic() - REMEMBER_SECONDS
        for tenant_id, shortage in list(self._by_tenant.items()):
            if shortage.refused_at < before and shortage.timer is None:
                del self._by_tenant[tenant_id]
        return {account for tenant_id in self._by_tenant if (account := self._budget.account(tenant_id)) is not None}

    def close(self) -> None:
        """Stop trying again."""
        for shortage in self._by_tenant.values():
            if shortage.timer is not None:
                shortage.timer.cancel()

    def _retry_later(self, account: Account, shortage: Shortage, pause: float) -> None:
        if shortage.timer is not None:
            shortage.timer.cancel()
        shortage.timer = asyncio.get_running_loop().call_later(pause, self._retry, account, shortage)

    def _retry(self, account: Account, shortage: Shortage) -> None:
        shortage.timer = None
        self._budget.retry(account)

    def _request(self, route: TenantRoute, shortage: Shortage) -> None:
        now = time.monotonic()
        if self._ask is None or now - shortage.asked_at < ASK_SECONDS:
            return
        shortage.asked_at = now
        self._pending[route.tenant_id] = route
        if self._sender is None or self._sender.done():
            self._sender = self._spawn(self._send(self._ask))

    async def _send(self, ask: Ask) -> None:
        """Send the pending requests; those that come up while these are sent go together in the next transaction."""
        while self._pending:
            pending, self._pending = self._pending, {}
            try:
                await ask([self._request_of(route) for route in pending.values()])
            except (TenancyError, DBAPIError, *SERVER_FAILURES) as exc:
                if not self._failure_logged:
                    logger.debug("other processes cannot be asked for connections: %s", type(exc).__name__)
                self._failure_logged = True
            else:
                self._failure_logged = False

    def _request_of(self, route: TenantRoute) -> ConnectionRequest:
        return ConnectionRequest(
            process=self._process,
            server=self._server.name,
            tenant_id=route.tenant_id,
            has_none=not route.share.account.open,
        )

    # --- another process is refused ---------------------------------------------------------------------------------

    def give_up(self, request: ConnectionRequest) -> None:
        """Close connections of a tenant for the process that asks, or promise it one."""
        if request.process == self._process:
            return
        account = self._budget.account(request.tenant_id)
        taken = [] if account is None else self._budget.take_for_others(account, keep=0 if request.has_none else 1)
        for _, record in taken:
            self._discard(record)
        if not taken and account is not None and account.open and request.has_none:
            account.promised = time.monotonic() + PROMISE_SECONDS

    def gave_up(self, route: TenantRoute) -> None:
        """Leave the slot of a connection that was promised, and is being closed, to the other process for a while."""
        shortage = self._by_tenant.setdefault(route.tenant_id, Shortage())
        shortage.refused_at = time.monotonic()
        self._retry_later(route.share.account, shortage, HOLD_SECONDS)

    # --- which limit it is ------------------------------------------------------------------------------------------

    async def error(self, route: TenantRoute) -> ConnectionLimitError:
        """Return the error for a request that got no connection in time, with the limit that was met."""
        shortage = self._by_tenant.setdefault(route.tenant_id, Shortage())
        if shortage.limit is None:
            await asyncio.wait([self._find_limit(route, shortage)], timeout=_LIMIT_SECONDS)
        limit = shortage.limit
        return ConnectionLimitError(
            server=self._server.name,
            tenant=route.slug,
            limit=None if limit is None else limit.number,
            setting=self._setting(route, None if limit is None else limit.kind),
        )

    def _setting(self, route: TenantRoute, kind: str | None) -> str:
        if kind == "role":
            return f"connection_limit of tier {route.tier!r}"
        if kind == "database":
            return "the CONNECTION LIMIT of its database"
        if kind == "server":
            return "max_connections of the PostgreSQL server, or lower its cap (tenancy servers update)"
        return f"connection_limit of tier {route.tier!r}, or max_connections of the PostgreSQL server"

    def _find_limit(self, route: TenantRoute, shortage: Shortage) -> asyncio.Task[None]:
        task = self._finding.get(route.tenant_id)
        if task is None:
            task = self._finding[route.tenant_id] = self._spawn(self._read_limit(route, shortage))
            task.add_done_callback(lambda _: self._finding.pop(route.tenant_id, None))
        return task

    async def _read_limit(self, route: TenantRoute, shortage: Shortage) -> None:
        if shortage.limit is not None and shortage.limit.is_believed:
            return
        try:
            async with self._one_login, asyncio.timeout(_LIMIT_SECONDS):
                found = await self._met_limit(route)
        except ServerUnavailableError as exc:
            # tenants' roles have less than the administrator, which has no limit of its own
            found = Limit("server", None) if exc.sqlstate == TOO_MANY_CONNECTIONS else None
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.debug("which limit was met on server %s is not known: %s", self._server.name, type(exc).__name__)
            found = None
        if found is None:
            return  # the connections have ended by now: what was found before stays
        shortage.limit = found
        if found.kind == "server" and not self._budget.make_room() and self._lease is not None:
            # others than the processes have more connections than when they were counted
            self._lease.recount()

    async def _met_limit(self, route: TenantRoute) -> Limit | None:
        connection = await self._server.connect_admin(timeout=_LIMIT_SECONDS)
        try:
            row = await connection.fetchrow(_LIMITS, route.placement.role, route.placement.database)
        finally:
            await connections.close(connection, timeout=_LIMIT_SECONDS)
        return None if row is None else _met(row)


def _met(row: asyncpg.Record) -> Limit | None:
    for kind in ("role", "database", "server"):
        limit = int(row[f"{kind}_limit"])
        if 0 <= limit <= row[f"of_{kind}"]:
            return Limit(kind, limit)
    return None


__all__ = ["Ask", "Shortages"]
