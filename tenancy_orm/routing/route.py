"""What a tenant's pool and its connections share: the tenant, its placement and share, and the check of the binding."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy.pool.base import _ConnectionRecord

from ..context import current_tenant_or_none
from ..errors import CrossTenantError
from ..events import EventBus, IsolationIncident
from ..loops import Home
from ..tenant import Placement
from .budget import Share

logger = logging.getLogger("tenancy_orm.routing")


class FindsDatabases(Protocol):
    """``Detours``, as pools see it: it finds the database of a tenant that was moved while a session was open."""

    async def find(self, route: TenantRoute, *, look_again: bool = False) -> Any:
        """Lease the engine to use instead of the one that ``route`` is of; None for that one."""

    def release(self, entry: Any) -> None:
        """End the lease."""


class TenantRoute:
    """One tenant on one server.

    Args:
        tenant_id: The tenant.
        slug: Its slug, for errors and events.
        tier: The name of its tier, for errors.
        placement: Where its database is; the sealed password in it is replaced after a rotation.
        share: Its part of the server's budget.
        home: The event loop, or the threads, that its connections belong to.
        events: Receives incidents.
    """

    __slots__ = (
        "_changing_until",
        "_events",
        "home",
        "on_write",
        "placement",
        "schema_changed_at",
        "share",
        "slug",
        "tenant_id",
        "tier",
    )

    def __init__(
        self,
        *,
        tenant_id: UUID,
        slug: str,
        tier: str,
        placement: Placement,
        share: Share[_ConnectionRecord],
        home: Home,
        events: EventBus,
    ) -> None:
        self.tenant_id = tenant_id
        self.slug = slug
        self.tier = tier
        self.placement = placement
        self.share = share
        self.home = home
        self._events = events
        # called after something was committed, where there are replicas to read it from
        self.on_write: Callable[[UUID], None] | None = None
        self.schema_changed_at = 0.0  # as time.time(), like the times that SQLAlchemy compares it with
        self._changing_until = 0.0

    def schema_changed(self, *, changing_seconds: float = 0.0) -> None:
        """Have each connection prepare its statements again: a migration begins, or has ended.

        Args:
            changing_seconds: For how long every statement is prepared again, since the schema is being changed; 0 where
                the migration has ended.
        """
        self.schema_changed_at = time.time()
        self._changing_until = self.schema_changed_at + changing_seconds if changing_seconds else 0.0

    def outdated_before(self, moment: float) -> None:
        """Have each connection prepare again what it prepared before ``moment``; a migration may still go on."""
        # a later one counts, unless the clock was set back
        if not moment < self.schema_changed_at <= time.time():
            self.schema_changed_at = moment

    def schema_valid_since(self) -> float:
        """Return the time before which no statement that is used now may have been prepared.

        A statement that is prepared in its transaction locks its tables, so the schema cannot change before it is
        executed. During a migration that is how every statement is sent.
        """
        if self._changing_until:
            now = time.time()
            if now < self._changing_until:
                return now
        return self.schema_changed_at

    @property
    def is_changing(self) -> bool:
        """Whether a migration may be changing the schema now."""
        return bool(self._changing_until) and time.time() < self._changing_until

    def note_write(self) -> None:
        """Note that something was, or may have been, committed just now. In any thread."""
        if self.on_write is not None:
            self.on_write(self.tenant_id)

    def check_bound(self) -> None:
        """Check that the running code may use this tenant's connections.

        Raises:
            CrossTenantError: another tenant is bound.
            AdmissionEndedError, TenantUnavailableError: the admission of the bound request has ended.
            WrongEventLoopError: this is another event loop or thread.
        """
        self.home.check()
        bound = current_tenant_or_none()
        if bound is None:
            return
        if bound.id != self.tenant_id:
            error = CrossTenantError("using a connection", bound=bound.slug, requested=self.slug)
            self.report_incident(error)
            raise error
        if bound.admission is not None:
            bound.admission.check()

    def report_incident(self, error: Exception) -> None:
        """Log and emit that a layer of isolation has refused an operation on this tenant."""
        kind = type(error).__name__
        logger.error("%s: %s", kind, error)
        self._events.emit(IsolationIncident(tenant_id=self.tenant_id, slug=self.slug, kind=kind, detail=str(error)))


__all__ = ["FindsDatabases", "TenantRoute"]
