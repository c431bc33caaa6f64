"""Limits on concurrency: places that are held for a time, by processes that may die while they hold them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import text

from ..control.database import ControlDatabase
from ..errors import ControlUnavailableError

logger = logging.getLogger("tenancy_orm.quotas")

HOLD_SECONDS: Final = 30.0  # a hold that is not renewed for this long expires
_RENEW_SECONDS: Final = HOLD_SECONDS / 3

_ACQUIRE = (
    "SELECT outcome, slug, amount_limit, period, used, nullif(ends_at, 'infinity') AS resets_at, crossed "
    "FROM tenancy.quota_hold($1::uuid, $2::text, $3::bigint, $4::uuid, $5::double precision)"
)
_RENEW = text(
    "UPDATE tenancy.quota_holds SET expires_at = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE id = ANY(CAST(:ids AS uuid[])) RETURNING id"
)
_RELEASE = "DELETE FROM tenancy.quota_holds WHERE id = $1::uuid"


class Hold:
    """One tenant's hold on a place, for as long as a block of code runs."""

    __slots__ = ("_certain_until", "id")

    def __init__(self) -> None:
        self.id: UUID = uuid4()
        # by the monotonic clock
        self._certain_until = math.inf

    @property
    def lost(self) -> bool:
        """Whether the hold may have expired, so that another one has its place: it was not renewed in time."""
        return time.monotonic() >= self._certain_until

    def mark_renewed(self, asked_at: float) -> None:
        """Count ``HOLD_SECONDS`` from ``asked_at``, when the renewal was sent, which is before it took effect."""
        self._certain_until = asked_at + HOLD_SECONDS

    def mark_lost(self) -> None:
        """Record that the hold has expired."""
        self._certain_until = -math.inf


class HoldManager:
    """Takes, renews and releases the holds of this process."""

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control
        self._holds: dict[UUID, Hold] = {}
        self._task: asyncio.Task[None] | None = None

    async def acquire(self, hold: Hold, tenant_id: UUID, resource: str, amount: int) -> Any:
        """Take ``hold``; returns the database's answer."""
        asked_at = time.monotonic()
        (row,) = await self._control.fetch(_ACQUIRE, tenant_id, resource, amount, hold.id, HOLD_SECONDS)
        if row.outcome == "counted":
            hold.mark_renewed(asked_at)
            # not before: a renewal in between would not find its row, and mark it as lost
            self._holds[hold.id] = hold
            if self._task is None or self._task.done():
                # it renews all tenants' holds, so it must not run with the first one's tenant bound
                self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())
        return row

    @asynccontextmanager
    async def releasing(self, hold: Hold) -> AsyncIterator[None]:
        """Release ``hold`` after the body, which acquires it; it is renewed until then."""
        try:
            yield
        finally:
            self._holds.pop(hold.id, None)
            if not self._control.home.is_forked:  # it is the parent's
                await self._release_shielded(hold)

    async def _release_shielded(self, hold: Hold) -> None:
        # in a task of its own, so that a cancelled body releases it as well
        await asyncio.shield(asyncio.ensure_future(self.release(hold)))

    async def release(self, hold: Hold) -> None:
        """Release the place. Where the database does not answer, it is free when the hold expires."""
        try:
            await self._control.fetch(_RELEASE, hold.id)
        except ControlUnavailableError:
            logger.warning("a hold could not be released: it expires within %g s", HOLD_SECONDS)

    async def close(self) -> None:
        """Stop renewing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while self._holds:
            await asyncio.sleep(_RENEW_SECONDS)
            try:
                await self._renew()
            except ControlUnavailableError:
                logger.warning("holds cannot be renewed: the control database is not available")
            except Exception:
                # such as a server that is read-only for a moment: the next renewal may be in time
                logger.exception("holds cannot be renewed")

    async def _renew(self) -> None:
        holds = dict(self._holds)
        asked_at = time.monotonic()
        async with self._control.connect() as connection:
            renewed = set(await connection.scalars(_RENEW, {"ids": list(holds), "seconds": HOLD_SECONDS}))
        for hold_id, hold in holds.items():
            if hold_id in renewed:
                hold.mark_renewed(asked_at)
            elif hold_id in self._holds:
                hold.mark_lost()
                logger.error("a hold was lost: it had not been renewed for %g s", HOLD_SECONDS)
