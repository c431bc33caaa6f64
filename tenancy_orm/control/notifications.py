"""Invalidations from the control database: one connection that LISTENs, and is reopened when it is lost.

The registry's triggers NOTIFY the channel ``tenancy`` with ``{"t": tenant id, "k": key id or null, "c": kind}`` when a
transaction commits; ``"s"`` is a subject with other memberships or with revoked credentials, ``"j"`` the id of
a token that was revoked. While the connection is lost, cached entries rely on their TTL alone; once it is back,
everything is looked up again, since notifications were missed.

On the channel ``tenancy_connections`` processes ask each other to close connections of a tenant, and call each other
to look at their leases of a server's connections. One that is missed does no harm: the process that asked does so
again, and every process looks from time to time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from ..errors import ConfigurationError
from ..events import EventBus, ListenerLost, ListenerRestored
from ..postgres import login
from ..postgres.dsn import Dsn
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import reason_of

logger = logging.getLogger("tenancy_orm.listener")

CHANNEL = "tenancy"
CONNECTIONS_CHANNEL = "tenancy_connections"

SCHEMA_CHANGING = "schema_changing"
"""The kind of a ``Change``: a migration of the tenant's schema begins."""
SCHEMA_CHANGED = "schema_changed"
"""The kind of a ``Change``: a migration of the tenant's schema has ended."""

SERVER_CHANGED = "server"
"""The kind of a ``Change``: a server's row was added, changed or removed."""

CREATED = "created"
"""The kind of a ``Change``: a tenant's creation has become complete, at the place where it was begun."""

PAUSED = "paused"
"""The kind of a ``Change``: the tenant's database is being exchanged, and its sessions wait."""

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


