"""Leased quotas: a process takes a block, counts in memory, and returns what it has not spent.

The database counts a block as used when it is taken, so the limit can never be passed. Near the limit blocks shrink to
what is asked for, and a process that is refused while others hold unspent blocks has them called back: together the
processes use up the limit exactly. A process that dies loses what it had not spent of its last block, and no more.

An answer may be lost after the database has acted. So what was sent back is never spent again, and every block has an
id of its own, under which giving it back can be repeated: the second time it is not there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from contextvars import Context
from threading import get_ident
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import text

from ..config.tiers import LARGEST_AMOUNT
from ..context import _current, refuse_other_tenant
from ..control.database import ControlDatabase
from ..errors import ControlUnavailableError
from ..loops import HomeLoop

logger = logging.getLogger("tenancy_orm.quotas")

HEARTBEAT_SECONDS: Final = 0.5  # how often a process looks whether its leases are called back
LEASE_SECONDS: Final = 15.0  # how long a dead process's lease is waited for by those it makes wait
IDLE_SECONDS: Final = 5.0  # a lease that was not used for this long is returned unasked
RECLAIM_SECONDS: Final = 1.5  # how long a refused process waits for others to return theirs: three heartbeats
_POLL_SECONDS: Final = 0.05
_ALL: Final = 2**62  # of what the database knows to be unspent

_LEASE = text(
    "SELECT *, nullif(ends_at, 'infinity') AS resets_at, extract(epoch FROM nullif(ends_at, 'infinity') - at)"
    "::double precision AS seconds FROM tenancy.quota_take_block("
    "CAST(:tenant_id AS uuid), :resource, CAST(:id AS uuid), CAST(:previous AS uuid), CAST(:held AS bigint), "
    "CAST(:amount AS bigint), CAST(:block AS bigint), CAST(:seconds AS double precision))"
)
_RETURN = text("SELECT tenancy.quota_return_block(CAST(:id AS uuid), CAST(:unspent AS bigint))")
_RECLAIMED = text("SELECT id FROM tenancy.quota_blocks WHERE id = ANY(CAST(:ids AS uuid[])) AND reclaim")
_RENEW = text(
    "UPDATE tenancy.quota_blocks SET expires_at = clock_timestamp() + make_interval(secs => :seconds) "
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
        "_home",
        "_keeper",
        "_lock",
        "_refused",
        "_returning",
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
        self._home = keeper.home
        self._block = block
        self._lock = asyncio.Lock()  # one question to the database at a time; it protects id and _returning
        # the block in hand, and how much of it is unspent
        self.id: UUID | None = None
        self._held = 0
        # blocks on their way back by id, and how much is returned of each: gone from here when the database says so
        self._returning: dict[UUID, int] = {}
        # when the period that the held amount counts in is over, by the monotonic clock
        self._until = -math.inf
        self._touched = False
        self._stale = False
        # the last refusal: when it was asked for, how much, and the answer
        self._refused: tuple[float, int, Any] | None = None

    @property
    def held(self) -> int:
        """How much of the block is in hand: what a crash would lose now, beside what is on its way back."""
        return self._held

    def try_consume(self, amount: int = 1) -> bool:
        """Count ``amount`` against the block in hand; False, and nothing counted, if it does not cover it.

        Raises:
            CrossTenantError: another tenant is bound.
            WrongEventLoopError: this is another thread.
        """
        if get_ident() != self._home.thread:
            self._home.check()
        # written out here: it is to cost less than a microsecond
        if (bound := _current.get()) is not None:
            if bound.id != self.tenant_id:
                refuse_other_tenant(self.tenant_id)
            if bound.admission is not None:
                bound.admission.check()
        if type(amount) is int and 0 < amount <= self._held and time.monotonic() < self._until:
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
            ValueError: ``amount`` is no whole number from 1 to 10**15.
            CrossTenantError: another tenant is bound.
        """
        if not self.try_consume(amount):
            check_amount(amount)
            self._home.check()
            # apart, since a caller that is cancelled must not take the answer, and the block in it, with it
            task = asyncio.ensure_future(self._refill(amount))
            task.add_done_callback(_retrieve)
            await asyncio.shield(task)

    async def release(self) -> None:
        """Return what is in hand, and what could not be returned before.

        It cannot be spent from the call on, whether or not that succeeds: the keeper repeats what did not.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: another tenant is bound.
            WrongEventLoopError: this is another event loop or thread.
        """
        self._home.check()
        refuse_other_tenant(self.tenant_id)
        async with self._lock:
            await self._return()

    async def settle(self) -> None:
        """Return what could not be returned before."""
        async with self._lock:
            await self._give_back()

    @property
    def is_settled(self) -> bool:
        """Whether nothing is on its way back."""
        return not self._returning

    def expire(self) -> None:
        """Let the next ``consume`` return what is in hand and ask again: the limit may have changed.

        That holds for a block that is on its way as well.
        """
        self._until = -math.inf
        self._stale = True

    async def _refill(self, amount: int) -> None:
        called = time.monotonic()
        while True:
            async with self._lock:
                if self.try_consume(amount):
                    return
                row = self._refusal(called, amount) or await self._ask(amount)
            if row.outcome != "exceeded" or not row.in_blocks or time.monotonic() - called >= RECLAIM_SECONDS:
                self._keeper.conclude(self.tenant_id, self.resource, amount, row)
                return
            # others hold some of it: they have been asked to return it, and look every HEARTBEAT_SECONDS
            await asyncio.sleep(_POLL_SECONDS)

    def _refusal(self, called: float, amount: int) -> Any:
        """A final refusal of as much or less that was asked for after this call began, and so holds for it as well."""
        if self._refused is not None:
            asked, refused, row = self._refused
            if asked >= called and amount >= refused and not row.in_blocks:
                return row
        return None

    async def _ask(self, amount: int) -> Any:
        """Ask for ``amount`` and a block beyond it. Called under the lock."""
        if self._held and (self._stale or time.monotonic() >= self._until):
            await self._return()
        self._stale = False
        asked = time.monotonic()
        held, self._held = self._held, 0
        new = uuid4()
        try:
            row = await self._keeper.lease(self, new, held, amount, self._block)
        except BaseException:
            # it may have been done: one of the two blocks is there, so both are returned
            self._put_back(held)
            self._returning[new] = _ALL
            self._keeper.watch(self)
            raise
        if row.outcome == "counted":
            self.id = new
            self._held = held + row.granted - amount
            # measured from before the question, so that it is never past the period's end
            self._until = math.inf if row.seconds is None else asked + row.seconds
            if self._stale:
                self._until = -math.inf
            self._touched = True
            self._keeper.watch(self)
        else:
            self._held = held
            self._refused = (asked, amount, row)
        return row

    async def _return(self) -> None:
        held, self._held = self._held, 0
        self._put_back(held)
        await self._give_back()

    def _put_back(self, unspent: int) -> None:
        """Let go of the block for good, before anything is said about it."""
        if self.id is not None:
            self._returning[self.id] = unspent
            self.id = None

    async def _give_back(self) -> None:
        for block_id, unspent in list(self._returning.items()):
            await self._keeper.give_back(block_id, unspent)
            del self._returning[block_id]
        if self.id is None:
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
        self.home = HomeLoop()
        self.conclude = conclude
        # those with a block in hand or on its way back, and since when each is idle
        self._leases: dict[LeasedQuota, float | None] = {}
        self._task: asyncio.Task[None] | None = None
        self._renewed = 0.0

    async def lease(self, lease: LeasedQuota, block_id: UUID, held: int, amount: int, block: int) -> Any:
        """Ask for ``amount`` beyond what is ``held``, and up to ``block``, all under the new ``block_id``."""
        parameters = {
            "tenant_id": lease.tenant_id,
            "resource": lease.resource,
            "id": block_id,
            "previous": lease.id,
            "held": held,
            "amount": amount,
            "block": block,
            "seconds": LEASE_SECONDS,
        }
        async with self._control.connect() as conn:
            return (await conn.execute(_LEASE, parameters)).one()

    async def give_back(self, block_id: UUID, unspent: int) -> None:
        """Return what a block has left. Where it has none left, its row is removed all the same."""
        async with self._control.connect() as conn:
            await conn.execute(_RETURN, {"id": block_id, "unspent": unspent})

    def watch(self, lease: LeasedQuota) -> None:
        """Look after a lease from now on."""
        self._leases.setdefault(lease, None)
        if self._task is None or self._task.done():
            # it looks after all tenants' leases, so it must not run for the one whose lease was the first
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    def forget(self, lease: LeasedQuota) -> None:
        """Stop looking after a lease that was returned."""
        self._leases.pop(lease, None)

    async def close(self) -> None:
        """Return every lease. What cannot be returned stays counted as used: an end is no place for an error."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for lease in list(self._leases):
            if not await self._attempt(lease.release()):
                logger.warning("%d leased blocks stay counted: the control database is away", len(self._leases))
                return

    async def _run(self) -> None:
        while self._leases:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            # whatever happens, what is in hand may still be spent, since it is counted; the next beat makes up for it
            await self._attempt(self._beat())

    async def _attempt(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do part of the work, none of which may end the rest; False if the control database is away."""
        try:
            await work
        except ControlUnavailableError:
            logger.warning("leased quotas are not looked after: the control database is not available")
            return False
        except Exception:
            logger.exception("leased quotas are not looked after")
        return True

    async def _beat(self) -> None:
        now = time.monotonic()
        held = {lease.id: lease for lease in self._leases if lease.id is not None}
        async with self._control.connect() as conn:
            called = set(await conn.scalars(_RECLAIMED, {"ids": list(held)}))
            if now - self._renewed > LEASE_SECONDS / 3:
                await conn.execute(_RENEW, {"ids": list(held), "seconds": LEASE_SECONDS})
                self._renewed = now
        for lease, idle_since in list(self._leases.items()):
            if lease not in self._leases:
                continue  # returned since
            since = (idle_since or now) if lease.idle() else None
            self._leases[lease] = since
            if lease.id in called or (since is not None and now - since > IDLE_SECONDS):
                work = lease.release()
            elif not lease.is_settled:
                work = lease.settle()
            else:
                continue
            if not await self._attempt(work):
                return


def check_amount(amount: int, *, least: int = 1, what: str = "an amount") -> None:
    """Refuse what is no whole number that PostgreSQL's bigint can count: bool, floats, and NaN among them.

    Raises:
        ValueError: it is not.
    """
    if type(amount) is not int or not least <= amount <= LARGEST_AMOUNT:
        raise ValueError(f"{what} must be a whole number from {least} to 10**15, not {amount!r}")


def _retrieve(task: asyncio.Future[None]) -> None:
    """Take the exception of a task whose caller was cancelled, which asyncio would report as never retrieved."""
    if not task.cancelled():
        task.exception()
