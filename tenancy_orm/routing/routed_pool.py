"""What the pools of a tenant's connections share, whichever driver opens them: the slots of its server's budget."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any, Self, cast
from uuid import UUID

from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.pool import Pool, PoolProxiedConnection

from ..deadlines import current_deadline
from ..errors import TenancyError
from ..loops import Home
from ..tenant import Placement
from .budget import Share
from .connector import Connector, Record
from .held import HeldConnection
from .queue import Refusal
from .route import TenantRoute


class RoutedPool(Pool):
    """A pool of one tenant's connections. It has no plain password, only the sealed one in ``placement``.

    Its slots are counted in the event loop that ``connector`` belongs to: what is not said to run elsewhere runs there.

    Args:
        connector: The connector of the tenant's server.
        dialect: The dialect of the driver.
        home: Where the connections may be used.
        tenant_id: The tenant.
        slug: Its slug, for errors and events.
        tier: The name of its tier, which bounds its connections.
        placement: Where its database is.
    """

    def __init__(
        self,
        connector: Connector,
        dialect: Dialect,
        *,
        home: Home,
        tenant_id: UUID,
        slug: str,
        tier: str,
        placement: Placement,
    ) -> None:
        super().__init__(self._no_creator, dialect=dialect)
        self.connector = connector
        self.share: Share[Record] = connector.share(tenant_id, tier, slug=slug)
        self.route = TenantRoute(
            tenant_id=tenant_id,
            slug=slug,
            tier=tier,
            placement=placement,
            share=self.share,
            home=home,
            events=connector.events,
        )
        self.route.on_write = connector.on_write
        self.retired = False
        self.detour = False
        """Whether a checkout asks first where the tenant's database is now: it may be another one, or about to be."""

    # Storing a bound method of the pool as its creator would be a reference cycle, so the creator is a property.

    @staticmethod
    def _no_creator() -> DBAPIConnection:
        raise AssertionError("a tenant's pool connects through its connector")

    @property
    def _creator(self) -> Any:
        return self._no_creator

    @_creator.setter
    def _creator(self, creator: object) -> None:
        pass

    @property
    def tenant_id(self) -> UUID:
        """The tenant."""
        return self.route.tenant_id

    @property
    def slug(self) -> str:
        """Its slug."""
        return self.route.slug

    # --- checkout ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def connect_for_reading(self) -> PoolProxiedConnection:
        """Return a connection like ``connect``, for a read-only session."""

    def _take(self, *, reading: bool = False) -> Record | None:
        """Take an idle connection that is neither too old nor known to be closed; one in the right mode if there is."""

        def suits(record: Record) -> bool:
            return cast("HeldConnection", record.dbapi_connection).has_mode_of(reading=reading)

        now = time.monotonic()
        while (entry := self.connector.budget.take(self.share, now, prefer=suits)) is not None:
            since, record = entry
            if (
                now - since <= self.connector.idle_timeout
                and not cast("HeldConnection", record.dbapi_connection).is_closed
                and not record._is_hard_or_soft_invalidated()
            ):
                return record
            self.discard(record)
        return None

    def _deadline(self) -> tuple[float, float]:
        """Until when a checkout that begins now waits (``time.monotonic()``), and how many seconds that is."""
        now, timeout, sooner = time.monotonic(), self.connector.checkout_timeout, current_deadline()
        return (now + timeout, timeout) if now + timeout <= sooner else (sooner, max(0.0, sooner - now))

    async def _timeout_error(self, timeout: float, *, refused: bool = False) -> TenancyError:
        """Return the error for a request that waited for ``timeout`` seconds and got no connection."""
        account = self.share.account
        self.connector.contention.timed_out(account, timeout)
        if refused or account.ceiling is not None:
            return await self.connector.shortages.error(self.route)
        return self.connector.contention.timeout_error(account, timeout)

    def _refused_error(self, refusal: Refusal, timeout: float) -> TenancyError:
        """Return the error for a request that does not wait."""
        account = self.share.account
        self.connector.contention.refused(account, refusal)
        return self.connector.contention.refused_error(account, refusal, timeout)

    # --- return -----------------------------------------------------------------------------------------------------

    def _return_idle(self, record: Record) -> None:
        self.connector.outage.answers += 1
        if self.connector.budget.put(self.share, record, time.monotonic()):
            self.connector.schedule_sweep()
        else:
            self.discard(record)
            self.connector.shortages.gave_up(self.route)

    def _reusable(self, record: Record) -> bool:
        connection = cast("HeldConnection", record.dbapi_connection)
        return connection.usable and not record._is_hard_or_soft_invalidated()

    # --- closing ----------------------------------------------------------------------------------------------------

    def discard(self, record: Record) -> None:
        """Close a connection that counts as in use."""
        self.connector.discard(record)

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        # It may be one of another server's: SQLAlchemy closes a connection that was detached, or that the garbage
        # collector has found, by the pool that was asked for it. And that may be in any thread, at any point.
        cast("HeldConnection", connection).finalizer()

    def retire(self) -> None:
        """Close idle connections now, and busy ones when they are returned."""
        self.retired = self.detour = True
        for record in self.connector.budget.take_idle(self.share):
            self.discard(record)

    @abstractmethod
    def recreate(self) -> Self:
        """Return a new pool for the same tenant; ``Engine.dispose`` calls this."""

    def status(self) -> str:
        """Return a line of text about the pool."""
        share = self.share
        return f"tenant {self.slug!r}: {share.busy} connections in use or being opened, {len(share.idle)} idle"


__all__ = ["RoutedPool"]