@dataclass(frozen=True, slots=True)
class Change:
    """A notification: of a key, a subject or a token where its id is set, else of a tenant; else of anything."""

    tenant_id: UUID | None
    key_id: str | None
    kind: str
    subject: str | None = None
    token_id: str | None = None

    @classmethod
    def parse(cls, payload: str) -> Change:
        """Parse a payload. A malformed one counts as a change of anything, which is always safe."""
        try:
            fields = json.loads(payload)
            tenant_id, key_id, kind = fields["t"], fields["k"], str(fields["c"])
            subject, token_id = fields.get("s"), fields.get("j")
            return cls(
                UUID(tenant_id) if tenant_id else None,
                str(key_id) if key_id else None,
                kind,
                str(subject) if subject else None,
                str(token_id) if token_id else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("a notification on channel %r is malformed; everything is looked up again", CHANNEL)
            return cls(None, None, "malformed")


@dataclass(frozen=True, slots=True)
class ConnectionRequest:
    """A process asks the others to close connections, since PostgreSQL accepts no further one of a tenant from it.

    Args:
        process: The id of the process that asks.
        server: The server's name in the configuration.
        tenant_id: The tenant.
        has_none: Whether the process has no connection of this tenant.
    """

    process: str
    server: str
    tenant_id: UUID
    has_none: bool

    @property
    def payload(self) -> str:
        """What is sent."""
        fields = {"p": self.process, "s": self.server, "t": str(self.tenant_id)}
        return json.dumps({**fields, "n": self.has_none})

    @classmethod
    def parse(cls, payload: str) -> ConnectionRequest | None:
        """Parse a payload; None if it is malformed, and then nothing has to be done."""
        try:
            fields = json.loads(payload)
            return cls(str(fields["p"]), str(fields["s"]), UUID(fields["t"]), bool(fields["n"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.debug("a notification on channel %r is malformed", CONNECTIONS_CHANNEL)
            return None


@dataclass(frozen=True, slots=True)
class LeaseCall:
    """Some processes should look at their leases of a server's connections: to give some back, or to get some.

    Args:
        server: The server's name.
        called: The first twelve digits of the ids of their leases.
    """

    server: str
    called: frozenset[str]

    @property
    def payload(self) -> str:
        """What is sent."""
        return json.dumps({"s": self.server, "l": sorted(self.called)})

    @classmethod
    def parse(cls, payload: str) -> LeaseCall | None:
        """Parse a payload; None if it is something else."""
        try:
            fields = json.loads(payload)
            return cls(str(fields["s"]), frozenset(map(str, fields["l"])))
        except (ValueError, KeyError, TypeError):
            return None


class Listener:
    """Keeps one connection to the control database that LISTENs.

    Args:
        dsn: The control database, reached directly: a pooler in transaction mode drops LISTEN.
        on_change: Called with every change, in the event loop.
        on_request: Called with every request for connections, in the event loop.
        on_call: Called with every call to look at leases, in the event loop.
        on_connected: Called after each LISTEN on a new connection: what was missed before is unknown.
        events: Receives ``ListenerLost`` and ``ListenerRestored``.
        probe_interval: Seconds between probes of a silent connection.
        timeout: Seconds for a connect, and for the answer to a probe.
    """

    def __init__(
        self,
        dsn: Dsn,
        *,
        on_change: Callable[[Change], None],
        on_connected: Callable[[], None],
        events: EventBus,
        on_request: Callable[[ConnectionRequest], None] | None = None,
        on_call: Callable[[LeaseCall], None] | None = None,
        probe_interval: float = 5.0,
        timeout: float = 5.0,
    ) -> None:
        self._dsn = dsn
        self._on_change = on_change
        self._on_request = on_request
        self._on_call = on_call
        self._on_connected = on_connected
        self._events = events
        self._probe_interval = probe_interval
        self._timeout = timeout
        self._task: asyncio.Task[None] | None = None
        self._attempted = asyncio.Event()
        self._lost_at: float | None = None
        self.connected = False
        """Whether the connection is open, as far as is known."""

    def __repr__(self) -> str:
        """Say whether it is connected; the DSN is left out."""
        return f"<Listener {'connected' if self.connected else 'not connected'}>"

    async def open(self) -> None:
        """Start, and wait until the first attempt to connect has succeeded or failed; further attempts follow."""
        if self._task is None:
            self._attempted.clear()
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())
            await self._attempted.wait()

    async def close(self) -> None:
        """Stop, and close the connection."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            reason = await self._connect_and_watch()
            self._report_lost(reason)
            if time.monotonic() - began > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            # jitter, so that many processes do not all reconnect at the same moment
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _connect_and_watch(self) -> str:
        """Listen until the connection is lost, and return the reason."""
        connection: asyncpg.Connection[Any] | None = None
        lost = asyncio.Event()
        try:
            connection = await self._connect(lost)
            return await self._watch(connection, lost)
        except SERVER_FAILURES as exc:
            return reason_of(exc)
        except ConfigurationError as exc:
            return str(exc)
        finally:
            self.connected = False
            if connection is not None:
                # not closed: the other side may not answer
                connection.terminate()

    async def _connect(self, lost: asyncio.Event) -> asyncpg.Connection[Any]:
        connection: asyncpg.Connection[Any] = await login.connect(
            self._dsn,
            purpose="tenancy-listener",
            timeout=min(self._timeout, self._dsn.connect_timeout or self._timeout),
            command_timeout=self._timeout,
        )
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(CHANNEL, self._received)
            if self._on_request is not None:
                await connection.add_listener(CONNECTIONS_CHANNEL, self._requested)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _watch(self, connection: asyncpg.Connection[Any], lost: asyncio.Event) -> str:
        # after LISTEN: notifications of later commits arrive, and everything earlier is looked up again
        self._on_connected()
        self.connected = True
        self._report_restored()
        self._attempted.set()
        while True:
            try:
                async with asyncio.timeout(self._probe_interval):
                    await lost.wait()
                return "terminated"
            except TimeoutError:
                await connection.fetchval("SELECT 1", timeout=self._timeout)

    def _received(self, connection: object, pid: int, channel: str, payload: object) -> None:
        self._on_change(Change.parse(str(payload)))

    def _requested(self, connection: object, pid: int, channel: str, payload: object) -> None:
        call = LeaseCall.parse(str(payload))
        if call is not None:
            if self._on_call is not None:
                self._on_call(call)
            return
        request = ConnectionRequest.parse(str(payload))
        if request is not None and self._on_request is not None:
            self._on_request(request)

    def _report_lost(self, reason: str) -> None:
        self._attempted.set()
        if self._lost_at is not None:
            return
        self._lost_at = time.monotonic()
        logger.warning(
            "the listener for invalidations at %s is lost (%s); the directory relies on its TTL alone",
            self._dsn,
            reason,
        )
        self._events.emit(ListenerLost(reason=reason))

    def _report_restored(self) -> None:
        if self._lost_at is None:
            return
        seconds, self._lost_at = time.monotonic() - self._lost_at, None
        logger.info("the listener for invalidations is back after %.1f s", seconds)
        self._events.emit(ListenerRestored(seconds=seconds))
