"""Leased quotas: a process takes a block, counts in memory, and returns what it has not spent.

The database counts a block as used when it is taken, so the limit can never be passed. Near the limit blocks shrink to
what is asked for, and a process that is refused while others hold unspent blocks has them called back: together the
processes use up the limit exactly. A process that dies loses what it had not spent of its last block, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import text

from ..errors import ControlUnavailableError
from .database import ControlDatabase

logger = logging.getLogger("tenancy_orm.quotas")

HEARTBEAT_SECONDS: Final = 0.5  # how often a process looks whether its leases are called back
LEASE_SECONDS: Final = 15.0  # how long a dead process's lease is waited for by those it makes wait
IDLE_SECONDS: Final = 5.0  # a lease that was not used for this long is returned unasked
RECLAIM_SECONDS: Final = 1.5  # how long a refused process waits for others to return theirs: three heartbeats
_POLL_SECONDS: Final = 0.05

_LEASE = text(
    "SELECT *, nullif(ends_at, 'infinity') AS resets_at, extract(epoch FROM nullif(ends_at, 'infinity') - at)"
    "::double precision AS seconds FROM tenancy.quota_lease("
    "CAST(:tenant_id AS uuid), :resource, CAST(:id AS uuid), CAST(:held AS bigint), CAST(:amount AS bigint), "
    "CAST(:block AS bigint), CAST(:seconds AS double precision))"
)
_RETURN = text("SELECT tenancy.quota_return(CAST(:id AS uuid), CAST(:unspent AS bigint))")
_RECLAIMED = text("SELECT id FROM tenancy.quota_leases WHERE id = ANY(CAST(:ids AS uuid[])) AND reclaim")
_RENEW = text(
    "UPDATE tenancy.quota_leases SET expires_at = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE id = ANY(CAST(:ids AS uuid[]))"
)

Conclude = Callable[[UUID, str, int, Any], object]


class LeasedQuota:
    """One process's share of one tenant's quota; made by ``QuotaManager.leased``.

    ``try_consume`` is a subtraction. ``consume`` asks the database where the block is spent.
    """

    __slots__ = (
        "__weakref__",
        "_block",
        "_held",
        "_keeper",
        "_lock",
        "_refused",
        "_stale",
        "_touched",
        "_until",
        "id",
        "resource",
        "tenant_id",
    )

    def __init__(self, keeper: LeaseKeeper, tenant_id: UUID, resource: str, block: int) -> None:
        self.tenant_id = tenant_id
        self.resource = resource
        self._keeper = keeper
        self._block = block
        self.id = uuid4()
        self._lock = asyncio.Lock()  # one question to the database at a time
        self._held = 0
        # when the period that the held amount counts in is over, by the monotonic clock
        self._until = -math.inf
        self._touched = False
        self._stale = False
        # the last refusal: when it was asked for, how much, and the answer
        self._refused: tuple[float, int, Any] | None = None

    @property
    def held(self) -> int:
        """How much of the block is in hand: what a crash would lose now."""
        return self._held

    def try_consume(self, amount: int = 1) -> bool:
        """Count ``amount`` against the block in hand; False, and nothing counted, if it does not cover it."""
        if 0 < amount <= self._held and time.monotonic() < self._until:
            self._held -= amount
            self._touched = True
            return True
        return False

    async def consume(self, amount: int = 1) -> None:
        """Count ``amount`` as used, taking a new block if need be. A cancelled call may have counted.

        Raises:
            QuotaExceededError: it would pass the limit, and no other process has any of it left to return.
            TenantNotFoundError: no such tenant.
            UnknownQuotaError: the resource has no limit for this tenant.
            ControlUnavailableError: the block is spent, and the control database does not answer.
        """
        if not self.try_consume(amount):
            if amount < 1:
                raise ValueError(f"an amount must be at least 1, not {amount}")
            # apart, since a caller that is cancelled must not take the answer, and the block in it, with it
            task = asyncio.ensure_future(self._refill(amount))
            task.add_done_callback(_retrieve)
            await asyncio.shield(task)

    async def release(self) -> None:
        """Return what is in hand."""
        async with self._lock:
            await self._return()

    def expire(self) -> None:
        """Let the next ``consume`` return what is in hand and ask anew: the limit may have changed."""
        self._until = -math.inf
        self._stale = True

    async def _refill(self, amount: int) -> None:
        called = time.monotonic()
        while True:
            async with self._lock:
                if self.try_consume(amount):
                    return
                row = self._refusal(called, amount) or await self._ask(amount)
            if row.outcome != "exceeded" or not row.leased or time.monotonic() - called >= RECLAIM_SECONDS:
                self._keeper.conclude(self.tenant_id, self.resource, amount, row)
                return
            # others hold some of it: they have been asked to return it, and look every HEARTBEAT_SECONDS
            await asyncio.sleep(_POLL_SECONDS)

    def _refusal(self, called: float, amount: int) -> Any:
        """A final refusal of as much or less that was asked for after this call began, and so holds for it as well."""
        if self._refused is not None:
            asked, refused, row = self._refused
            if asked >= called and amount >= refused and not row.leased:
                return row
        return None

    async def _ask(self, amount: int) -> Any:
        """Ask for ``amount`` and a block beyond it. Called under the lock."""
        if self._held and (self._stale or time.monotonic() >= self._until):
            await self._return()
        self._stale = False
        asked = time.monotonic()
        held, self._held = self._held, 0
        try:
            row = await self._keeper.lease(self, held, amount, self._block)
        except BaseException:
            self._held = held
            raise
        if row.outcome == "counted":
            self._held = held + row.granted - amount
            # measured from before the question, so that it is never past the period's end
            self._until = math.inf if row.seconds is None else asked + row.seconds
            self._touched = True
            self._keeper.watch(self)
        else:
            self._held = held
            self._refused = (asked, amount, row)
        return row

    async def _return(self) -> None:
        unspent, self._held = self._held, 0
        try:
            await self._keeper.give_back(self.id, unspent)
        except BaseException:
            self._held = unspent
            raise
        self._keeper.forget(self)

    def idle(self) -> bool:
        """Whether it was not used since this was last asked."""
        touched, self._touched = self._touched, False
        return not touched


class LeaseKeeper:
    """Keeps a process's leases alive, and returns those that are idle or called back.

    Args:
        control: The control database.
        conclude: Turns an answer of the database into events and errors.
    """

    def __init__(self, control: ControlDatabase, conclude: Conclude) -> None:
        self._control = control
        self.conclude = conclude
        self._leases: dict[UUID, LeasedQuota] = {}
        self._idle_since: dict[UUID, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._renewed = 0.0

    async def lease(self, lease: LeasedQuota, held: int, amount: int, block: int) -> Any:
        """Ask for ``amount`` beyond what is ``held``, and up to ``block``."""
        parameters = {
            "tenant_id": lease.tenant_id,
            "resource": lease.resource,
            "id": lease.id,
            "held": held,
            "amount": amount,
            "block": block,
            "seconds": LEASE_SECONDS,
        }
        async with self._control.connect() as conn:
            return (await conn.execute(_LEASE, parameters)).one()

    async def give_back(self, lease_id: UUID, unspent: int) -> None:
        """Return what a lease has not spent. Where it has none left, its row is removed all the same."""
        async with self._control.connect() as conn:
            await conn.execute(_RETURN, {"id": lease_id, "unspent": unspent})

    def watch(self, lease: LeasedQuota) -> None:
        """Look after a lease from now on."""
        self._leases[lease.id] = lease
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())

    def forget(self, lease: LeasedQuota) -> None:
        """Stop looking after a lease that was returned."""
        self._leases.pop(lease.id, None)
        self._idle_since.pop(lease.id, None)

    async def close(self) -> None:
        """Return every lease. What cannot be returned stays counted as used: an end is no place for an error."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        for lease in list(self._leases.values()):
            try:
                await lease.release()
            except ControlUnavailableError:
                logger.warning("%d leased blocks stay counted: the control database is away", len(self._leases))
                return

    async def _run(self) -> None:
        while self._leases:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                await self._beat()
            except ControlUnavailableError:
                # what is in hand may still be spent, since it is counted; it is returned when the database is back
                logger.warning("leased quotas cannot be renewed: the control database is not available")

    async def _beat(self) -> None:
        now = time.monotonic()
        ids = list(self._leases)
        async with self._control.connect() as conn:
            called = set(await conn.scalars(_RECLAIMED, {"ids": ids}))
            if now - self._renewed > LEASE_SECONDS / 3:
                await conn.execute(_RENEW, {"ids": ids, "seconds": LEASE_SECONDS})
                self._renewed = now
        for lease_id in ids:
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            since = self._idle_since.setdefault(lease_id, now) if lease.idle() else None
            if since is None:
                self._idle_since.pop(lease_id, None)
            if lease_id in called or (since is not None and now - since > IDLE_SECONDS):
                await lease.release()


def _retrieve(task: asyncio.Future[None]) -> None:
    """Take the exception of a task whose caller was cancelled, which asyncio would report as never retrieved."""
    if not task.cancelled():
        task.exception()
