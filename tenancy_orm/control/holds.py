"""Limits on concurrency: what is held at one moment, by processes that may die while they hold it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import text

from ..errors import ControlUnavailableError
from .database import ControlDatabase

logger = logging.getLogger("tenancy_orm.quotas")

HOLD_SECONDS: Final = 30.0  # a holder that does not renew is forgotten after this long
_RENEW_SECONDS: Final = HOLD_SECONDS / 3

_HOLD = text(
    "SELECT *, nullif(ends_at, 'infinity') AS resets_at FROM tenancy.quota_hold(CAST(:tenant_id AS uuid), :resource, "
    "CAST(:amount AS bigint), CAST(:id AS uuid), CAST(:seconds AS double precision))"
)
_RENEW = text(
    "UPDATE tenancy.quota_holds SET expires_at = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE id = ANY(CAST(:ids AS uuid[])) RETURNING id"
)
_LET_GO = text("DELETE FROM tenancy.quota_holds WHERE id = CAST(:id AS uuid)")


class Hold:
    """Something a tenant holds for as long as a block of code runs."""

    __slots__ = ("id", "lost")

    def __init__(self) -> None:
        self.id: UUID = uuid4()
        # set where the database was away for so long that the hold was taken for a dead process's
        self.lost = False


class HoldKeeper:
    """Renews what this process holds."""

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control
        self._holds: dict[UUID, Hold] = {}
        self._task: asyncio.Task[None] | None = None

    async def take(self, hold: Hold, tenant_id: UUID, resource: str, amount: int) -> Any:
        """Ask for one more hold; returns the database's answer."""
        parameters = {
            "tenant_id": tenant_id,
            "resource": resource,
            "amount": amount,
            "id": hold.id,
            "seconds": HOLD_SECONDS,
        }
        async with self._control.connect() as conn:
            return (await conn.execute(_HOLD, parameters)).one()

    @asynccontextmanager
    async def keep(self, hold: Hold) -> AsyncIterator[None]:
        """Renew ``hold`` while the body runs, and let go of it at the end."""
        self._holds[hold.id] = hold
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())
        try:
            yield
        finally:
            del self._holds[hold.id]
            # apart, so that a cancelled body lets go as well
            task = asyncio.ensure_future(self.let_go(hold))
            await asyncio.shield(task)

    async def let_go(self, hold: Hold) -> None:
        """Give the place free. Where the database does not answer, it is free when the hold expires."""
        try:
            async with self._control.connect() as conn:
                await conn.execute(_LET_GO, {"id": hold.id})
        except ControlUnavailableError:
            logger.warning("a hold ends by itself in %g s: the control database is not available", HOLD_SECONDS)

    async def close(self) -> None:
        """Stop renewing."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while self._holds:
            await asyncio.sleep(_RENEW_SECONDS)
            try:
                await self._renew()
            except ControlUnavailableError:
                logger.warning("holds cannot be renewed: the control database is not available")

    async def _renew(self) -> None:
        holds = dict(self._holds)
        async with self._control.connect() as conn:
            kept = set(await conn.scalars(_RENEW, {"ids": list(holds), "seconds": HOLD_SECONDS}))
        for hold_id, hold in holds.items():
            if hold_id not in kept and hold_id in self._holds:
                hold.lost = True
                logger.error("a hold was lost: it had not been renewed for %g s", HOLD_SECONDS)
